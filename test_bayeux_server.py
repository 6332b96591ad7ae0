#!/usr/bin/env python3
"""Tests of bayeux_server.py: a class for each of its sections, in the same order.

    python -m pytest                     # after pip install pytest
    python test_bayeux_server.py         # the same

The core is driven with plain dicts and a clock that the test winds; the rest by real sockets on
127.0.0.1.  Rules of the protocol are named by their numbers (N1, C3, ...), in the order in which
README's promises follow from them.  An error that the server logs and no test expects fails that test.
"""
from __future__ import annotations

import json
import logging
import pathlib
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager

import pytest

import bayeux_server
from bayeux_server import BayeuxServer, LocalClient, OptionError

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20       # seconds until a test gives up waiting; nothing asserts that anything is faster


# ======================================================================================
# Peers: how the tests speak to the core and to a server
# ======================================================================================

class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class FakeExchange(bayeux_server.Exchange):
    """A request without a network: its answer is kept as decoded messages, or lost on the way."""

    def __init__(self, core, is_broken=False, may_hold=True, browser=None, address="10.0.0.1",
                 transport="long-polling"):
        super().__init__()
        self.core = core
        self.is_broken = is_broken
        self.may_hold = may_hold
        self.browser = browser
        self.address = address
        self.transport = transport
        self.answer = None          # the batch that came back; None as long as none did

    def name_browser(self):
        self.browser = self.browser or "browser"
        return self.browser

    def send(self, answer):
        if self.is_broken:
            return False
        assert self.answer is None, "a request was answered twice"
        self.answer = json.loads(answer.batch())
        return True


class CorePeer:
    """The core, a clock, and the long-poll wait's work done when the test asks for it."""

    def __init__(self, **options):
        self.clock = Clock()
        self.told = []              # what the listener heard
        self.core = bayeux_server.Bayeux(bayeux_server.Options(**options), clock=self.clock)
        self.core.add_listener(lambda event, details: self.told.append((event, details)))

    def send(self, *messages, **exchange):
        """Send a batch; the exchange, answered or held."""
        exchange = FakeExchange(self.core, **exchange)
        self.core.receive(list(messages), exchange)
        return exchange

    def ask(self, *messages, **exchange):
        """Send a batch that is answered at once; its replies."""
        answer = self.send(*messages, **exchange).answer
        assert answer is not None, "the request is held"
        return answer

    def handshake(self, connect=True, **fields):
        """A new session, past its first connect unless told otherwise; its clientId."""
        reply, = self.ask({"channel": "/meta/handshake", "version": "1.0", **fields})
        assert reply["successful"], reply
        if connect:
            assert self.ask(self.connect_message(reply["clientId"]))[0]["successful"]
        return reply["clientId"]

    @staticmethod
    def connect_message(client_id, **fields):
        return {"channel": "/meta/connect", "clientId": client_id, "connectionType": "long-polling", **fields}

    def hold(self, client_id, **fields):
        """A connect that is held."""
        exchange = self.send(self.connect_message(client_id, **fields))
        assert exchange.answer is None, exchange.answer
        return exchange

    def subscribe(self, client_id, *patterns):
        reply, = self.ask({"channel": "/meta/subscribe", "clientId": client_id, "subscription": list(patterns)})
        assert reply["successful"], reply

    def publish(self, client_id, channel, data="data", **fields):
        reply, = self.ask({"channel": channel, "clientId": client_id, "data": data, **fields})
        assert reply["successful"], reply

    def events(self, client_id):
        """What waits for the session, fetched by a connect that does not wait."""
        connect, *events = self.ask(self.connect_message(client_id, advice={"timeout": 0}))
        assert connect["channel"] == "/meta/connect" and connect["successful"], connect
        return events

    def work(self):
        """Do what the long-poll wait would do now, until nothing is left."""
        while True:
            with self.core.condition:
                answers = self.core.take_answers(100)
            self.core.wake()
            if not answers:
                return
            for answer in answers:
                self.core.settle_later(answer, answer.exchange.send(answer))

    def pass_time(self, seconds):
        self.clock.advance(seconds)
        self.work()

    def told_of(self, event):
        return [details for name, details in self.told if name == event]


@pytest.fixture
def core():
    """A core with default options."""
    return CorePeer()


class Answer:
    """An HTTP response as it came: status, headers (lower case names), body."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def batch(self):
        return json.loads(self.body)


class Wire:
    """A raw connection, which says exactly what the test wants to have said."""

    def __init__(self, server, tls=None):
        self.socket = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.path = server.options.path
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data.encode("utf-8") if isinstance(data, str) else data)

    def _read_until(self, is_enough):
        while not is_enough():
            data = self.socket.recv(65536)
            if not data:
                return False
            self.buffer += data
        return True

    def read_answer(self, has_body=True):
        """The next response; None if the server has closed the connection instead."""
        if not self._read_until(lambda: b"\r\n\r\n" in self.buffer):
            assert self.buffer == b"", f"a response broke off: {self.buffer!r}"
            return None
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(": ")
            assert name.lower() not in headers, f"two {name} headers"
            headers[name.lower()] = value
        status = int(status_line.split(" ")[1])
        length = int(headers.get("content-length", 0)) if has_body and status not in (100, 204, 304) else 0
        assert self._read_until(lambda: len(self.buffer) >= length), "the body is shorter than Content-Length"
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(status, headers, body)

    def request(self, method, target, body=b"", has_body=True, **headers):
        """Send one request and read its response.  Header names have _ for -."""
        self.send_request(method, target, body, **headers)
        return self.read_answer(has_body and method != "HEAD")

    def send_request(self, method, target, body=b"", **headers):
        lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1"]
        lines += ["{}: {}".format(name.replace("_", "-"), value) for name, value in headers.items()]
        if body:
            lines.append("Content-Length: %d" % len(body))
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def post(self, *messages, **headers):
        """Send a batch to the Bayeux path; its replies, whatever the status."""
        self.send_post(*messages, **headers)
        return self.read_answer().batch

    def send_post(self, *messages, **headers):
        headers.setdefault("Content_Type", "application/json")
        self.send_request("POST", self.path, json.dumps(messages).encode("utf-8"), **headers)

    def is_closed_by_server(self):
        return self.read_answer() is None


class Peer(Wire):
    """A Bayeux client over long-polling, on one connection for its connects and one for the rest."""

    def __init__(self, server, tls=None):
        super().__init__(server, tls)
        self.side = Wire(server, tls)
        reply, = self.post({"channel": "/meta/handshake", "version": "1.0",
                            "supportedConnectionTypes": ["long-polling"]})
        assert reply["successful"], reply
        self.id = reply["clientId"]
        assert self.connect(timeout=0)[0]["successful"]

    def close(self):
        super().close()
        self.side.close()

    def send_connect(self, **fields):
        self.send_post(CorePeer.connect_message(self.id, **fields))

    def connect(self, timeout=None):
        self.send_connect(**({} if timeout is None else {"advice": {"timeout": timeout}}))
        return self.read_answer().batch

    def ask(self, channel, **fields):
        """Send one message beside the connect; its reply."""
        reply, = self.side.post({"channel": channel, "clientId": self.id, **fields})
        return reply

    def subscribe(self, pattern):
        assert self.ask("/meta/subscribe", subscription=pattern)["successful"]

    def publish(self, channel, data):
        assert self.ask(channel, data=data)["successful"]


@pytest.fixture
def serve():
    """Starts servers on free ports, and stops them at the end: serve(option=value, ...)."""
    servers = []

    def start(**options):
        servers.append(BayeuxServer(**{"port": 0, "client_max_connections": 0, **options}))
        return servers[-1].start()

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def server(serve):
    return serve()


class Errors(logging.Handler):
    """What the server logged as an error.  A test that expects some takes them."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.records = []

    def emit(self, record):
        self.records.append(self.format(record))

    def take(self):
        taken, self.records = self.records, []
        return taken


@pytest.fixture(autouse=True)
def errors():
    handler = Errors()
    logging.getLogger("bayeux_server").addHandler(handler)
    yield handler
    logging.getLogger("bayeux_server").removeHandler(handler)
    assert handler.records == [], "the server logged errors that the test did not expect"


def wait_until(condition, what="the condition"):
    """Look again and again; for state that announces itself in no other way."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"{what} did not come true"
        time.sleep(0.005)

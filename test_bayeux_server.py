#!/usr/bin/env python3
"""Tests of bayeux_server.py: a class for each of its sections, in the same order.

    python -m pytest                     # after pip install pytest
    python test_bayeux_server.py         # the same

The core is driven with plain dicts and a clock that the test winds; the rest by real sockets on
127.0.0.1.  An error that the server logs and no test expects fails that test.
"""
from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import dataclasses
import email.utils
import errno
import faulthandler
import gc
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import runpy
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import urllib.parse
import weakref
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest

import bayeux_server
from bayeux_server import BayeuxError, BayeuxServer, LocalClient, OptionError

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20       # seconds until a test gives up waiting; nothing asserts that anything is faster
pytestmark = pytest.mark.filterwarnings("error")        # those of what is left open, and of threads that die, too


def readable(value):
    """The id of a case: its value as text, cut where it gets long."""
    if isinstance(value, str):
        text = value
    elif callable(value):
        text = getattr(value, "__name__", "function").strip("<>")
    else:
        text = repr(value)
    return text if len(text) <= 48 else text[:32] + "..." + text[-12:]


def for_each(names, cases, **options):
    """Run the test for each of the cases; a case of several arguments is a tuple."""
    return pytest.mark.parametrize(names, cases, **{"ids": readable, **options})


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

    def pack(self, answer):
        return b""

    def send(self, answer):
        if self.is_broken:
            return False
        assert self.answer is None, "a request was answered twice"
        self.answer = json.loads(answer.batch())
        return True


class CorePeer:
    """The core, a clock, and the long-poll wait's work done when the test asks for it."""

    listens_to = bayeux_server.EVENTS

    def __init__(self, **options):
        self.clock = Clock()
        self.told = []              # what the listener heard
        options = {"client_max_connections": 0, "max_sessions_per_browser": 0, **options}   # all come from one address
        self.core = bayeux_server.Bayeux(bayeux_server.Options(**options), clock=self.clock)
        self.core.add_listener(lambda event, details: self.told.append((event, details)), self.listens_to)

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
            for fate in self.core.send(answers):
                self.core.settle_later(*fate)

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
        self.server = server
        self.path = server.options.path
        self.tls = tls
        self.open()

    def open(self):
        self.socket = socket.create_connection(("127.0.0.1", self.server.port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # each send leaves as it is
        if self.tls is not None:
            self.socket = self.tls.wrap_socket(self.socket, server_hostname="localhost")
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
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def post(self, *messages, **headers):
        """Send a batch to the Bayeux path; its replies, whatever the status."""
        self.send_post(*messages, **headers)
        return self.read_answer().batch

    def send_post(self, *messages, **headers):
        headers.setdefault("Content_Type", "application/json")
        self.send_request("POST", self.path, json.dumps(messages).encode("utf-8"), **headers)

    def is_readable(self):
        return bool(self.buffer or select.select([self.socket], [], [], 0)[0])

    def is_closed_by_server(self):
        return self.read_answer() is None


@pytest.fixture
def serve(caplog):
    """Starts servers on free ports, and stops them at the end: serve(option=value, ...)."""
    servers = []

    def start(**options):
        servers.append(BayeuxServer(**{"port": 0, "client_max_connections": 0, **options}))
        return servers[-1].start()

    yield start
    for server in servers:
        server.shutdown()
        caplog.get_records("call").clear()      # these, and what pytest.raises has caught, keep frames alive
        wait_until(lambda server=server: keeps_nothing(server) or gc.collect() < 0, "the end of all that is counted")


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


def open_descriptors():
    """The files and sockets that this process has open, where the system lists them."""
    try:
        return set(os.listdir("/proc/self/fd"))
    except OSError:
        return set()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test ends by itself, and leaves no thread and nothing open.

    A test that hangs is ended with the whole run, and shows where each thread stands.
    """
    faulthandler.dump_traceback_later(10 * PATIENCE, exit=True)
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    yield
    wait_until(lambda: set(threading.enumerate()) <= threads, "the end of the test's threads")
    wait_until(lambda: len(open_descriptors()) <= len(descriptors) or gc.collect() < 0, "the end of what it had open")
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def errors(nothing_is_left):
    handler = Errors()
    logging.getLogger("bayeux_server").addHandler(handler)
    yield handler
    logging.getLogger("bayeux_server").removeHandler(handler)
    assert handler.records == [], "the server logged errors that the test did not expect"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost, signed by itself: paths of certificate and key."""
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
                   check=True, capture_output=True)
    return cert, key


def wait_until(condition, what="the condition"):
    """Look again and again; for state that announces itself in no other way."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"{what} did not come true"
        time.sleep(0.001)


def any_function(*arguments):
    """Stands for the application's code where a test only wants it to be accepted."""


def option_fields():
    return {row.name: row for row in dataclasses.fields(bayeux_server.Options)}


def default_of(row):
    return row.default if row.default is not dataclasses.MISSING else row.default_factory()


# (Bayeux, "error"), as strict as Faye's client reads it
ERROR_GRAMMAR = re.compile(r"([1-9][0-9]{2}):([A-Za-z0-9 \-_!~()$@/*.]*):([A-Za-z0-9 \-_!~()$@/*.]+)")


ADVICE_HANDSHAKE = {"reconnect": "handshake", "interval": 0}
ADVICE_USUAL = {"reconnect": "retry", "interval": 0, "timeout": 30_000}
ADVICE_POLL = {**ADVICE_USUAL, "interval": 2000}


def error_code(reply):
    """The code of a refusal, whose error is known to be well-formed."""
    assert reply["successful"] is False, reply
    match = ERROR_GRAMMAR.fullmatch(reply["error"])
    assert match, f"no error of the specification's grammar: {reply['error']!r}"
    return int(match[1])


def at_once(*jobs):
    """Run the jobs at the same time, each on a thread of its own; an exception in one fails the test."""
    barrier = threading.Barrier(len(jobs))
    failures = []

    def run(job):
        try:
            barrier.wait(PATIENCE)
            job()
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    for failure in failures:
        raise failure


def sending(core, message, exchange):
    """Sending the message through the exchange, as a job for at_once."""
    return lambda: core.core.receive([message], exchange)


class SlowExchange(FakeExchange):
    """An answer that is on its way until the test says how it went."""

    def send(self, answer):
        self.taken = answer
        super().send(answer)

    def settle(self, is_written):
        self.core.settle_later(self.taken, is_written)


# What no "except Exception" catches, and what one should.
FAULTS = (asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError)


# Without a GIL CPython frees an event when the thread that made it runs next, which may be never.
IS_FREED_AT_ONCE = getattr(sys, "_is_gil_enabled", lambda: True)()


def keeps_nothing(server):
    """Whether no byte is counted any more, in all or for an address."""
    return (server.memory.used == 0 or not IS_FREED_AT_ONCE) and not server.memory._by_address


class Guarded(dict):
    """A dict that may be changed only while the lock is held."""

    def __init__(self, items, lock):
        super().__init__(items)
        self.lock = lock

    def __setitem__(self, key, value):
        assert self.lock.locked(), "a race"
        super().__setitem__(key, value)


class WaitingPeer(CorePeer):
    """A core with a real clock and its long-poll wait, without a network."""

    def __init__(self, **options):
        super().__init__(**options)
        self.core.clock = time.monotonic
        self.wait_thread = bayeux_server.LongPollWait(self.core)
        self.goes_to_sleep = threading.Event()
        self.seconds_to_deadline = self.core.seconds_to_deadline
        self.core.seconds_to_deadline = self.note_sleep

    def note_sleep(self):
        self.goes_to_sleep.set()
        return self.seconds_to_deadline()

    def until_asleep(self):
        """Return when the wait's thread sleeps, so that what comes next must wake it."""
        with self.core.condition:
            self.goes_to_sleep.clear()
            self.core.condition.notify_all()
        assert self.goes_to_sleep.wait(PATIENCE)
        with self.core.condition:               # free again: it sleeps
            pass


@pytest.fixture
def waiting():
    """Starts a core with its long-poll wait: waiting(option=value, ...)."""
    peers = []

    def start(**options):
        peers.append(WaitingPeer(**options))
        peers[-1].wait_thread.start()
        return peers[-1]

    yield start
    for peer in peers:
        peer.wait_thread.stop()


def masked(opcode, payload=b"", is_final=True, key=b"\x12\x34\x56\x78", reserved=0):
    """A frame as clients send it, written out byte by byte and not with the module's own code."""
    head = bytes([(0x80 if is_final else 0) | reserved | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 65536:
        head += bytes([0x80 | 126]) + struct.pack("!H", len(payload))
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", len(payload))
    return head + key + xor(payload, key)


def xor(payload, key):
    return bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))


# Opcodes (RFC 6455, "Base Framing Protocol")
TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 0x1, 0x2, 0x8, 0x9, 0xA


class SocketWire(Wire):
    """A raw connection that has been upgraded to WebSocket.  It checks that the server's frames are well made."""

    KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="      # the example of RFC 6455

    def __init__(self, server, tls=None, **headers):
        self.headers = headers
        super().__init__(server, tls)

    def open(self):
        super().open()
        answer = self.upgrade(**self.headers)
        assert answer.status == 101, answer.body
        assert answer.headers["sec-websocket-accept"] == self.ACCEPT

    def upgrade(self, **headers):
        return self.request("GET", self.path, **upgrade_headers(**headers))

    def send_frame(self, opcode, payload=b"", **fields):
        self.send(masked(opcode, payload, **fields))

    def read_exactly(self, count):
        assert self._read_until(lambda: len(self.buffer) >= count), "the connection broke off inside a frame"
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_frame(self):
        """The next frame: opcode and payload; None at the end of the connection."""
        if not self._read_until(lambda: self.buffer):
            return None
        first, second = self.read_exactly(2)
        assert first & 0xF0 == 0x80 and second < 128, "one whole frame a message, no reserved bits, unmasked"
        length = second
        if second == 126:
            length, = struct.unpack("!H", self.read_exactly(2))
            assert length > 125, "the length is not as short as can be"
        elif second == 127:
            length, = struct.unpack("!Q", self.read_exactly(8))
            assert length > 65535, "the length is not as short as can be"
        return first & 0x0F, self.read_exactly(length)

    def read_batch(self):
        opcode, payload = self.read_frame()
        assert opcode == TEXT_FRAME, (opcode, payload)
        return json.loads(payload)

    def send_batch(self, *messages):
        self.send_frame(TEXT_FRAME, json.dumps(messages).encode("utf-8"))

    def ask_batch(self, *messages):
        """Send a batch; its replies, which no event precedes."""
        self.send_batch(*messages)
        return self.read_batch()

    def read_close(self):
        """The server closes: its code (None without one) and reason; then nothing comes any more."""
        opcode, payload = self.read_frame()
        assert opcode == CLOSE_FRAME, (opcode, payload)
        self.send_frame(CLOSE_FRAME, payload)
        assert self.read_frame() is None
        return (int.from_bytes(payload[:2], "big"), payload[2:].decode("utf-8")) if payload else (None, "")


def upgrade_headers(**changes):
    """Those of a good upgrade, with changes; None leaves a header out."""
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
               "Sec_WebSocket_Key": SocketWire.KEY, **changes}
    return {name: value for name, value in headers.items() if value is not None}


class EventWire(Wire):
    """An event stream as Faye's client opens it."""

    def __init__(self, server, client_id, tls=None, **headers):
        super().__init__(server, tls)
        self.answer = self.request("GET", f"/cometd/{client_id}", Accept="text/event-stream",
                                   **{"Cache_Control": "no-cache", **headers})

    def read_part(self):
        """The next event's lines, or None at the end."""
        if not self._read_until(lambda: b"\r\n\r\n" in self.buffer):
            assert self.buffer == b""
            return None
        part, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        return part.decode("utf-8")

    def read_batch(self):
        part = self.read_part()
        while part is not None and part.startswith(":"):
            part = self.read_part()
        if part is None:
            return None
        assert part.startswith("data: ") and "\n" not in part, part
        return json.loads(part[len("data: "):])

    def receive(self, count):
        taken = []
        while len(taken) < count:
            taken += [event["data"] for event in self.read_batch()]
        return taken


class Batch(list):
    """The reply to a connect, and the events that came with it."""

    @property
    def reply(self):
        return self[0]

    @property
    def ack(self):
        return self[0]["ext"]["ack"]

    @property
    def data(self):
        """That of the events behind a connect's reply, which is a good one."""
        assert self[0]["channel"] == "/meta/connect" and self[0]["successful"], self
        return [event["data"] for event in self[1:]]


class Client:
    """A Bayeux client, with the same methods over every transport.  Its subclasses carry its messages."""

    connection_type = "long-polling"

    def begin(self, client_id=None, connect=True, **handshake):
        """Take over a session, or begin one, past its first connect unless told otherwise."""
        self.id = client_id
        if client_id is None:
            self.handshake = self.ask("/meta/handshake", version="1.0",
                                      supportedConnectionTypes=[self.connection_type], **handshake)
            assert self.handshake["successful"], self.handshake
            self.id = self.handshake["clientId"]
        if connect:
            assert self.poll().reply["successful"]

    def message(self, channel, **fields):
        return {"channel": channel, **({"clientId": self.id} if self.id else {}), **fields}

    def connect_message(self, timeout=None, ack="", **fields):
        return self.message("/meta/connect", connectionType=self.connection_type,
                            **({} if timeout is None else {"advice": {"timeout": timeout}}),
                            **({} if ack == "" else {"ext": {"ack": ack}}), **fields)

    def poll(self, ack="", **fields):
        """A connect that does not wait: a Batch."""
        return self.connect(timeout=0, ack=ack, **fields)

    def subscribe(self, pattern):
        assert self.ask("/meta/subscribe", subscription=pattern)["successful"]

    def publish(self, channel, data):
        assert self.ask(channel, data=data)["successful"]

    def receive(self, count):
        """The data of the next events, however many connects they take."""
        taken = []
        while len(taken) < count:
            taken += self.connect().data
        assert len(taken) == count, taken
        return taken

    def hold(self, **fields):
        """Send a connect, and wait until the server holds it."""
        sent = self.send_connect(**fields)
        until_held(self.server, self.id)
        return sent

    def close(self):
        pass

    def open(self):
        pass

    def lose_connection(self):
        """Whatever was under way is gone."""
        self.close()
        self.open()


class CoreClient(Client):
    """A client without a network."""

    def __init__(self, server, **session):
        self.server = server                    # a CorePeer
        self.begin(**session)

    def ask(self, channel, **fields):
        reply, = self.server.ask(self.message(channel, **fields))
        return reply

    def connect(self, **fields):
        exchange = self.server.send(self.connect_message(**fields))
        self.server.work()
        return Batch(exchange.answer)


class Peer(Client, Wire):
    """A client over long-polling, on one connection for its connects and one for the rest."""

    def __init__(self, server, tls=None, **session):
        Wire.__init__(self, server, tls)
        self.begin(**session)

    def open(self):
        Wire.open(self)
        self.side = Wire(self.server, self.tls)

    def close(self):
        Wire.close(self)
        self.side.close()

    def ask(self, channel, **fields):
        """Send one message beside the connect; its reply."""
        reply, = self.side.post(self.message(channel, **fields))
        return reply

    def send_connect(self, **fields):
        self.send_post(self.connect_message(**fields))

    def connect(self, **fields):
        return Batch(self.post(self.connect_message(**fields)))

class SocketPeer(Client, SocketWire):
    """A client over WebSocket.  Replies and events come mixed; each kind keeps its order."""

    connection_type = "websocket"

    def __init__(self, server, tls=None, **session):
        self.number = 0
        SocketWire.__init__(self, server, tls)
        self.begin(**session)

    def begin(self, connect=True, **session):
        super().begin(connect=False, **session)
        if connect:                                     # its events are kept for receive()
            assert self.reply(self.send_connect(timeout=0))["successful"]

    def open(self):
        SocketWire.open(self)
        self.replies, self.events = [], []

    def close(self):
        SocketWire.close(self)

    def message(self, channel, **fields):
        """With an id, by which its reply can be told."""
        self.number += 1
        return super().message(channel, **{"id": self.number, **fields})

    def sort(self):
        """Read one frame, and keep what is in it."""
        batch = self.read_batch()
        self.replies += [message for message in batch if "successful" in message]
        self.events += [message for message in batch if "successful" not in message]

    def reply(self, number):
        while not any(reply.get("id") == number for reply in self.replies):
            self.sort()
        found, = [reply for reply in self.replies if reply.get("id") == number]
        self.replies.remove(found)
        return found

    def send_message(self, channel, **fields):
        """Send one message; the id of its reply."""
        message = self.message(channel, **fields)
        self.send_batch(message)
        return message["id"]

    def ask(self, channel, **fields):
        return self.reply(self.send_message(channel, **fields))

    def send_connect(self, **fields):
        """Send a connect; the id of its reply."""
        message = self.connect_message(**fields)
        self.send_batch(message)
        return message["id"]

    def connect(self, **fields):
        """The events are those that have come until the reply is there, and nobody has received."""
        reply = self.reply(self.send_connect(**fields))
        taken, self.events = self.events, []
        return Batch([reply, *taken])

    def receive(self, count):
        """The data of the next events."""
        while len(self.events) < count:
            self.sort()
        taken, self.events = self.events[:count], self.events[count:]
        return [event["data"] for event in taken]


@pytest.fixture(params=["core", "long-polling", "websocket"])
def medium(request, serve):
    """One conversation, three ways: medium(option=value, ...) starts a server, and gives what begins its clients."""
    clients = []

    def start(**options):
        server = CorePeer(**options) if request.param == "core" else serve(**options)

        def begin(**session):
            kind = {"core": CoreClient, "long-polling": Peer, "websocket": SocketPeer}[request.param]
            clients.append(kind(server, **{"connect": False, **session}))
            return clients[-1]
        return begin

    yield start
    for client in clients:
        client.close()


class FakeStream(bayeux_server.Stream):
    """A stream without a network; its outcome is what send() returns."""

    transport = "websocket"
    carries_requests = True

    def __init__(self):
        super().__init__()
        self.batches = []
        self.packed = 0
        self.given_up = 0
        self.outcome = True

    def give_up(self):
        self.given_up += 1

    def pack(self, answer):
        self.packed += 1
        return b""

    def send(self, answer):
        self.batches.append(json.loads(answer.batch()))
        return self.outcome

    def feed(self, broadcast, session):
        return self.send(broadcast)

    @property
    def data(self):
        return [[message["data"] for message in batch] for batch in self.batches]


def session_of(server, client_id):
    found, = [session for session in server.sessions if session.id == client_id]
    return found


HANDSHAKE = {"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": ["long-polling"], "id": "h"}
PING = {"channel": "/meta/ping", "id": "p"}


@contextmanager
def bystander(server, tls=None):
    """Another client, whose connect is held meanwhile.  Whatever happens, it gets its event."""
    with Peer(server, tls) as peer:
        peer.subscribe("/bystander")
        peer.hold()
        yield peer
        server.publish("/bystander", "still here")
        connect, event = peer.read_answer().batch
        assert connect["successful"]
        assert event == {"channel": "/bystander", "data": "still here"}


def is_held(server, client_id):
    return server.core.sessions[client_id].hold is not None


def until_held(server, *client_ids, is_over=False):
    """Wait until the server holds a connect of each of these sessions, or no longer does."""
    for client_id in client_ids:
        wait_until(lambda client_id=client_id: is_held(server, client_id) != is_over, "the hold of a connect, or its end")


def has_unsent_output(server):
    """Whether some client does not take in what is sent to it."""
    return any(connection.output or connection.source is not None for connection in list(server.watch.connections))


def make_buffers_small(server, wire):
    """Have the kernel take little of what is sent to the wire, so that the rest waits in the server."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    ours, = [each for each in list(server.watch.connections) if each.socket.getpeername() == wire.socket.getsockname()]
    ours.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def events_of(batch):
    """The data of the events behind a connect's reply."""
    assert batch[0]["channel"] == "/meta/connect" and batch[0]["successful"], batch
    return [event["data"] for event in batch[1:]]


def raw_post(body, *lines, target="/cometd", version="HTTP/1.1"):
    """A POST as bytes, without Content-Length unless a line brings it."""
    head = [f"POST {target} {version}", "Host: 127.0.0.1", "Content-Type: application/json", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def whole_post(*messages, **options):
    """A complete POST as bytes."""
    body = json.dumps(messages or [PING]).encode("utf-8")
    return raw_post(body, f"Content-Length: {len(body)}", **options)


def is_bayeux_failure(answer):
    """Whatever the status, the body is a Bayeux array with one failure."""
    failure, = answer.batch
    return failure["successful"] is False and failure["error"].count(":") >= 2


def refusal(server, data, status):
    """Send bytes that are no good request.  They get their status, an explanation, and the connection's end."""
    with Wire(server) as wire:
        wire.send(data)
        answer = wire.read_answer()
        assert answer.status == status, answer.body
        assert is_bayeux_failure(answer)
        assert answer.headers["connection"] == "close"
        assert wire.is_closed_by_server()
    return answer


def reset(client_socket):
    """Close a connection so that the other side sees an error, not an end."""
    client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client_socket.close()


@pytest.fixture
def tls(certificate):
    """A client's TLS, which trusts that certificate only."""
    return ssl.create_default_context(cafile=certificate[0])


@pytest.fixture
def serve_tls(serve, certificate):
    return lambda **options: serve(tls_cert=certificate[0], tls_key=certificate[1], **options)


def read(*parts, max_size=1 << 20):
    """The messages that a reader gives for the parts; the code of the error that ends it stands last."""
    reader, messages = bayeux_server.FrameReader(max_size), []
    try:
        for part in parts:
            messages.extend(each for each in reader.feed(part) if each[0] != bayeux_server.CONTINUATION_FRAME)
    except bayeux_server.WebSocketError as error:
        messages.append(error.code)
    return messages


def in_bytes(data):
    return [data[place:place + 1] for place in range(len(data))]


def fragments(opcode, *payloads):
    """One message in fragments."""
    last = len(payloads) - 1
    return b"".join(masked(opcode if place == 0 else 0, payload, is_final=place == last)
                    for place, payload in enumerate(payloads))


def jsonp_target(*messages, **parameters):
    return "/cometd?" + urllib.parse.urlencode({"message": json.dumps(messages), **parameters})


OWN_PAGE = {"Sec_Fetch_Site": "same-origin"}       # what a browser sends with a script of the server's own page


def script_batch(answer, callback="jsonpcallback"):
    """The batch with which the script calls the callback."""
    text = answer.body.decode("utf-8")
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert text.startswith(f"/**/{callback}(") and text.endswith(");"), text
    return json.loads(text[len(f"/**/{callback}("):-2])


@pytest.fixture
def site(tmp_path):
    """A folder of files, and beside it what nobody may read."""
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "bare").mkdir()
    (root / "index.html").write_text("<p>index")
    (root / "digits.txt").write_text("0123456789")
    (root / "folder" / "default.html").write_text("default")
    (root / "a b ü.txt").write_text("spaces")
    (root / ".hidden").write_text("secret")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (root / "bare" / "file").write_text("secret of the listing")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "inside.txt").symlink_to(root / "digits.txt")
    (root / "outside.txt").symlink_to(tmp_path / "secret.txt")
    (root / "outside").symlink_to(tmp_path)
    (root / "trap").mkdir()
    (root / "trap" / "index.html").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture
def get(serve, site):
    """get(target, **headers): the answer of a server of that folder."""
    server = serve(docroot=str(site))

    def get(target, method="GET", **headers):
        with Wire(server) as wire:
            answer = wire.request(method, target, **headers)
            assert wire.post(PING)[0]["successful"], "the connection is good for the next request"
            return answer
    get.server = server
    return get


def form(messages):
    return urllib.parse.urlencode([("message", json.dumps(each)) for each in messages]).encode("ascii")


def http_get(url, tls=None):
    """Status, headers and body of a plain GET."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=PATIENCE, context=tls)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


class Program:
    """The program, run as a user runs it, on a free port; what it says, and how it ends."""

    def __init__(self, *arguments, command=None, folder=HERE):
        command = command or [sys.executable, str(HERE / "bayeux_server.py"), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        stdin=subprocess.DEVNULL, encoding="utf-8")
        self.text = self.errors = ""
        for line in self.process.stdout:
            self.text += line
            if line.startswith("Ctrl-C"):
                break
        match = re.search(r"(https?)://127\.0\.0\.1:(\d+)(/\S*)  \(", self.text)
        assert match, (self.text, self.process.communicate(timeout=PATIENCE))
        self.scheme, self.port, path = match[1], int(match[2]), match[3]
        self.root = f"{self.scheme}://127.0.0.1:{self.port}"
        self.options = bayeux_server.Options(path=path)     # where a Peer looks for the path

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if self.process.returncode is None:
            self.stop()
        assert kind is not None or "Traceback" not in self.errors, self.errors

    def stop(self, number=signal.SIGTERM):
        """Signal it, and wait; its exit status."""
        self.process.send_signal(number)
        try:
            _, self.errors = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, self.errors = self.process.communicate()
        return self.process.returncode


@pytest.fixture(scope="module")
def program():
    """One run for all tests that only look."""
    with Program() as program:
        yield program


PAGE = (HERE / "index.html").read_bytes().decode("utf-8")


def parts_of_page(tag):
    """What stands between the tags of each such element."""
    return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)


# ======================================================================================
# §2  Channels
# ======================================================================================

class TestChannels:

    def test_a_segment_holds_letters_digits_and_eight_signs(self):
        """Tried with every character up to U+02FF, and some that look like digits and letters."""
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_!~()$@/")
        for character in [chr(code) for code in range(0x300)] + ["\u0661", "\uff21", "\u2028", "\U0001f600"]:
            name = f"/a{character}b"
            assert bayeux_server.is_channel_name(name) == (character in allowed), name
            assert bayeux_server.is_channel_pattern(name) == (character in allowed), name

    @for_each("name", ["", "/", "a", "a/b", "//", "//a", "/a/", "/a//b", "/a\n", "\n/a", " /a", "/a ",
                       "/a.b", "/a+b", "/a%20b", "/a b", "/\u00e4", "/a?", "/a#b", "/../a"])
    def test_a_malformed_name_is_no_channel(self, name):
        """No empty segment, no trailing slash, no other characters."""
        assert not bayeux_server.is_channel_name(name)
        assert not bayeux_server.is_channel_pattern(name)

    @for_each("pattern", ["/*", "/**", "/chat/*", "/chat/**", "/a/b/c/**"])
    def test_a_wildcard_may_be_the_last_segment(self, pattern):
        """And then it is a pattern, but no name."""
        assert bayeux_server.is_channel_pattern(pattern)
        assert not bayeux_server.is_channel_name(pattern)

    @for_each("pattern", ["*", "**", "/*/demo", "/**/demo", "/*/*", "/**/**", "/a*", "/*a", "/a/b*",
                          "/***", "/a/***", "/a/*/", "/a**", "/a/*b/c"])
    def test_a_wildcard_anywhere_else_is_no_pattern(self, pattern):
        assert not bayeux_server.is_channel_pattern(pattern)

    @for_each(("pattern", "matching", "others"), [
        ("/chat/*", ["/chat/demo"], ["/chat", "/chat/demo/sub", "/chatter/demo"]),
        ("/chat/**", ["/chat/demo", "/chat/demo/sub"], ["/chat", "/chatter/demo"]),
        ("/*", ["/chat"], ["/chat/demo"]),
        ("/**", ["/chat", "/chat/demo", "/chat/demo/sub"], []),
        ("/chat/demo", ["/chat/demo"], ["/chat", "/chat/demo/sub", "/Chat/demo", "/chat/demo2"]),
    ])
    def test_the_originals_patterns(self, core, pattern, matching, others):
        """Which channels a pattern receives."""
        subscriber = core.handshake()
        core.subscribe(subscriber, pattern)
        for channel in others + matching:
            core.core.publish(channel, channel)
        assert [event["channel"] for event in core.events(subscriber)] == matching

    def test_patterns_matching_agrees_with_the_grammar_read_naively(self):
        """Every name of up to three segments against every pattern of up to four."""
        def matches(pattern, name):
            wanted, given = pattern.split("/")[1:], name.split("/")[1:]
            if wanted[-1] == "*":
                return len(given) == len(wanted) and given[:-1] == wanted[:-1]
            if wanted[-1] == "**":
                return len(given) >= len(wanted) and given[:len(wanted) - 1] == wanted[:-1]
            return wanted == given

        stems = ["", "/a", "/b", "/a/a", "/a/b", "/b/a", "/b/b", "/a/b/a", "/b/b/b"]
        names = stems[1:]
        patterns = names + [stem + end for stem in stems for end in ("/*", "/**")]
        registry = bayeux_server.ChannelRegistry()
        for pattern in patterns:
            registry.add(pattern, pattern)
        for name in names:
            assert set(registry.subscribers(name)) == {pattern for pattern in patterns if matches(pattern, name)}

    def test_no_wildcard_receives_meta_or_service_messages(self, core):
        core.core.services["echo"] = lambda message: {"data": "echoed"}
        watcher, caller = core.handshake(), core.handshake()
        core.subscribe(watcher, "/**", "/*")
        core.ask({"channel": "/service/echo", "clientId": caller, "data": 1},
                 {"channel": "/meta/subscribe", "clientId": caller, "subscription": "/a"})
        assert core.events(watcher) == []

    def test_the_registry_forgets_a_channel_with_its_last_subscriber(self):
        registry = bayeux_server.ChannelRegistry()
        registry.add("/a", "first")
        registry.add("/a", "second")
        registry.discard("/a", "first")
        registry.discard("/a", "not there")
        registry.discard("/b", "second")
        assert set(registry.subscribers("/a")) == {"second"}
        registry.discard("/a", "second")
        assert not registry._subscribers and not registry._patterns

    def test_a_pattern_is_one_text_for_all_its_subscribers(self, core):
        """Issue 5: each of ten thousand clients would keep its own."""
        clients = [core.handshake() for _ in range(3)]
        for client_id in clients:
            core.subscribe(client_id, *json.loads('["/chat/*"]'))
        assert len({id(pattern) for session in core.core.sessions.values() for pattern in session.patterns}) == 1

    def test_a_name_longer_than_the_limit_is_refused(self, core):
        """A name of n segments costs n look-ups, so there is a bound."""
        longest = "/" + "a" * 254
        client_id = core.handshake()
        core.subscribe(client_id, longest)
        core.publish(client_id, longest)
        subscribe, publish = core.ask({"channel": "/meta/subscribe", "clientId": client_id,
                                       "subscription": longest + "a"},
                                      {"channel": longest + "a", "clientId": client_id, "data": 1})
        assert error_code(subscribe) == error_code(publish) == 405


# ======================================================================================
# §3  Budgets and turns
# ======================================================================================

def counts_right(server):
    """Whether each address is counted for just what its connections and subscriptions keep."""
    kept = collections.Counter()
    for connection in list(server.watch.connections):
        kept[connection.group] += connection.kept
    for session in server.sessions:
        kept[bayeux_server.address_group(session.address)] += bayeux_server.subscriptions_size(session.patterns)
    return +kept == server.memory._by_address


def logged_refusals(caplog):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]


def part_of_body(kind, size):
    """The beginning of something that never ends, as bytes: what is kept of it is about size bytes."""
    if kind == "length":
        return raw_post(b"x" * size, "Content-Length: 1000000")
    return raw_post(b"%x\r\n" % 1_000_000 + b"x" * size, "Transfer-Encoding: chunked")


class TestBudgetsAndTurns:
    """How much may wait, how long anything may take, and the limits by address."""

    # -- Addresses counted -------------------------------------------------------------------

    @for_each("written, address", [
        ("192.0.2.1", "192.0.2.1"), ("192.0.2.1:8080", "192.0.2.1"), ("192.0.2.1:", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"), ("::FFFF:c000:201", "192.0.2.1"), ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"), ("[2001:db8::1]", "2001:db8::1"), ("[2001:db8::1]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"), ("fe80::1%" + "x" * 1000, "fe80::1"),
        ("", "unknown"), ("unknown", "unknown"), ("_hidden", "unknown"), ("192.0.2.256", "unknown"),
        ("192.0.2.1 x", "unknown"), ("[2001:db8::1", "unknown"), ("x" * 10_000, "unknown")])
    def test_an_address_is_written_in_one_way(self, written, address):
        assert bayeux_server.plain_address(written) == address

    @for_each("address, group", [
        ("192.0.2.1", "192.0.2.1"), ("2001:db8:0:1:a::1", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:ffff::", "2001:db8:0:1::/64"),
        ("2001:db8:0:2::1", "2001:db8:0:2::/64"), ("unknown", "unknown"), ("10.1.2.3", ""), ("fd00::1", "")])
    def test_ipv6_is_counted_by_its_network_and_a_trusted_proxy_not_at_all(self, address, group):
        assert bayeux_server.Addresses(["10.0.0.0/8", "fd00::/8"]).group(address) == group

    @for_each("forwarded, address", [
        ("9.9.9.9:1234", "9.9.9.9"), ("9.9.9.9, [fd00::7]:80, 10.0.0.1:4000", "9.9.9.9"),
        ("9.9.9.9, ::ffff:10.0.0.1", "9.9.9.9"), ("::ffff:9.9.9.9", "9.9.9.9"), ("[2001:db8::1]:443", "2001:db8::1"),
        ("9.9.9.9, garbage", "unknown"), ("9.9.9.9, garbage, 10.0.0.1", "unknown"), ("x" * 5000, "unknown"),
        ("9.9.9.9" + " " * 100 + "x", "unknown"), (" , , ", "10.0.0.9"), (None, "10.0.0.9"), ("10.0.0.1", "10.0.0.1")])
    def test_a_trusted_proxy_tells_an_address_or_none(self, forwarded, address):
        """Garbage is no proxy: what stands before it may have been written by anybody."""
        assert bayeux_server.Addresses(["10.0.0.0/8", "fd00::/8"]).client("10.0.0.9", forwarded) == address

    def test_an_untrusted_peer_speaks_for_itself(self):
        assert bayeux_server.Addresses(["10.0.0.0/8"]).client("9.9.9.9", "8.8.8.8") == "9.9.9.9"
        assert bayeux_server.Addresses().client("9.9.9.9", "8.8.8.8") == "9.9.9.9"

    # -- Last minute -------------------------------------------------------------------------

    def test_it_counts_what_happened_within_the_last_minute(self):
        clock = Clock()
        happened = bayeux_server.LastMinute(clock, 3)
        assert happened.count("a") == 0
        assert [happened.note("a"), happened.note("a")] == [1, 2]
        clock.advance(59)
        assert [happened.note("a"), happened.note("a"), happened.note("b")] == [3, 3, 1], "and no further than told"
        clock.advance(1)
        assert (happened.count("a"), happened.count("b")) == (2, 1)
        clock.advance(59)
        assert (happened.count("a"), happened.count("b")) == (0, 0)

    def test_it_keeps_no_more_than_the_latest_addresses(self):
        clock = Clock()
        happened = bayeux_server.LastMinute(clock, 3)
        for number in range(bayeux_server.REMEMBERED_ADDRESSES + 5):
            happened.note(str(number))
        assert len(happened._times) == bayeux_server.REMEMBERED_ADDRESSES and happened.count("4") == 0
        clock.advance(61)
        happened.note("new")
        assert set(happened._times) == {"new"}

    # -- Rates -------------------------------------------------------------------------------

    def test_five_seconds_worth_may_come_at_once_and_then_so_many_a_second(self):
        clock = Clock()
        rates = bayeux_server.Rates(2, clock)
        assert [rates.admit("a") for _ in range(12)] == [True] * 10 + [False] * 2
        assert rates.admit("b")
        clock.advance(1)
        assert [rates.admit("a") for _ in range(4)] == [True, True, False, False]
        clock.advance(100)
        assert [rates.admit("a") for _ in range(11)] == [True] * 10 + [False]

    def test_who_is_quiet_is_forgotten(self):
        clock = Clock()
        rates = bayeux_server.Rates(2, clock)
        for number in range(100):
            rates.admit(number)
        clock.advance(bayeux_server.BURST)
        rates.admit("a")
        assert set(rates._buckets) == {"a"}

    # -- Budgets and turns -------------------------------------------------------------------

    @for_each(("address", "group"), [
        ("10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"),
        ("no:address", "no:address"), ("", "")])
    def test_addresses_are_counted_by_what_one_machine_may_have(self, address, group):
        assert bayeux_server.address_group(address) == group

    def test_a_budget_is_a_share_of_the_memory(self):
        memory = bayeux_server.Memory(320_000)
        assert (memory.session_limit, memory.mailbox_limit, memory.connection_limit, memory.address_limit) == (
            5_000, 10_000, 10_000, 20_000)

    def test_an_address_has_its_share(self):
        memory = bayeux_server.Memory(16_000)
        memory.take_for("a", 900)
        assert memory.is_too_much_for("a", 101) and not memory.is_too_much_for("a", 100)
        assert not memory.is_too_much_for("b", 1000) and not memory.is_too_much_for("", 1_000_000)
        assert memory.has_room_for("a", 100) and not memory.has_room_for("a", 101)
        memory.take_for("", 15_000)
        assert memory.used == 15_900 and memory.has_room_for("b", 100) and not memory.has_room_for("b", 101)
        memory.take_for("a", -900)
        memory.take_for("", -15_000)
        assert memory.used == 0 and not memory._by_address
        assert not bayeux_server.Memory(16_000, limits_addresses=False).is_too_much_for("a", 10_000)

    def test_relief_is_asked_for_when_there_is_too_much(self):
        asked = []
        memory = bayeux_server.Memory(1000, relieve=lambda: asked.append(memory.used))
        event = bayeux_server.Event({"channel": "/a", "data": 1})
        memory.take_for("10.0.0.1", 1000 - event.size)
        memory.take_event(event)
        assert not asked
        memory.take_for("10.0.0.2", 1)
        assert asked == [1001]
        size = event.size
        del event
        assert memory.used == 1001 - size and asked == [1001]

    def test_an_event_counts_once_as_long_as_anybody_waits_for_it(self, core):
        sessions = [core.handshake() for _ in range(20)]
        for client_id in sessions:
            core.subscribe(client_id, "/a")
        before, _ = core.core.memory.used, core.core.publish("/a", "x" * 10_000)
        size = core.core.memory.used - before
        assert 10_000 < size < 10_500
        for client_id in sessions[1:]:
            core.events(client_id)
        assert core.core.memory.used == before + size
        core.ask({"channel": "/meta/disconnect", "clientId": sessions[0]})
        core.work()
        assert core.core.memory.used < before

    def test_the_places_in_the_queues_of_sessions_are_counted_too(self, core):
        """An event that a thousand sessions wait for is one, and has a thousand places."""
        sessions = [core.handshake() for _ in range(20)]
        for client_id in sessions:
            core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        core.core.publish("/a", 2)
        before = core.core.memory.used
        core.core.publish("/a", 3)
        places = core.core.memory.used - before - bayeux_server.Event({"channel": "/a", "data": 3}).size
        assert places == 20 * bayeux_server.PLACE_SIZE
        for client_id in sessions:
            assert [event["data"] for event in core.events(client_id)] == [1, 2, 3]

    def test_turns_are_taken_in_the_order_in_which_they_were_asked_for(self):
        turns, order = bayeux_server.Turns(), []

        def take(number):
            with turns.taken_for("10.0.0.1"):
                order.append(number)

        with turns.taken_for("10.0.0.1"):
            threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(5)]
            for number, thread in enumerate(threads, 1):
                thread.start()
                wait_until(lambda number=number: sum(map(len, list(turns._waiting.values()))) == number)
            assert order == [] and turns.is_here()
        for thread in threads:
            thread.join(PATIENCE)
        assert order == [0, 1, 2, 3, 4] and not turns.is_here()

    def test_addresses_take_turns_however_many_threads_work_for_one(self):
        turns, order, threads = bayeux_server.Turns(), [], []

        def take(address):
            with turns.taken_for(address):
                order.append(address)

        with turns.taken_for("a"):
            for address in ("a", "a", "a", "b", "c", "b"):
                threads.append(threading.Thread(target=take, args=(address,), daemon=True))
                threads[-1].start()
                wait_until(lambda: sum(map(len, list(turns._waiting.values()))) == len(threads))
        for thread in threads:
            thread.join(PATIENCE)
        assert order == ["a", "b", "c", "a", "b", "a"]

    def test_one_computes_at_a_time(self, monkeypatch):
        monkeypatch.setattr(bayeux_server, "TURN", 0)           # each pause gives the turn up
        turns, computing, together = bayeux_server.Turns(), [], []

        def compute():
            with turns.taken_for("10.0.0.1"):
                for _ in range(50):
                    computing.append(1)
                    together.append(len(computing))
                    computing.pop()
                    turns.pause()
                    with turns.interrupted():
                        pass

        at_once(*[compute] * 6)
        assert set(together) == {1} and len(together) == 300

    @for_each("fails", [False, True])
    def test_a_turn_is_given_up_around_code_that_may_take_its_time(self, fails):
        turns, order = bayeux_server.Turns(), []

        def other():
            with turns.taken_for("10.0.0.1"):
                order.append("other")

        with suppress(SystemExit), turns.taken_for("10.0.0.1"):
            with turns.interrupted():
                assert not turns.is_here()
                at_once(other)
                order.append("slow")
                if fails:
                    sys.exit()
            assert turns.is_here()
        at_once(other)
        assert order == ["other", "slow", "other"]
        with turns.interrupted():                               # nothing to give up: nothing to take again
            assert not turns.is_here()

    def test_a_turn_lasts_its_time(self, monkeypatch):
        monkeypatch.setattr(bayeux_server, "TURN", 1000)
        turns, order = bayeux_server.Turns(), []

        def other():
            with turns.taken_for("10.0.0.1"):
                order.append("other")

        thread = threading.Thread(target=other, daemon=True)
        with turns.taken_for("10.0.0.1"):
            thread.start()
            wait_until(lambda: turns._waiting)
            turns.pause()
            assert order == []
            monkeypatch.setattr(bayeux_server, "TURN", 0)
            turns.pause()
            assert order == ["other"]
        thread.join(PATIENCE)

    @for_each("is_busy", [True, False])
    def test_between_two_turns_the_leader_goes_round(self, monkeypatch, is_busy):
        monkeypatch.setattr(bayeux_server, "TURN", PATIENCE if is_busy else 0.01)
        turns, order = bayeux_server.Turns(), []
        turns.is_leader_busy = is_busy

        def lead():
            wait_until(lambda: turns.is_leader_awaited)
            assert not turns._is_taken
            order.append("round")
            turns.end_round()

        def compute():
            with turns.taken_for("10.0.0.1"):
                turns._began -= 2 * PATIENCE
                turns.pause()
                order.append("computed")

        at_once(compute, *([lead] if is_busy else []))
        assert order == ["round", "computed"][-1 - is_busy:]

    # -- Large batches -----------------------------------------------------------------------

    @for_each("way", ["JSON", "form", "JSONP", "websocket"])
    @for_each("count", [1000, 1001])
    def test_a_batch_has_its_limit_and_one_log_line(self, server, caplog, way, count):
        """Beyond it the whole is refused, before any is handled."""
        received = []
        LocalClient(server).subscribe("/a", received.append)
        caplog.set_level(logging.INFO, "bayeux_server")
        with Peer(server) as peer:
            messages = [{"channel": "/a", "clientId": peer.id, "data": 1}, *[0] * (count - 1)]
            if way == "websocket":
                with SocketWire(server) as wire:
                    status, batch = 413, wire.ask_batch(*messages)
            else:
                answer = {"JSON": lambda: peer.request("POST", "/cometd", json.dumps(messages).encode("ascii")),
                          "form": lambda: peer.request("POST", "/cometd", form(messages)),
                          "JSONP": lambda: peer.request("GET", jsonp_target(*messages), **OWN_PAGE)}[way]()
                status, batch = answer.status, script_batch(answer) if way == "JSONP" else answer.batch
        if count > 1000:
            assert status == 413 and [error_code(each) for each in batch] == [413] and received == []
        else:
            assert batch[0]["successful"] and [error_code(each) for each in batch[1:]] == [400] * 999
            wait_until(lambda: len(received) == 1)
        assert len(logged_refusals(caplog)) == 1

    # -- Long requests -----------------------------------------------------------------------
    # Who sends one holds up itself, and nobody else.

    @for_each("transport", ["long-polling", "websocket"])
    @for_each("place", ["decode_json", "message_acl", "service", "batch"])
    def test_others_are_answered_meanwhile_and_its_own_replies_keep_their_order(
            self, serve, monkeypatch, transport, place):
        begun, may_end = threading.Event(), threading.Event()

        def wait(*arguments):
            begun.set()
            assert may_end.wait(PATIENCE)

        def is_last(message):
            return isinstance(message, dict) and message.get("id") == "last"

        decode_json = bayeux_server.decode_json
        monkeypatch.setattr(bayeux_server, "decode_json", lambda text: (
            wait() if place == "decode_json" and len(text) > bayeux_server.SHORT_REQUEST else None,
            decode_json(text))[1])
        option = {"message_acl": lambda session, message: wait() if is_last(message) else None}
        server = serve(services={"slow": wait}, **(option if place == "message_acl" else {}))
        first = {"decode_json": [{**PING, "ext": ["x" * 1000] * 60}] * 16, "message_acl": [{**PING, "id": "last"}],
                 "service": [{"channel": "/service/slow", "data": 1, "id": "s"}],
                 "batch": [*[PING] * bayeux_server.SHORT_BATCH, {**PING, "id": "last"}]}[place]
        if place == "batch":
            ping = server.core._ping
            server.core._meta["/meta/ping"] = lambda session, message, turn: (
                wait() if is_last(message) else None, ping(session, message, turn))[1]
        with Peer(server) as peer:
            first = [{**each, "clientId": peer.id} for each in first]
            wire = SocketWire(server) if transport == "websocket" else Wire(server)
            batches = [first, [{**PING, "id": "behind"}]]
            wire.send(b"".join(masked(TEXT_FRAME, json.dumps(each).encode("ascii")) if transport == "websocket"
                               else whole_post(*each) for each in batches))
            assert begun.wait(PATIENCE)
            with bystander(server):
                wire.socket.settimeout(0)
                with pytest.raises(BlockingIOError):        # what came behind has not been answered before
                    wire.socket.recv(1)
            may_end.set()
            wire.socket.settimeout(PATIENCE)
            batches = [wire.read_batch() if transport == "websocket" else wire.read_answer().batch for _ in range(2)]
            wire.close()
        assert [len(each) for each in batches] == [len(first), 1] and batches[1][0]["id"] == "behind"
        assert all(reply["successful"] for batch in batches for reply in batch)

    def test_a_client_that_says_no_more_gets_its_file(self, serve, site):
        """It closes its own direction, as nc -N does; its answer is on its way all the same."""
        server = serve(docroot=str(site))
        with Wire(server) as wire:
            wire.send_request("GET", "/digits.txt")
            wire.socket.shutdown(socket.SHUT_WR)
            assert wire.read_answer().body == b"0123456789"

    # -- Memory budgets ----------------------------------------------------------------------

    def test_events_published_beside_a_refused_message_are_freed_at_once(self, core):
        """An error that keeps the request's events waits for the garbage collector, and they are counted till then."""
        client_id = core.handshake()
        gc.disable()
        try:
            core.ask({"channel": "/a", "clientId": client_id, "data": 1}, {"channel": "/a", "data": "refused"},
                     {"channel": "/b", "clientId": client_id, "data": 2})
            assert core.core.memory.used == 0 or not IS_FREED_AT_ONCE
            held = core.handshake(ext={"ack": True})
            core.subscribe(held, "/a")
            core.core.publish("/a", 1)
            core.ask(core.connect_message(held, ext={"ack": 1}), {"channel": "/a", "data": "refused"})
            core.ask({"channel": "/meta/disconnect", "clientId": held})
            assert core.core.memory.used == 0 or not IS_FREED_AT_ONCE
        finally:
            gc.enable()

    @for_each("ack", [False, True])
    def test_an_answer_is_bounded_and_the_rest_comes_next(self, medium, monkeypatch, ack):
        monkeypatch.setattr(bayeux_server, "MAX_ANSWER", 2000)
        begin = medium()
        client = begin(ext={"ack": True}) if ack else begin()
        client.poll()
        client.subscribe("/a")
        data = [f"{number} " + "x" * (5000 if number == 7 else 500) for number in range(20)]
        for each in data:
            client.server.core.publish("/a", each)
        received, number = [], ""
        while len(received) < len(data):
            if isinstance(client, SocketPeer) and not ack:
                received += client.receive(len(data))
            else:
                batch = client.connect(ack=number)
                number = batch.ack if ack else ""
                assert sum(map(len, batch.data)) <= 2000 or len(batch.data) == 1
                received += batch.data
        assert received == data

    @for_each("ack", [False, True])
    def test_a_session_that_fetches_nothing_has_its_budget(self, ack):
        peer = CorePeer(max_memory=1 << 21)     # of which a session has 32 KiB
        client_id = peer.handshake(ext={"ack": True}) if ack else peer.handshake()
        peer.subscribe(client_id, "/a")
        for count in range(2):
            peer.core.publish("/a", "x" * 20_000)
            if ack and count == 0:              # fetched, and not acknowledged
                peer.events(client_id)
        assert peer.core.sessions[client_id].waiting_size > 1 << 15
        peer.core.publish("/a", "x")
        assert client_id not in peer.core.sessions
        assert peer.told_of("client_disconnect")[-1]["reason"] == "queue overflow"
        assert peer.core.memory.used < 1000     # subscriptions of nobody: none

    def test_a_large_parcel_ends_nobody_who_keeps_up(self):
        peer = CorePeer(max_memory=1 << 20)
        client_id = peer.handshake()
        peer.subscribe(client_id, "/a")
        for _ in range(3):
            peer.core.publish("/a", "x" * 100_000)
            assert len(peer.events(client_id)) == 1

    def test_lazy_events_leave_before_the_budget_is_used_up(self):
        peer = CorePeer(max_memory=1 << 21, lazy_channels=["/lazy"])
        client_id = peer.handshake()
        peer.subscribe(client_id, "/lazy")
        held = peer.hold(client_id)
        for _ in range(4):
            peer.core.publish("/lazy", "x" * 12_000)
            peer.work()
        assert len(events_of(held.answer)) == 4

    def test_subscriptions_count_for_their_address(self):
        peer = CorePeer(max_memory=1 << 20)     # of which an address has 64 KiB
        patterns = [f"/a/{number}" for number in range(200)]
        first, second, foreign = (peer.ask({"channel": "/meta/handshake", "version": "1.0"}, address=address)[0]
                                  ["clientId"] for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2"))
        peer.subscribe(first, *patterns)
        subscribe = {"channel": "/meta/subscribe", "clientId": second, "subscription": patterns}
        reply, = peer.ask(subscribe)
        assert error_code(reply) == 429 and "10.0.0.1" in reply["error"]
        assert peer.core.sessions[second].subscriptions == set()
        peer.subscribe(foreign, *patterns)
        peer.ask({"channel": "/meta/unsubscribe", "clientId": first, "subscription": patterns[:100]})
        peer.subscribe(second, *patterns[:100])
        assert error_code(peer.ask(subscribe)[0]) == 429
        peer.ask({"channel": "/meta/disconnect", "clientId": first})
        peer.subscribe(second, *patterns)
        for client_id in (second, foreign):
            peer.ask({"channel": "/meta/disconnect", "clientId": client_id})
        assert keeps_nothing(peer.core)

    @for_each("kind", ["length", "chunked"])
    @for_each(("options", "is_limited"), [
        ({"client_max_connections": 10}, True), ({"client_max_connections": 0}, False),
        ({"client_max_connections": 10, "trusted_proxies": ["127.0.0.1"]}, False)])
    def test_an_address_has_its_share_of_unfinished_requests(self, serve, caplog, kind, options, is_limited):
        """The largest goes, the others live on."""
        server = serve(max_memory=4 << 20, **options)       # of which an address has 256 KiB
        sizes = [50_000, 100_000, 60_000, 70_000]
        with ExitStack() as wires:
            total = 0
            for size in sizes:
                wires.enter_context(Wire(server)).send(part_of_body(kind, size))
                total += size
                wait_until(lambda total=total: server.memory.used >= total or caplog.records)
            if is_limited:
                wait_until(lambda: len(server.watch.connections) == 3, "the end of the largest")
                text, = [record.getMessage() for record in caplog.records]
                assert re.search("its address keeps too many bytes waiting, 100[0-9]{3} in this connection", text)
            else:
                assert len(server.watch.connections) == 4 and not caplog.records
            wait_until(lambda: counts_right(server), "the right counts")
            with bystander(server):
                pass

    def test_the_largest_go_when_all_together_keep_too_much(self, serve, caplog):
        """And no more of them than have to: whatever their number, the others get their answers."""
        server = serve(max_memory=1 << 20)
        with ExitStack() as wires:
            for number in range(35):            # 1,051,500 bytes in all
                wire = wires.enter_context(Wire(server))
                wire.send(raw_post(b"x" * (30_000 if number else 31_500), "Content-Length: 32000"))
                wait_until(lambda number=number: server.memory.used >= 31_500 + 30_000 * number or caplog.records)
            wait_until(lambda: caplog.records and server.memory.used <= server.memory.limit, "relief")
            assert len(server.watch.connections) == 34
            text, = [record.getMessage() for record in caplog.records]
            assert text.endswith("more than max_memory waits, 31500 bytes in this one")
            wire.send(b"x" * 2000)
            assert wire.read_answer().status == 503         # to handle it would take more than there is
            with bystander(server):
                pass
            wait_until(lambda: counts_right(server), "the right counts")

    def test_what_waits_for_a_thread_is_counted_too(self, serve):
        """A request for which there is no room is refused; the others are answered, as is all that is short."""
        begun, may_end = threading.Event(), threading.Event()
        server = serve(max_memory=1 << 21, max_threads=2, services={
            "slow": lambda message: (begun.set(), may_end.wait(PATIENCE), None)[2]}, client_max_connections=100)
        long = [{**PING, "ext": "x" * 9_000}]   # it counts four times, and an address has 128 KiB
        with Peer(server) as peer, ExitStack() as wires:
            slow = wires.enter_context(Wire(server))
            slow.send_post({"channel": "/service/slow", "clientId": peer.id, "data": 1})
            assert begun.wait(PATIENCE)
            waiting = [wires.enter_context(Wire(server)) for _ in range(3)]
            for count, wire in enumerate(waiting, 1):
                wire.send_post(*long)
                wait_until(lambda count=count: server.memory.used > 36_000 * count)
            with Wire(server) as one_too_many, SocketWire(server) as another:
                one_too_many.send_post(*long)
                answer = one_too_many.read_answer()
                assert answer.status == 503 and answer.headers["retry-after"] == "5"
                assert error_code(another.ask_batch(*long)[0]) == 503
            wait_until(lambda: counts_right(server), "the right counts")
            with bystander(server):
                pass
            may_end.set()
            for wire in [slow, *waiting]:
                assert wire.read_answer().batch[0]["successful"]

    def test_a_socket_that_is_not_read_has_its_budget(self, serve, caplog):
        """Its connection goes; its session lives on, and gets its events where it comes back."""
        server = serve(max_memory=4 << 20)      # of which a connection has 128 KiB
        with SocketPeer(server) as peer:
            make_buffers_small(server, peer)
            peer.subscribe("/a")
            server.core._deliver(bayeux_server.Parcel([     # at once, so that they leave together
                bayeux_server.Event({"channel": "/a", "data": "x" * 120_000}) for _ in range(3)]))
            server.core.wake()
            wait_until(lambda: not server.watch.connections or caplog.records)
            wait_until(lambda: not server.watch.connections, "the end of the connection")
            assert "its connection keeps too many bytes waiting" in caplog.records[0].getMessage()
        with SocketPeer(server, client_id=peer.id) as again:
            assert len(again.receive(1)) == 1
            again.ask("/meta/disconnect")
        wait_until(lambda: keeps_nothing(server), "the end of all that was counted")

    @for_each("transport", ["long-polling", "websocket", "eventsource"])
    @for_each("is_broken", [False, True])
    def test_nothing_is_counted_in_the_end(self, serve, transport, is_broken):
        server = serve()
        with Peer(server) as peer:
            if transport == "websocket":
                carrier = SocketPeer(server, client_id=peer.id)
            elif transport == "eventsource":
                carrier = EventWire(server, peer.id)
            else:
                carrier = peer
            peer.subscribe("/a")
            if transport == "long-polling":
                peer.hold()
            if is_broken:                       # what is sent to it from now on waits, and never arrives
                make_buffers_small(server, carrier)
            for _ in range(20):
                server.publish("/a", "x" * 100_000)
            if is_broken and transport != "long-polling":
                wait_until(lambda: has_unsent_output(server))
            if is_broken:
                reset(carrier.socket)
            wait_until(lambda: counts_right(server))
        carrier.close()
        wait_until(lambda: not server.watch.connections, "the end of the connections")
        wait_until(lambda: counts_right(server))
        server.end_session(peer.id, "the test is over")
        wait_until(lambda: keeps_nothing(server), "the end of all that was counted")


# ======================================================================================
# §4  Messages
# ======================================================================================

NOT_JSON_OBJECTS = [None, True, False, 0, -1.5, "", "text", [], [{}], ["/a", 1]]


# Every refusal of the core: options, the message (given the id of a live session), the code.
REFUSALS = {
    "no channel": ({}, lambda id: {"clientId": id, "id": 1}, 400),
    "no field at all but an id": ({}, lambda id: {"id": 1}, 400),
    "channel is a number": ({}, lambda id: {"channel": 5, "id": 1}, 400),
    "id is a list": ({}, lambda id: {"channel": "/a", "clientId": id, "data": 1, "id": [1]}, 400),
    "id is a boolean": ({}, lambda id: {"channel": "/a", "clientId": id, "data": 1, "id": True}, 400),
    "no version": ({}, lambda id: {"channel": "/meta/handshake", "id": 1}, 400),
    "version is a number": ({}, lambda id: {"channel": "/meta/handshake", "version": 1.0, "id": 1}, 400),
    "version is none": ({}, lambda id: {"channel": "/meta/handshake", "version": "one", "id": 1}, 400),
    "minimumVersion too high": (
        {}, lambda id: {"channel": "/meta/handshake", "version": "2.0", "minimumVersion": "1.1", "id": 1}, 409),
    "no connection type in common": (
        {}, lambda id: {"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": ["smoke signs"],
                        "id": 1}, 409),
    "connection types are a text": (
        {}, lambda id: {"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": "long-polling",
                        "id": 1}, 400),
    "max_sessions": ({"max_sessions": 1}, lambda id: {"channel": "/meta/handshake", "version": "1.0", "id": 1}, 429),
    "no clientId": ({}, lambda id: {"channel": "/meta/connect", "connectionType": "long-polling", "id": 1}, 401),
    "clientId is a number": (
        {}, lambda id: {"channel": "/meta/connect", "clientId": 5, "connectionType": "long-polling", "id": 1}, 400),
    "unknown clientId, full of signs": (
        {}, lambda id: {"channel": "/meta/connect", "clientId": "<script>:\u00e4\n\"'" * 99, "id": 1}, 402),
    "no connectionType": ({}, lambda id: {"channel": "/meta/connect", "clientId": id, "id": 1}, 400),
    "unknown connectionType": (
        {}, lambda id: {"channel": "/meta/connect", "clientId": id, "connectionType": "iframe", "id": 1}, 400),
    "subscribe to nothing": ({}, lambda id: {"channel": "/meta/subscribe", "clientId": id, "id": 1}, 400),
    "subscribe to an empty list": (
        {}, lambda id: {"channel": "/meta/subscribe", "clientId": id, "subscription": [], "id": 1}, 400),
    "subscribe to no pattern": (
        {}, lambda id: {"channel": "/meta/subscribe", "clientId": id, "subscription": "/*/a:\u00fc", "id": 1}, 405),
    "subscribe to meta": (
        {}, lambda id: {"channel": "/meta/subscribe", "clientId": id, "subscription": "/meta/**", "id": 1}, 403),
    "max_subscriptions": (
        {"max_subscriptions": 1},
        lambda id: {"channel": "/meta/subscribe", "clientId": id, "subscription": ["/a", "/b"], "id": 1}, 429),
    "not subscribed": (
        {}, lambda id: {"channel": "/meta/unsubscribe", "clientId": id, "subscription": "/a", "id": 1}, 404),
    "unsubscribe from meta": (
        {}, lambda id: {"channel": "/meta/unsubscribe", "clientId": id, "subscription": "/meta/*", "id": 1}, 403),
    "unknown meta channel": ({}, lambda id: {"channel": "/meta/nope", "clientId": id, "id": 1}, 404),
    "unknown meta channel with signs": ({}, lambda id: {"channel": "/meta/<a:b>", "clientId": id, "id": 1}, 404),
    "publish to a pattern": ({}, lambda id: {"channel": "/a/*", "clientId": id, "data": 1, "id": 1}, 405),
    "publish to a bad name": ({}, lambda id: {"channel": "a:b\u00e4'\"", "clientId": id, "data": 1, "id": 1}, 405),
    "publish to an empty name": ({}, lambda id: {"channel": "", "clientId": id, "data": 1, "id": 1}, 405),
    "publish without data": ({}, lambda id: {"channel": "/a", "clientId": id, "id": 1}, 400),
    "unknown service": ({}, lambda id: {"channel": "/service/nope", "clientId": id, "id": 1}, 404),
    "service without a name": ({}, lambda id: {"channel": "/service/", "clientId": id, "id": 1}, 405),
    "refused by the application": (
        {"message_acl": lambda session, message: "No: 'you', <b>\u00e4</b>\n" if message["channel"] == "/a" else None},
        lambda id: {"channel": "/a", "clientId": id, "data": 1, "id": 1}, 403),
    "dropped by an extension": (
        {"extensions": [type("Drop", (), {"incoming": staticmethod(
            lambda session, message: None if message["channel"] == "/a" else message)})]},
        lambda id: {"channel": "/a", "clientId": id, "data": 1, "id": 1}, 403),
}


class TestMessages:

    @for_each("name", REFUSALS)
    def test_every_refusal_has_code_args_and_text(self, name, caplog):
        """And repeats channel, id and subscription, and leaves one line in the log."""
        options, message, code = REFUSALS[name]
        core = CorePeer(**options)
        message = message(core.handshake())
        caplog.set_level(logging.INFO, "bayeux_server")
        caplog.clear()
        reply, = core.ask(message, may_hold=False)
        assert error_code(reply) == code
        assert code in bayeux_server.ERROR_MEANINGS
        repeated = {key: message[key] for key in ("channel", "id", "subscription") if key in message}
        if repeated.get("channel") == 5:
            del repeated["channel"]
        if repeated["id"] != 1 or repeated["id"] is True:
            del repeated["id"]
        told = ("channel", "id", "subscription", "clientId", "data")
        assert {key: reply[key] for key in told if key in reply} == repeated
        line, = caplog.messages
        assert reply["error"] in line and "\n" not in line

    @for_each("text", ["", "a:b:c", "\u00e4\u2028\n\0\"'<>&,;:", "x" * 5000, "\ud800"])
    @for_each("argument", ["", "a:b", "\u00e4\u2028\n\0\"'<>&,;:", "/" * 5000, "\ud800"])
    def test_an_error_holds_no_other_characters_whatever_it_is_about(self, argument, text):
        error = str(bayeux_server.BayeuxError(400, argument, text or "text"))
        assert ERROR_GRAMMAR.fullmatch(error)
        assert len(error) < 400

    @for_each(("text", "expected"), [
        ("Not you", "403:/a:Not you"), ("401:bob:Who are you", "401:bob:Who are you"), ("401::Who", "401::Who"),
        ("404: x", "403:/a:404_ x"), ("Note: well", "403:/a:Note_ well"), ("429:a:b:c", "429:a:b_c"),
        ("007:a:b", "403:/a:007_a_b"), ("4030:a:b", "403:/a:4030_a_b"), ("\u0664\u0660\u0663:a:b", "403:/a:____a_b"),
    ])
    def test_an_application_refuses_by_text_or_by_a_whole_error(self, text, expected):
        """What does not begin as code:args:text is all text."""
        assert str(bayeux_server.BayeuxError.from_text(403, "/a", text)) == expected

    @for_each("body", [
        b"", b" ", b"hello", b"{", b"[", b"[{]", b"[1,]", b"{'a':1}", b"[1] [2]", b"\xef\xbb\xbf[]", b"nul",
        b"\xff\xfe",
        b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"a\nb"', b'"\\x41"', b"01", b"+1", b".5", b"0x10",
        b"NaN", b"[Infinity]", b"-Infinity", b'{"a": NaN}', b"1e999", b"-1e400", b"1" * 1000, b"-" + b"1" * 400,
        b'{"a": 1, "a": 2}', b'[{"b": {"a": 1, "c": 2, "a": 1}}]', b'{"a": 1, "\\u0061": 2}',
        b'"\\ud800"', b'"\\uDC00"', b'{"\\ud800": 1}', b'["\\udc00\\ud800"]', "\"\ud800\"",
        b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'[{"a":' * 300 + b"1" + b"}]" * 300, b'{"a":"' + b"[" * 200,
    ], ids=lambda body: repr(body[:20]))
    def test_what_is_not_plain_json_is_refused(self, body):
        """Duplicate keys, NaN, lone surrogates, deep nesting, huge numbers."""
        with pytest.raises(bayeux_server.BayeuxError) as raised:
            bayeux_server.decode_json(body)
        assert raised.value.code == 400
        assert ERROR_GRAMMAR.fullmatch(str(raised.value))

    @for_each("value", [
        None, True, 0, -0.5, 1e308, 10**200, "", "\u00e4\u2028\U0001f600\0", "[[[[" * 200, '"[{\\' * 200, [], {},
        [[[[[{"a": [{}]}]]]]], [[]] * 500, [{"a": "]"}] * 500, {"": {"": ""}}, "\\ud800", "\\\\uDC00 \\"])
    def test_every_other_json_value_comes_through(self, value):
        """Brackets in texts are not nesting, and an escaped backslash is no surrogate."""
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, indent=3)):
            assert bayeux_server.decode_json(text) == bayeux_server.decode_json(text.encode("utf-8")) == value

    def test_nesting_is_allowed_up_to_the_limit(self):
        value = bayeux_server.decode_json("[" * 100 + "]" * 100)
        assert bayeux_server.encode_json(value) == "[" * 100 + "]" * 100
        with pytest.raises(bayeux_server.BayeuxError):
            bayeux_server.decode_json("[" * 101 + "]" * 101)

    def test_the_number_of_arrays_and_objects_is_limited(self):
        """The decoder lets no other thread run while it makes a hundred thousand lists."""
        limit = bayeux_server.MAX_JSON_VALUES
        assert len(bayeux_server.decode_json("[" + ",".join(["[]"] * (limit - 1)) + "]")) == limit - 1
        with pytest.raises(BayeuxError, match=f"400::Not JSON - more than {limit} arrays and objects"):
            bayeux_server.decode_json("[" + ",".join(["{}"] * limit) + "]")

    @for_each("make_text", [
        lambda n: '"' + '\\"' * n + "[" * 101, lambda n: '"' * n + "[" * 101, lambda n: "[" * 101 + '"\\' * n,
        lambda n: '{"a' * n, lambda n: "[" * 101 + "\\" * n, lambda n: "[" * 101 + "1" * n])
    def test_hostile_text_costs_no_more_than_its_length(self, make_text):
        """Sixteen times the length may not cost 256 times the time."""
        def cost(size):
            text, least = make_text(size), float("inf")
            for _ in range(3):
                begin = time.thread_time()      # of this thread alone: another that is busy does not count
                with pytest.raises(bayeux_server.BayeuxError):
                    bayeux_server.decode_json(text)
                least = min(least, time.thread_time() - begin)
            return least

        assert cost(16_000) < 100 * max(cost(1_000), 20e-6)

    def test_a_batch_is_made_of_arrays_and_single_messages(self):
        """Many form parameters make one batch; an empty one is refused."""
        assert bayeux_server.decode_batch([b'[{"a": 1}, 2]', '{"b": 3}', "[]", "null"]) == [{"a": 1}, 2, {"b": 3}, None]
        for texts in ([], ["[]"], ["[]", "[]"]):
            with pytest.raises(bayeux_server.BayeuxError, match="400"):
                bayeux_server.decode_batch(texts)

    def test_each_message_of_a_batch_gets_one_reply_in_order(self, core):
        """Whatever is wrong with it, and its neighbours are none the worse."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        replies = core.ask(
            *NOT_JSON_OBJECTS, {}, {"id": 1}, {"channel": None, "id": 2}, {"channel": ["/a"], "id": 3},
            {"channel": "/meta/nope", "id": 4}, {"channel": "/meta/", "id": 5}, {"channel": "/a b", "id": 6},
            {"channel": "/a", "clientId": client_id, "data": "good", "id": 7},
            {"channel": "/a", "clientId": "nobody", "data": "bad", "id": 8},
            {"channel": "/meta/subscribe", "clientId": client_id, "subscription": 9, "id": 9})
        bad = len(NOT_JSON_OBJECTS) + 1
        assert [reply.get("id") for reply in replies] == [None] * bad + list(range(1, 10))
        assert [reply["successful"] for reply in replies] == [False] * (bad + 6) + [True, False, False]
        assert [error_code(reply) for reply in replies if not reply["successful"]] == (
            [400] * (bad + 3) + [404, 404, 405, 402, 400])
        assert replies[-1]["subscription"] == 9
        assert [event["data"] for event in core.events(client_id)] == ["good"]

    def test_each_message_of_a_batch_acts_for_its_own_client(self, core):
        first, second = core.handshake(), core.handshake()
        replies = core.ask({"channel": "/meta/subscribe", "clientId": first, "subscription": "/a"},
                           {"channel": "/meta/disconnect", "clientId": second},
                           {"channel": "/a", "clientId": second, "data": 1},
                           {"channel": "/a", "clientId": first, "data": 2})
        assert [reply["successful"] for reply in replies] == [True, True, False, True]
        assert [event["data"] for event in core.events(first)] == [2]

    @for_each("id", ["", "0", "1", "x\u00e4\u2028", 0, -1, 1.5, 10**200, "x" * 5000])
    @for_each("message", [
        {"channel": "/meta/connect", "connectionType": "long-polling"}, {"channel": "/a", "data": 1}, {"channel": "/a"},
        {"channel": "/meta/subscribe", "subscription": "/a"}, {"channel": "/meta/disconnect"},
        {"channel": "/meta/nope"},
        {"channel": "/meta/handshake", "version": "1.0"}, {"channel": "/meta/handshake"}, {"channel": "/service/none"},
        {"channel": "/meta/ping"}])
    def test_a_reply_carries_exactly_the_id_that_came(self, core, message, id):
        """CometD's clients stop polling without it."""
        reply, = core.ask({"clientId": core.handshake(), **message, "id": id}, may_hold=False)
        assert reply["id"] == id and type(reply["id"]) is type(id)

    def test_no_id_in_no_id_out(self, core):
        """A null id is none."""
        client_id = core.handshake()
        for message in ({"channel": "/a", "data": 1}, {"channel": "/meta/subscribe", "subscription": "/a"},
                        {"channel": "/a"}, {"channel": "/meta/ping"}):
            for fields in ({}, {"id": None}):
                assert "id" not in core.ask({**message, **fields, "clientId": client_id})[0]

    @for_each("field", ["channel", "clientId", "id", "connectionType", "subscription", "version",
                        "minimumVersion", "supportedConnectionTypes", "ext", "advice", "data",
                        "timestamp",
                        "successful", "error", "interval"])
    @for_each("channel", ["/meta/handshake", "/meta/connect", "/meta/subscribe", "/meta/unsubscribe",
                          "/meta/disconnect", "/meta/ping", "/a", "/service/echo"])
    def test_a_wrong_type_in_any_field_gets_a_clear_answer(self, channel, field):
        """One well-formed reply, no failure of ours, and other sessions notice nothing."""
        core = CorePeer(services={"echo": lambda message: {"data": message.get("data")}})
        other = core.handshake()
        core.subscribe(other, "/other")
        for value in [*NOT_JSON_OBJECTS, {}, {"timeout": "soon"}, {"timesync": 1}, {"timesync": {"tc": []}},
                      {"a": {"b": []}},
                      10**200, -10**200, 1e308, -1e308, "9" * 5000, "\0", "\u00e4", "1.0"]:
            message = {"channel": channel, "clientId": core.handshake(), "id": "7", "connectionType": "long-polling",
                       "subscription": "/a", "version": "1.0", "data": {}, field: value}
            reply, = core.ask(message, may_hold=False)
            if not reply["successful"]:
                assert error_code(reply) < 500, reply
            elif field in ("ext", "advice", "data", "timestamp", "successful", "error", "interval"):
                assert reply["id"] == "7"
        core.core.publish("/other", "still there")
        assert [event["data"] for event in core.events(other)] == ["still there"]

    @for_each("ext", [*NOT_JSON_OBJECTS, {"unheard of": [1, {}]}])
    def test_an_ext_of_any_type_harms_nothing(self, core, ext):
        """One that is no object is ignored (it killed the original)."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "ext": ext})
        assert reply["successful"]
        client_id = reply["clientId"]
        core.subscribe(client_id, "/a")
        assert core.ask(core.connect_message(client_id, ext=ext))[0]["successful"]
        core.publish(client_id, "/a", ext=ext)
        event, = core.events(client_id)
        assert event == {"channel": "/a", "data": "data", **({"ext": ext} if isinstance(ext, dict) else {})}
        assert core.ask({"channel": "/meta/disconnect", "clientId": client_id, "ext": ext})[0]["successful"]

    def test_unknown_fields_are_ignored(self, core):
        client_id = core.handshake(authentication="x", unheard={"of": []})
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a", unheard=1, advice={"reconnect": "none"}, successful=False, error="402::x")
        assert core.events(client_id) == [{"channel": "/a", "data": "data"}]

    @for_each("data", [None, False, True, 0, -0.0, 1.5, "", "\u00e4\u2028\U0001f600\0</script>*/", [],
                       {},
                       [None, [False]], {"clientId": "x", "id": 1, "channel": "/meta/connect"}])
    def test_an_event_carries_every_json_value(self, core, data):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a", data)
        event, = core.events(client_id)
        assert event == {"channel": "/a", "data": data} and type(event["data"]) is type(data)

    def test_an_event_carries_nothing_else_of_the_publishers_message(self, core):
        """Never its clientId, by which others could act for it, never its id, which aiocometd takes for a reply."""
        publisher, subscriber = core.handshake(), core.handshake()
        core.subscribe(subscriber, "/a")
        core.subscribe(publisher, "/a")
        core.publish(publisher, "/a", "data", id="7", ext={"key": "value"}, advice={"reconnect": "none"},
                     connectionType="long-polling", subscription="/b", version="1.0", timestamp="now")
        expected = [{"channel": "/a", "data": "data", "ext": {"key": "value"}}]
        assert core.events(subscriber) == core.events(publisher) == expected

    def test_events_carry_their_own_id_if_the_server_is_told_to(self):
        """One message's id never shows in another's event."""
        core = CorePeer(forward_id=True)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.ask({"channel": "/a", "clientId": client_id, "data": 1, "id": "one"},
                 {"channel": "/a", "clientId": client_id, "data": 2},
                 {"channel": "/a", "clientId": client_id, "data": 3, "id": 0})
        core.core.publish("/a", 4)
        assert [event.get("id") for event in core.events(client_id)] == ["one", None, 0, None]

    def test_one_text_serves_all_subscribers(self, core):
        """An event is encoded once, however many are subscribed."""
        first, second = core.handshake(), core.handshake()
        core.subscribe(first, "/a")
        core.subscribe(second, "/**")
        core.core.publish("/a", "data")
        assert core.core.sessions[first].queue[0] is core.core.sessions[second].queue[0]

    @for_each("id", [None, "", "0", "7f", "a b", 'a"b', "a\\b", "\n", "\u00e9", "\u2028", "\u0663", 0, 1.5, -3])
    def test_a_plain_reply_is_what_the_encoder_would_write(self, core, id):
        """Issue 5: made without it, as most replies are plain."""
        message = {"channel": "/a/-_!~()$@", "id": id}
        assert bayeux_server.success_text(message["channel"], id) == bayeux_server.encode_json(
            core.core._success(message))

    def test_what_is_made_once_for_many_is_what_each_would_get(self, core):
        """Issue 5: a parcel's text is that of its events, wherever it is cut, and whatever came before it."""
        clients = [core.handshake() for _ in range(4)]
        for client_id in clients:
            core.subscribe(client_id, "/a")
        sessions = [core.core.sessions[client_id] for client_id in clients]
        core.core.client_push(clients[1], "/own", "first")
        core.ask(*[{"channel": "/a", "clientId": clients[0], "data": {"n": number}} for number in range(5)])
        core.core.client_push(clients[2], "/own", "last")
        assert sessions[0].queue is sessions[3].queue and sessions[1].queue is not sessions[2].queue
        numbers = [{"channel": "/a", "data": {"n": number}} for number in range(5)]
        for session, wanted in zip(sessions, [numbers, [{"channel": "/own", "data": "first"}, *numbers],
                                              [*numbers, {"channel": "/own", "data": "last"}], numbers]):
            plain = bayeux_server.Answer(None, ['{"reply":1}'], session, list(session.queue)).batch()
            assert bayeux_server.Answer(None, ['{"reply":1}'], session, session.queue).batch() == plain
            assert core.events(session.id) == json.loads(plain)[1:] == wanted

    def test_a_message_larger_than_max_message_size_is_refused_and_its_neighbours_are_not(self):
        """Issue 5: bytes of UTF-8 count, not characters."""
        core = CorePeer(max_message_size=200)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        exchange = FakeExchange(core.core)
        exchange.is_large = True
        core.core.receive([{"channel": "/a", "clientId": client_id, "data": "small", "id": 1},
                           {"channel": "/a", "clientId": client_id, "data": "\u00e4" * 90, "id": 2},
                           {"channel": "/a", "clientId": client_id, "data": "e" * 90, "id": 3}], exchange)
        assert [reply["id"] for reply in exchange.answer] == [1, 2, 3]
        assert [reply["successful"] for reply in exchange.answer] == [True, False, True]
        assert error_code(exchange.answer[1]) == 413
        assert [event["data"] for event in core.events(client_id)] == ["small", "e" * 90]


# ======================================================================================
# §5  Options
# ======================================================================================

WRONG_VALUES = [
    ("host", "", "a text"), ("host", None, "a text"), ("host", 7, "a text"),
    ("port", -1, "0 to 65535"), ("port", 65536, "0 to 65535"), ("port", "8080", "0 to 65535"),
    ("port", True, "0 to 65535"), ("port", 8080.0, "0 to 65535"), ("port", None, "0 to 65535"),
    ("path", "cometd", "absolute path"), ("path", "/", "absolute path"), ("path", "/cometd/", "absolute path"),
    ("path", "/a b", "absolute path"), ("path", None, "absolute path"),
    ("alias", "", "a text"), ("alias", 1, "a text"),
    ("docroot", "/no such folder", "folder that exists"), ("docroot", 1, "folder that exists"),
    ("directory_index", "index.html", "a list of file names"),
    ("directory_index", ["a/b.html"], "a list of file names"), ("directory_index", [1], "a list of file names"),
    ("type_expires", [("image/png", 1)], "image/png=3600"), ("type_expires", {"png": 1}, "image/png=3600"),
    ("type_expires", {"image/png": "1"}, "image/png=3600"), ("type_expires", {"image/png": -1}, "image/png=3600"),
    ("tls_cert", 1, "a file's path"), ("tls_key", 1, "a file's path"), ("tls_context", "tls", "ssl.SSLContext"),
    ("anon_publish", 1, "True or False"), ("anon_publish", None, "True or False"),
    ("allowed_origins", "https://example.org", "a list of origins"),
    ("allowed_origins", ["example.org"], "a list of origins"),
    *[("allowed_origins", [origin], "a list of origins") for origin in (
        "https://example.org/", "ftp://example.org", "x://y", "null", "https://", "https://a b", "https://user@a", "",
        "https://a:b", "https://[1]", "https://*.example.org")],
    ("allowed_origins", None, "a list of origins"),
    ("allowed_hosts", "example.org", "a list of host names"),
    *[("allowed_hosts", [host], "a list of host names") for host in (
        "", "example.org:80", "example.org:", "https://example.org", "*.example.org", "a b", "[1]", ".", 1, None)],
    ("trusted_proxies", "127.0.0.1", "a list of IP addresses"),
    ("trusted_proxies", ["localhost"], "a list of IP addresses"), ("trusted_proxies", [1], "a list of IP addresses"),
    ("bind_sessions", "yes", "True or False"),
    ("timeout", -1, "seconds, 0 or more"), ("timeout", "30", "seconds, 0 or more"),
    ("timeout", float("nan"), "seconds, 0 or more"), ("timeout", float("inf"), "seconds, 0 or more"),
    ("timeout", True, "seconds, 0 or more"), ("timeout", None, "seconds, 0 or more"),
    ("interval", -0.5, "seconds, 0 or more"),
    ("connect_timeout", 0, "seconds, 0.001 or more"), ("request_timeout", 0, "seconds, 0.001 or more"),
    ("ping_interval", -1, "seconds, 0 or more"), ("max_inactivity", "never", "seconds, 0 or more"),
    ("max_lazy", None, "seconds, 0 or more"), ("grace", -1, "seconds, 0 or more"),
    ("client_max_connections", -1, "whole number, 0 or more"),
    ("client_max_connections", 1.5, "whole number, 0 or more"),
    ("max_sessions", 0, "whole number, 1 or more"), ("max_sessions_per_browser", -1, "whole number, 0 or more"),
    ("max_subscriptions", 0, "whole number, 1 or more"), ("max_queue", 0, "whole number, 1 or more"),
    ("max_message_size", 0, "whole number, 1 or more"), ("max_request_size", 0, "whole number, 1 or more"),
    ("max_batch", 0, "whole number, 1 or more"), ("max_sessions_per_connection", 0, "whole number, 1 or more"),
    ("max_memory", 1000, "whole number, 1048576 or more"),
    ("max_rate", -1, "whole number, 0 or more"), ("max_rate", 0.5, "whole number, 0 or more"),
    ("max_frame_events", 0, "whole number, 1 or more"), ("max_threads", 1, "whole number, 2 or more"),
    ("ack", 1, "True or False"), ("lazy_channels", "/a", "a list of channels"),
    ("lazy_channels", ["/a/*/b"], "a list of channels"),
    ("json_comment_filtered", 1, "True or False"), ("timesync", 0, "True or False"),
    ("timestamp", "no", "True or False"), ("forward_id", None, "True or False"),
    ("extensions", [any_function], "a list of objects with incoming"),
    ("extensions", 1, "a list of objects with incoming"),
    ("services", [any_function], "names to functions"), ("services", {"echo": 1}, "names to functions"),
    ("services", {1: any_function}, "names to functions"), ("services", None, "names to functions"),
    ("message_acl", "deny", "a function"), ("callback", 1, "a function"),
    ("content_handlers", {"/status": "OK"}, "names to functions"), ("post_handle", 1, "a function"),
    ("debug", 1, "True or False"), ("log_file", 1, "a file's path"),
]


RIGHT_VALUES = [
    ("host", "::1"), ("port", 0), ("port", 65535), ("path", "/a/b-c.d_e~f"), ("docroot", pathlib.Path(".")),
    ("directory_index", []), ("directory_index", ("a.html", "b.html")), ("type_expires", {"image/png": 0}),
    ("allowed_origins", {"*"}), ("allowed_origins", ["http://example.org:8000"]),
    ("allowed_hosts", ["example.org", "EXAMPLE.org.", "my_app", "[::1]", "10.0.0.1", "*"]),
    ("trusted_proxies", ["10.0.0.0/8", "::1"]), ("timeout", 0), ("timeout", 0.5), ("connect_timeout", 0.001),
    ("client_max_connections", 0), ("max_threads", 2), ("services", {"_handler": any_function}),
    ("callback", any_function),
    ("content_handlers", {"/status": any_function}), ("extensions", ()),
]


class TestOptions:
    """§14: options are checked when the server is made; an error names the option, the value and what is allowed."""

    @for_each(("option", "value", "allowed"), WRONG_VALUES)
    def test_a_wrong_value_is_refused_by_name(self, option, value, allowed):
        with pytest.raises(OptionError) as refusal:
            BayeuxServer(**{"port": 0, option: value})
        text = str(refusal.value)
        assert text.startswith(option + " is " + repr(value)) and allowed in text

    @for_each(("option", "value"), RIGHT_VALUES)
    def test_a_right_value_is_taken(self, option, value):
        assert getattr(bayeux_server.Options(**{option: value}), option) == value

    def test_every_option_has_a_wrong_value_here(self):
        assert {option for option, _, _ in WRONG_VALUES} == set(option_fields())

    def test_defaults_are_accepted(self):
        assert bayeux_server.Options().port == 8080

    @for_each(("wrong", "meant"), [("time_out", "timeout"), ("Port", "port"), ("doc_root", "docroot"),
                                   ("max_session", "max_sessions")])
    def test_an_unknown_option_is_refused_with_a_suggestion(self, wrong, meant):
        with pytest.raises(OptionError, match=f"{wrong} is no option; did you mean {meant}"):
            BayeuxServer(**{wrong: 1})

    def test_an_unknown_option_like_no_other_is_refused_without(self):
        with pytest.raises(OptionError) as refusal:
            BayeuxServer(xyzzy=1)
        assert str(refusal.value) == "xyzzy is no option"

    def test_an_option_error_is_a_value_error(self):
        with pytest.raises(ValueError):
            bayeux_server.Options(port=-1)

    def test_an_interval_must_end_before_the_session_does(self):
        bayeux_server.Options(interval=9, connect_timeout=10)
        with pytest.raises(OptionError, match=r"interval is 10: .*less than connect_timeout, 10"):
            bayeux_server.Options(interval=10, connect_timeout=10)

    @for_each("half", ["tls_cert", "tls_key"])
    def test_half_a_certificate_is_refused(self, half):
        with pytest.raises(OptionError, match=f"{half} is 'x.pem'.*give both, or none"):
            bayeux_server.Options(**{half: "x.pem"})

    def test_the_largest_request_has_room_in_the_memory(self):
        assert bayeux_server.Options(max_request_size=8 << 20).max_request_size == 8 << 20
        with pytest.raises(OptionError, match="max_request_size is 8388609: .* a 64th of max_memory, 8388608"):
            bayeux_server.Options(max_request_size=(8 << 20) + 1)
        assert bayeux_server.Options(max_memory=1 << 20), "the default of max_request_size goes with any max_memory"

    def test_two_ways_to_set_up_tls_contradict(self):
        with pytest.raises(OptionError, match=r"tls_cert is 'x.pem': with tls_context it must be None"):
            bayeux_server.Options(tls_cert="x.pem", tls_key="x.pem",
                                  tls_context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    @for_each("prefix", ["/cometd", "status"])
    def test_a_content_handler_must_have_a_path_of_its_own(self, prefix):
        with pytest.raises(OptionError, match=f"content_handlers has '{prefix}': it must be a path"):
            bayeux_server.Options(content_handlers={prefix: any_function})

    def test_certificates_that_cannot_be_read_are_refused(self, tmp_path):
        missing = str(tmp_path / "missing.pem")
        with pytest.raises(OptionError) as refusal:
            BayeuxServer(port=0, tls_cert=missing, tls_key=missing)
        assert missing in str(refusal.value) and "PEM files" in str(refusal.value)

    def test_a_log_file_that_cannot_be_written_is_refused(self, tmp_path):
        with pytest.raises(OptionError, match="log_file is .* a file that can be written"):
            BayeuxServer(port=0, log_file=str(tmp_path / "missing" / "log"))

    def test_defaults_are_nobody_elses(self):
        """What one server registers, another does not know."""
        first, second = bayeux_server.Options(), bayeux_server.Options()
        for name, row in option_fields().items():
            assert isinstance(default_of(row), (dict, list, set)) <= (getattr(first, name) is not getattr(second, name))
        services = {"one": any_function}
        with BayeuxServer(port=0, services=services) as server:
            server.service("two")(any_function)
        assert set(services) == {"one"} and bayeux_server.Options().services == {}

    def test_options_do_not_change(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            bayeux_server.Options().port = 1


# ======================================================================================
# §6  Sessions
# ======================================================================================

class Body:
    """A body of the application's: parts and faults, one a read; then, if it is given one, a fault at its close."""

    def __init__(self, *parts, at_close=None):
        self.parts = list(parts)
        self.at_close = at_close
        self.closed = 0

    def read(self, size):
        part = self.parts.pop(0)
        return part() if callable(part) else part

    def close(self):
        self.closed += 1
        if self.at_close:
            self.at_close()


class OtherStream(FakeStream):
    """A stream of another kind: what it sends looks different on the wire."""


class BrokenSocket:
    """A socket whose peer is gone when something is to be sent to it."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def send(self, data):
        raise BrokenPipeError


class TestSessions:
    """A session: its queue, its held connect, its answers, and the one gate to the code of the application."""

    # -- Sessions ----------------------------------------------------------------------------

    def test_a_session_lives_connect_timeout_without_a_connect(self):
        """Then it is removed as if it had disconnected."""
        core = CorePeer(connect_timeout=100)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.pass_time(99)
        assert client_id in core.core.sessions
        core.pass_time(2)
        assert not core.core.sessions and not core.core.registry._subscribers
        assert core.told_of("client_disconnect") == [{"client_id": client_id, "reason": "timeout"}]

    def test_ended_sessions_take_no_memory_until_their_time_would_have_come(self, core):
        """Issue 5: whoever can shake hands could fill it, whatever max_sessions says."""
        for _ in range(1000):
            core.ask({"channel": "/meta/disconnect", "clientId": core.handshake(connect=False)})
        assert len(core.core.timers) <= 102

    def test_sessions_are_looked_at_in_time_though_the_ended_have_gone(self):
        core = CorePeer(connect_timeout=100)
        lasting = [core.handshake() for _ in range(10)]
        held = [core.hold(client_id) for client_id in lasting[:5]]
        for _ in range(1000):
            core.ask({"channel": "/meta/disconnect", "clientId": core.handshake(connect=False)})
        core.pass_time(31)
        assert all(exchange.answer for exchange in held)
        core.pass_time(70)
        assert set(core.core.sessions) == set(lasting[:5])
        core.pass_time(31)
        assert not core.core.sessions

    def test_many_connects_that_end_together_hold_nobody_up(self, core):
        """Issue 5: an event to ten thousand makes their next connects end in the same moment, too."""
        held = [core.hold(core.handshake()) for _ in range(200)]
        talker = core.handshake()
        core.subscribe(talker, "/a")
        core.clock.advance(15)
        waiting = core.hold(talker)
        core.clock.advance(16)
        core.publish(talker, "/a", "now")
        with core.core.lock:
            answers = core.core.take_answers(32)
        assert len(answers) == 32 and waiting in [answer.exchange for answer in answers]
        for answer in answers:
            core.core.settle_later(answer, answer.exchange.send(answer))
        core.work()
        assert all(exchange.answer for exchange in held)

    def test_what_is_in_line_leaves_in_that_order(self, core):
        """With acknowledgement the replies to a session's connects are numbered, and must not overtake each other."""
        clients = [core.handshake(ext={"ack": True}) for _ in range(40)]
        for client_id in clients:
            core.subscribe(client_id, "/a")
        older = [core.hold(client_id, ext={"ack": 1}) for client_id in clients]
        newer = [core.hold(client_id, ext={"ack": 1}) for client_id in clients]
        core.core.publish("/a", "event")
        left = []
        while len(left) < 80:
            with core.core.lock:
                left += [answer.exchange for answer in core.core.take_answers(32)]
        assert all(left.index(one) < left.index(other) for one, other in zip(older, newer))

    def test_looking_at_the_timers_again_and_again_does_not_grow_dear(self, monkeypatch):
        """Issue 5: lazy events put sessions into the heap for an earlier time, and then again for the later one."""
        clearings, heapify = [], bayeux_server.heapq.heapify
        monkeypatch.setattr(bayeux_server.heapq, "heapify", lambda heap: clearings.append(heapify(heap)))
        core = CorePeer(lazy_channels=["/lazy/**"], max_lazy=0.5)
        streams = [FakeStream() for _ in range(500)]
        for number, stream in enumerate(streams):
            client_id = core.handshake()
            core.subscribe(client_id, f"/lazy/{number % 10}")
            core.core.attach(client_id, stream)
        assert len(clearings) < 30
        for number in range(40):
            core.core.publish(f"/lazy/{number % 10}", number)
            for _ in range(20):
                core.pass_time(0.03)
        assert all(len(stream.batches) == 4 for stream in streams) and len(clearings) < 60

    def test_a_session_that_never_connects_ends_too(self):
        core = CorePeer(connect_timeout=100)
        core.handshake(connect=False)
        core.pass_time(101)
        assert not core.core.sessions

    @for_each("message", [{"channel": "/a", "data": 1}, {"channel": "/a"}, {"channel": "/meta/ping"},
                          {"channel": "/meta/subscribe", "subscription": "/a"},
                          {"channel": "/service/none"}])
    def test_any_admitted_message_renews_the_lease(self, message):
        """Whatever its handler makes of it."""
        core = CorePeer(connect_timeout=100)
        client_id = core.handshake()
        for _ in range(3):
            core.pass_time(99)
            core.ask({**message, "clientId": client_id})
        core.pass_time(99)
        assert client_id in core.core.sessions
        core.pass_time(2)
        assert client_id not in core.core.sessions

    @for_each("message", [
        {"channel": "/denied", "data": 1}, {"channel": "/meta/nope"}, {"channel": 7}, {"channel": "/a*"},
        {"channel": "/allowed", "data": 1, "id": []}])
    def test_a_message_that_is_not_admitted_does_not_renew_it(self, message):
        """Nor does it count as activity."""
        core = CorePeer(connect_timeout=100,
                        message_acl=lambda session, message: "No" if message["channel"] == "/denied" else None)
        client_id = core.handshake()
        active = core.core.sessions[client_id].active
        core.pass_time(99)
        assert core.ask({**message, "clientId": client_id})[0]["successful"] is False
        assert core.core.sessions[client_id].active == active
        core.pass_time(2)
        assert client_id not in core.core.sessions

    def test_a_session_does_not_end_while_its_connect_is_held(self):
        """Even where timeout is longer than connect_timeout."""
        core = CorePeer(connect_timeout=10, timeout=1000)
        client_id = core.handshake()
        held = core.hold(client_id)
        for _ in range(9):
            core.pass_time(100)
        assert held.answer is None
        core.pass_time(101)
        assert held.answer[0]["successful"]
        core.pass_time(9)
        assert client_id in core.core.sessions
        core.pass_time(2)
        assert client_id not in core.core.sessions

    def test_a_lease_shorter_than_the_held_connect_was_ends_in_time(self):
        """The connect that an event answered would have been looked at only when its own time was over."""
        core = CorePeer(connect_timeout=5, timeout=30)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.send(core.connect_message(client_id))
        core.pass_time(6)
        core.core.publish("/a", 1)
        core.work()
        assert len(held.answer) == 2
        core.pass_time(4.9)
        assert client_id in core.core.sessions
        core.pass_time(0.2)
        assert client_id not in core.core.sessions

    def test_the_clock_starts_when_the_reply_has_been_written(self):
        """Not when it was begun."""
        core = CorePeer(connect_timeout=100, timeout=30)
        client_id = core.handshake()
        slow = SlowExchange(core.core)
        core.core.receive([core.connect_message(client_id)], slow)
        with core.core.condition:
            core.clock.advance(31)
            answer, = core.core.take_answers(10)
        slow.send(answer)
        core.pass_time(90)
        slow.settle(True)
        core.pass_time(99)
        assert client_id in core.core.sessions
        core.pass_time(2)
        assert client_id not in core.core.sessions

    def test_a_late_client_is_told_why_its_session_ended(self):
        """Timeout, asked, queue overflow, server shutdown."""
        core = CorePeer(connect_timeout=100, max_queue=1)
        timed_out = core.handshake()
        core.pass_time(101)
        asked, overflowed, shut_down = core.handshake(), core.handshake(), core.handshake()
        core.ask({"channel": "/meta/disconnect", "clientId": asked})
        core.subscribe(overflowed, "/a")
        core.core.publish("/a", 1)
        core.core.publish("/a", 2)
        core.core.stop()
        for client_id, reason in ((timed_out, "timeout"), (asked, "asked"), (overflowed, "queue overflow"),
                                  (shut_down, "server shutdown")):
            reply, = core.ask(core.connect_message(client_id))
            assert error_code(reply) == 402 and reply["advice"] == ADVICE_HANDSHAKE
            assert reason in reply["error"] and client_id in reply["error"]

    def test_only_so_many_ended_sessions_are_remembered(self, monkeypatch):
        """Memory has a bound."""
        monkeypatch.setattr(bayeux_server, "REMEMBERED_SESSIONS", 3)
        core = CorePeer()
        ids = [core.handshake(connect=False) for _ in range(5)]
        for client_id in ids:
            core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        errors_told = [core.ask(core.connect_message(client_id))[0]["error"] for client_id in ids]
        assert ["asked" in error for error in errors_told] == [False, False, True, True, True]

    def test_an_ended_session_leaves_nothing_behind(self, core):
        """Its queue, its subscriptions and its place in the registry are gone."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a", "/b/*", "/**")
        core.core.publish("/a", 1)
        session = core.core.sessions[client_id]
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        assert session.ended == "asked" and not session.queue and not session.subscriptions
        assert not core.core.registry._subscribers and not core.core.sessions
        core.pass_time(10_000)
        assert not core.core.timers and len(core.told_of("client_disconnect")) == 1

    def test_more_than_max_queue_waiting_events_end_the_session(self, caplog):
        """Issue 5: with reason and log line, its memory freed; the others go on."""
        caplog.set_level(logging.INFO, "bayeux_server")
        core = CorePeer(max_queue=3)
        idle, diligent = core.handshake(), core.handshake()
        core.subscribe(idle, "/a")
        core.subscribe(diligent, "/a")
        session = core.core.sessions[idle]
        for number in range(3):
            core.core.publish("/a", number)
        assert [event["data"] for event in core.events(diligent)] == [0, 1, 2]
        assert session.ended is None
        core.core.publish("/a", 3)
        assert session.ended == "queue overflow" and not session.queue and idle not in core.core.sessions
        assert [event["data"] for event in core.events(diligent)] == [3]
        assert core.told_of("client_disconnect") == [{"client_id": idle, "reason": "queue overflow"}]
        assert [line for line in caplog.messages if idle in line and "queue overflow" in line]
        core.core.publish("/a", 4)
        assert [event["data"] for event in core.events(diligent)] == [4]

    def test_events_of_one_batch_are_queued_in_the_order_of_its_messages(self, core):
        """However they are put together on the way."""
        client_id = core.handshake()
        mine = {"clientId": client_id}
        core.subscribe(client_id, "/b")
        core.ask({"channel": "/a", "data": "before the subscription", **mine},
                 {"channel": "/meta/subscribe", "subscription": "/a", **mine},
                 *[{"channel": channel, "data": number, **mine} for number, channel in enumerate(["/a", "/a", "/b", "/a"])],
                 {"channel": "/meta/unsubscribe", "subscription": "/a", **mine},
                 {"channel": "/a", "data": "after it", **mine}, {"channel": "/b", "data": 4, **mine})
        assert [(event["channel"], event["data"]) for event in core.events(client_id)] == [
            ("/a", 0), ("/a", 1), ("/b", 2), ("/a", 3), ("/b", 4)]

    def test_max_queue_counts_what_waited_before_not_what_comes_at_once(self):
        """A parcel may be larger than max_queue; a session that does not fetch it ends with the next."""
        core = CorePeer(max_queue=2)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        for _ in range(2):              # the second time, what came first is held against the session
            replies = core.ask(*[{"channel": "/a", "clientId": client_id, "data": number, "id": number}
                                 for number in range(5)])
            assert [reply["id"] for reply in replies] == list(range(5))
            assert [reply["successful"] for reply in replies] == [True] * 5
        reply, = core.ask({"channel": "/a", "clientId": client_id, "data": 6})
        assert error_code(reply) == 402 and reply["advice"] == ADVICE_HANDSHAKE

    def test_a_session_that_is_ready_for_its_events_is_not_ended_for_them(self):
        """However many are published before the server has sent the first."""
        core = CorePeer(max_queue=2)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        for number in range(10):
            core.core.publish("/a", number)
        core.work()
        assert [event["data"] for event in held.answer[1:]] == list(range(10))

    def test_lazy_events_beyond_max_queue_leave_at_once(self):
        core = CorePeer(max_queue=2, lazy_channels=["/a"])
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        for number in range(2):
            core.core.publish("/a", number)
        core.work()
        assert held.answer is None
        core.core.publish("/a", 2)
        core.work()
        assert [event["data"] for event in held.answer[1:]] == [0, 1, 2]

    def test_a_held_connect_is_answered_when_its_queue_overflows(self):
        """Issue 5: not left hanging."""
        core = CorePeer(max_queue=2)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id, id="9")
        core.core.sessions[client_id].in_flight = object()      # an answer before it is still on its way to a slow reader
        for number in range(3):
            core.core.publish("/a", number)
        core.work()
        reply, = held.answer
        assert error_code(reply) == 402 and reply["advice"] == ADVICE_HANDSHAKE and reply["id"] == "9"

    def test_no_more_than_max_sessions(self):
        """Issue 5: who is one too many is told to try again, and room is made by who leaves."""
        core = CorePeer(max_sessions=2, connect_timeout=100)
        first, second = core.handshake(), core.handshake()
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"})
        assert error_code(reply) == 429 and "clientId" not in reply
        assert reply["advice"]["reconnect"] == "handshake" and reply["advice"]["interval"] > 0
        core.ask({"channel": "/meta/disconnect", "clientId": first})
        third = core.handshake()
        assert set(core.core.sessions) == {second, third}
        core.pass_time(101)
        assert core.handshake()

    def test_no_address_has_more_than_half_of_max_sessions(self):
        core = CorePeer(client_max_connections=10, max_sessions=4)
        ids = [core.handshake(), core.handshake()]
        handshake = {"channel": "/meta/handshake", "version": "1.0"}
        reply, = core.ask(handshake)
        assert reply["error"] == "429::Too many sessions from 10.0.0.1"
        assert reply["advice"] == {"reconnect": "handshake", "interval": 5000}
        assert core.ask(handshake, address="10.0.0.2")[0]["successful"]
        core.ask({"channel": "/meta/disconnect", "clientId": ids[0]})
        assert core.ask(handshake)[0]["successful"]
        assert core.ask(handshake, address="10.0.0.3")[0]["successful"]
        assert core.ask(handshake, address="10.0.0.4")[0]["error"] == "429::Too many sessions"
        for client_id in list(core.core.sessions):
            core.core.disconnect(client_id, "test")
        assert core.core._sessions_of == {}

    @for_each("options", [{"client_max_connections": 0}, {"trusted_proxies": ["10.0.0.0/8"]}])
    def test_half_of_max_sessions_is_no_limit_where_addresses_have_none(self, options):
        core = CorePeer(**{"client_max_connections": 10, "max_sessions": 4, **options})
        for _ in range(4):
            core.handshake()

    def test_max_subscriptions_counts_a_pattern_once(self):
        """Issue 5: and one list that goes beyond it is refused as a whole."""
        core = CorePeer(max_subscriptions=2)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.subscribe(client_id, "/a", "/b", "/b", "/service/x")
        reply, = core.ask({"channel": "/meta/subscribe", "clientId": client_id, "subscription": ["/a", "/c"]})
        assert error_code(reply) == 429 and reply["subscription"] == ["/a", "/c"]
        assert core.core.sessions[client_id].subscriptions == {"/a", "/b"}
        core.ask({"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/b"})
        core.subscribe(client_id, "/c")

    # -- Answers on their way --------------------------------------------------------------

    @staticmethod
    def begin_slow_answer(core, client_id):
        """A held connect whose answer, with what is queued, is on its way."""
        slow = SlowExchange(core.core)
        core.core.receive([core.connect_message(client_id)], slow)
        with core.core.condition:
            answer, = core.core.take_answers(10)
        slow.send(answer)
        return slow

    def test_events_of_a_lost_reply_go_back_to_the_front_in_order(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        core.core.publish("/a", 2)
        slow = self.begin_slow_answer(core, client_id)
        core.core.publish("/a", 3)
        slow.settle(False)
        assert [event["data"] for event in core.events(client_id)] == [1, 2, 3]

    @for_each("is_written", [True, False])
    def test_a_newer_connect_waits_for_the_events_in_flight(self, core, is_written):
        """It gets neither what may still arrive nor what came after that."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        slow = self.begin_slow_answer(core, client_id)
        core.core.publish("/a", 2)
        newer = core.hold(client_id)
        core.work()
        assert newer.answer is None
        slow.settle(is_written)
        core.work()
        assert [event["data"] for event in newer.answer[1:]] == ([2] if is_written else [1, 2])

    def test_a_connect_that_is_not_held_takes_no_events_past_those_in_flight(self, core):
        """Neither alone nor in a batch."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        slow = self.begin_slow_answer(core, client_id)
        core.core.publish("/a", 2)
        assert core.events(client_id) == []
        assert len(core.ask(core.connect_message(client_id), {"channel": "/a", "clientId": client_id, "data": 3})) == 2
        slow.settle(False)
        assert [event["data"] for event in core.events(client_id)] == [1, 2, 3]

    def test_a_lost_reply_to_a_connect_that_was_not_held_loses_nothing(self, core):
        """The first connect, and one in a batch."""
        client_id = core.handshake(connect=False)
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        core.send(core.connect_message(client_id), is_broken=True)
        core.send(core.connect_message(client_id), {"channel": "/a", "clientId": client_id, "data": 2}, is_broken=True)
        assert [event["data"] for event in core.events(client_id)] == [1, 2]
        assert core.events(client_id) == []

    def test_a_held_connect_that_cannot_be_answered_loses_nothing(self, core):
        """Again and again."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        for number in range(3):
            broken = core.send(core.connect_message(client_id), is_broken=True)
            core.core.publish("/a", number)
            core.work()
            assert broken.answer is None
        assert [event["data"] for event in core.events(client_id)] == [0, 1, 2]

    def test_a_connection_broken_while_its_connect_was_held_loses_nothing(self, core):
        """And the session is neither polling already nor gone (the original's faults)."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        core.core.hang_up(held)
        core.core.hang_up(held)                     # twice does no harm
        core.core.publish("/a", "missed")
        core.work()
        assert held.answer is None
        newer = core.send(core.connect_message(client_id))
        core.work()
        assert [event["data"] for event in newer.answer[1:]] == ["missed"]
        core.core.publish("/a", "still subscribed")
        assert [event["data"] for event in core.events(client_id)] == ["still subscribed"]

    def test_a_session_whose_connection_broke_ends_after_connect_timeout(self):
        core = CorePeer(connect_timeout=100, timeout=30)
        client_id = core.handshake()
        core.pass_time(50)
        held = core.hold(client_id)
        core.pass_time(20)
        core.core.hang_up(held)
        core.pass_time(99)
        assert client_id in core.core.sessions
        core.pass_time(2)
        assert core.told_of("client_disconnect") == [{"client_id": client_id, "reason": "timeout"}]
        assert held.answer is None

    def test_a_session_does_not_expire_with_events_in_flight(self):
        """Whether they arrive decides; then the lease begins anew."""
        core = CorePeer(connect_timeout=100)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        slow = self.begin_slow_answer(core, client_id)
        core.pass_time(1000)
        assert client_id in core.core.sessions
        slow.settle(False)
        core.pass_time(99)
        assert client_id in core.core.sessions
        core.pass_time(200)
        assert client_id not in core.core.sessions

    @for_each("is_written", [True, False])
    def test_a_session_that_ends_with_events_in_flight_stays_ended(self, core, is_written):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        session = core.core.sessions[client_id]
        core.core.publish("/a", 1)
        slow = self.begin_slow_answer(core, client_id)
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        slow.settle(is_written)
        core.core.publish("/a", 2)
        core.pass_time(1000)
        assert not session.queue and not core.core.sessions and len(core.told_of("client_disconnect")) == 1

    def test_stopping_answers_every_held_connect_and_takes_no_new_sessions(self, core):
        """Issue 4: the reply is a valid one, with advice to come back, not all at once."""
        held = [core.hold(core.handshake(), id=str(number)) for number in range(20)]
        core.core.stop()
        core.work()
        for number, exchange in enumerate(held):
            reply, = exchange.answer
            assert reply["successful"] and reply["id"] == str(number) and reply["channel"] == "/meta/connect"
            assert reply["advice"]["reconnect"] == "retry" and reply["advice"]["interval"] >= 1
        assert len({exchange.answer[0]["advice"]["interval"] for exchange in held}) > 1
        assert [details["reason"] for details in core.told_of("client_disconnect")] == ["server shutdown"] * 20
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "id": 1})
        assert error_code(reply) == 503 and reply["advice"]["reconnect"] == "handshake" and reply["id"] == 1

    # -- Broadcast ---------------------------------------------------------------------------
    # Sessions that get the same events, each on a stream, have one answer in common.

    def begin(self, core, kinds):
        """A session subscribed to /a on a stream of each kind, in this order in line; their ids, the streams."""
        streams = [kind() for kind in kinds]
        client_ids = []
        for stream in streams:
            client_ids.append(core.handshake(connect=False))
            assert core.core.attach(client_ids[-1], stream)
        with core.core.lock:                        # a set of subscribers has no order
            core.core.registry.subscribers = lambda name: [core.core.sessions[each] for each in client_ids]
        return client_ids, streams

    def take(self, core, limit=32):
        with core.core.condition:
            return core.core.take_answers(limit)

    def settle(self, core, fates):
        for fate in fates:
            core.core.settle_later(*fate)

    def test_the_same_events_are_packed_once_and_reach_everybody(self, core):
        _, streams = self.begin(core, [FakeStream] * 5)
        core.core.publish("/a", 1)
        broadcast, = answers = self.take(core)
        self.settle(core, core.core.send(answers))
        assert [stream.data for stream in streams] == [[[1]]] * 5
        assert sum(stream.packed for stream in streams) == 1 and len(broadcast.ways) == 5

    def test_it_counts_as_many_answers_as_it_has_ways(self, core):
        """Or a channel with thousands of subscribers would keep everybody else waiting."""
        self.begin(core, [FakeStream] * 5)
        core.core.publish("/a", 1)
        assert [[len(answer.ways) for answer in self.take(core, 2)] for _ in range(4)] == [[2], [2], [1], []]

    def test_streams_of_another_kind_are_packed_for_themselves(self, core):
        _, streams = self.begin(core, [FakeStream, FakeStream, OtherStream, OtherStream, FakeStream])
        core.core.publish("/a", 1)
        answers = self.take(core)
        self.settle(core, core.core.send(answers))
        assert [len(answer.ways) for answer in answers] == [2, 2, 1]
        assert [stream.packed for stream in streams] == [1, 0, 1, 0, 1]
        assert [stream.data for stream in streams] == [[[1]]] * 5

    def test_who_has_other_events_waiting_gets_an_answer_of_its_own(self, core):
        client_ids, streams = self.begin(core, [FakeStream] * 4)
        core.core.client_push(client_ids[1], "/b", "own")
        core.core.publish("/a", 1)
        core.work()
        assert [stream.data for stream in streams] == [[[1]], [["own", 1]], [[1]], [[1]]]

    def test_an_answer_between_is_not_overtaken(self, core):
        """A session's reply, that came into line before its events, leaves before them."""
        client_ids, streams = self.begin(core, [FakeStream] * 3)
        sessions = [core.core.sessions[each] for each in client_ids]
        core.core.publish("/a", 1)
        with core.core.lock:
            core.core.ready.insert(2, bayeux_server.Answer(streams[2], ['{"reply":1}'], sessions[2]))
        assert [len(answer.exchanges) for answer in self.take(core)] == [2, 1, 1]

    def test_who_polls_between_them_keeps_the_place_in_line(self, core):
        client_ids, streams = self.begin(core, [FakeStream] * 3)
        core.core.detach(streams[1])
        core.pass_time(1)
        core.send(core.connect_message(client_ids[1]), transport="long-polling")
        core.send(core.connect_message(client_ids[1]), transport="long-polling")
        core.core.publish("/a", 1)
        answers = self.take(core)
        assert [answer.exchanges[0].transport for answer in answers] == ["websocket", "long-polling", "websocket"]

    def test_more_events_than_a_frame_takes_leave_in_several(self):
        core = CorePeer(max_frame_events=2)
        client_ids, streams = self.begin(core, [FakeStream] * 3)
        core.send(*[{"channel": "/a", "clientId": client_ids[0], "data": number} for number in range(5)])
        core.work()
        assert [stream.data for stream in streams] == [[[0, 1], [2, 3], [4]]] * 3

    def test_one_that_fails_harms_no_other(self, core, errors):
        client_ids, streams = self.begin(core, [FakeStream] * 3)
        streams[1].feed = None
        core.core.publish("/a", 1)
        core.work()
        assert "could not be sent" in errors.take()[0]
        assert [stream.given_up for stream in streams] == [0, 1, 0]
        assert not any(core.core.sessions[each].in_flight for each in client_ids)
        streams[1].feed = lambda broadcast, session: True
        core.core.publish("/a", 2)
        core.work()
        assert streams[0].data == streams[2].data == [[1], [2]]

    def test_one_that_cannot_be_packed_is_given_up_on_all_its_streams(self, core, errors):
        _, streams = self.begin(core, [FakeStream] * 3)
        for stream in streams:
            stream.pack = None
        core.core.publish("/a", 1)
        core.work()
        assert "could not be made" in errors.take()[0]
        assert [stream.given_up for stream in streams] == [1, 1, 1] and not any(stream.data for stream in streams)

    def test_what_is_not_written_yet_is_not_settled_with_the_others(self, core):
        """Its next events wait behind it; everybody else goes on."""
        client_ids, streams = self.begin(core, [FakeStream] * 3)
        streams[1].outcome = None
        core.core.publish("/a", 1)
        core.work()
        core.core.publish("/a", 2)
        core.work()
        assert [stream.data for stream in streams] == [[[1], [2]], [[1]], [[1], [2]]]
        session = core.core.sessions[client_ids[1]]
        core.core.settle_later(bayeux_server.Answer(streams[1], [], session, [object()]), True)
        core.work()
        assert streams[1].data == [[1], [2]]

    def test_a_session_that_ended_meanwhile_keeps_nothing(self, core):
        client_ids, streams = self.begin(core, [FakeStream] * 2)
        gone = core.core.sessions[client_ids[0]]
        core.core.publish("/a", 1)
        answer, = self.take(core)
        core.core.disconnect(client_ids[0], "test")
        core.core.settle_later(answer, False)
        assert not gone.queue and not core.core.ready.count(gone)
        core.work()
        assert streams[1].data == [[1]]

    def test_each_of_its_clients_has_a_line_in_the_log(self, core, caplog):
        _, streams = self.begin(core, [FakeStream] * 3)
        for number, stream in enumerate(streams):
            stream.address = f"10.0.0.{number}"
        with caplog.at_level("DEBUG", core.core.logger.name):
            core.core.publish("/a", 1)
            core.work()
        for stream in streams:
            assert f"to {stream.address}:" in caplog.text

    def test_a_lazy_event_that_came_meanwhile_leaves_in_time(self):
        core = CorePeer(lazy_channels=["/lazy"], max_lazy=5)
        _, streams = self.begin(core, [FakeStream] * 2)
        core.core.publish("/a", 1)
        answers = self.take(core)
        core.core.publish("/lazy", 2)
        self.settle(core, core.core.send(answers))
        core.work()
        assert [stream.data for stream in streams] == [[[1]]] * 2
        core.pass_time(5.1)
        core.work()
        assert [stream.data for stream in streams] == [[[1], [2]]] * 2

    @for_each("ending", ["closing", "lost"])
    def test_what_one_socket_loses_waits_for_its_client(self, server, ending):
        """Its connection is closing, or gone, when the frame is written; the others get theirs."""
        peers = [SocketPeer(server) for _ in range(3)]
        for peer in peers:
            peer.subscribe("/a")
        victim = server.core.sessions[peers[1].id]
        connection = victim.stream._connection
        with connection.lock:
            if ending == "closing":
                connection.is_closing = True
            else:
                connection.socket = BrokenSocket(connection.socket)
        server.publish("/a", 1)
        assert peers[0].receive(1) == peers[2].receive(1) == [1]
        wait_until(lambda: victim.stream is None and not victim.in_flight, "the stream to be given up")
        with SocketPeer(server, client_id=peers[1].id) as back:
            assert back.receive(1) == [1]
        for peer in peers:
            peer.close()

    def test_what_a_slow_reader_has_not_taken_holds_up_only_its_own(self, serve):
        server = serve(max_queue=100_000)
        with SocketPeer(server) as slow, SocketPeer(server) as quick:
            for peer in (slow, quick):
                peer.subscribe("/a")
            session = server.core.sessions[slow.id]
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            session.stream._connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            text = "x" * 60_000
            for number in range(50):
                server.publish("/a", [number, text])
                assert quick.receive(1) == [[number, text]]
            assert session.in_flight and session.queue
            assert slow.receive(50) == [[number, text] for number in range(50)]
            wait_until(lambda: not session.in_flight and not session.queue, "all to be settled")

    # -- Application code --------------------------------------------------------------------
    # One place calls the application's functions, whatever they do.

    @pytest.fixture
    def gate(self):
        return bayeux_server.ApplicationCode(logging.getLogger("bayeux_server"), bayeux_server.Turns())

    @for_each("fault", [*FAULTS, ValueError])
    def test_whatever_is_raised_is_logged_once(self, gate, fault, errors):
        def fail(value):
            raise fault(value)

        def call():
            with pytest.raises(bayeux_server.ApplicationFault, match="^the code$"):
                gate.call("the code", fail, 7)
            gate.run("the code", fail, 7)

        at_once(call)
        logged = errors.take()
        assert len(logged) == 2 and all(each.startswith("the code failed\nTraceback") for each in logged)

    def test_a_bayeux_error_is_an_answer_where_one_can_be_given(self, gate, errors):
        def refuse():
            raise BayeuxError(403, "", "No")

        with pytest.raises(BayeuxError, match="403::No"):
            gate.call("the code", refuse)
        gate.run("the code", refuse)
        assert len(errors.take()) == 1

    def test_ctrl_c_in_the_main_thread_means_the_application(self, gate):
        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gate.run("the code", interrupt)

    @for_each("place", ["service", "generator", "message_acl", "incoming", "outgoing", "listener",
                        "callback", "on_end", "handler", "read", "second read", "close", "post_handle"])
    def test_no_fault_costs_more_than_its_own_answer(self, serve, errors, place):
        """With each kind of fault, many times more often than there are threads: one line each, and all goes on."""
        kinds, has_turn = itertools.cycle(FAULTS), []

        def fail(*arguments):
            has_lock = not server.core.lock.acquire(timeout=PATIENCE)       # else another thread may have it
            if not has_lock:
                server.core.lock.release()
            has_turn.append(server.core.turns.is_here() or has_lock)
            raise next(kinds)()

        def fail_on_channel(session, message):
            return fail() if message["channel"] == "/fail" else message

        def fail_in_generator(message):
            yield fail()

        def handler(request):
            return bayeux_server.Response({"read": Body(fail), "second read": Body(b"12", fail),
                                           "close": Body(b"1234", at_close=fail)}.get(place, "text"), length=4)

        option = {"service": {"services": {"fail": fail}}, "generator": {"services": {"fail": fail_in_generator}},
                  "message_acl": {"message_acl": lambda session, message: fail_on_channel(session, message) and None},
                  "incoming": {"extensions": [types.SimpleNamespace(incoming=fail_on_channel)]},
                  "outgoing": {"extensions": [types.SimpleNamespace(outgoing=fail_on_channel)]},
                  "handler": {"content_handlers": {"/fail": fail}}, "post_handle": {"post_handle": fail}}
        server = serve(max_threads=3, **{"content_handlers": {"/fail": handler}, **option.get(place, {})})

        def act(peer):
            if place in ("service", "generator"):
                assert error_code(peer.ask("/service/fail")) == 500
            elif place in ("message_acl", "incoming", "outgoing"):
                assert error_code(peer.ask("/fail", data=1)) == (500 if place == "incoming" else 403)
            elif place in ("listener", "callback"):
                server.publish("/a", "event")
            elif place == "on_end":
                LocalClient(server, on_end=fail).close()
            else:
                get(200 if place == "close" else None if place == "second read" else 500)

        def get(status):
            with Wire(server) as wire:
                wire.send_request("GET", "/fail")
                if status is None:              # its head has been sent already
                    assert wire._read_until(lambda: wire.buffer.endswith(b"12"))
                    assert wire.socket.recv(10) == b""
                else:
                    assert wire.read_answer().status == status

        times = 10 * len(FAULTS)
        if place == "listener":
            server.add_listener(fail, ["publish"])
        if place == "callback":
            LocalClient(server).subscribe("/a", fail)
        with Peer(server) as peer:
            for _ in range(times):
                act(peer)
        wait_until(lambda: len(errors.records) >= times, "the end of all those calls")
        assert len(errors.take()) == times and has_turn == [False] * times
        server.core._listeners["publish"] = []
        with bystander(server):
            pass

    @for_each("parts", [(b"12", b"34"), (b"12", b""), (b"", b""), (b"12345",), ("text",)])
    def test_a_body_is_closed_once_however_it_ends(self, serve, errors, parts):
        body = Body(*parts)
        server = serve(content_handlers={"/a": lambda request: bayeux_server.Response(body, length=4)})
        with Wire(server) as wire:
            wire.send_request("GET", "/a", Connection="close")
            assert wire._read_until(lambda: False) is False
        wait_until(lambda: body.closed, "the closing of the body")
        wait_until(lambda: not server.watch.connections)
        assert body.closed == 1 and len(errors.take()) == (parts == ("text",))

    def test_a_bayeux_error_of_a_content_handler_is_its_failure(self, serve, errors):
        """It is no fault of the request's."""
        def handler(request):
            raise BayeuxError(429, "/a", "A subscriber in the server is too far behind")

        server = serve(content_handlers={"/a": handler})
        with Wire(server) as wire:
            assert wire.request("GET", "/a").status == 500
        assert len(errors.take()) == 1

    @for_each("place", ["handler", "read", "second read", "close", "file"])
    def test_a_slow_answer_holds_up_only_itself(self, serve, site, place, monkeypatch):
        """Not even other requests that need a handler thread and its turn."""
        begun, may_end = threading.Event(), threading.Event()

        def wait(part=b"34"):
            begun.set()
            assert may_end.wait(PATIENCE)
            return part

        def handler(request):
            body = {"read": Body(wait, b"12"), "second read": Body(b"12", wait),
                    "close": Body(b"12", b"34", at_close=wait)}.get(place)
            return bayeux_server.Response(body, length=4) if body else wait(b"1234")

        class SlowFiles(bayeux_server.Files):
            def respond(self, request):
                return wait(super().respond(request))

        if place == "file":
            monkeypatch.setattr(bayeux_server, "Files", SlowFiles)
        server = serve(docroot=str(site), services={"echo": lambda message: {"data": "echo"}},
                       content_handlers={} if place == "file" else {"/digits.txt": handler})
        with Wire(server) as wire:
            wire.send_request("GET", "/digits.txt")
            assert begun.wait(PATIENCE)
            with bystander(server) as peer:
                assert peer.ask("/service/echo")["data"] == "echo"
                assert len(peer.side.post(*[PING] * 100)) == 100
            may_end.set()
            assert wire.read_answer().status == 200

    def test_a_client_may_hang_up_while_its_answer_is_read(self, serve):
        begun, may_end = threading.Event(), threading.Event()

        def wait():
            begun.set()
            assert may_end.wait(PATIENCE)
            return b"3"

        body = Body(b"12", wait, b"4")
        server = serve(content_handlers={"/a": lambda request: bayeux_server.Response(body, length=4)})
        with Wire(server) as wire:
            wire.send_request("GET", "/a")
            assert wire._read_until(lambda: wire.buffer.endswith(b"12")) and begun.wait(PATIENCE)
        may_end.set()
        wait_until(lambda: body.closed and not server.watch.connections, "the end of the connection")

    @for_each("transport", ["long-polling", "websocket"])
    def test_messages_of_a_client_that_has_gone_are_not_handled_on(self, serve, transport, monkeypatch):
        """The server looks once a turn."""
        monkeypatch.setattr(bayeux_server, "TURN", 0)
        called, begun, is_gone = [], threading.Event(), threading.Event()

        def service(message):
            called.append(message["data"])
            begun.set()
            assert is_gone.wait(PATIENCE)

        server = serve(services={"a": service}, max_threads=2)
        with Peer(server) as peer:
            calls = [{"channel": "/service/a", "clientId": peer.id, "data": number} for number in range(3)]
            wire = SocketWire(server) if transport == "websocket" else Wire(server)
            wire.send_batch(*calls) if transport == "websocket" else wire.send_post(*calls)
            assert begun.wait(PATIENCE)
            late = Wire(server)                 # its request waits for the one thread
            late.send_post({"channel": "/service/a", "clientId": peer.id, "data": "late"})
            wait_until(lambda: server._handler_threads._waiting)
            wire.close()
            late.close()
            is_gone.set()
            wait_until(lambda: len(server.watch.connections) == 2, "the end of both connections")
            assert called == [0]
            assert peer.ask("/service/a", data="alive")["successful"]

    # -- Slow neighbours ---------------------------------------------------------------------

    @for_each("place", ["services", "message_acl", "extensions"])
    def test_what_was_published_does_not_wait_for_the_application(self, place):
        """An event is on its way before the code behind the next message of its batch runs."""
        received, seen = [], []

        def service(message):
            seen.append(list(received))
            return {}

        def message_acl(session, message):
            seen.append(list(received))

        class Extension:
            def incoming(self, session, message):
                seen.append(list(received))
                return message

        option = {"services": {"services": {"slow": service}}, "message_acl": {"message_acl": message_acl},
                  "extensions": {"services": {"slow": any_function}, "extensions": [Extension()]}}[place]
        peer = CorePeer(**{"services": {"slow": any_function}, **option})
        bot = LocalClient(peer, "bot")
        bot.subscribe("/a", lambda message: received.append(message["data"]))
        client_id = peer.handshake()
        peer.ask({"channel": "/a", "clientId": client_id, "data": "event"},
                 {"channel": "/service/slow", "clientId": client_id, "data": None})
        assert seen[-1] == ["event"]

    # -- Failing application -----------------------------------------------------------------

    def test_a_post_handle_that_spoils_the_headers_costs_no_connection(self, serve, errors):
        """The connection is answered or hung up, and does not stay for ever."""
        def spoil(request, response):
            response.headers = {1: 2}

        server = serve(content_handlers={"/a": lambda request: "text"}, post_handle=spoil)
        with Wire(server) as wire:
            answer = wire.request("GET", "/a")
            assert answer.status == 500
        wait_until(lambda: not server.watch.connections, "the end of the connection")
        assert errors.take()

    def test_a_service_that_wants_to_exit_is_a_failing_one(self, serve, errors):
        """SystemExit is no Exception."""
        server = serve(services={"exit": lambda message: sys.exit("no"), "echo": lambda message: {"data": "echo"}},
                       client_max_connections=1)
        with Peer(server) as peer:
            assert peer.ask("/service/exit")["error"].startswith("500:")
            assert peer.ask("/service/echo")["data"] == "echo"
        assert errors.take()

    def test_a_callback_that_wants_to_exit_gets_the_next_event(self, server, errors):
        """A local client is not deaf after it, and the server stops without waiting for it."""
        received, is_done = [], threading.Event()

        def callback(message):
            received.append(message["data"])
            if message["data"] == "first":
                sys.exit("no")
            is_done.set()

        LocalClient(server, "bot").subscribe("/a", callback)
        server.publish("/a", "first")
        server.publish("/a", "second")
        assert is_done.wait(PATIENCE) and received == ["first", "second"]
        assert errors.take()


# ======================================================================================
# §7  The protocol
# ======================================================================================

ADVICE_TOO_FAST = {**ADVICE_USUAL, "interval": 1000}


class TestProtocol:
    """Handshake, connect, subscribe, publish, services, disconnect and the extensions, in plain dicts."""

    # -- Handshake ---------------------------------------------------------------------------

    def test_the_reply_has_all_its_fields(self, core):
        """And nothing more."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "minimumVersion": "0.9", "id": "0",
                           "supportedConnectionTypes": ["flash", "long-polling", "callback-polling", "iframe"]})
        client_id = reply.pop("clientId")
        assert client_id in core.core.sessions
        assert reply == {"channel": "/meta/handshake", "successful": True, "version": "1.0", "minimumVersion": "1.0",
                         "id": "0",
                         "supportedConnectionTypes": ["long-polling", "callback-polling"],
                         "advice": {"reconnect": "retry", "interval": 0, "timeout": 30_000}}

    def test_advice_tells_the_options_in_milliseconds(self):
        """Faye gives up a server whose advice has no timeout; a handshake advised throws in CometD."""
        core = CorePeer(timeout=12.5, interval=0.25)
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"})
        connect, = core.ask(core.connect_message(reply["clientId"]))
        assert reply["advice"] == connect["advice"] == {"reconnect": "retry", "interval": 250, "timeout": 12_500}

    def test_a_client_id_is_letters_and_digits_and_never_the_same(self, core):
        """Of at least 128 random bits, which is 22 characters of letters and digits."""
        ids = [core.handshake(connect=False) for _ in range(100)]
        assert len(set(ids)) == 100
        assert all(re.fullmatch(r"[A-Za-z0-9]{22,}", client_id) for client_id in ids)
        # No place of it stands still, as it would if part of it were a counter or a clock.
        assert all(len({client_id[place] for client_id in ids}) > 5 for place in range(len(ids[0])))

    def test_a_client_id_comes_from_secrets(self, core, monkeypatch):
        monkeypatch.setattr(bayeux_server.secrets, "token_hex", lambda size: "5" * size * 2)
        assert set(core.handshake(connect=False)) == {"5"}

    @for_each("version", ["1.0", "1", "0.9", "1.0beta", "2.0", "10.20.30", "1.a-b_c"])
    def test_any_version_is_spoken_to(self, core, version):
        """It is minimumVersion that may be too much."""
        assert core.handshake(version=version)

    @for_each("version", [None, 1.0, 1, True, "", "x", "1.", ".1", "1..0", "v1.0", "1.0 ", "1.0\n",
                          "1,0", "-1",
                          [], ["1.0"], {}, "9" * 5000])
    @for_each("field", ["version", "minimumVersion"])
    def test_what_is_no_version_is_refused(self, core, field, version):
        """A missing minimumVersion is all right."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", field: version})
        if field == "minimumVersion" and version is None:
            assert reply["successful"]
        else:
            assert error_code(reply) in (400, 409) and "clientId" not in reply
            assert reply["advice"]["reconnect"] == "none"
        assert len(core.core.sessions) == reply["successful"]

    @for_each(("oldest", "is_spoken"), [
        ("0.9", True), ("1.0", True), ("1", True), ("1.0beta", True), ("0.9.9", True), ("0.10", True),
        ("1.1", False), ("1.0.1", False), ("2", False), ("2.0beta", False), ("10.0", False), ("1.10", False)])
    def test_versions_are_compared_element_by_element(self, core, oldest, is_spoken):
        """0.10 is not 0.1, and 1.0beta comes before 1.0."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "3.0", "minimumVersion": oldest})
        assert reply["successful"] is is_spoken
        if not is_spoken:
            assert error_code(reply) == 409 and reply["advice"]["reconnect"] == "none" and "clientId" not in reply

    @for_each("types", [["iframe"], [], ["LONG-POLLING"]])
    def test_no_connection_type_in_common_is_answered_with_ours(self, core, types):
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": types})
        assert error_code(reply) == 409 and "clientId" not in reply
        assert reply["supportedConnectionTypes"] == list(bayeux_server.CONNECTION_TYPES)
        assert reply["advice"]["reconnect"] == "none"
        assert not core.core.sessions

    @for_each("types", [None, "long-polling", {"long-polling": 1}, ["long-polling", 5], [None], 5, True, [[]]])
    def test_connection_types_are_a_list_of_strings(self, core, types):
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": types})
        assert error_code(reply) == 400 and reply["advice"]["reconnect"] == "none" and "clientId" not in reply

    @for_each("transport", ["long-polling", "callback-polling"])
    def test_without_connection_types_the_transport_speaks_for_itself(self, core, transport):
        """Dojo's handshake over JSONP names none."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"}, transport=transport)
        assert reply["successful"] and transport in reply["supportedConnectionTypes"]

    def test_a_handshake_makes_the_rest_of_its_request_void(self, core):
        """Wherever it stands; its reply is the only one, so the first."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        reply, = core.ask({"channel": "/a", "clientId": client_id, "data": 1, "id": 1}, 5,
                          {"channel": "/meta/handshake", "version": "1.0", "id": 2},
                          {"channel": "/meta/handshake", "version": "1.0", "id": 3},
                          {"channel": "/meta/disconnect", "clientId": client_id, "id": 4})
        assert reply["successful"] and reply["id"] == 2
        assert len(core.core.sessions) == 2 and core.events(client_id) == []

    def test_a_refused_handshake_makes_the_rest_void_too(self, core):
        client_id = core.handshake()
        reply, = core.ask({"channel": "/meta/disconnect", "clientId": client_id}, {"channel": "/meta/handshake"})
        assert error_code(reply) == 400
        assert client_id in core.core.sessions

    def test_a_handshake_that_names_a_live_session_leaves_it_be(self, core):
        """Nobody can take over or end a session by a handshake."""
        old = core.handshake()
        core.subscribe(old, "/a")
        held = core.hold(old)
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "clientId": old})
        new = reply["clientId"]
        assert reply["successful"] and new != old and not core.core.sessions[new].subscriptions
        core.core.publish("/a", 1)
        core.work()
        assert [event["data"] for event in held.answer[1:]] == [1]

    @for_each("client_id", [None, "", "unknown", 5, [], {}, True])
    def test_a_handshake_cares_for_no_client_id(self, core, client_id):
        assert core.handshake(clientId=client_id)

    def test_a_session_knows_its_address(self, core):
        """For message_acl."""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"}, address="10.9.8.7")
        assert core.core.sessions[reply["clientId"]].address == "10.9.8.7"

    # -- Connect -----------------------------------------------------------------------------

    def test_the_first_connect_is_answered_at_once_with_advice(self, core):
        """Dojox, aiocometd and python-bayeux say nothing before it returns."""
        client_id = core.handshake(connect=False)
        reply, = core.ask(core.connect_message(client_id, id="1"))
        assert reply == {"channel": "/meta/connect", "successful": True, "id": "1",
                         "advice": {"reconnect": "retry", "interval": 0, "timeout": 30_000}}

    def test_later_connects_are_held_until_there_is_an_event(self, core):
        """Which follows the connect reply, and that carries its id."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id, id=7)
        core.work()
        assert held.answer is None
        core.core.publish("/a", "event")
        core.work()
        assert held.answer == [{"channel": "/meta/connect", "successful": True, "id": 7},
                               {"channel": "/a", "data": "event"}]

    def test_later_connects_are_held_no_longer_than_timeout(self):
        """Faye gives up a server that holds longer than it advised."""
        core = CorePeer(timeout=10)
        client_id = core.handshake()
        held = core.hold(client_id, id="8")
        core.pass_time(9.5)
        assert held.answer is None
        core.pass_time(0.5)
        assert held.answer == [{"channel": "/meta/connect", "successful": True, "id": "8"}]
        assert core.hold(client_id)

    def test_each_connect_is_held_anew(self):
        """An earlier deadline is none of a later connect's."""
        core = CorePeer(timeout=10)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.hold(client_id)
        core.pass_time(6)
        core.core.publish("/a", 1)
        core.work()
        second = core.hold(client_id)
        core.pass_time(9)
        assert second.answer is None
        core.pass_time(2)
        assert second.answer is not None

    def test_a_connect_with_waiting_events_is_not_left_waiting(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        core.core.publish("/a", 2)
        exchange = core.send(core.connect_message(client_id))
        core.work()
        assert [event["data"] for event in exchange.answer[1:]] == [1, 2]

    @for_each(("advice", "seconds"), [
        ({"timeout": 5000}, 5), ({"timeout": 0.5}, 0.0005), ({"timeout": 10**200}, 30), ({"timeout": 60_000}, 30),
        ({"timeout": -1}, 30), ({"timeout": "5000"}, 30), ({"timeout": True}, 30), ({"timeout": None}, 30),
        ({"timeout": [5]}, 30), ({}, 30), ([], 30), ("x", 30), (None, 30), (0, 30)])
    def test_a_smaller_timeout_of_the_clients_is_honoured(self, core, advice, seconds):
        """Anything else is as if it had said nothing."""
        held = core.hold(core.handshake(), advice=advice)
        core.pass_time(seconds * 0.9)
        assert held.answer is None
        core.pass_time(seconds * 0.2)
        assert held.answer[0]["successful"]

    def test_a_connect_with_timeout_0_is_not_held(self, core):
        client_id = core.handshake()
        for timeout in (0, 0.0, -0.0):
            assert core.ask(core.connect_message(client_id, advice={"timeout": timeout}))[0]["successful"]

    @for_each("is_first", [True, False])
    def test_a_connect_that_shares_its_request_is_not_held(self, core, is_first):
        """Aiocometd and Faye send it with a subscribe, and wait for both."""
        client_id = core.handshake()
        connect = core.connect_message(client_id, id="c")
        subscribe = {"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/a", "id": "s"}
        replies = core.ask(*([connect, subscribe] if is_first else [subscribe, connect]))
        assert [reply["id"] for reply in replies] == (["c", "s"] if is_first else ["s", "c"])
        assert all(reply["successful"] for reply in replies)

    @for_each("other", [5, None, {}, {"channel": "/meta/nope"}, {"channel": "/meta/connect"}])
    def test_a_connect_beside_a_bad_message_is_not_held_either(self, core, other):
        client_id = core.handshake()
        for messages in ([core.connect_message(client_id), other], [other, core.connect_message(client_id)]):
            replies = core.ask(*messages)
            assert sorted(reply["successful"] for reply in replies) == [False, True]

    def test_a_connect_with_another_request_behind_it_is_not_held(self, core):
        """On its connection; the answer to that would have to wait."""
        client_id = core.handshake()
        assert core.ask(core.connect_message(client_id), may_hold=False)[0]["successful"]

    def test_a_held_connect_is_answered_when_another_request_comes_behind_it(self, core):
        """Without events, which wait for the next."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id, id=3)
        core.core.answer_now(held)
        assert held.answer == [{"channel": "/meta/connect", "successful": True, "id": 3}]
        core.core.answer_now(held)                  # nothing is held there any more
        core.core.publish("/a", 1)
        assert [event["data"] for event in core.events(client_id)] == [1]

    def test_a_connect_is_handled_before_its_neighbours(self, core):
        """The replies keep the order of the request, the events come last."""
        client_id = core.handshake(connect=False)
        replies = core.ask({"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/a", "id": 1},
                           {"channel": "/a", "clientId": client_id, "data": "mine", "id": 2},
                           core.connect_message(client_id, id=3))
        assert [reply.get("id") for reply in replies] == [1, 2, 3, None]
        assert replies[3] == {"channel": "/a", "data": "mine"}

    def test_a_second_connect_of_a_request_is_refused(self, core):
        """Whose ever it is."""
        first, second = core.handshake(), core.handshake()
        for other in (first, second):
            replies = core.ask(core.connect_message(first, id=1), core.connect_message(other, id=2))
            assert replies[0]["successful"] and error_code(replies[1]) == 409
            assert [reply["id"] for reply in replies] == [1, 2]

    def test_a_refused_connect_does_not_count_as_the_requests_connect(self, core):
        """One bad message never voids its neighbours."""
        client_id = core.handshake()
        replies = core.ask(core.connect_message("nobody", id=1), core.connect_message(client_id, id=2))
        assert [reply["successful"] for reply in replies] == [False, True]

    def test_a_second_connect_releases_the_first(self, core):
        """Which is answered with its own id, successful and without events; those go to the newer one."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        older = core.hold(client_id, id="old")
        newer = core.hold(client_id, id="new")
        core.core.publish("/a", 1)
        core.work()
        assert older.answer == [{"channel": "/meta/connect", "successful": True, "id": "old"}]
        assert newer.answer == [{"channel": "/meta/connect", "successful": True, "id": "new"},
                                {"channel": "/a", "data": 1}]

    def test_a_second_connect_takes_the_events_that_came_before_it(self, core):
        """The older one had not been answered yet."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        older = core.hold(client_id)
        core.core.publish("/a", 1)
        newer = core.send(core.connect_message(client_id))
        core.work()
        assert older.answer[1:] == [] and [event["data"] for event in newer.answer[1:]] == [1]

    @for_each("fields", [{"advice": {"timeout": 0}}, {}])
    def test_a_connect_that_is_not_held_releases_the_older_too(self, core, fields):
        """CometD's page reload, and a connect in a batch."""
        client_id = core.handshake()
        older = core.hold(client_id, id="old")
        messages = [core.connect_message(client_id, **fields)] + ([] if fields else [{"channel": "/meta/ping"}])
        core.ask(*messages)
        core.work()
        assert older.answer == [{"channel": "/meta/connect", "successful": True, "id": "old"}]
        assert core.core.sessions[client_id].hold is None

    @for_each("fields", [{"connectionType": "iframe"}, {"connectionType": None}, {"id": []}])
    def test_a_refused_connect_releases_nothing(self, core, fields):
        client_id = core.handshake()
        older = core.hold(client_id)
        assert error_code(core.ask(core.connect_message(client_id, **fields))[0]) == 400
        core.work()
        assert older.answer is None

    def test_two_connects_at_the_same_time_leave_one_held(self, core):
        """On two connections; nothing is lost, and neither hangs for ever."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        for number in range(100):
            exchanges = [FakeExchange(core.core), FakeExchange(core.core)]
            at_once(*[sending(core, core.connect_message(client_id), exchange) for exchange in exchanges])
            core.work()
            assert sorted(exchange.answer is None for exchange in exchanges) == [False, True]
            core.core.publish("/a", number)
            core.work()
            batches = sorted((exchange.answer for exchange in exchanges), key=len)
            assert [len(batch) for batch in batches] == [1, 2] and batches[1][1]["data"] == number
            assert all(batch[0]["successful"] for batch in batches)

    def test_connects_and_a_disconnect_at_the_same_time_leave_nothing_held(self, core):
        for _ in range(50):
            client_id = core.handshake()
            exchanges = [FakeExchange(core.core), FakeExchange(core.core)]
            disconnect = {"channel": "/meta/disconnect", "clientId": client_id}
            at_once(sending(core, disconnect, FakeExchange(core.core)),
                    *[sending(core, core.connect_message(client_id), exchange) for exchange in exchanges])
            core.work()
            assert all(len(exchange.answer) == 1 for exchange in exchanges)
            assert not core.core.sessions

    def test_events_travel_only_with_connect_replies(self, core):
        """The order over two connections depends on it, and python-bayeux."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        for message in ({"channel": "/a", "data": 1}, {"channel": "/meta/subscribe", "subscription": "/b"},
                        {"channel": "/meta/ping"}, {"channel": "/service/none"}):
            assert len(core.ask({**message, "clientId": client_id})) == 1
        assert [event["data"] for event in core.events(client_id)] == [1]

    @for_each("client_id", ["unknown", "", "0" * 32, "\u00e4"])
    def test_an_unknown_client_is_told_to_handshake(self, core, client_id):
        for message in (core.connect_message(client_id),
                        {"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/a"},
                        {"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/a"},
                        {"channel": "/meta/disconnect", "clientId": client_id},
                        {"channel": "/a", "clientId": client_id, "data": 1},
                        {"channel": "/service/x", "clientId": client_id}):
            reply, = core.ask(message)
            assert (error_code(reply), reply["advice"]) == (402, ADVICE_HANDSHAKE)

    @for_each("channel", ["/meta/connect", "/meta/subscribe", "/meta/unsubscribe", "/meta/disconnect", "/a"])
    @for_each(("fields", "code"), [({}, 401), ({"clientId": None}, 401), ({"clientId": 5}, 400),
                                   ({"clientId": ["x"]}, 400), ({"clientId": {}}, 400),
                                   ({"clientId": True}, 400)])
    def test_a_missing_client_id_is_answered(self, core, channel, fields, code):
        """It killed the original."""
        reply, = core.ask({"channel": channel, "connectionType": "long-polling", "subscription": "/a", "data": 1,
                           **fields})
        assert error_code(reply) == code and reply["advice"] == ADVICE_HANDSHAKE

    @for_each("connection_type", ["iframe", "", "Long-Polling", None, 5, ["long-polling"], {}, True])
    def test_a_connection_type_that_we_do_not_offer_is_refused(self, core, connection_type):
        """And the session lives on."""
        client_id = core.handshake()
        assert error_code(core.ask(core.connect_message(client_id, connectionType=connection_type))[0]) == 400
        assert core.hold(client_id)

    def test_interval_is_advised_and_0_by_default(self):
        """Trap: aiocometd reads any other interval as seconds."""
        core = CorePeer()
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"})
        connect, = core.ask(core.connect_message(reply["clientId"]))
        assert reply["advice"]["interval"] == connect["advice"]["interval"] == 0

    # -- Stale connects ----------------------------------------------------------------------
    # Connects that arrive, or go on, when a newer one has been answered already.

    @staticmethod
    def connect(peer, client_id, ack, **exchange):
        """The number of the reply, and the data of its events; (None, None) if it is lost."""
        message = peer.connect_message(client_id, advice={"timeout": 0}, ext={"ack": ack})
        answer = peer.send(message, **exchange).answer
        return (answer[0]["ext"]["ack"], events_of(answer)) if answer else (None, None)

    def begin_with_ack(self, peer):
        client_id = peer.handshake(ext={"ack": True})
        peer.subscribe(client_id, "/a")
        return client_id, self.connect(peer, client_id, 1)[0]

    def test_a_stale_connect_does_not_bring_back_what_was_seen(self, core):
        """Seen in the reply to the newer, taken again by the older, whose connection is gone."""
        client_id, before = self.begin_with_ack(core)
        core.core.publish("/a", "event")
        number, events = self.connect(core, client_id, before)
        assert events == ["event"]
        self.connect(core, client_id, before, is_broken=True)
        number, events = self.connect(core, client_id, number)
        assert events == []

    def test_a_stale_connect_behind_a_newer_acknowledgement_loses_and_doubles_nothing(self, core):
        client_id, before = self.begin_with_ack(core)
        seen, number = [], before
        for name in ("first", "second", "third"):
            core.core.publish("/a", name)
            number, events = self.connect(core, client_id, number)
            seen += events
            self.connect(core, client_id, before, is_broken=True)
        seen += self.connect(core, client_id, number)[1]
        assert seen == ["first", "second", "third"]

    def test_an_event_that_waits_to_be_sent_again_leaves_the_queue_when_it_is_acknowledged(self, core):
        """The stale connect is held, and released by the next: it has put the event back, and has not sent it."""
        client_id, before = self.begin_with_ack(core)
        core.core.publish("/a", "event")
        number, _ = self.connect(core, client_id, before)
        core.send(core.connect_message(client_id, ext={"ack": before}))
        assert self.connect(core, client_id, number)[1] == []

    def test_what_was_lost_and_did_not_fit_into_the_next_reply_comes_in_the_one_behind_it(self):
        """Its number is below the one that is acknowledged, and yet nobody has seen it."""
        peer = CorePeer(max_frame_events=1)
        client_id, number = self.begin_with_ack(peer)
        peer.core.publish("/a", "first")
        peer.core.publish("/a", "second")
        self.connect(peer, client_id, number, is_broken=True)
        seen = []
        for _ in range(2):
            held = FakeExchange(peer.core, transport="websocket")
            held.stream = FakeStream()
            peer.core.receive([peer.connect_message(client_id, connectionType="websocket", ext={"ack": number})], held)
            peer.work()
            number = held.answer[0]["ext"]["ack"]
            seen += events_of(held.answer)
        assert seen == ["first", "second"]

    def test_an_event_behind_an_acknowledged_one_does_not_wait_for_the_time_to_be_over(self, core):
        """The queue is empty again, and so nothing in it is urgent any more."""
        client_id, before = self.begin_with_ack(core)
        core.core.publish("/a", "first")
        number, _ = self.connect(core, client_id, before)
        stale = core.send(core.connect_message(client_id, ext={"ack": before}))     # "first" waits again
        core.core.hang_up(stale)
        core.work()
        held = core.hold(client_id, ext={"ack": number})                            # no more
        core.core.publish("/a", "second")
        core.work()
        assert held.answer is not None and events_of(held.answer) == ["second"]

    # -- Crowding ----------------------------------------------------------------------------
    # client_max_connections counts what is kept open; over it a client is told to poll, and nothing is refused.

    @pytest.fixture
    def crowd(self):
        return CorePeer(client_max_connections=2)

    def test_over_the_limit_a_connect_is_answered_at_once_with_its_events(self, crowd):
        ids = [crowd.handshake() for _ in range(3)]
        crowd.subscribe(ids[2], "/a")
        crowd.hold(ids[0]), crowd.hold(ids[1])
        crowd.publish(ids[2], "/a", "event")
        reply, event = crowd.ask(crowd.connect_message(ids[2], id="9"))
        assert reply == {"channel": "/meta/connect", "successful": True, "id": "9", "advice": ADVICE_POLL}
        assert event["data"] == "event"
        for channel in ("/meta/ping", "/meta/subscribe", "/b", "/meta/disconnect"):
            assert crowd.ask({"channel": channel, "clientId": ids[2], "data": 1, "subscription": "/b"})[0]["successful"]

    def test_when_there_is_room_again_the_advice_is_taken_back_once(self, crowd):
        ids = [crowd.handshake() for _ in range(3)]
        crowd.hold(ids[0]), crowd.hold(ids[1])
        for _ in range(2):
            assert crowd.ask(crowd.connect_message(ids[2]))[0]["advice"] == ADVICE_POLL
        crowd.ask({"channel": "/meta/disconnect", "clientId": ids[0]})
        held = crowd.hold(ids[2])
        crowd.pass_time(30)
        assert held.answer[0]["advice"] == ADVICE_USUAL
        held = crowd.hold(ids[2])
        crowd.pass_time(30)
        assert "advice" not in held.answer[0]

    def test_a_newer_connect_takes_the_place_of_its_session_s_own(self, crowd):
        ids = [crowd.handshake() for _ in range(2)]
        crowd.hold(ids[0]), crowd.hold(ids[1])
        for client_id in ids * 2:
            crowd.hold(client_id)
        assert crowd.core.kept_open == {"10.0.0.1": 2}

    def test_but_not_if_that_came_from_another_address(self, crowd):
        ids = [crowd.handshake() for _ in range(3)]
        crowd.hold(ids[0]), crowd.hold(ids[1])
        assert crowd.send(crowd.connect_message(ids[2]), address="10.0.0.2").answer is None
        assert crowd.ask(crowd.connect_message(ids[2]))[0]["advice"] == ADVICE_POLL

    def test_each_address_has_its_own(self, crowd):
        for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1"):
            for _ in range(2):
                assert crowd.send(crowd.connect_message(crowd.handshake()), address=address).answer is None
        for address in ("192.0.2.1", "2001:db8::2", "2001:db8:0:1:2:3:4:5"):
            assert crowd.ask(crowd.connect_message(crowd.handshake()), address=address)[0]["advice"] == ADVICE_POLL

    def test_what_has_been_counted_is_forgotten(self, crowd):
        """However a held connect ends."""
        ids = [crowd.handshake() for _ in range(2)]
        crowd.hold(ids[0]), crowd.hold(ids[1])
        crowd.pass_time(30)
        assert crowd.core.kept_open == {}
        exchange = crowd.hold(ids[0])
        crowd.core.hang_up(exchange)
        crowd.core.answer_now(crowd.hold(ids[0]))
        assert crowd.core.kept_open == {}
        crowd.hold(ids[0])
        crowd.core.stop()
        assert crowd.core.kept_open == {} and crowd.core._held_by_browser == {}

    def test_a_connect_on_a_stream_is_no_connection_more(self, crowd):
        for _ in range(2):
            crowd.hold(crowd.handshake())
        exchange = FakeExchange(crowd.core, transport="websocket")
        exchange.stream = FakeStream()
        crowd.core.receive([crowd.connect_message(crowd.handshake(), connectionType="websocket")], exchange)
        assert exchange.answer is None and crowd.core.kept_open == {"10.0.0.1": 2}

    def test_a_browser_s_limit_goes_before_the_address_s(self):
        """And what is said of multiple clients is taken back by name."""
        crowd = CorePeer(client_max_connections=2, max_sessions_per_browser=1)
        ids = [crowd.handshake() for _ in range(2)]
        crowd.hold(ids[0])
        assert crowd.ask(crowd.connect_message(ids[1]))[0]["advice"] == {**ADVICE_POLL, "multiple-clients": True}
        crowd.ask({"channel": "/meta/disconnect", "clientId": ids[0]})
        others = [crowd.handshake(), crowd.handshake()]
        for number, client_id in enumerate(others):
            crowd.core.sessions[client_id].browser = str(number)
            crowd.hold(client_id)
        assert crowd.ask(crowd.connect_message(ids[1]))[0]["advice"] == {**ADVICE_POLL, "multiple-clients": False}
        crowd.ask({"channel": "/meta/disconnect", "clientId": others[0]})
        held = crowd.hold(ids[1])
        crowd.core.stop()
        crowd.work()
        assert "multiple-clients" not in held.answer[0]["advice"]

    def test_of_many_sessions_a_browser_s_are_not_searched_for(self):
        """Ten thousand held connects would be gone through with each connect, under the lock."""
        crowd = CorePeer(max_sessions_per_browser=1)
        first, second = crowd.handshake(), crowd.handshake()
        crowd.hold(first)
        crowd.core.sessions = TestProtocol.Crowd(crowd.core.sessions)
        assert crowd.ask(crowd.connect_message(second))[0]["advice"]["multiple-clients"] is True

    def test_a_browser_s_own_connect_makes_room_for_its_next(self):
        crowd = CorePeer(max_sessions_per_browser=1)
        client_id = crowd.handshake()
        crowd.hold(client_id)
        crowd.hold(client_id)

    def test_sessions_without_a_cookie_are_not_of_one_browser(self):
        crowd = CorePeer(max_sessions_per_browser=1)
        ids = [crowd.handshake(), crowd.handshake()]
        for client_id in ids:
            crowd.core.sessions[client_id].browser = None
            crowd.hold(client_id)

    def test_a_connect_beside_an_event_stream_takes_no_place(self, crowd):
        """Faye's: it is answered at once in any case, and seldom comes."""
        for _ in range(2):
            crowd.hold(crowd.handshake())
        connect = crowd.connect_message(crowd.handshake(), connectionType="eventsource")
        assert crowd.ask(connect)[0]["advice"] == {**ADVICE_USUAL, "interval": 30_000}

    def test_a_pause_does_not_end_the_session(self):
        crowd = CorePeer(client_max_connections=1, connect_timeout=3)
        ids = [crowd.handshake(), crowd.handshake()]
        crowd.hold(ids[0])
        assert crowd.ask(crowd.connect_message(ids[1]))[0]["advice"]["interval"] == 1500

    def test_a_warning_names_address_limit_and_option_once_a_minute(self, crowd, caplog):
        ids = [crowd.handshake() for _ in range(3)]
        for address in ("192.0.2.1", "192.0.2.2"):
            for client_id in ids[:2]:
                crowd.send(crowd.connect_message(client_id), address=address)
            caplog.clear()
            for _ in range(3):
                crowd.ask(crowd.connect_message(ids[2]), address=address)
            line, = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert all(fact in line for fact in (address, "(2)", "client_max_connections"))
            assert "trusted" not in line
        caplog.clear()
        crowd.pass_time(61)
        for client_id in ids:
            crowd.send(crowd.connect_message(client_id), address="192.0.2.2")
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1

    def test_a_warning_says_what_to_do_about_a_proxy(self, crowd, caplog):
        ids = [crowd.handshake() for _ in range(3)]
        crowd.hold(ids[0]), crowd.hold(ids[1])
        exchange = FakeExchange(crowd.core)
        exchange.is_forwarded = True
        crowd.core.receive([crowd.connect_message(ids[2])], exchange)
        assert "--trusted-proxy 10.0.0.1" in caplog.text

    # -- Max rate ----------------------------------------------------------------------------

    def test_who_sends_more_is_refused_and_the_next_connect_takes_the_advice_back(self):
        core = CorePeer(max_rate=2)
        client_id, other = core.handshake(), core.handshake()
        event = {"channel": "/a", "data": 1, "clientId": client_id}
        for message in [event] * 7 + [{**event, "channel": "/meta/ping"}, {**event, "channel": "/service/none"},
                                      {**event, "channel": "/meta/subscribe", "subscription": "/a"}]:
            assert not core.ask(message)[0].get("error", "").startswith("429")
        reply, = core.ask({**event, "id": "1"})
        assert reply == {"channel": "/a", "id": "1", "successful": False, "error": "429::Too many messages",
                         "advice": ADVICE_TOO_FAST}
        held = core.hold(client_id)
        core.publish(other, "/a")
        core.work()
        assert held.answer[0]["advice"] == ADVICE_USUAL and len(held.answer) == 2
        held = core.hold(client_id)
        core.pass_time(30)
        assert "advice" not in held.answer[0]

    def test_connects_and_disconnects_are_neither_counted_nor_refused(self):
        core = CorePeer(max_rate=1)
        client_id = core.handshake()
        for _ in range(20):
            core.events(client_id)
        for expected in [True] * 5 + [False]:
            assert core.ask({"channel": "/a", "data": 1, "clientId": client_id})[0]["successful"] is expected
        core.events(client_id)
        assert core.ask({"channel": "/meta/disconnect", "clientId": client_id})[0]["successful"]

    def test_a_refused_message_neither_renews_the_lease_nor_asks_the_application(self):
        asked = []
        core = CorePeer(max_rate=1, connect_timeout=100, message_acl=lambda session, message: asked.append(message))
        client_id = core.handshake()
        event = {"channel": "/a", "data": 1, "clientId": client_id}
        for _ in range(5):
            core.ask(event)
        asked.clear()
        core.clock.advance(0.5)
        lease = core.core.sessions[client_id].lease
        assert error_code(core.ask(event)[0]) == 429
        assert asked == [] and core.core.sessions[client_id].lease == lease

    def test_messages_without_a_session_are_counted_by_address(self):
        core = CorePeer(max_rate=1, anon_publish=True, client_max_connections=10, trusted_proxies=["10.0.0.9"])
        event = {"channel": "/a", "data": 1}
        for address in ("192.0.2.1", "2001:db8::1"):
            for expected in [True] * 5 + [False]:
                assert core.ask(event, address=address)[0]["successful"] is expected
        assert error_code(core.ask(event, address="2001:db8::2")[0]) == 429
        for _ in range(20):
            assert core.ask(event, address="10.0.0.9")[0]["successful"]

    def test_by_default_there_is_none(self, core):
        client_id = core.handshake()
        for _ in range(200):
            core.publish(client_id, "/a")

    # -- Unknown clients ---------------------------------------------------------------------
    # Behind a proxy without stickiness no session lasts: four clients once made 450 requests in 4 s.

    @staticmethod
    def intervals(core, count, **exchange):
        message = core.connect_message("unknown")
        return [core.ask(message, **exchange)[0]["advice"]["interval"] for _ in range(count)]

    def test_the_more_there_were_from_an_address_the_longer_they_pause(self):
        core = CorePeer(client_max_connections=10)
        assert self.intervals(core, 33) == [0] * 30 + [100, 200, 300]
        assert self.intervals(core, 1, address="10.0.0.2") == [0]
        assert self.intervals(core, 100)[-1] == 5000
        core.pass_time(61)
        assert self.intervals(core, 1) == [0]

    def test_only_connects_count(self):
        core = CorePeer(client_max_connections=10)
        for _ in range(50):
            reply, = core.ask({"channel": "/a", "data": 1, "clientId": "unknown"})
            assert reply["advice"] == ADVICE_HANDSHAKE
        assert self.intervals(core, 1) == [0]

    @for_each("options", [{}, {"client_max_connections": 10, "trusted_proxies": ["10.0.0.0/8"]}])
    def test_where_addresses_have_no_limits_nobody_pauses(self, options):
        assert set(self.intervals(CorePeer(**options), 50)) == {0}

    # -- Subscribe ---------------------------------------------------------------------------

    @for_each("subscription", ["/a", ["/a"], ["/a", "/b/*"], ["/a", "/a"], "/**", "/service/x", ["/service/x", "/a"]])
    def test_the_reply_repeats_the_subscription_as_it_came(self, core, subscription):
        """A list stays a list, a string a string; aiocometd crashes on a list where it sent a string."""
        client_id = core.handshake()
        for channel in ("/meta/subscribe", "/meta/unsubscribe"):
            assert core.ask({"channel": channel, "clientId": client_id, "subscription": subscription, "id": 1}) == [
                {"channel": channel, "successful": True, "subscription": subscription, "id": 1}]

    @for_each("bad", ["/meta/connect", "/*/b", "a", "", "/b/", "/b c", "/meta/**", 5, None, [], ["/c"], True])
    def test_a_list_with_a_refused_member_is_refused_as_a_whole(self, core, bad):
        """Nothing recorded, and the error names what is wrong."""
        client_id = core.handshake()
        for subscription in (["/a", bad], [bad, "/a"]):
            reply, = core.ask({"channel": "/meta/subscribe", "clientId": client_id, "subscription": subscription})
            assert error_code(reply) in (400, 403, 405) and reply["subscription"] == subscription
            if isinstance(bad, str):
                assert reply["error"].split(":")[1] == bad
        assert not core.core.sessions[client_id].subscriptions and not core.core.registry._subscribers
        assert not core.told_of("subscribe")

    @for_each("subscription", [None, 5, True, {}, {"/a": 1}, [], [5], [None], [["/a"]], 1.5])
    @for_each("channel", ["/meta/subscribe", "/meta/unsubscribe"])
    def test_a_subscription_of_another_type_is_malformed(self, core, channel, subscription):
        """The reply repeats it all the same."""
        reply, = core.ask({"channel": channel, "clientId": core.handshake(), "subscription": subscription, "id": 0})
        assert error_code(reply) == 400 and reply["subscription"] == subscription and reply["id"] == 0

    @for_each("pattern", ["/meta/connect", "/meta/*", "/meta/**", "/meta/a/b"])
    def test_meta_channels_cannot_be_subscribed(self, core, pattern):
        reply, = core.ask({"channel": "/meta/subscribe", "clientId": core.handshake(), "subscription": pattern})
        assert error_code(reply) == 403

    def test_a_service_channel_is_granted_and_not_recorded(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/service/echo", "/service/*", "/service/**")
        assert not core.core.sessions[client_id].subscriptions and not core.told_of("subscribe")

    def test_overlapping_and_repeated_subscriptions_deliver_one_copy(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/a/b", "/a/*", "/a/**", "/**", "/a/b")
        core.subscribe(client_id, "/a/b")
        core.core.publish("/a/b", 1)
        assert len(core.events(client_id)) == 1
        core.ask({"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": ["/a/b", "/a/*", "/a/**"]})
        core.core.publish("/a/b", 2)
        assert len(core.events(client_id)) == 1

    def test_a_subscription_is_effective_for_the_next_message(self, core):
        """Of the same request; and an unsubscription as well."""
        client_id = core.handshake()
        subscription = {"clientId": client_id, "subscription": "/a"}
        core.ask({"channel": "/a", "clientId": client_id, "data": 1}, {"channel": "/meta/subscribe", **subscription},
                 {"channel": "/a", "clientId": client_id, "data": 2}, {"channel": "/meta/unsubscribe", **subscription},
                 {"channel": "/a", "clientId": client_id, "data": 3})
        assert [event["data"] for event in core.events(client_id)] == [2]

    def test_what_was_queued_before_an_unsubscribe_still_comes(self, core):
        """An event goes to who is subscribed when it is published."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        core.ask({"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/a"})
        core.core.publish("/a", 2)
        assert [event["data"] for event in core.events(client_id)] == [1]

    @for_each("subscription", ["/b", "/a/*", "/**", ["/a", "/b"], ["/b", "/a"], "/A"])
    def test_unsubscribing_what_was_not_subscribed_fails(self, core, subscription):
        """As a whole; a wildcard is a subscription of its own."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        reply, = core.ask({"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": subscription,
                           "id": 1})
        assert error_code(reply) == 404 and reply["subscription"] == subscription
        assert core.core.sessions[client_id].subscriptions == {"/a"} and not core.told_of("unsubscribe")

    def test_unsubscribing_touches_nobody_else(self, core):
        first, second = core.handshake(), core.handshake()
        core.subscribe(first, "/a")
        core.subscribe(second, "/a")
        core.ask({"channel": "/meta/unsubscribe", "clientId": first, "subscription": "/a"})
        core.core.publish("/a", 1)
        assert core.events(first) == [] and len(core.events(second)) == 1

    def test_names_are_told_apart_by_case_and_are_never_prefixes(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/A", "/ab", "/a/b", "/meta", "/service", "/metaphor/x")
        for channel in ("/a", "/meta", "/service", "/metaphor/x"):
            core.publish(client_id, channel, channel)
        assert [event["data"] for event in core.events(client_id)] == ["/meta", "/service", "/metaphor/x"]

    # -- Publish -----------------------------------------------------------------------------

    def test_the_reply_is_channel_successful_and_id(self, core):
        """Data in it would make it an event for some clients."""
        client_id = core.handshake()
        assert core.ask({"channel": "/a/b", "clientId": client_id, "data": {"x": 1}, "ext": {"y": 2}, "id": "5"}) == [
            {"channel": "/a/b", "successful": True, "id": "5"}]

    def test_an_event_is_no_reply(self, core):
        """Trap: successful in an event makes clients take it for one."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a", id="5")
        event, = core.events(client_id)
        assert not {"successful", "id", "error", "advice", "clientId"} & set(event)

    def test_the_publisher_gets_its_own_event_if_subscribed(self, core):
        subscribed, other = core.handshake(), core.handshake()
        core.subscribe(subscribed, "/a")
        core.publish(subscribed, "/a", 1)
        core.publish(other, "/a", 2)
        assert [event["data"] for event in core.events(subscribed)] == [1, 2]
        assert core.events(other) == []

    @for_each(("channel", "code"), [
        ("/a/*", 405), ("/**", 405), ("/a b", 405), ("a", 405), ("/a/", 405), ("", 405), ("/\u00e4", 405),
        ("/a.b", 405),
        ("/meta/a", 404), ("/meta/connect/x", 404), ("/META/connect", None), ("/meta/*", 404), ("/service/*", 405)])
    def test_only_broadcast_channels_can_be_published_to(self, core, channel, code):
        """And nobody receives what is refused."""
        client_id = core.handshake()
        core.subscribe(client_id, "/**")
        reply, = core.ask({"channel": channel, "clientId": client_id, "data": 1})
        if code is None:
            assert reply["successful"]
        else:
            assert error_code(reply) == code and core.events(client_id) == []

    def test_publishing_needs_a_live_client(self, core):
        """Unless anon_publish says otherwise."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        for fields in ({}, {"clientId": None}, {"clientId": "nobody"}, {"clientId": ""}, {"clientId": 0},
                       {"clientId": False}):
            reply, = core.ask({"channel": "/a", "data": 1, **fields})
            assert error_code(reply) in (400, 401, 402)
        assert core.events(client_id) == [] and not core.told_of("publish")

    def test_anonymous_publishing_can_be_allowed(self):
        """anon_publish; a null clientId is none, a wrong one is refused all the same."""
        core = CorePeer(anon_publish=True)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        replies = core.ask({"channel": "/a", "data": 1, "id": 1}, {"channel": "/a", "data": 2, "clientId": None},
                           {"channel": "/a", "data": 3, "clientId": "nobody"},
                           {"channel": "/a", "data": 4, "clientId": 0},
                           {"channel": "/a"}, {"channel": "/a/*", "data": 5}, {"channel": "/meta/a", "data": 6})
        assert replies[0] == {"channel": "/a", "successful": True, "id": 1} and replies[1]["successful"]
        assert [error_code(reply) for reply in replies[2:]] == [402, 400, 400, 405, 404]
        assert core.events(client_id) == [{"channel": "/a", "data": 1}, {"channel": "/a", "data": 2}]
        assert core.told_of("publish") == [{"channel": "/a", "data": 1, "id": 1}, {"channel": "/a", "data": 2}]

    @for_each("message", [{"channel": "/meta/connect", "connectionType": "long-polling"},
                          {"channel": "/meta/disconnect"},
                          {"channel": "/meta/subscribe", "subscription": "/a"},
                          {"channel": "/meta/unsubscribe", "subscription": "/a"}])
    def test_anonymous_publishing_opens_nothing_else(self, message):
        """anon_publish"""
        core = CorePeer(anon_publish=True)
        assert error_code(core.ask(message)[0]) == error_code(core.ask({**message, "clientId": None})[0]) == 401

    def test_events_of_one_publisher_keep_their_order(self, core):
        """Within a batch, over batches, and over connects."""
        publisher, subscriber = core.handshake(), core.handshake()
        core.subscribe(subscriber, "/**")
        received = []
        for number in range(0, 100, 5):
            core.ask(*[{"channel": f"/c{each % 3}", "clientId": publisher, "data": each}
                       for each in range(number, number + 5)])
            if number % 15 == 0:
                received += core.events(subscriber)
        received += core.events(subscriber)
        assert [event["data"] for event in received] == list(range(100))

    def test_a_published_event_is_queued_by_the_time_of_the_reply(self, core):
        """Who was told that it is published may rely on it."""
        publisher, subscriber = core.handshake(), core.handshake()
        core.subscribe(subscriber, "/a")
        core.publish(publisher, "/a", 1)
        assert [event["data"] for event in core.events(subscriber)] == [1]

    def test_everybody_at_once(self, core):
        """Subscribing, publishing, connecting and leaving from eight threads; each publisher's order is kept."""
        subscriber = core.handshake()
        core.subscribe(subscriber, "/a")
        received, finished = [], threading.Event()
        publishers = [core.handshake() for _ in range(3)]

        def publish(publisher):
            for number in range(100):
                core.ask({"channel": "/a", "clientId": publisher, "data": [publisher, number]})

        def come_and_go():
            for _ in range(60):
                client_id = core.handshake()
                core.subscribe(client_id, "/a", "/b")
                core.events(client_id)
                core.ask({"channel": "/meta/disconnect", "clientId": client_id})

        def fetch():
            while not finished.is_set():
                received.extend(core.events(subscriber))

        def publish_all():
            try:
                at_once(*[lambda publisher=publisher: publish(publisher) for publisher in publishers], come_and_go,
                        come_and_go)
            finally:
                finished.set()

        at_once(publish_all, fetch)
        received += core.events(subscriber)
        assert all("data" in event for event in received)
        for publisher in publishers:
            assert [event["data"][1] for event in received if event["data"][0] == publisher] == list(range(100))
        assert set(core.core.registry._subscribers) == {"/a"}

    # -- Postponed replies -------------------------------------------------------------------
    # A thread that reads more before it sleeps lets the reply to a publish wait for what else has come.

    @pytest.fixture
    def jobs(self, core):
        """What the core wants to have done after the next look."""
        jobs = []
        core.core._after_next_look = lambda job: jobs.append(job) or True
        return jobs

    @pytest.fixture
    def publisher(self, core):
        return core.handshake()

    @staticmethod
    def event(client_id, **fields):
        return {"channel": "/a", "clientId": client_id, "data": 1, **fields}

    def test_the_reply_leaves_after_the_next_look(self, core, jobs, publisher):
        exchange = core.send(self.event(publisher, id="1"))
        assert exchange.answer is None
        job, = jobs
        job()
        assert exchange.answer == [{"channel": "/a", "successful": True, "id": "1"}]

    def test_the_event_does_not_wait(self, core, jobs, publisher):
        subscriber = core.handshake()
        core.subscribe(subscriber, "/a")
        held = core.hold(subscriber)
        exchange = core.send(self.event(publisher))
        core.work()
        assert held.answer[1]["data"] == 1 and exchange.answer is None

    def test_each_look_brings_one_of_them_in_order(self, core, jobs, publisher):
        first, second = core.send(self.event(publisher)), core.send(self.event(publisher))
        jobs.pop()()
        assert first.answer and second.answer is None
        jobs.pop()()
        assert second.answer

    def test_no_answer_overtakes_it(self, core, jobs, publisher):
        """CometD's client gives up all that is open once it has its reply to a disconnect."""
        order = []

        class Ordered(FakeExchange):
            def send(self, answer):
                order.append(json.loads(answer.batch())[0]["channel"])
                return super().send(answer)

        for message in self.event(publisher), {"channel": "/meta/disconnect", "clientId": publisher}:
            core.core.receive([message], Ordered(core.core))
        assert order == ["/a", "/meta/disconnect"]
        for job in jobs:
            job()                               # there is nothing left to do, and it does nothing
        assert len(order) == 2

    @for_each("message", [
        {"channel": "/meta/ping"}, {"channel": "/meta/subscribe", "subscription": "/b"},
        {"channel": "/service/none"}, {"channel": "/a"},
        {"channel": "/meta/connect", "connectionType": "long-polling", "advice": {"timeout": 0}}])
    def test_only_publishes_wait(self, core, jobs, publisher, message):
        """/a without data is refused, and whoever is refused hears it at once."""
        core.core.services["none"] = lambda *arguments: None
        assert core.send({**message, "clientId": publisher}).answer
        assert core.send(self.event(publisher), {**message, "clientId": publisher}).answer
        assert not jobs

    def test_on_a_stream_it_does_not_wait(self, core, jobs, publisher):
        """Its subscribers need not come back for an event."""
        exchange = FakeExchange(core.core)
        exchange.stream = FakeStream()
        core.core.receive([self.event(publisher)], exchange)
        assert exchange.answer and not jobs

    def test_it_does_not_wait_for_many(self, core, jobs, publisher):
        """Who publishes to thousands is told before they are."""
        for _ in range(bayeux_server.FEW_ANSWERS + 1):
            client_id = core.handshake()
            core.subscribe(client_id, "/a")
            core.hold(client_id)
        assert core.send(self.event(publisher)).answer and not jobs

    def test_a_thread_that_does_not_lead_answers_at_once(self, server):
        assert server.watch.after_next_look(pytest.fail) is False

    def test_it_comes_though_nothing_else_does(self, server):
        with Peer(server) as peer:
            for number in range(3):
                reply, = peer.side.post(self.event(peer.id, id=number))
                assert reply == {"channel": "/a", "successful": True, "id": number}

    def test_it_comes_where_the_client_says_no_more(self, server):
        """A half-closed connection, as nc -N leaves it."""
        with Peer(server) as peer:
            with server.core.lock:              # all is there before the event is handled
                peer.side.send(whole_post(self.event(peer.id, id=1)))
                peer.side.socket.shutdown(socket.SHUT_WR)
            assert peer.side.read_answer().batch[0]["id"] == 1

    def test_while_it_waits_it_is_no_open_request(self, serve):
        """Thirty windows of one address may publish in the same moment."""
        server = serve(client_max_connections=2)
        with Peer(server) as peer:
            wires = [Wire(server) for _ in range(30)]
            for wire in wires:
                wire.post(PING)
            with server.core.lock:
                for wire in wires:
                    wire.send(whole_post(self.event(peer.id)))
            for wire in wires:
                assert wire.read_answer().batch[0]["successful"] is True
                wire.close()

    def test_it_comes_where_the_connection_has_more_to_say(self, server):
        """Pipelined: what stands behind it is read when it has left."""
        with Peer(server) as peer:
            peer.side.send(whole_post(self.event(peer.id, id=1)) + whole_post(self.event(peer.id, id=2))
                           + whole_post({**PING, "id": 3}))
            assert [peer.side.read_answer().batch[0]["id"] for _ in range(3)] == [1, 2, 3]

    # -- Publishing costs --------------------------------------------------------------------

    class Crowd(dict):
        """Sessions that may be looked up, but not gone through."""

        def __iter__(self):
            raise AssertionError("everybody is asked")

        keys = values = items = __iter__

    def test_publishing_asks_nobody_but_its_subscribers(self, core):
        """The original went through all clients for each publish."""
        publisher, subscriber, other = core.handshake(), core.handshake(), core.handshake()
        core.subscribe(subscriber, "/a/*")
        core.subscribe(other, "/b/*")
        sessions, core.core.sessions = core.core.sessions, self.Crowd(core.core.sessions)
        core.publish(publisher, "/a/b")
        core.core.publish("/a/c", "data")
        core.core.sessions = sessions
        assert [event["channel"] for event in core.events(subscriber)] == ["/a/b", "/a/c"]

    # -- Services ----------------------------------------------------------------------------

    @staticmethod
    def call_service(core, channel="/service/test", **fields):
        return core.ask({"channel": channel, "clientId": core.handshake(), "data": "question", "id": "7", **fields})

    @for_each("returned", [{"data": "answer"}, [{"data": "answer"}], ({"data": "answer"},),
                           {"only": {"data": "answer"}}.values()])
    def test_one_answer_is_the_only_reply(self, returned):
        """Channel, id and successful are filled in; no acknowledgement beside it."""
        assert self.call_service(CorePeer(services={"test": lambda message: returned})) == [
            {"channel": "/service/test", "id": "7", "successful": True, "data": "answer"}]

    @for_each("returned", [None, [], (), {}.values()])
    def test_no_answer_is_a_plain_reply(self, returned):
        assert self.call_service(CorePeer(services={"test": lambda message: returned})) == [
            {"channel": "/service/test", "id": "7", "successful": True}]

    def test_several_answers_all_come_back(self):
        """In order, in the same response."""
        core = CorePeer(services={"test": lambda message: [{"data": 1}, {"data": 2, "id": "other"}, {}]})
        replies = core.ask({"channel": "/service/test", "clientId": core.handshake(), "id": 0},
                           {"channel": "/meta/ping", "id": 1})
        assert [(reply["id"], reply.get("data")) for reply in replies] == [(0, 1), ("other", 2), (0, None), (1, None)]

    def test_what_the_service_filled_in_is_left_alone(self):
        """Channel and id are filled in where missing."""
        core = CorePeer(services={"test": lambda message: {
            "channel": "/service/other", "id": None, "successful": False, "error": "400::No", "ext": {"a": 1}}})
        assert self.call_service(core) == [
            {"channel": "/service/other", "id": None, "successful": False, "error": "400::No", "ext": {"a": 1}}]

    def test_a_call_without_an_id_is_answered_without_one(self):
        core = CorePeer(services={"test": lambda message: {"data": 1}})
        reply, = core.ask({"channel": "/service/test", "clientId": core.handshake()})
        assert reply == {"channel": "/service/test", "successful": True, "data": 1}

    def test_a_service_is_given_the_message(self):
        """Data is not required; what the service does to the message changes no reply."""
        seen = []

        def service(message):
            seen.append(dict(message))
            message.clear()

        core = CorePeer(services={"test": service})
        assert self.call_service(core, ext={"a": 1})[0] == {"channel": "/service/test", "id": "7", "successful": True}
        message, = seen
        assert message.pop("clientId") in core.core.sessions
        assert message == {"channel": "/service/test", "data": "question", "id": "7", "ext": {"a": 1}}

    def test_handler_answers_what_has_no_service(self):
        """Services, _handler"""
        core = CorePeer(services={"test": lambda message: {"data": "test"},
                                  "_handler": lambda message: {"data": "fallback " + message["channel"]}})
        assert self.call_service(core)[0]["data"] == "test"
        assert self.call_service(core, "/service/unheard/of")[0]["data"] == "fallback /service/unheard/of"

    def test_an_unknown_service_is_404(self, core):
        """The original answered an empty array."""
        reply, = self.call_service(core)
        assert error_code(reply) == 404 and reply["id"] == "7" and reply["channel"] == "/service/test"

    @for_each("service", [
        lambda message: 1 / 0, lambda message: "text", lambda message: 5, lambda message: [None],
        lambda message: [{"data": 1}, "x"],
        lambda message: {"data": object()}, lambda message: {"data": float("nan")}, lambda message: {"data": {1, 2}},
        lambda: None, lambda message: ({"data": 1 / number} for number in (1, 0)), lambda message: {"data": "\ud800"}])
    def test_a_service_that_fails_becomes_an_error_reply(self, service, errors):
        """Logged, and its neighbours harmed in nothing."""
        core = CorePeer(services={"test": service})
        client_id = core.handshake()
        replies = core.ask({"channel": "/meta/ping", "id": 1},
                           {"channel": "/service/test", "clientId": client_id, "id": 2},
                           {"channel": "/meta/ping", "id": 3})
        assert [reply["id"] for reply in replies] == [1, 2, 3]
        assert [reply["successful"] for reply in replies] == [True, False, True]
        assert error_code(replies[1]) == 500
        assert "ZeroDivision" not in replies[1]["error"]
        logged, = errors.take()
        assert "Traceback" in logged

    def test_a_service_may_refuse(self):
        """By a BayeuxError of its own choice, which is no failure."""
        def service(message):
            raise bayeux_server.BayeuxError(403, "bob", "Not you")
        reply, = self.call_service(CorePeer(services={"test": service}))
        assert reply["error"] == "403:bob:Not you" and reply["id"] == "7" and reply["successful"] is False

    def test_answers_go_to_the_sender_only(self):
        """Not to a subscriber of /**, nor to one of the service's channel."""
        core = CorePeer(services={"test": lambda message: {"data": "private"}})
        other = core.handshake()
        local = []
        LocalClient(core, "bot").subscribe("/**", local.append)
        core.subscribe(other, "/**", "/service/test", "/service/**")
        self.call_service(core)
        assert core.events(other) == [] and local == [] and not core.told_of("publish")

    def test_a_service_may_publish_and_push(self):
        """No lock is held while it runs; a session subscribed gets it with its next connect."""
        def service(message):
            core.core.publish("/news", message["data"])
            core.core.client_push(message["clientId"], "/for-you", "pushed")
            return {"data": "done"}
        core = CorePeer(services={"test": service})
        client_id = core.handshake()
        core.subscribe(client_id, "/news")
        assert len(core.ask({"channel": "/service/test", "clientId": client_id, "data": "x"})) == 1
        assert core.events(client_id) == [{"channel": "/news", "data": "x"}, {"channel": "/for-you", "data": "pushed"}]

    def test_services_are_registered_by_decorator_too(self, serve):
        """@server.service('echo')"""
        server = serve()

        @server.service("double")
        def double(message):
            return {"data": message["data"] * 2}

        assert double({"data": 2}) == {"data": 4}
        with Peer(server) as peer:
            assert peer.ask("/service/double", data=21, id="1")["data"] == 42

    # -- Access control ----------------------------------------------------------------------

    def test_every_message_is_asked_about(self):
        """message_acl; handshake, services and anonymous publishes included (the original forgot those)."""
        seen = []
        core = CorePeer(message_acl=lambda session, message: seen.append((session.id, message["channel"])),
                        anon_publish=True,
                        services={"x": lambda message: None})
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a")
        core.ask({"channel": "/service/x", "clientId": client_id}, {"channel": "/a", "data": 1},
                 {"channel": "/service/x"}, {"channel": "/meta/ping"},
                 {"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/a"},
                 {"channel": "/meta/disconnect", "clientId": client_id})
        assert seen == [(client_id, "/meta/handshake"), (client_id, "/meta/connect"), (client_id, "/meta/subscribe"),
                        (client_id, "/a"), (client_id, "/service/x"), (None, "/a"), (None, "/service/x"),
                        (None, "/meta/ping"),
                        (client_id, "/meta/unsubscribe"), (client_id, "/meta/disconnect")]

    @for_each("message", [
        {"channel": "/meta/connect", "connectionType": "long-polling"},
        {"channel": "/meta/subscribe", "subscription": ["/b"]},
        {"channel": "/meta/unsubscribe", "subscription": "/a"}, {"channel": "/meta/disconnect"},
        {"channel": "/a", "data": 1},
        {"channel": "/service/x"}, {"channel": "/meta/ping"}])
    def test_a_refused_message_has_no_effect(self, message):
        """message_acl"""
        called = []
        refused = set()
        core = CorePeer(message_acl=lambda session, asked: "Not you" if asked["channel"] in refused else None,
                        services={"x": called.append})
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        refused.add(message["channel"])
        told = len(core.told)
        reply, = core.ask({**message, "clientId": client_id, "id": 4})
        assert reply["error"] == f"403:{message['channel']}:Not you"
        assert reply["id"] == 4 and reply["successful"] is False
        core.work()
        assert held.answer is None and not called and len(core.told) == told
        assert core.core.sessions[client_id].subscriptions == {"/a"} and not core.core.sessions[client_id].queue

    def test_anonymous_publishes_and_service_calls_can_be_refused(self):
        """message_acl; who has no clientId has a session of this one message."""
        called = []

        def acl(session, message):
            return "Not you" if session.id is None and session.address != "10.0.0.7" else None

        core = CorePeer(anon_publish=True, services={"x": called.append}, message_acl=acl)
        watcher = core.handshake()
        core.subscribe(watcher, "/a")
        for message in ({"channel": "/a", "data": 1}, {"channel": "/a", "data": 1, "clientId": None},
                        {"channel": "/service/x"}):
            assert error_code(core.ask(message)[0]) == 403
        assert core.events(watcher) == [] and called == []
        assert core.ask({"channel": "/a", "data": 2}, address="10.0.0.7")[0]["successful"]
        assert len(core.events(watcher)) == 1

    def test_flags_remember_for_the_session(self):
        """Client.flags, from the handshake on, and for that session only."""
        def acl(session, message):
            if message["channel"] == "/meta/handshake":
                session.flags["user"] = message.get("ext", {}).get("user")
            elif message["channel"] == "/a" and session.flags["user"] != "bob":
                return "Only bob"
        core = CorePeer(message_acl=acl)
        bob, eve = core.handshake(ext={"user": "bob"}), core.handshake(ext={"user": "eve"})
        replies = core.ask({"channel": "/a", "clientId": bob, "data": 1}, {"channel": "/a", "clientId": eve, "data": 1})
        assert [reply["successful"] for reply in replies] == [True, False]

    @for_each(("text", "reconnect"),
              [("Go away", "none"), ("403::Go away", "none"), ("401:bob:Wrong password", "handshake")])
    def test_a_refused_handshake_makes_no_session(self, text, reconnect):
        """Another try is advised where other credentials would help."""
        core = CorePeer(message_acl=lambda session, message: text)
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0", "id": 1})
        assert error_code(reply) in (401, 403) and "clientId" not in reply and reply["id"] == 1
        assert reply["advice"]["reconnect"] == reconnect
        assert not core.core.sessions and not core.told

    @for_each("passes", [None, True, ""])
    def test_no_text_lets_pass(self, passes):
        """Refuses by an error text"""
        assert CorePeer(message_acl=lambda session, message: passes).handshake()

    @for_each("refuses", [False, 0, 5, [], {"a": 1}])
    def test_what_is_neither_text_nor_true_refuses(self, refuses):
        """A rule that answers something else is on the safe side."""
        core = CorePeer(message_acl=lambda session, message: refuses)
        assert error_code(core.ask({"channel": "/meta/handshake", "version": "1.0"})[0]) == 403

    def test_a_rule_that_fails_refuses(self, errors):
        """And its failure is logged, not told to the client."""
        core = CorePeer(message_acl=lambda session, message: message["password"])
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"})
        assert error_code(reply) == 403 and "password" not in reply["error"] and not core.core.sessions
        logged, = errors.take()
        assert "KeyError" in logged

    def test_a_rule_runs_without_the_lock(self):
        """It may publish, and ask the server what it likes."""
        def acl(session, message):
            assert not core.core.lock.locked()
            core.core.publish("/log", message["channel"])
        core = CorePeer(message_acl=acl)
        watcher = core.handshake()
        core.core.subscribe("/log", watcher)
        core.publish(watcher, "/a")
        assert [event["data"] for event in core.events(watcher)] == ["/a", "/meta/connect"]

    def test_a_rule_is_not_asked_for_who_is_unknown(self):
        """Those are told to handshake anyway."""
        seen = []
        core = CorePeer(message_acl=lambda session, message: seen.append(message))
        core.ask(core.connect_message("nobody"), {"channel": "/a", "data": 1}, {"channel": "/meta/nope"})
        assert seen == []

    def test_a_bound_session_works_only_with_its_cookie(self):
        """The core's part; another browser hears that there is no such session."""
        core = CorePeer(bind_sessions=True)
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"}, browser="mine")
        client_id = reply["clientId"]
        for browser in ("other", None):
            assert error_code(core.ask(core.connect_message(client_id), browser=browser)[0]) == 402
        assert core.ask(core.connect_message(client_id), browser="mine")[0]["successful"]

    # -- Disconnect --------------------------------------------------------------------------

    def test_a_disconnect_is_answered(self, core):
        client_id = core.handshake()
        assert core.ask({"channel": "/meta/disconnect", "clientId": client_id, "id": "9"}) == [
            {"channel": "/meta/disconnect", "successful": True, "id": "9"}]
        assert core.told_of("client_disconnect") == [{"client_id": client_id, "reason": "asked"}]

    def test_it_releases_the_held_connect(self, core):
        """With plain success: the client knows why, and the original's own dies of an advice here."""
        client_id = core.handshake()
        held = core.hold(client_id, id="c")
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        core.work()
        assert held.answer == [{"channel": "/meta/connect", "successful": True, "id": "c"}]

    @for_each("message", [
        {"channel": "/meta/connect", "connectionType": "long-polling"},
        {"channel": "/meta/subscribe", "subscription": "/a"},
        {"channel": "/meta/unsubscribe", "subscription": "/a"}, {"channel": "/meta/disconnect"},
        {"channel": "/a", "data": 1},
        {"channel": "/meta/ping"}])
    def test_later_messages_are_told_to_handshake(self, core, message):
        """A second disconnect too."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        reply, = core.ask({**message, "clientId": client_id})
        assert error_code(reply) == 402 and reply["advice"] == ADVICE_HANDSHAKE

    def test_later_messages_of_the_same_request_too(self, core):
        """A publish before it is heard, one behind it is not."""
        client_id, watcher = core.handshake(), core.handshake()
        core.subscribe(watcher, "/a")
        held = core.hold(client_id)
        replies = core.ask({"channel": "/a", "clientId": client_id, "data": 1},
                           {"channel": "/meta/disconnect", "clientId": client_id},
                           {"channel": "/a", "clientId": client_id, "data": 2})
        assert [reply["successful"] for reply in replies] == [True, True, False]
        assert error_code(replies[2]) == 402
        core.work()
        assert held.answer is not None and [event["data"] for event in core.events(watcher)] == [1]

    @for_each("is_connect_first", [True, False])
    def test_a_connect_of_the_same_request_is_not_left_hanging(self, core, is_connect_first):
        """It releases the older, and no event of the ended session leaves."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        older = core.hold(client_id, id="older")
        messages = [core.connect_message(client_id, id="c"),
                    {"channel": "/meta/disconnect", "clientId": client_id, "id": "d"}]
        publish = {"channel": "/a", "clientId": client_id, "data": 1, "id": "p"}
        replies = core.ask(publish, *(messages if is_connect_first else messages[::-1]))
        assert [reply["id"] for reply in replies] == ["p"] + (["c", "d"] if is_connect_first else ["d", "c"])
        assert all(reply["successful"] for reply in replies)
        core.work()
        assert len(older.answer) == 1 and not core.core.sessions

    @for_each("message", [{"channel": "/meta/connect", "connectionType": "long-polling"},
                          {"channel": "/meta/subscribe", "subscription": "/b"}])
    def test_a_session_may_end_while_its_message_is_looked_at(self, message):
        """By another request of it; then the message leaves nothing behind."""
        def acl(session, asked):
            if asked.get("id") == "meanwhile":
                core.ask({"channel": "/meta/disconnect", "clientId": session.id})

        core = CorePeer(message_acl=acl)
        client_id = core.handshake()
        reply, = core.ask({**message, "clientId": client_id, "id": "meanwhile"})
        assert error_code(reply) == 402 and reply["advice"] == ADVICE_HANDSHAKE and reply["id"] == "meanwhile"
        assert not core.core.registry._subscribers and not core.core.sessions

    @for_each("send", [lambda core, client_id: core.publish("/a", 1),
                       lambda core, client_id: core.client_push(client_id, "/b", 1)])
    def test_a_session_may_end_while_its_event_is_looked_at(self, send):
        """An extension takes its time; what it lets pass is thrown away."""
        class Ending:
            def outgoing(self, session, message):
                if "data" in message and session.id in core.core.sessions:
                    core.ask({"channel": "/meta/disconnect", "clientId": session.id})
                return message

        core = CorePeer(extensions=[Ending()])
        client_id = core.handshake()
        core.core.subscribe("/a", client_id)
        session = core.core.sessions[client_id]
        send(core.core, client_id)
        assert session.ended == "asked" and not session.queue

    def test_only_the_owner_of_the_id_can_disconnect(self, core):
        """An id is not to be learnt from events, errors or other replies."""
        victim, other = core.handshake(), core.handshake()
        core.subscribe(other, "/**")
        core.publish(victim, "/a", ext={"x": 1}, id="7")
        core.ask({"channel": "/a", "clientId": victim}, {"channel": "/a", "clientId": victim, "data": 1})
        assert victim not in json.dumps(core.events(other))

    # -- Extensions --------------------------------------------------------------------------

    def test_what_one_extension_drops_the_next_does_not_see(self):
        seen = []

        class Witness:
            def outgoing(self, session, message):
                seen.append(message)
                return message

        class Filter:
            def outgoing(self, session, message):
                return None if message.get("data") == "secret" else message

        core = CorePeer(extensions=[Witness(), Filter()])       # outwards the last comes first
        client_id = core.handshake()
        seen.clear()
        core.core.client_push(client_id, "/a", "secret")
        core.core.client_push(client_id, "/a", "open")
        assert [message["data"] for message in seen] == ["open"]

    def test_the_copy_that_an_extension_makes_for_each_session_counts_in_memory(self):
        class Copy:
            def outgoing(self, session, message):
                return {**message, "ext": {}}

        core = CorePeer(extensions=[Copy()])
        for _ in range(3):
            core.core.subscribe("/a", core.handshake())
        core.core.publish("/a", "x" * 1000)
        with core.core.lock:
            assert core.core.memory.used >= 3000

    # -- Comment filtering: how it is written stands with the HTTP transport -----------------
    @for_each("value", [True, 1, "true"])
    def test_a_session_may_ask_for_comments(self, core, value):
        """Every reply of it is filtered from then on, the handshake's and a held connect's included."""
        shake = core.send({"channel": "/meta/handshake", "version": "1.0", "ext": {"json-comment-filtered": value}})
        reply, = shake.answer
        assert shake.comment_filtered and reply["ext"] == {"json-comment-filtered": True}
        client_id = reply["clientId"]
        for message in (core.connect_message(client_id), {"channel": "/a", "clientId": client_id, "data": 1},
                        {"channel": "/a", "clientId": client_id}, core.connect_message(client_id),
                        {"channel": "/meta/disconnect", "clientId": client_id}):
            assert core.send(message).comment_filtered
        assert core.send({"channel": "/meta/ping"}, 5).comment_filtered is False

    def test_one_such_session_in_a_batch_is_enough(self, core):
        """Every reply of it."""
        plain = core.handshake()
        filtered = core.handshake(ext={"json-comment-filtered": True})
        publish = {"channel": "/a", "data": 1}
        assert core.send({**publish, "clientId": plain}, {**publish, "clientId": filtered}).comment_filtered
        assert not core.send({**publish, "clientId": plain}).comment_filtered

    @for_each("ext", [{}, None, 5] + [
        {"json-comment-filtered": value} for value in (False, 0, None, "", "false", [], {}, 2)])
    def test_who_does_not_ask_gets_plain_json(self, core, ext):
        exchange = core.send({"channel": "/meta/handshake", "version": "1.0", "ext": ext})
        assert not exchange.comment_filtered and not core.core.sessions[exchange.answer[0]["clientId"]].comment_filtered

    def test_comments_can_be_switched_off(self):
        """Then the reply does not promise them."""
        core = CorePeer(json_comment_filtered=False)
        exchange = core.send({"channel": "/meta/handshake", "version": "1.0", "ext": {"json-comment-filtered": True}})
        assert not exchange.comment_filtered and "ext" not in exchange.answer[0]

    # -- Time synchronisation ----------------------------------------------------------------

    @for_each("message", [
        {"channel": "/meta/handshake", "version": "1.0"},
        {"channel": "/meta/connect", "connectionType": "long-polling"},
        {"channel": "/meta/ping"}, {"channel": "/meta/subscribe", "subscription": "/a"},
        {"channel": "/meta/disconnect"},
        {"channel": "/meta/subscribe"}, {"channel": "/meta/unsubscribe", "subscription": "/nope"}])
    def test_timesync_is_answered_on_any_meta_message(self, core, message):
        """Tc, ts, p and a, all numbers, in a refusal too."""
        begin = time.time() * 1000
        reply, = core.ask({**message, "clientId": core.handshake(), "id": 1,
                           "ext": {"timesync": {"tc": 1234567890123, "l": 5, "o": -7}}},
                          may_hold=False)
        timesync = reply["ext"]["timesync"]
        assert set(timesync) == {"tc", "ts", "p", "a"} and timesync["tc"] == 1234567890123
        assert all(type(value) in (int, float) for value in timesync.values())
        assert begin - 1 <= timesync["ts"] <= time.time() * 1000 + 1 and timesync["p"] >= 0
        assert timesync["a"] == pytest.approx(1234567890123 + 5 - 7 - timesync["ts"], abs=1.5)

    def test_ping_needs_no_session(self, core):
        """The dojo client of 2008 asks there."""
        reply, = core.ask({"channel": "/meta/ping", "id": "0", "ext": {"timesync": {"tc": 1, "l": 0, "o": 0}}})
        assert reply["successful"] and reply["id"] == "0" and set(reply["ext"]["timesync"]) == {"tc", "ts", "p", "a"}
        assert not core.core.sessions

    def test_a_held_connect_says_how_long_it_was_held(self, core, monkeypatch):
        """P; and one without timesync keeps its reply plain."""
        now = [1_000_000.0]
        monkeypatch.setattr(bayeux_server.time, "time", lambda: now[0])
        client_id = core.handshake()
        held = core.hold(client_id, id=5, ext={"timesync": {"tc": 1_000_000_000, "l": 0, "o": 0}})
        now[0] += 12.5
        core.pass_time(30)
        assert held.answer == [{"channel": "/meta/connect", "successful": True, "id": 5,
                                "ext": {"timesync": {"tc": 1_000_000_000, "ts": 1_000_000_000, "p": 12_500, "a": 0}}}]

    def test_timesync_joins_what_else_is_in_ext(self, core):
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0",
                           "ext": {"json-comment-filtered": True, "timesync": {"tc": 1, "l": 2, "o": 3}}})
        assert set(reply["ext"]) == {"json-comment-filtered", "timesync"}

    @for_each("timesync", [None, 5, "x", [], {}, {"tc": None}, {"tc": "1"}, {"tc": True}, {"tc": []}, {"l": 1, "o": 1}])
    def test_a_timesync_without_a_time_is_ignored(self, core, timesync):
        reply, = core.ask({"channel": "/meta/ping", "ext": {"timesync": timesync}})
        assert reply == {"channel": "/meta/ping", "successful": True}

    @for_each("timesync", [
        {"tc": 1}, {"tc": 1, "l": "x", "o": None}, {"tc": -1.5, "l": [], "o": {}},
        {"tc": 1e308, "l": 1e308, "o": 1e308},
        {"tc": -1e308, "l": -1e308, "o": -1e308}, {"tc": 1, "l": 1e308, "o": 1e308},
        {"tc": 10**299, "l": 1.5, "o": 10**299}])
    @for_each("channel", ["/meta/ping", "/meta/nope"])
    def test_times_that_are_none_harm_nothing(self, core, timesync, channel):
        """One reply, and numbers if there are any."""
        reply, = core.ask({"channel": channel, "id": 1, "ext": {"timesync": timesync}})
        assert reply["id"] == 1 and reply["successful"] == (channel == "/meta/ping")
        assert all(type(value) in (int, float) for value in reply.get("ext", {}).get("timesync", {}).values())

    def test_times_that_are_none_do_not_stop_the_answers_to_held_connects(self, core):
        """The answer is made where the answers of all others leave."""
        hostile, other = core.handshake(), core.handshake()
        core.subscribe(hostile, "/a")
        core.subscribe(other, "/a")
        held = [core.hold(hostile, ext={"timesync": {"tc": 1e308, "l": 1e308, "o": 1e308}}), core.hold(other)]
        core.core.publish("/a", 1)
        core.work()
        assert [exchange.answer[1:] for exchange in held] == [[{"channel": "/a", "data": 1}]] * 2

    def test_timesync_can_be_switched_off(self):
        core = CorePeer(timesync=False)
        assert "ext" not in core.ask({"channel": "/meta/ping", "ext": {"timesync": {"tc": 1, "l": 0, "o": 0}}})[0]
        held = core.hold(core.handshake(), ext={"timesync": {"tc": 1, "l": 0, "o": 0}})
        core.pass_time(30)
        assert "ext" not in held.answer[0]

    # -- Timestamp ---------------------------------------------------------------------------

    @for_each("timestamp", ["2008-10-10T10:10:10", "", 5, None, [], {}])
    def test_a_timestamp_in_a_message_does_no_harm(self, core, timestamp):
        """Dojo's client sends one with every message; it is not passed on."""
        client_id = core.handshake(timestamp=timestamp)
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a", timestamp=timestamp)
        assert core.events(client_id) == [{"channel": "/a", "data": "data"}]

    def test_replies_and_events_carry_ours_if_asked_for(self, monkeypatch):
        """ISO 8601, GMT; a held connect's and a refusal too."""
        monkeypatch.setattr(bayeux_server, "time", types.SimpleNamespace(**{**vars(time), "time": lambda: 1223633410.5}))
        core = CorePeer(timestamp=True)
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        replies = core.ask({"channel": "/a", "clientId": client_id, "data": 1}, {"channel": "/meta/nope"})
        core.work()
        assert len(held.answer) == 2
        for message in [*replies, *held.answer]:
            assert message["timestamp"] == "2008-10-10T10:10:10.50"

    # -- The application's own ----------------------------------------------------------------

    class Recorder:
        """Notes its name in the messages that pass, in both directions."""

        def __init__(self, name):
            self.name = name
            self.sessions = []

        def note(self, message):
            trail = message.get("ext", {}).get("trail", "")
            return {**message, "ext": {**message.get("ext", {}), "trail": trail + self.name}}

        def incoming(self, session, message):
            self.sessions.append(session and session.id)
            return self.note(message)

        def outgoing(self, session, message):
            return self.note(message)

    def test_extensions_run_in_order_in_and_in_reverse_order_out(self):
        seen = []

        def service(message):
            seen.append(message["ext"]["trail"])

        core = CorePeer(extensions=[self.Recorder("a"), self.Recorder("b"), self.Recorder("c")],
                        services={"x": service})
        client_id = core.handshake()
        reply, = core.ask({"channel": "/service/x", "clientId": client_id})
        assert seen == ["abc"] and reply["ext"]["trail"] == "cba"

    def test_extensions_see_every_message_and_its_session(self):
        """None where there is none; held connects, events and pushes pass outwards too."""
        recorder = self.Recorder("x")
        core = CorePeer(extensions=[recorder])
        client_id = core.handshake()
        core.core.subscribe("/a", client_id)
        held = core.hold(client_id)
        core.core.publish("/a", 1)
        core.core.client_push(client_id, "/b", 2)
        core.work()
        assert [message["ext"]["trail"] for message in held.answer] == ["x", "x", "x"]
        reply, = core.ask({"channel": "/meta/nope"})
        assert reply["ext"]["trail"] == "x" and error_code(reply) == 404
        assert recorder.sessions == [None, client_id, client_id, None]

    def test_an_extension_may_have_one_direction_only(self):
        class In:
            def incoming(self, session, message):
                return {**message, "data": "in"} if "data" in message else message

        class Out:
            def outgoing(self, session, message):
                return {**message, "ext": "out"}

        core = CorePeer(extensions=[In(), Out()])
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a")
        assert core.events(client_id) == [{"channel": "/a", "data": "in", "ext": "out"}]

    def test_none_from_incoming_drops_the_message_and_tells_the_sender(self):
        """Exactly one reply, 403, with channel and id; no effect."""
        class Guard:
            def incoming(self, session, message):
                return None if message.get("data") == "rude" else message

        core = CorePeer(extensions=[Guard()])
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        replies = core.ask({"channel": "/a", "clientId": client_id, "data": "rude", "id": 1},
                           {"channel": "/a", "clientId": client_id, "data": "kind", "id": 2})
        assert error_code(replies[0]) == 403 and replies[0]["id"] == 1 and replies[0]["channel"] == "/a"
        assert replies[1]["successful"] and [event["data"] for event in core.events(client_id)] == ["kind"]

    def test_none_from_outgoing_drops_an_event_for_that_session_only(self):
        """A reply that is dropped is replaced, as every message gets one."""
        class Filter:
            def outgoing(self, session, message):
                is_dropped = message.get("data") == "secret" and session.id != friend or message.get("id") == "drop"
                return None if is_dropped else message

        core = CorePeer(extensions=[Filter()])
        friend, stranger = core.handshake(), core.handshake()
        core.core.subscribe("/a", friend)
        core.core.subscribe("/a", stranger)
        core.publish(friend, "/a", "secret")
        core.core.client_push(stranger, "/a", "secret")
        core.core.publish("/a", "open")
        assert [event["data"] for event in core.events(friend)] == ["secret", "open"]
        assert [event["data"] for event in core.events(stranger)] == ["open"]
        reply, = core.ask({"channel": "/meta/ping", "id": "drop"})
        assert error_code(reply) == 403

    def test_extensions_may_change_events_for_one_session(self):
        """Nobody else's copy is touched, nor the local clients'."""
        class Shout:
            def outgoing(self, session, message):
                if "data" in message and session.id == loud:
                    message["data"]["text"] = message["data"]["text"].upper()
                return message

        core = CorePeer(extensions=[Shout()])
        loud, quiet = core.handshake(), core.handshake()
        heard = []
        LocalClient(core, "bot").subscribe("/a", heard.append)
        for client_id in (loud, quiet):
            core.core.subscribe("/a", client_id)
        core.publish(quiet, "/a", {"text": "hello"})
        assert core.events(loud)[0]["data"]["text"] == "HELLO"
        assert core.events(quiet)[0]["data"]["text"] == heard[0]["data"]["text"] == "hello"

    def test_an_extension_may_change_a_push_and_not_its_callers_data(self):
        """Nor what listeners are told."""
        class Shout:
            def outgoing(self, session, message):
                if "data" in message:
                    message["data"]["text"] = message["data"]["text"].upper()
                return message

        core = CorePeer(extensions=[Shout()])
        client_id = core.handshake()
        data = {"text": "hello"}
        core.core.client_push(client_id, "/a", data)
        assert core.events(client_id) == [{"channel": "/a", "data": {"text": "HELLO"}}]
        assert data == {"text": "hello"} and core.told_of("client_push")[0]["data"] == {"text": "hello"}

    @for_each("fail", [lambda message: 1 / 0, lambda message: "text", lambda message: 5])
    def test_an_extension_that_fails_on_the_way_in_harms_no_neighbour(self, fail, errors):
        """Logged; the sender hears of a failure."""
        class Broken:
            def incoming(self, session, message):
                return fail(message) if message.get("id") == "bad" else message

        core = CorePeer(extensions=[Broken()])
        replies = core.ask({"channel": "/meta/ping", "id": 1}, {"channel": "/meta/ping", "id": "bad"},
                           {"channel": "/meta/ping", "id": 3})
        assert [reply["id"] for reply in replies] == [1, "bad", 3]
        assert [reply["successful"] for reply in replies] == [True, False, True]
        assert error_code(replies[1]) == 500 and len(errors.take()) == 1

    @for_each("channel", ["/meta/ping", "/meta/nope"])
    @for_each("fail", [lambda message: 1 / 0, lambda message: {**message, "x": object()},
                       lambda message: {**message, "x": float("nan")},
                       lambda message: {**message, "x": "\ud800"}])
    def test_an_extension_that_fails_on_a_reply_harms_no_neighbour(self, fail, channel, errors):
        """Nor on a refusal."""
        class Broken:
            def outgoing(self, session, message):
                return fail(message) if message.get("id") == "bad" else message

        core = CorePeer(extensions=[Broken()])
        replies = core.ask({"channel": "/meta/ping", "id": 1}, {"channel": channel, "id": "bad"},
                           {"channel": "/meta/ping", "id": 3})
        assert [reply.get("id") for reply in replies] == [1, "bad", 3]
        assert [reply["successful"] for reply in replies] == [True, False, True]
        assert error_code(replies[1]) >= 400 and len(errors.take()) == 1

    @for_each("fail", [lambda message: 1 / 0, lambda message: {"channel": "/a", "data": object()},
                       lambda message: {"data": 1}, lambda message: "text",
                       lambda message: {"channel": "/a", "data": "\ud800"}])
    def test_an_extension_that_fails_on_an_event_harms_no_other_subscriber(self, fail, errors):
        """Nor the publisher."""
        class Broken:
            def outgoing(self, session, message):
                return fail(message) if "data" in message and session.id == unlucky else message

        core = CorePeer(extensions=[Broken()])
        unlucky, lucky, publisher = core.handshake(), core.handshake(), core.handshake()
        core.core.subscribe("/a", unlucky)
        core.core.subscribe("/a", lucky)
        core.publish(publisher, "/a", 1)
        assert [event["data"] for event in core.events(lucky)] == [1]
        assert core.events(unlucky) == [] and len(errors.take()) == 1

    def test_an_extension_runs_without_the_lock(self):
        """It may ask the server what it likes."""
        class Curious:
            def incoming(self, session, message):
                assert not core.core.lock.locked()
                return message

            outgoing = incoming

        core = CorePeer(extensions=[Curious()])
        client_id = core.handshake()
        core.core.subscribe("/a", client_id)
        held = core.hold(client_id)
        core.core.publish("/a", 1)
        core.work()
        assert len(held.answer) == 2

    # -- Acknowledge -------------------------------------------------------------------------
    # Over everything.

    def test_what_was_acknowledged_is_not_counted(self, core):
        client_id = core.handshake(ext={"ack": True})
        core.subscribe(client_id, "/a")
        session, sizes = core.core.sessions[client_id], []
        for number in range(1, 4):
            core.core.publish("/a", "x" * 100)
            core.ask(core.connect_message(client_id, ext={"ack": number}, advice={"timeout": 0}))
            sizes.append(session.waiting_size)
        assert sizes == sizes[:1] * 3 and sizes[0] > 100
        core.ask(core.connect_message(client_id, ext={"ack": 4}, advice={"timeout": 0}))
        assert session.waiting_size == 0

    @pytest.fixture
    def acknowledging(self, medium):
        return lambda options=None, **fields: medium(**(options or {}))(**{"ext": {"ack": True}, **fields})

    def test_both_sides_say_so(self, acknowledging):
        assert acknowledging().handshake["ext"] == {"ack": True}

    @for_each("ext", [{}, {"ack": False}, {"ack": None}, {"ack": "true"}, [], "x"])
    def test_who_does_not_ask_gets_none(self, acknowledging, ext):
        client = acknowledging(ext=ext)
        assert "ext" not in client.handshake
        assert "ext" not in client.poll().reply

    def test_not_offered_when_switched_off(self, acknowledging):
        client = acknowledging({"ack": False})
        assert "ext" not in client.handshake
        assert "ext" not in client.poll().reply

    def test_batch_numbers_rise_from_1(self, acknowledging):
        client = acknowledging()
        assert [client.poll(number).ack for number in range(5)] == [1, 2, 3, 4, 5]

    @for_each("beginning", [-1, 0, None, ""])
    def test_a_client_may_begin_with_anything(self, acknowledging, beginning):
        client = acknowledging()
        batch = client.poll(beginning)
        assert (batch.ack, batch.data) == (1, [])
        client.ask("/meta/subscribe", subscription="/a")
        client.ask("/a", data="x")
        batch = client.poll(1)
        assert (batch.ack, batch.data) == (2, ["x"])
        assert client.poll(2).data == []

    def subscribe_with_ack(self, client):
        """A session past its first connect, subscribed to /a; the last number it has seen."""
        batch = client.poll(-1)
        assert client.ask("/meta/subscribe", subscription="/a")["successful"]
        return batch.ack

    def test_a_reply_takes_no_more_than_a_frame_may_hold(self, serve):
        """max_frame_events; the rest comes with the next one"""
        server = serve(max_frame_events=3)
        with SocketPeer(server, ext={"ack": True}) as peer:
            peer.subscribe("/a")
            for number in range(5):
                server.publish("/a", number)
            peer.send_connect(ack=1)
            assert [event["data"] for event in peer.read_batch()[1:]] == [0, 1, 2]
            peer.send_connect(ack=2)
            assert [event["data"] for event in peer.read_batch()[1:]] == [3, 4]

    def test_what_was_acknowledged_does_not_come_again(self, acknowledging):
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        for number in range(3):
            client.ask("/a", data=number)
            batch = client.poll(seen)
            assert batch.data == [number]
            seen = batch.ack
        assert client.poll(seen).data == []

    def test_a_held_connect_brings_events_and_its_number(self, acknowledging):
        """Over WebSocket, too, events leave with the reply to a connect, as soon as there are some."""
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        client.ask("/a", data="x")
        batch = client.connect(ack=seen)
        assert (batch.ack, batch.data) == (seen + 1, ["x"])

    def test_a_lost_reply_is_delivered_again_in_order_and_once(self, acknowledging):
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        client.ask("/a", data=1)
        client.ask("/a", data=2)
        assert client.poll(seen).data == [1, 2]        # this reply is lost, as the client sees it
        client.lose_connection()
        client.ask("/a", data=3)
        assert client.poll(seen).data == [1, 2, 3]     # and so is this one
        client.lose_connection()
        client.ask("/a", data=4)
        batch = client.poll(seen)
        assert batch.data == [1, 2, 3, 4]
        assert client.poll(batch.ack).data == []

    def test_only_what_is_newer_comes_again(self, acknowledging):
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        client.ask("/a", data=1)
        first = client.poll(seen)
        client.ask("/a", data=2)
        client.poll(first.ack)                          # lost
        client.ask("/a", data=3)
        assert client.poll(first.ack).data == [2, 3]

    def test_the_numbers_go_on_rising(self, acknowledging):
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        client.ask("/a", data=1)
        numbers = []
        for _ in range(3):
            batch = client.poll(seen)        # each is lost
            numbers.append(batch.ack)
            assert batch.data == [1]
        assert numbers == [seen + 1, seen + 2, seen + 3]
        assert client.poll(numbers[-1]).data == []

    @for_each("nonsense", [None, "3", [], {}, True, ""])
    def test_a_nonsensical_number_acknowledges_nothing(self, acknowledging, nonsense):
        client = acknowledging()
        seen = self.subscribe_with_ack(client)
        client.ask("/a", data=1)
        assert client.poll(seen).data == [1]
        assert client.poll(nonsense).data == [1]

    def test_bounded_by_max_queue(self, acknowledging):
        """What is not acknowledged counts among what waits."""
        client = acknowledging({"max_queue": 5})
        seen = self.subscribe_with_ack(client)
        for number in range(5):
            client.ask("/a", data=number)
            assert client.poll(seen).data == list(range(number + 1))
        client.ask("/a", data="one too many")
        batch = client.poll(seen)
        assert batch.reply["error"].startswith("402:")
        assert "queue overflow" in batch.reply["error"]

    def test_combined_with_timesync(self, acknowledging):
        client = acknowledging(ext={"ack": True, "timesync": {"tc": 5, "l": 0, "o": 0}})
        assert client.handshake["ext"]["ack"] is True
        assert client.handshake["ext"]["timesync"]["tc"] == 5
        for number in range(2):
            batch = client.poll(ext={"ack": number, "timesync": {"tc": 6, "l": 0, "o": 0}})
            assert batch.ack == number + 1
            assert batch.reply["ext"]["timesync"]["tc"] == 6

    def test_a_held_connect_combined_with_timesync(self, core):
        client_id = core.handshake(ext={"ack": True})
        exchange = core.hold(client_id, ext={"ack": 1, "timesync": {"tc": 6, "l": 0, "o": 0}})
        core.pass_time(30)
        reply, = exchange.answer
        assert reply["ext"]["ack"] == 2
        assert reply["ext"]["timesync"]["tc"] == 6

    def test_a_reply_that_could_not_be_written(self, core):
        client_id = core.handshake(ext={"ack": True})
        core.subscribe(client_id, "/a")
        lost = core.send(core.connect_message(client_id, ext={"ack": 1}), is_broken=True)
        core.core.publish("/a", 1)
        core.work()
        assert lost.answer is None
        core.core.publish("/a", 2)
        exchange = core.send(core.connect_message(client_id, ext={"ack": 1}))
        core.work()
        assert [event["data"] for event in exchange.answer[1:]] == [1, 2]

    def test_a_connect_that_releases_an_older_one(self, core):
        """The events go with the newer"""
        client_id = core.handshake(ext={"ack": True})
        core.subscribe(client_id, "/a")
        older = core.hold(client_id, ext={"ack": 1})
        newer = core.hold(client_id, ext={"ack": 1})
        core.core.publish("/a", 1)
        core.work()
        assert [older.answer[0]["ext"]["ack"], newer.answer[0]["ext"]["ack"]] == [2, 3]
        assert (older.answer[1:], newer.answer[1:]) == ([], [{"channel": "/a", "data": 1}])

    def test_it_survives_a_change_of_transport(self, serve):
        server = serve()
        client = Peer(server, connect=False, ext={"ack": True})
        seen = self.subscribe_with_ack(client)
        expected = []
        for turn in range(6):
            client.ask("/a", data=turn)
            expected.append(turn)
            batch = client.poll(seen)
            assert batch.data == expected
            client.close()                              # lost; and now over the other one
            kind = SocketPeer if isinstance(client, Peer) else Peer
            client = kind(server, client_id=client.id, connect=False)
            if turn == 3:                               # but this once it was seen
                seen, expected = batch.ack, []
        client.close()

    def test_events_over_a_socket_come_with_replies_only(self, server):
        with SocketPeer(server, ext={"ack": True}) as peer:
            peer.subscribe("/a")
            server.publish("/a", "x")
            peer.send_frame(PING_FRAME, b"nothing before this")
            assert peer.read_frame() == (PONG_FRAME, b"nothing before this")
            held = peer.send_connect(ack=1)
            connect, event = peer.read_batch()
            assert (connect["id"], event["data"]) == (held, "x")

    def test_a_held_connect_on_a_socket_that_hangs_up(self, server):
        with SocketPeer(server, ext={"ack": True}) as peer:
            peer.subscribe("/a")
            peer.hold(ack=1)
        server.publish("/a", "x")
        with SocketPeer(server, client_id=peer.id, connect=False) as again:
            assert again.connect(ack=1).data == ["x"]

    def test_without_it_nothing_is_kept(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.core.publish("/a", 1)
        assert len(core.events(client_id)) == 1
        session, = core.core.sessions.values()
        assert session.waiting == 0

    # -- Lazy --------------------------------------------------------------------------------
    # News that nobody waits for.

    @pytest.fixture
    def lazy(self):
        return CorePeer(lazy_channels=["/lazy/**", "/slow"], max_lazy=5)

    @pytest.fixture
    def client_id(self, lazy):
        client_id = lazy.handshake()
        lazy.subscribe(client_id, "/**")
        return client_id

    @for_each("channel", ["/lazy/a", "/lazy/a/b", "/slow"])
    def test_a_lazy_event_waits_for_max_lazy(self, lazy, client_id, channel):
        exchange = lazy.hold(client_id)
        lazy.core.publish(channel, 1)
        lazy.pass_time(4.9)
        assert exchange.answer is None
        lazy.pass_time(0.2)
        assert [event["data"] for event in exchange.answer[1:]] == [1]

    def test_max_lazy_counts_from_the_first(self, lazy, client_id):
        exchange = lazy.hold(client_id)
        lazy.core.publish("/slow", 1)
        lazy.pass_time(3)
        lazy.core.publish("/slow", 2)
        lazy.pass_time(2.1)
        assert [event["data"] for event in exchange.answer[1:]] == [1, 2]

    @for_each("channel", ["/lazy", "/lazier/a", "/slow/a"])
    def test_others_do_not_wait(self, lazy, client_id, channel):
        exchange = lazy.hold(client_id)
        lazy.core.publish(channel, 1)
        lazy.work()
        assert len(exchange.answer) == 2

    def test_another_event_takes_them_along_in_order(self, lazy, client_id):
        exchange = lazy.hold(client_id)
        lazy.core.publish("/slow", 1)
        lazy.work()
        lazy.core.publish("/a", 2)
        lazy.work()
        assert [event["data"] for event in exchange.answer[1:]] == [1, 2]

    def test_any_reply_to_a_connect_takes_them_along(self, lazy, client_id):
        exchange = lazy.hold(client_id, advice={"timeout": 3000})
        lazy.core.publish("/slow", 1)
        lazy.pass_time(3.1)
        assert [event["data"] for event in exchange.answer[1:]] == [1]
        lazy.core.publish("/slow", 2)
        assert [event["data"] for event in lazy.events(client_id)] == [2]

    def test_they_come_after_max_lazy_when_nobody_was_there_before(self, lazy, client_id):
        lazy.core.publish("/slow", 1)
        lazy.pass_time(60)
        exchange = lazy.send(lazy.connect_message(client_id))
        lazy.work()
        assert [event["data"] for event in exchange.answer[1:]] == [1]

    def test_the_next_one_waits_again(self, lazy, client_id):
        for number in range(3):
            exchange = lazy.hold(client_id)
            lazy.core.publish("/slow", number)
            lazy.pass_time(4)
            assert exchange.answer is None
            lazy.pass_time(1.1)
            assert [event["data"] for event in exchange.answer[1:]] == [number]

    def test_what_was_lost_waits_no_more(self, lazy, client_id):
        lazy.send(lazy.connect_message(client_id), is_broken=True)
        lazy.core.publish("/slow", 1)
        lazy.pass_time(5.1)
        exchange = lazy.send(lazy.connect_message(client_id))
        lazy.work()
        assert [event["data"] for event in exchange.answer[1:]] == [1]

    def test_with_acknowledgement(self, lazy):
        client_id = lazy.handshake(ext={"ack": True})
        lazy.subscribe(client_id, "/slow")
        exchange = lazy.hold(client_id, ext={"ack": 1})
        lazy.core.publish("/slow", 1)
        lazy.work()
        assert exchange.answer is None
        lazy.pass_time(5.1)
        assert [event["data"] for event in exchange.answer[1:]] == [1]

    def test_on_a_stream_too(self, lazy, client_id):
        stream = FakeStream()
        lazy.core.attach(client_id, stream)
        lazy.core.publish("/slow", 1)
        lazy.pass_time(4)
        assert stream.data == []
        lazy.pass_time(1.1)
        assert stream.data == [[1]]

    def test_on_a_stream_with_a_frame_in_flight(self, lazy, client_id):
        stream = FakeStream()
        lazy.core.attach(client_id, stream)
        lazy.core.publish("/a", 1)
        with lazy.core.condition:
            answer, = lazy.core.take_answers(10)
        lazy.core.publish("/slow", 2)
        lazy.core.settle_later(answer, True)
        lazy.pass_time(5.1)
        assert stream.data == [[2]]

    def test_on_a_stream_that_is_opened_while_they_wait(self, lazy, client_id):
        lazy.core.publish("/slow", 1)
        lazy.pass_time(1)
        stream = FakeStream()
        lazy.core.attach(client_id, stream)
        lazy.pass_time(4.1)
        assert stream.data == [[1]]

    def test_a_local_client_does_not_wait(self, serve):
        server, heard = serve(lazy_channels=["/slow"]), threading.Event()
        with LocalClient(server) as local:
            local.subscribe("/slow", lambda message: heard.set())
            server.publish("/slow", 1)
            assert heard.wait(PATIENCE)

    def test_over_a_socket(self, serve):
        server = serve(lazy_channels=["/slow"], max_lazy=0.05)
        with SocketPeer(server) as peer:
            peer.subscribe("/slow")
            for number in range(3):
                server.publish("/slow", number)
            assert peer.receive(3) == [0, 1, 2]

    # -- Activity ----------------------------------------------------------------------------
    # A page that was left open only sends heart-beats.

    @pytest.fixture
    def quiet(self):
        return CorePeer(max_inactivity=100)

    @staticmethod
    def beat(quiet, client_id):
        quiet.clock.advance(30)
        return quiet.ask(quiet.connect_message(client_id, advice={"timeout": 0}))[0]

    def test_heart_beats_alone_do_not_keep_a_session(self, quiet):
        client_id = quiet.handshake()
        replies = [self.beat(quiet, client_id) for _ in range(4)]
        assert [reply["successful"] for reply in replies] == [True, True, True, False]
        assert replies[-1]["error"].startswith("402:")
        assert "inactivity" in replies[-1]["error"]
        assert replies[-1]["advice"]["reconnect"] == "none"
        assert client_id not in quiet.core.sessions
        quiet.work()
        assert quiet.told_of("client_disconnect")[0]["reason"] == "inactivity"

    @for_each("message", [
        {"channel": "/a", "data": 1}, {"channel": "/service/echo", "data": 1},
        {"channel": "/meta/subscribe", "subscription": "/a"}])
    def test_anything_else_does(self, quiet, message):
        client_id = quiet.handshake()
        for _ in range(6):
            assert self.beat(quiet, client_id)["successful"]
            quiet.ask({"clientId": client_id, **message})

    def test_what_it_receives_is_no_activity_of_its_own(self, quiet):
        client_id = quiet.handshake()
        quiet.subscribe(client_id, "/a")
        for _ in range(3):
            quiet.core.publish("/a", 1)
            assert self.beat(quiet, client_id)["successful"]
        assert not self.beat(quiet, client_id)["successful"]

    def test_off_unless_asked_for(self):
        quiet = CorePeer()
        client_id = quiet.handshake()
        assert all(self.beat(quiet, client_id)["successful"] for _ in range(200))

    def test_a_new_handshake_is_welcome(self, quiet):
        client_id = quiet.handshake()
        while self.beat(quiet, client_id)["successful"]:
            pass
        assert quiet.handshake() != client_id

    def test_a_socket_stays_open(self, serve):
        server = serve(max_inactivity=100)
        with SocketPeer(server) as peer:
            session_of(server, peer.id).active -= 101
            assert "inactivity" in peer.poll().reply["error"]
            peer.id = None
            assert peer.ask("/meta/handshake", version="1.0")["successful"]

    # -- Stream ------------------------------------------------------------------------------
    # What the core does with a connection on which events leave at any time, without a network.

    def begin_on_stream(self, core, stream):
        """A session whose events go to the stream; its id."""
        client_id = core.handshake(connect=False)
        core.subscribe(client_id, "/a", "/lazy/a")
        assert core.core.attach(client_id, stream)
        return client_id

    def test_the_events_of_a_lost_frame_come_first_again(self, core):
        stream = FakeStream()
        client_id = self.begin_on_stream(core, stream)
        stream.outcome = False
        core.core.publish("/a", 1)
        with core.core.condition:
            answer, = core.core.take_answers(10)
        core.core.publish("/a", 2)
        core.core.detach(stream)
        core.core.settle_later(answer, False)
        assert [event["data"] for event in core.events(client_id)] == [1, 2]

    def test_nothing_leaves_while_a_frame_is_in_flight(self, core):
        stream = FakeStream()
        self.begin_on_stream(core, stream)
        core.core.publish("/a", 1)
        with core.core.condition:
            answer, = core.core.take_answers(10)
        core.core.publish("/a", 2)
        core.core.publish("/a", 3)
        core.work()
        assert stream.batches == []
        core.core.settle_later(answer, True)
        core.work()
        assert stream.data == [[2, 3]]

    def test_a_lazy_event_behind_a_frame_in_flight_waits_for_max_lazy(self):
        """And not for the end of the connect that is held on the stream, which is later."""
        core, stream = CorePeer(lazy_channels=["/lazy/a"], max_lazy=5, timeout=30), FakeStream()
        client_id = self.begin_on_stream(core, stream)
        for _ in range(2):                      # the first connect is never held
            exchange = FakeExchange(core.core, transport="websocket")
            exchange.stream = stream
            core.core.receive([core.connect_message(client_id, connectionType="websocket")], exchange)
        core.core.publish("/a", 1)
        with core.core.condition:
            answer, = core.core.take_answers(10)
        core.core.publish("/lazy/a", 2)
        core.core.settle_later(answer, True)
        core.pass_time(4.9)
        assert stream.data == []
        core.pass_time(0.2)
        assert stream.data == [[2]] and exchange.answer is None

    def test_a_session_ends_in_time_though_a_frame_was_long_in_flight(self, core):
        """Meanwhile it was not looked at."""
        client_id = self.begin_on_stream(core, FakeStream())
        core.core.publish("/a", 1)
        with core.core.condition:
            answer, = core.core.take_answers(10)
        core.pass_time(core.core.options.connect_timeout + 1)
        assert client_id in core.core.sessions
        core.core.settle_later(answer, True)
        core.work()
        assert client_id not in core.core.sessions

    def test_one_frame_at_a_time_though_the_session_stands_in_line(self, core):
        """A connect that was answered at once took what was to leave, and more has come since."""
        stream = FakeStream()
        client_id = self.begin_on_stream(core, stream)
        session = core.core.sessions[client_id]
        core.core.publish("/a", 1)
        with core.core.lock:
            assert session.is_ready
            taken = bayeux_server.Answer(stream, [], session, core.core._take_events(session, stream))
        core.core.publish("/a", 2)
        core.work()
        assert stream.data == [] and session.queue
        core.core.settle_later(taken, True)
        core.work()
        assert stream.data == [[2]]

    @for_each("change", ["the stream is lost", "another connect releases the held one"])
    def test_a_lease_that_began_while_a_frame_was_in_flight_ends_in_time(self, change):
        """The look at the session stood at the end of its held connect, which is later."""
        core, stream = CorePeer(connect_timeout=5, timeout=30), FakeStream()
        client_id = self.begin_on_stream(core, stream)

        def connect(**fields):
            exchange = FakeExchange(core.core, transport="websocket")
            exchange.stream = stream
            core.core.receive([core.connect_message(client_id, connectionType="websocket", **fields)], exchange)

        connect()
        connect()
        assert core.core.sessions[client_id].hold
        core.pass_time(6)
        core.core.publish("/a", 1)
        with core.core.condition:
            answers = core.core.take_answers(10)
        if change == "the stream is lost":
            core.core.detach(stream)
        else:
            connect(advice={"timeout": 0})
            core.work()
        for fate in core.core.send(answers):
            core.core.settle_later(*fate)
        core.work()
        core.pass_time(4.9)
        assert client_id in core.core.sessions
        core.pass_time(0.2)
        assert client_id not in core.core.sessions

    def test_a_connect_over_another_transport_takes_the_events_away(self, core):
        stream = FakeStream()
        client_id = self.begin_on_stream(core, stream)
        core.core.publish("/a", 1)
        core.work()
        assert [event["data"] for event in core.events(client_id)] == []
        core.core.publish("/a", 2)
        core.work()
        assert stream.data == [[1]]
        assert [event["data"] for event in core.events(client_id)] == [2]

    def test_an_unknown_session_cannot_be_attached_to(self, core):
        assert core.core.attach("nobody", FakeStream()) is False

    # -- Steady traffic ----------------------------------------------------------------------

    def test_events_on_a_stream_do_not_keep_a_connect_from_its_answer(self, core):
        """The next event is always there before the last is settled."""
        client_id, stream = core.handshake(), FakeStream()
        core.subscribe(client_id, "/a")
        held = FakeExchange(core.core, transport="websocket")
        held.stream = stream
        core.core.receive([core.connect_message(client_id, connectionType="websocket")], held)
        core.core.publish("/a", "event")
        core.clock.advance(default_of(option_fields()["timeout"]))
        for _ in range(5):
            with core.core.condition:
                answers = core.core.take_answers(100)
            core.core.publish("/a", "event")
            for fate in core.core.send(answers):
                core.core.settle_later(*fate)
        assert held.answer == [{"channel": "/meta/connect", "successful": True}]
        assert len(stream.data) >= 4

    # -- The last ofa stream -----------------------------------------------------------------

    def test_it_ends_behind_what_its_reader_has_not_taken_in_yet(self, server):
        """Nothing is cut off, and the end is a clean one."""
        large = "x" * 4_000_000                 # more than the system keeps, once it is told to keep little
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            peer.subscribe("/a")
            for connection in list(server.watch.connections):
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
            server.publish("/a", large)
            wait_until(lambda: has_unsent_output(server))
            assert peer.ask("/meta/disconnect")["successful"]
            wait_until(lambda: any(each.is_closing for each in list(server.watch.connections)), "the stream's end")
            assert stream.receive(1) == [large]
            assert stream.read_batch() is None

    def test_events_published_before_the_end_of_the_server_leave(self, core):
        """There is no held connect whose last reply could take them."""
        client_id, stream = core.handshake(), FakeStream()
        assert core.core.attach(client_id, stream)
        core.subscribe(client_id, "/a")
        core.core.publish("/a", "going down")
        core.core.stop()
        core.work()
        assert ["going down"] in stream.data

    def test_an_older_stream_of_the_session_ends(self, server):
        """Nothing would come on it any more, and it would count among the open requests."""
        with Peer(server) as peer, EventWire(server, peer.id) as older, EventWire(server, peer.id) as newer:
            assert older.read_batch() is None
            peer.subscribe("/a")
            peer.publish("/a", "event")
            assert newer.receive(1) == ["event"]

    # -- Listeners ---------------------------------------------------------------------------

    def test_two_threads_that_add_listeners_lose_none(self, core):
        core.core._listeners = Guarded(core.core._listeners, core.core.lock)
        core.core.add_listener(any_function)
        assert any_function in core.core._listeners["publish"]

    def test_all_six_events_with_their_details(self, core):
        """Callback"""
        reply, = core.ask({"channel": "/meta/handshake", "version": "1.0"}, address="10.1.2.3")
        client_id = reply["clientId"]
        subscription = {"clientId": client_id, "subscription": ["/a", "/b/*"]}
        core.ask({"channel": "/meta/subscribe", **subscription},
                 {"channel": "/a", "clientId": client_id, "data": {"x": 1}, "id": "5", "ext": {"y": 2}},
                 {"channel": "/meta/unsubscribe", **subscription})
        core.core.publish("/a", "data")
        core.core.client_push(client_id, "/c", "pushed", priority=1)
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        assert core.told == [
            ("client_connect", {"client_id": client_id, "ip": "10.1.2.3"}),
            ("subscribe", {"client_id": client_id, "channel": "/a"}),
            ("subscribe", {"client_id": client_id, "channel": "/b/*"}),
            ("publish", {"channel": "/a", "data": {"x": 1}, "client_id": client_id, "id": "5", "ext": {"y": 2}}),
            ("unsubscribe", {"client_id": client_id, "channel": "/a"}),
            ("unsubscribe", {"client_id": client_id, "channel": "/b/*"}),
            ("publish", {"channel": "/a", "data": "data"}),
            ("client_push", {"client_id": client_id, "channel": "/c", "data": "pushed", "priority": 1}),
            ("client_disconnect", {"client_id": client_id, "reason": "asked"})]

    def test_local_clients_are_told_of_too(self, core):
        """Session instead of ip, and the id of what they publish."""
        client = LocalClient(core, "bot")
        client.subscribe("/a")
        client.publish("/a", 1, id=0, ext={})
        client.unsubscribe("/a")
        client.close()
        assert core.told == [
            ("client_connect", {"client_id": "bot", "session": client}),
            ("subscribe", {"client_id": "bot", "channel": "/a"}),
            ("publish", {"channel": "/a", "data": 1, "client_id": "bot", "id": 0, "ext": {}}),
            ("unsubscribe", {"client_id": "bot", "channel": "/a"}),
            ("client_disconnect", {"client_id": "bot", "reason": "asked"})]

    @for_each("data", [None, False, 0, ""])
    def test_a_publish_is_told_with_its_data_whatever_it_is(self, core, data):
        """Null is data too; a listener may rely on details["data"]."""
        core.publish(core.handshake(), "/a", data)
        core.core.publish("/a", data)
        assert [details["data"] for details in core.told_of("publish")] == [data, data]

    def test_repeated_subscriptions_and_refusals_are_not_told(self, core):
        """Callback"""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.subscribe(client_id, "/a", "/a")
        core.ask({"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/*/a"},
                 {"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/b"},
                 {"channel": "/a", "data": 1},
                 {"channel": "/meta/disconnect", "clientId": "nobody"},
                 {"channel": "/service/x", "clientId": client_id})
        assert [event for event, _ in core.told] == ["client_connect", "subscribe"]

    def test_the_option_and_added_listeners_are_all_told_in_order(self):
        """Callback, server.add_listener"""
        told = []
        core = CorePeer(callback=lambda event, details: told.append(("callback", event)))
        core.core.add_listener(lambda event, details: told.append(("second", event)))
        core.handshake()
        assert told == [("callback", "client_connect"), ("second", "client_connect")]

    def test_a_listener_may_want_some_events_only(self, core):
        """Server.add_listener"""
        told = []
        core.core.add_listener(lambda event, details: told.append(event), ["client_disconnect", "subscribe"])
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        core.publish(client_id, "/a", 1)
        core.ask({"channel": "/meta/disconnect", "clientId": client_id})
        assert told == ["subscribe", "client_disconnect"]
        with pytest.raises(ValueError, match="no event 'connect'.*client_connect"):
            core.core.add_listener(print, ["client_connect", "connect"])

    def test_a_listener_that_fails_is_logged_and_harms_nobody(self, errors):
        """Callback"""
        def fail(event, details):
            details.clear()
            raise ValueError("listener")
        core = CorePeer(callback=fail)
        client_id = core.handshake()
        core.publish(client_id, "/a", 1)
        assert [event for event, _ in core.told] == ["client_connect", "publish"]
        assert core.told_of("publish")[0]["data"] == 1
        assert len(errors.take()) == 2

    def test_a_listener_may_call_the_server(self, core):
        """It holds no lock; what it causes is told in turn."""
        def welcome(event, details):
            assert not core.core.lock.locked()
            if event == "client_connect":
                core.core.subscribe("/welcome", details["client_id"])
                core.core.publish("/welcome", "hello")
        core.core.add_listener(welcome)
        client_id = core.handshake()
        assert [event for event, _ in core.told] == ["client_connect", "subscribe", "publish"]
        core.core.publish("/welcome", "again")
        assert [event["data"] for event in core.events(client_id)] == ["again"]

    # -- In process calls --------------------------------------------------------------------

    def test_publish_reaches_every_kind_of_subscriber(self, core):
        """Publish; ids pass to local subscribers, a remote one sees no clientId and no id."""
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        heard = []
        LocalClient(core, "bot").subscribe("/a", heard.append)
        core.core.publish("/a", {"x": 1}, client_id="me", id="5", ext={"y": 2})
        assert heard == [{"channel": "/a", "data": {"x": 1}, "clientId": "me", "id": "5", "ext": {"y": 2}}]
        assert core.events(client_id) == [{"channel": "/a", "data": {"x": 1}, "ext": {"y": 2}}]

    def test_subscribe_and_unsubscribe_for_any_session(self, core):
        """Subscribe {channel, client_id}, unsubscribe"""
        client_id = core.handshake()
        core.core.subscribe("/a/**", client_id)
        core.core.publish("/a/b", 1)
        core.core.unsubscribe("/a/**", client_id)
        core.core.publish("/a/b", 2)
        assert [event["data"] for event in core.events(client_id)] == [1]
        assert [event for event, _ in core.told] == ["client_connect", "subscribe", "publish", "unsubscribe", "publish"]

    @for_each(("call", "code"), [
        (lambda core, id: core.subscribe("/a", "nobody"), 402), (lambda core, id: core.subscribe("/*/a", id), 405),
        (lambda core, id: core.subscribe("/meta/connect", id), 403),
        (lambda core, id: core.subscribe("/service/x", id), 403),
        (lambda core, id: core.unsubscribe("/a", id), 404), (lambda core, id: core.unsubscribe("/a", "nobody"), 402),
        (lambda core, id: core.publish("/a/*", 1), 405), (lambda core, id: core.publish("a", 1), 405),
        (lambda core, id: core.publish("/meta/connect", 1), 403), (lambda core, id: core.publish("/service/x", 1), 403),
        (lambda core, id: core.client_push("nobody", "/a", 1), 402),
        (lambda core, id: core.client_push(id, "/a/*", 1), 405),
        (lambda core, id: core.client_push(id, "/meta/connect", 1), 405)])
    def test_a_call_that_makes_no_sense_raises(self, core, call, code):
        """And changes nothing."""
        client_id = core.handshake()
        with pytest.raises(bayeux_server.BayeuxError) as raised:
            call(core.core, client_id)
        assert raised.value.code == code and ERROR_GRAMMAR.fullmatch(str(raised.value))
        assert core.events(client_id) == [] and not core.core.registry._subscribers
        assert [event for event, _ in core.told] == ["client_connect"]

    def test_client_push_reaches_one_client_only(self, core):
        """client_push; no answer and no publish, whatever it is subscribed to; extras pass."""
        target, other = core.handshake(), core.handshake()
        core.subscribe(other, "/**")
        core.core.client_push(target, "/alarm", {"x": 1}, priority="high", id="7")
        assert core.events(target) == [{"channel": "/alarm", "data": {"x": 1}, "priority": "high", "id": "7"}]
        assert core.events(other) == [] and not core.told_of("publish")

    def test_client_push_takes_any_extra(self, core):
        """client_push {channel, client_id, ...any}"""
        client_id = core.handshake()
        extra = {"event": "x", "details": "y", "reason": "z", "fields": [], "subscriber": None, "successful": True}
        core.core.client_push(client_id, "/a", 1, **extra)
        assert core.events(client_id) == [{"channel": "/a", "data": 1, **extra}]
        told, = core.told_of("client_push")
        assert told["event"] == "x" and told["data"] == 1

    def test_client_push_answers_a_held_connect(self, core):
        """client_push; on a service channel too, as services may answer later."""
        client_id = core.handshake()
        held = core.hold(client_id)
        core.core.client_push(client_id, "/service/slow", "done")
        core.work()
        assert held.answer[1:] == [{"channel": "/service/slow", "data": "done"}]

    def test_client_push_reaches_a_local_client(self, core):
        """By the callback for that channel."""
        heard = []
        LocalClient(core, "bot").subscribe("/a", heard.append)
        core.core.client_push("bot", "/a", 1, priority=2)
        assert heard == [{"channel": "/a", "data": 1, "priority": 2}]

    def test_client_push_counts_for_max_queue(self):
        """Issue 5"""
        core = CorePeer(max_queue=2)
        client_id = core.handshake()
        for number in range(3):
            core.core.client_push(client_id, "/a", number)
        assert core.told_of("client_disconnect") == [{"client_id": client_id, "reason": "queue overflow"}]

    @for_each("data", [object(), {1, 2}, b"bytes", float("nan"), float("inf"), "\ud800", {"x": "\udfff"}])
    def test_what_json_cannot_hold_raises_and_is_never_queued(self, core, data):
        """Not met only when it is sent, where it would harm others."""
        client_id = core.handshake()
        core.core.subscribe("/a", client_id)
        client = LocalClient(core, "bot")
        for call in (lambda: core.core.publish("/a", data), lambda: core.core.client_push(client_id, "/a", data),
                     lambda: client.publish("/a", data)):
            with pytest.raises((TypeError, ValueError)):
                call()
        assert core.events(client_id) == [] and not core.told_of("publish") and not core.told_of("client_push")

    def test_what_the_caller_does_to_its_data_afterwards_changes_nothing(self, core):
        client_id = core.handshake()
        core.core.subscribe("/a", client_id)
        data = {"x": [1]}
        core.core.publish("/a", data)
        data["x"].append(2)
        assert core.events(client_id)[0]["data"] == {"x": [1]}

    def test_the_server_offers_them_all(self, serve):
        """Server.publish, subscribe, unsubscribe, client_push, add_listener"""
        told = []
        server = serve(callback=lambda event, details: told.append(event))
        with Peer(server) as peer:
            server.subscribe("/a", peer.id)
            server.publish("/a", 1, client_id="me", id="5", ext={"x": 1})
            server.client_push(peer.id, "/b", 2, priority=3)
            server.unsubscribe("/a", peer.id)
            server.publish("/a", 4)
            assert peer.poll()[1:] == [{"channel": "/a", "data": 1, "ext": {"x": 1}},
                                                   {"channel": "/b", "data": 2, "priority": 3}]
        wait_until(lambda: len(told) == 6)
        assert told == ["client_connect", "subscribe", "publish", "client_push", "unsubscribe", "publish"]

    # -- Server sessions ---------------------------------------------------------------------
    # server.sessions: to be looked at, and ended.

    def test_what_can_be_seen(self, server, monkeypatch):
        begin = time.time()
        with Peer(server) as peer, SocketPeer(server, ext={"ack": True}) as socket_peer:
            peer.subscribe("/a")
            server.publish("/a", 1)
            session, other = session_of(server, peer.id), session_of(server, socket_peer.id)
            assert (session.address, session.transport, session.ack) == ("127.0.0.1", "long-polling", False)
            assert (other.transport, other.ack) == ("websocket", True)
            assert session.subscriptions == {"/a"}
            assert (session.waiting, other.waiting) == (1, 0)
            assert begin <= session.created <= time.time() and session.ended is None
            later = types.SimpleNamespace(**{**vars(time), "time": lambda: session.created + 5})
            monkeypatch.setattr(bayeux_server, "time", later)
            assert session.age == pytest.approx(5)

    def test_flags_are_the_applications(self, server):
        with Peer(server) as peer:
            session_of(server, peer.id).flags["user"] = "ann"
            assert session_of(server, peer.id).flags == {"user": "ann"}

    def test_the_transport_is_the_latest(self, server):
        with Peer(server) as peer, SocketPeer(server, client_id=peer.id):
            assert session_of(server, peer.id).transport == "websocket"
            peer.poll()
            assert session_of(server, peer.id).transport == "long-polling"

    def test_the_list_is_a_copy(self, server):
        with Peer(server):
            server.sessions.clear()
            assert len(server.sessions) == 1

    def test_a_held_connect_is_told_the_reason(self, server):
        with Peer(server) as peer:
            peer.hold(id=9)
            session = session_of(server, peer.id)
            server.end_session(peer.id, "closed for the night")
            reply, = peer.read_answer().batch
            assert (reply["id"], reply["successful"]) == (9, False)
            assert reply["error"].startswith("402:" + peer.id)
            assert "closed for the night" in reply["error"]
            assert session.ended == "closed for the night"
            assert server.sessions == []

    def test_a_held_connect_on_a_socket_is_told_the_reason(self, server):
        with SocketPeer(server) as peer:
            held = peer.hold()
            server.end_session(peer.id, "closed for the night")
            assert "closed for the night" in peer.reply(held)["error"]

    def test_who_comes_back_is_told_the_reason(self, server):
        with Peer(server) as peer:
            server.end_session(peer.id, "closed for the night")
            reply = peer.ask("/a", data=1)
            assert "closed for the night" in reply["error"]
            assert reply["advice"]["reconnect"] == "handshake"

    def test_listeners_are_told_the_reason(self, server):
        heard = threading.Event()
        server.add_listener(lambda event, details: event == "client_disconnect" and details["reason"] == "so"
                            and heard.set())
        with Peer(server) as peer:
            server.end_session(peer.id, "so")
            assert heard.wait(PATIENCE)

    def test_there_is_no_such_session(self, server):
        with pytest.raises(bayeux_server.BayeuxError, match="^402:"):
            server.end_session("nobody", "so")


# ======================================================================================
# §8  Local clients
# ======================================================================================

class TestLocalClients:
    """Publishing and subscribing inside this process."""

    # -- Local clients -----------------------------------------------------------------------

    def test_a_local_client_needs_no_handshake(self, core):
        """It hears remote clients, and they hear it."""
        remote = core.handshake()
        core.subscribe(remote, "/chat/*")
        heard = []
        bot = LocalClient(core, "autobot")
        bot.subscribe("/chat/demo", heard.append)
        core.publish(remote, "/chat/demo", "hi", id="1")
        bot.publish("/chat/demo", "hello")
        assert [(message["clientId"], message["data"]) for message in heard] == [(remote, "hi"), ("autobot", "hello")]
        assert heard[0]["id"] == "1" and "id" not in heard[1]
        assert core.events(remote) == [{"channel": "/chat/demo", "data": "hi"},
                                       {"channel": "/chat/demo", "data": "hello"}]

    def test_an_anonymous_publish_has_no_client_id(self):
        core = CorePeer(anon_publish=True)
        heard = []
        LocalClient(core).subscribe("/a", heard.append)
        core.ask({"channel": "/a", "data": 1, "clientId": None})
        core.core.publish("/a", 2)
        assert heard == [{"channel": "/a", "data": 1}, {"channel": "/a", "data": 2}]

    def test_ids_pass_through_and_never_leak_into_the_next(self, core):
        """One client's message id leaked into another's event; 0 is an id."""
        heard = []
        bot = LocalClient(core, "bot")
        bot.subscribe("/a", heard.append)
        for id in ("one", None, 0, None):
            bot.publish("/a", 1, id=id)
        assert [message.get("id", "none") for message in heard] == ["one", "none", 0, "none"]

    def test_patterns_work_as_for_sessions(self, core):
        """And a call for each event and callback."""
        heard, other = [], []
        bot = LocalClient(core)
        for pattern in ("/a/b", "/a/*", "/**"):
            bot.subscribe(pattern, heard.append)
        listener = heard.append
        bot.subscribe("/a/**", listener)
        bot.subscribe("/*", other.append)
        core.core.publish("/a/b", 1)
        assert len(heard) == 1 and other == []
        core.core.publish("/c", 2)
        assert len(heard) == 2 and len(other) == 1

    @for_each(("pattern", "code"), [("/meta/**", 403), ("/service/x", 403), ("/*/a", 405), ("a", 405), ("", 405)])
    def test_what_cannot_be_subscribed_raises(self, core, pattern, code):
        bot = LocalClient(core)
        with pytest.raises(bayeux_server.BayeuxError, match=str(code)):
            bot.subscribe(pattern, print)
        assert not bot.subscriptions and not core.core.registry._subscribers

    def test_without_a_callback_it_is_counted_and_nothing_delivered(self, core):
        """Args.no_callback; a later subscription may bring one."""
        bot = LocalClient(core, "bot")
        bot.subscribe("/a")
        bot.publish("/a", 1)
        assert core.told_of("subscribe") == [{"client_id": "bot", "channel": "/a"}] and bot.subscriptions == {"/a"}
        heard = []
        bot.subscribe("/a", heard.append)
        bot.publish("/a", 2)
        bot.subscribe("/a", None)
        bot.publish("/a", 3)
        assert [message["data"] for message in heard] == [2]
        assert len(core.told_of("subscribe")) == 1

    def test_unsubscribe_ends_the_calls(self, core):
        """Unsubscribe; of what is not subscribed it raises."""
        heard = []
        bot = LocalClient(core)
        bot.subscribe("/a", heard.append)
        bot.unsubscribe("/a")
        core.core.publish("/a", 1)
        assert heard == [] and not core.core.registry._subscribers
        with pytest.raises(bayeux_server.BayeuxError, match="404"):
            bot.unsubscribe("/a")

    def test_the_server_can_unsubscribe_a_local_client(self, core):
        """Server.unsubscribe(channel, client_id)"""
        heard = []
        bot = LocalClient(core, "bot")
        bot.subscribe("/a", heard.append)
        bot.subscribe("/*", lambda message: heard.append("/*"))
        core.core.unsubscribe("/a", "bot")
        core.core.publish("/a", 1)
        assert heard == ["/*"] and bot.subscriptions == {"/*"}

    def test_each_subscriber_gets_a_dict_of_its_own(self, core):
        """What one does to it is nobody else's, down to nested data."""
        remote = core.handshake()
        core.subscribe(remote, "/a")
        heard = []

        def spoil(message):
            heard.append(message["data"]["list"][:])
            message["data"]["list"].append("spoilt")
            message.clear()

        bots = [LocalClient(core) for _ in range(2)]
        for bot in bots:
            bot.subscribe("/a", spoil)
            bot.subscribe("/*", lambda message: spoil(message))
        core.core.publish("/a", {"list": [1]})
        assert heard == [[1]] * 4 and core.events(remote)[0]["data"] == {"list": [1]}

    def test_callbacks_run_without_the_lock(self, core):
        """DESIGN: one lock, and no user code under it."""
        locked = []
        bot = LocalClient(core, on_end=lambda reason: locked.append(core.core.lock.locked()))
        bot.subscribe("/a", lambda message: locked.append(core.core.lock.locked()))
        bot.publish("/a", 1)
        bot.close()
        assert locked == [False, False]

    def test_a_callback_may_publish_subscribe_and_close(self, core):
        """Issue 2: with everything it causes coming in order."""
        heard = []

        def on_first(message):
            heard.append(("first", message["data"]))
            if message["data"] == 1:
                bot.subscribe("/second", lambda message: heard.append(("second", message["data"])))
                bot.publish("/second", "from inside")
                bot.publish("/first", 2)
                heard.append("published")
            else:
                bot.unsubscribe("/second")
                bot.publish("/second", "nobody hears")
                bot.close()
                bot.close()

        bot = LocalClient(core, "bot", on_end=lambda reason: heard.append(reason))
        bot.subscribe("/first", on_first)
        core.core.publish("/first", 1)
        assert heard == [("first", 1), "published", ("second", "from inside"), ("first", 2), "asked"]
        core.core.publish("/first", 3)
        assert heard[-1] == "asked" and not core.core.local_clients and not core.core.registry._subscribers

    def test_a_callback_that_raises_is_logged_and_harms_nobody(self, core, errors):
        """Issue 2: neither its own later calls, nor the client's other callbacks, nor others, nor the publisher."""
        heard = []

        def fail(message):
            heard.append("failing")
            raise RuntimeError("callback")

        bot, other = LocalClient(core, "bot"), LocalClient(core, "other")
        bot.subscribe("/a", fail)
        bot.subscribe("/*", lambda message: heard.append("same client"))
        other.subscribe("/a", lambda message: heard.append("other client"))
        publisher = core.handshake()
        core.publish(publisher, "/a")
        core.publish(publisher, "/a")
        assert sorted(heard) == ["failing"] * 2 + ["other client"] * 2 + ["same client"] * 2
        logged = errors.take()
        assert len(logged) == 2 and all("bot" in line and "/a" in line and "RuntimeError" in line for line in logged)

    def test_an_on_end_that_raises_is_logged(self, core, errors):
        """Issue 2"""
        def fail(reason):
            raise RuntimeError(reason)
        LocalClient(core, "bot", on_end=fail).close()
        logged, = errors.take()
        assert "asked" in logged
        assert LocalClient(core, "bot")

    def test_a_closed_client_is_gone(self, core):
        """Its name is free, its subscriptions are over; closing twice tells nothing new."""
        heard = []
        with LocalClient(core, "bot", on_end=heard.append) as bot:
            bot.subscribe("/a", heard.append)
        bot.close()
        core.core.publish("/a", 1)
        assert heard == ["asked"] and bot.ended == "asked"
        assert len(core.told_of("client_disconnect")) == 1
        with pytest.raises(bayeux_server.BayeuxError, match="402"):
            bot.subscribe("/a", heard.append)
        assert not core.core.registry._subscribers

    def test_a_closed_client_does_not_act_for_its_successor(self, core):
        """One that has taken over its name."""
        old = LocalClient(core, "bot")
        old.close()
        new = LocalClient(core, "bot")
        heard = []
        new.subscribe("/a", heard.append)
        for call in (lambda: old.unsubscribe("/a"), lambda: old.subscribe("/b", print)):
            with pytest.raises(bayeux_server.BayeuxError, match="402"):
                call()
        old.close()
        core.core.publish("/a", 1)
        assert len(heard) == 1 and set(core.core.registry._subscribers) == {"/a"}

    def test_two_live_clients_cannot_have_one_name(self, core):
        LocalClient(core, "bot")
        with pytest.raises(ValueError, match="bot"):
            LocalClient(core, "bot")
        assert LocalClient(core).id != LocalClient(core).id
        assert len(core.core.local_clients) == 3

    def test_unsubscribing_is_one_step_for_the_callbacks(self, core):
        """The callbacks change under the lock, under which a delivery looks through them."""
        class Guarded(dict):
            def pop(self, *arguments):
                assert core.core.lock.locked()
                return super().pop(*arguments)

        bot = LocalClient(core)
        bot._callbacks = Guarded()
        bot.subscribe("/a", print)
        bot.unsubscribe("/a")
        assert not bot._callbacks

    # -- With threads ------------------------------------------------------------------------

    def test_a_client_finds_its_server_by_alias(self, serve):
        """Alias; the name or the server itself, and a clear error where that is not enough."""
        server = serve(alias="the only one")
        heard = threading.Event()
        LocalClient("the only one", "a").subscribe("/a", lambda message: heard.set())
        LocalClient(server, "b").publish("/a", 1)
        assert heard.wait(PATIENCE)
        with pytest.raises(ValueError, match="no server.*nobody"):
            LocalClient("nobody")
        twin = serve(alias="the only one")
        with pytest.raises(ValueError, match="more than one.*the only one"):
            LocalClient("the only one")
        assert LocalClient(twin, "a")
        twin.shutdown()
        assert LocalClient("the only one", "c")._core is server.core

    def test_a_slow_callback_holds_up_only_itself(self, server):
        """Issue 2: not the publisher, not other clients, not remote ones."""
        go_on, entered, heard = threading.Event(), threading.Event(), threading.Event()

        def slow(message):
            entered.set()
            assert go_on.wait(PATIENCE)

        LocalClient(server, "slow").subscribe("/a", slow)
        LocalClient(server, "quick").subscribe("/a", lambda message: heard.set())
        try:
            with Peer(server) as peer:
                peer.subscribe("/a")
                peer.publish("/a", 1)
                assert entered.wait(PATIENCE) and heard.wait(PATIENCE)
                peer.publish("/a", 2)
                assert [event["data"] for event in peer.connect()[1:]] == [1, 2]
        finally:
            go_on.set()

    def test_events_of_each_publisher_come_in_order_and_one_at_a_time(self, server):
        """From four threads and a remote client at once."""
        heard, done, running = [], threading.Event(), threading.Semaphore(1)

        def hear(message):
            assert running.acquire(blocking=False), "two callbacks of one client at the same time"
            heard.append(message["data"])
            running.release()
            if len(heard) == 450:
                done.set()

        LocalClient(server, "listener").subscribe("/**", hear)
        clients = [LocalClient(server) for _ in range(4)]

        def publish(client):
            for number in range(100):
                client.publish("/a", [client.id, number])

        with Peer(server) as peer:
            at_once(*[lambda client=client: publish(client) for client in clients],
                    lambda: [peer.publish("/b", [peer.id, number]) for number in range(50)])
            assert done.wait(PATIENCE)
        for publisher, count in [(client.id, 100) for client in clients] + [(peer.id, 50)]:
            assert [number for name, number in heard if name == publisher] == list(range(count))

    def test_a_callback_that_raises_leaves_the_server_alive(self, server, errors):
        """Issue 2: over a real connection, many times, more than there are threads."""
        count = threading.Semaphore(0)

        def fail(message):
            count.release()
            raise RuntimeError("callback")

        LocalClient(server, "bot").subscribe("/a", fail)
        with Peer(server) as peer:
            peer.subscribe("/a")
            for number in range(100):
                peer.publish("/a", number)
            assert all(count.acquire(timeout=PATIENCE) for _ in range(100))
            assert len(peer.poll()) == 101
        wait_until(lambda: len(errors.records) == 100)
        errors.take()

    def test_closing_in_a_callback_drops_what_is_left(self, server):
        """Issue 2: and on_end comes last, once."""
        heard, all_published, ended = [], threading.Event(), threading.Event()

        def close(message):
            heard.append(message["data"])
            if message["data"] == 0:
                assert all_published.wait(PATIENCE)
            else:
                bot.close()                     # with many more at hand

        bot = LocalClient(server, "bot", on_end=lambda reason: (heard.append(reason), ended.set()))
        bot.subscribe("/a", close)
        for number in range(20):
            server.publish("/a", number)
        all_published.set()
        assert ended.wait(PATIENCE)
        assert heard == [0, 1, "asked"]

    def test_a_client_that_cannot_keep_up_makes_publishes_fail(self, serve):
        """429, as long as max_queue events wait for it; it loses none of those that were accepted, and is not ended."""
        server = serve(max_queue=10)
        begun, go_on, heard = threading.Event(), threading.Event(), []
        with LocalClient(server, "bot") as bot, Peer(server) as peer:
            bot.subscribe("/a", lambda message: (begun.set(), go_on.wait(PATIENCE), heard.append(message["data"])))
            server.publish("/a", 0)
            assert begun.wait(PATIENCE)
            published = 1
            with pytest.raises(BayeuxError, match="429:/a:A subscriber in the server is too far behind"):
                while published < 30:
                    server.publish("/a", published)
                    published += 1
            assert published == 11                  # one is being handled, and no longer waits
            assert error_code(peer.ask("/a", data="remote")) == 429
            with pytest.raises(BayeuxError, match="429:/a:"):
                server.client_push("bot", "/a", "pushed")
            assert peer.ask("/b", data="another channel")["successful"]
            go_on.set()
            wait_until(lambda: len(heard) == published, "the callbacks")
            assert peer.ask("/a", data="later")["successful"]
            wait_until(lambda: heard[-1] == "later", "the last callback")
            assert heard == [*range(published), "later"] and bot.ended is None

    def test_shutting_down_tells_local_clients(self, serve):
        """Issue 4: after what was published before."""
        server = serve()
        heard = []

        def hear(message):
            if message["data"] == 1:
                wait_until(lambda: bot.ended)
            heard.append(message["data"])

        bot = LocalClient(server, "bot", on_end=lambda reason: heard.append(reason))
        bot.subscribe("/a", hear)
        for number in (1, 2, 3):
            server.publish("/a", number)
        server.shutdown()
        assert heard == [1, 2, 3, "server shutdown"] and bot.ended == "server shutdown"
        with pytest.raises(ValueError):
            LocalClient(server, "late")

    # -- Full mailboxes ----------------------------------------------------------------------

    def test_listeners_that_are_behind_hear_of_whole_sessions_only(self, caplog):
        peer, jobs = CorePeer(max_queue=20), []
        peer.core._run_later = jobs.append      # the listener sleeps

        def listen():
            while jobs:
                jobs.pop(0)()

        first = [peer.handshake() for _ in range(5)]
        for number in range(30):
            peer.publish(first[0], "/a", number)
        missed = peer.handshake()
        for client_id in (first[1], missed):
            peer.ask({"channel": "/meta/disconnect", "clientId": client_id})
        open_still = peer.handshake()
        assert len(peer.core._notices.items) <= 20 + len(first)
        assert peer.core._notices.size <= 100 * bayeux_server.NOTICE_SIZE
        listen()
        begun = [each["client_id"] for each in peer.told_of("client_connect")]
        ended = [each["client_id"] for each in peer.told_of("client_disconnect")]
        assert begun == first and ended == [first[1]]
        assert [each["data"] for each in peer.told_of("publish")] == list(range(15))
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert sorted(warnings) == ["the listeners are too far behind; they miss what happens now",
                                    "the listeners have missed 17 notices, and hear of what happens again"]
        for client_id in (open_still, first[0]):        # of the former nothing was ever told, so neither is its end
            peer.ask({"channel": "/meta/disconnect", "clientId": client_id})
        late = peer.handshake()
        listen()
        assert [each["client_id"] for each in peer.told_of("client_disconnect")] == [first[1], first[0]]
        assert peer.told_of("client_connect")[-1]["client_id"] == late and not peer.core._untold

    def test_a_listener_that_is_always_behind_costs_few_log_lines(self, caplog):
        """It handles a notice whenever another one comes."""
        peer, told = CorePeer(max_queue=20), []
        peer.core._run_later = told.append
        client_id = peer.handshake()
        for number in range(200):
            peer.publish(client_id, "/a", number)
            with peer.core.lock:                # as Mailbox.open does
                item, size = peer.core._notices.items.popleft()
                peer.core._notices.size -= size
                if not peer.core._notices.has_too_much():
                    peer.core.full_mailboxes.discard(peer.core._notices)
            peer.core._tell_listeners(item)
            if number < 30:
                peer.core.publish("/a", number)
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) <= 4

    def test_the_demo_outlives_a_flood(self, serve):
        """Its bot says nothing to what it has no room for, and goes on afterwards."""
        server = serve(max_queue=5)
        demo, begun, may_end = bayeux_server.Demo(server), threading.Event(), threading.Event()
        demo.bot.subscribe("/block", lambda message: (begun.set(), may_end.wait(PATIENCE)))
        server.publish("/block", None)
        assert begun.wait(PATIENCE)
        with Peer(server) as peer:
            codes = []
            for _ in range(10):
                for channel, data in (("/chat/demo", {"user": "me", "chat": "hello"}),
                                      ("/magnets/demo", {"magnet": 1, "x": 0.5, "y": 0.5})):
                    reply = peer.ask(channel, data=data)
                    codes.append(200 if reply["successful"] else error_code(reply))
            assert codes == [200] * 5 + [429] * 15
            demo.answer({"data": {"user": "me", "chat": "hello"}})
            peer.subscribe("/chat/members")
            assert peer.ask("/service/members", data={"user": "me"})["successful"]
            assert peer.connect().data == [{"members": ["autobot", "me"], "count": 2}]
            may_end.set()
            wait_until(lambda: demo.magnets and not demo.bot.mailbox.items and not server.core.scheduled_mailboxes)
            peer.subscribe("/chat/demo")
            peer.publish("/chat/demo", {"user": "me", "chat": "still there?"})
            said = []
            while len(said) < 2:
                said += peer.connect().data
            assert said[1] == {"user": "autobot", "chat": "I heard me say: still there?"}


# ======================================================================================
# §9  The long-poll wait
# ======================================================================================

class WatchedExchange(FakeExchange):
    """For the long-poll wait's thread: says when the answer was sent, or lost."""

    def __init__(self, core, **fields):
        super().__init__(core, **fields)
        self.sent = threading.Event()
        self.sending = threading.Lock()

    def send(self, answer):
        with self.sending:
            is_written = super().send(answer)
        self.sent.set()
        return is_written

    def hang_up(self):
        """Break the connection.  An answer has come by now, or never will."""
        with self.sending:
            self.is_broken = True
        self.core.hang_up(self)

    def wait(self):
        assert self.sent.wait(PATIENCE), "no answer came"
        return self.answer


def hold_watched(peer, client_id, **fields):
    """A connect whose answer by the wait's thread can be awaited."""
    exchange = WatchedExchange(peer.core, **fields)
    peer.core.receive([peer.connect_message(client_id)], exchange)
    return exchange


class TestLongPollWait:
    """The way out for events: one thread on one Condition."""

    # -- Long poll wait ----------------------------------------------------------------------

    def test_a_publish_answers_held_connects(self, waiting):
        """From any thread, and from inside."""
        peer = waiting()
        clients = [peer.handshake() for _ in range(100)]
        for client_id in clients:
            peer.subscribe(client_id, "/a")
        held = [hold_watched(peer, client_id) for client_id in clients]
        peer.core._listeners["publish"] = []    # their notices would wake it too
        peer.until_asleep()
        threads = len(threads_of_servers())
        peer.core.publish("/a", "event")
        for exchange in held:
            assert [event["data"] for event in exchange.wait()[1:]] == ["event"]
        assert len(threads_of_servers()) <= threads

    def test_32_connects_are_answered_between_two_looks_at_the_queues(self, core, monkeypatch):
        sizes, send = [], core.core.send
        clients = [core.handshake() for _ in range(100)]
        for client_id in clients:
            core.subscribe(client_id, "/a")
        held = [core.hold(client_id) for client_id in clients]
        core.core.publish("/a", 1)
        monkeypatch.setattr(core.core, "send", lambda answers: (sizes.append(len(answers)), send(answers))[1])
        bayeux_server.LongPollWait(core.core).deliver()
        assert [size for size in sizes if size] == [32, 32, 32, 4] and all(exchange.answer for exchange in held)

    def test_the_leader_answers_eight_times_as_many_before_it_reads_on(self, core, monkeypatch):
        monkeypatch.setattr(bayeux_server, "TURN", 1000)        # or a slow machine would answer fewer
        server = BayeuxServer(port=0, client_max_connections=0, max_sessions_per_browser=0)
        core.core = server.core
        clients = [core.handshake() for _ in range(300)]
        for client_id in clients:
            core.subscribe(client_id, "/a")
        held = [core.hold(client_id) for client_id in clients]
        server.publish("/a", 1)
        assert server._deliver_before_reading() is True
        assert sum(exchange.answer is not None for exchange in held) == 256
        assert server._deliver_before_reading() is False and all(exchange.answer for exchange in held)
        server.shutdown()

    def test_listeners_hear_of_a_session_that_ended_while_the_leader_delivered(self, core):
        """Whoever delivers sees to it, or they would hear of it with the next request."""
        client_id = core.handshake()
        core.clock.advance(1000)
        assert core.told_of("client_disconnect") == []
        bayeux_server.LongPollWait(core.core).deliver(1)
        assert core.told_of("client_disconnect") == [{"client_id": client_id, "reason": "timeout"}]

    def test_one_thread_delivers_at_a_time(self, core):
        """Or answers might overtake each other; who comes second leaves all to the first."""
        is_sending, may_go_on = threading.Event(), threading.Event()

        class SlowToSend(FakeExchange):
            def send(self, answer):
                is_sending.set()
                assert may_go_on.wait(PATIENCE)
                return super().send(answer)

        wait = bayeux_server.LongPollWait(core.core)
        first, second = core.handshake(), core.handshake()
        core.subscribe(first, "/a")
        core.subscribe(second, "/b")
        slow = SlowToSend(core.core)
        core.core.receive([core.connect_message(first)], slow)
        quick = core.hold(second)
        core.core.publish("/a", 1)
        sending = threading.Thread(target=wait.deliver)
        sending.start()
        assert is_sending.wait(PATIENCE)
        core.core.publish("/b", 2)
        assert wait.deliver(1) is False and quick.answer is None
        may_go_on.set()
        sending.join(PATIENCE)
        assert slow.answer[1]["data"] == 1 and quick.answer[1]["data"] == 2

    def test_a_held_connect_is_answered_when_its_time_is_over(self, waiting):
        """The nearest deadline first, though it came last."""
        peer = waiting(timeout=1000)
        patient = hold_watched(peer, peer.handshake())
        hasty, client_id = WatchedExchange(peer.core), peer.handshake()
        peer.until_asleep()
        peer.core.receive([peer.connect_message(client_id, advice={"timeout": 20})], hasty)
        assert hasty.wait() == [{"channel": "/meta/connect", "successful": True}]
        assert not patient.sent.is_set()

    def test_a_second_connect_releases_the_first(self, waiting):
        """At once, with nothing else happening."""
        peer = waiting()
        client_id = peer.handshake()
        older = hold_watched(peer, client_id)
        peer.until_asleep()
        newer = hold_watched(peer, client_id)
        assert len(older.wait()) == 1 and not newer.sent.is_set()

    def test_a_disconnect_releases_the_held_connect(self, waiting):
        peer = waiting()
        client_id = peer.handshake()
        held = hold_watched(peer, client_id)
        peer.until_asleep()
        peer.ask({"channel": "/meta/disconnect", "clientId": client_id})
        assert held.wait() == [{"channel": "/meta/connect", "successful": True}]

    def test_a_session_ends_when_its_lease_is_over(self, waiting):
        """With nobody asking, and listeners are told."""
        peer = waiting(connect_timeout=0.02)
        client_id = peer.handshake()
        wait_until(lambda: peer.told_of("client_disconnect"))
        assert peer.told_of("client_disconnect") == [{"client_id": client_id,
                                                      "reason": "timeout"}] and not peer.core.sessions

    def test_order_is_kept_over_lost_answers_and_broken_connections(self, waiting):
        """Every third answer is lost, every fifth connection breaks, every seventh connect is doubled."""
        peer = waiting(timeout=0.01)
        publisher, subscriber = peer.handshake(), peer.handshake()
        peer.subscribe(subscriber, "/a")
        received = []

        def publish():
            for number in range(0, 600, 3):
                peer.ask(*[{"channel": "/a", "clientId": publisher, "data": each}
                           for each in range(number, number + 3)])

        def fetch():
            turn = 0
            while len(received) < 600:
                turn += 1
                exchange = WatchedExchange(peer.core, is_broken=turn % 3 == 0)
                peer.core.receive([peer.connect_message(subscriber)], exchange)
                exchanges = [exchange]
                if turn % 5 == 0:
                    exchange.hang_up()
                elif turn % 7 == 0:
                    exchanges.append(hold_watched(peer, subscriber))
                for each in exchanges:
                    if turn % 5:
                        assert each.sent.wait(PATIENCE)
                    received.extend(event["data"] for event in (each.answer or [])[1:])

        at_once(publish, fetch)
        assert received == list(range(600))

    @for_each("step", ["pack", "send"])
    def test_an_answer_that_fails_harms_no_other(self, waiting, errors, step):
        """DESIGN: all answers leave here, so a failure of one must not be the end of all."""
        class Failing(FakeExchange):
            def send(self, answer):
                pytest.fail("it could not be packed")

        def fail(*arguments):
            raise RuntimeError(step)

        setattr(Failing, step, fail)

        peer = waiting()
        unlucky, lucky = peer.handshake(), peer.handshake()
        for client_id in (unlucky, lucky):
            peer.subscribe(client_id, "/a")
        peer.core.receive([peer.connect_message(unlucky)], Failing(peer.core))
        first = hold_watched(peer, lucky)
        peer.core.publish("/a", 1)
        assert len(first.wait()) == 2
        second = hold_watched(peer, lucky)
        peer.core.publish("/a", 2)
        assert len(second.wait()) == 2 and peer.wait_thread.is_alive()
        wait_until(lambda: errors.records)
        assert all(step in line for line in errors.take())

    def test_all_are_packed_before_the_first_is_sent(self, core):
        """Little is to stand between one system call and the next."""
        steps = []

        class Stepwise(FakeExchange):
            def pack(self, answer):
                steps.append("pack")
                return super().pack(answer)

            def send(self, answer):
                steps.append("send")
                return super().send(answer)

        for _ in range(3):
            client_id = core.handshake()
            core.subscribe(client_id, "/a")
            core.core.receive([core.connect_message(client_id)], Stepwise(core.core))
        core.core.publish("/a", 1)
        bayeux_server.LongPollWait(core.core).deliver()
        assert steps == ["pack"] * 3 + ["send"] * 3

    def test_a_packet_is_not_kept_once_it_was_sent(self, core):
        """The connection keeps what a slow reader has not taken; twice that would be too much."""
        client_id = core.handshake()
        slow = SlowExchange(core.core)
        core.core.receive([core.connect_message(client_id)], slow)
        core.clock.advance(1000)
        bayeux_server.LongPollWait(core.core).deliver()
        assert slow.taken.packet is None

    def test_answers_leave_while_others_are_being_made(self, waiting):
        """§9: what piles up while one is sent leaves together."""
        entered, go_on = threading.Event(), threading.Event()

        class Slow(WatchedExchange):
            def send(self, answer):
                entered.set()
                assert go_on.wait(PATIENCE)
                return super().send(answer)

        peer = waiting()
        slow, other = peer.handshake(), peer.handshake()
        peer.subscribe(slow, "/slow")
        peer.subscribe(other, "/a")
        exchange = Slow(peer.core)
        peer.core.receive([peer.connect_message(slow)], exchange)
        held = hold_watched(peer, other)
        peer.core.publish("/slow", 0)
        assert entered.wait(PATIENCE)
        for number in range(5):
            peer.core.publish("/a", number)
        go_on.set()
        assert [event["data"] for event in held.wait()[1:]] == list(range(5))
        assert len(exchange.wait()) == 2

    def test_stopping_answers_what_is_held(self, waiting):
        """Issue 4: the wait ends when the last answer has left."""
        peer = waiting()
        held = [hold_watched(peer, peer.handshake()) for _ in range(100)]
        peer.core.stop()
        peer.wait_thread.stop()
        assert all(exchange.answer[0]["successful"] for exchange in held) and not peer.wait_thread.is_alive()

    # -- With sockets ------------------------------------------------------------------------

    def test_many_held_connects_need_no_threads(self, serve):
        """DESIGN: thirty are held and answered by a server that may have four handler threads."""
        server = serve(max_threads=4)
        peers = [Peer(server) for _ in range(30)]
        try:
            for peer in peers:
                peer.subscribe("/a")
                peer.send_connect()
            wait_until(lambda: all(server.core.sessions[peer.id].hold for peer in peers),
                       "all thirty connects being held")
            server.publish("/a", "event")
            for peer in peers:
                assert [event["data"] for event in peer.read_answer().batch[1:]] == ["event"]
        finally:
            for peer in peers:
                peer.close()

    def test_a_hostile_timesync_does_not_stop_the_server(self, server):
        """One client's numbers, everybody's answers."""
        with Peer(server) as hostile, Peer(server) as other:
            for peer in (hostile, other):
                peer.subscribe("/a")
            hostile.send_connect(ext={"timesync": {"tc": 1e308, "l": 1e308, "o": 1e308}})
            other.send_connect()
            wait_until(lambda: all(server.core.sessions[peer.id].hold for peer in (hostile, other)))
            server.publish("/a", 1)
            for peer in (hostile, other):
                assert [event["data"] for event in peer.read_answer().batch[1:]] == [1]

    def test_data_that_is_no_unicode_does_not_stop_the_server(self, server):
        """A lone surrogate from inside the process is refused where it comes from."""
        with Peer(server) as peer:
            peer.subscribe("/a")
            peer.send_connect()
            wait_until(lambda: server.core.sessions[peer.id].hold)
            with pytest.raises(ValueError):
                server.publish("/a", "\ud800")
            server.publish("/a", "good")
            assert [event["data"] for event in peer.read_answer().batch[1:]] == ["good"]

    # -- Long times --------------------------------------------------------------------------

    def test_times_beyond_what_a_lock_can_wait_do_no_harm(self, waiting):
        """"for ever", as somebody may write it."""
        peer = waiting(connect_timeout=1e12, timeout=1e12)
        client_id = peer.handshake()
        peer.subscribe(client_id, "/a")
        held = hold_watched(peer, client_id)
        peer.until_asleep()
        peer.core.publish("/a", "event")
        assert events_of(held.wait()) == ["event"]


# ======================================================================================
# §6, §7, §9  A model of the core
# ======================================================================================

class ModelPeer(CorePeer):
    """Its listener is never too far behind: it only hears of ends."""

    listens_to = ("client_disconnect",)


class ModelClient:
    """A session as the model sees it.  An event is a number here; numbers rise in the order of publishing.

    Attributes:
        published: all events that it is to get;  arrived: those that it got, each once.
        waiting: the events that have to leave;  flying: those whose fate is open;  sent: those not yet acknowledged.
        is_hurried: what waits leaves as soon as it can.  Otherwise all of it is lazy, and leaves at lazy_at.
        carried: the events of a reply, by the number of the reply;  seen: the numbers of replies that arrived.
        known: the events that it has acknowledged.
    """

    def __init__(self, id, ack, browser, address, now):
        self.id, self.ack, self.browser, self.address = id, ack, browser, address
        self.patterns, self.known, self.carried = set(), set(), {}
        self.published, self.arrived, self.waiting, self.flying, self.sent, self.seen = [], [], [], [], [], []
        self.is_hurried, self.lazy_at = False, float("inf")
        self.is_connected, self.ended, self.hold, self.stream = False, "", None, None
        self.lease, self.active = now + Model.LEASE, now

    @property
    def uses_stream(self):
        return self.stream is not None and not self.ack

    def can_leave(self, now):
        """Whether what waits has a way, and its time has come."""
        has_way = (self.hold or self.uses_stream) and not self.flying
        deadline = min(self.lazy_at, self.hold.deadline if self.hold else self.lease)
        return bool(has_way and self.waiting and (self.is_hurried or deadline <= now))

    def is_subscribed(self, channel):
        parent = channel[:channel.rindex("/") + 1]
        return any(pattern in (channel, parent + "*") or (pattern.endswith("**") and channel.startswith(pattern[:-2]))
                   for pattern in self.patterns)

    def acknowledge(self, number):
        self.known.update(self.carried.get(number, ()))
        self.waiting = [event for event in self.waiting if event not in self.known]
        again = [event for event in self.sent if event not in self.known]
        self.waiting, self.sent = again + self.waiting, []
        self.is_hurried = bool(again or (self.is_hurried and self.waiting))
        if not self.waiting:
            self.lazy_at = float("inf")

    def take(self, most=None):
        """The events that leave now."""
        if self.flying:
            return []
        events, self.waiting = self.waiting[:most], self.waiting[most:] if most else []
        self.is_hurried, self.lazy_at = bool(self.waiting), float("inf")
        if self.ack:
            self.sent += events
        else:
            self.flying = events
        return events

    def settle(self, events, number, is_written):
        """The events have arrived, or they are lost."""
        if events and not self.ack:
            self.flying = []
            if not is_written and not self.ended:
                self.waiting, self.is_hurried = events + self.waiting, True
        if is_written:
            new = [event for event in events if event not in self.arrived]
            expect(self.published[len(self.arrived):][:len(new)], new, "events arrive in order, and none is left out")
            expect(bool(self.ack or new == events), True, "no event arrives twice")
            self.arrived += new
            self.seen += [number] if number else []


def expect(found, expected, rule):
    """Fail with the broken rule.  (pytest.fail, as the core goes on after an Exception in what it sends.)"""
    if found != expected:
        pytest.fail(f"{rule}: {found!r} is not {expected!r}")


class ModelExchange(FakeExchange):
    """A connect, alone or with publishes behind it in the same request.

    Attributes:
        refused: the error that its reply must have;  codes: of the errors of the other replies.
        due: why its answer must leave;  events: those it must carry, or None where that shows when it leaves.
    """

    def __init__(self, model, client, fate, stream, may_hold):
        super().__init__(model.peer.core, may_hold=may_hold, address=client.address)
        self.model, self.client, self.fate, self.stream = model, client, fate, stream
        self.refused, self.codes, self.due, self.events, self.deadline = "", [], "", None, float("inf")

    def send(self, answer):
        expect(self.answer, None, "a connect is answered once")
        self.answer = json.loads(answer.batch())
        return self.model.answered(self, answer)


class ModelStream(FakeStream):
    """A WebSocket of several clients, or the event stream of one."""

    def __init__(self, model, address, owner=None):
        super().__init__()
        self.model, self.address, self.owner, self.carries_requests = model, address, owner, owner is None
        self.fate, self.has_ended = "written", False

    def feed(self, broadcast, session):
        client = self.model.by_id[session.id]
        expect(client.stream is self and client.can_leave(self.model.now), True, "a frame has its reason")
        events = self.model.numbers(json.loads(broadcast.batch()))
        expect(events, client.take(self.model.most), "a frame carries what waits")
        answer = bayeux_server.Answer(self, [], session, broadcast.events)
        return self.model.leaves(self, client, events, 0, answer, self.fate) is True

    def send(self, answer):
        events = self.model.numbers(json.loads(answer.batch()))
        if events:                              # the last words of a server that stops
            expect(events in self.model.last_words, True, "the last events of a stream")
            self.model.last_words.remove(events)
        else:
            expect(self.has_ended or self.carries_requests, False, "an event stream ends once")
            self.has_ended = True
        return self.fate != "lost"


class Model:
    """Plays a history on a core and compares each of its answers.  Time counts in whole seconds.

    The methods below the line are the steps.  In a history clients and sockets are numbers; a step of a
    client that is not there is skipped, so that a history still makes sense when steps are taken out.
    """

    HOLD, LEASE, LAZY = 10, 20, 3
    ADDRESSES = ("10.0.0.1", "10.0.0.2")
    LAZY_CHANNELS = ("/lazy/a", "/lazy/b")

    def __init__(self, **options):
        self.peer = ModelPeer(timeout=self.HOLD, connect_timeout=self.LEASE, max_lazy=self.LAZY,
                             lazy_channels=["/lazy/*"], **options)
        self.core, self.options, self.most = self.peer.core, self.peer.core.options, options.get("max_frame_events")
        self.clients, self.by_id, self.sockets, self.streams = [], {}, {}, []
        self.channels = []                  # of the events, by number
        self.unsettled, self.due, self.ends, self.last_words = [], [], [], []

    @property
    def now(self):
        return self.peer.clock.now

    def numbers(self, messages):
        for message in messages:
            expect(message, {"channel": self.channels[message["data"]], "data": message["data"]}, "an event's fields")
        return [message["data"] for message in messages]

    def living(self):
        return [client for client in self.clients if not client.ended]

    def kept_open(self, address):
        """Connections of the address that are kept open, with the client whose each is."""
        holds = [each for each in self.living() if each.hold and each.hold.stream is None and each.address == address]
        return holds + [stream for stream in self.streams if stream.address == address]

    def answered(self, exchange, answer):
        """A connect is answered: was it time, is it told the truth, does it carry what it should?"""
        client, expected = exchange.client, exchange.events
        reply, *others = [message for message in exchange.answer if "successful" in message]
        events = self.numbers([message for message in exchange.answer if "successful" not in message])
        expect([0 if each["successful"] else error_code(each) for each in others], exchange.codes, "replies to publishes")
        expect(reply.get("error", ""), exchange.refused, "the error of a connect")
        if exchange.refused:
            return True
        if exchange is client.hold:
            can_leave = client.can_leave(self.now) and not client.uses_stream
            expect(can_leave or exchange.deadline <= self.now, True, "an answer to a held connect has its reason")
            expected = client.take(self.most if client.stream else None) if can_leave else []
            self.release(client, "")
        elif expected is None:
            expected = [] if client.uses_stream else client.take()
        expect(events, expected, "an answer carries what waits")
        expect(exchange.due == "asked" and "advice" in reply, False, "a client that disconnects gets no advice")
        number = reply["ext"]["ack"] if client.ack else 0
        if number:
            expect(number in client.carried, False, "a reply's number is new")
            expect(client.known.isdisjoint(events), True, "what was acknowledged does not leave again")
            client.carried[number] = events
        fate = exchange.fate if exchange.stream is None else exchange.stream.fate
        return self.leaves(exchange, client, events, number, answer, fate)

    def leaves(self, way, client, events, number, answer, fate):
        if fate == "slow":
            self.unsettled.append((way, client, events, number, answer))
            return None
        client.settle(events, number, fate == "written")
        return fate == "written"

    def release(self, client, reason, events=()):
        """The connect is no longer held; with a reason its answer is due."""
        if client.hold is not None and reason:
            client.hold.due, client.hold.events = reason, list(events)
            self.due.append(client.hold)
        if client.hold is not None:
            client.hold, client.lease = None, self.now + self.LEASE

    def end(self, client, reason):
        self.ends.append({"client_id": client.id, "reason": reason})
        is_elsewhere = any(each[1] is client and each[2] and each[0] is not client.stream for each in self.unsettled)
        has_last = reason == "server shutdown" and not (client.flying and (is_elsewhere or not client.uses_stream))
        last = client.waiting if has_last else []
        if client.hold is not None and reason in ("queue overflow", "inactivity"):
            client.hold.refused = f"402:{client.id}:Session ended by {reason}"
        if client.hold is None and client.uses_stream and last:
            self.last_words.append(last)
        self.release(client, reason, last)
        client.ended, client.stream, client.waiting, client.patterns = reason, None, [], set()

    def deliver(self, events):
        """Events on one channel that were published together."""
        for client in self.living():
            if not client.is_subscribed(self.channels[events[0]]):
                continue
            is_full = len(client.waiting) + len(client.sent) >= self.options.max_queue
            if is_full and (client.flying or not (client.hold or client.uses_stream)):
                self.end(client, "queue overflow")
                continue
            client.published += events
            client.waiting += events
            if self.channels[events[0]] in self.LAZY_CHANNELS and not is_full:
                client.lazy_at = min(client.lazy_at, self.now + self.LAZY)
            else:
                client.is_hurried = True

    def ask(self, client, **message):
        """Send a message that is answered at once; the code of the error, or 0."""
        reply, = self.peer.ask({"clientId": client.id, **message})
        if client.ended:
            expect(reply["error"], f"402:{client.id}:Unknown client - it ended by {client.ended}", "an ended session")
        client.lease, client.active = self.now + self.LEASE, self.now
        return 0 if reply["successful"] else error_code(reply)

    def check(self):
        """Nothing is left to do; so nothing is late, and the core counts what there is."""
        for client in self.living():
            if client.hold is None and not client.flying and client.lease <= self.now:
                self.end(client, "timeout")
        for client in self.living():
            expect(client.can_leave(self.now), False, "no event is late")
            expect(client.hold is not None and client.hold.deadline <= self.now, False, "no answer is late")
        expect([each.due for each in self.due if each.answer is None], [], "a released connect is answered")
        key = str
        expect(sorted(self.peer.told_of("client_disconnect"), key=key), sorted(self.ends, key=key), "listeners are told")
        expect(set(self.core.sessions), {client.id for client in self.living()}, "the living sessions")
        expect([each.has_ended for each in self.streams if each.owner],
               [each.owner.stream is not each for each in self.streams if each.owner], "the end of event streams")
        expect(self.last_words, [], "last words are said")
        for stream in [each for each in self.streams if each.has_ended]:
            self.close(stream)
        self.due.clear()
        if self.options.client_max_connections:
            kept_open = collections.Counter({each: len(self.kept_open(each)) for each in self.ADDRESSES})
            expect(self.core.kept_open, +kept_open, "connections that are kept open are counted")
        held = collections.Counter(each.browser for each in self.living() if each.hold and not each.hold.stream)
        expect(+self.core._held_by_browser, held, "connects held by browser")
        patterns = collections.Counter()
        for client in self.living():
            patterns[client.address] += bayeux_server.subscriptions_size(client.patterns)
        expect(self.core.memory._by_address, +patterns, "subscriptions are counted")

    # ---- Steps ---------------------------------------------------------------------------

    def handshake(self, ack=False, browser="b", address="10.0.0.1"):
        reply, = self.peer.ask({"channel": "/meta/handshake", "version": "1.0", "ext": {"ack": ack}},
                               browser=browser, address=address)
        expect(reply["successful"], not self.core.stopping, "a handshake")
        if reply["successful"]:
            self.clients.append(ModelClient(reply["clientId"], ack, browser, address, self.now))
            self.by_id[reply["clientId"]] = self.clients[-1]

    def subscribe(self, client, *patterns):
        is_allowed = len(client.patterns.union(patterns)) <= self.options.max_subscriptions
        code = self.ask(client, channel="/meta/subscribe", subscription=list(patterns))
        expect(code, 402 if client.ended else 0 if is_allowed else 429, "a subscription")
        if code == 0:
            client.patterns.update(patterns)

    def unsubscribe(self, client, *patterns):
        is_allowed = client.patterns.issuperset(patterns)
        code = self.ask(client, channel="/meta/unsubscribe", subscription=list(patterns))
        expect(code, 402 if client.ended else 0 if is_allowed else 404, "the end of a subscription")
        if code == 0:
            client.patterns.difference_update(patterns)

    def tell(self, *channels):
        """The server publishes."""
        for channel in channels:
            self.channels.append(channel)
            self.deliver([len(self.channels) - 1])
            self.core.publish(channel, len(self.channels) - 1)

    def publish(self, client, *channels):
        messages = self.messages(client, channels)
        codes = self.publishing(client, channels)
        replies = self.peer.ask(*messages)
        expect([0 if reply["successful"] else error_code(reply) for reply in replies], codes, "replies to a publish")

    def messages(self, client, channels):
        return [{"channel": channel, "clientId": client.id, "data": number}
                for number, channel in enumerate(channels, len(self.channels))]

    def publishing(self, client, channels):
        """The codes of the replies.  Events on one channel in a row are queued together."""
        codes, together = [], []
        for channel in channels:
            codes.append(402 if client.ended else 0)
            self.channels.append(channel)
            if client.ended:
                continue
            client.lease, client.active = self.now + self.LEASE, self.now
            if together and self.channels[together[0]] != channel:
                self.deliver(together)
                together = []
            together.append(len(self.channels) - 1)
        if together:
            self.deliver(together)
        return codes

    def connect(self, client, fate="written", socket=None, patience=None, stale=0, may_hold=True, channels=()):
        """fate: of its answer;  stale: how old the number is that it names;  channels: published in the same request."""
        stream = self.open(socket) if socket is not None else None
        exchange = ModelExchange(self, client, fate, stream, may_hold)
        number = client.seen[-1 - stale] if stale < len(client.seen) else 0
        message = self.peer.connect_message(
            client.id, connectionType="websocket" if stream else "long-polling", ext={"ack": number})
        if patience is not None:
            message["advice"] = {"timeout": patience * 1000}
        exchange.refused = self.refused(client, stream)
        if exchange.refused:
            self.core.receive([message], exchange)
            expect(exchange.answer is None, False, "a refused connect is answered")
            return
        is_crowded = stream is None and self.is_crowded(client)
        client.lease = self.now + self.LEASE
        if client.ack:
            client.acknowledge(number)
        self.release(client, "a newer connect")
        if stream is not None or (client.stream is not None and client.stream.carries_requests):
            client.stream = stream
        is_held = client.is_connected and may_hold and not channels and not is_crowded and patience != 0
        client.is_connected = True
        if is_held:
            exchange.deadline = self.now + (self.HOLD if patience is None else min(patience, self.HOLD))
            client.hold = exchange
        elif client.ack:
            exchange.events = client.take()
        messages = self.messages(client, channels)
        exchange.codes = self.publishing(client, channels)
        self.core.receive([message, *messages], exchange)
        expect(exchange.answer is None, is_held, "whether a connect is held")

    def refused(self, client, stream):
        """The code and the text of the error with which a connect is refused."""
        most, inactivity = self.options.max_sessions_per_connection, self.options.max_inactivity
        others = [each for each in self.living() if each.stream is stream and each is not client]
        if client.ended:
            return f"402:{client.id}:Unknown client - it ended by {client.ended}"
        client.lease = self.now + self.LEASE
        if stream is not None and client.stream is not stream and len(others) >= most:
            return f"429:/meta/connect:More than {most} sessions on one connection"
        if inactivity and self.now - client.active > inactivity:
            self.end(client, "inactivity")
            return f"402:{client.id}:Session ended by inactivity"
        return ""

    def is_crowded(self, client):
        """Whether others keep as many connections open as its browser, or its address, may."""
        of_browser = [each for each in self.living() if each.browser == client.browser and each is not client
                      and each.hold is not None and each.hold.stream is None]
        of_address = [each for each in self.kept_open(client.address) if each is not client]
        return (len(of_browser) >= (self.options.max_sessions_per_browser or 1000)
                or len(of_address) >= (self.options.client_max_connections or 1000))

    def hang_up(self, client):
        if client.hold is not None:
            exchange = client.hold
            self.release(client, "")
            self.core.hang_up(exchange)

    def answer_now(self, client):
        """Another request has come behind its connect."""
        if client.hold is not None:
            exchange = client.hold
            self.release(client, "another request")
            exchange.events = []
            self.core.answer_now(exchange)

    def settle(self, client, is_written):
        """The fate of what has been on its way for longest."""
        for unsettled in self.unsettled:
            if unsettled[1] is client:
                return self.settle_one(unsettled, is_written)

    @staticmethod
    def stream_of(unsettled):
        return unsettled[0] if isinstance(unsettled[0], ModelStream) else unsettled[0].stream

    def settle_one(self, unsettled, is_written):
        stream = self.stream_of(unsettled)
        if stream in self.streams and not is_written:
            return self.close(stream)
        way, client, events, number, answer = unsettled
        self.unsettled.remove(unsettled)
        client.settle(events, number, is_written)
        if isinstance(way, ModelExchange):
            client.lease = self.now + self.LEASE
        self.core.settle_later(answer, is_written)

    def open(self, number):
        """The socket of the number, opened if it is not; None: its address has too many connections."""
        if number not in self.sockets:
            stream = self.count(ModelStream(self, "10.0.0.1"))
            if stream is None:
                return None
            self.sockets[number] = stream
        return self.sockets[number]

    def count(self, stream):
        most = self.options.client_max_connections
        is_allowed = not most or len(self.kept_open(stream.address)) < most
        expect(self.core.count_stream(stream), is_allowed, "the place of a stream")
        if is_allowed:
            self.streams.append(stream)
        return stream if is_allowed else None

    def attach(self, client):
        """The client opens an event stream beside its connects."""
        if client.stream is not None and client.stream.carries_requests:
            return
        stream = self.count(ModelStream(self, client.address, client))
        if stream is not None:
            expect(self.core.attach(client.id, stream), not client.ended, "whether an event stream is opened")
            if client.ended:
                stream.has_ended = True
            else:
                client.stream = stream

    def close_socket(self, number):
        if number in self.sockets:
            self.close(self.sockets[number])

    def close_stream(self, client):
        if client.stream is not None and client.stream.owner:
            self.close(client.stream)

    def close(self, stream):
        """The connection is gone, and with it the answers that are on their way."""
        stream.fate = "lost"
        self.streams.remove(stream)
        self.sockets = {number: each for number, each in self.sockets.items() if each is not stream}
        for client in self.living():
            if client.stream is stream:
                client.stream = None
                if client.hold is not None and client.hold.stream is stream:
                    self.release(client, "")
        self.core.forget_stream(stream)
        for unsettled in list(self.unsettled):
            if self.stream_of(unsettled) is stream:
                self.settle_one(unsettled, False)

    def slow(self, number, is_slow):
        if number in self.sockets:
            self.sockets[number].fate = "slow" if is_slow else "written"

    def slow_stream(self, client, is_slow):
        if client.stream is not None and client.stream.owner:
            client.stream.fate = "slow" if is_slow else "written"

    def time(self, seconds):
        for _ in range(2):                          # answers may leave meanwhile
            for unsettled in list(self.unsettled):  # request_timeout sees to it that no answer outlives the lease
                is_protected = unsettled[1].flying and not isinstance(unsettled[0], ModelExchange)
                if unsettled in self.unsettled and unsettled[1].lease <= self.now + seconds and not is_protected:
                    self.settle_one(unsettled, False)
            self.peer.work()
        self.peer.pass_time(seconds)
        self.check()

    def disconnect(self, client):
        had_ended = client.ended
        if not had_ended:
            self.end(client, "asked")
        reply, = self.peer.ask({"channel": "/meta/disconnect", "clientId": client.id})
        expect(reply["successful"], not had_ended, "a disconnect")

    def stop(self):
        for client in self.living():
            self.end(client, "server shutdown")
        self.core.stop()

    def step(self, name, *arguments):
        fields = {}
        if arguments and isinstance(arguments[-1], dict):
            *arguments, fields = arguments
        if name not in ("handshake", "tell", "slow", "close_socket", "time", "stop"):
            number, *arguments = arguments
            if number >= len(self.clients):
                return
            arguments = [self.clients[number], *arguments]
        getattr(self, name)(*arguments, **fields)

    def finish(self):
        """All that was published arrives; then all sessions end, and nothing is counted any more."""
        for stream in self.streams:
            stream.fate = "written"
        while self.unsettled:
            self.settle_one(self.unsettled[0], True)
            self.time(0)
        for _ in range(2):
            for client in self.living():
                self.connect(client, patience=0)
        self.time(self.LAZY)
        for client in self.living():
            expect(client.arrived, client.published, "nothing is lost")
        self.time(self.LEASE)
        for stream in list(self.streams):
            self.close(stream)
        core = self.core
        expect((self.living(), core.sessions, core._sessions_of, core._held_by_browser, core.kept_open,
                core.registry._subscribers, core.memory._by_address), ([], {}, {}, {}, {}, {}, {}), "nothing is left")
        if IS_FREED_AT_ONCE:
            expect(core.memory.used, 0, "no memory is counted")


def play(history, **options):
    """Play the history on a core and on the model.  A step is (name, arguments...), the last may be a dict of keywords."""
    model = Model(**options)
    for step in history:
        model.step(*step)
    model.finish()


def failure_of(history, options):
    """The rule that the history breaks, and how; None if it breaks none."""
    try:
        play(history, **options)
    except pytest.fail.Exception as failure:
        return str(failure)
    except Exception as failure:        # noqa: BLE001 (whatever it is, the history is to be shortened)
        return f"{type(failure).__name__}: {failure!r}"
    return None


def shortest(history, options):
    """What is left of a history that fails when all steps are taken out without which it fails in the same way."""
    kind, size = failure_of(history, options).split(":")[0], len(history)
    while size:
        start = 0
        while start < len(history):
            shorter = history[:start] + history[start + size:]
            if (failure_of(shorter, options) or "").split(":")[0] == kind:
                history = shorter
            else:
                start += size
        size //= 2
    return history


def random_history(seed):
    """Options and steps, the same for the same seed."""
    rng = random.Random(seed)
    some = rng.choice
    options = {"max_queue": some([3, 6, 1000]), "max_frame_events": some([1, 2, 100]),
               "max_subscriptions": some([3, 1000]), "max_inactivity": some([0, 0, 35]),
               "client_max_connections": some([0, 0, 2]), "max_sessions_per_browser": some([0, 0, 1]),
               "max_sessions_per_connection": some([1, 100])}
    names = ["/a", "/a/b", *Model.LAZY_CHANNELS]
    patterns = ["/a", "/*", "/a/*", "/a/**", "/**", "/lazy/*", "/lazy/a"]
    channels = partial(rng.choices, names, [4, 2, 2, 1])
    count = rng.randint(1, 4)
    steps = []
    for number in range(count):
        steps += [("handshake", some([False, True]), some("bc"), some(Model.ADDRESSES)),
                  ("subscribe", number, *rng.sample(patterns, rng.randint(1, 3))), ("connect", number)]
    makers = {
        "connect": (25, lambda: [{
            "fate": some(["written", "written", "slow", "lost"]), "socket": some([None, None, None, 0, 1]),
            "patience": some([None, None, None, 4, 0]), "stale": some([0, 0, 0, 1, 2]), "may_hold": rng.random() < 0.9,
            "channels": channels(k=some([0, 0, 0, 0, 1, 3]))}]),
        "publish": (10, lambda: channels(k=rng.randint(1, 4))), "settle": (12, lambda: [rng.random() < 0.5]),
        "subscribe": (3, lambda: rng.sample(patterns, rng.randint(1, 2))), "unsubscribe": (1, lambda: [some(patterns)]),
        "hang_up": (3, list), "answer_now": (2, list), "attach": (3, list), "close_stream": (2, list),
        "slow_stream": (3, lambda: [some([True, False])]), "disconnect": (0.5, list)}
    weights = [weight for weight, _ in makers.values()]
    for _ in range(55):
        kind = rng.random()
        if kind < 0.3:
            steps.append(("time", some([0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 7, 10, 20])))
        elif kind < 0.45:
            steps.append(("tell", *channels(k=rng.randint(1, 2))))
        elif kind < 0.5:
            steps.append(some([("slow", some([0, 1]), some([True, False])), ("close_socket", some([0, 1]))]))
        else:
            name, = rng.choices(list(makers), weights)
            steps.append((name, rng.randrange(count), *makers[name][1]()))
    if some([True, False, False]):
        steps += [("stop",), ("time", 0)]
    return steps, options


def check_seeds(seeds):
    for seed in seeds:
        history, options = random_history(seed)
        failure = failure_of(history, options)
        if failure:
            history = shortest(history, options)
            steps = ",\n    ".join(map(repr, history))
            settings = "".join(f", {name}={value!r}" for name, value in options.items())
            pytest.fail(f"seed {seed}: {failure_of(history, options)}\nplay([\n    {steps}]{settings})", pytrace=False)


#   The same in every run; MODEL_SEEDS=1000-5000 in the environment plays others.
FIRST_SEED, LAST_SEED = map(int, os.environ.get("MODEL_SEEDS", "0-199").split("-"))
MODEL_SEEDS = [range(first, min(first + 25, LAST_SEED + 1)) for first in range(FIRST_SEED, LAST_SEED + 1, 25)]


class TestModel:
    """Random histories."""

    @for_each("seeds", MODEL_SEEDS, ids=lambda seeds: f"seeds-{seeds[0]}-to-{seeds[-1]}")
    def test_the_core_does_as_the_model(self, seeds):
        check_seeds(seeds)

    @for_each(("history", "options"), [
        ([("handshake", True), ("subscribe", 0, "/a/*"), ("tell", "/a/b", "/a/b", "/a/b"),
          ("connect", 0, {"channels": ["/a/b", "/a", "/a"]})], {"max_queue": 3}),
        ([("handshake", False), ("subscribe", 0, "/**"), ("connect", 0, {"socket": 1}), ("slow", 1, True),
          ("tell", "/lazy/a"), ("connect", 0, {"socket": 1, "patience": 4}), ("time", 3), ("time", 4)], {}),
        ([("handshake", False), ("subscribe", 0, "/**"), ("connect", 0, {"fate": "slow", "channels": ["/a"]}),
          ("tell", "/a"), ("connect", 0), ("settle", 0, True), ("connect", 0, {"channels": ["/a", "/lazy/a"]}),
          ("tell", "/lazy/a", "/lazy/b"), ("connect", 0), ("time", 0)], {}),
        ([("handshake", False), ("subscribe", 0, "/**"), ("tell", "/a"), ("connect", 0, {"fate": "slow"}),
          ("tell", "/a/b"), ("connect", 0, {"socket": 0}), ("stop",)], {}),
        ([("handshake", False), ("subscribe", 0, "/lazy/*"), ("handshake", True), ("connect", 1, {"socket": 0}),
          ("slow", 0, True), ("tell", "/lazy/b"), ("time", 4),
          ("connect", 0, {"socket": 0, "channels": ["/lazy/b", "/lazy/b", "/a"]}), ("time", 0)], {}),
    ], ids=["events-beside-a-refused-message-are-freed", "a-hold-ends-in-time-though-lazy-events-are-in-flight",
            "lazy-events-do-not-leave-in-the-place-of-others", "last-events-do-not-overtake-those-in-flight",
            "a-stream-brings-lazy-events-that-are-late"])
    def test_what_failed_once_is_right(self, history, options):
        play(history, **options)


# ======================================================================================
# §10  WebSocket frames
# ======================================================================================

class TestFrames:
    """RFC 6455 without input and output."""

    @for_each("size", [0, 1, 125, 126, 127, 65535, 65536])
    def test_every_size_is_read_and_written(self, size):
        payload = bytes(place % 251 for place in range(size))
        assert read(masked(BINARY_FRAME, payload)) == [(BINARY_FRAME, payload)]
        written = bayeux_server.frame(BINARY_FRAME, payload)
        head = len(written) - size
        assert head == (2 if size <= 125 else 4 if size <= 65535 else 10)
        length = written[1] if size <= 125 else int.from_bytes(written[2:head], "big")
        assert (written[0], length, written[head:]) == (0x82, size, payload)

    STREAM = (masked(TEXT_FRAME, "Grüße ☃ 😀".encode()) + masked(PING_FRAME, b"p")
              + masked(BINARY_FRAME, b"\0\xff" * 100)
              + fragments(TEXT_FRAME, b"a", b"", "é".encode()[:1], "é".encode()[1:])
              + masked(CLOSE_FRAME, b"\x03\xe8bye"))
    MESSAGES = ((TEXT_FRAME, "Grüße ☃ 😀"), (PING_FRAME, b"p"), (BINARY_FRAME, b"\0\xff" * 100),
                (TEXT_FRAME, "aé"), (CLOSE_FRAME, (1000, "bye")))

    def test_fed_whole(self):
        assert read(self.STREAM) == list(self.MESSAGES)

    def test_fed_byte_by_byte(self):
        assert read(*in_bytes(self.STREAM)) == list(self.MESSAGES)

    def test_a_frame_is_given_with_its_last_byte(self):
        reader = bayeux_server.FrameReader(100)
        *head, last = in_bytes(masked(TEXT_FRAME, b"now"))
        assert [list(reader.feed(byte)) for byte in head] == [[]] * len(head)
        assert list(reader.feed(last)) == [(TEXT_FRAME, "now")]

    def test_what_stands_behind_a_frame_waits(self):
        reader = bayeux_server.FrameReader(100)
        second = masked(TEXT_FRAME, b"second")
        assert list(reader.feed(masked(TEXT_FRAME, b"first") + second[:5])) == [(TEXT_FRAME, "first")]
        assert list(reader.feed(second[5:])) == [(TEXT_FRAME, "second")]

    @for_each("key", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\x00\x80\x7f", b"\0\0\0\1"])
    @for_each("size", [0, 1, 2, 3, 4, 5, 7, 8, 1001])
    def test_unmasking_undoes_masking(self, key, size):
        payload = bytes((7 * place) % 256 for place in range(size))
        assert bayeux_server.unmask(xor(payload, key), key) == payload

    def test_an_unmasked_frame_is_a_protocol_error(self):
        assert read(b"\x81\x02hi") == [1002]

    def test_fragments_make_one_message(self):
        assert read(fragments(BINARY_FRAME, b"ab", b"", b"c")) == [(BINARY_FRAME, b"abc")]

    def test_control_frames_come_between_fragments(self):
        data = (masked(TEXT_FRAME, b"a", is_final=False) + masked(PING_FRAME, b"1") + masked(PONG_FRAME)
                + masked(0, b"b"))
        assert read(data) == [(PING_FRAME, b"1"), (PONG_FRAME, b""), (TEXT_FRAME, "ab")]
        assert read(*in_bytes(data)) == [(PING_FRAME, b"1"), (PONG_FRAME, b""), (TEXT_FRAME, "ab")]

    @for_each("data", [
        masked(0, b"a"),                                                    # continues nothing
        masked(TEXT_FRAME, b"a") + masked(0, b"b"),                               # what was over
        masked(TEXT_FRAME, b"a", is_final=False) + masked(TEXT_FRAME, b"b"),            # begins in the middle
        masked(TEXT_FRAME, b"a", is_final=False) + masked(BINARY_FRAME, b"b", is_final=False),
    ])
    def test_fragments_out_of_turn_are_a_protocol_error(self, data):
        assert read(data)[-1] == 1002

    @for_each("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
    def test_an_undefined_opcode_is_a_protocol_error(self, opcode):
        assert read(masked(opcode)) == [1002]

    @for_each("reserved", [0x40, 0x20, 0x10, 0x70])
    @for_each("opcode", [TEXT_FRAME, PING_FRAME, CLOSE_FRAME])
    def test_reserved_bits_are_a_protocol_error(self, opcode, reserved):
        assert read(masked(opcode, b"", reserved=reserved)) == [1002]

    @for_each("opcode", [CLOSE_FRAME, PING_FRAME, PONG_FRAME])
    def test_a_control_frame_is_short_and_whole(self, opcode):
        payload = b"\x03\xe8" + b"x" * 123
        assert read(masked(opcode, payload))[0][0] == opcode
        assert read(masked(opcode, payload + b"x")) == [1002]
        assert read(masked(opcode, b"", is_final=False)) == [1002]

    def test_what_the_head_shows_to_be_wrong_needs_no_payload(self):
        assert read(masked(PING_FRAME, b"x" * 126)[:2]) == [1002]
        assert read(masked(TEXT_FRAME, b"x" * 200)[:4], max_size=199) == [1009]

    @for_each("data", [
        b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\xe2\x98", b"\x80", b"\xf0\x9f\x98"])
    def test_text_that_is_not_utf8_is_bad_data(self, data):
        assert read(masked(TEXT_FRAME, data)) == [1007]
        assert read(fragments(TEXT_FRAME, *in_bytes(data))) == [1007]

    def test_bad_utf8_is_found_before_the_message_is_complete(self):
        assert read(masked(TEXT_FRAME, b"\xce\xba\xff", is_final=False)) == [1007]

    def test_a_character_may_be_split_over_fragments(self):
        assert read(fragments(TEXT_FRAME, *in_bytes("é☃😀".encode()))) == [(TEXT_FRAME, "é☃😀")]
        beginning, end = masked(TEXT_FRAME, "☃".encode()[:2], is_final=False), masked(0, "☃".encode()[2:])
        assert read(beginning + masked(PING_FRAME) + end) == [(PING_FRAME, b""), (TEXT_FRAME, "☃")]

    def test_binary_is_anything(self):
        assert read(masked(BINARY_FRAME, b"\xff\xfe")) == [(BINARY_FRAME, b"\xff\xfe")]

    def test_messages_before_a_fault_are_given(self):
        assert read(masked(TEXT_FRAME, b"good") + masked(3)) == [(TEXT_FRAME, "good"), 1002]

    def test_a_message_is_at_most_max_size(self):
        assert read(masked(TEXT_FRAME, b"x" * 10), max_size=10) == [(TEXT_FRAME, "x" * 10)]
        assert read(masked(TEXT_FRAME, b"x" * 11), max_size=10) == [1009]

    def test_the_fragments_count_together(self):
        assert read(fragments(TEXT_FRAME, b"x" * 5, b"x" * 5), max_size=10) == [(TEXT_FRAME, "x" * 10)]
        assert read(fragments(TEXT_FRAME, b"x" * 5, b"x" * 6), max_size=10) == [1009]

    def test_the_size_is_counted_anew_for_each_message(self):
        data = masked(TEXT_FRAME, b"x" * 10) * 3 + masked(PING_FRAME, b"x" * 11)
        assert read(data, max_size=10)[-1] == (PING_FRAME, b"x" * 11)

    def test_a_monstrous_length_is_refused_at_once(self):
        assert read(b"\x82\xff" + b"\xff" * 8) == [1009]
        assert read(b"\x82\xff" + b"\x7f" + b"\xff" * 7) == [1009]

    def test_empty_fragments_do_not_fill_memory(self):
        reader = bayeux_server.FrameReader(100)
        list(reader.feed(masked(TEXT_FRAME, is_final=False) + masked(0, is_final=False) * 1000))
        kept = [value for value in (getattr(reader, name) for name in reader.__slots__) if isinstance(value, list)]
        assert sum(len(value) for value in kept) < 10
        assert list(reader.feed(masked(0, b"end"))) == [(TEXT_FRAME, "end")]

    @for_each("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999])
    def test_close_codes_that_may_be_sent(self, code):
        data = masked(CLOSE_FRAME, struct.pack("!H", code) + "Tschüs".encode())
        assert read(data) == [(CLOSE_FRAME, (code, "Tschüs"))]

    @for_each("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
    def test_close_codes_that_may_not(self, code):
        assert read(masked(CLOSE_FRAME, struct.pack("!H", code))) == [1002]

    def test_a_close_may_have_no_code(self):
        assert read(masked(CLOSE_FRAME)) == [(CLOSE_FRAME, (1005, ""))]
        assert read(masked(CLOSE_FRAME, b"\x03")) == [1002]

    def test_a_close_reason_is_utf8(self):
        assert read(masked(CLOSE_FRAME, b"\x03\xe8\xff")) == [1007]

    def test_close_frames_fit_and_stay_utf8(self):
        assert bayeux_server.close_frame(1000) == b"\x88\x02\x03\xe8"
        assert bayeux_server.close_frame(1005) == b"\x88\x00"
        assert bayeux_server.close_frame(1001, "bye") == b"\x88\x05\x03\xe9bye"
        for reason in ("x" * 200, "é" * 100, "x" + "é" * 100, "☃" * 60, "x😀" * 60):
            written = bayeux_server.close_frame(1002, reason)
            assert len(written) - 2 == written[1] <= 125
            assert written[1] > 120
            assert reason.startswith(written[4:].decode("utf-8"))

    def test_the_answer_to_the_key(self):
        assert bayeux_server.websocket_accept(SocketWire.KEY) == SocketWire.ACCEPT

    @for_each("seed", range(20))
    def test_any_messages_in_any_fragments_and_any_portions(self, seed):
        """Whatever is sent is read again, however it is cut."""
        chance = random.Random(seed)
        data, expected = b"", []
        for _ in range(30):
            opcode = chance.choice([TEXT_FRAME, BINARY_FRAME])
            text = "".join(chance.choice("aé☃😀\0\u2028") for _ in range(chance.choice([0, 3, 60, 400])))
            payload = text.encode("utf-8")
            cuts = sorted(chance.randint(0, len(payload)) for _ in range(chance.choice([0, 0, 1, 5])))
            pieces = [payload[start:end] for start, end in zip([0, *cuts], [*cuts, len(payload)])]
            for place, piece in enumerate(pieces):
                data += masked(0 if place else opcode, piece, place == len(pieces) - 1, chance.randbytes(4))
                if place < len(pieces) - 1 and chance.random() < 0.5:
                    control = chance.choice([PING_FRAME, PONG_FRAME]), bytes([place])
                    data += masked(*control)
                    expected.append(control)
            expected.append((opcode, text if opcode == TEXT_FRAME else payload))
        portions = []
        while data:
            size = chance.choice([1, 2, 7, 100, 5000])
            portions.append(data[:size])
            data = data[size:]
        assert read(*portions) == expected

    @for_each("seed", range(20))
    def test_noise_is_refused_or_waited_for(self, seed):
        """Nothing that comes makes the reader fail in any other way than by its own error."""
        chance = random.Random(seed)
        for _ in range(50):
            noise = bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
            beginning = bytes([chance.choice([0x01, 0x81, 0x02, 0x82, 0x88, 0x89]), 0x80 | chance.randrange(20)])
            for message in read(*in_bytes(beginning + noise), max_size=1000):
                assert isinstance(message, tuple) or message in (1002, 1007, 1009)


# ======================================================================================
# §11  Connections
# ======================================================================================

class Work:
    """Jobs for handler threads, each of which is done when the test says so."""

    def __init__(self, limit, **options):
        self.threads = bayeux_server.HandlerThreads(limit, logging.getLogger("bayeux_server"), **options)
        self.begun, self.refused, self.may_end = [], [], {}

    def add(self, name, address=None, may_be_refused=True):
        self.may_end[name] = threading.Event()

        def run():
            self.begun.append(name)
            assert self.may_end[name].wait(PATIENCE)

        self.threads.run(run, address, (lambda: self.refused.append(name)) if may_be_refused else None)

    def await_begun(self, *names):
        wait_until(lambda: len(self.begun) >= len(names), f"the beginning of {names}")
        assert sorted(self.begun) == sorted(names)

    def end(self, name):
        self.may_end[name].set()


@pytest.fixture
def work():
    """Makes handler threads: work(limit, ...)."""
    made = []

    def make(*arguments, **options):
        made.append(Work(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        for name in each.may_end:
            each.end(name)
        each.threads.stop()


FORKING_PROGRAM = """
import os, sys, time, warnings
from bayeux_server import BayeuxServer

warnings.simplefilter("ignore", DeprecationWarning)     # of a fork beside threads, which is what is tested here
server = BayeuxServer(port=0).start()
print(server.port, flush=True)
sys.stdin.readline()
child = os.fork()
if child == 0:
    time.sleep(1000)
print(child, flush=True)
sys.stdin.readline()
server.shutdown()
print("over", flush=True)
sys.stdin.readline()
"""


class TestConnections:
    """The leader, the handler threads, and sockets that are parked without a thread."""

    # -- Handler threads ---------------------------------------------------------------------

    def test_one_address_has_at_most_half_of_them(self, work):
        jobs = work(4)
        for number in range(4):
            jobs.add(f"a{number}", "a")
        jobs.await_begun("a0", "a1")
        jobs.add("b0", "b")
        jobs.await_begun("a0", "a1", "b0")
        jobs.end("a1")
        jobs.await_begun("a0", "a1", "b0", "a2")
        assert jobs.refused == []

    @for_each(("address", "options"), [("", {}), (None, {}), ("a", {"limits_addresses": False})])
    def test_who_has_no_limit_may_have_all(self, work, address, options):
        jobs = work(4, **options)
        for number in range(4):
            jobs.add(number, address)
        jobs.await_begun(0, 1, 2, 3)

    def test_the_lines_of_the_addresses_take_turns(self, work):
        jobs = work(1)
        for name in ("x", "a0", "a1", "a2", "b0", "c0"):
            jobs.add(name, name[0])
        expected = ["x", "a0", "b0", "c0", "a1", "a2"]
        for count, name in enumerate(expected, 1):
            wait_until(lambda count=count: len(jobs.begun) == count)
            jobs.end(name)
        assert jobs.begun == expected

    def test_while_none_becomes_free_what_can_be_refused_is(self, work, monkeypatch):
        jobs = work(2)
        jobs.add("a")
        jobs.add("b")
        jobs.add("early")
        jobs.add("callback", may_be_refused=False)
        jobs.await_begun("a", "b")
        jobs.threads.refuse_late()
        assert jobs.refused == []
        monkeypatch.setattr(bayeux_server, "STUCK_AFTER", -1)
        jobs.add("late")
        assert jobs.refused == ["late"]
        jobs.threads.refuse_late()
        assert jobs.refused == ["late", "early"]
        jobs.end("a")
        jobs.await_begun("a", "b", "callback")
        jobs.end("callback")
        wait_until(lambda: jobs.threads._idle)
        jobs.add("again")
        jobs.await_begun("a", "b", "callback", "again")

    def test_a_job_does_not_wait_for_ever_while_others_are_done(self, work, monkeypatch):
        """Its address has its half; the other threads are free."""
        jobs = work(4)
        for number in range(3):
            jobs.add(number, "a")
        jobs.await_begun(0, 1)
        monkeypatch.setattr(bayeux_server, "LONGEST_QUEUE", -1)
        jobs.threads.refuse_late()
        assert jobs.refused == [2]
        jobs.end(0)
        wait_until(lambda: jobs.threads._running["a"] == 1)
        assert jobs.begun in ([0, 1], [1, 0]) and not jobs.threads._waiting

    def test_a_quiet_time_is_not_taken_for_a_stuck_one(self, work):
        jobs = work(1)
        jobs.threads._last_change -= 1000
        jobs.add("first")
        jobs.add("second")
        jobs.threads.refuse_late()
        assert jobs.refused == []
        jobs.end("first")
        jobs.await_begun("first", "second")

    def test_where_no_thread_can_be_started_a_job_waits_for_one_that_there_is(self, work, monkeypatch, errors):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        jobs = work(3)
        jobs.add("first")
        jobs.await_begun("first")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            jobs.add("second")
        line, = errors.take()
        assert "no more handler threads than 1: can't start new thread" in line and jobs.begun == ["first"]
        jobs.end("first")
        jobs.await_begun("first", "second")

    def test_an_idle_thread_keeps_nothing_of_its_last_job(self, work):
        class Job:
            def run(self):
                pass

        jobs, job = work(1), Job()
        is_alive = weakref.ref(job)
        jobs.threads.run(job.run)
        del job
        wait_until(lambda: gc.collect() is None or is_alive() is None, "the end of the job")

    @for_each("fault", FAULTS)
    def test_a_job_that_fails_takes_no_thread_along(self, work, fault, errors):
        def fail():
            raise fault

        jobs = work(1)
        for _ in range(3):
            jobs.threads.run(fail)
        jobs.add("next")
        jobs.await_begun("next")
        assert len(errors.take()) == 3

    # -- Connections -------------------------------------------------------------------------

    def test_held_connects_cost_no_threads(self, server):
        threads_before = len(threads_of_servers())
        wires = [Wire(server) for _ in range(300)]
        try:
            for wire in wires:
                client_id = wire.post(HANDSHAKE)[0]["clientId"]
                wire.post(CorePeer.connect_message(client_id))
                wire.post({"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/all"})
                wire.send_post(CorePeer.connect_message(client_id))
            wait_until(lambda: sum(session.hold is not None for session in server.core.sessions.values()) == 300)
            assert len(threads_of_servers()) - threads_before <= 5
            server.publish("/all", "to everybody")
            for wire in wires:
                assert events_of(wire.read_answer().batch) == ["to everybody"]
            assert len(threads_of_servers()) - threads_before <= 5
        finally:
            for wire in wires:
                wire.close()

    def test_a_connection_serves_request_after_request(self, server):
        with Wire(server) as wire:
            for number in range(50):
                reply, = wire.post({**PING, "id": number})
                assert reply["id"] == number

    def test_pipelined_requests_are_answered_in_their_order(self, server):
        with Wire(server) as wire, bystander(server):
            wire.send(b"".join(whole_post({**PING, "id": number}) for number in range(100)))
            assert [wire.read_answer().batch[0]["id"] for _ in range(100)] == list(range(100))

    def test_pipelined_requests_of_all_kinds_are_answered_in_their_order(self, serve, tmp_path):
        """A file and a slow handler step aside; what stands behind them waits."""
        (tmp_path / "file.txt").write_text("file")
        is_free = threading.Event()

        def slow(request):
            is_free.wait(PATIENCE)
            return b"slow"

        server = serve(docroot=str(tmp_path), content_handlers={"/slow": slow})
        get = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with Wire(server) as wire, bystander(server):
            wire.send(get.format("/slow").encode() + whole_post() + get.format("/file.txt").encode() + whole_post())
            with Wire(server) as other:
                other.post(PING)
            is_free.set()
            assert wire.read_answer().body == b"slow"
            assert wire.read_answer().batch[0]["id"] == "p"
            assert wire.read_answer().body == b"file"
            assert wire.read_answer().batch[0]["id"] == "p"

    def test_a_second_request_behind_a_held_connect_releases_it_first(self, server):
        with Peer(server) as peer:
            peer.hold()
            peer.send_post({**PING, "id": "second"})
            connect, = peer.read_answer().batch
            assert (connect["channel"], connect["successful"]) == ("/meta/connect", True)
            assert peer.read_answer().batch[0]["id"] == "second"

    @for_each("tails", [[b"\r\n"], [b"", b"\r\n"], [b"", b"\r", b"\n"], [b"\r", b"\n\r\n"]])
    def test_an_empty_line_behind_a_connect_does_not_release_it(self, server, monkeypatch, tails):
        """Some old clients send one, which no length counts; it is no request."""
        with Peer(server) as peer:
            consume, heard = server.http.consume, []
            monkeypatch.setattr(server.http, "consume", lambda connection: (consume(connection), heard.append(1)))
            peer.subscribe("/a")
            peer.send(whole_post(CorePeer.connect_message(peer.id)) + tails[0])
            until_held(server, peer.id)
            for tail in tails[1:]:
                before = len(heard)
                peer.send(tail)
                wait_until(lambda before=before: len(heard) > before, "the arrival of the tail")
            peer.publish("/a", "x")
            assert events_of(peer.read_answer().batch) == ["x"]
            peer.send(whole_post())
            assert peer.read_answer().batch[0]["id"] == "p"

    def test_a_connect_with_a_request_behind_it_is_not_held(self, server):
        with Peer(server) as peer:
            peer.send(whole_post(CorePeer.connect_message(peer.id, id="first")) + whole_post({**PING, "id": "second"}))
            assert peer.read_answer().batch[0]["id"] == "first"
            assert peer.read_answer().batch[0]["id"] == "second"

    @for_each("hang_up", [socket.socket.close, reset], ids=["close", "reset"])
    def test_events_for_a_connect_that_hung_up_wait_for_the_next(self, server, hang_up):
        """Nothing is lost, the subscriptions neither."""
        with Peer(server) as peer:
            peer.subscribe("/news")
            peer.hold()
            hang_up(peer.socket)
            until_held(server, peer.id, is_over=True)
            server.publish("/news", 1)
            server.publish("/news", 2)
            assert events_of(peer.side.post(CorePeer.connect_message(peer.id))) == [1, 2]

    def test_a_publisher_may_hang_up_at_once(self, server):
        with Peer(server) as peer:
            peer.subscribe("/news")
            with Wire(server) as wire:
                client_id = wire.post(HANDSHAKE)[0]["clientId"]
                wire.send_post({"channel": "/news", "data": "last words", "clientId": client_id})
            assert peer.connect().data == ["last words"]

    @for_each("subscribers", [2, 40])
    def test_who_reads_a_publish_delivers_it(self, serve, subscribers):
        """Issue 5: to few before the reply, to many behind it; the wait's thread is not needed for it."""
        server = serve(client_max_connections=0)
        with ExitStack() as stack:
            peers = [stack.enter_context(Peer(server)) for _ in range(subscribers)]
            for peer in peers:
                peer.subscribe("/a")
                peer.send_connect()
            wait_until(lambda: all(session.hold for session in server.sessions), "the held connects")
            server._wait.stop()
            peers[0].publish("/a", "event")
            for peer in peers:
                assert [event["data"] for event in peer.read_answer().batch[1:]] == ["event"]

    def test_what_a_request_published_leaves_before_a_service_that_it_calls_returns(self, serve):
        """Issue 5: the thread that would deliver it runs the application's code."""
        may_return = threading.Event()
        server = serve(services={"slow": lambda message: may_return.wait(PATIENCE) and None}, max_threads=2)
        with Peer(server) as subscriber, Peer(server) as peer:
            subscriber.subscribe("/a")
            subscriber.send_connect()
            wait_until(lambda: any(session.hold for session in server.sessions), "the held connect")
            mine = {"clientId": peer.id}
            peer.side.send_post({"channel": "/a", "data": "event", **mine}, {"channel": "/service/slow", **mine})
            assert [event["data"] for event in subscriber.read_answer().batch[1:]] == ["event"]
            may_return.set()
            assert [reply["successful"] for reply in peer.side.read_answer().batch] == [True, True]

    @for_each("place", ["message_acl", "service", "content_handler", "post_handle"])
    def test_slow_code_of_the_application_holds_up_nobody_else(self, serve, place):
        has_begun, is_free = threading.Semaphore(0), threading.Event()

        def slow(*arguments):
            if place == "message_acl" and arguments[1]["channel"] != "/service/slow":
                return None
            has_begun.release()
            assert is_free.wait(PATIENCE)
            return b"slow" if place == "content_handler" else None

        server = serve(**{"message_acl": {"message_acl": slow, "services": {"slow": lambda message: None}},
                          "service": {"services": {"slow": slow}},
                          "content_handler": {"content_handlers": {"/slow": slow}},
                          "post_handle": {"post_handle": slow}}[place])
        wires = [Wire(server) for _ in range(12)]
        try:
            with bystander(server), Peer(server) as peer:
                for wire in wires:
                    if place in ("content_handler", "post_handle"):
                        wire.send_request("GET", "/slow")
                    else:
                        wire.send_post({"channel": "/service/slow", "clientId": peer.id})
                for _ in wires:
                    assert has_begun.acquire(timeout=PATIENCE)
                peer.subscribe("/round/trip")
                peer.publish("/round/trip", "quick")
                assert peer.connect().data == ["quick"]
            is_free.set()
            for wire in wires:
                assert wire.read_answer().status == (404 if place == "post_handle" else 200)
        finally:
            is_free.set()
            for wire in wires:
                wire.close()

    def test_a_request_that_does_not_arrive_in_time_gets_408(self, serve):
        """However little or much of it has come; and without a thread that waits for it."""
        beginnings = [b"P", b"POST /cometd HTTP/1.1\r\nHost: a\r\n", raw_post(b"[", "Content-Length: 100"),
                      raw_post(b"5\r\n[", "Transfer-Encoding: chunked"), whole_post() + b"GET /"]
        server = serve(request_timeout=0.4)
        with bystander(server):
            threads_before = len(threads_of_servers())
            wires = [Wire(server) for _ in beginnings]
            for wire, beginning in zip(wires, beginnings):
                wire.send(beginning)
            assert wires[-1].read_answer().status == 200
            for wire in wires:
                answer = wire.read_answer()
                assert answer.status == 408
                assert is_bayeux_failure(answer)
                assert wire.is_closed_by_server()
                wire.close()
            assert len(threads_of_servers()) <= threads_before

    def test_a_trickle_does_not_buy_a_request_more_time(self, serve):
        server = serve(request_timeout=0.4)
        with bystander(server), Wire(server) as wire:
            wire.socket.settimeout(0.01)
            wire.send("POST /cometd HTTP/1.1\r\nX: ")
            limit = time.monotonic() + PATIENCE
            answer = b""
            while not answer:
                assert time.monotonic() < limit
                try:
                    answer = wire.socket.recv(65536)
                except OSError:         # nothing came yet (a socket.timeout, in Python 3.9 no TimeoutError)
                    wire.send(b"x")
            assert answer.startswith(b"HTTP/1.1 408 ")

    def test_a_connection_that_says_nothing_is_closed_without_a_word(self, serve):
        server = serve(request_timeout=0.4)
        with bystander(server), Wire(server) as wire:
            assert wire.is_closed_by_server()

    def test_an_idle_connection_is_closed_after_keep_alive(self, serve, monkeypatch):
        server = serve(request_timeout=1)       # which sets how often the server looks
        with Wire(server) as wire, bystander(server):
            monkeypatch.setattr(bayeux_server, "KEEP_ALIVE", 0.1)
            wire.post(PING)
            assert wire.is_closed_by_server()

    def test_a_connection_is_looked_at_once_a_round_however_often_it_was_resumed(self, server, monkeypatch):
        """One that has more to read resumes itself with each look; two such entries would be four, and then all there is."""
        looks, may_go_on = [], threading.Event()
        look_again = server.watch._look_again
        with Wire(server) as wire:
            wire.post(PING)
            connection, = server.watch.connections
            monkeypatch.setattr(server.watch, "_look_again", lambda each: (looks.append(each), look_again(each)))
            server.watch.do_soon(lambda: may_go_on.wait(PATIENCE))
            for _ in range(100):
                server.watch.resume(connection)
            may_go_on.set()
            wait_until(lambda: looks and not server.watch._resumed, "the look")
            assert wire.post(PING)[0]["successful"]
        assert looks.count(connection) <= 3         # the rounds before and behind the one that was held up

    def test_tiny_chunks_are_read_a_few_at_a_time(self, server, monkeypatch):
        """64 KiB of them take 50 ms to read; so others have their turn in between, and it is read all the same."""
        monkeypatch.setattr(bayeux_server, "CHUNK_PARTS_AT_ONCE", 30)
        feeds = []
        feed = bayeux_server.ChunkedBody.feed
        monkeypatch.setattr(bayeux_server.ChunkedBody, "feed", lambda body, data: (feeds.append(1), feed(body, data))[1])
        body = json.dumps([PING] * 100).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        with Wire(server) as wire:
            wire.send(raw_post(chunks, "Transfer-Encoding: chunked") + whole_post({**PING, "id": "next"}))
            assert len(wire.read_answer().batch) == 100
            assert wire.read_answer().batch[0]["id"] == "next"
        assert len(feeds) >= 3 * len(body) // 30

    def test_a_line_end_at_the_beginning_of_what_has_come_of_a_body_belongs_to_it(self, server):
        with Wire(server) as wire:
            body = b" \r\n" + json.dumps([PING]).encode()
            request = raw_post(body, f"Content-Length: {len(body)}")
            wire.send(request[:-len(body) + 1])
            wait_until(lambda: any(each.request for each in list(server.watch.connections)), "the first byte of the body")
            wire.send(request[-len(body) + 1:])
            assert wire.read_answer().batch[0]["successful"]

    def fill(self, server, peer, wire=None, number=60):
        """Queue more for the peer than sockets buffer, then connect without reading."""
        make_buffers_small(server, wire or peer)
        peer.subscribe("/big")
        for each in range(number):
            server.publish("/big", f"{each}:" + "x" * 100_000)
        peer.send_connect()
        wait_until(lambda: has_unsent_output(server), "output that waits")

    @staticmethod
    def fetch(peer, number):
        """So many events, with as many connects as they take, each answered with 1 MiB at most."""
        events = []
        while len(events) < number:
            answer = peer.side.request("POST", peer.side.path, json.dumps(CorePeer.connect_message(peer.id)).encode())
            assert len(answer.body) < bayeux_server.MAX_ANSWER + 1000
            events += events_of(answer.batch)
        return [data.split(":")[0] for data in events]

    def test_a_slow_reader_gets_everything_and_holds_up_nobody(self, server):
        """What the socket does not take waits in the connection's buffer."""
        with bystander(server), Peer(server) as peer:
            self.fill(server, peer)
            server.publish("/big", "later")
            with bystander(server):
                pass
            first = events_of(peer.read_answer().batch)
            assert [data.split(":")[0] for data in first] == [str(number) for number in range(10)]
            assert all(len(data) > 100_000 for data in first)
            assert self.fetch(peer, 51) == [str(number) for number in range(10, 60)] + ["later"]

    def test_what_wakes_the_leader_is_read_under_its_lock(self, server, monkeypatch):
        """Or a thread that comes between the reading and the noting would find the leader awake, which then sleeps."""
        class Guarded:
            def fileno(self):
                return woken.fileno()

            def recv(self, size):
                assert server.watch._waking_lock.locked()
                heard.append(size)
                return woken.recv(size)

            def close(self):
                woken.close()

        woken, heard = server.watch._woken, []
        monkeypatch.setattr(server.watch, "_woken", Guarded())
        server.watch.wake()
        wait_until(lambda: heard, "the reading")

    def test_who_takes_in_nothing_is_hung_up_on_and_loses_nothing(self, serve):
        """An answer that could not be written puts its events back in front."""
        server = serve(request_timeout=0.4)
        with bystander(server), Peer(server) as peer:
            self.fill(server, peer)
            server.publish("/big", "later")
            wait_until(lambda: not has_unsent_output(server), "the hang-up")
            assert self.fetch(peer, 61) == [str(number) for number in range(60)] + ["later"]

    @for_each("transport", ["long-polling", "websocket", "eventsource"])
    def test_no_protocol_lifts_the_deadline_of_waiting_output(self, serve, transport):
        """A client that sends now and then, and reads nothing, is hung up on all the same."""
        server = serve(request_timeout=0.4)
        with ExitStack() as stack:
            peer = stack.enter_context(SocketPeer(server) if transport == "websocket" else Peer(server))
            wire = stack.enter_context(EventWire(server, peer.id)) if transport == "eventsource" else peer
            self.fill(server, peer, wire) if transport != "websocket" else self.fill_socket(server, peer)
            connection, = [each for each in list(server.watch.connections) if each.output]
            connection.deadline = float("inf")
            limit = time.monotonic() + PATIENCE
            while has_unsent_output(server):
                assert time.monotonic() < limit, "the connection is kept"
                connection.deadline = float("inf")
                with suppress(OSError):
                    wire.send(b"\r\n" if transport != "websocket" else masked(PING_FRAME))
                time.sleep(0.005)

    @staticmethod
    def fill_socket(server, peer):
        make_buffers_small(server, peer)
        peer.subscribe("/big")
        for _ in range(60):
            server.publish("/big", "x" * 100_000)
        wait_until(lambda: has_unsent_output(server), "output that waits")

    def test_who_hangs_up_in_the_middle_of_an_answer_loses_nothing(self, server):
        """And long before request_timeout."""
        with bystander(server), Peer(server) as peer:
            self.fill(server, peer)
            reset(peer.socket)
            wait_until(lambda: not server.core.sessions[peer.id].in_flight, "the return of the events")
            assert self.fetch(peer, 60) == [str(number) for number in range(60)]

    def test_answers_that_nobody_reads_stop_the_reading_of_requests(self, serve):
        calls = []

        def big(message):
            calls.append(message["id"])
            return {"data": "x" * 1_000_000}

        server = serve(services={"big": big}, anon_publish=True)
        with bystander(server), Wire(server) as wire:
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            wire.send(b"".join(whole_post({"channel": "/service/big", "id": number}) for number in range(40)))
            wait_until(lambda: has_unsent_output(server), "output that waits")
            assert len(calls) < 30
            assert [wire.read_answer().batch[0]["id"] for _ in range(40)] == list(range(40))

    def test_without_file_descriptors_those_who_are_connected_go_on(self, server, errors):
        """One error line now and then, no storm of them; whoever waits is served when there is room."""
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = [socket.socket() for _ in range(3)]
        with Peer(server) as peer:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
                for each in waiting:
                    each.connect(("127.0.0.1", server.port))
                wait_until(lambda: errors.records, "an error in the log")
                for _ in range(100):
                    assert peer.poll().data == []
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            logged = errors.take()
            assert len(logged) < 20
            for each in waiting:
                each.settimeout(PATIENCE)
                each.sendall(whole_post())
                assert each.recv(65536).startswith(b"HTTP/1.1 200 ")
                each.close()
        errors.take()

    # -- Output ------------------------------------------------------------------------------
    # What a connection says of the frames that waited for a slow peer.

    class Watch:
        patience = 30

        def __init__(self):
            self.bodies = []                    # those of which it was to have more read

        def resume(self, connection):
            """Nobody watches: the test flushes."""

        def read_body(self, connection):
            self.bodies.append(connection.source)

    class Protocol:
        def lost(self, connection):
            """Nobody is told."""

    def test_each_frame_is_told_of_by_itself(self):
        """What left whole before a hang-up does not come again"""
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        peers.setblocking(False)
        connection, told = bayeux_server.Connection(ours, "", self.Watch(), self.Protocol()), []
        frames = [bytes([number]) * 1_000_000 for number in range(3)]
        for number, data in enumerate(frames):
            assert connection.push(data, when_written=lambda is_written, number=number: told.append(
                (number, is_written))) is None
        received = b""
        while told != [(0, True)]:
            received += peers.recv(100_000)
            connection.flush()
        assert received == frames[0][:len(received)]
        connection.close()
        peers.close()
        assert told == [(0, True), (1, False), (2, False)]

    @staticmethod
    def full_connection():
        """A connection whose socket takes nothing more, and the peer's end of it."""
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        peers.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(b"x" * 100_000)
        return bayeux_server.Connection(ours, "", TestConnections.Watch(), TestConnections.Protocol()), peers

    @staticmethod
    def drain(peers):
        received = b""
        with suppress(BlockingIOError):
            while True:
                received += peers.recv(1_000_000)
        return received

    def test_a_100_continue_that_had_to_wait_does_not_end_the_exchange(self):
        """Its answer is still to come."""
        connection, peers = self.full_connection()
        connection.exchange = "a request"
        connection.push_interim(b"100")
        assert connection.output
        self.drain(peers)
        connection.flush()
        assert self.drain(peers) == b"100" and not connection.output
        assert connection.exchange == "a request"
        assert connection.write(b"answer") is True and connection.exchange is None
        assert self.drain(peers) == b"answer"
        connection.close()
        peers.close()

    def test_an_answer_behind_a_100_continue_that_had_to_wait_ends_the_exchange(self):
        connection, peers = self.full_connection()
        connection.exchange = "a request"
        connection.push_interim(b"100")
        assert connection.write(b"answer") is None and connection.exchange is not None
        self.drain(peers)
        connection.flush()
        assert self.drain(peers) == b"100answer" and connection.exchange is None
        connection.close()
        peers.close()

    def test_a_body_is_read_on_by_one_thread_at_a_time(self):
        """The thread that has written its beginning may not be done with the connection yet."""
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        connection, source = bayeux_server.Connection(ours, "", self.Watch(), self.Protocol()), object()
        connection.exchange, connection.is_handled = "request", True
        assert connection.write(b"beginning", source) is None
        connection.flush()
        assert connection.watch.bodies == [] and connection.source is source
        connection.is_handled = False
        connection.flush()
        assert connection.watch.bodies == [source] and peers.recv(100) == b"beginning"
        ours.close()
        peers.close()

    def test_what_is_pushed_behind_waiting_output_stays_behind(self):
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        connection = bayeux_server.Connection(ours, "", self.Watch(), self.Protocol())
        assert connection.push(b"a" * 1_000_000) is None
        assert connection.push(b"b") is None
        received = b""
        while len(received) < 1_000_001:
            connection.flush()
            received += peers.recv(100_000)
        assert received == b"a" * 1_000_000 + b"b"
        assert connection.push(b"c") is True
        assert peers.recv(10) == b"c"
        connection.close()
        peers.close()
        assert connection.push(b"d") is False

    # -- Small buffers -----------------------------------------------------------------------
    # The system takes a few KiB at a time, so that nearly everything leaves in parts.

    @pytest.fixture(params=[4, 16, 64, "TLS"])
    def serve_narrow(self, request, serve):
        """Starts servers whose sockets take so many KiB at a time; serve_narrow.tls is for their clients."""
        def start(**options):
            if start.tls is not None:
                cert, key = request.getfixturevalue("certificate")
                options = {"tls_cert": cert, "tls_key": key, **options}
            server = serve(**options)
            size = 4 if start.tls is not None else request.param
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size * 1024)      # its clients' inherit it
            return server

        start.tls = request.getfixturevalue("tls") if request.param == "TLS" else None
        return start

    NUMBERS = b"".join(b"%07d\n" % number for number in range(100_000))

    def test_files_and_bodies_arrive_whole_and_in_their_order(self, serve_narrow, site):
        """Each part waits until the one before has left; the requests behind them wait, too."""
        (site / "big.bin").write_bytes(self.NUMBERS)
        bodies = []

        def body(request):
            bodies.append(io.BytesIO(self.NUMBERS))
            return bayeux_server.Response(bodies[-1], length=len(self.NUMBERS))

        server = serve_narrow(docroot=str(site), content_handlers={"/body": body, "/text": lambda _: self.NUMBERS})
        with bystander(server, serve_narrow.tls), Wire(server, serve_narrow.tls) as wire:
            for target in ("/big.bin", "/body", "/text", "/digits.txt"):
                wire.send_request("GET", target)
            wait_until(lambda: has_unsent_output(server), "output that waits")
            with bystander(server, serve_narrow.tls):
                assert bodies == [], "the second request was begun before the first was answered"
            for _ in range(3):
                assert wire.read_answer().body == self.NUMBERS
            assert wire.read_answer().body == b"0123456789"
            wait_until(lambda: not has_unsent_output(server), "the end of the output")
            assert bodies[0].closed and [each.unsent for each in server.watch.connections if each.unsent] == []

    @for_each("transport", ["long-polling", "callback-polling", "websocket", "eventsource"])
    def test_a_slow_reader_gets_each_event_once_and_in_order(self, serve_narrow, transport):
        server, tls, sent = serve_narrow(), serve_narrow.tls, [[number, "x" * 9_000] for number in range(60)]
        with ExitStack() as stack:
            peer = stack.enter_context(SocketPeer(server, tls) if transport == "websocket" else Peer(server, tls))
            wire = stack.enter_context(EventWire(server, peer.id, tls)) if transport == "eventsource" else peer
            peer.subscribe("/a")
            for data in sent:
                server.publish("/a", data)
            if transport == "long-polling":
                peer.send_connect()
            elif transport == "callback-polling":
                wire.send_request("GET", jsonp_target(CorePeer.connect_message(peer.id)), **OWN_PAGE)
            wait_until(lambda: has_unsent_output(server), "output that waits")
            with bystander(server, tls):
                pass
            if transport == "long-polling":
                received = events_of(wire.read_answer().batch)
            elif transport == "callback-polling":
                received = events_of(script_batch(wire.read_answer()))
            else:
                received = wire.receive(len(sent))
            assert received == sent

    @for_each("end", ["the client resets", "the client takes in nothing", "the server stops"])
    @for_each("path", ["/big.bin", "/body"])
    def test_what_is_half_sent_is_closed_with_its_connection(self, serve, site, monkeypatch, path, end):
        (site / "big.bin").write_bytes(self.NUMBERS)
        opened, open_file = [], bayeux_server.open_file

        def note(file):
            opened.append(file)
            return file

        monkeypatch.setattr(bayeux_server, "open_file", lambda *arguments: note(open_file(*arguments)))
        server = serve(docroot=str(site), grace=0.1, request_timeout=0.4 if "nothing" in end else 30,
                       content_handlers={"/body": lambda request: bayeux_server.Response(
                           note(io.BytesIO(self.NUMBERS)), length=len(self.NUMBERS))})
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with Wire(server) as wire:
            wire.send_request("GET", path)
            wait_until(lambda: has_unsent_output(server), "output that waits")
            if end == "the client resets":
                reset(wire.socket)
            elif end == "the server stops":
                server.shutdown()
            file, = opened
            wait_until(lambda: file.closed, "the end of the file")

    def test_a_body_is_closed_though_its_client_was_gone_before_its_first_byte(self, serve):
        begun, may_return, body = threading.Event(), threading.Event(), io.BytesIO(self.NUMBERS)

        def answer(request):
            begun.set()
            assert may_return.wait(PATIENCE)
            return bayeux_server.Response(body, length=len(self.NUMBERS))

        with Wire(serve(content_handlers={"/body": answer})) as wire:
            wire.send_request("GET", "/body")
            assert begun.wait(PATIENCE)
            reset(wire.socket)
            may_return.set()
            wait_until(lambda: body.closed, "the end of the body")

    @contextmanager
    def troubled(self, *troubles):
        """A connection whose next sends raise these, where they are not None; and its peer's end."""
        class Troubled(bayeux_server.Connection):
            def send(self, data):
                trouble = left.pop(0) if left else None
                if trouble is not None:
                    raise trouble
                return super().send(data)

        left = list(troubles)
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        peers.settimeout(PATIENCE)
        connection = Troubled(ours, "", self.Watch(), self.Protocol())
        connection.exchange = "request"
        yield connection, peers
        connection.close()
        peers.close()

    @for_each("blocked", [BlockingIOError, InterruptedError, ssl.SSLWantReadError,
                                         ssl.SSLWantWriteError])
    @for_each("way", ["write", "push"])
    def test_what_a_socket_does_not_take_at_all_leaves_later(self, way, blocked):
        told = []
        with self.troubled(blocked, blocked) as (connection, peers):
            assert getattr(connection, way)(b"answer", when_written=told.append) is None
            connection.flush()
            assert (told, connection.unsent, connection.exchange) == ([], 6, "request")
            connection.flush()
            assert (told, connection.unsent, connection.exchange) == ([True], 0, None)
            assert peers.recv(100) == b"answer"

    def test_nothing_overtakes_what_waits(self):
        """The socket may have room again before the leader has seen it."""
        with self.troubled(BlockingIOError) as (connection, peers):
            assert connection.push(b"first, ") is None
            assert connection.push(b"second, ") is None
            assert connection.write(b"third") is None
            connection.flush()
            assert peers.recv(100) == b"first, second, third"

    @for_each("fault", [BrokenPipeError, ConnectionResetError, OSError(errno.ENOBUFS, "no room"),
                                       ssl.SSLEOFError], ids=["pipe", "reset", "no room", "TLS"])
    @for_each("way", ["write", "push", "flush"])
    def test_a_socket_that_breaks_while_it_is_sent_to_is_hung_up(self, way, fault):
        """Whoever waits for the outcome hears of it once; the leader closes."""
        told, resumed = [], []
        with self.troubled(*[BlockingIOError] * (way == "flush"), fault) as (connection, peers):
            connection.watch.resume = resumed.append
            is_written = getattr(connection, "write" if way == "flush" else way)(b"answer", when_written=told.append)
            if way == "flush":
                connection.flush()
            assert (is_written, told) == ((None, [False]) if way == "flush" else (False, []))
            assert peers.recv(100) == b"" and connection in resumed
            assert not connection.is_closed and (connection.unsent, list(connection.output)) == (0, [])

    @for_each(("kind", "method"), [
        (bayeux_server.HttpExchange, "pack"), (bayeux_server.HttpExchange, "send"), (bayeux_server.WebSocket, "pack"),
        (bayeux_server.WebSocket, "feed"), (bayeux_server.SocketExchange, "pack"),
        (bayeux_server.SocketExchange, "send"), (bayeux_server.EventStream, "pack"),
        (bayeux_server.EventStream, "feed")], ids=lambda each: each if isinstance(each, str) else each.__name__)
    def test_who_cannot_be_answered_is_hung_up_on(self, server, errors, monkeypatch, kind, method):
        """It would wait for ever."""
        whole = getattr(kind, method)

        def fail(exchange, answer, *arguments):
            if "/fails" in answer.batch():
                raise RuntimeError("injected")
            return whole(exchange, answer, *arguments)

        monkeypatch.setattr(kind, method, fail)
        is_socket = kind in (bayeux_server.WebSocket, bayeux_server.SocketExchange)
        with ExitStack() as stack:
            stack.enter_context(bystander(server))
            peer = stack.enter_context(SocketPeer(server) if is_socket else Peer(server))
            wire = stack.enter_context(EventWire(server, peer.id)) if kind is bayeux_server.EventStream else peer
            if kind is bayeux_server.SocketExchange:
                peer.send_batch({"channel": "/fails", "clientId": peer.id, "data": 1})
            else:
                if kind is bayeux_server.HttpExchange:
                    peer.send_connect()
                    wait_until(lambda: is_held(server, peer.id), "the hold of the connect")
                server.client_push(peer.id, "/fails", 1)
            while wire.socket.recv(1000):
                pass
        line, = errors.take()
        assert "injected" in line

    @for_each("is_resumed", [False, True], ids=["at once", "resumed"])
    @for_each("is_streaming", [False, True], ids=["HTTP", "WebSocket"])
    def test_what_comes_while_a_handler_thread_has_the_connection_waits(self, serve, is_streaming, is_resumed):
        """It is not even read, though the leader looks at the connection; and it is answered behind the first."""
        begun, may_return = threading.Event(), threading.Event()

        def slow(message):
            begun.set()
            assert may_return.wait(PATIENCE)

        server = serve(services={"slow": slow})
        with ExitStack() as stack:
            fed = stack.enter_context(SocketPeer(server) if is_streaming else Peer(server))
            call = {"channel": "/service/slow", "clientId": fed.id, "id": "first"}
            fed.send_batch(call) if is_streaming else fed.send(whole_post(call))
            assert begun.wait(PATIENCE)
            connection, = [each for each in server.watch.connections if each.is_handled]
            if is_resumed:
                server.watch.resume(connection)
            if is_streaming:
                server.client_push(fed.id, "/b", "event")
                assert fed.receive(1) == ["event"]
                fed.send_batch({**PING, "id": "second"})
            else:
                second = whole_post({**PING, "id": "second"})
                fed.send(second[:50])
                fed.send(second[50:])
            for _ in range(2):                  # the leader goes round meanwhile
                with bystander(server):
                    pass
            assert (connection.input, connection.watched) == (b"", 0)
            may_return.set()
            batches = [fed.read_batch() if is_streaming else fed.read_answer().batch for _ in range(2)]
            assert [reply["id"] for batch in batches for reply in batch] == ["first", "second"]

    @for_each("kind", [bayeux_server.HttpTransport, bayeux_server.WebSocket, bayeux_server.EventStream])
    def test_a_protocol_that_fails_loses_its_connection_only(self, server, errors, monkeypatch, kind):
        """It fails once: it does not get the same bytes again."""
        with bystander(server), Peer(server) as peer:
            wire = (EventWire(server, peer.id) if kind is bayeux_server.EventStream
                    else SocketWire(server) if kind is bayeux_server.WebSocket else Wire(server))
            consume = kind.consume

            def fail(protocol, connection):
                if b"fail" in connection.input:
                    raise RuntimeError("injected")
                consume(protocol, connection)

            monkeypatch.setattr(kind, "consume", fail)
            wire.send(b"fail")
            while wire.socket.recv(1000):
                pass
            assert peer.ask("/a", data=1)["successful"]         # the leader has gone round
            wire.close()
        line, = errors.take()
        assert "injected" in line

    @for_each("comes", [True, False], ids=["the body comes", "it does not"])
    def test_behind_a_100_continue_that_had_to_wait_the_body_has_its_time(self, serve, monkeypatch, comes):
        server, blocked, send = serve(request_timeout=0.4), [], bayeux_server.Connection.send

        def block_once(connection, data):
            if not blocked and bytes(data).startswith(b"HTTP/1.1 100 "):
                blocked.append(bytes(data))
                raise BlockingIOError
            return send(connection, data)

        monkeypatch.setattr(bayeux_server.Connection, "send", block_once)
        body = json.dumps([PING]).encode()
        with Wire(server) as wire:
            wire.post(PING)                     # or the time of a new connection would be running
            wire.send(raw_post(body[:1], f"Content-Length: {len(body)}", "Expect: 100-continue"))
            assert wire.read_answer().status == 100 and blocked
            if comes:
                wire.send(body[1:])
            assert wire.read_answer().status == (200 if comes else 408)

    def test_an_idle_server_does_nothing(self, serve, monkeypatch):
        """Though clients wait, read nothing, or send what is not read yet.  The control is a thread that is busy."""
        begun, may_return, sweeps = threading.Event(), threading.Event(), threading.Semaphore(0)
        server = serve(services={"slow": lambda message: begun.set() or may_return.wait(PATIENCE) and None},
                       content_handlers={"/text": lambda request: self.NUMBERS}, request_timeout=2)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sweep = server.watch._sweep

        def cost(wait):
            """Seconds of the processor for a second on the clock, from one sweep to the next."""
            sweeps.acquire(timeout=PATIENCE)
            cpu, clock = time.process_time(), time.monotonic()
            wait()
            return (time.process_time() - cpu) / (time.monotonic() - clock)

        def spin():
            while not sweeps.acquire(blocking=False):
                pass

        with Wire(server) as slow_reader, Wire(server), SocketPeer(server), Peer(server) as peer, \
                EventWire(server, peer.id), bystander(server):
            slow_reader.send_request("GET", "/text")
            slow_reader.send_post(PING)
            peer.side.send_post({"channel": "/service/slow", "clientId": peer.id})
            peer.side.send_post(PING)
            assert begun.wait(PATIENCE)
            wait_until(lambda: has_unsent_output(server), "output that waits")
            monkeypatch.setattr(server.watch, "_sweep", lambda: (sweep(), sweeps.release()))
            idle = cost(lambda: sweeps.acquire(timeout=PATIENCE))
            busy = cost(spin)
            may_return.set()
        assert 10 * idle < busy

    def test_no_time_of_a_client_runs_while_the_server_has_its_request(self, serve, monkeypatch):
        """A held connect and a slow answer outlive any deadline; a connection without a request does not."""
        later = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + 1000})
        begun, may_return = threading.Event(), threading.Event()
        server = serve(content_handlers={"/slow": lambda request: begun.set() or may_return.wait(PATIENCE) and "late"})
        with Wire(server) as slow, Wire(server) as idle, Peer(server) as peer:
            idle.post(PING)
            peer.subscribe("/a")
            peer.send_connect()
            wait_until(lambda: is_held(server, peer.id), "the hold of the connect")
            slow.send_request("GET", "/slow")
            assert begun.wait(PATIENCE)
            monkeypatch.setattr(bayeux_server, "time", later)
            assert idle.is_closed_by_server()
            server.publish("/a", "event")
            assert events_of(peer.read_answer().batch) == ["event"]
            may_return.set()
            assert slow.read_answer().body == b"late"

    def test_a_stream_that_was_closed_is_hung_up_after_linger(self, serve, monkeypatch):
        """A peer that does not answer the close frame is not asked whether it is still there."""
        monkeypatch.setattr(bayeux_server, "LINGER", 0.1)
        server = serve(request_timeout=0.4)
        with SocketWire(server) as wire:
            wire.send_frame(BINARY_FRAME, b"x")
            assert wire.read_frame()[0] == CLOSE_FRAME
            wait_until(lambda: not server.watch.connections, "the end of the connection")

    def test_a_body_has_request_timeout_on_a_kept_connection_too(self, serve):
        server = serve(request_timeout=0.4)
        for beginning in (raw_post(b"[", "Content-Length: 100"), raw_post(b"5\r\n[", "Transfer-Encoding: chunked")):
            with Wire(server) as wire:
                wire.post(PING)
                wire.send(beginning)
                assert wire.read_answer().status == 408

    # -- Limits ------------------------------------------------------------------------------
    # So much at once, before others have their turn; and so many seconds.

    def test_sixteen_requests_of_a_connection_are_handled_at_once(self, server, monkeypatch):
        counts, is_sent, http = [], threading.Event(), server.http
        consume, respond = http.consume, http._respond

        def count(*arguments):
            counts[-1] += 1
            respond(*arguments)

        with Wire(server) as wire:
            wire.post(PING)
            monkeypatch.setattr(http, "consume", lambda connection: (counts.append(0), consume(connection)))
            monkeypatch.setattr(http, "_respond", count)
            server.watch.do_soon(lambda: is_sent.wait(PATIENCE))
            wire.send(whole_post() * 40)
            is_sent.set()
            for _ in range(40):
                assert wire.read_answer().status == 200
        assert [each for each in counts if each] == [16, 16, 8]

    def test_sixteen_parts_of_an_output_are_written_at_once(self):
        with self.troubled(BlockingIOError) as (connection, peers):
            for number in range(40):
                assert connection.push(b"%02d" % number) is None
            waiting = []
            while connection.output:
                connection.flush()
                waiting.append(len(connection.output))
            assert waiting == [24, 8, 0]
            assert peers.recv(1000) == b"".join(b"%02d" % number for number in range(40))

    @for_each(("ready", "seen"), [
        (512, [*range(512)]), (513, [*range(256), *range(257, 513)]), (2000, [*range(256), *range(1744, 2000)])])
    def test_512_sockets_are_looked_at_in_a_round_the_oldest_and_the_newest(self, monkeypatch, ready, seen):
        server, attended = BayeuxServer(port=0), []
        events = [(types.SimpleNamespace(data=number, fileobj=None), selectors.EVENT_READ) for number in range(ready)]
        with monkeypatch.context() as patch:
            patch.setattr(server.watch, "_selector", types.SimpleNamespace(select=lambda seconds: events))
            patch.setattr(server.watch, "_attend", lambda connection, look, ready: attended.append(connection))
            patch.setattr(server.watch, "_next_sweep", float("inf"))
            server.watch._go_round()
        server.shutdown()
        assert attended == seen

    def test_1500_parts_of_a_chunked_body_are_read_at_once(self):
        """A chunk has three: its size, its data and its end."""
        body, rest, sizes = bayeux_server.ChunkedBody(10_000), b"1\r\nx\r\n" * 1200 + b"0\r\n\r\n", []
        while not body.is_complete:
            rest = body.feed(rest)
            sizes.append(len(body.body))
        assert sizes == [500, 1000, 1200]

    def test_a_connection_is_kept_75_seconds_and_2_where_it_is_closing(self, monkeypatch):
        monkeypatch.setattr(bayeux_server, "time", types.SimpleNamespace(**{**vars(time), "monotonic": lambda: 1000.0}))
        with self.troubled() as (connection, _):
            assert connection.write(b"answer") and connection.deadline == 1075.0
            connection.exchange = "request"
            assert connection.write(b"answer", is_last=True) and connection.deadline == 1002.0

    # -- Closed connections ------------------------------------------------------------------

    def test_what_came_in_front_of_the_end_is_not_begun_behind_it(self, serve):
        """Nobody would end it: a request of a connection that is closed is none."""
        server = serve(client_max_connections=10)
        with Wire(server):
            wait_until(lambda: server.watch.connections)
            connection, = server.watch.connections
        wait_until(lambda: connection.is_closed)
        connection.input = (b"GET /cometd HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        server.watch.resume(connection)
        with Wire(server) as other:             # when it is answered twice, the other has been looked at
            for _ in range(2):
                assert other.request("OPTIONS", "/cometd").status == 204
        assert connection.protocol is server.http and not server.core.kept_open

    def test_what_comes_on_an_aborted_connection_is_not_read(self, server, caplog):
        """Over TLS it would be the ciphertext: a shutdown takes the layer away that deciphers it."""
        caplog.set_level(logging.INFO, "bayeux_server")
        with Wire(server) as wire:
            assert wire.post(PING)[0]["successful"]
            connection, = server.watch.connections

            def abort():
                """On the leader, so that the request is there when it looks again."""
                wire.send(whole_post({"channel": "/meta/unknown"}))
                connection.abort()
            server.watch.do_soon(abort)
            wait_until(lambda: connection.is_closed)
        assert "refused" not in caplog.text

    def test_what_was_closed_while_it_became_a_stream_is_not_counted(self, serve):
        """The leader may close a connection that a handler thread is about to upgrade."""
        server = serve(client_max_connections=10)
        with Peer(server) as peer:
            for headers in (upgrade_headers(), {"Accept": "text/event-stream"}):
                lines = "".join("{}: {}\r\n".format(name.replace("_", "-"), value) for name, value in headers.items())
                request = bayeux_server.Request(*bayeux_server.parse_head(
                    f"GET /cometd/{peer.id} HTTP/1.1\r\nHost: a\r\n{lines}".strip().encode()))
                request.address = "127.0.0.1"
                ours, theirs = socket.socketpair()
                connection = bayeux_server.Connection(ours, "127.0.0.1", server.watch, server.http)
                connection.exchange = request
                connection.close()
                server.http._receive_batch(connection, request)
                theirs.close()
        assert not server.core.kept_open

    # -- No thread is free -------------------------------------------------------------------
    # Services of the application hang, and every handler thread with them.

    @pytest.fixture(params=[2, 4])
    def stuck(self, request, serve, site, monkeypatch):
        """A server all of whose threads are stuck; stuck.may_end.set() ends that."""
        begun, may_end = [], threading.Event()

        def hang(message):
            begun.append(message)
            assert may_end.wait(PATIENCE)
            return {"data": "at last"}

        server = serve(services={"hang": hang, "echo": lambda message: {"data": "echo"}}, max_threads=request.param,
                       docroot=str(site))
        server.may_end = may_end
        with Peer(server) as peer, ExitStack() as wires:
            for _ in range(request.param - 1):
                wire = wires.enter_context(Wire(server))
                wire.send_post({"channel": "/service/hang", "clientId": peer.id, "data": None})
            wait_until(lambda: len(begun) == request.param - 1, "all threads being stuck")
            monkeypatch.setattr(bayeux_server, "STUCK_AFTER", -1)
            yield server
            may_end.set()
            assert wire.read_answer().batch[0]["data"] == "at last"

    def test_what_needs_one_is_told_so_at_once_and_all_else_goes_on(self, stuck):
        with Peer(stuck) as peer, SocketPeer(stuck) as other:
            call = {"channel": "/service/echo", "clientId": peer.id, "data": 1, "id": "call"}
            for messages in ([call], [{**PING, "ext": "x" * bayeux_server.SHORT_REQUEST}], [PING] * 17):
                peer.side.send_post(*messages)
                answer = peer.side.read_answer()
                assert answer.status == 503 and answer.headers["retry-after"] == "5"
                assert {error_code(each) for each in answer.batch} == {503}
                assert len(answer.batch) == (1 if len(messages) == 1 else 17)
            assert peer.side.post(call)[0]["id"] == "call"
            answer = peer.side.request("GET", "/digits.txt")
            assert answer.status == 503 and answer.headers["retry-after"] == "5" and b"busy" in answer.body
            other.send_batch({**call, "id": 1}, {**PING, "id": 2})
            replies = other.read_batch()
            assert [(error_code(each), each["id"], each["advice"]) for each in replies] == [
                (503, 1, {"reconnect": "retry"}), (503, 2, {"reconnect": "retry"})]
            with bystander(stuck) as third:
                third.subscribe("/a")
                for publisher in (peer, other):
                    publisher.publish("/a", "data")
                    assert events_of(third.read_answer().batch) == ["data"]
                    third.hold()

    def test_all_is_well_again_afterwards(self, stuck, monkeypatch):
        with Peer(stuck) as peer:
            assert error_code(peer.ask("/service/echo")) == 503
            monkeypatch.setattr(bayeux_server, "STUCK_AFTER", PATIENCE)
            stuck.may_end.set()
            assert peer.ask("/service/echo")["data"] == "echo"
            assert peer.side.request("GET", "/digits.txt").body == b"0123456789"
            assert len(peer.side.post(*[PING] * 100)) == 100

    def test_memory_is_relieved_all_the_same(self, serve):
        """(It takes the leader, and no handler thread.)"""
        begun, may_end = threading.Event(), threading.Event()

        def hang(request):
            begun.set()
            assert may_end.wait(PATIENCE)
            return "text"

        server = serve(max_memory=1 << 20, max_threads=2, content_handlers={"/a": hang})
        with Wire(server) as stuck, Wire(server) as wire:
            stuck.send_request("GET", "/a")
            assert begun.wait(PATIENCE)
            sessions = [wire.post(HANDSHAKE)[0]["clientId"] for _ in range(40)]
            sizes = [31_000, *[27_000] * 39]
            for count, (client_id, size) in enumerate(zip(sessions, sizes)):
                server.client_push(client_id, "/a", "x" * size)
                if sum(sizes[:count + 1]) > 1 << 20:
                    break
            wait_until(lambda: len(server.sessions) < 40, "the end of a session")
            assert len(server.sessions) == 39
            assert sessions[0] not in [session.id for session in server.sessions]
            reply, = wire.post(CorePeer.connect_message(sessions[0]))
            assert error_code(reply) == 402 and reply["error"].endswith("lack of memory")
            assert reply["advice"] == ADVICE_HANDSHAKE
            assert events_of(wire.post(CorePeer.connect_message(sessions[1]))) == ["x" * 27_000]
            may_end.set()
            assert stuck.read_answer().status == 200

    # -- Busy sockets ------------------------------------------------------------------------

    def test_a_socket_carries_only_so_many_sessions(self, serve):
        """One too many is refused, and those on it go on."""
        server = serve(max_sessions_per_connection=2)
        with SocketWire(server) as wire:
            sessions = []
            for _ in range(3):
                reply, = wire.ask_batch({**HANDSHAKE, "supportedConnectionTypes": ["websocket"]})
                sessions.append(reply["clientId"])
            connects = [{**CorePeer.connect_message(each), "connectionType": "websocket", "advice": {"timeout": 0}}
                        for each in sessions]
            assert [wire.ask_batch(each)[0]["successful"] for each in connects] == [True, True, False]
            reply, = wire.ask_batch(connects[2])
            assert error_code(reply) == 429 and reply["advice"] == {
                "reconnect": "retry", "interval": 5000, "timeout": 30_000}
            refused = session_of(server, sessions[2])
            assert not refused.connected and refused.stream is None
            for client_id in sessions[:2]:
                assert wire.ask_batch({"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/a"})
            server.publish("/a", "event")
            assert [event["data"] for _ in range(2) for event in wire.read_batch()] == ["event"] * 2
            assert wire.ask_batch(connects[0])[0]["successful"]
            with SocketWire(server) as other:           # there is place on another socket
                assert other.ask_batch(connects[2])[0]["successful"]
            wire.ask_batch({"channel": "/meta/disconnect", "clientId": sessions[0]})
            assert wire.ask_batch(connects[2])[0]["successful"]

    @for_each(("data", "kind"), [
        (masked(TEXT_FRAME, b"[]"), TEXT_FRAME), (masked(PING_FRAME), PING_FRAME), (masked(PONG_FRAME), PONG_FRAME),
        (masked(0, b"x", is_final=False), 0)])
    def test_of_small_frames_a_few_are_read_at_a_time(self, data, kind):
        read = []

        class CountingSocket(bayeux_server.WebSocket):
            __slots__ = ()

            def _take_message(self, connection, opcode, payload):
                read.append(opcode)

        resumed = []
        http = types.SimpleNamespace(options=bayeux_server.Options(), is_stopping=False)
        watch = types.SimpleNamespace(resume=resumed.append, count=lambda connection: None)
        connection = types.SimpleNamespace(input=b"", output=(), is_closing=False, is_handled=False, deadline=0.0,
                                           idle_time=30.0, kept=0, watch=watch)
        stream = CountingSocket(http, connection, types.SimpleNamespace(address="", headers={}))
        connection.input = masked(TEXT_FRAME, b"x", is_final=False) if kind == 0 else b""
        stream.consume(connection)
        read.clear()
        connection.input = data * 1000
        for count in range(1, 1000 // 16):
            stream.consume(connection)
            assert read == [kind] * 16 * count and resumed == [connection] * count
            assert len(connection.input) + stream.kept_input(connection) <= len(data) * 1000

    def test_small_fragments_take_about_a_byte_a_byte(self):
        reader, count = bayeux_server.FrameReader(1 << 20), 10_000
        list(reader.feed(masked(TEXT_FRAME, b"xx", is_final=False)))
        data = masked(0, b"xx", is_final=False)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(count // 10):
            list(reader.feed(data * 10))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 2 * 2 * count and reader.size == 2 * count + 2

    def test_a_large_frame_is_not_copied_for_each_part_that_comes(self):
        reader, data = bayeux_server.FrameReader(1 << 20), masked(TEXT_FRAME, b"x" * 100_000)
        list(reader.feed(data[:1000]))
        list(reader.feed(data[1000:2000]))
        buffer = reader._buffer
        for place in range(2000, 100_000, 1000):
            assert list(reader.feed(data[place:place + 1000])) == [] and reader._buffer is buffer
        assert list(reader.feed(data[100_000:])) == [(TEXT_FRAME, "x" * 100_000)] and reader.size == 0

    def test_what_waits_for_a_hundred_sessions_is_one_text(self):
        ours, peers = socket.socketpair()
        ours.setblocking(False)
        connection = bayeux_server.Connection(ours, "", TestConnections.Watch(), TestConnections.Protocol())
        connection.push(b"-" * 1_000_000)
        packet = b"x" * 100_000
        for _ in range(100):
            assert connection.push(packet) is None
        waiting = list(connection.output)[1:]
        assert len(waiting) == 100 and all(part.data.obj is packet for part in waiting)
        assert connection.unsent > 10_000_000
        connection.close()
        peers.close()
        assert connection.unsent == 0

    @for_each("is_first_long", [False, True])
    def test_who_sends_faster_than_it_is_answered_has_to_wait(self, serve, is_first_long):
        """What it has sent stays in its own and the kernel's buffers, mostly; all is answered in order."""
        begun, may_end = threading.Event(), threading.Event()
        server = serve(services={"slow": lambda message: (begun.set(), may_end.wait(PATIENCE), None)[2]},
                       anon_publish=True)
        first = whole_post({"channel": "/service/slow", "id": -1}) if is_first_long else b""
        short, count = b"OPTIONS /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 1000
        with Wire(server) as wire:
            data = first + b"".join(20 * short + whole_post({**PING, "id": number}) for number in range(count))
            sender = threading.Thread(target=wire.send, args=(data,), daemon=True)
            sender.start()
            wait_until(lambda: server.watch.connections)
            connection, = server.watch.connections
            largest = 0
            for _ in range(2):
                with bystander(server):
                    largest = max(largest, len(connection.input))
            assert begun.is_set() == is_first_long
            may_end.set()
            ids = []
            while len(ids) < count:
                answer = wire.read_answer()
                ids += [reply["id"] for reply in answer.batch] if answer.status == 200 else []
                largest = max(largest, len(connection.input))
                if ids == [-1]:
                    ids = []
            sender.join(PATIENCE)
            assert ids == list(range(count)) and largest <= 2 * bayeux_server.RECEIVE_SIZE

    # -- Silent connections ------------------------------------------------------------------
    # One address cannot take all sockets; and it loses the connection that has been silent longest, no other.

    @pytest.fixture
    def serve_few(self, serve, monkeypatch):
        """A server on which an address has three silent connections."""
        def start(**options):
            monkeypatch.setattr(bayeux_server, "SILENT_CONNECTIONS", 3)
            return serve(**{"client_max_connections": 10, **options})
        return start

    def test_the_one_that_is_silent_longest_is_closed(self, serve_few, caplog):
        server = serve_few()
        wires = [Wire(server) for _ in range(5)]
        for wire in wires[:2]:
            assert wire.is_closed_by_server()
        for wire in wires[2:]:
            assert wire.post(PING)[0]["successful"]
        for wire in wires:
            wire.close()
        line, = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert all(fact in line for fact in ("127.0.0.1", "more than 3 silent", "client_max_connections=0"))
        wait_until(lambda: not server.watch._by_address, "the end of the count")

    def test_one_that_was_heard_of_is_not_silent(self, serve_few):
        """Whether the others are, or not: the new one is never the one that goes."""
        server = serve_few()
        first, second, third = [Wire(server) for _ in range(3)]
        first.post(PING)
        fourth = Wire(server)
        assert second.is_closed_by_server()
        for wire in (first, third, fourth):
            assert wire.post(PING)[0]["successful"]
        fifth = Wire(server)
        assert fifth.post(PING)[0]["successful"]
        assert sum(wire.is_readable() for wire in (first, third, fourth)) == 1
        for wire in (first, second, third, fourth, fifth):
            wire.close()

    def test_where_a_client_waits_nothing_is_silent(self, serve_few):
        """Held connects and streams have a limit of their own."""
        server = serve_few()
        with Peer(server) as fed, EventWire(server, fed.id) as stream, SocketWire(server) as upgraded:
            fed.close()
            held = Peer(server)
            held.hold()
            wires = [Wire(server) for _ in range(10)]
            server.subscribe("/a", held.id)
            server.publish("/a", "event")
            assert events_of(held.read_answer().batch) == ["event"]
            upgraded.send_frame(PING_FRAME)
            assert upgraded.read_frame() == (PONG_FRAME, b"")
            server.client_push(fed.id, "/b", "event")
            assert stream.receive(1) == ["event"]
            for wire in (held, *wires):
                wire.close()

    @for_each("options", [{"client_max_connections": 0}, {"trusted_proxies": ["127.0.0.1"]}])
    def test_where_an_address_has_no_limit_none_is_closed(self, serve_few, options):
        server = serve_few(**options)
        wires = [Wire(server) for _ in range(10)]
        assert wires[-1].post(PING)[0]["successful"]    # so all have been accepted
        for wire in wires:
            assert wire.post(PING)[0]["successful"]
            wire.close()

    def test_an_address_has_no_more_than_half_of_the_files(self, serve, monkeypatch):
        monkeypatch.setattr(bayeux_server, "file_limit", lambda: 5)
        server = serve(client_max_connections=10)
        wires = [Wire(server) for _ in range(3)]
        assert wires[0].is_closed_by_server()
        for wire in wires:
            wire.close()

    def test_select_s_limit_pauses_accepting(self, serve, monkeypatch, caplog):
        """On Windows select() bears 512 sockets.  The next client waits until one has gone."""
        monkeypatch.setattr(bayeux_server, "SELECT_LIMIT", 5)
        monkeypatch.setattr(bayeux_server.selectors, "DefaultSelector", bayeux_server.selectors.SelectSelector)
        server = serve()
        wires = [Wire(server) for _ in range(5)]
        for wire in wires[:3]:
            wire.post(PING)
        for wire in wires[3:]:
            wire.send_post(PING)
        for gone, served in ((0, 3), (1, 4)):
            assert len(server.watch.connections) == 3
            assert not wires[served].is_readable()
            wires[gone].close()
            assert wires[served].read_answer().batch[0]["successful"]
        for wire in wires:
            wire.close()
        line, = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "no more than 3 connections" in line and "select()" in line

    # -- File limit --------------------------------------------------------------------------
    # Every client takes a file descriptor.

    @pytest.fixture
    def resource(self, monkeypatch):
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield resource
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_it_is_raised_where_the_server_is_a_part_of_a_program(self, serve, resource):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        serve()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    @for_each(("soft", "highest", "reached"), [
        (256, 10_240, 10_240), (256, 65_536, 61_440), (256, 245_760, 131_072), (20_000, 10_240, 20_000),
        (256, 300, 256)])
    def test_macos_has_a_hard_limit_without_end_and_refuses_it(self, monkeypatch, resource, soft, highest, reached):
        limits = [soft, resource.RLIM_INFINITY]

        def set_limit(which, wanted):
            if not 0 < wanted[0] <= highest:
                raise ValueError("current limit exceeds maximum limit")
            limits[:] = wanted

        monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
        monkeypatch.setattr(resource, "setrlimit", set_limit)
        bayeux_server.raise_file_limit()
        assert limits == [reached, resource.RLIM_INFINITY] and bayeux_server.file_limit() == reached

    def test_a_system_without_such_a_limit_has_none(self, monkeypatch):
        """Windows"""
        monkeypatch.setitem(sys.modules, "resource", None)
        bayeux_server.raise_file_limit()
        assert bayeux_server.file_limit() == float("inf")

    # -- Forking -----------------------------------------------------------------------------
    # A child that the application forks keeps every socket open that there was, and knows nothing of it.

    @pytest.fixture
    def forked(self):
        """A server in a process that has forked: port and a function that stops it; some wires from before."""
        if not hasattr(os, "fork"):
            pytest.skip("this system does not fork")
        process = subprocess.Popen([sys.executable, "-c", FORKING_PROGRAM], cwd=HERE, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, encoding="utf-8")

        def answer_to(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        child = None
        self.port, self.options = int(process.stdout.readline()), bayeux_server.Options()
        try:
            with Peer(self) as peer, Wire(self) as wire:
                peer.send_connect()
                for _ in range(3):              # rounds of the leader, after which the connect is held
                    wire.post(PING)
                child = int(answer_to("fork"))
                yield peer, wire, partial(answer_to, "stop")
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
            process.communicate("", timeout=PATIENCE)

    def test_a_close_reaches_the_client(self, forked):
        _, wire, _ = forked
        wire.send(b"nonsense\r\n\r\n")
        assert wire.read_answer().status == 400
        assert wire.is_closed_by_server()

    def test_stopping_reaches_clients_and_closes_the_port(self, forked):
        peer, wire, stop = forked
        assert stop() == "over"
        assert peer.read_answer().batch[0]["successful"]
        assert peer.is_closed_by_server() and wire.is_closed_by_server()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    # -- Tls ---------------------------------------------------------------------------------
    # The same parking, through TLS.

    def test_a_whole_conversation(self, serve_tls, tls):
        server = serve_tls()
        assert server.url.startswith("https://")
        with Peer(server, tls) as peer:
            peer.subscribe("/chat/*")
            peer.publish("/chat/demo", "hello")
            assert peer.connect().data == ["hello"]

    def test_expect_100_continue(self, serve_tls, tls):
        body = json.dumps([PING]).encode("utf-8")
        with Wire(serve_tls(), tls) as wire:
            wire.send(raw_post(b"", f"Content-Length: {len(body)}", "Expect: 100-continue"))
            assert wire.read_answer().status == 100
            wire.send(body)
            assert wire.read_answer().batch[0]["id"] == "p"

    def test_an_ssl_context_of_your_own(self, serve, certificate, tls):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        with bystander(serve(tls_context=context), tls):
            pass

    def test_held_connects_over_tls_cost_no_threads(self, serve_tls, tls):
        server = serve_tls()
        peers = [Peer(server, tls) for _ in range(20)]
        threads = len(threads_of_servers())
        try:
            for peer in peers:
                peer.subscribe("/all")
                peer.hold()
            assert len(threads_of_servers()) <= threads + 2
            server.publish("/all", "to everybody")
            for peer in peers:
                assert events_of(peer.read_answer().batch) == ["to everybody"]
        finally:
            for peer in peers:
                peer.close()

    def test_a_hang_up_keeps_the_events(self, serve_tls, tls):
        server = serve_tls()
        with Peer(server, tls) as peer:
            peer.subscribe("/news")
            peer.hold()
            peer.socket.close()
            until_held(server, peer.id, is_over=True)
            server.publish("/news", 1)
            assert events_of(peer.side.post(CorePeer.connect_message(peer.id))) == [1]

    def test_pipelining(self, serve_tls, tls):
        """TLS hands over whole records: what lies decrypted in its buffer must not be forgotten."""
        server = serve_tls()
        with Wire(server, tls) as wire:
            wire.send(b"".join(whole_post({**PING, "id": number}) for number in range(300)))
            assert [wire.read_answer().batch[0]["id"] for _ in range(300)] == list(range(300))

    def test_a_large_request_and_a_large_answer(self, serve_tls, tls):
        server = serve_tls(services={"echo": lambda message: {"data": message["data"]}}, max_message_size=1_000_000)
        text = "x" * 900_000
        with Peer(server, tls) as peer:
            assert peer.ask("/service/echo", data=text)["data"] == text

    def test_a_slow_reader_gets_everything(self, serve_tls, tls):
        server = serve_tls()
        with bystander(server, tls), Peer(server, tls) as peer:
            TestConnections().fill(server, peer)
            with bystander(server, tls):
                pass
            assert [data.split(":")[0] for data in events_of(peer.read_answer().batch)] == [
                str(number) for number in range(10)]
            assert TestConnections().fetch(peer, 50) == [str(number) for number in range(10, 60)]

    def test_a_request_in_many_records(self, serve_tls, tls):
        with Wire(serve_tls(), tls) as wire:
            for byte in whole_post():
                wire.send(bytes([byte]))
            assert wire.read_answer().batch[0]["id"] == "p"

    @for_each("noise", [whole_post(), b"\x16\x03\x01" + b"\xff" * 300, b"\0" * 50, b""])
    def test_who_speaks_no_tls_harms_nobody(self, serve_tls, tls, noise):
        server = serve_tls()
        with bystander(server, tls), Wire(server) as wire:
            try:
                wire.send(noise)
                wire.socket.shutdown(socket.SHUT_WR)
                while wire.socket.recv(65536):      # an alert of TLS may come
                    pass
            except OSError:                         # the server has hung up already
                pass


# ======================================================================================
# Races
# ======================================================================================

class InTheMiddle:
    """Lets another thread run a job as far as it can, once, at the place where it is called.

    With the lock that the place needs the job stops there until this thread goes on; without it, it runs through.
    """

    def __init__(self, job):
        self.thread = threading.Thread(target=self.run, args=(job,), daemon=True)
        self.was_here = False
        self.failure = None

    def run(self, job):
        try:
            job()
        except Exception as failure:    # noqa: BLE001 (shown by the test's own thread)
            self.failure = failure

    def __call__(self):
        if not self.was_here and threading.current_thread() is not self.thread:
            self.was_here = True
            self.thread.start()
            self.thread.join(0.05)      # no more than that: with the lock it waits for us

    def end(self):
        assert self.was_here, "nobody came to the place"
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive() and self.failure is None, self.failure


def stopping(items, place):
    """The items, one by one, with the place before each."""
    for item in items:
        place()
        yield item


class TestRaces:
    """Another thread comes just where it would do harm.  Each test fails without the lock that it is about."""

    def test_two_messages_at_once_are_both_counted(self):
        class Buckets(dict):
            def __setitem__(self, sender, bucket):
                place()
                super().__setitem__(sender, bucket)

        rates = bayeux_server.Rates(1, Clock())
        rates._buckets = Buckets()
        place = InTheMiddle(lambda: rates.admit("a"))
        assert rates.admit("a")
        place.end()
        assert [rates.admit("a") for _ in range(4)] == [True, True, True, False]

    def test_the_flags_of_a_session_are_made_once(self, core):
        class Slow(bayeux_server.Session):
            __slots__ = ()

            @property
            def _flags(self):
                flags = bayeux_server.Session._flags.__get__(self)
                looks.append(flags)
                if len(looks) == 2:                     # the first needs no lock
                    place()
                return flags

            @_flags.setter
            def _flags(self, flags):
                bayeux_server.Session._flags.__set__(self, flags)

        looks = []
        session = core.core.sessions[core.handshake()]
        session.__class__ = Slow
        place = InTheMiddle(lambda: session.flags.update(first=1))
        session.flags["second"] = 2
        place.end()
        assert session.flags == {"first": 1, "second": 2}

    @for_each("change", ["begin", "stop"])
    def test_servers_begin_and_stop_while_one_is_looked_for(self, serve, monkeypatch, change):
        class Servers(weakref.WeakSet):
            def __iter__(self):
                return stopping(super().__iter__(), place)

        servers = [serve(alias="looked for"), serve()]
        monkeypatch.setattr(bayeux_server, "live_servers", Servers(servers))
        place = InTheMiddle(servers[1].shutdown if change == "stop" else lambda: serve(alias="another"))
        assert bayeux_server.find_server("looked for") is servers[0]
        place.end()

    def test_sessions_begin_while_they_are_listed(self, server):
        class Sessions(dict):
            def values(self):
                return stopping(super().values(), place)

        peer = Peer(server)
        server.core.sessions = Sessions(server.core.sessions)
        place = InTheMiddle(lambda: Peer(server).close())
        assert [session.id for session in server.sessions] == [peer.id]
        place.end()
        peer.close()

    def test_a_stream_is_forgotten_once(self):
        class Stream(FakeStream):
            is_noted = False

            @property
            def is_counted(self):
                is_noted = self.is_noted
                place()
                return is_noted

            @is_counted.setter
            def is_counted(self, is_counted):
                self.is_noted = is_counted

        core = CorePeer(client_max_connections=5)
        place = any_function
        streams = [Stream() for _ in range(3)]
        for stream in streams:
            stream.address = "10.0.0.1"
            assert core.core.count_stream(stream)
        place = InTheMiddle(lambda: core.core.forget_stream(streams[0]))
        core.core.forget_stream(streams[0])
        place.end()
        assert core.core.kept_open == {"10.0.0.1": 2}

    def test_a_subscriber_comes_while_those_of_a_channel_are_looked_at(self, core, monkeypatch):
        first, second = core.handshake(), core.handshake()
        core.subscribe(first, "/a")
        subscribers = core.core.registry.subscribers
        monkeypatch.setattr(core.core.registry, "subscribers", lambda name: stopping(subscribers(name), place))
        place = InTheMiddle(lambda: core.subscribe(second, "/a"))
        core.core._require_room("/a")
        place.end()


# ======================================================================================
# §12  HTTP transport
# ======================================================================================

def header_lines():
    """The same as they are sent, for a test that writes its own request."""
    return "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in upgrade_headers().items())


def let_time_pass(server):
    """The times of all that have left HTTP behind are over now."""
    connections = [each for each in list(server.watch.connections) if each.protocol is not server.http]
    wait_until(lambda: all(each.deadline < float("inf") for each in connections), "the end of what is being handled")
    for connection in connections:
        connection.deadline = 0.0


class TestHttpTransport:
    """Requests, and the transports over them: long-polling, callback-polling, WebSocket, event streams."""

    # -- Requests ----------------------------------------------------------------------------

    BODY = json.dumps([PING]).encode()
    CHUNKED = (raw_post(b"", "Transfer-Encoding: chunked")
               + b'5;name=value;a ; b\t=\t"c;\\"\xe9"\r\n' + BODY[:5] + b"\r\n" + f"{len(BODY) - 5:X}\r\n".encode() + BODY[5:] + b"\r\n")

    def test_heads_are_kept_only_if_they_are_short_and_right(self, server):
        """Each may be kept for good, so that long ones would be a way to fill the memory."""
        kept = bayeux_server.parse_kept_head
        kept.cache_clear()
        for line, is_kept in ((f"X: {'y' * bayeux_server.LONGEST_KEPT}", False), ("Bad", False), ("X: short", True)):
            with Wire(server) as wire:
                wire.send(raw_post(self.BODY, line, f"Content-Length: {len(self.BODY)}"))
                assert wire.read_answer().batch
            assert kept.cache_info().currsize == is_kept

    @for_each("data, status", [
        (raw_post(BODY, "Content-Length: 5", "Content-Length: 5"), 400),
        (raw_post(BODY, "Content-Length: 5", "Content-Length: 6"), 400),
        (raw_post(BODY, "Content-Length: 5, 5"), 400),
        (raw_post(BODY, "Content-Length: +5"), 400),
        (raw_post(BODY, "Content-Length: -1"), 400),
        (raw_post(BODY, "Content-Length: 0x5"), 400),
        (raw_post(BODY, "Content-Length:"), 400),
        (raw_post(BODY, "Content-Length: " + "9" * 5000), 400),
        (raw_post(BODY, "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (raw_post(BODY, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
        (raw_post(BODY, "Transfer-Encoding: chunked", version="HTTP/1.0"), 400),
        (raw_post(BODY, "Transfer-Encoding: gzip, chunked"), 501),
        (raw_post(b"xyz\r\n", "Transfer-Encoding: chunked"), 400),
        (raw_post(b"-1\r\n", "Transfer-Encoding: chunked"), 400),
        (raw_post(b"0x1\r\n", "Transfer-Encoding: chunked"), 400),
        (raw_post(b"1\r\nabc\r\n", "Transfer-Encoding: chunked"), 400),
        (raw_post(b"1\n[\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
        (raw_post(b"x" * 20_000, "Transfer-Encoding: chunked"), 400),
        *[(raw_post(b"1" + extension + b"\r\n", "Transfer-Encoding: chunked"), 400) for extension in (
            b" ", b";", b"; ", b";a=", b";a b", b";a=b c", b';a="b', b';a="\\"', b";a=b\n", b";a\rb", b";a\0", b';a="\x1b"',
            b";a;", b";(=b", b";a=\x80", b";a=" + b"b" * 17_000)],
        (raw_post(b"".join(b"1;a=%b\r\n[\r\n" % (b"b" * 1000) for _ in range(17)), "Transfer-Encoding: chunked"), 400),
        *[(raw_post(b"0\r\n" + trailer + b"\r\n", "Transfer-Encoding: chunked"), 400) for trailer in (
            b"no colon", b"A : b", b" A: b", b": b", b"A: b\nC: d", b"A: b\rC: d", b"A: \0", b"A: \x1b", b"A: \x7f", b"\n",
            b"A: " + b"b" * 17_000, b"\r\n".join([b"A: " + b"b" * 1000] * 17))],
        (b"POST /cometd HTTP/1.1\nHost: a\n\n", 400),
        (b"POST /cometd HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400),
        (b"POST /cometd HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", 400),
        (b"GET /\r\n", 400),
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
        (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET nowhere HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a\xffb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x1bb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x7fb\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 17_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 17_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 4000, 431),
    ], ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None)
    def test_what_is_no_good_request_is_refused(self, server, data, status):
        """With its status and a batch, and nobody else notices."""
        with bystander(server):
            refusal(server, data, status)

    def test_a_head_of_just_under_16_kib_is_read(self, server):
        with Wire(server) as wire:
            assert wire.request("POST", "/cometd", self.BODY, X="y" * 16_000).batch[0]["id"] == "p"

    def test_a_line_s_end_within_a_chunked_body_is_no_empty_line_before_a_request(self, server):
        """It comes by itself where the network cuts it off."""
        with Wire(server) as wire:
            wire.post(PING)
            connection, = server.watch.connections
            wire.send(self.CHUNKED + b"0\r\n")
            wait_until(lambda: connection.request is not None
                       and connection.request.chunks._read == connection.request.chunks._read_trailer)
            wire.send(b"\r")
            wait_until(lambda: connection.input or connection.request.chunks.size > len(self.BODY))
            wire.send(b"\n")
            assert wire.read_answer().batch[0]["id"] == "p"

    @for_each("request_bytes", [
        whole_post(), CHUNKED + b"0\r\n\r\n", CHUNKED + b"0\r\nA: b\r\nC: d\r\n\r\n"],
        ids=["length", "chunked", "trailers"])
    def test_requests_are_read_however_they_are_cut(self, server, request_bytes):
        """Whole, byte by byte, and with another request behind them."""
        with Wire(server) as wire, bystander(server):
            wire.send(request_bytes)
            assert wire.read_answer().batch[0]["id"] == "p"
            for byte in request_bytes:
                wire.send(bytes([byte]))
            assert wire.read_answer().batch[0]["id"] == "p"
            wire.send(request_bytes + request_bytes + whole_post({**PING, "id": "behind"}))
            assert [wire.read_answer().batch[0]["id"] for _ in range(3)] == ["p", "p", "behind"]
            for cut in range(1, len(request_bytes), 7):
                wire.send(request_bytes[:cut])
                wire.send(request_bytes[cut:])
                assert wire.read_answer().batch[0]["id"] == "p"

    def test_a_line_end_inside_of_a_body_is_not_taken_for_an_empty_line(self, server, monkeypatch):
        """However the body is cut: here each byte is read by itself."""
        consume, heard = server.http.consume, []
        monkeypatch.setattr(server.http, "consume", lambda connection: (consume(connection), heard.append(1)))
        with Wire(server) as wire:
            for count, byte in enumerate(self.CHUNKED + b"0\r\n\r\n"):
                wire.send(bytes([byte]))
                wait_until(lambda count=count: len(heard) > count, "the reading of a byte")
            assert wire.read_answer().batch[0]["id"] == "p"

    def test_an_empty_line_before_a_request_is_forgiven(self, server):
        with Wire(server) as wire:
            wire.send(b"\r\n" + whole_post() + b"\r\n\r\n" + whole_post())
            assert wire.read_answer().status == wire.read_answer().status == 200

    def test_a_target_may_be_a_whole_url(self, server):
        """RFC 9112, "absolute-form": a server MUST accept it."""
        with Wire(server) as wire:
            wire.send(whole_post(target="http://127.0.0.1/cometd"))
            assert wire.read_answer().status == 200

    def test_http_1_0_ends_with_the_answer(self, server):
        with Wire(server) as wire:
            wire.send(whole_post(version="HTTP/1.0"))
            answer = wire.read_answer()
            assert answer.batch[0]["id"] == "p"
            assert answer.headers["connection"] == "close"
            assert wire.is_closed_by_server()

    @for_each("body", [b'[{"channel": "/meta/ping"}]', b"no JSON"])
    def test_http_1_0_keeps_alive_if_asked_and_says_so(self, server, body):
        """The original promised and did not keep it."""
        with Wire(server) as wire:
            for _ in range(3):
                wire.send(raw_post(body, f"Content-Length: {len(body)}", "Connection: Keep-Alive", version="HTTP/1.0"))
                answer = wire.read_answer()
                assert answer.headers["connection"].lower() == "keep-alive"

    def test_http_1_0_needs_no_host(self, server):
        with Wire(server) as wire:
            wire.send(b"GET / HTTP/1.0\r\n\r\n")
            assert wire.read_answer().status == 404
            assert wire.is_closed_by_server()

    def test_http_1_1_closes_if_asked_and_says_so(self, server):
        with Wire(server) as wire:
            wire.send_post(PING, Connection="close")
            assert wire.read_answer().headers["connection"] == "close"
            assert wire.is_closed_by_server()

    def test_a_held_connect_closes_after_its_answer_if_asked(self, server):
        with Peer(server) as peer:
            peer.subscribe("/news")
            peer.send_post(CorePeer.connect_message(peer.id), Connection="close")
            until_held(server, peer.id)
            server.publish("/news", 1)
            assert events_of(peer.read_answer().batch) == [1]
            assert peer.is_closed_by_server()

    @for_each("data", [
        raw_post(b"", "Content-Length: 2000000"), raw_post(b"1E8480\r\n", "Transfer-Encoding: chunked"),
        raw_post(b"", "Content-Length: 2000000", "Expect: 100-continue"),
        raw_post(b"x" * 3_000_000, "Content-Length: 3000000")], ids=["length", "chunk", "expect", "already sent"])
    def test_a_body_over_max_request_size_is_refused_before_it_is_read(self, server, data):
        """The client, even one that has sent it all, can read why."""
        with bystander(server):
            assert "1048576 bytes" in refusal(server, data, 413).batch[0]["error"]

    def test_chunks_do_not_add_up_to_more_than_max_request_size(self, serve):
        server = serve(max_request_size=1000)
        chunk = b"64\r\n" + b"x" * 100 + b"\r\n"
        with bystander(server):
            refusal(server, raw_post(chunk * 11, "Transfer-Encoding: chunked"), 413)

    @for_each("target", ["/cometd", "/file"])
    def test_a_refusal_is_readable_with_a_post_handle_too(self, serve, target):
        server = serve(post_handle=lambda request, response: None)
        with bystander(server), Wire(server) as wire:
            wire.send(raw_post(b"x" * 3_000_000, "Content-Length: 3000000", target=target))
            assert wire.read_answer().status == 413
            assert wire.is_closed_by_server()

    def test_expect_100_continue(self, server):
        with Wire(server) as wire:
            wire.send(raw_post(b"", f"Content-Length: {len(self.BODY)}", "Expect: 100-continue"))
            assert wire.read_answer().status == 100
            wire.send(self.BODY)
            assert wire.read_answer().batch[0]["id"] == "p"

    def test_expect_is_not_answered_when_the_body_is_there_already(self, server):
        with Wire(server) as wire:
            wire.send(raw_post(self.BODY, f"Content-Length: {len(self.BODY)}", "Expect: 100-continue"))
            assert wire.read_answer().status == 200

    def test_other_expectations_are_refused(self, server):
        refusal(server, raw_post(b"", "Content-Length: 5", "Expect: miracles"), 417)

    @for_each("method", ["PUT", "DELETE", "PATCH", "TRACE", "BREW", "get"])
    def test_unknown_methods_get_405_and_what_is_allowed(self, server, method):
        with Wire(server) as wire, bystander(server):
            answer = wire.request(method, "/cometd", self.BODY)
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, OPTIONS, POST"
            assert is_bayeux_failure(answer)
            assert wire.post(PING)[0]["successful"], "the connection is good for the next request"

    def test_head_gets_no_body(self, server):
        with Wire(server) as wire:
            assert wire.request("HEAD", "/cometd").status == 405
            assert wire.post(PING)[0]["successful"]

    def test_options(self, server):
        with Wire(server) as wire:
            answer = wire.request("OPTIONS", "/cometd")
            assert (answer.status, answer.headers["allow"]) == (204, "GET, OPTIONS, POST")
            assert not [name for name in answer.headers if name.startswith("access-control")]

    def test_random_bytes_harm_nobody(self, server):
        noise = random.Random(1)
        with bystander(server):
            for _ in range(200):
                data = bytearray(whole_post())
                for _ in range(noise.randrange(1, 8)):
                    data[noise.randrange(len(data))] = noise.randrange(256)
                with Wire(server) as wire:
                    wire.send(bytes(data))
                    wire.socket.shutdown(socket.SHUT_WR)
                    answer = wire.read_answer()
                    assert answer is None or answer.status < 500 or answer.status in (501, 505), data
        wait_until(lambda: not server.watch.connections, "the end of the connections")

    def test_headers_of_one_name_are_joined_and_a_tab_may_stand_in_them(self):
        """RFC 9110, "Field Order"; RFC 9113: cookies are joined as a browser writes several of them."""
        _, _, _, _, _, headers, *_ = bayeux_server.parse_head(
            b"GET / HTTP/1.1\r\nHost: a\r\nX: a\tb\r\nCookie: a=1\r\nX: c\r\nCookie: BAYEUX_BROWSER=b; d=2")
        assert headers == {"host": "a", "x": "a\tb, c", "cookie": "a=1; BAYEUX_BROWSER=b; d=2"}

    @for_each("form", [b"message=\xff", b"message=%ff", b"message=%5B%5D&x=%c0%af"])
    def test_a_form_must_be_utf_8(self, server, form):
        with Wire(server) as wire:
            answer = wire.request("POST", "/cometd", form, Content_Type="application/x-www-form-urlencoded")
            assert answer.status == 400 and "Not UTF-8" in answer.batch[0]["error"]

    # -- Long polling ------------------------------------------------------------------------

    TEXT = json.dumps([PING])
    FORM = urllib.parse.urlencode({"message": TEXT})
    FORM_TYPE = "application/x-www-form-urlencoded"

    @for_each("content_type", [
        "application/json", "APPLICATION/JSON", "application/json;charset=UTF-8", 'application/json; charset="utf-8"',
        "text/json", "text/json; charset=utf8", "text/plain", "text/plain;charset=UTF-8", None,
        "application/x-www-form-urlencoded"])
    def test_json_is_read_whatever_it_is_called(self, server, content_type):
        """An array or an object; the last type is what `curl -d` says."""
        with Wire(server) as wire:
            headers = {"Content_Type": content_type} if content_type else {}
            for body in (self.TEXT, json.dumps(PING), " \r\n" + self.TEXT + "\n"):
                reply, = wire.request("POST", "/cometd", body.encode(), **headers).batch
                assert reply == {"channel": "/meta/ping", "successful": True, "id": "p"}

    @for_each("content_type", [FORM_TYPE, FORM_TYPE + "; charset=UTF-8", FORM_TYPE.upper(), None, "text/plain"])
    def test_a_form_is_read_even_if_it_is_not_called_one(self, server, content_type):
        """Faye's cross-origin requests have no content type."""
        with Wire(server) as wire:
            headers = {"Content_Type": content_type} if content_type else {}
            assert wire.request("POST", "/cometd", self.FORM.encode(), **headers).batch[0]["id"] == "p"

    def test_a_form_of_many_messages(self, server):
        """Each parameter an object or an array; other parameters mean nothing."""
        one, two = json.dumps({**PING, "id": 1}), json.dumps([{**PING, "id": 2}, {**PING, "id": 3}])
        form = urllib.parse.urlencode([("other", "x"), ("message", one), ("message", two)])
        with Wire(server) as wire:
            answer = wire.request("POST", "/cometd", form.encode(), Content_Type=self.FORM_TYPE)
            assert [reply["id"] for reply in answer.batch] == [1, 2, 3]

    @for_each("suffix", ["", "/", "/handshake", "/connect", "/a/b/c", "?query=1", "/connect?x"])
    def test_the_path_may_have_a_suffix(self, server, suffix):
        """CometD's client appends the message type."""
        with Wire(server) as wire:
            assert wire.request("POST", "/cometd" + suffix, self.TEXT.encode()).batch[0]["id"] == "p"

    def test_another_path_is_no_bayeux(self, server):
        with Wire(server) as wire:
            assert wire.request("POST", "/cometdx", self.TEXT.encode()).status == 404

    def test_the_path_is_an_option(self, serve):
        with Wire(serve(path="/live/bayeux")) as wire:
            assert wire.request("POST", "/live/bayeux/connect", self.TEXT.encode()).batch[0]["id"] == "p"
            assert wire.request("POST", "/cometd", self.TEXT.encode()).status == 404

    def test_the_headers_of_a_reply(self, server):
        with Wire(server) as wire:
            headers = wire.request("POST", "/cometd", self.TEXT.encode()).headers
            assert headers["content-type"] == "application/json; charset=utf-8"
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["date"].endswith(" GMT")

    def test_text_is_utf_8_both_ways(self, server):
        text = "Grüße \u2028 \U0001f600 \0"
        with Peer(server) as peer:
            peer.subscribe("/chat")
            peer.publish("/chat", text)
            body = json.dumps({"channel": "/chat", "clientId": peer.id, "data": text}, ensure_ascii=False)
            peer.side.request("POST", "/cometd", body.encode("utf-8"))
            form = urllib.parse.urlencode({"message": body})
            peer.side.request("POST", "/cometd", form.encode(), Content_Type=self.FORM_TYPE)
            assert peer.connect().data == [text] * 3

    NO_BATCHES = (
        b"", b" ", b"[]", b"no JSON", b"[", b'[{"channel": "/meta/ping"}', b"[NaN]", b'[{"a": 1, "a": 2}]',
        b'["\xff"]', b'["\\ud800"]', b"[" * 10_000, b"[1e999]", b"message=", b"message=%5B%5D", b"message=%ff",
        b"\xef\xbb\xbf[]", b"[]]", b"[1" + b"0" * 5000 + b"]")

    @for_each("content_type", ["application/json", FORM_TYPE, "text/plain"])
    def test_what_holds_no_batch_gets_400_and_never_an_empty_array(self, server, content_type):
        """The original answered with [] and clients sent again for ever."""
        with Wire(server) as wire:
            for body in self.NO_BATCHES:
                with bystander(server):
                    answer = wire.request("POST", "/cometd", body, Content_Type=content_type)
                    assert answer.status == 400, body[:50]
                    assert is_bayeux_failure(answer)
                    assert wire.post(PING)[0]["successful"], "the connection is good for the next request"

    @for_each("value", [None, 1, "text", True, [], {}])
    def test_what_is_no_message_is_answered_one_by_one(self, server, value):
        """A Bayeux error is HTTP 200."""
        with Wire(server) as wire, bystander(server):
            answer = wire.request("POST", "/cometd", json.dumps([value, PING, value]).encode())
            assert answer.status == 200
            assert [reply["successful"] for reply in answer.batch] == [False, True, False]

    @for_each("content_type", ["application/xml", "multipart/form-data; boundary=x",
                               "application/json; charset=iso-8859-1", "text/plain; charset=utf-16"])
    def test_other_types_and_charsets_get_415(self, server, content_type):
        with Wire(server) as wire, bystander(server):
            answer = wire.request("POST", "/cometd", self.TEXT.encode(), Content_Type=content_type)
            assert answer.status == 415
            assert is_bayeux_failure(answer)

    def test_a_message_over_max_message_size_is_refused_alone(self, server):
        """Its neighbours are handled."""
        large = {"channel": "/chat", "data": "x" * 70_000, "id": "large"}
        with Wire(server) as wire:
            answer = wire.request("POST", "/cometd", json.dumps([large, PING]).encode())
            assert answer.status == 200
            assert [(reply["id"], reply["successful"]) for reply in answer.batch] == [("large", False), ("p", True)]
            assert answer.batch[0]["error"].startswith("413:")

    def test_an_unknown_client_is_a_bayeux_error(self, server):
        with Wire(server) as wire:
            answer = wire.request("POST", "/cometd", json.dumps([CorePeer.connect_message("unknown")]).encode())
            assert answer.status == 200
            assert answer.batch[0]["error"].startswith("402:")
            assert answer.batch[0]["advice"]["reconnect"] == "handshake"

    def test_a_failure_of_the_server_s_code_is_answered(self, serve, errors):
        """An answer that JSON or UTF-8 cannot hold is the sender's misfortune only."""
        server = serve(services={"broken": lambda message: {"data": "\ud800"}}, anon_publish=True,
                       client_max_connections=2)
        with Wire(server) as wire:
            for _ in range(5):
                wire.send_post({"channel": "/service/broken", "id": 1})
                answer = wire.read_answer()
                assert is_bayeux_failure(answer)
                if answer.headers.get("connection") == "close":
                    wire.close()
                    wire = Wire(server)
            assert errors.take()
            wire.close()
        with bystander(server):
            pass

    def test_what_utf_8_cannot_hold_is_not_published(self, server):
        """One such event once ended the long-poll wait, and with it all delivery."""
        with bystander(server), pytest.raises(ValueError):
            server.publish("/bystander", "\ud800")

    # -- Callback polling --------------------------------------------------------------------

    def test_the_default_name(self, server):
        with Wire(server) as wire:
            answer = wire.request("GET", jsonp_target(PING), **OWN_PAGE)
            assert script_batch(answer)[0]["id"] == "p"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"

    @for_each("name", ["cb", "a.b.c", "_$9", "dojo.io.script.jsonp_dojoIoScript1._jsonpCallback", "x" * 64])
    def test_a_name_of_the_client_s(self, server, name):
        with Wire(server) as wire:
            assert script_batch(wire.request("GET", jsonp_target(PING, jsonp=name), **OWN_PAGE), name)[0]["id"] == "p"

    def test_the_last_of_several_names_counts(self, server):
        with Wire(server) as wire:
            answer = wire.request("GET", jsonp_target(PING, jsonp="first") + "&jsonp=last", **OWN_PAGE)
            assert script_batch(answer, "last")[0]["id"] == "p"

    @for_each("name", [
        "alert(1)//", "a;b", "a b", "a..b", ".a", "a.", "9a", "a[0]", "x" * 65, "<script>", "a\n", "a\u2028", "ä",
        "a\0", "*/alert(1)/*", "a'", "a\r\nSet-Cookie: x=y"])
    def test_a_hostile_name_is_refused_and_not_repeated(self, server, name):
        with Wire(server) as wire, bystander(server):
            answer = wire.request("GET", jsonp_target(PING, jsonp=name), **OWN_PAGE)
            assert answer.status == 400
            assert answer.headers["content-type"].startswith("application/json")
            assert is_bayeux_failure(answer)
            assert name.encode() not in answer.body
            assert "set-cookie" not in answer.headers

    @for_each("query", ["", "?", "?jsonp=cb", "?message=", "?message=[]", "?message=no", "?message=%ff",
                        "?message=%ED%A0%80", "?message=[" + "[" * 5000])
    def test_a_bad_message_gets_400_as_a_script(self, server, query):
        """So that the page learns it."""
        with Wire(server) as wire, bystander(server):
            answer = wire.request("GET", "/cometd" + query, **OWN_PAGE)
            assert answer.status == 400
            failure, = script_batch(answer, "cb" if "cb" in query else "jsonpcallback")
            assert failure["successful"] is False

    def test_line_separators_are_escaped(self, server):
        """U+2028 and U+2029 end a line in older scripts."""
        with Peer(server) as peer:
            peer.subscribe("/chat")
            peer.publish("/chat", "a\u2028b\u2029c")
            answer = peer.request("GET", jsonp_target(CorePeer.connect_message(peer.id)), **OWN_PAGE)
            assert events_of(script_batch(answer)) == ["a\u2028b\u2029c"]
            assert b"\\u2028b\\u2029" in answer.body
            assert "\u2028" not in answer.body.decode() and "\u2029" not in answer.body.decode()

    def test_a_whole_conversation(self, server):
        """Handshake, subscribe, a held connect, publish, disconnect."""
        with Wire(server) as wire, Wire(server) as side:
            def call(connection, **message):
                return script_batch(connection.request("GET", jsonp_target(message, jsonp="f"), **OWN_PAGE), "f")

            handshake, = call(wire, channel="/meta/handshake", version="1.0",
                              supportedConnectionTypes=["callback-polling"])
            assert handshake["supportedConnectionTypes"] == ["callback-polling"]
            client_id = handshake["clientId"]
            connect = {"channel": "/meta/connect", "clientId": client_id, "connectionType": "callback-polling"}
            assert call(wire, **connect)[0]["successful"]
            assert call(wire, channel="/meta/subscribe", clientId=client_id, subscription="/chat/*")[0]["successful"]
            wire.send_request("GET", jsonp_target({**connect, "id": 9}, jsonp="f"), **OWN_PAGE)
            until_held(server, client_id)
            assert call(side, channel="/chat/demo", clientId=client_id, data="hello")[0]["successful"]
            reply, event = script_batch(wire.read_answer(), "f")
            assert (reply["id"], event) == (9, {"channel": "/chat/demo", "data": "hello"})
            assert call(side, channel="/meta/disconnect", clientId=client_id)[0]["successful"]
            assert call(side, **connect)[0]["advice"]["reconnect"] == "handshake"

    def test_many_message_parameters(self, server):
        with Wire(server) as wire:
            answer = wire.request("GET", jsonp_target({**PING, "id": 1}) + "&message=" + urllib.parse.quote(
                json.dumps({**PING, "id": 2})), **OWN_PAGE)
            assert [reply["id"] for reply in script_batch(answer)] == [1, 2]

    # -- Comment filtering -------------------------------------------------------------------

    @staticmethod
    def unfiltered(answer):
        text = answer.body.decode("utf-8")
        assert answer.headers["content-type"] == "text/json-comment-filtered; charset=utf-8"
        assert text.startswith("/*") and text.endswith("*/")
        assert text.count("/*") == text.count("*/") == 1, "the data must not end the comment, nor begin one"
        return json.loads(text[2:-2])

    def ask_filter(self, wire, *messages):
        wire.send_post(*messages)
        return self.unfiltered(wire.read_answer())

    @for_each("asked", [True, 1])
    def test_every_reply_of_the_session_is_filtered(self, server, asked):
        """From the handshake's on, the held connect's too."""
        with Wire(server) as wire, Wire(server) as side, bystander(server):
            handshake, = self.ask_filter(wire, {**HANDSHAKE, "ext": {"json-comment-filtered": asked}})
            assert handshake["ext"]["json-comment-filtered"] is True
            client_id = handshake["clientId"]
            connect = CorePeer.connect_message(client_id)
            assert self.ask_filter(wire, connect)[0]["successful"]
            for pattern in ("/chat/*", "/chat/**"):
                reply, = self.ask_filter(wire, {"channel": "/meta/subscribe", "clientId": client_id, "subscription": pattern})
                assert reply["subscription"] == pattern
            wire.send_post(connect)
            until_held(server, client_id)
            hostile = {"*/alert(1)/*": "*/alert(1)/* /**/ *\\/"}
            assert self.ask_filter(side, {"channel": "/chat/demo", "clientId": client_id, "data": hostile})[0]["successful"]
            assert events_of(self.unfiltered(wire.read_answer())) == [hostile]
            refusal, = self.ask_filter(side, {"channel": "*/x/*", "clientId": client_id})
            assert refusal["channel"] == "*/x/*"
            assert self.ask_filter(side, {"channel": "/meta/disconnect", "clientId": client_id})[0]["successful"]

    @for_each("ext", [None, {}, {"json-comment-filtered": False}, {"json-comment-filtered": 0}, 1, [1]])
    def test_who_did_not_ask_gets_plain_json(self, server, ext):
        with Wire(server) as wire:
            reply, = wire.post({**HANDSHAKE, "ext": ext})
            assert reply["successful"]
            assert "ext" not in reply

    def test_it_can_be_switched_off(self, serve):
        with Wire(serve(json_comment_filtered=False)) as wire:
            reply, = wire.post({**HANDSHAKE, "ext": {"json-comment-filtered": True}})
            assert reply["successful"]
            assert "ext" not in reply

    # -- Old clients -------------------------------------------------------------------------
    # Whole conversations, as they were seen on the wires of the original.

    def call(self, wire, *messages):
        """Dojo's way: every call is a form, the ids are strings that count from "0"."""
        for message in messages:
            message.update(id=str(self.calls), timestamp="2008-10-10T10:10:10")
            self.calls += 1
        form = urllib.parse.urlencode({"message": json.dumps(messages)})
        wire.send_request("POST", "/cometd", form.encode(),
                          Content_Type="application/x-www-form-urlencoded; charset=UTF-8")
        return [message["id"] for message in messages]

    def answer(self, wire):
        answer = wire.read_answer()
        assert answer.headers["content-type"] == "text/json-comment-filtered; charset=utf-8"
        text = answer.body.decode("utf-8")
        return json.loads(text[text.index("/*") + 2:text.rindex("*/")])       # as dojo cuts it

    def ask_of_old(self, wire, *messages):
        ids = self.call(wire, *messages)
        replies = self.answer(wire)
        assert [reply["id"] for reply in replies[:len(ids)]] == ids
        return replies

    def test_a_dojo_client_of_2008(self, serve):
        """Forms, ids from "0", timestamps, comments, the first connect, an echo, /meta/ping, an event."""
        server = serve(services={"echo": lambda message: {"data": message["data"]}})
        self.calls = 0
        with Wire(server) as wire, Wire(server) as side:
            shake, = self.ask_of_old(wire, {"channel": "/meta/handshake", "version": "1.0", "minimumVersion": "0.9",
                                     "supportedConnectionTypes": ["long-polling", "callback-polling"],
                                     "ext": {"json-comment-filtered": True}})
            assert shake["id"] == "0" and shake["successful"]
            assert float(shake["version"]) <= 1.0, "the Perl client wants no newer one"
            mine = {"clientId": shake["clientId"]}
            connect = {"channel": "/meta/connect", "connectionType": "long-polling", **mine}
            reply, = self.ask_of_old(wire, dict(connect))
            assert reply["successful"] and reply["advice"]["reconnect"] == "retry"
            replies = self.ask_of_old(side, {"channel": "/meta/subscribe", "subscription": "/chat/demo", **mine},
                               {"channel": "/chat/demo", "data": {"user": "anna", "join": True}, **mine})
            assert [(each["channel"], each["successful"]) for each in replies] == [
                ("/meta/subscribe", True), ("/chat/demo", True)]
            last, = self.call(wire, dict(connect))
            reply, event = self.answer(wire)
            assert reply["id"] == last and event == {"channel": "/chat/demo", "data": {"user": "anna", "join": True}}
            echo, = self.ask_of_old(side, {"channel": "/service/echo", "data": [1], **mine})
            assert echo["data"] == [1]
            ping, = self.ask_of_old(side, {"channel": "/meta/ping", "ext": {"timesync": {"tc": 5, "l": 0, "o": 0}}, **mine})
            assert set(ping["ext"]["timesync"]) == {"tc", "ts", "p", "a"} and ping["ext"]["timesync"]["tc"] == 5
            assert self.ask_of_old(side, {"channel": "/meta/unsubscribe", "subscription": "/chat/demo", **mine})[0]["successful"]
            assert self.ask_of_old(side, {"channel": "/meta/disconnect", **mine})[0]["successful"]
        assert server.sessions == []

    # -- Cross origin ------------------------------------------------------------------------

    ELSEWHERE = "https://elsewhere.example"

    @staticmethod
    def access_headers(answer):
        return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}

    def ask_from_origin(self, server, method="POST", target="/cometd", **headers):
        body = json.dumps([PING]).encode() if method == "POST" else b""
        with Wire(server) as wire:
            return wire.request(method, target, body, **headers)

    @for_each("origin", [
        ELSEWHERE, "null", "http://127.0.0.1:8080", "http://127.0.0.1.example", "http://[", "nonsense", "", "unknown",
        "x://127.0.0.1", "ws://127.0.0.1", "file://127.0.0.1", "//127.0.0.1", "://127.0.0.1", "127.0.0.1",
        "https://127.0.0.1", "https://127.0.0.1:80", "http://127.0.0.1:443", "http://127.0.0.1/",
        "http://user@127.0.0.1", "http://" + "a" * 300, "http://127.0.0.1, http://127.0.0.1"])
    def test_foreign_origins_get_nothing_by_default(self, server, origin):
        with bystander(server):
            for method in ("POST", "OPTIONS"):
                answer = self.ask_from_origin(server, method, Origin=origin, Access_Control_Request_Method="POST")
                assert answer.status == 403
                assert is_bayeux_failure(answer)
                assert self.access_headers(answer) == {}

    @for_each("origin", ["http://127.0.0.1", "http://127.0.0.1:80", "HTTP://127.0.0.1", "http://127.0.0.1:", None])
    def test_the_own_origin_and_no_origin_pass(self, server, origin):
        """The port of http or https may be left out.  No origin: no browser."""
        answer = self.ask_from_origin(server, **({"Origin": origin} if origin else {}))
        assert answer.status == 200
        assert self.access_headers(answer) == {}

    def test_an_allowed_origin_is_echoed_exactly_with_credentials(self, serve):
        server = serve(allowed_origins=[self.ELSEWHERE, "http://second.example:81"])
        for origin in (self.ELSEWHERE, "http://second.example:81"):
            answer = self.ask_from_origin(server, Origin=origin)
            assert answer.status == 200
            assert self.access_headers(answer) == {"access-control-allow-origin": origin,
                                                   "access-control-allow-credentials": "true"}
            assert answer.headers["vary"] == "Origin"
        for origin in (self.ELSEWHERE + ":444", "http://elsewhere.example", self.ELSEWHERE + ".evil.example"):
            assert self.ask_from_origin(server, Origin=origin).status == 403

    def test_an_allowed_origin_may_be_written_with_its_port_and_in_any_case(self, serve):
        server = serve(allowed_origins=["https://Elsewhere.example:443", "http://second.example"])
        for origin in (self.ELSEWHERE, "http://second.example"):
            assert self.ask_from_origin(server, Origin=origin).headers["access-control-allow-origin"] == origin
        assert self.ask_from_origin(server, Origin="https://second.example").status == 403

    def test_over_tls_the_own_origin_is_one_of_https(self, serve_tls, tls):
        with Wire(serve_tls(), tls) as wire:
            for origin, status in (("https://127.0.0.1", 200), ("https://127.0.0.1:443", 200),
                                   ("http://127.0.0.1", 403), ("http://127.0.0.1:443", 403)):
                assert wire.request("POST", "/cometd", json.dumps([PING]).encode(), Origin=origin).status == status

    @for_each(("proxy", "forwarded", "passing"), [
        ("127.0.0.1", "https", ["https://127.0.0.1"]), ("127.0.0.1", "HTTP", ["http://127.0.0.1"]),
        ("127.0.0.1", "wss", ["https://127.0.0.1"]), ("127.0.0.1", "ws", ["http://127.0.0.1"]),
        ("127.0.0.1", "https, http", ["https://127.0.0.1"]),
        ("127.0.0.1", None, ["http://127.0.0.1", "https://127.0.0.1"]),
        ("127.0.0.1", "gopher", ["http://127.0.0.1", "https://127.0.0.1"]),
        ("10.0.0.1", "http", ["http://127.0.0.1", "https://127.0.0.1"])])
    def test_behind_a_proxy_the_scheme_is_what_the_proxy_says(self, serve, proxy, forwarded, passing):
        """Where it says nothing, http and https are alike."""
        server = serve(trusted_proxies=[proxy])
        headers = {} if forwarded is None else {"X_Forwarded_Proto": forwarded}
        assert [origin for origin in ("http://127.0.0.1", "https://127.0.0.1", "https://127.0.0.1:80", self.ELSEWHERE)
                if self.ask_from_origin(server, Origin=origin, **headers).status == 200] == passing

    @for_each(("origin", "advice"), [
        (ELSEWHERE, "--allowed-origin, or let the proxy pass on Host"), ("null", "--allowed-origin, or let the proxy"),
        ("https://127.0.0.1", "--trusted-proxy and let the proxy send X-Forwarded-Proto")])
    def test_a_refused_origin_is_logged_with_the_host_and_what_to_do(self, server, caplog, origin, advice):
        caplog.set_level(logging.INFO)
        self.ask_from_origin(server, Origin=origin)
        record, = caplog.records
        assert f"Origin {origin} is not allowed here with Host 127.0.0.1" in record.getMessage()
        assert advice in record.getMessage()

    def test_a_preflight_of_an_allowed_origin(self, serve):
        answer = self.ask_from_origin(serve(allowed_origins=[self.ELSEWHERE]), "OPTIONS", Origin=self.ELSEWHERE,
                          Access_Control_Request_Method="POST", Access_Control_Request_Headers="content-type")
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == self.ELSEWHERE
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert {"Content-Type", "X-Requested-With"} <= set(answer.headers["access-control-allow-headers"].split(", "))

    @for_each(("asked", "is_allowed"), [("pragma", True), ("authorization, x-a", True), ("a b", False), ("a,", False)])
    def test_a_preflight_allows_the_headers_it_asks_for(self, serve, asked, is_allowed):
        """Faye's XHR sends Pragma, and Chromium asks first."""
        answer = self.ask_from_origin(serve(allowed_origins=[self.ELSEWHERE]), "OPTIONS", Origin=self.ELSEWHERE,
                          Access_Control_Request_Method="POST", Access_Control_Request_Headers=asked)
        assert answer.headers["access-control-allow-headers"].endswith(", " + asked) == is_allowed

    @for_each("method", ["POST", "OPTIONS"])
    def test_any_origin_comes_without_credentials(self, serve, method):
        answer = self.ask_from_origin(serve(allowed_origins=["*"]), method, Origin=self.ELSEWHERE)
        assert answer.status == (200 if method == "POST" else 204)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers

    def test_a_page_of_an_allowed_origin_can_read_errors_too(self, serve):
        """Without the header it sees a network failure, and tries again at once."""
        with Wire(serve(allowed_origins=[self.ELSEWHERE])) as wire:
            answer = wire.request("POST", "/cometd", b"no JSON", Origin=self.ELSEWHERE)
            assert answer.status == 400
            assert answer.headers["access-control-allow-origin"] == self.ELSEWHERE

    @for_each("headers", [
        {"Referer": "https://elsewhere.example/page"}, {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"}, {"Referer": "http://["}, {"Referer": "http://127.0.0.1:8080/"},
        {"Referer": "about:blank"}, {"Referer": ""}, {"Referer": "https://127.0.0.1/"}, {"Referer": "x://127.0.0.1/"},
        {"Referer": "http://127.0.0.1@elsewhere.example/"}, {"Referer": "http://elsewhere.example?http://127.0.0.1/"},
        {"Origin": "https://elsewhere.example"}])
    def test_scripts_for_foreign_pages_are_refused(self, server, headers):
        """Whoever loads one, with the visitor's cookies, could read his events."""
        with bystander(server):
            assert self.ask_from_origin(server, "GET", jsonp_target(HANDSHAKE), **headers).status == 403
        assert len(server.core.sessions) == 1, "only the bystander's"

    def test_scripts_for_pages_that_do_not_tell_their_origin_are_refused(self, server, caplog):
        """A page can leave out Referer, and where there is no TLS browsers send no Sec-Fetch-Site."""
        caplog.set_level(logging.INFO)
        answer = self.ask_from_origin(server, "GET", jsonp_target(HANDSHAKE))
        assert answer.status == 403
        failure, = script_batch(answer)
        assert "JSONP needs Referer or Sec-Fetch-Site" in failure["error"]
        assert "JSONP needs Referer or Sec-Fetch-Site" in caplog.text
        assert server.core.sessions == {}

    def test_scripts_for_any_page_are_served_if_any_origin_is_allowed(self, serve):
        assert self.ask_from_origin(serve(allowed_origins=["*"]), "GET", jsonp_target(PING)).status == 200

    @for_each("headers", [
        {"Origin": "http://127.0.0.1"},
        {"Referer": "http://127.0.0.1/page"}, {"Referer": "http://127.0.0.1?x"},
        {"Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "none"},
        {"Referer": "http://127.0.0.1/page", "Sec_Fetch_Site": "same-origin"}])
    def test_scripts_for_own_pages_are_served(self, server, headers):
        assert script_batch(self.ask_from_origin(server, "GET", jsonp_target(PING), **headers))[0]["successful"]

    def test_scripts_for_allowed_pages_are_served(self, serve):
        server = serve(allowed_origins=[self.ELSEWHERE])
        assert self.ask_from_origin(server, "GET", jsonp_target(PING), Referer=self.ELSEWHERE + "/page",
                        Sec_Fetch_Site="cross-site").status == 200

    # -- Cross origin type -------------------------------------------------------------------
    # Faye's name for long-polling from another origin.

    TYPE = "cross-origin-long-polling"

    @staticmethod
    def offer_types(core, *types):
        return core.ask({"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": list(types)})[0]

    def test_not_offered_where_no_origin_is_allowed(self, core):
        reply = self.offer_types(core, self.TYPE)
        assert not reply["successful"]
        assert self.TYPE not in reply["supportedConnectionTypes"]
        client_id = core.handshake()
        reply, = core.ask(core.connect_message(client_id, connectionType=self.TYPE))
        assert reply["error"].startswith("400:")

    @for_each("origins", [["*"], ["https://good.example"]])
    def test_offered_where_one_is(self, origins):
        core = CorePeer(allowed_origins=origins)
        assert self.offer_types(core, self.TYPE)["supportedConnectionTypes"] == [self.TYPE]
        assert set(self.offer_types(core, "long-polling", self.TYPE)["supportedConnectionTypes"]) == {
            "long-polling", self.TYPE}

    def test_it_is_long_polling(self):
        core = CorePeer(allowed_origins=["*"])
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        exchange = core.hold(client_id, connectionType=self.TYPE)
        core.core.publish("/a", 1)
        core.work()
        assert exchange.answer[1:] == [{"channel": "/a", "data": 1}]

    # -- Hosts -------------------------------------------------------------------------------
    # A page of another name that was led to this machine (DNS rebinding) is told nothing.

    @staticmethod
    def ask_host(server, host, target="/", version="1.1", more=""):
        """The status of a request with this Host, None for none."""
        with Wire(server) as wire:
            host_line = f"Host: {host}\r\n" if host is not None else ""
            wire.send(f"GET {target} HTTP/{version}\r\n{host_line}{more}\r\n")
            return wire.read_answer()

    @pytest.fixture
    def page(self, serve, tmp_path):
        """Starts a server whose / is a file: page(option=value, ...)."""
        (tmp_path / "index.html").write_text("page")
        return lambda **options: serve(docroot=str(tmp_path), **options)

    @for_each("host", [
        "127.0.0.1", "localhost", "LocalHost:8080", "localhost.", "app.localhost", "10.1.2.3:80", "[::1]",
        "[2001:DB8::1]:81", "[::ffff:1.2.3.4]", "127.0.0.1:"])
    def test_addresses_and_localhost_pass(self, page, host):
        assert self.ask_host(page(), host).status == 200

    @for_each("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "notlocalhost",
                       "127.0.0.1.evil.example", "1", "0x7f.1", "127.1", "a_b~c", "%61", "1.2.3.4.5"])
    def test_another_name_is_misdirected_on_a_loopback_address(self, page, host, caplog):
        """RFC 9110, 421: for files, content handlers, and every transport of Bayeux."""
        caplog.set_level(logging.INFO)
        server = page(content_handlers={"/handler": lambda request: "handled"})
        upgrade = header_lines()
        stream = "Accept: text/event-stream\r\n"
        for target, more in (("/", ""), ("/missing", ""), ("/handler", ""), ("/cometd", upgrade), ("/cometd/x", stream),
                             (jsonp_target(HANDSHAKE), "Sec-Fetch-Site: same-origin\r\n")):
            caplog.clear()
            answer = self.ask_host(server, host, target, more=more)
            assert answer.status == 421
            flag = f"--allowed-host {host.partition(':')[0]}"
            assert flag.replace("%", "_" if b"{" in answer.body else "%") in answer.body.decode()
            assert len(caplog.records) == 1 and flag in caplog.text
        with Wire(server) as wire:
            wire.send(whole_post(HANDSHAKE).replace(b"Host: 127.0.0.1", b"Host: " + host.encode()))
            answer = wire.read_answer()
            assert answer.status == 421 and is_bayeux_failure(answer)
        assert server.core.sessions == {}

    def test_allowed_hosts_pass(self, page):
        server = page(allowed_hosts=["Example.org", "my_app", "other.example."])
        for host, status in (("example.org", 200), ("EXAMPLE.ORG.:443", 200), ("my_app", 200), ("other.example", 200),
                             ("www.example.org", 421), ("localhost", 200)):
            assert self.ask_host(server, host).status == status, host

    def test_any_host_may_be_allowed(self, page):
        assert self.ask_host(page(allowed_hosts=["*"]), "evil.example").status == 200

    def test_the_option_host_passes(self, page):
        server = page(host="localhost")
        assert [self.ask_host(server, host).status for host in ("localhost", "evil.example")] == [200, 421]

    def test_elsewhere_any_name_passes_unless_some_are_named(self, page):
        assert self.ask_host(page(host="0.0.0.0"), "evil.example").status == 200
        server = page(host="0.0.0.0", allowed_hosts=["example.org"])
        assert [self.ask_host(server, host).status for host in ("evil.example", "example.org", "10.0.0.1")] == [
            421, 200, 200]

    @for_each(("address", "is_local"), [
        ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
        ("::", False), ("10.0.0.1", False), ("fe80::1%lo", False), ("::ffff:10.0.0.1", False)])
    def test_what_is_a_loopback_address(self, address, is_local):
        assert bayeux_server.is_loopback(address) == is_local

    @for_each("host", [
        "", " ", "a b", "a/b", "user@a", "a:b", "a:-1", "a:123456", "a:80:80", "[::1", "::1", "[]", "[1.2.3.4]",
        "[::1]x", "[::1%25eth0]", "[v1.a]", "a,b\"c", "<a>", "%zz", "\xfc", ".", ":80", "x" * 256, "http://a"])
    @for_each("version", ["1.1", "1.0"])
    def test_what_is_no_host_is_400(self, page, host, version):
        """RFC 9112: an invalid Host is 400.  Whatever may be allowed, and whatever the version."""
        with Wire(page(allowed_hosts=["*"])) as wire:
            wire.send(f"GET / HTTP/{version}\r\nHost: {host}\r\n\r\n".encode("latin-1"))
            assert wire.read_answer().status == 400

    def test_http_1_0_needs_no_host_but_may_name_no_strange_one(self, page):
        """No browser speaks it."""
        server = page()
        assert [self.ask_host(server, host, version="1.0").status for host in (None, "evil.example")] == [200, 421]
        assert self.ask_host(server, None).status == 400

    @for_each(("target", "host", "status"), [
        ("http://localhost/", "evil.example", 200), ("HTTP://127.0.0.1:8080", "localhost", 200),
        ("hTTps://[::1]/?query", "localhost", 200), ("http://localhost?query", "localhost", 200),
        ("http://evil.example/", "localhost", 421), ("HTTP://evil.example", "localhost", 421),
        ("http:///", "localhost", 400), ("http://", "localhost", 400), ("http://user@localhost/", "localhost", 400),
        ("http://localhost/", "a b", 400), ("ftp://localhost/", "localhost", 400), ("http:/x", "localhost", 400)])
    def test_the_host_of_a_whole_url_counts(self, page, target, host, status):
        """RFC 9112, "absolute-form": Host is ignored then, though it must be valid."""
        assert self.ask_host(page(), host, target).status == status

    def test_the_application_sees_the_host_that_counts(self, serve):
        seen = []
        server = serve(content_handlers={"/": lambda request: seen.append(request) or b""})
        self.ask_host(server, "LocalHost:81", "/a")
        self.ask_host(server, "localhost", "HTTP://App.LocalHost:82?q")
        assert [(each.host, each.port, each.headers["host"], each.target) for each in seen] == [
            ("localhost", 81, "LocalHost:81", "/a"), ("app.localhost", 82, "App.LocalHost:82", "/?q")]

    def test_hosts_are_remembered_within_bounds(self, server):
        for number in range(2 * bayeux_server.HOSTS_KEPT):
            self.ask_host(server, f"host{number}.localhost")
        assert len(server.http._admitted_hosts) <= bayeux_server.HOSTS_KEPT
        assert bayeux_server.read_kept_authority.cache_info().currsize <= bayeux_server.HOSTS_KEPT

    # -- Cookies -----------------------------------------------------------------------------

    @staticmethod
    def handshake_cookie(wire, **headers):
        """The clientId and the cookie of a new session."""
        wire.send_post(HANDSHAKE, **headers)
        answer = wire.read_answer()
        return answer.batch[0]["clientId"], answer.headers.get("set-cookie")

    def test_a_handshake_names_the_browser(self, server):
        with Wire(server) as wire:
            _, cookie = self.handshake_cookie(wire)
            name, *attributes = cookie.split("; ")
            assert name.startswith("BAYEUX_BROWSER=") and len(name) > len("BAYEUX_BROWSER=") + 20
            assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Lax"]
            assert self.handshake_cookie(wire, Cookie=f"a=b; {name}; c=d")[1] is None, "it has its name"
            assert self.handshake_cookie(wire)[1] != cookie
            wire.send_post(PING)
            assert "set-cookie" not in wire.read_answer().headers

    @for_each("cookie", ["BAYEUX_BROWSER=", "BAYEUX_BROWSER=a b", "XBAYEUX_BROWSER=abc", "=;=;",
                         "BAYEUX_BROWSER=" + "x" * 65, "BAYEUX_BROWSER=<script>"])
    def test_a_strange_cookie_is_none(self, server, cookie):
        with Wire(server) as wire:
            assert self.handshake_cookie(wire, Cookie=cookie)[1] is not None

    def test_it_is_secure_under_tls(self, serve_tls, tls):
        with Wire(serve_tls(), tls) as wire:
            assert self.handshake_cookie(wire)[1].endswith("; Secure")

    def test_no_cookie_is_ever_required(self, server):
        """Many clients keep none."""
        with Peer(server) as peer:
            assert peer.poll().data == []

    def test_the_second_session_of_a_browser_is_told_to_poll(self, serve):
        """As long as the first holds its connect."""
        server = serve(max_sessions_per_browser=1)
        with Wire(server) as first, Wire(server) as second, Wire(server) as stranger:
            first_id, cookie = self.handshake_cookie(first)
            headers = {"Cookie": cookie.partition(";")[0]}
            second_id, _ = self.handshake_cookie(second, **headers)
            stranger_id, _ = self.handshake_cookie(stranger)
            for wire, client_id in ((first, first_id), (second, second_id), (stranger, stranger_id)):
                wire.post(CorePeer.connect_message(client_id), **(headers if wire is not stranger else {}))
            first.send_post(CorePeer.connect_message(first_id), **headers)
            until_held(server, first_id)
            reply, = second.post(CorePeer.connect_message(second_id), **headers)
            assert reply["successful"]
            assert reply["advice"]["multiple-clients"] is True
            assert reply["advice"]["interval"] > 0
            stranger.send_post(CorePeer.connect_message(stranger_id))
            until_held(server, stranger_id)
            first.close()
            until_held(server, first_id, is_over=True)
            second.send_post(CorePeer.connect_message(second_id), **headers)
            until_held(server, second_id)

    def test_four_sessions_of_a_browser_are_held_by_default(self, server):
        """A browser opens six connections to a host, and what they hold is no use for anything else."""
        with Wire(server) as wire:
            _, cookie = self.handshake_cookie(wire)
            headers = {"Cookie": cookie.partition(";")[0]}
            wires = [Wire(server) for _ in range(5)]
            for each in wires:
                client_id, _ = self.handshake_cookie(each, **headers)
                each.post(CorePeer.connect_message(client_id), **headers)
                each.send_post(CorePeer.connect_message(client_id), **headers)
                if each is not wires[-1]:
                    until_held(server, client_id)
            assert wires[-1].read_answer().batch[0]["advice"]["multiple-clients"] is True
            for each in wires:
                each.close()

    def test_a_bound_session_works_only_with_its_cookie(self, serve):
        """A stolen clientId is worth nothing."""
        server = serve(bind_sessions=True)
        with Wire(server) as wire:
            client_id, cookie = self.handshake_cookie(wire)
            connect = CorePeer.connect_message(client_id)
            for headers in ({}, {"Cookie": "BAYEUX_BROWSER=0123456789"}):
                reply, = wire.post(connect, **headers)
                assert reply["error"].startswith("402:")
                assert reply["advice"]["reconnect"] == "handshake"
            assert wire.post(connect, Cookie=cookie.partition(";")[0])[0]["successful"]

    # -- Addresses ---------------------------------------------------------------------------

    def is_held_at_last(self, server, **headers):
        """Whether a connect of a new session is held; it hangs up then."""
        with Wire(server) as wire:
            client_id = wire.post(HANDSHAKE, **headers)[0]["clientId"]
            wire.post(CorePeer.connect_message(client_id), **headers)
            wire.send_post(CorePeer.connect_message(client_id, id="last"), **headers)
            wait_until(lambda: wire.is_readable() or is_held(server, client_id))
            if is_held(server, client_id):
                wire.close()
                until_held(server, client_id, is_over=True)
                return True
            assert wire.read_answer().batch[0]["advice"] == ADVICE_POLL
            return False

    def test_exactly_client_max_connections_are_held(self, serve):
        """The original let one too many in."""
        server = serve(client_max_connections=3)
        peers = [Peer(server) for _ in range(3)]
        for peer in peers[:2]:
            peer.hold()
        assert self.is_held_at_last(server), "a third"
        peers[2].hold()
        assert not self.is_held_at_last(server)
        for peer in peers:
            peer.close()

    def test_what_is_answered_at_once_is_never_refused(self, serve):
        """Of an office of thirty twenty were dead once, as the eleventh request of an address was refused."""
        server = serve(client_max_connections=1)
        with Peer(server) as peer, Peer(server) as other, Wire(server) as wire:
            peer.hold()
            peer.publish("/a", 1)
            other.subscribe("/a")
            other.publish("/a", 1)
            assert wire.request("GET", jsonp_target(PING), **OWN_PAGE).status == 200
            assert wire.request("GET", "/").status == 404
            assert other.connect().data == [1]
            assert other.ask("/meta/disconnect")["successful"]

    def test_a_stream_too_many_is_refused_in_a_bayeux_array(self, serve, caplog):
        """503, Retry-After; whereupon stock clients fall back to long-polling."""
        server = serve(client_max_connections=1)
        with Peer(server) as peer, Wire(server) as wire:
            peer.hold()
            for headers in (upgrade_headers(), {"Accept": "text/event-stream"}):
                answer = wire.request("GET", f"/cometd/{peer.id}", X_Forwarded_For="9.9.9.9", **headers)
                assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
                assert is_bayeux_failure(answer)
                assert answer.batch[0]["error"].startswith("503::")
        wait_until(lambda: "--trusted-proxy 127.0.0.1" in caplog.text)

    def test_a_stream_counts_until_its_connection_is_closed(self, serve):
        server = serve(client_max_connections=1)
        with Peer(server) as peer:
            for open_stream in (lambda: SocketWire(server), lambda: EventWire(server, peer.id)):
                stream = open_stream()
                assert not self.is_held_at_last(server)
                stream.close()
                wait_until(lambda: not server.core.kept_open, "the return of the count")
            assert self.is_held_at_last(server)

    def test_a_stream_is_counted_and_forgotten_once(self, core):
        core = CorePeer(client_max_connections=3)
        streams = [FakeStream(), FakeStream()]
        for stream in streams:
            stream.address = "10.0.0.1"
            assert core.core.count_stream(stream)
        for _ in range(2):
            core.core.forget_stream(streams[0])
        assert core.core.kept_open == {"10.0.0.1": 1}

    def test_the_count_is_given_back_by_answers_and_by_hang_ups(self, serve):
        server = serve(client_max_connections=1)
        with Peer(server) as peer:
            for _ in range(10):
                assert self.is_held_at_last(server)
                peer.poll()
                peer.request("POST", "/cometd", b"no JSON")
            for hang_up in (socket.socket.close, reset):
                with Peer(server) as other:
                    other.hold()
                    assert not self.is_held_at_last(server)
                    hang_up(other.socket)
                    wait_until(lambda: not server.core.kept_open, "the return of the count")

    def test_no_limit(self, serve):
        server = serve(client_max_connections=0)
        peers = [Peer(server) for _ in range(15)]
        for peer in peers:
            peer.hold()
        assert self.is_held_at_last(server)
        for peer in peers:
            peer.close()

    def test_a_forged_x_forwarded_for_is_not_believed(self, serve, caplog):
        """The original did.  But if all come from one address, it may be an honest proxy."""
        server = serve(client_max_connections=1)
        with Peer(server) as peer:
            peer.hold()
            assert not self.is_held_at_last(server, X_Forwarded_For="9.9.9.9")
            wait_until(lambda: "127.0.0.1 keeps as many connections open" in caplog.text)
            assert "--trusted-proxy 127.0.0.1" in caplog.text

    def test_a_trusted_proxy_speaks_for_its_clients(self, serve, caplog):
        server = serve(client_max_connections=1, trusted_proxies=["127.0.0.0/8"])
        with Peer(server) as peer, Peer(server) as second:
            peer.send_post(CorePeer.connect_message(peer.id), X_Forwarded_For="9.9.9.9")
            until_held(server, peer.id)
            assert not self.is_held_at_last(server, X_Forwarded_For="9.9.9.9:4711")
            assert not self.is_held_at_last(server, X_Forwarded_For="8.8.8.8, 9.9.9.9")
            assert self.is_held_at_last(server, X_Forwarded_For="8.8.8.8")
            second.hold()
            assert self.is_held_at_last(server), "the proxy itself has no limit"
            wait_until(lambda: "9.9.9.9 keeps as many connections open" in caplog.text)
            assert "--trusted-proxy" not in caplog.text

    def test_a_wrapped_ipv4_address_is_one(self, serve):
        """A server that listens on :: sees IPv4 clients as ::ffff:192.0.2.1; they and their proxies are IPv4."""
        server = serve(trusted_proxies=["10.0.0.0/8"])
        for peer, address, group in (("::ffff:10.0.0.1", "10.0.0.1", ""),
                                     ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"),
                                     ("2001:db8::7%2", "2001:db8::7", "2001:db8::/64")):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                client = socket.create_connection(listener.getsockname())
                server.process_request(listener.accept()[0], (peer, 1, 0, 0))
            connection, = [each for each in list(server.watch.connections) if each.address == address]
            assert connection.group == group
            client.close()

    @for_each("forwarded, address", [
        ("9.9.9.9", "9.9.9.9"), ("8.8.8.8, 9.9.9.9", "9.9.9.9"), ("9.9.9.9, 10.1.2.3", "9.9.9.9"),
        ("8.8.8.8,9.9.9.9,10.1.2.3, 10.4.5.6", "9.9.9.9"), ("10.1.2.3", "10.1.2.3"),
        (None, "127.0.0.1"), ("", "127.0.0.1"), ("2001:db8::1", "2001:db8::1"), (", ,", "127.0.0.1")])
    def test_the_address_is_the_last_that_is_no_proxy(self, serve, forwarded, address):
        server = serve(trusted_proxies=["127.0.0.1", "10.0.0.0/8"])
        with Wire(server) as wire:
            headers = {} if forwarded is None else {"X_Forwarded_For": forwarded}
            reply, = wire.post(HANDSHAKE, **headers)
            assert server.core.sessions[reply["clientId"]].address == address

    # -- Content handlers --------------------------------------------------------------------

    def test_what_a_handler_may_return(self, serve):
        """ContentHandler: text, bytes or a Response, for its path and all below."""
        server = serve(content_handlers={
            "/text": lambda request: "<b>ü</b>", "/bytes": lambda request: b"bytes",
            "/own": lambda request: bayeux_server.Response("made", 201, {"X-Own": "yes"})})
        with Wire(server) as wire:
            answer = wire.request("GET", "/text")
            assert (answer.status, answer.body.decode()) == (200, "<b>ü</b>")
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            assert wire.request("GET", "/bytes/below").body == b"bytes"
            answer = wire.request("GET", "/own")
            assert (answer.status, answer.headers["x-own"], answer.body) == (201, "yes", b"made")
            assert wire.request("GET", "/textual").status == 404
            assert wire.request("HEAD", "/text").headers["content-length"] == "9"

    def test_what_a_handler_sees(self, serve):
        seen = []
        server = serve(content_handlers={"/form": lambda request: seen.append(request) or b""})
        with Wire(server) as wire:
            wire.request("PUT", "/form/%C3%BC?a=b", b"the body", X_Own="yes")
        request, = seen
        assert (request.method, request.target) == ("PUT", "/form/%C3%BC?a=b")
        assert (request.path, request.query) == ("/form/ü", "a=b")
        assert (request.version, request.headers["x-own"], request.body) == ((1, 1), "yes", b"the body")
        assert (request.address, request.is_secure) == ("127.0.0.1", False)

    def test_what_a_handler_does_to_its_request_is_not_seen_by_the_next(self, serve):
        """Requests that begin alike are read once; each has its own headers all the same."""
        seen = []

        def handler(request):
            seen.append(dict(request.headers))
            request.headers["x-own"] = "changed"
            request.headers["x-more"] = "more"
            return b""

        with Wire(serve(content_handlers={"/a": handler})) as wire:
            for _ in range(2):
                wire.request("GET", "/a", X_Own="yes")
        assert seen[0] == seen[1] and seen[0]["x-own"] == "yes"

    def test_the_longest_prefix_wins(self, serve):
        server = serve(content_handlers={"/": lambda request: "root", "/a": lambda request: "a",
                                         "/a/b": lambda request: "a/b"})
        with Wire(server) as wire:
            assert [wire.request("GET", path).body for path in ("/x", "/a", "/a/b/c", "/ab")] == [
                b"root", b"a", b"a/b", b"root"]
            assert wire.post(PING)[0]["successful"], "the Bayeux path stays ours"

    def fail(self, request):
        raise RuntimeError("handler")

    @for_each("handler", [
        fail, lambda self, request: None, lambda self, request: 7,
        lambda self, request: bayeux_server.Response(7)], ids=["raises", "None", "number", "body"])
    def test_a_handler_that_fails_gets_500_and_a_line_in_the_log(self, serve, errors, handler):
        server = serve(content_handlers={"/bad": lambda request: handler(self, request)})
        with bystander(server), Wire(server) as wire:
            assert wire.request("GET", "/bad").status == 500
        assert len(errors.take()) == 1

    @for_each("status", [204, 304])
    def test_an_answer_without_a_body(self, serve, status):
        server = serve(content_handlers={"/none": lambda request: bayeux_server.Response(None, status)})
        with Wire(server) as wire:
            assert wire.request("GET", "/none").status == status
            assert wire.post(PING)[0]["successful"]

    def test_a_header_s_value_cannot_begin_another_header(self, serve):
        server = serve(content_handlers={"/": lambda request: bayeux_server.Response(
            headers={"Location": "/\r\nSet-Cookie: a=b\0\x1b\x7f\tc"})})
        with Wire(server) as wire:
            headers = wire.request("GET", "/").headers
            assert "set-cookie" not in headers
            assert headers["location"] == "/  Set-Cookie: a=b   \tc"

    @for_each("response", [
        *[{"status": status} for status in (None, "200", True, 0, 100, 101, 199, 600, 1000, 200.5)],
        *[{"headers": {name: "x"}} for name in ("", "a b", "a:", "a\r\nb", "\u00fc", "a\0", "(", 1, None)]], ids=repr)
    def test_what_is_no_status_or_name_is_the_application_s_failure(self, serve, errors, response):
        server = serve(content_handlers={"/": lambda request: bayeux_server.Response("x", **response)})
        with bystander(server), Wire(server) as wire:
            answer = wire.request("GET", "/")
            assert (answer.status, answer.body) == (500, b"The server failed\n")
        line, = errors.take()
        assert repr(response.get("status", *response.get("headers", []))) in line

    def test_the_same_holds_for_post_handle(self, serve, errors):
        def post_handle(request, response):
            response.headers["a b"] = "c"

        server = serve(content_handlers={"/": lambda request: "x"}, post_handle=post_handle)
        with Wire(server) as wire:
            answer = wire.request("GET", "/")
            assert (answer.status, answer.body) == (500, b"post_handle failed\n")
        assert len(errors.take()) == 1

    @for_each("status", [200, 299, 404, 599, http.HTTPStatus.CREATED])
    def test_any_final_status_passes(self, serve, status):
        server = serve(content_handlers={"/": lambda request: bayeux_server.Response("x", status)})
        with Wire(server) as wire:
            assert wire.request("GET", "/").status == status

    def test_what_frames_the_answer_is_the_server_s(self, serve):
        """RFC 9112: two readers must not see two ends."""
        server = serve(content_handlers={"/": lambda request: bayeux_server.Response("body", headers={
            "Transfer-Encoding": "chunked", "content-length": "99", "Connection": "close", "Keep-Alive": "x",
            "Trailer": "x", "DATE": "x", "X": "y"})})
        with Wire(server) as wire:
            for _ in range(2):
                answer = wire.request("GET", "/")
                assert answer.body == b"body" and answer.headers["content-length"] == "4" and answer.headers["x"] == "y"
                assert not {"transfer-encoding", "connection", "keep-alive", "trailer"} & set(answer.headers)

    def test_a_header_may_be_sent_several_times(self, serve):
        server = serve(content_handlers={"/": lambda request: bayeux_server.Response(
            headers={"Set-Cookie": ["a=1", "b=2\r\n"], "X": ("c",), "Y": []})})
        with Wire(server) as wire:
            wire.send("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head = b"".join(iter(lambda: wire.socket.recv(65536), b"")).split(b"\r\n")
        assert [line for line in head if line.startswith((b"Set", b"X:", b"Y"))] == [
            b"Set-Cookie: a=1", b"Set-Cookie: b=2  ", b"X: c"]

    # -- Post handle -------------------------------------------------------------------------

    def test_it_may_change_everything(self, serve, tmp_path):
        """PostHandle: status, headers and body, of files, errors and content handlers."""
        (tmp_path / "file.txt").write_text("file")
        seen = []

        def post_handle(request, response):
            seen.append((request.path, response.status))
            response.status = 418
            response.headers["X-Own"] = "yes"
            response.headers.pop("Content-Type", None)
            response.body = f"instead of {request.path}"

        server = serve(docroot=str(tmp_path), content_handlers={"/handler": lambda request: "text"},
                       post_handle=post_handle)
        with Wire(server) as wire:
            for path in ("/file.txt", "/missing", "/handler"):
                answer = wire.request("GET", path)
                assert (answer.status, answer.headers["x-own"]) == (418, "yes")
                assert answer.body.decode() == f"instead of {path}"
            assert wire.post(PING)[0]["successful"], "Bayeux is not concerned"
        assert seen == [("/file.txt", 200), ("/missing", 404), ("/handler", 200)]

    def test_it_may_leave_everything(self, serve, tmp_path):
        (tmp_path / "file.txt").write_text("file")
        with Wire(serve(docroot=str(tmp_path), post_handle=lambda request, response: None)) as wire:
            assert wire.request("GET", "/file.txt").body == b"file"

    @for_each("body", [bytearray(b"text"), "raise"], ids=["bytearray", "raises"])
    def test_one_that_fails_harms_only_its_answer(self, serve, errors, body):
        def post_handle(request, response):
            if body == "raise":
                raise RuntimeError("post_handle")
            response.body = body

        server = serve(content_handlers={"/": lambda request: b""}, post_handle=post_handle)
        with bystander(server), Wire(server) as wire:
            answer = wire.request("GET", "/")
            assert answer.status == 500
        assert len(errors.take()) == 1

    # -- Web socket --------------------------------------------------------------------------
    # Over real sockets.

    # -- The upgrade -----------------------------------------------------------------------
    @for_each(("changes", "status"), [
        ({}, 101),
        ({"Upgrade": "WebSocket"}, 101),
        ({"Connection": "keep-alive, Upgrade"}, 101),
        ({"Connection": "upgrade"}, 101),
        ({"Connection": None}, 400),
        ({"Connection": "keep-alive"}, 400),
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": "short"}, 400),
        ({"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ"}, 400),
        ({"Sec_WebSocket_Version": "8"}, 426),
        ({"Sec_WebSocket_Version": None}, 426),
    ])
    def test_what_an_upgrade_needs(self, server, changes, status):
        with Wire(server) as wire:
            answer = wire.request("GET", "/cometd", **upgrade_headers(**changes))
            assert answer.status == status
            if status == 426:
                assert answer.headers["sec-websocket-version"] == "13"
            if status != 101:
                assert answer.batch[0]["successful"] is False
                assert wire.post({"channel": "/meta/handshake", "version": "1.0"})[0]["successful"]

    def test_http_1_0_is_not_upgraded(self, server):
        with Wire(server) as wire:
            wire.send("GET /cometd HTTP/1.0\r\n" + header_lines() + "\r\n")
            assert wire.read_answer().status == 400

    def test_a_path_below_ours_will_do(self, server):
        with Wire(server) as wire:
            assert wire.request("GET", "/cometd/websocket", **upgrade_headers()).status == 101

    def test_a_foreign_origin_is_refused(self, serve):
        with Wire(serve(allowed_origins=["https://good.example"])) as wire:
            for origin in ("https://bad.example", "http://good.example", "https://good.example.bad.example", "null"):
                assert wire.request("GET", "/cometd", **upgrade_headers(Origin=origin)).status == 403

    @for_each("origin", ["https://good.example", "http://127.0.0.1", None])
    def test_an_allowed_origin_our_own_and_none_are_welcome(self, serve, origin):
        server = serve(allowed_origins=["https://good.example"])
        with SocketWire(server, Origin=origin) as wire:
            assert wire.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]["successful"]

    def test_what_we_do_not_know_is_not_agreed_on(self, server):
        """A subprotocol, an extension"""
        with Wire(server) as wire:
            answer = wire.request("GET", "/cometd", **upgrade_headers(
                Sec_WebSocket_Protocol="cometd, bayeux", Sec_WebSocket_Extensions="permessage-deflate"))
            assert answer.status == 101
            assert "sec-websocket-protocol" not in answer.headers
            assert "sec-websocket-extensions" not in answer.headers

    def test_another_upgrade_than_ours_is_not_taken(self, server):
        """RFC 9110: a server may ignore an upgrade that it does not know."""
        with Wire(server) as wire:
            message = urllib.parse.quote(json.dumps({"channel": "/meta/handshake", "version": "1.0"}))
            answer = wire.request("GET", "/cometd?message=" + message, Upgrade="h2c", Connection="Upgrade",
                                  **OWN_PAGE)
            assert answer.status == 200

    def test_frames_right_behind_the_upgrade_request(self, server):
        with Wire(server) as wire:
            head = "GET /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\n" + header_lines() + "\r\n"
            message = b'[{"channel": "/meta/handshake", "version": "1.0"}]'
            wire.send(head.encode() + masked(TEXT_FRAME, message) + masked(PING_FRAME, b"p"))
            assert wire.read_answer().status == 101
            wire.__class__ = SocketWire         # from here on it speaks frames
            assert wire.read_batch()[0]["successful"]
            assert wire.read_frame() == (PONG_FRAME, b"p")

    def test_an_upgrade_behind_a_held_connect(self, server):
        with Peer(server) as peer:
            peer.send_connect(id=1)
            peer.send_request("GET", "/cometd", **upgrade_headers())
            assert peer.read_answer().batch[0]["id"] == 1
            assert peer.read_answer().status == 101

    # -- Batches ---------------------------------------------------------------------------

    def test_batches_go_both_ways(self, server):
        """One frame in, one frame out, a reply each, in order"""
        with SocketWire(server) as wire:
            client_id = wire.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]["clientId"]
            replies = wire.ask_batch(
                {"channel": "/meta/subscribe", "clientId": client_id, "subscription": "/a", "id": 1},
                {"channel": "/a", "clientId": client_id, "data": "x", "id": 2},
                {"channel": "/nonsense/**", "clientId": client_id, "id": 3}, "no object",
                {"channel": "/meta/unsubscribe", "clientId": client_id, "subscription": "/a", "id": 4})
            assert [reply.get("id") for reply in replies] == [1, 2, 3, None, 4]
            assert [reply["successful"] for reply in replies] == [True, True, False, False, True]

    def test_a_lone_message_is_a_batch_too(self, server):
        with SocketWire(server) as wire:
            wire.send_frame(TEXT_FRAME, b'{"channel": "/meta/handshake", "version": "1.0"}')
            assert wire.read_batch()[0]["successful"]

    def test_a_batch_in_fragments(self, server):
        with SocketWire(server) as wire:
            message = '[{"channel": "/meta/handshake", "version": "1.0", "id": "é"}]'.encode()
            wire.send(fragments(TEXT_FRAME, *in_bytes(message)))
            assert wire.read_batch()[0]["id"] == "é"

    def test_frames_that_come_together_are_answered_in_order(self, server):
        with SocketPeer(server) as peer:
            peer.send(b"".join(masked(TEXT_FRAME, json.dumps({
                "channel": "/a", "clientId": peer.id, "data": "x", "id": number}).encode()) for number in range(200)))
            assert [peer.read_batch()[0]["id"] for _ in range(200)] == list(range(200))

    @for_each("text", ["", "x", "[", "[]", "null", '"x"', '{"a": 1, "a": 2}', "[NaN]", "[" * 200])
    def test_what_holds_no_batch_is_refused_and_the_socket_lives(self, server, text):
        with SocketWire(server) as wire:
            wire.send_frame(TEXT_FRAME, text.encode())
            batch = wire.read_batch()
            assert len(batch) == 1
            assert batch[0]["successful"] is False
            assert batch[0]["error"].startswith("400:")
            assert wire.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]["successful"]

    @for_each("letter", ["x", "é", "☃"])
    def test_a_message_too_large_is_refused_and_its_neighbours_are_not(self, serve, letter):
        """Bytes are counted, whatever the characters"""
        with SocketPeer(serve(max_message_size=3000)) as peer:
            data = letter * (3000 // len(letter.encode()))
            peer.send_frame(TEXT_FRAME, json.dumps([
                {"channel": "/a", "clientId": peer.id, "data": data, "id": 1},
                {"channel": "/a", "clientId": peer.id, "data": "small", "id": 2}], ensure_ascii=False).encode())
            large, small = peer.read_batch()
            assert large["id"] == 1 and large["error"].startswith("413:")
            assert small["id"] == 2 and small["successful"]

    # -- Events ----------------------------------------------------------------------------

    def test_events_leave_as_frames_of_their_own(self, server):
        """The connect goes on being held"""
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            held = peer.send_connect()
            for number in range(3):
                server.publish("/a", number)
                assert peer.read_batch() == [{"channel": "/a", "data": number}]
            assert peer.ask("/meta/connect", connectionType="websocket", advice={"timeout": 0})["successful"]
            assert peer.reply(held)["successful"]

    def test_events_need_no_held_connect(self, server):
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            server.publish("/a", "x")
            assert peer.receive(1) == ["x"]

    def test_a_held_connect_is_released_by_its_timeout(self, serve):
        with SocketPeer(serve(timeout=0.05)) as peer:
            for _ in range(3):
                assert peer.connect().data == []

    def test_a_newer_connect_releases_the_older(self, server):
        with SocketPeer(server) as peer:
            first, second = peer.send_connect(), peer.send_connect()
            assert peer.reply(first)["successful"]
            assert not any(reply["id"] == second for reply in peer.replies)
            assert peer.ask("/meta/disconnect")["successful"]
            assert peer.reply(second) == {"channel": "/meta/connect", "successful": True, "id": second}

    def test_waiting_events_leave_together_but_not_too_many(self, serve):
        """max_frame_events"""
        server = serve(max_frame_events=3)
        with SocketWire(server) as wire:
            client_id = wire.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]["clientId"]
            server.subscribe("/a", client_id)
            for number in range(7):
                server.publish("/a", number)
            wire.send_batch({"channel": "/meta/connect", "clientId": client_id, "connectionType": "websocket"})
            batches = [wire.read_batch() for _ in range(4)]
            frames = [[event["data"] for event in batch] for batch in batches if "successful" not in batch[0]]
            assert frames == [[0, 1, 2], [3, 4, 5], [6]]

    def test_two_sessions_on_one_socket(self, server):
        with SocketPeer(server) as peer:
            ann = peer.id
            peer.subscribe("/a")
            peer.id = bob = peer.ask("/meta/handshake", version="1.0")["clientId"]
            peer.subscribe("/b")
            assert peer.poll().reply["successful"]
            server.publish("/a", "to ann")
            server.publish("/b", "to bob")
            assert sorted(peer.receive(2)) == ["to ann", "to bob"]
            assert {session.id for session in server.sessions} == {ann, bob}

    # -- Sessions outlive sockets ----------------------------------------------------------

    def test_a_new_socket_carries_on_a_live_session(self, server):
        with SocketPeer(server) as first:
            first.subscribe("/a")
            with SocketPeer(server, client_id=first.id) as second:
                server.publish("/a", "x")
                assert second.receive(1) == ["x"]
                first.close()
                server.publish("/a", "y")
                assert second.receive(1) == ["y"]

    def test_a_hang_up_keeps_the_session_and_its_events(self, server):
        with SocketPeer(server) as first:
            first.subscribe("/a")
            first.hold()
            session = session_of(server, first.id)
        wait_until(lambda: session.stream is None and session.hold is None)
        for number in range(3):
            server.publish("/a", number)
        with SocketPeer(server, client_id=first.id) as second:
            assert second.receive(3) == [0, 1, 2]

    def test_changing_the_transport_keeps_order_and_loses_nothing(self, server):
        total, taken, is_over = 300, [], threading.Event()
        with Wire(server) as polling, LocalClient(server) as publisher:
            client_id = polling.post({"channel": "/meta/handshake", "version": "1.0"})[0]["clientId"]
            connect = CorePeer.connect_message(client_id)
            polling.post(connect)
            server.subscribe("/a", client_id)

            def publish():
                for number in range(total):
                    publisher.publish("/a", number)
                    is_over.wait(0.001)

            thread = threading.Thread(target=publish)
            thread.start()
            while len(taken) < total:
                taken += [event["data"] for event in polling.post(connect)[1:]]
                if len(taken) < total:
                    with SocketPeer(server, client_id=client_id) as peer:
                        taken += peer.receive(1)
                        polled = polling.post({**connect, "advice": {"timeout": 0}})[1:]
                        peer.send_frame(CLOSE_FRAME)
                        opcode, payload = peer.read_frame()
                        while opcode == TEXT_FRAME:               # what had left before the transport changed
                            peer.events += [each for each in json.loads(payload) if "successful" not in each]
                            opcode, payload = peer.read_frame()
                        taken += peer.receive(len(peer.events)) + [event["data"] for event in polled]
            thread.join(PATIENCE)
        assert taken == list(range(total)) and not thread.is_alive()

    def test_a_slow_reader_costs_little_and_loses_nothing(self, serve):
        """Its events wait in the session, not in the output."""
        server = serve(max_frame_events=10)
        size, total = 25_000, 200
        with SocketPeer(server) as peer, SocketPeer(server) as bystander:
            make_buffers_small(server, peer)
            peer.subscribe("/a")
            session = session_of(server, peer.id)
            for number in range(total):
                server.publish("/a", [number, "x" * size])
            wait_until(lambda: any(connection.output for connection in server.watch.connections))
            assert session.waiting > total // 4
            assert max(connection.unsent for connection in server.watch.connections) < 11 * size
            bystander.publish("/b", "nobody else has to wait")
            assert [data[0] for data in peer.receive(total)] == list(range(total))

    def test_a_hang_up_puts_back_what_was_not_written(self, serve):
        server = serve(max_frame_events=10)
        total = 200
        with SocketPeer(server) as peer:
            make_buffers_small(server, peer)
            peer.subscribe("/a")
            session = session_of(server, peer.id)
            for number in range(total):
                server.publish("/a", [number, "x" * 25_000])
            wait_until(lambda: any(connection.output for connection in server.watch.connections))
            waiting = len(session.queue)
        wait_until(lambda: session.stream is None)
        assert waiting < len(session.queue) <= total        # the frame that was under way is back
        with SocketPeer(server, client_id=peer.id) as second:
            numbers = [data[0] for data in second.receive(1)]
            while numbers[-1] != total - 1:
                numbers += [data[0] for data in second.receive(1)]
        assert numbers == list(range(numbers[0], total))
        assert len(numbers) > waiting

    def test_a_closing_socket_takes_no_events_and_no_time(self, server):
        """What cannot be written waits, and is not tried again and again"""
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            sent, send = [], server.core.send
            server.core.send = lambda answers: sent.extend(answers) or send(answers)
            peer.send_frame(CLOSE_FRAME, b"\x03\xe8")
            assert peer.read_frame() == (CLOSE_FRAME, b"\x03\xe8")
            server.publish("/a", "x")               # the socket is still open on our side
            with SocketPeer(server) as other:
                for _ in range(20):
                    other.publish("/b", "time passes")
            with SocketPeer(server, client_id=peer.id) as second:
                assert second.receive(1) == ["x"]
            events = [answer for answer in sent if [event.channel for event in answer.events] == ["/a"]]
            assert len(events) < 5
            server.core.send = send

    # -- Threads ---------------------------------------------------------------------------

    def test_an_idle_socket_costs_no_thread(self, server):
        peers = [SocketPeer(server) for _ in range(10)]
        before = len(threads_of_servers())
        peers += [SocketPeer(server) for _ in range(190)]
        for peer in peers:
            peer.subscribe("/a")
            peer.hold()
        assert len(threads_of_servers()) <= before + 2
        server.publish("/a", "to all")
        for peer in peers:
            assert peer.receive(1) == ["to all"]
            peer.close()

    def test_a_slow_service_harms_nobody_else(self, serve):
        entered, leave = threading.Event(), threading.Event()

        def slow(message):
            entered.set()
            assert leave.wait(PATIENCE)

        server = serve(services={"slow": slow})
        with SocketPeer(server) as peer, SocketPeer(server) as other:
            first, second = peer.send_message("/service/slow", data=1), peer.send_message("/a", data=2)
            assert entered.wait(PATIENCE)
            other.subscribe("/b")
            server.publish("/b", "still here")
            assert other.receive(1) == ["still here"]
            leave.set()
            while len(peer.replies) < 2:
                peer.sort()
            assert [reply["id"] for reply in peer.replies] == [first, second]

    def test_what_is_sent_while_a_service_is_slow_reaches_the_socket(self, serve):
        """Events do not wait for the replies of the same socket."""
        leave, entered = threading.Event(), threading.Event()
        server = serve(services={"slow": lambda message: entered.set() or leave.wait(PATIENCE) and None})
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            slow = peer.send_message("/service/slow", data=1)
            assert entered.wait(PATIENCE)
            server.publish("/a", "x")
            assert peer.receive(1) == ["x"]
            leave.set()
            assert peer.reply(slow)["successful"]

    def test_a_socket_whose_message_is_being_handled_is_not_dropped(self, serve):
        """Nobody could read its pong."""
        entered, leave = threading.Event(), threading.Event()
        server = serve(request_timeout=0.2, services={"slow": lambda message: entered.set() or leave.wait(PATIENCE)
                                                      and None})
        with SocketPeer(server) as peer:
            slow = peer.send_message("/service/slow", data=1)
            assert entered.wait(PATIENCE)
            connection, = server.watch.connections
            for _ in range(3):
                connection.deadline, sweep = 0.0, server.watch._next_sweep
                wait_until(lambda before=sweep: server.watch._next_sweep > before, "a look at the deadlines")
            leave.set()
            opcode, payload = peer.read_frame()
            while opcode == PING_FRAME:
                opcode, payload = peer.read_frame()
            assert json.loads(payload)[0]["id"] == slow

    # -- Ping ------------------------------------------------------------------------------

    def test_a_ping_is_answered_with_its_payload(self, server):
        with SocketWire(server) as wire:
            for payload in (b"", b"hello", b"\0\xff" * 62):
                wire.send_frame(PING_FRAME, payload)
                assert wire.read_frame() == (PONG_FRAME, payload)

    def test_an_unasked_pong_does_no_harm(self, server):
        with SocketWire(server) as wire:
            wire.send_frame(PONG_FRAME, b"here I am")
            wire.send_frame(PING_FRAME, b"x")
            assert wire.read_frame() == (PONG_FRAME, b"x")

    def test_an_idle_peer_is_pinged_again_and_again_and_dropped_when_silent(self, serve):
        server = serve(request_timeout=0.2)         # the watch looks at its deadlines every quarter of it
        with SocketPeer(server) as peer:
            connection, = server.watch.connections
            for _ in range(3):
                let_time_pass(server)
                opcode, payload = peer.read_frame()
                assert opcode == PING_FRAME
                deadline = connection.deadline
                peer.send_frame(PONG_FRAME, payload)
                wait_until(lambda before=deadline: before < connection.deadline < float("inf"), "the pong's effect")
            assert peer.ask("/a", data=1)["successful"]
            session = session_of(server, peer.id)
            let_time_pass(server)
            assert peer.read_frame()[0] == PING_FRAME
            let_time_pass(server)
            assert peer.read_frame() is None
            wait_until(lambda: session.stream is None)
            assert session.ended is None

    def test_ping_interval_is_the_time(self, serve):
        with SocketWire(serve(ping_interval=0.05, request_timeout=0.2)) as wire:
            assert wire.read_frame()[0] == PING_FRAME
            assert wire.read_frame() is None

    def test_without_ping_interval_nobody_is_pinged(self, serve):
        server = serve(ping_interval=0)
        with SocketWire(server) as wire:
            assert wire.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]["successful"]
            connection, = server.watch.connections
            wait_until(lambda: connection.deadline == float("inf"))

    # -- The end ---------------------------------------------------------------------------

    @for_each("payload", [b"", b"\x03\xe8", b"\x03\xe9going", b"\x0f\xa0mine"])
    def test_a_close_is_answered_with_its_own_code(self, server, payload):
        with SocketWire(server) as wire:
            wire.send_frame(CLOSE_FRAME, payload)
            assert wire.read_frame() == (CLOSE_FRAME, payload[:2])
            assert wire.read_frame() is None

    def test_nothing_is_taken_behind_a_close(self, server):
        with SocketPeer(server) as peer:
            peer.send(masked(CLOSE_FRAME, b"\x03\xe8") + masked(TEXT_FRAME, json.dumps(
                {"channel": "/meta/disconnect", "clientId": peer.id}).encode()) + masked(PING_FRAME))
            assert peer.read_frame() == (CLOSE_FRAME, b"\x03\xe8")
            assert peer.read_frame() is None
            assert [session.id for session in server.sessions] == [peer.id]

    @for_each(("data", "code"), [
        (b"\x81\x02hi", 1002),
        (masked(TEXT_FRAME, b"", reserved=0x40), 1002),
        (masked(0, b"x"), 1002),
        (masked(3), 1002),
        (masked(CLOSE_FRAME, b"\x03\xee"), 1002),
        (masked(BINARY_FRAME, b"[]"), 1003),
        (masked(TEXT_FRAME, b"\xff"), 1007),
        (masked(TEXT_FRAME, b"x" * 5001), 1009),
        (masked(TEXT_FRAME, b"x" * 5001)[:8], 1009),
        (fragments(TEXT_FRAME, b"x" * 3000, b"x" * 3000), 1009),
    ])
    def test_a_broken_rule_closes_the_socket_and_not_the_session(self, serve, data, code):
        server = serve(max_request_size=5000)
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            peer.send(data)
            found, reason = peer.read_close()
            assert found == code
            assert reason
            server.publish("/a", "still there")
            with SocketPeer(server, client_id=peer.id) as second:
                assert second.receive(1) == ["still there"]

    def test_the_servers_end_is_going_away(self, server):
        with SocketPeer(server) as peer:
            held = peer.hold()
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            assert peer.reply(held)["advice"]["reconnect"] == "retry"
            assert peer.read_close()[0] == 1001
            stopping.join(PATIENCE)
            assert not stopping.is_alive()

    def test_what_was_published_before_the_servers_end_arrives(self, server):
        with SocketPeer(server) as peer:
            peer.subscribe("/a")
            peer.hold()
            for number in range(20):
                server.publish("/a", number)
            server.shutdown()
            assert peer.receive(20) == list(range(20))

    def test_a_disconnect_leaves_the_socket_open(self, server):
        with SocketPeer(server) as peer:
            held = peer.send_connect()
            assert peer.ask("/meta/disconnect")["successful"]
            assert peer.reply(held) == {"channel": "/meta/connect", "successful": True, "id": held}
            assert peer.ask("/a", data=1)["error"].startswith("402:")
            peer.id = None
            assert peer.ask("/meta/handshake", version="1.0")["successful"]

    # -- The rest --------------------------------------------------------------------------

    def test_a_websocket_through_tls(self, serve_tls, tls):
        server = serve_tls(max_frame_events=3)
        with SocketPeer(server, tls) as peer:
            peer.subscribe("/a")
            peer.publish("/a", "é" * 5000)
            assert peer.receive(1) == ["é" * 5000]
            for number in range(30):
                server.publish("/a", [number, "x" * 50_000])
            assert [data[0] for data in peer.receive(30)] == list(range(30))
            peer.send_frame(CLOSE_FRAME, b"\x03\xe8")
            assert peer.read_frame() == (CLOSE_FRAME, b"\x03\xe8")

    def test_a_socket_counts_among_the_connections_that_its_address_keeps_open(self, serve):
        server = serve(client_max_connections=2)
        with SocketWire(server), SocketWire(server) as second, Wire(server) as third:
            assert third.request("GET", "/cometd", **upgrade_headers()).status == 503
            second.close()
            wait_until(lambda: third.request("GET", "/cometd", **upgrade_headers()).status == 101)

    def test_a_bound_session_needs_the_cookie_on_the_socket_too(self, serve):
        server = serve(bind_sessions=True)
        with Wire(server) as wire:
            wire.send_post({"channel": "/meta/handshake", "version": "1.0"})
            answer = wire.read_answer()
            client_id, cookie = answer.batch[0]["clientId"], answer.headers["set-cookie"].split(";")[0]
        connect = {"channel": "/meta/connect", "clientId": client_id, "connectionType": "websocket"}
        with SocketWire(server) as thief:
            assert thief.ask_batch(connect)[0]["error"].startswith("402:")
        with SocketWire(server, Cookie=cookie) as owner:
            assert owner.ask_batch(connect)[0]["successful"]

    def test_a_session_begun_on_a_socket_is_bound_by_the_cookie_of_the_upgrade(self, serve):
        """A frame carries no cookie, so a browser that has none is named when it upgrades."""
        server = serve(bind_sessions=True)
        with Wire(server) as wire:
            cookie = wire.request("GET", "/cometd", **upgrade_headers()).headers["set-cookie"]
            assert cookie.startswith("BAYEUX_BROWSER=") and "; HttpOnly; SameSite=Lax" in cookie
        with SocketWire(server) as owner, SocketWire(server) as thief:
            handshake = owner.ask_batch({"channel": "/meta/handshake", "version": "1.0"})[0]
            connect = {"channel": "/meta/connect", "clientId": handshake["clientId"], "connectionType": "websocket"}
            assert thief.ask_batch(connect)[0]["error"].startswith("402:")
            assert owner.ask_batch(connect)[0]["successful"]

    # -- Event stream ------------------------------------------------------------------------
    # Requests by POST, events as server-sent events.

    @staticmethod
    def connect(peer, **fields):
        return peer.ask("/meta/connect", connectionType="eventsource", **fields)

    def test_it_is_offered(self, server):
        with Wire(server) as wire:
            reply, = wire.post({"channel": "/meta/handshake", "version": "1.0",
                                "supportedConnectionTypes": ["eventsource", "unheard-of"]})
            assert reply["supportedConnectionTypes"] == ["eventsource"]

    def test_the_answers_head(self, server):
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            assert stream.answer.status == 200
            assert stream.answer.headers["content-type"].startswith("text/event-stream")
            assert stream.answer.headers["cache-control"] == "no-store"
            assert "content-length" not in stream.answer.headers

    def test_fayes_way(self, server):
        """POST handshake, GET the stream, POST connect, subscribe and publish"""
        with Wire(server) as wire:
            client_id = wire.post({"channel": "/meta/handshake", "version": "1.0", "id": "1",
                                   "supportedConnectionTypes": ["eventsource", "long-polling"]})[0]["clientId"]
            with EventWire(server, client_id) as stream:
                connect, = wire.post({"channel": "/meta/connect", "clientId": client_id, "id": "2",
                                      "connectionType": "eventsource", "advice": {"timeout": 0}})
                assert connect["successful"] and connect["id"] == "2"
                assert wire.post({"channel": "/meta/subscribe", "clientId": client_id,
                                  "subscription": "/a"})[0]["successful"]
                assert wire.post({"channel": "/a", "clientId": client_id, "data": "x\u2028\r\ny"})[0]["successful"]
                assert stream.read_batch() == [{"channel": "/a", "data": "x\u2028\r\ny"}]

    @for_each(("options", "interval"), [
        ({}, 30_000), ({"timeout": 10}, 10_000), ({"connect_timeout": 8}, 4_000),
        ({"timeout": 10, "interval": 12}, 12_000)])
    def test_a_connect_is_answered_at_once_with_a_long_interval(self, serve, options, interval):
        """Its connects carry nothing, and only show that it lives."""
        server = serve(**options)
        with Peer(server) as peer, EventWire(server, peer.id):
            for _ in range(2):
                reply = self.connect(peer)
                assert reply["successful"]
                assert reply["advice"]["interval"] == interval

    def test_order_is_kept_and_nothing_lost(self, serve):
        server = serve(max_frame_events=7)
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            peer.subscribe("/a")
            for number in range(500):
                server.publish("/a", number)
            assert stream.receive(500) == list(range(500))

    def test_events_that_waited_come_with_the_stream(self, serve):
        """Bounded by max_frame_events"""
        server = serve(max_frame_events=3)
        with Peer(server) as peer:
            peer.subscribe("/a")
            for number in range(5):
                server.publish("/a", number)
            with EventWire(server, peer.id) as stream:
                assert [[event["data"] for event in stream.read_batch()] for _ in range(2)] == [[0, 1, 2], [3, 4]]

    def test_a_hang_up_of_an_event_stream_keeps_the_session_and_its_events(self, server):
        with Peer(server) as peer:
            peer.subscribe("/a")
            with EventWire(server, peer.id):
                session = session_of(server, peer.id)
                wait_until(lambda: session.stream is not None)
            wait_until(lambda: session.stream is None)
            server.publish("/a", "x")
            with EventWire(server, peer.id) as second:
                assert second.receive(1) == ["x"]

    def test_a_newer_stream_takes_over(self, server):
        with Peer(server) as peer, EventWire(server, peer.id), EventWire(server, peer.id) as newer:
            peer.subscribe("/a")
            assert newer.read_part() == ":"
            session = session_of(server, peer.id)
            wait_until(lambda: session.stream is not None)
            peer.publish("/a", "x")
            assert newer.receive(1) == ["x"]

    def test_a_connect_over_long_polling_leaves_the_stream_alone(self, server):
        """Its requests come another way in any case; once it is closed they take the events."""
        with Peer(server) as peer:
            peer.subscribe("/a")
            with EventWire(server, peer.id) as stream:
                session = session_of(server, peer.id)
                wait_until(lambda: session.stream is not None)
                assert peer.poll().reply["successful"]
                peer.publish("/a", "streamed")
                assert stream.receive(1) == ["streamed"]
            wait_until(lambda: session.stream is None)
            peer.publish("/a", "polled")
            assert [event["data"] for event in peer.connect()[1:]] == ["polled"]

    @for_each("end", ["unknown", "ended"])
    def test_a_stream_without_a_session_is_refused_so_that_the_browser_gives_it_up(self, server, end):
        """It would come again after every 200, for ever."""
        with Peer(server) as peer:
            client_id = peer.id if end == "ended" else "nobody"
            server.end_session(peer.id, "maintenance")
            with EventWire(server, client_id) as stream:
                assert stream.answer.status == 404
                reply, = stream.answer.batch
                assert error_code(reply) == 402 and ("maintenance" in reply["error"]) == (end == "ended")
                assert reply["advice"] == ADVICE_HANDSHAKE
                assert stream.post(PING)[0]["successful"], "the connection is good for the next request"

    def test_a_session_that_ends_while_its_stream_is_opened_ends_the_stream(self, server, monkeypatch):
        attach = server.core.attach

        def attach_late(client_id, stream):
            server.end_session(client_id, "maintenance")
            return attach(client_id, stream)

        monkeypatch.setattr(server.core, "attach", attach_late)
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            assert stream.answer.status == 200 and stream.read_batch() is None

    def test_the_end_of_the_session_ends_the_stream(self, server):
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            self.connect(peer)
            assert peer.ask("/meta/disconnect")["successful"]
            assert stream.read_batch() is None

    def test_a_session_ended_by_the_server_ends_the_stream(self, server):
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            server.end_session(peer.id, "maintenance")
            assert stream.read_batch() is None
            assert "maintenance" in self.connect(peer)["error"]

    def test_a_comment_now_and_then_keeps_the_connection_alive(self, serve):
        server = serve(request_timeout=0.2)
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            peer.subscribe("/a")
            assert stream.read_part() == ":"                # the first, so that something comes
            for _ in range(3):
                let_time_pass(server)
                assert stream.read_part() == ":"
            server.publish("/a", "x")
            assert stream.receive(1) == ["x"]

    def test_what_the_client_says_there_is_not_heard(self, server):
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            stream.send(b"POST /cometd HTTP/1.1\r\n\r\nnonsense")
            peer.subscribe("/a")
            peer.publish("/a", "x")
            assert stream.receive(1) == ["x"]

    def test_a_foreign_origin_is_refused_and_an_allowed_one_named(self, serve):
        server = serve(allowed_origins=["https://good.example"])
        with Peer(server) as peer:
            with EventWire(server, peer.id, Origin="https://bad.example") as stream:
                assert stream.answer.status == 403
                assert stream.answer.batch[0]["successful"] is False
            with EventWire(server, peer.id, Origin="https://good.example") as stream:
                assert stream.answer.headers["access-control-allow-origin"] == "https://good.example"

    def test_a_bound_session_needs_its_cookie(self, serve):
        server = serve(bind_sessions=True)
        with Wire(server) as wire:
            wire.send_post({"channel": "/meta/handshake", "version": "1.0"})
            answer = wire.read_answer()
            client_id, cookie = answer.batch[0]["clientId"], answer.headers["set-cookie"].split(";")[0]
        server.subscribe("/a", client_id)
        server.publish("/a", "x")
        with EventWire(server, client_id) as thief, EventWire(server, client_id, Cookie=cookie) as owner:
            assert thief.answer.status == 404 and error_code(thief.answer.batch[0]) == 402
            assert owner.receive(1) == ["x"]

    def test_streams_cost_no_threads(self, server):
        peers = [Peer(server) for _ in range(40)]
        before = len(threads_of_servers())
        streams = [EventWire(server, peer.id) for peer in peers]
        assert len(threads_of_servers()) <= before + 2
        for peer in peers:
            peer.subscribe("/a")
        server.publish("/a", "to all")
        for peer, stream in zip(peers, streams):
            assert stream.receive(1) == ["to all"]
            stream.close()
            peer.close()

    def test_with_acknowledgement_events_come_with_connects(self, server):
        with Wire(server) as wire:
            client_id = wire.post({"channel": "/meta/handshake", "version": "1.0", "ext": {"ack": True},
                                   "supportedConnectionTypes": ["eventsource"]})[0]["clientId"]
            connect = {"channel": "/meta/connect", "clientId": client_id, "connectionType": "eventsource"}
            with EventWire(server, client_id):
                assert wire.post({**connect, "ext": {"ack": -1}})[0]["ext"]["ack"] == 1
                server.subscribe("/a", client_id)
                server.publish("/a", "x")
                reply, event = wire.post({**connect, "ext": {"ack": 1}})
                assert (reply["ext"]["ack"], event["data"]) == (2, "x")

    def test_an_event_stream_through_tls(self, serve_tls, tls):
        server = serve_tls()
        with Peer(server, tls) as peer, EventWire(server, peer.id, tls) as stream:
            peer.subscribe("/a")
            peer.publish("/a", "x")
            assert stream.receive(1) == ["x"]

    def test_shutdown_ends_the_stream(self, server):
        with Peer(server) as peer, EventWire(server, peer.id) as stream:
            session = session_of(server, peer.id)
            wait_until(lambda: session.stream is not None)
            server.shutdown()
            assert stream.read_batch() is None

    # -- Conversation ------------------------------------------------------------------------
    # The core does not know what carries its messages; so one body of text holds for all transports.

    def test_from_handshake_to_disconnect(self, medium):
        begin = medium()
        ann, bob = begin(), begin()
        batch = ann.poll()
        assert batch.reply["advice"]["reconnect"] == "retry" and batch.data == []
        assert ann.ask("/meta/subscribe", subscription="/chat/*", id=0) == {
            "channel": "/meta/subscribe", "successful": True, "subscription": "/chat/*", "id": 0}
        assert bob.ask("/chat/demo", data={"text": "Grüße ☃ 😀"}, id="0") == {
            "channel": "/chat/demo", "successful": True, "id": "0"}
        assert ann.receive(1) == [{"text": "Grüße ☃ 😀"}]
        assert ann.ask("/meta/unsubscribe", subscription="/chat/*")["successful"]
        assert not ann.ask("/meta/unsubscribe", subscription="/chat/*")["successful"]
        assert ann.ask("/meta/disconnect")["successful"]
        assert ann.ask("/chat/demo", data=1)["advice"]["reconnect"] == "handshake"

    def test_order_is_kept(self, medium):
        begin = medium()
        ann, bob = begin(), begin()
        ann.poll()
        ann.ask("/meta/subscribe", subscription=["/a", "/**"])
        for number in range(50):
            bob.ask("/a", data=number)
        assert ann.receive(50) == list(range(50))

    @for_each("data", [None, False, 0, "", [], {}, "\u2028", "a" * 5000])
    def test_every_json_value_arrives(self, medium, data):
        ann = medium()()
        ann.poll()
        ann.ask("/meta/subscribe", subscription="/a")
        ann.ask("/a", data=data)
        assert ann.receive(1) == [data]

    def test_a_service_answers_its_caller(self, medium):
        ann = medium(services={"echo": lambda message: {"data": message["data"]}})()
        assert ann.ask("/service/echo", data="x", id=7) == {
            "channel": "/service/echo", "successful": True, "id": 7, "data": "x"}
        assert ann.ask("/service/none", data="x")["error"].startswith("404:")

    def test_an_unknown_client_is_told_to_shake_hands(self, medium):
        ann = medium()()
        ann.id = "nobody"
        reply = ann.poll().reply
        assert not reply["successful"]
        assert reply["error"].startswith("402:nobody:")
        assert reply["advice"] == {"reconnect": "handshake", "interval": 0}


# ======================================================================================
# §13  Files
# ======================================================================================

def get_raw(server, target):
    """A GET whose connection may be closed after it."""
    with Wire(server) as wire:
        return wire.request("GET", target)


class TestFiles:

    def test_a_file(self, get):
        answer = get("/digits.txt?query")
        assert (answer.status, answer.body) == (200, b"0123456789")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert get("/a%20b%20%C3%BC.txt").body == b"spaces"

    def test_head(self, get):
        answer = get("/digits.txt", "HEAD")
        assert (answer.status, answer.headers["content-length"], answer.body) == (200, "10", b"")
        assert get("/missing", "HEAD").status == 404

    def test_other_methods(self, get):
        answer = get("/digits.txt", "POST")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        answer = get("/digits.txt", "OPTIONS")
        assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")

    @for_each("name, mime_type", [
        ("x.html", "text/html; charset=utf-8"), ("x.js", "text/javascript; charset=utf-8"),
        ("x.mjs", "text/javascript; charset=utf-8"), ("x.css", "text/css; charset=utf-8"),
        ("x.json", "application/json"), ("x.svg", "image/svg+xml"), ("x.wasm", "application/wasm"),
        ("x.png", "image/png"), ("X.HTML", "text/html; charset=utf-8"),
        ("x.tar.gz", "application/gzip"), ("x.svgz", "application/octet-stream"),
        ("x", "application/octet-stream"), ("x.unheard-of", "application/octet-stream")])
    def test_types(self, get, site, name, mime_type):
        (site / name).write_bytes(b"x")
        assert get("/" + name).headers["content-type"] == mime_type

    def test_the_index(self, get):
        answer = get("/")
        assert (answer.status, answer.body) == (200, b"<p>index")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"

    def test_directory_index_is_tried_in_order(self, serve, site):
        """DirectoryIndex"""
        with Wire(serve(docroot=str(site), directory_index=["start.html", "default.html", "index.html"])) as wire:
            assert wire.request("GET", "/folder/").body == b"default"
            assert wire.request("GET", "/").body == b"<p>index"
            (site / "start.html").write_text("start")
            assert wire.request("GET", "/").body == b"start"

    def test_a_folder_without_a_slash_is_redirected(self, get):
        answer = get("/folder?query")
        assert (answer.status, answer.headers["location"]) == (301, "/folder/?query")

    @for_each("target", ["//elsewhere.example/..", "//folder", "/%2ffolder", "/%5cfolder", "///"])
    def test_a_redirect_never_leads_elsewhere(self, get, target):
        answer = get(target)
        assert answer.status == 404
        assert "location" not in answer.headers

    def test_type_expires(self, serve, site):
        """TypeExpires: Expires, and Cache-Control: max-age."""
        with Wire(serve(docroot=str(site), type_expires={"text/plain": 3600})) as wire:
            headers = wire.request("GET", "/digits.txt").headers
            assert headers["cache-control"] == "max-age=3600"
            expires, date = (email.utils.parsedate_to_datetime(headers[name]) for name in ("expires", "date"))
            assert abs((expires - date).total_seconds() - 3600) < PATIENCE
            assert "expires" not in wire.request("GET", "/").headers

    FORBIDDEN = (
        "/../secret.txt", "/folder/../../secret.txt", "/..", "/../", "/.", "/./digits.txt", "/folder/../digits.txt",
        "/%2e%2e/secret.txt", "/%2E%2E%2Fsecret.txt", "/..%2fsecret.txt", "/..%5csecret.txt", "/%252e%252e/secret.txt",
        "/%252e%252e%252fsecret.txt", "/..\\secret.txt", "/folder\\..\\..\\secret.txt", "/%c0%ae%c0%ae/secret.txt",
        "/digits.txt%00", "/%00", "/digits.txt%00.html", "/%ED%A0%80", "/%ff", "/%", "/%zz", "/digits.txt/",
        "/digits.txt/x", "/" + "x" * 5000, "/" + "x/" * 2000, "/.hidden", "/%2ehidden", "/.git/config", "/folder/.x",
        "/outside.txt", "/outside/secret.txt", "/outside/", "/outside", "/trap/", "/bare/", "/pipe", "/missing", "*")

    def test_what_must_not_be_read_is_not_found(self, get):
        """No .., tricks, NUL, dot-files, listings, links out of the root; and no waiting for a pipe's writer."""
        for target in self.FORBIDDEN:
            with bystander(get.server):
                answer = get(target)
                assert answer.status == 404, target
                assert b"secret" not in answer.body, target
                assert str(get.server.options.docroot).encode() not in answer.body, target

    @for_each("target", ["/#x", "/bare/#x", "/bare/#", "/trap/#x", "/trap/#/", "/bare/?#", "/bare#/"])
    def test_a_fragment_opens_nothing(self, get, target):
        """http.server cuts it off, behind the back of whoever has looked at the path."""
        answer = get_raw(get.server, target)
        assert answer.status == 400
        assert b"secret" not in answer.body and b"digits" not in answer.body

    def test_a_link_inside_of_the_root_is_followed(self, get):
        assert get("/inside.txt").body == b"0123456789"

    def test_a_link_to_a_hidden_name_is_refused(self, get, site):
        """The dot counts wherever it stands on the real path."""
        (site / "git").symlink_to(site / ".git")
        (site / "shown.txt").symlink_to(site / ".hidden")
        (site / "trap" / "default.html").symlink_to(site / ".hidden")
        for target in ("/git/config", "/git/", "/git", "/shown.txt", "/trap/default.html"):
            assert get(target).status == 404, target

    @pytest.fixture
    def when_checked(self, monkeypatch):
        """when_checked(path, do): do() once, when the server has looked at the path and not yet opened it."""
        def when_checked(path, do):
            def isfile(asked):
                result = is_file(asked)
                if asked == str(path) and todo:
                    todo.pop()()
                return result

            is_file, todo = os.path.isfile, [do]
            monkeypatch.setattr(os.path, "isfile", isfile)
        return when_checked

    @pytest.fixture(params=["name by name", "whole path"])
    def way_of_opening(self, request, monkeypatch):
        if request.param == "whole path":       # as on Windows
            monkeypatch.setattr(os, "supports_dir_fd", set())

    @for_each("changed", ["folder/secret.txt", "folder"])
    def test_a_link_that_appears_after_the_check_is_not_followed(self, get, site, way_of_opening, when_checked,
                                                                 changed):
        def flip():
            (site / changed).rename(site / "away")
            (site / changed).symlink_to(site.parent if changed == "folder" else site.parent / "secret.txt")

        (site / "folder" / "secret.txt").write_text("good")
        assert get("/folder/secret.txt").body == b"good"
        when_checked(site / "folder" / "secret.txt", flip)
        answer = get("/folder/secret.txt")
        assert answer.status == 404 and b"secret" not in answer.body
        assert (site / changed).is_symlink()

    def test_a_link_that_is_there_only_while_it_is_opened_is_not_followed(self, get, site, monkeypatch):
        """As on Windows, where the path is compared before and after."""
        def flipping_open(path, *flags, **options):
            if path != str(site / "folder" / "secret.txt"):
                return open_file(path, *flags, **options)
            (site / "folder").rename(site / "away")
            (site / "folder").symlink_to(site.parent)
            opened = open_file(path, *flags, **options)
            (site / "folder").unlink()
            (site / "away").rename(site / "folder")
            return opened

        (site / "folder" / "secret.txt").write_text("good")
        open_file = os.open
        monkeypatch.setattr(os, "supports_dir_fd", set())
        monkeypatch.setattr(os, "open", flipping_open)
        answer = get("/folder/secret.txt")
        assert answer.status == 404 and b"secret" not in answer.body

    @for_each("make", [os.mkfifo, os.mkdir])
    def test_what_takes_the_place_of_a_file_after_the_check_is_not_found(self, get, site, way_of_opening, when_checked,
                                                                         make):
        """A pipe is not waited for, either."""
        def exchange():
            (site / "digits.txt").unlink()
            make(site / "digits.txt")

        when_checked(site / "digits.txt", exchange)
        assert get("/digits.txt").status == 404

    @for_each(("number", "status"), [(errno.EMFILE, 503), (errno.ENFILE, 503), (errno.EACCES, 404)])
    def test_a_file_that_cannot_be_opened_now_is_there_all_the_same(self, get, monkeypatch, number, status):
        """A proxy, or a search engine, would keep the 404."""
        def fail(*arguments, **options):
            raise OSError(number, "test")

        monkeypatch.setattr(os, "open", fail)
        answer = get("/digits.txt")
        assert (answer.status, "retry-after" in answer.headers) == (status, status == 503)

    @for_each(("asked", "status"), [
        ("/folder/long%20name.txt", 200), ("/folder/LONGNA~1.TXT", 404), ("/FOLDER/long%20name.txt", 404),
        ("/folder/%C3%BC.txt", 200), ("/folder/long%20name.txt/", 404), ("/folder/long%20name.txt/x", 404)])
    def test_a_name_must_be_spelled_as_its_folder_lists_it(self, get, site, monkeypatch, asked, status):
        """Windows and macOS find a file in other case too, and by a short name.  Here links stand for those."""
        (site / "folder" / "long name.txt").write_text("text")
        (site / "folder" / "\u00fc.txt").write_text("text")
        os.link(site / "folder" / "long name.txt", site / "folder" / "LONGNA~1.TXT")
        (site / "FOLDER").symlink_to(site / "folder")
        listed = {str(site): ["folder"], str(site / "folder"): ["long name.txt", "u\u0308.txt"]}
        monkeypatch.setattr(bayeux_server, "LOOSE_NAMES", True)
        listdir = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path: listed.get(path) or listdir(path))
        assert get(asked).status == status

    def test_the_root_itself_may_be_a_link(self, serve, site, tmp_path):
        (tmp_path / "link").symlink_to(site)
        with Wire(serve(docroot=str(tmp_path / "link"))) as wire:
            assert wire.request("GET", "/digits.txt").status == 200
            assert wire.request("GET", "/outside.txt").status == 404

    def test_a_conditional_get(self, get):
        date = get("/digits.txt").headers["last-modified"]
        answer = get("/digits.txt", If_Modified_Since=date)
        assert (answer.status, answer.body) == (304, b"")
        for other in ("Thu, 01 Jan 1970 00:00:00 GMT", "nonsense", "", "Thu, 99 Jan 99999 00:00:00 GMT"):
            assert get("/digits.txt", If_Modified_Since=other).status == 200
        assert get("/digits.txt", If_Modified_Since=date, If_None_Match='"etag"').status == 200
        moment = email.utils.parsedate_to_datetime(date)
        for form in ("%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):         # RFC 9110: MUST be understood, too
            assert get("/digits.txt", If_Modified_Since=moment.strftime(form)).status == 304

    @for_each("asked, content, content_range", [
        ("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"), ("bytes=-99", b"0123456789", "bytes 0-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10")])
    def test_a_range(self, get, asked, content, content_range):
        answer = get("/digits.txt", Range=asked)
        assert (answer.status, answer.body, answer.headers["content-range"]) == (206, content, content_range)
        assert get("/digits.txt").headers["accept-ranges"] == "bytes"

    @for_each("asked", ["bytes=10-", "bytes=99-100", "bytes=-0"])
    def test_a_range_outside_of_the_file(self, get, asked):
        answer = get("/digits.txt", Range=asked)
        assert (answer.status, answer.headers["content-range"]) == (416, "bytes */10")

    @for_each("asked", ["bytes=0-1,4-5", "bytes=", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=5-2",
                        "bytes=1-" + "9" * 5000, "bytes=--1", ""], ids=lambda asked: asked[:20])
    def test_ranges_that_mean_nothing_here_are_ignored(self, get, asked):
        """RFC 9110: also one whose end is before its beginning.  Several ranges: the whole file is a valid answer."""
        answer = get("/digits.txt", Range=asked)
        assert (answer.status, answer.body) == (200, b"0123456789")

    def test_a_range_is_for_get_only(self, get):
        """RFC 9110, "Range": a server MUST ignore it with other methods."""
        answer = get("/digits.txt", "HEAD", Range="bytes=2-4")
        assert (answer.status, answer.headers["content-length"]) == (200, "10")

    def test_if_range(self, get):
        date = get("/digits.txt").headers["last-modified"]
        assert get("/digits.txt", Range="bytes=2-4", If_Range=date).body == b"234"
        assert get("/digits.txt", Range="bytes=2-4", If_Range="Thu, 01 Jan 1970 00:00:00 GMT").body == b"0123456789"
        assert get("/digits.txt", Range="bytes=2-4", If_Range='"etag"').body == b"0123456789"

    def test_an_empty_file(self, get, site):
        (site / "empty.txt").write_bytes(b"")
        answer = get("/empty.txt")
        assert (answer.status, answer.headers["content-length"]) == (200, "0")

    def test_a_big_file_goes_to_a_slow_reader_whole(self, serve, site):
        """It is read as it is sent; meanwhile others are served."""
        content = bytes(range(256)) * 10_000
        (site / "big.bin").write_bytes(content)
        server = serve(docroot=str(site))
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)       # its clients' sockets inherit it
        with Wire(server) as wire, bystander(server):
            wire.send_request("GET", "/big.bin")
            wait_until(lambda: any(each.output for each in list(server.watch.connections)), "a part that waits")
            with bystander(server):
                pass
            received = bytearray()
            while b"\r\n\r\n" not in received or len(received) < received.index(b"\r\n\r\n") + 4 + len(content):
                received += wire.socket.recv(1_000_000)
            is_whole = received[received.index(b"\r\n\r\n") + 4:] == content      # pytest would compare for minutes
            assert is_whole
            assert wire.post(PING)[0]["successful"]

    def test_a_fast_reader_of_a_big_file_does_not_keep_the_server_to_itself(self, serve, site):
        """Its reader is always ready; the others get their turn all the same."""
        with open(site / "huge.bin", "wb") as file:
            file.truncate(1 << 40)
        server = serve(docroot=str(site))
        with Wire(server) as wire, Wire(server) as other:
            wire.send_request("GET", "/huge.bin")
            is_served = threading.Event()

            def devour():
                buffer = bytearray(1 << 20)
                while not is_served.is_set():
                    wire.socket.recv_into(buffer)

            reader = threading.Thread(target=devour)
            reader.start()
            try:
                for _ in range(20):
                    assert other.post(PING)[0]["successful"]
            finally:
                is_served.set()
                reader.join(PATIENCE)
            assert not reader.is_alive()

    def test_a_file_that_shrinks_ends_its_connection_only(self, serve, site):
        (site / "shrinks.bin").write_bytes(b"x" * 20_000_000)
        server = serve(docroot=str(site))
        with Wire(server) as wire, bystander(server):
            wire.send_request("GET", "/shrinks.bin")
            wait_until(lambda: has_unsent_output(server), "output that waits")
            os.truncate(site / "shrinks.bin", 10)
            while wire.socket.recv(1_000_000):
                pass

    def test_without_a_root_there_are_no_files(self, server):
        with Wire(server) as wire:
            assert wire.request("GET", "/bayeux_server.py").status == 404


# ======================================================================================
# §14  The server
# ======================================================================================

def threads_of_servers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("bayeux")}


class StuckHandler(logging.Handler):
    """Writes nothing until the test lets it."""

    def __init__(self):
        super().__init__()
        self.may_write = threading.Event()
        self.is_writing = threading.Event()
        self.lines = []

    def emit(self, record):
        self.is_writing.set()
        assert self.may_write.wait(PATIENCE)
        self.lines.append(self.format(record).partition(" WARNING ")[2])


class FailingLog(logging.Handler):
    """A handler of the application's that fails at each line."""

    def emit(self, record):
        raise SystemExit("the log failed")


class TestServer:
    """The server as a whole: start, log, faults of its own loops, stop."""

    # -- Server ------------------------------------------------------------------------------
    # §14: BayeuxServer, made, started and used from Python.

    @pytest.fixture(autouse=True)
    def restore_level(self):
        """debug and log_file set the logger's level, which is one for the process."""
        level = logging.getLogger("bayeux_server").level
        yield
        logging.getLogger("bayeux_server").setLevel(level)

    def test_port_0_takes_a_free_port_and_tells_it(self, server):
        assert server.port != 0 and server.host == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.port}/cometd"
        with Peer(server) as peer:
            assert peer.id

    def test_the_url_has_the_path_of_the_options(self, serve):
        assert serve(path="/a/b").url.endswith("/a/b")

    def test_the_url_of_a_server_on_every_address_can_be_opened(self, serve):
        server = serve(host="0.0.0.0")
        assert server.url == f"http://127.0.0.1:{server.port}/cometd"
        assert http_get(server.url)[0] == 400

    def test_ipv6(self, serve):
        try:
            server = serve(host="::1")
        except OSError as error:
            if not os.environ.get("CI"):
                pytest.skip(f"no IPv6 here: {error}")
            raise
        assert server.url == f"http://[::1]:{server.port}/cometd"
        status, _, body = http_get(server.url)
        assert status == 400 and b"The parameter message is missing" in body

    def test_a_with_block_starts_and_stops_it(self):
        before = threads_of_servers()
        with BayeuxServer(port=0) as server:
            assert isinstance(server, BayeuxServer)
            with Peer(server) as peer:
                peer.subscribe("/a")
                peer.send_connect()
                server.publish("/a", "event")
                assert [message["channel"] for message in peer.read_answer().batch] == ["/meta/connect", "/a"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        wait_until(lambda: threads_of_servers() <= before, "the end of its threads")

    def test_a_with_block_stops_it_after_an_exception(self):
        with pytest.raises(KeyError), BayeuxServer(port=0) as server:
            raise KeyError
        with pytest.raises(RuntimeError):
            server.start()

    def test_starting_twice_is_starting_once(self, server):
        before = threads_of_servers()
        assert server.start() is server
        assert threads_of_servers() == before

    def test_stopping_twice_is_stopping_once(self, server):
        server.shutdown()
        server.shutdown()

    def test_a_server_that_was_stopped_does_not_start_again(self, server):
        server.shutdown()
        with pytest.raises(RuntimeError, match="shut down; make another"):
            server.start()

    def test_a_server_that_was_never_started_can_be_stopped(self):
        server = BayeuxServer(port=0)
        server.shutdown()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), PATIENCE)

    def test_serve_forever_is_ended_from_another_thread(self):
        server = BayeuxServer(port=0)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        with Peer(server):
            assert serving.is_alive()
        server.shutdown()
        serving.join(PATIENCE)
        assert not serving.is_alive()

    def test_a_port_in_use_is_an_os_error_and_leaves_nothing_behind(self, server, tmp_path):
        logger = logging.getLogger("bayeux_server")
        handlers, live = list(logger.handlers), set(bayeux_server.live_servers)
        with pytest.raises(OSError):
            BayeuxServer(port=server.port, log_file=str(tmp_path / "log"))
        assert logger.handlers == handlers and set(bayeux_server.live_servers) == live

    def test_two_servers_in_one_process_have_nothing_in_common(self, serve):
        heard = []
        first, second = serve(alias="first"), serve(alias="second", callback=lambda *event: heard.append(event))
        with Peer(first) as peer, Peer(second) as other:
            heard.clear()
            peer.subscribe("/a")
            other.subscribe("/a")
            other.send_connect()
            first.publish("/a", "of the first")
            second.publish("/a", "of the second")
            assert [message.get("data") for message in other.read_answer().batch] == [None, "of the second"]
            assert [message.get("data") for message in peer.connect()] == [None, "of the first"]
            stranger, = other.side.post({"channel": "/meta/connect", "clientId": peer.id,
                                         "connectionType": "long-polling"})
            assert stranger["error"].startswith("402:")
        first.shutdown()
        with Peer(second):
            pass

    def test_an_alias_finds_the_server(self, serve):
        """The original's Alias: in-process code names the server, or passes it."""
        server = serve(alias="chat")
        serve(alias="news")
        heard = threading.Event()
        LocalClient("chat", "listener").subscribe("/a", lambda message: heard.set())
        server.publish("/a", 1)
        assert heard.wait(PATIENCE)

    def test_an_alias_of_no_server_says_so(self, serve):
        serve(alias="chat").shutdown()
        with pytest.raises(ValueError, match="no server in this process has the alias 'chat'"):
            LocalClient("chat")

    def test_an_alias_of_two_servers_says_so(self, serve):
        first, second = serve(alias="twins"), serve(alias="twins")
        with pytest.raises(ValueError, match="more than one server .* has the alias 'twins'; pass the server itself"):
            LocalClient("twins")
        LocalClient(second, "bot").close()
        first.shutdown()
        LocalClient("twins", "bot").close()

    def test_an_alias_is_looked_up_while_no_server_comes_or_goes(self, server, monkeypatch):
        class Guarded(list):
            def __iter__(self):
                assert bayeux_server.live_servers_lock.locked(), "a race"
                return super().__iter__()

        monkeypatch.setattr(bayeux_server, "live_servers", Guarded([server]))
        assert bayeux_server.find_server("bayeux") is server
        monkeypatch.undo()

    def test_a_server_is_live_until_it_is_stopped(self):
        server = BayeuxServer(port=0)
        assert server in bayeux_server.live_servers
        server.shutdown()
        assert server not in bayeux_server.live_servers

    def test_a_stopped_server_takes_no_local_client(self, server):
        server.shutdown()
        with pytest.raises(ValueError, match="stopped"):
            LocalClient(server)

    def test_log_file(self, serve, tmp_path, errors):
        """The original's LogFile: refusals and failures, a line each."""
        log_file = tmp_path / "log"
        server = serve(log_file=str(log_file))
        with Peer(server) as peer:
            assert not peer.ask("/meta/subscribe", subscription="/*/demo")["successful"]
        server.shutdown()
        assert re.search(r"^\d{4}-\d\d-\d\d .* INFO refused '/meta/subscribe' from 127.0.0.1: 405:",
                         log_file.read_text("utf-8"), re.MULTILINE)
        size = log_file.stat().st_size
        server.logger.error("after the end")
        assert log_file.stat().st_size == size and errors.take() == ["after the end"]

    def test_debug_logs_more(self, serve, tmp_path):
        """The original's Debug."""
        sizes = {}
        for debug in (False, True):
            server = serve(debug=debug, log_file=str(tmp_path / f"log of {debug}"))
            with Peer(server) as peer:
                peer.publish("/a", "event")
            server.shutdown()
            sizes[debug] = (tmp_path / f"log of {debug}").stat().st_size
        assert sizes[True] > sizes[False]
        lines = (tmp_path / "log of True").read_text().splitlines()
        for way in "from", "to":
            assert any(f"{way} 127.0.0.1: " in line and "/meta/handshake" in line for line in lines)

    def test_two_servers_of_one_alias_have_a_log_each(self, serve, tmp_path):
        """And a level each; the application's handlers get the lines of both."""
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        servers = [serve(log_file=str(tmp_path / name), debug=name == "b") for name in "ab"]
        logging.getLogger("bayeux_server.bayeux").addHandler(handler)
        try:
            for number, server in enumerate(servers):
                server.logger.warning("of %d", number)
                server.logger.debug("debug of %d", number)
        finally:
            logging.getLogger("bayeux_server.bayeux").removeHandler(handler)
        for server in servers:
            server.shutdown()
        assert heard == ["of 0", "of 1", "debug of 1"]
        logs = [(tmp_path / name).read_text("utf-8") for name in "ab"]
        assert "of 0" in logs[0] and "of 1" not in logs[0] and "debug" not in logs[0]
        assert "WARNING of 1" in logs[1] and "DEBUG debug of 1" in logs[1] and "of 0" not in logs[1]

    @pytest.mark.skipif(os.name != "posix", reason="an open file cannot be renamed")
    def test_a_log_file_may_be_rotated(self, serve, tmp_path):
        log_file = tmp_path / "log"
        server = serve(log_file=str(log_file))
        server.logger.warning("before")
        wait_until(lambda: "before" in log_file.read_text("utf-8"))
        log_file.rename(tmp_path / "old")
        server.logger.warning("after")
        wait_until(lambda: log_file.exists() and "after" in log_file.read_text("utf-8"))
        assert "after" not in (tmp_path / "old").read_text("utf-8")

    CONTROLS = "\x85\x1b\x9b2J\u2028\u2029\x7f\r\n2026-01-01 00:00:00,000 INFO forged\ud800\u202e"

    def test_nothing_from_the_network_steers_or_forges_the_log(self, serve, tmp_path, errors):
        """NEL, the separators of Unicode, and what turns the direction of text; in tracebacks too."""
        def fail(message):
            raise RuntimeError(message["data"])

        log_file = tmp_path / "log"
        server = serve(log_file=str(log_file), debug=True, services={"fail": fail})
        with Peer(server) as peer:
            assert not peer.ask("/service/fail", data=self.CONTROLS.replace("\ud800", ""))["successful"]
            assert peer.side.request("POST", "/cometd", b"[]", Origin="http://\x85\x9b2J").status == 403
        server.logger.warning("%s of the application", self.CONTROLS)
        server.shutdown()
        log = log_file.read_bytes().decode("utf-8")
        for text in (log, *errors.take()):
            assert text.replace("\n", "").isprintable()
            assert not re.search("^.{19,23} INFO forged", text, re.MULTILINE)
        assert re.search(r"INFO refused POST .*Origin http://\\x85\\x9b2J is not", log)
        assert r"\x85\x1b\x9b2J\u2028\u2029\x7f\r\n2026-01-01 00:00:00,000 INFO forged\ud800\u202e of the app" in log
        assert "    RuntimeError: " in log
        assert all(re.match(r"\d{4}-\d\d-\d\d |    ", line) for line in log.splitlines()), "entries and tracebacks only"

    @for_each(("text", "arguments"), [("%d", ("no number",)), ("%", (1,)), ("%(a)s", ({},)), ("%s %s", (1,))])
    def test_a_wrong_call_of_the_logger_is_left_to_its_handlers(self, text, arguments):
        record = logging.LogRecord("name", logging.INFO, "", 1, text, arguments, None)
        assert bayeux_server.make_printable(record) is True and record.msg == text

    def test_the_service_decorator_returns_its_function(self, server):
        def add(message):
            return {"data": sum(message["data"])}

        assert server.service("add")(add) is add
        with Peer(server) as peer:
            assert peer.ask("/service/add", data=[1, 2, 39], id="7") == {
                "channel": "/service/add", "successful": True, "id": "7", "data": 42}

    def test_listeners_hear_of_all_six_events_in_order(self, serve):
        """The original's Callback, as an option and as a listener added later."""
        first, second = [], []
        server = serve(callback=lambda *event: first.append(event))
        server.add_listener(lambda *event: second.append(event))
        with Peer(server) as peer:
            peer.subscribe("/a")
            assert peer.ask("/a", data={"n": 1}, id="3", ext={"x": 1})["successful"]
            server.client_push(peer.id, "/private", {"for": "you"}, extra=1)
            assert peer.ask("/meta/unsubscribe", subscription="/a")["successful"]
            local = LocalClient(server, "local")
            local.close()
            assert peer.ask("/meta/disconnect")["successful"]
            wait_until(lambda: len(second) == 8, "the eighth event")
        assert first == second
        assert first == [
            ("client_connect", {"client_id": peer.id, "ip": "127.0.0.1"}),
            ("subscribe", {"client_id": peer.id, "channel": "/a"}),
            ("publish", {"channel": "/a", "data": {"n": 1}, "client_id": peer.id, "id": "3", "ext": {"x": 1}}),
            ("client_push", {"client_id": peer.id, "channel": "/private", "data": {"for": "you"}, "extra": 1}),
            ("unsubscribe", {"client_id": peer.id, "channel": "/a"}),
            ("client_connect", {"client_id": "local", "session": local}),
            ("client_disconnect", {"client_id": "local", "reason": "asked"}),
            ("client_disconnect", {"client_id": peer.id, "reason": "asked"}),
        ]

    def test_a_listener_that_fails_is_logged_and_harms_nobody(self, serve, errors):
        heard = []
        server = serve(callback=lambda *event: 1 / 0)
        server.add_listener(lambda *event: heard.append(event))
        with Peer(server) as peer:
            wait_until(lambda: heard, "the second listener's event")
            peer.publish("/a", 1)
            wait_until(lambda: len(heard) == 2, "its next event")
        server.shutdown()
        taken = errors.take()
        assert len(taken) >= 2 and all("a listener on" in record for record in taken)

    def test_calls_for_any_client(self, server):
        """The original's states: subscribe, unsubscribe, publish, client_push for a client that is named."""
        with Peer(server) as peer:
            server.subscribe("/a/*", peer.id)
            server.publish("/a/b", None, client_id="somebody", id="5", ext={"x": 1})
            server.client_push(peer.id, "/private", [1], more=True)
            assert peer.connect()[1:] == [{"channel": "/a/b", "data": None, "ext": {"x": 1}},
                                          {"channel": "/private", "data": [1], "more": True}]
            server.unsubscribe("/a/*", peer.id)
            server.publish("/a/b", "unheard")
            assert peer.poll()[1:] == []

    @for_each(("call", "code"), [
        (lambda server: server.subscribe("/a", "nobody"), 402),
        (lambda server: server.unsubscribe("/a", "nobody"), 402),
        (lambda server: server.client_push("nobody", "/a", 1), 402), (lambda server: server.publish("/a/*", 1), 405),
        (lambda server: server.publish("/meta/connect", 1), 403), (lambda server: server.publish("/service/a", 1), 403),
        (lambda server: server.client_push("nobody", "/meta/connect", 1), 405),
        (lambda server: server.subscribe("/*/a", "nobody"), 405)])
    def test_a_call_that_cannot_be_raises_with_a_code(self, server, call, code):
        with pytest.raises(bayeux_server.BayeuxError) as refusal:
            call(server)
        assert refusal.value.code == code

    def test_data_that_json_cannot_hold_is_the_publishers_fault(self, server):
        with pytest.raises(TypeError):
            server.publish("/a", object())
        with pytest.raises(ValueError):
            server.publish("/a", float("nan"))

    # -- Log ---------------------------------------------------------------------------------
    # §14: a log that is not read keeps nobody waiting.

    @pytest.fixture
    def stuck(self, monkeypatch):
        """A logger, its BackgroundLog with room for 3 lines, and the handler behind it, which is writing line 0."""
        monkeypatch.setattr(bayeux_server, "LINES_KEPT", 3)
        monkeypatch.setattr(bayeux_server, "LOG_PATIENCE", 0.05)
        handler, logger = StuckHandler(), logging.getLogger("stuck")
        log = bayeux_server.BackgroundLog(handler)
        logger.addHandler(log)
        logger.warning("0")
        assert handler.is_writing.wait(PATIENCE)
        yield logger, log, handler
        handler.may_write.set()
        log.close()
        logger.removeHandler(log)

    def test_lines_beyond_the_limit_are_dropped_and_counted(self, stuck):
        logger, _, handler = stuck
        for number in range(1, 9):
            logger.warning("%d", number)
        handler.may_write.set()
        wait_until(lambda: len(handler.lines) == 4)
        logger.warning("9")
        wait_until(lambda: len(handler.lines) == 6)
        assert handler.lines == ["0", "1", "2", "3", "5 lines of this log were dropped, as it was not read", "9"]

    def test_the_end_tells_of_dropped_lines_too(self, stuck):
        logger, log, handler = stuck
        for number in range(1, 5):
            logger.warning("%d", number)
        handler.may_write.set()
        wait_until(lambda: len(handler.lines) == 4)
        log.close()
        wait_until(lambda: len(handler.lines) == 5)
        assert handler.lines[-1] == "1 lines of this log were dropped, as it was not read"

    def test_the_end_waits_for_the_reader_a_moment_only(self, stuck):
        logger, log, handler = stuck
        for number in range(9):
            logger.warning("%d", number)
        log.close()
        log.close()
        assert handler.lines == []

    def test_logging_itself_can_end_while_it_is_stuck(self, stuck):
        """At exit it takes the lock of every handler."""
        _, _, handler = stuck
        assert handler.lock.acquire(timeout=PATIENCE)
        handler.lock.release()

    def test_a_file_that_cannot_be_opened_again_ends_nothing(self, serve, tmp_path, capsys):
        folder = tmp_path / "folder"
        folder.mkdir()
        server = serve(log_file=str(folder / "log"))
        shutil.rmtree(folder)
        server.logger.warning("lost")
        wait_until(lambda: "FileNotFoundError" in capsys.readouterr().err, "the complaint")
        folder.mkdir()
        server.logger.warning("kept")
        server.shutdown()
        assert "kept" in (folder / "log").read_text("utf-8")

    def test_what_a_stream_does_not_take_is_offered_again(self):
        class Raw:
            taken, answers = b"", [2, 3, None]

            def write(self, data):
                count = self.answers.pop(0) if self.answers else len(data)
                self.taken += bytes(data[:count or 0])
                return count

        stream = type("Stream", (), {"buffer": type("Buffer", (), {"raw": Raw()})()})()
        bayeux_server.Unbuffered(stream).write("12345lost")
        bayeux_server.Unbuffered(stream).write("\u00fc\ud800")
        assert stream.buffer.raw.taken == b"12345" + "\u00fc\\ud800".encode()

    # -- Survival ----------------------------------------------------------------------------
    # §3, §11: whatever fails, once, the loops that all depend on go on: even if it cannot be logged.

    @pytest.fixture(params=[ValueError, SystemExit])
    def failure(self, request):
        """Makes an exception; one that is kept would keep all that its traceback has seen."""
        return partial(request.param, "injected")

    @pytest.fixture(params=["logged", "not logged"])
    def hurt(self, request, server, errors, monkeypatch):
        """A server with two handler threads, and a function after which the named method fails once."""
        monkeypatch.setattr(bayeux_server, "FAILURE_PAUSE", 0.0)
        handler = FailingLog()
        if request.param == "not logged":
            server.logger.addHandler(handler)
        failed = threading.Event()

        def fail_once(owner, name, failure):
            whole, failures = getattr(owner, name), [failure]

            def fail(*arguments):
                if not failures:
                    return whole(*arguments)
                failed.set()
                raise failures.pop()()

            monkeypatch.setattr(owner, name, fail)

        yield server, fail_once
        server.logger.removeHandler(handler)
        assert failed.is_set(), "nothing has failed"
        server.shutdown()
        wait_until(lambda: request.param != "logged" or errors.records, "a line in the log")
        assert all("injected" in line for line in errors.take())

    def test_the_leader(self, hurt, failure):
        server, fail_once = hurt
        fail_once(server.watch._selector, "select", failure)
        with bystander(server), Peer(server) as peer:
            peer.subscribe("/a")
            peer.publish("/a", 1)
            assert peer.connect().data == [1]

    def test_the_leader_while_it_delivers(self, hurt, failure):
        server, fail_once = hurt
        with bystander(server), Peer(server) as peer:
            fail_once(server.core, "take_answers", failure)
            peer.subscribe("/a")
            peer.hold()
            peer.side.send_post({"channel": "/a", "clientId": peer.id, "data": 1})
            peer.side.read_answer()                     # its reply may be lost, and the connection
            server.publish("/a", 2)
            assert events_of(peer.read_answer().batch)

    def test_the_wait(self, hurt, failure):
        server, fail_once = hurt
        with bystander(server):
            fail_once(server.core, "has_work", failure)
            server.publish("/other", 1)

    def test_a_connection_that_fails_is_the_only_one(self, hurt, failure):
        server, fail_once = hurt
        with bystander(server):
            with Wire(server) as wire:
                wire.post(PING)
                fail_once(server.http, "consume", failure)
                wire.send(whole_post())
                assert wire.is_closed_by_server()
            with Wire(server) as wire:
                assert wire.post(PING)[0]["successful"]

    def test_a_handler_thread(self, hurt, failure):
        server, fail_once = hurt
        server.service("echo")(lambda message: {"data": "echo"})
        with Peer(server) as peer:
            for _ in range(server.options.max_threads):
                job = SlowExchange(None)
                fail_once(job, "give_up", failure)
                server._handler_threads.run(job.give_up)
            wait_until(lambda: not server._handler_threads._running, "the end of the jobs")
            assert peer.ask("/service/echo", data="")["data"] == "echo"

    def test_a_mailbox(self, hurt, failure):
        server, fail_once = hurt
        heard = []
        client = LocalClient(server, "bot")
        client.subscribe("/a", lambda message: heard.append(message["data"]))
        fail_once(client.mailbox.handle.__self__._core.application, "run", failure)
        server.publish("/a", 1)
        wait_until(lambda: not server.core.scheduled_mailboxes, "the end of the first")
        server.publish("/a", 2)
        wait_until(lambda: heard == [2], "the second event")

    def test_a_service_and_what_is_behind_it(self, hurt, failure):
        server, fail_once = hurt
        server.service("fails")(lambda message: server.fails(message))
        server.fails = lambda message: {"data": "goes on"}
        with Peer(server) as peer:
            fail_once(server, "fails", failure)
            first, second = peer.side.post(*[{"channel": "/service/fails", "clientId": peer.id}] * 2)
            assert first["error"].startswith("500:") and second["data"] == "goes on"

    def test_a_postponed_reply(self, hurt, failure):
        """It may be lost, but does not stand in front of all others."""
        server, fail_once = hurt
        with bystander(server), Wire(server) as lost, Peer(server) as peer:
            client_id = lost.post(HANDSHAKE)[0]["clientId"]
            fail_once(server.core, "send", failure)
            lost.send_post({"channel": "/a", "clientId": client_id, "data": 1})
            wait_until(lambda: "send" in vars(server.core) and not server.core._postponed, "the first reply")
            peer.publish("/a", 2)

    # -- Stopping ----------------------------------------------------------------------------
    # §14: no new requests, every held connect answered, local clients told, the port free, within `grace`.

    def test_every_held_connect_is_told_to_come_back_each_at_its_own_time(self, server):
        peers = [Peer(server) for _ in range(20)]
        for peer in peers:
            peer.send_connect(id="held")
        until_held(server, *server.core.sessions)
        server.shutdown()
        intervals = set()
        for peer in peers:
            answer = peer.read_answer()
            reply, = answer.batch
            assert answer.status == 200 and answer.headers["connection"] == "close"
            assert reply["channel"] == "/meta/connect" and reply["successful"] and reply["id"] == "held"
            assert reply["advice"]["reconnect"] in ("retry", "handshake")
            intervals.add(reply["advice"]["interval"])
            assert peer.is_closed_by_server()
            peer.close()
        assert all(isinstance(interval, int) and interval >= 0 for interval in intervals) and len(intervals) > 1

    @staticmethod
    def has_stopped(server):
        wait_until(server._has_stopped.is_set, "the end of the stop")
        assert server.watch.has_ended.is_set() and not server._wait.is_alive()
        return True

    @for_each("place", ["callback", "on_end", "listener", "service", "message_acl", "extension",
                        "content_handler", "post_handle"])
    @for_each("kind", [Peer, SocketPeer])
    def test_the_applications_code_may_stop_the_server_and_its_client_is_answered(self, serve, place, kind):
        """The stop would wait for the code, and the code for the stop, until `grace` is over."""
        called = []

        def stop(*arguments):
            if any("stop" in str(getattr(each, "path", each)) for each in arguments):
                server.shutdown()
                server.shutdown()
                called.append(place)
            return b"stopped" if place == "content_handler" else None

        class Extension:
            def incoming(self, session, message):
                stop(message)
                return message

        options = {"service": {"services": {"stop": stop}}, "message_acl": {"message_acl": stop},
                   "extension": {"extensions": [Extension()]}, "listener": {"callback": stop},
                   "content_handler": {"content_handlers": {"/stop": stop}},
                   "post_handle": {"post_handle": stop, "content_handlers": {"/stop": lambda request: "text"}}}
        server = serve(grace=1000, **options.get(place, {}))
        with LocalClient(server, "local", on_end=lambda reason: server.shutdown()) as client:
            client.subscribe("/end", stop if place == "callback" else None)
            with kind(server) as peer:
                if place in ("content_handler", "post_handle"):
                    with Wire(server) as wire:
                        assert wire.request("GET", "/stop").status == 200
                elif place == "on_end":
                    server.end_session(client.id, "asked")
                else:
                    channel = "/service/stop" if place == "service" else "/end"
                    assert peer.ask(channel, data="stop")["successful"]
                assert self.has_stopped(server)
        assert called == [place] or place == "on_end"

    def test_a_second_call_returns_when_the_first_does(self, serve):
        with self.stopping_server(serve) as (server, _, _, may_return):
            seen = []
            second = threading.Thread(target=lambda: (server.shutdown(), seen.append(server.watch.has_ended.is_set())))
            second.start()
            may_return.set()
            second.join(PATIENCE)
            assert seen == [True]
        server.shutdown()

    @for_each("failing", ["core.stop", "_wait.stop", "http.close_streams", "watch.stop_accepting"])
    def test_a_step_of_stopping_that_fails_leaves_none_of_the_others_out(self, serve, errors, monkeypatch, failing):
        def fail(*arguments):
            raise SystemExit(failing)

        server = serve(grace=0.2)
        with Peer(server) as peer:
            owner, _, name = failing.rpartition(".")
            with monkeypatch.context() as patch:
                patch.setattr(getattr(server, owner), name, fail)
                server.shutdown()
            assert server.watch.has_ended.is_set()
            assert peer.is_closed_by_server()
        server._wait.stop()
        assert failing in errors.take()[0]

    def test_clients_that_send_without_end_do_not_hold_up_the_stop(self, serve):
        """Every held connect gets its last reply, and `grace` is not used up."""
        server = serve(grace=1000, anon_publish=True)
        with ExitStack() as stack:
            peers = [stack.enter_context(Peer(server)) for _ in range(20)]
            for peer in peers:
                peer.hold()
            flood = json.dumps([{"channel": "/none", "data": "x"}] * 10).encode()
            for kind, data in [(Wire, whole_post(*json.loads(flood)) * 20), (SocketWire, masked(TEXT_FRAME, flood) * 20)]:
                for _ in range(3):
                    wire = stack.enter_context(kind(server))
                    for job in (partial(self.send_for_ever, wire, data), partial(self.read_for_ever, wire)):
                        threading.Thread(target=job, daemon=True).start()
            server.shutdown()
            for peer in peers:
                reply, = peer.read_answer().batch
                assert reply["successful"] and reply["advice"]["interval"] > 0

    @staticmethod
    def send_for_ever(wire, data):
        with suppress(OSError):
            while True:
                wire.send(data)

    @staticmethod
    def read_for_ever(wire):
        with suppress(OSError):
            while wire.socket.recv(65536):
                pass

    def test_a_batch_that_comes_over_a_socket_meanwhile_is_not_handled(self, serve):
        server = serve(anon_publish=True, grace=1000)
        heard, is_called, may_return = [], threading.Event(), threading.Event()
        server.add_listener(lambda *event: heard.append(event), ["publish"])
        server.service("wait")(lambda message: is_called.set() or may_return.wait(PATIENCE) and None)
        with SocketWire(server) as wire, Peer(server) as peer:
            peer.side.send_post({"channel": "/service/wait", "clientId": peer.id})
            assert is_called.wait(PATIENCE)
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            wait_until(lambda: server.core.stopping, "the beginning of the stop")
            wire.send_batch({"channel": "/a", "data": "late"})
            may_return.set()
            assert wire.read_close()[0] == 1001
            stopping.join(PATIENCE)
        assert heard == []

    def test_an_event_that_is_about_to_leave_is_not_cut_off(self, serve, monkeypatch):
        """The wait has taken it, and no output waits yet: that is not the end of the work."""
        server = serve(grace=PATIENCE)
        with SocketPeer(server) as peer:
            make_buffers_small(server, peer)
            peer.subscribe("/a")
            send, is_called = server.core.send, threading.Event()

            def send_late(answers):
                if any(answer.events for answer in answers):
                    is_called.set()
                    wait_until(lambda: server._wait._is_over, "the stop of the wait")
                return send(answers)

            monkeypatch.setattr(server.core, "send", send_late)
            server.publish("/a", "x" * 5_000_000)
            assert is_called.wait(PATIENCE)
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            assert [len(data) for data in peer.receive(1)] == [5_000_000]
            assert peer.read_close()[0] == 1001
            stopping.join(PATIENCE)

    def test_what_waits_behind_an_event_on_its_way_leaves_too(self, serve):
        """Over a socket, which keeps the order."""
        server = serve(grace=PATIENCE)
        with SocketPeer(server) as peer:
            make_buffers_small(server, peer)
            peer.subscribe("/a")
            server.publish("/a", "x" * 5_000_000)
            wait_until(lambda: has_unsent_output(server), "output that waits")
            server.publish("/a", "last")
            assert session_of(server, peer.id).in_flight
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            assert [data[-4:] for data in peer.receive(2)] == ["xxxx", "last"]
            stopping.join(PATIENCE)

    def test_events_published_before_the_end_leave_with_the_last_reply(self, core):
        client_id = core.handshake()
        core.subscribe(client_id, "/a")
        held = core.hold(client_id)
        core.core.publish("/a", "The server goes down")
        core.core.stop()
        core.work()
        connect, *events = held.answer
        assert connect["successful"] and connect["advice"]["reconnect"] in ("retry", "handshake")
        assert events == [{"channel": "/a", "data": "The server goes down"}]

    def test_local_clients_are_told(self, server):
        told = []
        for name in ("one", "two"):
            LocalClient(server, name, on_end=lambda reason, name=name: told.append((name, reason)))
        server.shutdown()
        assert sorted(told) == [("one", "server shutdown"), ("two", "server shutdown")]

    def test_local_clients_get_what_was_published_before_the_end(self, server):
        heard = []
        client = LocalClient(server, "last", on_end=heard.append)
        client.subscribe("/a", lambda message: heard.append(message["data"]))
        for number in range(100):
            server.publish("/a", number)
        server.shutdown()
        assert heard == [*range(100), "server shutdown"]

    def test_listeners_are_told(self, serve):
        heard = []
        server = serve(callback=lambda *event: heard.append(event))
        with Peer(server) as peer:
            server.shutdown()
        assert heard[-1] == ("client_disconnect", {"client_id": peer.id, "reason": "server shutdown"})

    def test_the_port_is_free_at_once_and_clients_carry_on_there(self, server, serve):
        """A client that comes back to another server on the same port is told to handshake again."""
        peer = Peer(server)
        peer.send_connect()
        until_held(server, peer.id)
        server.shutdown()
        successor = serve(port=server.port)
        assert successor.port == server.port
        assert peer.read_answer().batch[0]["successful"]
        with Wire(successor) as wire:
            reply, = wire.post(CorePeer.connect_message(peer.id))
            assert reply["error"].startswith("402:") and reply["advice"] == {"reconnect": "handshake", "interval": 0}
        peer.close()

    @contextmanager
    def stopping_server(self, serve, **options):
        """A server whose stopping waits for a service; yields it with a connection from before and an Event."""
        is_called, may_return = threading.Event(), threading.Event()

        def wait(message):
            is_called.set()
            assert may_return.wait(PATIENCE)

        server = serve(services={"wait": wait}, grace=PATIENCE, **options)
        with Peer(server) as peer, Wire(server) as idle:
            idle.post({"channel": "/meta/ping"})
            peer.side.send_post({"channel": "/service/wait", "clientId": peer.id, "id": "slow"})
            assert is_called.wait(PATIENCE)
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            try:
                wait_until(lambda: server.core.stopping, "the beginning of the stop")
                yield server, peer, idle, may_return
            finally:
                may_return.set()
                stopping.join(PATIENCE)
                assert not stopping.is_alive()

    def test_new_requests_are_refused_with_503(self, serve):
        with self.stopping_server(serve) as (server, _, idle, _):
            idle.send_post({"channel": "/meta/handshake", "version": "1.0"})
            answer = idle.read_answer()
            assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.headers["connection"] == "close"
            assert answer.batch[0]["successful"] is False and answer.batch[0]["error"].startswith("503:")
            wait_until(lambda: not self.can_connect(server), "the end of listening")

    @staticmethod
    def can_connect(server):
        try:
            socket.create_connection(("127.0.0.1", server.port), PATIENCE).close()
        except ConnectionError:         # refused; or reset, by a listener that is just closing
            return False
        return True

    def test_a_request_in_hand_is_finished(self, serve):
        with self.stopping_server(serve) as (_, peer, _, may_return):
            may_return.set()
            reply, = peer.side.read_answer().batch
            assert reply["successful"] and reply["id"] == "slow"

    def test_a_request_in_hand_over_a_socket_is_finished(self, serve):
        """It is no exchange of HTTP, and has sent nothing so far; the stop waits for it all the same."""
        is_called, may_return = threading.Event(), threading.Event()
        server = serve(services={"wait": lambda message: is_called.set() or may_return.wait(PATIENCE) and None},
                       grace=1000)
        with SocketPeer(server) as peer:
            number = peer.send_message("/service/wait")
            assert is_called.wait(PATIENCE)
            assert server.watch.is_busy()
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            may_return.set()
            assert peer.reply(number)["successful"]
            stopping.join(PATIENCE)

    def test_a_stuck_service_does_not_hold_up_the_end(self, serve, errors):
        """Within `grace`; only the thread that is stuck outlives the server."""
        before = threads_of_servers()
        is_called, may_return = threading.Event(), threading.Event()

        def stick(message):
            is_called.set()
            may_return.wait(PATIENCE)

        server = serve(services={"stick": stick}, grace=0.2)
        with Peer(server) as peer:
            peer.send_connect()
            until_held(server, peer.id)
            peer.side.send_post({"channel": "/service/stick", "clientId": peer.id})
            assert is_called.wait(PATIENCE)
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            stopping.join(PATIENCE / 2)
            assert not stopping.is_alive() and not may_return.is_set()
            assert peer.read_answer().batch[0]["successful"]
            wait_until(lambda: len(threads_of_servers() - before) <= 1, "the end of all threads but the stuck one")
            may_return.set()
            wait_until(lambda: threads_of_servers() <= before, "the end of the stuck one")

    def test_a_callback_in_hand_is_waited_for(self, server, monkeypatch):
        is_called, may_return, heard = threading.Event(), threading.Event(), []

        def callback(message):
            is_called.set()
            assert may_return.wait(PATIENCE)
            heard.append(message["data"])

        LocalClient(server, "slow").subscribe("/a", callback)
        server.publish("/a", 1)
        assert is_called.wait(PATIENCE)
        stopping = threading.Thread(target=server.shutdown)
        is_quiet, looks = server.core.is_quiet, []
        monkeypatch.setattr(server.core, "is_quiet", lambda: (looks.append(1), is_quiet())[1])
        stopping.start()
        wait_until(lambda: len(looks) > 2, "the waiting for the callback")
        may_return.set()
        stopping.join(PATIENCE)
        assert not stopping.is_alive() and heard == [1]

    def test_a_stuck_callback_does_not_hold_up_the_end(self, serve):
        may_return, is_called = threading.Event(), threading.Event()
        server = serve(grace=0.2)
        client = LocalClient(server, "stuck")
        client.subscribe("/a", lambda message: (is_called.set(), may_return.wait(PATIENCE)))
        server.publish("/a", 1)
        assert is_called.wait(PATIENCE)
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        stopping.join(PATIENCE / 2)
        assert not stopping.is_alive()
        may_return.set()

    def test_nothing_is_left(self, serve):
        """No thread, no socket, no selector."""
        before, files = threads_of_servers(), self.open_files()
        server = serve()
        LocalClient(server, "local").subscribe("/a", lambda message: None)
        with Peer(server) as peer, Wire(server) as half:
            peer.subscribe("/a")
            peer.send_connect()
            half.send("POST /cometd HTTP/1.1\r\nHost:")
            server.publish("/a", 1)
            assert len(peer.read_answer().batch) == 2
            server.shutdown()
            assert half.is_closed_by_server()
        wait_until(lambda: threads_of_servers() <= before, "the end of its threads")
        assert self.open_files() <= files

    def test_nothing_is_left_of_a_server_that_never_started(self):
        files = self.open_files()
        BayeuxServer(port=0).shutdown()
        assert self.open_files() <= files

    @staticmethod
    def open_files():
        return len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0


# ======================================================================================
# §15  Command line
# ======================================================================================

def run_program(*arguments):
    """Run the program to its end."""
    return subprocess.run([sys.executable, str(HERE / "bayeux_server.py"), *arguments], cwd=HERE, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)


@pytest.fixture
def exit_of_main(capsys, monkeypatch):
    """Calls main() where it must end before it serves: exit status and stderr of exit_of_main('--flag', ...)."""
    def start(server):
        server.shutdown()
        raise AssertionError("the server started")

    def call(*arguments):
        with pytest.raises(SystemExit) as ending:
            bayeux_server.main(list(arguments))
        return ending.value.code, capsys.readouterr().err

    monkeypatch.setattr(BayeuxServer, "start", start)
    return call


class TestCommandLine:
    """§15: what a user types, and reads."""

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as ending:
            bayeux_server.main(["--version"])
        assert ending.value.code == 0
        assert capsys.readouterr().out == f"bayeux_server {bayeux_server.__version__} (Bayeux 1.0)\n"

    def test_help_mentions_every_flag(self):
        run = run_program("--help")
        assert run.returncode == 0 and run.stderr == ""
        flags = {flag for action in bayeux_server.make_parser()._actions for flag in action.option_strings}
        assert len(flags) > 30 and all(re.search(f"^  .*{flag}\\b", run.stdout, re.MULTILINE) for flag in flags)
        assert "python bayeux_server.py --port 8080 --docroot ." in run.stdout

    def test_every_option_that_can_be_typed_is_a_flag(self):
        typed = {action.dest for action in bayeux_server.make_parser()._actions}
        assert set(option_fields()) - typed == {"tls_context", "extensions", "services", "message_acl", "callback",
                                         "content_handlers", "post_handle"}

    @for_each(("flag", "value", "allowed"), [
        ("--port", "70000", "0 to 65535"), ("--port", "http", "0 to 65535"), ("--path", "cometd", "absolute path"),
        ("--docroot", "/no such folder", "folder that exists"), ("--type-expires", "image/png", "image/png=3600"),
        ("--type-expires", "png=1", "image/png=3600"), ("--timeout", "-1", "seconds, 0 or more"),
        ("--timeout", "soon", "seconds, 0 or more"), ("--timeout", "nan", "seconds, 0 or more"),
        ("--max-queue", "0", "whole number, 1 or more"), ("--max-queue", "1.5", "whole number, 1 or more"),
        ("--allowed-origin", "example.org", "origins such as"),
        ("--allowed-host", "https://example.org", "host names such as"), ("--trusted-proxy", "proxy", "IP addresses"),
        ("--tls-cert", "x.pem", "give both"), ("--host", "", "a text")])
    def test_a_wrong_value_is_named_with_what_is_allowed(self, exit_of_main, flag, value, allowed):
        status, text = exit_of_main(f"{flag}={value}")
        last = text.splitlines()[-1]
        assert status == 2 and allowed in last and (value.partition("=")[0] or "''") in last
        assert flag[2:].partition("-")[0] in last

    def test_a_wrong_value_ends_the_program_with_status_2(self):
        run = run_program("--port", "70000")
        assert run.returncode == 2 and run.stdout == ""
        assert "port" in run.stderr and "70000" in run.stderr and "Traceback" not in run.stderr

    @for_each("flag", ["--unknown", "--services=x", "word"])
    def test_an_unknown_flag_is_refused(self, exit_of_main, flag):
        status, text = exit_of_main(flag)
        assert status == 2 and flag in text

    def test_a_port_in_use_is_one_line(self, server):
        run = run_program("--port", str(server.port))
        assert run.returncode == 1 and run.stdout == ""
        assert len(run.stderr.splitlines()) == 1 and f"127.0.0.1:{server.port}" in run.stderr

    def test_a_host_that_is_not_ours_is_one_line(self):
        run = run_program("--port", "0", "--host", "192.0.2.1")
        assert run.returncode == 1 and run.stdout == "" and len(run.stderr.splitlines()) == 1

    def test_the_start_says_what_a_newcomer_wants_to_know(self, program):
        for fact in (f"open {program.root}/", f"{program.root}/cometd", "long-polling, callback-polling", str(HERE),
                     "clients after their handshake", "own pages", "hosts      addresses, localhost",
                     "10 connections kept open by one address", "20000 sessions",
                     "10000 waiting events", "65536 bytes a message", "/service/echo, /service/members, /service/magnets",
                     "/chat/demo", "Ctrl-C"):
            assert fact in program.text

    def test_the_start_says_what_was_changed(self, tmp_path):
        with Program("--docroot", str(tmp_path), "--anon-publish", "--allowed-origin", "https://example.org",
                     "--allowed-origin", "https://example.net", "--client-max-connections", "0", "--max-sessions", "77",
                     "--path", "/live", "--bare", "--allowed-host", "example.org") as program:
            for fact in (str(tmp_path), "hosts      addresses, localhost, example.org", "anybody",
                         "own pages, https://example.org, https://example.net",
                         "any number of connections kept open", "77 sessions", "/live  ("):
                assert fact in program.text
            assert "/service/echo" not in program.text and "credentials" not in program.text
            assert program.stop() == 0

    def test_the_start_says_whom_any_origin_excludes(self):
        with Program("--allowed-origin", "*") as program:
            assert re.search(r"origins    own pages, \*\n +\(with \* browsers refuse clients that send credentials",
                             program.text)
            assert program.stop() == 0

    @for_each("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_it_cleanly(self, number):
        with Program() as program, Peer(program) as peer, Peer(program) as held:
            # Once the older of two connects on one connection is answered and another request after that,
            # the newer is held: this is how it is known from outside.
            held.send_connect(id="first")
            held.send_connect(id="last")
            assert held.read_answer().batch[0]["id"] == "first"
            assert peer.ask("/service/echo", data=1)["successful"]
            assert program.stop(number) == 0
            reply, = held.read_answer().batch
            assert reply["successful"] and reply["id"] == "last"
            assert reply["advice"]["reconnect"] in ("retry", "handshake")
            with socket.socket() as another:
                another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                another.bind(("127.0.0.1", program.port))

    def test_many_signals_are_one(self, capsys):
        """main() in this process, and more signals than it needs while it stops."""
        def send_signals():
            wait_until(lambda: any(server.options.alias == "main" and server._has_started
                                   for server in list(bayeux_server.live_servers)), "the start")
            for _ in range(20):
                os.kill(os.getpid(), signal.SIGTERM)

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        sending = threading.Thread(target=send_signals)
        sending.start()
        try:
            assert bayeux_server.main(["--port", "0", "--alias", "main"]) == 0
            sending.join(PATIENCE)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert "Ctrl-C stops it." in capsys.readouterr().out

    def test_the_demo_has_an_echo_and_a_bot(self, program):
        """The original's echo service, and its Autobot."""
        with Peer(program) as peer:
            assert peer.ask("/service/echo", data={"a": [1]}, id="1")["data"] == {"a": [1]}
            peer.subscribe("/chat/demo")
            peer.publish("/chat/demo", {"user": "anna", "join": True, "chat": "anna has joined"})
            peer.publish("/chat/demo", {"user": "anna", "chat": "Hello"})
            events = []
            while len(events) < 3:
                events += peer.connect()[1:]
            assert [event["data"]["user"] for event in events] == ["anna", "anna", "autobot"]
            assert events[2]["data"]["chat"] == "I heard anna say: Hello"

    @for_each("data", [None, 1, "text", [], {}, {"chat": 1}, {"chat": {}}, {"user": [], "chat": "a"}])
    def test_the_bot_bears_every_kind_of_data(self, program, data):
        with Peer(program) as peer:
            peer.publish("/chat/demo", data)
            peer.subscribe("/chat/demo")
            peer.publish("/chat/demo", {"user": "anna", "chat": "still there?"})
            texts = []
            while "I heard anna say: still there?" not in texts:
                texts += [event["data"].get("chat") for event in peer.connect()[1:]]

    @for_each(("user", "name"), [("x" * 60_000, "x" * 40), (["anna"] * 1000, "somebody")])
    def test_the_bot_says_no_more_of_a_name_than_fits(self, program, user, name):
        with Peer(program) as peer:
            peer.subscribe("/chat/demo")
            peer.publish("/chat/demo", {"user": user, "chat": "Hello"})
            texts = []
            while f"I heard {name} say: Hello" not in texts:
                texts += [event["data"].get("chat") for event in peer.connect()[1:]]

    def test_members_come_and_go(self):
        with Program() as program, Peer(program) as anna, Peer(program) as bob:
            anna.subscribe("/chat/*")
            assert bob.ask("/service/members", data={"user": " bob "})["data"] == {
                "members": ["autobot", "bob"], "count": 2}
            assert anna.ask("/service/members", data={"user": "anna"})["data"]["members"] == ["autobot", "bob", "anna"]
            assert bob.ask("/service/members", data={"user": "bob"})["data"]["count"] == 3
            assert bob.ask("/service/members", data={})["data"] == {"members": ["autobot", "anna"], "count": 2}
            events = []
            while len(events) < 6:
                events += anna.connect()[1:]
            assert [(event["channel"], event["data"]) for event in events] == [
                ("/chat/demo", {"user": "bob", "join": True, "chat": "bob has joined"}),
                ("/chat/members", {"members": ["autobot", "bob"], "count": 2}),
                ("/chat/demo", {"user": "anna", "join": True, "chat": "anna has joined"}),
                ("/chat/members", {"members": ["autobot", "bob", "anna"], "count": 3}),
                ("/chat/demo", {"user": "bob", "leave": True, "chat": "bob has left"}),
                ("/chat/members", {"members": ["autobot", "anna"], "count": 2})]

    def test_a_member_whose_session_ends_has_left(self):
        with Program() as program, Peer(program) as anna:
            anna.subscribe("/chat/members")
            with Peer(program) as bob:
                bob.ask("/service/members", data={"user": "bob"})
                bob.ask("/meta/disconnect")
            lists = []
            while len(lists) < 2:
                lists += [event["data"]["members"] for event in anna.connect()[1:]]
            assert lists == [["autobot", "bob"], ["autobot"]]

    @for_each("user", ["", "  ", "x" * 41, 1, True, [], {}])
    def test_a_member_needs_a_name(self, program, user):
        with Peer(program) as peer:
            assert peer.ask("/service/members", data={"user": user})["error"].startswith("400:/service/members:")
            assert "autobot" in peer.ask("/service/members", data=None)["data"]["members"]

    def test_the_list_of_members_is_no_longer_than_it_says(self):
        demo = bayeux_server.Demo(BayeuxServer(port=0))
        try:
            demo.members = {str(number): f"member {number}" for number in range(1000)}
            listed = demo.member_list()
            assert listed["count"] == 1001 and len(listed["members"]) == 100 and listed["members"][0] == "autobot"
        finally:
            demo.server.shutdown()

    def test_the_board_shows_newcomers_where_the_magnets_are(self, program):
        def at(magnet, x, y):
            return {"magnet": magnet, "x": x, "y": y}

        with Peer(program) as peer:
            for data in (at(3, 0.5, 0), at(4, 0.25, 1), {**at(3, 0.75, 0.5), "by": "anna"}, at(200, 0, 0), at(-1, 0, 0),
                         at(True, 0, 0), at("3", 0, 0), at(5, 1.5, 0), at(5, 0, None), at(5, "0", 0), [], None, "text"):
                peer.publish("/magnets/demo", data)
            wait_until(lambda: len(peer.ask("/service/magnets")["data"]["magnets"]) == 2
                       and peer.ask("/service/magnets")["data"]["magnets"][-1]["magnet"] == 3, "the board")
            assert peer.ask("/service/magnets")["data"] == {"magnets": [at(4, 0.25, 1), at(3, 0.75, 0.5)]}

    def test_as_many_clients_may_connect_as_the_system_lets_it_have(self):
        resource = pytest.importorskip("resource")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 300
        command = ["sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh", sys.executable, str(HERE / "bayeux_server.py"),
                   "--port", "0", "--client-max-connections", "0"]
        with Program(command=command) as program:
            peers = [Peer(program) for _ in range(100)]
            assert len({peer.id for peer in peers}) == 100
            for peer in peers:
                peer.close()

    def test_an_unread_stderr_stops_nothing(self):
        """A pipe holds 64 KiB; the log is more."""
        with Program() as program:
            with Wire(program) as wire:
                for _ in range(500):
                    assert not wire.post({"channel": "/meta/unknown/" + "x" * 200})[0]["successful"]
            program.process.send_signal(signal.SIGTERM)
            with program.process as process:
                assert process.wait(PATIENCE) == 0
                assert len(process.stderr.read()) > 50_000

    def test_bare_has_no_demo(self):
        with Program("--bare") as program, Peer(program) as peer:
            assert peer.ask("/service/echo", data=1)["error"].startswith("404:")
            peer.subscribe("/chat/demo")
            peer.publish("/chat/demo", {"user": "anna", "chat": "Hello"})
            assert len(peer.connect()) == 2
            assert len(peer.poll()) == 1

    def test_flags_reach_the_server(self, tmp_path):
        """--docroot, --directory-index, --type-expires, --no-timesync, --log-file, --timeout"""
        (tmp_path / "start.html").write_text("<p>start</p>", "utf-8")
        (tmp_path / "dot.png").write_bytes(b"png")
        log_file = tmp_path / "server.log"
        with Program("--docroot", str(tmp_path), "--directory-index", "none.html", "--directory-index", "start.html",
                     "--type-expires", "image/png=3600", "--type-expires", "text/css=60", "--no-timesync",
                     "--log-file", str(log_file), "--timeout", "12.5") as program:
            assert http_get(program.root + "/")[2] == b"<p>start</p>"
            status, headers, body = http_get(program.root + "/dot.png")
            assert (status, body) == (200, b"png")
            assert headers["Cache-Control"] == "max-age=3600" and headers["Expires"]
            with Wire(program) as wire:
                reply, = wire.post({"channel": "/meta/handshake", "version": "1.0",
                                    "ext": {"timesync": {"tc": 1, "l": 0, "o": 0}}})
                assert "ext" not in reply and reply["advice"]["timeout"] == 12500
                wire.post({"channel": "/meta/unknown"})
            assert program.stop() == 0
        assert "/meta/unknown" in log_file.read_text("utf-8")

    def test_timesync_is_on_by_default(self, program):
        with Wire(program) as wire:
            reply, = wire.post({"channel": "/meta/handshake", "version": "1.0",
                                "ext": {"timesync": {"tc": 1, "l": 0, "o": 0}}})
            assert set(reply["ext"]["timesync"]) == {"tc", "ts", "p", "a"}

    def test_tls(self, certificate):
        """--tls-cert and --tls-key; held connects too, and their answer when it stops."""
        cert, key = certificate
        tls = ssl.create_default_context(cafile=cert)
        with Program("--tls-cert", cert, "--tls-key", key) as program, Peer(program, tls) as peer:
            assert program.root.startswith("https://")
            assert http_get(program.root + "/LICENSE", tls)[2] == (HERE / "LICENSE").read_bytes()
            peer.subscribe("/a")
            peer.send_connect()
            peer.publish("/a", "event")
            assert peer.read_answer().batch[1]["data"] == "event"
            assert program.stop() == 0

    def test_a_certificate_that_is_none_is_refused(self, exit_of_main, tmp_path):
        path = tmp_path / "cert.pem"
        path.write_text("no certificate", "utf-8")
        status, text = exit_of_main("--port=0", f"--tls-cert={path}", f"--tls-key={path}")
        assert status == 2 and "PEM files" in text and str(path) in text


# ======================================================================================
# The page
# ======================================================================================

class TestPage:
    """index.html, as far as it can be judged without a browser; .ci/page uses it in one."""

    @for_each("tag", ["script", "style"])
    def test_its_policy_names_its_own_scripts_and_style_and_no_others(self, tag):
        """After an edit of one, this says the hash that belongs into the policy."""
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', PAGE)[1]
        directive, = [each.split() for each in policy.split(";") if each.strip().startswith(f"{tag}-src")]
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in parts_of_page(tag)]
        assert [source for source in directive[1:] if source != "'self'"] == [f"'sha256-{each}'" for each in hashes]
        assert "default-src 'none'" in policy and "unsafe" not in policy

    def test_its_client_can_be_copied_by_itself(self):
        client, = re.findall(r'<script id="client">\n(.*?)</script>', PAGE, re.DOTALL)
        assert client.count("\n") <= 250
        assert not re.search(r"querySelector|getElementById|\bpage\.", client)

    def test_what_others_wrote_is_only_ever_text(self):
        scripts = "".join(parts_of_page("script"))
        assert not re.search(r"(inner|outer)HTML|AdjacentHTML|document\.write|\beval\(|new Function|srcdoc", scripts)
        markup = re.sub(r"<(script|style)\b.*?</\1>", "", PAGE, flags=re.DOTALL)
        assert not re.search(r"<[^>]*\s(on[a-z]+|style)\s*=", markup)

    def test_it_asks_no_other_host(self):
        """The one address in it is a link to the specification."""
        markup = re.sub(r"<script\b.*?</script>", "", PAGE, flags=re.DOTALL)
        assert not re.search(r"\b(src|href|action)=[\"']?(?!data:|#)[a-z/]", markup)
        addresses = set(re.findall(r"https?://[^/\s`'\"]+", PAGE))
        assert addresses <= {"https://docs.cometd.org", "http://www.w3.org"}


# ======================================================================================
# README
# ======================================================================================

README = (HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else ""


def readme_blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def readme_section(title):
    """The text between a heading and the next."""
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


class Shell:
    """A bash into which a reader pastes commands."""

    def __init__(self, server):
        self.address = f"127.0.0.1:{server.port}"
        self.process = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, encoding="utf-8")

    def paste(self, block):
        assert "localhost:8080" in block
        self.process.stdin.write(block.replace("localhost:8080", self.address) + "echo ---\n")
        self.process.stdin.flush()

    def output(self):
        """What the pasted commands have written, once they are done."""
        return "".join(iter(self.process.stdout.readline, "---\n"))

    def close(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()


class TestReadme:
    """Every command and every program of README.md, run as written; only ports are replaced."""

    def test_every_block_is_known_here(self):
        """So that no new one stays untested."""
        kinds = {"curl -s localhost:8080": 0, "python bayeux_server.py": 0, "python -m pytest": 0, "benchmark.py": 0,
                 "attack.py": 0}
        for block in readme_blocks("sh"):
            kinds[next(kind for kind in kinds if kind in block)] += 1
        assert kinds == {"curl -s localhost:8080": 6, "python bayeux_server.py": 2, "python -m pytest": 1,
                         "benchmark.py": 1, "attack.py": 1}
        assert len(readme_blocks("python")) == 3 and len(re.findall("^```", README, re.MULTILINE)) == 2 * (11 + 3 + 7 + 1)

    def test_its_attacks_can_be_tried(self):
        if sys.platform != "linux":
            pytest.skip("memory is read from /proc, and a bystander has another address of the loopback network")
        command, = [block.split() for block in readme_blocks("sh") if "attack.py" in block]
        tried = subprocess.run([sys.executable, *command[1:], "--only", "rebound-name"], cwd=HERE,
                               check=True, capture_output=True, encoding="utf-8", timeout=PATIENCE).stdout
        assert "421, 421, 421, 421; localhost 200" in tried

    def test_its_figures_can_be_measured(self):
        """Not these figures, but the same lines; and held connects need no threads."""
        def lines(text):
            return [re.sub(r" +", " ", re.sub(r"[\d.]+", "0", line)) for line in text.splitlines() if "|" not in line]

        if sys.platform != "linux":
            pytest.skip("the processor time is read from /proc")
        command, = [block.split() for block in readme_blocks("sh") if "benchmark.py" in block]
        measured = subprocess.run([sys.executable, *command[1:], "--small"], cwd=HERE,
                                  check=True, capture_output=True, encoding="utf-8", timeout=PATIENCE).stdout
        shown, = readme_blocks("text")
        assert lines(measured.strip()) == lines(shown.strip())
        assert re.search(r"threads +(\d+) \(\1 without them\)", measured)

    @for_each("block", [block for block in readme_blocks("sh") if "python bayeux_server.py" in block])
    def test_its_start_commands_work(self, block, tmp_path):
        folder = tmp_path / "project"
        folder.mkdir()
        for name in ("bayeux_server.py", "index.html"):
            shutil.copy(HERE / name, folder)
        script = re.sub(r"--port \d+", "--port 0", block).replace("python ", f"exec '{sys.executable}' ")
        with Program(command=["bash", "-e", "-c", script], folder=folder) as program:
            tls = None
            if program.scheme == "https":
                tls = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
                tls.check_hostname = False          # the certificate names localhost, and we ask by number
            assert http_get(program.root + "/", tls)[2] == (HERE / "index.html").read_bytes()
            assert http_get(program.root + "/key.pem", tls)[0] == 404
            with Peer(program, tls) as peer:
                assert peer.ask("/service/echo", data=1)["data"] == 1
            assert program.stop(signal.SIGINT) == 0

    def test_its_test_commands_are_these(self):
        assert readme_blocks("sh", readme_section("Tests")) == ["pip install pytest\npython -m pytest\n"]

    def test_its_conversation_in_curl(self, serve):
        if (shutil.which("curl") is None or shutil.which("bash") is None) and not os.environ.get("CI"):
            pytest.skip("curl or bash is not installed")
        section = readme_section("A conversation in curl")
        handshake, subscribe, first_connect, held_connect, publish, disconnect = readme_blocks("sh", section)
        shown = [json.loads(block) for block in readme_blocks("json", section)]
        server = serve(client_max_connections=10)
        shell, second_shell = Shell(server), Shell(server)
        seen = []
        for block in (handshake, subscribe, first_connect):
            shell.paste(block)
            seen.append(json.loads(shell.output()))
        shell.paste(held_connect)
        wait_until(lambda: any(session.hold for session in list(server.core.sessions.values())), "the held connect")
        second_shell.paste(publish)
        seen += [json.loads(second_shell.output()), json.loads(shell.output())]
        shell.paste(disconnect)
        seen.append(json.loads(shell.output()))
        shell.close()
        second_shell.close()
        for batch in (seen[0], shown[0]):
            assert re.fullmatch("[0-9a-f]{32}", batch[0].pop("clientId"))
        assert seen == shown

    @pytest.fixture
    def run_block(self, tmp_path, monkeypatch):
        """Runs a program of README on a free port: run_block(block, conversation, name=value, ...).

        While it serves, conversation(server) is held; then the server is stopped, and the program must
        end by itself, without an exception.  The names stand for builtins.
        """
        servers = []

        class ObservedServer(BayeuxServer):
            def start(self):
                servers.append(super().start())
                return self

        def run_block(block, conversation, release=lambda: None, **names):
            assert block.count("port=8080") == 1
            file = tmp_path / "program.py"
            file.write_text(block.replace("port=8080", "port=0"), "utf-8")
            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                running = executor.submit(runpy.run_path, str(file), names)
                wait_until(lambda: servers or running.done(), "its server")
                try:
                    if servers:
                        conversation(servers[0])
                finally:
                    for server in servers:
                        server.shutdown()
                    release()
                running.result(PATIENCE)

        monkeypatch.setattr(bayeux_server, "BayeuxServer", ObservedServer)
        return run_block

    def test_its_ten_lines_of_python(self, run_block, monkeypatch):
        monkeypatch.chdir(HERE)
        block = readme_blocks("python", readme_section("Ten lines of Python"))[0]
        assert len(block.splitlines()) <= 12
        entered, is_asked = threading.Event(), threading.Event()

        def wait_for_enter(prompt):
            is_asked.set()
            assert prompt == "Enter stops the server." and entered.wait(PATIENCE)

        def conversation(server):
            assert is_asked.wait(PATIENCE)
            assert http_get(server.root_url + "/LICENSE")[0] == 200
            with Peer(server) as peer:
                peer.subscribe("/chat/demo")
                peer.publish("/chat/demo", {"user": "anna", "chat": "Hello"})
                events = []
                while len(events) < 2:
                    events += peer.connect()[1:]
                assert events[1]["data"]["user"] == "bot" and "Hello" in events[1]["data"]["chat"]
                peer.send_connect()
                until_held(server, peer.id)
                entered.set()
                assert peer.read_answer().batch[0]["successful"]

        run_block(block, conversation, input=wait_for_enter, release=entered.set)

    def test_its_service_and_its_callback(self, run_block):
        printed = []

        def conversation(server):
            with Peer(server) as peer:
                wait_until(lambda: "add" in server.core.services, "the service")
                assert peer.ask("/service/add", data=[1, 2])["data"] == 3
                peer.subscribe("/news")
                wait_until(lambda: ("subscribe", peer.id, "/news") in printed, "what the callback prints")
                wait_until(lambda: ("publish", None, "/news") in printed, "the server's own event")

        block = readme_blocks("python", readme_section("In your program"))[0]
        run_block(block, conversation, print=lambda *words: printed.append(words))

    def test_its_message_acl(self, run_block):
        def conversation(server):
            with Wire(server) as wire:
                def shake_hands(**fields):
                    return wire.post({"channel": "/meta/handshake", "version": "1.0", **fields})[0]

                for ext in (None, 1, [], {}, {"token": "guess"}, {"token": []}):
                    refused = shake_hands(ext=ext)
                    assert refused["error"].startswith("401:") and "clientId" not in refused
                client_id = shake_hands(ext={"token": "a long secret"})["clientId"]
                assert wire.post({"channel": "/news", "data": 1, "clientId": client_id})[0]["successful"]
                server.core.sessions[client_id].flags["user"] = "bert"
                reply, = wire.post({"channel": "/news", "data": 1, "clientId": client_id})
                assert reply["error"] == "403:/news:Only anna writes here"
                assert wire.post({"channel": "/other", "data": 1, "clientId": client_id})[0]["successful"]

        block = readme_blocks("python", readme_section("Security"))[0]
        run_block(block, conversation)

    def test_its_table_of_options_is_that_of_the_server(self):
        rows = re.findall(
            r"^\| `(\w+)` \| (?:`(--[\w-]+)`)? ?\| `(.*?)` \| \S.* \|$", readme_section("Options"), re.MULTILINE)
        flags = {action.dest: action.option_strings[0] for action in bayeux_server.make_parser()._actions}
        assert [(name, flag or None, ast.literal_eval(default)) for name, flag, default in rows] == [
            (name, flags.get(name), default_of(row)) for name, row in option_fields().items()]

    def test_its_numbers_are_those_of_the_server(self):
        assert f"`max_queue` ({bayeux_server.Options().max_queue:,})" in README
        assert "Python 3.9 or newer" in README

    def test_its_lines_of_html_are_those_of_the_client_itself(self):
        """.ci/page runs them."""
        block, = readme_blocks("html")
        lines = [line.strip() for line in block.splitlines() if "script>" not in line]
        assert lines == [line[2:].strip() for line in parts_of_page("script")[1].splitlines()[3:3 + len(lines)]]

    def test_its_links_lead_to_files(self):
        links = re.findall(r"\]\(([^)]+)\)", README)
        files = [link for link in links if not link.startswith("https://")]
        assert set(files) >= {"bayeux_server.py", "index.html", "test_bayeux_server.py", "LICENSE"}
        assert [link for link in files if not (HERE / link).is_file()] == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

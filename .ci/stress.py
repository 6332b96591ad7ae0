#!/usr/bin/env python3
"""Clients that come and go, change their transports, break connections and read slowly, beside faults of the application.

    python .ci/stress.py                            for a minute
    python .ci/stress.py --seconds 600 --seed 4711  for longer, with the random numbers of an earlier run
    python .ci/stress.py --server other.py          another version of the module

The server runs in a process of its own, where threads are switched a thousand times as often as usual.  It serves
HTTP and HTTPS.  Publishers number their events on a channel of their own, over long-polling, WebSocket and inside
the process.  Each client lives through sessions, and each turn of a session takes another way: long-polling, JSONP,
WebSocket, an event stream, two connects at once, a connection that is reset, an answer that is read slowly.

Checked: events come in order and once, and none is lost but where a client without acknowledgement broke its own
connection; each message gets its reply, in order; the log has no error but those of the application's own faults;
and when all is over, the server keeps no session, no byte, no file and no thread, does not spin, and has not grown.
Then it is stopped with connects held and answers all of them.

Exit status 1 if a check fails; the seed and the last steps of the session are printed with it.
"""
from __future__ import annotations

import argparse
import base64
import collections
import gc
import importlib.util
import json
import logging
import os
import pathlib
import random
import select
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 30           # seconds until an answer that does not come is a failure
LEASE = 4               # connect_timeout of the server, in seconds
CLIENTS, PUBLISHERS = 14, 3
MOST_THREADS = 16       # max_threads of each server, which keeps those that it has begun
MOST_GROWTH = 48        # MiB that the server may grow after a third of the time


# -- The server's process ----------------------------------------------------------------------------------------------

class Fault(Exception):
    """A mistake of the application."""


class Log(logging.Handler):
    """Counts the lines, and keeps those that say more than that the application is at fault."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.count, self.unexpected = 0, []

    def emit(self, record):
        self.count += 1
        text = self.format(record)
        if record.levelno >= logging.ERROR and "Fault: " not in text or "Traceback" in text and "Fault: " not in text:
            self.unexpected.append(text[-2000:])


class Extension:
    def incoming(self, session, message):
        if message.get("channel") == "/service/fault-of-extension":
            raise Fault("incoming")
        return message


def application(rng):
    """The options that are the application's code: some of it answers, some is slow, some is wrong."""
    def slow(message):
        time.sleep(rng.random() / 50)
        return {"data": message["data"]}

    def wrong(message):
        raise Fault("a service")

    def refuse(session, message):
        if message["channel"] == "/refused/a":
            return "403:/refused/a:no"
        if message["channel"] == "/refused/fault":
            raise Fault("message_acl")
        return None

    def body(request):
        raise Fault("a content handler")

    def callback(event, details):
        if rng.random() < 0.01:
            raise Fault("a callback")

    return {"services": {"echo": lambda message: {"data": message["data"]}, "slow": slow, "wrong": wrong},
            "message_acl": refuse, "extensions": [Extension()], "content_handlers": {"/body": body},
            "callback": lambda *details, **more: callback(details, more)}


def serve(arguments):
    """Run the servers.  A line on standard input is a command; its answer is a line of JSON."""
    sys.setswitchinterval(1e-6 if arguments.switch_interval is None else arguments.switch_interval)
    specification = importlib.util.spec_from_file_location("bayeux_server", arguments.server)
    module = importlib.util.module_from_spec(specification)
    sys.modules["bayeux_server"] = module
    specification.loader.exec_module(module)
    log = Log()
    logging.getLogger("bayeux_server").addHandler(log)
    logging.getLogger("bayeux_server").setLevel(logging.INFO)
    rng = random.Random(arguments.seed)
    common = {"port": 0, "client_max_connections": 0, "max_sessions_per_browser": 0, "connect_timeout": LEASE, "timeout": 2,
              "docroot": arguments.folder, "lazy_channels": ["/lazy/*"], "max_lazy": 1, "request_timeout": 10,
              "anon_publish": True, "max_threads": MOST_THREADS}
    certificate = os.path.join(arguments.folder, "cert.pem")
    servers = [module.BayeuxServer(alias="plain", **common, **application(rng)).start(),
               module.BayeuxServer(alias="tls", tls_cert=certificate, tls_key=certificate, **common,
                                   **application(rng)).start()]
    published, is_over = [0, 0], threading.Event()

    def publish():
        while not is_over.wait(0.002):
            for index, server in enumerate(servers):
                published[index] += 1
                server.publish("/stress/inside", {"p": "inside", "n": published[index]})

    bots = [module.LocalClient(server, "bot") for server in servers]
    for bot in bots:
        def echo(message, bot=bot):
            bot.publish("/echo/out", message["data"])
            if rng.random() < 0.05:
                raise Fault("a bot")
        bot.subscribe("/echo/in", echo)
    publisher = threading.Thread(target=publish)

    def state():
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            gc.collect()                # else an event is freed when the thread that made it runs next, which may be never
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
                "rss": pages * os.sysconf("SC_PAGE_SIZE") >> 20, "cpu": time.process_time(), "published": published,
                "sessions": sum(len(server.sessions) for server in servers), "lines": log.count,
                "held": sum(session.hold is not None for server in servers for session in server.sessions),
                "memory": sum(server.memory.used for server in servers), "unexpected": log.unexpected[:5]}

    print(json.dumps([server.port for server in servers]), flush=True)
    for line in sys.stdin:
        if line.strip() == "publish":
            publisher.start()
        elif line.strip() == "quiet":
            is_over.set()
            publisher.join()
        elif line.strip() == "stop":
            for server in servers:
                server.shutdown()
        print(json.dumps(state()), flush=True)


class Server:
    """The process, as the clients' side sees it."""

    def __init__(self, arguments, folder):
        command = [arguments.python, __file__, "--serve", "--folder", folder, "--server", arguments.server,
                   "--seed", str(arguments.seed)]
        if arguments.switch_interval is not None:
            command += ["--switch-interval", str(arguments.switch_interval)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self.ports = json.loads(self.process.stdout.readline())

    def tell(self, command):
        """Have the server do something; its state afterwards."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# -- Connections -------------------------------------------------------------------------------------------------------

class Broken(Exception):
    """The server has closed the connection."""


class Wire:
    """A connection, over TLS if the port asks for it."""

    def __init__(self, port, tls=None, is_slow=False):
        self.socket = socket.socket()
        if is_slow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket)
        self.buffer, self.step = b"", 512 if is_slow else 65536

    def close(self):
        self.socket.close()

    def reset(self):
        """Close, so that the server sees an error."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read_more(self):
        data = self.socket.recv(self.step)
        if not data:
            raise Broken
        self.buffer += data

    def read_line(self, end=b"\r\n"):
        while end not in self.buffer:
            self.read_more()
        line, self.buffer = self.buffer.split(end, 1)
        return line

    def read_exactly(self, count):
        while len(self.buffer) < count:
            self.read_more()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def send_post(self, messages):
        body = json.dumps(messages).encode()
        self.socket.sendall(b"POST /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                            b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def send_get(self, target, *lines):
        head = [f"GET {target} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]
        self.socket.sendall("\r\n".join(head).encode())

    def is_readable(self, seconds):
        pending = getattr(self.socket, "pending", lambda: 0)()
        return bool(self.buffer or pending or select.select([self.socket], [], [], seconds)[0])

    def read_head(self):
        status, *lines = self.read_line(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(status.split()[1]), headers

    def read_answer(self):
        status, headers = self.read_head()
        return status, self.read_exactly(int(headers["content-length"]))

    def read_batch(self):
        return json.loads(self.read_answer()[1])

    def read_script(self):
        return json.loads(self.read_answer()[1].decode()[len("/**/jsonpcallback("):-len(");")])


class SocketWire(Wire):
    """A WebSocket."""

    def __init__(self, port, tls=None, is_slow=False):
        super().__init__(port, tls, is_slow)
        self.send_get("/cometd", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                      "Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)).decode())
        status, _ = self.read_head()
        assert status == 101, status

    def send_frame(self, opcode, payload, is_final=True):
        key = os.urandom(4)
        length = len(payload)
        size = bytes([0x80 | length]) if length < 126 else b"\xfe" + struct.pack("!H", length)
        text = bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 * is_final | opcode]) + size + key + text)

    def send_batch(self, messages, parts=1):
        payload = json.dumps(messages).encode()
        cut = max(1, len(payload) // parts)
        pieces = [payload[place:place + cut] for place in range(0, len(payload), cut)]
        for number, piece in enumerate(pieces):
            self.send_frame(1 if number == 0 else 0, piece, number == len(pieces) - 1)

    def read_batch(self):
        """The next batch; pings are answered on the way."""
        while True:
            first, second = self.read_exactly(2)
            length = second if second < 126 else int.from_bytes(self.read_exactly(2 if second == 126 else 8), "big")
            payload = self.read_exactly(length)
            if first & 15 == 8:
                raise Broken
            if first & 15 == 9:
                self.send_frame(10, payload)
            if first & 15 == 1:
                return json.loads(payload)


# -- Clients -----------------------------------------------------------------------------------------------------------

class Failure(Exception):
    """A check that does not hold."""


class Session:
    """One session of a client, and what it has received.

    Without acknowledgement a connection that its client breaks may take events with it: then the numbers may jump.
    """

    def __init__(self, run, index, rng):
        self.run, self.rng, self.index = run, rng, index
        self.port, self.tls = run.server.ports[index], run.tls if index else None
        self.has_ack = rng.random() < 0.5
        self.ack, self.number, self.wire = 0, 0, None
        self.next = {}                      # the next number of each publisher
        self.gaps = set()                   # publishers whose next event need not be the next
        self.steps = collections.deque(maxlen=20)

    def fail(self, text):
        raise Failure(f"{text}\n    session {self.id} {'with' if self.has_ack else 'without'} acknowledgement, "
                      f"server {self.index}, last steps: {' '.join(self.steps)}")

    def message(self, channel, **fields):
        self.number += 1
        return {"channel": channel, "id": str(self.number), "clientId": self.id, **fields}

    def connect_message(self, timeout=None, kind="long-polling"):
        ext = {"ext": {"ack": self.ack}} if self.has_ack else {}
        advice = {} if timeout is None else {"advice": {"timeout": timeout}}
        return self.message("/meta/connect", connectionType=kind, **ext, **advice)

    def begin(self):
        self.id = None
        ext = {"ext": {"ack": True}} if self.has_ack else {}
        reply, = self.ask({"channel": "/meta/handshake", "version": "1.0", "id": "0", **ext,
                           "supportedConnectionTypes": ["long-polling", "websocket", "callback-polling"]})
        if not reply["successful"]:
            self.fail(f"a handshake was refused: {reply}")
        self.id = reply["clientId"]
        self.heard(self.ask(self.connect_message()))
        pattern = self.rng.choice(["/stress/*", "/stress/**", ["/stress/inside", "/stress/http", "/stress/socket"]])
        reply, = self.ask(self.message("/meta/subscribe", subscription=pattern))
        if not reply["successful"]:
            self.fail(f"a subscription was refused: {reply}")

    def open(self):
        if self.wire is None:
            self.wire = Wire(self.port, self.tls)
        return self.wire

    def ask(self, *messages):
        """A POST on the kept connection, each of its messages answered in order."""
        wire = self.open()
        wire.send_post(messages)
        batch = wire.read_batch()
        self.check_replies(messages, batch)
        return batch

    def check_replies(self, messages, batch):
        ids = [message["id"] for message in batch if "successful" in message]
        if ids != [message["id"] for message in messages]:
            self.fail(f"replies {ids} to {messages}")

    def heard(self, batch):
        """Take in the answer to a connect, or a frame."""
        for message in batch:
            if message["channel"] == "/meta/connect":
                if not message["successful"]:
                    self.fail(f"a connect was refused: {message}")
                if self.has_ack:
                    self.ack = message["ext"]["ack"]
            elif message["channel"].startswith("/stress/") and "successful" not in message:
                self.take(message["data"]["p"], message["data"]["n"])

    def take(self, publisher, number):
        expected = self.next.get(publisher, number)
        if number < expected:
            self.fail(f"event {number} of {publisher} came again, or too late; {expected} was next")
        if number > expected and publisher not in self.gaps:
            self.fail(f"events {expected} to {number - 1} of {publisher} were lost")
        self.gaps.discard(publisher)
        self.next[publisher] = number + 1
        self.run.count["events"] += 1

    def broke(self):
        """This client has broken a connection: what was on its way is lost, where nothing is acknowledged."""
        if not self.has_ack:
            self.gaps = set(self.run.publishers)

    # -- Turns -----------------------------------------------------------------------------

    def turn_poll(self):
        self.heard(self.ask(self.connect_message(self.rng.choice([None, 0, 100]))))

    def turn_batch(self):
        messages = [self.connect_message(), self.message("/service/echo", data=1), self.message("/service/wrong", data=2),
                    self.message("/refused/a", data=3), self.message("/echo/in", data=4)]
        self.heard(self.ask(*messages))

    def turn_jsonp(self):
        message = self.connect_message(100, "callback-polling")
        wire = self.open()
        wire.send_get("/cometd?" + urllib.parse.urlencode({"message": json.dumps([message])}),
                      "Sec-Fetch-Site: same-origin")
        batch = wire.read_script()
        self.check_replies([message], batch)
        self.heard(batch)

    def turn_pipelined(self):
        """A second request comes behind a connect, which is answered at once."""
        wire, connect, other = self.open(), self.connect_message(), self.message("/service/slow", data="x")
        wire.send_post([connect])
        wire.send_post([other])
        batch = wire.read_batch()
        self.check_replies([connect], batch)
        self.heard(batch)
        self.check_replies([other], wire.read_batch())

    def turn_overlap(self):
        """A second connect, on another connection, releases the first."""
        wire, other = self.open(), Wire(self.port, self.tls)
        first, second = self.connect_message(), self.connect_message(200)
        wire.send_post([first])
        time.sleep(self.rng.random() / 50)
        other.send_post([second])
        batches = [wire.read_batch(), other.read_batch()]
        other.close()
        self.check_replies([first], batches[0])
        self.check_replies([second], batches[1])
        if self.has_ack:                    # a client goes by the higher number; both may bring events
            batches.sort(key=lambda batch: batch[0]["ext"]["ack"])
            events = {}
            for batch in batches:
                events.update({(message["data"]["p"], message["data"]["n"]): message for message in batch[1:]})
            self.heard([batches[-1][0], *events.values()])
        else:                               # nothing says which of them the server has heard first
            first, second = ({event["data"]["p"]: event["data"]["n"] for event in batch[1:]} for batch in batches)
            is_reversed = any(number > second.get(publisher, number) for publisher, number in first.items())
            for batch in reversed(batches) if is_reversed else batches:
                self.heard(batch)

    def turn_slow(self):
        """Reads its answer in small pieces."""
        wire, connect = Wire(self.port, self.tls, is_slow=True), self.connect_message(300)
        wire.send_post([connect])
        time.sleep(self.rng.random() / 5)
        batch = wire.read_batch()
        self.check_replies([connect], batch)
        wire.close()
        self.heard(batch)

    def turn_reset(self):
        """Breaks the connection of a connect before, or while, it is answered."""
        self.open().send_post([self.connect_message()])
        time.sleep(self.rng.random() / 20)
        self.rng.choice([self.wire.reset, self.wire.close])()
        self.wire = None
        self.broke()

    def turn_socket(self):
        """A WebSocket for a while."""
        wire = SocketWire(self.port, self.tls, is_slow=self.rng.random() < 0.3)
        try:
            for _ in range(self.rng.randint(1, 4)):
                message = self.connect_message(self.rng.choice([None, 0, 100]), "websocket")
                wire.send_batch([message], parts=self.rng.choice([1, 1, 3]))
                while True:
                    batch = wire.read_batch()
                    self.heard(batch)
                    if any(each.get("id") == message["id"] for each in batch if "successful" in each):
                        break
                if self.rng.random() < 0.3:
                    wire.send_frame(9, b"ping")
            self.broke()                    # frames may be on their way
        finally:
            self.rng.choice([wire.close, wire.reset])()

    def turn_stream(self):
        """An event stream beside connects that show that the client lives."""
        if self.has_ack:
            return
        wire = Wire(self.port, self.tls)
        try:
            wire.send_get(f"/cometd/{self.id}", "Accept: text/event-stream")
            status, _ = wire.read_head()
            if status != 200:
                self.fail(f"an event stream was refused: {status}")
            for _ in range(self.rng.randint(1, 6)):
                if not wire.is_readable(0.5):
                    break
                line = wire.read_line(b"\r\n\r\n")
                if line.startswith(b"data: "):
                    self.heard(json.loads(line[len("data: "):]))
            self.broke()
        finally:
            wire.close()

    def turn_upload(self):
        """A request that never ends, and a file of which the rest is not wanted."""
        for text in (b"POST /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n[{",
                     b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /body HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
            wire = Wire(self.port, self.tls, is_slow=True)
            wire.socket.sendall(text)
            if text.startswith(b"GET /large"):
                wire.read_more()
            self.rng.choice([wire.close, wire.reset])()

    def live(self, until):
        """Take turns, each with a connect in time, until the session or the run is over."""
        turns = [self.turn_poll, self.turn_batch, self.turn_jsonp, self.turn_pipelined, self.turn_overlap,
                 self.turn_slow, self.turn_reset, self.turn_socket, self.turn_stream, self.turn_upload]
        for _ in range(self.rng.randint(5, 40)):
            if time.monotonic() > until:
                return
            turn = self.rng.choice(turns)
            self.steps.append(turn.__name__[len("turn_"):])
            self.run.count[self.steps[-1]] += 1
            turn()

    def drain(self, last):
        """All that was published has come, at the end of the run."""
        limit = time.monotonic() + PATIENCE
        while any(number <= last[publisher] and publisher not in self.gaps for publisher, number in self.next.items()):
            if time.monotonic() > limit:
                self.fail(f"events at the end were lost: next are {self.next}, the last are {last}")
            self.steps.append("drain")
            self.heard(self.ask(self.connect_message(200)))

    def end(self):
        """Say good-bye, or vanish."""
        if self.rng.random() < 0.6:
            reply, = self.ask(self.message("/meta/disconnect"))
            if not reply["successful"]:
                self.fail(f"a disconnect was refused: {reply}")
        if self.wire is not None:
            self.wire.close()


class Run:
    """All clients and publishers, and what they found."""

    publishers = ("inside", "http", "socket")

    def __init__(self, server, tls, seed, seconds):
        self.server, self.tls, self.seed = server, tls, seed
        self.until = time.monotonic() + seconds
        self.quiet = threading.Event()      # nothing is published any more
        self.last = [{}, {}]                # the last number of each publisher, by server
        self.count, self.failures = collections.Counter(), []

    def guarded(self, job, *arguments):
        try:
            job(*arguments)
        except Exception as failure:        # noqa: BLE001 (each is a failure of the run)
            self.failures.append(f"{type(failure).__name__}: {failure}")

    def client(self, number):
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.until and not self.failures:
            session = Session(self, rng.randrange(2), rng)
            try:
                session.begin()
                self.count["sessions"] += 1
                session.live(self.until)
                if time.monotonic() > self.until:
                    self.quiet.wait(PATIENCE)
                    session.drain(self.last[session.index])
                session.end()
            except (Broken, OSError) as failure:
                session.fail(f"the server broke the connection: {failure!r}")

    def publisher(self, kind, index):
        """Publish in batches, each confirmed before the next."""
        number, rng = 0, random.Random(f"{self.seed} {kind} {index}")
        tls = self.tls if index else None
        wire = (SocketWire if kind == "socket" else Wire)(self.server.ports[index], tls)
        while time.monotonic() < self.until - 0.5 and not self.failures:
            batch = []
            for _ in range(rng.choice([1, 1, 1, 5, 20])):
                number += 1
                batch.append({"channel": f"/stress/{kind}", "id": str(number), "data": {"p": kind, "n": number}})
            (wire.send_batch if kind == "socket" else wire.send_post)(batch)
            replies = wire.read_batch()
            if [reply["id"] for reply in replies if reply["successful"]] != [message["id"] for message in batch]:
                raise Failure(f"publishes were refused: {replies[:2]}")
            time.sleep(rng.random() / 50)
        wire.close()
        self.last[index][kind] = number

    def go(self):
        publishers = [threading.Thread(target=self.guarded, args=(self.publisher, kind, index))
                      for kind in ("http", "socket") for index in (0, 1)]
        clients = [threading.Thread(target=self.guarded, args=(self.client, number)) for number in range(CLIENTS)]
        for thread in publishers + clients:
            thread.start()
        self.server.tell("publish")
        time.sleep(max(0.0, (self.until - time.monotonic()) / 3))
        middle = self.server.tell("state")
        for thread in publishers:
            thread.join()
        for index, number in enumerate(self.server.tell("quiet")["published"]):
            self.last[index]["inside"] = number
        self.quiet.set()
        for thread in clients:
            thread.join()
        return middle


# -- The checks at the end ---------------------------------------------------------------------------------------------

def wait_until(server, is_right):
    """The state once it is right, or after the server's patience."""
    limit = time.monotonic() + PATIENCE
    while True:
        state = server.tell("state")
        if is_right(state) or time.monotonic() > limit:
            return state
        time.sleep(0.1)


def check_quiet(server, start, middle):
    """Whether the server keeps nothing of what is over: name of the check, figure, whether it holds."""
    state = wait_until(server, lambda state: state["sessions"] == state["memory"] == 0
                       and state["descriptors"] <= start["descriptors"])
    began, busy = time.monotonic(), state["cpu"]
    time.sleep(2)
    share = (server.tell("state")["cpu"] - busy) / (time.monotonic() - began)
    yield "sessions that are left", state["sessions"], state["sessions"] == 0
    yield "bytes that are counted", state["memory"], state["memory"] == 0
    yield "descriptors that are left", state["descriptors"] - start["descriptors"], \
        state["descriptors"] <= start["descriptors"]
    yield "threads more than at the start", state["threads"] - start["threads"], \
        state["threads"] - start["threads"] <= 2 * MOST_THREADS
    yield "CPU of the idle server", f"{share:.1%}", share < 0.3
    yield "MiB grown since a third of the time", state["rss"] - middle["rss"], state["rss"] - middle["rss"] < MOST_GROWTH
    yield "lines in the log that should not be there", len(state["unexpected"]), not state["unexpected"]
    for text in state["unexpected"]:
        print(text)


def check_stop(server, tls):
    """Stop the server while connects are held: each gets its reply, and the process ends well."""
    wires = []
    for index in (0, 1) * 10:
        wire = Wire(server.ports[index], tls if index else None)
        wire.send_post([{"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": ["long-polling"]}])
        client_id = wire.read_batch()[0]["clientId"]
        connect = {"channel": "/meta/connect", "clientId": client_id, "connectionType": "long-polling"}
        for _ in range(2):
            wire.send_post([connect])
            if wire not in wires:
                wire.read_batch()
                wires.append(wire)
    wait_until(server, lambda state: state["held"] == len(wires))
    server.tell("stop")
    answered = 0
    for wire in wires:
        try:
            answered += wire.read_batch()[0]["successful"] is True
        except (Broken, OSError):
            pass
        wire.close()
    server.process.stdin.close()
    status = server.process.wait(PATIENCE)
    yield "held connects answered at the stop", f"{answered} of {len(wires)}", answered == len(wires)
    yield "exit status of the server", status, status == 0


def make_certificate(folder):
    path = os.path.join(folder, "cert.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-keyout", path + ".key", "-out", path], check=True, capture_output=True)
    with open(path, "a", encoding="ascii") as file:
        file.write(pathlib.Path(path + ".key").read_text("ascii"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    return tls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long clients come and go (default: 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the random numbers")
    parser.add_argument("--server", default=str(ROOT / "bayeux_server.py"), help="the module")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the server")
    parser.add_argument("--switch-interval", type=float, help="of the server's threads, in seconds (default: 0.000001)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tls = make_certificate(folder)
        pathlib.Path(folder, "large").write_bytes(b"x" * 5_000_000)
        server = Server(arguments, folder)
        try:
            start = server.tell("state")
            run = Run(server, tls, arguments.seed, arguments.seconds)
            middle = run.go()
            print(", ".join(f"{count} {name}" for name, count in sorted(run.count.items())))
            checks = [("order, loss, doubles, replies", f"{len(run.failures)} failures", not run.failures),
                      *check_quiet(server, start, middle), *check_stop(server, tls)]
        finally:
            server.process.kill()
            server.process.wait()
    for text in run.failures[:5]:
        print(f"FAILED (seed {arguments.seed}): {text}")
    for name, figure, is_right in checks:
        print(f"{'held  ' if is_right else 'BROKEN'}  {name}: {figure}")
    return 0 if all(is_right for _, _, is_right in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Attacks bayeux_server.py on this machine, and measures the harm that one client can do to the others.

    python .ci/attack.py                            all attacks, in less than four minutes
    python .ci/attack.py --quick --check            shorter attacks; exit status 1 if a bound is broken
    python .ci/attack.py --list                     the attacks: the group, the name and the deed of each
    python .ci/attack.py --only zeros --only heads  two of them
    python .ci/attack.py --server old.py --markdown another copy of the server; the table as README has it

Each attack meets a server of its own, in a process of its own, that listens on 127.0.0.1. The people around it:

    the attacker     One process at 127.0.0.3. It does its worst for a few seconds, and leaves.
    the bystander    One process at 127.0.0.2 with a session. It sends a /meta/ping every 20 ms on a kept connection.
                     Every 0.2 s it publishes an event, which its held /meta/connect must bring back once.
    the office       A second bystander, at the attacker's own address. Its figures are shown; --office binds them too.
    the crowd        Sessions of other people, at 127.1.0.0/16, where an attack needs subscribers.
    the newcomer     Afterwards, at 127.0.0.4, it asks for a session, a file and a service, until it gets all three.

The columns of the table:

    ping             The longest wait of the bystander for the answer to one ping, in ms. A ping that fails is sent
                     again, and its time goes on. "idle" is the longest one before the attack: the control.
    memory           The server's most resident memory during the attack, less its memory before, in MiB.
    cpu, log         Seconds of processor time that the attack cost the server, and KiB of log that it wrote.
    wait             Seconds that the server's threads waited for a core. A ping waits too then, and not for the attack
                     alone: on a busy machine this figure tells, and --again helps.
    threads          The most threads that the server had.
    back             Seconds after the attack until the newcomer was served; "never" after 15 s.
    attacker gets    HTTP statuses and closed connections, counted, or the attack's own words.
    verdict          "holds", or each bound that was broken.

The attacker runs at a lower priority, since the three processes share the machine's cores: a ping is to wait for the
server and not for the attacker. Everything has a time-out, so a server that hangs does not stop this program.
It runs on Linux: it reads /proc, where the whole network 127.0.0.0/8 belongs to this machine.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

MODULE = pathlib.Path(__file__).resolve().parent.parent / "bayeux_server.py"
BYSTANDER, ATTACKER, NEWCOMER = "127.0.0.2", "127.0.0.3", "127.0.0.4"
PING_EVERY = 0.02               # seconds between two pings of a bystander
PUBLISH_EVERY = 10              # pings between two events of a bystander
SLOW = 5.0                      # seconds that the slow code of the application takes; longer than an attack
PATIENCE = 15.0                 # seconds after which a server that gives no answer counts as dead
SETTLING = 3.0                  # seconds that an event may take to arrive after the attack
SHORTEST = 0.5                  # seconds that are looked at, though the attack may take less
CROWD_EACH = 40                 # sessions of the crowd at one address
MIB = 1024 * 1024
BATCH = 1000                    # messages in a batch of allowed size
DATA = "x" * 65_000             # of an event that is nearly as large as a message may be
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
PROCESSES = multiprocessing.get_context("fork")


# -- §1  The server under attack --------------------------------------------------------------------------------------
#
# attack.py --serve SETTINGS is the server's process: the module, and an application with every fault that an
# application may have. It ends when its standard input ends, so it never outlives the program that started it.

class Faulty:
    """A response's body whose read() blocks, or raises."""

    def __init__(self, fault: BaseException | None) -> None:
        self.fault = fault

    def read(self, size: int = -1) -> bytes:
        if self.fault is not None:
            raise self.fault
        time.sleep(SLOW)
        return b""

    def close(self) -> None:
        pass


def raising(fault: type[BaseException]) -> Callable:
    def service(message: dict) -> None:
        raise fault()
    return service


def slow_service(message: dict) -> dict:
    time.sleep(SLOW)
    return {"data": "at last"}


def slow_page(request: Any) -> str:
    time.sleep(SLOW)
    return "at last"


def hanging_acl(session: Any, message: dict) -> None:
    """An access rule that asks a database, which does not answer for one client."""
    if message.get("channel") == "/hang":
        time.sleep(SLOW)


def sleepy_listener(event: str, details: dict) -> None:
    time.sleep(0.05)


def serve(settings: dict) -> None:
    """Run a server with the faulty application until standard input ends."""
    import asyncio
    spec = importlib.util.spec_from_file_location("bayeux_server", settings["module"])
    module = sys.modules["bayeux_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if settings["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (settings["files"], settings["files"]))
    getattr(module, "raise_file_limit", int)()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    options = settings["options"]
    if "acl" in settings["application"]:
        options["message_acl"] = hanging_acl
    faults = [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit]
    services = {"slow": slow_service, **{fault.__name__: raising(fault) for fault in faults}}
    pages = {"/page": lambda request: "a page", "/slow": slow_page,
             "/blocks": lambda request: module.Response(Faulty(None), length=1000),
             "/exits": lambda request: module.Response(Faulty(SystemExit()), length=1000)}
    server = module.BayeuxServer(port=0, docroot=settings["docroot"], services=services, content_handlers=pages,
                                 **options)
    module.Demo(server)
    if "listener" in settings["application"]:
        server.add_listener(sleepy_listener, ["publish"])
    helper = module.LocalClient(server, "helper")

    def answer(message: dict) -> None:
        if message["data"] == "cancel":
            raise asyncio.CancelledError
        helper.publish("/helper/answer", "I heard " + message["data"])

    helper.subscribe("/helper/question", answer)
    server.start()
    print(server.url, flush=True)
    sys.stdin.read()
    os._exit(0)


class Server:
    """The server's process, with its figures in /proc."""

    def __init__(self, module: pathlib.Path, attack: Attack, folder: pathlib.Path) -> None:
        options = dict(attack.options)
        if attack.tls:
            options.update(tls_cert=str(folder / "cert.pem"), tls_key=str(folder / "key.pem"))
        settings = {"module": str(module), "docroot": str(folder / "docroot"), "options": options,
                    "application": attack.application, "files": attack.files}
        # Where nobody reads the log, it is the command line's; in a program the log's handlers are the program's own.
        program = ([str(module), "--port", "0", "--docroot", settings["docroot"]] if attack.log_pipe else
                   [__file__, "--serve", json.dumps(settings)])
        self.log_file = folder / "log"
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if attack.log_pipe else log)
        ready = select.select([self.process.stdout], [], [], PATIENCE)[0]
        opening = re.search(rb"(https?)://127\.0\.0\.1:(\d+)/", self.process.stdout.readline() if ready else b"")
        if opening is None:
            self.stop()
            sys.exit(f"attack.py: the server does not start\n{self.log_file.read_text()}")
        self.place = Place(int(opening[2]), opening[1] == b"https")
        self.threads = 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def status(self, field: str) -> int:
        """Threads, or VmRSS or VmHWM (the most so far) in KiB; 0 of a process that has ended."""
        try:
            text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(rf"{field}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    def forget_peak(self) -> int:
        """Begin VmHWM anew. Returns the resident memory now, in KiB."""
        with contextlib.suppress(OSError):      # not every container allows it; then the peak of the start counts too
            pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.status("VmRSS")

    def cpu_seconds(self) -> float:
        try:
            fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def starved_seconds(self) -> float:
        """The time that its threads have waited for a core; 0 where the kernel does not count it."""
        nanoseconds = 0
        for file in pathlib.Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, IndexError):
                nanoseconds += int(file.read_text().split()[1])
        return nanoseconds / 1e9

    def watch_threads(self) -> None:
        self.threads = max(self.threads, self.status("Threads"))


# -- §2  Connections --------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Place:
    """Where the server listens."""

    port: int
    is_secure: bool = False


class Answer:
    """An HTTP answer."""

    def __init__(self, head: bytes, body: bytes) -> None:
        status = STATUS.match(head)
        if status is None:
            raise ConnectionError(f"{head[:50]!r} is no answer")
        self.status = int(status[1])
        self.head = head
        self.body = body

    def messages(self) -> list[dict]:
        """The replies and events in it; OSError if there are none, so that callers know one kind of failure."""
        try:
            batch = json.loads(self.body)
        except ValueError:
            raise ConnectionError(f"{self.status} without a batch") from None
        if not isinstance(batch, list) or self.status != 200:
            raise ConnectionError(f"{self.status} {self.body[:100]!r}")
        return batch


def encode(messages: Any) -> bytes:
    return json.dumps(messages, separators=(",", ":")).encode()


def post(body: bytes, headers: str = "") -> bytes:
    """The text of a request that carries a batch."""
    return (f"POST /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode("latin-1")


def frame(payload: bytes, opcode: int = 1, is_last: bool = True) -> bytes:
    """A client's WebSocket frame. Its mask is zero, which leaves the bytes as they are."""
    first, size = opcode | (0x80 if is_last else 0), len(payload)
    if size < 126:
        return struct.pack("!BBI", first, 0x80 | size, 0) + payload
    if size < 65536:
        return struct.pack("!BBHI", first, 0xFE, size, 0) + payload
    return struct.pack("!BBQI", first, 0xFF, size, 0) + payload


class Connection:
    """A socket from an address of ours, on which each wait ends after its patience."""

    def __init__(self, place: Place, address: str, patience: float = 5.0, receive_buffer: int = 0) -> None:
        self.input = b""
        self.socket = socket.socket()
        self.socket.settimeout(patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.socket.bind((address, 0))
            self.socket.connect(("127.0.0.1", place.port))
            if place.is_secure:
                self.socket = client_context().wrap_socket(self.socket)
        except OSError:
            self.socket.close()
            raise

    def close(self) -> None:
        self.socket.close()

    def fill(self) -> None:
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server hung up")
        self.input += data

    def answer(self) -> Answer:
        """The next answer; all of ours have a Content-Length, or no body."""
        while b"\r\n\r\n" not in self.input:
            self.fill()
        head, _, self.input = self.input.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        size = int(length[1]) if length else 0
        while len(self.input) < size:
            self.fill()
        body, self.input = self.input[:size], self.input[size:]
        return Answer(head, body)

    def request(self, text: bytes) -> Answer:
        self.socket.sendall(text)
        return self.answer()

    def post(self, *messages: dict) -> list[dict]:
        return self.request(post(encode(messages))).messages()

    def session(self, **extra: Any) -> str:
        """Shake hands, and connect for the first time. Returns the clientId."""
        client_id = self.post(HANDSHAKE | extra)[0].get("clientId")
        if client_id is None:
            raise ConnectionError("the handshake is refused")
        self.post(connect(client_id))
        return client_id

    def upgrade(self) -> None:
        """Make a WebSocket of it."""
        answer = self.request(get("/cometd", UPGRADE))
        if answer.status != 101:
            raise ConnectionError(f"the upgrade is refused with {answer.status}")

    def send_frame(self, *messages: dict) -> None:
        self.socket.sendall(frame(encode(messages)))

    def receive_frame(self) -> list[dict]:
        """The messages of the next frame; none if it is no text."""
        while len(self.input) < 10:
            if len(self.input) >= 2 and len(self.input) >= 2 + (self.input[1] & 127):
                break
            self.fill()
        size, start = self.input[1] & 127, 2
        if size == 126:
            size, start = struct.unpack_from("!H", self.input, 2)[0], 4
        elif size == 127:
            size, start = struct.unpack_from("!Q", self.input, 2)[0], 10
        while len(self.input) < start + size:
            self.fill()
        opcode, payload = self.input[0] & 15, self.input[start:start + size]
        self.input = self.input[start + size:]
        return json.loads(payload) if opcode == 1 else []


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


UPGRADE = ("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
           f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n")
HANDSHAKE = {"channel": "/meta/handshake", "version": "1.0", "supportedConnectionTypes": ["long-polling", "websocket"]}


def connect(client_id: str, **extra: Any) -> dict:
    return {"channel": "/meta/connect", "clientId": client_id, "connectionType": "long-polling"} | extra


def subscribe(client_id: str, channel: str | list[str]) -> dict:
    return {"channel": "/meta/subscribe", "clientId": client_id, "subscription": channel}


def publish(client_id: str, channel: str, data: Any) -> dict:
    return {"channel": channel, "clientId": client_id, "data": data}


class Lane:
    """One connection of a flood, and the bytes that it has still to send."""

    def __init__(self, text: bytes, open_one: Callable[[], Connection]) -> None:
        self.text = self.left = memoryview(text)
        self.open_one = open_one
        self.connection: Connection | None = None


class Flood:
    """Many connections that send at once, as fast as the server takes it.

    Arguments:
        texts: the bytes that each connection sends.
        open_one: makes a connection.
        is_endless: a connection that has sent all begins again, without waiting for an answer.
        reads: answers are read and counted; else they pile up.
        returns: a connection that the server closes is opened anew.
    """

    def __init__(self, texts: Iterable[bytes], open_one: Callable[[], Connection], is_endless: bool = True,
                 reads: bool = True, returns: bool = True) -> None:
        self.is_endless, self.reads, self.returns = is_endless, reads, returns
        self.lanes = [Lane(text, open_one) for text in texts]
        self.selector = selectors.DefaultSelector()
        self.seen: collections.Counter[str] = collections.Counter()
        self.taken = 0                  # bytes

    def run(self, until: float) -> str:
        """Flood until then. Returns the column "attacker gets"."""
        for lane in self.lanes:
            if time.monotonic() < until:
                self.open(lane)
        while time.monotonic() < until and self.selector.get_map():
            for key, events in self.selector.select(0.05):
                self.step(key.data, events)
        return self.gets()

    def gets(self) -> str:
        counts = [f"{what} x {count:,}" for what, count in self.seen.most_common(4)]
        taken = [f"{self.taken / MIB:,.0f} MiB taken"] if self.taken >= MIB else []
        return ", ".join(counts) or "; ".join(["no answer"] * self.reads + taken)

    def open(self, lane: Lane) -> None:
        try:
            lane.connection = lane.open_one()
        except (OSError, ValueError) as error:
            self.seen[f"refused ({error})" if isinstance(error, ConnectionError) else "no connection"] += 1
            return
        lane.left = lane.text
        lane.connection.socket.setblocking(False)
        self.selector.register(lane.connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE
                               if self.reads else selectors.EVENT_WRITE, lane)

    def step(self, lane: Lane, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self.read(lane)
            if events & selectors.EVENT_WRITE:
                self.write(lane)
        except BlockingIOError:
            pass
        except OSError:
            self.lost(lane)

    def write(self, lane: Lane) -> None:
        sent = lane.connection.socket.send(lane.left[:1 << 18])
        lane.left = lane.left[sent:]
        self.taken += sent
        if lane.left:
            return
        if self.is_endless:
            lane.left = lane.text
        elif self.reads:
            self.selector.modify(lane.connection.socket, selectors.EVENT_READ, lane)
        else:
            self.selector.unregister(lane.connection.socket)

    def read(self, lane: Lane) -> None:
        data = lane.connection.socket.recv(1 << 18)
        if not data:
            raise ConnectionError
        self.seen.update(status.decode() for status in STATUS.findall(data))

    def lost(self, lane: Lane) -> None:
        self.seen["closed"] += 1
        self.selector.unregister(lane.connection.socket)
        lane.connection.close()
        if self.returns:
            self.open(lane)


# -- §3  The bystander ------------------------------------------------------------------------------------------------

class Bystander:
    """A well-behaved client. It knows how long each of its pings took, and which of its events came back.

    An event whose publish was answered must come once. One whose answer was lost may come or not.
    """

    def __init__(self, place: Place, address: str) -> None:
        self.place, self.address = place, address
        self.pings: list[tuple[float, float]] = []      # when each was due, and how long its answer took
        self.due = time.monotonic()                     # of the ping under way
        self.published: list[int] = []
        self.received: collections.Counter[int] = collections.Counter()
        self.ended: str | None = None
        self.is_over = threading.Event()
        self.channel = "/bystander/" + address.replace(".", "-")
        connection = Connection(place, address)
        self.client_id = connection.session()
        connection.post(subscribe(self.client_id, self.channel))
        connection.close()

    def open(self) -> Connection:
        return Connection(self.place, self.address, PATIENCE)

    def note_end(self, reply: dict) -> None:
        if not reply.get("successful") and str(reply.get("error", "")).startswith("402"):
            self.ended = str(reply["error"])

    def listen(self) -> None:
        """Hold a connect, again and again, until all is over and nothing is missing."""
        connection, deadline = None, 0.0
        while self.ended is None and (not deadline or (self.missing() and time.monotonic() < deadline)):
            if self.is_over.is_set() and not deadline:
                deadline = time.monotonic() + SETTLING
            try:
                connection = connection or self.open()
                replies = connection.post(connect(self.client_id, advice={"timeout": 400}))
            except OSError:
                connection = None
                time.sleep(0.2)
                continue
            for message in replies:
                if message["channel"] == self.channel:
                    self.received[message["data"]] += 1
                elif message["channel"] == "/meta/connect":
                    self.note_end(message)
                    time.sleep(min(1000, message.get("advice", {}).get("interval", 0)) / 1000)

    def missing(self) -> int:
        return sum(not self.received[number] for number in self.published)

    def keep_pinging(self) -> None:
        connection, count = None, 0
        while not self.is_over.is_set():
            count += 1
            due = self.due = time.monotonic()
            connection = self.ping(connection)
            self.pings.append((due, time.monotonic() - due))
            if count % PUBLISH_EVERY == 0 and self.ended is None:
                connection = self.publish(connection, count)
            time.sleep(max(0.0, due + PING_EVERY - time.monotonic()))

    def ping(self, connection: Connection | None) -> Connection | None:
        """Ping until there is an answer, or all is over."""
        while True:
            try:
                connection = connection or self.open()
                if connection.post({"channel": "/meta/ping", "id": 1, "clientId": self.client_id}):
                    return connection
            except OSError:
                connection = None
                if self.is_over.is_set():
                    return None
                time.sleep(0.01)

    def publish(self, connection: Connection | None, number: int) -> Connection | None:
        try:
            connection = connection or self.open()
            reply = connection.post(publish(self.client_id, self.channel, number))[0]
        except OSError:
            return None
        self.note_end(reply)
        if reply.get("successful"):
            self.published.append(number)
        return connection


@dataclasses.dataclass
class Account:
    """The figures of a bystander at the end."""

    pings: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    ended: str | None = None
    published: int = 0


def stand_by(place: Place, address: str, pipe: Any) -> None:
    """The bystander's process: say that it is ready, stand by until told to stop, give account."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        bystander = Bystander(place, address)
    except OSError as error:
        return pipe.send(Account(ended=f"never began ({error})"))
    listening = threading.Thread(target=bystander.listen, daemon=True)
    listening.start()
    pinging = threading.Thread(target=bystander.keep_pinging, daemon=True)
    pinging.start()
    pipe.send(None)
    main_program = os.getppid()
    while not pipe.poll(1.0):
        if os.getppid() != main_program:        # it was killed
            os._exit(1)
    bystander.is_over.set()
    pinging.join(PATIENCE + 1)
    if pinging.is_alive():
        bystander.pings.append((bystander.due, time.monotonic() - bystander.due))
    listening.join(SETTLING + 2)
    pipe.send(Account(bystander.pings, 0 if bystander.ended else bystander.missing(),
                      sum(count > 1 for count in bystander.received.values()), bystander.ended,
                      len(bystander.published)))


# -- §4  The attacker -------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Outcome:
    """The column "attacker gets", and the faults that the attack found by itself."""

    gets: str
    faults: list[str] = dataclasses.field(default_factory=list)


class Attacker:
    """The means of every attack. Its time begins with begin(), when its preparations are made."""

    def __init__(self, place: Place, seconds: float, is_quick: bool, log_file: pathlib.Path, seed: int) -> None:
        self.place, self.seconds, self.is_quick, self.log_file = place, seconds, is_quick, log_file
        self.random = random.Random(seed)
        self.crowd_addresses = 0

    def begin(self, share: float = 1.0) -> float:
        """The time at which the attack is to end."""
        return time.monotonic() + self.seconds * share

    def open(self, address: str = ATTACKER, **settings: Any) -> Connection:
        return Connection(self.place, address, **settings)

    def open_unread(self) -> Connection:
        return self.open(receive_buffer=4096)

    def open_websocket(self, address: str = ATTACKER) -> Connection:
        connection = self.open(address)
        connection.upgrade()
        return connection

    def crowd_address(self) -> str:
        self.crowd_addresses += 1
        return f"127.1.{self.crowd_addresses // 250}.{self.crowd_addresses % 250 + 1}"

    def crowd(self, count: int, channels: list[str]) -> list[str]:
        """Sessions of other people, subscribed to channels. They do not connect."""
        client_ids: list[str] = []
        while len(client_ids) < count:
            connection, here = self.open(self.crowd_address()), min(CROWD_EACH, count - len(client_ids))
            connection.socket.sendall(post(encode([HANDSHAKE])) * here)
            ids = [connection.answer().messages()[0]["clientId"] for _ in range(here)]
            connection.post(*[subscribe(client_id, channels) for client_id in ids])
            connection.close()
            client_ids += ids
        return client_ids

    def alive(self, client_ids: list[str]) -> int:
        """How many of the sessions have not been ended."""
        connection, count = self.open(NEWCOMER), 0
        for first in range(0, len(client_ids), 500):
            replies = connection.post(*[subscribe(each, "/alive") for each in client_ids[first:first + 500]])
            count += sum(reply["successful"] for reply in replies)
        return count

    def fate(self, client_id: str) -> str:
        try:
            return "its session lives on" if self.alive([client_id]) else "its session is ended"
        except OSError:
            return "no answer"

    def newcomer_fault(self) -> list[str]:
        """Whether somebody else gets in at this moment."""
        try:
            self.open(NEWCOMER, patience=3.0).session()
        except (OSError, KeyError) as error:
            return [f"a newcomer is kept out ({error})"]
        return []


class Readers:
    """Subscribers that keep up: a WebSocket each, from addresses of the crowd, read as fast as it can be."""

    def __init__(self, attacker: Attacker, count: int, channel: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.client_ids: list[str] = []
        self.received = self.closed = 0
        for _ in range(count):
            connection = attacker.open_websocket(attacker.crowd_address())
            connection.send_frame(HANDSHAKE)
            client_id = connection.receive_frame()[0]["clientId"]
            connection.send_frame(subscribe(client_id, channel), connect(client_id, connectionType="websocket"))
            connection.receive_frame()
            connection.send_frame(connect(client_id, connectionType="websocket"))
            self.client_ids.append(client_id)
            self.selector.register(connection.socket, selectors.EVENT_READ)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while True:
            for key, _ in self.selector.select(0.1):
                with contextlib.suppress(OSError):
                    data = key.fileobj.recv(1 << 18)
                    self.received += data.count(b'"data"')
                    if data:
                        continue
                self.closed += 1
                self.selector.unregister(key.fileobj)


@dataclasses.dataclass
class Attack:
    """An attack, and the server that it needs."""

    name: str
    group: str
    carry_out: Callable[[Attacker], Outcome | str]
    options: dict[str, Any]         # of the server
    application: list[str]          # faults that the application has from the start
    files: int                      # descriptors that the server may have; 0: as many as it gets
    log_pipe: bool                  # stderr is a pipe that nobody reads
    tls: bool

    @property
    def text(self) -> str:
        return " ".join(inspect.getdoc(self.carry_out).split())


ATTACKS: dict[str, Attack] = {}


def attack(group: str, options: dict[str, Any] | None = None, application: Iterable[str] = (), files: int = 0,
           log_pipe: bool = False, tls: bool = False) -> Callable:
    """Decorator: the function is an attack; its docstring describes it."""
    def register(function: Callable) -> Callable:
        name = function.__name__.replace("_", "-")
        ATTACKS[name] = Attack(name, group, function, options or {}, list(application), files, log_pipe, tls)
        return function
    return register


# -- §5  Attacks on the turns of others: much work in few bytes -------------------------------------------------------

@attack("turns")
def one_post_of_publishes(attacker: Attacker) -> Outcome:
    """10,001 publishes in one POST, again and again, to a channel with 200 subscribers that keep up."""
    readers = Readers(attacker, 50 if attacker.is_quick else 200, "/crowd")
    publisher = attacker.open().session()
    body = encode([publish(publisher, "/crowd", 0)] * 10_001)
    gets = Flood([post(body)], attacker.open).run(attacker.begin())
    return crowd_outcome(attacker, readers, gets)


def crowd_outcome(attacker: Attacker, readers: Readers, gets: str) -> Outcome:
    """No subscriber that keeps up may be ended. Events under way arrive first."""
    quiet = -1
    while readers.received != quiet:
        quiet = readers.received
        time.sleep(0.3)
    ended = len(readers.client_ids) - attacker.alive(readers.client_ids)
    faults = [f"{ended} of {len(readers.client_ids)} subscribers are ended"] if ended else []
    return Outcome(f"{gets}; {readers.received:,} deliveries", faults)


@attack("turns")
def zeros(attacker: Attacker) -> str:
    """[0,0,0,...] of 1 MiB, which is half a million messages."""
    return Flood([post(b"[" + b"0," * (MIB // 2 - 2) + b"0]")] * 2, attacker.open).run(attacker.begin())


@attack("turns")
def empty_messages(attacker: Attacker) -> str:
    """[{},{},{},...] of 1 MiB."""
    return Flood([post(b"[" + b"{}," * (MIB // 3 - 2) + b"{}]")] * 2, attacker.open).run(attacker.begin())


@attack("turns")
def brackets(attacker: Attacker) -> str:
    """1 MiB of brackets, nested or side by side, on 30 connections at once."""
    nested = b"[" * (MIB - 10)
    side_by_side = b"[{\"channel\":\"/a\",\"data\":[" + b"[]," * (MIB // 3 - 20) + b"[]]}]"
    towers = b"[" + (b"[" * 90 + b"]" * 90 + b",") * (MIB // 181 - 2) + b"0]"
    return Flood([post(nested), post(side_by_side), post(towers)] * 10, attacker.open).run(attacker.begin())


@attack("turns")
def alternating_channels(attacker: Attacker) -> str:
    """4,000 publishes in batches of 1,000, on two channels by turns, to 5,000 sessions subscribed to both."""
    attacker.crowd(1000 if attacker.is_quick else 5000, ["/left", "/right"])
    publisher = attacker.open().session()
    batch = encode([publish(publisher, ("/left", "/right")[number % 2], number) for number in range(BATCH)])
    return Flood([post(batch) * 4], attacker.open, is_endless=False).run(attacker.begin())


@attack("turns")
def valid_batches(attacker: Attacker) -> str:
    """Batches of 1,000 valid publishes on 20 connections, without end."""
    publisher = attacker.open().session()
    batch = post(encode([publish(publisher, "/nobody", 0)] * BATCH))
    return Flood([batch] * 20, attacker.open).run(attacker.begin())


@attack("turns")
def sessions_on_one_socket(attacker: Attacker) -> str:
    """1,000 sessions on one WebSocket that is not read, and publishes to all of them."""
    connection = Connection(attacker.place, ATTACKER, receive_buffer=4096)
    connection.upgrade()
    ids: list[str] = []
    with contextlib.suppress(OSError, KeyError):
        for _ in range(200 if attacker.is_quick else 1000):
            connection.send_frame(HANDSHAKE)
            ids.append(connection.receive_frame()[0]["clientId"])
            connection.send_frame(subscribe(ids[-1], "/all"), connect(ids[-1], connectionType="websocket"))
            connection.receive_frame()
            connection.send_frame(connect(ids[-1], connectionType="websocket"))
    publisher = attacker.open().session()
    text = post(encode([publish(publisher, "/all", "x" * 500)] * 100))
    return f"{len(ids)} sessions; " + Flood([text] * 2, attacker.open).run(attacker.begin())


@attack("turns")
def tiny_frames(attacker: Attacker) -> str:
    """Nine WebSockets send pings, [] and [{}] in frames of a few bytes, as fast as they can."""
    texts = [frame(b"", 9) * 20_000, frame(b"[]") * 20_000, frame(b"[{}]") * 20_000]
    return Flood(texts * 3, attacker.open_websocket).run(attacker.begin())


@attack("turns")
def pipelined_requests(attacker: Attacker) -> str:
    """Thousands of small requests on each of eight connections, whose answers are not read."""
    text = (post(encode([{"channel": "/meta/ping"}])) + get("/index.html")) * 1000
    return Flood([text] * 8, attacker.open_unread, reads=False).run(attacker.begin())


@attack("turns", tls=True)
def tls_handshakes(attacker: Attacker) -> str:
    """300 TLS handshakes begun and left, then handshakes without end on four threads."""
    plain = dataclasses.replace(attacker.place, is_secure=False)
    begun = [Connection(plain, ATTACKER) for _ in range(300)]
    for connection in begun:
        connection.socket.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    until, done = attacker.begin(), []

    def shake() -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                attacker.open().close()
                done.append(1)

    threads = [threading.Thread(target=shake) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{len(done):,} handshakes"


# -- §6  Attacks on memory --------------------------------------------------------------------------------------------

def large_events(client_id: str, channel: str, count: int = 15) -> bytes:
    """A request that publishes some of the largest events."""
    return post(encode([publish(client_id, channel, DATA)] * count))


@attack("memory")
def never_connecting(attacker: Attacker) -> str:
    """A session that subscribes and never connects, while events of 64 KiB are published."""
    client_id = attacker.open().session()
    attacker.open().post(subscribe(client_id, "/large"))
    gets = Flood([large_events(client_id, "/large")] * 4, attacker.open).run(attacker.begin())
    return f"{gets}; {attacker.fate(client_id)}"


@attack("memory")
def unread_acknowledged_answers(attacker: Attacker) -> str:
    """Six connects with ack 0, on sockets that are not read, each for the same 1,200 events of 64 KiB."""
    connection = attacker.open()
    client_id = connection.session(ext={"ack": True})
    connection.post(subscribe(client_id, "/large"))
    text = large_events(client_id, "/large", 10)
    until = attacker.begin(0.7)
    for _ in range(120):
        if time.monotonic() < until:
            connection.request(text)
    held = []
    for _ in range(6):
        held.append(attacker.open_unread())
        held[-1].socket.sendall(post(encode([connect(client_id, ext={"ack": 0})])))
        time.sleep(0.1)
    time.sleep(attacker.seconds * 0.3)
    return attacker.fate(client_id)


@attack("memory")
def unfinished_bodies(attacker: Attacker) -> str:
    """300 bodies of 1 MiB whose last byte does not come."""
    text = post(b"0" * MIB)[:-1]
    return Flood([text] * 300, attacker.open, is_endless=False, returns=False).run(attacker.begin())


@attack("memory")
def two_byte_fragments(attacker: Attacker) -> str:
    """Messages of 1 MiB in WebSocket fragments of two bytes, on 20 sockets."""
    text = frame(b"[ ", 1, is_last=False) + frame(b"  ", 0, is_last=False) * (MIB // 2)
    return Flood([text] * 20, attacker.open_websocket, is_endless=False, returns=False).run(attacker.begin())


@attack("memory")
def one_byte_chunks(attacker: Attacker) -> str:
    """Bodies in chunks of one byte that do not end, on 50 connections."""
    head = b"POST /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    text = head + b"1\r\n0\r\n" * (MIB // 2)
    return Flood([text] * 50, attacker.open, is_endless=False, returns=False).run(attacker.begin())


@attack("memory")
def one_byte_writes(attacker: Attacker) -> str:
    """50 bodies that come a byte at a time."""
    connections = [attacker.open() for _ in range(50)]
    for connection in connections:
        connection.socket.sendall(post(b"0" * MIB)[:-MIB])
    until, sent, closed = attacker.begin(), 0, 0
    while time.monotonic() < until and connections:
        for connection in connections[:]:
            try:
                sent += connection.socket.send(b"0")
            except OSError:
                closed += 1
                connections.remove(connection)
    return f"{sent:,} writes, closed x {closed}"


@attack("memory", application=["listener"])
def slow_listener(attacker: Attacker) -> str:
    """Publishes without end, where a listener of the application takes 50 ms for each."""
    client_id = attacker.open().session()
    text = post(encode([publish(client_id, "/any", "x" * 4000)] * 200))
    return Flood([text] * 4, attacker.open).run(attacker.begin())


@attack("memory")
def long_subscriptions(attacker: Attacker) -> str:
    """Sessions without end, with 1,000 subscriptions of 255 characters each."""
    connection, sessions, until = attacker.open(), 0, attacker.begin()
    body = encode([subscribe("@ID", [f"/@NUMBER{part}-{name:03}".ljust(256, "x") for name in range(200)])
                   for part in range(5)])
    while time.monotonic() < until:
        try:
            client_id = connection.post(HANDSHAKE)[0]["clientId"]
            connection.request(post(body.replace(b"@ID", client_id.encode()).replace(b"@NUMBER", b"%06d" % sessions)))
        except (OSError, KeyError) as error:
            return f"{sessions:,} sessions, then {error}"
        sessions += 1
    return f"{sessions:,} sessions"


@attack("memory")
def unread_answers(attacker: Attacker) -> str:
    """Answers of 1 MiB of the service echo, and a file of 20 MB, asked for on 300 connections that are not read."""
    client_id = attacker.open().session()
    echoes = post(encode([publish(client_id, "/service/echo", DATA)] * 15))
    return Flood([echoes, echoes, get("/large.bin")] * 100, attacker.open_unread, reads=False).run(attacker.begin())


@attack("memory")
def heads(attacker: Attacker) -> str:
    """1,000 heads of 16 KiB that do not end."""
    text = get("/", "X-Filling: " + "x" * 16_200)[:-4]
    return Flood([text] * 1000, attacker.open, is_endless=False, returns=False).run(attacker.begin())


# -- §7  Attacks on the limit of waiting events -----------------------------------------------------------------------

@attack("max_queue", options={"max_queue": 500})
def large_parcels(attacker: Attacker) -> Outcome:
    """Batches of 1,000 publishes, where 500 events may wait for a session, to 50 subscribers that keep up."""
    readers = Readers(attacker, 50, "/crowd")
    publisher, until, count = attacker.open(), attacker.begin(), 0
    batch = post(encode([publish(publisher.session(), "/crowd", 0)] * BATCH))
    while time.monotonic() < until:
        publisher.request(batch)
        count += 1
        while readers.received < 50 * BATCH * count and time.monotonic() < until:
            time.sleep(0.01)            # they keep up: each batch waits until the last one has come
    return crowd_outcome(attacker, readers, f"200 x {count}")


@attack("max_queue")
def bot(attacker: Attacker) -> Outcome:
    """A flood on /chat/demo and /magnets/demo, which the demo's bot listens to, and one POST of 10,001 moves."""
    connection = attacker.open()
    client_id = connection.session()
    chat = encode([publish(client_id, "/chat/demo", {"user": "x", "chat": "y" * 100})] * BATCH)
    move = encode([publish(client_id, "/magnets/demo", {"magnet": 1, "x": 0, "y": 0})] * BATCH)
    moves = encode([publish(client_id, "/magnets/demo", 0)] * 10_001)
    gets = Flood([post(chat), post(move), post(moves)], attacker.open).run(attacker.begin())
    time.sleep(0.5)
    question = {"user": "newcomer", "chat": f"are you there, {attacker.random.random()}?"}
    is_there = answered(attacker, "/chat/demo", "/chat/demo", question)
    return Outcome(gets, [] if is_there else ["the bot is silent"])


def answered(attacker: Attacker, channel: str, answer_channel: str, question: Any) -> bool:
    """Whether a local client, which says "I heard ...", hears the question within 5 s."""
    connection, until = attacker.open(NEWCOMER), time.monotonic() + 5.0
    client_id = connection.session()
    connection.post(subscribe(client_id, answer_channel))
    text = question["chat"] if isinstance(question, dict) else question
    while time.monotonic() < until:
        connection.post(publish(client_id, channel, question))
        for event in connection.post(connect(client_id, advice={"timeout": 500})):
            if re.search(f"I heard .*{re.escape(text)}", json.dumps(event.get("data"))):
                return True
        time.sleep(0.1)
    return False


# -- §8  Attacks that need a fault of the application -----------------------------------------------------------------

def calls(attacker: Attacker, services: list[str], count: int) -> str:
    """Each service is called so many times, on a connection for each, by ten clients at an address."""
    texts = []
    for service in services:
        client_id = attacker.open().session()
        texts += [post(encode([publish(client_id, "/service/" + service, 0)]))] * count
    addresses = [attacker.crowd_address() for _ in range(len(texts) // 10 + 1)]
    numbers = iter(range(len(texts)))
    flood = Flood(texts, lambda: attacker.open(addresses[next(numbers) // 10]), is_endless=False, returns=False)
    return flood.run(attacker.begin())


@attack("application")
def cancelled_services(attacker: Attacker) -> str:
    """70 calls of a service that raises asyncio.CancelledError, ten from an address."""
    return calls(attacker, ["CancelledError"], 70)


@attack("application")
def exiting_services(attacker: Attacker) -> str:
    """70 calls each of services that raise SystemExit, KeyboardInterrupt and GeneratorExit, ten from an address."""
    return calls(attacker, ["SystemExit", "KeyboardInterrupt", "GeneratorExit"], 70)


@attack("application")
def cancelled_callback(attacker: Attacker) -> Outcome:
    """An event on which a callback of the application raises asyncio.CancelledError, 70 times."""
    connection = attacker.open()
    client_id = connection.session()
    for _ in range(70):
        connection.post(publish(client_id, "/helper/question", "cancel"))
    is_there = answered(attacker, "/helper/question", "/helper/answer", "hello")
    return Outcome("200 x 70", [] if is_there else ["the callback is never called again"])


@attack("application")
def exiting_bodies(attacker: Attacker) -> str:
    """70 pages whose body raises SystemExit when it is read."""
    return Flood([get("/exits")] * 70, attacker.open, is_endless=False, returns=False).run(attacker.begin())


@attack("application")
def blocking_bodies(attacker: Attacker) -> str:
    """70 pages whose body blocks when it is read."""
    return Flood([get("/blocks")] * 70, attacker.open, is_endless=False, returns=False).run(attacker.begin())


@attack("application")
def slow_pages_64(attacker: Attacker) -> str:
    """64 GETs at once of a page that takes 5 s."""
    return Flood([get("/slow")] * 64, attacker.open, is_endless=False).run(attacker.begin())


@attack("application")
def slow_pages_200(attacker: Attacker) -> str:
    """200 GETs at once of a page that takes 5 s."""
    return Flood([get("/slow")] * 200, attacker.open, is_endless=False).run(attacker.begin())


@attack("application")
def slow_services(attacker: Attacker) -> str:
    """200 calls at once of a service that takes 5 s."""
    client_id = attacker.open().session()
    text = post(encode([publish(client_id, "/service/slow", 0)]))
    return Flood([text] * 200, attacker.open, is_endless=False).run(attacker.begin())


@attack("application", application=["acl"])
def hanging_rule(attacker: Attacker) -> str:
    """200 publishes at once for which the application's message_acl takes 5 s."""
    client_id = attacker.open().session()
    text = post(encode([publish(client_id, "/hang", 0)]))
    return Flood([text] * 200, attacker.open, is_endless=False).run(attacker.begin())


# -- §9  Attacks on limits by address ---------------------------------------------------------------------------------

@attack("addresses", files=2048)
def silent_connections(attacker: Attacker) -> Outcome:
    """3,000 connections that say nothing, to a server that may have 2,048 descriptors."""
    connections, closed = [], 0
    with contextlib.suppress(OSError):
        for _ in range(3000):
            connections.append(attacker.open(patience=1.0))
    time.sleep(0.5)
    faults = attacker.newcomer_fault()
    for connection in connections:
        connection.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            try:
                closed += not connection.socket.recv(1)
            except ConnectionError:
                closed += 1
    return Outcome(f"{len(connections):,} connections, closed x {closed:,}", faults)


@attack("addresses", options={"max_sessions": 1000})
def handshakes(attacker: Attacker) -> Outcome:
    """Handshakes without end, where the server has room for 1,000 sessions."""
    gets = Flood([post(encode([HANDSHAKE])) * 50] * 4, attacker.open).run(attacker.begin())
    return Outcome(gets, attacker.newcomer_fault())


@attack("addresses")
def full_office(attacker: Attacker) -> Outcome:
    """Eleven people at one address, each of whom holds a connect, publishes and disconnects."""
    first, refused = attacker.open(), collections.Counter()
    client_ids = [first.session() for _ in range(11)]
    held = [attacker.open() for _ in client_ids]
    for connection, client_id in zip(held, client_ids):
        connection.socket.sendall(post(encode([connect(client_id)])))
    time.sleep(0.3)
    for client_id in client_ids:
        for message in (publish(client_id, "/office", 0), {"channel": "/meta/disconnect", "clientId": client_id}):
            try:
                is_taken = first.post(message)[0].get("successful")
            except OSError:
                first, is_taken = attacker.open(), False
            refused[message["channel"]] += not is_taken
    faults = [f"{count} of 11 {'publishes' if channel == '/office' else 'disconnects'} are refused"
              for channel, count in refused.items() if count]
    return Outcome("200, as everybody" if not faults else "refusals", faults)


# -- §10  Attacks on connections, by browsers, and on the log ---------------------------------------------------------

@attack("connections", options={"request_timeout": 2.0, "client_max_connections": 0})
def trickling_websockets(attacker: Attacker) -> Outcome:
    """30 WebSockets that take in nothing, and send a byte now and then, where answers may take 2 s."""
    lanes = []
    for _ in range(30):
        connection = attacker.open_unread()
        connection.upgrade()
        connection.send_frame(HANDSHAKE)
        client_id = connection.receive_frame()[0]["clientId"]
        connection.send_frame(subscribe(client_id, "/large"), connect(client_id, connectionType="websocket"))
        connection.socket.sendall(struct.pack("!BBQI", 0x81, 0xFF, 60_000, 0))
        lanes.append(connection)
    publisher = attacker.open()
    text, open_ones = large_events(publisher.session(), "/large"), set(lanes)
    until = time.monotonic() + 6.0
    for publishes in [True] * 8 + [False] * 20:
        if publishes:                   # the bytes below come while the server is sending these events
            publisher.socket.sendall(text)
        for connection in list(open_ones):
            try:
                connection.socket.send(b" ")
            except OSError:
                open_ones.discard(connection)
        if publishes:
            publisher.answer()
        elif open_ones and time.monotonic() < until:
            time.sleep(0.25)
    return Outcome(f"cut x {30 - len(open_ones)}", [f"{len(open_ones)} of 30 are never cut"] if open_ones else [])


@attack("connections")
def line_behind_a_body(attacker: Attacker) -> Outcome:
    """An empty line behind the body of a /meta/connect, as browsers of 1996 sent it."""
    client_id = attacker.open().session()
    connection = attacker.open(patience=1.0)
    try:
        connection.request(post(encode([connect(client_id)])) + b"\r\n")
    except TimeoutError:
        return Outcome("the connect is held")
    return Outcome("an answer", ["the held connect is released"])


@attack("connections")
def unknown_event_stream(attacker: Attacker) -> Outcome:
    """An event stream for a session that does not exist; a browser gives up unless the status is 200."""
    status = attacker.open().request(get("/cometd/0123456789abcdef", "Accept: text/event-stream\r\n")).status
    return Outcome(str(status), ["the browser comes again for ever"] if status == 200 else [])


@attack("browsers")
def script_of_unknown_origin(attacker: Attacker) -> Outcome:
    """JSONP without Origin, Referer and Sec-Fetch-Site, which any page can send to a plain HTTP host."""
    path = "/cometd?jsonp=steal&message=" + urllib.parse.quote(encode([HANDSHAKE]))
    status = attacker.open().request(get(path)).status
    own = attacker.open().request(get(path, "Sec-Fetch-Site: same-origin\r\n")).status
    faults = ["a foreign page can read events"] if status == 200 else []
    return Outcome(f"{status}; an own page {own}", faults + (["an own page is refused"] if own != 200 else []))


@attack("browsers")
def rebound_name(attacker: Attacker) -> Outcome:
    """A page of evil.example, whose name its owner has pointed at 127.0.0.1."""
    requests = {"batch": post(encode([HANDSHAKE])), "file": get("/index.html"), "page": get("/page"),
                "WebSocket": get("/cometd", UPGRADE)}
    statuses = {name: attacker.open().request(text.replace(b"Host: 127.0.0.1", b"Host: evil.example")).status
                for name, text in requests.items()}
    own = attacker.open().request(requests["batch"].replace(b"Host: 127.0.0.1", b"Host: localhost:80")).status
    faults = [f"{name} is answered {status}" for name, status in statuses.items() if status != 421]
    return Outcome(f"{', '.join(map(str, statuses.values()))}; localhost {own}",
                   faults + (["localhost is refused"] if own != 200 else []))


@attack("log")
def controls_in_the_log(attacker: Attacker) -> Outcome:
    """Escape sequences, C1 controls and line ends in targets, headers, channels, ids and reasons."""
    evil = "\x1b]0;evil\x07 \x85FORGED \x9b31m \x7f \r\nFORGED \u2028FORGED"
    ids, connection = attacker.open().session(), attacker.open()
    batches = [[HANDSHAKE | {"channel": evil}], [connect(evil)], [subscribe(ids, evil)], [subscribe(evil, "/a")],
               [publish(ids, "/service/" + evil, evil)], [publish(ids, "/a" + evil, 0)],
               [HANDSHAKE | {"version": evil}], [HANDSHAKE | {"supportedConnectionTypes": [evil]}],
               [{"channel": "/meta/" + evil, "id": evil}], [evil]]
    for batch in batches:
        with contextlib.suppress(OSError):
            connection.request(post(encode(batch)))
    raw = "\x1b[31m\x85FORGED\x9b\x7f\x01"
    headers = [f"Origin: http://{raw}", "Origin: http://a\x85\x9bFORGED", "Referer: http://\x85\x9b",
               "Expect: \x85\x9b", "Transfer-Encoding: \x85\x9b", "X-Forwarded-For: \x85\x9b", "Upgrade: \x85\x9b"]
    targets = ["/" + raw, "/\x85\x9bFORGED", "/cometd?jsonp=" + raw, "/%1b%5b31m%0d%0aFORGED", "/%c2%85%c2%9bFORGED"]
    texts = [get(target) for target in targets] + [get("/cometd", header + "\r\n") for header in headers]
    texts.append(get("/").replace(b"127.0.0.1", b"\x85\x9bFORGED"))
    texts.append(get("/").replace(b"GET", raw.encode("latin-1")))
    for text in texts:
        with contextlib.suppress(OSError):
            attacker.open(patience=1.0).request(text)
    with contextlib.suppress(OSError):
        attacker.open_websocket().socket.sendall(frame(struct.pack("!H", 4000) + evil.encode(), 8))
    time.sleep(0.3)
    log = attacker.log_file.read_bytes().decode("utf-8", "surrogateescape")
    found = sorted({f"{ord(each):02x}" for each in re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", log)})
    faults = [f"the log has {' '.join(found)}"] if found else []
    if re.search("^ *FORGED", log, re.MULTILINE):
        faults.append("a line of the log is forged")
    return Outcome(f"{log.count(chr(10))} lines of log", faults)


@attack("log", log_pipe=True)
def unread_log(attacker: Attacker) -> str:
    """Refusals without end, where nobody reads the pipe that is the server's stderr."""
    texts = [get("/nothing/" + "x" * 200) * 10, post(b"nonsense") * 10, post(encode([connect("nobody")])) * 10]
    return Flood(texts, attacker.open).run(attacker.begin())


# -- §11  One attack, from the server's start to its end --------------------------------------------------------------

@dataclasses.dataclass
class Bounds:
    """The most that an attack may cost the others."""

    ping: float         # ms
    memory: float       # MiB
    office: bool        # they hold for the office too


@dataclasses.dataclass
class Row:
    """The figures of one attack."""

    attack: Attack
    outcome: Outcome
    bystander: Account
    office: Account
    began: float
    memory: float
    cpu: float
    starved: float
    log: int
    threads: int
    back: float | None

    def pings(self, account: Account, is_during: bool = True) -> list[float]:
        """In ms and in order, of the time during the attack or before it."""
        return sorted(took * 1000 for due, took in account.pings if (due + took > self.began) == is_during) or [0.0]

    def broken(self, bounds: Bounds) -> list[str]:
        """Each bound that was broken, in words."""
        texts = list(self.outcome.faults)
        if self.back is None:
            texts.append("no newcomer is served afterwards")
        for name, account in (("bystander", self.bystander), ("office", self.office))[:1 + bounds.office]:
            if account.ended:
                texts.append(f"the {name}'s session is ended")
            texts += [f"the {name} {what} {count} events" for what, count in (
                ("misses", account.lost), ("gets doubled", account.doubled)) if count]
            if (worst := self.pings(account)[-1]) > bounds.ping:
                texts.append(f"the {name} waits {worst:,.0f} ms")
        if self.memory > bounds.memory:
            texts.append(f"{self.memory:,.0f} MiB")
        return texts


def run_attacker(attack: Attack, attacker: Attacker, pipe: Any) -> None:
    """The attacker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    try:
        outcome = attack.carry_out(attacker)
        outcome = Outcome(outcome) if isinstance(outcome, str) else outcome
    except (OSError, KeyError, IndexError) as error:
        outcome = Outcome(f"broke off: {type(error).__name__} {error}")     # the server refuses, or hangs
    pipe.send(outcome)


def start(function: Callable, *arguments: Any) -> tuple[Any, Any]:
    """A process of ours, and the pipe to it."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(process: Any, pipe: Any, patience: float, otherwise: Any) -> Any:
    """The process's report, if it comes within this patience. Then the process is ended."""
    try:
        return pipe.recv() if pipe.poll(patience) else otherwise
    except EOFError:
        return otherwise
    finally:
        process.kill()
        process.join()
        pipe.close()


def time_to_recover(place: Place) -> float | None:
    """Seconds until a newcomer gets a session, a file and a service; None if it never does."""
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE:
        with contextlib.suppress(OSError, KeyError, IndexError):
            connection = Connection(place, NEWCOMER, patience=max(0.1, began + PATIENCE - time.monotonic()))
            client_id = connection.session()
            echo = connection.post(publish(client_id, "/service/echo", "here"))
            if echo[0]["data"] == "here" and connection.request(get("/index.html")).status == 200:
                return time.monotonic() - began
        time.sleep(0.05)
    return None


def carry_out(attack: Attack, settings: argparse.Namespace, folder: pathlib.Path) -> Row:
    """Start a server, let the bystanders begin, attack, and take the figures."""
    server = Server(settings.server, attack, folder)
    seconds, bystanders = settings.seconds, []
    try:
        bystanders = [start(stand_by, server.place, address) for address in (BYSTANDER, ATTACKER)]
        for _, pipe in bystanders:
            if pipe.poll(PATIENCE):
                pipe.recv()
        time.sleep(0.4 if settings.quick else 1.0)
        memory, cpu, starved = server.forget_peak(), server.cpu_seconds(), server.starved_seconds()
        log = server.log_file.stat().st_size
        attacker = Attacker(server.place, seconds, settings.quick, server.log_file, settings.seed)
        began = time.monotonic()
        process, pipe = start(run_attacker, attack, attacker)
        while time.monotonic() < began + seconds + PATIENCE and not pipe.poll(0.05):
            server.watch_threads()
        outcome = receive(process, pipe, 0.0, Outcome("no answer", ["the attack itself failed"] * bool(pipe.poll())))
        time.sleep(max(0.0, began + SHORTEST - time.monotonic()))
        back = time_to_recover(server.place)
        server.watch_threads()
        peak, cpu, starved = server.status("VmHWM"), server.cpu_seconds() - cpu, server.starved_seconds() - starved
        for _, pipe in bystanders:
            with contextlib.suppress(OSError):
                pipe.send(None)
        accounts = [receive(*each, 2 * PATIENCE, Account(ended="no answer")) for each in bystanders]
        return Row(attack, outcome, *accounts, began, (peak - memory) / 1024, cpu, max(0.0, starved),
                   server.log_file.stat().st_size - log, server.threads, back)
    finally:
        for process, _ in bystanders:
            process.kill()
        server.stop()


# -- §12  The table, and the command line -----------------------------------------------------------------------------

def plain_line(row: Row, bounds: Bounds) -> str:
    pings, idle = row.pings(row.bystander), row.pings(row.bystander, is_during=False)
    back = "never" if row.back is None else f"{row.back:.1f}"
    return (f"{row.attack.name:28}{pings[len(pings) // 2]:6.1f}{pings[len(pings) * 99 // 100]:7.0f}{pings[-1]:8,.0f}"
            f"{idle[-1]:6.0f}{row.pings(row.office)[-1]:8,.0f}{row.memory:8,.1f}{row.cpu:6.1f}{row.starved:6.1f}"
            f"{row.log / 1024:8,.0f}{row.threads:5}{back:>7}  {'; '.join(row.broken(bounds)) or 'holds'}"
            f"\n{'':28}  ({row.outcome.gets})")


def markdown_line(row: Row, bounds: Bounds) -> str:
    pings, idle = row.pings(row.bystander), row.pings(row.bystander, is_during=False)
    back = "never" if row.back is None else f"{row.back:.1f} s"
    cells = [row.attack.text.rstrip("."), f"{pings[-1]:,.0f} ms ({idle[-1]:,.0f})",
             f"{row.pings(row.office)[-1]:,.0f} ms", f"{max(0.0, row.memory):,.0f} MiB", back, row.outcome.gets,
             "; ".join(row.broken(bounds)) or "holds"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PLAIN_HEAD = (f"{'attack':28}{'p50':>6}{'p99':>7}{'ping':>8}{'idle':>6}{'office':>8}{'memory':>8}{'cpu':>6}{'wait':>6}"
              f"{'log':>8}{'thr':>5}{'back':>7}  verdict\n{'':28}  (what the attacker gets)")
MARKDOWN_HEAD = ("| attack | bystander's longest ping (idle) | at the attacker's address | memory | back after | "
                 "attacker gets | verdict |\n|---|---|---|---|---|---|---|")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attack.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)
    parser.add_argument("--server", type=pathlib.Path, default=MODULE, metavar="PATH",
                        help="the module to attack (bayeux_server.py beside .ci)")
    parser.add_argument("--only", action="append", metavar="NAME",
                        help="an attack, or a group of them; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    parser.add_argument("--seconds", type=float, help="how long an attack goes on (3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="shorter attacks, smaller crowds")
    parser.add_argument("--markdown", action="store_true", help="the table for README")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bound is broken")
    parser.add_argument("--again", action="store_true",
                        help="carry out an attack that broke a bound once more, and count that one, as other programs "
                             "on the machine delay pings too")
    parser.add_argument("--max-ping", type=float, default=250, metavar="MS", help="bound of a ping (250)")
    parser.add_argument("--max-memory", type=float, default=64, metavar="MIB", help="bound of memory (64)")
    parser.add_argument("--office", action="store_true", help="the bounds hold at the attacker's address too")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the random numbers (printed)")
    parser.add_argument("--serve", metavar="SETTINGS", help=argparse.SUPPRESS)
    return parser


def chosen(parser: argparse.ArgumentParser, names: list[str] | None) -> list[Attack]:
    known = {*ATTACKS, *(each.group for each in ATTACKS.values())}
    for name in names or ():
        if name not in known:
            parser.error(f"--only is {name!r}: it must be an attack or a group, see --list")
    return [each for each in ATTACKS.values() if not names or each.name in names or each.group in names]


def prepare(folder: pathlib.Path) -> bool:
    """Make the files that the servers serve. Returns whether there is a certificate."""
    (folder / "docroot").mkdir()
    (folder / "docroot" / "index.html").write_text("<!DOCTYPE html><title>A page</title>")
    with open(folder / "docroot" / "large.bin", "wb") as file:
        file.truncate(20_000_000)
    if shutil.which("openssl") is None:
        return False
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2", "-subj", "/CN=localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = make_parser()
    settings = parser.parse_args()
    if settings.serve:
        serve(json.loads(settings.serve))
    if not sys.platform.startswith("linux"):
        parser.error(f"this is {sys.platform}: the figures come from /proc, and the addresses of 127.0.0.0/8, of Linux")
    attacks = chosen(parser, settings.only)
    if settings.list:
        for each in attacks:
            print(f"{each.group:12} {each.name:28} {each.text}")
        return 0
    if settings.seconds is None:
        settings.seconds = 1.0 if settings.quick else 3.0
    elif not settings.seconds > 0:
        parser.error(f"--seconds is {settings.seconds:g}: it must be more than 0")
    if not settings.server.is_file():
        parser.error(f"--server is {str(settings.server)!r}: there is no such file")
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    bounds = Bounds(settings.max_ping, settings.max_memory, settings.office)
    began, broken = time.monotonic(), []
    print(f"seed {settings.seed}; {len(attacks)} attacks of {settings.seconds:g} s on {settings.server}\n", flush=True)
    print(MARKDOWN_HEAD if settings.markdown else PLAIN_HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        has_certificate = prepare(pathlib.Path(name))
        for each in attacks:
            if each.tls and not has_certificate:
                print(f"({each.name} is left out: it needs openssl)", flush=True)
                continue
            row = carry_out(each, settings, pathlib.Path(name))
            if settings.again and row.broken(bounds):
                row = carry_out(each, settings, pathlib.Path(name))
            broken += [each.name] * bool(row.broken(bounds))
            print((markdown_line if settings.markdown else plain_line)(row, bounds), flush=True)
    print(f"\n{len(attacks) - len(broken)} of {len(attacks)} hold, in {time.monotonic() - began:.0f} s"
          + (f"; broken: {', '.join(broken)}" if broken else ""))
    return 1 if settings.check and broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("attack.py: stopped")

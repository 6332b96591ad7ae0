#!/usr/bin/env python3
"""Measures bayeux_server.py, or any other Bayeux server, on this machine: speed, latency, processor time, memory.

    python .ci/benchmark.py                                      all of it, in half a minute
    python .ci/benchmark.py --transport websocket --clients 200  a part of it, smaller
    python .ci/benchmark.py --url http://127.0.0.1:8000/faye --pid 4711       another server, which runs already

The load is that of CometD's own benchmark.  Clients are members of rooms, and hold a /meta/connect, or a WebSocket;
a member publishes a batch of events to its room, and each event is delivered to every member.  For each transport:

    idle        clients that only wait: what one costs in memory, and that none costs a thread
    unpaced     a few batches are always under way: the deliveries a second that go through
    paced       so many batches a second, whatever the server does: the latency of a delivery

What is measured where:

    deliveries, latencies   Here, by the clock of this process: a latency begins when the batch is about to be written
                            to its socket, and ends when the event is found in what was read.  All the members
                            live on one thread, so the latest of a room also wait for their neighbours to be read.
    processor time          The server's alone, user and system, all threads, from /proc: it hardly depends on what
                            else the machine does.  Deliveries a second do: server and load share its cores.
    memory                  The server's resident memory, from /proc, with the idle clients less without, a client.

Every event carries its room's count: each member must see each number of its rooms once, and in order.  If one does
not, that is said, and the exit status is 1.  Nothing is asserted about time.
"""
from __future__ import annotations

import argparse
import base64
import collections
import json
import math
import os
import pathlib
import random
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

MODULE = pathlib.Path(__file__).resolve().parent.parent / "bayeux_server.py"
ROOMS_EACH = 10                         # rooms of one member (CometD's benchmark: 10)
UNDER_WAY = 8                           # batches at once, where they are not paced
FILLING = "x" * 50                      # bytes of an event beside its numbers (CometD's benchmark: 50)
JOINING_AT_ONCE = 64                    # clients; more would only wait in the backlog
PATIENCE = 20.0                         # seconds without a delivery after which the rest is lost
SETTLING = 0.3                          # seconds to wait for what should not come

# What the load looks for in an answer; reading JSON for each delivery would cost as much as the delivery.
EVENT = re.compile(rb'"room(\d+) (\d+) (\d+) ')         # a room, its count of events, nanoseconds of our clock
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
SET_COOKIE = re.compile(rb"\r\nset-cookie: *([^;\r]+)", re.IGNORECASE)
REFUSED = re.compile(rb'"successful": *false')


# -- §1  The server, as a process ------------------------------------------------------------------------------------

class Server:
    """A server that is measured: ours, started here with a port of its own, or one that runs already."""

    def __init__(self, url: str | None, pid: int | None) -> None:
        self.process = None
        self.url, self.pid = url, pid
        if url is None:
            command = [sys.executable, str(MODULE), "--port", "0", "--bare", "--client-max-connections", "0",
                       "--max-sessions", "1000000"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            opening = re.search(r"http://[^/ ]+", self.process.stdout.readline())
            if opening is None:
                sys.exit("benchmark.py: the server does not start")
            self.url, self.pid = opening[0] + "/cometd", self.process.pid

    def stop(self) -> None:
        """Ours; the other goes on."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process.stdout.close()

    def status(self, field: str) -> int:
        """Threads, or VmRSS in KiB; 0 of a process that we may not look at."""
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text() if self.pid else f"{field}: 0"
        return int(re.search(rf"{field}:\s*(\d+)", text)[1])

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, so far."""
        if not self.pid:
            return math.nan
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- §2  Connections: they pack the JSON text of a batch, and find such texts in what comes --------------------------

class HttpConnection:
    """One kept open, for requests by POST."""

    transport = "long-polling"

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.input = b""
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = (f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                     "Content-Type: application/json\r\n").encode()

    def pack(self, body: bytes) -> bytes:
        return b"%sContent-Length: %d\r\n\r\n%s" % (self.head, len(body), body)

    def post(self, *messages: dict) -> None:
        self.socket.sendall(self.pack(json.dumps(messages, separators=(",", ":")).encode()))

    def receive(self) -> list[bytes]:
        """The batches that have come as a whole."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server hung up")
        self.input += data
        batches = []
        while (batch := self.take_batch()) is not None:
            batches.append(batch)
        return batches

    def take_batch(self) -> bytes | None:
        """The next answer's body, once all of it is there."""
        end = self.input.find(b"\r\n\r\n")
        if end < 0:
            return None
        head, start = self.input[:end + 2], end + 4
        length = CONTENT_LENGTH.search(head)
        if length is None:
            raise ConnectionError("the server answers without a Content-Length")
        stop = start + int(length[1])
        if len(self.input) < stop:
            return None
        body, self.input = self.input[start:stop], self.input[stop:]
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"the server answers {head.splitlines()[0].decode()} {body[:200].decode()}")
        if b"ookie: " in head:                  # some servers know a session by it
            self.head += b"Cookie: " + b"; ".join(SET_COOKIE.findall(head)) + b"\r\n"
        return body


class WebSocketConnection(HttpConnection):
    """Batches as text frames.  The mask of ours is zero, which leaves their bytes as they are."""

    transport = "websocket"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        request = self.head.replace(b"POST ", b"GET ", 1).partition(b"Content-Type")[0]
        self.socket.sendall(request + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                            b"Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)) + b"\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer and (data := self.socket.recv(1 << 16)):
            answer += data
        if not answer.startswith(b"HTTP/1.1 101"):
            sys.exit(f"benchmark.py: no WebSocket at {url}: {answer[:100]!r}")
        self.input = answer.partition(b"\r\n\r\n")[2]

    def pack(self, body: bytes) -> bytes:
        size = len(body)
        if size < 126:
            head = struct.pack("!BB", 0x81, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x81, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x81, 0x80 | 127, size)
        return head + bytes(4) + body

    def take_batch(self) -> bytes | None:
        """The next text frame; a ping on the way is answered."""
        while len(self.input) >= 2:
            size, start = self.input[1], 2
            if size >= 126:
                start = 4 if size == 126 else 10
                size = int.from_bytes(self.input[2:start], "big")
            if len(self.input) < start + size:
                break
            kind, payload = self.input[0], self.input[start:start + size]
            self.input = self.input[start + size:]
            if kind == 0x81:
                return payload
            if kind == 0x89:
                self.socket.sendall(struct.pack("!BB", 0x8A, 0x80 | size) + bytes(4) + payload)
            else:
                raise ConnectionError(f"the server sends a frame {kind:#x}: {payload[:100]!r}")
        return None


CONNECTIONS = {each.transport: each for each in (HttpConnection, WebSocketConnection)}


# -- §3  Members -----------------------------------------------------------------------------------------------------

class Member:
    """A session: it shakes hands, subscribes to its rooms, and from then on always has a connect at the server."""

    def __init__(self, load: Load, rooms: list[int]) -> None:
        self.load = load
        self.heard = dict.fromkeys(rooms, 0)            # the latest event of each room, by its count
        self.unanswered = len(rooms)                    # subscriptions
        self.take = self.shake_hands                    # what to do with the next batch
        self.connection = load.open(self)
        self.publishing: HttpConnection | None = None   # where it publishes
        self.connection.post({"channel": "/meta/handshake", "version": "1.0",
                              "supportedConnectionTypes": [self.connection.transport]})

    def shake_hands(self, batch: bytes) -> None:
        reply = json.loads(batch)[0]
        if not reply["successful"]:
            sys.exit(f"benchmark.py: the server refuses: {reply}")
        self.id = reply["clientId"]
        self.connect_message = {"channel": "/meta/connect", "clientId": self.id,
                                "connectionType": self.connection.transport}
        self.connect = self.connection.pack(json.dumps([self.connect_message], separators=(",", ":")).encode())
        self.take = self.subscribed
        self.connection.post(*({"channel": "/meta/subscribe", "clientId": self.id, "subscription": f"/bench/{room}"}
                               for room in self.heard))

    def subscribed(self, batch: bytes) -> None:
        """Then comes the first connect, which is to be answered at once; some servers need to be asked for that."""
        self.unanswered -= batch.count(b"/meta/subscribe")
        if self.unanswered <= 0:
            self.take = self.first_connected
            self.connection.post({**self.connect_message, "advice": {"timeout": 0}})

    def first_connected(self, batch: bytes) -> None:
        self.take = self.live
        self.load.joined += 1
        self.connection.socket.sendall(self.connect)

    def live(self, batch: bytes) -> None:
        """Events, or the reply to a connect, or both; after that reply comes the next connect."""
        self.load.count(EVENT.findall(batch), self.heard)
        if b"/meta/connect" in batch:
            self.connection.socket.sendall(self.connect)
        if REFUSED.search(batch):
            self.load.complaints["the server refuses: " + batch[:200].decode()] += 1

    def publish(self, messages: list[dict]) -> None:
        """Over HTTP on a second connection, as the first has a connect held."""
        if self.publishing is None:
            is_http = self.connection.transport == "long-polling"
            self.publishing = self.load.open(self) if is_http else self.connection
            self.publishing.head = self.connection.head             # with its cookies
        self.publishing.post(*({**message, "clientId": self.id} for message in messages))


# -- §4  The load ----------------------------------------------------------------------------------------------------

class Load:
    """All the members, and the events between them."""

    def __init__(self, server: Server, transport: str) -> None:
        self.server = server
        self.kind = CONNECTIONS[transport]
        self.members: list[Member] = []
        self.joined = self.expected = self.delivered = 0
        self.latencies: list[int] = []                      # nanoseconds
        self.complaints: collections.Counter[str] = collections.Counter()
        self._random = random.Random(1)                     # the same rooms each time
        self._epoll = select.epoll()
        self._readers: dict[int, tuple] = {}                # by file descriptor
        self._rooms: dict[int, list[Member]] = {}
        self._counts: collections.Counter[int] = collections.Counter()      # events published, by room

    def open(self, member: Member) -> HttpConnection:
        connection = self.kind(self.server.url)
        self._readers[connection.socket.fileno()] = connection, member
        self._epoll.register(connection.socket, select.EPOLLIN)
        return connection

    def look(self, seconds: float) -> None:
        """Read what has come, or comes within that time."""
        for descriptor, _ in self._epoll.poll(max(0.0, seconds), 512):
            connection, member = self._readers[descriptor]
            try:
                for batch in connection.receive():
                    member.take(batch)
            except OSError as error:
                self.complaints[str(error)] += 1
                self._epoll.unregister(descriptor)

    def join(self, clients: int, rooms: int) -> None:
        """So many members, each of some of the rooms; all of them connected."""
        for _ in range(clients):
            chosen = self._random.sample(range(rooms), min(rooms, ROOMS_EACH))
            self.members.append(Member(self, chosen))
            for room in chosen:
                self._rooms.setdefault(room, []).append(self.members[-1])
            self._look_until(lambda: len(self.members) - self.joined < JOINING_AT_ONCE)
        self._look_until(lambda: self.joined == clients)
        self.settle()

    def _look_until(self, is_so: Callable[[], bool]) -> None:
        """Look until it is so, or nothing has come of it for too long."""
        progress, since = 0, time.monotonic()
        while not is_so():
            self.look(0.1)
            if self.joined + self.delivered > progress:
                progress, since = self.joined + self.delivered, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                sys.exit(f"benchmark.py: WRONG: of {self.expected} deliveries {self.delivered} came, and no more in "
                         f"{PATIENCE:.0f} s; {self.joined} of {len(self.members)} joined; {dict(self.complaints)}")

    def settle(self) -> None:
        until = time.monotonic() + SETTLING
        while (left := until - time.monotonic()) > 0:
            self.look(left)

    def publish(self, size: int) -> None:
        """A batch of so many events to a room, always by the same of its members, so that their order is known."""
        room = self._random.choice(list(self._rooms))
        stamp, messages = time.perf_counter_ns(), []
        for _ in range(size):
            self._counts[room] += 1
            messages.append({"channel": f"/bench/{room}", "data": f"room{room} {self._counts[room]} {stamp} {FILLING}"})
        self.expected += size * len(self._rooms[room])
        self._rooms[room][0].publish(messages)

    def count(self, events: list[tuple[bytes, bytes, bytes]], heard: dict[int, int]) -> None:
        """Events have come to a member that has heard those before them."""
        now = time.perf_counter_ns()
        for room, number, stamp in events:
            room, number = int(room), int(number)
            if number != heard[room] + 1:
                self.complaints["an event came twice, not at all, or out of order"] += 1
            heard[room] = number
            self.latencies.append(now - int(stamp))
        self.delivered += len(events)

    def run(self, batches: int, size: int, pace: float | None) -> None:
        """Publish, at that pace or as fast as they are taken, and wait until all is delivered."""
        self.latencies.clear()
        began, usual = time.perf_counter(), size * sum(map(len, self._rooms.values())) / len(self._rooms)
        for sent in range(batches):
            if pace:
                while (left := began + sent / pace - time.perf_counter()) > 0:
                    self.look(left)
            else:
                self._look_until(lambda: self.expected - self.delivered <= UNDER_WAY * usual)
            self.publish(size)
            self.look(0)
        self._look_until(lambda: self.delivered >= self.expected)

    def check(self) -> None:
        """Did each member hear everything?  What comes twice, may come late."""
        self.settle()
        for member in self.members:
            for room, number in member.heard.items():
                if number != self._counts[room]:
                    self.complaints["a member has not heard a room's last event"] += 1

    def close(self) -> None:
        for connection, _ in self._readers.values():
            connection.socket.close()
        self._epoll.close()


# -- §5  What is measured, and how it is shown -----------------------------------------------------------------------

def measure_idle(load: Load, transport: str, clients: int) -> None:
    """Clients that only wait."""
    server = load.server
    threads, memory, began = server.status("Threads"), server.status("VmRSS"), time.perf_counter()
    load.join(clients, 1)
    seconds = time.perf_counter() - began - SETTLING
    print(f"\n{transport}, {clients} idle clients")
    print(f"  {'joined in':<14}{seconds:10.2f} s")
    if server.pid:
        print(f"  {'memory':<14}{(server.status('VmRSS') - memory) / clients:10.1f} KiB a client")
        print(f"  {'threads':<14}{server.status('Threads'):10} ({threads} without them)")


def measure_rooms(load: Load, transport: str, options: argparse.Namespace) -> None:
    """Both runs with the same members."""
    server = load.server
    load.join(options.clients, options.rooms)
    for pace in (None, options.pace):
        title = f"paced, {pace:g} batches a second" if pace else "unpaced"
        print(f"\n{transport}, {options.clients} members of {options.rooms} rooms, "
              f"batches of {options.batch_size}, {title}")
        before, busy, mine = load.delivered, server.cpu_seconds(), time.process_time()
        began = time.perf_counter()
        load.run(options.batches, options.batch_size, pace)
        seconds, delivered = time.perf_counter() - began, max(1, load.delivered - before)
        print(f"  {'deliveries':<14}{delivered / seconds:10.0f} a second ({delivered} in {seconds:.2f} s)")
        if server.pid:
            busy = server.cpu_seconds() - busy
            print(f"  {'server CPU':<14}{busy / delivered * 1e6:10.1f} us a delivery ({busy / seconds:.0%} of a core)")
        print(f"  {'load CPU':<14}{(time.process_time() - mine) / delivered * 1e6:10.1f} us a delivery, this program's")
        show_latencies(sorted(load.latencies), has_histogram=pace is not None)
    load.check()


def show_latencies(latencies: list[int], has_histogram: bool) -> None:
    """Percentiles; and how many fell into each step of a scale that grows as latencies do, by factors."""
    if not latencies:
        return
    shown = [("p50", .5), ("p90", .9), ("p99", .99), ("max", 1.0)]
    values = [f"{name} {latencies[min(len(latencies) - 1, int(len(latencies) * share))] / 1e6:.2f}"
              for name, share in shown]
    print(f"  {'latency':<14}{', '.join(values)} ms")
    if has_histogram:
        edges = [step * 10.0 ** power for power in range(-2, 6) for step in (1, 1.5, 2, 3, 5, 7)]      # milliseconds
        counts = collections.Counter(next(edge for edge in edges if value / 1e6 <= edge) for value in latencies)
        most = max(counts.values())
        for edge in (each for each in edges if min(counts) <= each <= max(counts)):
            bar = "#" * math.ceil(counts[edge] / most * 50)
            print(f"  {'up to':<10}{edge:8g} ms |{bar:<50} {counts[edge]}")


# -- §6  Command line ------------------------------------------------------------------------------------------------

def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--transport", choices=["long-polling", "websocket", "both"], default="both")
    add("--clients", type=int, default=1000, help="members of rooms")
    add("--rooms", type=int, default=100, help=f"each client is in {ROOMS_EACH} of them")
    add("--batches", type=int, default=200, help="how many are published in each run")
    add("--batch-size", type=int, default=10, help="events of a batch")
    add("--pace", type=float, default=25, help="batches a second, in the paced run")
    add("--idle", type=int, default=2000, help="idle clients, whose memory is measured; 0: leave this out")
    add("--small", action="store_true", help="a few seconds, to see that all of this works")
    add("--url", help="measure this server, which is running, instead of ours")
    add("--pid", type=int, help="its process on this machine, for its CPU and memory")
    options = parser.parse_args()
    if options.small:
        options.clients, options.rooms, options.batches, options.pace, options.idle = 50, 20, 100, 100, 100
    for name in ("clients", "rooms", "batches", "batch_size", "pace"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return options


def allow_files(wanted: int) -> None:
    """Each client takes a file descriptor here, and one in the server, which inherits our limit."""
    import resource  # not everywhere; elsewhere main has said so
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"benchmark.py: so many clients need {wanted} open files, and the limit is {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    options = read_options()
    if sys.platform != "linux":
        sys.exit("benchmark.py: this needs Linux: it reads /proc for the server's processor time and memory")
    allow_files(max(2 * options.clients, options.idle) + 100)
    measurements = [(measure_rooms, options)]
    if options.idle:
        measurements.insert(0, (measure_idle, options.idle))
    complaints: collections.Counter[str] = collections.Counter()
    for transport in CONNECTIONS if options.transport == "both" else [options.transport]:
        for measure, argument in measurements:
            server = Server(options.url, options.pid)
            try:
                load = Load(server, transport)
                measure(load, transport, argument)
                load.close()
                complaints += load.complaints
            except OSError as error:
                sys.exit(f"benchmark.py: {server.url}: {error}")
            finally:
                server.stop()
    for complaint, times in complaints.items():
        print(f"benchmark.py: WRONG: {complaint} ({times} times)", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

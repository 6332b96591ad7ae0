#!/usr/bin/env python3
"""Measures bayeux_server.py on this machine: what held connects cost, and what a delivery costs.

    python .ci/figures.py [--clients 2000] [--batches 200]

Each client holds a /meta/connect and is subscribed to one of 20 rooms; then batches of 10 events are
published, at most 4 rooms at a time.  The server is a process of its own, whose threads, memory and
processor time are read from /proc, so this needs Linux.  One connection publishes, on one thread with
all the clients: the deliveries a second are as much this program's as the server's, the processor time
a delivery is the server's alone.
"""
import argparse
import json
import os
import pathlib
import re
import resource
import selectors
import socket
import subprocess
import sys
import time

MODULE = pathlib.Path(__file__).resolve().parent.parent / "bayeux_server.py"
ROOMS, BATCH_SIZE, ROOMS_AT_ONCE = 20, 10, 4
CONNECT = {"channel": "/meta/connect", "connectionType": "long-polling"}


class Client:
    """One keep-alive connection."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.input = b""

    def send(self, *messages):
        body = json.dumps(messages).encode()
        self.socket.sendall(b"POST /cometd HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                            b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def receive(self):
        """Read what has come; the body of an answer that is complete now, or None."""
        data = self.socket.recv(1 << 16)
        if not data:
            sys.exit("figures.py: the server hung up")
        self.input += data
        head, end, body = self.input.partition(b"\r\n\r\n")
        if not end or len(body) < int(re.search(rb"Content-Length: (\d+)", head)[1]):
            return None
        self.input = b""
        return body

    def ask(self, *messages):
        self.send(*messages)
        while (body := self.receive()) is None:
            pass
        return json.loads(body)


def handshake(port):
    client = Client(port)
    client.id = client.ask({"channel": "/meta/handshake", "version": "1.0"})[0]["clientId"]
    return client


def join(port, room):
    """A client whose connect is held."""
    client = handshake(port)
    client.ask({"channel": "/meta/subscribe", "clientId": client.id, "subscription": f"/room/{room}"})
    client.ask({**CONNECT, "clientId": client.id})
    client.send({**CONNECT, "clientId": client.id})
    return client


def look_at(pid):
    """Threads, KiB of memory and seconds of processor time of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return (int(re.search(r"Threads:\s*(\d+)", status)[1]), int(re.search(r"VmRSS:\s*(\d+)", status)[1]), seconds)


def publish(publisher, clients, batches):
    """Publish, and receive everything; how many events arrived."""
    selector, received, sent = selectors.DefaultSelector(), 0, 0
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
    expected = 0
    members = [len(clients[room::ROOMS]) for room in range(ROOMS)]
    while sent < batches or received < expected:
        while sent < batches and expected - received <= ROOMS_AT_ONCE * max(members) * BATCH_SIZE:
            event = {"channel": f"/room/{sent % ROOMS}", "clientId": publisher.id, "data": "x" * 50}
            publisher.ask(*[event] * BATCH_SIZE)
            expected += members[sent % ROOMS] * BATCH_SIZE
            sent += 1
        for key, _ in selector.select():
            body = key.data.receive()
            if body is not None:
                received += body.count(b'"data":')
                key.data.send({**CONNECT, "clientId": key.data.id})
    return received


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    command = [sys.executable, str(MODULE), "--port", "0", "--bare", "--client-max-connections", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            port = int(re.search(r":(\d+)/", server.stdout.readline())[1])
            publisher = handshake(port)
            threads, memory, _ = look_at(server.pid)
            clients = [join(port, number % ROOMS) for number in range(options.clients)]
            threads_now, memory_now, busy = look_at(server.pid)
            print(f"{options.clients} held connects: {threads_now} threads ({threads} without them), "
                  f"{(memory_now - memory) / options.clients:.1f} KiB each")
            began = time.perf_counter()
            received = publish(publisher, clients, options.batches)
            seconds = time.perf_counter() - began
            busy = look_at(server.pid)[2] - busy
            print(f"{received} deliveries: {busy / received * 1e6:.1f} microseconds of processor time each, "
                  f"{received / seconds:.0f} a second")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()

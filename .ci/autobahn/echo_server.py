#!/usr/bin/env python3
"""A WebSocket server that sends back what it gets: the module's frames and connections without Bayeux.

    python echo_server.py [FOLDER OF bayeux_server.py]

It prints its URL, and stops when its standard input ends.
"""
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else str(HERE.parent.parent))
import bayeux_server
from bayeux_server import BINARY_FRAME, TEXT_FRAME, frame


class EchoSocket(bayeux_server.WebSocket):
    """Where the server's own would take a batch, the message goes back.  Control frames are handled as ever."""

    __slots__ = ()

    def _take_message(self, connection, opcode, payload):
        if opcode == TEXT_FRAME:
            connection.push(frame(TEXT_FRAME, payload.encode("utf-8")))
        elif opcode == BINARY_FRAME:
            connection.push(frame(BINARY_FRAME, payload))
        else:
            super()._take_message(connection, opcode, payload)


bayeux_server.WebSocket = EchoSocket            # what an upgrade makes of a connection
with bayeux_server.BayeuxServer(port=0, client_max_connections=0) as server:
    print(server.url.replace("http", "ws", 1), flush=True)
    sys.stdin.read()

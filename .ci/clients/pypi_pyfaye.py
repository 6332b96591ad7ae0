"""PyPI's pyfaye against a server of ours.

    python pypi_pyfaye.py long-polling|websocket PYTHON bayeux_server.py

Broken by itself:

* It never asks its transport for what comes, so no callback is ever called; we ask.  (For events alone: told
  advice "none" by the last reply, it would disconnect once more, and wait for what it is to read itself.)
* Over long-polling it sends no /meta/connect, and so gets no events; poll() below does.  It pays no heed to
  replies; we ask by batch(), which returns them.
* Over WebSocket it takes whatever comes next for the reply to its last request, the replies to its
  connects and events too; only_replies() below keeps those apart.  It waits for one reply to a batch of many.
* Over WebSocket it hides the reply to its disconnect from itself, and waits for it for a minute; we show it.
* It neither notices that its session is unknown nor that the server was away, and over WebSocket cannot
  even disconnect then: after a restart an application has to begin with another client.
"""

import asyncio
import contextlib
import logging
import re
import sys

from faye.client import FayeClient
from faye.exceptions import FayeError
from faye.protocol import Message
from faye.transport.websocket import WebSocketTransport
from server import Server, check, run, skip

PATIENCE = 25                   # seconds for one answer
TEXT = "ça va? \u2028 </script> 🙂"


def only_replies(transport, message):
    return message.channel != "/meta/connect" and message.successful is not None


async def all_but_disconnect(transport, message, handle=WebSocketTransport._handle_specific_message):
    return message.channel != "/meta/disconnect" and await handle(transport, message)


WebSocketTransport._should_queue_message = only_replies
WebSocketTransport._handle_specific_message = all_but_disconnect


async def patient(work):
    return await asyncio.wait_for(work, PATIENCE)


class User:
    """A client whose events can be waited for."""

    def __init__(self, name, url, transport):
        self.name, self.transport, self.events = name, transport, asyncio.Queue()
        self.client = FayeClient(url, transport)

    async def open(self):
        await patient(self.client.connect())
        if self.transport == "websocket":
            await self.client._transport.set_message_callback(self.client._deliver_message)
        else:
            self.polling = asyncio.create_task(self.poll())

    async def poll(self):
        with contextlib.suppress(FayeError):    # the server is away
            while True:
                connect = self.client._protocol.create_connect_message("long-polling")
                for message in await self.client._transport.send([connect]):
                    await self.client._deliver_message(message)

    async def close(self):
        if self.transport != "websocket":
            self.polling.cancel()
        await patient(self.client.disconnect())

    async def subscribe(self, pattern):
        await patient(self.client.subscribe(pattern, self.events.put))

    async def event(self):
        return await patient(self.events.get())

    async def ask(self, kind, *parameters):
        """Send a message; its reply, or the error with which the client shows its refusal."""
        build = {"publish": Message.publish, "subscribe": Message.subscribe, "unsubscribe": Message.unsubscribe}[kind]
        given = [*parameters, self.client.client_id] if kind == "publish" else [self.client.client_id, *parameters]
        try:
            return (await patient(self.client.batch([build(*given)])))[0]
        except FayeError as error:
            return error


def code_of(reply):
    """The code of a refusal; 0 if there is none."""
    found = re.search(r"\b(40\d):", str(reply if isinstance(reply, FayeError) else reply.error or ""))
    return int(found[1]) if found else 0


async def converse(server, transport):
    logging.disable(logging.CRITICAL)       # it logs what it does not understand
    alice, bob = [User(name, server.url, transport) for name in ("alice", "bob")]
    for user in alice, bob:
        await user.open()
        check(f"{user.name} is connected over {transport}", user.client.connected)
    await talk(alice, bob, transport)
    await refuse(alice, bob)
    await asyncio.get_running_loop().run_in_executor(None, server.restart)
    skip("recovery by itself", "it does not notice that the server was away")
    alice, bob = [User(name, server.url, transport) for name in ("alice", "bob")]
    for user in alice, bob:
        await user.open()
    await alice.subscribe("/room/one")
    await bob.subscribe("/deep/**")
    await patient(alice.client.publish("/deep/again", {"number": 7}))
    event = await bob.event()
    check("bob hears alice after the restart", event.data == {"number": 7}, event)
    await patient(bob.client.publish("/room/one", {"number": 8}))
    event = await alice.event()
    check("alice hears bob after the restart", event.data == {"number": 8}, event)
    for user in alice, bob:
        check(f"{user.name} has no events that were not expected", user.events.empty())
        await user.close()
        check(f"{user.name} disconnects", not user.client.connected)


async def talk(alice, bob, transport):
    await alice.subscribe("/room/one")
    for pattern in "/room/*", "/deep/**":
        await bob.subscribe(pattern)

    await patient(alice.client.publish("/room/one", {"text": TEXT}))
    for user in alice, bob:
        event = await user.event()
        check(f"{user.name} hears alice, every character of hers", event.data == {"text": TEXT}, event)
    reply = await alice.ask("publish", "/deep/down/below", {"number": 0})
    check("alice's publish is acknowledged", reply.successful, reply)
    check("bob hears by /deep/**", (await bob.event()).channel == "/deep/down/below")

    replies = await patient(alice.client.batch([Message.publish("/room/two", {"number": number}, alice.client.client_id)
                                                for number in (1, 2, 3)]))
    if transport == "websocket":
        replies += [await patient(alice.client._transport._response_queue.get()) for _ in range(2)]
    check("each publish of a batch is acknowledged", [reply.successful for reply in replies] == [True] * 3, replies)
    numbers = [(await bob.event()).data["number"] for _ in range(3)]
    check("the batch arrives in order", numbers == [1, 2, 3], numbers)

    answer = await alice.ask("publish", "/service/echo", {"a": [1, None, "x"]})
    check("the echo service brings its data back", answer.data == {"a": [1, None, "x"]}, answer)

    await patient(bob.client.unsubscribe("/room/*"))
    await alice.ask("publish", "/room/two", {"number": 4})
    await alice.ask("publish", "/deep/after", {"number": 5})
    event = await bob.event()
    check("after unsubscribing /room/* bob hears what he still wants, and no more of the other",
          event.data == {"number": 5}, event)


async def refuse(alice, bob):
    for what, code, request in [("a subscription to /meta/x", 403, ("subscribe", "/meta/x")),
                                ("a publish to a pattern", 405, ("publish", "/room/*", {})),
                                ("a publish to a bad channel name", 405, ("publish", "/room/no such name", {})),
                                ("a call of an unknown service", 404, ("publish", "/service/nobody", {}))]:
        found = code_of(await bob.ask(*request))
        check(f"{what} fails with {code}", found == code, found)
    await alice.ask("publish", "/deep/refused", {"number": 6})
    event = await bob.event()
    check("refusals leave the session as it was", event.data == {"number": 6}, event)


def main():
    transport, python, module = sys.argv[1:]
    with Server(python, module) as server:
        asyncio.run(converse(server, transport))


run(f"PyPI pyfaye over {sys.argv[1]}", 100, main)

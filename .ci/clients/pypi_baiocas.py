"""PyPI's baiocas against a server of ours.

    python pypi_baiocas.py long-polling PYTHON bayeux_server.py

Broken by itself:

* A URL without a query makes it call a property (`channel.is_meta()`), and fail; we add a query.
* It does not notice that a request was refused by the machine (the server is away), and never sends
  another; Transport below tells it.
* It disconnects by a second event loop inside the running one, unless told sync=False.
"""

import asyncio
import sys

from baiocas.client import Client
from baiocas.extensions.ack import AckExtension
from baiocas.extensions.timestamp import TimestampExtension
from baiocas.transports.long_polling import LongPollingHttpTransport
from server import Server, check, run
from tornado.ioloop import IOLoop

PATIENCE = 25                   # seconds for one answer
TEXT = "ça va? \u2028 </script> 🙂"


class Transport(LongPollingHttpTransport):
    def send(self, messages, sync=False):
        def look(future):
            if future.exception() is not None:
                self._client.fail_messages(messages, future.exception())

        future = super().send(messages, sync)
        future.add_done_callback(look)
        return future


class User:
    """A client whose answers can be waited for."""

    def __init__(self, name, url):
        self.name, self.replies, self.events = name, asyncio.Queue(), asyncio.Queue()
        self.patterns = {}      # its subscriptions, by their numbers
        self.acks = []
        self.connects = 0       # successful connects of this session
        self.client = Client(f"{url}?client=baiocas", backoff_period_increment=500)
        self.client.register_transport(Transport())
        self.client.register_extension(AckExtension())
        self.client.register_extension(TimestampExtension())
        for channel in "/meta/subscribe", "/meta/unsubscribe", "/meta/publish", "/meta/disconnect":
            self.client.get_channel(channel).add_listener(lambda channel, message: self.replies.put_nowait(message))
        self.client.get_channel("/meta/handshake").add_listener(self.shaken)
        self.client.get_channel("/meta/connect").add_listener(self.connected)

    def shaken(self, channel, message):
        """It forgets its subscriptions with each handshake; an application makes them again."""
        self.connects = 0
        if message.successful:
            for pattern in self.patterns:
                self.listen(pattern)

    def connected(self, channel, message):
        self.connects += bool(message.successful)
        self.acks.append(message.get("ext", {}).get("ack"))

    def listen(self, pattern):
        self.patterns[pattern] = self.client.get_channel(pattern).subscribe(
            lambda channel, message: self.events.put_nowait(message))

    async def reply(self):
        return await asyncio.wait_for(self.replies.get(), PATIENCE)

    async def event(self):
        return await asyncio.wait_for(self.events.get(), PATIENCE)

    async def until_connected(self):
        async def wait():
            while not self.connects:
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), PATIENCE)

    async def subscribe(self, pattern):
        self.listen(pattern)
        return await self.reply()

    async def unsubscribe(self, pattern):
        self.client.get_channel(pattern).unsubscribe(id=self.patterns.pop(pattern))
        return await self.reply()

    async def publish(self, channel, data):
        self.client.get_channel(channel).publish(data)
        return await self.reply()


def code_of(reply):
    """The code of a refusal; 0 if there is none."""
    return 0 if reply.successful else int(reply.error[:3])


async def converse(server, alice, bob):
    for user in alice, bob:
        user.client.handshake()
        await user.until_connected()
        check(f"{user.name} is connected over long-polling", user.client.transport.name == "long-polling")
    await talk(alice, bob)
    await refuse(alice, bob)
    await recover(alice, bob, server)
    for user in alice, bob:
        acks = [ack for ack in user.acks if ack is not None]
        check(f"{user.name}'s connects are acknowledged", len(acks) > 1 and max(acks) > 1, user.acks)
        check(f"{user.name} has no events that were not expected", user.events.empty())
        user.client.disconnect(sync=False)
        check(f"{user.name} disconnects", (await user.reply()).successful and user.client.is_disconnected)


async def talk(alice, bob):
    check("alice subscribes /room/one", (await alice.subscribe("/room/one")).successful)
    check("bob subscribes /room/*", (await bob.subscribe("/room/*")).successful)
    check("bob subscribes /deep/**", (await bob.subscribe("/deep/**")).successful)

    reply = await alice.publish("/room/one", {"text": TEXT})
    check("alice's publish is acknowledged", reply.successful, reply)
    for user in alice, bob:
        event = await user.event()
        check(f"{user.name} hears alice, every character of hers", event.data == {"text": TEXT}, event)
    await alice.publish("/deep/down/below", {"number": 0})
    check("bob hears by /deep/**", (await bob.event()).channel == "/deep/down/below")

    with alice.client.batch():
        for number in 1, 2, 3:
            alice.client.get_channel("/room/two").publish({"number": number})
    codes = [code_of(await alice.reply()) for _ in range(3)]
    check("each publish of a batch is acknowledged", codes == [0, 0, 0], codes)
    numbers = [(await bob.event()).data["number"] for _ in range(3)]
    check("the batch arrives in order", numbers == [1, 2, 3], numbers)

    answer = await alice.publish("/service/echo", {"a": [1, None, "x"]})
    check("the echo service brings its data back", answer.data == {"a": [1, None, "x"]}, answer)

    check("bob unsubscribes /room/*", (await bob.unsubscribe("/room/*")).successful)
    await alice.publish("/room/two", {"number": 4})
    await alice.publish("/deep/after", {"number": 5})
    event = await bob.event()
    check("bob hears what he still wants, and no more of the other", event.data == {"number": 5}, event)


async def refuse(alice, bob):
    denied = code_of(await bob.subscribe("/meta/x"))
    check("a subscription to /meta/x fails with 403", denied == 403, denied)
    del bob.patterns["/meta/x"]
    for what, code, channel in [("a publish to a pattern", 405, "/room/*"),
                                ("a publish to a bad channel name", 405, "/room/no such name"),
                                ("a call of an unknown service", 404, "/service/nobody")]:
        found = code_of(await bob.publish(channel, {"a": 1}))
        check(f"{what} fails with {code}", found == code, found)
    await alice.publish("/deep/refused", {"number": 6})
    event = await bob.event()
    check("refusals leave the session as it was", event.data == {"number": 6}, event)


async def recover(alice, bob, server):
    before = [user.client.client_id for user in (alice, bob)]
    await asyncio.get_running_loop().run_in_executor(None, server.restart)
    for user in alice, bob:
        for _ in user.patterns:
            reply = await user.reply()
            check(f"{user.name} subscribes {reply.subscription} again", reply.successful, reply)
        await user.until_connected()
    check("both have a new session, by themselves", not set(before) & {alice.client.client_id, bob.client.client_id})
    await alice.publish("/deep/again", {"number": 7})
    event = await bob.event()
    check("bob hears alice after the restart", event.data == {"number": 7}, event)
    await bob.publish("/room/one", {"number": 8})
    event = await alice.event()
    check("alice hears bob after the restart", event.data == {"number": 8}, event)


def main():
    _, python, module = sys.argv[1:]
    with Server(python, module) as server:
        loop = IOLoop.current()         # its clients are made before the loop runs: each starts another for a moment
        users = [User(name, server.url) for name in ("alice", "bob")]
        loop.run_sync(lambda: converse(server, *users))


run("PyPI baiocas over long-polling", 100, main)

"""PyPI's aiocometd-ng against a server of ours.

    python pypi_aiocometd.py long-polling|websocket PYTHON bayeux_server.py

Broken by itself:

* connection_timeout does not work: it passes loop= to asyncio.wait_for, which Python 3.10 no longer takes, and
  it does not install on anything older.  We switch it off; then it waits for the server for as long as it takes.
* It has no batches of its own.  We hand one to its transport, as it does itself when it connects again.
* Its callbacks do not expect that a cancelled task raises CancelledError, as it does since Python 3.8: each
  disconnect would print a traceback.  We keep the event loop from printing these.
"""

import asyncio
import sys

from aiocometd_ng import Client, ConnectionType
from aiocometd_ng.exceptions import ServerError, TransportError
from server import Server, check, run

PATIENCE = 25                   # seconds for one answer
TEXT = "ça va? \u2028 </script> 🙂"


async def patient(work):
    return await asyncio.wait_for(work, PATIENCE)


async def code_of(work):
    """The code of a request's refusal; 0 if it succeeds."""
    try:
        await patient(work)
    except ServerError as error:
        return error.error_code
    return 0


def report(loop, context):
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


async def converse(server, kind):
    asyncio.get_running_loop().set_exception_handler(report)
    alice, bob = [Client(server.url, kind, connection_timeout=None) for _ in range(2)]
    for name, client in ("alice", alice), ("bob", bob):
        await patient(client.open())
        check(f"{name} is connected over {kind.value}", client.connection_type is kind)
    await talk(alice, bob)
    await refuse(alice, bob)
    await recover(alice, bob, server)
    for name, client in ("alice", alice), ("bob", bob):
        check(f"{name} has no events that were not expected", not client.has_pending_messages)
        await patient(client.close())
        check(f"{name} disconnects", client.closed)


async def talk(alice, bob):
    await patient(alice.subscribe("/room/one"))
    for pattern in "/room/*", "/deep/**":
        await patient(bob.subscribe(pattern))
    check("both subscribe, bob with wildcards", bob.subscriptions == {"/room/*", "/deep/**"}, bob.subscriptions)

    reply = await patient(alice.publish("/room/one", {"text": TEXT}))
    check("alice's publish is acknowledged", reply["successful"] is True, reply)
    for name, client in ("alice", alice), ("bob", bob):
        event = await patient(client.receive())
        check(f"{name} hears alice, every character of hers", event["data"] == {"text": TEXT}, event)
    await patient(alice.publish("/deep/down/below", {"number": 0}))
    check("bob hears by /deep/**", (await patient(bob.receive()))["channel"] == "/deep/down/below")

    batch = [{"channel": "/room/two", "data": {"number": number}, "clientId": None, "id": None}
             for number in (1, 2, 3)]
    reply = await patient(alice._transport._send_payload(batch))
    check("the first publish of a batch is acknowledged", reply["successful"] is True, reply)
    numbers = [(await patient(bob.receive()))["data"]["number"] for _ in batch]
    check("the batch arrives in order", numbers == [1, 2, 3], numbers)

    answer = await patient(alice.publish("/service/echo", {"a": [1, None, "x"]}))
    check("the echo service brings its data back", answer["data"] == {"a": [1, None, "x"]}, answer)

    await patient(bob.unsubscribe("/room/*"))
    check("bob unsubscribes /room/*", bob.subscriptions == {"/deep/**"}, bob.subscriptions)
    await patient(alice.publish("/room/two", {"number": 4}))
    await patient(alice.publish("/deep/after", {"number": 5}))
    event = await patient(bob.receive())
    check("bob hears what he still wants, and no more of the other", event["data"] == {"number": 5}, event)


async def refuse(alice, bob):
    for what, code, work in [("a subscription to /meta/x", 403, bob.subscribe("/meta/x")),
                             ("a publish to a pattern", 405, bob.publish("/room/*", {})),
                             ("a publish to a bad channel name", 405, bob.publish("/room/no such name", {})),
                             ("a call of an unknown service", 404, bob.publish("/service/nobody", {}))]:
        found = await code_of(work)
        check(f"{what} fails with {code}", found == code, found)
    await patient(alice.publish("/deep/refused", {"number": 6}))
    event = await patient(bob.receive())
    check("refusals leave the session as it was", event["data"] == {"number": 6}, event)


async def recover(alice, bob, server):
    before = [client._transport.client_id for client in (alice, bob)]
    await asyncio.get_running_loop().run_in_executor(None, server.restart)
    # It begins a new session and subscribes again by itself, but tells nobody: ask until bob hears something.
    for number in range(PATIENCE * 10):
        try:
            await patient(alice.publish("/deep/again", {"number": number}))
        except (ServerError, TransportError):
            pass
        try:
            event = await asyncio.wait_for(bob.receive(), 0.2)
            break
        except TimeoutError:
            continue
    else:
        raise AssertionError("bob hears nothing after the restart")
    check("bob hears alice after the restart", event["channel"] == "/deep/again", event)
    after = [client._transport.client_id for client in (alice, bob)]
    check("both have a new session, by themselves", not set(before) & set(after))
    for _ in range(number):
        try:
            await asyncio.wait_for(bob.receive(), 0.2)
        except TimeoutError:
            break
    await patient(bob.publish("/room/one", {"text": "after the restart"}))
    event = await patient(alice.receive())
    check("alice hears bob after the restart", event["data"] == {"text": "after the restart"}, event)


def main():
    transport, python, module = sys.argv[1:]
    with Server(python, module) as server:
        asyncio.run(converse(server, ConnectionType(transport)))


run(f"PyPI aiocometd-ng over {sys.argv[1]}", 100, main)

"""PyPI's python-bayeux against a server of ours.

    python pypi_python_bayeux.py long-polling PYTHON bayeux_server.py

Broken by itself:

* It looks for the callbacks of an event by the event's channel, and so finds none for a pattern's; we name the
  channels that we expect too.
* It throws every reply away; we note them on their way.
* It knows "403::Unknown client" alone for an unknown session, where Bayeux has 402: it never shakes hands
  again; and a server that is away ends it.  After a restart an application has to begin with another client.
* It has no batches, nor services; what it sends messages with takes a list too, and the answer of a
  service comes as a reply.
* It says goodbye only when its held connect has come back: the server's --timeout is short.
"""

from gevent import monkey

monkey.patch_all()      # before all else: it runs its parts side by side in one thread

import sys

import gevent.queue
from python_bayeux import BayeuxClient
from server import Server, check, run, skip

PATIENCE = 25           # seconds for one answer
TEXT = "ça va? \u2028 </script> 🙂"


class User(BayeuxClient):
    def __init__(self, name, url):
        self.name, self.replies, self.events = name, gevent.queue.Queue(), gevent.queue.Queue()
        super().__init__(url)
        self.go()

    def _send_message(self, payload, **keywords):
        response = super()._send_message(payload, **keywords)
        for message in response:
            if "successful" in message and message["channel"] != "/meta/connect":
                self.replies.put(message)
        return response

    def hear(self, message):
        self.events.put(message)

    def event(self):
        return self.events.get(timeout=PATIENCE)

    def reply(self, channel):
        """The next reply; it must be one to this channel."""
        message = self.replies.get(timeout=PATIENCE)
        assert message["channel"] == channel, (channel, message)
        return message

    def begin(self, pattern, *channels):
        """Subscribe a pattern, and take what comes on these channels."""
        self.subscribe(pattern, "hear")
        for channel in channels:
            self.subscription_callbacks.setdefault(channel, ["hear"])
        return self.reply("/meta/subscribe")

    def end(self, pattern):
        self.unsubscribe(pattern)
        return self.reply("/meta/unsubscribe")

    def say(self, channel, data):
        self.publish(channel, data)
        return self.reply(channel)


def code_of(reply):
    """The code of a refusal; 0 if there is none."""
    return 0 if reply["successful"] else int(reply["error"][:3])


def open_users(server):
    users = [User(name, server.url) for name in ("alice", "bob")]
    for user in users:
        reply = user.reply("/meta/handshake")
        check(f"{user.name}'s handshake succeeds", reply["successful"] and user.client_id == reply["clientId"], reply)
    return users


def close(user):
    user.shutdown()
    reply = user.reply("/meta/disconnect")
    check(f"{user.name} disconnects", reply["successful"], reply)
    check(f"{user.name} has no events that were not expected", user.events.empty())


def talk(alice, bob):
    check("alice subscribes /room/one", alice.begin("/room/one")["successful"])
    check("bob subscribes /room/*", bob.begin("/room/*", "/room/one", "/room/two")["successful"])
    check("bob subscribes /deep/**", bob.begin("/deep/**", "/deep/down/below", "/deep/after", "/deep/refused")["successful"])

    reply = alice.say("/room/one", {"text": TEXT})
    check("alice's publish is acknowledged", reply["successful"], reply)
    for user in alice, bob:
        event = user.event()
        check(f"{user.name} hears alice, every character of hers", event["data"] == {"text": TEXT}, event)
    alice.say("/deep/down/below", {"number": 0})
    check("bob hears by /deep/**", bob.event()["channel"] == "/deep/down/below")

    alice._send_message([{"channel": "/room/two", "data": {"number": number}, "clientId": alice.client_id,
                          "id": f"batch {number}"} for number in (1, 2, 3)])
    codes = [code_of(alice.reply("/room/two")) for _ in range(3)]
    check("each publish of a batch is acknowledged", codes == [0, 0, 0], codes)
    numbers = [bob.event()["data"]["number"] for _ in range(3)]
    check("the batch arrives in order", numbers == [1, 2, 3], numbers)

    answer = alice.say("/service/echo", {"a": [1, None, "x"]})
    check("the echo service brings its data back", answer["data"] == {"a": [1, None, "x"]}, answer)

    check("bob unsubscribes /room/*", bob.end("/room/*")["successful"])
    alice.say("/room/two", {"number": 4})
    alice.say("/deep/after", {"number": 5})
    event = bob.event()
    check("bob hears what he still wants, and no more of the other", event["data"] == {"number": 5}, event)


def refuse(alice, bob):
    denied = code_of(bob.begin("/meta/x"))
    check("a subscription to /meta/x fails with 403", denied == 403, denied)
    for what, code, channel in [("a publish to a pattern", 405, "/room/*"),
                                ("a publish to a bad channel name", 405, "/room/no such name"),
                                ("a call of an unknown service", 404, "/service/nobody")]:
        found = code_of(bob.say(channel, {}))
        check(f"{what} fails with {code}", found == code, found)
    alice.say("/deep/refused", {"number": 6})
    event = bob.event()
    check("refusals leave the session as it was", event["data"] == {"number": 6}, event)


def main():
    _, python, module = sys.argv[1:]
    with Server(python, module, "--timeout", "3") as server:
        alice, bob = open_users(server)
        talk(alice, bob)
        refuse(alice, bob)
        for user in alice, bob:
            close(user)
        server.restart()
        skip("recovery by itself", "it knows no other error of an unknown session than 403::Unknown client")
        alice, bob = open_users(server)
        check("new clients of the same names subscribe", all(user.begin("/room/one")["successful"] for user in (alice, bob)))
        alice.say("/room/one", {"number": 7})
        check("both hear alice after the restart", all(user.event()["data"] == {"number": 7} for user in (alice, bob)))
        for user in alice, bob:
            close(user)


run("PyPI python-bayeux over long-polling", 100, main)

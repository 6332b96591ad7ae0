#!/usr/bin/env python3
"""bayeux_server.py: live messages for small projects, in one file, standard library only.

Bayeux (the protocol of CometD) carries JSON *events* between browsers and a server over named
*channels*: a client subscribes to ``/chat/demo``, anybody publishes there, everybody subscribed
receives.  Between browser and server there is nothing but HTTP: the client keeps one request open,
and the server answers it when there is something to say (*long-polling*).  Clients that can may open
a WebSocket, or a stream of server-sent events, instead.

    python bayeux_server.py --port 8080 --docroot .        # serve this folder, and chat

    from bayeux_server import BayeuxServer, LocalClient    # or ten lines of your own

    with BayeuxServer(port=8080, docroot='.') as server:
        bot = LocalClient(server, 'bot')
        bot.subscribe('/chat/*', lambda message: print(message['data']))
        bot.publish('/chat/demo', {'user': 'bot', 'chat': 'Hello'})
        input('Enter stops the server.')

The way of one event, from the publisher's request to the subscriber's held one:

    publisher                                                           subscriber
        | POST [{"channel": "/chat/demo", "data": ...}]                     |
        v                                                                   |
    connection --> leader ------------> core --> session's queue            |
    (§11)          (§11), reads HTTP    (§7)     (§6)   |                   |
                   (§12)                                v                   v
                                        delivery (§9) --> the held /meta/connect (§11, §12),
                                                          or its WebSocket or event stream

One thread, the leader, does all of this.  What may take its time (the application's code, files, long
requests) it hands over to a handler thread, and goes on.

Contents.  A section uses only what stands above it.

    §1  Names and numbers     the vocabulary, channel names, limits
    §2  Channels              the grammar of names and patterns, the registry
    §3  Budgets and turns     how much may wait, how long anything may take; limits by address
    §4  Messages              errors, JSON in and out, events
    §5  Options               everything that can be set, and what its values may be
    §6  Sessions              a remote client as the server sees it; its queue, its held connect
    §7  The protocol          handshake, connect, subscribe, publish, services, extensions
    §8  Local clients         publishing and subscribing inside this process
    §9  The long-poll wait    the way out for events; one thread on one Condition
    §10 WebSocket frames      the codec of RFC 6455
    §11 Connections           the leader and the handler threads; sockets parked without a thread
    §12 HTTP transport        requests, long-polling, callback-polling, WebSocket, event streams
    §13 Files                 which files of a folder may be read, and as what they are sent
    §14 The server            BayeuxServer: the parts put together, the log, starting and stopping
    §15 Command line          arguments, logging, signals; what the demo page talks to

What it does not do: keep messages (an event goes to who is subscribed now), run on several
machines, speak HTTP/2, compress, or authenticate for you (see ``message_acl`` for where that goes).

The specification is "The Bayeux Protocol Specification 1.0"; sections of it are named in the code
like this: (Bayeux, "Connect Request").  The server succeeds POE::Component::Server::Bayeux; "the
original" below is that one.

MIT licence, see LICENSE.
"""
from __future__ import annotations

import argparse
import base64
import calendar
import codecs
import collections
import contextlib
import dataclasses
import difflib
import email.utils
import errno
import hashlib
import heapq
import http.server
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import mimetypes
import os
import queue
import random
import re
import secrets
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
import unicodedata
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from typing import Any, BinaryIO, NamedTuple

__all__ = ["BayeuxError", "BayeuxServer", "LocalClient", "OptionError", "Request", "Response", "Session"]
__version__ = "1.0"


# ======================================================================================
# §1  Names and numbers
#
# The vocabulary, used throughout:
#
#   session      the server's side of one remote client, from handshake to disconnect
#   client       only ever a LocalClient, a subscriber inside this process
#   channel      a name such as /chat/demo; a pattern is a name or a wildcard, /chat/*
#   message      one JSON object of the protocol; a batch is one array of them
#   event        a published message; a reply is the answer to one request message
#   connect      the message by which a client asks for events; the server may hold it,
#                that is, leave it unanswered until there is something to say
#   lease        how long a session lives unheard
#   transport    what carries batches; an exchange is one request of it and its answer
#   stream       a connection on which events leave as they come, without a connect to carry
#                them: a WebSocket, or server-sent events
#   connection   a socket
#
# Times are seconds, as floats.  Milliseconds stand only inside JSON and in names ending _ms.
# ======================================================================================

HANDSHAKE = "/meta/handshake"
CONNECT = "/meta/connect"
DISCONNECT = "/meta/disconnect"
SUBSCRIBE = "/meta/subscribe"
UNSUBSCRIBE = "/meta/unsubscribe"
PING = "/meta/ping"                     # no part of Bayeux 1.0; dojo's clients of 2008 send it
META, SERVICE = "/meta/", "/service/"   # channels of the protocol itself, and of private calls

# What the application's listeners may be told of (the original's Callback).
EVENTS = ("subscribe", "unsubscribe", "publish", "client_push", "client_connect", "client_disconnect")

VERSION = "1.0"                         # of the protocol: the newest and the oldest we speak
LONG_POLLING, CALLBACK_POLLING, WEBSOCKET = "long-polling", "callback-polling", "websocket"
EVENTSOURCE = "eventsource"             # Faye's: requests by POST, events as a stream of server-sent events
CROSS_ORIGIN = "cross-origin-long-polling"      # Faye's name for long-polling from another origin
CONNECTION_TYPES = (WEBSOCKET, LONG_POLLING, CALLBACK_POLLING, EVENTSOURCE)

MAX_CHANNEL_LENGTH = 255                # characters; a name of n segments lies in n + 1 patterns
MAX_JSON_DEPTH = 100                    # arrays and objects within each other; people use five
MAX_JSON_VALUES = 100_000               # arrays and objects of a request; to read more stops other threads for 50 ms
MAX_HEAD = 16 * 1024                    # bytes of request line and headers; Apache: 8 KiB a line
HEADS_KEPT, LONGEST_KEPT = 256, 2048    # so many request heads, as they were read, of up to so many bytes
MAX_HOST = 255                          # characters of Host; names of the DNS have up to 253
HOSTS_KEPT = 256                        # so many values of Host and Origin, as they were read
MAX_CALLBACK_LENGTH = 64                # characters of a JSONP callback's name
REMEMBERED_SESSIONS = 1000              # ended sessions whose reason is still told to a late client
MULTIPLE_CLIENTS_INTERVAL = 2.0         # seconds between polls of a crowded browser, or address; CometD: 2
TOO_FAST_INTERVAL = 1.0                 # seconds that a client pauses which has sent more than max_rate
BURST = 5.0                             # seconds' worth of max_rate that may come at once
UNKNOWN_CLIENTS = 30                    # connects of unknown clients, by address and minute, that cost no pause
UNKNOWN_CLIENT_PAUSE, LONGEST_PAUSE = 0.1, 5.0      # seconds of it for each that is more, and at most
REMEMBERED_ADDRESSES = 1000             # addresses of which is known what happened within the last minute
BUSY_RETRY = 5                          # seconds, in Retry-After, for who was over a limit
KEEP_ALIVE = 75.0                       # seconds an idle connection is kept; nginx: 75
LINGER = 2.0                            # seconds to let a refused client read why
LINES_KEPT = 10_000                     # of a log whose reader stands still; some 10 MB
LOG_PATIENCE = 1.0                      # seconds that the end waits for such a reader
SILENT_CONNECTIONS = 1000               # of one address, at most, on which nothing is held or streamed
SELECT_LIMIT = 512                      # sockets that select() bears on Windows; other systems have better
ACCEPT_BACKLOG = 1024                   # connections the kernel queues; socketserver's 5 drops some
RECEIVE_SIZE = 64 * 1024                # bytes read from a socket, or from a file, at a time
TURN = 0.005                            # seconds that a request may compute before others have their turn
SHORT_REQUEST = 8 * 1024                # bytes of a body that the leader reads itself; 2 ms at the very worst
SHORT_BATCH = 16                        # messages of a request that the leader handles itself
LOOKS_AT_ONCE = 512                     # at sockets, between two deliveries; 5,000 that hang up took 0.3 s
REQUESTS_AT_ONCE = 16                   # of one connection, before others have their turn
PARTS_AT_ONCE = 16                      # of one large output, likewise
CHUNK_PARTS_AT_ONCE = 1500              # sizes, data and ends of chunks of one body, likewise; 2 ms
MAX_ANSWER = 1024 * 1024                # bytes of events in one answer; the rest leaves with the next
ANSWERS_AT_ONCE = 32                    # connects answered between two looks at the queues
ROUNDS_AT_ONCE = 8                      # such looks, before more is read
FEW_ANSWERS = 8                         # that leave before the publisher's reply; more leave behind it
LONGEST_WAIT = 3600.0                   # seconds that a thread sleeps at once; Condition.wait bears no 300 years
FAILURE_PAUSE = 0.1                     # seconds that a loop of ours rests after a failure, which may come again
STUCK_AFTER = 1.0                       # seconds without a thread becoming free: what needs one is refused at once
LONGEST_QUEUE = 5.0                     # seconds that a request waits for a thread that is busy with others


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ======================================================================================
# §2  Channels
#
# A channel's name is a path: /chat/demo.  Nobody creates a channel, it is there while
# somebody is subscribed to it.  A subscription names a pattern: a channel, or a wildcard
# in the last place, where * stands for exactly one segment and ** for one or more.
#
#     /chat/*    matches /chat/demo, not /chat nor /chat/demo/sub
#     /chat/**   matches /chat/demo and /chat/demo/sub, not /chat
#     /*         matches /chat;    /**  matches every broadcast channel
#     /*/demo    is no pattern
#
# Names beginning /meta/ are the protocol's own, those beginning /service/ are private
# calls; neither is ever broadcast.  (Bayeux, "Channels", "Channel Globbing")
# ======================================================================================

#   channel_name     = "/" channel_segment *( "/" channel_segment )
#   channel_segment  = 1*( alpha | digit | "-" | "_" | "!" | "~" | "(" | ")" | "$" | "@" )
SEGMENT = r"[A-Za-z0-9\-_!~()$@]+"
CHANNEL_NAME = re.compile(rf"(?:/{SEGMENT})+")

#   channel_pattern  = channel_name | *( "/" channel_segment ) "/" ( "*" | "**" )
CHANNEL_PATTERN = re.compile(rf"(?:/{SEGMENT})*/(?:{SEGMENT}|\*\*?)")


def is_channel_name(value: str) -> bool:
    """Whether value names one channel."""
    return len(value) <= MAX_CHANNEL_LENGTH and is_written_as_name(value)


@lru_cache(maxsize=1024)                # the same few channels, again and again
def is_written_as_name(value: str) -> bool:
    return CHANNEL_NAME.fullmatch(value) is not None


def is_channel_pattern(value: str) -> bool:
    """Whether value can be subscribed to: a channel's name, or one ending in a wildcard."""
    return len(value) <= MAX_CHANNEL_LENGTH and CHANNEL_PATTERN.fullmatch(value) is not None


@lru_cache(maxsize=1024)
def patterns_matching(name: str) -> tuple[str, ...]:
    """Every pattern that matches the channel: itself, and a wildcard for each way up.

    >>> patterns_matching('/chat/demo')
    ('/chat/demo', '/chat/*', '/chat/**', '/**')
    """
    segments = name.split("/")[1:]
    parents = ["/".join([""] + segments[:depth]) for depth in range(len(segments) - 1, -1, -1)]
    return (name, parents[0] + "/*", *(parent + "/**" for parent in parents))


class ChannelRegistry:
    """Who is subscribed to what: a dict of sets, pattern to subscribers.

    A publish looks up as many patterns as the channel's name is deep; how many channels and clients
    there are does not matter.  (The original asked every client, for every event.)
    """

    def __init__(self) -> None:
        self._subscribers: dict[str, set] = {}
        self._patterns: dict[str, str] = {}

    def add(self, pattern: str, subscriber: Any) -> str:
        """The pattern comes back as one text for all its subscribers; that of each message would be another.

        (sys.intern would do the same, but CPython 3.12 never forgets what it was given.)
        """
        pattern = self._patterns.setdefault(pattern, pattern)
        self._subscribers.setdefault(pattern, set()).add(subscriber)
        return pattern

    def discard(self, pattern: str, subscriber: Any) -> None:
        subscribers = self._subscribers.get(pattern)
        if subscribers is not None:
            subscribers.discard(subscriber)
            if not subscribers:
                del self._subscribers[pattern], self._patterns[pattern]

    def subscribers(self, name: str) -> Iterable:
        """The subscribers of the channel, each once, however many of its patterns match."""
        matching = [self._subscribers[pattern] for pattern in patterns_matching(name) if pattern in self._subscribers]
        return matching[0] if len(matching) == 1 else set().union(*matching)


# ======================================================================================
# §3  Budgets and turns
#
# Nothing that one client does may stop the others.  Three rules see to that everywhere below:
#
#   budgets   Bytes that have to wait are counted where they are kept: the events that a session has
#             not fetched, the input and output of a connection, the mailboxes of the application's
#             callbacks.  Each has its budget, each address has one, and all together have
#             max_memory.  A budget is a share of max_memory, so one option sets them all.
#   turns     One thread, the leader, reads and answers everything that is short (§11).  A request
#             that may be long goes to a handler thread.  There one thread computes at a time,
#             for TURN seconds; then it lets the leader go round before it goes on.
#   addresses An address has its share of connections, sessions and handler threads.  Many people may
#             have one address, so no limit by address refuses what a living session sends: over the
#             limit a client is slowed down (§7).  A trusted proxy speaks for many, and has no limit.
#
# An event counts once, however many sessions wait for it, and as long as one of them does.
# ======================================================================================

# Shares of max_memory, and what they are with its default of 512 MiB:
SESSION_SHARE = 64                      # 8 MiB of events that one session has not fetched
MAILBOX_SHARE = 32                      # 16 MiB of events that a local client, or the listeners, have not handled
CONNECTION_SHARE = 32                   # 16 MiB that one connection has not taken in, or not sent to its end
ADDRESS_SHARE = 16                      # 32 MiB that the connections and subscriptions of one address keep
PLACE_SIZE = 9                          # bytes that an event takes in the queue of each session, more or less
HANDLED_FACTOR = 4                      # a request that is handled takes so many times its size: text, values, answer
SUBSCRIPTION_SIZE = 256                 # bytes that a subscription takes beside its pattern, more or less
LONGEST_ADDRESS = 64                    # characters of an IPv6 address in brackets with its port, and some more
NOTICE_SIZE = 512                       # bytes that a notice to listeners takes beside the event that it tells


@lru_cache(maxsize=4096)
def plain_address(text: str) -> str:
    """The IP address that the text names: without a port or a zone, and IPv4 where IPv6 only wraps it.

    'unknown' stands for every text that names none.
    """
    match = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*):\d*", text)
    written = (match[1] or match[2] or "") if match else text
    try:
        address = ipaddress.ip_address(written.partition("%")[0])
    except ValueError:
        return "unknown"
    return str(getattr(address, "ipv4_mapped", None) or address)


@lru_cache(maxsize=4096)
def address_group(address: str) -> str:
    """By what the limits by address count: of IPv6 the /64, all of which one machine may call its own.

    '' stands for those that have no limit: trusted proxies, which speak for many.
    """
    if ":" in address:
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    return address


class Addresses:
    """Which addresses are proxies that are trusted, and by what each address is counted.

    Arguments:
        proxies: IP addresses or networks, the option trusted_proxies.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        self._proxies = [ipaddress.ip_network(each, strict=False) for each in proxies]
        self.is_proxy = lru_cache(maxsize=4096)(self._is_proxy)
        self.group = lru_cache(maxsize=4096)(self._group)

    def _is_proxy(self, address: str) -> bool:
        try:
            return any(ipaddress.ip_address(address) in network for network in self._proxies)
        except ValueError:
            return False

    def _group(self, address: str) -> str:
        """The address_group; '' for a trusted proxy."""
        return "" if self._is_proxy(address) else address_group(address)

    def client(self, peer: str, forwarded: str | None) -> str:
        """The peer's address, or, where the peer is a trusted proxy, the last address that is no such proxy.

        Arguments:
            forwarded: the header X-Forwarded-For.  A peer that is not trusted may write into it what it likes.
        """
        address = peer
        if forwarded:
            elements = [each.strip() for each in forwarded.split(",") if each.strip()]
            while elements and self.is_proxy(address):
                address = plain_address(elements.pop()[:LONGEST_ADDRESS])
        return address


class LastMinute:
    """How often something has happened within the last minute, by address.

    It costs little, however many addresses there are: only the latest times of the latest addresses are kept.

    Arguments:
        most: it counts so far, and no further.
    """

    def __init__(self, clock: Callable[[], float], most: int) -> None:
        self._clock = clock
        self._most = most
        self._times: dict[str, collections.deque[float]] = {}       # the address that was noted last stands last

    def count(self, address: str) -> int:
        """How often it has happened."""
        times, begin = self._times.get(address, ()), self._clock() - 60.0
        return sum(time > begin for time in times)

    def note(self, address: str) -> int:
        """It happens.  How often it has, this time included."""
        times = self._times.pop(address, None) or collections.deque(maxlen=self._most)
        times.append(self._clock())
        self._times[address] = times
        while len(self._times) > REMEMBERED_ADDRESSES or not self.count(next(iter(self._times))):
            del self._times[next(iter(self._times))]
        return self.count(address)


class Rates:
    """Who sends more than max_rate: a token bucket for each session, or address.

    A bucket holds as many messages as may come at once, and fills again in time.  Only those that are not full
    are kept, so that a quiet session has none.

    Arguments:
        rate: messages a second.
    """

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}      # what is left, and since when; the latest last

    def admit(self, sender: str) -> bool:
        """Whether one more message may pass."""
        now = self._clock()
        with self._lock:
            left, since = self._buckets.pop(sender, (self._rate * BURST, now))
            left = min(self._rate * BURST, left + self._rate * (now - since))
            is_admitted = left >= 1
            self._buckets[sender] = (left - is_admitted, now)
            while self._buckets[next(iter(self._buckets))][1] <= now - BURST:      # full by now
                del self._buckets[next(iter(self._buckets))]
            return is_admitted


class Memory:
    """The bytes that wait in this process until somebody fetches them, or until the rest of them has come.

    Arguments:
        limit: bytes, the option max_memory.
        limits_addresses: whether one address may keep no more than its share.
        relieve: called without arguments, on any thread, when there are too many bytes; somebody must go.
    """

    def __init__(self, limit: int, limits_addresses: bool = True, relieve: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.session_limit = limit // SESSION_SHARE
        self.mailbox_limit = limit // MAILBOX_SHARE
        self.connection_limit = limit // CONNECTION_SHARE
        self.address_limit = limit // ADDRESS_SHARE if limits_addresses else math.inf
        self._relieve = relieve
        self._events = 0                        # bytes of events; the core's lock guards it
        self._ended_events: collections.deque[int] = collections.deque()    # sizes of those that nobody waits for now
        self._lock = threading.Lock()           # guards the others
        self._others = 0
        self._by_address: collections.Counter[str] = collections.Counter()

    def take_event(self, event: Event) -> None:
        """Count an event until nobody waits for it any more.  Under the core's lock."""
        event.when_ended = self._ended_events.append
        self._events += event.size
        while self._ended_events:
            self._events -= self._ended_events.popleft()
        if self._events + self._others > self.limit:
            self._relieve()

    def take_places(self, count: int) -> None:
        """Count places in the queue of a session.  Under the core's lock."""
        self._events += PLACE_SIZE * count

    def places_ended(self, count: int) -> None:
        """They are given back, on any thread and without a lock, like events."""
        self._ended_events.append(PLACE_SIZE * count)

    def take_for(self, address: str, size: int) -> None:
        """Count bytes that an address keeps; or, if size is negative, no longer keeps."""
        with self._lock:
            self._others += size
            self._by_address[address] += size
            if not self._by_address[address]:
                del self._by_address[address]
        if size > 0 and self._events + self._others > self.limit:
            self._relieve()

    def is_too_much_for(self, address: str, size: int = 0) -> bool:
        """Whether the address would keep more than its share with so many bytes more."""
        return address != "" and self._by_address[address] + size > self.address_limit

    @property
    def used(self) -> int:
        """Bytes that wait now.  Under the core's lock."""
        while self._ended_events:
            self._events -= self._ended_events.popleft()
        return self._events + self._others

    def has_room_for(self, address: str, size: int) -> bool:
        """Whether the address, and this process, may keep so many bytes more."""
        return not self.is_too_much_for(address, size) and self._events + self._others + size <= self.limit


class Turns:
    """Lets one handler thread compute at a time, and between two turns the leader.

    Threads of CPython share one interpreter.  One that computes lets go of it every 5 ms, and the leader must get it
    back after each of its system calls.  Beside thirty threads that compute, each would take the leader 150 ms.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()           # guards the next two
        self._waiting: dict[str, collections.deque[threading.Lock]] = {}        # by address, the next in turn first
        self._is_taken = False
        self._owner: int | None = None
        self._thread = threading.local()        # for whose address each thread works
        self._began = 0.0
        self.is_leader_busy = False             # set by the leader when something has come
        self.is_leader_awaited = False
        self._round_is_over = threading.Event()

    @contextlib.contextmanager
    def taken_for(self, address: str) -> Iterator[None]:
        """Have the turn while the block runs.  The addresses take turns, too, however many threads work for one."""
        self._thread.address = address
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        with self._lock:
            mine = None
            if self._is_taken:
                mine = threading.Lock()
                mine.acquire()
                self._waiting.setdefault(self._thread.address, collections.deque()).append(mine)
            self._is_taken = True
        if mine is not None:
            mine.acquire()                      # _end of another thread releases it, and so passes the turn on
        self._owner, self._began = threading.get_ident(), time.monotonic()

    def _end(self) -> None:
        self._owner = None
        with self._lock:
            if not self._waiting:
                self._is_taken = False
                return
            address = next(iter(self._waiting))
            line = self._waiting.pop(address)
            line.popleft().release()
            if line:
                self._waiting[address] = line   # behind all the others

    def is_here(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    def pause(self) -> bool:
        """Let the others go first, if this thread has had its time.  Called between two pieces of work.

        Returns:
            Whether it paused.
        """
        if time.monotonic() - self._began < TURN:
            return False
        self._end()
        self._round_is_over.clear()
        self.is_leader_awaited = True       # before the look, or its round may end unnoticed in between
        # A busy leader may have a great deal to do.  One that seems idle may be waiting for the interpreter: a thread
        # that lets go of it only for the moment of a system call would take it back before the leader wakes.
        self._round_is_over.wait(10 * TURN if self.is_leader_busy else TURN / 10)
        self._begin()
        return True

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the block runs, which may take its time, another thread has the turn; if this one has it at all."""
        if not self.is_here():
            yield
            return
        began = self._began                 # its turn goes on: many short calls must not make it a long one
        self._end()
        try:
            yield
        finally:
            self._begin()
            self._began = began

    def end_round(self) -> None:
        """The leader's: all that had come is done, and somebody waits for that."""
        self.is_leader_awaited = False
        self._round_is_over.set()


# ======================================================================================
# §4  Messages
#
# A message is a JSON object with a channel.  A client sends a batch, an array of them (or a
# single object), and gets a batch back: exactly one reply to each message, in order,
# whatever is wrong with it.  Only events come unasked.  (Bayeux, "Messages")
# ======================================================================================

# (Bayeux, "error"): error = code ":" args ":" text.  What the codes say here:
ERROR_MEANINGS = {
    400: "malformed: a field is missing, or is not what it must be",
    401: "no clientId",
    402: "the session is not known, or no longer",
    403: "refused",
    404: "no such meta channel, or no such service",
    405: "no channel name, or no pattern",
    409: "conflict: not in this state",
    413: "too large",
    429: "too many",
    500: "the application's code failed",
    503: "the server is busy, or stopping",
}
NOT_IN_ERRORS = re.compile(r"[^A-Za-z0-9 \-_!~()$@/*.]")


class BayeuxError(ValueError):
    """Why a message is refused; str() of it is the reply's error field, ``code:args:text``.

    Arguments:
        code: a key of ERROR_MEANINGS.
        argument: what it is about: a clientId, a channel's name, or ''.
        text: for people.
        fields: more for the reply, such as advice.

    Faye's client reads no code from an error that has other characters than the specification's, so
    any other becomes an underscore.
    """

    def __init__(self, code: int, argument: str, text: str, **fields: Any) -> None:
        shown = [NOT_IN_ERRORS.sub("_", part)[:150] for part in (argument, text)]
        super().__init__(":".join([str(code), *shown]))
        self.code = code
        self.text = shown[1]
        self.fields = fields

    @classmethod
    def from_text(cls, code: int, channel: str, text: str) -> BayeuxError:
        """The refusal in an application's words: a whole ``code:args:text``, or only the text."""
        parts = re.fullmatch(r"([1-9][0-9]{2}):([^:]*):(.*)", text, re.DOTALL)
        return cls(int(parts[1]), parts[2], parts[3]) if parts else cls(code, channel, text)


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def moderate_int(text: str) -> int:
    if len(text) > 300:                 # beyond a double's range, and quadratic to read
        raise ValueError("a number is too large")
    return int(text)


def object_of_unique_keys(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


JSON_DECODER = json.JSONDecoder(object_pairs_hook=object_of_unique_keys, parse_constant=refuse_constant,
                                parse_float=finite_float, parse_int=moderate_int)
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
JSON_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)     # a string; what stands in it is no bracket
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEPTH_CHANGES = [{"[": 1, "{": 1, "]": -1, "}": -1}.get(chr(byte), 0) for byte in range(256)]


def encode_json(value: Any) -> str:
    """The shortest JSON text of value.  TypeError or ValueError if there is none that can be sent as UTF-8."""
    text = JSON_ENCODER.encode(value)
    if not text.isascii():
        text.encode("utf-8")            # a lone surrogate fails here, where its sender is known
    return text


def json_depth(text: bytes) -> int:
    """How many arrays and objects lie within each other, at most.

    Without a loop of ours: 100,000 brackets take 4 ms instead of 20.
    """
    brackets = JSON_TEXT.sub(b"", text).translate(None, NOT_BRACKETS)
    return max(itertools.accumulate(map(DEPTH_CHANGES.__getitem__, brackets)), default=0)


def decode_json(body: bytes | str) -> Any:
    """The value of a JSON text from outside, or BayeuxError 400.

    Stricter than json.loads: no NaN, no duplicate keys (two readers would read two messages), no lone
    surrogates (they cannot be sent on as UTF-8), a bound on depth (our recursion, and the application's).
    """
    try:
        data = body.encode("utf-8") if isinstance(body, str) else body
        text = data.decode("utf-8")
        count = text.count("[") + text.count("{")
        if count > MAX_JSON_VALUES:
            raise ValueError(f"more than {MAX_JSON_VALUES} arrays and objects")
        if count > MAX_JSON_DEPTH and json_depth(data) > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")
        value = JSON_DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            encode_json(value)
        return value
    except json.JSONDecodeError as error:
        raise BayeuxError(400, "", f"Not JSON - {error.msg} at character {error.pos}") from None
    except UnicodeError:
        raise BayeuxError(400, "", "Not UTF-8") from None
    except ValueError as error:
        raise BayeuxError(400, "", f"Not JSON - {error}") from None


def decode_batch(texts: Iterable[bytes | str], limit: float = math.inf) -> list:
    """The messages of a request: each text holds one message, or an array of them; at most limit in all."""
    messages: list = []
    for text in texts:
        value = decode_json(text)
        messages.extend(value if isinstance(value, list) else [value])
        if len(messages) > limit:
            raise BayeuxError(413, "", f"The batch has more than {limit} messages")
    if not messages:
        raise BayeuxError(400, "", "The batch holds no message")
    return messages


def is_message_id(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def refusal(message: Any, error: BayeuxError) -> dict:
    """The reply to a refused message: what it had and can be repeated, and why.  (Bayeux, "error")"""
    reply: dict = {"successful": False, "error": str(error)}
    if not isinstance(message, dict):
        return reply
    if isinstance(message.get("channel"), str):
        reply["channel"] = message["channel"]
    if is_message_id(message.get("id")):
        reply["id"] = message["id"]
    if message.get("channel") in (SUBSCRIBE, UNSUBSCRIBE) and "subscription" in message:
        reply["subscription"] = message["subscription"]
    if message.get("channel") == HANDSHAKE:
        # No second try would fare better, except with other credentials.
        reply["advice"] = {"reconnect": "handshake" if error.code == 401 else "none"}
    return {**reply, **error.fields}


def success_text(channel: str, id: Any) -> str:
    """The JSON text of a reply with channel, successful and the id as it came, if one did.

    For a channel whose name is known to be one: no character of it needs an escape.
    """
    if id is None:
        return f'{{"channel":"{channel}","successful":true}}'
    is_plain = isinstance(id, str) and id.isalnum() and id.isascii()
    shown = f'"{id}"' if is_plain else encode_json(id)
    return f'{{"channel":"{channel}","successful":true,"id":{shown}}}'


def with_fields(text: str, fields: dict) -> str:
    """The JSON object of text with more fields; an ext is merged into the one that is there."""
    message = json.loads(text)
    if "ext" in fields and isinstance(message.get("ext"), dict):
        fields = dict(fields, ext={**message["ext"], **fields["ext"]})
    return encode_json({**message, **fields})


def timestamp_now() -> str:
    """(Bayeux, "timestamp"): YYYY-MM-DDThh:mm:ss.ss in GMT."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 100):02d}"


def is_time_ms(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e15       # 30,000 years; beyond, sums lose their milliseconds


class TimeSync(NamedTuple):
    """What ext.timesync of a request said, and when it came."""

    client_time_ms: float
    lag_ms: float
    offset_ms: float
    received_ms: float

    @classmethod
    def of(cls, message: dict) -> TimeSync | None:
        ext = message.get("ext")
        asked = ext.get("timesync") if isinstance(ext, dict) else None
        if not isinstance(asked, dict) or not is_time_ms(asked.get("tc")):
            return None
        lag, offset = (asked[key] if is_time_ms(asked.get(key)) else 0 for key in ("l", "o"))
        return cls(asked["tc"], lag, offset, time.time() * 1000)

    def reply(self) -> dict:
        """tc their time, ts ours at receipt, p how long we held it, a how far their idea of our time was off.

        All are there, and numbers: dojox computes NaN without a.
        """
        held_ms = max(0, round(time.time() * 1000 - self.received_ms))
        accuracy_ms = round(self.client_time_ms + self.offset_ms + self.lag_ms - self.received_ms)
        return {"tc": self.client_time_ms, "ts": round(self.received_ms), "p": held_ms, "a": accuracy_ms}


class Event:
    """A published message.  Its JSON text is made once, for all subscribers.

    The text holds channel, data, the publisher's ext, and nothing else of the publisher's message.  In
    particular never its clientId: whoever knows it can act as that client.  Nor its id, unless told to:
    aiocometd takes an event with an id for a reply, and loses it.  Only subscribers in this process
    see both.  (Bayeux, "Delivery", "clientId")
    """

    __slots__ = ("channel", "client_id", "id", "is_lazy", "size", "text", "when_ended")

    def __init__(self, fields: dict, client_id: str | None = None, id: Any = None, is_lazy: bool = False) -> None:
        self.when_ended: Callable[[int], None] | None = None        # told the size when nobody waits for it any more
        self.channel = fields["channel"]
        self.is_lazy = is_lazy
        self.text = encode_json(fields)
        self.client_id = client_id
        self.id = id
        self.size = sys.getsizeof(self.text)

    def __del__(self) -> None:
        """An event lives as long as somebody waits for it.  This may run at any moment, so it takes no lock."""
        if self.when_ended is not None:
            self.when_ended(self.size)

    def local_message(self) -> dict:
        """A new dict each time, so that one subscriber's changes are nobody else's."""
        message = json.loads(self.text)
        if self.client_id is not None:
            message["clientId"] = self.client_id
        if self.id is not None:
            message["id"] = self.id
        return message

    def notice(self) -> dict:
        """For the server's listeners."""
        message = self.local_message()
        return {"channel": self.channel, "data": message["data"], "client_id": self.client_id, "id": self.id,
                "ext": message.get("ext")}


class Parcel(tuple):
    """Events that were published together on one channel.

    Most subscribers of a channel get the same events in the same answer, and nothing else with them.  What these
    answers have in common is made once, not once for each.
    """

    @cached_property
    def text(self) -> str:
        """The JSON of all, with commas between."""
        return ",".join([event.text for event in self])

    @cached_property
    def packets(self) -> dict[type, bytes]:
        """By kind of stream: the bytes that carry just these events."""
        return {}

    @cached_property
    def size(self) -> int:
        """Bytes of all."""
        return sum([event.size for event in self])


class Backlog(list):
    """Events that have piled up for one session, more than one parcel.

    Attributes:
        size: bytes of the events.

    Its own memory is counted, too: a place in the list for each event, which no other session shares.
    """

    __slots__ = ("_memory", "_places", "size")

    def __init__(self, events: Iterable[Event], memory: Memory) -> None:
        self._memory, self._places = memory, 0
        super().__init__(events)
        self.size = sum([event.size for event in self])
        self._count_places()

    def extend(self, events: Parcel) -> None:
        super().extend(events)
        self.size += events.size
        self._count_places()

    def _count_places(self) -> None:
        self._memory.take_places(len(self) - self._places)
        self._places = len(self)

    def __del__(self) -> None:
        self._memory.places_ended(self._places)


def count_for_answer(events: Sequence[Event], limit: float) -> int:
    """How many of the events one answer carries: at most limit, and MAX_ANSWER bytes; but always the first."""
    size = 0
    for count, event in enumerate(events):
        size += event.size
        if count >= limit or (count and size > MAX_ANSWER):
            return count
    return len(events)


# ======================================================================================
# §5  Options
#
# All that can be set about a server, in one table.  A row gives an option's name, its default, the kind of
# its value and its line of --help; the command line is made from the same rows.  A mistake is refused
# when the server is made, with the name of the option, its value and what is allowed.
# ======================================================================================

# -- Hosts and origins -----------------------------------------------------------------------

#   RFC 3986, "Host": a name, an IPv4 address, or an IPv6 address in brackets; then perhaps a port
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::([0-9]{0,5}))?")
DEFAULT_PORTS = {"http": 80, "https": 443}


class Authority(NamedTuple):
    """Where a request goes, or a page came from: a name in lower case, and a port if one is given."""

    host: str
    port: int | None


def read_authority(text: str) -> Authority | None:
    """The value of Host, or what stands behind the :// of an origin; None if that is neither name nor address."""
    return read_kept_authority(text) if len(text) <= MAX_HOST else None


@lru_cache(maxsize=HOSTS_KEPT)
def read_kept_authority(text: str) -> Authority | None:
    match = AUTHORITY.fullmatch(text)
    host = match[1].lower().removesuffix(".") if match else ""
    if host == "" or (host.startswith("[") and not is_address(host)):
        return None
    return Authority(host, int(match[2]) if match[2] else None)


class Origin(NamedTuple):
    """Where a page came from.  (RFC 6454)"""

    scheme: str
    host: str
    port: int


def read_origin(text: str) -> Origin | None:
    """None for an origin that is not of http or https: null, that of an extension, nonsense."""
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    authority = read_authority(rest) if scheme in DEFAULT_PORTS else None
    if authority is None:
        return None
    return Origin(scheme, authority.host, DEFAULT_PORTS[scheme] if authority.port is None else authority.port)


def is_address(host: str) -> bool:
    """Whether a name of an Authority is an IP address."""
    try:
        return bool(ipaddress.IPv6Address(host[1:-1]) if host.startswith("[") else ipaddress.IPv4Address(host))
    except ValueError:
        return False


# -- The table -------------------------------------------------------------------------------

class OptionError(ValueError):
    """An option of the server has a value it may not have.  The text names option, value and what is allowed."""


class Kind(NamedTuple):
    """What values an option takes: in words, as a test, and as read from a command line."""

    allowed: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any] | None = None
    many: bool = False
    shown: str = "TEXT"                 # in --help


def whole(low: int, high: float = math.inf) -> Kind:
    words = f"a whole number from {low} to {high}" if high < math.inf else f"a whole number, {low} or more"
    return Kind(words, lambda value: is_number(value) and isinstance(value, int) and low <= value <= high,
                int, shown="NUMBER")


def seconds(low: float = 0.0) -> Kind:
    words = "a number of seconds, %s" % (f"{low:g} or more" if low else "0 or more")
    return Kind(words, lambda value: is_number(value) and value >= low, float, shown="SECONDS")


def names(words: str, accepts: Callable[[str], bool] = bool) -> Kind:
    """Several texts.  A lone text is refused: its characters would be taken for the members."""
    return Kind("a list of " + words, lambda value: isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(each, str) and accepts(each) for each in value), str, True)


def table(words: str, accepts: Callable[[Any, Any], bool], read: Callable[[str], Any] | None = None) -> Kind:
    return Kind(words, lambda value: isinstance(value, Mapping) and all(
        accepts(key, entry) for key, entry in value.items()), read, read is not None)


def is_network(value: str) -> bool:
    try:
        return bool(ipaddress.ip_network(value, strict=False))
    except ValueError:
        return False


def is_origin(value: str) -> bool:
    return value == "*" or (read_origin(value) is not None and "*" not in value)


def is_host(value: str) -> bool:
    """A name or address without a port, or *."""
    authority = read_authority(value)
    return value == "*" or (authority is not None and authority.port is None and value[-1:] not in ("", ":")
                            and "*" not in value)


def read_type_expires(text: str) -> tuple[str, int]:
    mime_type, _, lifetime = text.partition("=")
    return mime_type.strip(), int(lifetime)


SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text that is not empty", lambda value: isinstance(value, str) and value != "", str)
PATH = Kind("a file's path, or None", lambda value: value is None or isinstance(value, (str, os.PathLike)), str,
            shown="FILE")
FOLDER = Kind("a folder that exists, or None",
              lambda value: value is None or (isinstance(value, (str, os.PathLike)) and os.path.isdir(value)), str,
              shown="FOLDER")
FILE_NAMES = names("file names", lambda name: name != "" and "/" not in name)
ORIGINS = names("origins such as https://example.org, or *", is_origin)
HOSTS = names("host names such as example.org, or *", is_host)
NETWORKS = names("IP addresses or networks", is_network)
PATTERNS = names("channels or patterns such as /chat/*", is_channel_pattern)
FUNCTION = Kind("a function, or None", lambda value: value is None or callable(value))
FUNCTIONS = table("a mapping of names to functions",
                  lambda name, function: isinstance(name, str) and callable(function))
URL_PATH = Kind("an absolute path such as /cometd", lambda value: isinstance(value, str)
                and re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) is not None, str)
TYPE_EXPIRES = table("MIME types with whole seconds, image/png=3600", lambda mime_type, lifetime: (
    isinstance(mime_type, str) and "/" in mime_type and is_number(lifetime) and lifetime >= 0), read_type_expires)
EXTENSIONS = Kind("a list of objects with incoming(session, message) or outgoing(session, message)",
                  lambda value: isinstance(value, (list, tuple)) and all(
                      hasattr(each, "incoming") or hasattr(each, "outgoing") for each in value))
TLS_CONTEXT = Kind("an ssl.SSLContext, or None", lambda value: value is None or isinstance(value, ssl.SSLContext))


# ruff: noqa: RUF009 (what option() returns is a dataclasses.field, and a default of nobody's)
def option(default: Any, kind: Kind, help_text: str, flag: str | None = None) -> Any:
    """A row of Options; it is on the command line when its kind can be read there."""
    metadata = {"kind": kind, "help": help_text, "flag": flag}
    if default == {}:                   # a new one for each server
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that can be set, the keywords of BayeuxServer; most are flags too (--help).

    Raises:
        OptionError: a value is not of its kind, or two options contradict each other.
    """

    # Where it listens, and what it serves
    host: str = option("127.0.0.1", TEXT, "address to listen on; 0.0.0.0 is every one of this machine")
    port: int = option(8080, whole(0, 65535), "TCP port; 0 takes any free one")
    path: str = option("/cometd", URL_PATH, "where Bayeux is spoken, with every path below it")
    alias: str = option("bayeux", TEXT, "name by which LocalClient finds the server in this process")
    docroot: str | None = option(None, FOLDER, "folder of static files (on the command line: .)")
    directory_index: Iterable[str] = option(
        ("index.html",), FILE_NAMES, "file shown for a folder, in order of preference", "--directory-index")
    type_expires: Mapping[str, int] = option({}, TYPE_EXPIRES, "how long browsers may keep a type of files, in s")
    tls_cert: str | None = option(None, PATH, "certificate chain (PEM): serve HTTPS; needs --tls-key")
    tls_key: str | None = option(None, PATH, "private key (PEM) of --tls-cert")
    tls_context: ssl.SSLContext | None = option(None, TLS_CONTEXT, "TLS as you set it up yourself")

    # Who may do what
    anon_publish: bool = option(False, SWITCH, "let remote clients publish without a handshake")
    allowed_origins: Iterable[str] = option(
        (), ORIGINS, "other site whose pages may use this server; * is any, but browsers then refuse clients that send "
        "credentials, as CometD's and dojo's do over long-polling", "--allowed-origin")
    allowed_hosts: Iterable[str] = option(
        (), HOSTS, "name by which clients may ask for this server, beside addresses, localhost and --host; * is any",
        "--allowed-host")
    trusted_proxies: Iterable[str] = option((), NETWORKS, "proxy whose X-Forwarded-For and -Proto are believed",
                                            "--trusted-proxy")
    bind_sessions: bool = option(False, SWITCH, "a session works only with the cookie of its handshake")

    # Times of the protocol
    timeout: float = option(30.0, seconds(), "how long a /meta/connect is held")
    interval: float = option(0.0, seconds(), "how long clients pause between two connects")
    connect_timeout: float = option(120.0, seconds(0.001), "how long a session lives without an open /meta/connect")
    request_timeout: float = option(
        30.0, seconds(0.001), "how long a client may take to send a request, or to take in an answer")
    ping_interval: float = option(
        30.0, seconds(), "how long a WebSocket may be silent before it is pinged, and then closed; 0: for ever")
    max_inactivity: float = option(
        0.0, seconds(), "how long a session may send nothing but /meta/connect before it is ended; 0: for ever")
    max_lazy: float = option(5.0, seconds(), "how long an event on a lazy channel may wait")
    grace: float = option(5.0, seconds(), "how long stopping may take")

    # Limits
    client_max_connections: int = option(
        10, whole(0), "connections that one address keeps open: held connects, WebSockets, event streams; further "
        "clients of it are told to poll; 0: this, and no other limit by address either")
    max_sessions: int = option(20_000, whole(1), "sessions at once")
    max_sessions_per_browser: int = option(
        4, whole(0), "held connects of one browser, by its cookie; further sessions are told to poll; 0: no limit")
    max_subscriptions: int = option(1000, whole(1), "subscriptions of one session")
    max_queue: int = option(10_000, whole(1), "events that may wait for one session; one more ends it")
    max_rate: int = option(
        0, whole(0), "messages a second of one session, five times as many at once; connects are free; 0: no limit")
    max_batch: int = option(1000, whole(1), "messages of one request or WebSocket frame")
    max_sessions_per_connection: int = option(100, whole(1), "sessions that connect over one WebSocket")
    max_memory: int = option(512 * 1024 * 1024, whole(1024 * 1024), "bytes that may wait in all, events and requests; "
                             "beyond, the sessions and connections that keep most are ended")
    max_frame_events: int = option(
        100, whole(1), "events that leave together in one WebSocket frame, or one server-sent event")
    max_message_size: int = option(64 * 1024, whole(1), "bytes of one message")
    max_request_size: int = option(1024 * 1024, whole(1), "bytes of one request's body")
    max_threads: int = option(64, whole(2), "handler threads at most")

    # Extensions of the protocol
    ack: bool = option(True, SWITCH, "acknowledged delivery for clients that ask for it")
    lazy_channels: Iterable[str] = option(
        (), PATTERNS, "channel or pattern whose events wait for the next delivery", "--lazy-channel")
    json_comment_filtered: bool = option(True, SWITCH, "replies as /*[...]*/ for old clients that ask for it")
    timesync: bool = option(True, SWITCH, "answer ext.timesync, by which a client learns our clock")
    timestamp: bool = option(False, SWITCH, "put our time into replies and events")
    forward_id: bool = option(False, SWITCH, "send events with their publisher's id (some clients then lose them)")
    extensions: Iterable[Any] = option((), EXTENSIONS, "your own: incoming and outgoing methods")

    # The application's code
    services: Mapping[str, Callable] = option({}, FUNCTIONS, "name of /service/<name>, and what answers it")
    message_acl: Callable | None = option(None, FUNCTION, "called with session and message: text refuses")
    callback: Callable | None = option(None, FUNCTION, "told of subscribe, publish, client_connect, ...")
    content_handlers: Mapping[str, Callable] = option({}, FUNCTIONS, "URL path prefix, and what answers it")
    post_handle: Callable | None = option(None, FUNCTION, "called with request and response of plain HTTP")

    # Logging
    debug: bool = option(False, SWITCH, "log every message")
    log_file: str | None = option(None, PATH, "log into this file")

    def __post_init__(self) -> None:
        for row in dataclasses.fields(self):
            value, kind = getattr(self, row.name), row.metadata["kind"]
            if not kind.accepts(value):
                raise OptionError(f"{row.name} is {value!r}: it must be {kind.allowed}")
        if self.interval >= self.connect_timeout:
            raise OptionError(f"interval is {self.interval!r}: it must be less than connect_timeout, "
                              f"{self.connect_timeout!r}, or every session would end between two connects")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError(f"tls_cert is {self.tls_cert!r} and tls_key is {self.tls_key!r}: give both, or none")
        if self.tls_cert is not None and self.tls_context is not None:
            raise OptionError(f"tls_cert is {self.tls_cert!r}: with tls_context it must be None")
        largest = self.max_memory // ADDRESS_SHARE // HANDLED_FACTOR
        if self.max_request_size > max(largest, Options.max_request_size):
            raise OptionError(f"max_request_size is {self.max_request_size!r}: it must be at most a 64th of max_memory, "
                              f"{largest}, or an address would have no room for such a request")
        for prefix in self.content_handlers:
            if not prefix.startswith("/") or prefix == self.path:
                raise OptionError(f"content_handlers has {prefix!r}: it must be a path that begins with / and "
                                  f"is not {self.path}")

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Options:
        known = [row.name for row in dataclasses.fields(cls)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise OptionError("{} is no option{}".format(name, f"; did you mean {near[0]}?" if near else ""))
        return cls(**keywords)


# ======================================================================================
# §6  Sessions
#
# A session begins with a handshake and ends when its client disconnects, is not heard of for
# connect_timeout, lets more than max_queue events pile up, or the server stops; a held connect
# is answered then, too.  Over HTTP (Bayeux, "Client State Table", seen from the server):
#
#   state \ event  | connect            | event              | its time is over      | connection lost
#   ---------------+--------------------+--------------------+-----------------------+----------------
#   new            | answer at once     | queue it           | lease: ended          | -
#                  |   -> connected     |                    |                       |
#   connected      | hold it -> held    | queue it           | lease: ended          | -
#                  |  (or answer it, see|                    |                       |
#                  |   _connect in §7)  |                    |                       |
#   held           | answer the older,  | queue it, answer   | timeout: answer       | -> connected,
#                  |   hold the newer   |   with the queue   |   without events      |   queue kept
#                  |                    |   -> connected     |   -> connected        |
#   ended          | refuse it with 402, advice handshake
#
# How events leave.  They wait in the queue until something can carry them: a held connect, or
# a stream.  In all cases the order is kept and what is known to be lost is sent again:
#
#   in flight       While events are on their way into a socket no others of the session leave, so
#                   that they can go back to the front of the queue if they cannot be written.
#   acknowledged    Where the client asked for it (ext.ack), events leave with replies to connects
#                   only.  These are numbered, and the events of each are kept until the client
#                   has named its number: the written may be lost, too.  Then nothing is in flight.
#   lazy            Events on lazy_channels do not set a delivery going.  They leave with the next
#                   one, or when max_lazy is over; until then the queue is not *urgent*.
#
# Methods that take the core are called by it, under its lock (§7).  At the end of the section
# stands Mailbox, by which the application's own callbacks are called.
# ======================================================================================

# Why a session ended; the words are told to its client if it comes back, and to callbacks.
ENDED_ASKED = "asked"
ENDED_TIMEOUT = "timeout"
ENDED_QUEUE = "queue overflow"
ENDED_SHUTDOWN = "server shutdown"
ENDED_INACTIVE = "inactivity"
ENDED_MEMORY = "lack of memory"

# Why a client is told to come less often.
SLOWED_BROWSER = "multiple clients of its browser"
SLOWED_ADDRESS = "connections kept open by its address"
SLOWED_RATE = "messages a second"


MAKING_FLAGS = threading.Lock()         # held for a moment, at the first use of a session's flags


class Exchange:
    """One request of a transport and its answer, as far as the core needs to know it.

    Attributes:
        transport: the connection type that carries it.
        address: the client's IP address.
        is_forwarded: whether the client says that it speaks for another, and is no trusted proxy.
        browser: the BAYEUX_BROWSER cookie that came, or None.
        may_hold: False when another request waits behind this one on its connection.
        is_large: whether one of its messages may be larger than max_message_size.
        stream: what sends events at any time, where the transport has such a thing; or None.
        hold: the /meta/connect that is held here, or None.
        comment_filtered: whether a session that asked for it is served.
    """

    __slots__ = ("comment_filtered", "hold")
    transport = LONG_POLLING
    address = ""
    is_forwarded = False
    browser: str | None = None
    may_hold = True
    is_large = False
    stream: Stream | None = None

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self.comment_filtered = False

    def name_browser(self) -> str | None:
        """The browser's name, given to it now if it has none (where the transport can)."""
        return self.browser

    def give_up(self) -> None:
        """No answer can be made; the client must not wait for one."""

    def is_gone(self) -> bool:
        """Whether the client has hung up, so that nobody waits for the rest of its batch to be handled."""
        return False

    def pack(self, answer: Answer) -> bytes:
        """The bytes in which the answer leaves."""
        raise TypeError(f"{type(self).__name__} has no way to pack")

    def send(self, answer: Answer) -> bool | None:
        """Write the answer's packet, without blocking.  True: written; False: lost; None: settled later."""
        raise TypeError(f"{type(self).__name__} has no way to send")


class Stream(Exchange):
    """A connection on which events are sent as they come, without a held connect to carry them.

    Attributes:
        sessions: those whose events go this way.
        carries_requests: whether its client's connects come this way, too; one that comes another way has left it.
        is_counted: among the connections that its address keeps open.
    """

    __slots__ = ("is_counted", "sessions")
    carries_requests = False

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[Session, None] = {}         # one mostly, but a socket may carry thousands
        self.is_counted = False

    def feed(self, broadcast: Broadcast, session: Session) -> bool:
        """Write the session's part of a broadcast.  False: not written yet, or lost; settling it is seen to."""
        raise TypeError(f"{type(self).__name__} has no way to send")


class Hold(NamedTuple):
    """A /meta/connect that waits for its answer."""

    session: Session
    exchange: Exchange
    reply: str                          # as JSON
    timesync: TimeSync | None
    deadline: float


class Answer:
    """What leaves at once: replies to one request, events of one session, or both, in this order."""

    __slots__ = ("events", "exchange", "late_fields", "packet", "replies", "session")

    def __init__(self, exchange: Exchange, replies: list[str], session: Session | None = None,
                 events: Iterable[Event] = (), late_fields: Callable[[], dict] | None = None) -> None:
        self.exchange = exchange
        self.replies = replies
        self.session = session
        self.events = events
        self.late_fields = late_fields
        self.packet: bytes | None = None        # once its exchange has packed it

    @property
    def exchanges(self) -> list[Exchange]:
        """All those on which it is to leave."""
        return [self.exchange]

    def batch(self) -> str:
        """The JSON array.  The reply to a plain connect is not encoded again: its text was made when it was held."""
        replies = self.replies
        if self.late_fields is not None:
            replies = [with_fields(replies[0], self.late_fields())]
        texts = [self.events.text] if isinstance(self.events, Parcel) else [event.text for event in self.events]
        return f"[{','.join([*replies, *texts])}]"


class Broadcast(Answer):
    """The same events for several sessions, each on a stream of its own: packed once, and settled together.

    Attributes:
        ways: the sessions, each with the stream that it had when the events were taken; all streams are of one
            kind.  Once it is sent, only those whose fate is known, and settled with it, are left.
    """

    __slots__ = ("ways",)

    def __init__(self, stream: Stream, events: Sequence[Event]) -> None:
        super().__init__(stream, [], None, events)
        self.ways: list[tuple[Session, Stream]] = []

    @property
    def exchanges(self) -> list[Exchange]:
        return [stream for _, stream in self.ways]


class Acknowledgement:
    """What must be remembered of a session whose client acknowledges what it gets.  (CometD's ack extension)

    Attributes:
        number: of the latest reply to a connect.
        sent: the events of such replies that may have to leave again, with the numbers of the replies that took each.
        sent_again: the same of events that are in the queue once more.
        size: bytes of those sent.
    """

    __slots__ = ("number", "sent", "sent_again", "size")

    def __init__(self) -> None:
        self.number = 0
        self.size = 0
        self.sent: dict[Event, tuple[int, ...]] = {}
        self.sent_again: dict[Event, tuple[int, ...]] = {}

    def take_out(self, event: Event) -> None:
        """The event leaves with the reply of this number, and may have to leave again."""
        numbers = self.sent_again.pop(event, ())
        self.sent[event] = (*numbers[-9:], self.number)
        self.size += event.size

    def pending(self, seen: float, queue: Sequence[Event], memory: Memory) -> Backlog:
        """The queue as it is once the client has named the last reply that it saw; what later ones took comes first.

        A connect may be late: its client has long given it up, and come back.  Its number is old, then, and
        events leave again that have been seen.  So an event remembers all the replies it left with, and the
        client has seen it if it names one of them.
        """
        known = {event for event, numbers in self.sent_again.items() if seen in numbers}
        for event in known:
            del self.sent_again[event]
        missed = {event: numbers for event, numbers in self.sent.items() if seen not in numbers and numbers[-1] > seen}
        self.sent, self.size = {}, 0
        self.sent_again.update(missed)
        return Backlog([*missed, *[event for event in queue if event not in known]], memory)


class Session:
    """A remote client.  Everything that is not documented here belongs to the core and its lock.

    Attributes:
        id: its clientId; None for whoever publishes without a handshake.
        address: IP address of its handshake.
        transport: the connection type of its latest connect.
        created: when it began, seconds since 1970.
        flags: a dict for the application, for example to remember in message_acl who logged in.
        subscriptions: the patterns that it is subscribed to.
        ended: why it ended, or None.
        ack: whether delivery is acknowledged.
    """

    __slots__ = ("__weakref__", "_flags", "acknowledgement", "active", "address", "browser", "comment_filtered",
                 "connected", "created", "ended", "hold", "id", "in_flight", "is_ready", "is_urgent",
                 "lazy_deadline", "lease", "patterns", "queue", "slowed", "stream", "timer", "transport")

    def __init__(self, id: str | None, exchange: Exchange) -> None:
        self.id = id
        self.address = exchange.address
        self.browser = exchange.browser
        self.transport = exchange.transport
        self.created = time.time()
        self._flags: dict | None = None     # few use it, and ten thousand empty ones take 640 KiB
        self.patterns: dict[str, None] = {}     # subscribed to; in a third of a set's memory
        self.ended: str | None = None
        self.comment_filtered = False
        self.connected = False              # had its first connect answered
        self.slowed = ""                    # why its client was told to come less often; "": it was not, or no longer
        self.active = 0.0                   # when it last sent something else than a connect
        self.queue: Parcel | Backlog | tuple[()] = ()       # a Parcel is shared with others
        self.is_urgent = False              # the queue is to be delivered now: not all in it is lazy
        self.lazy_deadline = math.inf       # when it is to be delivered, at the latest
        self.in_flight: Exchange | None = None      # on which events are on their way; the next wait for their fate
        self.acknowledgement: Acknowledgement | None = None
        self.stream: Stream | None = None
        self.hold: Hold | None = None
        self.is_ready = False               # stands in the core's queue of sessions with something to say
        self.lease = math.inf               # when it ends, unless it is heard of before
        self.timer: float | None = None     # when it is looked at next

    def __repr__(self) -> str:
        return f"<Session {self.id} from {self.address}>"

    def __lt__(self, other: Session) -> bool:
        """Which comes first of two that are to be looked at in the same moment: all the same."""
        return False

    def accept(self, events: Parcel, core: Bayeux) -> None:
        """Queue events of one channel.  Under the lock.

        What has come before and has not been fetched is held against the session, not the new events, of which there
        may be many at once; and nothing is as long as the server itself has only not yet sent it.
        """
        has_too_much = (self.queue or self.acknowledgement) and self.has_too_much(core)
        if has_too_much and not self.can_take_events:
            core.overfull.append(self)
            return
        if not self.queue:
            self.queue = events
        elif isinstance(self.queue, Backlog):
            self.queue.extend(events)
        else:
            self.queue = Backlog([*self.queue, *events], core.memory)
        if events[0].is_lazy and not has_too_much:
            core.delay(self)
        elif not self.is_urgent:            # else it is ready already, or cannot be
            self.is_urgent = True
            if self.can_take_events and not self.is_ready:      # make_ready, written out
                self.is_ready = True
                core.ready.append(self)

    def has_too_much(self, core: Bayeux) -> bool:
        """Whether as much waits for it as may, in events or in bytes."""
        return self.waiting >= core.options.max_queue or self.waiting_size >= core.memory.session_limit

    def forget(self, pattern: str) -> None:
        """The subscription is over.  Under the lock."""
        self.patterns.pop(pattern, None)

    def acknowledge(self, number: Any, memory: Memory) -> None:
        """The client has seen the replies up to number (it may begin with null, 0 or -1).  Under the lock."""
        waiting = len(self.queue)
        self.queue = self.acknowledgement.pending(number if is_number(number) else 0, self.queue, memory)
        self.is_urgent = len(self.queue) > waiting or (self.is_urgent and bool(self.queue))

    def end(self, reason: str, core: Bayeux) -> None:
        """Leave the server.  Under the lock."""
        core.end_session(self, reason)

    @property
    def ack(self) -> bool:
        return self.acknowledgement is not None

    @property
    def flags(self) -> dict:
        if self._flags is None:
            with MAKING_FLAGS:          # two requests of the session may be at it
                self._flags = {} if self._flags is None else self._flags
        return self._flags

    @property
    def subscriptions(self) -> set[str]:
        return set(self.patterns)

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.time() - self.created

    @property
    def waiting(self) -> int:
        """How many events wait for it, those included that it has not acknowledged."""
        return len(self.queue) + (len(self.acknowledgement.sent) if self.acknowledgement else 0)

    @property
    def waiting_size(self) -> int:
        """Bytes of those events."""
        return (self.queue.size if self.queue else 0) + (self.acknowledgement.size if self.acknowledgement else 0)

    @property
    def uses_stream(self) -> bool:
        """With acknowledgement events leave with replies to connects only, whatever the transport."""
        return self.stream is not None and self.acknowledgement is None

    @property
    def can_take_events(self) -> bool:
        return (self.hold is not None or self.uses_stream) and not self.in_flight

    @property
    def deadline(self) -> float | None:
        """When something must be done about it: its queue delivered, its connect answered, or itself ended."""
        if self.ended:
            return None
        if self.hold is None and self.in_flight:
            return None
        deadline = self.lease if self.hold is None else self.hold.deadline
        return self.lazy_deadline if self.lazy_deadline < deadline and self.can_take_events else deadline


def is_for_application(fault: BaseException) -> bool:
    """Whether it is Ctrl-C in the main thread, which means the application and not us."""
    return isinstance(fault, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class SafeLogger(logging.LoggerAdapter):
    """A logger that never raises.

    The handlers of a log are the application's, and may fail too.  A thread that others need must not end by that.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **kwargs)
        except BaseException as fault:
            if is_for_application(fault):
                raise


class ApplicationFault(Exception):
    """The application's code failed.  That has been logged; the text names the code."""


class ApplicationCode:
    """The one place that calls the application's functions: services, access control, extensions, callbacks, handlers.

    They may take their time, so no lock is held and no turn kept while they run, and the leader never comes here.
    They may raise anything: an asyncio.CancelledError or sys.exit() must not end a thread that others need.
    """

    def __init__(self, logger: logging.Logger, turns: Turns) -> None:
        self._logger = logger
        self._turns = turns

    def call(self, name: str, function: Callable, *arguments: Any) -> Any:
        """Call the function, and return its result.

        Arguments:
            name: of the function, for the log.

        Raises:
            BayeuxError: as the function raised it.
            ApplicationFault: it raised something else, which is in the log now.
            KeyboardInterrupt: in the main thread, where Ctrl-C means the application and not us.
        """
        with self._turns.interrupted():
            try:
                return function(*arguments)
            except BayeuxError:
                raise
            except BaseException as fault:
                if is_for_application(fault):
                    raise
                self._logger.exception("%s failed", name)
                raise ApplicationFault(name) from None

    def run(self, name: str, function: Callable, *arguments: Any) -> None:
        """Call a function whose failure is nobody's but its own."""
        try:
            self.call(name, function, *arguments)
        except BayeuxError:
            self._logger.exception("%s failed", name)
        except ApplicationFault:
            pass


class Mailbox:
    """Work for the application's code, done in order, a piece at a time, on a handler thread, without the lock.

    A local client has one, and the listeners of the server's events have one in common.  So a callback
    may do what it likes, publishing and closing included, and a slow one holds up only itself.
    """

    __slots__ = ("core", "handle", "is_scheduled", "items", "size")

    def __init__(self, core: Bayeux, handle: Callable[[Any], None]) -> None:
        self.core = core
        self.handle = handle
        self.items: collections.deque[tuple[Any, int]] = collections.deque()
        self.size = 0                   # bytes of the pieces that wait
        self.is_scheduled = False

    def put(self, item: Any, size: int = 0) -> None:
        """Under the lock.  The core's wake() then sees to it that it is opened."""
        assert self.core.lock.locked()
        self.items.append((item, size))
        self.size += size
        if self.has_too_much():
            self.core.full_mailboxes.add(self)
        if not self.is_scheduled:
            self.is_scheduled = True
            self.core.scheduled_mailboxes += 1
            self.core.mailboxes.append(self)

    def has_too_much(self) -> bool:
        """Whether as much waits in it as may."""
        return len(self.items) >= self.core.options.max_queue or self.size >= self.core.memory.mailbox_limit

    def is_half_empty(self) -> bool:
        return len(self.items) <= self.core.options.max_queue / 2 and self.size <= self.core.memory.mailbox_limit / 2

    def clear(self) -> None:
        """Under the lock."""
        self.items.clear()
        self.size = 0
        self.core.full_mailboxes.discard(self)

    def open(self) -> None:
        """Handle all there is; a piece that fails harms no other."""
        core = self.core
        while True:
            with core.lock:
                if not self.items:
                    self.is_scheduled = False
                    core.scheduled_mailboxes -= 1
                    return
                item, size = self.items.popleft()
                self.size -= size
                if core.full_mailboxes and not self.has_too_much():
                    core.full_mailboxes.discard(self)
            try:
                self.handle(item)
            except BaseException:       # whatever it is, the next piece is handled
                core.logger.exception("a piece of work for callbacks failed")


# ======================================================================================
# §7  The protocol
#
# The core.  It takes batches of messages and answers them through their exchange; it does no
# input or output itself and knows nothing of HTTP, so that a test drives it with plain dicts.
#
# What happens:   handshake   a session is made; its clientId is the key to everything else
#                 connect     the client asks for events; the first is answered at once, later
#                             ones are held until there are some, or `timeout` is over
#                 subscribe   the session joins the subscribers of a pattern; unsubscribe undoes it
#                 publish     an event is made, and queued for all subscribers (§6: how it leaves)
#                 service     a function of the application answers, and only the sender hears it
#                 disconnect  the session ends; its clientId is worth nothing from then on
#
# A message's way: receive -> _admit (fields, extensions) -> _handle (session, message_acl) ->
# the handler of its channel (_handshake, _connect, ...) -> _finish (extensions, the reply's text).
# A BayeuxError raised anywhere on it becomes the reply, in _replies_to.
#
# The lock.  One threading.Condition guards sessions, registry, queues and mailboxes.  Under it
# no input or output, no code of the application and no JSON of unbounded size: decide under
# the lock, act outside it.  Methods that need it held say so and assert it.  What they have put in
# line is sent by the thread that leads (§11), or by the long-poll wait (§9), which waits on the
# Condition.
# ======================================================================================

ANY_VERSION = re.compile(r"\d+(?:\.[A-Za-z0-9][A-Za-z0-9\-_]*)*")


def count_by(counter: dict[str, int], key: str, change: int) -> None:
    """Count, and keep no zeros: the counters are as large as what there is now, not what there ever was."""
    count = counter.get(key, 0) + change
    if count:
        counter[key] = count
    else:
        del counter[key]


def is_version(value: str) -> bool:
    return len(value) < 50 and ANY_VERSION.fullmatch(value) is not None


def version_key(version: str) -> list[tuple]:
    """For comparing versions element by element; 1.0beta comes before 1.0.  (Bayeux, "Version")"""
    elements = []
    for element in version.split("."):
        digits = re.match(r"\d*", element)[0]
        elements.append((int(digits or 0), element == digits, element))
    return elements


def subscriptions_size(patterns: Iterable[str]) -> int:
    return sum([SUBSCRIPTION_SIZE + len(pattern) for pattern in patterns])


class Turn:
    """What the messages of one request share."""

    __slots__ = ("connecting", "events", "exchange", "is_shared", "published", "publishes", "refusals")

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.is_shared = False                          # the request has more than one message
        self.connecting: Session | None = None          # whose events go with the answer
        self.events: Sequence[Event] = ()               # those, where they have been taken already
        self.published: list[Event] = []                # on one channel, one after another, and not yet queued
        self.publishes = 0                              # how many of its messages were events
        self.refusals: list[tuple[Any, BayeuxError]] = []       # of messages, with their channels


class Bayeux:
    """The protocol over sessions, channels and queues.

    Arguments:
        options: limits, times, and the application's code (§5).
        logger: one line for each refusal goes here.
        run_later: runs a function on another thread, soon; here, if there are no threads (tests).
        deliver_here: has this thread send what is in line, now or before it sleeps; False: the wait is to do it.
        after_next_look: has this thread call a function once it has read what else has come; False: it cannot.
        clock: seconds that only ever grow.
        memory: counts what waits (§3).
        turns: has long work done in turns (§3).
    """

    # An instance of more than 30 attributes is slow to CPython, but for these: 8 % of the instructions of a delivery.
    __slots__ = ("__dict__", "__weakref__", "_after_next_look", "_asks_application", "_deliver_here",
                 "_departed", "_group", "_held_by_browser", "_incoming", "_lazy_patterns",
                 "_limits_addresses", "_listeners", "_log_lines", "_meta", "_missed_notices",
                 "_most_of_browser", "_notices", "_outgoing", "_plain_logger", "_postponed", "_rates",
                 "_run_later", "_sending_postponed", "_sessions_of", "_unknown_clients", "_untold",
                 "_warned", "addresses", "application", "clock", "condition", "connection_types",
                 "full_mailboxes", "kept_open", "local_clients", "lock", "logger", "mailboxes",
                 "memory", "options", "overfull", "ready", "registry", "scheduled_mailboxes",
                 "services", "sessions", "stopping", "timers", "turns")

    def __init__(self, options: Options, logger: logging.Logger | SafeLogger | None = None,
                 run_later: Callable[[Callable], None] = lambda job: job(),
                 deliver_here: Callable[[], bool] = lambda: False,
                 after_next_look: Callable[[Callable[[], None]], bool] = lambda job: False,
                 clock: Callable[[], float] = time.monotonic,
                 memory: Memory | None = None, turns: Turns | None = None) -> None:
        self.options = options
        self.logger = logger or logging.getLogger("bayeux_server")
        self._plain_logger = self.logger.logger if isinstance(self.logger, SafeLogger) else self.logger     # quick to ask
        self.clock = clock
        self.addresses = Addresses(options.trusted_proxies)
        self._group = self.addresses.group
        self.memory = memory or Memory(options.max_memory)
        self.turns = turns or Turns()
        self.application = ApplicationCode(self.logger, self.turns)
        self.services = dict(options.services)
        self.lock = threading.Lock()
        self.condition = threading.Condition(self.lock)
        self.registry = ChannelRegistry()
        self.sessions: dict[str, Session] = {}
        self.local_clients: dict[str, LocalClient] = {}
        # In line to be sent: sessions with events and what can carry them, and answers that were made already.
        self.ready: collections.deque[Session | Answer] = collections.deque()
        self.overfull: list[Session] = []                                   # that let too much pile up
        self.timers: list[tuple[float, Session]] = []                       # a heap: when to look at whom
        self.mailboxes: list[Mailbox] = []                                  # to be opened
        self.full_mailboxes: set[Mailbox] = set()                           # that take no more
        self.scheduled_mailboxes = 0                                        # those, and those being opened
        # By address_group: connections that are kept open, as a connect is held there or as it is a stream; sessions.
        self.kept_open: collections.Counter[str] = collections.Counter()
        self._sessions_of: collections.Counter[str] = collections.Counter()
        self._held_by_browser: collections.Counter[str | None] = collections.Counter()
        self._most_of_browser = options.max_sessions_per_browser or math.inf
        self._warned = LastMinute(clock, 1)
        self._unknown_clients = LastMinute(clock, UNKNOWN_CLIENTS + round(LONGEST_PAUSE / UNKNOWN_CLIENT_PAUSE))
        self._rates = Rates(options.max_rate, clock) if options.max_rate else None
        self._limits_addresses = options.client_max_connections > 0
        self.stopping = False
        self._departed: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._run_later = run_later
        self._deliver_here = deliver_here
        self._after_next_look = after_next_look
        self._postponed: collections.deque[Answer] = collections.deque()    # replies to publishes
        self._sending_postponed = threading.Lock()
        self._listeners: dict[str, list[Callable]] = {event: [] for event in EVENTS}
        if options.callback:
            self.add_listener(options.callback)
        self._notices = Mailbox(self, self._tell_listeners)
        self._log_lines = Mailbox(self, lambda line: self.logger.log(*line))
        self._untold: set[str] = set()                                      # sessions that the listeners have missed
        self._missed_notices = 0                                            # since the listeners have fallen behind
        self._incoming = [each.incoming for each in options.extensions if hasattr(each, "incoming")]
        self._lazy_patterns = frozenset(options.lazy_channels)
        self.connection_types = CONNECTION_TYPES + ((CROSS_ORIGIN,) if options.allowed_origins else ())
        self._outgoing = [each.outgoing for each in reversed(options.extensions) if hasattr(each, "outgoing")]
        self._meta = {HANDSHAKE: self._handshake, CONNECT: self._connect, DISCONNECT: self._disconnect,
                      SUBSCRIBE: self._subscribe, UNSUBSCRIBE: self._unsubscribe, PING: self._ping}
        self._asks_application = bool(options.message_acl or self._incoming or self._outgoing)

    # -- A batch ---------------------------------------------------------------------------

    def may_take_its_time(self, messages: list) -> bool:
        """Whether a batch is for a handler thread: it is long, or the application has a say in it."""
        if self._asks_application or len(messages) > SHORT_BATCH:
            return True
        for message in messages:
            try:
                if message["channel"].startswith(SERVICE):
                    return True
            except (AttributeError, KeyError, TypeError):
                pass                        # it has no channel, and will be refused
        return False

    def receive(self, messages: list, exchange: Exchange) -> None:
        """Handle a batch and answer it through the exchange, at once or (a held connect) later.

        A handshake makes the rest of its request void (Bayeux, "Handshake Request").  A connect is
        handled first, whatever its place, and what was published before it goes with its answer.
        """
        if self._plain_logger.isEnabledFor(logging.DEBUG):
            self.logger.debug("from %s: %.1000s", exchange.address, messages)
        turn = Turn(exchange)
        texts = self._replies_to_all(messages, turn) if len(messages) > 1 else self._replies_to(messages[0], turn)
        self._deliver_published(turn)
        if turn.refusals:
            self._log_refusals(turn, len(messages))
            turn.refusals.clear()           # an error leads, by its traceback, back to the turn and to its events
        self.wake()
        if texts:                           # none: its connect is held, and answered by who delivers
            self._answer(turn, texts)

    def _replies_to_all(self, messages: list, turn: Turn) -> list[str]:
        """Handle several messages.  The texts of their replies, in their order."""
        channels = [each.get("channel") if isinstance(each, dict) else None for each in messages]
        if HANDSHAKE in channels:
            return self._replies_to(messages[channels.index(HANDSHAKE)], turn)
        turn.is_shared = True
        replies: list[list[str]] = [[]] * len(messages)
        is_aside = self.turns.is_here()
        for place in sorted(range(len(messages)), key=lambda place: channels[place] != CONNECT):
            replies[place] = self._replies_to(messages[place], turn)
            if is_aside and self.turns.pause() and turn.exchange.is_gone():
                break
        return [text for each in replies for text in each]

    def _replies_to(self, message: Any, turn: Turn) -> list[str]:
        """Handle one message.  The texts of its replies: one; several of some services; none if it is held."""
        request = message if isinstance(message, dict) else {}
        try:
            session = self._session_of(request, turn)
            try:
                request = self._admit(session, message, turn)
                return self._handle(session, request, turn)
            except BayeuxError as error:
                turn.refusals.append((request.get("channel"), error))
                return self._finish(session, request, refusal(request, error))
        except Exception as fault:          # the neighbours are answered all the same
            request = message if isinstance(message, dict) else {}
            if not isinstance(fault, ApplicationFault):
                self.logger.exception("handling a message on %.100r failed", request.get("channel"))
            error = BayeuxError(500, self._channel_shown(request), "The server failed")
            return [encode_json(refusal(request, error))]

    def _log_refusals(self, turn: Turn, count: int) -> None:
        """One line for a request, however many of its messages were refused."""
        (channel, error), address = turn.refusals[0], turn.exchange.address or "-"
        if count == 1:
            self.logger.info("refused %.100r from %s: %s", channel, address, error)
        else:
            self.logger.info("refused %d of %d messages from %s, the first on %.100r: %s",
                             len(turn.refusals), count, address, channel, error)

    def _session_of(self, message: dict, turn: Turn) -> Session | None:
        """The session that the message's clientId names, if it names one."""
        client_id = message.get("clientId")
        session = self.sessions.get(client_id) if isinstance(client_id, str) else None
        if session is None:
            return None
        if self.options.bind_sessions and session.browser != turn.exchange.browser:
            self.logger.warning("session %s was used without the cookie of its handshake, from %s",
                                client_id, turn.exchange.address)
            return None
        if session.comment_filtered:
            turn.exchange.comment_filtered = True
        return session

    def _admit(self, session: Session | None, message: Any, turn: Turn) -> dict:
        """The message as the extensions leave it, once its common fields are known to be right."""
        if not isinstance(message, dict):
            raise BayeuxError(400, "", "A message is an object")
        if turn.exchange.is_large and len(encode_json(message).encode("utf-8")) > self.options.max_message_size:
            raise BayeuxError(413, self._channel_shown(message),
                              f"The message is larger than {self.options.max_message_size} bytes")
        if message.get("id") is not None and not is_message_id(message["id"]):
            raise BayeuxError(400, self._channel_shown(message), "id must be a string or a number")
        for incoming in self._incoming:
            self.application_comes(turn)
            message = self.application.call("an extension", incoming, session, message)
            if message is None:
                raise BayeuxError(403, "", "An extension refused the message")
        channel = message.get("channel")
        if not isinstance(channel, str):
            raise BayeuxError(400, "", "channel is missing" if channel is None else "channel must be a string")
        return message

    def _handle(self, session: Session | None, message: dict, turn: Turn) -> list[str]:
        channel = message["channel"]
        handler = self._handler(channel)
        if channel != HANDSHAKE:
            if session is None:
                session = self._unknown_client(message, turn, may_be_anonymous=(
                    channel == PING or (channel not in self._meta and self.options.anon_publish)))
            if self._rates is not None and channel not in (CONNECT, DISCONNECT):
                self._check_rate(session, turn)
            self._check_acl(session, message, turn)
            now = self.clock()              # a message that was refused does not keep its session alive
            session.lease = now + self.options.connect_timeout
            if channel != CONNECT:
                session.active = now
        if turn.published and turn.published[-1].channel != channel:
            self._deliver_published(turn)
        return handler(session, message, turn)

    def _handler(self, channel: str) -> Callable[[Any, dict, Turn], list[str]]:
        if channel in self._meta:
            return self._meta[channel]
        if channel.startswith(META):
            raise BayeuxError(404, channel, "Unknown channel")
        if not is_channel_name(channel):
            raise BayeuxError(405, channel, "A pattern cannot be published to" if is_channel_pattern(channel)
                              else "Bad channel name")
        return self._call_service if channel.startswith(SERVICE) else self._publish

    def _check_rate(self, session: Session, turn: Turn) -> None:
        """Messages without a session are counted by address."""
        sender = session.id
        if sender is None and self._limits_addresses:
            sender = self._group(turn.exchange.address)
        if sender and not self._rates.admit(sender):
            session.slowed = session.slowed or SLOWED_RATE
            raise BayeuxError(429, "", "Too many messages", advice=self._slow_advice(TOO_FAST_INTERVAL))

    def _unknown_client(self, message: dict, turn: Turn, may_be_anonymous: bool) -> Session:
        """A session for this one message only, if it may do without; or why there is none."""
        client_id = message.get("clientId")
        if client_id is None:               # a null clientId is none (the original let it pass for one)
            if may_be_anonymous:
                return Session(None, turn.exchange)
            raise BayeuxError(401, "", "No clientId", advice=self._advice("handshake"))
        if not isinstance(client_id, str):
            raise BayeuxError(400, "", "clientId must be a string", advice=self._advice("handshake"))
        pause = self._unknown_client_pause(turn.exchange) if message["channel"] == CONNECT else 0.0
        raise self.unknown_client(client_id, pause)

    def unknown_client(self, client_id: str, pause: float = 0.0) -> BayeuxError:
        """The error for a clientId of which there is no session, with the reason if that is remembered."""
        reason = self._departed.get(client_id)
        return BayeuxError(402, client_id, "Unknown client" + (f" - it ended by {reason}" if reason else ""),
                           advice={**self._advice("handshake"), "interval": round(pause * 1000)})

    def _unknown_client_pause(self, exchange: Exchange) -> float:
        """Seconds after which an unknown client should come back; more than 0 when many came from its address.

        Behind a proxy that brings each request to another server of several, no session lasts, and all clients
        would go round between handshake and connect as fast as they can.
        """
        group = self._group(exchange.address)
        if not group or not self._limits_addresses:
            return 0.0
        with self.lock:
            count = self._unknown_clients.note(group)
        return min(LONGEST_PAUSE, UNKNOWN_CLIENT_PAUSE * max(0, count - UNKNOWN_CLIENTS))

    def application_comes(self, turn: Turn) -> None:
        """The next call may take its time: what has been published leaves now."""
        self._deliver_published(turn)
        self.wake()

    def _check_acl(self, session: Session, message: dict, turn: Turn) -> None:
        """Ask the application whether the message may pass; what fails to answer refuses."""
        acl = self.options.message_acl
        if acl is None:
            return
        channel = message["channel"]
        self.application_comes(turn)
        try:
            answer = self.application.call("message_acl", acl, session, message)
        except ApplicationFault:
            answer = "Refused"
        if answer is not None and answer is not True and answer != "":
            raise BayeuxError.from_text(403, channel, answer if isinstance(answer, str) else "Refused")

    # -- Replies ---------------------------------------------------------------------------

    @staticmethod
    def _success(message: dict, **fields: Any) -> dict:
        """channel, successful, id as it came (0 and "0" included), and fields."""
        reply = {"channel": message["channel"], "successful": True, **fields}
        if message.get("id") is not None:
            reply["id"] = message["id"]
        return reply

    def _finish(self, session: Session | None, message: dict, reply: dict | None = None,
                number: int | None = None) -> list[str]:
        """The text of a reply that leaves now."""
        text = self._reply_text(session, message, reply)
        late = self._late_fields(self._timesync(message), number)
        return [with_fields(text, late) if late else text]

    def _reply_text(self, session: Session | None, message: dict, reply: dict | None) -> str:
        """The reply after the extensions.  One that they drop is replaced: every message gets its reply.

        None is the plain reply, that says no more than that all went well.  Most are, and need no encoder.
        """
        if reply is None and not self._outgoing:
            return success_text(message["channel"], message.get("id"))
        return encode_json(self._through_extensions(session, reply or self._success(message)) or refusal(
            message, BayeuxError(403, self._channel_shown(message), "An extension dropped the reply")))

    def _timesync(self, message: dict) -> TimeSync | None:
        return TimeSync.of(message) if "ext" in message and self.options.timesync else None

    def _late_fields(self, timesync: TimeSync | None, number: int | None) -> dict:
        """The fields of a reply that depend on when it leaves.  number: its own, with acknowledgement."""
        fields: dict = {}
        if timesync is not None:
            fields["ext"] = {"timesync": timesync.reply()}
        if number is not None:
            fields["ext"] = {**fields.get("ext", {}), "ack": number}
        if self.options.timestamp:
            fields["timestamp"] = timestamp_now()
        return fields

    def _advice(self, reconnect: str = "retry") -> dict:
        """(Bayeux, "advice"); timeout is always there with retry: Faye needs it to know a dead server."""
        if reconnect != "retry":
            return {"reconnect": reconnect, "interval": 0}
        return {"reconnect": "retry", "interval": round(self.options.interval * 1000),
                "timeout": round(self.options.timeout * 1000)}

    def _slow_advice(self, pause: float) -> dict:
        """Whole advice to pause between two connects, as long as the session does not end by it."""
        interval = max(self.options.interval, min(pause, self.options.connect_timeout / 2))
        return {**self._advice(), "interval": round(interval * 1000)}

    @staticmethod
    def _channel_shown(message: dict) -> str:
        channel = message.get("channel")
        return channel if isinstance(channel, str) else ""

    # -- Handshake -------------------------------------------------------------------------

    def _handshake(self, session: Session | None, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Handshake")

        Request:  channel, version, supportedConnectionTypes, minimumVersion?, ext?, id?
        Reply:    channel, successful, version, minimumVersion, supportedConnectionTypes, clientId,
                  advice, ext?, id?
        Refused:  error, advice none (or handshake: try again), and no clientId
        """
        self._check_version(message)
        types = self._common_types(message, turn)
        session = Session(secrets.token_hex(16), turn.exchange)     # 128 random bits, never reused
        self._check_acl(session, message, turn)
        reply = self._success(message, version=VERSION, minimumVersion=VERSION, supportedConnectionTypes=types,
                              clientId=session.id, advice=self._advice())
        ext = message["ext"] if isinstance(message.get("ext"), dict) else {}
        if self.options.json_comment_filtered and ext.get("json-comment-filtered") in (True, "true"):
            session.comment_filtered = turn.exchange.comment_filtered = True
            reply["ext"] = {"json-comment-filtered": True}
        if self.options.ack and ext.get("ack") is True:
            session.acknowledgement = Acknowledgement()
            reply["ext"] = {**reply.get("ext", {}), "ack": True}
        session.browser = turn.exchange.name_browser()
        with self.lock:
            if self.stopping:
                raise BayeuxError(503, "", "The server is stopping",
                                  advice={"reconnect": "handshake", "interval": BUSY_RETRY * 1000})
            self._require_place(session)
            self.sessions[session.id] = session
            session.active = self.clock()
            session.lease = session.active + self.options.connect_timeout
            self._schedule(session)
            self.tell("client_connect", client_id=session.id, ip=session.address)
        self.logger.debug("session %s begins, from %s", session.id, session.address)
        return self._finish(session, message, reply)

    def _require_place(self, session: Session) -> None:
        """Count a new session, if there is room for it: one address has no more than half of max_sessions."""
        assert self.lock.locked()
        group = self._group(session.address) if self._limits_addresses else ""
        source = f" from {session.address}" if group and (
            self._sessions_of[group] >= max(1, self.options.max_sessions // 2)) else ""
        if source or len(self.sessions) >= self.options.max_sessions:
            raise BayeuxError(429, "", "Too many sessions" + source,
                              advice={"reconnect": "handshake", "interval": BUSY_RETRY * 1000})
        count_by(self._sessions_of, group, 1)

    @staticmethod
    def _check_version(message: dict) -> None:
        for name in ("version", "minimumVersion"):
            value = message.get(name)
            if value is None and name == "version":
                raise BayeuxError(400, HANDSHAKE, "version is missing")
            if value is not None and not (isinstance(value, str) and is_version(value)):
                raise BayeuxError(400, HANDSHAKE, f"{name} must be a version such as 1.0")
        oldest = message.get("minimumVersion")
        if oldest is not None and version_key(oldest) > version_key(VERSION):
            raise BayeuxError(409, HANDSHAKE, f"minimumVersion {oldest} is above ours which is {VERSION}")

    def _common_types(self, message: dict, turn: Turn) -> list[str]:
        """The connection types that both sides have.  None given: the transport that carried the handshake."""
        asked = message.get("supportedConnectionTypes", [turn.exchange.transport])
        if not isinstance(asked, list) or not all(isinstance(each, str) for each in asked):
            raise BayeuxError(400, HANDSHAKE, "supportedConnectionTypes must be a list of strings")
        common = [each for each in self.connection_types if each in asked]
        if not common:
            raise BayeuxError(409, HANDSHAKE, "No connection type in common",
                              version=VERSION, supportedConnectionTypes=list(self.connection_types))
        return common

    # -- Connect ---------------------------------------------------------------------------

    def _connect(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Connect")

        Request:  channel, clientId, connectionType, advice.timeout? (ms), ext?, id?
        Reply:    channel, successful, id?, advice?; the session's events follow it

        Not held: the first of a session (clients say nothing before it returns), one that shares its
        request with other messages or has another request behind it, one whose client asks for timeout
        0, one of a browser or of an address that has too many, and Faye's beside an event stream.  A newer
        connect releases the older.
        """
        if message.get("connectionType") not in self.connection_types:
            raise BayeuxError(400, CONNECT, f"connectionType must be {' or '.join(self.connection_types)}")
        if turn.connecting is not None:
            raise BayeuxError(409, CONNECT, "One connect a request")
        if turn.exchange.stream is not None:
            self._require_place_on(turn.exchange.stream, session)
        if self.options.max_inactivity:
            self._end_inactive(session)
        crowding = self._crowding(session, message, turn)
        advice = self._connect_advice(session, message, crowding)
        patience = 0.0 if crowding else self._patience(session, message, turn)
        reply = self._success(message, advice=advice) if advice else None
        if patience > 0:
            text = self._reply_text(session, message, reply)
            timesync = self._timesync(message)
        with self.lock:
            self._require_live(session)
            self._begin_connect(session, message, turn)
            if patience > 0:
                hold = Hold(session, turn.exchange, text, timesync, self.clock() + patience)
                session.hold = turn.exchange.hold = hold
                self._count_hold(hold, 1)
                self._schedule(session)
            elif session.acknowledgement:
                session.acknowledgement.number += 1
                turn.events = self._take_events(session, turn.exchange)
            elif session.lazy_deadline < math.inf:
                self._schedule(session)     # its lazy events have a way now, if it came by a stream
            number = session.acknowledgement.number if session.acknowledgement else None
            self.make_ready(session)
        turn.connecting = session
        return [] if patience > 0 else self._finish(session, message, reply, number)

    def _require_place_on(self, stream: Stream, session: Session) -> None:
        """A stream carries only so many sessions; those on it go on.  The pause is for clients that retry at once."""
        limit = self.options.max_sessions_per_connection
        if session.stream is not stream and len(stream.sessions) >= limit:
            raise BayeuxError(429, CONNECT, f"More than {limit} sessions on one connection",
                              advice={**self._advice(), "interval": BUSY_RETRY * 1000})

    def _begin_connect(self, session: Session, message: dict, turn: Turn) -> None:
        """What every connect does: acknowledge, release the older, show where the session's events go from now on."""
        assert self.lock.locked()
        if session.acknowledgement:
            ext = message.get("ext")
            session.acknowledge(ext.get("ack") if isinstance(ext, dict) else None, self.memory)
        if session.hold is not None:
            self._release(session.hold)
        if turn.exchange.stream is not None or (session.stream is not None and session.stream.carries_requests):
            self._attach(session, turn.exchange.stream)     # an event stream lies beside the connects, and stays
        session.transport = message["connectionType"]
        session.connected = True

    def _connect_advice(self, session: Session, message: dict, crowding: str) -> dict | None:
        """News for the client: with its first connect all there is to know, later what has changed."""
        # Faye's connects beside an event stream only show that it lives: twice in the life of a session will do.
        is_beside = message["connectionType"] == EVENTSOURCE and not session.acknowledgement
        pause = MULTIPLE_CLIENTS_INTERVAL if crowding else self.options.timeout if is_beside else 0.0
        if crowding or session.slowed:
            return self._changed_advice(session, crowding, pause)
        return None if session.connected and not is_beside else self._slow_advice(pause)

    def _changed_advice(self, session: Session, crowding: str, pause: float) -> dict:
        """Clients keep advice until there is other: so what no longer holds is taken back, once."""
        was_slowed, session.slowed = session.slowed, crowding
        advice = self._slow_advice(pause)
        if SLOWED_BROWSER in (crowding, was_slowed):
            advice["multiple-clients"] = crowding == SLOWED_BROWSER
        return advice

    def _patience(self, session: Session, message: dict, turn: Turn) -> float:
        """How long the connect may be held; a shorter time of the client's is honoured.  (Bayeux, "timeout")"""
        if (not session.connected or turn.is_shared or not turn.exchange.may_hold or self.stopping
                or (message["connectionType"] == EVENTSOURCE and not session.acknowledgement)):
            return 0.0
        advice = message.get("advice")
        asked = advice.get("timeout") if isinstance(advice, dict) else None
        return min(self.options.timeout, asked / 1000) if is_number(asked) and asked >= 0 else self.options.timeout

    def _end_inactive(self, session: Session) -> None:
        """(CometD's activity extension): a page that was left open only sends heart-beats."""
        limit = self.options.max_inactivity
        if self.clock() - session.active > limit:
            with self.lock:
                self.end_session(session, ENDED_INACTIVE)
            raise BayeuxError(402, session.id or "", f"Session ended by {ENDED_INACTIVE}",
                              advice={"reconnect": "none", "interval": 0})

    # -- Connections kept open -------------------------------------------------------------
    #
    # A held connect keeps its connection, and a browser has six to a host; so has an address its limit.  Over it
    # nothing is refused: the client is told to poll.  A connect on a stream is no connection more.

    def _crowding(self, session: Session, message: dict, turn: Turn) -> str:
        """Why the connect is not to be held, one of SLOWED_...; or ''.

        (Bayeux, "Server-side Multiple clients detection").  Without the lock: of connects that come on several
        threads in the same moment one too many may be held, which does no harm.
        """
        exchange = turn.exchange
        of_browser = self._held_by_browser.get(session.browser, 0) if session.browser is not None else 0
        is_full = self._limits_addresses and (
            self.kept_open.get(self._group(exchange.address), 0) >= self.options.client_max_connections)
        if of_browser < self._most_of_browser and not is_full:
            return ""                       # nearly always
        if exchange.stream is not None or (message["connectionType"] == EVENTSOURCE and not session.acknowledgement):
            return ""
        leaving = session.hold.exchange if session.hold is not None and session.hold.exchange.stream is None else None
        if of_browser - (leaving is not None) >= self._most_of_browser:
            return SLOWED_BROWSER
        if is_full and self._is_address_full(exchange, leaving):
            with self.lock:
                self._warn_of_limit(exchange)
            return SLOWED_ADDRESS
        return ""

    def _is_address_full(self, exchange: Exchange, leaving: Exchange | None = None) -> bool:
        """Whether the address keeps as many connections open as it may, without the one that leaves."""
        group = self._group(exchange.address)
        is_less = leaving is not None and self._group(leaving.address) == group
        return group != "" and self.kept_open.get(group, 0) - is_less >= self.options.client_max_connections

    def _warn_of_limit(self, exchange: Exchange) -> None:
        """Tell who runs the server, once a minute for each address; it may be a proxy."""
        assert self.lock.locked()
        group, address, limit = self._group(exchange.address), exchange.address, self.options.client_max_connections
        if not self._warned.count(group):
            self._warned.note(group)
            self.log_later(logging.WARNING, "%s keeps as many connections open as client_max_connections "
                           "allows (%d); its other clients are told to poll%s", address, limit,
                           f"; if it is a proxy, as its X-Forwarded-For says, name it (--trusted-proxy {address})"
                           if exchange.is_forwarded else "")

    def _count_hold(self, hold: Hold, change: int) -> None:
        """Count a held connect by its browser (where a zero goes with the session) and its address.

        Each delivery passes here twice; count_by, written out, spares a tenth of it.
        """
        browser, exchange, counts = hold.session.browser, hold.exchange, self._held_by_browser
        if exchange.stream is None:
            counts[browser] = counts.get(browser, 0) + change
            if self._limits_addresses:
                group, counts = self._group(exchange.address), self.kept_open
                count = counts.get(group, 0) + change
                if count:
                    counts[group] = count
                else:
                    del counts[group]

    def count_stream(self, stream: Stream) -> bool:
        """Count a connection that becomes a stream.  False: its address keeps as many open as it may."""
        if self._limits_addresses:
            with self.lock:
                is_full = self._is_address_full(stream)
                if is_full:
                    self._warn_of_limit(stream)
                else:
                    stream.is_counted = True
                    count_by(self.kept_open, self._group(stream.address), 1)
            if is_full:
                self.wake()
                return False
        return True

    def forget_stream(self, stream: Stream) -> None:
        """The connection is closed."""
        self.detach(stream)
        with self.lock:
            if stream.is_counted:
                stream.is_counted = False
                count_by(self.kept_open, self._group(stream.address), -1)

    # -- Disconnect, ping ------------------------------------------------------------------

    def _disconnect(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Disconnect").  Request: channel, clientId, id?.  Reply: channel, successful, id?"""
        with self.lock:
            self.end_session(session, ENDED_ASKED)
        if turn.connecting is session:
            turn.connecting = None
        return self._finish(session, message)

    def _ping(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """Dojo's time synchronisation of 2008; what it wants is in ext.timesync, as in any reply."""
        return self._finish(session, message)

    # -- Subscribe, unsubscribe ------------------------------------------------------------

    def _subscribe(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Subscribe")

        Request:  channel, clientId, subscription (a pattern, or an array of them), id?
        Reply:    channel, successful, subscription as it came, id?
        Refused:  as a whole; nothing is recorded
        """
        patterns = self._patterns(message)
        with self.lock:
            self._require_live(session)
            # Service channels SHOULD NOT be recorded.  A dict, as a set would forget their order.
            wanted = dict.fromkeys(each for each in patterns if not each.startswith(SERVICE)).keys()
            new = wanted - session.patterns.keys()
            if len(session.patterns) + len(new) > self.options.max_subscriptions:
                raise BayeuxError(429, SUBSCRIBE, f"More than {self.options.max_subscriptions} subscriptions")
            if self.memory.is_too_much_for(self._group(session.address), subscriptions_size(new)):
                raise BayeuxError(429, SUBSCRIBE, f"Too many subscriptions from {session.address}")
            for pattern in wanted:
                self.add_subscription(session, pattern)
        return self._finish(session, message, self._success(message, subscription=message["subscription"]))

    def _unsubscribe(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Unsubscribe"), the same fields; refused for what was not subscribed."""
        patterns = self._patterns(message)
        with self.lock:
            recorded = [each for each in dict.fromkeys(patterns) if not each.startswith(SERVICE)]
            for pattern in recorded:
                self.require_subscription(session, pattern)
            for pattern in recorded:
                self.remove_subscription(session, pattern)
        return self._finish(session, message, self._success(message, subscription=message["subscription"]))

    @staticmethod
    def _patterns(message: dict) -> list[str]:
        """The request's subscription as a list, each member known to be allowed to a remote client."""
        subscription = message.get("subscription")
        patterns = subscription if isinstance(subscription, list) else [subscription]
        if not patterns or not all(isinstance(each, str) for each in patterns):
            raise BayeuxError(400, message["channel"], "subscription must be a channel or a list of them")
        for pattern in patterns:
            if not is_channel_pattern(pattern):
                raise BayeuxError(405, pattern, "Bad channel name or pattern")
            if pattern.startswith(META):
                raise BayeuxError(403, pattern, "Meta channels cannot be subscribed to")
        return patterns

    @staticmethod
    def require_subscription(subscriber: Session | LocalClient, pattern: str) -> None:
        if pattern not in subscriber.patterns:
            raise BayeuxError(404, pattern, "Not subscribed")

    def add_subscription(self, subscriber: Session | LocalClient, pattern: str) -> None:
        assert self.lock.locked()
        if pattern not in subscriber.patterns:
            subscriber.patterns[self.registry.add(pattern, subscriber)] = None
            self._count_subscriptions(subscriber, [pattern])
            self.tell("subscribe", client_id=subscriber.id, channel=pattern)

    def remove_subscription(self, subscriber: Session | LocalClient, pattern: str) -> None:
        assert self.lock.locked()
        self._count_subscriptions(subscriber, [pattern], -1)
        subscriber.forget(pattern)
        self.registry.discard(pattern, subscriber)
        self.tell("unsubscribe", client_id=subscriber.id, channel=pattern)

    def _count_subscriptions(self, subscriber: Session | LocalClient, patterns: Iterable[str], sign: int = 1) -> None:
        """A remote client's count against its address."""
        if isinstance(subscriber, Session) and patterns:
            self.memory.take_for(self._group(subscriber.address), sign * subscriptions_size(patterns))

    def _require_live(self, session: Session) -> None:
        """It may have ended since the message was let in: another of its requests may have said so."""
        assert self.lock.locked()
        if session.ended:
            raise BayeuxError(402, session.id or "", f"Unknown client - it ended by {session.ended}",
                              advice=self._advice("handshake"))

    # -- Publish ---------------------------------------------------------------------------

    def _publish(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Publish", "Delivery")

        Request:  channel, data, clientId (unless anon_publish), id?, ext?
        Reply:    channel, successful, id?
        Event:    channel, data, ext?
        """
        if "data" not in message:
            raise BayeuxError(400, message["channel"], "data is missing")
        if self.full_mailboxes:
            self._require_room(message["channel"])
        event = self._event(message["channel"], message["data"], session.id, message.get("id"), message.get("ext"))
        turn.published.append(event)
        turn.publishes += 1
        if self._outgoing:                  # the application's, of which one may take its time over our reply
            self._deliver_published(turn)
        return self._finish(session, message)

    def _event(self, channel: str, data: Any, client_id: str | None, id: Any, ext: Any) -> Event:
        fields = {"channel": channel, "data": data}
        if isinstance(ext, dict):
            fields["ext"] = ext
        if self.options.forward_id and id is not None:
            fields["id"] = id
        if self.options.timestamp:
            fields["timestamp"] = timestamp_now()
        return Event(fields, client_id, id, self._is_lazy(channel))

    def _require_room(self, channel: str) -> None:
        """A local client that is too far behind loses nothing, and is not ended: publishers have to wait for it."""
        with self.lock:
            for subscriber in self.registry.subscribers(channel):
                if isinstance(subscriber, LocalClient) and subscriber.mailbox in self.full_mailboxes:
                    raise BayeuxError(429, channel, "A subscriber in the server is too far behind")

    def _is_lazy(self, channel: str) -> bool:
        """(CometD's lazy channels): for news that nobody waits for."""
        return bool(self._lazy_patterns) and not self._lazy_patterns.isdisjoint(patterns_matching(channel))

    def delay(self, session: Session) -> None:
        """The session has a lazy event: it may wait, but not for ever."""
        assert self.lock.locked()
        if session.lazy_deadline == math.inf:
            session.lazy_deadline = self.clock() + self.options.max_lazy
            self._schedule(session)

    def _deliver_published(self, turn: Turn) -> None:
        """Queue what the request has published.  Ten events in a batch ask for the subscribers once, not ten times."""
        if turn.published:
            events, turn.published = Parcel(turn.published), []
            self._deliver(events)

    def _deliver(self, events: Parcel) -> None:
        """Queue the events, all of one channel, for its subscribers.  Overlapping subscriptions deliver one copy."""
        own_events = [each for event in events for each in self._own_events(event)] if self._outgoing else None
        with self.lock:
            if own_events is None:
                for event in events:
                    self.memory.take_event(event)
                for subscriber in self.registry.subscribers(events[0].channel):
                    subscriber.accept(events, self)
            else:
                for subscriber, own_event in own_events:
                    if own_event is not None and not subscriber.ended:
                        self.memory.take_event(own_event)
                        subscriber.accept(Parcel([own_event]), self)
            self._end_overfull()
            if self._listeners["publish"]:
                for event in events:
                    self._notify("publish", event, event.client_id, event.size)

    def _own_events(self, event: Event) -> list[tuple[Session | LocalClient, Event | None]]:
        """The subscribers, each with the event as it is to get it: one encoding for each."""
        with self.lock:
            subscribers = list(self.registry.subscribers(event.channel))
        return [(subscriber, self._own_event(subscriber, event)) for subscriber in subscribers]

    def _own_event(self, subscriber: Session | LocalClient, event: Event) -> Event | None:
        """The event as the extensions leave it for one session; None where one drops or spoils it."""
        if not self._outgoing or not isinstance(subscriber, Session):
            return event
        message = self._through_extensions(subscriber, json.loads(event.text))
        try:
            return Event(message, is_lazy=event.is_lazy) if message is not None else None
        except (KeyError, TypeError, ValueError):
            self.logger.exception("an extension made of an event what cannot be sent; it is dropped")
            return None

    def _end_overfull(self) -> None:
        """A client that does not fetch its events must not fill our memory."""
        assert self.lock.locked()
        for session in self.overfull:
            self.end_session(session, ENDED_QUEUE)
        self.overfull.clear()

    # -- Services --------------------------------------------------------------------------

    def _call_service(self, session: Session, message: dict, turn: Turn) -> list[str]:
        """(Bayeux, "Service Channels", "Request / Response operation with service channels")

        Request:  channel /service/<name>, clientId, data?, id?
        Replies:  what the service returns: a message, several, or nothing (then channel, successful, id?)

        Channel, id and successful are filled in where the service left them out.  successful makes Faye
        and aiocometd take the answer for the reply to their publish; CometD's clients look for data first.
        """
        request, channel = dict(message), message["channel"]
        service = self.services.get(channel[len(SERVICE):]) or self.services.get("_handler")
        if service is None:
            raise BayeuxError(404, channel, "Unknown service")
        self.application_comes(turn)
        try:
            answers = self.application.call(f"the service on {channel}", self._ask_service, service, message)
            replies = [{**self._success(request), **answer} for answer in answers] or [self._success(request)]
            return [text for reply in replies for text in self._finish(session, request, reply)]
        except BayeuxError:
            raise
        except ApplicationFault:
            raise BayeuxError(500, channel, "The service failed") from None
        except (TypeError, ValueError):
            self.logger.exception("the service on %s returned what JSON cannot hold", channel)
            raise BayeuxError(500, channel, "The service failed") from None

    @staticmethod
    def _ask_service(service: Callable, message: dict) -> list[dict]:
        """Call the service.  Its answers as a list; one that is a generator runs here, too."""
        returned = service(message)
        if returned is None:
            return []
        return [dict(each) for each in ([returned] if isinstance(returned, dict) else returned)]

    # -- Extensions ------------------------------------------------------------------------

    def _through_extensions(self, session: Session | None, message: dict) -> dict | None:
        """The message as the outgoing extensions leave it; None where one drops it, or fails."""
        for outgoing in self._outgoing:
            try:
                message = self.application.call("an extension", outgoing, session, message)
            except ApplicationFault:
                return None
            except BayeuxError as error:
                self.logger.info("an extension dropped a message to %s: %s", session, error)
                return None
            if message is None:
                return None
        return message

    # -- The end of a session --------------------------------------------------------------

    def end_session(self, session: Session, reason: str) -> None:
        """Forget the session, its queue and subscriptions; answer its held connect."""
        assert self.lock.locked()
        if session.ended:
            return
        session.ended = reason
        if self.sessions.pop(session.id, None) is not None:
            count_by(self._sessions_of, self._group(session.address) if self._limits_addresses else "", -1)
        for pattern in session.patterns:
            self.registry.discard(pattern, session)
        self._count_subscriptions(session, session.patterns, -1)
        session.patterns = {}
        self._departed[session.id] = reason
        if len(self._departed) > REMEMBERED_SESSIONS:
            self._departed.popitem(last=False)
        # Events published just before the server stops leave with the last answer of the session, unless earlier
        # ones are in flight elsewhere: these would arrive after them.
        may_leave = reason == ENDED_SHUTDOWN and session.in_flight in (None, session.stream)
        last_events = session.queue if may_leave else ()
        session.queue = ()
        if session.acknowledgement:
            session.acknowledgement.sent, session.acknowledgement.sent_again = {}, {}
            session.acknowledgement.size = 0
        if session.hold is not None:
            self._release(session.hold, self._farewell(session, reason), last_events)
        elif session.uses_stream and last_events:
            self.ready.append(Answer(session.stream, [], None, last_events))
        if not self._held_by_browser.get(session.browser):
            self._held_by_browser.pop(session.browser, None)
        self._attach(session, None)
        if reason not in (ENDED_ASKED, ENDED_SHUTDOWN):
            self.log_later(logging.INFO, "session %s ended: %s", session.id, reason)
        self.tell("client_disconnect", client_id=session.id, reason=reason)

    def _farewell(self, session: Session, reason: str) -> dict:
        """What a held connect is told when its session ends."""
        if reason == ENDED_ASKED:           # its client knows; the original's own dies of an advice of "none" here
            return {}
        if reason == ENDED_SHUTDOWN:
            # A millisecond of spread for each session, so that they do not all come back at once.  (No
            # fixed second: aiocometd reads interval as seconds.)
            return {"advice": {**self._advice(), "interval": random.randint(1, len(self.sessions) + 1)}}
        error = BayeuxError(402, session.id or "", f"Session ended by {reason}")
        return {"successful": False, "error": str(error), "advice": self._advice("handshake")}

    def stop(self) -> None:
        """Take no new sessions, end all there are, and let every held connect be answered."""
        with self.lock:
            self.stopping = True
            for subscriber in [*self.sessions.values(), *self.local_clients.values()]:
                subscriber.end(ENDED_SHUTDOWN, self)
        self.wake()

    def is_quiet(self) -> bool:
        """Whether nothing is in line to be sent, and no callback is running, or waits to."""
        with self.lock:
            return not (self.ready or self.scheduled_mailboxes)

    # -- Held connects and their answers ---------------------------------------------------
    #
    # An answer has two ends: it is taken, under the lock, and it is settled, under the lock,
    # when it is known whether it was written.  In between it is sent, without the lock.

    def _release(self, hold: Hold, fields: dict | None = None, last_events: Sequence[Event] = ()) -> None:
        """Let a held connect be answered without events of its session, unless these are its last."""
        assert self.lock.locked()
        answer = self._take_hold(hold, fields)
        answer.events = last_events
        self.ready.append(answer)

    def _take_hold(self, hold: Hold, fields: dict | None = None) -> Answer:
        session = hold.session
        session.hold = hold.exchange.hold = None
        self._count_hold(hold, -1)
        session.lease = self.clock() + self.options.connect_timeout
        reply = with_fields(hold.reply, fields) if fields else hold.reply
        number = None
        if session.acknowledgement:
            session.acknowledgement.number += 1
            number = session.acknowledgement.number
        is_plain = hold.timesync is None and number is None and not self.options.timestamp
        late = None if is_plain else partial(self._late_fields, hold.timesync, number)
        return Answer(hold.exchange, [reply], session, late_fields=late)

    def _attach(self, session: Session, stream: Stream | None) -> None:
        """Have the session's events go this way from now on."""
        assert self.lock.locked()
        if session.stream is not stream:
            if session.stream is not None:
                session.stream.sessions.pop(session, None)
                if not session.stream.carries_requests:
                    self.ready.append(Answer(session.stream, []))       # an event stream is for one session, and ends
            session.stream = stream
            if stream is not None:
                stream.sessions[session] = None

    def session_for(self, client_id: str, stream: Stream) -> Session | None:
        """The session of which the client may open an event stream."""
        assert self.lock.locked()
        session = self.sessions.get(client_id)
        is_foreign = session is not None and self.options.bind_sessions and session.browser != stream.browser
        return None if is_foreign else session

    def attach(self, client_id: str, stream: Stream) -> bool:
        """The same from outside: an event stream has been opened for the session.  False: there is none."""
        with self.lock:
            session = self.session_for(client_id, stream)
            if session is None:
                return False
            self._attach(session, stream)
            self.make_ready(session)
            self._schedule(session)
        self.wake()
        return True

    def detach(self, stream: Stream) -> None:
        """The stream is gone, and the connects that were held on it.  What waits for its sessions goes on waiting."""
        with self.lock:
            for session in stream.sessions:
                if session.hold is not None and session.hold.exchange.stream is stream:
                    self._take_hold(session.hold)
                session.stream = None
                self._schedule(session)
            stream.sessions.clear()

    def make_ready(self, session: Session) -> None:
        """Put the session in line for an answer, if it has events and something to carry them."""
        assert self.lock.locked()
        if session.is_urgent and session.queue and session.can_take_events and not session.is_ready:
            session.is_ready = True
            self.ready.append(session)

    def take_answers(self, limit: int) -> list[Answer]:
        """What is to be sent now, up to limit, in the order in which it came into line.

        Sessions in a row that get the same events, each on a stream, have one broadcast in common.
        """
        assert self.lock.locked()
        self._look_at_timers(limit)
        answers: list[Answer] = []
        max_frame_events = self.options.max_frame_events
        broadcast: Broadcast | None = None      # the last of the answers, if it is one
        for _ in range(min(limit, len(self.ready))):
            first = self.ready.popleft()
            if isinstance(first, Answer):
                answers.append(first)
                broadcast = None
                continue
            # uses_stream, can_take_events and _take_events, written out: most of all deliveries pass here.
            first.is_ready = False
            stream, events = first.stream, first.queue
            if not events or first.in_flight or not first.is_urgent:    # not urgent: a connect has taken those that were
                continue
            if stream is not None and first.acknowledgement is None:
                is_shared = broadcast is not None and events is broadcast.events
                if not is_shared and len(events) > 1 and (len(events) > max_frame_events or events.size > MAX_ANSWER):
                    events = self._take_events(first, stream, max_frame_events)
                else:
                    first.queue, first.is_urgent, first.lazy_deadline, first.in_flight = (), False, math.inf, stream
                if not is_shared or type(stream) is not type(broadcast.exchange):
                    broadcast = Broadcast(stream, events)
                    answers.append(broadcast)
                broadcast.ways.append((first, stream))
            elif first.hold is not None:
                answers.append(self._take_answer(first))
                broadcast = None
        return answers

    def _take_answer(self, session: Session) -> Answer:
        limit = self.options.max_frame_events if session.stream is not None else math.inf
        answer = self._take_hold(session.hold)
        answer.events = self._take_events(session, answer.exchange, limit)
        return answer

    def _take_events(self, session: Session, exchange: Exchange, limit: float = math.inf) -> Sequence[Event]:
        """The next events of the session for the exchange, as many as one answer carries; none while others are in flight.
        """
        if session.in_flight:
            return ()
        events, session.queue = session.queue, ()
        if len(events) > 1 and (len(events) > limit or events.size > MAX_ANSWER):
            count = count_for_answer(events, limit)
            events, rest = events[:count], events[count:]
            session.queue = Backlog(rest, self.memory) if rest else ()
        session.is_urgent, session.lazy_deadline = bool(session.queue), math.inf
        if session.acknowledgement:
            for event in events:
                session.acknowledgement.take_out(event)
        else:
            session.in_flight = exchange if events else None
        return events

    def settle(self, answer: Answer, is_written: bool) -> None:
        """The answer has been written, or is known not to be: then its events wait for the next connect."""
        assert self.lock.locked()
        if isinstance(answer, Broadcast):
            self._settle_events([session for session, _ in answer.ways], answer.events, is_written)
        elif answer.session is not None:
            if answer.replies:              # a connect's; written or lost, now it is the client's turn
                answer.session.lease = self.clock() + self.options.connect_timeout
            self._settle_events([answer.session], answer.events, is_written)
            self._schedule(answer.session)

    def _settle_events(self, sessions: Iterable[Session], events: Sequence[Event], is_written: bool) -> None:
        """The sessions' events are in flight no more; what has come meanwhile may follow."""
        assert self.lock.locked()
        for session in sessions:
            if events and not session.acknowledgement:
                session.in_flight = None
                if not is_written and not session.ended:
                    session.queue = Backlog([*events, *session.queue], self.memory)
                    session.is_urgent = True
            if session.queue:
                self.make_ready(session)
            if session.queue or session.hold is None or session.timer is None:
                self._schedule(session)     # else it will be looked at in time: when its connect has been held enough

    def send(self, answers: Sequence[Answer]) -> list[tuple[Answer, bool]]:
        """Send them, without the lock.  Those whose fate is known come back, with whether they were written.

        All are packed before the first is sent: a system call drives our code out of the processor's caches, so
        little should stand between one and the next.  What fails is not tried again: it would fail for ever.
        """
        is_logged = self._plain_logger.isEnabledFor(logging.DEBUG)
        for answer in answers:
            try:
                answer.packet = answer.exchange.pack(answer)
                if is_logged:
                    for exchange in answer.exchanges:
                        self.logger.debug("to %s: %.1000s", exchange.address, answer.batch())
            except Exception:
                self.logger.exception("an answer could not be made")
                for exchange in answer.exchanges:
                    exchange.give_up()
        fates = []
        for answer in answers:
            is_written: bool | None = True
            if isinstance(answer, Broadcast):
                self._broadcast(answer)
            elif answer.packet is not None:
                try:
                    is_written = answer.exchange.send(answer)
                except Exception:
                    self.logger.exception("an answer could not be sent")
                    answer.exchange.give_up()
            answer.packet = None            # what a slow reader has not taken yet, its connection keeps
            if is_written is not None:
                fates.append((answer, is_written))
        return fates

    def _broadcast(self, broadcast: Broadcast) -> None:
        """Send it on all its streams.  It keeps the ways that are settled with it; the others see to themselves."""
        if broadcast.packet is None:
            return
        done = []
        for way in broadcast.ways:
            session, stream = way
            try:
                if stream.feed(broadcast, session):
                    done.append(way)
            except Exception:
                self.logger.exception("an answer could not be sent")
                stream.give_up()
                done.append(way)
        broadcast.ways = done

    def settle_later(self, answer: Answer, is_written: bool) -> None:
        """settle, for who does not hold the lock."""
        with self.lock:
            self.settle(answer, is_written)
        self.wake()

    def _answer(self, turn: Turn, replies: list[str]) -> None:
        """Answer a request at once, with the events of the session whose connect was in it.

        But that events were published is told a moment later, when what has come meanwhile is read: mostly connects
        of subscribers, who wait for the events, while their publisher only wants to be sure.  No answer that leaves
        at once overtakes such a reply: a client that has its reply to a disconnect waits for no other.
        """
        session = turn.connecting
        answer = Answer(turn.exchange, replies, session, turn.events)
        can_wait = turn.publishes == len(replies) and turn.exchange.stream is None and len(self.ready) <= FEW_ANSWERS
        if can_wait and self._after_next_look(self._send_postponed):
            self._postponed.append(answer)
            return
        while self._postponed:
            self._send_postponed()
        if session is not None and not session.acknowledgement and not session.uses_stream:
            with self.lock:
                answer.events = self._take_events(session, turn.exchange)
        for _, is_written in self.send([answer]):
            if session is not None:
                self.settle_later(answer, is_written)

    def _send_postponed(self) -> None:
        """Send the first of the replies that were to wait; it stands in line until it is sent, so none overtakes it."""
        with self._sending_postponed:
            if self._postponed:             # else all have left already, before another answer
                try:
                    self.send([self._postponed[0]])
                finally:
                    self._postponed.popleft()

    def answer_now(self, exchange: Exchange) -> None:
        """Answer the connect held on the exchange, if it still is: another request came behind it."""
        with self.lock:
            if exchange.hold is None:
                return
            answer = self._take_hold(exchange.hold)
        for _, is_written in self.send([answer]):
            self.settle_later(answer, is_written)

    def hang_up(self, exchange: Exchange) -> None:
        """The connection of the exchange is gone.  What waits for its session goes on waiting."""
        with self.lock:
            if exchange.hold is not None:
                session = exchange.hold.session
                self._take_hold(exchange.hold)
                self._schedule(session)

    # -- Time ------------------------------------------------------------------------------

    def _schedule(self, session: Session) -> None:
        """See to it that the session is looked at when its deadline comes.

        A deadline mostly moves away, as each message renews the lease: then the entry that is in the
        heap stays, and the look at it finds the new one.
        """
        assert self.lock.locked()
        deadline = session.deadline
        if deadline is not None and (session.timer is None or deadline < session.timer):
            session.timer = deadline
            if len(self.timers) > 1.5 * len(self.sessions) + 100:
                # What ended, or was put in again for an earlier time, must not stay till its time has come: a
                # hundred thousand handshakes and disconnects would take 100 MiB.
                self.timers = [(each.timer, each) for each in self.sessions.values()
                               if each.timer is not None and each is not session]
                heapq.heapify(self.timers)
            heapq.heappush(self.timers, (deadline, session))
            if self.timers[0][1] is session:
                self.condition.notify_all()

    def _look_at_timers(self, limit: int) -> None:
        """Answer the connects that have been held long enough; end the sessions whose lease is over.

        Ten thousand connects that were all answered by one event are all held at the same time, and end so, too;
        a few at a time, or everybody else waits for them.
        """
        now = self.clock()
        for _ in range(limit):
            if not self.timers or self.timers[0][0] > now:
                return
            when, session = heapq.heappop(self.timers)
            if session.timer != when:       # an earlier entry replaced this one
                continue
            session.timer = None
            deadline = session.deadline
            if deadline is None or deadline > now:
                self._schedule(session)
            elif session.queue and session.can_take_events:
                session.is_urgent = True    # lazy events have waited long enough, or leave with the reply that is due
                self.make_ready(session)    # and settling it will schedule the session again
                if session.uses_stream and session.hold is not None:    # events do not answer it here
                    if session.hold.deadline <= now:
                        self._release(session.hold)
                    else:                   # its time may end before the frame is settled
                        session.lazy_deadline = math.inf
                        self._schedule(session)
            elif session.hold is not None:
                self._release(session.hold)
                self._schedule(session)
            else:
                self.end_session(session, ENDED_TIMEOUT)

    def has_work(self) -> bool:
        """Whether something is to be sent, or to be looked at, now."""
        assert self.lock.locked()
        is_due = bool(self.timers) and self.timers[0][0] <= self.clock()
        return bool(self.ready or self.mailboxes) or is_due

    def seconds_to_deadline(self) -> float | None:
        assert self.lock.locked()
        return min(max(0.0, self.timers[0][0] - self.clock()), LONGEST_WAIT) if self.timers else None

    def wake(self) -> None:
        """Have sent what was made ready, by this thread or by the wait, and the mailboxes opened.  Without the lock."""
        # A thread that adds something after these looks calls wake, too.
        if self.ready and not self._deliver_here():
            with self.lock:
                self.condition.notify_all()
        if self.mailboxes:
            self.open_mailboxes()

    def open_mailboxes(self) -> None:
        """Have those opened into which something has been put."""
        with self.lock:
            mailboxes, self.mailboxes = self.mailboxes, []
        for mailbox in mailboxes:
            self._run_later(mailbox.open)

    # -- Listeners -------------------------------------------------------------------------

    def add_listener(self, listener: Callable[[str, dict], None], events: Iterable[str] = EVENTS) -> None:
        for event in events:
            if event not in EVENTS:
                raise ValueError(f"there is no event {event!r}; it must be one of {', '.join(EVENTS)}")
        with self.lock:
            for event in events:
                self._listeners[event] = [*self._listeners[event], listener]

    def tell(self, event: str, /, **details: Any) -> None:
        """Let the listeners know, in order, on a thread of their own."""
        assert self.lock.locked()
        if self._listeners[event]:
            self._notify(event, details, details["client_id"])

    def _notify(self, event: str, details: dict | Event, client_id: str | None, size: int = 0) -> None:
        """Put a notice into the listeners' mailbox, if there is room.

        Listeners that are too far behind miss what was published and subscribed, and sessions as a whole: whose
        beginning they were not told, they do not hear of.  So an application that keeps a list of who is there keeps
        it right; and its mistake neither fills the memory nor stops the server.
        """
        assert self.lock.locked()
        is_behind = self._notices in self.full_mailboxes or self._missed_notices
        if is_behind and event != "client_disconnect":
            if event == "client_connect":
                self._untold.add(client_id)
            if not self._missed_notices:
                self.log_later(logging.WARNING, "the listeners are too far behind; they miss what happens now")
            self._missed_notices += 1
        elif client_id in self._untold:
            if event == "client_disconnect":
                self._untold.discard(client_id)
        else:
            self._notices.put((event, details), size + NOTICE_SIZE)

    def _tell_listeners(self, notice: tuple[str, dict | Event]) -> None:
        event, details = notice
        if isinstance(details, Event):
            details = details.notice()
        if self._missed_notices and self._notices.is_half_empty():      # not sooner, or they would miss some at once
            with self.lock:
                missed, self._missed_notices = self._missed_notices, 0
            self.logger.warning("the listeners have missed %d notices, and hear of what happens again", missed)
        told = {key: value for key, value in details.items() if value is not None or key == "data"}
        for listener in self._listeners[event]:
            self.application.run(f"a listener on {event}", listener, event, dict(told))

    def log_later(self, level: int, text: str, *arguments: Any) -> None:
        """Write a line into the log on a handler thread: under the lock nothing may be written."""
        assert self.lock.locked()
        if not self._log_lines.has_too_much():
            self._log_lines.put((level, text, *arguments), NOTICE_SIZE)

    # -- Calls from inside the process -----------------------------------------------------
    #
    # No handshake, no access control: who calls these is the application itself.

    def subscriber(self, client_id: str) -> Session | LocalClient:
        """The session or local client of that id, or BayeuxError 402."""
        assert self.lock.locked()
        found = self.sessions.get(client_id) or self.local_clients.get(client_id)
        if found is None:
            raise BayeuxError(402, str(client_id), "Unknown client")
        return found

    def subscribe(self, channel: str, client_id: str) -> None:
        self.require_broadcast(channel, is_channel_pattern(channel))
        with self.lock:
            self.add_subscription(self.subscriber(client_id), channel)
        self.wake()

    def unsubscribe(self, channel: str, client_id: str) -> None:
        with self.lock:
            subscriber = self.subscriber(client_id)
            self.require_subscription(subscriber, channel)
            self.remove_subscription(subscriber, channel)
        self.wake()

    def publish(self, channel: str, data: Any, client_id: str | None = None, id: Any = None,
                ext: dict | None = None) -> None:
        self.require_broadcast(channel, is_channel_name(channel))
        if self.full_mailboxes:
            self._require_room(channel)
        self._deliver(Parcel([self._event(channel, data, client_id, id, ext)]))
        self.wake()

    def client_push(self, client_id: str, channel: str, data: Any = None, **extra: Any) -> None:
        if not is_channel_name(channel) or channel.startswith(META):
            raise BayeuxError(405, channel, "Bad channel name")
        event = Event({"channel": channel, "data": data, **extra})
        with self.lock:
            subscriber = self.subscriber(client_id)
            if isinstance(subscriber, LocalClient) and subscriber.mailbox in self.full_mailboxes:
                raise BayeuxError(429, channel, "The local client is too far behind")
        own_event = self._own_event(subscriber, event)
        with self.lock:
            if own_event is not None and not subscriber.ended:
                self.memory.take_event(own_event)
                subscriber.accept(Parcel([own_event]), self)
            self._end_overfull()
            if self._listeners["client_push"]:
                notice = {"client_id": client_id, "channel": channel, "data": data, **extra}
                self._notify("client_push", notice, client_id, event.size)
        self.wake()

    def disconnect(self, client_id: str, reason: str) -> None:
        with self.lock:
            self.subscriber(client_id).end(reason, self)
        self.wake()

    @staticmethod
    def require_broadcast(channel: str, is_well_formed: bool) -> None:
        if not is_well_formed:
            raise BayeuxError(405, str(channel), "Bad channel name or pattern")
        if channel.startswith((META, SERVICE)):
            raise BayeuxError(403, channel, "Not a broadcast channel; a service is called by its clients")


# ======================================================================================
# §8  Local clients
#
# A subscriber inside this process.  It needs no handshake and no network; its callbacks run
# on a handler thread, one after another, in the order of publishing, without the lock.
# ======================================================================================

live_servers: weakref.WeakSet = weakref.WeakSet()       # where LocalClient looks for an alias
live_servers_lock = threading.Lock()                    # held while it is read or changed


def find_server(alias: str) -> Any:
    """The one live server of that alias, or ValueError."""
    with live_servers_lock:
        found = [server for server in live_servers if server.options.alias == alias]
    if len(found) != 1:
        number = "more than one" if found else "no"
        raise ValueError(f"{number} server in this process has the alias {alias!r}; pass the server itself")
    return found[0]


class LocalClient:
    """Publishes and subscribes inside the server's process (the original's local client, "subscribe {...}").

    Arguments:
        server: a BayeuxServer, or its alias.
        name: its id; events it publishes carry it, as clientId, to other local clients.  A random one
            if None.
        on_end: called with the reason (a text) when the client is closed, by whomever.

    Raises:
        ValueError: no server, or more than one, has the alias; or another local client has the name.

    A with block closes it at its end.
    """

    def __init__(self, server: Any, name: str | None = None,
                 on_end: Callable[[str], None] | None = None) -> None:
        self._core: Bayeux = (find_server(server) if isinstance(server, str) else server).core
        self.id: str = name if name is not None else "local-" + secrets.token_hex(8)
        self.patterns: dict[str, None] = {}
        self.ended: str | None = None
        self._on_end = on_end
        self._callbacks: dict[str, Callable[[dict], None]] = {}
        self.mailbox = Mailbox(self._core, self._handle)
        with self._core.lock:
            if self._core.stopping:
                raise ValueError("the server has stopped")
            if self.id in self._core.local_clients:
                raise ValueError(f"another local client has the name {self.id!r}")
            self._core.local_clients[self.id] = self
            self._core.tell("client_connect", client_id=self.id, session=self)
        self._core.wake()

    def __repr__(self) -> str:
        return f"<LocalClient {self.id!r}>"

    @property
    def subscriptions(self) -> set[str]:
        """The channels and patterns that it is subscribed to."""
        return set(self.patterns)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def subscribe(self, channel: str, callback: Callable[[dict], None] | None = None) -> None:
        """Have callback called with each event on the channel, or on those that a wildcard matches.

        Arguments:
            channel: a channel's name or a pattern.
            callback: takes a message, a dict of its own: channel, data, and clientId, id, ext where the
                publisher gave them.  None: counted as a subscriber, nothing is delivered (the
                original's no_callback).  It may publish, subscribe, close; if it raises, that is
                logged.  Where several patterns match, each callback is called once.

        Raises:
            BayeuxError: no pattern (405), a /meta/ or /service/ channel (403), or closed (402).
        """
        self._core.require_broadcast(channel, is_channel_pattern(channel))
        with self._core.lock:
            self._require_open()
            self._callbacks.pop(channel, None)
            if callback is not None:
                self._callbacks[channel] = callback
            self._core.add_subscription(self, channel)
        self._core.wake()

    def unsubscribe(self, channel: str) -> None:
        """End the subscription.  Raises BayeuxError: there is none (404), or closed (402)."""
        with self._core.lock:
            self._require_open()
            self._core.require_subscription(self, channel)
            self._core.remove_subscription(self, channel)
        self._core.wake()

    def _require_open(self) -> None:
        if self.ended:
            raise BayeuxError(402, self.id, "The local client is closed")

    def publish(self, channel: str, data: Any, id: Any = None, ext: dict | None = None) -> None:
        """Send data (whatever JSON can hold) to all subscribers of the channel, this client included.

        Raises:
            BayeuxError: no channel's name (405), a /meta/ or /service/ channel (403), or a local client that
                is subscribed to it has more than max_queue events to handle already (429).
            TypeError, ValueError: JSON cannot hold the data.
        """
        self._core.publish(channel, data, self.id, id, ext)

    def close(self) -> None:
        """End the subscriptions.  What has not been delivered is dropped.  Closing twice does nothing."""
        with self._core.lock:
            self.end(ENDED_ASKED, self._core)
        self._core.wake()

    # The core's side, the same as a session's.

    def accept(self, events: Parcel, core: Bayeux) -> None:
        """Take events for the callbacks.  Under the lock."""
        if self._callbacks:
            for event in events:
                self.mailbox.put(event, event.size)

    def forget(self, pattern: str) -> None:
        """The subscription is over.  Under the lock."""
        self.patterns.pop(pattern, None)
        self._callbacks.pop(pattern, None)

    def end(self, reason: str, core: Bayeux) -> None:
        """Leave the server.  Under the lock."""
        if self.ended:
            return
        self.ended = reason
        core.local_clients.pop(self.id, None)
        for pattern in self.patterns:
            core.registry.discard(pattern, self)
        self.patterns = {}
        core.tell("client_disconnect", client_id=self.id, reason=reason)
        if reason != ENDED_SHUTDOWN:
            self.mailbox.clear()
        if self._on_end is not None:
            self.mailbox.put(None)

    def _handle(self, event: Event | None) -> None:
        if event is None:
            return self._core.application.run(f"on_end of the local client {self.id}", self._on_end, self.ended)
        matching = patterns_matching(event.channel)
        with self._core.lock:
            # Each callback once; and none that was taken away while the event waited.
            callbacks = [callback for pattern, callback in self._callbacks.items() if pattern in matching]
        for callback in dict.fromkeys(callbacks):
            if self.ended in (None, ENDED_SHUTDOWN):
                self._core.application.run(f"a callback of the local client {self.id} on {event.channel}",
                                           callback, event.local_message())


# ======================================================================================
# §9  The long-poll wait
#
# One thread waits, on one Condition, for all sessions together: for those that have something to
# say and what can carry it, and for the nearest deadline.  (A thread for each held connect costs three
# times the time and twenty times the memory: every wake-up hands the interpreter's lock round
# a thousand threads.)
#
# Delivering is the same whoever does it: take a few answers under the lock, send them without
# it, settle them while taking the next.  What piled up meanwhile leaves together.  The thread that
# has just read a publish (the leader, §11) delivers itself before it sleeps, which spares two
# hand-overs of the interpreter's lock a delivery; the wait delivers what comes from other
# threads, or with time.
# ======================================================================================

class LongPollWait(threading.Thread):
    """Answers held connects and feeds streams; connects that are not held take their events along themselves."""

    def __init__(self, core: Bayeux) -> None:
        super().__init__(name="bayeux long-poll wait", daemon=True)
        self._core = core
        self._is_over = False
        self._delivering = threading.Lock()

    def run(self) -> None:
        while True:
            try:
                if not self._sleep():
                    return
                self.deliver()
            except BaseException:       # whatever it is, others wait for their events
                self._core.logger.exception("the long-poll wait failed, and goes on")
                time.sleep(FAILURE_PAUSE)

    def _sleep(self) -> bool:
        """Wait until there is something to do; False: there never will be."""
        core = self._core
        with core.condition:
            while not core.has_work():
                if self._is_over:
                    return False
                core.condition.wait(core.seconds_to_deadline())
        return True

    def deliver(self, rounds: int | None = None) -> bool:
        """Send what is in line, on this thread, whichever it is: all of it, or that of so many looks.

        One thread at a time, or answers might overtake each other.  False: another is at it.  If that is the wait, it
        looks again before it sleeps.
        """
        if not self._delivering.acquire(blocking=rounds is None):
            return False
        try:
            return self._deliver(rounds)
        finally:
            self._delivering.release()
            if self._core.mailboxes:    # sessions may have ended, and listeners want to know
                self._core.open_mailboxes()

    def _deliver(self, rounds: int | None) -> bool:
        sent: list[tuple[Answer, bool]] = []
        for number in range(rounds) if rounds else itertools.count():
            answers = self._settle_and_take(sent, ANSWERS_AT_ONCE)
            if not answers:
                return True
            sent = self._core.send(answers)
            if rounds and number == 1:      # most often there is no second one, and no need for a clock
                end = time.monotonic() + 4 * TURN
            elif rounds and number > 1 and time.monotonic() > end:
                break
        self._settle_and_take(sent, 0)
        return True

    def _settle_and_take(self, sent: list[tuple[Answer, bool]], limit: int) -> list[Answer]:
        with self._core.lock:
            for answer, is_written in sent:
                self._core.settle(answer, is_written)
            return self._core.take_answers(limit)

    def stop(self, patience: float | None = None) -> None:
        """End the thread, once all that is in line has been sent; by the leader, if that is at it."""
        with self._core.lock:
            self._is_over = True
            self._core.condition.notify_all()
        self.join(patience)
        if not self.is_alive():
            self.deliver()
            while self._core.ready:     # the leader left it to this thread, which was at it
                self.deliver()


# ======================================================================================
# §10  WebSocket frames
#
# After an upgrade from HTTP both sides send frames whenever they like.  This is the codec: bytes
# in, messages out, and back; it does no input or output.  (RFC 6455, "Data Framing")
#
#      0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
#     +-+-+-+-+-------+ +-+-------------+-------------------------+---------------+---------
#     |F|reserved     | |M| length      | 0, 2 or 8 bytes: length | 0 or 4 bytes: | payload
#     |I|bits | opcode| |A| 0 .. 125    | if that was 126 or 127  | key, if MASK  |
#     |N|     |       | |S| 126   127   |                         |               |
#     +-+-+-+-+-------+ +-+-------------+-------------------------+---------------+---------
#
# A message is one frame, or several (fragments) of which the last has FIN; control frames may
# come between fragments.  What a client sends is masked: each byte xor one of four key bytes.
# ======================================================================================

CONTINUATION_FRAME, TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FIN, RESERVED, IS_CONTROL, MASKED = 0x80, 0x70, 0x8, 0x80
MAX_CONTROL_PAYLOAD = 125               # bytes (RFC 6455, "Control Frames")
WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

# Close codes (RFC 6455, "Defined Status Codes"); a peer may send these, and 3000 to 4999.
GOING_AWAY, PROTOCOL_ERROR, UNSUPPORTED_DATA, NO_CODE, BAD_DATA, TOO_BIG = 1001, 1002, 1003, 1005, 1007, 1009
CLOSE_CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014)


class WebSocketError(Exception):
    """The peer broke the rules: the connection is closed with code, and the text as the reason."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def websocket_accept(key: str) -> str:
    """The answer to Sec-WebSocket-Key, which proves that we speak WebSocket.  (RFC 6455, "Server Requirements")"""
    return base64.b64encode(hashlib.sha1((key + WEBSOCKET_GUID).encode("ascii")).digest()).decode("ascii")


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole message in one frame, unmasked, as servers send it."""
    length = len(payload)
    if length <= 125:
        return bytes((FIN | opcode, length)) + payload
    if length < 1 << 16:
        return bytes((FIN | opcode, 126)) + length.to_bytes(2, "big") + payload
    return bytes((FIN | opcode, 127)) + length.to_bytes(8, "big") + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """code NO_CODE: without one, in answer to a close without one."""
    if code == NO_CODE:
        return frame(CLOSE_FRAME, b"")
    text = reason.encode("utf-8")[:MAX_CONTROL_PAYLOAD - 2].decode("utf-8", "ignore").encode("utf-8")
    return frame(CLOSE_FRAME, code.to_bytes(2, "big") + text)


def unmask(payload: bytes, key: bytes) -> bytes:
    """Each byte xor a byte of the key, all at once: as two large numbers."""
    if key == b"\0\0\0\0":
        return payload
    repeated = (key * (len(payload) // 4 + 1))[:len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(payload), "big")


class FrameReader:
    """Reads a client's frames.

    Arguments:
        max_size: bytes of a message, all its fragments together.
    """

    __slots__ = ("_buffer", "_decoder", "_fragments", "_max_size", "_opcode", "_place")

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._buffer: bytes | bytearray = b""
        self._place = 0                         # where the next frame begins in it
        self._opcode = CONTINUATION_FRAME       # of the message whose fragments are being read; else this
        self._fragments: bytearray | None = None        # all in one: a list of small ones takes many times the memory
        self._decoder: codecs.IncrementalDecoder | None = None      # of its text

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """The messages that data completes, one by one: (opcode, payload).

        Payloads are text for TEXT_FRAME, (code, reason) for CLOSE_FRAME, and bytes.  A fragment that completes
        nothing gives an empty CONTINUATION_FRAME, so that a reader of many small ones can stop in between.  What
        came before a fault is given before WebSocketError is raised.
        """
        if not self._buffer:
            self._buffer = data
        else:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)      # it grows, and is not copied for each part of a frame
            self._buffer += data
        while True:
            parsed = self._next_frame()
            if parsed is None:
                if self._place:                         # an idle socket keeps nothing
                    self._buffer, self._place = self._buffer[self._place:], 0
                return
            is_final, opcode, payload = parsed
            if opcode & IS_CONTROL:
                yield opcode, self._close_payload(payload) if opcode == CLOSE_FRAME else payload
            elif is_final and opcode != CONTINUATION_FRAME:
                yield opcode, self._decoded(payload) if opcode == TEXT_FRAME else payload
            elif self._take_fragment(is_final, opcode, payload):
                fragments, opcode = self._fragments, self._opcode
                self._fragments, self._decoder, self._opcode = None, None, CONTINUATION_FRAME
                yield opcode, fragments.decode("utf-8") if opcode == TEXT_FRAME else bytes(fragments)
            else:
                yield CONTINUATION_FRAME, b""

    @property
    def size(self) -> int:
        """Bytes that it keeps until the rest of a message has come."""
        return len(self._buffer) + len(self._fragments or b"")

    def take_rest(self) -> bytes:
        """What has been fed and not yet been read, when its messages are not to be read now."""
        rest = bytes(self._buffer[self._place:])
        self._buffer, self._place = b"", 0
        return rest

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        """The next whole frame, or None.  What can be refused by its head is refused before its payload is there."""
        buffer, place = self._buffer, self._place
        if len(buffer) < place + 2:
            return None
        first, second = buffer[place], buffer[place + 1]
        opcode, length, start = first & 0x0F, second & 0x7F, place + 2
        if length >= 126:
            start += 2 if length == 126 else 8
            length = int.from_bytes(buffer[place + 2:start], "big")
        self._check_head(first, second, opcode)
        if len(buffer) < start:
            return None
        if not opcode & IS_CONTROL and len(self._fragments or b"") + length > self._max_size:
            raise WebSocketError(TOO_BIG, f"a message is larger than {self._max_size} bytes")
        end = start + 4 + length
        if len(buffer) < end:
            return None
        self._place = end
        return bool(first & FIN), opcode, unmask(buffer[start + 4:end], buffer[start:start + 4])

    def _check_head(self, first: int, second: int, opcode: int) -> None:
        if first & RESERVED:
            raise WebSocketError(PROTOCOL_ERROR, "reserved bits are set, but no extension was agreed on")
        if opcode not in (CONTINUATION_FRAME, TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME):
            raise WebSocketError(PROTOCOL_ERROR, f"opcode {opcode} is not defined")
        if not second & MASKED:                 # a client MUST mask (RFC 6455, "Overview" of "Data Framing")
            raise WebSocketError(PROTOCOL_ERROR, "a client's frames must be masked")
        if opcode & IS_CONTROL:
            if not first & FIN or second & 0x7F > MAX_CONTROL_PAYLOAD:
                raise WebSocketError(PROTOCOL_ERROR, "a control frame is fragmented, or too long")
        elif (opcode == CONTINUATION_FRAME) == (self._opcode == CONTINUATION_FRAME):
            raise WebSocketError(PROTOCOL_ERROR, "a continuation without a beginning, or the other way round")

    def _take_fragment(self, is_final: bool, opcode: int, payload: bytes) -> bool:
        """Keep the fragment; whether the message is complete.  Text is checked at once, within a character too."""
        if opcode != CONTINUATION_FRAME:
            self._opcode, self._fragments = opcode, bytearray()
            self._decoder = codecs.getincrementaldecoder("utf-8")() if opcode == TEXT_FRAME else None
        if self._decoder is not None:
            self._decoded(payload, is_final)
        self._fragments += payload
        return is_final

    def _decoded(self, payload: bytes, is_final: bool = True) -> str:
        try:
            return self._decoder.decode(payload, is_final) if self._decoder else payload.decode("utf-8")
        except UnicodeDecodeError:
            raise WebSocketError(BAD_DATA, "a text is not UTF-8") from None

    @staticmethod
    def _close_payload(payload: bytes) -> tuple[int, str]:
        """(RFC 6455, "Close")"""
        if not payload:
            return NO_CODE, ""
        code = int.from_bytes(payload[:2], "big")
        if len(payload) < 2 or not (code in CLOSE_CODES or 3000 <= code <= 4999):
            raise WebSocketError(PROTOCOL_ERROR, f"{code} is no close code that may be sent")
        try:
            return code, payload[2:].decode("utf-8")
        except UnicodeDecodeError:
            raise WebSocketError(BAD_DATA, "a close reason is not UTF-8") from None


# ======================================================================================
# §11  Connections
#
# A connection costs no thread while nothing happens on it: it is *parked* in a selector.
# One thread, the leader, watches the selector.  It reads what came, handles it and answers,
# delivers what was published (§9), and goes on watching: no hand-over, no system call but the
# reading and the writing.  What may take its time it hands over to a handler thread: a long
# request, everything that the application's code has a part in, the reading of files.  So
# nothing but the number of short requests keeps the leader from going round.
#
#   parked      in the selector, no exchange; bytes wake it, KEEP_ALIVE seconds end it
#   busy        has an exchange: a request is being handled, or its connect is held
#   handled     by a handler thread; the leader looks at it again when that is done
#   writing     its output waits for a slow peer; nothing is read meanwhile
#   streaming   its protocol is no longer HTTP: anything may be sent on it at any time
#   closing     was answered for the last time; what comes is thrown away until the peer hangs up
#
# Who may do what: only the leader touches the selector and closes; it reads, unless a handler
# thread has the connection.  Any thread may write the answer of an exchange; a connection's own
# lock, under which nothing else is taken, keeps writing and closing apart (a closed socket's
# number may be another client's by then).
#
# Handler threads are shared out by address: no address has more than half of them at once, its
# other requests wait in its own line, and the lines take turns.  While none comes free, as each
# is stuck in the application's code, a request that needs one is refused with 503 at once; all
# that needs none goes on.
#
# Sockets are shared out, too: an address keeps so many connections on which no connect is held and
# nothing is streamed.  One more costs it the one that has been silent longest; nobody who lives is
# locked out.
# ======================================================================================

def file_limit() -> float:
    """How many file descriptors this process may have; every client takes one."""
    try:
        import resource
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return math.inf if limit == resource.RLIM_INFINITY else limit
    except (ImportError, OSError):
        return math.inf                 # Windows has no such limit


def raise_file_limit() -> None:
    """Most systems give a program 1,024 file descriptors, or 256, until it asks for more."""
    try:
        import resource
        hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    except (ImportError, OSError):
        return
    # macOS calls its hard limit infinite, and then refuses more than kern.maxfilesperproc, or OPEN_MAX, 10,240.
    highest = math.inf if hard_limit == resource.RLIM_INFINITY else hard_limit
    for wanted in (hard_limit, 1 << 20, 1 << 17, 61_440, 24_576, 10_240, 4096):
        if wanted == hard_limit or file_limit() < wanted < highest:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard_limit))
                return
            except (OSError, ValueError):
                pass                    # the next one is less


NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Job(NamedTuple):
    """Work for a handler thread.

    Attributes:
        run: the work.
        address: for which client's address it is; None: for none.
        refuse: called instead, when it has waited too long for a thread; None: it may wait for ever.
        since: when it was asked for.
    """

    run: Callable[[], None]
    address: str | None
    refuse: Callable[[], None] | None
    since: float


class HandlerThreads:
    """Runs jobs on threads that are kept for the next job; as many threads as needed, up to a limit.

    Arguments:
        limit: the number of threads, without the leader.
        limits_addresses: whether one address may have no more than half of them.
    """

    def __init__(self, limit: int, logger: logging.Logger, limits_addresses: bool = True) -> None:
        self._limit = limit
        self._limit_by_address = max(1, limit // 2) if limits_addresses else limit
        self._logger = logger
        self._lock = threading.Lock()                       # guards all that follows
        self._begun: queue.SimpleQueue[Job | None] = queue.SimpleQueue()        # for the threads that are idle
        self._waiting: dict[str | None, collections.deque[Job]] = {}            # by address, the next in turn first
        self._running: collections.Counter[str | None] = collections.Counter()  # jobs by address
        self._count = 0
        self._threads: set[int] = set()                     # their idents
        self._idle = 0
        self._last_change = time.monotonic()                # when a job began, or ended

    def run(self, run: Callable[[], None], address: str | None = None, refuse: Callable[[], None] | None = None) -> None:
        """Have a job done, now or when a thread is free for it; or refuse it at once, if none becomes free."""
        job = Job(run, address, refuse, time.monotonic())
        with self._lock:
            has_thread = self._idle > 0 or (self._count < self._limit and self._start_thread())
            if has_thread and self._is_allowed(address):
                self._idle -= 1
                self._running[address] += 1
                self._last_change = job.since
                self._begun.put(job)
                return
            is_stuck = not has_thread and job.since - self._last_change > STUCK_AFTER
            if refuse is None or not is_stuck:
                self._waiting.setdefault(address, collections.deque()).append(job)
                return
        refuse()

    def is_here(self) -> bool:
        """Whether this is one of the threads."""
        return threading.get_ident() in self._threads

    def _is_allowed(self, address: str | None) -> bool:
        return not address or self._running[address] < self._limit_by_address

    def _start_thread(self) -> bool:
        assert self._lock.locked()
        try:
            threading.Thread(target=self._work, name=f"bayeux handler {self._count + 1}", daemon=True).start()
        except RuntimeError as error:           # the job waits for the next idle one
            self._logger.error("no more handler threads than %d: %s", self._count, error)
            return False
        self._count += 1
        self._idle += 1
        return True

    def _work(self) -> None:
        with self._lock:
            self._threads.add(threading.get_ident())
        job = self._begun.get()
        while job is not None:
            address = job.address
            try:
                job.run()
            except BaseException:               # whatever it is, the thread is needed for others
                self._logger.exception("a handler thread's job failed")
            job = None                          # an idle thread would keep the request of its last job
            job = self._next_job(address) or self._begun.get()
        with self._lock:
            self._threads.discard(threading.get_ident())    # it may be another's soon

    def _next_job(self, address: str | None) -> Job | None:
        """A job for that address is done: the next one, from the next line that may have a thread; or None."""
        with self._lock:
            self._last_change = time.monotonic()
            self._running[address] -= 1
            if not self._running[address]:
                del self._running[address]
            for waiting, line in self._waiting.items():
                if self._is_allowed(waiting):
                    job = line.popleft()
                    del self._waiting[waiting]
                    if line:                    # behind all the others
                        self._waiting[waiting] = line
                    self._running[waiting] += 1
                    return job
            self._idle += 1
            return None

    def refuse_late(self) -> None:
        """Refuse the jobs that have waited too long, and all if no thread becomes free any more."""
        now, late = time.monotonic(), []
        with self._lock:
            is_stuck = self._idle == 0 and self._count >= self._limit and now - self._last_change > STUCK_AFTER
            patience = STUCK_AFTER if is_stuck else LONGEST_QUEUE
            for address, line in list(self._waiting.items()):
                late += [job for job in line if job.refuse and now - job.since > patience]
                line = collections.deque(job for job in line if not (job.refuse and now - job.since > patience))
                if line:
                    self._waiting[address] = line
                else:
                    del self._waiting[address]
        for job in late:
            job.refuse()

    def stop(self) -> None:
        """Let the threads end as they become idle; one that is stuck in the application's code is left alone."""
        with self._lock:
            self._waiting.clear()
            for _ in range(self._count):
                self._begun.put(None)


class Part(NamedTuple):
    """Output that waits for a slow peer.

    Attributes:
        when_written: is told whether it was written.
        is_interim: the answer is still to come.
    """

    data: memoryview
    when_written: Callable[[bool], None] | None = None
    is_interim: bool = False


class Connection:
    """A client's socket, parked or not.

    Its protocol is told of what happens: consume(connection) when bytes have come into input,
    expired(connection) when its deadline is over, lost(connection) when it is closed.  It tells how many bytes it
    keeps for it, kept_input(connection), and whether a client waits there for events, is_kept_open(connection).
    """

    __slots__ = ("address", "deadline", "exchange", "group", "handled_size", "idle_time", "input", "is_arriving",
                 "is_closed", "is_closing", "is_handled", "kept", "lock", "output", "output_deadline", "protocol",
                 "request", "socket", "source", "unsent", "watch", "watched")
    is_secure = False

    def __init__(self, client_socket: socket.socket, address: str, watch: Watch, protocol: Any,
                 group: str = "") -> None:
        self.socket = client_socket
        self.address = address
        self.group = group                                  # by which limits by address count it; '': by none
        self.watch = watch
        self.protocol = protocol
        self.lock = threading.Lock()
        self.input = b""
        self.request: Request | None = None                 # being read
        self.exchange: Any | None = None                    # being answered; a request or fault where it needs none
        self.output: collections.deque[Part] | tuple[()] = ()       # waits for the peer
        self.unsent = 0                                     # bytes of it
        self.source: BodySource | None = None               # of more output
        self.idle_time: float | None = None                 # after an exchange; None: KEEP_ALIVE
        self.is_handled = False                             # by a handler thread
        self.handled_size = 0                               # bytes of what it handles, or will when it is free
        self.is_arriving = False                            # a request has begun to come
        self.is_closing = False
        self.is_closed = False
        self.deadline = time.monotonic() + watch.patience   # of the protocol; its thread alone sets it
        self.output_deadline = math.inf                     # counts instead while output waits
        self.kept = 0                                       # bytes of input and output, as last counted
        self.watched = 0                                    # what the selector watches for; 0: it is not in it

    def receive(self) -> bytes | None:
        """What has come; b'' at the end; None if there is nothing yet."""
        try:
            return self.socket.recv(RECEIVE_SIZE)
        except WOULD_BLOCK:
            return None
        except OSError:
            return b""

    def is_gone(self) -> bool:
        """Whether the peer has hung up; for a handler thread that has the connection, and may spare itself work."""
        if self.is_closed:
            return True
        try:
            return socket.socket.recv(self.socket, 1, socket.MSG_PEEK) == b""       # beneath TLS, too
        except WOULD_BLOCK:
            return False
        except OSError:
            return True

    def write(self, data: bytes, source: BodySource | None = None, is_last: bool = False,
              when_written: Callable[..., None] | None = None, *arguments: Any) -> bool | None:
        """Answer the exchange, without blocking.

        Arguments:
            data, source: what to send: bytes, then those of a body that is read as they leave.
            is_last: the connection ends with it.
            when_written: called later, with the arguments and whether all was written, if that is not known now.

        Returns:
            True: all is written; False: the peer is gone; None: the rest waits for the peer.
        """
        with self.lock:
            if self.is_closed or self.exchange is None:
                return False
            self.is_closing = self.is_closing or is_last
            is_written = self._send_or_keep(data, source, when_written, arguments)
            if is_written:
                self._finish_exchange()
        if is_written is False:
            self.abort()
        elif is_written is None or self.input:
            self.watch.resume(self)
        return is_written

    def push(self, data: bytes, is_last: bool = False,
             when_written: Callable[..., None] | None = None, *arguments: Any) -> bool | None:
        """Send on a stream, behind what waits already; otherwise as write()."""
        with self.lock:
            if self.is_closed or self.is_closing:
                return False
            self.is_closing = is_last
            is_written = self._send_or_keep(data, None, when_written, arguments)
            if is_written and is_last:
                self._finish_exchange()
        if is_written is False:
            self.abort()
        elif is_written is None:
            self.watch.resume(self)
        return is_written

    def push_interim(self, data: bytes) -> None:
        """Send before the answer (100 Continue).  The exchange goes on."""
        with self.lock:
            if not self.is_closed:
                is_written = self._send_or_keep(data, None, None, (), is_interim=True)
                if is_written is not None:
                    return                  # the leader will read the end of a peer that is gone
        self.watch.resume(self)

    def _send_or_keep(self, data: bytes, source: BodySource | None, when_written: Callable[..., None] | None,
                      arguments: tuple, is_interim: bool = False) -> bool | None:
        """Send what there is room for, and keep the rest for flush(); returns what write() does."""
        assert self.lock.locked()
        try:
            sent = 0 if self.output or not data else self.send(data)
        except WOULD_BLOCK:
            sent = 0
        except OSError:
            return False
        if sent == len(data) and source is None and not self.output:
            return True
        if not self.output:                     # else the peer's time is running already
            self.output_deadline = time.monotonic() + self.watch.patience
            self.output = collections.deque()
        # The rest is not added to what waits, or it would be copied for each frame that follows.
        rest = memoryview(data)[sent:]
        self.output.append(Part(rest, partial(when_written, *arguments) if when_written else None, is_interim))
        self.unsent += len(rest)
        self.source = source
        return None

    def flush(self) -> None:
        """Write more of what waits, as there is room now; not without end, or others would wait.  The leader's."""
        written: list[Callable[[bool], None]] = []
        lost: list[Callable[[bool], None]] = []
        with self.lock:
            is_interim = len(self.output) == 1 and self.output[0].is_interim
            try:
                is_written = any(self._write_part(written) for _ in range(PARTS_AT_ONCE))
            except WOULD_BLOCK:
                is_written = None
            except OSError:
                lost = self._drop_output()
                self._shut(socket.SHUT_RDWR)
                is_written = False
            is_finished = is_written and self.source is None
            if is_finished:
                self.output = ()
                if not is_interim:
                    self._finish_exchange()
        for when_written in written:
            when_written(True)
        for when_written in lost:
            when_written(False)
        if is_written and not is_finished and not self.is_handled:
            self.watch.read_body(self)
        elif is_written is not None:
            self.watch.resume(self)

    def _write_part(self, written: list[Callable[[bool], None]]) -> bool:
        """Some of the output; whether all of it that is there is written now."""
        if self.output:
            part = self.output[0]
            sent = self.send(part.data) if part.data else 0
            self.unsent -= sent
            self.output_deadline = time.monotonic() + self.watch.patience
            if sent < len(part.data):
                self.output[0] = part._replace(data=part.data[sent:])
                return False
            self.output.popleft()
            if part.when_written is not None:
                written.append(part.when_written)
        return not self.output

    def fill(self, part: bytes) -> None:
        """The next part of the body has been read; b'': that was all.  A handler thread's."""
        with self.lock:
            if self.is_closed or self.source is None:
                return
            if self.source.is_closed:
                self.source = None
            if part:
                self.output_deadline = time.monotonic() + self.watch.patience
                self.output = collections.deque((Part(memoryview(part)),))
                self.unsent += len(part)
            else:
                self.output = ()
                self._finish_exchange()

    def _drop_output(self) -> list[Callable[[bool], None]]:
        """It cannot be written any more.  Those who are to be told."""
        assert self.lock.locked()
        lost = [part.when_written for part in self.output if part.when_written is not None]
        self.output, self.unsent = (), 0
        if self.source is not None:
            self.watch.threads.run(self.source.close)       # a body of the application's: foreign code
            self.source = None
        return lost

    def send(self, data: bytes | memoryview) -> int:
        return self.socket.send(data)

    def _finish_exchange(self) -> None:
        """The answer is written: the connection is free for the next request, or closing."""
        assert self.lock.locked()
        self.deadline = time.monotonic() + (LINGER if self.is_closing else self.idle_time or KEEP_ALIVE)
        self.exchange = None                    # last: from now on the leader may begin another
        if self.is_closing:
            self._shut(socket.SHUT_WR)          # and wait for the peer's end, or a reset may overtake the answer

    def abort(self) -> None:
        """Hang up.  The leader notices, and closes.

        Until then nothing more is read, and what has come is not looked at again: a TLS socket gives ciphertext now,
        and a protocol that has failed would fail again.
        """
        with self.lock:
            self.is_closing = True
            self._shut(socket.SHUT_RDWR)
        self.watch.resume(self)

    def _shut(self, how: int) -> None:
        try:
            self.socket.shutdown(how)
        except OSError:
            pass

    def close(self) -> None:
        """The leader's alone."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._shut(socket.SHUT_RDWR)        # a child that was forked may have the socket, too, and keep it open
            self.socket.close()
            lost = self._drop_output()
        for when_written in lost:
            when_written(False)
        self.protocol.lost(self)

    @property
    def time_is_over(self) -> float:
        """When it is: while output waits, the time of its peer is running, whatever else happens."""
        return self.output_deadline if self.output else self.deadline

    @property
    def size(self) -> int:
        """Bytes that it keeps: what has come of a request or waits for a thread, and what its peer has not taken in."""
        return len(self.input) + self.protocol.kept_input(self) + self.handled_size + self.unsent


class TLSConnection(Connection):
    """The same through TLS.  Its handshake happens by itself, in the first reads."""

    __slots__ = ()
    is_secure = True

    def receive(self) -> bytes | None:
        with self.lock:                         # OpenSSL bears no reading and writing at once
            data = super().receive()
            while data and self.socket.pending():
                data += super().receive() or b""
            return data

    def send(self, data: bytes | memoryview) -> int:
        return self.socket.send(data[:RECEIVE_SIZE])    # all or nothing: so not all at once, or a slow peer gets none


class Watch:
    """Parked connections, and the leader, which watches them.

    Arguments:
        listener: the listening socket; accept() is called when somebody connects.
        deliver: sends what is ready; called by the leader before it waits.  Whether it is to be called again soon.
        threads: to which it hands over what may take its time.
        patience: seconds a peer may take to send a request, or to take in an answer.
        memory, turns: see §3.
        kept_open: how many connections an address keeps open, on which a connect is held or something is
            streamed; None: there is no limit by address.
    """

    def __init__(self, listener: socket.socket, accept: Callable[[], None], deliver: Callable[[], bool],
                 threads: HandlerThreads, patience: float, logger: logging.Logger, memory: Memory,
                 turns: Turns, kept_open: Callable[[str], int] | None = None) -> None:
        self.patience = patience
        self.threads = threads
        self._deliver = deliver
        self.connections: set[Connection] = set()
        # By address, where that has a limit: its connections, with the deadline of each when it was last looked at.
        self._by_address: dict[str, dict[Connection, float]] = {}
        self._kept_open = kept_open
        self._warned = LastMinute(time.monotonic, 1)
        self._most = self._most_silent = math.inf
        self._listener = listener
        self._accept = accept
        self._logger = logger
        self._memory = memory
        self._turns = turns
        self._selector = selectors.DefaultSelector()
        self._resumed: collections.deque[Connection] = collections.deque()
        self._handled: collections.deque[Connection] = collections.deque()     # handler threads are done with them
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()     # for after the next look
        self._waking, self._woken = socket.socketpair()
        self._waking.setblocking(False)
        self._woken.setblocking(False)
        self._waking_lock = threading.Lock()    # guards both of them, and _is_awake
        self._is_awake = False
        self._leader: int | None = None
        self._is_accepting = False
        self._wants_accepting = True
        self._accepts_from = 0.0                # a time, after file descriptors have run out
        self._next_sweep = time.monotonic()
        self._is_over = False
        self.has_ended = threading.Event()

    def start(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        threading.Thread(target=self._lead, name="bayeux leader", daemon=True).start()

    def share_out_files(self) -> None:
        """Find out how many connections there can be, in all, and silent ones of one address."""
        if isinstance(self._selector, selectors.SelectSelector):
            self._most = SELECT_LIMIT - 2           # the listener, and what wakes the leader
        self._most_silent = max(1, min(SILENT_CONNECTIONS, file_limit() // 2, self._most // 2))

    def adopt(self, connection: Connection) -> None:
        """Park a new connection.  If its address has too many, the one that has been silent longest goes."""
        if self._kept_open is not None and connection.group:
            neighbours = self._by_address.get(connection.group, {})
            if len(neighbours) - self._kept_open(connection.group) >= self._most_silent:
                self._close_silent(neighbours)
            self._by_address.setdefault(connection.group, {})[connection] = connection.deadline
        self.connections.add(connection)
        if len(self.connections) >= self._most:
            self._warn("", "no more than %d connections: select() bears no more sockets", self._most)
            self._next_sweep = 0.0
        self.resume(connection)

    def _close_silent(self, neighbours: dict[Connection, float]) -> None:
        silent = self._silent_longest(neighbours)
        if silent is not None:
            self._warn(silent.group, "%s has more than %d silent connections; those that are silent longest are closed "
                       "(client_max_connections=0 lifts this limit)", silent.address, self._most_silent)
            self.close(silent)

    @staticmethod
    def _silent_longest(neighbours: dict[Connection, float]) -> Connection | None:
        """The connection of an address on which nothing has happened for longest.

        They stand in the order in which they were looked at.  If something has happened since then, the deadline is
        another.  Each that is looked at goes behind the others.  So as many are looked at as have been active, and
        only one where many come and say nothing.  If all are busy, it is the first of those on which no client waits.
        """
        busy = None
        for _ in range(2 * len(neighbours)):
            connection = next(iter(neighbours))
            deadline = neighbours.pop(connection)
            neighbours[connection] = connection.deadline
            if not connection.protocol.is_kept_open(connection):
                if deadline == connection.deadline < math.inf:
                    return connection
                busy = busy or connection
        return busy

    def _warn(self, about: str, text: str, *arguments: Any) -> None:
        """Once a minute."""
        if not self._warned.count(about):
            self._warned.note(about)
            self._logger.warning(text, *arguments)

    def resume(self, connection: Connection) -> None:
        """Have the leader look at the connection again: to park it, to write on, to read what is left over."""
        self._resumed.append(connection)
        self.wake()

    def wake(self) -> None:
        """Have the leader go round once more.  The lock is for threads that run at once, without the interpreter's."""
        if not self.is_led_here():
            with self._waking_lock:
                if not self._is_awake:
                    self._is_awake = True
                    with contextlib.suppress(OSError):      # full: it is awake; closed: it is over
                        self._waking.send(b"\0")

    def hand_over(self, connection: Connection, job: Callable[[], None], refuse: Callable[[], None] | None = None,
                  address: str | None = None, size: int = 0) -> None:
        """Have a handler thread do what may take its time, in turns; here, if this thread is one already.

        The connection is not looked at until it is done.  If there is no thread, or no room for the size bytes that
        have to wait for it, refuse is called instead, by the leader.
        """
        if not self.is_led_here():
            return job()
        size *= HANDLED_FACTOR
        more = size - connection.kept
        if refuse is not None and more > 0 and not self._memory.has_room_for(connection.group, more):
            return refuse()
        connection.is_handled, connection.handled_size = True, size
        if size:
            self.count(connection)
        self._watch_for(connection, 0)
        address = address or connection.group
        self.threads.run(partial(self._handle, connection, job, address), address,
                         refuse and partial(self._handle_refusal, connection, refuse))

    def _handle(self, connection: Connection, job: Callable[[], None], address: str) -> None:
        try:
            with self._turns.taken_for(address):
                job()
        except BaseException:
            self._logger.exception("a request from %s failed", connection.address)
            connection.abort()
        finally:
            # The leader alone changes is_handled.  If this thread did, it might take back what the leader has set
            # for the next job already.
            self._handled.append(connection)
            self.wake()

    def _handle_refusal(self, connection: Connection, refuse: Callable[[], None]) -> None:
        connection.is_handled, connection.handled_size = False, 0
        self._attend(connection, lambda connection: refuse())
        self.resume(connection)

    def read_body(self, connection: Connection) -> None:
        """Have a handler thread read on in the body that is being sent; it may be slow, or fail."""
        self.hand_over(connection, partial(self._read_on, connection, connection.source))

    def _read_on(self, connection: Connection, source: BodySource) -> None:
        try:
            connection.fill(source.read())
        except (ApplicationFault, HTTPFault) as fault:      # half of it has been sent: all that can be done is to hang up
            if isinstance(fault, HTTPFault):
                self._logger.info("a connection from %s is closed: %s", connection.address, fault)
            connection.abort()

    def after_next_look(self, job: Callable[[], None]) -> bool:
        """Have the leader do something once it has seen what else has come.  False: this thread does not lead."""
        if self.is_led_here():
            self._jobs.append(job)
            return True
        return False

    def do_soon(self, job: Callable[[], None]) -> None:
        """Have the leader do something in its next round."""
        self._jobs.append(job)
        self.wake()

    def is_led_here(self) -> bool:
        return self._leader == threading.get_ident()

    def is_busy(self) -> bool:
        """Whether an answer is being made, or on its way."""
        return any(connection.exchange is not None or connection.is_handled or connection.output
                   for connection in list(self.connections))

    def stop_accepting(self) -> None:
        self._wants_accepting = False
        self._next_sweep = 0.0
        self.wake()

    def has_output(self) -> bool:
        """Whether something waits for a peer to take it in."""
        return any(connection.output for connection in list(self.connections))

    def stop(self) -> None:
        """Have the leader close every connection, behind what it is doing now, and lead no more."""
        self._is_over = True
        self.wake()

    # -- The leader ------------------------------------------------------------------------

    def _lead(self) -> None:
        self._leader = threading.get_ident()
        while not self._is_over:
            try:
                self._go_round()
            except BaseException:           # whatever it is, all the connections need a leader
                self._logger.exception("the leader's round failed; it goes on")
                time.sleep(FAILURE_PAUSE)
        self.close_all()

    def _go_round(self) -> None:
        """Deliver; look at the sockets on which something has come, then at what other threads have resumed."""
        jobs = len(self._jobs)
        has_more = self._deliver() or self._resumed or self._handled or jobs
        turns = self._turns
        turns.is_leader_busy = False
        if turns.is_leader_awaited:
            turns.end_round()
        events = self._selector.select(0 if has_more else self._seconds_to_sweep())
        turns.is_leader_busy = True
        if len(events) > LOOKS_AT_ONCE:     # the rest is seen in the next round
            events = events[:LOOKS_AT_ONCE // 2] + events[-LOOKS_AT_ONCE // 2:]     # the oldest, and the newest
        for key, ready in events:
            if key.data is not None:
                self._attend(key.data, self._look_at_socket, ready)
            elif key.fileobj is self._listener:
                self._accept()
            else:
                with self._waking_lock:
                    self._is_awake = False
                    self._woken.recv(4096)
        if jobs:
            self._do_jobs(jobs)
        while self._handled:
            connection = self._handled.popleft()
            connection.is_handled, connection.handled_size = False, 0
            self._resumed.append(connection)
        if self._resumed:
            # Each once a round, however often it was resumed, or one that each look resumes would soon be all there is.
            for connection in dict.fromkeys([self._resumed.popleft() for _ in range(len(self._resumed))]):
                self._attend(connection, self._look_again)
        if time.monotonic() >= self._next_sweep:
            self._sweep()

    def _do_jobs(self, limit: int) -> None:
        """The first few of what was left for after the next look."""
        for _ in range(min(limit, len(self._jobs))):
            try:
                self._jobs.popleft()()
            except BaseException:           # the others are not to blame
                self._logger.exception("a job of the leader's failed")

    def _attend(self, connection: Connection, look: Callable[..., None], *arguments: Any) -> None:
        """Look at a connection; what goes wrong ends that one only."""
        try:
            look(connection, *arguments)
        except BaseException:
            self._logger.exception("a connection from %s failed", connection.address)
            connection.abort()

    def _look_at_socket(self, connection: Connection, ready: int) -> None:
        if connection.watched & ready & selectors.EVENT_WRITE:
            connection.flush()
        elif connection.watched & ready:        # else it was closed, or handed over, since the selector saw it
            data = connection.receive()
            if data == b"":
                self._do_jobs(len(self._jobs))  # a client that says no more may wait for an answer
                return self.close(connection)
            if data is not None and not connection.is_closing:
                connection.input = connection.input + data if connection.input else data
                connection.protocol.consume(connection)
        if connection.kept or connection.input or connection.request is not None or connection.output:
            self.count(connection)

    def _look_again(self, connection: Connection) -> None:
        if connection.is_closed:
            return
        if connection.source is not None and not connection.output and not connection.is_handled:
            return self.read_body(connection)
        if connection.input and not (connection.output or connection.is_handled or connection.is_closing):
            connection.protocol.consume(connection)
        # A client that sends faster than it is answered has to wait: not all its input is read at once.
        is_ahead = connection.is_handled or (len(connection.input) > RECEIVE_SIZE and not connection.is_closing)
        self._watch_for(connection, selectors.EVENT_WRITE if connection.output else 0 if is_ahead
                        else selectors.EVENT_READ)
        self.count(connection)

    def _look_at_deadline(self, connection: Connection) -> None:
        if connection.is_handled and connection.source is not None:
            return                              # the body is slow, not the client
        if connection.is_closing or connection.output:
            self.close(connection)
        elif not connection.is_handled:         # else the time is ours
            connection.protocol.expired(connection)

    def count(self, connection: Connection) -> None:
        """Count what the connection keeps now, and let go who keeps too much."""
        size = 0 if connection.is_closed else connection.size
        if size != connection.kept:
            connection.kept, change = size, size - connection.kept
            self._memory.take_for(connection.group, change)
            if change > 0 and size > self._memory.connection_limit:
                self._drop(connection, "its connection")
            elif change > 0 and self._memory.is_too_much_for(connection.group):
                # To close one that is handled would free nothing.
                neighbours = [each for each in self.connections
                              if each.group == connection.group and not each.is_handled]
                self._drop(max(neighbours, key=lambda each: each.kept, default=connection), "its address")

    def _drop(self, connection: Connection, whose: str) -> None:
        self._logger.warning("a connection from %s is closed; %s keeps too many bytes waiting, %d in this connection",
                             connection.address, whose, connection.kept)
        self.close(connection)

    def _watch_for(self, connection: Connection, wanted: int) -> None:
        if connection.watched == wanted or connection.is_closed:
            return
        if wanted == 0:
            self._selector.unregister(connection.socket)
        elif connection.watched == 0:
            self._selector.register(connection.socket, wanted, connection)
        else:
            self._selector.modify(connection.socket, wanted, connection)
        connection.watched = wanted

    def close(self, connection: Connection) -> None:
        self._watch_for(connection, 0)
        self._forget(connection)
        connection.close()
        self.count(connection)

    def _forget(self, connection: Connection) -> None:
        if len(self.connections) >= self._most:
            self._next_sweep = 0.0              # there is room again
        self.connections.discard(connection)
        neighbours = self._by_address.get(connection.group)
        if neighbours is not None:
            neighbours.pop(connection, None)
            if not neighbours:
                del self._by_address[connection.group]

    def _look_after_listener(self) -> None:
        wants = self._wants_accepting           # once: the thread that stops the server may change it meanwhile
        is_due = wants and time.monotonic() >= self._accepts_from and len(self.connections) < self._most
        if is_due and not self._is_accepting:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        elif self._is_accepting and not is_due:
            self._selector.unregister(self._listener)
        self._is_accepting = is_due
        if not wants:
            self._close_listener()

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)       # a child that was forked may have it, too
        self._listener.close()

    def pause_accepting(self) -> None:
        """There are no more file descriptors: try again in a second."""
        self._accepts_from = time.monotonic() + 1.0
        self._next_sweep = 0.0

    def _seconds_to_sweep(self) -> float:
        return max(0.0, self._next_sweep - time.monotonic())

    def _sweep(self) -> None:
        """End what has lasted too long.  A look at all connections, once in a while, costs less than a clock each."""
        now = time.monotonic()
        self._next_sweep = now + min(1.0, self.patience / 4)
        self._look_after_listener()
        self.threads.refuse_late()
        late = [connection for connection in list(self.connections) if connection.time_is_over <= now]
        for connection in late:
            if time.monotonic() > now + TURN:       # the rest is late in the next round, too
                self._next_sweep = 0.0
                return
            self._attend(connection, self._look_at_deadline)

    def close_all(self) -> None:
        self._do_jobs(len(self._jobs))
        for connection in list(self.connections):
            self._attend(connection, self.close)
        if self._wants_accepting:
            self._close_listener()
        self._selector.close()
        with self._waking_lock:
            self._waking.close()
        self._woken.close()
        self._leader = None
        self.has_ended.set()


# ======================================================================================
# §12  HTTP transport
#
# A request's head is read by a small function of ours, which is strict and quick (the one of
# http.server goes through the e-mail parser, and costs more than all the rest).
#
#   long-polling      POST, a batch as JSON or in a form; the reply is JSON
#   callback-polling  GET ?jsonp=name&message=batch; the reply is a script that calls name
#   websocket         GET with Upgrade: websocket; then batches as text frames, both ways
#   eventsource       GET of /cometd/<clientId>; the answer never ends, and events come in it
#
# What is wrong with a message is said in its reply, with status 200.  What is wrong with the
# HTTP is said by the status, with a body that is a Bayeux batch all the same, as some clients
# read nothing else.
# ======================================================================================

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([^\x00-\x20#\x7f-\xff]+) HTTP/(\d)\.(\d)")
ABSOLUTE_TARGET = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
FIELD_NAME = re.compile(TOKEN)
FIELD_NAMES = re.compile(rf"{TOKEN}(?:[ \t]*,[ \t]*{TOKEN})*")
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")
#   RFC 9112, "Chunked Transfer Coding": a size, then ;name or ;name=value, which we throw away like the trailers
QUOTED_STRING = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_EXTENSION = rf"[ \t]*;[ \t]*{TOKEN}(?:[ \t]*=[ \t]*(?:{TOKEN}|{QUOTED_STRING}))?"
CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:{CHUNK_EXTENSION})*".encode("latin-1"))
TRAILER = re.compile(rf"{TOKEN}:[\t -~\x80-\xff]*".encode("latin-1"))
#   RFC 9110, "Range Requests": one range, first-last, first- or -suffix
BYTE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
JSONP_CALLBACK = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*(?:\.[A-Za-z_$][A-Za-z0-9_$]*)*")
BROWSER_COOKIE = re.compile(r"(?:^|;)[ \t]*BAYEUX_BROWSER=\"?([A-Za-z0-9]{1,64})\"?[ \t]*(?:;|$)")
CHARSET = re.compile(r"charset=\"?([^\s;\"]*)", re.IGNORECASE)
UNKNOWN_ORIGIN = "unknown"
REFERER_ORIGIN = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
FORWARDED_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}    # some proxies say wss
UTF8_NAMES = ("", "utf-8", "utf8", "us-ascii")
JSON_TYPES = ("application/json", "text/json")
LOOSE_TYPES = ("", "text/plain", "application/x-www-form-urlencoded")   # may hold JSON, or a form

FINAL_STATUSES = range(200, 600)
FRAMING_HEADERS = frozenset(("connection", "content-length", "date", "keep-alive", "trailer", "transfer-encoding"))
CONTROL_IN_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
REASONS = {status.value: status.phrase for status in HTTPStatus}


class HTTPFault(Exception):
    """A request that is answered by a status other than 200: why, and with what further headers.

    The reason is a text, or an error of Bayeux, if its code is another than the status.
    """

    def __init__(self, status: int, reason: str | BayeuxError, messages: Iterable = (None,), **headers: str) -> None:
        super().__init__(str(reason))
        self.status = status
        self.error = reason if isinstance(reason, BayeuxError) else None
        self.text = str(reason)
        self.messages = messages        # where they are known, each gets its reply: Faye waits for no less
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def batch(self) -> str:
        advice = {"advice": {"reconnect": "retry"}} if self.status == 503 else {}
        code = self.status if self.status in ERROR_MEANINGS else 400
        error = self.error or BayeuxError(code, "", self.text, **advice)
        return encode_json([refusal(message, error) for message in self.messages])


def is_loopback(address: str) -> bool:
    """Whether only programs of this machine reach an address; ::ffff:127.0.0.1 is 127.0.0.1."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


class Request:
    """An HTTP request, for content handlers and post_handle.

    Attributes:
        method: GET, POST, ...
        target: as it was sent, with the query.
        path: without the query, percent-decoded.
        query: what stands behind the question mark, as it was sent.
        version: (1, 1) or (1, 0).
        headers: names in lower case.
        host, port: of Host: the name in lower case ('' if there is none), the port as a number or None.
        body: bytes.
        address: the client's IP address.
        is_secure: whether it came through TLS.
        wants_keep_alive: whether its client may send another on the same connection.
    """

    __slots__ = ("address", "body", "chunks", "cors", "headers", "host", "is_secure", "method", "missing", "path",
                 "port", "query", "target", "transport", "version", "wants_keep_alive")

    def __init__(self, method: str, target: str, path: str, query: str, version: tuple[int, int],
                 headers: dict[str, str], authority: Authority, wants_keep_alive: bool, transport: str) -> None:
        self.method = method
        self.target = target
        self.path = path
        self.query = query
        self.version = version
        self.host, self.port = authority
        self.headers = headers.copy()                   # the application may change it; the head is kept for others
        self.wants_keep_alive = wants_keep_alive
        self.transport = transport
        self.body: bytes | bytearray = b""
        self.address = ""
        self.is_secure = False
        self.cors = ""                                  # headers for an allowed foreign origin
        self.missing = 0                                # bytes of the body that are still to come
        self.chunks: ChunkedBody | None = None          # or this tells


class Response:
    """A plain HTTP answer, for content handlers and post_handle, which may change every part of it.

    Attributes:
        status: 200, 404, ...; from 200 to 599.
        headers: a dict of texts, or of lists of texts where a header is sent several times (Set-Cookie).
            What frames the answer is the server's: Content-Length, Transfer-Encoding, Connection and the
            like, and Date, are left out here.
        body: text (sent as UTF-8), bytes, or a binary file of which length bytes are sent.
        length: of a file.
    """

    def __init__(self, body: str | bytes | BinaryIO = b"", status: int = 200,
                 headers: Mapping[str, str | Sequence[str]] | None = None, length: int = 0) -> None:
        self.status = status
        self.headers: dict[str, Any] = dict(headers or {})
        self.body = body
        self.length = length

    def check(self) -> None:
        """Raises TypeError for what cannot be sent."""
        if not is_number(self.status) or self.status not in FINAL_STATUSES:
            raise TypeError(f"a response's status must be a number from 200 to 599, not {self.status!r}")
        for name in self.headers:
            if not isinstance(name, str) or header_name(name) is None:
                raise TypeError(f"a response's headers must have names of letters, digits and -, not {name!r}")
        if not isinstance(self.body, (str, bytes, type(None))) and not hasattr(self.body, "read"):
            raise TypeError(f"a response's body must be text, bytes or a binary file, not {self.body!r}")

    def header_lines(self) -> list[str]:
        """The application's headers.  What would end a line, or the header, becomes a space."""
        return [f"{name}: {CONTROL_IN_VALUE.sub(' ', str(value))}" for name, values in self.headers.items()
                if name.lower() not in FRAMING_HEADERS
                for value in (values if isinstance(values, (list, tuple)) else [values])]


@lru_cache(maxsize=512)
def header_name(written: str) -> str | None:
    """In lower case; None if it is none.  (The cache spares five matches a request.)"""
    return written.lower() if FIELD_NAME.fullmatch(written) else None


def connection_options(headers: dict[str, str]) -> list[str]:
    return [each.strip() for each in headers.get("connection", "").lower().split(",")]


def wants_keep_alive(version: tuple[int, int], headers: dict[str, str]) -> bool:
    options = connection_options(headers)
    return "close" not in options and (version >= (1, 1) or "keep-alive" in options)


def transport_of(method: str, headers: dict[str, str]) -> str:
    """How a request brings its batch, if it brings one."""
    if method != "GET":
        return LONG_POLLING
    if "websocket" in headers.get("upgrade", "").lower():
        return WEBSOCKET
    return EVENTSOURCE if "text/event-stream" in headers.get("accept", "") else CALLBACK_POLLING


def host_of(version: tuple[int, int], headers: dict[str, str]) -> Authority:
    """What Host says.  An empty one is refused as well: a URL of http has a host (RFC 9110, "http URI Scheme")."""
    if "host" not in headers:
        if version >= (1, 1):
            raise HTTPFault(400, "Host is missing")
        return Authority("", None)
    authority = read_authority(headers["host"])
    if authority is None:
        raise HTTPFault(400, "Host must be a name or an address, and perhaps a port")
    return authority


def parse_head(data: bytes) -> tuple:
    """Request line and headers, without the empty line behind them, as the arguments of Request (RFC 9112).

    Whatever two readers might read differently is refused: that is how requests are smuggled.
    """
    text = data.decode("latin-1")
    request_line, *lines = text.split("\r\n")
    if not "".join(lines).isprintable() and CONTROL_CHARACTER.search(text):
        raise HTTPFault(400, "A line ends without CR, or there is a control character in the head")
    match = REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise HTTPFault(400, "Bad request line")
    version = (1, 1) if match[3] == match[4] == "1" else (int(match[3]), int(match[4]))    # one tuple for nearly all
    if version[0] != 1:
        raise HTTPFault(505, "HTTP/1.0 and HTTP/1.1 are spoken here")
    headers: dict[str, str] = {}
    for line in lines:
        written_name, colon, value = line.partition(":")
        name = header_name(written_name) if colon else None
        if name is None:
            raise HTTPFault(400, "Bad header line")
        value = value.strip(" \t")
        if name in headers:
            if name in ("content-length", "host", "transfer-encoding"):
                raise HTTPFault(400, f"Two {name} headers")
            value = headers[name] + ("; " if name == "cookie" else ", ") + value
        headers[name] = value
    authority, target = host_of(version, headers), match[2]
    if not target.startswith("/"):
        absolute = ABSOLUTE_TARGET.fullmatch(target)    # a server MUST accept this form, and go by the host in it
        if absolute:
            headers["host"], target = absolute[1], absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
            authority = host_of(version, headers)
        elif target != "*":
            raise HTTPFault(400, "The target must be a path")
    raw_path, _, query = target.partition("?")
    path = urllib.parse.unquote(raw_path) if "%" in raw_path else raw_path
    return (match[1], target, path, query, version, headers, authority, wants_keep_alive(version, headers),
            transport_of(match[1], headers))


# Clients repeat themselves: the head of a connect mostly is that of the last one, to the byte.  So some are kept; not
# the long ones, or a few hundred requests could fill the memory for good.
parse_kept_head = lru_cache(maxsize=HEADS_KEPT)(parse_head)


class ChunkedBody:
    """Reads a body sent in chunks, as it comes.  (RFC 9112, "Chunked Transfer Coding")"""

    def __init__(self, limit: int) -> None:
        """limit: of the body, in bytes; extensions and trailers have MAX_HEAD together."""
        self.body = bytearray()
        self.is_complete = False
        self._limit = limit
        self._buffer = bytearray()
        self._place = 0                 # where that begins in it which has not been read
        self._missing = 0               # bytes of the chunk that is being read
        self._spare = MAX_HEAD          # bytes that extensions and trailers may still have
        self._read = self._read_size

    @property
    def size(self) -> int:
        """Bytes that are kept until the rest has come."""
        return len(self.body) + len(self._buffer)

    def feed(self, data: bytes) -> bytes:
        """Take in data.  What comes back stands behind the body's end, or is to be fed again: not all is read at once."""
        self._buffer += data
        parts_left = CHUNK_PARTS_AT_ONCE
        while parts_left and not self.is_complete and self._read():
            parts_left -= 1
        is_enough = self.is_complete or not parts_left
        rest = bytes(self._buffer[self._place:])
        self._buffer, self._place = bytearray(b"" if is_enough else rest), 0
        return rest if is_enough else b""

    def _read_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n", self._place)
        if end < 0:
            self._check_spare(len(self._buffer) - self._place)
            return None
        line = bytes(self._buffer[self._place:end])
        self._place = end + 2
        return line

    def _check_spare(self, used: int) -> None:
        if used > self._spare:
            raise HTTPFault(400, f"What is sent beside the chunks is longer than {MAX_HEAD} bytes")

    def _spend(self, used: int) -> None:
        self._check_spare(used)
        self._spare -= used

    def _read_size(self) -> bool:
        line = self._read_line()
        if line is None:
            return False
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise HTTPFault(400, "Bad chunk size or extension")
        self._spend(len(line) - len(match[1]))
        self._missing = int(match[1], 16)
        if len(self.body) + self._missing > self._limit:
            raise HTTPFault(413, f"The body is larger than {self._limit} bytes")
        self._read = self._read_data if self._missing else self._read_trailer
        return True

    def _read_data(self) -> bool:
        part = self._buffer[self._place:self._place + self._missing]
        self._place += len(part)
        self.body += part
        self._missing -= len(part)
        if not self._missing:
            self._read = self._read_end_of_data
        return not self._missing

    def _read_end_of_data(self) -> bool:
        if len(self._buffer) < self._place + 2:
            return False
        if self._read_line() != b"":
            raise HTTPFault(400, "A chunk is longer than its size says")
        self._read = self._read_size
        return True

    def _read_trailer(self) -> bool:
        line = self._read_line()
        if line:
            if not TRAILER.fullmatch(line):
                raise HTTPFault(400, "Bad trailer")
            self._spend(len(line) + 2)
        self.is_complete = line == b""
        return line is not None


class HttpExchange(Exchange):
    """A POST or a JSONP GET, and how its answer is dressed."""

    __slots__ = ("_callback", "_connection", "_cookie", "_headers", "_http", "_is_last", "_is_secure", "_new_browser",
                 "_version", "address", "is_forwarded", "is_large", "may_hold", "transport")

    def __init__(self, http_transport: HttpTransport, connection: Connection, request: Request,
                 callback: str | None) -> None:
        super().__init__()
        self.transport = CALLBACK_POLLING if callback else LONG_POLLING
        self.address = request.address
        self._cookie = request.headers.get("cookie")
        self.may_hold = not (connection.input and connection.input.strip(b"\r\n"))      # a request waits behind it
        self.is_large = len(request.body or request.query) > http_transport.options.max_message_size
        self.is_forwarded = "x-forwarded-for" in request.headers and connection.group != ""
        self._http = http_transport
        self._connection = connection
        self._is_last = not request.wants_keep_alive
        self._headers = request.cors
        self._version = request.version
        self._callback = callback
        self._new_browser: str | None = None
        self._is_secure = request.is_secure

    @property
    def browser(self) -> str | None:
        return browser_of(self._cookie) or self._new_browser

    def forget_cookie(self) -> None:
        """While a connect is held nobody asks for it, and it takes as much memory as all the rest of the exchange."""
        self._cookie = None

    def name_browser(self) -> str:
        """(Bayeux, "Server-side Multiple clients detection")"""
        if self.browser is None:
            self._new_browser = secrets.token_hex(16)
        return self.browser

    def give_up(self) -> None:
        self._connection.abort()

    def is_gone(self) -> bool:
        return self._connection.is_gone()

    def pack(self, answer: Answer) -> bytes:
        self._is_last = self._is_last or self._http.is_stopping
        headers = self._headers + connection_header(self._version, self._is_last)
        if self._new_browser:
            headers += browser_cookie(self._new_browser, self._is_secure)
        return batch_answer(200, answer.batch(), headers, self._callback, self.comment_filtered)

    def send(self, answer: Answer) -> bool | None:
        return self._connection.write(answer.packet, None, self._is_last, self._http.core.settle_later, answer)


class HttpStream(Stream):
    """A connection that HTTP has been left behind on: what WebSocket and event stream have in common."""

    __slots__ = ("_connection", "_http", "address", "browser", "is_forwarded")

    def __init__(self, http_transport: HttpTransport, connection: Connection, request: Request) -> None:
        super().__init__()
        self.address = request.address
        self.is_forwarded = "x-forwarded-for" in request.headers and connection.group != ""
        self._http = http_transport
        self._connection = connection
        self.browser = browser_of(request.headers.get("cookie"))

    def give_up(self) -> None:
        self._connection.abort()

    def is_gone(self) -> bool:
        return self._connection.is_gone()

    def kept_input(self, connection: Connection) -> int:
        """Bytes of what has come so far and is not complete."""
        return 0

    def is_kept_open(self, connection: Connection) -> bool:
        return True

    def lost(self, connection: Connection) -> None:
        self._http.core.forget_stream(self)

    def send(self, answer: Answer) -> bool | None:
        is_written = self._connection.push(answer.packet, False, self._http.core.settle_later, answer)
        if is_written is False:                 # it is closing: its sessions must find another way
            self._http.core.detach(self)
        return is_written

    def feed(self, broadcast: Broadcast, session: Session) -> bool:
        events = broadcast.events
        is_written = self._connection.push(broadcast.packet, False, self._settle_later, session, events)
        if is_written is False:
            self._http.core.detach(self)
            self._settle_later(session, events, False)
        return is_written is True

    def _settle_later(self, session: Session, events: Sequence[Event], is_written: bool) -> None:
        self._http.core.settle_later(Answer(self, [], session, events), is_written)

    def pack(self, answer: Answer) -> bytes:
        if answer.replies or not isinstance(answer.events, Parcel):
            return self._packed(answer.batch().encode("utf-8"))
        packets, kind = answer.events.packets, type(self)
        if kind not in packets:
            packets[kind] = self._packed(answer.batch().encode("utf-8"))
        return packets[kind]


class EventStream(HttpStream):
    """Server-sent events, a batch each.  (HTML, "Server-sent events"; the transport is Faye's)"""

    __slots__ = ()
    transport = EVENTSOURCE

    @staticmethod
    def _packed(batch: bytes) -> bytes:
        return b"data: " + batch + b"\r\n\r\n"

    def send(self, answer: Answer) -> bool | None:
        if not answer.events:                   # its session has ended
            return self._connection.push(b"", is_last=True)
        return super().send(answer)

    def consume(self, connection: Connection) -> None:
        """A client has nothing to say here."""
        connection.input = b""

    def expired(self, connection: Connection) -> None:
        """A comment now and then, so that whoever is between us does not take the stream for dead."""
        connection.deadline = time.monotonic() + connection.idle_time
        connection.push(b":\r\n\r\n")


class WebSocket(HttpStream):
    """Batches as text frames, both ways.  (RFC 6455; that a batch is one text frame is CometD's convention)

    The session id comes with the first message; a new socket may carry on a live session.
    """

    __slots__ = ("_is_pinged", "_reader")
    transport = WEBSOCKET
    carries_requests = True

    def __init__(self, http_transport: HttpTransport, connection: Connection, request: Request) -> None:
        super().__init__(http_transport, connection, request)
        self._is_pinged = False
        self._reader = FrameReader(http_transport.options.max_request_size)

    @staticmethod
    def _packed(batch: bytes) -> bytes:
        return frame(TEXT_FRAME, batch)

    def kept_input(self, connection: Connection) -> int:
        return self._reader.size

    def consume(self, connection: Connection) -> None:
        """Bytes have come.  Only so many frames are read at once, and none while output waits for the peer."""
        data, connection.input = connection.input, b""
        if self._http.is_stopping:              # its sessions have ended, and a close frame comes soon
            return
        self._is_pinged = False
        connection.deadline = math.inf          # from here the time is ours, not the peer's
        try:
            for count, (opcode, payload) in enumerate(self._reader.feed(data), 1):
                self._take_message(connection, opcode, payload)
                if connection.is_closing:
                    return
                if connection.output or connection.is_handled or count == REQUESTS_AT_ONCE:
                    connection.input = self._reader.take_rest()
                    break
        except WebSocketError as error:
            self._http.logger.info("refused a frame from %s: %d %s", self.address, error.code, error)
            self.close(error.code, str(error))
        self._renew(connection)
        if connection.input and not (connection.is_handled or connection.output):
            connection.watch.resume(connection)
        if connection.kept or self._reader.size:
            connection.watch.count(connection)

    @staticmethod
    def _renew(connection: Connection) -> None:
        """The peer has been heard of."""
        if not connection.is_closing:
            connection.deadline = time.monotonic() + connection.idle_time

    def _take_message(self, connection: Connection, opcode: int, payload: Any) -> None:
        if opcode == TEXT_FRAME:
            if len(payload) > SHORT_REQUEST:
                self._hand_over(connection, len(payload), partial(self._take_batch, connection, payload))
            else:
                self._take_batch(connection, payload)
        elif opcode == PING_FRAME:
            connection.push(frame(PONG_FRAME, payload))
        elif opcode == CLOSE_FRAME:             # answered with its own code (RFC 6455, "Close")
            self.close(payload[0])
        elif opcode == BINARY_FRAME:
            raise WebSocketError(UNSUPPORTED_DATA, "batches are text")

    def _take_batch(self, connection: Connection, text: str) -> None:
        core = self._http.core
        try:
            messages = decode_batch([text], self._http.options.max_batch)
        except BayeuxError as error:
            self._refuse([None], error)
            return
        exchange = SocketExchange(self, text, self._http.options)
        if core.may_take_its_time(messages):
            self._hand_over(connection, len(text), partial(core.receive, messages, exchange), messages)
        else:
            core.receive(messages, exchange)

    def _hand_over(self, connection: Connection, size: int, job: Callable[[], None],
                   messages: Iterable = (None,)) -> None:
        """Have a handler thread take care of a batch of so many characters; the frames behind it wait."""
        def run() -> None:
            if not connection.is_gone():
                job()
            self._renew(connection)
        connection.watch.hand_over(connection, run, partial(self._refuse, messages, no_thread_error()),
                                   self._http.core.addresses.group(self.address), size)

    def _refuse(self, messages: Iterable, error: BayeuxError) -> None:
        self._http.logger.info("refused a batch from %s: %s", self.address, error)
        batch = encode_json([refusal(message, error) for message in messages])
        self._connection.push(self._packed(batch.encode("utf-8")))

    def expired(self, connection: Connection) -> None:
        """The peer has been silent: is it still there?"""
        if self._is_pinged:
            self._http.logger.info("a WebSocket from %s is silent, and closed", self.address)
            connection.watch.close(connection)
        else:
            self._is_pinged = True
            connection.deadline = time.monotonic() + connection.idle_time
            connection.push(frame(PING_FRAME, b""))

    def close(self, code: int, reason: str = "") -> None:
        """Nothing may follow a close frame; what waits for the sessions waits for their next connection."""
        self._connection.push(close_frame(code, reason), is_last=True)
        self._http.core.detach(self)


class SocketExchange(Exchange):
    """One batch that came over a WebSocket."""

    __slots__ = ("address", "browser", "is_large", "stream")
    transport = WEBSOCKET

    def __init__(self, stream: WebSocket, text: str, options: Options) -> None:
        super().__init__()
        self.stream, self.address, self.browser = stream, stream.address, stream.browser
        self.is_large = 4 * len(text) > options.max_message_size     # characters take up to 4 bytes

    def give_up(self) -> None:
        self.stream.give_up()

    def is_gone(self) -> bool:
        return self.stream.is_gone()

    def pack(self, answer: Answer) -> bytes:
        return self.stream.pack(answer)

    def send(self, answer: Answer) -> bool | None:
        return self.stream.send(answer)


def browser_cookie(browser: str, is_secure: bool) -> str:
    secure = "; Secure" if is_secure else ""
    return f"Set-Cookie: BAYEUX_BROWSER={browser}; Path=/; HttpOnly; SameSite=Lax{secure}\r\n"


def browser_of(cookie: str | None) -> str | None:
    match = BROWSER_COOKIE.search(cookie) if cookie else None
    return match[1] if match else None


def connection_header(version: tuple[int, int], is_last: bool) -> str:
    """Whether the connection stays open, where the version alone does not say so."""
    if is_last:
        return "Connection: close\r\n"
    return "" if version >= (1, 1) else "Connection: keep-alive\r\n"


@lru_cache(maxsize=2)
def http_date(now: int) -> str:
    return email.utils.formatdate(now, usegmt=True)


@lru_cache(maxsize=16)
def batch_head(status: int, content_type: str, headers: str, now: int) -> bytes:
    """What stands before the length of the body: most answers of a second have it in common."""
    return (f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {content_type}; charset=utf-8\r\n"
            f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nDate: {http_date(now)}\r\n"
            f"{headers}").encode("latin-1")


def batch_answer(status: int, batch: str, headers: str = "", callback: str | None = None,
                 comment_filtered: bool = False, has_body: bool = True) -> bytes:
    """A whole HTTP response that carries the batch, as JSON, as a script or as a comment."""
    content_type = "application/json"
    if callback is not None:
        # U+2028 and U+2029 end a line in older scripts; the comment keeps the file's first bytes ours.
        batch = "/**/{}({});".format(callback, batch.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
        content_type = "text/javascript"
    elif comment_filtered:
        # A star only ever stands inside a string; escaped, it cannot end the comment, nor begin one.
        batch = "/*{}*/".format(batch.replace("*", "\\u002a"))
        content_type = "text/json-comment-filtered"
    body = batch.encode("utf-8")
    head = batch_head(status, content_type, headers, int(time.time()))
    return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body if has_body else b"")


def no_thread_error() -> BayeuxError:
    return BayeuxError(503, "", "The server is busy - try again later", advice={"reconnect": "retry"})


# DNS rebinding: a page of evil.example has its own name led to 127.0.0.1 and asks a server that listens there only.
# To the browser that is the page's own origin, so that it shows the page everything.  What gives it away is Host.

def admitted_hosts(options: Options, is_local: bool) -> frozenset[str]:
    """The names by which the server may be asked, beside addresses and localhost; one of them may be *, any."""
    if "*" in options.allowed_hosts or not (is_local or options.allowed_hosts):
        return frozenset("*")
    return frozenset(authority.host for authority in map(read_authority, (options.host, *options.allowed_hosts))
                     if authority is not None)


def is_admitted(hosts: frozenset[str], host: str) -> bool:
    """Whether a request may ask for a host.  No browser leaves it out, as a client of HTTP/1.0 may."""
    return ("*" in hosts or host in hosts or host in ("", "localhost") or host.endswith(".localhost")
            or is_address(host))


class HttpTransport:
    """Takes requests from connections, and brings each to the core, a content handler or a file."""

    def __init__(self, options: Options, core: Bayeux, watch: Watch, logger: logging.Logger, is_local: bool,
                 find_file: Callable[[Request], Response]) -> None:
        """
        Args:
            options: limits, origins, hosts, and the application's content handlers (§5).
            core: answers the messages (§7).
            watch: has the connections (§11).
            logger: gets a line for each refusal.
            is_local: whether the server listens on a loopback address.
            find_file: answers a request for a file of docroot, or raises HTTPFault (§13).
        """
        self.options = options
        self.core = core
        self._find_file = find_file
        self._hosts = admitted_hosts(options, is_local)
        self._allowed_origins = {read_origin(each) for each in options.allowed_origins}
        self._admitted_hosts: set[str] = set()          # of those that have been asked for
        self.is_stopping = False
        self._watch = watch
        self.logger = logger
        self._handlers = sorted(options.content_handlers.items(), key=lambda item: -len(item[0]))

    # -- What connections tell -------------------------------------------------------------

    def consume(self, connection: Connection) -> None:
        """Bytes have come.  Requests on one connection are answered in turn: a held connect is answered first."""
        try:
            for _ in range(REQUESTS_AT_ONCE):
                if connection.request is None and connection.input[:1] == b"\r":    # an empty line is no request
                    if connection.input[:2] == b"\r\n":
                        connection.input = connection.input.lstrip(b"\r\n")
                    if connection.input in (b"", b"\r"):
                        return
                if connection.exchange is not None and self._is_busy(connection):
                    return                      # its answer is being made; the connection is resumed after it
                request = self._next_request(connection)
                if request is None:
                    if connection.input and connection.request is not None:     # too many chunks to read at once
                        break
                    return
                connection.deadline = math.inf  # from here the time is ours, not the client's
                connection.is_arriving = False
                connection.exchange = request   # busy; a Bayeux request puts its own exchange here
                self._respond(connection, request)
                is_waiting = connection.is_closing or connection.is_handled or connection.output
                if is_waiting or not connection.input:
                    return
                if connection.protocol is not self:
                    break                       # it has been upgraded, and its new protocol has input already
            self._watch.resume(connection)
        except HTTPFault as fault:              # not even a whole request
            self._refuse(connection, connection.request, fault, is_last=True)

    def _is_busy(self, connection: Connection) -> bool:
        """Whether the answer before has to be made first; a held connect is answered now."""
        with connection.lock:                   # the thread that answers lets go of the exchange under it
            exchange = connection.exchange
        if isinstance(exchange, HttpExchange):
            self.core.answer_now(exchange)
        return connection.exchange is not None

    def kept_input(self, connection: Connection) -> int:
        """Bytes of a body of which the rest has not come."""
        request = connection.request
        return request.chunks.size if request and request.chunks else len(request.body) if request else 0

    def is_kept_open(self, connection: Connection) -> bool:
        exchange = connection.exchange          # once: another thread may answer it
        return isinstance(exchange, HttpExchange) and exchange.hold is not None

    def expired(self, connection: Connection) -> None:
        if not connection.input and connection.request is None:
            return self._watch.close(connection)
        self._refuse(connection, connection.request, HTTPFault(
            408, f"The request did not arrive within {self.options.request_timeout:g} s"), is_last=True)

    def lost(self, connection: Connection) -> None:
        exchange = connection.exchange
        if isinstance(exchange, HttpExchange):
            self.core.hang_up(exchange)

    def close_streams(self) -> None:
        """The server stops: say so where the protocol has a word for it."""
        for connection in list(self._watch.connections):
            if isinstance(connection.protocol, WebSocket):
                connection.protocol.close(GOING_AWAY, "the server is stopping")

    # -- Reading a request -----------------------------------------------------------------

    def _next_request(self, connection: Connection) -> Request | None:
        """The next whole request, or None until there is more of it."""
        request = connection.request
        if request is None:
            end = connection.input.find(b"\r\n\r\n", 0, MAX_HEAD)
            if end < 0:
                return self._check_beginning(connection)
            head, connection.input = connection.input[:end], connection.input[end + 4:]
            parse = parse_kept_head if end <= LONGEST_KEPT else parse_head
            request = connection.request = Request(*parse(head))
            request.is_secure = connection.is_secure
            request.address = connection.address
            if "x-forwarded-for" in request.headers:
                request.address = self.core.addresses.client(connection.address, request.headers["x-forwarded-for"])
            if request.host not in self._admitted_hosts:
                self._admit_host(request.host)
            self._expect_body(connection, request)
        if request.chunks is not None:
            connection.input = request.chunks.feed(connection.input)
            if not request.chunks.is_complete:
                return None
            request.body = bytes(request.chunks.body)
        elif len(connection.input) >= request.missing and not request.body:     # one read brought it all, mostly
            request.body, connection.input = connection.input[:request.missing], connection.input[request.missing:]
        elif not self._read_more(connection, request):
            return None
        connection.request = None
        return request

    def _check_beginning(self, connection: Connection) -> None:
        """Refuse at once what cannot become a request: a client that waits for its answer sends no more."""
        data = connection.input
        if len(data) >= MAX_HEAD:
            raise HTTPFault(431, f"The request's head is larger than {MAX_HEAD} bytes")
        if b"\n" in data:
            parts = data[:-1 if data[-1:] == b"\r" else None].decode("latin-1").rpartition("\r\n")
            if CONTROL_CHARACTER.search(parts[0] + parts[2]) or not REQUEST_LINE.fullmatch(
                    (parts[0] or parts[2]).split("\r\n")[0]):
                raise HTTPFault(400, "Not a request of HTTP/1.0 or HTTP/1.1; lines end with CR LF")
        self._limit_time(connection)

    def _limit_time(self, connection: Connection) -> None:
        """From its first bytes on, a request has request_timeout to arrive; later bytes gain it no more."""
        if not connection.is_arriving:
            connection.is_arriving = True
            connection.deadline = time.monotonic() + self.options.request_timeout

    def _expect_body(self, connection: Connection, request: Request) -> None:
        """Find out how long the body is, and refuse one that is too large before it is read."""
        limit, coding = self.options.max_request_size, request.headers.get("transfer-encoding")
        length = request.headers.get("content-length")
        if coding is not None:
            if length is not None or request.version < (1, 1):
                raise HTTPFault(400, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
            if coding.lower() != "chunked":
                raise HTTPFault(501, "chunked is the only Transfer-Encoding known here")
            request.chunks = ChunkedBody(limit)
        elif length is not None:
            if not CONTENT_LENGTH.fullmatch(length):
                raise HTTPFault(400, "Bad Content-Length")
            request.missing = int(length)
            if request.missing > limit:
                raise HTTPFault(413, f"The body is larger than {limit} bytes")
        if request.missing > len(connection.input) or request.chunks:
            self._limit_time(connection)
            if "expect" in request.headers and request.version >= (1, 1):
                if request.headers["expect"].lower() != "100-continue":
                    raise HTTPFault(417, "100-continue is the only expectation known here")
                connection.push_interim(b"HTTP/1.1 100 Continue\r\n\r\n")

    @staticmethod
    def _read_more(connection: Connection, request: Request) -> bool:
        """Collect a body that comes in parts; whether it is complete."""
        part, connection.input = connection.input[:request.missing], connection.input[request.missing:]
        request.body = request.body or bytearray()
        request.body += part
        request.missing -= len(part)
        if request.missing:
            return False
        request.body = bytes(request.body)
        return True

    def _admit_host(self, host: str) -> None:
        """Refuse a name that the server does not have: DNS rebinding (see admitted_hosts)."""
        if not is_admitted(self._hosts, host):
            raise HTTPFault(421, f"This host is not known here. To allow it use --allowed-host {host} "
                                 "(in Python allowed_hosts)")
        if len(self._admitted_hosts) < HOSTS_KEPT:
            self._admitted_hosts.add(host)

    # -- Answering it ----------------------------------------------------------------------

    def _respond(self, connection: Connection, request: Request, job: Callable[[], None] | None = None) -> None:
        """Answer a request: here, if it is short and ours; files and the application's answers take a thread.

        Arguments:
            job: makes the answer, if that is known already.
        """
        try:
            if job is not None:
                job()
            elif not self._is_bayeux(request):
                self._hand_over(connection, request, partial(self._answer_plainly, connection, request))
            elif len(request.body) > SHORT_REQUEST:     # a query is part of the head, and never long
                self._hand_over(connection, request, partial(self._receive_batch, connection, request))
            else:
                self._receive_batch(connection, request)
        except HTTPFault as fault:
            self._refuse(connection, request, fault, is_last=not request.wants_keep_alive)
        except BayeuxError as error:            # a body that holds no batch, or too large a one
            status = error.code if error.code == 413 else 400
            self._refuse(connection, request, HTTPFault(status, error.text), is_last=not request.wants_keep_alive)
        except Exception as fault:
            if not isinstance(fault, ApplicationFault):
                self.logger.exception("%s %.200r failed", request.method, request.target)
            self._refuse(connection, request, HTTPFault(500, "The server failed"), is_last=True)

    def _hand_over(self, connection: Connection, request: Request, job: Callable[[], None],
                   messages: Iterable = (None,)) -> None:
        """Have a handler thread make the answer."""
        fault = HTTPFault(503, "The server is busy - try again later", messages, Retry_After=str(BUSY_RETRY))
        self._watch.hand_over(
            connection, partial(self._respond, connection, request, job),
            partial(self._refuse, connection, request, fault, not request.wants_keep_alive, False),
            self.core.addresses.group(request.address), len(request.body))

    def _is_bayeux(self, request: Request) -> bool:
        """The path, or any below it: CometD's client appends handshake, connect and so on."""
        path = self.options.path
        return request.path == path or request.path.startswith(path + "/")

    def _refuse(self, connection: Connection, request: Request | None, fault: HTTPFault, is_last: bool,
                may_ask: bool = True) -> None:
        """Answer with a fault.  may_ask: whether there is a thread on which post_handle can be called."""
        self.logger.info("refused %s from %s: %d %s",
                         f"{request.method[:20]} {request.target[:200]!r}" if request else "a request",
                         request.address if request else connection.address, fault.status, fault.text)
        is_last = is_last or self.is_stopping   # or a client that sends without end would be read without end
        connection.input = b"" if is_last else connection.input
        connection.exchange = request or fault
        if request is None or self._is_bayeux(request):
            headers = "".join(f"{name}: {value}\r\n" for name, value in fault.headers.items())
            callback, has_body, version = None, True, (1, 1)
            if request is not None:
                headers += request.cors
                callback = self._callback(request) if request.transport == CALLBACK_POLLING else None
                has_body, version = request.method != "HEAD", request.version
            headers += connection_header(version, is_last)
            connection.write(batch_answer(fault.status, fault.batch(), headers, callback, has_body=has_body),
                             is_last=is_last)
        else:
            response = Response(fault.text + "\n", fault.status, {
                "Content-Type": "text/plain; charset=utf-8", **fault.headers})
            if may_ask and self.options.post_handle is not None:
                refuse = partial(self._send_plain, connection, request, response, is_last)
                self._watch.hand_over(connection, partial(self._send_handled, connection, request, response, is_last),
                                      refuse, self.core.addresses.group(request.address))
            else:
                self._send_plain(connection, request, response, is_last)

    # -- Bayeux ----------------------------------------------------------------------------

    def _receive_batch(self, connection: Connection, request: Request) -> None:
        request.cors = self._cross_origin_headers(connection, request)
        if request.method == "OPTIONS":
            return self._answer_preflight(connection, request)
        if request.method not in ("POST", "GET"):
            raise HTTPFault(405, "Bayeux comes by POST, or by GET as JSONP", Allow="GET, OPTIONS, POST")
        if request.transport == WEBSOCKET:
            return self._upgrade(connection, request)
        if request.transport == EVENTSOURCE:
            return self._open_event_stream(connection, request)
        if request.transport == CALLBACK_POLLING:
            callback: str | None = self._callback(request)
            if callback is None:
                raise HTTPFault(400, f"jsonp must be a dotted name of at most {MAX_CALLBACK_LENGTH} characters")
            texts: Iterable[bytes | str] = form_messages(request.query)
        else:
            callback, texts = None, post_messages(request)
        messages = decode_batch(texts, self.options.max_batch)
        if self.is_stopping:
            self._require_service(messages)
        connection.exchange = exchange = HttpExchange(self, connection, request, callback)
        request.body, texts = b"", ()               # the decoded messages take enough memory
        if self.core.may_take_its_time(messages):
            self._hand_over(connection, request, partial(self._receive_unless_gone, messages, exchange), messages)
        else:
            self.core.receive(messages, exchange)
            exchange.forget_cookie()

    def _receive_unless_gone(self, messages: list, exchange: HttpExchange) -> None:
        """Messages whose client has hung up before a thread was free are not handled.

        Of plain HTTP only writing tells: some clients close their own direction when they have asked for a file.
        """
        if not exchange.is_gone():
            self.core.receive(messages, exchange)
            exchange.forget_cookie()

    @staticmethod
    def _callback(request: Request) -> str | None:
        """The JSONP callback's name; None if it is no plain name: it becomes part of a script."""
        name = urllib.parse.parse_qs(request.query).get("jsonp", ["jsonpcallback"])[-1]
        return name if len(name) <= MAX_CALLBACK_LENGTH and JSONP_CALLBACK.fullmatch(name) else None

    def _upgrade(self, connection: Connection, request: Request) -> None:
        """(RFC 6455, "Reading the Client's Opening Handshake").  A subprotocol is none of ours, and not selected."""
        headers = request.headers
        if "upgrade" not in connection_options(headers) or request.version < (1, 1):
            raise HTTPFault(400, "Upgrade needs Connection - Upgrade, and HTTP/1.1")
        if headers.get("sec-websocket-version") != "13":
            raise HTTPFault(426, "Version 13 of WebSocket is spoken here", Upgrade="websocket",
                            Sec_WebSocket_Version="13")
        key = headers.get("sec-websocket-key", "")
        if not WEBSOCKET_KEY.fullmatch(key):
            raise HTTPFault(400, "Sec-WebSocket-Key must be 16 bytes in base64")
        stream = WebSocket(self, connection, request)
        self._count_stream(stream)
        cookie = ""
        if stream.browser is None:              # later there is no way to name it: frames carry no cookies
            stream.browser = secrets.token_hex(16)
            cookie = browser_cookie(stream.browser, request.is_secure)
        connection.protocol, connection.idle_time = stream, self.options.ping_interval or math.inf
        head = ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"{cookie}Sec-WebSocket-Accept: {websocket_accept(key)}\r\n\r\n")
        if connection.write(head.encode("latin-1")) is False:
            self.core.forget_stream(stream)     # closed before it was a stream: nobody else would

    def _open_event_stream(self, connection: Connection, request: Request) -> None:
        """Faye's way: the last segment of the path is the clientId.

        A browser opens a stream again that has broken off, and gives it up when the status is another than 200.  (HTML,
        "Server-sent events")
        """
        stream = EventStream(self, connection, request)
        client_id = request.path.rpartition("/")[2]
        with self.core.lock:
            session = self.core.session_for(client_id, stream)
        if session is None:
            raise HTTPFault(404, self.core.unknown_client(client_id), [{}])
        self._count_stream(stream)
        connection.idle_time = self.options.ping_interval or math.inf
        connection.protocol = stream
        head = ("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-store\r\n"
                f"{request.cors}Connection: close\r\n\r\n:\r\n\r\n")      # and a comment, so that something comes
        if connection.write(head.encode("latin-1")) is False:
            return self.core.forget_stream(stream)
        if not self.core.attach(client_id, stream):     # it has ended in this moment
            connection.push(b"", is_last=True)

    def _require_service(self, messages: Iterable = (None,)) -> None:
        if self.is_stopping:
            raise HTTPFault(503, "The server is stopping", messages, Retry_After=str(BUSY_RETRY))

    def _count_stream(self, stream: HttpStream) -> None:
        """A client whose stream is refused falls back to long-polling, and there it is told to poll."""
        self._require_service()
        if not self.core.count_stream(stream):
            limit = self.options.client_max_connections
            raise HTTPFault(503, f"No more than {limit} connections may be kept open by {stream.address}",
                            Retry_After=str(BUSY_RETRY))

    # -- Cross-origin rules ----------------------------------------------------------------
    #
    # A page of another site may use the server only where its origin is allowed.  Browsers send Origin
    # with every POST, WebSocket and event stream of another site; a program that is no browser sends
    # none, and is not concerned.  The origin of a script that is loaded (JSONP) they do not tell.  There
    # Referer or Sec-Fetch-Site must say that the page is our own or allowed: a page can leave out the
    # one, browsers leave out the other where a server has no TLS, and so silence proves nothing.

    def _cross_origin_headers(self, connection: Connection, request: Request) -> str:
        """The headers for an allowed foreign origin; '' for our own; HTTPFault 403 for others."""
        text = request.headers.get("origin")
        if text is None and request.transport == CALLBACK_POLLING and request.query:
            text = self._origin_of_script(request)
        if text is None:
            return ""
        origin, scheme = read_origin(text), self._scheme(connection, request)
        if origin is not None and origin == self._own_origin(request, scheme or origin.scheme):
            return ""
        if origin is not None and origin in self._allowed_origins:
            return (f"Access-Control-Allow-Origin: {text}\r\nVary: Origin\r\n"
                    "Access-Control-Allow-Credentials: true\r\n")
        if "*" in self.options.allowed_origins:
            return "Access-Control-Allow-Origin: *\r\n"
        raise HTTPFault(403, self._why_refused(request, text, origin))

    @staticmethod
    def _origin_of_script(request: Request) -> str | None:
        """The origin of the page that loads a script; None for our own."""
        referer = REFERER_ORIGIN.match(request.headers.get("referer", ""))
        if referer:
            return referer[0]
        return None if request.headers.get("sec-fetch-site") in ("same-origin", "none") else UNKNOWN_ORIGIN

    def _scheme(self, connection: Connection, request: Request) -> str | None:
        """The scheme of the URL that the client asked for; None if a proxy that took TLS off does not tell."""
        if not self.options.trusted_proxies:
            return "https" if request.is_secure else "http"
        if not self.core.addresses.is_proxy(connection.address):
            return None
        forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0]
        return FORWARDED_SCHEMES.get(forwarded.strip().lower())

    @staticmethod
    def _own_origin(request: Request, scheme: str) -> Origin:
        return Origin(scheme, request.host, DEFAULT_PORTS[scheme] if request.port is None else request.port)

    def _why_refused(self, request: Request, text: str, origin: Origin | None) -> str:
        """With what arrived here, as a proxy may have changed it, and what to do."""
        if text == UNKNOWN_ORIGIN:
            return ("JSONP needs Referer or Sec-Fetch-Site to tell that its page is of this server "
                    "or of an allowed origin")
        advice = "Use --allowed-origin, or let the proxy pass on Host"
        if origin is not None and origin == self._own_origin(request, origin.scheme):
            advice = "Use --trusted-proxy and let the proxy send X-Forwarded-Proto"
        host = request.headers.get("host", "missing")
        return f"Origin {text[:MAX_HOST]} is not allowed here with Host {host}. {advice}"

    @staticmethod
    def _answer_preflight(connection: Connection, request: Request) -> None:
        headers = request.cors
        if headers:
            # Faye asks for Pragma, applications for Authorization; to the server they are all the same.
            asked = request.headers.get("access-control-request-headers", "")
            allowed = "Content-Type, X-Requested-With"
            if FIELD_NAMES.fullmatch(asked):
                allowed += ", " + asked
            headers += ("Access-Control-Allow-Methods: GET, OPTIONS, POST\r\nAccess-Control-Max-Age: 3600\r\n"
                        f"Access-Control-Allow-Headers: {allowed}\r\n")
        is_last = not request.wants_keep_alive
        head = (f"HTTP/1.1 204 No Content\r\nAllow: GET, OPTIONS, POST\r\nDate: {http_date(int(time.time()))}\r\n"
                f"{headers}{connection_header(request.version, is_last)}\r\n")
        connection.write(head.encode("latin-1"), is_last=is_last)

    # -- Plain HTTP ------------------------------------------------------------------------

    def _answer_plainly(self, connection: Connection, request: Request) -> None:
        is_last = not request.wants_keep_alive or self.is_stopping
        self._send_handled(connection, request, self._plain_response(request), is_last)

    def _plain_response(self, request: Request) -> Response:
        for prefix, handler in self._handlers:
            if request.path == prefix or request.path.startswith(prefix.rstrip("/") + "/"):
                return self._handler_response(request, prefix, handler)
        if self.options.docroot is None:
            raise HTTPFault(404, f"Nothing here; Bayeux is at {self.options.path}")
        if request.method == "OPTIONS":
            return Response(status=204, headers={"Allow": "GET, HEAD, OPTIONS"})
        if request.method not in ("GET", "HEAD"):
            raise HTTPFault(405, "Files are read by GET or HEAD", Allow="GET, HEAD, OPTIONS")
        with self.core.turns.interrupted():     # a file system may be slow, too
            return self._find_file(request)

    def _handler_response(self, request: Request, prefix: str, handler: Callable) -> Response:
        name = f"the content handler of {prefix}"
        try:
            return self.core.application.call(name, self._ask_handler, prefix, handler, request)
        except BayeuxError as error:            # nobody speaks Bayeux here: it comes from a publish, say
            self.logger.exception("%s failed", name)
            raise ApplicationFault(name) from error

    @staticmethod
    def _ask_handler(prefix: str, handler: Callable, request: Request) -> Response:
        returned = handler(request)
        if isinstance(returned, Response):
            returned.check()
            return returned
        if isinstance(returned, (str, bytes)):
            return Response(returned, headers={"Content-Type": "text/html; charset=utf-8"})
        raise TypeError(f"the content handler of {prefix} must return a Response, text or bytes, not {returned!r}")

    def _send_handled(self, connection: Connection, request: Request, response: Response, is_last: bool) -> None:
        """Send the response as post_handle leaves it."""
        if self.options.post_handle is not None:
            body = response.body
            try:
                self.core.application.call("post_handle", self._ask_post_handle, request, response)
            except (ApplicationFault, BayeuxError):
                response = Response("post_handle failed\n", 500, {"Content-Type": "text/plain"})
            if response.body is not body and hasattr(body, "close"):
                self.core.application.run("closing a body", body.close)
        self._send_plain(connection, request, response, is_last)

    def _ask_post_handle(self, request: Request, response: Response) -> None:
        self.options.post_handle(request, response)
        response.check()

    def _send_plain(self, connection: Connection, request: Request, response: Response, is_last: bool) -> None:
        body = response.body.encode("utf-8") if isinstance(response.body, str) else response.body or b""
        length = len(body) if isinstance(body, bytes) else response.length
        lines = [f"HTTP/1.1 {int(response.status)} {REASONS.get(response.status, 'Unknown')}",
                 "Date: " + http_date(int(time.time())), "X-Content-Type-Options: nosniff"]
        if response.status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        lines += response.header_lines()
        lines.append(connection_header(request.version, is_last))
        head = ("\r\n".join(lines) + "\r\n").encode("latin-1", "replace")
        has_body = request.method != "HEAD" and response.status not in (204, 304)
        source = None
        if not isinstance(body, bytes):
            source, body = BodySource(body, length if has_body else 0, self.core.application), b""
            body = source.read()                # a handler thread's: leader and refusals have texts only
            source = None if source.is_closed else source
        is_written = connection.write(head + (body if has_body else b""), source, is_last)
        if is_written is False and source is not None:
            source.close()


def post_messages(request: Request) -> list[bytes | str]:
    """The texts of a POST that hold its messages.  (Bayeux, "The long-polling request messages")

    Some clients send a form and do not say so (Faye, cross-origin), some say form and send JSON (curl
    -d); so a type that says little is settled by the body's first character.
    """
    main_type, _, parameters = request.headers.get("content-type", "").partition(";")
    main_type = main_type.strip().lower()
    charset = CHARSET.search(parameters) if parameters else None
    if charset and charset[1].lower() not in UTF8_NAMES:
        raise HTTPFault(415, "The charset must be UTF-8")
    if main_type in JSON_TYPES or (main_type in LOOSE_TYPES and request.body.lstrip()[:1] in (b"[", b"{")):
        return [request.body]
    if main_type not in LOOSE_TYPES:
        raise HTTPFault(415, "Bayeux comes as application/json, or as a form with message")
    if main_type != LOOSE_TYPES[-1] and not request.body.startswith(b"message="):
        return [request.body]
    try:
        return form_messages(request.body.decode("utf-8"))
    except UnicodeDecodeError:
        raise HTTPFault(400, "Not UTF-8") from None


def form_messages(form: str) -> list[bytes | str]:
    """The message parameters of a form or a query: one or many."""
    try:
        texts = urllib.parse.parse_qs(form, keep_blank_values=True, errors="strict").get("message", [])
    except UnicodeDecodeError:
        raise HTTPFault(400, "Not UTF-8") from None
    if not texts:
        raise HTTPFault(400, "The parameter message is missing")
    return list(texts)


class BodySource:
    """The bytes of a file, or of what the application gave for one, part by part; it is closed at its end, or before.

    It may be slow, and fail, so only handler threads read it.
    """

    def __init__(self, file: BinaryIO, length: int, application: ApplicationCode) -> None:
        self.is_closed = False
        self._file: BinaryIO | None = file      # until it is closed
        self._missing = length
        self._application = application
        self._lock = threading.Lock()           # held while it is read

    def read(self) -> bytes:
        """The next part; b'' at the end.  ApplicationFault, HTTPFault: there is none, though there should be."""
        part = b""
        try:
            with self._lock:
                if self._missing and not self.is_closed:
                    part = self._next_part()
        finally:
            if not part or not self._missing or self.is_closed:
                self.close()
        return part

    def _next_part(self) -> bytes:
        part = self._application.call("reading a body", self._read_part)
        if not 0 < len(part) <= self._missing:
            raise HTTPFault(500, f"A body ended {self._missing} bytes before its length, or gave too many")
        self._missing -= len(part)
        return part

    def _read_part(self) -> bytes:
        part = self._file.read(min(self._missing, RECEIVE_SIZE))
        if not isinstance(part, bytes):
            raise TypeError(f"a body gave {part!r:.100}; it must give bytes")
        return part

    def close(self) -> None:
        """Once.  Who reads it just now closes it after that."""
        self.is_closed = True
        if self._lock.acquire(blocking=False):
            try:
                file, self._file = self._file, None
                if file is not None:
                    self._application.run("closing a body", lambda: file.close())
            finally:
                self._lock.release()


# ======================================================================================
# §13  Files
#
# A target such as /folder/page.html names a file of `docroot`.  Whether it may be read is decided by
# its real path, the one without links: this lies below the root, and none of its names begins with a
# dot.  The file is then opened by the real path, name by name, and a name that has become a link in the
# meantime is refused, so that the decision holds for the file that is sent.  Whatever may not be read is
# not found: 404 tells nobody what there is.
#
# Windows and macOS find a file by other names too: in other case, as PROGRA~1, with a stream or a dot
# behind it.  There a name must be spelled as its folder lists it.
# ======================================================================================

FILE_TYPES = {                                      # the same everywhere, whatever the system's own table says
    ".bz2": "application/x-bzip2", ".css": "text/css", ".gz": "application/gzip", ".html": "text/html",
    ".js": "text/javascript", ".json": "application/json", ".mjs": "text/javascript", ".svg": "image/svg+xml",
    ".txt": "text/plain", ".wasm": "application/wasm", ".xz": "application/x-xz", ".z": "application/octet-stream"}
LOOSE_NAMES = sys.platform in ("win32", "cygwin", "darwin")     # the systems that find a file by other names too
#   O_NONBLOCK: a pipe is not waited for.  O_BINARY: Windows would translate the ends of lines.
FILE_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))
FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | sum(getattr(os, name, 0) for name in ("O_DIRECTORY", "O_NOFOLLOW"))


def file_type(name: str) -> str:
    """The MIME type by the name's extension."""
    extension = os.path.splitext(name)[1].lower()
    guess, coding = mimetypes.guess_type("file" + extension)
    return FILE_TYPES.get(extension) or (None if coding else guess) or "application/octet-stream"


def http_time(text: str) -> float | None:
    """The time that an HTTP date means; None if it is no date.  (RFC 9110, "Date/Time Formats": always GMT)"""
    try:
        return calendar.timegm(email.utils.parsedate(text))
    except (TypeError, ValueError, OverflowError):
        return None


def has_dot(names: Iterable[str]) -> bool:
    return any(name.startswith(".") for name in names)


def check_spelling(folder: str, names: Sequence[str]) -> None:
    """Raises FileNotFoundError for a name that its folder does not list so."""
    for name in names:
        listed = (unicodedata.normalize("NFC", each) for each in os.listdir(folder))    # macOS may list NFD
        if unicodedata.normalize("NFC", name) not in listed:
            raise FileNotFoundError(errno.ENOENT, "not spelled so", name)
        folder = os.path.join(folder, name)


def open_real(root: str, names: Sequence[str]) -> int:
    """Opens the file of these names below the root.  Raises OSError if one of them is a link."""
    if os.open not in os.supports_dir_fd:
        return open_and_compare(os.path.join(root, *names))
    folder = os.open(root, FOLDER_FLAGS)
    try:
        for name in names[:-1]:
            inner = os.open(name, FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(names[-1], FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def open_and_compare(path: str) -> int:
    """The same for Windows, which opens whole paths only: the path is looked at again after the opening."""
    number = os.open(path, FILE_FLAGS)
    try:
        if os.path.realpath(path) == path and os.path.samestat(os.fstat(number), os.stat(path)):
            return number
        raise FileNotFoundError(errno.ENOENT, "it was changed while it was opened", path)
    except OSError:
        os.close(number)
        raise


def open_file(root: str, names: Sequence[str]) -> BinaryIO:
    """The regular file of these names below the root, open.  It may have been exchanged for something else by now."""
    number = open_real(root, names)
    if stat.S_ISREG(os.fstat(number).st_mode):
        return os.fdopen(number, "rb")
    os.close(number)
    raise FileNotFoundError(errno.ENOENT, "it is no file", names[-1])


class Files:
    """The files of docroot: index files, expiry, conditional requests, one byte range; no listings."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def respond(self, request: Request) -> Response:
        """The file, a redirect to its folder, or HTTPFault."""
        try:
            return self._respond(request)
        except (ValueError, OSError) as error:      # ValueError: a name that no file can have
            if isinstance(error, OSError) and error.errno in NO_MORE_FILES:
                raise HTTPFault(503, "The server has too many files open - try again later",
                                Retry_After=str(BUSY_RETRY)) from None
            raise HTTPFault(404, "No such file") from None

    def _respond(self, request: Request) -> Response:
        root, names = self._find(request.path)
        path = os.path.join(root, *names)
        if os.path.isdir(path):
            if not request.path.endswith("/"):      # or the links of its index would lead astray
                raw_path, mark, query = request.target.partition("?")
                return Response(status=301, headers={"Location": f"{raw_path}/{mark}{query}"})
            request.path += self._index(path)
            return self._respond(request)           # the index may be a link, too
        if request.path.endswith("/") or not os.path.isfile(path):
            raise FileNotFoundError
        return self._file_response(request, open_file(root, names))

    def _find(self, path: str) -> tuple[str, list[str]]:
        """The root, and the names of the real path below it."""
        asked = [name for name in path.split("/") if name]
        if not path.startswith("/") or path.startswith("//") or "\\" in path or "\0" in path or has_dot(asked):
            raise FileNotFoundError
        root = os.path.realpath(self._options.docroot)
        if LOOSE_NAMES:
            check_spelling(root, asked)
        real, inside = os.path.realpath(os.path.join(root, *asked)), os.path.join(root, "")
        if real == root:
            return root, []
        names = real[len(inside):].split(os.sep)
        if not real.startswith(inside) or has_dot(names):
            raise FileNotFoundError
        return root, names

    def _index(self, folder: str) -> str:
        for name in self._options.directory_index:
            if os.path.isfile(os.path.join(folder, name)):
                return name
        raise FileNotFoundError

    def _file_response(self, request: Request, file: BinaryIO) -> Response:
        """The response for an open file; 304 if the client has it."""
        status = os.fstat(file.fileno())
        mime_type = file_type(request.path)
        headers = self._expiry(mime_type)
        if self._is_current(request, int(status.st_mtime)):
            file.close()
            return Response(status=304, headers=headers)
        headers["Content-Type"] = mime_type + ("; charset=utf-8" if mime_type.startswith("text/") else "")
        headers["Last-Modified"] = http_date(int(status.st_mtime))
        headers["Accept-Ranges"] = "bytes"
        response = Response(file, 200, headers, status.st_size)
        self._apply_range(request, response)
        return response

    @staticmethod
    def _is_current(request: Request, changed: int) -> bool:
        """(RFC 9110, "If-Modified-Since"; If-None-Match would overrule it)"""
        known = http_time(request.headers.get("if-modified-since", ""))
        return known is not None and changed <= known and "if-none-match" not in request.headers

    def _expiry(self, mime_type: str) -> dict[str, str]:
        lifetime = self._options.type_expires.get(mime_type)
        if lifetime is None:
            return {"Cache-Control": "no-cache"}        # keep it, but ask whether it has changed
        return {"Cache-Control": f"max-age={int(lifetime)}", "Expires": http_date(int(time.time()) + int(lifetime))}

    @staticmethod
    def _apply_range(request: Request, response: Response) -> None:
        """One range of bytes (RFC 9110, "Range Requests"); of several, none: the whole file is a valid answer."""
        match = BYTE_RANGE.fullmatch(request.headers.get("range", ""))
        condition = request.headers.get("if-range")
        if match is None or request.method == "HEAD" or condition not in (None, response.headers["Last-Modified"]):
            return
        size, (start, end) = response.length, match.groups()
        if not (start or end) or (start and end and int(start) > int(end)):
            return
        first = int(start) if start else max(0, size - int(end))
        last = min(int(end), size - 1) if start and end else size - 1
        if first > last:
            response.body.close()
            raise HTTPFault(416, "The range lies outside of the file", Content_Range=f"bytes */{size}")
        response.body.seek(first)
        response.length = last - first + 1
        response.status = 206
        response.headers["Content-Range"] = f"bytes {first}-{last}/{size}"


# ======================================================================================
# §14  The server
#
# Puts the parts together: options, handler threads and watch (§11), core (§7), HTTP (§12) and
# the long-poll wait (§9).  Of socketserver it uses the making of the listening socket and the
# accepting; a connection is then parked, not given a thread.
#
# Stopping, within `grace` seconds, on a thread of its own: free the port, and refuse new requests; end
# all sessions, so that every held connect gets its last reply and local clients are told; have the
# wait send all that is in line, and end; wait until the application's code is done and all output has
# left; close the streams, with a word of why where they have one; hang up.
# ======================================================================================

# -- The log ---------------------------------------------------------------------------------
#
# Each server has a logger of its own, below bayeux_server and bayeux_server.<alias>, to which an
# application may add handlers.  What comes from the network may hold anything; in the log it must neither
# look like a line of its own nor steer a terminal.  And nobody may have to wait for the reader of a log:
# what this module writes itself, to log_file and to stderr, is written by a thread.

#   Where a log is rotated under its name, the new file is to be opened.  (Windows lets nobody rename an open one.)
LogFile = logging.handlers.WatchedFileHandler if os.name == "posix" else logging.FileHandler
LOG_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


def printable(text: str) -> str:
    """The text with every control character (and what else repr would escape) escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def make_printable(record: logging.LogRecord) -> bool:
    """A filter of a logger, which lets everything pass.  A traceback is indented: its lines are none of the log."""
    try:
        message = record.getMessage()
    except (KeyError, TypeError, ValueError):
        return True                     # a wrong call of the logger; the handlers will say so
    if not message.isprintable():
        record.msg, record.args = printable(message), None
    if record.exc_info and not record.exc_text:
        lines = LOG_FORMAT.formatException(record.exc_info).split("\n")
        record.exc_text = "\n".join("    " + printable(line) for line in lines)
    return True


class BackgroundLog(logging.handlers.QueueHandler):
    """Has another handler write, on a thread.  Lines that find LINES_KEPT others waiting are dropped and counted."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__(queue.Queue(LINES_KEPT))
        self.setFormatter(LOG_FORMAT)
        self._handler = handler
        self._dropped = 0
        self._has_ended = threading.Event()
        threading.Thread(target=self._write, name="bayeux log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                self.queue.put_nowait(self._note())
                self._dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def _note(self) -> logging.LogRecord:
        text = f"{self._dropped} lines of this log were dropped, as it was not read"
        return self.prepare(logging.LogRecord("bayeux_server", logging.WARNING, "", 0, text, None, None))

    def _write(self) -> None:
        for record in iter(self.queue.get, None):
            try:
                self._handler.emit(record)      # handle() would hold a lock meanwhile, which logging wants at exit
            except OSError:                     # the file cannot be opened again after its rotation
                self._handler.handleError(record)
        self._handler.close()
        self._has_ended.set()

    def close(self) -> None:
        """Wait until everything is written, but no longer than LOG_PATIENCE."""
        deadline = time.monotonic() + LOG_PATIENCE
        with contextlib.suppress(queue.Full):
            for last in [self._note(), None] if self._dropped else [None]:
                self.queue.put(last, timeout=max(0.0, deadline - time.monotonic()))
            self._has_ended.wait(max(0.0, deadline - time.monotonic()))
        super().close()


class BayeuxServer(http.server.ThreadingHTTPServer):
    """A Bayeux server, and a small file server beside it.

    Arguments: the options, by keyword; see the README, --help, or dataclasses.fields(Options).  It
    listens as soon as it is made, and serves once start() or serve_forever() is called, or inside a
    with block.

    Raises:
        OptionError: an option is unknown, or has a value it may not have.
        OSError: the port is in use, or may not be used.

    Attributes:
        options: all of them, with their defaults.
        host, port: where it listens; port=0 took any free one.
        url: where Bayeux is spoken.
        logger: a logging.Logger, of this server only.
    """

    request_queue_size = ACCEPT_BACKLOG
    allow_reuse_address = os.name == "posix"    # elsewhere two servers could share the port

    def __init__(self, **keywords: Any) -> None:
        self.options = options = Options.from_keywords(keywords)
        self._tls = self._tls_context()
        if ":" in options.host:
            self.address_family = socket.AF_INET6
        super().__init__((options.host, options.port), socketserver.BaseRequestHandler)    # which is never made
        self.logger = logging.getLogger(f"bayeux_server.{options.alias}.{options.host}:{self.port}")
        self._log_handler = self._open_log()
        has_limits = options.client_max_connections > 0
        self.memory = Memory(options.max_memory, has_limits, self._lack_memory)
        turns, log = Turns(), SafeLogger(self.logger)
        self._handler_threads = HandlerThreads(options.max_threads - 1, log, has_limits)
        self.socket.setblocking(False)
        self.watch = Watch(self.socket, self._handle_request_noblock, self._deliver_before_reading,
                           self._handler_threads, options.request_timeout, log, self.memory, turns,
                           (lambda group: self.core.kept_open.get(group, 0)) if has_limits else None)
        self.core = Bayeux(options, log, self._handler_threads.run, self._deliver_here,
                           self.watch.after_next_look, time.monotonic, self.memory, turns)
        self.http = HttpTransport(options, self.core, self.watch, log, is_loopback(self.server_address[0]),
                                  Files(options).respond)
        self._wait = LongPollWait(self.core)
        self._state = threading.Lock()
        self._has_started = False
        self._stopping: threading.Thread | None = None
        self._has_stopped = threading.Event()
        self._is_relieving = threading.Lock()
        with live_servers_lock:
            live_servers.add(self)

    def _deliver_here(self) -> bool:
        """Something is in line to be sent: does this thread see to it?  What goes to a few leaves before the reply."""
        if not self.watch.is_led_here():
            return False
        if len(self.core.ready) <= FEW_ANSWERS:
            self._wait.deliver(1)
        return True

    def _deliver_before_reading(self) -> bool:
        """What the leader does between reading and reading; whether there is more for it to deliver."""
        return bool(self.core.ready) and self._wait.deliver(ROUNDS_AT_ONCE) and bool(self.core.ready)

    def _lack_memory(self) -> None:
        """More waits than max_memory.  The leader sees to it: no handler thread may be free, and only it closes."""
        if self._is_relieving.acquire(blocking=False):
            self.watch.do_soon(self._relieve_memory)

    def _relieve_memory(self) -> None:
        """End those that keep most, one after another, until it is enough.

        That is reckoned by what each of them keeps: without a GIL CPython frees an event only when the thread that made
        it runs next.  If others keep the same events, the next event finds too little memory, too.
        """
        try:
            with self.core.lock:
                excess = self.memory.used - self.memory.limit
                sessions = [(session.waiting_size, session) for session in self.core.sessions.values()]
            connections = [(each.kept, each) for each in self.watch.connections if not each.is_handled]
            for size, keeper in sorted(sessions + connections, key=lambda pair: -pair[0]):
                if size == 0 or excess <= 0:
                    break
                excess -= size
                if isinstance(keeper, Session):
                    with self.core.lock:
                        self.core.end_session(keeper, ENDED_MEMORY)
                else:
                    self.logger.warning("a connection from %s is closed: more than max_memory waits, %d bytes in this one",
                                        keeper.address, size)
                    self.watch.close(keeper)
        finally:
            self._is_relieving.release()
        self.core.wake()

    def _open_log(self) -> logging.Handler | None:
        self.logger.addFilter(make_printable)
        self.logger.setLevel(logging.DEBUG if self.options.debug else logging.NOTSET)
        if self.options.log_file is None:
            return None
        try:
            file = LogFile(self.options.log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self.server_close()
            raise OptionError(f"log_file is {self.options.log_file!r}: it must be a file that can be written "
                              f"({error.strerror})") from None
        handler = BackgroundLog(file)
        if self.logger.getEffectiveLevel() > logging.INFO:
            self.logger.setLevel(logging.INFO)
        self.logger.addHandler(handler)
        return handler

    def _tls_context(self) -> ssl.SSLContext | None:
        if self.options.tls_cert is None:
            return self.options.tls_context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.options.tls_cert, self.options.tls_key)
        except OSError as error:                # ssl.SSLError too
            raise OptionError(f"tls_cert is {self.options.tls_cert!r} and tls_key is {self.options.tls_key!r}: "
                              f"they must be PEM files that belong together ({error})") from None
        return context

    @property
    def host(self) -> str:
        return self.options.host

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return self.root_url + self.options.path

    @property
    def root_url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    # -- Starting and stopping -------------------------------------------------------------

    def start(self) -> BayeuxServer:
        """Serve, on threads of its own, and return at once."""
        with self._state:
            if self._stopping is not None:
                raise RuntimeError("the server has been shut down; make another")
            if not self._has_started:
                self._has_started = True
                raise_file_limit()
                self.watch.share_out_files()
                self._wait.start()
                self.watch.start()
        return self

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until another thread, or a signal handler's exception, ends it."""
        self.start()
        while not self.watch.has_ended.wait(poll_interval):
            pass

    def shutdown(self) -> None:
        """Stop, within `grace` seconds: free the port, answer what is held, tell local clients, hang up.

        Returns when that is done, however many threads ask for it.  Called by the application's code on one of the
        server's own threads (by a service, a callback, a content handler) it returns at once: the stop waits for that
        code, and its answer still leaves.
        """
        is_first = False
        with self._state:
            if self._stopping is None:
                is_first = True
                self._stopping = threading.Thread(target=self._stop, name="bayeux stop")
        if is_first:
            try:
                self._stopping.start()
            except RuntimeError:                # no more threads, or the interpreter ends
                self._stop()
        if not self._is_own_thread():
            self._has_stopped.wait()

    def _is_own_thread(self) -> bool:
        """Whether stopping must not wait for this thread, or would wait for itself."""
        is_known = threading.current_thread() in (self._wait, self._stopping)
        return is_known or self._handler_threads.is_here() or self.watch.is_led_here()

    def _stop(self) -> None:
        """The steps of stopping; if one fails, the others are needed all the more."""
        deadline = time.monotonic() + self.options.grace
        steps: list[Callable[[], None]] = [self._stop_taking, self.core.stop]
        if self._has_started:
            # The wait first: what it has taken to deliver is not seen to be on its way.
            steps += [partial(self._wait.stop, self.options.grace), partial(self._let_leave, deadline),
                      partial(self._say_goodbye, deadline), self.watch.stop, partial(self._await_leader, deadline)]
        else:
            steps.append(self.watch.close_all)
        for step in [*steps, self._handler_threads.stop, self.server_close, self._close_log]:
            try:
                step()
            except BaseException:
                self.core.logger.exception("stopping failed in part")
        self._has_stopped.set()

    def _stop_taking(self) -> None:
        """No new clients, and no new requests of old ones."""
        with live_servers_lock:
            live_servers.discard(self)
        self.http.is_stopping = True
        self.watch.stop_accepting()

    def _let_leave(self, deadline: float) -> None:
        """Wait for what the application's code has in hand, and for output to leave."""
        while not (self.core.is_quiet() and not self.watch.is_busy()) and time.monotonic() < deadline:
            self.watch.has_ended.wait(0.01)

    def _say_goodbye(self, deadline: float) -> None:
        """Have the streams closed.  The last word waits in the output, too, while the socket of a slow reader is full."""
        is_said = threading.Event()

        def close_streams() -> None:
            try:
                self.http.close_streams()
            finally:
                is_said.set()

        self.watch.do_soon(close_streams)
        is_said.wait(max(0.0, deadline - time.monotonic()))
        while self.watch.has_output() and time.monotonic() < deadline:
            self.watch.has_ended.wait(0.01)

    def _await_leader(self, deadline: float) -> None:
        self.watch.has_ended.wait(max(0.1, deadline - time.monotonic()))

    def _close_log(self) -> None:
        if self._log_handler is not None:
            self.logger.removeHandler(self._log_handler)
            self._log_handler.close()

    def __enter__(self) -> Any:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # -- Calls of the application ----------------------------------------------------------

    def service(self, name: str) -> Callable[[Callable], Callable]:
        """Decorator: the function answers /service/<name> (the original's Services).

        It is called with the message, a dict, and returns None, a message or several, which go back to
        that client only; channel, id and successful are filled in.  '_handler' answers what has no service.
        """
        def register(function: Callable) -> Callable:
            self.core.services[name] = function
            return function
        return register

    def add_listener(self, listener: Callable[[str, dict], None], events: Iterable[str] = EVENTS) -> None:
        """Have listener(event, details) called with what happens (the original's Callback).

        subscribe, unsubscribe (client_id, channel), publish (channel, data; client_id, id, ext where given),
        client_push (client_id, channel, data, more), client_connect (client_id; ip, or session for a local
        client), client_disconnect (client_id, reason).  In order, on a thread that holds no lock.

        Arguments:
            events: the names of those that it wants; a notice of each publish has its price.

        Raises:
            ValueError: there is no event of such a name.
        """
        self.core.add_listener(listener, tuple(events))

    def subscribe(self, channel: str, client_id: str) -> None:
        """Subscribe a session or local client to a channel or pattern.  Raises BayeuxError 402, 403, 405."""
        self.core.subscribe(channel, client_id)

    def unsubscribe(self, channel: str, client_id: str) -> None:
        """End a subscription.  Raises BayeuxError: no such client (402) or subscription (404)."""
        self.core.unsubscribe(channel, client_id)

    def publish(self, channel: str, data: Any, client_id: str | None = None, id: Any = None,
                ext: dict | None = None) -> None:
        """Send data to all subscribers of the channel.

        Arguments:
            channel: a broadcast channel's name.
            data: whatever JSON can hold.
            client_id: whose event it is, as local clients see it.
            id: local clients see it; remote ones only with forward_id.
            ext: everybody sees it.

        Raises:
            BayeuxError: no channel's name (405), or a /meta/ or /service/ channel (403).
            TypeError, ValueError: JSON cannot hold the data.
        """
        self.core.publish(channel, data, client_id, id, ext)

    @property
    def sessions(self) -> list[Session]:
        """The sessions there are now, to be looked at, not to be changed (but for flags)."""
        with self.core.lock:
            return list(self.core.sessions.values())

    def end_session(self, client_id: str, reason: str) -> None:
        """End a session.  Its client is told the reason, now or when it comes back.  Raises BayeuxError 402."""
        self.core.disconnect(client_id, reason)

    def client_push(self, client_id: str, channel: str, data: Any = None, **extra: Any) -> None:
        """Send one client a message that is no answer and no publish.  Raises BayeuxError 402, 405."""
        self.core.client_push(client_id, channel, data, **extra)

    # -- What socketserver calls -----------------------------------------------------------

    def server_bind(self) -> None:
        """Without http.server's look-up of our own name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.options.host, self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in NO_MORE_FILES:
                self.logger.error("no more connections: %s (ulimit -n)", error.strerror)
                self.watch.pause_accepting()
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Park the connection; no thread of its own."""
        request.setblocking(False)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = Connection
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            kind = TLSConnection
        address = plain_address(client_address[0])
        self.watch.adopt(kind(request, address, self.watch, self.http, self.core.addresses.group(address)))

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.logger.info("a connection from %s failed: %s", client_address[0], sys.exc_info()[1])


# ======================================================================================
# §15  Command line
#
# Every option that can be typed is a flag, made from its row in Options.  A signal only leaves a
# note; the main thread reads it, and stops the server.
# ======================================================================================

class Demo:
    """What index.html talks to, as an application would be written: Demo(server) adds it.

    channel            from        what it carries
    /service/echo      a window    anything; it comes back
    /service/members   a window    {user}: that name is in the chat now; {}: it no longer is; returns the members
    /service/magnets   a window    returns the board: {magnets: [...]}, the last to be moved at the end
    /chat/members      here        {members: names, the bot's first, 100 at most; count: of them all}
    /chat/demo         everybody   {user, chat}; from here also with join: true and leave: true
    /magnets/demo      a window    {magnet: its number, x, y: where, from 0 to 1}
    """

    LONGEST_NAME = 40           # characters
    NAMES_SHOWN = 100           # so that a thousand who come cost no more than a thousand short messages
    MAGNETS = 200               # numbers that the board remembers; a page has fewer words

    def __init__(self, server: BayeuxServer) -> None:
        self.server = server
        self.lock = threading.Lock()            # services run side by side; guards members and magnets
        self.members: dict[str, str] = {}       # clientId: name
        self.magnets: dict[int, dict] = {}      # number: {magnet, x, y}
        server.service("echo")(self.echo)
        server.service("members")(self.come_or_go)
        server.service("magnets")(self.board)
        server.add_listener(self.session_ended, ["client_disconnect"])
        self.bot = LocalClient(server, "autobot")
        self.bot.subscribe("/chat/demo", self.answer)
        self.bot.subscribe("/magnets/demo", self.move)

    def echo(self, message: dict) -> dict:
        return {"data": message.get("data")}

    def answer(self, message: dict) -> None:
        """The bot hears somebody; not itself, or it would never end."""
        data = message["data"]
        is_talk = isinstance(data, dict) and isinstance(data.get("chat"), str) and not (
            data.get("join") or data.get("leave"))
        if is_talk and message.get("clientId") != self.bot.id:
            user = data.get("user")
            name = user[:self.LONGEST_NAME] if isinstance(user, str) else "somebody"
            text = f"I heard {name} say: {data['chat'][:200]}"
            self.say("/chat/demo", {"user": "autobot", "chat": text})

    def say(self, channel: str, data: dict) -> None:
        """Publish as the bot.  It is silent once the server stops, and while it has too much to hear (429)."""
        with contextlib.suppress(BayeuxError):
            self.bot.publish(channel, data)

    def come_or_go(self, message: dict) -> dict:
        data, client_id = message.get("data"), message.get("clientId")
        user = data.get("user") if isinstance(data, dict) else None
        if client_id is None:
            raise BayeuxError(401, "", "A member needs a session")
        if user is not None and not (isinstance(user, str) and 0 < len(user.strip()) <= self.LONGEST_NAME):
            raise BayeuxError(400, message["channel"], f"user must be a name of 1 to {self.LONGEST_NAME} characters")
        self.change_member(client_id, user and user.strip())
        with self.lock:
            return {"data": self.member_list()}

    def change_member(self, client_id: str, user: str | None) -> None:
        """Announce who came, went, or took another name; the one lock keeps the announcements in order."""
        with self.lock:
            before = self.members.pop(client_id, None)
            if user is not None and any(session.id == client_id for session in self.server.sessions):
                self.members[client_id] = user
            after = self.members.get(client_id)
            if before != after:
                if before is not None:
                    self.say("/chat/demo", {"user": before, "leave": True, "chat": f"{before} has left"})
                if after is not None:
                    self.say("/chat/demo", {"user": after, "join": True, "chat": f"{after} has joined"})
                self.say("/chat/members", self.member_list())

    def member_list(self) -> dict:
        names = ["autobot", *self.members.values()]
        return {"members": names[:self.NAMES_SHOWN], "count": len(names)}

    def session_ended(self, event: str, details: dict) -> None:
        """Who closed the lid of a laptop says no good-bye; the server misses the session, and we say it."""
        self.change_member(details["client_id"], None)

    def move(self, message: dict) -> None:
        """Keep where a magnet is, for those who come later."""
        data = message["data"] if isinstance(message["data"], dict) else {}
        number, x, y = (data.get(key) for key in ("magnet", "x", "y"))
        if type(number) is int and 0 <= number < self.MAGNETS and all(is_number(at) and 0 <= at <= 1 for at in (x, y)):
            with self.lock:
                self.magnets.pop(number, None)
                self.magnets[number] = {"magnet": number, "x": x, "y": y}

    def board(self, message: dict) -> dict:
        with self.lock:
            return {"data": {"magnets": list(self.magnets.values())}}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bayeux_server.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Bayeux server: live messages between browsers and programs over named channels.\n"
                    "Serves the files of a folder beside it.",
        epilog="example: python bayeux_server.py --port 8080 --docroot .    then open http://127.0.0.1:8080/")
    parser.add_argument("--version", action="version", version=f"bayeux_server {__version__} (Bayeux {VERSION})")
    parser.add_argument("--bare", action="store_true", help="without the services and the bot of the demo page")
    group: Any = parser
    for row in dataclasses.fields(Options):
        if row.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[row.name])
        add_flag(group, row)
    parser.set_defaults(docroot=".")
    return parser


# By the first option of each.
HELP_GROUPS = {"host": "where it listens, and what it serves", "anon_publish": "who may do what", "timeout": "times",
               "client_max_connections": "limits", "ack": "extensions of the protocol", "debug": "logging"}


def add_flag(group: Any, row: dataclasses.Field) -> None:
    """The option as a flag in a group of --help, if it can be read from a command line."""
    kind, help_text = row.metadata["kind"], row.metadata["help"].replace("%", "%%")
    flag = row.metadata["flag"] or "--" + row.name.replace("_", "-")
    if kind is SWITCH:
        if row.default:
            flag, help_text = "--no-" + flag[2:], "off: " + help_text
        group.add_argument(flag, dest=row.name, action="store_false" if row.default else "store_true",
                           default=argparse.SUPPRESS, help=help_text)
    elif kind.read is not None:
        has_default = row.default not in (None, (), dataclasses.MISSING)
        default = f" ({', '.join(row.default) if kind.many else row.default})" if has_default else ""
        group.add_argument(flag, dest=row.name, action="append" if kind.many else "store",
                           type=partial(read_flag, kind), default=argparse.SUPPRESS, help=help_text + default,
                           metavar=kind.shown)


def read_flag(kind: Kind, text: str) -> Any:
    try:
        return kind.read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be {kind.allowed}") from None


def hosts_text(server: BayeuxServer) -> str:
    hosts = admitted_hosts(server.options, is_loopback(server.server_address[0]))
    return "any" if "*" in hosts else ", ".join(["addresses", "localhost", *sorted(
        host for host in hosts if host != "localhost" and not is_address(host))])


def origins_text(allowed: Iterable[str]) -> str:
    warning = """
             (with * browsers refuse clients that send credentials, as those of CometD and dojo do over
             long-polling: give the origins of their pages, too)"""
    return ", ".join(["own pages", *allowed]) + (warning if "*" in allowed else "")


def start_text(server: BayeuxServer, is_bare: bool) -> str:
    """What a newcomer wants to know: where to look, what is served, who may do what."""
    options = server.options
    kept_open = options.client_max_connections or "any number of"
    lines = [f"bayeux_server {__version__}: open {server.root_url}/ in two windows",
             f"  Bayeux     {server.url}  ({', '.join(CONNECTION_TYPES)})",
             f"  files      {os.path.abspath(options.docroot) if options.docroot else 'none'}",
             f"  publishing {'anybody' if options.anon_publish else 'clients after their handshake'}",
             f"  origins    {origins_text(options.allowed_origins)}",
             f"  hosts      {hosts_text(server)}",
             f"  limits     {kept_open} connections kept open by one address, {options.max_sessions} sessions,",
             f"             {options.max_queue} waiting events a session, {options.max_message_size} bytes a message"]
    if not is_bare:
        lines.append("  demo       /service/echo, /service/members, /service/magnets, a bot on /chat/demo (not with --bare)")
    return "\n".join([*lines, "Ctrl-C stops it."])


class Unbuffered:
    """A stream that passes on what is written at once, and holds no lock meanwhile.

    A thread that waits in sys.stderr.write holds a lock that the interpreter wants at its end.
    """

    def __init__(self, stream: Any) -> None:
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        self._write = raw.write if raw else lambda data: stream.write(data.decode("utf-8")) and len(data)

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[self._write(data) or len(data):]    # None: it takes nothing now, and is not waited for


def main(arguments: list[str] | None = None) -> int:
    """Run a server until SIGINT or SIGTERM.  Returns the exit status: 0, 1 (cannot listen); 2 is argparse's."""
    parser = make_parser()
    keywords = vars(parser.parse_args(arguments))
    is_bare = keywords.pop("bare")
    if "type_expires" in keywords:
        keywords["type_expires"] = dict(keywords["type_expires"])
    with contextlib.closing(BackgroundLog(logging.StreamHandler(Unbuffered(sys.stderr)))) as log:
        logging.basicConfig(level=logging.INFO, handlers=[log])
        try:
            server = BayeuxServer(**keywords)
        except OptionError as error:
            parser.error(str(error))
        except OSError as error:
            where = f"{keywords.get('host', '127.0.0.1')}:{keywords.get('port', 8080)}"
            print(f"bayeux_server.py: cannot listen on {where}: {error.strerror or error}", file=sys.stderr)
            return 1
        run(server, is_bare)
    return 0


def run(server: BayeuxServer, is_bare: bool) -> None:
    """Serve until SIGINT or SIGTERM."""
    if not is_bare:
        Demo(server)
    requests_to_stop: queue.SimpleQueue = queue.SimpleQueue()   # an Event's lock could be held by who is interrupted
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: requests_to_stop.put(number))
    server.start()
    print(start_text(server, is_bare), flush=True)
    while True:
        try:
            requests_to_stop.get(timeout=0.5)   # a timeout, or Windows would not see the signal
            break
        except queue.Empty:
            pass
    server.shutdown()


if __name__ == "__main__":
    sys.exit(main())

// CometD's own JavaScript client, with all of its extensions, against a server of ours.
//
//     node npm_cometd.js long-polling|callback-polling|websocket PYTHON bayeux_server.py
//
// In a browser these extensions work alike; Node only lacks what the first section brings.

import { adapt } from "cometd-nodejs-client";
import { check, run, within } from "./checks.js";
import { Server, withServer } from "./server.js";

const PATIENCE = 20;            // seconds for one answer; after a restart the client waits before it tries again

// ======================================================================================
// A browser, as far as the client needs one
//
// adapt() brings XMLHttpRequest, WebSocket (of npm's ws) and timers.  Callback-polling needs a document
// besides, because its requests are script elements; the reload extension needs a sessionStorage.
// ======================================================================================

class Script {
  // Fetches and evaluates the source; like a browser for a page of the server's own, with a Referer, and
  // like one under nosniff, only if its type is a script's.
  //
  // The callback is taken now, and not when the script has come: each client counts its callbacks
  // from 0, and two clients in one window would take each other's.
  async load() {
    const name = new URL(this.src).searchParams.get("jsonp");
    const callback = window[name];
    try {
      const response = await fetch(this.src, { headers: { Referer: new URL("/", this.src).href } });
      const type = response.headers.get("content-type");
      if (!response.ok || !/^text\/javascript\b/.test(type)) throw new Error(`HTTP ${response.status}, ${type}`);
      new Function(name, await response.text())(callback);
    } catch {
      this.onerror({ type: "error" });
    }
  }
}

const head = {
  appendChild: (script) => void script.load(),
  removeChild: () => {},
};
const stored = new Map();

globalThis.window = {
  document: { getElementsByTagName: () => [head], createElement: () => new Script() },
  sessionStorage: {
    getItem: (name) => stored.get(name) ?? null,
    setItem: (name, value) => stored.set(name, value),
    removeItem: (name) => stored.delete(name),
  },
};
adapt();
const { AckExtension, BinaryExtension, CometD, ReloadExtension, TimeStampExtension, TimeSyncExtension } =
  await import("cometd");       // it looks for window when it is loaded
const { Z85 } = await import("cometd/Z85.js");

// ======================================================================================
// A client whose answers are promises
// ======================================================================================

class Client {
  constructor(name, type, url) {
    this.name = name;
    this.events = [];           // not yet asked for
    this.metas = [];            // every reply to a handshake or a connect
    this.arrived = () => {};
    this.cometd = new CometD(name);
    for (const other of this.cometd.getTransportTypes()) {
      if (other !== type) this.cometd.unregisterTransport(other);
    }
    this.timesync = new TimeSyncExtension();
    this.cometd.registerExtension("ack", new AckExtension());
    this.cometd.registerExtension("timesync", this.timesync);
    this.cometd.registerExtension("timestamp", new TimeStampExtension());
    this.cometd.registerExtension("binary", new BinaryExtension());
    this.cometd.registerExtension("reload", new ReloadExtension({ name }));
    this.cometd.addListener("/meta/handshake", (reply) => this.metas.push(reply) && this.arrived());
    this.cometd.addListener("/meta/connect", (reply) => this.metas.push(reply) && this.arrived());
    this.cometd.configure({ url, logLevel: "error" });
  }

  // Calls a function of the client's with a callback as its last argument; a promise of the reply.
  ask(method, ...parameters) {
    return within(PATIENCE, `${this.name}'s ${method} ${parameters[0] ?? ""}`, new Promise((resolve) => {
      this.cometd[method](...parameters, resolve);
    }));
  }

  // Subscribes, and notes every event; a promise of the subscription and the reply.
  async subscribe(pattern) {
    let subscription;
    const reply = await within(PATIENCE, `${this.name}'s subscribe ${pattern}`, new Promise((resolve) => {
      subscription = this.cometd.subscribe(pattern, (event) => this.events.push(event) && this.arrived(), resolve);
    }));
    return { subscription, reply };
  }

  // Waits until something that has arrived makes the condition hold.
  async until(what, holds) {
    await within(PATIENCE, `${this.name}: ${what}`, new Promise((resolve) => {
      this.arrived = () => holds() && resolve();
      this.arrived();
    }));
  }

  // The next events, in order, as many as asked for; they are taken out.
  async next(count = 1) {
    await this.until(`${count} events`, () => this.events.length >= count);
    return this.events.splice(0, count);
  }
}

// The code at the beginning of a refused reply's error.
function errorCode(reply) {
  return reply.successful === false ? Number.parseInt(reply.error, 10) : 0;
}

// ======================================================================================
// The conversation
// ======================================================================================

async function converse(type, server) {
  const alice = new Client("alice", type, server.url), bob = new Client("bob", type, server.url);
  await shakeHands(alice, bob, type);
  await talk(alice, bob);
  await refuse(alice, bob);
  await extend(alice, bob);
  const again = await reload(alice, bob, type, server);
  await recover(again, bob, server);
  for (const client of [again, bob]) {
    const farewell = await client.ask("disconnect");
    check(`${client.name} disconnects`, farewell.successful && client.cometd.isDisconnected(), farewell);
    check(`${client.name} heard nothing that was not expected`, client.events.length === 0, client.events);
  }
}

async function shakeHands(alice, bob, type) {
  for (const client of [alice, bob]) {
    const reply = await client.ask("handshake");
    check(`${client.name}'s handshake succeeds`, reply.successful && reply.clientId, reply);
    check(`${client.name} speaks ${type}`, client.cometd.getTransport().type === type);
  }
}

async function talk(alice, bob) {
  const { reply: subscribed } = await alice.subscribe("/room/one");
  check("alice subscribes /room/one", subscribed.successful && subscribed.subscription === "/room/one", subscribed);
  const { subscription: wildcard, reply } = await bob.subscribe("/room/*");
  check("bob subscribes /room/*", reply.successful && reply.subscription === "/room/*", reply);
  const { reply: deep } = await bob.subscribe("/deep/**");
  check("bob subscribes /deep/**", deep.successful, deep);

  const published = await alice.ask("publish", "/room/one", { text: "ça va? \u2028 </script> 🙂" });
  check("alice's publish is acknowledged", published.successful && published.channel === "/room/one", published);
  for (const client of [alice, bob]) {
    const [event] = await client.next();
    check(`${client.name} hears alice, every character, and nobody's clientId`,
      event.data.text === "ça va? \u2028 </script> 🙂" && !("clientId" in event), event);
  }
  await alice.ask("publish", "/deep/down/below", { number: 0 });
  check("bob hears by /deep/**", (await bob.next())[0].channel === "/deep/down/below");

  let asked;
  alice.cometd.batch(() => {
    asked = [1, 2, 3].map((number) => alice.ask("publish", "/room/two", { number }));
  });
  const replies = await Promise.all(asked);
  check("each publish of a batch is acknowledged", replies.every((each) => each.successful), replies);
  const numbers = (await bob.next(3)).map((event) => event.data.number);
  check("the batch arrives in order", numbers.join() === "1,2,3", numbers);

  const gone = await bob.ask("unsubscribe", wildcard);
  check("bob unsubscribes /room/*", gone.successful && gone.subscription === "/room/*", gone);
  await alice.ask("publish", "/room/two", { number: 4 });
  await alice.ask("publish", "/deep/after", { number: 5 });
  const [after] = await bob.next();
  check("bob hears what he still wants, and no more of the other", after.data.number === 5, after);
}

async function refuse(alice, bob) {
  const { reply: meta } = await bob.subscribe("/meta/x");
  check("a subscription to /meta/x fails with 403", errorCode(meta) === 403, meta);
  const bad = await bob.ask("publish", "/room/no such name", {});
  check("a publish to a bad channel name fails with 405", errorCode(bad) === 405, bad);
  const pattern = await bob.ask("publish", "/room/*", {});
  check("a publish to a pattern fails with 405", errorCode(pattern) === 405, pattern);
  const unknown = await alice.ask("remoteCall", "nobody", {}, PATIENCE * 1000);
  check("a call of an unknown service fails with 404", errorCode(unknown) === 404, unknown);
  await alice.ask("publish", "/deep/refused", { number: 6 });
  const [event] = await bob.next();
  check("refusals leave the session as it was", event.data.number === 6, event);
}

async function extend(alice, bob) {
  const echo = await alice.ask("remoteCall", "echo", { a: [1, null, "x"] }, PATIENCE * 1000);
  check("a remote call of echo brings its data back",
    JSON.stringify(echo.data) === JSON.stringify({ a: [1, null, "x"] }), echo);

  const bytes = Uint8Array.from([0, 1, 2, 253, 254, 255, 7, 8, 9, 10]);
  const sent = await alice.ask("publishBinary", "/deep/binary", bytes, true, { name: "ten bytes" });
  check("a binary publish is acknowledged", sent.successful, sent);
  const [event] = await bob.next();
  check("its bytes arrive", String(new Uint8Array(event.data.data)) === String(bytes)
    && event.data.meta.name === "ten bytes" && event.data.last === true, event);
  // The echo service returns data alone, without the ext that says what it is: it comes back as text.
  const call = await alice.ask("remoteCallBinary", "echo", bytes, true, {}, PATIENCE * 1000);
  check("a binary remote call brings its data back, as it was on the wire",
    call.data.data === Z85.encode(bytes) && call.data.last === true, call);

  const batches = () => alice.metas.filter((reply) => reply.channel === "/meta/connect").map((reply) => reply.ext?.ack);
  check("the handshake agrees on acknowledgement", alice.metas[0].ext?.ack === true, alice.metas[0]);
  check("each connect's reply carries a batch number, rising", batches().length > 1 && batches().every(
    (batch, index, all) => Number.isInteger(batch) && (index === 0 || batch > all[index - 1])), batches());
  check("its timesync makes sense", alice.metas.every(({ ext: { timesync } }) => ["tc", "ts", "p", "a"].every(
    (name) => Number.isInteger(timesync[name]))), alice.metas);
  check("the clocks of one machine agree", Math.abs(alice.timesync.getTimeOffset()) < 2000
    && alice.timesync.getNetworkLag() < 2000, [alice.timesync.getTimeOffset(), alice.timesync.getNetworkLag()]);
}

// A page is reloaded: another client takes over the session, and what comes meanwhile is not lost.
async function reload(alice, bob, type, server) {
  const id = alice.cometd.getClientId();
  alice.cometd.reload();
  await bob.ask("publish", "/room/one", { text: "while you were away" });
  const again = new Client("alice", type, server.url);
  again.cometd.addListener("/meta/handshake", (reply) => reply.successful && void again.subscribe("/room/one"));
  const reply = await again.ask("handshake");
  check("a reloaded page goes on with its session", reply.successful && again.cometd.getClientId() === id
    && reply.ext.reload === true, reply);
  const [event] = await again.next();
  check("it hears what was said meanwhile", event.data.text === "while you were away", event);
  return again;
}

// As applications of CometD do it, alice subscribes at each handshake; see reload().
async function recover(alice, bob, server) {
  bob.cometd.addListener("/meta/handshake", (reply) => reply.successful && void bob.subscribe("/deep/**"));
  const [before, since] = [alice.cometd.getClientId(), { alice: alice.metas.length, bob: bob.metas.length }];
  await server.restart();
  for (const client of [alice, bob]) {
    await client.until("a handshake and a connect after the restart", () => {
      const metas = client.metas.slice(since[client.name]);
      const shaken = metas.findIndex((reply) => reply.channel === "/meta/handshake" && reply.successful);
      return shaken >= 0 && metas.slice(shaken).some((reply) => reply.channel === "/meta/connect" && reply.successful);
    });
  }
  check("both have a new session, by themselves", alice.cometd.getClientId() !== before);
  await bob.ask("publish", "/deep/again", { number: 7 });
  check("bob hears himself after the restart", (await bob.next())[0].data.number === 7);
  await bob.ask("publish", "/room/one", { text: "after the restart" });
  check("alice hears bob after the restart", (await alice.next())[0].data.text === "after the restart");
}

const [type, python, module] = process.argv.slice(2);
await run(`npm cometd over ${type}`, 100, async () => {
  if (!module) throw new Error("usage: node npm_cometd.js TYPE PYTHON bayeux_server.py");
  await withServer(new Server(python, module), (server) => converse(type, server));
});

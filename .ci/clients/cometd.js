// CometD's own JavaScript client against a server of ours.
//
//     node cometd.js http://127.0.0.1:8080/cometd [long-polling | callback-polling]
//
// The server must run its demo: /service/echo, and the bot on /chat/demo.

import { adapt } from "cometd-nodejs-client";
import { check, run, within } from "./checks.js";

const [url, ...types] = process.argv.slice(2);
const PATIENCE = 15;            // seconds for one answer

// ======================================================================================
// A browser, as far as the client needs one
//
// adapt() brings XMLHttpRequest and timers.  Callback-polling needs a document besides: its
// requests are script elements.  Ours do what a browser does with <script src>: fetch the text
// and evaluate it, so that it calls the function that it names.
// ======================================================================================

class Script {
  // Fetches and evaluates the source; like a browser under nosniff, only if its type is a script's.
  //
  // The callback is taken now, and not when the script has come: each client counts its callbacks
  // from 0, and two clients in one window would take each other's.
  async load() {
    const name = new URL(this.src).searchParams.get("jsonp");
    const callback = window[name];
    try {
      const response = await fetch(this.src);
      const type = response.headers.get("content-type");
      if (!response.ok || !/^text\/javascript\b/.test(type)) throw new Error(`HTTP ${response.status}, ${type}`);
      new Function(name, await response.text())(callback);
    } catch (error) {
      console.error(`script failed: ${error.message}`);
      this.onerror({ type: "error" });
    }
  }
}

const head = {
  appendChild: (script) => void script.load(),
  removeChild: () => {},
};

globalThis.window = { document: { getElementsByTagName: () => [head], createElement: () => new Script() } };
adapt();
const { CometD } = await import("cometd");      // it looks for window when it is loaded

// ======================================================================================
// A client whose answers are promises
// ======================================================================================

class Client {
  constructor(name, type) {
    this.name = name;
    this.events = [];
    this.arrived = () => {};
    this.cometd = new CometD(name);
    for (const other of this.cometd.getTransportTypes()) {
      if (other !== type) this.cometd.unregisterTransport(other);
    }
    this.cometd.configure({ url, logLevel: "warn" });
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
      subscription = this.cometd.subscribe(pattern, (event) => this.note(event), resolve);
    }));
    return { subscription, reply };
  }

  note(event) {
    this.events.push(event);
    this.arrived();
  }

  // The next events, in order, as many as asked for; they are taken out.
  async next(count = 1) {
    const enough = new Promise((resolve) => {
      this.arrived = () => this.events.length >= count && resolve();
      this.arrived();
    });
    await within(PATIENCE, `${this.name}'s ${count} events (there are ${JSON.stringify(this.events)})`, enough);
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

async function converse(type) {
  console.log(`cometd over ${type}, ${url}`);
  const alice = new Client("alice", type), bob = new Client("bob", type);

  for (const client of [alice, bob]) {
    const reply = await client.ask("handshake");
    check(`${client.name}'s handshake succeeds`, reply.successful && reply.clientId, reply);
    check(`${client.name} speaks ${type}`, client.cometd.getTransport().type === type);
  }

  const { reply: subscribed } = await alice.subscribe("/chat/demo");
  check("alice subscribes /chat/demo", subscribed.successful && subscribed.subscription === "/chat/demo", subscribed);
  const { subscription: wildcard, reply } = await bob.subscribe("/chat/*");
  check("bob subscribes /chat/*", reply.successful && reply.subscription === "/chat/*", reply);

  const published = await alice.ask("publish", "/chat/demo", { user: "alice", chat: "hello" });
  check("alice's publish is acknowledged", published.successful && published.channel === "/chat/demo", published);
  for (const client of [alice, bob]) {
    const [talk, answer] = await client.next(2);
    check(`${client.name} hears alice, and nobody's clientId`, talk.channel === "/chat/demo"
      && talk.data.user === "alice" && talk.data.chat === "hello" && !("clientId" in talk), talk);
    check(`${client.name} hears the bot's answer`, answer.data.user === "autobot"
      && answer.data.chat.includes("hello"), answer);
  }

  await bob.ask("publish", "/chat/demo", { user: "bob", chat: "ça va? \u2028 </script> 🙂", join: true });
  const [[toAlice], [toBob]] = [await alice.next(), await bob.next()];
  check("both hear bob, every character of his", [toAlice, toBob].every(
    (talk) => talk.data.chat === "ça va? \u2028 </script> 🙂"), toAlice);

  let asked;
  alice.cometd.batch(() => {
    asked = [1, 2, 3].map((number) => alice.ask("publish", "/chat/batch", { number }));
  });
  const replies = await Promise.all(asked);
  check("each publish of a batch is acknowledged", replies.every((each) => each.successful), replies);
  const numbers = (await bob.next(3)).map((event) => event.data.number);
  check("the batch arrives in order", numbers.join() === "1,2,3", numbers);

  const { reply: marked } = await bob.subscribe("/after/**");
  check("bob subscribes /after/**", marked.successful, marked);
  const gone = await bob.ask("unsubscribe", wildcard);
  check("bob unsubscribes /chat/*", gone.successful && gone.subscription === "/chat/*", gone);
  await alice.ask("publish", "/chat/batch", { number: 4 });
  await alice.ask("publish", "/after/the/unsubscribe", { number: 5 });
  const [after] = await bob.next();
  check("bob hears what he still wants, and no more of the other", after.data.number === 5, after);

  const echo = await alice.ask("remoteCall", "echo", { a: [1, null, "x"] }, PATIENCE * 1000);
  check("a remote call of echo brings its data back",
    JSON.stringify(echo.data) === JSON.stringify({ a: [1, null, "x"] }), echo);
  const unknown = await alice.ask("remoteCall", "nobody", {}, PATIENCE * 1000);
  check("a call of an unknown service fails with 404", errorCode(unknown) === 404, unknown);

  const { reply: meta } = await bob.subscribe("/meta/x");
  check("a subscription to /meta/x fails with 403", errorCode(meta) === 403, meta);
  const bad = await bob.ask("publish", "/chat/no such name", {});
  check("a publish to a bad channel name fails with 405", errorCode(bad) === 405, bad);
  const pattern = await bob.ask("publish", "/chat/*", {});
  check("a publish to a pattern fails with 405", errorCode(pattern) === 405, pattern);
  await alice.ask("publish", "/after/the/refusals", { number: 6 });
  const [last] = await bob.next();
  check("refusals leave the session as it was", last.data.number === 6, last);

  for (const client of [alice, bob]) {
    const farewell = await client.ask("disconnect");
    check(`${client.name} disconnects`, farewell.successful && client.cometd.isDisconnected(), farewell);
    check(`${client.name} heard nothing that was not expected`, client.events.length === 0, client.events);
  }
}

await run("cometd.js", 120, async () => {
  if (!url) throw new Error("usage: node cometd.js URL [long-polling | callback-polling]");
  for (const type of types.length ? types : ["long-polling", "callback-polling"]) await converse(type);
});

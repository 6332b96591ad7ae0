// The page's client by itself: copied whole into an empty page, as others will.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { must, mustEqual, until } from "./checks.js";
import { Peer, Server } from "./server.js";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const TYPES = ["websocket", "long-polling", "callback-polling"];

// The client, as it stands in the page.
async function clientScript() {
  const source = await readFile(path.join(path.dirname(Server.program), "index.html"), "utf8");
  return /<script id="client">([^]*?)<\/script>/.exec(source)[1];
}

// Opens an empty page of a server (or of the road to one), with the client's script and nothing else; in it
// `client` is one, `events` has the data that its listener was given, and `states` where it has been.
async function openEmpty(stage, server, types = []) {
  const window = await stage.window(server, { at: "empty.html" });
  await window.page.addScriptTag({ content: await clientScript() });
  await window.page.addScriptTag({ content: `
    const client = new BayeuxClient("/cometd"), events = [], states = [], sent = [];
    client.onstate = (state, why) => states.push(state);
    client.onwire = (direction, message) => direction === "out" && sent.push(message.channel);` });
  await window.page.evaluate(([use, names]) => eval(use)(names), [String((names) => {
    if (names.length) client.types = names;
    client.subscribe("/numbers", (event) => events.push(event.data));
    client.open();
  }), types]);
  await until("connected", async () => await window.page.evaluate("client.state === 'connected'") || must(false, "states", await window.page.evaluate("[states, sent, client.clientId]")));
  return window;
}

const publishNumbers = (window, first, count) => window.page.evaluate(
  `Promise.all(Array.from({ length: ${count} }, (_, at) => client.publish("/numbers", ${first} + at))).then((replies) => replies.length)`);

const hasNumbers = (window, numbers) => until(`the numbers ${numbers.length ? `${numbers[0]} to ${numbers.at(-1)}` : "none"}`, async () => {
  const events = await window.page.evaluate("events");
  return JSON.stringify(events) === JSON.stringify(numbers) || must(false, "once each, in order", events);
});

const range = (first, count) => Array.from({ length: count }, (_, at) => first + at);

// Waits until all that was published before has arrived everywhere, and forgets it.
async function forgetNumbers(windows, peer) {
  if ((await peer.send({ channel: "/numbers", data: "end" }))[0].successful === false) return;
  for (const { page } of windows) {
    await until("the end", () => page.evaluate("events.includes('end') || client.state === 'unconnected'"));
    await page.evaluate("events.length = 0");
  }
}

export async function client(stage) {
  const server = await stage.server("--docroot", HERE, "--interval", "0.2", "--timeout", "5");
  const road = await stage.road(server), peer = await Peer.open(server);
  const windows = {};
  const rule = (what, body) => stage.rule(what, async () => {
    await forgetNumbers(Object.values(windows), peer);
    await body();
  });

  for (const type of TYPES) {
    await rule(`${type}: it connects, subscribes, publishes and hears`, async () => {
      windows[type] = await openEmpty(stage, type === "long-polling" ? road : server, [type]);
      mustEqual(await publishNumbers(windows[type], 0, 30), 30, "replies");
      await hasNumbers(windows[type], range(0, 30));
    });
    await rule(`${type}: a service answers, and a refusal has its code and words`, async () => {
      const { page } = windows[type];
      mustEqual(await page.evaluate("client.publish('/service/echo', { a: null }).then((reply) => reply.data)"), { a: null }, "the answer");
      const refusal = (channel) => page.evaluate(`client.publish(${JSON.stringify(channel)}, 1).catch(({ code, message }) => [code, message])`);
      mustEqual((await refusal("/service/nowhere"))[0], 404, "the code for an unknown service");
      mustEqual((await refusal("/no/*"))[0], 405, "the code for a pattern");
      must((await refusal("no slash"))[1].length > 5, "words");
      mustEqual(await page.evaluate("client.subscribe('/meta/**', () => {}).catch(({ code }) => code)"), 403, "the code for /meta/**");
      await publishNumbers(windows[type], 7, 1);
      await hasNumbers(windows[type], [7]);
    });
  }
  await rule("the lines of README work as they stand there", async () => {
    const [, lines] = /```html\n<script>\n([^]*?)<\/script>/.exec(await readFile(path.join(path.dirname(Server.program), "README.md"), "utf8"));
    const window = await stage.window(server, { at: "empty.html" }), said = [];
    window.page.on("console", (message) => said.push(message.text()));
    await window.page.addScriptTag({ content: await clientScript() });
    await window.page.addScriptTag({ content: lines });
    await until("Hello", () => said.includes("Hello") || must(false, "what the console says", said));
  });
  await rule("what is published in one turn goes as one request", async () => {
    const window = windows["long-polling"], before = window.requests.length;
    await publishNumbers(window, 0, 5);
    await hasNumbers(window, range(0, 5));
    const posts = window.requests.slice(before).length;
    must(posts <= 4, "one request, beside the connects", posts);
  });
  await rule("pauses between connects are as long as the server advises", async () => {
    const times = [];
    windows["long-polling"].page.on("request", (request) => request.postData()?.includes("/meta/connect") && times.push(performance.now()));
    for (let number = 0; number < 4; number += 1) {
      const before = times.length;
      await peer.publish("/numbers", number);
      await until("another connect", () => times.length > before);
    }
    await hasNumbers(windows["long-polling"], range(0, 4));
    const gaps = times.slice(1).map((time, at) => time - times[at]);
    must(gaps.every((gap) => gap > 150), "0.2 s at least, but for the clock's grain", gaps);
  });
  await rule("it waits as long as an overloaded server asks for (Retry-After)", async () => {
    const times = [];
    road.answer = { status: 503, headers: { "Retry-After": "2", "Content-Type": "application/json" }, body: "[]" };
    const window = windows["long-polling"];
    window.page.on("request", () => times.push(performance.now()));
    await peer.publish("/numbers", "wakes the connect");
    await until("two tries", () => times.length >= 2, 15_000);
    road.answer = null;
    must(times[1] - times[0] > 1900, "two seconds between two tries", times[1] - times[0]);
    await until("connected", () => window.page.evaluate("client.state === 'connected'"), 15_000);
    await hasNumbers(window, ["wakes the connect"]);
  });
  await rule("a transport is changed while numbers come: none is lost, none twice, all in order", async () => {
    const window = windows.websocket;
    let next = 0;
    for (const type of ["long-polling", "callback-polling", "websocket", "long-polling", "websocket"]) {
      const publishing = peer.publish("/numbers", ...range(next, 20));
      await window.page.evaluate((name) => eval("client").use(name), type);
      await publishing;
      next += 20;
    }
    await hasNumbers(window, range(0, next));
  });
  await rule("a server that was restarted is handshaken with again, and all subscriptions are made again", async () => {
    await server.kill();
    for (const { page } of Object.values(windows)) await until("it is missed", () => page.evaluate("client.state !== 'connected'"));
    await server.startAgain();
    for (const { page } of Object.values(windows)) {
      await until("connected", () => page.evaluate("client.state === 'connected'"), 30_000);
    }
    peer.id = (await Peer.open(server)).id;
    await peer.publish("/numbers", ...range(0, 3));
    for (const window of Object.values(windows)) await hasNumbers(window, range(0, 3));
  });
  await rule("a session that the server does not know is replaced at once", async () => {
    const { page } = windows.websocket;
    await page.evaluate("client.clientId = 'unknown'");
    await peer.publish("/numbers", 6);              // the connect comes back, and the next one is refused
    await until("another session", () => page.evaluate("client.clientId && client.clientId !== 'unknown' && client.state === 'connected'"));
    await page.evaluate("events.length = 0");
    await peer.publish("/numbers", 7);
    await hasNumbers(windows.websocket, [7]);
  });
  await rule("disconnect() ends the session, and nothing is sent any more", async () => {
    const { page } = windows.websocket, id = await page.evaluate("client.clientId");
    await page.evaluate("client.disconnect()");
    const [reply] = await peer.send({ channel: "/numbers", data: 1, clientId: id });
    must(reply.successful === false && reply.error.startsWith("402"), "the server does not know it any more", reply);
    mustEqual(await page.evaluate("[client.state, sent.at(-1)]"), ["unconnected", "/meta/disconnect"], "state, and the last that was sent");
  });
  await rule("what a listener throws concerns no other, and not the client", async () => {
    const window = windows["callback-polling"], { page } = window;
    await page.evaluate("client.subscribe('/*', () => { throw new Error('on purpose'); })");
    await publishNumbers(window, 1, 2);
    await hasNumbers(window, [1, 2]);
    window.faults = window.faults.filter((fault) => !fault.includes("on purpose"));
  });
}

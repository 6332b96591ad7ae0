// The three transports: each forced, and the automatic choice where the road does not let one through.

import { must, mustEqual, until } from "./checks.js";

const TRANSPORTS = ["Callback-polling", "Long-polling", "WebSocket"];

// What travelled since a window's records were as long as noted: by which ways.
function waysSince(window, { requests, frames }) {
  const since = window.requests.slice(requests), ways = new Set();
  if (since.some((request) => request.startsWith("POST") && request.includes("/cometd"))) ways.add("Long-polling");
  if (since.some((request) => /^GET .*\/cometd.*[?&]jsonp=/.test(request))) ways.add("Callback-polling");
  if (window.frames.length > frames) ways.add("WebSocket");
  return [...ways];
}

const note = (window) => ({ requests: window.requests.length, frames: window.frames.length });

// ======================================================================================
// Forced
// ======================================================================================

export async function transports(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), bert = await stage.window(server, { beside: anna });
  await anna.join("anna");
  await bert.join("bert");

  for (const transport of TRANSPORTS) {
    await rule(`${transport} is taken when chosen, and the state says so`, async () => {
      for (const window of [anna, bert]) {
        await window.switchTo(transport);
      }
    });
    await rule(`over ${transport} two windows talk, and an echo comes back`, async () => {
      const before = note(anna);
      await anna.say(`over ${transport}`);
      for (const window of [anna, bert]) await window.reads(`I heard anna say: over ${transport}`);
      await bert.say(`back over ${transport}`);
      await anna.reads(`I heard bert say: back over ${transport}`);
      await anna.tab("Echo");
      await anna.button("Call /service/echo").click();
      await anna.hasRow("/service/echo", transport.toLowerCase());
      await anna.tab("Chat");
      mustEqual(waysSince(anna, before), [transport], "what travelled");
    });
  }
  await rule("the session was kept through all of it", async () => {
    mustEqual(await anna.countRows("/meta/handshake", "long-polling") + await anna.countRows("/meta/handshake", "callback-polling"), 0,
              "handshakes over another transport than the first");
    must(!await bert.count("anna has left"), "anna never left");
  });
  await rule("the difference is told, with numbers", async () => {
    for (const transport of TRANSPORTS) {
      const row = anna.page.getByRole("row", { name: transport });
      await until(`figures of ${transport}`, async () => (await row.getByRole("cell").allInnerTexts()).filter((text) => /\d/.test(text)).length >= 3);
    }
  });
  await rule("nothing is lost or doubled when the transport changes while events come", async () => {
    const words = Array.from({ length: 12 }, (_, at) => `turn-${at}.`);
    for (const [at, word] of words.entries()) {
      if (at % 3 === 1) await bert.choose([...TRANSPORTS, "Automatic"][(at - 1) / 3 % 4]);
      await anna.say(word);
    }
    await bert.reads(`say: ${words.at(-1)}`);
    const read = (await bert.lineTexts()).filter((line) => !line.includes("I heard")).flatMap((line) => line.match(/turn-\d+\./g) ?? []);
    mustEqual(read, words, "what bert reads");
  });
  await rule("a window never has more than two requests open", async () => {
    let open = 0, most = 0;
    anna.page.on("request", () => { most = Math.max(most, ++open); });
    for (const end of ["requestfinished", "requestfailed"]) anna.page.on(end, () => { open -= 1; });
    await anna.switchTo("Long-polling");
    open = Math.max(0, open), most = open;
    for (let at = 0; at < 10; at += 1) {
      await anna.say(`burst-${at}.`);
    }
    await bert.reads("say: burst-9.");
    must(most <= 2, "two requests at most", most);
  });
  for (const transport of TRANSPORTS) {
    const name = transport.toLowerCase();
    await rule(`?transport=${name} preselects it`, async () => {
      const clara = await stage.window(server, { at: `?transport=${name}` });
      await clara.isAt("Connected");
      await clara.hasRow("/meta/handshake", name);
      await clara.hasRow("/meta/connect", name);
      mustEqual(waysSince(clara, { requests: 1, frames: 0 }), [transport], "what travelled");
      await clara.close();
    });
  }
}

// ======================================================================================
// Automatic
// ======================================================================================

export async function fallback(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const roads = {};

  await rule("WebSocket is taken where it is let through", async () => {
    const anna = await stage.window(server);
    await anna.isAt("Connected");
    await anna.hasRow("/meta/connect", "websocket");
    mustEqual(waysSince(anna, { requests: 0, frames: 0 }), ["WebSocket"], "what travelled");
    await anna.close();
  });
  for (const [transport, refuses, name] of [["Long-polling", ["refusesWebSocket"], "anna"],
                                            ["Callback-polling", ["refusesWebSocket", "refusesPost"], "bert"]]) {
    await rule(`${transport} is taken where ${refuses.length === 1 ? "WebSocket is" : "WebSocket and POST are"} refused, and the chat works`, async () => {
      const road = roads[transport] = await stage.road(server);
      for (const what of refuses) road[what] = true;
      const window = stage[name] = await stage.window(road);
      await window.isAt("Connected");
      await window.hasRow("/meta/connect", transport.toLowerCase());
      must((await window.page.getByRole("banner").innerText()).toLowerCase().includes(transport.toLowerCase()), "the header names it");
      await window.join(name);
      await window.say(`${name} is here all the same`);
      await window.reads(`I heard ${name} say`);
    });
  }
  await rule("the two understand each other", async () => {
    await stage.anna.hasMembers("autobot", "anna", "bert");
    await stage.bert.say("over another road");
    await stage.anna.reads("over another road", 2);
  });
  await rule("WebSocket, when it is demanded where it is refused, is said to fail; Automatic mends that", async () => {
    await stage.anna.choose("WebSocket");
    await stage.anna.isAt(/Connection lost|Refused|Connecting/);
    await until("the state names it", async () => /websocket/i.test(await stage.anna.status.innerText()));
    await stage.anna.choose("Automatic");
    await stage.anna.isAt("Connected");
    await stage.bert.say("back again?");
    await stage.anna.reads("back again?", 2);
  });
}

// The wire, and the console: what a developer debugs with.

import { execFile } from "node:child_process";
import { must, mustEqual, until } from "./checks.js";
import { Peer } from "./server.js";
import { describedBy } from "./window.js";

// What a shell says to a command, as it was pasted.
function runInShell(command) {
  return new Promise((resolve, reject) => {
    execFile("bash", ["-c", command], { timeout: 20_000 }, (error, stdout) => error ? reject(error) : resolve(stdout));
  });
}

// ======================================================================================
// The wire
// ======================================================================================

export async function wire(stage) {
  const { rule } = stage;
  const server = await stage.server("--timeout", "6");
  const anna = await stage.window(server, { at: "?transport=long-polling", permissions: ["clipboard-read", "clipboard-write"] });
  const peer = await Peer.open(server);
  const filter = anna.field("Filter by channel");
  const shownRows = () => anna.rows.filter({ visible: true }).allInnerTexts();
  await anna.isAt("Connected");

  await rule("the session's life is drawn, and its label follows", async () => {
    const drawing = anna.page.getByRole("img", { name: /Session/ });
    must(/\bconnected/i.test(await drawing.getAttribute("aria-label")), "it says connected", await drawing.getAttribute("aria-label"));
    for (const state of ["unconnected", "connecting", "connected"]) must((await drawing.textContent()).includes(state), `it has ${state}`);
  });
  await rule("handshake and connect can be seen both ways, with time, transport and id", async () => {
    for (const channel of ["/meta/handshake", "/meta/connect"]) {
      const rows = anna.rowsWith(channel, "long-polling");
      await until(`two rows of ${channel}`, async () => await rows.count() >= 2);
      const [sent, received] = [await rows.nth(0).innerText(), await rows.nth(1).innerText()].sort();
      must(sent !== received, "two directions", [sent, received]);
      for (const row of [sent, received]) must(/\d\d:\d\d:\d\d\.\d\d\d/.test(row), "a time to the millisecond", row);
    }
    must(/sent|out|→|to the server/i.test(await anna.rows.first().textContent()), "the first was sent, in words", await anna.rows.first().textContent());
    must((await anna.rows.allTextContents()).some((row) => /received|\bin\b|←|from the server/i.test(row)), "others were received");
  });
  await rule("the held connect can be seen to wait: its seconds count, its bar grows", async () => {
    const waiting = anna.wire.getByText(/holds connect/);
    await waiting.waitFor();
    const seconds = async () => Number(/([\d.]+) s/.exec(await waiting.innerText())[1]);
    const first = await seconds();
    await until("more of them", async () => await seconds() > first);
    await anna.rowsWith("/meta/connect", "waiting").last().waitFor();
    const bar = anna.wire.locator("progress, meter, [role=progressbar], [class*=bar], [id*=bar]").filter({ visible: true });
    must(await bar.count() >= 1, "a bar");
  });
  await rule("when it comes back empty-handed, its row tells how long it was held", async () => {
    const answered = await anna.countRows("/meta/connect");
    await until("another connect and its answer", async () => await anna.countRows("/meta/connect") >= answered + 2);
    must((await anna.rowsWith("/meta/connect").allInnerTexts()).some((row) => /[\d.,]+\s*m?s/.test(row)), "a time held");
  });
  await rule("a publish, its reply and the event have rows of their own", async () => {
    await anna.join("anna");
    await anna.say("on the wire");
    await anna.reads("I heard anna say: on the wire");
    await until("three rows at least", async () => await anna.countRows("/chat/demo") >= 3);
  });
  await rule("a click unfolds a message: its JSON, a sentence, the section of the specification", async () => {
    const row = anna.rowsWith("/meta/handshake").first(), button = row.getByRole("button", { expanded: false }).first();
    await button.click();
    await row.getByRole("button", { expanded: true }).waitFor();
    const json = (await row.locator("pre, code").allTextContents()).map((text) => {
      try {
        return JSON.parse(text);
      } catch {
        return null;
      }
    }).find(Boolean);
    must(json && [json].flat()[0].channel === "/meta/handshake", "the message as JSON", await row.textContent());
    must(/section|§|specification|\d\.\d/i.test(await row.innerText()), "a section of the specification", await row.innerText());
    must(/session|handshake|introduce/i.test(await row.innerText()), "a sentence on it");
    await row.getByRole("button", { expanded: true }).click();
    await row.getByRole("button", { expanded: false }).first().waitFor();
  });
  await rule("the keyboard unfolds it as well", async () => {
    const button = anna.rowsWith("/meta/handshake").first().getByRole("button", { expanded: false }).first();
    await button.focus();
    await anna.page.keyboard.press("Enter");
    await anna.rowsWith("/meta/handshake").first().getByRole("button", { expanded: true }).waitFor();
    await anna.page.keyboard.press("Enter");
  });
  await rule("a filter shows the channels with a part of a name, or in a pattern", async () => {
    for (const [text, fits] of [["handshake", /\/meta\/handshake/], ["/chat/*", /\/chat\//], ["/meta/**", /\/meta\//]]) {
      await filter.fill(text);
      await until(`only rows that fit ${text}`, async () => {
        const rows = await shownRows();
        return rows.length && rows.every((row) => fits.test(row)) || must(false, "only these", rows.slice(-4));
      });
    }
    await filter.fill("/no/such/channel");
    await until("no rows", async () => !(await shownRows()).length);
    await filter.fill("");
    await until("all rows", async () => (await shownRows()).length > 5);
  });
  await rule("Pause holds the list still, and says so; what came meanwhile is not lost to the demos", async () => {
    await anna.button("Pause").click();
    const before = await anna.rows.count();
    await anna.say("said while paused");
    await anna.reads("I heard anna say: said while paused");
    mustEqual(await anna.rows.count(), before, "rows");
    await anna.button(/Resume|Pause|Go on|Continue/).first().click();
    await anna.say("said behind the pause");
    await anna.hasRow("/chat/demo");
    await until("rows come again", async () => await anna.rows.count() > before);
  });
  await rule("Clear empties the list, and new rows come", async () => {
    await anna.button("Clear").click();
    must(await anna.rows.count() <= 2, "no rows, but for what waits", await anna.rows.count());
    await anna.say("behind the clearing");
    await anna.hasRow("/chat/demo");
  });
  await rule("a list that was scrolled up stays where it is read while rows come", async () => {
    await peer.publish("/chat/demo", ...Array.from({ length: 30 }, (_, at) => ({ user: "peer", chat: `filling ${at}` })));
    await anna.reads("filling 29", 2);
    const scroller = await anna.list("Messages").evaluateHandle((list) => {
      let element = list;
      while (element && !(element.scrollHeight > element.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(element).overflowY))) element = element.parentElement;
      return element;
    });
    must(await scroller.evaluate((element) => element !== null), "the list scrolls");
    const middle = await scroller.evaluate((element) => {
      element.scrollTop = (getComputedStyle(element).flexDirection === "column-reverse" ? -1 : 1) * (element.scrollHeight - element.clientHeight) / 2;
      const { left, top, width, height } = element.getBoundingClientRect();
      globalThis.readRow = document.elementFromPoint(left + width / 2, top + height / 2).closest("li");
      return globalThis.readRow.getBoundingClientRect().top;
    });
    await peer.publish("/chat/demo", ...Array.from({ length: 8 }, (_, at) => ({ user: "peer", chat: `below ${at}` })));
    await anna.reads("below 7", 2);
    const now = await anna.page.evaluate(() => globalThis.readRow.getBoundingClientRect().top);
    must(Math.abs(now - middle) <= 1, "the row that was read is where it was", [middle, now]);
  });

  for (const transport of ["Long-polling", "WebSocket"]) {
    await rule(`what "Copy as curl" copies works when pasted into a shell (sent over ${transport})`, async () => {
      await anna.switchTo(transport);
      const data = { quotes: `it's "quoted" \`date\` $HOME \\ ! %41 & < > ; | #`, lines: "one\ntwo\u2028", via: transport, umlaut: "ä😀", nothing: null };
      await anna.tab("Echo");
      await anna.panel.getByRole("textbox", { name: "Data (JSON)" }).fill(JSON.stringify(data));
      await anna.button("Call /service/echo").click();
      const row = anna.rowsWith("/service/echo", transport.toLowerCase()).first();
      await row.getByRole("button", { expanded: false }).first().click();
      await row.getByRole("button", { name: "Copy as curl" }).click();
      const command = await until("the clipboard", async () => {
        const text = await anna.page.evaluate(() => navigator.clipboard.readText());
        return text.startsWith("curl") && text.includes(transport) && text;
      });
      const replies = JSON.parse(await runInShell(command.replace(/^curl /, "curl -sS ")));
      const answer = replies.find((reply) => reply.channel === "/service/echo");
      mustEqual(answer?.data, data, "the answer's data");
      await anna.tab("Chat");
    });
  }
  await rule("where a page is not trusted with the clipboard, the command is copied all the same", async () => {
    await anna.page.evaluate(async () => {
      await navigator.clipboard.writeText("nothing");
      navigator.clipboard.writeText = () => Promise.reject(new DOMException("no", "NotAllowedError"));
    });
    const copier = anna.button("Copy as curl").last();
    await copier.click();
    await until("the clipboard", async () => (await anna.page.evaluate(() => navigator.clipboard.readText())).startsWith("curl"));
    must(await copier.evaluate((button) => button === document.activeElement), "the focus stays on the button");
  });
  await rule("what comes at once is laid out at once, not each event for itself", async () => {
    const before = await anna.layouts();
    await peer.publish("/chat/demo", ...Array.from({ length: 300 }, (_, at) => ({ user: "peer", chat: `flood ${at}` })));
    await anna.reads("flood 299");
    const layouts = await anna.layouts() - before;
    must(layouts < 150, "fewer layouts than half of the 300 events", layouts);
  });
  await rule("the list is bounded, and the page lives on, when much comes", async () => {
    for (let part = 0; part < 4; part += 1) {
      await peer.publish("/chat/demo", ...Array.from({ length: 100 }, (_, at) => ({ user: "peer", chat: `many ${100 * part + at}` })));
    }
    await peer.publish("/chat/demo", ...Array.from({ length: 120 }, (_, at) => ({ user: "peer", chat: `more ${at}` })));
    await anna.reads("more 119");
    const rows = await anna.countRows();
    must(rows > 400 && rows <= 510, "about 500 rows", rows);
    await anna.say("still here");
    await anna.reads("I heard anna say: still here");
  });
  await rule("a conversation that was scrolled up stays where it is read, also while its oldest lines go", async () => {
    await anna.log.evaluate((log) => {
      globalThis.readLine = log.children[Math.floor(log.childElementCount / 2)];
      readLine.scrollIntoView({ block: "center", behavior: "instant" });
    });
    const where = () => anna.page.evaluate(() => readLine.isConnected && readLine.getBoundingClientRect().top);
    const before = await where(), oldest = (await anna.lineTexts())[0];
    await peer.publish("/chat/demo", ...Array.from({ length: 60 }, (_, at) => ({ user: "peer", chat: `under it ${at}` })));
    await anna.reads("under it 59", 2);
    must((await anna.lineTexts())[0] !== oldest, "old lines have gone", oldest);
    const now = await where();
    must(Math.abs(now - before) <= 1, "the line that was read is where it was", [before, now]);
  });
}

// ======================================================================================
// The console
// ======================================================================================

export async function consoles(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), bert = await stage.window(server);
  const peer = await Peer.open(server);
  await anna.isAt("Connected");
  await bert.join("bert");
  await anna.openConsole();
  const [channel, pattern, data] = [anna.field("Channel"), anna.field("Pattern"), anna.console.getByRole("textbox", { name: "Data (JSON)" })];
  const isRefused = (field, reason) => until(`an error at the field, ${reason}`, async () => {
    const text = await describedBy(field);
    return await field.getAttribute("aria-invalid") === "true" && reason.test(text) || must(false, "the error", text);
  });
  const isAccepted = (field) => until("no error at the field", async () => await field.getAttribute("aria-invalid") !== "true");

  await rule("JSON of any kind is published to any channel", async () => {
    await anna.publish("/chat/demo", '{"user": "console", "chat": "typed by hand"}');
    await bert.reads("I heard console say: typed by hand");
    for (const value of [null, 0, "text", [1, { a: [] }]]) {
      await anna.publish("/any/where", JSON.stringify(value));
      await isAccepted(data);
      await isAccepted(channel);
    }
  });
  await rule("what is no JSON is refused where it was typed, with the position", async () => {
    await anna.publish("/any/where", '{"user": "anna",\n "chat" "hello"}');
    await isRefused(data, /line|position|column|character/i);
    await anna.publish("/any/where", "[1]");
    await isAccepted(data);
  });
  for (const [name, reason] of [["/chat/*", /40\d/], ["/meta/nothing", /40\d/], ["no-slash", /40\d|channel|begin/i], ["/service/nowhere", /404/], ["", /./]]) {
    await rule(`publishing to ${name || "no channel"} is refused where it was typed`, async () => {
      await anna.publish(name, "1");
      if (!name && await channel.evaluate((field) => !field.checkValidity())) return;      // the browser itself says so
      await isRefused(channel, reason);
      await anna.publish("/any/where", "1");
      await isAccepted(channel);
    });
  }
  await rule("who subscribes to a pattern receives its events, until it unsubscribes", async () => {
    for (const wanted of ["/news/*", "/sport/**"]) {
      await anna.subscribe(wanted);
      await anna.list("Subscriptions").getByText(wanted).waitFor();
    }
    await peer.publish("/news/today", "sunny");
    await peer.publish("/sport/of/today", "a draw");
    await anna.shows(/sunny/);
    await anna.shows(/a draw/);
    await anna.list("Subscriptions").getByRole("listitem").filter({ hasText: "/news/*" }).getByRole("button", { name: /Unsubscribe/ }).click();
    await until("it is gone from the list", async () => !await anna.list("Subscriptions").getByText("/news/*").count());
    await peer.publish("/news/today", "rainy");
    await peer.publish("/sport/of/today", "a defeat");
    await anna.shows(/a defeat/);
    must(!await anna.page.getByText(/rainy/).count(), "no news any more");
  });
  for (const [wanted, reason] of [["/*/demo", /40\d|pattern/i], ["chat", /40\d|pattern|begin/i], ["/meta/**", /403/], ["/a b", /40\d|pattern/i]]) {
    await rule(`subscribing to ${wanted} is refused where it was typed`, async () => {
      await anna.subscribe(wanted);
      await isRefused(pattern, reason);
      must(!await anna.list("Subscriptions").getByText(wanted, { exact: true }).count(), "it is not in the list");
    });
  }
  await rule("the console and the chat do not take each other's subscription away", async () => {
    await anna.join("anna");
    await anna.subscribe("/chat/demo");
    await isAccepted(pattern);
    const row = anna.list("Subscriptions").getByRole("listitem").filter({ hasText: "/chat/demo" });
    await row.getByRole("button", { name: /Unsubscribe/ }).click();
    await until("it is gone", async () => !await row.count());
    await bert.say("do you still hear me?");
    await anna.reads("do you still hear me?", 2);
    await anna.subscribe("/chat/**");
    await anna.list("Subscriptions").getByText("/chat/**").waitFor();
    await bert.say("and now once?");
    await anna.reads("I heard bert say: and now once?");
    mustEqual(await anna.count("and now once?"), 2, "lines with it, the bot's with them");
    await anna.button("Leave").click();
    await bert.reads("anna has left");
    await bert.say("only for the console");
    await anna.shows(/only for the console/);
  });
}

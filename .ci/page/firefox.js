// The page of bayeux_server.py in a headless Firefox: that it works there as it does in Chromium.
//
//     node firefox.js [--python PYTHON] path/to/bayeux_server.py
//
// The rules of page.js go deep, in Chromium; these go once through all that depends on the browser:
// demos, transports, cut and recovery, a server that is restarted, looks at 360 px and in the dark.
// FIREFOX names the browser, if it is elsewhere.  Exit status 1 if a rule did not hold.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import puppeteer from "puppeteer-core";
import { PATIENCE_MS, must, mustEqual, until, within } from "./checks.js";
import { Road, Server, endProcesses } from "./server.js";

const ALL_S = 300;
const TRANSPORTS = ["websocket", "long-polling", "callback-polling"];
const OF_A_LOST_NETWORK = /can.t establish a connection|was interrupted|NetworkError|Cross-Origin Request Blocked|Loading failed for|connection .* lost/i;
const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

// A window with the page; its parts are found by their ids.
class Window {
  static async open(browser, url, { width = 1280, height = 800 } = {}) {
    const window = new Window();
    window.faults = [];
    window.page = await browser.newPage();
    await window.page.setViewport({ width, height });
    window.page.on("console", (message) => message.type() === "error" && window.faults.push(message.text()));
    window.page.on("pageerror", (error) => window.faults.push(String(error)));
    await window.page.setDefaultTimeout(PATIENCE_MS);
    await window.page.goto(url);
    return window;
  }

  text(selector) {
    return this.page.$eval(selector, (element) => element.innerText);
  }

  async shows(selector, pattern) {
    await until(`${pattern} in ${selector}`, async () => {
      const text = await this.text(selector);
      return pattern.test(text) || must(false, `${pattern}`, text.slice(-300));
    });
  }

  // The element, on the tab in front: behind it nothing is drawn, and a click would wait for that.
  async find(selector) {
    await this.page.bringToFront();
    return this.page.waitForSelector(selector, { visible: true });
  }

  // A click as a mouse makes it, where the element is.
  async click(selector) {
    await (await this.find(selector)).click();
  }

  async fill(selector, text) {
    await this.find(selector);
    await this.page.$eval(selector, (field) => { field.focus(); field.select(); });
    await this.page.keyboard.type(text);
  }

  async join(name) {
    await this.shows("#state", /Connected/);
    await this.fill("#name", name);
    await this.page.keyboard.press("Enter");
    await this.page.waitForSelector("#text", { visible: true });
  }

  async say(text) {
    await this.fill("#text", text);
    await this.page.keyboard.press("Enter");
  }

  async reads(text) {
    await this.shows("#log", new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")));
  }

  async switchTo(transport) {
    await this.click(`input[name=transport][value=${transport}]`);
    await this.shows("#state", new RegExp(`Connected over ${transport}`, "i"));
  }

  // What can be scrolled to beside the window.
  overhang() {
    return this.page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  }

  async blames() {
    await this.page.evaluate(AXE);
    const { violations } = await this.page.evaluate(() => globalThis.axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21aa"] }));
    return violations.map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map(({ target }) => target.join(" ")).join(", ")}`);
  }
}

function startBrowser(preferences = {}) {
  return puppeteer.launch({ browser: "firefox", executablePath: process.env.FIREFOX ?? "/usr/bin/firefox-esr", headless: true,
                            protocol: "webDriverBiDi", extraPrefsFirefox: preferences });
}

const failures = [];
let held = 0;

async function rule(what, body) {
  const began = performance.now();
  try {
    await body();
    held += 1;
    console.log(`  ok  ${what} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failures.push(`${what}\n          ${error?.message ?? error}`);
    console.log(`  NO  ${what}`);
  }
}

async function checkDemos(browser, server) {
  const anna = await Window.open(browser, server.url), bert = await Window.open(browser, server.url);
  await rule("two windows chat, and the bot answers", async () => {
    await anna.join("anna");
    await bert.join("bert");
    await anna.reads("bert has joined");
    await anna.say("hello");
    for (const window of [anna, bert]) await window.reads("I heard anna say: hello");
    await anna.shows("#members", /bert/);
  });
  await rule("an echo comes back with its time", async () => {
    await anna.click("#tab-echo");
    await anna.click("#call button");
    await anna.shows("#echo-answer", /\S/);
    await anna.shows("#echo-history", /ms/);
  });
  await rule("the clock runs", async () => {
    await anna.click("#tab-clock");
    await anna.shows("#server-time", /\d\d:\d\d:\d\d/);
    const before = await anna.text("#server-time");
    await until("another second", async () => await anna.text("#server-time") !== before);
  });
  await rule("a magnet that is dragged moves in the other window", async () => {
    for (const window of [anna, bert]) await window.click("#tab-magnets");
    const place = (window) => window.page.$eval("#board button", (magnet) => magnet.getBoundingClientRect().x);
    await bert.find("#board button");
    const before = await place(bert), box = await (await anna.find("#board button")).boundingBox();
    const board = await (await anna.page.$("#board")).boundingBox();
    const aim = box.x < board.x + board.width / 2 ? board.x + board.width - box.width : board.x + box.width;
    await anna.page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
    await anna.page.mouse.down();
    await anna.page.mouse.move(aim, box.y + box.height / 2, { steps: 8 });
    await anna.page.mouse.up();
    await until("it moves", async () => Math.abs(await place(bert) - before) > 30);
  });
  await rule("the console publishes and hears", async () => {
    await anna.page.$eval("#publish", (form) => { form.closest("details").open = true; });
    await anna.click("#subscribe button");
    await anna.shows("#subscriptions", /\/\*\*/);
    await anna.fill("#channel", "/console/demo");
    await anna.click("#publish button");
    await anna.shows("#heard", /\/console\/demo/);
    await anna.click("#tab-chat");
  });
  return { anna, bert };
}

async function checkTransports({ anna, bert }) {
  for (const window of [anna, bert]) await window.click("#tab-chat");
  for (const transport of TRANSPORTS) {
    await rule(`over ${transport} two windows talk`, async () => {
      for (const window of [anna, bert]) await window.switchTo(transport);
      await anna.say(`over ${transport}`);
      for (const window of [anna, bert]) await window.reads(`I heard anna say: over ${transport}`);
    });
  }
}

async function checkRecovery(browser, server) {
  const road = await Road.to(server), clara = await Window.open(browser, road.url), dora = await Window.open(browser, server.url);
  await clara.join("clara");
  await dora.join("dora");
  await clara.click("#ack");
  await clara.shows("#state", /Connected/);
  await rule("what is lost while the page cuts its network comes again", async () => {
    await clara.click("#cut");
    await clara.shows("#state", /Connection lost/);
    await dora.say("while it was cut");
    await dora.reads("I heard dora say: while it was cut");
    await clara.click("#cut");
    await clara.shows("#state", /Connected/);
    await clara.reads("I heard dora say: while it was cut");
  });
  for (const transport of TRANSPORTS) {
    await rule(`a cable that is pulled under ${transport} is noticed, and nothing is lost`, async () => {
      await clara.switchTo(transport);
      road.cut();
      await clara.shows("#state", /Connection lost|Connecting/);
      await dora.say(`pulled under ${transport}`);
      await dora.reads(`I heard dora say: pulled under ${transport}`);
      road.mend();
      await clara.shows("#state", /Connected/);
      await clara.reads(`I heard dora say: pulled under ${transport}`);
    });
  }
  await rule("both windows come back to a server that was killed and started again", async () => {
    await server.kill();
    for (const window of [clara, dora]) await window.shows("#state", /Connection lost|Connecting/);
    await server.startAgain();
    for (const window of [clara, dora]) await window.shows("#state", /Connected/);
    await clara.say("all is well again");
    await dora.reads("I heard clara say: all is well again");
  });
  road.close();
  return [clara, dora];
}

async function checkLooks(browser, server, scheme) {
  for (const [shape, size] of [["wide", {}], ["360 px wide", { width: 360, height: 740 }]]) {
    await rule(`nothing sticks out, and axe-core blames nothing: ${scheme}, ${shape}`, async () => {
      const window = await Window.open(browser, server.url, size);
      await window.join(`${scheme} ${shape}`);
      await window.say("hello");
      await window.reads("say: hello");
      const [red] = await window.page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number));
      must(scheme === "dark" ? red < 100 : red > 150, `a ${scheme} background`, red);
      for (const tab of ["chat", "echo", "clock", "magnets"]) {
        await window.click(`#tab-${tab}`);
        mustEqual(await window.overhang(), 0, `pixels beside the window, ${tab}`);
        mustEqual(await window.blames(), [], `axe-core, ${tab}`);
      }
      await window.page.close();
    });
  }
}

async function checkAll() {
  const server = await Server.start();
  const windows = [];
  let browser = await startBrowser();
  console.log(await browser.version());
  try {
    const pair = await checkDemos(browser, server);
    await checkTransports(pair);
    windows.push(pair.anna, pair.bert, ...await checkRecovery(browser, server));
    await checkLooks(browser, server, "light");
    await browser.close();
    browser = await startBrowser({ "layout.css.prefers-color-scheme.content-override": 0 });
    await checkLooks(browser, server, "dark");
  } finally {
    await browser.close();
  }
  await rule("no window logged an error, but for requests that a lost network failed", () => {
    for (const window of windows) mustEqual(window.faults.filter((fault) => !OF_A_LOST_NETWORK.test(fault)), [], "errors in the console");
  });
  await rule("the server stops when told to, and logged no error", () => server.stop());
}

process.on("exit", endProcesses);
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));

const [...rest] = process.argv.slice(2), began = performance.now();
Server.python = rest[0] === "--python" ? rest.splice(0, 2)[1] : "python3";
Server.program = path.resolve(rest[0] ?? "");
if (rest.length !== 1) {
  console.error("usage: node firefox.js [--python PYTHON] bayeux_server.py");
  process.exit(2);
}
try {
  await within(ALL_S, "firefox.js", checkAll());
} catch (error) {
  failures.push(String(error.stack || error));
}
console.log(`\nfirefox.js: ${held} rules hold, ${((performance.now() - began) / 1000).toFixed(0)} s`);
if (failures.length) {
  console.error(`firefox.js FAILED: ${failures.length} rules do not hold:\n  ${failures.join("\n  ")}`);
}
process.exit(failures.length ? 1 : 0);

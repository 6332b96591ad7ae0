// The chat page in two windows of a headless Chromium.
//
//     node chat.js http://127.0.0.1:8080/
//
// In the middle it prints RESTART: whoever runs it (.ci/run, or you by hand) is then to stop the
// server and to start it again on the same port.  CHROMIUM names the browser, if it is elsewhere.

import { chromium } from "playwright-core";
import { check, run } from "./checks.js";

const url = process.argv[2];
const PATIENCE_MS = 20_000;
const RESTART_MS = 60_000;
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"];

// ======================================================================================
// A window, used as people use it: by what is written on it
// ======================================================================================

class Window {
  // Opens the page, and keeps a record of what goes wrong in it and whom it asks.
  static async open(context, user) {
    const window = new Window();
    window.user = user;
    window.faults = [];
    window.hosts = new Set();
    window.page = await context.newPage();
    window.page.setDefaultTimeout(PATIENCE_MS);
    window.page.on("console", (message) => message.type() === "error" && window.faults.push(message.text()));
    window.page.on("pageerror", (error) => window.faults.push(String(error)));
    window.page.on("request", (request) => window.hosts.add(new URL(request.url()).origin));
    await window.page.goto(url);
    return window;
  }

  get log() {
    return this.page.getByRole("log");
  }

  async join() {
    await this.page.getByLabel("Your name").fill(this.user);
    await this.page.getByRole("button", { name: "Join" }).click();
  }

  async say(text) {
    await this.page.getByLabel("Message").fill(text);
    await this.page.getByRole("button", { name: "Send" }).click();
  }

  // Waits until the connection's state reads as given.
  async isAt(state) {
    await this.page.getByRole("status").and(this.page.getByText(state, { exact: true })).waitFor();
    check(`${this.user}'s window says: ${state}`, true);
  }

  // Waits until the conversation has a line that ends as given.
  async reads(text, timeout = PATIENCE_MS) {
    const ending = new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "$");
    await this.log.locator("p").filter({ hasText: ending }).first().waitFor({ timeout });
    check(`${this.user}'s window reads: ${text}`, true);
  }

  // Takes the faults that losing the server must bring; a browser reports each failed request.
  forgetFailedRequests() {
    this.faults = this.faults.filter((fault) => !fault.startsWith("Failed to load resource: "));
  }
}

// ======================================================================================
// The conversation
// ======================================================================================

async function converse(browser) {
  const context = await browser.newContext();
  const alice = await Window.open(context, "alice"), bob = await Window.open(context, "bob");
  const windows = [alice, bob];

  await alice.isAt("Not connected");
  await alice.join();
  await alice.isAt("Connected");
  await alice.reads("alice has joined");
  await bob.join();
  await bob.isAt("Connected");
  for (const window of windows) await window.reads("bob has joined");

  await alice.say("hello");
  for (const window of windows) {
    await window.reads("alice: hello");
    await window.reads("autobot: I heard alice say: hello");
  }
  await bob.say("<img src=x onerror=alert(1)> & <b>bold</b>");
  for (const window of windows) {
    await window.reads("bob: <img src=x onerror=alert(1)> & <b>bold</b>");
    check(`${window.user}'s window takes it for text`, await window.log.locator("img").count() === 0);
  }

  await alice.page.getByText("The wire").click();
  await alice.page.getByRole("button", { name: "Call /service/echo" }).click();
  await alice.page.locator("output").filter({ hasText: '"hello":"alice"' }).waitFor();
  check("the echo comes back", true);
  const wire = await alice.page.getByRole("list", { name: "Batches" }).innerText();
  check("the wire panel shows batches both ways", wire.includes('"channel":"/meta/connect"')
    && wire.includes('"connectionType":"long-polling"') && wire.includes('"successful":true'), wire);
  check("no console errors so far", windows.every((window) => !window.faults.length), windows.map((window) => window.faults));

  await bob.page.getByRole("button", { name: "Leave" }).click();
  await bob.isAt("Not connected");
  await alice.reads("bob has left");
  await bob.join();
  await bob.isAt("Connected");

  console.log("RESTART");
  for (const window of windows) await window.reads("The connection is lost.", RESTART_MS);
  for (const window of windows) {
    await window.reads("Connected again. What was said meanwhile may be missing.", RESTART_MS);
    await window.isAt("Connected");
    window.forgetFailedRequests();
  }
  await alice.say("after the restart");
  await bob.say("I hear you");
  for (const window of windows) {
    await window.reads("alice: after the restart");
    await window.reads("autobot: I heard alice say: after the restart");
    await window.reads("bob: I hear you");
  }

  await bob.page.goto("about:blank");
  check("bob's window goes elsewhere", true);
  await alice.log.locator("p").filter({ hasText: "bob has left" }).nth(1).waitFor();
  check("alice's window reads a second time: bob has left", true);

  for (const window of windows) {
    check(`${window.user}'s window had no console errors but for the lost server`, !window.faults.length, window.faults);
    check(`${window.user}'s window asked no other host`, [...window.hosts].every(
      (host) => host === new URL(url).origin || host === "null"), [...window.hosts]);
  }
}

await run("chat.js", 240, async () => {
  if (!url) throw new Error("usage: node chat.js URL");
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS });
  try {
    await converse(browser);
  } finally {
    await browser.close();
  }
});

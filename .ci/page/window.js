// A window with the page, used as people use it: by what is written on it.

import { PATIENCE_MS, must, until } from "./checks.js";

// What losing a server or a road must bring: a browser reports each request that failed.
const OF_A_LOST_NETWORK = /^Failed to load resource: |^WebSocket connection to .* failed: |blocked by CORS policy|^Refused to execute script .* MIME type/;

export class Window {
  // Opens the page in a window with a profile of its own, or in a tab of another window: `beside`; what lies
  // behind the front tab is drawn more slowly.  Options: server, at
  // ("?url=…#echo"), beside, prepare(page) before anything is loaded, and the browser's own, as viewport and colorScheme.
  static async open(browser, server, { at = "", beside, prepare, ...options } = {}) {
    const window = new Window();
    window.server = server;
    window.context = beside?.context ?? await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
    window.page = await window.context.newPage();
    window.page.setDefaultTimeout(PATIENCE_MS);
    window.#keepRecords();
    await prepare?.(window.page);
    await window.page.goto(`${server.url}/${at}`);
    return window;
  }

  // What goes wrong in it, whom it asks, and what it sends.
  #keepRecords() {
    this.faults = [];
    this.hosts = new Set();
    this.requests = [];         // "POST …/cometd", "GET …/cometd?jsonp=…"
    this.frames = [];           // texts sent over WebSocket
    this.page.on("console", (message) => message.type() === "error" && this.faults.push(message.text()));
    this.page.on("pageerror", (error) => this.faults.push(String(error)));
    this.page.on("dialog", (dialog) => {
      this.faults.push(`a dialogue opened: ${dialog.message()}`);
      dialog.dismiss();
    });
    this.page.on("request", (request) => {
      this.hosts.add(new URL(request.url()).origin);
      this.requests.push(`${request.method()} ${request.url()}`);
    });
    this.page.on("websocket", (socket) => {
      this.hosts.add(new URL(socket.url()).origin.replace("ws", "http"));
      socket.on("framesent", ({ payload }) => this.frames.push(payload));
    });
  }

  // The faults that a lost network does not explain.
  get ownFaults() {
    return this.faults.filter((fault) => !OF_A_LOST_NETWORK.test(fault));
  }

  async close() {
    await this.page.close();
    if (!this.context.pages().length) await this.context.close();
  }

  // How often the browser has laid the page out.
  async layouts() {
    this.measures ??= await this.context.newCDPSession(this.page);
    await this.measures.send("Performance.enable");
    const { metrics } = await this.measures.send("Performance.getMetrics");
    return metrics.find(({ name }) => name === "LayoutCount").value;
  }

  // The window's process dies; nothing in it can say good-bye.
  async vanish() {
    const crashed = this.page.waitForEvent("crash");
    const session = await this.context.newCDPSession(this.page);
    session.send("Page.crash").catch(() => {});
    await crashed;
  }

  // ------------------------------------------------------------------------------------
  // The parts of the page
  // ------------------------------------------------------------------------------------

  button(name) {
    return this.page.getByRole("button", { name, exact: typeof name === "string" });
  }

  field(name) {
    return this.page.getByRole("textbox", { name, exact: true });
  }

  list(name) {
    return this.page.getByRole("list", { name });
  }

  get status() {
    return this.page.getByRole("banner").getByRole("status");
  }

  get panel() {
    return this.page.getByRole("tabpanel");
  }

  get log() {
    return this.page.getByRole("log", { name: "Conversation" });
  }

  async tab(name) {
    await this.page.getByRole("tab", { name }).click();
  }

  // Waits until the session's state reads as given: a text that it begins with, or a pattern.
  async isAt(state) {
    const pattern = typeof state === "string" ? new RegExp(`(^|\\s)${state}`) : state;
    return until(`the state "${state}"`, async () => {
      const text = await this.status.innerText();
      return pattern.test(text) ? text : must(false, `the state must read ${state}`, text);
    });
  }

  // Waits until a text can be seen anywhere on the page.
  async shows(text, place = this.page) {
    await place.getByText(text).filter({ visible: true }).first().waitFor();
  }

  // ------------------------------------------------------------------------------------
  // Chat
  // ------------------------------------------------------------------------------------

  async join(user) {
    this.user = user;
    await this.field("Your name").fill(user);
    await this.button("Join").click();
    await this.field("Message").waitFor();
  }

  async say(text) {
    await this.field("Message").fill(text);
    await this.field("Message").press("Enter");
  }

  // The lines of the conversation, and their texts.  A line is what has a time in it.
  get lines() {
    return this.log.locator("p");
  }

  async lineTexts() {
    return this.log.evaluate((log) => [...log.querySelectorAll("time")].map((time) => time.parentElement.textContent));
  }

  // How many lines have a text in them now.
  async count(text) {
    return (await this.lineTexts()).filter((line) => line.includes(text)).length;
  }

  // Waits until the conversation has as many lines with a text as given.
  async reads(text, count = 1) {
    await until(`"${text}" in ${this.user ?? "the"} conversation, ${count} times`, async () => await this.count(text) >= count);
  }

  async members() {
    return (await this.list("Members").getByRole("listitem").allInnerTexts()).map((name) => name.trim());
  }

  async hasMembers(...names) {
    await until(`the members ${names}`, async () => {
      const members = await this.members();
      const areThere = members.length === names.length && names.every((name) => members.some((member) => member.includes(name)));
      return areThere || must(false, `the members must be ${names}`, members);
    });
  }

  // ------------------------------------------------------------------------------------
  // The wire, and its controls
  // ------------------------------------------------------------------------------------

  get wire() {
    return this.page.getByRole("region", { name: "The wire" });
  }

  get rows() {
    return this.list("Messages").locator(":scope > li");
  }

  // The rows in which all of some texts stand.
  rowsWith(...texts) {
    return texts.reduce((rows, hasText) => rows.filter({ hasText }), this.rows);
  }

  // How many these are now.
  async countRows(...texts) {
    const rows = await this.list("Messages").evaluate((list) => [...list.children].map((row) => row.textContent.toLowerCase()));
    return rows.filter((row) => texts.every((text) => row.includes(text.toLowerCase()))).length;
  }

  async hasRow(...texts) {
    await until(`a row with ${texts.join(", ")} on the wire`, () => this.countRows(...texts));
  }

  // Chooses a transport by its name.
  async choose(transport) {
    await this.page.getByRole("radio", { name: transport }).check();
  }

  // The same, and waits until that is in use.
  async switchTo(transport) {
    await this.choose(transport);
    await this.isAt(new RegExp(`Connected over ${transport}`, "i"));
  }

  async cut() {
    await this.button("Cut the network").click();
  }

  async mend() {
    await this.button("Mend the network").click();
  }

  get console() {
    return this.page.getByRole("group").filter({ has: this.page.locator("summary", { hasText: "Console" }) });
  }

  async openConsole() {
    if (!await this.button("Publish").isVisible()) await this.console.locator("summary").click();
    await this.button("Publish").waitFor();
  }

  async publish(channel, json) {
    await this.field("Channel").fill(channel);
    await this.console.getByRole("textbox", { name: "Data (JSON)" }).fill(json);
    await this.button("Publish").click();
  }

  async subscribe(pattern) {
    await this.field("Pattern").fill(pattern);
    await this.button("Subscribe").click();
  }

  // ------------------------------------------------------------------------------------
  // Magnets
  // ------------------------------------------------------------------------------------

  get board() {
    return this.page.getByRole("list", { name: "Board" });
  }

  magnet(number) {
    return this.board.getByRole("button").nth(number);
  }

  // Where a magnet is as the eye sees it: as shares, from 0 to 1, of the room that the board leaves it.
  async where(number) {
    return this.magnet(number).evaluate((magnet) => {
      const board = magnet.closest("ul"), outer = board.getBoundingClientRect(), { x, y, width, height } = magnet.getBoundingClientRect();
      return { x: (x - outer.x - board.clientLeft) / (board.clientWidth - width), y: (y - outer.y - board.clientTop) / (board.clientHeight - height) };
    });
  }

  // The same, once it has come to rest.
  async placeOf(number) {
    await this.magnet(number).evaluate((magnet) => Promise.allSettled(
      [magnet, magnet.parentElement].flatMap((element) => element.getAnimations()).map((animation) => animation.finished)));
    return this.where(number);
  }

  // Waits until a magnet lies where another window has it, within a hundredth of the board.
  async hasMagnetAt(number, place) {
    return until(`magnet ${number} at ${JSON.stringify(place)}`, async () => {
      const here = await this.where(number);
      return isNear(here, place) || must(false, `it must be at ${JSON.stringify(place)}`, here);
    });
  }
}

export function isNear(one, other, tolerance = 0.01) {
  return Math.abs(one.x - other.x) < tolerance && Math.abs(one.y - other.y) < tolerance;
}

// The text that describes a field, from all elements that its aria-describedby and aria-errormessage name.
export function describedBy(field) {
  return field.evaluate((element) => `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-errormessage") ?? ""}`
    .split(" ").map((id) => (id && document.getElementById(id)?.textContent) || "").join(" ").trim());
}

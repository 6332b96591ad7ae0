// What a group of checks plays on: its servers, its windows, and a line for each rule.

import { must, withoutColours } from "./checks.js";
import { Road, Server } from "./server.js";
import { Window } from "./window.js";

const SLOW_S = 2;               // what takes longer is shown with its time

export class Stage {
  constructor(name, browser) {
    this.name = name;
    this.browser = browser;
    this.lines = [];
    this.failures = [];         // the rules that did not hold, each with the reason
    this.held = 0;              // how many did
    this.windows = [];
    this.servers = [];
    this.roads = [];
  }

  // A rule holds if its body ends without an error.  The rules after one that failed are looked at
  // all the same: one run tells all that is wrong.
  rule = async (what, body) => {
    const began = performance.now();
    try {
      await body();
      const seconds = (performance.now() - began) / 1000;
      this.held += 1;
      this.lines.push(`  ok  ${what}${seconds > SLOW_S ? ` (${seconds.toFixed(1)} s)` : ""}`);
    } catch (error) {
      const reason = withoutColours(error).split("\n").slice(0, 12).join("\n          ");
      this.failures.push(`${this.name}: ${what}\n          ${reason}`);
      this.lines.push(`  NO  ${what}\n          ${reason}`);
    }
  };

  async server(...options) {
    const server = await Server.start(...options);
    this.servers.push(server);
    return server;
  }

  async road(server) {
    const road = await Road.to(server);
    this.roads.push(road);
    return road;
  }

  async window(server, options) {
    const window = await Window.open(this.browser, server, options);
    this.windows.push(window);
    return window;
  }

  // What must hold behind every group; then nothing of it is left.
  async end() {
    await this.rule("no window logged an error, but for requests that a lost network failed", () => {
      for (const window of this.windows) must(!window.ownFaults.length, "no errors in the console", window.ownFaults);
    });
    await this.rule("no window asked another host", () => {
      for (const window of this.windows) {
        const others = [...window.hosts].filter((host) => host !== "null" && host !== window.server.url && host !== window.mayAsk);
        must(!others.length, "only the page's server is asked", others);
      }
    });
    for (const context of new Set(this.windows.map((window) => window.context))) await context.close();
    for (const road of this.roads) road.close();
    await this.rule("the servers stop when told to, and logged no error", async () => {
      for (const server of this.servers) await server.stop();
    });
  }
}

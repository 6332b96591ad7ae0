// Faye's and Dojo's clients in pages of a headless Chromium against a server of ours.
//
//     node npm_browser.js faye websocket|eventsource|long-polling|
//                              cross-origin-long-polling|callback-polling PYTHON bayeux_server.py
//     node npm_browser.js dojox json|form|json-comment-filtered|jsonp PYTHON bayeux_server.py
//
// CHROMIUM names the browser, if it is elsewhere.

import { chromium } from "playwright-core";
import { check, run } from "./checks.js";
import { converse, patient } from "./conversation.js";
import { Server, withServer } from "./server.js";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"];

// What each transport looks like on the wire, and what the client calls it.  A page of another origin
// comes from another port.
//
// Two of them do not see that the server is gone, and learn of it at their next connect only, after
// advice.timeout: with Faye's event source the browser connects again by itself, to what it takes for the
// old stream; Dojo's JSONP overlooks that a script failed to load.  Their servers are told a short --timeout.
const LOOKS = {
  faye: {
    "websocket": { wire: "websocket", isForeign: false },
    "eventsource": { wire: "eventsource", isForeign: false, timeout: 5 },
    "long-polling": { wire: "POST application/json", isForeign: false },
    "cross-origin-long-polling": { wire: "POST text/plain;charset=UTF-8", isForeign: true },
    "callback-polling": { wire: "script", isForeign: true },
  },
  dojox: {
    "json": { wire: "POST text/json;charset=UTF-8", isForeign: false, name: "long-polling" },
    "form": { wire: "POST application/x-www-form-urlencoded", isForeign: false, name: "long-polling" },
    "json-comment-filtered": { wire: "POST text/json;charset=UTF-8", isForeign: false, name: "long-polling",
                               reply: "text/json-comment-filtered; charset=utf-8" },
    "jsonp": { wire: "script", isForeign: true, name: "callback-polling", timeout: 5 },
  },
};

// ======================================================================================
// A user in a page
// ======================================================================================

class PageUser {
  constructor(page, name) {
    this.page = page;
    this.name = name;
    this.wire = new Set();      // how it was asked, other than for files
    this.replies = new Set();   // the replies' content types
    this.faults = [];
    page.on("pageerror", (error) => this.faults.push(String(error)));
    page.on("websocket", () => this.wire.add("websocket"));
    page.on("request", (request) => this.isBayeux(request) && this.wire.add(this.look(request)));
    page.on("response", (response) => this.isBayeux(response)
      && this.replies.add(response.headers()["content-type"]));
  }

  isBayeux(message) {
    return new URL(message.url()).pathname.startsWith("/cometd");
  }

  look(request) {
    if (request.method() === "POST") return `POST ${request.headers()["content-type"]}`;
    return request.resourceType();
  }

  // Loads the page and the client into it.
  async load(root, client, url, transport) {
    await this.page.goto(`${root}/page.html`);
    if (client === "faye") {
      await this.page.addScriptTag({ url: "/node_modules/faye/client/faye-browser-min.js" });
    } else {
      await this.page.addScriptTag({ url: "/node_modules/dojo/dojo.js" });
    }
    await this.page.evaluate(async ([client, url, transport]) => {
      const { DojoxUser, FayeUser } = await import("/user.js");
      window.user = client === "faye" ? new FayeUser(window.Faye, url, transport)
        : new DojoxUser(window.dojo, url, transport);
    }, [client, url, transport]);
  }
}

// Every other method is the user's in the page.
function remote(user) {
  return new Proxy(user, {
    get: (target, method) => method in target || method === "then" ? target[method]
      : (...parameters) => target.page.evaluate(([name, given]) => window.user[name](...given), [method, parameters]),
  });
}

async function open(browser, name) {
  return new PageUser(await (await browser.newContext()).newPage(), name);
}

// ======================================================================================
// The conversation
// ======================================================================================

async function hold(browser, client, transport, server, root) {
  const { wire, name = transport, reply } = LOOKS[client][transport];
  const users = [await open(browser, "alice"), await open(browser, "bob")];
  for (const user of users) await user.load(root, client, server.url, transport);
  const [alice, bob] = users.map((user) => patient(user.name, remote(user)));
  await converse({ alice, bob, transport: name, server, beforeTheEnd: async () => {
    for (const user of users) {
      check(`${user.name}'s page asked by ${wire}`, user.wire.has(wire), [...user.wire]);
      if (reply) check(`${user.name}'s page got ${reply}`, user.replies.has(reply), [...user.replies]);
      check(`${user.name}'s page had no uncaught error`, user.faults.length === 0, user.faults);
    }
    if (client === "dojox") {
      const { samples, offset, lag, acks } = await alice.extensions();
      check("dojox's timesync has learnt the server's clock", samples > 0 && Math.abs(offset) < 2000 && lag < 2000,
        { samples, offset, lag });
      check("dojox's connects are acknowledged", acks.some((ack) => ack > 1), acks);
    }
  } });
}

const [client, transport, python, module] = process.argv.slice(2);
await run(`npm ${client} in Chromium, ${transport}`, 120, async () => {
  if (!module) throw new Error("usage: node npm_browser.js faye|dojox TRANSPORT PYTHON bayeux_server.py");
  const { isForeign, timeout = 30 } = LOOKS[client][transport];
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS });
  try {
    // The site is another server of ours, used for its files alone.
    await withServer(new Server(python, module), (site) => withServer(
      new Server(python, module, "--allowed-origin", site.root, "--timeout", timeout), (server) => hold(
        browser, client, transport, server, isForeign ? site.root : server.root)));
  } finally {
    await browser.close();
  }
});

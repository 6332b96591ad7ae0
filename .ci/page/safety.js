// What others send is only ever text, and the page's policy forbids the rest.

import { createHash } from "node:crypto";
import { must, mustEqual, until } from "./checks.js";
import { Peer } from "./server.js";

const HOSTILE = [
  "<img src=x onerror=window.isHacked=1>",
  "<script>window.isHacked=1</script>",
  "</script><script>window.isHacked=1</script>",
  "*/window.isHacked=1;/*",
  "\u2028window.isHacked=1\u2029",
  "');window.isHacked=1;('",
  "<svg/onload=window.isHacked=1>",
  "javascript:window.isHacked=1",
  "&lt;b&gt;&amp;&#60;",
  "${window.isHacked=1}{{window.isHacked=1}}",
  "\u202Egnp.evil\u202C \u200F\u0000\u0007",
  "W".repeat(1500),
  "\u0e4a".repeat(200),
];

// A text as it may be printed.
function inAscii(text) {
  return JSON.stringify(text).replace(/[^ -~]/g, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

// ======================================================================================
// Hostile names and messages
// ======================================================================================

export async function hostile(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const windows = [];
  for (const transport of ["callback-polling", "websocket"]) {
    windows.push(await stage.window(server, { at: `?transport=${transport}`, viewport: { width: 360, height: 740 } }));
  }
  const [anna, bert] = windows;

  // Nothing ran, nothing was made of it but text, and nothing is wider than the window.
  const areWhole = async () => {
    for (const { page, log, context } of windows) {
      must(!await page.evaluate(() => window.isHacked), "no script of others ran");
      mustEqual(await log.locator("img, script, svg, iframe, a").count(), 0, "elements made of text, in the conversation");
      mustEqual(await page.locator("main img, main iframe").count(), 0, "elements made of text, anywhere");
      must(context, "a window");
      const [wide, width] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
      must(wide <= width, "nothing overflows the window", [wide, width]);
    }
  };

  for (const text of HOSTILE.slice(0, 5).concat("\u202Egnp.evil", "__proto__", "W".repeat(40))) {
    const name = text.slice(0, 40);
    await rule(`a name is only text: ${inAscii(name)}`, async () => {
      await anna.join(name);
      await until("in bert's list of members, as it is", async () => {
        const members = await bert.list("Members").getByRole("listitem").allTextContents();
        return members.some((member) => member.includes(name.trim())) || must(false, "the members", members);
      });
      await anna.say("my name is strange");
      await bert.reads("my name is strange");
      await areWhole();
      await anna.button("Leave").click();
      await anna.field("Your name").waitFor();
    });
  }
  await anna.join("anna");
  await bert.join("bert");
  for (const text of HOSTILE) {
    await rule(`a message is only text: ${inAscii(text.slice(0, 50))}`, async () => {
      const peer = await Peer.open(server);
      await peer.publish("/chat/demo", { user: text.slice(0, 100), chat: text });
      for (const window of windows) {
        await until("as it is, in the conversation", async () =>
          (await window.lineTexts()).some((line) => line.includes(text)));
      }
      await areWhole();
    });
  }
  await rule("a hostile message that was typed here comes to all as it was typed", async () => {
    const text = "<b>bold</b> */ \u202Eevil & 'so' \"on\" \\u0041";
    await anna.say(text);
    for (const window of windows) {
      await until("as it is", async () => (await window.lineTexts()).some((line) => line.includes(text)));
    }
    await areWhole();
  });
  await rule("text that runs the other way cannot turn its neighbours round", async () => {
    const line = bert.lines.filter({ hasText: "\u202Egnp.evil" }).last();
    const followers = await line.evaluate((element) => {
      const endsHere = (each) => /isolate|plaintext/.test(getComputedStyle(each).unicodeBidi) || !getComputedStyle(each).display.startsWith("inline")
        || getComputedStyle(each.parentElement).display.includes("flex");
      const textsOf = (node) => node.nodeType === Node.TEXT_NODE ? [node] : [...node.childNodes].flatMap(textsOf);
      return textsOf(element).filter((text) => text.data.includes("\u202E")).map((text) => {
        let box = text.parentElement;
        while (!endsHere(box)) box = box.parentElement;
        const texts = textsOf(box);
        return texts.slice(texts.indexOf(text) + 1).map(({ data }) => data).join("");
      });
    });
    must(followers.length, "there are such texts");
    mustEqual(followers.filter(Boolean), [], "what follows it in the same stretch of text");
  });
  await rule("events that no window has sent harm nothing", async () => {
    const peer = await Peer.open(server);
    const odd = [null, 0, "text", [], {}, { user: null, chat: null }, { user: {}, chat: [] }, { user: 1, chat: 2 }, { chat: { toString: 1 } },
                 { user: "x", chat: "y", join: 1, leave: 1 }, { __proto__: null, constructor: 1 }, { user: "", chat: "" }];
    await peer.publish("/chat/demo", ...odd);
    await peer.publish("/chat/members", ...odd, { members: "anna" }, { members: [{}, null, 1, "<img src=x onerror=window.isHacked=1>"] }, { members: [], count: "x" },
                       { members: {}, count: -1 });
    await bert.say("still alive");
    for (const window of windows) await window.reads("I heard bert say: still alive");
    await areWhole();
  });
  await rule("the wire and the console show hostile channels' events as text, too", async () => {
    await bert.openConsole();
    await bert.subscribe("/**");
    await bert.list("Subscriptions").getByText("/**").waitFor();
    const peer = await Peer.open(server);
    await peer.publish("/odd/(name)!~$@", { "<img src=x onerror=window.isHacked=1>": "<img src=x onerror=window.isHacked=1>" });
    await bert.shows(/<img src=x onerror/);
    const row = bert.rowsWith("/odd/(name)!~$@").last();
    await row.getByRole("button", { expanded: false }).first().click();
    await bert.shows(/<img src=x onerror/, row);
    await areWhole();
  });
}

// ======================================================================================
// The policy
// ======================================================================================

export async function policy(stage) {
  const { rule } = stage;
  const server = await stage.server(), other = await stage.server("--allowed-origin", "*", "--debug");
  const anna = await stage.window(server, { prepare: (page) => page.addInitScript(() => {
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => window.violations.push(`${event.effectiveDirective} ${event.blockedURI}`));
  }) });
  const source = await (await fetch(server.url + "/")).text();
  const policies = [...source.matchAll(/http-equiv="Content-Security-Policy"\s+content="([^"]*)"/gi)].map(([, text]) => text);
  const directive = (name) => policies[0].split(";").map((part) => part.trim().split(/\s+/)).find(([first]) => first === name)?.slice(1) ?? [];
  await anna.isAt("Connected");

  await rule("the page works under its policy without a violation", async () => {
    await anna.join("anna");
    for (const name of ["Echo", "Clock", "Magnets", "Chat"]) await anna.tab(name);
    for (const transport of ["Callback-polling", "Long-polling", "WebSocket", "Automatic"]) {
      await anna.choose(transport);
      await anna.say(`over ${transport}`);
      await anna.reads(`I heard anna say: over ${transport}`);
    }
    mustEqual(await anna.page.evaluate(() => window.violations), [], "violations");
  });
  await rule("the policy stands before all scripts, and allows nothing inline", async () => {
    must(policies.length >= 1 && source.indexOf("Content-Security-Policy") < source.search(/<(script|style)/), "a policy, first of all");
    mustEqual(directive("default-src"), ["'none'"], "default-src");
    for (const name of ["base-uri", "form-action"]) mustEqual(directive(name), ["'none'"], name);
    must(!/unsafe|\*/.test(policies[0]), "no unsafe-anything, and no wildcard", policies[0]);
  });
  for (const [element, name] of [["script", "script-src"], ["style", "style-src"]]) {
    await rule(`the hashes of ${name} are those of the page's own ${element} elements, all and no more`, async () => {
      const hashes = [...source.matchAll(new RegExp(`<${element}\\b[^>]*>([^]*?)</${element}>`, "g"))]
        .map(([, text]) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`).sort();
      must(hashes.length >= 1, `there is a ${element}`);
      mustEqual(directive(name).filter((each) => each.startsWith("'sha")).sort(), hashes, "hashes");
    });
  }
  await rule("nothing is loaded but the page itself, and nothing in it names another host", async () => {
    const loads = [...source.matchAll(/<(?:script|link|img|iframe|source|audio|video)\b[^>]*?\b(?:src|href)="([^"]+)"/g)].map(([, url]) => url);
    mustEqual(loads.filter((url) => !url.startsWith("data:")), [], "what is loaded");
    mustEqual([...source.matchAll(/\s(on[a-z]+|style)="/g)].map(([text]) => text), [], "handlers and styles in the markup");
    must(!/\.innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function/.test(source), "no HTML or script is made of strings");
  });
  await rule("an injected script and an injected handler do not run", async () => {
    await anna.page.evaluate(() => {
      const script = document.createElement("script");
      script.textContent = "window.isHacked = 1";
      document.body.append(script);
      const holder = document.createElement("div");
      holder.innerHTML = '<img src="x" onerror="window.isHacked = 2"><svg onload="window.isHacked = 3"></svg>';
      document.body.append(holder);
      holder.firstChild.dispatchEvent(new Event("error"));
    });
    await until("both are reported", async () => (await anna.page.evaluate(() => window.violations)).filter((each) => each.startsWith("script-src")).length >= 2);
    mustEqual(await anna.page.evaluate(() => window.isHacked), undefined, "what they would have set");
  });
  await rule("another host cannot be asked: not by fetch, WebSocket, image, script or beacon", async () => {
    const before = other.output;
    const outcome = await anna.page.evaluate(async (url) => {
      const told = [];
      await fetch(url + "/cometd", { method: "POST", body: "[]" }).then(() => told.push("fetch"), () => {});
      await new Promise((resolve) => {
        try {
          const socket = new WebSocket(url.replace("http", "ws") + "/cometd");
          socket.onopen = () => { told.push("WebSocket"); resolve(); };
          socket.onerror = resolve;
        } catch {
          resolve();
        }
      });
      for (const tag of ["img", "script"]) {
        await new Promise((resolve) => {
          const element = document.createElement(tag);
          element.onload = () => { told.push(tag); resolve(); };
          element.onerror = resolve;
          element.src = `${url}/cometd?jsonp=cb&message=[]`;
          document.body.append(element);
        });
      }
      return told;
    }, other.url);
    mustEqual(outcome, [], "what went through");
    mustEqual(other.output, before, "what the other server logged");
    anna.hosts.delete(other.url);               // the browser tells of what it forbade, too
  });
  await rule("what was injected is the only thing that the policy had to forbid", () => {
    anna.faults = anna.faults.filter((fault) => !/Content Security Policy|violates|Refused to|ERR_BLOCKED_BY_CSP/i.test(fault));
  });
}

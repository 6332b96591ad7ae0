// How the page looks and is reached: narrow and wide, dark and light, by keyboard, without motion,
// without jumps, and axe-core's checks.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { must, mustEqual, until } from "./checks.js";
import { Peer } from "./server.js";

const TABS = ["Chat", "Echo", "Clock", "Magnets"];
const WIDE = { width: 1280, height: 800 }, NARROW = { width: 360, height: 740 }, PROJECTOR = { width: 1920, height: 1080 };

// Makes a window full of what it can show: a conversation, an answer, samples, an unfolded row, a subscription, errors.
async function fill(window, user) {
  await window.isAt("Connected");
  await window.join(user);
  await window.say("hello");
  await window.reads(`I heard ${user} say: hello`);
  await window.tab("Echo");
  await window.button("Call /service/echo").click();
  await window.panel.getByText(/\d\s*ms/).first().waitFor();
  await window.openConsole();
  await window.subscribe("/chat/**");
  await window.list("Subscriptions").getByText("/chat/**").waitFor();
  await window.subscribe("no pattern");
  await window.publish("/chat/demo", "{");
  const row = window.rowsWith("/meta/handshake").first();
  await row.getByRole("button", { expanded: false }).first().click();
  await window.tab("Chat");
}

// ======================================================================================
// axe-core
// ======================================================================================

const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

export async function axe(stage) {
  const { rule } = stage;
  const server = await stage.server();
  for (const colorScheme of ["light", "dark"]) {
    for (const [shape, viewport] of [["wide", WIDE], ["narrow", NARROW]]) {
      const window = await stage.window(server, { colorScheme, viewport });
      await fill(window, `${colorScheme} ${shape}`);
      await window.page.evaluate(AXE);
      for (const tab of TABS) {
        await rule(`axe-core finds nothing to blame: ${tab}, ${colorScheme}, ${shape}`, async () => {
          await window.tab(tab);
          const { violations, passes } = await window.page.evaluate((values) => globalThis.axe.run({ runOnly: { type: "tag", values }, resultTypes: ["violations"] }), AXE_TAGS);
          const shown = violations.map(({ id, help, nodes }) => `${id} (${help}): ${nodes.slice(0, 4).map(({ target, failureSummary }) =>
            `${target.join(" ")} ${failureSummary.replace(/\s+/g, " ").slice(0, 160)}`).join(" | ")}`);
          must(!violations.length, "no violations", shown);
          must(passes.length > 10, "axe has looked at the page", passes.length);
        });
      }
      await window.close();
    }
  }
}

// ======================================================================================
// Narrow, and large
// ======================================================================================

const CONTROLS = "button, input, select, textarea, summary, a[href], [tabindex='0'], [role=tab]";

// Runs in the page: what of its controls cannot be reached by a finger, and what is wider than the window.
function findUnreachable(controls) {
  const width = document.documentElement.clientWidth, faults = [];
  const nameOf = (element) => `${element.tagName.toLowerCase()} "${(element.getAttribute("aria-label") || element.labels?.[0]?.textContent || element.textContent || element.id).trim().slice(0, 40)}"`;
  // What is cut off, or can be scrolled to, by something that is in the window itself.
  const isKeptIn = (element) => {
    for (let parent = element.parentElement; parent && parent !== document.body; parent = parent.parentElement) {
      if (getComputedStyle(parent).overflowX !== "visible" && parent.getBoundingClientRect().right <= width + 1) return true;
    }
    return false;
  };
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) || element.closest("svg svg")) continue;
    const box = element.getBoundingClientRect(), { position, clipPath } = getComputedStyle(element);
    const isForReadersOnly = box.width <= 1 || clipPath !== "none" && position === "absolute";
    if (!isForReadersOnly && box.width && (box.right > width + 1 || box.left < -1) && !isKeptIn(element)) faults.push(`${nameOf(element)} is wider than the window: ${box.left} to ${box.right}`);
  }
  for (const element of document.querySelectorAll(controls)) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.disabled) continue;
    element.scrollIntoView({ block: "center", inline: "nearest", behavior: "instant" });
    const area = element.matches("input[type=radio], input[type=checkbox]") ? element.closest("label") ?? element.labels[0] ?? element : element;
    const box = area.getBoundingClientRect(), middle = (Math.max(box.top, 0) + Math.min(box.bottom, innerHeight)) / 2;
    const hit = document.elementFromPoint(box.left + box.width / 2, middle);
    if (!hit || !(area.contains(hit) || hit.contains(area) && hit !== document.body && hit !== document.documentElement || element.contains(hit))) faults.push(`${nameOf(element)} is covered by ${hit && nameOf(hit)}`);
    if (box.height < 12 || box.width < 12) faults.push(`${nameOf(element)} is hard to hit: ${box.width} by ${box.height}`);
  }
  const { scrollWidth } = document.documentElement;
  if (scrollWidth > width) faults.push(`the page scrolls sideways: ${scrollWidth} in ${width}`);
  return faults;
}

export async function shapes(stage) {
  const { rule } = stage;
  const server = await stage.server();
  for (const [shape, viewport] of [["360 px wide", NARROW], ["320 px wide (400 % zoom)", { width: 320, height: 256 }], ["a projector", PROJECTOR]]) {
    const window = await stage.window(server, { viewport });
    await fill(window, "anna");
    for (const tab of TABS) {
      await rule(`${shape}: nothing overflows, all controls can be reached: ${tab}`, async () => {
        await window.tab(tab);
        const faults = await window.page.evaluate(findUnreachable, CONTROLS);
        must(!faults.length, "no faults", faults.slice(0, 12));
      });
    }
    if (viewport === PROJECTOR) {
      await rule("on a projector text is larger, and the wire stands beside the demos", async () => {
        const size = await window.page.evaluate(() => parseFloat(getComputedStyle(document.body).fontSize));
        must(size > 16, "more than 16 px", size);
        const [panel, wire] = [await window.panel.boundingBox(), await window.wire.boundingBox()];
        must(wire.x >= panel.x + panel.width - 1 || wire.x + wire.width <= panel.x + 1, "side by side", [panel, wire]);
      });
    }
    await window.close();
  }
}

// ======================================================================================
// By keyboard
// ======================================================================================

// Runs in the page: what has the focus, and whether that can be seen.
function describeFocus() {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  globalThis.focusNumbers ??= new Map();
  if (!globalThis.focusNumbers.has(element)) globalThis.focusNumbers.set(element, globalThis.focusNumbers.size);
  const rings = [element, element.parentElement, element.labels?.[0], element.closest("li, label")].filter(Boolean).map((each) => {
    const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(each);
    return outlineStyle !== "none" && parseFloat(outlineWidth) >= 1 || boxShadow !== "none";
  });
  const box = element.getBoundingClientRect();
  return { number: globalThis.focusNumbers.get(element), name: `${element.tagName.toLowerCase()} ${(element.getAttribute("aria-label") || element.textContent || element.id).trim().slice(0, 40)}`,
           hasRing: rings.some(Boolean), isInView: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth };
}

// Runs in the page: the controls that should have been reached and were not.
function findNotFocused(controls) {
  return [...document.querySelectorAll(controls)].filter((element) => element.checkVisibility({ visibilityProperty: true }) && !element.disabled && !element.closest("[inert]")
    && element.tabIndex >= 0 && !globalThis.focusNumbers.has(element)
    && !(element.type === "radio" && [...document.getElementsByName(element.name)].some((other) => globalThis.focusNumbers.has(other))))
    .map((element) => `${element.tagName.toLowerCase()} ${(element.getAttribute("aria-label") || element.textContent || element.id).trim().slice(0, 40)}`);
}

export async function keyboard(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), keys = anna.page.keyboard;
  const focused = () => anna.page.evaluate(describeFocus);
  // Presses a key until what has the focus is named so.
  const goTo = async (name) => {
    for (let time = 0; time < 150; time += 1) {
      if ((await focused())?.name.includes(name)) return;
      await keys.press("Tab");
    }
    must(false, `Tab leads to ${name}`, await focused());
  };

  await rule("a chat is held by keyboard alone", async () => {
    await anna.isAt("Connected");
    await goTo("name");
    await keys.type("anna");
    await keys.press("Enter");
    await anna.reads("anna has joined");
    must(await anna.field("Message").evaluate((field) => field === document.activeElement), "the focus is in the message's field");
    await keys.type("typed");
    await keys.press("Enter");
    await anna.reads("I heard anna say: typed");
  });
  await rule("the network is cut and mended by keyboard alone, and the focus stays", async () => {
    await anna.button("Cut the network").focus();
    await keys.press("Enter");
    await anna.isAt("Connection lost");
    await keys.press("Space");
    await anna.isAt("Connected");
    must(/network/.test((await focused()).name), "the focus is still on the button", await focused());
  });
  await rule("Leave gives the focus to the name", async () => {
    await goTo("Leave");
    await keys.press("Enter");
    await until("the focus is on the name", () => anna.field("Your name").evaluate((field) => field === document.activeElement));
    await keys.press("Enter");
    await anna.reads("anna has joined", 2);
  });
  await anna.openConsole();
  await anna.button("Pause").click();           // new rows would be new stops for ever
  for (const tab of TABS) {
    await rule(`${tab}: Tab reaches all that can be used, each with a visible focus, and comes out again`, async () => {
      await anna.tab(tab);
      await anna.page.evaluate(() => {
        globalThis.focusNumbers = new Map();
        document.activeElement.blur();
        getSelection().removeAllRanges();
      });
      await anna.page.locator("h1").click();
      const stops = [];
      for (let time = 0; time < 250; time += 1) {
        await keys.press("Tab");
        const stop = await focused();
        if (!stop || stops[0]?.number === stop.number) break;
        stops.push(stop);
      }
      must(stops.length < 250, "Tab comes round", stops.length);
      // That a list was scrolled is told to the page with the next frame, and then the way back to its end is gone.
      await anna.page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
      mustEqual(stops.filter(({ hasRing }) => !hasRing).map(({ name }) => name), [], "what has a focus that cannot be seen");
      mustEqual(stops.filter(({ isInView }) => !isInView).map(({ name }) => name), [], "what has the focus and is out of view");
      mustEqual(await anna.page.evaluate(findNotFocused, CONTROLS), [], "what Tab does not reach");
    });
  }
}

// ======================================================================================
// Without motion, without jumps
// ======================================================================================

export async function calm(stage) {
  const { rule } = stage;
  const server = await stage.server("--timeout", "3");
  const still = await stage.window(server, { reducedMotion: "reduce" }), anna = await stage.window(server);
  const peer = await Peer.open(server);

  // Runs in the page: what moves now, or would if it changed.
  const findMotion = () => [
    ...document.getAnimations().map((animation) => `${animation.constructor.name} of ${animation.effect?.target?.className || animation.effect?.target?.tagName}`),
    ...[...document.querySelectorAll("*")].filter((element) => ["", "::before", "::after"].some((part) => {
      const { transitionDuration, animationName, animationDuration, scrollBehavior } = getComputedStyle(element, part || null);
      const isLong = (durations) => durations.split(",").some((duration) => parseFloat(duration) > 0.01);
      return isLong(transitionDuration) || animationName !== "none" && isLong(animationDuration) || scrollBehavior === "smooth";
    })).map((element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class")} has a transition or an animation`),
  ];
  await rule("with reduced motion nothing is animated: connecting, talking, magnets, the cut", async () => {
    const faults = new Set();
    const look = async () => (await still.page.evaluate(findMotion)).forEach((fault) => faults.add(fault));
    await look();
    await still.join("still");
    await look();
    for (const tab of TABS) {
      await still.tab(tab);
      await look();
    }
    await peer.publish("/magnets/demo", { magnet: 3, x: 0.9, y: 0.9, by: "peer" });
    await until("the magnet has moved", async () => (await still.where(3)).x > 0.75);
    await look();
    await still.cut();
    await still.isAt("Connection lost");
    await look();
    await still.mend();
    await still.isAt("Connected");
    await look();
    mustEqual([...faults], [], "what moves");
  });

  // Runs in the page: notes at each frame where the controls and the titles are; a control that comes or goes is no jump.
  const watchPlaces = () => {
    const jumps = globalThis.jumps = [], places = new Map();
    const look = () => {
      for (const element of document.querySelectorAll("h1, h2, h3, button, input, select, textarea, summary, [role=tab], [role=tablist], [role=log], [role=img], ol, section")) {
        if (element.closest("li, [role=log] *") || !element.checkVisibility()) { places.delete(element); continue; }
        const { x, y, width } = element.getBoundingClientRect(), before = places.get(element);
        const now = [x + scrollX, y + scrollY, width].map(Math.round);
        if (before && before.some((value, at) => Math.abs(value - now[at]) > 1)) {
          jumps.push(`${element.tagName.toLowerCase()} ${(element.getAttribute("aria-label") || element.textContent).trim().slice(0, 30)}: ${before} to ${now}`);
        }
        places.set(element, now);
      }
      if (globalThis.jumps === jumps) requestAnimationFrame(look);
    };
    look();
  };
  const jumps = () => anna.page.evaluate(() => {
    const seen = [...new Set(globalThis.jumps)];
    globalThis.jumps.length = 0;
    return seen.slice(0, 12);
  });
  await anna.join("anna");
  for (const tab of TABS) {
    await rule(`nothing that is clicked moves while events come and the network is cut: ${tab}`, async () => {
      await anna.tab(tab);
      await anna.page.evaluate(watchPlaces);
      await peer.publish("/chat/demo", ...Array.from({ length: 30 }, (_, at) => ({ user: "peer", chat: `${tab} ${at} ${"long words ".repeat(at)}` })));
      await peer.publish("/magnets/demo", { magnet: 2, x: 0.2, y: 0.2 });
      await anna.hasRow("/magnets/demo");
      await until("the conversation has it", async () => (await anna.page.getByText(`${tab} 29`).count()) >= 1);
      const connects = await anna.countRows("/meta/connect");
      await until("another connect", async () => await anna.countRows("/meta/connect") > connects || await anna.countRows() >= 500);
      mustEqual(await jumps(), [], "jumps while events came");
      await anna.cut();
      await anna.isAt("Connection lost");
      await anna.button("Let the bot speak").click();
      await anna.shows(/events? (was|were) lost/);
      await anna.mend();
      await anna.isAt("Connected");
      mustEqual(await jumps(), [], "jumps while the network was cut");
      await anna.page.evaluate(() => { globalThis.jumps = null; });
    });
  }
  await rule("nothing that is clicked moves while the server is away, and comes back", async () => {
    await anna.page.evaluate(watchPlaces);
    await server.kill();
    await anna.isAt("Connection lost");
    await server.startAgain();
    await anna.isAt("Connected");
    mustEqual(await jumps(), [], "jumps");
  });
  const comesUp = async (viewport = WIDE) => {
    const road = await stage.road(server);
    road.isSlow = true;
    const fresh = await stage.window(road, { viewport, prepare: (page) => page.addInitScript(() => {
      window.shifts = [];
      new PerformanceObserver((list) => {
        for (const { value, hadRecentInput, sources } of list.getEntries()) {
          if (hadRecentInput) continue;
          for (const { node, previousRect: before, currentRect: now } of sources) {
            const element = node?.nodeType === Node.ELEMENT_NODE ? node : node?.parentElement;
            if (!element || element.closest("li, [role=log], [role=status]") || Math.max(Math.abs(before.x - now.x), Math.abs(before.y - now.y)) < 2) continue;
            window.shifts.push(`${value.toFixed(4)}: ${element.tagName} ${element.id} ${element.textContent.trim().slice(0, 30)}, from ${before.x},${before.y} to ${now.x},${now.y}`);
          }
        }
      }).observe({ type: "layout-shift", buffered: true });
    }) });
    await fresh.isAt("Connected");
    await fresh.hasRow("/meta/connect");
    await fresh.page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
    mustEqual(await fresh.page.evaluate(() => window.shifts), [], "layout shifts");
  };
  await rule("nothing jumps while the page comes up, however slowly", () => comesUp());
  await rule("nothing does in a narrow window", () => comesUp(NARROW));
}

// ======================================================================================
// Without a script
// ======================================================================================

export async function plain(stage) {
  const { rule } = stage;
  const server = await stage.server();
  await rule("who allows no scripts is told that the page needs them", async () => {
    const window = await stage.window(server, { javaScriptEnabled: false });
    await window.shows(/script/i);
  });
  await rule("language, title and icon are there", async () => {
    const window = await stage.window(server);
    mustEqual(await window.page.title(), "Bayeux, live", "the title");
    mustEqual(await window.page.locator("html").getAttribute("lang"), "en", "the language");
    must((await window.page.locator("link[rel=icon]").getAttribute("href")).startsWith("data:"), "an icon of its own");
    mustEqual(await window.page.getByRole("heading", { level: 1 }).innerText(), "Bayeux, live", "the heading");
  });
  await rule("the client is a script of its own, below 250 lines", async () => {
    const source = await (await fetch(server.url + "/")).text();
    const [, client] = /<script id="client">([^]*?)<\/script>/.exec(source);
    must(client.trim().split("\n").length < 250, "lines", client.trim().split("\n").length);
    must(!/\bdocument\.(getElementById|querySelector)\(/.test(client), "it does not know the page");
  });
}

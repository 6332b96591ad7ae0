// The four demos, each with two windows.

import { median, must, mustEqual, until } from "./checks.js";
import { Peer } from "./server.js";
import { describedBy, isNear } from "./window.js";

// ======================================================================================
// Chat
// ======================================================================================

export async function chat(stage) {
  const { rule } = stage;
  const server = await stage.server("--connect-timeout", "4");
  const anna = await stage.window(server), bert = await stage.window(server);

  await rule("a window connects by itself", async () => {
    for (const window of [anna, bert]) await window.isAt("Connected");
  });
  await rule("a blank name is refused", async () => {
    await anna.field("Your name").fill("   ");
    await anna.button("Join").click();
    await until("the name is marked as invalid", () => anna.field("Your name").evaluate(
      (field) => field.matches(":invalid") || field.getAttribute("aria-invalid") === "true"));
  });
  await rule("who joins is announced in both windows, and is a member in both", async () => {
    await anna.join("anna");
    await anna.reads("anna has joined");
    await bert.join("bert");
    for (const window of [anna, bert]) {
      await window.reads("bert has joined");
      await window.hasMembers("autobot", "anna", "bert");
    }
  });
  await rule("what is said is read in both windows, and the bot answers", async () => {
    await anna.field("Message").fill("hello");
    await anna.button("Send").click();
    for (const window of [anna, bert]) {
      await window.reads("hello", 2);
      await window.reads("I heard anna say: hello");
    }
  });
  await rule("own lines are marked, for the eye and for screen readers, and only those", async () => {
    const own = anna.lines.filter({ hasText: "hello" }).first(), others = bert.lines.filter({ hasText: "hello" }).first();
    must(await own.evaluate((line) => Boolean(line.closest(".own") || line.querySelector(".own"))), "anna's line is marked in anna's window");
    must(/\byou\b/i.test(await own.textContent()), 'it says "you"', await own.textContent());
    must(!await others.evaluate((line) => Boolean(line.closest(".own") || line.querySelector(".own"))), "it is not marked in bert's");
  });
  await rule("every line has its time", async () => {
    for (const time of await anna.log.locator("time").all()) {
      const [text, machine] = [await time.innerText(), await time.getAttribute("datetime")];
      must(/\d\d?:\d\d/.test(text) && (machine === null || !Number.isNaN(Date.parse(machine)) || /^\d\d:\d\d/.test(machine)),
           "a time of day", [text, machine]);
    }
    must(await anna.lines.count() >= 4, "four lines have times", await anna.lines.count());
  });
  await rule("Enter sends, empties the field and stays in it", async () => {
    await bert.say("sent by Enter");
    await anna.reads("sent by Enter");
    mustEqual(await bert.field("Message").inputValue(), "", "the field");
    must(await bert.field("Message").evaluate((field) => field === document.activeElement), "the field keeps the focus");
  });
  await rule("an empty message is refused, and a blank one", async () => {
    const before = await bert.count("anna");
    for (const nothing of ["", "   "]) {
      await anna.say(nothing);
      await anna.button("Send").click();
    }
    await anna.say("no more than this");
    await bert.reads("I heard anna say: no more than this");
    mustEqual(await bert.count("anna"), before + 2, "lines with anna's name");
    must(!await bert.log.getByText(/I heard anna say:\s*$/).count(), "the bot heard nothing empty");
  });
  await rule("twenty messages in a row are read once each, in order", async () => {
    const words = Array.from({ length: 20 }, (_, at) => `word-${at}.`);
    for (const word of words) {
      await anna.say(word);
    }
    for (const window of [anna, bert]) {
      await window.reads(`say: ${words.at(-1)}`);
      const read = (await window.lineTexts()).filter((line) => !line.includes("I heard"))
        .flatMap((line) => line.match(/word-\d+\./g) ?? []);
      mustEqual(read, words, `what ${window.user} reads`);
    }
  });
  await rule("who leaves is announced, and is no member any more", async () => {
    await bert.button("Leave").click();
    await anna.reads("bert has left");
    await anna.hasMembers("autobot", "anna");
    await bert.field("Your name").waitFor();
  });
  await rule("who has left joins again", async () => {
    await bert.join("bert");
    await anna.reads("bert has joined", 2);
    await anna.hasMembers("autobot", "anna", "bert");
  });
  await rule("a window that is closed has left", async () => {
    await bert.page.close({ runBeforeUnload: true });
    await anna.reads("bert has left", 2);
    await anna.hasMembers("autobot", "anna");
  });
  await rule("a window that vanishes has left when its session is over", async () => {
    const clara = await stage.window(server, { beside: anna });
    await clara.join("clara");
    await anna.hasMembers("autobot", "anna", "clara");
    await clara.vanish();
    await anna.reads("clara has left");
    await anna.hasMembers("autobot", "anna");
  });
  await rule("the name is remembered when the page is loaded again", async () => {
    await anna.page.reload();
    await anna.isAt("Connected");
    must(await anna.field("Message").isVisible() || await anna.field("Your name").inputValue() === "anna",
         "anna is still in the chat, or her name in the field");
  });
  await rule("where nothing can be stored, the chat works all the same", async () => {
    const diana = await stage.window(server, { prepare: (page) => page.addInitScript(() => {
      for (const name of ["localStorage", "sessionStorage"]) {
        Object.defineProperty(window, name, { get() { throw new DOMException("The operation is insecure.", "SecurityError"); } });
      }
    }) });
    await diana.join("diana");
    await diana.say("hello without a store");
    await diana.reads("I heard diana say: hello without a store");
  });
  await rule("who asks to join before there is a connection is told so, and joins when there is one", async () => {
    let open;
    const gate = new Promise((resolve) => { open = resolve; });
    const eve = await stage.window(server, { at: "?transport=long-polling", prepare: (page) => page.route("**/cometd", async (route) => {
      await gate;
      await route.continue();
    }) });
    await eve.field("Your name").fill("eve");
    await eve.button("Join").click();
    await eve.page.getByText(/There is no connection yet/).waitFor();
    open();
    await eve.field("Message").waitFor();
    await eve.reads("eve has joined");
    await anna.reads("eve has joined");
    mustEqual(await eve.page.getByText(/There is no connection yet/).count(), 0, "words on a missing connection");
    must(await eve.field("Message").evaluate((field) => field === document.activeElement), "the focus is in the message");
  });
}

// ======================================================================================
// Echo
// ======================================================================================

export async function echo(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server, { at: "#echo" }), bert = await stage.window(server, { at: "#echo" });
  const data = (window) => window.panel.getByRole("textbox", { name: "Data (JSON)" });
  const call = async (window, json) => {
    await data(window).fill(json);
    await window.button("Call /service/echo").click();
  };

  await rule("the sample can be sent as it is", async () => {
    await anna.isAt("Connected");
    JSON.parse(await data(anna).inputValue());
    await anna.button("Call /service/echo").click();
    await anna.panel.getByText(/\d\s*ms/).first().waitFor();
  });
  await rule("each window gets its own answer", async () => {
    await bert.isAt("Connected");
    await call(anna, '{"from": "anna"}');
    await call(bert, '{"from": "bert"}');
    await anna.panel.locator("output, pre").filter({ hasText: /"from":\s*"anna"/ }).first().waitFor();
    await bert.panel.locator("output, pre").filter({ hasText: /"from":\s*"bert"/ }).first().waitFor();
    must(!await anna.panel.getByText(/"from":\s*"bert"/).count(), "anna does not see bert's");
  });
  await rule("every JSON value comes back as it was sent", async () => {
    for (const value of [null, false, 0, "", "text", [1, [2, {}]], { "": "\u2028</script>*/", deep: { é: 1e-7 } }]) {
      await call(anna, JSON.stringify(value));
      await until(`the answer ${JSON.stringify(value)}`, async () => {
        const texts = await anna.panel.locator("output, pre, code").allTextContents();
        return texts.some((text) => {
          try {
            return JSON.stringify(JSON.parse(text.replace(/\n\nafter [^]*/, ""))) === JSON.stringify(value);
          } catch {
            return false;
          }
        });
      });
    }
  });
  await rule("what is no JSON is refused at the field, and sent nowhere", async () => {
    const before = await anna.countRows("/service/echo", "sent");
    await call(anna, '{"from": anna}');
    await until("the field is marked as invalid", async () => await data(anna).getAttribute("aria-invalid") === "true");
    must(await describedBy(data(anna)), "the error is told beside it");
    mustEqual(await anna.countRows("/service/echo", "sent"), before, "calls on the wire");
    await call(anna, "[1]");
    await until("the mark goes", async () => await data(anna).getAttribute("aria-invalid") !== "true");
  });
  await rule("round trips are listed with their median", async () => {
    for (let time = 0; time < 3; time += 1) await call(anna, String(time));
    await anna.panel.getByText(/median/i).first().waitFor();
    await until("the median of those listed", async () => {
      const text = await anna.panel.innerText();
      const shown = Number(/median[^:]*:\s*([\d.]+)/i.exec(text)?.[1]);
      const listed = (await anna.panel.locator("li").allInnerTexts()).map((line) => Number(/([\d.]+)\s*ms/.exec(line)?.[1])).filter((ms) => ms >= 0);
      return listed.length >= 3 && Math.abs(median(listed) - shown) <= 0.1001 || must(false, "the median", { shown, listed });
    });
  });
}

// ======================================================================================
// Clock
// ======================================================================================

const HOUR_MS = 3_600_000;

// Sets the clock of a page wrong: all that tells the time there is an hour ahead.
function setAnHourAhead(hour) {
  const Right = Date, now = Date.now;
  window.Date = class extends Right {
    constructor(...parts) {
      if (parts.length) super(...parts);
      else super(now() + hour);
    }
    static now() {
      return now() + hour;
    }
  };
  const origin = performance.timeOrigin;
  Object.defineProperty(performance, "timeOrigin", { value: origin + hour });
}

export async function clock(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server, { at: "#clock" });
  const bert = await stage.window(server, { at: "#clock", prepare: (page) => page.addInitScript(setAnHourAhead, HOUR_MS) });

  // A number that the panel shows beside a word, in ms.
  const shown = async (window, word) => {
    const text = (await window.panel.innerText()).replaceAll("\u2212", "-").replace(/(?<=\d)[,\u2009\u202f](?=\d)/g, "");
    const found = new RegExp(`${word}[^\\d-]*(-?[\\d.]+)[^\\S\\n]*(ms|s|min|h)?`, "i").exec(text);
    must(found, `the panel shows ${word}`, text);
    return Number(found[1]) * { s: 1000, min: 60_000, h: HOUR_MS, ms: 1 }[found[2] ?? "ms"];
  };
  const samples = (window) => shown(window, "samples");

  await rule("samples come while the clock is shown", async () => {
    await anna.isAt("Connected");
    await until("three samples", async () => await samples(anna) >= 3);
  });
  await rule("offset and lag settle: a window beside the server is right, but for the way there", async () => {
    const [offset, lag] = [await shown(anna, "offset"), await shown(anna, "lag")];
    must(Math.abs(offset) <= Math.max(lag, 50), "the offset is within the lag", { offset, lag });
    must(await shown(anna, "accuracy") >= 0, "an accuracy is shown");
  });
  await rule("a window whose clock is an hour ahead finds that out", async () => {
    await bert.isAt("Connected");
    await until("two samples", async () => await samples(bert) >= 2);
    const offset = await shown(bert, "offset");
    must(Math.abs(Math.abs(offset) - HOUR_MS) < 2000, "an offset of an hour", offset);
  });
  await rule("both windows show the server's time, and it ticks", async () => {
    const time = async (window) => {
      const [, h, m, s] = /(\d\d?):(\d\d):(\d\d)/.exec(await window.panel.innerText());
      return 3600 * h + 60 * m + +s;
    };
    const first = await time(anna);
    await until("another second", async () => await time(anna) !== first);
    await until("the same second in both", async () => Math.abs(await time(anna) - await time(bert)) <= 1);
  });
  await rule("the plot says what it shows", async () => {
    const plot = anna.panel.getByRole("img").first();
    must((await plot.getAttribute("aria-label") ?? await plot.locator("title").textContent()).length > 10, "a label");
    must(await plot.locator("circle, rect, path, polyline, line").count() >= 2, "something is drawn");
  });
  await rule('"Measure again" begins anew', async () => {
    await until("five samples", async () => await samples(anna) >= 5);
    await anna.button("Measure again").click();
    await until("fewer samples", async () => await samples(anna) < 5);
    await until("they come again", async () => await samples(anna) >= 2);
  });
  await rule("no samples are asked for while another demo is shown", async () => {
    await anna.tab("Echo");
    const pings = () => anna.countRows("/meta/ping");
    const before = await pings(), others = await bert.countRows("/meta/ping");
    await until("bert's window asks three times more", async () => await bert.countRows("/meta/ping") >= others + 3);
    must(await pings() <= before + 2, "anna's does not", [before, await pings()]);
  });
}

// ======================================================================================
// Magnets
// ======================================================================================

// Runs in the page: notes at each frame where a magnet is, until stopWatching() gives the list.
function watchMagnet(magnet) {
  const places = globalThis.places = [];
  const look = () => {
    const { x } = magnet.getBoundingClientRect();
    if (places.at(-1) !== x) places.push(x);
    if (globalThis.places === places) requestAnimationFrame(look);
  };
  look();
}

function stopWatching() {
  const { places } = globalThis;
  delete globalThis.places;
  return places;
}

export async function magnets(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server, { at: "#magnets" });
  const bert = await stage.window(server, { at: "#magnets" });
  const mouse = anna.page.mouse;

  // The middle of a magnet, and a point of the board, in the window's pixels.
  const grip = async (window, number) => {
    const box = await window.magnet(number).boundingBox();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const point = async (window, x, y) => {
    const box = await window.board.boundingBox();
    return [box.x + x * box.width, box.y + y * box.height];
  };

  await rule("both windows see a board of words, and the same one", async () => {
    for (const window of [anna, bert]) {
      await window.isAt("Connected");
      await window.board.waitFor();
    }
    const words = await anna.board.getByRole("button").allInnerTexts();
    must(words.length >= 20 && words.every((word) => word.trim()), "twenty words at least", words);
    mustEqual(await bert.board.getByRole("button").allInnerTexts(), words, "bert's words");
  });
  await rule("a magnet that is dragged moves in the other window while it is dragged", async () => {
    await anna.board.scrollIntoViewIfNeeded();
    await bert.board.scrollIntoViewIfNeeded();
    await mouse.move(...await grip(anna, 3));
    await mouse.down();
    await mouse.move(...await point(anna, 0.3, 0.5), { steps: 6 });
    await bert.hasMagnetAt(3, await anna.where(3));
    await mouse.move(...await point(anna, 0.7, 0.6), { steps: 6 });
    await bert.hasMagnetAt(3, await anna.where(3));
  });
  await rule("who drags is visible in the other window while the magnet moves", async () => {
    const outlook = (window, number) => window.magnet(number).evaluate((magnet) => {
      return [magnet, magnet.parentElement].flatMap((element) => {
        const { outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor, backgroundColor } = getComputedStyle(element);
        return [outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor, backgroundColor];
      }).join();
    });
    const atRest = await outlook(bert, 4);
    let side = 0.6;
    await until("another look than that of a magnet at rest", async () => {
      await mouse.move(...await point(anna, side = 1.2 - side, 0.6), { steps: 4 });
      return await outlook(bert, 3) !== atRest;
    });
    await mouse.up();
    await until("it is at rest again", async () => await outlook(bert, 3) === atRest);
  });
  await rule("it lies at last where it was dropped, in both windows", async () => {
    const place = await anna.placeOf(3);
    await bert.hasMagnetAt(3, place);
    must(isNear(place, { x: 0.6, y: 0.6 }, 0.06), "where the mouse let it go", place);
  });
  await rule("others see it glide, not jump", async () => {
    await bert.magnet(3).evaluate(watchMagnet);
    await mouse.move(...await grip(anna, 3));
    await mouse.down();
    await mouse.move(...await point(anna, 0.2, 0.3), { steps: 3 });
    await mouse.up();
    await bert.hasMagnetAt(3, await anna.placeOf(3));
    const places = await bert.page.evaluate(stopWatching);
    must(places.length >= 5, "places between the beginning and the end", places);
  });
  await rule("moves are throttled: thirty steps of the mouse are fewer messages", async () => {
    const sent = () => anna.countRows("/magnets/demo", "sent"), before = await sent();
    await mouse.move(...await grip(anna, 5));
    await mouse.down();
    const began = performance.now();
    await mouse.move(...await point(anna, 0.5, 0.8), { steps: 30 });
    await mouse.up();
    await bert.hasMagnetAt(5, await anna.placeOf(5));
    const count = await sent() - before, most = 3 + (performance.now() - began) / 50;
    must(count > 0 && count < most, `messages, at most ${most} for a time so long`, count);
  });
  await rule("a magnet stays on the board, wherever it is dragged", async () => {
    await mouse.move(...await grip(anna, 6));
    await mouse.down();
    await mouse.move(1, 1, { steps: 5 });
    await mouse.up();
    const place = await anna.placeOf(6);
    must(place.x >= 0 && place.x <= 1 && place.y >= 0 && place.y <= 1, "within the board", place);
    await bert.hasMagnetAt(6, place);
  });
  await rule("arrow keys move a magnet, and with Shift further", async () => {
    await bert.hasMagnetAt(3, await anna.placeOf(3));
    await bert.magnet(3).focus();
    const start = await bert.placeOf(3);
    await bert.page.keyboard.press("ArrowRight");
    const step = await bert.placeOf(3);
    must(step.x > start.x && Math.abs(step.y - start.y) < 0.001, "a step to the right", [start, step]);
    await anna.hasMagnetAt(3, step);
    await bert.page.keyboard.press("Shift+ArrowRight");
    const further = await bert.placeOf(3);
    must(further.x - step.x > 1.5 * (step.x - start.x), "a larger step", [start, step, further]);
    await anna.hasMagnetAt(3, further);
    must(await bert.magnet(3).evaluate((magnet) => magnet === document.activeElement), "it keeps the focus");
  });
  await rule("its place is told to who cannot see it", async () => {
    const told = async () => (await bert.page.locator('[aria-live="polite"], [role="status"], output').allTextContents()).join(" ")
      + await bert.magnet(3).evaluate((magnet) => magnet.getAttribute("aria-label") ?? "");
    const before = await told();
    await bert.page.keyboard.press("ArrowLeft");
    await until("another place is told", async () => await told() !== before && /\d/.test(await told()));
  });
  await rule("a newcomer sees the board as it is now", async () => {
    await bert.page.keyboard.press("Shift+ArrowDown");
    await anna.hasMagnetAt(3, await bert.placeOf(3));
    const clara = await stage.window(server, { at: "#magnets" });
    for (const number of [3, 5, 6]) await clara.hasMagnetAt(number, await anna.placeOf(number));
    await clara.close();
  });
  await rule("fingers drag, and the page does not scroll with them", async () => {
    const diana = await stage.window(server, { at: "#magnets", viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true });
    await diana.isAt("Connected");
    await diana.board.scrollIntoViewIfNeeded();
    await diana.hasMagnetAt(3, await anna.placeOf(3));
    const [x, y] = await grip(diana, 3), [toX, toY] = await point(diana, 0.5, 0.35), scrolled = await diana.page.evaluate(() => scrollY);
    const touch = await diana.context.newCDPSession(diana.page);
    const put = (type, ...touchPoints) => touch.send("Input.dispatchTouchEvent", { type, touchPoints });
    await put("touchStart", { x, y });
    for (let step = 1; step <= 8; step += 1) await put("touchMove", { x: x + (toX - x) * step / 8, y: y + (toY - y) * step / 8 });
    await until("it moves while the finger is down", async () => isNear(await anna.where(3), await diana.where(3)) && isNear(await diana.where(3), { x: 0.5, y: 0.35 }, 0.1));
    await put("touchEnd");
    await anna.hasMagnetAt(3, await diana.placeOf(3));
    mustEqual(await diana.page.evaluate(() => scrollY), scrolled, "how far the page is scrolled");
    await diana.close();
  });
  await rule("a board that no window has made harms nothing", async () => {
    const peer = await Peer.open(server);
    await peer.publish("/magnets/demo", null, "magnet", 7, [], {}, { magnet: "3", x: 0, y: 0 }, { magnet: 3 }, { magnet: 3, x: null, y: "1" },
                       { magnet: -1, x: 0, y: 0 }, { magnet: 1e9, x: 0, y: 0 }, { magnet: 3, x: 7, y: -7 }, { magnet: 3.5, x: 0.5, y: 0.5 },
                       { magnet: 150, x: 0.5, y: 0.5 }, { magnet: "__proto__", x: 0.5, y: 0.5 });
    await peer.publish("/magnets/demo", { magnet: 7, x: 0.5, y: 0.5 });
    await until("the last one, which is right, is seen", async () => isNear(await anna.where(7), { x: 0.5, y: 0.5 }, 0.1));
    const place = await anna.where(3);
    must(place.x >= 0 && place.x <= 1 && place.y >= 0 && place.y <= 1, "magnet 3 is on the board", place);
  });
  await rule('"Shuffle" moves the words in both windows', async () => {
    const places = async (window) => Promise.all([0, 1, 2, 3, 4, 5, 6, 7].map((number) => window.where(number)));
    const before = await places(anna);
    await anna.button("Shuffle").click();
    await until("most of them have moved", async () => (await places(anna)).filter((place, at) => !isNear(place, before[at])).length >= 5);
    await until("they are at the same places in bert's window", async () => {
      const [here, there] = [await places(anna), await places(bert)];
      return here.every((place, at) => isNear(place, there[at]));
    });
  });
}

// ======================================================================================
// Tabs
// ======================================================================================

export async function tabs(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), bert = await stage.window(server, { at: "#magnets" });
  const selected = (window) => window.page.getByRole("tab", { selected: true }).innerText();

  await rule("the address names the tab, so that it can be linked to", async () => {
    mustEqual(await selected(bert), "Magnets", "the tab of #magnets");
    await anna.tab("Clock");
    must(anna.page.url().endsWith("#clock"), "the address ends with #clock", anna.page.url());
    await anna.page.evaluate(() => { location.hash = "#echo"; });
    await until("an address typed by hand changes the tab", async () => await selected(anna) === "Echo");
    await anna.page.evaluate(() => { location.hash = "#nowhere"; });
    must(await anna.panel.isVisible(), "an unknown one shows a tab all the same");
  });
  await rule("arrow keys, Home and End go from tab to tab", async () => {
    await anna.tab("Chat");
    for (const [key, name] of [["ArrowRight", "Echo"], ["ArrowRight", "Clock"], ["End", "Magnets"], ["ArrowRight", "Chat"],
                               ["ArrowLeft", "Magnets"], ["Home", "Chat"]]) {
      await anna.page.keyboard.press(key);
      mustEqual(await selected(anna), name, `the tab behind ${key}`);
      mustEqual(await anna.page.evaluate(() => document.activeElement.textContent.trim()), name, "what has the focus");
    }
  });
  await rule("only the shown panel can be seen", async () => {
    for (const name of ["Chat", "Echo", "Clock", "Magnets"]) {
      await anna.tab(name);
      mustEqual(await anna.panel.count(), 1, "visible panels");
      must(await anna.panel.evaluate((panel, label) => document.getElementById(panel.getAttribute("aria-labelledby"))?.textContent.trim() === label, name),
           "it is labelled by its tab");
    }
  });
  await rule("tabs keep what was typed and shown in them", async () => {
    await anna.tab("Chat");
    await anna.join("anna");
    await anna.field("Message").fill("not sent yet");
    await anna.tab("Echo");
    await anna.panel.getByRole("textbox", { name: "Data (JSON)" }).fill("[42]");
    await anna.button("Call /service/echo").click();
    await anna.panel.locator("output, pre").filter({ hasText: "42" }).first().waitFor();
    await anna.tab("Magnets");
    await anna.magnet(2).focus();
    await anna.page.keyboard.press("Shift+ArrowRight");
    const place = await anna.placeOf(2);
    await anna.tab("Clock");
    await anna.tab("Chat");
    mustEqual(await anna.field("Message").inputValue(), "not sent yet", "the message");
    await anna.reads("anna has joined");
    await anna.tab("Echo");
    mustEqual(await anna.panel.getByRole("textbox", { name: "Data (JSON)" }).inputValue(), "[42]", "the data");
    must(await anna.panel.locator("output, pre").filter({ hasText: "42" }).count(), "the answer is still there");
    await anna.tab("Magnets");
    await anna.hasMagnetAt(2, place);
  });
  await rule("all demos are live in every window, shown or not", async () => {
    await anna.tab("Echo");
    await bert.magnet(8).focus();
    await bert.page.keyboard.press("Shift+ArrowRight");
    await bert.tab("Chat");
    await bert.join("bert");
    await bert.say("said while you were away");
    await bert.reads("I heard bert say");
    await bert.tab("Magnets");
    await anna.tab("Magnets");
    await anna.hasMagnetAt(8, await bert.placeOf(8));
    await anna.tab("Chat");
    await anna.reads("said while you were away");
  });
}

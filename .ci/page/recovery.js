// What breaks, and how it heals: the page's own cut, a road that is cut, a server that is
// restarted, a window that is left and comes back, another server.

import { must, mustEqual, until } from "./checks.js";
import { Peer } from "./server.js";

const TRANSPORTS = ["WebSocket", "Long-polling", "Callback-polling"];

// ======================================================================================
// The page's own cut
// ======================================================================================

export async function cut(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), peer = await Peer.open(server);
  await anna.join("anna");

  // Says two things while the window is cut, one after the other has been lost; what it then reads of them.
  const loseAndMend = async (name) => {
    await anna.cut();
    await anna.isAt("Connection lost");
    await peer.publish("/chat/demo", { user: "peer", chat: `${name} one.` });
    await anna.hasRow(`${name} one.`, "lost");
    await peer.publish("/chat/demo", { user: "peer", chat: `${name} two.` });
    await anna.mend();
    await anna.isAt("Connected");
    await peer.publish("/chat/demo", { user: "peer", chat: `${name} end.` });
    await anna.reads(`I heard peer say: ${name} end.`);
    return (await anna.lineTexts()).filter((line) => !line.includes("I heard"))
      .flatMap((line) => line.match(new RegExp(`${name} (one|two|end)\\.`, "g")) ?? []).map((words) => words.slice(name.length + 1));
  };

  await rule("the button says what it will do, and that it is pressed", async () => {
    await anna.cut();
    const button = anna.button("Mend the network");
    await button.waitFor();
    mustEqual(await button.getAttribute("aria-pressed"), "true", "aria-pressed");
    await anna.isAt("Connection lost");
    await anna.reads("The connection is lost.");
    await anna.mend();
    await anna.isAt("Connected");
    await anna.reads("Connected again");
  });
  for (const transport of TRANSPORTS) {
    await rule(`without acknowledgement what was lost over ${transport} is gone, and that is said`, async () => {
      await anna.switchTo(transport);
      const read = await loseAndMend(`plain ${transport}`);
      must(["two.,end.", "end."].includes(read.join()), "the first is lost, the rest is read once", read);
      await anna.shows(/\b[1-9] events? (was|were) lost/);
    });
  }
  await rule("acknowledgement takes a new handshake", async () => {
    const before = await anna.countRows("/meta/handshake");
    await anna.page.getByRole("checkbox", { name: /Acknowledge events/ }).check();
    await until("another handshake", async () => await anna.countRows("/meta/handshake") > before);
    await anna.isAt("Connected");
    await anna.hasMembers("autobot", "anna");
  });
  for (const transport of TRANSPORTS) {
    await rule(`with acknowledgement what was lost over ${transport} comes again, once and in order, and that is said`, async () => {
      await anna.switchTo(transport);
      mustEqual(await loseAndMend(`sure ${transport}`), ["one.", "two.", "end."], "what anna reads");
      await anna.shows(/\b[1-9] events? (came|has come|have come) again/);
    });
  }
  await rule("what is lost and what comes again is marked on the wire", async () => {
    const lost = anna.rowsWith("/chat/demo", "lost");
    must(await lost.count() >= 3, "lost events are on the wire", await lost.count());
    must(await lost.last().evaluate((row) => [row, ...row.querySelectorAll("*")].some(
      (element) => getComputedStyle(element).textDecorationLine.includes("line-through"))), "struck through");
    must(await anna.countRows("/chat/demo", "again") >= 3, "those that came again are, too");
  });
  await rule("one window is enough to see it: the bot speaks while the network is cut", async () => {
    await anna.cut();
    const lines = await anna.lines.count(), lost = await anna.countRows("/chat/demo", "lost");
    await anna.button("Let the bot speak").click();
    await until("its words are lost", async () => await anna.countRows("/chat/demo", "lost") > lost);
    must((await anna.lineTexts()).filter((line) => !/connection/i.test(line)).length <= lines, "they are not in the conversation");
    await anna.mend();
    await anna.shows(/came again/);
    await until("they are now", async () => await anna.lines.count() >= lines + 2);
  });
  await rule("a message that was typed while the network is cut is not lost unnoticed", async () => {
    await anna.cut();
    await anna.isAt("Connection lost");
    if (await anna.button("Send").isEnabled()) await anna.say("typed while cut");
    else await anna.field("Message").fill("typed while cut");
    await anna.mend();
    await anna.isAt("Connected");
    await until("it was delivered, is still in the field, or is said to have failed", async () =>
      await anna.count("I heard anna say: typed while cut") || (await anna.field("Message").inputValue()).includes("typed while cut")
      || await anna.page.getByText(/not (been )?sent|could not be sent/i).count());
  });
}

// ======================================================================================
// A road that is cut
// ======================================================================================

export async function cable(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const road = await stage.road(server), peer = await Peer.open(server);
  const anna = await stage.window(road);
  await anna.join("anna");
  await anna.page.getByRole("checkbox", { name: /Acknowledge events/ }).check();
  await anna.isAt("Connected");

  for (const transport of TRANSPORTS) {
    await rule(`a cable that is pulled is noticed over ${transport}, and after mending all is as before`, async () => {
      await anna.switchTo(transport);
      const handshakes = await anna.countRows("/meta/handshake");
      road.cut();
      await anna.isAt("Connection lost");
      await peer.publish("/chat/demo", { user: "peer", chat: `while ${transport} was cut.` });
      road.mend();
      await anna.isAt("Connected");
      await anna.reads(`I heard peer say: while ${transport} was cut.`);
      mustEqual(await anna.countRows("/meta/handshake"), handshakes, "handshakes (the session lives on)");
      mustEqual(await anna.count(`while ${transport} was cut.`), 2, "lines with it, the bot's with them");
    });
  }
  await rule("while a cable is out, tries become rarer", async () => {
    const tries = [];
    anna.page.on("request", () => tries.push(performance.now()));
    road.cut();
    await until("four tries", () => tries.length >= 4, 15_000);
    const gaps = tries.slice(1).map((time, at) => time - tries[at]);
    must(Math.max(...gaps.slice(-2)) > Math.min(...gaps.slice(0, 2)), "a later pause is longer than an early one", gaps);
  });
  const online = () => anna.page.evaluate(() => window.dispatchEvent(new Event("online")));
  // Has the page's timers that are longer than most never end, and those of shortened ms or more end ten times sooner.
  const setTimers = (most, shortened) => anna.page.evaluate(([most, shortened]) => {
    const wait = window.untouchedTimeout ??= window.setTimeout;
    window.setTimeout = (call, delay, ...more) =>
      wait(call, delay > most ? 2 ** 31 - 1 : delay >= shortened ? delay / 10 : delay, ...more);
  }, [most, shortened]);
  // A try that gets no answer begins.
  const getStuck = async () => {
    const tries = road.requests.length;
    road.isStuck = true;
    road.mend();
    await until("a try is under way", () => road.requests.length > tries);
  };

  await rule("the page hurries when the browser says that it is online again", async () => {
    road.mend();
    await online();
    await anna.isAt("Connected");
    await setTimers(1400, 1400);                        // a third pause never ends by itself
    road.cut();
    await anna.isAt(/next try in (1\.[5-9]|2\.\d) s/);
    road.mend();
    await online();
    await anna.isAt("Connected");
  });
  await rule("it hurries, too, if that is said during a try that then fails", async () => {
    await setTimers(2600, 2600);                        // a fourth pause never ends by itself
    road.cut();
    await anna.isAt(/next try in (1\.[5-9]|2\.\d) s/);
    await getStuck();
    await online();
    road.cut();
    road.isStuck = false;
    road.mend();
    await anna.isAt("Connected");
  });
  await rule("a try that gets no answer is given up as soon as any request, not after a held connect's time", async () => {
    await setTimers(15_000, 5_000);
    road.cut();
    await anna.isAt("Connection lost");
    await getStuck();
    await anna.isAt("Connection lost: no answer in time");
    road.isStuck = false;
    await anna.isAt("Connected");
  });
}

// ======================================================================================
// A server that is restarted
// ======================================================================================

export async function restart(stage) {
  const { rule } = stage;
  const server = await stage.server();
  const anna = await stage.window(server), bert = await stage.window(server, { at: "?transport=long-polling" });
  await anna.join("anna");
  await bert.join("bert");
  await anna.tab("Magnets");
  await anna.magnet(4).focus();
  for (let time = 0; time < 3; time += 1) await anna.page.keyboard.press("Shift+ArrowRight");
  await anna.openConsole();
  await anna.subscribe("/news/**");
  await anna.list("Subscriptions").getByText("/news/**").waitFor();
  const place = await anna.placeOf(4);
  await anna.tab("Chat");

  for (const [ends, end] of [["is stopped", () => server.stop()], ["dies", () => server.kill()]]) {
    await rule(`a server that ${ends} is missed, and that is said`, async () => {
      const lines = await anna.count("The connection is lost.");
      await end();
      for (const window of [anna, bert]) {
        await window.isAt("Connection lost");
        await window.reads("The connection is lost.", lines + 1);
      }
    });
    await rule(`when it is back, windows connect and join again by themselves (it ${ends})`, async () => {
      const lines = await anna.count("Connected again");
      await server.startAgain();
      for (const window of [anna, bert]) {
        await until("connected", () => window.isAt("Connected"), 30_000);
        await window.reads("Connected again", lines + 1);
      }
      for (const window of [anna, bert]) await window.hasMembers("autobot", "anna", "bert");
      await anna.say(`it ${ends} no more`);
      for (const window of [anna, bert]) await window.reads(`I heard anna say: it ${ends} no more`);
      mustEqual(await bert.count(`it ${ends} no more`), 2, "lines with it, the bot's with them");
    });
  }
  await rule("subscriptions of the console are made again", async () => {
    const peer = await Peer.open(server);
    await peer.publish("/news/of/today", { headline: "all is well again" });
    await anna.shows(/all is well again/);
  });
  await rule("the board is restored, for newcomers too", async () => {
    await anna.tab("Magnets");
    await anna.hasMagnetAt(4, place);
    const clara = await stage.window(server, { at: "#magnets" });
    await clara.hasMagnetAt(4, place);
  });
}

// ======================================================================================
// A window that is left
// ======================================================================================

export async function leaving(stage) {
  const { rule } = stage;
  const server = await stage.server();             // sessions live for two minutes unheard: only a good-bye ends them sooner
  const anna = await stage.window(server), bert = await stage.window(server);
  await anna.join("anna");
  await bert.join("bert");

  for (const transport of TRANSPORTS) {
    await rule(`a window over ${transport} that goes elsewhere says good-bye; when it comes back it joins again`, async () => {
      await bert.switchTo(transport);
      await anna.hasMembers("autobot", "anna", "bert");
      const left = await anna.count("bert has left");
      await bert.page.goto("about:blank");
      await anna.reads("bert has left", left + 1);
      await anna.hasMembers("autobot", "anna");
      await bert.page.goBack({ waitUntil: "commit" });        // from the cache, nothing is loaded
      await bert.isAt("Connected");
      if (await bert.field("Your name").isVisible()) await bert.join("bert");    // loaded anew, not brought back
      await anna.hasMembers("autobot", "anna", "bert");
    });
  }
  await rule("a window that the browser keeps and brings back connects and joins again by itself", async () => {
    const left = await anna.count("bert has left"), turn = (type) => bert.page.evaluate(
      (name) => window.dispatchEvent(new PageTransitionEvent(name, { persisted: true })), type);
    await turn("pagehide");
    await anna.reads("bert has left", left + 1);
    await turn("pageshow");
    await bert.isAt("Connected");
    await anna.hasMembers("autobot", "anna", "bert");
    await bert.say("back from the cache");
    await anna.reads("I heard bert say: back from the cache");
    mustEqual(await anna.count("back from the cache"), 2, "lines with it, the bot's with them");
  });
}

// ======================================================================================
// Another server
// ======================================================================================

export async function elsewhere(stage) {
  const { rule } = stage;
  const home = await stage.server();
  const [open, shut, bare] = [await stage.server("--allowed-origin", home.url), await stage.server(),
                              await stage.server("--bare", "--allowed-origin", home.url)];
  const at = (server, more = "") => `?url=${encodeURIComponent(server.url + "/cometd")}${more}`;

  await rule("a page talks to the server that ?url= names, if that allows it", async () => {
    const anna = await stage.window(home, { at: at(open) }), bert = await stage.window(open);
    anna.mayAsk = open.url;
    await anna.isAt("Connected");
    await anna.join("anna");
    await bert.join("bert");
    await bert.hasMembers("autobot", "anna", "bert");
    await anna.say("from another origin");
    await bert.reads("I heard anna say: from another origin");
    await anna.choose("Long-polling");
    await anna.say("by requests");
    await bert.reads("I heard anna say: by requests");
    await anna.page.goto("about:blank");
    await bert.hasMembers("autobot", "bert");
  });
  await rule("callback-polling is not offered there, and why is told", async () => {
    const anna = await stage.window(home, { at: at(open) });
    anna.mayAsk = open.url;
    const choice = anna.page.locator('option, input[type="radio"]').filter({ hasText: /Callback-polling/ })
      .or(anna.page.getByRole("radio", { name: /Callback-polling/ })).first();
    must(await choice.isDisabled(), "the choice is disabled");
    await anna.close();
  });
  await rule("a server that does not allow it is said to refuse, and how it is allowed", async () => {
    const anna = await stage.window(home, { at: at(shut) });
    anna.mayAsk = shut.url;
    await anna.isAt(/Refused|Connection lost/);
    await anna.shows(/allowed.origin/i);
  });
  await rule("a server without the demos is said to have none; talk and magnets still work among windows", async () => {
    const [anna, bert] = [await stage.window(home, { at: at(bare) }), await stage.window(home, { at: at(bare) })];
    for (const [window, user] of [[anna, "anna"], [bert, "bert"]]) {
      window.mayAsk = bare.url;
      await window.isAt("Connected");
      await window.join(user);
    }
    await anna.shows(/\b404\b|without (its |the )?demo|has no/i);
    await anna.say("no bot here");
    for (const window of [anna, bert]) {
      await window.reads("no bot here");
      await window.tab("Magnets");
    }
    await anna.shows(/404/, anna.panel);
    const size = () => anna.board.evaluate(({ clientWidth, clientHeight }) => [clientWidth, clientHeight]), before = await size();
    await anna.magnet(2).focus();
    await anna.page.keyboard.press("Shift+ArrowRight");
    await bert.hasMagnetAt(2, await anna.placeOf(2));
    await anna.shows(/from the left/, anna.panel);
    mustEqual(await size(), before, "the board's size, whatever is said below it");
    await anna.tab("Echo");
    await anna.button("Call /service/echo").click();
    await anna.shows(/404|no such service|unknown service/i, anna.panel);
  });
  for (const url of ["javascript:alert(1)", "//[", "data:text/html,x", "http://127.0.0.1:9/cometd; script-src 'unsafe-inline'", "</script><script>alert(1)</script>"]) {
    await rule(`?url=${url} does no harm, and is said to be of no use`, async () => {
      const anna = await stage.window(home, { at: `?url=${encodeURIComponent(url)}` });
      anna.mayAsk = "http://127.0.0.1:9";
      await anna.isAt(/Refused|Connection lost|Not connected/);
      await anna.close();
    });
  }
}

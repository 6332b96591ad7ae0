// Pictures of the page, with two users' doings on them.
//
//     node screenshots.js [--python PYTHON] path/to/bayeux_server.py FOLDER [--all]
//
// Without --all the two small ones of the README: chat.png (light) and magnets.png (dark).  With it every
// tab, wide and narrow, dark and light, to be looked at before a change of the page is called done.

import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { startBrowser } from "./browser.js";
import { must, until, within } from "./checks.js";
import { withPalette } from "./png.js";
import { Server, endProcesses } from "./server.js";
import { Window } from "./window.js";

const LARGEST_KB = 120;
const SHAPES = { wide: { width: 1280, height: 800 }, projector: { width: 1920, height: 1080 }, narrow: { width: 360, height: 740 } };

// A short talk, some words in a row, samples, an answer: what a visitor sees after two minutes.
async function play(anna, bert) {
  await anna.join("Anna");
  await bert.join("Bert");
  for (const [window, text] of [[anna, "Hello! Is anybody here?"], [bert, "I am, in another window."], [anna, "Then let us move some words."]]) {
    await window.say(text);
    await window.reads(`say: ${text}`);
  }
  await anna.tab("Magnets");
  for (const [word, x] of [["we", 0.14], ["sing", 0.3], ["under", 0.48], ["the", 0.65]]) await drag(anna, word, x, 0.1);
  await anna.tab("Echo");
  for (let time = 0; time < 5; time += 1) await anna.button("Call /service/echo").click();
  await anna.tab("Clock");
  await until("samples", async () => Number(/samples\D*(\d+)/i.exec(await anna.panel.innerText())?.[1]) >= 4);
}

// Drags a word to a place of the board, and keeps hold of it if told so; returns its number.
async function drag(window, word, x, y, isHeld = false) {
  const number = (await window.board.getByRole("button").allInnerTexts()).indexOf(word);
  await window.board.scrollIntoViewIfNeeded();
  const [magnet, board] = [await window.magnet(number).boundingBox(), await window.board.boundingBox()];
  await window.page.mouse.move(magnet.x + magnet.width / 2, magnet.y + magnet.height / 2);
  await window.page.mouse.down();
  await window.page.mouse.move(board.x + x * board.width, board.y + y * board.height, { steps: 8 });
  if (!isHeld) await window.page.mouse.up();
  return number;
}

// Takes a picture of a window once its connect is held and its pictures stand still.
async function take(window, file, fullPage = false) {
  await window.isAt("Connected");
  await window.page.evaluate(() => scrollTo(0, 0));
  const picture = withPalette(await window.page.screenshot({ animations: "disabled", caret: "hide", fullPage }));
  await writeFile(file, picture);
  console.log(`${file}  ${(picture.length / 1024).toFixed(0)} KB`);
  return picture.length;
}

async function takeTwo(browser, server, folder) {
  const anna = await Window.open(browser, server, { viewport: SHAPES.wide, colorScheme: "light" });
  const bert = await Window.open(browser, server, { viewport: SHAPES.wide, colorScheme: "dark" });
  await play(anna, bert);
  await anna.tab("Chat");
  await anna.rowsWith("/chat/demo").last().getByRole("button", { expanded: false }).first().click();
  await bert.tab("Magnets");
  await anna.tab("Magnets");
  const number = await drag(anna, "moon", 0.82, 0.1, true);
  await bert.hasMagnetAt(number, await anna.where(number));
  must(await take(bert, path.join(folder, "magnets.png")) < LARGEST_KB * 1024, `it is below ${LARGEST_KB} KB`);
  await anna.page.mouse.up();
  await anna.tab("Chat");
  must(await take(anna, path.join(folder, "chat.png")) < LARGEST_KB * 1024, `it is below ${LARGEST_KB} KB`);
}

async function takeAll(browser, server, folder) {
  for (const [shape, viewport] of Object.entries(SHAPES)) {
    for (const colorScheme of ["light", "dark"]) {
      const file = (name) => path.join(folder, `${shape}-${colorScheme}-${name}.png`);
      const anna = await Window.open(browser, server, { viewport, colorScheme }), bert = await Window.open(browser, server);
      await take(anna, file("0-new"));
      await play(anna, bert);
      for (const tab of ["Chat", "Echo", "Clock", "Magnets"]) {
        await anna.tab(tab);
        await take(anna, file(tab), shape === "narrow");
      }
      await anna.tab("Chat");
      await anna.openConsole();
      await anna.subscribe("/chat/**");
      await anna.publish("/chat/demo", "{not JSON");
      await anna.rowsWith("/chat/demo").last().getByRole("button", { expanded: false }).first().click();
      await take(anna, file("Console"), true);
      await anna.cut();
      await anna.isAt("Connection lost");
      await anna.button("Let the bot speak").click();
      await anna.hasRow("/meta/disconnect");
      await writeFile(file("cut"), withPalette(await anna.page.screenshot()));
      await anna.close();
      await bert.close();
    }
  }
}

process.on("exit", endProcesses);
const isAll = process.argv.includes("--all"), rest = process.argv.slice(2).filter((argument) => argument !== "--all");
Server.python = rest[0] === "--python" ? rest.splice(0, 2)[1] : "python3";
const [program, folder] = rest;
if (!folder) {
  console.error("usage: node screenshots.js [--python PYTHON] bayeux_server.py FOLDER [--all]");
  process.exit(2);
}
Server.program = path.resolve(program);
try {
  await mkdir(folder, { recursive: true });
  await within(isAll ? 240 : 60, "screenshots.js", (async () => {
    const server = await Server.start();
    const browser = await startBrowser();
    try {
      await (isAll ? takeAll : takeTwo)(browser, server, folder);
    } finally {
      await browser.close();
      await server.stop();
    }
  })());
} catch (error) {
  console.error(`screenshots.js FAILED: ${error.stack || error}`);
  process.exitCode = 1;
}
process.exit();

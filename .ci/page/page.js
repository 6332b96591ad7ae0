// The page of bayeux_server.py in a headless Chromium, used as people use it.
//
//     node page.js [--python PYTHON] [--list] path/to/bayeux_server.py [GROUP …]
//
// Each group of rules starts servers of its own (from the file named, with the page that lies
// beside it) and stops and restarts them as it likes.  Without names of groups all are run, some
// at a time.  CHROMIUM names the browser, if it is elsewhere.  Exit status 1 if a rule did not
// hold, or if it took too long.

import path from "node:path";
import { startBrowser } from "./browser.js";
import { within, withoutColours } from "./checks.js";
import * as clients from "./client.js";
import * as demos from "./demos.js";
import * as looks from "./looks.js";
import * as recovery from "./recovery.js";
import * as safety from "./safety.js";
import { Server, endProcesses } from "./server.js";
import { Stage } from "./stage.js";
import * as transports from "./transports.js";
import * as wire from "./wire.js";

const AT_A_TIME = 3;            // groups; most of their time is waiting
const GROUP_S = 240;            // ends what hangs; a slow machine with one core needs 95
const ALL_S = 600;              // and 260

const LONGEST = ["magnets", "calm", "transports", "restart", "client", "axe", "wire", "elsewhere"];     // they begin first
const groups = { ...clients, ...demos, ...transports, ...recovery, ...wire, ...safety, ...looks };

// The arguments; a clear sentence and status 2 if they are none.
function readArguments([...rest]) {
  let python = "python3";
  if (rest[0] === "--python") [, python] = rest.splice(0, 2);
  if (rest[0] === "--list") {
    console.log(Object.keys(groups).join("\n"));
    process.exit(0);
  }
  const [program, ...names] = rest;
  const unknown = names.filter((name) => !Object.hasOwn(groups, name));
  if (!program || unknown.length) {
    console.error(unknown.length ? `page.js: no such group: ${unknown.join(", ")}; there are ${Object.keys(groups).join(", ")}`
      : "usage: node page.js [--python PYTHON] [--list] bayeux_server.py [GROUP ...]");
    process.exit(2);
  }
  Server.python = python;
  Server.program = path.resolve(program);
  return names.length ? names : Object.keys(groups);
}

// Plays a group, then prints its lines together: others are playing beside it.
async function play(name, browser) {
  const stage = new Stage(name, browser), began = performance.now();
  try {
    await within(GROUP_S, name, groups[name](stage));
  } catch (error) {
    stage.failures.push(`${name}: the group as a whole\n          ${withoutColours(error)}`);
    stage.lines.push(`  NO  the group as a whole\n${error.stack}`);
  }
  await stage.end();
  console.log(`\n${name} (${((performance.now() - began) / 1000).toFixed(1)} s)\n${stage.lines.join("\n")}`);
  return stage;
}

// All groups, AT_A_TIME at once, in one browser.
async function playAll(names) {
  const browser = await startBrowser();
  const waiting = [...names].sort((one, other) => LONGEST.includes(other) - LONGEST.includes(one)), stages = [];
  const playSome = async () => {
    while (waiting.length) stages.push(await play(waiting.shift(), browser));
  };
  try {
    await Promise.all(Array.from({ length: AT_A_TIME }, playSome));
  } finally {
    await browser.close();
  }
  return stages;
}

process.on("exit", endProcesses);
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));

const names = readArguments(process.argv.slice(2)), began = performance.now();
try {
  const stages = await within(ALL_S, "page.js", playAll(names));
  const failures = stages.flatMap((stage) => stage.failures), held = stages.reduce((sum, stage) => sum + stage.held, 0);
  console.log(`\npage.js: ${held} rules hold in ${names.length} groups, ${((performance.now() - began) / 1000).toFixed(0)} s`);
  if (failures.length) {
    console.error(`page.js FAILED: ${failures.length} rules do not hold:\n  ${failures.join("\n  ")}`);
    process.exitCode = 1;
  }
} catch (error) {
  console.error(`page.js FAILED: ${error.stack || error}`);
  process.exitCode = 1;
}
process.exit();           // what still waits must not keep us

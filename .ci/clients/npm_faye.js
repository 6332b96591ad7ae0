// Faye's client in Node against a server of ours.
//
//     node npm_faye.js long-polling|websocket PYTHON bayeux_server.py

import Faye from "faye";
import { run } from "./checks.js";
import { converse, patient } from "./conversation.js";
import { Server, withServer } from "./server.js";
import { FayeUser } from "./user.js";

const [transport, python, module] = process.argv.slice(2);
await run(`npm faye over ${transport}`, 100, async () => {
  if (!module) throw new Error("usage: node npm_faye.js TRANSPORT PYTHON bayeux_server.py");
  await withServer(new Server(python, module), async (server) => {
    const [alice, bob] = ["alice", "bob"].map((name) => patient(name, new FayeUser(Faye, server.url, transport)));
    await converse({ alice, bob, transport, server });
  });
});

// A server of ours that a script starts, restarts and stops itself.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { within } from "./checks.js";

const PATIENCE = 15;            // seconds for the server to start, or to stop

// Where the pages and the clients' scripts are: the server's docroot.
export const here = dirname(fileURLToPath(import.meta.url));

export class Server {
  // A server of the module, run by the python, with flags of its command line; not yet started.
  constructor(python, module, ...flags) {
    this.command = [python, module, "--docroot", here, ...flags];
    this.port = 0;              // any free one; once started, always the same
  }

  get root() {
    return `http://127.0.0.1:${this.port}`;
  }

  get url() {
    return `${this.root}/cometd`;
  }

  async start() {
    const [python, ...rest] = this.command;
    this.log = "";
    this.process = spawn(python, [...rest, "--port", this.port], { stdio: ["ignore", "pipe", "pipe"] });
    this.ended = once(this.process, "close");
    process.once("exit", () => this.process.kill("SIGKILL"));       // should the script end before it
    await within(PATIENCE, "the server's start", new Promise((resolve, reject) => {
      const read = (text) => {
        this.log += text;
        const port = this.log.match(/ open http:\/\/127\.0\.0\.1:(\d+)\//)?.[1];
        if (port) resolve(this.port = Number(port));
      };
      for (const stream of [this.process.stdout, this.process.stderr]) stream.setEncoding("utf-8").on("data", read);
      this.process.on("exit", () => reject(new Error(`the server ended:\n${this.log}`)));
    }));
    return this;
  }

  // Stops it as a service manager does; it must end with status 0, and have logged no error.
  async stop() {
    this.process.kill("SIGTERM");
    const [status] = await within(PATIENCE, "the server's end", this.ended);
    if (status !== 0 || /Traceback| (ERROR|CRITICAL) /.test(this.log)) {
      throw new Error(`the server ended with status ${status}, or logged errors:\n${this.log}`);
    }
  }

  async restart() {
    await this.stop();
    await this.start();
    console.log("  --  the server was stopped, and started again");
  }
}

// Runs work with a server that is started before and stopped after, whatever happens.
export async function withServer(server, work) {
  await server.start();
  try {
    await work(server);
    await server.stop();
  } finally {
    server.process.kill("SIGKILL");         // in vain, if all was well
  }
}

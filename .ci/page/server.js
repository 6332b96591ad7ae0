// The server of a group of checks, what may stand between it and the browser, and a client that
// says what no window would say.

import { spawn } from "node:child_process";
import http from "node:http";
import net from "node:net";
import path from "node:path";
import { must, until, within } from "./checks.js";

const START_MS = 20_000;
const STOP_S = 15;

// All processes that were started here and still run; the runner ends them, by their ids.
const running = new Set();

export function endProcesses() {
  for (const child of running) child.kill("SIGKILL");
}

// ======================================================================================
// A server
// ======================================================================================

export class Server {
  static python;            // the runner's arguments
  static program;

  // Starts bayeux_server.py with the page beside it, on any free port.
  static async start(...options) {
    const server = new Server();
    server.options = options;
    await server.#run(0);
    return server;
  }

  async #run(port) {
    const folder = path.dirname(Server.program);
    this.output = "";
    this.process = spawn(Server.python, [Server.program, "--port", port, "--docroot", folder, ...this.options],
                         { stdio: ["ignore", "pipe", "pipe"], env: { ...process.env, PYTHONUNBUFFERED: "1" } });
    const child = this.process;
    running.add(child);
    this.ended = new Promise((resolve) => child.once("exit", (status, signal) => {
      running.delete(child);
      resolve(status ?? signal);
    }));
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (text) => { this.output += text; });
    this.url = await until(`the server's address: ${this.options.join(" ")}`,
                           () => /: open (http:\S+)\/ in two windows/.exec(this.output)?.[1], START_MS);
    this.port = Number(new URL(this.url).port);
  }

  // Stops it as a service manager does: it ends by itself, with status 0, and has logged no error.
  async stop() {
    if (!running.has(this.process)) return;
    this.process.kill("SIGTERM");
    const status = await within(STOP_S, "stopping the server by SIGTERM", this.ended);
    must(status === 0, "a server that is stopped ends with status 0", { status, output: this.output });
    must(!/Traceback| (ERROR|CRITICAL) /.test(this.output), "the server logs no error", this.output);
  }

  // The power fails.
  async kill() {
    this.process.kill("SIGKILL");
    await this.ended;
  }

  // A new process where the old one was; it knows nothing of it.
  async startAgain() {
    await this.#run(this.port);
  }
}

// ======================================================================================
// A bad road to a server: what proxies and cables do to connections
// ======================================================================================

// Passes on what a stream brings in small pieces, so slowly that a browser draws between them.
async function crawl(source, target) {
  for await (const data of source) {
    for (let at = 0; at < data.length; at += 1500) {
      target.write(data.subarray(at, at + 1500));
      await new Promise((wake) => setTimeout(wake, 20));
    }
  }
  target.end();
}

export class Road {
  refusesWebSocket = false;     // as an old proxy does, that knows no upgrade
  refusesPost = false;          // as a filter does, that lets only pages through
  isCut = false;                // a cable is pulled
  isStuck = false;              // what comes along gets no answer, until it is cut
  isSlow = false;               // answers come in small pieces
  answer = null;                // {status, headers, body}: what answers in the server's place
  requests = [];                // "POST", "GET" and "upgrade", as they came along

  static async to(server) {
    const road = new Road();
    road.sockets = new Set();
    road.target = { host: "127.0.0.1", port: server.port };
    road.listener = http.createServer((request, response) => road.#pass(request, response));
    road.listener.on("upgrade", (request, socket, head) => road.#passUpgrade(request, socket, head));
    road.listener.on("connection", (socket) => {
      if (road.isCut) socket.destroy();
      road.sockets.add(socket);
      socket.on("close", () => road.sockets.delete(socket));
      socket.on("error", () => {});
    });
    await new Promise((resolve) => road.listener.listen(0, "127.0.0.1", resolve));
    road.url = `http://127.0.0.1:${road.listener.address().port}`;
    return road;
  }

  #pass(request, response) {
    this.requests.push(request.method);
    if (this.isStuck) return;
    if (this.answer) {
      response.writeHead(this.answer.status, this.answer.headers).end(this.answer.body);
      return;
    }
    if (this.refusesPost && request.method === "POST") {
      response.writeHead(403, { "Content-Type": "text/html" }).end("<p>Not through this proxy.</p>");
      return;
    }
    const { method, url, headers } = request;
    const onward = http.request({ ...this.target, method, path: url, headers }, (answer) => {
      response.writeHead(answer.statusCode, answer.rawHeaders);
      if (this.isSlow) crawl(answer, response).catch(() => response.destroy());
      else answer.pipe(response);
    });
    onward.on("error", () => response.destroy());
    response.on("close", () => onward.destroy());
    request.pipe(onward);
  }

  #passUpgrade(request, socket, head) {
    this.requests.push("upgrade");
    if (this.refusesWebSocket) {
      socket.end("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
      return;
    }
    const onward = net.connect(this.target, () => {
      const lines = [`${request.method} ${request.url} HTTP/1.1`];
      for (let at = 0; at < request.rawHeaders.length; at += 2) lines.push(`${request.rawHeaders[at]}: ${request.rawHeaders[at + 1]}`);
      onward.write(lines.join("\r\n") + "\r\n\r\n");
      onward.write(head);
      socket.pipe(onward).pipe(socket);
    });
    for (const [one, other] of [[socket, onward], [onward, socket]]) {
      one.on("error", () => other.destroy());
      one.on("close", () => other.destroy());
    }
  }

  // All that is on its way is lost, and nothing gets through until it is mended.
  cut() {
    this.isCut = true;
    for (const socket of this.sockets) socket.destroy();
  }

  mend() {
    this.isCut = false;
  }

  close() {
    this.cut();
    this.listener.close();
  }
}

// ======================================================================================
// A client without a window
// ======================================================================================

export class Peer {
  static async open(server) {
    const peer = new Peer();
    peer.url = server.url + "/cometd";
    const [reply] = await peer.send({ channel: "/meta/handshake", version: "1.0", supportedConnectionTypes: ["long-polling"] });
    must(reply.successful, "a handshake succeeds", reply);
    peer.id = reply.clientId;
    return peer;
  }

  // Sends messages as one batch, with our clientId; returns the replies.
  async send(...messages) {
    const body = JSON.stringify(messages.map((message, at) => ({ id: String(at), clientId: this.id, ...message })));
    const answer = await fetch(this.url, { method: "POST", headers: { "Content-Type": "application/json" }, body });
    return answer.json();
  }

  async publish(channel, ...data) {
    for (const reply of await this.send(...data.map((each) => ({ channel, data: each })))) {
      must(reply.successful, `publishing to ${channel} succeeds`, reply);
    }
  }

  // What a service answers.
  async call(channel, data) {
    const replies = await this.send({ channel, data });
    return replies[0].data;
  }
}

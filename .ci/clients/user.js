// One shape for clients of different kinds, so that one conversation can be held with each of them.
//
// It runs in Node and in pages.  What a method returns can be sent from a page: plain values, with a
// refusal as its code (403 and so on) and a success as 0.

export class User {
  constructor(url) {
    this.url = url;
    this.incoming = [];         // every message that came
    this.events = [];           // what was delivered by subscriptions, and not yet asked for
    this.patterns = new Set();  // what is subscribed
    this.confirmed = new Set(); // what of it this session's server has confirmed
    this.sessions = 0;          // successful handshakes
    this.waiting = new Set();
  }

  // -- What each kind of client does in its own way ----------------------------------------
  //
  // open()                        connect; fulfilled when that is done
  // transport()                   the name of the transport in use
  // subscribe(pattern)            a promise of its code
  // unsubscribe(pattern)          a promise of its code
  // publish(channel, data)        a promise of its code
  // batch([channel, data], ...)   publish them in one request, as far as the transport can; their codes
  // close()                       disconnect

  // -- What is the same for all -------------------------------------------------------------

  // Takes note of a message that came, before the client looks at it.
  note(message) {
    const { channel, successful, subscription } = message;
    if (channel === "/meta/handshake" && successful) {
      this.sessions += 1;
      this.confirmed.clear();
    }
    if (channel === "/meta/subscribe" && successful) this.confirmed.add(subscription);
    this.incoming.push(message);
    this.wake();
  }

  deliver(channel, data) {
    this.events.push({ channel, data });
    this.wake();
  }

  wake() {
    for (const look of this.waiting) look();
  }

  // A promise that is fulfilled when the condition holds.
  until(holds) {
    return new Promise((resolve) => {
      const look = () => {
        if (holds()) {
          this.waiting.delete(look);
          resolve();
        }
      };
      this.waiting.add(look);
      look();
    });
  }

  // The reply to the request with this channel and id.
  async reply(channel, id) {
    let found;
    await this.until(() => {
      found = this.incoming.find((each) => each.channel === channel && each.id === id && "successful" in each);
      return found;
    });
    return found;
  }

  codeOf(reply) {
    return reply.successful ? 0 : Number.parseInt(reply.error, 10);
  }

  // The next events, in order, as many as asked for; they are taken out.
  async next(count = 1) {
    await this.until(() => this.events.length >= count);
    return this.events.splice(0, count);
  }

  // Calls a service; the data of its answer.  The subscription only tells the client whom to hand it to.
  async call(service, data) {
    await this.subscribe(`/service/${service}`);
    await this.publish(`/service/${service}`, data);
    await this.until(() => this.events.some((event) => event.channel === `/service/${service}`));
    return this.events.splice(this.events.findIndex((event) => event.channel === `/service/${service}`), 1)[0].data;
  }

  count() {
    return this.sessions;
  }

  // Fulfilled when a refused subscription is overcome; count() was as given before.
  async settle(_sessions) {}

  // Fulfilled when there is a newer session than so many, with all subscriptions.
  async recovered(sessions) {
    await this.until(() => this.sessions > sessions && [...this.patterns].every((each) => this.confirmed.has(each)));
  }
}

// ======================================================================================
// Faye's client
// ======================================================================================

export class FayeUser extends User {
  // A client that uses no transport but the given one, and what a handshake needs.
  constructor(Faye, url, transport) {
    super(url);
    this.wanted = transport;
    this.client = new Faye.Client(url, { retry: 0.5, timeout: 60 });
    for (const other of ["websocket", "eventsource", "long-polling", "cross-origin-long-polling"]) {
      // A handshake begins with long-polling, or with callback-polling from another origin.
      const isNeeded = other === "long-polling" && ["websocket", "eventsource"].includes(transport);
      if (other !== transport && !isNeeded) this.client.disable(other);
    }
    this.client.addExtension({
      incoming: (message, onward) => {
        this.note(message);
        onward(message);
      },
    });
    this.subscriptions = {};
  }

  // Faye upgrades by itself, some time after its handshake; it tells nobody when.
  async open() {
    await new Promise((resolve) => { this.client.connect(resolve); });
    while (this.transport() !== this.wanted) await new Promise((resolve) => { setTimeout(resolve, 20); });
  }

  transport() {
    return this.client._dispatcher.connectionType;
  }

  code(promise) {
    return promise.then(() => 0, (error) => error.code);
  }

  async subscribe(pattern) {
    const subscription = this.client.subscribe(pattern).withChannel((channel, data) => this.deliver(channel, data));
    const code = await this.code(subscription);
    if (code === 0) {
      this.patterns.add(pattern);
      this.subscriptions[pattern] = [subscription];     // in an array: it is a promise itself
    }
    return code;
  }

  async unsubscribe(pattern) {
    const since = this.incoming.length;
    this.patterns.delete(pattern);
    this.client.unsubscribe(pattern, this.subscriptions[pattern][0]);
    let found;
    await this.until(() => {
      found = this.incoming.slice(since).find((each) => each.channel === "/meta/unsubscribe");
      return found;
    });
    return this.codeOf(found);
  }

  publish(channel, data) {
    return this.code(this.client.publish(channel, data));
  }

  // Faye puts into one request what is asked for at once; a frame of a WebSocket holds one message.
  batch(...publications) {
    return Promise.all(publications.map(([channel, data]) => this.publish(channel, data)));
  }

  async close() {
    await this.client.disconnect();
  }
}

// ======================================================================================
// dojox.cometd of Dojo 1.7; one connection a page
// ======================================================================================

export class DojoxUser extends User {
  // encoding: json, form, json-comment-filtered (which is json, but for the replies) or jsonp.
  constructor(dojo, url, encoding) {
    super(url);
    dojo.require("dojox.cometd._base");
    dojo.require(`dojox.cometd.${{
      "json": "longPollTransportJsonEncoded",
      "form": "longPollTransportFormEncoded",
      "json-comment-filtered": "longPollTransportJsonEncoded",
      "jsonp": "callbackPollTransport",
    }[encoding]}`);
    for (const extension of ["ack", "timestamp", "timesync"]) dojo.require(`dojox.cometd.${extension}`);
    this.dojo = dojo;
    this.encoding = encoding;
    this.cometd = window.dojox.cometd;
    this.cometd._extendInList.push((message) => {
      this.note(message);
      return message;
    });
    this.cometd._extendOutList.push((message) => {
      this.sent.push(message);
      return message;
    });
    this.sent = [];
    this.connected = false;
    dojo.subscribe("/cometd/meta", (event) => this.look(event));
  }

  // What applications do: they subscribe again when the client has a new session.
  look({ action, successful, reestablish }) {
    if (action === "connect") this.connected = successful;
    if (action === "handshake" && successful && reestablish) {
      for (const pattern of this.patterns) this.listen(pattern);
    }
    this.wake();
  }

  async open() {
    const properties = {};
    if (this.encoding === "json-comment-filtered") {
      // "optional" takes a plain reply too: a server that knows the session no more cannot know that
      // it wanted comments, and dojox would wait for ever for one that says so in a comment.
      this.cometd.handleAs = "json-comment-optional";
      properties.ext = { "json-comment-filtered": true };
    }
    // It does not notice that a script failed to load, and waits for advice.timeout and this (ms) together.
    this.cometd.expectedNetworkDelay = 3000;
    this.cometd.init(this.url, properties);
    await this.until(() => this.connected);
  }

  transport() {
    return this.cometd.currentTransport._connectionType;
  }

  // The codes of the messages that work sends.
  async codes(work) {
    this.sent = [];
    work();
    const replies = await Promise.all(this.sent.map(({ channel, id }) => this.reply(channel, id)));
    return replies.map((reply) => this.codeOf(reply));
  }

  listen(pattern) {
    this.cometd.subscribe(pattern, (message) => this.deliver(message.channel, message.data));
  }

  async subscribe(pattern) {
    const [code] = await this.codes(() => this.listen(pattern));
    if (code === 0) this.patterns.add(pattern);
    return code;
  }

  async unsubscribe(pattern) {
    this.patterns.delete(pattern);
    return (await this.codes(() => this.cometd.unsubscribe(pattern)))[0];
  }

  async publish(channel, data) {
    return (await this.codes(() => this.cometd.publish(channel, data)))[0];
  }

  batch(...publications) {
    return this.codes(() => {
      this.cometd.startBatch();
      for (const [channel, data] of publications) this.cometd.publish(channel, data);
      this.cometd.endBatch();
    });
  }

  // When a subscription is refused, it cancels its poll, ends its session and begins another; by JSONP it
  // cannot cancel a poll, and goes on.
  async settle(sessions) {
    if (this.encoding !== "jsonp") await this.recovered(sessions);
  }

  // What the extensions have learnt.
  extensions() {
    const { offset, lag, samples } = this.cometd.timesync;
    return { offset, lag, samples, acks: this.incoming.map((message) => message.ext?.ack) };
  }

  // It pays no heed to the reply.
  close() {
    this.cometd.disconnect();
  }
}

// What alice and bob, who may be clients of any kind (user.js), say to each other and to the server.

import { check, within } from "./checks.js";

const PATIENCE = 25;            // seconds for one answer; after a restart clients wait before they try again
const TEXT = "ça va? \u2028 </script> 🙂";

// A user whose every method fails, with a clear message, if it takes too long.
export function patient(name, user) {
  return new Proxy(user, {
    get: (target, method) => method === "then" ? undefined : (...parameters) => within(
      PATIENCE, `${name}'s ${method} ${JSON.stringify(parameters)}`, Promise.resolve(target[method](...parameters))),
  });
}

export async function converse({ alice, bob, transport, server, beforeTheEnd = () => {} }) {
  for (const [name, user] of Object.entries({ alice, bob })) {
    await user.open();
    const used = await user.transport();
    check(`${name} is connected over ${transport}`, used === transport, used);
  }
  await talk(alice, bob);
  await refuse(alice, bob);
  await recover(alice, bob, server);
  await beforeTheEnd();
  for (const [name, user] of Object.entries({ alice, bob })) {
    const used = await user.transport();
    check(`${name} still uses ${transport}`, used === transport, used);
    await user.close();
    check(`${name} disconnects`, true);
  }
}

async function talk(alice, bob) {
  check("alice subscribes /room/one", await alice.subscribe("/room/one") === 0);
  check("bob subscribes /room/*", await bob.subscribe("/room/*") === 0);
  check("bob subscribes /deep/**", await bob.subscribe("/deep/**") === 0);

  check("alice's publish is acknowledged", await alice.publish("/room/one", { text: TEXT }) === 0);
  for (const [name, user] of Object.entries({ alice, bob })) {
    const [event] = await user.next();
    check(`${name} hears alice, every character of hers`, event.data.text === TEXT, event);
  }
  await alice.publish("/deep/down/below", { number: 0 });
  const [deep] = await bob.next();
  check("bob hears by /deep/**", deep.channel === "/deep/down/below", deep);

  const codes = await alice.batch(...[1, 2, 3].map((number) => ["/room/two", { number }]));
  check("each publish of a batch is acknowledged", codes.join() === "0,0,0", codes);
  const numbers = (await bob.next(3)).map((event) => event.data.number);
  check("the batch arrives in order", numbers.join() === "1,2,3", numbers);

  const answer = await alice.call("echo", { a: [1, null, "x"] });
  check("the echo service brings its data back",
    JSON.stringify(answer) === JSON.stringify({ a: [1, null, "x"] }), answer);
  check("alice unsubscribes /service/echo, of which no record was kept", await alice.unsubscribe("/service/echo") === 0);

  check("bob unsubscribes /room/*", await bob.unsubscribe("/room/*") === 0);
  await alice.publish("/room/two", { number: 4 });
  await alice.publish("/deep/after", { number: 5 });
  const [after] = await bob.next();
  check("bob hears what he still wants, and no more of the other", after.data.number === 5, after);
}

async function refuse(alice, bob) {
  const meta = await bob.publish("/meta/x", {});
  check("a publish to /meta/x fails with 404", meta === 404, meta);
  const unknown = await bob.publish("/service/nobody", {});
  check("a call of an unknown service fails with 404", unknown === 404, unknown);
  const sessions = await bob.count();
  const denied = await bob.subscribe("/meta/x");
  check("a subscription to /meta/x fails with 403", denied === 403, denied);
  await bob.settle(sessions);
  await alice.publish("/deep/refused", { number: 6 });
  const [event] = await bob.next();
  check("after all these refusals bob hears what he heard before", event.data.number === 6, event);
}

async function recover(alice, bob, server) {
  const [alices, bobs] = [await alice.count(), await bob.count()];
  await server.restart();
  await alice.recovered(alices);
  await bob.recovered(bobs);
  check("both have a new session and all their subscriptions", true);
  check("alice's publish is acknowledged", await alice.publish("/room/one", { number: 7 }) === 0);
  const [[own], again] = [await alice.next(), await bob.publish("/deep/again", { number: 8 })];
  check("alice hears herself after the restart", own.data.number === 7 && again === 0, own);
  const [event] = await bob.next();
  check("bob hears himself after the restart", event.data.number === 8, event);
}

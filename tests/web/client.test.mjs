// The browser client against a scripted gateway. Run by tests/web/test_client.py, which provides `ws`.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { afterEach, test } from "node:test";

import { MessageRefused, OutcomeUnknown, SessionEnded, openSession, socketUrl } from "../../gateway/web/client.js";

const { WebSocket, WebSocketServer } = createRequire(process.env.WS_FOLDER + "/")("ws");

const cleanups = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** A gateway whose sockets are handed to `scripts`, one after another; the last for all further ones. */
async function scriptedGateway(...scripts) {
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1", handleProtocols: () => "codelab.v2.json" });
  await new Promise((resolve) => server.once("listening", resolve));
  const requests = [];
  server.on("connection", (socket, request) => {
    const index = requests.length;
    requests.push(request);
    const peer = new Peer(socket);
    scripts[Math.min(index, scripts.length - 1)](peer, request, index);
  });
  cleanups.push(() => {
    for (const socket of server.clients) socket.terminate();
    return new Promise((resolve) => server.close(resolve));
  });
  return { url: `http://127.0.0.1:${server.address().port}`, requests };
}

class Peer {
  received = [];
  #waiting = [];
  constructor(socket) {
    this.socket = socket;
    socket.on("message", (data) => {
      this.received.push(JSON.parse(data));
      this.#waiting.shift()?.();
    });
  }
  send(...frames) {
    for (const frame of frames) this.socket.send(JSON.stringify(frame));
  }
  async next(type) {
    for (;;) {
      const index = this.received.findIndex((message) => message.type === type);
      if (index >= 0) return this.received.splice(index, 1)[0];
      await new Promise((resolve) => this.#waiting.push(resolve));
    }
  }
}

const welcome = (fields = {}) => ({
  type: "welcome", session_id: "s1", epoch: "E1", first_seq: 1, last_seq: 0, resumed: false,
  turn: { id: null, state: "idle" }, pending: [], limits: { max_message_bytes: 1000 },
  dedupe_window_s: 1000, heartbeat_s: 20, ...fields,
});
const token = (seq, fields = {}) => ({ seq, type: "assistant_message", token: `${seq} `, is_final: false, ...fields });

function open(url, options = {}) {
  const session = openSession(url, { sessionId: "s1", WebSocket, random: () => 0, ...options });
  cleanups.push(() => session.close());
  return session;
}

async function take(session, count) {
  const events = [];
  for await (const event of session) {
    events.push(event);
    if (events.length === count) break;
  }
  return events;
}

const states = (session) => {
  const seen = [];
  session.addEventListener("state", ({ detail }) => seen.push(detail));
  return seen;
};

test("delivers single events, batches and merged tokens once and in order", async () => {
  const { url } = await scriptedGateway((peer) => {
    peer.send(welcome(), token(1), [token(2), token(3)], token(2), [token(6, { first_seq: 4 })]);
  });
  const events = await take(open(url), 4);
  assert.deepEqual(events.map((event) => event.seq), [1, 2, 3, 6]);
});

test("resumes behind the last event, over an abnormal end", async () => {
  const { url, requests } = await scriptedGateway(
    (peer) => {
      peer.send(welcome({ epoch: "E/1 " }), token(1), token(2));
      setTimeout(() => peer.socket.terminate(), 20);
    },
    (peer) => peer.send(welcome({ epoch: "E/1 ", resumed: true, last_seq: 3 }), token(3)),
  );
  const session = open(url);
  assert.deepEqual((await take(session, 3)).map((event) => event.seq), [1, 2, 3]);
  assert.equal(requests[0].url, "/api/v1/ws/s1");
  assert.equal(requests[1].url, "/api/v1/ws/s1?epoch=E%2F1%20&last_seq=2");
  assert.deepEqual(session.position, { epoch: "E/1 ", lastSeq: 3 });
});

for (const wrong of [token(3), token(3, { first_seq: 1 }), { ...token(2), seq: "2" }]) {
  test(`breaks off at a gap and resumes: ${JSON.stringify(wrong)}`, async () => {
    const { url } = await scriptedGateway(
      (peer) => peer.send(welcome(), token(1), wrong, token(2)),
      (peer) => peer.send(welcome({ resumed: true }), token(2), token(3)),
    );
    assert.deepEqual((await take(open(url), 3)).map((event) => event.seq), [1, 2, 3]);
  });
}

test("keeps its place until the snapshot has come, and delivers the snapshot", async () => {
  const snapshot = { type: "snapshot", reason: "epoch_changed", epoch: "E2", seq: 40, text: "so far", pending: [] };
  const { url, requests } = await scriptedGateway(
    (peer) => {
      peer.send(welcome(), token(1));
      setTimeout(() => peer.socket.terminate(), 20);
    },
    (peer) => {
      peer.send(welcome({ epoch: "E2", last_seq: 40 }));
      setTimeout(() => peer.socket.terminate(), 20);
    },
    (peer) => peer.send(welcome({ epoch: "E2", last_seq: 40 }), snapshot, token(41)),
  );
  const events = await take(open(url), 3);
  assert.deepEqual(events.map((event) => [event.type, event.epoch, event.seq]), [
    ["assistant_message", "E1", 1], ["snapshot", "E2", 40], ["assistant_message", "E2", 41],
  ]);
  assert.match(requests[2].url, /epoch=E1&last_seq=1$/);
});

test("takes an event with a seq for the agent's, whatever it is called", async () => {
  const { url } = await scriptedGateway((peer) => {
    peer.send(welcome(), { seq: 1, type: "welcome" }, { seq: 2, type: "ack", id: "a" }, { seq: 3, type: "snapshot", reason: "trimmed" });
  });
  const events = await take(open(url), 3);
  assert.deepEqual(events.map((event) => [event.type, event.epoch]), [["welcome", "E1"], ["ack", "E1"], ["snapshot", "E1"]]);
});

test("breaks off at an event before its snapshot", async () => {
  const { url, requests } = await scriptedGateway(
    (peer) => {
      peer.send(welcome(), token(1));
      setTimeout(() => peer.socket.terminate(), 20);
    },
    (peer) => peer.send(welcome({ last_seq: 9 }), token(2)),
    (peer) => peer.send(welcome({ resumed: true }), token(2)),
  );
  await take(open(url), 2);
  assert.equal(requests.length, 3);
});

test("acknowledges nothing of an epoch that is over, and begins anew in the next", async () => {
  const snapshot = { type: "snapshot", reason: "no_such_session", epoch: "E2", seq: 3, text: "", pending: [] };
  let first;
  const { url } = await scriptedGateway(
    (peer) => {
      peer.send(welcome(), token(50, { first_seq: 1 }), token(200, { first_seq: 51 }));
      setTimeout(() => peer.socket.terminate(), 50);
    },
    async (peer) => {
      peer.send(welcome({ epoch: "E2", last_seq: 3 }), snapshot);
      first = (await peer.next("ack")).seq;
      peer.send(token(4));
    },
  );
  const session = open(url);
  await take(session, 1);
  await new Promise((resolve) => session.addEventListener("state", ({ detail }) => detail.welcome?.epoch === "E2" && resolve()));
  await new Promise((resolve) => setTimeout(resolve, 20));
  await take(session, 3);
  assert.equal(first, 3);
});

test("acknowledges after 100 events at once, and what was taken after a second", async () => {
  const acks = [];
  let acked;
  const done = new Promise((resolve) => (acked = resolve));
  const { url } = await scriptedGateway(async (peer) => {
    peer.send(welcome(), token(100, { first_seq: 1 }), token(101), token(102));
    for (let count = 0; count < 2; count++) acks.push([(await peer.next("ack")).seq, Date.now()]);
    acked();
  });
  const session = open(url);
  await take(session, 2);
  await done;
  assert.deepEqual(acks.map(([seq]) => seq), [100, 101]);
  assert.ok(acks[1][1] - acks[0][1] >= 900, "the second was sent at once");
});

test("sends unanswered messages again under their ids, in order", async () => {
  const seen = [];
  const { url } = await scriptedGateway(
    async (peer) => {
      peer.send(welcome());
      for (const _ of "abc") seen.push((await peer.next("user_message")).id);
      peer.send({ type: "ack", id: "b", status: "accepted", turn_id: "t2" });
      setTimeout(() => peer.socket.terminate(), 20);
    },
    async (peer) => {
      peer.send(welcome({ resumed: true }));
      for (const _ of "ac") {
        const { id } = await peer.next("user_message");
        seen.push(id);
        peer.send({ type: "ack", id, status: "duplicate", turn_id: `t of ${id}` });
      }
    },
  );
  const session = open(url);
  const answers = await Promise.all([..."abc"].map((id) => session.sendUserMessage("x", { id })));
  assert.deepEqual(seen, ["a", "b", "c", "a", "c"]);
  assert.deepEqual(answers[0], { messageId: "a", turnId: "t of a", duplicate: true });
  assert.deepEqual(answers[1], { messageId: "b", turnId: "t2", duplicate: false });
});

test("rejects what was refused, and repeats what was refused for a while", async () => {
  const { url } = await scriptedGateway(async (peer) => {
    peer.send(welcome());
    const first = await peer.next("hitl_decision");
    peer.send({ type: "nack", id: first.id, code: "ALREADY_DECIDED", message: "no", retryable: false });
    const cancel = await peer.next("cancel");
    peer.send({ type: "nack", id: cancel.id, code: "NO_SUCH_TURN", message: "no", retryable: false });
    const second = await peer.next("user_message");
    peer.send({ type: "nack", id: second.id, code: "QUEUE_FULL", message: "wait", retryable: true });
    const again = await peer.next("user_message");
    assert.equal(again.id, second.id);
    peer.send({ type: "ack", id: again.id, status: "accepted", turn_id: "t" });
  });
  const session = open(url);
  await assert.rejects(session.decide("c1", "approve"), (error) => error instanceof MessageRefused && error.code === "ALREADY_DECIDED");
  assert.equal(await session.cancel(), false);
  assert.equal((await session.sendUserMessage("x")).turnId, "t");
});

test("does not send again into another epoch what could have been done", async () => {
  const sent = [];
  const { url } = await scriptedGateway(
    async (peer) => {
      peer.send(welcome());
      await peer.next("user_message");
      peer.socket.terminate();
    },
    (peer) => {
      peer.send(welcome({ epoch: "E2" }));
      peer.socket.on("message", (data) => sent.push(JSON.parse(data)));
    },
  );
  await assert.rejects(open(url).sendUserMessage("x"), OutcomeUnknown);
  assert.deepEqual(sent, []);
});

test("does not send again what the gateway may have forgotten", async () => {
  const { url } = await scriptedGateway(
    async (peer) => {
      peer.send(welcome());
      await peer.next("user_message");
      setTimeout(() => peer.socket.terminate(), 20);
    },
    (peer) => peer.send(welcome({ resumed: true, dedupe_window_s: 0 })),
  );
  await assert.rejects(open(url).sendUserMessage("x"), OutcomeUnknown);
});

test("waits as long as a refusal asks for", async () => {
  const times = [];
  const { url } = await scriptedGateway(async (peer) => {
    peer.send(welcome());
    const { id } = await peer.next("user_message");
    times.push(Date.now());
    peer.send({ type: "nack", id, code: "RATE_LIMITED", message: "wait", retryable: true, retry_after_s: 0.3 });
    await peer.next("user_message");
    times.push(Date.now());
    peer.send({ type: "ack", id, status: "accepted" });
  });
  await open(url).sendUserMessage("x");
  assert.ok(times[1] - times[0] >= 290, `${times[1] - times[0]} ms`);
});

/** Long waits end after 50 ms while `run` runs. */
async function withShortWaits(run) {
  const original = globalThis.setTimeout;
  globalThis.setTimeout = (callback, delay) => original(callback, delay >= 10_000 ? 50 : delay);
  try {
    await run();
  } finally {
    globalThis.setTimeout = original;
  }
}

test("leaves a socket on which no welcome or no answer comes", async () => {
  await withShortWaits(async () => {
    const { url, requests } = await scriptedGateway(
      () => {},
      (peer) => peer.send(welcome()),
      async (peer) => {
        peer.send(welcome({ resumed: true }));
        const { id } = await peer.next("user_message");
        peer.send({ type: "ack", id, status: "accepted" });
      },
    );
    await open(url).sendUserMessage("x");
    assert.equal(requests.length, 3);
  });
});

test("refuses a message larger than the gateway takes, in bytes", async () => {
  const { url } = await scriptedGateway((peer) => peer.send(welcome(), token(1)));
  const session = open(url);
  await take(session, 1);
  await assert.rejects(session.sendUserMessage("ä".repeat(500)), RangeError);
});

test("withdraws a message whose signal is aborted", async () => {
  const { url } = await scriptedGateway((peer) => peer.send(welcome()));
  const session = open(url);
  const stop = new AbortController();
  const sending = session.sendUserMessage("x", { signal: stop.signal });
  stop.abort(new Error("enough"));
  await assert.rejects(sending, /enough/);
});

for (const code of [1000, 1009, 4400, 4403]) {
  test(`ends after ${code}`, async () => {
    const { url, requests } = await scriptedGateway((peer) => {
      peer.send(welcome(), token(1));
      peer.socket.close(code, "because");
    });
    const session = open(url);
    const sending = session.sendUserMessage("x");
    await assert.rejects(sending, (error) => error instanceof SessionEnded && error.code === code);
    const read = take(session, 2);
    if (code === 1000) assert.equal((await read).length, 1);
    else await assert.rejects(read, SessionEnded);
    assert.equal(requests.length, 1);
  });
}

for (const code of [1001, 1011, 1012, 1013, 4408, 4413, 4429]) {
  test(`comes back after ${code}`, async () => {
    const { url } = await scriptedGateway(
      (peer) => {
        peer.send(welcome(), token(1));
        peer.socket.close(code, "because");
      },
      (peer) => peer.send(welcome({ resumed: true }), token(2)),
    );
    const session = open(url);
    const seen = states(session);
    await take(session, 2);
    assert.equal(seen.find(({ state }) => state === "reconnecting").code, code);
  });
}

test("offers the token as a subprotocol, and gets a new one after 4401 and before expiry", async () => {
  const offered = [];
  let renewed;
  const { url } = await scriptedGateway(
    (peer, request) => {
      offered.push(request.headers["sec-websocket-protocol"]);
      peer.send(welcome(), token(1));
      peer.socket.close(4401, "expired");
    },
    async (peer, request) => {
      offered.push(request.headers["sec-websocket-protocol"]);
      peer.send(welcome({ resumed: true }), { type: "token_expiring", in_s: 30 });
      renewed = await peer.next("authenticate");
      peer.send(token(2));
    },
  );
  let count = 0;
  await take(open(url, { tokenProvider: async () => `token-${++count}` }), 2);
  assert.deepEqual(offered, ["codelab.v2.json,bearer.token-1", "codelab.v2.json,bearer.token-2"]);
  assert.equal(renewed.token, "token-3");
});

test("ends after 4401 when there is no way to a new token", async () => {
  const { url } = await scriptedGateway((peer) => {
    peer.send(welcome());
    peer.socket.close(4401, "expired");
  });
  await assert.rejects(take(open(url, { token: "abc" }), 1), (error) => error.code === 4401);
});

test("ends when one fresh token after the other is refused", async () => {
  const { url, requests } = await scriptedGateway((peer) => peer.socket.close(4401, "no"));
  await assert.rejects(take(open(url, { tokenProvider: async () => "abc" }), 1), (error) => error.code === 4401);
  assert.equal(requests.length, 4);
});

test("waits as long as a draining gateway asks for", async () => {
  const times = [];
  const { url } = await scriptedGateway(
    (peer) => {
      peer.send(welcome(), token(1), { type: "draining", reconnect_after_ms: 300 });
      times.push(Date.now());
      peer.socket.close(1012);
    },
    (peer) => {
      times.push(Date.now());
      peer.send(welcome({ resumed: true }), token(2));
    },
  );
  await take(open(url), 2);
  assert.ok(times[1] - times[0] >= 290, `${times[1] - times[0]} ms`);
});

test("backs off with full jitter, twice as long each time, to 30 s", async () => {
  const delays = [];
  class Refused extends EventTarget {
    constructor() {
      super();
      setTimeout(() => this.dispatchEvent(Object.assign(new Event("close"), { code: 1006, reason: "" })));
    }
    close() {}
  }
  const original = globalThis.setTimeout;
  globalThis.setTimeout = (callback, delay) => original(callback, Math.min(delay ?? 0, 1));
  try {
    const session = openSession("ws://unused", { sessionId: "s1", WebSocket: Refused, random: () => 1 });
    await new Promise((resolve) => session.addEventListener("state", ({ detail }) => {
      if (detail.state === "reconnecting") delays.push(detail.delayMs);
      if (delays.length === 8) resolve();
    }));
    session.close();
  } finally {
    globalThis.setTimeout = original;
  }
  assert.deepEqual(delays, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
});

test("opens no further socket while its events are not taken", async () => {
  const big = "x".repeat(1 << 20);
  const { url, requests } = await scriptedGateway((peer, _, index) => {
    const first = index * 5 + 1;
    peer.send(welcome({ resumed: index > 0 }));
    for (let seq = first; seq < first + 5; seq++) peer.send(token(seq, { token: big }));
    peer.socket.close(4413);
  });
  const session = open(url);
  await new Promise((resolve) => setTimeout(resolve, 300));
  assert.equal(requests.length, 1);
  assert.deepEqual((await take(session, 10)).map((event) => event.seq), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
});

test("reads a URL as a person gives it", () => {
  assert.equal(socketUrl("https://a.example", "s1"), "wss://a.example/api/v1/ws/s1");
  assert.equal(socketUrl("http://a.example:8000/prefix/", "s:1"), "ws://a.example:8000/prefix/api/v1/ws/s:1");
  assert.equal(socketUrl("ws://a.example/ws", "s1"), "ws://a.example/ws/s1");
  for (const [url, id] of [["ftp://a", "s"], ["http://a?token=x", "s"], ["http://u:p@a", "s"], ["http://a", "../s"], ["http://a", ".."]]) {
    assert.throws(() => socketUrl(url, id), TypeError);
  }
});

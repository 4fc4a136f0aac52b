/**
 * A client of the gateway's protocol v2 for browsers and Node: each event exactly once, in order, each message
 * done once, over any number of sockets. One file, no dependencies.
 *
 *     import { openSession } from "./client.js";
 *     const session = openSession("https://gateway.example", { sessionId: "s1", tokenProvider: fetchToken });
 *     await session.sendUserMessage("create hello.py that prints hello");
 *     for await (const event of session) console.log(event.type, event.token ?? "");
 *
 * In Node 20 pass a constructor: `openSession(url, { sessionId, WebSocket: ws })`; from Node 22 on there is one.
 */

const SUBPROTOCOL = "codelab.v2.json";
const ACK_EVENTS = 100;
const ACK_MS = 1000;
const ACK_BYTES = 256 * 1024;
const BUFFERED_BYTES = 4 * 1024 * 1024;
const BACKOFF_MS = 500;
const BACKOFF_CAP_MS = 30_000;
const LONGEST_RETRY_MS = 300_000;
/** A socket without a welcome by then is given up: a browser's own limit is minutes. */
const OPEN_MS = 10_000;
/** A message without an answer by then means a dead socket: pages cannot send pings. Ids make it safe. */
const ANSWER_MS = 20_000;
const WINDOW_SHARE = 0.9;
const TOKENS_REFUSED = 3;
const FINAL_CODES = new Set([1000, 1009, 4400, 4403]);
const SNAPSHOT_REASONS = new Set(["trimmed", "epoch_changed", "no_such_session"]);
/** Pages may only close with 1000 or 3000 to 4999, so this stands for 1002, protocol error. */
const PROTOCOL_ERROR = 4002;

/** The connection is over for good; `code` is a WebSocket close code of the protocol's section 6. */
export class SessionEnded extends Error {
  constructor(code, reason) {
    super(`${reason || "the session ended"} (close code ${code})`);
    this.name = "SessionEnded";
    this.code = code;
    this.reason = reason;
  }
}

/** The gateway refused a message for good; it was not carried out. `code` is for programs. */
export class MessageRefused extends Error {
  constructor(code, message) {
    super(message);
    this.name = "MessageRefused";
    this.code = code;
  }
}

/** A message was sent, not answered, and sending it again could do the work twice. Look before you ask again. */
export class OutcomeUnknown extends Error {
  constructor(message) {
    super(message);
    this.name = "OutcomeUnknown";
  }
}

class ProtocolError extends Error {}

/** Open a session and keep it connected until `close()`. See `GatewaySession` for the options. */
export function openSession(url, options) {
  return new GatewaySession(url, options);
}

/**
 * One session on a gateway. Iterate over it for its events, by one loop at a time; `snapshot` is the event that
 * stands for those which cannot be had any more. Dispatches `state` (a CustomEvent-like Event with `detail`:
 * `{state: "connecting" | "connected" | "reconnecting" | "ended", …}`).
 *
 * Options: `sessionId`; `token` or `tokenProvider` (async, called whenever a token is needed); `resume`
 * (`{epoch, lastSeq}` of the last event that an earlier page took); `WebSocket` (a constructor); `random`.
 */
export class GatewaySession extends EventTarget {
  /** What the gateway said when the latest socket was opened. */
  welcome = null;
  /** `{epoch, lastSeq}` up to where events have come in. */
  position = null;

  #url;
  #token;
  #tokenProvider;
  #WebSocket;
  #random;
  #socket = null;
  #phase = "closed"; // closed | awaiting welcome | awaiting snapshot | live
  #asked = null;
  #madeProgress = false;
  #outbox = new Map(); // id → unanswered message, in the order of sending
  #events = []; // {event, size}, not taken yet
  #buffered = 0;
  #reader = null; // the loop that waits for an event
  #taken = 0;
  #acked = 0;
  #unackedBytes = 0;
  #ackTimer = null;
  #openTimer = null;
  #retryTimer = null;
  #drainTimer = null;
  #comeBackAt = null;
  #attempts = 0;
  #needsToken;
  #tokensRefused = 0;
  #ended = null;
  #online = () => this.#networkIsBack();

  constructor(url, { sessionId, token, tokenProvider, resume, WebSocket, random = Math.random }) {
    super();
    this.#url = socketUrl(url, sessionId);
    this.#token = token;
    this.#tokenProvider = tokenProvider;
    this.#needsToken = token === undefined && tokenProvider !== undefined;
    this.#WebSocket = WebSocket ?? globalThis.WebSocket;
    if (!this.#WebSocket) throw new TypeError("There is no WebSocket here; pass one as an option.");
    this.#random = random;
    if (resume) {
      this.position = { epoch: resume.epoch, lastSeq: resume.lastSeq };
      this.#taken = this.#acked = resume.lastSeq;
    }
    globalThis.addEventListener?.("online", this.#online);
    this.#connect();
  }

  // ---------------------------------------------------------------- for the application

  sendUserMessage(content, { role, agentType, metadata, ...options } = {}) {
    return this.send("user_message", { content, role, agent_type: agentType, metadata }, options);
  }

  switchAgent(agentType, { content, reason, ...options } = {}) {
    return this.send("switch_agent", { agent_type: agentType, content, reason }, options);
  }

  /** Answer a tool call with `{result}` (any JSON) or `{error}` (a text). */
  toolResult(callId, { result = null, error, toolName, ...options }) {
    const outcome = error === undefined ? { result } : { error };
    return this.send("tool_result", { call_id: callId, tool_name: toolName, ...outcome }, options);
  }

  /** `decision` is "approve", "edit" (with `modifiedArguments`) or "reject". */
  decide(callId, decision, { modifiedArguments, feedback, ...options } = {}) {
    const fields = { call_id: callId, decision, modified_arguments: modifiedArguments, feedback };
    return this.send("hitl_decision", fields, options);
  }

  /** Stop the running turn, or the one named; false when there is none (any more). */
  async cancel(turnId, options = {}) {
    try {
      await this.send("cancel", { turn_id: turnId }, options);
      return true;
    } catch (error) {
      if (error instanceof MessageRefused && error.code === "NO_SUCH_TURN") return false;
      throw error;
    }
  }

  /**
   * Send any message; resolves with `{messageId, turnId, duplicate}` once the gateway holds it. Rejects with
   * `MessageRefused`, `OutcomeUnknown`, `SessionEnded`, or the reason of `signal`, after which it is not sent
   * again, and may or may not have been accepted.
   */
  send(type, fields, { id = newId(), signal } = {}) {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) throw signal.reason;
      if (this.#ended) throw this.#ended;
      if (this.#outbox.has(id)) throw new TypeError(`A message with the id ${id} waits for its answer already.`);
      const text = JSON.stringify({ type, id, ...fields });
      const limit = this.welcome?.limits?.max_message_bytes;
      const size = new TextEncoder().encode(text).length;
      if (size > limit) throw new RangeError(`The message has ${size} bytes and the gateway takes ${limit}.`);
      const abort = () => this.#settle(id, (waiting) => waiting.reject(signal.reason));
      signal?.addEventListener("abort", abort, { once: true });
      const done = () => signal?.removeEventListener("abort", abort);
      this.#outbox.set(id, { text, resolve, reject, done, attempts: 0, firstSent: null, epoch: null, timer: null });
      if (this.#isLive) this.#transmit(id);
    });
  }

  /** Close the session from this side. Loops over it end; unanswered messages are rejected. */
  close() {
    this.#end(1000, "the session was closed");
  }

  [Symbol.asyncIterator]() {
    return { next: () => this.#next(), return: async () => ({ done: true, value: undefined }) };
  }

  async #next() {
    if (this.#reader) throw new TypeError("Another loop is reading this session's events.");
    while (this.#events.length === 0) {
      if (this.#ended?.code === 1000) return { done: true, value: undefined };
      if (this.#ended) throw this.#ended;
      await new Promise((resolve) => (this.#reader = resolve));
    }
    const { event, size } = this.#events.shift();
    this.#buffered -= size;
    this.#noteTaken(event, size);
    if (this.#phase === "waiting for room" && this.#buffered < BUFFERED_BYTES) this.#connect();
    return { done: false, value: event };
  }

  #wakeReader() {
    const wake = this.#reader;
    this.#reader = null;
    wake?.();
  }

  // ---------------------------------------------------------------- sockets, one after another

  get #isLive() {
    return this.#phase === "live" || this.#phase === "awaiting snapshot";
  }

  async #connect() {
    clearTimeout(this.#retryTimer);
    if (this.#buffered >= BUFFERED_BYTES) {
      // Nobody takes the events: another socket would only bring more of them.
      this.#phase = "waiting for room";
      return;
    }
    this.#phase = "connecting";
    if (this.#needsToken) {
      try {
        this.#token = await this.#tokenProvider();
        this.#needsToken = false;
      } catch {
        if (!this.#ended) this.#reconnect(4401, "no token");
        return;
      }
      if (this.#ended) return;
    }
    this.#setState("connecting", { attempt: this.#attempts + 1 });
    this.#asked = this.position && { ...this.position };
    this.#madeProgress = false;
    this.#comeBackAt = null;
    const place = this.#asked;
    const query = place ? `?epoch=${encodeURIComponent(place.epoch)}&last_seq=${place.lastSeq}` : "";
    const protocols = this.#token === undefined ? [SUBPROTOCOL] : [SUBPROTOCOL, `bearer.${this.#token}`];
    let socket;
    try {
      socket = new this.#WebSocket(this.#url + query, protocols);
    } catch {
      // Trying again would not help; and a browser's own words repeat the token.
      this.#end(4400, "no socket can be made of this URL and token");
      return;
    }
    this.#socket = socket;
    this.#phase = "awaiting welcome";
    this.#openTimer = setTimeout(() => this.#drop(socket, 1006, "no welcome in time"), OPEN_MS);
    socket.addEventListener("message", ({ data }) => socket === this.#socket && this.#received(socket, data));
    socket.addEventListener("close", ({ code, reason }) => this.#lost(socket, code, reason));
    socket.addEventListener("error", () => {}); // A close follows.
  }

  /** Leave a socket now, not waiting for its close, and go on as if it had closed with `code`. */
  #drop(socket, code, reason, closeWith = 1000) {
    if (socket !== this.#socket) return;
    socket.close(closeWith);
    this.#lost(socket, code, reason);
  }

  #lost(socket, code, reason) {
    if (socket !== this.#socket || this.#ended) return;
    const hadWelcome = this.#phase !== "awaiting welcome";
    this.#socket = null;
    this.#phase = "closed";
    clearTimeout(this.#openTimer);
    clearTimeout(this.#ackTimer);
    clearTimeout(this.#drainTimer);
    this.#ackTimer = null;
    for (const waiting of this.#outbox.values()) clearTimeout(waiting.timer);
    if (this.#madeProgress) this.#tokensRefused = 0;
    if (this.#madeProgress && code !== PROTOCOL_ERROR) this.#attempts = 0;
    if (FINAL_CODES.has(code)) {
      this.#end(code, reason);
    } else if (code === 4401 && (!this.#tokenProvider || ++this.#tokensRefused > TOKENS_REFUSED)) {
      this.#end(code, reason);
    } else {
      // Pages are not told the status of a refused upgrade; it may have been the token.
      if (this.#tokenProvider && (code === 4401 || !hadWelcome)) this.#needsToken = true;
      this.#reconnect(code, reason);
    }
  }

  #reconnect(code, reason) {
    let delay = this.#random() * Math.min(BACKOFF_CAP_MS, BACKOFF_MS * 2 ** Math.min(this.#attempts, 16));
    if (this.#comeBackAt !== null) delay = Math.max(0, this.#comeBackAt - Date.now());
    else this.#attempts++;
    this.#phase = "closed";
    this.#setState("reconnecting", { delayMs: delay, attempt: this.#attempts, code, reason });
    this.#retryTimer = setTimeout(() => this.#connect(), delay);
  }

  #networkIsBack() {
    if (this.#socket) this.#drop(this.#socket, 1006, "the network changed");
    if (this.#phase === "closed" && !this.#ended) this.#connect();
  }

  #end(code, reason) {
    if (this.#ended) return;
    if (this.#phase === "live" && this.#taken > this.#acked) this.#acknowledge();
    this.#ended = new SessionEnded(code, reason);
    globalThis.removeEventListener?.("online", this.#online);
    for (const timer of [this.#openTimer, this.#ackTimer, this.#drainTimer, this.#retryTimer]) clearTimeout(timer);
    this.#socket?.close(1000);
    this.#socket = null;
    this.#phase = "closed";
    for (const id of [...this.#outbox.keys()]) this.#settle(id, (waiting) => waiting.reject(this.#ended));
    this.#setState("ended", { code, reason });
    this.#wakeReader();
  }

  #setState(state, detail) {
    const event = new Event("state");
    event.detail = { state, ...detail };
    this.dispatchEvent(event);
  }

  // ---------------------------------------------------------------- down

  #received(socket, data) {
    try {
      if (typeof data !== "string") throw new ProtocolError("a binary frame");
      const frame = parse(data);
      const items = Array.isArray(frame) ? frame : [frame];
      const size = Math.ceil(data.length / Math.max(1, items.length));
      for (const fields of items) {
        if (socket !== this.#socket) return;
        this.#receive(fields, size);
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      // Resumed on another socket, everything comes again from the first event that is missing.
      this.#drop(socket, PROTOCOL_ERROR, error.message, PROTOCOL_ERROR);
    } finally {
      this.#wakeReader();
    }
  }

  #receive(fields, size) {
    const type = fields?.type;
    if (typeof type !== "string") throw new ProtocolError("an object without a type");
    if (this.#phase === "awaiting welcome") {
      if (type !== "welcome") throw new ProtocolError(`${type} before the welcome`);
      this.#welcomed(fields);
      return;
    }
    this.#madeProgress = true;
    // An agent may call its events as it likes: its own have a seq, and its own snapshot has no epoch.
    const isSnapshot =
      type === "snapshot" && typeof fields.epoch === "string" && SNAPSHOT_REASONS.has(fields.reason);
    if (isSnapshot) this.#snapshot(fields, size);
    else if ("seq" in fields) this.#event(fields, size);
    else this.#control(fields);
  }

  #welcomed(welcome) {
    if (typeof welcome.epoch !== "string" || !isSeq(welcome.last_seq)) throw new ProtocolError("a malformed welcome");
    clearTimeout(this.#openTimer);
    this.welcome = welcome;
    if (this.#asked === null) {
      this.position = { epoch: welcome.epoch, lastSeq: welcome.last_seq };
      this.#taken = this.#acked = welcome.last_seq;
      this.#phase = "live";
    } else if (welcome.resumed !== true) {
      // The old place is kept until the snapshot has come: cut here, we ask from there again.
      this.#phase = "awaiting snapshot";
    } else if (welcome.epoch !== this.#asked.epoch) {
      throw new ProtocolError("it resumed another epoch than was asked for");
    } else {
      this.#phase = "live";
    }
    this.#setState("connected", { welcome });
    for (const id of [...this.#outbox.keys()]) this.#transmitAgain(id);
  }

  #snapshot(fields, size) {
    if (!isSeq(fields.seq)) throw new ProtocolError("a snapshot without a seq");
    const isSameEpoch = fields.epoch === this.position.epoch;
    const isBack = !isSameEpoch || fields.seq < this.position.lastSeq;
    if (isBack && isSameEpoch && this.#phase === "live") throw new ProtocolError("a snapshot of the past");
    if (isBack) this.#taken = this.#acked = 0;
    this.#phase = "live";
    this.#deliver(fields, { epoch: fields.epoch, lastSeq: fields.seq }, size);
  }

  #event(fields, size) {
    if (this.#phase !== "live") throw new ProtocolError("an event before its snapshot");
    const { seq } = fields;
    const first = fields.type === "assistant_message" && "first_seq" in fields ? fields.first_seq : seq;
    if (!isSeq(seq) || !isSeq(first) || first > seq) throw new ProtocolError("an event with a wrong seq");
    if (seq <= this.position.lastSeq) return; // A repeat.
    if (first !== this.position.lastSeq + 1) {
      throw new ProtocolError(`event ${first} after ${this.position.lastSeq}`);
    }
    this.#deliver(fields, { epoch: this.position.epoch, lastSeq: seq }, size);
  }

  #deliver(fields, position, size) {
    this.position = position;
    this.#events.push({ event: { ...fields, epoch: position.epoch }, size });
    this.#buffered += size;
  }

  #noteTaken(event, size) {
    if (event.epoch !== this.position.epoch || event.seq <= this.#taken) return;
    this.#taken = event.seq;
    this.#unackedBytes += size;
    if (this.#phase !== "live") return;
    if (this.#taken - this.#acked >= ACK_EVENTS || this.#unackedBytes >= ACK_BYTES) this.#acknowledge();
    else this.#ackTimer ??= setTimeout(() => this.#phase === "live" && this.#acknowledge(), ACK_MS);
  }

  #acknowledge() {
    clearTimeout(this.#ackTimer);
    this.#ackTimer = null;
    this.#acked = this.#taken;
    this.#unackedBytes = 0;
    this.#write(JSON.stringify({ type: "ack", seq: this.#acked }));
  }

  // ---------------------------------------------------------------- up

  #control(fields) {
    const { type, id } = fields;
    if (type === "ack") {
      const answer = { messageId: id, turnId: fields.turn_id ?? null, duplicate: fields.status === "duplicate" };
      this.#settle(id, (waiting) => waiting.resolve(answer));
    } else if (type === "nack") {
      this.#refused(fields);
    } else if (type === "token_expiring") {
      this.#renewToken();
    } else if (type === "draining") {
      this.#leaveSoon(Math.max(0, Number(fields.reconnect_after_ms) || 0));
    } else if (type === "welcome") {
      throw new ProtocolError("a second welcome");
    }
  }

  #refused({ id, code, message, retryable, retry_after_s: retryAfter }) {
    const waiting = this.#outbox.get(id);
    if (!waiting) return;
    if (retryable !== true) {
      this.#settle(id, () => waiting.reject(new MessageRefused(code, message)));
      return;
    }
    clearTimeout(waiting.timer);
    const bound = Math.min(BACKOFF_CAP_MS, BACKOFF_MS * 2 ** Math.min(waiting.attempts++, 16));
    const delay = Math.max(this.#random() * bound, Math.min((Number(retryAfter) || 0) * 1000, LONGEST_RETRY_MS));
    waiting.timer = setTimeout(() => this.#isLive && this.#transmit(id), delay);
  }

  #settle(id, tell) {
    const waiting = this.#outbox.get(id);
    if (!waiting) return;
    this.#outbox.delete(id);
    clearTimeout(waiting.timer);
    waiting.done();
    tell(waiting);
  }

  #transmit(id) {
    const waiting = this.#outbox.get(id);
    if (waiting.firstSent === null) {
      waiting.firstSent = Date.now();
      waiting.epoch = this.welcome.epoch;
    }
    clearTimeout(waiting.timer);
    const socket = this.#socket;
    waiting.timer = setTimeout(() => this.#drop(socket, 1006, "a message was not answered in time"), ANSWER_MS);
    this.#write(waiting.text);
  }

  /** On a new socket: send again under the same id, unless that could do the work twice. */
  #transmitAgain(id) {
    const { firstSent, epoch } = this.#outbox.get(id);
    const window = (this.welcome.dedupe_window_s ?? 86_400) * 1000 * WINDOW_SHARE;
    if (firstSent === null || (epoch === this.welcome.epoch && Date.now() - firstSent <= window)) {
      this.#transmit(id);
      return;
    }
    const why = "The message was sent, and the gateway has forgotten its id since. Look before you ask again.";
    this.#settle(id, (waiting) => waiting.reject(new OutcomeUnknown(why)));
  }

  #write(text) {
    // What cannot be sent now is sent again on the next socket, or need not be.
    if (this.#socket?.readyState === 1) this.#socket.send(text);
  }

  async #renewToken() {
    if (!this.#tokenProvider) return;
    const socket = this.#socket;
    try {
      this.#token = await this.#tokenProvider();
    } catch {
      return; // The socket ends with 4401 at expiry, and then a token is asked for again.
    }
    if (socket !== this.#socket || !this.#isLive) return;
    this.#write(JSON.stringify({ type: "authenticate", id: newId(), token: this.#token }));
  }

  #leaveSoon(delay) {
    this.#comeBackAt = Date.now() + delay;
    const socket = this.#socket;
    this.#drainTimer = setTimeout(() => this.#drop(socket, 1001, "the gateway is restarting"), delay);
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ProtocolError("a frame that is not JSON");
  }
}

function isSeq(value) {
  return Number.isSafeInteger(value) && value >= 0;
}

function newId() {
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The socket of a session on the gateway at `url`: where it is, or its WebSocket endpoint. */
export function socketUrl(url, sessionId) {
  if (!/^[A-Za-z0-9._:-]{1,128}$/.test(sessionId ?? "") || sessionId === "." || sessionId === "..") {
    throw new TypeError("A session id is 1 to 128 characters of A-Z a-z 0-9 . _ : - and neither . nor ..");
  }
  const parsed = new URL(url);
  const scheme = { "http:": "ws:", "https:": "wss:", "ws:": "ws:", "wss:": "wss:" }[parsed.protocol];
  if (!scheme || parsed.search || parsed.hash || parsed.username) {
    throw new TypeError("The gateway's URL is http, https, ws or wss, without user, query or fragment.");
  }
  const path = parsed.pathname.replace(/\/+$/, "");
  return `${scheme}//${parsed.host}${path.endsWith("/ws") ? path : `${path}/api/v1/ws`}/${sessionId}`;
}

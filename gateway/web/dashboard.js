// The dashboard: figures of the gateway, live. The key stays in `secret`, and nowhere else.

import { byId, element } from "./elements.js";
import { followEvents, Refused, reasonOf } from "./event_stream.js";
import { Plot, bytes, duration, short, sparkline } from "./plot.js";
import { SessionTable } from "./session_table.js";

const KEPT_SAMPLES = 600;
const KEPT_TROUBLES = 200;
const SPARK_SAMPLES = 120;
const FILTER_PAUSE_MS = 250;

let secret = null; // the header that opens the dashboard
let stream = null;
let samples = []; // objects by column, oldest first
let openSession = null;
let isClosing = false;
let drewTroubles = 0;
let isFresh = true; // nothing of this connection was drawn yet: the gateway may be another than before

const throughput = new Plot(byId("throughput"), {
  title: "Throughput",
  series: [{ label: "tokens/s" }, { label: "frames/s" }],
  format: short,
});
const latency = new Plot(byId("latency"), {
  title: "Latency added",
  series: [{ label: "p50" }, { label: "p99" }, { label: "loop lag" }],
  format: duration,
  isLogarithmic: true, // a token's microseconds and a hiccup's hundred milliseconds on one plot
});
const table = new SessionTable(byId("sessions"), showSession);

const TILES = [
  { title: "Sockets", value: (s) => s.sockets, text: short, note: (s) => `${short(s.sessions)} sessions` },
  { title: "Turns running", value: (s) => s.turns_running, text: short, note: (s) => `${short(s.turns_waiting)} waiting` },
  { title: "Tokens", value: (s) => s.tokenRate, text: (v) => `${short(v)}/s`, note: (s) => `${short(s.tokens)} in all` },
  { title: "Sent to sockets", value: (s) => s.sentRate, text: (v) => `${bytes(v)}/s`, note: (s) => `${bytes(s.bytes_sent)} in all` },
  { title: "Added to a token", value: (s) => s.added_p50, text: duration, note: (s) => `p99 ${duration(s.added_p99)}` },
  { title: "Event-loop lag", value: (s) => s.lag, text: duration, note: () => "worst of each second" },
].map((tile) => {
  const value = element("b", {}, "–");
  const note = element("small", {});
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  byId("tiles").append(element("div", { class: "tile" }, element("h3", {}, tile.title), value, note, svg));
  return { ...tile, elements: { value, note, svg } };
});

// ---------------------------------------------------------------- the key

byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("secret").value.trim();
  const kind = document.querySelector('input[name="kind"]:checked').value;
  byId("secret").value = "";
  if (!given) return;
  secret = kind === "key" ? { "X-Internal-Auth": given } : { Authorization: `Bearer ${given}` };
  byId("login-problem").textContent = "";
  connect();
});

byId("lock").addEventListener("click", () => lock(""));

function lock(problem) {
  stream?.abort();
  stream = secret = null;
  samples = [];
  table.show([], 0);
  byId("troubles").replaceChildren();
  byId("session-dialog").close();
  byId("live").hidden = byId("lock").hidden = true;
  byId("login").hidden = false;
  byId("login-problem").textContent = problem;
  status("ended", "Locked");
  byId("secret").focus();
}

function status(state, text) {
  byId("status").dataset.state = state;
  byId("status-text").textContent = text;
}

// ---------------------------------------------------------------- the stream

async function connect() {
  stream?.abort();
  const ours = (stream = new AbortController());
  isFresh = true;
  status("connecting", "Connecting…");
  try {
    await followEvents(() => `dashboard/events?filter=${encodeURIComponent(byId("filter").value.trim())}`, secret, {
      signal: ours.signal,
      received: (type, data) => ours === stream && (type === "pulse" ? pulse(data) : status("reconnecting", "The gateway stops…")),
      lost: (seconds) => {
        if (ours !== stream) return;
        isFresh = true;
        status("reconnecting", `No connection; next try in ${seconds} s`);
      },
    });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (ours === stream) lock(error.message);
  }
}

function pulse({ now, columns, worker, samples: rows, sessions, found, troubles }) {
  if (byId("live").hidden) {
    byId("live").hidden = byId("lock").hidden = false;
    byId("login").hidden = true;
  }
  status("connected", worker ? `Live: worker ${worker[0]} of ${worker[1]}` : "Live");
  if (isFresh) {
    isFresh = false;
    samples = [];
    drewTroubles = 0;
    byId("troubles").replaceChildren();
  }
  for (const row of rows) addSample(Object.fromEntries(columns.map((name, index) => [name, row[index]])));
  showSamples();
  table.show(sessions, now);
  byId("no-sessions").hidden = sessions.length > 0;
  const filter = byId("filter").value.trim();
  byId("no-sessions").textContent = filter ? `No live session has ${filter} in its id.` : "No session is live.";
  byId("sessions-count").textContent = found > sessions.length ? `${sessions.length} of ${found}` : String(found);
  showTroubles(troubles);
  const shown = sessions.find((session) => session.session_id === openSession);
  if (openSession !== null && !isClosing && shown) refreshSession();
}

function addSample(sample) {
  const before = samples.at(-1);
  if (before && sample.at <= before.at) return;
  const seconds = before ? Math.max(0.001, sample.at - before.at) : 1;
  const rate = (name) => (before ? (sample[name] - before[name]) / seconds : 0);
  samples.push({ ...sample, tokenRate: rate("tokens"), frameRate: rate("frames_sent"), sentRate: rate("bytes_sent") });
  if (samples.length > KEPT_SAMPLES) samples.shift();
}

function showSamples() {
  const last = samples.at(-1);
  if (!last) return;
  const recent = samples.slice(-SPARK_SAMPLES);
  // Nothing is timed in a second without tokens: the newest that was stands.
  const timed = samples.findLast((sample) => sample.added_p50 !== null);
  for (const { value, text, note, elements } of TILES) {
    const source = value(last) === null ? timed : last;
    elements.value.textContent = source ? text(value(source)) : "–";
    elements.note.textContent = note && source ? note(source) : "";
    sparkline(elements.svg, recent.map((sample) => value(sample) ?? 0));
  }
  throughput.draw(samples.map((s) => ({ at: s.at, values: [s.tokenRate, s.frameRate] })));
  latency.draw(samples.map((s) => ({ at: s.at, values: [s.added_p50, s.added_p99, s.lag] })));
}

// ---------------------------------------------------------------- log entries

function entry({ at, level, event, fields, cause }, leftOut = []) {
  const told = Object.entries(fields).filter(([name]) => !leftOut.includes(name));
  if (cause) told.push(["cause", cause]);
  return element(
    "li",
    { class: `is-${level}` },
    element("time", { datetime: new Date(at * 1000).toISOString() }, new Date(at * 1000).toLocaleTimeString([], { hour12: false })),
    element("b", {}, event.replaceAll("_", " ")),
    element("span", { class: "fields" }, told.map(([name, value]) => `${name}=${value}`).join("  ")),
  );
}

function showTroubles(troubles) {
  const list = byId("troubles");
  for (const trouble of troubles) {
    if (trouble.number <= drewTroubles) continue;
    drewTroubles = trouble.number;
    list.prepend(entry(trouble));
  }
  while (list.children.length > KEPT_TROUBLES) list.lastElementChild.remove();
  byId("no-troubles").hidden = list.children.length > 0;
  byId("troubles-count").textContent = list.children.length ? String(list.children.length) : "";
}

// ---------------------------------------------------------------- one session

const dialog = byId("session-dialog");

function showSession(sessionId) {
  openSession = sessionId;
  isClosing = false;
  byId("session-title").textContent = sessionId;
  byId("session-facts").replaceChildren();
  byId("timeline").replaceChildren();
  byId("session-problem").textContent = "";
  byId("session-close").textContent = "Close this session…";
  byId("session-close").hidden = false;
  dialog.showModal();
  refreshSession();
}

async function refreshSession() {
  const asked = openSession;
  const response = await ask(`dashboard/sessions/${encodeURIComponent(asked)}`, "GET");
  if (!response || asked !== openSession) return;
  const { session, timeline } = response;
  byId("session-close").hidden = session === null;
  const facts = session === null ? { State: "not live" } : factsOf(session);
  byId("session-facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
  const list = byId("timeline");
  const newest = timeline.at(-1)?.number ?? 0;
  if (list.dataset.newest === `${asked} ${newest}`) return;
  list.dataset.newest = `${asked} ${newest}`;
  list.replaceChildren(...timeline.reverse().map((item) => entry(item, leftOut(item))));
}

/** What all entries of a timeline have, or say already when the socket is opened. */
function leftOut({ event }) {
  return event === "socket_opened" ? ["session_id"] : ["session_id", "request_id", "dialect", "client"];
}

function factsOf(session) {
  return {
    State: session.state.replaceAll("_", " "),
    Agent: session.agent || "–",
    Turn: session.turn_id ?? "–",
    Sockets: session.dialects.join(", ") || "none",
    "Round trip": duration(session.rtt),
    Unacknowledged: bytes(session.unacked_bytes),
    Queued: String(session.queued),
    "Last event": String(session.last_seq),
    "Held for replay": bytes(session.held_bytes),
    "Last error": session.last_error || "–",
  };
}

async function ask(path, method) {
  try {
    const response = await fetch(path, { method, headers: secret, cache: "no-store", credentials: "omit" });
    if (response.ok) return await response.json();
    byId("session-problem").textContent = await reasonOf(response);
  } catch {
    byId("session-problem").textContent = "No connection to the gateway.";
  }
  return null;
}

byId("session-dismiss").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => (openSession = null));
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

byId("session-close").addEventListener("click", async () => {
  if (!isClosing) {
    isClosing = true;
    byId("session-close").textContent = "Really: cancel its turn, close its sockets";
    return;
  }
  isClosing = false;
  byId("session-close").textContent = "Close this session…";
  if (await ask(`dashboard/sessions/${encodeURIComponent(openSession)}/close`, "POST")) refreshSession();
});

// ---------------------------------------------------------------- the filter

let filterTimer = null;
byId("filter").addEventListener("input", () => {
  clearTimeout(filterTimer);
  filterTimer = setTimeout(() => secret && connect(), FILTER_PAUSE_MS);
});

byId("secret").focus();

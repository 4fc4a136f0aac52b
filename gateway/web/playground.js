// The playground: a whole IDE client in one page, on client.js and a folder in memory.

import { GatewaySession, MessageRefused } from "./client.js";
import { byId, element, makeTabs } from "./elements.js";
import { Folder, ToolFailed } from "./folder.js";
import { Plug } from "./plug.js";
import { ToolCard } from "./tool_card.js";
import { Transcript } from "./transcript.js";
import { Wire } from "./wire.js";

const FIRST_FILES = {
  "README.md": "# A folder in your browser\n\nThe agent reads and writes here. Reload the page, and it is as it was.\n",
  "greet.py": 'def greet(name):\n    """Say something nice."""\n    return f"hello, {name}"\n\n\nprint(greet("world"))\n',
};
const TRIES_BEFORE_ADVICE = 3;
const NARROW = matchMedia("(max-width: 860px)");

const plug = new Plug();
const folder = new Folder(FIRST_FILES);
const transcript = new Transcript(byId("transcript"));
const wire = new Wire(byId("frames"));

let session = null;
let token; // in memory only
let cards = new Map(); // by call id
let runningTurns = new Set();
let lostAt = null; // {time, lastSeq} of the last event before the connection was lost
let replayedUntil = 0;
let count = freshCount();

function freshCount() {
  return { events: 0, missing: 0, twice: 0, resumes: 0, epoch: null, last: null };
}

// ---------------------------------------------------------------- the connection

function open(sessionId) {
  const previous = session;
  session = null;
  previous?.close();
  cards = new Map();
  runningTurns = new Set();
  lostAt = null;
  replayedUntil = 0;
  count = freshCount();
  showSum();
  const opened = new GatewaySession(gatewayUrl(), { sessionId, token, WebSocket: plug.WebSocket });
  session = opened;
  globalThis.history.replaceState(null, "", `#${sessionId}`);
  opened.addEventListener("state", ({ detail }) => opened === session && connectionChanged(detail));
  follow(opened);
}

/** Where this page came from, whatever folder a proxy put it in. */
function gatewayUrl() {
  return new URL(".", location.href.split(/[?#]/)[0]).href;
}

async function follow(opened) {
  try {
    for await (const event of opened) {
      if (opened !== session) return;
      show(event);
    }
  } catch {
    // It ended; the state says how.
  }
}

function connectionChanged({ state, welcome, attempt, reason, code }) {
  if (state === "connected") {
    status("connected", "Connected", ` · ${welcome.session_id}`);
    welcomed(welcome);
  } else if (state === "reconnecting") {
    if (lostAt === null && session.welcome) {
      lostAt = { time: performance.now(), lastSeq: session.position.lastSeq };
      wire.mark(plug.isPulled ? "the plug was pulled" : `connection lost (${reason || code})`, "bad");
    }
    const advice = attempt > TRIES_BEFORE_ADVICE && !plug.isPulled ? " Does the gateway want a token? See Connection." : "";
    status(plug.isPulled ? "unplugged" : "reconnecting", (plug.isPulled ? "Unplugged" : "Reconnecting…") + advice);
  } else if (state === "ended") {
    status("ended", `Ended: ${reason || code}`);
    transcript.note(`The session ended: ${reason || code}. Open another one under Connection.`, "bad");
    runningTurns.clear();
    showRunning();
  }
}

function welcomed(welcome) {
  const lost = lostAt;
  lostAt = null;
  if (lost !== null && welcome.resumed) {
    const seconds = ((performance.now() - lost.time) / 1000).toFixed(1);
    const missed = welcome.last_seq - lost.lastSeq;
    replayedUntil = welcome.last_seq;
    count.resumes += 1;
    const kept = missed === 0 ? "nothing was missed" : `${missed} events caught up`;
    wire.mark(`resumed after ${seconds} s at event ${lost.lastSeq}`, "good");
    transcript.resumed(`resumed after ${seconds} s · ${kept}`);
    showSum();
  }
  if (welcome.turn?.state === "running") runningTurns.add(welcome.turn.id);
  for (const call of welcome.pending ?? []) takeCall(call);
  showRunning();
}

/** `detail` is left out where there is no room for it. */
function status(state, text, detail = "") {
  byId("status").dataset.state = state;
  byId("status-text").replaceChildren(text, element("span", { class: "detail" }, detail));
}

// ---------------------------------------------------------------- events

function show(event) {
  switch (event.type) {
    case "assistant_message":
      transcript.token(event.token ?? "", event.seq <= replayedUntil);
      if (event.is_final) transcript.end();
      break;
    case "agent_switched":
      transcript.switched(event.from_agent, event.to_agent, event.reason);
      showAgent(event.to_agent);
      break;
    case "tool_call":
      takeCall(event);
      break;
    case "approval_resolved":
      resolvedElsewhere(event);
      break;
    case "turn_started":
      runningTurns.add(event.turn_id);
      showRunning();
      break;
    case "turn_ended":
      runningTurns.delete(event.turn_id);
      transcript.end();
      if (event.outcome === "cancelled") transcript.note("Stopped.");
      else if (event.outcome !== "completed" && event.outcome !== "failed") transcript.note(`The turn ended: ${event.outcome}.`, "bad");
      showRunning();
      break;
    case "error":
      transcript.note(`${event.error ?? event.content} (${event.code})`, "bad");
      break;
    case "snapshot":
      transcript.note(`Events that are no longer held were skipped (${event.reason}); this is where things stand.`);
      if (event.text) transcript.token(event.text, true);
      runningTurns = new Set(event.turn?.state === "running" ? [event.turn.id] : []);
      for (const call of event.pending ?? []) takeCall(call);
      showRunning();
      break;
  }
}

function showAgent(name) {
  const select = byId("agent");
  if (![...select.options].some((option) => option.value === name)) select.append(element("option", {}, name));
  select.value = name;
}

function showRunning() {
  byId("stop").hidden = runningTurns.size === 0;
}

// ---------------------------------------------------------------- tool calls

function takeCall(call) {
  if (cards.has(call.call_id)) return;
  const card = new ToolCard(call, (decision, details) => decide(call, decision, details));
  cards.set(call.call_id, { card, call, isOurs: false });
  transcript.card(card.root);
  hideWelcome();
  if (!call.requires_approval) run(call, call.arguments ?? {});
  else if (call.decision) card.set("running", `${call.decision} elsewhere`);
}

async function decide(call, decision, { arguments: changed, feedback } = {}) {
  const known = cards.get(call.call_id);
  known.isOurs = true;
  try {
    await session.decide(call.call_id, decision, { modifiedArguments: changed, feedback });
  } catch (error) {
    known.card.set("failed", "not decided", error.message);
    return;
  }
  if (decision !== "reject") await run(call, changed ?? call.arguments ?? {});
}

async function run(call, args) {
  const { card } = cards.get(call.call_id);
  let outcome;
  try {
    outcome = { result: folder.run(call.tool_name, args) };
  } catch (error) {
    if (!(error instanceof ToolFailed)) throw error;
    outcome = { error: error.message };
  }
  const isLong = typeof outcome.result === "string" && outcome.result.includes("\n");
  const said = outcome.error ?? (isLong ? `${outcome.result.split("\n").length} lines` : outcome.result);
  card.set(outcome.error ? "failed" : "done", outcome.error ? "failed" : "done", said);
  try {
    await session.toolResult(call.call_id, { ...outcome, toolName: call.tool_name });
  } catch (error) {
    if (error instanceof MessageRefused) card.set("failed", "not taken", error.message);
  }
}

function resolvedElsewhere({ call_id: callId, decision }) {
  const known = cards.get(callId);
  if (known && !known.isOurs) known.card.set(decision === "reject" ? "rejected" : "running", `${decision} in another window`);
}

// ---------------------------------------------------------------- what was received, frame by frame

plug.addEventListener("frame", ({ direction, data, at }) => {
  wire.frame(direction, data, at);
  if (direction === "down") check(data);
});

/** Counts on the raw frames, before client.js has seen them: it would hide a repeat. */
function check(data) {
  const frame = JSON.parse(data);
  for (const item of Array.isArray(frame) ? frame : [frame]) {
    if (item.type === "welcome" && !("seq" in item)) {
      if (item.epoch !== count.epoch) Object.assign(count, { epoch: item.epoch, last: item.last_seq });
    } else if (item.type === "snapshot") {
      Object.assign(count, { epoch: item.epoch, last: item.seq });
    } else if ("seq" in item) {
      const first = item.first_seq ?? item.seq;
      count.events += item.seq - first + 1;
      if (first > count.last + 1) count.missing += first - count.last - 1;
      if (first <= count.last) count.twice += count.last - first + 1;
      count.last = item.seq;
    }
  }
  showSum();
}

function showSum() {
  for (const name of ["events", "missing", "twice", "resumes"]) byId(`sum-${name}`).textContent = String(count[name]);
  byId("sum").classList.toggle("is-wrong", count.missing + count.twice > 0);
}

// ---------------------------------------------------------------- the plug

function plugChanged() {
  byId("plug").setAttribute("aria-pressed", String(plug.isPulled));
  byId("plug-text").textContent = plug.isPulled ? "Put it back" : "Pull the plug";
  byId("unplugged").hidden = !plug.isPulled;
  if (plug.isPulled) status("unplugged", "Unplugged");
}

plug.addEventListener("change", plugChanged);
byId("plug").addEventListener("click", () => (plug.isPulled ? plug.putBack() : plug.pull()));
byId("put-back").addEventListener("click", () => {
  plug.putBack();
  byId("message").focus();
});

// ---------------------------------------------------------------- the folder

let shownFile = "greet.py";
const changedFiles = new Set();

function showFolder() {
  byId("files").replaceChildren(
    ...folder.paths.map((path) => {
      const choose = () => {
        shownFile = path;
        changedFiles.delete(path);
        showFolder();
      };
      const name = element("button", { type: "button", "aria-pressed": String(path === shownFile), on: { click: choose } }, path);
      name.classList.toggle("is-new", changedFiles.has(path));
      return element("li", {}, name);
    }),
  );
  byId("file").textContent = folder.content(shownFile);
  for (const id of ["folder-badge", "side-badge"]) {
    byId(id).hidden = changedFiles.size === 0;
    byId(id).textContent = String(changedFiles.size);
  }
}

folder.addEventListener("change", ({ path }) => {
  changedFiles.add(path);
  shownFile = path;
  showFolder();
});

// ---------------------------------------------------------------- the person

function hideWelcome() {
  byId("welcome").hidden = true;
}

async function say(text) {
  hideWelcome();
  transcript.said(text);
  try {
    const { turnId } = await session.sendUserMessage(text);
    if (turnId) showRunning();
  } catch (error) {
    transcript.note(error.message, "bad");
  }
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("message").value.trim();
  if (!text) return;
  byId("message").value = "";
  say(text);
});

byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});

byId("tries").addEventListener("click", (event) => {
  const text = event.target.closest("button")?.dataset.say;
  if (text) say(text);
  if (!NARROW.matches) byId("message").focus();
});

byId("stop").addEventListener("click", async () => {
  try {
    await session.cancel();
  } catch (error) {
    transcript.note(error.message, "bad");
  }
});

byId("agent").addEventListener("change", async ({ target }) => {
  hideWelcome();
  try {
    await session.switchAgent(target.value);
  } catch (error) {
    transcript.note(error.message, "bad");
  }
});

byId("clear").addEventListener("click", () => wire.clear());

// ---------------------------------------------------------------- the dialog

const dialog = byId("connection-dialog");
byId("connection").addEventListener("click", () => {
  byId("session-id").value = location.hash.slice(1);
  byId("connection-problem").textContent = "";
  dialog.showModal();
});
byId("connection-cancel").addEventListener("click", () => dialog.close());
byId("connection-open").addEventListener("click", connect);
for (const id of ["session-id", "token"]) byId(id).addEventListener("keydown", (event) => event.key === "Enter" && connect());

function connect() {
  const previous = token;
  token = byId("token").value.trim() || undefined;
  try {
    open(byId("session-id").value.trim());
  } catch (error) {
    token = previous;
    byId("connection-problem").textContent = error.message;
    return;
  }
  transcript.note("A new connection.");
  dialog.close();
}

// ---------------------------------------------------------------- start

const selectPage = makeTabs(document.querySelector(".page-tabs"));
const selectSide = makeTabs(document.querySelector(".side-tabs"));

/** Wide: the conversation, and one of the others beside it. Narrow: one of the three. */
function layOut() {
  if (NARROW.matches) {
    selectPage(byId("tab-chat"));
  } else {
    selectSide(byId("side-wire"));
    byId("chat").classList.add("is-shown");
  }
}

NARROW.addEventListener("change", layOut);
layOut();
showFolder();
const asked = location.hash.slice(1);
const random = Array.from(crypto.getRandomValues(new Uint8Array(5)), (byte) => byte.toString(36).padStart(2, "0")).join("");
open(/^[A-Za-z0-9._:-]{1,128}$/.test(asked) ? asked : `play-${random}`);
if (!NARROW.matches) byId("message").focus();

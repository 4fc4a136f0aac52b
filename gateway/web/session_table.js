// The table of sessions: rows are kept and changed in place, so that focus and selection stay where they are.

import { element } from "./elements.js";
import { bytes, duration, short } from "./plot.js";

const STATES = { idle: "idle", running: "answering", awaiting_tool: "runs a tool", awaiting_approval: "asks" };
const COLUMNS = ["Session", "State", "Agent", "Sockets", "RTT", "Unacked", "Queued", "Events", "Last error", "Last heard"];

/** Shows sessions in `table`; `chosen(sessionId)` when one is opened. */
export class SessionTable {
  #body = element("tbody");
  #rows = new Map();
  #chosen;

  constructor(table, chosen) {
    this.#chosen = chosen;
    const head = element("tr", {}, ...COLUMNS.map((name) => element("th", { scope: "col" }, name)));
    table.append(element("thead", {}, head), this.#body);
  }

  show(sessions, now) {
    const rows = sessions.map((session) => {
      const row = this.#rows.get(session.session_id) ?? this.#make(session.session_id);
      fill(row, session, now);
      return row;
    });
    this.#rows = new Map(rows.map((row) => [row.dataset.session, row]));
    rows.forEach((row, index) => {
      if (this.#body.children[index] !== row) this.#body.insertBefore(row, this.#body.children[index] ?? null);
    });
    while (this.#body.children.length > rows.length) this.#body.lastElementChild.remove();
  }

  #make(sessionId) {
    const open = element("button", { type: "button", class: "link", on: { click: () => this.#chosen(sessionId) } }, sessionId);
    const cells = COLUMNS.slice(1).map((name) => element("td", { "data-label": name }));
    return element("tr", { "data-session": sessionId }, element("th", { scope: "row" }, open), ...cells);
  }
}

function fill(row, session, now) {
  const versions = session.dialects.map((name) => ({ v1: "v1", "codelab.v2.json": "v2", "codelab.v2.msgpack": "v2 msgpack" })[name] ?? name);
  const texts = [
    STATES[session.state] ?? session.state,
    session.agent || "–",
    versions.length ? versions.join(", ") : "none",
    duration(session.rtt),
    session.unacked_bytes ? bytes(session.unacked_bytes) : "–",
    session.queued ? String(session.queued) : "–",
    short(session.last_seq),
    session.last_error || "–",
    `${duration(Math.max(0, now - session.touched_at))} ago`,
  ];
  texts.forEach((text, index) => {
    const cell = row.children[index + 1];
    if (cell.textContent !== text) cell.textContent = text;
    cell.classList.toggle("is-empty", text === "–" || text === "none");
  });
  row.dataset.state = session.state;
  row.classList.toggle("has-error", session.last_error !== "");
}

// The raw frames, newest at the end, and the sum of what came: that is the proof.

import { element } from "./elements.js";

const MOST_ROWS = 400;

/** Shows frames in `list`. */
export class Wire {
  #list;
  #started = performance.now();
  #isAtEnd = true;

  constructor(list) {
    this.#list = list;
    const scroller = list.parentElement;
    scroller.addEventListener("scroll", () => {
      this.#isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    });
  }

  clear() {
    this.#list.replaceChildren();
  }

  /** A frame, as text, that went `up` or came `down`. */
  frame(direction, data, at) {
    const { kinds, summary, pretty } = describe(data);
    const seconds = ((at - this.#started) / 1000).toFixed(2);
    const row = element(
      "details",
      { class: `frame is-${direction}` },
      element(
        "summary",
        {},
        element("span", { class: "arrow", title: direction === "up" ? "sent" : "received" }, direction === "up" ? "↑" : "↓"),
        element("time", {}, seconds),
        element("b", {}, kinds),
        element("span", { class: "gist" }, summary),
      ),
    );
    row.addEventListener("toggle", () => row.open && row.children.length === 1 && row.append(element("pre", {}, pretty())), {
      once: true,
    });
    this.#add(row);
  }

  /** A line between frames. */
  mark(text, kind) {
    this.#add(element("p", { class: `mark is-${kind}` }, text));
  }

  #add(row) {
    this.#list.append(row);
    while (this.#list.children.length > MOST_ROWS) this.#list.firstElementChild.remove();
    const scroller = this.#list.parentElement;
    if (this.#isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  }
}

function describe(data) {
  let value;
  try {
    value = JSON.parse(data);
  } catch {
    return { kinds: "not JSON", summary: String(data).slice(0, 200), pretty: () => String(data) };
  }
  const items = Array.isArray(value) ? value : [value];
  const pretty = () => JSON.stringify(value, null, 2);
  if (items.length > 1) {
    const types = [...new Set(items.map((item) => item.type))].join(", ");
    return { kinds: `batch of ${items.length}`, summary: types, pretty };
  }
  const { type, seq, first_seq: first, ...rest } = items[0] ?? {};
  const number = seq === undefined ? "" : first === undefined ? `#${seq} ` : `#${first}…${seq} `;
  const isToken = type === "assistant_message" && typeof rest.token === "string";
  const gist = isToken ? JSON.stringify(rest.token) : JSON.stringify(rest).slice(1, -1);
  return { kinds: String(type), summary: (number + gist).slice(0, 200), pretty };
}

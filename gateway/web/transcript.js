// The conversation: what the person said, the answer as it streams, hand-overs, cards, and every resume.

import { element } from "./elements.js";

/** Draws into `list`, an `<ol>`. */
export class Transcript {
  #list;
  #answer = null; // {root, text} of the answer that streams
  #agent = "";
  #replayed = null; // the <mark> that replayed tokens go into

  #isAtEnd = true;

  constructor(list) {
    this.#list = list;
    const scroller = list.parentElement;
    scroller.addEventListener("scroll", () => {
      this.#isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    });
    new ResizeObserver(() => this.#follow()).observe(scroller);
  }

  get isEmpty() {
    return this.#list.children.length === 0;
  }

  /** An answer that still streams goes on where it is. */
  said(text) {
    this.#isAtEnd = true;
    this.#add(element("li", { class: "said" }, element("p", {}, text)));
  }

  /** A token; `isReplayed` when it was written while nobody was connected. */
  token(text, isReplayed) {
    if (!text) return;
    if (!this.#answer) this.#begin();
    if (isReplayed) {
      if (!this.#replayed) this.#answer.text.append((this.#replayed = element("mark", { title: "written while the plug was out" })));
      this.#replayed.append(text);
    } else {
      this.#replayed = null;
      const last = this.#answer.text.lastChild;
      if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
      else this.#answer.text.append(text);
    }
    this.#follow();
  }

  /** The answer is complete, or goes on in another. */
  end() {
    this.#finish();
  }

  switched(from, to, reason) {
    this.#finish();
    this.#agent = to;
    const who = from ? `${from} → ${to}` : to;
    this.#add(element("li", { class: "switched" }, element("b", {}, who), reason ? ` ${reason}` : ""));
  }

  card(root) {
    this.#finish();
    this.#add(element("li", { class: "call" }, root));
  }

  note(text, kind = "note") {
    this.#finish();
    this.#add(element("li", { class: `remark is-${kind}` }, text));
  }

  /** What a resume brought; within the answer when there is one. */
  resumed(text) {
    const chip = element("span", { class: "resumed" }, text);
    if (this.#answer) {
      this.#replayed = null;
      this.#answer.text.append(chip);
      this.#follow();
    } else {
      this.#add(element("li", { class: "remark is-good" }, chip));
    }
  }

  #begin() {
    const text = element("p", {});
    const root = element("li", { class: "answer is-streaming" }, this.#agent ? element("span", { class: "who" }, this.#agent) : null, text);
    this.#answer = { root, text };
    this.#add(root);
  }

  #finish() {
    this.#answer?.root.classList.remove("is-streaming");
    this.#answer = this.#replayed = null;
  }

  #add(item) {
    this.#list.append(item);
    this.#follow();
  }

  #follow() {
    if (!this.#isAtEnd) return;
    const scroller = this.#list.parentElement;
    scroller.scrollTop = scroller.scrollHeight;
  }
}

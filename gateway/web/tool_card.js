// A tool call as a card: what the agent wants to do, and the person's decision.

import { element } from "./elements.js";

const TITLES = {
  write_file: "Write a file",
  create_file: "Create a file",
  edit_file: "Change a file",
  read_file: "Read a file",
  list_files: "List the files",
  execute_command: "Run a command",
};

/** Builds and drives the card of one call; `decide(decision, {arguments, feedback})` is called once. */
export class ToolCard {
  #call;
  #decide;
  #state;
  #body;
  #actions;

  constructor(call, decide) {
    this.#call = call;
    this.#decide = decide;
    const args = call.arguments ?? {};
    const path = typeof args.path === "string" ? args.path : "";
    this.#state = element("span", { class: "state" });
    this.#body = element("div", { class: "body" }, preview(call.tool_name, args));
    this.#actions = element("div", { class: "actions" });
    this.root = element(
      "article",
      { class: "card", "data-state": "new", "aria-label": `Tool call ${call.tool_name} ${path}` },
      element(
        "header",
        {},
        element("h3", {}, TITLES[call.tool_name] ?? call.tool_name),
        path ? element("code", {}, path) : null,
        element("span", { class: "spacer" }),
        this.#state,
      ),
      this.#body,
      this.#actions,
    );
    if (call.requires_approval && !call.decision) this.#ask();
    else this.set("running", "running");
  }

  /** "ask", "running", "done", "failed" or "rejected", and what to say of it. */
  set(state, text, result) {
    this.root.dataset.state = state;
    this.#state.textContent = text;
    if (state !== "ask") this.#actions.replaceChildren();
    if (result) this.#body.append(element("p", { class: "result" }, result));
  }

  #ask() {
    this.set("ask", "waits for you");
    const approve = element("button", { class: "primary", type: "button", on: { click: () => this.#done("approve") } }, "Approve");
    const edit = element("button", { type: "button", on: { click: () => this.#edit() } }, "Edit…");
    const reject = element("button", { class: "danger", type: "button", on: { click: () => this.#reject() } }, "Reject…");
    this.#actions.replaceChildren(approve, edit, reject);
    this.#body.replaceChildren(preview(this.#call.tool_name, this.#call.arguments ?? {}));
  }

  #edit() {
    const inputs = Object.entries(this.#call.arguments ?? {}).map(([name, value]) => {
      const isText = typeof value === "string";
      const input = element("textarea", { rows: isText ? String(Math.min(10, value.split("\n").length + 1)) : "2", spellcheck: "false" });
      input.value = isText ? value : JSON.stringify(value);
      return { name, isText, input };
    });
    this.#body.replaceChildren(...inputs.map(({ name, input }) => element("label", { class: "field" }, name, input)));
    const problem = element("span", { class: "problem", role: "alert" });
    const save = () => {
      const changed = {};
      for (const { name, isText, input } of inputs) {
        try {
          changed[name] = isText ? input.value : JSON.parse(input.value);
        } catch {
          problem.textContent = `${name} is not valid JSON.`;
          return;
        }
      }
      this.#body.replaceChildren(preview(this.#call.tool_name, changed));
      this.#done("edit", { arguments: changed });
    };
    this.#actions.replaceChildren(
      element("button", { class: "primary", type: "button", on: { click: save } }, "Approve with these"),
      element("button", { class: "quiet", type: "button", on: { click: () => this.#ask() } }, "Back"),
      problem,
    );
    inputs.at(-1)?.input.focus();
  }

  #reject() {
    const why = element("input", { placeholder: "Why? The agent is told. (optional)", "aria-label": "Why" });
    const send = () => this.#done("reject", { feedback: why.value.trim() || undefined });
    why.addEventListener("keydown", (event) => event.key === "Enter" && send());
    this.#actions.replaceChildren(
      why,
      element("button", { class: "danger", type: "button", on: { click: send } }, "Reject"),
      element("button", { class: "quiet", type: "button", on: { click: () => this.#ask() } }, "Back"),
    );
    why.focus();
  }

  #done(decision, details = {}) {
    const texts = { approve: "approved", edit: "approved with changes", reject: "rejected" };
    this.set(decision === "reject" ? "rejected" : "running", texts[decision]);
    this.#decide(decision, details);
  }
}

function preview(toolName, args) {
  if (toolName === "edit_file" && typeof args.old === "string") {
    const lines = (text, sign, kind) => text.split("\n").map((line) => element("span", { class: kind }, `${sign} ${line}\n`));
    return element("pre", { class: "diff" }, ...lines(args.old, "−", "gone"), ...lines(String(args.new), "+", "come"));
  }
  if (typeof args.content === "string") return element("pre", {}, args.content);
  if (typeof args.command === "string") return element("pre", {}, `$ ${args.command}`);
  const { path, ...rest } = args;
  return Object.keys(rest).length ? element("pre", {}, JSON.stringify(rest, null, 2)) : element("span");
}

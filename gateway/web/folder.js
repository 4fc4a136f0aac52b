// The tools of an IDE on a folder that exists in this page only, so that the playground needs no IDE.

const MOST_BYTES = 1024 * 1024;

/** A tool could not do what was asked; the text is for the agent. */
export class ToolFailed extends Error {}

/** Text files by path. Dispatches `change` with `path`. */
export class Folder extends EventTarget {
  #files;

  constructor(files = {}) {
    super();
    this.#files = new Map(Object.entries(files));
  }

  /** Paths in order. */
  get paths() {
    return [...this.#files.keys()].sort();
  }

  content(path) {
    return this.#files.get(path) ?? "";
  }

  /** Run a tool call; returns its result. Throws `ToolFailed`. */
  run(toolName, args) {
    switch (toolName) {
      case "read_file":
        return this.#read(pathOf(args));
      case "list_files":
        return this.#list(args.path ?? ".");
      case "write_file":
      case "create_file":
        return this.#write(toolName, pathOf(args), textOf(args, "content"));
      case "edit_file":
        return this.#edit(pathOf(args), textOf(args, "old"), textOf(args, "new"));
      case "execute_command":
        throw new ToolFailed("This folder lives in a browser page, which has no shell to run commands in.");
      default:
        throw new ToolFailed(`There is no tool ${JSON.stringify(String(toolName).slice(0, 64))} here.`);
    }
  }

  #read(path) {
    if (!this.#files.has(path)) throw new ToolFailed(`There is no file ${path}.`);
    return this.#files.get(path);
  }

  #list(folder) {
    const prefix = folder === "." || folder === "" ? "" : `${folder.replace(/\/+$/, "")}/`;
    return this.paths.filter((path) => path.startsWith(prefix)).join("\n");
  }

  #write(toolName, path, content) {
    if (toolName === "create_file" && this.#files.has(path)) throw new ToolFailed(`${path} exists; edit it.`);
    const size = new TextEncoder().encode(content).length;
    if (size > MOST_BYTES) throw new ToolFailed(`${size} bytes are more than the ${MOST_BYTES} a file may have.`);
    this.#files.set(path, content);
    this.#changed(path);
    return `Wrote ${path} (${size} bytes).`;
  }

  #edit(path, old, replacement) {
    const content = this.#read(path);
    const count = old === "" ? 0 : content.split(old).length - 1;
    if (count !== 1) throw new ToolFailed(`The old text occurs ${count} times in ${path}; it must occur once.`);
    this.#files.set(path, content.replace(old, () => replacement));
    this.#changed(path);
    return `Edited ${path}.`;
  }

  #changed(path) {
    const event = new Event("change");
    event.path = path;
    this.dispatchEvent(event);
  }
}

function pathOf(args) {
  const path = textOf(args, "path").replace(/^\.\//, "");
  const parts = path.split("/");
  if (!path || path.startsWith("/") || parts.includes("..") || parts.includes("") || path.includes("\0")) {
    throw new ToolFailed(`${JSON.stringify(path.slice(0, 200))} is outside the project folder; use a path inside it.`);
  }
  return path;
}

function textOf(args, name) {
  if (typeof args[name] !== "string") throw new ToolFailed(`The argument ${name} is missing; it is a text.`);
  return args[name];
}

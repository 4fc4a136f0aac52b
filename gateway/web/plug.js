// The plug of this page: every socket that `client.js` opens goes through it, can be watched and can be cut.

/**
 * Dispatches `frame` with `direction` ("up" or "down"), `data` and `at` for every frame, and `change` when the plug
 * is pulled or put back.
 *
 * A page cannot break a TCP connection. Pulling stops listening in the middle of whatever comes, which to
 * `client.js` is the same: it is told 1006, and of what the gateway goes on sending it sees nothing.
 */
export class Plug extends EventTarget {
  isPulled = false;
  #open = new Set();

  /** The constructor for `client.js`. */
  get WebSocket() {
    const plug = this;
    return class extends PluggedSocket {
      constructor(url, protocols) {
        super(plug, url, protocols);
      }
    };
  }

  pull() {
    if (this.isPulled) return;
    this.isPulled = true;
    this.dispatchEvent(new Event("change"));
    for (const socket of [...this.#open]) socket.cut();
  }

  putBack() {
    if (!this.isPulled) return;
    this.isPulled = false;
    this.dispatchEvent(new Event("change"));
    // What a browser says when its network is back; client.js does not wait for its next try then.
    globalThis.dispatchEvent(new Event("online"));
  }

  opened(socket) {
    this.#open.add(socket);
  }

  closed(socket) {
    this.#open.delete(socket);
  }

  saw(direction, data) {
    const event = new Event("frame");
    Object.assign(event, { direction, data, at: performance.now() });
    this.dispatchEvent(event);
  }
}

class PluggedSocket extends EventTarget {
  #plug;
  #socket = null;
  #isOver = false;

  constructor(plug, url, protocols) {
    super();
    this.#plug = plug;
    plug.opened(this);
    if (plug.isPulled) {
      setTimeout(() => this.#end(1006, "the plug is pulled"), 0);
      return;
    }
    this.#socket = new WebSocket(url, protocols);
    this.#socket.addEventListener("message", ({ data }) => {
      if (this.#isOver) return;
      plug.saw("down", data);
      this.dispatchEvent(new MessageEvent("message", { data }));
    });
    this.#socket.addEventListener("error", () => this.#isOver || this.dispatchEvent(new Event("error")));
    this.#socket.addEventListener("close", ({ code, reason }) => this.#end(code, reason));
  }

  get readyState() {
    return this.#isOver ? 3 : (this.#socket?.readyState ?? 0);
  }

  send(data) {
    if (this.#isOver) return;
    this.#plug.saw("up", data);
    this.#socket.send(data);
  }

  close(code, reason) {
    this.#socket?.close(code, reason);
  }

  cut() {
    this.#end(1006, "the plug was pulled");
    this.#socket?.close();
  }

  #end(code, reason) {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#plug.closed(this);
    this.dispatchEvent(new CloseEvent("close", { code, reason }));
  }
}

// Server-Sent Events over fetch: EventSource cannot send the header that the key has to be in.

const RETRY_MS = 1000;
const RETRY_CAP_MS = 15_000;

/** The caller was turned away: trying again with the same key is no use. */
export class Refused extends Error {}

/**
 * Read events until `signal` aborts, over as many connections as it takes; `received(type, data)` gets each with its
 * data parsed, `lost(seconds)` each interruption. Throws `Refused` when the key does not do.
 */
export async function followEvents(url, headers, { signal, received, lost }) {
  for (let attempt = 0; !signal.aborted; attempt++) {
    try {
      const response = await fetch(url(), { headers, signal, cache: "no-store", credentials: "omit" });
      if (response.status === 401 || response.status === 403) throw new Refused(await reasonOf(response));
      if (response.ok) {
        await readEvents(response.body, (type, data) => {
          attempt = 0;
          received(type, data);
        });
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) throw error;
    }
    const delay = Math.min(RETRY_CAP_MS, RETRY_MS * 2 ** Math.min(attempt, 8));
    lost(Math.ceil(delay / 1000));
    await pause(delay, signal);
  }
}

/** What an answer that refuses says, for people. */
export async function reasonOf(response) {
  try {
    const body = await response.json();
    return body.error_description ?? body.detail ?? `The gateway answered ${response.status}.`;
  } catch {
    return `The gateway answered ${response.status}.`;
  }
}

async function readEvents(body, received) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    // Ours are separated by an empty line, with \n; the dashboard talks to no other server.
    for (let end = buffer.indexOf("\n\n"); end >= 0; end = buffer.indexOf("\n\n")) {
      const lines = buffer.slice(0, end).split("\n");
      buffer = buffer.slice(end + 2);
      const field = (name) => lines.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2));
      received(field("event")[0] ?? "message", JSON.parse(field("data").join("\n")));
    }
  }
}

function pause(delay, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, delay);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

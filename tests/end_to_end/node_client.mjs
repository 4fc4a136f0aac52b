// A WebSocket client on Node's `ws`: lines of JSON from stdin to the socket, and back to stdout.
import { createInterface } from "node:readline";

const [, , library, url] = process.argv;
const { WebSocket } = await import(library);

const socket = new WebSocket(url);
socket.on("message", (data) => process.stdout.write(`${data}\n`));
socket.on("close", () => process.exit(0));
socket.on("error", (error) => {
  process.stderr.write(`${error}\n`);
  process.exit(1);
});
await new Promise((resolve) => socket.on("open", resolve));
setTimeout(() => process.exit(2), 30_000);
createInterface({ input: process.stdin }).on("line", (line) => socket.send(line));

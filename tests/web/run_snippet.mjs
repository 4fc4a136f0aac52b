// Runs a compiled snippet as a browser would, with the WebSocket of Node's `ws`: run_snippet.mjs FILE.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.WS_FOLDER}/`);
globalThis.WebSocket = require("ws").WebSocket;
setTimeout(() => process.exit(2), 30_000).unref();
await import(pathToFileURL(process.argv[2]).href);

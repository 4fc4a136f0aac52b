// Talks to a real gateway at argv[2] until stdin closes; prints what it saw as one JSON object.

import { createRequire } from "node:module";

import { openSession } from "../../gateway/web/client.js";

const { WebSocket } = createRequire(process.env.WS_FOLDER + "/")("ws");
const session = openSession(process.argv[2], { sessionId: "s1", WebSocket, random: () => 0 });
const seen = { text: "", asked: [], outcomes: [], gaps: 0, events: 0 };
const ended = new Map();
const turnEnded = (turnId) => new Promise((resolve) => (ended.has(turnId) ? resolve() : ended.set(turnId, resolve)));
let stop = false;
process.stdin.on("data", () => (stop = true));

async function listen() {
  let before = null;
  for await (const event of session) {
    seen.events++;
    if (before && (event.epoch !== before.epoch || (event.first_seq ?? event.seq) !== before.seq + 1)) seen.gaps++;
    before = event;
    if (event.type === "assistant_message") seen.text += event.token;
    if (event.type === "turn_ended") {
      seen.outcomes.push(event.outcome);
      ended.get(event.turn_id)?.();
      ended.set(event.turn_id, null);
    }
  }
}

const listening = listen();
while (!stop) {
  const content = `count to ${[1, 20, 300, 1500][Math.floor(Math.random() * 4)]}`;
  seen.asked.push(content);
  await turnEnded((await session.sendUserMessage(content)).turnId);
}
session.close();
await listening;
process.stdin.destroy();
console.log(JSON.stringify(seen));

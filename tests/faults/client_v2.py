"""A v2 client: resumes by epoch and seq, sends again until answered, acknowledges when it feels like it."""

from __future__ import annotations

import json
import random
from typing import Any
from urllib.parse import quote

import msgspec
import trio

from tests.faults.client import Client, Conversation, World
from tests.faults.records import ClientRecord, Entry, Sent
from tests.faults.websocket import SocketLost, WebSocket

SUBPROTOCOLS = {"json": "codelab.v2.json", "msgpack": "codelab.v2.msgpack"}
FORGETS = 0.03
"""How often a client comes back without its memory, as a page that was reloaded does."""


def decode(data: str | bytes) -> list[dict[str, Any]]:
    """The objects of one frame."""
    value = json.loads(data) if isinstance(data, str) else msgspec.msgpack.decode(data)
    return value if isinstance(value, list) else [value]


class V2Client(Client):
    """One v2 client of a session."""

    def __init__(
        self, record: ClientRecord, conversation: Conversation, world: World, randomness: random.Random
    ) -> None:
        super().__init__(record, conversation, world, randomness)
        self.epoch: str | None = None
        self.last_seq = 0
        self._turn_id: str | None = None
        self._ack_every = 1

    def _is_answered(self) -> bool:
        return all(sent.is_settled for sent in self.record.sent.values())

    async def say(self, body: dict[str, Any]) -> None:
        """Send now if there is a socket; it is sent again on every new one until it is answered."""
        sent = Sent({**body, "id": self._new_id("m")})
        self.record.sent[sent.message_id] = sent
        if self._socket is not None:
            await self._send(self._socket, [sent])

    def _cancel(self) -> dict[str, Any]:
        named = self._turn_id is not None and self._random.random() < 0.5
        return {"type": "cancel", "turn_id": self._turn_id} if named else {"type": "cancel"}

    async def _send(self, socket: WebSocket, messages: list[Sent]) -> None:
        for sent in messages:
            sent.sends += 1
        bodies = [sent.body for sent in messages]
        together = len(bodies) > 1 and self._random.random() < 0.5
        try:
            for value in [bodies] if together else bodies:
                await socket.send(self._encode(value))
        except SocketLost:
            return  # The reader learns it too.
        self._world.notify("sent")

    def _encode(self, value: object) -> str | bytes:
        return msgspec.msgpack.encode(value) if self.record.dialect == "msgpack" else json.dumps(value)

    async def _connect_once(self) -> None:
        if self._random.random() < FORGETS:
            self.epoch = None
        resume = None if self.epoch is None else (self.epoch, self.last_seq)
        path = f"/api/v1/ws/{self._conversation.session_id}"
        if resume is not None:
            path += f"?epoch={quote(resume[0])}&last_seq={resume[1]}"
        self.record.entries.append(Entry("connect", resume))
        socket = await WebSocket.connect(self._world.port, path, SUBPROTOCOLS[self.record.dialect])
        try:
            self._ack_every = self._random.choice((1, 5, 40, 100, 10**9))
            await self._send_unsettled(socket)
            self._socket = socket
            # Taken out of the nursery by hand: what is raised in it comes out of it as a group.
            lost: SocketLost | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._acknowledge, socket)
                try:
                    while True:
                        for item in decode(await socket.receive()):
                            self.record.entries.append(Entry("got", item))
                            await self._on_object(item, resume)
                except SocketLost as error:
                    lost = error
                nursery.cancel_scope.cancel()
            assert lost is not None
            raise lost
        finally:
            socket.abort()

    async def _send_unsettled(self, socket: WebSocket) -> None:
        """What waits for an answer, in the order it was said; until it is out, nothing newer overtakes it."""
        done: set[str] = set()
        while waiting := [
            sent for sent in self.record.sent.values() if not sent.is_settled and sent.message_id not in done
        ]:
            done.update(sent.message_id for sent in waiting)
            await self._send(socket, waiting)

    async def _acknowledge(self, socket: WebSocket) -> None:
        acked = -1
        while True:
            await trio.sleep(self._random.uniform(0.01, 0.8))
            if self._ack_every < 10**9 and self.last_seq > acked:
                acked = self.last_seq
                try:
                    await socket.send(self._encode({"type": "ack", "seq": acked}))
                except SocketLost:
                    return

    async def _on_object(self, item: dict[str, Any], resume: tuple[str, int] | None) -> None:
        kind = item["type"]
        if kind == "welcome":
            if not item["resumed"] and resume is None:
                self.last_seq = item["last_seq"]
            self.epoch = item["epoch"]
            self._on_pending(item)
        elif kind == "snapshot":
            self.epoch, self.last_seq = item["epoch"], item["seq"]
            self._on_pending(item)
        elif kind in ("ack", "nack"):
            sent = self.record.sent.get(item["id"])
            self._answer(sent, item)
            if kind == "nack" and item["retryable"] and sent is not None:
                assert self._nursery is not None
                self._nursery.start_soon(self._send_again, sent)
        elif "seq" in item:
            self._on_event(item)
            if self.last_seq % self._ack_every == 0 and self._socket is not None:
                await self._socket.send(self._encode({"type": "ack", "seq": self.last_seq}))

    def _on_pending(self, item: dict[str, Any]) -> None:
        for call in item["pending"]:
            self._on_call(call)

    async def _send_again(self, sent: Sent) -> None:
        await trio.sleep(self._random.uniform(0.05, 0.2))
        if not sent.is_settled and self._socket is not None:
            await self._send(self._socket, [sent])

    def _on_event(self, item: dict[str, Any]) -> None:
        self.last_seq = item["seq"]
        kind = item["type"]
        if kind == "tool_call":
            self._on_call(item)
            self._world.notify("call")
        elif kind == "approval_resolved":
            if item["decision"] != "reject":
                self._on_ready(item["call_id"])
            self._world.notify("decided")
        elif kind == "turn_started":
            self._turn_id = item["turn_id"]
        elif kind == "turn_ended":
            self._world.notify("ended")


async def replay(world: World, session_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The session's ``welcome`` now, and all its events from seq 0 on, read past the proxy.

    Raises ``SocketLost`` when the gateway is killed meanwhile.
    """
    path = f"/api/v1/ws/{session_id}"
    socket = await WebSocket.connect(world.direct_port, path, SUBPROTOCOLS["json"])
    try:
        welcome = decode(await socket.receive())[0]
    finally:
        socket.abort()
    if not welcome["last_seq"]:
        return welcome, []
    socket = await WebSocket.connect(
        world.direct_port, f"{path}?epoch={quote(welcome['epoch'])}&last_seq=0", SUBPROTOCOLS["msgpack"]
    )
    events: list[dict[str, Any]] = []
    try:
        welcome, *first = decode(await socket.receive())
        events += first
        while not events or events[-1]["seq"] < welcome["last_seq"]:
            for item in decode(await socket.receive()):
                events.append(item)
                if item["type"] == "snapshot":
                    return welcome, events
            await socket.send(msgspec.msgpack.encode({"type": "ack", "seq": events[-1]["seq"]}))
    finally:
        socket.abort()
    return welcome, events

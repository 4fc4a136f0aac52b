"""A v1 client as they are in the field: sends once, and after a loss just connects again."""

from __future__ import annotations

import json
import random
from typing import Any

import trio

from tests.faults.client import Client, Conversation, World
from tests.faults.records import ClientRecord, Entry, Sent
from tests.faults.websocket import SocketLost, WebSocket

PATIENCE_SECONDS = 5.0
NOT_ACCEPTED = ("STORE_UNAVAILABLE", "DRAINING")
"""Codes of errors that say: nothing was accepted, try again."""


class V1Client(Client):
    """The v1 client of a session."""

    def __init__(
        self, record: ClientRecord, conversation: Conversation, world: World, randomness: random.Random
    ) -> None:
        super().__init__(record, conversation, world, randomness)
        self._connected = trio.Event()

    def _is_answered(self) -> bool:
        return all(
            sent.is_settled
            or sent.unanswered_at_loss
            or any(answer.get("code") in NOT_ACCEPTED for answer in sent.answers)
            for sent in self.record.sent.values()
        )

    async def say(self, body: dict[str, Any]) -> None:
        """Send once, on the socket that is there; without one soon, never."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while (socket := self._socket) is None:
                await self._connected.wait()
            sent = Sent({**body, "message_id": self._new_id("m")}, sends=1)
            self.record.sent[sent.message_id] = sent
            try:
                await socket.send(json.dumps(sent.body))
            except SocketLost:
                sent.unanswered_at_loss = True
            self._world.notify("sent")

    def _lose(self) -> None:
        super()._lose()
        self._connected = trio.Event()
        for sent in self.record.sent.values():
            sent.unanswered_at_loss |= not sent.answers

    async def _connect_once(self) -> None:
        self.record.entries.append(Entry("connect", None))
        socket = await WebSocket.connect(
            self._world.port, f"/api/v1/ws/{self._conversation.session_id}", None
        )
        try:
            self._socket = socket
            self._connected.set()
            while True:
                item = json.loads(await socket.receive())
                self.record.entries.append(Entry("got", item))
                self._on_object(item)
        finally:
            socket.abort()

    def _on_object(self, item: dict[str, Any]) -> None:
        kind = item["type"]
        if kind == "tool_call":
            self._on_call(item)
        elif kind in ("ack", "error") and "message_id" in item:
            sent = self.record.sent.get(item["message_id"])
            if sent is not None and not sent.answers and item.get("code") in NOT_ACCEPTED:
                # What its user sees; nothing was accepted, so saying it again is another message.
                self._later({key: value for key, value in sent.body.items() if key != "message_id"})
            if kind == "ack" or (sent is not None and not sent.answers):
                self._answer(sent, item)
            if kind == "ack" and sent is not None and sent.body.get("decision", "reject") != "reject":
                self._on_ready(sent.body["call_id"])

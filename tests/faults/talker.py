"""A v2 client that says messages, and knows what became of each: acks, nacks, ends of turns, gaps."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from gateway.bench.socket_client import upgrade_request
from tests.faults.json_socket import JsonSocket


class NotLetIn(Exception):
    """No welcome came; the message says what came instead."""


class Talker:
    """One session with one socket at a time. Implements ``json_socket.Client``."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.epoch: str | None = None
        self.last_seq = 0
        self.is_done = False
        self.was_resumed = False
        self.violations: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        """The last ack or nack by message id."""
        self.acked: dict[str, str | None] = {}
        """The turn of every message that was ever acked."""
        self.outcomes: dict[str, str] = {}
        """By turn."""
        self.socket: JsonSocket | None = None
        self._count = 0
        self._welcomed: asyncio.Future[None] | None = None
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def connect(self, port: int, within: float = 30.0) -> JsonSocket:
        """Open a socket, resuming where the last one ended. Raises ``NotLetIn``, ``OSError``."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(within):
            _, socket = await loop.create_connection(lambda: JsonSocket(self), "127.0.0.1", port)
            self._welcomed = loop.create_future()
            resume = f"?epoch={quote(self.epoch)}&last_seq={self.last_seq}" if self.epoch else ""
            path = f"/api/v1/ws/{self.session_id}"
            socket.open(upgrade_request(f"127.0.0.1:{port}", path, "v2-json", [], resume))
            waiting: set[asyncio.Future[Any]] = {socket.closed, self._welcomed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not self._welcomed.done():
            socket.abort()
            raise NotLetIn(f"closed with {socket.closed.result()} before its welcome")
        self.socket = socket
        return socket

    @property
    def said(self) -> int:
        """Messages with an id of its own."""
        return self._count

    def new_id(self) -> str:
        """For a message."""
        self._count += 1
        return f"{self.session_id}-{self._count}"

    def say(self, message: dict[str, Any]) -> str:
        """Send it, under the id it has or a new one; gives that id."""
        assert self.socket is not None, "connect first"
        message = {"id": self.new_id()} | message
        self.answers.pop(message["id"], None)
        self.socket.say(message)
        return str(message["id"])

    async def answer(self, message_id: str, within: float) -> dict[str, Any]:
        """The ack or nack of a message that was said. Raises ``TimeoutError``."""
        if message_id not in self.answers:
            await self._wait(f"answer {message_id}", within)
        return self.answers[message_id]

    async def end_of(self, turn_id: str, within: float) -> str:
        """The outcome of a turn. Raises ``TimeoutError``."""
        if turn_id not in self.outcomes:
            await self._wait(f"end {turn_id}", within)
        return self.outcomes[turn_id]

    async def _wait(self, what: str, within: float) -> None:
        waiting = self._waiting[what] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within):
                await waiting
        finally:
            del self._waiting[what]

    def _came(self, what: str) -> None:
        waiting = self._waiting.get(what)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # ------------------------------------------------------------------ json_socket.Client

    def welcome(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The first object."""
        self.was_resumed = item["resumed"]
        if self.epoch is None:
            self.epoch, self.last_seq = item["epoch"], item["last_seq"]
        elif not item["resumed"]:
            self.violations.append(f"not resumed at {self.last_seq}")
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)
        return []

    def take(self, item: dict[str, Any], now: float) -> None:
        """One object after the welcome."""
        kind = item["type"]
        if kind in ("ack", "nack"):
            self.answers[item["id"]] = item
            if kind == "ack":
                self.acked.setdefault(item["id"], item.get("turn_id"))
            self._came(f"answer {item['id']}")
            return
        if kind == "snapshot":
            self.violations.append(f"a snapshot: {item['reason']}")
            self.last_seq = item["seq"]
            return
        if "seq" not in item:
            return
        first = item.get("first_seq", item["seq"])
        if first != self.last_seq + 1:
            self.violations.append(f"seq {first} came after {self.last_seq}")
        self.last_seq = item["seq"]
        if kind == "turn_ended":
            self.outcomes[item["turn_id"]] = item["outcome"]
            self._came(f"end {item['turn_id']}")

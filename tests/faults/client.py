"""What v1 and v2 clients have in common: a user who talks, and calls that are decided and answered."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import trio
from attrs import define

from tests.faults.records import ClientRecord, Entry, Sent
from tests.faults.websocket import SocketLost, WebSocket

RECONNECT_SECONDS = 0.04


@define
class World:
    """What all clients of a run share."""

    port: int
    """Of the proxy that cuts."""
    direct_port: int
    """Of the gateway itself."""
    notify: Callable[[str], None]
    """Said when something happened that a kill may be waiting for."""
    bad_ends: list[str]
    """Close codes and statuses that no fault of ours explains."""


class Conversation(Protocol):
    """What a client knows of its session."""

    session_id: str
    awake: trio.Event
    """Set while its clients want to be connected."""

    @property
    def answerers(self) -> list[str]:
        """Names of the clients among which it is agreed who runs a tool."""
        ...


class Client:
    """A client that comes back until it is told to stop."""

    def __init__(
        self, record: ClientRecord, conversation: Conversation, world: World, randomness: random.Random
    ) -> None:
        self.record = record
        self._conversation = conversation
        self._world = world
        self._random = randomness
        self._socket: WebSocket | None = None
        self._nursery: trio.Nursery | None = None
        self._answered: set[str] = set()
        self._count = 0
        self._intends = 0
        """Messages it is about to send."""
        self.has_talked = False

    @property
    def is_settled(self) -> bool:
        """Whether nothing that it said waits for an answer, and it is not about to say anything."""
        return self.has_talked and not self._intends and self._is_answered()

    def _is_answered(self) -> bool:
        raise NotImplementedError

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            while True:
                await self._conversation.awake.wait()
                try:
                    await self._connect_once()
                except SocketLost as lost:
                    self.record.entries.append(Entry("lost", f"{lost} {lost.status or ''}".strip()))
                    if lost.close_code == 1011 or lost.status not in (None, 503, 502):
                        self._world.bad_ends.append(f"{self.record.name}: {lost}")
                finally:
                    self._lose()
                await trio.sleep(self._random.uniform(0, RECONNECT_SECONDS))

    async def _connect_once(self) -> None:
        """One connection, until it is lost. Raises ``SocketLost``."""
        raise NotImplementedError

    def drop(self) -> None:
        """Lose the connection; ``run`` makes another."""
        if self._socket is not None:
            self._socket.abort()

    def _lose(self) -> None:
        if self._socket is not None:
            self._socket.abort()
            self._socket = None

    # ------------------------------------------------------------------ the user

    async def talk(self, messages: int, seconds: float) -> None:
        """Say so many messages, now and then a cancel, about ``seconds`` apart."""
        for _ in range(messages):
            await trio.sleep(self._random.expovariate(1 / seconds))
            await self.say(self._user_message())
            if self._random.random() < 0.2:
                await trio.sleep(self._random.uniform(0, 0.1))
                await self.say(self._cancel())
        self.has_talked = True

    async def say(self, body: dict[str, Any]) -> None:
        """Send a message under an id of its own."""
        raise NotImplementedError

    def _new_id(self, what: str) -> str:
        self._count += 1
        return f"{self.record.name}-{what}{self._count}"

    def _user_message(self) -> dict[str, Any]:
        draw = self._random.random()
        plan: dict[str, Any] = {"tokens": self._random.choice((0, 1, 5, 20, 60, 200))}
        if draw < 0.15:
            plan["calls"] = [self._new_id("tool-call")]
        elif draw < 0.35:
            plan["calls"] = [self._new_id("tool-call"), f"approve-{self._new_id('call')}"]
        elif draw < 0.55:
            plan["calls"] = [f"approve-{self._new_id('call')}"]
        elif draw < 0.6:
            plan["refuse"] = True
        elif draw < 0.65:
            plan["error"] = True
        return {"type": "user_message", "content": "do it ⟦not a mark⟧ 🙂", "plan": plan}

    def _cancel(self) -> dict[str, Any]:
        return {"type": "cancel"}

    # ------------------------------------------------------------------ calls

    def _on_call(self, call: dict[str, Any]) -> None:
        call_id = call["call_id"]
        if not call["requires_approval"] or "decision" in call:
            self._on_ready(call_id)
        elif f"decide {call_id}" not in self._answered:
            self._answered.add(f"decide {call_id}")
            decision = self._random.choice(("approve", "APPROVE", "reject", "edit"))
            body: dict[str, Any] = {"type": "hitl_decision", "call_id": call_id, "decision": decision}
            if decision == "edit":
                body["modified_arguments"] = {"path": "b.py"}
            self._later(body)

    def _on_ready(self, call_id: str) -> None:
        """The call may be carried out; one client does."""
        names = self._conversation.answerers
        if names[zlib.crc32(call_id.encode()) % len(names)] != self.record.name:
            return
        if call_id not in self._answered:
            self._answered.add(call_id)
            self._later({"type": "tool_result", "call_id": call_id, "result": {"ok": [1, None, "ü"]}})

    def _later(self, body: dict[str, Any]) -> None:
        assert self._nursery is not None
        self._intends += 1
        self._nursery.start_soon(self._say_later, body, self._random.choice((0.0, 0.0, 0.01, 0.05)))

    async def _say_later(self, body: dict[str, Any], delay: float) -> None:
        await trio.sleep(delay)
        await self.say(body)
        self._intends -= 1

    def _answer(self, sent: Sent | None, answer: dict[str, Any]) -> None:
        if sent is not None:
            sent.answers.append(answer)
            self._world.notify("ack")

"""The client library against the real gateway and agent, over connections that are cut at random bytes."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from gateway.client import Session, SessionEvent, open_session
from gateway.client.keeper import Encoding
from tests.client.cutting_proxy import CuttingProxy
from tests.client.live_gateway import live_gateway

CUTS = int(os.environ.get("CLIENT_CUTS", "200"))
SEED = int(os.environ.get("CLIENT_SEED", "20240601"))


class _Conversation:
    """Asks, counts what comes back, and answers tool calls."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.text = ""
        self.events: list[SessionEvent] = []
        self.turns: list[tuple[str, str]] = []
        self._ended = trio.lowlevel.ParkingLot()

    async def listen(self) -> None:
        async for event in self._session.events():
            self.events.append(event)
            self.text += event.token
            if event.type == "turn_ended":
                self.turns.append((event.text("turn_id"), event.text("outcome")))
                self._ended.unpark_all()

    async def wait_ended(self, turn_id: str | None) -> None:
        while turn_id not in [turn for turn, _ in self.turns]:
            await self._ended.park()

    async def count_to(self, number: int) -> None:
        accepted = await self._session.send_user_message(f"count to {number}")
        await self.wait_ended(accepted.turn_id)

    async def create(self, path: str) -> None:
        accepted = await self._session.send_user_message(f"create {path} that prints hello")
        await self.wait_ended(accepted.turn_id)
        call = next(event for event in reversed(self.events) if event.type == "tool_call")
        decided = await self._session.decide(call.text("call_id"), "approve")
        await self.wait_ended(decided.turn_id)
        ran = await self._session.tool_result(call.text("call_id"), result="written")
        await self.wait_ended(ran.turn_id)


def assert_exact(events: list[SessionEvent]) -> None:
    """Every event of one epoch, once, in order, merged or not, and no gap but behind a snapshot."""
    for before, after in pairwise(events):
        assert after.epoch == before.epoch
        assert after.first_seq == before.seq + 1
        assert after.type != "snapshot"


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_transcript_is_exact_over_random_cuts(encoding: Encoding, store: str, tmp_path: Path) -> None:
    """However often and wherever the socket is cut: every token once, every message done once."""
    randomness = random.Random(f"{SEED} {encoding} {store}")
    wanted = max(1, CUTS // 4)
    url = "memory://" if store == "memory" else f"sqlite:///{tmp_path}/gateway.sqlite3"
    expected: list[str] = []
    asked: list[str] = []
    with trio.fail_after(100):
        async with live_gateway(url) as gateway, trio.open_nursery() as nursery:
            proxy = CuttingProxy(gateway.port, randomness)
            await nursery.start(proxy.run)
            async with open_session(
                proxy.url, session_id="s1", encoding=encoding, randomness=lambda: 0.0
            ) as session:
                conversation = _Conversation(session)
                nursery.start_soon(conversation.listen)
                while proxy.cuts < wanted:
                    number = randomness.choice([1, 20, 300, 1500])
                    if randomness.random() < 0.2:
                        asked.append("create hello.py that prints hello")
                        expected += ["I will create hello.py for you. "]
                        expected += ['Done: hello.py is there. Say "read hello.py" to see it.']
                        await conversation.create("hello.py")
                    else:
                        asked.append(f"count to {number}")
                        expected += [f"{count} " for count in range(1, number + 1)]
                        await conversation.count_to(number)
            history = await gateway.history("s1")
            nursery.cancel_scope.cancel()
    assert conversation.text == "".join(expected)
    assert_exact(conversation.events)
    assert [entry["content"] for entry in history if entry["role"] == "user"] == asked
    assert all(outcome == "completed" for _, outcome in conversation.turns)
    assert len({turn for turn, _ in conversation.turns}) == len(conversation.turns)
    assert proxy.cuts >= wanted

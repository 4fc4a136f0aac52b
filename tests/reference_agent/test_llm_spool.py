"""Answers that outlive whoever asked for them."""

import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from gateway.reference_agent.brain import BrainError, Say, Token
from gateway.reference_agent.llm_spool import HeldAnswer, LlmSpool
from gateway.reference_agent.llm_spool_protocol import Ask, End, Failure, Line, decode_line

KEEP = 100.0


class Counting:
    """Says a number every ``pause`` seconds, as many as the request asks for, and counts calls and stops."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.stopped: list[tuple[str, float]] = []
        self.pause = 1.0
        self._error = error

    async def answer(self, session_id: str, agent: str, body: Mapping[str, Any], say: Say) -> None:
        """Count."""
        self.asked.append(f"{session_id} {agent} {body['to']}")
        try:
            for number in range(body["to"]):
                await trio.sleep(self.pause)
                await say(Token(f"{number} "))
        except trio.Cancelled:
            self.stopped.append((session_id, trio.current_time()))
            raise
        if self._error is not None:
            raise self._error


def ask_for(to: int, session_id: str = "s1", question: str = "q1") -> Ask:
    """A question."""
    return Ask(session_id=session_id, question=question, agent="ask", said=0, body={"to": to})


async def read(answer: HeldAnswer) -> list[Line | None]:
    """All of an answer, from its beginning."""
    data, told = b"", 0
    with answer.being_read():
        while True:
            more, told = await answer.next_lines(told)
            if not more:
                return [decode_line(line) for line in data.splitlines()]
            data += more


@asynccontextmanager
async def spool_of(asker: Counting) -> AsyncIterator[LlmSpool]:
    """A spool; its answers end with the block."""
    async with trio.open_nursery() as nursery:
        yield LlmSpool(asker, nursery, KEEP)
        nursery.cancel_scope.cancel()


async def test_the_llm_is_asked_once_however_often_the_answer_is_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """While it comes in and when it is complete, each time from its beginning."""
    asker = Counting()
    whole = [Token("0 "), Token("1 "), Token("2 "), End()]
    async with spool_of(asker) as spool:
        with trio.move_on_after(1.5):
            await read(spool.open(ask_for(3)))
        assert await read(spool.open(ask_for(3))) == whole
        assert await read(spool.open(ask_for(3))) == whole
    assert asker.asked == ["s1 ask 3"]
    assert trio.current_time() == 3


async def test_releasing_stops_the_call_and_forgets_the_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """At once; whoever still reads sees a cut, and no end. Another question's release does nothing."""
    asker = Counting()
    read_lines: list[Line | None] = []
    async with spool_of(asker) as spool, trio.open_nursery() as nursery:

        async def listen() -> None:
            read_lines.extend(await read(spool.open(ask_for(10))))

        nursery.start_soon(listen)
        await trio.sleep(2.5)
        spool.release("s1", "q0")
        assert len(spool) == 1
        spool.release("s1", "q1")
        assert len(spool) == 0
    assert asker.stopped == [("s1", 2.5)]
    assert read_lines == [Token("0 "), Token("1 ")]


async def test_an_answer_let_go_as_it_ends_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its last line, which would count as held for ever."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool.MAX_HELD_BYTES", 100)
    ends = trio.Event()

    class Ending(Counting):
        async def answer(self, session_id: str, agent: str, body: Mapping[str, Any], say: Say) -> None:
            await (super().answer(session_id, agent, body, say) if body["to"] else ends.wait())

    asker = Ending()
    asker.pause = 0
    async with spool_of(asker) as spool:
        for number in range(10):
            spool.open(ask_for(0, f"s{number}"))
        await trio.testing.wait_all_tasks_blocked()
        ends.set()  # all of them are about to end, and nothing can cancel that any more
        for number in range(10):
            spool.release(f"s{number}", "q1")
        assert await read(spool.open(ask_for(1))) == [Token("0 "), End()]


async def test_the_next_question_of_a_session_ends_the_one_before(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A session asks one at a time; other sessions are left alone."""
    asker = Counting()
    async with spool_of(asker) as spool:
        spool.open(ask_for(10))
        spool.open(ask_for(2, session_id="s2"))
        await trio.sleep(1.5)
        assert await read(spool.open(ask_for(1, question="q2"))) == [Token("0 "), End()]
        assert await read(spool.open(ask_for(2, session_id="s2"))) == [Token("0 "), Token("1 "), End()]
    assert sorted(asker.asked) == ["s1 ask 1", "s1 ask 10", "s2 ask 2"]
    assert asker.stopped == [("s1", 1.5)]


@pytest.mark.parametrize(("length", "stopped"), [(1000, [("s1", 2.5 + KEEP)]), (3, [])])
async def test_what_nobody_asks_for_is_stopped_and_forgotten_in_time(
    autojump_clock: trio.testing.MockClock, length: int, stopped: list[tuple[str, float]]
) -> None:
    """Counted from when the last reader left, whether the answer is complete or not."""
    asker = Counting()
    async with spool_of(asker) as spool:
        with trio.move_on_after(2.5):
            await read(spool.open(ask_for(length)))
        await trio.sleep(KEEP - 0.1)
        assert len(spool) == 1
        await trio.sleep(0.2)
        assert len(spool) == 0
    assert asker.stopped == stopped


async def test_what_is_read_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    """However long the LLM takes."""
    async with spool_of(Counting()) as spool:
        lines = await read(spool.open(ask_for(int(3 * KEEP))))
    assert len(lines) == 3 * KEEP + 1


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (BrainError("LLM_REFUSED", "no", retryable=False), Failure("LLM_REFUSED", "no", retryable=False)),
        (RuntimeError("x"), Failure("INTERNAL_ERROR", "The agent failed. Try again.", retryable=True)),
    ],
)
async def test_a_failed_call_is_the_last_line(
    autojump_clock: trio.testing.MockClock, error: Exception, last: Failure
) -> None:
    """Behind what came before it; no other answer notices."""
    async with spool_of(Counting(error)) as spool:
        other = spool.open(ask_for(5, session_id="s2"))
        assert await read(spool.open(ask_for(1))) == [Token("0 "), last]
        assert len(await read(other)) == 6


async def test_the_question_is_not_kept(autojump_clock: trio.testing.MockClock) -> None:
    """A long conversation is far larger than what the LLM says to it."""

    class Body(dict[str, int]):
        """Something that can be seen to be gone."""

    body = Body(to=1)
    seen = weakref.ref(body)
    async with spool_of(Counting()) as spool:
        answer = spool.open(Ask("s1", "q1", "ask", 0, body))
        del body
        await read(answer)
        gc.collect()
        assert len(spool) == 1
        assert seen() is None


async def test_an_answer_is_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an error."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool.MAX_ANSWER_BYTES", 100)
    async with spool_of(Counting()) as spool:
        *_, last = await read(spool.open(ask_for(10)))
    assert isinstance(last, Failure)
    assert (last.code, last.retryable) == ("LLM_PROTOCOL_ERROR", False)


async def test_all_answers_together_are_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody reads goes first, the oldest at the front; when all is read, the one that grows ends."""
    monkeypatch.setattr("gateway.reference_agent.llm_spool.MAX_HELD_BYTES", 150)
    async with spool_of(Counting()) as spool:
        spool.open(ask_for(2, session_id="unread 1"))
        await trio.sleep(3)
        spool.open(ask_for(2, session_id="unread 2"))
        await trio.sleep(3)
        kept = spool.open(ask_for(1, session_id="read"))
        with kept.being_read():
            *_, last = await read(spool.open(ask_for(10)))
            assert isinstance(last, Failure)
            assert (last.code, last.retryable) == ("LLM_UNAVAILABLE", True)
            assert len(spool) == 2
            spool.release("read", "q1")
            spool.release("s1", "q1")
        lines = await read(spool.open(ask_for(3, session_id="later")))
        assert len(lines) == 4

"""Answers of the LLM that outlive whoever asked for them: one per session, kept until it is released."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import structlog
import trio

from gateway.reference_agent.brain import BrainError, Piece, Say
from gateway.reference_agent.llm_spool_protocol import Ask, End, Failure, encode_lines

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""Of one answer, as lines; a model's longest answers are some 100 000 tokens, about 4 MiB."""

MAX_HELD_BYTES = 128 * 1024 * 1024
"""Of all answers; those that nobody reads go first."""

CHUNK_BYTES = 65_536
"""What is ready is joined up to this size."""


class Asker(Protocol):
    """Whoever asks the LLM: an `LlmClient`, or a test."""

    async def answer(self, session_id: str, agent: str, body: Mapping[str, Any], say: Say) -> None:
        """See `LlmClient.answer`."""
        ...


class HeldAnswer:
    """One answer, while it comes in and until it is let go.

    Resource handling: ``scope`` is around the LLM call and the keeping. It ends ``keep`` seconds after the
    last reader has left, unless one comes back.
    """

    def __init__(self, ask: Ask, keep: float) -> None:
        self.session_id = ask.session_id
        self.question = ask.question
        self.said = ask.said
        self.scope = trio.CancelScope(deadline=trio.current_time() + keep)
        self.size = 0
        self._keep = keep
        self._parts: list[bytes] = []
        self._complete = False
        self._readers = 0
        self._news = trio.lowlevel.ParkingLot()

    @property
    def is_read(self) -> bool:
        """Whether anybody reads it now."""
        return self._readers > 0

    def add(self, part: bytes, *, last: bool = False) -> None:
        """Add lines behind those that are there."""
        self._parts.append(part)
        self.size += len(part)
        self._complete = last
        self._news.unpark_all()

    def let_go(self) -> None:
        """Stop the call if it is running, and forget the answer; whoever reads it sees that it is cut."""
        self._parts.clear()
        self._complete = True
        self.scope.cancel()
        self._news.unpark_all()

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """Count one more reader until the end of the block."""
        self._readers += 1
        self.scope.deadline = float("inf")
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self.scope.deadline = trio.current_time() + self._keep

    async def next_lines(self, after: int) -> tuple[bytes, int]:
        """The lines behind the first ``after`` parts, and their number as parts; empty at the end. Waits."""
        while after >= len(self._parts) and not self._complete:
            await self._news.park()
        first, size = after, 0
        while after < len(self._parts) and size < CHUNK_BYTES:
            size += len(self._parts[after])
            after += 1
        return b"".join(self._parts[first:after]), after


class LlmSpool:
    """Holds at most one answer per session, each in a task of ``nursery``.

    Error handling: whatever goes wrong in a call becomes the last line of its answer.
    """

    def __init__(self, asker: Asker, nursery: trio.Nursery, keep: float) -> None:
        self._asker = asker
        self._nursery = nursery
        self._keep = keep
        self._held: dict[str, HeldAnswer] = {}
        self._size = 0
        self._let_go_one = trio.lowlevel.ParkingLot()
        self._log = structlog.get_logger("reference_agent.llm")

    def __len__(self) -> int:
        """How many answers are held, complete or not."""
        return len(self._held)

    def open(self, ask: Ask) -> HeldAnswer:
        """The answer to this question: the one that is held, or a new one, for which the LLM is asked.

        A session asks one question at a time, so an answer to another question is over.
        """
        held = self._held.get(ask.session_id)
        if held is not None and held.question == ask.question:
            return held
        if held is not None:
            self._let_go(held)
        answer = self._held[ask.session_id] = HeldAnswer(ask, self._keep)
        self._nursery.start_soon(self._hold, answer, ask)
        return answer

    def release(self, session_id: str, question: str) -> None:
        """Let go of the answer to this question, if it is held. Never blocks."""
        held = self._held.get(session_id)
        if held is not None and held.question == question:
            self._let_go(held)

    async def wait_let_go(self) -> None:
        """Return once an answer was let go."""
        await self._let_go_one.park()

    async def _hold(self, answer: HeldAnswer, ask: Ask) -> None:
        try:
            with answer.scope:
                last = await self._call(answer, ask)
                del ask  # it may be far larger than its answer, which is all that is kept
                self._append(answer, encode_lines(last), last=True)
                await trio.sleep_forever()
        finally:
            self._let_go(answer)

    async def _call(self, answer: HeldAnswer, ask: Ask) -> End | Failure:
        async def say(*pieces: Piece) -> None:
            await trio.lowlevel.checkpoint()
            self._add(answer, encode_lines(*pieces))

        try:
            await self._asker.answer(ask.session_id, ask.agent, ask.body, say)
        except BrainError as exc:
            return Failure(exc.code, exc.message, exc.retryable)
        except Exception:
            self._log.exception("llm_call_failed", session_id=ask.session_id)
            return Failure("INTERNAL_ERROR", "The agent failed. Try again.", retryable=True)
        return End()

    def _add(self, answer: HeldAnswer, lines: bytes) -> None:
        if answer.size + len(lines) > MAX_ANSWER_BYTES:
            raise BrainError("LLM_PROTOCOL_ERROR", "The LLM's answer is too large.", retryable=False)
        unread = (one for one in list(self._held.values()) if one is not answer and not one.is_read)
        while self._size + len(lines) > MAX_HELD_BYTES:
            oldest = next(unread, None)
            if oldest is None:
                raise BrainError("LLM_UNAVAILABLE", "Too many answers at once. Try later.", retryable=True)
            self._let_go(oldest)
        self._append(answer, lines)

    def _append(self, answer: HeldAnswer, lines: bytes, *, last: bool = False) -> None:
        # One that was let go must stay cut: a reader would take what is left of it for all of it.
        if not answer.scope.cancel_called:
            answer.add(lines, last=last)
            self._size += len(lines)

    def _let_go(self, answer: HeldAnswer) -> None:
        if self._held.get(answer.session_id) is answer:
            del self._held[answer.session_id]
            self._size -= answer.size
        answer.let_go()
        self._let_go_one.unpark_all()

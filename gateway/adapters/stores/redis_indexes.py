"""What the Redis store knows about many sessions at once: which are unfinished, which were not used for long.

A cluster has no transaction over many sessions, so an index is written before the commit that makes it true
and taken back after the one that makes it needless. It may say too much, never too little, and whoever reads
it asks the session itself.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Collection, Iterable

from gateway.adapters.stores.redis_commits import FINISHED, UNFINISHED
from gateway.adapters.stores.redis_connection import Answer, Argument, RedisConnection
from gateway.adapters.stores.redis_keys import TOUCHED
from gateway.adapters.stores.redis_keys import UNFINISHED as UNFINISHED_SESSIONS
from gateway.core.packing import PackedCommit
from gateway.core.storage import TurnState

STEP_SESSIONS = 50
"""Sessions per pipeline of housekeeping: commits get their turn in between."""


class SessionIndexes:
    """The indexes, as one process keeps them."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._marks = itertools.count(secrets.randbits(40))
        """A mark is taken back only if it is still the one that was found needless: each is different."""
        self._marked: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        """Marks that are needless by now."""

    def marking(self, steps: Iterable[PackedCommit]) -> list[tuple[Argument, ...]]:
        """The commands that index what the steps may make of their sessions, before they do."""
        unfinished: list[Argument] = []
        touched: list[Argument] = []
        for step in steps:
            commit = step.more
            if commit is None:
                continue
            record = commit.record
            if commit.queued or (record is not None and record.turn_state is TurnState.RUNNING):
                mark = self._marked[step.session_id] = next(self._marks)
                self._finished.pop(step.session_id, None)
                unfinished += [mark, step.session_id]
            if record is not None:
                touched += [repr(record.touched_at), step.session_id]
        commands: list[tuple[Argument, ...]] = []
        if unfinished:
            commands.append((b"ZADD", UNFINISHED_SESSIONS, *unfinished))
        if touched:
            commands.append((b"ZADD", TOUCHED, *touched))
        return commands

    def note(self, session_id: str, answer: Answer) -> None:
        """Take note of what a commit of a session made of it, by the function's answer."""
        if answer == FINISHED and (mark := self._marked.pop(session_id, None)) is not None:
            self._finished[session_id] = mark
        elif answer == UNFINISHED and (mark := self._finished.pop(session_id, None)) is not None:
            # An earlier commit in the same call had left nothing to do.
            self._marked[session_id] = mark

    async def marks(self) -> dict[str, int]:
        """Sessions that may have a turn running or messages queued. Raises ``StoreUnavailable``."""
        found = await self._connection.call(b"ZRANGE", UNFINISHED_SESSIONS, 0, -1, b"WITHSCORES")
        return {member.decode(): int(score) for member, score in found}

    async def unfinished(self, marks: dict[str, int]) -> list[str]:
        """Those of some marked sessions that really have. Raises ``StoreUnavailable``."""
        unfinished: list[str] = []
        session_ids = list(marks)
        for start in range(0, len(session_ids), STEP_SESSIONS):
            some = session_ids[start : start + STEP_SESSIONS]
            answers = await self._connection.each("unfinished", some)
            unfinished += [each for each, answer in zip(some, answers, strict=True) if answer == UNFINISHED]
        for session_id, mark in marks.items():
            # Marked again meanwhile, by this process, it has a newer mark.
            (self._marked if session_id in unfinished else self._finished).setdefault(session_id, mark)
        return unfinished

    async def expire(
        self, before: float, keep: Collection[str], others: Collection[str]
    ) -> tuple[int, list[str]]:
        """Drop sessions last touched before ``before``, except those in ``keep``, in small steps.

        Nor those that one of the nodes ``others`` has.

        Returns how many were dropped, and the ids of those and of others that were found gone.
        """
        dropped = passed = 0
        gone: list[str] = []
        while True:
            some = await self._connection.call(
                *(b"ZRANGE", TOUCHED, b"-inf", f"({before!r}", b"BYSCORE"),
                *(b"LIMIT", passed, STEP_SESSIONS, b"WITHSCORES"),
            )
            if not some:
                return dropped, gone
            scores = {member.decode(): float(score) for member, score in some}
            old = [session_id for session_id in scores if session_id not in keep]
            passed += len(scores) - len(old)
            if not old:
                continue
            needless: list[Argument] = []
            younger: list[Argument] = []
            answers = await self._connection.each("expire", old, repr(before), *others)
            for session_id, answer in zip(old, answers, strict=True):
                if answer == b"held":
                    passed += 1
                elif answer in (b"dropped", b""):
                    dropped += answer == b"dropped"
                    gone.append(session_id)
                    if (mark := self._marked.pop(session_id, None)) is not None:
                        self._finished[session_id] = mark
                    needless += [session_id, repr(scores[session_id])]
                else:
                    younger += [answer, session_id]
            if needless:
                await self._connection.function("unmark", [TOUCHED], *needless)
            if younger:
                await self._connection.call(b"ZADD", TOUCHED, b"GT", *younger)

    async def tidy(self) -> None:
        """Take needless marks back. Raises ``StoreUnavailable``."""
        while self._finished:
            some = dict(itertools.islice(self._finished.items(), STEP_SESSIONS))
            pairs: list[Argument] = []
            for session_id, mark in some.items():
                pairs += [session_id, mark]
            await self._connection.function("unmark", [UNFINISHED_SESSIONS], *pairs)
            for session_id, mark in some.items():
                if self._finished.get(session_id) == mark:
                    del self._finished[session_id]

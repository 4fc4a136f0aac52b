"""What the Redis store knows about many sessions at once: which are unfinished, which were not used for long.

A cluster has no transaction over many sessions, so an index is written before the commit that makes it true
and taken back after the one that makes it needless. It may say too much, never too little, and whoever reads
it asks the session itself.
"""

from __future__ import annotations

import itertools
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from gateway.adapters.stores.redis_commits import FINISHED, UNFINISHED
from gateway.adapters.stores.redis_connection import RedisConnection, ShardOf
from gateway.adapters.stores.redis_keys import Shard
from gateway.adapters.stores.redis_link import Answer, Argument, Command
from gateway.core.packing import PackedCommit
from gateway.core.storage import TurnState

STEP_SESSIONS = 50
"""Sessions per pipeline of housekeeping: commits get their turn in between."""


class Mark(NamedTuple):
    """That a session may be unfinished, and where that is said."""

    shard: Shard
    number: int


class SessionIndexes:
    """The indexes, as one process keeps them."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(secrets.randbits(40))
        """A mark is taken back only if it is still the one that was found needless: each is different."""
        self._marked: dict[str, Mark] = {}
        self._finished: dict[str, Mark] = {}
        """Marks that are needless by now."""

    def marking(self, steps: Iterable[PackedCommit]) -> tuple[list[Command], list[Command]]:
        """The commands that index what the steps may make of their sessions, before they do.

        First those that have to be carried out before the steps are sent, then those that may go with them.
        """
        unfinished: defaultdict[ShardOf, list[Argument]] = defaultdict(list)
        touched: defaultdict[ShardOf, list[Argument]] = defaultdict(list)
        for step in steps:
            commit = step.more
            if commit is None:
                continue
            record = commit.record
            where = self._connection.shard_of(step.session_id)
            if commit.queued or (record is not None and record.turn_state is TurnState.RUNNING):
                mark = self._marked[step.session_id] = Mark(where.shard, next(self._numbers))
                self._finished.pop(step.session_id, None)
                unfinished[where] += [mark.number, step.session_id]
            if record is not None:
                touched[where] += [repr(record.touched_at), step.session_id]
        ahead: list[Command] = []
        along: list[Command] = []
        for where, pairs in unfinished.items():
            (along if where.is_near else ahead).append((b"ZADD", where.shard.unfinished, *pairs))
        for where, pairs in touched.items():
            (along if where.is_near else ahead).append((b"ZADD", where.shard.touched, *pairs))
        return ahead, along

    def note(self, session_id: str, answer: Answer) -> None:
        """Take note of what a commit of a session made of it, by the function's answer."""
        if answer == FINISHED and (mark := self._marked.pop(session_id, None)) is not None:
            self._finished[session_id] = mark
        elif answer == UNFINISHED and (mark := self._finished.pop(session_id, None)) is not None:
            # An earlier commit in the same call had left nothing to do.
            self._marked[session_id] = mark

    async def marks(self) -> dict[str, Mark]:
        """Sessions that may have a turn running or messages queued. Raises ``StoreUnavailable``."""
        shards = self._connection.shards
        answers = await self._connection.all_of(
            [(b"ZRANGE", shard.unfinished, 0, -1, b"WITHSCORES") for shard in shards]
        )
        return {
            member.decode(): Mark(shard, int(score))
            for shard, found in zip(shards, answers, strict=True)
            for member, score in found
        }

    async def unfinished(self, marks: dict[str, Mark]) -> list[str]:
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
        dropped = 0
        gone: list[str] = []
        shards = self._connection.shards
        counts = await self._connection.all_of(
            [(b"ZCOUNT", shard.touched, b"-inf", f"({before!r}") for shard in shards]
        )
        for shard, count in zip(shards, counts, strict=True):
            if count:
                dropped += await self._expire(shard.touched, before, keep, others, gone)
        return dropped, gone

    async def _expire(
        self,
        touched: bytes,
        before: float,
        keep: Collection[str],
        others: Collection[str],
        gone: list[str],
    ) -> int:
        dropped = passed = 0
        while True:
            some = await self._connection.call(
                *(b"ZRANGE", touched, b"-inf", f"({before!r}", b"BYSCORE"),
                *(b"LIMIT", passed, STEP_SESSIONS, b"WITHSCORES"),
            )
            if not some:
                return dropped
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
                await self._connection.function("unmark", [touched], *needless)
            if younger:
                await self._connection.call(b"ZADD", touched, b"GT", *younger)

    async def tidy(self) -> None:
        """Take needless marks back. Raises ``StoreUnavailable``."""
        while self._finished:
            some = dict(itertools.islice(self._finished.items(), STEP_SESSIONS))
            pairs: defaultdict[Shard, list[Argument]] = defaultdict(list)
            for session_id, mark in some.items():
                pairs[mark.shard] += [session_id, mark.number]
            for shard, needless in pairs.items():
                await self._connection.function("unmark", [shard.unfinished], *needless)
            for session_id, mark in some.items():
                if self._finished.get(session_id) == mark:
                    del self._finished[session_id]

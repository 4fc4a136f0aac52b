"""Which node may write which session, in Redis.

A node says every second that it lives. A session names its node, with a fencing number that rises whenever
the node changes; each commit carries the number, and Redis refuses another one. So a lease needs no renewal
of its own: it holds for as long as its node lives, and nothing that a node wrongly believes can do harm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import trio

from gateway.adapters.stores.redis_connection import RedisConnection
from gateway.adapters.stores.redis_indexes import STEP_SESSIONS, Mark, SessionIndexes
from gateway.adapters.stores.redis_keys import NODES, keys_of
from gateway.adapters.stores.redis_mail import RedisMail
from gateway.core.errors import StoreUnavailable
from gateway.node_ports import SessionLeases
from gateway.ports import Telemetry

LEASE_SECONDS = 4.0
"""A node that was silent for so long is dead: others take its sessions over."""
_BEATS = 4
"""Signs of life within that time."""
_NOBODYS = "-"
"""The fencing number of a session that this node does not have: it never fits."""


class RedisLeases(SessionLeases):
    """See ``node_ports.SessionLeases``. ``node``: a name that no other process ever had."""

    def __init__(
        self,
        connection: RedisConnection,
        indexes: SessionIndexes,
        *,
        node: str,
        telemetry: Telemetry,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._connection = connection
        self._indexes = indexes
        self._telemetry = telemetry
        self._lease_seconds = lease_seconds
        self._mail = RedisMail(connection, node=node, telemetry=telemetry)
        self._fences: dict[str, str] = {}
        self._is_in_use = False
        self._node = node
        self.others: frozenset[str] = frozenset()
        """The other nodes that lived as of the last beat."""

    @property
    def node(self) -> str:
        """This node's name."""
        return self._node

    @property
    def mail(self) -> RedisMail:
        """The way to the other nodes."""
        return self._mail

    def fence(self, session_id: str) -> str:
        """What a commit of the session has to carry; empty when leases are not in use."""
        return self._fences.get(session_id, _NOBODYS if self._is_in_use else "")

    async def acquire(self, session_id: str) -> str | None:
        """Make this node the session's; or name the one that has it. Raises ``StoreUnavailable``."""
        self._is_in_use = True
        owner_key = keys_of(session_id)[0]
        while True:
            node, fence = await self._connection.call(b"HMGET", owner_key, b"node", b"fence")
            found: str | None = None if node is None else node.decode()
            if found == self._node:
                self._fences[session_id] = fence.decode()
                return None
            # It may have begun or ended to live after the last beat: that is not answered from memory.
            if found is not None and await self._lives(found):
                return found
            answer = await self._connection.function("acquire", [owner_key], self._node, fence or b"")
            if answer[0].decode() == self._node:
                self._fences[session_id] = answer[1].decode()
                return None

    async def _lives(self, node: str) -> bool:
        await self._beat()
        return node in self.others

    async def holds(self, session_id: str) -> bool:
        """Whether nobody had the session since this node acquired it. Raises ``StoreUnavailable``."""
        fence = self._fences.get(session_id, _NOBODYS)
        found = await self._connection.call(b"HGET", keys_of(session_id)[0], b"fence")
        return found is not None and found.decode() == fence

    async def release(self, session_ids: Collection[str]) -> None:
        """Let go of sessions, which other nodes may then have at once. Raises ``StoreUnavailable``."""
        for session_id in session_ids:
            self._fences.pop(session_id, None)
        for some in _steps(session_ids):
            await self._connection.each("release", some, self._node)

    async def leave(self) -> None:
        """This node ends: whatever it still has is free at once. Raises ``StoreUnavailable``."""
        self._fences.clear()
        await self._connection.call(b"ZREM", NODES, self._node)

    async def run(
        self,
        lost: Callable[[str], None],
        ownerless: Callable[[Sequence[str]], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Say that this node lives, until cancelled. Started once that was said; see the port."""
        self._is_in_use = True
        await self._beat()
        task_status.started()
        beats = 0
        while True:
            await trio.sleep(self._lease_seconds / _BEATS)
            try:
                if not await self._beat():
                    self._telemetry.warning("lease_lapsed", sessions=len(self._fences))
                    await self._find_lost(lost)
                beats += 1
                if beats % 2 == 0:
                    ownerless(await self._find_ownerless())
            except StoreUnavailable:
                self._telemetry.count("gateway_store_failures_total")

    async def _beat(self) -> bool:
        """Say that this node lives; False when it had been silent for so long that others thought it dead."""
        lease = int(self._lease_seconds * 1000)
        lived, *nodes = await self._connection.function("beat", [NODES], self._node, lease)
        others = frozenset(node.decode() for node in nodes) - {self._node}
        for node in self.others - others:
            self._mail.forget(node)
        self.others = others
        return bool(lived)

    async def _find_lost(self, lost: Callable[[str], None]) -> None:
        for some in _steps(list(self._fences)):
            answers = await self._connection.all_of(
                [(b"HGET", keys_of(session_id)[0], b"fence") for session_id in some]
            )
            for session_id, answer in zip(some, answers, strict=True):
                held = self._fences.get(session_id)
                if held is not None and (answer is None or answer.decode() != held):
                    del self._fences[session_id]
                    lost(session_id)

    async def _find_ownerless(self) -> list[str]:
        marks = await self._indexes.marks()
        found: dict[str, Mark] = {}
        for some in _steps([session_id for session_id in marks if session_id not in self._fences]):
            answers = await self._connection.all_of([(b"HGET", keys_of(each)[0], b"node") for each in some])
            for session_id, answer in zip(some, answers, strict=True):
                if answer is None or answer.decode() not in self.others:
                    found[session_id] = marks[session_id]
        # Last, for it costs most: nearly all that are marked have a node that lives.
        return await self._indexes.unfinished(found)


def _steps(session_ids: Collection[str]) -> list[list[str]]:
    every = list(session_ids)
    return [every[start : start + STEP_SESSIONS] for start in range(0, len(every), STEP_SESSIONS)]

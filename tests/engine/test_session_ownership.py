"""How fast sessions are given away and taken over, on virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import pytest
import trio
import trio.testing

from gateway.core.errors import StoreUnavailable
from gateway.core.letters import Letter
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.session_ownership import ADOPT_SECONDS, ALL_MOVED_SECONDS, SessionOwnership
from gateway.node_ports import NodeMail, SessionLeases
from gateway.ports import ResumePoint
from tests.conformance.session_store import RecordingTelemetry
from tests.engine.fakes import Bench, DurableMemoryStore, FakeConnection
from tests.engine.test_multiplexed import open_multiplexed

Mock = trio.testing.MockClock


class SilentMail(NodeMail):
    """Nobody writes."""

    def post(self, node: str, letter: Letter) -> None:
        """Nothing."""

    async def run(
        self,
        take: Callable[[str, Sequence[Letter]], None],
        lost: Callable[[str], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Wait."""
        task_status.started()
        await trio.sleep_forever()


class FakeLeases(SessionLeases):
    """This node has whatever it asks for, until it is taken away; the test reads what was let go when."""

    def __init__(self) -> None:
        self._mail = SilentMail()
        self.tell_ownerless: Callable[[Sequence[str]], None] = lambda _: None
        self.acquired: list[str] = []
        self.taken_by: str | None = None
        """Who has every session now; None: this node."""
        self.is_away = False
        """Whether nobody can be asked."""
        self.released: list[tuple[float, Collection[str]]] = []

    @property
    def node(self) -> str:
        """A name."""
        return "node"

    @property
    def mail(self) -> NodeMail:
        """To nobody."""
        return self._mail

    async def acquire(self, session_id: str) -> str | None:
        """It is this node's, unless it was taken."""
        await trio.lowlevel.checkpoint()
        if self.taken_by is None:
            self.acquired.append(session_id)
        return self.taken_by

    async def holds(self, session_id: str) -> bool:
        """As the test says."""
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise StoreUnavailable("The session store is away. Try again later.")
        return self.taken_by is None

    async def release(self, session_ids: Collection[str]) -> None:
        """Remember it."""
        await trio.lowlevel.checkpoint()
        if session_ids:
            self.released.append((trio.current_time(), session_ids))

    async def leave(self) -> None:
        """Nothing."""
        await trio.lowlevel.checkpoint()

    async def run(
        self,
        lost: Callable[[str], None],
        ownerless: Callable[[Sequence[str]], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Wait."""
        self.tell_ownerless = ownerless
        task_status.started()
        await trio.sleep_forever()


class SharedStore(DurableMemoryStore):
    """A store that other nodes are on."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_leases = FakeLeases()

    @property
    def leases(self) -> SessionLeases:
        """Of this node."""
        return self.fake_leases


async def with_sessions(nursery: trio.Nursery, count: int) -> tuple[Bench, FakeLeases, list[FakeConnection]]:
    """A node with so many sessions, each with a socket."""
    store = SharedStore()
    bench = await Bench(nursery, store=store, limits=Limits(drain_timeout=30)).start()
    sockets = []
    for number in range(count):
        session_id = f"s{number}"
        await store.claim(session_id, "anonymous", 0)
        sockets.append(bench.connect(session_id, dialect=Dialect.V2_JSON))
        await sockets[-1].wait_for("welcome")
    return bench, store.fake_leases, sockets


async def test_sessions_are_given_away_a_few_at_a_time(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Four each 50 ms, for taking them over is work; a client is told to go when its session is free."""
    bench, leases, sockets = await with_sessions(nursery, 12)
    began = trio.current_time()
    nursery.start_soon(bench.hub.drain)
    await sockets[0].wait_for("draining")
    assert [socket.types().count("draining") for socket in sockets] == [1] * 4 + [0] * 8
    await sockets[-1].wait_for("draining")

    times = [round(at - began, 3) for at, _ in leases.released]
    assert [len(some) for _, some in leases.released] == [4, 4, 4]
    assert times == pytest.approx([0.0, 0.05, 0.1], abs=0.02)
    hints = [socket.objects()[-1]["reconnect_after_ms"] for socket in sockets]
    assert max(hints) < 100
    assert len(set(hints)) > 4


async def test_sockets_that_other_nodes_can_serve_leave_a_few_at_a_time(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Multiplexed ones, here: all at once they would be a herd at the next node."""
    bench, _, _ = await with_sessions(nursery, 0)
    sockets = [open_multiplexed(bench) for _ in range(12)]
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(bench.hub.drain)
    told = []
    for _ in range(3):
        await trio.sleep(0.04)
        told.append([socket.types() for socket in sockets].count(["draining"]))
    await trio.sleep(0.2)

    assert told == [4, 8, 12]
    assert all(socket.closed is not None and socket.closed[0] == 1012 for socket in sockets)


async def test_what_was_given_away_does_not_come_back(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A socket that another node passes on while this one drains is sent away; its session stays free."""
    bench, leases, sockets = await with_sessions(nursery, 12)
    nursery.start_soon(bench.hub.drain)
    await sockets[0].wait_for("draining")
    late = bench.connect("s0", dialect=Dialect.V2_JSON)
    await trio.sleep(5)

    assert late.closed is not None
    assert late.closed[0] == 1012
    assert late.types() == []
    assert leases.acquired == [f"s{number}" for number in range(12)]


async def test_many_sessions_are_given_away_in_time(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """More go at once, so that all are gone in about eight seconds."""
    bench, leases, sockets = await with_sessions(nursery, 1500)
    began = trio.current_time()
    await bench.hub.drain()
    assert ALL_MOVED_SECONDS - 1 < trio.current_time() - began < ALL_MOVED_SECONDS + 1
    assert sum(len(some) for _, some in leases.released) == 1500
    assert all(socket.closed is not None and socket.closed[0] == 1012 for socket in sockets)
    a_second = Counter(int(at - began) for at, some in leases.released for _ in some)
    assert max(a_second[second] for second in range(8)) < 300


def ahead_of(socket: FakeConnection) -> ResumePoint:
    """Of a client that saw more of its session than this node has."""
    return ResumePoint(str(socket.objects()[0]["epoch"]), 1000)


async def test_a_client_that_knows_more_shows_that_the_session_was_taken(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Its node was paused. It begins no epoch: it lets go, with 1012, and the new owner serves the client."""
    bench, leases, [old] = await with_sessions(nursery, 1)
    leases.taken_by = "other"
    client = bench.connect("s0", dialect=Dialect.V2_JSON, resume=ahead_of(old))
    await trio.sleep(1)

    assert old.closed == (1012, "session restarted")
    assert old.types() == ["welcome"]
    assert bench.hub.runners == {}
    assert (client.closed, client.types()) == (None, [])
    assert "relayed" in [fields.get("outcome") for _, _, fields in bench.telemetry.entries]


async def test_a_client_of_another_epoch_shows_it_too(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The new owner may have begun one; this node's is over then."""
    bench, leases, [old] = await with_sessions(nursery, 1)
    leases.taken_by = "other"
    client = bench.connect("s0", dialect=Dialect.V2_JSON, resume=ResumePoint("newer", 0))
    await trio.sleep(1)

    assert old.closed == (1012, "session restarted")
    assert (client.closed, client.types()) == (None, [])


async def test_nobody_is_told_of_an_epoch_while_it_is_not_known_whose_the_session_is(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """That client is to come back (1013); the others go on. Its turn comes when the store can be asked."""
    bench, leases, [old] = await with_sessions(nursery, 1)
    leases.is_away = True
    early = bench.connect("s0", dialect=Dialect.V2_JSON, resume=ahead_of(old))
    await trio.sleep(1)
    assert early.closed is not None
    assert early.closed[0] == 1013
    assert early.types() == []
    assert (old.closed, old.types()) == (None, ["welcome"])

    leases.is_away = False
    again = bench.connect("s0", dialect=Dialect.V2_JSON, resume=ahead_of(old))
    assert (await again.wait_for("snapshot"))["reason"] == "epoch_changed"
    assert (await old.wait_for("snapshot"))["reason"] == "epoch_changed"


async def test_what_nobody_has_is_carried_on_one_after_the_other(autojump_clock: Mock) -> None:
    """At a pace that leaves room for clients who wait; a later look says better what there is to do."""
    leases, found = FakeLeases(), list[tuple[float, str]]()
    ownership = SessionOwnership(
        leases,
        {},
        find=lambda session_id: found.append((trio.current_time(), session_id)),
        telemetry=RecordingTelemetry(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(ownership.run)
        began = trio.current_time()
        leases.tell_ownerless(["a", "b", "c"])
        await trio.sleep(1.5 * ADOPT_SECONDS)
        leases.tell_ownerless(["d", "e"])
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [session_id for _, session_id in found] == ["a", "b", "d", "e"]
    assert [round((at - began) / ADOPT_SECONDS) for at, _ in found] == [0, 1, 2, 3]

"""All sessions of a process: loading, draining, recovering, housekeeping."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import trio
import trio.testing

from gateway.core.errors import StoreUnavailable
from gateway.core.limits import Limits
from gateway.core.storage import StoredSession
from gateway.core.websocket_protocol import Dialect
from gateway.ports import ResumePoint
from tests.engine.fakes import Bench, DurableMemoryStore, FakeConnection, user_message

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock


class SlowLoadingStore(DurableMemoryStore):
    """Takes its time to load, cannot load some sessions, and notes what it is asked to drop."""

    def __init__(self) -> None:
        super().__init__()
        self.load_takes = 0.0
        self.broken: set[str] = set()
        self.loads = 0
        self.expired_before: list[float] = []

    async def load(self, session_id: str) -> StoredSession | None:
        """Load, late or never."""
        self.loads += 1
        await trio.sleep(self.load_takes)
        if session_id in self.broken:
            raise StoreUnavailable("The session store is away. Try again later.")
        return await super().load(session_id)

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Note and do."""
        self.expired_before.append(before)
        return await super().expire(before, keep=keep)


async def test_sockets_that_come_together_share_one_loading(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A session is in memory once, however many ask for it at once."""
    store = SlowLoadingStore()
    bench = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    store.load_takes = 1.0
    sockets = [bench.connect(dialect=V2) for _ in range(5)]
    for socket in sockets:
        await socket.wait_for("welcome")
    assert (store.loads, bench.hub.session_count, bench.hub.socket_count) == (1, 1, 5)
    assert len({socket.objects()[0]["epoch"] for socket in sockets}) == 1


async def test_a_session_that_cannot_be_loaded_closes_its_socket_and_can_be_tried_again(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """1013 for those who wait for it, and nothing remembered."""
    store = SlowLoadingStore()
    bench = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    store.broken, store.load_takes = {"s"}, 1.0
    sockets = [bench.connect(dialect=V2) for _ in range(2)]
    for socket in sockets:
        await _closed(socket)
        assert socket.closed is not None
        assert socket.closed[0] == 1013
    store.broken = set()
    await bench.connect(dialect=V2).wait_for("welcome")


async def test_a_socket_that_is_still_loading_is_drained_too(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It is closed with 1012 as soon as it could join, and holds nobody up to the deadline."""
    store = SlowLoadingStore()
    bench = await Bench(nursery, store=store, limits=Limits(drain_timeout=10)).start()
    await store.claim("s", "anonymous", 0)
    store.load_takes = 1.0
    other = bench.connect("other", dialect=V2)
    await other.wait_for("welcome")
    socket = bench.connect(dialect=V2)
    await trio.sleep(0.5)
    await bench.hub.drain()
    await _closed(socket)
    assert socket.closed is not None
    assert (socket.closed[0], socket.types(), bench.hub.socket_count) == (1012, [], 0)


async def test_a_drain_does_not_wait_for_who_takes_nothing(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A blocked socket is told to go like the others, at once."""
    bench = await Bench(nursery, limits=Limits(drain_timeout=10, send_timeout=60)).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    socket.stalled = True
    stream.token("a")
    await trio.testing.wait_all_tasks_blocked()
    started = trio.current_time()
    await bench.hub.drain()
    assert trio.current_time() == started
    await _closed(socket)
    assert socket.closed is not None
    assert socket.closed[0] == 1012


async def test_one_session_that_cannot_be_recovered_keeps_nothing_else_from_starting(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It is said in the log and carried on when its client comes; the others are carried on now."""
    store = SlowLoadingStore()
    before = await Bench(nursery, store=store).start()
    for name in ("bad", "good"):
        await store.claim(name, "anonymous", 0)
        socket = before.connect(name, dialect=V2)
        socket.say(user_message(id="m"))
        await socket.wait_for("turn_started")
    store.broken = {"bad"}
    after = await Bench(nursery, store=store).start()
    assert after.hub.session_count == 1
    assert "session_not_recovered" in after.telemetry.events()


async def test_a_session_is_kept_as_long_as_its_ids_are_promised(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """An id sent again after hours is a duplicate, though its events are long gone from memory."""
    store = SlowLoadingStore()
    limits = Limits(replay_retention=600, dedupe_window=6_000, detach_grace=60)
    bench = await Bench(nursery, store=store, limits=limits).start()
    await store.claim("s", "anonymous", 0)
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    (await bench.agent.stream(0)).done()
    await socket.wait_for("turn_ended")
    epoch, seen = socket.objects()[0]["epoch"], socket.objects()[-1]["seq"]
    socket.drop()
    await trio.sleep(5_900)
    assert bench.hub.session_count == 0
    back = bench.connect(dialect=V2, resume=ResumePoint(epoch, seen))
    back.say(user_message(id="m"))
    assert (await back.wait_for("ack"))["status"] == "duplicate"
    assert back.objects()[0]["resumed"] is True
    assert max(store.expired_before) <= bench.clock.now() - 6_000 + 5


async def test_a_durable_session_leaves_memory_after_its_grace_and_comes_back(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Also while other sessions are never at rest."""
    store = SlowLoadingStore()
    bench = await Bench(nursery, store=store, limits=Limits(detach_grace=60)).start()
    for name in ("s", "busy"):
        await store.claim(name, "anonymous", 0)
    socket, busy = bench.connect(dialect=V2), bench.connect("busy", dialect=V2)
    busy.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    store.latency = 0.5
    epoch = (await socket.wait_for("welcome"))["epoch"]
    socket.drop()
    for _ in range(1000):
        await trio.sleep(0.1)
        stream.token("x")
        busy.say({"type": "ack", "seq": busy.objects()[-1].get("seq", 0)})
    assert bench.hub.session_count == 1
    back = bench.connect(dialect=V2, resume=ResumePoint(epoch, 0))
    assert (await back.wait_for("welcome"))["resumed"] is True


@pytest.mark.parametrize("when", [0.0, 59.999, 60.0, 60.001])
async def test_a_client_that_returns_at_the_last_moment_finds_its_session_either_way(
    nursery: trio.Nursery, autojump_clock: Mock, when: float
) -> None:
    """Just before the grace ends, at that instant or after it: attached, answered, at work."""
    store = SlowLoadingStore()
    bench = await Bench(nursery, store=store, limits=Limits(detach_grace=60)).start()
    await store.claim("s", "anonymous", 0)
    socket = bench.connect(dialect=V2)
    epoch = (await socket.wait_for("welcome"))["epoch"]
    await trio.sleep(1)
    socket.drop()
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(when)
    back = bench.connect(dialect=V2, resume=ResumePoint(epoch, 0))
    back.say(user_message(id="m"))
    assert (await back.wait_for("ack"))["status"] == "accepted"
    (await bench.agent.stream(0)).done()
    assert (await back.wait_for("turn_ended"))["outcome"] == "completed"


async def _closed(socket: FakeConnection) -> None:
    while socket.closed is None:
        await socket.arrived.park()

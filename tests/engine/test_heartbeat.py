"""One task that starts the heartbeats of all sockets."""

from __future__ import annotations

import gc
import weakref

import trio
import trio.testing

from gateway.core.limits import Limits
from gateway.engine.heartbeat import TOGETHER, Heartbeat, Heartbeats
from gateway.ports import ConnectionClosed
from tests.engine.fakes import FakeConnection, RecordingTelemetry

LIMITS = Limits(heartbeat_interval=20, pong_timeout=10)


class Socket(FakeConnection):
    """Notes when it is pinged, and answers after ``takes`` seconds."""

    def __init__(self, takes: float = 0.0) -> None:
        super().__init__()
        self.takes = takes
        self.pinged: list[float] = []
        self.alive_at = trio.current_time()
        self.rtt: float | None = None
        self.ended: list[tuple[float, int]] = []

    async def ping(self) -> None:
        """The pong comes, or the connection is over."""
        self.pinged.append(trio.current_time())
        await trio.sleep(self.takes)
        if self.closed is not None:
            raise ConnectionClosed(1006)

    def end(self, code: int, reason: str) -> None:
        """Note."""
        self.ended.append((trio.current_time(), code))


async def test_each_socket_is_pinged_an_interval_after_its_last_pong(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A slow peer is pinged less often; what is measured is from the ping to its pong."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    started, quick = trio.current_time(), Socket()
    Heartbeat(heartbeats, quick, quick, nursery.start_soon)
    await trio.sleep(5)
    slow = Socket(takes=8)
    Heartbeat(heartbeats, slow, slow, nursery.start_soon)
    await trio.sleep(60)

    assert [at - started for at in quick.pinged] == [20, 40, 60]
    assert [at - started for at in slow.pinged] == [25, 53]
    assert (slow.rtt, slow.alive_at - started, quick.rtt) == (8, 53, 0)


async def test_pings_that_are_due_together_are_sent_together(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """One wake-up of the task is for all that are due within a moment."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    sockets, started = list[Socket](), trio.current_time()
    for _ in range(3):
        sockets.append(Socket())
        Heartbeat(heartbeats, sockets[-1], sockets[-1], nursery.start_soon)
        await trio.sleep(TOGETHER * 0.6)
    await trio.sleep(20)

    assert [socket.pinged[0] - started for socket in sockets[:2]] == [20, 20]
    assert sockets[2].pinged[0] - started == 20 + TOGETHER * 0.6 * 2


async def test_a_silent_peer_is_given_up_in_time(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """No pong: 4408 exactly ``pong_timeout`` after the ping, and no ping any more."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    started, socket = trio.current_time(), Socket(takes=60)
    Heartbeat(heartbeats, socket, socket, nursery.start_soon)
    await trio.sleep(100)

    assert [(at - started, code) for at, code in socket.ended] == [(30, 4408)]
    assert len(socket.pinged) == 1


async def test_a_socket_that_is_over_is_not_pinged(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Its nursery is closed by then; a connection that ends during the ping says so by itself."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    left, lost = Socket(), Socket(takes=1)
    async with trio.open_nursery() as connection:
        heartbeat = Heartbeat(heartbeats, left, left, connection.start_soon)
        await trio.sleep(1)
        heartbeat.finish()
    Heartbeat(heartbeats, lost, lost, nursery.start_soon)
    await trio.sleep(20.5)
    lost.closed = (1006, "")
    await trio.sleep(60)

    assert left.pinged == []
    assert (len(lost.pinged), lost.ended, lost.rtt) == (1, [], None)


async def test_nothing_is_kept_of_a_socket_that_is_over(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Until its ping would have been due, sockets that come and go would pile up; also one in its ping."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    for seconds in (1, 22):
        socket = Socket(takes=5)
        gone = weakref.ref(socket)
        async with trio.open_nursery() as connection:
            heartbeat = Heartbeat(heartbeats, socket, socket, connection.start_soon)
            await trio.sleep(seconds)
            heartbeat.finish()
            connection.cancel_scope.cancel()
        del socket, heartbeat, connection
        gc.collect()
        assert gone() is None


async def test_a_pong_in_the_last_moment_is_no_error(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The socket ends in the pass in which its ping is answered, or is to begin."""
    heartbeats = Heartbeats(LIMITS, RecordingTelemetry())
    nursery.start_soon(heartbeats.run)
    sockets = Socket(takes=5), Socket()
    for socket, seconds in zip(sockets, (25, 20), strict=True):
        async with trio.open_nursery() as connection:
            heartbeat = Heartbeat(heartbeats, socket, socket, connection.start_soon)
            if seconds == 20:
                heartbeat.start()
            else:
                await trio.sleep(seconds)
            heartbeat.finish()

    await trio.sleep(60)
    assert [len(socket.pinged) for socket in sockets] == [1, 0]


async def test_a_server_that_keeps_sockets_alive_itself_is_left_to_it(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """hypercorn's WebSockets have pings of their own."""

    class KeptAlive(Socket):
        @property
        def sends_pings(self) -> bool:
            return False

    heartbeats, socket = Heartbeats(LIMITS, RecordingTelemetry()), KeptAlive()
    nursery.start_soon(heartbeats.run)
    Heartbeat(heartbeats, socket, socket, nursery.start_soon)
    await trio.sleep(60)
    assert socket.pinged == []

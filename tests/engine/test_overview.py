"""What an operator is shown of live sessions."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio
import trio.testing

from gateway.core.identity import Identity
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.overview import HubOverview
from gateway.engine.pulse import Pulse
from gateway.engine.turn import TurnRunner
from gateway.ports import Admission
from tests.engine.fakes import Bench, FakeConnection, user_message

Mock = trio.testing.MockClock
LIMITS = Limits(heartbeat_interval=20)


class Distant(FakeConnection):
    """A peer whose pongs take their time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def ping(self) -> None:
        """As long as it takes."""
        await trio.sleep(self.seconds)


def overview_of(bench: Bench) -> HubOverview:
    """Of a bench's hub."""
    turns = TurnRunner(
        bench.agent, limits=bench.limits, telemetry=bench.telemetry, randomness=random.Random(1)
    )
    return HubOverview(bench.hub, Pulse(bench.hub, turns, bench.telemetry, bench.clock, "1"))


async def test_a_session_shows_its_nearest_socket_s_round_trip(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Of those that have answered a ping; None before the first."""
    bench = await Bench(nursery, limits=LIMITS).start()
    overview = overview_of(bench)
    bench.connect(connection=Distant(0.2))
    await trio.sleep(10)
    bench.connect(connection=Distant(0.1))
    await trio.testing.wait_all_tasks_blocked()
    rtts: list[float | None] = []
    for _ in range(3):
        session = overview.session("s")
        assert session is not None
        rtts.append(session.rtt)
        await trio.sleep(11)

    assert rtts == [None, pytest.approx(0.2), pytest.approx(0.1)]


async def test_sessions_of_one_socket_show_its_round_trip(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """And what it speaks: they are pinged and encoded for together."""
    bench = await Bench(nursery, limits=LIMITS).start()
    overview = overview_of(bench)
    socket = Distant(0.05)
    admission = Admission(None, Identity("anonymous"), Dialect.V2_MSGPACK, None, "203.0.113.1", "req")
    nursery.start_soon(bench.hub.serve, socket, admission)
    await attach(socket, "a", "b")
    await trio.sleep(21)
    found = await overview.sessions()

    assert {session.session_id: session.rtt for session in found.sessions} == {
        "a": pytest.approx(0.05),
        "b": pytest.approx(0.05),
    }
    assert [session.dialects for session in found.sessions] == [["codelab.v2.msgpack"]] * 2


async def test_busy_and_attached_sessions_come_first(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Those that run a turn, those with sockets, the others; as many as asked for, and how many there are."""
    bench = await Bench(nursery, limits=LIMITS).start()
    overview = overview_of(bench)
    left = bench.connect("left-1")
    bench.connect("idle-1")
    bench.connect("busy-1").say(user_message())
    await bench.agent.stream(0)
    left.drop()
    await trio.testing.wait_all_tasks_blocked()

    every = await overview.sessions()
    assert [session.session_id for session in every.sessions] == ["busy-1", "idle-1", "left-1"]
    some = await overview.sessions(containing="L", limit=1)
    assert ([session.session_id for session in some.sessions], some.found) == (["idle-1"], 2)


async def attach(socket: FakeConnection, *sessions: str) -> None:
    """Attach sessions to a MessagePack socket."""
    for session in sessions:
        socket.say(msgspec.msgpack.encode({"type": "attach", "session_id": session}))
    await trio.testing.wait_all_tasks_blocked()

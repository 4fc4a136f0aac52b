"""One v2 socket, many sessions (protocol.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import trio
import trio.testing

from gateway.core.flow import Flow
from gateway.core.identity import Identity
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.shared_socket import SharedSocket
from gateway.ports import Admission, ConnectionClosed
from tests.engine.fakes import Bench, FakeConnection, user_message

Mock = trio.testing.MockClock


def open_multiplexed(
    bench: Bench, dialect: Dialect = Dialect.V2_JSON, connection: FakeConnection | None = None
) -> FakeConnection:
    """A socket on the multiplexed endpoint."""
    connection = connection or FakeConnection()
    admission = Admission(None, Identity("anonymous"), dialect, None, "203.0.113.1", "req")
    bench.nursery.start_soon(bench.hub.serve, connection, admission)
    return connection


def of(socket: FakeConnection, session_id: str) -> list[dict[str, object]]:
    """What has come for one session."""
    return [item for item in socket.objects() if item.get("session_id") == session_id]


async def test_two_sessions_hold_conversations_on_one_socket(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Each is attached, welcomed and served by itself; every event says whose it is."""
    bench = await Bench(nursery).start()
    socket = open_multiplexed(bench)
    for name in ("a", "b"):
        socket.say({"type": "attach", "session_id": name})
        socket.say(user_message(name, id=f"m-{name}", session_id=name))
    first, second = await bench.agent.stream(0), await bench.agent.stream(1)
    second.token("B", final=True)
    first.token("A", final=True)
    first.done()
    second.done()
    await socket.wait_for("turn_ended", 2)
    assert all("session_id" in item for item in socket.objects())
    for name in ("a", "b"):
        items = of(socket, name)
        kinds = ["welcome", "ack", "turn_started", "assistant_message", "turn_ended"]
        assert [item["type"] for item in items] == kinds
        assert [item["seq"] for item in items if "seq" in item] == [1, 2, 3]
        assert items[3]["token"] == name.upper()


async def test_attach_resumes_where_the_client_stopped(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """attach with epoch and last_seq replays exactly what is missing, as a socket of its own would."""
    bench = await Bench(nursery).start()
    single = bench.connect("a", dialect=Dialect.V2_JSON)
    single.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    for word in ("x", "y", "z"):
        stream.token(word)
    await single.wait_for("assistant_message", 3)
    epoch = single.objects()[0]["epoch"]
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "a", "epoch": epoch, "last_seq": 2})
    await socket.wait_for("assistant_message")
    merged = socket.objects()[1]
    assert (merged["first_seq"], merged["seq"], merged["token"], merged["session_id"]) == (3, 4, "yz", "a")


async def test_an_error_of_one_session_leaves_the_socket_and_the_others(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A foreign session, an unknown one, a bad message and a crash each cost one nack or one detach."""
    bench = await Bench(nursery).start()
    await bench.store.claim("theirs", "somebody", 0)
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "theirs"})
    socket.say(user_message(id="1", session_id="never-attached"))
    socket.say(user_message(id="2"))
    socket.say({"type": "attach", "session_id": "../x"})
    socket.say("{")
    await socket.wait_for("nack", 5)
    nacks = [item for item in socket.objects() if item["type"] == "nack"]
    assert [item["code"] for item in nacks] == ["NOT_YOURS"] + ["INVALID_MESSAGE"] * 4
    for name in ("good", "bad"):
        socket.say({"type": "attach", "session_id": name})
        socket.say(user_message(id="m", session_id=name))
    streams = [await bench.agent.stream(0), await bench.agent.stream(1)]
    by_session = {stream.request.session_id: stream for stream in streams}
    by_session["bad"]._send.send_nowait([None])  # type: ignore[list-item]  # what no runtime can do: a bug
    detached = await socket.wait_for("detached")
    assert (detached["session_id"], detached["code"]) == ("bad", 1011)
    by_session["good"].token("fine", final=True)
    await socket.wait_for("assistant_message")
    assert socket.closed is None


async def test_detach_stops_events_and_keeps_the_turn(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A detached session goes on without this socket, and can be attached again where it stopped."""
    bench = await Bench(nursery).start()
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "a"})
    socket.say(user_message(id="m", session_id="a"))
    stream = await bench.agent.stream(0)
    stream.token("x")
    await socket.wait_for("assistant_message")
    epoch = socket.objects()[0]["epoch"]
    socket.say({"type": "detach", "session_id": "a"})
    assert (await socket.wait_for("detached"))["code"] == 1000
    stream.token("y")
    await trio.testing.wait_all_tasks_blocked()
    assert socket.text() == "x"
    socket.say({"type": "attach", "session_id": "a", "epoch": epoch, "last_seq": 2})
    await socket.wait_for("assistant_message", 2)
    assert socket.text() == "xy"


class NarrowConnection(FakeConnection):
    """A socket whose buffer is always full: whatever it is given has to be waited for."""

    def send_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Take it, but say that it is not sent yet."""
        super().send_nowait(payloads)
        return False

    async def wait_sent(self) -> None:
        """A moment later it is."""
        await trio.sleep(0.01)


async def test_sessions_take_turns_while_the_socket_is_slow(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A trickle behind a burst, and the answer to a message, wait for a turn of the burst and no more."""
    bench = await Bench(nursery, limits=Limits(unacked_bytes=1 << 30, merge_bytes=1 << 30)).start()
    socket = NarrowConnection()
    open_multiplexed(bench, connection=socket)
    for name in ("burst", "trickle"):
        socket.say({"type": "attach", "session_id": name})
        socket.say(user_message(id="m", session_id=name))
    streams = {}
    for number in range(2):
        stream = await bench.agent.stream(number)
        streams[stream.request.session_id] = stream
    await trio.sleep(1)
    for _ in range(300):
        streams["burst"].token("x" * 1000)
    await trio.sleep(0.005)
    before = len(socket.objects())
    streams["trickle"].token("here")
    socket.say(user_message(id="m", session_id="trickle"))
    await socket.wait_for("assistant_message", 301)
    kinds = [(item["session_id"], item["type"]) for item in socket.objects()[before:]]
    assert len(kinds) > 200
    assert kinds.index(("trickle", "assistant_message")) < 50
    assert kinds.index(("trickle", "ack")) < 50


async def test_messagepack_carries_the_same(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """In binary frames, batches included."""
    bench = await Bench(nursery).start()
    socket = open_multiplexed(bench, Dialect.V2_MSGPACK)
    socket.say(
        msgspec.msgpack.encode([{"type": "attach", "session_id": "a"}, user_message(id="m", session_id="a")])
    )
    (await bench.agent.stream(0)).token("x", final=True)
    await trio.testing.wait_all_tasks_blocked()
    decoded = [msgspec.msgpack.decode(frame) for frame in socket.frames]
    items = [item for frame in decoded for item in (frame if isinstance(frame, list) else [frame])]
    assert [item["type"] for item in items] == ["welcome", "ack", "turn_started", "assistant_message"]
    assert {item["session_id"] for item in items} == {"a"}


async def test_a_field_of_the_agents_own_does_not_hide_whose_event_it_is(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """An agent's event that has a session_id of its own arrives with the session's, once."""
    bench = await Bench(nursery).start()
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "a"})
    socket.say(user_message(id="m", session_id="a"))
    stream = await bench.agent.stream(0)
    data = b'{"type":"plan_update","session_id":"theirs","big":%d}' % (2**70)
    stream.emit_raw(data)
    await socket.wait_for("plan_update")
    frame = next(frame for frame in socket.frames if b"plan_update" in frame)
    assert frame.count(b'"session_id"') == 1
    assert of(socket, "a")[-1]["type"] == "plan_update"
    assert str(2**70).encode() in frame


async def test_when_the_socket_goes_all_its_sessions_are_detached(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Their turns live on for the grace and are then cancelled, as with sockets of their own."""
    bench = await Bench(nursery, limits=Limits(detach_grace=120)).start()
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "a"})
    socket.say(user_message(id="m", session_id="a"))
    stream = await bench.agent.stream(0)
    socket.drop()
    await trio.sleep(119)
    assert not stream.closed
    await trio.sleep(2)
    assert stream.closed


async def test_a_dead_or_drained_multiplexed_socket_is_closed_as_any_other(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """No pong: 4408; nothing taken in time: 4413; drain: draining, then 1012."""
    bench = await Bench(nursery, limits=Limits(heartbeat_interval=20, pong_timeout=10)).start()
    dead = open_multiplexed(bench)
    dead.pongs = False
    started = trio.current_time()
    while dead.closed is None:
        await dead.arrived.park()
    assert dead.closed[0] == 4408
    assert trio.current_time() - started == pytest.approx(30)
    stuck = open_multiplexed(bench)
    await trio.testing.wait_all_tasks_blocked()
    stuck.stalled = True
    stuck.say({"type": "attach", "session_id": "a"})
    while stuck.closed is None:
        await stuck.arrived.park()
    assert stuck.closed[0] == 4413
    leaving = open_multiplexed(bench)
    await trio.testing.wait_all_tasks_blocked()
    await bench.hub.drain()
    assert leaving.types() == ["draining"]
    assert leaving.closed is not None
    assert leaving.closed[0] == 1012


async def test_what_waits_for_a_session_that_is_left_is_let_go(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A client that attaches and detaches without reading must not pile up what it would have read."""
    bench = await Bench(nursery).start()
    single = bench.connect("a", dialect=Dialect.V2_JSON)
    single.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    for _ in range(3):
        stream.token("x")
    await single.wait_for("assistant_message", 3)
    epoch = single.objects()[0]["epoch"]
    socket = open_multiplexed(bench)
    socket.say({"type": "attach", "session_id": "b"})
    await socket.wait_for("welcome")
    socket.stalled = True
    socket.say({"type": "attach", "session_id": "b"})
    await trio.testing.wait_all_tasks_blocked()
    before = trio.lowlevel.current_statistics().tasks_living
    for _ in range(10):
        socket.say({"type": "attach", "session_id": "a", "epoch": epoch, "last_seq": 1})
        socket.say({"type": "detach", "session_id": "a"})
    await trio.testing.wait_all_tasks_blocked()

    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_a_snapshot_replaces_what_waited_for_its_turn(autojump_clock: Mock) -> None:
    """Control goes before events, but never a snapshot before older events of its own session."""
    connection = FakeConnection()
    shared = SharedSocket(connection, Dialect.V2_JSON, Limits(), Flow())
    lane = shared.open_lane("a")
    other = shared.open_lane("b")
    connection.stalled = True
    assert lane.send_nowait([b'{"seq":1,"type":"x"}'])
    lane.send_nowait([b'{"seq":2,"type":"x"}'])
    other.send_nowait([b'{"seq":7,"type":"x"}'])
    lane.send_nowait([b'{"type":"snapshot","seq":9}'])
    shared.begin(lambda: None)
    connection.unstall()
    await shared.flush()
    seqs = [(item["session_id"], item["seq"]) for item in connection.objects()]
    assert seqs == [("a", 1), ("a", 9), ("b", 7)]


async def test_a_lane_of_a_lost_socket_raises(autojump_clock: Mock) -> None:
    """A session that sends into a socket that is gone learns it as from a socket of its own."""
    connection = FakeConnection()
    lane = SharedSocket(connection, Dialect.V2_JSON, Limits(), Flow()).open_lane("a")
    connection.drop()
    with pytest.raises(ConnectionClosed):
        lane.send_nowait([b'{"seq":1,"type":"x"}'])
    await trio.lowlevel.checkpoint()

"""v2 conversations over the engine: seq, acks, resume, snapshots, ids, approvals (protocol.md section 4)."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from gateway.core.errors import AgentStreamInterrupted
from gateway.core.identity import Identity
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.session_socket import SessionSocket
from gateway.ports import ResumePoint
from tests.engine.fakes import Bench, FakeConnection, user_message
from tests.garbage import garbage_of

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock


def seqs(socket: FakeConnection) -> list[int]:
    """The seqs of everything received, in order."""
    return [item["seq"] for item in socket.objects() if "seq" in item]


async def test_the_first_frame_is_the_welcome(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A new session's welcome states epoch, seqs, turn, open calls and the limits."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    welcome = await socket.wait_for("welcome")
    assert welcome == {
        "type": "welcome",
        "session_id": "s",
        "epoch": welcome["epoch"],
        "first_seq": 1,
        "last_seq": 0,
        "resumed": False,
        "turn": {"id": None, "state": "idle"},
        "pending": [],
        "limits": {"max_message_bytes": 1 << 20, "max_queued_messages": 64, "unacked_bytes": 512 << 10},
        "dedupe_window_s": 600.0,
        "heartbeat_s": 20.0,
    }


async def test_a_turn_is_framed_by_its_start_and_end_and_numbered_without_gaps(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """ack, turn_started, events, turn_ended; seqs rise by one from 1."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    stream.token("a")
    stream.token("b", final=True)
    stream.done()
    ended = await socket.wait_for("turn_ended")
    assert socket.types() == [
        "welcome",
        "ack",
        "turn_started",
        "assistant_message",
        "assistant_message",
        "turn_ended",
    ]
    ack, started = socket.objects()[1:3]
    assert ack == {"type": "ack", "id": "m1", "status": "accepted", "turn_id": started["turn_id"]}
    assert started["id"] == "m1"
    assert (ended["turn_id"], ended["outcome"], ended["last_seq"]) == (started["turn_id"], "completed", 3)
    assert seqs(socket) == [1, 2, 3, 4]


async def test_a_repeated_id_is_done_once_and_answered_the_same(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The same id again, on another socket even: duplicate, the same turn, one POST."""
    bench = await Bench(nursery).start()
    one, two = bench.connect(dialect=V2), bench.connect(dialect=V2)
    one.say(user_message(id="m1"))
    first = await one.wait_for("ack")
    two.say(user_message(id="m1"))
    again = await two.wait_for("ack")
    assert (again["status"], again["turn_id"]) == ("duplicate", first["turn_id"])
    (await bench.agent.stream(0)).done()
    await trio.testing.wait_all_tasks_blocked()
    assert len(bench.agent.streams) == 1


async def test_resume_continues_exactly_after_the_last_seq(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """With the epoch current and the events held: last_seq + 1 on, nothing missing, nothing twice."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    for word in "abcdef":
        stream.token(word)
    await socket.wait_for("assistant_message", 6)
    epoch = socket.objects()[0]["epoch"]
    socket.drop()
    stream.token("g", final=True)
    stream.done()
    await trio.sleep(1)
    back = bench.connect(dialect=V2, resume=ResumePoint(epoch, 4))
    await back.wait_for("turn_ended")
    welcome = back.objects()[0]
    assert (welcome["resumed"], welcome["last_seq"]) == (True, 9)
    assert back.text() == "defg"
    merged = back.objects()[1]
    assert (merged["first_seq"], merged["seq"], merged["token"]) == (5, 7, "def")
    assert [item["seq"] for item in back.objects()[1:]] == [7, 8, 9]


@pytest.mark.parametrize("kind", ["other_epoch", "ahead", "trimmed", "unknown_session"])
async def test_a_gap_is_a_snapshot_never_silence(
    nursery: trio.Nursery, autojump_clock: Mock, kind: str
) -> None:
    """What cannot be replayed is replaced by a snapshot with the running answer, then goes on."""
    bench = await Bench(nursery, limits=Limits(replay_events=4)).start()
    if kind == "unknown_session":
        socket = bench.connect("new", dialect=V2, resume=ResumePoint("e", 3))
        snapshot = await socket.wait_for("snapshot")
        assert (snapshot["reason"], snapshot["seq"], snapshot["text"]) == ("no_such_session", 0, "")
        return
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    for word in "abcdefgh":
        stream.token(word)
    await socket.wait_for("assistant_message", 8)
    epoch = socket.objects()[0]["epoch"]
    point = {
        "other_epoch": ResumePoint("gone", 9),
        "ahead": ResumePoint(epoch, 500),
        "trimmed": ResumePoint(epoch, 1),
    }[kind]
    back = bench.connect(dialect=V2, resume=point)
    snapshot = await back.wait_for("snapshot")
    welcome = back.objects()[0]
    assert welcome["resumed"] is False
    assert snapshot["reason"] == ("trimmed" if kind == "trimmed" else "epoch_changed")
    assert (snapshot["seq"], snapshot["text"]) == (9, "abcdefgh")
    assert snapshot["turn"]["state"] == "running"
    assert welcome["epoch"] == snapshot["epoch"]
    assert (welcome["epoch"] != epoch) is (kind == "ahead")
    stream.token("i")
    await back.wait_for("assistant_message")
    assert back.objects()[-1] == {"type": "assistant_message", "token": "i", "is_final": False, "seq": 10}


async def test_an_epoch_that_ends_is_told_to_every_attached_socket(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """When one client proves that the store is old, the others get a snapshot too."""
    bench = await Bench(nursery).start()
    stays = bench.connect(dialect=V2)
    epoch = (await stays.wait_for("welcome"))["epoch"]
    bench.connect(dialect=V2, resume=ResumePoint(epoch, 7))
    snapshot = await stays.wait_for("snapshot")
    assert (snapshot["reason"], snapshot["epoch"] != epoch) == ("epoch_changed", True)


async def test_one_decision_wins_on_all_devices(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The second decision of a call is nacked ALREADY_DECIDED; all devices learn of the first."""
    bench = await Bench(nursery).start()
    one, two = bench.connect(dialect=V2), bench.connect(dialect=V2)
    one.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    stream.emit(
        {"type": "tool_call", "call_id": "c", "tool_name": "t", "arguments": {}, "requires_approval": True}
    )
    stream.done()
    await two.wait_for("turn_ended")
    one.say({"type": "hitl_decision", "id": "d1", "call_id": "c", "decision": "approve"})
    await one.wait_for("ack", 2)
    two.say({"type": "hitl_decision", "id": "d2", "call_id": "c", "decision": "reject"})
    nack = await two.wait_for("nack")
    assert (nack["id"], nack["code"], nack["retryable"], nack["call_id"]) == (
        "d2",
        "ALREADY_DECIDED",
        False,
        "c",
    )
    resolved = await two.wait_for("approval_resolved")
    assert (resolved["call_id"], resolved["decision"]) == ("c", "approve")
    await trio.testing.wait_all_tasks_blocked()
    assert [b"hitl_decision" in stream.request.message for stream in bench.agent.streams] == [False, True]


async def test_welcome_shows_open_calls_and_the_state(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A device that comes late sees what is awaited, and after the decision that it is decided."""
    bench = await Bench(nursery).start()
    one = bench.connect(dialect=V2)
    one.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    call = {"type": "tool_call", "call_id": "c", "tool_name": "t", "arguments": {}, "requires_approval": True}
    stream.emit(call)
    stream.done()
    await one.wait_for("turn_ended")
    late = bench.connect(dialect=V2)
    welcome = await late.wait_for("welcome")
    assert (welcome["turn"]["state"], welcome["pending"]) == ("awaiting_approval", [call])
    one.say({"type": "hitl_decision", "id": "d", "call_id": "c", "decision": "approve"})
    (await bench.agent.stream(1)).done()
    await one.wait_for("turn_ended", 2)
    later = bench.connect(dialect=V2)
    welcome = await later.wait_for("welcome")
    assert welcome["turn"]["state"] == "awaiting_tool"
    assert welcome["pending"] == [{**call, "decision": "approve"}]
    one.say({"type": "tool_result", "id": "r", "call_id": "c", "result": None})
    (await bench.agent.stream(2)).done()
    await one.wait_for("turn_ended", 3)
    last = bench.connect(dialect=V2)
    assert (await last.wait_for("welcome"))["turn"]["state"] == "idle"


async def test_cancel_is_answered_by_the_end_of_the_turn(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """ack, then turn_ended cancelled; nothing to cancel is NO_SUCH_TURN; a waiting turn just ends."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    socket.say(user_message(id="m2"))
    waiting = (await socket.wait_for("ack", 2))["turn_id"]
    stream = await bench.agent.stream(0)
    socket.say({"type": "cancel", "id": "c1", "turn_id": waiting})
    ended = await socket.wait_for("turn_ended")
    assert (ended["turn_id"], ended["outcome"]) == (waiting, "cancelled")
    assert not stream.closed
    socket.say({"type": "cancel", "id": "c2"})
    ended = await socket.wait_for("turn_ended", 2)
    assert ended["outcome"] == "cancelled"
    await trio.testing.wait_all_tasks_blocked()
    assert stream.closed
    socket.say({"type": "cancel", "id": "c3"})
    assert (await socket.wait_for("nack"))["code"] == "NO_SUCH_TURN"


async def test_a_batch_in_either_encoding_is_taken_apart(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """An array of messages is handled in order; MessagePack carries the same objects."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=Dialect.V2_MSGPACK)
    await trio.testing.wait_all_tasks_blocked()
    assert msgspec.msgpack.decode(socket.frames[0])["type"] == "welcome"
    socket.say(
        msgspec.msgpack.encode([user_message(id="a"), {"type": "ack", "seq": 0}, {"type": "bad", "id": "b"}])
    )
    await trio.testing.wait_all_tasks_blocked()
    answers = [msgspec.msgpack.decode(frame) for frame in socket.frames[1:]]
    kinds = [item["type"] for frame in answers for item in (frame if isinstance(frame, list) else [frame])]
    assert sorted(kinds) == ["ack", "nack", "turn_started"]


async def test_v1_and_v2_share_a_session(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The same turn on both; the v1 socket sees no type that it does not know."""
    bench = await Bench(nursery).start()
    old, new = bench.connect(), bench.connect(dialect=V2)
    await trio.testing.wait_all_tasks_blocked()
    new.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.token("x", final=True)
    stream.done()
    await new.wait_for("turn_ended")
    await trio.testing.wait_all_tasks_blocked()
    assert old.types() == ["assistant_message"]


async def test_acks_pace_the_upstream_by_the_fastest_socket(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Unacknowledged data is bounded: reading stops at the mark and goes on with the first ack."""
    bench = await Bench(nursery, limits=Limits(unacked_bytes=20_000, send_timeout=1000)).start()
    slow, fast = bench.connect(dialect=V2), bench.connect(dialect=V2)
    slow.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    for _ in range(100):
        stream.token("x" * 840)  # about 1 000 bytes of memory each
    await trio.testing.wait_all_tasks_blocked()
    assert 18 <= stream.taken <= 22
    fast.say({"type": "ack", "seq": fast.objects()[-1]["seq"]})
    await trio.testing.wait_all_tasks_blocked()
    assert 38 <= stream.taken <= 44
    assert max(seqs(slow)) <= 22
    slow.drop()
    fast.drop()
    await trio.testing.wait_all_tasks_blocked()
    assert stream.taken == 100


@pytest.mark.parametrize(
    ("dialect", "ack"),
    [
        (V2, '{"seq": 0, "type": "ack"}'),
        (Dialect.V2_MSGPACK, msgspec.msgpack.encode({"type": "ack", "seq": 0})),
    ],
)
async def test_a_lone_ack_is_heard_at_once(
    nursery: trio.Nursery, autojump_clock: Mock, dialect: Dialect, ack: str | bytes
) -> None:
    """The reader need not wake for it, and it counts like any other."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=dialect)
    await trio.testing.wait_all_tasks_blocked()
    socket.say(ack)
    await trio.testing.wait_all_tasks_blocked()
    assert socket.received == []
    assert bench.hub.flow.acks_received == 1


async def test_a_bug_in_an_ack_heard_at_once_closes_as_any_other(
    nursery: trio.Nursery, autojump_clock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1011 by the hub, whoever it was that called: the message is read again, where bugs are caught."""

    bugs = iter([RuntimeError("a bug, the first time")])

    def broken(_socket: SessionSocket, _seq: int) -> None:
        for bug in bugs:
            raise bug

    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    await trio.testing.wait_all_tasks_blocked()
    monkeypatch.setattr(SessionSocket, "acknowledge", broken)
    socket.say({"type": "ack", "seq": 0})
    await trio.testing.wait_all_tasks_blocked()
    assert len(socket.received) == 1
    assert socket.closed is not None
    assert socket.closed[0] == 1011


@pytest.mark.parametrize(
    "message", [{"type": "ack"}, {"type": "ack", "seq": "1"}, {"type": "ack", "seq": -1}]
)
async def test_an_ack_that_is_none_is_refused(
    nursery: trio.Nursery, autojump_clock: Mock, message: dict[str, object]
) -> None:
    """Not heard, but read, and answered with what is wrong with it."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(message)
    nack = await socket.wait_for("nack")
    assert nack["code"] == "INVALID_MESSAGE"
    assert len(socket.received) == 1


async def test_a_socket_that_never_acknowledges_is_closed_with_4413(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A full window without an ack for WS_SEND_TIMEOUT: 4413, and it can resume."""
    bench = await Bench(nursery, limits=Limits(unacked_bytes=5_000, send_timeout=10)).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    for _ in range(20):
        stream.token("x" * 840)
    started = trio.current_time()
    while socket.closed is None:
        await socket.arrived.park()
    assert socket.closed[0] == 4413
    assert trio.current_time() - started == pytest.approx(10)
    seen = max(seqs(socket))
    back = bench.connect(dialect=V2, resume=ResumePoint(socket.objects()[0]["epoch"], seen))
    await trio.testing.wait_all_tasks_blocked()
    assert back.objects()[1].get("first_seq", back.objects()[1]["seq"]) == seen + 1


async def test_tokens_waiting_for_a_slow_socket_are_merged_without_loss(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """What piles up behind a socket that takes nothing goes out merged: fewer frames, the same text."""
    bench = await Bench(nursery, limits=Limits(merge_bytes=1_000)).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    await trio.testing.wait_all_tasks_blocked()
    socket.stalled = True
    words = [f"w{number} " for number in range(200)]
    for word in words:
        stream.token(word)
    await trio.testing.wait_all_tasks_blocked()
    socket.unstall()
    await trio.testing.wait_all_tasks_blocked()
    assert socket.text() == "".join(words)
    assert len(socket.objects()) < 20
    assert socket.objects()[-1]["seq"] == 201


async def test_an_expiring_token_is_renewed_in_band(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """token_expiring 60 s before; authenticate keeps the socket; the new expiry then closes it with 4401."""
    bench = await Bench(nursery).start()
    now = bench.clock.now()
    socket = bench.connect(dialect=V2, identity=Identity("alice", expires_at=now + 100))
    expiring = await socket.wait_for("token_expiring")
    assert expiring["in_s"] == 60.0
    assert bench.clock.now() - now == pytest.approx(40)
    socket.say({"type": "authenticate", "token": f"mallory@{now + 900}"})
    assert (await socket.wait_for("nack"))["code"] == "INVALID_TOKEN"
    socket.say({"type": "authenticate", "token": f"alice@{now + 300}"})
    assert (await socket.wait_for("authenticated"))["expires_at"] == now + 300
    while socket.closed is None:
        await socket.arrived.park()
    assert socket.closed[0] == 4401
    assert bench.clock.now() - now == pytest.approx(300)


async def test_a_resumable_stream_is_carried_on_after_a_cut(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A cut is mended by the same turn id and Last-Event-ID; the client sees no error."""
    bench = await Bench(nursery).start()
    bench.agent.resumable = True
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    first = await bench.agent.stream(0)
    first.token("a", event_id="7")
    first.fail(AgentStreamInterrupted("cut"))
    second = await bench.agent.stream(1)
    assert (second.request.turn_id, second.request.last_event_id) == (first.request.turn_id, "7")
    second.token("b", final=True, event_id="8")
    second.done()
    ended = await socket.wait_for("turn_ended")
    assert (ended["outcome"], socket.text()) == ("completed", "ab")
    assert "error" not in socket.types()


async def test_drain_tells_when_to_come_back_and_closes_1012(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """draining with a jittered delay, then 1012, for v1 only the close; nothing new is admitted."""
    bench = await Bench(nursery).start()
    old, new = bench.connect(), bench.connect(dialect=V2)
    await trio.testing.wait_all_tasks_blocked()
    await bench.hub.drain()
    draining = await new.wait_for("draining")
    assert 100 <= draining["reconnect_after_ms"] < 2000
    assert old.closed is not None
    assert new.closed is not None
    assert (old.closed[0], new.closed[0], old.types()) == (1012, 1012, [])


@pytest.mark.parametrize("ticks", range(8))
async def test_drain_spares_a_socket_that_is_leaving(
    nursery: trio.Nursery, autojump_clock: Mock, ticks: int
) -> None:
    """However far the leaving of a client has come when the drain begins, nothing breaks."""
    bench = await Bench(nursery).start()
    sockets = [bench.connect(f"s{number}") for number in range(3)]
    await trio.testing.wait_all_tasks_blocked()
    for socket in sockets:
        socket.drop(1000)
    for _ in range(ticks):
        await trio.lowlevel.checkpoint()
    await bench.hub.drain()
    assert bench.hub.socket_count == 0


async def hold_a_turn(bench: Bench, number: int) -> FakeConnection:
    """The socket of a session of its own, after a turn."""
    socket = bench.connect(f"s{number}", dialect=V2)
    await trio.testing.wait_all_tasks_blocked()
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(number)
    stream.token("x", final=True)
    stream.done()
    await trio.testing.wait_all_tasks_blocked()
    return socket


async def test_a_socket_that_left_leaves_nothing_to_the_collector(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """It holds its session, and that all its events: they go when nobody needs them any more."""
    bench = await Bench(nursery).start()
    with garbage_of("gateway") as found:
        for number in range(2):
            socket = await hold_a_turn(bench, number)
            socket.say({"type": "ack", "seq": socket.objects()[-1]["seq"]})
            await trio.testing.wait_all_tasks_blocked()
            socket.drop()
            await trio.testing.wait_all_tasks_blocked()
        del socket
    assert found == []


async def test_a_session_that_left_memory_leaves_nothing_to_the_collector(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """With all its events: they would stay until the next full collection, after thousands of turns."""
    bench = await Bench(nursery).start()
    with garbage_of("gateway") as found:
        for number in range(2):
            socket = await hold_a_turn(bench, number)
            socket.drop()
            await trio.sleep(2 * Limits().replay_retention)
            assert not bench.hub.runners
        del socket
    assert found == []

"""One live session over a slow, failing or forgetful store: what is shown, started, trimmed and read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from gateway.core.limits import Limits
from gateway.core.storage import CommitRefused, SessionCommit
from gateway.core.websocket_protocol import Dialect
from gateway.ports import ResumePoint
from tests.engine.fakes import Bench, DurableMemoryStore, FakeConnection, user_message

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock


async def durable(nursery: trio.Nursery, limits: Limits | None = None) -> tuple[Bench, DurableMemoryStore]:
    """A bench on a durable store that knows the session ``s``."""
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store, limits=limits).start()
    await store.claim("s", "anonymous", 0)
    return bench, store


@pytest.mark.parametrize("apart", [0.0, 0.5])
async def test_a_turn_cancelled_before_its_start_is_stored_is_never_posted(
    nursery: trio.Nursery, autojump_clock: Mock, apart: float
) -> None:
    """Whether the cancel meets the start on its way to the store or in line for it."""
    bench, store = await durable(nursery)
    socket = bench.connect(dialect=V2)
    await socket.wait_for("welcome")
    await trio.sleep(1)
    store.latency = 1.0
    socket.say(user_message(id="m"))
    await trio.sleep(apart)
    socket.say({"type": "cancel", "id": "c"})
    ended = await socket.wait_for("turn_ended")
    await trio.sleep(10)
    assert (ended["outcome"], bench.agent.streams) == ("cancelled", [])


async def test_a_turn_that_waits_for_a_place_is_cancelled_without_a_post(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Its place in the line is given up, and the one behind it moves up."""
    bench = await Bench(nursery, limits=Limits(max_concurrent_turns=1)).start()
    one, two, three = (bench.connect(name, dialect=V2) for name in ("s1", "s2", "s3"))
    one.say(user_message(id="m"))
    first = await bench.agent.stream(0)
    two.say(user_message(id="m"))
    await trio.testing.wait_all_tasks_blocked()
    three.say(user_message("third", id="m"))
    await trio.testing.wait_all_tasks_blocked()
    two.say({"type": "cancel", "id": "c"})
    assert (await two.wait_for("turn_ended"))["outcome"] == "cancelled"
    first.done()
    second = await bench.agent.stream(1)
    assert b"third" in second.request.message


async def test_a_burst_over_the_replay_bound_during_one_commit_is_stored_and_shown(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Nothing is trimmed that the store does not have: it would refuse the session for good."""
    bench, store = await durable(nursery, Limits(replay_events=10))
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    await trio.sleep(1)
    store.latency = 1.0
    stream.token("0 ")
    await trio.sleep(0.5)
    for number in range(1, 50):
        stream.token(f"{number} ")
    stream.done()
    await socket.wait_for("turn_ended")
    assert socket.text() == "".join(f"{number} " for number in range(50))
    assert socket.closed is None
    assert bench.telemetry.errors() == []


@pytest.mark.parametrize("dialect", [Dialect.V1, V2])
async def test_a_turn_reads_on_when_a_slow_commit_is_through(
    nursery: trio.Nursery, autojump_clock: Mock, dialect: Dialect
) -> None:
    """More than a window's worth came meanwhile; nobody has to say anything for the rest to come."""
    bench, store = await durable(nursery, Limits(unacked_bytes=5_000, send_timeout=1000))
    socket = bench.connect(dialect=dialect)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    await trio.sleep(1)
    store.latency = 1.0
    for number in range(100):
        stream.token(f"{number} " + "x" * 100)
    stream.done()
    for _ in range(60):
        await trio.sleep(1)
        if dialect.is_v2:
            socket.say({"type": "ack", "seq": socket.objects()[-1].get("seq", 0)})
    assert "99 x" in socket.text()
    assert stream.taken == 101


async def test_what_cannot_be_stored_is_not_read_without_end(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """With the store away and nobody attached, the runtime waits instead of filling the memory."""
    bench, store = await durable(nursery, Limits(unacked_bytes=5_000, detach_grace=1000))
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    await trio.sleep(1)
    store.down = True
    socket.drop()
    for _ in range(200):
        stream.token("x" * 100)
    await trio.sleep(10)
    assert stream.taken < 40
    store.down = False
    await trio.sleep(10)
    assert stream.taken == 200


async def test_a_new_socket_that_keeps_up_lets_the_turn_read_on(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The upstream is read as fast as the fastest reads, from the moment it joins."""
    bench = await Bench(nursery, limits=Limits(unacked_bytes=5_000, send_timeout=1000)).start()
    slow = bench.connect(dialect=V2)
    slow.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    for _ in range(100):
        stream.token("x" * 100)
    await trio.testing.wait_all_tasks_blocked()
    taken = stream.taken
    assert taken < 40
    bench.connect(dialect=V2)
    await trio.testing.wait_all_tasks_blocked()
    assert stream.taken > taken


async def test_a_decision_is_called_made_only_when_it_is_stored(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """A crash could undo it, and the loser would have been told of a winner that never was."""
    bench, store = await durable(nursery)
    one, two = bench.connect(dialect=V2), bench.connect(dialect=V2)
    await two.wait_for("welcome")
    await trio.sleep(1)
    store.latency = 1.0
    one.say({"type": "hitl_decision", "id": "d1", "call_id": "c", "decision": "approve"})
    two.say({"type": "hitl_decision", "id": "d2", "call_id": "c", "decision": "reject"})
    await trio.sleep(0.9)
    assert (one.types(), two.types()) == (["welcome"], ["welcome"])
    await trio.sleep(5)
    codes = {item.get("code", item.get("status")) for socket in (one, two) for item in socket.objects()}
    assert codes >= {"accepted", "ALREADY_DECIDED"}


async def test_what_is_sent_while_the_store_is_found_away_is_answered_when_it_is(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Not only what was in the commit that failed: what waits for the next one would wait for the store."""
    bench, store = await durable(nursery)
    await store.claim("other", "anonymous", 0)
    v2, v1, other = bench.connect(dialect=V2), bench.connect(), bench.connect("other", dialect=V2)
    await other.wait_for("welcome")
    await trio.sleep(1)
    store.latency, store.down = 1.0, True
    v2.say(user_message(id="m1"))
    await trio.sleep(0.5)
    v2.say(user_message(id="m2"))
    v1.say(user_message(message_id="m3"))
    other.say(user_message(id="m4"))
    await trio.sleep(0.6)
    answered = [
        (item["type"], item.get("id", item.get("message_id")), item["code"])
        for socket in (v2, v1, other)
        for item in socket.objects()
        if item["type"] != "welcome"
    ]
    assert answered == [
        ("nack", "m1", "STORE_UNAVAILABLE"),
        ("nack", "m2", "STORE_UNAVAILABLE"),
        ("error", "m3", "STORE_DELAYED"),
        ("nack", "m4", "STORE_UNAVAILABLE"),
    ]
    store.latency, store.down = 0.0, False
    await trio.sleep(2)
    other.say(user_message(id="m4"))
    assert (await other.wait_for("ack"))["status"] == "duplicate"


async def test_a_socket_that_joins_as_its_session_is_forgotten_is_served(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The last commit ends and the socket joins in one round of the scheduler, in either order."""
    bench, store = await durable(nursery, Limits(detach_grace=10))
    store.latency = 1.0
    sockets: dict[str, FakeConnection] = {}

    async def join_at_the_end(name: str, rounds: int) -> None:
        await trio.sleep(10)
        await trio.sleep(1)
        for _ in range(rounds):
            await trio.lowlevel.checkpoint()
        sockets[name] = bench.connect(name, dialect=V2)

    # Which order it is, is the scheduler's choice: one in four on its own would miss the moment.
    for number in range(8):
        names = [f"s{number}-{rounds}" for rounds in range(3)]
        for name in names:
            await store.claim(name, "anonymous", 0)
            first = bench.connect(name, dialect=V2)
            first.say(user_message(id="m"))
            await first.wait_for("turn_started")
            sockets[name] = first
        for rounds, name in enumerate(names):
            sockets[name].drop()
            nursery.start_soon(join_at_the_end, name, rounds)
        await trio.sleep(15)
    for socket in sockets.values():
        socket.say(user_message(id="n"))
    await trio.sleep(5)
    assert [name for name, socket in sockets.items() if "ack" not in socket.types()] == []


class ForgetfulStore(DurableMemoryStore):
    """Refuses a session's commits from some moment on."""

    refusing = False

    async def commit(self, commits: Sequence[SessionCommit]) -> None:
        """Refuse, after the usual time."""
        if self.refusing:
            await trio.sleep(self.latency)
            self.refusing = False
            raise CommitRefused({"s": "its events do not follow the last one stored"})
        await super().commit(commits)


async def test_a_session_that_its_store_refuses_shows_and_acks_nothing_more(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Its sockets are closed with 1012 and the next one finds what the store has, and only that."""
    store = ForgetfulStore()
    bench = await Bench(nursery, store=store).start()
    await store.claim("s", "anonymous", 0)
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m1"))
    stream = await bench.agent.stream(0)
    stream.token("kept")
    await socket.wait_for("assistant_message")
    epoch, seen = socket.objects()[0]["epoch"], socket.objects()[-1]["seq"]
    store.refusing, store.latency = True, 1.0
    socket.say(user_message(id="m2"))
    stream.token("lost")
    await trio.sleep(0.5)
    socket.say(user_message(id="m3"))
    stream.token("lost too")
    await _closed(socket)
    await trio.sleep(5)
    assert socket.closed is not None
    assert (socket.closed[0], socket.text()) == (1012, "kept")
    assert [item["id"] for item in socket.objects() if item["type"] == "ack"] == ["m1"]
    back = bench.connect(dialect=V2, resume=ResumePoint(epoch, seen))
    back.say(user_message(id="m2"))
    assert (await back.wait_for("turn_ended"))["outcome"] == "outcome_unknown"
    assert (await back.wait_for("ack"))["status"] == "accepted"
    assert [item["seq"] for item in back.objects() if "seq" in item][:2] == [seen + 1, seen + 2]


async def test_a_snapshot_while_the_end_is_being_stored_has_the_whole_answer(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The turn runs until its end can be shown: text so far, then the rest, then the end."""
    bench, store = await durable(nursery)
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.token("shown ")
    await socket.wait_for("assistant_message")
    await trio.sleep(1)
    store.latency = 1.0
    stream.token("on its way")
    stream.emit({"type": "tool_call", "call_id": "c", "tool_name": "t"})
    stream.done()
    await trio.sleep(0.5)
    late = bench.connect(dialect=V2, resume=ResumePoint("another", 1))
    snapshot = await late.wait_for("snapshot")
    assert (snapshot["turn"]["state"], snapshot["text"], snapshot["pending"]) == ("running", "shown ", [])
    await late.wait_for("turn_ended")
    assert (late.text(), late.types().count("tool_call")) == ("on its way", 1)


async def _closed(socket: FakeConnection) -> None:
    while socket.closed is None:
        await socket.arrived.park()

"""v1 conversations over the engine: order, replay, cancel, errors (protocol.md section 2)."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.core.errors import AgentRefused, AgentStreamInterrupted, AgentUnavailable
from gateway.core.limits import Limits
from tests.engine.fakes import Bench, FakeConnection, user_message


async def test_tokens_reach_the_socket_in_order_and_done_does_not(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A turn's tokens arrive as they came, nothing before, between or after them."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    for word in ("a", "b", "c"):
        stream.token(word)
    stream.token("d", final=True)
    stream.done()
    await trio.testing.wait_all_tasks_blocked()
    assert socket.types() == ["assistant_message"] * 4
    assert socket.text() == "abcd"


async def test_the_next_message_waits_for_the_turn_before_it(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """One turn at a time; the client may go on sending meanwhile and gets its acks at once."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message("one", message_id="m1"))
    socket.say(user_message("two", message_id="m2"))
    first = await bench.agent.stream(0)
    await trio.testing.wait_all_tasks_blocked()
    assert socket.objects() == [
        {"type": "ack", "message_id": "m1", "status": "received"},
        {"type": "ack", "message_id": "m2", "status": "received"},
    ]
    assert len(bench.agent.streams) == 1
    first.done()
    second = await bench.agent.stream(1)
    assert b'"two"' in second.request.message


async def test_decisions_and_results_overtake_waiting_user_messages(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """What continues work goes before what asks for more."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message("one"))
    first = await bench.agent.stream(0)
    socket.say(user_message("later"))
    socket.say({"type": "hitl_decision", "call_id": "c1", "decision": "APPROVE"})
    socket.say({"type": "tool_result", "call_id": "c1", "result": 1})
    await trio.testing.wait_all_tasks_blocked()
    first.done()
    (await bench.agent.stream(1)).done()
    (await bench.agent.stream(2)).done()
    (await bench.agent.stream(3)).done()
    order = [stream.request.message for stream in bench.agent.streams[1:]]
    assert b'"decision":"approve"' in order[0]
    assert b"tool_result" in order[1]
    assert b"later" in order[2]


async def test_cancel_closes_the_upstream_and_ends_the_answer(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """After cancel: upstream closed, an empty final message, and not one more token of that turn."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a")
    await trio.testing.wait_all_tasks_blocked()
    socket.say({"type": "cancel"})
    await trio.testing.wait_all_tasks_blocked()
    assert stream.closed
    assert socket.objects()[-1] == {
        "type": "assistant_message",
        "token": "",
        "is_final": True,
        "outcome": "cancelled",
    }
    socket.say(user_message("again"))
    second = await bench.agent.stream(1)
    second.token("b", final=True)
    await trio.testing.wait_all_tasks_blocked()
    assert socket.text() == "ab"


async def test_all_sockets_of_a_session_see_everything(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Two sockets on one session receive the same events; the ack goes to the sender alone."""
    bench = await Bench(nursery).start()
    one, two = bench.connect(), bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    one.say(user_message(message_id="m"))
    stream = await bench.agent.stream(0)
    stream.token("x", final=True)
    await trio.testing.wait_all_tasks_blocked()
    assert one.types() == ["ack", "assistant_message"]
    assert two.types() == ["assistant_message"]


async def test_a_returning_client_gets_what_it_was_not_sent(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The turn goes on without a socket, and the next one continues where the last one stopped."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a")
    await trio.testing.wait_all_tasks_blocked()
    socket.drop()
    await trio.testing.wait_all_tasks_blocked()
    stream.token("b")
    stream.token("c")
    await trio.sleep(60)
    back = bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    stream.token("d", final=True)
    await trio.testing.wait_all_tasks_blocked()
    assert (socket.text(), back.text()) == ("a", "bcd")


async def test_a_socket_replaced_before_its_death_was_noticed_leaves_its_place_to_nobody(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The client's third socket does not repeat what its second one was given meanwhile."""
    bench = await Bench(nursery).start()
    dead = bench.connect()
    dead.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a")
    await trio.sleep(1)
    second = bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    dead.drop()
    await trio.testing.wait_all_tasks_blocked()
    stream.token("b")
    await trio.sleep(1)
    second.drop()
    await trio.testing.wait_all_tasks_blocked()
    stream.token("c")
    third = bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    third.drop()
    await trio.testing.wait_all_tasks_blocked()
    fourth = bench.connect()
    stream.token("d", final=True)
    await trio.testing.wait_all_tasks_blocked()
    assert (second.text(), third.text(), fourth.text()) == ("b", "c", "d")


async def test_of_two_devices_the_older_one_keeps_its_place_once_it_answered_a_ping(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Its pong after the other's arrival shows that it was not replaced by it."""
    bench = await Bench(nursery).start()
    older = bench.connect()
    older.say(user_message())
    stream = await bench.agent.stream(0)
    await trio.sleep(1)
    bench.connect()
    await trio.sleep(bench.limits.heartbeat_interval + 1)
    older.drop()
    await trio.testing.wait_all_tasks_blocked()
    stream.token("a")
    await trio.sleep(1)
    back = bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert back.text() == "a"


async def test_what_a_stalled_socket_did_not_take_is_sent_again_exactly(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Events still in the process when a socket dies belong to the next socket, none twice."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a")
    await trio.testing.wait_all_tasks_blocked()
    socket.stalled = True
    stream.token("b")
    stream.token("c")
    await trio.testing.wait_all_tasks_blocked()
    socket.drop()
    await trio.testing.wait_all_tasks_blocked()
    back = bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert (socket.text(), back.text()) == ("a", "bc")


async def test_after_the_grace_the_turn_is_cancelled_and_memory_freed(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Nobody back within DETACH_GRACE: upstream closed at exactly that time; the session is dropped later."""
    bench = await Bench(nursery, limits=Limits(detach_grace=120, replay_retention=600)).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    socket.drop()
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(119.9)
    assert not stream.closed
    await trio.sleep(0.2)
    assert stream.closed
    assert bench.hub.session_count == 1
    await trio.sleep(480)
    assert bench.hub.session_count == 0


@pytest.mark.parametrize(
    ("failure", "code", "retryable"),
    [
        (AgentUnavailable("The Agent Runtime cannot be reached. Try again."), "AGENT_UNAVAILABLE", True),
        (AgentRefused(500), "AGENT_ERROR", True),
        (AgentRefused(404), "AGENT_ERROR", False),
    ],
)
async def test_a_refused_turn_gives_one_error_and_the_session_goes_on(
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    failure: AgentUnavailable,
    code: str,
    retryable: bool,
) -> None:
    """Each failure of the table is one error with its code; the next message works."""
    bench = await Bench(nursery).start()
    bench.agent.refusals = [failure]
    socket = bench.connect()
    socket.say(user_message(message_id="m"))
    error = await socket.wait_for("error")
    assert error == {
        "type": "error",
        "error": failure.message,
        "content": failure.message,
        "code": code,
        "retryable": retryable,
        "message_id": "m",
    }
    socket.say(user_message())
    (await bench.agent.stream(0)).token("ok", final=True)
    await socket.wait_for("assistant_message")
    assert socket.types() == ["ack", "error", "assistant_message"]


async def test_a_cut_stream_is_one_error(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A stream cut mid-answer keeps its tokens and ends with AGENT_STREAM_INTERRUPTED, never re-POSTed."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("half")
    stream.fail(AgentStreamInterrupted("The answer was cut. Ask again."))
    error = await socket.wait_for("error")
    assert error["code"] == "AGENT_STREAM_INTERRUPTED"
    await trio.sleep(60)
    assert len(bench.agent.streams) == 1


async def test_invalid_input_is_answered_and_the_socket_stays_open(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Bad JSON, a non-object, an unknown type and a missing field: one error each, then work goes on."""
    bench = await Bench(nursery).start()
    socket = bench.connect()
    for bad in ("{", "[1]", '{"type":"nope"}', '{"type":"user_message"}'):
        socket.say(bad)
    await trio.testing.wait_all_tasks_blocked()
    texts = [item["error"] for item in socket.objects()]
    assert len(texts) == 4
    assert texts[0].startswith("Invalid JSON message")
    assert texts[1].startswith("Invalid JSON message")
    assert texts[2] == "Unknown message type: nope"
    assert texts[3] == "Missing field: content (a string)."
    socket.say(user_message())
    (await bench.agent.stream(0)).token("ok")
    await socket.wait_for("assistant_message")


async def test_a_dead_peer_is_closed_with_4408_in_time(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """No pong: closed exactly heartbeat_interval + pong_timeout after the socket opened."""
    bench = await Bench(nursery, limits=Limits(heartbeat_interval=20, pong_timeout=10)).start()
    socket = bench.connect(connection=FakeConnection(pongs=False))
    started = trio.current_time()
    while socket.closed is None:
        await socket.arrived.park()
    assert trio.current_time() - started == pytest.approx(30)
    assert socket.closed[0] == 4408


async def test_a_socket_that_takes_nothing_is_closed_with_4413(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Nothing into the kernel for WS_SEND_TIMEOUT: closed; another socket of the session never waits."""
    bench = await Bench(nursery, limits=Limits(send_timeout=10)).start()
    slow, quick = bench.connect(), bench.connect()
    await trio.testing.wait_all_tasks_blocked()
    slow.stalled = True
    quick.say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a")
    started = trio.current_time()
    await quick.wait_for("assistant_message")
    assert trio.current_time() == started
    while slow.closed is None:
        await slow.arrived.park()
    assert trio.current_time() - started == pytest.approx(10)
    assert slow.closed[0] == 4413
    stream.token("b", final=True)
    await quick.wait_for("assistant_message", 2)


async def test_turns_over_the_limit_wait_and_then_get_overloaded(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """The second turn waits for a place; past QUEUE_TIMEOUT it fails with OVERLOADED, retryable."""
    bench = await Bench(nursery, limits=Limits(max_concurrent_turns=1, queue_timeout=30)).start()
    one, two = bench.connect("s1"), bench.connect("s2")
    one.say(user_message())
    await bench.agent.stream(0)
    two.say(user_message())
    started = trio.current_time()
    error = await two.wait_for("error")
    assert trio.current_time() - started == pytest.approx(30)
    assert (error["code"], error["retryable"]) == ("OVERLOADED", True)


async def test_the_queue_is_bounded(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """More waiting messages than allowed are refused with QUEUE_FULL and change nothing."""
    bench = await Bench(nursery, limits=Limits(max_queued_messages=2)).start()
    socket = bench.connect()
    for number in range(4):
        socket.say(user_message(message_id=str(number)))
    error = await socket.wait_for("error")
    assert (error["code"], error["message_id"]) == ("QUEUE_FULL", "3")


async def test_a_crash_in_one_session_leaves_the_others_alone(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A bug in one session closes its sockets with 1011, is logged once; others go on."""
    bench = await Bench(nursery).start()
    bad, good = bench.connect("bad"), bench.connect("good")
    await trio.testing.wait_all_tasks_blocked()
    bad.say(user_message())
    stream = await bench.agent.stream(0)
    stream._send.send_nowait([None])  # type: ignore[list-item]  # what no runtime can do: a bug
    while bad.closed is None:
        await bad.arrived.park()
    assert bad.closed[0] == 1011
    assert len(bench.telemetry.errors()) == 1
    good.say(user_message())
    (await bench.agent.stream(1)).token("fine", final=True)
    await good.wait_for("assistant_message")

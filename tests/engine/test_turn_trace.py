"""Turns as spans: whose trace they are in, what happened in them, how they ended, and what goes upstream."""

from __future__ import annotations

import copy

import pytest
import trio
import trio.testing

from gateway.core.errors import AgentFailure, AgentRefused, AgentStreamInterrupted
from gateway.core.trace_context import TraceContext
from gateway.core.websocket_protocol import Dialect
from tests.engine.fakes import Bench, DurableMemoryStore, user_message
from tests.tracing_fake import CALLER, RecordingTracing

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock
OTHER = TraceContext("00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-00")


@pytest.fixture
def tracing() -> RecordingTracing:
    """Where spans go."""
    return RecordingTracing()


async def test_a_turn_is_a_span_in_its_socket_s_trace(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """It begins with the turn, notes the first token once, and ends with the outcome."""
    bench = await Bench(nursery, tracing=tracing).start()
    socket = bench.connect(dialect=V2, trace=CALLER)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.emit({"type": "agent_switched", "to_agent": "coder"})
    stream.token("a")
    stream.token("b", final=True)
    stream.done()
    await socket.wait_for("turn_ended")

    span = tracing.only
    assert (span.name, span.parent, span.happened, span.error) == ("turn", CALLER, ["first_token"], "")
    assert span.attributes == {
        "session.id": "s",
        "gateway.turn.id": "id2",
        "gateway.request.id": "req",
        "gateway.turn.carried_on": False,
        "gateway.turn.outcome": "completed",
    }


async def test_the_runtime_is_told_of_the_span(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """So that what it records is below the turn, and the log of the turn leads to it."""
    bench = await Bench(nursery, tracing=tracing).start()
    socket = bench.connect(trace=CALLER)
    socket.say(user_message())
    stream = await bench.agent.stream(0)
    stream.done()
    await trio.testing.wait_all_tasks_blocked()

    assert stream.request.trace == tracing.only.context != CALLER
    for event in ("turn_started", "turn_ended"):
        (fields,) = (fields for _, name, fields in bench.telemetry.entries if name == event)
        assert fields["trace_id"] == CALLER.traceparent.split("-")[1]


async def test_a_message_s_own_trace_goes_before_its_socket_s(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """One socket carries many turns; the next message without one is in the socket's again."""
    bench = await Bench(nursery, tracing=tracing).start()
    socket = bench.connect(trace=CALLER)
    socket.say(user_message(traceparent=OTHER.traceparent))
    (await bench.agent.stream(0)).done()
    socket.say(user_message())
    (await bench.agent.stream(1)).done()
    await trio.testing.wait_all_tasks_blocked()

    assert [span.parent for span in tracing.spans] == [OTHER, CALLER]


async def test_without_a_trace_a_turn_begins_one(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """Nobody presented any."""
    bench = await Bench(nursery, tracing=tracing).start()
    bench.connect().say(user_message())
    stream = await bench.agent.stream(0)
    stream.done()

    assert tracing.only.parent is None
    assert stream.request.trace == tracing.only.context


async def test_with_traces_off_the_trace_is_passed_on(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """Unchanged: no span of ours comes between; and where there is none, none is made up."""
    bench = await Bench(nursery).start()
    bench.connect("a", trace=CALLER).say(user_message())
    bench.connect("b").say(user_message())

    requests = [(await bench.agent.stream(number)).request for number in (0, 1)]
    assert {request.session_id: request.trace for request in requests} == {"a": CALLER, "b": None}
    assert not any("trace_id" in fields for _, _, fields in bench.telemetry.entries)


async def test_tool_calls_are_noted(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """And whether they need approval; neither their names nor their arguments."""
    bench = await Bench(nursery, tracing=tracing).start()
    bench.connect().say(user_message())
    stream = await bench.agent.stream(0)
    stream.emit(
        {
            "type": "tool_call",
            "call_id": "c",
            "tool_name": "secret",
            "arguments": {},
            "requires_approval": True,
        }
    )
    stream.done()
    await trio.testing.wait_all_tasks_blocked()

    assert tracing.only.events == [("tool_call", {"gateway.requires_approval": True})]


async def test_resumes_are_noted(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """A cut that was mended is in the span of a turn that completed, and every POST says the same trace."""
    bench = await Bench(nursery, tracing=tracing).start()
    bench.agent.resumable = True
    bench.connect().say(user_message())
    stream = await bench.agent.stream(0)
    stream.token("a", event_id="1")
    stream.fail(AgentStreamInterrupted("Cut."))
    resumed = await bench.agent.stream(1)
    resumed.token("b", final=True, event_id="2")
    resumed.done()
    await trio.testing.wait_all_tasks_blocked()

    span = tracing.only
    assert span.happened == ["first_token", "resume"]
    assert span.events[1][1] == {"error.type": "AGENT_STREAM_INTERRUPTED", "gateway.resume.attempt": 1}
    assert (span.error, span.attributes["gateway.turn.outcome"]) == ("", "completed")
    assert stream.request.trace == resumed.request.trace == span.context


@pytest.mark.parametrize(
    ("failure", "outcome", "error"),
    [
        (AgentStreamInterrupted("Cut."), "interrupted", "AGENT_STREAM_INTERRUPTED"),
        (AgentRefused(500), "failed", "AGENT_ERROR"),
    ],
)
async def test_a_failure_is_the_span_s(
    nursery: trio.Nursery,
    autojump_clock: Mock,
    tracing: RecordingTracing,
    failure: AgentFailure,
    outcome: str,
    error: str,
) -> None:
    """By its code."""
    bench = await Bench(nursery, tracing=tracing).start()
    bench.connect().say(user_message())
    (await bench.agent.stream(0)).fail(failure)
    await trio.testing.wait_all_tasks_blocked()

    assert (tracing.only.attributes["gateway.turn.outcome"], tracing.only.error) == (outcome, error)


async def test_a_cancelled_turn_ends_its_span(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """As cancelled, which is nobody's failure."""
    bench = await Bench(nursery, tracing=tracing).start()
    socket = bench.connect()
    socket.say(user_message())
    await bench.agent.stream(0)
    socket.say({"type": "cancel"})
    await trio.testing.wait_all_tasks_blocked()

    assert (tracing.only.attributes["gateway.turn.outcome"], tracing.only.error) == ("cancelled", "")


async def test_a_turn_carried_on_after_a_restart_says_so(
    nursery: trio.Nursery, autojump_clock: Mock, tracing: RecordingTracing
) -> None:
    """Its message's own trace is stored with it; that of its socket's handshake was the old process's."""
    store = DurableMemoryStore()
    before = await Bench(nursery, store=store).start()
    before.agent.resumable = True
    await store.claim("s", "anonymous", 0)
    socket = before.connect(dialect=V2, trace=CALLER)
    socket.say(user_message(id="m", traceparent=OTHER.traceparent))
    (await before.agent.stream(0)).token("a", event_id="1")
    await socket.wait_for("assistant_message")
    kept = copy.deepcopy(store)
    store.down = True
    after = Bench(nursery, store=kept, tracing=tracing)
    after.agent.resumable = True
    await after.start()
    carried = await after.agent.stream(0)

    assert (tracing.only.parent, tracing.only.attributes["gateway.turn.carried_on"]) == (OTHER, True)
    assert carried.request.trace == tracing.only.context

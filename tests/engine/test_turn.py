"""One turn: places, outcomes, resumption, and what is stored when."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.core.errors import (
    AgentFailure,
    AgentProtocolError,
    AgentRefused,
    AgentStreamInterrupted,
    AgentTimeout,
    AgentUnavailable,
)
from gateway.core.limits import Limits
from gateway.core.websocket_protocol import Dialect
from gateway.engine.turn import MAX_RESUMES
from tests.engine.fakes import Bench, DurableMemoryStore, user_message

V2 = Dialect.V2_JSON
Mock = trio.testing.MockClock


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (AgentStreamInterrupted("Cut."), "interrupted"),
        (AgentTimeout("Silence."), "failed"),
        (AgentProtocolError("Too long."), "failed"),
    ],
)
async def test_a_broken_stream_is_one_error_and_an_outcome(
    nursery: trio.Nursery, autojump_clock: Mock, failure: AgentFailure, outcome: str
) -> None:
    """The tokens stay, the error says what happened, the end says how; nothing is POSTed again."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.token("half")
    stream.fail(failure)
    ended = await socket.wait_for("turn_ended")
    assert socket.types()[-3:] == ["assistant_message", "error", "turn_ended"]
    assert (ended["outcome"], len(bench.agent.streams)) == (outcome, 1)


async def test_events_after_done_are_not_the_turns(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """``done`` ends the turn wherever it is in a read, and the stream is closed."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.emit(
        {"type": "assistant_message", "token": "a", "is_final": True},
        {"type": "done"},
        {"type": "assistant_message", "token": "late", "is_final": False},
    )
    await socket.wait_for("turn_ended")
    await trio.testing.wait_all_tasks_blocked()
    assert (socket.text(), stream.closed) == ("a", True)


async def test_an_unreadable_event_is_skipped_and_counted(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """The stream goes on; the log says the size, never the content."""
    bench = await Bench(nursery).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.emit({"no": "type", "secret": "content"})
    stream.token("a", final=True)
    stream.done()
    await socket.wait_for("turn_ended")
    assert socket.text() == "a"
    assert bench.telemetry.counts[("gateway_agent_events_skipped_total", (("reason", "no_type"),))] == 1
    assert "content" not in str(bench.telemetry.entries)


async def test_a_stream_that_is_cut_again_and_again_is_given_up(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """After MAX_RESUMES cuts in a row without an event between them; an event starts the count anew."""
    bench = await Bench(nursery).start()
    bench.agent.resumable = True
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    for number in range(MAX_RESUMES + 2):
        stream = await bench.agent.stream(number)
        if number == 1:
            stream.token("a", event_id="1")
        stream.fail(AgentStreamInterrupted("Cut."))
    ended = await socket.wait_for("turn_ended")
    assert (ended["outcome"], len(bench.agent.streams)) == ("interrupted", MAX_RESUMES + 2)
    assert {stream.request.last_event_id for stream in bench.agent.streams[2:]} == {"1"}


async def test_a_refused_resumption_is_the_end(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """A runtime that no longer knows the turn says so, and is not asked again."""
    bench = await Bench(nursery).start()
    bench.agent.resumable = True
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    bench.agent.refusals = [AgentUnavailable("Away."), AgentRefused(409)]
    stream.fail(AgentStreamInterrupted("Cut."))
    assert (await socket.wait_for("error"))["code"] == "AGENT_ERROR"
    assert (await socket.wait_for("turn_ended"))["outcome"] == "failed"


async def test_a_resumption_that_begins_anew_is_not_listened_to(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Another version of the runtime, which cannot resume, would say everything twice."""
    bench = await Bench(nursery).start()
    bench.agent.resumable = True
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    stream = await bench.agent.stream(0)
    stream.token("half ", event_id="1")
    await socket.wait_for("assistant_message")
    bench.agent.resumable = False
    stream.fail(AgentStreamInterrupted("Cut."))
    again = await bench.agent.stream(1)
    again.token("half ")
    again.done()
    assert (await socket.wait_for("turn_ended"))["outcome"] == "interrupted"
    assert (socket.text(), again.closed, len(bench.agent.streams)) == ("half ", True, 2)
    assert [item["code"] for item in socket.objects() if item["type"] == "error"] == [
        "AGENT_STREAM_INTERRUPTED"
    ]


async def test_a_place_is_free_again_however_its_turn_ended(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """Completed, failed or cancelled: the next turn runs."""
    bench = await Bench(nursery, limits=Limits(max_concurrent_turns=1)).start()
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m0"))
    (await bench.agent.stream(0)).done()
    socket.say(user_message(id="m1"))
    (await bench.agent.stream(1)).fail(AgentTimeout("Silence."))
    socket.say(user_message(id="m2"))
    await bench.agent.stream(2)
    socket.say({"type": "cancel", "id": "c"})
    socket.say(user_message(id="m3"))
    (await bench.agent.stream(3)).done()
    await socket.wait_for("turn_ended", 4)


async def test_that_a_stream_can_be_resumed_is_stored_before_its_first_token(
    nursery: trio.Nursery, autojump_clock: Mock
) -> None:
    """An agent may think for a long time, and a crash in that time must not cost the answer."""
    store = DurableMemoryStore()
    bench = await Bench(nursery, store=store).start()
    bench.agent.resumable = True
    await store.claim("s", "anonymous", 0)
    socket = bench.connect(dialect=V2)
    socket.say(user_message(id="m"))
    await bench.agent.stream(0)
    await trio.sleep(1)
    stored = await store.load("s")
    assert stored is not None
    assert stored.record is not None
    assert stored.record.resumable

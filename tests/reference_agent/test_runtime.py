"""The conversation engine, with brains written for one situation each."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import orjson
import pytest
import trio

from gateway.reference_agent.approvals import load_policy
from gateway.reference_agent.brain import Brain, BrainError, CallTool, Piece, Say, Step, SwitchTo, Token
from gateway.reference_agent.memory_state import MemoryState
from gateway.reference_agent.runtime import MAX_STEPS, IdempotencyConflictError, Runtime, TurnGoneError
from gateway.reference_agent.settings import AgentSettings
from gateway.reference_agent.state import RUNNING
from gateway.reference_agent.turn import Turn

Script = Callable[[Step], list[Piece]]


class ScriptOf(Brain):
    """Answers with what a function of the step says, and counts how often it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.steps: list[Step] = []

    async def think(self, step: Step, say: Say) -> None:
        """Emit the pieces of the script."""
        self.steps.append(step)
        for piece in self.script(step):
            await say(piece)


class Ticking(Brain):
    """Says a number each second, 100 times."""

    async def think(self, step: Step, say: Say) -> None:
        """Go on from what was said."""
        for number in range(len(step.already_said.split()), 100):
            await trio.sleep(1)
            await say(Token(f"{number} "))


@asynccontextmanager
async def runtime_of(brain: Brain, **settings: Any) -> AsyncIterator[Runtime]:
    """A runtime with state in memory; its turns end with the block."""
    ids = count(1)
    async with trio.open_nursery() as nursery:
        yield Runtime(
            AgentSettings(**settings),
            brain,
            load_policy(None),
            MemoryState(),
            nursery,
            now=lambda: "2026-01-01T00:00:00Z",
            call_ids=lambda: f"call-{next(ids)}",
        )
        nursery.cancel_scope.cancel()


async def hear(turn: Turn) -> list[dict[str, Any]]:
    """Listen to a turn until its end."""
    turn.join()
    after, data = 0, b""
    while chunk := (await turn.next_chunk(after, 1000.0)):
        if not chunk[0]:
            break
        data += chunk[0]
        after = chunk[1]
    turn.leave()
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b'{"status":"completed"}'
    return [orjson.loads(line) for line in lines]


async def talk(runtime: Runtime, message: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Open a turn and hear all of it."""
    return await hear(await runtime.open_turn("s1", message, **more))


def said(content: str = "go", **more: Any) -> dict[str, Any]:
    """A user_message."""
    return {"type": "user_message", "content": content, **more}


def result(call_id: str, value: Any = "ok") -> dict[str, Any]:
    """A tool_result."""
    return {"type": "tool_result", "call_id": call_id, "result": value}


def decision(call_id: str, what: str, **more: Any) -> dict[str, Any]:
    """A hitl_decision."""
    return {"type": "hitl_decision", "call_id": call_id, "decision": what, **more}


def codes(events: list[dict[str, Any]]) -> list[str]:
    """The codes of error events."""
    return [event["code"] for event in events if event["type"] == "error"]


def writes(step: Step) -> list[Piece]:
    """The coder writes two files at once, then is done."""
    if step.history[-1].role == "tool":
        return [Token("done")]
    if step.agent.name != "coder":
        return [SwitchTo("coder", "writing", 0.5)]
    return [
        Token("now"),
        CallTool("write_file", {"path": "a", "content": "A"}),
        CallTool("write_file", {"path": "b", "content": "B"}, call_id="mine"),
    ]


async def test_the_brain_is_asked_again_only_when_all_calls_are_settled() -> None:
    """One is approved and run, the other rejected; then the brain sees both."""
    brain = ScriptOf(writes)
    async with runtime_of(brain) as runtime:
        events = await talk(runtime, said())
        calls = [event["call_id"] for event in events if event["type"] == "tool_call"]
        assert calls == ["call-1", "mine"]
        assert await talk(runtime, decision("mine", "reject", feedback="not b")) == []
        assert await talk(runtime, decision("call-1", "approve")) == []
        assert len(brain.steps) == 2
        assert [event["token"] for event in await talk(runtime, result("call-1"))] == ["done", ""]
    tools = [entry for entry in brain.steps[-1].history if entry.role == "tool"]
    assert [entry.call_id for entry in tools] == ["mine", "call-1"]
    assert "not b" in tools[0].content


async def test_an_edited_call_tells_the_brain_what_was_run() -> None:
    """The arguments asked for stay in the history; the result says what they became."""
    brain = ScriptOf(writes)
    async with runtime_of(brain) as runtime:
        await talk(runtime, said())
        await talk(runtime, decision("mine", "reject"))
        edited = {"path": "c", "content": "C"}
        assert await talk(runtime, decision("call-1", "edit", modified_arguments=edited)) == []
        await talk(runtime, result("call-1", "written"))
    assert brain.steps[-1].history[-1].content.startswith('(The user changed the arguments to {"path":"c"')


async def test_what_is_not_possible_is_refused_and_changes_nothing() -> None:
    """Each refusal has its code; the session goes on as before."""
    async with runtime_of(ScriptOf(writes)) as runtime:
        await talk(runtime, said())
        assert codes(await talk(runtime, result("call-1"))) == ["APPROVAL_REQUIRED"]
        assert codes(await talk(runtime, result("nonsense"))) == ["UNKNOWN_CALL"]
        assert codes(await talk(runtime, decision("nonsense", "approve"))) == ["UNKNOWN_CALL"]
        await talk(runtime, decision("call-1", "approve"))
        assert codes(await talk(runtime, decision("call-1", "reject"))) == ["ALREADY_DECIDED"]
        await talk(runtime, decision("mine", "reject"))
        assert codes(await talk(runtime, decision("mine", "approve"))) == ["ALREADY_DECIDED"]
        assert codes(await talk(runtime, result("mine"))) == ["CALL_ALREADY_RESOLVED"]
        assert codes(await talk(runtime, {"type": "switch_agent", "agent_type": "boss"})) == ["UNKNOWN_AGENT"]
        assert codes(await talk(runtime, {"type": "dance"})) == ["INVALID_MESSAGE"]
        assert (await talk(runtime, result("call-1")))[-1]["is_final"] is True


async def test_a_new_user_message_abandons_open_calls() -> None:
    """LLM APIs want a result for every call: it says that the user went on."""
    brain = ScriptOf(writes)
    async with runtime_of(brain) as runtime:
        await talk(runtime, said())
        await talk(runtime, said("something else"))
        assert codes(await talk(runtime, decision("mine", "approve"))) == ["ALREADY_DECIDED"]
    roles = [entry.role for entry in brain.steps[-1].history]
    assert roles == ["user", "assistant", "tool", "tool", "user"]


async def test_a_call_the_agent_may_not_make_is_never_handed_out() -> None:
    """The brain is told why, and asked again."""

    def script(step: Step) -> list[Piece]:
        if step.history[-1].role == "tool":
            return [Token(step.history[-1].content)]
        return [CallTool("write_file", {"path": "a.py", "content": ""})]

    async with runtime_of(ScriptOf(script)) as runtime:
        events = await talk(runtime, said(agent_type="architect"))
    assert [event["type"] for event in events] == ["agent_switched", "assistant_message", "assistant_message"]
    assert "only write files matching *.md" in events[1]["token"]


async def test_agents_cannot_hand_over_for_ever() -> None:
    """After a number of steps the turn ends with an error."""
    brain = ScriptOf(lambda step: [SwitchTo("ask" if step.agent.name == "coder" else "coder", "you", None)])
    async with runtime_of(brain) as runtime:
        events = await talk(runtime, said())
    assert codes(events) == ["TOO_MANY_STEPS"]
    assert len(brain.steps) == MAX_STEPS


async def test_a_failing_brain_ends_the_turn_and_not_the_session(caplog: pytest.LogCaptureFixture) -> None:
    """Its own errors keep their code; anything else is an internal error without details."""

    def script(step: Step) -> list[Piece]:
        if step.history[-1].content == "crash":
            raise ZeroDivisionError("secret")
        if step.history[-1].content == "fail":
            raise BrainError("LLM_DOWN", "The LLM is down.", retryable=True)
        return [Token("fine")]

    async with runtime_of(ScriptOf(script)) as runtime:
        failed = await talk(runtime, said("fail"))
        crashed = await talk(runtime, said("crash"))
        fine = await talk(runtime, said())
    assert codes(failed) == ["LLM_DOWN"]
    assert (codes(crashed), "secret" in crashed[0]["error"]) == (["INTERNAL_ERROR"], False)
    assert fine[0]["token"] == "fine"


async def test_roles_other_than_user_are_kept_without_an_answer() -> None:
    """An IDE can add context without asking anything."""
    brain = ScriptOf(lambda step: [Token(str(len(step.history)))])
    async with runtime_of(brain) as runtime:
        assert await talk(runtime, said("You are in a monorepo.", role="system")) == []
        assert (await talk(runtime, said()))[0]["token"] == "2"


async def test_leaving_an_unkeyed_turn_stops_it_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """What was said until then stays in the history, marked as interrupted."""
    async with runtime_of(Ticking()) as runtime:
        turn = await runtime.open_turn("s1", said())
        turn.join()
        await trio.sleep(3.5)
        turn.leave()
        await turn.wait_finished()
        assert trio.current_time() == 3.5
        last = (await runtime.store.history("s1"))[-1]
    assert (last.content, last.interrupted) == ("0 1 2 ", True)


async def test_a_turn_nobody_listens_to_is_stopped(autojump_clock: trio.testing.MockClock) -> None:
    """A connection may be gone before its answer begins."""
    async with runtime_of(Ticking()) as runtime:
        turn = await runtime.open_turn("s1", said())
        await turn.wait_finished()
    assert trio.current_time() == 10


async def test_a_keyed_turn_waits_for_its_grace(autojump_clock: trio.testing.MockClock) -> None:
    """Paused, so that no more is said than heard. Back in time nothing is lost; later the work is stopped."""
    async with runtime_of(Ticking(), resume_grace=5) as runtime:
        turn = await runtime.open_turn("s1", said(), key="k")
        turn.join()
        await trio.sleep(3.5)
        turn.leave()
        await trio.sleep(4)
        assert len(turn) == 3
        again = await runtime.open_turn("s1", said(), key="k", resuming=True)
        again.join()
        await trio.sleep(3.9)
        assert (again is turn, len(turn), turn.finished) == (True, 7, False)
        again.leave()
        await turn.wait_finished()
        assert trio.current_time() == 16.4
        late = await hear(await runtime.open_turn("s1", said(), key="k", resuming=True))
    assert codes(late) == ["TURN_STOPPED"]
    assert len(late) == 8


async def test_the_end_of_the_process_is_not_the_end_of_a_turn() -> None:
    """Listeners see a cut, and the record says that the turn is to be carried on."""
    async with runtime_of(Ticking()) as runtime:
        turn = await runtime.open_turn("s1", said(), key="k")
        turn.join()
        await trio.testing.wait_all_tasks_blocked()
    record = await runtime.store.turn("s1", "k")
    assert record is not None
    assert (turn.finished, record.status) == (False, RUNNING)


async def test_who_comes_back_too_late_is_told_so(autojump_clock: trio.testing.MockClock) -> None:
    """Live or from the store, with the same events."""
    async with runtime_of(Ticking(), resume_grace=5) as runtime:
        turn = await runtime.open_turn("s1", said(), key="k")
        turn.join()
        await trio.sleep(1.5)
        turn.leave()
        await turn.wait_finished()
        live = await hear(turn)
        stored = await hear(await runtime.open_turn("s1", said(), key="k"))
    assert codes(live) == ["TURN_STOPPED"]
    assert live == stored


async def test_the_same_key_never_starts_the_work_twice() -> None:
    """A finished turn is told again, word by word."""
    brain = ScriptOf(lambda _: [Token("a"), Token("b")])
    async with runtime_of(brain) as runtime:
        first = await talk(runtime, said(), key="k")
        second = await talk(runtime, said(), key="k")
        with pytest.raises(IdempotencyConflictError):
            await runtime.open_turn("s1", said("other"), key="k")
        with pytest.raises(TurnGoneError):
            await runtime.open_turn("s1", said(), key="never seen", resuming=True)
    assert (second, len(brain.steps)) == (first, 1)


async def test_a_refusal_is_remembered_under_its_key() -> None:
    """A client that lost the answer gets the same one."""
    async with runtime_of(ScriptOf(writes)) as runtime:
        first = await talk(runtime, result("nonsense"), key="k")
        again = await talk(runtime, result("nonsense"), key="k", resuming=True)
    assert (codes(first), again) == (["UNKNOWN_CALL"], first)


async def test_a_second_message_waits_for_the_first(autojump_clock: trio.testing.MockClock) -> None:
    """Until patience ends; a turn whose listener has gone does not stand in the way."""
    async with runtime_of(Ticking(), busy_patience=5, resume_grace=60) as runtime:
        first = await runtime.open_turn("s1", said(), key="k")
        first.join()
        await trio.sleep(0.5)
        assert codes(await talk(runtime, said("second"))) == ["SESSION_BUSY"]
        assert trio.current_time() == 5.5
        first.leave()
        assert len(await talk(runtime, said("third"))) == 101
        assert trio.current_time() == 105.5


async def test_a_message_behind_a_busy_one_does_not_overtake(autojump_clock: trio.testing.MockClock) -> None:
    """While one turn runs and a second has given up, a third still waits for the first."""
    async with runtime_of(Ticking(), busy_patience=5) as runtime:
        first = await runtime.open_turn("s1", said())
        first.join()
        assert codes(await talk(runtime, said("second"))) == ["SESSION_BUSY"]
        assert codes(await talk(runtime, said("third"))) == ["SESSION_BUSY"]
        first.leave()

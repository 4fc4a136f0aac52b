"""Whole conversations with an LLM server on loopback: approval, rejection, cuts, the stop button."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.brain import Piece, Step, Token
from gateway.reference_agent.conformance_client import Event, Probe
from gateway.reference_agent.history import Entry
from gateway.reference_agent.llm_brain import open_llm_brain
from gateway.reference_agent.settings import AgentSettings

from .conftest import AgentClient, RunAgent, run_agent
from .openai_server import COUNTED, OpenAiServer, run_openai_server


@asynccontextmanager
async def run_both(server: OpenAiServer, **settings: Any) -> AsyncIterator[AgentClient]:
    """The agent with its LLM."""
    async with (
        run_openai_server(server) as url,
        run_agent(llm="openai", llm_url=url, **settings) as client,
    ):
        yield client


async def test_reading_editing_approval_and_a_switch() -> None:
    """The LLM is asked once per step, and told each result."""
    server = OpenAiServer()
    async with run_both(server) as client:
        reading = await client.say("edit a.py")
        changing = await client.result(reading.calls[0]["call_id"], "hello")
        call_id = changing.calls[0]["call_id"]
        decided = await client.decide(call_id, "approve")
        done = await client.result(call_id, "ok")
        metrics = (await client.get("/events/metrics/session/s1"))["metrics"]
    assert reading.types == ["agent_switched", "assistant_message", "tool_call"]
    assert (reading.text, changing.types, decided.events, done.text) == (
        "I read. ",
        ["tool_call"],
        [],
        "All done.",
    )
    assert server.asked == [
        f"edit a.py {step}" for step in ("orchestrator 0", "coder 0", "coder 1", "coder 2")
    ]
    assert metrics["llm_requests"] == 4


async def test_a_rejection_reaches_the_llm() -> None:
    """And its answer the user."""
    server = OpenAiServer()
    async with run_both(server) as client:
        reading = await client.say("edit a.py")
        changing = await client.result(reading.calls[0]["call_id"], "hello")
        answer = await client.decide(changing.calls[0]["call_id"], "reject", feedback="no")
    assert answer.text == "I leave it."


async def test_the_same_ids_from_the_llm_become_different_calls() -> None:
    """Some servers number the calls of each answer from the same start."""
    server = OpenAiServer()
    async with run_both(server) as client:
        first = await client.say("edit a.py")
        second = await client.say("edit b.py")
    assert first.calls[0]["call_id"] == "llm_read_file"
    assert second.calls[0]["call_id"] not in ("llm_read_file", "")


async def test_closing_the_request_closes_the_one_to_the_llm() -> None:
    """Stop generating stops generating."""
    server = OpenAiServer(delay=0.02)
    async with run_both(server) as client:
        await client.read_until("count", b'"3 "')
        with trio.fail_after(1):
            while not server.given_up:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)
        history = (await client.get("/sessions/s1/history"))["messages"]
    assert (history[-1]["interrupted"], len(history[-1]["content"].split()) < 10) == (True, True)


async def test_requests_cancelled_at_any_moment_do_not_use_up_the_connections() -> None:
    """httpcore loses a place in a bounded pool for some of them; ours has no bound."""
    dice = random.Random(8)
    step = Step("s1", AGENTS["ask"], (Entry("user", "count", "2026-01-01T00:00:00Z"),))
    words: list[str] = []

    async def say(*pieces: Piece) -> None:
        words.extend(piece.text for piece in pieces if isinstance(piece, Token))

    async with run_openai_server(OpenAiServer(delay=0.001)) as url:
        settings = AgentSettings(llm="openai", llm_url=url)
        async with open_llm_brain(settings, dice.random) as brain:

            async def try_for(seconds: float) -> None:
                with trio.move_on_after(seconds):
                    await brain.think(step, say)

            for _ in range(40):
                async with trio.open_nursery() as nursery:
                    for _ in range(40):
                        nursery.start_soon(try_for, dice.uniform(0, 0.006))
            words.clear()
            with trio.fail_after(5):
                await brain.think(step, say)
    assert "".join(words) == "".join(COUNTED)


async def test_a_hundred_cuts_ask_the_llm_once_per_step_and_lose_no_word(tmp_path: Path) -> None:
    """Each answer is cut at random points until it is through."""
    dice = random.Random(8)
    server = OpenAiServer(delay=0.001)
    cuts = turns = 0
    async with (
        run_both(server, db=str(tmp_path / "agent.db"), llm_keep=0) as client,
        httpx.AsyncClient(base_url=client.http.base_url, trust_env=False) as http,
    ):
        probe = Probe(http, None, timeout=10)
        while cuts < 100:
            turns += 1
            events: list[Event] = []
            while True:
                headers = {"Idempotency_Key": f"turn-{turns}"}
                if events:
                    headers["Last_Event_ID"] = str(events[-1].event_id)
                message = {"type": "user_message", "content": f"count {turns}"}
                recording = await probe.post(message, headers=headers, cut_after=dice.randint(1, 15))
                assert recording.status == 200
                events += recording.events
                if recording.ended_by == "done":
                    break
                cuts += 1
            assert [event.event_id for event in events] == [str(n) for n in range(1, 42)]
            tokens = [(event.payload or {})["token"] for event in events]
            assert "".join(tokens) == "".join(COUNTED)
    assert len(server.asked) == turns


async def test_without_a_spool_an_answer_torn_by_the_end_of_the_process_is_continued(
    run_agent: RunAgent, tmp_path: Path
) -> None:
    """The LLM is given what the user has, and asked for the rest; whole steps are not asked again."""
    server = OpenAiServer(delay=0.01)
    async with run_openai_server(server) as url:
        settings = {"llm": "openai", "llm_url": url, "db": str(tmp_path / "agent.db"), "llm_keep": 0}
        async with run_agent(**settings) as client:
            received = await client.read_until("count", b'"7 "', Idempotency_Key="k")
        seen = received.count(b"event: message")
        async with run_agent(**settings) as client:
            rest = await client.post(
                {"type": "user_message", "content": "count"}, Idempotency_Key="k", Last_Event_ID=str(seen)
            )
            again = await client.post({"type": "user_message", "content": "count"}, Idempotency_Key="k")
    assert rest.text == "".join(COUNTED[seen:])
    assert again.text == "".join(COUNTED)
    assert len(server.asked) == 2

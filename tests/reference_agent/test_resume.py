"""Resumable streams: cuts of the connection, restarts and `kill -9` of the runtime."""

import random
import signal
from pathlib import Path

import httpx
import pytest
import trio

from .conftest import AgentClient, RunAgent
from .runtime_process import ResumingClient, free_port, runtime_process, text_of


async def test_a_stream_without_a_key_does_not_claim_to_be_resumable(client: AgentClient) -> None:
    """A gateway that sent no key cannot come back with it."""
    answer = await client.say("count to 2")
    assert "X-Stream-Resumable" not in answer.headers
    assert answer.ids == ["1", "2", "3", "4"]


async def test_a_cut_stream_continues_after_the_last_event(run_agent: RunAgent) -> None:
    """On a new connection, with nothing lost, repeated or thought twice."""
    async with run_agent(token_delay=0.01) as client:
        received = await client.read_until("count to 30", b'"7 "', Idempotency_Key="k")
        seen = received.count(b"event: message")
        rest = await client.post(
            {"type": "user_message", "content": "count to 30"},
            Idempotency_Key="k",
            Last_Event_ID=str(seen),
        )
        metrics = (await client.get("/events/metrics/session/s1"))["metrics"]
    assert rest.ids == [str(number) for number in range(seen + 1, 33)]
    assert rest.text == "".join(f"{number} " for number in range(seen + 1, 31))
    assert (metrics["turns"], metrics["llm_requests"]) == (1, 1)


async def test_headers_that_make_no_sense_are_refused(client: AgentClient) -> None:
    """Each with its status; none of them starts any work."""
    message = {"type": "user_message", "content": "count to 2"}
    await client.post(message, Idempotency_Key="k")
    other = {"type": "user_message", "content": "count to 3"}
    expected = {
        400: [
            await client.post(message, Last_Event_ID="1"),
            await client.post(message, Idempotency_Key="k", Last_Event_ID="x"),
            await client.post(message, Idempotency_Key="k", Last_Event_ID="99"),
            await client.post(message, Idempotency_Key="x" * 256),
        ],
        422: [await client.post(other, Idempotency_Key="k")],
        410: [await client.post(message, Idempotency_Key="new", Last_Event_ID="1")],
    }
    for status, answers in expected.items():
        assert [answer.status for answer in answers] == [status] * len(answers)
    assert (await client.get("/events/metrics/session/s1"))["metrics"]["turns"] == 1


async def test_pending_approvals_survive_a_restart(run_agent: RunAgent, tmp_path: Path) -> None:
    """The decision may come to another process than the one that asked; a second one is refused."""
    db = str(tmp_path / "agent.db")
    async with run_agent(db=db) as client:
        call_id = (await client.say("create a.py")).calls[0]["call_id"]
    async with run_agent(db=db) as client:
        pending = await client.get("/sessions/s1/pending-approvals")
        approved = await client.decide(call_id, "approve")
    async with run_agent(db=db) as client:
        again = await client.decide(call_id, "reject")
        answer = await client.result(call_id, "ok")
        metrics = await client.get("/events/metrics")
    assert [one["call_id"] for one in pending["pending_approvals"]] == [call_id]
    assert (approved.events, again.error_codes) == ([], ["ALREADY_DECIDED"])
    assert answer.text.startswith("Done: a.py")
    assert metrics["metrics"]["approved"] == 1


async def test_a_turn_cut_by_a_clean_end_is_carried_on_by_the_next_start(
    run_agent: RunAgent, tmp_path: Path
) -> None:
    """Its text goes on where it stopped, and stands in the history once."""
    db = str(tmp_path / "agent.db")
    async with run_agent(db=db, token_delay=0.01) as client:
        received = await client.read_until("count to 30", b'"7 "', Idempotency_Key="k")
    seen = received.count(b"event: message")
    async with run_agent(db=db) as client:
        rest = await client.post(
            {"type": "user_message", "content": "count to 30"}, Idempotency_Key="k", Last_Event_ID=str(seen)
        )
        history = (await client.get("/sessions/s1/history"))["messages"]
    assert rest.text == "".join(f"{number} " for number in range(seen + 1, 31))
    assert [entry["role"] for entry in history] == ["user", "assistant"]
    assert history[1]["content"] == "".join(f"{number} " for number in range(1, 31))


async def test_a_turn_that_was_overtaken_after_a_restart_is_over(run_agent: RunAgent, tmp_path: Path) -> None:
    """The user has gone on: the old turn is not revived into the new conversation."""
    db = str(tmp_path / "agent.db")
    async with run_agent(db=db, token_delay=0.01) as client:
        await client.read_until("count to 30", b'"7 "', Idempotency_Key="k")
    async with run_agent(db=db) as client:
        await client.say("count to 2")
        late = await client.post({"type": "user_message", "content": "count to 30"}, Idempotency_Key="k")
    assert late.error_codes == ["TURN_STOPPED"]


# httpx leaves the generator of a request's body to the garbage collector when the connection breaks under it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_kill_9_at_random_points_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """A conversation with a switch, a read, an edit and an approval, while its runtime is killed under it."""
    dice = random.Random(8)
    bind = f"127.0.0.1:{free_port()}"
    options = ("--bind", bind, "--db", str(tmp_path / "agent.db"), "--token-delay")
    client = ResumingClient(f"http://{bind}")
    over = trio.Event()

    async def keep_killing() -> None:
        while not over.is_set():
            with trio.CancelScope(shield=True):  # a process half opened would be left behind
                async with runtime_process(*options, "0.01") as (_, process):
                    await trio.sleep(dice.uniform(0.0, 0.4))
                    process.send_signal(signal.SIGKILL)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_killing)
            counted = await client.post({"type": "user_message", "content": "count to 30"}, "k1")
            reading = await client.post(
                {"type": "user_message", "content": "edit a.py: replace hello with goodbye"}, "k2"
            )
            call_id = reading[-1]["call_id"]
            changing = await client.post(
                {"type": "tool_result", "call_id": call_id, "result": 'print("hello")'}, "k3"
            )
            call_id = changing[-1]["call_id"]
            decided = await client.post(
                {"type": "hitl_decision", "call_id": call_id, "decision": "approve"}, "k4"
            )
            done = await client.post({"type": "tool_result", "call_id": call_id, "result": "ok"}, "k5")
            over.set()
    assert client.cuts > 2
    assert text_of(counted) == "".join(f"{number} " for number in range(1, 31))
    assert [event["type"] for event in reading if event["type"] != "assistant_message"] == [
        "agent_switched",
        "tool_call",
    ]
    assert text_of(reading) == "Let me look at a.py first. "
    assert text_of(changing) == "I found it. I will replace 'hello' with 'goodbye'. "
    assert (decided, text_of(done)) == ([], "Done: a.py now says 'goodbye'.")
    async with runtime_process(*options, "0") as (url, _), httpx.AsyncClient(trust_env=False) as http:
        history = (await http.get(f"{url}/sessions/s1/history")).json()["messages"]
        metrics = (await http.get(f"{url}/events/metrics/session/s1")).json()["metrics"]
    roles = [entry["role"] for entry in history]
    assert roles == ["user", "assistant", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert (metrics["turns"], metrics["llm_requests"]) == (5, 5)

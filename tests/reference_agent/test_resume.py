"""Resumable streams: cuts of the connection, restarts and `kill -9` of the runtime."""

import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import trio

from .conftest import AgentClient, RunAgent

PROGRAM = """
import sys, trio
from gateway.reference_agent.server import serve_agent
from gateway.reference_agent.settings import AgentSettings

async def main():
    async with trio.open_nursery() as nursery:
        settings = AgentSettings(bind=sys.argv[1], db=sys.argv[2], token_delay=float(sys.argv[3]))
        print(await nursery.start(serve_agent, settings), flush=True)

trio.run(main)
"""


@asynccontextmanager
async def process_of(db: Path, bind: str, token_delay: float) -> AsyncIterator[tuple[str, trio.Process]]:
    """The runtime as a process of its own; killed at the end."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PROGRAM, bind, str(db), str(token_delay)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = bytes(await process.stdout.receive_some(1000))
        yield line.decode().strip(), process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()


class ResumingClient:
    """Posts like a gateway: the same key again after a cut, with the last id it saw."""

    def __init__(self, url: str, session_id: str = "s1") -> None:
        self.url = url
        self.session_id = session_id
        self.cuts = 0

    async def post(self, message: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """All events of one turn, however often the stream is cut."""
        events: list[dict[str, Any]] = []
        last_id = 0
        while True:
            headers = {"Idempotency-Key": key}
            if last_id:
                headers["Last-Event-ID"] = str(last_id)
            try:
                async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
                    body = {"session_id": self.session_id, "message": message}
                    request = http.build_request(
                        "POST", f"{self.url}/agent/message/stream", json=body, headers=headers
                    )
                    response = await http.send(request, stream=True)
                    try:
                        assert response.status_code == 200, await response.aread()
                        assert response.headers["X-Stream-Resumable"] == "1"
                        last_id, ended = await self._read(response, events, last_id)
                    finally:
                        await response.aclose()
                    if ended:
                        return events
            except httpx.TransportError:
                pass
            self.cuts += 1
            await trio.sleep(0.02)

    async def _read(
        self, response: httpx.Response, events: list[dict[str, Any]], last_id: int
    ) -> tuple[int, bool]:
        # Read to the end of the stream even after `done`: leaving httpx's generators early leaks them.
        buffer, ended = b"", False
        try:
            async for chunk in response.aiter_raw():
                buffer += chunk
                *blocks, buffer = buffer.split(b"\n\n")
                for block in blocks:
                    if block.startswith(b":"):
                        continue
                    fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
                    assert int(fields[b"id"]) == last_id + 1, "an event was lost or repeated"
                    last_id += 1
                    if fields[b"event"] == b"done":
                        ended = True
                    else:
                        events.append(orjson.loads(fields[b"data"]))
        except httpx.TransportError:
            pass
        return last_id, ended


def text_of(events: list[dict[str, Any]]) -> str:
    """The tokens put together."""
    return "".join(event["token"] for event in events if event["type"] == "assistant_message")


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
    db = tmp_path / "agent.db"
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    bind = f"127.0.0.1:{listener[0].socket.getsockname()[1]}"
    await listener[0].aclose()
    client = ResumingClient(f"http://{bind}")
    over = trio.Event()

    async def keep_killing() -> None:
        while not over.is_set():
            with trio.CancelScope(shield=True):  # a process half opened would be left behind
                async with process_of(db, bind, 0.01) as (_, process):
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
    async with process_of(db, bind, 0.0) as (url, _), httpx.AsyncClient(trust_env=False) as http:
        history = (await http.get(f"{url}/sessions/s1/history")).json()["messages"]
        metrics = (await http.get(f"{url}/events/metrics/session/s1")).json()["metrics"]
    roles = [entry["role"] for entry in history]
    assert roles == ["user", "assistant", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert (metrics["turns"], metrics["llm_requests"]) == (5, 5)

"""Kills the runtime, and cuts its streams, at random points: the LLM must not notice.

``python -m tests.reference_agent.kill_runtime --seed 1 --kills 100 --cuts 100`` runs ``gateway agent`` as a
process on a database, with an OpenAI-compatible server that counts what it is asked, and ends with an error
unless every step of every conversation was asked exactly once, no request to the LLM was broken off, and no
word was lost or repeated.
"""

import argparse
import random
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from gateway.reference_agent.conformance_client import Event, Probe

from .openai_server import COUNTED, OpenAiServer, run_openai_server
from .runtime_process import (
    ResumingClient,
    free_port,
    runtime_process,
    spool_pid,
    text_of,
    wait_spool_ended,
)

TOKEN_DELAY = 0.01
LONGEST_START = 0.8
LONGEST_LIFE = 0.5
"""Seconds after which a runtime is killed at the latest: from the start of its process, or from listening."""


@attrs.define
class Outcome:
    """What came of one campaign."""

    kills: int = 0
    kills_while_starting: int = 0
    broken_streams: int = 0
    cuts: int = 0
    conversations: int = 0
    turns: int = 0
    steps: int = 0
    spools: set[int] = attrs.field(factory=set)


class Campaign:
    """One run: a runtime that is killed again and again, and somebody who goes on talking to it."""

    def __init__(self, seed: int, folder: Path, *, arguments: tuple[str, ...] = ()) -> None:
        self.outcome = Outcome()
        self.db = folder / "agent.sqlite3"
        self.llm = OpenAiServer(delay=TOKEN_DELAY)
        self._dice = random.Random(seed)
        self._bind = f"127.0.0.1:{free_port()}"
        self._arguments = arguments
        self._expected: list[str] = []

    async def run(self, kills: int, cuts: int) -> Outcome:
        """Do both, check both, and see the spool end. Raises `AssertionError`."""
        async with AsyncExitStack() as resources:
            llm_url = await resources.enter_async_context(run_openai_server(self.llm))
            options = ("--bind", self._bind, "--db", str(self.db), "--llm", "openai", "--llm-url", llm_url)
            await self._survive_kills(kills, (*options, *self._arguments))
            async with runtime_process(*options, *self._arguments) as (url, process):
                await self._survive_cuts(url, cuts)
                self._check_llm()
                process.terminate()
                await process.wait()
            await wait_spool_ended(self.db, 5)
        self.outcome.steps = len(self._expected)
        return self.outcome

    def _check_llm(self) -> None:
        assert self.llm.asked == self._expected, "a step was asked twice, or not at all"
        assert self.llm.given_up == 0, "a request to the LLM was broken off"

    async def _survive_kills(self, kills: int, options: tuple[str, ...]) -> None:
        over = trio.Event()
        client = ResumingClient(f"http://{self._bind}")

        async def keep_killing() -> None:
            while not over.is_set():
                await self._live_once(options)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_killing)
            while self.outcome.kills < kills:
                self.outcome.conversations += 1
                client.session_id = f"s{self.outcome.conversations}"
                if self.outcome.conversations % 2:
                    await self._edit(client)
                else:
                    await self._count(client)
            over.set()
        self.outcome.broken_streams = client.cuts

    async def _live_once(self, options: tuple[str, ...]) -> None:
        is_early = self._dice.random() < 0.2
        with trio.CancelScope() as life:
            if is_early:
                life.deadline = trio.current_time() + self._dice.uniform(0, LONGEST_START)
            async with runtime_process(*options):
                life.deadline = trio.current_time() + self._dice.uniform(0, LONGEST_LIFE)
                await trio.sleep_forever()
        self.outcome.kills += 1
        self.outcome.kills_while_starting += is_early
        assert len(set(self.llm.asked)) == len(self.llm.asked), "a step was asked twice"
        pid = spool_pid(self.db)
        if pid is not None:
            self.outcome.spools.add(pid)

    async def _count(self, client: ResumingClient) -> None:
        words = f"count {self.outcome.turns}"
        self._expected.append(f"{words} orchestrator 0")
        events = await client.post({"type": "user_message", "content": words}, self._next_key())
        assert text_of(events) == "".join(COUNTED), f"{words}: the text is not complete"

    async def _edit(self, client: ResumingClient) -> None:
        words = f"edit {self.outcome.turns}"
        self._expected += [f"{words} orchestrator 0", f"{words} coder 0"]
        reading = await client.post({"type": "user_message", "content": words}, self._next_key())
        assert text_of(reading) == "I read. "
        call_id = reading[-1]["call_id"]
        self._expected.append(f"{words} coder 1")
        changing = await client.post(_result(call_id, 'print("hello")'), self._next_key())
        call_id = changing[-1]["call_id"]
        decision = {"type": "hitl_decision", "call_id": call_id, "decision": "approve"}
        assert await client.post(decision, self._next_key()) == []
        self._expected.append(f"{words} coder 2")
        assert text_of(await client.post(_result(call_id, "ok"), self._next_key())) == "All done."

    def _next_key(self) -> str:
        self.outcome.turns += 1
        return f"turn-{self.outcome.turns}"

    async def _survive_cuts(self, url: str, cuts: int) -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            probe = Probe(http, None, timeout=10)
            while self.outcome.cuts < cuts:
                words = f"count {self.outcome.turns}"
                self._expected.append(f"{words} orchestrator 0")
                events: list[Event] = []
                key = self._next_key()
                while True:
                    headers = {"Idempotency_Key": key}
                    if events:
                        headers["Last_Event_ID"] = str(events[-1].event_id)
                    message = {"type": "user_message", "content": words}
                    cut_after = self._dice.randint(1, 15)
                    recording = await probe.post(message, headers=headers, cut_after=cut_after)
                    assert recording.status == 200
                    events += recording.events
                    if recording.ended_by == "done":
                        break
                    self.outcome.cuts += 1
                tokens = [(event.payload or {})["token"] for event in events]
                assert "".join(tokens) == "".join(COUNTED), f"{words}: the text is not complete"


def _result(call_id: str, result: str) -> dict[str, Any]:
    return {"type": "tool_result", "call_id": call_id, "result": result}


def main() -> None:
    """Run one campaign and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--without-spool", action="store_true", help="show that it fails without")
    arguments = parser.parse_args()
    options = ("--llm-keep", "0") if arguments.without_spool else ()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(arguments.seed, Path(folder), arguments=options)
        outcome = trio.run(campaign.run, arguments.kills, arguments.cuts)
    sys.stdout.write(
        f"seed {arguments.seed}: {outcome.kills} kills, {outcome.kills_while_starting} from its start on;"
        f" {outcome.broken_streams} broken or refused streams; {len(outcome.spools)} spool(s);"
        f" {outcome.cuts} cuts; {outcome.turns} turns of {outcome.conversations} conversations\n"
        f"the LLM was asked once for each of {outcome.steps} steps, and every text is complete\n"
    )


if __name__ == "__main__":
    main()

"""``python -m tests.faults.cancelled_calls``: cancel calls of the agent again and again; see what is left.

Sessions ask and soon cancel, more of them than may ask at a time, so that calls are cancelled while they wait
for a place, while they are sent, before the answer's head, after it, and between tokens. Then the gateway
comes to rest, and must have as many tasks, open files and free places as before it began.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from attrs import Factory, define, frozen

from gateway.bench.process_figures import resident_kilobytes
from tests.faults.node_process import LOAD_SETTINGS, Node, errors_in
from tests.faults.talker import Talker

PLACES = 50
"""Calls at a time."""
DELAYS = (0.0, 0.02, 0.1, 0.2, 0.3)
"""Seconds from the acknowledgement to the cancel: before the call is sent, before its answer, or within."""
ANSWER_SECONDS = 30.0
REST_SECONDS = 2.0
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"type":"assistant_message","token":"word ","is_final":false}\n\n'
_CHUNK = b"%x\r\n%b\r\n" % (len(_TOKEN), _TOKEN)


@frozen
class Options:
    """What a run is to do."""

    calls: int = 100_000
    sessions: int = 100
    seed: int = 1


@frozen
class Figures:
    """What the gateway holds."""

    tasks: int
    files: int
    megabytes: float


@define
class Result:
    """What came of a run."""

    calls: int = 0
    posts: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = Factory(Counter)
    before: Figures = Figures(0, 0, 0)
    after: Figures = Figures(0, 0, 0)
    open_at_runtime: int = 0
    """Connections of the gateway's that the runtime still holds at the end."""
    places: int = 0
    """Calls that ran at the same time at the end."""
    violations: list[str] = Factory(list)


class UnfinishedRuntime(asyncio.Protocol):
    """A runtime that never comes to an end: it says nothing, or a head, or a head and token after token."""

    open = 0
    posts = 0

    def __init__(self, randomness: random.Random) -> None:
        self._random = randomness
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        UnfinishedRuntime.open += 1

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by asyncio."""
        UnfinishedRuntime.open -= 1
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        UnfinishedRuntime.posts += data.startswith(b"POST")
        draw = 1.0 if b'"always"' in data else self._random.random()
        if draw > 0.3 and self._timer is None:
            self._transport.write(_HEAD)
        if draw > 0.5 and self._timer is None:
            self._tick()

    def _tick(self) -> None:
        self._transport.write(_CHUNK)
        self._timer = asyncio.get_running_loop().call_later(0.005, self._tick)


async def run(options: Options, progress: Callable[[str], None]) -> Result:
    """Do it."""
    loop, randomness = asyncio.get_running_loop(), random.Random(options.seed)
    UnfinishedRuntime.open = UnfinishedRuntime.posts = 0
    server = await loop.create_server(lambda: UnfinishedRuntime(randomness), "127.0.0.1", 0, backlog=1024)
    with tempfile.TemporaryDirectory(prefix="cancelled-calls-") as folder:
        settings = {
            **LOAD_SETTINGS,
            "LOG_LEVEL": "WARNING",
            "MAX_CONCURRENT_REQUESTS": str(PLACES),
            "STORE_URL": f"sqlite:///{folder}/gateway.sqlite3",
            "AGENT_URL": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        }
        log = Path(folder) / "gateway.log"
        log.write_bytes(b"")
        node = await Node.start(settings, log, module="tests.faults.watched_gateway")
        try:
            return await _run(options, node, log, randomness, progress)
        finally:
            await node.kill()
            server.close()


async def _run(
    options: Options, node: Node, log: Path, randomness: random.Random, progress: Callable[[str], None]
) -> Result:
    result = Result()
    talkers = [Talker(f"cancelled-{number}") for number in range(options.sessions)]
    for talker in talkers:
        await talker.connect(node.port)
    # Once for each, so that what is made once is there.
    await _cancel(talkers, options.sessions, result, randomness, progress)
    result.before = await _at_rest(node)
    result.outcomes.clear()
    result.calls, began = 0, time.monotonic()
    await _cancel(talkers, options.calls, result, randomness, progress)
    result.seconds = time.monotonic() - began
    result.after, result.open_at_runtime = await _at_rest(node), UnfinishedRuntime.open
    result.posts = UnfinishedRuntime.posts
    result.places = await _places(talkers)
    for talker in talkers:
        result.violations += talker.violations
    result.violations += errors_in(log)
    if result.outcomes.keys() - {"cancelled"}:
        result.violations.append(f"other ends than by cancel: {dict(result.outcomes)}")
    for what in ("tasks", "files"):
        if getattr(result.after, what) > getattr(result.before, what):
            result.violations.append(f"{what} are left")
    if result.places != PLACES:
        result.violations.append(f"{result.places} places of {PLACES} are left")
    return result


async def _cancel(
    talkers: list[Talker],
    calls: int,
    result: Result,
    randomness: random.Random,
    progress: Callable[[str], None],
) -> None:
    numbers = iter(range(calls))

    async def each(talker: Talker) -> None:
        for number in numbers:
            asked = talker.say({"type": "user_message", "content": "go on"})
            turn_id = (await talker.answer(asked, ANSWER_SECONDS))["turn_id"]
            if delay := randomness.choice(DELAYS):
                await asyncio.sleep(delay)
            talker.say({"type": "cancel", "turn_id": turn_id})
            result.outcomes[await talker.end_of(turn_id, ANSWER_SECONDS)] += 1
            talker.answers.clear()
            talker.acked.clear()
            talker.outcomes.clear()
            result.calls += 1
            if number and number % 10_000 == 0:
                progress(f"{number} calls")

    await asyncio.gather(*map(each, talkers))


async def _at_rest(node: Node) -> Figures:
    await asyncio.sleep(REST_SECONDS)
    files = len(os.listdir(f"/proc/{node.pid}/fd"))
    return Figures(await node.tasks(), files, resident_kilobytes(node.pid) / 1024)


async def _places(talkers: list[Talker]) -> int:
    """How many calls stream at a time, of more than there are places for."""
    before = [talker.last_seq for talker in talkers]
    turns = []
    for talker in talkers:
        asked = talker.say({"type": "user_message", "content": "always"})
        turns.append((await talker.answer(asked, ANSWER_SECONDS))["turn_id"])
    await asyncio.sleep(REST_SECONDS)
    # turn_started is one event; who has a place has tokens, too.
    running = sum(talker.last_seq > seq + 1 for talker, seq in zip(talkers, before, strict=True))
    for talker, turn_id in zip(talkers, turns, strict=True):
        talker.say({"type": "cancel", "turn_id": turn_id})
    return running


def describe(result: Result) -> str:
    """The figures."""
    before, after = result.before, result.after
    lines = [
        f"calls          {result.calls} cancelled in {result.seconds:.0f} s; {result.posts} had been sent",
        f"tasks          {before.tasks} before, {after.tasks} after",
        f"open files     {before.files} before, {after.files} after",
        f"connections    {result.open_at_runtime} still open at the runtime",
        f"places         {result.places} of {PLACES} can be used",
        f"memory         {before.megabytes:.1f} MB before, {after.megabytes:.1f} MB after",
        f"violations     {len(result.violations)}",
        *(f"  {violation}" for violation in result.violations[:20]),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run as the command line says; 1 when something is left."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cancelled_calls", description=__doc__)
    parser.add_argument("--calls", type=int, default=defaults.calls, help="(%(default)s)")
    parser.add_argument("--sessions", type=int, default=defaults.sessions, help="(%(default)s)")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    result = asyncio.run(run(Options(arguments.calls, arguments.sessions), say))
    sys.stdout.write(describe(result) + "\n")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.faults.stop_under_load``: SIGTERM to a gateway that holds thousands of sockets.

Most of them say nothing; some say message after message until their socket is closed. Every socket must be
closed with 1012, in time; then the gateway is started again on the same store, and must know every message
that it had acknowledged, and the turn it became.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from attrs import Factory, define, frozen

from gateway.bench.emitter import EmitterConnection, Plan
from tests.faults.node_process import LOAD_SETTINGS, Node, allow_descriptors, errors_in
from tests.faults.talker import Talker
from tests.redis_server import RedisServer

TARGET_SECONDS = 10.0
CONNECTING_AT_ONCE = 100
SAY_SECONDS = 0.2
"""Between two messages of one session."""
TALK_SECONDS = 2.0
"""Before SIGTERM."""
ANSWER_SECONDS = 30.0
RESTARTING = 1012


@frozen
class Options:
    """What a run is to do."""

    sockets: int = 5000
    talking: int = 200
    """Of them."""
    redis: bool = False
    """Keep sessions in Redis in place of a file."""


@define
class Result:
    """What came of a run; times in seconds since SIGTERM."""

    codes: Counter[int] = Factory(Counter)
    closed: list[float] = Factory(list)
    ended: float = 0.0
    exit_code: int | None = None
    said: int = 0
    acked: int = 0
    violations: list[str] = Factory(list)


async def run(options: Options, progress: Callable[[str], None]) -> Result:
    """Do it."""
    allow_descriptors(options.sockets + 500)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(EmitterConnection, "127.0.0.1", 0, backlog=4096)
    with tempfile.TemporaryDirectory(prefix="stop-under-load-") as folder:
        redis = RedisServer(Path(folder), "--appendonly", "yes") if options.redis else None
        if redis is not None:
            redis.start()
        settings = {
            **LOAD_SETTINGS,
            "LOG_LEVEL": "WARNING",
            "STORE_URL": redis.url if redis is not None else f"sqlite:///{folder}/gateway.sqlite3",
            "AGENT_URL": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        }
        log = Path(folder) / "gateway.log"
        log.write_bytes(b"")
        nodes: list[Node] = []
        try:
            nodes.append(await Node.start(settings, log))
            result, talking = await _stop(options, nodes[0], progress)
            nodes.append(await Node.start(settings, log))
            await _ask_again(talking, nodes[1], result)
            result.violations += errors_in(log)
            return result
        finally:
            for node in nodes:
                await node.kill()
            server.close()
            if redis is not None:
                redis.kill()


async def _stop(options: Options, node: Node, progress: Callable[[str], None]) -> tuple[Result, list[Talker]]:
    loop, result = asyncio.get_running_loop(), Result()
    talkers = [Talker(f"stopped-{number}") for number in range(options.sockets)]
    for start in range(0, len(talkers), CONNECTING_AT_ONCE):
        some = talkers[start : start + CONNECTING_AT_ONCE]
        await asyncio.gather(*(talker.connect(node.port, ANSWER_SECONDS) for talker in some))
    progress(f"{len(talkers)} sockets are open")
    talking = [asyncio.create_task(_talk(talker)) for talker in talkers[: options.talking]]
    await asyncio.sleep(TALK_SECONDS)
    stopped = loop.time()

    async def wait_closed(talker: Talker) -> None:
        assert talker.socket is not None
        code = await talker.socket.closed
        result.closed.append(loop.time() - stopped)
        result.codes[code] += 1
        talker.socket.abort()  # As clients do once a socket is closed.

    closing = [asyncio.create_task(wait_closed(talker)) for talker in talkers]
    node.terminate()
    result.exit_code = await node.wait_ended()
    result.ended = loop.time() - stopped
    await asyncio.gather(*closing, *talking)
    result.said = sum(talker.said for talker in talkers)
    result.acked = sum(len(talker.acked) for talker in talkers)
    if result.exit_code:
        result.violations.append(f"the gateway ended with {result.exit_code}")
    if result.codes.keys() != {RESTARTING}:
        result.violations.append(f"sockets were closed with {dict(result.codes)}")
    return result, talkers[: options.talking]


async def _talk(talker: Talker) -> None:
    assert talker.socket is not None
    plan = Plan(tokens=5, pace=0.01)
    while not talker.socket.closed.done():
        talker.say({"type": "user_message", "content": str(plan)})
        await asyncio.wait({talker.socket.closed}, timeout=SAY_SECONDS)


async def _ask_again(talkers: list[Talker], node: Node, result: Result) -> None:
    """Every message that was acked is known, under the turn it was given, and every turn comes to an end."""
    for talker in talkers:
        acked = dict(talker.acked)
        await talker.connect(node.port, ANSWER_SECONDS)
        for message_id, turn_id in acked.items():
            talker.say({"type": "user_message", "content": "again", "id": message_id})
            answer = await talker.answer(message_id, ANSWER_SECONDS)
            if answer.get("status") != "duplicate" or answer.get("turn_id") != turn_id:
                result.violations.append(f"{message_id}: acked as {turn_id}, then {answer}")
            if turn_id is not None:
                try:
                    await talker.end_of(turn_id, ANSWER_SECONDS)
                except TimeoutError:
                    result.violations.append(f"{message_id}: its turn never ends")
        result.violations += [f"{talker.session_id}: {problem}" for problem in talker.violations]


def describe(result: Result) -> str:
    """The figures."""
    closed = sorted(result.closed)
    codes = ", ".join(f"{number} with {code}" for code, number in result.codes.items())
    lines = [
        f"sockets        {len(closed)} closed: {codes}",
        f"closed after   {closed[0]:.2f} s the first, {closed[-1]:.2f} s the last",
        f"ended          {result.ended:.2f} s after SIGTERM, with {result.exit_code}",
        f"messages       {result.said} said, {result.acked} acked; each of these is known after the restart",
        f"violations     {len(result.violations)}",
        *(f"  {violation}" for violation in result.violations[:20]),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run as the command line says; 1 when a promise was broken, or it took too long."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.stop_under_load", description=__doc__)
    parser.add_argument("--sockets", type=int, default=defaults.sockets, help="(%(default)s)")
    parser.add_argument("--talking", type=int, default=defaults.talking, help="of them (%(default)s)")
    parser.add_argument("--redis", action="store_true", help="keep sessions in Redis")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    result = asyncio.run(run(Options(arguments.sockets, arguments.talking, arguments.redis), say))
    sys.stdout.write(describe(result) + "\n")
    return int(bool(result.violations) or max(result.closed) > TARGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

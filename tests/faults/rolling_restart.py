"""``python -m tests.faults.rolling_restart``: replace both of two nodes while answers stream through them.

Two real gateways share a real Redis. Each client has one session and one answer that goes on and on; half of
them begin on each node. Then SIGTERM to the first node with the start of its replacement at the same moment
(which is the worst one, for it competes for the CPU), the same with the second once the replacement is ready,
and at last all answers end. Printed: what was lost, repeated, out of order or failed, which must be nothing,
and how long each stream stood still at most.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import Factory, define, frozen

from tests.faults.node_process import LOAD_SETTINGS, Node, allow_descriptors, lines_of
from tests.faults.paced_runtime import PacedRuntime
from tests.faults.stream_listener import StreamListener
from tests.redis_server import RedisServer

ANSWER_SECONDS = 60.0
CONNECTING_AT_ONCE = 50
TARGET_SECONDS = 1.0
LEASE_SECONDS = 4.0
"""GATEWAY__NODE_LEASE as it is by default."""
OF_A_HANG = ("session_lost_its_store", "store_refused_commits", "store_unavailable", "store_failing")
"""Errors that a node is to log when it wakes up after others took over."""


@frozen
class Options:
    """What a run is to do; times in seconds."""

    streams: int = 200
    pace: float = 0.05
    """From token to token of each stream."""
    settle: float = 2.0
    """Before the first restart, between them, and after the last."""
    replace_after: float = 0.0
    """From SIGTERM until the replacement is started."""
    hangs: bool = False
    """Whether first a node is stopped in its tracks until the other has its sessions, and then wakes up."""
    seed: int = 1
    log: Path | None = None
    """Where the gateways' log goes."""


@define
class Result:
    """What came of a run."""

    streams: int
    tokens: int = 0
    turns: Counter[str] = Factory(Counter)
    pauses: list[float] = Factory(list)
    """Of each stream, seconds, shortest first."""
    restarts: list[str] = Factory(list)
    hang_pauses: list[float] = Factory(list)
    fenced: int = 0
    """How often the node that woke up had to let go of a session, for Redis refused what it wrote."""
    joins: int = 0
    refused: int = 0
    resumed_posts: int = 0
    violations: list[str] = Factory(list)
    others_cores: float = 0.0
    """CPU that processes used meanwhile that are not of this run."""

    @property
    def p99(self) -> float:
        """Of the pauses; a value that was measured."""
        return percentile(self.pauses, 0.99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """A value that was measured; they are given in order."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


async def run(options: Options, progress: Callable[[str], None]) -> Result:
    """Do it. Raises ``NodeFailed``."""
    allow_descriptors(options.streams * 4 + 200)
    began, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    result = await _run_on_redis(options, progress)
    # Redis and the gateways have ended by now, so their time is counted as that of children.
    used = _busy_seconds() - busy - (_own_seconds() - own)
    result.others_cores = max(0.0, used / (time.monotonic() - began))
    return result


def _busy_seconds() -> float:
    """CPU time of the whole machine so far; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(field) for field in stat.read_text("ascii").split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


async def _run_on_redis(options: Options, progress: Callable[[str], None]) -> Result:
    with tempfile.TemporaryDirectory(prefix="rolling-restart-") as folder:
        redis = RedisServer(Path(folder), "--appendonly", "yes")
        redis.start()
        runtime = PacedRuntime(options.pace)
        await runtime.start()
        try:
            log = options.log.resolve() if options.log is not None else Path(folder) / "gateway.log"
            log.write_bytes(b"")
            settings = {
                **LOAD_SETTINGS,
                "STORE_URL": redis.url,
                "AGENT_URL": f"http://127.0.0.1:{runtime.port}",
            }
            return await _Run(options, runtime, settings, log, progress).run()
        finally:
            runtime.close()
            redis.kill()


class _Run:
    """One run and what it holds."""

    def __init__(
        self,
        options: Options,
        runtime: PacedRuntime,
        settings: dict[str, str],
        log: Path,
        progress: Callable[[str], None],
    ) -> None:
        self._options = options
        self._runtime = runtime
        self._settings = settings
        self._log = log
        self._progress = progress
        self._nodes: list[Node] = []
        """Those that a client may try, as a balancer's list of backends."""
        self._started: list[Node] = []
        self._result = Result(options.streams)

    async def run(self) -> Result:
        """From the first start to the last end."""
        options = self._options
        try:
            for _ in range(2):
                self._nodes.append(await self._start())
            listeners = [
                StreamListener(
                    f"stream-{number}",
                    lambda: [node.port for node in self._nodes],
                    pace=options.pace,
                    seed=options.seed,
                    first=number,
                )
                for number in range(options.streams)
            ]
            await self._listen(listeners)
        finally:
            for node in self._started:
                await node.kill()
        self._judge(listeners)
        return self._result

    async def _start(self) -> Node:
        node = await Node.start(self._settings, self._log)
        self._progress(f"a gateway listens on {node.port}, process {node.pid}")
        self._started.append(node)
        return node

    async def _listen(self, listeners: Sequence[StreamListener]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for start in range(0, len(listeners), CONNECTING_AT_ONCE):
                some = listeners[start : start + CONNECTING_AT_ONCE]
                for listener in some:
                    tasks.create_task(listener.run())
                async with asyncio.timeout(ANSWER_SECONDS):
                    await asyncio.gather(*(listener.had_token.wait() for listener in some))
            self._progress(f"{len(listeners)} answers stream")
            await asyncio.sleep(self._options.settle)
            for listener in listeners:
                listener.longest_gap = 0.0  # What it took to begin is not asked for.
            if self._options.hangs:
                await self._hang(self._nodes[0], listeners)
            for old in list(self._nodes):
                await self._replace(old)
                await asyncio.sleep(self._options.settle)
            self._runtime.is_stopping = True
            async with asyncio.timeout(ANSWER_SECONDS):
                await asyncio.gather(*(listener.ended.wait() for listener in listeners))
        for node in self._nodes:
            node.terminate()
            await self._check_end(node)

    async def _hang(self, node: Node, listeners: Sequence[StreamListener]) -> None:
        """SIGSTOP; SIGCONT when every stream is served by the other node."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        node.send(signal.SIGSTOP)
        await asyncio.sleep(LEASE_SECONDS)
        async with asyncio.timeout(ANSWER_SECONDS):
            while not all(listener.is_served(loop.time()) for listener in listeners):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # Nobody could set an event: that they are all served is a state.
        self._progress(f"hung for {loop.time() - began:.1f} s; every stream goes on elsewhere")
        node.send(signal.SIGCONT)
        await asyncio.sleep(self._options.settle)
        self._result.hang_pauses = sorted(listener.pause for listener in listeners)
        for listener in listeners:
            listener.longest_gap = 0.0

    async def _replace(self, old: Node) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        old.terminate()

        async def end() -> float:
            await self._check_end(old)
            return loop.time() - began

        ending = asyncio.create_task(end())
        await asyncio.sleep(self._options.replace_after)
        new = await self._start()
        ready = loop.time() - began
        self._nodes[self._nodes.index(old)] = new
        ended = await ending
        self._result.restarts.append(f"drained in {ended:.2f} s, its replacement ready after {ready:.2f} s")
        self._progress(self._result.restarts[-1])

    async def _check_end(self, node: Node) -> None:
        code = await node.wait_ended()
        if code:
            self._result.violations.append(f"a gateway ended with {code} after SIGTERM")

    def _judge(self, listeners: Sequence[StreamListener]) -> None:
        result, options = self._result, self._options
        by_session = {answer.session_id: answer for answer in self._runtime.answers.values()}
        if len(by_session) != len(self._runtime.answers):
            result.violations.append("a message was sent to the runtime twice")
        for listener in listeners:
            answer = by_session[listener.session_id]
            said = answer.told + 1
            problems = list(listener.violations)
            if listener.tokens != said:
                problems.append(f"{listener.tokens} tokens came of {said}")
            if answer.fresh_posts != 1:
                problems.append(f"{answer.fresh_posts} POSTs began from the first token")
            result.violations += [f"{listener.session_id}: {problem}" for problem in problems]
            result.tokens += listener.tokens
            result.turns.update(listener.outcomes or ["none"])
            result.joins += listener.joins
            result.refused += listener.refused
            result.resumed_posts += answer.posts - 1
        result.pauses = sorted(listener.pause for listener in listeners)
        for line in lines_of(self._log):
            if options.hangs and any(f'"event": "{event}"' in line for event in OF_A_HANG):
                result.fenced += "session_lost_its_store" in line
            elif re.search(r'"level": ?"error"', line):
                result.violations.append(f"gateway's log: {line[:500]}")


def describe(result: Result) -> str:
    """The figures."""
    failed = result.turns.total() - result.turns["completed"]
    lines = [
        f"streams        {result.streams}, {result.tokens} tokens",
        *(f"restart        {line}" for line in result.restarts),
        f"turns failed   {failed} ({', '.join(f'{what} {n}' for what, n in result.turns.most_common())})",
        f"sockets        {result.joins} joined, {result.refused} tries in vain; "
        f"{result.resumed_posts} answers taken up again",
        f"pause          {_in_milliseconds(result.pauses)}",
        f"other load     {result.others_cores:.2f} cores, by what else ran on this machine",
        f"violations     {len(result.violations)} (lost, repeated, out of order, failed)",
        *(f"  {violation}" for violation in result.violations[:20]),
    ]
    if result.hang_pauses:
        pauses = _in_milliseconds(result.hang_pauses)
        lines.insert(1, f"hang           {pauses}; who woke up was refused {result.fenced} times")
    return "\n".join(lines)


def _in_milliseconds(ordered: Sequence[float]) -> str:
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return ", ".join(f"{name} {percentile(ordered, share) * 1000:.0f} ms" for name, share in shares)


def main() -> int:
    """Run as the command line says; 1 when a promise was broken, or the pause is over the bar."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.rolling_restart", description=__doc__)
    parser.add_argument("--streams", type=int, default=defaults.streams, help="(%(default)s)")
    parser.add_argument(
        "--pace", type=float, default=defaults.pace, help="seconds from token to token (%(default)s)"
    )
    parser.add_argument(
        "--replace-after",
        type=float,
        default=defaults.replace_after,
        help="seconds from SIGTERM to the start of the replacement (%(default)s)",
    )
    parser.add_argument(
        "--hang",
        action="store_true",
        help="first have a node hang until the other has its sessions, and wake up again",
    )
    parser.add_argument("--rounds", type=int, default=1, help="whole runs, one after the other (%(default)s)")
    parser.add_argument("--log", type=Path, help="where the gateways' log goes")
    arguments = parser.parse_args()
    options = Options(
        streams=arguments.streams,
        pace=arguments.pace,
        replace_after=arguments.replace_after,
        hangs=arguments.hang,
        log=arguments.log,
    )

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    is_met = True
    for number in range(arguments.rounds):
        began = time.monotonic()
        result = asyncio.run(run(options, say))
        is_met &= not result.violations and result.p99 <= TARGET_SECONDS
        text = f"round {number + 1}, {time.monotonic() - began:.0f} s\n{describe(result)}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

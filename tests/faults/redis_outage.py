"""``python -m tests.faults.redis_outage``: Redis goes away for half a minute under two gateways, and returns.

Sessions say message after message all the time, each again under its id until it is acknowledged; others
listen to answers that go on and on; new sockets and readiness are asked for twice a second. Judged are how
soon each of these is answered while Redis is away, and how soon all goes on when it is back; then that every
message that was acknowledged is known, and that no answer lost or repeated anything.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrs import Factory, define, frozen

from gateway.bench.socket_client import upgrade_request
from tests.faults.node_process import LOAD_SETTINGS, Node
from tests.faults.paced_runtime import SHORT, PacedRuntime
from tests.faults.run import KEEPS_WHAT_IT_ANSWERED
from tests.faults.stream_listener import StreamListener
from tests.faults.talker import NotLetIn, Talker
from tests.redis_server import RedisServer

ANSWER_TARGET = 1.0
RECOVERY_TARGET = 2.0
SLACK = 0.25
"""Seconds that scheduling of all these processes may add to what is seen."""
PACE = 0.1
SAY_SECONDS = 0.25
PROBE_SECONDS = 0.5
SETTLE_SECONDS = 3.0
HANG_SECONDS = 20.0
"""What is not answered by then hangs."""


@frozen
class Options:
    """What a run is to do."""

    seconds: float = 30.0
    hangs: bool = False
    """Whether Redis is stopped in its tracks; else it is killed, and started again from its log."""
    talkers: int = 20
    streams: int = 20


@define
class Result:
    """What came of a run; times in seconds."""

    answers: Counter[str] = Factory(Counter)
    """To messages that were said while Redis was away."""
    slowest_answer: float = 0.0
    probes: Counter[str] = Factory(Counter)
    slowest_probe: float = 0.0
    recovered: list[float] = Factory(list)
    """From Redis' return until a session's message was acked, or its answer went on."""
    acked: int = 0
    tokens: int = 0
    violations: list[str] = Factory(list)


async def run(options: Options, progress: Callable[[str], None]) -> Result:
    """Do it."""
    runtime = PacedRuntime(PACE)
    await runtime.start()
    with tempfile.TemporaryDirectory(prefix="redis-outage-") as folder:
        redis = RedisServer(Path(folder), *KEEPS_WHAT_IT_ANSWERED)
        redis.start()
        log = Path(folder) / "gateway.log"
        log.write_bytes(b"")
        settings = {
            **LOAD_SETTINGS,
            "LOG_LEVEL": "ERROR",
            "STORE_URL": redis.url,
            "AGENT_URL": f"http://127.0.0.1:{runtime.port}",
        }
        nodes: list[Node] = []
        try:
            nodes.append(await Node.start(settings, log))
            nodes.append(await Node.start(settings, log))
            return await _Run(options, runtime, redis, nodes, progress).run()
        finally:
            for node in nodes:
                await node.kill()
            redis.kill()
            runtime.close()


class _Run:
    """One run and what it holds."""

    def __init__(
        self,
        options: Options,
        runtime: PacedRuntime,
        redis: RedisServer,
        nodes: list[Node],
        progress: Callable[[str], None],
    ) -> None:
        self._options = options
        self._runtime = runtime
        self._redis = redis
        self._nodes = nodes
        self._progress = progress
        self._result = Result()
        self._is_away = False
        self._back_at: float | None = None
        self._is_over = False
        self._probed = 0

    async def run(self) -> Result:
        """From before the outage until all goes on."""
        options, loop = self._options, asyncio.get_running_loop()
        ports = [node.port for node in self._nodes]
        talkers = [Talker(f"talks-{number}") for number in range(options.talkers)]
        listeners = [
            StreamListener(
                f"listens-{number}",
                lambda: ports,
                pace=PACE,
                seed=1,
                first=number,
                silence=2 * options.seconds,
            )
            for number in range(options.streams)
        ]
        async with asyncio.TaskGroup() as tasks:
            for listener in listeners:
                tasks.create_task(listener.run())
            for number, talker in enumerate(talkers):
                tasks.create_task(self._talk(talker, ports[number % len(ports)]))
            for port in ports:
                tasks.create_task(self._probe(port))
            await asyncio.gather(*(listener.had_token.wait() for listener in listeners))
            await asyncio.sleep(SETTLE_SECONDS)
            if options.hangs:
                self._redis.signal(signal.SIGSTOP)
            else:
                self._redis.kill()
            self._is_away = True
            self._progress("Redis is away")
            await asyncio.sleep(options.seconds)
            if options.hangs:
                self._redis.signal(signal.SIGCONT)
            else:
                self._redis.start()
            self._is_away, self._back_at = False, loop.time()
            self._progress("Redis is back")
            back = [tasks.create_task(self._wait_token(listener)) for listener in listeners]
            await asyncio.gather(*back)
            await asyncio.sleep(SETTLE_SECONDS)
            self._is_over = self._runtime.is_stopping = True
            async with asyncio.timeout(HANG_SECONDS):
                await asyncio.gather(*(listener.ended.wait() for listener in listeners))
        await self._judge(talkers, listeners)
        return self._result

    async def _wait_token(self, listener: StreamListener) -> None:
        assert self._back_at is not None
        listener.had_token.clear()
        try:
            async with asyncio.timeout(HANG_SECONDS):
                await listener.had_token.wait()
        except TimeoutError:
            self._result.violations.append(f"{listener.session_id}: its answer did not go on")
        self._result.recovered.append(asyncio.get_running_loop().time() - self._back_at)

    async def _talk(self, talker: Talker, port: int) -> None:
        """Message after message, each until it is acked; a socket that is closed is opened again."""
        loop, is_back = asyncio.get_running_loop(), False
        while not self._is_over:
            message_id, answer = talker.new_id(), ""
            while answer != "ack" and not self._is_over:
                if talker.socket is None or talker.socket.closed.done():
                    with suppress(NotLetIn, OSError):
                        await talker.connect(port, HANG_SECONDS)
                else:
                    began, was_away = loop.time(), self._is_away
                    talker.say({"type": "user_message", "content": SHORT, "id": message_id})
                    answer = await self._answer(talker, message_id)
                    if was_away and self._is_away:
                        self._result.answers[answer] += 1
                        self._result.slowest_answer = max(self._result.slowest_answer, loop.time() - began)
                await asyncio.sleep(SAY_SECONDS)
            if self._back_at is not None and not is_back:
                is_back = True
                self._result.recovered.append(loop.time() - SAY_SECONDS - self._back_at)

    async def _answer(self, talker: Talker, message_id: str) -> str:
        try:
            answer = await talker.answer(message_id, HANG_SECONDS)
        except TimeoutError:
            assert talker.socket is not None
            if talker.socket.closed.done():
                return "socket closed"
            self._result.violations.append(f"{message_id}: never answered")
            return "nothing"
        return str(answer.get("code", answer["type"]))

    async def _probe(self, port: int) -> None:
        """A new session's socket, and readiness, again and again."""
        loop = asyncio.get_running_loop()
        while not self._is_over:
            self._probed += 1
            host = f"127.0.0.1:{port}"
            upgrade = upgrade_request(host, f"/api/v1/ws/new-{port}-{self._probed}", "v2-json", [])
            ready = f"GET /health?ready=1 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            for what, request in (("upgrade", upgrade), ("readiness", ready)):
                began, was_away = loop.time(), self._is_away
                status = await _status(port, request)
                if was_away and self._is_away:
                    self._result.probes[f"{what} {status}"] += 1
                    self._result.slowest_probe = max(self._result.slowest_probe, loop.time() - began)
            await asyncio.sleep(PROBE_SECONDS)

    async def _judge(self, talkers: list[Talker], listeners: list[StreamListener]) -> None:
        result = self._result
        for talker in talkers:
            result.acked += len(talker.acked)
            result.violations += [f"{talker.session_id}: {problem}" for problem in talker.violations]
            for message_id in talker.acked:
                talker.say({"type": "user_message", "content": SHORT, "id": message_id})
                answer = await talker.answer(message_id, HANG_SECONDS)
                if answer.get("status") != "duplicate":
                    result.violations.append(f"{message_id} was acked, and then {answer}")
        by_session = {answer.session_id: answer for answer in self._runtime.answers.values()}
        for listener in listeners:
            said = by_session[listener.session_id].told + 1
            result.tokens += listener.tokens
            problems = list(listener.violations)
            if listener.tokens != said:
                problems.append(f"{listener.tokens} tokens came of {said}")
            if listener.outcomes != ["completed"]:
                problems.append(f"its turn ended {listener.outcomes}")
            result.violations += [f"{listener.session_id}: {problem}" for problem in problems]


async def _status(port: int, request: bytes) -> str:
    """What an HTTP request is answered with."""
    try:
        async with asyncio.timeout(HANG_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                line = await reader.readline()
            finally:
                writer.transport.abort()
    except TimeoutError:
        return "nothing"
    except OSError:
        return "no connection"
    return line.split(b" ")[1].decode() if b" " in line else "nothing"


def describe(result: Result) -> str:
    """The figures."""
    recovered = sorted(result.recovered)
    lines = [
        f"messages       {_counts(result.answers)}, the slowest after {result.slowest_answer:.2f} s",
        f"others         {_counts(result.probes)}, the slowest after {result.slowest_probe:.2f} s",
        f"recovered      {recovered[0]:.2f} s after its return the first, {recovered[-1]:.2f} s the last",
        f"acked          {result.acked} messages; each of these is known at the end",
        f"streams        {result.tokens} tokens",
        f"violations     {len(result.violations)}",
        *(f"  {violation}" for violation in result.violations[:20]),
    ]
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.most_common()) or "none"


def main() -> int:
    """Run as the command line says; 1 when a promise was broken, or it took too long."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.redis_outage", description=__doc__)
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="(%(default)s)")
    parser.add_argument("--hang", action="store_true", help="stop Redis in its tracks in place of killing it")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    result = asyncio.run(run(Options(arguments.seconds, arguments.hang), say))
    sys.stdout.write(describe(result) + "\n")
    is_late = (
        max(result.slowest_answer, result.slowest_probe) > ANSWER_TARGET + SLACK
        or max(result.recovered) > RECOVERY_TARGET + SLACK
    )
    return int(bool(result.violations) or is_late)


if __name__ == "__main__":
    sys.exit(main())

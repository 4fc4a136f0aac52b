"""``python -m tests.bench.redis_cost``: a token's cost on Redis beside SQLite, and what a second node brings.

The same loads as ``gateway bench``, on a gateway with each store in turn, round by round; then one and two
nodes on one Redis as fast as they go. Everything (gateways, Redis, emitter, load) runs on this one machine
and competes for its cores, which the throughput of two nodes says more about than about the nodes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from attrs import evolve, frozen

from gateway.bench.load import Measurement
from gateway.bench.percentiles import median
from gateway.bench.process_figures import check_platform, cpu_seconds
from gateway.bench.runner import Runner
from gateway.bench.scenarios import BURST, PACED, WARM_UP, Step
from gateway.bench.subjects import (
    Launch,
    Running,
    Subject,
    gateway_command,
    gateway_launch,
    running_emitter,
    running_launch,
)
from tests.redis_server import RedisServer

RATIO_TARGET = 1.5
STOP_SECONDS = 30.0


@frozen
class Round:
    """One load, measured."""

    measured: Measurement
    redis_us_per_token: float


@contextmanager
def on_redis(redis: RedisServer, agent_url: str) -> Iterator[Running]:
    """A gateway that keeps its sessions there."""
    with tempfile.TemporaryDirectory(prefix="redis-cost-") as folder:
        command, environment = gateway_command("sqlite", agent_url, Path(folder))
        environment |= {"GATEWAY__STORE_URL": redis.url}
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Listening on "), "the gateway did not start; what it said is above"
            parts = urlsplit(line.removeprefix("Listening on ").strip())
            assert parts.port is not None
            yield Running("127.0.0.1", parts.port, process.pid)
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)
            if process.stdout is not None:
                process.stdout.close()


def measure(rounds: int) -> tuple[dict[tuple[str, str], list[Round]], dict[int, list[float]]]:
    """Rounds by step and store; tokens per second by the number of nodes."""
    runner, figures = Runner(_say), dict[tuple[str, str], list[Round]]()
    throughput: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redis-cost-")))
        redis = RedisServer(folder, "--appendonly", "yes")
        redis.start()
        stack.callback(redis.kill)
        agent_url = stack.enter_context(running_emitter())
        running = {
            "SQLite": stack.enter_context(gateway_launch("sqlite", agent_url).start()),
            "Redis": stack.enter_context(on_redis(redis, agent_url)),
            "Redis, second node": stack.enter_context(on_redis(redis, agent_url)),
        }
        subjects = {name: _subject(name, one) for name, one in running.items()}
        for name, one in running.items():
            runner.load(WARM_UP, subjects[name], one)
        for step in (PACED, BURST):
            for number in range(rounds):
                for name in ("SQLite", "Redis"):
                    _say(f"{step.title} · {name} · {number + 1}/{rounds}")
                    before = cpu_seconds(redis.pid)
                    measured = runner.load(step, subjects[name], running[name])
                    used = (cpu_seconds(redis.pid) - before) / measured.tokens * 1e6
                    figures.setdefault((step.scenario, name), []).append(Round(measured, used))
        both = [(subjects[name], running[name]) for name in ("Redis", "Redis, second node")]
        for number in range(rounds):
            for nodes in (1, 2):
                _say(f"as fast as it goes · {nodes} of the nodes · {number + 1}/{rounds}")
                throughput[nodes].append(_throughput(runner, both[:nodes]))
    return figures, throughput


def _subject(name: str, running: Running) -> Subject:
    url = f"http://{running.host}:{running.port}"
    launch: Launch = running_launch(name, url, running.pid)
    return Subject(name, launch, path=f"/api/v1/ws/{running.port}-%d")


def _throughput(runner: Runner, nodes: Sequence[tuple[Subject, Running]]) -> float:
    """Tokens per second of all nodes together, each with its share of the sessions and a load of its own."""
    step: Step = evolve(BURST, sessions=BURST.sessions // len(nodes))
    with ThreadPoolExecutor(len(nodes)) as threads:
        loads = [threads.submit(runner.load, step, subject, running) for subject, running in nodes]
        measured = [load.result() for load in loads]
    return sum(one.tokens for one in measured) / max(one.wall_s for one in measured)


def describe(
    figures: dict[tuple[str, str], list[Round]], throughput: dict[int, list[float]]
) -> tuple[str, bool]:
    """The table, and whether the ratios are within the bar."""
    lines = [
        "| CPU of the gateway per token, µs | SQLite | Redis | ratio | Redis' own |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    is_met = True
    for step in (PACED, BURST):
        values = {
            name: median([one.measured.cpu_us_per_token or 0.0 for one in figures[step.scenario, name]])
            for name in ("SQLite", "Redis")
        }
        own = median([one.redis_us_per_token for one in figures[step.scenario, "Redis"]])
        ratio = values["Redis"] / values["SQLite"]
        is_met &= ratio <= RATIO_TARGET
        lines.append(
            f"| {step.title} | {values['SQLite']:.1f} | {values['Redis']:.1f} | {ratio:.2f} | {own:.1f} |"
        )
    one, two = median(throughput[1]), median(throughput[2])
    lines += [
        "",
        f"Tokens per second as fast as it goes, {os.cpu_count()} cores for gateways, Redis, emitter and load "
        f"together: {one:,.0f} with one node, {two:,.0f} with two ({two / one:.2f} times).",
    ]
    return "\n".join(lines), is_met


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> int:
    """Measure, and say what came out; 1 when Redis costs more than 1.5 times what SQLite does."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.redis_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    arguments = parser.parse_args()
    check_platform()
    text, is_met = describe(*measure(arguments.rounds))
    sys.stdout.write(text + "\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

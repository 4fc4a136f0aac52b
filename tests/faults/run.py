"""One run: processes, proxies, conversations and chaos put together, and what came of it."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import attrs
import trio
from attrs import Factory, define, frozen

from tests.faults.agent_runtime import AgentRuntime
from tests.faults.chaos import Chaos
from tests.faults.checker import check_session
from tests.faults.client import World
from tests.faults.conversation import DETACH_GRACE, Conversation
from tests.faults.cutting_proxy import CuttingProxy
from tests.faults.gateway_process import gateway_process
from tests.faults.records import SessionRecord
from tests.faults.violations import Violation
from tests.redis_server import RedisServer

SETTINGS = {
    "LOG_LEVEL": "WARNING",
    "DETACH_GRACE": str(DETACH_GRACE),
    "DRAIN_TIMEOUT": "2",
    "RATE_UPGRADES_PER_MINUTE": "0",
    "RATE_MESSAGES_PER_MINUTE": "0",
}

KEEPS_WHAT_IT_ANSWERED = ("--appendonly", "yes", "--appendfsync", "no")
"""For a Redis that is killed: with ``everysec`` it answers up to two seconds before it writes while the disk
is slow (``flushAppendOnlyFile``), and what it had not written is lost with the process."""

OF_REDIS = ("store_failing", "store_unavailable", "store_refused_commits", "session_lost_its_store")
"""Errors that a gateway is to log when Redis is away, or when it was paused until others took over."""


@frozen
class Options:
    """What a run is to do."""

    seed: int = 1
    kills: int = 200
    cuts: int = 2000
    slots: int = 8
    """Sessions at a time."""
    mean_uptime: float = 0.15
    cold: bool = False
    """Execute each gateway anew instead of forking it from a process that has its imports."""
    nodes: int = 1
    """Gateways at a time; each connection goes to any of them."""
    redis: bool = False
    """Keep sessions in Redis, as several nodes have to, in place of a file."""
    keep: Path | None = None
    """Where the store, the log and the records of sessions with violations are left."""


@define
class Result:
    """What came of a run."""

    seed: int
    seconds: float = 0.0
    kills: int = 0
    stops: int = 0
    pauses: int = 0
    redis_kills: int = 0
    redis_cuts: int = 0
    """Connections between gateways and Redis that were cut."""
    killed_at: dict[str, int] = Factory(dict)
    cuts: int = 0
    upstream_cuts: int = 0
    connections: int = 0
    starts: int = 0
    start_seconds: float = 0.0
    """The median, from the order to start to listening."""
    sessions: int = 0
    messages: int = 0
    repeats: int = 0
    """Messages that were sent again, answered ``duplicate``."""
    posts: int = 0
    events: int = 0
    turns: Counter[str] = Factory(Counter)
    joins: Counter[str] = Factory(Counter)
    refusals: Counter[str] = Factory(Counter)
    exit_code: int | None = None
    violations: list[Violation] = Factory(list)


async def run(options: Options, progress: Callable[[str], None]) -> Result:
    """Do it. Raises ``GatewayFailed`` when the gateway does not start, or ends by itself."""
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        for pattern in ("faults.sqlite3*", "gateway.log", "*.json"):
            for left in options.keep.glob(pattern):
                left.unlink()
        return await _run(options, options.keep, progress)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return await _run(options, Path(folder), progress)


async def _run(options: Options, folder: Path, progress: Callable[[str], None]) -> Result:
    began = trio.current_time()
    randomness = random.Random(options.seed)
    result = Result(options.seed)
    chaos = Chaos(
        random.Random(randomness.random()),
        kills=options.kills,
        cuts=options.cuts,
        mean_uptime=options.mean_uptime,
    )
    runtime = AgentRuntime(random.Random(randomness.random()), chaos.notify)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.serve)
        agents = CuttingProxy([runtime.port], random.Random(randomness.random()), 12_000.0)
        await nursery.start(agents.serve)
        settings = SETTINGS | {
            "AGENT_URL": f"http://127.0.0.1:{agents.port}",
            "STORE_URL": f"sqlite:///{folder / 'faults.sqlite3'}",
        }
        async with AsyncExitStack() as stack:
            if options.redis or options.nodes > 1:
                server = stack.enter_context(_redis(folder))
                link = CuttingProxy([server.port], random.Random(randomness.random()), None)
                await nursery.start(link.serve)
                chaos.redis, chaos.redis_link = server, link
                settings |= {"STORE_URL": f"redis://127.0.0.1:{link.port}", "NODE_LEASE": "0.5"}
            gateways = [
                await stack.enter_async_context(gateway_process(folder, settings, cold=options.cold))
                for _ in range(options.nodes)
            ]
            chaos.gateways = gateways
            ports = [gateway.port for gateway in gateways]
            clients = CuttingProxy(ports, random.Random(randomness.random()), 4000.0)
            direct = CuttingProxy(ports, random.Random(randomness.random()), None)
            await nursery.start(clients.serve)
            await nursery.start(direct.serve)
            for gateway in gateways:
                await gateway.begin()
                await gateway.wait_listening()
                await gateway_ready(gateway.port)
            world = World(clients.port, direct.port, chaos.notify, [])
            over = trio.Event()
            numbers = iter(range(10**9))

            async def slot() -> None:
                while not over.is_set():
                    conversation = Conversation(next(numbers), world, options.seed)
                    violations = await conversation.run()
                    _judge(conversation.record, violations, runtime, result, folder)

            async def report() -> None:
                while True:
                    await trio.sleep(5)
                    progress(
                        f"{trio.current_time() - began:4.0f} s  {chaos.kills} kills  {clients.cuts} cuts  "
                        f"{result.sessions} sessions  {result.turns.total()} turns  "
                        f"{len(result.violations)} violations"
                    )

            async with trio.open_nursery() as talking:
                for _ in range(options.slots):
                    talking.start_soon(slot)
                nursery.start_soon(report)
                await chaos.run(clients, agents)
                over.set()
            for gateway in gateways:
                if gateway.wake.is_set():
                    await gateway.reap()
                    await gateway.begin()
                result.exit_code = await gateway.stop() or result.exit_code or 0
            result.starts = sum(gateway.starts for gateway in gateways)
            took = sorted(seconds for gateway in gateways for seconds in gateway.start_seconds)
            result.start_seconds = took[len(took) // 2]
            log = (folder / "gateway.log").read_text("utf-8", "replace")
        nursery.cancel_scope.cancel()
    result.stops = chaos.stops
    result.pauses, result.redis_kills = chaos.pauses, chaos.redis_kills
    result.redis_cuts = 0 if chaos.redis_link is None else chaos.redis_link.cuts
    result.kills, result.killed_at, result.cuts = chaos.kills, chaos.killed_at, clients.cuts
    result.upstream_cuts, result.connections = agents.cuts, clients.connections
    result.seconds = trio.current_time() - began
    for line in log.splitlines():
        if any(f'"event": "{event}"' in line for event in OF_REDIS):
            continue
        if '"level":"error"' in line or '"level": "error"' in line or line.startswith("Traceback"):
            result.violations.append(Violation("protocol", "-", "gateway's log", line[:2000]))
    for end in world.bad_ends:
        result.violations.append(Violation("protocol", "-", "a client", end))
    if result.exit_code != 0:
        text = f"SIGTERM ended it with {result.exit_code}"
        result.violations.append(Violation("protocol", "-", "gateway", text))
    return result


@contextmanager
def _redis(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder, *KEEPS_WHAT_IT_ANSWERED)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def gateway_ready(port: int) -> None:
    """Connecting works: what listens is really the gateway."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.aclose()


def _judge(
    record: SessionRecord,
    violations: list[Violation],
    runtime: AgentRuntime,
    result: Result,
    folder: Path,
) -> None:
    posts = runtime.posts.get(record.session_id, [])
    found, turns = check_session(record, posts, runtime.executions)
    violations = violations + found
    result.sessions += 1
    result.posts += len(posts)
    result.turns.update(turn.outcome or "none" for turn in turns.values())
    for client in record.clients:
        for sent in client.sent.values():
            result.messages += 1
            result.repeats += any(answer.get("status") == "duplicate" for answer in sent.answers)
            result.refusals.update(answer["code"] for answer in sent.answers if answer["type"] == "nack")
        for entry in client.entries:
            if entry.kind == "got":
                result.events += "seq" in entry.value or not client.is_v2
                if entry.value["type"] == "welcome":
                    result.joins["resumed" if entry.value["resumed"] else "joined"] += 1
                elif entry.value["type"] == "snapshot":
                    result.joins[f"snapshot {entry.value['reason']}"] += 1
    if violations:
        result.violations += violations
        dump = {
            "violations": [violation._asdict() for violation in violations],
            "audit": record.audit,
            "final": record.final,
            "clients": {
                client.name: {
                    "entries": client.entries,
                    "sent": [attrs.asdict(sent) for sent in client.sent.values()],
                }
                for client in record.clients
            },
            "posts": [post._asdict() for post in posts],
            "emitted": {post.execution: runtime.executions[post.execution].events for post in posts},
        }
        path = folder / f"{record.session_id}.json"
        path.write_text(json.dumps(dump, ensure_ascii=False, indent=1), "utf-8")

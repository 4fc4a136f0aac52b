"""How long a client waits after a cut until it has everything that it missed."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import trio
from attrs import frozen

from tests.faults.agent_runtime import AgentRuntime
from tests.faults.client_v2 import SUBPROTOCOLS, decode
from tests.faults.gateway_process import GatewayProcess, gateway_process
from tests.faults.run import SETTINGS, gateway_ready
from tests.faults.websocket import WebSocket


@frozen
class Case:
    """One way to miss events."""

    name: str
    dialect: str
    plan: dict[str, Any]
    kills: bool = False
    """Whether the gateway is killed in between: then the session is read from the store."""


@frozen
class Row:
    """What was measured: milliseconds from the order to connect to the last event missed."""

    case: Case
    rounds: int
    p50: float
    p99: float
    longest: float
    frames: int
    """Of one resume, with the welcome."""


def cases(events: int) -> list[Case]:
    """The cases, each with ``events`` events missed."""
    tokens = {"tokens": events, "unpaced": True}
    return [
        Case("tokens", "json", tokens),
        Case("tokens", "msgpack", tokens),
        Case("events that cannot be merged", "json", {"updates": events, "unpaced": True}),
        Case("tokens, after kill -9 and restart", "json", tokens, kills=True),
    ]


async def measure(rounds: int, events: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure every case. Raises ``GatewayFailed``."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        runtime = AgentRuntime(random.Random(1), lambda _: None)
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.serve)
            settings = SETTINGS | {
                "AGENT_URL": f"http://127.0.0.1:{runtime.port}",
                "STORE_URL": f"sqlite:///{folder / 'resume.sqlite3'}",
            }
            async with gateway_process(folder, settings) as gateway:
                await gateway.begin()
                await gateway.wait_listening()
                await gateway_ready(gateway.port)
                rows = []
                for number, case in enumerate(cases(events)):
                    rows.append(await _measure(gateway, case, number, rounds))
                    progress(describe([rows[-1]]))
                await gateway.stop()
            nursery.cancel_scope.cancel()
        return rows


async def _measure(gateway: GatewayProcess, case: Case, number: int, rounds: int) -> Row:
    durations: list[float] = []
    frames = 0
    for index in range(rounds if not case.kills else max(1, rounds // 10)):
        session_id = f"r-resume-{number}-{index}"
        epoch, last_seq = await _miss(gateway, case, session_id)
        if case.kills:
            gateway.kill()
            await gateway.reap()
            await gateway.begin()
            await gateway.wait_listening()
        started = trio.current_time()
        frames = await _resume(gateway.port, case, session_id, f"?epoch={quote(epoch)}&last_seq=1", last_seq)
        durations.append((trio.current_time() - started) * 1000)
    durations.sort()
    p99 = durations[math.ceil(len(durations) * 0.99) - 1]
    return Row(case, len(durations), durations[len(durations) // 2], p99, durations[-1], frames)


async def _miss(gateway: GatewayProcess, case: Case, session_id: str) -> tuple[str, int]:
    """Have a turn run with another client there; gives its epoch and last seq."""
    path = f"/api/v1/ws/{session_id}"
    watcher = await WebSocket.connect(gateway.port, path, SUBPROTOCOLS["json"])
    try:
        welcome = json.loads(await watcher.receive())
        body = {"type": "user_message", "id": "m", "content": "", "plan": case.plan}
        await watcher.send(json.dumps(body))
        while True:
            for item in decode(await watcher.receive()):
                if item["type"] == "turn_ended":
                    return welcome["epoch"], item["seq"]
    finally:
        watcher.abort()


async def _resume(port: int, case: Case, session_id: str, query: str, last_seq: int) -> int:
    """Resume and read up to ``last_seq``, acknowledging it; gives the number of frames."""
    socket = await WebSocket.connect(port, f"/api/v1/ws/{session_id}{query}", SUBPROTOCOLS[case.dialect])
    frames, seen = 0, 1
    try:
        while seen < last_seq:
            for item in decode(await socket.receive()):
                if item["type"] in ("welcome", "ack"):
                    continue
                assert item.get("first_seq", item["seq"]) == seen + 1, "a gap"
                seen = item["seq"]
            frames += 1
        ack = {"type": "ack", "seq": seen}
        await socket.send(msgspec.msgpack.encode(ack) if case.dialect == "msgpack" else json.dumps(ack))
    finally:
        socket.abort()
    return frames


def describe(rows: list[Row]) -> str:
    """A line for each row."""
    return "\n".join(
        f"{row.case.name}, {row.case.dialect}: p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms, "
        f"longest {row.longest:.1f} ms, {row.frames} frames, {row.rounds} rounds"
        for row in rows
    )

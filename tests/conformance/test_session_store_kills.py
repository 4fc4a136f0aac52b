"""``kill -9`` of a process that commits, at random moments: what was acknowledged is there, and nothing half.

``STORE_KILLS`` sets how many kills, 20 without it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from attrs import evolve

from gateway.adapters.stores.memory import open_memory_store
from gateway.adapters.stores.redis import open_redis_store
from gateway.adapters.stores.redis_location import parse_redis_url
from gateway.adapters.stores.sqlite import open_sqlite_store
from gateway.core.storage import StoredSession
from tests.conformance.session_store import (
    DEDUPE_WINDOW,
    RecordingTelemetry,
    SettableClock,
    after_commits,
    held,
)

KILLS = int(os.environ.get("STORE_KILLS", "20"))
SESSIONS = ("a", "b")


async def commits_before_kill(url: str, sync: str, seconds: float) -> int:
    """Run the process until ``seconds`` after its first commit; return the last number it printed."""
    process = await trio.lowlevel.open_process(
        [
            sys.executable,
            "-m",
            "tests.adapters.stores.commit_until_killed",
            url,
            sync,
            *SESSIONS,
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    printed = b""
    try:
        with trio.fail_after(30):
            while b"\n" not in printed:
                chunk = await process.stdout.receive_some()
                assert chunk, "the process ended by itself"
                printed += chunk
        with trio.move_on_after(seconds):
            while chunk := await process.stdout.receive_some():
                printed += chunk
    finally:
        process.kill()
    async with process.stdout:
        async for chunk in process.stdout:
            printed += chunk
    await process.wait()
    return int(printed[: printed.rindex(b"\n")].split()[-1])


async def model_after(commits: int) -> StoredSession:
    """What a session must look like after so many commits."""
    async with open_memory_store(dedupe_window=DEDUPE_WINDOW) as model:
        return await after_commits(model, "a", commits)


async def test_kills_at_random_moments_lose_and_halve_nothing(tmp_path: Path) -> None:
    """After each kill the store opens undoubted, with a whole number of commits and all acknowledged ones.

    The next process carries on in the same file; housekeeping runs all the time, so that kills hit it too.
    """
    chance = random.Random(os.environ.get("STORE_KILLS_SEED", "1"))
    path = tmp_path / "sessions.db"
    before = 0
    for kill in range(KILLS):
        sync = chance.choice(("normal", "full"))
        acknowledged = await commits_before_kill(f"sqlite:///{path}", sync, chance.uniform(0, 0.06))
        assert acknowledged > before
        telemetry = RecordingTelemetry()
        async with open_sqlite_store(
            path,
            full_sync=False,
            dedupe_window=DEDUPE_WINDOW,
            clock=SettableClock(),
            telemetry=telemetry,
        ) as store:
            for session_id in SESSIONS:
                found = await held(store, session_id)
                assert found.record is not None
                before = int(found.record.touched_at)
                assert acknowledged <= before <= acknowledged + 1, f"kill {kill}"
                assert evolve(found, session_id="a") == await model_after(before), f"kill {kill}"
        assert telemetry.said == [], f"kill {kill}"


@pytest.fixture(params=["redis_server", "redis_sentinels", "redis_cluster"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """Of an empty Redis of each kind."""
    url: str = request.getfixturevalue(request.param).url
    return url


async def test_kills_of_a_gateway_lose_and_halve_nothing_in_redis(redis_url: str) -> None:
    """The same with Redis, which outlives the process: no commit is there in part."""
    chance = random.Random(os.environ.get("STORE_KILLS_SEED", "1"))
    before = 0
    for kill in range(max(3, KILLS // 7)):
        acknowledged = await commits_before_kill(redis_url, "normal", chance.uniform(0, 0.06))
        assert acknowledged > before
        telemetry = RecordingTelemetry()
        async with open_redis_store(
            parse_redis_url(redis_url),
            full_sync=False,
            dedupe_window=DEDUPE_WINDOW,
            retention=DEDUPE_WINDOW,
            telemetry=telemetry,
        ) as store:
            for session_id in SESSIONS:
                found = await held(store, session_id)
                assert found.record is not None
                # Each session is one atomic step of its own: one of them may be a commit ahead.
                before = int(found.record.touched_at)
                assert acknowledged <= before <= acknowledged + 1, f"kill {kill}"
                assert evolve(found, session_id="a") == await model_after(before), f"kill {kill}"
        assert telemetry.said == [], f"kill {kill}"

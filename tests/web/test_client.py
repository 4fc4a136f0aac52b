"""``gateway/web/client.js`` in Node: against a scripted gateway, and against the real one over cuts."""

from __future__ import annotations

import json
import os
import random
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.client.cutting_proxy import CuttingProxy
from tests.client.live_gateway import live_gateway
from tests.web.conftest import Node

HERE = Path(__file__).parent
CUTS = int(os.environ.get("CLIENT_CUTS", "200"))
SEED = int(os.environ.get("CLIENT_SEED", "20240601"))


def test_scripted_gateway(node: Node) -> None:
    """Every test of client.test.mjs passes."""
    ran = subprocess.run(
        # Not with --test: its child would outlive it when a test hangs.
        [node.executable, "--test-reporter=tap", str(HERE / "client.test.mjs")],
        env=node.environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_transcript_is_exact_over_random_cuts(node: Node, store: str, tmp_path: Path) -> None:
    """However often and wherever the socket is cut: every token once, every message done once."""
    wanted = max(1, CUTS // 2)
    url = "memory://" if store == "memory" else f"sqlite:///{tmp_path}/gateway.sqlite3"
    with trio.fail_after(100):
        async with live_gateway(url) as gateway, trio.open_nursery() as nursery:
            proxy = CuttingProxy(gateway.port, random.Random(f"{SEED} web {store}"))
            await nursery.start(proxy.run)
            start = partial(
                trio.run_process,
                [node.executable, str(HERE / "exactness.mjs"), proxy.url],
                env=node.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            process = await nursery.start(start)
            await proxy.wait_cuts(wanted)
            await process.stdin.send_all(b"stop\n")
            output = b"".join([chunk async for chunk in process.stdout])
            history = await gateway.history("s1")
            nursery.cancel_scope.cancel()
    seen = json.loads(output)
    numbers = [int(content.split()[-1]) for content in seen["asked"]]
    assert seen["text"] == "".join(f"{count} " for number in numbers for count in range(1, number + 1))
    assert [entry["content"] for entry in history if entry["role"] == "user"] == seen["asked"]
    assert seen["outcomes"] == ["completed"] * len(numbers)
    assert seen["gaps"] == 0

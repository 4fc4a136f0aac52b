"""``gateway serve`` inside this process; ``tests/end_to_end`` has it as a process of its own."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import trio

from gateway.commands.serve import serve
from gateway.config import load_configuration


async def test_what_start_up_made_is_no_work_for_the_garbage_collector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the time it listens, so that no collection stops everything to look at modules and classes."""
    configuration = load_configuration(
        {"GATEWAY__STORE_URL": "memory://"}, dotenv=tmp_path / ".env", bind="127.0.0.1:0"
    )
    stop = trio.Event()
    stop.set()
    try:
        with trio.fail_after(30):
            await serve(configuration, stop)
        assert capsys.readouterr().out.startswith("Listening on ")
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()

"""The spool's process, as its runtime starts it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import gateway
from gateway.reference_agent.llm_spool_link import SpoolLink, SpoolUnavailableError
from gateway.reference_agent.llm_spool_place import place_of
from gateway.reference_agent.llm_spool_start import SpoolProcess, start_spool
from gateway.reference_agent.settings import AgentSettings


async def test_a_process_that_cannot_start_makes_the_spool_unavailable(short_folder: Path) -> None:
    """At once, and it is no zombie afterwards."""
    started: list[SpoolProcess] = []

    def start() -> Callable[[], int | None]:
        started.append(start_spool(str(short_folder / "no" / "db"), AgentSettings()))
        return started[-1].exit_code

    async with trio.open_nursery() as nursery:
        link = SpoolLink(place_of(str(short_folder / "db")), b"us", start, nursery)
        with pytest.raises(SpoolUnavailableError):
            await link.connect()
    assert [process.exit_code() for process in started] == [1]
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_a_process_that_somebody_else_has_waited_for_has_ended() -> None:
    """Where SIGCHLD is ignored, as it was before this process began, the kernel does so by itself."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    os.waitpid(pid, 0)
    assert SpoolProcess(pid).exit_code() == 0


def test_nothing_is_imported_from_the_current_folder(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a project that somebody else wrote, and the spool has the LLM's key."""
    monkeypatch.setenv("PYTHONPATH", str(Path(gateway.__file__).parent.parent))
    monkeypatch.chdir(short_folder)
    (short_folder / "structlog.py").write_text("open('imported', 'w').close()\n")
    process = start_spool(str(short_folder / "no" / "db"), AgentSettings())
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert process.exit_code() == 1
    assert not (short_folder / "imported").exists()

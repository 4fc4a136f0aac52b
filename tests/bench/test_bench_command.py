"""``gateway bench`` as a user runs it: real processes, small loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gateway bench is for Linux")


def bench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", "bench", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    ("dialect", "scenarios"),
    [
        ("v1", ["paced", "burst", "idle", "resume"]),
        ("v2-json", ["burst", "resume"]),
        ("v2-msgpack", ["burst", "resume"]),
    ],
)
def test_scenarios_run_in_every_dialect(dialect: str, scenarios: list[str], tmp_path: Path) -> None:
    """Every token arrives, and each figure that a scenario is there for is measured."""
    options = ["--store", "memory://", "--rounds", "1", "--sessions", "3", "--tokens", "150"]
    done = bench(
        *(*scenarios, *options, "--pace", "0.002", "--dialect", dialect),
        *("--json", "figures.json", "--plot", "figures.svg"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "CPU µs/token" in done.stdout
    read = {
        one["scenario"]: one["median"]
        for one in msgspec.json.decode((tmp_path / "figures.json").read_bytes())["outcomes"]
    }
    assert set(read) == set(scenarios)
    for scenario in set(scenarios) & {"paced", "burst"}:
        assert read[scenario]["tokens"] == 450
        assert read[scenario]["cpu_us_per_token"] > 1
        assert read[scenario]["first_token_ms"]["p99"] > 0
        assert read[scenario]["token_ms"]["p50"] > 0
    assert "idle" not in read or read["idle"]["kb_per_socket"] is not None
    assert read["resume"]["resume_ms"]["p99"] > 0
    assert (tmp_path / "figures.svg").read_text().startswith("<svg")


def test_what_neighbours_do_is_measured(tmp_path: Path) -> None:
    """A burst beside three others: with it and without."""
    options = ["--store", "memory://", "--rounds", "1", "--sessions", "3", "--tokens", "100"]
    options += ["--dialect", "v2-msgpack"]
    done = bench("fairness", *options, "--json", "figures.json", "--plot", "figures.svg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "beside 1 session unpaced: token p50" in done.stdout
    alone, beside = msgspec.json.decode((tmp_path / "figures.json").read_bytes())["outcomes"]
    assert alone["median"]["neighbour_tokens_per_s"] is None
    assert beside["median"]["neighbour_tokens_per_s"] > 1000
    assert beside["median"]["token_ms"]["p99"] > 0


def test_a_soak_ends_with_its_trends(tmp_path: Path) -> None:
    """Both stores beside each other, sessions that come and go in every dialect, and no failure."""
    options = ["--minutes", "0.15", "--sessions", "6", "--pace", "0.005"]
    done = bench("soak", *options, "--json", "soak.json", "--plot", "soak.svg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "soak: gateway memory://, 6 sessions at a time" in done.stdout
    read = msgspec.json.decode((tmp_path / "soak.json").read_bytes())
    memory, sqlite = read["outcomes"]
    for outcome in (memory, sqlite):
        last = outcome["samples"][-1]
        assert last["failures"] == 0, last["reasons"]
        assert last["turns"] > 5
        assert last["reconnects"] > 0
        assert last["sessions_live"] > 0
        assert outcome["trends"]["resident_mb"]["mean"] > 10
    assert memory["samples"][-1]["store_mb"] is None
    assert sqlite["samples"][-1]["store_mb"] > 0
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")


def test_a_stop_says_what_there_was_and_leaves_no_process(tmp_path: Path) -> None:
    """A gateway or an emitter left behind would be in every later figure of this machine."""
    command = [sys.executable, "-m", "gateway", "bench", "soak", "--minutes", "1", "--store", "memory://"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert " of 1 min" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "ended before the warm-up did" in shown
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["soak", "paced"], "stands alone"),
        (["paced", "--plot", "figures.png"], "call it figures.svg"),
        (["targets", "--soak", "missing.json"], "missing.json"),
        (["paced", "--url", "http://127.0.0.1:1"], "--url and --pid go together"),
        (["targets", "paced"], "stands alone"),
        (["paced", "--peer", "node"], "needs its --peer-script"),
        (["paced", "--peer", "http://127.0.0.1:1"], "needs its --peer-pid"),
        (["paced", "--peer-script", "missing.mjs"], "is not there"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    """Without a traceback."""
    done = bench(*arguments, folder=tmp_path)
    assert done.returncode in (1, 2)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr

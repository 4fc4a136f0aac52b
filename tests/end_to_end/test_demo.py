"""What somebody sees first: ``gateway demo``, by script and on a terminal."""

from __future__ import annotations

import os
import pty
import selectors
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.processes import START_SECONDS, environment, started

DEMO = [sys.executable, "-m", "gateway", "demo", "--bind", "127.0.0.1:0"]
HELLO = 'print("hello")\n'


def test_piped_conversation(tmp_path: Path) -> None:
    """A tool call, an approval, and a file on disk; then an edit, and a refusal that changes nothing."""
    script = (
        "create hello.py that prints hello\ny\n"
        "edit hello.py: replace hello with goodbye\ny\n"
        "create other.py that prints other\nn not now\n"
    )
    done = subprocess.run(
        [*DEMO, "--chat"],
        cwd=tmp_path,
        env=environment(),
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "demo-workspace" / "hello.py").read_text("utf-8") == 'print("goodbye")\n'
    assert not (tmp_path / "demo-workspace" / "other.py").exists()
    assert "The agent wants to run write_file" in done.stdout
    assert "I understood: not now" in done.stdout


def test_terminal(tmp_path: Path) -> None:
    """On a terminal the chat begins by itself; Ctrl-C stops an answer, Ctrl-D ends everything."""
    terminal = _Terminal(DEMO, tmp_path)
    try:
        terminal.wait("you> ")
        terminal.type("create hello.py that prints hello\n")
        terminal.wait("[y/edit/n] ")
        terminal.type("y\n")
        terminal.wait("see it.")
        terminal.type("count to 5000\n")
        terminal.wait(" 20 ")
        terminal.type("\x03")
        terminal.wait("cancelled")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    finally:
        terminal.end()
    assert (tmp_path / "demo-workspace" / "hello.py").read_text("utf-8") == HELLO


@pytest.mark.parametrize("data", [None, "kept"])
def test_data(tmp_path: Path, data: str | None) -> None:
    """Databases are where ``--data`` says, and nothing is left behind without it."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = ["env", f"TMPDIR={temporary}", *DEMO, "--no-chat"]
    with started([*command, "--data", data] if data else command, tmp_path):
        folder = tmp_path / data if data else next(temporary.iterdir())
        assert {"gateway.sqlite3", "agent.sqlite3"} <= {file.name for file in folder.iterdir()}

    assert list(temporary.iterdir()) == []
    assert (tmp_path / "kept" / "gateway.sqlite3").exists() == (data is not None)


class _Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._terminal, programs_side = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=folder,
            env=environment() | {"TERM": "xterm"},
            stdin=programs_side,
            stdout=programs_side,
            stderr=programs_side,
        )
        os.close(programs_side)
        self._shown = ""

    def wait(self, text: str) -> None:
        """Wait until ``text`` is shown, after what was waited for before."""
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._terminal, selectors.EVENT_READ)
            while text not in self._shown:
                assert selector.select(deadline - time.monotonic()), f"{text!r} is not in {self._shown!r}"
                self._shown += os.read(self._terminal, 65536).decode("utf-8", "replace")
        self._shown = self._shown.partition(text)[2]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def exit_code(self) -> int:
        """How it ended."""
        return self._process.wait(START_SECONDS)

    def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

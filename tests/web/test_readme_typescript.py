"""The TypeScript of README.md: held to its types by the compiler, and run in Node against a real gateway."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.processes import Process, started
from tests.end_to_end.requirements import missing, need_program
from tests.web.conftest import Node

HERE = Path(__file__).parent
README = (HERE.parents[1] / "README.md").read_text("utf-8")
V1, V2 = re.findall(r"```ts\n(.*?)```", README, flags=re.DOTALL)
ADDRESS = "ws://127.0.0.1:8000"
COMPILER = "typescript@5.9.3"
OPTIONS = ("--strict", "--target", "es2022", "--module", "es2022", "--lib", "es2022,dom")

AROUND_V1 = """
function show(token: string, isFinal: boolean): void {
  console.log(JSON.stringify({ token, isFinal }));
  if (isFinal) socket.close();
}
SNIPPET
export {};
"""

AROUND_V2 = """
const url = "ws://127.0.0.1:8000";
let epoch = "";
let lastSeq = 0;
let ended = 0;

function handle(event: any): void {
  console.log(JSON.stringify(event));
  if (event.type === "turn_ended") ended += 1;
}

/** Connects, asks, and goes away after so many events or turns. */
function ask(isEnough: () => boolean): Promise<unknown> {
  SNIPPET
  function send(message: object): void {
    socket.addEventListener("open", () => socket.send(JSON.stringify(message)));
  }
  socket.addEventListener("message", () => isEnough() && socket.close());
  return new Promise((resolve) => socket.addEventListener("close", resolve));
}

await ask(() => lastSeq >= 4);
await ask(() => ended === 2);
export {};
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TypeScript compiler, a script for Node."""
    npm = need_program("npm", "apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("typescript")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), COMPILER]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if installed.returncode != 0:
        missing(f"npm could not install {COMPILER}: {installed.stderr[-300:]}")
    return folder / "node_modules" / "typescript" / "bin" / "tsc"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """What the snippets talk to."""
    command = [sys.executable, "-m", "gateway", "demo", "--no-chat", "--bind", "127.0.0.1:0"]
    with started(command, tmp_path_factory.mktemp("demo"), name="demo") as process:
        yield process


@pytest.fixture
def run(node: Node, compiler: Path, demo: Process, tmp_path: Path) -> Callable[[str, str], list[Any]]:
    """Compiles and runs a program around a snippet; what it printed."""

    def compile_and_run(around: str, snippet: str) -> list[Any]:
        program = around.replace("SNIPPET", snippet).replace(ADDRESS, demo.socket_url)
        # Each test has a session of its own.
        program = program.replace("my-session", tmp_path.name)
        (tmp_path / "program.ts").write_text(program, "utf-8")
        (tmp_path / "package.json").write_text('{"type": "module"}', "utf-8")
        for command in (
            [node.executable, str(compiler), *OPTIONS, "program.ts"],
            [node.executable, str(HERE / "run_snippet.mjs"), str(tmp_path / "program.js")],
        ):
            ran = subprocess.run(
                command,
                cwd=tmp_path,
                env=node.environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return compile_and_run


def test_v1_shows_the_answer(run: Callable[[str, str], list[Any]]) -> None:
    """It connects, asks, and shows tokens up to the last."""
    shown = run(AROUND_V1, V1)

    assert "Hello" in "".join(piece["token"] for piece in shown)
    assert [piece["isFinal"] for piece in shown] == [False] * (len(shown) - 1) + [True]


def test_v2_resumes(run: Callable[[str, str], list[Any]]) -> None:
    """Gone in the middle of an answer, it gets the rest on its return, once, then the next answer."""
    events = run(AROUND_V2, V2)

    assert [event["resumed"] for event in events if event["type"] == "welcome"] == [False, True]
    numbered = [event for event in events if "seq" in event]
    for before, after in pairwise(numbered):
        assert after.get("first_seq", after["seq"]) == before["seq"] + 1
    assert [event["outcome"] for event in events if event["type"] == "turn_ended"] == ["completed"] * 2


def test_a_wrong_type_is_noticed(run: Callable[[str, str], list[Any]]) -> None:
    """The compiler is in earnest."""
    assert "lastSeq = event.seq" in V2
    with pytest.raises(AssertionError, match="TS2322"):
        run(AROUND_V2, V2.replace("lastSeq = event.seq", "lastSeq = `${event.seq}`"))

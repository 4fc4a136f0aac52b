"""The documentation builds as a site, and what it tells people to type works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect

from gateway.client.reconnect import Verdict, judge
from gateway.core.websocket_protocol import CloseCode
from tests.end_to_end.processes import Process, started
from tests.end_to_end.requirements import need_program

ROOT = Path(__file__).parent.parent
CONNECT = "docs/connect.md"


def page_text(page: str) -> str:
    """What a page says."""
    return (ROOT / page).read_text("utf-8")


def snippets(language: str, page: str) -> list[str]:
    """Those of that language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", page_text(page), flags=re.DOTALL)


def snippet(language: str, page: str = CONNECT) -> str:
    """The only one of that language in a page."""
    (found,) = snippets(language, page)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """What the snippets talk to."""
    command = [sys.executable, "-m", "gateway", "demo", "--no-chat", "--bind", "127.0.0.1:0"]
    with started(command, tmp_path_factory.mktemp("demo"), name="demo") as process:
        yield process


def test_builds_strictly(tmp_path: Path) -> None:
    """Every page is in the navigation, every link and heading that is pointed to exists."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        message = "mkdocs-material is not installed: pip install -c constraints.txt -e '.[docs]'"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
    )

    assert built.returncode == 0, built.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        built_page = tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built_page.exists()
    front = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert "Start here" in front
    assert "fonts.googleapis.com" not in front


PROGRAM = """
import builtins

import trio
{imports}

scope = trio.CancelScope()


def print(*values: object) -> None:
    builtins.print(*values)
    if values[0] == "turn_ended":
        scope.cancel()


async def main() -> None:
    with scope:
{body}


trio.run(main)
"""
"""Ends with the turn, whether or not the snippet does."""


@pytest.mark.parametrize(
    ("page", "last"),
    [(CONNECT, "assistant_message 5 "), ("README.md", "tool_call ")],
    ids=["connect", "README"],
)
def test_the_python_snippets_run(demo: Process, page: str, last: str) -> None:
    """As they stand, in a Trio program; they print an answer."""
    lines = snippet("python", page).replace("http://127.0.0.1:8000", demo.url).splitlines()
    # Each page has a session of its own.
    body = "\n".join(f"        {line}" for line in lines if line and not line.startswith("from "))
    imports = "\n".join(line for line in lines if line.startswith("from "))
    program = PROGRAM.format(imports=imports, body=body.replace("my-session", page.replace("/", ".")))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert last in done.stdout
    assert "turn_ended" in done.stdout


@pytest.mark.parametrize("page", [CONNECT, "README.md"])
def test_the_curl_snippets_run(demo: Process, page: str) -> None:
    """Each line answers with JSON."""
    need_program("curl", "apt-get install curl")
    lines = [
        line for found in snippets("sh", page) for line in found.splitlines() if line.startswith("curl ")
    ]
    assert lines
    for line in lines:
        done = subprocess.run(
            [
                "/bin/sh",
                "-c",
                f"{line.replace('http://127.0.0.1:8000', demo.url)} -s --fail-with-body --noproxy '*'",
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        # There is no session yet that has a history.
        assert done.returncode == 0 or "/history" in line, done.stdout + done.stderr
        assert done.stdout.startswith(("{", "["))


def test_the_transcript_of_v1_happens(demo: Process) -> None:
    """What is shown as sent is answered with what is shown as read."""
    sent, read = snippets("json", CONNECT)
    with connect(f"{demo.socket_url}/api/v1/ws/transcript", proxy=None) as socket:
        socket.send(sent)
        assert json.loads(socket.recv(timeout=10)) == json.loads(read)


def test_the_dart_client_speaks_the_protocol() -> None:
    """Every text in it is a name of the protocol; it stays away after the codes that say so, no others."""
    code = snippet("dart")
    strings = set(re.findall(r"'([^']*)'", code.partition("class ")[2])) - {"$lastSeq"}
    contract = (ROOT / "docs" / "asyncapi.yaml").read_text("utf-8")

    assert "/api/v1/ws/$sessionId" in strings
    for name in strings:
        assert name.replace("$sessionId", "{session_id}") in contract
    final = {int(number) for number in re.findall(r"\b\d{4}\b", code)}
    assert final == {code.value for code in CloseCode if judge(code) is Verdict.END}


def test_every_language_that_is_shown_is_run() -> None:
    """JavaScript in a browser, Dart by its virtual machine, TypeScript in Node; the others here."""
    runs = {
        "js": ("tests/browser/test_playground.py", 'snippet("js")'),
        "ts": ("tests/web/test_readme_typescript.py", "```ts"),
        "dart": ("tests/dart/test_snippets.py", "```dart"),
    }
    for test, sign in runs.values():
        assert sign in (ROOT / test).read_text("utf-8")
    # Shell beside curl is what the reader's machine is set up with: .ci/run runs README's.
    shown = {
        name for page in ("README.md", CONNECT) for name in re.findall(r"(?m)^```(\w+)", page_text(page))
    }
    assert shown - {"mermaid", "json"} == {*runs, "python", "sh"}

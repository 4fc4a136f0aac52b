"""The documentation builds as a site, and what it tells people to type works."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.client.reconnect import Verdict, judge
from gateway.core.websocket_protocol import CloseCode
from tests.end_to_end.processes import Process, started
from tests.end_to_end.requirements import need_program

ROOT = Path(__file__).parent.parent
CONNECT = (ROOT / "docs" / "connect.md").read_text("utf-8")


def snippet(language: str) -> str:
    """The first of that language in docs/connect.md."""
    found = re.search(rf"```{language}\n(.*?)```", CONNECT, flags=re.DOTALL)
    assert found
    return found[1]


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


def test_the_python_snippet_runs(demo: Process, tmp_path: Path) -> None:
    """As it stands, in a Trio program; it prints an answer."""
    lines = snippet("python").replace("http://127.0.0.1:8000", demo.url).splitlines()
    body = "\n".join(f"    {line}" for line in lines if line and not line.startswith("from "))
    imports = "\n".join(line for line in lines if line.startswith("from "))
    program = f"import trio\n{imports}\n\n\nasync def main() -> None:\n{body}\n\n\ntrio.run(main)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "assistant_message 5 " in done.stdout
    assert "turn_ended" in done.stdout


def test_the_curl_snippet_runs(demo: Process) -> None:
    """Each line answers with JSON."""
    need_program("curl", "apt-get install curl")
    for line in snippet("sh").replace("http://127.0.0.1:8000", demo.url).splitlines():
        done = subprocess.run(
            ["/bin/sh", "-c", f"{line} --fail-with-body --noproxy '*'"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        # There is no session yet that has a history.
        assert done.returncode == 0 or "/history" in line, done.stdout + done.stderr
        assert done.stdout.startswith(("{", "["))


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


def test_the_javascript_snippet_is_run_in_a_browser() -> None:
    """By tests/browser/test_playground.py, which needs one."""
    test = (ROOT / "tests" / "browser" / "test_playground.py").read_text("utf-8")

    assert 'snippet("js")' in test

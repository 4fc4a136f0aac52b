"""The page for runtime authors says what the code does."""

import re
import tomllib
from pathlib import Path

import pytest

from gateway.reference_agent.agents import AGENTS, TOOLS
from gateway.reference_agent.approvals import parse_policy
from gateway.reference_agent.requests import understand

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "agent-runtime.md").read_text(encoding="utf-8")
SOURCES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "gateway" / "reference_agent").glob("*.py")
    if not path.name.startswith("conformance")
}


def test_every_error_code_is_documented() -> None:
    """And every documented one exists."""
    used = {
        code
        for source in SOURCES.values()
        for code in re.findall(r"\"([A-Z]+(?:_[A-Z]+)+)\"", source)
        if not code.startswith(("MAX_", "BODY_")) and code != "NO_COLOR"  # of the environment, no-color.org
    }
    documented = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE)) - {"AGENT_STREAM_TIMEOUT"}
    assert documented == used


def test_every_route_is_documented() -> None:
    """With its parameters written in braces."""
    for source in (SOURCES["views.py"], SOURCES["routes.py"]):
        for path in re.findall(r"@app\.(?:get|post)\(\"([^\"]+)\"\)", source):
            assert path.replace("<", "{").replace(">", "}") in PAGE, path


def test_every_agent_and_tool_is_documented() -> None:
    """By name, tools with their arguments."""
    for name in AGENTS:
        assert f"| `{name}` |" in PAGE
    for tool in TOOLS.values():
        assert f"`{tool.name}{{{', '.join(tool.parameters['required'])}}}`" in PAGE


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("create hello.py that prints hello", "create"),
        ("edit hello.py: replace hello with goodbye", "edit"),
        ("read a.py, b.py and c.py", "read"),
        ("list files in src", "list"),
        ("run `python hello.py`", "run"),
        ("explain hello.py", "explain"),
        ("debug hello.py", "debug"),
        ("plan a todo app", "plan"),
        ("help", "chat"),
        ("count to 20", "count"),
        ("slow 3", "slow"),
        ("think 2", "think"),
        ("fail", "fail"),
    ],
)
def test_documented_sentences_are_understood(sentence: str, kind: str) -> None:
    """Each stands in the page, with N for its number."""
    assert re.sub(r"\d+", "N", sentence) in PAGE
    assert understand(sentence).kind == kind


def test_the_example_policy_is_valid() -> None:
    """As it would be pasted."""
    example = PAGE[PAGE.index("    [[rule]]") :].split("\n\nAn `allow`")[0]
    policy = parse_policy(tomllib.loads(re.sub(r"(?m)^    ", "", example)))
    assert policy.decide("execute_command", {"command": "pytest -x"}).action == "allow"
    assert policy.decide("execute_command", {"command": "pytest; rm x"}).action == "ask"
    assert policy.decide("write_file", {"path": "docs/a/b.md"}).action == "allow"

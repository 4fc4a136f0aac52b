"""The approval policy."""

from pathlib import Path
from typing import Any

import pytest

from gateway.reference_agent.approvals import load_policy, parse_policy

from .conftest import RunAgent


@pytest.mark.parametrize(
    ("tool", "arguments", "action"),
    [
        ("read_file", {"path": "src/a.py"}, "allow"),
        ("list_files", {"path": "."}, "allow"),
        ("read_file", {"path": ".env"}, "ask"),
        ("read_file", {"path": "deploy/prod.PEM"}, "ask"),
        ("read_file", {"path": "./x/../.env"}, "ask"),
        ("read_file", {"path": "a\\.ssh\\config"}, "ask"),
        ("write_file", {"path": "a.md"}, "ask"),
        ("edit_file", {"path": "a.py"}, "ask"),
        ("execute_command", {"command": "ls"}, "ask"),
        ("execute_command", {"command": "rm -rf /"}, "deny"),
        ("execute_command", {"command": "true; sudo rm -r -f ~"}, "deny"),
        ("execute_command", {"command": "rm -rf build/"}, "ask"),
        ("unheard_of", {}, "ask"),
    ],
)
def test_the_policy_that_comes_with_the_package(tool: str, arguments: dict[str, Any], action: str) -> None:
    """Reading is free but for secrets; changing asks; destroying is denied; the unknown asks."""
    assert load_policy(None).decide(tool, arguments).action == action


ALLOWING = {
    "rule": [
        {"action": "allow", "tools": ["execute_command"], "commands": ["git status*", "pytest"]},
        {"action": "allow", "tools": ["write_*"], "paths": ["docs/**", "*.txt", "src/?.py"]},
        {"action": "deny", "pattern": "(?i)password", "reason": "No passwords."},
    ]
}


@pytest.mark.parametrize(
    ("tool", "arguments", "action"),
    [
        ("execute_command", {"command": "git  status -s"}, "allow"),
        ("execute_command", {"command": "git status; rm x"}, "ask"),
        ("execute_command", {"command": "git status > x"}, "ask"),
        ("execute_command", {"command": "git status `id`"}, "ask"),
        ("execute_command", {"command": "git status\nrm x"}, "ask"),
        ("execute_command", {"command": "pytest -x"}, "ask"),
        ("execute_command", {}, "ask"),
        ("write_file", {"path": "docs/a/b.md"}, "allow"),
        ("write_file", {"path": "docs/../a.md"}, "ask"),
        ("write_file", {"path": "../x.txt"}, "ask"),
        ("write_file", {"path": "a/x.txt"}, "ask"),
        ("write_file", {"path": "src/a.py"}, "allow"),
        ("write_file", {"path": "/docs/a.md"}, "ask"),
        ("write_file", {"path": 7}, "ask"),
        ("edit_file", {"path": "x.txt", "new": ["my PassWord"]}, "deny"),
    ],
)
def test_rules_fit_only_when_everything_they_name_fits(
    tool: str, arguments: dict[str, Any], action: str
) -> None:
    """An allowed command cannot carry a second one; an allowed folder cannot be left."""
    assert parse_policy(ALLOWING).decide(tool, arguments).action == action


def test_every_mistake_in_a_policy_is_named_at_once() -> None:
    """A file is repaired in one go."""
    with pytest.raises(ValueError, match="approvals") as caught:
        parse_policy(
            {
                "defualt": "ask",
                "default": "maybe",
                "rule": [{"action": "no"}, {"action": "ask", "pattern": "("}, {"action": "ask", "paths": []}],
            }
        )
    for part in ("'defualt'", "`default`", "rule 1: `action`", "rule 2: `pattern`", "rule 3: `paths`"):
        assert part in str(caught.value)


def test_a_file_that_cannot_be_used_is_a_value_error(tmp_path: Path) -> None:
    """Missing or not TOML: the path is named."""
    broken = tmp_path / "broken.toml"
    broken.write_text("rule = [", encoding="utf-8")
    for path, says in ((tmp_path / "none.toml", "cannot be read"), (broken, "not valid TOML")):
        with pytest.raises(ValueError, match=says):
            load_policy(str(path))


async def test_a_policy_file_decides_what_the_client_is_asked(run_agent: RunAgent, tmp_path: Path) -> None:
    """Allowed calls come without approval, denied ones not at all; edits are held to it too."""
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[[rule]]\naction = "allow"\npaths = ["*.md"]\n'
        '[[rule]]\naction = "deny"\npaths = ["*.py"]\nreason = "No Python."\n',
        encoding="utf-8",
    )
    async with run_agent(approvals=str(policy)) as client:
        allowed = await client.say("create a.md")
        denied = await client.say("create a.py")
        asked = await client.say("create a.txt")
        call_id = asked.calls[0]["call_id"]
        edited = await client.decide(call_id, "edit", modified_arguments={"path": "b.py", "content": ""})
        pending = await client.get("/sessions/s1/pending-approvals")
    assert allowed.calls[0]["requires_approval"] is False
    assert (denied.calls, "No Python." in denied.text) == ([], True)
    assert asked.calls[0]["requires_approval"] is True
    assert edited.error_codes == ["EDIT_NOT_ALLOWED"]
    assert [one["call_id"] for one in pending["pending_approvals"]] == [call_id]

"""What the agents may do."""

import pytest

from gateway.reference_agent.agents import AGENTS, TOOLS


@pytest.mark.parametrize(
    ("agent", "tool", "path", "allowed"),
    [
        ("coder", "write_file", "src/a.py", True),
        ("coder", "edit_file", "a.md", True),
        ("architect", "write_file", "docs/Plan.MD", True),
        ("architect", "write_file", "plan.md.py", False),
        ("architect", "edit_file", "a.py", False),
        ("architect", "read_file", "a.py", True),
        ("debug", "read_file", "a.py", True),
        ("debug", "write_file", "a.md", False),
        ("ask", "edit_file", "a.md", False),
        ("ask", "execute_command", ".", False),
        ("orchestrator", "write_file", "a.md", False),
        ("coder", "format_disk", ".", False),
        ("coder", "write_file", "../a.py", False),
        ("coder", "write_file", "a/../../b.py", False),
        ("coder", "read_file", "/etc/passwd", False),
        ("coder", "read_file", "C:\\x", False),
        ("coder", "read_file", "a\\..\\..\\b", False),
        ("coder", "read_file", "~/.ssh/id_rsa", False),
    ],
)
def test_each_agent_is_held_to_its_tools_and_files(agent: str, tool: str, path: str, allowed: bool) -> None:
    """And nobody leaves the project folder."""
    why_not = AGENTS[agent].why_not_allowed(
        tool, {"path": path, "content": "", "old": "a", "new": "b", "command": "ls"}
    )
    assert (why_not is None) == allowed


def test_a_call_without_its_arguments_is_not_made() -> None:
    """LLMs forget some; they are told which."""
    why_not = AGENTS["coder"].why_not_allowed("edit_file", {"path": "a", "old": 7})
    assert why_not == "edit_file needs the text arguments old, new."


def test_agents_name_only_tools_that_exist() -> None:
    """A typing error in the table would take a tool away silently."""
    assert {tool for agent in AGENTS.values() for tool in agent.tools} == set(TOOLS)

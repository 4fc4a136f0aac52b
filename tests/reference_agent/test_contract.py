"""Reading client messages."""

from typing import Any

import pytest

from gateway.reference_agent.contract import (
    HitlDecision,
    InvalidMessageError,
    SwitchAgent,
    ToolResult,
    UserMessage,
    read_message,
)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"type": "user_message", "content": "hi", "x": 1}, UserMessage("hi")),
        (
            {"type": "user_message", "content": "", "role": "system", "agent_type": "ask"},
            UserMessage("", "system", "ask"),
        ),
        ({"type": "tool_result", "call_id": "c", "result": None}, ToolResult("c")),
        ({"type": "tool_result", "call_id": "c", "error": "no"}, ToolResult("c", error="no")),
        ({"type": "switch_agent", "agent_type": "ask"}, SwitchAgent("ask")),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "ApProve"},
            HitlDecision("c", "approve"),
        ),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "EDIT", "modified_arguments": {}},
            HitlDecision("c", "edit", {}),
        ),
    ],
)
def test_well_formed_messages_become_their_class(raw: dict[str, Any], expected: object) -> None:
    """Unknown fields are ignored, letter case of decisions too."""
    assert read_message(raw) == expected


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, "Unknown message type: None"),
        ({"type": "cancel"}, "Unknown message type: cancel"),
        ({"type": "user_message"}, "`content` must be a string"),
        ({"type": "user_message", "content": "x", "role": "tool"}, "send a tool_result"),
        ({"type": "user_message", "content": "x", "role": "root"}, "`role` must be one of"),
        ({"type": "tool_result", "call_id": "c"}, "needs `result` or `error`"),
        ({"type": "tool_result", "result": 1}, "`call_id` must be"),
        ({"type": "tool_result", "call_id": 7, "result": 1}, "`call_id` must be"),
        ({"type": "switch_agent"}, "`agent_type` must be"),
        ({"type": "switch_agent", "agent_type": "ask", "content": 1}, "`content` must be a string"),
        ({"type": "hitl_decision", "call_id": "c", "decision": "maybe"}, "`decision` must be one of"),
        ({"type": "hitl_decision", "call_id": "c", "decision": "edit"}, "needs `modified_arguments`"),
        (
            {"type": "hitl_decision", "call_id": "c", "decision": "edit", "modified_arguments": []},
            "must be an object",
        ),
    ],
)
def test_malformed_messages_say_what_to_change(raw: dict[str, Any], says: str) -> None:
    """The text names the field."""
    with pytest.raises(InvalidMessageError, match=says):
        read_message(raw)

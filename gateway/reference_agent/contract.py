"""The client messages an Agent Runtime receives, and how they are read from JSON.

Source: protocol section 2 (fields) and 3 (``{"session_id": …, "message": …}``). Unknown fields are ignored,
as clients of any age must be able to talk to us.
"""

from collections.abc import Mapping
from typing import Any

import attrs

DECISIONS = ("approve", "edit", "reject")
ROLES = ("user", "assistant", "system")


class InvalidMessageError(ValueError):
    """The message cannot be acted on; its text says what to change. Sending it again will not help."""


@attrs.frozen
class UserMessage:
    """Something said to the agent; ``agent_type`` chooses who answers."""

    content: str
    role: str = "user"
    agent_type: str | None = None


@attrs.frozen
class ToolResult:
    """What became of a tool call that the client ran: ``result`` (any JSON) or ``error``."""

    call_id: str
    result: Any = None
    error: str | None = None


@attrs.frozen
class SwitchAgent:
    """The client chooses the agent; ``content`` is at once a message to it."""

    agent_type: str
    content: str | None = None
    reason: str | None = None


@attrs.frozen
class HitlDecision:
    """The user's decision on a tool call: ``approve``, ``edit`` or ``reject``."""

    call_id: str
    decision: str
    modified_arguments: dict[str, Any] | None = None
    feedback: str | None = None


ClientMessage = UserMessage | ToolResult | SwitchAgent | HitlDecision


def read_message(raw: Mapping[str, Any]) -> ClientMessage:
    """Turn one client message into its class.

    Raises `InvalidMessageError` when the type is unknown or a field is missing or of the wrong type.
    """
    kind = raw.get("type")
    if kind == "user_message":
        return _user_message(raw)
    if kind == "tool_result":
        if "result" not in raw and raw.get("error") is None:
            raise InvalidMessageError("tool_result needs `result` or `error`.")
        return ToolResult(
            call_id=_text(raw, "call_id"), result=raw.get("result"), error=_optional_text(raw, "error")
        )
    if kind == "switch_agent":
        return SwitchAgent(
            agent_type=_text(raw, "agent_type"),
            content=_optional_text(raw, "content"),
            reason=_optional_text(raw, "reason"),
        )
    if kind == "hitl_decision":
        return _hitl_decision(raw)
    raise InvalidMessageError(
        f"Unknown message type: {str(kind)[:64]}. "
        "Known: user_message, tool_result, switch_agent, hitl_decision."
    )


def _user_message(raw: Mapping[str, Any]) -> UserMessage:
    role = _optional_text(raw, "role") or "user"
    if role == "tool":
        raise InvalidMessageError("A message with role `tool` has no call to belong to: send a tool_result.")
    if role not in ROLES:
        raise InvalidMessageError(f"`role` must be one of {', '.join(ROLES)}.")
    content = raw.get("content")
    if not isinstance(content, str):
        raise InvalidMessageError("`content` must be a string.")
    return UserMessage(content=content, role=role, agent_type=_optional_text(raw, "agent_type"))


def _hitl_decision(raw: Mapping[str, Any]) -> HitlDecision:
    decision = _text(raw, "decision").lower()
    if decision not in DECISIONS:
        raise InvalidMessageError(f"`decision` must be one of {', '.join(DECISIONS)}.")
    modified = raw.get("modified_arguments")
    if modified is not None and not isinstance(modified, dict):
        raise InvalidMessageError("`modified_arguments` must be an object.")
    if decision == "edit" and modified is None:
        raise InvalidMessageError("A decision `edit` needs `modified_arguments`.")
    return HitlDecision(
        call_id=_text(raw, "call_id"),
        decision=decision,
        modified_arguments=modified,
        feedback=_optional_text(raw, "feedback"),
    )


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidMessageError(f"`{name}` must be a non-empty string.")
    return value


def _optional_text(raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidMessageError(f"`{name}` must be a string.")
    return value

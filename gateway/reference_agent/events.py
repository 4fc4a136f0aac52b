"""The events an Agent Runtime emits, and their Server-Sent Events form.

Source: protocol sections 2 and 3; WHATWG HTML, "Server-sent events", section 9.2.6 (interpretation).
"""

from typing import Any

import orjson

HEARTBEAT = b": heartbeat\n\n"
COMPLETED = b'{"status":"completed"}'


def encode_event(event: dict[str, Any]) -> bytes:
    """The JSON of one event: UTF-8 on a single line, fields that are ``None`` left out."""
    return orjson.dumps({name: value for name, value in event.items() if value is not None})


def frame_event(event_id: int, data: bytes, *, last: bool = False) -> bytes:
    """One SSE event. JSON escapes CR and LF inside strings, so the data is always one line."""
    name = b"done" if last else b"message"
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, name, data)


def token(text: str) -> dict[str, Any]:
    """A piece of the answer."""
    return {"type": "assistant_message", "token": text, "is_final": False}


def final() -> dict[str, Any]:
    """The end of an answer: nothing is asked of the client, and the next word is the user's."""
    return {"type": "assistant_message", "token": "", "is_final": True}


def tool_call(
    call_id: str, tool_name: str, arguments: dict[str, Any], *, requires_approval: bool
) -> dict[str, Any]:
    """A request that the client runs a tool, at once or after its user has approved it."""
    return {
        "type": "tool_call",
        "call_id": call_id,
        "tool_name": tool_name,
        "arguments": arguments,
        "requires_approval": requires_approval,
    }


def agent_switched(
    from_agent: str, to_agent: str, reason: str, confidence: float | None = None
) -> dict[str, Any]:
    """Another agent answers from here on; ``confidence`` is between 0 and 1."""
    return {
        "type": "agent_switched",
        "from_agent": from_agent,
        "to_agent": to_agent,
        "reason": reason,
        "confidence": confidence,
    }


def error(code: str, message: str, *, retryable: bool, call_id: str | None = None) -> dict[str, Any]:
    """A failure; the same text under both names that clients of either generation read."""
    return {
        "type": "error",
        "error": message,
        "content": message,
        "code": code,
        "retryable": retryable,
        "call_id": call_id,
    }

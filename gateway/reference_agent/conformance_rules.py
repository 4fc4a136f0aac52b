"""The rules that hold for every stream and every event, whatever the conversation."""

from typing import Any

from gateway.reference_agent.conformance_client import ContractFaultError, Recording

STREAM_TIMEOUT = 60.0
"""Seconds of silence after which the gateway gives up by default (``AGENT_STREAM_TIMEOUT``)."""


def fault_if(condition: bool, text: str) -> None:
    """Raise a `ContractFaultError` with ``text`` when ``condition`` holds."""
    if condition:
        raise ContractFaultError(text)


def well_formed(recording: Recording) -> Recording:
    """Hold one stream to the rules every stream has. Returns it."""
    fault_if(recording.status != 200, f"Expected status 200 and a stream, got status {recording.status}.")
    content_type = recording.headers.get("content-type", "")
    fault_if(
        content_type.split(";")[0].strip().lower() != "text/event-stream",
        f"Expected Content-Type text/event-stream, got {content_type or 'none'}.",
    )
    fault_if(
        recording.ended_by not in ("done", "end of stream", "cut by us"),
        f"The stream ended by {recording.ended_by}.",
    )
    fault_if(recording.lingered, "The stream stayed open after its `done`.")
    fault_if(
        recording.longest_silence > STREAM_TIMEOUT,
        f"Silent for {recording.longest_silence:.0f} s: send `: heartbeat` comments while thinking.",
    )
    for event in recording.events:
        fault_if(event.payload is None, f"An event is not a JSON object: {event.data[:80]!r}.")
        fault_if(not event.type, f"An event has no `type`: {event.data[:80]!r}.")
        _check_fields(event.type, event.payload or {})
    return recording


def _check_fields(kind: str, payload: dict[str, Any]) -> None:
    def needs(name: str, kind_of: type, where: dict[str, Any] = payload) -> None:
        if not isinstance(where.get(name), kind_of):
            raise ContractFaultError(
                f"{kind} needs `{name}` ({kind_of.__name__}), got {where.get(name)!r:.60}."
            )

    if kind == "assistant_message":
        needs("token", str)
        needs("is_final", bool)
    elif kind == "tool_call":
        for name, kind_of in (
            ("call_id", str),
            ("tool_name", str),
            ("arguments", dict),
            ("requires_approval", bool),
        ):
            needs(name, kind_of)
    elif kind == "agent_switched":
        metadata = payload.get("metadata")
        merged = dict(metadata) if isinstance(metadata, dict) else {}
        merged.update({name: value for name, value in payload.items() if value is not None})
        for name in ("from_agent", "to_agent", "reason"):
            needs(name, str, merged)
    elif kind == "error":
        text = payload.get("error") or payload.get("content")
        fault_if(not isinstance(text, str), "error needs its text as `error` or `content`.")


def refused(recording: Recording, what: str) -> None:
    """Hold an answer to being a refusal: an `error` event, or a status from 400 to 499."""
    if 400 <= recording.status < 500:
        return
    well_formed(recording)
    fault_if(
        not recording.of_type("error"), f"{what} must be answered with an error, got: {recording.describe()}."
    )

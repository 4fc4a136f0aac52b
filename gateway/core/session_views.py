"""What a v2 client is told about a whole session: ``welcome`` and ``snapshot`` (protocol.md section 4)."""

from __future__ import annotations

import orjson

from gateway.core.limits import Limits
from gateway.core.session import Session


def welcome(session: Session, limits: Limits, *, last_seq: int, resumed: bool) -> dict[str, object]:
    """The first frame on a v2 socket. ``last_seq`` is the newest seq that the store holds."""
    return {
        "type": "welcome",
        "session_id": session.session_id,
        "epoch": session.epoch,
        "first_seq": session.log.first_seq,
        "last_seq": last_seq,
        "resumed": resumed,
        "turn": turn(session),
        "pending": pending(session),
        "limits": {
            "max_message_bytes": limits.max_message_bytes,
            "max_queued_messages": limits.max_queued_messages,
            "unacked_bytes": limits.unacked_bytes,
        },
        "dedupe_window_s": limits.dedupe_window,
        "heartbeat_s": limits.heartbeat_interval,
    }


def snapshot(session: Session, reason: str, *, last_seq: int) -> dict[str, object]:
    """What stands in for events that cannot be replayed; those after ``last_seq`` follow it."""
    return {
        "type": "snapshot",
        "reason": reason,
        "epoch": session.epoch,
        "seq": last_seq,
        "turn": turn(session),
        "text": session.running_text(last_seq),
        "pending": pending(session),
    }


def turn(session: Session) -> dict[str, object]:
    """The current turn: its id, None before the first, and the state."""
    shown = session.shown
    return {"id": shown.turn_id, "state": shown.turn_state.value}


def pending(session: Session) -> list[object]:
    """The tool calls that wait for the client, as they were sent."""
    return [orjson.loads(call.data) for call in session.shown.pending]

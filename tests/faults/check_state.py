"""What ``welcome`` and ``snapshot`` say of a session fits the events up to the seq that they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.faults.check_delivery import Timeline
from tests.faults.records import ClientRecord, SessionRecord
from tests.faults.violations import Violation, shorten


class States:
    """Which turn runs after each seq, and which calls have been made by then."""

    def __init__(self, timeline: Timeline) -> None:
        self._running: list[str | None] = [None]
        self._made: dict[str, int] = {}
        self._rejected: dict[str, int] = {}
        self._text: list[str] = [""]
        """Of the running answer, after each seq."""
        for seq in range(1, len(timeline) + 1):
            fields = timeline[seq].fields
            kind, running, text = fields["type"], self._running[-1], self._text[-1]
            if kind == "turn_started":
                running, text = fields["turn_id"], ""
            elif kind == "turn_ended" and fields["turn_id"] == running:
                running, text = None, ""
            elif kind == "assistant_message":
                text += fields["token"]
            elif kind == "tool_call":
                self._made[fields["call_id"]] = seq
            elif kind == "approval_resolved" and fields["decision"] == "reject":
                self._rejected[fields["call_id"]] = seq
            self._running.append(running)
            self._text.append(text)

    def complaint(self, item: dict[str, Any], last_seq: int) -> str | None:
        """What is wrong with a ``welcome`` or ``snapshot`` of events up to ``last_seq``."""
        if last_seq >= len(self._running):
            return None  # Said elsewhere: it knows events that the log does not.
        turn, running = item["turn"], self._running[last_seq]
        if (turn["state"] == "running") != (running is not None) or (running and turn["id"] != running):
            return f"says that {turn} at seq {last_seq}, where {running} runs"
        for call in item["pending"]:
            call_id = call["call_id"]
            if self._made.get(call_id, last_seq + 1) > last_seq:
                return f"has call {call_id} open, which is not made by seq {last_seq}"
            if self._rejected.get(call_id, last_seq + 1) <= last_seq:
                return f"has call {call_id} open, which is rejected by seq {last_seq}"
        if item["type"] == "snapshot" and item["text"] != self._text[last_seq]:
            return f"has a text of {len(item['text'])} characters, not {len(self._text[last_seq])}"
        return None


def check_state(session: SessionRecord, client: ClientRecord, timeline: Timeline) -> Iterator[Violation]:
    """Every ``welcome`` and ``snapshot`` of a v2 client."""
    if sorted(timeline) != list(range(1, len(timeline) + 1)):
        return  # Said elsewhere: the log itself has gaps.
    states = States(timeline)
    for kind, item in client.entries:
        if kind == "got" and item["type"] in ("welcome", "snapshot"):
            complaint = states.complaint(item, item["seq" if item["type"] == "snapshot" else "last_seq"])
            if complaint:
                text = f"{item['type']} {complaint}: {shorten(item)}"
                yield Violation("protocol", session.session_id, client.name, text)

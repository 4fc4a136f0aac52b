"""The v1 client: no token twice, none out of order, and none missing while its socket lived."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.check_delivery import Timeline
from tests.faults.records import ClientRecord, SessionRecord
from tests.faults.violations import Mark, Violation, mark_of, same, shorten

TYPES = frozenset(("assistant_message", "tool_call", "agent_switched", "error", "ack", "plan_update"))
"""What v1 clients know, and what the runtime of this harness passes through them."""


def check_v1_client(session: SessionRecord, client: ClientRecord, timeline: Timeline) -> Iterator[Violation]:
    """Everything that this client received, connection by connection."""
    marked = [single for _, single in sorted(timeline.items()) if single.mark is not None]
    places: dict[Mark, int] = {single.mark: place for place, single in enumerate(marked) if single.mark}
    newest_token = -1
    """The place of the newest token ever received."""
    place: int | None = None
    """The place of the last event on this connection, once that is known."""
    for index, (kind, item) in enumerate(client.entries):

        def found(rule: str, what: str, index: int = index) -> Violation:
            nearby = client.entries[max(0, index - 3) : index + 2]
            context = " | ".join(shorten(entry.value) for entry in nearby)
            return Violation(rule, session.session_id, client.name, f"{what}; around it: {context}")

        if kind != "got":
            place = None
            continue
        if item["type"] not in TYPES or "seq" in item:
            yield found("protocol", "nothing for a v1 client")
        mark = mark_of(item)
        if mark is None:
            continue
        here = places.get(mark)
        if here is None:
            yield found("lost", f"{mark} is not in the log any more")
            continue
        if not same(marked[here].fields, item):
            yield found("lost", f"the log has {shorten(marked[here].fields)}")
        is_token = item["type"] == "assistant_message" and not item["is_final"]
        if is_token and here <= newest_token:
            yield found("repeated", f"token {mark} again")
        if place is not None and here != place + 1:
            yield found("gap" if here > place else "reordered", f"{mark} after {marked[place].mark}")
        if place is None and item["type"] == "tool_call":
            continue  # Perhaps shown again because it may not have arrived: no place to continue from.
        place = here
        if is_token:
            newest_token = max(newest_token, here)

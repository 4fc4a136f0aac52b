"""v2 clients: each seq once, in order, the same for all; no gap that is not said."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.records import ClientRecord, Entry, SessionRecord
from tests.faults.violations import Single, Violation, is_event, shorten, split

Timeline = dict[int, Single]
"""A session's events by seq."""


def read_audit(session: SessionRecord) -> tuple[Timeline, list[Violation]]:
    """The session's whole log, as replayed at the end."""
    timeline: Timeline = {}
    violations: list[Violation] = []
    expected = 1
    for item in session.audit:
        if not is_event(item):
            violations.append(
                Violation("gap", session.session_id, "auditor", f"instead of a replay: {shorten(item)}")
            )
            continue
        try:
            singles = list(split(item))
        except ValueError as error:
            violations.append(Violation("lost", session.session_id, "auditor", str(error)))
            continue
        for single in singles:
            if single.seq != expected:
                text = f"seq {single.seq} where {expected} was due"
                violations.append(Violation("gap", session.session_id, "auditor", text))
            timeline[single.seq] = single
            expected = single.seq + 1
    last_seq = session.final["last_seq"] if session.final else 0
    if expected <= last_seq:
        text = f"ended before seq {last_seq}, at {expected - 1}"
        violations.append(Violation("lost", session.session_id, "auditor", text))
    return timeline, violations


def check_v2_client(session: SessionRecord, client: ClientRecord, timeline: Timeline) -> Iterator[Violation]:
    """Everything that this client received, connection by connection."""
    epoch: str | None = None
    last: int | None = None
    saw_anything = False
    resume: tuple[str, int] | None = None
    welcomed = False

    def found(rule: str, what: str, index: int) -> Violation:
        context = " | ".join(shorten(entry.value) for entry in client.entries[max(0, index - 3) : index + 2])
        return Violation(rule, session.session_id, client.name, f"{what}; around it: {context}")

    for index, (kind, item) in enumerate(client.entries):
        if kind == "connect":
            resume, welcomed, last = item, False, None
            continue
        if kind == "lost":
            continue
        name = item["type"]
        if not welcomed:
            if name != "welcome":
                yield found("protocol", "the first object is no welcome", index)
            welcomed = True
        if name == "welcome":
            if resume is not None and item["resumed"]:
                last = resume[1]
                if item["epoch"] != resume[0]:
                    yield found("gap", f"resumed in epoch {item['epoch']}, not {resume[0]}", index)
            elif resume is None:
                last, epoch, saw_anything = item["last_seq"], item["epoch"], False
            # else a snapshot must follow: until then no seq is due.
            continue
        if name == "snapshot":
            if saw_anything:
                # The store is whole and nothing is trimmed in this run, so nothing may be missing.
                yield found("lost", f"a snapshot ({item['reason']}) in place of events, epoch {epoch}", index)
            last, epoch = item["seq"], item["epoch"]
            continue
        if name in ("ack", "nack"):
            saw_anything |= name == "ack"
            continue
        if not is_event(item):
            continue
        saw_anything = True
        if last is None:
            yield found("gap", f"seq {item['seq']} without the snapshot that was due", index)
            last = item.get("first_seq", item["seq"]) - 1
        try:
            singles = list(split(item))
        except ValueError as error:
            yield found("lost", str(error), index)
            last = item["seq"]
            continue
        for single in singles:
            if single.seq <= last:
                yield found("repeated", f"seq {single.seq} again, after {last}", index)
            elif single.seq != last + 1:
                yield found("gap", f"seq {single.seq} where {last + 1} was due", index)
            known = timeline.get(single.seq)
            if known is None:
                yield found("lost", f"seq {single.seq} is not in the log any more", index)
            elif known.fields != single.fields:
                yield found("repeated", f"seq {single.seq} is {shorten(known.fields)} for others", index)
            last = single.seq


def check_caught_up(session: SessionRecord, client: ClientRecord, last_seq: int) -> Iterator[Violation]:
    """At the end of the session every client has been given all of it."""
    got = max(
        (
            entry.value.get("seq", entry.value.get("last_seq", 0))
            for entry in client.entries
            if _carries_seq(entry)
        ),
        default=0,
    )
    if got != last_seq:
        text = f"got events up to {got}, the session's last is {last_seq}"
        yield Violation("lost", session.session_id, client.name, text)


def _carries_seq(entry: Entry) -> bool:
    if entry.kind != "got":
        return False
    return is_event(entry.value) or entry.value["type"] in ("snapshot", "welcome")

"""Commits as arguments of the Redis store's functions, and what Redis holds as a ``StoredSession``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.core.events import Event
from gateway.core.packing import PackedCommit, unpack_events, unpack_message, unpack_record
from gateway.core.storage import Decision, LedgerEntry, StoredSession, TurnState

UNFINISHED = 1
"""Stored, and a turn runs or messages wait."""
FINISHED = 2
"""Stored, and neither is so."""
LOST = -3
"""Redis has less of a session than was acknowledged, or another past of it."""
REASONS = {
    -1: "the session is not known",
    -2: "its events do not follow the last one stored",
    LOST: "the store holds another past of it than this gateway does",
    -4: "a commit before it was refused",
    -5: "another node serves it now",
}
"""Why a function refused a commit."""
NO_ATTEMPT = "-"
"""In place of an attempt: nothing was committed yet."""


class CommitContext(NamedTuple):
    """What a commit's arguments need besides the commit."""

    generation: bytes
    time_to_live: int
    """Milliseconds."""
    dedupe_window: float


def commit_arguments(
    step: PackedCommit, fence: str, expected: str, attempt: str, number: int, context: CommitContext
) -> list[bytes | str | int]:
    """The arguments of ``commit``; see ``redis_functions.lua``."""
    arguments: list[bytes | str | int] = [
        fence,
        expected,
        attempt,
        number,
        step.first_seq,
        step.last_seq,
        step.trimmed_to,
        0 if step.last_event_id is None else 1,
        step.last_event_id or "",
        step.events or b"",
    ]
    commit = step.more
    if commit is None:
        return arguments
    record = commit.record
    newest = max((entry.accepted_at for entry in commit.ledger), default=0.0)
    arguments += [
        int(commit.reset),
        0 if record is None else 1,
        step.record or b"",
        int(record is not None and record.turn_state is TurnState.RUNNING),
        repr(record.touched_at if record is not None else 0.0),
        context.generation,
        context.time_to_live,
        repr(newest - context.dedupe_window),
        len(commit.queued),
    ]
    for message, packed in zip(commit.queued, step.queued, strict=True):
        arguments += [message.turn_id, packed]
    arguments += [len(commit.dequeued), *commit.dequeued, len(commit.ledger)]
    for entry in commit.ledger:
        arguments += [entry.message_id, entry.turn_id, repr(entry.accepted_at)]
    arguments.append(len(commit.decisions))
    for decision in commit.decisions:
        arguments += [decision.call_id, decision.decision, repr(decision.decided_at)]
    return arguments


class RawSession(NamedTuple):
    """What Redis answers for a session, key by key."""

    owner: bytes | None
    head: Mapping[bytes, bytes]
    events: Sequence[tuple[bytes, Sequence[bytes]]]
    queue: Mapping[bytes, bytes]
    ledger: Mapping[bytes, bytes]
    decisions: Mapping[bytes, bytes]


def stored_session(session_id: str, raw: RawSession) -> StoredSession | None:
    """The session, or None when it is not known. Raises ``UnreadablePack``."""
    if raw.owner is None:
        return None
    head = raw.head
    last_seq, trimmed_to = int(head.get(b"last_seq", b"0")), int(head.get(b"trimmed_to", b"0"))
    events: list[Event] = []
    for entry_id, fields in raw.events:
        events += unpack_events(fields[1], int(entry_id.partition(b"-")[2]))
    kept = tuple(event for event in events if event.seq > trimmed_to)
    record, last_event_id = head.get(b"record"), head.get(b"last_event_id")
    return StoredSession(
        session_id=session_id,
        owner=raw.owner.decode(),
        record=None if record is None else unpack_record(record),
        first_seq=kept[0].seq if kept else last_seq + 1,
        last_seq=last_seq,
        events=kept,
        last_event_id=None if last_event_id is None else last_event_id.decode(),
        # Fields and values begin with a position of a fixed length, so that bytes sort as they were added.
        queue=tuple(unpack_message(packed) for _, packed in sorted(raw.queue.items())),
        ledger=tuple(
            LedgerEntry(message_id, turn_id, float(accepted_at))
            for _, accepted_at, turn_id, message_id in _in_order(raw.ledger)
        ),
        decisions=tuple(
            Decision(call_id, decision, float(decided_at))
            for _, decided_at, decision, call_id in _in_order(raw.decisions)
        ),
    )


def _in_order(values: Mapping[bytes, bytes]) -> list[tuple[str, str, str, str]]:
    found = []
    for key, value in values.items():
        position, time, rest = value.decode().split(":", 2)
        found.append((position, time, rest, key.decode()))
    return sorted(found)

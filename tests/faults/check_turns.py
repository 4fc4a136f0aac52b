"""Turns: begun once, ended once, nothing after the end, and in between what the runtime emitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import Factory, define

from tests.faults.agent_runtime import Execution, Post
from tests.faults.check_delivery import Timeline
from tests.faults.records import SessionRecord
from tests.faults.violations import Single, Violation, same, shorten

OUTCOMES = frozenset(("completed", "cancelled", "failed", "interrupted", "outcome_unknown"))


@define
class Turn:
    """One turn as the log tells it."""

    turn_id: str
    message_id: str | None = None
    started: bool = False
    outcome: str | None = None
    events: list[Single] = Factory(list)
    errors: list[dict[str, Any]] = Factory(list)
    """``error`` events of the gateway's own."""

    @property
    def was_heard(self) -> bool:
        """Whether the runtime's answer reached the gateway, so that its POST came before all later ones.

        A POST whose connection died, or was cancelled, may arrive behind one on another connection.
        """
        return self.outcome == "completed" or bool(self.events)


def read_turns(session_id: str, timeline: Timeline) -> tuple[dict[str, Turn], list[Violation]]:
    """The turns by id, in order of their start; and what is wrong with their order."""
    turns: dict[str, Turn] = {}
    violations: list[Violation] = []
    running: Turn | None = None

    def found(rule: str, single: Single, what: str) -> None:
        text = f"seq {single.seq}: {what}: {shorten(single.fields)}"
        violations.append(Violation(rule, session_id, "log", text))

    for seq in sorted(timeline):
        single = timeline[seq]
        kind = single.fields["type"]
        if kind == "turn_started":
            turn = Turn(single.fields["turn_id"], single.fields.get("id"), started=True)
            if running is not None:
                found("turns", single, f"turn {running.turn_id} has not ended")
            if turn.turn_id in turns:
                found("repeated", single, "a turn that was there before")
            turns[turn.turn_id] = running = turn
        elif kind == "turn_ended":
            turn = turns.setdefault(single.fields["turn_id"], Turn(single.fields["turn_id"]))
            if turn.outcome is not None:
                found("repeated", single, "the turn had ended")
            turn.outcome = single.fields["outcome"]
            if turn.outcome not in OUTCOMES or single.fields["last_seq"] != seq - 1:
                found("protocol", single, "not a proper end")
            if turn is running:
                running = None
            elif turn.started or turn.outcome != "cancelled":
                found("turns", single, "the end of a turn that does not run")
        elif kind == "approval_resolved":
            continue
        elif running is None:
            found("turns", single, "an event after its turn's end")
        elif single.mark is not None:
            running.events.append(single)
        elif kind == "error":
            running.errors.append(single.fields)
        else:
            found("protocol", single, "an event that nobody emitted")
    if running is not None:
        text = f"turn {running.turn_id} never ended"
        violations.append(Violation("stuck", session_id, "log", text))
    return turns, violations


def check_turns(
    session: SessionRecord,
    turns: dict[str, Turn],
    posts: Sequence[Post],
    executions: Sequence[Execution],
) -> Iterator[Violation]:
    """The log against the runtime's record (``posts`` of this session, ``executions`` of all)."""
    is_resumable = session.session_id.startswith("r")

    def found(rule: str, turn_id: str, what: str) -> Violation:
        return Violation(rule, session.session_id, f"turn {turn_id}", what)

    worked: dict[str, list[int]] = {}
    order: list[str] = []
    for post in posts:
        if post.key not in worked:
            order.append(post.key)
        numbers = worked.setdefault(post.key, [])
        if post.execution not in numbers:
            numbers.append(post.execution)
        if not is_resumable and post.last_event_id is not None:
            yield found("protocol", post.key, "Last-Event-ID for a runtime that cannot resume")
    keys = [post.key for post in posts]
    for key, numbers in worked.items():
        if len(numbers) > 1 or (not is_resumable and keys.count(key) > 1):
            yield found("repeated", key, f"the work was asked for {keys.count(key)} times")
        if key not in turns:
            yield found("lost", key, "POSTed, but the log knows no such turn")
        elif not turns[key].started:
            yield found("turns", key, "POSTed, but never started")
    heard = [turn.turn_id for turn in turns.values() if turn.was_heard]
    posted = [key for key in order if key in heard]
    if [key for key in heard if key in worked] != posted:
        yield found("reordered", posted[0], f"POSTed as {posted}, started as {heard}")
    for turn in turns.values():
        numbers = worked.get(turn.turn_id, [])
        emitted = executions[numbers[0]].events if numbers else []
        yield from _check_events(session.session_id, turn, numbers, emitted)
        if turn.outcome == "completed":
            if not numbers or not executions[numbers[0]].finished or len(turn.events) != len(emitted):
                text = f"completed with {len(turn.events)} of {len(emitted)} events"
                yield found("lost", turn.turn_id, text)
        elif turn.outcome in ("failed", "interrupted", "outcome_unknown"):
            if len(turn.errors) != 1:
                yield found("protocol", turn.turn_id, f"{turn.outcome} with {len(turn.errors)} errors")
            if is_resumable and turn.events:
                # It was seen to be resumable, and the runtime could have told the rest.
                yield found("lost", turn.turn_id, f"{turn.outcome}, though its stream can be resumed")
        if turn.outcome in ("completed", "cancelled") and turn.errors:
            yield found("protocol", turn.turn_id, f"{turn.outcome} with an error: {turn.errors}")


def _check_events(
    session_id: str, turn: Turn, numbers: list[int], emitted: list[dict[str, Any]]
) -> Iterator[Violation]:
    for index, single in enumerate(turn.events):
        who = f"turn {turn.turn_id}"
        assert single.mark is not None
        execution, position = single.mark
        text = f"seq {single.seq} is event {position} of work {execution}, where {index} of {numbers} was due"
        if execution not in numbers:
            yield Violation("turns", session_id, who, f"an event of another turn: {text}")
        elif position != index:
            rule = "repeated" if position < index else "lost"
            yield Violation(rule, session_id, who, text)
        elif index >= len(emitted) or not same(emitted[index], single.fields):
            text = f"emitted {shorten(emitted[index:][:1])}, delivered {shorten(single.fields)}"
            yield Violation("lost", session_id, who, text)

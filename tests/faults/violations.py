"""What a checker finds, and what it compares: events, one by one, whatever frames they came in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = re.compile(r"⟦(\d+)\.(\d+)⟧")
NOT_EVENTS = frozenset(("welcome", "snapshot", "ack", "nack", "draining", "token_expiring", "authenticated"))


class Violation(NamedTuple):
    """One promise that was broken."""

    rule: str
    """``lost``, ``repeated``, ``reordered``, ``gap``, ``decisions``, ``turns``, ``protocol`` or ``stuck``."""
    session_id: str
    who: str
    what: str


Mark = tuple[int, int]
"""``(execution, index)`` of an event of the runtime."""


class Single(NamedTuple):
    """One event with the seq it was given."""

    seq: int
    fields: dict[str, Any]
    """Without ``seq`` and ``first_seq``."""
    mark: Mark | None
    """None: the event is the gateway's own."""


def is_event(item: dict[str, Any]) -> bool:
    """Whether a v2 object is an event of the session."""
    return item["type"] not in NOT_EVENTS


def mark_of(fields: dict[str, Any]) -> Mark | None:
    """The mark of one unmerged event."""
    found = MARK.search(fields.get("mark") or fields.get("token") or "")
    return (int(found[1]), int(found[2])) if found else None


def split(item: dict[str, Any]) -> Iterator[Single]:
    """The events that an object stands for. Raises ``ValueError`` when its seqs and tokens do not fit."""
    last = item["seq"]
    first = item.get("first_seq", last)
    fields = {name: value for name, value in item.items() if name not in ("seq", "first_seq")}
    if first == last:
        yield Single(last, fields, mark_of(fields))
        return
    starts = [found.start() for found in MARK.finditer(fields.get("token", ""))]
    if len(starts) != last - first + 1 or starts[0] != 0:
        raise ValueError(f"merged {first}…{last} holds {len(starts)} tokens: {shorten(item)}")
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
        token = {**fields, "token": fields["token"][start:end]}
        yield Single(first + number, token, mark_of(token))


def shorten(value: object) -> str:
    """For a message: the JSON of ``value``, not all of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"


def same(emitted: dict[str, Any], got: dict[str, Any]) -> bool:
    """Whether ``got`` is what the runtime emitted; an ``error`` may have gained the fields clients read."""
    if emitted["type"] == "error":
        return all(got.get(name) == value for name, value in emitted.items())
    return emitted == got

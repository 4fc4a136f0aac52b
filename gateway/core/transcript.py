"""What a run of events says: the text of an answer, tokens merged into one, a call marked as decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import msgspec
import orjson
from attrs import evolve

from gateway.core.codec import replace_field
from gateway.core.events import Event, EventKind
from gateway.core.storage import PendingCall

_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def answer_text(events: Iterable[Event]) -> str:
    """The tokens of all ``assistant_message``s among ``events``, joined."""
    return "".join(_tokens(events))


def _tokens(events: Iterable[Event]) -> Iterator[str]:
    for event in events:
        if event.kind in (EventKind.TOKEN, EventKind.AGENT):
            fields = orjson.loads(event.data)
            token = fields.get("token")
            if fields.get("type") == "assistant_message" and isinstance(token, str):
                yield token


def merge_tokens(events: Sequence[Event]) -> list[tuple[int, Event]]:
    """Join adjacent token events into one each; every entry is ``(first_seq, event)``.

    Lossless: the merged token is exactly the concatenation, the merged event stands for ``first_seq`` …
    ``event.seq``, and only events that differ in nothing but their token are merged.
    """
    merged: list[tuple[int, Event]] = []
    for is_token, run in groupby(events, lambda event: event.kind is EventKind.TOKEN):
        if is_token:
            merged.extend(_merge_run(list(run)))
        else:
            merged.extend((event.seq, event) for event in run)
    return merged


def _merge_run(run: list[Event]) -> Iterator[tuple[int, Event]]:
    if len(run) == 1:
        yield run[0].seq, run[0]
        return
    start = 0
    # Raw values: what is not the token keeps its own digits, and 1 is not taken for true.
    rest = [_raw_fields.decode(event.data) for event in run]
    tokens = [bytes(fields.pop("token"))[1:-1] for fields in rest]
    for end in range(1, len(run) + 1):
        if end < len(run) and rest[end] == rest[start]:
            continue
        if end - start == 1:
            yield run[start].seq, run[start]
        else:
            token = msgspec.Raw(b'"%b"' % b"".join(tokens[start:end]))
            data = msgspec.json.encode({**rest[start], "token": token})
            yield run[start].seq, Event(run[end - 1].seq, EventKind.TOKEN, data)
        start = end


def mark_decided(call: PendingCall, decision: str) -> PendingCall:
    """The call as a device that comes later sees it: decided, waiting for its result."""
    return evolve(call, requires_approval=False, data=replace_field(call.data, "decision", decision))

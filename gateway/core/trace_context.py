"""W3C Trace Context: which trace a request belongs to, as it was presented and as it is sent on.

Pure: fresh random bytes are an argument. What a caller sent is taken over only when it is exactly of the form
that the recommendation allows, so nothing of it can become another header or log line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from gateway.core.codec import decode_json_object
from gateway.core.errors import InvalidMessage

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}\Z")


@frozen
class TraceContext:
    """A place in a trace, as the two header fields that carry it."""

    traceparent: str
    """In version 00, which is the one that is known here."""
    tracestate: str = ""
    """What systems on the way added for themselves; empty when there is none."""


def presented_trace(headers: Iterable[tuple[str, str]]) -> TraceContext | None:
    """The trace that a request's header fields (names in lower case) belong to, or None.

    An invalid ``traceparent``, or more than one, counts as none, and without a valid one ``tracestate``
    counts for nothing (sections 3.2 and 3.3).
    """
    parents: list[str] = []
    states: list[str] = []
    for name, value in headers:
        if name == "traceparent":
            parents.append(value)
        elif name == "tracestate":
            states.append(value)
    return _trace(parents[0], ",".join(states)) if len(parents) == 1 else None


def trace_of_message(body: bytes) -> TraceContext | None:
    """The trace that a client's message (a JSON object) belongs to, by fields named as the header fields are.

    A socket has one handshake and carries many turns, each of which may belong to a trace of its own.
    """
    if b'"traceparent"' not in body:
        return None
    try:
        fields = decode_json_object(body)
    except InvalidMessage:
        return None
    parent, state = fields.get("traceparent"), fields.get("tracestate")
    if not isinstance(parent, str):
        return None
    return _trace(parent, state if isinstance(state, str) else "")


def new_trace(fresh: bytes) -> TraceContext:
    """A trace that begins here, of 24 ``fresh`` random bytes.

    Marked as sampled, as it would be if whoever is called began it.
    """
    return TraceContext(f"00-{fresh[:16].hex()}-{fresh[16:24].hex()}-01")


def _trace(parent: str, state: str) -> TraceContext | None:
    match = _TRACEPARENT.match(parent)
    if (
        match is None
        or match[1] == "ff"
        or (match[1] == "00" and match[5])
        or match[2] == "0" * 32
        or match[3] == "0" * 16
    ):
        return None
    return TraceContext(
        f"00-{match[2]}-{match[3]}-{match[4]}", state if _TRACESTATE.match(state) is not None else ""
    )

"""What an event of the Agent Runtime means: the dialects of protocol.md section 3, read into one form.

The bytes that came are kept whenever they can be. What is changed, and nothing else:

* fields of the event that are ``null`` are left out. Nested nulls stay: they are somebody's data
  (``arguments`` of a tool call, a plan, ``metadata``), where null and absent may differ;
* fields ``seq`` and ``first_seq`` are left out: the numbers are the gateway's to give;
* ``agent_switched`` gets the fields of its ``metadata`` that clients look for at the top level;
* ``error`` gets ``error`` and ``content`` with the same text, ``code`` and ``retryable``;
* an object spread over several ``data`` lines becomes one line;
* half a surrogate pair, which is no character, becomes U+FFFD: strict decoders refuse it.

Values are never re-encoded from floats or over-long integers, so every number keeps its digits.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

from gateway.core.events import EventKind
from gateway.core.sse import ServerSentEvent

MAX_DEPTH = 128
"""Nesting of an event that every encoder and decoder behind us takes (orjson writes 254 levels)."""

SkipReason = Literal["not_json", "not_object", "no_type"]


class AgentEvent(msgspec.Struct, frozen=True, gc=False):
    """An event for the session's log. A Struct because one is made per token (see ``events.Event``)."""

    kind: EventKind
    """``TOKEN`` for an ``assistant_message`` with a ``token`` that is not final, else ``AGENT``."""
    type: str
    data: bytes
    """A JSON object in UTF-8: first byte ``{``, one line, no null fields, no ``seq``. Safe to retain."""
    token: str | None = None
    """The text that an ``assistant_message`` adds to the answer, also when it is final."""
    is_final: bool = False
    """Whether an ``assistant_message`` says that the answer ends with it."""
    call_id: str | None = None
    """Of a ``tool_call``; None too when the runtime gave none, or one that is not a non-empty string."""
    requires_approval: bool = False
    """Of a ``tool_call``: whether a person has to decide before it is carried out."""


class TurnDone(NamedTuple):
    """The runtime says that the turn is over; nothing of it follows."""


class Skipped(NamedTuple):
    """An event that cannot be shown to anyone; to be counted, the stream goes on."""

    reason: SkipReason
    """Also the label of ``gateway_agent_events_skipped_total``.

    ``not_json`` covers what no decoder behind us could read: NaN, numbers beyond a double, nesting
    deeper than ``MAX_DEPTH``.
    """


def interpret(event: ServerSentEvent) -> AgentEvent | TurnDone | Skipped:
    """Say what ``event`` is. Never raises, whatever the bytes are."""
    if event.event == "done":
        return TurnDone()
    data = event.data
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        if data.strip() == b"[DONE]":
            return TurnDone()
        data = _without_half_characters(data)
        try:
            fields = orjson.loads(data)
        except orjson.JSONDecodeError:
            return Skipped("not_json")
    if type(fields) is not dict:
        return Skipped("not_object")
    type_ = fields.get("type")
    if type(type_) is not str or not type_:
        return Skipped("no_type")
    if type_ == "done":
        return TurnDone()
    if len(data) > 2 * MAX_DEPTH and _is_too_deep(fields, data):
        return Skipped("not_json")

    replaced: dict[str, bytes] = {}
    if type_ == "error":
        replaced = _error_fields(fields)
    elif type_ == "agent_switched":
        replaced = _lifted_fields(fields, data)
    if replaced or None in fields.values() or "seq" in fields or "first_seq" in fields:
        data = _rewritten(fields, data, replaced)
    elif b"\n" in data or b"\r" in data or data[0] != 0x7B or data[-1] != 0x7D:
        data = _one_line(data)

    if type_ == "assistant_message":
        token = fields.get("token")
        is_final = fields.get("is_final") is True
        if type(token) is not str:
            return AgentEvent(EventKind.AGENT, type_, data, None, is_final)
        return AgentEvent(EventKind.AGENT if is_final else EventKind.TOKEN, type_, data, token, is_final)
    if type_ == "tool_call":
        call_id = fields.get("call_id")
        return AgentEvent(
            EventKind.AGENT,
            type_,
            data,
            call_id=call_id if type(call_id) is str and call_id else None,
            requires_approval=fields.get("requires_approval") is True,
        )
    return AgentEvent(EventKind.AGENT, type_, data)


_LIFTED = ("from_agent", "to_agent", "reason", "confidence")

_HALF_CHARACTER = re.compile(
    rb"\\\\"  # an escaped backslash: what follows it is not an escape
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)

_NUMBERS = frozenset(("seq", "first_seq"))

# Values that decoding and encoding gives back as they were; orjson reads integers over 64 bit as floats.
_KEPT_BY_ORJSON = frozenset((str, bool, int, type(None)))

_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _without_half_characters(data: bytes) -> bytes:
    return _HALF_CHARACTER.sub(lambda match: match[0] if match[1] is None else rb"\ufffd", data)


def _is_too_deep(fields: dict[str, Any], data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    level: list[Any] = [fields]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _one_line(data: bytes) -> bytes:
    """Line ends in valid JSON are never inside a string, so a space does as well."""
    return data.replace(b"\n", b" ").replace(b"\r", b" ").strip()


def _rewritten(fields: dict[str, Any], data: bytes, replaced: dict[str, bytes]) -> bytes:
    """The object without null fields and our numbers, with the JSON values of ``replaced``."""
    if not replaced and _KEPT_BY_ORJSON.issuperset(map(type, fields.values())):
        # Runtimes that send "content": null in every token pay 0.5 µs for it here, 2.5 µs below.
        encoded = orjson.dumps(
            {name: value for name, value in fields.items() if value is not None and name not in _NUMBERS}
        )
        # A copy, because a retained result of dumps pins 4 KB: 20 000 tokens held 80 MB, copied 3 MB.
        return encoded[:-1] + b"}"
    raw_fields = _raw_fields.decode(data)
    values = {name: bytes(raw) for name, raw in raw_fields.items() if name not in _NUMBERS} | replaced
    joined = b",".join(
        b"%b:%b" % (orjson.dumps(name), value) for name, value in values.items() if value != b"null"
    )
    return _one_line(b"{%b}" % joined)


def _error_fields(fields: dict[str, Any]) -> dict[str, bytes]:
    """What an ``error`` event lacks of the form that clients of both generations can read."""
    text = _error_text(fields)
    wanted: dict[str, Any] = {name: text for name in ("error", "content") if fields.get(name) != text}
    if not (type(fields.get("code")) is str and fields["code"]):
        wanted["code"] = "AGENT_ERROR"
    if type(fields.get("retryable")) is not bool:
        wanted["retryable"] = False
    return {name: orjson.dumps(value) for name, value in wanted.items()}


def _error_text(fields: dict[str, Any]) -> str:
    """The first text there is: ``error``, ``error.message``, ``content``, ``message``."""
    error = fields.get("error")
    nested = error.get("message") if type(error) is dict else None
    for text in (error, nested, fields.get("content"), fields.get("message")):
        if type(text) is str and text:
            return text
    return "The agent reported an error without saying which."


def _lifted_fields(fields: dict[str, Any], data: bytes) -> dict[str, bytes]:
    """The JSON of what ``metadata`` has and the top level of an ``agent_switched`` lacks."""
    metadata = fields.get("metadata")
    if type(metadata) is not dict:
        return {}
    names = [name for name in _LIFTED if fields.get(name) is None and metadata.get(name) is not None]
    if not names:
        return {}
    nested = _raw_fields.decode(_raw_fields.decode(data)["metadata"])
    return {name: bytes(nested[name]) for name in names}

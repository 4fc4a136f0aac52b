"""Bytes ↔ values: the one strict decoder, and the encoders. Sole owner of JSON and MessagePack.

Strict means RFC 8259 plus what it leaves open: UTF-8 only, no NaN or Infinity, no lone surrogates, no
duplicate keys (two readers of one message must not see two messages), nesting at most ``MAX_DEPTH``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NoReturn

import msgspec
import orjson

from gateway.core.errors import InvalidMessage

MAX_DEPTH = 64
"""Deep enough for any tool's arguments; far below where a recursive reader downstream would fail."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = re.compile(rb"[^\[\]{}]+")
_INNERMOST = re.compile(rb"\[\]|\{\}")


class _DuplicateKey(ValueError):
    pass


def decode_json(data: bytes | str) -> object:
    """Decode one JSON text strictly. Raises ``InvalidMessage`` whose text begins ``Invalid JSON message``."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if _depth_exceeds(raw, MAX_DEPTH):
        raise InvalidMessage(f"Invalid JSON message: nested deeper than {MAX_DEPTH} levels.")
    try:
        value: object = orjson.loads(raw)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise InvalidMessage(f"Invalid JSON message: {_first_line(error)}.") from None
    # orjson keeps the last of two equal keys and has no hook; the standard library has one. Without a
    # colon there is no key, and with one colon no pair of keys, so the second pass is often saved.
    if raw.count(b":") > 1:
        try:
            _DUPLICATE_FINDER.decode(raw.decode())
        except _DuplicateKey as error:
            raise InvalidMessage(f"Invalid JSON message: duplicate key {error}.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidMessage(f"Invalid JSON message: {_first_line(error)}.") from None
    return value


def decode_json_object(data: bytes | str) -> dict[str, object]:
    """Decode one JSON object strictly. Raises ``InvalidMessage``; for another JSON value too."""
    value = decode_json(data)
    if not isinstance(value, dict):
        raise InvalidMessage("Invalid JSON message: a message is a JSON object.")
    return value


def decode_json_frame(data: bytes | str) -> list[tuple[dict[str, object], bytes]]:
    """Decode a v2 JSON frame: one object or an array of them, each with its own JSON bytes.

    Raises ``InvalidMessage``.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    value = decode_json(raw)
    if isinstance(value, dict):
        return [(value, raw.strip())]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise InvalidMessage("Invalid JSON message: a frame is an object or a non-empty array of objects.")
    parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return [(item, bytes(part)) for item, part in zip(value, parts, strict=True)]


def decode_msgpack_frame(data: bytes) -> list[tuple[dict[str, object], bytes]]:
    """Decode a v2 MessagePack frame into the same pairs as ``decode_json_frame``; raises ``InvalidMessage``.

    What JSON cannot say (binary, extension and timestamp types, NaN, keys that are not strings) is refused:
    the Agent Runtime is sent JSON.
    """
    try:
        value = msgspec.msgpack.decode(data, ext_hook=_refuse_extension)
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_refuse)
        _refuse_other_keys(value)
        raw = text.encode()
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise InvalidMessage(f"Invalid MessagePack message: {_first_line(error)}.") from None
    return decode_json_frame(raw)


def encode_json(value: Mapping[str, object] | list[object]) -> bytes:
    """Encode compactly as UTF-8.

    The copy frees orjson's own buffer: a retained result pins about 4 KB however short it is (20 000
    retained events of 90 bytes: 84 MB). A bytes slice would be the same object, hence the bytearray.
    """
    try:
        return bytes(bytearray(orjson.dumps(value)))
    except orjson.JSONEncodeError:
        # Integers over 64 bits: orjson refuses them, JSON does not.
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def decode_event_frame(data: bytes | str) -> list[dict[str, object]]:
    """Decode a frame of the gateway's: an object or an array of them, JSON as text or MessagePack as bytes.

    For clients, and laxer than what guards the way in: an Agent Runtime's events come through with their own
    bytes, so they may nest deeper than ours and repeat keys. Raises ``InvalidMessage``.
    """
    try:
        value = orjson.loads(data) if isinstance(data, str) else msgspec.msgpack.decode(data)
    except (orjson.JSONDecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"The gateway sent what cannot be decoded: {_first_line(error)}.") from None
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, dict) for item in items):
        raise InvalidMessage("The gateway sent a frame that is neither an object nor an array of objects.")
    return items


def replace_field(data: bytes, name: str, value: str) -> bytes:
    """The JSON object ``data`` with its top-level field ``name`` set to ``value``.

    All other values keep their own bytes, so that no number loses precision on the way.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    fields[name] = msgspec.Raw(msgspec.json.encode(value))
    return msgspec.json.encode(fields)


def json_to_msgpack(data: bytes) -> bytes:
    """The MessagePack form of a JSON text of ours (trusted; big integers become floats)."""
    return msgspec.msgpack.encode(orjson.loads(data))


def is_nested_deeper(data: bytes, limit: int) -> bool:
    """Whether brackets in ``data`` nest deeper than ``limit``; says False of unbalanced ones."""
    return _depth_exceeds(data, limit)


def _depth_exceeds(data: bytes, limit: int) -> bool:
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    # All at C speed: drop strings, keep brackets, then peel the innermost pairs once per level.
    brackets = _NOT_BRACKETS.sub(b"", _STRINGS.sub(b"", data))
    for _ in range(limit):
        # Both kinds in one pass: after a pass of its own for each, {[]} would count as one level.
        peeled = _INNERMOST.sub(b"", brackets)
        if len(peeled) == len(brackets):
            # Unbalanced, or nothing left: the parser says which. Only a long run of openers can still
            # be deep, and it must not reach a recursive parser.
            return len(brackets) > limit
        brackets = peeled
    return bool(brackets)


def _find_duplicates(pairs: list[tuple[str, object]]) -> None:
    seen = {key for key, _ in pairs}
    if len(seen) != len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise _DuplicateKey(json.dumps(repeated[:64]))


# Built once: a decoder object is a constant, and building it per message costs more than small messages.
_DUPLICATE_FINDER = json.JSONDecoder(
    object_pairs_hook=_find_duplicates, parse_int=lambda _: 0, parse_float=lambda _: 0.0
)


def _refuse_extension(code: int, _data: memoryview) -> NoReturn:
    raise ValueError(f"extension type {code} has no JSON form")


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refuse_other_keys(value: object) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                raise TypeError("map keys must be strings")
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200].rstrip(".")

"""Bytes ↔ values: the one strict decoder, and the encoders. Sole owner of JSON and MessagePack.

Strict means RFC 8259 plus what it leaves open: UTF-8 only, no NaN or Infinity, no lone surrogates, no
duplicate keys (two readers of one message must not see two messages), nesting at most ``MAX_DEPTH``, and
no more memory for the values than ``structure`` allows for the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn

import msgspec
import orjson

from gateway.core.errors import InvalidMessage
from gateway.core.structure import (
    is_nested_deeper,
    messagepack_takes_too_much,
    outside_strings,
    takes_too_much,
)

MAX_DEPTH = 64
"""Deep enough for any tool's arguments; far below where a recursive reader downstream would fail."""
MAX_MESSAGES = 256
"""Messages in one frame. A client that comes back may send all that it had queued, and the queue is 64."""

_NAMED_UP_TO = 64 * 2**10
"""Bytes of a message up to which a refusal names the key that came twice: finding it takes long."""


class _DuplicateKey(ValueError):
    pass


def decode_json(data: bytes | str) -> object:
    """Decode one JSON text strictly. Raises ``InvalidMessage`` whose text begins ``Invalid JSON message``."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if takes_too_much(raw):
        raise InvalidMessage("Invalid JSON message: it holds too many values; send it in parts.")
    if is_nested_deeper(raw, MAX_DEPTH):
        raise InvalidMessage(f"Invalid JSON message: nested deeper than {MAX_DEPTH} levels.")
    try:
        # msgspec, because orjson takes twelve times the text before it makes the first value.
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMessage(f"Invalid JSON message: {_first_line(error)}.") from None
    # Decoders keep the last of two equal keys. With none or one there is nothing to compare.
    if raw.count(b":") > 1 and _count_keys(raw) != _count_keys(msgspec.json.encode(value)):
        raise InvalidMessage(f"Invalid JSON message: duplicate key{_name_duplicate(raw)}.")
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
    return _messages_of(decode_json(raw), raw)


def _messages_of(value: object, raw: bytes) -> list[tuple[dict[str, object], bytes]]:
    if isinstance(value, dict):
        return [(value, raw.strip())]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise InvalidMessage("Invalid JSON message: a frame is an object or a non-empty array of objects.")
    if len(value) > MAX_MESSAGES:
        raise InvalidMessage(f"Invalid JSON message: a frame holds at most {MAX_MESSAGES} messages.")
    parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return [(item, bytes(part)) for item, part in zip(value, parts, strict=True)]


def decode_msgpack_frame(data: bytes) -> list[tuple[dict[str, object], bytes]]:
    """Decode a v2 MessagePack frame into the same pairs as ``decode_json_frame``; raises ``InvalidMessage``.

    What JSON cannot say (binary, extension and timestamp types, NaN, keys that are not strings) is refused:
    the Agent Runtime is sent JSON.
    """
    if messagepack_takes_too_much(data):
        raise InvalidMessage("Invalid MessagePack message: it holds too many values; send it in parts.")
    try:
        value = msgspec.msgpack.decode(data, ext_hook=_refuse_extension)
        raw = _json_of(value, may_hold_floats=b"\xca" in data or b"\xcb" in data)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise InvalidMessage(f"Invalid MessagePack message: {_first_line(error)}.") from None
    if is_nested_deeper(raw, MAX_DEPTH):
        raise InvalidMessage(f"Invalid MessagePack message: nested deeper than {MAX_DEPTH} levels.")
    return _messages_of(value, raw)


def _json_of(value: object, *, may_hold_floats: bool) -> bytes:
    # orjson refuses keys that are not strings, and all types that JSON has not, but NaN becomes null.
    raw = orjson.dumps(value, option=orjson.OPT_PASSTHROUGH_DATETIME)
    if not may_hold_floats:
        return raw
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


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


def split_batch(data: bytes) -> list[bytes]:
    """The values of a JSON array of our own making, each as it stands in it."""
    return [bytes(value) for value in msgspec.json.decode(data, type=list[msgspec.Raw])]


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


def _count_keys(text: bytes) -> int:
    return outside_strings(text).count(b":")


def _name_duplicate(raw: bytes) -> str:
    if len(raw) > _NAMED_UP_TO:
        return ""
    try:
        _DUPLICATE_FINDER.decode(raw.decode())
    except _DuplicateKey as found:
        return f" {found}"
    return ""


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


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200].rstrip(".")

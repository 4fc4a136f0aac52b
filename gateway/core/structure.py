"""How deep a message is and how much it would take once decoded, told from its bytes, before it is decoded.

A megabyte of ``[],[],[],…`` is twenty-five once it is Python objects. Everything here works at the speed of
``bytes.count`` and in memory of about the message's size.
"""

from __future__ import annotations

from typing import Final

COST_PER_BYTE: Final = 7
"""What a message may cost for each of its bytes."""
FREE_COST: Final = 7 * 2**20
"""What any message may cost, however small: what takes little is not worth refusing."""

_ELEMENT: Final = 40
_ARRAY: Final = 96
_OBJECT: Final = 232
_STRING: Final = 40
_MEMBER: Final = 40
_WIDE_MEMBER: Final = 60
_SMALL_OBJECT: Final = 5
"""Bytes of CPython objects: a place in a container with a number in it; a list of one; a dict of up to
``_SMALL_OBJECT`` members; what a string has over a number; a key; a member's place in a larger dict."""

_CHUNK: Final = 64 * 2**10
_ONLY_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def outside_strings(text: bytes) -> bytes:
    """The JSON ``text`` without its strings. What it gives for invalid JSON is of no meaning."""
    if b"\\" in text:
        # Backslashes stand in strings only, where from the left every two make one character.
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if len(text) <= _CHUNK:
        return b"".join(text.split(b'"')[::2])
    # In chunks, because a list of small pieces is large itself.
    outside, inside = bytearray(), False
    for start in range(0, len(text), _CHUNK):
        pieces = text[start : start + _CHUNK].split(b'"')
        outside += b"".join(pieces[inside::2])
        inside ^= len(pieces) % 2 == 0
    return bytes(outside)


def is_nested_deeper(text: bytes, limit: int) -> bool:
    """Whether brackets in the JSON ``text`` nest deeper than ``limit``; or may, when they are unbalanced."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    # Peel the innermost pairs, once per level; which bracket fits which is the parser's matter.
    brackets = outside_strings(text).translate(_ONLY_SQUARE, _NOT_BRACKETS)
    for _ in range(limit):
        peeled = brackets.replace(b"[]", b"")
        if len(peeled) == len(brackets):
            # Unbalanced, or nothing left. Only a long run of openers can still be deep.
            return len(brackets) > limit
        brackets = peeled
    return bool(brackets)


def takes_too_much(text: bytes) -> bool:
    """Whether the JSON ``text`` would take more memory than it may once it is decoded."""
    # Two bytes are the least for an object, and nothing costs more.
    if len(text) * _OBJECT // 2 <= FREE_COST:
        return False
    allowed = max(FREE_COST, COST_PER_BYTE * len(text))
    # What stands in strings is counted too, so that most messages need no second look.
    return _json_cost(text, text) > allowed and _json_cost(outside_strings(text), text) > allowed


def _json_cost(outside: bytes, text: bytes) -> int:
    objects, members = outside.count(b"{"), outside.count(b":")
    strings = max(0, (text.count(b'"') - text.count(b'\\"')) // 2 - members)
    return (
        _ELEMENT * outside.count(b",")
        + _ARRAY * outside.count(b"[")
        + _OBJECT * objects
        + _STRING * strings
        + _MEMBER * members
        + _WIDE_MEMBER * max(0, members - _SMALL_OBJECT * objects)
    )


def messagepack_takes_too_much(data: bytes) -> bool:
    """Whether a MessagePack value would take more memory than it may once it is decoded.

    Says False of what is no MessagePack: that is for the decoder to say.
    """
    # Even as nothing but empty maps, one a byte.
    if len(data) * _OBJECT <= FREE_COST:
        return False
    left = max(FREE_COST, COST_PER_BYTE * len(data))
    position, end = 0, len(data)
    while position < end:
        first = data[position]
        cost, size = _FIRST_BYTE[first]
        if size < 0:  # that many bytes of length follow
            start, position = position + 1, position + 1 - size
            if position > end:
                return False
            length = int.from_bytes(data[start:position], "big")
            # Strings and binary are that long; arrays and maps have that many values, which come next.
            position += length if cost == _ELEMENT + _STRING else 0
            if first in _MAPS:
                cost += _WIDE_MEMBER * length
        else:
            position += size
        left -= cost
        if left < 0:
            return True
    return False


def _first_bytes() -> list[tuple[int, int]]:
    """By a value's first byte: its cost, and its whole size or minus the bytes of length that follow."""
    string = _ELEMENT + _STRING
    table = [(_ELEMENT, 1)] * 256
    table[0x80:0x90] = [(_ELEMENT + _OBJECT, 1)] * 16
    table[0x90:0xA0] = [(_ELEMENT + _ARRAY, 1)] * 16
    table[0xA0:0xC0] = [(string, 1 + length) for length in range(32)]
    table[0xC4:0xC7] = [(string, -width) for width in (1, 2, 4)]
    table[0xC7:0xCA] = [(string, -width) for width in (1, 2, 4)]
    for code, size in ((0xCA, 5), (0xCB, 9), (0xCC, 2), (0xCD, 3), (0xCE, 5), (0xCF, 9)):
        table[code] = (_ELEMENT, size)
    table[0xD0:0xD4] = [(_ELEMENT, size) for size in (2, 3, 5, 9)]
    table[0xD4:0xD9] = [(_ELEMENT, 2 + size) for size in (1, 2, 4, 8, 16)]
    table[0xD9:0xDC] = [(string, -width) for width in (1, 2, 4)]
    table[0xDC:0xDE] = [(_ELEMENT + _ARRAY, -width) for width in (2, 4)]
    table[0xDE:0xE0] = [(_ELEMENT + _OBJECT, -width) for width in (2, 4)]
    return table


_FIRST_BYTE: Final = _first_bytes()
_MAPS: Final = frozenset((0xDE, 0xDF))

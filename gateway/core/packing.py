"""Stored values as bytes: what a store keeps in its cells, the same for every store.

Every packed value begins with one byte that names its format, so that a later version can read what an
earlier one wrote. Numbers are little-endian.

Events (format 1): the number of events (4 bytes), one kind byte per event, one 4-byte length per event,
then the events' data end to end. Seqs are not written: they are consecutive, and whoever stores a pack
knows the last one. A ``SessionRecord`` and a ``QueuedMessage`` (format 1) are a MessagePack map by field
name; fields that are added later need a default, fields that are gone are passed over when read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from gateway.core.events import Event, EventKind
from gateway.core.storage import QueuedMessage, SessionCommit, SessionRecord

Value = TypeVar("Value")

_FORMAT = 1
_HEAD = struct.Struct("<BI")
ONE_EVENT_HEAD = "BIBI"
"""What stands before the data in a pack of one event, which most are (see ``one_event_head``)."""
_ONE = struct.Struct("<" + ONE_EVENT_HEAD)
_FORMAT_BYTE = bytes((_FORMAT,))
_KINDS = tuple(EventKind)


class UnreadablePack(ValueError):
    """Bytes that no version of this format wrote, or that a newer one did."""


def one_event_head(event: Event) -> tuple[int, int, int, int]:
    """Format, count, kind and length: the fields of ``ONE_EVENT_HEAD`` for a pack of this one event."""
    return _FORMAT, 1, event.kind, len(event.data)


def pack_events(events: Sequence[Event]) -> bytes:
    """Pack consecutive events. Raises ``ValueError`` when there is none or their seqs have a gap."""
    count = len(events)
    if count == 1:
        event = events[0]
        return _ONE.pack(*one_event_head(event)) + event.data
    if not count:
        raise ValueError("a pack holds at least one event")
    seq = events[0].seq
    for expected, event in enumerate(events, seq):
        if event.seq != expected:
            raise ValueError(f"seq {event.seq} where {expected} was due")
    payloads = [event.data for event in events]
    return b"".join(
        (
            _HEAD.pack(_FORMAT, count),
            bytes([event.kind for event in events]),
            struct.pack(f"<{count}I", *map(len, payloads)),
            *payloads,
        )
    )


def unpack_events(packed: bytes, last_seq: int) -> list[Event]:
    """The events of a pack whose newest has ``last_seq``, oldest first. Raises ``UnreadablePack``."""
    try:
        version, count = _HEAD.unpack_from(packed)
        if version != _FORMAT:
            raise UnreadablePack(f"events in format {version}, this version reads format {_FORMAT}")
        kinds = packed[_HEAD.size : _HEAD.size + count]
        lengths = struct.unpack_from(f"<{count}I", packed, _HEAD.size + count)
    except struct.error as error:
        raise UnreadablePack(f"a pack of events that is cut short: {error}") from None
    start = _HEAD.size + 5 * count
    if start + sum(lengths) != len(packed) or max(kinds, default=0) >= len(_KINDS):
        raise UnreadablePack("a pack of events whose lengths or kinds do not hold together")
    events = []
    for seq, kind, length in zip(range(last_seq - count + 1, last_seq + 1), kinds, lengths, strict=True):
        events.append(Event(seq, _KINDS[kind], packed[start : start + length]))
        start += length
    return events


def pack_record(record: SessionRecord) -> bytes:
    """Pack a session's record. Raises ``ValueError`` for text that is not Unicode (lone surrogates)."""
    return _FORMAT_BYTE + msgspec.msgpack.encode(record)


def unpack_record(packed: bytes) -> SessionRecord:
    """Read a session's record. Raises ``UnreadablePack``."""
    return _unpack(packed, SessionRecord)


def pack_message(message: QueuedMessage) -> bytes:
    """Pack a queued message. Raises ``ValueError`` for text that is not Unicode (lone surrogates)."""
    return _FORMAT_BYTE + msgspec.msgpack.encode(message)


def unpack_message(packed: bytes) -> QueuedMessage:
    """Read a queued message. Raises ``UnreadablePack``."""
    return _unpack(packed, QueuedMessage)


class PackedCommit(msgspec.Struct, frozen=True):
    """One ``SessionCommit`` with everything packed that a store keeps packed."""

    session_id: str
    first_seq: int
    """0 without events."""
    last_seq: int
    trimmed_to: int
    """0 when nothing is trimmed."""
    last_event_id: str | None
    events: bytes | None
    more: SessionCommit | None
    """The commit itself when it changes more than events, which is rare."""
    record: bytes | None = None
    queued: tuple[bytes, ...] = ()


def pack_commit(commit: SessionCommit) -> PackedCommit:
    """Pack a commit. Raises ``ValueError`` for events that are not consecutive and text that is not Unicode.

    What this lets through can be stored, so that one session's bad commit is found before it is in one
    transaction with others.
    """
    events, last_event_id = commit.events, commit.last_event_id
    if last_event_id is not None:
        last_event_id.encode()
    first_seq, last_seq, packed = (
        (events[0].seq, events[-1].seq, pack_events(events)) if events else (0, 0, None)
    )
    trimmed_to = commit.trimmed_to or 0
    if commit.is_of_events:
        return PackedCommit(commit.session_id, first_seq, last_seq, trimmed_to, last_event_id, packed, None)
    for text in commit.dequeued:
        text.encode()
    for entry in commit.ledger:
        f"{entry.message_id}{entry.turn_id}".encode()
    for decision in commit.decisions:
        f"{decision.call_id}{decision.decision}".encode()
    return PackedCommit(
        commit.session_id,
        first_seq,
        last_seq,
        trimmed_to,
        last_event_id,
        packed,
        commit,
        None if commit.record is None else pack_record(commit.record),
        tuple(map(pack_message, commit.queued)),
    )


def _unpack(packed: bytes, kind: type[Value]) -> Value:
    if packed[:1] != _FORMAT_BYTE:
        raise UnreadablePack(f"a {kind.__name__} in a format that this version does not read")
    try:
        return msgspec.msgpack.decode(memoryview(packed)[1:], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadablePack(f"a {kind.__name__} that cannot be read: {type(error).__name__}") from None

"""``gateway.core.packing``: what goes in comes out, and what is damaged is said to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.events import Event, EventKind
from gateway.core.packing import (
    UnreadablePack,
    pack_events,
    pack_message,
    pack_record,
    unpack_events,
    unpack_message,
    unpack_record,
)
from gateway.core.storage import PendingCall, QueuedMessage, SessionRecord, TurnState

MESSAGE = QueuedMessage(
    turn_id="turn-1",
    message_id=None,
    overtakes=True,
    body=b'{"type":"tool_result","result":"\xc3\xa9"}',
    subject="ada",
    request_id="request-1",
    accepted_at=1700000000.25,
)
RECORD = SessionRecord(
    epoch="e1",
    touched_at=12.5,
    turn_id="turn-1",
    turn_state=TurnState.AWAITING_APPROVAL,
    turn_first_seq=7,
    turn_message=MESSAGE,
    resumable=True,
    unsent=True,
    pending=(PendingCall("call-1", True, b"{}"), PendingCall("call-2", False, b'{"a":1}')),
    text_prefix="naïve ☃ 🂡",
)

kinds_and_data = st.lists(st.tuples(st.sampled_from(EventKind), st.binary(max_size=300)), min_size=1)


@given(first=st.integers(1, 1 << 35), content=kinds_and_data)
def test_events_survive_a_round_trip(first: int, content: list[tuple[EventKind, bytes]]) -> None:
    """Consecutive events of every kind and content come back as they were."""
    events = [Event(first + at, kind, data) for at, (kind, data) in enumerate(content)]

    assert unpack_events(pack_events(events), events[-1].seq) == events


def test_an_event_kind_comes_back_as_its_enum() -> None:
    """A kind is read as the ``EventKind`` that it was, not as a bare number."""
    (event,) = unpack_events(pack_events([Event(1, EventKind.CANCELLED, b"{}")]), 1)

    assert event.kind is EventKind.CANCELLED


@pytest.mark.parametrize("seqs", [(), (1, 3), (2, 1), (1, 1)])
def test_events_with_a_gap_are_not_packed(seqs: tuple[int, ...]) -> None:
    """What is not a run of consecutive seqs is refused: the seqs are not written and could not come back."""
    with pytest.raises(ValueError, match=r"seq|at least one"):
        pack_events([Event(seq, EventKind.TOKEN, b"{}") for seq in seqs])


@given(content=kinds_and_data, cut=st.integers(0, 10_000))
def test_a_cut_pack_is_unreadable(content: list[tuple[EventKind, bytes]], cut: int) -> None:
    """No prefix of a pack is taken for a pack."""
    packed = pack_events([Event(at, kind, data) for at, (kind, data) in enumerate(content, 1)])

    with pytest.raises(UnreadablePack):
        unpack_events(packed[: cut % len(packed)], 1)


@given(st.binary(max_size=60))
def test_rubbish_is_unreadable_or_events_but_never_another_error(rubbish: bytes) -> None:
    """Whatever bytes are found, the one error that is raised is ``UnreadablePack``."""
    for unpack in (lambda: unpack_events(rubbish, 9), lambda: unpack_record(rubbish)):
        try:
            unpack()
        except UnreadablePack:
            continue


def test_a_record_survives_a_round_trip() -> None:
    """Every field of a record comes back, nested message, calls and enum included."""
    assert unpack_record(pack_record(RECORD)) == RECORD


def test_a_record_of_defaults_survives_a_round_trip() -> None:
    """A record with nothing but an epoch comes back."""
    record = SessionRecord(epoch="e", touched_at=0.0)

    assert unpack_record(pack_record(record)) == record


def test_a_message_survives_a_round_trip() -> None:
    """Every field of a queued message comes back."""
    assert unpack_message(pack_message(MESSAGE)) == MESSAGE


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"\x02" + pack_record(RECORD)[1:], pack_record(RECORD)[:-1]]
)
def test_a_record_of_another_format_or_cut_short_is_unreadable(damage: bytes) -> None:
    """A format byte of no known version, or missing bytes, are told apart from a record."""
    with pytest.raises(UnreadablePack):
        unpack_record(damage)


def test_events_of_a_newer_format_are_unreadable() -> None:
    """The version byte is looked at before anything else."""
    packed = pack_events([Event(1, EventKind.TOKEN, b"{}")])

    with pytest.raises(UnreadablePack, match="format 2"):
        unpack_events(b"\x02" + packed[1:], 1)


def test_text_that_is_not_unicode_is_refused_when_packed() -> None:
    """A lone surrogate, which JSON can smuggle in, is a ``ValueError`` and never reaches a store."""
    with pytest.raises(ValueError, match="surrogates"):
        pack_record(SessionRecord(epoch="e", touched_at=0.0, text_prefix="\ud800"))


def test_an_unreadable_pack_does_not_quote_what_was_in_it() -> None:
    """The error is fit for a log: it holds no content."""
    with pytest.raises(UnreadablePack) as caught:
        unpack_message(pack_message(MESSAGE)[:-5] + b"secret")

    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None

"""The numbered events of a session, against the plainest model of them: a dict."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.core.event_log import EVENT_OVERHEAD, EventLog
from gateway.core.events import Event, EventKind


def filled(count: int) -> EventLog:
    """A log of ``count`` one-byte events."""
    log = EventLog()
    for _ in range(count):
        log.append(EventKind.TOKEN, b"x")
    return log


class LogFollowsDict(RuleBasedStateMachine):
    """Appends and trims in any order; everything that can be asked is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.log = EventLog()
        self.model: dict[int, Event] = {}
        self.last = 0

    @rule(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6))
    def append(self, sizes: list[int]) -> None:
        """New events."""
        for size in sizes:
            self.last += 1
            assert self.log.append(EventKind.AGENT, b"x" * size) == self.last
            self.model[self.last] = Event(self.last, EventKind.AGENT, b"x" * size)

    @rule(back=st.integers(-1, 12))
    def trim(self, back: int) -> None:
        """Old events go."""
        seq = self.last - back
        dropped = self.log.trim_to(seq)
        expected = [event for key, event in self.model.items() if key <= seq]
        assert dropped == expected
        for event in dropped:
            del self.model[event.seq]

    @rule()
    def reload(self) -> None:
        """What a store keeps gives the same log."""
        self.log = EventLog(last_seq=self.last, events=list(self.model.values()))

    @invariant()
    def same(self) -> None:
        """All views of both agree."""
        log, model = self.log, self.model
        first = min(model, default=self.last + 1)
        assert (log.first_seq, log.last_seq, len(log)) == (first, self.last, len(model))
        assert log.held_bytes == sum(len(event.data) + EVENT_OVERHEAD for event in model.values())
        if model:
            assert log.newest == model[self.last]
        for seq in range(max(0, first - 3), self.last + 1):
            assert log.holds_after(seq) == (first - 1 <= seq <= self.last)
            after = [event for key, event in model.items() if key > seq]
            assert log.bytes_after(seq) == sum(len(event.data) + EVENT_OVERHEAD for event in after)
            for upto in (seq, seq + 2, self.last):
                part = [event for event in after if event.seq <= upto]
                assert log.between(seq, upto) == part
                if upto <= self.last:
                    assert log.bytes_between(seq, upto) == sum(
                        len(event.data) + EVENT_OVERHEAD for event in part
                    )


TestLogFollowsDict = LogFollowsDict.TestCase
TestLogFollowsDict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_seqs_rise_by_one_from_1() -> None:
    """The first event is 1, and each next is one more, also over a trim."""
    log = filled(3)
    log.trim_to(3)
    assert log.append(EventKind.AGENT, b"{}") == 4
    assert [event.seq for event in log.between(0, 9)] == [4]


def test_a_log_that_is_loaded_empty_goes_on_where_it_was() -> None:
    """All events trimmed is not the same as none ever made."""
    log = EventLog(last_seq=41)
    assert (log.first_seq, log.holds_after(41), log.holds_after(40)) == (42, True, False)
    assert log.append(EventKind.AGENT, b"{}") == 42


@pytest.mark.parametrize(("count", "size"), [(100, 1), (5, 1000)])
def test_overflow_leaves_a_tenth_to_spare(count: int, size: int) -> None:
    """Over either bound, what is dropped makes room for a tenth, so that it is not done per event."""
    log = EventLog()
    for _ in range(count):
        log.append(EventKind.TOKEN, b"x" * size)
    bound = count * (size + EVENT_OVERHEAD)
    assert log.overflow(count, bound) is None
    by_count = log.overflow(count - 1, bound)
    assert by_count is not None
    assert log.last_seq - by_count <= (count - 1) * 9 // 10
    by_bytes = log.overflow(count, bound - 1)
    assert by_bytes is not None
    assert log.bytes_after(by_bytes) <= bound * 9 // 10


def test_one_event_over_the_byte_bound_is_kept_all_the_same() -> None:
    """The newest event is never dropped for its size: somebody has yet to see it."""
    log = EventLog()
    for expected in (0, 1, 2):
        log.append(EventKind.AGENT, b"x" * 10_000)
        seq = log.overflow(10, 100)
        assert seq == expected
        log.trim_to(seq)

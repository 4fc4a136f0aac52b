"""Token buckets, with time as a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import RateLimited
from gateway.core.rate_limit import RateLimiter, address_caller, subject_caller


def _allowed(limiter: RateLimiter, caller: str, now: float, attempts: int) -> int:
    passed = 0
    for _ in range(attempts):
        try:
            limiter.check(caller, now)
        except RateLimited:
            continue
        passed += 1
    return passed


def test_a_burst_of_one_minutes_worth_passes() -> None:
    """A caller may use a whole minute's worth at once, and no more."""
    assert _allowed(RateLimiter(10), "a", 100.0, 50) == 10


def test_the_average_is_kept_after_a_burst() -> None:
    """After a burst a token comes back every sixtieth of the minute's worth."""
    limiter = RateLimiter(10)
    _allowed(limiter, "a", 0.0, 10)

    assert _allowed(limiter, "a", 5.9, 5) == 0
    assert _allowed(limiter, "a", 6.0, 5) == 1
    assert _allowed(limiter, "a", 18.0, 5) == 2
    assert _allowed(limiter, "a", 10_000.0, 50) == 10


def test_a_refusal_says_when_to_come_back() -> None:
    """Coming back after ``retry_after`` succeeds; just before it fails."""
    limiter = RateLimiter(30)
    _allowed(limiter, "a", 0.0, 30)

    with pytest.raises(RateLimited) as caught:
        limiter.check("a", 0.5)

    assert caught.value.code == "RATE_LIMITED"
    assert caught.value.retry_after == pytest.approx(1.5)
    assert _allowed(limiter, "a", 1.99, 1) == 0
    assert _allowed(limiter, "a", 2.0, 1) == 1


def test_a_refused_attempt_costs_nothing() -> None:
    """Knocking while limited does not make the wait longer."""
    limiter = RateLimiter(1)
    _allowed(limiter, "a", 0.0, 1)
    _allowed(limiter, "a", 30.0, 1_000)

    assert _allowed(limiter, "a", 60.0, 1) == 1


def test_callers_do_not_share() -> None:
    """One caller's flood leaves another's bucket full."""
    limiter = RateLimiter(5)
    _allowed(limiter, "a", 0.0, 100)

    assert _allowed(limiter, "b", 0.0, 100) == 5


def test_zero_is_no_limit() -> None:
    """With 0 everything passes and nothing is remembered."""
    limiter = RateLimiter(0)

    assert _allowed(limiter, "a", 0.0, 10_000) == 10_000
    assert len(limiter) == 0


def test_memory_is_bounded() -> None:
    """A flood of callers fills the table and no more; the one seen last is still known."""
    limiter = RateLimiter(1, max_callers=100)
    for number in range(10_000):
        limiter.check(f"caller {number}", 0.0)

    assert len(limiter) == 100
    assert _allowed(limiter, "caller 9999", 0.0, 1) == 0


def test_a_busy_caller_is_not_forgotten_for_new_ones() -> None:
    """A caller that keeps coming stays in the table however many others pass by."""
    limiter = RateLimiter(1_000, max_callers=10)
    for number in range(2_000):
        _allowed(limiter, "busy", 0.0, 1)
        limiter.check(f"caller {number}", 0.0)

    assert _allowed(limiter, "busy", 0.0, 1) == 0


@given(st.lists(st.floats(0, 600), max_size=200).map(sorted), st.integers(1, 50))
def test_no_minute_passes_more_than_two_bursts(times: list[float], per_minute: int) -> None:
    """In any minute at most a full bucket and one refill pass, whatever the timing."""
    limiter = RateLimiter(per_minute)
    passed = [now for now in times if _allowed(limiter, "a", now, 1)]

    for start in passed:
        assert sum(start <= now <= start + 60 for now in passed) <= 2 * per_minute


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("", "unix", False),
    ],
)
def test_addresses_share_buckets_by_subscriber(one: str, other: str, same: bool) -> None:
    """An IPv6 subscriber has one bucket for its /64; an IPv4 address has one in both notations."""
    assert (address_caller(one) == address_caller(other)) is same


def test_a_subject_named_like_an_address_has_its_own_bucket() -> None:
    """No subject can use up an address's bucket."""
    assert subject_caller("192.0.2.1") != address_caller("192.0.2.1")

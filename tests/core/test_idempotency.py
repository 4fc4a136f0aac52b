"""The ledger of accepted ids."""

from __future__ import annotations

from gateway.core.idempotency import IdempotencyLedger
from gateway.core.storage import LedgerEntry


def test_an_id_is_known_for_exactly_its_window() -> None:
    """To the last second of it, and not after."""
    ledger = IdempotencyLedger(window=60)
    entry = LedgerEntry("m", "t", accepted_at=100.0)
    ledger.add(entry)
    assert ledger.find("m", 160.0) is entry
    assert ledger.find("m", 160.1) is None
    assert ledger.find("other", 100.0) is None


def test_what_is_over_is_forgotten() -> None:
    """Looking for anything drops all that is too old, so that the ledger does not grow for ever."""
    ledger = IdempotencyLedger(window=10)
    for second in range(100):
        ledger.add(LedgerEntry(f"m{second}", "t", float(second)))
        assert ledger.find("none", float(second)) is None
        assert len(ledger) <= 11


def test_an_id_that_is_accepted_again_starts_its_window_anew() -> None:
    """The later entry counts, and keeps its place in time."""
    ledger = IdempotencyLedger(window=10)
    ledger.add(LedgerEntry("a", "t1", 0.0))
    ledger.add(LedgerEntry("b", "t2", 5.0))
    ledger.add(LedgerEntry("a", "t3", 9.0))
    found = ledger.find("a", 18.0)
    assert found is not None
    assert found.turn_id == "t3"
    assert ledger.find("b", 18.0) is None
    assert len(ledger) == 1

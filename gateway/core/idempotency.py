"""The idempotency ledger: which client message ids were accepted, and what became of them."""

from __future__ import annotations

from gateway.core.storage import LedgerEntry


class IdempotencyLedger:
    """Remembers each accepted ``id`` for ``window`` seconds, in order of acceptance."""

    __slots__ = ("_entries", "_window")

    def __init__(self, window: float) -> None:
        self._window = window
        self._entries: dict[str, LedgerEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: LedgerEntry) -> None:
        """Remember an accepted message."""
        self._entries.pop(entry.message_id, None)
        self._entries[entry.message_id] = entry

    def find(self, message_id: str, now: float) -> LedgerEntry | None:
        """The entry of ``message_id`` if it was accepted within the window."""
        self._forget_before(now - self._window)
        return self._entries.get(message_id)

    def _forget_before(self, time: float) -> None:
        # Insertion order is time order, so this looks at one entry unless some are really old.
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if oldest.accepted_at >= time:
                return
            del self._entries[oldest.message_id]

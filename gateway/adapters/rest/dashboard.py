"""What the dashboard shows, as JSON and Server-Sent Events: figures and log entries, no message content.

Every route but the page itself needs the internal key or the scope ``api:admin``, in a header: nothing that a
browser would send by itself, so no other site can have it sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

import attrs
import trio

from gateway.adapters.rest.access import Access, RequestHead
from gateway.core.codec import encode_json
from gateway.core.errors import NotFound, Overloaded
from gateway.core.identity import SCOPE_READ, SCOPE_WRITE, Identity
from gateway.core.overview import JournalEntry, PulseSample
from gateway.core.session_id import parse_session_id
from gateway.node_ports import ASK_CLOSE_SESSION, ASK_SESSION, Siblings
from gateway.operator_ports import Journal, Overview
from gateway.ports import Clock, Telemetry

INTERVAL: Final = 1.0
"""Seconds between two events."""
MAX_VIEWERS: Final = 16
SESSIONS_SHOWN: Final = 100
TROUBLES_SHOWN: Final = 100
TIMELINE_SHOWN: Final = 200
MAX_FILTER: Final = 128
COLUMNS: Final = (
    *("at", "tokens", "frames_sent", "bytes_sent", "bytes_received", "sockets", "sessions"),
    *("turns_running", "turns_waiting", "lag", "added_p50", "added_p99"),
)
"""What each number of a sample is; the first five but ``at`` are totals."""


class Dashboard:
    """Serves the routes below ``/dashboard/``. Raises ``GatewayError`` for everything that is refused."""

    def __init__(
        self,
        access: Access,
        overview: Overview,
        journal: Journal,
        clock: Clock,
        telemetry: Telemetry,
        siblings: Siblings | None = None,
    ) -> None:
        self._access = access
        self._overview = overview
        self._journal = journal
        self._clock = clock
        self._telemetry = telemetry
        self._siblings = siblings
        self._viewers = 0
        if siblings is not None:
            siblings.answer(ASK_SESSION, self._live_session)
            siblings.answer(ASK_CLOSE_SESSION, self._close_live_session)

    async def events(self, head: RequestHead, containing: str) -> AsyncIterator[bytes]:
        """Check the caller, then give a stream that ends with the node, or with the caller's token."""
        identity = await self._admin(head, SCOPE_READ)
        if self._viewers >= MAX_VIEWERS:
            raise Overloaded("As many dashboards are open as may be; close one first.", retry_after=5)
        return self._stream(identity, containing[:MAX_FILTER])

    async def session(self, head: RequestHead, segment: str) -> bytes:
        """One session and what the log still says of it, as JSON; also when the session is not live any more.

        Raises ``NotFound``.
        """
        await self._admin(head, SCOPE_READ)
        session_id = parse_session_id(segment)
        live = self._live_session(session_id) or await self._ask_siblings(ASK_SESSION, session_id)
        if live is not None:
            return live
        timeline = self._journal.entries(session_id=session_id, limit=TIMELINE_SHOWN)
        if not timeline:
            raise NotFound("There is no live session of that id, and the log has nothing of it.")
        return encode_json({"session": None, "timeline": _entries(timeline)})

    async def close_session(self, head: RequestHead, segment: str) -> bytes:
        """Cancel a session's turn and messages and close its sockets. Raises ``NotFound``."""
        identity = await self._admin(head, SCOPE_WRITE)
        session_id = parse_session_id(segment)
        closed = self._close_live_session(session_id)
        if closed is None and await self._ask_siblings(ASK_CLOSE_SESSION, session_id) is None:
            raise NotFound("There is no live session of that id; it may have ended meanwhile.")
        self._telemetry.warning("session_closed_by_operator", session_id=session_id, subject=identity.subject)
        return encode_json({"session_id": session_id, "closed": True})

    def _live_session(self, session_id: str) -> bytes | None:
        """What is shown of a session that lives in this process."""
        overview = self._overview.session(session_id)
        if overview is None:
            return None
        timeline = self._journal.entries(session_id=session_id, limit=TIMELINE_SHOWN)
        return encode_json({"session": attrs.asdict(overview), "timeline": _entries(timeline)})

    def _close_live_session(self, session_id: str) -> bytes | None:
        return b"closed" if self._overview.close_session(session_id) else None

    async def _ask_siblings(self, question: str, session_id: str) -> bytes | None:
        """The answer of the process in which the session lives, if it is one of the others on this port."""
        if self._siblings is None:
            return None
        return next(iter((await self._siblings.ask(question, session_id)).values()), None)

    async def _admin(self, head: RequestHead, scope: str) -> Identity:
        identity = await self._access.identify(head, scope)
        self._access.require_admin(identity)
        return identity

    async def _stream(self, identity: Identity, containing: str) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            shown_until, seen = 0.0, 0
            due = trio.current_time()
            worker = None if self._siblings is None else [self._siblings.number, self._siblings.count]
            while not self._overview.draining and not self._is_over(identity):
                samples = [sample for sample in self._overview.samples if sample.at > shown_until]
                if samples:
                    shown_until = samples[-1].at
                troubles = self._journal.entries(troubles_only=True, after=seen, limit=TROUBLES_SHOWN)
                if troubles:
                    seen = troubles[-1].number
                found = await self._overview.sessions(containing=containing, limit=SESSIONS_SHOWN)
                pulse = {
                    "now": self._clock.now(),
                    "columns": COLUMNS,
                    "worker": worker,
                    "samples": [_row(sample) for sample in samples],
                    "sessions": [attrs.asdict(session) for session in found.sessions],
                    "found": found.found,
                    "troubles": _entries(troubles),
                }
                yield b"event: pulse\ndata: " + encode_json(pulse) + b"\n\n"
                due = max(due + INTERVAL, trio.current_time())
                await trio.sleep_until(due)
            yield b"event: end\ndata: {}\n\n"
        finally:
            self._viewers -= 1

    def _is_over(self, identity: Identity) -> bool:
        return identity.expires_at is not None and identity.expires_at <= self._clock.now()


def _row(sample: PulseSample) -> list[float | None]:
    added = sorted(sample.added)
    p50 = added[len(added) // 2] if added else None
    p99 = added[min(len(added) - 1, len(added) * 99 // 100)] if added else None
    return [*(getattr(sample, column) for column in COLUMNS[:-2]), p50, p99]


def _entries(entries: Sequence[JournalEntry]) -> list[dict[str, object]]:
    return [
        {"number": entry.number, "at": entry.at, "level": entry.level, "event": entry.event}
        | {"fields": {name: _plain(value) for name, value in entry.fields.items() if name != "cause"}}
        | ({"cause": str(entry.fields["cause"])} if "cause" in entry.fields else {})
        for entry in entries
    ]


def _plain(value: object) -> object:
    """A value as JSON has it."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)

"""The client's side of exact delivery: ``(input, now) → effects``. No socket, no clock, no Trio.

Rules (protocol.md section 4):

* The position moves only with what is delivered: by one event, by one merged token, or by one snapshot,
  which is itself delivered. So whatever is cut, the next socket resumes at the first event not delivered.
* An event at or before the position is a repeat and dropped. One that does not begin right after it means
  that something is missing: the socket is broken off and the session resumed, never read on.
* Between a welcome that does not resume and its snapshot no event counts, and the old position is kept: cut
  there, the client asks again from where it was, and is answered with a snapshot again.
* Messages wait in the outbox until they are answered; see ``outbox``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping

from gateway.client.acknowledgements import Acknowledgements
from gateway.client.effects import Break, Deliver, Effect, LeaveSoon, RenewToken, Transmit, Welcomed
from gateway.client.errors import MessageRefused
from gateway.client.events import Accepted, ResumePoint, SessionEvent, Welcome
from gateway.client.outbox import Outbox

DEFAULT_DEDUPE_WINDOW = 86_400.0
DEFAULT_HEARTBEAT = 20.0
DEFAULT_MAX_MESSAGE_BYTES = 1 << 20
SNAPSHOT_REASONS = frozenset({"trimmed", "epoch_changed", "no_such_session"})


class _Phase(enum.Enum):
    CLOSED = enum.auto()
    AWAITING_WELCOME = enum.auto()
    AWAITING_SNAPSHOT = enum.auto()
    LIVE = enum.auto()
    BROKEN = enum.auto()
    """What still comes from this socket is not looked at."""


class _Violation(Exception):
    """The gateway broke the protocol."""


class SessionState:
    """One session as its client knows it, over any number of sockets. Times are seconds of one clock."""

    def __init__(self, *, random: Callable[[], float], resume: ResumePoint | None = None) -> None:
        self._phase = _Phase.CLOSED
        self._position = resume
        self._asked: ResumePoint | None = None
        self._outbox = Outbox(random)
        self._acknowledgements = Acknowledgements()
        if resume is not None:
            self._acknowledgements.start(resume.last_seq)
        self._renewals: set[str] = set()
        self.welcome: Welcome | None = None
        self.made_progress = False
        """Whether the latest socket brought anything but its welcome: then it was worth the attempt."""

    @property
    def position(self) -> ResumePoint | None:
        """Up to where events were delivered; None before the first welcome."""
        return self._position

    @property
    def is_live(self) -> bool:
        """Whether messages can be sent now."""
        return self._phase in (_Phase.LIVE, _Phase.AWAITING_SNAPSHOT)

    @property
    def unanswered(self) -> int:
        """Messages that wait for an answer."""
        return len(self._outbox)

    # ------------------------------------------------------------------ the socket

    def opened(self) -> ResumePoint | None:
        """A socket is being opened; returns what to ask for on its URL."""
        self._phase = _Phase.AWAITING_WELCOME
        self._asked = self._position
        self._renewals.clear()
        self.made_progress = False
        return self._asked

    def closed(self) -> None:
        """The socket is gone."""
        self._phase = _Phase.CLOSED

    def receive(self, messages: Iterable[tuple[Mapping[str, object], int]], now: float) -> list[Effect]:
        """Objects that came, with their size in bytes. After a ``Break`` nothing of the socket counts."""
        effects: list[Effect] = []
        try:
            for fields, size in messages:
                if self._phase in (_Phase.CLOSED, _Phase.BROKEN):
                    break
                effects += self._receive(fields, size, now)
        except _Violation as violation:
            self._phase = _Phase.BROKEN
            effects.append(Break(str(violation)))
        return effects

    # ------------------------------------------------------------------ the application

    def submit(self, message_id: str, fields: Mapping[str, object], now: float) -> list[Effect]:
        """Send a message, now or when there is a socket. Raises ``ValueError`` if its id waits already."""
        self._outbox.add(message_id, fields)
        if not self.is_live:
            return []
        return [self._outbox.transmit(message_id, self._live_epoch(), now)]

    def withdraw(self, message_id: str) -> None:
        """Nobody waits for the answer to a message any more: it is not sent again."""
        self._outbox.withdraw(message_id)

    def taken(self, event: SessionEvent, size: int, now: float) -> list[Effect]:
        """The application took an event."""
        if self._position is None or event.epoch != self._position.epoch:
            return []  # Of an epoch that is over: there is nobody to tell.
        self._acknowledgements.taken(event.seq, size, now)
        return self._acknowledge(now)

    def authenticate(self, message_id: str, token: str) -> list[Effect]:
        """Send a new token on the live socket; nothing when there is none, for the next one will carry it."""
        if not self.is_live:
            return []
        self._renewals.add(message_id)
        return [Transmit({"type": "authenticate", "id": message_id, "token": token})]

    # ------------------------------------------------------------------ time

    @property
    def next_wake(self) -> float | None:
        """When ``wake`` next has something to do."""
        if not self.is_live:
            return None
        times = [self._outbox.next_retry]
        if self._phase is _Phase.LIVE:
            times.append(self._acknowledgements.due)
        return min((time for time in times if time is not None), default=None)

    def wake(self, now: float) -> list[Effect]:
        """Do what is due."""
        if not self.is_live:
            return []
        return self._acknowledge(now) + self._outbox.retries_due(self._live_epoch(), now)

    def leave(self, now: float) -> list[Effect]:
        """The last words on a socket that this side closes: what is owed an acknowledgement gets it."""
        return self._acknowledge(now, early=True)

    # ------------------------------------------------------------------ inner

    def _acknowledge(self, now: float, *, early: bool = False) -> list[Effect]:
        if self._phase is not _Phase.LIVE:
            return []
        seq = self._acknowledgements.take(now, early=early)
        return [] if seq is None else [Transmit({"type": "ack", "seq": seq})]

    def _live_epoch(self) -> str:
        assert self.welcome is not None
        return self.welcome.epoch

    def _receive(self, fields: Mapping[str, object], size: int, now: float) -> list[Effect]:
        kind = fields.get("type")
        if not isinstance(kind, str):
            raise _Violation("an object without a type")
        if self._phase is _Phase.AWAITING_WELCOME:
            if kind != "welcome":
                raise _Violation(f"{kind} before the welcome")
            return self._welcome(fields, now)
        self.made_progress = True
        if _is_snapshot(fields):
            return [self._snapshot(fields, size)]
        if "seq" in fields:
            # Whatever its type is called: the agent may name its events as it likes, the number is ours.
            return self._event(kind, fields, size)
        return self._control(kind, fields, now)

    def _control(self, kind: str, fields: Mapping[str, object], now: float) -> list[Effect]:
        if kind == "ack":
            return self._outbox.accepted(
                Accepted(
                    message_id=_text(fields, "id"),
                    turn_id=_optional_text(fields, "turn_id"),
                    duplicate=fields.get("status") == "duplicate",
                )
            )
        if kind == "nack":
            message_id = fields.get("id")
            if not isinstance(message_id, str) or message_id in self._renewals:
                return []  # A token that was not taken: the socket ends at expiry, and says so by 4401.
            error = MessageRefused(
                _text(fields, "code"), _text(fields, "message"), retryable=fields.get("retryable") is True
            )
            return self._outbox.refused(message_id, error, _optional_number(fields, "retry_after_s"), now)
        if kind == "token_expiring":
            return [RenewToken(_optional_number(fields, "in_s") or 0.0)]
        if kind == "draining":
            return [LeaveSoon(max(0.0, (_optional_number(fields, "reconnect_after_ms") or 0.0) / 1000))]
        if kind == "welcome":
            raise _Violation("a second welcome")
        return []  # ``authenticated``, and what later versions of the protocol may add.

    def _welcome(self, fields: Mapping[str, object], now: float) -> list[Effect]:
        welcome = _read_welcome(fields)
        self.welcome = welcome
        if self._asked is None:
            self._position = ResumePoint(welcome.epoch, welcome.last_seq)
            self._acknowledgements.start(welcome.last_seq)
            self._phase = _Phase.LIVE
        elif not welcome.resumed:
            self._phase = _Phase.AWAITING_SNAPSHOT
        elif welcome.epoch != self._asked.epoch:
            raise _Violation("it resumed another epoch than was asked for")
        else:
            self._phase = _Phase.LIVE
        resent = self._outbox.transmit_all(welcome.epoch, welcome.dedupe_window, now)
        return [Welcomed(welcome), *resent]

    def _snapshot(self, fields: Mapping[str, object], size: int) -> Deliver:
        seq, epoch = _whole_number(fields, "seq"), _text(fields, "epoch")
        assert self._position is not None
        is_back = epoch != self._position.epoch or seq < self._position.last_seq
        if is_back and self._phase is _Phase.LIVE and epoch == self._position.epoch:
            raise _Violation("a snapshot of what was delivered before")
        if is_back:
            self._acknowledgements.start(0)
        self._phase = _Phase.LIVE
        self._position = ResumePoint(epoch, seq)
        return Deliver(SessionEvent("snapshot", epoch, seq, seq, fields), size)

    def _event(self, kind: str, fields: Mapping[str, object], size: int) -> list[Effect]:
        if self._phase is _Phase.AWAITING_SNAPSHOT:
            raise _Violation("an event before the snapshot that stands for what is missing")
        assert self._position is not None
        seq = _whole_number(fields, "seq")
        first_seq = seq
        if kind == "assistant_message" and "first_seq" in fields:
            first_seq = _whole_number(fields, "first_seq")
        if first_seq > seq:
            raise _Violation("a merged token that ends before it begins")
        last_seq = self._position.last_seq
        if seq <= last_seq:
            return []
        if first_seq != last_seq + 1:
            # Also a merged token of which a part is known: where that part ends cannot be seen.
            raise _Violation(f"event {first_seq} after {last_seq}")
        self._position = ResumePoint(self._position.epoch, seq)
        return [Deliver(SessionEvent(kind, self._position.epoch, seq, first_seq, fields), size)]


def _is_snapshot(fields: Mapping[str, object]) -> bool:
    # An agent may call an event of its own ``snapshot``: that one has no epoch and no such reason.
    return (
        fields.get("type") == "snapshot"
        and fields.get("reason") in SNAPSHOT_REASONS
        and isinstance(fields.get("epoch"), str)
    )


def _read_welcome(fields: Mapping[str, object]) -> Welcome:
    turn, limits, pending = fields.get("turn"), fields.get("limits"), fields.get("pending")
    turn_fields: Mapping[str, object] = turn if isinstance(turn, dict) else {}
    limit_fields: Mapping[str, object] = limits if isinstance(limits, dict) else {}
    last_seq = _whole_number(fields, "last_seq")
    first_seq = fields.get("first_seq")
    max_bytes = limit_fields.get("max_message_bytes")
    window = _optional_number(fields, "dedupe_window_s")
    return Welcome(
        session_id=_text(fields, "session_id"),
        epoch=_text(fields, "epoch"),
        first_seq=first_seq if isinstance(first_seq, int) else last_seq + 1,
        last_seq=last_seq,
        resumed=fields.get("resumed") is True,
        turn_id=_optional_text(turn_fields, "id"),
        turn_state=_optional_text(turn_fields, "state") or "idle",
        pending=[call for call in pending if isinstance(call, dict)] if isinstance(pending, list) else [],
        max_message_bytes=max_bytes if isinstance(max_bytes, int) else DEFAULT_MAX_MESSAGE_BYTES,
        dedupe_window=DEFAULT_DEDUPE_WINDOW if window is None else window,
        heartbeat=_optional_number(fields, "heartbeat_s") or DEFAULT_HEARTBEAT,
    )


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise _Violation(f"{fields.get('type')} without {name}")
    return value


def _optional_text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


def _whole_number(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _Violation(f"{fields.get('type')} whose {name} is no whole number")
    return value


def _optional_number(fields: Mapping[str, object], name: str) -> float | None:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

"""A socket's place in its session's log: what it was given, what it confirmed, what goes out next.

The token path does not pass through a task of its own: ``flush_nowait`` is called by whoever made events
visible, writes at once while the socket takes it, and leaves only the waiting to ``flush``, the flusher.
What to close the socket with is decided once, by the first call of ``end``.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from gateway.core.delivery import (
    BATCH_BYTES,
    encode_accepted,
    encode_control,
    encode_event,
    encode_events,
    encode_refused,
    error_fields,
)
from gateway.core.effects import Accepted, Refused
from gateway.core.errors import ReplayTruncated
from gateway.core.events import EventKind
from gateway.core.flow import Flow
from gateway.core.limits import Limits
from gateway.core.session_views import snapshot, welcome
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.engine.flusher import Ending, Flusher, wait_sent_in_time
from gateway.engine.remote_connection import RemoteConnection
from gateway.engine.session_runner import SessionRunner
from gateway.engine.shared_socket import SessionLane
from gateway.ports import ClientConnection, ConnectionClosed, ResumePoint

EVENTS_PER_FLUSH = 512
"""Events encoded in one go: keeps one session's replay from holding up the others for milliseconds."""
BYTES_PER_FLUSH = 4 * BATCH_BYTES
"""… and keeps what is buffered for a socket that takes nothing below 1 MiB, whatever the events' size."""
MAX_WAITING_ANSWERS = 1024
"""Answers that wait for a socket that takes nothing while it goes on asking."""


class SessionSocket:
    """A socket's place in its session's log. Implements ``attachment.Attachment``."""

    __slots__ = (
        "_batch_after",
        "_blocked",
        "_control",
        "_dialect",
        "_flow",
        "_flusher",
        "_lagging",
        "_limits",
        "_moved",
        "_replaying",
        "_runner",
        "_wire",
        "acked",
        "alive_at",
        "connection",
        "is_v2",
        "position",
        "rtt",
    )

    def __init__(
        self, connection: ClientConnection, runner: SessionRunner, dialect: Dialect, limits: Limits
    ) -> None:
        self.connection = connection
        self._runner = runner
        self._flow = runner.flow
        self._wire = Flow() if isinstance(connection, SessionLane | RemoteConnection) else runner.flow
        """What counts its frames; those that another socket carries are counted there."""
        self._dialect = dialect
        self._limits = limits
        self.is_v2 = dialect.is_v2
        self.position = runner.visible_seq
        """Events up to here were given to the socket."""
        self.acked = self.position
        """v2: events up to here were acknowledged."""
        self._batch_after = self.position
        """The position before the batch that was given last: while blocked, only that is in doubt."""
        self._control: list[bytes] = []
        self._blocked = False
        self._lagging = False
        """Whether this socket was found slower than its events, and has not caught up since."""
        self._replaying = False
        self._flusher = Flusher(self._takes_no_more, self._wait_taken)
        self._moved: trio.Event | None = None
        """Set by the acknowledgement that a flusher waits for."""
        self.alive_at = trio.current_time()
        """When its peer was last known to be there: it joined, or was sent a ping that it answered."""
        self.rtt: float | None = None
        """Seconds between its last ping and pong."""

    @property
    def dialect(self) -> Dialect:
        """What it speaks."""
        return self._dialect

    @property
    def unacked_bytes(self) -> int:
        """v2: memory of the events that it was given and has not acknowledged, in bytes; v1 has none."""
        if not self.is_v2 or self.position <= self.acked:
            return 0
        return self._runner.session.log.bytes_between(self.acked, self.position)

    # ------------------------------------------------------------------ joining and leaving

    def join(self, resume: ResumePoint | None, *, had_session: bool) -> str:
        """Take up the place where this client left off; returns the outcome for the metrics."""
        runner = self._runner
        session = runner.session
        if not self.is_v2:
            resumed = bool(runner.detached_positions)
            if resumed:
                self.position = runner.detached_positions.pop(0)
            for call in runner.take_calls_to_repeat():
                self._control.append(call)
            runner.v1_joined_at = self.alive_at
            runner.attach(self)
            self._replaying = self.position < runner.visible_seq
            self.flush_nowait()
            runner.progressed()
            return "resumed" if resumed else "new"
        reason = None
        if resume is not None:
            if not had_session:
                reason = "no_such_session"
            elif resume.epoch != session.epoch:
                reason = "epoch_changed"
            elif resume.last_seq > runner.visible_seq:
                # This client saw events that the store does not have: an old copy of it was restored.
                runner.renew_epoch("a client is ahead of the store")
                reason = "epoch_changed"
            elif not session.log.holds_after(resume.last_seq):
                reason = "trimmed"
            else:
                self.position = self.acked = resume.last_seq
        runner.attach(self)
        resumed = resume is not None and reason is None
        visible = runner.visible_seq
        self._send_control(welcome(session, self._limits, last_seq=visible, resumed=resumed))
        if reason is not None:
            self._send_snapshot(reason)
        self._replaying = self.position < visible
        self.flush_nowait()
        runner.progressed()
        return reason or ("resumed" if resumed else "new")

    def leave(self) -> None:
        """The socket is gone: whatever is said to it from now on, it is given nothing more."""
        # A v1 client whose connection died comes back at once, often before that death is noticed here. What
        # it gets then begins with what comes next, and its old place must be offered to nobody: taken up by
        # its next socket, it would repeat tokens.
        was_replaced = self._runner.v1_joined_at > self.alive_at
        position = None if self.is_v2 or was_replaced else self._received_at_most()
        self._blocked = True
        self._runner.detach(self, v1_position=position)

    def _received_at_most(self) -> int:
        """Up to which seq a v1 client can have received events: what never left this process it did not."""
        unsent = self.connection.unsent
        if not unsent:
            return self.position
        shown = [
            event.seq
            for event in self._runner.session.log.between(self._batch_after, self.position)
            if event.kind is not EventKind.V2_ONLY
        ]
        return shown[-unsent] - 1 if unsent <= len(shown) else self._batch_after

    # ------------------------------------------------------------------ attachment.Attachment

    @property
    def confirmed_seq(self) -> int:
        """Up to where this socket is known to be served."""
        if self.is_v2:
            return self.acked
        return self._batch_after if self._blocked else self.position

    def flush_nowait(self) -> None:
        """Send control payloads, then events up to the session's ``visible_seq``, as far as it goes."""
        try:
            if not self._blocked and not self._control and not self._replaying and self._flush_newest():
                return
            while not self._blocked:
                behind = self.position < self._runner.visible_seq
                if self.is_v2 and self._window_is_full():
                    self._lagging = True
                    self._flusher.need()
                    behind = False
                elif not behind:
                    self._replaying = self._lagging = False
                if not behind and not self._control:
                    return
                if behind:
                    payloads = self._take_events()
                else:
                    # No event is in doubt while only answers wait for the kernel.
                    payloads, self._batch_after = [], self.position
                if self._control:
                    payloads = self._control + payloads
                    self._control = []
                if payloads:
                    self._wire.frames_sent += len(payloads)
                    self._wire.bytes_sent += sum(map(len, payloads))
                    if not self.connection.send_nowait(payloads):
                        self._blocked = self._lagging = True
                        self._flusher.need()
                    elif self._batch_after < self._runner.timing.seq <= self.position and not self._lagging:
                        self._runner.timing.end()
        except ConnectionClosed:
            # The reader learns it too and ends the socket; until then nothing more is sent.
            self._blocked = True

    def _flush_newest(self) -> bool:
        """The common case: a socket that has all but the newest event gets it at once. False: look again.

        A short cut through the loop of ``flush_nowait``; it saves 3 µs of the 10 that the engine spends on a
        token.
        """
        log = self._runner.session.log
        position = self.position
        if position + 1 != self._runner.visible_seq or position + 1 != log.last_seq:
            return False
        # A window that the whole log does not fill is not full: asked first, because it is cheaper.
        may_be_full = self.is_v2 and log.held_bytes >= self._limits.unacked_bytes
        if may_be_full and self._window_is_full():
            return False
        payload = encode_event(log.newest, self._dialect)
        self._batch_after = position
        self.position = position + 1
        self._lagging = False
        if payload is None:
            return True
        wire = self._wire
        wire.frames_sent += 1
        wire.bytes_sent += len(payload)
        if not self.connection.send_nowait((payload,)):
            self._blocked = self._lagging = True
            self._flusher.need()
        elif self._runner.timing.seq == self.position:
            self._runner.timing.end()
        return not may_be_full

    def _take_events(self) -> list[bytes]:
        """Encode the next events for this socket and move its position past them."""
        log = self._runner.session.log
        position = self.position
        if position < log.first_seq - 1:
            self._skip_gap()
            return []
        upto = min(self._runner.visible_seq, position + EVENTS_PER_FLUSH)
        events = log.between(position, upto)
        if len(events) > 1:
            waiting = log.bytes_after(position)
            while len(events) > 1 and waiting - log.bytes_after(events[-1].seq) > BYTES_PER_FLUSH:
                del events[len(events) // 2 :]
            merge = self._replaying or (self._lagging and waiting >= self._limits.merge_bytes)
            payloads = encode_events(events, self._dialect, merge=merge)
        else:
            payloads = encode_events(events, self._dialect)
        if self._replaying:
            self._flow.replayed_events += len(events)
        self._batch_after = position
        self.position = events[-1].seq
        return payloads

    def _skip_gap(self) -> None:
        """Events that this socket has not seen are gone: say so, never skip in silence."""
        if self.is_v2:
            self._send_snapshot("trimmed")
        else:
            log = self._runner.session.log
            lost = log.first_seq - 1 - self.position
            self._send_control(error_fields(ReplayTruncated(lost)))
            # Until this is sent, the gap is the next socket's to be told of.
            self._batch_after, self.position = self.position, log.first_seq - 1

    def _send_snapshot(self, reason: str) -> None:
        self.position = self.acked = self._runner.visible_seq
        self._runner.progressed()
        self._send_control(snapshot(self._runner.session, reason, last_seq=self.position))

    def answer(self, effect: Accepted | Refused) -> None:
        """Tell the client what became of a message of its own."""
        if isinstance(effect, Accepted):
            payload = encode_accepted(effect, self._dialect)
        else:
            payload = encode_refused(effect, self._dialect)
        if payload is not None:
            self._control.append(payload)
            self.flush_nowait()
            if len(self._control) >= MAX_WAITING_ANSWERS:
                self.end(CloseCode.TOO_SLOW, "too slow: answers are not taken; resume when ready")

    def send_control(self, fields: dict[str, object]) -> None:
        """Send one object that is not of the log; it goes before waiting events."""
        self._send_control(fields)
        self.flush_nowait()

    def _send_control(self, fields: dict[str, object]) -> None:
        self._control.append(encode_control(fields, self._dialect))

    def acknowledge(self, seq: int) -> None:
        """v2: the client has everything up to ``seq``. A seq from the future counts as the newest sent."""
        seq = min(seq, self.position)
        if seq > self.acked:
            self.acked = seq
            self._runner.progressed()
            if self._moved is not None:
                self._moved.set()
            self.flush_nowait()

    def resynchronize(self, reason: str) -> None:
        """Send a v2 client a snapshot in place of whatever it has."""
        if self.is_v2:
            self._send_snapshot(reason)
            self.flush_nowait()

    def end(self, code: int, reason: str) -> None:
        """Close the socket soon; the first call decides the code."""
        self._flusher.end(code, reason)

    # ------------------------------------------------------------------ the flusher task

    def begin(self, start_flusher: Callable[[], None]) -> None:
        """From now on ``start_flusher`` starts ``flush`` in the connection's nursery when it is needed."""
        self._flusher.begin(start_flusher)

    def finish(self) -> None:
        """The connection's nursery is about to close: from now on nothing can be started in it."""
        self._flusher.finish()

    async def flush(self) -> Ending | None:
        """Wait for the socket until it takes more; returns what to close it with, if it is to be closed.

        Raises ``ConnectionClosed``. No progress for ``send_timeout`` ends it with 4413: neither bytes into
        the kernel nor, where the window is full, an acknowledgement.
        """
        return await self._flusher.run()

    def _takes_no_more(self) -> bool:
        return self._blocked or self._window_is_full()

    async def _wait_taken(self) -> Ending | None:
        if self._blocked:
            ending = await wait_sent_in_time(self.connection, self._limits.send_timeout)
            if ending is None:
                self._blocked = False
                self._runner.progressed()
                self.flush_nowait()
            return ending
        self._moved = moved = trio.Event()
        with trio.move_on_after(self._limits.send_timeout) as patience:
            await moved.wait()
        self._moved = None
        if patience.cancelled_caught:
            return CloseCode.TOO_SLOW, "too slow: nothing was acknowledged; resume when ready"
        return None

    def _window_is_full(self) -> bool:
        if not self.is_v2 or self.position <= self.acked:
            return False
        log = self._runner.session.log
        return log.bytes_between(self.acked, self.position) >= self._limits.unacked_bytes

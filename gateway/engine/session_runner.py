"""One live session: performs what its state machine decides, over its own nursery.

    session nursery
    ├── turn: POST + SSE consumption      ← cancel scope = "stop generating"
    └── detach timer                      only while no socket is attached

Resource handling: the nursery exists while it has tasks (``task_branch.py``). Retiring the session takes
every turn with it. Sockets are not inside this nursery: they have their own, and are told to close when the
session ends.

Error handling: an exception in a turn ends the session's branch; the hub contains it and closes the
session's sockets with 1011. What the store holds stays, so that clients can come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Protocol

import trio
from attrs import frozen

from gateway.core.client_messages import AgentBound, Cancel
from gateway.core.effects import Accepted, Effect, Refused, StartTurn, StopTurn
from gateway.core.errors import Draining, StoreDelayed, StoreUnavailable
from gateway.core.flow import Flow
from gateway.core.limits import Limits
from gateway.core.session import Sender, Session
from gateway.core.storage import SessionCommit, SessionRecord
from gateway.engine.attachment import Attachment
from gateway.engine.departure import Departure
from gateway.engine.event_timing import EventTiming
from gateway.engine.group_commit import GroupCommit
from gateway.engine.task_branch import TaskBranch
from gateway.ports import Clock, Telemetry


class TurnStarter(Protocol):
    """Runs one turn against the Agent Runtime to its end."""

    async def __call__(self, runner: SessionRunner, start: StartTurn) -> None:
        """Return when the turn is over; cancelled for a stop."""
        ...


@frozen
class _Answer:
    """An effect for one sender, held back until the store has what it says."""

    to: Attachment
    effect: Accepted | Refused


class SessionRunner:
    """Runs one session. Implements ``group_commit.Committer``."""

    def __init__(
        self,
        session: Session,
        *,
        limits: Limits,
        run_turn: TurnStarter,
        group_commit: GroupCommit | None,
        telemetry: Telemetry,
        flow: Flow,
        clock: Clock,
        linger: float,
        was_stored: bool,
        start_branch: Callable[[SessionRunner], None],
        retired: Callable[[SessionRunner], None],
    ) -> None:
        self.session = session
        self.session_id = session.session_id
        self.flow = flow
        self.agent = ""
        """The agent that the runtime last switched to; empty until it does."""
        self.last_error = ""
        """Code of the last error that its clients were told."""
        self.timing = EventTiming(flow, telemetry)
        self.visible_seq = session.log.last_seq
        """Events up to here are stored, so sockets may see them."""
        self.detached_positions = [self.visible_seq] if was_stored else []
        """Where v1 sockets that fell off had got to; the next v1 socket takes up the oldest. After a
        restart that is unknown, and tokens must not come twice: only what is new then is shown."""
        self.v1_joined_at = -math.inf
        """When the newest v1 socket joined (Trio's clock)."""
        self._calls_to_repeat = (
            # A decided one would ask the user again for what no longer can be decided.
            [call.data for call in session.shown.pending if not session.is_decided(call.call_id)]
            if was_stored
            else []
        )
        self._attachments: dict[Attachment, None] = {}
        self._limits = limits
        self._run_turn = run_turn
        self._group_commit = group_commit
        self._telemetry = telemetry
        self._clock = clock
        self._linger = linger
        self._deferred: list[_Answer | StartTurn] = []
        self._in_flight: list[_Answer | StartTurn] = []
        self._in_flight_seq = self.visible_seq
        self._in_flight_record: SessionRecord | None = None
        self._turns: dict[str, trio.CancelScope] = {}
        self._marks: list[tuple[float, int]] = []
        """(time, newest seq then): what is older than the retention is found by these."""
        self._room: trio.Event | None = None
        """Where a turn waits for a socket to confirm something; made when it does, for it is 0.4 KB."""
        self._detach_scope: trio.CancelScope | None = None
        self._branch = TaskBranch(lambda: start_branch(self))
        self._tell_retired = retired
        self.is_retired = False
        """Whether the session is over in this process; its hub must load it anew."""
        self.departure = Departure(session)

    # ------------------------------------------------------------------ life

    def begin(self) -> None:
        """Carry on what a crash left, and wait for a first socket no longer than for one to come back."""
        self._start_detach_timer()
        self._perform(None, self.session.recover())

    async def run(self) -> None:
        """The session's branch: its tasks, until there is none left.

        Cancelling it cuts a running turn as a crash would: the record stays.
        """
        await self._branch.run()

    @property
    def has_sockets(self) -> bool:
        """Whether any socket is attached."""
        return bool(self._attachments)

    def retire(self) -> None:
        """Nobody needs this session in memory now: end its tasks and leave the hub."""
        if not self.is_retired:
            self.is_retired = True
            self._branch.cut()
            self._tell_retired(self)

    def suspend(self) -> None:
        """Another node is to carry on: cut the turn as a crash would, and take no messages any more.

        What changed so far is stored and shown as always. A turn that was not sent is left to that node.
        """
        self.departure.is_suspended = True
        self._branch.cut()
        if self.departure.has_unsent_turn:
            self.session.leave_unsent()
            self.changed()

    def end_sockets(self, code: int, reason: str) -> None:
        """Close every attached socket."""
        for attachment in list(self._attachments):
            attachment.end(code, reason)

    def _start_detach_timer(self) -> None:
        if not self._attachments and self._detach_scope is None:
            self._detach_scope = scope = trio.CancelScope()
            self._branch.start(lambda: self._wait_detached(scope))

    async def _wait_detached(self, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(self._limits.detach_grace)
            if scope.cancel_called:
                return  # One came at the very moment: too late to cancel a sleep that was over.
            if not self.session.is_at_rest:
                self._telemetry.info("session_abandoned", session_id=self.session_id)
            self._perform(None, self.session.abandon())
            self.detached_positions.clear()
            await trio.sleep(max(0.0, self._linger - self._limits.detach_grace))
            if self._group_commit is not None:
                await self._group_commit.wait_stored(self)
            if not scope.cancel_called:
                self.retire()

    # ------------------------------------------------------------------ sockets

    def attach(self, attachment: Attachment) -> None:
        """A socket joins."""
        self._attachments[attachment] = None
        if self._detach_scope is not None:
            self._detach_scope.cancel()
            self._detach_scope = None

    def detach(self, attachment: Attachment, *, v1_position: int | None) -> None:
        """A socket is gone; ``v1_position`` is the seq up to which a v1 socket can have received."""
        self._attachments.pop(attachment, None)
        if v1_position is not None:
            self.detached_positions.append(v1_position)
            # More than a few are devices that never came back, or a client in a reconnect loop.
            while len(self.detached_positions) > 8:
                self.detached_positions.pop(0)
        self._start_detach_timer()
        self.progressed()

    def take_calls_to_repeat(self) -> list[bytes]:
        """Open calls to show the first v1 socket after a restart: whether they had arrived is unknown."""
        calls, self._calls_to_repeat = self._calls_to_repeat, []
        return calls

    def renew_epoch(self, reason: str) -> None:
        """A client knows more of this epoch than the store does: begin a new one, tell the others."""
        self._telemetry.warning("epoch_renewed", session_id=self.session_id, reason=reason)
        self.session.renew_epoch()
        self.changed()
        for attachment in list(self._attachments):
            attachment.resynchronize("epoch_changed")

    # ------------------------------------------------------------------ inputs

    def receive(self, message: AgentBound | Cancel, sender: Sender, origin: Attachment) -> None:
        """A client's message, validated and allowed."""
        if self.is_retired:
            return  # Its socket is about to be closed; the session that comes after this one is asked again.
        if self.departure.is_suspended:
            origin.answer(Refused(Draining("This node is restarting. Reconnect."), message.message_id))
            return
        if self._group_commit is not None and self._group_commit.failure is not None:
            refused = Refused(self._group_commit.failure, message.message_id)
            origin.answer(refused)
            return
        self._perform(origin, self.session.receive(message, sender, self._clock.now()))

    def perform(self, effects: list[Effect]) -> None:
        """Perform effects that come from no client: a turn that ended."""
        self._perform(None, effects)

    def changed(self) -> None:
        """The session changed: have it stored, then shown; or shown at once where nothing is stored."""
        if self._group_commit is not None:
            self._group_commit.mark(self)
            return
        if self._deferred:
            self.take_commit()
        self._in_flight_seq = self.session.log.last_seq
        self.stored()

    def _perform(self, origin: Attachment | None, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, StopTurn):
                scope = self._turns.pop(effect.turn_id, None)
                if scope is not None:
                    scope.cancel()
            elif isinstance(effect, StartTurn):
                if effect.resumes:
                    self.departure.sending(effect.message.turn_id)
                self._deferred.append(effect)
            elif origin is not None:
                # A refusal too may rest on what is not stored yet: somebody else's decision.
                self._deferred.append(_Answer(origin, effect))
        self.changed()

    # ------------------------------------------------------------------ group_commit.Committer

    def take_commit(self) -> SessionCommit | None:
        """All changes since the last call, with the effects that wait for them."""
        if self.is_retired:
            return None
        self._in_flight, self._deferred = self._deferred, []
        self._in_flight_seq = self.session.log.last_seq
        commit = self.session.take_commit()
        if commit is not None:
            self._in_flight_record = commit.record
        return commit

    def stored(self) -> None:
        """Show the new events to the sockets and perform the effects that waited."""
        self.visible_seq = self._in_flight_seq
        if self._in_flight_record is not None:
            self.session.show(self._in_flight_record)
            self._in_flight_record = None
        if self._in_flight:
            performing, self._in_flight = self._in_flight, []
            for item in performing:
                if isinstance(item, _Answer):
                    item.to.answer(item.effect)
                else:
                    self._start_turn(item)
        for attachment in self._attachments:
            attachment.flush_nowait()
        self.session.trim(self.visible_seq)
        if self._room is not None:
            self.progressed()

    def not_stored(self, error: StoreUnavailable) -> None:
        """Tell senders of what cannot be stored yet. It stays queued, so v1 must not send it again."""
        self._in_flight = self._held_back(self._in_flight, error)
        # What came while the store was being found away: nothing takes it now, until the store is back.
        self._deferred = self._held_back(self._deferred, error)

    def _held_back(
        self, items: list[_Answer | StartTurn], error: StoreUnavailable
    ) -> list[_Answer | StartTurn]:
        kept: list[_Answer | StartTurn] = []
        for item in items:
            if isinstance(item, StartTurn) or isinstance(item.effect, Refused):
                kept.append(item)
            elif item.to.is_v2:
                # Its id makes sending it again safe: by then it is a duplicate, or it is new.
                item.to.answer(Refused(error, item.effect.message_id))
            else:
                item.to.answer(Refused(StoreDelayed(), item.effect.message_id))
        return kept

    def refused(self, reason: str) -> None:
        """The store lost this session's past: leave memory, so that it is loaded anew."""
        self._telemetry.error("session_lost_its_store", session_id=self.session_id, reason=reason)
        self.end_sockets(1012, "session restarted")
        # They must not be shown what the store will never hold while they are on their way out.
        self._attachments.clear()
        self._in_flight, self._deferred = [], []
        self.retire()

    def _start_turn(self, start: StartTurn) -> None:
        if self.departure.holds_turns or not self.session.is_running(start.message.turn_id):
            return  # Left to another node, or cancelled before it began.
        self._turns[start.message.turn_id] = scope = trio.CancelScope()
        self._branch.start(lambda: self._turn(start, scope))

    async def _turn(self, start: StartTurn, scope: trio.CancelScope) -> None:
        with scope:
            await self._run_turn(self, start)
        self._turns.pop(start.message.turn_id, None)

    # ------------------------------------------------------------------ observation

    @property
    def attachments(self) -> Collection[Attachment]:
        """The sockets."""
        return self._attachments.keys()

    def close(self, reason: str) -> None:
        """An operator ends the conversation: cancel what runs and waits, close the sockets for good (1000).

        Its events stay for as long as any session's do.
        """
        self._perform(None, self.session.abandon())
        self.end_sockets(1000, reason)

    # ------------------------------------------------------------------ bounds

    def age(self, now: float) -> int:
        """Drop events older than the retention that every attached socket has; returns the bytes held."""
        log = self.session.log
        if not self._marks or self._marks[-1][1] != log.last_seq:
            self._marks.append((now, log.last_seq))
        oldest = now - self._limits.replay_retention
        expired = 0
        while len(self._marks) > 1 and self._marks[0][0] < oldest:
            expired = self._marks.pop(0)[1]
        if expired:
            self._trim(min(expired, self._confirmed_by_all()))
        return log.held_bytes

    def trim_confirmed(self) -> int:
        """Drop every event that all attached sockets have confirmed; returns the bytes that freed."""
        before = self.session.log.held_bytes
        self._trim(self._confirmed_by_all())
        return before - self.session.log.held_bytes

    def _confirmed_by_all(self) -> int:
        confirmed = [attachment.confirmed_seq for attachment in self._attachments]
        return min([self.visible_seq, *confirmed, *self.detached_positions])

    def _trim(self, seq: int) -> None:
        if seq >= self.session.log.first_seq:
            self.session.trim_to(seq)
            self.changed()

    # ------------------------------------------------------------------ pacing

    def progressed(self) -> None:
        """A socket confirmed something or went away: the turn may have room to read on."""
        if self._room is not None:
            self._room.set()
            self._room = None

    def has_room(self) -> bool:
        """Whether the upstream may be read: the fastest socket is within bounds, and so is the store.

        What nobody is attached to see has to wait for the store alone.
        """
        log, bound = self.session.log, self._limits.unacked_bytes
        if log.held_bytes < bound:
            return True  # Asked once per token: most sessions never hold that much.
        if not self._attachments:
            return log.bytes_after(self.visible_seq) < bound
        return any(log.bytes_after(attachment.confirmed_seq) < bound for attachment in self._attachments)

    async def wait_room(self) -> None:
        """Wait until ``has_room``."""
        while not self.has_room():
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

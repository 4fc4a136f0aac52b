"""The session's state machine: ``(input, now) → effects``. Owns log, queue, turn, calls and ledger.

Rules:

* One turn at a time. A message waits in the queue until the turn before it has ended; tool results and
  decisions overtake user messages, each kind keeps its order.
* Every change is part of the next ``take_commit``; the runner performs effects and shows new events to
  sockets only when the store holds that commit. So a client is never told what a crash could undo.
* A turn's end is decided here, once: events that arrive for a turn that has ended are dropped.
* Nothing here reads a clock, awaits, or knows a socket.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from gateway.core.agent_events import AgentEvent
from gateway.core.client_messages import AgentBound, Cancel, HitlDecision, ToolResult
from gateway.core.codec import encode_json
from gateway.core.delivery import error_fields
from gateway.core.effects import Accepted, Effect, Refused, StartTurn, StopTurn
from gateway.core.errors import AlreadyDecided, GatewayError, NoSuchTurn, OutcomeUnknown, QueueFull
from gateway.core.event_log import EventLog
from gateway.core.events import EventKind
from gateway.core.idempotency import IdempotencyLedger
from gateway.core.limits import Limits
from gateway.core.storage import (
    Decision,
    LedgerEntry,
    PendingCall,
    QueuedMessage,
    SessionCommit,
    SessionRecord,
    StoredSession,
    TurnState,
)
from gateway.core.trace_context import TraceContext
from gateway.core.transcript import answer_text, mark_decided
from gateway.core.turn_states import TRANSITIONS, Outcome, Signal, signal_at_rest
from gateway.core.unsaved_changes import UnsavedChanges


@frozen
class Sender:
    """Who a client message came from."""

    subject: str
    request_id: str
    is_v2: bool
    trace: TraceContext | None = None


class Session:
    """One conversation. All times are Unix seconds given by the caller."""

    def __init__(
        self,
        session_id: str,
        *,
        limits: Limits,
        new_id: Callable[[], str],
        stored: StoredSession | None = None,
        keeps_commits: bool = True,
        now: float = 0.0,
    ) -> None:
        self.session_id = session_id
        self._limits = limits
        self._new_id = new_id
        self._keeps_commits = keeps_commits
        self._unsaved = UnsavedChanges()
        self._queue: list[QueuedMessage] = []
        self._overtaking: list[QueuedMessage] = []
        record = stored.record if stored else None
        self.epoch = record.epoch if record else new_id()
        self.log = EventLog(last_seq=stored.last_seq, events=stored.events) if stored else EventLog()
        self._unsaved.saved_seq = self.log.last_seq
        self.turn_state = record.turn_state if record else TurnState.IDLE
        self.turn_id = record.turn_id if record else None
        self.turn_first_seq = record.turn_first_seq if record else 0
        self._turn_message = record.turn_message if record else None
        self._resumable = record.resumable if record else False
        self._unsent = record.unsent if record else False
        self._text_prefix = record.text_prefix if record else ""
        self._text_prefix_of = self.turn_id
        """The turn that ``_text_prefix`` is of: the one that clients see, which may be over already."""
        self._last_event_id = (stored.last_event_id or None) if stored else None
        self.pending: dict[str, PendingCall] = {
            call.call_id: call for call in (record.pending if record else ())
        }
        self._decisions: dict[str, str] = {}
        self._ledger = IdempotencyLedger(limits.dedupe_window)
        if stored:
            for waiting in stored.queue:
                (self._overtaking if waiting.overtakes else self._queue).append(waiting)
            for entry in stored.ledger:
                self._ledger.add(entry)
            self._decisions = {decision.call_id: decision.decision for decision in stored.decisions}
        self._touched_at = now
        self._stored_record = record or self.record()
        if record is None:
            self._unsaved.record = True

    # ------------------------------------------------------------------ inputs: clients

    def receive(self, message: AgentBound | Cancel, sender: Sender, now: float) -> list[Effect]:
        """A client's message: accept it, refuse it, or recognise it as a repeat."""
        self._touched_at = now
        if sender.is_v2 and message.message_id is not None:
            earlier = self._ledger.find(message.message_id, now)
            if earlier is not None:
                return [Accepted(message.message_id, earlier.turn_id or None, duplicate=True)]
        if isinstance(message, Cancel):
            return self._cancel(message, sender, now)
        queue = self._overtaking if message.overtakes else self._queue
        if len(queue) >= self._limits.max_queued_messages:
            waiting = f"{len(queue)} messages are waiting"
            error = QueueFull(f"{waiting} in this session; send this one again when a turn has ended.")
            return [Refused(error, message.message_id)]
        if isinstance(message, HitlDecision):
            if message.call_id in self._decisions:
                decided = f"This call was already decided: {self._decisions[message.call_id]}."
                return [Refused(AlreadyDecided(decided), message.message_id, message.call_id)]
            self._decide(message, now)
        elif isinstance(message, ToolResult):
            self.pending.pop(message.call_id, None)
            self._rest()
        queued = QueuedMessage(
            turn_id=self._new_id(),
            message_id=message.message_id,
            overtakes=message.overtakes,
            body=message.body,
            subject=sender.subject,
            request_id=sender.request_id,
            accepted_at=now,
            trace=sender.trace,
        )
        queue.append(queued)
        self._unsaved.queued.append(queued)
        self._remember(message.message_id, queued.turn_id, sender, now)
        return [Accepted(message.message_id, queued.turn_id), *self.start_next()]

    def _cancel(self, message: Cancel, sender: Sender, now: float) -> list[Effect]:
        running = self.turn_id if self.turn_state is TurnState.RUNNING else None
        turn_id = message.turn_id or running
        if turn_id is not None and turn_id == running:
            self._remember(message.message_id, turn_id, sender, now)
            return [Accepted(message.message_id, turn_id), *self.end_turn(turn_id, Outcome.CANCELLED)]
        for queue in (self._overtaking, self._queue):
            for waiting in queue:
                if waiting.turn_id == turn_id:
                    queue.remove(waiting)
                    self._unsaved.dequeued.append(waiting.turn_id)
                    self._append_turn_ended(waiting.turn_id, Outcome.CANCELLED, EventKind.V2_ONLY)
                    self._remember(message.message_id, turn_id, sender, now)
                    return [Accepted(message.message_id, turn_id)]
        if not sender.is_v2:
            # The turn ended while the cancel was on its way: what the user wanted is so already.
            return [Accepted(message.message_id, None)]
        return [Refused(NoSuchTurn("There is no running or waiting turn of that id."), message.message_id)]

    def _decide(self, message: HitlDecision, now: float) -> None:
        self._decisions[message.call_id] = message.decision
        self._unsaved.decisions.append(Decision(message.call_id, message.decision, now))
        resolved = {"type": "approval_resolved", "call_id": message.call_id, "decision": message.decision}
        self.log.append(EventKind.V2_ONLY, encode_json(resolved))
        call = self.pending.pop(message.call_id, None)
        if call is not None and message.decision != "reject":
            # Approved is not answered: the client now runs the tool, and a device that comes later sees so.
            self.pending[message.call_id] = mark_decided(call, message.decision)
        self._rest()

    def _remember(self, message_id: str | None, turn_id: str, sender: Sender, now: float) -> None:
        if sender.is_v2 and message_id is not None:
            entry = LedgerEntry(message_id, turn_id, now)
            self._ledger.add(entry)
            self._unsaved.ledger.append(entry)

    # ------------------------------------------------------------------ inputs: the turn

    def start_next(self) -> list[Effect]:
        """Start the turn of the next queued message, if none runs."""
        if self.turn_state is TurnState.RUNNING or not (self._overtaking or self._queue):
            return []
        message = (self._overtaking or self._queue).pop(0)
        self._unsaved.dequeued.append(message.turn_id)
        self._transition(Signal.START)
        self.turn_id = message.turn_id
        self._turn_message = message
        self._resumable = self._unsent = False
        self._last_event_id = None
        # None would leave the last turn's in the store: this one would be resumed behind events it never had.
        self._unsaved.last_event_id = ""
        started: dict[str, object] = {"type": "turn_started", "turn_id": message.turn_id}
        if message.message_id is not None:
            started["id"] = message.message_id
        self.turn_first_seq = self.log.append(EventKind.V2_ONLY, encode_json(started))
        return [StartTurn(message)]

    def stream_opened(self, turn_id: str, *, resumable: bool) -> None:
        """The runtime accepted the turn's POST."""
        if turn_id == self.turn_id and resumable != self._resumable:
            self._resumable = resumable
            self._unsaved.record = True

    def leave_unsent(self) -> None:
        """The running turn's message was not sent, and is not going to be here: ``recover`` sends it."""
        self._unsent = self._unsaved.record = True

    def agent_event(self, turn_id: str, event: AgentEvent, event_id: str | None = None) -> bool:
        """One event of the turn's stream; False when the turn is over and the event was dropped."""
        if turn_id != self.turn_id or self.turn_state is not TurnState.RUNNING:
            return False
        self.log.append(event.kind, event.data)
        if event_id is not None:
            self._last_event_id = self._unsaved.last_event_id = event_id
        if event.call_id is not None and event.type == "tool_call":
            self.pending.pop(event.call_id, None)
            self.pending[event.call_id] = PendingCall(event.call_id, event.requires_approval, event.data)
            if len(self.pending) > self._limits.max_pending_calls:
                del self.pending[next(iter(self.pending))]
            self._unsaved.record = True
        return True

    def end_turn(self, turn_id: str, outcome: Outcome, error: GatewayError | None = None) -> list[Effect]:
        """The turn is over; says so in the log and starts the next. Nothing when it is over already."""
        if not self.is_running(turn_id):
            return []
        if error is not None:
            self.log.append(EventKind.AGENT, self._error_event(error))
        kind = EventKind.CANCELLED if outcome is Outcome.CANCELLED else EventKind.V2_ONLY
        self._append_turn_ended(turn_id, outcome, kind)
        self._transition(signal_at_rest(self.pending.values()))
        self._turn_message = None
        stop: list[Effect] = [StopTurn(turn_id)] if outcome is Outcome.CANCELLED else []
        return stop + self.start_next()

    def abandon(self) -> list[Effect]:
        """Nobody came back: cancel what runs and all that waits."""
        effects: list[Effect] = []
        for queue in (self._overtaking, self._queue):
            while queue:
                waiting = queue.pop(0)
                self._unsaved.dequeued.append(waiting.turn_id)
                self._append_turn_ended(waiting.turn_id, Outcome.CANCELLED, EventKind.V2_ONLY)
        if self.turn_state is TurnState.RUNNING and self.turn_id is not None:
            effects += self.end_turn(self.turn_id, Outcome.CANCELLED)
        return effects

    def recover(self) -> list[Effect]:
        """After ``stored`` was loaded: carry on what a crash cut, or say that its outcome is unknown."""
        if self.turn_state is not TurnState.RUNNING or self.turn_id is None:
            return self.start_next()
        if self._unsent and self._turn_message is not None:
            # Stored before it is sent: after a crash from here on nobody knows any more.
            self._unsent, self._unsaved.record = False, True
            return [StartTurn(self._turn_message)]
        if self._resumable and self._turn_message is not None:
            return [StartTurn(self._turn_message, resumes=True, last_event_id=self._last_event_id)]
        error = OutcomeUnknown(
            "The gateway restarted while the agent was answering. Whether the agent finished is unknown; "
            "look at the result before asking again."
        )
        return self.end_turn(self.turn_id, Outcome.OUTCOME_UNKNOWN, error)

    # ------------------------------------------------------------------ inputs: time and space

    def trim(self, stored_seq: int) -> None:
        """Keep the log within its bounds, oldest first; the running answer's text is kept.

        Events after ``stored_seq`` stay in any case: the store does not have them yet, nor has any client.
        """
        seq = self.log.overflow(self._limits.replay_events, self._limits.replay_bytes)
        if seq is not None:
            self.trim_to(min(seq, stored_seq))

    def trim_to(self, seq: int) -> None:
        """Drop events up to ``seq``: acknowledged by all, too old, or too many."""
        dropped = self.log.trim_to(seq)
        if not dropped:
            return
        shown = self.shown
        if shown.turn_state is TurnState.RUNNING and dropped[-1].seq > shown.turn_first_seq:
            if self._text_prefix_of != shown.turn_id:
                self._text_prefix_of, self._text_prefix = shown.turn_id, ""
            self._text_prefix += answer_text(event for event in dropped if event.seq > shown.turn_first_seq)
            self._unsaved.record |= shown.turn_id == self.turn_id
        self._unsaved.trimmed_to = seq

    def renew_epoch(self) -> None:
        """Begin a new epoch: clients may hold other events under the same seqs as the store does.

        The events held stay as they are; no client can ask for them by the old epoch's seqs any more.
        """
        self.epoch = self._new_id()
        self._unsaved.record = True

    # ------------------------------------------------------------------ outputs

    def is_running(self, turn_id: str) -> bool:
        """Whether that turn is the one that runs."""
        return self.turn_id == turn_id and self.turn_state is TurnState.RUNNING

    @property
    def is_resumable(self) -> bool:
        """Whether the runtime said that the running turn's stream can be resumed."""
        return self._resumable

    @property
    def is_at_rest(self) -> bool:
        """No turn runs and none waits."""
        return self.turn_state is not TurnState.RUNNING and not self._queue and not self._overtaking

    @property
    def touched_at(self) -> float:
        """When a client last said something, or the session was loaded; Unix seconds."""
        return self._touched_at

    @property
    def waiting_messages(self) -> int:
        """Messages accepted whose turn has not started."""
        return len(self._queue) + len(self._overtaking)

    @property
    def shown(self) -> SessionRecord:
        """The state that goes with the newest event that clients may see; told to whoever joins.

        With a store it is the one that the store holds. It has to go with the events: else a client is told
        of a turn's end and gets that turn's last tokens after it, or of a call and gets the call once more.
        """
        return self._stored_record if self._keeps_commits else self.record()

    def show(self, stored: SessionRecord) -> None:
        """The record of a commit is stored now, and so are the events that came with it."""
        self._stored_record = stored

    def is_decided(self, call_id: str) -> bool:
        """Whether this call has been approved, edited or rejected."""
        return call_id in self._decisions

    def running_text(self, upto: int) -> str:
        """The running answer up to seq ``upto``: what a client that lost the events can show."""
        shown = self.shown
        if shown.turn_state is not TurnState.RUNNING:
            return ""
        prefix = self._text_prefix if self._text_prefix_of == shown.turn_id else ""
        return prefix + answer_text(self.log.between(shown.turn_first_seq, upto))

    def take_commit(self) -> SessionCommit | None:
        """All changes since the last call as one atomic step, or None when there are none."""
        if not self._keeps_commits:
            self._unsaved.discard()
            return None
        return self._unsaved.take(self.session_id, self.log, self.record)

    def record(self) -> SessionRecord:
        """The small state as it is stored."""
        return SessionRecord(
            epoch=self.epoch,
            touched_at=self._touched_at,
            turn_id=self.turn_id,
            turn_state=self.turn_state,
            turn_first_seq=self.turn_first_seq,
            turn_message=self._turn_message,
            resumable=self._resumable,
            unsent=self._unsent,
            pending=tuple(self.pending.values()),
            text_prefix=self._text_prefix if self._text_prefix_of == self.turn_id else "",
        )

    # ------------------------------------------------------------------ inner

    def _transition(self, signal: Signal) -> None:
        self.turn_state = TRANSITIONS[self.turn_state, signal]
        self._unsaved.record = True

    def _rest(self) -> None:
        if self.turn_state is not TurnState.RUNNING:
            self._transition(signal_at_rest(self.pending.values()))
        self._unsaved.record = True

    def _append_turn_ended(self, turn_id: str, outcome: Outcome, kind: EventKind) -> None:
        ended = {
            "type": "turn_ended",
            "turn_id": turn_id,
            "outcome": outcome.value,
            "last_seq": self.log.last_seq,
        }
        self.log.append(kind, encode_json(ended))

    def _error_event(self, error: GatewayError) -> bytes:
        fields = error_fields(error)
        if self._turn_message is not None and self._turn_message.message_id is not None:
            fields["message_id"] = self._turn_message.message_id
        return encode_json(fields)

"""The conversation engine: takes one client message, lets the brain work, records what came of it."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import attrs
import orjson
import structlog
import trio

from gateway.reference_agent import events
from gateway.reference_agent.approvals import ApprovalPolicy
from gateway.reference_agent.brain import Brain, BrainError
from gateway.reference_agent.contract import (
    ClientMessage,
    HitlDecision,
    InvalidMessageError,
    SwitchAgent,
    ToolResult,
    UserMessage,
    read_message,
)
from gateway.reference_agent.session import Conversation, RefusedError, SessionState, Switch
from gateway.reference_agent.settings import AgentSettings
from gateway.reference_agent.state import FINISHED, STOPPED, Change, StateStore, TurnRecord
from gateway.reference_agent.step import StepRecorder
from gateway.reference_agent.turn import Turn

MAX_STEPS = 12
"""Steps (answers of the brain) in one request, so that two agents cannot hand over to each other for ever."""

INTERNAL_ERROR = "The agent failed. Try again."
TURN_STOPPED = "This turn was stopped before its end."


class IdempotencyConflictError(Exception):
    """The ``Idempotency-Key`` was used before, with another message."""


class TurnGoneError(Exception):
    """The stream to be resumed is not known (any more); its events cannot be had."""


def utc_now() -> str:
    """The wall clock as RFC 3339 text in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_call_id() -> str:
    """A call id nobody has had before."""
    return f"call_{uuid.uuid4().hex[:20]}"


class Runtime:
    """Runs turns, one at a time per session, each in a task of ``nursery``.

    Error handling: whatever goes wrong in a turn ends that turn with one ``error`` event; it is logged once
    and reaches neither the nursery nor another session.
    """

    def __init__(
        self,
        settings: AgentSettings,
        brain: Brain,
        policy: ApprovalPolicy,
        store: StateStore,
        nursery: trio.Nursery,
        *,
        now: Callable[[], str] = utc_now,
        call_ids: Callable[[], str] = new_call_id,
    ) -> None:
        self.store = store
        self._settings = settings
        self._brain = brain
        self._policy = policy
        self._nursery = nursery
        self._now = now
        self._call_ids = call_ids
        self._holders: dict[str, Turn] = {}
        self._keyed: dict[tuple[str, str], Turn] = {}
        self._door = trio.Lock()
        self._log = structlog.get_logger("reference_agent")

    @property
    def running_turns(self) -> int:
        """Sessions with a turn that is not finished."""
        return len(self._holders)

    async def create_session(
        self, session_id: str | None, *, title: str | None = None, user_id: str | None = None
    ) -> tuple[SessionState, bool]:
        """The session (a new id is made if none is given), and whether it is new."""
        async with self._door:
            known = None if session_id is None else await self.store.session(session_id)
            if known is not None:
                return known, False
            state = self._new_state(session_id or str(uuid.uuid4()), user_id, title)
            conversation = Conversation(state, [], self._now)
            conversation.audit("session_created")
            await self._commit(conversation)
            return state, True

    async def open_turn(
        self,
        session_id: str,
        message: Mapping[str, Any],
        *,
        key: str | None = None,
        resuming: bool = False,
        user_id: str | None = None,
    ) -> Turn:
        """Start the work a message asks for, or find the work that an earlier request with ``key`` started.

        The caller must `Turn.join` at once. Raises `IdempotencyConflictError`, and `TurnGoneError` when
        ``resuming`` a turn that is not known.
        """
        digest = hashlib.sha256(orjson.dumps(dict(message), option=orjson.OPT_SORT_KEYS)).hexdigest()
        async with self._door:
            turn = Turn(session_id, key=key, digest=digest, grace=self._settings.resume_grace)
            record = None
            if key is not None:
                live = self._keyed.get((session_id, key))
                record = None if live is not None else await self.store.turn(session_id, key)
                known = live if live is not None else record
                if known is not None and known.digest != digest:
                    raise IdempotencyConflictError
                if live is not None:
                    return live
                if record is None and resuming:
                    raise TurnGoneError
            if record is not None:
                turn.add(*record.events)
                if record.status == FINISHED:
                    turn.finish()
                    return turn
                if record.status == STOPPED:
                    turn.fail("TURN_STOPPED", TURN_STOPPED, retryable=False)
                    turn.finish()
                    return turn
            if key is not None:
                self._keyed[session_id, key] = turn
            self._nursery.start_soon(self._run, turn, dict(message), user_id, record)
            return turn

    async def _run(
        self,
        turn: Turn,
        message: dict[str, Any],
        user_id: str | None,
        record: TurnRecord | None,
    ) -> None:
        ended = False
        try:
            with turn.scope:
                try:
                    if await self._take_session(turn):
                        await self._converse(turn, message, user_id, record)
                except Exception:
                    self._log.exception("turn_failed", session_id=turn.session_id)
                    turn.fail("INTERNAL_ERROR", INTERNAL_ERROR, retryable=True)
            if turn.scope.cancelled_caught:
                turn.fail("TURN_STOPPED", TURN_STOPPED, retryable=False)
            ended = True
        finally:
            if self._holders.get(turn.session_id) is turn:
                del self._holders[turn.session_id]
            if turn.key is not None and self._keyed.get((turn.session_id, turn.key)) is turn:
                del self._keyed[turn.session_id, turn.key]
            if ended:  # else the process ends, and whoever listens must see a cut, not an end
                turn.finish()

    async def _take_session(self, turn: Turn) -> bool:
        """Wait until no other turn holds the session; whether that came in time.

        A turn nobody hears any more is stopped: its client has gone on.
        """
        with trio.move_on_after(self._settings.busy_patience):
            while (holder := self._holders.get(turn.session_id)) is not None:
                await holder.wait_abandoned()
                holder.stop()
                await holder.wait_finished()
            self._holders[turn.session_id] = turn
            return True
        turn.fail(
            "SESSION_BUSY", "The session is still answering an earlier message. Try again.", retryable=True
        )
        return False

    async def _converse(
        self, turn: Turn, raw: dict[str, Any], user_id: str | None, record: TurnRecord | None
    ) -> None:
        conversation = await self._load(turn.session_id, user_id)
        recorder = StepRecorder(turn, conversation, self.store, self._policy, self._call_ids, record=record)
        if record is None and not await self._take_in(conversation, recorder, raw):
            return
        try:
            await self._answer(conversation, recorder)
        except trio.Cancelled:
            # The user has seen what was streamed: it belongs into the history. A keyed turn that is cancelled
            # only because the process ends is left as it is, to be carried on after the restart.
            if turn.key is None or turn.scope.cancel_called:
                recorder.interrupt()
                conversation.audit("turn_stopped")
                await recorder.settle(ends_turn=True, status=STOPPED)
                await self._brain.release(turn.session_id)
            raise

    async def _take_in(self, conversation: Conversation, recorder: StepRecorder, raw: dict[str, Any]) -> bool:
        """Record the client's message; whether the brain is to be asked now."""
        goes_on = False
        try:
            message = read_message(raw)
            switch = self._receive(conversation, message)
            if switch is not None:
                recorder.announce(switch)
            conversation.count("turns")
            goes_on = self._goes_on(conversation, message)
        except InvalidMessageError as exc:
            recorder.fail(events.error("INVALID_MESSAGE", str(exc), retryable=False))
        except RefusedError as exc:
            conversation.audit("message_refused", code=exc.code)
            recorder.fail(events.error(exc.code, exc.message, retryable=False, call_id=exc.call_id))
        await recorder.settle(starts_turn=True, ends_turn=not goes_on)
        return goes_on

    async def _answer(self, conversation: Conversation, recorder: StepRecorder) -> None:
        for _ in range(MAX_STEPS):
            try:
                await recorder.run_step(self._brain)
            except BrainError as exc:
                conversation.count("errors")
                conversation.audit("error", code=exc.code)
                recorder.fail(events.error(exc.code, exc.message, retryable=exc.retryable))
                recorder.answer_complete = True
            except Exception:
                self._log.exception("brain_failed", session_id=conversation.state.session_id)
                conversation.audit("error", code="INTERNAL_ERROR")
                recorder.fail(events.error("INTERNAL_ERROR", INTERNAL_ERROR, retryable=True))
                recorder.answer_complete = True
            await recorder.settle(ends_turn=recorder.answer_complete)
            await self._brain.release(conversation.state.session_id)
            if recorder.answer_complete:
                return
        recorder.fail(
            events.error(
                "TOO_MANY_STEPS", f"Stopped after {MAX_STEPS} steps without an answer.", retryable=False
            )
        )
        await recorder.settle(ends_turn=True)

    def _receive(self, conversation: Conversation, message: ClientMessage) -> Switch | None:
        match message:
            case UserMessage():
                return conversation.receive_user_message(message)
            case SwitchAgent():
                return conversation.receive_switch(message)
            case ToolResult():
                conversation.receive_tool_result(message)
            case HitlDecision():
                conversation.receive_decision(message, self._policy.why_denied)
        return None

    def _goes_on(self, conversation: Conversation, message: ClientMessage) -> bool:
        """Whether the brain is asked now: not while calls are open, nor when nothing was said to it."""
        match message:
            case UserMessage(role=role):
                return role == "user"
            case SwitchAgent(content=content):
                return content is not None
            case _:
                return not conversation.waits_for_client

    async def _load(self, session_id: str, user_id: str | None) -> Conversation:
        state = await self.store.session(session_id)
        if state is None:
            conversation = Conversation(self._new_state(session_id, user_id, None), [], self._now)
            conversation.audit("session_created")
            return conversation
        if state.user_id is None and user_id is not None:
            state = attrs.evolve(state, user_id=user_id)
        return Conversation(state, await self.store.history(session_id), self._now)

    def _new_state(self, session_id: str, user_id: str | None, title: str | None) -> SessionState:
        now = self._now()
        return SessionState(session_id, created_at=now, updated_at=now, user_id=user_id, title=title)

    async def _commit(self, conversation: Conversation) -> None:
        state, entries, audit = conversation.take_changes()
        await self.store.commit(Change(state, entries, audit))

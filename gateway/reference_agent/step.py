"""Turns a brain's pieces into events and history, so that what a client has seen is never lost or redone."""

from collections.abc import Callable
from typing import Any

import orjson

from gateway.reference_agent import events
from gateway.reference_agent.agents import AGENTS
from gateway.reference_agent.approvals import ASK, DENY, ApprovalPolicy
from gateway.reference_agent.brain import Brain, BrainError, CallTool, Piece, Step, SwitchTo, Token, Usage
from gateway.reference_agent.history import RequestedCall
from gateway.reference_agent.session import (
    AWAITING_DECISION,
    AWAITING_RESULT,
    Conversation,
    OpenCall,
    Switch,
)
from gateway.reference_agent.state import FINISHED, RUNNING, Change, StateStore, TurnRecord
from gateway.reference_agent.turn import Turn


class StepRecorder:
    """Records one turn, step by step.

    Rules, for a turn with a key:

    - a token is in the store before any listener sees it;
    - every other event becomes visible only after the commit that makes it true (`settle`);
    - a step whose commit was made is never asked again; an open one is asked again after a restart, with the
      text that was already given.
    """

    def __init__(
        self,
        turn: Turn,
        conversation: Conversation,
        store: StateStore,
        policy: ApprovalPolicy,
        call_ids: Callable[[], str],
        *,
        record: TurnRecord | None = None,
    ) -> None:
        self.answer_complete = False
        self._turn = turn
        self._conversation = conversation
        self._store = store
        self._policy = policy
        self._call_ids = call_ids
        self._record = record
        self._text = "" if record is None else _tokens_of(record.events[record.settled :])
        self._calls: list[CallTool] = []
        self._switch: SwitchTo | None = None
        self._pending: list[bytes] = []

    def announce(self, switch: Switch) -> None:
        """Tell the client of a switch with the next commit."""
        self._emit(
            events.agent_switched(switch.from_agent, switch.to_agent, switch.reason, switch.confidence)
        )

    def fail(self, error: dict[str, Any]) -> None:
        """Tell the client of a failure with the next commit; text given so far stays in the history."""
        self.interrupt()
        self._emit(error)

    def interrupt(self) -> None:
        """Keep in the history what the user was given of a step that will not end."""
        self._conversation.say(self._text, interrupted=True)
        self._text = ""

    async def run_step(self, brain: Brain) -> None:
        """Ask the brain once. What it said becomes true with the next `settle`. Raises `BrainError`."""
        self._calls, self._switch, self.answer_complete = [], None, False
        step = Step(
            session_id=self._conversation.state.session_id,
            agent=self._conversation.agent,
            history=tuple(self._conversation.history),
            pinned=self._conversation.state.pinned,
            already_said=self._text,
            step_id=None if self._record is None else f"{self._record.key} {self._record.settled}",
        )
        await brain.think(step, self._say)
        if self._switch is not None:
            self._finish_with_switch(self._switch)
        elif self._calls:
            self._finish_with_calls()
        else:
            self._conversation.say(self._text)
            self._conversation.audit("answer_completed", characters=len(self._text))
            self._emit(events.final())
            self.answer_complete = True
        self._text = ""

    async def settle(
        self, *, starts_turn: bool = False, ends_turn: bool = False, status: str = FINISHED
    ) -> None:
        """Commit everything since the last commit, then make its events visible. Not torn by cancellation."""
        pending, self._pending = tuple(self._pending), []
        record = None
        if self._turn.key is not None:
            record = TurnRecord(
                session_id=self._turn.session_id,
                key=self._turn.key,
                digest=self._turn.digest,
                status=status if ends_turn else RUNNING,
                settled=len(self._turn) + len(pending),
            )
            self._record = record
        state, entries, audit = self._conversation.take_changes()
        await self._store.commit(Change(state, entries, audit, record, pending, starts_turn))
        self._turn.add(*pending)

    async def _say(self, *pieces: Piece) -> None:
        words = [piece.text for piece in pieces if isinstance(piece, Token) and piece.text]
        if words:
            await self._stream(tuple(events.encode_event(events.token(word)) for word in words))
            self._text += "".join(words)
        for piece in pieces:
            match piece:
                case CallTool():
                    self._calls.append(piece)
                case SwitchTo():
                    self._switch = piece
                case Usage():
                    self._conversation.count("llm_requests", piece.requests)
                    self._conversation.count("prompt_tokens", piece.prompt_tokens)
                    self._conversation.count("completion_tokens", piece.completion_tokens)

    async def _stream(self, tokens: tuple[bytes, ...]) -> None:
        # After a "stop generating" the history then ends with what the user saw, and little is paid for.
        await self._turn.wait_heard()
        if self._record is not None:
            await self._store.add_events(self._record, tokens)
        self._turn.add(*tokens)

    def _emit(self, event: dict[str, Any]) -> None:
        self._pending.append(events.encode_event(event))

    def _finish_with_switch(self, wanted: SwitchTo) -> None:
        if wanted.agent not in AGENTS:
            raise BrainError(
                "UNKNOWN_AGENT", f"The brain named an unknown agent: {wanted.agent[:64]!r}.", retryable=True
            )
        self._conversation.say(self._text)
        self.announce(self._conversation.switch_to(wanted.agent, wanted.reason, wanted.confidence))

    def _finish_with_calls(self) -> None:
        conversation = self._conversation
        requested: list[RequestedCall] = []
        refused: list[tuple[RequestedCall, str]] = []
        opened: list[OpenCall] = []
        used = {call.call_id for entry in conversation.history for call in entry.tool_calls}
        for wanted in self._calls:
            call_id = wanted.call_id if wanted.call_id and wanted.call_id not in used else self._call_ids()
            used.add(call_id)
            call = RequestedCall(call_id, wanted.tool_name, wanted.arguments)
            requested.append(call)
            why_not = wanted.problem or conversation.agent.why_not_allowed(call.tool_name, call.arguments)
            verdict = self._policy.decide(call.tool_name, call.arguments)
            if why_not is None and verdict.action == DENY:
                why_not = f"The policy denies this call: {verdict.reason}"
            if why_not is not None:
                refused.append((call, why_not))
                continue
            asks = verdict.action == ASK
            opened.append(
                OpenCall(
                    call_id=call_id,
                    tool_name=call.tool_name,
                    arguments=call.arguments,
                    requires_approval=asks,
                    agent=conversation.agent.name,
                    at=conversation.state.updated_at,
                    status=AWAITING_DECISION if asks else AWAITING_RESULT,
                    reason=verdict.reason if asks else None,
                )
            )
        conversation.hand_out(self._text, tuple(requested), tuple(opened), tuple(refused))
        for open_call in opened:
            self._emit(
                events.tool_call(
                    open_call.call_id,
                    open_call.tool_name,
                    open_call.arguments,
                    requires_approval=open_call.requires_approval,
                )
            )
        self.answer_complete = bool(opened)


def _tokens_of(encoded: tuple[bytes, ...]) -> str:
    """The text that the events of an open step have given to the user."""
    return "".join(orjson.loads(data).get("token") or "" for data in encoded)

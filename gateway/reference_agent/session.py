"""A session's state, and every rule about what a client message or a brain's piece does to it. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import orjson

from gateway.reference_agent.agents import AGENTS, FIRST_AGENT, Agent
from gateway.reference_agent.contract import HitlDecision, SwitchAgent, ToolResult, UserMessage
from gateway.reference_agent.history import Entry, RequestedCall, text_of

AWAITING_DECISION = "awaiting_decision"
AWAITING_RESULT = "awaiting_result"
RESOLVED = "resolved"

SWITCHES_KEPT = 100
TITLE_LENGTH = 80


class RefusedError(Exception):
    """The message is well formed but not possible now; the session is as it was before."""

    def __init__(self, code: str, message: str, *, call_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.call_id = call_id


@attrs.frozen
class OpenCall:
    """A tool call that was handed out, until all calls of the same answer are resolved."""

    call_id: str
    tool_name: str
    arguments: dict[str, Any]
    requires_approval: bool
    agent: str
    at: str
    status: str
    reason: str | None = None
    """Why the policy asks for approval."""

    feedback: str | None = None
    """What the user said when approving or editing."""


@attrs.frozen
class Switch:
    """One change of agent."""

    from_agent: str
    to_agent: str
    reason: str
    at: str
    confidence: float | None = None


@attrs.frozen
class SessionState:
    """All of a session but its history."""

    session_id: str
    created_at: str
    updated_at: str
    user_id: str | None = None
    title: str | None = None
    agent: str = FIRST_AGENT
    pinned: bool = False
    calls: tuple[OpenCall, ...] = ()
    switches: tuple[Switch, ...] = ()
    metrics: Mapping[str, int] = attrs.field(factory=dict)
    entries: int = 0


@attrs.frozen
class AuditRecord:
    """One line of the audit log: what happened, never the content of a message."""

    at: str
    session_id: str
    event_type: str
    details: Mapping[str, Any]


class Conversation:
    """The working copy of one session while a turn runs. Collects what changed until `take_changes`."""

    def __init__(self, state: SessionState, history: list[Entry], now: Callable[[], str]) -> None:
        self.state = state
        self.history = history
        self._now = now
        self._entries: list[Entry] = []
        self._audit: list[AuditRecord] = []

    @property
    def agent(self) -> Agent:
        """Who answers now."""
        return AGENTS[self.state.agent]

    @property
    def waits_for_client(self) -> bool:
        """Some tool call is not resolved yet."""
        return any(call.status != RESOLVED for call in self.state.calls)

    def take_changes(self) -> tuple[SessionState, tuple[Entry, ...], tuple[AuditRecord, ...]]:
        """The new state, entries and audit records since the last call."""
        changes = (self.state, tuple(self._entries), tuple(self._audit))
        self._entries, self._audit = [], []
        return changes

    # What clients do

    def receive_user_message(self, message: UserMessage) -> Switch | None:
        """Take a message in; the returned switch, if any, is to be announced."""
        switch = None
        if message.agent_type not in (None, self.state.agent):
            switch = self.choose_agent(message.agent_type, "Chosen with the message.")
        if message.role == "user":
            self._abandon_calls("The user sent a new message instead.")
            self.count("user_messages")
            if self.state.title is None:
                title = " ".join(message.content.split())[:TITLE_LENGTH]
                self.state = attrs.evolve(self.state, title=title or None)
        self._append(Entry(role=message.role, content=message.content, at=self._now()))
        self.audit("message_received", role=message.role, characters=len(message.content))
        return switch

    def receive_switch(self, message: SwitchAgent) -> Switch:
        """Change the agent on the client's wish; with content it is a message too."""
        switch = self.choose_agent(message.agent_type, message.reason or "Chosen by the user.")
        if message.content is not None:
            self.receive_user_message(UserMessage(content=message.content))
        return switch

    def choose_agent(self, name: str, reason: str) -> Switch:
        """Let the client's choice stand until it chooses again; the orchestrator routes freely again.

        Raises `RefusedError` when there is no such agent.
        """
        if name not in AGENTS:
            raise RefusedError("UNKNOWN_AGENT", f"There is no agent {name[:64]!r}: use {', '.join(AGENTS)}.")
        switch = self.switch_to(name, reason, None)
        self.state = attrs.evolve(self.state, pinned=name != FIRST_AGENT)
        return switch

    def receive_tool_result(self, message: ToolResult) -> None:
        """Record what the client's tool gave. Raises `RefusedError`."""
        call = self._open_call(message.call_id)
        if call.status == AWAITING_DECISION:
            raise RefusedError(
                "APPROVAL_REQUIRED",
                f"The call {call.call_id} needs the user's approval: send a hitl_decision first.",
                call_id=call.call_id,
            )
        if message.error is not None:
            self._resolve(call, f"Error: {message.error}", is_error=True)
            self.count("tool_errors")
        else:
            self._resolve(call, text_of(message.result), is_error=False)
        self.audit("tool_result", call_id=call.call_id, tool_name=call.tool_name, ok=message.error is None)

    def receive_decision(
        self, message: HitlDecision, why_denied: Callable[[str, Mapping[str, Any]], str | None]
    ) -> None:
        """Record the user's decision. Raises `RefusedError`, on a second decision too.

        Edited arguments are held to what the agent and the policy (``why_denied``) allow.
        """
        call = self._open_call(message.call_id, refused_as="ALREADY_DECIDED")
        if not call.requires_approval:
            raise RefusedError(
                "APPROVAL_NOT_REQUIRED",
                f"The call {call.call_id} needs no approval: run it and send a tool_result.",
                call_id=call.call_id,
            )
        if call.status != AWAITING_DECISION:
            raise RefusedError(
                "ALREADY_DECIDED", f"The call {call.call_id} is decided already.", call_id=call.call_id
            )
        if message.decision == "reject":
            because = f" They said: {message.feedback}" if message.feedback else ""
            self._resolve(call, f"The user rejected this call; it was not run.{because}", is_error=True)
        else:
            arguments = message.modified_arguments if message.decision == "edit" else None
            if arguments is not None:
                why_not = AGENTS[call.agent].why_not_allowed(call.tool_name, arguments)
                why_not = why_not or why_denied(call.tool_name, arguments)
                if why_not is not None:
                    raise RefusedError("EDIT_NOT_ALLOWED", why_not, call_id=call.call_id)
            self._replace(
                attrs.evolve(
                    call,
                    status=AWAITING_RESULT,
                    arguments=call.arguments if arguments is None else arguments,
                    feedback=message.feedback,
                )
            )
        self.count({"approve": "approved", "edit": "edited", "reject": "rejected"}[message.decision])
        self.audit(
            "approval_decided", call_id=call.call_id, tool_name=call.tool_name, decision=message.decision
        )

    # What the brain does

    def hand_out(
        self,
        text: str,
        requested: tuple[RequestedCall, ...],
        opened: tuple[OpenCall, ...],
        refused: tuple[tuple[RequestedCall, str], ...] = (),
    ) -> None:
        """Record an answer that ends in tool calls.

        ``opened`` go to the client. ``refused`` the agent may not make: they are recorded as made and failed,
        so that the brain reads why.
        """
        self._append(Entry("assistant", text, self._now(), agent=self.state.agent, tool_calls=requested))
        self.state = attrs.evolve(self.state, calls=opened)
        for call in opened:
            self.count("tool_calls")
            if call.requires_approval:
                self.count("approvals_requested")
            self.audit(
                "tool_call",
                call_id=call.call_id,
                tool_name=call.tool_name,
                requires_approval=call.requires_approval,
            )
        for denied, reason in refused:
            self._append_result(denied.call_id, denied.tool_name, reason, is_error=True)
            self.count("tool_calls_refused")
            self.audit("tool_call_refused", call_id=denied.call_id, tool_name=denied.tool_name)

    def say(self, text: str, *, interrupted: bool = False) -> None:
        """Record text the user has been given; empty text is not worth an entry."""
        if text:
            self._append(
                Entry("assistant", text, self._now(), agent=self.state.agent, interrupted=interrupted)
            )

    def switch_to(self, name: str, reason: str, confidence: float | None) -> Switch:
        """Let another agent answer from here on."""
        switch = Switch(self.state.agent, name, reason, self._now(), confidence)
        if switch.from_agent != name:
            switches = (*self.state.switches, switch)[-SWITCHES_KEPT:]
            self.state = attrs.evolve(self.state, agent=name, switches=switches)
            self.count("agent_switches")
            self.audit("agent_switched", from_agent=switch.from_agent, to_agent=name)
        return switch

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the session's counters."""
        metrics = dict(self.state.metrics)
        metrics[name] = metrics.get(name, 0) + by
        self.state = attrs.evolve(self.state, metrics=metrics, updated_at=self._now())

    def audit(self, event_type: str, **details: Any) -> None:
        """Add a line to the audit log."""
        self._audit.append(AuditRecord(self._now(), self.state.session_id, event_type, details))

    # Tool calls

    def _open_call(self, call_id: str, *, refused_as: str = "CALL_ALREADY_RESOLVED") -> OpenCall:
        for call in self.state.calls:
            if call.call_id == call_id and call.status != RESOLVED:
                return call
        known = any(call_id == call.call_id for entry in self.history for call in entry.tool_calls)
        if known:
            raise RefusedError(refused_as, f"The call {call_id[:64]} is settled already.", call_id=call_id)
        raise RefusedError("UNKNOWN_CALL", f"There is no tool call {call_id[:64]!r}.", call_id=call_id)

    def _resolve(self, call: OpenCall, content: str, *, is_error: bool) -> None:
        for entry in reversed(self.history):
            original = next((one for one in entry.tool_calls if one.call_id == call.call_id), None)
            if original is not None:
                if original.arguments != call.arguments:
                    changed = orjson.dumps(call.arguments).decode()
                    content = f"(The user changed the arguments to {changed}.)\n{content}"
                break
        if call.feedback:
            content = f"(The user said: {call.feedback})\n{content}"
        self._append_result(call.call_id, call.tool_name, content, is_error=is_error)
        self._replace(attrs.evolve(call, status=RESOLVED))
        if not self.waits_for_client:
            self.state = attrs.evolve(self.state, calls=())

    def _abandon_calls(self, why: str) -> None:
        for call in self.state.calls:
            if call.status != RESOLVED:
                self._resolve(call, f"{why} The call was not run.", is_error=True)
                self.audit("tool_call_abandoned", call_id=call.call_id, tool_name=call.tool_name)

    def _replace(self, changed: OpenCall) -> None:
        calls = tuple(changed if call.call_id == changed.call_id else call for call in self.state.calls)
        self.state = attrs.evolve(self.state, calls=calls, updated_at=self._now())

    def _append_result(self, call_id: str, tool_name: str, content: str, *, is_error: bool) -> None:
        self._append(
            Entry("tool", content, self._now(), call_id=call_id, tool_name=tool_name, is_error=is_error)
        )

    def _append(self, entry: Entry) -> None:
        self.history.append(entry)
        self._entries.append(entry)
        self.state = attrs.evolve(self.state, entries=len(self.history), updated_at=self._now())

"""A turn as a span: when it began, its first token, its tool calls and resumes, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.core.effects import StartTurn
from gateway.core.errors import GatewayError
from gateway.core.trace_context import TraceContext, trace_of_message
from gateway.core.turn_states import Outcome
from gateway.trace_ports import Span, Tracing

_FAILURES = frozenset((Outcome.FAILED, Outcome.INTERRUPTED, Outcome.OUTCOME_UNKNOWN))


class TurnTrace:
    """Follows one turn; where traces are off, all it knows is which trace to send on."""

    __slots__ = ("_span", "awaits_token", "context", "log_fields")

    def __init__(self, tracing: Tracing | None, session_id: str, start: StartTurn) -> None:
        message = start.message
        parent = trace_of_message(message.body) or message.trace
        self._span: Span | None = None
        self.context: TraceContext | None = parent
        """For the Agent Runtime."""
        self.log_fields: Mapping[str, str] = {}
        if tracing is not None:
            self._span = tracing.begin(
                "turn",
                parent,
                {
                    "session.id": session_id,
                    "gateway.turn.id": message.turn_id,
                    "gateway.request.id": message.request_id,
                    "gateway.turn.carried_on": start.resumes,
                },
            )
            self.context = self._span.context
            self.log_fields = self._span.log_fields
        self.awaits_token = self._span is not None
        """Whether ``first_token`` is to be called when one comes. Asked once per token."""

    def first_token(self) -> None:
        """The Agent Runtime's first token came."""
        self.awaits_token = False
        if self._span is not None:
            self._span.event("first_token")

    def tool_called(self, *, requires_approval: bool) -> None:
        """It asked for a tool."""
        if self._span is not None:
            self._span.event("tool_call", {"gateway.requires_approval": requires_approval})

    def resuming(self, code: str, attempt: int) -> None:
        """Its stream was cut and is about to be continued."""
        if self._span is not None:
            self._span.event("resume", {"error.type": code, "gateway.resume.attempt": attempt})

    def end(self, outcome: Outcome, error: GatewayError | None) -> None:
        """The turn is over."""
        if self._span is None:
            return
        code = error.code if error is not None else outcome.value if outcome in _FAILURES else ""
        self._span.end({"gateway.turn.outcome": outcome.value}, error=code)

"""One turn: POST the message, carry the stream into the session's log, say how it ended."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import trio

from gateway.core.agent_events import AgentEvent, Skipped, TurnDone, interpret
from gateway.core.codec import decode_json_object
from gateway.core.effects import StartTurn
from gateway.core.errors import (
    AgentFailure,
    AgentStreamInterrupted,
    AgentTimeout,
    AgentUnavailable,
    GatewayError,
    InvalidMessage,
    Overloaded,
)
from gateway.core.events import EventKind
from gateway.core.limits import Limits
from gateway.core.sse import ServerSentEvent
from gateway.core.turn_states import Outcome
from gateway.engine.session_runner import SessionRunner
from gateway.engine.turn_trace import TurnTrace
from gateway.ports import AgentRuntime, AgentStream, Telemetry, TurnRequest
from gateway.trace_ports import Tracing

MAX_RESUMES = 8
"""Cuts of one resumable stream that are mended in a row without an event between them."""
RESUME_DELAY = 0.1
"""Seconds before the first resume; doubles, with full jitter, up to ``RESUME_DELAY_MAX``."""
RESUME_DELAY_MAX = 3.0
KNOWN_TYPES = frozenset({"assistant_message", "tool_call", "agent_switched", "error", "plan_update"})
"""What is a label of its own in metrics; a runtime may invent any other."""


class TurnRunner:
    """Runs turns, at most ``max_concurrent_turns`` at a time; the others wait in order of arrival."""

    def __init__(
        self,
        agent: AgentRuntime,
        *,
        limits: Limits,
        telemetry: Telemetry,
        randomness: random.Random,
        tracing: Tracing | None = None,
    ) -> None:
        self._agent = agent
        self._tracing = tracing
        self._limits = limits
        self._telemetry = telemetry
        self._random = randomness
        self._places = trio.Semaphore(limits.max_concurrent_turns)
        self.waiting = 0
        self.running = 0

    async def __call__(self, runner: SessionRunner, start: StartTurn) -> None:
        """Run one turn to its end, which is in the session's log when this returns. Cancel it to stop."""
        message = start.message
        trace = TurnTrace(self._tracing, runner.session_id, start)
        log = {"session_id": runner.session_id, "turn_id": message.turn_id, "request_id": message.request_id}
        log |= trace.log_fields
        started = trio.current_time()
        outcome = Outcome.CANCELLED
        error: GatewayError | None = None
        self._telemetry.info("turn_started", **log)
        try:
            if await self._take_place():
                try:
                    self.running += 1
                    outcome, error = await self._carry(runner, start, trace)
                finally:
                    self.running -= 1
                    self._places.release()
            else:
                outcome = Outcome.FAILED
                error = Overloaded("The gateway carries as many answers as it may. Try again in a moment.")
        finally:
            duration = trio.current_time() - started
            # Cut so that another node carries it on, which its own figures will tell the end of.
            is_moved = outcome is Outcome.CANCELLED and runner.departure.is_suspended
            said = "moved" if is_moved else outcome.value
            self._telemetry.count("gateway_turns_total", outcome=said)
            self._telemetry.observe("gateway_turn_seconds", duration)
            if error is not None:
                runner.last_error = error.code
                self._telemetry.count("gateway_errors_total", code=error.code)
                self._telemetry.warning("turn_failed", code=error.code, reason=error.message, **log)
            self._telemetry.info("turn_ended", outcome=said, duration_s=round(duration, 3), **log)
            trace.end(outcome, error)
        runner.perform(runner.session.end_turn(message.turn_id, outcome, error))

    async def _take_place(self) -> bool:
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            self.waiting += 1
            try:
                with trio.move_on_after(self._limits.queue_timeout):
                    await self._places.acquire()
                    return True
                return False
            finally:
                self.waiting -= 1
        return True

    async def _carry(
        self, runner: SessionRunner, start: StartTurn, trace: TurnTrace
    ) -> tuple[Outcome, AgentFailure | None]:
        message = start.message
        progress = _Progress(resumable=start.resumes, last_event_id=start.last_event_id)
        while True:
            request = TurnRequest(
                session_id=runner.session_id,
                turn_id=message.turn_id,
                message=message.body,
                subject=message.subject,
                request_id=message.request_id,
                last_event_id=progress.last_event_id,
                trace=trace.context,
            )
            try:
                posted = trio.current_time()
                # Who cut the turn before this line counts it as unsent, also when this task was on its way.
                await trio.lowlevel.checkpoint_if_cancelled()
                runner.departure.sending(message.turn_id)
                async with self._agent.open_stream(request) as stream:
                    self._telemetry.observe("gateway_agent_head_seconds", trio.current_time() - posted)
                    is_resumption = start.resumes or progress.resumes > 0
                    progress.resumable = stream.resumable
                    if is_resumption and not stream.resumable:
                        # It begins anew, so its words would come twice: it is closed before the first.
                        raise AgentStreamInterrupted(
                            "The Agent Runtime's answer was cut off and cannot be taken up again. Try again."
                        )
                    runner.session.stream_opened(message.turn_id, resumable=stream.resumable)
                    if stream.resumable:
                        # Stored before the first token, for which an agent may think for a long time.
                        runner.changed()
                    await self._consume(runner, message.turn_id, stream, progress, posted, trace)
                return Outcome.COMPLETED, None
            except (AgentStreamInterrupted, AgentTimeout, AgentUnavailable) as failure:
                resumes = progress.resumable and progress.resumes < MAX_RESUMES
                if not resumes:
                    interrupted = isinstance(failure, AgentStreamInterrupted)
                    return Outcome.INTERRUPTED if interrupted else Outcome.FAILED, failure
                delay = min(RESUME_DELAY_MAX, RESUME_DELAY * 2**progress.resumes)
                progress.resumes += 1
                trace.resuming(failure.code, progress.resumes)
                self._telemetry.count("gateway_turn_resumes_total")
                self._telemetry.info(
                    "turn_resuming", session_id=runner.session_id, turn_id=message.turn_id, code=failure.code
                )
                await trio.sleep(self._random.uniform(0, delay))
            except AgentFailure as failure:
                return Outcome.FAILED, failure

    async def _consume(
        self,
        runner: SessionRunner,
        turn_id: str,
        stream: AgentStream,
        progress: _Progress,
        posted: float | None,
        trace: TurnTrace,
    ) -> None:
        session, telemetry, flow = runner.session, self._telemetry, runner.flow
        is_done = False

        def take(batch: Sequence[ServerSentEvent]) -> bool:
            nonlocal posted, is_done
            is_first = posted is not None
            sampled_at = trio.current_time() if is_first or flow.takes_sample(len(batch)) else None
            for sse in batch:
                event = interpret(sse)
                if isinstance(event, AgentEvent):
                    session.agent_event(turn_id, event, sse.event_id if progress.resumable else None)
                    flow.events += 1
                    if event.kind is EventKind.TOKEN:
                        flow.tokens += 1
                        if trace.awaits_token:
                            trace.first_token()
                    elif event.token:
                        # The answer's last: it ends it, so it is never merged, and is a token all the same.
                        flow.tokens += 1
                        if trace.awaits_token:
                            trace.first_token()
                    else:
                        self._note_event(runner, turn_id, event, trace)
                elif isinstance(event, TurnDone):
                    runner.changed()
                    is_done = True
                    return False
                else:
                    self._note_skipped(runner, turn_id, event, sse)
            progress.last_event_id = batch[-1].event_id
            progress.resumes = 0
            if sampled_at is not None:
                if posted is not None:
                    telemetry.observe("gateway_first_event_seconds", sampled_at - posted)
                    posted = None
                if runner.has_sockets:  # else it would time the client's absence
                    runner.timing.begin(session.log.last_seq, sampled_at, is_first=is_first)
            runner.changed()
            return runner.has_room()

        while not await stream.deliver(take) and not is_done:
            await runner.wait_room()

    def _note_event(self, runner: SessionRunner, turn_id: str, event: AgentEvent, trace: TurnTrace) -> None:
        """Count an event that is no token, and log those that a session's timeline is made of."""
        kind = event.type if event.type in KNOWN_TYPES else "other"
        self._telemetry.count("gateway_agent_events_total", type=kind)
        if kind == "agent_switched":
            runner.agent = _agent_named(event.data)
            self._telemetry.debug(
                "agent_switched", session_id=runner.session_id, turn_id=turn_id, agent=runner.agent
            )
        elif kind == "tool_call":
            trace.tool_called(requires_approval=event.requires_approval)
            self._telemetry.debug(
                "tool_called",
                session_id=runner.session_id,
                turn_id=turn_id,
                requires_approval=event.requires_approval,
            )
        elif kind == "error":
            runner.last_error = "AGENT_ERROR"
            self._telemetry.warning("agent_said_error", session_id=runner.session_id, turn_id=turn_id)

    def _note_skipped(
        self, runner: SessionRunner, turn_id: str, skipped: Skipped, sse: ServerSentEvent
    ) -> None:
        self._telemetry.count("gateway_agent_events_skipped_total", reason=skipped.reason)
        self._telemetry.warning(
            "agent_event_skipped",
            session_id=runner.session_id,
            turn_id=turn_id,
            reason=skipped.reason,
            size=len(sse.data),
        )


def _agent_named(data: bytes) -> str:
    """Whom an ``agent_switched`` names."""
    with suppress(InvalidMessage):
        to_agent = decode_json_object(data).get("to_agent")
        if isinstance(to_agent, str):
            return to_agent[:64]
    return ""


class _Progress:
    """How far a turn's stream has come, over all the connections that carried it."""

    __slots__ = ("last_event_id", "resumable", "resumes")

    def __init__(self, *, resumable: bool, last_event_id: str | None) -> None:
        self.resumable = resumable
        self.last_event_id = last_event_id
        self.resumes = 0

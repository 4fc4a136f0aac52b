"""The engine as an operator sees it. Implements ``operator_ports.Overview``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from gateway.core.overview import PulseSample, SessionList, SessionOverview
from gateway.core.storage import TurnState
from gateway.engine.hub import Hub
from gateway.engine.pulse import Pulse
from gateway.engine.session_runner import SessionRunner
from gateway.engine.session_socket import SessionSocket
from gateway.engine.shared_socket import SessionLane

SESSIONS_PER_STEP: Final = 1000
"""Sessions looked at before everybody else gets a turn: half a millisecond."""


class HubOverview:
    """Reads the hub; changes nothing but by ``close_session``."""

    def __init__(self, hub: Hub, pulse: Pulse) -> None:
        self._hub = hub
        self._pulse = pulse

    @property
    def draining(self) -> bool:
        """See the port."""
        return self._hub.draining

    @property
    def samples(self) -> Sequence[PulseSample]:
        """See the port."""
        return self._pulse.samples

    async def sessions(self, *, containing: str = "", limit: int = 100) -> SessionList:
        """See the port."""
        wanted = containing.lower()
        found: list[SessionRunner] = []
        for number, (session_id, runner) in enumerate(tuple(self._hub.runners.items())):
            if wanted in session_id.lower():
                found.append(runner)
            if number % SESSIONS_PER_STEP == SESSIONS_PER_STEP - 1:
                await trio.lowlevel.checkpoint()
        found.sort(key=_importance, reverse=True)
        return SessionList([_describe(runner) for runner in found[:limit]], len(found))

    def session(self, session_id: str) -> SessionOverview | None:
        """See the port."""
        runner = self._hub.runners.get(session_id)
        return None if runner is None else _describe(runner)

    def close_session(self, session_id: str) -> bool:
        """See the port."""
        runner = self._hub.runners.get(session_id)
        if runner is None:
            return False
        runner.close("closed by an operator")
        return True


def _importance(runner: SessionRunner) -> tuple[bool, bool, float]:
    session = runner.session
    return session.turn_state is TurnState.RUNNING, runner.has_sockets, session.touched_at


def _describe(runner: SessionRunner) -> SessionOverview:
    session = runner.session
    sockets = [socket for socket in runner.attachments if isinstance(socket, SessionSocket)]
    # A lane is to its session a socket like any other, but is pinged, and encoded for, as part of its socket.
    ends = [item.connection if isinstance(item.connection, SessionLane) else item for item in sockets]
    rtts = [end.rtt for end in ends if end.rtt is not None]
    return SessionOverview(
        session_id=runner.session_id,
        state=session.turn_state.value,
        turn_id=session.turn_id,
        agent=runner.agent,
        queued=session.waiting_messages,
        dialects=[end.dialect.value for end in ends],
        rtt=min(rtts, default=None),
        unacked_bytes=sum(socket.unacked_bytes for socket in sockets),
        last_seq=session.log.last_seq,
        held_bytes=session.log.held_bytes,
        touched_at=session.touched_at,
        last_error=runner.last_error,
    )

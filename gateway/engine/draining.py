"""What a node does before it stops: tells its clients, gives its sessions away, stores what is left."""

from __future__ import annotations

import random
from collections.abc import Sized

import trio

from gateway.core.limits import Limits
from gateway.core.websocket_protocol import CloseCode
from gateway.engine.group_commit import GroupCommit
from gateway.engine.session_ownership import SessionOwnership
from gateway.engine.socket_census import OpenSocket, SocketCensus
from gateway.ports import Telemetry

RECONNECT_MS = (100, 2000)
"""When clients are told to come back, spread so that not all do at once."""
RECONNECT_MS_ELSEWHERE = (50, 500)
"""… and where other nodes are up, so that nobody waits for a restart."""
_MOVING_SHARE = 0.7
"""Of the time that a drain has, for turns that cannot move to end by themselves."""
_REASON = "restarting; reconnect"


async def drain(
    sockets: SocketCensus,
    sessions: Sized,
    ownership: SessionOwnership,
    group_commit: GroupCommit | None,
    *,
    limits: Limits,
    telemetry: Telemetry,
    randomness: random.Random,
) -> None:
    """Close every socket with 1012, and where other nodes share the store, hand the sessions over first.

    Returns within ``drain_timeout``; what did not close by then is left open.
    """
    telemetry.info("draining", sockets=len(sockets), sessions=len(sessions))
    with trio.move_on_after(limits.drain_timeout) as deadline:
        hint = RECONNECT_MS_ELSEWHERE if ownership.is_shared else RECONNECT_MS
        for index, socket in enumerate(sockets):
            if socket.is_v2:
                socket.send_control({"type": "draining", "reconnect_after_ms": randomness.randrange(*hint)})
            if not ownership.is_shared:
                _end(socket)
            if index % 64 == 63:
                await trio.lowlevel.checkpoint()
        if ownership.is_shared and group_commit is not None:
            await ownership.hand_over(
                group_commit.wait_stored,
                lambda runner: runner.end_sockets(CloseCode.RESTARTING, _REASON),
                by=trio.current_time() + limits.drain_timeout * _MOVING_SHARE,
            )
            for socket in sockets:
                _end(socket)
        await sockets.wait_empty()
        if group_commit is not None:
            await group_commit.wait_idle()
    telemetry.info("drained", left=len(sockets), in_time=not deadline.cancelled_caught)


def _end(socket: OpenSocket) -> None:
    socket.end(CloseCode.RESTARTING, _REASON)

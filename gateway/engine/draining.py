"""What a node does before it stops: tells its clients, gives its sessions away, stores what is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import trio

from gateway.core.limits import Limits
from gateway.core.websocket_protocol import CloseCode
from gateway.engine.group_commit import GroupCommit
from gateway.engine.session_ownership import (
    ALL_MOVED_SECONDS,
    MOVE_SECONDS,
    SessionOwnership,
    group_size,
)
from gateway.engine.session_runner import SessionRunner
from gateway.engine.session_socket import SessionSocket
from gateway.engine.socket_census import OpenSocket, SocketCensus
from gateway.ports import Telemetry

RECONNECT_MS = (100, 2000)
"""When clients are told to come back, spread so that not all do at once."""
RECONNECT_MS_ELSEWHERE = (0, 100)
"""… and where other nodes are up: sessions leave in groups, so their clients come spread by themselves."""
_MOVING_SHARE = 0.7
"""Of the time that a drain has, for turns that cannot move to end by themselves."""
_AT_ONCE = 64
"""Sockets that are told before everybody else gets a turn."""
_REASON = "restarting; reconnect"


async def drain(
    sockets: SocketCensus,
    sessions: Mapping[str, SessionRunner],
    ownership: SessionOwnership,
    group_commit: GroupCommit | None,
    *,
    limits: Limits,
    telemetry: Telemetry,
    randomness: random.Random,
) -> None:
    """Close every socket with 1012, and where other nodes share the store, hand the sessions over first.

    No turn begins from here on: one that was accepted and not sent is left to whoever has the session next.

    Returns within ``drain_timeout``; what did not close by then is left open.
    """
    telemetry.info("draining", sockets=len(sockets), sessions=len(sessions))
    hint = RECONNECT_MS_ELSEWHERE if ownership.is_shared else RECONNECT_MS

    def dismiss(socket: OpenSocket) -> None:
        if socket.is_v2:
            socket.send_control({"type": "draining", "reconnect_after_ms": randomness.randrange(*hint)})
        socket.end(CloseCode.RESTARTING, _REASON)

    def dismiss_from(runner: SessionRunner) -> None:
        for attachment in runner.attachments:
            if isinstance(attachment, SessionSocket) and attachment in sockets:
                dismiss(attachment)
        # Lanes: the sockets they are of have been told.
        runner.end_sockets(CloseCode.RESTARTING, _REASON)

    with trio.move_on_after(limits.drain_timeout) as deadline:
        for runner in sessions.values():
            runner.departure.holds_turns = True
        if ownership.is_shared and group_commit is not None:
            by = trio.current_time() + limits.drain_timeout * _MOVING_SHARE
            async with trio.open_nursery() as nursery:
                # Through another node they show the same, whose session it may be by then: this one's, too.
                others: list[OpenSocket] = [
                    socket for socket in sockets if not isinstance(socket, SessionSocket)
                ]
                nursery.start_soon(_dismiss_in_groups, dismiss, others, by)
                await ownership.hand_over(group_commit.wait_stored, dismiss_from, by=by)
        await _each(dismiss, list(sockets))
        await sockets.wait_empty()
        if group_commit is not None:
            for runner in sessions.values():
                if runner.departure.has_unsent_turn:
                    runner.suspend()
            await group_commit.wait_idle()
    telemetry.info("drained", left=len(sockets), in_time=not deadline.cancelled_caught)


async def _dismiss_in_groups(
    dismiss: Callable[[OpenSocket], None], sockets: list[OpenSocket], by: float
) -> None:
    until = min(by, trio.current_time() + ALL_MOVED_SECONDS)
    while sockets:
        count = group_size(len(sockets), until - trio.current_time())
        some, sockets = sockets[:count], sockets[count:]
        for socket in some:
            dismiss(socket)
        await trio.sleep(MOVE_SECONDS)


async def _each(dismiss: Callable[[OpenSocket], None], sockets: Sequence[OpenSocket]) -> None:
    for number, socket in enumerate(sockets, 1):
        dismiss(socket)
        if number % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()

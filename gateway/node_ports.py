"""The Protocols between what runs in this process and in others beside it; see ``ports``.

Nodes on one store know each other by ``SessionLeases`` and ``NodeMail``; ``Siblings`` are the processes of
one ``gateway serve --workers``, of which each is a node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

import trio

from gateway.core.letters import Letter


class SessionLeases(Protocol):
    """Which of several nodes on one store may run a session and write it.

    One node at a time has a session. Whatever a node believes, the store refuses commits of one that has it
    no more (``CommitRefused``), so a node that was paused while others took over can do no harm.
    """

    @property
    def node(self) -> str:
        """This node's name; no other process ever had it."""
        ...

    @property
    def mail(self) -> NodeMail:
        """The way to the other nodes."""
        ...

    async def acquire(self, session_id: str) -> str | None:
        """Make this node the session's, unless another one that lives has it: then that one's name.

        None: this node has it. Raises ``StoreUnavailable``.
        """
        ...

    async def holds(self, session_id: str) -> bool:
        """Whether the store says that this node has had the session ever since it acquired it.

        Raises ``StoreUnavailable``: then nobody knows.
        """
        ...

    async def release(self, session_ids: Collection[str]) -> None:
        """Let go of sessions, which others may then have at once. Raises ``StoreUnavailable``."""
        ...

    async def leave(self) -> None:
        """This node ends: what it has is free at once. Raises ``StoreUnavailable``."""
        ...

    async def run(
        self,
        lost: Callable[[str], None],
        ownerless: Callable[[Sequence[str]], None],
        *,
        task_status: trio.TaskStatus[None] = ...,
    ) -> None:
        """Keep this node known to the others until cancelled; started once it is.

        Calls ``lost`` with each session that another node took over meanwhile, and ``ownerless`` every few
        seconds with the sessions that have work to do and no living node. Neither may block. Raises
        ``StoreUnavailable`` before it has started, never after.
        """
        ...


class NodeMail(Protocol):
    """Letters from node to node: in order and once, or the loss is told."""

    def post(self, node: str, letter: Letter) -> None:
        """Send soon, after all that was posted to that node before. Never blocks."""
        ...

    async def run(
        self,
        take: Callable[[str, Sequence[Letter]], None],
        lost: Callable[[str], None],
        *,
        task_status: trio.TaskStatus[None] = ...,
    ) -> None:
        """Send and receive until cancelled; started once letters to this node arrive.

        Calls ``take`` with a sender and its letters, and ``lost`` with a node when letters to or from it may
        be missing, and when it died. Neither may block. Raises ``StoreUnavailable`` before it has started.
        """
        ...


ASK_METRICS: Final = "metrics"
"""What ``Siblings`` answer with the page of their own metrics."""
ASK_SESSION: Final = "session"
"""… and with what a dashboard shows of a session, if it is live there."""
ASK_CLOSE_SESSION: Final = "close_session"
"""… and after they closed a session, if it is live there."""


class Siblings(Protocol):
    """The other processes that listen on this one's port: what a caller asks of one concerns all."""

    @property
    def number(self) -> int:
        """Which of them this process is, from 1."""
        ...

    @property
    def count(self) -> int:
        """How many there are, with this one."""
        ...

    def answer(self, question: str, answer: Callable[[str], bytes | None]) -> None:
        """Have questions of others answered by ``answer``, which gets what it is about and does not block."""
        ...

    async def ask(self, question: str, about: str = "") -> Mapping[str, bytes]:
        """The answers of the others by number; of those that have one, and give it within a second."""
        ...

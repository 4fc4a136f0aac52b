"""The Protocols of what operators see and do: the log's newest entries, live sessions, the last minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.core.overview import JournalEntry, PulseSample, SessionList, SessionOverview


class Journal(Protocol):
    """The newest log entries of the process, whatever level is written out."""

    def entries(
        self, *, session_id: str | None = None, troubles_only: bool = False, after: int = 0, limit: int = 100
    ) -> Sequence[JournalEntry]:
        """The newest ``limit`` entries with a number over ``after``, oldest first.

        Of one session, or only warnings and errors, when asked so. Secrets are masked.
        """
        ...


class Overview(Protocol):
    """What the engine lets an operator see and do. Nothing in it is a message's content."""

    @property
    def draining(self) -> bool:
        """Whether this node stops."""
        ...

    @property
    def samples(self) -> Sequence[PulseSample]:
        """The last minutes, one a second, oldest first."""
        ...

    async def sessions(self, *, containing: str = "", limit: int = 100) -> SessionList:
        """The live sessions whose id contains ``containing`` (any letter case). Yields while it looks."""
        ...

    def session(self, session_id: str) -> SessionOverview | None:
        """One live session, or None."""
        ...

    def close_session(self, session_id: str) -> bool:
        """Cancel a session's turn and waiting messages, close its sockets for good; False: there is none."""
        ...

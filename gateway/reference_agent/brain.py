"""The port between the conversation engine and whatever thinks: a script, or an LLM."""

from typing import Any, Protocol

import attrs
import trio

from gateway.reference_agent.agents import Agent
from gateway.reference_agent.history import Entry


@attrs.frozen
class Token:
    """A piece of text for the user."""

    text: str


@attrs.frozen
class CallTool:
    """The brain wants a tool run.

    ``call_id`` is the brain's own name for the call, if it has one. ``problem`` says why the call cannot be
    made as it came; the brain is told so instead.
    """

    tool_name: str
    arguments: dict[str, Any]
    call_id: str | None = None
    problem: str | None = None


@attrs.frozen
class SwitchTo:
    """The brain hands over to another agent, which is asked next."""

    agent: str
    reason: str
    confidence: float | None = None


@attrs.frozen
class Usage:
    """What the step cost; ``requests`` counts the attempts made at the LLM."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1


Piece = Token | CallTool | SwitchTo | Usage


class BrainError(Exception):
    """The brain could not answer. ``retryable`` says whether asking again may help."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


@attrs.frozen
class Step:
    """What a brain is given for one step: everything, so that it need remember nothing itself."""

    session_id: str
    agent: Agent
    history: tuple[Entry, ...]
    pinned: bool = False
    """The client chose the agent: the brain does not hand over."""

    already_said: str = ""
    """Text of this very step that the user has already been given before the runtime was restarted.

    The brain emits only what follows it."""

    step_id: str | None = None
    """Names this step across restarts of the runtime; None when nobody can come back for its answer."""


class Say(Protocol):
    """Where a brain's pieces go."""

    async def __call__(self, *pieces: Piece) -> None:
        """Take pieces in order. Those that are ready together belong in one call: one commit stores them."""
        ...


class Brain(Protocol):
    """Thinks one step of an answer."""

    async def think(self, step: Step, say: Say) -> None:
        """Emit the pieces of one step through ``say``, in order, then return.

        A step ends the answer (no `CallTool`, no `SwitchTo`), asks for tools (one or more `CallTool`), or
        hands over (`SwitchTo`, after which nothing follows). Raises `BrainError`. On cancellation it must
        return at once. Work of a step with a ``step_id`` may go on elsewhere until `release`; all else stops.
        """
        ...

    async def release(self, session_id: str) -> None:  # noqa: ARG002 - by most brains
        """The session's last step is recorded, or given up: nobody will ask for it again.

        What still works on it is stopped, and what is kept of it forgotten. Never raises, takes at most a
        second, and is not torn by cancellation. A brain that keeps nothing has nothing to do.
        """
        await trio.lowlevel.cancel_shielded_checkpoint()

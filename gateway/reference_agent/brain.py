"""The port between the conversation engine and whatever thinks: a script, or an LLM."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs

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


Say = Callable[[Piece], Awaitable[None]]


class Brain(Protocol):
    """Thinks one step of an answer."""

    async def think(self, step: Step, say: Say) -> None:
        """Emit the pieces of one step through ``say``, in order, then return.

        A step ends the answer (no `CallTool`, no `SwitchTo`), asks for tools (one or more `CallTool`), or
        hands over (`SwitchTo`, after which nothing follows). Raises `BrainError`. On cancellation it must
        stop at once, closing whatever it holds.
        """
        ...

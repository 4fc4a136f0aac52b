"""A brain that asks an LLM: by the LLM spool where the runtime's state outlives it, else by itself."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import orjson

from gateway.reference_agent.brain import Brain, Piece, Say, Step, Token
from gateway.reference_agent.llm_client import LlmClient, open_llm_client
from gateway.reference_agent.llm_messages import request_body
from gateway.reference_agent.llm_spool_link import (
    SpoolLink,
    SpoolLostError,
    SpoolUnavailableError,
    open_spool_link,
)
from gateway.reference_agent.llm_spool_protocol import Ask
from gateway.reference_agent.settings import AgentSettings

SPOOLS_TRIED = 2
"""Spools that one step is asked of; when both were lost, the runtime asks the LLM itself."""


class LlmBrain(Brain):
    """Asks the LLM once per step.

    A step with a ``step_id`` is asked of the spool, if there is one. It is the same question as long as all
    that leads to it is the same, so a runtime that was killed finds the answer to it again. When a spool is
    lost the next one is asked with the text so far. Usage is counted.
    """

    def __init__(
        self, client: LlmClient, model: str, *, history_tokens: int, spool: SpoolLink | None = None
    ) -> None:
        self._client = client
        self._model = model
        self._history_tokens = history_tokens
        self._spool = spool
        self._asked: dict[str, str] = {}
        """The question that the spool holds an answer to, for each session that waits for one."""

    async def think(self, step: Step, say: Say) -> None:
        """See `Brain.think`. Raises `BrainError` with a code that begins with ``LLM_``."""

        async def tell(*pieces: Piece) -> None:
            nonlocal step
            await say(*pieces)
            said = "".join(piece.text for piece in pieces if isinstance(piece, Token))
            step = attrs.evolve(step, already_said=step.already_said + said)

        for _ in range(SPOOLS_TRIED):
            if self._spool is None or step.step_id is None:
                break
            ask = self._ask_of(step)
            self._asked[ask.session_id] = ask.question
            try:
                await self._spool.answer(ask, step.already_said, tell)
                return
            except SpoolLostError:
                continue
            except SpoolUnavailableError:
                break
        await self._client.answer(
            step.session_id, step.agent.name, request_body(step, self._model, self._history_tokens), say
        )

    async def release(self, session_id: str) -> None:
        """See `Brain.release`."""
        question = self._asked.pop(session_id, None)
        if question is not None and self._spool is not None:
            await self._spool.release(session_id, question)

    def _ask_of(self, step: Step) -> Ask:
        anew = request_body(attrs.evolve(step, already_said=""), self._model, self._history_tokens)
        about = [step.session_id, step.step_id, step.agent.name, anew]
        return Ask(
            session_id=step.session_id,
            question=hashlib.sha256(orjson.dumps(about)).hexdigest(),
            agent=step.agent.name,
            said=len(step.already_said),
            body=request_body(step, self._model, self._history_tokens) if step.already_said else anew,
        )


@asynccontextmanager
async def open_llm_brain(settings: AgentSettings, jitter: Callable[[], float]) -> AsyncIterator[LlmBrain]:
    """A brain with a client, and perhaps a spool, of its own; both are left at the end.

    Raises `ValueError` for a URL that cannot be used.
    """
    async with AsyncExitStack() as resources:
        client = await resources.enter_async_context(
            open_llm_client(settings.llm_url, settings.llm_key, jitter)
        )
        spool = None
        if settings.db is not None and settings.llm_keep > 0:
            spool = await resources.enter_async_context(open_spool_link(settings.db, settings))
        yield LlmBrain(client, settings.model, history_tokens=settings.history_tokens, spool=spool)

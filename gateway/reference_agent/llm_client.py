"""Asks an OpenAI-compatible LLM, by httpx on Trio. The same code runs in the runtime and in the LLM spool."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson
import structlog
import trio

from gateway.core.errors import AgentProtocolError
from gateway.core.sse import SseParser
from gateway.reference_agent.brain import BrainError, Say, Token, Usage
from gateway.reference_agent.llm_answer import LlmAnswer

ATTEMPTS = 4
FIRST_BACKOFF = 0.5
"""Seconds; doubled for each further attempt, and each drawn from 0 to that (full jitter)."""

LONGEST_BACKOFF = 20.0
LONGEST_RETRY_AFTER = 30.0
"""Seconds that a server's Retry-After may make a user wait."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses worth another attempt; 529 is what Anthropic calls overloaded."""

CONNECT_TIMEOUT = 10.0
SILENCE_TIMEOUT = 120.0
"""Seconds between two reads: a large prompt may be thought about for long before the first token."""

LINGER = 1.0
"""Seconds a stream may take to end after its last word; then the connection is given up."""

MAX_EVENT_BYTES = 4 * 1024 * 1024


class _TransientError(Exception):
    """An attempt failed in a way that another attempt may not."""

    def __init__(self, error: BrainError, retry_after: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after = retry_after


class LlmClient:
    """Asks the LLM, once per `answer`.

    Rate limits, server errors and lost connections are tried again with backoff, but only while nothing of
    the answer has been said. Cancelling closes the request, which stops the LLM.
    """

    def __init__(
        self, client: httpx.AsyncClient, url: str, *, key: str | None, jitter: Callable[[], float]
    ) -> None:
        self._client = client
        self._url = url
        self._headers = {"Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._jitter = jitter
        self._log = structlog.get_logger("reference_agent.llm")

    async def answer(self, session_id: str, agent: str, body: Mapping[str, Any], say: Say) -> None:
        """Say what the LLM answers to ``body``: what comes in one read in one call, its usage and calls last.

        ``agent`` is who asks: it cannot hand over to itself. Raises `BrainError` with a code that begins with
        ``LLM_``.
        """
        content = orjson.dumps(body)
        for attempt in range(1, ATTEMPTS + 1):
            await say(Usage(requests=1))
            try:
                answer = await self._ask(content, say)
                break
            except _TransientError as exc:
                self._log.warning(
                    "llm_attempt_failed", session_id=session_id, attempt=attempt, code=exc.error.code
                )
                if attempt == ATTEMPTS:
                    raise exc.error from exc
                await trio.sleep(self._backoff(attempt, exc.retry_after))
        calls, switch = answer.outcome(agent)
        await say(answer.usage, *calls, *(() if switch is None else (switch,)))

    def _backoff(self, attempt: int, retry_after: float | None) -> float:
        backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * float(1 << (attempt - 1))) * self._jitter()
        return backoff if retry_after is None else min(LONGEST_RETRY_AFTER, retry_after) + backoff

    async def _ask(self, content: bytes, say: Say) -> LlmAnswer:
        answer = LlmAnswer()
        reader = _StreamReader(answer, say)
        try:
            request = self._client.build_request("POST", self._url, content=content, headers=self._headers)
            request.stream = _Body(content)
            response = await self._client.send(request, stream=True)
            try:
                self._check_status(response)
                if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    await reader.read(response)
                else:
                    await reader.take(await response.aread())
            finally:
                await response.aclose()
        except AgentProtocolError as exc:
            raise BrainError("LLM_PROTOCOL_ERROR", "The LLM's answer is too large.", retryable=False) from exc
        except (httpx.TransportError, httpx.StreamError) as exc:
            if reader.spoke:
                raise BrainError("LLM_INTERRUPTED", "The LLM's answer broke off.", retryable=True) from exc
            raise _TransientError(
                BrainError("LLM_UNAVAILABLE", "The LLM cannot be reached.", retryable=True)
            ) from exc
        return answer

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status < 300:
            return
        if status in RETRIED:
            code = "LLM_RATE_LIMITED" if status == 429 else "LLM_UNAVAILABLE"
            error = BrainError(code, f"The LLM answers with status {status}. Try later.", retryable=True)
            raise _TransientError(error, _retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            raise BrainError(
                "LLM_UNAUTHORIZED", f"The LLM refuses our key (status {status}).", retryable=False
            )
        raise BrainError("LLM_REFUSED", f"The LLM refuses the request (status {status}).", retryable=False)


class _Body(httpx.AsyncByteStream):
    """A request's body. httpx's own is an async generator, which a cancelled request leaves unfinished."""

    def __init__(self, content: bytes) -> None:
        self._left = [content]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class _StreamReader:
    """Reads one streamed answer to its end."""

    def __init__(self, answer: LlmAnswer, say: Say) -> None:
        self.spoke = False
        self._answer = answer
        self._say = say
        self._parser = SseParser(MAX_EVENT_BYTES)
        self._ended = False

    async def read(self, response: httpx.Response) -> None:
        """Read until the answer ends. Raises `httpx.RemoteProtocolError` when the stream ends before it."""
        # httpx's stream is a chain of async generators. Leaving it by `break` or by an exception of ours
        # would leave them to the garbage collector; a cancellation goes through all of them.
        failure: BaseException | None = None
        with trio.CancelScope() as reading:
            async for data in response.aiter_raw():
                try:
                    await self._take_bytes(data, reading)
                except BaseException as exc:
                    failure = failure or exc
                    reading.cancel()
        if failure is not None:
            raise failure
        if not self._ended and self._answer.finish_reason is None:
            raise httpx.RemoteProtocolError("the stream ended before the answer did")

    async def _take_bytes(self, data: bytes, reading: trio.CancelScope) -> None:
        if self._ended:
            return
        words: list[Token] = []
        failure: Exception | None = None
        try:
            for event in self._parser.feed(data):
                if event.data.strip() == b"[DONE]":
                    self._ended = True
                    reading.deadline = trio.current_time() + LINGER
                    break
                self._take_chunk(event.data, words)
        except (BrainError, AgentProtocolError) as exc:
            failure = exc  # what came before it counts
        await self._say_words(words)
        if failure is not None:
            raise failure

    async def take(self, data: bytes) -> None:
        """Take the JSON of a whole completion."""
        words: list[Token] = []
        self._take_chunk(data, words)
        await self._say_words(words)

    def _take_chunk(self, data: bytes, words: list[Token]) -> None:
        text = self._answer.feed(_decode(data))
        if text:
            words.append(Token(text))

    async def _say_words(self, words: list[Token]) -> None:
        if words:
            self.spoke = True
            await self._say(*words)


def _decode(data: bytes) -> dict[str, object]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        chunk = None
    if not isinstance(chunk, dict):
        raise BrainError("LLM_PROTOCOL_ERROR", "The LLM sent something that is not JSON.", retryable=False)
    return chunk


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait (RFC 9110, section 10.2.3: a number of seconds, or a date)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def completions_url(base: str) -> str:
    """The address of the chat completions below ``base``. Raises `ValueError` unless it is an HTTP URL."""
    try:
        url = httpx.URL(base)
    except httpx.InvalidURL as exc:
        raise ValueError(f"llm_url: {base!r} is not a URL: {exc}.") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"llm_url: {base!r} must begin with http:// or https:// and name a host.")
    path = url.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return str(url.copy_with(path=path))


@asynccontextmanager
async def open_llm_client(
    base_url: str, key: str | None, jitter: Callable[[], float]
) -> AsyncIterator[LlmClient]:
    """A client with connections of its own, closed at the end. Raises `ValueError` for an unusable URL.

    The pool has no upper bound: httpcore loses a slot whenever a request is cancelled while it waits for a
    connection, and a bounded pool would be dead after enough cancels. One request per running turn is the
    bound.
    """
    url = completions_url(base_url)
    loopback = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(SILENCE_TIMEOUT, connect=CONNECT_TIMEOUT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        trust_env=not loopback,
    ) as client:
        yield LlmClient(client, url, key=key, jitter=jitter)

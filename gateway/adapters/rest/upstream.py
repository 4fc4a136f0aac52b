"""One REST call to the Agent Runtime: what goes out, what may come back, and what failures are called."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import trio
from attrs import field, frozen

from gateway.core.errors import (
    AgentProtocolError,
    AgentStreamInterrupted,
    AgentTimeout,
    AgentUnavailable,
    Overloaded,
)

MAX_REST_ANSWER_BYTES = 32 * 1024 * 1024
"""The largest answer that is passed on; it is held in memory whole."""

FORWARDED_REQUEST_HEADERS = (
    "accept",
    "accept-language",
    "idempotency-key",
    "if-modified-since",
    "if-none-match",
    "user-agent",
)
"""What of the caller's header fields goes on. A list of what may, so that hop-by-hop fields, cookies,
credentials and whatever is invented tomorrow stay here."""

FORWARDED_RESPONSE_HEADERS = (
    "cache-control",
    "content-language",
    "content-type",
    "etag",
    "last-modified",
    "link",
    "retry-after",
)


@frozen
class AgentAnswer:
    """The Agent Runtime's answer, with its body whole and unchanged."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class AgentApi:
    """The Agent Runtime's REST side: at most ``max_concurrent`` calls at once, each within ``timeout``."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        internal_key: str,
        max_concurrent: int,
        connect_timeout: float,
        timeout: float,
    ) -> None:
        self._client = client
        self._internal_key = internal_key
        self._limiter = trio.CapacityLimiter(max_concurrent)
        self._timeout = timeout
        # The whole call is under one deadline; of its parts only connecting has a shorter one.
        self._parts = httpx.Timeout(None, connect=connect_timeout)

    async def call(
        self, method: str, path: str, query: bytes, headers: Mapping[str, str], body: bytes
    ) -> AgentAnswer:
        """Call ``path`` (which begins with a slash) and give the answer, whatever its status.

        Raises ``Overloaded`` at once when all places are taken, ``AgentUnavailable``, ``AgentTimeout``,
        ``AgentStreamInterrupted``, and ``AgentProtocolError`` for anything but JSON. When cancelled, the
        connection is closed.
        """
        try:
            self._limiter.acquire_nowait()
        except trio.WouldBlock:
            raise Overloaded(
                "The gateway has as many REST calls open as it may; try again in a moment.", retry_after=1
            ) from None
        try:
            with trio.fail_after(self._timeout):
                try:
                    return await self._call_once(method, path, query, headers, body)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    # A kept connection that the runtime closed just then. Asking again changes nothing there
                    # (RFC 9110 section 9.2.2), and a second failure is a real one.
                    if method != "GET":
                        raise
                    return await self._call_once(method, path, query, headers, body)
        except trio.TooSlowError as error:
            raise AgentTimeout("The Agent Runtime took too long to answer; try again later.") from error
        except (httpx.RemoteProtocolError, httpx.ReadError) as error:
            raise AgentStreamInterrupted("The Agent Runtime's answer was cut short; try again.") from error
        except (httpx.TransportError, OSError) as error:
            raise AgentUnavailable("The Agent Runtime cannot be reached; try again later.") from error
        finally:
            self._limiter.release()

    async def _call_once(
        self, method: str, path: str, query: bytes, headers: Mapping[str, str], body: bytes
    ) -> AgentAnswer:
        base = self._client.base_url.raw_path.rstrip(b"/")
        target = base + path.encode("ascii") + (b"?" + query if query else b"")
        request = self._client.build_request(
            method,
            self._client.base_url.copy_with(raw_path=target),
            headers={
                **headers,
                "x-internal-auth": self._internal_key,
                # Decoding is work that an answer of a few bytes could make endless.
                "accept-encoding": "identity",
            },
            content=body or None,
            timeout=self._parts,
            # httpx normalizes URLs; the caller's query goes on byte for byte.
            extensions={"target": target},
        )
        response = await self._client.send(request, stream=True)
        try:
            return await _read(response)
        finally:
            await response.aclose()


async def _read(response: httpx.Response) -> AgentAnswer:
    status = response.status_code
    if 300 <= status < 400 and status != 304:
        raise AgentProtocolError(f"The Agent Runtime answered with a redirect ({status}); tell its operator.")
    body = bytearray()
    # httpx reads through nested async generators. Leaving the loop would abandon them half-run; a cancelled
    # read ends each of them in order.
    with trio.CancelScope() as reading:
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_REST_ANSWER_BYTES:
                reading.cancel()
    if len(body) > MAX_REST_ANSWER_BYTES:
        raise AgentProtocolError("The Agent Runtime's answer is too large; ask for less.")
    if body and not is_json(response.headers.get("content-type", "")):
        raise AgentProtocolError("The Agent Runtime's answer is not JSON; tell its operator.")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise AgentProtocolError("The Agent Runtime's answer is encoded, unasked; tell its operator.")
    kept = {name: response.headers[name] for name in FORWARDED_RESPONSE_HEADERS if name in response.headers}
    return AgentAnswer(status, kept, bytes(body))


def is_json(content_type: str) -> bool:
    """Whether a ``Content-Type`` says JSON (RFC 8259, RFC 6839 section 3.1)."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )

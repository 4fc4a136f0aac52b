"""The auth service's public keys: fetched in the background, kept while it is away, no wait when known.

One task (``JwksCache.run``) fetches; everyone else only reads what it left. So there is one fetch at a time,
and no caller can make a second one: asking sets an event, and the task decides.

``PyJWKClient`` is not used: it blocks the thread, and an unknown ``kid`` makes it fetch every time.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Mapping

import httpx
import jwt
import trio
from attrs import frozen

from gateway.core.codec import decode_json_object
from gateway.core.errors import InvalidMessage
from gateway.core.jwk_rules import JwkSetInvalid, read_jwk_set
from gateway.ports import Telemetry

MAX_DOCUMENT_SIZE = 64 * 1024
"""Bytes; a set of a hundred keys is smaller."""

_FIRST_CONNECT_RETRY = 0.5


@frozen
class JwksTiming:
    """When keys are fetched and how long they are believed; all in seconds."""

    lifetime: float = 300.0
    """A key taken out of the published set is refused within this time, as long as fetching works."""
    stale_for: float = 86_400.0
    """How long beyond ``lifetime`` keys are kept while fetching fails."""
    cooldown: float = 30.0
    """At least this much between two requests that reach the issuer, failed ones too."""
    fetch_timeout: float = 5.0
    """For a whole fetch, however the bytes trickle."""
    unknown_key_wait: float = 2.0
    """How long one caller with an unknown key waits for a fetch that is due."""

    def __attrs_post_init__(self) -> None:
        if not 0 < self.cooldown <= self.lifetime / 2:
            raise ValueError("The JWKS cooldown must be positive and at most half of the lifetime.")
        if not 0 < self.fetch_timeout < self.cooldown:
            raise ValueError("The JWKS fetch timeout must be positive and less than the cooldown.")


def jwks_http_client(verify: ssl.SSLContext | bool = True) -> httpx.AsyncClient:
    """An HTTP client fit for ``JwksCache``, to be closed by the caller.

    No bound on connections: httpcore loses the place of a request that is cancelled while it waits for one,
    so none may ever wait. There is one fetch at a time anyway, minutes apart, hence no keep-alive.
    """
    return httpx.AsyncClient(
        verify=verify,
        follow_redirects=False,
        timeout=httpx.Timeout(JwksTiming().fetch_timeout),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )


class JwksCache:
    """The keys published at ``url`` that may verify tokens with one of ``algorithms``.

    ``run`` must be running for keys to come; everything happens in one Trio thread.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        telemetry: Telemetry,
        *,
        algorithms: frozenset[str],
        timing: JwksTiming | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._http = http
        self._url = url
        self._telemetry = telemetry
        self._algorithms = algorithms
        self._timing = timing or JwksTiming()
        self._jitter = jitter
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._attempted_at = float("-inf")
        self._failures = 0
        self._unreached = False
        """Whether the last failure was one of connecting: then the issuer has seen nothing of it."""
        self._running = False
        self._fetching = False
        self._asked = trio.Event()
        self._attempt_ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the keys fresh until cancelled. Started when the first fetch ended, well or not (bounded).

        Never raises for what the issuer does. Cancelling ends a fetch at once. Only one may run.
        """
        if self._running:
            raise RuntimeError("This key cache is already being refreshed.")
        self._running = True
        try:
            await self._refresh()
            task_status.started()
            while True:
                with trio.move_on_at(self._attempted_at + self._delay()):
                    await self._asked.wait()
                await self._refresh()
        finally:
            self._running = False

    def known_key(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id, if it is held and still believed."""
        believed_until = self._fetched_at + self._timing.lifetime + self._timing.stale_for
        return self._keys.get(key_id) if trio.current_time() < believed_until else None

    async def key_for(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id, or None when there is none.

        A known key returns without a checkpoint. For an unknown one, a fetch is asked for and awaited for
        at most ``unknown_key_wait``, but only if one is due: with the last attempt less than ``cooldown``
        ago, over all callers, the answer is None at once. Cancelling a waiting caller disturbs no other.
        """
        key = self.known_key(key_id)
        if key is not None or not self._running:
            return key
        if not self._fetching:
            if trio.current_time() < self._attempted_at + self._timing.cooldown:
                return None
            self._asked.set()
        with trio.move_on_after(self._timing.unknown_key_wait):
            await self._attempt_ended.wait()
        return self.known_key(key_id)

    def _delay(self) -> float:
        """Seconds from the last attempt to the next one that nobody asked for."""
        timing = self._timing
        if not self._failures:
            # Early enough that the fetch ends within the lifetime, spread so that nodes do not come together.
            return timing.lifetime * (0.75 + 0.15 * self._jitter())
        doublings = min(self._failures - 1, 16)
        if self._unreached and not self._keys:
            # Gateway and issuer were started together, and the issuer is not listening yet.
            return min(_FIRST_CONNECT_RETRY * 2.0**doublings, timing.cooldown) * (0.5 + 0.5 * self._jitter())
        ceiling = max(timing.cooldown, timing.lifetime / 2)
        return min(timing.cooldown * 2.0**doublings, ceiling) * (1 + 0.5 * self._jitter())

    async def _refresh(self) -> None:
        self._asked = trio.Event()
        self._attempted_at = trio.current_time()
        self._fetching = True
        try:
            with trio.fail_after(self._timing.fetch_timeout):
                body = await self._fetch()
            self._keep(body)
        except Exception as failure:
            # A bulkhead: whatever a strange answer does to httpx or to the key parsers, signing keys that
            # are held go on working, and the next attempt is made.
            self._note_failure(failure)
        finally:
            self._fetching = False
            ended, self._attempt_ended = self._attempt_ended, trio.Event()
            ended.set()

    async def _fetch(self) -> bytes:
        # Identity coding and raw bytes: the bound must hold for what is decoded, not for what was sent.
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        body = bytearray()
        async with self._http.stream("GET", self._url, headers=headers, follow_redirects=False) as response:
            if response.status_code != 200:
                raise JwkSetInvalid(f"HTTP status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise JwkSetInvalid("it is compressed")
            # Over the bound, the next read is cancelled: leaving the loop here instead would abandon
            # httpx's nested async generators half-way.
            with trio.CancelScope() as bound:
                async for chunk in response.aiter_raw():
                    if len(body) <= MAX_DOCUMENT_SIZE:
                        body += chunk
                    if len(body) > MAX_DOCUMENT_SIZE:
                        bound.cancel()
        if len(body) > MAX_DOCUMENT_SIZE:
            raise JwkSetInvalid(f"it is larger than {MAX_DOCUMENT_SIZE} bytes")
        return bytes(body)

    def _keep(self, body: bytes) -> None:
        try:
            published = read_jwk_set(decode_json_object(body), self._algorithms)
        except InvalidMessage:
            raise JwkSetInvalid("it is not a JSON object") from None
        refused = list(published.refused)
        keys: dict[str, jwt.PyJWK] = {}
        for key in published.keys.values():
            try:
                keys[key.key_id] = jwt.PyJWK(dict(key.members), algorithm=key.algorithm)
            except (jwt.PyJWTError, ValueError):
                refused.append("malformed or weak")
        # A set without a usable key is obeyed too: the issuer took its keys back.
        self._keys = keys
        self._fetched_at = self._attempted_at
        self._failures = 0
        self._telemetry.count("gateway_jwks_fetches_total", outcome="ok")
        if refused or not keys:
            self._telemetry.warning("jwks_keys_refused", usable=len(keys), refused=refused[:10])
        else:
            self._telemetry.debug("jwks_fetched", usable=len(keys))

    def _note_failure(self, failure: Exception) -> None:
        self._failures += 1
        self._unreached = isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout)
        self._telemetry.count("gateway_jwks_fetches_total", outcome="failed")
        expected = isinstance(failure, httpx.HTTPError | trio.TooSlowError | JwkSetInvalid)
        reason = str(failure) if isinstance(failure, JwkSetInvalid) else type(failure).__name__
        fields: dict[str, object] = {
            "reason": reason,
            "failures": self._failures,
            "keys_held": len(self._keys),
        }
        if expected:
            self._telemetry.warning("jwks_fetch_failed", **fields)
        else:
            self._telemetry.error("jwks_fetch_failed", cause=failure, **fields)

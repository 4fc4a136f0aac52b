"""The client side of the upstream contract, for checking: lenient in reading, exact in recording."""

import uuid
from collections.abc import Mapping
from typing import Any

import attrs
import httpx
import orjson
import trio

from gateway.core.errors import AgentProtocolError
from gateway.core.sse import SseParser

MAX_EVENT_BYTES = 8 * 1024 * 1024
LINGER = 5.0
"""Seconds a stream may stay open after its last event before that is a fault."""


class ContractFaultError(Exception):
    """The Agent Runtime does not meet the contract; the text says how, and what was expected."""


class NotApplicableError(Exception):
    """The check cannot be made on this Agent Runtime; the text says why."""


@attrs.frozen
class Event:
    """One event of a stream. ``payload`` is None unless its data is a JSON object."""

    event_id: str | None
    data: bytes
    payload: dict[str, Any] | None

    @property
    def type(self) -> str:
        """The event's type, or an empty string."""
        return str((self.payload or {}).get("type") or "")


@attrs.define
class Recording:
    """One answered request."""

    status: int = 0
    headers: Mapping[str, str] = attrs.field(factory=dict)
    events: list[Event] = attrs.field(factory=list)
    ended_by: str = ""
    """``done``, ``end of stream``, ``cut by us`` or what went wrong."""

    lingered: bool = False
    """The stream stayed open after its ``done``."""

    longest_silence: float = 0.0

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The payloads of one type."""
        return [event.payload for event in self.events if event.payload is not None and event.type == kind]

    @property
    def text(self) -> str:
        """The tokens put together."""
        return "".join(str(one.get("token") or "") for one in self.of_type("assistant_message"))

    @property
    def is_final(self) -> bool:
        """The answer says that it is complete."""
        return any(one.get("is_final") is True for one in self.of_type("assistant_message"))

    def describe(self) -> str:
        """What came, in a few words, for fault texts."""
        if self.status != 200:
            return f"status {self.status}"
        kinds = [event.type or "(no type)" for event in self.events]
        short = [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]
        return ", ".join(short[:8]) or "no event"


class Probe:
    """Talks to one Agent Runtime in a session of its own. Timeouts are in seconds."""

    def __init__(self, http: httpx.AsyncClient, key: str | None, *, timeout: float) -> None:
        self.http = http
        self.session_id = f"check-{uuid.uuid4().hex[:12]}"
        self.key = key
        self.timeout = timeout

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {} if self.key is None else {"X-Internal-Auth": self.key}

    def another_session(self) -> "Probe":
        """The same runtime, a new session."""
        return Probe(self.http, self.key, timeout=self.timeout)

    async def get(self, path: str) -> httpx.Response:
        """One of the reading routes. Raises `ContractFaultError` when there is no answer."""
        try:
            return await self.http.get(path, headers=self.headers())
        except httpx.TransportError as exc:
            raise ContractFaultError(f"GET {path} got no answer: {exc!r}") from exc

    async def say(self, content: str, **headers: str) -> Recording:
        """Send a user_message; header names with underscores."""
        return await self.post({"type": "user_message", "content": content}, headers=headers)

    async def post(
        self,
        message: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        cut_after: int | None = None,
    ) -> Recording:
        """Send a message and record the answer, dropping the connection after ``cut_after`` events.

        Raises `ContractFaultError` when nothing answers, or the answer does not end in time.
        """
        body = orjson.dumps({"session_id": self.session_id, "message": message})
        return await self.post_raw(body, headers=headers, cut_after=cut_after)

    async def post_raw(
        self, body: bytes, *, headers: Mapping[str, str] | None = None, cut_after: int | None = None
    ) -> Recording:
        """Like `post`, with a body of one's own."""
        recording = Recording()
        more = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        sent = {
            "Accept": "text/event-stream",
            "Content-Type": "application/json",
            **self.headers(),
            **more,
        }
        with trio.move_on_after(self.timeout) as patience:
            try:
                async with self.http.stream(
                    "POST", "/agent/message/stream", content=body, headers=sent
                ) as response:
                    recording.status = response.status_code
                    recording.headers = response.headers
                    await self._record(response, recording, cut_after)
            except httpx.TransportError as exc:
                if recording.status == 0:
                    raise ContractFaultError(f"The POST got no answer: {exc!r}") from exc
                recording.ended_by = f"a broken connection ({type(exc).__name__})"
        if patience.cancelled_caught:
            raise ContractFaultError(
                f"The answer did not end within {self.timeout:g} s (it had: {recording.describe()})."
            )
        return recording

    async def _record(self, response: httpx.Response, recording: Recording, cut_after: int | None) -> None:
        parser = SseParser(MAX_EVENT_BYTES)
        heard = trio.current_time()
        ended_by = ""
        # Left by cancellation only: it goes through httpx's generators, where `break` would leak them.
        with trio.CancelScope() as reading:
            async for data in response.aiter_raw():
                now = trio.current_time()
                if not ended_by:
                    recording.longest_silence = max(recording.longest_silence, now - heard)
                heard = now
                if not ended_by:
                    ended_by = _take(parser, data, recording, cut_after)
                if ended_by == "done":
                    reading.deadline = min(reading.deadline, now + LINGER)
                elif ended_by:
                    reading.cancel()
        recording.lingered = reading.cancelled_caught and ended_by == "done"
        recording.ended_by = ended_by or "end of stream"


def _take(parser: SseParser, data: bytes, recording: Recording, cut_after: int | None) -> str:
    try:
        parsed = parser.feed(data)
    except AgentProtocolError:
        return "an event of more than 8 MiB"
    for one in parsed:
        payload = _object(one.data)
        if one.event == "done" or one.data.strip() == b"[DONE]" or (payload or {}).get("type") == "done":
            return "done"
        recording.events.append(Event(one.event_id, one.data, payload))
        if cut_after is not None and len(recording.events) >= cut_after:
            return "cut by us"
    return ""


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None

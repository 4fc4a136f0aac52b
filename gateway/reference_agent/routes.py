"""The HTTP side of the runtime: the stream, and the routes that show what it knows."""

import hmac
import re
from collections.abc import Mapping

import orjson
from quart import request
from quart.wrappers.response import ResponseBody
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException

from gateway.reference_agent.json_http import SESSION_ID, ProblemError, json_response, read_object
from gateway.reference_agent.runtime import IdempotencyConflictError, Runtime, TurnGoneError
from gateway.reference_agent.settings import AgentSettings
from gateway.reference_agent.turn import Turn
from gateway.reference_agent.views import add_views

KEY = re.compile(r"[\x21-\x7e]{1,255}")
BODY_TIMEOUT = 30
"""Seconds a request's body may take to arrive."""


class EventStream(ResponseBody):
    """The body of a streamed answer: what a turn has after ``after``, then what it adds, until its end.

    A class and not an async generator: leaving the turn must happen the moment the connection's task ends,
    never when a garbage collector finds the time.
    """

    def __init__(self, turn: Turn, after: int, heartbeat_interval: float) -> None:
        self._turn = turn
        self._after = after
        self._heartbeat_interval = heartbeat_interval

    async def __aenter__(self) -> "EventStream":
        self._turn.join()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._turn.leave()

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> bytes:
        chunk, self._after = await self._turn.next_chunk(self._after, self._heartbeat_interval)
        if not chunk:
            raise StopAsyncIteration
        return chunk


def create_app(runtime: Runtime, settings: AgentSettings) -> QuartTrio:
    """The Quart-Trio application over a running `Runtime`. Starts no task of its own."""
    app = QuartTrio("gateway.reference_agent", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT

    @app.before_request
    async def authenticate() -> TrioResponse | None:
        if settings.internal_key is None or request.path == "/health":
            return None
        given = request.headers.get("X-Internal-Auth", "")
        if hmac.compare_digest(given.encode(), settings.internal_key.encode()):
            return None
        return json_response({"detail": "X-Internal-Auth is missing or wrong."}, 401)

    @app.after_request
    async def close_after_refusal(response: TrioResponse) -> TrioResponse:
        # Its body may not have been read: hypercorn then closes the connection, and the client must know.
        if request.method == "POST" and response.status_code >= 400:
            response.headers["Connection"] = "close"
        return response

    @app.errorhandler(ProblemError)
    async def problem(error: ProblemError) -> TrioResponse:
        return json_response({"detail": error.detail}, error.status)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> TrioResponse:
        return json_response({"detail": error.description or error.name}, error.code or 500)

    @app.errorhandler(Exception)
    async def unexpected(error: Exception) -> TrioResponse:
        app.logger.error("request failed", exc_info=error)
        return json_response({"detail": "The agent failed. Try again."}, 500)

    @app.post("/agent/message/stream")
    async def stream() -> TrioResponse:
        body = await read_object()
        session_id, message = body.get("session_id"), body.get("message")
        if not isinstance(session_id, str) or not SESSION_ID.fullmatch(session_id):
            raise ProblemError(422, "`session_id` must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        if not isinstance(message, dict):
            raise ProblemError(422, "`message` must be an object.")
        key = request.headers.get("Idempotency-Key")
        if key is not None and not KEY.fullmatch(key):
            raise ProblemError(400, "`Idempotency-Key` must be 1 to 255 visible ASCII characters.")
        after = _last_event_id(key)
        try:
            turn = await runtime.open_turn(
                session_id, message, key=key, resuming=after > 0, user_id=request.headers.get("X-User-ID")
            )
        except IdempotencyConflictError:
            raise ProblemError(422, "This Idempotency-Key was used with another message.") from None
        except orjson.JSONEncodeError:
            raise ProblemError(422, "The message is nested too deeply.") from None
        except TurnGoneError:
            raise ProblemError(410, "The stream to be resumed is not known here any more.") from None
        if after > len(turn) + turn.finished:
            raise ProblemError(400, "`Last-Event-ID` names an event that this stream does not have.")
        return _stream_response(turn, after, settings.heartbeat_interval)

    add_views(app, runtime)
    return app


def _last_event_id(key: str | None) -> int:
    given = request.headers.get("Last-Event-ID")
    if not given:
        return 0
    if key is None:
        raise ProblemError(400, "`Last-Event-ID` needs the `Idempotency-Key` of the stream to be resumed.")
    if not (given.isascii() and given.isdecimal() and len(given) <= 12):
        raise ProblemError(400, "`Last-Event-ID` must be the `id` of an event of this stream.")
    return int(given)


def _stream_response(turn: Turn, after: int, heartbeat_interval: float) -> TrioResponse:
    headers: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    if turn.key is not None:
        headers = {**headers, "X-Stream-Resumable": "1"}
    response = TrioResponse(
        EventStream(turn, after, heartbeat_interval), headers=dict(headers), content_type="text/event-stream"
    )
    response.timeout = None  # Quart cuts every response after 60 s otherwise
    return response

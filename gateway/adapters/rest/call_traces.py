"""Every REST call as a span, where traces are on."""

from __future__ import annotations

from collections.abc import Collection

from quart import Response, g, request
from quart_trio import QuartTrio

from gateway.core.session_id import is_session_id
from gateway.core.trace_context import presented_trace
from gateway.trace_ports import Attributes, Span, Tracing

_CUT = "CALLER_LEFT"
"""Where no answer was given: the caller went away, or the node stopped."""


def trace_calls(app: QuartTrio, tracing: Tracing, *, untraced: Collection[str]) -> None:
    """Begin a span with each call and end it with its answer; not for the paths in ``untraced``.

    To be called after the hooks that set ``g.head`` and ``g.request_id``, whose log entries then carry the
    ids. A call that is refused before it is served (its address is too fast) has no span. An answer that is
    a stream ends its span as it begins.
    """

    async def begin() -> None:
        if request.path in untraced:
            return
        attributes: dict[str, str | bool | int | float] = {
            "http.request.method": request.method,
            "gateway.request.id": g.request_id,
        }
        name = request.method
        if request.url_rule is not None:
            attributes["http.route"] = request.url_rule.rule
            name = f"{request.method} {request.url_rule.rule}"
        session_id = (request.view_args or {}).get("session_id")
        if is_session_id(session_id):
            attributes["session.id"] = str(session_id)
        g.span = tracing.begin(name, presented_trace(g.head.headers), attributes)
        g.trace = g.span.context
        g.trace_log_fields = g.span.log_fields

    async def end(response: Response) -> Response:
        status = response.status_code
        _end({"http.response.status_code": status}, error=str(status) if status >= 500 else "")
        return response

    async def end_unanswered(_error: BaseException | None) -> None:
        _end({"error.type": _CUT}, error="")

    app.before_request(begin)
    app.after_request(end)
    app.teardown_request(end_unanswered)


def _end(attributes: Attributes, *, error: str) -> None:
    span: Span | None = g.pop("span", None)
    if span is not None:
        span.end(attributes, error=error)

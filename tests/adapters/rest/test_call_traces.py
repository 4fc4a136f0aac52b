"""REST calls as spans: what is in them, whose trace they are in, and what goes to the Agent Runtime."""

from __future__ import annotations

import httpx
import pytest
import trio

from gateway.core.trace_context import presented_trace
from tests.adapters.rest.harness import INTERNAL, Rest
from tests.tracing_fake import CALLER, RecordingTracing

IN_TRACE = {**INTERNAL, "traceparent": CALLER.traceparent, "tracestate": CALLER.tracestate}


async def test_a_call_is_a_span_in_the_caller_s_trace() -> None:
    """With its route, its session and its status; its log entry leads to it."""
    rest = Rest(tracing=(tracing := RecordingTracing()))
    await rest.get("/api/v1/sessions/s1/history", {**IN_TRACE, "X-Request-ID": "r1"})

    span = tracing.only
    route = "/api/v1/sessions/<session_id>/history"
    assert (span.name, span.parent, span.error) == (f"GET {route}", CALLER, "")
    assert span.attributes == {
        "http.request.method": "GET",
        "http.route": route,
        "http.response.status_code": 200,
        "session.id": "s1",
        "gateway.request.id": "r1",
    }
    (fields,) = (fields for _, event, fields in rest.telemetry.lines if event == "rest_request")
    assert fields["trace_id"] == CALLER.traceparent.split("-")[1]


async def test_the_runtime_is_told_of_the_span() -> None:
    """What it records is below the call; what others put into tracestate stays."""
    rest = Rest(tracing=(tracing := RecordingTracing()))
    await rest.get("/api/v1/agents", IN_TRACE)

    assert presented_trace(rest.seen[0].headers.items()) == tracing.only.context != CALLER


@pytest.mark.parametrize(("status", "error"), [(404, ""), (503, "503")])
async def test_only_the_server_s_failures_are_errors(status: int, error: str) -> None:
    """A 404 is an answer like any other (OpenTelemetry's conventions for HTTP servers)."""
    rest = Rest(lambda _: httpx.Response(status, json={}), tracing=(tracing := RecordingTracing()))
    await rest.get("/api/v1/agents")

    assert (tracing.only.attributes["http.response.status_code"], tracing.only.error) == (status, error)


async def test_a_path_that_is_no_route_is_in_no_name() -> None:
    """Names are few, whatever callers ask for; and a session that is none is left out."""
    rest = Rest(tracing=(tracing := RecordingTracing()))
    await rest.get("/no/such/secret")
    await rest.get("/x", raw_path="/api/v1/sessions/a%2Fb/history")

    unknown, bad_session = tracing.spans
    assert (unknown.name, unknown.attributes.get("http.route")) == ("GET", None)
    assert "secret" not in str(unknown)
    assert "session.id" not in bad_session.attributes


@pytest.mark.parametrize("path", ["/health", "/api/v1/health", "/metrics"])
async def test_probes_and_scrapes_are_no_spans(path: str) -> None:
    """They come every few seconds, all day long."""
    rest = Rest(tracing=(tracing := RecordingTracing()))
    await rest.get(path)

    assert tracing.spans == []


async def test_a_call_that_is_cut_off_ends_its_span() -> None:
    """The caller left before there was an answer."""

    async def never(_: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    rest = Rest(never, tracing=(tracing := RecordingTracing()))
    with trio.move_on_after(0.1):
        await rest.get("/api/v1/agents")

    assert (tracing.only.attributes["error.type"], tracing.only.error) == ("CALLER_LEFT", "")


async def test_without_traces_the_caller_s_is_passed_on() -> None:
    """As it is; where there is none, the runtime is given a new one."""
    rest = Rest()
    await rest.get("/api/v1/agents", IN_TRACE)
    await rest.get("/api/v1/agents")

    assert presented_trace(rest.seen[0].headers.items()) == CALLER
    assert presented_trace(rest.seen[1].headers.items()) is not None

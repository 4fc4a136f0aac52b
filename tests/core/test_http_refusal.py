"""Refusals in HTTP: status, fields and body for every kind of error."""

from __future__ import annotations

import json

import h11
import pytest

from gateway.core.errors import (
    Forbidden,
    GatewayError,
    HandshakeRefused,
    InsufficientScope,
    InvalidToken,
    MessageTooLarge,
    NotAuthenticated,
    NotYours,
    RateLimited,
)
from gateway.core.http_refusal import refusal_of
from gateway.core.request_head import RequestRefused


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (HandshakeRefused("Odd."), 400, ("HANDSHAKE_REFUSED", False)),
        (MessageTooLarge("Big."), 413, ("MESSAGE_TOO_LARGE", False)),
        (RateLimited("Slow down."), 429, ("RATE_LIMITED", True)),
        (Forbidden("No."), 403, ("FORBIDDEN", False)),
        (NotYours("No."), 403, ("NOT_YOURS", False)),
        (RequestRefused(431, "x", "Large."), 431, ("HANDSHAKE_REFUSED", False)),
    ],
)
def test_errors_are_told_in_the_common_form(error: GatewayError, status: int, body: tuple[str, bool]) -> None:
    """protocol.md section 1: code, message, retryable, and the message once more as ``detail``."""
    refusal = refusal_of(error)
    assert refusal.status == status
    assert json.loads(refusal.body) == {
        "error": {"code": body[0], "message": error.message, "retryable": body[1]},
        "detail": error.message,
    }


@pytest.mark.parametrize(
    ("error", "name", "challenge"),
    [
        (NotAuthenticated("Log in."), "unauthorized", 'Bearer realm="gateway"'),
        (
            InvalidToken('It says "é\\'),
            "invalid_token",
            'Bearer realm="gateway", error="invalid_token", error_description="It says \'\'\'"',
        ),
        (
            InsufficientScope("api:read"),
            "insufficient_scope",
            'Bearer realm="gateway", error="insufficient_scope", '
            "error_description=\"This needs the scope 'api:read'; get a token that carries it.\", "
            'scope="api:read"',
        ),
    ],
)
def test_authentication_is_challenged(error: GatewayError, name: str, challenge: str) -> None:
    """protocol.md section 7 and RFC 6750 section 3; no error code for a caller that presented nothing."""
    refusal = refusal_of(error)
    assert refusal.status == error.http_status
    assert dict(refusal.headers)["WWW-Authenticate"] == challenge
    assert json.loads(refusal.body) == {"error": name, "error_description": error.message}


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    """RFC 9110 section 10.2.3 knows no fractions."""
    assert dict(refusal_of(RateLimited("x", retry_after=0.1)).headers)["Retry-After"] == "1"
    assert "Retry-After" not in dict(refusal_of(RateLimited("x")).headers)


def test_an_unknown_version_of_websocket_is_told_the_known_one() -> None:
    """RFC 6455 section 4.4."""
    headers = dict(refusal_of(RequestRefused(426, "x", "x")).headers)
    assert headers["Sec-WebSocket-Version"] == "13"


def test_the_response_is_well_formed_and_final() -> None:
    """Another implementation of HTTP reads it, and knows that the connection ends."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    refusal = refusal_of(RequestRefused(408, "x", "Slow."))
    client.receive_data(refusal.as_response())
    response, data = client.next_event(), client.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == 408
    assert isinstance(data, h11.Data)
    assert bytes(data.data) == refusal.body
    client.next_event()
    assert client.our_state is h11.MUST_CLOSE

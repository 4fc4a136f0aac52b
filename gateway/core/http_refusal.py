"""How a refusal looks in HTTP: status, header fields and JSON body of every ``GatewayError``.

Used wherever a request or an upgrade is turned down: in front of the WebSocket, in front of the REST
application, and in it (protocol.md sections 1 and 7; RFC 6750 section 3 for ``WWW-Authenticate``).
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from attrs import field, frozen

from gateway.core.errors import GatewayError, InsufficientScope, InvalidToken, NotAuthenticated
from gateway.core.request_head import RequestRefused

_REALM = "gateway"


@frozen
class HttpRefusal:
    """One refusal, ready to be sent by whatever speaks HTTP."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Without the fields of framing (Content-Length, Connection)."""
    body: bytes = field(repr=False)

    def as_response(self) -> bytes:
        """The whole HTTP/1.1 response, after which the connection is to be closed."""
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            *(f"{name}: {value}" for name, value in self.headers),
            f"Content-Length: {len(self.body)}",
            "Connection: close",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + self.body


def refusal_of(error: GatewayError) -> HttpRefusal:
    """How ``error`` is answered in HTTP."""
    headers: list[tuple[str, str]] = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    status = error.http_status
    if isinstance(error, RequestRefused):
        status = error.status
        headers.extend(error.headers)
    if error.retry_after is not None:
        headers.append(("Retry-After", str(max(0, math.ceil(error.retry_after)))))
    content: dict[str, object]
    if isinstance(error, NotAuthenticated | InsufficientScope):
        name = _bearer_error(error)
        headers.append(("WWW-Authenticate", _challenge(error)))
        content = {"error": name, "error_description": error.message}
    else:
        details = {"code": error.code, "message": error.message, "retryable": error.retryable}
        content = {"error": details, "detail": error.message}
    return HttpRefusal(status, tuple(headers), json.dumps(content, separators=(",", ":")).encode("ascii"))


def _bearer_error(error: GatewayError) -> str:
    if isinstance(error, InsufficientScope):
        return "insufficient_scope"
    return "invalid_token" if isinstance(error, InvalidToken) else "unauthorized"


def _challenge(error: GatewayError) -> str:
    """RFC 6750 section 3.1: a caller that presented nothing is told no error code."""
    parts = [f'Bearer realm="{_REALM}"']
    if isinstance(error, InvalidToken | InsufficientScope):
        parts.append(f'error="{_bearer_error(error)}"')
        parts.append(f'error_description="{_quotable(error.message)}"')
    if isinstance(error, InsufficientScope):
        parts.append(f'scope="{_quotable(error.scope)}"')
    return ", ".join(parts)


def _quotable(text: str) -> str:
    """``text`` in the characters that RFC 6750 section 3 allows within the quotes."""
    return "".join(letter if " " <= letter <= "~" and letter not in '"\\' else "'" for letter in text)

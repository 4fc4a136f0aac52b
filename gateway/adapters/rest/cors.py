"""Browsers: which origins may call (WHATWG Fetch, the CORS protocol)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gateway.core.errors import Forbidden

_EXPOSED = "X-Request-ID, Retry-After, WWW-Authenticate"
_ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, X-Request-ID, traceparent, tracestate"


class Cors:
    """Lets the listed origins in. Nothing is allowed with credentials: cookies mean nothing here."""

    def __init__(self, allowed_origins: Collection[str]) -> None:
        self._allowed = frozenset(allowed_origins)

    def response_headers(self, origin: str | None) -> Mapping[str, str]:
        """Header fields for an answer to ``origin``."""
        if origin is None or origin.lower() not in self._allowed:
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
        }

    def preflight_headers(self, origin: str | None, methods: Collection[str]) -> Mapping[str, str]:
        """Header fields for the answer to a preflight. Raises ``Forbidden`` for an origin not listed."""
        if origin is None or origin.lower() not in self._allowed:
            raise _foreign_origin()
        return {
            "Access-Control-Allow-Methods": ", ".join(sorted(methods)),
            "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Max-Age": "600",
        }

    def check(self, method: str, origin: str | None) -> None:
        """Raise ``Forbidden`` for a page of another origin that would change something.

        A browser sends some POSTs without asking first; reading is stopped by the browser itself, which
        finds no ``Access-Control-Allow-Origin``. A request without Origin is no browser's.
        """
        if method not in ("GET", "HEAD") and origin is not None and origin.lower() not in self._allowed:
            raise _foreign_origin()


def _foreign_origin() -> Forbidden:
    return Forbidden("This Origin may not call the gateway; its operator can add it to ALLOWED_ORIGINS.")

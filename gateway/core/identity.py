"""Who is calling: the result of authentication, and the credentials it starts from."""

from __future__ import annotations

from attrs import field, frozen

SCOPE_READ = "api:read"
SCOPE_WRITE = "api:write"
SCOPE_ADMIN = "api:admin"

ANONYMOUS_SUBJECT = "anonymous"
INTERNAL_SUBJECT = "internal"


@frozen
class Credentials:
    """What a caller presented; empty fields were not presented. Its repr shows no secret."""

    bearer: str | None = field(default=None, repr=False)
    """The JWT of ``Authorization: Bearer`` or of the ``bearer.<jwt>`` subprotocol."""
    internal_key: str | None = field(default=None, repr=False)
    """The value of ``X-Internal-Auth``."""


@frozen
class Identity:
    """A caller whose credentials were verified."""

    subject: str
    """``sub`` of the token, or one of the two fixed subjects above."""
    scopes: frozenset[str] = frozenset({SCOPE_READ, SCOPE_WRITE})
    expires_at: float | None = None
    """Seconds since the Unix epoch; None never expires."""
    sees_all: bool = False
    """The internal key: every session is its own (protocol.md section 7)."""

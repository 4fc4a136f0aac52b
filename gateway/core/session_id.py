"""The rule for ``session_id`` in a path (protocol.md section 1), the same for sockets and REST."""

from __future__ import annotations

import re

from gateway.core.errors import HandshakeRefused

MAX_SESSION_ID = 128

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_ENCODED_COLON = re.compile("%3a", re.IGNORECASE)


def parse_session_id(segment: str) -> str:
    """The session id that a path segment names, given as it came in: still percent-encoded.

    The only encoding that is undone is that of the colon, which ``encodeURIComponent`` produces. Any other
    is refused, even of characters that are allowed bare: a segment that reads differently before and after
    decoding is how a path is made to mean something else further on. Raises ``HandshakeRefused``.
    """
    session_id = _ENCODED_COLON.sub(":", segment) if len(segment) <= 3 * MAX_SESSION_ID else ""
    if not is_session_id(session_id):
        raise HandshakeRefused(
            "The session id must be 1 to 128 characters of A-Z a-z 0-9 . _ : - and neither . nor .. ; "
            "correct it."
        )
    return session_id


def is_session_id(value: object) -> bool:
    """Whether ``value`` is a session id, for ids that come in JSON."""
    return isinstance(value, str) and _SESSION_ID.match(value) is not None and value not in (".", "..")

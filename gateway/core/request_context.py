"""What identifies one request on its way: its request id, the subject as a header.

Pure: fresh random bytes are an argument. What a caller sent is taken over only when it is exactly of the
form that the field's definition allows, so nothing of it can become another header or log line.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote

from gateway.core.errors import Forbidden

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")
_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_TOKEN_NAMES = frozenset(
    {
        "token",
        "access_token",
        "auth_token",
        "id_token",
        "refresh_token",
        "jwt",
        "bearer",
        "authorization",
        "api_key",
        "internal_api_key",
        "x-internal-auth",
    }
)
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.")


def request_id(presented: str | None, fresh: bytes) -> str:
    """The caller's request id if it is safe to pass on and log, else one made of ``fresh`` bytes."""
    if presented is not None and _REQUEST_ID.match(presented):
        return presented
    return fresh.hex()


def user_id_header(subject: str) -> str:
    """``subject`` as the value of ``X-User-ID``: as it is when a header can hold it, else percent-encoded."""
    if _PLAIN.match(subject):
        return subject
    return quote(subject.encode("utf-8", "surrogatepass"), safe=_VISIBLE)


def refuse_token_in_query(query: str) -> None:
    """Raise ``Forbidden`` when the query holds a credential: URLs are logged all over the way."""
    if not query:
        return
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        if name.lower() in _TOKEN_NAMES or _TOKEN.search(value):
            raise Forbidden("A token in a URL is not accepted; send it in Authorization: Bearer.")

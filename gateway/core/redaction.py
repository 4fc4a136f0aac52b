"""Make values safe to log: secrets and message content masked, control characters escaped, sizes bounded.

The caller is asked to log no secret in the first place; this is the second line of defence, for the day it
does, and for text that others wrote (a dependency's exception, a header).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = "[redacted]"
MAX_TEXT = 2_000
"""Characters kept of one string."""
MAX_ITEMS = 50
MAX_DEPTH = 4

_SECRET_NAME = re.compile(
    r"authorization|token|secret|passw|cookie|credential|jwt|bearer|internal[_-]?auth|(^|[_-])key$|api[_-]?key",
    re.IGNORECASE,
)
_CONTENT_NAME = re.compile(
    r"(content|message|body|payload|text|data|arguments|result|feedback|query|query_string)\Z", re.IGNORECASE
)
_TOKEN = re.compile(
    r"eyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_=-]*)*"  # a JWT, whole or cut (RFC 7519: base64url of '{"…')
    r"|(?<=bearer[ .])[^\s\"',;]+"
    r"|(?<=basic )[A-Za-z0-9+/=]{4,}",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]*@")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Redactor:
    """Knows the secrets of this process by value, all others by name or shape."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Longest first: one secret may be a part of another. Shorter ones would mask ordinary words.
        known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def text(self, value: str, limit: int = MAX_TEXT) -> str:
        """``value`` without anything that is, or looks like, a secret; line breaks are kept."""
        if len(value) > 4 * limit:
            value = value[: 4 * limit]
        if self._known is not None:
            value = self._known.sub(MASK, value)
        value = _TOKEN.sub(MASK, value)
        if "://" in value:
            value = _URL_PASSWORD.sub(f"{MASK}@", value)
        return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"

    def field(self, name: str, value: object) -> object:
        """The value of the log field ``name`` as it may be written: plain, bounded and on one line."""
        return self._field(name, value, MAX_DEPTH)

    def _field(self, name: str, value: object, depth: int) -> object:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            # JSON has no NaN and no infinity.
            return value if abs(value) < float("inf") else str(value)
        if _SECRET_NAME.search(name) or _CONTENT_NAME.search(name):
            return MASK
        if isinstance(value, str):
            return one_line(self.text(value))
        if isinstance(value, bytes | bytearray | memoryview):
            # Bytes are messages and events here.
            return f"[{len(value)} bytes]"
        if depth and isinstance(value, Mapping):
            return {
                one_line(self.text(str(key), 200)): self._field(str(key), item, depth - 1)
                for key, item in list(value.items())[:MAX_ITEMS]
            }
        if depth and isinstance(value, list | tuple | set | frozenset):
            return [self._field(name, item, depth - 1) for item in list(value)[:MAX_ITEMS]]
        return one_line(self.text(str(value)))


def one_line(value: str) -> str:
    """``value`` with everything escaped that could end a line, steer a terminal or reorder the text."""
    return _UNSAFE.sub(_escape, value)


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"

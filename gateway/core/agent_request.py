"""What is sent to the Agent Runtime, made so that nothing in it can be more than what it stands for."""

from __future__ import annotations

import re
import urllib.parse

import orjson

from gateway.core.errors import AgentProtocolError
from gateway.core.redaction import MASK, one_line

_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_NOT_IN_A_HEADER = re.compile(r"[\x00-\x1f\x7f]|\A\s|\s\Z")
_WORD = re.compile(r"\w{4,}")
_JSON_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


def post_body(session_id: str, message: bytes) -> bytes:
    """The body of a turn's POST. ``message`` goes in as it is: numbers, spaces and duplicates kept."""
    return b'{"session_id":%b,"message":%b}' % (orjson.dumps(session_id), message)


def header_value(text: str) -> bytes:
    """``text`` as a header value that cannot be anything else: what is not visible ASCII, percent-encoded.

    ``%`` is encoded as well, so that two subjects never become one.
    """
    return urllib.parse.quote(text, safe=_VISIBLE, errors="surrogatepass").encode("ascii")


def event_id_value(event_id: str) -> bytes:
    """``event_id`` for ``Last-Event-ID``: UTF-8 as browsers send it, since the runtime compares it.

    Raises ``AgentProtocolError`` for an id that no header can carry unchanged.
    """
    if _NOT_IN_A_HEADER.search(event_id):
        raise AgentProtocolError(
            "The Agent Runtime's stream was cut and cannot be continued: its last event id holds "
            "characters that no header can carry."
        )
    return event_id.encode("utf-8", "replace")


def loggable(answer: bytes, message: bytes) -> str:
    """An error page for the log, on one line, without the words of the message that it may quote.

    Validation errors of common frameworks repeat the request's body. Words under four letters stay.
    """
    quoted = _unescaped(message)
    return one_line(_WORD.sub(lambda word: MASK if word[0] in quoted else word[0], _unescaped(answer)))


def _unescaped(text: bytes) -> str:
    return _JSON_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text.decode("utf-8", "replace"))

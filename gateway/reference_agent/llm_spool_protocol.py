"""What a runtime and its LLM spool say to each other over their unix socket: a line of JSON each time.

    runtime → gateway-llm-spool <identity>          in every version; a spool of another identity ends itself
    spool   → same | other
    runtime → {"ask": {…}}                           at most once per connection
    spool   → {"said": n}                            characters the user had before this answer began
    spool   → {"type": "Token", "text": "…"} …      all of the answer, from its beginning; then it closes
    spool   → {"type": "End"} | {"type": "Failure", …}
    runtime → {"release": {"session_id", "question"}} | {"bye": true}

An empty line of the spool only says that it is alive. That the runtime closes a connection means nothing:
that is what a runtime does that was killed, and its work goes on. Only `release` ends it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import attrs
import orjson

import gateway
from gateway.reference_agent.brain import BrainError, CallTool, Piece, SwitchTo, Token, Usage

VERSION = 1
"""Of what follows the greeting."""

GREETING = b"gateway-llm-spool "
SAME, OTHER = b"same", b"other"

MAX_LINE_BYTES = 64 * 1024 * 1024
"""More than any question that the runtime can have: its own requests are bounded to 8 MiB each."""

ALIVE_INTERVAL = 5.0
"""Seconds between two signs of life while the LLM says nothing."""

LOST_AFTER = 4 * ALIVE_INTERVAL
"""Seconds of silence after which a spool is taken for lost."""


@attrs.frozen
class Ask:
    """One question to the LLM."""

    session_id: str
    question: str
    """The same text for the same question, and never for another."""

    agent: str
    said: int
    """Characters of the answer that the user has been given already, which ``body`` asks to go on from."""

    body: Mapping[str, Any]
    """The request to the LLM."""


@attrs.frozen
class End:
    """The answer is complete."""


@attrs.frozen
class Failure:
    """The answer ended in a `BrainError`."""

    code: str
    message: str
    retryable: bool

    def to_error(self) -> BrainError:
        """The error that it stands for."""
        return BrainError(self.code, self.message, retryable=self.retryable)


Line = Piece | End | Failure

_LINES: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (Token, CallTool, SwitchTo, Usage, End, Failure)
}


def encode_lines(*lines: Line) -> bytes:
    """The lines of an answer."""
    return b"".join(
        orjson.dumps({"type": type(line).__name__, **attrs.asdict(line, recurse=False)}) + b"\n"
        for line in lines
    )


def decode_line(line: bytes) -> Line | None:
    """One line of an answer, None for a sign of life. Raises `ValueError` for anything else."""
    if not line:
        return None
    fields = orjson.loads(line)
    try:
        decoded: Line = _LINES[fields.pop("type")](**fields)
    except (TypeError, KeyError, AttributeError) as exc:
        raise ValueError("not a line of an answer") from exc
    return decoded


def identity(llm_url: str, key: str | None, keep: float) -> bytes:
    """Who a spool is: one of another version, for another LLM or with another key must not be used."""
    about = [VERSION, gateway.__version__, llm_url, key, keep]
    return hashlib.sha256(orjson.dumps(about)).hexdigest().encode()


class LineBuffer:
    """Bytes in, whole lines out. Pure."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """The lines that ``data`` completes. Raises `ValueError` for one that is too long."""
        # Only what is new can hold the end of a long line: looking at all of it each time would be quadratic.
        if b"\n" not in data:
            self._rest += data
            lines: list[bytes] = []
        else:
            *lines, rest = (bytes(self._rest) + data).split(b"\n")
            self._rest = bytearray(rest)
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError("a line is too long")
        return lines

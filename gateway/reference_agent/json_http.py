"""What every route needs: JSON in, JSON out, problems as ``{"detail": …}``."""

import re
from typing import Any

import orjson
from quart import request
from quart_trio.wrappers import TrioResponse

SESSION_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}")
"""Protocol section 1: what a session may be called."""


class ProblemError(Exception):
    """The request is answered with ``{"detail": …}`` and this status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def json_response(value: Any, status: int = 200) -> TrioResponse:
    """``value`` as JSON."""
    return TrioResponse(orjson.dumps(value), status=status, content_type="application/json")


async def read_object() -> dict[str, Any]:
    """The request's JSON object. Raises `ProblemError` 400 for anything else."""
    try:
        body = orjson.loads(await request.get_data())
    except orjson.JSONDecodeError:
        raise ProblemError(400, "The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise ProblemError(422, "The body must be a JSON object.")
    return body

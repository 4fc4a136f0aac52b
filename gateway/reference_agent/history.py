"""The history of a session: its entries, as the routes show them and as LLM APIs need them."""

from typing import Any

import attrs
import cattrs
import orjson


@attrs.frozen
class RequestedCall:
    """A tool call as the assistant asked for it."""

    call_id: str
    tool_name: str
    arguments: dict[str, Any]


@attrs.frozen
class Entry:
    """One entry of the history. ``role`` is ``user``, ``assistant``, ``system`` or ``tool``."""

    role: str
    content: str
    at: str
    agent: str | None = None
    tool_calls: tuple[RequestedCall, ...] = ()
    call_id: str | None = None
    tool_name: str | None = None
    is_error: bool = False
    interrupted: bool = False
    """The answer was stopped before its end."""


_CONVERTER = cattrs.Converter()


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """The entry as plain data, without the fields that say nothing."""
    plain: dict[str, Any] = _CONVERTER.unstructure(entry)
    return {
        name: value
        for name, value in plain.items()
        if name in ("role", "content", "at") or value not in (None, False, (), [])
    }


def entry_from_json(plain: dict[str, Any]) -> Entry:
    """The inverse of `entry_to_json`."""
    return _CONVERTER.structure(plain, Entry)


def text_of(value: Any) -> str:
    """A tool's result as text: strings as they are, the usual wrappers opened, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        names = [item.get("path") or item.get("name") for item in value]
        if all(isinstance(name, str) for name in names):
            return "\n".join(names)
    if isinstance(value, dict):
        for name in ("content", "text", "output", "stdout", "files", "entries"):
            if isinstance(value.get(name), (str, list)) and value[name]:
                return text_of(value[name])
    return orjson.dumps(value).decode()


def last_request(history: tuple[Entry, ...]) -> tuple[Entry | None, tuple[Entry, ...]]:
    """The newest entry of the user, and what has happened since."""
    for index in range(len(history) - 1, -1, -1):
        if history[index].role == "user":
            return history[index], history[index + 1 :]
    return None, history

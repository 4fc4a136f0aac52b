"""Lists of sessions, and lists by session, as one subject may see them (protocol.md section 7)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gateway.core.errors import AgentProtocolError

SESSION_FIELDS = ("session_id", "id")
"""Where a session's own JSON object names it."""


def session_of(entry: object, fields: Sequence[str] = SESSION_FIELDS) -> str | None:
    """The session that a JSON object is about: the first of ``fields`` that it has as text."""
    if isinstance(entry, dict):
        for name in fields:
            if isinstance(entry.get(name), str):
                return str(entry[name])
    return None


def only_sessions(answer: object, own: Collection[str], fields: Sequence[str] = SESSION_FIELDS) -> object:
    """``answer`` with nothing in it but what is about sessions in ``own``; itself when that is all of it.

    ``answer`` is a list, or an object with one or more lists; entries are session ids or objects about one
    session. Plain values beside the lists stay, counts of entries are corrected, other objects are dropped:
    what is not known to be the subject's own is not shown. Raises ``AgentProtocolError`` for other shapes.
    """
    if isinstance(answer, list):
        return _own(answer, own, fields)
    if not isinstance(answer, dict) or not any(isinstance(value, list) for value in answer.values()):
        raise AgentProtocolError("The Agent Runtime's answer is not a list of sessions; tell its operator.")
    shown: dict[str, object] = {}
    hidden = 0
    for key, value in answer.items():
        if isinstance(value, list):
            shown[key] = kept = _own(value, own, fields)
            hidden += len(value) - len(kept)
        elif not isinstance(value, dict):
            shown[key] = value
    if not hidden and len(shown) == len(answer):
        return answer
    for key in ("total", "count"):
        if hidden and isinstance(shown.get(key), int):
            shown[key] = sum(len(value) for value in shown.values() if isinstance(value, list))
    return shown


def _own(entries: list[object], own: Collection[str], fields: Sequence[str]) -> list[object]:
    kept = [
        entry for entry in entries if (entry if isinstance(entry, str) else session_of(entry, fields)) in own
    ]
    return entries if len(kept) == len(entries) else kept

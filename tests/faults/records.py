"""What the harness writes down: for each client, what it said and what it got, in order."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from attrs import Factory, define

Kind = Literal["connect", "got", "lost"]


class Entry(NamedTuple):
    """One thing that a client lived through."""

    kind: Kind
    value: Any
    """connect: the ``(epoch, last_seq)`` it resumes with, or None; got: the object; lost: why."""


@define
class Sent:
    """One message of a client's own and what became of it."""

    body: dict[str, Any]
    sends: int = 0
    answers: list[dict[str, Any]] = Factory(list)
    """Every ack and nack (v1: ack and error) that named it."""
    unanswered_at_loss: bool = False
    """v1: its socket was lost before an answer came, so nobody can say whether it arrived."""

    @property
    def message_id(self) -> str:
        """Its ``id`` (v2) or ``message_id`` (v1)."""
        return str(self.body.get("id") or self.body["message_id"])

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """The acks among the answers."""
        return [answer for answer in self.answers if answer["type"] == "ack"]

    @property
    def is_settled(self) -> bool:
        """Whether an answer came that is final."""
        return any(answer["type"] == "ack" or not answer.get("retryable") for answer in self.answers)


@define
class ClientRecord:
    """One client of a session."""

    name: str
    dialect: Literal["v1", "json", "msgpack"]
    entries: list[Entry] = Factory(list)
    sent: dict[str, Sent] = Factory(dict)

    @property
    def is_v2(self) -> bool:
        """Whether it speaks v2."""
        return self.dialect != "v1"


@define
class SessionRecord:
    """One session: its clients, and its whole log as replayed to an auditor at the end."""

    session_id: str
    clients: list[ClientRecord] = Factory(list)
    audit: list[dict[str, Any]] = Factory(list)
    """The events of a replay from seq 0, in order."""
    napped: bool = False
    """Whether all clients were away for longer than the gateway lets a turn go on without any."""
    final: dict[str, Any] | None = None
    """The last ``welcome``."""

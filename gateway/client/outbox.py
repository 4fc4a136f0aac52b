"""Messages without an answer yet: what to send, and what may be sent again. Pure.

Rules:

* A message is sent again, under its id and in its place, on every new socket until it is answered.
* Not so when that could do the work twice: the gateway has forgotten the id (``dedupe_window``), or has
  lost the session's past (another epoch). Then the answer is ``OutcomeUnknown``.
* A refusal that may pass (``retryable``) is no answer: the message is sent again after a pause. It may have
  been kept all the same (a store that could not write it yet), so the rule above goes for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import define, field

from gateway.client.effects import Answered, Effect, Transmit
from gateway.client.errors import MessageRefused, OutcomeUnknown
from gateway.client.events import Accepted
from gateway.client.reconnect import Backoff

WINDOW_SHARE = 0.9
"""Of the dedupe window, after which a message is not sent again: transit and clocks take their part."""


@define
class _Waiting:
    fields: Mapping[str, object] = field(repr=False)
    backoff: Backoff
    first_sent: float | None = None
    epoch: str | None = None
    """The epoch in which it was first sent."""
    retry_at: float | None = None


class Outbox:
    """The unanswered messages of one session, in the order they were submitted."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._waiting

    def add(self, message_id: str, fields: Mapping[str, object]) -> None:
        """Take a message. Raises ``ValueError`` for an id that is waiting already."""
        if message_id in self._waiting:
            raise ValueError(f"A message with the id {message_id!r} is waiting for its answer already.")
        self._waiting[message_id] = _Waiting(fields, Backoff(self._random))

    def withdraw(self, message_id: str) -> None:
        """Do not send a message again; nobody waits for its answer."""
        self._waiting.pop(message_id, None)

    def transmit(self, message_id: str, epoch: str, now: float) -> Transmit:
        """Send a message on the live socket."""
        waiting = self._waiting[message_id]
        if waiting.first_sent is None:
            waiting.first_sent, waiting.epoch = now, epoch
        waiting.retry_at = None
        return Transmit(waiting.fields, message_id)

    def transmit_all(self, epoch: str, window: float, now: float) -> list[Effect]:
        """A socket became live: send everything, but for what could be done twice."""
        effects: list[Effect] = []
        for message_id, waiting in list(self._waiting.items()):
            reason = self._why_unsafe(waiting, epoch, window, now)
            if reason is None:
                effects.append(self.transmit(message_id, epoch, now))
            else:
                del self._waiting[message_id]
                effects.append(Answered(message_id, OutcomeUnknown(reason)))
        return effects

    @staticmethod
    def _why_unsafe(waiting: _Waiting, epoch: str, window: float, now: float) -> str | None:
        if waiting.first_sent is None:
            return None
        if waiting.epoch != epoch:
            return (
                "The message was sent before the gateway lost this session's past. Whether it was carried "
                "out is unknown; look before you ask again."
            )
        if now - waiting.first_sent > window * WINDOW_SHARE:
            return (
                "The message was sent and not answered for longer than the gateway remembers ids. Whether it "
                "was carried out is unknown; look before you ask again."
            )
        return None

    def accepted(self, accepted: Accepted) -> list[Effect]:
        """The gateway took a message."""
        if self._waiting.pop(accepted.message_id, None) is None:
            return []
        return [Answered(accepted.message_id, accepted)]

    def refused(
        self, message_id: str, error: MessageRefused, retry_after: float | None, now: float
    ) -> list[Effect]:
        """The gateway did not take a message."""
        waiting = self._waiting.get(message_id)
        if waiting is None:
            return []
        if error.retryable:
            waiting.retry_at = now + waiting.backoff.next_delay(at_least=retry_after)
            return []
        del self._waiting[message_id]
        return [Answered(message_id, error)]

    def retries_due(self, epoch: str, now: float) -> list[Effect]:
        """Send again what was refused for a while, and whose pause is over."""
        return [
            self.transmit(message_id, epoch, now)
            for message_id, waiting in self._waiting.items()
            if waiting.retry_at is not None and waiting.retry_at <= now
        ]

    @property
    def next_retry(self) -> float | None:
        """When ``retries_due`` next has something to send."""
        times = [waiting.retry_at for waiting in self._waiting.values() if waiting.retry_at is not None]
        return min(times, default=None)

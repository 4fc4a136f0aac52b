"""The other workers, as one of them asks them: the supervisor passes questions on. See ``node_ports``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Final

import trio

from gateway.node_ports import Siblings
from gateway.ports import Telemetry
from gateway.workers.channel import Answer, Answers, Asking, Channel, Message, Question

_PATIENCE: Final = 2.0
"""Seconds until the supervisor itself counts as one that does not answer; it gives the others one."""


class ChannelSiblings(Siblings):
    """See the port. ``take`` gets what the supervisor says."""

    def __init__(self, channel: Channel, telemetry: Telemetry, *, number: int, count: int) -> None:
        self._channel = channel
        self._telemetry = telemetry
        self._number = number
        self._count = count
        self._answers: dict[str, Callable[[str], bytes | None]] = {}
        self._asked: dict[int, tuple[trio.Event, dict[str, bytes]]] = {}
        self._numbers = itertools.count(1)

    @property
    def number(self) -> int:
        """See the port."""
        return self._number

    @property
    def count(self) -> int:
        """See the port."""
        return self._count

    def answer(self, question: str, answer: Callable[[str], bytes | None]) -> None:
        """See the port."""
        self._answers[question] = answer

    async def ask(self, question: str, about: str = "") -> Mapping[str, bytes]:
        """See the port."""
        number = next(self._numbers)
        answered, contents = self._asked[number] = trio.Event(), {}
        try:
            self._channel.post(Asking(number, question, about))
            with trio.move_on_after(_PATIENCE):
                await answered.wait()
        finally:
            del self._asked[number]
        return contents

    def take(self, message: Message) -> None:
        """A message of the supervisor."""
        if isinstance(message, Question):
            self._channel.post(Answer(message.number, self._own_answer(message)))
        elif isinstance(message, Answers) and (asked := self._asked.get(message.number)) is not None:
            answered, contents = asked
            contents.update(message.contents)
            answered.set()

    def _own_answer(self, message: Question) -> bytes | None:
        answer = self._answers.get(message.question)
        if answer is None:
            return None  # Nothing is wired yet, or this worker is ending.
        try:
            return answer(message.about)
        except Exception as error:
            self._telemetry.error("question_crashed", question=message.question, cause=error)
            self._telemetry.count("gateway_bulkhead_catches_total", where="siblings")
            return None

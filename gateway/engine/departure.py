"""What of a session may move to another node or the next process: was its turn sent, and may one begin."""

from __future__ import annotations

from gateway.core.session import Session


class Departure:
    """How a session leaves this process without its work being lost, or done twice."""

    __slots__ = ("_sent_turn", "_session", "holds_turns", "is_suspended")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sent_turn: str | None = None
        self.holds_turns = False
        """Whether no turn may begin any more: what is accepted from now on is for whoever carries on."""
        self.is_suspended = False
        """Whether it takes no messages any more, for another node is about to have it."""

    def sending(self, turn_id: str) -> None:
        """The turn's message goes to the runtime now, or went there before this process had the session."""
        self._sent_turn = turn_id

    @property
    def has_unsent_turn(self) -> bool:
        """Whether a turn runs of which the runtime cannot know yet."""
        turn_id = self._session.turn_id
        return turn_id is not None and turn_id != self._sent_turn and self._session.is_running(turn_id)

    @property
    def can_move(self) -> bool:
        """Whether another node could carry the session on without loss."""
        return self._session.is_at_rest or self._session.is_resumable or self.has_unsent_turn

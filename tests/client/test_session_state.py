"""The delivery rules, against a gateway in the model that loses, repeats, merges, trims and forgets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.client.effects import (
    Answered,
    Break,
    Deliver,
    Effect,
    LeaveSoon,
    RenewToken,
    Transmit,
    Welcomed,
)
from gateway.client.errors import MessageRefused, OutcomeUnknown
from gateway.client.events import Accepted, ResumePoint, SessionEvent
from gateway.client.session_state import SessionState

Fields = dict[str, Any]
WINDOW = 1000.0


def welcome(**fields: object) -> Fields:
    """A welcome of epoch E1 with nothing in it, but for ``fields``."""
    return {
        "type": "welcome",
        "session_id": "s1",
        "epoch": "E1",
        "first_seq": 1,
        "last_seq": 0,
        "resumed": False,
        "turn": {"id": None, "state": "idle"},
        "pending": [],
        "limits": {"max_message_bytes": 1000},
        "dedupe_window_s": WINDOW,
        "heartbeat_s": 20,
        **fields,
    }


def token(seq: int, text: str = "x", **fields: object) -> Fields:
    """A token event."""
    return {"seq": seq, "type": "assistant_message", "token": text, "is_final": False, **fields}


def snapshot(seq: int, epoch: str = "E1", reason: str = "trimmed") -> Fields:
    """A snapshot with nothing running."""
    return {"type": "snapshot", "reason": reason, "epoch": epoch, "seq": seq, "text": "", "pending": []}


def ack(message_id: str, turn_id: str = "t1", status: str = "accepted") -> Fields:
    """The gateway took a message."""
    return {"type": "ack", "id": message_id, "status": status, "turn_id": turn_id}


def nack(message_id: str | None, code: str, **fields: object) -> Fields:
    """The gateway refused a message."""
    return {
        "type": "nack",
        "id": message_id,
        "code": code,
        "message": "no",
        "retryable": False,
        **fields,
    }


class Client:
    """A session state, with what it asked for kept apart."""

    def __init__(self, resume: ResumePoint | None = None) -> None:
        self.state = SessionState(random=lambda: 1.0, resume=resume)
        self.delivered: list[SessionEvent] = []
        self.sent: list[Fields] = []
        self.answers: dict[str, object] = {}
        self.others: list[Effect] = []
        self.broken: str | None = None
        self.now = 0.0

    def perform(self, effects: list[Effect]) -> None:
        """Keep what is asked for."""
        for effect in effects:
            if isinstance(effect, Deliver):
                self.delivered.append(effect.event)
            elif isinstance(effect, Transmit):
                self.sent.append(dict(effect.fields))
            elif isinstance(effect, Answered):
                assert effect.message_id not in self.answers, "answered twice"
                self.answers[effect.message_id] = effect.answer
            elif isinstance(effect, Break):
                self.broken = effect.reason
            else:
                self.others.append(effect)

    def open(self, *messages: Fields) -> ResumePoint | None:
        """A new socket on which ``messages`` come."""
        self.broken = None
        self.sent.clear()
        asked = self.state.opened()
        self.receive(*messages)
        return asked

    def receive(self, *messages: Fields, size: int = 10) -> None:
        """A frame."""
        self.perform(self.state.receive([(fields, size) for fields in messages], self.now))

    def submit(self, message_id: str) -> None:
        """The application sends a message."""
        self.perform(self.state.submit(message_id, {"type": "user_message", "id": message_id}, self.now))

    def take_all(self, size: int = 10) -> None:
        """The application takes everything that was delivered."""
        for event in self.delivered:
            self.perform(self.state.taken(event, size, self.now))

    def wake(self) -> None:
        """Time passes to the next thing that is due."""
        assert self.state.next_wake is not None
        self.now = max(self.now, self.state.next_wake)
        self.perform(self.state.wake(self.now))

    @property
    def seqs(self) -> list[tuple[int, int]]:
        """What was delivered."""
        return [(event.first_seq, event.seq) for event in self.delivered]


@pytest.fixture(name="client")
def live_client() -> Client:
    """A client on its first socket."""
    client = Client()
    client.open(welcome())
    return client


# ---------------------------------------------------------------------- down


def test_first_welcome_sets_the_place(client: Client) -> None:
    """A client that resumes nothing begins right behind the welcome's last_seq."""
    other = Client()
    assert other.open(welcome(last_seq=7)) is None
    other.receive(token(8))
    assert other.seqs == [(8, 8)]
    assert isinstance(other.others[0], Welcomed)


def test_resumes_behind_the_last_event_delivered(client: Client) -> None:
    """The next socket asks for what follows the last event delivered, also of a batch."""
    client.receive(token(1), token(2), token(5, first_seq=3))
    client.state.closed()
    assert client.open() == ResumePoint("E1", 5)


def test_repeat_is_dropped(client: Client) -> None:
    """An event at or before the position is not delivered again."""
    client.receive(token(1), token(2))
    client.receive(token(1), token(2), token(2, first_seq=1), token(3))
    assert client.seqs == [(1, 1), (2, 2), (3, 3)]
    assert client.broken is None


@pytest.mark.parametrize(
    "wrong",
    [token(3), token(4, first_seq=3), token(3, first_seq=1), token(2, first_seq=3), token(-1), token(True)],
)
def test_gap_breaks_the_socket_off(client: Client, wrong: Fields) -> None:
    """What does not begin right behind the position ends the socket; what came before it stays delivered."""
    client.receive(token(1), wrong, token(2))
    assert client.seqs == [(1, 1)]
    assert client.broken is not None
    client.receive(token(2))
    assert client.seqs == [(1, 1)]
    assert client.open() == ResumePoint("E1", 1)


def test_agent_may_name_its_events_as_it_likes(client: Client) -> None:
    """An event with a seq is the agent's, though it is called like one of the protocol's."""
    client.receive(
        {"seq": 1, "type": "welcome"},
        {"seq": 2, "type": "ack", "id": "m"},
        {"seq": 3, "type": "snapshot", "reason": "trimmed"},
    )
    assert [event.type for event in client.delivered] == ["welcome", "ack", "snapshot"]


def test_snapshot_is_delivered_and_moves_the_place(client: Client) -> None:
    """A snapshot in the middle of a socket stands for what was trimmed; the next event follows it."""
    client.receive(token(1), snapshot(10), token(11))
    assert [event.type for event in client.delivered] == [
        "assistant_message",
        "snapshot",
        "assistant_message",
    ]
    assert client.broken is None


def test_place_is_kept_until_the_snapshot_has_come(client: Client) -> None:
    """Cut between the welcome and its snapshot, the client asks from its old place again."""
    client.receive(token(1))
    client.open(welcome(epoch="E2", last_seq=40))
    assert client.open() == ResumePoint("E1", 1)
    client.receive(welcome(epoch="E2", last_seq=40), snapshot(40, "E2", "epoch_changed"), token(41))
    assert client.state.position == ResumePoint("E2", 41)
    assert [event.epoch for event in client.delivered] == ["E1", "E2", "E2"]


def test_event_before_its_snapshot_breaks_the_socket_off(client: Client) -> None:
    """After a welcome that did not resume, an event without the snapshot would be a silent gap."""
    client.receive(token(1))
    client.open(welcome(last_seq=9), token(2))
    assert client.broken is not None
    assert client.seqs == [(1, 1)]


@pytest.mark.parametrize(
    "frames",
    [
        [token(1)],
        [welcome(), welcome()],
        [welcome(epoch=None)],
        [{"kind": "welcome"}],
        [welcome(last_seq="1")],
    ],
)
def test_malformed_beginning_breaks_the_socket_off(frames: list[Fields]) -> None:
    """The first frame is one welcome, and well formed."""
    client = Client()
    client.open(*frames)
    assert client.broken is not None
    assert client.delivered == []


def test_resuming_another_epoch_than_asked_for_breaks_the_socket_off(client: Client) -> None:
    """``resumed`` is believed only for the epoch that was asked for."""
    client.open(welcome(epoch="E2", resumed=True), token(1))
    assert client.broken is not None
    assert client.delivered == []


def test_snapshot_of_the_past_breaks_the_socket_off(client: Client) -> None:
    """A live socket never goes back."""
    client.receive(token(1), token(2), snapshot(1))
    assert client.broken is not None


def test_resume_point_of_an_earlier_run_is_asked_for() -> None:
    """A program that kept its place resumes there with its first socket."""
    client = Client(ResumePoint("E1", 5))
    assert client.open(welcome(last_seq=6, resumed=True), token(6)) == ResumePoint("E1", 5)
    assert client.seqs == [(6, 6)]


# ---------------------------------------------------------------------- acknowledgements


def test_acknowledged_after_a_second(client: Client) -> None:
    """A single event is acknowledged at the latest 1 s after it was taken."""
    client.receive(token(1))
    client.take_all()
    assert client.sent == []
    client.wake()
    assert (client.now, client.sent) == (1.0, [{"type": "ack", "seq": 1}])
    assert client.state.next_wake is None


def test_acknowledged_after_a_hundred_events(client: Client) -> None:
    """The hundredth event is acknowledged at once, merged ones counted as what they stand for."""
    client.receive(token(60, first_seq=1))
    client.take_all()
    assert client.sent == []
    client.delivered.clear()
    client.receive(token(100, first_seq=61))
    client.take_all()
    assert client.sent == [{"type": "ack", "seq": 100}]


def test_acknowledged_after_many_bytes(client: Client) -> None:
    """256 KiB are acknowledged at once."""
    client.receive(token(1))
    client.take_all(size=256 << 10)
    assert client.sent == [{"type": "ack", "seq": 1}]


def test_only_what_was_taken_is_acknowledged(client: Client) -> None:
    """What only arrived is not acknowledged: the gateway would send without bound."""
    client.receive(token(1), token(2))
    client.perform(client.state.taken(client.delivered[0], 10, client.now))
    client.wake()
    assert client.sent == [{"type": "ack", "seq": 1}]


def test_events_of_an_epoch_that_is_over_are_not_acknowledged(client: Client) -> None:
    """A number of the old epoch would acknowledge events of the new one that were not seen."""
    client.receive(token(200, first_seq=1))
    client.open(welcome(epoch="E2", last_seq=3), snapshot(3, "E2", "no_such_session"))
    client.sent.clear()
    client.take_all()
    client.wake()
    assert client.sent == [{"type": "ack", "seq": 3}]


def test_acknowledgements_begin_anew_with_another_epoch(client: Client) -> None:
    """Numbers that the old epoch had passed count again in the new one."""
    client.receive(token(50, first_seq=1))
    client.take_all()
    client.open(welcome(epoch="E2", last_seq=3), snapshot(3, "E2", "no_such_session"))
    client.take_all()
    client.wake()
    assert client.sent == [{"type": "ack", "seq": 3}]


def test_nothing_is_acknowledged_while_a_snapshot_is_awaited(client: Client) -> None:
    """The gateway has not said yet in which epoch its next numbers are."""
    client.receive(token(200, first_seq=1))
    client.open(welcome(epoch="E2", last_seq=900))
    client.take_all()
    assert client.sent == []
    assert client.state.next_wake is None


def test_last_words_acknowledge_what_is_owed(client: Client) -> None:
    """A socket that this side closes is acknowledged to first."""
    client.receive(token(1))
    client.take_all()
    client.perform(client.state.leave(client.now))
    client.perform(client.state.leave(client.now))
    assert client.sent == [{"type": "ack", "seq": 1}]


# ---------------------------------------------------------------------- up


def test_messages_wait_for_the_welcome() -> None:
    """What is sent before there is a socket goes out with the first, in order."""
    client = Client()
    client.submit("a")
    client.submit("b")
    client.open()
    assert client.sent == []
    client.receive(welcome())
    assert [message["id"] for message in client.sent] == ["a", "b"]


def test_unanswered_are_sent_again_under_their_ids_and_in_order(client: Client) -> None:
    """A new socket gets every message without an answer, and no other."""
    for message_id in "abc":
        client.submit(message_id)
    client.receive(ack("b"))
    client.open(welcome(resumed=True))
    assert [message["id"] for message in client.sent] == ["a", "c"]
    client.receive(ack("a", "t9", "duplicate"))
    assert client.answers["a"] == Accepted("a", "t9", duplicate=True)


def test_answer_to_a_withdrawn_message_is_ignored(client: Client) -> None:
    """Nobody waits any more: it is neither sent again nor answered."""
    client.submit("a")
    client.state.withdraw("a")
    client.receive(ack("a"), nack("a", "X"), nack(None, "X"))
    client.open(welcome(resumed=True))
    assert client.sent == []
    assert client.answers == {}


def test_refusal_is_an_answer(client: Client) -> None:
    """A nack that is not retryable ends the message."""
    client.submit("a")
    client.receive(nack("a", "ALREADY_DECIDED"))
    assert isinstance(client.answers["a"], MessageRefused)
    assert client.state.unanswered == 0


def test_retryable_refusal_is_sent_again_after_a_pause(client: Client) -> None:
    """The pause doubles, and is never shorter than the gateway asks for."""
    client.submit("a")
    times = []
    for retry_after in (None, None, 7.0, None):
        client.sent.clear()
        extra = {} if retry_after is None else {"retry_after_s": retry_after}
        client.receive(nack("a", "QUEUE_FULL", retryable=True, **extra))
        before = client.now
        client.wake()
        times.append(client.now - before)
        assert [message["id"] for message in client.sent] == ["a"]
    assert times == [0.5, 1.0, 7.0, 4.0]
    client.receive(ack("a"))
    assert isinstance(client.answers["a"], Accepted)


def test_message_is_not_sent_again_into_another_epoch(client: Client) -> None:
    """The gateway has forgotten the ids of the old epoch: again could be twice."""
    client.submit("a")
    client.open(welcome(epoch="E2"), snapshot(0, "E2", "epoch_changed"))
    assert client.sent == []
    assert isinstance(client.answers["a"], OutcomeUnknown)


def test_message_that_never_went_out_is_sent_into_another_epoch(client: Client) -> None:
    """What was not sent yet cannot have been done."""
    client.state.closed()
    client.submit("a")
    client.open(welcome(epoch="E2"), snapshot(0, "E2", "epoch_changed"))
    assert [message["id"] for message in client.sent] == ["a"]


def test_message_is_not_sent_again_when_its_id_may_be_forgotten(client: Client) -> None:
    """Past nine tenths of the dedupe window since it was first sent, it is not sent again."""
    client.submit("a")
    client.now = WINDOW * 0.89
    client.open(welcome(resumed=True))
    assert len(client.sent) == 1
    client.now = WINDOW * 0.91
    client.open(welcome(resumed=True))
    assert client.sent == []
    assert isinstance(client.answers["a"], OutcomeUnknown)


def test_id_that_waits_cannot_be_used_twice(client: Client) -> None:
    """Two messages of one id would be one to the gateway."""
    client.submit("a")
    with pytest.raises(ValueError, match="waiting"):
        client.submit("a")


def test_tokens_and_draining_are_passed_on(client: Client) -> None:
    """What the shell has to do is said; a token that was refused is not a message's answer."""
    client.receive(
        {"type": "token_expiring", "in_s": 30},
        {"type": "draining", "reconnect_after_ms": 250},
        {"type": "authenticated", "expires_at": 1},
        {"type": "of a later version"},
    )
    assert client.others[1:] == [RenewToken(30.0), LeaveSoon(0.25)]
    client.perform(client.state.authenticate("r1", "secret"))
    assert client.sent == [{"type": "authenticate", "id": "r1", "token": "secret"}]
    client.receive(nack("r1", "INVALID_TOKEN"))
    assert client.answers == {}
    client.state.closed()
    assert client.state.authenticate("r2", "secret") == []


# ---------------------------------------------------------------------- all of it, by Hypothesis


class GatewayModel(RuleBasedStateMachine):
    """A gateway that is right, on a network that is not, and at times one that is wrong.

    What the client was given is compared with what the gateway's log says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.epoch = 1
        self.first_seq = 1
        self.log: dict[tuple[str, int], str] = {}
        self.last_seq = 0
        self.queue: list[Fields] = []
        """On the wire to the client, of the socket that is open."""
        self.is_open = False
        self.given = 0
        self.ledger: dict[str, str] = {}
        self.work_done: list[str] = []
        self.read_up = 0
        self.next_id = 0
        self.started_at: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """The current epoch."""
        return f"E{self.epoch}"

    # -- the gateway

    def _append(self, text: str) -> None:
        self.last_seq += 1
        self.log[self.name, self.last_seq] = text

    def _send_after(self, seq: int, *, merge: bool) -> None:
        events = [(number, self.log[self.name, number]) for number in range(seq + 1, self.last_seq + 1)]
        if merge and len(events) > 1:
            middle = len(events) // 2
            for part in (events[:middle], events[middle:]):
                joined = "".join(text for _, text in part)
                self.queue.append(token(part[-1][0], joined, first_seq=part[0][0]))
        else:
            self.queue += [token(number, text) for number, text in events]
        self.given = self.last_seq

    @precondition(lambda self: self.is_open)
    @rule(count=st.integers(1, 5), merge=st.booleans())
    def stream(self, count: int, merge: bool) -> None:
        """The agent says something."""
        for _ in range(count):
            self._append(f"{self.name}.{self.last_seq + 1} ")
        self._send_after(self.given, merge=merge)

    @rule(count=st.integers(1, 3))
    def stream_unseen(self, count: int) -> None:
        """The agent says something while nobody listens."""
        if not self.is_open:
            for _ in range(count):
                self._append(f"{self.name}.{self.last_seq + 1} ")

    @rule()
    def trim(self) -> None:
        """The gateway drops what it held."""
        self.first_seq = self.last_seq + 1
        if self.is_open and self.given < self.last_seq:
            self.queue.append(snapshot(self.last_seq, self.name))
            self.given = self.last_seq

    @rule()
    def lose_the_store(self) -> None:
        """The gateway begins a new epoch, and has forgotten every id."""
        self._cut()
        self.epoch += 1
        self.last_seq = 0
        self.first_seq = 1
        self.ledger.clear()

    @precondition(lambda self: not self.is_open)
    @rule(merge=st.booleans(), seconds=st.sampled_from([0.0, 1.0, 400.0]))
    def connect(self, merge: bool, seconds: float) -> None:
        """A socket is opened."""
        self.client.now += seconds
        asked = self.client.open()
        self.read_up = 0
        self.is_open = True
        self.queue.clear()
        can_resume = (
            asked is not None
            and asked.epoch == self.name
            and self.first_seq - 1 <= asked.last_seq <= self.last_seq
        )
        self.queue.append(welcome(epoch=self.name, last_seq=self.last_seq, resumed=can_resume))
        if asked is None:
            self.given = self.last_seq
        elif can_resume:
            self._send_after(asked.last_seq, merge=merge)
        else:
            reason = "trimmed" if asked.epoch == self.name else "epoch_changed"
            self.queue.append(snapshot(self.last_seq, self.name, reason))
            self.given = self.last_seq

    @precondition(lambda self: self.is_open)
    @rule(lost=st.integers(0, 3))
    def read_messages(self, lost: int) -> None:
        """The gateway reads what the client sent on this socket, but for the last few."""
        upto = max(self.read_up, len(self.client.sent) - lost)
        for message in self.client.sent[self.read_up : upto]:
            if message["type"] == "ack":
                assert message["seq"] <= self.given, "acknowledged what was not sent"
            elif message["id"] in self.ledger:
                self.queue.append(ack(message["id"], self.ledger[message["id"]], "duplicate"))
            else:
                self.work_done.append(message["id"])
                self.ledger[message["id"]] = f"turn of {message['id']}"
                self.queue.append(ack(message["id"], self.ledger[message["id"]]))
        self.read_up = upto

    # -- the network

    @precondition(lambda self: self.is_open and self.queue)
    @rule(count=st.integers(1, 6), as_batch=st.booleans())
    def arrive(self, count: int, as_batch: bool) -> None:
        """Frames reach the client."""
        arriving, self.queue = self.queue[:count], self.queue[count:]
        if as_batch:
            self.client.receive(*arriving)
        else:
            for fields in arriving:
                self.client.receive(fields)
        assert self.client.broken is None, f"a right gateway was broken off: {self.client.broken}"

    @precondition(lambda self: self.is_open and len(self.queue) > 1 and self.client.state.is_live)
    @rule(kind=st.sampled_from(["repeat", "swap", "drop"]), at=st.integers(0, 20))
    def garble(self, kind: str, at: int) -> None:
        """A wrong gateway repeats, swaps or leaves out an event; then the connection is lost."""
        index = at % (len(self.queue) - 1)
        if kind == "repeat":
            self.queue.insert(index, self.queue[index])
        elif kind == "swap":
            self.queue[index], self.queue[index + 1] = self.queue[index + 1], self.queue[index]
        elif "seq" in self.queue[index]:
            del self.queue[index]
        self.client.receive(*self.queue)
        self._cut()

    @precondition(lambda self: self.is_open)
    @rule()
    def cut(self) -> None:
        """The connection is lost, with what was on it."""
        self._cut()

    def _cut(self) -> None:
        self.is_open = False
        self.queue.clear()
        self.client.state.closed()

    # -- the application

    @rule()
    def submit(self) -> None:
        """The application sends a message."""
        self.next_id += 1
        self.client.submit(f"m{self.next_id}")

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def take(self, seconds: float) -> None:
        """The application takes its events, and time passes."""
        self.client.take_all()
        self.client.now += seconds
        self.client.perform(self.client.state.wake(self.client.now))

    # -- what must hold

    @invariant()
    def each_event_once_in_order_and_no_silent_gap(self) -> None:
        """What was delivered is what the log says, joined without overlap or gap but at snapshots."""
        before: SessionEvent | None = None
        for event in self.client.delivered:
            if event.type != "snapshot":
                said = "".join(
                    self.log[event.epoch, number] for number in range(event.first_seq, event.seq + 1)
                )
                assert event.token == said
                if before is not None:
                    assert (event.epoch, event.first_seq) == (before.epoch, before.seq + 1)
            before = event

    @invariant()
    def each_message_done_at_most_once(self) -> None:
        """No id was carried out twice, over any number of sockets and epochs."""
        assert len(self.work_done) == len(set(self.work_done))

    @invariant()
    def what_is_said_to_be_accepted_was_done(self) -> None:
        """An ``Accepted`` names the turn of work that was done."""
        for message_id, answer in self.client.answers.items():
            if isinstance(answer, Accepted):
                assert message_id in self.work_done
                assert answer.turn_id == f"turn of {message_id}"
            else:
                assert isinstance(answer, OutcomeUnknown)

    def teardown(self) -> None:
        """Once the network is good, everything arrives and everything is answered."""
        self._cut()
        self.connect(merge=True, seconds=0.0)
        for _ in range(4):
            while self.queue:
                self.arrive(count=6, as_batch=True)
            self.read_messages(lost=0)
        assert self.client.state.position == ResumePoint(self.name, self.last_seq)
        assert self.client.state.unanswered == 0
        self.each_event_once_in_order_and_no_silent_gap()
        self.each_message_done_at_most_once()
        super().teardown()


GatewayModel.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestGatewayModel = GatewayModel.TestCase

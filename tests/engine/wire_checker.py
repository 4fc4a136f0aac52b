"""What the wire protocol promises a client, checked frame by frame. Knows nothing of the implementation.

Every token that the scripted agent emits is its own name, ``"<turn>.<number>;"``, so that whatever was lost,
repeated, reordered or put into the wrong turn can be read off the text.
"""

from __future__ import annotations

import re
from typing import Any

import orjson
from attrs import Factory, define

V1_TYPES = {"assistant_message", "tool_call", "agent_switched", "error", "ack"}
"""What the scripted agent and the gateway may send to v1 (protocol.md section 2)."""
_TOKEN = re.compile(r"(\d+)\.(\d+);")


def token_names(text: str) -> list[tuple[int, int]]:
    """The tokens that a text is made of; fails when it is not made of whole tokens."""
    names = [(int(turn), int(number)) for turn, number in _TOKEN.findall(text)]
    assert "".join(f"{turn}.{number};" for turn, number in names) == text, f"broken text {text!r}"
    return names


@define
class Facts:
    """What all parties together have seen; the places where their stories have to agree."""

    durable: bool
    turn_numbers: dict[str, int] = Factory(dict)
    """The agent's number of each turn, by its id: the first part of its tokens' names."""
    finished: dict[int, int] = Factory(dict)
    """How many tokens the agent had emitted when it finished a turn, by the turn's number."""
    log: dict[tuple[str, int], object] = Factory(dict)
    """Every event that anybody was shown, by epoch and seq."""
    outcomes: dict[str, str] = Factory(dict)
    answers: dict[str, str] = Factory(dict)
    """The turn that a client message became, by its id."""
    accepted: dict[str, int] = Factory(dict)
    decided: dict[str, str] = Factory(dict)
    """The one decision of each call, as told by ``approval_resolved``."""
    lives: int = 0
    """How often the gateway was started."""

    def key(self, name: str) -> str:
        """What ``name`` stands for: with a store the same in every life of the gateway."""
        return name if self.durable else f"{self.lives}:{name}"

    def show(self, epoch: str, seq: int, content: object) -> None:
        """Somebody saw this event."""
        known = self.log.setdefault((epoch, seq), content)
        assert known == content, f"two events are {seq} of {epoch}: {known} and {content}"


class V2Checker:
    """One v2 client: what it has, and whether what comes next is what must come next."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.epoch: str | None = None
        self.seq = 0
        self.turn: str | None = None
        """The turn that runs, as far as this client knows."""
        self.known: dict[str, int] = {}
        """How many tokens of a turn this client has, where it saw the start or was told."""
        self.ended: set[str] = set()
        self.calls: set[str] = set()
        """Calls that this client was told of already."""
        self.snapshots: list[str] = []
        self.resume: tuple[str, int] | None = None
        self._expected = "welcome"

    def connected(self, resume: tuple[str, int] | None) -> None:
        """A new socket, with the resume point that was given on its URL."""
        self.resume = resume
        self._expected = "welcome"

    def see(self, item: dict[str, Any]) -> None:
        """The next object."""
        kind = item["type"]
        if self._expected:
            assert kind == self._expected, f"{self._expected} was due, {kind} came"
            self._expected = ""
        if kind == "welcome":
            self._welcome(item)
        elif kind == "snapshot":
            self._snapshot(item)
        elif kind == "ack":
            self._ack(item)
        elif "seq" in item:
            self._event(item)
        else:
            assert kind == "nack", f"unknown {item}"
            assert item["code"] in {"QUEUE_FULL", "ALREADY_DECIDED", "NO_SUCH_TURN", "STORE_UNAVAILABLE"}

    def _welcome(self, item: dict[str, Any]) -> None:
        if self.resume is None:
            assert item["resumed"] is False
            self._begin(item, item["last_seq"])
            return
        epoch, seq = self.resume
        held = item["first_seq"] - 1 <= seq <= item["last_seq"]
        assert item["resumed"] is (item["epoch"] == epoch and held), f"{item} for {self.resume}"
        if not item["resumed"]:
            self._expected = "snapshot"

    def _snapshot(self, item: dict[str, Any]) -> None:
        assert item["reason"] in {"trimmed", "epoch_changed", "no_such_session"}
        if item["epoch"] == self.epoch and item["reason"] == "trimmed":
            assert item["seq"] > self.seq, "a snapshot that was not needed"
        self.snapshots.append(item["reason"])
        self._begin(item, item["seq"])
        names = token_names(item["text"])
        if item["turn"]["state"] == "running":
            number = self.facts.turn_numbers.get(item["turn"]["id"])
            assert names == [(number, index) for index in range(len(names))], "not the answer so far"
            self.known[item["turn"]["id"]] = len(names)
        else:
            assert not names

    def _begin(self, item: dict[str, Any], seq: int) -> None:
        self.epoch, self.seq = item["epoch"], seq
        self.turn = item["turn"]["id"] if item["turn"]["state"] == "running" else None
        self.known.clear()
        self.calls = {call["call_id"] for call in item["pending"]}

    def _event(self, item: dict[str, Any]) -> None:
        assert self.epoch is not None
        seq, first = item["seq"], item.get("first_seq", item["seq"])
        assert first == self.seq + 1, f"after {self.seq} came {first} to {seq} of {self.epoch}"
        assert seq >= first
        self.seq = seq
        kind = item["type"]
        if kind == "assistant_message":
            names = token_names(item["token"])
            assert len(names) == seq - first + 1, "a merged event stands for other seqs than its tokens"
            for at, name in enumerate(names, first):
                self.facts.show(self.epoch, at, name)
                self._token(*name)
            return
        assert first == seq
        self.facts.show(self.epoch, seq, {key: value for key, value in item.items() if key != "seq"})
        if kind == "turn_started":
            assert self.turn is None, "two turns at a time"
            assert item["turn_id"] not in self.ended
            self.turn = item["turn_id"]
            self.known[item["turn_id"]] = 0
        elif kind == "turn_ended":
            self._turn_ended(item)
        elif kind == "approval_resolved":
            known = self.facts.decided.setdefault(self.facts.key(item["call_id"]), item["decision"])
            assert known == item["decision"], "two decisions"
        elif kind == "tool_call":
            assert item["call_id"] not in self.calls, "a call came after it was told of"
            self.calls.add(item["call_id"])

    def _token(self, turn: int, number: int) -> None:
        assert self.turn is not None, f"token {turn}.{number} outside of any turn"
        assert self.facts.turn_numbers[self.turn] == turn, "a token of another turn"
        expected = self.known.get(self.turn, number)
        assert number == expected, f"token {turn}.{number} where {turn}.{expected} was due"
        self.known[self.turn] = number + 1

    def _turn_ended(self, item: dict[str, Any]) -> None:
        turn_id = item["turn_id"]
        assert turn_id not in self.ended, "a turn ended twice"
        self.ended.add(turn_id)
        outcome = self.facts.outcomes.setdefault(turn_id, item["outcome"])
        assert outcome == item["outcome"]
        number = self.facts.turn_numbers.get(turn_id)
        if item["outcome"] == "completed":
            assert number is not None, "completed without a POST"
            if turn_id in self.known:
                assert self.known[turn_id] == self.facts.finished[number], "the end of the answer is missing"
        if self.turn == turn_id:
            self.turn = None

    def _ack(self, item: dict[str, Any]) -> None:
        facts, key = self.facts, self.facts.key(item["id"])
        if item["status"] == "accepted":
            facts.accepted[key] = facts.accepted.get(key, 0) + 1
            assert facts.accepted[key] == 1, f"{key} was accepted twice"
        if "turn_id" in item:
            assert facts.answers.setdefault(key, item["turn_id"]) == item["turn_id"]


class V1Checker:
    """One v1 client over all of its sockets."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.seen: set[tuple[int, int]] = set()
        self.newest: tuple[int, int] | None = None
        self.snapshots: list[str] = []
        self.may_miss = True
        """Whether the next token may follow a gap: nobody could know what had arrived, or it was said."""

    def see(self, item: dict[str, Any]) -> None:
        """The next message."""
        kind = item["type"]
        assert kind in V1_TYPES, f"v1 clients draw a bubble for {kind}"
        assert "seq" not in item
        assert "first_seq" not in item
        if kind == "error":
            assert item["error"] == item["content"]
            self.may_miss |= item["code"] == "REPLAY_TRUNCATED"
        if kind == "assistant_message":
            for name in token_names(item["token"]):
                self._token(name)

    def _token(self, name: tuple[int, int]) -> None:
        assert name not in self.seen, f"v1 got {name} twice"
        assert self.newest is None or name > self.newest, f"v1 got {name} after {self.newest}"
        if not self.may_miss and self.newest is not None:
            turn, number = self.newest
            if name[0] == turn:
                assert name[1] == number + 1, f"v1 got {name} after {self.newest}"
            else:
                assert name[1] == 0, f"v1 missed the beginning of {name}"
                self.complete_until(name[0])
        self.seen.add(name)
        self.newest, self.may_miss = name, False

    def complete_until(self, turn: int) -> None:
        """Every turn that completed before ``turn`` must be here whole, from the newest token on."""
        if self.newest is None or self.may_miss:
            return
        numbers = {number: turn_id for turn_id, number in self.facts.turn_numbers.items()}
        at, number = self.newest
        for between in range(at, turn):
            count = self.facts.finished.get(between, 0)
            if self.facts.outcomes.get(numbers[between]) == "completed" and count:
                assert between == at, f"v1 missed turn {between}"
                assert number + 1 == count, f"v1 missed the end of turn {between}"


def message_key(body: bytes) -> str:
    """What a message to the agent is about: the same for each repeat of it, and for nothing else."""
    message = orjson.loads(body)
    if message["type"] == "hitl_decision":
        return f"decision:{message['call_id']}"
    return f"{message['type']}:{message.get('content', message.get('result'))}"

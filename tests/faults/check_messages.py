"""What clients said: posted once if it was acknowledged, in order, and every call decided by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.faults.agent_runtime import Post
from tests.faults.check_delivery import Timeline
from tests.faults.check_turns import Turn
from tests.faults.records import ClientRecord, Sent, SessionRecord
from tests.faults.violations import Violation, shorten


def _id_of(message: dict[str, Any]) -> str:
    return str(message.get("id") or message.get("message_id"))


def check_messages(
    session: SessionRecord, turns: dict[str, Turn], posts: Sequence[Post]
) -> Iterator[Violation]:
    """Every message of every client against the runtime's record and the log."""
    asked: dict[str, list[Post]] = {}
    for post in posts:
        asked.setdefault(_id_of(post.message), []).append(post)
    known: set[str] = set()
    for client in session.clients:
        known.update(client.sent)
        for sent in client.sent.values():
            yield from _check_message(session, client, sent, turns, asked.get(sent.message_id, []))
        yield from _check_order(session, client, turns, asked)
    yield from _check_cancelled(session, turns)
    for message_id in asked.keys() - known:
        yield Violation("protocol", session.session_id, "runtime", f"{message_id} was said by nobody")


def _check_message(
    session: SessionRecord, client: ClientRecord, sent: Sent, turns: dict[str, Turn], posts: list[Post]
) -> Iterator[Violation]:
    def found(rule: str, what: str) -> Violation:
        return Violation(rule, session.session_id, client.name, f"{what}: {shorten(sent.body)}")

    keys = {post.key for post in posts}
    if len(keys) > 1:
        yield found("repeated", f"became the turns {sorted(keys)}")
    expected = dict(sent.body)
    if expected["type"] == "user_message":
        expected.setdefault("role", "user")
    elif expected["type"] == "hitl_decision":
        expected["decision"] = expected["decision"].lower()
    for post in posts:
        if post.message != expected:
            yield found("protocol", f"was posted as {shorten(post.message)}")
    accepted = sent.accepted
    if client.is_v2 and len({answer.get("turn_id") for answer in accepted}) > 1:
        yield found("repeated", f"was answered {accepted}")
    if sum(answer.get("status") == "accepted" for answer in accepted) > 1:
        yield found("repeated", f"was accepted twice: {accepted}")
    if client.is_v2 and not sent.is_settled:
        yield found("stuck", "was never answered")
    if not accepted:
        if client.is_v2 and posts and any(not answer.get("retryable") for answer in sent.answers):
            yield found("protocol", f"was refused ({sent.answers}) and posted all the same")
        return
    turn_id = accepted[0].get("turn_id")
    if sent.body["type"] == "cancel":
        if client.is_v2 and (turn_id not in turns or turns[turn_id].outcome != "cancelled"):
            yield found("turns", f"was accepted for {turn_id}, which is {turns.get(turn_id or '')}")
        return
    if client.is_v2:
        if turn_id not in turns:
            yield found("lost", f"was accepted as turn {turn_id}, which is not in the log")
            return
        if not keys <= {turn_id}:
            yield found("repeated", f"was accepted as turn {turn_id} and posted as {sorted(keys)}")
        if turns[turn_id].started and turns[turn_id].message_id != sent.message_id:
            yield found("turns", f"its turn names {turns[turn_id].message_id}")
        if not posts and turns[turn_id].outcome == "completed":
            yield found("lost", "completed without having been posted")
    elif not posts and _unposted(turns, {post.key for post in posts}) == 0:
        yield found("lost", "was acknowledged and never posted")


def _check_cancelled(session: SessionRecord, turns: dict[str, Turn]) -> Iterator[Violation]:
    """No turn is cancelled that nobody wanted cancelled. Of a v1 cancel nobody can say which turn it met."""
    cancels = [
        (client.is_v2, sent)
        for client in session.clients
        for sent in client.sent.values()
        if sent.body["type"] == "cancel"
    ]
    if session.napped or not all(is_v2 for is_v2, _ in cancels):
        return
    asked = {answer.get("turn_id") for _, sent in cancels for answer in sent.accepted}
    for turn in turns.values():
        if turn.outcome == "cancelled" and turn.turn_id not in asked:
            yield Violation("lost", session.session_id, f"turn {turn.turn_id}", "cancelled by nobody")


def _unposted(turns: dict[str, Turn], posted: set[str]) -> int:
    """Turns that ended without a POST, as a cancel or a crash may have it; v1 is not told which is whose."""
    return sum(turn.outcome != "completed" for turn in turns.values() if turn.turn_id not in posted)


def _check_order(
    session: SessionRecord, client: ClientRecord, turns: dict[str, Turn], asked: dict[str, list[Post]]
) -> Iterator[Violation]:
    """User messages of one client are posted in the order they were said, but for those refused at first."""
    last = -1.0
    for sent in client.sent.values():
        if sent.body["type"] != "user_message" or any(answer["type"] != "ack" for answer in sent.answers):
            continue
        posts = asked.get(sent.message_id)
        if not posts or posts[0].key not in turns or not turns[posts[0].key].was_heard:
            continue
        if posts[0].time < last:
            text = f"was posted before what was said before it: {shorten(sent.body)}"
            yield Violation("reordered", session.session_id, client.name, text)
        last = posts[0].time


def check_decisions(session: SessionRecord, timeline: Timeline, posts: Sequence[Post]) -> Iterator[Violation]:
    """One winner for each call, told to all."""
    resolved: dict[str, list[str]] = {}
    for single in timeline.values():
        if single.fields["type"] == "approval_resolved":
            resolved.setdefault(single.fields["call_id"], []).append(single.fields["decision"])
    asked: dict[str, dict[str, str]] = {}
    for post in posts:
        if post.message["type"] == "hitl_decision":
            deciders = asked.setdefault(post.message["call_id"], {})
            deciders[_id_of(post.message)] = post.message["decision"]
    winners: dict[str, dict[str, str]] = {}
    for client in session.clients:
        for sent in client.sent.values():
            if sent.body["type"] == "hitl_decision" and sent.accepted:
                decision = sent.body["decision"].lower()
                winners.setdefault(sent.body["call_id"], {})[sent.message_id] = decision
    for call_id in resolved.keys() | asked.keys() | winners.keys():
        accepted, posted = winners.get(call_id, {}), asked.get(call_id, {})
        decided = resolved.get(call_id, [])
        if len(decided) != 1 or len(accepted) > 1 or len(posted) > 1:
            text = f"call {call_id}: resolved {decided}, accepted {accepted}, posted {posted}"
            yield Violation("decisions", session.session_id, "log", text)
        elif not {*accepted.values(), *posted.values()} <= set(decided):
            text = f"call {call_id} is resolved {decided}, but accepted {accepted}, posted {posted}"
            yield Violation("decisions", session.session_id, "log", text)

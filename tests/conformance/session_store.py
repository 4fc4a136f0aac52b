"""The contract of ``ports.SessionStore``, as one suite that every store has to pass.

A store's test module subclasses ``SessionStoreConformance`` and gives it a fixture ``place`` that says how
to open the store; a durable one is opened several times at the same place.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
import trio
from attrs import define, evolve
from msgspec.structs import replace

from gateway.core.events import Event, EventKind
from gateway.core.storage import (
    NOBODY,
    CommitRefused,
    Decision,
    LedgerEntry,
    PendingCall,
    QueuedMessage,
    SessionCommit,
    SessionRecord,
    StoredSession,
    TurnState,
)
from gateway.ports import Clock, SessionStore, Telemetry

DEDUPE_WINDOW = 100.0


class MaintainedStore(SessionStore, Protocol):
    """A store with what housekeeping needs besides the port."""

    @property
    def held_bytes(self) -> int:
        """Bytes held."""
        ...

    async def expire(self, before: float, *, keep: Collection[str] = ()) -> int:
        """Drop old sessions, except some."""
        ...

    async def maintain(self) -> None:
        """Tidy up."""
        ...


class StorePlace(Protocol):
    """Where a store keeps things: opening it again gives what a durable store kept."""

    clock: SettableClock

    def open(self) -> AbstractAsyncContextManager[MaintainedStore]:
        """Open the store."""
        ...


@define
class SettableClock(Clock):
    """A clock that stands until it is set."""

    seconds: float = 1_000.0

    def now(self) -> float:
        """The time it was set to."""
        return self.seconds


class RecordingTelemetry(Telemetry):
    """Keeps the names and fields of what was logged as a warning or an error."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, object]]] = []

    def debug(self, event: str, **fields: object) -> None:
        """Drop it."""

    def info(self, event: str, **fields: object) -> None:
        """Keep it."""
        self.said.append((event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Keep it."""
        self.said.append((event, fields))

    def error(self, event: str, *, cause: BaseException | None = None, **fields: object) -> None:
        """Keep it."""
        self.said.append((event, {"cause": cause, **fields}))

    def count(self, metric: str, amount: float = 1, **labels: str) -> None:
        """Drop it."""

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Drop it."""

    def set_gauge(self, metric: str, value: float, **labels: str) -> None:
        """Drop it."""

    def events(self) -> list[str]:
        """The names of what was said, in order."""
        return [event for event, _ in self.said]


def events(first: int, last: int, size: int = 10) -> tuple[Event, ...]:
    """Events of every kind, each different from all others."""
    return tuple(
        Event(seq, EventKind(seq % 4), b'{"n":%d,"fill":"%s"}' % (seq, b"x" * size))
        for seq in range(first, last + 1)
    )


def message(turn_id: str, message_id: str | None = "m") -> QueuedMessage:
    """A queued message."""
    return QueuedMessage(
        turn_id=turn_id,
        message_id=message_id,
        overtakes=False,
        body=b'{"type":"user_message","content":"%s"}' % turn_id.encode(),
        subject="ada",
        request_id="r",
        accepted_at=1.0,
    )


def entry(message_id: str, accepted_at: float = 1.0) -> LedgerEntry:
    """A line of the ledger."""
    return LedgerEntry(message_id, f"turn of {message_id}", accepted_at)


RECORD = SessionRecord(
    epoch="e1",
    touched_at=50.0,
    turn_id="t1",
    turn_state=TurnState.RUNNING,
    turn_first_seq=1,
    turn_message=message("t1"),
    resumable=True,
    unsent=True,
    pending=(PendingCall("c1", True, b'{"type":"tool_call"}'),),
    text_prefix="so far",
)
EVERYTHING = SessionCommit(
    "s",
    record=RECORD,
    events=events(1, 5),
    last_event_id="id-5",
    queued=(message("t2"), message("t3")),
    ledger=(entry("m1"), entry("m2")),
    decisions=(Decision("c0", "approve", 1.0),),
)


async def held(store: SessionStore, session_id: str = "s") -> StoredSession:
    """What the store holds of a session that it knows."""
    found = await store.load(session_id)
    assert found is not None
    return found


def numbered_commit(session_id: str, number: int) -> SessionCommit:
    """The ``number``-th commit (from 1) of a session, which changes something of everything.

    Whether a store holds a whole number of them is told by comparing with ``after_commits``.
    """
    per_commit = 3
    return SessionCommit(
        session_id,
        record=SessionRecord(epoch="e", touched_at=float(number), text_prefix=f"prefix {number}"),
        events=events((number - 1) * per_commit + 1, number * per_commit, size=number % 700),
        last_event_id=f"id {number}" if number % 2 else None,
        queued=(message(f"turn {number}"),),
        dequeued=(f"turn {number - 2}",),
        ledger=(entry(f"m {number}", float(number)),),
        decisions=(Decision(f"call {number}", "reject", float(number)),) if number % 5 == 0 else (),
        trimmed_to=(number - 4) * per_commit - 1 if number > 5 else None,
    )


async def after_commits(model: MaintainedStore, session_id: str, count: int) -> StoredSession:
    """What a store must hold after the first ``count`` numbered commits."""
    await model.claim(session_id, "ada", 1.0)
    await model.commit([numbered_commit(session_id, number) for number in range(1, count + 1)])
    return await held(model, session_id)


class SessionStoreConformance:
    """Every clause of the port's contract. Subclass it with a fixture ``place``."""

    # ------------------------------------------------------------------ ownership

    async def test_an_unknown_session_has_neither_owner_nor_state(self, place: StorePlace) -> None:
        """Of a session that was never claimed nothing is said."""
        async with place.open() as store:
            assert await store.owner("s") is None
            assert await store.load("s") is None

    async def test_the_first_to_claim_a_session_owns_it(self, place: StorePlace) -> None:
        """A later claim by another subject gets the first one's name and changes nothing."""
        async with place.open() as store:
            assert await store.claim("s", "ada", 1.0) == "ada"
            assert await store.claim("s", "bob", 2.0) == "ada"
            assert await store.claim("s", "ada", 3.0) == "ada"
            assert await store.owner("s") == "ada"

    async def test_two_claims_at_once_have_one_winner(self, place: StorePlace) -> None:
        """Whoever wins, all are told the same name."""
        async with place.open() as store:
            for attempt in range(20):
                told: list[str] = []

                async def claim(subject: str, session_id: str, told: list[str] = told) -> None:
                    told.append(await store.claim(session_id, subject, 1.0))

                async with trio.open_nursery() as nursery:
                    for subject in ("ada", "bob", "eve"):
                        nursery.start_soon(claim, subject, f"s{attempt}")

                assert len(told) == 3
                assert set(told) == {await store.owner(f"s{attempt}")}

    async def test_a_session_can_be_known_and_nobodys(self, place: StorePlace) -> None:
        """Claimed for nobody it takes commits and has no owner; the first subject to claim it owns it."""
        async with place.open() as store:
            assert await store.claim("s", NOBODY, 1.0) == NOBODY
            await store.commit([EVERYTHING])
            assert await store.owner("s") is None
            assert await store.sessions_of(NOBODY) == frozenset()
            before = await held(store)
            assert before.owner == NOBODY

            assert await store.claim("s", NOBODY, 2.0) == NOBODY
            assert await store.claim("s", "ada", 3.0) == "ada"
            assert await store.claim("s", NOBODY, 4.0) == "ada"
            assert await store.claim("s", "bob", 5.0) == "ada"
            assert await store.owner("s") == "ada"
            assert await store.sessions_of("ada") == {"s"}
            assert await held(store) == evolve(before, owner="ada")

    async def test_a_claimed_session_is_empty(self, place: StorePlace) -> None:
        """A session that was only claimed has an owner and nothing else."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)

            assert await held(store) == StoredSession("s", "ada", None, first_seq=1, last_seq=0)

    async def test_sessions_of_lists_a_subjects_own(self, place: StorePlace) -> None:
        """Each subject's sessions, no one else's, and none for a stranger."""
        async with place.open() as store:
            for session_id, subject in (("a", "ada"), ("b", "bob"), ("c", "ada")):
                await store.claim(session_id, subject, 1.0)

            assert await store.sessions_of("ada") == {"a", "c"}
            assert await store.sessions_of("bob") == {"b"}
            assert await store.sessions_of("eve") == frozenset()

    # ------------------------------------------------------------------ what a commit changes

    async def test_everything_committed_is_loaded(self, place: StorePlace) -> None:
        """One commit with every field: load gives all of it back."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])

            assert await held(store) == StoredSession(
                session_id="s",
                owner="ada",
                record=RECORD,
                first_seq=1,
                last_seq=5,
                events=events(1, 5),
                last_event_id="id-5",
                queue=(message("t2"), message("t3")),
                ledger=(entry("m1"), entry("m2")),
                decisions=(Decision("c0", "approve", 1.0),),
            )

    async def test_an_empty_commit_changes_nothing(self, place: StorePlace) -> None:
        """Empty fields mean unchanged."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            before = await held(store)
            await store.commit([SessionCommit("s")])
            await store.commit([])

            assert await held(store) == before

    async def test_events_are_appended_in_order_over_many_commits(self, place: StorePlace) -> None:
        """Commits of one and of several events, one or more of them in a call, make one log."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", events=events(1, 1))])
            await store.commit([SessionCommit("s", events=events(2, 4))])
            await store.commit([SessionCommit("s", events=events(n, n)) for n in range(5, 200)])

            found = await held(store)
            assert found.events == events(1, 199)
            assert (found.first_seq, found.last_seq) == (1, 199)

    async def test_the_last_event_id_stays_until_another_comes(self, place: StorePlace) -> None:
        """None leaves it, an empty one replaces it, and it can come without events."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            seen = []
            for commit in (
                SessionCommit("s", events=events(1, 1), last_event_id="one"),
                SessionCommit("s", events=events(2, 2)),
                SessionCommit("s", last_event_id="two"),
                SessionCommit("s", events=events(3, 3), last_event_id=""),
            ):
                await store.commit([commit])
                seen.append((await held(store)).last_event_id)

            assert seen == ["one", "one", "two", ""]

    async def test_a_record_is_replaced_as_a_whole(self, place: StorePlace) -> None:
        """Nothing of the former record shines through."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", record=RECORD)])
            fresh = SessionRecord(epoch="e2", touched_at=60.0)
            await store.commit([SessionCommit("s", record=fresh)])

            assert (await held(store)).record == fresh

    async def test_the_queue_keeps_the_order_of_acceptance(self, place: StorePlace) -> None:
        """Messages leave from anywhere in the queue and join at its end."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", queued=(message("a"), message("b"), message("c")))])
            await store.commit([SessionCommit("s", queued=(message("d"),), dequeued=("b", "unheard of"))])
            assert (await held(store)).queue == (message("a"), message("c"), message("d"))

            await store.commit([SessionCommit("s", queued=(message("e"),), dequeued=("a", "c", "d", "e"))])
            assert (await held(store)).queue == ()

    async def test_the_ledger_forgets_what_is_older_than_the_window(self, place: StorePlace) -> None:
        """An entry goes when one arrives that is more than the dedupe window younger."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", ledger=(entry("a", 1.0), entry("b", 2.0)))])
            await store.commit([SessionCommit("s", ledger=(entry("c", 1.5 + DEDUPE_WINDOW),))])

            assert (await held(store)).ledger == (entry("b", 2.0), entry("c", 1.5 + DEDUPE_WINDOW))

    async def test_an_id_accepted_again_has_one_line_in_the_ledger(self, place: StorePlace) -> None:
        """The later entry replaces the earlier one and is the newest."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", ledger=(entry("a", 1.0), entry("b", 2.0)))])
            await store.commit([SessionCommit("s", ledger=(entry("a", 3.0),))])

            assert (await held(store)).ledger == (entry("b", 2.0), entry("a", 3.0))

    async def test_the_first_decision_on_a_call_stands(self, place: StorePlace) -> None:
        """A second decision on the same call is not taken over: one winner."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            first, other = Decision("c", "approve", 1.0), Decision("d", "edit", 1.0)
            await store.commit([SessionCommit("s", decisions=(first,))])
            await store.commit([SessionCommit("s", decisions=(Decision("c", "reject", 2.0), other))])

            assert (await held(store)).decisions == (first, other)

    # ------------------------------------------------------------------ trimming and reset

    async def test_trimmed_events_are_gone(self, place: StorePlace) -> None:
        """Also when the cut goes through the middle of what was committed at once."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", events=events(1, 10))])
            await store.commit([SessionCommit("s", events=events(11, 20))])
            for trimmed_to in (3, 10, 14, 9):
                await store.commit([SessionCommit("s", trimmed_to=trimmed_to)])
                await store.maintain()

            found = await held(store)
            assert found.events == events(15, 20)
            assert (found.first_seq, found.last_seq) == (15, 20)

    async def test_seqs_go_on_after_everything_was_trimmed(self, place: StorePlace) -> None:
        """Without events ``first_seq`` is one past ``last_seq``, and the next event takes it."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", events=events(1, 7), last_event_id="seven")])
            await store.commit([SessionCommit("s", trimmed_to=7)])
            found = await held(store)
            assert (found.first_seq, found.last_seq, found.events) == (8, 7, ())
            assert found.last_event_id == "seven"

            await store.commit([SessionCommit("s", events=events(8, 9), trimmed_to=8)])
            assert (await held(store)).events == events(9, 9)

    async def test_a_trim_beyond_the_end_spares_what_comes_later(self, place: StorePlace) -> None:
        """Only events that are there are dropped."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", events=events(1, 3), trimmed_to=1_000)])
            await store.commit([SessionCommit("s", events=events(4, 5))])

            assert (await held(store)).events == events(4, 5)

    async def test_a_reset_begins_a_new_epoch(self, place: StorePlace) -> None:
        """Events, queue, ledger and decisions go, seqs start at 1, then the rest applies."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            record = SessionRecord(epoch="e2", touched_at=70.0)
            await store.commit(
                [SessionCommit("s", reset=True, record=record, events=events(1, 2), ledger=(entry("new"),))]
            )

            assert await held(store) == StoredSession(
                "s", "ada", record, first_seq=1, last_seq=2, events=events(1, 2), ledger=(entry("new"),)
            )

    async def test_a_reset_alone_keeps_the_record(self, place: StorePlace) -> None:
        """What the contract does not say is dropped stays."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            await store.commit([SessionCommit("s", reset=True)])

            assert await held(store) == StoredSession("s", "ada", RECORD, first_seq=1, last_seq=0)

    async def test_one_call_may_reset_a_session_between_its_events(self, place: StorePlace) -> None:
        """Commits of one session in one call are applied in the order given, and stay so."""
        expected = StoredSession(
            "s", "ada", None, first_seq=1, last_seq=1, events=events(1, 1), queue=(message("t"),)
        )
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit(
                [
                    SessionCommit("s", events=events(1, 4), last_event_id="old"),
                    SessionCommit("s", reset=True),
                    SessionCommit("s", events=events(1, 2)),
                    SessionCommit("s", reset=True, queued=(message("t"),)),
                    SessionCommit("s", events=events(1, 1)),
                ]
            )
            assert await held(store) == expected
            for _ in range(2):
                place.clock.seconds += 60
                await store.maintain()
            assert await held(store) == expected
        if store.is_durable:
            async with place.open() as store:
                assert await held(store) == expected

    # ------------------------------------------------------------------ many sessions, bad commits

    async def test_sessions_in_one_call_do_not_mix(self, place: StorePlace) -> None:
        """Two sessions' commits, interleaved in one call and over calls, make two whole logs."""
        async with place.open() as store:
            for session_id in ("a", "b"):
                await store.claim(session_id, "ada", 1.0)
            for round_ in range(10):
                await store.commit(
                    [
                        SessionCommit(
                            session_id,
                            events=events(2 * round_ + half, 2 * round_ + half),
                            last_event_id=f"{session_id} {round_}",
                        )
                        for half in (1, 2)
                        for session_id in ("a", "b")
                    ]
                )

            for session_id in ("a", "b"):
                found = await held(store, session_id)
                assert found.events == events(1, 20)
                assert found.last_event_id == f"{session_id} 9"

    async def test_commits_from_two_tasks_interleave_whole(self, place: StorePlace) -> None:
        """Two tasks commit to a session each, at the same time: both are whole."""
        async with place.open() as store, trio.open_nursery() as nursery:

            async def write(session_id: str) -> None:
                await store.claim(session_id, "ada", 1.0)
                for number in range(1, 31):
                    await store.commit([numbered_commit(session_id, number)])

            nursery.start_soon(write, "a")
            nursery.start_soon(write, "b")

        if store.is_durable:
            async with place.open() as store:
                a, b = await held(store, "a"), await held(store, "b")
                assert evolve(b, session_id="a") == a
                assert a.last_seq == 90

    @pytest.mark.parametrize(
        "bad",
        [
            SessionCommit("bad", events=events(5, 6)),
            SessionCommit("bad", events=events(3, 4)),
            SessionCommit("bad", events=(*events(4, 4), *events(6, 6))),
            SessionCommit("bad", reset=True, events=events(4, 5)),
            SessionCommit("bad", events=events(4, 4), last_event_id="\ud800"),
            SessionCommit("bad", ledger=(entry("\ud800"),)),
            SessionCommit("bad", record=SessionRecord("\ud800", 1.0)),
        ],
        ids=["gap ahead", "repeated", "gap inside", "reset not at 1", "id", "ledger", "record"],
    )
    async def test_a_bad_commit_is_refused_alone(self, place: StorePlace, bad: SessionCommit) -> None:
        """The bad one and all after it of its session are refused; others in the same call are stored."""
        async with place.open() as store:
            for session_id in ("good", "bad"):
                await store.claim(session_id, "ada", 1.0)
            await store.commit([SessionCommit("bad", events=events(1, 2))])
            with pytest.raises(CommitRefused) as caught:
                await store.commit(
                    [
                        SessionCommit("good", events=events(1, 2), queued=(message("t"),)),
                        SessionCommit("bad", events=events(3, 3)),
                        bad,
                        SessionCommit("bad", events=events(4, 4)),
                        SessionCommit("good", events=events(3, 3)),
                    ]
                )

            assert set(caught.value.reasons) == {"bad"}
            assert (await held(store, "good")).events == events(1, 3)
            assert await held(store, "bad") == StoredSession(
                "bad", "ada", None, first_seq=1, last_seq=3, events=events(1, 3)
            )
            await store.commit([SessionCommit("bad", events=events(4, 4))])
            assert (await held(store, "bad")).last_seq == 4

    async def test_a_session_that_nobody_claimed_takes_no_commit(self, place: StorePlace) -> None:
        """It would have no owner."""
        async with place.open() as store:
            with pytest.raises(CommitRefused) as caught:
                await store.commit([SessionCommit("s", events=events(1, 1))])

            assert caught.value.reasons == {"s": "the session is not known"}
            assert await store.load("s") is None

    # ------------------------------------------------------------------ sizes and texts

    async def test_large_values_come_back(self, place: StorePlace) -> None:
        """Megabytes in an event, a message and a record."""
        large = b'{"x":"%s"}' % (b"y" * 3_000_000)
        commit = SessionCommit(
            "s",
            record=evolve(RECORD, text_prefix="é" * 1_000_000),
            events=(Event(1, EventKind.AGENT, large), *events(2, 2_000)),
            queued=(evolve(message("t"), body=large),),
        )
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([commit])

            found = await held(store)
            assert found.events == commit.events
            assert (found.record, found.queue) == (commit.record, commit.queued)

    async def test_every_text_is_told_apart_and_comes_back(self, place: StorePlace) -> None:
        """Unicode, NUL, quotes, and texts that differ only in case or composition are different."""
        texts = ["é", "e\u0301", "É", "a\0b", "a", "☃🂡", "'; --", "\u202e\u2028", "%_*", ""]
        async with place.open() as store:
            for text in texts:
                assert await store.claim(f"s{text}", f"u{text}", 1.0) == f"u{text}"
                await store.commit(
                    [
                        SessionCommit(
                            f"s{text}",
                            record=SessionRecord(epoch=text, touched_at=1.0),
                            last_event_id=text,
                            queued=(message(text, text),),
                            ledger=tuple(entry(each) for each in texts),
                            decisions=tuple(Decision(each, text, 1.0) for each in texts),
                        )
                    ]
                )
            for text in texts:
                found = await held(store, f"s{text}")
                assert found.owner == f"u{text}"
                assert found.record == SessionRecord(epoch=text, touched_at=1.0)
                assert found.last_event_id == text
                assert found.queue == (message(text, text),)
                assert found.ledger == tuple(entry(each) for each in texts)
                assert found.decisions == tuple(Decision(each, text, 1.0) for each in texts)
                assert await store.sessions_of(f"u{text}") == {f"s{text}"}

    # ------------------------------------------------------------------ recovery and expiry

    async def test_unfinished_names_running_turns_and_queues(self, place: StorePlace) -> None:
        """A session that waits for its client or is idle is not among them."""
        async with place.open() as store:
            for state in TurnState:
                await store.claim(state.value, "ada", 1.0)
                await store.commit([SessionCommit(state.value, record=evolve(RECORD, turn_state=state))])
            for session_id in ("queued", "emptied", "claimed", "reset"):
                await store.claim(session_id, "ada", 1.0)
            await store.commit(
                [SessionCommit(each, queued=(message("t"),)) for each in ("queued", "emptied", "reset")]
            )
            await store.commit(
                [SessionCommit("emptied", dequeued=("t",)), SessionCommit("reset", reset=True)]
            )

            assert sorted(await store.unfinished()) == ["queued", "running"]

            idle = SessionRecord(epoch="e", touched_at=1.0)
            await store.commit([SessionCommit("running", record=idle)])
            assert list(await store.unfinished()) == ["queued"]

    async def test_expiry_leaves_only_the_ownership(self, place: StorePlace) -> None:
        """Sessions last touched before the time are dropped; younger and kept ones are untouched."""
        async with place.open() as store:
            for session_id, touched_at in (("old", 10.0), ("kept", 10.0), ("young", 20.0)):
                await store.claim(session_id, "ada", 1.0)
                await store.commit(
                    [replace(EVERYTHING, session_id=session_id, record=evolve(RECORD, touched_at=touched_at))]
                )
            await store.claim("claimed", "ada", 1.0)
            young, kept = await held(store, "young"), await held(store, "kept")

            assert await store.expire(20.0, keep={"kept"}) == 1
            await store.maintain()

            assert await held(store, "old") == StoredSession("old", "ada", None, first_seq=1, last_seq=0)
            assert await held(store, "young") == young
            assert await held(store, "kept") == kept
            assert await store.claim("old", "bob", 30.0) == "ada"
            assert sorted(await store.unfinished()) == ["kept", "young"]
            assert await store.expire(20.0, keep={"kept"}) == 0

            await store.commit([replace(EVERYTHING, session_id="old")])
            assert (await held(store, "old")).events == events(1, 5)

    async def test_expiry_of_many_sessions_counts_them_all(self, place: StorePlace) -> None:
        """More sessions than one small step takes."""
        async with place.open() as store:
            names = [f"s{number}" for number in range(130)]
            for name in names:
                await store.claim(name, "ada", 1.0)
            await store.commit([SessionCommit(name, record=RECORD, events=events(1, 3)) for name in names])

            assert await store.expire(RECORD.touched_at + 1) == 130
            assert await store.sessions_of("ada") == set(names)
            assert list(await store.unfinished()) == []

    async def test_held_bytes_follow_what_is_held(self, place: StorePlace) -> None:
        """It grows with what is stored and shrinks when that is dropped."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.maintain()
            empty = store.held_bytes
            await store.commit([SessionCommit("s", record=RECORD, events=events(1, 500, size=2_000))])
            place.clock.seconds += 60
            await store.maintain()
            full = store.held_bytes
            await store.expire(RECORD.touched_at + 1)
            for _ in range(3):
                place.clock.seconds += 60
                await store.maintain()

            assert full >= empty + 1_000_000
            assert store.held_bytes <= empty + 100_000

    async def test_check_passes_on_a_sound_store(self, place: StorePlace) -> None:
        """Nothing is raised and nothing changed."""
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.check()

            assert await held(store) == StoredSession("s", "ada", None, first_seq=1, last_seq=0)

    # ------------------------------------------------------------------ cancellation

    @pytest.mark.parametrize("run", range(20))
    async def test_a_cancelled_commit_is_whole_or_did_not_happen(self, place: StorePlace, run: int) -> None:
        """Cancelled at a random moment, the store holds some first commits, all that returned among them.

        What is committed afterwards is kept too: nothing was left open.
        """
        delay = random.Random(run).uniform(0, 0.004)
        returned = 0
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            with trio.move_on_after(delay):
                for number in range(1, 1_000):
                    await store.commit([numbered_commit("s", number)])
                    returned = number
            found = await held(store)
            happened = int(found.record.touched_at) if found.record is not None else 0
            assert returned <= happened <= returned + 1
            assert evolve(found, session_id="m") == await after_commits(store, "m", happened)

            await store.commit([numbered_commit("s", happened + 1)])
            last = await held(store)
        if store.is_durable:
            async with place.open() as store:
                assert await held(store) == last

    async def test_a_cancelled_load_leaves_the_store_usable(self, place: StorePlace) -> None:
        """Loads cancelled at random moments, then a commit that is kept."""
        chance = random.Random(4)
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([SessionCommit("s", events=events(1, 3_000))])
            for _ in range(30):
                with trio.move_on_after(chance.uniform(0, 0.003)):
                    await store.load("s")
            await store.commit([SessionCommit("s", events=events(3_001, 3_001))])
            assert (await held(store)).events == events(1, 3_001)
        if store.is_durable:
            async with place.open() as store:
                assert (await held(store)).last_seq == 3_001

    # ------------------------------------------------------------------ durability

    async def test_what_was_committed_is_there_after_opening_again(self, place: StorePlace) -> None:
        """A durable store gives the same after it was closed and opened, others start empty."""
        async with place.open() as store:
            is_durable = store.is_durable
            for session_id in ("a", "b"):
                await store.claim(session_id, "ada", 1.0)
            for number in range(1, 12):
                await store.commit([numbered_commit("a", number)])
            place.clock.seconds += 60
            await store.maintain()
            await store.commit([numbered_commit("a", 12), replace(EVERYTHING, session_id="b")])
            before = [await held(store, "a"), await held(store, "b")]
            unfinished = sorted(await store.unfinished())
        async with place.open() as store:
            if is_durable:
                assert [await held(store, "a"), await held(store, "b")] == before
                assert sorted(await store.unfinished()) == unfinished
                assert await store.sessions_of("ada") == {"a", "b"}
                await store.commit([numbered_commit("a", 13)])
                assert (await held(store, "a")).last_seq == 39
            else:
                assert await store.load("a") is None

    async def test_housekeeping_changes_nothing_that_can_be_seen(self, place: StorePlace) -> None:
        """Between random commits, ``maintain`` and opening again leave what ``load`` gives as it is."""
        chance = random.Random(7)
        done = 0
        for _ in range(8):
            async with place.open() as store:
                if not store.is_durable:
                    done = 0
                await store.claim("s", "ada", 1.0)
                for _ in range(chance.randint(1, 6)):
                    done += 1
                    await store.commit([numbered_commit("s", done)])
                    before = await held(store)
                    if chance.random() < 0.5:
                        place.clock.seconds += chance.choice((1, 10, 100))
                        await store.maintain()
                    assert await held(store) == before
        async with place.open() as store:
            if store.is_durable:
                found = await held(store)
                assert evolve(found, session_id="m") == await after_commits(store, "m", done)

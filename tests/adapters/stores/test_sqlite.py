"""``gateway.adapters.stores.sqlite``: cancellation, stuck and full disks, and what an operator is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit, SessionRecord, StoredSession
from tests.adapters.stores.harness import Place, in_thread, stuck_disk
from tests.conformance.session_store import EVERYTHING, events, held, message


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A file that does not exist yet."""
    return Place(tmp_path / "sessions.db")


async def test_a_commit_that_has_begun_outlives_its_cancellation(place: Place) -> None:
    """The caller is told that it happened, and later commits are kept; APSW alone would drop it."""
    returned = False
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        async with trio.open_nursery() as nursery:
            with stuck_disk(store, nursery) as release:
                await trio.testing.wait_all_tasks_blocked()
                with trio.CancelScope() as scope:
                    nursery.start_soon(_cancel_then, scope, release)
                    await store.commit([EVERYTHING])
                    returned = True
        assert returned
        assert (await held(store)).events == events(1, 5)
        await store.commit([SessionCommit("s", events=events(6, 6))])
    async with place.open() as store:
        assert (await held(store)).events == events(1, 6)


async def _cancel_then(scope: trio.CancelScope, release: threading.Event) -> None:
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    release.set()


async def test_a_commit_in_a_cancelled_scope_does_not_begin(place: Place) -> None:
    """What was cancelled before it began did not happen."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.commit([EVERYTHING])

        assert scope.cancelled_caught
        assert (await held(store)).last_seq == 0


async def test_a_group_commit_is_one_hop_to_the_thread(place: Place) -> None:
    """However many sessions and changes there are, the thread is asked once."""
    async with place.open() as store:
        names = [f"s{number}" for number in range(300)]
        for name in names:
            await store.claim(name, "ada", 1.0)
        sent = 0
        opened = store._connection._open
        assert opened is not None
        controller = opened.connection.async_controller
        send = controller.send

        def counting(call: object) -> object:
            nonlocal sent
            sent += 1
            return send(call)  # type: ignore[arg-type]

        controller.send = counting  # type: ignore[method-assign, assignment]
        await store.commit(
            [SessionCommit(name, events=events(1, 2), queued=(message("t"),)) for name in names]
        )

        assert sent == 1


async def test_a_stuck_disk_ends_a_commit_in_time(place: Place) -> None:
    """It is unavailable; its session takes no more until it was loaded, and goes on from the truth."""
    place.call_deadline = 0.05
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.claim("other", "ada", 1.0)
        async with trio.open_nursery() as nursery:
            with stuck_disk(store, nursery):
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(StoreUnavailable, match="does not answer in time"):
                    await store.commit([SessionCommit("s", queued=(message("t"),))])
        store._connection.call_deadline = 10.0

        with pytest.raises(CommitRefused) as caught:
            await store.commit(
                [SessionCommit("s", queued=(message("t"),)), SessionCommit("other", events=events(1, 1))]
            )
        assert caught.value.reasons == {"s": "it is not known whether its last commit was stored"}
        assert (await held(store, "other")).last_seq == 1

        last_seq = (await held(store)).last_seq
        await store.commit([SessionCommit("s", events=events(last_seq + 1, last_seq + 1))])
        assert (await held(store)).last_seq == last_seq + 1


async def test_a_reset_ends_the_doubt_about_a_session(place: Place) -> None:
    """After a commit of unknown outcome a new epoch can begin without loading."""
    place.call_deadline = 0.05
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        async with trio.open_nursery() as nursery:
            with stuck_disk(store, nursery):
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(StoreUnavailable):
                    await store.commit([SessionCommit("s", events=events(1, 3))])
        store._connection.call_deadline = 10.0

        await store.commit([SessionCommit("s", reset=True, events=events(1, 1))])
        assert (await held(store)).events == events(1, 1)


async def test_check_fails_within_a_second_on_a_stuck_disk(place: Place) -> None:
    """It does not wait for the disk longer than the port allows."""
    async with place.open() as store, trio.open_nursery() as nursery:
        with stuck_disk(store, nursery):
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(1.5), pytest.raises(StoreUnavailable, match="in time"):
                await store.check()


async def test_a_full_disk_stores_nothing_and_recovers(place: Place) -> None:
    """Typed error, not a part of the group stored, told once in the log; works again when there is room."""
    async with place.open() as store:
        for session_id in ("s", "other"):
            await store.claim(session_id, "ada", 1.0)
        await store.commit([SessionCommit("s", events=events(1, 3))])
        ((pages,),) = await in_thread(store, "PRAGMA page_count")
        await in_thread(store, f"PRAGMA max_page_count = {pages + 2}")

        big = [
            SessionCommit("other", record=SessionRecord("e", 1.0), queued=(message("t"),)),
            SessionCommit("s", events=events(4, 9, size=20_000)),
        ]
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="no room left"):
                await store.commit(big)
        assert await held(store, "other") == StoredSession("other", "ada", None, first_seq=1, last_seq=0)
        assert (await held(store)).events == events(1, 3)
        assert place.telemetry.events().count("store_failing") >= 1

        await in_thread(store, "PRAGMA max_page_count = 1000000")
        await store.commit(big)
        assert (await held(store)).last_seq == 9
        assert (await held(store, "other")).queue == (message("t"),)
        assert place.telemetry.events()[-1] == "store_recovered"
    async with place.open() as store:
        assert (await held(store)).last_seq == 9


async def test_a_failing_store_is_logged_once(place: Place) -> None:
    """A thousand refused commits are one line."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        ((pages,),) = await in_thread(store, "PRAGMA page_count")
        await in_thread(store, f"PRAGMA max_page_count = {pages}")
        for _ in range(10):
            with pytest.raises(StoreUnavailable):
                await store.commit([SessionCommit("s", events=events(1, 1, size=50_000))])

    assert place.telemetry.events() == ["store_failing"]


async def test_errors_and_logs_hold_no_content(place: Place) -> None:
    """What a user wrote is in no error and in no log, whatever fails."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        ((pages,),) = await in_thread(store, "PRAGMA page_count")
        await in_thread(store, f"PRAGMA max_page_count = {pages}")
        texts = []
        for commit in (
            SessionCommit("s", events=events(1, 1, size=50_000), last_event_id="secret-id"),
            SessionCommit("s", last_event_id="secret\ud800"),
        ):
            with pytest.raises((StoreUnavailable, CommitRefused)) as caught:
                await store.commit([commit])
            texts.append(f"{caught.value} {caught.value.__cause__!r}")

    assert all("secret" not in text and "xxx" not in text for text in [*texts, repr(place.telemetry.said)])


async def test_a_session_that_cannot_be_read_is_dropped_alone(place: Place) -> None:
    """Rot in one session's rows costs that session its past, with a word in the log, and no other."""
    async with place.open() as store:
        for session_id in ("s", "other"):
            await store.claim(session_id, "ada", 1.0)
            await store.commit(
                [SessionCommit(session_id, record=SessionRecord("e", 1.0), events=events(1, 3))]
            )
        await in_thread(
            store,
            "UPDATE record SET packed = x'00' WHERE number ="
            " (SELECT number FROM session WHERE session_id = 's')",
        )

        assert await held(store) == StoredSession("s", "ada", None, first_seq=1, last_seq=0)
        assert (await held(store, "other")).events == events(1, 3)
        assert place.telemetry.events() == ["store_session_unreadable"]
        await store.commit([SessionCommit("s", events=events(1, 1))])


async def test_free_room_goes_back_to_the_file_system(place: Place) -> None:
    """After much was dropped, housekeeping makes the file smaller, in small steps."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit(
            [SessionCommit("s", record=SessionRecord("e", 1.0), events=events(1, 2_000, 2_000))]
        )
        place.clock.seconds += 60
        await store.maintain()
        large = place.path.stat().st_size
        await store.expire(2.0)
        for _ in range(5):
            place.clock.seconds += 60
            await store.maintain()

        assert large > 4_000_000
        assert place.path.stat().st_size < large / 3  # a megabyte is kept for the journal to come


async def test_the_write_ahead_log_does_not_grow_for_ever(place: Place) -> None:
    """Housekeeping copies it back, so that its room is used again."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        sizes = []
        for round_ in range(6):
            for number in range(50):
                seq = round_ * 50 + number + 1
                await store.commit([SessionCommit("s", events=events(seq, seq, 5_000), trimmed_to=seq)])
            place.clock.seconds += 60
            await store.maintain()
            sizes.append(place.beside("-wal").stat().st_size)

        assert sizes[-1] <= 2 * sizes[0]


async def test_the_file_is_for_its_owner_only(place: Place) -> None:
    """Conversations can be read by no other user of the machine."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        modes = {path.name: path.stat().st_mode & 0o077 for path in (place.path, place.beside("-wal"))}

    assert modes == {"sessions.db": 0, "sessions.db-wal": 0}

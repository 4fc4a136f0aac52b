"""``SqliteStore.commit_nowait``: what is written in the event loop's own thread, and what never is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
import trio.testing

from gateway.adapters.stores.sqlite import SqliteStore
from gateway.core.storage import CommitRefused, SessionCommit
from tests.adapters.stores.harness import Place, stuck_disk
from tests.conformance.session_store import EVERYTHING, events, held


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A file that does not exist yet."""
    return Place(tmp_path / "sessions.db")


def event(seq: int) -> list[SessionCommit]:
    """A commit of one event."""
    return [SessionCommit("s", events=events(seq, seq))]


async def test_what_is_committed_at_once_survives(place: Place) -> None:
    """Whole, in order with what goes through the thread, and read by it."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        assert store.commit_nowait([EVERYTHING])
        await store.commit(event(6))
        assert store.commit_nowait(event(7))
        assert (await held(store)).events == events(1, 7)
    async with place.open() as store:
        assert (await held(store)).events == events(1, 7)


async def test_a_commit_that_does_not_fit_is_refused_at_once(place: Place) -> None:
    """As ``commit`` refuses it, and the others of the group are stored."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        with pytest.raises(CommitRefused) as caught:
            store.commit_nowait([SessionCommit("unknown", events=events(1, 1)), *event(1)])
        assert list(caught.value.reasons) == ["unknown"]
        assert (await held(store)).events == events(1, 1)


async def test_a_store_that_waits_for_the_disk_commits_nothing_at_once(tmp_path: Path) -> None:
    """With ``STORE_SYNC=full`` every commit is waited for, in the thread."""
    place = Place(tmp_path / "sessions.db", full_sync=True)
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        assert not store.commit_nowait(event(1))
        assert (await held(store)).last_seq == 0


async def test_nothing_is_committed_at_once_while_the_thread_is_at_work(place: Place) -> None:
    """Two threads are never in the tables together; what is refused so can be committed after it."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        async with trio.open_nursery() as nursery:
            with stuck_disk(store, nursery):
                while not store._connection._open.using.locked():  # type: ignore[union-attr]
                    await trio.lowlevel.checkpoint()
                assert not store.commit_nowait(event(1))
        assert store.commit_nowait(event(1))
        assert (await held(store)).events == events(1, 1)


async def test_a_file_that_another_program_writes_is_not_waited_for(place: Place) -> None:
    """Locked for the moment: the thread is the one to wait."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        other = apsw.Connection(str(place.path))
        other.execute("BEGIN IMMEDIATE")
        assert not store.commit_nowait(event(1))
        other.execute("ROLLBACK")
        other.close()
        assert store.commit_nowait(event(1))
        assert (await held(store)).events == events(1, 1)


async def test_a_slow_disk_is_left_to_the_thread_for_a_while(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    """A write that held up the event loop for longer than 100 ms is followed by ten seconds without any."""

    def slow(_: object) -> None:
        mock_clock.jump(0.101)

    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        store._connection.run_nowait(slow)
        assert not store.commit_nowait(event(1))
        assert [name for name, _ in place.telemetry.said] == ["store_disk_slow"]
        mock_clock.jump(9.89)
        assert not store.commit_nowait(event(1))
        mock_clock.jump(0.02)
        assert store.commit_nowait(event(1))


class NotingFile(apsw.VFSFile):
    """Notes in which thread the disk is waited for."""

    def __init__(self, base: str, name: Any, flags: Any, waited: list[int]) -> None:
        super().__init__(base, name, flags)
        self.waited = waited

    def xSync(self, flags: int) -> None:  # noqa: N802
        """Note."""
        self.waited.append(threading.get_ident())
        super().xSync(flags)


class NotingDisk(apsw.VFS):
    """The system's, with a note of who waits for it."""

    def __init__(self, base: str) -> None:
        self.waited: list[int] = []
        self.base = base
        super().__init__("noting", base)

    def xOpen(self, name: Any, flags: Any) -> apsw.VFSFile:  # noqa: N802
        """A file that notes."""
        return NotingFile(self.base, name, flags, self.waited)


@pytest.fixture
def disk() -> Iterator[NotingDisk]:
    """What every connection uses for as long as the test runs."""
    usual = apsw.vfs_names()[0]
    noting = NotingDisk(usual)
    apsw.set_default_vfs("noting")
    yield noting
    apsw.set_default_vfs(usual)
    noting.unregister()


async def test_the_event_loop_never_waits_for_the_disk(place: Place, disk: NotingDisk) -> None:
    """The first write after a checkpoint begins the log anew and waits for the disk: it is the thread's."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        for seq in range(1, 31):
            assert store.commit_nowait(event(seq))
            if not seq % 10:
                await store._connection.checkpoint()
    assert len(disk.waited) >= 6
    assert threading.get_ident() not in disk.waited


async def test_nothing_is_committed_at_once_during_a_checkpoint(place: Place) -> None:
    """It would be the one to begin the log anew."""
    refused = list[bool]()

    async def commit_meanwhile(store: SqliteStore) -> None:
        while not store._connection._is_checkpointing:
            await trio.lowlevel.checkpoint()
        refused.append(not store.commit_nowait(event(1)))

    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit_meanwhile, store)
            await store._connection.checkpoint()
        assert refused == [True]
        assert store.commit_nowait(event(1))

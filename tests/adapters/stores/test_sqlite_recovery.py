"""``gateway.adapters.stores.sqlite_recovery``: locked, lost, damaged, older and foreign files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
import trio
from msgspec.structs import replace

from gateway.adapters.stores import sqlite_recovery
from gateway.core.errors import StoreUnavailable
from gateway.core.storage import CommitRefused, SessionCommit, SessionRecord, StoredSession
from tests.adapters.stores.harness import Place, in_thread
from tests.conformance.session_store import EVERYTHING, RECORD, events, held


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A file that does not exist yet."""
    return Place(tmp_path / "sessions.db")


async def fill(place: Place) -> StoredSession:
    """Open, store something, close; returns what is held."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        return await held(store)


def renewed(token: str, last_seq: int) -> StoredSession:
    """What is left of ``EVERYTHING`` after its epoch was renewed."""
    record = SessionRecord(epoch=token, touched_at=RECORD.touched_at)
    return StoredSession("s", "ada", record, first_seq=last_seq + 1, last_seq=last_seq)


# ---------------------------------------------------------------------- lock


async def test_a_second_gateway_is_refused(place: Place) -> None:
    """While the file is open it cannot be opened again; the error says why and what to do."""
    async with place.open():
        with pytest.raises(StoreUnavailable, match=r"in use by another gateway\. Stop that one") as caught:
            async with place.open():
                pass
        assert str(place.path) in str(caught.value)
    async with place.open() as store:
        await store.check()


async def test_the_lock_of_a_killed_process_is_gone(place: Place) -> None:
    """Another process that holds the file keeps us out until it is killed."""
    process = await trio.lowlevel.open_process(
        [
            *(sys.executable, "-m", "tests.adapters.stores.commit_until_killed"),
            *(f"sqlite:///{place.path}", "normal", "s"),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(20):
            assert await process.stdout.receive_some()
        with pytest.raises(StoreUnavailable, match="in use"):
            async with place.open():
                pass
    finally:
        process.kill()
    await process.wait()
    await process.stdout.aclose()

    async with place.open() as store:
        assert (await held(store)).last_seq > 0


async def test_a_failed_opening_leaves_no_lock(place: Place) -> None:
    """After a refusal for another reason the file can be opened once the reason is gone."""
    place.path.mkdir()
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        async with place.open():
            pass
    place.path.rmdir()
    async with place.open() as store:
        await store.check()


# ---------------------------------------------------------------------- versions and other programs


async def test_a_newer_schema_is_refused_untouched(place: Place) -> None:
    """An older gateway does not guess at what a newer one wrote."""
    await fill(place)
    db = apsw.Connection(str(place.path))
    db.pragma("user_version", 3)
    db.close()
    before = place.path.read_bytes()

    with pytest.raises(
        StoreUnavailable, match=r"newer version of the gateway \(schema 3, this one knows 2\)"
    ):
        async with place.open():
            pass
    assert place.path.read_bytes() == before


async def test_another_programs_database_is_refused_untouched(place: Place) -> None:
    """A sound database that is not ours is left alone."""
    db = apsw.Connection(str(place.path))
    db.execute("CREATE TABLE precious (x); INSERT INTO precious VALUES (1)")
    db.close()

    with pytest.raises(StoreUnavailable, match="another program"):
        async with place.open():
            pass
    db = apsw.Connection(str(place.path))
    assert db.execute("SELECT x FROM precious").get == 1
    db.close()


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["not a database", "overwritten", "overwritten deep inside", "cut short"])
async def test_a_damaged_file_is_moved_aside_at_open(place: Place, damage: str) -> None:
    """A fresh file is begun, the damaged one kept under its time, and it is said in the log."""
    async with place.open() as store:
        for number in range(200):
            await store.claim(f"s{number}", "ada", 1.0)
            await store.commit([SessionCommit(f"s{number}", record=RECORD, events=events(1, 3, 500))])
    content = place.path.read_bytes()
    rotten = {
        "not a database": b"\x00garbage" * 1_000,
        "overwritten": content[:8_192] + b"\xff" * 16_384 + content[24_576:],
        "overwritten deep inside": content[: 11 * 4_096] + b"\xff" * 4_096 + content[12 * 4_096 :],
        "cut short": content[: len(content) // 2],
    }[damage]
    place.path.write_bytes(rotten)
    place.clock.seconds = 1_234.5

    async with place.open() as store:
        assert await store.load("s1") is None
        await store.claim("s1", "bob", 1.0)
        await store.commit([SessionCommit("s1", events=events(1, 1))])
    assert place.beside(".corrupt-1234").read_bytes() == rotten
    assert place.telemetry.events() == ["store_corrupt"]

    async with place.open() as store:
        assert (await held(store, "s1")).owner == "bob"
    assert place.telemetry.events() == ["store_corrupt"]


async def test_two_damaged_files_within_a_second_are_both_kept(place: Place) -> None:
    """The second does not replace the first."""
    for _ in range(2):
        place.path.write_bytes(b"garbage " * 1_000)
        async with place.open():
            pass

    assert place.beside(".corrupt-1000").exists()
    assert place.beside(".corrupt-1000-1").exists()


async def test_damage_found_while_running_begins_a_fresh_file(place: Place) -> None:
    """The call that meets it is unavailable, sessions are unknown, and work goes on in the same process."""
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        place.clock.seconds += 60
        await store.maintain()
        # A root page of rubbish, as a failing disk would leave it.
        ((root,),) = await in_thread(store, "SELECT rootpage FROM sqlite_schema WHERE name = 'record'")
        await in_thread(store, "PRAGMA writable_schema = ON")
        await in_thread(store, "UPDATE sqlite_schema SET rootpage = 1000000 WHERE name = 'record'")
        await in_thread(store, "PRAGMA writable_schema = RESET")
        assert root

        with pytest.raises(StoreUnavailable, match="damaged"):
            await store.commit([SessionCommit("s", record=RECORD, events=events(6, 6))])
        with pytest.raises(CommitRefused):
            await store.commit([SessionCommit("s", events=events(6, 6))])

        assert await store.claim("s", "ada", 2.0) == "ada"
        await store.commit([SessionCommit("s", reset=True, record=RECORD, events=events(1, 1))])
        assert (await held(store)).last_seq == 1
    assert len(list(place.path.parent.glob("*.corrupt-*"))) >= 1
    assert "store_corrupt" in place.telemetry.events()
    async with place.open() as store:
        assert (await held(store)).last_seq == 1


# ---------------------------------------------------------------------- lost and older files


async def test_a_lost_file_is_begun_anew(place: Place) -> None:
    """No session is known, so each gets a new epoch."""
    await fill(place)
    place.path.unlink()

    async with place.open() as store:
        assert await store.load("s") is None
        await store.check()


async def test_a_file_that_was_not_replaced_keeps_its_epochs(place: Place) -> None:
    """Opening and closing again and again raises no doubt."""
    before = await fill(place)
    for _ in range(3):
        async with place.open() as store:
            assert await held(store) == before

    assert place.telemetry.said == []


@pytest.mark.parametrize("taken", ["when closed", "while open", "while open, later killed"])
async def test_an_older_copy_gets_new_epochs(place: Place, taken: str) -> None:
    """Whenever the copy was made, the clients of its sessions are told; ownership and last seq stay."""
    await fill(place)
    copy = place.beside(".copy")
    if taken == "when closed":
        shutil.copy(place.path, copy)
    async with place.open() as store:
        if taken != "when closed":
            await in_thread(store, f"VACUUM INTO '{copy}'")
        await store.commit([SessionCommit("s", events=events(6, 20))])
        place.clock.seconds += 100
        await store.maintain()
        if "killed" in taken:
            for suffix in ("", "-wal", ".generation"):
                shutil.copy(place.beside(suffix), place.beside(f".killed{suffix}"))
    if "killed" in taken:
        place.beside(".killed.generation").replace(place.beside(".generation"))
    copy.replace(place.path)

    async with place.open() as store:
        found = await held(store)
        assert found.record is not None
        assert found == renewed(found.record.epoch, 5)
        assert found.record.epoch.startswith("token-")
        assert list(await store.unfinished()) == []
    said = dict(place.telemetry.said)
    assert said["store_epochs_renewed"]["reason"] == "the file is an older copy"
    async with place.open() as store:
        assert await held(store) == found


async def test_a_killed_stores_file_is_believed_with_its_log(place: Place, tmp_path: Path) -> None:
    """A copy of all files of an open store, which is what ``kill -9`` leaves, raises no doubt."""
    left = Place(tmp_path / "left" / "sessions.db")
    left.path.parent.mkdir()
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        before = await held(store)
        for suffix in ("", "-wal", ".generation"):
            shutil.copy(place.beside(suffix), left.beside(suffix))

    async with left.open() as store:
        assert await held(store) == before
    assert left.telemetry.said == []


async def test_a_file_without_its_sidecar_gets_new_epochs(place: Place) -> None:
    """Deleting ``name.generation`` is how an operator says that a backup was restored."""
    await fill(place)
    place.beside(".generation").unlink()

    async with place.open() as store:
        found = await held(store)
        assert found.record is not None
        assert found == renewed(found.record.epoch, 5)


@pytest.mark.parametrize(("full_sync", "is_renewed"), [(False, True), (True, False)])
async def test_after_the_machine_went_down_unsynced_files_are_doubted(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full_sync: bool, is_renewed: bool
) -> None:
    """Without ``STORE_SYNC=full`` the newest commits may be gone, so that epochs must not go on."""
    place.full_sync = full_sync
    left = Place(tmp_path / "left" / "sessions.db", full_sync=full_sync)
    left.path.parent.mkdir()
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        for suffix in ("", "-wal", ".generation"):
            shutil.copy(place.beside(suffix), left.beside(suffix))
    monkeypatch.setattr(sqlite_recovery, "boot_id", lambda: "another boot")

    async with left.open() as store:
        found = await held(store)
    assert found.last_seq == 5
    assert (found.events == ()) is is_renewed
    async with place.open() as store:
        assert (await held(store)).events == events(1, 5), "closed cleanly: nothing to doubt"


@pytest.mark.parametrize("step", ["announced", "written"])
async def test_a_crash_while_the_token_changes_raises_no_doubt(place: Place, step: str) -> None:
    """The sidecar names both tokens until the file has the new one."""
    before = await fill(place)
    file = sqlite_recovery.StoreFile(
        place.path,
        full_sync=True,
        new_token=lambda: next(place.tokens),
        clock=place.clock,
        telemetry=place.telemetry,
    )
    token = file.begin_generation()
    if step == "written":
        db = apsw.Connection(str(place.path))
        db.execute("UPDATE property SET value = ? WHERE name = 'generation'", (token,))
        db.close()

    async with place.open() as store:
        assert await held(store) == before
    assert place.telemetry.said == []


async def test_epochs_are_renewed_for_every_session_and_differ(place: Place) -> None:
    """Each gets its own; sessions that were only claimed stay as they are."""
    async with place.open() as store:
        for number in range(5):
            await store.claim(f"s{number}", "ada", 1.0)
            await store.commit([replace(EVERYTHING, session_id=f"s{number}")])
        await store.claim("claimed", "bob", 1.0)
    place.beside(".generation").write_bytes(b"rubbish")

    async with place.open() as store:
        epochs = set()
        for number in range(5):
            record = (await held(store, f"s{number}")).record
            assert record is not None
            epochs.add(record.epoch)
        assert len(epochs) == 5
        assert await held(store, "claimed") == StoredSession("claimed", "bob", None, 1, 0)
        await store.commit([SessionCommit("s0", events=events(6, 7))])
        assert (await held(store, "s0")).events == events(6, 7)

"""Making a store's file fit to be opened: locked, sound, of our schema, and as young as we left it.

Beside ``name`` (and SQLite's ``name-wal`` and ``name-shm``) there are

``name.lock``
    Held by an open SQLite transaction for as long as the store is open, so that a second gateway is refused.
    The operating system releases it when the process dies, however it dies. Leave the file alone.
``name.generation``
    The sidecar that tells whether ``name`` is the file that was last written here. Both hold a token that is
    replaced at every open, at every clean close, and every so often in between.
``name.corrupt-<unix time>``
    A file that was found damaged, moved aside as it was.

What is recognised, and what follows
    *Corrupt* (it is no database, or ``PRAGMA quick_check`` complains): moved aside, a fresh one is begun.
    *Lost*: a fresh one is begun. In both cases no session is known, so each gets a new epoch.
    *Older copy* (the token in the file is not in the sidecar, or there is no sidecar), and *machine went
    down* without a clean close while ``STORE_SYNC`` was ``normal`` (the sidecar names the boot it was
    opened in): what the file says of events may be older than what clients saw. Every session's epoch is
    renewed: events, queue, ledger and decisions are dropped; who owns it and its last seq are kept.

Not recognised: a copy of the file *and* its sidecar restored together, and a copy of the file alone that is
younger than the last change of the token. To be safe after restoring a backup, delete ``name.generation``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec

from gateway.adapters.stores.sqlite_journal import EventJournal
from gateway.adapters.stores.sqlite_schema import ForeignFile, configure, ensure_schema, transaction
from gateway.core.errors import StoreUnavailable
from gateway.core.packing import UnreadablePack, pack_record, unpack_record
from gateway.core.storage import SessionRecord
from gateway.ports import Clock, Telemetry

CORRUPT = (apsw.CorruptError, apsw.NotADBError)
"""What SQLite raises when the file is damaged or no database at all."""


class _Sidecar(msgspec.Struct):
    """The contents of ``name.generation``."""

    tokens: list[str]
    """The token of the file; two while it is being replaced."""
    boot: str | None = None
    """The machine's boot in which an unsynced store was opened; None once it is closed, or when synced."""


class StoreFile:
    """The files of one store. All methods block; call them in a worker thread.

    ``new_token`` makes tokens and epochs, each different from all before.
    """

    def __init__(
        self,
        path: Path,
        *,
        full_sync: bool,
        new_token: Callable[[], str],
        clock: Clock,
        telemetry: Telemetry,
    ) -> None:
        self.path = path
        self._clock = clock
        self._full_sync = full_sync
        self._new_token = new_token
        self._telemetry = telemetry
        self._lock: apsw.Connection | None = None

    # ------------------------------------------------------------------ lock

    def lock(self) -> None:
        """Keep other gateways out until ``unlock``. Raises ``StoreUnavailable`` when one is in."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = apsw.Connection(os.fspath(self._beside(".lock")))
        except (OSError, apsw.Error) as error:
            raise StoreUnavailable(self._cannot_open(error)) from error
        try:
            # Nothing is ever written to this database: it is there for its lock.
            lock.pragma("journal_mode", "OFF")
            lock.execute("BEGIN EXCLUSIVE")
        except apsw.BusyError as error:
            lock.close()
            raise StoreUnavailable(
                f"The session store {self.path} is in use by another gateway. Stop that one, or give this "
                "one a STORE_URL of its own; several gateways can only share a store over the network."
            ) from error
        except apsw.Error as error:
            lock.close()
            raise StoreUnavailable(self._cannot_open(error)) from error
        self._lock = lock

    def unlock(self) -> None:
        """Let others in. Idempotent."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------------------ opening

    def prepare(self) -> None:
        """Leave a sound, current file at ``path``, begun anew if need be. Raises ``StoreUnavailable``."""
        try:
            try:
                self._prepare()
            except (*CORRUPT, UnreadablePack) as error:
                self.set_aside(str(error))
                self._prepare()
        except ForeignFile as error:
            raise StoreUnavailable(f"The session store {self.path} cannot be used: {error}.") from error
        except (OSError, apsw.Error) as error:
            raise StoreUnavailable(self._cannot_open(error)) from error

    def _prepare(self) -> None:
        # Conversations are nobody else's business; SQLite gives its log the mode of the file.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(apsw.Connection(os.fspath(self.path))) as db:
            configure(db, full_sync=True)
            faults = db.pragma("quick_check")
            if faults != "ok":
                raise apsw.CorruptError("quick_check found faults")
            ensure_schema(db)
            token = db.execute("SELECT value FROM property WHERE name = 'generation'").get
            reason = None if token is None else self._doubt(token)
            # Whether in doubt or not, what is in the journal counts.
            EventJournal(db)
            if reason is not None:
                renewed = renew_epochs(db, self._new_token)
                self._telemetry.error(
                    "store_epochs_renewed", path=os.fspath(self.path), reason=reason, sessions=renewed
                )
            fresh = self.begin_generation()
            db.execute("INSERT OR REPLACE INTO property VALUES ('generation', ?)", (fresh,))
            self.end_generation(fresh)

    def _doubt(self, token: str) -> str | None:
        """Why the file may be older than what was served from it, or None when it is not."""
        try:
            sidecar = msgspec.json.decode(self._beside(".generation").read_bytes(), type=_Sidecar)
        except FileNotFoundError:
            return "there is no sidecar to compare the file with"
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "the sidecar is unreadable"
        if token not in sidecar.tokens:
            return "the file is an older copy"
        if sidecar.boot is not None and sidecar.boot != boot_id():
            return "the machine went down while the store was open and not synced"
        return None

    def set_aside(self, fault: str) -> Path:
        """Move a damaged file and its log out of the way. Returns where the file is now."""
        stem = f".corrupt-{int(self._clock.now())}"
        target, again = self._beside(stem), 1
        while target.exists():
            target, again = self._beside(f"{stem}-{again}"), again + 1
        self.path.rename(target)
        with contextlib.suppress(FileNotFoundError):
            self._beside("-wal").rename(target.with_name(target.name + "-wal"))
        self._beside("-shm").unlink(missing_ok=True)
        self._telemetry.error(
            "store_corrupt", path=os.fspath(self.path), moved_to=os.fspath(target), fault=fault
        )
        return target

    # ------------------------------------------------------------------ generation

    def begin_generation(self) -> str:
        """Announce a new token in the sidecar and return it: the caller writes it into the file.

        Until ``end_generation`` the sidecar names the old and the new token, so that a crash in between
        raises no doubt.
        """
        sidecar = self._beside(".generation")
        try:
            current = msgspec.json.decode(sidecar.read_bytes(), type=_Sidecar).tokens[-1:]
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            current = []
        fresh = self._new_token()
        self._write(sidecar, _Sidecar([*current, fresh], self._boot()))
        return fresh

    def end_generation(self, token: str, *, closed: bool = False) -> None:
        """Forget the old token; ``closed`` says that the file is closed and synced."""
        self._write(self._beside(".generation"), _Sidecar([token], None if closed else self._boot()))

    def _boot(self) -> str | None:
        return None if self._full_sync else boot_id()

    def _write(self, sidecar: Path, content: _Sidecar) -> None:
        draft = sidecar.with_name(sidecar.name + ".new")
        with draft.open("wb") as file:
            file.write(msgspec.json.encode(content))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(sidecar)

    # ------------------------------------------------------------------ names and words

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _cannot_open(self, error: Exception) -> str:
        return (
            f"The session store {self.path} cannot be opened ({type(error).__name__}: {error}). Check that "
            "the directory can be written and has room, and start again."
        )


def renew_epochs(db: apsw.Connection, new_epoch: Callable[[], str]) -> int:
    """Give every session a new epoch, in one transaction; the journal must be settled.

    Events, queue, ledger and decisions are dropped and the turn is idle; owner and last seq stay. Returns how
    many sessions had an epoch.
    """
    with transaction(db):
        db.execute("UPDATE session SET last_event_id = NULL, trimmed_to = last_seq")
        for table in ("event_pack", "queue", "ledger", "decision"):
            db.execute(f"DELETE FROM {table}")
        found: list[Any] = db.execute("SELECT number, packed FROM record").fetchall()
        db.executemany(
            "UPDATE record SET packed = ?, running = 0 WHERE number = ?",
            (
                (
                    pack_record(
                        SessionRecord(epoch=new_epoch(), touched_at=unpack_record(packed).touched_at)
                    ),
                    number,
                )
                for number, packed in found
            ),
        )
    return len(found)


def boot_id() -> str | None:
    """What is different after each boot of the machine, or None where that cannot be known.

    Linux: ``/proc/sys/kernel/random/boot_id`` (random(4)).
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None

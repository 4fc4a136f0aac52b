"""Where the LLM spool of a database is found: its socket and its lock."""

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

LONGEST_ADDRESS = 103
"""Bytes of a unix socket's path: 107 on Linux and 103 on macOS, without the NUL."""


@attrs.frozen
class SpoolPlace:
    """The files of one spool. They belong to their user alone."""

    socket: Path
    lock: Path


def place_of(db: str) -> SpoolPlace:
    """The place for a database: beside it, or where its path is too long for a socket, a folder of our own.

    Raises `OSError` when there is no folder that is ours alone. Whoever may write into the database's folder
    is trusted: the conversations are there.
    """
    path = os.path.realpath(db)
    beside = SpoolPlace(Path(f"{path}.llm.sock"), Path(f"{path}.llm.lock"))
    if len(os.fsencode(beside.socket)) <= LONGEST_ADDRESS:
        return beside
    folder = _private_folder()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    return SpoolPlace(folder / f"{name}.sock", beside.lock)


def _private_folder() -> Path:
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(parent) / f"gateway-agent-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # In a folder that everybody may write to, somebody else may have made it first.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


@contextmanager
def only_one(place: SpoolPlace) -> Iterator[bool]:
    """Whether this process is the only spool of the place, until the block ends; its pid is in the lock.

    The kernel lets go of the lock when the process ends, however it ends. The file is left: whoever
    removed it might remove the one that another has just locked.
    """
    descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield True
    finally:
        os.close(descriptor)

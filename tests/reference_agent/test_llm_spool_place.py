"""Where a spool is found, and that there is one."""

import os
import stat
from pathlib import Path

import pytest

from gateway.reference_agent.llm_spool_place import LONGEST_ADDRESS, only_one, place_of


def test_the_socket_lies_beside_the_database(short_folder: Path) -> None:
    """Under the database's real name, whichever link leads to it."""
    db = short_folder / "agent.db"
    db.touch()
    (short_folder / "link").symlink_to(db)
    assert place_of(str(short_folder / "link")).socket == short_folder / "agent.db.llm.sock"


def test_a_path_too_long_for_a_socket_gets_one_in_a_folder_of_our_own(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always the same for the same database, and another for another; the lock stays beside the database."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    deep = short_folder / ("d" * LONGEST_ADDRESS)
    place, again, other = (place_of(str(deep / name)) for name in ("a.db", "a.db", "b.db"))
    assert place == again
    assert place.socket != other.socket
    assert len(os.fsencode(place.socket)) <= LONGEST_ADDRESS
    assert place.lock == deep / "a.db.llm.lock"
    assert stat.S_IMODE(place.socket.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_folder_that_is_not_ours_alone_is_not_used(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In a folder that everybody may write to, somebody else may have made it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    folder = short_folder / f"gateway-agent-{os.getuid()}"
    if kind == "a link":
        (short_folder / "theirs").mkdir(mode=0o700)
        folder.symlink_to(short_folder / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(PermissionError, match="not a folder of this user alone"):
        place_of(str(short_folder / ("d" * LONGEST_ADDRESS) / "a.db"))


def test_only_one_spool_has_a_place(short_folder: Path) -> None:
    """The second is told so; when the first has left, the next may come. Its pid is there for people."""
    place = place_of(str(short_folder / "agent.db"))
    with only_one(place) as first, only_one(place) as second:
        assert (first, second) == (True, False)
        assert place.lock.read_text("ascii") == f"{os.getpid()}\n"
    with only_one(place) as third:
        assert third
    assert stat.S_IMODE(place.lock.stat().st_mode) == 0o600

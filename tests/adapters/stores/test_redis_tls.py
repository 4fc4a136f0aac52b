"""``rediss://``: a real Redis that speaks TLS, with certificates that fit and others."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trustme

from gateway.core.errors import StoreUnavailable
from tests.adapters.stores.redis_place import Place, until_works
from tests.conformance.session_store import EVERYTHING, held, numbered_commit
from tests.redis_groups import PORTS, SERVICE, ClusterGroup, Sentinel
from tests.redis_server import RedisServer


class Authority:
    """Signs what servers show; its own certificate is in a file."""

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self.file = directory / "authority.pem"
        self._authority.cert_pem.write_to_path(self.file)
        self._directory = directory

    def options(self, *names: str) -> list[str]:
        """What makes a Redis show a certificate for those names."""
        certificate = self._authority.issue_cert(*names)
        key, chain = self._directory / "key.pem", self._directory / "chain.pem"
        certificate.private_key_pem.write_to_path(key)
        certificate.cert_chain_pems[0].write_to_path(chain)
        return [
            *("--tls-cert-file", str(chain), "--tls-key-file", str(key)),
            *("--tls-ca-cert-file", str(self.file), "--tls-auth-clients", "no"),
        ]

    @property
    def context(self) -> ssl.SSLContext:
        """What trusts it."""
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One that only who is told to trusts."""
    return Authority(tmp_path)


@pytest.fixture
def tls_redis(tmp_path: Path, authority: Authority) -> Iterator[RedisServer]:
    """A Redis that shows a certificate for ``localhost``."""
    server = RedisServer(tmp_path, *authority.options("localhost"), ports=PORTS, tls=authority.context)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def test_a_redis_by_tls_is_used_like_any_other(
    tls_redis: RedisServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate is signed by who is trusted; a cut is mended; without TLS nothing is said to it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    place = Place(f"rediss://localhost:{tls_redis.port}")
    async with place.open() as store:
        await store.claim("s", "ada", 1.0)
        await store.commit([EVERYTHING])
        before = await held(store)
        tls_redis.ask("CLIENT KILL TYPE normal")
        assert await until_works(store) < 2.0
        assert await held(store) == before
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        async with Place(f"redis://localhost:{tls_redis.port}").open():
            pass


async def test_a_certificate_of_another_authority_is_refused_with_what_to_do(tls_redis: RedisServer) -> None:
    """One error that names the setting; the system's authorities did not sign it."""
    with trio.fail_after(3), pytest.raises(StoreUnavailable, match=r"not trusted.*SSL_CERT_FILE"):
        async with Place(f"rediss://:hunter2@localhost:{tls_redis.port}").open():
            pass


async def test_a_certificate_for_another_host_is_refused_with_what_to_do(
    tls_redis: RedisServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for ``localhost`` and not for the address."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with trio.fail_after(3), pytest.raises(StoreUnavailable, match=r"for another host.*STORE_URL"):
        async with Place(f"rediss://127.0.0.1:{tls_redis.port}").open():
            pass


async def test_a_port_without_tls_is_refused_with_what_to_do(redis_server: RedisServer) -> None:
    """It does not shake hands."""
    with (
        trio.fail_after(3),
        pytest.raises(StoreUnavailable, match=r"cannot be opened: TLS failed.*port one for TLS"),
    ):
        async with Place(f"rediss://localhost:{redis_server.port}").open():
            pass


async def test_a_server_that_wants_a_certificate_cannot_be_opened(
    tls_redis: RedisServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway has none to show. Whether Redis' reason arrives before it hangs up is a matter of luck."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    assert tls_redis.ask("CONFIG SET tls-auth-clients yes") == "+OK"
    with trio.fail_after(3), pytest.raises(StoreUnavailable, match="cannot be opened"):
        async with Place(f"rediss://localhost:{tls_redis.port}").open():
            pass


async def test_a_master_by_tls_that_sentinels_name_by_tls(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both, with the same authority; sentinels name the master by address."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    options = authority.options("127.0.0.1", "localhost")
    master = RedisServer(tmp_path, *options, ports=PORTS, tls=authority.context)
    master.start()
    lines = [" ".join(pair).removeprefix("--") for pair in zip(options[::2], options[1::2], strict=True)]
    sentinel = Sentinel(
        tmp_path, master.port, quorum=1, options=[*lines, "tls-replication yes"], tls=authority.context
    )
    sentinel.start()
    try:
        place = Place(f"rediss+sentinel://localhost:{sentinel.port}/{SERVICE}")
        async with place.open() as store:
            await store.claim("s", "ada", 1.0)
            await store.commit([EVERYTHING])
            await held(store)
    finally:
        sentinel.kill()
        master.kill()


async def test_a_cluster_by_tls(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes name each other by address, which is what their certificate has to be for."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    group = ClusterGroup(
        tmp_path,
        2,
        0,
        *authority.options("127.0.0.1", "localhost"),
        "--tls-cluster",
        "yes",
        tls=authority.context,
    )
    group.start()
    try:
        async with Place(group.url.replace("redis", "rediss")).open() as store:
            for session_id in ("a", "b", "c", "d"):
                await store.claim(session_id, "ada", 1.0)
                await store.commit([numbered_commit(session_id, 1)])
                assert (await held(store, session_id)).last_seq == 3
    finally:
        group.kill()

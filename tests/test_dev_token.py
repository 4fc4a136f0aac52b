"""JWT mode without an auth service: the token, the key file, and the server of its key."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing
from attrs import frozen
from cryptography.hazmat.primitives import serialization

from gateway.adapters.auth import TokenAuthenticator
from gateway.adapters.jwks import JwksCache, jwks_http_client
from gateway.config import load_configuration
from gateway.core.identity import Credentials
from gateway.core.jwt_rules import TokenRules
from gateway.dev_token import (
    KEY_FILE,
    DevTokenOptions,
    DevTokenRefused,
    issue_token,
    listen_on_loopback,
    load_or_create_key,
    run_dev_token,
)
from tests.jwt_material import NOW, RecordingTelemetry, SettableClock, ec_key, rsa_key


@frozen
class Running:
    """A dev-token command that serves."""

    url: str
    output: str

    def exports(self) -> dict[str, str]:
        """What a shell would set after the output was pasted into it."""
        lines = [shlex.split(line) for line in self.output.splitlines() if line.startswith("export ")]
        assert all(len(words) == 2 for words in lines)
        return dict(words[1].split("=", 1) for words in lines)


@asynccontextmanager
async def running(options: DevTokenOptions) -> AsyncIterator[Running]:
    """Run the command until the block is left."""
    out = io.StringIO()
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[str]) -> None:
            await run_dev_token(options, out=out, now=lambda: NOW, task_status=task_status)

        url: str = await nursery.start(run)
        yield Running(url, out.getvalue())
        nursery.cancel_scope.cancel()


def options(directory: Path, **changes: Any) -> DevTokenOptions:
    """What a person would type, on a free port."""
    return attrs.evolve(DevTokenOptions(directory, bind="127.0.0.1:0"), **changes)


async def test_the_gateway_accepts_the_token_with_what_was_printed(tmp_path: Path) -> None:
    """The whole way: exports, configuration, fetched keys, identity."""
    wanted = options(tmp_path, subject="some one's", scope="api:read", lifetime=60)
    async with running(wanted) as it, jwks_http_client() as http, trio.open_nursery() as nursery:
        exports = it.exports()
        bearer = exports.pop("TOKEN")
        settings = load_configuration(exports, dotenv=None).settings
        assert settings.use_jwt_auth
        rules = TokenRules(settings.jwt_issuer, settings.jwt_audience, frozenset(settings.jwt_algorithms))
        url = f"{settings.auth_service_url}/.well-known/jwks.json"
        telemetry = RecordingTelemetry()
        keys = JwksCache(http, url, telemetry, algorithms=rules.algorithms)
        await nursery.start(keys.run)
        authenticator = TokenAuthenticator("key", keys, rules, SettableClock(), telemetry)
        identity = await authenticator.authenticate(Credentials(bearer=bearer), socket=True)
        assert (identity.subject, identity.scopes) == ("some one's", frozenset({"api:read"}))
        assert identity.expires_at == NOW + 60
        nursery.cancel_scope.cancel()


async def test_without_serving_only_a_token_is_printed(tmp_path: Path) -> None:
    """For a second subject, while another run serves the same key."""
    out = io.StringIO()
    await run_dev_token(options(tmp_path, serve=False, subject="second"), out=out)
    assert out.getvalue().startswith("export TOKEN=ey")
    assert len(out.getvalue().splitlines()) == 1


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    """In a directory that is made for its owner only, too; nothing else is left there."""
    directory = tmp_path / "a" / "b"
    first = load_or_create_key(directory)
    assert load_or_create_key(directory).jwk == first.jwk
    assert stat.S_IMODE((directory / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [entry.name for entry in directory.iterdir()] == [KEY_FILE]


def test_nothing_private_is_published(tmp_path: Path) -> None:
    """Nor shown by accident."""
    key = load_or_create_key(tmp_path)
    assert key.jwk.keys() == {"kty", "n", "e", "kid", "use", "alg"}
    assert "private" not in repr(key)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o601])
def test_a_key_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    """Their tokens would be as good as ours."""
    load_or_create_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(DevTokenRefused, match="yours alone"):
        load_or_create_key(tmp_path)


def test_a_link_in_place_of_the_key_file_is_refused(tmp_path: Path) -> None:
    """Dangling or not: whoever made it chooses the key."""
    load_or_create_key(tmp_path / "other")
    for target in ("other/" + KEY_FILE, "nowhere"):
        (tmp_path / KEY_FILE).symlink_to(tmp_path / target)
        with pytest.raises(DevTokenRefused, match="cannot be used"):
            load_or_create_key(tmp_path)
        (tmp_path / KEY_FILE).unlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_pipe_in_place_of_the_key_file_is_refused(tmp_path: Path) -> None:
    """It does not hang either."""
    os.mkfifo(tmp_path / KEY_FILE, 0o600)
    with pytest.raises(DevTokenRefused, match="yours alone"):
        load_or_create_key(tmp_path)


PEM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PLAIN, LOCKED = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rubbish",
        rsa_key("small", 1024).private.private_bytes(*PEM, PLAIN),
        ec_key().private.private_bytes(*PEM, PLAIN),
        ec_key().private.private_bytes(*PEM, LOCKED),
    ],
    ids=["empty", "rubbish", "small", "other kind", "encrypted"],
)
def test_a_key_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    """And left as it is."""
    path = tmp_path / KEY_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(DevTokenRefused, match="does not hold"):
        load_or_create_key(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": ""},
        {"subject": "internal"},
        {"subject": "a\nb"},
        {"subject": "\udce9"},
        {"scope": "a\tb"},
        {"scope": "a" * 9000},
        {"lifetime": 0},
        {"lifetime": -1},
        {"lifetime": float("nan")},
        {"lifetime": 31 * 86_400},
        {"issuer": ""},
        {"audience": ""},
    ],
    ids=repr,
)
def test_tokens_that_no_gateway_would_accept_are_not_issued(
    changes: dict[str, object], tmp_path: Path
) -> None:
    """Better told here than by a 401."""
    key = load_or_create_key(tmp_path)
    with pytest.raises(DevTokenRefused):
        issue_token(key, options(tmp_path, **changes), NOW)


@pytest.mark.parametrize(
    "bind",
    [
        "0.0.0.0:0",
        "[::]:0",
        ":0",
        "192.0.2.1:0",
        "[2001:db8::1]:0",
        "example.test:0",
        "127.0.0.1.example.test:0",
        "127.0.0.1",
        "127.0.0.1:x",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "",
    ],
)
async def test_keys_are_served_on_loopback_only(bind: str, tmp_path: Path) -> None:
    """Refused before anything is made, written or listens."""
    out = io.StringIO()
    directory = tmp_path / "keys"
    with pytest.raises(DevTokenRefused):
        await run_dev_token(options(directory, bind=bind), out=out)
    assert out.getvalue() == ""
    assert not directory.exists()


@pytest.mark.parametrize("bind", ["localhost:0", "127.0.0.1:0", "127.9.9.9:0", "[::1]:0"])
async def test_loopback_has_several_names(bind: str) -> None:
    """A name is not looked up; what it means could be changed from outside."""
    try:
        listener = await listen_on_loopback(bind)
    except DevTokenRefused:
        assert bind.startswith("[")  # a machine without IPv6
        return
    await listener.aclose()


async def test_a_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    """With what to do about it."""
    async with running(options(tmp_path)) as it:
        taken = it.url.removeprefix("http://")
        with pytest.raises(DevTokenRefused, match="choose another port"):
            await run_dev_token(options(tmp_path, bind=taken), out=io.StringIO())


async def test_the_server_answers_what_it_is_asked(tmp_path: Path) -> None:
    """Keys at their path; 404, 405 and a HEAD without body elsewhere."""
    async with running(options(tmp_path)) as it, httpx.AsyncClient(base_url=it.url) as http:
        keys = await http.get("/.well-known/jwks.json?x=1")
        assert (keys.status_code, keys.headers["Content-Type"]) == (200, "application/json")
        assert json.loads(keys.content) == {"keys": [load_or_create_key(tmp_path).jwk]}
        assert (await http.head("/.well-known/jwks.json")).content == b""
        assert (await http.get("/" + KEY_FILE)).status_code == 404
        assert (await http.get("/.well-known/jwks.json/../x")).status_code == 404
        assert (await http.post("/.well-known/jwks.json")).status_code == 405


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\x00" * 10, b"G" * 100_000])
async def test_rubbish_ends_only_its_own_connection(sent: bytes, tmp_path: Path) -> None:
    """Also when it is followed by a reset."""
    async with running(options(tmp_path)) as it:
        host, port = it.url.removeprefix("http://").split(":")
        for reset in (False, True):
            stream = await trio.open_tcp_stream(host, int(port))
            async with stream:
                try:
                    await stream.send_all(sent)
                    if reset:
                        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    else:
                        await stream.send_eof()
                        while await stream.receive_some():
                            pass
                except trio.BrokenResourceError:
                    pass
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{it.url}/.well-known/jwks.json")).status_code == 200


async def test_a_connection_that_asks_nothing_is_cut(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """After 5 s."""
    async with running(options(tmp_path)) as it:
        host, port = it.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"GET /")
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
        assert trio.current_time() >= 5


async def test_a_request_without_end_is_answered_at_the_size_bound(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """And not read on."""
    async with running(options(tmp_path)) as it:
        host, port = it.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"GET /" + b"x" * 8192)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 404 ")

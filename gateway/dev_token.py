"""``gateway dev-token``: a token and the key to verify it, to try JWT mode without an auth service.

A stand-in for an issuer, for one machine: it makes a key pair, signs a token for whoever asks on the command
line, and serves the public key where an auth service would. It proves nothing about anybody, so it listens on
loopback only, and its private key stays in a file that only its owner can read.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import ipaddress
import json
import math
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jwt
import trio
from attrs import field, frozen
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from gateway.core.codec import encode_json
from gateway.core.jwk_rules import MIN_RSA_BITS
from gateway.core.jwt_rules import TokenRefused, TokenRules, identity_from_claims, read_header
from gateway.settings import PREFIX

KEY_FILE = "dev-token-key.pem"
JWKS_PATH = "/.well-known/jwks.json"

_REQUEST_LIMIT = 8192
_REQUEST_TIMEOUT = 5.0
_MAX_LIFETIME = 30 * 86_400.0


class DevTokenRefused(Exception):
    """The token cannot be issued or its keys cannot be served; the message says what to change."""


@frozen
class DevTokenOptions:
    """What ``gateway dev-token`` was asked for."""

    directory: Path
    """Where the key pair is kept between runs; made, for its owner only, when it is not there."""
    bind: str = "127.0.0.1:8003"
    """``HOST:PORT`` to serve the keys on, loopback only; port 0 takes a free one."""
    subject: str = "developer"
    scope: str = "api:read api:write"
    lifetime: float = 3600.0
    """Seconds until the token expires."""
    issuer: str = "https://auth.codelab.local"
    audience: str = "codelab-api"
    serve: bool = True
    """False: only issue a token; another run with the same directory serves its key."""


@frozen
class DevKey:
    """The key pair of the stand-in issuer."""

    private: rsa.RSAPrivateKey = field(repr=False)
    jwk: dict[str, str]
    """The public half as it is published; its ``kid`` is the key's thumbprint (RFC 7638)."""


async def run_dev_token(
    options: DevTokenOptions,
    *,
    out: TextIO,
    now: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Issue a token, write what to paste into a shell to ``out``, and serve the key until cancelled.

    Started, with the base URL of the key server, once that listens and everything is written. Returns at
    once with ``serve=False``. Raises ``DevTokenRefused`` before anything is written or listens.
    """
    _loopback_address(options.bind)
    key = load_or_create_key(options.directory)
    token = issue_token(key, options, now())
    if not options.serve:
        _write(out, [f"export TOKEN={token}"])
        return
    async with await listen_on_loopback(options.bind) as listener:
        host, port = listener.socket.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _write(out, _instructions(options, url, token))
        task_status.started(url)
        await serve_dev_jwks(encode_json({"keys": [key.jwk]}), listener)


def load_or_create_key(directory: Path) -> DevKey:
    """The key pair of ``directory``, made now if there is none: RSA, in a file of mode 0600.

    Raises ``DevTokenRefused`` when the file is not a sound key of one's own, or others can read it.
    """
    path = directory / KEY_FILE
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                _create_key_file(path)
        pem = _read_private_file(path)
    except OSError as error:
        raise DevTokenRefused(f"The key file {path} cannot be used: {error.strerror}.") from error
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, rsa.RSAPrivateKey) or private.key_size < MIN_RSA_BITS:
        raise DevTokenRefused(f"{path} does not hold an RSA key of {MIN_RSA_BITS} bits or more; remove it.")
    return DevKey(private, _public_jwk(private))


def issue_token(key: DevKey, options: DevTokenOptions, now: float) -> str:
    """A signed access token as asked for, valid from ``now`` (seconds since the Unix epoch) on.

    Raises ``DevTokenRefused`` for what no gateway with this issuer and audience would accept.
    """
    if not 1 <= options.lifetime <= _MAX_LIFETIME:
        raise DevTokenRefused("The lifetime must be between 1 second and 30 days.")
    claims = {
        "iss": options.issuer,
        "aud": options.audience,
        "sub": options.subject,
        "type": "access",
        "scope": options.scope,
        "iat": math.floor(now),
        "exp": math.floor(now) + math.ceil(options.lifetime),
    }
    try:
        token = jwt.encode(claims, key.private, algorithm="RS256", headers={"kid": key.jwk["kid"]})
        rules = TokenRules(options.issuer, options.audience)
        read_header(token, rules.algorithms)
        identity_from_claims(encode_json(claims), rules, now)
    except ValueError as error:
        raise DevTokenRefused(str(error)) from None
    except TokenRefused as refused:
        what = refused.reason.value
        raise DevTokenRefused(f"The gateway would not accept this token: its {what} is wrong.") from None
    return token


async def listen_on_loopback(bind: str) -> trio.SocketListener:
    """A listener on ``HOST:PORT``. Raises ``DevTokenRefused`` unless the host is this machine's loopback."""
    host, port = _loopback_address(bind)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise DevTokenRefused(f"Cannot listen on {bind}: {error.strerror}; choose another port.") from error
    # A numeric host gives one listener.
    return listeners[0]


async def serve_dev_jwks(document: bytes, listener: trio.SocketListener) -> None:
    """Serve ``document`` at ``JWKS_PATH`` until cancelled, 404 elsewhere; closes the listener.

    One answer per connection, which is cut 5 s after it came. Whatever a client sends ends its own
    connection only.
    """
    handler = functools.partial(_answer_one_request, document)
    await trio.serve_listeners(handler, [listener])


async def _answer_one_request(document: bytes, stream: trio.SocketStream) -> None:
    # A peer that resets, closes, stalls or sends rubbish: nothing to tell anybody.
    with trio.move_on_after(_REQUEST_TIMEOUT), contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            head = bytearray()
            while b"\r\n\r\n" not in head and len(head) <= _REQUEST_LIMIT:
                received = await stream.receive_some()
                if not received:
                    return
                head += received
            await stream.send_all(_response(bytes(head), document))
            await stream.send_eof()


def _response(head: bytes, document: bytes) -> bytes:
    method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        status, body = "405 Method Not Allowed", b'{"error":"method not allowed"}'
    elif path != JWKS_PATH.encode():
        status, body = "404 Not Found", b'{"error":"not found"}'
    else:
        status, body = "200 OK", document
    fields = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return fields.encode() + b"Connection: close\r\n\r\n" + (b"" if method == b"HEAD" else body)


def _loopback_address(bind: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    # By number, not by name: what a name means can be changed from outside.
    address = "127.0.0.1" if host == "localhost" else host
    try:
        if not ipaddress.ip_address(address).is_loopback:
            raise DevTokenRefused(
                f"{bind} can be reached from other machines, and whoever trusts this key trusts a file "
                "on one machine: use 127.0.0.1, [::1] or localhost."
            )
        if not 0 <= int(port) <= 65_535:
            raise ValueError
    except ValueError:
        raise DevTokenRefused(f"{bind!r} is not a loopback HOST:PORT, such as 127.0.0.1:8003.") from None
    return address, int(port)


def _create_key_file(path: Path) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=MIN_RSA_BITS)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Written under another name (mkstemp: mode 0600), then linked: the key file is there whole or not at all,
    # and never replaces one.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        os.link(name, path)
    finally:
        os.unlink(name)


def _read_private_file(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise DevTokenRefused(f"{path} must be a file of yours alone: chmod 600 it, or remove it.")
        return file.read(65_536)


def _public_jwk(private: rsa.RSAPrivateKey) -> dict[str, str]:
    public = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    members = {name: str(public[name]) for name in ("e", "kty", "n")}
    # RFC 7638 §3: the required members in lexicographic order, without white space.
    digest = hashlib.sha256(json.dumps(members, separators=(",", ":")).encode()).digest()
    thumbprint = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return {**members, "kid": thumbprint, "use": "sig", "alg": "RS256"}


def _instructions(options: DevTokenOptions, url: str, token: str) -> list[str]:
    variables = {
        f"{PREFIX}USE_JWT_AUTH": "true",
        f"{PREFIX}AUTH_SERVICE_URL": url,
        f"{PREFIX}JWT_ISSUER": options.issuer,
        f"{PREFIX}JWT_AUDIENCE": options.audience,
        "TOKEN": token,
    }
    return [
        "Paste this into the shells of the gateway and of its client; "
        f"the token is good for {options.lifetime:g} s:",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "",
        'Then send it: curl -H "Authorization: Bearer $TOKEN" ...',
        f"Serving the key at {url}{JWKS_PATH}; stop with Ctrl-C.",
    ]


def _write(out: TextIO, lines: list[str]) -> None:
    out.write("\n".join(lines) + "\n")
    out.flush()

"""Where a session's socket is: the URL that a user gives, and the request target for it. Pure."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from attrs import frozen

from gateway.client.events import ResumePoint
from gateway.core.session_id import is_session_id

_SECURE = {"http": False, "ws": False, "https": True, "wss": True}


@frozen
class Address:
    """A session's socket: host and port to connect to, path to ask for."""

    host: str
    port: int
    secure: bool
    path: str

    @property
    def host_header(self) -> str:
        """The ``Host`` field (RFC 9110 section 7.2), an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    def target(self, resume: ResumePoint | None) -> str:
        """The request target; with the place to resume from once there is one."""
        if resume is None:
            return self.path
        return f"{self.path}?epoch={quote(resume.epoch, safe='')}&last_seq={resume.last_seq}"


def parse_address(url: str, session_id: str) -> Address:
    """The socket of a session on the gateway at ``url``.

    ``url`` is where the gateway is (``http://127.0.0.1:8000``, ``wss://host/prefix``) or its WebSocket
    endpoint (…``/api/v1/ws``). Raises ``ValueError`` that says what is expected.
    """
    if not is_session_id(session_id):
        raise ValueError("A session id is 1 to 128 characters of A-Z a-z 0-9 . _ : - and neither . nor ..")
    parts = urlsplit(url)
    secure = _SECURE.get(parts.scheme)
    if secure is None or not parts.hostname:
        raise ValueError("The gateway's URL begins with http://, https://, ws:// or wss:// and names a host.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("The gateway's URL holds no user, query or fragment; credentials are given apart.")
    path = parts.path.rstrip("/")
    if not path.endswith("/ws"):
        path += "/api/v1/ws"
    return Address(parts.hostname, parts.port or (443 if secure else 80), secure, f"{path}/{session_id}")

"""What a client proves itself with, checked before it goes into a header."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import field, frozen

TokenProvider = Callable[[], Awaitable[str]]
"""Gets a fresh token."""


@frozen
class Credentials:
    """What proves who is calling; any of them may be missing."""

    token: str | None = field(default=None, repr=False)
    token_provider: TokenProvider | None = None
    internal_key: str | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        """Raises ``ValueError`` for what cannot be a header field; the text does not repeat it."""
        for credential in (self.token, self.internal_key):
            if credential is not None and not is_header_safe(credential):
                raise ValueError(
                    "A token or key may only hold printable ASCII characters; check how it was copied."
                )


def is_header_safe(credential: str) -> bool:
    """Whether a token or key can be sent as it is."""
    return credential.isascii() and credential.isprintable()

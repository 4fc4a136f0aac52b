"""Who holds a socket, over its life: warning, renewal, expiry."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gateway.core.errors import InvalidToken
from gateway.core.identity import Identity
from gateway.engine.identity_watch import EXPIRY_WARNING, IdentityWatch
from tests.engine.fakes import FakeAuthenticator, TrioClock

Mock = trio.testing.MockClock


class HeldSocket:
    """Notes what it is told and when."""

    def __init__(self, *, is_v2: bool = True) -> None:
        self.is_v2 = is_v2
        self.said: list[tuple[float, object]] = []
        self.began = trio.current_time()

    def send_control(self, fields: dict[str, object]) -> None:
        """Note the type."""
        self.said.append((round(trio.current_time() - self.began, 3), fields["type"]))

    def end(self, code: int, reason: str) -> None:
        """Note the code."""
        self.said.append((round(trio.current_time() - self.began, 3), code))


def watch(socket: HeldSocket, lifetime: float | None) -> IdentityWatch:
    """A watch over an identity that lasts so long."""
    clock = TrioClock()
    expires_at = None if lifetime is None else clock.now() + lifetime
    return IdentityWatch(
        Identity("ada", expires_at=expires_at), socket, authenticator=FakeAuthenticator(), clock=clock
    )


@pytest.mark.parametrize("is_v2", [True, False])
async def test_an_identity_ends_its_socket_at_its_expiry(autojump_clock: Mock, is_v2: bool) -> None:
    """4401 to the second; v2 is warned before, v1 could do nothing about it."""
    socket = HeldSocket(is_v2=is_v2)
    await watch(socket, 600.0).run()
    warning = [(600.0 - EXPIRY_WARNING, "token_expiring")] if is_v2 else []
    assert socket.said == [*warning, (600.0, 4401)]


async def test_one_that_is_about_to_expire_warns_at_once(autojump_clock: Mock) -> None:
    """However little is left."""
    socket = HeldSocket()
    await watch(socket, 5.0).run()
    assert socket.said == [(0.0, "token_expiring"), (5.0, 4401)]


async def test_a_long_life_is_waited_for_in_steps(autojump_clock: Mock) -> None:
    """A day's token ends after a day."""
    socket = HeldSocket()
    await watch(socket, 86_400.0).run()
    assert socket.said[-1] == (86_400.0, 4401)


async def test_renewal_moves_the_end_and_warns_anew(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The old expiry passes unnoticed, the new one is kept like the first."""
    socket = HeldSocket()
    held = watch(socket, 100.0)
    nursery.start_soon(held.run)
    await trio.sleep(50)
    await held.renew(f"ada@{TrioClock().now() + 150}")
    await trio.sleep(200)
    assert socket.said == [
        (40.0, "token_expiring"),
        (50.0, "authenticated"),
        (140.0, "token_expiring"),
        (200.0, 4401),
    ]


async def test_a_token_of_somebody_else_changes_nothing(nursery: trio.Nursery, autojump_clock: Mock) -> None:
    """The socket keeps its holder, and the holder its expiry."""
    socket = HeldSocket()
    held = watch(socket, 100.0)
    nursery.start_soon(held.run)
    with pytest.raises(InvalidToken):
        await held.renew(f"mallory@{TrioClock().now() + 900}")
    await trio.sleep(101)
    assert socket.said[-1] == (100.0, 4401)
    assert held.identity.subject == "ada"


async def test_who_never_expires_can_renew_all_the_same() -> None:
    """A watch that does not run has nobody to wake."""
    socket = HeldSocket()
    await watch(socket, None).renew("ada@5")
    assert [what for _, what in socket.said] == ["authenticated"]

"""When keys are fetched, who waits for it, and how long they are believed."""

from __future__ import annotations

import itertools
import math

import httpx
import pytest
import trio
import trio.testing

from gateway.adapters.jwks import JwksTiming
from tests.adapters.issuer_fake import answering, failing, running, slowly
from tests.jwt_material import jwk_set, rsa_key


async def test_keys_are_there_once_it_has_started(autojump_clock: trio.testing.MockClock) -> None:
    """Start-up waits for the first fetch, so that the first caller finds its key."""
    async with running(slowly(answering(200, jwk_set(rsa_key())), 1.5)) as it:
        assert trio.current_time() - it.started_at == 1.5
        assert it.cache.known_key("rsa-1") is not None
        assert it.telemetry.counted == [("gateway_jwks_fetches_total", {"outcome": "ok"})]


async def test_starting_without_the_issuer_takes_no_longer_than_a_fetch(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A gateway whose issuer hangs starts all the same."""
    async with running(slowly(answering(200, jwk_set(rsa_key())), math.inf)) as it:
        assert trio.current_time() - it.started_at == 5
        assert it.cache.known_key("rsa-1") is None


async def test_a_known_key_returns_without_a_checkpoint(autojump_clock: trio.testing.MockClock) -> None:
    """Not even while a fetch hangs: it does not touch the scheduler."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(it.issuer.answer, math.inf)
        await trio.sleep(226)
        assert len(it.issuer.asked_at) == 2
        with trio.testing.assert_no_checkpoints():
            key = await it.cache.key_for("rsa-1")
        assert key is not None
        assert key.algorithm_name == "RS256"


@pytest.mark.parametrize(("jitter", "interval"), [(0.0, 225.0), (1.0, 270.0)])
async def test_keys_are_refreshed_before_the_end_of_their_life(
    jitter: float, interval: float, autojump_clock: trio.testing.MockClock
) -> None:
    """Early enough for a whole fetch within 300 s, and not by all nodes at the same time."""
    async with running(answering(200, jwk_set(rsa_key())), jitter=jitter) as it:
        await trio.sleep(2 * interval + 1)
        assert it.elapsed() == [0, interval, 2 * interval]


async def test_a_key_that_was_taken_back_is_refused_within_the_lifetime(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Revocation by rotation takes effect within 300 s."""
    async with running(answering(200, jwk_set(rsa_key(), rsa_key("rsa-2"))), jitter=1) as it:
        it.issuer.publish(rsa_key("rsa-2"))
        await trio.sleep(300)
        assert it.cache.known_key("rsa-1") is None
        assert it.cache.known_key("rsa-2") is not None


async def test_an_empty_set_takes_all_keys_back(autojump_clock: trio.testing.MockClock) -> None:
    """The issuer is obeyed, and the operator told."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.publish()
        await trio.sleep(300)
        assert it.cache.known_key("rsa-1") is None
        assert ("warning", "jwks_keys_refused", {"usable": 0, "refused": []}) in it.telemetry.logged


async def test_a_new_key_is_fetched_when_a_token_names_it(autojump_clock: trio.testing.MockClock) -> None:
    """Rotation needs no waiting for the schedule."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        assert await it.cache.key_for("rsa-2") is not None
        assert trio.current_time() - it.started_at == 31
        assert it.elapsed() == [0, 30]


async def test_within_the_cooldown_an_unknown_key_is_refused_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No wait, no checkpoint, no fetch."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        await trio.sleep(math.nextafter(30, 0))
        with trio.testing.assert_no_checkpoints():
            assert await it.cache.key_for("rsa-2") is None
        assert it.elapsed() == [0]


async def test_the_wait_for_an_unknown_key_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A slow issuer delays such a caller by 2 s; a later one finds the key."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 3.0)
        await trio.sleep(30)
        assert await it.cache.key_for("rsa-2") is None
        assert trio.current_time() - it.started_at == 32
        assert await it.cache.key_for("rsa-2") is not None
        assert trio.current_time() - it.started_at == 33
        assert it.elapsed() == [0, 30]


async def test_a_flood_of_unknown_keys_costs_one_fetch_per_cooldown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """10 000 callers in 100 s, each with another key: fetches 30 s apart, known keys not delayed."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(it.issuer.answer, 0.005)

        async def forged(number: int) -> None:
            assert await it.cache.key_for(f"forged-{number}") is None

        async with trio.open_nursery() as nursery:
            for number in range(10_000):
                nursery.start_soon(forged, number)
                if number % 100 == 99:
                    await trio.sleep(1)
                    with trio.testing.assert_no_checkpoints():
                        assert await it.cache.key_for("rsa-1") is not None
        assert it.elapsed() == [0, 30, 60, 90]


async def test_a_flood_while_the_issuer_fails_costs_one_fetch_per_cooldown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Failures count for the cooldown, from the very first attempt on."""
    async with running(answering(503, b"")) as it:
        for number in range(10_000):
            assert await it.cache.key_for(f"forged-{number}") is None
            await trio.sleep(0.01)
        assert it.elapsed() == pytest.approx([0, 30, 60, 90], abs=0.02)
        assert all(later - earlier >= 30 for earlier, later in itertools.pairwise(it.elapsed()))


async def test_callers_at_the_same_moment_share_one_fetch(autojump_clock: trio.testing.MockClock) -> None:
    """One fetch at a time, and all of them get its keys."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        found: list[bool] = []

        async def caller() -> None:
            found.append(await it.cache.key_for("rsa-2") is not None)

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(caller)
        assert found == [True] * 100
        assert it.elapsed() == [0, 30]


async def test_a_cancelled_caller_disturbs_no_other(autojump_clock: trio.testing.MockClock) -> None:
    """The fetch is not its own."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = slowly(answering(200, jwk_set(rsa_key("rsa-2"))), 1.0)
        await trio.sleep(30)
        with trio.move_on_after(0.5) as impatient:
            await it.cache.key_for("rsa-2")
        assert impatient.cancelled_caught
        assert await it.cache.key_for("rsa-2") is not None
        assert it.elapsed() == [0, 30]


async def test_stale_keys_work_while_the_issuer_is_down(autojump_clock: trio.testing.MockClock) -> None:
    """For a day beyond their life, and no longer."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = failing(lambda: httpx.ConnectError("refused"))
        await trio.sleep(math.nextafter(300 + 86_400, 0))
        assert it.cache.known_key("rsa-1") is not None
        await trio.sleep(0.001)
        assert it.cache.known_key("rsa-1") is None


async def test_keys_return_with_the_issuer(autojump_clock: trio.testing.MockClock) -> None:
    """What was published meanwhile counts from then on."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = answering(500, b"")
        await trio.sleep(7200)
        it.issuer.publish(rsa_key("rsa-2"))
        await trio.sleep(225)
        assert it.cache.known_key("rsa-1") is None
        assert it.cache.known_key("rsa-2") is not None


@pytest.mark.parametrize(
    ("jitter", "expected"), [(0.0, [0, 30, 90, 210, 360, 510]), (1.0, [0, 45, 135, 315, 540, 765])]
)
async def test_failed_fetches_are_repeated_ever_more_slowly(
    jitter: float, expected: list[float], autojump_clock: trio.testing.MockClock
) -> None:
    """Doubling from the cooldown on, spread, and bounded so that revocation does not wait for hours."""
    async with running(answering(500, b""), jitter=jitter) as it:
        await trio.sleep(expected[-1] + 1)
        assert it.elapsed() == expected


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout])
async def test_an_issuer_that_is_not_listening_yet_is_found_quickly(
    error: type[httpx.TransportError], autojump_clock: trio.testing.MockClock
) -> None:
    """While there are no keys, failed connects are repeated fast: the issuer has seen nothing of them."""
    async with running(failing(lambda: error("not there")), jitter=1) as it:
        await trio.sleep(2)
        it.issuer.publish(rsa_key())
        await trio.sleep(2)
        assert it.elapsed() == [0, 0.5, 1.5, 3.5]
        assert it.cache.known_key("rsa-1") is not None


async def test_with_keys_held_failed_connects_are_not_repeated_fast(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """There is no hurry then."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        it.issuer.answer = failing(lambda: httpx.ConnectError("refused"))
        await trio.sleep(316)
        assert it.elapsed() == [0, 225, 255, 315]


async def test_a_good_answer_ends_the_backing_off(autojump_clock: trio.testing.MockClock) -> None:
    """The schedule is the ordinary one again."""
    async with running(answering(500, b"")) as it:
        await trio.sleep(89)
        it.issuer.publish(rsa_key())
        await trio.sleep(227)
        assert it.elapsed() == [0, 30, 90, 315]


async def test_without_a_refresher_nobody_waits(autojump_clock: trio.testing.MockClock) -> None:
    """Also after it was cancelled; keys that are held go on working."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        pass
    await trio.sleep(100)
    with trio.testing.assert_no_checkpoints():
        assert await it.cache.key_for("rsa-2") is None
        assert await it.cache.key_for("rsa-1") is not None


async def test_only_one_refresher_may_run(autojump_clock: trio.testing.MockClock) -> None:
    """A second one would fetch twice."""
    async with running(answering(200, jwk_set(rsa_key()))) as it:
        with pytest.raises(RuntimeError, match="already"):
            await it.cache.run()


@pytest.mark.parametrize(
    "changes", [{"cooldown": 0}, {"cooldown": 200}, {"fetch_timeout": 30}, {"fetch_timeout": 0}]
)
def test_timings_that_contradict_each_other_cannot_be_made(changes: dict[str, float]) -> None:
    """A fetch fits between two, and several into a lifetime."""
    with pytest.raises(ValueError, match="JWKS"):
        JwksTiming(**changes)

"""The demo in this process: its life, its introduction, its chat."""

from __future__ import annotations

import functools
import io
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import httpx
import pytest
import trio

from gateway.config import ConfigError
from gateway.demo import DemoOptions, run_demo


def demo(
    folder: Path, out: io.StringIO, stop: trio.Event, environment: Mapping[str, str] | None = None
) -> Callable[..., Awaitable[int]]:
    """``run_demo`` on a free port, with its databases in ``folder``."""
    options = DemoOptions(bind="127.0.0.1:0", data=folder)
    return functools.partial(run_demo, options, environment=environment or {}, out=out, stop=stop)


async def test_serves_both_until_stopped(tmp_path: Path) -> None:
    """The gateway answers for the agent behind it, and both end with ``stop``."""
    out, stop = io.StringIO(), trio.Event()
    async with trio.open_nursery() as nursery, httpx.AsyncClient() as http:
        url = await nursery.start(demo(tmp_path, out, stop))
        answer = await http.get(f"{url}/api/v1/agents", headers={"X-Internal-Auth": "change-me-internal-key"})
        assert answer.status_code == 200
        stop.set()

    assert out.getvalue().startswith(f"Listening on {url}\n")
    assert f"curl -H 'X-Internal-Auth: change-me-internal-key' {url}/api/v1/agents" in out.getvalue()


async def test_a_key_of_ones_own_is_used_and_not_shown(tmp_path: Path) -> None:
    """It comes from the environment; no other setting does."""
    out, stop = io.StringIO(), trio.Event()
    environment = {
        "GATEWAY__INTERNAL_API_KEY": "hunter2-hunter2",
        "GATEWAY__USE_JWT_AUTH": "true",
        "GATEWAY__NO_SUCH_SETTING": "ignored",
    }
    async with trio.open_nursery() as nursery, httpx.AsyncClient() as http:
        url = await nursery.start(demo(tmp_path, out, stop, environment))
        for key, status in (("hunter2-hunter2", 200), ("change-me-internal-key", 401)):
            answer = await http.get(f"{url}/api/v1/agents", headers={"X-Internal-Auth": key})
            assert answer.status_code == status
        stop.set()

    assert "hunter2" not in out.getvalue()


async def test_ends_with_its_chat(tmp_path: Path) -> None:
    """The chat's exit code is the demo's."""
    asked: list[tuple[str, str]] = []

    async def chat(url: str, key: str) -> int:
        asked.append((url, key))
        return 7

    out = io.StringIO()
    code = await demo(tmp_path, out, trio.Event())(chat=chat)

    assert code == 7
    assert [key for _, key in asked] == ["change-me-internal-key"]
    assert "You are talking to it now" in out.getvalue()


async def test_stop_ends_the_chat(tmp_path: Path) -> None:
    """A chat that waits for its user does not hold up a stop."""
    stop = trio.Event()

    async def chat(_url: str, _key: str) -> int:
        stop.set()
        await trio.sleep_forever()
        return 1

    with trio.fail_after(15):
        assert await demo(tmp_path, io.StringIO(), stop)(chat=chat) == 0


async def test_refuses_before_anything_listens(tmp_path: Path) -> None:
    """The default key and other machines do not go together."""
    out = io.StringIO()
    options = DemoOptions(bind="0.0.0.0:0", data=tmp_path)
    with pytest.raises(ConfigError, match="is the default"):
        await run_demo(options, environment={}, out=out, stop=trio.Event())

    assert out.getvalue() == ""

"""``gateway chat`` against the real gateway and agent: scripted conversations, cuts, Ctrl-C."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from gateway.chat import ChatOptions, run_chat
from gateway.chat_terminal import LineReader, Screen
from tests.client.cutting_proxy import CuttingProxy
from tests.client.live_gateway import LiveGateway, live_gateway


async def chat(url: str, folder: Path, *lines: str, session_id: str = "s1") -> tuple[int, str]:
    """A conversation; returns exit code and what was shown."""
    output = io.StringIO()
    options = ChatOptions(url, session_id, folder, connect_timeout=2)
    with trio.fail_after(30):
        code = await run_chat(
            options, stdin=io.StringIO("".join(f"{line}\n" for line in lines)), stdout=output
        )
    return code, output.getvalue()


async def test_conversation_with_tools_and_approvals(tmp_path: Path) -> None:
    """Create with approval, edit with changed arguments, a refused command, and what is on disk after it."""
    async with live_gateway() as gateway:
        code, shown = await chat(
            gateway.url,
            tmp_path,
            "create hello.py that prints hello",
            "y",
            "edit hello.py: replace hello with goodbye",
            "edit",
            "not JSON",
            'edit {"path":"hello.py","old":"print(\\"hello\\")","new":"print(\\"bye\\")"}',
            "run `touch ran`",
            "n not today",
            "read hello.py",
            "/agent ask",
            "/nonsense",
            "/cancel",
            "/quit",
            "never read",
        )
    assert code == 0
    assert (tmp_path / "hello.py").read_text() == 'print("bye")\n'
    assert sorted(os.listdir(tmp_path)) == ["hello.py"]
    assert "Done: hello.py is there." in shown
    assert "That is not JSON" in shown
    assert "I understood: not today" in shown
    assert "-- ask answers" in shown
    assert "There is no command /nonsense" in shown
    assert "(nothing to cancel)" in shown
    assert "never read" not in shown
    assert "\x1b" not in shown


async def test_path_outside_the_folder_is_an_error_for_the_agent(tmp_path: Path) -> None:
    """The agent is told, and the chat goes on; here it is the user's own edit that leads out by a link."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "link").symlink_to("..")
    async with live_gateway() as gateway:
        code, shown = await chat(
            gateway.url,
            folder,
            "create hello.py that prints hello",
            'edit {"path":"link/other.py","content":"x"}',
            "count to 3",
        )
    assert code == 0
    assert "outside the project folder" in shown
    assert "1 2 3" in shown
    assert not (tmp_path / "other.py").exists()


async def test_goes_on_over_cuts(tmp_path: Path) -> None:
    """The answers are the same over a connection that is cut all the time; the user is told, dimly."""

    def answers(shown: str) -> list[str]:
        return [line for line in shown.splitlines() if not line.startswith(("(", "Session"))]

    lines = ["count to 1000", "create hello.py that prints hello", "y", "count to 500"]
    async with live_gateway() as gateway, trio.open_nursery() as nursery:
        proxy = CuttingProxy(gateway.port, random.Random(7), mean_bytes=5000)
        await nursery.start(proxy.run)
        _, smooth = await chat(gateway.url, tmp_path, *lines, session_id="smooth")
        code, cut = await chat(proxy.url, tmp_path, *lines, session_id="cut")
        nursery.cancel_scope.cancel()
    assert code == 0
    assert proxy.cuts > 3
    assert "reconnecting" in cut
    # A note takes a line of its own, so an answer may be broken over lines: compare the words.
    assert " ".join(answers(cut)).split() == " ".join(answers(smooth)).split()


async def test_takes_up_a_call_that_waits(tmp_path: Path) -> None:
    """A chat that ended before the decision is followed by one that is asked again."""
    async with live_gateway() as gateway:
        _, shown = await chat(gateway.url, tmp_path, "create hello.py that prints hello")
        assert "still waits" in shown
        code, shown = await chat(gateway.url, tmp_path, "y")
    assert code == 0
    assert "Done: hello.py is there." in shown
    assert (tmp_path / "hello.py").exists()


async def test_says_why_it_cannot_begin(tmp_path: Path) -> None:
    """No gateway: 1. A folder or URL that cannot be used: 2."""
    code, shown = await chat("http://127.0.0.1:1", tmp_path)
    assert (code, "cannot connect" in shown) == (1, True)
    code, shown = await chat("http://127.0.0.1:1", tmp_path / "none")
    assert (code, "Cannot use the folder" in shown) == (2, True)
    code, shown = await chat("file:///etc", tmp_path)
    assert (code, "begins with http" in shown) == (2, True)


CHAT = """
import sys, trio
from pathlib import Path
from gateway.chat import ChatOptions, run_chat
options = ChatOptions(sys.argv[1], "s1", Path(sys.argv[2]))
sys.exit(trio.run(lambda: run_chat(options, stdin=sys.stdin, stdout=sys.stdout)))
"""


async def _interrupted(gateway: LiveGateway, folder: Path, *, twice: bool) -> tuple[int, str]:
    """A chat in a process of its own, over pipes, interrupted while an answer is streaming."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-c", CHAT, gateway.url, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        await process.stdin.send_all(b"slow 100\n")
        shown = b""
        while b"1 " not in shown.partition(b"slow 100\n")[2]:
            shown += await process.stdout.receive_some()
        process.send_signal(signal.SIGINT)
        if twice:
            await trio.sleep(0.2)
            process.send_signal(signal.SIGINT)
        else:
            while b"(cancelled)" not in shown:
                shown += await process.stdout.receive_some()
            await process.stdin.send_all(b"count to 3\n/quit\n")
        async for chunk in process.stdout:
            shown += chunk
        await process.wait()
    return process.returncode, shown.decode()


async def test_interrupt_cancels_the_turn_and_the_chat_goes_on(tmp_path: Path) -> None:
    """One Ctrl-C stops the answer, not the chat."""
    with trio.fail_after(20):
        async with live_gateway() as gateway:
            code, shown = await _interrupted(gateway, tmp_path, twice=False)
    assert (code, "1 2 3 \n" in shown) == (0, True)


async def test_second_interrupt_ends_it(tmp_path: Path) -> None:
    """Two of them end it, with the code that shells use for that."""
    with trio.fail_after(20):
        async with live_gateway() as gateway:
            code, _ = await _interrupted(gateway, tmp_path, twice=True)
    assert code == 130


# ---------------------------------------------------------------------- the terminal


async def test_cancelled_read_loses_nothing() -> None:
    """A line that was half there stays for the next read."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as source, os.fdopen(writing, "wb", buffering=0) as target:
        lines = LineReader(source)
        target.write("h\u00e9".encode())
        with trio.move_on_after(0.05):
            await lines.read_line()
        target.write(b"llo\r\nnext\nlast")
        assert [await lines.read_line(), await lines.read_line()] == ["h\u00e9llo", "next"]
        target.close()
        assert [await lines.read_line(), await lines.read_line()] == ["last", None]


def test_agent_cannot_steer_the_terminal() -> None:
    """Control characters in what it says are shown as what they are not."""
    target = io.StringIO()
    screen = Screen(target, {}, is_terminal=True)
    screen.write("a\x1b]0;title\x07b\x9b2J\tc\n")
    assert target.getvalue() == "a\ufffd]0;title\ufffdb\ufffd2J\tc\n"


@pytest.mark.parametrize(
    ("environment", "is_terminal", "expected"),
    [
        ({}, True, "\x1b[2mhi\x1b[0m\n"),
        ({}, False, "hi\n"),
        ({"NO_COLOR": "1"}, True, "hi\n"),
        ({"TERM": "dumb"}, True, "hi\n"),
    ],
)
def test_styles_only_where_they_are_wanted(
    environment: dict[str, str], is_terminal: bool, expected: str
) -> None:
    """A terminal without NO_COLOR (no-color.org) gets styles, nothing else does."""
    target = io.StringIO()
    Screen(target, environment, is_terminal=is_terminal).note("hi")
    assert target.getvalue() == expected


def test_text_that_the_output_cannot_show_is_replaced() -> None:
    """A terminal in another encoding ends no chat."""
    raw = io.BytesIO()
    target = io.TextIOWrapper(raw, encoding="ascii")
    Screen(target, {}, is_terminal=False).line("é")
    assert raw.getvalue() == b"?\n"

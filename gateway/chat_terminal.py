"""The terminal of ``gateway chat``: lines in, styled text out, Ctrl-C. Knows nothing of conversations."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import stat
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TextIO

import trio

# C0 and C1 controls but tab and line feed: what an agent says must not move a cursor or rename a window.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_READ_BYTES = 65536


class LineReader:
    """Reads lines from a terminal, a pipe, a file or a ``StringIO``; a cancelled read loses nothing."""

    def __init__(self, source: TextIO) -> None:
        self._source = source
        self._descriptor = _waitable_descriptor(source)
        self._pending = b""
        self._at_end = False

    async def read_line(self) -> str | None:
        """The next line without its end; None at the end of input."""
        if self._descriptor is None:
            return await self._read_from_source()
        while b"\n" not in self._pending and not self._at_end:
            await trio.lowlevel.wait_readable(self._descriptor)
            data = os.read(self._descriptor, _READ_BYTES)
            self._at_end = not data
            self._pending += data
        if not self._pending:
            self._at_end = False  # Ctrl-D on a terminal ends one read, not all.
            return None
        line, _, self._pending = self._pending.partition(b"\n")
        await trio.lowlevel.checkpoint()
        return line.decode("utf-8", "replace").rstrip("\r")

    async def _read_from_source(self) -> str | None:
        if sys.platform == "win32":
            line = await trio.to_thread.run_sync(self._source.readline, abandon_on_cancel=True)
        else:
            await trio.lowlevel.checkpoint()
            line = self._source.readline()
        return line.rstrip("\r\n") if line else None


def _waitable_descriptor(source: TextIO) -> int | None:
    """The descriptor to wait on, or None for what is read at once: regular files, ``StringIO``."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = source.fileno()
    except (OSError, io.UnsupportedOperation, ValueError):
        return None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISCHR(mode) and not os.isatty(descriptor):
        return None if select.select([descriptor], [], [], 0)[0] else descriptor  # /dev/null
    return descriptor


class Screen:
    """Writes a conversation; knows whether the cursor is at the beginning of a line."""

    def __init__(self, target: TextIO, environment: Mapping[str, str], *, is_terminal: bool) -> None:
        self._target = target
        self._has_color = (
            is_terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        )
        self._at_line_start = True

    def write(self, text: str) -> None:
        """Write text as it comes: tokens of an answer."""
        if text:
            self._put(text)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Go to the beginning of a line."""
        if not self._at_line_start:
            self.write("\n")

    def line(self, text: str) -> None:
        """Write a line of its own."""
        self.end_line()
        self.write(text + "\n")

    def note(self, text: str) -> None:
        """Write a line that is not part of the conversation, dim."""
        self._styled(text, "2")

    def strong(self, text: str) -> None:
        """Write a line that matters, bold."""
        self._styled(text, "1")

    def problem(self, text: str) -> None:
        """Write what went wrong, red."""
        self._styled(text, "31")

    def prompt(self, text: str) -> None:
        """Ask for input; the answer is echoed behind it, by the terminal or by ``echoed``."""
        self.end_line()
        self._put(text)
        self._at_line_start = False

    def echoed(self, line: str | None, *, by_terminal: bool) -> None:
        """The input for a prompt has come."""
        if line is None or by_terminal:
            self._at_line_start = line is not None
            return
        self.write(line + "\n")

    def _styled(self, text: str, style: str) -> None:
        self.end_line()
        for line in text.splitlines() or [""]:
            self._put(line, style)
            self._put("\n")

    def _put(self, text: str, style: str = "") -> None:
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
        if style and self._has_color:
            text = f"\x1b[{style}m{text}\x1b[0m"
        encoding = getattr(self._target, "encoding", None) or "utf-8"
        self._target.write(text.encode(encoding, "replace").decode(encoding))
        self._target.flush()


@asynccontextmanager
async def open_interrupts() -> AsyncIterator[trio.MemoryReceiveChannel[None]]:
    """Ctrl-C as items of a channel inside the block; a channel without items outside the main thread."""
    send, receive = trio.open_memory_channel[None](8)

    async def pass_on(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                try:
                    send.send_nowait(None)
                except trio.WouldBlock:
                    continue

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        if threading.current_thread() is threading.main_thread():
            await nursery.start(pass_on)
        try:
            yield receive
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure

"""The tools that ``gateway chat`` runs for an agent: files in one folder, and commands in it.

What an agent asks for is not trusted. Paths are resolved, symbolic links included, and must end up inside the
folder; sizes are bounded both ways; whatever cannot be done is a ``ToolFailed`` that tells the agent why.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import trio
from attrs import frozen

SKIPPED_FOLDERS = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv"})


class ToolFailed(Exception):
    """A tool could not do what was asked; the text is for the agent."""


@frozen
class ToolLimits:
    """Sizes are bytes, times are seconds."""

    read_bytes: int = 128 << 10
    """Escaped in JSON this stays within a gateway's default limit for one message."""
    write_bytes: int = 1 << 20
    listed_files: int = 1000
    output_bytes: int = 64 << 10
    command_timeout: float = 120.0


class FolderTools:
    """Runs tool calls in ``folder``, which must exist. Raises ``NotADirectoryError``."""

    def __init__(self, folder: Path, limits: ToolLimits | None = None) -> None:
        self.folder = folder.resolve()
        if not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
        self._limits = limits or ToolLimits()
        self._file_tools: dict[str, Callable[[Mapping[str, object]], str]] = {
            "read_file": self._read_file,
            "list_files": self._list_files,
            "write_file": self._write_file,
            "create_file": self._create_file,
            "edit_file": self._edit_file,
        }

    async def run(self, tool_name: str, arguments: Mapping[str, object]) -> str:
        """Run one call and return its result. Raises ``ToolFailed``. Cancelled, a command is killed."""
        if tool_name == "execute_command":
            return await self._execute_command(_text(arguments, "command"))
        tool = self._file_tools.get(tool_name)
        if tool is None:
            known = ", ".join([*self._file_tools, "execute_command"])
            raise ToolFailed(f"There is no tool {tool_name[:64]!r} here; there are {known}.")
        try:
            return await trio.to_thread.run_sync(tool, arguments)
        except OSError as error:
            # The system's own words without the path, which names folders outside the project.
            raise ToolFailed(f"{tool_name} failed: {error.strerror or type(error).__name__}.") from None

    # ------------------------------------------------------------------ paths

    def _path(self, arguments: Mapping[str, object]) -> Path:
        given = _text(arguments, "path")
        try:
            path = (self.folder / given).resolve()
        except (ValueError, RuntimeError):  # a NUL; a loop of links
            raise ToolFailed(f"{given[:200]!r} is not a path.") from None
        if not path.is_relative_to(self.folder):
            raise ToolFailed(f"{given[:200]!r} is outside the project folder; use a path inside it.")
        return path

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    # ------------------------------------------------------------------ file tools

    def _read_file(self, arguments: Mapping[str, object]) -> str:
        return self._read(self._path(arguments), self._limits.read_bytes)

    def _read(self, path: Path, limit: int) -> str:
        # Non-blocking, so that a named pipe does not hold us; no link, for links are resolved by now.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ToolFailed(f"{self._shown(path)} is not a file.")
            if status.st_size > limit:
                raise ToolFailed(f"{self._shown(path)} has {status.st_size} bytes; at most {limit} are read.")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ToolFailed(f"{self._shown(path)} has more than {limit} bytes.")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ToolFailed(f"{self._shown(path)} is not a text file in UTF-8.") from None

    def _list_files(self, arguments: Mapping[str, object]) -> str:
        path = self._path({"path": arguments.get("path") or "."})
        if not path.is_dir():
            raise ToolFailed(f"{self._shown(path)} is not a folder.")
        files: list[str] = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
            for name in sorted(names):
                if len(files) == self._limits.listed_files:
                    return "\n".join([*files, "(more files are not listed; ask for a folder)"])
                files.append(self._shown(Path(folder, name)))
        return "\n".join(files)

    def _write_file(self, arguments: Mapping[str, object]) -> str:
        path = self._path(arguments)
        content = _text(arguments, "content", empty=True)
        size = self._write(path, content)
        return f"Wrote {self._shown(path)} ({size} bytes)."

    def _create_file(self, arguments: Mapping[str, object]) -> str:
        path = self._path(arguments)
        if path.exists():
            raise ToolFailed(f"{self._shown(path)} exists; use edit_file or write_file.")
        return self._write_file(arguments)

    def _edit_file(self, arguments: Mapping[str, object]) -> str:
        path = self._path(arguments)
        old, new = _text(arguments, "old"), _text(arguments, "new", empty=True)
        content = self._read(path, self._limits.write_bytes)
        count = content.count(old)
        if count != 1:
            raise ToolFailed(f"The old text occurs {count} times in {self._shown(path)}; it must occur once.")
        self._write(path, content.replace(old, new))
        return f"Edited {self._shown(path)}."

    def _write(self, path: Path, content: str) -> int:
        data = content.encode("utf-8", "replace")
        if len(data) > self._limits.write_bytes:
            raise ToolFailed(
                f"{len(data)} bytes are more than the {self._limits.write_bytes} a file may have."
            )
        if path == self.folder or path.is_dir():
            raise ToolFailed(f"{self._shown(path)} is a folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, whatever happens in between.
        name = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                if path.exists():
                    os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return len(data)

    # ------------------------------------------------------------------ commands

    async def _execute_command(self, command: str) -> str:
        limits = self._limits
        process = await trio.lowlevel.open_process(
            ["/bin/sh", "-c", command],
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        output = bytearray()
        left_out = 0
        try:
            with trio.move_on_after(limits.command_timeout) as deadline:
                async with process.stdout:
                    while data := await process.stdout.receive_some(65536):
                        kept = data[: max(0, limits.output_bytes - len(output))]
                        output += kept
                        left_out += len(data) - len(kept)
                await process.wait()
        finally:
            # The group, not only the shell: what it started would go on otherwise.
            if process.returncode is None or deadline.cancelled_caught:
                _kill_group(process.pid)
            with trio.CancelScope(shield=True):
                await process.wait()
        text = output.decode("utf-8", "replace")
        if left_out:
            text += f"\n(… {left_out} bytes more)"
        if deadline.cancelled_caught:
            raise ToolFailed(f"The command ran for {limits.command_timeout:g} s and was stopped.\n{text}")
        if process.returncode:
            return f"{text}\n(exit status {process.returncode})".lstrip("\n")
        return text or "(no output)"


def _kill_group(process_id: int) -> None:
    try:
        os.killpg(process_id, signal.SIGKILL)
    except ProcessLookupError:
        return


def _environment() -> dict[str, str]:
    """The environment without what is the gateway's: keys have no business in a command of an agent's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}


def _text(arguments: Mapping[str, object], name: str, *, empty: bool = False) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise ToolFailed(f"The argument {name} is missing; it is a text.")
    return value

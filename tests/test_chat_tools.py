"""The tools of ``gateway chat``: useful inside the folder, nothing outside of it, bounded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from gateway.chat_tools import FolderTools, ToolFailed, ToolLimits


@pytest.fixture(name="folder")
def project(tmp_path: Path) -> Path:
    """A project beside a file that is nobody's business."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture(name="tools")
def small_tools(folder: Path) -> FolderTools:
    """Tools with small limits."""
    limits = ToolLimits(read_bytes=100, write_bytes=100, listed_files=3, output_bytes=100, command_timeout=5)
    return FolderTools(folder, limits)


async def test_writes_reads_edits_and_lists(tools: FolderTools, folder: Path) -> None:
    """The everyday of an agent."""
    assert (
        await tools.run("write_file", {"path": "a/b.py", "content": "one\ntwo\n"})
        == "Wrote a/b.py (8 bytes)."
    )
    assert await tools.run("read_file", {"path": "a/b.py"}) == "one\ntwo\n"
    await tools.run("edit_file", {"path": "a/b.py", "old": "two", "new": ""})
    assert (folder / "a/b.py").read_text() == "one\n\n"
    await tools.run("create_file", {"path": "c.txt", "content": ""})
    assert await tools.run("list_files", {}) == "c.txt\na/b.py"
    assert await tools.run("list_files", {"path": "a"}) == "a/b.py"
    assert sorted(os.listdir(folder)) + os.listdir(folder / "a") == ["a", "c.txt", "b.py"]


async def test_keeps_the_mode_of_a_file(tools: FolderTools, folder: Path) -> None:
    """A script stays executable when it is edited."""
    script = folder / "run.sh"
    script.write_text("one")
    script.chmod(0o750)
    await tools.run("edit_file", {"path": "run.sh", "old": "one", "new": "two"})
    assert stat.S_IMODE(script.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "/etc/passwd",
        "a/../../secret.txt",
        "link.txt",
        "folder/secret.txt",
        "new/../../x",
        "..",
    ],
)
@pytest.mark.parametrize("tool", ["read_file", "list_files", "write_file", "create_file", "edit_file"])
async def test_stays_inside_the_folder(tool: str, path: str, tools: FolderTools, folder: Path) -> None:
    """Neither dots nor absolute paths nor symbolic links lead out."""
    (folder / "link.txt").symlink_to("../secret.txt")
    (folder / "folder").symlink_to("..")
    with pytest.raises(ToolFailed, match="outside the project") as failed:
        await tools.run(tool, {"path": path, "content": "x", "old": "secret", "new": "x"})
    assert str(folder) not in str(failed.value)
    assert (folder.parent / "secret.txt").read_text() == "secret"
    assert sorted(os.listdir(folder.parent)) == ["project", "secret.txt"]


async def test_links_are_not_followed_when_listing(tools: FolderTools, folder: Path) -> None:
    """What a linked folder holds is not told."""
    (folder / "folder").symlink_to("..")
    assert await tools.run("list_files", {"path": "."}) == ""


@pytest.mark.parametrize(
    ("tool", "arguments", "why"),
    [
        ("read_file", {"path": "none.py"}, "No such file"),
        ("read_file", {"path": "."}, "not a file|Is a directory"),
        ("read_file", {"path": "pipe"}, "not a file"),
        ("read_file", {"path": "big"}, "at most 100"),
        ("read_file", {"path": "binary"}, "not a text file"),
        ("read_file", {"path": "a\0b"}, "not a path"),
        ("read_file", {"path": 7}, "path is missing"),
        ("read_file", {}, "path is missing"),
        ("list_files", {"path": "big"}, "not a folder"),
        ("write_file", {"path": "new", "content": "x" * 101}, "101 bytes"),
        ("write_file", {"path": ".", "content": "x"}, "is a folder"),
        ("write_file", {"path": "new"}, "content is missing"),
        ("create_file", {"path": "big", "content": ""}, "exists"),
        ("edit_file", {"path": "two", "old": "a", "new": "b"}, "occurs 2 times"),
        ("edit_file", {"path": "two", "old": "c", "new": "b"}, "occurs 0 times"),
        ("edit_file", {"path": "two", "old": "", "new": "b"}, "old is missing"),
        ("execute_command", {}, "command is missing"),
        ("format_disk", {}, "no tool 'format_disk'"),
    ],
)
async def test_says_why_not(
    tool: str, arguments: dict[str, object], why: str, tools: FolderTools, folder: Path
) -> None:
    """Each failure tells the agent what to do differently, and nothing of paths outside."""
    os.mkfifo(folder / "pipe")
    (folder / "big").write_text("x" * 101)
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / "two").write_text("a a")
    with trio.fail_after(5), pytest.raises(ToolFailed, match=why) as failed:
        await tools.run(tool, arguments)
    assert str(folder.parent) not in str(failed.value)


async def test_lists_no_more_than_so_many_files(tools: FolderTools, folder: Path) -> None:
    """A huge project does not become a huge message."""
    for name in "abcde":
        (folder / name).touch()
    assert (await tools.run("list_files", {"path": "."})).splitlines()[3:] == [
        "(more files are not listed; ask for a folder)"
    ]


async def test_runs_a_command_in_the_folder(tools: FolderTools, folder: Path) -> None:
    """With output and errors, and the exit status if it is not 0."""
    assert await tools.run("execute_command", {"command": "pwd"}) == f"{folder}\n"
    assert await tools.run("execute_command", {"command": "echo no >&2; exit 3"}) == "no\n\n(exit status 3)"
    assert await tools.run("execute_command", {"command": "true"}) == "(no output)"
    assert await tools.run("execute_command", {"command": "cat"}) == "(no output)"


async def test_command_does_not_get_the_gateways_keys(
    tools: FolderTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's command runs without the settings of the gateway."""
    monkeypatch.setenv("GATEWAY__INTERNAL_API_KEY", "hidden")
    command = 'echo "[$GATEWAY__INTERNAL_API_KEY]"'
    assert await tools.run("execute_command", {"command": command}) == "[]\n"


async def test_output_is_bounded(tools: FolderTools) -> None:
    """A command that never stops talking costs bounded memory."""
    output = await tools.run("execute_command", {"command": "yes x | head -c 100000"})
    assert output.startswith("x\nx\n")
    assert output.endswith("(… 99900 bytes more)")


async def test_command_that_takes_too_long_is_stopped_with_its_children(folder: Path) -> None:
    """The whole group: a shell's children would go on otherwise."""
    tools = FolderTools(folder, ToolLimits(command_timeout=0.3))
    command = "(sleep 1; touch survived) & echo begun; wait"
    with pytest.raises(ToolFailed, match=r"stopped\.\nbegun"):
        await tools.run("execute_command", {"command": command})
    await trio.sleep(1.2)
    assert os.listdir(folder) == []


async def test_cancelled_command_is_stopped_with_its_children(tools: FolderTools, folder: Path) -> None:
    """Ctrl-C leaves nothing running."""
    with trio.move_on_after(0.3):
        await tools.run("execute_command", {"command": "(sleep 1; touch survived) & wait"})
    await trio.sleep(1.2)
    assert os.listdir(folder) == []


def test_folder_must_exist(folder: Path) -> None:
    """A wrong folder is noticed at the start."""
    with pytest.raises(NotADirectoryError):
        FolderTools(folder / "none")

"""The command line: what it understands, what it prints, how it ends."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

import gateway
from gateway import cli
from gateway.commands import version
from gateway.commands.exit_codes import EXPLAINED, CommandFailed, ExitCode
from gateway.commands.running import expected_failure, run_until_stopped

COMMANDS = ("demo", "serve", "agent", "chat", "check-config", "check-agent", "dev-token", "bench", "version")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without settings, and an environment without any."""
    monkeypatch.chdir(tmp_path)
    for name in ("GATEWAY__INTERNAL_API_KEY", "OPENAI_API_KEY", "TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --------------------------------------------------------------------------- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Each command says what it does, shows an example of itself, and explains its exit codes."""
    code, out, _ = run(capsys, command, "--help")

    assert code == ExitCode.OK
    assert f"\n  gateway {command}" in out
    assert out.endswith(EXPLAINED)
    assert all(len(line) <= 110 for line in out.splitlines())


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """``gateway --help`` names each on a line."""
    _, out, _ = run(capsys, "--help")

    assert set(COMMANDS) <= {line.split()[0] for line in out.splitlines() if line.strip()}


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
    """Both ways to ask."""
    assert run(capsys, *arguments) == (0, f"gateway {gateway.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["serve", "--bind", "8000"],
        ["serve", "--bind", "127.0.0.1:99999"],
        ["agent", "--llm", "magic"],
        ["agent", "--token-delay", "-1"],
        ["check-agent"],
        ["check-agent", "not-a-url"],
        ["demo", "--chat", "--no-chat"],
        ["chat", "--session", "../etc"],
        ["chat", "--token-file", "missing.txt"],
    ],
    ids=" ".join,
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
    """Exit code 2, a reason, no traceback."""
    code, out, error = run(capsys, *arguments)

    assert code == ExitCode.USAGE
    assert "Traceback" not in error
    assert len(out + error) > 20


# --------------------------------------------------------------------------- check-config


def test_check_config_shows_what_is_in_force(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    """Values and where they came from, secrets masked."""
    monkeypatch.setenv("GATEWAY__INTERNAL_API_KEY", "hunter2-hunter2")
    (empty_folder / ".env").write_text("GATEWAY__LOG_LEVEL=DEBUG\n", "utf-8")

    code, out, error = run(capsys, "check-config", "--bind", "0.0.0.0:80")

    assert (code, error) == (ExitCode.OK, "")
    assert "hunter2" not in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("GATEWAY__")}
    assert lines["GATEWAY__LOG_LEVEL"] == ["DEBUG", ".env"]
    assert lines["GATEWAY__INTERNAL_API_KEY"] == ["********", "environment"]
    assert lines["GATEWAY__DETACH_GRACE"] == ["120", "default"]
    assert "Listens on 0.0.0.0:80; on sockets credentials are needed." in out


def test_check_config_names_all_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 78, every problem, nothing on standard output."""
    monkeypatch.setenv("GATEWAY__LOG_LEVEL", "LOUD")
    monkeypatch.setenv("GATEWAY__DETACH_GRASE", "5")

    code, out, error = run(capsys, "check-config")

    assert (code, out) == (ExitCode.CONFIG, "")
    assert "GATEWAY__LOG_LEVEL = 'LOUD'" in error
    assert "did you mean GATEWAY__DETACH_GRACE?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["serve", "agent", "check-agent http://127.0.0.1:9"])
def test_others_refuse_a_wrong_configuration_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """With the same code."""
    monkeypatch.setenv("GATEWAY__MAX_SOCKETS", "many")

    code, _, error = run(capsys, *command.split())

    assert code == ExitCode.CONFIG
    assert "GATEWAY__MAX_SOCKETS = 'many'" in error


# --------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("command", ["serve", "agent", "demo --no-chat"])
def test_address_in_use(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Exit code 1, the address, and what to do."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, error = run(capsys, *command.split(), "--bind", address)

    assert (code, out) == (ExitCode.FAILURE, "")
    assert f"Cannot listen on {address}: Address already in use" in error
    assert "--bind" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["serve", "agent", "demo --no-chat"])
def test_default_key_is_refused_where_others_can_connect(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Exit code 78, before anything listens."""
    code, _, error = run(capsys, *command.split(), "--bind", "0.0.0.0:0")

    assert code == ExitCode.CONFIG
    assert "GATEWAY__INTERNAL_API_KEY: is the default" in error


def test_store_that_cannot_be_opened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    """Exit code 1 and a reason."""
    (empty_folder / "file").write_text("not a folder", "utf-8")
    monkeypatch.setenv("GATEWAY__STORE_URL", "sqlite:///file/gateway.sqlite3")

    code, _, error = run(capsys, "serve", "--bind", "127.0.0.1:0")

    assert code == ExitCode.FAILURE
    assert "file/gateway.sqlite3" in error
    assert "Traceback" not in error


def test_agent_names_what_is_wrong_with_its_files(
    capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    """A policy that is no TOML is a wrong configuration."""
    (empty_folder / "policy.toml").write_text("[[", "utf-8")

    code, _, error = run(capsys, "agent", "--bind", "127.0.0.1:0", "--approvals", "policy.toml")

    assert code == ExitCode.CONFIG
    assert "policy.toml is not valid TOML" in error


def test_check_agent_with_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and the address."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]

    code, _, error = run(capsys, "check-agent", f"http://127.0.0.1:{port}")

    assert code == ExitCode.FAILURE
    assert f"Nothing answers at http://127.0.0.1:{port}" in error


def test_dev_token_for_a_shell(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    """``--no-serve`` prints a line to evaluate and ends."""
    code, out, _ = run(capsys, "dev-token", "--no-serve", "--directory", str(empty_folder / "keys"))

    assert code == ExitCode.OK
    assert out.startswith("export TOKEN=eyJ")


def test_dev_token_listens_on_loopback_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a reason."""
    code, _, error = run(capsys, "dev-token", "--directory", "keys", "--bind", "0.0.0.0:0")

    assert code == ExitCode.FAILURE
    assert "can be reached from other machines" in error


# --------------------------------------------------------------------------- ends


def test_bug_is_70_with_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody expected is shown whole."""

    def break_down(_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(version, "run", break_down)
    code, _, error = run(capsys, "version")

    assert code == ExitCode.SOFTWARE
    assert "Traceback" in error
    assert "RuntimeError: a bug" in error


def test_interrupted_command_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before a command has finished, and no traceback."""

    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(version, "run", interrupt)

    assert run(capsys, "version") == (ExitCode.INTERRUPTED, "", "")


def test_reader_that_has_gone_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gateway check-config | head -1`` ends quietly."""

    class ClosedPipe:
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    code = cli.main(["check-config"])

    assert code == ExitCode.OK
    assert capsys.readouterr().err == ""


async def test_command_failure_is_not_wrapped() -> None:
    """It leaves ``run_until_stopped`` as it was raised, not in a group."""

    async def work(_: object) -> int:
        raise CommandFailed("no", ExitCode.CONFIG)

    with pytest.raises(CommandFailed, match="no"):
        await run_until_stopped(work)


def test_expected_failure_is_found_in_groups() -> None:
    """One cause, however deep; two are not one, and other kinds are not expected."""
    error = OSError("in use")

    assert expected_failure(ExceptionGroup("", [ExceptionGroup("", [error])]), OSError) is error
    assert expected_failure(ExceptionGroup("", [error, error]), OSError) is None
    assert expected_failure(error, ValueError) is None

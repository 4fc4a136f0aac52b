"""What the reference agent writes to standard error."""

import logging
import subprocess
import sys

import pytest
import structlog

from gateway.reference_agent.log_output import log_to_stderr

_CRASH_WITH_RICH = """
import sys
from types import ModuleType
for name in ("rich", "rich.console", "rich.traceback"):
    sys.modules[name] = ModuleType(name)

class Traceback:
    @classmethod
    def from_exception(cls, *exc_info, **options):
        return f"locals shown: {options['show_locals']}"

class Console:
    def __init__(self, *, file, **options):
        self._file = file

    def print(self, traceback):
        self._file.write(traceback)

sys.modules["rich.console"].Console = Console
sys.modules["rich.traceback"].Traceback = Traceback
import structlog
assert structlog.dev.default_exception_formatter is not structlog.dev.plain_traceback
from gateway.reference_agent.log_output import log_to_stderr
log_to_stderr()
try:
    raise ValueError("a bug")
except ValueError:
    structlog.get_logger().exception("llm_call_failed")
"""


def test_a_crash_is_logged_without_variables_wherever_rich_is_installed() -> None:
    """They are what people wrote, and keys; the traceback itself is there."""
    run = subprocess.run(
        [sys.executable, "-c", _CRASH_WITH_RICH], capture_output=True, text=True, timeout=60, check=True
    )
    assert "locals shown" not in run.stderr
    assert "llm_call_failed" in run.stderr
    assert 'Traceback (most recent call last):\n  File "<string>"' in run.stderr
    assert run.stdout == ""


def test_less_than_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    """A demo is for its user, not for its log."""
    try:
        log_to_stderr(logging.WARNING)
        structlog.get_logger().info("started")
        structlog.get_logger().warning("slow")
    finally:
        structlog.reset_defaults()
    assert capsys.readouterr().err.count("\n") == 1

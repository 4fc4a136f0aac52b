"""How commands end, for scripts and service managers (``sysexits.h`` where it has a number for it)."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The exit status of every command."""

    OK = 0
    """Done; for servers: asked to stop, and drained."""
    FAILURE = 1
    """It could not do what was asked: address in use, store not to be opened, a check not met."""
    USAGE = 2
    """The command line is not understood."""
    SOFTWARE = 70
    """A bug: the traceback is on standard error. A service manager should restart it."""
    CONFIG = 78
    """The configuration cannot be used; starting again will not help."""
    INTERRUPTED = 130
    """Ctrl-C ended a command that had not finished (128 + SIGINT, as shells count)."""


EXPLAINED = """exit codes:
  0  done (servers: stopped and drained)      2  usage
  1  failed, the reason is on stderr         70  internal error, with a traceback
 78  the configuration cannot be used       130  interrupted before it was done
"""
"""The end of every ``--help``."""


class CommandFailed(Exception):
    """An expected failure: its text goes to standard error, without a traceback."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.code = code

"""Where the reference agent's log goes, and what of a crash is in it."""

import logging
import os
import sys

import structlog


def log_to_stderr(level: int = logging.NOTSET) -> None:
    """Write lines of ``level`` and above to standard error, for the whole process.

    Tracebacks come without the frames' variables, which are people's messages and the LLM's key: structlog
    shows those by itself wherever rich happens to be installed.
    """
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
        exception_formatter=structlog.dev.plain_traceback,
    )
    structlog.configure(
        processors=[*structlog.get_config()["processors"][:-1], renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )

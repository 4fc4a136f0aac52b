"""What a process has used so far, read from outside it (Linux)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


class CannotMeasure(Exception):
    """This machine, or this process, does not give its figures; the message says why and what to do."""


def check_platform() -> None:
    """Raises ``CannotMeasure`` where processes cannot be measured from outside."""
    if not sys.platform.startswith("linux"):
        raise CannotMeasure(
            "gateway bench reads CPU time and memory of another process from Linux; on "
            f"{sys.platform} run it in a Linux container or virtual machine."
        )


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, in nanosecond steps. Raises ``CannotMeasure``.

    The clock id is the kernel's (``clock_getcpuclockid(3)``). /proc/PID/stat has the same figure in steps of
    10 ms, and /proc/PID/schedstat that of one thread only.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError as error:
        raise CannotMeasure(f"no process {pid} whose CPU time could be read: {error.strerror}") from None


def resident_kilobytes(pid: int) -> int:
    """Resident memory of a process in KiB. Raises ``CannotMeasure``."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
        return int(status.partition("VmRSS:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        raise CannotMeasure(f"no process {pid} whose memory could be read; is it still running?") from None


def open_descriptors(pid: int) -> int:
    """How many file descriptors a process has open. Raises ``CannotMeasure``."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise CannotMeasure(f"no process {pid} whose descriptors could be read: {error.strerror}") from None

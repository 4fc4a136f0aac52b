"""Starts the LLM spool as a process that outlives this one."""

import os
import sys

from gateway.reference_agent.settings import LLM_KEY_VARIABLE, AgentSettings


class SpoolProcess:
    """A process that was started; once it is seen to have ended, it is no zombie any more."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def exit_code(self) -> int | None:
        """How it has ended (negative: by which signal), None while it runs. Never blocks."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                # Whoever started us ignores SIGCHLD, and that is inherited: how it ended is not kept.
                pid, status = self.pid, 0
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def start_spool(db: str, settings: AgentSettings) -> SpoolProcess:
    """Start a spool as a process in a session of its own, so that no signal to ours reaches it.

    The LLM's key is in its environment and nowhere else; the gateway's secrets are not. Raises `OSError`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY__")}
    environment.pop(LLM_KEY_VARIABLE, None)
    if settings.llm_key:
        environment[LLM_KEY_VARIABLE] = settings.llm_key
    # -P and the path of this process: the current folder may be a project that somebody else wrote.
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    program = [sys.executable, "-P", "-m", "gateway.reference_agent.llm_spool_process"]
    nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
    pid = os.posix_spawn(
        sys.executable,
        [*program, "--db", db, "--llm-url", settings.llm_url, "--keep", str(settings.llm_keep)],
        environment,
        file_actions=nothing,
        setsid=True,
    )
    return SpoolProcess(pid)

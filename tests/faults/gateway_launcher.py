"""Starts gateways quickly: a process that has imported the gateway's code once and forks for each start.

A cold start is 0.5 s of CPU, nearly all of it imports (Quart with Flask, Werkzeug and Jinja2 0.2 s, PyJWT
with cryptography 0.09 s, Trio 0.09 s, httpx 0.06 s); a fork is 5 ms. What runs in the fork is the command
``gateway serve`` from its beginning, in a process of its own. With ``--cold`` it is executed anew instead.

Reads lines from standard input: ``start LOGFILE`` starts one and prints its pid, what it prints itself
follows; ``reap PID`` waits for it and prints its exit code. At end of input everything it started is killed.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Obey standard input until it ends."""
    is_cold, command = sys.argv[1] == "--cold", sys.argv[2:]
    if not is_cold:
        import gateway.adapters.stores.redis
        import gateway.cli
    children: set[int] = set()
    try:
        while line := sys.stdin.readline():
            verb, argument = line.split()
            if verb == "reap":
                _, status = os.waitpid(int(argument), 0)
                children.discard(int(argument))
                _say(f"exit {os.waitstatus_to_exitcode(status)}")
                continue
            pid = os.fork()
            if pid == 0:
                _become_a_command(argument)
                if is_cold:
                    os.execv(sys.executable, [sys.executable, "-m", "gateway", *command])
                os._exit(_run(gateway.cli.main, command))
            children.add(pid)
            _say(f"pid {pid}")
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return 0


def _say(line: str) -> None:
    # One write, so that it does not mix with what a child says at the same time.
    os.write(1, f"{line}\n".encode())


def _become_a_command(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(errors, 2)
    os.close(nothing)
    os.close(errors)


def _run(command: object, arguments: list[str]) -> int:
    assert callable(command)
    code = 70
    try:
        code = int(command(arguments))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())

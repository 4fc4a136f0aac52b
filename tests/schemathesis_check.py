"""The REST contract against a real gateway and agent: ``python -m tests.schemathesis_check PATH_TO_ST``.

Schemathesis stands in an environment of its own (``pip install schemathesis`` into a fresh venv; its program
``st`` is the argument): it is a program here, not a library. What it makes of ``/openapi.json`` must bring no
5xx, and no answer that the document does not describe. Further arguments go to ``st run``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.end_to_end.processes import running_agent, running_gateway

KEY = "key-of-the-schemathesis-check"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "ignored_auth,response_headers_conformance"
)


def main() -> int:
    """Run; its exit code."""
    program, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (
            running_agent(place) as agent,
            running_gateway(place, agent.url, INTERNAL_API_KEY=KEY) as gateway,
        ):
            command = [
                *(program, "run", f"{gateway.url}/openapi.json", "--header", f"X-Internal-Auth: {KEY}"),
                *("--checks", CHECKS, "--no-color", "--seed", "1", "--max-examples", "10", *options),
            ]
            done = subprocess.run(
                command, cwd=folder, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            crashed = [line for line in gateway.log.splitlines() if '"rest_request_failed"' in line]
    failed = done.returncode != 0 or bool(crashed)
    if failed:
        sys.stdout.write(done.stdout + done.stderr)
        sys.stdout.writelines(f"{line}\n" for line in crashed[:5])
    # Not its own summary: whoever looks for a test runner's last line would take that for one without tests.
    counted = re.search(r"\d+ generated, .*", done.stdout)
    sys.stdout.write(f"schemathesis: {counted[0] if counted else 'it counted nothing'}\n")
    return int(failed or counted is None)


if __name__ == "__main__":
    sys.exit(main())

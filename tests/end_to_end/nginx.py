"""Debian's nginx with the configuration of the deployment."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from tests.end_to_end.processes import ROOT, eventually
from tests.end_to_end.requirements import need_program

NODES_FILE = "/etc/nginx/gateway-nodes.conf"
"""What nginx.conf includes, and compose.yaml puts there."""


@contextmanager
def running_nginx(
    folder: Path, gateways: Mapping[str, str], nodes: Path = ROOT / "nginx" / "one-node.conf"
) -> Iterator[str]:
    """nginx with the repository's configuration, only addresses and folders replaced; its address.

    ``gateways``: by name and port as ``nodes`` has them, where they really are.
    """
    nginx = need_program("nginx", "apt-get install nginx-light")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    upstream = _replaced(
        nodes.read_text("utf-8"), {f"server {name} ": f"server {there} " for name, there in gateways.items()}
    )
    (folder / "nodes.conf").write_text(upstream, "utf-8")
    configuration = _replaced(
        (ROOT / "nginx.conf").read_text("utf-8"),
        {
            "listen 8080": f"listen {address}",
            "/tmp/": f"{folder}/",
            "error_log /dev/stderr": f"error_log {folder}/error.log",
            "worker_processes auto": "worker_processes 1",
            # After /tmp/, for the folder may be there.
            f"include {NODES_FILE}": f"include {folder}/nodes.conf",
        },
    )
    (folder / "nginx.conf").write_text(configuration, "utf-8")
    # As root, its workers would become somebody who may not write into the test's folder.
    directives = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", directives]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with (folder / "nginx.out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        eventually(lambda: _accepts(address) or process.poll() is not None)
        assert process.poll() is None, (folder / "nginx.out").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(20)


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    for what, by in replacements.items():
        assert what in text
        text = text.replace(what, by)
    return text


def _accepts(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True

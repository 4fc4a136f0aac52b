"""A gateway and an agent that tests share; who kills or configures one starts one of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.processes import Process, running_agent, running_gateway
from tests.end_to_end.requirements import missing, need_program


@pytest.fixture(scope="package")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """``gateway agent``, for all tests of this package."""
    with running_agent(tmp_path_factory.mktemp("agent")) as process:
        yield process


@pytest.fixture(scope="package")
def gateway(agent: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """``gateway serve`` on SQLite before that agent."""
    with running_gateway(tmp_path_factory.mktemp("gateway"), agent.url) as process:
        yield process


@pytest.fixture(scope="package")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Node's ``ws``."""
    npm = need_program("npm", "apt-get install nodejs npm")
    need_program("node", "apt-get install nodejs")
    folder = tmp_path_factory.mktemp("node")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), "ws@8.18.3"]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if installed.returncode != 0:
        missing(f"npm could not install ws: {installed.stderr[-300:]}")
    return folder / "node_modules"

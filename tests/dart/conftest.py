"""A Dart, a gateway and an agent for the tests of this package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dart.toolchain import Dart, need_dart
from tests.end_to_end.processes import Process, running_agent, running_gateway


@pytest.fixture(scope="package")
def dart(tmp_path_factory: pytest.TempPathFactory) -> Dart:
    """Compiler and virtual machine."""
    return need_dart(tmp_path_factory.mktemp("dart"))


@pytest.fixture(scope="package")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """``gateway serve`` before ``gateway agent``, which takes its time between tokens."""
    folder = tmp_path_factory.mktemp("gateway")
    with (
        running_agent(folder, "--token-delay", "0.002") as agent,
        running_gateway(folder, agent.url, RATE_UPGRADES_PER_MINUTE="0") as process,
    ):
        yield process

"""What the documentation says is what the code does."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from gateway import cli
from gateway.adapters.rest.routes import PROXY_ROUTES
from gateway.commands.exit_codes import EXPLAINED, ExitCode
from gateway.config import variable
from gateway.core import errors
from gateway.core.metrics import METRICS
from gateway.core.turn_states import Outcome, mermaid
from gateway.core.websocket_protocol import CloseCode, Dialect
from gateway.settings import SECRETS, Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs/protocol.md").read_text("utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text("utf-8")
DEPENDENCIES = (ROOT / "docs/decisions/0001-dependencies.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DEPLOYMENT = [ROOT / name for name in ("Dockerfile", "compose.yaml", "nginx.conf", "hypercorn.toml")]
DEPLOYMENT += sorted([*(ROOT / "nginx").glob("*.conf"), *(ROOT / "docs").rglob("*.yaml")])


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, without its head."""
    lines = page.partition(f"\n{heading}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table]


def all_errors(base: type[errors.GatewayError] = errors.GatewayError) -> Iterator[type[errors.GatewayError]]:
    """The whole tree."""
    yield base
    for leaf in base.__subclasses__():
        yield from all_errors(leaf)


# --------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files of the repository, and headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", [*PAGES, *DEPLOYMENT], ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    """Every ``GATEWAY__`` name is one that is read."""
    known = {variable(field.name) for field in attrs.fields(Settings)}
    known |= {f"{variable(name)}_FILE" for name in SECRETS}
    named = set(re.findall(r"GATEWAY__[A-Z_]*[A-Z]", page.read_text("utf-8")))

    assert named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_json_examples_are_json(page: Path) -> None:
    """What is marked as JSON can be parsed."""
    for example in re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        json.loads(example)


def test_diagram_of_the_turn_is_the_table() -> None:
    """docs/architecture.md shows the transitions as they are."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")

    assert f"```mermaid\n{mermaid()}\n```" in page


# --------------------------------------------------------------------------- protocol


def test_every_error_is_documented() -> None:
    """By code, and with whether it is retryable."""
    documented = {cells[0].strip("`"): cells[1] for cells in rows(PROTOCOL, "## Errors")}
    expected = {
        error.code: "for 5xx" if error is errors.AgentRefused else ("yes" if error.retryable else "no")
        for error in all_errors()
        if error is not errors.AgentFailure
    }

    assert documented == expected


def test_every_close_code_is_documented() -> None:
    """And no other."""
    documented = {int(cells[0]) for cells in rows(PROTOCOL, "## Close codes")}

    assert documented == {int(code) for code in CloseCode}


def test_every_route_is_documented() -> None:
    """Of REST, and the dialects and outcomes of sockets."""
    documented = {cells[0].strip("`") for cells in rows(PROTOCOL, "## REST")}

    assert documented == {f"{route.method} {route.public_path}" for route in PROXY_ROUTES}
    for word in [dialect.value for dialect in Dialect if dialect.is_v2] + [
        outcome.value for outcome in Outcome
    ]:
        assert f"`{word}`" in PROTOCOL


# --------------------------------------------------------------------------- README, operations


def test_readme_has_the_two_commands() -> None:
    """One to try it, one to test it: each a line that sets up everything."""
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv ")]

    assert [command.rpartition("/")[2] for command in commands] == ["gateway demo", "pytest"]
    assert all("-c constraints.txt" in command for command in commands)


def test_readme_names_every_command() -> None:
    """In its table, but for ``version``."""
    documented = {re.findall(r"gateway ([a-z-]+)", cells[0])[0] for cells in rows(README, "## The parts")}
    there = {inspect.getmodulename(command.__file__ or "") for command in cli.COMMANDS}

    assert documented == {str(name).replace("_", "-") for name in there} - {"version"}


def test_readme_shows_settings_as_they_are() -> None:
    """Names and defaults."""
    fields = {variable(field.name): str(field.default) for field in attrs.fields(Settings)}
    for name, default, _ in rows(README, "## Settings"):
        assert fields[name.strip("`")] == default.strip("`").replace("empty", ""), name


def test_exit_codes_are_documented() -> None:
    """In docs/operations.md (130 is for no server), and in every ``--help``."""
    documented = {int(cells[0]) for cells in rows(OPERATIONS, "## Exit codes")}

    assert documented == {int(code) for code in ExitCode} - {ExitCode.INTERRUPTED}
    assert {int(number) for number in re.findall(r"\b\d+\b", EXPLAINED)} == {int(code) for code in ExitCode}


def test_metrics_and_log_events_exist() -> None:
    """Those that docs/operations.md names."""
    names = {metric.name for metric in METRICS}
    source = "".join(path.read_text("utf-8") for path in (ROOT / "gateway").rglob("*.py"))

    assert set(re.findall(r"\bgateway_[a-z_]+", OPERATIONS)) <= names
    for cells in rows(OPERATIONS, "## Logs"):
        for event in re.findall(r"`([a-z_]+)`", cells[0]):
            assert f'"{event}"' in source, event


# --------------------------------------------------------------------------- dependencies


def requirements() -> list[Requirement]:
    """All that the project asks for, itself left out."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    return [found for text in texts if (found := Requirement(text)).name != project["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_bound_is_explained_and_tested(requirement: Requirement) -> None:
    """Each dependency has its row, with the same bound, and the tested version is within it."""
    documented = {cells[0]: SpecifierSet(cells[1]) for cells in rows(DEPENDENCIES, "## Decision")}
    name = next(name for name in documented if canonicalize_name(name) == canonicalize_name(requirement.name))
    assert documented[name] == requirement.specifier
    assert "<" in str(requirement.specifier), "without an upper bound the next major version comes by itself"
    pins = pinned()
    if canonicalize_name(requirement.name) != "hatchling":  # pip builds in an environment of its own
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_no_dependency_is_only_documented() -> None:
    """The table outlives nothing."""
    documented = {canonicalize_name(cells[0]) for cells in rows(DEPENDENCIES, "## Decision")}

    assert documented == {canonicalize_name(requirement.name) for requirement in requirements()}


def pinned() -> dict[str, Version]:
    """What ``constraints.txt`` says; every line of it must be one exact version."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(separator for _, separator, _ in pins)
    return {canonicalize_name(name): Version(version) for name, _, version in pins}


# --------------------------------------------------------------------------- deployment


def test_deployment_agrees_with_the_settings() -> None:
    """Proxy, container and gateway have limits that follow from each other."""
    nginx = (ROOT / "nginx.conf").read_text("utf-8")
    compose = (ROOT / "compose.yaml").read_text("utf-8")
    hypercorn = tomllib.loads((ROOT / "hypercorn.toml").read_text("utf-8"))
    settings = Settings()

    for nodes in (ROOT / "nginx").glob("*.conf"):
        assert _seconds(nodes.read_text("utf-8"), "keepalive_timeout") < hypercorn["keep_alive_timeout"]
    assert _seconds(nginx, "proxy_read_timeout") > settings.request_timeout
    assert int(re.findall(r"client_max_body_size (\d+)m;", nginx)[0]) << 20 > settings.max_message_bytes
    assert int(re.findall(r"stop_grace_period: (\d+)s", compose)[0]) > settings.drain_timeout


def test_container_is_built_of_what_it_may_see() -> None:
    """What the Dockerfile copies is what .dockerignore lets through; it runs as nobody special."""
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, flags=re.MULTILINE)
        for name in line.split()
    }
    last_stage = dockerfile.rpartition("\nFROM ")[2]

    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert "-c constraints.txt" in dockerfile
    assert re.search(r"^USER gateway$", last_stage, flags=re.MULTILINE)
    assert "HEALTHCHECK" in last_stage
    assert "apt-get" not in dockerfile


def _seconds(text: str, name: str) -> int:
    return int(re.findall(rf"{name} (\d+)s;", text)[0])

"""The layers of docs/architecture.md, held by reading every import of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "gateway").rglob("*.py"))

MAY_IMPORT = {
    "core": {"core"},
    "node_ports": {"core"},
    "operator_ports": {"core"},
    "trace_ports": {"core"},
    "ports": {"node_ports", "core"},
    "engine": {"engine", "ports", "node_ports", "trace_ports", "core"},
    # Settings are plain values: what a route shows or bounds comes from there.
    "adapters": {"adapters", "ports", "node_ports", "operator_ports", "trace_ports", "core", "settings"},
    "config_values": set[str](),
    "config_files": set[str](),
    "settings": {"config_values"},
    "config": {"settings", "config_files", "config_values"},
    "config_docs": {"config", "settings"},
    "engine_limits": {"core", "settings"},
    # The composition roots: the only ones that know the engine and the adapters.
    "app": {"engine", "adapters", "ports", "node_ports", "core", "config", "config_values", "settings"}
    | {"engine_limits"},
    "asgi": {"app", "adapters", "config", "ports", "core"},
    "reference_agent": {"reference_agent", "core"},
    "client": {"client", "core"},
    "chat": {"client", "chat_calls", "chat_terminal", "chat_tools"},
    "chat_calls": {"client", "chat_terminal", "chat_tools"},
    "chat_terminal": set[str](),
    "chat_tools": set[str](),
    # It measures from outside, whatever is measured.
    "bench": {"bench", "core"},
    "demo": {"app", "config", "settings", "reference_agent"},
    "dev_token": {"core", "settings"},
    "commands": {"commands", "app", "demo", "chat", "dev_token", "reference_agent", "config", "config_files"}
    | {"bench", "workers", "core"},
    "workers": {"workers", "adapters", "ports", "node_ports", "core", "config"},
    # A process of `gateway serve --workers`, from its start on.
    "worker": {"workers", "app", "commands", "core"},
    "cli": {"commands"},
    "__main__": {"cli"},
}
"""By part (a package or module right below ``gateway``). Everybody may ask ``gateway`` for its version."""

ADAPTER_FAMILIES = (
    # The port that clients connect to: streams, request heads, sockets, hypercorn.
    {
        "direct_stream",
        "front_door",
        "guarded_wsproto",
        "hypercorn_connection",
        "permessage_deflate",
        "websocket",
    },
    # The connection to the Agent Runtime.
    {"readiness", "silence_watch", "sse_agent", "streaming_transport", "tcp_stream"},
    # Traces, and the packages behind them.
    {"opentelemetry_traces", "traces"},
)
"""Adapters of one outside thing that are made of parts. ``rest`` and ``stores`` are packages; all others
stand alone."""

CORE_MAY_IMPORT = frozenset(
    [
        "__future__",
        "abc",
        "array",
        "attrs",
        "base64",
        "binascii",
        "cattrs",
        "collections",
        "contextlib",
        "enum",
        "functools",
        "hashlib",
        "httptools",
        "ipaddress",
        "itertools",
        "json",
        "math",
        "msgspec",
        "operator",
        "orjson",
        "re",
        "string",
        "struct",
        "types",
        "typing",
        "zlib",
    ]
)
"""Nothing that reads a clock, draws lots, waits, or touches anything outside. Besides: ``urllib.parse`` and
``http.HTTPStatus``."""

ENGINE_MAY_IMPORT = frozenset(
    [
        "__future__",
        "attrs",
        "collections",
        "contextlib",
        "enum",
        "functools",
        "itertools",
        "math",
        "random",
        "trio",
        "typing",
        "urllib",
    ]
)
"""No library but Trio. Of ``random`` only the type: where it is made is for ``app`` to say."""

MOST_LINES = 400

COMMANDS_SHARE = {"exit_codes", "parsers", "running"}


def name_of(path: Path) -> str:
    """``gateway.core.session`` for a path."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """The full names of the modules, or of what is in them, that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """The part a module belongs to; empty for ``gateway`` itself."""
    segments = name.split(".")
    return segments[1] if len(segments) > 1 and segments[1] in MAY_IMPORT else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_inner_layers(path: Path) -> None:
    """A module imports its own layer and those below it, nothing else."""
    part = part_of(name_of(path))
    if not part:
        assert name_of(path) == "gateway", f"say in MAY_IMPORT what {name_of(path)} may import"
    used = {part_of(name) for name in imports_of(path) if name.split(".")[0] == "gateway"}

    assert used - {""} <= MAY_IMPORT.get(part, set())


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(name_of(path)) == "adapters"], ids=name_of
)
def test_adapters_stand_alone(path: Path) -> None:
    """An adapter imports another only within its own package, or its family of parts."""

    def family(name: str) -> object:
        module = name.split(".")[2]
        return next((number for number, members in enumerate(ADAPTER_FAMILIES) if module in members), module)

    if name_of(path) == "gateway.adapters":
        assert not list(imports_of(path))
        return
    others = {name for name in imports_of(path) if name.startswith("gateway.adapters.")}

    strangers = {name for name in others if family(name) != family(name_of(path))}
    assert not strangers, "an adapter of another thing, or a part that ADAPTER_FAMILIES does not name yet"


def test_families_name_modules_that_exist() -> None:
    """A family does not outlive its members."""
    for member in set[str]().union(*ADAPTER_FAMILIES):
        assert (ROOT / "gateway" / "adapters" / f"{member}.py").exists(), member


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(name_of(path)) == "core"], ids=name_of)
def test_core_is_pure(path: Path) -> None:
    """The core imports nothing that waits, asks or tells anybody outside."""
    outside = {
        name
        for name in imports_of(path)
        if name.split(".")[0] not in CORE_MAY_IMPORT | {"gateway"}
        and not f"{name}.".startswith("urllib.parse.")
        and name != "http.HTTPStatus"
    }

    assert not outside


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(name_of(path)) == "engine"], ids=name_of
)
def test_engine_knows_no_library_but_trio(path: Path) -> None:
    """What the engine needs from outside comes through ports."""
    assert {name.split(".")[0] for name in imports_of(path)} <= ENGINE_MAY_IMPORT | {"gateway"}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if name_of(path).startswith("gateway.commands.")], ids=name_of
)
def test_commands_do_not_know_each_other(path: Path) -> None:
    """Commands share only what is named for sharing."""
    used = {name.split(".")[2] for name in imports_of(path) if name.startswith("gateway.commands.")}

    assert used <= COMMANDS_SHARE


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_has_one_job(path: Path) -> None:
    """No module is longer than somebody can keep in mind."""
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_happens_at_import(path: Path) -> None:
    """A module defines: no call for its effect, no loop, no file, no clock, no environment, no chance."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        where = f"{path.name}:{node.lineno}"
        assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try | ast.Assert | ast.Delete), where
        assert not (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)), where
        if isinstance(node, ast.Assign | ast.AnnAssign):
            assert not _effects(node), where


def _effects(statement: ast.stmt) -> set[str]:
    """What a module-level assignment calls or reads of the world outside."""
    outside = {"open", "os", "random", "secrets", "socket", "subprocess", "threading", "time", "trio", "uuid"}
    calls = {ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}
    environment = {"os" for node in ast.walk(statement) if ast.unparse(node) == "os.environ"}
    return environment | {call.partition(".")[0] for call in calls} & outside


def test_the_rules_catch_what_they_forbid(tmp_path: Path) -> None:
    """A broken rule is seen: the checks above are not vacuous."""
    offender = tmp_path / "offender.py"
    offender.write_text("import trio\nfrom gateway.engine.hub import Hub\n", "utf-8")

    assert list(imports_of(offender)) == ["trio", "gateway.engine.hub.Hub"]
    assert part_of("gateway.engine.hub.Hub") == "engine"
    assert part_of("gateway.engine.hub.Hub") not in MAY_IMPORT["core"]
    assert _effects(ast.parse("started = time.time()").body[0]) == {"time"}

"""Settings from the environment, ``.env``, secret files and ``hypercorn.toml``: all checked at once."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import environ

from gateway.config_files import UnreadableFile, parse_dotenv, read_secret, read_text, read_toml
from gateway.config_values import check_bind, is_loopback_bind
from gateway.settings import DEFAULT_INTERNAL_API_KEY, PREFIX, SECRETS, Settings

__all__ = [
    "ConfigError",
    "Configuration",
    "Problem",
    "SettingRow",
    "Settings",
    "describe",
    "load_configuration",
]

DEFAULT_BIND = "127.0.0.1:8000"
"""hypercorn's own default: only this machine can connect."""
_MASK = "********"


@attrs.frozen
class Problem:
    """One thing that is wrong with the configuration; holds no secret."""

    setting: str
    """The environment variable, or the file."""
    value: str | None
    """What it is set to, masked when it is a secret; None when the value is not the point."""
    meaning: str
    """What is wrong and what is allowed."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value}"
        return f"{self.setting}{value}: {self.meaning}"


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` are all of them; the text lists them, one per line."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"The configuration has {len(problems)} {noun}:{lines}")
        self.problems = problems


@attrs.frozen
class Configuration:
    """The settings in force, where each came from, and where to listen."""

    settings: Settings
    binds: tuple[str, ...]
    """HOST:PORT, [IPv6]:PORT, unix:PATH or fd://N: at least one."""
    hypercorn: Mapping[str, Any]
    """Content of ``hypercorn.toml``; empty when there is none."""
    sources: Mapping[str, str]
    """By field name: ``environment``, ``default``, or the file that the value came from."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return all(is_loopback_bind(bind) for bind in (*self.binds, *_further_binds(self.hypercorn)))

    @property
    def anonymous_sockets(self) -> bool:
        """Whether a socket needs no credentials (protocol.md section 7)."""
        return not self.settings.use_jwt_auth and (self.is_loopback or self.settings.allow_anonymous_ws)


@attrs.frozen
class SettingRow:
    """One line of ``gateway check-config`` and of the table in ``docs/configuration.md``."""

    name: str
    value: str
    source: str
    default: str
    meaning: str


def load_configuration(
    environment: Mapping[str, str],
    *,
    dotenv: Path | None = Path(".env"),
    bind: str | None = None,
    workers: str | None = None,
) -> Configuration:
    """Read everything and check everything.

    A value comes from ``environment``, else from the file ``dotenv`` (if there is one), else the default;
    a secret may be in the file that ``GATEWAY__<NAME>_FILE`` names. ``bind`` (``--bind``) goes before
    ``GATEWAY__BIND``, which goes before ``hypercorn.toml``; ``workers`` (``--workers``) goes before
    ``GATEWAY__WORKERS``. Raises ``ConfigError`` with every problem.
    """
    problems: list[Problem] = []
    given = _gather(environment, dotenv, problems)
    texts = _resolve_secret_files(given, problems)
    if workers is not None:
        texts["workers"] = workers, "--workers"
    settings = _convert(texts, problems)
    sources = {name: source for name, (_, source) in texts.items()}
    settings = _reconcile(settings, sources, problems)
    hypercorn = _read_hypercorn(settings.hypercorn_config, problems)
    binds = _merge_binds(settings, hypercorn, bind, problems)
    configuration = Configuration(
        settings=settings,
        binds=binds,
        hypercorn=hypercorn,
        sources=MappingProxyType(
            {field.name: sources.get(field.name, "default") for field in attrs.fields(Settings)}
        ),
    )
    blamed = {problem.setting for problem in problems}
    problems += [danger for danger in _dangers(configuration) if danger.setting not in blamed]
    if problems:
        raise ConfigError(tuple(problems))
    return configuration


def describe(configuration: Configuration) -> tuple[SettingRow, ...]:
    """Every setting with its value in force, secrets masked."""
    return tuple(
        SettingRow(
            name=variable(field.name),
            value=_shown(field.name, getattr(configuration.settings, field.name)),
            source=configuration.sources[field.name],
            default=str(field.default),
            meaning=field.metadata["environ_config"].help,
        )
        for field in attrs.fields(Settings)
    )


def variable(field_name: str) -> str:
    """The environment variable of a field of ``Settings``."""
    return PREFIX + field_name.upper()


# --------------------------------------------------------------------------- reading


def _gather(
    environment: Mapping[str, str], dotenv: Path | None, problems: list[Problem]
) -> dict[str, tuple[str, str]]:
    """Text and source by variable name, the environment before ``.env``; unknown names are problems."""
    given: dict[str, tuple[str, str]] = {}
    if dotenv is not None and dotenv.exists():
        try:
            values, complaints = parse_dotenv(read_text(dotenv))
        except UnreadableFile as error:
            values, complaints = {}, [str(error)]
        problems += [Problem(str(dotenv), None, complaint) for complaint in complaints]
        given |= {name: (value, str(dotenv)) for name, value in values.items()}
    given |= {name: (value, "environment") for name, value in environment.items()}
    given = {name: pair for name, pair in given.items() if name.upper().startswith(PREFIX)}
    known = [variable(field.name) for field in attrs.fields(Settings)]
    known += [f"{variable(name)}_FILE" for name in sorted(SECRETS)]
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name.upper(), known, n=1)
        advice = f"; did you mean {near[0]}?" if near else "; docs/configuration.md lists all"
        problems.append(Problem(name, None, f"there is no such setting{advice}"))
    return given


def _resolve_secret_files(
    given: Mapping[str, tuple[str, str]], problems: list[Problem]
) -> dict[str, tuple[str, str]]:
    """Text and source by field name, ``…_FILE`` replaced by what is in the file."""
    texts: dict[str, tuple[str, str]] = {}
    for field in attrs.fields(Settings):
        name = variable(field.name)
        if name in given:
            texts[field.name] = given[name]
        if field.name not in SECRETS or f"{name}_FILE" not in given:
            continue
        path, _ = given[f"{name}_FILE"]
        if name in given:
            problems.append(Problem(f"{name}_FILE", path, f"set either this or {name}, not both"))
            continue
        try:
            texts[field.name] = read_secret(Path(path)), path
        except UnreadableFile as error:
            problems.append(Problem(f"{name}_FILE", None, str(error)))
    return texts


def _convert(texts: Mapping[str, tuple[str, str]], problems: list[Problem]) -> Settings:
    """Settings from all texts that convert; the others are problems and keep their default."""
    good: dict[str, str] = {}
    for field in attrs.fields(Settings):
        if field.name not in texts:
            continue
        value, source = texts[field.name]
        convert: Any = field.converter
        try:
            convert(value)
        except ValueError as error:
            shown = _MASK if field.name in SECRETS else repr(value[:100])
            problems.append(Problem(variable(field.name), f"{shown} ({source})", str(error)))
        else:
            good[variable(field.name)] = value
    return environ.to_config(Settings, good)


def _read_hypercorn(name: str, problems: list[Problem]) -> Mapping[str, Any]:
    if name == attrs.fields(Settings).hypercorn_config.default and not Path(name).exists():
        return MappingProxyType({})
    try:
        return MappingProxyType(dict(read_toml(Path(name))))
    except UnreadableFile as error:
        problems.append(Problem(variable("hypercorn_config"), None, str(error)))
        return MappingProxyType({})


def _merge_binds(
    settings: Settings, hypercorn: Mapping[str, Any], override: str | None, problems: list[Problem]
) -> tuple[str, ...]:
    source = "--bind"
    binds: tuple[str, ...] = (override,) if override is not None else settings.bind
    if not binds:
        source = settings.hypercorn_config
        binds = _as_binds(hypercorn.get("bind", ())) or (DEFAULT_BIND,)
    for bind in binds:
        try:
            check_bind(bind)
        except ValueError as error:
            problems.append(Problem(source, repr(bind), f"a bind {error}"))
    return binds


def _further_binds(hypercorn: Mapping[str, Any]) -> tuple[str, ...]:
    """Where plain hypercorn listens besides ``bind``."""
    return _as_binds(hypercorn.get("insecure_bind", ())) + _as_binds(hypercorn.get("quic_bind", ()))


def _as_binds(value: object) -> tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(str(item) for item in value)
    return (str(value),)


# --------------------------------------------------------------------------- checking


def _reconcile(settings: Settings, sources: Mapping[str, str], problems: list[Problem]) -> Settings:
    """Settings of which one bounds another: two that were set must agree, a default follows what was set."""
    for smaller, larger, why in (
        ("ws_merge_bytes", "ws_unacked_bytes", "merging comes before pacing"),
        ("max_event_bytes", "replay_bytes", "one event must fit into a session's log"),
        ("replay_bytes", "replay_total_bytes", "one session's log must fit into the memory of all"),
        ("detach_grace", "replay_retention", "a turn's events are kept while it may go on unwatched"),
    ):
        small, large = getattr(settings, smaller), getattr(settings, larger)
        if small <= large:
            continue
        if larger not in sources:
            settings = attrs.evolve(settings, **{larger: small})
        elif smaller not in sources:
            settings = attrs.evolve(settings, **{smaller: large})
        else:
            limit = f"{variable(larger)} ({_shown(larger, large)})"
            problems.append(
                Problem(variable(smaller), _shown(smaller, small), f"must not be over {limit}: {why}")
            )
    return settings


def _dangers(configuration: Configuration) -> list[Problem]:
    """What would let somebody in, or looks as if it did."""
    settings = configuration.settings
    problems: list[Problem] = []
    if settings.internal_api_key == DEFAULT_INTERNAL_API_KEY and not configuration.is_loopback:
        problems.append(
            Problem(
                variable("internal_api_key"),
                None,
                f"is the default, which everybody knows, while other machines can reach "
                f"{', '.join(configuration.binds)}; set a secret one, or bind to 127.0.0.1",
            )
        )
    if settings.workers > 1 and not settings.store_url.startswith("redis"):
        problems.append(
            Problem(
                variable("workers"),
                str(settings.workers),
                f"needs Redis: workers are processes that share sessions through the store, while "
                f"{_shown('store_url', settings.store_url)} belongs to one process; set "
                f"{variable('store_url')}=redis://HOST:PORT/0, or leave this at 1",
            )
        )
    if settings.allow_anonymous_ws and settings.use_jwt_auth:
        problems.append(
            Problem(
                variable("allow_anonymous_ws"),
                "true",
                f"has no meaning with {variable('use_jwt_auth')}=true, where every socket needs a token; "
                f"unset one of them",
            )
        )
    if settings.traces != "off" and not _can_trace():
        problems.append(
            Problem(
                variable("traces"),
                settings.traces,
                "needs OpenTelemetry, which is not installed: pip install 'codelab-gateway[otel]'",
            )
        )
    return problems


def _can_trace() -> bool:
    """Whether the packages of the extra ``otel`` are there."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _shown(field_name: str, value: object) -> str:
    """A value as a person may see it."""
    if field_name == "store_url":
        masked = re.sub(r"(://[^/@]*:)[^/]*@", rf"\1{_MASK}@", str(value))
        return re.sub(r"(sentinel_password=)[^&]*", rf"\1{_MASK}", masked)
    if field_name in SECRETS:
        return _MASK
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)

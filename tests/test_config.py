"""Settings: where they come from, what is refused, and that every one of them is documented."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest

from gateway.config import ConfigError, Configuration, describe, load_configuration, variable
from gateway.settings import DEFAULT_INTERNAL_API_KEY, SECRETS, Settings

SECRET = "s3cr3t-of-operator"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _load(bind: str | None = None, **texts: str) -> Configuration:
    return load_configuration({f"GATEWAY__{name}": text for name, text in texts.items()}, bind=bind)


def _problems(bind: str | None = None, **texts: str) -> Mapping[str, str]:
    with pytest.raises(ConfigError) as caught:
        _load(bind, **texts)
    return {problem.setting: str(problem) for problem in caught.value.problems}


def test_needs_nothing() -> None:
    """Without any setting the defaults are in force, on loopback."""
    configuration = _load()

    assert configuration.settings == Settings()
    assert configuration.binds == ("127.0.0.1:8000",)
    assert set(configuration.sources.values()) == {"default"}


def test_defaults_are_those_of_the_specification() -> None:
    """The defaults that users were promised."""
    settings = Settings()

    assert settings.internal_api_key == "change-me-internal-key"
    assert settings.agent_url == "http://localhost:8001"
    assert not settings.use_jwt_auth
    assert (settings.jwt_issuer, settings.jwt_audience) == ("https://auth.codelab.local", "codelab-api")
    assert (settings.request_timeout, settings.agent_stream_timeout, settings.agent_connect_timeout) == (
        30,
        60,
        5,
    )
    assert (settings.ws_heartbeat_interval, settings.ws_pong_timeout) == (20, 10)
    assert (settings.ws_close_timeout, settings.ws_send_timeout) == (5, 10)
    assert (settings.max_concurrent_requests, settings.detach_grace) == (100, 120)
    assert (settings.log_level, settings.log_format) == ("INFO", "json")


def test_reads_values_of_every_kind() -> None:
    """Text becomes the setting's type."""
    settings = _load(
        AGENT_URL="https://agent.example:8443/base/",
        REQUEST_TIMEOUT="1.5",
        MAX_SOCKETS="7",
        MAX_MESSAGE_BYTES="64 KiB",
        USE_JWT_AUTH="Yes",
        JWT_ALGORITHMS="RS256, EdDSA",
        ALLOWED_ORIGINS="https://IDE.example, vscode-webview://abc/",
        TRUSTED_PROXIES="10.0.0.0/8,::1",
        LOG_LEVEL="debug",
        STORE_URL="redis://:pw@cache:6379/0",
    ).settings

    assert settings.agent_url == "https://agent.example:8443/base"
    assert settings.request_timeout == 1.5
    assert settings.max_sockets == 7
    assert settings.max_message_bytes == 65_536
    assert settings.use_jwt_auth is True
    assert settings.jwt_algorithms == ("RS256", "EdDSA")
    assert settings.allowed_origins == ("https://ide.example", "vscode-webview://abc")
    assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert settings.log_level == "DEBUG"


def test_settings_cannot_be_changed() -> None:
    """Settings are read once."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings().max_sockets = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("USE_JWT_AUTH", "maybe"),
        ("REQUEST_TIMEOUT", "soon"),
        ("REQUEST_TIMEOUT", "0"),
        ("REQUEST_TIMEOUT", "-1"),
        ("REQUEST_TIMEOUT", "nan"),
        ("REQUEST_TIMEOUT", "inf"),
        ("MAX_SOCKETS", "0"),
        ("MAX_SOCKETS", "1.5"),
        ("MAX_SOCKETS", ""),
        ("MAX_MESSAGE_BYTES", "1 parsec"),
        ("MAX_MESSAGE_BYTES", "10"),
        ("AGENT_URL", "agent:8001"),
        ("AGENT_URL", "ftp://agent"),
        ("AGENT_URL", "http://user:pw@agent"),
        ("AGENT_URL", "http://agent/?x=1"),
        ("AGENT_URL", "http://agent\r\nX-Evil: 1"),
        ("AGENT_URL", "http://agent:99999"),
        ("JWT_ALGORITHMS", "none"),
        ("JWT_ALGORITHMS", "HS256"),
        ("JWT_ALGORITHMS", ""),
        ("ALLOWED_ORIGINS", "*"),
        ("ALLOWED_ORIGINS", "null"),
        ("ALLOWED_ORIGINS", "https://a.example/path"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "nginx"),
        ("STORE_URL", "mysql://x"),
        ("STORE_URL", "sqlite://relative"),
        ("LOG_LEVEL", "LOUD"),
        ("BIND", "8000"),
        ("BIND", "127.0.0.1:99999"),
        ("INTERNAL_API_KEY", ""),
        ("INTERNAL_API_KEY", "two words"),
        ("INTERNAL_API_KEY", "line\nbreak"),
        ("VERSION", " "),
    ],
)
def test_refuses_what_is_not_a_value(name: str, text: str) -> None:
    """A value out of its domain is one problem that names the setting and says what is allowed."""
    problems = _problems(**{name: text})

    assert list(problems) == [f"GATEWAY__{name}"]
    assert "must be" in problems[f"GATEWAY__{name}"]


def test_reports_all_problems_at_once() -> None:
    """One start shows everything that is wrong, with value and source, and no secret."""
    Path(".env").write_text("GATEWAY__LOG_FORMAT=yaml\nnonsense\n")

    with pytest.raises(ConfigError) as caught:
        _load(REQUEST_TIMEOUT="soon", MAX_SOKETS="1", INTERNAL_API_KEY=f"{SECRET} {SECRET}")

    text = str(caught.value)
    assert "5 problems" in text
    assert "GATEWAY__REQUEST_TIMEOUT = 'soon' (environment)" in text
    assert "GATEWAY__LOG_FORMAT = 'yaml' (.env)" in text
    assert ".env: line 2" in text
    assert "GATEWAY__MAX_SOKETS: there is no such setting; did you mean GATEWAY__MAX_SOCKETS?" in text
    assert "GATEWAY__INTERNAL_API_KEY = ********" in text
    assert SECRET not in text


@pytest.mark.parametrize("name", ["GATEWAY__", "GATEWAY__NO_SUCH_THING_AT_ALL", "gateway__agent_url"])
def test_refuses_unknown_names(name: str) -> None:
    """A name with our prefix that is none of ours is a typing error, not noise."""
    with pytest.raises(ConfigError, match="no such setting"):
        load_configuration({name: "1"})


def test_leaves_other_programs_variables_alone() -> None:
    """Names without the prefix, such as those Kubernetes sets for a service called gateway, are not ours."""
    load_configuration(
        {"GATEWAY_PORT": "tcp://10.0.0.1:80", "GATEWAY_SERVICE_HOST": "10.0.0.1", "PATH": "/bin"}
    )


def test_the_environment_goes_before_the_file() -> None:
    """What is in .env counts unless the environment says otherwise."""
    Path(".env").write_text("GATEWAY__MAX_SOCKETS=1\nGATEWAY__MAX_SESSIONS=2\nOTHER=x\n")

    configuration = _load(MAX_SOCKETS="3")

    assert (configuration.settings.max_sockets, configuration.settings.max_sessions) == (3, 2)
    assert configuration.sources["max_sockets"] == "environment"
    assert configuration.sources["max_sessions"] == ".env"


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_may_be_in_a_file(name: str, tmp_path: Path) -> None:
    """…_FILE names a file whose content, without its line end, is the value."""
    file = tmp_path / "secret"
    file.write_text("redis://:pw@h/0\n")

    configuration = _load(**{f"{name.upper()}_FILE": str(file)})

    assert getattr(configuration.settings, name) == "redis://:pw@h/0"
    assert configuration.sources[name] == str(file)


def test_a_secret_file_must_be_there_and_alone(tmp_path: Path) -> None:
    """A missing file, and a value beside its file, are problems."""
    assert "GATEWAY__INTERNAL_API_KEY_FILE" in _problems(INTERNAL_API_KEY_FILE=str(tmp_path / "none"))
    file = tmp_path / "key"
    file.write_text("k" * 20)
    assert "not both" in str(_problems(INTERNAL_API_KEY="a" * 20, INTERNAL_API_KEY_FILE=str(file)))


def test_only_secrets_have_files() -> None:
    """…_FILE of a setting that is no secret is an unknown name."""
    assert "GATEWAY__AGENT_URL_FILE" in _problems(AGENT_URL_FILE="x")


# --------------------------------------------------------------------------- binds


def test_binds_come_from_the_nearest_source() -> None:
    """--bind goes before GATEWAY__BIND, which goes before hypercorn.toml, which goes before the default."""
    Path("hypercorn.toml").write_text('bind = ["127.0.0.1:1", "[::1]:1"]\n')

    assert _load().binds == ("127.0.0.1:1", "[::1]:1")
    assert _load(BIND="127.0.0.1:2,127.0.0.1:3").binds == ("127.0.0.1:2", "127.0.0.1:3")
    assert _load(bind="localhost:0", BIND="127.0.0.1:2").binds == ("localhost:0",)


def test_a_bind_in_the_toml_may_be_one_string() -> None:
    """Hypercorn allows a string or a list."""
    Path("hypercorn.toml").write_text('bind = "127.0.0.1:9"\n')

    assert _load().binds == ("127.0.0.1:9",)


@pytest.mark.parametrize("bind", ["", "x", "127.0.0.1", "127.0.0.1:", ":8000", "::1:80:x", "1.2.3.4:70000"])
def test_refuses_a_bind_that_is_none(bind: str) -> None:
    """A bind names a host and a port."""
    assert "--bind" in _problems(bind)


def test_the_named_toml_must_exist_and_parse() -> None:
    """Only the default hypercorn.toml may be missing; a broken one is a problem."""
    assert "GATEWAY__HYPERCORN_CONFIG" in _problems(HYPERCORN_CONFIG="other.toml")
    Path("other.toml").write_text("bind = [")
    assert "not TOML" in str(_problems(HYPERCORN_CONFIG="other.toml"))


# --------------------------------------------------------------------------- dangers

REACHABLE = ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "gateway.example:80", "fd://3"]


@pytest.mark.parametrize("bind", REACHABLE)
def test_the_default_key_refuses_to_be_reachable(bind: str) -> None:
    """Everybody knows the default key: it works on loopback only."""
    assert "is the default" in _problems(bind)["GATEWAY__INTERNAL_API_KEY"]
    assert (
        "is the default"
        in _problems(bind, INTERNAL_API_KEY=DEFAULT_INTERNAL_API_KEY)["GATEWAY__INTERNAL_API_KEY"]
    )
    assert not _load(bind, INTERNAL_API_KEY=SECRET).is_loopback


@pytest.mark.parametrize("bind", ["127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "localhost:80", "unix:/run/g"])
def test_the_default_key_works_on_loopback(bind: str) -> None:
    """On this machine alone nothing has to be set."""
    assert _load(bind).is_loopback


@pytest.mark.parametrize("key", ["insecure_bind", "quic_bind"])
def test_hypercorns_further_binds_count(key: str) -> None:
    """Plain hypercorn would listen there too."""
    Path("hypercorn.toml").write_text(f'bind = "127.0.0.1:1"\n{key} = ["0.0.0.0:2"]\n')

    assert "GATEWAY__INTERNAL_API_KEY" in _problems()


def test_sockets_are_anonymous_only_where_that_is_safe_or_wanted() -> None:
    """Without JWT sockets need no key on loopback, or where it was said that they need none."""
    assert _load().anonymous_sockets
    assert not _load("0.0.0.0:80", INTERNAL_API_KEY=SECRET).anonymous_sockets
    assert _load("0.0.0.0:80", INTERNAL_API_KEY=SECRET, ALLOW_ANONYMOUS_WS="true").anonymous_sockets
    assert not _load(USE_JWT_AUTH="true").anonymous_sockets


def test_anonymous_sockets_contradict_jwt() -> None:
    """Asking for both is refused: an operator must not believe in the one while the other is in force."""
    assert "GATEWAY__ALLOW_ANONYMOUS_WS" in _problems(USE_JWT_AUTH="true", ALLOW_ANONYMOUS_WS="true")


@pytest.mark.parametrize("store", ["memory://", "sqlite:///gateway.sqlite3"])
def test_workers_need_redis(store: str) -> None:
    """One clear problem that says why and what to do; one worker needs nothing, and Redis is enough."""
    problems = _problems(WORKERS="4", STORE_URL=store)

    assert list(problems) == ["GATEWAY__WORKERS"]
    for word in ("share sessions", store, "GATEWAY__STORE_URL=redis://"):
        assert word in problems["GATEWAY__WORKERS"]
    assert _load(WORKERS="1", STORE_URL=store).settings.workers == 1
    assert _load(WORKERS="4", STORE_URL="rediss://h:1/0").settings.workers == 4


def test_the_command_line_goes_before_the_environment() -> None:
    """``--workers``, checked as the variable is."""
    environment = {"GATEWAY__WORKERS": "2", "GATEWAY__STORE_URL": "redis://h/0"}

    found = load_configuration(environment, dotenv=None, workers="3")
    assert (found.settings.workers, found.sources["workers"]) == (3, "--workers")
    with pytest.raises(ConfigError, match="whole number from 1 to 64"):
        load_configuration(environment, dotenv=None, workers="many")


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ("WS_MERGE_BYTES", "WS_UNACKED_BYTES"),
        ("MAX_EVENT_BYTES", "REPLAY_BYTES"),
        ("REPLAY_BYTES", "REPLAY_TOTAL_BYTES"),
        ("DETACH_GRACE", "REPLAY_RETENTION"),
    ],
)
def test_settings_that_bound_each_other_agree(smaller: str, larger: str) -> None:
    """Two that were set must fit together; when one was set, the default of the other follows it."""
    problems = _problems(**{smaller: "4000", larger: "3000"})
    assert list(problems) == [f"GATEWAY__{smaller}"]

    followed = _load(**{larger: "3000"}).settings
    assert getattr(followed, smaller.lower()) <= 3000
    raised = _load(**{smaller: str(2**33 if "BYTES" in smaller else 9_000)}).settings
    assert getattr(raised, smaller.lower()) <= getattr(raised, larger.lower())


# --------------------------------------------------------------------------- showing


def test_describes_every_setting_without_secrets() -> None:
    """One row per setting: name, value, source, default, meaning; secrets and passwords masked."""
    configuration = _load(
        INTERNAL_API_KEY=SECRET, STORE_URL=f"redis://user:{SECRET}@h:1/0", BIND="127.0.0.1:5"
    )

    rows = {row.name: row for row in describe(configuration)}

    assert list(rows) == [variable(field.name) for field in attrs.fields(Settings)]
    assert rows["GATEWAY__INTERNAL_API_KEY"].value == "********"
    assert rows["GATEWAY__STORE_URL"].value == "redis://user:********@h:1/0"
    assert rows["GATEWAY__BIND"].source == "environment"
    assert rows["GATEWAY__USE_JWT_AUTH"].value == "false"
    assert SECRET not in str(rows)
    assert SECRET not in repr(configuration)
    assert all(row.meaning.endswith((".", "limit.")) for row in rows.values())


def test_masks_each_password_of_a_store_url() -> None:
    """That of the Redis and that of the sentinels."""
    url = f"redis+sentinel://user:{SECRET}@h,i:1/main?sentinel_password={SECRET}&sentinel_username=u"

    rows = {row.name: row for row in describe(_load(STORE_URL=url))}

    shown = "redis+sentinel://user:********@h,i:1/main?sentinel_password=********&sentinel_username=u"
    assert rows["GATEWAY__STORE_URL"].value == shown

"""The documentation of the settings says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from hypercorn.config import Config

from gateway.config import load_configuration, variable
from gateway.config_docs import EXAMPLE_FILE, TABLE_FILE, dotenv_example, with_table
from gateway.config_files import parse_dotenv
from gateway.settings import Settings

ROOT = Path(__file__).parent.parent
ADVICE = "run python -m gateway.config_docs"


def test_the_table_is_the_settings() -> None:
    """docs/configuration.md lists every setting with its default and meaning as they are."""
    document = (ROOT / TABLE_FILE).read_text("utf-8")

    assert with_table(document) == document, ADVICE


def test_the_example_is_the_settings() -> None:
    """.env.example lists every setting with its default."""
    assert (ROOT / EXAMPLE_FILE).read_text("utf-8") == dotenv_example(), ADVICE


@pytest.mark.parametrize("field", attrs.fields(Settings), ids=lambda field: field.name)
def test_every_setting_is_documented(field: attrs.Attribute[object]) -> None:
    """Each setting has a meaning, a row of the table and a line of the example."""
    assert len(field.metadata["environ_config"].help) > 10
    assert f"| `{variable(field.name)}` |" in (ROOT / TABLE_FILE).read_text("utf-8")
    assert f"\n#{variable(field.name)}=" in (ROOT / EXAMPLE_FILE).read_text("utf-8")


def test_documents_no_setting_that_is_not_there() -> None:
    """Every GATEWAY__ name in the documentation of the configuration is one that is read."""
    names = set(re.findall(r"GATEWAY__[A-Z_]+[A-Z]", (ROOT / TABLE_FILE).read_text("utf-8")))

    assert names - {variable(field.name) for field in attrs.fields(Settings)} == {
        "GATEWAY__INTERNAL_API_KEY_FILE"
    }


def test_the_example_gives_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every line of the example switched on, the settings are the defaults."""
    monkeypatch.chdir(tmp_path)
    lines = [
        line.removeprefix("#")
        for line in dotenv_example().splitlines()
        if line.startswith("#GATEWAY__") and not line.endswith("_FILE=")
    ]
    values, problems = parse_dotenv("\n".join(lines))

    assert not problems
    assert load_configuration(values).settings == Settings()


def test_hypercorn_toml_is_understood_and_safe() -> None:
    """Every key in hypercorn.toml is one of hypercorn's, it listens on loopback and names no server."""
    configuration = load_configuration(
        {"GATEWAY__HYPERCORN_CONFIG": str(ROOT / "hypercorn.toml")}, dotenv=None
    )
    config = Config.from_mapping(configuration.hypercorn)

    assert [key for key in configuration.hypercorn if not hasattr(Config, key)] == []
    assert configuration.is_loopback
    assert configuration.binds == ("127.0.0.1:8000",)
    assert config.worker_class == "trio"
    assert config.websocket_ping_interval == 20
    assert config.read_timeout is not None
    assert config.read_timeout > max(Settings().request_timeout, config.keep_alive_timeout)
    assert config.websocket_max_message_size == Settings().max_message_bytes
    assert config.graceful_timeout > Settings().drain_timeout
    assert not any(name == b"server" for name, _ in config.response_headers("h11"))

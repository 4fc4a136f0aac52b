"""compose.yaml says nothing that the gateway, the image, nginx or Redis do not understand."""

from __future__ import annotations

import ipaddress
import re
import shlex
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from gateway import cli
from gateway.config import load_configuration, variable
from gateway.settings import SECRETS, Settings

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "codelab-gateway"}
NODES = ("gateway", "gateway-1", "gateway-2")
BALANCERS = {"nginx": ["gateway"], "balancer": ["gateway-1", "gateway-2"]}
SETTINGS = {variable(field.name) for field in attrs.fields(Settings)} | {
    f"{variable(name)}_FILE" for name in SECRETS
}
SERVICE_KEYS = {
    *(
        "build",
        "cap_drop",
        "command",
        "depends_on",
        "environment",
        "healthcheck",
        "image",
        "networks",
        "ports",
    ),
    *("profiles", "read_only", "restart", "secrets", "security_opt", "stop_grace_period", "tmpfs", "user"),
    "volumes",
}


def dockerfile(pattern: str) -> str:
    """What an instruction of the last stage says."""
    text = (ROOT / "Dockerfile").read_text("utf-8").rpartition("\nFROM ")[2]
    found = re.search(pattern, text, flags=re.MULTILINE)
    assert found is not None, pattern
    return found[1]


def test_has_only_what_compose_knows() -> None:
    """No key is misspelt, neither at the top nor in a service."""
    assert {key for key in COMPOSE if not key.startswith("x-")} == {
        *("name", "services", "secrets", "volumes", "networks")
    }
    for service in SERVICES.values():
        assert set(service) <= SERVICE_KEYS


def test_names_that_are_used_are_declared() -> None:
    """Volumes, networks, secrets, services that others wait for; what is mounted from here is here."""
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"], (
                volume
            )
        for needed, wait in service.get("depends_on", {}).items():
            assert wait == {"condition": "service_healthy"}
            has_check = "healthcheck" in SERVICES[needed] or needed in NODES  # of the image
            assert has_check, f"{name} would wait for ever for {needed}"
            # Started by name with its profile, it must find what it needs among those that start.
            assert set(SERVICES[needed].get("profiles", ())) <= set(service.get("profiles", ())), needed


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_may_more_than_it_needs(name: str) -> None:
    """Read-only, without capabilities; published on loopback only."""
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", OURS)
def test_our_commands_exist(name: str) -> None:
    """The image's own, or that of the service, is understood with all its options."""
    assert dockerfile(r"^ENTRYPOINT (.*)$") == '["gateway"]'
    default = yaml.safe_load(dockerfile(r"^CMD (\[.*\])$"))

    assert cli.make_parser().parse_args(OURS[name].get("command", default)).run is not None
    assert OURS[name]["build"] == "."


@pytest.mark.parametrize("name", OURS)
def test_our_settings_exist(name: str) -> None:
    """Under the names that are given."""
    assert set(OURS[name]["environment"]) <= SETTINGS


@pytest.mark.parametrize("name", NODES)
def test_a_gateway_starts_with_its_settings(name: str, tmp_path: Path) -> None:
    """With those of the image as well, nothing is wrong; it drains in the time that it is given."""
    key = tmp_path / "key"
    key.write_text("a-secret-of-this-test\n")
    image = dict(re.findall(r"(GATEWAY__\w+)=(\S+)", dockerfile(r"^(ENV (?:.*\\\n)*.*)$")))
    given = {**image, **SERVICES[name]["environment"], "GATEWAY__INTERNAL_API_KEY_FILE": str(key)}

    settings = load_configuration(given, dotenv=None).settings
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > settings.drain_timeout
    subnet = COMPOSE["networks"]["inside"]["ipam"]["config"][0]["subnet"]
    assert settings.trusted_proxies == (ipaddress.ip_network(subnet),)
    assert settings.store_url.startswith("redis://redis:6379" if "-" in name else "sqlite:////data/")
    assert settings.agent_url == "http://agent:8001"
    assert SERVICES["agent"]["command"][2].endswith(":8001")


@pytest.mark.parametrize("name", BALANCERS)
def test_nginx_leads_to_the_gateways_that_are_there(name: str) -> None:
    """Its files are where it looks for them, and it listens where the port leads."""
    service = SERVICES[name]
    mounted = dict(volume.split(":")[1::-1] for volume in service["volumes"])
    main = (ROOT / mounted[service["command"][2]]).read_text("utf-8")
    (included,) = re.findall(r"include (\S+);", main)
    nodes = (ROOT / mounted[included]).read_text("utf-8")
    (port,) = re.findall(r"listen (\d+);", main)

    assert [host for host, _ in re.findall(r"server (\S+):(\d+)", nodes)] == BALANCERS[name]
    assert set(re.findall(r"server \S+:(\d+)", nodes)) == {dockerfile(r"^EXPOSE (\d+)$")}
    assert [published.rpartition(":")[2] for published in service["ports"]] == [port]
    assert f"127.0.0.1:{port}/" in service["healthcheck"]["test"][-1]
    assert set(service["depends_on"]) == set(BALANCERS[name])


def test_nodes_keep_addresses_that_nobody_else_gets() -> None:
    """nginx looks them up once."""
    (network,) = COMPOSE["networks"]["inside"]["ipam"]["config"]
    fixed = [ipaddress.ip_address(SERVICES[name]["networks"]["inside"]["ipv4_address"]) for name in NODES[1:]]

    assert len(set(fixed)) == 2
    for address in fixed:
        assert address in ipaddress.ip_network(network["subnet"])
        assert address not in ipaddress.ip_network(network["ip_range"])


def test_the_commands_in_its_head_name_what_is_there() -> None:
    """Profiles, services and ports."""
    head = (ROOT / "compose.yaml").read_text("utf-8").partition("\nname:")[0]
    (command,) = re.findall(r"^#   (docker compose --profile .*)$", head, flags=re.MULTILINE)
    words = shlex.split(command)

    assert words[3] in SERVICES[words[-1]]["profiles"]
    ports = {port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", ())}
    assert set(re.findall(r"gateway chat http://127\.0\.0\.1:(\d+)", head)) == ports

"""docs/asyncapi.yaml says what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.core.client_messages import _PARSERS_V1, _PARSERS_V2, DECISIONS, ROLES, parse_client_message
from gateway.core.errors import InvalidMessage
from gateway.core.limits import Limits
from gateway.core.session import Session
from gateway.core.session_views import snapshot, welcome
from gateway.core.storage import TurnState
from gateway.core.turn_states import Outcome
from gateway.core.websocket_protocol import CloseCode

ROOT = Path(__file__).parent.parent
DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text("utf-8"))
MESSAGES: dict[str, dict[str, Any]] = DOCUMENT["components"]["messages"]
FROM_CLIENT = {name: message for name, message in MESSAGES.items() if message["x-from"] == "client"}
FROM_GATEWAY = {name: message for name, message in MESSAGES.items() if message["x-from"] == "gateway"}
EXAMPLES = [
    (name, example["payload"]) for name, message in FROM_CLIENT.items() for example in message["examples"]
]


def type_of(message: dict[str, Any]) -> str:
    """What stands in ``type``."""
    return str(message["payload"]["properties"]["type"]["const"])


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of the document."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item)


def parse(message: dict[str, Any]) -> object:
    """As a v2 socket would."""
    return parse_client_message(message, json.dumps(message).encode(), v2=True)


def test_every_reference_leads_somewhere() -> None:
    """Also those of the operations to the messages of their channels."""
    for node in nodes(DOCUMENT):
        if "$ref" in node:
            target: Any = DOCUMENT
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]


def test_every_message_is_in_a_channel_and_an_operation() -> None:
    """Nothing is described that nobody sends."""
    used = {ref for node in nodes(DOCUMENT["channels"]) if (ref := node.get("$ref"))}
    sent = {ref.rpartition("/")[2] for node in nodes(DOCUMENT["operations"]) if (ref := node.get("$ref"))}

    assert {f"#/components/messages/{name}" for name in MESSAGES} == used
    assert set(MESSAGES) <= sent


def test_clients_say_what_is_parsed() -> None:
    """The types of v1 and v2 are those that the code knows."""
    v1 = {type_of(message) for message in FROM_CLIENT.values() if message.get("x-dialect") != "v2"}

    assert v1 == set(_PARSERS_V1)
    assert {type_of(message) for message in FROM_CLIENT.values()} == set(_PARSERS_V2)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_are_accepted_and_need_their_fields(name: str, example: dict[str, Any]) -> None:
    """Each example is a message; without any of its required fields it is none."""
    schema = FROM_CLIENT[name]["payload"]
    assert set(schema["required"]) <= set(example) <= set(schema["properties"])
    parse(example)

    for field in schema["required"]:
        with pytest.raises(InvalidMessage):
            parse({key: value for key, value in example.items() if key != field})


def test_optional_fields_are_optional() -> None:
    """A message of required fields alone is accepted, but where the description says what else is needed."""
    for name, message in FROM_CLIENT.items():
        example = message["examples"][0]["payload"]
        least = {field: example[field] for field in message["payload"]["required"]}
        if name != "tool_result":
            parse(least)


def test_the_gateway_sends_what_is_listed() -> None:
    """Every type that the code writes is described, and the other way round but for what agents send."""
    source = "".join(
        path.read_text("utf-8")
        for part in ("core", "engine")
        for path in sorted((ROOT / "gateway" / part).glob("*.py"))
    )
    written = set(re.findall(r'"type": ?"([a-z_]+)"', source))

    assert {type_of(message) for message in FROM_GATEWAY.values()} - {
        "tool_call",
        "agent_switched",
    } == written


def test_welcome_and_snapshot_have_these_fields() -> None:
    """Exactly those, the limits included."""
    ids = count()
    session = Session("s", limits=Limits(), new_id=lambda: f"id{next(ids)}")
    for sent in (
        welcome(session, Limits(), last_seq=0, resumed=False),
        snapshot(session, "trimmed", last_seq=0),
    ):
        schema = MESSAGES[str(sent["type"])]["payload"]
        assert set(schema["properties"]) == set(schema["required"]) == set(sent)
    limits = MESSAGES["welcome"]["payload"]["properties"]["limits"]["properties"]
    assert set(limits) == set(welcome(session, Limits(), last_seq=0, resumed=False)["limits"])  # type: ignore[call-overload]


def test_choices_are_those_of_the_code() -> None:
    """States, outcomes, decisions, roles and close codes."""
    states = DOCUMENT["components"]["schemas"]["turn"]["properties"]["state"]["enum"]
    properties = {name: message["payload"]["properties"] for name, message in MESSAGES.items()}

    assert set(states) == {state.value for state in TurnState}
    assert set(properties["turn_ended"]["outcome"]["enum"]) == {outcome.value for outcome in Outcome}
    assert tuple(properties["hitl_decision"]["decision"]["enum"]) == DECISIONS
    assert tuple(properties["user_message"]["role"]["enum"]) == ROLES
    assert set(DOCUMENT["x-close-codes"]) == {int(code) for code in CloseCode}

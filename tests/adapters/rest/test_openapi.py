"""The OpenAPI document says what the application serves."""

from __future__ import annotations

import json
import re

from gateway.adapters.rest.openapi import openapi_document
from gateway.adapters.rest.routes import PROXY_ROUTES
from gateway.core.session_id import is_session_id
from tests.adapters.rest.harness import Rest


async def test_is_served_as_it_is() -> None:
    """/openapi.json is the document, to anybody."""
    response = await Rest(settings={"version": "1.2.3"}).get("/openapi.json", {})

    assert json.loads(await response.get_data()) == json.loads(json.dumps(openapi_document("1.2.3")))
    assert response.headers["Content-Type"] == "application/json"


def test_lists_exactly_the_routes() -> None:
    """Every rule of the application is in the document with its methods, and nothing else is."""
    rules = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method)
        for rule in Rest().app.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
    }
    documented = {
        (path, method.upper())
        for path, operations in openapi_document("1")["paths"].items()
        for method in operations
    }

    assert documented == rules


def test_every_reference_leads_somewhere() -> None:
    """No $ref points into nothing, and no operation id is used twice."""
    document = openapi_document("1")
    text = json.dumps(document)

    for reference in re.findall(r'"\$ref": "#/([^"]+)"', text):
        target = document
        for part in reference.split("/"):
            target = target[part]
    ids = re.findall(r'"operationId": "([^"]+)"', text)
    assert len(ids) == len(set(ids)) == len(PROXY_ROUTES) + 1


def test_its_rule_for_session_ids_is_ours() -> None:
    """The pattern in the document accepts what the gateway accepts."""
    paths = openapi_document("1")["paths"]
    schema = paths["/api/v1/sessions/{session_id}/history"]["get"]["parameters"][0]["schema"]

    for candidate in ("a", "..", ".", "a:b", "x" * 128, "x" * 129, "", "a/b", "a\n"):
        documented = (
            re.fullmatch(schema["pattern"].strip("^$"), candidate) is not None
            and schema["minLength"] <= len(candidate) <= schema["maxLength"]
            and candidate not in schema["not"]["enum"]
        )
        assert documented == is_session_id(candidate)


def test_protected_routes_say_what_they_need() -> None:
    """Every route of the proxy names the key and the scope; the public ones name none."""
    paths = openapi_document("1")["paths"]

    for route in PROXY_ROUTES:
        operation = paths[route.public_path][route.method.lower()]
        assert operation["security"] == [{"internalKey": []}, {"bearer": [route.scope]}]
    for path in ("/health", "/docs", "/openapi.json"):
        assert paths[path]["get"]["security"] == []

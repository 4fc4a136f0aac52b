"""The REST contract as an OpenAPI 3.1 document and as a page, both made from the routes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

from gateway.adapters.rest.pages import WebPages
from gateway.adapters.rest.routes import PROXY_ROUTES, ProxyRoute, Visibility
from gateway.core.session_id import MAX_SESSION_ID

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8886; vertical-align: top }
code { font: 0.9em ui-monospace, monospace; overflow-wrap: anywhere; }
"""

DOCS_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)
"""Content-Security-Policy of ``docs_page``: its own style sheet and nothing else."""


def openapi_document(version: str, pages: WebPages | None = None) -> dict[str, Any]:
    """The contract; paths and methods are those that the application serves, with its ``pages``."""
    paths: dict[str, dict[str, Any]] = {
        "/health": {"get": _health("Whether the process is alive, or with ready=1, should be sent work.")},
        "/api/v1/health": {"get": _health("The same, under the API's prefix.")},
        "/metrics": {
            "get": {
                "summary": "Metrics in Prometheus text format.",
                "operationId": "get_metrics",
                "security": [{"internalKey": []}, {"bearer": ["api:admin"]}],
                "responses": {
                    "200": {
                        "description": "All metrics.",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    },
                    **_refusals("401", "403", "429"),
                },
            }
        },
        "/openapi.json": {"get": _page("This document.", "application/json")},
        "/docs": {"get": _page("This document as a page.", "text/html")},
    }
    if pages is not None:
        paths |= _page_paths(pages)
    for route in PROXY_ROUTES:
        paths.setdefault(route.public_path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Gateway",
            "version": version,
            "description": "REST routes of the gateway. Answers of the Agent Runtime pass unchanged.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"securitySchemes": _SECURITY, "schemas": _SCHEMAS, "responses": _RESPONSES},
    }


def docs_page(contract: Mapping[str, Any]) -> str:
    """A page that lists the routes of a contract: one file, no script, nothing from elsewhere."""
    version = contract["info"]["version"]
    rows = "\n".join(
        f"<tr><td><code>{escape(method.upper())}</code></td><td><code>{escape(path)}</code></td>"
        f"<td>{escape(operation['summary'])}</td></tr>"
        for path, operations in contract["paths"].items()
        for method, operation in operations.items()
        if not path.startswith("/web/")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Gateway {escape(version)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Gateway {escape(version)}</h1>\n"
        '<p>The REST contract in full is <a href="openapi.json">openapi.json</a>. Conversations go over a '
        "WebSocket at <code>/api/v1/ws/{session_id}</code>.</p>\n"
        '<table>\n<thead><tr><th scope="col">Method</th><th scope="col">Path</th><th scope="col">What</th>'
        f"</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</main>\n</body>\n</html>\n"
    )


def _page_paths(pages: WebPages) -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    if pages.playground is not None:
        paths["/playground"] = {"get": _page("A page to talk to the agent.", "text/html")}
    if pages.dashboard is not None:
        paths["/dashboard"] = {"get": _page("A page that shows what the gateway does.", "text/html")}
        paths["/dashboard/events"] = {
            "get": _admin(
                "get_dashboard_events", "What the dashboard shows, every second.", "text/event-stream"
            )
            | {"parameters": [_FILTER]}
        }
        paths["/dashboard/sessions/{session_id}"] = {
            "get": _admin(
                "get_dashboard_session", "A session and its timeline.", "application/json", "400", "404"
            )
            | {"parameters": [_SESSION_ID]}
        }
        paths["/dashboard/sessions/{session_id}/close"] = {
            "post": _admin(
                "close_session", "Cancel its turn, close its sockets.", "application/json", "400", "404"
            )
            | {"parameters": [_SESSION_ID]}
        }
    for name, part in pages.parts.items():
        paths[f"/web/{name}"] = {"get": _page("A part of the pages.", part.media_type.partition(";")[0])}
    return paths


def _admin(name: str, summary: str, media_type: str, *refusals: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": name,
        "security": [{"internalKey": []}, {"bearer": ["api:admin"]}],
        "responses": {
            "200": {"description": "For people with the key.", "content": {media_type: {}}},
            **_refusals("401", "403", *refusals, "429"),
        },
    }


def _operation(route: ProxyRoute) -> dict[str, Any]:
    name = route.path.strip("/").replace("/", "_").replace("-", "_").replace("{", "").replace("}", "")
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}_{name}",
        "security": [{"internalKey": []}, {"bearer": [route.scope]}],
        "responses": {
            "200": {"description": "The Agent Runtime's answer.", "content": _ANY_JSON},
            **_refusals("400", "401", "403", "429", "502", "503", "504"),
            "default": {
                "description": "The Agent Runtime's own status and JSON body, unchanged.",
                "content": _ANY_JSON,
            },
        },
    }
    if "{session_id}" in route.path:
        operation["parameters"] = [_SESSION_ID]
    if route.visibility is Visibility.CREATES:
        operation["requestBody"] = {
            "required": False,
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
        operation["responses"] |= _refusals("408", "413", "415")
    return operation


def _health(summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "security": [],
        "parameters": [
            {
                "name": "ready",
                "in": "query",
                "description": "1 answers 503 while draining or while the store is unreachable.",
                "schema": {"type": "string", "enum": ["0", "1"]},
            }
        ],
        "responses": {
            "200": {
                "description": "Healthy.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Health"}}},
            },
            "503": {"$ref": "#/components/responses/503"},
        },
    }


def _page(summary: str, media_type: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "security": [],
        "responses": {
            "200": {"description": "It.", "content": {media_type: {}}},
            **_refusals("429"),
        },
    }


def _refusals(*statuses: str) -> dict[str, Any]:
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _response(description: str, schema: str = "Error") -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}


_ANY_JSON: dict[str, Any] = {"application/json": {}}

_SESSION_ID: dict[str, Any] = {
    "name": "session_id",
    "in": "path",
    "required": True,
    "description": "Neither . nor ..",
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_SESSION_ID,
        "pattern": "^[A-Za-z0-9._:-]+$",
        "not": {"enum": [".", ".."]},
    },
}

_FILTER: dict[str, Any] = {
    "name": "filter",
    "in": "query",
    "description": "Only sessions whose id contains this.",
    "schema": {"type": "string"},
}

_SECURITY: dict[str, Any] = {
    "internalKey": {"type": "apiKey", "in": "header", "name": "X-Internal-Auth"},
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
}

_SCHEMAS: dict[str, Any] = {
    "Health": {
        "type": "object",
        "required": ["status", "service", "version"],
        "properties": {
            "status": {"type": "string"},
            "service": {"const": "gateway"},
            "version": {"type": "string"},
        },
    },
    "Error": {
        "type": "object",
        "required": ["error", "detail"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "retryable"],
                "properties": {
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                    "retryable": {"type": "boolean"},
                },
            },
            "detail": {"type": "string"},
        },
    },
    "AuthenticationError": {
        "type": "object",
        "required": ["error", "error_description"],
        "properties": {
            "error": {"enum": ["unauthorized", "invalid_token", "insufficient_scope"]},
            "error_description": {"type": "string"},
        },
    },
}

_RESPONSES: dict[str, Any] = {
    "400": _response("The request is malformed: its session id, its query or its JSON."),
    "401": _response("No credentials, or ones that do not hold.", "AuthenticationError"),
    "403": {
        "description": "A scope is missing, or the session is another subject's.",
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/AuthenticationError"},
                        {"$ref": "#/components/schemas/Error"},
                    ]
                }
            }
        },
    },
    "404": _response("There is none of that id."),
    "408": _response("The body took too long to arrive."),
    "413": _response("The body is too large."),
    "415": _response("The body is not sent as JSON."),
    "429": _response("Too many calls; Retry-After says when to come back."),
    "502": _response("The Agent Runtime cannot be reached, or its answer is not JSON."),
    "503": _response("Overloaded, draining, or the store is unreachable; see Retry-After."),
    "504": _response("The Agent Runtime took too long."),
}

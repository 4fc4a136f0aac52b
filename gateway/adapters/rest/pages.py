"""The pages for people, dashboard and playground: files of ``gateway/web``, served as they are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from attrs import frozen

PAGES_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Content-Security-Policy of the pages: own files only, nothing inline, and no HTML made from text."""

PAGE_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": PAGES_POLICY,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)

_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
)
_SHARED = ("theme.css", "icon.svg")
_DASHBOARD = (
    "dashboard.css",
    "dashboard.js",
    "event_stream.js",
    "plot.js",
    "session_table.js",
    "elements.js",
)
_PLAYGROUND = (
    *("playground.css", "playground.js", "client.js", "elements.js", "folder.js", "plug.js"),
    *("tool_card.js", "transcript.js", "wire.js"),
)


@frozen
class WebFile:
    """One file and its media type."""

    content: bytes
    media_type: str


@frozen
class WebPages:
    """The pages that are on, and the parts that they load."""

    dashboard: WebFile | None
    playground: WebFile | None
    parts: Mapping[str, WebFile]
    """By file name."""


def load_pages(*, dashboard: bool, playground: bool) -> WebPages:
    """Read the files of the pages that are on."""
    names = {
        *(_SHARED if dashboard or playground else ()),
        *(_DASHBOARD if dashboard else ()),
        *(_PLAYGROUND if playground else ()),
    }
    return WebPages(
        dashboard=_read("dashboard.html") if dashboard else None,
        playground=_read("playground.html") if playground else None,
        parts={name: _read(name) for name in sorted(names)},
    )


def _read(name: str) -> WebFile:
    content = (files("gateway") / "web" / name).read_bytes()
    return WebFile(content, _TYPES[name.rpartition(".")[2]])

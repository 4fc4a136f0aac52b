"""Completes the navigation of the documentation site: pages that come and go need no entry in mkdocs.yml."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Leave out pages that are not there, and list every decision."""
    docs = Path(config["docs_dir"])
    decisions = sorted(path.relative_to(docs).as_posix() for path in (docs / "decisions").glob("*.md"))
    config["nav"] = [entry for entry in config["nav"] if _exists(docs, entry)] + [{"Decisions": decisions}]
    return config


def _exists(docs: Path, entry: dict[str, str]) -> bool:
    return all((docs / page).exists() for page in entry.values())

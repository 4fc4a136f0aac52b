"""The table of settings and ``.env.example``, made from the settings themselves.

``python -m gateway.config_docs`` rewrites both files below the current folder; a test compares them.
"""

from __future__ import annotations

from pathlib import Path

from gateway.config import SettingRow, describe, load_configuration
from gateway.settings import PREFIX, SECRETS

BEGIN = "<!-- settings: made by python -m gateway.config_docs -->"
END = "<!-- end of settings -->"
TABLE_FILE = Path("docs/configuration.md")
EXAMPLE_FILE = Path(".env.example")


def rows() -> tuple[SettingRow, ...]:
    """Every setting, with nothing set."""
    return describe(load_configuration({}, dotenv=None))


def settings_table() -> str:
    """A Markdown table of all settings."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for row in rows():
        default = f"`{row.default}`" if row.default else "empty"
        lines.append(f"| `{row.name}` | {default} | {row.meaning} |")
    return "\n".join(lines)


def dotenv_example() -> str:
    """A ``.env`` file with all settings at their defaults, commented out."""
    lines = [
        "# All settings of the gateway with their defaults. Copy this to .env and remove the # where you",
        "# want another value. Variables of the environment go before this file.",
        "# docs/configuration.md says more.",
    ]
    for row in rows():
        lines += ["", f"# {row.meaning}", f"#{row.name}={row.default}"]
        if row.name.removeprefix(PREFIX).lower() in SECRETS:
            lines += ["# … or the name of a file that holds it:", f"#{row.name}_FILE="]
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """``document`` with the part between the two marks replaced by the table."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{settings_table()}\n\n{END}{after}"


def main() -> None:
    """Rewrite both files."""
    TABLE_FILE.write_text(with_table(TABLE_FILE.read_text("utf-8")), "utf-8")
    EXAMPLE_FILE.write_text(dotenv_example(), "utf-8")


if __name__ == "__main__":
    main()

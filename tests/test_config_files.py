"""The files that settings come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config_files import UnreadableFile, parse_dotenv, read_secret, read_toml


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("  export A = b  ", "b"),
        ("A=", ""),
        ("A=b # comment", "b"),
        ("A=b#c", "b#c"),
        ("A=a=b", "a=b"),
        ("A='b # $c ${d} \\n'", "b # $c ${d} \\n"),
        ('A="b # c"  # comment', "b # c"),
        (r'A="a\n\"b\" \$x \\"', 'a\n"b" $x \\'),
        ("A=$b", "$b"),
    ],
)
def test_reads_a_line(line: str, value: str) -> None:
    """The forms of a line, with and without quotes, and their values."""
    assert parse_dotenv(line) == ({"A": value}, [])


def test_skips_what_is_no_setting() -> None:
    """Empty lines and comments are not values."""
    assert parse_dotenv("\n# A=1\n   # B=2\r\n\r\nC=3\r\n") == ({"C": "3"}, [])


@pytest.mark.parametrize(
    "line", ["A", "1A=b", "A B=c", "=b", "A='b", 'A="b', "A='b' c", 'A="b"c', r'A="\x"', "A=${B}", 'A="${B}"']
)
def test_names_the_line_that_it_does_not_understand(line: str) -> None:
    """Every other line is a problem with its number, and without its value."""
    values, problems = parse_dotenv(f"X=1\n{line}\nY=2")

    assert values == {"X": "1", "Y": "2"}
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")


def test_a_name_twice_is_a_problem() -> None:
    """Which one counts would be a guess."""
    assert parse_dotenv("A=1\nA=2")[1] == ["line 2: A is set twice"]


def test_a_secret_file_loses_only_its_line_end(tmp_path: Path) -> None:
    """White space may be a part of a secret; the last line end is not."""
    file = tmp_path / "secret"
    file.write_bytes(b"\xef\xbb\xbf a b \r\n")

    assert read_secret(file) == " a b "


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (1024 * 1024 + 1)])
def test_refuses_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    """Binary and huge files are refused; their content is in no message."""
    file = tmp_path / "secret"
    file.write_bytes(content)

    with pytest.raises(UnreadableFile, match="secret: is"):
        read_secret(file)


def test_refuses_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and a folder are refused with the system's reason."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UnreadableFile):
            read_toml(path)

"""What the scripted brain understands."""

import pytest

from gateway.reference_agent.requests import Request, understand


@pytest.mark.parametrize(
    ("text", "kind", "paths"),
    [
        ("create hello.py that prints hello", "create", ("hello.py",)),
        ("Please write a file src/app/main.js", "create", ("src/app/main.js",)),
        ("edit hello.py: replace hello with goodbye", "edit", ("hello.py",)),
        ("in `a/b.txt` change one to two", "edit", ("a/b.txt",)),
        ("read a.py, b.py and c.py", "read", ("a.py", "b.py", "c.py")),
        ("show me README.md", "read", ("README.md",)),
        ("list files", "list", (".",)),
        ("list the files in src/app", "list", ("src/app",)),
        ("what files are there?", "list", (".",)),
        ("run `python hello.py`", "run", ()),
        ("explain hello.py", "explain", ("hello.py",)),
        ("what does hello.py do?", "explain", ("hello.py",)),
        ("debug hello.py", "debug", ("hello.py",)),
        ("there is a bug in x.py", "debug", ("x.py",)),
        ("plan a todo app", "plan", ()),
        ("design the login, write it to docs/login.md", "plan", ("docs/login.md",)),
        ("count to 20", "count", ()),
        ("slow 3", "slow", ()),
        ("fail", "fail", ()),
        ("hello", "chat", ()),
        ("", "chat", ()),
        ("the weather is nice", "chat", ()),
    ],
)
def test_sentences_are_understood(text: str, kind: str, paths: tuple[str, ...]) -> None:
    """Each of the documented sentences leads to its verb and files."""
    request = understand(text)
    assert (request.kind, () if kind == "run" else request.paths) == (kind, paths)


def test_replacements_are_taken_apart() -> None:
    """Quotes are optional and do not belong to the text."""
    expected = ("hello", "goodbye")
    for text in (
        "edit hello.py: replace hello with goodbye",
        "replace `hello` with `goodbye` in hello.py",
        "in hello.py change 'hello' to \"goodbye\".",
    ):
        request = understand(text)
        assert (request.old, request.new) == expected, text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("create hello.py that prints hello", 'print("hello")\n'),
        ('create a.py that prints say "hi"', 'print("say \\"hi\\"")\n'),
        ("create a.js printing hi", 'console.log("hi");\n'),
        ("create notes.txt with content buy milk", "buy milk\n"),
        ("create a.py:\n```python\nx = 1\n```", "x = 1\n"),
        ("create a.md", "# hello\n"),
    ],
)
def test_new_files_get_the_content_asked_for(text: str, content: str) -> None:
    """A block, given words, or a program that prints."""
    assert understand(text).content == content


def test_commands_are_found() -> None:
    """In backquotes, or after the verb."""
    assert understand("run `ls -l`").content == "ls -l"
    assert understand("please execute the command pytest -q.") == Request(
        "run", content="pytest -q", text="please execute the command pytest -q."
    )

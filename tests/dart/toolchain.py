"""A real Dart, compiler and virtual machine.

The one on ``PATH``, or else one that npm has: Sass's compiler for 32-bit Linux comes with the whole virtual
machine of Dart 3.7, compiler included, because Dart cannot compile ahead of time for that processor.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

from attrs import frozen

from tests.end_to_end.requirements import missing, need_program

PACKAGE = "sass-embedded-linux-ia32@1.89.0"
"""The last of its line. Nothing of it is used but the virtual machine."""
INTEGRITY = "5fxBeXyvBr3pb+vyrx9V6yd7QDRXkAPbwmFVVhjqshBABOXelLysEFea7xokh/tM8JAAQ4O8Ls3eW3Eojb477g=="
"""SHA-512 of the package."""
PROGRAM = "package/dart-sass/src/dart"
LOADER = "/lib/ld-linux.so.2"
"""What starts 32-bit programs."""
STAND_INS = Path(__file__).parent
LANGUAGE = "3.0"
"""The oldest Dart that the snippets are for."""


@frozen
class Dart:
    """Compiles and runs programs."""

    executable: str

    def command(self, program: Path, *arguments: str) -> list[str]:
        """How to run the program, which may import its neighbours and ``package:web_socket_channel``."""
        packages = program.parent / "package_config.json"
        roots = {"web_socket_channel": STAND_INS / "web_socket_channel", "program": program.parent}
        listed = [
            {"name": name, "rootUri": f"{root.as_uri()}/", "packageUri": "lib/", "languageVersion": LANGUAGE}
            for name, root in roots.items()
        ]
        packages.write_text(json.dumps({"configVersion": 2, "packages": listed}), "utf-8")
        return [self.executable, f"--packages={packages}", str(program), *arguments]


def need_dart(folder: Path) -> Dart:
    """A Dart, taken into ``folder`` if there is none; without, tests skip, in CI they fail."""
    if (found := shutil.which("dart")) is not None:
        return Dart(found)
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        missing("There is no Dart: install the Dart SDK, so that dart is on PATH")
    need_program(LOADER, "apt-get install libc6-i386")
    npm = need_program("npm", "apt-get install nodejs npm")
    command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if packed.returncode != 0:
        missing(f"There is no Dart: npm could not get {PACKAGE}: {packed.stderr[-300:]}")
    (archive,) = folder.glob("*.tgz")
    assert hashlib.sha512(archive.read_bytes()).digest() == base64.b64decode(INTEGRITY), "not what was tried"
    with tarfile.open(archive) as opened:
        program = opened.extractfile(PROGRAM)
        assert program is not None
        executable = folder / "dart"
        executable.write_bytes(program.read())
    executable.chmod(0o755)
    archive.unlink()
    return Dart(str(executable))

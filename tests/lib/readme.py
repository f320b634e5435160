"""The README as a reader uses it: its blocks, and a checkout to paste them in."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import ROOT

README = (ROOT / "README.md").read_text()
FILES = ("service.py", "db.sql", "openapi.json", "page.html", "requirements.txt", "pyproject.toml")
ADDRESS = "http://127.0.0.1:5000"


def blocks(language: str, having: str = "") -> list[str]:
    """The blocks in a language that have a text, in the order of the README."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for block in found if having in block]


def block(language: str, having: str) -> str:
    """The only one."""
    [found] = blocks(language, having)
    return found


@contextmanager
def checkout(*, installed: bool = True) -> Iterator[Path]:
    """A copy of the checkout, with the virtual environment of the tests or none.

    PostgreSQL, which root runs as another user, may enter it.
    """
    directory = Path(tempfile.mkdtemp(prefix="checkout-")).resolve()
    directory.chmod(0o711)
    for name in FILES:
        shutil.copy(ROOT / name, directory)
    if installed:
        (directory / ".venv").symlink_to(sys.prefix)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def paste(
    text: str, cwd: Path, home: Path, shell: str = "bash", *, strict: bool = True, **env: str
) -> str:
    """Run lines in a shell, as pasted there, and return what they print.

    Where strict, whatever fails ends it, and curl, which has no reader here, shows by its status
    what one would see.
    """
    (home / ".curlrc").write_text('fail\nnoproxy = "*"\n')
    options = ("-eu", "-o", "pipefail") if strict else ()
    done = subprocess.run(
        (shell, *options, "-c", text),
        cwd=cwd,
        env={**os.environ, "HOME": str(home), "CURL_HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not strict or done.returncode == 0, done.stdout + done.stderr
    assert not re.search("not found|no matches|parse error|syntax error", done.stderr), done.stderr
    return done.stdout

"""Debian's pgbouncer."""

import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from support import Postgres, free_port, wait_for

CONFIGURATION = """
[databases]
* = host={directory} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
default_pool_size = 5
ignore_startup_parameters = extra_float_digits
logfile = {log}
{settings}
"""


@contextmanager
def pgbouncer(postgres: Postgres, settings: str) -> Iterator[str]:
    """Yields the URL of a new, empty database behind one. Skips the test where there is none."""
    if not shutil.which("pgbouncer"):
        pytest.skip("there is no pgbouncer")
    port = free_port()
    log = postgres.directory / f"pgbouncer-{port}.log"
    file = log.with_suffix(".ini")
    directory = postgres.directory
    file.write_text(
        CONFIGURATION.format(directory=directory, port=port, log=log, settings=settings)
    )
    owner = pwd.getpwuid(directory.stat().st_uid).pw_name
    with subprocess.Popen(("pgbouncer", "--quiet", file), user=owner) as process:
        try:
            wait_for(lambda: log.exists() and "listening on" in log.read_text())
            name = urlsplit(postgres.create_database()).path
            yield f"postgresql://postgres@127.0.0.1:{port}{name}"
        finally:
            process.terminate()

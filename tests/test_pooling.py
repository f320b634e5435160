"""Debian's pgbouncer between the service and PostgreSQL, in each of its modes."""

import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support import Postgres, StartServer, free_port, wait_for
from wav import decoded, wav

CONFIGURATION = """
[databases]
* = host={directory} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 5
ignore_startup_parameters = extra_float_digits
logfile = {log}
"""


@contextmanager
def pgbouncer(postgres: Postgres, mode: str, directory: Path) -> Iterator[str]:
    """Yields the URL of a new, empty database behind it."""
    port, log = free_port(), postgres.directory / f"pgbouncer-{mode}.log"
    settings = postgres.directory / f"pgbouncer-{mode}.ini"
    text = CONFIGURATION.format(directory=postgres.directory, port=port, mode=mode, log=log)
    settings.write_text(text)
    owner = pwd.getpwuid(postgres.directory.stat().st_uid).pw_name
    with subprocess.Popen(("pgbouncer", "--quiet", settings), user=owner) as process:
        try:
            wait_for(lambda: log.exists() and "listening on" in log.read_text())
            name = urlsplit(postgres.create_database()).path
            yield f"postgresql://postgres@127.0.0.1:{port}{name}"
        finally:
            process.terminate()


@pytest.mark.skipif(not shutil.which("pgbouncer"), reason="there is no pgbouncer")
@pytest.mark.parametrize(
    "mode, options",
    [
        ("session", ""),
        ("transaction", "?statement_cache_size=0"),
        ("statement", "?statement_cache_size=0"),
    ],
)
def test_service_works_through_pgbouncer(
    postgres: Postgres, start_server: StartServer, tmp_path: Path, mode: str, options: str
) -> None:
    with pgbouncer(postgres, mode, tmp_path) as url:
        server = start_server(DATABASE_URL=url + options)
        user = server.register()
        for _ in range(3):
            link = server.upload(user, wav()).headers["Location"]
            assert len(decoded(server.http.get(link).content).samples) == 11025
        listing = server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)
        assert len(listing.json()["records"]) == 3
        assert server.http.get("/readyz").status_code == 200
        assert server.http.delete("/api/registration/", headers=user.bearer).status_code == 204
        server.stop()

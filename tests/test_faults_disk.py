"""A disk is full."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support import Postgres, query
from wav import LONG
from wire import recovery, unavailable, watched


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of its own, open to all users."""
    directory = Path(tempfile.mkdtemp(prefix="disk-"))
    try:
        options = f"size={size},mode=1777"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a file system, and not in every container")
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
    finally:
        directory.rmdir()


@pytest.mark.parametrize("file_first", [False, True])
def test_upload_that_fills_the_temporary_directory_is_answered_503(
    database: Postgres, file_first: bool
) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk("1m"))
        server = stack.enter_context(watched(database.create_database(), TMPDIR=str(disk)))
        user = server.register()
        with recovery(server):
            unavailable(server.upload(user, LONG, file_first=file_first))
        assert server.records(user) == 0


@pytest.mark.slow
def test_upload_that_fills_the_disk_of_the_database_is_answered_503(database: Postgres) -> None:
    with small_disk("16m") as disk:
        shutil.chown(disk, (database.directory / "PG_VERSION").owner())
        space = f"space_{uuid.uuid4().hex}"
        query(database.url(), f"CREATE TABLESPACE {space} LOCATION '{disk}'")
        url = database.create_database()
        name = urlsplit(url).path.removeprefix("/")
        query(database.url(), f"ALTER DATABASE {name} SET TABLESPACE {space}")
        try:
            with watched(url) as server:
                user = server.register()
                with recovery(server):
                    filler = disk / "filler"
                    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 500_000))
                    unavailable(server.upload(user, LONG))
                    filler.unlink()
                assert server.records(user) == 0
        finally:
            query(database.url(), f"DROP DATABASE {name} WITH (FORCE)")
            query(database.url(), f"DROP TABLESPACE {space}")

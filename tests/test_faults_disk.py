"""A disk is full."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from store import store_large
from support import Postgres, Server, problem, query, wait_for
from wav import LONG, SPEECH
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


# What was deleted is counted a while later, and is dead until it is swept up.
VACUUMED = """
SELECT FROM pg_class
WHERE oid = 'wav_to_mp3.records'::regclass
AND pg_stat_get_tuples_deleted(reltoastrelid) >= $1
AND pg_stat_get_dead_tuples(reltoastrelid) = 0
"""
PIECES = (8 << 20) // 1996  # of a record, each of which is a row


@pytest.mark.slow
def test_embedded_database_keeps_room_and_uses_again_what_was_deleted() -> None:
    with small_disk("450m") as disk:
        data_dir = disk / "data"
        data_dir.mkdir(mode=0o755)
        with Server({"DATA_DIR": str(data_dir)}) as server:
            user = server.register()
            socket_directory = quote(str(data_dir / "postgresql"), safe="")
            server.database_url = f"postgresql://postgres@/postgres?host={socket_directory}"

            def fill(most: int = 100) -> list[str]:
                """Store up to that many records, or until uploads are refused for want of room."""
                links: list[str] = []
                while len(links) < most and server.upload(user, SPEECH).status_code == 201:
                    links.append(store_large(server, user)[0])
                return links

            links = fill()
            assert "nearly full" in problem(server.upload(user, SPEECH), 507)
            size = "SELECT pg_total_relation_size('wav_to_mp3.records') AS bytes"
            full = query(server.database_url, size)[0]["bytes"]
            assert len(server.http.get(links[0]).content) == 8 << 20
            for link in links:
                assert server.http.delete(link, headers=user.bearer).status_code == 204
            wait_for(lambda: query(server.database_url, VACUUMED, len(links) * PIECES))
            again = fill(len(links))  # or as many as the log leaves room for
            assert again
            assert query(server.database_url, size)[0]["bytes"] < 1.2 * full
            assert shutil.disk_usage(disk).free > 64 << 20  # the rest is the log's
            assert server.http.get(again[0]).status_code == 200

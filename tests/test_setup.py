import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from service import Settings
from support import (
    ROOT,
    SERVICE,
    UVICORN_SERVICE,
    Postgres,
    Server,
    StartServer,
    free_port,
    processes_in,
    query,
)
from wav import decoded, wav

# With a database of one's own


def test_servers_that_start_together_share_an_empty_database(
    postgres: Postgres, start_server: StartServer
) -> None:
    database_url = postgres.create_database()
    servers = [start_server(DATABASE_URL=database_url) for _ in range(4)]
    users = [server.register() for server in servers]
    assert len({user.id for user in users}) == 4
    link = servers[0].upload(users[3], wav()).json()["URL for download"]
    for server in servers:
        mp3 = server.http.get(link.replace(servers[0].url, server.url)).content
        assert len(decoded(mp3).samples) == 11025


def test_starting_again_changes_nothing(postgres: Postgres, start_server: StartServer) -> None:
    def content() -> list[object]:
        names = ("wav_to_mp3.users", "wav_to_mp3.records")
        tables = (query(database_url, f"SELECT * FROM {name}") for name in names)
        return [postgres.schema(database_url), *tables]

    database_url = postgres.create_database()
    server = start_server(DATABASE_URL=database_url)
    server.upload(server.register(), wav())
    before = content()
    assert start_server(DATABASE_URL=database_url).register()
    query(database_url, "DELETE FROM wav_to_mp3.users WHERE id_user > 1")
    assert content() == before


def test_schema_stores_mp3_for_slices_and_times_with_their_zone(server: Server) -> None:
    sql = """
        SELECT attname, attstorage, atttypid::regtype::text AS type
        FROM pg_attribute
        WHERE attrelid IN ('wav_to_mp3.users'::regclass, 'wav_to_mp3.records'::regclass)
        AND attnum > 0
    """
    columns = query(server.database_url, sql)
    assert [column["attstorage"] for column in columns if column["attname"] == "mp3"] == [b"e"]
    times = {column["type"] for column in columns if column["type"].startswith("time")}
    assert times == {"timestamp with time zone"}


def test_service_exits_with_a_line_where_a_setting_is_not_allowed() -> None:
    with Server({"MAX_ENCODERS": "0"}) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "MAX_ENCODERS" in line


def test_service_exits_with_a_line_where_its_schema_is_missing(
    postgres: Postgres, tmp_path: Path
) -> None:
    for name in ("service.py", "openapi.json", "page.html"):
        shutil.copy(ROOT / name, tmp_path)
    command = (sys.executable, str(tmp_path / "service.py"))
    with Server({"DATABASE_URL": postgres.create_database()}, command) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "db.sql" in line


# With the embedded PostgreSQL


@pytest.fixture
def data_dir() -> Iterator[Path]:
    # The path of a Unix socket, which the data directory has, must be short.
    directory = Path(tempfile.mkdtemp(prefix="my data +%20")).resolve()
    directory.chmod(0o711)  # as root PostgreSQL runs as another user
    yield directory
    for process in processes_in(directory):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, sent", [(SERVICE, signal.SIGINT), (UVICORN_SERVICE, signal.SIGTERM)]
)
def test_embedded_postgresql_keeps_its_data_and_no_process(
    data_dir: Path, tmp_path: Path, command: Sequence[str], sent: signal.Signals
) -> None:
    with Server({"DATA_DIR": str(data_dir)}, command, cwd=tmp_path) as server:
        link = server.upload(server.register(), wav()).json()["URL for download"]
        assert processes_in(data_dir)
        server.stop(sent)
        assert not processes_in(data_dir)
    with Server({"DATA_DIR": str(data_dir)}, command, cwd=tmp_path) as again:
        mp3 = again.http.get(link.replace(server.url, again.url)).content
        assert len(decoded(mp3).samples) == 11025
        again.stop(sent)
        assert not processes_in(data_dir)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_start_says_where_it_listens_and_where_the_data_is(data_dir: Path) -> None:
    with Server({"DATA_DIR": str(data_dir)}) as server:
        assert server.url in server.log
        assert str(data_dir) in server.log


# The command line and what is seen of it


def test_help_names_every_setting_with_its_default() -> None:
    done = subprocess.run((*SERVICE, "--help"), capture_output=True, text=True, check=True)
    for each in fields(Settings):
        assert re.search(rf"(?m)^  {each.name.upper()} .*{each.default!r}\)$", done.stdout)


def test_command_line_goes_before_the_environment(start_server: StartServer) -> None:
    port = str(free_port())
    server = start_server((*SERVICE, "--host", "localhost", "--port", port), HOST="::1", PORT="1")
    assert server.url == f"http://localhost:{port}"
    assert server.http.get("/healthz").status_code == 200


@pytest.mark.slow
def test_data_dir_of_the_command_line_begins_where_it_is_typed(data_dir: Path) -> None:
    with Server({}, (*SERVICE, "--data-dir", "mine"), cwd=data_dir) as server:
        assert server.url
        assert (data_dir / "mine" / "postgresql").is_dir()


def test_busy_port_is_one_line_before_the_database_is_started(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with Server({"DATA_DIR": str(data_dir / "mine"), "PORT": port}) as server:
            assert server.process.wait(30) == 1
            [line] = server.log.splitlines()
            assert f"PORT {port}" in line
    assert not list(data_dir.iterdir())


def test_every_line_of_the_log_has_its_time(start_server: StartServer) -> None:
    server = start_server()
    server.convert(wav())
    lines = server.log.splitlines()
    assert any("Stored" in line for line in lines) and any("POST" in line for line in lines)
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line)

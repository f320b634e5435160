"""PostgreSQL fails."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from load import Load
from proxy import Proxy
from store import store_large
from support import (
    SERVICE,
    UVICORN_SERVICE,
    Postgres,
    Server,
    User,
    each_in,
    problem,
    query,
    wait_for,
)
from wav import LONG, SPEECH
from wire import (
    Downloading,
    Sending,
    at_rest,
    link_of,
    readiness,
    recovery,
    unavailable,
    watched,
    working,
)


def restart(database: Postgres, mode: str = "fast") -> None:
    database.stop(mode)
    database.start()


CALLS: dict[str, Callable[[Server, User, str], httpx.Response]] = {
    "registration": lambda server, user, link: server.http.post(
        "/api/registration/", json={"username": uuid.uuid4().hex}
    ),
    "upload": lambda server, user, link: server.upload(user, SPEECH),
    "download": lambda server, user, link: server.http.get(link),
    "listing": lambda server, user, link: server.http.get(
        f"/api/records?id_user={user.id}", headers=user.bearer
    ),
    "deletion": lambda server, user, link: server.http.delete(link, headers=user.bearer),
}


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_of_postgresql_between_requests_is_not_noticed(
    database: Postgres, service: Server, mode: str
) -> None:
    user = service.register()
    link = link_of(service.upload(user, SPEECH))
    with recovery(service):
        for call in CALLS.values():
            restart(database, mode)
            assert call(service, user, link).is_success
    assert service.records(user) == 1  # one uploaded, one deleted


@pytest.mark.parametrize("mode, file_first", [("fast", False), ("immediate", True)])
def test_restart_of_postgresql_during_an_encoding_is_not_noticed(
    database: Postgres, service: Server, mode: str, file_first: bool
) -> None:
    user = service.register()
    with recovery(service):
        with Sending(service, user, LONG, file_first=file_first) as sending:
            sending.share(0.5)
            if not file_first:
                wait_for(lambda: working(service))
            restart(database, mode)
            link = link_of(sending.finish())
        assert b"Xing" in service.http.get(link).content[:1000]
    assert service.records(user) == 1


def test_restart_of_postgresql_in_mid_download_is_not_noticed(
    database: Postgres, service: Server
) -> None:
    link, content = store_large(service, service.register())
    with recovery(service), Downloading(service, link) as downloading:
        at_rest(service)  # until the client takes more
        restart(database)
        assert downloading.finish() == content


def only_health_is_answered(
    server: Server,
    user: User,
    link: str,
    sending: Sending,
    downloading: Downloading,
    times: int = 1,
) -> None:
    """Check what becomes without a database of calls, so many of each, and of what has begun."""
    with ThreadPoolExecutor(30) as threads:
        calls = [
            threads.submit(call, server, user, link)
            for call in CALLS.values()
            for _ in range(times)
        ]
        upload, download = threads.submit(sending.finish), threads.submit(downloading.finish)
        for each in calls:
            unavailable(each.result())
        unavailable(upload.result())
        with pytest.raises(IncompleteRead):
            download.result()
    assert "database" in problem(wait_for(partial(readiness, server, 503)), 503)
    assert server.http.get("/healthz").status_code == 200


@pytest.mark.slow
def test_only_health_is_answered_while_postgresql_is_down(
    database: Postgres, service: Server, outage: Callable[[str], None]
) -> None:
    user = service.register()
    link, content = store_large(service, user)
    with recovery(service):
        with (
            Sending(service, user, LONG) as sending,
            Downloading(service, link) as downloading,
        ):
            sending.share(0.5)
            wait_for(lambda: working(service))
            outage("fast")
            only_health_is_answered(service, user, link, sending, downloading)
        database.start()
        assert wait_for(partial(readiness, service, 200))
        assert service.http.get(link).content == content
    assert service.records(user) == 1


@pytest.fixture(scope="module")
def proxied(database: Postgres) -> Iterator[tuple[Server, Proxy]]:
    """A service that reaches its database over a network that breaks."""
    url = database.create_database()
    name = urlsplit(url).path
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(str(database.directory / ".s.PGSQL.5432")))
        way = f"postgresql://postgres@127.0.0.1:{proxy.port}{name}?sslmode=disable"
        server = stack.enter_context(watched(way))
        assert server.url
        server.database_url = url
        yield server, proxy


@pytest.mark.parametrize(
    "cut_at, headers",
    [
        (b'COPY "wav_to_mp3"', {}),
        (b"PGCOPY", {}),
        (b"\xff\xfb", {}),
        (b"COPY 1\0", {}),
        (b"COPY 1\0", {"Idempotency-Key": "once"}),
    ],
)
def test_upload_is_stored_once_where_the_connection_breaks_while_it_is_stored(
    proxied: tuple[Server, Proxy], cut_at: bytes, headers: dict[str, str]
) -> None:
    server, proxy = proxied
    user = server.register()
    with recovery(server):
        with Sending(server, user, LONG, headers=headers) as sending:
            sending.share(0.5)
            wait_for(lambda: working(server))
            proxy.cut_at = cut_at
            link = link_of(sending.finish())
        assert proxy.cut_at is None
        assert b"Xing" in server.http.get(link).content[:1000]
    assert server.records(user) == 1


@pytest.mark.parametrize("table", ["users", "records"])
@pytest.mark.parametrize("end", ["pg_cancel_backend(pid)", "pg_terminate_backend(pid, 30000)"])
def test_query_that_postgresql_ends_is_repeated(service: Server, table: str, end: str) -> None:
    lock = f"""
    DO $$
    BEGIN
        LOCK TABLE wav_to_mp3.{table};
        LOOP
            PERFORM {end} FROM pg_locks
            WHERE relation = 'wav_to_mp3.{table}'::regclass AND NOT granted;
            EXIT WHEN FOUND;
            PERFORM pg_sleep(0.01);
        END LOOP;
    END $$
    """
    with recovery(service), ThreadPoolExecutor() as threads:
        ending = threads.submit(query, service.database_url, lock)
        held = f"SELECT FROM pg_locks WHERE relation = 'wav_to_mp3.{table}'::regclass AND granted"
        wait_for(lambda: query(service.database_url, held))
        assert service.upload(service.register(), SPEECH).status_code == 201
        ending.result()


TERMINATE = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def test_connections_that_postgresql_ends_under_load_are_not_missed(service: Server) -> None:
    link = link_of(service.upload(service.register(), SPEECH))
    with recovery(service):
        http = service.http
        with ThreadPoolExecutor(8) as threads:
            downloads = [threads.submit(http.get, link) for _ in range(500)]
            for number, download in enumerate(downloads):
                if number % 25 == 0:
                    query(service.database_url, TERMINATE)
                assert download.result().status_code == 200, service.log


def test_user_is_registered_once_where_the_answer_to_the_commit_is_lost(
    proxied: tuple[Server, Proxy],
) -> None:
    server, proxy = proxied
    with recovery(server):
        proxy.cut_at = b"Z\0\0\0\x05I"  # ready for the next query
        user = server.register()
        assert proxy.cut_at is None
        assert server.upload(user, SPEECH).status_code == 201


@pytest.mark.slow
def test_database_that_turns_read_only_is_still_read(database: Postgres) -> None:
    with watched(database.create_database()) as server:
        user = server.register()
        link = link_of(server.upload(user, SPEECH))
        name = urlsplit(server.database_url).path.removeprefix("/")
        setting = f"ALTER DATABASE {name} {{}} default_transaction_read_only"
        with recovery(server):
            query(database.url(), setting.format("SET") + " = on")
            query(server.database_url, TERMINATE)
            assert "read-only" in problem(wait_for(partial(readiness, server, 503)), 503)
            with ThreadPoolExecutor() as threads:
                answers = {
                    kind: threads.submit(call, server, user, link) for kind, call in CALLS.items()
                }
            for kind, answer in answers.items():
                if kind in ("download", "listing"):
                    assert answer.result().status_code == 200
                else:
                    unavailable(answer.result())
            query(database.url(), setting.format("RESET"))
            query(server.database_url, TERMINATE)
            assert wait_for(partial(readiness, server, 200))
        assert server.records(user) == 1


# It hangs


IMPATIENT = """
import service
service.QUERY_SECONDS, service.ACQUIRE_SECONDS = 1, 2
service.main()
"""


@contextmanager
def hanging(database: Postgres) -> Iterator[None]:
    for _ in range(2):  # the second time what the first one of all has started meanwhile
        each_in(database.directory, psutil.Process.suspend)
    try:
        yield
    finally:
        each_in(database.directory, psutil.Process.resume)


@pytest.mark.slow
def test_every_request_is_answered_while_postgresql_hangs(database: Postgres) -> None:
    with watched(database.create_database(), (sys.executable, "-c", IMPATIENT)) as server:
        user = server.register()
        link, content = store_large(server, user)
        with recovery(server):
            with (
                Sending(server, user, LONG) as sending,
                Downloading(server, link) as downloading,
            ):
                sending.share(0.5)
                wait_for(lambda: working(server))
                with hanging(database):  # calls: twice as many as there are connections
                    only_health_is_answered(server, user, link, sending, downloading, times=4)
            assert wait_for(partial(readiness, server, 200))
            assert server.http.get(link).content == content
        assert server.records(user) == 1


# It is not there when the service starts


OPEN = "SELECT FROM pg_stat_activity WHERE application_name = 'service' AND datname = $1"


def test_service_serves_before_its_database_does_and_comes_up_with_it(
    database: Postgres, outage: Callable[[str], None]
) -> None:
    url = database.create_database()
    name = urlsplit(url).path.removeprefix("/")
    outage("fast")
    with watched(url) as server:
        unavailable(server.http.post("/api/registration/", json={"username": "Bob"}))
        detail = problem(server.http.get("/readyz"), 503)
        assert "database" in detail and "Error" not in detail
        assert server.http.get("/healthz").status_code == 200
        [line] = [line for line in server.log.splitlines() if "ERROR" in line]
        assert "database" in line
        database.start()
        wait_for(lambda: query(database.url(), OPEN, name))  # with nobody asking
        assert wait_for(partial(readiness, server, 200))
        server.convert(SPEECH)


@pytest.mark.parametrize("command", [SERVICE, UVICORN_SERVICE])
def test_service_that_waits_for_its_database_can_be_stopped(
    database: Postgres, outage: Callable[[str], None], command: Sequence[str]
) -> None:
    url = database.create_database()
    outage("fast")
    with watched(url, command) as server:
        assert server.url
        stop(server)


@pytest.mark.parametrize("command", [SERVICE, UVICORN_SERVICE])
def test_service_whose_database_says_nothing_can_be_stopped_before_it_serves(
    command: Sequence[str],
) -> None:
    with (
        silent_database() as (listener, url),
        Server({"DATABASE_URL": url}, command) as server,
        listener.accept()[0],
    ):
        stop(server)


@pytest.mark.slow
def test_service_serves_although_its_database_says_nothing() -> None:
    with silent_database() as (_, url), Server({"DATABASE_URL": url}) as server:
        assert server.http.get("/healthz").status_code == 200
        assert "database" in problem(server.http.get("/readyz"), 503)
        stop(server)


@contextmanager
def silent_database() -> Iterator[tuple[socket.socket, str]]:
    """One that takes connections and does not speak: where it listens, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener, f"postgresql://postgres@127.0.0.1:{listener.getsockname()[1]}/x"


def stop(server: Server) -> None:
    """Stop a service whose server, if it is uvicorn's own, ends by the signal at last."""
    assert server.stop() in (0, -signal.SIGTERM if "uvicorn" in server.process.args else 0)
    assert "Traceback" not in server.log


# What never can work

SECRET = "sesame"
ADDRESSES: dict[str, Callable[[str], str]] = {
    "no such database": lambda url: url.replace("/test_", "/absent_"),
    "no such role": lambda url: url.replace("postgres@", "nobody@"),
    "wrong password": lambda url: url.replace("postgres@", f"guarded:{SECRET}@"),
    "no port": lambda url: url.replace("@/", "@localhost:port/"),
    "port out of range": lambda url: "postgresql://postgres@127.0.0.1:99999/x",
    "password that is taken for a port": lambda url: f"postgresql://Bob:{SECRET}/1@localhost/x",
    "unknown scheme": lambda url: url.replace("postgresql:", "mysql:"),
    "no URL": lambda url: "localhost",
    "unknown parameter": lambda url: url + "&nonsense=1",
    "wrong parameter": lambda url: url + "&sslmode=nonsense",
    "wrong parameter of PostgreSQL's": lambda url: url + "&client_encoding=nonsense",
    "absent certificate": lambda url: url + "&sslmode=verify-full&sslrootcert=/nonexistent",
    "no certificate": lambda url: f"{url}&sslmode=verify-full&sslrootcert={__file__}",
    "no default certificate": lambda url: url + "&sslmode=verify-full",
}


@pytest.fixture(scope="module")
def guarded(database: Postgres) -> Iterator[None]:
    """A role that has to give its password, and one that may do nothing."""
    access = database.directory / "pg_hba.conf"
    before = access.read_text()
    for role in ("guarded", "restricted"):
        query(database.url(), f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    access.write_text("local all guarded scram-sha-256\n" + before)
    query(database.url(), "SELECT pg_reload_conf()")
    yield
    access.write_text(before)
    query(database.url(), "SELECT pg_reload_conf()")
    for role in ("guarded", "restricted"):
        query(database.url(), f"DROP ROLE {role}")


@pytest.mark.parametrize("change", ADDRESSES.values(), ids=ADDRESSES)
def test_service_exits_with_a_line_where_the_address_is_wrong(
    database: Postgres, guarded: None, change: Callable[[str], str]
) -> None:
    with Server({"DATABASE_URL": change(database.create_database())}) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "DATABASE_URL" in line
        assert SECRET not in line


def test_service_exits_with_a_line_where_its_role_may_not_create_tables(
    database: Postgres, guarded: None
) -> None:
    url = database.create_database().replace("postgres@", "restricted@")
    with Server({"DATABASE_URL": url}) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "db.sql" in line


@pytest.mark.parametrize("in_url", [True, False])
def test_password_that_stood_in_the_template_is_refused(
    database: Postgres, monkeypatch: pytest.MonkeyPatch, in_url: bool
) -> None:
    url = database.create_database()
    if in_url:
        url = url.replace("postgres@", "postgres:change-me@")
    else:
        monkeypatch.setenv("PGPASSWORD", "change-me")  # as docker-compose.yml has it
    with Server({"DATABASE_URL": url}) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "change-me" in line


@pytest.fixture
def older(database: Postgres) -> Iterator[str]:
    """The URL of Debian's PostgreSQL 15, or an earlier one."""
    places = Path("/usr/lib/postgresql").glob("*/bin")
    found = [path for path in places if float(path.parent.name) < 16]
    if not found:
        pytest.skip("there is no PostgreSQL before 16")
    directory = Path(tempfile.mkdtemp(prefix="older-"))
    keywords: dict[str, Any] = {}
    if os.geteuid() == 0:  # whom PostgreSQL refuses
        owner = database.directory.stat()
        shutil.chown(directory, owner.st_uid, owner.st_gid)
        keywords = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": ()}

    def run(program: str, *arguments: str) -> None:
        command = (str(found[0] / program), f"--pgdata={directory}/data", *arguments)
        subprocess.run(command, check=True, cwd=directory, stdout=subprocess.DEVNULL, **keywords)

    try:
        run("initdb", "--username=postgres", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={directory}"
        run("pg_ctl", "start", "--wait", f"--log={directory}/log", f"--options={options}")
        yield f"postgresql://postgres@/postgres?host={directory}"
        run("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(directory)


def test_service_exits_with_a_line_where_postgresql_is_too_old(older: str) -> None:
    with Server({"DATABASE_URL": older}) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "PostgreSQL 16" in line


def test_mounted_service_says_in_a_line_where_the_address_is_wrong(database: Postgres) -> None:
    url = database.create_database().replace("/test_", "/absent_")
    with Server({"DATABASE_URL": url}, UVICORN_SERVICE) as server:
        for _ in range(2):
            unavailable(server.http.post("/api/registration/", json={"username": "Bob"}))
        assert server.log.count("DATABASE_URL") == 1
        stop(server)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_a_crash_of_postgresql(
    database: Postgres, service: Server
) -> None:
    with recovery(service):
        with Load(service) as load:
            before = len(load.acknowledged)
            restart(database, "immediate")
            wait_for(lambda: len(load.acknowledged) > before + 4)
        assert not load.cut
        assert set(load.refused) <= {503}, service.log
        assert load.all_downloads_from(service)

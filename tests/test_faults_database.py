"""PostgreSQL fails."""

import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import IncompleteRead
from urllib.parse import urlsplit

import httpx
import pytest

from load import Load
from proxy import Proxy
from store import store_large
from support import Postgres, Server, User, problem, query, wait_for
from wav import LONG, SPEECH
from wire import Downloading, Sending, at_rest, link_of, recovery, unavailable, watched, working


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


@pytest.mark.slow
def test_only_health_is_answered_while_postgresql_is_down(
    database: Postgres, service: Server, outage: Callable[[str], None]
) -> None:
    user = service.register()
    link, content = store_large(service, user)
    with recovery(service, cuts=True):
        with (
            Sending(service, user, LONG) as sending,
            Downloading(service, link) as downloading,
            ThreadPoolExecutor() as threads,
        ):
            sending.share(0.5)
            wait_for(lambda: working(service))
            outage("fast")
            calls = [threads.submit(call, service, user, link) for call in CALLS.values()]
            upload, download = threads.submit(sending.finish), threads.submit(downloading.finish)
            for call in calls:
                unavailable(call.result())
            unavailable(upload.result())
            with pytest.raises(IncompleteRead):
                download.result()
            assert "database" in problem(service.http.get("/readyz"), 503)
            assert service.http.get("/healthz").status_code == 200
        database.start()
        assert service.http.get("/readyz").status_code == 200
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
        (b'COPY "records"', {}),
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
        LOCK TABLE {table};
        LOOP
            PERFORM {end} FROM pg_locks
            WHERE relation = '{table}'::regclass AND NOT granted;
            EXIT WHEN FOUND;
            PERFORM pg_sleep(0.01);
        END LOOP;
    END $$
    """
    with recovery(service), ThreadPoolExecutor() as threads:
        ending = threads.submit(query, service.database_url, lock)
        held = f"SELECT FROM pg_locks WHERE relation = '{table}'::regclass AND granted"
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


def test_service_waits_for_a_postgresql_that_is_not_up_yet(
    database: Postgres, outage: Callable[[str], None]
) -> None:
    url = database.create_database()
    outage("fast")
    with watched(url) as server:
        wait_for(lambda: "waiting for it" in server.log)
        database.start()
        server.convert(SPEECH)


def test_service_that_waits_for_postgresql_can_be_stopped(
    database: Postgres, outage: Callable[[str], None]
) -> None:
    url = database.create_database()
    outage("fast")
    with watched(url) as server:
        wait_for(lambda: "waiting for it" in server.log)
        assert server.stop() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("/test_", "/absent_"),
        lambda url: url.replace("postgres@", "nobody@"),
        lambda url: url.replace("@/", "@localhost:port/"),
        lambda url: url.replace("postgresql:", "mysql:"),
        lambda url: "localhost",
    ],
)
def test_service_exits_with_a_line_where_the_address_is_wrong(
    database: Postgres, change: Callable[[str], str]
) -> None:
    with Server({"DATABASE_URL": change(database.create_database())}) as server:
        assert server.process.wait(30) not in (0, -signal.SIGTERM)
        [line] = server.log.splitlines()
        assert line.startswith("DATABASE_URL")


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

import hashlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import IncompleteRead
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from proxy import Proxy
from support import (
    FORM,
    UPLOAD,
    Postgres,
    Server,
    User,
    credentials,
    form,
    part,
    query,
    script,
    wait_for,
)
from wav import noise
from wire import (
    SPEECH,
    Answer,
    Sending,
    Wire,
    at_rest,
    gone,
    recovery,
    watched,
    working,
    written,
)

LONG = noise(10_000_000)


def unavailable(response: httpx.Response | Answer) -> None:
    """Check that this is an answer that says to come back later."""
    status = response.status_code if isinstance(response, httpx.Response) else response.status
    assert status == 503
    assert response.headers["Content-Type"] == "application/problem+json"
    assert int(response.headers["Retry-After"]) > 0


def link_of(response: httpx.Response | Answer) -> str:
    """The link in an answer that has to be 201."""
    if isinstance(response, httpx.Response):
        assert response.status_code == 201, response.text
    else:
        assert response.status == 201, response.body
    return str(response.headers["Location"])


def large_record(server: Server, user: User) -> tuple[str, bytes]:
    """A link and its content, of which the sockets between can hold but a part."""
    link = link_of(server.upload(user, SPEECH))
    content = os.urandom(8 << 20)
    sql = "UPDATE records SET mp3 = $1, size = $2, sha256 = sha256($1) WHERE id_record = $3"
    id_record = re.search("id_record=([^&]+)", link)
    assert id_record
    query(server.database_url, sql, content, len(content), uuid.UUID(id_record[1]))
    return link, content


class Downloading(Wire):
    """A download of which the first bytes are read."""

    def __init__(self, server: Server, link: str) -> None:
        super().__init__(server, receive_buffer=65536)
        self.head(link.removeprefix(server.url), {}, "GET")
        self._response = self.response("GET")
        assert self._response.status == 200
        self._start = self._response.read(100_000)

    def finish(self) -> bytes:
        return self._start + self._response.read()


# 1. The client goes away


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("share", [0, 0.5])
def test_client_that_goes_away_during_the_upload_leaves_nothing(
    service: Server, file_first: bool, share: float
) -> None:
    user = service.register()
    with recovery(service), Sending(service, user, LONG, file_first=file_first) as sending:
        sending.share(share)
        if share and not file_first:
            wait_for(lambda: working(service))
    assert service.records(user) == 0


def test_client_that_resets_the_connection_leaves_nothing(service: Server) -> None:
    user = service.register()
    with recovery(service), Sending(service, user, LONG) as sending:
        sending.share(0.5)
        wait_for(lambda: working(service))
        reset_on_close = struct.pack("ii", 1, 0)
        sending.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
    assert service.records(user) == 0


def test_client_that_goes_away_during_the_encoding_leaves_nothing(service: Server) -> None:
    user = service.register()
    with recovery(service):
        with Sending(service, user, LONG, file_first=True) as sending:
            sending.share(1)
            [encoder] = wait_for(lambda: working(service))
            encoder.suspend()  # lest it is done before the client has gone
        gone([encoder])
    assert service.records(user) == 0


def test_client_that_goes_away_during_the_download_leaves_nothing(service: Server) -> None:
    link, content = large_record(service, service.register())
    with recovery(service), Downloading(service, link):
        pass
    assert service.http.get(link).content == content


def test_many_clients_that_go_away_together_leave_nothing(service: Server) -> None:
    user = service.register()
    with recovery(service), ExitStack() as stack:
        for number in range(10):
            sending = Sending(service, user, LONG, file_first=number % 2 == 0)
            stack.enter_context(sending).share(number / 10)
        wait_for(lambda: working(service))
    assert service.records(user) == 0


# 2. The client stalls


def test_stalled_body_is_answered_408(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), ExitStack() as stack:
        stalled: list[Wire] = []
        for share in (0, 0.001, 0.5):
            for file_first in (False, True):
                sending = Sending(impatient, user, LONG, file_first=file_first)
                stalled.append(stack.enter_context(sending))
                sending.share(share)
        bodies = {UPLOAD: b"5\r\n--fro\r\n", "/api/registration/": b'5\r\n{"use\r\n'}
        for target, body in bodies.items():
            wire = stack.enter_context(Wire(impatient))
            wire.head(target, {**FORM, "Transfer-Encoding": "chunked"})
            wire.send(body)
            stalled.append(wire)
        assert [wire.answer().status for wire in stalled] == [408] * 8
    assert impatient.records(user) == 0


def test_body_that_trickles_for_ever_is_answered_408(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), Sending(impatient, user, LONG) as sending:

        def answered() -> bool:
            sending.share(2e-7)  # a byte
            return bool(select.select([sending.socket], [], [], 0.05)[0])

        wait_for(answered)
        assert sending.answer().status == 408
    assert impatient.records(user) == 0


def test_body_that_arrives_slowly_but_as_fast_as_a_recording_is_taken(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), Sending(impatient, user, noise(100_000)) as sending:
        sending.share(0.1)
        end = time.monotonic() + 4  # later than a body of nothing may end
        while time.monotonic() < end:
            assert not select.select([sending.socket], [], [], 0.2)[0]
            sending.share(0.0001)
        assert sending.finish().status == 201


def test_request_head_that_does_not_arrive_is_cut_off(impatient: Server) -> None:
    with (
        recovery(impatient),
        Wire(impatient) as silent,
        Wire(impatient) as half,
        Wire(impatient) as second,
    ):
        second.head("/healthz", {}, "GET")
        assert second.answer().status == 200
        for wire in (half, second):
            wire.send(b"POST /api/registration/ HTTP/1.1\r\nHost: ")
        for wire in (silent, half, second):
            cut_off(wire)


@pytest.mark.parametrize("headers, rest", [({}, b"\r\n"), ({"Content-Length": "9"}, b"1")])
def test_connection_on_which_nothing_more_comes_is_cut_off(
    impatient: Server, headers: dict[str, str], rest: bytes
) -> None:
    with recovery(impatient), Wire(impatient) as wire:
        wire.head("/healthz", headers, "GET")
        assert wire.answer().status == 200
        wire.send(rest)
        cut_off(wire)


def cut_off(wire: Wire) -> None:
    wire.socket.settimeout(10)
    with suppress(ConnectionResetError):
        while wire.socket.recv(1000):
            pass


def test_download_in_progress_does_not_mind_half_a_head(impatient: Server) -> None:
    link, content = large_record(impatient, impatient.register())
    with recovery(impatient), Downloading(impatient, link) as downloading:
        downloading.send(b"GET /heal")
        time.sleep(2)  # longer than a head may take
        assert downloading.finish() == content


# 3. ffmpeg fails


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("file_first, share", [(False, 0.5), (True, 1)])
def test_upload_whose_encoder_dies_or_hangs_is_answered_503(
    impatient: Server, sent: signal.Signals, file_first: bool, share: float
) -> None:
    user = impatient.register()
    with recovery(impatient):
        with Sending(impatient, user, LONG, file_first=file_first) as sending:
            sending.share(share)
            [encoder] = wait_for(lambda: working(impatient))
            encoder.suspend()  # lest it is done before
            encoder.send_signal(sent)
            unavailable(sending.finish())
        gone([encoder])
    assert impatient.records(user) == 0


def test_encoder_that_gets_on_slowly_is_waited_for(impatient: Server) -> None:
    user = impatient.register()
    with (
        recovery(impatient),
        Sending(impatient, user, noise(30_000_000), file_first=True) as sending,
    ):
        sending.share(1)
        [encoder] = wait_for(lambda: working(impatient))

        def get_on() -> None:
            encoder.suspend()
            before = written(encoder)
            assert not select.select([sending.socket], [], [], 0.3)[0]
            encoder.resume()
            wait_for(lambda: written(encoder) > before)

        end = time.monotonic() + 3  # later than it may stand still
        while time.monotonic() < end:
            get_on()
        assert sending.answer().status == 201


def test_encoder_that_dies_before_its_upload_is_replaced(service: Server) -> None:
    user = service.register()
    with recovery(service):
        [spare] = wait_for(service.encoders)
        spare.kill()
        gone([spare])
        assert service.upload(user, SPEECH).status_code == 201


def test_ffmpeg_in_a_script_ends_with_its_upload(database: Postgres, tmp_path: Path) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    script(ffmpeg, f'{get_ffmpeg_exe()} "$@"; exit $?')
    with watched(database.create_database(), FFMPEG=str(ffmpeg)) as server:
        user = server.register()
        with Sending(server, user, LONG, file_first=True) as sending:
            sending.share(1)
            encoders = wait_for(lambda: working(server))
            for encoder in encoders:
                encoder.suspend()  # lest it is done before the client has gone
        gone(encoders)
        children = server.children()
        server.process.terminate()
        server.process.wait(60)
        gone(children)  # the script's too, which are not the service's to wait for


@pytest.fixture(scope="module")
def exchangeable(database: Postgres) -> Iterator[tuple[Server, Path]]:
    """A service and its ffmpeg, which is a link."""
    with tempfile.TemporaryDirectory() as directory:
        ffmpeg = Path(directory) / "ffmpeg"
        with watched(database.create_database(), FFMPEG=str(ffmpeg)) as server:
            assert server.url  # with no ffmpeg there at all
            yield server, ffmpeg


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "not executable": lambda path: path.write_text("#!/bin/sh\n"),
    "no program": lambda path: script(path, "", interpreter="\x7fELF"),
    "silent": lambda path: script(path, "exit 1"),
    "killed": lambda path: script(path, "echo '[error] Cannot allocate memory' >&2; kill -9 $$"),
    "silent at the end": lambda path: script(path, "while read -r _; do :; done; exit 3"),
    "without its libraries": lambda path: script(
        path, "echo 'ffmpeg: error while loading shared libraries: libx' >&2; exit 127"
    ),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_upload_without_a_working_ffmpeg_is_answered_503(
    exchangeable: tuple[Server, Path], break_it: Callable[[Path], object]
) -> None:
    server, ffmpeg = exchangeable

    def exchange(make: Callable[[Path], object]) -> None:
        if ffmpeg.is_dir():
            ffmpeg.rmdir()
        ffmpeg.unlink(missing_ok=True)
        make(ffmpeg)
        spares = server.encoders()
        for spare in spares:
            spare.kill()
        gone(spares)

    exchange(lambda path: path.symlink_to(get_ffmpeg_exe()))
    user = server.register()
    with recovery(server):
        exchange(break_it)
        parts = [*credentials(user), part("file_wav", SPEECH, "speech.wav")]
        unavailable(server.send(*parts))
        unavailable(server.send(*reversed(parts)))
        unavailable(server.http.get("/readyz"))
        assert server.http.get("/healthz").status_code == 200
        exchange(lambda path: path.symlink_to(get_ffmpeg_exe()))
        assert server.http.get("/readyz").status_code == 200
    assert server.records(user) == 0


# 4. PostgreSQL fails


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
        f"/api/records?id_user={user.id}", headers={"Authorization": f"Bearer {user.token}"}
    ),
    "deletion": lambda server, user, link: server.http.delete(
        link, headers={"Authorization": f"Bearer {user.token}"}
    ),
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
    link, content = large_record(service, service.register())
    with recovery(service), Downloading(service, link) as downloading:
        at_rest(service)  # until the client takes more
        restart(database)
        assert downloading.finish() == content


def test_only_health_is_answered_while_postgresql_is_down(
    database: Postgres, service: Server, outage: Callable[[str], None]
) -> None:
    user = service.register()
    link, content = large_record(service, user)
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
            unavailable(service.http.get("/readyz"))
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


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}])
def test_upload_is_stored_once_where_the_answer_to_its_commit_is_lost(
    proxied: tuple[Server, Proxy], headers: dict[str, str]
) -> None:
    server, proxy = proxied
    user = server.register()
    with recovery(server):
        with Sending(server, user, SPEECH, headers=headers) as sending:
            sending.share(0.5)
            wait_for(server.encoders)
            proxy.cut_at = b"COPY 1\0"
            link = link_of(sending.finish())
        assert proxy.cut_at is None
        assert b"Xing" in server.http.get(link).content[:1000]
    assert server.records(user) == 1


@pytest.mark.parametrize("cut_at", [b'COPY "records"', b"PGCOPY", b"\xff\xfb"])
def test_upload_is_stored_once_where_the_connection_breaks_while_it_is_stored(
    proxied: tuple[Server, Proxy], cut_at: bytes
) -> None:
    server, proxy = proxied
    user = server.register()
    with recovery(server):
        with Sending(server, user, LONG) as sending:
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


# 5. The disk is full


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
        parts = [*credentials(user), part("file_wav", LONG, "long.wav")]
        with recovery(server):
            unavailable(server.send(*(reversed(parts) if file_first else parts)))
        assert server.records(user) == 0


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


# 6. and 7. The service is ended


class Load:
    """Users that upload one WAV after the other until the service is gone or the load is over."""

    def __init__(self, server: Server, users: int = 4) -> None:
        self.acknowledged: list[tuple[str, int]] = []  # links, and which of the WAVs
        self.refused: list[int] = []
        self.cut: list[httpx.TransportError] = []
        self._server = server
        self._wavs = [noise(100_000 * number) for number in range(1, users + 1)]
        self._expected = [hashlib.sha256(server.convert(wav)).digest() for wav in self._wavs]
        self._threads = ThreadPoolExecutor(users)
        self._over = Event()

    def __enter__(self) -> Self:
        for number in range(len(self._wavs)):
            self._threads.submit(self._upload, number, self._server.register())
        wait_for(lambda: len(self.acknowledged) >= 4)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._threads.shutdown()

    def _upload(self, number: int, user: User) -> None:
        parts = *credentials(user), part("file_wav", self._wavs[number], "noise.wav")
        content = form(*(reversed(parts) if number % 2 else parts))
        with httpx.Client(base_url=self._server.url, timeout=60, trust_env=False) as http:
            while not self._over.is_set():
                try:
                    response = http.post(UPLOAD, content=content, headers=FORM)
                except httpx.TransportError as error:
                    self.cut.append(error)
                    return
                if response.status_code == 201:
                    self.acknowledged.append((response.headers["Location"], number))
                else:
                    self.refused.append(response.status_code)

    def has_acknowledged(self, records: int) -> bool:
        return len(self.acknowledged) >= records

    def all_downloads_from(self, server: Server) -> bool:
        """Whether each record that was acknowledged has the digest of what was acknowledged."""
        return all(
            hashlib.sha256(
                server.http.get(link.replace(self._server.url, server.url)).content
            ).digest()
            == self._expected[number]
            for link, number in self.acknowledged
        )


WRONG_DIGESTS = "SELECT FROM records WHERE sha256 <> sha256(mp3)"


def test_nothing_acknowledged_is_lost_by_kill_9(database: Postgres) -> None:
    url = database.create_database()
    with watched(url) as killed, Load(killed) as load:
        children = killed.children()
        killed.process.kill()
        killed.process.wait()
    gone(children)
    with watched(url) as server:
        assert load.all_downloads_from(server)
        assert not query(url, WRONG_DIGESTS)
        with recovery(server):
            pass


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
        assert not query(service.database_url, WRONG_DIGESTS)


def test_nothing_acknowledged_is_lost_where_encoders_are_killed(service: Server) -> None:
    with recovery(service):
        with Load(service) as load:
            for wanted in range(10, 40, 10):
                wait_for(partial(load.has_acknowledged, wanted))
                for encoder in service.encoders():
                    with suppress(psutil.NoSuchProcess):
                        encoder.kill()
            wait_for(partial(load.has_acknowledged, 40))
        assert not load.cut
        assert set(load.refused) <= {503}
        assert load.all_downloads_from(service)


def test_nothing_acknowledged_is_lost_by_sigterm(database: Postgres) -> None:
    url = database.create_database()
    with watched(url) as stopped, Load(stopped) as load:
        assert stopped.stop() == 0
    assert not load.refused
    with watched(url) as server:
        assert load.all_downloads_from(server)
        assert not query(url, WRONG_DIGESTS)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_work_in_progress_is_finished_after_a_signal(
    database: Postgres, sent: signal.Signals
) -> None:
    with watched(database.create_database(), MAX_ENCODERS="1") as server:
        user = server.register()
        link, content = large_record(server, user)
        with (
            Downloading(server, link) as downloading,
            Sending(server, user, LONG) as first,
            Sending(server, user, SPEECH, headers={"Expect": "100-continue"}) as waiting,
            Wire(server) as idle,
        ):
            first.share(0.5)
            wait_for(lambda: working(server))
            children = server.children()
            os.killpg(server.process.pid, sent)  # as Ctrl-C does
            wait_for(lambda: "Waiting for connections" in server.log)
            assert idle.socket.recv(1000) == b""
            with pytest.raises(ConnectionRefusedError):
                Wire(server)
            assert first.finish().status == 201
            assert waiting.finish().status == 201
            assert downloading.finish() == content
        assert server.end(children) == 0
        assert "Traceback" not in server.log
        assert server.records(user) == 3


def test_stalled_upload_does_not_hold_up_sigterm(database: Postgres) -> None:
    with watched(database.create_database(), STALL_SECONDS="1") as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            wait_for(lambda: working(server))
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            assert sending.answer().status == 408
        assert server.end(children) == 0
        assert server.records(user) == 0


def test_upload_that_does_not_end_does_not_outlast_the_grace_after_sigterm(
    database: Postgres,
) -> None:
    with watched(database.create_database(), STALL_SECONDS="3600") as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            encoders = wait_for(lambda: working(server))
            server.process.send_signal(signal.SIGTERM)
            answer = sending.answer()
            unavailable(answer)
            assert b"The service is stopping" in answer.body
        assert server.process.wait(60) == 0
        gone(encoders)
        assert server.records(user) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_service_at_once(database: Postgres, sent: signal.Signals) -> None:
    with watched(database.create_database()) as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            wait_for(lambda: working(server))
            server.process.send_signal(sent)
            wait_for(lambda: "Waiting for connections" in server.log)
            server.stop(sent)
        assert server.records(user) == 0

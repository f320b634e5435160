"""Clients that speak HTTP by hand, and what a service holds while it has nothing to do."""

import asyncio
import select
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import asyncpg
import httpx
import psutil

from support import FORM, SERVICE, UPLOAD, Server, User, fields, form, part, query, wait_for
from wav import SPEECH


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    body: bytes


class Wire:
    """A connection on which the test sends what it likes, when it likes."""

    def __init__(self, server: Server, receive_buffer: int | None = None) -> None:
        address = urlsplit(server.url)
        self._host = address.netloc
        with ExitStack() as stack:
            self.socket = stack.enter_context(socket.socket())
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(60)
            self.socket.connect((address.hostname, address.port))
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes | memoryview) -> None:
        self.socket.sendall(data)

    def head(self, target: str, headers: Mapping[str, str], method: str = "POST") -> None:
        """Send the head of a request."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def response(self, method: str = "POST") -> HTTPResponse:
        """The final answer, to be read: those with 100 are passed over."""
        response = HTTPResponse(self.socket, method=method)
        response.begin()
        return response

    def answer(self) -> Answer:
        with self.response() as response:
            return Answer(response.status, response.headers, response.read())


def chunked(body: bytes) -> bytes:
    pieces = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class Sending(Wire):
    """An upload that is sent bit by bit."""

    def __init__(
        self,
        server: Server,
        user: User,
        content: bytes,
        *,
        file_first: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(server)
        self._rest = memoryview(form(*fields(user, content, file_first=file_first)))
        length = {"Content-Length": str(len(self._rest))}
        self.head(UPLOAD, {**FORM, **length, **(headers or {})})

    def share(self, share: float) -> None:
        """Send this share of what is left."""
        size = int(len(self._rest) * share)
        self.send(self._rest[:size])
        self._rest = self._rest[size:]

    def finish(self) -> Answer:
        self.share(1)
        return self.answer()


class Waiting(Wire):
    """An upload whose client sends its form only when it is told to, its credentials before."""

    def __init__(self, server: Server, user: User, content: bytes = SPEECH) -> None:
        super().__init__(server)
        self._form = form(part("file_wav", content, "speech.wav"))
        length = {"Content-Length": str(len(self._form)), "Expect": "100-continue"}
        self.head(f"{UPLOAD}?id_user={user.id}", {**FORM, **user.bearer, **length})

    def told(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def finish(self) -> Answer:
        self.send(self._form)
        return self.answer()


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


BUSY = """
SELECT FROM pg_stat_activity
WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()
"""


def settle(server: Server) -> None:
    """Return when all that was sent to a service has come as far as it comes by itself."""
    assert server.http.get("/healthz").status_code == 200
    wait_for(lambda: not query(server.database_url, BUSY))
    for _ in range(2):  # the answer of the database has been read before
        assert server.http.get("/healthz").status_code == 200


def link_of(response: httpx.Response | Answer) -> str:
    """The link in an answer that has to be 201."""
    if isinstance(response, httpx.Response):
        assert response.status_code == 201, response.text
    else:
        assert response.status == 201, response.body
    return str(response.headers["Location"])


def unavailable(response: httpx.Response | Answer) -> None:
    """Check that this is an answer that says to come back later."""
    status = response.status_code if isinstance(response, httpx.Response) else response.status
    assert status == 503
    assert response.headers["Content-Type"] == "application/problem+json"
    assert int(response.headers["Retry-After"]) > 0


def readiness(server: Server, status: int) -> httpx.Response | None:
    """The answer of /readyz once it has this status: it looks once a second at the most."""
    response = server.http.get("/readyz")
    return response if response.status_code == status else None


def written(encoder: psutil.Process) -> int:
    """The bytes of MP3 that are there by now."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{encoder.pid}/fd/1").stat().st_size
    return 0


def working(server: Server) -> list[psutil.Process]:
    """The encoders that have written some MP3 by now: one may wait for the next upload."""
    return [encoder for encoder in server.encoders() if written(encoder)]


def peak_memory(server: Server) -> int:
    """The most bytes that the process of the service ever had in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Held(NamedTuple):
    """What a service holds: one child is the encoder that it keeps started ahead."""

    children: int
    descriptors: int  # besides connections to the database, which it may keep
    busy_connections: int


BACKENDS = """
SELECT count(*), count(*) FILTER (WHERE state <> 'idle') AS busy
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'service'
"""


@contextmanager
def watched(
    database_url: str, command: Sequence[str] = SERVICE, **settings: str
) -> Iterator[Server]:
    """A service whose connections to the database can be told from those of the tests."""
    settings["DATABASE_URL"] = f"{database_url}&application_name=service"
    with Server(settings, command) as server:
        server.database_url = database_url
        yield server


def at_rest(server: Server, expected: Held | None = None) -> Held:
    """Wait until what a watched service holds is what is expected, or stays as it is."""

    def resting(last: Held, times: int) -> bool:
        if expected:
            return last == expected
        return times >= 5 and last.children == 1 and not last.busy_connections

    async def held(connection: "asyncpg.Connection[Any]") -> Held:
        row = await connection.fetchrow(BACKENDS)
        assert row
        descriptors = psutil.Process(server.process.pid).num_fds()
        return Held(len(server.children()), descriptors - row["count"], row["busy"])

    async def settled() -> Held:
        connection = await asyncpg.connect(server.database_url)
        try:
            last, times = await held(connection), 0
            async with asyncio.timeout(30):
                while not resting(last, times):
                    await asyncio.sleep(0.01)
                    now = await held(connection)
                    last, times = now, times + 1 if now == last else 0
        except TimeoutError:
            raise AssertionError(f"it holds {last}, not {expected}") from None
        finally:
            await connection.close()
        return last

    if "http" in server.__dict__:
        server.http.close()
        del server.http
    return asyncio.run(settled())


@contextmanager
def recovery(server: Server) -> Iterator[None]:
    """After it the service has to work, hold what it held before, and have logged no fault."""
    logged = len(server.log)
    server.convert(SPEECH)
    before = at_rest(server)
    yield
    assert b"Xing" in server.convert(SPEECH)[:1000]
    log = server.log[logged:]
    assert '" 500' not in log and "Traceback" not in log, log
    at_rest(server, before)


def gone(processes: list[psutil.Process]) -> None:
    wait_for(lambda: not any(process.is_running() for process in processes))

"""Measures the service against what it stands on: bare ffmpeg, PostgreSQL, a bare application.

    .venv/bin/python tests/benchmark.py [--quick] [ROW ...]

Prints a table in Markdown. In each round the service and its opponents take turns, so that whatever
else the machine does meets all; the ratio is the median of those of the rounds.
"""

import argparse
import asyncio
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import psutil
from imageio_ffmpeg import get_ffmpeg_exe

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("lib"))]
with warnings.catch_warnings(action="ignore"):  # about a machine without XDG_RUNTIME_DIR
    import service
    import support
    from support import Postgres, Server, query
    from wav import pcm_format, riff

CORES = len(os.sched_getaffinity(0))
SETTINGS = service.read_settings()
FFMPEG = SETTINGS.ffmpeg or get_ffmpeg_exe()
SECOND = 44100 * 4  # bytes of 16-bit stereo
MP3 = 110_000
MIB = 1 << 20

clock = time.perf_counter

# The table -----------------------------------------------------------------------------------


def row(
    what: str,
    opponent: str,
    pairs: Sequence[tuple[float, float]],
    unit: Callable[[float], str],
    to_reach: str = "",
) -> str:
    """Sum up what was measured of the service and of its opponent, round by round."""
    ours, theirs = (unit(median(column)) for column in zip(*pairs, strict=True))
    ratio = median(our / their for our, their in pairs)
    return f"| {what} | {ours} | {opponent} | {theirs} | {ratio:.3f} | {to_reach} |"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def mebibytes(size: float) -> str:
    return f"{size / MIB:.3g} MiB"


def rate(a_second: float) -> str:
    return f"{a_second:,.1f}/s"


def timed(work: Callable[[], object], times: int = 1) -> float:
    began = clock()
    for _ in range(times):
        work()
    return (clock() - began) / times


# Recordings ----------------------------------------------------------------------------------


# In each channel two chords a second, and noise that decays in each, as drums and consonants do.
NOTES = "sin(t*{0}*(1+floor(mod(2*t,7))/5))+sin(t*{1}*(1+floor(mod(2*t,5))/4))"
CHANNEL = f"0.15*({NOTES})+0.3*(random({{2}})-0.5)*pow(1-mod(2*t,1),3)"
SOURCE = f"aevalsrc='{CHANNEL.format(1400, 2100, 0)}|{CHANNEL.format(900, 3300, 1)}':s=44100:d=6"
MUSIC = subprocess.run(
    [FFMPEG, "-loglevel", "error", "-f", "lavfi", "-i", SOURCE, "-f", "s16le", "-"],
    check=True,
    capture_output=True,
).stdout


def wav(size: int) -> list[bytes]:
    """A WAV with size bytes of audio, in pieces: the clip over and over."""
    header = bytearray(riff(pcm_format(1, 16, 44100, 2), b"", declared=size))
    header[4:8] = (len(header) - 8 + size).to_bytes(4, "little")
    whole, rest = divmod(size, len(MUSIC))
    return [bytes(header), *[MUSIC] * whole, MUSIC[:rest]]


CLIP = wav(6 * SECOND)
LONG = wav(600 * SECOND)
GIBIBYTE = wav((1 << 30) - len(CLIP[0]))

# The service and its clients -----------------------------------------------------------------

# The clients share the cores with the service: so they send what lies ready in memory, and look at
# no more of an answer than its status and length. And they are this process, which has long been
# running: curl would add its own start to each upload, and only that of bare ffmpeg is to count.


def connect(url: str) -> socket.socket:
    at = urlsplit(url)
    connection = socket.create_connection((at.hostname, at.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl does
    return connection


def request(method: str, target: str, headers: dict[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **headers}.items()]
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


def answer(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 16)
    assert re.match(rb"HTTP/1.1 (100|2..) ", received), received
    length = re.search(rb"(?i)\ncontent-length: ([0-9]+)", received)
    size = received.index(b"\r\n\r\n") + 4 + int(length[1] if length else 0)
    while len(received) < size:
        received += connection.recv(size - len(received), socket.MSG_WAITALL)
    return received


class Fetch:
    """A request sent again and again on one connection: each answer is as long as the first."""

    def __init__(self, url: str, target: str, headers: dict[str, str]) -> None:
        self._connection, self._sent = connect(url), request("GET", target, headers)
        self._connection.sendall(self._sent)
        self._received = bytearray(answer(self._connection))

    def __call__(self) -> None:
        self._connection.sendall(self._sent)
        size = self._connection.recv_into(self._received, flags=socket.MSG_WAITALL)
        assert size == len(self._received) and self._received.startswith(b"HTTP/1.1 20"), size


class Service:
    """The service as a process of its own, warmed up."""

    def __init__(self, server: Server) -> None:
        self.process = psutil.Process(server.process.pid)
        self.url, self.database_url, self.user = server.url, server.database_url, server.register()
        for _ in range(3):
            self.upload(CLIP)

    def upload(self, pieces: Sequence[bytes], pace: float = math.inf) -> float:
        """Upload as curl does, over a new connection; return the time from the end to the answer.

        pace: bytes a second.
        """
        parts = *support.credentials(self.user), support.part("file_wav", b"", "clip.wav")[:-2]
        body = [*parts, *pieces, b"\r\n" + support.form()]
        headers = {"Content-Length": str(sum(map(len, body))), "Expect": "100-continue"}
        with connect(self.url) as connection:
            connection.sendall(request("POST", support.UPLOAD, support.FORM | headers))
            answer(connection)
            sent, began = 0, clock()
            for piece in body:
                step = len(piece) if pace == math.inf else 1 << 16
                for start in range(0, len(piece), step or 1):
                    time.sleep(max(began + sent / pace - clock(), 0))
                    connection.sendall(memoryview(piece)[start : start + step])
                    sent += step
            last = clock()
            answer(connection)
            return clock() - last

    def fill(self, count: int, size: int) -> list[UUID]:
        """Store count records of size bytes each, a second apart."""
        sql = """
            INSERT INTO wav_to_mp3.records (id_user, id_record, created_at, idempotency_key,
                filename, size, sha256, duration, mp3)
            SELECT $1, id, now() - n * interval '1 s', id, 'clip.mp3',
                $3, sha256(''), 6, convert_to(repeat('x', $3), 'UTF8')
            FROM (SELECT n, gen_random_uuid() AS id FROM generate_series(1, $2) AS n) AS new
            RETURNING id_record
        """
        # Without the trigger, which would bring the user's row up to date for each of them.
        url = f"{self.database_url}&session_replication_role=replica"
        rows = query(url, sql, self.user.id, count, size)
        query(self.database_url, "VACUUM ANALYZE wav_to_mp3.records")  # or in some round it began
        return [row["id_record"] for row in rows]

    def fetch(self, target: str, **headers: str) -> Fetch:
        return Fetch(self.url, f"{target}&id_user={self.user.id}", headers)

    def download(self, id_record: UUID, **headers: str) -> Fetch:
        return self.fetch(f"/api/download?id_record={id_record}", **headers)


class Bench(NamedTuple):
    postgres: Postgres
    scratch: Path
    quick: bool

    def rounds(self, count: int) -> range:
        return range(max(count // 5, 1) if self.quick else count)

    @contextmanager
    def service(self) -> Iterator[Service]:
        settings = {"DATABASE_URL": self.postgres.create_database()}
        with Server({**settings, "MP3_QUALITY": str(SETTINGS.mp3_quality)}) as server:
            yield Service(server)

    def wav(self, pieces: Sequence[bytes]) -> str:
        path = self.scratch / f"{len(pieces)}.wav"
        path.write_bytes(b"".join(pieces))
        return str(path)

    def by_hand(self, pieces: Sequence[bytes]) -> Callable[[], None]:
        """Encode as a person does."""
        mp3 = str(self.scratch / "by-hand.mp3")
        quality = str(SETTINGS.mp3_quality)
        return partial(run, [FFMPEG, "-y", "-i", self.wav(pieces), "-q:a", quality, mp3])

    def same_flags(self, pieces: Sequence[bytes], name: str = "same") -> list[str]:
        """The command of the service's encoder, but from file to file."""
        mp3 = str(self.scratch / f"{name}.mp3")
        files = {"pipe": "file", "pipe:0": self.wav(pieces)}
        arguments = [files.get(argument, argument) for argument in service.ARGUMENTS.split()]
        filters = ["-af", "aformat=sample_fmts=s16p|s32p"]
        return [FFMPEG, *arguments, *filters, "-q:a", str(SETTINGS.mp3_quality), "-y", mp3]


def run(command: list[str]) -> None:
    """Run it for the least that a start can cost."""
    quiet = [(os.POSIX_SPAWN_OPEN, output, os.devnull, os.O_WRONLY, 0) for output in (1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    assert os.waitpid(pid, 0)[1] == 0, command


# What serves the MP3s beside the service -----------------------------------------------------

# Each answers GET /ID_USER/ID_RECORD, and does no more than it has to.

BARE = """
import os
import asyncpg

SELECT = "SELECT mp3 FROM wav_to_mp3.records WHERE id_user = $1 AND id_record = $2"
pool = None

async def app(scope, receive, send):
    global pool
    pool = pool or await asyncpg.create_pool(os.environ["DATABASE_URL"])
    _, id_user, id_record = scope["path"].split("/")
    mp3 = await pool.fetchval(SELECT, int(id_user), id_record)
    headers = [(b"content-type", b"audio/mpeg"), (b"content-length", b"%d" % len(mp3))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": mp3})
"""

FLASK = """
import os
from flask import Flask, Response
from sqlalchemy import create_engine, text

SELECT = text("SELECT mp3 FROM wav_to_mp3.records WHERE id_user = :user AND id_record = :record")
url = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:")
engine = create_engine(url, pool_size=10)
app = Flask(__name__)

@app.get("/<int:user>/<uuid:record>")
def download(user, record):
    with engine.connect() as connection:
        mp3 = connection.scalar(SELECT, {"user": user, "record": record})
    return Response(mp3, mimetype="audio/mpeg")
"""

NGINX = """
daemon off; user root; pid nginx.pid; error_log stderr; events {}
http {
    access_log access.log; default_type audio/mpeg; sendfile on; keepalive_requests 1000000;
    client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t;
    scgi_temp_path t;
    server { listen 127.0.0.1:PORT; root ..; }
}
"""

# What opponent.py holds, and the command that serves it.
PYTHON = (sys.executable, "-m")
UVICORN = "uvicorn --port PORT --http h11 --loop asyncio --lifespan off opponent:app"
GUNICORN = "gunicorn --bind 127.0.0.1:PORT --threads 8 --no-control-socket opponent:app"
OPPONENTS: dict[str, tuple[str, Sequence[str]]] = {
    "a bare ASGI application": (BARE, (*PYTHON, *UVICORN.split())),
    "Flask, SQLAlchemy and gunicorn": (FLASK, (*PYTHON, *GUNICORN.split())),
    "nginx, from a file": (NGINX, ("nginx", "-p", ".", "-c", "opponent.py")),
}


@contextmanager
def opponent(name: str, scratch: Path, database_url: str) -> Iterator[tuple[psutil.Process, str]]:
    """Run an opponent; the context has its process and its URL."""
    port, folder = support.free_port(), Path(tempfile.mkdtemp(dir=scratch))
    text, command = OPPONENTS[name]

    def listening() -> bool:
        assert process.poll() is None, command
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    (folder / "opponent.py").write_text(text.replace("PORT", str(port)))
    with subprocess.Popen(
        [word.replace("PORT", str(port)) for word in command],
        cwd=folder,
        env={**os.environ, "DATABASE_URL": database_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            support.wait_for(listening)
            yield psutil.Process(process.pid), f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)


def cpu_seconds(server: psutil.Process) -> float:
    """Return what a server and its workers have used."""
    times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


# The rows ------------------------------------------------------------------------------------


def clip(bench: Bench) -> Iterator[str]:
    bare = bench.by_hand(CLIP)
    with bench.service() as ours:
        upload = partial(ours.upload, CLIP)
        pairs = [(timed(upload), timed(bare)) for _ in bench.rounds(50)]
    yield row("upload of 6 s", "ffmpeg by hand", pairs, duration, "at most 0.6")


def long(bench: Bench) -> Iterator[str]:
    by_hand, same_flags = bench.by_hand(LONG), partial(run, bench.same_flags(LONG))
    with bench.service() as ours:
        upload = partial(ours.upload, LONG)
        rounds = [(timed(upload), timed(by_hand), timed(same_flags)) for _ in bench.rounds(5)]
    what, opponents = "upload of 10 min of CD audio", ("ffmpeg by hand", "ffmpeg, same flags")
    for number, opponent in enumerate(opponents, 1):
        pairs = [(times[0], times[number]) for times in rounds]
        yield row(what, opponent, pairs, duration, "at most 1")


def uploads(bench: Bench) -> Iterator[str]:
    count = 48
    names = "\n".join(map(str, range(count))).encode()
    command = ["xargs", "-P", str(CORES), "-I{}", *bench.same_flags(CLIP, "{}")]
    bare = partial(subprocess.run, command, input=names, stderr=subprocess.DEVNULL, check=True)
    pairs: dict[int, list[tuple[float, float]]] = {2: [], 4: [], 16: []}
    with bench.service() as ours:

        def upload(at_a_time: int) -> None:
            with ThreadPoolExecutor(at_a_time) as pool:
                list(pool.map(ours.upload, [CLIP] * count))

        for _ in bench.rounds(5):
            theirs = count / timed(bare)
            for at_a_time, measured in pairs.items():
                measured.append((count / timed(partial(upload, at_a_time)), theirs))
    for at_a_time, measured in pairs.items():
        what = f"uploads of 6 s, {at_a_time} at a time"
        yield row(what, f"`xargs -P {CORES}` of ffmpeg, same flags", measured, rate, "at least 1")


def while_encoding(ours: Service, uploads: int, work: Callable[[], object]) -> list[float]:
    """Return how long work takes, time after time, beside uploads of 10 min."""
    with ThreadPoolExecutor(uploads) as pool:
        encoding, times = [pool.submit(ours.upload, LONG) for _ in range(uploads)], []
        while not any(upload.done() for upload in encoding):
            times.append(timed(work))
        for upload in encoding:
            upload.result()
    return times


def beside(bench: Bench) -> Iterator[str]:
    with bench.service() as ours:
        upload = partial(ours.upload, CLIP)
        pairs = [
            (median(while_encoding(ours, 3, upload)), median(timed(upload) for _ in range(20)))
            for _ in bench.rounds(5)
        ]
    what = "upload of 6 s beside three long ones, median"
    yield row(what, "alone", pairs, duration, "at most 2")


def p99(bench: Bench) -> Iterator[str]:
    def worst(times: list[float]) -> float:
        return sorted(times)[len(times) * 99 // 100]

    with bench.service() as ours:
        fetch = ours.download(ours.fill(1, MP3)[0])
        pairs = [
            (worst(while_encoding(ours, CORES, fetch)), worst([timed(fetch) for _ in range(2000)]))
            for _ in bench.rounds(5)
        ]
    what = "download of 110 KB while every core encodes, p99"
    yield row(what, "idle", pairs, duration, "at most 2.2")


def store(bench: Bench) -> Iterator[str]:
    file = bench.postgres.directory / "mp3"  # where root's PostgreSQL, another user's, may write

    async def copied() -> float:
        """Let PostgreSQL store once more what was stored last, from a file of its own."""
        connection = await asyncpg.connect(ours.database_url)
        newest, times = "SELECT * FROM wav_to_mp3.records ORDER BY created_at DESC LIMIT 1", []
        try:
            await connection.execute(f"COPY ({newest}) TO '{file}' (FORMAT binary)")
            for _ in range(3):
                await connection.execute("DELETE FROM wav_to_mp3.records")
                began = clock()
                await connection.execute(f"COPY wav_to_mp3.records FROM '{file}' (FORMAT binary)")
                times.append(clock() - began)
            return median(times)
        finally:
            await connection.close()

    with bench.service() as ours:
        pairs = [
            (ours.upload(LONG, pace=12_500_000), asyncio.run(copied())) for _ in bench.rounds(5)
        ]
    what = "last byte of 10 min at 12.5 MB/s to the answer"
    yield row(what, "COPY of it from a file of the server", pairs, duration, "at most 1.4")


def downloads(bench: Bench) -> Iterator[str]:
    def a_cpu_second(server: psutil.Process, url: str, target: str) -> float:
        """How many downloads, eight at a time, cost the server a second of its CPU."""
        times, before = 500, cpu_seconds(server)
        fetches = [Fetch(url, target.format(id_record), {}) for id_record in ids]
        with ThreadPoolExecutor(len(ids)) as pool:
            list(pool.map(partial(timed, times=times), fetches))
        return times * len(ids) / (cpu_seconds(server) - before)

    names = [name for name, (_, command) in OPPONENTS.items() if shutil.which(command[0])]
    with bench.service() as ours, ExitStack() as stack:
        ids, user = ours.fill(8, MP3), str(ours.user.id)
        (bench.scratch / user).mkdir()
        for id_record in ids:
            (bench.scratch / user / str(id_record)).write_bytes(bytes(MP3))
        link = f"/api/download?id_user={user}&id_record={{}}"
        servers = [(ours.process, ours.url, link)]
        for name in names:
            running = stack.enter_context(opponent(name, bench.scratch, ours.database_url))
            servers.append((*running, f"/{user}/{{}}"))
        rounds = [[a_cpu_second(*server) for server in servers] for _ in bench.rounds(5)]
    for number, name in enumerate(names, 1):
        pairs = [(rates[0], rates[number]) for rates in rounds]
        to_reach = "at least 0.85" if number == 1 else ""
        yield row("downloads of 110 KB in a second of CPU", name, pairs, rate, to_reach)


def ranges(bench: Bench) -> Iterator[str]:
    with bench.service() as ours:
        large, small = (
            ours.download(ours.fill(1, size)[0], range="bytes=-65536") for size in (500 * MIB, MIB)
        )
        pairs = [(timed(large, 100), timed(small, 100)) for _ in bench.rounds(15)]
    yield row("last 64 KiB of 500 MiB", "of 1 MiB", pairs, duration, "at most 1.2")


def memory(bench: Bench) -> Iterator[str]:
    with bench.service() as ours:
        proc, idle = Path(f"/proc/{ours.process.pid}"), ours.process.memory_info().rss
        (proc / "clear_refs").write_text("5")  # forgets the peak
        ours.upload(GIBIBYTE)
        peak = re.search(r"VmHWM:\s*([0-9]+) kB", (proc / "status").read_text())
        assert peak
    what = "memory while 1 GiB of WAV streams in"
    yield row(what, "the service at rest", [(int(peak[1]) * 1024, idle)], mebibytes, "at most 1.2")


def listing(bench: Bench) -> Iterator[str]:
    def page(ours: Service, count: int) -> Fetch:
        ours.fill(count, 16)  # bytes: as many as an MP3 takes of its row, being out of line
        return ours.fetch("/api/records?limit=100", authorization=f"Bearer {ours.user.token}")

    with bench.service() as large, bench.service() as small:
        of_many, of_few = page(large, 100_000), page(small, 1_000)
        pairs = [(timed(of_many, 50), timed(of_few, 50)) for _ in bench.rounds(15)]
    yield row("listing 100 of 100,000", "of 1,000", pairs, duration, "at most 1.2")


def quota(bench: Bench) -> Iterator[str]:
    async def checks(ours: Service) -> float:
        connection = await asyncpg.connect(ours.database_url)
        try:
            began = clock()
            for _ in range(200):
                await connection.fetchval(service.SELECT_KEPT_BYTES, ours.user.id, 86400.0 * 365)
            return (clock() - began) / 200
        finally:
            await connection.close()

    with bench.service() as large, bench.service() as small:
        large.fill(100_000, 16)
        small.fill(1_000, 16)
        pairs = [(asyncio.run(checks(large)), asyncio.run(checks(small))) for _ in bench.rounds(15)]
    yield row("check of a quota with 100,000 records", "1,000", pairs, duration, "at most 1.2")


def start(bench: Bench) -> Iterator[str]:
    bench.scratch.chmod(0o711)  # root's PostgreSQL is another user's
    imports = partial(run, [*support.SERVICE, "--help"])

    def ours() -> float:
        began = clock()
        with Server({"DATA_DIR": str(bench.scratch / "data")}) as server:
            with connect(server.url) as connection:
                connection.sendall(request("GET", "/readyz", {}))
                answer(connection)
            return clock() - began

    ours()  # sets the data up
    pairs = [(ours(), timed(imports)) for _ in bench.rounds(15)]
    what = "start to ready on existing data"
    yield row(what, "its imports", pairs, duration, "at most 260 ms")


ROWS = (clip, long, uploads, beside, p99, store, downloads, ranges, memory, listing, quota, start)


def versions(postgres: Postgres) -> str:
    banner = subprocess.run([FFMPEG, "-version"], capture_output=True, text=True).stdout
    database = query(postgres.url(), "SHOW server_version")[0]["server_version"]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {CORES} cores, {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}, PostgreSQL {database}, ffmpeg {banner.split()[2]}"
    )


def main() -> None:
    names = {work.__name__: work for work in ROWS}
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    arguments = parser.parse_args()
    if not names.keys() >= set(arguments.rows):
        parser.error(f"the rows are {', '.join(names)}")
    postgres = Postgres()
    try:
        with (postgres.directory / "postgresql.conf").open("a") as settings:
            settings.write("fsync = on\n")  # as it is by default, but not in tests
        postgres.start()
        print(versions(postgres), end="\n\n")
        print("| what | service | compared with | | ratio | to reach |")
        print("|---|---|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            bench = Bench(postgres, Path(scratch), arguments.quick)
            for name in arguments.rows or names:
                for measured in names[name](bench):
                    print(measured, flush=True)
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()

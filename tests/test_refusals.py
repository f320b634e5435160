"""An answer that comes before the end of the body reaches every kind of client."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import (
    FORM,
    UPLOAD,
    Postgres,
    Server,
    User,
    credentials,
    curl,
    curl_form,
    fields,
    form,
    wait_for,
)
from wav import noise
from wire import Waiting, Wire, chunked

HUGE = noise(20_000_000)  # more than the sockets hold


@pytest.fixture(scope="module")
def small(postgres: Postgres) -> Iterator[Server]:
    """A service that takes 100,000 bytes."""
    settings = {"MAX_UPLOAD_BYTES": "100000"}
    with Server({"DATABASE_URL": postgres.create_database(), **settings}) as small:
        assert small.url
        yield small


@pytest.fixture(scope="module")
def narrow(postgres: Postgres) -> Iterator[Server]:
    """A service that takes one upload at a time."""
    settings = {"MAX_ENCODERS": "1", "QUEUE_SECONDS": "0"}
    with Server({"DATABASE_URL": postgres.create_database(), **settings}) as narrow:
        assert narrow.url
        yield narrow


@pytest.fixture
def refusing(
    status: int, server: Server, small: Server, narrow: Server
) -> Iterator[tuple[Server, User]]:
    """A service, and a user to whom it will give the status."""
    with ExitStack() as stack:
        refusing = {413: small, 503: narrow}.get(status, server)
        user = refusing.register()
        if status == 503:

            def busy() -> bool:
                """Whether an upload has the encoder, which an earlier test may still have had."""
                waiting = stack.enter_context(Waiting(refusing, user))
                return waiting.socket.recv(12) == b"HTTP/1.1 100"

            wait_for(busy)
        elif status == 401:
            user = User(user.id, "wrong")
        yield refusing, user


def content(status: int) -> bytes:
    return bytes(len(HUGE)) if status == 422 else HUGE


def media_type(status: int) -> str:
    return "multipart/mixed" if status == 415 else "multipart/form-data"


STATUSES = pytest.mark.parametrize("status", [401, 413, 415, 422, 503])


@STATUSES
@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_refusal_reaches_a_client_that_sends_everything_before_it_reads(
    refusing: tuple[Server, User], status: int, framing: str
) -> None:
    server, user = refusing
    body = form(*fields(user, content(status)))
    headers = {
        "Content-Type": FORM["Content-Type"].replace("multipart/form-data", media_type(status))
    }
    if framing == "declared":
        headers["Content-Length"] = str(len(body))
    else:
        headers["Transfer-Encoding"] = "chunked"
        body = chunked(body)
    with Wire(server) as wire:
        wire.head(UPLOAD, headers)
        wire.send(body)
        answer = wire.answer()
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.headers["Retry-After"] is not None) == (status == 503)
    assert answer.headers["Connection"] == "close"


@STATUSES
def test_refusal_reaches_curl(refusing: tuple[Server, User], status: int, tmp_path: Path) -> None:
    server, user = refusing
    file = tmp_path / "long.wav"
    file.write_bytes(content(status))
    options = ["-H", f"Content-Type: {media_type(status)}"]
    reply = curl(*options, *curl_form(user, f"@{file}"), server.url + UPLOAD)
    assert reply.status == reply.json()["status"] == status


@pytest.mark.parametrize(
    "status, headers",
    [
        (401, {"Authorization": "Bearer wrong"}),
        (413, {}),
        (415, {"Content-Type": "audio/wav"}),
        (422, {"Idempotency-Key": "k" * 256}),
        (503, {}),
    ],
)
def test_refusal_known_from_the_head_spares_the_client_its_body(
    refusing: tuple[Server, User], status: int, headers: dict[str, str]
) -> None:
    server, user = refusing
    headers = headers or (user.bearer if status == 503 else {})
    sizes = {"Content-Length": str(len(HUGE)), "Expect": "100-continue"}
    with Wire(server) as wire:
        wire.head(f"{UPLOAD}?id_user={user.id}", {**FORM, **sizes, **headers})
        assert wire.socket.recv(12) == f"HTTP/1.1 {status}".encode()


@pytest.mark.slow
def test_client_that_neither_sends_its_body_nor_goes_away_is_cut_off(server: Server) -> None:
    with Wire(server) as wire:
        wire.head(UPLOAD, {"Content-Type": "audio/wav", "Content-Length": "100"})
        assert wire.answer().status == 415
        wire.socket.settimeout(20)
        assert wire.socket.recv(1000) == b""


def test_error_after_the_whole_request_keeps_the_connection(server: Server, user: User) -> None:
    with Wire(server) as wire:
        body = form(*credentials(user))
        for _ in range(2):
            wire.head("/nothing", {}, "GET")
            answer = wire.answer()
            assert (answer.status, answer.headers["Connection"]) == (404, None)
            wire.head(UPLOAD, {**FORM, "Content-Length": str(len(body))})
            wire.send(body)
            answer = wire.answer()
            assert (answer.status, answer.headers["Connection"]) == (422, None)

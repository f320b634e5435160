"""What others' HTTP does: offers of an upgrade, white space, Host, conditions, caches, names."""

import json
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path

import pytest

from store import store
from support import (
    FORM,
    ROOT,
    SERVICE,
    UPLOAD,
    UVICORN_SERVICE,
    Postgres,
    Server,
    User,
    credentials,
    curl,
    curl_form,
    form,
    part,
    problem,
)
from wav import SPEECH, noise
from wire import Wire, chunked

REGISTRATION = "/api/registration/"
# uvicorn's other parser leaves the body of a request unread that offers an upgrade, and each hands
# those that offer WebSockets over to a library for them, where there is one.
IN_UVICORN = (*UVICORN_SERVICE, "--http", "h11", "--ws", "none")

H2C = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAMAAABkAAQAAP__",
}
WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
OFFERS = pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])


def registration() -> bytes:
    return json.dumps({"username": uuid.uuid4().hex}).encode()


def framed(body: bytes, framing: str) -> tuple[dict[str, str], bytes]:
    """The headers and the bytes of a body, sent in one of the two ways of HTTP/1.1."""
    if framing == "chunked":
        return {"Transfer-Encoding": "chunked"}, chunked(body)
    return {"Content-Length": str(len(body))}, body


# Offers of an upgrade (RFC 9110 section 7.8)


@pytest.fixture(scope="module", params=[SERVICE, IN_UVICORN], ids=["alone", "uvicorn"])
def offered(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Server]:
    settings = {"DATABASE_URL": postgres.create_database()}
    with Server(settings, request.param) as server:
        yield server
        assert server.stop() in (0, -signal.SIGTERM)  # which uvicorn raises again


@OFFERS
@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_offer_of_an_upgrade_is_passed_over(
    offered: Server, offer: dict[str, str], framing: str
) -> None:
    with Wire(offered) as wire:
        for _ in range(2):
            headers, body = framed(registration(), framing)
            wire.head(REGISTRATION, {**offer, **headers})
            wire.send(body)
            answer = wire.answer()
            assert (answer.status, answer.headers["Upgrade"]) == (201, None)
        user = User(*json.loads(answer.body).values())
        parts = form(*credentials(user), part("file_wav", noise(400_000), "noise.wav"))
        headers, body = framed(parts, framing)
        wire.head(UPLOAD, {**offer, **FORM, **headers})
        wire.send(body)
        assert wire.answer().status == 201


@OFFERS
@pytest.mark.parametrize("framing", ["declared", "chunked"])
@pytest.mark.parametrize("method, path", [("POST", REGISTRATION), ("DELETE", REGISTRATION)])
def test_body_is_never_taken_for_a_request(
    offered: Server, offer: dict[str, str], framing: str, method: str, path: str
) -> None:
    user = offered.register()
    link = store(offered, user, b"an MP3")
    target = link.removeprefix(offered.url)
    within = f"DELETE {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {user.token}\r\n\r\n"
    headers, body = framed(within.encode(), framing)
    with Wire(offered) as wire:
        wire.head(path, {**offer, **headers}, method)
        wire.send(body)
        with wire.response(method) as response:
            assert response.status in (400, 401)
            closes = response.headers["Connection"] == "close"
            response.read()
        rest = b""
        with suppress(ConnectionError):  # where it closes, it may come to a reset
            wire.head("/healthz", {"Connection": "close"}, "GET")
            while data := wire.socket.recv(1000):
                rest += data
        assert rest.count(b"HTTP/1.1 ") == (0 if closes else 1)
    assert offered.http.get(link).content == b"an MP3"


def test_curl_that_would_rather_speak_http2_goes_all_the_way(offered: Server) -> None:
    reply = curl("--http2", "-d", registration().decode(), offered.url + REGISTRATION)
    assert reply.status == 201
    user = User(*reply.json().values())
    for options in ([], ["-H", "Transfer-Encoding: chunked"]):
        upload = [*options, *curl_form(user), offered.url + UPLOAD]
        reply = curl("--http2", *upload, stdin=SPEECH)
        assert reply.status == 201
    link = reply.json()["URL for download"]
    assert len(curl("--http2", link).body) > 1000
    authorization = f"Authorization: Bearer {user.token}"
    assert curl("--http2", "-X", "DELETE", "-H", authorization, link).status == 204
    assert curl("--http2", link).status == 404


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("java"),
    reason="Java is not installed: apt-get install openjdk-17-jdk-headless",
)
def test_java_client_with_its_defaults_goes_all_the_way(offered: Server, tmp_path: Path) -> None:
    wav = tmp_path / "speech.wav"
    wav.write_bytes(SPEECH)
    told = run_java(ROOT / "tests" / "java" / "Client.java", offered.url, str(wav))
    assert told.split() == ["201", "201", "201", "200", "204", "404"]


def run_java(*arguments: object) -> str:
    command = ["java", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Headers


@pytest.mark.parametrize("space", [" ", "\t", " \t "])
def test_white_space_around_a_value_is_not_part_of_it(
    server: Server, user: User, space: str
) -> None:
    link = store(server, user, b"0123456789").removeprefix(server.url)
    host = server.url.removeprefix("http://")
    with Wire(server) as wire:
        for line in (f"Range:{space}bytes=2-4{space}", f"Range:bytes=2-4{space}"):
            wire.send(
                f"GET {link} HTTP/1.1\r\nHost:{space}{host}{space}\r\n{line}\r\n\r\n".encode()
            )
            answer = wire.answer()
            assert (answer.status, answer.body) == (206, b"234")
        body = form(*credentials(user), part("file_wav", SPEECH, "speech.wav"))
        urls = set()
        for end in (space, ""):
            lines = [
                f"Host: {host}",
                "Idempotency-Key: once",
                f"Content-Type: {FORM['Content-Type']}",
                f"Content-Length: {len(body)}",
            ]
            head = "".join(f"{line}{end}\r\n" for line in lines)
            wire.send(f"POST {UPLOAD} HTTP/1.1\r\n{head}\r\n".encode() + body)
            urls.add(wire.answer().headers["Location"])
        (url,) = urls
        assert url.startswith(f"{server.url}/api/download?")


@pytest.mark.parametrize("hosts", [0, 2])
def test_request_without_one_host_is_refused(server: Server, hosts: int) -> None:
    with Wire(server) as wire:
        host = f"Host: {server.url.removeprefix('http://')}\r\n"
        wire.send(f"GET / HTTP/1.1\r\n{host * hosts}\r\n".encode())
        assert wire.answer().status == 400


@pytest.mark.parametrize("path", [REGISTRATION, UPLOAD])
@pytest.mark.parametrize("encodings", [["gzip"], ["br"], ["identity", "gzip"], ["identity, gzip"]])
def test_body_with_a_content_encoding_is_refused(
    server: Server, path: str, encodings: list[str]
) -> None:
    headers = [*FORM.items(), *(("Content-Encoding", encoding) for encoding in encodings)]
    problem(server.http.post(path, content=b"{}", headers=headers), 415)


def test_body_that_says_it_is_not_encoded_is_taken(server: Server) -> None:
    headers = {"Content-Encoding": "Identity"}
    response = server.http.post(REGISTRATION, content=registration(), headers=headers)
    assert response.status_code == 201


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "BREW", "get"])
def test_unknown_method_is_a_problem(server: Server, method: str) -> None:
    with Wire(server) as wire:
        wire.head("/api/download", {}, method)
        answer = wire.answer()
        assert answer.status == 405
        assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
        assert answer.headers["Content-Type"] == "application/problem+json"
        wire.head("/healthz", {}, "GET")
        assert wire.answer().status == 200


# Conditions


FAR = formatdate(time.time() + 86400, usegmt=True)
LONG_AGO = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    "condition",
    [
        {"If-Match": '"another"'},
        {"If-Match": "W/ETAG"},
        {"If-None-Match": "ETAG"},
        {"If-None-Match": "*"},
        {"If-Unmodified-Since": LONG_AGO},
        {"If-Match": '"another"', "If-Unmodified-Since": FAR},
    ],
)
def test_record_that_is_not_the_one_meant_is_not_deleted(
    server: Server, user: User, condition: dict[str, str]
) -> None:
    link = store(server, user, b"an MP3")
    etag = server.http.head(link).headers["ETag"]
    headers = {name: value.replace("ETAG", etag) for name, value in condition.items()}
    problem(server.http.delete(link, headers={**user.bearer, **headers}), 412)
    assert server.http.get(link).status_code == 200


@pytest.mark.parametrize(
    "condition",
    [
        {"If-Match": "ETAG"},
        {"If-Match": '"another", ETAG'},
        {"If-Match": "*"},
        {"If-None-Match": '"another"'},
        {"If-Unmodified-Since": FAR},
        {"If-Unmodified-Since": "some day"},
        {"If-Match": "ETAG", "If-Unmodified-Since": LONG_AGO},
        {"If-Modified-Since": FAR},
    ],
)
def test_record_that_is_the_one_meant_is_deleted(
    server: Server, user: User, condition: dict[str, str]
) -> None:
    link = store(server, user, b"an MP3")
    etag = server.http.head(link).headers["ETag"]
    headers = {name: value.replace("ETAG", etag) for name, value in condition.items()}
    assert server.http.delete(link, headers={**user.bearer, **headers}).status_code == 204
    problem(server.http.get(link), 404)


def test_condition_tells_a_stranger_nothing(server: Server, user: User) -> None:
    link = store(server, user, b"an MP3")
    headers = {"If-Match": '"another"'}
    problem(server.http.delete(link, headers=headers), 401)
    problem(server.http.delete(link, headers={**server.register().bearer, **headers}), 404)


@pytest.mark.parametrize("path", ["/openapi.json", "/"])
def test_page_is_sent_again_only_where_it_is_another(server: Server, path: str) -> None:
    accept = {"Accept": "text/html"}
    etag = server.http.get(path, headers=accept).headers["ETag"]
    for known, status in ((etag, 304), (f'"another", W/{etag}', 304), ("*", 304), ('"no"', 200)):
        response = server.http.get(path, headers={**accept, "If-None-Match": known})
        assert response.status_code == status
        assert response.headers["ETag"] == etag
        assert bool(response.content) == (status == 200)
    problem(server.http.get(path, headers={**accept, "If-Match": '"another"'}), 412)


@pytest.mark.parametrize("path", ["/openapi.json", "/", "/healthz", "/metrics"])
@pytest.mark.parametrize(
    "asked",
    ["bytes=0-3", "bytes=99999999-", "bytes=-0", "bytes=5-2", "bytes=0-1,3-4", "lines=1-2", "x"],
)
def test_range_of_a_page_is_the_page(server: Server, path: str, asked: str) -> None:
    whole = server.http.get(path)
    response = server.http.get(path, headers={"Range": asked})
    assert response.status_code == 200
    assert response.headers["Content-Type"] == whole.headers["Content-Type"]
    assert len(response.content) > 4


# Caches


def test_what_may_be_cached_is_said(server: Server) -> None:
    http = server.http
    registered = http.post(REGISTRATION, content=registration())
    user = User(*registered.json().values())
    link = server.upload(user, SPEECH).headers["Location"]
    listing = http.get("/api/records", params={"id_user": user.id}, headers=user.bearer)
    renewed = http.post("/api/token/", headers=user.bearer)
    kinds = {
        "no-store": [
            registered,
            renewed,
            http.post(REGISTRATION, content=b"{"),
            http.post("/api/token/"),
            http.delete(REGISTRATION),
            http.post(UPLOAD, content=b""),
            http.post(UPLOAD, content=form(), headers=FORM),
            http.get("/api/download"),
            http.get("/api/records"),
            http.get(link, headers={"If-Match": '"another"'}),
            http.get("/nothing"),
            http.put("/"),
            http.post("/api/token/", headers={"Sec-Fetch-Site": "cross-site"}),
        ],
        "private, no-store": [listing],
        "no-cache": [
            *(http.get(path) for path in ("/", "/openapi.json", "/healthz", "/readyz", "/metrics")),
            http.get("/", headers={"Accept": "text/html"}),
            http.get("/", headers={"Accept": "text/html", "If-None-Match": "*"}),
        ],
        "private, max-age=31536000, immutable": [
            http.get(link),
            http.head(link),
            http.get(link, headers={"Range": "bytes=0-3"}),
            http.get(link, headers={"If-None-Match": "*"}),
        ],
    }
    for expected, responses in kinds.items():
        for response in responses:
            assert response.headers["Cache-Control"] == expected, response.request.url


# Names of files


@pytest.mark.parametrize(
    "disposition, saved",
    [
        # .NET: an RFC 2047 word beside the name
        (
            "filename=\"=?utf-8?B?R3J1w58ud2F2?=\"; filename*=utf-8''Gru%C3%9F.wav",
            "Gruß.mp3",
        ),
        ("filename=speech.wav; filename*=utf-8''speech.wav", "speech.mp3"),
        ("filename*=UTF-8''%E4%BC%9A%E8%AE%AE.wav", "会议.mp3"),
        ("filename*=utf-8'it'Citt%C3%A0.wav", "Città.mp3"),
        # aiohttp percent-encodes, browsers only what would end the name
        ('filename="%D0%97%D0%B0%D0%BF%D0%B8%D1%81%D1%8C%201.wav"', "Запись 1.mp3"),
        ('filename="a%22b%0D%0A.wav"', 'a"b.mp3'),
        ('filename="100%.wav"', "100%.mp3"),
        ('filename="%FF%FE.wav"', "%FF%FE.mp3"),
        ('filename="Запись.wav"', "Запись.mp3"),
        ("filename=plain.wav", "plain.mp3"),
    ],
)
def test_file_names_as_others_write_them(
    server: Server, user: User, disposition: str, saved: str
) -> None:
    head = f'--frontier\r\nContent-Disposition: form-data; name="file_wav"; {disposition}\r\n\r\n'
    response = server.send(*credentials(user), head.encode() + SPEECH + b"\r\n")
    assert response.status_code == 201, response.text
    listing = server.http.get("/api/records", params={"id_user": user.id}, headers=user.bearer)
    assert listing.json()["records"][0]["filename"] == saved

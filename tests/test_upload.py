import itertools
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import (
    FORM,
    UPLOAD,
    Postgres,
    Server,
    StartServer,
    User,
    credentials,
    curl,
    curl_form,
    fields,
    form,
    part,
    problem,
    wait_for,
)
from wav import LONG, SPEECH, UNKNOWN, decoded, info, noise, pcm_format, riff, wav
from wire import Sending, Wire, working


@pytest.fixture(scope="module")
def small_server(postgres: Postgres) -> Iterator[Server]:
    """A service that takes 100,000 bytes."""
    settings = {"DATABASE_URL": postgres.create_database(), "MAX_UPLOAD_BYTES": "100000"}
    with Server(settings) as server:
        yield server


# What an upload gives


def test_upload_gives_a_link_that_downloads_the_mp3(server: Server, user: User) -> None:
    response = server.upload(user, SPEECH)
    assert response.status_code == 201
    assert response.json().keys() == {"URL for download"}
    link = response.json()["URL for download"]
    prefix, _, rest = link.partition("/api/download?id_record=")
    id_record, _, id_user = rest.partition("&id_user=")
    assert prefix == server.url
    assert str(uuid.UUID(id_record)) == id_record
    assert id_user == str(user.id)
    assert response.headers["Location"] == link
    download = server.http.get(link)
    assert download.status_code == 200
    assert download.headers["Content-Type"] == "audio/mpeg"
    assert len(decoded(download.content).samples) == 11025


def test_base_url_begins_the_link(start_server: StartServer) -> None:
    server = start_server(BASE_URL="https://audio.example/mp3/")
    link = server.upload(server.register(), SPEECH).json()["URL for download"]
    assert link.startswith("https://audio.example/mp3/api/download?")


# How it is sent


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_fields_come_in_any_order(server: Server, user: User, order: tuple[int, ...]) -> None:
    parts = fields(user, SPEECH)
    response = server.send(*(parts[place] for place in order))
    assert response.status_code == 201
    mp3 = server.http.get(response.json()["URL for download"]).content
    assert len(decoded(mp3).samples) == 11025


@pytest.mark.parametrize("cut", [1, 30, 40, 60])
def test_last_field_may_arrive_in_two_pieces(server: Server, user: User, cut: int) -> None:
    token, id_user = credentials(user)
    before = part("file_wav", SPEECH, "speech.wav") + id_user
    body = before + form(token)
    headers = {**FORM, "Content-Length": str(len(body)), "Expect": "100-continue"}
    with Wire(server) as wire:
        wire.head(UPLOAD, headers)
        assert b"100 Continue" in wire.socket.recv(100)  # now it takes each piece as it comes
        wire.send(body[: -len("\r\n--frontier--\r\n") - cut])
        wire.send(body[-len("\r\n--frontier--\r\n") - cut :])
        assert wire.answer().status == 201


@pytest.mark.parametrize("options", [(), ("-H", "Transfer-Encoding: chunked")])
@pytest.mark.parametrize("from_stdin", [False, True])
def test_curl_uploads(
    server: Server, user: User, tmp_path: Path, options: tuple[str, ...], from_stdin: bool
) -> None:
    content = noise(2_000_400)
    file = tmp_path / "long.wav"
    file.write_bytes(content)
    source = "@-;filename=long.wav" if from_stdin else f"@{file}"
    reply = curl(*curl_form(user, source), *options, server.url + UPLOAD, stdin=content)
    assert reply.status == 201
    download = curl(reply.json()["URL for download"])
    assert download.status == 200
    assert len(decoded(download.body).samples) == 500_100


def test_unknown_fields_are_ignored(server: Server, user: User) -> None:
    strangers = part("comment", "x" * 10_000), part("photo", b"\xff\xd8", "photo.jpg")
    assert server.send(*strangers, *fields(user, SPEECH), *strangers).status_code == 201


def test_conversion_runs_while_the_client_still_sends(server: Server, user: User) -> None:
    with Sending(server, user, LONG) as sending:
        sending.share(0.5)
        wait_for(lambda: working(server))
        assert sending.finish().status == 201


# What is refused


def test_wrong_credentials_all_give_the_same_answer(server: Server, user: User) -> None:
    other = server.register()
    file = part("file_wav", SPEECH, "speech.wav")
    wrong = [
        (other.token, str(user.id)),
        (str(uuid.uuid4()), str(user.id)),
        *((token, str(user.id)) for token in ("x", user.token[:-1], user.token + "0", "\0", "ÿ")),
        *((user.token, id_user) for id_user in ("0", "-1", "one", "1.0", "1e0", "\0", "\uff11")),
        *((user.token, str(user.id + offset)) for offset in (1_000_000, 1 << 32, 1 << 63, 1 << 64)),
        (user.token, "9" * 500),
    ]
    bodies = set()
    for token, id_user in wrong:
        fields = part("user_token", token), part("id_user", id_user)
        for response in server.send(*fields, file), server.send(file, *fields):
            problem(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            bodies.add(response.content)
    assert len(bodies) == 1
    assert server.records(user) == server.records(other) == 0


@pytest.mark.parametrize("name", ["user_token", "id_user", "file_wav"])
@pytest.mark.parametrize("file_first", [False, True])
def test_missing_field_is_named(server: Server, user: User, name: str, file_first: bool) -> None:
    parts = fields(user, SPEECH, file_first=file_first)
    left = [each for each in parts if f'name="{name}"'.encode() not in each]
    assert name in problem(server.send(*left), 422)
    assert server.records(user) == 0


@pytest.mark.parametrize("place", range(3))
def test_field_given_twice_is_refused(server: Server, user: User, place: int) -> None:
    parts = fields(user, SPEECH)
    problem(server.send(*parts, parts[place]), 422)
    assert server.records(user) == 0


def test_file_without_a_name_is_refused(server: Server, user: User) -> None:
    assert "file_wav" in problem(server.send(*credentials(user), part("file_wav", SPEECH)), 422)


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json", "application/x-www-form-urlencoded", "audio/wav", "multipart"],
)
def test_body_that_is_no_form_is_refused(server: Server, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    problem(server.http.post(UPLOAD, content=SPEECH, headers=headers), 415)


def test_form_without_a_boundary_is_refused(server: Server) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    problem(server.http.post(UPLOAD, content=form(), headers=headers), 400)


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: body[: len(body) // 2],
        lambda body: body.removesuffix(b"--frontier--\r\n"),
        lambda body: body.removesuffix(b"\r\n--frontier--\r\n"),
        lambda body: body.removesuffix(b"--\r\n"),
        lambda body: body.replace(b"frontier", b"another"),
        lambda body: body.replace(b"Content-Disposition:", b"Content Disposition", 1),
    ],
)
def test_malformed_form_is_refused(
    server: Server, user: User, file_first: bool, damage: Callable[[bytes], bytes]
) -> None:
    body = form(*fields(user, SPEECH, file_first=file_first))
    problem(server.http.post(UPLOAD, content=damage(body), headers=FORM), 400)
    assert server.records(user) == 0


@pytest.mark.parametrize("size, status", [(100_000, 201), (100_002, 413)])
@pytest.mark.parametrize("file_first, chunked", [(False, False), (False, True), (True, False)])
def test_wav_may_have_max_upload_bytes(
    small_server: Server, size: int, status: int, file_first: bool, chunked: bool
) -> None:
    user = small_server.register()
    content = noise(size - len(noise(0)))
    body = form(*fields(user, content, file_first=file_first))
    response = small_server.http.post(
        UPLOAD, content=iter([body]) if chunked else body, headers=FORM
    )
    assert response.status_code == status
    assert small_server.records(user) == (status == 201)


def refusal(server: Server, user: User, content: bytes, file_first: bool = False) -> str:
    detail = problem(server.upload(user, content, file_first=file_first), 422)
    assert server.records(user) == 0
    return detail


@pytest.mark.parametrize("file_first", [False, True])
def test_truncated_wav_is_refused(server: Server, user: User, file_first: bool) -> None:
    detail = refusal(server, user, wav(11025)[:-1], file_first=file_first)
    assert re.findall(r"\d+", detail) == ["22050", "22049"]


NO_SAMPLES = {
    "declared": wav(0),
    "of unknown length": wav(0, declared=UNKNOWN),
    "with tags": wav(0, after=info(INAM="Silence")),
    "half a sample": riff(pcm_format(1, 16, 44100, 1), b"\1"),
}


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("content", NO_SAMPLES.values(), ids=NO_SAMPLES)
def test_wav_without_samples_is_refused(
    server: Server, user: User, content: bytes, file_first: bool
) -> None:
    assert "no audio" in refusal(server, user, content, file_first=file_first)

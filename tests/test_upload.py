import itertools
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

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
    form,
    part,
    problem,
    wait_for,
)
from wav import SPEECH, UNKNOWN, chunk, decoded, ffmpeg, info, noise, pcm_format, recoded, riff, wav
from wire import Sending, Wire, working


@pytest.fixture(scope="module")
def small_server(postgres: Postgres) -> Iterator[Server]:
    """A service that takes 100,000 bytes."""
    settings = {"DATABASE_URL": postgres.create_database(), "MAX_UPLOAD_BYTES": "100000"}
    with Server(settings) as server:
        yield server


def form_options(user: User, file: str) -> list[str]:
    return ["-F", f"user_token={user.token}", "-F", f"id_user={user.id}", "-F", f"file_wav={file}"]


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


def test_head_tells_what_get_would_send(server: Server, user: User) -> None:
    link = server.upload(user, SPEECH).json()["URL for download"]
    head, get = server.http.head(link), server.http.get(link)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("Content-Type", "Content-Length", "Content-Disposition"):
        assert head.headers[name] == get.headers[name]
    assert int(head.headers["Content-Length"]) == len(get.content)


def test_base_url_begins_the_link(start_server: StartServer) -> None:
    server = start_server(BASE_URL="https://audio.example/mp3/")
    link = server.upload(server.register(), SPEECH).json()["URL for download"]
    assert link.startswith("https://audio.example/mp3/api/download?")


@pytest.mark.parametrize(
    "uploaded, downloaded",
    [
        ("speech.wav", "speech.mp3"),
        ("speech.WAV", "speech.mp3"),
        ("two.dots.wav", "two.dots.mp3"),
        ("with spaces (1).wav", "with spaces (1).mp3"),
        ("no-extension", "no-extension.mp3"),
        ("tab\t.wav", "tab.mp3"),
        ("../../etc/passwd.wav", "passwd.mp3"),
        (r"C:\Music\song.wav", "song.mp3"),
    ],
)
def test_download_is_named_after_the_upload(
    server: Server, user: User, tmp_path: Path, uploaded: str, downloaded: str
) -> None:
    link = server.upload(user, SPEECH, uploaded.replace("\\", "\\\\")).json()["URL for download"]
    curl("--remote-name", "--remote-header-name", link, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [downloaded]


@pytest.mark.parametrize(
    "uploaded, downloaded",
    [
        ("Füße.wav", "Füße.mp3"),
        ("日本語.wav", "日本語.mp3"),
        ("100%; a=b.wav", "100%; a=b.mp3"),
        ("%22quoted%22.wav", '"quoted".mp3'),
        ("語" * 100 + ".wav", "語" * 83 + ".mp3"),
    ],
)
def test_download_has_a_name_that_is_hard_to_write(
    server: Server, user: User, uploaded: str, downloaded: str
) -> None:
    response = server.http.get(server.upload(user, SPEECH, uploaded).json()["URL for download"])
    disposition = response.headers["Content-Disposition"]
    plain, _, encoded = disposition.partition("; filename*=UTF-8''")
    assert re.fullmatch(r'attachment; filename="[\w .,=()+@~-]+\.mp3"', plain, re.ASCII)
    assert unquote(encoded) == downloaded


# How it is sent


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_fields_come_in_any_order(server: Server, user: User, order: tuple[int, ...]) -> None:
    parts = (*credentials(user), part("file_wav", SPEECH, "speech.wav"))
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
    reply = curl(*form_options(user, source), *options, server.url + UPLOAD, stdin=content)
    assert reply.status == 201
    download = curl(reply.json()["URL for download"])
    assert download.status == 200
    assert len(decoded(download.body).samples) == 500_100


def test_unknown_fields_are_ignored(server: Server, user: User) -> None:
    strangers = part("comment", "x" * 10_000), part("photo", b"\xff\xd8", "photo.jpg")
    parts = strangers[0], *credentials(user), strangers[1], part("file_wav", SPEECH, "speech.wav")
    assert server.send(*parts).status_code == 201


def test_conversion_runs_while_the_client_still_sends(server: Server, user: User) -> None:
    with Sending(server, user, noise(10_000_000)) as sending:
        sending.share(0.5)
        wait_for(lambda: working(server))
        assert sending.finish().status == 201


def test_shutdown_in_mid_upload_leaves_nothing(start_server: StartServer) -> None:
    server = start_server()
    user = server.register()
    with Sending(server, user, noise(10_000_000)) as sending:
        sending.share(0.5)
        wait_for(lambda: working(server))
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Waiting for connections" in server.log)
        server.stop()  # without waiting any longer
    assert server.records(user) == 0


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
    parts = [*credentials(user), part("file_wav", SPEECH, "speech.wav")]
    left = [each for each in parts if f'name="{name}"'.encode() not in each]
    assert name in problem(server.send(*(reversed(left) if file_first else left)), 422)
    assert server.records(user) == 0


@pytest.mark.parametrize("place", range(3))
def test_field_given_twice_is_refused(server: Server, user: User, place: int) -> None:
    parts = [*credentials(user), part("file_wav", SPEECH, "speech.wav")]
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
    parts = [*credentials(user), part("file_wav", SPEECH, "speech.wav")]
    body = form(*(reversed(parts) if file_first else parts))
    problem(server.http.post(UPLOAD, content=damage(body), headers=FORM), 400)
    assert server.records(user) == 0


@pytest.mark.parametrize("size, status", [(100_000, 201), (100_002, 413)])
@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_wav_may_have_max_upload_bytes(
    small_server: Server, size: int, status: int, file_first: bool, chunked: bool
) -> None:
    user = small_server.register()
    content = noise(size - len(noise(0)))
    parts = [*credentials(user), part("file_wav", content, "long.wav")]
    body = form(*(reversed(parts) if file_first else parts))
    response = small_server.http.post(
        UPLOAD, content=iter([body]) if chunked else body, headers=FORM
    )
    assert response.status_code == status
    assert small_server.records(user) == (status == 201)


@pytest.mark.parametrize("options", [(), ("-H", "Expect:"), ("-H", "Transfer-Encoding: chunked")])
@pytest.mark.parametrize("reason, status", [("size", 413), ("credentials", 401), ("content", 422)])
def test_refusal_reaches_a_client_that_still_sends(
    server: Server,
    small_server: Server,
    tmp_path: Path,
    options: tuple[str, ...],
    reason: str,
    status: int,
) -> None:
    recipient = small_server if reason == "size" else server
    user = recipient.register()
    if reason == "credentials":
        user = User(user.id, str(uuid.uuid4()))
    file = tmp_path / "long.wav"
    file.write_bytes(bytes(20_000_000) if reason == "content" else noise(20_000_000))
    reply = curl(*form_options(user, f"@{file}"), *options, recipient.url + UPLOAD)
    assert reply.status == reply.json()["status"] == status


def refusal(server: Server, user: User, content: bytes, *, file_first: bool = False) -> str:
    parts = [*credentials(user), part("file_wav", content, "speech.wav")]
    detail = problem(server.send(*(reversed(parts) if file_first else parts)), 422)
    assert server.records(user) == 0
    return detail


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("form", [b"RIFF", b"RF64"])
@pytest.mark.parametrize("missing", [1, 11025, 22050])
def test_truncated_wav_is_refused(
    server: Server, user: User, file_first: bool, form: bytes, missing: int
) -> None:
    detail = refusal(server, user, wav(11025, form=form)[:-missing], file_first=file_first)
    assert re.findall(r"\d+", detail) == ["22050", str(22050 - missing)]


NO_SAMPLES = {
    "declared": wav(0),
    "of unknown length": wav(0, declared=UNKNOWN),
    "rf64": wav(0, form=b"RF64"),
    "with tags": wav(0, after=info(INAM="Silence")),
    "half a sample": riff(pcm_format(1, 16, 44100, 1), b"\1"),
}


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("content", NO_SAMPLES.values(), ids=NO_SAMPLES)
def test_wav_without_samples_is_refused(
    server: Server, user: User, content: bytes, file_first: bool
) -> None:
    refusal(server, user, content, file_first=file_first)


NOT_WAV = {
    "empty": b"",
    "text": b"This is no sound at all. " * 100,
    "zeros": bytes(10_000),
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "mp3": ffmpeg("-f", "mp3", stdin=SPEECH),
    "ogg": ffmpeg("-f", "ogg", stdin=SPEECH),
    "avi": b"RIFF\x64\0\0\0AVI " + SPEECH[12:],
    "half a header": SPEECH[:30],
    "no format": b"RIFF\x64\0\0\0WAVE" + chunk(b"data", bytes(100)),
    "no data": b"RIFF\x64\0\0\0WAVE" + chunk(b"fmt ", pcm_format(1, 16, 44100, 2)),
    "short format": riff(b"\x01\0\x01\0", bytes(100)),
    "no channels": riff(pcm_format(1, 16, 44100, 0), bytes(100)),
    "no rate": riff(pcm_format(1, 16, 0, 1), bytes(100)),
    "no bits": riff(pcm_format(1, 0, 44100, 1), bytes(100)),
    "12 kHz of 7 bits": riff(pcm_format(1, 7, 12000, 1), bytes(100)),
    "mp3 in wav": recoded(SPEECH, "libmp3lame"),
    "ac3 in wav": recoded(wav(rate=48000), "ac3"),
    "rf64 of unknown length": wav(form=b"RF64", declared=0),  # ffmpeg takes it for empty
    "g722 in wav": recoded(wav(rate=16000), "g722"),
}


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("content", NOT_WAV.values(), ids=NOT_WAV)
def test_file_that_is_no_wav_of_a_known_codec_is_refused(
    server: Server, user: User, content: bytes, file_first: bool
) -> None:
    assert refusal(server, user, content, file_first=file_first)


def test_file_that_is_no_wav_is_called_that(server: Server, user: User) -> None:
    assert "not a WAV" in refusal(server, user, NOT_WAV["text"])


def test_codec_that_is_refused_is_named(server: Server, user: User) -> None:
    assert "0x0055" in refusal(server, user, NOT_WAV["mp3 in wav"])


# What cannot be downloaded


def test_record_of_another_user_is_not_found(server: Server, user: User) -> None:
    link = server.upload(user, SPEECH).json()["URL for download"]
    other = server.register()
    wrong = link.replace(f"id_user={user.id}", f"id_user={other.id}")
    problem(server.http.get(wrong), 404)
    assert server.http.head(wrong).status_code == 404


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"id_user": "1"},
        {"id_record": str(uuid.uuid4())},
        {"id_record": str(uuid.uuid4()), "id_user": "1"},
        {"id_record": "1", "id_user": "1"},
        {"id_record": "\0", "id_user": "1"},
        {"id_record": str(uuid.uuid4()), "id_user": "one"},
        {"id_record": str(uuid.uuid4()), "id_user": str(1 << 64)},
        {"id_record": str(uuid.uuid4()), "id_user": "9" * 5000},
    ],
)
def test_unknown_record_is_not_found(server: Server, parameters: dict[str, str]) -> None:
    problem(server.http.get("/api/download", params=parameters), 404)

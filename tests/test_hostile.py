"""What an attacker sends: no answer is a 500, and none takes long or much memory."""

import random
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service import synchsafe
from support import (
    FORM,
    UPLOAD,
    Server,
    StartServer,
    User,
    credentials,
    fields,
    form,
    part,
    problem,
    script,
    wait_for,
)
from wav import LONG, SPEECH, UNKNOWN, chunk, decoded, ffmpeg, noise, pcm_format, recoded, riff, wav
from wire import Sending, Wire, chunked, link_of, peak_memory, working

PCM = pcm_format(1, 16, 44100, 2)


def spdif() -> bytes:
    """AC-3 in the bursts of IEC 61937, which look like samples."""
    return riff(pcm_format(1, 16, 48000, 2), ffmpeg("-f", "spdif", "-c:a", "ac3", stdin=wav(48000)))


FILES = {
    "HLS playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
    "ac3 in wav": recoded(wav(rate=48000), "ac3"),
    "S/PDIF": spdif(),
    "two formats": riff(PCM, bytes(4000), before=chunk(b"fmt ", pcm_format(1, 16, 1 << 29, 2))),
    "absurd chunk": b"RIFF\xff\xff\xff\xffWAVE" + b"junk\xf0\xff\xff\xff" + bytes(4000),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_file_that_is_not_what_it_says_is_refused(
    server: Server, user: User, content: bytes
) -> None:
    detail = problem(server.upload(user, content), 422)
    assert not re.search("0x[0-9a-f]{6}|/dev/|pipe:|/etc/", detail)
    assert server.records(user) == 0


def flood(size: int) -> Iterator[bytes]:
    yield from (bytes(1 << 16) for _ in range(size >> 16))


FORMS = {
    "many parts": b"".join(part(f"n{number}", "x") for number in range(10_000)),
    "header of a megabyte": b"--frontier\r\nX: " + bytes(1 << 20) + b"\r\n\r\n\r\n",
    "header name of a megabyte": b"--frontier\r\n" + b"X" * (1 << 20) + b": y\r\n\r\n\r\n",
    "many headers": b"--frontier\r\n" + b"X: y\r\n" * 10_000 + b"\r\n\r\n",
    "long text": part("user_token", "x" * 10_000),
    "nested": part("user_token", form(part("id_user", "1"))),
    "nothing but a name": b'--frontier\r\nContent-Disposition: form-data; name="id_user',
    "no disposition": b"--frontier\r\n\r\nx\r\n",
    "text that is no UTF-8": part("user_token", b"\xff"),
    "name that is no UTF-8": part("NAME", "x").replace(b"NAME", b"\xff"),
}


@pytest.mark.parametrize("parts", FORMS.values(), ids=FORMS)
def test_abused_form_is_refused(server: Server, user: User, parts: bytes) -> None:
    response = server.send(parts, *credentials(user), part("file_wav", b"", ""))
    assert 400 <= response.status_code < 500
    problem(response, response.status_code)


@pytest.mark.parametrize("strangers, status", [(97, 201), (98, 400)])
def test_form_may_have_100_parts(server: Server, user: User, strangers: int, status: int) -> None:
    parts = [part("stranger", "x")] * strangers
    assert server.send(*parts, *fields(user, SPEECH)).status_code == status


@pytest.mark.parametrize("boundary", ["", "x" * 300, '"', "\x80", "a; boundary=b"])
def test_absurd_boundary_is_refused(server: Server, boundary: str) -> None:
    content_type = f"multipart/form-data; boundary={boundary}".encode("latin-1")
    headers = httpx.Headers({b"Content-Type": content_type})
    response = server.http.post(UPLOAD, content=form(part("a", "b")), headers=headers)
    problem(response, 400)


def test_text_field_without_end_takes_no_memory(start_server: StartServer) -> None:
    server = start_server()
    server.register()
    before = peak_memory(server)
    content = iter([part("user_token", "")[:-2], *flood(100 << 20)])
    problem(server.http.post(UPLOAD, content=content, headers=FORM), 413)
    assert peak_memory(server) - before < 8 << 20


@pytest.mark.parametrize("body", [b"", b"\r\n", b"\r\n1\r\n{\r\n0\r\n"])
@pytest.mark.parametrize("end", [b"\r\n", b""])
def test_lines_without_end_take_no_memory(
    start_server: StartServer, body: bytes, end: bytes
) -> None:
    server = start_server()
    server.register()
    before = peak_memory(server)
    with Wire(server) as wire, pytest.raises(OSError):
        wire.send(b"POST /api/registration/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + body)
        wire.send(b"X: ")
        for _ in range(1000):
            wire.send(b"y" * 60_000 + end + b"X: " * bool(end))
    assert peak_memory(server) - before < 8 << 20


@pytest.mark.parametrize(
    "filename", ["a\0b.wav", 'a"b.wav', "%22.wav", "\r\n.wav", "\ud800", "x" * 4000, "../../x", "."]
)
def test_hostile_filename_is_tamed(server: Server, user: User, filename: str) -> None:
    disposition = f'form-data; name="file_wav"; filename="{filename}"'
    head = f"--frontier\r\nContent-Disposition: {disposition}\r\n\r\n"
    body = head.encode(errors="surrogatepass") + SPEECH + b"\r\n"
    response = server.send(*credentials(user), body)
    assert response.status_code in (201, 400)
    if response.status_code == 201:
        saved = server.http.head(response.json()["URL for download"])
        assert re.fullmatch(
            r'attachment; filename="[\w .()+,=@~-]+\.mp3"(; filename\*=UTF-8\'\'[\w.%~-]+)?',
            saved.headers["Content-Disposition"],
            re.ASCII,
        )


@pytest.mark.parametrize("query", ["%", "%00", "%ff%fe", "id_user=%00&id_record=%ff", "&&==;", "é"])
@pytest.mark.parametrize("path", ["/api/download", "/api/records", "/", "/healthz", "/%ff/%00"])
def test_malformed_query_is_no_fault_of_the_service(server: Server, path: str, query: str) -> None:
    with Wire(server) as wire:
        wire.send(f"GET {path}?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert wire.answer().status in (200, 400, 401, 404)


@pytest.mark.parametrize("size, cpu, duration", [(3_000_000, 100, 17), (10_000_000, 200, 56)])
def test_encoder_is_bounded_and_knows_nothing(
    server: Server, user: User, size: int, cpu: int, duration: int
) -> None:
    with Sending(server, user, noise(size)) as sending:
        sending.share(0.9)
        [encoder] = wait_for(lambda: working(server))
        assert encoder.environ() == {"LC_ALL": "C"}
        assert "-nostdin -loglevel level+verbose -protocol_whitelist pipe " in " ".join(
            encoder.cmdline()
        )
        assert encoder.nice() == 19
        assert size / 1_000_000 < encoder.rlimit(psutil.RLIMIT_CPU)[0] < cpu
        assert encoder.rlimit(psutil.RLIMIT_FSIZE)[0] == (1 << 20) + 40_000 * duration
        assert encoder.rlimit(psutil.RLIMIT_DATA)[0] <= 1 << 30
        assert sending.finish().status == 201


def test_mp3_of_an_upload_of_unknown_length_has_to_fit_its_column(
    server: Server, user: User
) -> None:
    fmt = pcm_format(1, 8, 8000, 1)  # of which the allowed gigabyte plays for 37 hours
    content = riff(fmt, random.Random(1).randbytes(1_000_000), declared=UNKNOWN)
    sent = chunked(form(*fields(user, content)))
    with Wire(server) as wire:
        wire.head(UPLOAD, {**FORM, "Transfer-Encoding": "chunked"})
        wire.send(sent[:-100])
        [encoder] = wait_for(lambda: working(server))
        assert encoder.rlimit(psutil.RLIMIT_FSIZE)[0] == 530_000_000
        wire.send(sent[-100:])
        assert wire.answer().status == 201


@pytest.mark.parametrize(
    "exceed",
    [
        lambda encoder: encoder.rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000)),
        lambda encoder: encoder.send_signal(signal.SIGXCPU),
    ],
    ids=["MP3", "CPU"],
)
def test_upload_that_takes_more_than_its_encoder_may_is_refused(
    server: Server, user: User, exceed: Callable[[psutil.Process], object]
) -> None:
    with Sending(server, user, LONG) as sending:
        sending.share(0.5)
        [encoder] = wait_for(lambda: working(server))
        exceed(encoder)
        assert sending.finish().status == 422
    assert server.records(user) == 0


@pytest.mark.parametrize("code", [0, 1])
def test_encoder_that_says_too_much_takes_no_memory(
    start_server: StartServer, tmp_path: Path, code: int
) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    script(ffmpeg, f"trap '' XFSZ; head -c 50000000 /dev/zero >&2; exit {code}")
    server = start_server(FFMPEG=str(ffmpeg))
    user, content = server.register(), noise(8_000_000)
    before = peak_memory(server)
    problem(server.upload(user, content), 503)
    assert peak_memory(server) - before < 8 << 20


@pytest.mark.parametrize(
    "tag",
    [
        b"\xff\xfb\x90A" + b"A" * 32 + b"Xing" + b"B" * 200,
        b"No space left on device",
        b"\n[error] No space left on device\n[fatal] out of memory",
        b"\n0 frames encoded (0 samples)",
        b"x" * 60_000,
    ],
)
def test_tag_is_nothing_but_a_tag(server: Server, user: User, tag: bytes) -> None:
    tags = chunk(b"LIST", b"INFO" + chunk(b"INAM", tag + b"\0"))
    response = server.upload(user, riff(PCM, bytes(40_000), before=tags))
    assert response.status_code == 201, response.text
    mp3 = server.http.get(response.json()["URL for download"]).content
    assert len(decoded(mp3).samples) == 10_000
    silent = riff(PCM, b"", before=tags)
    assert "no audio" in problem(server.upload(user, silent), 422)


def compressed() -> bytes:
    """An ID3 tag of 2 MB, whose compressed frames hold 2 GB."""
    picture = zlib.compress(b"\0image/png\0\x03\0" + bytes(64 << 20), 9)
    size = synchsafe(4 + len(picture))
    frame = b"APIC" + size + b"\0\x09" + synchsafe(64 << 20) + picture
    frames = frame * ((2 << 20) // len(frame))
    return chunk(b"id3 ", b"ID3\4\0\0" + synchsafe(len(frames)) + frames)


ENCODER_BYTES = 200 << 20
TAGS = {
    "compressed": compressed(),
    "45,000": chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"Good") * 45_000),
    "huge": chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"Good" * 500_000)),
}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("behind", [False, True])
def test_tags_cost_the_encoder_nothing(
    server: Server, user: User, tags: bytes, behind: bool
) -> None:
    audio = noise(3_000_000)[44:]
    content = riff(PCM, audio, after=tags) if behind else riff(PCM, audio, before=tags)
    with Sending(server, user, content) as sending:
        sending.share(0.9 if behind else 0.99)
        [encoder] = wait_for(lambda: working(server))
        assert encoder.memory_info().rss < ENCODER_BYTES
        encoder.suspend()  # lest it is over before the rest has come
        sending.share(1)
        assert encoder.memory_info().rss < ENCODER_BYTES
        encoder.resume()
        mp3 = server.http.get(link_of(sending.answer())).content
    assert len(decoded(mp3).samples) == len(audio) // 4
    assert len(mp3) < 40_000 * 18 + (64 << 10)


def test_chunks_before_the_audio_may_be_large(server: Server, user: User) -> None:
    content = riff(PCM, bytes(4000), before=chunk(b"junk", bytes(3_000_001)))
    assert server.upload(user, content).status_code == 201


def test_flood_of_chunks_before_the_audio_is_refused_at_once(server: Server, user: User) -> None:
    content = b"RIFF\xff\xff\xff\xffWAVE" + chunk(b"junk", b"") * 1_000_000
    with Sending(server, user, content) as sending:
        sending.share(0.1)
        assert sending.answer().status == 422


@pytest.mark.parametrize("after", [chunk(b"junk", bytes(3_000_001)), bytes(3_000_001)])
def test_what_follows_the_audio_may_be_large(server: Server, user: User, after: bytes) -> None:
    assert server.upload(user, riff(PCM, bytes(4000), after=after)).status_code == 201

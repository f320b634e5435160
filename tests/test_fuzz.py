"""Mutated requests: FUZZ_SECONDS and FUZZ_SEED in the environment make a longer or another run."""

import os
import random
import time

import pytest

from support import Server, StartServer, User, fields, form, wait_for
from wav import decoded, gsm, info, pcm_format, riff, wav
from wire import Wire

SECONDS = float(os.environ.get("FUZZ_SECONDS", "6"))
SEED = os.environ.get("FUZZ_SEED", "1")
WAVS = [
    wav(2000, channels=2, encoding="s24", extensible=True, before=info(INAM="Title")),
    wav(2000, form=b"RF64"),
    riff(pcm_format(7, 8, 8000, 1), bytes(range(256)) * 8),
    gsm(20),
]
TARGETS = [
    b"/api/download?id_record=00000000-0000-0000-0000-000000000000&id_user=1",
    b"/api/records?id_user=1&limit=10&before=2026-01-01T00:00:00Z_" + b"0" * 32,
]
PIECES = [
    b"",
    b"\0",
    b"\r\n",
    b"\xff" * 4,
    b"data",
    b"fmt ",
    b"RIFF",
    b"--frontier",
    b'"',
    b"%",
    b"9" * 20,
]


def mutated(chance: random.Random, content: bytes, reach: int) -> bytes:
    """Change, cut, double or add a few bytes among the first reach ones."""
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(min(len(content), reach) + 1)
        size = chance.choice([0, 1, 2, 4, 8, 64])
        piece = chance.choice([*PIECES, chance.randbytes(size), content[at : at + size] * 2])
        content = content[:at] + piece + content[at + size :]
    return content


def request(chance: random.Random, user: User) -> bytes:
    content, method, target = chance.choice(WAVS), b"POST", b"/api/upload_audiorecord/"
    match chance.randrange(4):
        case 0:
            content = mutated(chance, content, 100)
        case 1:
            content = mutated(chance, content, len(content))
        case 2:
            method = chance.choice([b"GET", b"HEAD", b"DELETE"])
            target = mutated(chance, chance.choice(TARGETS), 100)
            target = bytes(byte for byte in target if 0x20 < byte < 0x7F)
    parts = fields(user, content)
    chance.shuffle(parts)
    body = form(*parts)
    if chance.randrange(3) == 0:
        body = mutated(chance, body, 500)
    head = (
        method + b" " + (target or b"/") + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    )
    head += b"Content-Type: multipart/form-data; boundary=frontier\r\n"
    head += b"Authorization: Bearer %b\r\n" % user.token.encode() if method != b"POST" else b""
    head += b"Range: bytes=0-\r\n" if chance.randrange(9) == 0 else b""
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    if chance.randrange(8) == 0:
        head = mutated(chance, head[:-4], len(head)) + b"\r\n\r\n"
    return head + body


@pytest.mark.slow
def test_mutated_requests_break_nothing(start_server: StartServer) -> None:
    server = start_server(STALL_SECONDS="1")
    user = server.register()
    chance = random.Random(SEED)
    seen: set[int] = set()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        seen.add(answer(server, request(chance, user)))
    assert {201, 400, 404, 422} <= seen
    assert not [status for status in seen if status >= 500], f"seed {SEED}"
    wait_for(lambda: len(server.encoders()) <= 1)  # one may be started ahead
    links = [record["URL for download"] for record in records(server, user)]
    for link in links[:50]:
        assert decoded(server.http.get(link).content).samples
    assert "Traceback" not in server.log


def answer(server: Server, sent: bytes) -> int:
    """Return the status of the answer; 0 stands for a connection that was cut."""
    with Wire(server) as wire:
        try:
            wire.send(sent)
            status = wire.socket.recv(12)
        except ConnectionError:
            return 0
    return int(status[9:12] or 0)


def records(server: Server, user: User) -> list[dict[str, str]]:
    listing = server.http.get(f"/api/records?id_user={user.id}&limit=1000", headers=user.bearer)
    return list(listing.json()["records"])

import hashlib
import random
import re
import uuid
from array import array
from base64 import b64encode
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import psutil
import pytest

from store import blocks_read, store
from support import Server, User, problem
from wire import Downloading

# What is sent

MP3 = random.Random(0).randbytes(700_000)
ETAG = f'"{hashlib.sha256(MP3).hexdigest()}"'
REPR_DIGEST = f"sha-256=:{b64encode(hashlib.sha256(MP3).digest()).decode()}:"
CREATED = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
LAST_MODIFIED = "Thu, 29 Feb 2024 23:59:59 GMT"
BEFORE = "Thu, 29 Feb 2024 23:59:58 GMT"
AFTER = "Fri, 01 Mar 2024 00:00:00 GMT"


@pytest.fixture(scope="module")
def link(server: Server) -> str:
    return store(server, server.register(), MP3, created_at=CREATED)


def test_download_has_what_caches_players_and_scripts_need(server: Server, link: str) -> None:
    response = server.http.get(link)
    assert response.status_code == 200
    assert response.content == MP3
    expected = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": "attachment; filename=\"speech.mp3\"; filename*=UTF-8''speech.mp3",
        "Content-Length": str(len(MP3)),
        "Content-Type": "audio/mpeg",
        "ETag": ETAG,
        "Last-Modified": LAST_MODIFIED,
        "Repr-Digest": REPR_DIGEST,
        "X-Content-Type-Options": "nosniff",
    }
    assert expected.items() <= {name: response.headers.get(name) for name in expected}.items()
    assert "Date" in response.headers
    assert "Content-Range" not in response.headers


@pytest.mark.parametrize("value, disposition", [("1", "inline"), ("0", "attachment")])
def test_inline_plays_instead_of_saving_and_changes_nothing_else(
    server: Server, link: str, value: str, disposition: str
) -> None:
    saved, played = server.http.get(link), server.http.get(f"{link}&inline={value}")
    expected = saved.headers["Content-Disposition"].replace("attachment", disposition, 1)
    assert played.headers["Content-Disposition"] == expected
    assert (played.status_code, played.content) == (200, saved.content)
    assert played.headers["ETag"] == saved.headers["ETag"]


def test_last_modified_is_when_the_record_was_made(server: Server, user: User) -> None:
    created_at = datetime.now(UTC)
    response = server.http.head(store(server, user, b"mp3", created_at=created_at))
    assert response.headers["Last-Modified"] == format_datetime(created_at, usegmt=True)


@pytest.mark.parametrize("size", [1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 19, 1 << 20])
def test_record_of_any_size_comes_whole(server: Server, user: User, size: int) -> None:
    content = random.Random(size).randbytes(size)
    response = server.http.get(store(server, user, content))
    assert response.content == content
    assert response.headers["Content-Length"] == str(size)


@pytest.mark.parametrize(
    "header, first, last",
    [
        ("bytes=0-0", 0, 0),
        ("bytes=262143-262144", 262143, 262144),
        ("bytes=1000-600999", 1000, 600_999),
        ("bytes=262144-", 262144, 699_999),
        ("bytes=-500000", 200_000, 699_999),
    ],
)
def test_range(server: Server, link: str, header: str, first: int, last: int) -> None:
    response = server.http.get(link, headers={"Range": header})
    assert response.status_code == 206
    assert response.content == MP3[first : last + 1]
    whole = server.http.head(link).headers
    expected = {
        **whole,
        "content-range": f"bytes {first}-{last}/700000",
        "content-length": str(last + 1 - first),
    }
    assert {**response.headers, "date": ""} == {**expected, "date": ""}


def test_several_ranges_give_the_whole(server: Server, link: str) -> None:
    response = server.http.get(link, headers={"Range": "bytes=0-0,5-6"})
    assert response.status_code == 200
    assert response.content == MP3
    assert "Content-Range" not in response.headers


def test_range_outside_is_refused_without_a_body(server: Server, link: str) -> None:
    response = server.http.get(link, headers={"Range": "bytes=700000-"})
    assert response.status_code == 416
    assert response.content == b""
    assert response.headers["Content-Length"] == "0"
    assert response.headers["Content-Range"] == "bytes */700000"
    assert response.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    "validator, status",
    [
        (ETAG, 206),
        (LAST_MODIFIED, 206),
        (f"W/{ETAG}", 200),
        ('"another"', 200),
        ("*", 200),
        (BEFORE, 200),
        (AFTER, 200),
        ("yesterday", 200),
    ],
)
def test_if_range_guards_a_range(server: Server, link: str, validator: str, status: int) -> None:
    response = server.http.get(link, headers={"Range": "bytes=5-9", "If-Range": validator})
    assert response.status_code == status
    assert response.content == (MP3[5:10] if status == 206 else MP3)


@pytest.mark.parametrize("validator, status", [(ETAG, 416), ('"another"', 200)])
def test_if_range_guards_a_range_outside(
    server: Server, link: str, validator: str, status: int
) -> None:
    headers = {"Range": "bytes=700000-", "If-Range": validator}
    assert server.http.get(link, headers=headers).status_code == status


NOT_MODIFIED = [
    {"If-None-Match": ETAG},
    {"If-Modified-Since": LAST_MODIFIED},
    {"If-None-Match": ETAG, "Range": "bytes=700000-"},
    {"If-Modified-Since": LAST_MODIFIED, "Range": "bytes=5-9", "If-Range": ETAG},
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", NOT_MODIFIED)
def test_copy_that_is_still_good_is_not_sent_again(
    server: Server, link: str, method: str, headers: dict[str, str]
) -> None:
    response = server.http.request(method, link, headers=headers)
    assert response.status_code == 304
    assert response.content == b""
    whole = server.http.head(link).headers
    for name in ("Accept-Ranges", "Cache-Control", "ETag", "Last-Modified"):
        assert response.headers[name] == whole[name]
    assert "Date" in response.headers
    assert "Content-Length" not in response.headers


@pytest.mark.parametrize("headers", [{"If-Modified-Since": BEFORE}, {"If-Match": ETAG}])
def test_copy_that_is_not_good_is_sent_again(
    server: Server, link: str, headers: dict[str, str]
) -> None:
    response = server.http.get(link, headers=headers)
    assert response.status_code == 200
    assert response.content == MP3


@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": '"another"'},
        {"If-Unmodified-Since": BEFORE},
        {"If-Match": '"another"', "Range": "bytes=700000-"},
    ],
)
def test_copy_other_than_the_one_named_is_refused(
    server: Server, link: str, headers: dict[str, str]
) -> None:
    problem(server.http.get(link, headers=headers), 412)
    head = server.http.head(link, headers=headers)
    assert head.status_code == 412
    assert head.content == b""


@pytest.mark.parametrize("header", ["", "bytes=5-9", "bytes=700000-"])
def test_head_has_the_headers_of_the_whole(server: Server, link: str, header: str) -> None:
    """Ranges are defined for GET alone (RFC 9110 section 14.2)."""
    head = server.http.head(link, headers={"Range": header} if header else {})
    with server.http.stream("GET", link) as get:
        assert head.status_code == 200
        assert head.content == b""
        assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


# What cannot be sent


def test_record_of_another_user_is_not_found(server: Server, user: User, link: str) -> None:
    wrong = re.sub(r"id_user=\d+", f"id_user={user.id}", link)
    problem(server.http.get(wrong), 404)
    assert server.http.head(wrong).status_code == 404
    problem(server.http.delete(wrong, headers=user.bearer), 404)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "parameters",
    [
        "",
        "?id_user=ID",
        "?id_record=NONE",
        "?id_record=NONE&id_user=ID",
        "?id_record=1&id_user=ID",
        "?id_record=%00&id_user=ID",
        "?id_record=NONE&id_user=one",
        "?id_record=NONE&id_user=" + "9" * 5000,
    ],
)
def test_unknown_record_is_not_found(
    server: Server, user: User, method: str, parameters: str
) -> None:
    query = parameters.replace("ID", str(user.id)).replace("NONE", str(uuid.uuid4()))
    problem(server.http.request(method, f"/api/download{query}", headers=user.bearer), 404)


# What it takes to send it

BIG = array("Q", range(50 << 17)).tobytes()  # 50 MiB that could be compressed


@pytest.fixture(scope="module")
def big_link(server: Server) -> str:
    return store(server, server.register(), BIG)


def test_big_record_passes_through_little_memory(server: Server, link: str, big_link: str) -> None:
    server.http.get(link)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    digest, most = hashlib.sha256(), 0
    with server.http.stream("GET", big_link) as response:
        for chunk in response.iter_bytes():
            digest.update(chunk)
            most = max(most, process.memory_info().rss)
    assert digest.digest() == hashlib.sha256(BIG).digest()
    assert most - before < 16 << 20


def test_slow_clients_do_not_keep_the_others_from_theirs(
    server: Server, link: str, big_link: str
) -> None:
    with ExitStack() as stack:
        readers = [stack.enter_context(Downloading(server, big_link)) for _ in range(15)]
        assert server.register().id
        assert server.http.get(link).content == MP3
        for reader in readers:
            assert reader.socket.recv(1)


def test_download_of_a_record_that_is_deleted_meanwhile_is_cut(server: Server, user: User) -> None:
    link = store(server, user, BIG[: 32 << 20])  # more than fits into the buffers on the way
    with (
        pytest.raises(httpx.RemoteProtocolError),
        server.http.stream("GET", link) as response,
    ):
        chunks = response.iter_raw()
        assert next(chunks)
        assert server.http.delete(link, headers=user.bearer).status_code == 204
        for _ in chunks:
            pass
    problem(server.http.get(link), 404)


def test_head_and_not_modified_never_read_the_mp3(server: Server, link: str) -> None:
    before = blocks_read(server)
    server.http.head(link)
    for headers in NOT_MODIFIED:
        assert server.http.get(link, headers=headers).status_code == 304
    for headers in ({"If-Match": '"another"'}, {"Range": "bytes=700000-"}):
        assert server.http.get(link, headers=headers).is_client_error
    after = blocks_read(server)
    assert after.metadata > before.metadata
    assert after.mp3 == before.mp3


def test_range_costs_the_same_wherever_it_lies_however_big_the_record(
    server: Server, user: User, big_link: str
) -> None:
    small_link = store(server, user, BIG[: 1 << 20])
    for link, start in (
        (small_link, 0),
        (small_link, (1 << 20) - 1000),
        (big_link, 0),
        (big_link, len(BIG) // 2),
        (big_link, len(BIG) - 1000),
    ):
        before = blocks_read(server).mp3
        response = server.http.get(link, headers={"Range": f"bytes={start}-{start + 999}"})
        assert response.content == BIG[start : start + 1000]
        assert 1 <= blocks_read(server).mp3 - before <= 2  # with 8192 bytes each

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from store import blocks_read, store, store_many
from support import FORM, UPLOAD, Server, User, credentials, form, part, problem, query
from wav import SPEECH

RECORDS = "/api/records"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def listed(server: Server, user: User, url: str = RECORDS, **parameters: str) -> httpx.Response:
    if url == RECORDS:
        parameters["id_user"] = str(user.id)
    response = server.http.get(url, params=parameters or None, headers=user.bearer)
    assert response.status_code == 200, response.text
    return response


def links(response: httpx.Response) -> list[str]:
    return [record["URL for download"] for record in response.json()["records"]]


def pages(server: Server, user: User, limit: int) -> Iterator[list[str]]:
    """Follows the links to the next page to the end."""
    response, url = listed(server, user, limit=str(limit)), ""
    yield links(response)
    while "next" in response.links:
        assert url != response.links["next"]["url"]
        url = response.links["next"]["url"]
        response = listed(server, user, url)
        yield links(response)


def stored(server: Server, user: User, count: int, apart: timedelta = timedelta(0)) -> list[str]:
    """New records, the newest first."""
    return store_many(server, user, [LONG_AGO + n * apart for n in range(count)])[::-1]


def id_record(link: str) -> str:
    return parse_qs(urlsplit(link).query)["id_record"][0]


# Listing


def test_record_is_listed_with_all_there_is_to_know(server: Server, user: User) -> None:
    link = server.upload(user, SPEECH, "Zoë.wav").json()["URL for download"]
    response = listed(server, user)
    assert response.json().keys() == {"records"}
    (record,) = response.json()["records"]
    created_at = record.pop("created_at")
    assert record == {
        "id_record": id_record(link),
        "filename": "Zoë.mp3",
        "size": len(server.http.get(link).content),
        "duration": 0.25,
        "expires_at": None,
        "URL for download": link,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", created_at)
    sql = "SELECT created_at FROM wav_to_mp3.records WHERE id_user = $1"
    rows = query(server.database_url, sql, user.id)
    assert datetime.fromisoformat(created_at) == rows[0]["created_at"]


def test_newest_comes_first(server: Server, user: User) -> None:
    expected = stored(server, user, 5, timedelta(microseconds=1))
    assert links(listed(server, user)) == expected


def test_records_of_others_are_not_listed(server: Server, user: User) -> None:
    store(server, server.register())
    link = store(server, user)
    assert links(listed(server, user)) == [link]


@pytest.mark.parametrize("apart", [timedelta(0), timedelta(microseconds=1), timedelta(days=1)])
@pytest.mark.parametrize(
    "limit, sizes",
    [
        (1, [1] * 6),
        (2, [2, 2, 2]),
        (4, [4, 2]),
        (5, [5, 1]),
        (6, [6]),
        (1000, [6]),
    ],
)
def test_pages_together_hold_every_record_once(
    server: Server, user: User, apart: timedelta, limit: int, sizes: list[int]
) -> None:
    expected = stored(server, user, 6, apart)
    store(server, server.register(), created_at=LONG_AGO)
    listing = list(pages(server, user, limit))
    assert [len(page) for page in listing] == sizes
    found = [link for page in listing for link in page]
    assert sorted(found) == sorted(expected)
    if apart:
        assert found == expected


def test_paging_goes_on_while_records_come_and_go(server: Server, user: User) -> None:
    expected = stored(server, user, 10, timedelta(hours=1))
    found: list[str] = []
    for page in pages(server, user, 2):
        found += page
        store(server, user)
        server.http.delete(page[-1], headers=user.bearer)
        if len(found) == 4:
            gone = expected.pop(6)
            server.http.delete(gone, headers=user.bearer)
    assert found == expected


def test_page_has_100_records_unless_limit_says_otherwise(server: Server, user: User) -> None:
    expected = stored(server, user, 101, timedelta(seconds=1))
    first = listed(server, user)
    assert links(first) == expected[:100]
    assert links(listed(server, user, first.links["next"]["url"])) == expected[100:]


@pytest.mark.parametrize("limit", ["0", "1001", "ten", ""])
def test_limit_outside_1_to_1000_is_refused(server: Server, user: User, limit: str) -> None:
    parameters = {"id_user": str(user.id), "limit": limit}
    response = server.http.get(RECORDS, params=parameters, headers=user.bearer)
    assert "limit" in problem(response, 422)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "x",
        "_",
        "0",
        "\0",
        "{time}",
        "{time}_",
        "{time}_1",
        "_{id}",
        "{id}_{time}",
        "2020-13-01T00:00:00Z_{id}",
        "0001-01-01T00:00:00+23:59_{id}",
        "9999-12-31T23:59:59-23:59_{id}",
        "99999-01-01T00:00:00Z_{id}",
        "infinity_{id}",
        "{time}_{id}_{id}",
    ],
)
def test_page_after_a_malformed_mark_is_refused(server: Server, user: User, damaged: str) -> None:
    stored(server, user, 2)
    url = urlsplit(listed(server, user, limit="1").links["next"]["url"])
    parameters: dict[str, Any] = parse_qs(url.query)
    (name,) = parameters.keys() - {"id_user", "limit"}
    time, _, mark_id = parameters[name][0].partition("_")
    parameters[name] = damaged.format(time=time, id=mark_id)
    problem(server.http.get(RECORDS, params=parameters, headers=user.bearer), 422)


def test_page_costs_the_same_however_many_records_there_are(server: Server, user: User) -> None:
    stored(server, user, 10_000, timedelta(minutes=1))
    store(server, user, bytes(10_000))
    query(server.database_url, "ANALYZE wav_to_mp3.records")
    response = listed(server, user, limit="1000")
    for _ in range(8):
        response = listed(server, user, response.links["next"]["url"])
    newest = f"{RECORDS}?id_user={user.id}&limit=10"
    oldest = str(httpx.URL(response.links["next"]["url"]).copy_set_param("limit", 10))
    for page in (newest, oldest):
        before = blocks_read(server)
        assert len(links(listed(server, user, page))) == 10
        after = blocks_read(server)
        assert after.metadata - before.metadata < 50
        assert after.mp3 == before.mp3


# Deleting


@pytest.mark.parametrize("path", ["/api/download", "/api/download/"])
def test_deleted_record_is_gone(server: Server, user: User, path: str) -> None:
    link, other = store(server, user), store(server, user)
    response = server.http.delete(link.replace("/api/download", path), headers=user.bearer)
    assert response.status_code == 204
    assert response.content == b""
    problem(server.http.get(link), 404)
    problem(server.http.delete(link, headers=user.bearer), 404)
    head = server.http.head(link)
    assert head.status_code == 404
    assert head.content == b""
    assert links(listed(server, user)) == [other]
    assert server.http.get(other).content == b"mp3"


def test_one_of_many_simultaneous_deletions_finds_the_record(server: Server, user: User) -> None:
    link = store(server, user)

    def delete(_: int) -> int:
        return server.http.delete(link, headers=user.bearer).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(delete, range(8))) == [204] + [404] * 7


def test_record_of_another_user_is_not_found(server: Server, user: User) -> None:
    other = server.register()
    link = store(server, other)
    for wrong in (link, link.replace(f"id_user={other.id}", f"id_user={user.id}")):
        problem(server.http.delete(wrong, headers=user.bearer), 404)
    assert server.http.get(link).status_code == 200


# Whose they are


def test_wrong_token_neither_lists_nor_deletes(server: Server, user: User) -> None:
    link, other = store(server, user), server.register()
    wrong = [
        "",
        "Bearer",
        "Bearer x",
        "Bearer \xff",
        "Bearer " + "x" * 9000,
        f"Bearer {uuid.uuid4()}",
        f"Bearer {user.token}0",
        f"Bearer {user.token} {user.token}",
        f"Bearer{user.token}",
        f"Basic {user.token}",
        user.token,
    ]
    headers = [[], *([(b"Authorization", value.encode("latin-1"))] for value in wrong)]
    answers = set()
    for method, url in (("GET", f"{RECORDS}?id_user={user.id}"), ("DELETE", link)):
        for each in headers:
            response = server.http.request(method, url, headers=each)
            problem(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            answers.add(response.content)
    assert len(answers) == 1
    for id_user in (str(user.id), str(user.id + 1_000_000), "one", "", "9" * 5000):
        response = server.http.get(f"{RECORDS}?id_user={id_user}", headers=other.bearer)
        problem(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert server.http.get(link).content == b"mp3"


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer  "])
def test_scheme_is_written_in_any_way(server: Server, user: User, scheme: str) -> None:
    headers = {"Authorization": scheme + user.token}
    assert server.http.get(f"{RECORDS}?id_user={user.id}", headers=headers).status_code == 200


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("place", ["form", "query"])
def test_upload_takes_the_token_from_the_header(
    server: Server, user: User, place: str, file_first: bool
) -> None:
    parts = [part("file_wav", SPEECH, "speech.wav")]
    if place == "form":
        parts.insert(file_first, credentials(user)[1])
    url = UPLOAD if place == "form" else f"{UPLOAD}?id_user={user.id}"
    response = server.http.post(url, content=form(*parts), headers={**FORM, **user.bearer})
    assert response.status_code == 201, response.text
    assert links(listed(server, user)) == [response.json()["URL for download"]]


@pytest.mark.parametrize("place", ["form", "query"])
def test_upload_with_a_wrong_header_is_refused(server: Server, user: User, place: str) -> None:
    parts = [part("file_wav", SPEECH, "speech.wav")]
    if place == "form":
        parts.insert(0, credentials(user)[1])
    url = UPLOAD if place == "form" else f"{UPLOAD}?id_user={user.id}"
    for wrong in (str(uuid.uuid4()), server.register().token):
        headers = {**FORM, "Authorization": f"Bearer {wrong}"}
        response = server.http.post(url, content=form(*parts), headers=headers)
        problem(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert server.records(user) == 0


@pytest.mark.parametrize("authorization", ["", "Bearer", "Basic dXNlcjpwYXNz"])
def test_upload_without_any_token_names_the_field(
    server: Server, user: User, authorization: str
) -> None:
    parts = credentials(user)[1], part("file_wav", SPEECH, "speech.wav")
    assert "user_token" in problem(
        server.send(*parts, headers={"Authorization": authorization}), 422
    )

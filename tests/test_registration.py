import hashlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from support import Server, curl, problem, query

PATH = "/api/registration/"


def test_registration_gives_an_id_and_a_token(server: Server) -> None:
    response = server.http.post(PATH, json={"username": "Bob"})
    assert response.status_code == 201
    assert response.json().keys() == {"id_user", "user_token"}
    assert isinstance(response.json()["id_user"], int)
    assert str(uuid.UUID(response.json()["user_token"])) == response.json()["user_token"]


def test_curl_registers_with_its_default_content_type(server: Server) -> None:
    reply = curl("-d", '{"username": "Curly"}', server.url + PATH)
    assert reply.status == 201
    assert reply.json().keys() == {"id_user", "user_token"}


def test_any_two_users_differ(server: Server) -> None:
    one, other = server.register(), server.register()
    assert one.id != other.id
    assert one.token != other.token


@pytest.mark.parametrize("username", ["'; DROP TABLE users; --", "👩‍🚀"])
def test_username_is_taken_as_it_is(server: Server, username: str) -> None:
    assert server.http.post(PATH, json={"username": username}).status_code == 201


@pytest.mark.parametrize("username", ["x" * 256, "a\0b", "\ud800"])
def test_unfit_username_is_refused(server: Server, username: str) -> None:
    content = json.dumps({"username": username})
    assert "username" in problem(server.http.post(PATH, content=content), 422)


@pytest.mark.parametrize("username", ["Zoë", " Zoë ", "Zoe\u0308"])
def test_taken_username_is_refused(server: Server, username: str) -> None:
    server.http.post(PATH, json={"username": "Zoë"})
    assert "taken" in problem(server.http.post(PATH, json={"username": username}), 409)


def test_one_of_many_simultaneous_registrations_wins(server: Server) -> None:
    def register(_: int) -> int:
        return server.http.post(PATH, json={"username": "Everybody"}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(register, range(8))) == [201] + [409] * 7


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"username=Bob",
        b'{"username": "Bob"',
        b'{"username": "\xff"}',
        b"[" * 60_000,
        b'{"username": "Bob", "age": %b}' % (b"9" * 5000),  # more digits than int() takes
    ],
)
def test_body_that_is_not_json_is_refused(server: Server, content: bytes) -> None:
    assert "JSON" in problem(server.http.post(PATH, content=content), 400)


@pytest.mark.parametrize("content", [{}, [], "username", 3, None, {"username": 3}, {"name": "Bob"}])
def test_missing_username_is_named(server: Server, content: object) -> None:
    response = server.http.post(PATH, content=json.dumps(content))
    assert "username" in problem(response, 422)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"username": %b}' % (b"9" * 1_000_000)])
def test_absurd_body_is_refused(server: Server, content: bytes) -> None:
    problem(server.http.post(PATH, content=content), 413)


@pytest.mark.parametrize("size, status", [(64 << 10, 201), ((64 << 10) + 1, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_may_have_64_kib(server: Server, size: int, status: int, chunked: bool) -> None:
    content = json.dumps({"username": uuid.uuid4().hex}).encode().ljust(size)
    response = server.http.post(PATH, content=iter([content]) if chunked else content)
    assert response.status_code == status


def test_database_keeps_only_the_hash_of_the_token(server: Server) -> None:
    user = server.register()
    [row] = query(server.database_url, "SELECT * FROM wav_to_mp3.users WHERE id_user = $1", user.id)
    assert user.token not in repr(row)
    assert uuid.UUID(user.token) not in row.values()
    assert hashlib.sha256(user.token.encode()).digest() in row.values()

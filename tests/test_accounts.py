"""Who may register, a new token for the old one, and moving out."""

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest

from store import store, store_many
from support import Postgres, Server, User, curl, problem, query, uncommitted, wait_for
from support import waiting_for_locks as waiting
from wav import LONG, SPEECH
from wire import Answer, Sending, link_of, working

REGISTRATION = "/api/registration/"
TOKEN = "/api/token/"
KEY = "Schlüssel 1: ein Löffel"


def listing(server: Server, user: User) -> httpx.Response:
    return server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)


def renew(server: Server, user: User) -> User:
    response = server.http.post(TOKEN, headers=user.bearer)
    assert response.status_code == 201, response.text
    return User(*response.json().values())


def delete(server: Server, user: User) -> httpx.Response:
    return server.http.delete(REGISTRATION, headers=user.bearer)


def register(server: Server, username: str) -> httpx.Response:
    return server.http.post(REGISTRATION, json={"username": username})


def user_of(registration: httpx.Response) -> User:
    assert registration.status_code == 201, registration.text
    return User(*registration.json().values())


LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


# Who may register


@pytest.fixture(scope="module")
def locked(postgres: Postgres) -> Iterator[Server]:
    """One that registers those who have the key."""
    with Server({"DATABASE_URL": postgres.create_database(), "REGISTRATION_KEY": KEY}) as server:
        assert server.url
        yield server


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_who_shows_the_key_is_registered(locked: Server, scheme: str) -> None:
    content = json.dumps({"username": f"Bob, {scheme}"})
    header = f"Authorization: {scheme} {KEY}"
    reply = curl("-H", header, "-d", content, locked.url + REGISTRATION)
    assert reply.status == 201
    user = User(*reply.json().values())
    assert locked.upload(user, SPEECH).status_code == 201  # as everywhere, without the key


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}!",
        f"Bearer {KEY.lower()}",
        f"Basic {KEY}",
        KEY,
        "Bearer \xff",
    ],
)
def test_who_does_not_show_the_key_is_told_so(locked: Server, header: str | None) -> None:
    headers = [] if header is None else [(b"Authorization", header.encode())]
    content = json.dumps({"username": "Mallory"})
    response = locked.http.post(REGISTRATION, content=content, headers=headers)
    detail = problem(response, 401)
    assert "key" in detail and "Authorization: Bearer" in detail
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert not query(locked.database_url, "SELECT FROM wav_to_mp3.users WHERE username = 'Mallory'")


def test_token_is_no_registration_key(locked: Server) -> None:
    content = json.dumps({"username": "Carol"})
    headers = [(b"Authorization", f"Bearer {KEY}".encode())]
    user = user_of(locked.http.post(REGISTRATION, content=content, headers=headers))
    response = locked.http.post(REGISTRATION, json={"username": "Dave"}, headers=user.bearer)
    assert "key" in problem(response, 401)


def test_registration_is_open_where_no_key_is_set(server: Server) -> None:
    headers = {"Authorization": "Bearer whatever"}
    content = {"username": uuid.uuid4().hex}
    assert server.http.post(REGISTRATION, json=content, headers=headers).status_code == 201


# A new token


@pytest.mark.parametrize("path", [TOKEN, TOKEN.rstrip("/")])
def test_new_token_replaces_the_old_one_at_once(server: Server, user: User, path: str) -> None:
    link = link_of(server.upload(user, SPEECH))
    response = server.http.post(path, headers=user.bearer)
    assert response.status_code == 201
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json().keys() == {"id_user", "user_token"}
    new = User(*response.json().values())
    assert new.id == user.id
    assert str(uuid.UUID(new.token)) == new.token != user.token
    for refused in (
        listing(server, user),
        server.http.delete(link, headers=user.bearer),
        server.upload(user, SPEECH),
        server.upload(user, SPEECH, file_first=True),
        server.http.post(path, headers=user.bearer),
        delete(server, user),
    ):
        problem(refused, 401)
    assert len(listing(server, new).json()["records"]) == 1
    assert server.http.delete(link, headers=new.bearer).status_code == 204
    assert server.upload(new, SPEECH).status_code == 201


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer x", f"Bearer {uuid.UUID(int=1)}", "Basic x"]
)
@pytest.mark.parametrize("method, path", [("POST", TOKEN), ("DELETE", REGISTRATION)])
def test_wrong_token_neither_renews_nor_deletes(
    server: Server, header: str, method: str, path: str
) -> None:
    response = server.http.request(method, path, headers={"Authorization": header})
    assert "credentials" in problem(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_database_keeps_only_the_hash_of_a_new_token(server: Server, user: User) -> None:
    new = renew(server, user)
    sql = "SELECT * FROM wav_to_mp3.users WHERE id_user = $1"
    [row] = query(server.database_url, sql, user.id)
    assert new.token not in str(row)


def test_one_of_many_simultaneous_renewals_wins(server: Server, user: User) -> None:
    def attempt(_: int) -> httpx.Response:
        return server.http.post(TOKEN, headers=user.bearer)

    with ThreadPoolExecutor(8) as pool:
        responses = sorted(pool.map(attempt, range(8)), key=lambda response: response.status_code)
    assert [response.status_code for response in responses] == [201] + [401] * 7
    assert listing(server, user_of(responses[0])).status_code == 200


def test_upload_outlives_the_token_that_it_began_with(server: Server, user: User) -> None:
    with Sending(server, user, LONG) as sending:
        sending.share(0.5)
        wait_for(lambda: working(server))
        new = renew(server, user)
        link = link_of(sending.finish())
    [record] = listing(server, new).json()["records"]
    assert record["URL for download"] == link


def test_file_that_waits_for_its_credentials_needs_the_new_token(
    server: Server, user: User
) -> None:
    with Sending(server, user, LONG, file_first=True) as sending:
        sending.share(0.5)
        new = renew(server, user)
        refused(sending.finish(), 401)
    assert server.records(new) == 0


def refused(answer: Answer, status: int) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"


END_WAITING = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def test_renewal_goes_on_where_its_connection_is_lost(server: Server, user: User) -> None:
    lock = f"SELECT FROM wav_to_mp3.users WHERE id_user = {user.id} FOR UPDATE"
    with ThreadPoolExecutor() as threads, uncommitted(server.database_url, lock):
        renewal = threads.submit(renew, server, user)
        wait_for(lambda: query(server.database_url, END_WAITING))
    assert listing(server, renewal.result()).status_code == 200


# Moving out


@pytest.mark.parametrize("path", [REGISTRATION, REGISTRATION.rstrip("/")])
def test_deleted_account_is_gone_with_all_its_records(
    server: Server, user: User, path: str
) -> None:
    username = uuid.uuid4().hex
    leaving = user_of(register(server, username))
    links = [link_of(server.upload(leaving, SPEECH)), store(server, leaving)]
    other = link_of(server.upload(user, SPEECH))
    response = server.http.delete(path, headers=leaving.bearer)
    assert (response.status_code, response.content) == (204, b"")
    for link in links:
        problem(server.http.get(link), 404)
    assert server.records(leaving) == 0
    for refusal in (
        listing(server, leaving),
        server.upload(leaving, SPEECH),
        server.http.post(TOKEN, headers=leaving.bearer),
        delete(server, leaving),
    ):
        problem(refusal, 401)
    assert server.http.get(other).status_code == 200
    again = user_of(register(server, username))
    assert again.id != leaving.id
    assert listing(server, again).json() == {"records": []}


def test_curl_deletes_an_account(server: Server, user: User) -> None:
    header = f"Authorization: Bearer {user.token}"
    assert curl("-X", "DELETE", "-H", header, server.url + REGISTRATION).status == 204
    problem(listing(server, user), 401)


def test_simultaneous_deletions_of_an_account_all_find_it_gone(server: Server, user: User) -> None:
    store_many(server, user, [LONG_AGO] * 300)
    with ThreadPoolExecutor(8) as pool:
        statuses = {
            response.status_code for response in pool.map(lambda _: delete(server, user), range(8))
        }
    assert 204 in statuses
    assert statuses <= {204, 401}
    problem(listing(server, user), 401)
    assert server.records(user) == 0


def test_token_that_is_renewed_meanwhile_does_not_save_the_account(
    server: Server, user: User
) -> None:
    store(server, user)
    lock = f"SELECT FROM wav_to_mp3.records WHERE id_user = {user.id} FOR UPDATE"
    with ThreadPoolExecutor() as threads:
        with uncommitted(server.database_url, lock):
            deletion = threads.submit(delete, server, user)
            wait_for(lambda: waiting(server.database_url))
            renewal = threads.submit(server.http.post, TOKEN, headers=user.bearer)
            wait_for(lambda: renewal.done() or waiting(server.database_url) == 2)
        assert deletion.result().status_code == 204
        if renewal.result().status_code == 201:
            problem(listing(server, user_of(renewal.result())), 401)
    sql = "SELECT FROM wav_to_mp3.users WHERE id_user = $1"
    assert not query(server.database_url, sql, user.id)


@pytest.mark.parametrize("file_first", [False, True])
def test_upload_of_a_deleted_account_is_refused(
    server: Server, user: User, file_first: bool
) -> None:
    before = len(server.log)
    with Sending(server, user, LONG, file_first=file_first) as sending:
        sending.share(0.5)
        if not file_first:
            wait_for(lambda: working(server))
        assert delete(server, user).status_code == 204
        refused(sending.finish(), 401)
    assert server.records(user) == 0
    problem(listing(server, user), 401)  # after which the log is written
    assert "Traceback" not in server.log[before:]


def test_deletion_finds_what_another_worker_is_storing(server: Server, user: User) -> None:
    with ThreadPoolExecutor() as threads, uncommitted(server.database_url, storing(user)):
        deletion = threads.submit(delete, server, user)
        wait_for(lambda: waiting(server.database_url))
    assert deletion.result().status_code == 204
    assert server.records(user) == 0


def storing(user: User) -> str:
    return f"""
        INSERT INTO wav_to_mp3.records
            (id_user, id_record, idempotency_key, filename, size, sha256, duration, mp3)
        VALUES ({user.id}, gen_random_uuid(), 'x', 'x', 3, sha256('mp3'), 1, 'mp3')
    """


def test_others_go_on_while_an_account_is_deleted(server: Server, user: User) -> None:
    other = server.register()
    theirs = store(server, other)
    store_many(server, user, [LONG_AGO] * 1000)
    lock = f"SELECT FROM wav_to_mp3.records WHERE id_user = {user.id} FOR UPDATE"
    with ThreadPoolExecutor() as threads, uncommitted(server.database_url, lock):
        deletion = threads.submit(delete, server, user)
        wait_for(lambda: waiting(server.database_url))
        link = link_of(server.upload(other, SPEECH))
        assert server.http.get(theirs).content == b"mp3"
        for each in (link, theirs):
            assert server.http.delete(each, headers=other.bearer).status_code == 204
        assert listing(server, other).json()["records"] == []
        renew(server, other)
        assert not deletion.done()
    assert deletion.result().status_code == 204


def test_account_with_100_000_records_is_deleted(server: Server, user: User) -> None:
    store_many(server, user, [LONG_AGO] * 100_000)
    assert delete(server, user).status_code == 204
    assert server.records(user) == 0


# As the sweep: first records, then their user; and it is not the one to give way.
CONTRARY = """
SET LOCAL deadlock_timeout = '1h';
SELECT FROM wav_to_mp3.records WHERE id_user = {user.id} FOR UPDATE;
SELECT pg_advisory_xact_lock(4711);
DO $$ BEGIN
    WHILE NOT EXISTS (SELECT FROM pg_locks WHERE NOT granted) LOOP
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;
UPDATE wav_to_mp3.users SET kept_bytes = kept_bytes WHERE id_user = {user.id}
"""


def test_deletions_that_wait_for_each_other_end_well(server: Server, user: User) -> None:
    store_many(server, user, [LONG_AGO] * 10)
    locked = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711"

    def delete_then() -> httpx.Response:
        wait_for(lambda: query(server.database_url, locked))
        return delete(server, user)

    with ThreadPoolExecutor() as threads:
        deletion = threads.submit(delete_then)
        with uncommitted(server.database_url, CONTRARY.format(user=user)):
            pass
        assert deletion.result().status_code == 204


# Names and their owners


def test_name_is_free_when_its_deletion_is_committed(server: Server) -> None:
    username = uuid.uuid4().hex
    user_of(register(server, username))
    leave = f"DELETE FROM wav_to_mp3.users WHERE username = '{username}'"
    with ThreadPoolExecutor() as threads, uncommitted(server.database_url, leave):
        registration = threads.submit(register, server, username)
        wait_for(lambda: waiting(server.database_url))
    assert listing(server, user_of(registration.result())).status_code == 200


def test_names_deleted_and_registered_at_once_have_one_owner(server: Server) -> None:
    username = uuid.uuid4().hex
    user = user_of(register(server, username))
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            deletion = threads.submit(delete, server, user)
            registration = threads.submit(register, server, username)
            assert deletion.result().status_code == 204
            if registration.result().status_code == 409:
                registration = threads.submit(register, server, username)
            user = user_of(registration.result())
            assert listing(server, user).status_code == 200
    sql = "SELECT id_user FROM wav_to_mp3.users WHERE username = $1"
    assert [row["id_user"] for row in query(server.database_url, sql, username)] == [user.id]

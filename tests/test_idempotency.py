from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from proxy import Proxy
from support import (
    UPLOAD,
    Server,
    StartServer,
    User,
    curl,
    curl_form,
    problem,
    query,
    uncommitted,
    wait_for,
    waiting_for_locks,
)
from wav import SPEECH, wav
from wire import link_of

OTHER = wav(5000)


def send(server: Server, user: User, content: bytes, key: str, filename: str = "a.wav") -> str:
    """Upload under a key, and return the link."""
    return link_of(server.upload(user, content, filename, headers={"Idempotency-Key": key}))


@pytest.mark.parametrize("key", ["1", "a8f5f167-8d4e-4f7b", '"quoted"', "k" * 255])
def test_repeated_upload_gives_the_same_link_and_is_stored_once(
    server: Server, user: User, key: str
) -> None:
    links = {send(server, user, SPEECH, key) for _ in range(3)}
    assert len(links) == 1
    assert server.records(user) == 1


def test_uploads_that_arrive_at_once_under_one_key_are_stored_once(
    server: Server, user: User
) -> None:
    with ThreadPoolExecutor(8) as pool:
        links = pool.map(lambda _: send(server, user, SPEECH, "key"), range(8))
    assert len(set(links)) == 1
    assert server.records(user) == 1


def test_key_of_another_file_is_refused(server: Server, user: User) -> None:
    send(server, user, SPEECH, "key")
    response = server.upload(user, OTHER, headers={"Idempotency-Key": "key"})
    assert "Idempotency-Key" in problem(response, 422)
    assert server.records(user) == 1


def test_two_files_that_arrive_at_once_under_one_key_are_not_both_stored(
    server: Server, user: User
) -> None:
    def status(content: bytes) -> int:
        return server.upload(user, content, headers={"Idempotency-Key": "key"}).status_code

    with ThreadPoolExecutor() as threads:
        assert sorted(threads.map(status, [SPEECH, OTHER])) == [201, 422]
    assert server.records(user) == 1


def test_keys_of_two_users_have_nothing_to_do_with_each_other(server: Server) -> None:
    links = {send(server, server.register(), SPEECH, "key") for _ in range(2)}
    assert len(links) == 2


def test_uploads_without_a_key_are_all_stored(server: Server, user: User) -> None:
    assert server.upload(user, SPEECH).status_code == 201
    assert server.upload(user, SPEECH).status_code == 201
    assert server.records(user) == 2


def test_key_of_a_deleted_record_is_free_again(server: Server, user: User) -> None:
    link = send(server, user, SPEECH, "key")
    assert server.http.delete(link, headers=user.bearer).status_code == 204
    assert send(server, user, OTHER, "key") != link


DELETE_FIRST = """
DO $$
BEGIN
    LOCK TABLE wav_to_mp3.records;
    DELETE FROM wav_to_mp3.records;
END $$
"""


def test_key_whose_record_is_deleted_while_it_is_looked_up_is_free_again(
    start_server: StartServer,
) -> None:
    server = start_server()
    user, url = server.register(), server.database_url
    send(server, user, OTHER, "other")
    with ThreadPoolExecutor() as threads:
        with uncommitted(url, "UPDATE wav_to_mp3.records SET idempotency_key = 'key'"):
            link = threads.submit(send, server, user, SPEECH, "key")
            wait_for(lambda: waiting_for_locks(url) == 1)
            deletion = threads.submit(query, url, DELETE_FIRST)  # before any further query
            wait_for(lambda: waiting_for_locks(url) == 2)
        deletion.result()
        assert server.http.get(link.result()).status_code == 200
    assert server.records(user) == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_key_of_another_length_is_refused(server: Server, user: User, key: str) -> None:
    assert "255" in problem(server.send(headers={"Idempotency-Key": key}), 422)


def test_curl_retries_after_a_lost_answer_without_storing_twice(server: Server, user: User) -> None:
    address = urlsplit(server.url)
    with Proxy((str(address.hostname), address.port or 80)) as proxy:
        proxy.cut_at = b"HTTP/1.1 201"
        reply = curl(
            *("--retry", "3", "--retry-all-errors", "--retry-delay", "1"),
            *("-H", "Idempotency-Key: lost"),
            *curl_form(user),
            f"http://127.0.0.1:{proxy.port}{UPLOAD}",
            stdin=SPEECH,
        )
        assert proxy.cut_at is None
    assert reply.status == 201
    assert server.records(user) == 1

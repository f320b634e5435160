"""How much a user may keep, and for how long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import IncompleteRead

import httpx
import pytest

from store import blocks_read, store, store_large, store_many
from support import FORM, UPLOAD, Postgres, Server, StartServer, User, problem, query, uncommitted
from support import wait_for as wait
from wav import LONG, SPEECH, wav
from wire import Downloading, Sending, Wire, link_of, working

LIMIT = 100_000
KEEP = timedelta(days=30)
OTHER = wav(5000)


def sweeping_every(seconds: float) -> tuple[str, ...]:
    program = f"import service; service.SWEEP_SECONDS = {seconds}; service.main()"
    return sys.executable, "-c", program


@pytest.fixture(scope="module")
def limited(postgres: Postgres) -> Iterator[Server]:
    settings = {"DATABASE_URL": postgres.create_database(), "MAX_USER_BYTES": str(LIMIT)}
    with Server(settings) as server:
        assert server.url
        yield server


def keeping(postgres: Postgres, sweep: float) -> Server:
    settings = {"MAX_USER_BYTES": str(LIMIT), "KEEP_DAYS": str(KEEP.days)}
    settings["DATABASE_URL"] = postgres.create_database()
    return Server(settings, sweeping_every(sweep))


@pytest.fixture(scope="module")
def expiring(postgres: Postgres) -> Iterator[Server]:
    """One that does not sweep what expires meanwhile."""
    with keeping(postgres, 3600) as server:
        server.register()
        yield server


@pytest.fixture(scope="module")
def sweeping(postgres: Postgres) -> Iterator[Server]:
    with keeping(postgres, 0.05) as server:
        server.register()
        yield server


def fill(server: Server, user: User, left: int = 0) -> str:
    """Leave so many bytes of the quota, and return the link of what has taken the others."""
    return store(server, user, bytes(LIMIT - left))


def age(server: Server, user: User, by: timedelta = KEEP) -> None:
    sql = "UPDATE wav_to_mp3.records SET created_at = created_at - $2::interval WHERE id_user = $1"
    query(server.database_url, sql, user.id, by)


def kept(server: Server, user: User) -> int:
    """The bytes that are counted, which have to be those that there are."""
    sql = """
        SELECT
            (SELECT kept_bytes FROM wav_to_mp3.users WHERE id_user = $1) AS counted,
            coalesce(sum(octet_length(mp3)), 0) AS present
        FROM wav_to_mp3.records WHERE id_user = $1
    """
    [row] = query(server.database_url, sql, user.id)
    assert row["counted"] == row["present"]
    return int(row["counted"])


def listed(server: Server, user: User, **parameters: int) -> httpx.Response:
    parameters["id_user"] = user.id
    return server.http.get("/api/records", params=parameters, headers=user.bearer)


def records(server: Server, user: User) -> list[dict[str, str]]:
    found: list[dict[str, str]] = listed(server, user).json()["records"]
    return found


# How much


@pytest.mark.parametrize("file_first", [False, True])
def test_upload_past_the_quota_is_refused_with_numbers_and_advice(
    limited: Server, file_first: bool
) -> None:
    user = limited.register()
    fill(limited, user, -23)
    detail = problem(limited.upload(user, SPEECH, file_first=file_first), 507)
    assert str(LIMIT) in detail and str(LIMIT + 23) in detail
    assert "Delete" in detail and "expire" not in detail
    assert limited.records(user) == 1


def test_where_recordings_expire_the_advice_is_to_wait_too(expiring: Server) -> None:
    user = expiring.register()
    fill(expiring, user)
    detail = problem(expiring.upload(user, SPEECH), 507)
    assert "Delete" in detail and "wait" in detail


def test_upload_past_the_quota_is_refused_before_its_body_is_sent(limited: Server) -> None:
    user = limited.register()
    fill(limited, user)
    headers = {**FORM, **user.bearer, "Content-Length": "1000000", "Expect": "100-continue"}
    with Wire(limited) as wire:
        wire.head(f"{UPLOAD}?id_user={user.id}", headers)
        assert wire.socket.recv(65536).startswith(b"HTTP/1.1 507 ")


def test_quota_is_passed_by_no_more_than_one_upload_after_the_other(limited: Server) -> None:
    user, other = limited.register(), limited.register()
    fill(limited, user, 1)
    assert limited.upload(user, SPEECH).status_code == 201
    before = kept(limited, user)
    assert before > LIMIT
    problem(limited.upload(user, SPEECH), 507)
    assert kept(limited, user) == before
    assert limited.upload(other, SPEECH).status_code == 201


def test_uploads_in_flight_are_refused_once_another_has_filled_the_quota(limited: Server) -> None:
    user = limited.register()
    fill(limited, user, 1)
    with Sending(limited, user, LONG) as one, Sending(limited, user, LONG) as other:
        one.share(0.5)
        other.share(0.5)
        wait(lambda: len(working(limited)) == 2)
        assert limited.upload(user, SPEECH).status_code == 201
        before = kept(limited, user)
        for sending in (one, other):
            assert sending.finish().status == 507
    assert kept(limited, user) == before


def test_deletion_makes_room(limited: Server) -> None:
    user = limited.register()
    link = fill(limited, user)
    problem(limited.upload(user, SPEECH), 507)
    assert limited.http.delete(link, headers=user.bearer).status_code == 204
    assert limited.upload(user, SPEECH).status_code == 201


def test_expiry_makes_room_before_any_sweep(expiring: Server) -> None:
    user = expiring.register()
    fill(expiring, user)
    age(expiring, user, KEEP / 2)
    problem(expiring.upload(user, SPEECH), 507)
    age(expiring, user, KEEP / 2)
    assert expiring.upload(user, SPEECH).status_code == 201
    assert expiring.records(user) == 2
    fill(expiring, user)
    problem(expiring.upload(user, SPEECH), 507)


def test_retry_of_the_upload_that_filled_the_quota_gives_its_link(limited: Server) -> None:
    user = limited.register()
    fill(limited, user, 1)

    def upload(content: bytes, key: str, *, file_first: bool = False) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return limited.upload(user, content, headers=headers, file_first=file_first)

    link = link_of(upload(SPEECH, "key"))
    assert link_of(upload(SPEECH, "key")) == link
    assert link_of(upload(SPEECH, "key", file_first=True)) == link
    problem(upload(OTHER, "key"), 422)
    problem(upload(SPEECH, "other"), 507)


def test_kept_bytes_are_those_there_are_whatever_happens(limited: Server) -> None:
    user, leaving = limited.register(), limited.register()
    headers = {"Idempotency-Key": "key"}
    links = [link_of(limited.upload(user, SPEECH, headers=headers)) for _ in range(3)]
    size = kept(limited, user)
    assert size == len(limited.http.get(links[0]).content)
    limited.upload(user, SPEECH)
    assert kept(limited, user) == 2 * size
    problem(limited.upload(user, SPEECH[:-1]), 422)
    problem(limited.upload(user, OTHER, headers=headers), 422)
    assert kept(limited, user) == 2 * size
    store_many(limited, user, [datetime.now(UTC)] * 100)
    store(limited, leaving)
    assert kept(limited, user) == 2 * size + 300
    assert kept(limited, leaving) == 3
    limited.http.delete("/api/registration/", headers=leaving.bearer)
    assert limited.http.delete(links[0], headers=user.bearer).status_code == 204
    problem(limited.http.delete(links[0], headers=user.bearer), 404)
    assert kept(limited, user) == size + 300
    query(limited.database_url, "DELETE FROM wav_to_mp3.records WHERE id_user = $1", user.id)
    assert kept(limited, user) == 0


def test_quota_costs_the_same_however_many_records_there_are(expiring: Server) -> None:
    user = expiring.register()
    store_many(expiring, user, [datetime.now(UTC)] * 10_000, b"some mp3 bytes")
    query(expiring.database_url, "ANALYZE wav_to_mp3.records")
    before = blocks_read(expiring)
    problem(expiring.upload(user, SPEECH), 507)
    after = blocks_read(expiring)
    assert after.metadata - before.metadata < 50
    assert after.mp3 == before.mp3


# For how long


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-0"}, {"If-None-Match": '"x"'}])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_expired_record_is_not_found(
    expiring: Server, method: str, headers: dict[str, str]
) -> None:
    user = expiring.register()
    link = store(expiring, user)
    age(expiring, user)
    headers = {**headers, **user.bearer} if method == "DELETE" else headers
    response = expiring.http.request(method, link, headers=headers)
    assert response.status_code == 404
    assert method == "HEAD" or problem(response, 404)
    assert expiring.records(user) == 1  # it is not swept


def test_record_is_there_until_it_expires(expiring: Server) -> None:
    user = expiring.register()
    link = store(expiring, user)
    age(expiring, user, KEEP - timedelta(seconds=5))
    assert expiring.http.get(link).status_code == 200
    assert len(records(expiring, user)) == 1
    wait(lambda: expiring.http.get(link).status_code == 404)
    assert records(expiring, user) == []


def test_expired_records_are_not_listed(expiring: Server) -> None:
    user = expiring.register()
    store_many(expiring, user, [datetime.now(UTC)] * 5)
    age(expiring, user)
    fresh = {store(expiring, user) for _ in range(3)}
    response = listed(expiring, user, limit=3)
    assert {each["URL for download"] for each in response.json()["records"]} == fresh
    assert "next" not in response.links
    first = listed(expiring, user, limit=2)
    rest = expiring.http.get(first.links["next"]["url"], headers=user.bearer)
    assert len(rest.json()["records"]) == 1
    assert "next" not in rest.links


def test_listing_and_headers_say_when_a_record_expires(expiring: Server) -> None:
    user = expiring.register()
    uploaded = expiring.upload(user, SPEECH)
    [record] = records(expiring, user)
    created_at, expires_at = (
        datetime.fromisoformat(record[name]) for name in ("created_at", "expires_at")
    )
    assert expires_at == created_at + KEEP
    assert record["expires_at"].endswith("Z")
    link = link_of(uploaded)
    partial = expiring.http.get(link, headers={"Range": "bytes=0-0"})
    for response in (expiring.http.get(link), expiring.http.head(link), partial):
        assert parsedate_to_datetime(response.headers["Sunset"]) == expires_at.replace(
            microsecond=0
        )
    said = parsedate_to_datetime(uploaded.headers["Sunset"])
    assert abs(said - expires_at) < timedelta(seconds=60)


def test_retried_upload_says_when_the_first_one_expires(expiring: Server) -> None:
    user = expiring.register()
    headers = {"Idempotency-Key": "key"}
    link = link_of(expiring.upload(user, SPEECH, headers=headers))
    age(expiring, user, KEEP / 2)
    again = expiring.upload(user, SPEECH, headers=headers)
    assert link_of(again) == link
    assert again.headers["Sunset"] == expiring.http.head(link).headers["Sunset"]


def test_day_has_24_hours_when_clocks_change(postgres: Postgres) -> None:
    database_url = postgres.create_database()
    name = database_url.partition("?")[0].rpartition("/")[2]
    query(database_url, f"ALTER DATABASE {name} SET timezone = 'Europe/Berlin'")
    keep = timedelta(days=2 * 365 + 181)  # from winter to summer
    winter = datetime(datetime.now(UTC).year, 1, 15, tzinfo=UTC)
    with Server({"DATABASE_URL": database_url, "KEEP_DAYS": str(keep.days)}) as server:
        user = server.register()
        link = store(server, user, created_at=winter)
        [record] = records(server, user)
        assert datetime.fromisoformat(record["expires_at"]) == winter + keep
        assert parsedate_to_datetime(server.http.head(link).headers["Sunset"]) == winter + keep


def test_record_is_kept_for_ever_where_nothing_else_is_set(server: Server, user: User) -> None:
    uploaded = server.upload(user, SPEECH)
    age(server, user, timedelta(days=40_000))
    [record] = records(server, user)
    assert record["expires_at"] is None
    assert server.http.get(link_of(uploaded)).status_code == 200
    assert "Sunset" not in uploaded.headers
    assert "Sunset" not in server.http.get(link_of(uploaded)).headers


@pytest.mark.parametrize("service", ["expiring", "sweeping"])
def test_key_of_an_expired_record_is_free_again(
    request: pytest.FixtureRequest, service: str
) -> None:
    server: Server = request.getfixturevalue(service)
    user = server.register()
    headers = {"Idempotency-Key": "key"}
    link = link_of(server.upload(user, SPEECH, headers=headers))
    age(server, user)
    again = link_of(server.upload(user, OTHER, headers=headers))
    assert again != link
    assert link_of(server.upload(user, OTHER, headers=headers)) == again
    assert server.http.get(again).status_code == 200
    assert server.records(user) == 1
    kept(server, user)


# The sweep


TURN = "SELECT pg_advisory_xact_lock(hashtext('wav-to-mp3 sweep'))"


def test_expired_records_are_swept_and_no_others(sweeping: Server) -> None:
    user = sweeping.register()
    store_many(sweeping, user, [datetime.now(UTC) - KEEP] * 250)
    fresh = store(sweeping, user)
    wait(lambda: sweeping.records(user) == 1)
    assert sweeping.http.get(fresh).content == b"mp3"
    assert kept(sweeping, user) == 3


COUNT_BATCHES = """
CREATE TABLE batches (size bigint);
CREATE FUNCTION count_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO batches SELECT count(*) FROM changed;
    RETURN NULL;
END $$;
CREATE TRIGGER count_batch AFTER DELETE ON wav_to_mp3.records
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION count_batch()
"""


def test_sweep_goes_in_batches(start_server: StartServer) -> None:
    server = start_server(KEEP_DAYS=str(KEEP.days))
    user, url = server.register(), server.database_url
    assert server.stop() == 0
    store_many(server, user, [datetime.now(UTC) - KEEP] * 2500)
    with uncommitted(url, COUNT_BATCHES):
        pass
    successor = start_server(KEEP_DAYS=str(KEEP.days), DATABASE_URL=url)
    wait(lambda: successor.records(user) == 0)
    sizes = [row["size"] for row in query(url, "SELECT size FROM batches WHERE size > 0")]
    assert sum(sizes) == 2500
    assert max(sizes) <= 1000


def test_sweep_passes_over_what_is_locked(sweeping: Server) -> None:
    user, other = sweeping.register(), sweeping.register()
    lock = f"SELECT FROM wav_to_mp3.records WHERE id_user = {user.id} FOR UPDATE"
    with ExitStack() as turn:
        turn.enter_context(uncommitted(sweeping.database_url, TURN))
        store_many(sweeping, user, [datetime.now(UTC) - KEEP] * 5)
        with uncommitted(sweeping.database_url, lock):
            turn.close()
            store_many(sweeping, other, [datetime.now(UTC) - KEEP] * 5)
            wait(lambda: sweeping.records(other) == 0)
            assert sweeping.records(user) == 5
    wait(lambda: sweeping.records(user) == 0)


def sweeps(server: Server) -> Callable[[], bool]:
    """Return what tells whether there have been two further attempts since."""
    sql = """
        SELECT max(query_start) AS last FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '%wav-to-mp3 sweep%'
        AND pid <> pg_backend_pid()
    """
    seen = {query(server.database_url, sql)[0]["last"]}

    def further() -> bool:
        seen.add(query(server.database_url, sql)[0]["last"])
        return len(seen) > 3

    return further


def test_one_process_sweeps_at_a_time(sweeping: Server) -> None:
    user = sweeping.register()
    with uncommitted(sweeping.database_url, TURN):
        store_many(sweeping, user, [datetime.now(UTC) - KEEP] * 5)
        wait(sweeps(sweeping))
        assert sweeping.records(user) == 5
    wait(lambda: sweeping.records(user) == 0)


FAIL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'the database is out of sorts'; END $$;
CREATE TRIGGER fail BEFORE DELETE ON wav_to_mp3.records EXECUTE FUNCTION fail()
"""


def test_sweep_goes_on_after_a_failure(sweeping: Server) -> None:
    user = sweeping.register()
    with uncommitted(sweeping.database_url, FAIL):
        pass
    try:
        store_many(sweeping, user, [datetime.now(UTC) - KEEP])
        wait(lambda: "not swept" in sweeping.log)
    finally:
        query(sweeping.database_url, "DROP FUNCTION fail CASCADE")
    wait(lambda: sweeping.records(user) == 0)


def test_download_of_a_record_that_is_swept_is_never_short(sweeping: Server) -> None:
    user = sweeping.register()
    link, content = store_large(sweeping, user)
    with Downloading(sweeping, link) as downloading:
        age(sweeping, user)
        wait(lambda: sweeping.records(user) == 0)
        with pytest.raises(IncompleteRead) as cut:
            assert downloading.finish() == content
        assert 0 < len(cut.value.partial) < len(content)


def test_download_does_not_hold_up_the_sweep(sweeping: Server) -> None:
    user = sweeping.register()
    link, content = store_large(sweeping, user)
    assert sweeping.http.get(link).content == content
    with Downloading(sweeping, link):
        age(sweeping, user)
        wait(lambda: sweeping.records(user) == 0)
        assert sweeping.http.get(link).status_code == 404

"""The schema: in whatever state a database is, and whoever may do what in it."""

import hashlib
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support import ROOT, Postgres, Server, StartServer, User, problem, query, uncommitted
from support import wait_for as wait
from wav import SPEECH
from wire import link_of

NEW = (ROOT / "db.sql").read_text()
OLD = (ROOT / "tests" / "lib" / "db-0.9.sql").read_text()  # as the last release without a schema

BOB = User(1, str(uuid.UUID(int=1)))
ROWS = f"""
INSERT INTO users (username, token_sha256) VALUES
    ('Bob', sha256('{BOB.token}')), ('Carol', sha256('none'));
INSERT INTO records
    (id_user, id_record, filename, size, sha256, duration, idempotency_key, wav_sha256, mp3)
VALUES
    (1, gen_random_uuid(), 'a.mp3', 5, sha256('first'), 1, 'key', sha256('wav'), 'first'),
    (1, gen_random_uuid(), 'b.mp3', 6, sha256('second'), 2, 'none', NULL, 'second');
"""


def execute(url: str, sql: str) -> None:
    """Run any number of statements in a transaction."""
    with uncommitted(url, sql):
        pass


def lines(sql: str, start: str) -> str:
    """The statement of sql that begins so."""
    [statement] = re.findall(rf"(?sm)^{re.escape(start)}.*?;$", sql)
    return str(statement)


def listing(server: Server, user: User) -> httpx.Response:
    return server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)


def everything_works(server: Server) -> None:
    user = server.register()
    headers = {"Idempotency-Key": "key"}
    link = link_of(server.upload(user, SPEECH, headers=headers))
    assert link_of(server.upload(user, SPEECH, headers=headers)) == link
    size = len(server.http.get(link).content)
    link_of(server.upload(user, SPEECH))
    assert kept(server, user) == 2 * size
    assert server.http.delete(link, headers=user.bearer).status_code == 204
    assert kept(server, user) == size
    assert len(listing(server, user).json()["records"]) == 1
    renewed = server.http.post("/api/token/", headers=user.bearer).json()
    headers = User(*renewed.values()).bearer
    assert server.http.delete("/api/registration/", headers=headers).status_code == 204
    assert server.records(user) == 0


def kept(server: Server, user: User) -> int:
    sql = "SELECT kept_bytes FROM wav_to_mp3.users WHERE id_user = $1"
    return int(query(server.database_url, sql, user.id)[0]["kept_bytes"])


# The tables of the last release


@pytest.fixture
def old(postgres: Postgres) -> str:
    url = postgres.create_database()
    execute(url, OLD + ROWS)
    return url


def is_taken_over(server: Server) -> None:
    records = listing(server, BOB).json()["records"]
    assert [record["filename"] for record in records] == ["b.mp3", "a.mp3"] or [
        record["filename"] for record in records
    ] == ["a.mp3", "b.mp3"]  # they are of the same moment
    contents = {server.http.get(record["URL for download"]).content for record in records}
    assert contents == {b"first", b"second"}
    assert kept(server, BOB) == len("first" + "second")
    assert server.http.post("/api/registration/", json={"username": "Carol"}).status_code == 409
    assert server.register().id > 2


def test_tables_of_the_last_release_are_taken_over(
    start_server: StartServer, postgres: Postgres, old: str
) -> None:
    server = start_server(DATABASE_URL=old)
    is_taken_over(server)
    everything_works(server)
    tables = query(
        old, "SELECT to_regclass('public.users') AS u, to_regclass('public.records') AS r"
    )
    assert tuple(tables[0]) == (None, None)
    fresh = postgres.create_database()
    execute(fresh, NEW)
    assert postgres.schema(old) == postgres.schema(fresh)
    again = start_server(DATABASE_URL=old)
    is_taken_over(again)
    assert postgres.schema(old) == postgres.schema(fresh)


def test_tables_of_the_last_release_are_not_copied(start_server: StartServer, old: str) -> None:
    files = "SELECT pg_relation_filenode('{0}users'), pg_relation_filenode('{0}records')"
    before = query(old, files.format(""))
    is_taken_over(start_server(DATABASE_URL=old))
    assert query(old, files.format("wav_to_mp3.")) == before


def test_key_of_the_last_release_is_known(start_server: StartServer, old: str) -> None:
    digest = hashlib.sha256(SPEECH).hexdigest()
    execute(old, f"UPDATE records SET wav_sha256 = '\\x{digest}' WHERE idempotency_key = 'key'")
    server = start_server(DATABASE_URL=old)
    link = link_of(server.upload(BOB, SPEECH, headers={"Idempotency-Key": "key"}))
    assert server.http.get(link).content == b"first"


def test_services_that_start_at_once_take_over_once(
    start_server: StartServer, postgres: Postgres, old: str
) -> None:
    servers = [start_server(DATABASE_URL=old) for _ in range(3)]
    for server in servers:
        is_taken_over(server)
        assert "ERROR" not in server.log
    fresh = postgres.create_database()
    execute(fresh, NEW)
    assert postgres.schema(old) == postgres.schema(fresh)


def test_tables_are_taken_over_from_where_search_path_leads(
    start_server: StartServer, postgres: Postgres
) -> None:
    url = postgres.create_database()
    execute(url, "CREATE SCHEMA audio; SET LOCAL search_path = audio;" + OLD + ROWS)
    server = start_server(DATABASE_URL=f"{url}&search_path=audio")
    server.database_url = url
    is_taken_over(server)
    everything_works(server)


# What is the host's


USERS, RECORDS = (
    lines(OLD, f"CREATE TABLE IF NOT EXISTS {name} (") for name in ("users", "records")
)
THEIRS = {
    "users": "CREATE TABLE users (id serial PRIMARY KEY, name text);",
    "records": "CREATE TABLE records (id serial PRIMARY KEY, name text);",
    "users and records": """
        CREATE TABLE users (id_user serial PRIMARY KEY, username text);
        CREATE TABLE records (id_record serial PRIMARY KEY, id_user int REFERENCES users);
    """,
    "users like ours": USERS,
    "users like ours and other records": USERS + "CREATE TABLE records (id_user bigint);",
    "other users and records like ours": "CREATE TABLE users (id_user bigint PRIMARY KEY);"
    + RECORDS,
    "users like ours and more": USERS + RECORDS + "ALTER TABLE users ADD COLUMN email text;",
    "records like ours and more": USERS + RECORDS + "ALTER TABLE records ADD COLUMN note text;",
    "records less one": USERS + RECORDS + "ALTER TABLE records DROP COLUMN duration;",
    "views": "CREATE VIEW users AS SELECT 1 AS id; CREATE VIEW records AS SELECT 1 AS id;",
    "sequences": "CREATE SEQUENCE users; CREATE SEQUENCE records;",
}


@pytest.mark.parametrize("theirs", THEIRS)
def test_tables_of_a_host_are_not_touched(
    start_server: StartServer, postgres: Postgres, theirs: str
) -> None:
    url = postgres.create_database()
    execute(url, THEIRS[theirs])
    before = postgres.schema(url)
    server = start_server(DATABASE_URL=url)
    user = server.register()
    assert server.upload(user, SPEECH).status_code == 201
    execute(url, "DROP SCHEMA wav_to_mp3 CASCADE")
    assert postgres.schema(url) == before


@pytest.mark.parametrize("path", ["''", "nowhere", "pg_temp", "odd, pg_catalog", "odd"])
def test_search_path_is_neither_needed_nor_changed(
    start_server: StartServer, postgres: Postgres, role: str, path: str
) -> None:
    url = postgres.create_database()
    database = url.partition("?")[0].rpartition("/")[2]
    execute(
        url,
        f"""
        GRANT CREATE ON DATABASE {database} TO {role};
        ALTER ROLE {role} SET search_path = {path};
        CREATE SCHEMA odd;
        GRANT USAGE, CREATE ON SCHEMA odd TO {role};
        CREATE TABLE odd.users (id_user text); CREATE TABLE odd.records (size text);
        CREATE TABLE odd.changed (id_user text); CREATE TABLE odd.changes (id_user text);
        """,
    )
    server = start_server(DATABASE_URL=url.replace("postgres@", f"{role}@"), KEEP_DAYS="1")
    server.database_url = url
    everything_works(server)
    sql = "SELECT setconfig FROM pg_db_role_setting WHERE setrole = $1::text::regrole"
    assert [row["setconfig"] for row in query(url, sql, role)] == [
        ["search_path=" + path.replace("''", '""')]
    ]


# Partitions


PARTITIONS = "".join(
    f"CREATE TABLE records_{n} PARTITION OF {{0}}records"
    f" FOR VALUES WITH (MODULUS 3, REMAINDER {n});"
    for n in range(3)
)


def partitioned(create_table: str) -> str:
    return create_table.removesuffix(";") + " PARTITION BY HASH (id_user);"


@pytest.fixture
def by_hash(postgres: Postgres) -> str:
    """A database whose administrator has laid out records in partitions."""
    url = postgres.create_database()
    tables = [
        lines(NEW, f"CREATE TABLE IF NOT EXISTS wav_to_mp3.{n} (") for n in ("users", "records")
    ]
    execute(
        url,
        "CREATE SCHEMA wav_to_mp3;"
        + tables[0]
        + partitioned(tables[1])
        + PARTITIONS.format("wav_to_mp3."),
    )
    return url


def test_records_may_be_partitioned_by_hash(start_server: StartServer, by_hash: str) -> None:
    server = start_server(DATABASE_URL=by_hash, KEEP_DAYS="1", MAX_USER_BYTES="1000000")
    for _ in range(3):
        everything_works(server)
    assert "swept" not in server.log


def test_partitions_have_their_quota_and_are_swept(start_server: StartServer, by_hash: str) -> None:
    program = "import service; service.SWEEP_SECONDS = 0.05; service.main()"
    command = (sys.executable, "-c", program)
    server = start_server(command, DATABASE_URL=by_hash, KEEP_DAYS="1", MAX_USER_BYTES="1")
    users = [server.register() for _ in range(6)]
    for user in users:
        link_of(server.upload(user, SPEECH))
        problem(server.upload(user, SPEECH), 507)
    execute(by_hash, "UPDATE wav_to_mp3.records SET created_at = created_at - interval '2 days'")
    wait(lambda: not any(server.records(user) for user in users))
    for user in users:
        assert kept(server, user) == 0
        link_of(server.upload(user, SPEECH))


def test_partitions_of_the_last_release_are_taken_over(
    start_server: StartServer, postgres: Postgres
) -> None:
    url = postgres.create_database()
    execute(url, USERS + partitioned(RECORDS) + PARTITIONS.format("") + ROWS)
    for _ in range(2):
        server = start_server(DATABASE_URL=url)
        is_taken_over(server)
        everything_works(server)


# Who may do what


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"role_{uuid.uuid4().hex}"
    query(postgres.url(), f"CREATE ROLE {name} LOGIN")
    yield name


def administrator(postgres: Postgres, url: str, role: str) -> None:
    """Do what the head of db.sql says."""
    head = NEW.partition("\n\n")[0]
    commands = re.findall(r"^--     (.*?)$", head, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["psql", "GRANT", "GRANT"]
    programs = Path(postgres.schema.__self__._wheel.bin_path)  # type: ignore[attr-defined]
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PGHOST": str(postgres.directory)}
    database = url.partition("?")[0].rpartition("/")[2]
    environment |= {"PGDATABASE": database, "PGUSER": "postgres"}
    subprocess.run(
        commands[0], shell=True, check=True, cwd=ROOT, env=environment, capture_output=True
    )
    execute(
        url, ";".join(re.sub(r"\brole\b", role, command.rstrip(";")) for command in commands[1:])
    )


def test_role_that_may_create_nothing_uses_what_an_administrator_applied(
    start_server: StartServer, postgres: Postgres, role: str
) -> None:
    url = postgres.create_database()
    administrator(postgres, url, role)
    before = postgres.schema(url)
    server = start_server(DATABASE_URL=url.replace("postgres@", f"{role}@"), KEEP_DAYS="1")
    everything_works(server)
    assert "ERROR" not in server.log and "swept" not in server.log
    assert postgres.schema(url) == before


def test_administrator_takes_the_last_release_over_for_its_role(
    start_server: StartServer, postgres: Postgres, role: str
) -> None:
    url = postgres.create_database()
    execute(url, f"GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role};" + OLD + ROWS)
    administrator(postgres, url, role)
    server = start_server(DATABASE_URL=url.replace("postgres@", f"{role}@"))
    is_taken_over(server)
    everything_works(server)


UNFIT = {
    "nothing": "SELECT",
    "no grant": NEW,
    "the old tables of somebody else": OLD,
    "only reading": NEW
    + """;
        GRANT USAGE ON SCHEMA wav_to_mp3 TO PUBLIC;
        GRANT SELECT ON ALL TABLES IN SCHEMA wav_to_mp3 TO PUBLIC
    """,
    "no tables": "CREATE SCHEMA wav_to_mp3; GRANT USAGE ON SCHEMA wav_to_mp3 TO PUBLIC",
}


@pytest.mark.parametrize("state", UNFIT)
def test_role_that_lacks_rights_says_in_a_line_what_to_do(
    start_server: StartServer, postgres: Postgres, role: str, state: str
) -> None:
    url = postgres.create_database()
    execute(url, UNFIT[state])
    server = start_server(DATABASE_URL=url.replace("postgres@", f"{role}@"))
    assert server.process.wait(60) == 1
    [line] = [line for line in server.log.splitlines() if "INFO" not in line]
    assert "db.sql" in line and "administrator" in line


# Starts beside running services


BUSY = {
    "upload": """
        INSERT INTO wav_to_mp3.records
            (id_user, id_record, idempotency_key, filename, size, sha256, duration, mp3)
        VALUES (1, gen_random_uuid(), 'busy', 'x', 3, sha256('mp3'), 1, 'mp3')
    """,
    "deletion": "DELETE FROM wav_to_mp3.records WHERE id_user = 1",
    "download": "SELECT substring(mp3 FROM 1) FROM wav_to_mp3.records",
    "backup": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT FROM wav_to_mp3.records",
    "renewal": "UPDATE wav_to_mp3.users SET token_sha256 = sha256('x') WHERE id_user = 1",
}


@pytest.mark.parametrize("transaction", BUSY)
def test_start_waits_for_no_transaction_and_holds_up_none(
    start_server: StartServer, transaction: str
) -> None:
    running = start_server()
    user, other = running.register(), running.register()
    assert user.id == 1
    assert running.upload(user, SPEECH).status_code == 201
    with uncommitted(running.database_url, BUSY[transaction]):
        starting = start_server(DATABASE_URL=running.database_url)
        assert starting.url
        wait(lambda: starting.http.get("/readyz").status_code == 200)
        for server in (running, starting):
            assert server.upload(other, SPEECH).status_code == 201


# Encodings


def test_database_in_latin_1_takes_the_names_that_it_can(
    start_server: StartServer, postgres: Postgres
) -> None:
    name = f"test_{uuid.uuid4().hex}"
    query(
        postgres.url(),
        f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
    )
    server = start_server(DATABASE_URL=postgres.url(name))
    everything_works(server)
    assert server.http.post("/api/registration/", json={"username": "Zoë"}).status_code == 201
    user = server.register()
    link = link_of(server.upload(user, SPEECH, "Zoë.wav"))
    assert "Zo%C3%AB.mp3" in server.http.head(link).headers["Content-Disposition"]
    assert "name" in problem(server.http.post("/api/registration/", json={"username": "佐江"}), 422)
    assert "name" in problem(server.upload(user, SPEECH, "佐江.wav"), 422)
    assert server.records(user) == 1
    assert "Traceback" not in server.log
    wait(lambda: len(listing(server, user).json()["records"]) == 1)

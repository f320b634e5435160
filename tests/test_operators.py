"""What the README tells those who run the service with its embedded PostgreSQL to do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from readme import block, checkout, paste
from support import Postgres, Server, StartServer, User
from wav import noise, wav

pytestmark = pytest.mark.slow

BACKUP = block("sh", "pg_dump")
TOOLS = "".join(line for line in BACKUP.splitlines(True) if "pg_dump" not in line)

Paste = Callable[[str], str]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with checkout() as directory:
        yield directory


@pytest.fixture(scope="module")
def embedded(directory: Path) -> Iterator[Server]:
    """The service in a checkout, with its data beside it."""
    command = (str(directory / ".venv/bin/python"), "service.py")
    with Server({"DATA_DIR": ""}, command, cwd=directory) as server:
        assert server.url
        yield server


@pytest.fixture
def operate(embedded: Server, directory: Path, tmp_path: Path) -> Paste:
    """Paste lines in the checkout, behind those that say where the tools are."""
    return lambda lines: paste(TOOLS + lines, directory, tmp_path)


def kept(server: Server, user: User) -> list[tuple[str, bytes]]:
    """The names and the content of a user's records."""
    listing = server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)
    assert listing.status_code == 200, listing.text
    return [
        (record["filename"], server.http.get(record["URL for download"]).content)
        for record in listing.json()["records"]
    ]


def test_backup_brings_back_what_was_deleted(embedded: Server, operate: Paste) -> None:
    user = embedded.register()
    for name in ("one.wav", "two.wav"):
        embedded.upload(user, noise(100_000), name)
    before = kept(embedded, user)
    operate(block("sh", "pg_dump"))
    assert embedded.http.delete("/api/registration/", headers=user.bearer).status_code == 204
    later = embedded.register()
    operate(block("sh", "--clean"))
    assert kept(embedded, user) == before and len(before) == 2
    response = embedded.http.get(f"/api/records?id_user={later.id}", headers=later.bearer)
    assert response.status_code == 401
    assert embedded.upload(user, wav(), "three.wav").status_code == 201
    assert embedded.upload(embedded.register(), wav()).status_code == 201


def test_backup_moves_to_a_server(
    embedded: Server,
    operate: Paste,
    directory: Path,
    tmp_path: Path,
    postgres: Postgres,
    start_server: StartServer,
) -> None:
    user = embedded.register()
    embedded.upload(user, noise(100_000), "moved.wav")
    before = kept(embedded, user)
    operate(block("sh", "pg_dump"))
    url = postgres.create_database()
    paste(TOOLS + block("sh", "--no-owner"), directory, tmp_path, DATABASE_URL=url)
    server = start_server(DATABASE_URL=url)
    assert kept(server, user) == before
    assert server.upload(user, wav(), "more.wav").status_code == 201
    assert server.upload(server.register(), wav()).status_code == 201


def test_space_is_listed_freed_and_returned(embedded: Server, operate: Paste) -> None:
    answer = embedded.http.post("/api/registration/", json={"username": "Bob"}).json()
    bob, other = User(answer["id_user"], answer["user_token"]), embedded.register()
    for _ in range(5):
        assert embedded.upload(bob, noise(2_000_000)).status_code == 201
    embedded.upload(other, wav(), "kept.wav")
    size = """"$PGBIN/psql" -Atc "SELECT pg_total_relation_size('wav_to_mp3.records')"\n"""
    listing, deletion, returning = block("sh", "VACUUM").splitlines(True)
    assert "Bob" in operate(listing).splitlines()[2]  # the first row
    before = int(operate(size))
    operate(deletion)
    assert embedded.http.post("/api/registration/", json={"username": "Bob"}).status_code == 201
    operate(returning)
    assert int(operate(size)) < before - 500_000
    assert [name for name, _ in kept(embedded, other)] == ["kept.mp3"]

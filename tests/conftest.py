"""The fixtures that more than one file uses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import SERVICE, Postgres, Server, StartServer, User
from wire import watched


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three, since most tests wait for something; none for those that are over sooner."""
    return 0 if all("unit" in Path(argument).parts for argument in config.args) else 3


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    postgres = Postgres()
    try:
        postgres.start()
        yield postgres
    finally:
        postgres.remove()


@pytest.fixture(scope="session")
def server(postgres: Postgres) -> Iterator[Server]:
    """The service with its default settings."""
    with Server({"DATABASE_URL": postgres.create_database()}) as server:
        assert server.url
        yield server


@pytest.fixture
def start_server(postgres: Postgres) -> Iterator[StartServer]:
    """Starts further ones, each on an empty database unless DATABASE_URL says otherwise."""
    with ExitStack() as stack:

        def start(command: Sequence[str] = SERVICE, **settings: str) -> Server:
            if "DATABASE_URL" not in settings:
                settings["DATABASE_URL"] = postgres.create_database()
            return stack.enter_context(Server(settings, command))

        yield start


@pytest.fixture
def user(server: Server) -> User:
    return server.register()


# What may be broken, and has to recover


@pytest.fixture(scope="session")
def database() -> Iterator[Postgres]:
    """A PostgreSQL to break: whoever does repairs it."""
    database = Postgres()
    try:
        database.start()
        yield database
    finally:
        database.remove()


@pytest.fixture
def outage(database: Postgres) -> Iterator[Callable[[str], None]]:
    """Stops PostgreSQL until the test is over or starts it."""
    yield database.stop
    if not (database.directory / "postmaster.pid").exists():
        database.start()


@pytest.fixture(scope="session")
def service(database: Postgres) -> Iterator[Server]:
    with watched(database.create_database()) as server:
        yield server


@pytest.fixture(scope="session")
def impatient(database: Postgres) -> Iterator[Server]:
    """One that waits for nothing longer than a second."""
    with watched(database.create_database(), STALL_SECONDS="1") as server:
        yield server

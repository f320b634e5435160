from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

import pytest
from support import SERVICE, Postgres, Server, User


class StartServer(Protocol):
    def __call__(self, command: Sequence[str] = SERVICE, **settings: str) -> Server: ...


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

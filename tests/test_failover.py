"""The primary of two PostgreSQLs is lost, and its synchronous standby takes its place."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Event
from typing import NamedTuple, Self

import httpx
import psutil
import pytest

from load import Load
from machines import Machines
from support import Postgres, Server, Standby, each_in, wait_for
from wav import SPEECH
from wire import link_of, readiness

RECOVERY_SECONDS = 15  # from the promotion


class Reading:
    """Users that download one MP3 again and again, until the context ends."""

    def __init__(self, server: Server, users: int = 8) -> None:
        self.answers: Counter[int] = Counter()
        self.latest: dict[int, float] = {}  # success of each user, by the monotonic clock
        self._server = server
        self._link = link_of(server.upload(server.register(), SPEECH))
        self._mp3 = server.http.get(self._link).content
        self._threads = ThreadPoolExecutor(users)
        self._users = range(users)
        self._over = Event()

    def __enter__(self) -> Self:
        for user in self._users:
            self._threads.submit(self._download, user)
        wait_for(lambda: self.all_served_since(0))
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._threads.shutdown()

    def _download(self, user: int) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not self._over.wait(0.02):
                response = http.get(self._link)
                self.answers[response.status_code] += 1
                if response.content == self._mp3:
                    self.latest[user] = time.monotonic()

    def all_served_since(self, moment: float) -> bool:
        return all(self.latest.get(user, 0) > moment for user in self._users)


class Cluster(NamedTuple):
    machines: Machines
    primary: Postgres
    standby: Standby

    def url(self, *hosts: str) -> str:
        addresses = ",".join(self.machines.address(host) for host in hosts)
        return f"postgresql://postgres@{addresses}/postgres?target_session_attrs=read-write"

    def lose_machine(self) -> None:
        self.machines.vanish("primary")

    def kill(self) -> None:
        each_in(self.primary.directory, psutil.Process.kill)
        (self.primary.directory / "postmaster.pid").unlink()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A primary and its standby, each on its machine; the test is on a third one."""
    with ExitStack() as stack:
        machines = stack.enter_context(Machines("primary", "standby", "service"))
        primary = Postgres()
        stack.callback(primary.remove)
        settings = "listen_addresses = '*'\nsynchronous_standby_names = 'standby'"
        primary.configure(settings, "host all all all trust\nhost replication all all trust")
        with machines.on("primary"):
            primary.start()
        with machines.on("standby"):
            standby = Standby(machines.address("primary"))
            stack.callback(standby.remove)
            standby.start()
        stack.enter_context(machines.on("service"))
        yield Cluster(machines, primary, standby)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lose, hosts",
    [
        (Cluster.lose_machine, ("primary", "standby")),
        (Cluster.lose_machine, ("standby", "primary")),
        (Cluster.kill, ("primary", "standby")),
        (Cluster.kill, ("standby", "primary")),
    ],
    ids=["machine, first host", "machine, last host", "process, first host", "process, last host"],
)
def test_service_goes_on_with_the_standby_that_is_promoted(
    cluster: Cluster, lose: Callable[[Cluster], None], hosts: tuple[str, str]
) -> None:
    with Server({"DATABASE_URL": cluster.url(*hosts)}) as server:
        server.database_url = cluster.standby.url()
        with Reading(server) as reading, Load(server) as load:
            assert wait_for(partial(readiness, server, 200))
            lose(cluster)
            assert wait_for(partial(readiness, server, 503))
            before = len(load.acknowledged)
            cluster.standby.promote()
            promoted = time.monotonic()
            wait_for(lambda: len({user for _, user in load.acknowledged[before:]}) == 4)
            wait_for(lambda: reading.all_served_since(promoted))
            recovery = time.monotonic() - promoted
            assert wait_for(partial(readiness, server, 200))
        refused = Counter(load.refused)
        print(f"{len(load.acknowledged)} uploads, refused {refused}, downloads {reading.answers},")
        print(f"all users served {recovery:.1f} s after the promotion")
        assert recovery < RECOVERY_SECONDS
        assert not load.cut
        assert refused.keys() <= {503} and reading.answers.keys() <= {200, 503}, server.log
        assert load.all_downloads_from(server)

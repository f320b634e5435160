"""Servers that run the applications of mounts.py."""

import os
import re
import signal
import sys
from contextlib import suppress
from functools import cached_property

import httpx
import psutil

from support import ROOT, UVICORN, Server, wait_for

LIB = str(ROOT / "tests" / "lib")


class Host(Server):
    """An application with a mounted service as a process."""

    @cached_property
    def url(self) -> str:
        def listening() -> str | None:
            assert self.process.poll() is None, self.log
            address = re.search(r"(?:[Rr]unning on|Listening at:) (http://\S+)", self.log)
            with suppress(httpx.ConnectError):  # Granian tells where before it listens
                if address and httpx.get(address[1] + "/hello", trust_env=False):
                    return address[1]
            return None

        return wait_for(listening)

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Stop it: its server ends by the signal or not, and nothing is left of it."""
        children = self.children()
        self.process.send_signal(sent)
        self.process.wait(60)
        wait_for(lambda: not any(map(lives, children)))
        return 0


def in_uvicorn(factory: str) -> tuple[str, ...]:
    return *UVICORN, "--app-dir", LIB, "--factory", f"mounts:{factory}"


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def in_hypercorn(factory: str) -> tuple[str, ...]:
    return sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", f"{LIB}/mounts:{factory}()"


def in_granian(factory: str) -> tuple[str, ...]:
    # It takes no 0. Linux hands out ports from 32768 on, so nobody else is given this one.
    port = str(20_000 + os.getpid() % 10_000)
    options = "--interface", "asgi", "--port", port, "--working-dir", LIB, "--factory"
    return sys.executable, "-m", "granian", *options, f"mounts:{factory}"

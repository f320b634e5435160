"""Machines of their own, as network namespaces at one switch, of which each may vanish."""

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

HERE = Path("/proc/thread-self/ns/net")
NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # from sched.h

SWITCH = """
link add switch type bridge
link set switch up
"""
PORT = """
link add {name} type veth peer name eth0 address 02:00:00:00:00:{number:02} netns {namespace}
link set {name} master switch
link set {name} up
"""
# It knows where the others are for ever, as it knows a router: nothing tells it of one's end.
MACHINE = """
link set lo up
link set eth0 up
address add 10.0.0.{number}/24 dev eth0
"""
NEIGHBOUR = "neighbour add 10.0.0.{number} lladdr 02:00:00:00:00:{number:02} dev eth0\n"


class Machines:
    """Machines by these names, until the context ends. Skips the test where there can be none."""

    def __init__(self, *names: str) -> None:
        run = uuid.uuid4().hex[:8]
        self._switch = f"switch-{run}"
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._namespaces = {name: f"{name}-{run}" for name in names}

    def __enter__(self) -> Self:
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("network namespaces need root and iproute2")
        try:
            subprocess.run(("ip", "netns", "add", self._switch), check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"there can be no network namespace: {error.stderr.decode().strip()}")
        configure(self._switch, SWITCH)
        for name, number in self._numbers.items():
            namespace = self._namespaces[name]
            subprocess.run(("ip", "netns", "add", namespace), check=True)
            configure(self._switch, PORT.format(name=name, number=number, namespace=namespace))
            others = [other for other in self._numbers.values() if other != number]
            neighbours = [NEIGHBOUR.format(number=other) for other in others]
            configure(namespace, MACHINE.format(number=number) + "".join(neighbours))
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*self._namespaces.values(), self._switch):
            subprocess.run(("ip", "netns", "delete", namespace), stderr=subprocess.DEVNULL)

    def address(self, name: str) -> str:
        return f"10.0.0.{self._numbers[name]}"

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """What is opened, and whatever thread or process is started, is on this machine."""
        with HERE.open() as here, (NAMESPACES / self._namespaces[name]).open() as there:
            enter(there.fileno())
            try:
                yield
            finally:
                enter(here.fileno())

    def vanish(self, name: str) -> None:
        """Take the machine off the switch: nothing answers in its place."""
        configure(self._switch, f"link set {name} nomaster\n")


def configure(namespace: str, commands: str) -> None:
    ip = ("ip", "-netns", namespace, "-batch", "-")
    subprocess.run(ip, input=commands, text=True, check=True)


def enter(namespace: int) -> None:
    """Take the thread into the namespace of a descriptor; os.setns is of Python 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")

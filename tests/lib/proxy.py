"""A network that breaks: a proxy that cuts a connection when certain bytes come along."""

import socket
import threading
from contextlib import suppress
from typing import Self


class Proxy:
    """Passes on what arrives at its port; what has the bytes to cut at never arrives.

    The address is a host and a port, or the path of a Unix socket.
    """

    def __init__(self, address: tuple[str, int] | str) -> None:
        self.cut_at: bytes | None = None
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self._cut(*self._sockets)
        for thread in self._threads[1:]:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                family = socket.AF_UNIX if isinstance(self._address, str) else socket.AF_INET
                server = socket.socket(family)
                server.connect(self._address)
                self._sockets += [client, server]
                for ends in (client, server), (server, client):
                    thread = threading.Thread(target=self._pump, args=ends)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.cut_at and self.cut_at in data:
                    self.cut_at = None
                    break
                target.sendall(data)
        self._cut(source, target)

    def _cut(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

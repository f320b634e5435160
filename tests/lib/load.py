"""Users who upload while something breaks."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Self

import httpx

from support import FORM, UPLOAD, Server, User, fields, form, query, wait_for
from wav import noise

WRONG_DIGESTS = "SELECT FROM wav_to_mp3.records WHERE sha256 <> sha256(mp3)"


class Load:
    """Users that upload one WAV after the other until the service is gone or the load is over."""

    def __init__(self, server: Server, users: int = 4) -> None:
        self.acknowledged: list[tuple[str, int]] = []  # links, and which of the WAVs
        self.refused: list[int] = []
        self.cut: list[httpx.TransportError] = []
        self._server = server
        self._wavs = [noise(100_000 * number) for number in range(1, users + 1)]
        self._expected = [hashlib.sha256(server.convert(wav)).digest() for wav in self._wavs]
        self._threads = ThreadPoolExecutor(users)
        self._over = Event()

    def __enter__(self) -> Self:
        for number in range(len(self._wavs)):
            self._threads.submit(self._upload, number, self._server.register())
        wait_for(lambda: len(self.acknowledged) >= 4)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._threads.shutdown()

    def _upload(self, number: int, user: User) -> None:
        content = form(*fields(user, self._wavs[number], file_first=number % 2 == 1))
        with httpx.Client(base_url=self._server.url, timeout=60, trust_env=False) as http:
            while not self._over.is_set():
                try:
                    response = http.post(UPLOAD, content=content, headers=FORM)
                except httpx.TransportError as error:
                    self.cut.append(error)
                    return
                if response.status_code == 201:
                    self.acknowledged.append((response.headers["Location"], number))
                else:
                    self.refused.append(response.status_code)

    def has_acknowledged(self, records: int) -> bool:
        return len(self.acknowledged) >= records

    def all_downloads_from(self, server: Server) -> bool:
        """Whether each record has its digest, those acknowledged that of what was acknowledged."""
        return not query(server.database_url, WRONG_DIGESTS) and all(
            hashlib.sha256(
                server.http.get(link.replace(self._server.url, server.url)).content
            ).digest()
            == self._expected[number]
            for link, number in self.acknowledged
        )

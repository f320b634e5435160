"""What is left of a download whose client has gone."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Iterator

import pytest
from starlette.types import Message

from service import Slices


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Leave cycles in memory."""
    gc.disable()
    yield
    gc.enable()


def test_slices_of_an_abandoned_download_end_with_it() -> None:
    ended = False

    async def endless() -> AsyncGenerator[bytes]:
        nonlocal ended
        try:
            while True:
                yield b"slice"
        finally:
            ended = True

    async def abandon() -> None:
        reading = asyncio.Event()

        async def receive() -> Message:
            await reading.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message.get("body"):
                reading.set()
                await asyncio.Event().wait()  # which nobody sets: the client takes nothing

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}  # as uvicorn has it
        await Slices(endless())(scope, receive, send)
        assert ended

    asyncio.run(abandon())

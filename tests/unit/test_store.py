"""The row that an MP3 becomes."""

import asyncio
import hashlib
import os
import tempfile
import uuid

from service import COPY_BYTES, Recording, binary_row


def test_others_have_a_turn_while_a_large_mp3_is_stored() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def row(recording: Recording) -> bytes:
        running = asyncio.create_task(others())
        data = b"".join([chunk async for chunk in binary_row(recording, uuid.uuid4(), "key")])
        running.cancel()
        return data

    mp3 = os.urandom(10 * COPY_BYTES)
    with tempfile.TemporaryFile() as file:
        file.write(mp3)
        file.flush()
        recording = Recording(1, "a.mp3", 1.0, None, None, b"ID3", file)
        stored = asyncio.run(row(recording))
    assert turns >= 9
    assert b"ID3" + mp3 in stored
    assert hashlib.sha256(b"ID3" + mp3).digest() in stored

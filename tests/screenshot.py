"""Makes the README's picture of the page.

.venv/bin/python tests/screenshot.py
"""

import math
import random
import struct
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("lib"))]

from playwright.sync_api import Page  # noqa: E402

from browser import Browser, choose, chromium, register, throttle  # noqa: E402
from support import ROOT, Postgres, Server, wait_for  # noqa: E402
from wav import pcm_format, riff  # noqa: E402

RATE = 16_000
TAKES = {"Interview with Ada": 95, "Rehearsal, second set": 61, "Rain on the roof": 34}
UNDERWAY = {"Field recording at dawn": 300}


def tune(seconds: int) -> bytes:
    """Something that has loud and quiet parts."""
    chance = random.Random(seconds)
    loudness = [chance.betavariate(1, 2) * chance.choice((0.1, 1, 1)) for _ in range(seconds * 4)]
    samples = (
        round(0x7FFF * loudness[n * 4 // RATE] * math.sin(0.1 * n)) for n in range(seconds * RATE)
    )
    data = b"".join(struct.pack("<h", sample) for sample in samples)
    return riff(pcm_format(1, 16, RATE, 1), data)


def files(directory: Path, takes: dict[str, int]) -> list[Path]:
    paths = [directory / f"{name}.wav" for name in takes]
    for path, seconds in zip(paths, takes.values(), strict=True):
        path.write_bytes(tune(seconds))
    return paths


def pose(page: Page, directory: Path) -> None:
    takes, underway = files(directory, TAKES), files(directory, UNDERWAY)
    register(page, "Grace")
    choose(page, *takes)
    wait_for(lambda: page.locator(".recording").count() == len(TAKES))
    page.get_by_role("button", name="Play Rehearsal").click()
    slider = page.get_by_role("slider")
    slider.click(position={"x": 220, "y": 20})
    throttle(page, 1_200_000)
    choose(page, *underway)
    wait_for(lambda: page.get_by_role("progressbar").evaluate("bar => bar.value") > 0.4)
    page.locator("#status").evaluate("status => status.replaceChildren()")
    slider.blur()


def main() -> None:
    postgres = Postgres()
    try:
        postgres.start()
        with tempfile.TemporaryDirectory(prefix="screenshot-") as scratch:
            directory = Path(scratch)
            server = Server({"DATABASE_URL": postgres.create_database()})
            with server, chromium(directory) as address, Browser(address) as browser:
                size = {"width": 880, "height": 1000}
                page = browser.open(server.url, viewport=size, device_scale_factor=1.25)
                pose(page, directory)
                page.screenshot(path=ROOT / "page.png", full_page=True)
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()

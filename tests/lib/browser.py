"""Chromium, and what people do with a page in it."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from playwright.sync_api import BrowserContext, CDPSession, Page, expect, sync_playwright

from support import User, wait_for

CHROMIUM = shutil.which("chromium") or ""
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP plain.test 127.0.0.1",  # a host that is no secure context
)

expect.set_options(timeout=30_000)


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """Run a browser and yield the address at which it is driven.

    Not by Playwright, in whose event loop a test cannot run one of its own: so only those that
    have opened a page are without.
    """
    options = ("--remote-debugging-port=0", f"--user-data-dir={profile}")
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen((CHROMIUM, *ARGUMENTS, *options), stdout=log, stderr=log)

    def address() -> str | None:
        file = profile / "DevToolsActivePort"
        port, _, path = file.read_text().partition("\n") if file.exists() else ("", "", "")
        return f"ws://127.0.0.1:{port}{path}" if path else None

    try:
        yield wait_for(address)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Browser:
    """Opens pages, each one in a profile of its own; none may say what nobody expects."""

    def __init__(self, address: str) -> None:
        self.console: list[str] = []
        self._address = address
        self._stack = ExitStack()
        self._contexts: list[BrowserContext] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            for context in self._contexts:
                context.close()
        if not error:
            assert not self.console, self.console

    def open(self, url: str, **options: Any) -> Page:
        """Return a page at url. No test can run an event loop from then on."""
        if not self._contexts:
            playwright = self._stack.enter_context(sync_playwright())
            self._browser = playwright.chromium.connect_over_cdp(self._address)
        context = self._browser.new_context(**{"locale": "en-US", **options})
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.goto(url)
        return page

    def expect(self, text: str) -> None:
        """Take messages with this text from the console, where there has to be one."""

        def said() -> bool:
            self._contexts[-1].pages[0].title()  # what was said arrives with the answer
            return any(text in message for message in self.console)

        wait_for(said)
        self.console = [message for message in self.console if text not in message]


def protocol(page: Page) -> CDPSession:
    return page.context.new_cdp_session(page)


def drop(page: Page, *files: Path) -> None:
    """Drop files from the desktop onto the page."""
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 10, "y": 10, "data": data}
        protocol(page).send("Input.dispatchDragEvent", event)


def throttle(page: Page, bytes_per_second: int) -> None:
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1}
    conditions["uploadThroughput"] = bytes_per_second
    protocol(page).send("Network.emulateNetworkConditions", conditions)


def register(page: Page, name: str) -> None:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name=name).wait_for()


def sign_in(page: Page, user: User) -> None:
    page.get_by_text("Use an existing account").click()
    page.get_by_label("Id", exact=True).fill(str(user.id))
    page.get_by_label("Token").fill(user.token)
    page.get_by_role("button", name="Use this account").click()
    page.get_by_role("button", name=f"User {user.id}").wait_for()


def choose(page: Page, *files: Path) -> None:
    page.get_by_label("Choose files").set_input_files(files)

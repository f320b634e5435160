"""The service is ended."""

import asyncio
import os
import signal
from contextlib import ExitStack, suppress

import psutil
import pytest

from load import Load
from service import create_app, lifespan
from store import store_large
from support import Postgres, wait_for
from wav import LONG
from wire import (
    Downloading,
    Sending,
    Waiting,
    Wire,
    gone,
    recovery,
    settle,
    unavailable,
    watched,
    working,
)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_kill_9(database: Postgres) -> None:
    url = database.create_database()
    with watched(url) as killed, Load(killed) as load:
        children = killed.children()
        killed.process.kill()
        killed.process.wait()
    gone(children)
    with watched(url) as server:
        assert load.all_downloads_from(server)
        with recovery(server):
            pass


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_sigterm(database: Postgres) -> None:
    url = database.create_database()
    with watched(url) as stopped, Load(stopped) as load:
        assert stopped.stop() == 0
    assert not load.refused
    with watched(url) as server:
        assert load.all_downloads_from(server)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_work_in_progress_is_finished_after_a_signal(
    database: Postgres, sent: signal.Signals
) -> None:
    with watched(database.create_database(), MAX_ENCODERS="1") as server:
        user = server.register()
        link, content = store_large(server, user)
        with (
            Downloading(server, link) as downloading,
            Wire(server) as idle,
            Sending(server, user, LONG) as first,
            ExitStack() as stack,
        ):
            first.share(0.5)
            wait_for(lambda: working(server))
            waiting = stack.enter_context(Waiting(server, user))
            settle(server)
            children = server.children()
            os.killpg(server.process.pid, sent)  # as Ctrl-C does
            wait_for(lambda: "Waiting for connections" in server.log)
            assert idle.socket.recv(1000) == b""
            with pytest.raises(ConnectionRefusedError):
                Wire(server)
            assert first.finish().status == 201
            assert waiting.finish().status == 201
            assert downloading.finish() == content
        assert server.end(children) == 0
        assert "Traceback" not in server.log
        assert server.records(user) == 3


def test_stalled_upload_does_not_hold_up_sigterm(database: Postgres) -> None:
    with watched(database.create_database(), STALL_SECONDS="1") as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            wait_for(lambda: working(server))
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            assert sending.answer().status == 408
        assert server.end(children) == 0
        assert server.records(user) == 0


@pytest.mark.slow
def test_upload_that_does_not_end_does_not_outlast_the_grace_after_sigterm(
    database: Postgres,
) -> None:
    with watched(database.create_database(), STALL_SECONDS="3600") as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            encoders = wait_for(lambda: working(server))
            server.process.send_signal(signal.SIGTERM)
            answer = sending.answer()
            unavailable(answer)
            assert b"The service is stopping" in answer.body
        assert server.process.wait(60) == 0
        gone(encoders)
        assert server.records(user) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_service_at_once(database: Postgres, sent: signal.Signals) -> None:
    with watched(database.create_database()) as server:
        user = server.register()
        with Sending(server, user, LONG) as sending:
            sending.share(0.5)
            wait_for(lambda: working(server))
            server.process.send_signal(sent)
            wait_for(lambda: "Waiting for connections" in server.log)
            server.stop(sent)
        assert server.records(user) == 0


def test_start_that_is_cancelled_is_taken_down(database: Postgres) -> None:
    """At any moment, as Ctrl-C does."""
    app = create_app(database_url=database.create_database())

    async def run() -> None:
        async with lifespan(app):
            await asyncio.Event().wait()

    async def cancel_after(seconds: float) -> None:
        running = asyncio.create_task(run())
        await asyncio.sleep(seconds)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        assert app.state.starting is None
        assert not [each for each in psutil.Process().children() if "ffmpeg" in each.name()]

    for milliseconds in range(0, 60, 2):
        asyncio.run(cancel_after(milliseconds / 1000))

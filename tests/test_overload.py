"""More clients than encoders, and more connections than file descriptors."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest

from support import (
    SERVICE,
    UPLOAD,
    Server,
    StartServer,
    User,
    curl,
    curl_form,
    problem,
)
from support import wait_for as wait
from wav import LONG, SPEECH, wav
from wire import Sending, Waiting, Wire, peak_memory, settle, working

CLIP = wav(48_000, rate=8000, encoding="u8")  # 6 s


def busy(server: Server, user: User) -> Sending:
    """An upload that has got as far as its encoder."""
    sending = Sending(server, user, LONG)
    sending.share(0.5)
    wait(lambda: working(server))
    return sending


def test_uploads_wait_in_turn_for_an_encoder_before_they_are_read(
    start_server: StartServer,
) -> None:
    server = start_server(MAX_ENCODERS="1")
    user = server.register()
    with busy(server, user) as first, ExitStack() as stack:
        queue = []
        for number in range(1, 5):
            queue.append(stack.enter_context(Waiting(server, user)))
            waiting_now = f"wav_to_mp3_uploads_waiting {number}.0\n"
            wait(lambda: waiting_now in server.http.get("/metrics").text)  # noqa: B023
        assert not any(waiting.told() for waiting in queue)
        assert first.finish().status == 201
        while queue:
            waiting = queue.pop(0)
            wait(waiting.told)
            assert not any(later.told() for later in queue)
            assert waiting.finish().status == 201


def test_upload_that_waits_too_long_is_told_when_to_come_back(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(MAX_ENCODERS="1", QUEUE_SECONDS="0")
    user = server.register()
    (tmp_path / "speech.wav").write_bytes(SPEECH)
    arguments = *curl_form(user, "@speech.wav"), server.url + UPLOAD
    with busy(server, user) as first, ThreadPoolExecutor() as pool:
        refused = server.upload(user, SPEECH)
        assert "busy" in problem(refused, 503)
        assert int(refused.headers["Retry-After"]) > 0
        retrying = pool.submit(curl, "--retry", "9", *arguments, cwd=tmp_path)
        wait(lambda: server.log.count('" 503') == 2)
        assert first.finish().status == 201
        assert retrying.result().status == 201


@pytest.mark.slow
def test_wait_for_a_turn_is_not_held_against_an_upload(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="1", STALL_SECONDS="1")
    user = server.register()
    with busy(server, user) as first, Sending(server, user, LONG) as second:
        second.share(0.0001)  # its fields
        settle(server)
        end = time.monotonic() + 4  # later than a body of nothing may end
        while time.monotonic() < end:
            first.share(0.001)
            time.sleep(0.2)
        assert first.finish().status == 201
        waiting = "wav_to_mp3_uploads_waiting 0.0"
        wait(lambda: waiting in server.http.get("/metrics").text)
        settle(server)
        assert second.finish().status == 201


def test_dozen_slow_uploads_do_not_lock_others_out(server: Server, user: User) -> None:
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(Sending(server, user, LONG)).share(0.1)
        assert server.upload(user, LONG).status_code == 201


def test_dozen_trickling_uploads_do_not_lock_others_out(server: Server, user: User) -> None:
    done = Event()

    def trickle(uploads: list[Sending]) -> None:
        while not done.wait(0.01):
            for upload in uploads:
                upload.share(0.00001)

    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        uploads = [stack.enter_context(Sending(server, user, LONG)) for _ in range(12)]
        for upload in uploads:
            upload.share(0.1)
        stack.callback(done.set)
        pool.submit(trickle, uploads)
        assert server.upload(user, LONG).status_code == 201


def test_clients_that_leave_the_queue_leave_their_place(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="1")
    user = server.register()
    with busy(server, user) as first:
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(Waiting(server, user))
            settle(server)
        assert first.finish().status == 201
    assert server.upload(user, SPEECH).status_code == 201
    assert server.records(user) == 2


@pytest.mark.slow
def test_500_uploads_at_once_are_all_converted(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="4", QUEUE_SECONDS="3")
    user = server.register()
    link = server.upload(user, SPEECH).json()["URL for download"]
    before = peak_memory(server)
    left = 500
    while left:
        with ExitStack() as stack:
            uploads = [stack.enter_context(Sending(server, user, CLIP)) for _ in range(left)]
            for upload in uploads:
                upload.share(1)
            assert server.http.get(link).status_code == 200
            assert server.http.get("/healthz").status_code == 200
            assert server.register()
            assert len(server.encoders()) <= 5  # one of them started ahead
            statuses = [upload.answer().status for upload in uploads]
        assert set(statuses) <= {201, 503}
        left = statuses.count(503)
    assert server.records(user) == 501
    wait(lambda: len(server.encoders()) == 1)
    assert peak_memory(server) - before < 500 * 200_000  # what uvicorn reads ahead, and itself


@pytest.mark.slow
def test_running_out_of_descriptors_is_answered(start_server: StartServer) -> None:
    limited = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *SERVICE)
    server = start_server(limited)
    user = server.register()
    assert server.upload(user, SPEECH).status_code == 201
    with ExitStack() as stack:
        while server.upload(user, SPEECH).status_code == 201:
            stack.enter_context(Wire(server))
        refused = server.upload(user, SPEECH)
        assert "again" in problem(refused, 503)
    wait(lambda: server.upload(user, SPEECH).status_code == 201)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="there is no setpriv")
def test_lower_limits_of_the_operator_stay(start_server: StartServer) -> None:
    ordinary = ("setpriv", "--bounding-set=-sys_resource") if os.geteuid() == 0 else ()
    server = start_server((*ordinary, "sh", "-c", 'ulimit -d 900000 && exec "$@"', "sh", *SERVICE))
    assert server.upload(server.register(), SPEECH).status_code == 201


def test_as_many_descriptors_are_taken_as_may_be(start_server: StartServer) -> None:
    limited = ("sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh", *SERVICE)
    server = start_server(limited)
    user = server.register()
    with ExitStack() as stack:
        for _ in range(100):
            wire = stack.enter_context(Wire(server))
            wire.head("/healthz", {}, "GET")
            assert wire.answer().status == 200
        assert server.upload(user, SPEECH).status_code == 201

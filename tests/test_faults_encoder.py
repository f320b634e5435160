"""ffmpeg fails."""

import select
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from load import Load
from support import Postgres, Server, problem, script, wait_for
from wav import LONG, SPEECH, noise
from wire import Sending, gone, readiness, recovery, unavailable, watched, working, written


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("file_first, share", [(False, 0.5), (True, 1)])
def test_upload_whose_encoder_dies_or_hangs_is_answered_503(
    impatient: Server, sent: signal.Signals, file_first: bool, share: float
) -> None:
    user = impatient.register()
    with recovery(impatient):
        with Sending(impatient, user, LONG, file_first=file_first) as sending:
            sending.share(share)
            [encoder] = wait_for(lambda: working(impatient))
            encoder.suspend()  # lest it is done before
            encoder.send_signal(sent)
            unavailable(sending.finish())
        gone([encoder])
    assert impatient.records(user) == 0


@pytest.mark.slow
def test_encoder_that_gets_on_slowly_is_waited_for(impatient: Server) -> None:
    user = impatient.register()
    with (
        recovery(impatient),
        Sending(impatient, user, noise(30_000_000), file_first=True) as sending,
    ):
        sending.share(1)
        [encoder] = wait_for(lambda: working(impatient))

        def get_on() -> None:
            encoder.suspend()
            before = written(encoder)
            assert not select.select([sending.socket], [], [], 0.4)[0]
            encoder.resume()
            wait_for(lambda: written(encoder) > before)

        for _ in range(6):  # longer altogether than it may stand still
            get_on()
        assert sending.answer().status == 201


def test_encoder_that_dies_before_its_upload_is_replaced(service: Server) -> None:
    user = service.register()
    with recovery(service):
        [spare] = wait_for(service.encoders)
        spare.kill()
        gone([spare])
        assert service.upload(user, SPEECH).status_code == 201


def test_ffmpeg_in_a_script_ends_with_its_upload(database: Postgres, tmp_path: Path) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    script(ffmpeg, f'{get_ffmpeg_exe()} "$@"; exit $?')
    with watched(database.create_database(), FFMPEG=str(ffmpeg)) as server:
        user = server.register()
        with Sending(server, user, LONG, file_first=True) as sending:
            sending.share(1)
            encoders = wait_for(lambda: working(server))
            for encoder in encoders:
                encoder.suspend()  # lest it is done before the client has gone
        gone(encoders)
        children = server.children()
        server.process.terminate()
        server.process.wait(60)
        gone(children)  # the script's too, which are not the service's to wait for


@pytest.fixture(scope="module")
def exchangeable(database: Postgres) -> Iterator[tuple[Server, Path]]:
    """A service and its ffmpeg, which is a link."""
    with tempfile.TemporaryDirectory() as directory:
        ffmpeg = Path(directory) / "ffmpeg"
        with watched(database.create_database(), FFMPEG=str(ffmpeg)) as server:
            assert server.url  # with no ffmpeg there at all
            yield server, ffmpeg


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "not executable": lambda path: path.write_text("#!/bin/sh\n"),
    "no program": lambda path: script(path, "", interpreter="\x7fELF"),
    "silent": lambda path: script(path, "exit 1"),
    "killed": lambda path: script(path, "echo '[error] Cannot allocate memory' >&2; kill -9 $$"),
    "silent at the end": lambda path: script(path, "while read -r _; do :; done; exit 3"),
    "without its libraries": lambda path: script(
        path, "echo 'ffmpeg: error while loading shared libraries: libx' >&2; exit 127"
    ),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_upload_without_a_working_ffmpeg_is_answered_503(
    exchangeable: tuple[Server, Path], break_it: Callable[[Path], object]
) -> None:
    server, ffmpeg = exchangeable

    def exchange(make: Callable[[Path], object]) -> None:
        if ffmpeg.is_dir():
            ffmpeg.rmdir()
        ffmpeg.unlink(missing_ok=True)
        make(ffmpeg)
        spares = server.encoders()
        for spare in spares:
            spare.kill()
        gone(spares)

    exchange(lambda path: path.symlink_to(get_ffmpeg_exe()))
    user = server.register()
    with recovery(server):
        exchange(break_it)
        for file_first in (False, True):
            unavailable(server.upload(user, SPEECH, file_first=file_first))
        assert "ffmpeg" in problem(wait_for(partial(readiness, server, 503)), 503)
        assert server.http.get("/healthz").status_code == 200
        exchange(lambda path: path.symlink_to(get_ffmpeg_exe()))
        assert wait_for(partial(readiness, server, 200))
    assert server.records(user) == 0


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_where_encoders_are_killed(service: Server) -> None:
    with recovery(service):
        with Load(service) as load:
            for wanted in range(10, 40, 10):
                wait_for(partial(load.has_acknowledged, wanted))
                for encoder in service.encoders():
                    with suppress(psutil.NoSuchProcess):
                        encoder.kill()
            wait_for(partial(load.has_acknowledged, 40))
        assert not load.cut
        assert set(load.refused) <= {503}
        assert load.all_downloads_from(service)

"""The client goes away, or stalls."""

import select
import socket
import struct
import time
from contextlib import ExitStack, suppress

import pytest

from store import store_large
from support import FORM, UPLOAD, Server, wait_for
from wav import LONG, noise
from wire import Downloading, Sending, Wire, gone, recovery, working

# It goes away


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("share, reset", [(0, False), (0.5, False), (0.5, True)])
def test_client_that_goes_away_during_the_upload_leaves_nothing(
    service: Server, file_first: bool, share: float, reset: bool
) -> None:
    user = service.register()
    with recovery(service), Sending(service, user, LONG, file_first=file_first) as sending:
        sending.share(share)
        if share and not file_first:
            wait_for(lambda: working(service))
        if reset:
            at_once = struct.pack("ii", 1, 0)
            sending.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    assert service.records(user) == 0


def test_client_that_goes_away_during_the_encoding_leaves_nothing(service: Server) -> None:
    user = service.register()
    with recovery(service):
        with Sending(service, user, LONG, file_first=True) as sending:
            sending.share(1)
            [encoder] = wait_for(lambda: working(service))
            encoder.suspend()  # lest it is done before the client has gone
        gone([encoder])
    assert service.records(user) == 0


def test_client_that_goes_away_during_the_download_leaves_nothing(service: Server) -> None:
    link, content = store_large(service, service.register())
    with recovery(service), Downloading(service, link):
        pass
    assert service.http.get(link).content == content


def test_many_clients_that_go_away_together_leave_nothing(service: Server) -> None:
    user = service.register()
    with recovery(service), ExitStack() as stack:
        for number in range(10):
            sending = Sending(service, user, LONG, file_first=number % 2 == 0)
            stack.enter_context(sending).share(number / 10)
        wait_for(lambda: working(service))
    assert service.records(user) == 0


# It stalls


@pytest.mark.slow
def test_stalled_body_is_answered_408(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), ExitStack() as stack:
        stalled: list[Wire] = []
        for share in (0, 0.001, 0.5):
            for file_first in (False, True):
                sending = Sending(impatient, user, LONG, file_first=file_first)
                stalled.append(stack.enter_context(sending))
                sending.share(share)
        bodies = {UPLOAD: b"5\r\n--fro\r\n", "/api/registration/": b'5\r\n{"use\r\n'}
        for target, body in bodies.items():
            wire = stack.enter_context(Wire(impatient))
            wire.head(target, {**FORM, "Transfer-Encoding": "chunked"})
            wire.send(body)
            stalled.append(wire)
        assert [wire.answer().status for wire in stalled] == [408] * 8
    assert impatient.records(user) == 0


def test_body_that_trickles_for_ever_is_answered_408(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), Sending(impatient, user, LONG) as sending:

        def answered() -> bool:
            sending.share(2e-7)  # a byte
            return bool(select.select([sending.socket], [], [], 0.05)[0])

        wait_for(answered)
        assert sending.answer().status == 408
    assert impatient.records(user) == 0


@pytest.mark.slow
def test_body_that_arrives_slowly_but_as_fast_as_a_recording_is_taken(impatient: Server) -> None:
    user = impatient.register()
    with recovery(impatient), Sending(impatient, user, noise(100_000)) as sending:
        sending.share(0.1)
        end = time.monotonic() + 4  # later than a body of nothing may end
        while time.monotonic() < end:
            assert not select.select([sending.socket], [], [], 0.2)[0]
            sending.share(0.0001)
        assert sending.finish().status == 201


def test_request_head_that_does_not_arrive_is_cut_off(impatient: Server) -> None:
    with (
        recovery(impatient),
        Wire(impatient) as silent,
        Wire(impatient) as half,
        Wire(impatient) as second,
    ):
        second.head("/healthz", {}, "GET")
        assert second.answer().status == 200
        for wire in (half, second):
            wire.send(b"POST /api/registration/ HTTP/1.1\r\nHost: ")
        for wire in (silent, half, second):
            cut_off(wire)


@pytest.mark.parametrize(
    "headers, rest",
    [
        ({}, b"\r\n"),
        ({"Content-Length": "9"}, b"1"),
        ({"Transfer-Encoding": "chunked"}, b"no chunk\r\n"),
    ],
)
def test_connection_on_which_no_other_request_comes_is_cut_off(
    impatient: Server, headers: dict[str, str], rest: bytes
) -> None:
    with recovery(impatient), Wire(impatient) as wire:
        wire.head("/healthz", headers, "GET")
        assert wire.answer().status == 200
        wire.send(rest)
        cut_off(wire)


def cut_off(wire: Wire) -> None:
    wire.socket.settimeout(10)
    with suppress(ConnectionResetError):
        while wire.socket.recv(1000):
            pass


def test_download_in_progress_does_not_mind_half_a_head(impatient: Server) -> None:
    link, content = store_large(impatient, impatient.register())
    with recovery(impatient), Downloading(impatient, link) as downloading:
        downloading.send(b"GET /heal")
        time.sleep(2)  # longer than a head may take
        assert downloading.finish() == content

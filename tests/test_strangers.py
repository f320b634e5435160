"""What costs a stranger little must not cost the service or its owners much."""

import json
import re
import select
import sys
import time
from contextlib import ExitStack
from http.client import IncompleteRead

import psutil
import pytest

from store import store, store_large
from support import (
    FORM,
    ROOT,
    UPLOAD,
    Postgres,
    Server,
    StartServer,
    User,
    credentials,
    form,
    part,
    problem,
    query,
    wait_for,
)
from wav import LONG, SPEECH, noise
from wire import Downloading, Sending, Wire, link_of, peak_memory, settle, unavailable, working

STRANGER = User(1, "wrong")
MIB = 1 << 20


def cpu_seconds(server: Server) -> float:
    return float(psutil.Process(server.process.pid).cpu_times().user)


def test_username_of_combining_marks_costs_nothing(server: Server) -> None:
    marks = "\u0301" * 9_000 + "\u0316" * 9_000  # which belong the other way round
    content = json.dumps({"username": "a" + marks}, ensure_ascii=False).encode()
    length = {"Content-Length": str(len(content))}
    before = cpu_seconds(server)
    with ExitStack() as stack:
        attack = [stack.enter_context(Wire(server)) for _ in range(20)]
        for wire in attack:
            wire.head("/api/registration/", length)
            wire.send(content)
        assert server.register()
        assert [wire.answer().status for wire in attack] == [422] * 20
    assert cpu_seconds(server) - before < 2  # to normalise one of them takes one


def test_requests_whose_answers_nobody_reads_take_no_memory(start_server: StartServer) -> None:
    server = start_server()
    user = server.register()
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10_000
    server.upload(user, SPEECH)
    before = peak_memory(server)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server, receive_buffer=4096)) for _ in range(50)]
        sent = {wire.socket: 0 for wire in wires}
        for each in sent:
            each.setblocking(False)
        # Until each of them has sent 20 MB or is held back.
        while ready := select.select([], [s for s in sent if sent[s] < 20 * MIB], [], 1)[1]:
            for each in ready:
                try:
                    sent[each] += each.send(requests)
                except ConnectionError:  # aborted
                    sent[each] = 20 * MIB
        assert server.upload(user, SPEECH).status_code == 201
        assert peak_memory(server) - before < 50 * MIB


# Uploads


@pytest.mark.parametrize("number", [32, 320])
def test_strangers_that_trickle_do_not_delay_an_owner(
    start_server: StartServer, number: int
) -> None:
    server = start_server(MAX_ENCODERS="1", QUEUE_SECONDS="0")
    user = server.register()
    wav = part("file_wav", noise(10_000), "speech.wav")
    beginnings = [b"", b"--frontier\r\nContent-", *credentials(STRANGER)[:1], wav[:2000]]
    with ExitStack() as stack:
        strangers = [stack.enter_context(Wire(server)) for _ in range(number)]
        for place, stranger in enumerate(strangers):
            stranger.head(UPLOAD, {**FORM, "Content-Length": "1000000"})
            stranger.send(beginnings[place % len(beginnings)])
        settle(server)
        for _ in range(3):
            for place, stranger in enumerate(strangers):
                stranger.send(b"x" if place % len(beginnings) == 3 else b"")
            assert server.upload(user, SPEECH).status_code == 201
        assert not working(server)
        assert len(server.encoders()) <= 1  # started ahead


def test_file_before_its_credentials_may_have_64_mib(start_server: StartServer) -> None:
    server = start_server()
    user = server.register()
    server.upload(user, SPEECH)
    before = peak_memory(server)
    start = part("file_wav", b"", "speech.wav")[:-2]
    pieces = [start, *[bytes(MIB)] * 64, b"x", b"\r\n", *credentials(user), form()]
    length = str(sum(map(len, pieces)))
    response = server.http.post(
        UPLOAD, content=iter(pieces), headers={**FORM, "Content-Length": length}
    )
    assert "Send user_token and id_user before file_wav" in problem(response, 413)
    assert peak_memory(server) - before < 16 * MIB
    pieces.remove(b"x")
    response = server.http.post(UPLOAD, content=iter(pieces), headers=FORM)
    assert "not a WAV" in problem(response, 422)


def test_of_files_before_their_credentials_the_slowest_gives_way(
    start_server: StartServer,
) -> None:
    server = start_server()
    user = server.register()
    with ExitStack() as stack:

        def begin(share: float) -> Sending:
            sending = stack.enter_context(Sending(server, STRANGER, LONG, file_first=True))
            sending.share(share)
            settle(server)
            return sending

        slow, fast = [begin(0.01) for _ in range(14)], [begin(0.5) for _ in range(3)]
        assert server.upload(user, LONG, file_first=True).status_code == 201
        answered, _, _ = select.select([each.socket for each in (*slow, *fast)], [], [], 0)
        refused = [each for each in slow if each.socket in answered]
        assert len(refused) == len(answered) == 2
        for each in refused:
            answer = each.answer()
            unavailable(answer)
            assert b"before file_wav" in answer.body
        assert [each.finish().status for each in fast] == [401] * 3


# Downloads

IMPATIENT = "import service; service.UNTAKEN_SECONDS = 1; service.main()"


def test_download_that_is_not_taken_costs_little(start_server: StartServer) -> None:
    server = start_server()
    link, _ = store_large(server, server.register())
    server.http.get(link)
    before = peak_memory(server)
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(Downloading(server, link))
        settle(server)
        assert server.http.get("/api/records").status_code == 401  # the database is within reach
        assert peak_memory(server) - before < 100 * 300 * 1024


def test_download_that_is_not_taken_for_long_is_dropped(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server = start_server((sys.executable, "-c", IMPATIENT))
    link, _ = store_large(server, server.register())
    with ExitStack() as stack:
        downloads = [stack.enter_context(Downloading(server, link)) for _ in range(20)]
        server.http.close()
        wait_for(lambda: not connections(server))
        for downloading in downloads:
            with pytest.raises((ConnectionError, IncompleteRead)):
                downloading.finish()


# Sockets that hold little, so that the end of an answer waits in the service.
SMALL_BUFFERS = """
import socket, service

class Protocol(service.Protocol):
    def connection_made(self, transport):
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)

service.Protocol = Protocol
service.main()
"""


@pytest.mark.slow
def test_end_of_a_download_waits_for_a_client_that_pauses(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server = start_server((sys.executable, "-c", SMALL_BUFFERS), STALL_SECONDS="1")
    content = bytes(60_000)
    link = store(server, server.register(), content)
    with Wire(server, receive_buffer=4096) as wire:
        wire.head(link.removeprefix(server.url), {}, "GET")
        with wire.response("GET") as response:
            time.sleep(3)  # longer than a further request may take
            assert response.read() == content


def connections(server: Server) -> list[object]:
    """Those of its clients."""
    process = psutil.Process(server.process.pid)
    return [each for each in process.net_connections("tcp") if each.status == "ESTABLISHED"]


# Health


def test_readyz_stays_ready_and_cheap_however_often_it_is_asked(
    start_server: StartServer, postgres: Postgres
) -> None:
    server = start_server()
    server.register()
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database()"
    for _ in range(3):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server)) for _ in range(200)]
            for wire in wires:
                wire.head("/readyz", {}, "GET")
            most = 0
            while not select.select([wire.socket for wire in wires], [], [], 0.001)[0]:
                most = max(most, len(server.children()))
            assert [wire.answer().status for wire in wires] == [200] * 200
            assert most <= 3  # an encoder started ahead, and what is looked at
    assert len(query(server.database_url, sql)) <= 5


# Logs


def test_nothing_secret_and_nothing_long_stands_in_the_log(server: Server, user: User) -> None:
    link = link_of(server.upload(user, SPEECH))
    [id_record] = re.findall("id_record=([^&]+)", link)
    targets = [
        link.removeprefix(server.url),
        f"/api/records?id_user={user.id}&user_token={user.token}",
        f"{UPLOAD}?user_token={user.token}",
        "/%0A%1B[31mINFO%0D%00",
        "/" + "x" * 50_000,
        "/?" + "x" * 50_000,
    ]
    mark = len(server.log)
    for method in "GET", "DELETE", "M" * 10_000:
        for target in targets:
            with Wire(server) as wire:
                wire.head(target, user.bearer, method)
                assert 200 <= wire.answer().status < 500
    log = server.log[mark:]
    assert user.token not in log and id_record not in log
    assert not re.search(r"[^\n\x20-\x7e]", log)
    lines = log.splitlines()
    assert len(lines) == 3 * len(targets)
    assert max(map(len, lines)) < 400


# Browsers


def test_page_of_another_origin_changes_nothing(server: Server, user: User) -> None:
    link = link_of(server.upload(user, SPEECH))
    elsewhere = {"Sec-Fetch-Site": "cross-site", **user.bearer}
    problem(server.http.post("/api/registration/", json={"username": "x"}, headers=elsewhere), 403)
    problem(server.http.delete(link, headers=elsewhere), 403)
    problem(server.upload(user, SPEECH, headers=elsewhere), 403)
    assert server.http.get(link, headers=elsewhere).status_code == 200
    assert server.records(user) == 1

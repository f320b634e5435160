import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hosts import Host, in_granian, in_hypercorn, in_uvicorn
from mounts import HELLO, MISSING
from support import (
    FORM,
    ROOT,
    UPLOAD,
    Postgres,
    Server,
    StartServer,
    User,
    curl,
    curl_form,
    problem,
    query,
    script,
    uncommitted,
    wait_for,
    waiting_for_locks,
)
from wav import LONG, SPEECH, decoded
from wire import Sending, working


def register(url: str, username: str | None = None) -> User:
    reply = curl(
        "-d", json.dumps({"username": username or uuid.uuid4().hex}), f"{url}/api/registration/"
    )
    assert reply.status == 201, reply.body
    return User(*reply.json().values())


def upload(url: str, user: User, *options: str) -> str:
    """Return the link of an upload by curl."""
    reply = curl(*curl_form(user), *options, url + UPLOAD, stdin=SPEECH)
    assert reply.status == 201, reply.body
    return str(reply.json()["URL for download"])


def plays(link: str) -> bool:
    return len(decoded(curl(link).body).samples) == len(decoded(SPEECH).samples)


# In the frameworks and under the servers


@pytest.fixture(
    scope="module",
    params=[
        in_uvicorn("starlette"),
        in_uvicorn("fastapi"),
        in_uvicorn("litestar"),
        in_uvicorn("quart"),
        in_uvicorn("django"),
        in_hypercorn("quart"),
        in_granian("fastapi"),
    ],
    ids=lambda command: f"{command[-1].rpartition(':')[2]} in {command[2]}",
)
def host(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Host]:
    with Host({"DATABASE_URL": postgres.create_database()}, request.param) as host:
        yield host


@pytest.mark.parametrize("prefix", ["/audio", "/managed"])
def test_service_works_under_its_prefix(host: Host, prefix: str) -> None:
    link = upload(host.url + prefix, register(host.url + prefix))
    assert link.startswith(f"{host.url}{prefix}/api/download?id_record=")
    assert plays(link)


@pytest.mark.parametrize("prefix", ["/audio", "/managed"])
def test_mistakes_under_the_prefix_are_problems(host: Host, prefix: str) -> None:
    problem(host.http.get(f"{prefix}/hello"), 404)
    problem(host.http.get(f"{prefix}/api/download"), 404)
    response = host.http.get(f"{prefix}/api/registration/")
    problem(response, 405)
    assert set(response.headers["Allow"].split(", ")) == {"DELETE", "POST"}
    response = host.http.get(f"{prefix}/api/records")
    problem(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    problem(host.http.post(f"{prefix}/api/registration/", content=b"{"), 400)
    problem(host.http.post(prefix + UPLOAD, content=b"", headers=FORM), 400)


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/api/records", "/api/registration/", "/hello/1"]
)
def test_pages_of_the_host_stay_its_own(host: Host, path: str) -> None:
    assert host.http.get("/hello").text == HELLO
    response = host.http.get(path)
    assert (response.status_code, response.text) == (404, MISSING)


# With nothing but a mount line


def test_first_requests_bring_up_one_pool(postgres: Postgres) -> None:
    database_url = postgres.create_database()
    settings = {"DATABASE_URL": f"{database_url}&application_name=mounted"}
    with Host(settings, in_uvicorn("middleware")) as host:
        assert not connections(database_url)
        with ThreadPoolExecutor(20) as pool:
            users = list(pool.map(register, [host.url] * 20))
        assert len({user.id for user in users}) == 20
        assert 1 <= connections(database_url) <= 10
        wait_for(lambda: len(host.encoders()) == 1)


def test_host_starts_and_stops_what_it_owns(postgres: Postgres) -> None:
    database_url = postgres.create_database()
    settings = {"DATABASE_URL": f"{database_url}&application_name=mounted"}
    with Host(settings, in_uvicorn("starlette")) as host:
        assert host.url
        assert connections(database_url) == len(host.encoders()) == 1
        host.stop()
        assert connections(database_url) == 0


def connections(database_url: str) -> int:
    sql = """
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'mounted'
    """
    return len(query(database_url, sql))


def test_service_comes_up_when_its_database_does(database: Postgres) -> None:
    database_url = database.create_database()
    database.stop()
    with Host({"DATABASE_URL": database_url}, in_uvicorn("middleware")) as host:
        try:
            for _ in range(2):
                response = host.http.post("/api/registration/", json={"username": "Bob"})
                assert "database" in problem(response, 503)
                assert int(response.headers["Retry-After"]) > 0
        finally:
            database.start()
        assert plays(upload(host.url, register(host.url)))


def test_service_comes_up_when_its_database_is_created(database: Postgres) -> None:
    settings = {"DATABASE_URL": database.url("later")}
    with Host(settings, in_uvicorn("middleware")) as host:
        response = host.http.post("/api/registration/", json={"username": "Bob"})
        assert "database" in problem(response, 503)
        query(database.url(), "CREATE DATABASE later")
        assert plays(upload(host.url, register(host.url)))


# With arguments of the host's


@pytest.fixture
def databases(postgres: Postgres) -> dict[str, str]:
    names = ("DATABASE_URL", "OTHER_DATABASE_URL", "POOL_DATABASE_URL")
    return {name: postgres.create_database() for name in names}


def test_services_with_databases_of_their_own_live_in_one_process(
    databases: dict[str, str],
) -> None:
    with Host(databases, in_uvicorn("arguments")) as host:
        users = [register(f"{host.url}/{path}", "Bob") for path in ("one", "other", "pooled")]
        assert [user.id for user in users] == [1, 1, 1]
        assert plays(upload(f"{host.url}/one", users[0]))
        assert plays(upload(f"{host.url}/pooled", users[2]))
        link = upload(f"{host.url}/other", users[1], "-H", "Host: 'hostile'")
        assert link.startswith("https://audio.example/mp3/api/download?")
        assert plays(link.replace("https://audio.example/mp3", f"{host.url}/other"))
        host.stop()
        assert "of the pool: still open" in host.log
    assert [stored(database_url) for database_url in databases.values()] == [["Bob"]] * 3


def stored(database_url: str) -> list[str]:
    return [row["username"] for row in query(database_url, "SELECT username FROM wav_to_mp3.users")]


def test_query_that_takes_longer_than_the_pool_allows_is_not_repeated(
    databases: dict[str, str],
) -> None:
    with Host(databases, in_uvicorn("arguments")) as host:
        registration = f"{host.url}/pooled/api/registration/"
        with uncommitted(databases["POOL_DATABASE_URL"], "LOCK TABLE wav_to_mp3.users"):
            assert curl("-d", '{"username": "Bob"}', registration).status == 503
        assert "again" not in host.log
        assert register(f"{host.url}/pooled", "Bob")


# What an import must not do: write, connect, start processes or threads.
IMPORT = """
import sys, threading

DOES = ("os.", "shutil.", "signal.", "socket.", "subprocess.", "tempfile.")

def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    harmless = event in ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
    if writes or event.startswith(DOES) and not harmless:
        print(event, arguments)

import asyncio, tempfile, uvicorn, asyncpg, starlette.applications  # what these do is theirs
sys.addaudithook(audit)
import service
if threading.active_count() > 1:
    print(threading.enumerate())
"""


def test_import_does_nothing_but_define(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", IMPORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


# Links


@pytest.fixture(scope="module")
def behind_proxy(postgres: Postgres) -> Iterator[Host]:
    """An application that a proxy has at /behind."""
    command = (*in_uvicorn("starlette"), "--root-path", "/behind")
    with Host({"DATABASE_URL": postgres.create_database()}, command) as host:
        yield host


@pytest.mark.parametrize(
    "prefix", ["/audio", "/named", "/outer/inner", "/f%C3%BCr%20alle", "/Bob&Co/audio"]
)
def test_links_lead_through_every_kind_of_mount(behind_proxy: Host, prefix: str) -> None:
    url = behind_proxy.url + prefix
    link = upload(url, register(url))
    public = f"{behind_proxy.url}/behind{prefix.replace('&', '%26')}"
    assert link.startswith(f"{public}/api/download?id_record=")
    assert plays(link.replace("/behind", "", 1))


@pytest.mark.parametrize(
    "authority",
    ["localhost", "audio.example:8443", "AUDIO.example", "[::1]:5000", "[2001:db8::1]", "10.0.0.1"],
)
def test_links_begin_with_the_host_that_was_called(server: Server, authority: str) -> None:
    link = upload(server.url, server.register(), "-H", f"Host: {authority}")
    assert link.startswith(f"http://{authority}/api/download?")


def test_links_have_the_scheme_that_the_proxy_tells(server: Server) -> None:
    forwarded = "-H", "X-Forwarded-Proto: https", "-H", "Host: audio.example"
    link = upload(server.url, server.register(), *forwarded)
    assert link.startswith("https://audio.example/api/download?")


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Forwarded-Prefix", "Forwarded"])
def test_links_do_not_follow_headers_that_the_server_ignores(server: Server, name: str) -> None:
    link = upload(server.url, server.register(), "-H", f"{name}: host=evil.example")
    assert link.startswith(f"{server.url}/api/download?")


def test_links_have_an_ipv6_address(start_server: StartServer) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server = start_server(HOST="::1")
    assert server.url.startswith("http://[::1]:")
    link = upload(server.url, server.register())
    assert link.startswith(f"{server.url}/api/download?")
    assert plays(link)


@pytest.fixture(scope="module")
def owner(server: Server) -> User:
    """The owner of one record."""
    user = server.register()
    upload(server.url, user)
    return user


@pytest.mark.parametrize(
    "hostile",
    [
        *('a"b', "a'b", "a b", "a/b", "a\\b", "a?b", "a#b", "a,b", "a;b", "a&b", "a`b`", "a$(b)"),
        *("<b>", "me@a", "a:b", "a:80:80", "a:99999", "[::1", "::1", "[a]"),
    ],
)
def test_hostile_host_is_refused(server: Server, owner: User, hostile: str) -> None:
    headers = {"Host": hostile, **owner.bearer}
    for path in ("/", f"/api/records?id_user={owner.id}"):
        assert "Host" in problem(server.http.get(path, headers=headers), 400)
    path = f"{UPLOAD}?id_user={owner.id}"
    response = server.http.post(path, files={"file_wav": SPEECH}, headers=headers)
    assert "Host" in problem(response, 400)
    assert server.records(owner) == 1


@pytest.mark.parametrize("hostile", [b"a\nb", b"a\r\n b", b"a\0b", b"a\r\nHost: b"])
def test_host_that_is_no_header_is_refused(server: Server, hostile: bytes) -> None:
    address = server.http.base_url
    with socket.create_connection((address.host, address.port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % hostile)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


# Behind a middleware


@pytest.fixture(scope="module")
def wrapped(postgres: Postgres) -> Iterator[Host]:
    """An application with a middleware that reads on, and one that compresses."""
    settings = {"DATABASE_URL": postgres.create_database()}
    with Host(settings, in_uvicorn("middleware")) as host:
        yield host


def test_upload_streams_through_a_middleware(wrapped: Host) -> None:
    with Sending(wrapped, wrapped.register(), LONG) as sending:
        sending.share(0.5)
        wait_for(lambda: working(wrapped))
        answer = sending.finish()
    assert answer.status == 201
    assert answer.headers["X-Passed"] == "yes"
    assert answer.headers["Location"] == json.loads(answer.body)["URL for download"]


def test_answers_pass_a_middleware(wrapped: Host) -> None:
    user = wrapped.register()
    response = wrapped.upload(user, SPEECH)
    assert response.status_code == 201
    assert response.headers["Content-Encoding"] == "gzip"
    assert plays(response.json()["URL for download"])
    problem(wrapped.upload(user, b"no WAV"), 422)


def test_refusal_of_a_long_upload_passes_a_middleware(wrapped: Host) -> None:
    stranger = User(1, str(uuid.uuid4()))
    problem(wrapped.upload(stranger, LONG), 401)


# The usage page


@pytest.mark.parametrize("factory, prefix", [(None, ""), ("starlette", "/outer/inner")])
def test_pasted_lines_of_the_usage_page_make_an_mp3(
    postgres: Postgres, tmp_path: Path, factory: str | None, prefix: str
) -> None:
    settings = {"DATABASE_URL": postgres.create_database()}
    with Host(settings, in_uvicorn(factory)) if factory else Server(settings) as server:
        page = server.http.get(f"{prefix}/", headers={"Accept": "*/*"})
        assert page.headers["Content-Type"].startswith("text/plain")
        assert len(page.text.splitlines()) <= 30
        assert max(map(len, page.text.splitlines())) <= 120
        (tmp_path / "my.wav").write_bytes(SPEECH)
        first, second, third, *others = re.findall(r"^ *(curl .*)$", page.text, re.MULTILINE)
        user = json.loads(pasted(first, tmp_path))
        values = {"TOKEN": user["user_token"], "ID": str(user["id_user"])}
        link = json.loads(pasted(second, tmp_path, **values))["URL for download"]
        assert link.startswith(f"{server.url}{prefix}/api/download?")
        values["THE LINK"] = link
        pasted(third, tmp_path, **values)
        mp3 = decoded((tmp_path / "my.mp3").read_bytes())
        assert len(mp3.samples) == len(decoded(SPEECH).samples)
        for line in others:
            answer = pasted(line, tmp_path, **values)
            if "/api/token/" in line:
                values["TOKEN"] = json.loads(answer)["user_token"]
        assert curl(link).status == 404


def pasted(line: str, directory: Path, **values: str) -> str:
    """Return what a line prints in a shell, with its capitals replaced as it says."""
    for name, value in values.items():
        line = re.sub(rf"\b{name}\b( [A-Z ]+)?", value, line)
    (directory / ".curlrc").write_text('fail\nsilent\nshow-error\nnoproxy = "*"\n')
    environment = {**os.environ, "CURL_HOME": str(directory)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, line + done.stderr
    return done.stdout


def test_usage_page_says_the_limits_in_force(start_server: StartServer) -> None:
    assert "123456" in start_server(MAX_UPLOAD_BYTES="123456").http.get("/").text


# Health


def readiness(server: Server) -> str:
    """Return what is said within two seconds: that it is ready, or what is missing."""
    assert curl("--max-time", "2", f"{server.url}/healthz").status == 200
    reply = curl("--max-time", "2", f"{server.url}/readyz")
    assert reply.status in (200, 503)
    return reply.body.decode().strip() if reply.status == 200 else str(reply.json()["detail"])


@contextmanager
def hanging(database: Postgres) -> Iterator[None]:
    postmaster = psutil.Process(int((database.directory / "postmaster.pid").read_text().split()[0]))
    postmaster.suspend()
    processes = [postmaster, *postmaster.children()]
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def test_service_is_ready(server: Server) -> None:
    assert readiness(server) == "ready"


def test_service_is_unready_while_its_database_hangs(
    database: Postgres, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=database.create_database())
    assert readiness(server) == "ready"
    with hanging(database):
        wait_for(lambda: "database" in readiness(server))
    wait_for(lambda: readiness(server) == "ready")
    assert plays(upload(server.url, server.register()))


def test_mounted_service_is_unready_while_its_database_hangs(database: Postgres) -> None:
    settings = {"DATABASE_URL": database.create_database()}
    with Host(settings, in_uvicorn("middleware")) as host:
        assert host.url
        with hanging(database):
            assert "database" in readiness(host)
        wait_for(lambda: readiness(host) == "ready")


def test_service_is_unready_while_ffmpeg_hangs(start_server: StartServer, tmp_path: Path) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    script(ffmpeg, "exec sleep 60")
    server = start_server(FFMPEG=str(ffmpeg))
    assert "ffmpeg" in readiness(server)
    wait_for(lambda: len(server.children()) <= 1)  # the encoder that is started ahead


def test_service_with_busy_encoders_is_ready(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="1")
    with Sending(server, server.register(), LONG) as sending:
        sending.share(0.5)
        wait_for(lambda: working(server))
        assert readiness(server) == "ready"


def test_service_with_busy_connections_is_ready(start_server: StartServer) -> None:
    server = start_server()
    server.register()
    locked = uncommitted(server.database_url, "LOCK TABLE wav_to_mp3.users")
    with ThreadPoolExecutor(20) as pool, locked:
        registrations = [pool.submit(register, server.url) for _ in range(20)]
        wait_for(lambda: waiting_for_locks(server.database_url) >= 10)
        assert readiness(server) == "ready"
    assert all(registration.result() for registration in registrations)


# Logs


def test_log_has_a_line_for_each_conversion_and_no_secret(server: Server) -> None:
    user, before = server.register(), len(server.log)
    response = server.upload(user, SPEECH)
    link = response.json()["URL for download"]
    mp3 = server.http.get(link).content
    listing = server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)
    assert listing.status_code == 200
    assert server.http.delete(link, headers=user.bearer).status_code == 204
    log = server.log[before:]
    assert user.token not in log
    [id_record] = re.findall("id_record=([^&]+)", link)
    assert id_record not in log
    [line] = [line for line in log.splitlines() if "Stored" in line]
    numbers = set(re.findall(r"[0-9.]+", line))
    assert {str(len(SPEECH)), str(len(mp3)), "0.25"} <= numbers


def test_log_has_a_line_for_a_failure_of_ours(start_server: StartServer) -> None:
    server = start_server(FFMPEG="/nonexistent/ffmpeg")
    user = server.register()
    problem(server.upload(user, SPEECH), 503)
    [line] = [line for line in server.log.splitlines() if "ERROR" in line]
    assert "encoder" in line
    assert user.token not in server.log


def test_upload_answers_how_long_its_parts_took(server: Server, user: User) -> None:
    timing = server.upload(user, SPEECH).headers["Server-Timing"]
    assert re.fullmatch(r"receive;dur=[\d.]+, encode;dur=[\d.]+, store;dur=[\d.]+", timing)

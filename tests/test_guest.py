"""A good guest: its own settings and metrics, in any package, for pages of other origins."""

import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from playwright.sync_api import Page, sync_playwright

import service
from browser import ARGUMENTS, CHROMIUM
from store import store
from support import (
    FORM,
    ROOT,
    UPLOAD,
    UVICORN,
    Postgres,
    Server,
    StartServer,
    User,
    problem,
    processes_in,
)
from support import wait_for as wait
from wav import LONG, SPEECH
from wire import Sending, link_of, working

LIB = str(ROOT / "tests" / "lib")
FILES = ("service.py", "db.sql", "openapi.json", "page.html")


class Host(Server):
    """An application of somebody else's: its server ends by the signal."""

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        children = self.children()
        self.process.send_signal(sent)
        self.process.wait(60)
        wait(lambda: not any(map(lives, children)))
        return 0


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def hosting(factory: str) -> tuple[str, ...]:
    return *UVICORN, "--app-dir", LIB, "--factory", f"guests:{factory}"


def register(server: Server, prefix: str, **headers: str) -> User:
    content = {"username": uuid.uuid4().hex}
    response = server.http.post(f"{prefix}/api/registration/", json=content, headers=headers)
    assert response.status_code == 201, response.text
    return User(*response.json().values())


def upload(server: Server, prefix: str, user: User, content: bytes) -> httpx.Response:
    files = {"file_wav": ("a.wav", content)}
    data = {"user_token": user.token, "id_user": str(user.id)}
    return server.http.post(prefix + UPLOAD, data=data, files=files)


# Settings


OTHERS: dict[str, Any] = {
    "port": 8000,
    "cors_origins": "https://a.example",
    "max_user_bytes": 1,
    "keep_days": 1,
    "max_upload_bytes": 1,
    "max_encoders": 1,
    "queue_seconds": 1,
    "stall_seconds": 1,
    "mp3_quality": 1,
    "drain_seconds": 1,
}


@pytest.mark.parametrize("name", [each.name for each in fields(service.Settings)])
def test_every_setting_is_a_keyword_that_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    value = OTHERS.get(name, "something")
    for other in fields(service.Settings):
        monkeypatch.setenv(other.name.upper(), str(other.default))
    assert getattr(service.create_app().state.settings, name) != value
    assert getattr(service.create_app(**{name: value}).state.settings, name) == value
    monkeypatch.setenv(name.upper(), str(value))
    assert getattr(service.create_app().state.settings, name) == value


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_encoders": 0},
        {"max_encoders": "many"},
        {"mp3_quality": 10},
        {"keep_days": -1},
        {"max_user_bytes": -1},
        {"port": 65536},
        {"cors_origins": "*"},
        {"cors_origins": "https://a.example/"},
        {"cors_origins": "https://a.example, a.example"},
    ],
)
def test_setting_that_cannot_be_is_named(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=name.upper()):
        service.create_app(**wrong)


def test_keyword_that_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="max_encoder"):
        service.create_app(max_encoder=1)


@pytest.fixture(scope="module")
def two(postgres: Postgres) -> Iterator[Host]:
    with Host({"DATABASE_URL": postgres.create_database()}, hosting("limits")) as host:
        assert host.url
        yield host


def test_services_of_one_process_have_limits_of_their_own(two: Host) -> None:
    user = register(two, "/small")
    problem(upload(two, "/small", user, SPEECH * 50), 413)
    link = link_of(upload(two, "/large", user, SPEECH))
    assert two.http.get(link).status_code == 200
    refused = two.http.post("/large/api/registration/", json={"username": "Bob"})
    assert "key" in problem(refused, 401)
    register(two, "/large", Authorization="Bearer key")


# In a package of somebody else's


STATE = """
import logging, os, signal, sys, warnings
import anyio, asyncpg, prometheus_client, python_multipart.multipart, uvicorn
import starlette.applications, starlette.config, starlette.middleware.cors

def state():
    loggers = logging.root.manager.loggerDict.values()
    return (
        [(logger.name, logger.handlers, logger.filters, logger.level, logger.propagate)
            for logger in [logging.root, *loggers]
            if isinstance(logger, logging.Logger) and logger.name != "wav_to_mp3"],
        sorted(family.name for family in prometheus_client.REGISTRY.collect()),
        [signal.getsignal(number) for number in signal.valid_signals()],
        list(warnings.filters), dict(os.environ), os.getcwd(), sys.path[:],
    )

def audit(event, arguments):
    if event == "open" and str(arguments[0]).startswith(sys.path[0]):
        if not str(arguments[0]).endswith((".py", ".pyc")):
            print("opens", arguments[0])

before = state()
sys.addaudithook(audit)
import service
if state() != before:
    print("changes", before, state())
assert not logging.getLogger("wav_to_mp3").handlers
try:
    service.app
except ValueError as error:
    print(error)
"""


def test_import_reads_nothing_and_changes_nothing(tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".env").write_text("MAX_ENCODERS=many\n")
    (tmp_path / "main.py").write_text(STATE)
    environment = {name: value for name, value in os.environ.items() if name != "MAX_ENCODERS"}
    command = [sys.executable, "-B", "main.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    opened, error = done.stdout.splitlines()  # only when the application is asked for
    assert opened.startswith("opens ") and opened.endswith("/.env")
    assert "MAX_ENCODERS" in error


PLACES = {"package": ("shop.media.sound", True), "module": ("converter", False)}
HOST = """\
from contextlib import asynccontextmanager
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import Mount

from {module} import app, create_app, lifespan

other: Starlette = create_app(max_encoders=2)


@asynccontextmanager
async def both(host: Starlette) -> AsyncIterator[None]:
    async with lifespan(app), lifespan(other):
        yield


host = Starlette(routes=[Mount("/audio", app), Mount("/other", other)], lifespan=both)
"""


@pytest.fixture(params=PLACES)
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project with the service in a package or a module of its own."""
    module, packaged = PLACES[request.param]
    path = tmp_path / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, path if name == "service.py" else path.parent)
    if packaged:
        for package in (path.parent, path.parent.parent):
            (package / "__init__.py").touch()
    (tmp_path / "main.py").write_text(HOST.format(module=module))
    return tmp_path


def test_copy_in_another_project_works(copied: Path, postgres: Postgres) -> None:
    command = (*UVICORN, "--app-dir", str(copied), "main:host")
    with Host({"DATABASE_URL": postgres.create_database()}, command, cwd=copied) as host:
        assert host.url
        user = register(host, "/audio")
        for prefix in ("/audio", "/other"):
            link = link_of(upload(host, prefix, user, SPEECH))
            assert host.http.get(link).headers["Content-Type"] == "audio/mpeg"
            page = host.http.get(f"{prefix}/", headers={"Accept": "text/html"})
            assert page.text == (ROOT / "page.html").read_text()
            assert host.http.get(f"{prefix}/openapi.json").json()["openapi"].startswith("3.1")


def test_copy_in_another_project_is_typed(copied: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "main.py"]
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Pages of other origins


needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def site(directory: Path) -> Iterator[str]:
    """A web site of its own, and its origin."""
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{web.server_port}"
        finally:
            web.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_text("<!DOCTYPE html><title>another site</title>")
    with site(directory) as origin:
        yield origin


@pytest.fixture(scope="module")
def open_to(postgres: Postgres, origin: str) -> Iterator[Server]:
    settings = {
        "DATABASE_URL": postgres.create_database(),
        "CORS_ORIGINS": f"https://a.example, {origin}",
        "MAX_ENCODERS": "1",
        "QUEUE_SECONDS": "0",
        "MAX_UPLOAD_BYTES": str(20_000_000),
    }
    with Server(settings) as server:
        assert server.url
        yield server


@pytest.fixture
def page(origin: str) -> Iterator[Page]:
    """A page of another site in a browser; asyncio.run does not work beside it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.goto(origin)
        yield page
        browser.close()


FETCH = """
async ([url, method, headers, form]) => {
    const options = {method, headers};
    if (form) {
        options.body = new FormData();
        for (const [name, text] of Object.entries(form.fields)) options.body.append(name, text);
        options.body.append("file_wav", new Blob([new Uint8Array(form.file)]), "a.wav");
    }
    try {
        const response = await fetch(url, options);
        const body = await response.text();
        return [response.status, Object.fromEntries(response.headers), body];
    } catch (error) {
        return [0, {}, String(error)];
    }
}
"""


def fetch(
    page: Page, url: str, method: str = "GET", form: Any = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    status, said, body = page.evaluate(FETCH, [url, method, headers, form])
    return status, said, body


def form_of(user: User, content: bytes) -> dict[str, Any]:
    fields = {"user_token": user.token, "id_user": str(user.id)}
    return {"fields": fields, "file": list(content)}


@needs_chromium
def test_page_of_a_named_origin_does_all_that_an_owner_does(page: Page, open_to: Server) -> None:
    url = open_to.url
    content = json.dumps({"username": uuid.uuid4().hex})
    registered = page.evaluate(
        "async ([url, body]) => (await fetch(url, {method: 'POST', body})).json()",
        [f"{url}/api/registration/", content],
    )
    user = User(*registered.values())
    authorization = f"Bearer {user.token}"
    form = form_of(user, SPEECH)
    status, headers, _ = fetch(page, url + UPLOAD, "POST", form, Idempotency_Key="key")
    assert status == 201
    assert headers["server-timing"].startswith("receive")
    link = headers["location"]
    status, headers, _ = fetch(page, link, Range="bytes=0-9")
    assert status == 206
    assert {"content-range", "content-disposition", "etag", "repr-digest"} <= headers.keys()
    assert fetch(page, link, Authorization=authorization)[0] == 200
    fetch(page, url + UPLOAD, "POST", form)
    listing = f"{url}/api/records?id_user={user.id}&limit=1"
    status, headers, _ = fetch(page, listing, Authorization=authorization)
    assert status == 200 and "next" in headers["link"]
    assert fetch(page, link, "DELETE", Authorization=authorization)[0] == 204
    status, _, body = fetch(page, f"{url}/api/token/", "POST", Authorization=authorization)
    assert status == 201
    authorization = f"Bearer {json.loads(body)['user_token']}"
    gone = fetch(page, f"{url}/api/registration/", "DELETE", Authorization=authorization)
    assert gone[0] == 204


@needs_chromium
def test_page_of_a_named_origin_reads_refusals(open_to: Server, origin: str) -> None:
    user, other = open_to.register(), open_to.register()
    with Sending(open_to, other, LONG) as sending, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.goto(origin)
        url = open_to.url + UPLOAD
        stranger = User(user.id, "wrong")
        status, headers, body = fetch(page, url, "POST", form_of(stranger, SPEECH))
        assert status == 401 and "credentials" in body
        assert headers["www-authenticate"] == "Bearer"
        sending.share(0.5)
        wait(lambda: working(open_to))
        status, headers, body = fetch(page, url, "POST", form_of(user, SPEECH))
        assert status == 503 and "busy" in body
        assert int(headers["retry-after"]) > 0
        big = {"fields": {}, "file": 21_000_000}  # zeros
        status, headers, body = fetch(page, url, "POST", big)
        assert status == 413 and "20" in body
        browser.close()
        assert sending.finish().status == 201


def test_download_that_is_cached_for_one_origin_is_not_for_another(open_to: Server) -> None:
    link = link_of(open_to.upload(open_to.register(), SPEECH))
    assert "Origin" in open_to.http.get(link).headers["Vary"]


@needs_chromium
@pytest.mark.parametrize("named", [False, True])
def test_page_of_an_origin_that_is_not_named_reads_and_changes_nothing(
    page: Page, server: Server, open_to: Server, tmp_path: Path, named: bool
) -> None:
    target = open_to if named else server
    content = {"username": uuid.uuid4().hex}
    user = User(*target.http.post("/api/registration/", json=content).json().values())
    with site(tmp_path) as stranger:
        page.goto(stranger)
        status, _, body = fetch(page, target.url + UPLOAD, "POST", form_of(user, SPEECH))
        assert status == 0 and "Failed to fetch" in body
        assert fetch(page, f"{target.url}/openapi.json")[0] == 0
    listing = target.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)
    assert listing.json() == {"records": []}


PREFLIGHT = {
    "Access-Control-Request-Method": "DELETE",
    "Access-Control-Request-Headers": "authorization,idempotency-key",
}


def test_preflight_is_answered_to_named_origins_alone(open_to: Server, origin: str) -> None:
    headers = {**PREFLIGHT, "Origin": origin, "Sec-Fetch-Site": "cross-site"}
    response = open_to.http.options("/api/download", headers=headers)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert "authorization" in response.headers["Access-Control-Allow-Headers"].lower()
    assert "DELETE" in response.headers["Access-Control-Allow-Methods"]
    for other in ("https://evil.example", "null", origin + "0", origin.upper(), f"{origin}/"):
        response = open_to.http.options("/api/download", headers={**headers, "Origin": other})
        assert response.status_code == 400
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_nothing_is_said_of_origins_where_none_is_named(
    server: Server, user: User, site: str
) -> None:
    headers = {"Origin": "https://a.example", "Sec-Fetch-Site": site}
    link = link_of(server.upload(user, SPEECH))
    responses = [
        server.http.options("/api/download", headers={**headers, **PREFLIGHT}),
        server.http.get(link, headers=headers),
        server.http.get("/openapi.json", headers=headers),
        server.http.post("/api/registration/", json={"username": "x"}, headers=headers),
        server.http.post(UPLOAD, content=b"", headers={**FORM, **headers}),
        server.http.delete(link, headers={**headers, **user.bearer}),
    ]
    assert [response.status_code for response in responses] == [405, 200, 200, 403, 403, 403]
    for response in responses:
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert "Origin" not in response.headers.get("Vary", "")
    assert "CORS_ORIGINS" in problem(responses[3], 403)


# Metrics


def scraped(server: Server, path: str = "/metrics") -> dict[str, float]:
    response = server.http.get(path, follow_redirects=True)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    return {
        name.removeprefix("wav_to_mp3_"): float(value)
        for name, value in re.findall(r"(?m)^(wav_to_mp3_\S+) (\S+)$", response.text)
        if "_created" not in name
    }


def outcome(name: str) -> str:
    return f'uploads_total{{outcome="{name}"}}'


def test_metrics_tell_of_uploads_and_downloads(start_server: StartServer) -> None:
    server = start_server(MAX_USER_BYTES="1000000")
    user = server.register()
    before = scraped(server)
    assert before["encoders_limit"] == 32
    assert before["encoders"] == before["uploads_waiting"] == before["downloads_total"] == 0
    link = link_of(server.upload(user, SPEECH))
    mp3 = server.http.get(link).content
    server.http.get(link, headers={"Range": "bytes=0-9"})
    server.http.head(link)
    after = scraped(server)
    assert after[outcome("stored")] == 1
    assert after["upload_bytes_total"] == len(SPEECH)
    assert after["audio_seconds_total"] == 0.25
    assert after["mp3_bytes_total"] == len(mp3)
    assert (after["downloads_total"], after["download_bytes_total"]) == (2, len(mp3) + 10)
    for stage in ("receive", "encode", "store"):
        assert after[f'stage_seconds_count{{stage="{stage}"}}'] == 1
        assert after[f'stage_seconds_sum{{stage="{stage}"}}'] > 0
    assert "database_connections" in after


def test_metrics_tell_what_became_of_uploads(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="1", QUEUE_SECONDS="0", MAX_USER_BYTES="1000")
    user, full = server.register(), server.register()
    problem(server.upload(user, b"no WAV"), 422)
    problem(server.upload(User(user.id, "wrong"), SPEECH), 401)
    problem(server.http.post(UPLOAD, content=b"--frontier", headers=FORM), 400)
    store(server, full, bytes(1000))
    problem(server.upload(full, SPEECH), 507)
    with Sending(server, user, LONG) as sending:
        sending.share(0.5)
        wait(lambda: working(server))
        assert scraped(server)["encoders"] == 1
        problem(server.upload(user, SPEECH), 503)
    wait(lambda: scraped(server).get(outcome("abandoned")) == 1)
    found = scraped(server)
    assert found["encoders"] == 0
    assert (found[outcome("refused")], found[outcome("unavailable")]) == (4, 1)
    assert found["upload_bytes_total"] == found["mp3_bytes_total"] == 0
    assert found[outcome("failed")] == 0


def test_metrics_tell_of_failures_and_of_uploads_that_wait(start_server: StartServer) -> None:
    server = start_server(MAX_ENCODERS="1")
    user = server.register()
    with Sending(server, user, LONG) as one, Sending(server, user, LONG) as other:
        one.share(0.5)
        wait(lambda: working(server))
        other.share(0.01)  # nothing is read of it
        wait(lambda: scraped(server)["uploads_waiting"] == 1)
        for encoder in working(server):
            encoder.kill()
        assert one.finish().status == 503
    wait(lambda: scraped(server).get(outcome("failed")) == 1)
    wait(lambda: scraped(server)["uploads_waiting"] == 0)


def test_metrics_say_nothing_of_users_however_many_there_are(start_server: StartServer) -> None:
    server = start_server()
    user = server.register()
    link = link_of(server.upload(user, SPEECH))
    server.http.get(link)
    before = scraped(server).keys()
    for _ in range(5):
        server.http.get(link_of(server.upload(server.register(), SPEECH)))
    assert scraped(server).keys() == before
    text = server.http.get("/metrics").text
    [id_record] = re.findall("id_record=([^&]+)", link)
    assert not [secret for secret in (user.token, id_record, "speech") if secret in text]


def test_services_of_one_process_are_counted_together_on_the_host_s_page_too(two: Host) -> None:
    before = scraped(two, "/of-the-host/")
    for prefix, headers in (("/small", {}), ("/large", {"Authorization": "Bearer key"})):
        user = register(two, prefix, **headers)
    link = link_of(upload(two, "/large", user, SPEECH))
    two.http.get(link)
    problem(upload(two, "/small", user, b"no WAV"), 422)
    after = scraped(two, "/of-the-host/")
    for name in (outcome("stored"), outcome("refused"), "downloads_total"):
        assert after[name] == before.get(name, 0) + 1
    assert after["encoders_limit"] == 3 + 4
    assert scraped(two, "/small/metrics") == scraped(two, "/large/metrics") == after


# What is left behind


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that the PostgreSQL of root, which is another user's, can reach."""
    directory = Path(tempfile.mkdtemp(prefix="guest-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_host_with_one_line_leaves_no_process_behind(reachable: Path, sent: signal.Signals) -> None:
    data = reachable / "data"
    with Host({"DATA_DIR": str(data)}, hosting("one_line")) as host:
        user = register(host, "/audio")
        assert upload(host, "/audio", user, SPEECH).status_code == 201
        assert [process for process in processes_in(data) if "postgres" in process.name()]
        host.process.send_signal(sent)
        host.process.wait(60)
        wait(lambda: not processes_in(data))
        wait(lambda: not [p for p in psutil.process_iter() if of_session(p, host.process.pid)])


def of_session(process: psutil.Process, session: int) -> bool:
    """Whether a process began where the host did, as ffmpeg does."""
    try:
        return os.getsid(process.pid) == session and lives(process)
    except ProcessLookupError:
        return False

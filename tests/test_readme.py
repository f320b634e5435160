"""Every block of the README does what the text around it says."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

import service
from proxy import Proxy
from readme import ADDRESS, README, block, blocks, checkout, paste
from support import (
    FORM,
    ROOT,
    UVICORN,
    Postgres,
    Server,
    StartServer,
    User,
    fields,
    form,
    free_port,
    wait_for,
)
from wav import decoded, noise, wav

SHELLS = [
    pytest.param(
        shell, marks=pytest.mark.skipif(not shutil.which(shell), reason=f"there is no {shell}")
    )
    for shell in ("bash", "zsh")
]
CLIENT = [each for each in blocks("sh", "curl") if ADDRESS in each or "$LINK" in each]


# What it says of the rest ---------------------------------------------------------------------


def test_every_setting_stands_in_the_readme_and_in_the_template() -> None:
    table = re.findall(r"^\| (`[A-Z_0-9`, ]+`) \| ", README, re.MULTILINE)
    documented = [name for row in table for name in re.findall("[A-Z_0-9]+", row)]
    template = re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.template").read_text(), re.MULTILINE)
    names = sorted(each.name.upper() for each in dataclasses.fields(service.Settings))
    assert sorted(documented) == names
    assert sorted(template) == names


def test_every_call_and_every_status_stands_in_the_readme() -> None:
    contract = json.loads((ROOT / "openapi.json").read_text())
    errors = {
        status
        for row in re.findall(r"^\| ([0-9, ]+) \| ", README, re.MULTILINE)
        for status in row.split(", ")
    }
    for path, calls in contract["paths"].items():
        assert f"{path}`" in README or f"{path}?" in README
        for method, call in calls.items():
            if method in ("get", "post", "delete"):
                assert {status for status in call["responses"] if status > "399"} <= errors


def test_lines_can_be_pasted_everywhere() -> None:
    for each in blocks("sh"):
        assert "#" not in each and "uuidgen" not in each and "!" not in each


def test_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / name).is_file()


def test_alerts_are_about_metrics_that_there_are(server: Server) -> None:
    metrics = server.http.get("/metrics").text
    [group] = yaml.safe_load(block("yaml", "alert"))["groups"]
    for rule in group["rules"]:
        names = re.findall("wav_to_mp3_[a-z_]+", rule["expr"])
        assert names and all(f"\n# TYPE {name.removesuffix('_total')}" in metrics for name in names)


# Start and use --------------------------------------------------------------------------------


@contextmanager
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a my.wav, in which nothing but a my.mp3 is to appear."""
    mine = tmp_path / "my folder"
    mine.mkdir()
    (mine / "my.wav").write_bytes(wav())
    yield mine
    assert {path.name for path in mine.iterdir()} == {"my.wav", "my.mp3"}
    mp3 = decoded((mine / "my.mp3").read_bytes())
    assert len(mp3.samples) == 11025 and mp3.resembles_the_sine()


@pytest.mark.parametrize("shell", SHELLS)
def test_pasted_lines_make_an_mp3_of_a_wav(server: Server, tmp_path: Path, shell: str) -> None:
    lines = "".join(CLIENT).replace(ADDRESS, server.url)
    with folder(tmp_path) as mine:
        printed = paste(lines, mine, tmp_path, shell)
    assert "100\n" in printed  # bytes
    assert '"records":[{' in printed


@pytest.mark.parametrize("shell", SHELLS)
def test_blocks_can_be_pasted_twice(server: Server, tmp_path: Path, shell: str) -> None:
    use, retry, rest = (each.replace(ADDRESS, server.url) for each in CLIENT)
    with folder(tmp_path) as mine:
        printed = paste(use * 2 + retry * 2, mine, tmp_path, shell)
        assert len(set(re.findall('"user_token":"(.+?)"', printed))) == 2
        links = re.findall('"URL for download":"(.+?)"', printed)
        assert len(links) == 2 and len(set(links)) == 1
        paste(use + rest * 2, mine, tmp_path, shell, strict=False)  # what is gone is gone


@pytest.mark.parametrize("cut_at", [b"recording-is-cut-here", b"HTTP/1.1 201"])
def test_pasted_retry_survives_a_cut_and_a_lost_answer(
    server: Server, user: User, tmp_path: Path, cut_at: bytes
) -> None:
    [line] = [each for each in CLIENT if "--retry" in each]
    content = noise(200_000)
    (tmp_path / "my.wav").write_bytes(content[:-21] + b"recording-is-cut-here")
    address = server.url.removeprefix("http://").split(":")
    with Proxy((address[0], int(address[1]))) as proxy:
        proxy.cut_at = cut_at
        line = line.replace(ADDRESS, f"http://127.0.0.1:{proxy.port}")
        printed = paste(line, tmp_path, tmp_path, ID=str(user.id), TOKEN=user.token)
        assert proxy.cut_at is None
    assert "URL for download" in printed
    assert server.records(user) == 1


@pytest.mark.slow
def test_pasted_start_needs_nothing_but_python(tmp_path: Path) -> None:
    start = block("sh", "python service.py")
    python = Path(sys.executable).resolve().parent
    with checkout(installed=False) as directory:
        before = set(directory.iterdir())
        environment = {"DATA_DIR": "", "PATH": f"{python}:{os.environ['PATH']}"}
        command = ("bash", "-c", start)
        with Server(environment, command, cwd=directory) as running:
            deadline = time.monotonic() + 500
            while not serves(running):
                assert running.process.poll() is None and time.monotonic() < deadline, running.log
                time.sleep(0.1)
            lines = CLIENT[0].replace(ADDRESS, running.url)
            with folder(tmp_path) as mine:
                paste(lines, mine, tmp_path)
            running.stop(signal.SIGINT)
        assert set(directory.iterdir()) - before == {directory / ".venv", directory / "data"}


def serves(server: Server) -> bool:
    """Whether a shell has come to the service, as its child or, as some do, in its own place."""
    shell = psutil.Process(server.process.pid)
    return any("service.py" in each.cmdline() for each in (shell, *shell.children()))


def test_pasted_docker_lines_make_a_password_once(tmp_path: Path) -> None:
    lines = block("sh", "docker compose").replace("docker compose up --build\n", "")
    assert lines.count("\n") == 1
    for shell in ("bash", "sh"):
        paste(lines, tmp_path, tmp_path, shell, strict=False)
    [password] = re.findall("^POSTGRES_PASSWORD=([0-9a-f]{32})\n$", (tmp_path / ".env").read_text())
    assert len(set(password)) > 4


def end(server: Server) -> None:
    """Stop a service in somebody else's server, which ends by the signal, with all it started."""
    children = server.children()
    server.process.terminate()
    server.process.wait(60)
    wait_for(lambda: not any(map(lives, children)))


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


# Mounting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("having", ["FastAPI", "create_pool", "OpenTelemetry"])
def test_application_of_the_readme_serves(postgres: Postgres, tmp_path: Path, having: str) -> None:
    """With the package made by copying, as the text above it says."""
    package = tmp_path / "wav_to_mp3"
    package.mkdir()
    shutil.copy(ROOT / "service.py", package / "__init__.py")
    for name in ("db.sql", "openapi.json", "page.html"):
        shutil.copy(ROOT / name, package)
    (tmp_path / "host.py").write_text(block("python", having))
    command = (*UVICORN, "--app-dir", str(tmp_path), "host:app")
    with Server({"DATABASE_URL": postgres.create_database()}, command, cwd=tmp_path) as host:
        mount = "" if having == "OpenTelemetry" else "/audio"
        registered = host.http.post(f"{mount}/api/registration/", json={"username": "Bob"}).json()
        user = User(registered["id_user"], registered["user_token"])
        path, body = f"{mount}/api/upload_audiorecord/", form(*fields(user, wav()))
        response = host.http.post(path, content=body, headers=FORM)
        assert response.status_code == 201, host.log
        link = response.headers["Location"].replace("https://example.com", host.url)
        assert len(decoded(host.http.get(link).content).samples) == 11025
        end(host)


# Running it -----------------------------------------------------------------------------------


def test_uvicorn_serves_as_the_readme_says(postgres: Postgres, tmp_path: Path) -> None:
    line = block("sh", "uvicorn").replace("--port 5000", f"--port {free_port()}")
    with (
        checkout() as directory,
        Server(
            {"DATABASE_URL": postgres.create_database()}, ("sh", "-c", "exec " + line), directory
        ) as running,
    ):
        wait_for(lambda: answers(running.url + "/healthz") == 200)  # it listens later than it says
        link = running.upload(running.register(), wav()).headers["Location"]
        assert running.http.get(link).status_code == 200
        assert "Stored" in running.log
        end(running)
        assert "id_record" not in running.log and '"GET' not in running.log


PROXIES = {
    "nginx": (("nginx", "-g", "daemon off; pid nginx.pid;", "-p", ".", "-c"), "80;"),
    "haproxy": (("haproxy", "-db", "-f"), ":80"),
}


@contextmanager
def in_front(kind: str, servers: list[Server], directory: Path) -> Iterator[str]:
    """A proxy with the configuration of the README; yields its URL."""
    command, listening = PROXIES[kind]
    if not shutil.which(kind):
        pytest.skip(f"there is no {kind}")
    port = free_port()
    text = block(kind, "wav_to_mp3")
    assert listening in text
    text = text.replace(listening, listening.replace("80", str(port)))
    for number, server in enumerate(servers, 5001):
        assert f"127.0.0.1:{number}" in text
        text = text.replace(f"127.0.0.1:{number}", server.url.removeprefix("http://"))
    if kind == "nginx":
        text = f"user root; error_log stderr; events {{}} http {{ access_log off; {text} }}"
    path = directory / kind
    path.write_text(text)
    with subprocess.Popen((*command, path), cwd=directory, stderr=subprocess.DEVNULL) as proxy:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(url + "/healthz") == 200)
            yield url
        finally:
            proxy.terminate()


def answers(url: str) -> int | None:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.TransportError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROXIES)
def test_restart_behind_a_proxy_loses_no_request(
    postgres: Postgres, start_server: StartServer, tmp_path: Path, kind: str
) -> None:
    url = postgres.create_database()
    servers = [start_server(DATABASE_URL=url, DRAIN_SECONDS="2") for _ in range(2)]
    with in_front(kind, servers, tmp_path) as address:
        assert answers(address + "/metrics") == 403
        name = {"username": uuid.uuid4().hex}
        registered = httpx.post(f"{address}/api/registration/", json=name, trust_env=False).json()
        user = User(registered["id_user"], registered["user_token"])
        body = form(*fields(user, wav()))
        servers[0].process.send_signal(signal.SIGTERM)
        statuses: list[int] = []
        while servers[0].process.poll() is None or len(statuses) < 20:
            response = httpx.post(
                f"{address}/api/upload_audiorecord/", content=body, headers=FORM, trust_env=False
            )
            statuses.append(response.status_code)
            if response.status_code == 201:
                link = response.headers["Location"]
                assert link.startswith(address)
                statuses.append(httpx.get(link, trust_env=False).status_code)
        assert set(statuses) == {200, 201}

"""The files for Docker and systemd, as far as they can be judged without either running."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import service
from support import ROOT, Server

SCRIPTS = Path(sys.executable).parent


def test_compose_file_is_what_its_specification_allows() -> None:
    """https://github.com/compose-spec/compose-spec, the schema that comes with check-jsonschema."""
    schema = ("--builtin-schema", "vendor.compose-spec")
    check = (SCRIPTS / "check-jsonschema", *schema, ROOT / "docker-compose.yml")
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_passes_on_every_setting_but_those_of_the_machine() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    passed = compose["services"]["service"]["environment"].keys()
    settings = {each.name.upper() for each in fields(service.Settings)}
    assert settings - passed == {"DATA_DIR", "FFMPEG", "HOST", "PORT"}
    for name in ("service", "db"):
        container = compose["services"][name]
        assert container["logging"]["options"].keys() == {"max-size", "max-file"}
        assert container["cap_drop"] == ["ALL"]


def test_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    hadolint = shutil.which("hadolint", path=str(SCRIPTS)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint has no build for this machine")
    done = subprocess.run((hadolint, ROOT / "Dockerfile"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_image_has_the_files_that_the_service_reads(tmp_path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    [files] = re.findall(r"^COPY --chmod=444 (.+) \./$", dockerfile, re.MULTILINE)
    for name in files.split():
        shutil.copy(ROOT / name, tmp_path)
        assert f"!{name}\n" in (ROOT / ".dockerignore").read_text()
    command = (sys.executable, str(tmp_path / "service.py"))
    with Server({"DATABASE_URL": "postgresql://127.0.0.1:9"}, command, cwd=tmp_path) as server:
        for path in ("/", "/openapi.json", "/metrics", "/healthz"):
            assert server.http.get(path, headers={"Accept": "text/html"}).status_code == 200


def test_image_without_a_database_says_so(tmp_path: Path) -> None:
    """As in the image: without the embedded PostgreSQL and what only that needs."""
    [removed] = re.findall(r"sed -Ei '/\^\((.+)\)==/d'", (ROOT / "Dockerfile").read_text())
    absent = removed.replace("-", "_").split("|")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import service; service.main()"
    )
    settings = {"DATA_DIR": str(tmp_path / "file" / "data")}  # it could not be made either
    (tmp_path / "file").touch()
    with Server(settings, (sys.executable, "-c", code)) as server:
        assert server.process.wait(30) == 1
        [line] = server.log.splitlines()
        assert "DATABASE_URL is unset: " in line


def test_unit_is_what_systemd_takes(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    unit = (ROOT / "wav-to-mp3.service").read_text()
    command = re.findall("^ExecStart=(.+)$", unit, re.MULTILINE)
    assert [Path(line).name for line in command] == ["wav-to-mp3"]
    (tmp_path / "wav-to-mp3.service").write_text(unit.replace(command[0], "/bin/true"))
    verify = ("systemd-analyze", "verify", tmp_path / "wav-to-mp3.service")
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

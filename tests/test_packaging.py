"""What pip makes of a checkout: a package with a command."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support import ROOT, Server
from wav import decoded, wav

RELEASE = json.loads((ROOT / "openapi.json").read_text())["info"]["version"]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that PostgreSQL, which root runs as another user, may enter."""
    directory = Path(tempfile.mkdtemp(prefix="place-")).resolve()
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def environment(place: Path) -> Path:
    """The programs of a new virtual environment with the wheel, and what it pulls in."""
    wheels = place / "wheels"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run((*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT), check=True)
    [wheel] = wheels.iterdir()
    assert wheel.name == f"wav_to_mp3-{RELEASE}-py3-none-any.whl"
    subprocess.run((sys.executable, "-m", "venv", place / "venv"), check=True)
    install = ("install", "--constraint", ROOT / "requirements.txt", wheel)
    own = (place / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run((*own, *install), check=True)
    return place / "venv/bin"


@pytest.mark.slow
def test_installed_service_keeps_its_data_with_the_users_other_data(
    environment: Path, place: Path
) -> None:
    data = (
        place / "data of the user"
    )  # root's are those of the system, or PostgreSQL could not enter
    settings = {"DATA_DIR": "", "XDG_DATA_HOME": str(data), "XDG_DATA_DIRS": str(data)}
    with Server(settings, (str(environment / "wav-to-mp3"),), cwd=place) as server:
        assert len(decoded(server.convert(wav())).samples) == 11025
        assert (data / "wav-to-mp3/data/postgresql").is_dir()
        for path, media_type in {"/": "text/html", "/openapi.json": "application/json"}.items():
            response = server.http.get(path, headers={"Accept": media_type})
            assert response.headers["Content-Type"].startswith(media_type)
        build = f'wav_to_mp3_build_info{{version="{RELEASE}"}} 1.0'
        assert build in server.http.get("/metrics").text.splitlines()
    assert {path.name for path in place.iterdir()} == {"wheels", "venv", data.name}


@pytest.mark.slow
def test_settings_of_an_installed_service_lie_beside_its_data(
    environment: Path, place: Path
) -> None:
    home = place / "settings" / "wav-to-mp3"
    home.mkdir(parents=True)
    (home / ".env").write_text("MAX_ENCODERS=0\n")
    data = {"XDG_DATA_HOME": str(home.parent), "XDG_DATA_DIRS": str(home.parent)}
    done = subprocess.run(
        (environment / "wav-to-mp3",), env=os.environ | data, capture_output=True, text=True
    )
    shutil.rmtree(home.parent)
    assert done.returncode == 1
    assert re.fullmatch("MAX_ENCODERS is 0, .*\n", done.stderr)


@pytest.mark.slow
def test_installed_package_has_types_and_a_release(environment: Path) -> None:
    code = "import wav_to_mp3; print(wav_to_mp3.create_app().state.settings.mp3_quality)"
    done = subprocess.run((environment / "python", "-c", code), capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
    [package] = environment.parent.glob("lib/*/site-packages/wav_to_mp3")
    assert (package / "py.typed").exists()
    told = subprocess.run((environment / "wav-to-mp3", "--version"), capture_output=True, text=True)
    assert told.stdout == f"{RELEASE}\n"


def pinned() -> dict[str, str]:
    """The versions in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip().split("==") for line in lines if "==" in line]
    return {name.replace("_", "-"): release for name, release in pins}


def test_pins_are_what_the_package_allows_and_all_that_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins, needed = pinned(), set()
    queue = [Requirement(text) for text in project["dependencies"]]
    for requirement in queue:
        assert pins[requirement.name.replace("_", "-")] in requirement.specifier
    while queue:
        name = queue.pop().name
        if name not in needed:
            needed.add(name)
            found = [Requirement(text) for text in requires(name) or ()]
            queue += [each for each in found if not each.marker or each.marker.evaluate()]
    # Beside those that only other versions of Python need.
    assert {name.lower().replace("_", "-") for name in needed} <= pins.keys() | {"setuptools"}


def test_tests_run_with_the_pinned_versions() -> None:
    assert {name: version(name) for name in pinned()} == pinned()


@pytest.mark.parametrize("release", ["3.8", "3.9", "3.10"])
def test_older_python_gets_one_line(release: str) -> None:
    pythons = [Path.home() / ".pyenv/versions", Path("/usr/bin")]
    names = [f"{release}*/bin/python", f"python{release}"]
    found = [path for start, name in zip(pythons, names, strict=True) for path in start.glob(name)]
    if not found:
        pytest.skip(f"there is no Python {release}")
    done = subprocess.run((found[0], ROOT / "service.py"), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"Python 3\.11 or later is needed, .*\n", done.stderr)

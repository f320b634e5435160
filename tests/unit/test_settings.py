"""What may be set, and where from."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

import service
from service import Misconfigured, Settings, create_app, find_ffmpeg, read_settings
from support import SETTINGS

NUMBERS = {each.name: each.metadata["allowed"] for each in fields(Settings) if each.type == "int"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The place of .env, which is not there."""
    for each in fields(Settings):
        monkeypatch.delenv(each.name.upper(), raising=False)
    monkeypatch.setattr(service, "HOME", tmp_path)
    return tmp_path


def test_tests_leave_no_setting_to_the_environment() -> None:
    assert SETTINGS.keys() == {each.name.upper() for each in fields(Settings)}


def test_defaults_are_those_of_the_tests() -> None:
    names = [name for name in SETTINGS if SETTINGS[name].isdigit() and name != "PORT"]
    assert {str(getattr(read_settings(), name.lower())) for name in names} == {
        SETTINGS[name] for name in names
    }


def test_every_number_has_its_limits() -> None:
    assert all(NUMBERS.values())


@pytest.mark.parametrize("name", NUMBERS)
def test_number_may_be_as_its_limits_say(name: str) -> None:
    allowed = NUMBERS[name]
    for number in allowed.start, allowed.stop - 1:
        assert getattr(Settings(**{name: number}), name) == number
    for number in allowed.start - 1, allowed.stop:
        with pytest.raises(ValueError, match=name.upper()):
            Settings(**{name: number})


def test_settings_are_as_given_else_of_the_environment_else_of_the_file(
    monkeypatch: pytest.MonkeyPatch, nothing_set: Path
) -> None:
    assert read_settings().max_encoders == 32
    (nothing_set / ".env").write_text("MAX_ENCODERS=3\nHOST=::1\n")
    assert (read_settings().max_encoders, read_settings().host) == (3, "::1")
    monkeypatch.setenv("MAX_ENCODERS", "4")
    assert (read_settings().max_encoders, read_settings().host) == (4, "::1")
    assert read_settings(max_encoders=5).max_encoders == 5
    assert create_app(max_encoders=5, host="::").state.settings.max_encoders == 5


@pytest.mark.parametrize("value", ["", "ten", "1.5", "0", "1001"])
def test_setting_that_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MAX_ENCODERS", value)
    with pytest.raises(ValueError, match="MAX_ENCODERS"):
        read_settings()


def test_setting_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="max_encoder"):
        create_app(max_encoder=5)


@pytest.mark.parametrize(
    "data_dir, path",
    [("", "HERE/data"), ("else", "HERE/else"), ("/var/lib/mp3", "/var/lib/mp3"), ("~/x", "HOME/x")],
)
def test_data_are_kept_beside_the_service_or_where_said(
    monkeypatch: pytest.MonkeyPatch, nothing_set: Path, data_dir: str, path: str
) -> None:
    monkeypatch.setenv("HOME", "/home/bob")
    path = path.replace("HERE", str(nothing_set)).replace("HOME", "/home/bob")
    assert str(Settings(data_dir=data_dir).data_path) == path


def test_ffmpeg_is_the_named_one_else_the_wheels_else_that_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel, path = tmp_path / "imageio_ffmpeg", tmp_path / "bin"
    for directory in (path, wheel / "binaries"):
        directory.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    (wheel / "binaries" / "README.md").touch()
    monkeypatch.delitem(sys.modules, wheel.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(path))
    with pytest.raises(Misconfigured, match="FFMPEG"):
        find_ffmpeg("")
    (wheel / "binaries" / "ffmpeg-any").touch(0o644)  # which cannot be run
    (path / "ffmpeg").touch(0o755)
    assert find_ffmpeg("") == find_ffmpeg("ffmpeg") == str(path / "ffmpeg")
    (wheel / "binaries" / "ffmpeg-any").chmod(0o755)
    assert find_ffmpeg("") == str(wheel / "binaries" / "ffmpeg-any")
    assert find_ffmpeg("/which/comes/later") == "/which/comes/later"


def test_app_is_made_when_it_is_asked_for() -> None:
    assert service.app is service.app
    with pytest.raises(AttributeError, match="application"):
        service.application  # noqa: B018

"""The programs that people download and play with."""

import html
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from store import store
from support import Server, User, curl, wait_for
from wav import ffmpeg, pcm_format, riff, wav

MP3 = random.Random(0).randbytes(700_000)
BIG = random.Random(1).randbytes(20 << 20)
SPEECH = wav(1000)


@pytest.fixture(scope="module")
def link(server: Server) -> str:
    return store(server, server.register(), MP3)


# curl


def test_curl_resumes_a_cut_download(server: Server, user: User, tmp_path: Path) -> None:
    link, file = store(server, user, BIG), tmp_path / "speech.mp3"
    command = ["curl", "--disable", "--silent", "--noproxy", "*", "--limit-rate", "1M"]
    with subprocess.Popen([*command, "--output", file, link]) as cut:
        wait_for(lambda: file.exists() and file.stat().st_size)
        cut.kill()
    assert 0 < file.stat().st_size < len(BIG)
    assert curl("--continue-at", "-", "--output", str(file), link).status == 206
    assert file.read_bytes() == BIG


def test_curl_resumes_a_complete_download_without_harm(link: str, tmp_path: Path) -> None:
    file = tmp_path / "speech.mp3"
    file.write_bytes(MP3)
    assert curl("--continue-at", "-", "--output", str(file), link).status == 416
    assert file.read_bytes() == MP3


@pytest.mark.parametrize(
    "uploaded, saved",
    [
        ("speech.wav", "speech.mp3"),
        ("my speech (2).wav", "my speech (2).mp3"),
        ("Zoë.wav", "Zoe.mp3"),
        ("🎤.wav", "recording.mp3"),
        ("a%22; filename=b.wav", "a__ filename=b.mp3"),
        (r"C:\\fakepath\\x.wav", "x.mp3"),
        (r"\"quoted\".wav", "_quoted_.mp3"),
        ("../../x.wav", "x.mp3"),
        ("-o.wav", "recording.mp3"),
        (".curlrc", "curlrc.mp3"),
        ("a\tb\x7f.wav", "ab.mp3"),
        ("x" * 300 + ".wav", "x" * 251 + ".mp3"),
        ("\N{SMALL ROMAN NUMERAL EIGHT}" * 83, ("viii" * 83)[:251] + ".mp3"),
    ],
)
def test_curl_saves_under_a_sensible_name(
    server: Server, user: User, tmp_path: Path, uploaded: str, saved: str
) -> None:
    link = server.upload(user, SPEECH, uploaded).json()["URL for download"]
    directory = tmp_path / "deep" / "down"
    directory.mkdir(parents=True)
    assert curl("--remote-name", "--remote-header-name", link, cwd=directory).status == 200
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file == directory / saved
    assert file.read_bytes() == server.http.get(link).content


def test_curl_saves_no_copy_that_it_has_by_entity_tag(link: str, tmp_path: Path) -> None:
    tag, file = tmp_path / "etag", tmp_path / "speech.mp3"
    arguments = ["--etag-save", str(tag), "--etag-compare", str(tag), "--output", str(file), link]
    assert curl(*arguments).status == 200
    assert file.read_bytes() == MP3
    file.unlink()
    assert curl(*arguments).status == 304
    assert not file.exists()
    tag.write_text('"another"')
    assert curl(*arguments).status == 200
    assert file.read_bytes() == MP3


def test_curl_saves_no_copy_that_it_has_by_time(link: str, tmp_path: Path) -> None:
    file = tmp_path / "speech.mp3"
    assert curl("--remote-time", "--output", str(file), link).status == 200
    assert curl("--time-cond", str(file), link) == (304, b"")
    os.utime(file, (0, 0))
    assert curl("--time-cond", str(file), link) == (200, MP3)


# ffmpeg and browsers

SECONDS = 200


@pytest.fixture(scope="module")
def long_mp3() -> bytes:
    """Eight megabytes of noise: more than a player takes at once, and nothing in it repeats."""
    noise = random.Random(2).randbytes(32000 * SECONDS)
    content = riff(pcm_format(1, 8, 32000, 1), noise)
    return ffmpeg("-codec:a", "libmp3lame", "-b:a", "320k", "-f", "mp3", stdin=content)


@pytest.fixture
def long_link(server: Server, user: User, long_mp3: bytes) -> str:
    return store(server, user, long_mp3, "Запись «1» 🎤.mp3")


def statuses(log: str) -> list[str]:
    """How downloads have been answered, as far as a log says."""
    return re.findall(r'"GET /api/download HTTP/1\.1" (\d+)', log)


@pytest.mark.parametrize(
    "options, requests",
    [([], 1), (["-ss", "150"], 1), (["-fflags", "fastseek", "-ss", "150"], 2)],
)
def test_ffmpeg_hears_what_it_hears_in_a_file(
    server: Server,
    long_link: str,
    long_mp3: bytes,
    tmp_path: Path,
    options: list[str],
    requests: int,
) -> None:
    file = tmp_path / "long.mp3"
    file.write_bytes(long_mp3)

    def heard(source: str) -> bytes:
        command = [get_ffmpeg_exe(), "-v", "error", *options, "-i", source, "-f", "s16le", "pipe:1"]
        return subprocess.run(command, check=True, capture_output=True).stdout

    mark = len(server.log)
    assert heard(long_link) == heard(str(file)) != b""
    answered = statuses(server.log[mark:])
    assert set(answered) == {"206"}
    assert len(answered) >= requests


class Page(ThreadingHTTPServer):
    """Serves a page, whose script posts what there is to tell."""

    def __init__(self, content: str) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.content = content.encode()
        self.told: dict[str, Any] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class PageHandler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told = json.loads(body)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --mute-audio"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --autoplay-policy=no-user-gesture-required"
)


@contextmanager
def chromium(url: str) -> Iterator[Path]:
    """Shows url in a browser without a window. Yields the directory that it saves into."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as name:
        saved, profile = Path(name) / "saved", Path(name) / "profile"
        preferences = profile / "Default" / "Preferences"
        preferences.parent.mkdir(parents=True)
        preferences.write_text(json.dumps({"download": {"default_directory": str(saved)}}))
        process = psutil.Popen(
            [*CHROMIUM.split(), f"--user-data-dir={profile}", url],
            env={**os.environ, "TMPDIR": name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield saved
        finally:
            processes = [process, *process.children(recursive=True)]
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            wait_for(lambda: not any(map(runs, processes)))
            process.wait()


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


needs_chromium = pytest.mark.skipif(
    not shutil.which("chromium"), reason="Chromium is not installed: apt-get install chromium"
)

PLAYER = """
<!doctype html>
<audio src="LINK"></audio>
<script>
const audio = document.querySelector("audio");
let heard = 0;
audio.ontimeupdate = () => {
  if (!heard && audio.currentTime > 0.1) {
    heard = audio.currentTime;
    audio.currentTime = audio.duration - 0.2;
  }
};
audio.onended = audio.onerror = () => fetch("/", {method: "POST", body: JSON.stringify({
  heard, end: audio.currentTime, duration: audio.duration, error: audio.error?.message ?? ""
})});
audio.play();
</script>
"""


@needs_chromium
def test_chromium_plays_and_seeks(server: Server, long_link: str) -> None:
    mark = len(server.log)
    with Page(PLAYER.replace("LINK", html.escape(long_link))) as page, chromium(page.url):
        told = wait_for(lambda: page.told)
    assert told["error"] == ""
    assert told["duration"] == told["end"] == pytest.approx(SECONDS, abs=0.1)
    assert 0 < told["heard"] < SECONDS / 2
    answered = statuses(server.log[mark:])
    assert len(answered) >= 2
    assert set(answered) == {"206"}


@needs_chromium
def test_chromium_saves_under_the_full_name(long_link: str, long_mp3: bytes) -> None:
    with chromium(long_link) as saved:
        file = saved / "Запись «1» 🎤.mp3"
        # It takes the name before it has the content.
        wait_for(lambda: file.exists() and file.stat().st_size == len(long_mp3))
        assert file.read_bytes() == long_mp3

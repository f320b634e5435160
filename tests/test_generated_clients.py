"""Clients that others' programs make of the contract."""

import io
import json
import shutil
import subprocess
import sys
from base64 import b64encode
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, Server, StartServer
from wav import SPEECH, decoded

GENERATOR = Path(sys.executable).with_name("openapi-python-client")
KEY = "sesame"

pytestmark = pytest.mark.slow


@pytest.fixture
def server(start_server: StartServer) -> Server:
    """One that asks for a key, so that each call with credentials needs those of its own."""
    return start_server(REGISTRATION_KEY=KEY)


def contract(server: Server, directory: Path) -> Path:
    """Save the contract as it is served."""
    path = directory / "openapi.json"
    path.write_bytes(server.http.get("/openapi.json").content)
    return path


def test_python_client_goes_all_the_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    # It knows one type of binary answers.
    overrides = {"audio/mpeg": "application/octet-stream"}
    config.write_text(json.dumps({"content_type_overrides": overrides, "post_hooks": []}))
    command: list[str | Path] = [GENERATOR, "generate", "--fail-on-warning", "--meta", "none"]
    command += ["--config", config, "--path", contract(server, tmp_path)]
    package = tmp_path / "generated_client"
    subprocess.run([*command, "--output-path", package], check=True, capture_output=True)
    monkeypatch.syspath_prepend(tmp_path)
    client, models, types = (
        import_module(f"generated_client.{name}") for name in ("client", "models", "types")
    )
    register, upload, records, download, delete = (
        import_module(f"generated_client.api.default.{name}")
        for name in ("register", "upload", "records", "download", "delete")
    )

    def connected(token: str | None = None) -> Any:
        # The proxies of the environment are not meant.
        options = {"base_url": server.url, "httpx_args": {"trust_env": False}}
        return (
            client.AuthenticatedClient(**options, token=token)
            if token
            else client.Client(**options)
        )

    with connected() as visitor, connected(KEY) as guest:
        registration = models.Registration(username="Python")
        assert register.sync(client=visitor, body=registration).status == 401
        user = register.sync(client=guest, body=registration)
        with connected(str(user.user_token)) as owner:
            file = types.File(io.BytesIO(SPEECH), "speech.wav")
            form = models.Upload(id_user=user.id_user, file_wav=file)
            link = upload.sync(client=owner, body=form)
            (record,) = records.sync(client=owner, id_user=user.id_user).records
            assert record.url_for_download == link.url_for_download
            assert (record.filename, record.expires_at) == ("speech.mp3", None)
            key = {"id_record": record.id_record, "id_user": user.id_user}
            mp3 = download.sync(client=visitor, **key).payload.read()
            assert len(mp3) == record.size
            assert decoded(mp3).resembles_the_sine()
            assert delete.sync_detailed(client=owner, **key).status_code == 204
            assert records.sync(client=owner, id_user=user.id_user).records == []


@pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")),
    reason="Node is not installed: apt-get install nodejs npm",
)
def test_typescript_client_goes_all_the_way(server: Server, tmp_path: Path) -> None:
    for source in (ROOT / "tests" / "typescript").iterdir():
        shutil.copy(source, tmp_path)

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    programs = tmp_path / "node_modules" / ".bin"
    run("npm", "install", "--no-audit", "--no-fund", "--prefer-offline")
    run(programs / "openapi-typescript", contract(server, tmp_path), "--output", "api.ts")
    run(programs / "tsc", "--strict", "--target", "es2022", "--module", "nodenext", "client.ts")
    wav = "data:audio/wav;base64," + b64encode(SPEECH).decode()
    told = json.loads(run("node", "client.js", server.url, KEY, wav))
    assert told["refusal"]["status"] == 401
    (record,) = told["records"]
    assert record["URL for download"] == told["link"]
    assert (record["filename"], record["size"]) == ("speech.mp3", len(told["bytes"]))
    assert decoded(bytes(told["bytes"])).resembles_the_sine()
    assert (told["deleted"], told["left"]) == (204, [])

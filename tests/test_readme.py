import os
import re
import subprocess
import sys
from pathlib import Path

from support import ROOT, StartServer
from wav import decoded

# Not every machine has it, and it is not what is tested.
UUIDGEN = f"uuidgen() {{ {sys.executable} -c 'import uuid; print(uuid.uuid4())'; }}\n"


def transcript() -> str:
    """The README's shell blocks that call the service."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in blocks if re.search(r"\bcurl\b", block))


def test_pasted_commands_make_an_mp3_as_long_as_the_wav(
    start_server: StartServer, tmp_path: Path
) -> None:
    commands = transcript().replace("http://127.0.0.1:5000", start_server().url)
    # In a script of its own, curl has to show by its status what a reader would see.
    (tmp_path / ".curlrc").write_text('fail\nnoproxy = "*"\n')
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", UUIDGEN + commands],
        cwd=tmp_path,
        env={**os.environ, "CURL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "command not found" not in done.stderr
    [source] = tmp_path.glob("*.wav")
    mp3 = decoded(source.with_suffix(".mp3").read_bytes())
    assert len(mp3.samples) == len(decoded(source.read_bytes()).samples)

"""TLS to the database, whose certificate is of an authority of one's own.

The wheel's PostgreSQL has no TLS, so pgbouncer has it in its place, in the same protocol.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bouncer import pgbouncer
from support import Postgres, Server
from wav import SPEECH
from wire import readiness


class Certificates(NamedTuple):
    authority: Path
    certificate: Path  # of localhost
    key: Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True)


def certificates(directory: Path) -> Certificates:
    """Make a new authority, and have it certify localhost."""
    names = ("authority.pem", "authority.key", "server.pem", "server.key", "server.csr", "names")
    authority, authority_key, certificate, key, request, extensions = map(directory.joinpath, names)
    new = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new, "-keyout", authority_key, "-out", authority, "-subj", "/CN=own")
    openssl("req", *new, "-keyout", key, "-out", request, "-subj", "/CN=localhost")
    extensions.write_text("subjectAltName = DNS:localhost")
    signer = ("-CA", authority, "-CAkey", authority_key, "-CAcreateserial")
    openssl("x509", "-req", "-in", request, *signer, "-extfile", extensions, "-out", certificate)
    return Certificates(authority, certificate, key)


class Secured(NamedTuple):
    url: str
    own: Path
    strange: Path  # another authority

    def verified(self, authority: Path, host: str = "localhost") -> str:
        url = self.url.replace("127.0.0.1", host)
        return f"{url}?sslmode=verify-full&sslrootcert={authority}"


@pytest.fixture(scope="module")
def secured(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A database that talks to nobody but by TLS."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl")
    own, other = (certificates(tmp_path_factory.mktemp("tls")) for _ in range(2))
    owner = postgres.directory.stat()
    certificate, key = (
        shutil.copy(path, postgres.directory) for path in (own.certificate, own.key)
    )
    shutil.chown(key, owner.st_uid, owner.st_gid)
    files = f"client_tls_cert_file = {certificate}\nclient_tls_key_file = {key}"
    with pgbouncer(postgres, f"client_tls_sslmode = require\n{files}") as url:
        yield Secured(url, own.authority, other.authority)


def test_service_works_where_the_certificate_is_verified_in_full(secured: Secured) -> None:
    with Server({"DATABASE_URL": secured.verified(secured.own)}) as server:
        assert b"Xing" in server.convert(SPEECH)[:1000]
        assert readiness(server, 200)


def test_service_exits_with_a_line_where_the_certificate_is_not_what_it_must_be(
    secured: Secured,
) -> None:
    for url in (
        secured.verified(secured.strange),
        secured.verified(secured.own, "127.0.0.1"),  # it is localhost's
    ):
        with Server({"DATABASE_URL": url}) as server:
            assert server.process.wait(30) == 1
            [line] = server.log.splitlines()
            assert "DATABASE_URL" in line and "certificate" in line

"""Debian's pgbouncer between the service and PostgreSQL, in each of its modes."""

import pytest

from bouncer import pgbouncer
from support import Postgres, StartServer
from wav import decoded, wav


@pytest.mark.parametrize(
    "mode, options",
    [
        ("session", ""),
        ("transaction", "?statement_cache_size=0"),
        ("statement", "?statement_cache_size=0"),
    ],
)
def test_service_works_through_pgbouncer(
    postgres: Postgres, start_server: StartServer, mode: str, options: str
) -> None:
    with pgbouncer(postgres, f"pool_mode = {mode}") as url:
        server = start_server(DATABASE_URL=url + options)
        user = server.register()
        for _ in range(3):
            link = server.upload(user, wav()).headers["Location"]
            assert len(decoded(server.http.get(link).content).samples) == 11025
        listing = server.http.get(f"/api/records?id_user={user.id}", headers=user.bearer)
        assert len(listing.json()["records"]) == 3
        assert server.http.get("/readyz").status_code == 200
        assert server.http.delete("/api/registration/", headers=user.bearer).status_code == 204
        server.stop()

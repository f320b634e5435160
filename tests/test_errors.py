from collections.abc import Iterator

import pytest

from support import ROOT, UVICORN, Postgres, Server, curl, problem
from wav import decoded, wav

HOST = (*UVICORN, "--app-dir", str(ROOT / "tests" / "lib"), "host:app")
PREFIX = "/media/audio"


@pytest.fixture(scope="module")
def host(postgres: Postgres) -> Iterator[Server]:
    """An application in which the service is mounted at PREFIX."""
    with Server({"DATABASE_URL": postgres.create_database()}, HOST) as host:
        yield host
        host.stop()  # uvicorn ends by the signal and not with status 0


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/downloads", "/favicon.ico", "/api/%00"])
def test_unknown_path_is_a_problem(server: Server, host: Server, path: str) -> None:
    problem(server.http.get(path), 404)
    problem(host.http.get(PREFIX + path), 404)


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    "path, wrong, right",
    [
        ("/api/registration", ["GET", "PUT", "DELETE", "PATCH"], "POST"),
        ("/api/upload_audiorecord", ["GET", "PUT", "DELETE", "PATCH"], "POST"),
        ("/api/download", ["POST", "PUT", "PATCH"], "GET"),
    ],
)
def test_wrong_method_is_told_the_right_one(
    server: Server, host: Server, path: str, slash: str, wrong: list[str], right: str
) -> None:
    for method in wrong:
        for response in (
            server.http.request(method, path + slash),
            host.http.request(method, PREFIX + path + slash),
        ):
            problem(response, 405)
            assert right in response.headers["Allow"].split(", ")
            assert method not in response.headers["Allow"].split(", ")


@pytest.mark.parametrize("slash", ["", "/"])
def test_paths_answer_with_and_without_a_slash(server: Server, slash: str) -> None:
    user = server.register()
    problem(server.http.post("/api/registration" + slash, content=b""), 400)
    problem(server.http.post("/api/upload_audiorecord" + slash, content=b""), 415)
    link = server.upload(user, wav()).json()["URL for download"]
    path, _, parameters = link.partition("?")
    assert curl(f"{path}{slash}?{parameters}").status == 200


def test_mounted_service_works(host: Server) -> None:
    registration = curl("-d", '{"username": "Bob"}', f"{host.url}{PREFIX}/api/registration/")
    user = registration.json()
    fields = [f"{name}={value}" for name, value in user.items()] + ["file_wav=@-;filename=a.wav"]
    options = [option for field in fields for option in ("-F", field)]
    upload = curl(*options, f"{host.url}{PREFIX}/api/upload_audiorecord/", stdin=wav())
    link = upload.json()["URL for download"]
    assert link.startswith(f"{host.url}{PREFIX}/api/download?id_record=")
    assert len(decoded(curl(link).body).samples) == 11025


def test_mounted_service_answers_mistakes_as_problems(host: Server) -> None:
    problem(host.http.post(PREFIX + "/api/registration/", content=b"{"), 400)
    problem(host.http.post(PREFIX + "/api/registration/", json={}), 422)
    problem(host.http.post(PREFIX + "/api/upload_audiorecord/"), 415)
    problem(host.http.get(PREFIX + "/api/download"), 404)

import pytest

from support import Server, problem
from wav import SPEECH
from wire import link_of


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/downloads", "/favicon.ico", "/api/%00"])
def test_unknown_path_is_a_problem(server: Server, path: str) -> None:
    problem(server.http.get(path), 404)


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    "path, wrong, right",
    [
        ("/api/registration", ["GET", "PUT", "PATCH"], "POST"),
        ("/api/upload_audiorecord", ["GET", "PUT", "DELETE", "PATCH"], "POST"),
        ("/api/download", ["POST", "PUT", "PATCH"], "GET"),
    ],
)
def test_wrong_method_is_told_the_right_one(
    server: Server, path: str, slash: str, wrong: list[str], right: str
) -> None:
    for method in wrong:
        response = server.http.request(method, path + slash)
        problem(response, 405)
        assert right in response.headers["Allow"].split(", ")
        assert method not in response.headers["Allow"].split(", ")


@pytest.mark.parametrize("slash", ["", "/"])
def test_paths_answer_with_and_without_a_slash(server: Server, slash: str) -> None:
    user = server.register()
    problem(server.http.post("/api/registration" + slash, content=b""), 400)
    problem(server.http.post("/api/upload_audiorecord" + slash, content=b""), 415)
    path, _, parameters = link_of(server.upload(user, SPEECH)).partition("?")
    assert server.http.get(f"{path}{slash}?{parameters}").status_code == 200
    listing = server.http.get(f"/api/records{slash}?id_user={user.id}", headers=user.bearer)
    assert listing.status_code == 200

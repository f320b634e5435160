import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

import service
from support import ROOT, Server, StartServer
from wav import wav

DOCUMENT = ROOT / "openapi.json"
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")

# For longer runs by hand; each seed tries other requests.
EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "40"))
SEED = int(os.environ.get("CONTRACT_SEED", "1"))

CONFIGURATION = """
base-url = "{url}"
hooks = "{hooks}"
seed = {seed}
generation.database = "none"
generation.max-examples = {examples}
auth.openapi.bearer.bearer = "{token}"

# What exists, for most of the requests.
[dictionaries]
users = {{ values = [{id_user}] }}
records = {{ values = ["{kept}"] }}
deletable = {{ values = {deletable} }}
ranges = {{ values = ["bytes=0-99", "bytes=100-", "bytes=-100", "bytes=99999999-"] }}
pages = {{ values = ["9999-12-31T00:00:00Z_{kept}"] }}

[parameters]
"query.id_user" = {{ dictionary = "users", probability = 0.7 }}
"query.id_record" = {{ dictionary = "records", probability = 0.7 }}
"query.before" = {{ dictionary = "pages", probability = 1.0 }}
"header.Range" = {{ dictionary = "ranges", probability = 0.5 }}
"body.id_user" = {{ dictionary = "users", probability = 0.9 }}

[[operations]]
include-operation-id = "delete"
parameters."query.id_record" = {{ dictionary = "deletable", probability = 0.3 }}

# The token may be in the form, where it is missing like any other field.
[[operations]]
include-operation-id = "upload"
checks.ignored_auth.enabled = false
checks.missing_required_header.enabled = false

# A precondition may fail although it is well formed, and a range may lie outside.
[[operations]]
include-operation-id = ["download", "inspect", "delete", "contract", "usage"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 404, 412, 416]
"""


@pytest.fixture
def document() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DOCUMENT.read_text())
    return content


def responses(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Method, path and status of every response."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                for status in operation["responses"]:
                    yield method.upper(), path, status


def examples(node: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each example beside its schema."""
    if isinstance(node, dict) and "schema" in node and "example" in node:
        yield node["schema"], node["example"]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from examples(child)


def test_document_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(document).validate()


def test_examples_fit_their_schemas(document: dict[str, Any]) -> None:
    for schema, example in examples(document):
        OAS31Validator({**schema, "components": document["components"]}).validate(example)


def test_document_has_every_path_of_the_service(document: dict[str, Any]) -> None:
    routes = {getattr(route, "path", "").rstrip("/") for route in service.app.routes}
    assert {path.rstrip("/") for path in document["paths"]} == routes


def test_patterns_are_anchored_at_both_ends() -> None:
    """Generators search for them or match the whole, each in its own way."""
    patterns = re.findall(r'"pattern": (".*?[^\\]")', DOCUMENT.read_text())
    assert patterns
    for pattern in map(json.loads, patterns):
        assert pattern.startswith("^") and pattern.endswith("$")


def test_parameters_and_fields_have_names_of_their_own(document: dict[str, Any]) -> None:
    """Generators make arguments of one function of them."""
    upload = document["paths"]["/api/upload_audiorecord/"]["post"]
    names = {parameter["name"] for parameter in upload["parameters"]}
    assert not names & document["components"]["schemas"]["Upload"]["properties"].keys()


def test_service_serves_the_document_with_its_own_address(
    server: Server, document: dict[str, Any]
) -> None:
    response = server.http.get("/openapi.json")
    assert response.headers["Content-Type"] == "application/json"
    served = response.json()
    assert [each["url"] for each in served.pop("servers")] == [server.url]
    del document["servers"]
    assert served == document


@pytest.mark.slow
def test_service_keeps_the_contract(
    start_server: StartServer, document: dict[str, Any], tmp_path: Path
) -> None:
    server = start_server()
    user = server.register()
    links = [server.upload(user, wav()).json()["URL for download"] for _ in range(10)]
    kept, *deletable = [re.findall("id_record=([^&]*)", link)[0] for link in links]
    configuration = CONFIGURATION.format(
        url=server.url,
        hooks=ROOT / "tests" / "lib" / "contract.py",
        examples=EXAMPLES,
        seed=SEED,
        token=user.token,
        id_user=user.id,
        kept=kept,
        deletable=json.dumps(deletable),
    )
    (tmp_path / "schemathesis.toml").write_text(configuration)
    credentials = {"USER_TOKEN": user.token}
    paths = {"PYTHONPATH": str(ROOT / "tests" / "lib"), "NO_PROXY": "*"}
    done = subprocess.run(
        [SCHEMATHESIS, "run", "--no-color", DOCUMENT],
        cwd=tmp_path,
        env={**os.environ, **credentials, **paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = set(re.findall(r'"([A-Z]+) ([^ ?]+)\S* HTTP/1.1" (\d+)', server.log))
    assert {response for response in responses(document) if response[2] < "300"} <= answers

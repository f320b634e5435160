"""Who may ask, usernames and pages of other origins, and where they think they ask."""

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service import base_url, checked_username, create_app, refuse_other_origins

# Usernames


@pytest.mark.parametrize(
    "username, stored",
    [
        ("Bob", "Bob"),
        (" Trimmed\t", "Trimmed"),
        ("\u2003Bob\u2003", "Bob"),
        ("a b", "a b"),
        ("x" * 255, "x" * 255),
        (" " * 700 + "ï" * 255, "ï" * 255),
        ("Zoe\u0308", "Zoë"),
        ("e\u0301" * 255, "é" * 255),
        ("\u1112\u1161\u11ab" * 255, "한" * 255),
        ("'; DROP TABLE users; --", "'; DROP TABLE users; --"),
        ("👩‍🚀", "👩‍🚀"),
    ],
)
def test_username_is_stored_composed_and_trimmed(username: str, stored: str) -> None:
    assert checked_username(username) == stored


@pytest.mark.parametrize(
    "username, detail",
    [
        *(
            (text, "255")
            for text in ("", " \t\u2003", "x" * 256, "e\u0301" * 256, " " * 5000 + "x")
        ),
        ("a" + "\u0301" * 9_000 + "\u0316" * 9_000, "255"),  # a second's work to normalise
        *((f"a{code}b", "control") for code in ("\n", "\0", "\x7f", "\x85", "\ud800", "\udfff")),
    ],
)
def test_username_that_is_unfit_is_refused(username: str, detail: str) -> None:
    with pytest.raises(HTTPException) as refused:
        checked_username(username)
    assert refused.value.status_code == 422
    assert "username" in refused.value.detail and detail in refused.value.detail


# Other origins


def request(method: str, *sites: bytes) -> Request:
    headers = [(b"sec-fetch-site", site) for site in sites]
    return Request({"type": "http", "method": method, "headers": headers})


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("site", [b"cross-site", b"same-site", b"unheard-of", b""])
def test_page_of_another_origin_may_not_change_anything(method: str, site: bytes) -> None:
    with pytest.raises(HTTPException) as refused:
        refuse_other_origins(request(method, site), ())
    assert refused.value.status_code == 403


@pytest.mark.parametrize(
    "asking",
    [
        *(request(method) for method in ("GET", "POST", "DELETE")),
        *(request(method, b"none") for method in ("POST", "DELETE")),
        *(request(method, b"same-origin") for method in ("POST", "DELETE")),
        *(request(method, b"cross-site") for method in ("GET", "HEAD")),
    ],
)
def test_others_may_ask(asking: Request) -> None:
    refuse_other_origins(asking, ())


# Links


def test_query_need_not_be_utf8_for_a_link() -> None:
    """Servers of HTTP/2 pass it on as it is."""
    scope = {
        "type": "http",
        "app": create_app(),
        "scheme": "https",
        "path": "/",
        "query_string": b"\xff",
        "headers": [(b"host", b"example.org")],
    }
    assert base_url(Request(scope)) == "https://example.org"

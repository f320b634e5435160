"""What a request says: ranges, preconditions, numbers."""

from datetime import UTC, datetime, timedelta

import pytest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from service import parse_range, precondition, whole_number

WHOLE = None
NOTHING = range(0)


# The Range header, for ten bytes


@pytest.mark.parametrize(
    "header, expected",
    [
        ("bytes=0-4", range(0, 5)),
        ("bytes=2-2", range(2, 3)),
        ("bytes=0-9", range(10)),
        ("bytes=5-", range(5, 10)),
        ("bytes=9-", range(9, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-10", range(10)),
        ("BYTES=007-08", range(7, 9)),
        # reaching past the end
        ("bytes=5-10", range(5, 10)),
        ("bytes=5-99999999999999999999", range(5, 10)),
        ("bytes=-11", range(10)),
        ("bytes=-99999999999999999999", range(10)),
        # nothing of it
        ("bytes=10-", NOTHING),
        ("bytes=10-10", NOTHING),
        ("bytes=99999999999999999999-", NOTHING),
        ("bytes=-0", NOTHING),
        # ignored: several ranges, other units, malformed ones
        ("bytes=0-1,4-5", WHOLE),
        ("bytes=0-1, -1", WHOLE),
        ("items=0-4", WHOLE),
        ("bytes", WHOLE),
        ("bytes=", WHOLE),
        ("bytes=-", WHOLE),
        ("bytes=4", WHOLE),
        ("bytes=4-2", WHOLE),
        ("bytes=--2", WHOLE),
        ("bytes=+1-2", WHOLE),
        ("bytes=1-2-3", WHOLE),
        ("bytes=1.0-2", WHOLE),
        ("bytes=a-f", WHOLE),
        ("bytes=0-4\n", WHOLE),
        ("bytes=\uff11-\uff12", WHOLE),
        ("bytes=0-" + "9" * 5000, WHOLE),
        ("0-4", WHOLE),
        ("", WHOLE),
    ],
)
def test_parse_range(header: str, expected: range | None) -> None:
    assert parse_range(header, 10) == expected


# Preconditions, for the entity tag "now"

NOW = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)
THEN = "Sun, 06 Nov 1994 08:49:36 GMT"
SAME = "Sun, 06 Nov 1994 08:49:37 GMT"
LATER = "Sun, 06 Nov 1994 08:49:38 GMT"


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({}, 200),
        # If-Match compares strongly
        ({"If-Match": '"now"'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"then", "now"'}, 200),
        ({"If-Match": 'W/"then","now"'}, 200),
        ({"If-Match": '"then"'}, 412),
        ({"If-Match": 'W/"now"'}, 412),
        ({"If-Match": '"*"'}, 412),
        ({"If-Match": "now"}, 412),
        # If-None-Match weakly
        ({"If-None-Match": '"now"'}, 304),
        ({"If-None-Match": 'W/"now"'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"then", "now"'}, 304),
        ({"If-None-Match": 'W/"a,b",W/"now"'}, 304),
        ({"If-None-Match": '"then"'}, 200),
        ({"If-None-Match": '"*"'}, 200),
        ({"If-None-Match": "now"}, 200),
        # dates
        ({"If-Modified-Since": LATER}, 304),
        ({"If-Modified-Since": SAME}, 304),
        ({"If-Modified-Since": THEN}, 200),
        ({"If-Unmodified-Since": LATER}, 200),
        ({"If-Unmodified-Since": SAME}, 200),
        ({"If-Unmodified-Since": THEN}, 412),
        # in their two obsolete forms
        ({"If-Modified-Since": "Sunday, 06-Nov-94 08:49:37 GMT"}, 304),
        ({"If-Modified-Since": "Sunday, 06-Nov-94 08:49:36 GMT"}, 200),
        ({"If-Modified-Since": "Sun Nov  6 08:49:37 1994"}, 304),
        ({"If-Modified-Since": "Sun Nov  6 08:49:36 1994"}, 200),
        # tags come before dates
        ({"If-Match": '"now"', "If-Unmodified-Since": THEN}, 200),
        ({"If-Match": '"then"', "If-Unmodified-Since": LATER}, 412),
        ({"If-None-Match": '"then"', "If-Modified-Since": LATER}, 200),
        ({"If-None-Match": '"now"', "If-Modified-Since": THEN}, 304),
        # and If-Match before If-None-Match
        ({"If-Match": '"then"', "If-None-Match": '"now"'}, 412),
        ({"If-Match": '"now"', "If-None-Match": '"now"'}, 304),
        ({"If-Match": '"now"', "If-Modified-Since": SAME}, 304),
        ({"If-Unmodified-Since": SAME, "If-None-Match": '"now"'}, 304),
        ({"If-Unmodified-Since": THEN, "If-None-Match": '"now"'}, 412),
        # a Range is not theirs
        ({"If-Range": '"then"', "Range": "bytes=0-4"}, 200),
    ],
)
def test_precondition(headers: dict[str, str], expected: int) -> None:
    assert status(Headers(headers)) == expected


def status(headers: Headers, modified: datetime = NOW) -> int:
    """How a GET with these headers is answered."""
    try:
        return precondition("GET", headers, '"now"', modified)
    except HTTPException as refusal:
        return refusal.status_code


@pytest.mark.parametrize("name", ["If-Modified-Since", "If-Unmodified-Since"])
@pytest.mark.parametrize(
    "date",
    [
        "",
        "0",
        "-1",
        "then",
        "1994-11-06T08:49:37Z",
        "784111777",
        "Sun, 06 Nov 1994",
        "Sun, 66 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 +0100",
        "Sun, 06 Nov 99999999999999999999 08:49:37 GMT",
        f"{SAME}, {SAME}",
    ],
)
def test_precondition_of_a_malformed_date_is_ignored(name: str, date: str) -> None:
    modified = NOW + timedelta(days=1) if name == "If-Unmodified-Since" else NOW
    assert status(Headers({name: date}), modified) == 200


@pytest.mark.parametrize("name, expected", [("if-match", 200), ("if-none-match", 304)])
def test_precondition_may_have_several_lines(name: str, expected: int) -> None:
    lines = [(name.encode(), b'"then"'), (name.encode(), b'"now"')]
    assert status(Headers(raw=lines)) == expected


# Numbers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0", 0),
        ("7", 7),
        ("007", 7),
        ("9" * 18, 10**18 - 1),
        *((text, None) for text in ("", "-1", "+1", " 1", "1 ", "1\n", "1.0", "1e3", "1_0", "0x1")),
        *((text, None) for text in ("one", "\0", "\u0661", "\uff11", "1" * 19, "9" * 5000)),
    ],
)
def test_whole_number(text: str, expected: int | None) -> None:
    assert whole_number(text) == expected

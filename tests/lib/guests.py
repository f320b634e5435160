"""Hosts with guests of other kinds than those in mounts.py."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import service


def limits() -> ASGIApp:
    """Two services of different limits, and a page of the host's with its own metrics."""
    from prometheus_client import make_asgi_app

    small = service.create_app(max_upload_bytes=1000, mp3_quality=9, max_encoders=3)
    large = service.create_app(registration_key="key", max_encoders=4)
    routes = [
        Mount("/small", small),
        Mount("/large", large),
        Mount("/of-the-host", make_asgi_app()),
    ]
    return Starlette(routes=routes)


def one_line() -> ASGIApp:
    """A service that has only been mounted."""

    async def hello(request: Request) -> Response:
        return PlainTextResponse("a page of the host")

    return Starlette(routes=[Route("/hello", hello), Mount("/audio", service.app)])

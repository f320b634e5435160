"""Applications that mount the service as their authors would.

Those of the frameworks have a page of their own at /hello, a page of their own for what is not
there, the service at /audio by nothing but a mount line, and at /managed another one that starts
and stops with the host.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

import service

HELLO = "a page of the host"
MISSING = "the host's page for what is not there"

managed = service.create_app()


@asynccontextmanager
async def lifespan(host: object = None) -> AsyncIterator[None]:
    async with service.lifespan(managed):
        yield


async def hello(request: Request) -> Response:
    return PlainTextResponse(HELLO)


async def missing(request: Request, error: Exception) -> Response:
    return PlainTextResponse(MISSING, 404)


def starlette() -> ASGIApp:
    routes = [
        Route("/hello", hello),
        Route("/api/download", hello, name="download"),  # a name that the service may use
        Mount("/audio", service.app),
        Mount("/named", service.app, name="audio"),
        Mount("/outer", routes=[Mount("/inner", service.app, name="inner")], name="outer"),
        Mount("/für alle", service.app),
        Mount("/{tenant}/audio", service.app),
        Mount("/managed", managed),
    ]
    return Starlette(routes=routes, exception_handlers={404: missing}, lifespan=lifespan)


def fastapi() -> ASGIApp:
    from fastapi import FastAPI

    app = FastAPI(exception_handlers={404: missing}, lifespan=lifespan)
    app.mount("/audio", service.app)
    app.mount("/managed", managed)
    app.add_api_route("/hello", hello)
    return app


def litestar() -> Any:
    from litestar import Litestar, MediaType, asgi, get
    from litestar import Request as LitestarRequest
    from litestar import Response as LitestarResponse

    @get("/hello", media_type=MediaType.TEXT, sync_to_thread=False)
    def page() -> str:
        return HELLO

    def not_there(request: LitestarRequest[Any, Any, Any], error: Exception) -> Any:
        return LitestarResponse(MISSING, status_code=404, media_type=MediaType.TEXT)

    return Litestar(
        [
            page,
            asgi("/audio", is_mount=True, copy_scope=True)(service.app),
            asgi("/managed", is_mount=True, copy_scope=True)(managed),
        ],
        exception_handlers={404: not_there},
        lifespan=[lifespan],
    )


def quart() -> Any:
    from hypercorn.middleware import DispatcherMiddleware
    from quart import Quart

    app = Quart("host")

    @app.get("/hello")
    async def page() -> str:
        return HELLO

    @app.errorhandler(404)
    async def not_there(error: Exception) -> tuple[str, int]:
        return MISSING, 404

    # This passes the lifespan on to each of them, also to those that would do without.
    applications: dict[str, Any] = {"/audio": service.app, "/managed": managed, "": app}
    return DispatcherMiddleware(applications)


def django() -> ASGIApp:
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, HttpResponse
    from django.urls import path

    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(HELLO, content_type="text/plain")

    def not_there(request: HttpRequest, exception: Exception) -> HttpResponse:
        return HttpResponse(MISSING, status=404, content_type="text/plain")

    class Urls:
        urlpatterns = (path("hello", page),)
        handler404 = staticmethod(not_there)

    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=Urls, SECRET_KEY="secret")
    routes = [
        Mount("/audio", service.app),
        Mount("/managed", managed),
        Mount("/", get_asgi_application()),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def arguments() -> ASGIApp:
    """Services with a database, a base URL and a pool that the host gives them."""
    other = service.create_app(
        database_url=os.environ["OTHER_DATABASE_URL"], base_url="https://audio.example/mp3/"
    )

    @asynccontextmanager
    async def lifespan(host: Starlette) -> AsyncIterator[None]:
        url = os.environ["POOL_DATABASE_URL"]
        async with asyncpg.create_pool(url, command_timeout=3) as pool:
            pooled = service.create_app(pool=pool)
            host.mount("/pooled", pooled)
            async with service.lifespan(pooled):
                yield
            print("of the pool:", await pool.fetchval("SELECT 'still open'"))

    routes = [Mount("/one", service.app), Mount("/other", other)]
    return Starlette(routes=routes, lifespan=lifespan)


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["X-Passed"] = "yes"
        return response


def middleware() -> ASGIApp:
    in_front = [Middleware(Passing), Middleware(GZipMiddleware, minimum_size=1)]
    return Starlette(routes=[Mount("/", service.app)], middleware=in_front)

"""An application that mounts the service, and has names like those that the service may use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import service


async def download(request: Request) -> PlainTextResponse:
    return PlainTextResponse("the host's own")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with service.lifespan(service.app):
        yield


app = Starlette(
    routes=[
        Route("/api/download", download, name="download"),
        Mount("/media", routes=[Mount("/audio", service.app, name="audio")], name="media"),
    ],
    lifespan=lifespan,
)

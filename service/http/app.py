"""The application: its layers, the routes of operation, and routes that do not exist."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from gma.model.config import Place, dotted, problems
from gma.service.errors import MethodNotAllowed, NotFound, Validation
from gma.service.gateway.allowance import Allowance
from gma.service.gateway.contract import (
    Health,
    Info,
    ListedModel,
    ModelList,
    ModelName,
    SeveralInfo,
)
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.gateway.sessions import Sessions
from gma.service.http import protocols
from gma.service.http.auth import Authorized
from gma.service.http.batch import add_batch
from gma.service.http.documents import TIMING_HEADERS, add_documents
from gma.service.http.keys_file import KeysFile
from gma.service.http.media import shown
from gma.service.http.middleware import REQUEST_ID, Requests, asked
from gma.service.http.openapi import (
    INFO_RESPONSES,
    MODEL_RESPONSES,
    UNREADY_RESPONSES,
    Described,
)
from gma.service.http.page import add_page
from gma.service.http.readiness import Readiness
from gma.service.http.sessions import OFFSET, add_sessions
from gma.service.observe import metrics, traces

MOST_PROBLEMS = 3
"""How many an answer tells of a query that is not valid: it repeats some of what was sent."""


def create_app(
    gateway: Gateway, *, stamp_ids: bool = True, clock: Callable[[], float] = time.time
) -> FastAPI:
    """The application that serves `gateway`.

    `stamp_ids`: put the request's id into answers; not under Ray Serve, whose proxy does it.
    `clock`: seconds since 1970, by which sessions expire.
    Raises ValueError if the keys file of the gateway's settings can't be used.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(gateway.watch_memory())
        sweeping = asyncio.create_task(gateway.sweep())
        await gateway.models.begin()
        keeping = asyncio.create_task(gateway.models.keep())
        traces.start()
        yield
        watching.cancel()
        sweeping.cancel()
        keeping.cancel()
        await gateway.in_thread(traces.stop)

    settings = gateway.settings
    app = Described(
        title="Long-document classification",
        description="Classifies texts of any length with Gaussian mixture attention.",
        version=version("gma-service"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        exception_handlers={HTTPException: _no_route, RequestValidationError: _not_valid},
    )
    if settings.api_keys_file:
        app.asks_for_keys = True
        keys = KeysFile(settings.api_keys_file, default=Allowance.default(settings))
        app.add_middleware(Authorized, keys=keys)
    app.add_middleware(
        Requests, stamp_ids=stamp_ids, prefix=settings.path_prefix, form_of=protocols.form_of
    )
    if settings.cors_origins:
        # Outermost: browsers ask without a key, and hide errors that do not name their page.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after", OFFSET, *TIMING_HEADERS.values()],
        )
    check_ready = Readiness(gateway)
    add_operations(app, gateway, check_ready)
    add_models(app, gateway)
    add_page(app, settings.path_prefix)
    add_documents(app, gateway)
    add_batch(app, gateway)
    protocols.add(app, gateway, check_ready)
    add_sessions(app, gateway, Sessions(gateway, clock))
    return app


def add_operations(app: FastAPI, gateway: Gateway, check_ready: Readiness) -> None:
    """Give `app` the routes for those who operate the service."""

    @app.get("/health", responses=UNREADY_RESPONSES, tags=["operation"])
    async def health() -> Health:
        """Whether documents are answered: 200 once each model has a warm worker, until the service
        drains."""
        await check_ready()
        return Health(status="ok")

    @app.get("/info", responses=INFO_RESPONSES, tags=["operation"])
    async def info(model: ModelName | None = None) -> Info | SeveralInfo:
        """What runs here: model, labels, limits, backend, versions. Of several models, what is true
        of all, unless one is named."""
        models = gateway.models
        if model is None and len([*models]) > 1:
            return SeveralInfo(models=models.names, limits=gateway.limits)
        return await gateway.info(models.choose(model))

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def prometheus() -> Response:
        """Metrics of every process on this machine, as Prometheus text."""
        content = await gateway.in_thread(metrics.scrape)
        return Response(content, media_type=metrics.CONTENT_TYPE_LATEST)


def add_models(app: FastAPI, gateway: Gateway) -> None:
    """Give `app` the routes that tell which models there are."""

    def listed(model: Model) -> ListedModel:
        return ListedModel(
            id=model.name, object="model", owned_by="gma", limits=gateway.limits, **model.info
        )

    @app.get("/v1/models", summary="The models that there are", tags=["models"])
    async def models() -> ModelList:
        """Their names, labels and limits. OpenAI's clients read it too."""
        return ModelList(object="list", data=[*map(listed, gateway.models)])

    @app.get(
        "/v1/models/{model}", summary="One of them", responses=MODEL_RESPONSES, tags=["models"]
    )
    async def one(model: ModelName) -> ListedModel:
        """The same of one model."""
        return listed(gateway.models.choose(model))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = asked(request.scope)
    if error.status_code == 405:
        allow = ", ".join([*_methods(request), "OPTIONS"])
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allow})
        raise MethodNotAllowed(what, allow)
    raise NotFound(f"there is no {what}: /docs lists what there is")


def _methods(request: Request) -> Iterator[str]:
    """Of all routes of a request's path: each has some."""
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield from ("GET", "HEAD") if method == "GET" else (method,)


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    raise Validation(problems(error, name=_shown_place, most=MOST_PROBLEMS))


def _shown_place(place: Place) -> str:
    return shown(dotted(place))

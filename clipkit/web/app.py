"""The ASGI application: routes of the HTTP API and of the search page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from clipkit import __version__
from clipkit.errors import ClipkitError
from clipkit.web.collection import ServedIndex
from clipkit.web.images import ThumbnailCache
from clipkit.web.metrics import Monitor
from clipkit.web.schemas import (
    MAX_HITS,
    ClassifyRequest,
    ClassifyResponse,
    Health,
    Info,
    Page,
    Problem,
    QueryTerms,
    RequestError,
    SearchQuery,
    SearchResponse,
)
from clipkit.web.security import MAX_UPLOAD, Guard
from clipkit.web.service import Service

POLL_SECONDS = 2.0
"""Interval between checks for a newer state of the index."""
CACHE_SECONDS = 600
"""How long a browser may cache an image."""
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "The request cannot be read.",
        401: "The token is missing or wrong.",
        403: "The request comes from another site.",
        404: "The image does not exist.",
        408: "The request was sent too slowly.",
        413: "The request or image is too large.",
        415: "The file is not a readable image.",
        421: "The Host header is not a name of this server.",
        422: "The request is not valid; `detail` says why.",
        503: "The server is overloaded or shutting down.",
    }.items()
}
_IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}}}
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "The content of an image file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
KeyPath = Annotated[str, Path(description="Key of an image: its path in the indexed folder.")]


def create_app(
    served: ServedIndex,
    thumbnails: ThumbnailCache,
    *,
    hosts: Iterable[str] | None = None,
    token: str | None = None,
) -> ASGIApp:
    """Create the ASGI application of the server.

    Args:
        served: the served index.
        thumbnails: cache for thumbnails.
        hosts: as for ``Guard``.
        token: as for ``Guard``.
    """
    monitor = Monitor()
    service = Service(served, thumbnails, monitor)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(service))
        yield
        watching.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="clipkit",
        version=__version__,
        description="Search a collection of images by text and by image.",
        lifespan=lifespan,
        docs_url=None,  # the docs page would load scripts from another site
        redoc_url=None,
        responses=_REFUSALS,
    )
    _add_search(app, service)
    _add_images(app, service)
    _add_facts(app, service)
    _add_page(app)
    app.add_exception_handler(ClipkitError, _on_clipkit_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    return monitor.around(Guard(app, hosts=hosts, token=token))


async def _watch(service: Service) -> None:
    while True:
        await service.refresh()
        await asyncio.sleep(POLL_SECONDS)


def _add_search(app: FastAPI, service: Service) -> None:
    @app.get("/search", tags=["search"])
    async def search(query: Annotated[SearchQuery, Query()]) -> SearchResponse:
        """Images that match texts and images, best first."""
        return await service.search(service.collection, query)

    @app.post("/search", tags=["search"], openapi_extra=_UPLOAD)
    async def search_by_upload(
        request: Request, terms: Annotated[QueryTerms, Query()]
    ) -> SearchResponse:
        """Search with an uploaded image; the response contains a name to search with it again."""
        collection = service.collection
        name = await service.upload(collection, await request.body())
        return await service.search(collection, SearchQuery(image=name, **terms.model_dump()))

    @app.get("/similar/{key:path}", tags=["search"])
    async def similar(key: KeyPath, page: Annotated[Page, Query()]) -> SearchResponse:
        """Images similar to an image of the index, without that image."""
        collection = service.collection
        collection.row(key)
        return await service.search(collection, SearchQuery(like=[key], **page.model_dump()))

    @app.post("/classify", tags=["classify"])
    async def classify(asked: ClassifyRequest) -> ClassifyResponse:
        """Probabilities of labels for images of the index, or for an uploaded image."""
        return await service.classify(service.collection, asked)


def _add_images(app: FastAPI, service: Service) -> None:
    @app.get("/image/{key:path}", tags=["images"], response_class=Response, responses=_IMAGE)
    async def image(key: KeyPath) -> Response:
        """The original image; formats that browsers cannot display are converted to JPEG."""
        collection = service.collection
        collection.row(key)
        data, kind = await service.worker.run(lambda: collection.images.for_browser(key))
        # An image opened in its own tab must not load or run anything.
        return _image(data, kind, {"content-security-policy": "default-src 'none'; sandbox"})

    @app.get("/thumb/{key:path}", tags=["images"], response_class=Response, responses=_IMAGE)
    async def thumb(key: KeyPath) -> Response:
        """The JPEG thumbnail of an image."""
        collection = service.collection
        collection.row(key)
        data = await service.worker.thumbnail(collection.images, key)
        service.monitor.thumbnail_bytes.set(service.worker.thumbnails.used)
        return _image(data, "image/jpeg")

    @app.get("/upload/{name}", tags=["images"], response_class=Response, responses=_IMAGE)
    async def upload(name: str) -> Response:
        """The JPEG thumbnail of an uploaded image."""
        fingerprint = service.collection.encoder.model.fingerprint
        return _image(service.uploads.get(name, fingerprint).jpeg, "image/jpeg")


def _image(data: bytes, kind: str, headers: dict[str, str] | None = None) -> Response:
    cached = {"cache-control": f"private, max-age={CACHE_SECONDS}"}
    return Response(data, media_type=kind, headers={**cached, **(headers or {})})


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/info", tags=["facts"])
    async def info() -> Info:
        """Information about the served index."""
        collection = service.collection
        manifest, calibration = collection.index.manifest, collection.index.calibration
        missing = await asyncio.to_thread(lambda: collection.missing)  # may open tables
        return Info(
            name=service.served.path.name,
            count=len(collection),
            model=str(collection.index.model),
            spec=collection.index.spec,
            created=manifest.created,
            clipkit=__version__,
            missing=missing,
            calibrated=calibration is not None and calibration.gives_probabilities,
            columns=collection.columns,
            max_hits=MAX_HITS,
            max_upload=MAX_UPLOAD,
        )

    @app.get("/health", tags=["facts"])
    async def health() -> Health:
        """Whether the server is running; does not require a token."""
        return Health(status="ok")

    @app.get("/metrics", tags=["facts"], response_class=Response, responses=_TEXT)
    async def metrics() -> Response:
        """Request counts, latencies and batch sizes in Prometheus text format."""
        return Response(service.monitor.render(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    page = (resources.files("clipkit.web") / "static" / "index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(packages=[("clipkit.web", "static")]))


async def _on_clipkit_error(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 422
    return JSONResponse({"detail": str(error)}, status)


async def _on_invalid_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)

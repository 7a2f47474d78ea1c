"""The application: which address gives what."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass
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
from clipkit.web.batching import Vectors
from clipkit.web.collection import Collection, Current
from clipkit.web.images import ThumbCache, Work
from clipkit.web.metrics import Monitor
from clipkit.web.schemas import (
    MOST_HITS,
    Answer,
    Classification,
    Classify,
    ColumnInfo,
    Health,
    Info,
    Page,
    Problem,
    Search,
    Terms,
)
from clipkit.web.security import MAX_UPLOAD, Guard, RequestError
from clipkit.web.service import Answerer

POLL_SECONDS = 2.0
"""How often the index is looked at for a newer state."""
KEEP_SECONDS = 600
"""How long a browser may show a picture again without asking."""
STATIC = resources.files("clipkit.web") / "static"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "The request cannot be read.",
        401: "The token is missing.",
        403: "Not for this request.",
        404: "There is no such picture.",
        408: "The request was sent too slowly.",
        413: "Too large.",
        415: "No picture that can be read.",
        421: "Not a name of this server.",
        422: "One sentence says what is wrong with it.",
        503: "Too much at a time.",
    }.items()
}
_PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}}}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "A picture file, as it is.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
KeyPath = Annotated[str, Path(description="Key of a picture: its path in the indexed folder.")]


@dataclass
class Service:
    """What the routes work with."""

    current: Current
    answerer: Answerer
    work: Work
    monitor: Monitor

    @property
    def collection(self) -> Collection:
        """What is served now."""
        return self.current.collection

    async def refresh(self) -> None:
        """Take over a newer state of the index, if there is one; failing, keep the old."""
        try:
            fresh = await asyncio.to_thread(self.current.refresh)
        except Exception as error:
            self.monitor.reloads.labels("failed").inc()
            print(f"the index has changed and cannot be opened: {error}", file=sys.stderr)
            return
        if fresh:
            self.monitor.reloads.labels("done").inc()
        self.monitor.pictures.set(len(self.collection))


def create_app(
    current: Current,
    thumbs: ThumbCache,
    *,
    hosts: Iterable[str] | None = None,
    token: str | None = None,
) -> ASGIApp:
    """The whole server as an ASGI application.

    Args:
        current: what is served.
        thumbs: where thumbnails are kept.
        hosts: as for ``Guard``.
        token: as for ``Guard``.
    """
    monitor = Monitor()
    work = Work(thumbs)
    answerer = Answerer(Vectors(monitor.batches.observe), work)
    service = Service(current, answerer, work, monitor)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(service))
        yield
        watching.cancel()
        await asyncio.to_thread(answerer.close)

    app = FastAPI(
        title="clipkit",
        version=__version__,
        description="Search a collection of pictures by words and by pictures.",
        lifespan=lifespan,
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        responses=_REFUSALS,
    )
    _add_searching(app, service)
    _add_pictures(app, service)
    _add_facts(app, service)
    _add_page(app)
    app.add_exception_handler(ClipkitError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    return monitor.around(Guard(app, hosts=hosts, token=token))


async def _watch(service: Service) -> None:
    while True:
        await service.refresh()
        await asyncio.sleep(POLL_SECONDS)


def _add_searching(app: FastAPI, service: Service) -> None:
    answerer = service.answerer

    @app.get("/search", tags=["search"])
    async def search(asked: Annotated[Search, Query()]) -> Answer:
        """Pictures that fit words, pictures, or both, less what is not wanted."""
        return await answerer.search(service.collection, asked)

    @app.post("/search", tags=["search"], openapi_extra=_UPLOAD)
    async def search_with_picture(request: Request, asked: Annotated[Terms, Query()]) -> Answer:
        """The same with a picture that is sent; the answer gives a name to ask for it again."""
        collection = service.collection
        name = await answerer.take(collection, await request.body())
        return await answerer.search(collection, Search(image=name, **asked.model_dump()))

    @app.get("/similar/{key:path}", tags=["search"])
    async def similar(key: KeyPath, asked: Annotated[Page, Query()]) -> Answer:
        """Pictures like one of the index, which itself is left out."""
        collection = service.collection
        collection.row(key)
        return await answerer.search(collection, Search(like=[key], **asked.model_dump()))

    @app.post("/classify", tags=["classify"])
    async def classify(asked: Classify) -> Classification:
        """Which of some labels fits pictures of the index, or one that was sent."""
        return await answerer.classify(service.collection, asked)


def _add_pictures(app: FastAPI, service: Service) -> None:
    @app.get("/image/{key:path}", tags=["pictures"], response_class=Response, responses=_PICTURE)
    async def image(key: KeyPath) -> Response:
        """A picture as it is in its file; one that browsers do not show, as a JPEG."""
        collection = service.collection
        collection.row(key)
        data, kind = await service.work.run(lambda: collection.files.shown(key))
        # A picture needs nothing, and opened by itself it gets nothing.
        return _picture(data, kind, {"content-security-policy": "default-src 'none'; sandbox"})

    @app.get("/thumb/{key:path}", tags=["pictures"], response_class=Response, responses=_PICTURE)
    async def thumb(key: KeyPath) -> Response:
        """A small JPEG of a picture."""
        collection = service.collection
        collection.row(key)
        data = await service.work.thumb(collection.files, key)
        service.monitor.thumb_bytes.set(service.work.thumbs.used)
        return _picture(data, "image/jpeg")

    @app.get("/sent/{name}", tags=["pictures"], response_class=Response, responses=_PICTURE)
    async def sent(name: str) -> Response:
        """A small JPEG of a picture that was sent with a search."""
        model = service.collection.encoder.model.fingerprint
        return _picture(service.answerer.uploads.get(name, model).jpeg, "image/jpeg")


def _picture(data: bytes, kind: str, headers: dict[str, str] | None = None) -> Response:
    keep = {"cache-control": f"private, max-age={KEEP_SECONDS}"}
    return Response(data, media_type=kind, headers={**keep, **(headers or {})})


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/info", tags=["facts"])
    async def info() -> Info:
        """What is served."""
        collection = service.collection
        manifest, calibration = collection.index.manifest, collection.index.calibration
        missing = await asyncio.to_thread(lambda: collection.missing)  # may open tables
        return Info(
            name=service.current.path.name,
            count=len(collection),
            model=str(collection.index.model),
            spec=collection.index.spec,
            created=manifest.created,
            clipkit=__version__,
            missing=missing,
            calibrated=calibration is not None and calibration.informative,
            columns=[ColumnInfo(**asdict(column)) for column in collection.columns],
            most_hits=MOST_HITS,
            largest_upload=MAX_UPLOAD,
        )

    @app.get("/health", tags=["facts"])
    async def health() -> Health:
        """That the server is there; asks for no token."""
        return Health(status="ok")

    @app.get("/metrics", tags=["facts"], response_class=Response, responses=_TEXT)
    async def metrics() -> Response:
        """Counts of requests, times and batches, as Prometheus reads them."""
        return Response(service.monitor.render(), media_type="text/plain; version=0.0.4")


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


def _add_page(app: FastAPI) -> None:
    page = (STATIC / "index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(packages=[("clipkit.web", "static")]))


async def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 422
    return JSONResponse({"detail": str(error)}, status)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)

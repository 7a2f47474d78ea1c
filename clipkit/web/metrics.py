"""Metrics of a server in Prometheus text format."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Monitor:
    """Metrics of one server, in a registry of its own, so that servers in a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "clipkit_requests", "Requests served", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "clipkit_request_seconds", "Time to the response", ["route"], registry=self._registry
        )
        self.batches = Histogram(
            "clipkit_encoder_batch_size",
            "Captions or images per encoder call",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.images = Gauge("clipkit_index_images", "Images in the index", registry=self._registry)
        self.reloads = Counter(
            "clipkit_reloads",
            "Reloads of a changed index, successful or failed",
            ["outcome"],
            registry=self._registry,
        )
        self.thumbnail_bytes = Gauge(
            "clipkit_thumbnail_bytes", "Size of cached thumbnails in bytes", registry=self._registry
        )

    def render(self) -> bytes:
        """Return all metrics in Prometheus text format."""
        return generate_latest(self._registry)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application to count its requests by route, because URLs are unbounded."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status = time.perf_counter(), 500

            async def record_status(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, record_status)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                self._requests.labels(route, str(status)).inc()
                self._seconds.labels(route).observe(time.perf_counter() - start)

        return counted

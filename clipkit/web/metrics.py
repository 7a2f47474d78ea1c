"""What a server counts, as Prometheus reads it."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Monitor:
    """Counters of one server; its own registry, so that two in a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "clipkit_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "clipkit_request_seconds", "Time to the answer", ["route"], registry=self._registry
        )
        self.batches = Histogram(
            "clipkit_encoder_batch_size",
            "Captions or pictures in a call of the encoder",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.pictures = Gauge(
            "clipkit_index_pictures", "Pictures in the index", registry=self._registry
        )
        self.reloads = Counter(
            "clipkit_reloads",
            "Times that a newer index took over or could not",
            ["outcome"],
            registry=self._registry,
        )
        self.thumb_bytes = Gauge(
            "clipkit_thumbnail_bytes", "Bytes of thumbnails kept", registry=self._registry
        )

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def around(self, app: ASGIApp) -> ASGIApp:
        """An application that is counted: by route, never by address, whose number has no end."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start, status = time.perf_counter(), 500

            async def noting(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, noting)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                self._requests.labels(route, str(status)).inc()
                self._seconds.labels(route).observe(time.perf_counter() - start)

        return counted

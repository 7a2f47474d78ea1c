"""Serve an index to browsers and programs: ``clipkit serve INDEX``."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.errors import MissingExtraError, ServeError
from clipkit.user_cache import cache_folder

if TYPE_CHECKING:
    from clipkit.index.vector_index import VectorIndex
    from clipkit.models.encoder import Encoder
    from clipkit.models.inference_precision import Precision


LOOPBACK = ("127.0.0.1", "localhost", "::1")
KERNEL_CACHE = 64
"""Compiled bf16 matrix-product kernels kept in each of two torch caches; one batch of captions has
about 15 shapes."""
_TOKEN = r"[A-Za-z0-9_.~-]{16,200}"


def serve(
    index: "str | Path | VectorIndex",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    images: str | Path | None = None,
    cache: str | Path | None = None,
    encoder: "Encoder | None" = None,
    precision: "Precision | None" = None,
    device: str | None = None,
    on_ready: Callable[[str, int], None] | None = None,
) -> None:
    """Serve the search page and the HTTP API until interrupted; reload the index if it changes.

    Args:
        index: directory of the index, or the index.
        host: bind address; anything but loopback requires ``token``.
        port: port number; 0 picks a free port.
        token: token that every request must carry.
        images: folder of the images; None: their location when they were indexed.
        cache: thumbnail folder; None: a folder in the user's cache, unless caching is disabled.
        encoder: the index's model; None loads the model that its manifest names.
        precision: precision of the loaded model, as for ``load_model``; None: the default.
        device: device of the loaded model; None: the first GPU, or the CPU.
        on_ready: called with the URL of the page and the number of images.

    Raises:
        ServeError: a non-loopback address without a token, a weak token, or an address in use.
        ArtifactError: the index does not exist or is damaged.
        ModelError: its model cannot be loaded.
        MissingExtraError: the extra ``serve`` is not installed.
    """
    check_address(host, token)
    limit_kernel_cache()
    try:
        from clipkit.web.app import create_app
        from clipkit.web.collection import ServedIndex
        from clipkit.web.images import ThumbnailCache
        from clipkit.web.server import listen, server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise MissingExtraError(
            f"serving needs {error.name}, which is not installed; pip install 'clipkit[serve]'"
        ) from None
    path = Path(index) if isinstance(index, str | Path) else index.path
    folder = None if images is None else Path(images)
    with listen(host, port) as socket:
        if folder is not None and not folder.is_dir():
            raise ServeError(f"{folder} is not a folder, expected the images of the index")
        served = ServedIndex(path, folder, encoder, precision, device)
        hosts = {host, *LOOPBACK} if host in LOOPBACK else None
        app = create_app(served, ThumbnailCache(_thumbnails(cache)), hosts=hosts, token=token)
        name = f"[{host}]" if ":" in host else host
        query = f"/?token={token}" if token else "/"
        # The first forward pass is slow; run it before the first request.
        served.collection.encoder.encode_text(["white"])
        if on_ready is not None:
            on_ready(f"http://{name}:{socket.getsockname()[1]}{query}", len(served.collection))
        server(app).run(sockets=[socket])


def limit_kernel_cache() -> None:
    """Limit the number of kernels that torch caches for bf16 matrix products, one per shape.

    Batches of captions keep producing new shapes. A kernel of a layer of width 512 takes 0.6 MiB
    and compiles in 0.3 ms. By default torch caches 1,024 kernels, and a server grows by 600 MiB
    within minutes. torch reads these environment variables at its first bf16 product; values set by
    the user are kept.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNEL_CACHE))


def check_address(host: str, token: str | None) -> None:
    """Refuse an address that other machines can reach, unless a strong token protects it.

    Raises:
        ServeError: ``host`` is not loopback and there is no token, or the token is weak.
    """
    make = 'python -c "import secrets; print(secrets.token_urlsafe())"'
    if token is None and host not in LOOPBACK:
        raise ServeError(
            f"other machines can reach {host}, expected a --token to protect it; create one with "
            f"{make}"
        )
    if token is not None and not re.fullmatch(_TOKEN, token):
        raise ServeError(
            f"the token has {len(token)} characters, expected 16 to 200 letters, digits and -_.~; "
            f"create one with {make}"
        )


def _thumbnails(cache: str | Path | None) -> Path | None:
    if cache is not None:
        return Path(cache)
    user = cache_folder()
    return user / "thumbnails" if user else None

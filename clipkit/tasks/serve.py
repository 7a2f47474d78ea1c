"""Serve an index to browsers and programs: ``clipkit serve INDEX``."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.errors import MissingExtraError, ServeError
from clipkit.user_cache import user_cache

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder
    from clipkit.models.inference_precision import Precision
    from clipkit.web.images import ThumbCache


LOOPBACK = ("127.0.0.1", "localhost", "::1")
KERNELS = 64
"""Compiled products in bf16 that are kept, in each of two caches: a batch of captions has about 15
shapes of its own."""
_TOKEN = r"[A-Za-z0-9_.~-]{16,200}"


def serve(
    index: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    images: Path | None = None,
    cache: Path | None = None,
    encoder: "Encoder | None" = None,
    precision: "Precision | None" = None,
    on_ready: Callable[[str, int], None] | None = None,
) -> None:
    """Answer searches over HTTP until interrupted; a newer state of the index takes over.

    Args:
        index: directory of the index.
        host: address to listen on; another than this machine's own asks for a token.
        port: 0 for any that is free.
        token: what every request must show.
        images: folder of the pictures; None: where they were when they were indexed.
        cache: folder of the thumbnails; None: in the user's cache, if that is not off.
        encoder: the index's model; None: loaded as the index names it.
        precision: of the model that is loaded, as of ``load_model``; None: its default.
        on_ready: called with the address of the page and the number of pictures.

    Raises:
        ServeError: a foreign address without a token, a weak token, or an address that is taken.
        ArtifactError: there is no index, or it is damaged.
        ModelError: its model cannot be loaded.
        MissingExtraError: the extra ``serve`` is not installed.
    """
    check_address(host, token)
    bound_kernels()
    try:
        from clipkit.web.app import create_app
        from clipkit.web.collection import Current
        from clipkit.web.server import listen, server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise MissingExtraError(
            f"{error.name} is not installed, which serving needs; pip install 'clipkit[serve]'"
        ) from None
    with listen(host, port) as socket:
        if images is not None and not images.is_dir():
            raise ServeError(f"{images} is no folder, expected the pictures of the index")
        current = Current(Path(index), images, encoder, precision)
        hosts = {host, *LOOPBACK} if host in LOOPBACK else None
        app = create_app(current, _thumbs(cache), hosts=hosts, token=token)
        name = f"[{host}]" if ":" in host else host
        query = f"/?token={token}" if token else "/"
        # A network's first call sets up what all later ones use: not while somebody waits.
        current.collection.encoder.encode_text(["white"])
        if on_ready is not None:
            on_ready(f"http://{name}:{socket.getsockname()[1]}{query}", len(current.collection))
        server(app).run(sockets=[socket])


def bound_kernels() -> None:
    """Have torch keep few of the kernels that it compiles for products in bf16, each for one shape.

    Batches of captions are of ever new shapes, and a kernel of a layer 512 wide takes 0.6 MiB, made
    in 0.3 ms: torch keeps 1,024 of them, so that a server grows for minutes until it holds 600 MiB.
    torch asks for these limits once, at its first such product; what a person has set stays.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(KERNELS))


def check_address(host: str, token: str | None) -> None:
    """Refuse to be reached from other machines by whoever comes.

    Raises:
        ServeError: ``host`` is not this machine's own address and there is no token, or the token
            can be guessed.
    """
    make = 'python -c "import secrets; print(secrets.token_urlsafe())"'
    if token is None and host not in LOOPBACK:
        raise ServeError(
            f"{host} can be reached from other machines, expected a --token that their requests "
            f"must show; make one with {make}"
        )
    if token is not None and not re.fullmatch(_TOKEN, token):
        raise ServeError(
            f"the token has {len(token)} characters, expected 16 to 200 letters, digits and -_.~; "
            f"make one with {make}"
        )


def _thumbs(cache: Path | None) -> "ThumbCache":
    from clipkit.web.images import ThumbCache

    kept = user_cache()
    folder = cache or (kept.folder / "thumbs" if kept else None)
    return ThumbCache(folder) if folder else ThumbCache(Path(os.devnull), limit=0)

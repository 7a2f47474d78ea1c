"""clipkit serve."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import Precision, note


def serve(
    index: Annotated[Path, typer.Argument(help="Directory of the index.")],
    host: Annotated[
        str, typer.Option(help="Address; another than this machine's own takes a --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="CLIPKIT_TOKEN", help="What every request must show."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, if it has moved.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of thumbnails, instead of the user's cache.")
    ] = None,
    precision: Precision = None,
) -> None:
    """Serve a search page and an HTTP API.

    A newer state of the index takes over by itself. Ctrl-C ends it.
    """
    from clipkit.tasks.serve import serve as run

    def ready(address: str, count: int) -> None:
        note(f"{count} pictures at {address}")

    run(
        index,
        host=host,
        port=port,
        token=token,
        images=images,
        cache=cache,
        precision=precision,
        on_ready=ready,
    )

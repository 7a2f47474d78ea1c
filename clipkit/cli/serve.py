"""clipkit serve."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.options import Device, Index, Model, Precision
from clipkit.cli.output import load_encoder, note


def serve(
    index: Index,
    host: Annotated[
        str, typer.Option(help="Bind address; non-loopback requires --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="CLIPKIT_TOKEN", help="Token that every request must carry."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, if they have moved.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Thumbnail folder; default: the user's cache.")
    ] = None,
    model: Model = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Serve a search page and an HTTP API.

    The server reloads the index if it changes. Ctrl-C stops it.
    """
    from clipkit.tasks.serve import serve as run

    def ready(address: str, count: int) -> None:
        note(f"{count} images at {address}")

    run(
        index,
        encoder=load_encoder(model, precision, device) if model else None,
        host=host,
        port=port,
        token=token,
        images=images,
        cache=cache,
        precision=precision,
        device=device,
        on_ready=ready,
    )
    raise KeyboardInterrupt  # only an interrupt ends the server, and uvicorn may swallow it

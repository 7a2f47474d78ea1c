"""clipkit embed and clipkit index build."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    CaptionColumn,
    ImageColumn,
    Precision,
    load_encoder,
    note,
    note_skipped,
    print_facts,
)
from clipkit.cli.readable import describe_calibration, describe_tuning, load_text
from clipkit.cli.sizes import parse_size

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder

app = typer.Typer(
    help="Build indexes of image vectors, and keep them up to date.", no_args_is_help=True
)


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither auto nor a number from 1 on")
    return text if text == "auto" else int(text)


Decode = Annotated[
    Literal["exact", "fast"] | None,
    typer.Option(
        help="Read pictures exactly as open_clip does, which is the default unless the store was "
        "made otherwise, or at the size that is enough, in a third of the time."
    ),
]


def embed(
    images: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Directory of the embedding store.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    decode: Decode = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            help="Images encoded at once; auto suits the device.",
            parser=_batch_size,
            metavar="<int|auto>",
        ),
    ] = "auto",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    precision: Precision = None,
) -> None:
    """Encode images and store their vectors.

    Run again, it encodes only what is new or was left by an interrupted run; renamed images keep
    their vectors.
    """
    from clipkit.data.sources import open_source

    source = open_source(images, image=image_column, caption=caption_column, metadata=True)

    from clipkit.tasks.embed import embed as run

    encoder = load_encoder(model, precision)
    store = run(source, out, encoder, decode=decode, batch_size=batch_size)
    note_skipped(store.manifest.detail["skipped"], f"listed in {out / 'skipped.jsonl'}")
    print_facts([("store", out), ("images", len(store)), ("model", store.model)])


@app.command("build")
def build(
    source: Annotated[str, typer.Argument(help=f"An embedding store, or images. {DATA_HELP}")],
    out: Annotated[Path, typer.Option(help="Directory of the index.")],
    model: Annotated[str | None, typer.Option(help=f"Only for images. {MODEL_HELP}")] = None,
    spec: Annotated[
        str,
        typer.Option(help="FAISS factory string; auto chooses one by what captions find."),
    ] = "Flat",
    recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --spec auto: recall@10 that is wanted; 0.95."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="With --spec auto: the most it may take, such as 500MB.")
    ] = None,
    decode: Decode = None,
    precision: Precision = None,
) -> None:
    """Index a store, or images.

    Images are embedded first, into a store beside the index, which a later build brings up to date.
    """
    from clipkit.store.embeddings import EmbeddingStore
    from clipkit.store.tune import AUTO, RECALL, Wish
    from clipkit.tasks.index import build_index

    embedded = False

    def load() -> "Encoder":
        nonlocal embedded
        embedded = True
        return load_encoder(model, precision)

    if spec != AUTO and (recall is not None or memory is not None):
        raise typer.BadParameter("--recall and --memory are for --spec auto")
    most = None if memory is None else parse_size(memory)
    wish = Wish(RECALL if recall is None else recall, most)
    index = build_index(
        source,
        out,
        spec=spec,
        wish=wish,
        load=load,
        decode=decode,
        load_text=lambda model: load_text(model, source),
    )
    store = EmbeddingStore.open(index.manifest.source["store"])
    if embedded:
        note_skipped(store.manifest.detail["skipped"], f"listed in {store.path / 'skipped.jsonl'}")
    elif model:
        note(f"--model is for images: {source} is a store, whose vectors are of {store.model}")
    if decode and not embedded:
        note(f"--decode is for images: {source} is a store, made with --decode {store.decode}")
    print_facts(
        [
            ("index", out),
            ("store", store.path),
            ("vectors", len(index)),
            ("spec", index.spec),
            *describe_tuning(index.manifest.detail),
            *describe_calibration(index.calibration),
            ("model", index.model),
        ]
    )

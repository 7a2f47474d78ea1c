"""clipkit embed and clipkit index: store vectors, index them, and keep the index up to date."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipkit.cli.options import (
    DATA_HELP,
    MACHINE,
    MODEL_HELP,
    BatchSize,
    CaptionColumn,
    Device,
    Encoding,
    Html,
    ImageColumn,
    ImageRoot,
    Images,
    Index,
    Json,
    Model,
    Precision,
    PrecisionName,
    Workers,
    new_group,
)
from clipkit.cli.output import (
    describe_calibration,
    describe_tuning,
    load_encoder,
    load_maker,
    note,
    note_skipped,
    print_facts,
    print_json,
    print_result,
)

if TYPE_CHECKING:
    from clipkit.data.source import Source
    from clipkit.index.vector_index import VectorIndex
    from clipkit.models.encoder import Encoder
    from clipkit.tasks.sync import Changes


app = new_group("Build indexes of image vectors and keep them up to date.")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB``, ``1.5 GiB`` or ``2g``.

    Raises:
        BadParameter: it is not a size, which ends a command with exit code 2.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text.strip())
    except ValidationError:
        raise typer.BadParameter(f"expected a size such as 500MB, found {text!r}") from None


Decode = Annotated[
    Literal["exact", "fast"] | None,
    typer.Option(
        help="exact reads images as open_clip does; fast at a sufficient size, in a third of the "
        "time; default: as the store at --out, else exact."
    ),
]


def embed(
    data: Images,
    out: Annotated[Path, typer.Option(help="Directory of the embedding store.")],
    model: Model = None,
    decode: Decode = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
) -> None:
    """Encode images and store their vectors.

    Run again, it encodes only new images and what an interrupted run left; renamed images keep
    their vectors.
    """
    from clipkit.data.open_source import open_source

    source = open_source(
        data,
        image=image_column,
        caption=caption_column,
        metadata=True,
        image_root=image_root,
        encoding=encoding,
    )

    from clipkit.tasks.embed import embed as run

    encoder = _encoder_for(out, model, precision, device)
    store = run(source, out, encoder, decode=decode, batch_size=batch_size, workers=workers)
    note_skipped(store.manifest.detail["skipped"], f"listed in {out / 'skipped.jsonl'}")
    print_result({"store": str(out), "images": len(store), "model": str(store.model)}, as_json)


def _encoder_for(
    store: Path, model: str | None, precision: PrecisionName | None, device: str | None
) -> "Encoder":
    """The encoder that options name; without --model that of the store, or else the default."""
    from clipkit.tasks.embed import stored_model

    found = None if model else stored_model(store)
    if found is None:
        return load_encoder(model, precision, device)
    note(f"using the model of the store {store}, {found}")
    return load_maker(found, f"the store {store}", precision, device)


@app.command("build")
def build(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help=f"An embedding store, images, folders of images, or: {DATA_HELP}",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the index.")],
    model: Annotated[
        str | None, typer.Option(help=f"For images only. {MODEL_HELP}", rich_help_panel=MACHINE)
    ] = None,
    spec: Annotated[
        str,
        typer.Option(help="FAISS factory string; auto chooses one by its recall for captions."),
    ] = "Flat",
    recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --spec auto: target recall@10; default: 0.95."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="With --spec auto: memory limit, such as 500MB.")
    ] = None,
    decode: Decode = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
) -> None:
    """Index a store, or images.

    Images are embedded first, into a store beside the index, which a later build updates.
    """
    from clipkit.index.tuning import AUTO, RECALL, TuningTarget
    from clipkit.store.embedding_store import EmbeddingStore
    from clipkit.tasks.index import build_index, store_beside

    if spec != AUTO and (recall is not None or memory is not None):
        raise typer.BadParameter("--recall and --memory are for --spec auto")
    most = None if memory is None else parse_size(memory)
    target = TuningTarget(RECALL if recall is None else recall, most)
    source = _open(data, image_column, caption_column, image_root, encoding)
    embedded = not isinstance(source, str)
    encoder = _encoder_for(store_beside(out), model, precision, device) if embedded else None
    index = build_index(
        source,
        out,
        encoder,
        spec=spec,
        target=target,
        decode=decode,
        batch_size=batch_size,
        workers=workers,
    )
    store = EmbeddingStore.open(index.manifest.source["store"])
    if embedded:
        note_skipped(store.manifest.detail["skipped"], f"listed in {store.path / 'skipped.jsonl'}")
    elif model:
        note(f"--model is for images: {source} is a store, encoded by {store.model}")
    if decode and not embedded:
        note(f"--decode is for images: {source} is a store, embedded with --decode {store.decode}")
    detail, calibration = index.manifest.detail, index.calibration
    facts = [
        ("index", out),
        ("store", store.path),
        ("vectors", len(index)),
        ("spec", index.spec),
        *describe_tuning(detail),
        *describe_calibration(calibration),
        ("model", index.model),
    ]
    if as_json:
        plain: dict[str, Any] = {"index": str(out), "store": str(store.path)}
        plain["model"] = str(index.model)
        plain |= {"vectors": len(index), "spec": index.spec}
        if "tuning" in detail:
            names = ("recall", "queries", "source", "milliseconds")
            tuning = {name: detail["tuning"][name] for name in names}
            plain["tuning"] = tuning | {"target": detail["tuning"]["wanted"]}
        if calibration is not None:
            plain["calibration"] = calibration.figures()
        print_json(plain)
    else:
        print_facts(facts)


@app.command("add")
def add(
    index: Index,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help=f"An embedding store, images, folders of images, or: {DATA_HELP}",
        ),
    ],
    prefix: Annotated[
        str | None,
        typer.Option(help="Key prefix of a new folder; default: the folder's name."),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
) -> None:
    """Add images, or a store, to an index.

    Images that are already in the index are updated; only new content is encoded.
    """
    from clipkit.tasks.sync import add_images

    changes = add_images(
        index,
        _open(data, image_column, caption_column, image_root, encoding),
        _encoder_of(index, precision, device),
        prefix=prefix,
        batch_size=batch_size,
        workers=workers,
    )
    _print_changes(changes, as_json)


@app.command("sync")
def sync(
    index: Index,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A folder or table of the index, a subfolder, or the new place of a moved folder; "
            "default: all folders and tables.",
        ),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
) -> None:
    """Bring an index up to date with its folders.

    Finds new, changed, renamed and deleted images; only new content is encoded.
    """
    from clipkit.tasks.sync import sync_index

    encoder = _encoder_of(index, precision, device)
    changes = sync_index(
        index,
        data,
        encoder,
        image=image_column,
        caption=caption_column,
        image_root=image_root,
        batch_size=batch_size,
        workers=workers,
    )
    _print_changes(changes, as_json)


def _open(
    data: list[str],
    image_column: str | None,
    caption_column: str | None,
    image_root: str | None,
    encoding: str | None,
) -> "str | Source":
    """Return the name of a store, or the opened data."""
    from clipkit.tasks.index import is_store

    if len(data) == 1 and is_store(data[0]):
        return data[0]

    from clipkit.data.open_source import open_source

    return open_source(
        data,
        image=image_column,
        caption=caption_column,
        metadata=True,
        image_root=image_root,
        encoding=encoding,
    )


def _encoder_of(
    index: Path, precision: PrecisionName | None, device: str | None
) -> "Encoder | None":
    """Load an index's encoder with the given precision or device; None if neither is given."""
    if precision is None and device is None:
        return None
    from clipkit.index.vector_index import open_index

    return load_maker(open_index(index).model, f"the index {index}", precision, device)


def _print_changes(changes: "Changes", as_json: bool) -> None:
    for item in changes.skipped:
        note(f"skipped {item.key}: {item.reason}")
    counts = {name: value for name, value in vars(changes).items() if name != "skipped"}
    counts["skipped"] = len(changes.skipped)
    if as_json:
        print_json(counts)
    else:
        print_facts((name, value) for name, value in counts.items() if value != "")


@app.command("remove")
def remove(
    index: Index,
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys, or patterns such as 'holiday/*'.")
    ] = None,
    keys_from: Annotated[
        typer.FileText | None,
        typer.Option("--from", help="A file of keys or patterns, one per line; - reads stdin."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove images from an index, but keep their files."""
    names = [*(keys or []), *(line.rstrip("\r\n") for line in keys_from or [])]
    names = [name for name in names if name]
    if not names:
        raise typer.BadParameter("name a key, a pattern, or a file of them with --from")
    from clipkit.tasks.index import remove_items

    for key in remove_items(index, names):
        if as_json:
            print_json({"removed": key})
        else:
            print_facts([("removed", key)])


@app.command("compact")
def compact(index: Index, as_json: Json = False) -> None:
    """Rebuild an index from its vectors as a single segment."""
    from clipkit.tasks.index import compact_index

    _print_index(index, compact_index(index), as_json)


@app.command("merge")
def merge(
    indexes: Annotated[list[Path], typer.Argument(help="Directories of two or more indexes.")],
    out: Annotated[Path, typer.Option(help="Directory of the new index.")],
    spec: Annotated[
        str | None, typer.Option(help="FAISS factory string; default: that of the first index.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge indexes of the same model into a new index."""
    from clipkit.index.merge import merge_indexes

    _print_index(out, merge_indexes(indexes, out, spec), as_json)


@app.command("check")
def check(index: Index, as_json: Json = False) -> None:
    """Check an index: its files, its rows, and its search results.

    Exits with code 1 if it finds a problem.
    """
    from clipkit.tasks.check_index import check_index

    report = check_index(index)
    facts = report.to_dict()
    if as_json:
        print_json(facts)
    else:
        problems, advice = facts.pop("problems"), facts.pop("advice")
        shown = [
            (name.replace("_", " "), _as_text(name, value) if isinstance(value, float) else value)
            for name, value in facts.items()
            if value is not None
        ]
        print_facts([*shown, *(("wrong", p) for p in problems), *(("advice", a) for a in advice)])
    if report.problems:
        raise typer.Exit(1)


@app.command("calibrate")
def calibrate(
    index: Index,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Calibrate the scores of an index as probabilities.

    Searches for captions of its images, with and without the image they describe. Text queries then
    show the probability that a hit matches, and the probability that any of the ten best hits does.
    An index with captions of fewer than 50 images gets no probabilities, only "no good match" for
    queries that score like random words.
    """
    from clipkit.tasks.index import calibrate_index

    found = calibrate_index(index)
    if html is not None:
        from clipkit.reports.evaluation import write_calibration

        write_calibration(found.calibration, index, html)
        note(f"wrote {html}")
    if as_json:
        print_json(found.to_dict())
        return
    measured = found.measured
    print_facts(
        [
            ("index", index),
            ("recall@10", f"{measured.recall:.3f} of {measured.queries} {found.source}"),
            ("one query", f"{measured.milliseconds:.2f} ms"),
            *describe_calibration(found.calibration),
        ]
    )


def _as_text(name: str, value: float) -> str:
    return f"{value:.2f}" if name.endswith("milliseconds") else f"{value:.1%}"


def _print_index(path: Path, index: "VectorIndex", as_json: bool) -> None:
    facts = {"index": str(path), "vectors": len(index), "spec": index.spec}
    print_result(facts, as_json)

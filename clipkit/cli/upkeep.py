"""clipkit index add, remove, sync, compact, merge and check: look after an index that stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import DATA_HELP, note, print_facts, print_json

if TYPE_CHECKING:
    from clipkit.store.vector_index import VectorIndex
    from clipkit.tasks.update import Changes

IndexArgument = Annotated[Path, typer.Argument(help="Directory of the index.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def add(
    index: IndexArgument,
    images: Annotated[str, typer.Argument(help=f"An embedding store, or images. {DATA_HELP}")],
    prefix: Annotated[
        str | None,
        typer.Option(help="What the keys of a new folder begin with; its name if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add images, or a store, to an index.

    Images it holds already are brought up to date; only new content is encoded.
    """
    from clipkit.tasks.sync import add_images

    _print_changes(add_images(index, images, prefix=prefix), as_json)


def sync(
    index: IndexArgument,
    images: Annotated[
        str | None,
        typer.Argument(help="A folder of the index, or one within; all that it was made of."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring an index up to date with its folder.

    New, changed, renamed and deleted images are told apart; only new content is encoded.
    """
    from clipkit.tasks.sync import sync_index

    _print_changes(sync_index(index, images), as_json)


def _print_changes(changes: "Changes", as_json: bool) -> None:
    for item in changes.skipped:
        note(f"skipped {item.key}: {item.reason}")
    counts = {name: value for name, value in vars(changes).items() if name != "skipped"}
    counts["skipped"] = len(changes.skipped)
    if as_json:
        print_json(counts)
    else:
        print_facts((name, value) for name, value in counts.items() if value != "")


def remove(
    index: IndexArgument,
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys, or patterns such as 'holiday/*'.")
    ] = None,
    keys_from: Annotated[
        typer.FileText | None,
        typer.Option("--from", help="A file of keys or patterns, one a line; - reads stdin."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take images out of an index; their files stay."""
    names = [*(keys or []), *(line.rstrip("\r\n") for line in keys_from or [])]
    names = [name for name in names if name]
    if not names:
        raise typer.BadParameter("name a key, a pattern, or a file of them with --from")
    from clipkit.tasks.upkeep import remove_items

    for key in remove_items(index, names):
        if as_json:
            print_json({"removed": key})
        else:
            print_facts([("removed", key)])


def compact(index: IndexArgument, as_json: AsJson = False) -> None:
    """Build an index anew from what it holds, freshly trained."""
    from clipkit.tasks.upkeep import compact_index

    _print_index(index, compact_index(index), as_json)


def merge(
    indexes: Annotated[list[Path], typer.Argument(help="Directories of two or more indexes.")],
    out: Annotated[Path, typer.Option(help="Directory of the new index.")],
    spec: Annotated[
        str | None, typer.Option(help="FAISS factory string; the first one's if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join indexes of one model into a new one."""
    from clipkit.store.merge import merge_indexes

    _print_index(out, merge_indexes(indexes, out, spec), as_json)


def check(index: IndexArgument, as_json: AsJson = False) -> None:
    """Examine an index: its files, its rows, and what it finds.

    Exit code 1 where something is wrong with it.
    """
    from clipkit.tasks.check_index import check_index

    report = check_index(index)
    facts = report.to_dict()
    if as_json:
        print_json(facts)
    else:
        problems, advice = facts.pop("problems"), facts.pop("advice")
        told = {name: value for name, value in facts.items() if value is not None}
        shown = [
            (name.replace("_", " "), _as_text(name, value) if isinstance(value, float) else value)
            for name, value in told.items()
        ]
        print_facts([*shown, *(("wrong", p) for p in problems), *(("advice", a) for a in advice)])
    if report.problems:
        raise typer.Exit(1)


def _as_text(name: str, value: float) -> str:
    return f"{value:.2f}" if name.endswith("milliseconds") else f"{value:.1%}"


def _print_index(path: Path, index: "VectorIndex", as_json: bool) -> None:
    facts = {"index": str(path), "vectors": len(index), "spec": index.spec}
    if as_json:
        print_json(facts)
    else:
        print_facts(facts.items())

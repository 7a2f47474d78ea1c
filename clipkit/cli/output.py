"""Printing, and the arguments that several commands share.

Tables for people, one JSON object a line for programs.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from clipkit.manifest import ModelRef
    from clipkit.model.encoder import Encoder

MODEL_HELP = (
    "A run or checkpoint directory; NAME/TAG or NAME/path/to/weights with an open_clip model "
    "name; or hf-hub:org/name."
)
DATA_HELP = (
    "A folder (sidecar texts, metadata.csv|jsonl, or class folders), CSV/TSV, JSONL, Parquet, "
    "WebDataset tars (shards-{000..012}.tar), hf:org/name:split, or a saved datasets directory."
)
ImageColumn = Annotated[str | None, typer.Option(help="Column of the images, if not a usual name.")]
CaptionColumn = Annotated[
    str | None, typer.Option(help="Column of the captions, if not a usual name; '' for none.")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels, if not a usual name; '' for none.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"] | None,
    typer.Option(help="fp32 is exact; bf16 is faster on machines made for it; auto chooses."),
]

# A file name may hold what a terminal takes for a command, or for a new line.
_CONTROLS = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160)]}


def printable(text: str) -> str:
    r"""A text on one line, control characters as ``\x1b``."""
    return text.translate(_CONTROLS)


def print_json(item: dict[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(item, ensure_ascii=False), flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns, never cut: numbers to the right, texts to the left."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(header))]
    for line in lines:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("%", "").replace("-", "").isdigit()


def print_text(text: str) -> None:
    """Lines that are laid out already."""
    print("\n".join(map(printable, text.splitlines())))


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one a line, the values aligned."""
    shown = [(name, printable(str(value))) for name, value in facts]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}".rstrip())


def note(message: str) -> None:
    """Tell a person something that is not the result: on stderr, each line of it a line."""
    print("\n".join(map(printable, message.splitlines())), file=sys.stderr, flush=True)


def note_skipped(count: int, where: str) -> None:
    """Say how many items were skipped, if any were."""
    if count:
        note(f"skipped {count} {'item' if count == 1 else 'items'}: {where}")


def model_or_default(model: str | None) -> str:
    """The MODEL named, or the default one, saying so."""
    if model:
        return model
    from clipkit.model.load import DEFAULT_MODEL

    note(f"using the model {DEFAULT_MODEL}; name another one with --model")
    return DEFAULT_MODEL


def load_encoder(model: str | None, precision: Precision) -> "Encoder":
    """The encoder of the MODEL named, or of the default one, in the precision named or ours."""
    from clipkit.model.load import load
    from clipkit.model.prepare import DEFAULT_PRECISION

    return load(model_or_default(model), precision=precision or DEFAULT_PRECISION)


def load_maker(model: "ModelRef", what: str, precision: Precision) -> "Encoder":
    """The encoder that made something, in the precision named or ours."""
    from clipkit.model.load import load_ref
    from clipkit.model.prepare import DEFAULT_PRECISION

    return load_ref(model, what, precision=precision or DEFAULT_PRECISION)

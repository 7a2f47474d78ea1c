"""The options that several commands share, and how commands show and check their options.

An option has one name, one meaning and one help text, whichever command takes it. ``--help`` lists
a command's own options first and the shared ones after them, in groups.
"""

from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from clipkit.progress import silence

COLUMNS, MACHINE, OUTPUT, GENERAL = "Columns", "Model and machine", "Output", "General"

MODEL_HELP = (
    "A run or checkpoint directory; NAME/TAG or NAME/path/to/weights with an open_clip model "
    "name; or hf-hub:org/name."
)
DATA_HELP = (
    "A folder or .zip of images (with sidecar texts, a table of them, or class folders; "
    "FOLDER:train is one split), a folder of tars or tables, CSV/TSV, JSONL, Parquet, JSON (COCO "
    "captions, FILE:SPLIT in Karpathy's format, or a list of objects), WebDataset tars "
    "(shards-{000..012}.tar), hf:org/name:split, or a saved datasets directory."
)

Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
Images = Annotated[
    list[str], typer.Argument(metavar="DATA...", help=f"Images, folders of images, or: {DATA_HELP}")
]
Index = Annotated[Path, typer.Argument(metavar="INDEX", help="Directory of the index.")]
Labels = Annotated[
    str,
    typer.Option(
        help="cat,dog,red fox; a file with one per line (fox: red fox, vixen, or animal/fox); "
        "imagenet; or the directory of a saved classifier."
    ),
]
Templates = Annotated[
    str | None,
    typer.Option(help="File of captions, one a line, {} for the label; or openai; or simple."),
]


def _column(what: str, more: str = "") -> Any:
    text = f"Column of the {what}, if it does not have a usual name{more}."
    return typer.Option(help=text, rich_help_panel=COLUMNS)


ImageColumn = Annotated[str | None, _column("images")]
CaptionColumn = Annotated[
    str | None, _column("captions", "; sentences.raw for a nested field; '' for none")
]
LabelColumn = Annotated[str | None, _column("labels", "; '' for none")]
ImageRoot = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder that the image paths of a table start from; default: the table's own, or the "
        "one below it that has the images.",
        rich_help_panel=COLUMNS,
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Encoding of a CSV or TSV table, such as cp1252; default: detected.",
        rich_help_panel=COLUMNS,
    ),
]

Model = Annotated[str | None, typer.Option(help=MODEL_HELP, rich_help_panel=MACHINE)]
RequiredModel = Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel=MACHINE)]
PrecisionName = Literal["auto", "fp32", "bf16"]
Precision = Annotated[
    PrecisionName | None,
    typer.Option(
        help="fp32 is exact; bf16 is faster on hardware that supports it; auto chooses.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Torch device, such as cpu or cuda:1; the first GPU if there is one.",
        rich_help_panel=MACHINE,
    ),
]


def _size_or_auto(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"expected auto or an integer from 1, found {text!r}")
    return text if text == "auto" else int(text)


BatchSize = Annotated[
    Any,
    typer.Option(
        help="Images per batch; auto fits the device.",
        parser=_size_or_auto,
        metavar="<int|auto>",
        rich_help_panel=MACHINE,
    ),
]
Workers = Annotated[
    Any,
    typer.Option(
        help="Threads that decode images; auto is one per core.",
        parser=_size_or_auto,
        metavar="<int|auto>",
        rich_help_panel=MACHINE,
    ),
]


def _file(*suffixes: str, stdout: bool = False) -> Any:
    """A callback that accepts only file names that end as the format does, or ``-``."""

    def check(file: Path | None) -> Path | None:
        if file and not (stdout and str(file) == "-") and file.suffix.lower() not in suffixes:
            wanted = " or ".join(suffixes)
            raise typer.BadParameter(f"expected a file name that ends in {wanted}, found {file}")
        return file

    return check


Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, one object a line.", rich_help_panel=OUTPUT),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write an HTML page.",
        callback=_file(".html", ".htm"),
        rich_help_panel=OUTPUT,
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        metavar="FILE",
        help="Write a CSV table; - is stdout.",
        callback=_file(".csv", stdout=True),
        rich_help_panel=OUTPUT,
    ),
]


class Verbosity(IntEnum):
    """How much a command reports beside its result."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


verbosity = Verbosity.NORMAL
_VERBOSITY = {
    "--verbose": (Verbosity.VERBOSE, "Show where warnings and errors come from."),
    "--quiet": (
        Verbosity.QUIET,
        "Print results and errors only: no progress, notes or warnings.",
    ),
}


def _take_verbosity(args: list[str]) -> list[str]:
    """Apply ``--verbose`` and ``--quiet``, which may stand anywhere, and drop them."""
    global verbosity
    verbosity = Verbosity.NORMAL
    end = args.index("--") if "--" in args else len(args)
    for word in args[:end]:
        if word in _VERBOSITY:
            verbosity = _VERBOSITY[word][0]
    silence(verbosity == Verbosity.QUIET)
    return [word for word in args[:end] if word not in _VERBOSITY] + args[end:]


RENAMED_COMMANDS = {
    "compare": "eval compare",
    "probe": "eval probe",
    "eval zeroshot": "eval zero-shot",
}
RENAMED_OPTIONS = {
    "classify": {"--out": "--html, --csv or --contact-sheet"},
    "eval retrieval": {"--report": "--html", "--apart": "--equal-captions apart"},
    "eval zero-shot": {"--report": "--html"},
    "map": {"--out": "--html"},
}
"""Spellings of earlier versions, and what replaces them."""


def _path(ctx: Any) -> str:
    return str(ctx.command_path).partition(" ")[2]


class Command(TyperCommand):
    """A command whose help groups options, and which names the successors of old options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, refusing options that were renamed."""
        renamed = RENAMED_OPTIONS.get(_path(ctx), {})
        for word in args:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name in renamed:
                ctx.fail(f"{name} was renamed; use {renamed[name]}")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, the command's own options, then the shared ones group by group."""
        _format_groups(self, ctx, formatter)


def _format_groups(command: Any, ctx: Any, formatter: Any) -> None:
    order = ("Arguments", "Options", COLUMNS, MACHINE, OUTPUT, GENERAL)
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in order}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None:
            continue
        name = getattr(param, "rich_help_panel", None) or "Options"
        if param.param_type_name == "argument":
            name = "Arguments"
        elif param.name == "help":
            name = GENERAL
        groups[name].append(record)
    groups[GENERAL] += [(name, text) for name, (_, text) in _VERBOSITY.items()]
    for name, records in groups.items():
        if records:
            with formatter.section(name):
                formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands in the order in which they are added."""

    order: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; the outermost group takes the options that all commands have."""
        return super().parse_args(ctx, args if ctx.parent else _take_verbosity(args))

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of use; typer would put groups last."""
        names = super().list_commands(ctx)
        return [*self.order, *(name for name in names if name not in self.order)]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command, refusing names that were changed."""
        old = f"{_path(ctx)} {args[0]}".strip()
        if old in RENAMED_COMMANDS:
            ctx.fail(f"{old!r} was renamed; use `clipkit {RENAMED_COMMANDS[old]}`")
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The group's options, then its commands."""
        _format_groups(self, ctx, formatter)
        self.format_commands(ctx, formatter)


class _Typer(typer.Typer):
    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Register a ``Command``."""
        return super().command(*args, **{"cls": Command, **kwargs})


def new_group(help: str) -> typer.Typer:
    """A group of commands such as ``clipkit index``."""
    return _Typer(cls=Group, help=help, no_args_is_help=True)

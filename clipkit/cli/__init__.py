"""The command line: parse, call one task, print. No logic.

Results go to stdout, progress and warnings to stderr. Exit code 1: something could not be done and
one sentence says why; 2: wrong usage; 130: interrupted.
"""

import errno
import os
import sys
import warnings
from typing import Annotated, TextIO

import typer

from clipkit import __version__
from clipkit.cli import classify, data, demo, evaluate, index, info, tokenize, train
from clipkit.errors import ClipkitError

app = typer.Typer(
    name="clipkit",
    help="Pretrain CLIP-style models, classify images zero-shot, search images by text.",
    no_args_is_help=True,
    # Plain help needs no rich, which alone would take a quarter of the time --help may take.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.train)
app.command("embed")(index.embed)
app.add_typer(index.app, name="index")
app.command("search")(index.search)
app.command("classify")(classify.classify)
app.add_typer(evaluate.app, name="eval")
app.command("tokenize")(tokenize.tokenize)
app.add_typer(data.app, name="data")
app.command("demo")(demo.demo)
app.command("info")(info.info)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"clipkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors raised on purpose become one line and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except ClipkitError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(
            f"error: the disk is full ({error.filename or 'while writing'}); what was finished "
            "before is kept: make room and run the same command again"
        )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one plain line: where in the code it arose is of no use to a person."""
    del category, filename, lineno, file, line
    print(f"warning: {message}", file=sys.stderr)


# Library chatter that means nothing to the person at the terminal.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

"""The command line: parse, call one task, print.

Results go to stdout, progress and warnings to stderr. Exit code 1: something cannot be done, and
one line says why; 2: wrong usage; 130: interrupted.
"""

import errno
import os
import sys
import traceback
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn, TextIO

import typer

from clipkit import __version__
from clipkit.cli import (
    classify,
    config,
    data,
    demo,
    evaluate,
    index,
    info,
    map,
    options,
    plot,
    search,
    serve,
    tokenize,
    train,
)
from clipkit.cli.options import Command, Group, Verbosity
from clipkit.cli.output import note, print_error
from clipkit.errors import FULL, ClipkitError

_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
)
"""Errors of the file system that the user can fix."""


class _Commands(Group):
    order = (
        *("init", "config", "train", "embed", "index", "search", "classify", "eval"),
        *("serve", "map", "plot", "data", "tokenize", "info", "demo"),
    )


app = typer.Typer(
    name="clipkit",
    cls=_Commands,
    help="Pretrain CLIP-style models, classify images zero-shot, search images by text.",
    no_args_is_help=True,
    # Plain help needs no rich, which alone would take a quarter of the time --help may take.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _name, _function in (
    ("init", config.init),
    ("config", config.config),
    ("train", train.train),
    ("embed", index.embed),
    ("search", search.search),
    ("classify", classify.classify),
    ("serve", serve.serve),
    ("map", map.draw),
    ("plot", plot.plot),
    ("tokenize", tokenize.tokenize),
    ("info", info.info),
    ("demo", demo.demo),
):
    app.command(_name, cls=Command)(_function)
app.add_typer(index.app, name="index")
app.add_typer(evaluate.app, name="eval")
app.add_typer(data.app, name="data")


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
    """Run the command line; an error raised on purpose becomes one line and exit code 1."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # a character the terminal lacks must not end it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="clipkit")
    except ClipkitError as error:
        _fail(str(error))
    except OSError as error:
        message = _explain(error)
        if message is None:
            raise
        _fail(message)


def _explain(error: OSError) -> str | None:
    """The message for what the machine refuses; None if the error is a bug of clipkit's."""
    if error.errno in FULL:
        return (
            f"the disk is full ({error.filename or 'while writing'}); finished work is saved: free "
            "some space and run the same command again"
        )
    if error.errno not in _REFUSED:
        return None
    reason = (error.strerror or "unknown error").lower()
    return f"cannot access {error.filename or 'a file'}: {reason}"


def _fail(message: str) -> NoReturn:
    if options.verbosity == Verbosity.VERBOSE:
        traceback.print_exc()
    print_error(" ".join(f"error: {message}".splitlines()))
    sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one plain line; its place in the code only with ``--verbose``."""
    del category, file, line
    place = f" ({filename}:{lineno})" if options.verbosity == Verbosity.VERBOSE else ""
    note(f"warning: {message}{place}")


# Decoding threads share the cores with torch's. Endless spinning, torch's default, makes the same
# work 2.7 times slower beside another busy process. Sleeping at once is slow too: ViT-S-32 trains
# at 23 samples a second on two cores, and at 32 if threads spin for a while first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
# Messages of libraries that mean nothing to the user.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

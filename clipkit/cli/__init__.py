"""The command line: parse, call one task, print. No logic.

Results go to stdout, progress and warnings to stderr. Exit code 1: something could not be done and
one sentence says why; 2: wrong usage; 130: interrupted.
"""

import errno
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from clipkit import __version__
from clipkit.cli import (
    classify,
    compare,
    config,
    data,
    demo,
    evaluate,
    index,
    info,
    map,
    plot,
    probe,
    search,
    serve,
    tokenize,
    train,
)
from clipkit.cli.output import note
from clipkit.errors import FULL, ClipkitError

_FORBIDDEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
)
"""What the machine refuses, which is no bug of clipkit's."""


class _InOrderOfUse(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """All commands in the order in which they are used; typer would put groups last."""
        first = (
            "init",
            "train",
            "embed",
            "index",
            "search",
            "classify",
            "eval",
            "compare",
            "probe",
        )
        rest = [name for name in super().list_commands(ctx) if name not in first]
        return [*first, *rest]


app = typer.Typer(
    name="clipkit",
    cls=_InOrderOfUse,
    help="Pretrain CLIP-style models, classify images zero-shot, search images by text.",
    no_args_is_help=True,
    # Plain help needs no rich, which alone would take a quarter of the time --help may take.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("init")(config.init)
app.command("train")(train.train)
app.command("config")(config.config)
app.command("embed")(index.embed)
index.app.command("add")(index.add)
index.app.command("remove")(index.remove)
index.app.command("sync")(index.sync)
index.app.command("compact")(index.compact)
index.app.command("merge")(index.merge)
index.app.command("check")(index.check)
index.app.command("calibrate")(index.calibrate)
app.add_typer(index.app, name="index")
app.command("search")(search.search)
app.command("classify")(classify.classify)
app.add_typer(evaluate.app, name="eval")
app.command("compare")(compare.compare)
app.command("probe")(probe.probe)
app.command("serve")(serve.serve)
app.command("tokenize")(tokenize.tokenize)
app.add_typer(data.app, name="data")
app.command("map")(map.draw)
app.command("plot")(plot.plot)
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
    if isinstance(sys.stdout, TextIOWrapper):  # a character the terminal lacks is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="clipkit")
    except ClipkitError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in FULL:
            _fail(
                f"the disk is full ({error.filename or 'while writing'}); what was finished before "
                "is kept: make room and run the same command again"
            )
        if error.errno not in _FORBIDDEN:
            raise
        _fail(f"{error.filename or 'a file'} cannot be used ({error.strerror}); mend that")


def _fail(message: str) -> NoReturn:
    note(" ".join(f"error: {message}".splitlines()))
    sys.exit(1)


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
    note(f"warning: {message}")


# Decoding threads and torch's share the cores: waiting by spinning without end, torch's default,
# made the same work 2.7 times slower beside another busy process. Sleeping at once is slow too:
# ViT-S-32 trained at 23 samples a second on two cores, and at 32 where threads spin a while first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
# Library chatter that means nothing to the person at the terminal.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

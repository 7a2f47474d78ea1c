"""clipkit train."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.output import note, note_skipped, print_facts
from clipkit.errors import ClipkitError
from clipkit.progress import is_main_process


def train(
    config: Annotated[Path, typer.Argument(help="TOML file with the run's configuration.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one field; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
) -> None:
    """Pretrain a dual encoder on image–caption pairs."""
    from clipkit.config import load_config

    try:
        resolved = load_config(config, settings or [])
    except ClipkitError:
        if not is_main_process():
            # torchrun ends all processes when one ends: the first is to tell what is wrong.
            time.sleep(10)
            raise typer.Exit(1) from None
        raise

    from clipkit.tasks.train import train as run

    result = run(resolved, out, resume=resume)
    if not is_main_process():
        raise typer.Exit(0 if result.finished else 130)
    note_skipped(len(result.skipped), f"listed in {result.run / 'skipped.jsonl'}")
    if result.cut.cut:
        note(result.cut.render())
    if not result.finished:
        overrides = [word for setting in settings or [] for word in ("--set", setting)]
        words = ["clipkit", "train", str(config), *overrides, "--out", str(out), "--resume"]
        note(f"stopped at step {result.step}, saved; go on with: {shlex.join(words)}")
        raise typer.Exit(130)
    print_facts(
        [
            ("run", out),
            ("steps", result.step),
            *((f"held-out {name}", f"{value:.3f}") for name, value in result.held_out.items()),
            *([("best", _best(result.best, out))] if result.best else []),
        ]
    )


def _best(best: dict[str, Any], out: Path) -> str:
    return f"{best['metric']} {best['value']:.3f} at step {best['step']}: {out / 'best'}"

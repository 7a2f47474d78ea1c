"""clipkit train."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import note, note_skipped, print_facts, print_json
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
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pretrain a dual encoder on image–caption pairs."""
    from clipkit.config import load_config

    try:
        resolved = load_config(config, settings or [])
    except ClipkitError:
        if not is_main_process():
            # torchrun stops all processes when one ends; the main process must report first.
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
        note(f"stopped at step {result.step}, saved; continue with: {shlex.join(words)}")
        raise typer.Exit(130)
    if as_json:
        print_json(result.to_dict())
        return
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

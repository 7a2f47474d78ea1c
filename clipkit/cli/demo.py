"""clipkit demo."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import print_facts


def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path(
        "clipkit-demo"
    ),
    minutes: Annotated[float, typer.Option(min=0.05, help="Longest training, minutes.")] = 5.0,
) -> None:
    """Pretrain on emoji drawings, then classify, index, search, and write a page to look at."""
    from clipkit.tasks.demo import demo as run

    result = run(out, minutes=minutes)
    print_facts(
        [
            *((name, f"{value:.3f}") for name, value in result.metrics.items()),
            ("page", result.page),
        ]
    )

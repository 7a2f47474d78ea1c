"""clipkit demo."""

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import note, print_facts, print_table


def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path(
        "clipkit-demo"
    ),
    minutes: Annotated[float, typer.Option(min=0.05, help="Longest training, minutes.")] = 5.0,
) -> None:
    """Pretrain on emoji drawings and search them.

    Then classify and measure on drawings of an unseen style, and write a page to look at.
    """
    from clipkit.demo.run import demo as run

    result = run(out, minutes=minutes, report=note)
    print_table(
        ("results on the held-out style", "model", "chance"),
        [(name, f"{m:.3f}", f"{result.chance[name]:.4f}") for name, m in result.metrics.items()],
    )
    print_facts([("page", result.page)])

"""clipkit demo."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import note, print_facts, print_json, print_table


def demo(
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("clipkit-demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Maximum training minutes.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Pretrain on emoji drawings and search them.

    Then classify and evaluate on drawings of a held-out style, and write a results page.
    """
    from clipkit.demo.run import demo as run

    result = run(out, minutes=minutes, report=note)
    if as_json:
        print_json({**asdict(result), "page": str(result.page)})
        return
    print_table(
        ("results on the held-out style", "model", "chance"),
        [(name, f"{m:.3f}", f"{result.chance[name]:.4f}") for name, m in result.metrics.items()],
    )
    print_facts([("page", result.page)])

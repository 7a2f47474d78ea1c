"""clipkit tokenize."""

from typing import Annotated

import typer

from clipkit.cli.options import Json
from clipkit.cli.output import print_facts, print_json


def tokenize(
    texts: Annotated[list[str], typer.Argument(help="The texts.")],
    as_json: Json = False,
) -> None:
    """Show how a model tokenizes texts.

    Shows tokens, ids, how many of the 77 tokens are used, and truncated text.
    """
    from clipkit.models.tokenizer import CONTEXT, inspect

    for number, text in enumerate(texts):
        found = inspect(text)
        if as_json:
            print_json(
                {
                    "text": text,
                    "ids": found.ids,
                    "tokens": found.tokens,
                    "used": found.used,
                    "needed": found.needed,
                    "context": CONTEXT,
                    "lost": found.lost,
                }
            )
            continue
        if number:
            print()
        print_facts(
            [
                ("text", text),
                ("tokens", " ".join(found.tokens)),
                ("ids", " ".join(map(str, found.ids))),
                ("used", f"{found.used} of {CONTEXT}{_excess(found.needed)}"),
                ("cut", found.lost or "nothing"),
            ]
        )


def _excess(needed: int) -> str:
    from clipkit.models.tokenizer import CONTEXT

    return f", the whole text needs {needed}" if needed > CONTEXT else ""

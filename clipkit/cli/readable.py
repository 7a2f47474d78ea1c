"""What an index finds and what its scores mean, for people: index calibrate and shared printing."""

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipkit.cli.output import load_maker, note, print_facts, print_json, print_table, printable

if TYPE_CHECKING:
    from clipkit.manifest import ModelRef
    from clipkit.model.encoder import Encoder
    from clipkit.model.query import QueryEncoder
    from clipkit.store.calibration import Calibration
    from clipkit.store.hit import Hit
    from clipkit.store.hits import Hits


def calibrate(
    index: Annotated[Path, typer.Argument(help="Directory of the index.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Make the scores of an index probabilities.

    Captions of its own images are asked, or generic ones where few have any, and what they find is
    measured again.
    """
    from clipkit.tasks.calibrate import calibrate_index

    found = calibrate_index(index, load_text)
    if as_json:
        print_json(found.to_dict())
        return
    measured = found.measured
    print_facts(
        [
            ("index", index),
            ("recall@10", f"{measured.recall:.3f} of {measured.queries} {found.source}"),
            ("one query", f"{measured.milliseconds:.2f} ms"),
            *describe_calibration(found.calibration),
        ]
    )


def load_text(model: "ModelRef", what: str) -> "Encoder | QueryEncoder":
    """The encoder of the captions of what a model made, without torch where that can be."""
    from clipkit.model.query import load_query_encoder

    return load_query_encoder(model) or load_maker(model, what, None)


def describe_calibration(found: "Calibration | None") -> list[tuple[str, str]]:
    """What is known of an index's probabilities, as facts."""
    if found is None:
        return []
    if not found.informative:
        note(
            "the scores of this model do not tell what is there from what is not "
            f"(AUROC {found.auroc:.2f}, guessing is 0.5): a search shows no probabilities"
        )
        return [("probabilities", "none")]
    figures = f"AUROC {found.auroc:.3f}, calibration error {found.error:.3f}"
    return [("probabilities", f"{figures} on {found.captions} {found.source}")]


def describe_tuning(detail: dict[str, Any]) -> list[tuple[str, str]]:
    """What the manifest of an index says of its tuning, as facts."""
    tuning = detail.get("tuning")
    if tuning is None:
        return []
    found, wanted, asked = tuning["recall"], tuning["wanted"], tuning["source"]
    if found < wanted:
        note(f"no spec within the memory reaches recall {wanted}; this one comes closest")
    facts = f"{found:.3f} of {tuning['queries']} {asked}, {wanted} wanted"
    return [("recall@10", facts), ("one query", f"{tuning['milliseconds']:.2f} ms")]


def print_hits(hits: "Sequence[Hit]") -> None:
    """A table of hits, with their probabilities where they have any."""
    told = any(hit.probability is not None for hit in hits)
    header = ("rank", *(("match",) if told else ()), "score", "key")
    rows = [
        (str(rank), *((f"{hit.probability:.0%}",) if told else ()), f"{hit.score:.3f}", hit.key)
        for rank, hit in enumerate(hits, 1)
    ]
    print_table(header, rows)


def print_pictures(hits: "Hits") -> None:
    """The pictures of hits, each under its key, in a terminal that can show any."""
    from clipkit.pages.terminal import find_drawer

    draw = find_drawer(os.environ) if sys.stdout.isatty() else None
    if draw is None:
        note(
            "no pictures are shown: expected a terminal with 24-bit colours "
            "(COLORTERM=truecolor); --html writes a page of them"
        )
        return
    for rank, hit in enumerate(hits, 1):
        picture = hits.picture(hit)
        print(f"\n{rank:4}  {printable(hit.key)}")
        print(
            draw(picture) if picture else "      its picture cannot be read\n",
            end="",
        )


def print_described(
    found: "Sequence[tuple[str | None, Sequence[Hit], Sequence[dict[str, Any]]]]", as_csv: bool
) -> None:
    """Hits with their records, of each query of several: a JSON object a line, or a CSV table."""
    lines: list[dict[str, Any]] = []
    for query, hits, records in found:
        asked = {} if query is None else {"query": query}
        for rank, (hit, record) in enumerate(zip(hits, records, strict=True), 1):
            chance = {} if hit.probability is None else {"probability": hit.probability}
            told = {**asked, "rank": rank, "score": hit.score, **chance, "key": hit.key}
            lines.append({**told, **record})
    if not as_csv:
        for line in lines:
            print_json(line)
        return
    for line in lines:
        line["captions"] = "\n".join(line["captions"])
        more = line.pop("more")
        line |= {name if name not in line else f"more_{name}": more[name] for name in more}
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(lines[0] if lines else ("rank", "score", "key"))
    table.writerows(line.values() for line in lines)

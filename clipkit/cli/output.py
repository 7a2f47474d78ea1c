"""What commands print: tables and facts for people, JSON and CSV for programs.

Results go to stdout, notes to stderr. Text from outside, such as file names, is printed with its
control characters escaped.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from clipkit.cli import options
from clipkit.cli.options import PrecisionName, Verbosity
from clipkit.errors import ArtifactError

if TYPE_CHECKING:
    from clipkit.artifacts import ModelRef
    from clipkit.classifiers.zero_shot import Classifier
    from clipkit.data.labels import Label
    from clipkit.index.calibration import Calibration
    from clipkit.index.hits import Hit, Hits
    from clipkit.models.encoder import Encoder


# A file name may hold what a terminal takes for a command, or for a new line.
_CONTROLS = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160)]}


def printable(text: str) -> str:
    r"""A text on one line, control characters as ``\x1b``."""
    return text.translate(_CONTROLS)


def print_json(item: dict[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(item, ensure_ascii=False), flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns, never cut: numbers to the right, texts to the left."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(header))]
    for line in lines:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("%", "").replace("-", "").isdigit()


def print_text(text: str) -> None:
    """Lines that are laid out already."""
    print("\n".join(map(printable, text.splitlines())))


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one a line, the values aligned."""
    shown = [(name, printable(str(value))) for name, value in facts]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}".rstrip())


def write_csv(file: Path, rows: Sequence[dict[str, Any]], header: Sequence[str] = ()) -> None:
    """Write rows as a CSV table to a file, or to stdout for ``-``.

    Args:
        file: what ``--csv`` names.
        rows: values by column; the columns are those of the first row.
        header: the columns of a table without rows.

    Raises:
        ArtifactError: the file cannot be written.
    """

    def write(stream: TextIO) -> None:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(rows[0] if rows else header)
        table.writerows(row.values() for row in rows)

    if file == Path("-"):
        write(sys.stdout)
        return
    try:
        with file.open("w", encoding="utf-8", newline="") as stream:
            write(stream)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {file}: {error.strerror}; name another file with --csv"
        ) from None
    note(f"wrote {file}")


def print_result(facts: dict[str, Any], as_json: bool) -> None:
    """Named values: one JSON object, or a line each."""
    if as_json:
        print_json(facts)
    else:
        print_facts(facts.items())


def print_error(message: str) -> None:
    """Print to stderr, whatever the verbosity."""
    print("\n".join(map(printable, message.splitlines())), file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print what is not the result, to stderr; nothing with ``--quiet``."""
    if options.verbosity > Verbosity.QUIET:
        print_error(message)


def note_skipped(count: int, where: str) -> None:
    """Say how many items were skipped, if any were."""
    if count:
        note(f"skipped {count} {'item' if count == 1 else 'items'}: {where}")


def model_or_default(model: str | None) -> str:
    """The MODEL named, or the default one, saying so."""
    if model:
        return model
    from clipkit.models.loading import DEFAULT_MODEL

    note(f"using the model {DEFAULT_MODEL}; name another one with --model")
    return DEFAULT_MODEL


def load_encoder(
    model: str | None, precision: PrecisionName | None, device: str | None = None
) -> "Encoder":
    """The encoder that ``--model``, ``--precision`` and ``--device`` name."""
    from clipkit.models.inference_precision import DEFAULT_PRECISION
    from clipkit.models.loading import load_model

    return load_model(
        model_or_default(model), precision=precision or DEFAULT_PRECISION, device=device
    )


def load_maker(
    model: "ModelRef", what: str, precision: PrecisionName | None, device: str | None = None
) -> "Encoder":
    """The encoder that a manifest names, with ``--precision`` and ``--device``."""
    from clipkit.models.inference_precision import DEFAULT_PRECISION
    from clipkit.models.loading import load_model_ref

    return load_model_ref(model, what, precision=precision or DEFAULT_PRECISION, device=device)


def read_labels_option(
    labels: str, templates: str | None, *, single: bool = False
) -> "list[Label] | Classifier":
    """The labels or the saved classifier that ``--labels`` names.

    Nothing slow is done, so that mistakes show before the data are opened or a model is loaded.
    """
    from clipkit.classifiers.heads import (
        is_classifier,
        list_templates,
        read_labels_or_classifier,
    )
    from clipkit.data.prompts import read_labels

    list_templates(templates)
    # Unlike Python, the command line takes labels as one string: "cat,dog".
    given = Path(labels) if is_classifier(labels) else read_labels(labels, single=single)
    return read_labels_or_classifier(given, templates)


def load_classifier_option(
    found: "list[Label] | Classifier",
    templates: str | None,
    model: str | None,
    precision: PrecisionName | None,
    device: str | None,
    *,
    background: bool = False,
) -> "tuple[Encoder, Classifier]":
    """The encoder and the classifier for what ``read_labels_option`` returned."""
    from clipkit.classifiers.heads import load_classifier

    if model or isinstance(found, list):
        encoder = load_encoder(model, precision, device)
    else:
        encoder = load_maker(found.model, "the classifier", precision, device)
    return load_classifier(found, encoder, templates, background=background)


def describe_calibration(found: "Calibration | None") -> list[tuple[str, str]]:
    """What is known of an index's probabilities, as facts."""
    if found is None:
        return []
    grading = f", {found.grading}" if found.grading else ""
    evidence = ("evidence", f"{found.captions} {found.source}{grading}")
    auroc = f"AUROC {found.auroc:.3f} of captions against random words"
    if not found.informative:
        note(
            f"the scores of this model say too little ({auroc}, chance is 0.5): a search shows no "
            "probabilities"
        )
        return [("probabilities", "none"), evidence]
    if found.hit is None or found.any_match is None:
        note(
            "too few images have captions to calibrate probabilities with: a search only says "
            'whether random words score as high ("no good match")'
        )
        return [("probabilities", "none"), evidence, ("scores", auroc)]
    return [
        ("evidence", evidence[1]),
        ("scores", auroc),
        ("probability of a hit", f"calibration error {found.hit.error:.3f}"),
        ("probability of any match", f"calibration error {found.any_match.error:.3f}"),
    ]


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
    calibrated = any(hit.probability is not None for hit in hits)
    header = ("rank", *(("probability",) if calibrated else ()), "score", "key")
    rows = [
        (
            str(rank),
            *((f"{hit.probability:.0%}",) if calibrated else ()),
            f"{hit.score:.3f}",
            hit.key,
        )
        for rank, hit in enumerate(hits, 1)
    ]
    print_table(header, rows)


def print_images(hits: "Hits") -> None:
    """The images of hits, each below its key, if the terminal can show images."""
    from clipkit.display.terminal import find_drawer

    draw = find_drawer(os.environ) if sys.stdout.isatty() else None
    if draw is None:
        note(
            "no images are shown: expected a terminal with 24-bit colours "
            "(COLORTERM=truecolor); --html writes a page of them"
        )
        return
    for rank, hit in enumerate(hits, 1):
        image = hits.thumbnail(hit)
        print(f"\n{rank:4}  {printable(hit.key)}")
        print(
            draw(image) if image else "      the image cannot be read\n",
            end="",
        )


def print_described(
    found: "Sequence[tuple[str | None, Sequence[Hit], Sequence[dict[str, Any]]]]",
    as_json: bool,
    file: Path | None,
) -> None:
    """Hits of several queries with their records: JSON, one object a line, or a CSV file."""
    lines: list[dict[str, Any]] = []
    for query, hits, records in found:
        asked = {} if query is None else {"query": query}
        for rank, (hit, record) in enumerate(zip(hits, records, strict=True), 1):
            chance = {} if hit.probability is None else {"probability": hit.probability}
            found_by = {**asked, "rank": rank, "score": hit.score, **chance, "key": hit.key}
            lines.append({**found_by, **record})
    if as_json:
        for line in lines:
            print_json(line)
    if file is None:
        return
    for line in lines:
        line["captions"] = "\n".join(line["captions"])
        more = line.pop("more")
        line |= {name if name not in line else f"more_{name}": more[name] for name in more}
    write_csv(file, lines, ("rank", "score", "key"))

"""clipkit eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.classify import Labels, Templates, read_choice
from clipkit.cli.output import (
    DATA_HELP,
    MODEL_HELP,
    CaptionColumn,
    ImageColumn,
    LabelColumn,
    Precision,
    load_encoder,
    note,
    note_skipped,
    print_facts,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from clipkit.data.open_source import Source
    from clipkit.evaluation.bootstrap import Estimate
    from clipkit.evaluation.report import Report


app = typer.Typer(help="Measure a model on data.", no_args_is_help=True)
Data = Annotated[str, typer.Argument(help=DATA_HELP)]
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Page = Annotated[
    Path | None, typer.Option("--report", help="An HTML page to write: tables, plots, pictures.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]
SHOWN = 5


@app.command("retrieval")
def retrieval(
    data: Data,
    model: Model,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart", help="Equal captions of several images are right for their own one alone."
        ),
    ] = False,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    precision: Precision = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Recall of captions finding images and the reverse.

    Recall@1, 5, 10 and 50 both ways (the share of queries that find what belongs to them among the
    first 1, 5, 10 or 50), the median rank of what was looked for, and mean average precision, each
    with a 95 % interval over the images.
    """
    from clipkit.data.open_source import open_source

    source = open_source(data, image=image_column, caption=caption_column)

    from clipkit.tasks.evaluate import evaluate_retrieval

    report = evaluate_retrieval(
        source,
        load_encoder(model, precision),
        equal_captions="apart" if apart else "merge",
        progress=not as_json,
    )
    _print(report, source, page, as_json)


@app.command("zeroshot")
def zeroshot(
    data: Data,
    labels: Labels,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    templates: Templates = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    precision: Precision = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Accuracy of classifying images that have labels.

    The share of images whose label is the likeliest one, or among the five likeliest; means over
    the classes of accuracy, precision and F1; the area under the ROC curve; and how far
    probabilities are from what they say; each with a 95 % interval over the images.
    """
    from clipkit.data.open_source import open_source

    choice = read_choice(labels, templates)
    source = open_source(data, image=image_column, caption="", label=label_column)

    from clipkit.tasks.evaluate import evaluate_zero_shot

    encoder, classifier = choice.load(model, precision)
    report = evaluate_zero_shot(source, encoder, classifier, progress=not as_json)
    _print(report, source, page, as_json)


@app.command("suite")
def suite(
    suite: Annotated[Path, typer.Argument(help="TOML with a [[set]] for each data set.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory that results are added to.")] = Path(
        "results"
    ),
    precision: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a set.")] = False,
) -> None:
    """Measure a model on many data sets.

    A set has a name, data (also a directory in CLIP_benchmark's WebDataset layout) and a task
    (zero-shot or retrieval), and may have labels and templates. Results that are there already are
    not measured again; results.csv and results.parquet hold them all.
    """
    from clipkit.evaluation.suite import read_suite

    sets = read_suite(suite)

    from clipkit.tasks.suite import evaluate_suite

    encoder = load_encoder(model, precision)
    found = evaluate_suite(sets, encoder, out, root=suite.parent, report=note, progress=not as_json)
    if as_json:
        for record in found:
            print_json(record.to_dict())
        return
    rows = []
    for record in found:
        name, one = next(iter(record.estimates.items()))
        shown = (f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}")
        rows.append((record.set, record.task, str(record.counts["images"]), name, *shown))
    print_table(("set", "task", "images", "metric", "value", "95 % interval"), rows)
    note(f"all metrics are in {out / 'results.csv'}")


def _print(report: "Report", source: "Source", page: Path | None, as_json: bool) -> None:
    first = "; ".join(f"{item.key}: {item.reason}" for item in report.skipped[:SHOWN])
    more = len(report.skipped) - SHOWN
    note_skipped(len(report.skipped), first + (f"; and {more} more" if more > 0 else ""))
    if report.truncated:
        note(report.truncated)
    for text in report.notes:
        note(text)
    if page is not None:
        from clipkit.reports.evaluation import write_page

        write_page(report, source, page)
        note(f"the page is {page}")
    if as_json:
        print_json(report.to_dict())
        return
    print_facts(
        [
            ("model", report.model),
            ("data", report.data),
            *report.counts.items(),
            *((name, with_interval(value)) for name, value in report.estimates.items()),
        ]
    )


def with_interval(estimate: "Estimate") -> str:
    """A figure and its 95 % interval: ``0.739 (0.702 to 0.771)``."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

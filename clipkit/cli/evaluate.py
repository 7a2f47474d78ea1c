"""clipkit eval: measure models on data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipkit.cli.options import (
    DATA_HELP,
    MODEL_HELP,
    BatchSize,
    CaptionColumn,
    Csv,
    Data,
    Device,
    Encoding,
    Html,
    ImageColumn,
    ImageRoot,
    Json,
    LabelColumn,
    Labels,
    Model,
    Precision,
    RequiredModel,
    Templates,
    Workers,
    new_group,
)
from clipkit.cli.output import (
    load_classifier_option,
    load_encoder,
    note,
    note_skipped,
    print_facts,
    print_json,
    print_table,
    read_labels_option,
    write_csv,
)

if TYPE_CHECKING:
    from clipkit.data.open_source import Source
    from clipkit.evaluation.bootstrap import Estimate
    from clipkit.evaluation.report import Report
    from clipkit.evaluation.significance import Difference
    from clipkit.tasks.compare import Comparison
    from clipkit.tasks.probe import ProbeReport


app = new_group("Measure a model on data.")
SHOWN = 5
"""Skipped images whose names are printed."""


@app.command("retrieval")
def retrieval(
    data: Data,
    model: RequiredModel,
    equal_captions: Annotated[
        Literal["merge", "apart"],
        typer.Option(
            help="merge: a caption that several images share is right for all of them; "
            "apart: for its own image only."
        ),
    ] = "merge",
    ties: Annotated[
        Literal["against", "average"],
        typer.Option(
            help="Equal scores: against ranks the right item last among them; average takes the "
            "mean over all their orders."
        ),
    ] = "against",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
    html: Html = None,
    csv: Csv = None,
) -> None:
    """Measure text→image and image→text retrieval.

    Recall@1, 5, 10 and 50 in both directions (the share of queries with a correct result among the
    first 1, 5, 10 or 50), the median rank of the first correct result, and mean average precision,
    each with a 95 % interval over the images.
    """
    from clipkit.data.open_source import open_source

    source = open_source(
        data, image=image_column, caption=caption_column, image_root=image_root, encoding=encoding
    )

    from clipkit.tasks.evaluate import evaluate_retrieval

    report = evaluate_retrieval(
        source,
        load_encoder(model, precision, device),
        equal_captions=equal_captions,
        ties=ties,
        batch_size=batch_size,
        workers=workers,
        progress=not as_json,
    )
    _print_report(report, source, as_json=as_json, html=html, csv=csv)


@app.command("zero-shot")
def zero_shot(
    data: Data,
    labels: Labels,
    model: Model = None,
    templates: Templates = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
    html: Html = None,
    csv: Csv = None,
) -> None:
    """Measure classification of labelled images.

    Top-1 and top-5 accuracy; accuracy, precision and F1 averaged over the classes; the area under
    the ROC curve; and calibration error; each with a 95 % interval over the images.
    """
    from clipkit.data.open_source import open_source

    found = read_labels_option(labels, templates)
    source = open_source(
        data,
        image=image_column,
        caption="",
        label=label_column,
        image_root=image_root,
        encoding=encoding,
    )

    from clipkit.tasks.evaluate import evaluate_zero_shot

    encoder, classifier = load_classifier_option(found, templates, model, precision, device)
    report = evaluate_zero_shot(
        source,
        encoder,
        classifier,
        batch_size=batch_size,
        workers=workers,
        progress=not as_json,
    )
    _print_report(report, source, as_json=as_json, html=html, csv=csv)


def _print_report(
    report: "Report", source: "Source", *, as_json: bool, html: Path | None, csv: Path | None
) -> None:
    first = "; ".join(f"{item.key}: {item.reason}" for item in report.skipped[:SHOWN])
    more = len(report.skipped) - SHOWN
    note_skipped(len(report.skipped), first + (f"; and {more} more" if more > 0 else ""))
    if report.truncated:
        note(report.truncated)
    for text in report.notes:
        note(text)
    if html is not None:
        from clipkit.reports.evaluation import write_page

        write_page(report, source, html)
        note(f"wrote {html}")
    if csv is not None:
        rows = [
            {"metric": name, "value": one.value, "low": one.low, "high": one.high}
            for name, one in report.estimates.items()
        ]
        write_csv(csv, rows)
    if as_json:
        print_json(report.to_dict())
    elif csv != Path("-"):
        print_facts(
            [
                ("model", report.model),
                ("precision", report.model.precision),
                ("data", report.data),
                *report.counts.items(),
                *((name, with_interval(value)) for name, value in report.estimates.items()),
            ]
        )


def with_interval(estimate: "Estimate") -> str:
    """A figure and its 95 % interval: ``0.739 (0.702 to 0.771)``."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


@app.command("suite")
def suite(
    suite: Annotated[
        Path, typer.Argument(metavar="SUITE", help="TOML with a [[set]] for each data set.")
    ],
    model: RequiredModel,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("results"),
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on many data sets.

    A set has a name, data (also a directory in CLIP_benchmark's WebDataset layout) and a task
    (zero-shot or retrieval), and may have labels and templates. Sets with a result are not measured
    again; results.csv and results.parquet hold all results.
    """
    from clipkit.evaluation.suite import read_suite

    sets = read_suite(suite)

    from clipkit.tasks.suite import evaluate_suite

    encoder = load_encoder(model, precision, device)
    found = evaluate_suite(
        sets,
        encoder,
        out,
        root=suite.parent,
        report=note,
        batch_size=batch_size,
        workers=workers,
        progress=not as_json,
    )
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


@app.command("compare")
def compare(
    one: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The model to compare it with.")],
    data: Annotated[str, typer.Option(metavar="DATA", help=DATA_HELP)],
    labels: Annotated[
        str | None,
        typer.Option(help="Compare zero-shot classification with these labels, not retrieval."),
    ] = None,
    templates: Templates = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    label_column: LabelColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
    csv: Csv = None,
) -> None:
    """Test whether one of two models is better on the same data.

    Both models see the same images, so the test is paired. The difference is OTHER minus MODEL; for
    median ranks and errors lower is better. The verdict is about mean recall, or about top-1
    accuracy with --labels; the p-values of all other metrics are corrected for their number.
    """
    from clipkit.data.open_source import open_source
    from clipkit.data.prompts import read_labels

    classes = None if labels is None else read_labels(labels)
    captions = caption_column if classes is None else ""
    source = open_source(
        data,
        image=image_column,
        caption=captions,
        label=label_column,
        image_root=image_root,
        encoding=encoding,
    )

    from clipkit.tasks.compare import compare as run

    found = run(
        load_encoder(one, precision, device),
        load_encoder(other, precision, device),
        source,
        labels=classes,
        templates=templates,
        names=(one, other),
        batch_size=batch_size,
        workers=workers,
        progress=not as_json,
    )
    for text in found.reports[0].notes:
        note(text)
    _print_comparison(found, as_json=as_json, csv=csv)


def _print_comparison(found: "Comparison", *, as_json: bool, csv: Path | None) -> None:
    rows = (found.headline, *found.differences)
    if csv is not None:
        table = [
            {
                "metric": row.name,
                **dict(zip(found.names, (row.first, row.second), strict=True)),
                "difference": row.difference.value,
                "low": row.difference.low,
                "high": row.difference.high,
                "p": row.p,
                "better": found.better_at(row),
            }
            for row in rows
        ]
        write_csv(csv, table)
    if as_json:
        print_json(found.to_dict())
    elif csv != Path("-"):
        header = ("metric", *found.names, "difference", "95 % interval", "p", "better")
        print_table(header, [(*_cells(row), found.better_at(row) or "") for row in rows])
        print(found.verdict)


def _cells(row: "Difference") -> tuple[str, ...]:
    change = row.difference
    p = "" if row.p is None else f"{row.p:.2g}"
    return (
        row.name,
        f"{row.first:.3f}",
        f"{row.second:.3f}",
        f"{change.value:+.3f}",
        f"{change.low:+.3f} to {change.high:+.3f}",
        p,
    )


@app.command("probe")
def probe(
    data: Data,
    model: RequiredModel,
    shots: Annotated[
        str, typer.Option(help="Labelled images per class to learn from.")
    ] = "1,2,4,8,16",
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Test data; default: half of each class.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Words for the classes, as for classify.")
    ] = None,
    templates: Templates = None,
    methods: Annotated[
        str, typer.Option(help="Which methods to compare.")
    ] = "linear,neighbours,tip-adapter,tip-adapter-f",
    seeds: Annotated[int, typer.Option(min=1, help="How many random draws of the shots.")] = 5,
    save: Annotated[
        Path | None,
        typer.Option(help="Directory for the best classifier, learned from the most shots."),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    precision: Precision = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
    workers: Workers = "auto",
    as_json: Json = False,
    csv: Csv = None,
) -> None:
    """Learn to classify from a few labelled images per class.

    Compares logistic regression, nearest neighbours and Tip-Adapter on the same vectors. As many
    further images of each class (at most four) select the hyperparameters. Intervals cover both
    draws and test images.
    """
    from clipkit.data.open_source import open_source
    from clipkit.data.prompts import read_labels, read_templates

    counts = _numbers(shots)
    classes, captions = labels and read_labels(labels), read_templates(templates)
    source = open_source(
        data,
        image=image_column,
        caption="",
        label=label_column,
        image_root=image_root,
        encoding=encoding,
    )
    tested = None
    if test is not None:
        tested = open_source(
            test,
            image=image_column,
            caption="",
            label=label_column,
            image_root=image_root,
            encoding=encoding,
        )

    from clipkit.classifiers.few_shot import require_methods
    from clipkit.classifiers.heads import save_classifier
    from clipkit.tasks.probe import probe as run

    chosen = require_methods(methods.split(","))
    found = run(
        source,
        load_encoder(model, precision, device),
        test=tested,
        labels=classes or None,
        templates=captions,
        shots=counts,
        methods=chosen,
        seeds=seeds,
        batch_size=batch_size,
        workers=workers,
        progress=not as_json,
    )
    for text in found.notes:
        note(text)
    if save:
        save_classifier(found.best, save, {"data": data, "shots": shots, "methods": methods})
        note(f"saved the {found.best.kind} classifier as {save}")
    _print_probe(found, as_json=as_json, csv=csv)


def _print_probe(found: "ProbeReport", *, as_json: bool, csv: Path | None) -> None:
    if csv is not None:
        table = [
            {
                "method": row.method,
                "shots": row.shots,
                "accuracy": row.accuracy.value,
                "low": row.accuracy.low,
                "high": row.accuracy.high,
                "mean_per_class": row.mean_per_class.value,
            }
            for row in found.results
        ]
        write_csv(csv, table)
    if as_json:
        print_json(found.to_dict())
        return
    if csv == Path("-"):
        return
    facts = [("model", found.model), ("data", found.data), ("classes", len(found.classes))]
    print_facts([*facts, ("tested on", found.tested)])
    print()
    header = ("method", "shots", "accuracy", "95 % interval", "mean per class")
    print_table(
        header,
        [
            (
                row.method,
                str(row.shots),
                f"{row.accuracy.value:.3f}",
                f"{row.accuracy.low:.3f} to {row.accuracy.high:.3f}",
                f"{row.mean_per_class.value:.3f}",
            )
            for row in found.results
        ],
    )


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise typer.BadParameter(
            f"expected a list of numbers from 1, such as 1,2,4; found {text!r}"
        )
    return [int(part) for part in parts]

"""Evaluate a model on many data sets: ``clipkit eval suite SUITE.toml --model M --out RESULTS``."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, overload

from clipkit import __version__
from clipkit.arguments import require_encoder
from clipkit.artifacts import replacing, write_text
from clipkit.classifiers.heads import list_templates
from clipkit.data.formats.huggingface import HUB
from clipkit.data.labels import Label, own_labels
from clipkit.data.open_source import Source, open_source
from clipkit.data.prompts import read_labels, read_templates
from clipkit.display.dataframe import data_frame
from clipkit.display.html import table
from clipkit.errors import ArtifactError, ClipkitError, DataError
from clipkit.evaluation.bootstrap import Estimate
from clipkit.evaluation.clip_benchmark import is_benchmark, open_benchmark
from clipkit.evaluation.report import Report
from clipkit.evaluation.retrieval import EqualCaptions
from clipkit.evaluation.suite import SuiteSet, read_suite
from clipkit.models.embed_source import cached_pairs
from clipkit.models.encoder import BatchSize, Encoder
from clipkit.models.loading import load_model
from clipkit.progress import print_status
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.user_cache import key_of

RECORDS = "records"
COLUMNS = (
    *("set", "task", "model", "model_fingerprint", "precision", "data", "data_fingerprint"),
    *("settings", "images", "metric", "value", "low", "high", "clipkit", "measured"),
)
"""Of the table of results, which has a row for each metric."""


@dataclass(frozen=True)
class SuiteRecord:
    """The result of one model on one data set.

    Attributes:
        set: the name of the data set in the suite.
        task: ``"retrieval"`` or ``"zero-shot"``.
        model: the name of the model.
        model_fingerprint: of the model.
        precision: of the encoder.
        data: the name of the data.
        data_fingerprint: of the data.
        settings: what else the metrics depend on, such as labels and templates.
        counts: the number of images, captions, classes and so on.
        estimates: the metrics with their 95 % intervals.
        notes: caveats about the data, as sentences.
        clipkit: the version of clipkit.
        measured: date and time in UTC.
    """

    set: str
    task: str
    model: str
    model_fingerprint: str
    precision: str
    data: str
    data_fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    estimates: dict[str, Estimate]
    notes: list[str]
    clipkit: str
    measured: str

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data for JSON; the estimates are named ``metrics``."""
        plain = asdict(self)
        plain["metrics"] = plain.pop("estimates")
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "SuiteRecord":
        """The record with this ``to_dict()``."""
        estimates = {name: Estimate(**one) for name, one in plain["metrics"].items()}
        values = {one.name: plain[one.name] for one in fields(cls) if one.name != "estimates"}
        return cls(**values, estimates=estimates)


@dataclass(frozen=True)
class SuiteReport(Sequence[SuiteRecord]):
    """The results of one model on the data sets of a suite, in their order."""

    records: tuple[SuiteRecord, ...]

    @overload
    def __getitem__(self, place: int) -> SuiteRecord: ...
    @overload
    def __getitem__(self, place: slice) -> "SuiteReport": ...
    def __getitem__(self, place: int | slice) -> "SuiteRecord | SuiteReport":
        found = self.records[place]
        return SuiteReport(found) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self.records)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The records as plain data for JSON, by the name of the data set."""
        return {one.set: one.to_dict() for one in self.records}

    def to_pandas(self) -> Any:
        """A data frame with a row for each data set and metric.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = _rows(self.records)
        return data_frame({name: [row[name] for row in rows] for name in COLUMNS})

    def _repr_html_(self) -> str:
        rows = []
        for one in self.records:
            name, value = next(iter(one.estimates.items()))
            shown = f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}"
            rows.append((one.set, one.task, f"{one.counts['images']:,}", name, *shown))
        return table(("set", "task", "images", "metric", "value", "95 % interval"), rows)


@dataclass(frozen=True)
class _OpenSet:
    """A data set of a suite with its labels and templates."""

    name: str
    task: str
    source: Source
    labels: list[Label]
    templates: list[str]
    equal_captions: EqualCaptions

    @property
    def settings(self) -> dict[str, Any]:
        """What the metrics depend on besides model and images."""
        if self.task == "retrieval":
            return {"equal_captions": self.equal_captions}
        labels = [[str(label), list(label.phrases)] for label in self.labels]
        return {"labels": labels, "templates": self.templates}


class Encoding(TypedDict, total=False):
    """How images are encoded: the options of ``cached_pairs`` that do not change its result."""

    batch_size: BatchSize
    workers: int | str
    progress: bool


def evaluate_suite(
    suite: str | Path | Sequence[SuiteSet],
    encoder: Encoder | None = None,
    out: str | Path = "results",
    *,
    root: str | Path | None = None,
    report: Callable[[str], None] = print_status,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> SuiteReport:
    """Evaluate a model on each data set of a suite that has no result yet.

    Each result is a file in ``OUT/records``, named by everything that it depends on (model, data,
    labels, templates), and is never written again. ``OUT/results.csv`` and ``OUT/results.parquet``
    are tables of all results of all models.

    Args:
        suite: a TOML file with ``[[set]]`` tables, or the data sets.
        encoder: the model; None for the default model.
        out: the directory of the results.
        root: the directory that paths in the suite are relative to; None for the directory of the
            TOML file, or the current directory.
        report: called with one line about each data set.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show progress bars on stderr.

    Raises:
        ConfigError: the suite cannot be read.
        DataError: some data sets could not be evaluated; all others are.
        ArtifactError: the results cannot be written.
    """
    require_encoder(encoder)
    if isinstance(suite, (str, Path)):
        sets = read_suite(Path(suite))
        root = Path(suite).parent if root is None else root
    else:
        sets = list(suite)
    out, root = Path(out), Path(root or ".")
    encoder = encoder or load_model()
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write to {out} ({error.strerror})") from None
    encoding: Encoding = {"batch_size": batch_size, "workers": workers, "progress": progress}
    records, failed = [], []
    for one in sets:
        try:
            record, new = _evaluate(open_set(one, root, encoder, encoding), encoder, out, encoding)
        except ClipkitError as error:
            failed.append(one.name)
            report(f"{one.name}: {error}")
            continue
        report(f"{one.name}: {'evaluated' if new else 'already evaluated'}")
        records.append(replace(record, set=one.name))
    _write_tables(out)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(sets)} data sets could not be evaluated ({', '.join(failed)}; "
            f"see above); the results of the others are in {out}. Fix them and run the suite again"
        )
    return SuiteReport(tuple(records))


def open_set(
    one: SuiteSet, root: Path, encoder: Encoder, encoding: Encoding | None = None
) -> _OpenSet:
    """Open a data set with its labels and templates.

    Raises:
        DataError: it cannot be opened, or has no task.
        CaptionError: labels or templates that cannot be used.
    """
    spec = one.data if one.data.startswith(HUB) else str(root / one.data)
    templates = read_templates(_near(one.templates, root)) if one.templates else []
    if is_benchmark(Path(spec), one.split):
        given = open_benchmark(Path(spec), one.split)
        source = replace(given.source, spec=one.data)
        labels = read_labels(_near(one.labels, root)) if one.labels else given.labels
        captions = templates or given.templates
        return _OpenSet(one.name, given.task, source, labels, captions, one.equal_captions)
    if not one.task:
        raise DataError(
            f'the set {one.name!r} has no task; write task = "zero-shot" or "retrieval" in its '
            "[[set]] table"
        )
    zero_shot = one.task == "zero-shot"
    source = open_source(
        spec,
        image=one.image_column or None,
        caption="" if zero_shot else one.caption_column or None,
        label=one.label_column or None,
        image_root=root / one.image_root if one.image_root else None,
        encoding=one.encoding or None,
    )
    source = replace(source, spec=one.data)
    if not zero_shot:
        return _OpenSet(one.name, one.task, source, [], [], one.equal_captions)
    if one.labels:
        labels = read_labels(_near(one.labels, root))
    else:
        pairs = cached_pairs(encoder, source, with_captions=False, **(encoding or {}))
        labels = own_labels(pairs.labels, one.data)
    captions = templates or list_templates(None)
    return _OpenSet(one.name, one.task, source, labels, captions, one.equal_captions)


def _near(name: str, root: Path) -> str:
    """The path of a file next to the suite, or else the text itself."""
    return str(root / name) if os.path.isfile(root / name) else name


def _evaluate(
    opened: _OpenSet, encoder: Encoder, out: Path, encoding: Encoding
) -> tuple[SuiteRecord, bool]:
    """The record of a data set, and whether it is new."""
    model, source = encoder.model, opened.source
    name = key_of(
        opened.task, model.fingerprint, model.precision, source.fingerprint, opened.settings
    )
    file = out / RECORDS / f"{name}.json"
    if file.is_file():
        return _read_record(file), False
    if opened.task == "retrieval":
        report = evaluate_retrieval(
            source, encoder, equal_captions=opened.equal_captions, **encoding
        )
    else:
        report = evaluate_zero_shot(source, encoder, opened.labels, opened.templates, **encoding)
    record = _record(opened, report)
    write_text(file, json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return record, True


def _record(opened: _OpenSet, report: Report) -> SuiteRecord:
    return SuiteRecord(
        set=opened.name,
        task=opened.task,
        model=str(report.model),
        model_fingerprint=report.model.fingerprint,
        precision=report.model.precision,
        data=report.data,
        data_fingerprint=report.fingerprint,
        settings=opened.settings,
        counts=report.counts,
        estimates=report.estimates,
        notes=report.notes,
        clipkit=__version__,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_record(file: Path) -> SuiteRecord:
    try:
        record = SuiteRecord.from_dict(json.loads(file.read_text(encoding="utf-8")))
        record.counts["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); remove it and evaluate again") from None
    return record


def _rows(records: Sequence[SuiteRecord]) -> list[dict[str, Any]]:
    """A row for each metric of each record, with ``COLUMNS``."""
    return [
        {
            **{name: getattr(record, name, None) for name in COLUMNS},
            "settings": key_of(record.settings)[:12],
            "images": record.counts["images"],
            "metric": metric,
            **asdict(estimate),
        }
        for record in records
        for metric, estimate in record.estimates.items()
    ]


def _write_tables(out: Path) -> None:
    """All records as tables, sorted by data set, model and time."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    records = [_read_record(file) for file in (out / RECORDS).glob("*.json")]
    records.sort(key=lambda one: (one.set, one.model, one.measured))
    numbers = {"images": pa.int64()} | dict.fromkeys(("value", "low", "high"), pa.float64())
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in COLUMNS])
    results = pa.Table.from_pylist(_rows(records), schema)
    for name, write in (("results.csv", pc.write_csv), ("results.parquet", pq.write_table)):
        with replacing(out / name) as temp:
            write(results, temp)

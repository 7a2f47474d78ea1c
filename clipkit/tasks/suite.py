"""Measure a model on many data sets: ``clipkit eval suite SUITE.toml --model M --out RESULTS``."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from clipkit import __version__
from clipkit.artifacts import write_text
from clipkit.data.formats.huggingface import HUB
from clipkit.data.labels import own_labels, phrases_of
from clipkit.data.open_source import Source, open_source
from clipkit.data.prompts import read_labels, read_templates
from clipkit.errors import ArtifactError, ClipkitError, DataError
from clipkit.evaluation.clip_benchmark import is_benchmark, open_benchmark
from clipkit.evaluation.report import Report
from clipkit.evaluation.suite import SuiteSet
from clipkit.models.embed_source import cached_pairs
from clipkit.models.encoder import Encoder
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.user_cache import key_of

RECORDS = "records"
COLUMNS = (
    *("set", "task", "model", "model_fingerprint", "precision", "data", "data_fingerprint"),
    *("settings", "images", "figure", "value", "low", "high", "clipkit", "measured"),
)
"""Of the table: a row for each figure."""


@dataclass(frozen=True)
class Ready:
    """A set, opened: its images and all that is asked of them."""

    name: str
    task: str
    source: Source
    labels: list[str]
    templates: list[str]
    equal_captions: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure depends on beside model and images."""
        if self.task == "retrieval":
            return {"equal_captions": self.equal_captions}
        said = [[label, list(phrases_of(label))] for label in self.labels]
        return {"labels": said, "templates": self.templates}


def run_suite(
    sets: Sequence[SuiteSet],
    root: Path,
    encoder: Encoder,
    out: Path,
    *,
    tell: Callable[[str], None],
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure a model on each set whose result is not there yet; returns a record for each set.

    A result is a file of its own in ``OUT/records``, named by what it depends on (model, data,
    labels, templates), and is never written again. ``OUT/results.csv`` and ``OUT/results.parquet``
    hold all results there are, of every model, a row for each figure.

    Args:
        sets: the suite.
        root: the directory that paths in it are relative to.
        encoder: the model.
        out: where the results are kept.
        tell: called with a line about each set.
        progress: show bars on stderr.

    Raises:
        DataError: sets that could not be measured; all others are.
        ArtifactError: the results cannot be written.
    """
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{out} cannot be written ({error.strerror}); name another place"
        ) from None
    found, failed = [], []
    for one in sets:
        try:
            ready = open_set(one, root, encoder, progress)
            record, fresh = _measure(ready, encoder, out, progress)
        except ClipkitError as error:
            failed.append(one.name)
            tell(f"{one.name}: {error}")
            continue
        tell(f"{one.name}: {'measured' if fresh else 'is there already'}")
        found.append(record | {"set": one.name})
    _write_tables(out)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(sets)} sets could not be measured ({', '.join(failed)}; see "
            f"above), the results of the others are in {out}; mend them and run the suite again"
        )
    return found


def open_set(one: SuiteSet, root: Path, encoder: Encoder, progress: bool = True) -> Ready:
    """Open a set with its labels and templates.

    Raises:
        DataError: it cannot be opened, or has no task.
        CaptionError: labels or templates that cannot be used.
    """
    spec = one.data if one.data.startswith(HUB) else str(root / one.data)
    templates = _templates(one.templates, root)
    if is_benchmark(Path(spec), one.split):
        given = open_benchmark(Path(spec), one.split)
        source = replace(given.source, spec=one.data)
        labels = list[str](read_labels(_near(one.labels, root)) if one.labels else given.labels)
        captions = templates or given.templates
        return Ready(one.name, given.task, source, labels, captions, one.equal_captions)
    if not one.task:
        raise DataError(
            f"{one.data} does not say what to ask of it, expected a task; write task = "
            '"zeroshot" or "retrieval" in its [[set]]'
        )
    zero_shot = one.task == "zeroshot"
    source = open_source(
        spec,
        image=one.image_column or None,
        caption="" if zero_shot else one.caption_column or None,
        label=one.label_column or None,
    )
    source = replace(source, spec=one.data)
    if not zero_shot:
        return Ready(one.name, one.task, source, [], [], one.equal_captions)
    if one.labels:
        labels = list[str](read_labels(_near(one.labels, root)))
    else:
        pairs = cached_pairs(encoder, source, with_captions=False, progress=progress)
        labels = list[str](own_labels(pairs.labels, one.data))
    return Ready(
        one.name, one.task, source, labels, templates or read_templates(None), one.equal_captions
    )


def _near(name: str, root: Path) -> str:
    """A file beside the suite, if there is one, else the words themselves."""
    return str(root / name) if os.path.isfile(root / name) else name


def _templates(name: str, root: Path) -> list[str]:
    return read_templates(_near(name, root)) if name else []


def _measure(
    ready: Ready, encoder: Encoder, out: Path, progress: bool
) -> tuple[dict[str, Any], bool]:
    """The record of a set, and whether it was measured just now."""
    model, source = encoder.model, ready.source
    name = key_of(
        ready.task, model.fingerprint, model.precision, source.fingerprint, ready.settings
    )
    file = out / RECORDS / f"{name}.json"
    if file.is_file():
        return _read(file), False
    if ready.task == "retrieval":
        equal = cast(Literal["merge", "apart"], ready.equal_captions)
        report = evaluate_retrieval(ready.source, encoder, equal_captions=equal, progress=progress)
    else:
        report = evaluate_zero_shot(
            ready.source, encoder, ready.labels, ready.templates, progress=progress
        )
    record = _record(ready, report)
    write_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record, True


def _record(ready: Ready, report: Report) -> dict[str, Any]:
    return {
        "set": ready.name,
        "task": ready.task,
        "model": str(report.model),
        "model_fingerprint": report.model.fingerprint,
        "precision": report.model.precision,
        "data": report.data,
        "data_fingerprint": report.fingerprint,
        "settings": ready.settings,
        "counts": report.counts,
        "figures": {name: asdict(one) for name, one in report.figures.items()},
        "notes": report.notes,
        "clipkit": __version__,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        record["figures"], record["counts"]["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); remove it and measure again") from None
    return record


def _write_tables(out: Path) -> None:
    """All records as tables, in order of set, model and time."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    records = [_read(file) for file in (out / RECORDS).glob("*.json")]
    rows = [
        {
            **{name: record.get(name) for name in COLUMNS},
            "settings": key_of(record["settings"])[:12],
            "images": record["counts"]["images"],
            "figure": figure,
            **estimate,
        }
        for record in sorted(records, key=lambda r: (r["set"], r["model"], r["measured"]))
        for figure, estimate in record["figures"].items()
    ]
    numbers = {
        "images": pa.int64(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
    }
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in COLUMNS])
    table = pa.Table.from_pylist(rows, schema)
    for name, write in (("results.csv", pc.write_csv), ("results.parquet", pq.write_table)):
        temp = out / f".{name}.tmp"
        write(table, temp)
        os.replace(temp, out / name)

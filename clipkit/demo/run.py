"""Train, measure, classify and search on emoji drawings, and write a page: ``clipkit demo``."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipkit.artifacts import is_complete, partial_path, write_json, write_text
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.config import (
    AugmentConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from clipkit.data.open_source import Source, open_source
from clipkit.demo.emoji import LABELS, UNSEEN, EmojiFacts, write_sets
from clipkit.demo.page import (
    ClassifyExample,
    DemoReport,
    NamedImage,
    SearchExample,
    render_demo,
)
from clipkit.errors import ArtifactError
from clipkit.index.vector_index import VectorIndex
from clipkit.models.encoder import Encoder
from clipkit.models.loading import load_model
from clipkit.progress import print_status
from clipkit.tasks.classify import classify
from clipkit.tasks.embed import embed
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.tasks.index import build_index
from clipkit.tasks.train import train
from clipkit.training.run_directory import CONFIG_FILE

TEMPLATES = ("{}",)
"""The captions are bare names, so a label needs no phrase around it."""
QUERIES = (
    *("red heart", "crying cat", "pirate flag", "woman scientist"),
    *("blue car", "rain from a cloud", "person riding a bike", "flag with a star"),
)
"""Four names of drawings, then four free-form queries."""
HITS = 8


def recipe(train: Path, held_out: Path, minutes: float) -> TrainConfig:
    """The training configuration.

    Args:
        train: the training pairs.
        held_out: the pairs to measure on, once, at the end.
        minutes: time limit of the training.
    """
    return TrainConfig(
        model=ModelConfig(
            embed_dim=256,
            # One block per stage: cheap enough at 64 pixels for several epochs in a few minutes.
            vision={
                "timm_model_name": "resnet10t",
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": 64,
            },
            text={"width": 192, "heads": 3, "layers": 2},
        ),
        data=DataConfig(train=str(train), val=str(held_out)),
        # Drawings fill their square, so crops are mild. Rotation by 5 degrees and a little colour
        # jitter made steps longer and all six recalls worse, by 0.01 to 0.03 after three epochs
        # (one seed).
        augment=AugmentConfig(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1)),
        # After three epochs text→image R@1 was 0.45 with Muon and 0.29 with AdamW, both from the
        # temperature 0.04, where training ends; from CLIP's 0.07 Muon reached 0.48.
        optim=OptimConfig(name="muon", lr=3e-3, weight_decay=0.1),
        train=LoopConfig(
            batch_size=256,
            minutes=minutes,
            eval_every_epochs=0.0,
            save_every_epochs=0.0,
            keep_last=1,
            log_every_steps=5,
        ),
    )


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        metrics: shares in [0, 1], measured on the held-out style.
        chance: the level of chance, under the same names.
        page: the HTML file.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    page: Path


def demo(
    out: str | Path = "clipkit-demo",
    *,
    minutes: float = 5.0,
    report: Callable[[str], None] = print_status,
) -> DemoResult:
    """Pretrain on six styles of emoji; measure, classify, index and search on the seventh.

    Steps that ``out`` already holds are skipped, so that an interrupted demo continues.

    Args:
        out: directory for everything.
        minutes: time limit of the training; the other steps take about one more.
        report: called with a line about each step.

    Raises:
        MissingExtraError: the packages with the drawings are not installed.
        ArtifactError: ``out`` holds a demo with other settings.
        KeyboardInterrupt: Ctrl-C; finished steps are kept.
    """
    shown = Path(out)
    out = shown.absolute()
    data, run = out / "data", out / "run"
    config = recipe(data / "train.parquet", data / "unseen.parquet", minutes)
    _require_same_recipe(config, run)
    facts = _write_data(data, report)
    (out / "demo.toml").write_text(dump_config(config), encoding="utf-8")
    _train(config, run, shown, report)
    encoder, unseen = load_model(run), open_source(config.data.val)
    report(f"3/5 measuring on {facts.unseen:,} drawings in {UNSEEN}'s style")
    metrics, chance = _measure(encoder, unseen)
    report("4/5 building an index")
    embed(unseen, out / "store", encoder)
    index = build_index(out / "store", out / "index")
    report("5/5 searching, classifying, writing the page")
    searches, classified = _search(index, encoder, unseen), _classify(encoder, unseen)
    results = DemoReport(metrics, chance, searches, classified)
    page = out / "index.html"
    write_text(page, render_demo(shown, config, facts, results))
    return DemoResult(metrics, chance, shown / page.name)


def _require_same_recipe(config: TrainConfig, run: Path) -> None:
    if not (run / CONFIG_FILE).is_file():
        return
    before = load_config(run / CONFIG_FILE)
    # The directory and the precision that "auto" resolved to may differ.
    loop = replace(before.train, precision=config.train.precision)
    if replace(before, data=config.data, train=loop) != config:
        raise ArtifactError(
            f"{run.parent} holds a demo of {before.train.minutes:g} minutes or other settings, "
            f"expected {config.train.minutes:g} minutes; choose another --out, or remove it"
        )


def _write_data(data: Path, report: Callable[[str], None]) -> EmojiFacts:
    """Write both sets, labels and templates; the facts are written last and mark completion."""
    file = data / "facts.json"
    if file.is_file():
        facts = EmojiFacts(**json.loads(file.read_text(encoding="utf-8")))
        report(f"1/5 reusing the {facts.train:,} drawings in {data}")
        return facts
    report("1/5 reading drawings in seven styles")
    data.mkdir(parents=True, exist_ok=True)
    facts = write_sets(data / "train.parquet", data / "unseen.parquet")
    (data / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    (data / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    write_json(file, asdict(facts))
    return facts


def _train(config: TrainConfig, run: Path, shown: Path, report: Callable[[str], None]) -> None:
    if is_complete(run):
        report(f"2/5 reusing the trained model in {run}")
        return
    resume = (run / CONFIG_FILE).is_file()
    if not resume:
        # Vectors of an earlier model are useless to the new one.
        for name in ("store", "index"):
            shutil.rmtree(run.with_name(name), ignore_errors=True)
            shutil.rmtree(partial_path(run.with_name(name)), ignore_errors=True)
    verb = "resuming the training" if resume else "training on six styles"
    report(f"2/5 {verb}, at most {config.train.minutes:g} minutes in total")
    result = train(config, run, resume=resume)
    if not result.finished:
        report(f"stopped at step {result.step} and saved; the same command resumes it ({shown})")
        raise KeyboardInterrupt


def _measure(encoder: Encoder, unseen: Source) -> tuple[dict[str, float], dict[str, float]]:
    """Recall and zero-shot accuracy, and the level of chance under the same names."""
    measured = evaluate_retrieval(unseen, encoder).metrics
    ranks = {f"{way}_r{k}": k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    # With at most k items recall is 1, and the report omits it.
    recall = {name: measured.get(name, 1.0) for name in ranks}
    named = _rows(unseen, [i for i, label in enumerate(unseen.table.labels) if label])
    accuracy = evaluate_zero_shot(named, encoder, LABELS, TEMPLATES).metrics
    chance = {name: min(1.0, k / len(unseen.table)) for name, k in ranks.items()}
    # The constant prediction of the largest class.
    largest = Counter(named.table.labels).most_common(1)[0][1]
    metrics = {
        "zeroshot_mean_per_class": accuracy["mean_per_class"],
        "zeroshot_top1": accuracy["top1"],
    }
    guessing = {
        "zeroshot_mean_per_class": 1 / len(LABELS),
        "zeroshot_top1": largest / len(named.table),
    }
    return recall | metrics, chance | guessing


def _search(index: VectorIndex, encoder: Encoder, unseen: Source) -> list[SearchExample]:
    index, images = index.with_encoder(encoder), _images(unseen)
    return [
        SearchExample(query, [(images[hit.key], hit.score) for hit in index.search(query, k=HITS)])
        for query in QUERIES
    ]


def _classify(encoder: Encoder, unseen: Source) -> list[ClassifyExample]:
    """Predictions for the middle drawing of every other class, a choice made by no hand."""
    of_label: dict[str, list[int]] = {}
    for row, label in enumerate(unseen.table.labels):
        of_label.setdefault(label or "", []).append(row)
    present = [label for label in LABELS[::2] if label in of_label]
    chosen = _rows(unseen, [of_label[label][len(of_label[label]) // 2] for label in present])
    images = _images(chosen)
    classifier = ZeroShotClassifier.from_labels(encoder, LABELS, TEMPLATES)
    predictions = classify(chosen, classifier, encoder, k=3)
    return [
        ClassifyExample(images[one.key], label, [(top.label, top.score) for top in one.top])
        for label, one in zip(present, predictions, strict=True)
    ]


def _rows(source: Source, numbers: list[int]) -> Source:
    return replace(source, rows=source.table.select(numbers))


def _images(source: Source) -> dict[str, NamedImage]:
    """All drawings by key; a name is the only caption."""
    return {row.key: NamedImage(row.image.data or b"", row.captions[0]) for row in source.rows}

"""The whole walk on emoji drawings, and a page to look at: ``clipkit demo``."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipkit.artifacts import is_complete, partial_path, write_json
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
from clipkit.demo.page import Classified, Found, Measured, Picture, demo_page, render_page
from clipkit.errors import ArtifactError
from clipkit.index.vector_index import VectorIndex
from clipkit.models.encoder import Encoder
from clipkit.models.loading import load_model
from clipkit.tasks.classify import classify
from clipkit.tasks.embed import embed
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot
from clipkit.tasks.index import build_index
from clipkit.tasks.train import train
from clipkit.training.run_directory import CONFIG_FILE

TEMPLATES = ("{}",)
"""The captions here are bare names, so a label needs no phrase around it."""
QUERIES = (
    *("red heart", "crying cat", "pirate flag", "woman scientist"),
    *("blue car", "rain from a cloud", "person riding a bike", "flag with a star"),
)
"""Searches: four that are names of drawings, then four in a person's own words."""
HITS = 8


def recipe(train: Path, held_out: Path, minutes: float) -> TrainConfig:
    """How the demo's model is trained.

    Args:
        train: the pairs to train on.
        held_out: the pairs measured on, once, at the end.
        minutes: longest training.
    """
    return TrainConfig(
        model=ModelConfig(
            embed_dim=256,
            # A residual network of one block a stage: cheap enough at 64 pixels to see every
            # drawing several times within the minutes.
            vision={
                "timm_model_name": "resnet10t",
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": 64,
            },
            text={"width": 192, "heads": 3, "layers": 2},
        ),
        data=DataConfig(train=str(train), val=str(held_out)),
        # A drawing fills its square: crops stay small. Turning by 5 degrees and a little jitter of
        # colour made steps longer and all six recalls worse, by 0.01 to 0.03 after three epochs
        # (one seed).
        augment=AugmentConfig(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1)),
        # After three epochs a name found its drawing in 0.45 of cases with Muon, 0.29 with AdamW,
        # both from a temperature of 0.04, where it ends up; from CLIP's 0.07 Muon came to 0.48.
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
    """What the demo came to.

    Attributes:
        metrics: shares in [0, 1], measured on the unseen style.
        chance: what guessing reaches, under the same names.
        page: the HTML file to look at.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    page: Path


def demo(out: Path, *, minutes: float, tell: Callable[[str], None]) -> DemoResult:
    """Pretrain on six styles of emoji, measure, classify, index and search on the seventh.

    What ``out`` holds already is used again, so that an interrupted demo goes on.

    Args:
        out: directory for everything.
        minutes: longest training; reading the drawings and measuring take about one more.
        tell: called with a line about each step.

    Raises:
        MissingExtraError: the packages with the drawings are not installed.
        ArtifactError: ``out`` holds a demo that was trained otherwise.
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    shown, out = out, out.absolute()
    data, run = out / "data", out / "run"
    config = recipe(data / "train.parquet", data / "unseen.parquet", minutes)
    _require_same_recipe(config, run)
    facts = _write_data(data, tell)
    (out / "demo.toml").write_text(dump_config(config), encoding="utf-8")
    _train(config, run, shown, tell)
    encoder, unseen = load_model(run), open_source(config.data.val)
    tell(f"3/5 measuring on the {facts.unseen:,} drawings of {UNSEEN}'s style")
    metrics, chance = _measure(encoder, unseen)
    tell("4/5 embedding and indexing them")
    embed(unseen, out / "store", encoder)
    index = build_index(out / "store", out / "index")
    tell("5/5 searching, classifying, writing the page")
    found, classified = _search(index, encoder, unseen), _classify(encoder, unseen)
    measured = Measured(metrics, chance, found, classified)
    page = out / "index.html"
    page.write_text(render_page(demo_page(shown, config, facts, measured)), encoding="utf-8")
    return DemoResult(metrics, chance, shown / page.name)


def _require_same_recipe(config: TrainConfig, run: Path) -> None:
    if not (run / CONFIG_FILE).is_file():
        return
    before = load_config(run / CONFIG_FILE)
    # Where the data lie and what "auto" came to are no differences.
    loop = replace(before.train, precision=config.train.precision)
    if replace(before, data=config.data, train=loop) != config:
        raise ArtifactError(
            f"{run.parent} holds a demo of {before.train.minutes:g} minutes or another recipe, "
            f"expected {config.train.minutes:g} minutes of this one; name another --out, or "
            "remove it"
        )


def _write_data(data: Path, tell: Callable[[str], None]) -> EmojiFacts:
    """The two sets, and beside them the labels and templates; the facts are written last."""
    file = data / "facts.json"
    if file.is_file():
        facts = EmojiFacts(**json.loads(file.read_text(encoding="utf-8")))
        tell(f"1/5 using the {facts.train:,} drawings in {data} again")
        return facts
    tell("1/5 reading the drawings of seven styles")
    data.mkdir(parents=True, exist_ok=True)
    facts = write_sets(data / "train.parquet", data / "unseen.parquet")
    (data / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    (data / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    write_json(file, asdict(facts))
    return facts


def _train(config: TrainConfig, run: Path, shown: Path, tell: Callable[[str], None]) -> None:
    if is_complete(run):
        tell(f"2/5 using the trained model in {run} again")
        return
    resume = (run / CONFIG_FILE).is_file()
    if not resume:
        # Vectors of a model that is gone are of no use to the next one.
        for name in ("store", "index"):
            shutil.rmtree(run.with_name(name), ignore_errors=True)
            shutil.rmtree(partial_path(run.with_name(name)), ignore_errors=True)
    verb = "going on with the training" if resume else "training on six styles"
    tell(f"2/5 {verb}, at most {config.train.minutes:g} minutes in all")
    result = train(config, run, resume=resume)
    if not result.finished:
        tell(f"stopped at step {result.step}, saved; the same command goes on from there ({shown})")
        raise KeyboardInterrupt


def _measure(encoder: Encoder, unseen: Source) -> tuple[dict[str, float], dict[str, float]]:
    """Recall and zero-shot accuracy, and what guessing reaches under the same names."""
    measured = evaluate_retrieval(unseen, encoder).metrics
    ranks = {f"{way}_r{k}": k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    # Where there are no more than k to find, the report leaves out what is certain.
    recall = {name: measured.get(name, 1.0) for name in ranks}
    named = _rows(unseen, [i for i, label in enumerate(unseen.rows["label"]) if label])
    accuracy = evaluate_zero_shot(named, encoder, LABELS, TEMPLATES).metrics
    chance = {name: min(1.0, k / len(unseen.rows)) for name, k in ranks.items()}
    # Without looking one can still name the largest class every time.
    largest = Counter(named.rows["label"]).most_common(1)[0][1]
    metrics = {
        "zeroshot_mean_per_class": accuracy["mean_per_class"],
        "zeroshot_top1": accuracy["top1"],
    }
    blind = {
        "zeroshot_mean_per_class": 1 / len(LABELS),
        "zeroshot_top1": largest / len(named.rows),
    }
    return recall | metrics, chance | blind


def _search(index: VectorIndex, encoder: Encoder, unseen: Source) -> list[Found]:
    searcher, pictures = index.with_encoder(encoder), _pictures(unseen)
    return [
        Found(query, [(pictures[hit.key], hit.score) for hit in searcher.search(query, k=HITS)])
        for query in QUERIES
    ]


def _classify(encoder: Encoder, unseen: Source) -> list[Classified]:
    """The middle drawing of every other class, which is a choice that nobody made by hand."""
    of_label: dict[str, list[int]] = {}
    for row, label in enumerate(unseen.rows["label"]):
        of_label.setdefault(label, []).append(row)
    present = [label for label in LABELS[::2] if label in of_label]
    chosen = _rows(unseen, [of_label[label][len(of_label[label]) // 2] for label in present])
    pictures = _pictures(chosen)
    classifier = ZeroShotClassifier.from_labels(encoder, LABELS, TEMPLATES)
    predictions = classify(chosen, classifier, encoder, k=3)
    return [
        Classified(pictures[one.key], label, [(top.label, top.score) for top in one.top])
        for label, one in zip(present, predictions, strict=True)
    ]


def _rows(source: Source, numbers: list[int]) -> Source:
    return replace(source, rows=source.rows.select(numbers))


def _pictures(source: Source) -> dict[str, Picture]:
    """Every picture of the demo's data by its key; its name is its one caption."""
    return {row["key"]: Picture(row["image"]["bytes"], row["captions"][0]) for row in source.rows}

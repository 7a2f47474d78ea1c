"""The page of the demo: pure functions from facts to HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from clipkit.pages.chart import Scale, Series, chart
from clipkit.pages.parts import Figure, bar, bullets, commands, data_uri, document, figure_table


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

"""The page of classified images: pure functions from facts to HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from clipkit.pages.parts import bar, data_uri, document


@dataclass(frozen=True)
class Card:
    """One image: its key, a JPEG, what it was taken for, its likeliest labels, and the probability
    that it shows any of them (None if that was not asked)."""

    key: str
    jpeg: bytes
    label: str
    guesses: Sequence[tuple[str, float]]
    shows_any: float | None


@dataclass(frozen=True)
class Classes:
    """All that the page tells: a sentence, how many images each label has, and the first images."""

    lead: str
    counts: Sequence[tuple[str, int]]
    cards: Sequence[Card]


STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem;
  margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; display: grid; grid-template-columns: 96px 1fr; gap: .8rem; }
.card img { width: 96px; border-radius: 8px; display: block; } figure { margin: 0; }
figcaption { font-size: .75rem; overflow-wrap: anywhere; margin-top: .3rem; }
.guess { display: grid; grid-template-columns: 5.5rem 1fr 2.6rem; gap: .5rem; align-items: center;
  font-size: .85rem; overflow-wrap: anywhere; } .guess span:last-child { text-align: right; }
.right { font-weight: 600; }
"""


def render_classified(page: Classes) -> str:
    """The page as one HTML file: pictures inline, no script, nothing fetched, light and dark."""
    total = sum(count for _, count in page.counts)
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td>'
        f'<td class="bar">{bar(count / total)}</td><td class="n">{count / total:.1%}</td></tr>'
        for name, count in page.counts
    )
    head = '<th>label</th><th class="n">images</th><th class="bar"></th><th class="n">share</th>'
    more = "" if len(page.cards) == total else f", the first {len(page.cards):,} of {total:,}"
    body = (
        f"<h2>What they were taken for</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table><h2>The images{more}</h2>"
        f'<div class="cards">{"".join(map(_card, page.cards))}</div>'
    )
    return document("Classified images", page.lead, body, "Made by clipkit classify.", STYLE)


def picture(jpeg: bytes, name: str) -> str:
    """An inline image."""
    return f'<img src="{data_uri(jpeg)}" alt="{escape(name)}" loading="lazy">'


def _card(card: Card) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if label == card.label else ""}"><span>{escape(label)}</span>'
        f"{bar(share)}<span>{share:.0%}</span></div>"
        for label, share in card.guesses
    )
    shows = ""
    if card.shows_any is not None:
        shows = f'<p class="soft">{escape(card.label)}; any of them: {card.shows_any:.0%}</p>'
    return (
        f'<div class="card"><figure>{picture(card.jpeg, card.key)}'
        f"<figcaption>{escape(card.key)}</figcaption></figure><div>{guesses}{shows}</div></div>"
    )

"""HTML for self-contained pages and for notebooks.

``document`` is a whole page in one file: light and dark, no script, nothing loaded. ``card``,
``table`` and ``gallery`` are fragments for ``_repr_html_``, which take their colours from the
notebook. Texts are escaped here.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #626a76; --line: #dfe3e8; --ground: #fff;
  --card: #f6f7f9; --blue: #2563eb; --green: #15803d; --amber: #b45309; --warn: #fdf3e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa3b0; --line: #333a45;
  --ground: #14171c; --card: #1d2128; --blue: #6ea0ff; --green: #5ccb85;
  --amber: #f0a94e; --warn: #2c2415; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 3rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; margin: 0 0 .6rem;
  letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .4rem; letter-spacing: -.01em; }
p { margin: .4rem 0 1rem; max-width: 46rem; }
.lead { font-size: 1.12rem; } .soft, footer, figcaption { color: var(--soft); }
table { border-collapse: collapse; width: 100%; max-width: 54rem; }
th, td { padding: .45rem .6rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.n b { font-size: 1.1rem; } td.bar { width: 26%; }
.track { background: var(--line); border-radius: 4px; height: 9px; overflow: hidden; }
.fill { background: var(--blue); height: 100%; } .right .fill { background: var(--green); }
svg { display: block; width: 100%; max-width: 54rem; height: auto; }
.legend { margin: 0 0 0 3.4rem; font-size: .85rem; color: var(--soft); }
svg text { fill: var(--soft); font-size: 13px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto;
  padding: .7rem .9rem; margin: .2rem 0 1rem; font-size: .88rem; }
li { margin: .35rem 0; max-width: 46rem; } footer { margin-top: 3rem; font-size: .85rem; }
@media (max-width: 32rem) { td.bar, th.bar { display: none; } }
"""


@dataclass(frozen=True)
class Figure:
    """A measured share in [0, 1] beside the level of chance."""

    name: str
    value: float
    chance: float


def document(title: str, lead: str, body: str, footer: str, style: str = "") -> str:
    """A whole page; title, lead and footer are plain text, body and style are HTML and CSS."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{body}
<footer>{escape(footer)}</footer>
</body>
</html>
"""


def figure_table(figures: Iterable[Figure]) -> str:
    """Measured shares with a bar each, beside the level of chance."""
    rows = "".join(
        f'<tr><td>{escape(f.name)}</td><td class="n"><b>{percent(f.value)}</b></td>'
        f'<td class="bar">{bar(f.value)}</td><td class="n">{percent(f.chance)}</td></tr>'
        for f in figures
    )
    head = '<th></th><th class="n">model</th><th class="bar"></th><th class="n">chance</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def data_uri(image: bytes, kind: str = "jpeg") -> str:
    """An image as a data URI; ``kind`` is "jpeg" or "png"."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def commands(pairs: Iterable[tuple[str, str]]) -> str:
    """Commands, each below a description."""
    return "".join(
        f'<p class="soft">{escape(what)}</p><pre><code>{escape(command)}</code></pre>'
        for what, command in pairs
    )


def bullets(texts: Sequence[str]) -> str:
    """A bulleted list of texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def bar(share: float) -> str:
    """A bar filled to a share in [0, 1]."""
    return f'<div class="track"><div class="fill" style="width:{100 * share:.1f}%"></div></div>'


MAX_SHOWN = 60
"""Images of a gallery; more would make a notebook slow."""
_QUIET = "color:inherit;background:none;border:0"
_CELL = f"{_QUIET};text-align:left;padding:.15em 1.2em .15em 0;vertical-align:top"


def card(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A title above a table of names and values."""
    rows = [(name, str(value)) for name, value in facts]
    return f"<b>{escape(title)}</b>{table((), rows)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f'<th style="{_CELL}">{escape(cell)}</th>' for cell in header)
    body = "".join(f'<tr style="{_QUIET}">{_cells(row)}</tr>' for row in rows)
    start = f'<thead><tr style="{_QUIET}">{head}</tr></thead>' if header else ""
    return f'<table style="{_QUIET};margin:.3em 0">{start}<tbody>{body}</tbody></table>'


def _cells(row: Sequence[str]) -> str:
    return "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row)


def gallery(title: str, items: Iterable[tuple[bytes | None, str, str]], total: int) -> str:
    """Images side by side, each above two lines of text; at most ``MAX_SHOWN`` of them.

    Args:
        title: written above; may be empty.
        items: a JPEG (None for a missing image), the first line and the second; read lazily.
        total: the number of items.
    """
    shown = "".join(
        f'<figure style="margin:0;width:128px;overflow-wrap:anywhere">{_framed(data)}'
        f'<figcaption style="font-size:.85em;line-height:1.3"><b>{escape(first)}</b><br>'
        f'<span style="opacity:.7">{escape(second)}</span></figcaption></figure>'
        for data, first, second in islice(items, MAX_SHOWN)
    )
    grid = "display:flex;flex-wrap:wrap;gap:12px;align-items:end;margin:.4em 0"
    rest = f"and {total - MAX_SHOWN} more" if total > MAX_SHOWN else ""
    return f'<b>{escape(title)}</b><div style="{grid}">{shown}</div>{rest}'


def _framed(jpeg: bytes | None) -> str:
    """An image inside the page; an empty frame if it is missing."""
    if jpeg is None:
        frame = "width:128px;height:96px;border:1px dashed currentColor;opacity:.4"
        return f'<div style="{frame}"></div>'
    return f'<img alt="" src="{data_uri(jpeg)}" style="max-width:128px;margin:0">'

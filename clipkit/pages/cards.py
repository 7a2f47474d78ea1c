"""What objects show of themselves in a notebook: small pieces of HTML, light and dark."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from clipkit.pages.parts import data_uri

MOST_SHOWN = 60
_QUIET = "color:inherit;background:none;border:0"
_CELL = f"{_QUIET};text-align:left;padding:.15em 1.2em .15em 0;vertical-align:top"


def card(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A title above names and values."""
    rows = [(name, str(value)) for name, value in facts]
    return f"<b>{escape(title)}</b>{table((), rows)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Texts in rows and columns."""
    head = "".join(f'<th style="{_CELL}">{escape(cell)}</th>' for cell in header)
    body = "".join(f'<tr style="{_QUIET}">{_cells(row)}</tr>' for row in rows)
    start = f'<thead><tr style="{_QUIET}">{head}</tr></thead>' if header else ""
    return f'<table style="{_QUIET};margin:.3em 0">{start}<tbody>{body}</tbody></table>'


def _cells(row: Sequence[str]) -> str:
    return "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row)


def gallery(title: str, items: Iterable[tuple[bytes | None, str, str]], total: int) -> str:
    """Pictures beside each other, each above two lines of text, the first 60 of them.

    Args:
        title: above them; may be empty.
        items: a JPEG (None where the picture cannot be shown), the first line and the second.
        total: how many items there are; of those beyond ``MOST_SHOWN`` none is asked for.
    """
    shown = "".join(
        f'<figure style="margin:0;width:128px;overflow-wrap:anywhere">{picture(data)}'
        f'<figcaption style="font-size:.85em;line-height:1.3"><b>{escape(first)}</b><br>'
        f'<span style="opacity:.7">{escape(second)}</span></figcaption></figure>'
        for data, first, second in islice(items, MOST_SHOWN)
    )
    grid = "display:flex;flex-wrap:wrap;gap:12px;align-items:end;margin:.4em 0"
    rest = f"and {total - MOST_SHOWN} more" if total > MOST_SHOWN else ""
    return f'<b>{escape(title)}</b><div style="{grid}">{shown}</div>{rest}'


def picture(jpeg: bytes | None) -> str:
    """A picture inside the page; a plain frame where there is none."""
    if jpeg is None:
        frame = "width:128px;height:96px;border:1px dashed currentColor;opacity:.4"
        return f'<div style="{frame}"></div>'
    return f'<img alt="" src="{data_uri(jpeg)}" style="max-width:128px;margin:0">'

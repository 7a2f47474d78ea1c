"""Generate scripts/benchmarks/README.md from scripts/benchmarks/results.json.

    python -m scripts.docs.benchmarks          # write the page
    python -m scripts.docs.benchmarks --check  # fail if the page is out of date

After a new measurement, edit results.json and run this script. An entry has these fields; those
that are unknown are null:

- id, area, what, unit
- clipkit, clipkit_spread: the value, or a list of values, and its lowest and highest value
- peer, peer_value, peer_spread: the same for the contender
- ratio, ratio_spread, ratio_kind: clipkit compared with the peer, such as 2.4 "times as fast"
- date, machine, versions, command, note
- headline: whether the main README shows the entry
"""

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "benchmarks"
RESULTS, PAGE = FOLDER / "results.json", FOLDER / "README.md"
AREAS = {
    "quality": "Quality of trained models",
    "training": "Training",
    "encoding": "Encoding",
    "search": "Search",
    "evaluation": "Evaluation",
    "web": "Web page and map",
    "command line": "Command line",
}
INTRODUCTION = """\
# Benchmarks

Generated from [results.json](results.json) by `python -m scripts.docs.benchmarks`; do not edit.

A benchmark alternates clipkit and its peers on the same machine and compares them round by round.
Values are medians; brackets give the lowest and the highest value, unless a note says otherwise.
Ratios compare clipkit with the peer.

Run the commands from the project's root. Each benchmark explains itself with `--help`. Training
benchmarks need the `bench` extra; some peers need their own environment. The recipes and Parquet
files of Flickr8k and UCM are read from `../shared/data`.

On a GPU, `bash scripts/benchmarks/gpu.sh PAIRS.parquet` runs the tests and benchmarks that need
one. It has not been run yet.
"""
Entry = dict[str, Any]


def read_results() -> list[Entry]:
    """All entries of results.json."""
    entries: list[Entry] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return entries


def script_of(command: str) -> Path | None:
    """The script that a command runs, relative to the root; None for a `clipkit` command."""
    words = shlex.split(command)
    if words[0] == "clipkit":
        return None
    if "-m" in words:
        return Path(*words[words.index("-m") + 1].split(".")).with_suffix(".py")
    return next(Path(word) for word in words if word.endswith(".sh"))


def formatted(values: list[Any]) -> list[str]:
    """Numbers with thousands separators, padded to as many significant digits; text as it is.

    JSON drops trailing zeros: 0.83 next to 0.511 becomes 0.830 again.
    """
    numbers = [str(value) for value in values if isinstance(value, int | float)]
    digits = max((len(text.replace(".", "").lstrip("0")) for text in numbers), default=0)
    places = max((len(text.partition(".")[2]) for text in numbers), default=0)
    texts = []
    for value in values:
        if not isinstance(value, float):
            texts.append(f"{value:,}" if isinstance(value, int) else str(value))
            continue
        own = len(str(value).partition(".")[2])
        significant = len(str(value).replace(".", "").lstrip("0"))
        texts.append(f"{value:,.{min(places, own + max(0, digits - significant))}f}")
    return texts


def with_spread(value: Any, spread: Any) -> str:
    """A value or list of values with its spread in brackets, or the spread alone."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    interval = "–".join(formatted(spread)) if spread else ""
    if not values:
        return interval
    return " / ".join(formatted(values)) + (f" ({interval})" if interval else "")


def figures(entry: Entry) -> tuple[str, str, str]:
    """The value of clipkit, the peer with its value, and the ratio, as text."""
    ours = with_spread(entry["clipkit"], entry["clipkit_spread"])
    theirs = with_spread(entry["peer_value"], entry["peer_spread"])
    peer = ": ".join(filter(None, (entry["peer"], theirs)))
    ratio = with_spread(entry["ratio"], entry["ratio_spread"])
    return ours, peer, f"{ratio} {entry['ratio_kind']}" if ratio else ""


def run_of(entry: Entry) -> tuple[Any, ...]:
    """Command, date, machine and versions: what entries of one run share."""
    versions = ", ".join(f"{name} {version}" for name, version in (entry["versions"] or {}).items())
    return entry["command"], entry["date"], entry["machine"], versions


def area_section(title: str, entries: list[Entry], usual_machine: str) -> str:
    """A table of the entries, then their runs with notes."""
    runs = list(dict.fromkeys(map(run_of, entries)))
    lines = [
        f"## {title}",
        "",
        "| | unit | clipkit | peer | ratio | run |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = (entry["what"], entry["unit"], *figures(entry), str(runs.index(run_of(entry)) + 1))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for place, run in enumerate(runs, 1):
        command, date, machine, versions = run
        facts = [date or "undated", versions, "" if machine == usual_machine else machine]
        facts = ", ".join(filter(None, facts))
        lines.append(f"{place}. {described(command)}{facts}.")
        for entry in entries:
            if entry["note"] and run_of(entry) == run:
                lines.append(f"   - {label(entry, entries)}: {entry['note']}")
    return "\n".join([*lines, ""])


def described(command: str | None) -> str:
    """A link to the script of a command, and the command."""
    if command is None:
        return ""
    script = script_of(command)
    if script is None:
        return f"`{command}`: "
    target = Path("..") / script.relative_to("scripts")
    if script.is_relative_to("scripts/benchmarks"):
        target = script.relative_to("scripts/benchmarks")
    return f"[{script.name}]({target.as_posix()}), `{command}`: "


def label(entry: Entry, entries: list[Entry]) -> str:
    """What an entry measures, with the peer if another entry measures the same."""
    same = [other for other in entries if other["what"] == entry["what"]]
    return entry["what"] + (f" ({entry['peer']})" if len(same) > 1 else "")


def render(entries: list[Entry]) -> str:
    """The page."""
    machine = statistics.mode(entry["machine"] for entry in entries)
    sections = [
        area_section(title, [entry for entry in entries if entry["area"] == area], machine)
        for area, title in AREAS.items()
    ]
    return "\n".join([INTRODUCTION, f"Machine, unless stated otherwise: {machine}.\n", *sections])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    page = render(read_results())
    if not options.check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(
            f"error: {PAGE} does not match {RESULTS.name}; run python -m scripts.docs.benchmarks"
        )


if __name__ == "__main__":
    main()

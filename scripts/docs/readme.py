"""Generate the parts of README.md that come from the code: commands and headline benchmarks.

python -m scripts.docs.readme           # rewrite them
python -m scripts.docs.readme --check   # fail if they are out of date
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from clipkit.cli import app
from scripts.docs import benchmarks

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def commands() -> str:
    """A table of all commands, each with the first sentence of its help."""
    rows = [
        f"| `{name}` | {text} |" for name, text in _walk(typer.main.get_command(app), "clipkit")
    ]
    return "\n".join(["| command | |", "|---|---|", *rows])


def _walk(command: Any, name: str) -> list[tuple[str, str]]:
    """Names and first sentences of a command, or of all commands of a group."""
    if not hasattr(command, "commands"):
        return [(name, " ".join((command.help or "").split("\n\n")[0].split()))]
    found = []
    for child in command.list_commands(None):
        found += _walk(command.commands[child], f"{name} {child}")
    return found


def benchmark_rows() -> str:
    """The headline rows of the benchmark results."""
    rows = []
    for entry in benchmarks.read_results():
        if entry["headline"]:
            ours, peer, ratio = benchmarks.figures(entry)
            rows.append(f"| {entry['what']}, {entry['unit']} | {ours} | {peer} | {ratio} |")
    note = (
        "\nTwo AVX-512 cores, with or without AMX; medians with their range. "
        "[All results, with date, machine and command](scripts/benchmarks/README.md)."
    )
    return "\n".join(["| | clipkit | peer | ratio |", "|---|---|---|---|", *rows, note])


def render(text: str) -> str:
    """README.md with its generated parts renewed."""
    for name, part in (("commands", commands()), ("benchmarks", benchmark_rows())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            sys.exit(f"README.md has {count} sections marked {name}, expected 1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the code-derived parts of README.md.")
    parser.add_argument("--check", action="store_true", help="fail if they are out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    new = render(text)
    if check and new != text:
        sys.exit("README.md is out of date; run python -m scripts.docs.readme")
    if not check:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The page of benchmark results matches its data, and its commands can be run."""

import subprocess
import sys

import pytest

from scripts.docs import benchmarks
from tests.helpers.paths import ROOT

ENTRIES = benchmarks.read_results()
FIELDS = set(ENTRIES[0])


def test_the_page_matches_the_results():
    assert benchmarks.PAGE.read_text(encoding="utf-8") == benchmarks.render(ENTRIES)


def test_a_page_out_of_date_is_reported(monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("old", encoding="utf-8")
    monkeypatch.setattr(benchmarks, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--check"])
    with pytest.raises(SystemExit, match=r"README\.md does not match"):
        benchmarks.main()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_entries_are_complete(entry):
    assert set(entry) == FIELDS
    assert entry["area"] in benchmarks.AREAS
    ours, _, ratio = benchmarks.figures(entry)
    assert ours or ratio
    assert not ratio or entry["peer"]
    if entry["command"] and (script := benchmarks.script_of(entry["command"])):
        assert (ROOT / script).is_file()


def test_ids_are_unique_and_six_rows_are_headlines():
    assert len({entry["id"] for entry in ENTRIES}) == len(ENTRIES)
    headlines = [entry for entry in ENTRIES if entry["headline"]]
    assert len(headlines) == 6
    assert all(entry["ratio"] and entry["peer"] and entry["command"] for entry in headlines)


MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "docs")
    for file in (ROOT / "scripts" / folder).rglob("*.py")
    if "__main__" in file.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_scripts_explain_themselves(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout

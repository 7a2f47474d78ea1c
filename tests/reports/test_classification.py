"""The files of a classification: tables, pages, contact sheets and folders."""

import csv
import json
import os
import shutil

from PIL import Image

from tests.helpers.colours import COLOURS

LABELS = list(COLOURS)


def test_tables_pages_and_sheets(run, colour_folder, tiny_checkpoint, tmp_path):
    files = [tmp_path / f"o.{form}" for form in ("csv", "html", "png")]
    outs = ["--csv", files[0], "--html", files[1], "--contact-sheet", files[2]]
    words = [colour_folder, "--labels", ",".join(LABELS), "--model", tiny_checkpoint]
    out, _ = run("classify", *words, "--reject", "--json", *outs)
    shown = [json.loads(line) for line in out.splitlines()]
    with files[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, one in zip(rows, shown, strict=True):
        best = one["predictions"][0]
        assert row["key"] == one["key"]
        assert row["label"] == ("none of these" if one["rejected"] else best["label"])
        assert (row["label_1"], float(row["probability_1"])) == (best["label"], best["score"])
        assert float(row["shows_any"]) == one["shows_any"]
    page = files[1].read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "<script" not in page
    assert "http" not in page
    with Image.open(files[2]) as sheet:
        assert sheet.width == 8 * 134 + 6
        assert sheet.height >= 128
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "colours",
        *sorted(f.name for f in files),
    ]
    out, _ = run("classify", *words, "--reject", "--csv", "-")
    assert out.splitlines() == files[0].read_text().splitlines()
    _, err = run("classify", *words, "--csv", tmp_path / "o.xlsx", code=2)
    assert "expected a file name that ends in .csv" in " ".join(err.split())
    _, err = run("classify", *words, "--html", tmp_path / "o.pdf", code=2)
    assert "expected a file name that ends in .html" in " ".join(err.split())
    _, err = run("classify", *words, "--contact-sheet", tmp_path / "o.gif", code=1)
    assert "expected a name that ends in .png, .jpg, .jpeg" in err


def test_a_failed_run_leaves_no_files(run, colour_folder, tiny_checkpoint, tmp_path):
    for picture in colour_folder.glob("*.png"):
        picture.write_bytes(b"")
    words = [colour_folder, "--labels", "red,blue", "--model", tiny_checkpoint]
    run(*["classify", *words, "--csv", tmp_path / "o.csv", "--sort", tmp_path / "sorted"], code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["colours"]


def test_images_are_sorted_as_copies_or_links(run, colour_folder, tiny_checkpoint, tmp_path):
    (colour_folder / "deep").mkdir()
    shutil.copy(colour_folder / "red-1.png", colour_folder / "deep" / "red-0.png")
    before = sorted(colour_folder.rglob("*"))
    words = [colour_folder, "--labels", "warm/red,cold/green,cold/blue", "--model", tiny_checkpoint]
    for kind in ("copies", "links"):
        link = ["--link"] if kind == "links" else []
        out, _ = run("classify", *words, "--json", "--sort", tmp_path / kind, *link)
        found = sorted(p for p in (tmp_path / kind).rglob("*") if not p.is_dir())
        assert len(found) == len(out.splitlines()) == 13
        assert all(p.is_symlink() == (kind == "links") for p in found)
        for one in map(json.loads, out.splitlines()):
            folder = tmp_path / kind / one["predictions"][0]["label"]
            content = (colour_folder / one["key"]).read_bytes()
            assert content in [path.read_bytes() for path in folder.iterdir()]
    assert sorted(colour_folder.rglob("*")) == before
    _, err = run("classify", *words, "--sort", tmp_path / "copies", code=1)
    assert "is not empty, expected a new folder" in err
    assert len(list((tmp_path / "copies").rglob("*.png"))) == 13


def test_images_inside_a_table_are_copied_but_not_linked(run, tiny_checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.helpers.toys import png, square

    rows = [
        {"key": f"../{n}.png", "image": {"bytes": png(square(n)), "path": None}} for n in LABELS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    words = [tmp_path / "t.parquet", "--labels", "red,blue", "--model", tiny_checkpoint]
    run("classify", *words, "--sort", tmp_path / "sorted", "--json")
    found = [path.name for path in (tmp_path / "sorted").rglob("*.png")]
    assert sorted(found) == ["blue.png", "green.png", "red.png"]
    _, err = run("classify", *words, "--sort", tmp_path / "more", "--link", code=1)
    assert "cannot link to ../red.png, which is inside a table or tar" in err
    assert not (tmp_path / "more").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]

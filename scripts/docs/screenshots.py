"""Take the README's screenshots of the search page and the map with a headless Chromium.

    clipkit demo --out demo
    python -m scripts.docs.screenshots demo

Serves an index, or indexes and serves the drawings of `clipkit demo`, on a free local port. Writes
page.jpg, phone-dark.jpg, classify.jpg and map.jpg to notebooks/pictures.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow.parquet as pq

import clipkit
from clipkit.tasks.index import calibrate_index
from clipkit.tasks.map import draw_map
from tests.helpers.browser import chromium, missing

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200_000  # bytes per image, to keep the repository small


def index_demo(demo: Path, folder: Path) -> Path:
    """Write the demo's drawings in the unseen style as files, and index them with its model."""
    photos = folder / "emoji"
    photos.mkdir()
    with (photos / "metadata.jsonl").open("w") as lines:
        for row in pq.read_table(demo / "data" / "unseen.parquet").to_pylist():
            name = row["key"].rpartition("/")[2]
            (photos / name).write_bytes(row["image"])
            record = {"file_name": name, "caption": row["captions"], "label": row["label"]}
            print(json.dumps(record), file=lines)
    index = folder / "emoji-index"
    encoder = clipkit.load_model(demo / "run")
    clipkit.build_index(photos, index, encoder=encoder)
    calibrate_index(index, encoder)
    return index


def serve(index: Path) -> tuple["subprocess.Popen[str]", str]:
    command = [sys.executable, "-m", "clipkit", "serve", str(index), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+", line):
            return server, found[0].rstrip("/")
        print(line, end="", file=sys.stderr)
    raise SystemExit("error: the server did not start")


def take(
    browser: Any,
    address: str,
    file: Path,
    *,
    size: tuple[int, int] = (1280, 860),
    dark: bool = False,
    part: str = "",
    ready: str = "#search-view:not([hidden]) .tile:not(.ghost), .card",
) -> None:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(ready)
    page.wait_for_function(
        "() => [...document.images]"
        ".filter(i => i.src && i.checkVisibility() && i.getBoundingClientRect().top < innerHeight)"
        ".every(i => i.complete)"
    )
    page.wait_for_timeout(300)
    for quality in (82, 70, 55, 40):
        shot = page.locator(part) if part else page  # of a page, only the visible part
        data = shot.screenshot(type="jpeg", quality=quality)
        if len(data) <= LIMIT:
            break
    file.write_bytes(data)
    print(f"{file}  {len(data) // 1000} kB")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path, help="an index, or the output of `clipkit demo`")
    parser.add_argument("--query", default="smiling cat")
    parser.add_argument("--labels", default="cat,dog,bird,face,heart,flag")
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "pictures")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        index = options.place
        if (index / "data" / "unseen.parquet").is_file():
            index = index_demo(index, Path(folder))
        server, address = serve(index)
        search = f"{address}/?{urlencode({'q': options.query})}"
        labels = options.labels.replace(",", "\n")
        classify = f"{search}&{urlencode({'view': 'classify', 'labels': labels})}"
        try:
            with chromium() as browser:
                take(browser, search, options.out / "page.jpg")
                take(browser, search, options.out / "phone-dark.jpg", size=(390, 780), dark=True)
                take(browser, classify, options.out / "classify.jpg")
                drawn = draw_map(index, Path(folder) / "map.html")
                page = drawn.page.resolve().as_uri()
                take(browser, page, options.out / "map.jpg", part="main", ready="canvas")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

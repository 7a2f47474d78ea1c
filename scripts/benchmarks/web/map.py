"""Frame time of a map of 50,000 points in a headless Chromium, and time of its projection.

    taskset -c 0 python -m scripts.benchmarks.web.map
    python -m scripts.benchmarks.web.map --layout  # the t-SNE projection of 50,000 x 512

The page writes its points into the pixels of an image. The alternative draws each point with the
canvas's fillRect, as the page did before. Without a GPU, both run on the CPU. A frame is a step of
zooming or panning: `draw` is the time of the drawing function alone, `frame` the time until the
browser is ready for the next frame (at least 16.7 ms, for its 60 frames per second).
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.index.projection import project
from clipkit.reports.map import Cluster, MapPage, render_map
from scripts.benchmarks.common.timing import ratios, spread
from tests.helpers.browser import chromium, missing

CLUSTERS = 24
FILL_RECT = """() => {
    const order = Array.from({ length: count }, (_, i) => i)
        .sort((a, b) => cluster[a] - cluster[b]);
    const css = data.names.map((_, n) => `rgb(${colour(n).join()})`);
    Points.prototype.slow = (width, height, { left, top, unit, size }) => {
        pen.fillStyle = style.around;
        pen.fillRect(0, 0, width, height);
        pen.globalAlpha = 0.85;
        let last = -1;
        for (const i of order) {
            const x = left + places[2 * i] * unit, y = top + places[2 * i + 1] * unit;
            if (x < -size || y < -size || x > width + size || y > height + size) continue;
            if (cluster[i] !== last) pen.fillStyle = css[(last = cluster[i])];
            pen.fillRect(x - size / 2, y - size / 2, size, size);
        }
        pen.globalAlpha = 1;
        pen.getImageData(0, 0, 1, 1);  // force the drawing to finish now
    };
    const fast = Points.prototype.draw, put = pen.putImageData.bind(pen);
    window.use = (slow) => {
        Points.prototype.draw = slow
            ? (pixels, width, height, at) => Points.prototype.slow(width, height, at) : fast;
        pen.putImageData = slow ? () => {} : put;
    };
}"""
FRAMES = """async ([zoom, x, steps]) => {
    const next = () => new Promise(requestAnimationFrame);
    view = { x, y: 0.5, zoom };
    draw();
    const drawn = [], frames = [];
    let last = await next();
    for (let n = 0; n < steps; n++) {
        view.x += 0.002 / zoom;
        view.zoom *= 1.01;
        const start = performance.now();
        draw();
        drawn.push(performance.now() - start);
        const now = await next();
        frames.push(now - last);
        last = now;
    }
    return [drawn, frames];
}"""


def places_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in clusters, as in a real projection."""
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, CLUSTERS, count))
    middles = rng.uniform(0.1, 0.9, (CLUSTERS, 2))
    places = middles[clusters] + 0.05 * rng.standard_normal((count, 2))
    return np.clip(places, 0, 1).astype(np.float32), clusters


def write_page(count: int, file: Path) -> None:
    places, clusters = places_of(count)
    groups = [
        Cluster(f"cluster number {n}", *map(float, places[clusters == n].mean(axis=0)), 1)
        for n in range(CLUSTERS)
    ]
    keys = [f"{n:06d}.jpg" for n in range(count)]
    text = [""] * count
    page = MapPage("bench", "", places, clusters, groups, keys, text, text)
    file.write_text(render_map(page), encoding="utf-8")


def draw(count: int, rounds: int, steps: int) -> None:
    if missing():
        raise SystemExit(f"error: {missing()}")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        write_page(count, Path(folder) / "map.html")
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto((Path(folder) / "map.html").as_uri())
        page.evaluate(FILL_RECT)
        for zoom, x in ((1, 0.5), (3, 0.4), (20, 0.45)):
            took: dict[bool, list[Any]] = {False: [], True: []}
            for _ in range(rounds):
                for slow in (False, True):
                    page.evaluate("use", slow)
                    took[slow].append(page.evaluate(FRAMES, [zoom, x, steps]))
            print(f"{count:,} points, zoom {zoom}:")
            for slow, name in ((False, "pixels"), (True, "fillRect")):
                drawn, frames = (np.concatenate([one[n] for one in took[slow]]) for n in (0, 1))
                print(f"  {name:8}  draw {shown(drawn)}, frame {shown(frames)}")
            pixels, rects = ([np.median(drawn) for drawn, _ in took[slow]] for slow in (0, 1))
            print(f"  fillRect / pixels: {spread(ratios(rects, pixels), 1)}")


def shown(times: np.ndarray) -> str:
    return f"{np.median(times):.1f} ms (p95 {np.percentile(times, 95):.1f})"


def layout(count: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((200, dim))
    vectors = middles[rng.integers(0, 200, count)] + 1.5 * rng.standard_normal((count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    start = time.perf_counter()
    project(vectors.astype(np.float32))
    print(f"projection of {count:,} x {dim}: {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="frames per round")
    parser.add_argument("--layout", action="store_true", help="time the projection instead")
    options = parser.parse_args()
    if options.layout:
        layout(options.points, 512)
    else:
        draw(options.points, options.rounds, options.steps)


if __name__ == "__main__":
    main()

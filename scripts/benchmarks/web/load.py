"""Load test of `clipkit serve`: 64 connections search an index of 100,000 vectors for a minute.

    python -m scripts.benchmarks.web.load         # towers of the size of ViT-B-32
    python -m scripts.benchmarks.web.load --tiny  # a negligible model: the server itself

First, every query is distinct, so that each must be encoded. Then all are drawn from 1,000 queries,
so that almost all are cached, as when users page back and forth or repeat popular searches. The
model has random weights, which does not affect its speed. Client and server share the machine.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from clipkit.config import parse_config
from clipkit.index.vector_index import VectorIndex
from clipkit.models.checkpoint import save_checkpoint
from clipkit.models.loading import load_model
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.training.build import build_towers
from scripts.benchmarks.common.memory import resident_memory

BASE = {
    "embed_dim": 512,
    "vision": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text": {"width": 512, "heads": 8, "layers": 12},
}
TINY = {
    "embed_dim": 512,
    "vision": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text": {"width": 32, "heads": 2, "layers": 1},
}
WINDOW, POLL = 10.0, 0.2  # seconds per reported window of memory, and between samples
REPEATED = 1000  # distinct queries of the second load
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "old",
    "small",
    "dog",
    "cat",
    "child",
    "woman",
    "man",
    "boat",
    "tree",
    "house",
    "river",
    "snow",
    "grass",
    "field",
    "car",
    "horse",
    "bird",
    "runs",
    "sits",
    "stands",
    "sleeps",
    "plays",
    "jumps",
    "under",
    "over",
    "beside",
    "behind",
    "with",
    "near",
    "green",
    "yellow",
]


def make_index(folder: Path, count: int, tiny: bool) -> Path:
    towers = build_towers(parse_config({"model": TINY if tiny else BASE}).model, 0.07, seed=0)
    save_checkpoint(folder / "step-1", towers, {"step": 1}, {"step": 1})
    encoder = load_model(folder / "step-1")
    random_rows = np.random.default_rng(0)
    with EmbeddingStore.create(folder / "store", encoder.model, shard_size=10_000) as writer:
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            rows = random_rows.standard_normal((size, encoder.dim), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            records = [
                {
                    "key": f"{number % 50:02d}/{number:06d}.jpg",
                    "size": 1,
                    "mtime_ns": 1,
                    "captions": [f"caption number {number}"],
                    "label": f"label {number % 20}",
                }
                for number in range(start, start + size)
            ]
            writer.append(rows, records)
        store = writer.finish({"root": str(folder), "kind": "folder", "spec": str(folder)})
    VectorIndex.build(store, folder / "index")
    return folder / "index"


def start_server(index: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "clipkit", "serve", str(index), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return server, int(found[1])
    raise SystemExit("error: the server did not start")


@dataclass
class Load:
    """Results of a load: seconds per request, errors, lowest and highest MiB per window."""

    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)


async def connection(port: int, until: float, queries: Iterator[str], load: Load) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        query = next(queries)
        start = time.perf_counter()
        writer.write(f"GET /search?q={query}&k=60 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        if not head.startswith(b"HTTP/1.1 200") or body.count(b'"rank"') != 60:
            load.errors.append(f"{head[:40]!r} {body[:200]!r}")
        load.times.append(time.perf_counter() - start)
    writer.close()


async def watch(server: "subprocess.Popen[str]", until: float, load: Load) -> None:
    while (start := time.perf_counter()) < until - POLL:
        samples = []
        while time.perf_counter() < min(until, start + WINDOW):
            samples.append(resident_memory(server.pid))
            await asyncio.sleep(POLL)
        load.memory.append((min(samples), max(samples)))


async def load_server(
    server: "subprocess.Popen[str]", port: int, count: int, seconds: float, queries: Iterator[str]
) -> Load:
    load, until = Load(), time.perf_counter() + seconds
    connections = (connection(port, until, queries, load) for _ in range(count))
    await asyncio.gather(watch(server, until, load), *connections)
    return load


def distinct(seed: int) -> Iterator[str]:
    words = random.Random(seed)
    while True:
        yield "+".join(words.choices(WORDS, k=words.randint(2, 14)))


def repeated(seed: int) -> Iterator[str]:
    queries, rng = list(islice(distinct(seed), REPEATED)), random.Random(seed)
    while True:
        yield rng.choice(queries)


def cpu_seconds(server: "subprocess.Popen[str]") -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batches(port: int) -> tuple[float, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = (
        re.search(rf"clipkit_encoder_batch_size_{name} (\S+)", text) for name in ("sum", "count")
    )
    captions, calls = (float(value[1]) for value in values)
    return captions, calls


def report(name: str, load: Load, took: float, used: float, encoded: tuple[float, float]) -> None:
    p50, p99 = np.percentile(load.times, [50, 99])
    count, (captions, calls) = len(load.times), encoded
    print(f"{name}: {count} requests in {took:.1f} s")
    print(f"  requests/s        {count / took:.1f}")
    print(f"  p50, p99          {1000 * p50:.0f} ms, {1000 * p99:.0f} ms")
    print(f"  errors            {len(load.errors)} {load.errors[:1] or ''}")
    print(f"  CPU time          {1000 * used / count:.1f} ms per request")
    print(f"  captions encoded  {captions:.0f}, {captions / max(calls, 1):.1f} per call")
    # Memory of requests in progress comes and goes; a leak shows in the lowest values.
    shown = ", ".join(f"{least:.0f}-{most:.0f}" for least, most in load.memory)
    print(f"  resident          {shown} MiB, lowest and highest in each {WINDOW:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="duration of each load")
    parser.add_argument("--tiny", action="store_true", help="use a negligible model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, port = start_server(make_index(Path(folder), options.vectors, options.tiny))
        try:
            print(f"resident          {resident_memory(server.pid):.0f} MiB before any request")
            asyncio.run(load_server(server, port, options.connections, 5, distinct(0)))  # warm
            for name, queries in (("distinct", distinct(1)), ("repeated", repeated(2))):
                start, used, (captions, calls) = (
                    time.perf_counter(),
                    cpu_seconds(server),
                    batches(port),
                )
                load = asyncio.run(
                    load_server(server, port, options.connections, options.seconds, queries)
                )
                took, used = time.perf_counter() - start, cpu_seconds(server) - used
                after = batches(port)
                report(name, load, took, used, (after[0] - captions, after[1] - calls))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

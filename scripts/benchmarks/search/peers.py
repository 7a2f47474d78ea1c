"""Indexes that autofaiss and clip-retrieval build from the same vectors, for tuned.py.

Each peer runs in its own environment, in a process that is killed after a time limit.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

QUERY_MILLISECONDS = 10.0
"""Time limit of a query for autofaiss: its own default."""
AUTOFAISS = """
import logging, sys
from autofaiss import build_index
folder, out, memory, milliseconds = sys.argv[1:]
build_index(folder, index_path=out, index_infos_path=out.replace(".index", ".json"),
            max_index_memory_usage=memory, current_memory_available="8G", metric_type="ip",
            max_index_query_time_ms=float(milliseconds), verbose=logging.ERROR)
"""


@dataclass(frozen=True)
class Peer:
    """An index that a peer has built.

    Attributes:
        index: a FAISS index with the search parameters of the peer.
        key: its factory string.
        parameters: its search parameters.
        seconds: time to build and tune, including the start of the process.
    """

    index: Any
    key: str
    parameters: str
    seconds: float


def autofaiss(python: Path, folder: Path, memory: int, limit: float) -> Peer | str:
    """Build an index of ``folder/img_emb/*.npy``; returns the reason if that fails."""
    out = folder / f"autofaiss-{memory}.index"
    command = [python, "-c", AUTOFAISS, folder / "img_emb", out, f"{memory}B", QUERY_MILLISECONDS]
    return _built("autofaiss", command, out, limit)


def clip_retrieval(python: Path, folder: Path, memory: int, limit: float) -> Peer | str:
    """The same with ``clip-retrieval index``, which calls the autofaiss of its environment."""
    out = folder / f"clip-retrieval-{memory}"
    out.mkdir()
    command = [python, "-m", "clip_retrieval.clip_index", "--embeddings_folder", folder]
    command += ["--index_folder", out, "--max_index_memory_usage", f"{memory}B"]
    command += ["--current_memory_available", "8G", "--copy_metadata", "False"]
    return _built("clip-retrieval", command, out / "image.index", limit)


def _built(name: str, command: list[Any], out: Path, limit: float) -> Peer | str:
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{name} was killed after {limit:.0f} s without an index"
    seconds = time.perf_counter() - start
    infos = out.with_suffix(".json")
    if process.returncode or not out.exists() or not infos.exists():
        reason = (errors.strip() or "it wrote no index").splitlines()[-1]
        return f"{name} failed after {seconds:.0f} s: {reason}"
    index = faiss.read_index(str(out))
    facts = json.loads(infos.read_text(encoding="utf-8"))
    parameters = str(facts.get("index_param", ""))
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    return Peer(index, str(facts["index_key"]), parameters, seconds)

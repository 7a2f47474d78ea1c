"""Killed at any moment, an index is the old one or the new one; readers see nothing between."""

import os
import signal
import subprocess
import sys
import time

import pytest

from clipkit.errors import ArtifactError
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from tests.helpers.indexes import DIM, make_store
from tests.helpers.paths import ROOT
from tests.helpers.toys import unit_rows

CRASH = [sys.executable, "-m", "tests.helpers.crash"]


@pytest.mark.parametrize(
    ("verb", "stride"),
    [
        *((verb, 1) for verb in ("change", "compact", "remove", "change-old", "build", "merge")),
        ("sync", 5),  # which has torch to fork with, ten times slower
        pytest.param("sync", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_step_it_is_the_old_index_or_the_new_one(tmp_path, verb, stride):
    done = subprocess.run(
        [*CRASH, "main", verb, tmp_path, str(stride)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * stride >= 15


@pytest.fixture
def changing(tmp_path):
    """An index that another process changes, compacts and changes again, without end."""
    path = tmp_path / "index"
    VectorIndex.build(make_store(tmp_path / "store", unit_rows(40, DIM)), path, "SQ8")
    started = []

    def start():
        started.append(subprocess.Popen([*CRASH, "race", path, "600"], cwd=ROOT))
        return started[-1]

    yield path, start
    for process in started:
        process.kill()
        process.wait()


def pairs_of(path):
    """Keys of the pair that the other process keeps exchanging; both or none are there."""
    index = VectorIndex.open(path)
    pair = [key for key in index.keys if key.startswith("pair-")]
    assert len(index) == 40 + len(pair)
    assert not pair or [key[-1] for key in pair] == ["a", "b"]
    assert len({key[:-1] for key in pair}) <= 1
    found = {hit.key for hit in index.search_vectors(unit_rows(1, DIM), len(index))[0]}
    assert found == set(index.keys)
    return pair


def test_readers_never_see_a_half_state(changing):
    path, start = changing
    process, seen = start(), set()
    while len(seen) < 15:
        assert process.poll() is None
        seen.add(tuple(pairs_of(path)))


def test_kill_9_at_any_time_leaves_an_index_that_lives_on(changing):
    path, start = changing
    for number in range(4):
        before, process = pairs_of(path), start()
        while pairs_of(path) == before:
            assert process.poll() is None
        time.sleep(0.007 * number)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        pairs_of(path)
        with IndexWriter(path) as writer:  # its lock has died with it
            writer.commit(compact=True)
        with pytest.raises(ArtifactError, match="no item"), IndexWriter(path) as writer:
            writer.remove(["none"])

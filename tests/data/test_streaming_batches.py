"""Batches of a stream after a resume are those of a run that never stopped, whoever shares them."""

import copy
import io
import os
import tarfile

import pytest
import torch

from clipkit.data.loader import Share
from clipkit.data.open_source import open_source
from clipkit.data.sampler import split_held_out
from tests.helpers.pairs import batches, loader, png, same


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Four tars of 50 pictures each, two of them no pictures, in parts that fit no batch."""
    for setting, value in {"PART": 7, "WAITS": 4, "LANES": 3}.items():
        monkeypatch.setattr(f"clipkit.data.streaming.{setting}", value)
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(shard * 50, shard * 50 + 50):
                image = b"no picture" if number in (60, 130) else png(number)
                for suffix, data in (("png", image), ("txt", b"%d\n%d again" % (number, number))):
                    info = tarfile.TarInfo(f"{number:03}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path / "{0..3}.tar"


def read(shards, epoch=1, start=0, state=None, **changes):
    """Batches from ``start`` on, and the state after each."""
    reader = loader(open_source(shards), skip_limit=0.1, **changes)
    if state:
        reader.restore(state)
    found, states = [], []
    for batch in reader.batches(epoch, start):
        found.append(batch)
        states.append(copy.deepcopy(reader.state()))
    return found, states


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_a_checkpoint_was_made(shards, workers, tmp_path, capsys):
    found, states = read(shards, workers=workers)
    assert len(found) == 25
    for start in (1, 3, 12, 24, 25):
        torch.save(states[start - 1], tmp_path / "state.pt")
        assert (tmp_path / "state.pt").stat().st_size < 4000
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        rest, after = read(shards, start=start, state=state, workers=2 - workers)
        assert start == 25 or same(rest, found[start:])
        assert after[-1:] == states[start:][-1:]
    assert "read again" not in capsys.readouterr().err


def test_another_number_of_processes_goes_on(shards):
    found, states = read(shards)
    # Each tells what it found to itself alone, which is enough here.
    told = [read(shards, start=11, state=states[10], share=Share(rank, 3))[0] for rank in range(3)]
    for number, whole in enumerate(found[11:]):
        parts = [told[rank][number] for rank in range(3)]
        keys = [key for part in parts for key in part.keys]
        assert sorted(keys) == sorted(whole.keys)
        assert len(parts[0]) >= 2


def test_a_part_held_out_stays_out(shards):
    source, held_out = split_held_out(open_source(shards), 0.2, seed=3)
    reader = loader(source, skip_limit=0.1)
    found, states = [], []
    for batch in reader.batches(0):
        found.append(batch)
        states.append(copy.deepcopy(reader.state()))
    again = loader(source, skip_limit=0.1)
    again.restore(states[9])
    assert same(list(again.batches(0, 10)), found[10:])
    kept = {key for batch in found for key in batch.keys}
    assert not kept & {row.key for row in held_out.rows}
    assert len(kept) > 120


def test_a_checkpoint_without_a_place_passes_over_the_batches_before(shards, capsys):
    found, states = read(shards)
    older = {name: value for name, value in states[9].items() if name != "place"}
    rest, _ = read(shards, start=10, state=older)
    assert same(rest, found[10:])
    assert "the 10 batches before are read again" in capsys.readouterr().err
    # A place of another batch or epoch is not taken for one of this.
    assert same(read(shards, start=10, state=states[8])[0], found[10:])
    assert same(
        read(shards, 0, start=10, state=states[9])[0],
        batches(open_source(shards), 0, 10, skip_limit=0.1),
    )


def test_a_source_that_has_changed_is_read_again(shards, tmp_path, capsys):
    _, states = read(shards)
    os.utime(tmp_path / "2.tar", (1, 1))
    rest, _ = read(shards, start=20, state=states[19])
    assert len(rest) == 5
    assert "as it is now" in capsys.readouterr().err


def test_a_place_of_parts_of_another_size_is_not_taken(shards, monkeypatch, capsys):
    _, states = read(shards)
    monkeypatch.setattr("clipkit.data.streaming.PART", 9)
    assert same(read(shards, start=20, state=states[19])[0], read(shards)[0][20:])
    assert "are read again" in capsys.readouterr().err


def test_what_was_left_out_is_counted_once(shards):
    found, states = read(shards)
    assert states[-1]["bad"] == 2
    rest, after = read(shards, start=20, state=states[19])
    assert same(rest, found[20:])
    for name in ("seen", "bad", "skipped", "place"):
        assert after[-1][name] == states[-1][name]

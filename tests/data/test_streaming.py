"""A shuffled stream gone on with anywhere is as if never left, and reads little again."""

import io
import itertools
import json
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data import streaming as stream
from clipkit.data.formats import webdataset as tar_members
from clipkit.data.open_source import open_source
from clipkit.data.rows import Stream, schema
from clipkit.data.sampler import split_held_out
from clipkit.data.streaming import Shuffled

ROWS = 600


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """72 rows of 600 wait or leave at most, out of 3 shards at once."""
    for setting, value in {"PART": 12, "WAITS": 6, "LANES": 3}.items():
        monkeypatch.setattr(stream, setting, value)


def content(number):
    """What stands for a picture; nothing here decodes it."""
    return b"%05d" % number * (100 + number % 7)


def write_tar(path, items, suffix="jpg", **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, number in items:
            parts = {f"{name}.{suffix}": content(number), f"{name}.txt": b"row %d" % number}
            if number % 50 == 7:
                parts = {f"{name}.txt": b"alone"}  # left out by the reader itself
            for member, data in parts.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tars(folder):
    for shard, numbers in enumerate(np.array_split(np.arange(ROWS), 6)):
        write_tar(folder / f"{shard}.tar", [(f"{n:05}", n) for n in numbers.tolist()])
    return folder / "{0..5}.tar"


def mixed_tars(folder):
    """Names in no order, some of them twice, long ones, and a shard that is cut short."""
    for shard, numbers in enumerate(np.array_split(np.arange(ROWS), 6)):
        names = [f"{'long/' * 30 * (n % 3 == 0)}{n:05}" for n in numbers.tolist()]
        items = list(zip(names, numbers.tolist(), strict=True))
        random.Random(shard).shuffle(items)
        items += [(names[k], 10_000 + k) for k in range(0, len(names), 9)]
        told = {"pax_headers": {"comment": "of all"}} if shard % 2 else {}
        write_tar(folder / f"{shard}.tar", items, format=tarfile.PAX_FORMAT, **told)
    whole = (folder / "3.tar").read_bytes()
    (folder / "3.tar").write_bytes(whole[: len(whole) * 2 // 3])
    return folder / "*.tar"


def columns(numbers):
    return {
        "key": [f"{n:05}" for n in numbers],
        "image": [content(n) for n in numbers],
        "caption": [f"row {n}" for n in numbers],
    }


def parquet(folder):
    for file, numbers in enumerate(np.array_split(np.arange(ROWS), 3)):
        table = pa.table(columns(numbers.tolist()))
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=70)
    return folder / "{0..2}.parquet"


def text_rows():
    """Captions of a picture in neighbouring rows, over lines; every 40th row names no picture."""
    for n in range(ROWS):
        picture = "" if n % 40 == 7 else f"{n // 3:05}.jpg"
        yield picture, f'row {n}, "quoted"\nover lines é' if n % 5 else f"row {n}"


def csv(folder):
    lines = ["\ufeffimage;caption"]
    for n, (picture, caption) in enumerate(text_rows()):
        quoted = caption.replace('"', '""')
        lines += [f'{picture};"{quoted}"'] + ["no;such;row"] * (n % 45 == 8)
    (folder / "t.csv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    return folder / "t.csv"


def jsonl(folder):
    lines = []
    for n, (picture, caption) in enumerate(text_rows()):
        lines += [json.dumps({"image": picture, "caption": caption}, ensure_ascii=False)]
        lines += ["{broken"] * (n % 45 == 8) + [""] * (n % 50 == 9)
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder / "t.jsonl"


def saved(folder):
    datasets.Dataset.from_dict(columns(range(ROWS))).save_to_disk(folder / "saved")
    return folder / "saved"


def photos(folder):
    for n in range(100):
        (folder / f"{n:03}.jpg").write_bytes(b"")
        (folder / f"{n:03}.txt").write_text(f"row {n}\n")
    return folder


def hub(folder):
    """A local stand-in for Parquet files of the hub, whose row groups fit no batch of ours."""
    parquet(folder)
    return "hf:org/name"


def generated(_):
    """A stand-in for what has no place to begin but at its shards' starts."""
    return "hf:org/generated"


SOURCES = [tars, mixed_tars, parquet, csv, jsonl, saved, photos, hub, generated]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Open one of the kinds of source, as a stream."""

    def load(name, config, *, split, streaming):
        assert streaming
        if name == "org/generated":
            shards = {"shards": list(range(20))}
            return datasets.IterableDataset.from_generator(generate, gen_kwargs=shards)
        files = [str(file) for file in sorted(tmp_path.glob("*.parquet"))]
        return plain("parquet", data_files=files, split="train", streaming=True)

    plain = datasets.load_dataset
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("clipkit.data.formats.huggingface._CHUNK", 16)
    monkeypatch.setattr("clipkit.data.formats.tables._STREAMED_ROWS", 16)
    monkeypatch.setattr("clipkit.data.formats.tables._CHUNK", 20)
    monkeypatch.setattr("clipkit.data.rows._STREAMED", 40)
    monkeypatch.setattr("clipkit.data.formats.huggingface._ROWS", 40)
    return lambda kind: open_source(spec(kind, tmp_path), streaming=True)


def spec(kind, folder, made={}):  # noqa: B006
    """The files of a kind of source are made once in a folder."""
    if (kind, folder) not in made:
        made[kind, folder] = kind(folder)
    return made[kind, folder]


GENERATED = []


def generate(shards):
    for shard in shards:
        for n in range(shard * 30, shard * 30 + 30):
            GENERATED.append(n)
            yield {name: values[0] for name, values in columns([n]).items()}


def through_a_checkpoint(state):
    """What JSON gives back: no more than plain values, as ``weights_only`` loads them."""
    text = json.dumps(state)
    assert len(text) < 4000
    return json.loads(text)


def counted(source):
    """The stream of a source, and the list that the rows of each batch it reads are added to."""
    read, sizes = source.rows.read, []

    def counting(shard, at):
        for batch, after in read(shard, at):
            sizes.append(len(batch))
            yield batch, after

    return replace(source.rows, read=counting), sizes


@pytest.mark.parametrize("kind", SOURCES)
def test_going_on_anywhere_is_never_having_left(kind, opened):
    source = opened(kind)
    in_order = list(source.rows)
    shuffled = Shuffled(source.rows, 3, 1)
    rows, states = [], [shuffled.state()]
    for row in shuffled:
        rows.append(row)
        states.append(through_a_checkpoint(shuffled.state()))
    by_key = [sorted(map(repr, some)) for some in (rows, in_order)]
    assert by_key[0] == by_key[1]
    assert rows != in_order
    left_out = set(source.skipped)
    places = {0, 1, 11, 12, 13, 60, 100, len(rows) // 2, len(rows) - 1, len(rows)}
    for place in places & set(range(len(rows) + 1)):
        again = opened(kind)
        assert list(Shuffled(again.rows, 3, 1, states[place])) == rows[place:], place
        assert set(again.skipped) <= left_out


@pytest.mark.parametrize("kind", SOURCES)
def test_a_late_start_reads_little(kind, opened, monkeypatch):
    rows, sizes = counted(opened(kind))
    shuffled = Shuffled(rows, 3, 0)
    passing = iter(shuffled)
    count = len(list(rows))
    late = list(itertools.islice(passing, count * 3 // 4))
    del late, sizes[:], GENERATED[:]
    rest = list(Shuffled(rows, 3, 0, shuffled.state()))
    assert len(rest) == count - count * 3 // 4
    # What waits and, of each shard that is open, a batch begun.
    again = stream.PART * stream.WAITS + stream.LANES * 40
    merged = 3 if kind in (csv, jsonl) else 1  # rows that became one
    assert sum(sizes) <= merged * (len(rest) + again)
    if kind is generated:  # shards that are open are read from their starts
        assert len(GENERATED) <= sum(sizes) + stream.LANES * 30


def test_a_late_start_reads_few_bytes_of_tars(opened, monkeypatch):
    rows = opened(tars).rows
    read = [0]

    class Counted(io.FileIO):
        def readinto(self, target):
            size = super().readinto(target)
            read[0] += size
            return size

        def read(self, size=-1):
            data = super().read(size)
            read[0] += len(data)
            return data

    def openly(self, mode):
        assert mode == "rb"
        return io.BufferedReader(Counted(self))

    monkeypatch.setattr(Path, "open", openly)
    shuffled = Shuffled(rows, 3, 0)
    passing = iter(shuffled)
    whole = len(list(passing))
    every, read[0] = read[0], 0
    shuffled = Shuffled(rows, 3, 0)
    passing = iter(shuffled)
    list(itertools.islice(passing, int(0.75 * whole)))
    state, read[0] = shuffled.state(), 0
    next(iter(Shuffled(rows, 3, 0, state)))
    assert 0 < read[0] < 0.25 * every


def test_what_waits_is_bounded(opened):
    rows, sizes = counted(opened(tars))
    most = 0
    for given, _ in enumerate(Shuffled(rows, 3, 0), 1):
        most = max(most, sum(sizes) - given)
    # Half the window, and what the shards that are open have begun.
    assert most <= stream.PART * (stream.WAITS + 3) / 2 + stream.LANES * 16


def test_headers_are_looked_up_only_where_names_do_not_ascend(opened, monkeypatch):
    looked = []
    plain = tar_members.images
    monkeypatch.setattr(tar_members, "images", lambda tar: looked.append(tar) or plain(tar))
    for kind, some in ((tars, False), (mixed_tars, True)):
        source = opened(kind)
        for shard in source.rows.shards:
            rows = list(source.rows.rows(shard))
            middle = rows[len(rows) // 2]
            assert list(source.rows.rows(shard, middle[1])) == rows[len(rows) // 2 + 1 :]
        assert bool(looked) is some
        for file in source.root.glob("*.tar"):
            os.remove(file)


def test_epochs_and_seeds_differ_and_all_rows_come_once(opened):
    rows = opened(parquet).rows
    orders = [[row.key for row in Shuffled(rows, *of)] for of in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == [f"{n:05}" for n in range(ROWS)] for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_a_part_held_out_of_a_stream(opened):
    source = opened(tars)
    training, held_out = split_held_out(source, 0.3, seed=0)
    kept = [row.key for row in Shuffled(training.rows, 0, 0)]
    assert len(kept) > 300
    held = [row.key for row in held_out.rows]
    assert sorted(kept + held) == sorted(row.key for row in source.rows)
    shuffled = Shuffled(training.rows, 0, 0)
    list(itertools.islice(shuffled, 200))
    again = Shuffled(training.rows, 0, 0, through_a_checkpoint(shuffled.state()))
    assert [row.key for row in again] == kept[200:]


def test_rows_can_be_changed_and_cut_off(opened):
    rows = opened(jsonl).rows
    changed = rows.map(lambda row: replace(row, label=row.key[:3])).filter(lambda row: row.captions)
    some = list(changed.take(5))
    assert [row.label for row in some] == [row.key[:3] for row in rows.take(5)]
    assert [row.key for row in some] == [row.key for row in rows.take(5)]


def numbers(count, shards):
    """A stream of numbered rows in so many shards."""
    parts = np.array_split(np.arange(count), shards)

    def read(shard, at):
        for first in range(at or 0, len(parts[shard]), 64):
            some = parts[shard][first : first + 64].tolist()
            rows = [{"key": str(n)} for n in some]
            yield pa.RecordBatch.from_pylist(rows, schema()), first + len(some)

    def generate(shards):
        yield from ({"key": n} for shard in shards for n in parts[shard].tolist())

    told = {"shards": list(range(shards))}
    return Stream(read, told["shards"]), datasets.IterableDataset.from_generator(
        generate, gen_kwargs=told
    )


@pytest.mark.parametrize("shards", [1, 40])
def test_it_mixes_as_well_as_a_buffer(shards, monkeypatch):
    """Pairs in a batch that are near neighbours in a shard, against the buffer of `datasets`."""
    for setting, value in {"PART": 128, "WAITS": 16, "LANES": 16}.items():
        monkeypatch.setattr(stream, setting, value)
    ours, theirs = numbers(20_000, shards)

    def near(numbers):
        keys = np.array(list(numbers)[: 20_000 // 64 * 64]).reshape(-1, 64)
        assert len(np.unique(keys)) == keys.size
        apart = np.abs(keys[:, :, None] - keys[:, None, :])
        return (apart <= 50).mean() - 1 / 64  # less each with itself

    found = [
        (
            near(int(row.key) for row in Shuffled(ours, seed, 0)),
            near(row["key"] for row in theirs.shuffle(seed=seed, buffer_size=1000)),
        )
        for seed in range(2)
    ]
    mine, other = np.mean(found, axis=0)
    assert 0 < mine <= 1.05 * other

"""Several sources as one: how often each pair comes, that batches mix them, and how they resume."""

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from clipkit.config import load_config, parse_config
from clipkit.data.open_source import open_source
from clipkit.data.rows import Mixture
from clipkit.data.sampler import split_held_out
from clipkit.data.source import mix
from clipkit.errors import ConfigError
from clipkit.tasks.train import train
from clipkit.training.data import open_training_data
from clipkit.training.run_directory import read_log
from tests.helpers.colours import write_colours
from tests.helpers.pairs import batches, loader, png, row, same, source
from tests.helpers.runs import configured
from tests.helpers.toys import write_tar

KINDS = [(False, False), (False, True), (True, False), (True, True)]


def numbered(first, count, streaming):
    made = source([row(n) for n in range(first, first + count)], streaming=streaming)
    return replace(made, spec=f"from-{first}", fingerprint=str(first))


def two(streaming, weights=(), sizes=(120, 40)):
    return mix(
        [numbered(0, sizes[0], streaming[0]), numbered(200, sizes[1], streaming[1])], weights
    )


def names_of(batch):
    """The names of images, without the prefixes of sources."""
    return [key.rpartition("/")[2] for key in batch.keys]


def counted(found):
    return Counter(name for batch in found for name in names_of(batch))


@pytest.mark.parametrize("streaming", KINDS)
def test_every_pair_comes_as_often_as_its_weight_says(streaming):
    keys = [[f"{n:03}.png" for n in range(first, end)] for first, end in ((0, 120), (200, 240))]
    reader = loader(two(streaming), batch_size=16)
    once = counted(reader.batches(0))
    assert once == dict.fromkeys([*keys[0], *keys[1]], 1)
    assert reader.drawn == [120, 40]
    reader = loader(two(streaming, (1, 2)), batch_size=20)
    for epoch in (0, 1):
        drawn = counted(reader.batches(epoch))
        assert drawn == dict.fromkeys(keys[0], 1) | dict.fromkeys(keys[1], 2)
    assert reader.drawn == [240, 160]


@pytest.mark.parametrize("streaming", KINDS)
def test_a_fraction_draws_that_part_of_the_pairs(streaming):
    mixture = two(streaming, (0.5, 1.5))
    found = [counted(batches(mixture, epoch, batch_size=1)) for epoch in range(4)]
    for drawn in found:
        of_first = [drawn[f"{n:03}.png"] for n in range(120)]
        of_second = [drawn[f"{n:03}.png"] for n in range(200, 240)]
        assert set(of_first) == {0, 1}
        assert set(of_second) == {1, 2}
        # Exactly half of a table; of a stream, half by chance: within 4 standard deviations.
        assert abs(sum(of_first) - 60) <= (22 if True in streaming else 0)
        assert abs(sum(of_second) - 60) <= (13 if True in streaming else 0)
    assert len({tuple(sorted(drawn.items())) for drawn in found}) == 4


@pytest.mark.parametrize("streaming", KINDS)
def test_each_batch_has_pairs_of_all(streaming):
    shares = [
        np.mean([name >= "200" for name in names_of(batch)])
        for batch in batches(two(streaming), batch_size=32)
    ]
    assert len(shares) == 5
    assert all(0.03 < share < 0.6 for share in shares)  # 0.25 expected, ± 0.08


def test_captions_take_turns_over_the_passes():
    for streaming in KINDS:
        reader = loader(two(streaming, (1, 2)), batch_size=200)
        (batch,) = reader.batches(0)
        of_key = {name: set() for name in names_of(batch)}
        for name, tokens in zip(names_of(batch), batch.tokens.tolist(), strict=True):
            of_key[name].add(tokens[1])
        assert {len(of_key[f"{n:03}.png"]) for n in range(200, 240)} == {2}


@pytest.mark.parametrize("weights", [(), (2, 1, 0.7)])
@pytest.mark.parametrize("streaming", [(False,) * 3, (True, False, True), (True,) * 3])
def test_a_mixture_goes_on_where_it_stopped(streaming, weights, monkeypatch, capsys):
    for setting, value in {"PART": 7, "WAITS": 4, "LANES": 3}.items():
        monkeypatch.setattr(f"clipkit.data.streaming.{setting}", value)

    def made():
        sizes = (50, 20, 8)  # which end one after the other
        parts = [numbered(100 * n, size, streaming[n]) for n, size in enumerate(sizes[:2])]
        parts.append(numbered(240, sizes[2], streaming[2]))
        return loader(mix(parts, weights), batch_size=4)

    whole, states, found = made(), [], []
    for batch in whole.batches(3):
        found.append(batch)
        states.append(copy.deepcopy(whole.state()))
    assert len(found) > 18
    for start in range(1, len(found)):
        again = made()
        again.restore(json.loads(json.dumps(states[start - 1])))
        assert same(list(again.batches(3, start)), found[start:])
        assert again.drawn == whole.drawn
    assert "read again" not in capsys.readouterr().err
    # Without its place a stream is passed over to the same batches.
    assert same(list(made().batches(3, 10)), found[10:])


def test_several_processes_share_a_mixture():
    from clipkit.data.loader import Share

    mixture = two((True, False), (1, 2))
    whole = batches(mixture, batch_size=20)
    parts = [batches(mixture, batch_size=20, share=Share(rank, 2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert sorted(batch.keys) == sorted(parts[0][number].keys + parts[1][number].keys)


def write_sources(folder):
    """Three tables or tars of different kinds: colours as a folder, a CSV and a tar."""
    write_colours(folder / "a")
    (folder / "b").mkdir()
    lines = ["image,caption"]
    for n in range(6):
        (folder / "b" / f"b{n}.png").write_bytes(png(n))
        lines.append(f"b{n}.png,picture {n}")
    (folder / "b" / "b.csv").write_text("\n".join(lines))
    members = [(f"{n}.{end}", data) for n in range(4) for end, data in tar_item(n)]
    write_tar(folder / "c.tar", members)
    return [folder / "a", folder / "b" / "b.csv", folder / "c.tar"]


def tar_item(number):
    return [("png", png(50 + number)), ("txt", f"picture {number}".encode())]


def test_data_of_different_kinds_open_as_one(tmp_path):
    folder, table, tar = write_sources(tmp_path)
    both = open_source([folder, table])
    assert (both.kind, len(both.table), both.root) == ("mixture", 18, None)
    assert [part.name for part in both.parts] == ["a", "b.csv"]
    rows = [*open_source(folder).rows, *open_source(table).rows]
    assert list(both.rows) == rows
    assert list(both.rows.texts()) == [row for part in both.parts for row in part.rows.texts()]
    with_tar = open_source(f"{table}::{tar}")
    assert isinstance(with_tar.rows, Mixture)
    assert list(with_tar.rows) == [*open_source(table).rows, *open_source(tar).rows]
    assert open_source(with_tar.spec).fingerprint == with_tar.fingerprint
    # Several of one kind are one source, as ever.
    assert open_source([table, table]).kind == "csv"


def test_keys_are_prefixed_only_if_they_clash(tmp_path):
    one, other = numbered(0, 3, False), numbered(2, 3, False)
    assert mix([one, numbered(3, 3, False)]).table.keys == [f"{n:03}.png" for n in range(6)]
    named = [f"from-0/00{n}.png" for n in range(3)]
    assert mix([one, other]).table.keys == [*named, *(f"from-2/00{n}.png" for n in (2, 3, 4))]
    # The keys of a stream are not known before it is read.
    keys = [row.key for row in mix([one, numbered(3, 1, True)]).rows]
    assert keys == [*named, "from-3/003.png"]
    assert [part.name for part in mix([one, one, one]).parts] == ["from-0", "from-0-2", "from-0-3"]
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        write_tar(tmp_path / place / "0.tar", [(f"a.{end}", data) for end, data in tar_item(1)])
    tars = [open_source(tmp_path / place / "0.tar") for place in ("x", "y")]
    assert [row.key for row in mix(tars).rows] == ["0.tar/0.tar/a.png", "0.tar-2/0.tar/a.png"]
    assert next(row.key for row in mix([tars[0], one]).rows) == "0.tar/a.png"


def test_the_fingerprint_covers_parts_and_weights():
    one, other = numbered(0, 3, False), numbered(3, 3, False)
    mixtures = [mix([one, other], weights) for weights in ((), (1, 2), (2, 1))]
    mixtures += [mix([other, one]), mix([one])]
    assert len({mixture.fingerprint for mixture in mixtures}) == 5
    assert mix([one, other], (1, 1)).fingerprint == mix([one, other]).fingerprint


def test_each_part_is_split(monkeypatch):
    mixture = two((False, True), (1, 3), sizes=(40, 40))
    training, held_out = split_held_out(mixture, 0.25, seed=0)
    keys = [[row.key for row in part.rows] for part in (training, held_out)]
    assert sorted(keys[0] + keys[1]) == sorted(row.key for row in mixture.rows)
    assert [part.weight for part in training.parts] == [1, 3]
    assert [part.weight for part in held_out.parts] == [1, 1]
    assert sum("from-0/" in key for key in keys[1]) == 10
    assert len(split_held_out(two((False, False)), 0.5, 0, most=20)[1].table) == 20


def test_what_is_left_out_of_any_part_is_listed(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.png", png(1)), ("x.txt", b"x"), ("lost.txt", b"y")])
    mixture = mix([open_source(tmp_path / "a.tar"), numbered(0, 3, False)])
    assert len(list(mixture.rows)) == 4
    assert [item.key for item in mixture.skipped] == ["a.tar/lost"]
    assert mixture.skipped[0].key == "a.tar/lost"


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3)])
def test_a_weight_is_needed_for_each(weights):
    message = rf"there are {len(weights)} weights for 2 sources \(from-0, from-200\)"
    with pytest.raises(ConfigError, match=message):
        two((False, False), weights)


def test_configurations_name_several(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data]\ntrain = ["a.tar", "b.csv"]\nweights = [1, 2]\n')
    config = load_config(file).data
    assert (config.train, config.weights) == (("a.tar", "b.csv"), (1, 2))
    assert load_config(file, ['data.train=["x", "y"]']).data.train == ("x", "y")
    assert load_config(file, ["data.train=x::y"]).data.train == "x::y"
    with pytest.raises(ConfigError, match=r"data\.weights is .*greater than 0"):
        parse_config({"data": {"weights": [1, 0]}})
    with pytest.raises(ConfigError, match=r"data\.train is 3"):
        parse_config({"data": {"train": 3}})


def test_a_training_run_counts_its_sources(tmp_path):
    paths = write_sources(tmp_path)
    data = {"train": [*map(str, paths)], "weights": [1, 2, 1], "val_fraction": 0.0}
    config = configured("", data=data, train={"steps": 8, "batch_size": 4})
    result = train(config, tmp_path / "run")
    assert sum(result.drawn.values()) == 32
    assert all(count > 2 for count in result.drawn.values())
    assert list(result.drawn) == ["a", "b.csv", "c.tar"]
    lines = [line for line in read_log(result.run) if "loss" in line]
    assert [sum(line["drawn"].values()) for line in lines] == list(range(4, 33, 4))
    assert lines[-1]["drawn"] == result.drawn
    text = (result.run / "report.html").read_text()
    assert f"{result.drawn['b.csv']} of b.csv (weight 2)" in text
    # In Python, and in open_clip's spelling.
    plain = replace(config, data=replace(config.data, train=""))
    listed = train(plain, tmp_path / "listed", data=paths)
    spelled = train(plain, tmp_path / "spelled", data="::".join(map(str, paths)))
    assert listed.drawn == spelled.drawn == result.drawn


def test_tables_alone_have_epochs(tmp_path):
    folder, table, _ = write_sources(tmp_path)
    data = {"train": [str(folder), str(table)], "weights": [1, 2], "val_fraction": 0.0}
    result = train(configured("", data=data, train={"epochs": 2}), tmp_path / "run")
    assert result.step == 16  # of three pairs: twice 12 and 2 × 6
    assert result.drawn == {"a": 24, "b.csv": 24}
    config = parse_config({"data": data | {"balance": "label"}})
    source, _ = open_training_data(config.data, 0)
    from clipkit.data.sampler import class_numbers

    with pytest.raises(ConfigError, match=r"data\.balance and data\.weights"):
        class_numbers(source)


def test_streams_of_like_length_come_once_and_resume(monkeypatch, capsys):
    monkeypatch.setattr("clipkit.data.streaming._SORTED_ROWS", 40)
    for setting, value in {"PART": 7, "WAITS": 4, "LANES": 3}.items():
        monkeypatch.setattr(f"clipkit.data.streaming.{setting}", value)
    draw = np.random.default_rng(0)
    rows = [row(n, captions=[f"{n} " + "x" * int(draw.integers(100))]) for n in range(203)]
    pairs = source(rows, streaming=True)
    lengths = {row["key"]: len(row["captions"][0]) for row in rows}

    def made(count_tokens=lambda texts: np.array([len(text) for text in texts])):
        return loader(pairs, batch_size=8, count_tokens=count_tokens)

    reader, found, states = made(), [], []
    for batch in reader.batches(1):
        found.append(batch)
        states.append(copy.deepcopy(reader.state()))
    drawn = counted(found)
    assert len(found) == 25
    assert set(drawn.values()) == {1}
    assert len(drawn) == 200

    def spread(some):
        return np.mean([np.ptp([lengths[key] for key in batch.keys]) for batch in some])

    assert spread(found) < 0.4 * spread(list(made(None).batches(1)))
    for start in range(1, 25):
        again = made()
        again.restore(json.loads(json.dumps(states[start - 1])))
        assert same(list(again.batches(1, start)), found[start:])
    assert "read again" not in capsys.readouterr().err
    assert same(list(made().batches(1, 13)), found[13:])
    # The batches of a group are in random order, which differs between epochs.
    means = [np.mean([lengths[key] for key in batch.keys]) for batch in found[:5]]
    assert means != sorted(means)

"""Plans of an epoch: permutations, equal shares of labels, batches of like length, held out."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.config import parse_config
from clipkit.data.open_source import open_source
from clipkit.data.sampler import CaptionLengths, Sampler, class_numbers, split_held_out
from clipkit.errors import ConfigError, DataError
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.tasks.train import train
from clipkit.training.data import count_tokens, pair_loader
from clipkit.training.distributed import World
from clipkit.training.loss import info_nce
from clipkit.training.run_directory import read_log
from tests.helpers.colours import COLOURS
from tests.helpers.pairs import loader, row, source
from tests.helpers.runs import configured


def sampler(rows=1000, batch_size=10, seed=3, classes=None, lengths=None):
    return Sampler(rows, batch_size, seed, classes, lengths)


def one_caption(tokens):
    """Lengths of a table with one caption a row."""
    count = np.ones(len(tokens), np.int64)
    return CaptionLengths(np.array(tokens), np.arange(len(tokens)), count, 0 * count)


def rows_of(plan):
    return np.concatenate(plan)[:, 0]


LENGTHS = one_caption(np.random.default_rng(0).integers(4, 78, 1000))
CLASSES = np.repeat(np.arange(4), [700, 250, 47, 3])
EVERY_KIND = [{}, {"lengths": LENGTHS}, {"classes": CLASSES}]
EVERY_KIND.append({"lengths": LENGTHS, "classes": CLASSES})


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_plan_depends_on_seed_and_epoch_alone(kind):
    first = sampler(**kind).plan(5)
    again = sampler(**kind)
    again.plan(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again.plan(5), strict=True))
    for other in (sampler(**kind).plan(6), sampler(seed=4, **kind).plan(5)):
        assert not np.array_equal(rows_of(first), rows_of(other))
    assert [batch.shape for batch in first] == [(10, 2)] * 100


@pytest.mark.parametrize("kind", EVERY_KIND[:2])
def test_every_row_once_an_epoch(kind):
    for epoch in range(3):
        plan = np.concatenate(sampler(**kind).plan(epoch))
        assert sorted(plan[:, 0]) == list(range(1000))
        assert set(plan[:, 1]) == {epoch}


def test_what_fills_no_batch_is_dropped_by_chance():
    dropped = set()
    for epoch in range(60):
        plan = sampler(batch_size=300, lengths=LENGTHS).plan(epoch)
        assert [len(batch) for batch in plan] == [300] * 3
        dropped |= set(range(1000)) - set(rows_of(plan))
    assert len(dropped) > 900
    assert [len(batch) for batch in sampler(rows=7).plan(0)] == [7]


def test_batches_of_like_length():
    plan = sampler(lengths=LENGTHS).plan(0)
    widest = [np.ptp(LENGTHS.tokens[batch[:, 0]]) for batch in plan]
    plain = [np.ptp(LENGTHS.tokens[batch[:, 0]]) for batch in sampler().plan(0)]
    assert np.mean(widest) < 0.1 * np.mean(plain)
    # Short and long batches come in no order, and rows meet others each epoch.
    means = [LENGTHS.tokens[batch[:, 0]].mean() for batch in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4
    beside = [
        {frozenset(pair) for b in sampler(lengths=LENGTHS).plan(e) for pair in both(b[:, 0])}
        for e in (0, 1)
    ]
    assert len(beside[0] & beside[1]) < 0.25 * len(beside[0])


def both(rows):
    return itertools.combinations(rows.tolist(), 2)


def test_the_length_is_that_of_the_caption_read():
    captions = [[f"{n}", f"{n} again"] if n % 3 else [f"{n} again", f"{n}", " "] for n in range(40)]
    captions[7] = []
    pairs = source([row(n, captions=c) for n, c in enumerate(captions)])
    reader = loader(pairs, count_tokens=count_tokens, skip_limit=0.5, workers=0)
    lengths = reader._sampler.lengths
    for epoch in range(4):
        batches = reader._sampler.plan(epoch)
        of_row = {
            pairs.rows[int(draw[0])].key: length
            for batch in batches
            for draw, length in zip(batch, lengths.drawn(batch), strict=True)
        }
        assert of_row.pop("007.png", 0) == 0
        for batch in reader.batches(epoch):
            for key, tokens in zip(batch.keys, batch.tokens.tolist(), strict=True):
                text = f"{tokens[0]} again" if tokens[1] else f"{tokens[0]}"
                ids = tokenize(text, report=TruncationReport())[0]
                assert of_row[key] == np.count_nonzero(ids)


def test_every_label_is_drawn_equally_often():
    for epoch in range(3):
        rows = rows_of(sampler(classes=CLASSES).plan(epoch))
        assert np.bincount(CLASSES[rows]).tolist() == [250] * 4
        counts = np.bincount(rows, minlength=1000)
        # 250 of 700: none twice, but where an epoch ends one round through them and starts another
        assert counts[:700].max() == (2 if epoch == 2 else 1)
        assert set(counts[700:950]) == {1}
        assert set(counts[950:997]) <= {4, 5, 6, 7}
        assert set(counts[997:]) <= {82, 83, 84, 85}


def test_common_rows_all_have_their_turn():
    seen = np.zeros(1000, int)
    for epoch in range(14):
        seen += np.bincount(rows_of(sampler(classes=CLASSES).plan(epoch)), minlength=1000)
    assert seen[:700].tolist() == [5] * 700  # 14 times 250 is 5 times 700
    # How often each was drawn before tells every draw of a row from the others.
    draws = [tuple(d) for e in range(14) for b in sampler(classes=CLASSES).plan(e) for d in b]
    assert len(set(draws)) == len(draws)


def test_labels_that_cannot_share_equally_take_turns():
    classes = np.array([0] * 5 + [1] * 3 + [2] * 2)
    totals = np.zeros(3, int)
    for epoch in range(300):
        rows = rows_of(sampler(rows=10, batch_size=5, classes=classes).plan(epoch))
        counts = np.bincount(classes[rows], minlength=3)
        assert sorted(counts) == [3, 3, 4]
        totals += counts
    assert np.abs(totals - 1000).max() < 40
    many = np.arange(10)  # more labels than an epoch of 4 rows has draws for, each
    assert len(rows_of(sampler(rows=10, batch_size=4, classes=many).plan(0))) == 8


def labelled(labels):
    rows = [row(n) | {"label": label} for n, label in enumerate(labels)]
    return source(rows)


def test_a_balanced_loader_shows_other_crops_and_captions_of_a_row_drawn_again():
    pairs = labelled(["common"] * 30 + ["rare"] * 2)
    reader = loader(pairs, classes=class_numbers(pairs), workers=0)
    seen = [
        (key, int(batch.images[i, 1, 0, 0]), int(batch.tokens[i, 1]))
        for batch in reader.batches(0)
        for i, key in enumerate(batch.keys)
    ]
    rare = [item for item in seen if item[0] in ("030.png", "031.png")]
    assert len(rare) == 16
    assert len({noise for _, noise, _ in rare}) > 12
    for key in ("030.png", "031.png"):
        assert sum(second for k, _, second in rare if k == key) == 4


@pytest.mark.parametrize("start", [1, 3])
def test_a_planned_epoch_goes_on_in_its_middle(start):
    pairs = labelled(["common"] * 30 + ["rare"] * 10)
    classes = {"classes": class_numbers(pairs)}
    lengths = {"count_tokens": lambda texts: np.array([sum(map(ord, text)) for text in texts])}
    for kind in (classes, lengths, classes | lengths):
        whole = [batch.keys for batch in loader(pairs, **kind).batches(2)]
        assert [b.keys for b in loader(pairs, **kind).batches(2, start)] == whole[start:]


def test_weights_of_labels():
    pairs = labelled(["dog", "cat", None, "bird"] * 4)
    [one, two] = loader(pairs, weights={"dog": 2.0, "bird": 0.5}).batches(0)
    assert one.weights.dtype == torch.float32
    for batch in (one, two):
        wanted = [[2.0, 1.0, 1.0, 0.5][int(key[:3]) % 4] for key in batch.keys]
        assert batch.weights.tolist() == wanted
    assert next(loader(pairs).batches(0)).weights is None


def test_what_labels_cannot_do():
    settings = {"data": {"balance": "label"}}

    def made(pairs, settings):
        return pair_loader(parse_config(settings), pairs, (8, 8), TruncationReport(), World())

    with pytest.raises(DataError, match=r"2 of 3 rows of toy have no label \(for example 001.png"):
        made(labelled(["dog", None, ""]), settings)
    stream = source([row(0)], streaming=True)
    with pytest.raises(ConfigError, match="toy streams"):
        made(stream, settings)
    weights = {"data": {"caption_weights": {"dgo": 2.0}}}
    with pytest.raises(DataError, match=r"'dgo', .*did you mean 'dog'"):
        made(labelled(["dog", None]), weights)
    with pytest.raises(DataError, match="its labels are: none"):
        made(labelled([None]), weights)
    assert made(stream, weights).weights == {"dgo": 2.0}
    with pytest.raises(ConfigError, match="greater than 0"):
        parse_config({"data": {"caption_weights": {"dog": 0.0}}})


@pytest.fixture
def albums(tmp_path):
    """Nine pictures in a table: six red, two green, one blue."""
    lines = ["image,caption,label"]
    for number, name in enumerate(["red"] * 6 + ["green"] * 2 + ["blue"]):
        Image.new("RGB", (40, 30), COLOURS[name]).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,picture {number} is {name},{name}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return tmp_path / "pairs.csv"


def test_runs_go_by_the_settings(albums, tmp_path):
    """First loss of each run: that of its own batch, by value."""
    settings = {
        "plain": {},
        "weighted": {"caption_weights": {"blue": 9.0, "green": 3.0}},
        "balanced": {"balance": "label"},
    }
    first = {}
    for name, data in settings.items():
        data = data | {"val_fraction": 0.0}
        config = configured(albums, data=data, train={"batch_size": 9, "epochs": 1})
        result = train(config, tmp_path / name)
        first[name] = next(line["loss"] for line in read_log(result.run) if "loss" in line)
    assert len(set(first.values())) == 3


def test_the_learner_hands_weights_to_the_loss(albums, monkeypatch, tmp_path):
    given = []

    def spy(*args, **settings):
        given.append(settings["weights"])
        return info_nce(*args, **settings)

    monkeypatch.setattr("clipkit.training.step.info_nce", spy)
    for duplicates in ("mask", "ignore"):
        data = {"caption_weights": {"blue": 9.0}, "val_fraction": 0.0}
        loop = {"batch_size": 9, "epochs": 1, "duplicates": duplicates}
        train(configured(albums, data=data, train=loop), tmp_path / duplicates)
    assert [sorted(weights.tolist()) for weights in given] == [[1.0] * 8 + [9.0]] * 2


def test_a_run_of_like_length_can_be_balanced(albums, tmp_path):
    data = {"balance": "label", "val_fraction": 0.0}
    config = configured(albums, data=data, train={"bucket_by_length": True, "epochs": 2})
    assert train(config, tmp_path / "run").step == 6


def keys(source):
    return [row.key for row in source.rows]


def test_a_table_and_a_stream_are_split_without_loss(colour_folder):
    for streaming in (False, True):
        source = open_source(colour_folder, streaming=streaming)
        training, held_out = split_held_out(source, 0.4, seed=0)
        assert sorted(keys(training) + keys(held_out)) == sorted(keys(source))
        assert 0 < len(keys(held_out)) < 10
        again = split_held_out(source, 0.4, seed=0)[1]
        assert keys(again) == keys(held_out)
        assert keys(split_held_out(source, 0.4, seed=1)[1]) != keys(held_out)


def test_the_share_counts_and_nothing_may_be_held_out(colour_folder):
    source = open_source(colour_folder)
    training, held_out = split_held_out(source, 0.25, seed=0)
    assert (len(training.rows), len(held_out.rows)) == (9, 3)
    assert split_held_out(source, 0.0, seed=0) == (source, None)
    assert split_held_out(source, 0.001, seed=0) == (source, None)
    stream = open_source(colour_folder, streaming=True)
    assert split_held_out(stream, 1e-9, seed=0) == (stream, None)

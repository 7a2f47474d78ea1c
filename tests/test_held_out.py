from clipkit.data.open_source import open_source
from clipkit.data.sampler import split_held_out


def keys(source):
    return [row["key"] for row in source.rows]


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

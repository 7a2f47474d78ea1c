"""Data in memory: images, pairs, data frames, Arrow tables and datasets."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

import clipkit
from clipkit.data.open_source import open_source
from clipkit.errors import DataError


def image(value):
    return Image.new("RGB", (6, 4), (value, 10, 20))


def colours(source):
    return [row.image.read().getpixel((0, 0))[0] for row in source.rows]


@pytest.mark.parametrize(
    "form",
    [
        lambda one: one,
        np.asarray,
        lambda one: torch.from_numpy(np.array(one)).permute(2, 0, 1),
        lambda one: torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255,
    ],
    ids=["PIL", "array", "tensor", "float tensor"],
)
def test_images_need_no_captions(form):
    one, several = open_source(form(image(7))), open_source([form(image(n)) for n in (1, 2, 3)])
    assert colours(one) == [7]
    assert colours(several) == [1, 2, 3]
    assert [row.captions for row in several.rows] == [[], [], []]
    assert [row.key for row in several.rows] == ["00000000", "00000001", "00000002"]


def test_a_batch_of_images_is_several():
    batch = np.stack([np.asarray(image(n)) for n in (1, 2)])
    assert colours(open_source(batch)) == [1, 2]
    assert colours(open_source(torch.from_numpy(batch).permute(0, 3, 1, 2))) == [1, 2]


def test_pairs_and_images_may_be_mixed_but_nothing_else():
    source = open_source([(image(1), "one"), image(2), (image(3), ["three", "drei"])])
    assert [row.captions for row in source.rows] == [["one"], [], ["three", "drei"]]
    with pytest.raises(TypeError, match="item 1 is a str, expected an .image, caption. pair"):
        open_source((image(1), "one"))
    with pytest.raises(TypeError, match="item 0 is a int"):
        open_source([3])
    with pytest.raises(TypeError, match="data is a dict"):
        open_source({"image": [image(1)]})


def test_a_data_frame_is_a_table(tmp_path):
    for n in (1, 2):
        image(n).save(tmp_path / f"{n}.png")
    paths = [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    frame = pd.DataFrame({"image": paths, "caption": ["one", "two"], "year": [1999, 2001]})
    frame.index = [7, 9]
    source = open_source(frame, metadata=True)
    assert colours(source) == [1, 2]
    assert [row.captions for row in source.rows] == [["one"], ["two"]]
    assert [row.metadata for row in source.rows] == [{"year": 1999}, {"year": 2001}]
    with pytest.raises(DataError, match="no column 'words' among: image, caption, year"):
        open_source(frame, caption="words")
    by_number = open_source(pd.Series(paths, index=[4, 2]))
    assert colours(by_number) == [1, 2]


def test_a_data_frame_holds_images_and_lists_of_captions():
    frame = pd.DataFrame(
        {
            "img": [image(1), np.asarray(image(2))],
            "captions": [["one", "eins"], ["two"]],
            "label": ["odd", "even"],
        }
    )
    source = open_source(frame)
    assert colours(source) == [1, 2]
    assert [row.captions for row in source.rows] == [["one", "eins"], ["two"]]
    assert [row.label for row in source.rows] == ["odd", "even"]
    frame["img"] = [image(1), 3]
    with pytest.raises(TypeError, match="image 1 is a int"):
        open_source(frame)


def test_arrow_tables_and_datasets_are_tables(tmp_path):
    image(5).save(tmp_path / "5.png")
    columns = {"file_name": [str(tmp_path / "5.png")], "text": ["five"]}
    for data in (pa.table(columns), Dataset.from_dict(columns)):
        source = open_source(data)
        assert colours(source) == [5]
        assert [row.captions for row in source.rows] == [["five"]]
    with pytest.raises(DataError, match="has the splits train, test, expected one of them"):
        open_source(DatasetDict({n: Dataset.from_dict(columns) for n in ("train", "test")}))


def test_every_task_takes_images_in_memory(tiny_checkpoint, tmp_path):
    encoder = clipkit.load_model(tiny_checkpoint)
    images = [image(n) for n in (10, 120, 240)]
    found = clipkit.classify(images, ["a", "b"], encoder, progress=False)
    alone = clipkit.classify(images[1], ["a", "b"], encoder, progress=False)
    assert len(found) == 3
    assert alone[0].top[0].score == pytest.approx(found[1].top[0].score, abs=1e-6)
    store = clipkit.embed(images, tmp_path / "store", encoder)
    index = clipkit.build_index(store, tmp_path / "index").with_encoder(encoder)
    assert index.search(images[2], 1)[0].key == "00000002"
    frame = pd.DataFrame({"image": images, "caption": ["one", "two", "three"]})
    report = clipkit.evaluate_retrieval(frame, encoder, progress=False)
    assert report.counts["captions"] == 3
    assert clipkit.check_data(frame).captions == 3

"""What must not pass without a word: wrong types and values out of range, in public functions."""

import numpy as np
import pandas as pd
import pytest
import torch

import clipkit
from clipkit import arguments
from clipkit.errors import ArgumentError, ImageError
from tests.helpers.toys import unit_rows


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_an_integer_is_an_integer(value):
    with pytest.raises(TypeError, match="k is .* expected an integer from 1"):
        arguments.require_integer("k", value)
    assert arguments.require_integer("k", np.int64(3)) == 3


def test_choices_and_numbers_are_named():
    with pytest.raises(ArgumentError, match="ties is 'both', expected 'against' or 'average'"):
        arguments.require_choice("ties", "both", ("against", "average"))
    for value in (0, -1.5, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="expected a finite number above 0"):
            arguments.require_number("weight", value)
    with pytest.raises(TypeError, match="weight is '1'"):
        arguments.require_number("weight", "1")
    assert isinstance(ArgumentError("x"), ValueError)


@pytest.mark.parametrize("value", ["cat", b"cat", {"cat": 1}, {"cat"}, None, 3])
def test_a_list_is_a_list(value):
    with pytest.raises(TypeError, match=r"labels is .*expected a list such as"):
        arguments.require_items("labels", value, "['dog', 'cat']")


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), np.array(["a", "b"])])
def test_what_has_an_order_is_a_list(value):
    assert arguments.require_items("labels", value, "['a', 'b']") == ["a", "b"]
    assert arguments.require_items("labels", iter(value), "['a', 'b']") == ["a", "b"]
    assert arguments.require_items("labels", pd.Series(value), "['a', 'b']") == ["a", "b"]


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


def test_batches_of_nothing_are_refused(encoder, colour_folder):
    image = np.zeros((32, 32, 3), np.uint8)
    for size in (0, -1):
        with pytest.raises(ArgumentError, match=f"batch_size is {size}, expected at least 1"):
            encoder.encode_images([image], batch_size=size)
        with pytest.raises(ArgumentError, match=f"batch_size is {size}"):
            clipkit.classify(colour_folder, ["a", "b"], encoder, batch_size=size, progress=False)
    with pytest.raises(ArgumentError, match="workers is -1, expected at least 0"):
        clipkit.classify(colour_folder, ["a", "b"], encoder, workers=-1, progress=False)


def test_floats_that_are_not_normalised_are_refused(encoder):
    pixels = torch.rand(3, *encoder.preprocess.size)
    with pytest.raises(ImageError, match="expected the normalised values"):
        encoder.encode_images(pixels * 255)
    with pytest.raises(ImageError, match="expected the normalised values"):
        encoder.encode_images(torch.stack([pixels, pixels * 255]))
    with pytest.raises(ImageError, match="NaN"):
        encoder.encode_images(pixels * float("nan"))
    with pytest.warns(UserWarning, match="from 0 to 1 only"):
        encoder.encode_images(pixels)
    encoder.encode_images(4 * pixels - 2)  # a warning would be an error


def test_the_name_of_a_model_is_not_an_encoder(tiny_checkpoint, colour_folder, tmp_path):
    name = str(tiny_checkpoint)
    for call in (
        lambda: clipkit.embed(colour_folder, tmp_path / "store", name),
        lambda: clipkit.classify(colour_folder, ["a", "b"], name),
        lambda: clipkit.evaluate_retrieval(colour_folder, name),
        lambda: clipkit.evaluate_zero_shot(colour_folder, name, ["a", "b"]),
        lambda: clipkit.probe(colour_folder, name),
        lambda: clipkit.evaluate_suite("suite.toml", tmp_path / "out", name),
    ):
        with pytest.raises(TypeError, match=r"expected an Encoder; clipkit.load_model\("):
            call()


def test_choices_of_an_evaluation_are_checked(encoder, colour_folder):
    for wrong in ({"equal_captions": "joined"}, {"ties": "ignore"}):
        with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} is .*, expected"):
            clipkit.evaluate_retrieval(colour_folder, encoder, **wrong)


def test_vectors_and_metadata_of_a_wrong_type_are_refused():
    vectors, keys = unit_rows(4, 8), ["a", "b", "c", "d"]
    build = clipkit.VectorIndex.from_vectors
    for wrong in (vectors.astype(complex), np.array([["1", "2"]] * 4)):
        with pytest.raises(TypeError, match="expected real numbers"):
            build(wrong, keys)
    with pytest.raises(TypeError, match="'year' is one string"):
        build(vectors, keys, metadata={"year": "abcd"})
    with pytest.raises(TypeError, match="model is a str, expected a ModelRef"):
        build(vectors, keys, model="ViT-B-32")


def test_a_search_takes_what_a_notebook_has():
    vectors, keys = unit_rows(4, 8), ["a", "b", "c", "d"]
    index = clipkit.VectorIndex.from_vectors(vectors, keys)
    assert index.search(torch.from_numpy(vectors[2]), 1)[0].key == "c"
    several = index.search(torch.from_numpy(vectors), 1)
    assert [hits[0].key for hits in several] == keys
    assert [hits[0].key for hits in index.search((v for v in vectors), 1)] == keys
    for wrong in ({"k": 1.5}, {"k": True}, {"where": ["year > 3"]}, {"minus_weight": "1"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} is "):
            index.search(vectors[0], **wrong)
    with pytest.raises(ArgumentError, match="k is 0"):
        index.search(vectors[0], 0)


def test_the_path_of_an_image_as_text_is_pointed_out(encoder, colour_folder, tmp_path, capsys):
    index = clipkit.build_index(colour_folder, tmp_path / "index", encoder)
    index = index.with_encoder(encoder)
    image = next(colour_folder.glob("*.png"))
    index.search(str(image), 1)
    assert "is searched for as text" in capsys.readouterr().err
    index.search(image, 1)
    assert "is searched for as text" not in capsys.readouterr().err
    with pytest.raises(TypeError, match="an image to search for is a list"):
        index.search("red", image=[image])


def test_collections_of_paths_are_not_one_path(tmp_path):
    with pytest.raises(TypeError, match="paths is one string"):
        clipkit.merge_indexes(str(tmp_path), tmp_path / "out")
    with pytest.raises(TypeError, match="names is None"):
        clipkit.remove_items(tmp_path, None)

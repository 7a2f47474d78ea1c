import numpy as np
import pytest

from clipkit.metrics import accuracy, retrieval_ranks, retrieval_recall


def unit(rows):
    array = np.asarray(rows, np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_recall_on_a_matrix_written_by_hand():
    # Scores of captions (rows) against images (columns) are read off directly: images are axes.
    images = np.eye(3, dtype=np.float32)
    captions = np.array(
        [[0.9, 0.1, 0.0], [0.2, 0.8, 0.3], [0.7, 0.1, 0.6], [0.1, 0.5, 0.4]], np.float32
    )
    owners = np.array([0, 1, 2, 2])
    found = retrieval_recall(images, captions, owners, ks=(1, 2, 3))
    # Captions: 0 -> rank 0, 1 -> rank 0, 2 -> rank 1, 3 -> rank 1.
    assert [found[f"text_to_image_r{k}"] for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    # Images: 0 best is caption 0; 1 best is caption 1; 2: captions 2 (.6) and 3 (.4) lead.
    assert [found[f"image_to_text_r{k}"] for k in (1, 2)] == [1.0, 1.0]


def test_an_image_counts_once_whichever_of_its_captions_is_found():
    images = unit([[1, 0], [0, 1]])
    captions = unit([[1, 0.1], [-1, 0.2], [0.9, 1]])
    found = retrieval_recall(images, captions, np.array([0, 0, 1]), ks=(1,))
    assert found["image_to_text_r1"] == 1.0
    assert found["text_to_image_r1"] == pytest.approx(2 / 3)


def test_equal_vectors_are_no_success():
    same = np.tile(unit([[1, 2]]), (10, 1))
    found = retrieval_recall(same, same, np.arange(10), ks=(1, 5, 10))
    assert found["text_to_image_r1"] == found["text_to_image_r5"] == 0.0
    assert found["text_to_image_r10"] == 1.0


def test_ranks_equal_the_definition_whatever_the_block():
    generator = np.random.default_rng(0)
    queries, gallery = unit(generator.normal(size=(37, 8))), unit(generator.normal(size=(53, 8)))
    query_groups, gallery_groups = generator.integers(0, 9, 37), generator.integers(0, 9, 53)
    wanted = []
    for query, group in zip(queries, query_groups, strict=True):
        order = np.argsort(-(gallery @ query))
        hits = [rank for rank, j in enumerate(order) if gallery_groups[j] == group]
        wanted.append(hits[0] if hits else len(gallery))
    for block in (1, 7, 1000):
        found = retrieval_ranks(queries, gallery, query_groups, gallery_groups, block)
        np.testing.assert_array_equal(found, wanted)


def test_accuracy_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1]], np.float32)
    found = accuracy(probabilities, np.array([0, 1, 1]), ks=(1, 2, 5))
    assert found == {"top1": pytest.approx(1 / 3), "top2": 1.0, "mean_per_class": 0.5}

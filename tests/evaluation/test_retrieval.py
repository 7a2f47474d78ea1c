"""Ranks, recall and average precision against the definition, written out in full."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clipkit.errors import DataError
from clipkit.evaluation import retrieval as module
from clipkit.evaluation.retrieval import (
    count_ahead,
    rank_queries,
    relevant_pairs,
    retrieval_metrics,
    retrieval_recall,
)
from tests.helpers.toys import unit_rows


def unit(rows):
    array = np.asarray(rows, np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def some_pairs(images, captions, count, seed=0):
    """Distinct pairs: several captions an image, several images a caption, some without any."""
    chosen = np.random.default_rng(seed).choice(images * captions, count, replace=False)
    return chosen // captions, chosen % captions


def definition(queries, gallery, right):
    """Rank of the best right item and average precision of each query that has one.

    `right` is bool [queries, gallery]; equal scores count against the query.
    """
    ranks, precisions = [], []
    for scores, mine in zip(queries.astype(float) @ gallery.astype(float).T, right, strict=True):
        ahead = sorted(int((scores[~mine] >= score - 1e-9).sum()) for score in scores[mine])
        if ahead:
            ranks.append(ahead[0])
            precisions.append(np.mean([i / (i + wrong) for i, wrong in enumerate(ahead, 1)]))
    return np.array(ranks), np.array(precisions)


def ones(images):
    return np.ones((1, images))


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
    outcomes = rank_queries(images, captions, owners, np.arange(4))
    figures = retrieval_metrics(outcomes, ones(3))
    assert figures["text_to_image_median_rank"] == 1.5
    assert figures["text_to_image_map"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert figures["image_to_text_map"] == pytest.approx(1)
    assert "text_to_image_r5" not in figures  # there are but three images


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


def test_a_collapsed_model_scores_like_chance_if_ties_are_averaged():
    same = np.tile(unit([[1, 2]]), (10, 1))
    found = rank_queries(same, same, np.arange(10), np.arange(10), ties="average")
    figures = retrieval_metrics(found, ones(10))
    for direction in ("text_to_image", "image_to_text"):
        assert figures[f"{direction}_r1"] == pytest.approx(0.1)
        assert figures[f"{direction}_r5"] == pytest.approx(0.5)
        assert figures[f"{direction}_r10"] == pytest.approx(1.0)
        assert figures[f"{direction}_median_rank"] == pytest.approx(5.5)
        assert figures[f"{direction}_map"] == pytest.approx(sum(1 / n for n in range(1, 11)) / 10)


def test_averaged_ties_equal_the_mean_over_all_orders():
    """Captions with several images each, images of equal vectors: every order is tried."""
    images = unit([[1, 0], [1, 1], [1, 1], [1, 1], [0, 1], [0, 1]])
    captions = unit([[1, 0.9], [0.2, 1]])
    image_of, caption_of = np.array([1, 2, 4, 0, 3, 5]), np.array([0, 0, 0, 1, 1, 1])
    found = rank_queries(images, captions, image_of, caption_of, ties="average")["text_to_image"]
    for query in range(2):
        scores = np.round(images.astype(float) @ captions[query], 6)
        right = set(image_of[caption_of == query].tolist())
        first, precision = [], []
        for order in permutations(range(6)):
            if any(np.diff(scores[list(order)]) > 0):
                continue
            places = [place for place, image in enumerate(order, 1) if image in right]
            first.append(places[0])
            precision.append(np.mean([n / place for n, place in enumerate(places, 1)]))
        for k in range(1, 7):
            wanted = np.mean(np.array(first) <= k)
            assert found.hits(k)[query] == pytest.approx(wanted)
        assert found.mean_ranks[query] + 1 == pytest.approx(np.mean(first))
        assert found.average_precision[query] == pytest.approx(np.mean(precision))


def test_ties_make_no_difference_without_equal_scores():
    images, captions = unit_rows(50, 8), unit_rows(50, 8, seed=1)
    pairs = np.arange(50), np.arange(50)
    against = rank_queries(images, captions, *pairs)
    average = rank_queries(images, captions, *pairs, ties="average")
    for name in against:
        assert (against[name].ranks == average[name].ranks).all()
        assert (against[name].average_precision == average[name].average_precision).all()
        assert (average[name].mean_ranks == average[name].ranks).all()


def test_a_copy_of_the_right_image_is_ahead_of_it_wherever_it_stands():
    """Of two equal vectors one product may be larger by a rounding; that must not decide."""
    images = unit_rows(700, 64)
    images[500] = images[3]
    captions = unit(images + 0.05 * unit_rows(700, 64, seed=1))
    ranks = rank_queries(images, captions, np.arange(700), np.arange(700))["text_to_image"].ranks
    assert (ranks[3], ranks[500]) == (1, 1)
    assert (np.delete(ranks, [3, 500]) == 0).all()


@pytest.mark.parametrize("block", [(510, 8192), (1, 1), (7, 5), (64, 1000), (300, 31)])
@pytest.mark.parametrize("near", [1.0, 1e-4], ids=["apart", "nearly equal"])
@pytest.mark.parametrize("sparse", [1, 10**9], ids=["one by one", "all"])
def test_ranks_equal_the_definition_whatever_the_block(block, near, sparse, monkeypatch):
    # Nearly equal vectors give scores that float32 products cannot tell apart.
    monkeypatch.setattr(module, "_SPARSE", sparse)
    images = unit(unit_rows(1, 16) + near * unit_rows(37, 16, seed=1))
    captions = unit(unit_rows(1, 16) + near * unit_rows(53, 16, seed=2))
    captions[9] = captions[4]
    image_of, caption_of = some_pairs(37, 53, 90)
    right = np.zeros((37, 53), bool)
    right[image_of, caption_of] = True
    found = rank_queries(images, captions, image_of, caption_of, block)
    for name, queries, gallery, truth in (
        ("text_to_image", captions, images, right.T),
        ("image_to_text", images, captions, right),
    ):
        ranks, precision = definition(queries, gallery, truth)
        np.testing.assert_array_equal(found[name].ranks, ranks)
        np.testing.assert_allclose(found[name].average_precision, precision, atol=1e-12)
        np.testing.assert_array_equal(found[name].queries, np.flatnonzero(truth.any(axis=1)))


def test_images_with_good_captions_and_bad_ones_equal_the_definition():
    """Of the worst many scores are ahead, of the next ones few: both ways of counting meet."""
    images, owners = unit_rows(400, 24), np.repeat(np.arange(400), 3)
    captions = unit(images[owners] + 0.8 * unit_rows(1200, 24, seed=1))
    captions[::3] = unit_rows(400, 24, seed=2)
    ahead, of_images = count_ahead(images, captions, owners, np.arange(1200), block=(150, 700))
    scores = images.astype(float) @ captions.astype(float).T
    own = scores[owners, np.arange(1200)]
    wrong = np.arange(400)[:, None] != owners
    wanted = [((scores[i] >= own[j]) & wrong[i]).sum() for j, i in enumerate(owners)]
    assert np.median(wanted[::3]) > 1200 / 32 > np.median(wanted)
    assert ahead.ahead.tolist() == wanted
    assert of_images.ahead.tolist() == ((scores >= own) & wrong).sum(axis=0).tolist()


def test_more_rows_than_a_byte_can_count():
    images, captions = unit_rows(900, 8), unit_rows(3, 8, seed=1)
    ahead = count_ahead(images, captions, np.arange(3), np.arange(3))[1]
    scores = images.astype(float) @ captions.astype(float).T
    wanted = [int((scores[:, j] > scores[j, j]).sum()) for j in range(3)]
    assert max(wanted) > 255
    assert ahead.ahead.tolist() == wanted


def test_average_precision_equals_scikit_learns():
    images, captions = unit_rows(40, 12), unit_rows(60, 12, seed=1)
    image_of, caption_of = some_pairs(40, 60, 150)
    right = np.zeros((40, 60), bool)
    right[image_of, caption_of] = True
    found = rank_queries(images, captions, image_of, caption_of)
    wanted = [average_precision_score(r, images[i] @ captions.T) for i, r in enumerate(right)]
    np.testing.assert_allclose(found["image_to_text"].average_precision, wanted, atol=1e-6)


def test_weights_count_an_image_with_its_captions_so_often():
    images, captions = unit_rows(12, 6), unit_rows(30, 6, seed=1)
    owners = np.sort(np.random.default_rng(0).integers(0, 12, 30))
    weights = np.random.default_rng(1).integers(0, 4, 12)
    found = rank_queries(images, captions, owners, np.arange(30))
    figures = retrieval_metrics(found, weights[None].astype(float), ks=(1, 5))
    ranks = np.repeat(found["text_to_image"].ranks, weights[owners])
    assert figures["text_to_image_r5"] == pytest.approx((ranks < 5).mean())
    assert figures["text_to_image_median_rank"] == np.median(ranks + 1)
    queries = found["image_to_text"].queries
    assert len(queries) < 12  # an image without a caption is not a query
    ranks = np.repeat(found["image_to_text"].ranks, weights[queries])
    assert figures["image_to_text_r1"] == pytest.approx((ranks < 1).mean())
    assert figures["image_to_text_median_rank"] == np.median(ranks + 1)
    precision = np.repeat(found["image_to_text"].average_precision, weights[queries])
    assert figures["image_to_text_map"] == pytest.approx(precision.mean())


def test_a_caption_of_several_images_counts_as_often_as_they_do_on_average():
    images, captions = unit_rows(4, 6), unit_rows(3, 6, seed=1)
    image_of, caption_of = np.array([0, 1, 2, 3, 3]), np.array([0, 0, 0, 1, 2])
    found = rank_queries(images, captions, image_of, caption_of)
    hits = (found["text_to_image"].ranks < 1).astype(float)
    weights = np.array([3, 0, 1, 2.0])
    often = np.array([4 / 3, 2, 2])
    figures = retrieval_metrics(found, weights[None], ks=(1,))
    assert figures["text_to_image_r1"] == pytest.approx((hits * often).sum() / often.sum())


def test_broken_vectors_are_no_success():
    images, captions = unit_rows(4, 6), unit_rows(4, 6)
    captions[2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        retrieval_recall(images, captions, np.arange(4))


def test_memory_mapped_vectors_are_read_as_they_are(tmp_path):
    images, captions = unit_rows(50, 8), unit_rows(80, 8, seed=1)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    owners = np.arange(80) % 50
    assert retrieval_recall(mapped, captions, owners) == retrieval_recall(images, captions, owners)


def test_captions_that_differ_in_case_and_spaces_are_merged():
    texts = ["A dog", "a  dog", "a cat", "A CAT", "a dog"]
    owners = np.array([0, 0, 0, 1, 2])
    merged = relevant_pairs(texts, owners, "merge")
    assert merged.captions.tolist() == [0, 2]
    assert merged.distinct == 2
    pairs = list(zip(merged.image_of.tolist(), merged.caption_of.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 1), (2, 0)]
    apart = relevant_pairs(texts, owners, "apart")
    assert apart.captions.tolist() == apart.caption_of.tolist() == [0, 1, 2, 3, 4]
    assert apart.image_of.tolist() == owners.tolist()

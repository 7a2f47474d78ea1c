"""The tiled loss against its definition and against open_clip."""

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.training.loss import TiledLogits, caption_groups, chance_loss, info_nce, pair_groups
from tests.helpers.steps import pairs


def textbook(images, texts, scale, groups=None, weights=None, duplicates="mask"):
    """The definition of the loss, computed pair by pair."""
    n, total = len(images), 0.0
    groups = torch.arange(n) if groups is None else groups
    groups = groups.reshape(n, -1)
    weights = torch.ones(n) if weights is None else weights
    for i in range(n):
        same = [j for j in range(n) if (groups[i] == groups[j]).any()]
        for queries, items in ((images, texts), (texts, images)):
            targets = same if duplicates == "positive" else [i]
            counted = [j for j in range(n) if j in targets or j not in same]
            scores = torch.stack([scale * queries[i] @ items[j] for j in counted])
            found = F.log_softmax(scores, dim=0)
            own = -torch.stack([found[counted.index(j)] for j in targets]).mean()
            total = total + weights[i] * own / (2 * weights.sum())
    return total


def assert_equal(ours, theirs, found, wanted, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    (3 * ours).backward()
    (3 * theirs).backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=tolerance)


GROUPS = {
    "none": None,
    "captions": [0, 1, 0, 2, 3, 3, 3],
    "all": [5] * 7,
    "both": [[0, 0], [0, 1], [1, 1], [2, 2], [3, 3], [3, 3], [4, 0]],
    "images": [[4, 0], [4, 1], [1, 2], [2, 3], [4, 5], [3, 6], [6, 7]],
    "distinct": [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]],
}
WEIGHTS = [0.5, 3.0, 0.0, 1.0, 0.25, 7.0, 1.5]


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_equals_the_definition_with_all_gradients(groups, weights, duplicates, tile):
    wanted, found = pairs(7), pairs(7)
    choice = {
        "groups": None if GROUPS[groups] is None else torch.tensor(GROUPS[groups]),
        "weights": None if weights is None else torch.tensor(weights),
        "duplicates": duplicates,
    }
    ours = info_nce(*found, tile=tile, **choice)
    assert_equal(ours, textbook(*wanted, **choice), found, wanted, 1e-10)


@pytest.mark.parametrize("tile", [16, 1024])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_open_clips_loss(tile, scale):
    wanted = pairs(50, dtype=torch.float32, scale=scale)
    found = pairs(50, dtype=torch.float32, scale=scale)
    assert_equal(
        info_nce(*found, tile=tile), open_clip.loss.ClipLoss()(*wanted), found, wanted, 2e-5
    )


def far_apart(dtype):
    """Pairs whose matching logits range from −100 to 100."""
    images, texts, scale = pairs(40, dtype=dtype, scale=100.0)
    with torch.no_grad():
        texts[0] = images[0]
        texts[1:] = -images[1:2]
        images[2:] = images[1]
    return images, texts, scale


@pytest.mark.parametrize("tile", [8, 100])
def test_logits_too_far_apart_for_one_exponential_per_tile(tile, monkeypatch):
    calls = []
    original = TiledLogits._exact_normalisers
    monkeypatch.setattr(
        TiledLogits, "_exact_normalisers", lambda *a: calls.append(1) or original(*a)
    )
    wanted, found = far_apart(torch.float32), far_apart(torch.float32)
    ours = info_nce(*found, tile=tile)
    assert calls, "the logits are not far enough apart to test this"
    # The loss is near 100: one unit in the last place is 8e-6.
    assert_equal(ours, open_clip.loss.ClipLoss()(*wanted), found, wanted, 1e-4)


def test_the_matrix_of_all_pairs_is_never_materialised():
    found = pairs(64, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        info_nce(*found, tile=8).backward()
    assert largest == 64 * 16  # the vectors; the whole matrix has 64 × 64 logits


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_logits_far_apart_with_weights_and_duplicates(duplicates):
    choice = {
        "groups": torch.arange(40) % 17,
        "weights": torch.linspace(0, 2, 40),
        "duplicates": duplicates,
    }
    found = far_apart(torch.float32)
    wanted = [tensor.detach().double().requires_grad_() for tensor in found]
    ours, theirs = info_nce(*found, tile=8, **choice), textbook(*wanted, **choice)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-4)


def test_without_duplicates_all_settings_give_the_same_loss():
    images, texts, scale = pairs(9)
    groups = torch.arange(9)
    for duplicates in ("mask", "positive"):
        loss = info_nce(images, texts, scale, groups, duplicates=duplicates)
        assert loss == info_nce(images, texts, scale)


def test_captions_that_differ_in_case_space_or_final_punctuation_are_equal():
    same = ["a dog", "A  Dog", "a dog ", "a dog.", "a dog ...", "a&#32;dog !", "a dog?!"]
    others = ["a cat", "dog a", "a dog. a", ". a dog", "a", "", "a dog a dog", "2.5", "25"]
    groups = caption_groups(torch.from_numpy(tokenize(same + others))).tolist()
    assert len(set(groups[: len(same)])) == 1
    assert len(set(groups)) == 1 + len(others)
    long = ["very " * 80 + "long", "very " * 80 + "short"]  # equal up to token 77
    truncated = torch.from_numpy(tokenize(long, report=TruncationReport()))
    assert len(set(caption_groups(truncated).tolist())) == 1


def test_pairs_are_duplicates_by_image_or_by_caption():
    tokens = torch.from_numpy(tokenize(["a dog", "a cat", "a cat", "a fox"]))
    groups = pair_groups(["1", "1", "2", "\udc80"], tokens)
    same = (groups[:, None] == groups[None]).any(dim=2)
    assert same.tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", [name for name in GROUPS if GROUPS[name]])
def test_chance_loss_is_the_loss_of_constant_vectors(name, weights, duplicates):
    groups = torch.tensor(GROUPS[name])
    weights = torch.tensor(weights) if weights else None
    images, texts, scale = pairs(7)
    known = None if duplicates == "ignore" else groups
    wanted = textbook(0 * images, 0 * texts, scale, known, weights, duplicates)
    found = chance_loss(groups, weights=weights, duplicates=duplicates)
    assert found == pytest.approx(wanted.item(), abs=1e-7)


def test_duplicate_captions_as_positives_equal_duplicate_captions_as_negatives():
    """Duplicate captions have equal vectors, so their logits equal the pair's own."""
    groups = torch.tensor(GROUPS["captions"])
    found = []
    for duplicates in ("positive", "ignore", "mask"):
        images, texts, scale = pairs(7)
        captions = texts[:4].detach().requires_grad_()
        loss = info_nce(images, captions[groups], scale, groups, duplicates=duplicates)
        loss.backward()
        found.append((loss.detach(), images.grad, captions.grad, scale.grad))
    for one, other in zip(*found[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert (found[2][0] - found[1][0]).abs() > 0.01

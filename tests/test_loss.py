import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from clipkit.model import loss as module
from clipkit.model.loss import caption_groups, info_nce
from clipkit.model.tokenizer import tokenize


def pairs(n, dim=16, seed=0, dtype=torch.float64, scale=14.3):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, dim, generator=generator, dtype=dtype)
    return (
        F.normalize(images, dim=1).requires_grad_(),
        F.normalize(texts, dim=1).requires_grad_(),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
    )


def textbook(images, texts, scale, groups=None):
    """The definition, pair by pair."""
    n, total = len(images), 0.0
    for i in range(n):
        for queries, items in ((images, texts), (texts, images)):
            counted = [j for j in range(n) if j == i or groups is None or groups[j] != groups[i]]
            scores = torch.stack([scale * queries[i] @ items[j] for j in counted])
            total = total - F.log_softmax(scores, dim=0)[counted.index(i)] / (2 * n)
    return total


def assert_equal(ours, theirs, found, wanted, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    (3 * ours).backward()
    (3 * theirs).backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 3, 3, 3], [5] * 7])
def test_equals_the_definition_with_all_gradients(groups, tile):
    wanted, found = pairs(7), pairs(7)
    tensor = None if groups is None else torch.tensor(groups)
    ours = info_nce(*found, groups=tensor, tile=tile)
    assert_equal(ours, textbook(*wanted, groups=groups), found, wanted, 1e-10)


@pytest.mark.parametrize("tile", [16, 1024])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_open_clips_loss(tile, scale):
    wanted = pairs(50, dtype=torch.float32, scale=scale)
    found = pairs(50, dtype=torch.float32, scale=scale)
    assert_equal(
        info_nce(*found, tile=tile), open_clip.loss.ClipLoss()(*wanted), found, wanted, 2e-5
    )


def far_apart(dtype):
    """Pairs of which one finds its caption at a logit of 100 and another at −100."""
    images, texts, scale = pairs(40, dtype=dtype, scale=100.0)
    with torch.no_grad():
        texts[0] = images[0]
        texts[1:] = -images[1:2]
        images[2:] = images[1]
    return images, texts, scale


@pytest.mark.parametrize("tile", [8, 100])
def test_logits_too_far_apart_for_one_exponential(tile, monkeypatch):
    careful = []
    original = module._careful_normalisers
    monkeypatch.setattr(
        module, "_careful_normalisers", lambda *a: careful.append(1) or original(*a)
    )
    wanted, found = far_apart(torch.float32), far_apart(torch.float32)
    ours = info_nce(*found, tile=tile)
    assert careful, "the vectors are no case of what is tested"
    # The loss is near 100: one unit in the last place is 8e-6.
    assert_equal(ours, open_clip.loss.ClipLoss()(*wanted), found, wanted, 1e-4)


def test_no_logits_of_all_pairs_are_held():
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
    assert largest == 64 * 16  # the vectors themselves; all pairs would be 64 × 64


def test_distinct_captions_mask_nothing():
    images, texts, scale = pairs(9)
    assert info_nce(images, texts, scale, torch.arange(9)) == info_nce(images, texts, scale)


def test_equal_captions_get_equal_groups():
    tokens = torch.from_numpy(tokenize(["a dog", "A  Dog", "a cat", "a dog "]))
    groups = caption_groups(tokens).tolist()
    assert groups[0] == groups[1] == groups[3] != groups[2]

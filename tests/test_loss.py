import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from clipkit.model.loss import caption_groups, info_nce
from clipkit.model.tokenizer import tokenize


def pairs(n, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, dim, generator=generator, dtype=dtype)
    return (
        F.normalize(images, dim=1).requires_grad_(),
        F.normalize(texts, dim=1).requires_grad_(),
        torch.tensor(14.3, dtype=dtype, requires_grad=True),
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


@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 3, 3, 3]])
def test_equals_the_definition_with_all_gradients(groups):
    wanted, found = pairs(7), pairs(7)
    tensor = None if groups is None else torch.tensor(groups)
    textbook(*wanted, groups=groups).backward()
    info_nce(*found, groups=tensor).backward()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_equals_open_clips_loss():
    wanted, found = pairs(50, dtype=torch.float32), pairs(50, dtype=torch.float32)
    theirs = open_clip.loss.ClipLoss()(*wanted)
    ours = info_nce(*found)
    torch.testing.assert_close(ours, theirs)
    theirs.backward()
    ours.backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_distinct_captions_mask_nothing():
    images, texts, scale = pairs(9)
    assert info_nce(images, texts, scale, torch.arange(9)) == info_nce(images, texts, scale)


def test_equal_captions_get_equal_groups():
    tokens = torch.from_numpy(tokenize(["a dog", "A  Dog", "a cat", "a dog "]))
    groups = caption_groups(tokens).tolist()
    assert groups[0] == groups[1] == groups[3] != groups[2]

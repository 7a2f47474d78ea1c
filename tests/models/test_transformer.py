"""The transformers run our way against open_clip's own forward pass, by value."""

from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipkit.models import transformer
from clipkit.models.dual_encoder import DualEncoder, padded_length
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.models.transformer import Packing

TEXT = {"width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
TOWERS = {
    "plain": {},
    "uneven patches": {"vision_cfg": VISION | {"patch_size": 10, "image_size": [32, 45]}},
    "average pool": {"vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True}},
    "layer scale": {
        "vision_cfg": VISION | {"ls_init_value": 0.3, "no_ln_pre": True},
        "text_cfg": TEXT | {"ls_init_value": 0.3},
    },
    "QuickGELU": {"quick_gelu": True},
    "one layer": {"vision_cfg": VISION | {"layers": 1}, "text_cfg": TEXT | {"layers": 1}},
    "own text tower": {"kind": open_clip.CustomTextCLIP, "text_cfg": TEXT | {"proj_bias": True}},
    "end by id": {
        "kind": open_clip.CustomTextCLIP,
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407},
    },
}


def build(kind=open_clip.CLIP, **settings):
    torch.manual_seed(0)
    settings = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT} | settings
    clip = kind(**settings).double().train()
    with torch.no_grad():
        for parameter in clip.parameters():  # away from zero biases and unit gains
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def batch(clip, n):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, *clip.visual.image_size, generator=generator, dtype=torch.float64)
    texts = [f"{'very ' * (7 * i % 23)}small picture {i % 5}" for i in range(n)]
    texts[:3] = ["", "!€ what", "word " * 90]  # "!" before another sign has the id of padding
    return images, torch.from_numpy(tokenize(texts, policy="cut", report=TruncationReport()))


def gradients(clip, loss):
    clip.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}


def mixed(images, texts):
    """A number in which every entry has another weight."""
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view(images.shape)
    return (images * weights + texts * weights.flip(0) ** 2).sum()


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("n", [5, 130])
def test_equals_open_clips_own_with_all_gradients(towers, n):
    clip = build(**TOWERS[towers])
    images, tokens = batch(clip, n)
    wanted = clip.encode_image(images, True), clip.encode_text(tokens, True)
    of_wanted = gradients(clip, mixed(*wanted))
    network = DualEncoder(clip)
    assert network.runs_images
    assert network.runs_texts
    found = network.encode_images(images), network.encode_tokens(tokens)
    of_found = gradients(clip, mixed(*found))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert of_found.keys() == of_wanted.keys()
    for name in of_found:
        torch.testing.assert_close(of_found[name], of_wanted[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [5, 130])
def test_padded_captions_give_the_same(n):
    clip = build()
    _, tokens = batch(clip, n)
    wanted = transformer.encode_tokens(clip, tokens, torch.float64)
    of_wanted = gradients(clip, mixed(wanted, wanted))
    found = transformer.encode_padded(clip, tokens, torch.float64)
    of_found = gradients(clip, mixed(found, found))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for name in of_wanted:
        torch.testing.assert_close(of_found[name], of_wanted[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("custom", [False, True], ids=["own forward", "open_clip's forward"])
def test_compiled_towers_give_the_same_gradients(backend, custom, monkeypatch):
    compiler = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiler)
    block = {"block_type": "custom"} if custom else {}
    clip = build(vision_cfg=VISION | block, text_cfg=TEXT | block)
    images, tokens = batch(clip, 6)
    tokens = tokens[torch.tensor([0, 3, 4, 5])]
    plain, compiled = DualEncoder(clip), DualEncoder(clip, compiled=True)
    assert plain.runs_images != custom
    wanted = plain(images[:4], tokens)[:2]
    of_wanted = gradients(clip, mixed(*wanted))
    found = compiled(images[:4], tokens)[:2]
    of_found = gradients(clip, mixed(*found))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert of_found.keys() == of_wanted.keys()
    for name in of_found:
        torch.testing.assert_close(of_found[name], of_wanted[name], rtol=1e-7, atol=1e-8)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_compiled_captions_are_padded_to_few_lengths():
    assert [padded_length(n) for n in (2, 16, 17, 40, 64, 65, 77)] == [16, 16, 32, 48, 64, 77, 77]


def test_bf16_is_as_close_as_open_clips_own():
    clip = build().float()
    images, tokens = batch(clip, 70)
    with torch.no_grad():
        exact = clip.encode_image(images.float(), True), clip.encode_text(tokens, True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = clip.encode_image(images.float(), True), clip.encode_text(tokens, True)
        network = DualEncoder(clip, "bf16")
        ours = network.encode_images(images.float()), network.encode_tokens(tokens)
    for wanted, rounded, found in zip(exact, theirs, ours, strict=True):
        assert found.dtype == torch.float32
        error = 1 - F.cosine_similarity(found, wanted)
        assert 0 < error.max() < 2 * (1 - F.cosine_similarity(rounded.float(), wanted)).max()


def test_patch_dropout_drops_the_same_patches():
    clip = build(vision_cfg=VISION | {"patch_dropout": 0.5})
    images, _ = batch(clip, 5)
    network = DualEncoder(clip)
    torch.manual_seed(3)
    wanted = clip.encode_image(images, True)
    torch.manual_seed(3)
    torch.testing.assert_close(network.encode_images(images), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "vision",
    [{"attentional_pool": True}, {"pool_type": "none"}, {"block_type": "custom"}],
    ids=["attention pool", "no pool", "custom blocks"],
)
def test_other_towers_are_left_to_open_clip(vision):
    assert not transformer.runs_image_tower(build(vision_cfg=VISION | vision).visual)


def test_text_that_sees_behind_its_end_is_left_to_open_clip():
    for settings in ({"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}):
        clip = build(kind=open_clip.CustomTextCLIP, text_cfg=TEXT | settings)
        assert not transformer.runs_text_tower(clip.text)


def test_packing_says_where_tokens_stand():
    packing = Packing.of([2, 3, 3], torch.device("cpu"))
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert packing.starts.tolist() == [0, 2, 5]
    assert packing.ends.tolist() == [1, 4, 7]
    (part,) = packing.parts
    assert part.places.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert part.valid.sum(dim=(1, 2, 3)).tolist() == [2, 3, 3]
    even, same = Packing.even(5, 4, torch.device("cpu")), Packing.of([4] * 5, torch.device("cpu"))
    for one, other in ((even.positions, same.positions), (even.starts, same.starts)):
        assert one.tolist() == other.tolist()
    assert even.ends.tolist() == same.ends.tolist()
    assert even.parts == same.parts
    many = Packing.of(sorted(i % 9 + 1 for i in range(90)), torch.device("cpu")).parts
    assert [part.count for part in many] == [23, 23, 23, 21]
    assert [part.length for part in many] == [3, 5, 7, 9]

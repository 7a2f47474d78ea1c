"""Encoding: the fast ways against open_clip's own forward pass, in either precision."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import clipkit
from clipkit.artifacts import read_manifest
from clipkit.config import parse_config
from clipkit.errors import ImageError
from clipkit.models import encoder as encoder_module
from clipkit.models import inference_precision as prepare_module
from clipkit.models.checkpoint import save_checkpoint
from clipkit.models.cpu_kernels import fold_batch_norms
from clipkit.models.inference_precision import prepare
from clipkit.models.loading import load_model
from clipkit.models.tokenizer import CaptionTruncationWarning, TruncationReport, tokenize
from clipkit.training.build import build_towers
from tests.helpers.clips import CAPTIONS, CPU, RESNET, TIMM, as_encoder, clip_of, photos
from tests.helpers.models import tiny_model
from tests.helpers.shapes import unchecked

TOWERS = {
    "transformer": {},
    "custom blocks": {"block_type": "custom"},
    "resnet": RESNET,
    "timm convolutional": TIMM | {"timm_model_name": "efficientnet_lite0"},
    "timm transformer": TIMM | {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224},
}


def cosines(ours, theirs):
    return np.sum(ours * theirs.numpy(), axis=1)


@pytest.mark.parametrize("towers", TOWERS)
def test_exact_encoding_equals_open_clips(towers):
    clip = clip_of(**TOWERS[towers])
    images, tokens = photos(clip), torch.from_numpy(tokenize(CAPTIONS))
    with torch.no_grad():
        wanted = clip.encode_image(images, True), clip.encode_text(tokens, True)
    encoder = as_encoder(clip)
    np.testing.assert_allclose(encoder.encode_images(images), wanted[0], atol=2e-6)
    np.testing.assert_allclose(encoder.encode_text(CAPTIONS), wanted[1], atol=1e-6)


@pytest.mark.parametrize("towers", TOWERS)
def test_rounded_encoding_is_close_and_holds_its_matrices_once(towers):
    clip = clip_of(**TOWERS[towers])
    images, tokens = photos(clip), torch.from_numpy(tokenize(CAPTIONS))
    with torch.no_grad():
        wanted = clip.encode_image(images, True), clip.encode_text(tokens, True)
    encoder = as_encoder(clip, "bf16")
    of_images, of_captions = encoder.encode_images(images), encoder.encode_text(CAPTIONS)
    assert of_images.dtype == of_captions.dtype == np.float32
    assert 0.995 < cosines(of_images, wanted[0]).min() < 1 - 1e-7
    assert 0.9999 < cosines(of_captions, wanted[1]).min() < 1 - 1e-7
    for module in (*clip.visual.modules(), *clip.transformer.modules()):
        if isinstance(module, nn.MultiheadAttention):
            assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    kernels = [m.weight.dtype for m in clip.visual.modules() if isinstance(m, nn.Conv2d)]
    exact = kernels.count(torch.float32)
    assert kernels == [torch.float32] * exact + [torch.bfloat16] * (len(kernels) - exact)
    assert exact <= len(kernels) / 4
    assert clip.token_embedding.weight.dtype == torch.float32


def test_captions_of_many_windows_and_batches_come_in_order(monkeypatch):
    encoder = as_encoder(clip_of())
    wanted = np.concatenate([encoder.encode_text([caption]) for caption in CAPTIONS])
    monkeypatch.setattr(encoder_module, "CAPTION_WINDOW", 7)
    np.testing.assert_allclose(encoder.encode_text(CAPTIONS), wanted, atol=1e-6)
    monkeypatch.setattr(encoder_module, "CAPTION_WINDOW", 100)
    for most in (1, 30, 200):
        found = encoder.encode_text(CAPTIONS, batch_tokens=most)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert encoder.encode_text([]).shape == (0, 32)


def test_batches_are_filled_by_tokens_and_equal_captions_are_run_once(monkeypatch):
    encoder, seen = as_encoder(clip_of()), []
    encode_tokens = encoder.network.encode_tokens

    def noted(tokens):
        seen.append((tokens.argmax(dim=1) + 1).tolist())
        return encode_tokens(tokens)

    monkeypatch.setattr(encoder.network, "encode_tokens", noted)
    vectors = encoder.encode_text(CAPTIONS, batch_tokens=100)
    lengths = [length for batch in seen for length in batch]
    assert lengths == sorted(lengths)
    assert len(lengths) == len(set(CAPTIONS))
    assert all(sum(batch) <= 100 + max(batch) for batch in seen)
    assert all(sum(batch) >= 100 - max(batch) for batch in seen[:-1])
    np.testing.assert_array_equal(vectors[-10:], vectors[:10])


def test_what_is_cut_is_told_once_for_all_windows(monkeypatch):
    encoder = as_encoder(clip_of())
    monkeypatch.setattr(encoder_module, "CAPTION_WINDOW", 2)
    texts = ["cat", "dog " * 80, "bird", "cow", "fox " * 90]
    encode_text = torch.inference_mode()(unchecked(unchecked(encoder_module.Encoder.encode_text)))
    with pytest.warns(CaptionTruncationWarning, match="2 of 5 captions") as told:
        encode_text(encoder, texts)
    assert len(told) == 1
    assert told[0].filename == __file__
    report = TruncationReport()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_text(texts, report=report)
    assert (report.seen, report.cut) == (5, 2)
    with pytest.raises(clipkit.ClipkitError, match="needs 82 tokens"):
        encoder.encode_text(texts, policy="error")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_batch_changes_a_vector_by_rounding_alone(precision):
    clip = clip_of()
    images, encoder = photos(clip, 9), as_encoder(clip, precision)
    alone = np.concatenate([encoder.encode_images(images[i : i + 1]) for i in range(9)])
    for size in (2, 9):
        together = encoder.encode_images(images, batch_size=size)
        assert np.abs(together - alone).max() < (1e-6 if precision == "fp32" else 5e-3)
        assert np.sum(together * alone, axis=1).min() > 1 - (1e-6 if precision == "fp32" else 1e-4)


def test_threads_that_share_an_encoder_get_their_own_vectors():
    encoder = as_encoder(clip_of())
    images = photos(encoder.network.clip, 24)
    wanted = encoder.encode_images(images), encoder.encode_text(CAPTIONS)

    def encode(start):
        part = CAPTIONS[start:] + CAPTIONS[:start]
        return encoder.encode_images(images[start:]), encoder.encode_text(part)

    starts = list(range(20)) * 3
    with ThreadPoolExecutor(8) as pool:
        for start, (of_images, of_captions) in zip(starts, pool.map(encode, starts), strict=True):
            np.testing.assert_allclose(of_images, wanted[0][start:], atol=1e-6)
            rolled = np.concatenate([wanted[1][start:], wanted[1][:start]])
            np.testing.assert_allclose(of_captions, rolled, atol=1e-6)


@pytest.mark.parametrize("towers", ["resnet", "timm convolutional"])
def test_batch_norms_are_folded(towers):
    clip = clip_of(**TOWERS[towers])
    images = photos(clip)
    with torch.no_grad():
        wanted = clip.visual(images)
        fold_batch_norms(clip.visual)
        found = clip.visual(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in clip.visual.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Forked(nn.Module):
    """The output of a convolution goes into a norm, and elsewhere."""

    image_size = (8, 8)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(3.0)

    def forward(self, x):
        x = self.conv(x)
        return (x + self.norm(x)).mean(dim=(2, 3))


def test_what_cannot_be_folded_stays():
    tower = Forked().eval()
    weight, norm = tower.conv.weight, tower.norm
    fold_batch_norms(tower)
    assert tower.conv.weight is weight
    assert tower.norm is norm


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))


def kinds_of(image, folder, encoder):
    """One image in every form that ``encode_images`` takes."""
    image.save(folder / "image.png")
    array = np.asarray(image)
    return {
        "str": str(folder / "image.png"),
        "path": folder / "image.png",
        "PIL": image,
        "array": array,
        "fortran array": np.asfortranarray(array),
        "uint8 tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "float tensor": encoder.preprocess(image),
    }


def test_one_image_of_any_kind_gives_one_vector(image, tmp_path):
    encoder = as_encoder(clip_of())
    images = kinds_of(image, tmp_path, encoder)
    with torch.no_grad():
        wanted = encoder.network.clip.encode_image(encoder.preprocess(image)[None], True)[0].numpy()
    for kind, one in images.items():
        found = encoder.encode_images(one)
        assert found.shape == (32,), kind
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=kind)
    for several in (list(images.values()), tuple(images.values()), iter(images.values())):
        found = encoder.encode_images(several, batch_size=3)
        np.testing.assert_allclose(found, np.tile(wanted, (len(images), 1)), atol=2e-6)


def test_arrays_and_tensors_of_four_dimensions_are_batches(image):
    encoder = as_encoder(clip_of())
    array = np.stack([np.asarray(image), 255 - np.asarray(image)])
    wanted = encoder.encode_images([Image.fromarray(one) for one in array])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    ready = torch.stack([encoder.preprocess(Image.fromarray(one)) for one in array])
    for batch in (array, tensor, ready, ready.double()):
        np.testing.assert_allclose(encoder.encode_images(batch), wanted, atol=2e-6)
    assert encoder.encode_images(array[:0]).shape == (0, 32)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "found NoneType as images, expected a path, a PIL image"),
        ([None], TypeError, "found NoneType as an image, expected a path"),
        (b"\x89PNG", TypeError, "found bytes as images"),
        (np.zeros((8, 8, 3)), TypeError, "image array of float64, expected uint8 from 0 to 255"),
        (np.zeros((3, 8, 8), np.uint8), ImageError, r"\[3, 8, 8\].*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), ImageError, r"\[8, 8, 4\], expected \[height"),
        (np.zeros((8, 8), np.uint8), ImageError, "an array of 2 dimensions, expected 3"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ImageError, "channels first"),
        (torch.zeros(3, 8, 8), ImageError, r"float tensor \[3, 8, 8\], expected \[3, 32"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), TypeError, "int64, expected uint8"),
        ("missing.png", ImageError, "missing.png cannot be opened"),
    ],
)
def test_other_images_are_refused_with_what_was_found(images, error, message):
    with pytest.raises(error, match=message):
        as_encoder(clip_of()).encode_images(images)


def test_one_caption_gives_one_vector():
    encoder = as_encoder(clip_of())
    wanted = encoder.encode_text(["a dog", "a cat"])
    np.testing.assert_allclose(encoder.encode_text("a dog"), wanted[0], atol=1e-6)
    for several in (("a dog", "a cat"), np.array(["a dog", "a cat"]), iter(["a dog", "a cat"])):
        np.testing.assert_allclose(encoder.encode_text(several), wanted, atol=1e-6)
    for captions, found in ((None, "NoneType as captions"), (["a", 3], "int as caption 1")):
        with pytest.raises(TypeError, match=f"found {found}, expected a string"):
            encoder.encode_text(captions)


AUTO = {"transformer": ("bf16", "bf16"), "custom blocks": ("fp32", "bf16")}
AUTO |= {"resnet": ("bf16", "bf16"), "timm convolutional": ("bf16", "bf16")}
AUTO |= {"timm transformer": ("bf16", "bf16")}


@pytest.mark.parametrize("towers", TOWERS)
def test_auto_rounds_where_that_gains_and_sums_stay_exact(towers, monkeypatch):
    monkeypatch.setattr(prepare_module, "has_bf16", lambda kind: True)
    monkeypatch.setattr(prepare_module, "MIN_WIDTH", 32)
    network = prepare(clip_of(**TOWERS[towers]), "auto", CPU)
    assert (network.precisions["image"], network.precisions["text"]) == AUTO[towers]
    monkeypatch.setattr(prepare_module, "has_bf16", lambda kind: False)
    network = prepare(clip_of(**TOWERS[towers]), "auto", CPU)
    assert set(network.precisions.values()) == {"fp32"}


def test_auto_leaves_narrow_towers_alone(monkeypatch):
    monkeypatch.setattr(prepare_module, "has_bf16", lambda kind: True)
    assert set(prepare(clip_of(), "auto", CPU).precisions.values()) == {"fp32"}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fma avx512f avx512_bf16", True),
        ("amx_bf16 amx_tile", True),
        ("avx2 avx512f", False),
        (None, False),
    ],
)
def test_cpu_flags_decide_whether_bf16_is_fast(flags, found, monkeypatch):
    def read_text(path, encoding):
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError
        return f"model name : CPU\nflags : {flags}\n"

    monkeypatch.setattr(prepare_module.Path, "read_text", read_text)
    assert prepare_module.has_bf16.__wrapped__("cpu") == found
    assert not prepare_module.has_bf16.__wrapped__("mps")


def test_the_precision_is_recorded_and_vectors_go_together(
    tiny_checkpoint, colour_folder, tmp_path
):
    from clipkit.cli import app

    arguments = ["embed", str(colour_folder), "--out", str(tmp_path / "store")]
    arguments += ["--model", str(tiny_checkpoint)]
    done = CliRunner().invoke(app, [*arguments, "--precision", "bf16"], catch_exceptions=False)
    assert done.exit_code == 0
    store = clipkit.EmbeddingStore.open(tmp_path / "store")
    assert store.model.precision == "bf16"
    index = clipkit.build_index(tmp_path / "store", tmp_path / "index")
    assert index.model.precision == "bf16"
    exact = load_model(tiny_checkpoint, precision="fp32")
    assert exact.model == store.model
    hits = index.with_encoder(exact).search(image=Image.open(colour_folder / "red-2.png"), k=1)
    assert hits[0].score > 0.999
    assert CliRunner().invoke(app, [*arguments, "--precision", "fp8"]).exit_code == 2


def test_a_manifest_of_before_says_fp32(tiny_checkpoint, tmp_path):
    manifest = json.loads((tiny_checkpoint / "manifest.json").read_text())
    del manifest["model"]["precision"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path).model.precision == "fp32"
    assert asdict(read_manifest(tmp_path)) == asdict(read_manifest(tiny_checkpoint))


def test_training_starts_from_weights_as_they_are(tmp_path):
    settings = {"model": tiny_model() | {"vision": RESNET}}
    towers = build_towers(parse_config(settings).model, 0.07, seed=0)
    save_checkpoint(tmp_path / "step-1", towers, {"step": 1}, {"step": 1})
    start = parse_config({"model": {"init_from": str(tmp_path / "step-1")}}).model
    state = build_towers(start, 0.07, seed=1).clip.state_dict()
    for name, value in towers.clip.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("towers", TOWERS)
def test_a_gpu_gives_the_vectors_of_a_cpu(towers, precision):
    clip = clip_of(**TOWERS[towers])
    images, encoder = photos(clip, 70), as_encoder(clip)
    wanted = encoder.encode_images(images), encoder.encode_text(CAPTIONS)
    encoder.network = prepare(clip, precision, torch.device("cuda"))
    found = encoder.encode_images(images), encoder.encode_text(CAPTIONS)
    least = 1 - 1e-5 if precision == "fp32" else 0.99
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.sum(ours * theirs, axis=1).min() > least

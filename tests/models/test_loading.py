import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file

import clipkit
from clipkit.config import parse_config
from clipkit.data.transforms import Preprocess
from clipkit.errors import ConfigError, ModelError, ModelMismatchError
from clipkit.index.vector_index import VectorIndex
from clipkit.models.dual_encoder import why_unsuitable
from clipkit.models.loading import load_model, load_model_ref, resolve
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A tiny model that open_clip knows by name, and its weights on disk."""
    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=0)
    (tmp_path / "tiny-clip.json").write_text(json.dumps(towers.model_config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    weights = tmp_path / "weights.safetensors"
    save_file(towers.clip.state_dict(), weights)
    return towers, weights


def picture(seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 255, (50, 70, 3), np.uint8))


def test_weights_on_disk_give_open_clips_vectors(named):
    _, weights = named
    encoder = load_model(f"tiny-clip/{weights}")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(weights)
    )
    model.eval()
    with torch.no_grad():
        wanted = model.encode_image(preprocess(picture())[None], normalize=True)
        tokens = open_clip.SimpleTokenizer()(["a dog", "a much longer caption of a dog", ""])
        texts = model.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(encoder.encode_images([picture()]), wanted, atol=1e-6)
    found = encoder.encode_text(["a dog", "a much longer caption of a dog", ""])
    np.testing.assert_allclose(found, texts, atol=1e-6)
    assert found.dtype == np.float32
    assert encoder.dim == 32


def test_batches_of_any_size_give_the_same_vectors(tiny_checkpoint):
    encoder = load_model(tiny_checkpoint)
    captions = ["a dog", "two dogs on a beach at night, seen from far above", "", "cat"] * 5
    images = [picture(seed) for seed in range(9)]
    for size in (1, 4, 100):
        np.testing.assert_allclose(
            encoder.encode_text(captions, size), encoder.encode_text(captions), atol=1e-6
        )
        np.testing.assert_allclose(
            encoder.encode_images(images, size), encoder.encode_images(images), atol=1e-6
        )
    lengths = np.linalg.norm(encoder.encode_images(images), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    assert encoder.encode_text([]).shape == (0, 32)
    assert encoder.encode_images([]).shape == (0, 32)


def test_text_trimmed_to_the_batch_equals_the_full_context(tiny_checkpoint):
    encoder = load_model(tiny_checkpoint)
    # "!" before another sign has the id of padding, 0.
    odd = ["!€ what", "", "two <end_of_text> words", "a red bicycle at the sea", "word " * 75]
    texts = odd + [f"{'very ' * (number % 20)}long caption {number}" for number in range(120)]
    tokens = torch.from_numpy(clipkit.tokenize(texts))
    assert 0 in tokens[0, : int(tokens[0].argmax())].tolist()
    with torch.no_grad():
        whole = encoder.network.clip.encode_text(tokens, normalize=True)
        trimmed = encoder.network.encode_tokens(tokens)
    torch.testing.assert_close(trimmed, whole, atol=1e-6, rtol=0)


def test_the_fingerprint_covers_what_decides_a_vector(named, tmp_path):
    towers, weights = named
    first = load_model(f"tiny-clip/{weights}").model
    assert load_model(f"tiny-clip/{weights}").model.fingerprint == first.fingerprint
    quick = json.loads((tmp_path / "tiny-clip.json").read_text()) | {"quick_gelu": True}
    wide = json.loads((tmp_path / "tiny-clip.json").read_text())
    wide["text_cfg"]["heads"] = 4
    changed = dict(towers.clip.state_dict())
    changed["text_projection"] = changed["text_projection"] + 1e-4
    variants = {}
    for name, settings, tensors, mean in (
        ("same", towers.model_config, towers.clip.state_dict(), None),
        ("activation", quick, towers.clip.state_dict(), None),
        ("heads", wide, towers.clip.state_dict(), None),
        ("weights", towers.model_config, changed, None),
        ("preprocessing", towers.model_config, towers.clip.state_dict(), [0.5, 0.5, 0.5]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        preprocess = {"mean": mean} if mean else {}
        config = {"model_cfg": settings, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "open_clip_model.safetensors")
        variants[name] = load_model(folder).model.fingerprint
    assert variants.pop("same") == first.fingerprint
    assert len({first.fingerprint, *variants.values()}) == 5


def test_the_activation_follows_the_tag(named, monkeypatch):
    _, weights = named
    tags = {"plain": {"file": str(weights)}, "quick": {"file": str(weights), "quick_gelu": True}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", tags)
    kinds = {
        tag: {type(module).__name__ for module in load_model(f"tiny-clip/{tag}").network.modules()}
        for tag in tags
    }
    assert "QuickGELU" in kinds["quick"]
    assert "QuickGELU" not in kinds["plain"]


def test_a_model_that_changed_behind_an_artifact_is_refused(tiny_checkpoint):
    reference = load_model(tiny_checkpoint).model
    assert load_model_ref(reference).model == reference
    changed = clipkit.ModelRef(reference.name, "", "0" * 64, reference.dim)
    with pytest.raises(ModelMismatchError, match="restore the original model"):
        load_model_ref(changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_object_gives_open_clips_vectors_and_stays_as_it_was(named, precision):
    _, weights = named
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(weights)
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = load_model(model, preprocess=preprocess, tokenizer=tokenizer, precision=precision)
    captions = ["a dog", "a much longer caption of a dog", "Ünïcode &amp; RAIN"]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(picture(n)) for n in range(3)]), True)
        texts = model.encode_text(tokenizer(captions), normalize=True)
    close = {"atol": 1e-6} if precision == "fp32" else {"atol": 0.02}
    found = encoder.encode_images([picture(n) for n in range(3)])
    np.testing.assert_allclose(found, images, **close)
    np.testing.assert_allclose(encoder.encode_text(captions), texts, **close)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert type(encoder.preprocess) is Preprocess
    assert encoder.model == replace(
        load_model(f"tiny-clip/{weights}").model, name="CLIP", weights="model object"
    )
    assert load_model(model).model == encoder.model  # open_clip stores its transform in the model
    with pytest.raises(ModelError, match="the index i was built with CLIP.*pass it as encoder="):
        load_model_ref(encoder.model, "the index i")


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clips_own_transforms_are_recognised(named, resize_mode, interpolation):
    _, weights = named
    model = open_clip.create_model("tiny-clip", pretrained=str(weights))
    transform = open_clip.image_transform(
        (32, 32),
        is_train=False,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.3),
        interpolation=interpolation,
        resize_mode=resize_mode,
    )
    encoder = load_model(model, preprocess=transform)
    assert type(encoder.preprocess) is Preprocess
    assert encoder.preprocess.mean == (0.5, 0.4, 0.3)
    assert torch.equal(encoder.preprocess(picture()), transform(picture()))
    assert encoder.model.fingerprint != load_model(model).model.fingerprint


def test_another_transform_is_used_as_it_is(named, tmp_path):
    _, weights = named
    model = open_clip.create_model("tiny-clip", pretrained=str(weights)).eval()

    def transform(image, shade=0.5):
        small = image.resize((32, 32), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(small) / 255.0 - shade).permute(2, 0, 1).float()

    encoder = load_model(model, preprocess=transform, precision="fp32")
    with torch.no_grad():
        wanted = model.encode_image(transform(picture())[None], normalize=True)[0]
    picture().save(tmp_path / "a.png")
    pixels = np.asarray(picture())
    for image in (picture(), pixels, tmp_path / "a.png", transform(picture())):
        np.testing.assert_allclose(encoder.encode_images(image), wanted, atol=1e-6)
    store = clipkit.embed(tmp_path, tmp_path / "store", encoder)
    np.testing.assert_allclose(store.vectors(), wanted[None], atol=1e-6)
    darker = load_model(model, preprocess=lambda image: transform(image, 0.6)).model
    again = load_model(model, preprocess=lambda image: transform(image)).model
    assert again.fingerprint == encoder.model.fingerprint != darker.fingerprint


def test_unsuitable_objects_are_refused(named):
    _, weights = named
    model, augment, _ = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights))
    with pytest.raises(TypeError, match="found int as model, expected a name, a path or"):
        load_model(3)
    with pytest.raises(TypeError, match="preprocess or tokenizer beside the model tiny-clip"):
        load_model(f"tiny-clip/{weights}", tokenizer=open_clip.SimpleTokenizer())
    with pytest.raises(ModelError, match="found a Linear, expected an open_clip CLIP"):
        load_model(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"shape \[5, 64\] .* context of 77 tokens"):
        load_model(model, tokenizer=open_clip.SimpleTokenizer(context_length=64))
    with pytest.raises(ModelError, match="differently from CLIP's"):
        load_model(model, tokenizer=open_clip.SimpleTokenizer(clean="canonicalize"))
    with pytest.raises(ModelError, match="pass the inference transform"):
        load_model(model, preprocess=augment)
    with pytest.raises(ModelError, match="preprocess returns .*Image.*expected a float tensor"):
        load_model(model, preprocess=lambda image: image)
    short = open_clip.CLIP(
        32,
        {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16, "image_size": 32},
        {"width": 32, "layers": 1, "heads": 2, "context_length": 64},
    )
    with pytest.raises(ModelError, match="its context is 64 tokens"):
        load_model(short)


@pytest.mark.parametrize(
    ("vision", "text", "shapes"),
    [
        ({"pool_type": "none"}, {}, r"\[5, 32\] for an image and \[32\]"),
        ({}, {"pool_type": "none"}, r"\[32\] for an image and \[77, 32\]"),
        ({}, {"proj_type": "none"}, r"\[32\] for an image and \[64\]"),
    ],
)
def test_towers_that_do_not_give_vectors_are_refused(tmp_path, vision, text, shapes):
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            **{"width": 64, "layers": 1, "head_width": 32, "patch_size": 16, "image_size": 32},
            **vision,
        },
        "text_cfg": {"width": 64, "layers": 1, "heads": 2, **text},
    }
    clip = open_clip.CLIP(**config)
    file = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(file))
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    message = f"cannot be used: its towers give arrays of shape {shapes} for a caption.*pool_type"
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(clip, preprocess=lambda image: torch.zeros(3, 32, 32))
    settings = {"embed_dim": 32, "vision": config["vision_cfg"], "text": config["text_cfg"]}
    with pytest.raises(ConfigError, match=message):
        build_towers(parse_config({"model": settings}).model, 0.07, seed=0)


def test_openais_spelling_of_names():
    assert resolve("ViT-B/32/openai") == ("ViT-B-32", "openai")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("ViT-B-33/x", "did you mean ViT-B-32"),
        ("ViT-B-32", "names no weights"),
        ("ViT-B-32/laion", "neither a file nor a tag of ViT-B-32; its tags: openai"),
        ("ViT-B-16-SigLIP/webli", "its tokenizer is timm/ViT-B-16-SigLIP"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "another text tower"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "Hugging Face model roberta-base"),
        ("no/such/folder", "neither a directory nor"),
    ],
)
def test_unsuitable_models_are_refused_at_once(model, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"context_length": 77, "vocab_size": 49408}, None),
        ({"context_length": 64}, "its context is 64 tokens, CLIP's is 77"),
        ({"vocab_size": 32000}, "its vocabulary has 32000 entries"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "cleans text by 'canonicalize'"),
    ],
)
def test_why_a_text_tower_is_unsuitable(settings, reason):
    found = why_unsuitable(settings)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("model", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:org/name"])
def test_offline_is_one_sentence(model, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    said = (
        r"the hub was not reached; name a run .*weights on disk.*\(the hub: .*no route to host\)$"
    )
    with pytest.raises(ModelError, match=said):
        load_model(model)


def test_weights_that_do_not_fit_or_are_no_weights(named, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"text_projection": torch.zeros(3, 3)}, other)
    with pytest.raises(ModelError, match="do not fit the model"):
        load_model(f"tiny-clip/{other}")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match="do not fit the model"):
        load_model(f"tiny-clip/{tmp_path / 'torn.safetensors'}")


def test_a_pickle_that_runs_code_is_not_opened(named, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="would run code"):
        load_model(f"tiny-clip/{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "pwned").exists()


def test_directories_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no clipkit artifact"):
        load_model(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ModelError, match="a run without a finished checkpoint"):
        load_model(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "open_clip_config.json").write_text("{")
    with pytest.raises(ModelError, match="open_clip_config.json cannot be read"):
        load_model(broken)


def test_a_configuration_without_weights_is_refused(named, tmp_path):
    towers, _ = named
    folder = tmp_path / "bare"
    folder.mkdir()
    config = {"model_cfg": towers.model_config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no weights"):
        load_model(folder)


def test_vectors_from_outside_have_no_model_to_load():
    model = VectorIndex.from_vectors(np.eye(3), ["a", "b", "c"]).model
    with pytest.raises(ModelError, match="the index X came from outside clipkit"):
        load_model_ref(model, "the index X")

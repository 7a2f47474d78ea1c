"""A query encoded without torch, from weights known to be what they were."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file, save_file

import clipkit
from clipkit.artifacts import ModelRef
from clipkit.errors import ModelError
from clipkit.models.checkpoint import CONFIG, WEIGHTS, Towers, save_checkpoint
from clipkit.models.loading import load_model
from clipkit.models.text_encoder_numpy import (
    TextTowerFile,
    find_text_tower,
    load_query_encoder,
    record_text_tower,
)
from clipkit.tasks.embed import embed
from clipkit.user_cache import cache_folder
from tests.helpers.clips import CAPTIONS
from tests.helpers.models import tiny_model

TEXTS = {
    "gelu": {},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"ls_init_value": 0.3},
    "own text tower": {"custom_text": True, "proj_bias": True},
    "no projection": {"custom_text": True, "proj_type": "none"},
}


def checkpoint(path, half=False, **settings):
    """A checkpoint whose parameters are away from zero biases and unit gains."""
    model = tiny_model()
    config = {"embed_dim": 32, "vision_cfg": model["vision"]}
    config |= {key: settings.pop(key) for key in ("quick_gelu", "custom_text") if key in settings}
    config["text_cfg"] = model["text"] | settings | {"layers": 3}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    torch.manual_seed(0)
    clip = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if half:
                parameter.copy_(parameter.half())
    preprocess = dict(PreprocessCfg(size=(32, 32)).__dict__)
    save_checkpoint(path, Towers(clip, config, preprocess), {"step": 1}, {"step": 1})
    if half:
        tensors = {name: tensor.half() for name, tensor in load_file(path / WEIGHTS).items()}
        save_file(tensors, path / WEIGHTS)
    return path


@pytest.fixture(autouse=True)
def own_notes(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "notes"))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_whole_model(text, half, tmp_path):
    whole = load_model(checkpoint(tmp_path / "step-1", half, **TEXTS[text]), precision="fp32")
    query = load_query_encoder(whole.model)
    captions = [*CAPTIONS, "word " * 75]
    found = query.encode_text(captions)
    np.testing.assert_allclose(found, whole.encode_text(captions), atol=1e-6)
    assert found.dtype == np.float32
    assert query.encode_text([]).shape == (0, whole.dim)
    assert query.model == whole.model
    np.testing.assert_array_equal(query.encode_text(captions[0]), found[0])
    with pytest.raises(TypeError, match="found int as caption 1"):
        query.encode_text(["a dog", 3])
    with pytest.raises(ModelError, match=r"clipkit\.load_model"):
        query.encode_images([])


def test_a_text_tower_of_another_kind_is_not_taken(tmp_path):
    whole = load_model(checkpoint(tmp_path / "step-1", custom_text=True, no_causal_mask=True))
    assert load_query_encoder(whole.model) is None


def test_weights_named_for_a_whole_model_are_found_in_a_custom_one(tmp_path):
    """open_clip renames the weights of a CLIP while it loads them into a CustomTextCLIP."""
    path = checkpoint(tmp_path / "step-1")
    config = json.loads((path / CONFIG).read_text())
    config["model_cfg"]["custom_text"] = True
    (path / CONFIG).write_text(json.dumps(config))
    whole = load_model(path)
    assert hasattr(whole.network.clip, "text")
    found = load_query_encoder(whole.model).encode_text(CAPTIONS)
    np.testing.assert_allclose(found, whole.encode_text(CAPTIONS), atol=1e-6)


def test_only_an_unchanged_file_is_known(tmp_path):
    path = checkpoint(tmp_path / "step-1")
    file, model = path / WEIGHTS, load_model(path).model
    assert find_text_tower(model) is not None
    times = os.stat(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying program may
    assert find_text_tower(model) is None
    assert load_model(path).model != model
    assert find_text_tower(model) is None


def test_a_copy_in_place_of_the_file_is_read_anew(tmp_path):
    path = checkpoint(tmp_path / "step-1")
    file, model = path / WEIGHTS, load_model(path).model
    shutil.copy2(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)
    assert find_text_tower(model) is None
    assert load_model(path).model == model
    assert find_text_tower(model) is not None


def test_a_model_of_another_name_is_loaded_whole(tmp_path):
    model = load_model(checkpoint(tmp_path / "step-1")).model
    shutil.copytree(tmp_path / "step-1", tmp_path / "other")
    again = load_model(tmp_path / "other").model
    assert again == clipkit.ModelRef(str(tmp_path / "other"), "", model.fingerprint, model.dim)
    assert find_text_tower(again) is not None
    assert find_text_tower(model) is None  # the note is of the one loaded last


@pytest.mark.parametrize("damage", ["", "[]", '{"model": 3}', '{"tower": {"file": "x"}}'])
def test_a_damaged_note_is_no_note(damage, tmp_path):
    model = load_model(checkpoint(tmp_path / "step-1")).model
    (note,) = cache_folder().glob("models/*.json")
    note.write_text(damage)
    assert load_query_encoder(model) is None
    strange = clipkit.ModelRef(model.name, "", "../" + model.fingerprint, model.dim)
    assert load_query_encoder(strange) is None


def test_without_a_place_for_notes_loading_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "file"))
    assert load_query_encoder(load_model(checkpoint(tmp_path / "step-1")).model) is None


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("CLIPKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "clipkit"


def test_a_cache_that_is_off_keeps_no_notes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPKIT_CACHE", "off")
    model = ModelRef("m", "", "a" * 64, 3)
    record_text_tower(model, TextTowerFile("file", [], "", 1, 1, "gelu"))
    assert find_text_tower(model) is None
    assert not list(tmp_path.iterdir())


SEARCH = """
import sys
from clipkit.cli import app
app(["search", sys.argv[1], "a red picture", "--json"], standalone_mode=False)
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_search_loads_neither_torch_nor_open_clip(colour_folder, tmp_path):
    path = checkpoint(tmp_path / "step-1")
    encoder = load_model(path)
    embed(colour_folder, tmp_path / "store", encoder)
    index = clipkit.build_index(tmp_path / "store", tmp_path / "index")
    wanted = index.with_encoder(encoder).search("a red picture")

    def search():
        done = subprocess.run(
            [sys.executable, "-c", SEARCH, tmp_path / "index"], capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        hits = [json.loads(line) for line in done.stdout.splitlines()]
        assert [hit["key"] for hit in hits] == [hit.key for hit in wanted]
        scores = [hit["score"] for hit in hits]
        np.testing.assert_allclose(scores, [hit.score for hit in wanted], atol=1e-5)
        return set(done.stderr.splitlines()[-1].split())

    heavy = {"torch", "torchvision", "open_clip", "timm", "datasets", "pandas", "matplotlib"}
    assert not search() & heavy
    shutil.rmtree(cache_folder())
    assert {"torch", "open_clip"} <= search()
    assert not search() & heavy

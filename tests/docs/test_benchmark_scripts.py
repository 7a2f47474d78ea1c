"""The code that the benchmarks share: FLOPs, drawn pairs, options and printed figures."""

import random
import sys
from collections import Counter
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipkit.models.tokenizer import tokenize
from scripts.benchmarks.common import flops, timing
from scripts.benchmarks.training import speed
from scripts.benchmarks.training.pairs import draw_rows, write_pairs
from tests.helpers.toys import png, square

TEXT = {"width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8, "head_width": 16}


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_useful_flops_are_those_of_open_clips_own_pass(kind):
    clip = kind(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT)
    longest = torch.from_numpy(tokenize(["word " * 75]))
    counted = flops.counted_flops(lambda: clip.encode_text(longest))
    assert flops.text_flops(clip, 77) == counted
    tokens, width = 17, 48
    of_blocks = 3 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    of_image = 2 * 16 * 3 * 8 * 8 * width + of_blocks + 2 * width * 24
    assert flops.image_flops(clip) == of_image
    mean = (flops.text_flops(clip, 10) + flops.text_flops(clip, 20)) / 2
    assert flops.training_flops(clip, [10, 20]) == 3 * (of_image + mean)


def test_short_captions_need_less():
    clip = open_clip.CLIP(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT)
    blocks, projection = 3 * 12 * 32**2, 32 * 24
    assert flops.text_flops(clip, 9) == 2 * (9 * blocks + projection) + 3 * 4 * 32 * 81


def test_photos_come_again_with_their_next_captions():
    captions = [[f"{photo} {number}" for number in range(3)] for photo in range(5)]
    rows = draw_rows(captions, 4, random.Random(0))
    assert len({photo for photo, _ in rows}) == 4
    rows = draw_rows(captions, 33, random.Random(0))
    assert all(caption in captions[photo] for photo, caption in rows)
    assert set(Counter(photo for photo, _ in rows).values()) == {6, 7}
    assert Counter(Counter(rows[:15]).values()) == {1: 15}, "each caption before one comes again"
    assert Counter(Counter(rows[:30]).values()) == {2: 15}


def test_rows_are_files_of_their_own(tmp_path):
    pictures = [{"bytes": png(square(colour)), "path": None} for colour in ("red", "green", "blue")]
    columns = {"image": pictures, "captions": [["a", "b"], [], ["c"]]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    file, captions, repeats = write_pairs(tmp_path / "pairs.parquet", tmp_path, 5)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,caption"
    assert [line.split(",")[1] for line in lines[1:]] == captions
    assert set(captions) == {"a", "b", "c"}
    files = [Path(line.split(",")[0]) for line in lines[1:]]
    assert len(set(files)) == 5
    for picture, caption in zip(files, captions, strict=True):
        assert picture.read_bytes() == pictures[2 if caption == "c" else 0]["bytes"]
    assert repeats
    (tmp_path / "few").mkdir()
    assert not write_pairs(tmp_path / "pairs.parquet", tmp_path / "few", 2)[2]


def test_options_and_what_counts():
    words = ["pairs.parquet", "--device", "cpu", "--steps", "7"]
    options = speed.parse(words)
    assert speed.environment(options) == {"CUDA_VISIBLE_DEVICES": ""}
    assert list(range(7))[speed.counted_steps(options)] == [2, 3, 4, 5, 6]
    twice = speed.parse([*words, "--epochs", "2"])
    assert list(range(14))[speed.counted_steps(twice)] == list(range(7, 14))
    with pytest.raises(SystemExit):
        speed.parse([*words, "--batch-size", "64", "--their-chunk-size", "48"])


def test_shares_of_the_peak_are_shown(capsys):
    ours = speed.Curve([1.0, 1.0, 30.0, 30.0], [], "bf16", slice(2, None), 0.25)
    theirs = speed.Curve([9.0, 9.0, 10.0, 10.0], [], "fp32", slice(2, None))
    curves = {"clipkit": [ours], "open_clip fp32": [theirs]}
    speed.show_ratios(curves, 2e9, {"bf16": 120e9, "fp32": 80e9})
    first, second, ratio = capsys.readouterr().out.splitlines()
    assert "50% of the peak in bf16, 25% of the time waiting" in first
    assert second.endswith("25% of the peak in fp32")
    assert "3.00" in ratio


def test_peaks_are_of_the_products_that_are_timed(monkeypatch):
    monkeypatch.setitem(flops.SIZES, "cpu", ((4, 8, 2), (8, 16, 4)))
    monkeypatch.setattr(
        flops,
        "alternate",
        lambda runs, rounds, device: {name: [run().numel(), 9e9] for name, run in runs.items()},
    )
    assert flops.matrix_peaks(1) == {"fp32": 2 * 16.0, "bf16": 2 * 16.0}


def test_a_command_that_fails_ends_the_benchmark():
    assert timing.run_command([sys.executable, "-c", "print(1)"])[0] == "1\n"
    with pytest.raises(SystemExit, match="failed:\n.*broken"):
        timing.run_command([sys.executable, "-c", "raise SystemExit('broken')"])

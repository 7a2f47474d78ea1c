"""What a report on data finds, on data made to be wrong, and duplicates against the slow way."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipkit.data.duplicates import LOOK, content_hash, look, near_groups
from clipkit.data.statistics import Spread
from clipkit.errors import DataError
from clipkit.tasks.check_data import check_data
from tests.helpers.paths import SHARED


def picture(seed, size=(96, 80)):
    """Soft random blobs, different for each seed."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


def near_slowly(looks):
    """The definition: bits, colours and correlation within the limits, chains joined."""
    groups = list(range(len(looks)))
    for a in range(len(looks)):
        for b in range(a):
            bits = np.unpackbits(looks[a][:8] ^ looks[b][:8]).sum()
            colours = np.abs(looks[a][8:200].astype(int) - looks[b][8:200]).mean()
            greys = looks[a][200:].astype(float), looks[b][200:].astype(float)
            if bits > 7 or colours > 5 or min(map(np.std, greys)) < 2:
                continue
            if np.corrcoef(*greys)[0, 1] >= 0.95 and groups[a] != groups[b]:
                groups = [groups[b] if group == groups[a] else group for group in groups]
    return groups


def same_partition(ours, theirs):
    return len(set(ours)) == len(set(theirs)) == len(set(zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_near_groups_equal_comparing_all(seed):
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 256, (4, LOOK), np.uint8)
    looks = centres[generator.integers(0, 4, 400)]
    flips = generator.random((400, 64)) < 0.06  # four bits apart from the centre, eight from others
    looks[:, :8] ^= np.packbits(flips, axis=1)
    shift = generator.choice([0, 4, 12], 400).astype(np.uint8)[:, None]
    looks[:, 8:200] = np.minimum(looks[:, 8:200], 240) + shift
    noise = generator.choice([1, 10, 60], 400)[:, None] * generator.standard_normal((400, 256))
    looks[:, 200:] = np.clip(looks[:, 200:] + noise, 0, 255)
    looks[:9, 200:] = 77  # nothing to see
    slow = near_slowly(looks)
    assert 4 < len(set(slow)) < 300
    assert same_partition(near_groups(looks).tolist(), slow)


@pytest.mark.parametrize(
    ("bits", "colours", "grey", "near"),
    [(7, 5, 0, True), (8, 0, 0, False), (0, 6, 0, False), (0, 0, 24, True), (0, 0, 28, False)],
)
def test_near_has_the_stated_limits(bits, colours, grey, near):
    one = np.zeros(LOOK, np.uint8)
    one[200:] = np.tile([80, 160], 128)  # deviates from the mean by 40
    other = one.copy()
    flips = np.zeros(64, np.uint8)
    flips[np.arange(bits) * 8] = 1  # one in each byte, the worst case for looking byte by byte
    other[:8] = np.packbits(flips)
    other[8:200] = colours
    # Uncorrelated with one: the correlation is 40 / sqrt(40² + (grey / 2)²), 0.958 or 0.944.
    other[200:] += np.tile([0, 0, grey, grey], 64).astype(np.uint8)
    first, second = near_groups(np.stack([one, other]))
    assert (first == second) == near


def test_near_groups_of_nothing_and_of_many_the_same():
    assert len(near_groups(np.zeros((0, LOOK), np.uint8))) == 0
    same = np.tile(look(picture(0)), (5000, 1))
    assert len(set(near_groups(same).tolist())) == 1


def test_flat_images_are_near_duplicates_of_none():
    flat = np.zeros((50, LOOK), np.uint8)
    assert len(set(near_groups(flat).tolist())) == 50


def test_small_drawings_on_white_are_told_apart():
    drawings = []
    for seed in range(40):
        image = Image.new("RGB", (64, 64), "white")
        dots = np.random.default_rng(seed).random((7, 7)) < 0.5
        dots = Image.fromarray(dots).resize((21, 21), Image.Resampling.NEAREST)
        image.paste("black", (22, 22), dots)
        drawings.append(image)
    copies = [image.resize((48, 48), Image.Resampling.LANCZOS) for image in drawings]
    groups = near_groups(np.stack([look(image) for image in drawings + copies])).tolist()
    assert len(set(groups[:40])) == 40
    assert groups[:40] == groups[40:]


def test_white_drawings_on_a_transparent_ground_are_not_the_same_image(tmp_path):
    for seed in range(3):
        image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
        image.paste("white", (4 + 6 * seed, 4, 12 + 6 * seed, 20))
        image.save(tmp_path / f"{seed}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    report = check_data(tmp_path)
    assert report.exact.examples == [["0.png", "copy.png"]]
    assert report.near.groups == 0


def test_look_survives_resizing_and_recompression_and_tells_others_apart(tmp_path):
    images = [picture(seed) for seed in range(20)]
    copies = []
    for image in images:
        image.resize((61, 47)).save(tmp_path / "copy.jpg", quality=40)
        copies.append(Image.open(tmp_path / "copy.jpg").convert("RGB"))
    groups = near_groups(np.stack([look(image) for image in images + copies])).tolist()
    assert groups[:20] == groups[20:]
    assert len(set(groups)) == 20


def test_plain_colours_are_not_near():
    plain = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue", "white")]
    assert len(set(near_groups(np.stack([look(image) for image in plain])).tolist())) == 4


def test_content_is_pixels_and_shape():
    image = picture(0)
    assert content_hash(image) == content_hash(image.copy())
    assert content_hash(image) != content_hash(picture(1))
    plain = [Image.new("RGB", size) for size in [(4, 6), (6, 4)]]
    assert content_hash(plain[0]) != content_hash(plain[1])


def test_spread_by_hand():
    assert Spread.of([*range(1, 101)]) == Spread(1, 51, 95, 100)
    assert Spread.of([3]) == Spread(3, 3, 3, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for number in range(6):
        picture(number).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"picture number {number}\n")
    picture(0).save(root / "0-again.bmp")
    picture(1).resize((60, 50)).save(root / "1-small.jpg")
    picture(9, (9, 30)).convert("L").save(root / "tiny.png")
    (root / "0-again.txt").write_text("Picture  NUMBER 0\npicture number 1")
    (root / "1-small.txt").write_text("dog " * 80 + "the end")
    (root / "tiny.txt").write_text("a tiny one")
    for name in ("cut-1.png", "cut-2.png"):
        data = (root / "2.png").read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
        (root / name).with_suffix(".txt").write_text("half")
    picture(10).save(root / "silent.png")
    (root / "x.jpg").mkdir()
    return root


@pytest.fixture(scope="module")
def report(folder):
    return check_data(folder)


def problems(report):
    return {problem.reason: problem for problem in report.problems}


def test_content_is_counted(report, folder):
    assert (report.kind, report.rows, report.images) == ("sidecars", 12, 10)
    good = [f"{n}.png" for n in range(6)]
    good += ["0-again.bmp", "1-small.jpg", "tiny.png", "silent.png"]
    assert report.bytes == sum((folder / name).stat().st_size for name in good)
    assert report.formats == {"PNG RGB": 7, "BMP RGB": 1, "JPEG RGB": 1, "PNG L": 1}
    assert (report.widths, report.heights) == (Spread(9, 96, 96, 96), Spread(30, 80, 80, 80))
    assert report.labels == {}


def test_what_is_wrong_is_told_by_kind(report):
    found = problems(report)
    damaged = [reason for reason in found if reason.startswith("is damaged or truncated")]
    assert [item.key for item in found[damaged[0]].examples] == ["cut-1.png", "cut-2.png"]
    assert [item.key for item in found["has no caption"].examples] == ["silent.png"]
    assert found["is tiny (… x … pixels)"].examples[0].reason == "is tiny (9 x 30 pixels)"
    assert [
        item.key for item in found["is a directory, not an image; its contents are read"].examples
    ]
    assert "has no label" not in found
    assert len(found) == 4


def test_captions_are_measured(report):
    assert report.captions == 12
    assert report.captions_per_image == {0: 1, 1: 10, 2: 1}
    assert (report.caption_tokens.min, report.caption_tokens.max) == (3, 84)
    assert (report.cut.seen, report.cut.cut) == (12, 1)
    assert report.cut.worst[0].lost == "dog dog dog dog dog the end"
    assert (report.repeated.distinct, report.repeated.repeats) == (9, 3)
    assert sorted(count for _, count in report.repeated.top) == [2, 2, 2]


def test_duplicates_are_grouped(report):
    assert report.exact.examples == [["0-again.bmp", "0.png"]]
    assert (report.exact.groups, report.exact.images) == (1, 2)
    assert report.near.examples == [["1-small.jpg", "1.png"]]


def test_leaks_between_two_sets(folder, tmp_path):
    picture(3).save(tmp_path / "three.bmp")
    picture(4).resize((50, 50)).save(tmp_path / "four.png")
    picture(50).save(tmp_path / "fifty.png")
    for name, caption in [("three", "three"), ("four", "PICTURE number 5 "), ("fifty", "50")]:
        (tmp_path / f"{name}.txt").write_text(caption)
    leaks = check_data(folder, tmp_path).leaks
    assert (leaks.exact, leaks.near, leaks.captions) == (1, 1, 1)
    assert leaks.exact_examples == [("3.png", "three.bmp")]
    assert leaks.near_examples == [("4.png", "four.png")]
    assert leaks.caption_examples == ["PICTURE number 5"]


def test_report_is_json_and_text(report, folder):
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["exact"]["examples"] == [["0-again.bmp", "0.png"]]
    assert plain["cut"]["worst"][0]["needed"] == 84
    assert plain["leaks"] is None
    text = report.render()
    for expected in (
        f"{folder} (sidecars)",
        "images    10 readable of 12",
        "0-again.bmp = 0.png",
        "not read: 'dog dog dog dog dog the end'",
        "captions  12 (images: 1 with 0, 10 with 1, 1 with 2)",
        "    silent.png: has no caption",
    ):
        assert expected in text


def test_labels_and_no_captions(tmp_path):
    for label, seeds in {"cat": [1, 2], "dog": [3]}.items():
        (tmp_path / label).mkdir()
        for seed in seeds:
            picture(seed).save(tmp_path / label / f"{seed}.png")
    report = check_data(tmp_path)
    assert report.labels == {"cat": 2, "dog": 1}
    assert (report.captions, report.caption_tokens, report.problems) == (0, None, [])
    assert "captions  none" in report.render()


def test_nothing_readable_is_still_a_report(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("empty")
    report = check_data(tmp_path)
    assert (report.rows, report.images, report.widths) == (1, 0, None)
    assert "1 × is empty" in report.render()


def test_a_misspelt_other_set_is_told_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("clipkit.tasks.check_data.survey", None)
    with pytest.raises(DataError, match="nowhere"):
        check_data(folder, folder / "nowhere")


def test_every_photo_is_found_at_half_its_size():
    small, large = (SHARED / f"flickr8k-{size}-dev.parquet" for size in (112, 224))
    if not small.exists() or not large.exists():
        pytest.skip("../shared/data is not here")
    report = check_data(small, large)
    assert (report.leaks.exact, report.leaks.near) == (0, 1000)
    assert report.leaks.captions == report.repeated.distinct
    assert all(one == other for one, other in report.leaks.near_examples)
    assert report.near.groups == 0


def test_a_stream_is_checked_as_it_comes(tmp_path):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.png").write_bytes(b"broken")
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png"):
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "shard-1.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "c.png")
        tar.add(tmp_path / "a.txt", "c.txt")
    report = check_data(tmp_path / "shard-{0..1}.tar")
    assert (report.kind, report.rows, report.images) == ("tars", 3, 2)
    assert len(report.exact.examples[0]) == 2
    assert problems(report)["has no caption"].count == 1


def test_captions_that_describe_nothing_are_counted(tmp_path):
    captions = ["a dog", "nan", "NULL", "nan", "p4.png", "p5", "17", "3.5", "True", "['a', 'b']"]
    for number in range(len(captions)):
        picture(number).save(tmp_path / f"p{number}.png")
    lines = [f'p{number}.png,"{caption}"' for number, caption in enumerate(captions)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    report = check_data(tmp_path / "t.csv")
    found = problems(report)
    assert {reason: problem.count for reason, problem in found.items()} == {
        "its caption 'nan' stands for a missing value": 2,
        "its caption 'NULL' stands for a missing value": 1,
        "has no caption": 3,
        "its caption is a file name": 2,
        "its caption is mostly digits": 2,
        "its caption is a truth value": 1,
    }
    assert [str(item.key) for item in found["its caption is a file name"].examples] == [
        "p4.png",
        "p5.png",
    ]
    assert "    p6.png: its caption is mostly digits: '17'" in report.render().splitlines()
    assert report.captions_per_image == {0: 3, 1: 6, 2: 1}
    [note] = report.notes
    assert note.startswith("captions printed as lists")


MISSING = "its caption {!r} stands for a missing value"
PRINTED = "captions printed as lists"


@pytest.mark.parametrize(
    ("name", "captions", "problems", "note"),
    [
        ("tables/list.csv", 48, {}, PRINTED),
        ("tables/jlist.csv", 48, {}, PRINTED),
        (
            "tables/nan.csv",
            12,
            {MISSING.format(word): 2 for word in ("nan", "NaN", "NULL", "None", "N/A", "<NA>")}
            | {"has no caption": 12},
            None,
        ),
        ("parquet/cap_json.parquet", 48, {}, PRINTED),
        ("parquet/cap_int.parquet", 24, {"its caption is mostly digits": 24}, None),
        ("parquet/cap_float.parquet", 0, {MISSING.format("nan"): 24}, None),
        ("parquet/bool.jsonl", 24, {"its caption is a truth value": 24}, None),
        ("parquet/nan.jsonl", 12, {MISSING.format("nan"): 12, "has no caption": 12}, None),
        ("parquet/five_rows.parquet", 72, {}, None),
        ("parquet/dupkey.parquet", 1, {"its key is taken by an earlier image": 23}, None),
        ("parquet/llava.jsonl", 24, {}, "captions are the first answer in the field conversations"),
        ("parquet/coco.json", 24, {}, None),
        ("parquet/nested.jsonl", 24, {}, None),
    ],
)
def test_shared_cases_of_captions(name, captions, problems, note):
    file = SHARED.parent / "cases" / name
    if not file.exists():
        pytest.skip("the shared cases are not here")
    report = check_data(file)
    assert report.captions == captions
    assert {problem.reason: problem.count for problem in report.problems} == problems
    assert [text.startswith(note or "") for text in report.notes] == [True] * bool(note)

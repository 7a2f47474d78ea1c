"""Bad input end to end: what is bad is skipped, listed and told, what is good comes through."""

import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import clipkit
from clipkit.artifacts import partial_path
from clipkit.cli import main
from clipkit.data.images import read_image
from clipkit.data.loader import PairLoader
from clipkit.errors import ArtifactError, ModelError, ModelMismatchError, SkipLimitError
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.check_data import check_data
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from clipkit.tasks.train import train
from clipkit.training.run_directory import read_log
from tests.helpers.models import tiny_model
from tests.helpers.runs import assert_same_run, configured
from tests.helpers.toys import ColourEncoder, png, square, write_squares


def bomb(width, height):
    """A PNG whose header claims a size, with hardly any pixels behind it."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def write_good(folder):
    """Images of every unusual kind that can be read; returns their keys."""
    red = Image.new("RGB", (24, 16), (200, 30, 20))
    red.convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.full((16, 16), 40_000, np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    palette = red.quantize(4)
    palette.save(folder / "palette.png", transparency=0)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "green")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = ImageOps.expand(red, (0, 0, 0, 9), "white")
    turned.save(folder / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    (folder / "wrong.jpg").write_bytes(png(square("green")))
    (folder / "deeper").mkdir()
    square("blue").save(folder / "deeper" / "UPPER.PNG")
    names = "animated.gif cmyk.jpg deep.png deeper/UPPER.PNG dot.png palette.png rotated.jpg"
    return [*names.split(), "wrong.jpg"]


def write_bad(folder):
    """Items of every bad kind; returns why each is skipped, by key."""
    (folder / "truncated.png").write_bytes(bomb(64, 64))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "half.jpg")
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("no picture at all")
    Image.new("RGB", (20_000, 8)).save(folder / "long.png")
    (folder / "bomb.png").write_bytes(bomb(20_000, 20_000))
    (folder / "directory.jpg").mkdir()
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "self.png").symlink_to("self.png")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    return {
        "bomb.png": "is too large",
        "dangling.png": "cannot be opened: no such file or directory",
        "directory.jpg": "is a directory, not an image; its contents are read",
        "half.jpg": "is damaged or truncated",
        "long.png": "is 20000 x 8, a side is over 100 times the other",
        "loop": "cannot be listed: a link to a directory that is already listed",
        "pipe.png": "is not a regular file",
        "self.png": "cannot be opened: too many levels of symbolic links",
        "text.jpg": "is not an image of a known format",
        "truncated.png": "is damaged or truncated",
        "zero.png": "is empty (0 bytes)",
    }


def write_badly_captioned(folder):
    """Good pictures with bad captions; returns what is said of each, by key."""
    for name in ("latin", "blank", "none"):
        square("cyan", size=32).save(folder / f"{name}.png")
    (folder / "latin.txt").write_bytes(b"caf\xe9 ol\xe9")
    (folder / "blank.txt").write_text("\n  \n")
    return {"blank.png": "has no caption", "latin.png": "caption", "none.png": "has no caption"}


@pytest.fixture
def mess(tmp_path):
    """One folder with good pictures, every kind of bad one, and bad captions: (folder, three)."""
    folder = tmp_path / "mess"
    folder.mkdir()
    good, bad = write_good(folder), write_bad(folder)
    for key in [*good, *bad]:
        if key != "loop":
            (folder / key).with_suffix(".txt").write_text("a picture")
    return folder, good, bad, write_badly_captioned(folder)


def add_name_that_is_not_utf8(folder):
    try:
        name = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
        Path(name).write_bytes(png(square("red")))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return {"caf\\xe9.png": "its name is not UTF-8; rename it"}


def assert_told(found, expected):
    """The same keys, each with a reason that holds the expected words."""
    assert sorted(found) == sorted(expected)
    for key, reason in expected.items():
        assert reason in found[key]


def test_embedding_a_mess(mess, tmp_path):
    folder, good, bad, badly = mess
    bad |= add_name_that_is_not_utf8(folder)
    encoder = ColourEncoder()
    store = embed(folder, tmp_path / "store", encoder, decode="exact", batch_size=4, skip_limit=0.6)
    assert store.keys == sorted([*good, *badly])
    expected = encoder.encode_images([read_image(folder / key) for key in store.keys])
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-6)
    assert_told(dict(store.skipped()), bad | {"latin.png": "a caption of it is not UTF-8"})
    assert store.manifest.detail["skipped"] == len(bad) + 1


def test_training_on_a_mess(mess, tmp_path, monkeypatch):
    folder, good, bad, badly = mess
    trained_on, batches = set(), PairLoader.batches

    def spy(*arguments):
        for batch in batches(*arguments):
            trained_on.update(batch.keys)
            yield batch

    monkeypatch.setattr(PairLoader, "batches", spy)
    bad |= add_name_that_is_not_utf8(folder)
    rows = len(good) + len(badly) + 6  # those that only reading shows to be bad
    config = configured(
        folder,
        data={"val_fraction": 0.0, "max_skipped_fraction": 0.6, "workers": 2},
        train={"batch_size": rows, "epochs": 2},
    )
    result = train(config, tmp_path / "run")
    assert (result.finished, result.step) == (True, 2)
    assert_told(result.skipped, bad | badly)
    text = (result.run / "skipped.jsonl").read_text(encoding="utf-8")
    listed = [json.loads(line) for line in text.splitlines()]
    assert {line["key"]: line["reason"] for line in listed} == result.skipped
    assert trained_on == set(good)


def test_checking_a_mess_tells_all_of_it_beforehand(mess):
    folder, good, bad, badly = mess
    bad |= add_name_that_is_not_utf8(folder)
    report = check_data(folder)
    assert report.images == len(good) + len(badly)
    told = [(item.key, item.reason) for problem in report.problems for item in problem.examples]
    tiny = dict.fromkeys(["deeper/UPPER.PNG", "wrong.jpg"], "is tiny (8 x 8 pixels)")
    for expected in (bad, badly, tiny, {"dot.png": "is tiny (1 x 1 pixels)"}):
        for key, reason in expected.items():
            assert any(key == found and reason in said for found, said in told), key
    assert ("latin.png", "a caption of it is not UTF-8 and is left out") in told
    assert {key for key, _ in told} == {*bad, *badly, *tiny, "dot.png"}


def test_unreadable_files(tmp_path, monkeypatch):
    keys = write_squares(tmp_path / "photos")
    open_file = Path.open

    def refuse(path, *arguments, **options):
        # Stands in for file modes, which do not bind a superuser.
        if path == tmp_path / "photos" / keys[3]:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    store = embed(tmp_path / "photos", tmp_path / "store", ColourEncoder())
    assert dict(store.skipped()) == {keys[3]: "cannot be opened: permission denied"}
    assert store.keys == [key for key in keys if key != keys[3]]


def test_blank_captions_beside_good_ones_are_told(tmp_path):
    lines = [
        {"image": "a.png", "captions": ["good", " ", "fine"]},
        {"image": "b.png", "captions": ["good", None]},
        {"image": "c.png", "captions": ""},
    ]
    for line in lines:
        square("red").save(tmp_path / line["image"])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = check_data(tmp_path / "t.jsonl")
    told = [(item.key, item.reason) for problem in report.problems for item in problem.examples]
    assert [item for item in told if "caption" in item[1]] == [
        ("a.png", "one of its captions is empty"),
        ("c.png", "has no caption"),
    ]
    assert (report.images, report.captions) == (3, 3)


# Sources that cannot be used at all


def fail(capsys, monkeypatch, *words):
    """The one line with which a command ends; only warnings come before it."""
    monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "")
    *warned, line = err.splitlines()
    assert all(told.startswith("warning: ") for told in warned)
    return line.removeprefix("error: ")


def toml(folder, path):
    """A small training configuration over ``folder``."""
    import tomli_w

    settings = {
        "model": tiny_model(),
        "data": {"train": str(folder), "val_fraction": 0.0},
        "train": {"batch_size": 3, "epochs": 1, "precision": "fp32"},
    }
    path.write_text(tomli_w.dumps(settings))
    return path


def commands(source, tmp_path, model):
    """Every command that reads data, over one source."""
    return [
        ["train", toml(source, tmp_path / "t.toml"), "--out", tmp_path / "out"],
        ["embed", source, "--out", tmp_path / "out", "--model", model],
        ["index", "build", source, "--out", tmp_path / "out", "--model", model],
        ["classify", source, "--labels", "red,blue", "--model", model],
        ["eval", "retrieval", source, "--model", model],
        ["eval", "zero-shot", source, "--labels", "red,blue", "--model", model],
        ["data", "check", source],
    ]


@pytest.mark.parametrize("kind", ["empty", "damaged", "columns"])
def test_sources_without_images_are_one_sentence_everywhere(
    kind, tmp_path, tiny_checkpoint, capsys, monkeypatch
):
    source, sentence = {
        "empty": (tmp_path / "source", "holds no images, expected a folder of images"),
        "damaged": (tmp_path / "t.parquet", "is not an intact Parquet file"),
        "columns": (tmp_path / "t.csv", "has no image column among: bild, worte"),
    }[kind]
    (tmp_path / "source").mkdir()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "t.csv").write_text("bild,worte\na.png,hallo\n")
    for words in commands(source, tmp_path, tiny_checkpoint):
        assert sentence in fail(capsys, monkeypatch, *words), words
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*")), words


def test_pictures_that_are_all_bad_are_one_sentence(tmp_path, tiny_checkpoint, capsys, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.png").write_bytes(b"")
        (source / f"{number}.txt").write_text("a red picture")
    for words in commands(source, tmp_path, tiny_checkpoint)[:-1]:
        if words[0] == "classify":  # names each picture on a line of its own before
            continue
        line = fail(capsys, monkeypatch, *words)
        assert "is empty (0 bytes)" in line or "no image that can be read" in line, words
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert check_data(source).images == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_duplicate_keys_keep_the_first(tmp_path, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    colours = ["red", "green", "blue"]
    images = [{"bytes": png(square(colour)), "path": None} for colour in colours]
    table = pa.table({"key": ["a", "b", "a"], "image": images, "caption": colours})
    pq.write_table(table, tmp_path / "t.parquet")
    source = clipkit.open_source(tmp_path / "t.parquet", streaming=streaming)
    store = embed(source, tmp_path / "store", ColourEncoder())
    assert store.keys == ["a", "b"]
    expected = ColourEncoder().encode_images([square("red"), square("green")])
    np.testing.assert_allclose(store.vectors(), expected)
    assert list(store.skipped()) == [("a", "its key is taken by an earlier image")]


def test_a_run_that_skips_too_much_stops_and_can_be_started_again(
    colour_folder, tmp_path, capsys, monkeypatch
):
    for file in sorted(colour_folder.glob("*.png"))[:2]:
        file.write_bytes(b"")
    config, out = toml(colour_folder, tmp_path / "t.toml"), tmp_path / "run"
    line = fail(capsys, monkeypatch, "train", config, "--out", out)
    assert "rows of" in line
    assert "expected at most 5.0% in all" in line
    # Nothing was trained yet, so that the place is free for a run that allows more.
    words = [
        "clipkit",
        "train",
        str(config),
        "--out",
        str(out),
        "--set",
        "data.max_skipped_fraction=0.5",
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert f"skipped 2 items: listed in {out / 'skipped.jsonl'}" in capsys.readouterr().err
    with pytest.raises(SkipLimitError, match="5 of 12 images .*, expected at most 40%"):
        for file in sorted(colour_folder.glob("*.png"))[2:5]:
            file.write_bytes(b"")
        embed(colour_folder, tmp_path / "store", ColourEncoder(), skip_limit=0.4)


# Models and directories


def other_checkpoint(path, seed):
    from clipkit.config import parse_config
    from clipkit.models.checkpoint import save_checkpoint
    from clipkit.training.build import build_towers

    towers = build_towers(parse_config({"model": tiny_model()}).model, 0.07, seed=seed)
    return save_checkpoint(path, towers, {}, {"step": 1})


def test_an_index_whose_model_was_replaced_or_is_gone(colour_folder, tmp_path, capsys, monkeypatch):
    model, index = tmp_path / "model", tmp_path / "index"
    before = other_checkpoint(model, seed=1)
    build_index(colour_folder, index, encoder=clipkit.load_model(model))
    shutil.copytree(model, tmp_path / "kept")
    after = other_checkpoint(model, seed=2)
    line = fail(capsys, monkeypatch, "search", index, "red")
    assert before.fingerprint[:12] in line
    assert after.fingerprint[:12] in line
    assert "restore the original model" in line
    with pytest.raises(ModelMismatchError, match="clipkit index build IMAGES --out INDEX"):
        VectorIndex.open(index, encoder=clipkit.load_model(model))
    line = fail(
        capsys, monkeypatch, "embed", colour_folder, "--out", f"{index}.store", "--model", model
    )
    assert before.fingerprint[:12] in line
    shutil.rmtree(model)
    assert f"the model {model} does not exist" in fail(capsys, monkeypatch, "search", index, "red")
    shutil.move(tmp_path / "kept", model)
    monkeypatch.setattr(sys, "argv", ["clipkit", "search", str(index), "red", "-k", "2"])
    main_ends_well(capsys)


def main_ends_well(capsys):
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert not end.value.code, err
    return out


def listing(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_directories_of_something_else_are_refused_and_stay(
    colour_folder, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("a file")
    before = listing(tmp_path)
    model = ["--model", tiny_checkpoint]
    config = toml(colour_folder, tmp_path / "t.toml")
    for place in (taken, tmp_path / "file", tmp_path / "file" / "below"):
        for words in (
            ["train", config, "--out", place],
            ["embed", colour_folder, "--out", place, *model],
            ["index", "build", colour_folder, "--out", place, *model],
        ):
            line = fail(capsys, monkeypatch, *words)
            assert str(place) in line
            assert "choose another" in line
    (tmp_path / "t.toml").unlink()
    assert listing(tmp_path) == before


def test_a_foreign_manifest_beside_photos_is_no_obstacle(colour_folder, tmp_path):
    for content in ('{"name": "an app", "icons": []}', "no JSON", "[]"):
        (colour_folder / "manifest.json").write_text(content)
        index = build_index(colour_folder, tmp_path / "index", encoder=ColourEncoder())
        assert len(index) == 12
    store = tmp_path / "index.store"
    (store / "manifest.json").write_text("damaged")
    with pytest.raises(ArtifactError, match="cannot be read"):
        build_index(store, tmp_path / "other", encoder=ColourEncoder())


def test_half_written_directories_say_so(tmp_path, capsys, monkeypatch):
    partial_path(tmp_path / "store").mkdir()
    for words in (["info"], ["search"], ["index", "build", "--out", tmp_path / "index"]):
        query = ["red"] if words == ["search"] else []
        line = fail(capsys, monkeypatch, *words, tmp_path / "store", *query)
        assert "is only half-written" in line
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").touch()
    assert "without a checkpoint" in fail(capsys, monkeypatch, "info", run)
    with pytest.raises(ModelError, match="a run without a finished checkpoint"):
        clipkit.load_model(run)


# A full disk


def test_a_full_disk_while_training_costs_nothing_saved(colour_folder, tmp_path, disk):
    # A checkpoint takes 20 MB: the first one fits, the second does not.
    config = configured(colour_folder, train={"epochs": 3, "keep_last": 1})
    out = disk.path / "run"
    with pytest.raises(ArtifactError, match=r"step-6 cannot be saved \(.*disk is full.*--resume"):
        train(config, out)
    assert [path.name for path in out.glob("step-*")] == ["step-3"]
    assert not list(out.glob(".step*"))
    assert [line["step"] for line in read_log(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert clipkit.load_model(out).dim == 32
    disk.fill(leaving=0)
    with pytest.raises((ArtifactError, OSError), match=r"full|No space"):
        train(config, out, resume=True)
    assert [line["step"] for line in read_log(out) if "loss" in line][:3] == [1, 2, 3]
    disk.make_room()
    disk.grow("60m")
    assert train(config, out, resume=True).finished
    train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_full_from_the_start_leaves_the_place_free(colour_folder, disk):
    config = configured(colour_folder, train={"epochs": 1})
    disk.fill(leaving=0)
    with pytest.raises((ArtifactError, OSError), match="No space"):
        train(config, disk.path / "run")
    disk.make_room()
    assert train(config, disk.path / "run").finished


def test_a_full_disk_while_embedding_and_indexing(tmp_path, disk):
    photos, store, index = tmp_path / "photos", disk.path / "store", disk.path / "index"
    write_squares(photos)
    embed(photos, store, ColourEncoder())
    build_index(store, index)
    answer = VectorIndex.open(index).search_vectors(np.eye(3, dtype=np.float32), 4)
    square("red", shade=3).save(photos / "red" / "new.png")
    for leaving in (0, 4096, 8192):
        disk.fill(leaving)
        with pytest.raises(
            (ArtifactError, OSError), match=r"No space.*(make room|'|choose another)"
        ):
            embed(photos, store, ColourEncoder())
        with pytest.raises((ArtifactError, OSError), match=r"No space|cannot be written"):
            build_index(store, index, spec="HNSW8")
        assert len(EmbeddingStore.open(store)) == 16
        assert VectorIndex.open(index).search_vectors(np.eye(3, dtype=np.float32), 4) == answer
        disk.make_room()
    assert len(embed(photos, store, ColourEncoder())) == 17
    assert len(build_index(store, index, spec="HNSW8")) == 17


def test_a_full_disk_is_one_line_of_the_command(
    colour_folder, tiny_checkpoint, tmp_path, disk, capsys, monkeypatch
):
    config = toml(colour_folder, tmp_path / "t.toml")
    model = ["--model", tiny_checkpoint]
    embed(colour_folder, tmp_path / "store", clipkit.load_model(tiny_checkpoint))
    for leaving in (0, 4096):
        disk.fill(leaving)
        for words in (
            ["train", config, "--out", disk.path / "run"],
            ["embed", colour_folder, "--out", disk.path / "store", *model],
            ["index", "build", tmp_path / "store", "--out", disk.path / "index"],
        ):
            line = fail(capsys, monkeypatch, *words)
            assert "No space left" in line or "full" in line, line
        disk.make_room()

"""The commands, end to end: exit codes, what goes to which stream, and the values they print."""

import io
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import open_clip
import pytest
import typer
from PIL import Image

import clipkit
from clipkit import progress
from clipkit.cli import main
from clipkit.data.images import find_images, read_image
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.evaluation.classification import ClassificationResult, classification_metrics
from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.index.vector_index import VectorIndex
from clipkit.models.loading import DEFAULT_MODEL
from clipkit.models.tokenizer import CaptionTruncationWarning
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.colours import COLOURS
from tests.helpers.models import tiny_model

LABELS = list(COLOURS)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns what it printed, as (stdout, stderr)."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["clipkit", *map(str, words)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("default", CaptionTruncationWarning)  # all others are errors
            main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return clipkit.load_model(tiny_checkpoint)


@pytest.fixture
def index(run, colour_folder, tiny_checkpoint, tmp_path):
    run("index", "build", colour_folder, "--out", tmp_path / "index", "--model", tiny_checkpoint)
    return tmp_path / "index"


@pytest.fixture
def class_folder(tmp_path):
    """Six pictures in the class folders red, green and blue."""
    for name, colour in COLOURS.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(2):
            shade = tuple(max(0, value - 9 * number) for value in colour)
            Image.new("RGB", (20, 20), shade).save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def objects(out):
    return [json.loads(line) for line in out.splitlines()]


def facts(out):
    """What print_facts printed: values by name."""
    return dict(line.split("  ", 1) for line in map(str.strip, out.splitlines()))


def pictures(folder):
    keys, _ = find_images(folder)
    return keys, [read_image(folder / key) for key in keys]


# Exit codes and streams


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["index"],
        ["eval", "nonsense"],
        ["train"],
        ["train", "a.toml"],
        ["embed", "photos"],
        ["search", "index"],
        ["search", "index", "dog", "-k", "0"],
        ["search", "index", "dog", "-k", "many"],
        ["classify", "photos"],
        ["classify", "photos", "--labels", "a,b", "--nonsense"],
        ["eval", "retrieval", "photos"],
        ["tokenize"],
        ["data", "check"],
        ["info", "one", "two"],
        ["serve"],
        ["serve", "index", "--port", "70000"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_prints_no_result(run, words):
    out, err = run(*words, code=2)
    assert not out
    assert "Usage: clipkit" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["info", "nothing"], "does not exist"),
        (["search", "nothing", "dog"], "does not exist"),
        (["data", "check", "nothing"], "does not exist"),
        (["embed", "nothing", "--out", "o"], "does not exist"),
        (["index", "build", "nothing", "--out", "o"], "does not exist"),
        (["classify", "nothing", "--labels", "a,b"], "does not exist"),
        (["classify", "nothing", "--labels", "a,a"], "twice"),
        (["eval", "retrieval", "nothing", "--model", "m"], "does not exist"),
        (["eval", "zero-shot", "nothing", "--model", "m", "--labels", "a,b"], "does not exist"),
        (["train", "nothing.toml", "--out", "o"], "expected a TOML file"),
        (["serve", "nothing", "--port", "0"], "does not exist"),
        (["serve", "nothing", "--host", "0.0.0.0"], "expected a --token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_exit_1(run, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    out, err = run(*words, code=1)
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert sentence in err
    assert not list(tmp_path.iterdir())


RAISING = """
import sys
from clipkit import progress
from clipkit.cli import main
from clipkit.tasks import info
def broken(path):
    raise {error}
info.info = broken
sys.argv = ["clipkit", "info", "somewhere"]
main()
"""


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("ZeroDivisionError('a bug')", 1, "ZeroDivisionError: a bug"),
        ("FileNotFoundError(2, 'gone', 'x')", 1, "FileNotFoundError: [Errno 2] gone: 'x'"),
        ("KeyboardInterrupt", 130, ""),
        (
            "PermissionError(13, 'Permission denied', 'x')",
            1,
            "error: cannot access x: permission denied",
        ),
        (
            "OSError(28, 'No space left on device', 'x')",
            1,
            "error: the disk is full (x); finished work is saved: free some space and run the same "
            "command again",
        ),
    ],
)
def test_a_bug_shows_its_traceback_and_nothing_else_does(error, code, last):
    done = subprocess.run(
        [sys.executable, "-c", RAISING.format(error=error)], capture_output=True, text=True
    )
    assert done.returncode == code
    assert not done.stdout
    assert ("Traceback" in done.stderr) == (last[:5] not in ("", "error"))
    assert done.stderr.strip().splitlines()[-1:] == ([last] if last else [])


def test_version_and_the_module(run):
    assert run("--version") == (f"clipkit {clipkit.__version__}\n", "")
    done = subprocess.run(
        [sys.executable, "-m", "clipkit", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"clipkit {clipkit.__version__}\n")


@pytest.mark.parametrize("group", [[], ["index"], ["eval"], ["data"]], ids=" ".join)
def test_lists_of_commands_hold_whole_sentences(run, group):
    out, err = run(*group, "--help")
    assert not err
    listed = out.split("Commands:\n")[1].strip().splitlines()
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    if not group:
        names = [line.split()[0] for line in listed]
        assert names == [
            *("init", "config", "train", "embed", "index", "search", "classify", "eval"),
            *("serve", "map", "plot", "data", "tokenize", "info", "demo"),
        ]


def test_where_no_model_is_named_the_output_says_which_it_is(
    run, colour_folder, tiny_checkpoint, tmp_path, monkeypatch
):
    assert DEFAULT_MODEL == "ViT-B-32/laion2b_s34b_b79k"
    monkeypatch.setattr("clipkit.models.loading.DEFAULT_MODEL", str(tiny_checkpoint))
    for words in (
        ["embed", colour_folder, "--out", tmp_path / "store"],
        ["index", "build", colour_folder, "--out", tmp_path / "index"],
        ["classify", colour_folder, "--labels", "red,blue", "--json"],
    ):
        _, err = run(*words)
        assert f"using the model {tiny_checkpoint}; name another one with --model" in err


@pytest.mark.parametrize(
    ("words", "now"),
    [
        ("compare a b --data c", "use `clipkit eval compare`"),
        ("probe photos --model m", "use `clipkit eval probe`"),
        ("eval zeroshot photos --labels a,b", "use `clipkit eval zero-shot`"),
        ("eval retrieval photos --model m --report page.html", "use --html"),
        ("eval retrieval photos --model m --apart", "use --equal-captions apart"),
        ("eval zero-shot photos --labels a,b --report=page.html", "use --html"),
        ("classify photos --labels a,b --out page.html", "use --html, --csv or --contact-sheet"),
        ("map index --out map.html", "use --html"),
    ],
)
def test_old_spellings_are_refused_with_the_new_one(run, words, now):
    out, err = run(*words.split(), code=2)
    assert not out
    assert "was renamed" in err
    assert now in err


def test_shared_options_have_one_spelling_and_one_help_text():
    """Whichever command takes an option, its name, type and text are the same."""
    from clipkit.cli import app, options

    found = {}
    shared = {"--json", "--html", "--csv", "--model", "--precision", "--device", "--workers"}
    shared |= {"--batch-size", "--image-column", "--caption-column", "--label-column"}

    def walk(command, path):
        for name, one in getattr(command, "commands", {}).items():
            walk(one, f"{path} {name}".strip())
        own = 0
        for param in command.params:
            (name,) = param.opts[-1:]
            if param.param_type_name != "option" or name == "--help":
                continue
            panel = getattr(param, "rich_help_panel", None)
            own += panel is None
            if name in shared:
                assert panel in (options.COLUMNS, options.MACHINE, options.OUTPUT), (path, name)
                if (path, name) not in EXCEPTIONS:
                    found.setdefault(name, set()).add(param.help)
        assert own <= 9, f"{path} has {own} options of its own"

    walk(typer.main.get_command(app), "")
    assert set(found) == shared
    assert {name: texts for name, texts in found.items() if len(texts) > 1} == {}


EXCEPTIONS = {("index build", "--model"), ("map", "--html")}
"""Options that add something to the shared text."""


def test_quiet_and_verbose_stand_before_or_after_the_command(
    run, colour_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "_silent", False)
    (colour_folder / "red-1.png").write_bytes(b"")
    words = ["init", colour_folder, "--out"]
    _, err = run(*words, tmp_path / "a.toml")
    assert "train with: clipkit train" in err
    for number, place in enumerate([(0, "--quiet"), (3, "--quiet")]):
        more = [*words, tmp_path / f"b{number}.toml"]
        more.insert(*place)
        out, err = run(*more)
        assert "[train]" in out
        assert not err
    _, err = run("--quiet", "info", tmp_path / "nothing", code=1)
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    _, err = run("info", tmp_path / "nothing", "--verbose", code=1)
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_quiet_hides_progress_bars_and_status_messages(
    run, colour_folder, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "_silent", False)
    words = ["classify", colour_folder, "--model", tiny_checkpoint, "--labels", "red,blue"]
    printed = {}
    for more in ((), ("--quiet",), ()):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        out, _ = run(*words, *more)
        progress.print_status("a status")
        printed[more] = out, terminal.getvalue()
    assert "classifying" in printed[()][1]
    assert "a status" in printed[()][1]
    assert printed[("--quiet",)] == (printed[()][0], "")


def test_shells_complete_commands():
    environment = {**os.environ, "_CLIPKIT_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    environment["COMP_WORDS"] = "clipkit eval ret"
    code = "import sys; from clipkit.cli import main; sys.argv = ['clipkit']; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["retrieval"]


# tokenize


def test_tokenize_prints_open_clips_ids(run):
    texts = ["a red bicycle", "Café &amp; 日本 🎉", "", "many words " * 50]
    out, err = run("tokenize", "--json", "--", *texts)
    assert not err
    expected = open_clip.get_tokenizer("ViT-B-32")(texts).numpy()
    for text, found, row in zip(texts, objects(out), expected, strict=True):
        assert found["ids"] == row[: found["used"]].tolist()
        assert not row[found["used"] :].any()
        assert (found["text"], found["context"], len(found["tokens"])) == (text, 77, found["used"])
    assert [found["needed"] for found in objects(out)] == [5, 8, 2, 102]
    assert objects(out)[3]["lost"] == ("words " + "many words " * 12).strip()


def test_tokenize_for_people_says_what_is_cut(run):
    out, _ = run("tokenize", "a dog", "many words " * 50)
    short, long = map(facts, out.split("\n\n"))
    assert short["ids"].strip() == "49406 320 1929 49407"
    assert (short["used"].strip(), short["cut"].strip()) == ("4 of 77", "nothing")
    assert long["used"].strip() == "77 of 77, the whole text needs 102"
    assert long["cut"].strip().startswith("words many words")


# data check


def test_data_check_prints_the_report(run, colour_folder):
    report = clipkit.check_data(colour_folder)
    out, err = run("data", "check", colour_folder, "--json")
    assert (objects(out), err) == ([json.loads(json.dumps(report.to_dict()))], "")
    assert run("data", "check", colour_folder)[0] == report.render() + "\n"
    out, _ = run("data", "check", colour_folder, "--against", colour_folder, "--json")
    assert objects(out)[0]["leaks"]["exact"] == 12


def test_columns_of_any_name_can_be_named(run, colour_folder, tiny_checkpoint, tmp_path):
    table = colour_folder / "t.csv"
    table.write_text("bild;worte;farbe\nred-0.png;a red one;red\nblue-0.png;a blue one;blue\n")
    _, err = run("data", "check", table, code=1)
    assert (
        "no image column among: bild, worte, farbe; choose one with --image-column (image=)" in err
    )
    image, model = ["--image-column", "bild"], ["--model", tiny_checkpoint]
    caption, label = ["--caption-column", "worte"], ["--label-column", "farbe"]
    out, _ = run("data", "check", table, *image, *caption, *label, "--json")
    assert (objects(out)[0]["captions"], objects(out)[0]["labels"]) == (2, {"red": 1, "blue": 1})
    out, _ = run("eval", "retrieval", table, *image, *caption, *model, "--json")
    assert (objects(out)[0]["images"], objects(out)[0]["captions"]) == (2, 2)
    out, _ = run("eval", "zero-shot", table, *image, *label, *model, "--labels", "red,blue")
    assert facts(out)["images"].strip() == "2"
    out, _ = run("classify", table, *image, *model, "--labels", "red,blue", "--json")
    assert [item["key"] for item in objects(out)] == ["red-0.png", "blue-0.png"]
    run("embed", table, *image, *caption, *model, "--out", tmp_path / "store")
    captions = EmbeddingStore.open(tmp_path / "store").records()["captions"].to_pylist()
    assert captions == [["a red one"], ["a blue one"]]


# embed, index, search


def test_embed_stores_the_encoders_vectors(run, colour_folder, tiny_checkpoint, encoder, tmp_path):
    (colour_folder / "bad.png").write_bytes(b"")
    out, err = run("embed", colour_folder, "--out", tmp_path / "s", "--model", tiny_checkpoint)
    store = EmbeddingStore.open(tmp_path / "s")
    (colour_folder / "bad.png").unlink()
    keys, images = pictures(colour_folder)
    assert store.keys == keys
    np.testing.assert_allclose(store.vectors(), encoder.encode_images(images), atol=1e-6)
    assert facts(out)["images"].strip() == "12"
    assert err == f"skipped 1 item: listed in {tmp_path / 's' / 'skipped.jsonl'}\n"


def test_index_build_takes_a_store_or_images(run, colour_folder, tiny_checkpoint, tmp_path):
    model = ["--model", tiny_checkpoint]
    (colour_folder / "bad.png").write_bytes(b"")
    out, err = run("index", "build", colour_folder, "--out", tmp_path / "one", *model)
    assert facts(out)["store"].strip() == str(tmp_path / "one.store")
    assert err == f"skipped 1 item: listed in {tmp_path / 'one.store' / 'skipped.jsonl'}\n"
    out, err = run("index", "build", tmp_path / "one.store", "--out", tmp_path / "two")
    assert (facts(out)["vectors"].strip(), err) == ("12", "")
    assert VectorIndex.open(tmp_path / "two").keys == VectorIndex.open(tmp_path / "one").keys
    _, err = run("index", "build", tmp_path / "one.store", "--out", tmp_path / "two", *model)
    assert "--model is for images" in err
    _, err = run("index", "build", tmp_path / "one.store", "--out", "x", "--spec", "F", code=1)
    assert "FAISS cannot build the index spec 'F'" in err


@pytest.mark.parametrize("query", ["text", "image", "both"])
def test_search_prints_what_the_index_finds(run, index, encoder, colour_folder, query):
    words = []
    vector = np.zeros(encoder.dim, np.float32)
    if query != "image":
        words.append("a red picture")
        vector += encoder.encode_text(["a red picture"])[0]
    if query != "text":
        words += ["--image", colour_folder / "blue-2.png"]
        vector += encoder.encode_images([read_image(colour_folder / "blue-2.png")])[0]
    expected = VectorIndex.open(index).search_vectors(vector[None] / np.linalg.norm(vector), 5)[0]
    out, err = run("search", index, *words, "-k", 5, "--json")
    assert [hit["key"] for hit in objects(out)] == [hit.key for hit in expected]
    assert [hit["rank"] for hit in objects(out)] == [1, 2, 3, 4, 5]
    scores = [hit.score for hit in expected]
    assert [hit["score"] for hit in objects(out)] == pytest.approx(scores, abs=1e-6)
    assert err == f"answered by {encoder.model}\n"
    out, err = run("search", index, *words, "-k", 5)
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["rank", "score", "key"]
    assert table[1:] == [
        [str(rank), f"{hit['score']:.3f}", hit["key"]]
        for rank, hit in enumerate(objects(run("search", index, *words, "-k", 5, "--json")[0]), 1)
    ]
    assert err == f"answered by {encoder.model}\n"


def test_a_query_that_is_too_long_shows_what_was_not_read(run, index):
    out, err = run("search", index, "red " * 75 + "and never seen", "-k", 1, "--json")
    assert len(objects(out)) == 1
    warning = next(line for line in err.splitlines() if line.startswith("warning: "))
    assert "and never seen" in warning


def test_search_refuses_what_it_cannot_answer(run, index, tmp_path):
    assert "text to search for is empty" in run("search", index, " ", code=1)[1]
    assert "expected a clipkit index" in run("search", f"{index}.store", "red", code=1)[1]
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert "cannot search with" in run("search", index, "--image", tmp_path / "no.png", code=1)[1]


# classify


def test_classify_prints_the_classifiers_probabilities(
    run, colour_folder, tiny_checkpoint, encoder, tmp_path
):
    words = ["--labels", ",".join(LABELS), "--model", tiny_checkpoint]
    out, err = run("classify", colour_folder, *words, "--json")
    keys, images = pictures(colour_folder)
    classifier = clipkit.ZeroShotClassifier.from_labels(encoder, LABELS)
    expected = classifier.probabilities(encoder.encode_images(images))
    found = objects(out)
    assert [item["key"] for item in found] == keys
    for item, row in zip(found, expected, strict=True):
        scores = {p["label"]: p["score"] for p in item["predictions"]}
        assert [scores[label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-6)
        assert sum(scores.values()) == pytest.approx(1, abs=1e-6)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert err == f"classified by {encoder.model}\n"

    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "templates.txt").write_text("{} alone\n")
    own = clipkit.ZeroShotClassifier.from_labels(encoder, LABELS, ["{} alone"])
    best = own.predict(encoder.encode_images(images), keys, 1)
    words = ["--labels", tmp_path / "labels.txt", "--templates", tmp_path / "templates.txt"]
    out, _ = run("classify", colour_folder, *words, "--model", tiny_checkpoint, "-k", 1)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert rows == [[p.key, p.label, f"{p.score:.1%}"] for p in best]


def test_images_of_several_sources_keep_apart(run, tiny_checkpoint, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / folder / "x.png")
    (tmp_path / "two" / "bad.png").write_bytes(b"")
    one, two = tmp_path / "one" / "x.png", tmp_path / "two"
    words = ["--labels", "red,blue", "--model", tiny_checkpoint, "--json"]
    out, err = run("classify", one, two, *words)
    assert [item["key"] for item in objects(out)] == [str(one), f"{two}/x.png"]
    assert f"skipped {two}/bad.png: is empty (0 bytes)" in err
    _, err = run("classify", two / "bad.png", *words, code=1)
    assert "none of the images could be read (1 skipped)" in err


def test_a_file_name_cannot_command_the_terminal(run, tiny_checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / "a\x1b[31m\nb.png")
    out, _ = run("classify", tmp_path / "in", "--labels", "a,b", "--model", tiny_checkpoint)
    assert len(out.splitlines()) == 2
    assert r"a\x1b[31m\nb.png" in out
    assert "\x1b" not in out


# eval


def test_eval_retrieval_prints_the_metrics(run, colour_folder, tiny_checkpoint, encoder):
    (colour_folder / "red-1.txt").write_text("red\nvery red\n")
    (colour_folder / "red-2.txt").unlink()
    words = [colour_folder, "--model", tiny_checkpoint, "--equal-captions", "apart"]
    out, err = run("eval", "retrieval", *words, "--json")
    keys, images = pictures(colour_folder)
    used = [key for key in keys if key != "red-2.png"]
    texts = [(colour_folder / key).with_suffix(".txt").read_text().splitlines() for key in used]
    expected = retrieval_recall(
        encoder.encode_images(
            [image for key, image in zip(keys, images, strict=True) if key in used]
        ),
        encoder.encode_text([text for group in texts for text in group]),
        np.repeat(np.arange(len(used)), [len(group) for group in texts]),
    )
    (found,) = objects(out)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert (found["images"], found["captions"], found["skipped"]) == (11, 12, 1)
    assert "skipped 1 item: red-2.png: has no caption" in err
    shown = facts(run("eval", "retrieval", *words)[0])
    for name, value in expected.items():
        low, high = found["intervals"][name]
        assert shown[name].strip() == f"{value:.3f} ({low:.3f} to {high:.3f})"
        assert low <= value <= high


def test_eval_zeroshot_prints_the_metrics(run, class_folder, tiny_checkpoint, encoder):
    words = ["--model", tiny_checkpoint, "--labels", ",".join(LABELS)]
    out, _ = run("eval", "zero-shot", class_folder, *words, "--json")
    keys, images = pictures(class_folder)
    classifier = clipkit.ZeroShotClassifier.from_labels(encoder, LABELS, DEFAULT_TEMPLATES)
    probabilities = classifier.probabilities(encoder.encode_images(images))
    targets = np.array([LABELS.index(key.partition("/")[0]) for key in keys])
    result = ClassificationResult.from_probabilities(probabilities, targets)
    metrics = classification_metrics(result, np.ones((1, 6)))
    expected = {name: value[0] for name, value in metrics.items()}
    (found,) = objects(out)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert (found["images"], found["classes"], found["task"]) == (6, 3, "zero-shot")
    words[-1] = "red,green"
    assert "not among --labels: blue" in run("eval", "zero-shot", class_folder, *words, code=1)[1]


# train and info


def test_train_then_info(run, colour_folder, tmp_path, monkeypatch):
    import tomli_w

    monkeypatch.chdir(tmp_path)
    settings = {
        "model": tiny_model(),
        "data": {"train": "colours", "val_fraction": 0.25},
        "train": {"batch_size": 3, "epochs": 9, "precision": "fp32", "keep_last": 1},
    }
    (tmp_path / "t.toml").write_text(tomli_w.dumps(settings))
    (colour_folder / "red-0.txt").write_text("red " * 100)
    epochs = ["--set", "train.epochs=2"]
    _, err = run("train", "t.toml", "--out", "run", "--set", "train.epoch=2", code=1)
    assert "unknown key train.epoch; did you mean epochs?" in err
    assert not (tmp_path / "run").exists()
    out, err = run("train", "t.toml", "--out", "run", *epochs)
    printed = facts(out)
    assert printed["steps"].strip() == "6"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for name, value in manifest["detail"]["held_out"].items():
        assert printed[f"held-out {name}"].strip() == f"{value:.3f}"
    best = manifest["detail"]["best"]
    assert f"{best['value']:.3f} at step {best['step']}: run/best" in printed["best"]
    assert manifest["detail"]["cut_captions"]["cut"] == int("exceed 77 tokens" in err)

    (described,) = objects(run("info", "run", "--json")[0])
    assert described == {"path": "run", **manifest, "files": described["files"]}
    for name, size in described["files"].items():
        assert (tmp_path / "run" / name).stat().st_size == size
    assert {"config.toml", "log.jsonl", "curve.png", "step-6/manifest.json"} <= set(
        described["files"]
    )
    shown = run("info", "run")[0]
    assert "{" not in shown
    assert facts(shown)["model fingerprint"].strip() == manifest["model"]["fingerprint"]
    assert "is finished" in run("train", "t.toml", "--out", "run", *epochs, "--resume", code=1)[1]


def test_a_folder_of_images_in_place_of_an_index_says_how_to_build_one(run, colour_folder):
    advice = f"to index its images, run `clipkit index build {colour_folder} --out INDEX`"
    assert advice in run("search", colour_folder, "red", code=1)[1]
    assert advice in run("serve", colour_folder, code=1)[1]
    table = colour_folder / "my table.csv"
    table.write_text("image,caption\nred-0.png,red\n")
    assert f"clipkit index build '{table}' --out" in run("search", table, "red", code=1)[1]


def test_info_of_what_is_not_clipkits(run, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file, expected the directory" in run("info", tmp_path / "file", code=1)[1]
    assert "has no manifest.json" in run("info", tmp_path, code=1)[1]
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    assert "is not a clipkit manifest" in run("info", tmp_path, code=1)[1]

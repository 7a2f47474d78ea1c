"""Labels and templates, from the command line or from files."""

from pathlib import Path

import pytest

from clipkit.data.labels import Label, to_labels
from clipkit.data.prompts import (
    DEFAULT_TEMPLATES,
    check_labels,
    check_templates,
    label_captions,
    read_labels,
    read_templates,
)
from clipkit.errors import CaptionError


def test_labels_from_a_list():
    assert [str(label) for label in read_labels("cat, dog ,red  fox")] == ["cat", "dog", "red fox"]
    assert read_labels("cat/kitten,dog/puppy") == [
        Label("kitten", ("cat",)),
        Label("puppy", ("dog",)),
    ]


def test_labels_from_a_file(tmp_path):
    file = tmp_path / "labels"
    file.write_bytes("\ufeffcat\r\n\n  red fox  \nsalt, pepper\nécureuil\n".encode())
    expected = to_labels(["cat", "red fox", "salt, pepper", "écureuil"])
    assert read_labels(str(file)) == expected
    assert read_labels(file) == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "contains no labels"),
        (" , ", "contains no labels"),
        ("cat,,dog", "empty label at position 2"),
        ("cat", "only 'cat', .* always 1"),
        ("cat,dog,Cat", r"'Cat' twice \(first as 'cat'\)"),
        ("a,b,a", "'a' twice"),
        ("labels.txt", "labels.txt is not a file"),
        ("data/labels", "data/labels is not a file"),
        (Path("labels"), "labels is not a file"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(CaptionError, match=message):
        read_labels(labels)


@pytest.mark.parametrize("read", [read_labels, read_templates])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "contains no"), (b"\n \n", "contains no"), (b"caf\xe9 {}\n", "in UTF-8")],
)
def test_bad_files(tmp_path, read, content, message):
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(CaptionError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)


def test_templates_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a drawing of a {}.\n\n {} on {}\n")
    assert read_templates(file) == ["a drawing of a {}.", "{} on {}"]


def test_templates_that_cannot_be_used(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\na photo of a {label}.\n")
    with pytest.raises(CaptionError, match=r"'a photo of a {label}\.' has no slot"):
        read_templates(file)
    with pytest.raises(CaptionError, match="is not a file"):
        read_templates(tmp_path)


def test_captions_are_labels_times_templates():
    assert label_captions(["cat", "{x}"], ["a {}.", "{}"]) == [["a cat.", "cat"], ["a {x}.", "{x}"]]
    with pytest.raises(CaptionError, match="no slot"):
        label_captions(["cat"], ["a cat"])


def test_default_templates_serve():
    assert read_templates(None) == list(DEFAULT_TEMPLATES)
    captions = label_captions(["cat"], read_templates(None))[0]
    assert len(set(captions)) == len(DEFAULT_TEMPLATES)
    assert all("cat" in caption for caption in captions)


def test_a_label_is_a_name_with_groups_and_phrases():
    fox = Label("fox", ("animal",))
    assert (str(fox), fox.path, fox.phrases) == ("animal/fox", ("animal", "fox"), ("fox",))
    assert fox == Label("fox", ("animal",), ("fox",)) != Label("fox")
    assert not isinstance(fox, str)
    assert to_labels(["cat", fox]) == [Label("cat"), fox]
    for wrong in ({"groups": "animal"}, {"phrases": "red fox"}):
        with pytest.raises(TypeError, match="is one string"):
            Label("fox", **wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda: check_labels("cat"),
        lambda: label_captions("cat", ["a {}."]),
        lambda: label_captions(["cat"], "a {}."),
        lambda: check_templates("a {}."),
        lambda: to_labels("cat"),
    ],
)
def test_one_string_is_not_a_list_of_letters(call):
    with pytest.raises(TypeError, match="is one string, .* expected a list"):
        call()


def test_labels_of_another_type_are_refused():
    with pytest.raises(TypeError, match="labels has 3 of type int, expected strings or Labels"):
        check_labels(["cat", 3])

import json

import pytest

from clipkit.data.captions import caption_warning, clean_captions


def clean(values):
    skipped, notes = [], []
    captions = clean_captions(values, "k", skipped, notes)
    assert {item.key for item in skipped} <= {"k"}
    return captions, [item.reason for item in skipped], notes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" a dog ", ["a dog"]),
        (["a dog", "a cat"], ["a dog", "a cat"]),
        ([["a dog"], ["a cat", ["two cats"]]], ["a dog", "a cat", "two cats"]),
        ([], []),
        (None, []),
        (["a dog", None], ["a dog"]),
        ("  ", []),
        (3, ["3"]),
        (True, ["True"]),
        ("café".encode(), ["café"]),
    ],
)
def test_values_without_a_word(value, expected):
    assert clean(value) == (expected, [], [])


def test_what_is_left_out_beside_a_caption():
    assert clean(["a dog", ""])[:2] == (["a dog"], ["one of its captions is empty"])
    lost = "a caption of it is not UTF-8 and is left out"
    assert clean([b"a caf\xe9", "a dog"])[:2] == (["a dog"], [lost])


@pytest.mark.parametrize("form", [lambda value: value, str, json.dumps])
def test_objects_are_not_captions(form):
    said = "its caption is an object with the fields en, de"
    value = form({"en": "a dog", "de": "it's"})
    assert clean(value) == ([], [said], [])
    assert clean(["a cat", value]) == (["a cat"], [said], [])


@pytest.mark.parametrize("text", ["{a dog}", "{'a dog'}", "{", '{"a": 1} dog', "{" * 5000])
def test_other_texts_in_braces_are_captions(text):
    assert clean(text) == ([text], [], [])


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NULL", "None", "N/A", "<NA>", "#N/A", "\\N", "NaT"]
)
def test_words_for_a_missing_value(word):
    said = f"its caption {word!r} stands for a missing value"
    assert clean(word) == ([], [said], [])
    assert clean([f" {word} ", "a dog"]) == (["a dog"], [said], [])
    assert clean(float("nan"))[:2] == ([], ["its caption 'nan' stands for a missing value"])


@pytest.mark.parametrize("text", ["a nan bread", "nana", "None of them", "null and void", "Anna"])
def test_captions_that_hold_such_words(text):
    assert clean(text) == ([text], [], [])


PAIR = ["a dog's “ball”", 'it says "hi, you"\\']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (str(PAIR), PAIR),
        (json.dumps(PAIR), PAIR),
        (json.dumps(["a \U0001f600"]), ["a \U0001f600"]),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),
        ("['a dog'\n \"a cat's\"]", ["a dog", "a cat's"]),
        (r"['a \d dog']", [r"a \d dog"]),
        ("[ 'a dog', ]", ["a dog"]),
        ("['a dog', 'a dog']", ["a dog", "a dog"]),
        ("[]", []),
    ],
)
def test_printed_lists_are_several_captions(text, expected):
    captions, skipped, notes = clean(text)
    assert (captions, skipped) == (expected, [])
    assert notes == [
        "captions printed as lists, like \"['a dog', 'a cat']\", are read as several captions each"
    ]


def test_printed_lists_are_cleaned_like_others():
    captions, skipped, _ = clean("['a dog', '', 'nan', ' a cat ']")
    assert captions == ["a dog", "a cat"]
    assert skipped == [
        "its caption 'nan' stands for a missing value",
        "one of its captions is empty",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[a dog] on grass",
        "['a dog'] on grass",
        "['a dog'] and ['a cat']",
        "['a dog', 3]",
        "[1, 2]",
        "['a dog''a cat']",
        "[__import__('os')]",
        "['a \\x']",
        "['a dog'",
        "[" * 5000,
        "('a dog', 'a cat')",
    ],
)
def test_other_texts_in_brackets_are_one_caption(text):
    assert clean(text) == ([text], [], [])


@pytest.mark.parametrize(
    ("caption", "key", "reason"),
    [
        ("p000.jpg", "in/p000.jpg", "a file name"),
        ("in/p000.jpg", "in/p000.jpg", "a file name"),
        ("C:\\in\\p000.JPG", "000017", "a file name"),
        ("p000", "in/p000.jpg", "a file name"),
        ("two-dogs", "s.tar/two-dogs.png", "a file name"),
        ("a dog.png", "a dog.png", "a file name"),
        ("dog", "dog.png", None),
        ("a dog", "a dog.png", None),
        ("a .png of a dog", "x.png", None),
        ("17", "x.png", "mostly digits"),
        ("3.5e-07", "x.png", "mostly digits"),
        ("2024-01-31 10:30", "x.png", "mostly digits"),
        ("12 34 ab", "x.png", "mostly digits"),
        ("route 66", "x.png", None),
        ("infinity", "x.png", None),
        ("True", "x.png", "a truth value"),
        ("false", "x.png", "a truth value"),
        ("a true friend", "x.png", None),
    ],
)
def test_warnings_about_captions(caption, key, reason):
    found = caption_warning(caption, key)
    if reason is None:
        assert found is None
    else:
        assert found == f"its caption is {reason}"

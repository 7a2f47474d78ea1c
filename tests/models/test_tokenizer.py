"""Ids identical to open_clip's for any text; nothing that does not fit is lost silently."""

import html
import sys

import ftfy
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import CaptionError
from clipkit.models import bpe, tokenizer
from clipkit.models.tokenizer import CONTEXT, END, START, VOCAB, TruncationReport
from tests.helpers.captions import PIECES, reference
from tests.helpers.paths import SHARED

LONG = "a small brown dog runs over wet green grass and jumps for a red ball. " * 12

any_char = st.integers(0, sys.maxunicode).map(chr)  # every plane, surrogates too
pieces = st.sampled_from(PIECES.split(" "))
text = st.one_of(
    st.text(any_char),
    st.lists(st.one_of(pieces, st.text(any_char, max_size=3)), max_size=12).map("".join),
    st.lists(pieces, max_size=12).map(" ".join),
    st.text(st.characters(max_codepoint=0x7F)),
    st.text("abcdehlot '", max_size=200),
)


@settings(max_examples=1000, deadline=None)
@given(text)
def test_ids_equal_open_clip(text):
    assert tokenizer.encode(text) == reference().encode(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(text, max_size=5))
def test_rows_equal_open_clip(texts):
    texts = [*texts, LONG]
    rows = tokenizer.tokenize(texts, report=TruncationReport())
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, reference()(texts).numpy())


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(max_codepoint=0x7F)))
def test_fast_cleaning_equals_slow(text):
    """Of ASCII, ftfy and html mend only control characters and what follows an ampersand."""
    slow = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
    assert tokenizer._clean(text).split() == slow.split()


@pytest.mark.parametrize("word", ["ab" * 700, "lol" * 500, "a" * 999, "antidisestablishment" * 40])
def test_long_words_equal_open_clip(word):
    assert tokenizer.encode(word) == reference().encode(word)


def test_a_word_of_a_hundred_thousand_letters_ends():
    ids = tokenizer.encode("supercalifragilistic" * 5000)
    assert tokenizer.decode(ids) == "supercalifragilistic" * 5000 + " "


def test_parts_of_a_merge_were_learned_before_it():
    """On this rests the equality of one-at-a-time merging with CLIP's all-at-once merging."""
    ranks = bpe.vocabulary().ranks
    assert len(ranks) == bpe.MERGES
    assert all(max(pair) < 2 * 256 + rank for pair, rank in ranks.items())
    assert len(set(bpe.vocabulary().pieces[: 2 * 256])) == 2 * 256


def test_cache_is_bounded_and_does_not_change_ids(monkeypatch):
    monkeypatch.setattr(tokenizer, "_CACHED_CHUNKS", 3)
    chunks = tokenizer._Chunks()
    words = [f"word{i}" for i in range(10)] + ["x" * 33]
    expected = [tuple(reference().encode(word)) for word in words]
    assert [chunks[word] for word in words] == expected
    assert [chunks[word] for word in words] == expected
    assert len(chunks) <= 3
    assert "x" * 33 not in chunks


def test_all_captions_at_hand_equal_open_clip():
    files = sorted(SHARED.glob("flickr8k-112-*.parquet")) + sorted(SHARED.glob("ucm-*.parquet"))
    if not files:
        pytest.skip("../shared/data is not here")
    rows = [row for file in files for row in pq.read_table(file)["captions"].to_pylist()]
    captions = [caption for row in rows for caption in row]
    report = TruncationReport()
    np.testing.assert_array_equal(
        tokenizer.tokenize(captions, report=report), reference()(captions).numpy()
    )
    assert report.seen == len(captions)


def test_row_by_hand():
    row = tokenizer.tokenize("A photo of a CAT")[0]
    assert row[:7].tolist() == [START, 320, 1125, 539, 320, 2368, END]
    assert not row[7:].any()


def test_empty_text_is_start_and_end():
    rows = tokenizer.tokenize(["", " \t\n"])
    assert rows[:, :2].tolist() == [[START, END]] * 2
    assert not rows[:, 2:].any()
    assert tokenizer.tokenize([]).shape == (0, CONTEXT)


def test_unpaired_surrogates_read_as_replacement_characters():
    assert tokenizer.encode("a\ud83d b") == tokenizer.encode("a\ufffd b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_special_tokens_inside_a_text():
    assert tokenizer.encode("cat<END_of_text>dog") == [2368, END, 1929]


@pytest.mark.parametrize(("words", "cut"), [(75, False), (76, True), (200, True)])
def test_end_is_always_there(words, cut):
    report = TruncationReport()
    row = tokenizer.tokenize(["dog " * words], report=report)[0]
    assert row[76] == END
    assert (row[1:76] == 1929).all()
    assert report.cut == cut


def test_cutting_without_a_report_warns_and_shows_what_was_not_read():
    with pytest.warns(
        tokenizer.CaptionTruncationWarning, match=r"1 of 2 .* not read: 'dog dog'$"
    ) as seen:
        tokenizer.tokenize(["cat", "cat " * 75 + "dog dog"])
    assert seen[0].filename == __file__


def test_policy_error_refuses():
    assert tokenizer.tokenize("dog " * 75, policy="error").shape == (1, 77)
    with pytest.raises(CaptionError, match=r"needs 80 .* at most 77; .*'dog dog cat'"):
        tokenizer.tokenize(["cat", "dog " * 77 + "cat"], policy="error")


@pytest.mark.parametrize("caption", [None, 3.5, b"dog"])
def test_what_is_no_text_is_refused(caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer.tokenize(["dog", caption])


def test_report_counts_and_keeps_the_longest():
    report = TruncationReport()
    tokenizer.tokenize(["cat"] * 5 + ["dog " * n for n in range(70, 100)], report=report)
    assert (report.seen, report.cut) == (35, 24)
    assert report.share == 24 / 35
    assert report.lost_tokens == sum(range(1, 25))
    assert [case.needed for case in report.worst] == list(range(101, 91, -1))
    assert report.worst[0].lost == " ".join(["dog"] * 24)
    assert "24 of 35 captions (68.57%)" in report.render()


def test_inspect_shows_tokens_and_what_is_lost():
    seen = tokenizer.inspect("A Skateboarding Cat 😀")
    assert seen.tokens[:4] == ("<start_of_text>", "a</w>", "skateboarding</w>", "cat</w>")
    assert (seen.used, seen.needed, seen.lost) == (len(seen.ids), len(seen.ids), "")
    seen = tokenizer.inspect("dog " * 75 + "Red Fox")
    assert (seen.used, seen.needed, seen.lost) == (77, 79, "red fox")
    assert (seen.ids[0], seen.ids[-1]) == (START, END)


@settings(max_examples=200, deadline=None)
@given(text.filter(lambda t: "</w>" not in t and "<" not in t))
def test_decode_equals_open_clip(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == reference().decode(ids)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_decode_refuses_ids_outside_the_vocabulary(token):
    with pytest.raises(CaptionError, match=str(token)):
        tokenizer.decode([token])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(text, st.just(LONG), st.just("word, and — so; ")), max_size=6))
def test_split_fits_and_loses_nothing(parts):
    whole = "".join(parts)
    split = tokenizer.split_caption(whole)
    assert all(len(tokenizer.encode(piece)) <= CONTEXT - 2 for piece in split)
    assert "".join("".join(split).split()) == "".join(whole.split())


def test_split_prefers_sentences_then_clauses_then_words():
    first, second = "a dog " * 30 + "runs.", "the cat, " * 10 + "sleeps!"
    assert tokenizer.split_caption(f"{first} {second}") == [first, second]
    clauses = "a very big dog " * 12 + "barks, " + "one cat " * 20 + "sleeps"
    assert tokenizer.split_caption(clauses)[0].endswith("barks,")
    words = tokenizer.split_caption("dog " * 100)
    assert [len(piece.split()) for piece in words] == [75, 25]
    assert tokenizer.split_caption("short one. And another") == ["short one. And another"]
    assert tokenizer.split_caption("") == [""]

"""Ids equal open_clip's on many strings of the kinds that captions of the web hold."""

import random

import pytest

from clipkit.models import tokenizer
from tests.helpers.captions import PIECES, reference

WORDS = (
    "a the dog dogs man woman's boy's running through green grass, beach. red-haired THE New York "
    "2 3rd 1,000 it's don't they'll I'm we've you'd he'd skateboarding antidisestablishmentarian "
    "café naïve Zürich Ελλάδα Москва 東京 서울 مرحبا שלום हिन्दी ภาษาไทย İstanbul straße ﬁsh"
)
ENTITIES = (
    "&amp; &lt;b&gt; &quot; &#39; &nbsp; &eacute; &#x1F600; &amp;amp; &amp;lt; &copy &bogus; &"
)
EMOJI = "😀 👍🏽 👩‍👩‍👧 🏳️‍🌈 🇩🇪 ❤️ ☺ ✈️ 🤷🏻‍♀️"
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\xa0", "\u2003", "\u200b", "\u2028", "\u3000", "\x1c", ""]
CONTROLS = [
    "\x00",
    "\x07",
    "\x1b[0m",
    "\x7f",
    "\x85",
    "\x9d",
    "\ufeff",
    "\u202e",
    "\ud83d",
    "\udc80",
]
SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’…—–•°€£½²™"


def mojibake(text, source):
    """The text as it looks when its UTF-8 is read as a Windows or ISO page, once or twice."""
    for _ in range(source.choice([1, 1, 2])):
        page = source.choice(["latin-1", "cp1252", "cp1251", "mac-roman"])
        text = text.encode("utf-8", "surrogatepass").decode(page, "replace")
    return text


def word(source):
    kind = source.random()
    if kind < 0.6:
        chosen = source.choice(WORDS.split())
        return source.choice([chosen, chosen, chosen, chosen.upper(), chosen.title()])
    if kind < 0.7:
        return source.choice(SIGNS) * source.choice([1, 1, 2, 3])
    if kind < 0.85:
        return source.choice((ENTITIES + " " + EMOJI + " " + PIECES).split(" "))
    if kind < 0.9:
        return source.choice(CONTROLS)
    if kind < 0.95:
        ends = source.choice([0x7F, 0x24F, 0x2FFF, 0xFFFF, 0x10FFFF])
        return "".join(chr(source.randint(0, ends)) for _ in range(source.randint(1, 5)))
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=source.randint(1, 20)))


def string(source):
    text = "".join(
        word(source) + source.choice(SPACES if source.random() < 0.2 else SPACES[:1])
        for _ in range(source.randint(0, 14))
    )
    if source.random() < 0.1:
        text = mojibake(text, source)
    if text and source.random() < 0.1:  # cut anywhere, as a column's limit does
        text = text[: source.randrange(len(text))]
    return text


def check(count, seed):
    source = random.Random(seed)
    for number in range(count):
        text = string(source)
        found, wanted = tokenizer.encode(text), reference().encode(text)
        assert found == wanted, f"string {number}: {text!r}"


def test_a_few_thousand_strings():
    check(3000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_five_hundred_thousand_strings(part):
    check(100_000, seed=100 + part)

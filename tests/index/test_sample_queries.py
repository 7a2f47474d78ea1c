import pyarrow as pa

from clipkit.index.sample_queries import FEWEST, draw_captions, generic_captions, nonsense


def table(captions):
    return pa.table({"captions": pa.array(captions, pa.list_(pa.string()))})


def test_one_caption_each_of_images_that_have_any():
    captions = [[f"a {n}", f"b {n}", " "] if n % 3 else (None if n % 2 else []) for n in range(600)]
    found = draw_captions([table(captions[:100]), table(captions[100:])], most=200)
    assert found.source == "captions of the images"
    assert len(found.rows) == len(set(found.rows)) == 200
    assert found.rows == sorted(found.rows)
    for row, caption in zip(found.rows, found.captions, strict=True):
        assert caption in captions[row]
        assert caption.strip()
    assert {caption[0] for caption in found.captions} == {"a", "b"}
    # Spread over all: each third of the rows gives about a third.
    assert all(45 < sum(n // 200 == part for n in found.rows) < 90 for part in range(3))
    again = draw_captions([table(captions)], most=200)
    assert again == found


def test_generic_captions_where_few_have_any():
    few = [[f"a {n}"] for n in range(FEWEST - 1)]
    found = draw_captions([table(few)])
    assert (found.captions, found.rows) == (generic_captions(), [])
    assert found.source == "generic captions"
    assert draw_captions([table([*few, ["one more"]])]).source == "captions of the images"


def test_bundled_captions_and_nonsense_are_distinct():
    assert len(set(generic_captions())) == len(generic_captions()) == 240
    assert all(caption == caption.strip() for caption in generic_captions())
    assert len(set(nonsense())) > 190

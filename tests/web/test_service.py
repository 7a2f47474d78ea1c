"""The HTTP API against what the same searches give in Python."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import clipkit
from clipkit.artifacts import MANIFEST
from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.labels import parse_label
from clipkit.errors import ModelError, ModelMismatchError
from clipkit.index.calibration import Calibration, Logistic
from clipkit.index.vector_index import MINUS_WEIGHT, VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from clipkit.web import batching as vectors
from clipkit.web.collection import Collection, ServedIndex
from clipkit.web.schemas import RequestError
from tests.helpers.models import save_tiny
from tests.helpers.toys import COLOURS, png, soft, square, write_squares
from tests.helpers.web_toys import ServedEncoder, build, client, keys, scores


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("web"))


@pytest.fixture
def ask(index):
    with client(index) as asking:
        yield asking


@pytest.fixture
def searcher(index):
    return VectorIndex.open(index, encoder=ServedEncoder())


def vector(colour):
    found = np.array(COLOURS[colour]) / 255 - 0.5
    return found / np.linalg.norm(found)


def test_text_finds_what_python_finds(ask, searcher):
    answer = ask.get("/search", params={"q": "a red square", "k": 5})
    expected = searcher.search("a red square", k=5)
    assert keys(answer) == [hit.key for hit in expected]
    np.testing.assert_allclose(scores(answer), [hit.score for hit in expected], atol=1e-6)
    body = answer.json()
    assert (body["total"], body["notes"], body["matched"], body["image"]) == (24, [], None, None)
    first = body["hits"][0]
    assert (first["rank"], first["label"], first["more"]) == (1, "red", {"folder": "red"})
    assert first["probability"] is None


def test_an_image_is_sent_and_then_known_by_name(ask, searcher, index):
    data = png(square("blue", 30))
    answer = ask.post("/search", content=data, params={"k": 4})
    expected = searcher.search(image=square("blue", 30), k=4)
    assert keys(answer) == [hit.key for hit in expected]
    np.testing.assert_allclose(scores(answer), [hit.score for hit in expected], atol=1e-6)
    name = answer.json()["image"]
    again = ask.get("/search", params={"image": name, "k": 4})
    assert again.json()["hits"] == answer.json()["hits"]
    assert ask.get(f"/upload/{name}").headers["content-type"] == "image/jpeg"

    both = ask.post("/search", content=data, params={"q": "red", "k": 24})
    found = searcher.search("red", image=square("blue", 30), k=24)
    np.testing.assert_allclose(scores(both), [hit.score for hit in found], atol=1e-6)
    assert ask.get("/search", params={"image": "0" * 32}).status_code == 404


def test_minus_moves_away_from_text(ask):
    answer = ask.get("/search", params={"q": "yellow", "minus": ["red", " "], "k": 24})
    query = vector("yellow") - MINUS_WEIGHT * vector("red")
    squares = {key: vector(key.split("/")[0]) for key in keys(answer) if key.endswith("-0.png")}
    by_key = dict(zip(keys(answer), scores(answer), strict=True))
    for key, of_it in squares.items():
        assert by_key[key] == pytest.approx(query @ of_it / np.linalg.norm(query), abs=1e-6)


@pytest.fixture
def calibrated(tmp_path):
    """An index whose scores are probabilities: above 0.5 from a margin of 0.6 on, any from 0.5."""
    path = build(tmp_path)
    index = VectorIndex.open(path)
    background = np.mean([index_vector for index_vector, _ in index.shards()], axis=(0, 1))
    hit, any_match = (Logistic(10.0, constant, 0.05, ()) for constant in (-6.0, -5.0))
    calibration = Calibration(background, 0.9, 0.2, 100, "captions", hit, any_match)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["detail"]["calibration"] = calibration.to_dict()
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_hits_of_words_have_a_probability_and_no_good_match_is_said(calibrated):
    searcher = VectorIndex.open(calibrated, encoder=ServedEncoder())
    with client(calibrated) as ask:
        assert ask.get("/info").json()["calibrated"] is True
        for offset in (0, 5):
            body = ask.get("/search", params={"q": "red", "offset": offset, "k": 5}).json()
            expected = [hit.probability for hit in searcher.search("red", k=24)]
            found = [hit["probability"] for hit in body["hits"]]
            np.testing.assert_allclose(found, expected[offset : offset + 5], atol=1e-6)
            assert body["matched"] is True
            assert body["any_match"] == pytest.approx(searcher.search("red").any_match, abs=1e-6)
        words = {"q": "red", "where": "folder = 'blue'"}
        body = ask.get("/search", params=words).json()
        assert body["any_match"] < 0.5
        assert body["matched"] is False
        for other in ({"like": "red/red-0.png"}, {"q": "red", "minus": "blue"}, {}):
            body = ask.get("/search", params=other).json()
            assert (body["any_match"], body["matched"]) == (None, None)
            assert body["hits"][0]["probability"] is None


def test_opposites_are_refused(ask):
    answer = ask.post("/search", content=png(square("cyan")), params={"q": "red"})
    assert answer.status_code == 422
    assert "cancel each other out" in answer.json()["detail"]


def test_more_like_this_leaves_itself_out(ask, searcher):
    key = "green/green-1.png"
    found = searcher.search(image=square("green", 10), k=6)
    expected = [hit.key for hit in found if hit.key != key][:5]
    assert keys(ask.get(f"/similar/{key}", params={"k": 5})) == expected
    assert keys(ask.get("/search", params={"like": key, "k": 5})) == expected
    away = ask.get("/search", params={"q": "red", "unlike": "yellow/yellow-0.png", "k": 24})
    taken = ask.get("/search", params={"q": "red", "minus": "yellow", "k": 24})
    np.testing.assert_allclose(scores(away), scores(taken), atol=1e-6)
    assert ask.get("/similar/nothing.png").status_code == 404


def test_an_index_that_keeps_no_vectors_has_its_images_encoded_again(ask, monkeypatch):
    held = ask.get("/similar/blue/blue-1.png").json()["hits"]
    monkeypatch.setattr(Collection, "vector", lambda self, key: None)
    again = ask.get("/similar/blue/blue-1.png").json()["hits"]
    assert [hit["key"] for hit in again] == [hit["key"] for hit in held]
    np.testing.assert_allclose([h["score"] for h in again], [h["score"] for h in held], atol=1e-6)


def test_vectors_are_those_of_their_keys_in_an_index_of_several_parts(tmp_path):
    index = build(tmp_path)
    write_squares(tmp_path / "more", per_colour=4)
    store = embed(tmp_path / "more", tmp_path / "store", ServedEncoder())
    new = [f"{colour}/{colour}-3.png" for colour in COLOURS]
    rows = [store.keys.index(key) for key in new]
    with IndexWriter(index) as writer:
        writer.append(store.vectors()[rows], store.records().take(rows))
        writer.commit()
        writer.remove(["red/red-0.png", "green/green-1.png", "blue/blue-3.png"])
        writer.commit()
    collection = Collection(VectorIndex.open(index), ServedEncoder())
    assert len(collection.index.segments) == 2
    vectors = dict(zip(store.keys, store.vectors(), strict=True))
    assert len(collection.keys) == 29
    for key in collection.keys:
        np.testing.assert_array_equal(collection.vector(key), vectors[key])
    with pytest.raises(RequestError, match="no image with this key"):
        collection.vector("red/red-0.png")


def test_without_a_query_images_are_listed(ask, searcher):
    answer = ask.get("/search", params={"offset": 5, "k": 4})
    assert keys(answer) == searcher.keys[5:9]
    assert [hit["score"] for hit in answer.json()["hits"]] == [None] * 4
    assert [hit["rank"] for hit in answer.json()["hits"]] == [6, 7, 8, 9]


def test_pages_put_together_are_the_whole(ask):
    whole = ask.get("/search", params={"q": "cyan", "k": 24})
    parts = [
        hit
        for offset in (0, 7, 14, 21)
        for hit in ask.get("/search", params={"q": "cyan", "offset": offset, "k": 7}).json()["hits"]
    ]
    assert parts == whole.json()["hits"]
    assert keys(ask.get("/search", params={"q": "cyan", "offset": 24})) == []


@pytest.mark.parametrize("query", [{}, {"q": "magenta"}])
@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ("label = 'red'", {"red"}),
        ("label in ('red', 'blue') and folder = 'blue'", {"blue"}),
        ("label in ('red', 'green')", {"red", "green"}),
        ("folder != 'red'", set(COLOURS) - {"red"}),
        ("'E' in label and 'l' in label", {"yellow", "blue"}),
        ("label is null", set()),
        ("label > 'm'", {"magenta", "red", "yellow", "white"}),
        ("folder = 'red' or not (label != 'blue')", {"red", "blue"}),
        (" ", set(COLOURS)),
    ],
)
def test_a_condition_chooses_rows_and_keeps_their_order(ask, searcher, query, where, meant):
    everything = ask.get("/search", params={**query, "k": 24})
    answer = ask.get("/search", params={**query, "where": where, "k": 24})
    expected = [key for key in keys(everything) if key.split("/")[0] in meant]
    if not query:
        expected.sort(key=keys(everything).index)
    assert keys(answer) == expected
    assert answer.json()["total"] == len(expected)
    few = ask.get("/search", params={**query, "where": where, "k": 2})
    assert keys(few) == expected[:2]
    if query and where.strip():
        found = searcher.search(query["q"], k=24, where=where)
        assert [hit.key for hit in found] == expected


def test_weights_and_distinct_hits_are_those_of_python(ask, searcher):
    params = {"q": "yellow", "minus": "red", "minus_weight": 0.8, "k": 24}
    query = vector("yellow") - 0.8 * vector("red")
    by_key = dict(
        zip(keys(answer := ask.get("/search", params=params)), scores(answer), strict=True)
    )
    expected = query @ vector("green") / np.linalg.norm(query)
    assert by_key["green/green-0.png"] == pytest.approx(expected, abs=1e-6)

    data = png(square("blue"))
    answer = ask.post("/search", content=data, params={"q": "red", "image_weight": 0.3, "k": 24})
    query = vector("red") + 0.3 * vector("blue")
    expected = query @ vector("red") / np.linalg.norm(query)
    by_key = dict(zip(keys(answer), scores(answer), strict=True))
    assert by_key["red/red-0.png"] == pytest.approx(expected, abs=1e-6)

    apart = ask.get("/search", params={"q": "red", "distinct": True, "k": 24})
    assert keys(apart) == [hit.key for hit in searcher.search("red", k=24, distinct=True)]
    assert len(keys(apart)) < 24
    pages = [
        ask.get("/search", params={"q": "red", "distinct": True, "k": 3, "offset": offset})
        for offset in (0, 3)
    ]
    assert [key for page in pages for key in keys(page)] == keys(apart)[:6]
    far = ask.get("/search", params={"q": "red", "distinct": True, "offset": 1000})
    assert (far.status_code, "narrow the search" in far.text) == (422, True)
    for wrong in ({"minus_weight": 0}, {"image_weight": -1}, {"minus_weight": "nan"}, {"k": 0}):
        assert ask.get("/search", params={"q": "red", **wrong}).status_code == 422


def test_few_rows_among_many_are_found_by_asking_for_more(index):
    collection = Collection(VectorIndex.open(index), ServedEncoder())
    queries = np.stack([vector("red"), vector("blue")]).astype(np.float32)
    everything = collection.search(queries, 24)
    for meant in (["white"], ["black", "cyan"], [], list(COLOURS)):
        rows = np.array([key.split("/")[0] in meant for key in collection.keys])
        for k in (1, 4):
            found = collection.search(queries, k, rows)
            expected = [
                [hit for hit in hits if hit.key.split("/")[0] in meant][:k] for hits in everything
            ]
            assert [[h.score for h in hits] for hits in found] == [
                [h.score for h in hits] for hits in expected
            ]
            assert all(rows[collection.rows[hit.key]] for hits in found for hit in hits)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("labl = 'red'", "did you mean label"),
        ("year = 2020", "there is no column 'year'"),
        ("label = ", "expected columns compared with values"),
        ("label = 3", "cannot be compared with the column 'label'"),
        ("__import__('os').system('id') = 1", "expected columns compared with values"),
    ],
)
def test_invalid_conditions_are_refused(ask, where, sentence):
    answer = ask.get("/search", params={"where": where})
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_many_requests_at_a_time_share_calls_and_get_their_own_answers(index):
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask, ThreadPoolExecutor(24) as pool:
        alone = {c: ask.get("/search", params={"q": c, "k": 24}).json() for c in COLOURS}
        assert len(encoder.calls) == len(COLOURS)
        encoder.calls.clear()
        queries = [f"a {colour} square {n}" for colour in COLOURS for n in range(3)]
        encoder.gate.clear()
        asked = [pool.submit(ask.get, "/search", params={"q": q, "k": 24}) for q in queries]
        threading.Timer(0.5, encoder.gate.set).start()
        answers = [one.result() for one in asked]
        assert sorted(text for call in encoder.calls for text in call) == sorted(queries)
        assert len(encoder.calls) <= 6  # 24 where each had its own
        for query, answer in zip(queries, answers, strict=True):
            assert answer.json()["hits"] == alone[query.split()[1]]["hits"]
        text = ask.get("/metrics").text
    assert 'clipkit_requests_total{route="/search",status="200"} 32.0' in text
    assert f"clipkit_encoder_batch_size_count {len(COLOURS) + len(encoder.calls)}.0" in text
    assert "clipkit_index_images 24.0" in text


def test_a_caption_is_encoded_once(index):
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask:
        first = ask.get("/search", params={"q": "red"}).json()["hits"]
        assert ask.get("/search", params={"q": "red", "offset": 0}).json()["hits"] == first
    assert encoder.calls == [["red"]]


def test_a_caption_that_is_being_encoded_is_not_encoded_again(index):
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask, ThreadPoolExecutor(12) as pool:
        encoder.gate.clear()
        first = pool.submit(ask.get, "/search", params={"q": "red"})
        while not encoder.calls:
            time.sleep(0.01)
        others = ["red", "blue"] * 5
        asked = [pool.submit(ask.get, "/search", params={"q": text}) for text in others]
        threading.Timer(0.3, encoder.gate.set).start()
        answers = [one.result().json()["hits"] for one in asked]
        assert first.result().json()["hits"] == answers[0]
        assert all(hits == answers[n % 2] for n, hits in enumerate(answers))
    assert encoder.calls == [["red"], ["blue"]]


def test_no_more_captions_are_kept_than_meant(index, monkeypatch):
    monkeypatch.setattr(vectors, "MAX_CAPTIONS_CACHED", 2)
    encoder = ServedEncoder()
    with client(index, encoder=encoder) as ask:
        for text in ("red", "blue", "red", "green", "red", "blue"):
            ask.get("/search", params={"q": text})
    assert encoder.calls == [["red"], ["blue"], ["green"], ["blue"]]


def test_classification_is_that_of_the_classifier(ask, index):
    encoder, labels = ServedEncoder(), ["red", "green", "blue"]
    name = ask.post("/search", content=png(square("blue")), params={"k": 1}).json()["image"]
    chosen = ["red/red-1.png", "green/green-0.png"]
    for templates in ([], ["a {} thing"]):
        asked = {"labels": labels, "keys": chosen, "image": name, "templates": templates}
        answer = ask.post("/classify", json=asked).json()
        extra = {"templates": templates} if templates else {}
        classifier = ZeroShotClassifier.from_labels(encoder, labels, **extra)
        vectors = encoder.encode_images([square("blue"), square("red", 10), square("green")])
        expected = classifier.probabilities(vectors)
        assert [one["key"] for one in answer["images"]] == [None, *chosen]
        found = [one["probabilities"] for one in answer["images"]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert answer["labels"] == labels


def test_labels_may_have_synonyms(ask):
    labels = ["warm: red, yellow", "cold:  blue ; cyan"]
    answer = ask.post("/classify", json={"labels": labels, "keys": ["cyan/cyan-0.png"]}).json()
    assert answer["labels"] == ["warm", "cold"]
    parsed = [parse_label(label) for label in labels]
    classifier = ZeroShotClassifier.from_labels(ServedEncoder(), parsed)
    expected = classifier.probabilities(vector("cyan").astype(np.float32)[None])
    np.testing.assert_allclose([answer["images"][0]["probabilities"]], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"labels": ["a", "A"], "keys": ["red/red-0.png"]}, "twice"),
        ({"labels": ["a", ""], "keys": ["red/red-0.png"]}, "empty label"),
        ({"labels": ["a"], "keys": ["red/red-0.png"]}, "at least 2"),
        ({"labels": ["a", "b"]}, "no image to classify"),
        ({"labels": ["a", "b"], "keys": ["red/red-0.png"], "templates": ["x"]}, "has no slot"),
        ({"labels": ["a", "b"], "keys": ["x"], "more": 1}, "Extra inputs"),
        (
            {"labels": [str(n) for n in range(200)], "keys": ["x"], "templates": ["{}"] * 4},
            "at most 600",
        ),
    ],
)
def test_classifications_without_meaning_are_refused(ask, asked, sentence):
    answer = ask.post("/classify", json=asked)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_info_describes_the_index(ask, index):
    info = ask.get("/info").json()
    assert (info["name"], info["count"], info["spec"]) == ("index", 24, "Flat")
    assert info["model"].startswith("colours/toy")
    assert info["missing"] is None
    label, folder = info["columns"]
    assert (label["name"], label["kind"], folder["name"]) == ("label", "text", "folder")
    assert label["values"] == [[colour, 3] for colour in sorted(COLOURS)]
    assert ask.get("/health").json() == {"status": "ok"}
    schema = ask.get("/openapi.json").json()
    assert {"/search", "/classify", "/similar/{key}", "/image/{key}", "/thumb/{key}"} <= set(
        schema["paths"]
    )


def test_a_query_of_a_thousand_words_says_what_is_not_read(ask):
    answer = ask.get("/search", params={"q": "red " + "word " * 1000, "k": 3})
    assert [key.split("/")[0] for key in keys(answer)] == ["red"] * 3
    (note,) = answer.json()["notes"]
    assert note.startswith("Words after the first 75 tokens are ignored: word word")
    assert ask.get("/search", params={"q": "a" * 10_001}).status_code == 422


def test_an_image_is_read_as_those_of_the_index_were(tmp_path):
    write_squares(tmp_path / "photos")
    photo = Image.fromarray(soft(160, 120))
    photo.save(tmp_path / "photos" / "photo.jpg")
    photo.rotate(90, expand=True).save(tmp_path / "other.jpg")
    for decode in ("exact", "fast"):
        index = build_index(
            tmp_path / "photos", tmp_path / decode, encoder=ServedEncoder(), decode=decode
        )
        searcher = VectorIndex.open(index.path, encoder=ServedEncoder())
        with client(index.path) as ask:
            data = (tmp_path / "other.jpg").read_bytes()
            answer = ask.post("/search", content=data, params={"k": 17})
            expected = searcher.search(image=tmp_path / "other.jpg", k=17)
            assert keys(answer) == [hit.key for hit in expected]
            np.testing.assert_allclose(scores(answer), [hit.score for hit in expected], atol=1e-6)


def test_vectors_from_outside_are_served_with_the_model_that_is_named(tiny_checkpoint, tmp_path):
    encoder = clipkit.load_model(tiny_checkpoint)
    words = ["red", "green", "blue"]
    vectors = encoder.encode_text(words)
    clipkit.VectorIndex.from_vectors(vectors, words, path=tmp_path / "index")
    served = ServedIndex(tmp_path / "index", encoder=encoder)
    assert served.collection.encoder is encoder
    clipkit.VectorIndex.from_vectors(vectors[:2], words[:2], path=tmp_path / "other")
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "other").rename(tmp_path / "index")
    assert served.refresh()
    assert served.collection.keys == words[:2]
    assert served.collection.encoder is encoder
    with pytest.raises(ModelError, match="--model, or encoder="):
        ServedIndex(tmp_path / "index")


def test_a_model_named_for_another_index_is_refused(tiny_checkpoint, colour_folder, tmp_path):
    encoder = clipkit.load_model(tiny_checkpoint)
    clipkit.build_index(colour_folder, tmp_path / "index", encoder)
    other = clipkit.load_model(save_tiny(tmp_path / "other", seed=1))
    with pytest.raises(ModelMismatchError):
        ServedIndex(tmp_path / "index", encoder=other)

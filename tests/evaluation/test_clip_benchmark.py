"""Against CLIP_benchmark 1.6.2 itself, in an environment of its own, on the same vectors.

CLIPKIT_CLIP_BENCHMARK names the Python of that environment; without it these tests are skipped.
"""

import json
import os
import subprocess

import numpy as np
import pytest

from clipkit.evaluation.calibration import softmax
from clipkit.evaluation.classification import ClassificationResult, classification_metrics
from clipkit.evaluation.retrieval import rank_queries, relevant_pairs, retrieval_metrics
from tests.helpers.toys import unit_rows

PYTHON = os.environ.get("CLIPKIT_CLIP_BENCHMARK")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="CLIPKIT_CLIP_BENCHMARK names no Python with CLIP_benchmark"
)
PEER = """
import json, sys
import numpy as np, torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

class Model:
    def __init__(self, images, texts):
        self.images, self.texts = images, texts
    def encode_image(self, rows):
        return self.images[rows]
    def encode_text(self, rows):
        return self.texts[rows]

class Loader(list):
    pass

case = np.load(sys.argv[1], allow_pickle=False)
images, texts = torch.from_numpy(case["images"]), torch.from_numpy(case["texts"])
amp = bool(case["amp"])
model = Model(images, texts)
numbers = range(len(images))
if amp:  # what autocast makes of a tower's last product
    model = Model(images.bfloat16(), texts.bfloat16())
if "owners" in case:
    owners = case["owners"].tolist()
    mine = [[t for t, o in enumerate(owners) if o == i] for i in numbers]
    batches = [
        (torch.arange(s, min(s + 16, len(images))), mine[s : s + 16])
        for s in range(0, len(images), 16)
    ]
    tokenize = lambda rows: torch.tensor(rows, dtype=torch.long)
    found = zeroshot_retrieval.evaluate(
        model, batches, tokenize, "cpu", amp=amp, recall_k_list=[1, 5, 10]
    )
else:
    loader = Loader([(torch.arange(len(images)), torch.from_numpy(case["targets"]))])
    loader.dataset = type("Set", (), {"classes": list(range(len(texts)))})
    tokenize = lambda rows: torch.tensor([int(row) for row in rows])
    found = zeroshot_classification.evaluate(
        model, loader, tokenize, [str(n) for n in range(len(texts))], ["{c}"], "cpu", amp=amp
    )
print(json.dumps(found))
"""


@pytest.fixture
def peer(tmp_path):
    """What CLIP_benchmark says of vectors and owners, or of vectors and targets."""

    def ask(**case):
        np.savez(tmp_path / "case.npz", **{"amp": False, **case})
        words = [PYTHON, "-W", "ignore", "-c", PEER, str(tmp_path / "case.npz")]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def blurred(vectors, noise, seed):
    rows = vectors + noise * unit_rows(*vectors.shape, seed=seed)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def recalls(images, captions, image_of, caption_of):
    found = rank_queries(images, captions, image_of, caption_of)
    figures = retrieval_metrics(found, np.ones((1, len(images))))
    names = {"image": "text_to_image", "text": "image_to_text"}
    return {
        f"{theirs}_retrieval_recall@{k}": figures[f"{ours}_r{k}"][0]
        for theirs, ours in names.items()
        for k in (1, 5, 10)
    }


def test_retrieval_is_equal(peer):
    images = unit_rows(200, 32)
    owners = np.sort(np.random.default_rng(0).integers(0, 200, 900))
    owners[:200] = np.arange(200)  # each has one at least
    owners = np.sort(owners)
    captions = blurred(images[owners], 1.6, seed=1)
    theirs = peer(images=images, texts=captions, owners=owners)
    ours = recalls(images, captions, owners, np.arange(900))
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert 0.1 < ours["image_retrieval_recall@1"] < 0.9


def test_classification_is_equal(peer):
    targets = np.random.default_rng(0).integers(0, 12, 500)
    labels = unit_rows(12, 32)
    images = blurred(labels[targets], 1.8, seed=1)
    theirs = peer(images=images, texts=labels, targets=targets)
    found = ClassificationResult.from_probabilities(softmax(100 * images @ labels.T), targets)
    ours = classification_metrics(found, np.ones((1, 500)))
    names = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
    for name, own in names.items():
        assert theirs[name] == pytest.approx(ours[own][0], abs=1e-6), name
    assert 0.1 < theirs["acc1"] < 0.9


def test_it_counts_an_image_without_a_caption_as_a_failure(peer):
    """Nothing could be found for it: 0 of 0 right captions is NaN, and not above 0."""
    images = unit_rows(40, 32)
    owners = np.arange(30)  # the last ten have none
    theirs = peer(images=images, texts=images[:30], owners=owners)
    assert theirs["text_retrieval_recall@1"] == pytest.approx(30 / 40)
    ours = recalls(images, images[:30], owners, np.arange(30))
    assert ours["text_retrieval_recall@1"] == 1
    assert theirs["image_retrieval_recall@1"] == ours["image_retrieval_recall@1"] == 1


def test_it_takes_the_same_sentence_beside_another_image_for_wrong(peer):
    images = blurred(np.repeat(unit_rows(20, 32), 4, axis=0), 0.1, seed=1)
    texts = [f"scene {n // 4}" for n in range(80)]  # four images of each scene, one sentence
    captions = np.repeat(unit_rows(20, 32), 4, axis=0)
    theirs = peer(images=images, texts=captions, owners=np.arange(80))
    assert theirs["text_retrieval_recall@1"] < 0.5
    related = relevant_pairs(texts, np.arange(80), "merge")
    ours = recalls(images, captions[related.captions], related.image_of, related.caption_of)
    assert ours["text_retrieval_recall@1"] == 1
    assert ours["image_retrieval_recall@1"] == 1


def test_it_lets_a_tie_count_for_the_model(peer):
    """Vectors that are all equal know nothing; the first k of a gallery still are its k best."""
    same = np.repeat(unit_rows(1, 32), 20, axis=0)
    theirs = peer(images=same, texts=same, owners=np.arange(20))
    assert theirs["image_retrieval_recall@10"] == 0.5
    ours = recalls(same, same, np.arange(20), np.arange(20))
    assert ours["image_retrieval_recall@10"] == 0


def test_its_half_precision_makes_ties_of_what_differs(peer):
    """By default vectors are bfloat16, whose scores near 1 lie 0.004 apart."""
    images = blurred(unit_rows(1, 32).repeat(200, axis=0), 0.02, seed=1)
    captions = blurred(images, 0.002, seed=2)
    exact = peer(images=images, texts=captions, owners=np.arange(200))
    ours = recalls(images, captions, np.arange(200), np.arange(200))
    assert exact == pytest.approx(ours, abs=1e-6)
    halved = peer(images=images, texts=captions, owners=np.arange(200), amp=True)
    assert halved["image_retrieval_recall@1"] < exact["image_retrieval_recall@1"] - 0.2

"""A thousand labels in eighty templates: encoded once, in parts, and cached."""

from dataclasses import replace

import numpy as np

import clipkit
from clipkit.classifiers import zero_shot as module
from clipkit.classifiers.zero_shot import class_weights
from clipkit.data.prompts import read_labels, read_templates


def test_imagenets_names_in_eighty_templates_are_encoded_once(
    tiny_checkpoint, monkeypatch, tmp_path
):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    encoder, counts = clipkit.load_model(tiny_checkpoint), []

    def encode(self, texts, **options):
        """Cheap vectors that differ with the text."""
        counts.append(len(texts))
        rows = np.zeros((len(texts), self.dim), np.float32)
        rows[:, :2] = [(len(text), text.count("a")) for text in texts]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(type(encoder), "encode_text", encode)
    labels, templates = read_labels("imagenet"), read_templates("openai")
    first = class_weights(encoder, labels, templates)
    assert sum(counts) == 80_000
    assert max(counts) <= module._AT_ONCE  # no more are held at a time
    texts = [template.replace("{}", labels[700]) for template in templates]
    mean = encode(encoder, texts).mean(axis=0)
    np.testing.assert_allclose(first[700], mean / np.linalg.norm(mean), atol=1e-6)

    counts.clear()
    np.testing.assert_array_equal(class_weights(encoder, labels, templates), first)
    assert not counts
    # Other labels, other templates and another model are other weights.
    class_weights(encoder, labels[:10], templates)
    class_weights(encoder, labels[:100], templates[:7])
    assert sum(counts) == 800 + 700
    encoder.model = replace(encoder.model, fingerprint="another")
    class_weights(encoder, labels[:10], templates)
    assert sum(counts) == 800 + 700 + 800

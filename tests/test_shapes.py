"""Shapes in signatures are checked under pytest, and cost nothing elsewhere."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from clipkit.evaluation.retrieval import retrieval_recall
from clipkit.models.encoder import Encoder
from clipkit.training.loss import info_nce
from tests.helpers.clips import as_encoder, clip_of


def rows(n, dim):
    return torch.nn.functional.normalize(torch.ones(n, dim), dim=1)


def test_a_loss_of_fitting_shapes_passes():
    assert info_nce(rows(4, 8), rows(4, 8), torch.tensor(10.0)).ndim == 0


@pytest.mark.parametrize(
    ("images", "texts", "more"),
    [
        (rows(4, 8), rows(5, 8), {}),
        (rows(4, 8), rows(4, 9), {}),
        (rows(4, 8), rows(4, 8).long(), {}),
        (rows(4, 8), rows(4, 8), {"weights": torch.ones(5)}),
        (rows(4, 8), rows(4, 8), {"groups": torch.ones(4)}),
    ],
    ids=["rows", "dim", "dtype", "weights", "groups"],
)
def test_a_loss_of_other_shapes_is_refused(images, texts, more):
    with pytest.raises(TypeCheckError, match="info_nce"):
        info_nce(images, texts, torch.tensor(10.0), **more)


@pytest.mark.parametrize(("dim", "owners"), [(9, 3), (8, 4)])
def test_recall_of_other_shapes_is_refused(dim, owners):
    images, captions = rows(3, 8).numpy(), rows(3, dim).numpy()
    with pytest.raises(TypeCheckError, match="retrieval_recall"):
        retrieval_recall(images, captions, np.zeros(owners, np.int64))


def test_a_result_of_another_type_is_refused(monkeypatch):
    wrong = np.zeros((1, 4), np.float64)
    monkeypatch.setattr(Encoder, "_encode_batches", lambda *_: wrong)
    with pytest.raises(TypeCheckError, match="encode_images"):
        as_encoder(clip_of()).encode_images([np.zeros((4, 4, 3), np.uint8)])


def test_outside_the_tests_an_annotation_is_the_plain_type():
    code = (
        "import sys, numpy; from clipkit.shapes import Float32\n"
        "assert Float32[numpy.ndarray, 'n dim'] is numpy.ndarray\n"
        "import clipkit.models.text_encoder_numpy, clipkit.index.vector_index\n"
        "assert not {'jaxtyping', 'beartype', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

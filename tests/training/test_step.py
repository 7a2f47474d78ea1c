"""Captions with tokens left out."""

import numpy as np
import pytest
import torch

from clipkit.errors import ConfigError
from clipkit.models.tokenizer import END, START, tokenize
from clipkit.tasks.train import train
from clipkit.training.step import drop_tokens
from tests.helpers.models import tiny_model
from tests.helpers.runs import uncropped

TEXTS = ["a red fox runs over the snow !", "", "dog " * 75, "one"] * 50


def dropped(share, seed=0):
    tokens = torch.from_numpy(tokenize(TEXTS))
    return tokens, drop_tokens(tokens, share, torch.Generator().manual_seed(seed))


def test_equals_dropping_one_token_after_the_other():
    tokens, found = dropped(0.4)
    drawn = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for row, draws, short in zip(tokens.tolist(), drawn.tolist(), found.tolist(), strict=True):
        end = row.index(END)
        kept = [token for token, gone in zip(row[1:end], draws[1:end], strict=True) if not gone]
        wanted = [START, *kept, END]
        assert short == wanted + [0] * (77 - len(wanted))


def test_drops_about_the_share_asked_for():
    tokens, found = dropped(0.3)
    before, after = (int((rows.argmax(1) - 1).sum()) for rows in (tokens, found))
    assert after / before == pytest.approx(0.7, abs=0.02)
    assert torch.equal(dropped(0.0)[1], tokens)


def test_a_run_reads_captions_with_tokens_left_out(squares, tmp_path, monkeypatch):
    from clipkit.models.dual_encoder import DualEncoder

    read = []
    original = DualEncoder.forward

    def watched(self, images, tokens):
        read.append(tokens.argmax(1).numpy())
        return original(self, images, tokens)

    monkeypatch.setattr(DualEncoder, "forward", watched)
    train(uncropped(squares, tiny_model(), augment={"token_dropout": 0.5}), tmp_path / "run")
    lengths = np.concatenate(read)
    assert lengths.max() <= 4
    assert set(lengths.tolist()) > {1, 2}


def test_stored_captions_cannot_be_changed(squares, tmp_path, start):
    model = {"init_from": str(start), "lock": ["text"]}
    with pytest.raises(ConfigError, match="token_dropout"):
        train(uncropped(squares, model, augment={"token_dropout": 0.5}), tmp_path / "run")

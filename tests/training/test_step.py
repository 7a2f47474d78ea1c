"""A training step against a plain PyTorch loop, and token dropout."""

import numpy as np
import pytest
import torch

from clipkit.config import parse_config
from clipkit.data.loader import PairBatch
from clipkit.errors import ConfigError
from clipkit.models.tokenizer import END, START, tokenize
from clipkit.tasks.train import train
from clipkit.training.build import build_towers
from clipkit.training.distributed import World
from clipkit.training.optim import learning_rate
from clipkit.training.step import Trainer, drop_tokens
from tests.helpers.models import tiny_model
from tests.helpers.runs import uncropped

TEXTS = ["a red fox runs over the snow !", "", "dog " * 75, "one"] * 50


def dropped(share, seed=0):
    tokens = torch.from_numpy(tokenize(TEXTS))
    return tokens, drop_tokens(tokens, share, torch.Generator().manual_seed(seed))


def test_token_dropout_equals_a_loop_over_tokens():
    tokens, found = dropped(0.4)
    drawn = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for row, draws, short in zip(tokens.tolist(), drawn.tolist(), found.tolist(), strict=True):
        end = row.index(END)
        kept = [token for token, drop in zip(row[1:end], draws[1:end], strict=True) if not drop]
        wanted = [START, *kept, END]
        assert short == wanted + [0] * (77 - len(wanted))


def test_drops_about_the_given_fraction():
    tokens, found = dropped(0.3)
    before, after = (int((rows.argmax(1) - 1).sum()) for rows in (tokens, found))
    assert after / before == pytest.approx(0.7, abs=0.02)
    assert torch.equal(dropped(0.0)[1], tokens)


def test_a_run_drops_tokens(squares, tmp_path, monkeypatch):
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


def test_token_dropout_is_refused_with_cached_caption_features(squares, tmp_path, start):
    model = {"init_from": str(start), "lock": ["text"]}
    with pytest.raises(ConfigError, match="token_dropout"):
        train(uncropped(squares, model, augment={"token_dropout": 0.5}), tmp_path / "run")


def test_steps_equal_a_plain_pytorch_loop():
    """Ten plain steps of CLIP: one matrix of logits, one backward pass."""
    config = parse_config(
        {
            "model": tiny_model(),
            "optim": {"lr": 1e-3, "warmup": 0.2},
            "train": {"batch_size": 6, "precision": "fp32"},
        }
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(10, 6, 77, dtype=torch.int64)
    tokens[..., :4] = torch.randint(1, 49405, (10, 6, 4), generator=generator)
    tokens[..., 4] = 49407
    trainer = Trainer(build_towers(config.model, 0.07, 0), config, World())
    found = []
    for step in range(10):
        keys = [str(number) for number in range(6)]
        batch = PairBatch(keys=keys, images=images[step], tokens=tokens[step])
        report = trainer.take_step(batch, step, (step + 1) / 10)
        found.append((report.loss, report.grad_norm))

    towers = build_towers(config.model, 0.07, 0)
    clip = towers.clip.train()
    mean, std = (torch.tensor(towers.preprocess[key])[:, None, None] for key in ("mean", "std"))
    matrices = [p for p in clip.parameters() if p.ndim >= 2]
    others = [p for p in clip.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    expected = []
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / 10, config.optim)
        pixels = (images[step] / 255 - mean) / std
        of_images = torch.nn.functional.normalize(clip.encode_image(pixels), dim=-1)
        of_texts = torch.nn.functional.normalize(clip.encode_text(tokens[step]), dim=-1)
        logits = clip.logit_scale.exp() * of_images @ of_texts.T
        right = torch.arange(6)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=2e-4)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-2)  # the weights have changed

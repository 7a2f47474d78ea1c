"""Choose the arithmetic of the towers by measuring it on the machine at hand."""

import time
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def resolve_precision(setting: Precision, device: torch.device) -> Precision:
    """``"fp32"`` or ``"bf16"`` as asked; for ``"auto"``, whichever multiplies matrices faster.

    bf16 must be at least 1.3 times as fast: autocast adds conversions that a bare product hides.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    single, half = (_product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    return "bf16" if single > 1.3 * half else "fp32"


def _product_seconds(dtype: torch.dtype) -> float:
    """Least time of a 512-cubed matrix product, seconds; the first one warms up."""
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times[1:])

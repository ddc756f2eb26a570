"""What dropout multiplies by: 0 or 1 for each number, and the factor that keeps the mean.

torch draws dropout on a CPU one float a number, which was measured at a tenth of a small model's training step. Four numbers share
one draw of 64 bits here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossattention.attention.products import is_traced, is_transformed

_LEVELS = 2**16


def drawn_factors(shape: Sequence[int], dropout: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """0 with probability `dropout`, else 1, drawn in the order of `shape`; and the scale 1 / (1 - dropout) that is left to do.

    On a CPU the probability is rounded to a multiple of 2^-16, and the scale is that of the rounded one, so the mean is exact.
    """
    if not is_cheap(device):
        return torch.empty(shape, dtype=dtype, device=device).bernoulli_(1.0 - dropout), 1.0 / (1.0 - dropout)
    level = min(round(dropout * _LEVELS), _LEVELS - 1)
    factors = torch.empty(shape, dtype=dtype, device=device)
    count = factors.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:count]
    torch.ge(bits.view(factors.shape), level - _LEVELS // 2, out=factors)
    return factors, _LEVELS / (_LEVELS - level)


def is_cheap(device: torch.device) -> bool:
    """Whether these draws are taken: on a CPU, where neither a graph nor a transform looks in, which know torch's own operators."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed() and not is_traced()

"""Where a position stands: encodings that are added to a sequence, and parts that act inside attention.

Legend: n queries, m context positions, h heads, k head width, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_positions(positions: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sinusoids of the 2017 paper, sine and cosine interleaved.

    out[p, 2i] = sin(p / 10000^(2i/d)),   out[p, 2i + 1] = cos(p / 10000^(2i/d))

    Args:
        positions: positions p, any shape; need not be consecutive or start at 0.
        dim: width d of the encoding; even.
        dtype: dtype of the result; angles are computed in float32 at least.

    Returns:
        One encoding a position, `(*positions.shape, dim)`.

    Raises:
        ValueError: `dim` is odd.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5. Code that puts all sines before all cosines computes a permutation
        of these channels.

    Example:
        >>> sinusoidal_positions(torch.tensor([0, 1]), 2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])
    """
    if dim % 2:
        raise ValueError(f"sinusoidal positions need an even width, got {dim}")
    angle_dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=angle_dtype) / dim
    angles = positions.to(angle_dtype).unsqueeze(-1) * 10000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)

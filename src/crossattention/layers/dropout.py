"""Dropout that is cheap on a CPU, alone or with the residual sum after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossattention.attention.dropout import drawn_factors, is_cheap


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with cheaper draws on a CPU, and the residual sum in the same pass.

    out = x * mask / (1 - p) + residual,   mask 0 with probability p, else 1

    In evaluation, or with p = 0, out = x + residual. The draws are other ones than torch's for the same seed; p is rounded to a
    multiple of 2^-16 on a CPU.

    Args:
        p: probability of zeroing a number in training.

    Raises:
        ValueError: p outside [0, 1].

    Cost: on a CPU some 1 ns a number, where torch takes 7 (dev/LOG.md).
    Source: Srivastava et al. 2014, JMLR 15.

    Example:
        >>> x = torch.ones(2, 3)
        >>> Dropout(0.5).eval()(x, x)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Dropout of x, any shape, plus a residual of the same shape."""
        if not self.training or self.p == 0.0:
            return x if residual is None else residual + x
        if self.p == 1.0 or not is_cheap(x.device):
            dropped = super().forward(x)
            return dropped if residual is None else residual + dropped
        factors, scale = drawn_factors(x.shape, self.p, x.dtype, x.device)
        return x * factors.mul_(scale) if residual is None else torch.addcmul(residual, x, factors, value=scale)

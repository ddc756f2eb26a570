"""Norms: the root-mean-square norm, and norms of queries and keys inside attention.

The latter are parts for `CrossAttention(qk_norm=...)` and `SelfAttention(qk_norm=...)`: they keep the scores from growing with the
activations, which lets large models train stably.

Legend: z batch, h heads, g key-value heads, n queries, m context positions, k head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.parts import QueryKeyNorm


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` whose weight follows the input's dtype.

    out = x / sqrt(mean(x^2) + eps) * weight

    Under autocast torch's own leaves its fused kernel, with a warning, as the weight is wider than the input.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width) over its last dimension."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class QueryKeyLayerNorm(QueryKeyNorm):
    """Each head's queries and keys get mean 0 and variance 1, then a learned scale and shift that all heads share.

    q <- (q - mean(q)) / sqrt(var(q) + eps) * weight_q + bias_q,   k likewise with its own weight and bias

    Args:
        head_dim: width of each head's queries and keys, k.
        eps: added to the variance.
        bias: whether there is a shift.

    Source: Dehghani et al. 2023, arXiv:2302.05442, section 2 (without a shift).
    """

    def __init__(
        self,
        head_dim: int,
        *,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(head_dim, eps=eps, bias=bias, device=device, dtype=dtype)
        self.key_norm = nn.LayerNorm(head_dim, eps=eps, bias=bias, device=device, dtype=dtype)

    def normalise_queries(self, queries: Tensor) -> Tensor:
        """Queries (z, h, n, k), normalised."""
        return self.query_norm(queries)

    def normalise_keys(self, keys: Tensor) -> Tensor:
        """Keys (z, g, m, k), normalised."""
        return self.key_norm(keys)


class QueryKeyRMSNorm(QueryKeyNorm):
    """Each head's queries and keys get mean square 1, then a learned scale that all heads share.

    q <- q / sqrt(mean(q^2) + eps) * weight_q,   k likewise with its own weight

    Args:
        head_dim: width of each head's queries and keys, k.
        eps: added to the mean square.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; queries and keys of one length: Henry et al. 2020,
        arXiv:2010.04245, section 2.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim, eps=eps, device=device, dtype=dtype)
        self.key_norm = RMSNorm(head_dim, eps=eps, device=device, dtype=dtype)

    def normalise_queries(self, queries: Tensor) -> Tensor:
        """Queries (z, h, n, k), normalised."""
        return self.query_norm(queries)

    def normalise_keys(self, keys: Tensor) -> Tensor:
        """Keys (z, g, m, k), normalised."""
        return self.key_norm(keys)

"""Norms: the root-mean-square norm, and norms of queries and keys inside attention.

The latter are parts for `CrossAttention(qk_norm=...)` and `SelfAttention(qk_norm=...)`: they keep the scores from growing with the
activations, which lets large models train stably.

Legend: z batch, h heads, g key-value heads, n queries, m context positions, k head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.parts import QueryKeyNorm
from crossattention.attention.products import is_traced, is_transformed


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` whose weight follows the input's dtype.

    out = x / sqrt(mean(x^2) + eps) * weight

    Under autocast torch's own leaves its fused kernel, with a warning, as the weight is wider than the input. On a CPU torch has no
    kernel for its gradient, and writes out nine tensors; here it is one, filled in blocks that stay in the processor's cache.

    Cost: on a CPU forward and backward take a quarter of the time of torch's (dev/LOG.md); x and a number a row are kept.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width) over its last dimension."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if weight is not None and len(self.normalized_shape) == 1 and _has_own_gradient(x, weight):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            out: Tensor = _Normalised.apply(x, weight, eps)
            return out
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


_BLOCK = 1 << 17
"""Numbers that the backward pass goes through together: three such blocks of float32 fit a core's cache."""


def _has_own_gradient(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.shape[-1:] == weight.shape
        and x.numel() > 0
        and not is_transformed()
        and not is_traced()
    )


class _Normalised(torch.autograd.Function):
    """The norm with its gradients; s = 1 / sqrt(mean(x^2) + eps) is a number a row, g the gradient of the output.

    dx = s w g - x s^3 / width (x w g summed over the row),   dw = x s g summed over rows
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # torch's own steps: the same numbers, to the bit
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: of torch's own formula
            for_x, for_weight, _ = ctx.needs_input_grad
            asked = [tensor for tensor, needed in ((x, for_x), (weight, for_weight)) if needed]
            out = F.rms_norm(x, weight.shape, weight, ctx.eps)
            found = iter(torch.autograd.grad(out, asked, grad, create_graph=True))
            return next(found) if for_x else None, next(found) if for_weight else None, None
        width = x.shape[-1]
        rows, grads, scales = x.reshape(-1, width), grad.reshape(-1, width), inverse.view(-1, 1)
        d_rows, d_weight = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(weight)
        at_once = max(1, _BLOCK * torch.get_num_threads() // width)
        for begin in range(0, len(rows), at_once):
            block = slice(begin, begin + at_once)
            some, g, s, out = rows[block], grads[block], scales[block], d_rows[block]
            torch.mul(g, some, out=out)
            d_weight.addmv_(out.t(), s[:, 0])
            along = torch.mv(out, weight).unsqueeze(1)
            torch.mul(g, weight, out=out)
            out.mul_(s).addcmul_(some, along.mul_(s**3), value=-1.0 / width)
        return d_rows.view(x.shape), d_weight, None


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

"""`MemoryAttention`: attention over a learned, static memory; the feed-forward layer is the case without a softmax.

Legend: ... any leading dimensions, a query width, o output width, h heads, s slots of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention.checks import check_probability
from crossattention.attention.cross_attention import check_size

Activation = Literal["softmax"] | Callable[[Tensor], Tensor]


class MemoryAttention(nn.Module):
    """Queries read a learned memory of s slots: a B that is part of the weights and is never projected again.

    coefficients[..., h, s] = activation(x_h keys_h^T scale + key_bias)
    out                     = concat over h of (coefficients values_h) + out_bias

    With an elementwise activation, one head and scale 1 it is the feed-forward layer: keys are the rows of its first matrix, values
    the columns of its second. With "softmax" the slots are persistent vectors. The two differ in this one argument.

    Args:
        query_dim: width of the queries, a.
        slots: size of the memory, s.
        out_dim: width of the output, o; default `query_dim`.
        heads: heads h; each sees query_dim // heads of the query and gives out_dim // heads of the output.
        activation: "softmax", or an elementwise function or module such as `torch.relu` or `nn.GELU()`.
        key_bias: whether each slot has a bias on its score.
        out_bias: whether the output has a bias.
        scale: factor of the scores; default 1 / sqrt(query_dim // heads) for "softmax", 1 for an elementwise activation.
        dropout: probability of dropping a coefficient while training.
        device: device of the memory.
        dtype: dtype of the memory.

    Raises:
        ValueError: sizes below one, heads that do not divide, an unknown activation, dropout outside [0, 1).

    Cost: s (a + o) multiply-adds a query.
    Source: feed-forward layers as memories: Geva et al. 2021, arXiv:2012.14913, eq. 1-2; persistent vectors: Sukhbaatar et al.
    2019, arXiv:1907.01470, section 3.

    Example:
        >>> memory = MemoryAttention(32, slots=100, heads=4)
        >>> memory(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        query_dim: int,
        slots: int,
        *,
        out_dim: int | None = None,
        heads: int = 1,
        activation: Activation = "softmax",
        key_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_dim = query_dim if out_dim is None else out_dim
        for name, size in (("query_dim", query_dim), ("slots", slots), ("out_dim", out_dim), ("heads", heads)):
            check_size(name, size)
        if query_dim % heads or out_dim % heads:
            raise ValueError(
                f"heads must divide query_dim and out_dim, got heads={heads}, query_dim={query_dim}, out_dim={out_dim}"
            )
        if isinstance(activation, str) and activation != "softmax":
            raise ValueError(f'activation must be "softmax" or an elementwise function such as torch.relu, got {activation!r}')
        check_probability("dropout", dropout)
        self.query_dim, self.slots, self.out_dim, self.heads = query_dim, slots, out_dim, heads
        self.activation, self.dropout = activation, dropout
        default = (query_dim // heads) ** -0.5 if activation == "softmax" else 1.0
        self.scale = default if scale is None else float(scale)
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keys = nn.Parameter(torch.empty(heads, slots, query_dim // heads, **kwargs))
        self.values = nn.Parameter(torch.empty(heads, slots, out_dim // heads, **kwargs))
        self.key_bias = nn.Parameter(torch.empty(heads, slots, **kwargs)) if key_bias else None
        self.out_bias = nn.Parameter(torch.empty(out_dim, **kwargs)) if out_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys such that scores of unit queries have unit variance, values of variance 1 / slots, zero biases."""
        nn.init.normal_(self.keys, std=1.0 if self.activation == "softmax" else (self.query_dim // self.heads) ** -0.5)
        nn.init.normal_(self.values, std=self.slots**-0.5)
        for bias in (self.key_bias, self.out_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Let every query read the memory.

        Args:
            x: queries (..., a).

        Returns:
            (..., o).

        Raises:
            ValueError: wrong width.
        """
        coefficients = F.dropout(self.coefficients(x), self.dropout, self.training)
        read = torch.einsum("...hs,hso->...ho", coefficients, self.values).flatten(-2)
        return read if self.out_bias is None else read + self.out_bias

    def coefficients(self, x: Tensor) -> Tensor:
        """What each query gives to each slot, (..., h, s): weights that sum to one for "softmax", activations otherwise.

        Args:
            x: queries (..., a).

        Raises:
            ValueError: wrong width.
        """
        if x.shape[-1] != self.query_dim:
            raise ValueError(
                f"queries have width {x.shape[-1]} but this memory was built with query_dim={self.query_dim}; got {tuple(x.shape)}"
            )
        scores = torch.einsum("...ha,hsa->...hs", x.unflatten(-1, (self.heads, -1)) * self.scale, self.keys)
        if self.key_bias is not None:
            scores = scores + self.key_bias
        return scores.softmax(-1) if isinstance(self.activation, str) else self.activation(scores)

    @classmethod
    def from_feed_forward(cls, feed_forward: nn.Module) -> MemoryAttention:
        """The memory that a feed-forward layer is: the same function, biases and dropout between its matrices included.

        Args:
            feed_forward: `nn.Sequential(Linear, activation, [Dropout], Linear, [Dropout])`; or a module with `up_proj`,
                `activation`, `down_proj`, or with `linear1`, `activation`, `linear2` (torch's transformer layers). Its weights are
                copied.

        Returns:
            A memory with one head, the first matrix's rows as keys and the second one's columns as values.

        Raises:
            TypeError: a module of another shape, or a gated one; a Dropout at the end, which acts on the output, not on memory.

        Source: Geva et al. 2021, arXiv:2012.14913, eq. 1-2.

        Example:
            >>> ff = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            >>> x = torch.randn(3, 8)
            >>> torch.allclose(MemoryAttention.from_feed_forward(ff)(x), ff(x), atol=1e-6)
            True
        """
        first, activation, second, dropout = _feed_forward_pieces(feed_forward)
        if first.out_features != second.in_features:
            raise TypeError(
                f"from_feed_forward expects an elementwise activation, but the first Linear gives {first.out_features} hidden "
                f"units and the second takes {second.in_features}; a gated layer (GLU) is no memory of keys and values"
            )
        memory = cls(
            first.in_features,
            first.out_features,
            out_dim=second.out_features,
            activation=activation,
            key_bias=first.bias is not None,
            out_bias=second.bias is not None,
            dropout=dropout,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        with torch.no_grad():
            memory.keys.copy_(first.weight[None])
            memory.values.copy_(second.weight.T[None])
            if memory.key_bias is not None:
                memory.key_bias.copy_(first.bias[None])
            if memory.out_bias is not None:
                memory.out_bias.copy_(second.bias)
        return memory.train(feed_forward.training)

    def extra_repr(self) -> str:
        """The sizes that tell this memory from another."""
        kind = self.activation if isinstance(self.activation, str) else getattr(self.activation, "__name__", "module")
        return f"query_dim={self.query_dim}, slots={self.slots}, out_dim={self.out_dim}, heads={self.heads}, activation={kind}"


FEED_FORWARD_NAMES = (("up_proj", "activation", "down_proj"), ("linear1", "activation", "linear2"))


def _feed_forward_pieces(module: nn.Module) -> tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear, float]:
    """First matrix, activation, second matrix and the dropout between them."""
    if isinstance(module, nn.Sequential):
        return _sequential_pieces(module)
    for names in FEED_FORWARD_NAMES:
        first, activation, second = (getattr(module, name, None) for name in names)
        if isinstance(first, nn.Linear) and callable(activation) and isinstance(second, nn.Linear):
            inner = getattr(module, "dropout", None)
            return first, activation, second, inner.p if isinstance(inner, nn.Dropout) else float(inner or 0.0)
    raise TypeError(
        "from_feed_forward expects nn.Sequential(Linear, activation, Linear) or a module with "
        + " or ".join(", ".join(names) for names in FEED_FORWARD_NAMES)
        + f"; got {type(module).__name__}"
    )


def _sequential_pieces(module: nn.Sequential) -> tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear, float]:
    pieces = [piece for piece in module if not isinstance(piece, nn.Identity)]
    dropouts = [(place, piece.p) for place, piece in enumerate(pieces) if isinstance(piece, nn.Dropout)]
    rest = [piece for piece in pieces if not isinstance(piece, nn.Dropout)]
    kinds = " -> ".join(type(piece).__name__ for piece in module)
    if len(rest) != 3 or not isinstance(rest[0], nn.Linear) or not isinstance(rest[2], nn.Linear) or isinstance(rest[1], nn.Linear):
        raise TypeError(f"from_feed_forward expects Linear -> activation -> [Dropout] -> Linear, got {kinds}")
    kept = 1.0
    for place, probability in dropouts:
        if place < pieces.index(rest[1]) or (place > pieces.index(rest[2]) and probability > 0.0):
            raise TypeError(
                f"from_feed_forward takes over a Dropout between activation and second Linear only, got {kinds}; apply the other "
                "one outside the memory"
            )
        kept *= 1.0 if place > pieces.index(rest[2]) else 1.0 - probability
    return rest[0], rest[1], rest[2], 1.0 - kept

"""`CrossAttentionBlock`: cross-attention and a feed-forward layer with their norms and residual sums, to stand in any model.

Legend: z batch, r repeats (beams, samples) on one context, n queries, m context length, a/b widths of A and B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crossattention.attention import CrossAttention, PreparedContext
from crossattention.attention.checks import check_above_zero, check_bool, check_probability
from crossattention.attention.cross_attention import check_is_tensor, check_size
from crossattention.layers.dropout import Dropout
from crossattention.layers.feed_forward import FeedForward

NormLayer = Callable[..., nn.Module]
"""Makes a norm: called with a width, eps, device and dtype, as `torch.nn.LayerNorm` and `crossattention.layers.RMSNorm` are."""


class Reading(NamedTuple):
    """What a part asks its attention: `attention_map(*part.reading(a, b))` are the weights of it.

    Args:
        layer: the attention inside.
        queries: what it gets as A.
        context: what it gets as B, raw or prepared.
    """

    layer: CrossAttention
    queries: Tensor
    context: Tensor | PreparedContext


class CrossAttentionBlock(nn.Module):
    """A reads B, then a feed-forward layer; a residual sum and a norm around each.

    pre:   x = a + g1 dropout(attention(norm(a), c)),    out = x + g2 dropout(feed_forward(norm(x)))
    post:  x = norm(a + dropout(attention(a, c))),       out = norm(x + dropout(feed_forward(x)))

    c is B, or its norm with `context_norm`. The factors g are 1; of a gated block they are tanh of a learned number that starts at
    0, so that the block begins as the identity, to the bit, and a trained model that it is put into keeps its outputs.

    Args:
        query_dim: width of A, a, and of the output.
        context_dim: width of B, b; default `query_dim`.
        heads: number of query heads.
        hidden_dim: width inside the feed-forward layer; default 4 * query_dim; 0 leaves the layer out.
        norm: "pre" normalises what each sublayer reads, "post" each sum.
        context_norm: whether B is normalised before it is projected, as Perceiver does; B from an encoder that ends with a norm
            needs none.
        query_residual: whether A is added to what it reads; Perceiver IO leaves it out of some decoders.
        gated: whether both sums have a gate that starts at zero; with norm="pre" only.
        activation: of the feed-forward layer, as for `FeedForward`; default "gelu".
        bias: whether the projections of both sublayers have biases.
        dropout: probability of dropping a number of a sublayer's output while training.
        attention_dropout: probability of dropping a weight while training.
        norm_layer: makes each norm, as `torch.nn.LayerNorm` or `RMSNorm`.
        norm_eps: given to `norm_layer`.
        device: device of the weights.
        dtype: dtype of the weights.
        attention: further arguments of `CrossAttention`: head_dim, value_head_dim, kv_heads, qk_norm, positions, scale, plan.

    Raises:
        ValueError: a size that `CrossAttention` or `FeedForward` refuses, an unknown norm, a gate after which a norm follows or
            without a residual, an output of another width.
        TypeError: an argument of another kind, or one that `CrossAttention` does not know.

    Cost: that of the attention (see `print(block.attention.plan_for(a.shape, b.shape))`) and 2 a hidden_dim multiply-adds a query.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1 (post); the gated block: Alayrac et al. 2022, arXiv:2204.14198,
    section 2.2; norms of both sequences: Jaegle et al. 2021, arXiv:2107.14795, appendix E.

    Example:
        >>> block = CrossAttentionBlock(48, 32, heads=4, gated=True)
        >>> a, b = torch.randn(2, 5, 48), torch.randn(2, 7, 32)
        >>> torch.equal(block(a, b), a)
        True
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        heads: int = 8,
        hidden_dim: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        context_norm: bool = False,
        query_residual: bool = True,
        gated: bool = False,
        activation: str | nn.Module | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        check_size("query_dim", query_dim)
        if norm not in ("pre", "post"):
            raise ValueError(f'norm must be "pre" or "post", got {norm!r}')
        switches = {"bias": bias, "context_norm": context_norm, "query_residual": query_residual, "gated": gated}
        for name, value in switches.items():
            check_bool(name, value)
        check_probability("dropout", dropout)
        check_above_zero("norm_eps", norm_eps)
        if not callable(norm_layer):
            raise TypeError(
                f"norm_layer must make norms, as torch.nn.LayerNorm does, got {type(norm_layer).__name__} {norm_layer!r}"
            )
        if attention.get("out_dim", query_dim) != query_dim:
            raise ValueError(
                f"out_dim must be query_dim={query_dim}, the width that is added to, got {attention['out_dim']}; leave it out"
            )
        if gated and (norm == "post" or not query_residual):
            why = "a norm after the sum" if norm == "post" else "no residual"
            raise ValueError(f'a gated block begins as the identity, which {why} forbids; take norm="pre" with query_residual=True')
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm, self.query_residual = norm, query_residual
        self.attention = CrossAttention(
            query_dim, context_dim, heads=heads, bias=bias, dropout=attention_dropout, **attention, **kwargs
        )
        make_norm = lambda width: norm_layer(width, eps=norm_eps, **kwargs)  # noqa: E731
        self.attention_norm = make_norm(query_dim)
        self.context_norm = make_norm(self.attention.context_dim) if context_norm else None
        hidden_dim = 4 * query_dim if hidden_dim is None else hidden_dim
        has_feed_forward = not (isinstance(hidden_dim, int) and not isinstance(hidden_dim, bool) and hidden_dim == 0)
        if has_feed_forward:
            check_size("hidden_dim", hidden_dim)
        elif activation is not None:
            raise ValueError(
                f"activation is of the feed-forward layer, which hidden_dim=0 leaves out, got {activation!r}; leave it out"
            )
        activation = "gelu" if activation is None else activation
        self.feed_forward = (
            FeedForward(query_dim, hidden_dim, activation=activation, bias=bias, **kwargs) if has_feed_forward else None
        )
        self.feed_forward_norm = make_norm(query_dim) if has_feed_forward else None
        self.dropout = Dropout(dropout)
        self.attention_gate = nn.Parameter(torch.zeros(1, **kwargs)) if gated else None
        self.feed_forward_gate = nn.Parameter(torch.zeros(1, **kwargs)) if gated and has_feed_forward else None

    def forward(self, a: Tensor, b: Tensor, *, context_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Let A read B: `attend(a, prepare(b, query_length=n, uses=1))` by the same plan.

        Args:
            a: queries (z, n, a); learned queries (n, a); or (z, r, n, a), r sequences that read one B.
            b: context (z, m, b); any length m, also 0.
            context_mask: bool (z, m), True = may be attended.
            options: attn_mask, query_positions, context_positions, as for `CrossAttention`.

        Returns:
            (z, n, a), or (z, r, n, a). A query that may attend nothing reads the output bias of the attention.

        Raises:
            ValueError: as `CrossAttention`.
            TypeError: as `CrossAttention`.
        """
        update = self.attention(self.enter(a), self.enter_context(b), context_mask=context_mask, **options)
        return self.transform(self.leave(a, update))

    def prepare(self, b: Tensor, **hints: Any) -> PreparedContext:
        """Make of B, once, what `attend` reads any number of times.

        Args:
            b: context (z, m, b).
            hints: context_mask, query_length, repeats, uses, shares_queries, context_positions, as for `CrossAttention.prepare`.

        Returns:
            The prepared context of this block. It is refused after the weights that made it changed, those of `context_norm`
            included.
        """
        prepared = self.attention.prepare(self.enter_context(b), **hints)
        if self.context_norm is None or prepared.stamp.owner is None:
            return prepared
        return replace(prepared, stamp=prepared.stamp.followed_by(self._norm_weights()))

    def attend(self, a: Tensor, prepared: PreparedContext, **options: Any) -> Tensor:
        """Let A read a prepared context.

        Args:
            a: queries (z, n, a), learned queries (n, a), or (z, r, n, a): r beams or samples that share the context.
            prepared: result of this block's `prepare`. Not changed.
            options: attn_mask, query_positions, as for `CrossAttention.attend`.

        Returns:
            (z, n, a), or (z, r, n, a).

        Raises:
            ValueError: as `CrossAttention.attend`.
            TypeError: as `CrossAttention.attend`.
        """
        update = self.attention.attend(self.enter(a), self.of_attention(prepared), **options)
        return self.transform(self.leave(a, update))

    # --------------------------------------------------------------- the steps, for parts that put something between them

    def enter(self, a: Tensor) -> Tensor:
        """What the attention gets of A."""
        self._check("queries", a, self.attention.query_dim, "query_dim")
        return self.attention_norm(a) if self.norm == "pre" else a

    def enter_context(self, b: Tensor) -> Tensor:
        """What the attention gets of B."""
        if self.context_norm is None:
            return b  # the attention checks it
        self._check("context", b, self.attention.context_dim, "context_dim")
        return self.context_norm(b)

    def leave(self, a: Tensor, update: Tensor) -> Tensor:
        """A after its attention gave `update`."""
        if not self.query_residual:
            x = self.dropout(update)
        else:
            x = self.dropout(_gate(update, self.attention_gate), a.expand_as(update))
        return x if self.norm == "pre" else self.attention_norm(x)

    def transform(self, x: Tensor) -> Tensor:
        """What the feed-forward layer, its sum and its norm make of x."""
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        if self.norm == "post":
            return self.feed_forward_norm(self.dropout(self.feed_forward(x), x))
        return self.dropout(_gate(self.feed_forward(self.feed_forward_norm(x)), self.feed_forward_gate), x)

    def of_attention(self, prepared: PreparedContext) -> PreparedContext:
        """This block's prepared context as its attention knows it: the weights of `context_norm` are checked and left out."""
        if self.context_norm is None or torch.compiler.is_compiling():
            return prepared
        if not isinstance(prepared, PreparedContext) or prepared.stamp.owner is None:
            return prepared
        named = self._norm_weights()
        changed = prepared.stamp.changed_among(named)
        if changed:
            raise ValueError(
                f"this prepared context is out of date: {', '.join(changed)} changed since prepare, or another layer made it; "
                "call this block's prepare(b)"
            )
        return replace(prepared, stamp=prepared.stamp.without(*(name for name, _ in named)))

    def reading(self, a: Tensor, b: Tensor | PreparedContext) -> Reading:
        """What the attention inside is asked, for `attention_map(block, a, b)`."""
        context = self.of_attention(b) if isinstance(b, PreparedContext) else self.enter_context(b)
        return Reading(self.attention, self.enter(a), context)

    def _check(self, name: str, tensor: Tensor, width: int, argument: str) -> None:
        """Refuse what a norm would not take, in the words of the attention."""
        check_is_tensor(name, tensor)
        self.attention._check_tensor(name, tensor)
        given = tensor.shape[-1] if tensor.dim() else "none"
        if given != width:
            raise ValueError(
                f"{name} of width {given} where this block was built with {argument}={width}; got shape {tuple(tensor.shape)}; "
                f"project them first or build CrossAttentionBlock({argument}=...) for their width"
            )

    def _norm_weights(self) -> list[tuple[str, Tensor]]:
        assert self.context_norm is not None
        return [(f"context_norm.{name}", weight) for name, weight in self.context_norm.named_parameters()]


def _gate(update: Tensor, gate: Tensor | None) -> Tensor:
    return update if gate is None else update * gate.tanh()

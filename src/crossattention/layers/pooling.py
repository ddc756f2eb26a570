"""Learned queries that read a long B and come out as few vectors: `AttentionPool` once, `Resampler` in several layers.

Legend: z batch, n learned queries or latents, m context length, a/b widths of the queries and of B.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossattention.attention import PreparedContext
from crossattention.attention.checks import check_bool
from crossattention.attention.cross_attention import check_size
from crossattention.attention.sharded import PreparedShard
from crossattention.layers.blocks import CrossAttentionBlock, NormLayer, Reading

_PREPARED = (PreparedContext, PreparedShard)


class AttentionPool(nn.Module):
    """Learned queries read B: a sequence of any length becomes n vectors.

    x = attention(queries, c)                                    c is B, or its norm with `context_norm`
    out = x                                                      without a feed-forward layer, the default
    out = x + feed_forward(norm(x))                              with one: the map head of vision transformers
    out = norm(y + feed_forward(y)),   y = norm(queries + x)     with norm="post": pooling by attention of the Set Transformer

    Args:
        query_dim: width of the learned queries and of the output, a.
        context_dim: width of B, b; default `query_dim`.
        num_queries: how many vectors come out, n.
        heads: number of query heads.
        hidden_dim: width inside the feed-forward layer; default 0, none.
        norm: "pre" or "post", see above; without a feed-forward layer "post" gives y.
        context_norm: whether B is normalised before it is projected.
        device: device of the weights.
        dtype: dtype of the weights.
        options: further arguments of `CrossAttentionBlock`, which see: activation, bias, dropout, attention_dropout, norm_layer,
            norm_eps, and those of `CrossAttention`.

    Raises:
        ValueError: as `CrossAttentionBlock`; fewer than one query.
        TypeError: as `CrossAttentionBlock`; an argument that has no sense here, as gated.

    Cost: the queries are projected once for the whole batch; one query reads B as it is, without keys and values
        (`print(pool.block.attention.plan_for(pool.queries.shape, b.shape))`).
    Source: the map head: Zhai et al. 2022, arXiv:2106.04560, as timm's `AttentionPoolLatent` computes it; with norm="post": Lee et
        al. 2019, arXiv:1810.00825, section 3.2, whose row-wise layer on B before it is left to the caller.

    Example:
        >>> pool = AttentionPool(48, 32, num_queries=2, heads=4)
        >>> pool(torch.randn(3, 700, 32)).shape
        torch.Size([3, 2, 48])
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        num_queries: int = 1,
        heads: int = 8,
        hidden_dim: int = 0,
        norm: Literal["pre", "post"] = "pre",
        context_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_size("num_queries", num_queries)
        _refuse("AttentionPool", options, {"gated": "there is no input to keep", "query_residual": 'norm="post" adds the queries'})
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.block = CrossAttentionBlock(
            query_dim,
            context_dim,
            heads=heads,
            hidden_dim=hidden_dim,
            norm=norm,
            context_norm=context_norm,
            query_residual=norm == "post",
            **options,
            **kwargs,
        )
        if norm == "pre":
            self.block.attention_norm = nn.Identity()  # learned queries are what training makes of them
        self.queries = nn.Parameter(torch.empty(num_queries, query_dim, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries anew, normal with variance 1 / a: each about as long as a unit vector."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, b: Tensor, *, context_mask: Tensor | None = None, **options: Any) -> Tensor:
        """What the queries read of B: `attend(prepare(b))`.

        Args:
            b: context (z, m, b); any length m, also 0.
            context_mask: bool (z, m), True = may be attended.
            options: attn_mask, query_positions, context_positions, as for `CrossAttention`.

        Returns:
            (z, n, a). If nothing of B may be attended, x is the attention's output bias.

        Raises:
            ValueError: as `CrossAttention`.
            TypeError: as `CrossAttention`.
        """
        return self.block(self.queries, b, context_mask=context_mask, **options)

    def prepare(self, b: Tensor, *, uses: int = 1, **options: Any) -> PreparedContext:
        """Make of B, once, what `attend` reads: keys and values, or B itself.

        Args:
            b: context (z, m, b).
            uses: hint: how many reads there will be; that n shared queries read is known.
            options: context_mask, context_positions, as for `CrossAttention.prepare`.
        """
        return self.block.prepare(b, query_length=self.queries.shape[0], uses=uses, shares_queries=True, **options)

    def attend(self, prepared: PreparedContext, **options: Any) -> Tensor:
        """What the queries read of a prepared context, (z, n, a); attn_mask and query_positions as for `CrossAttention.attend`."""
        return self.block.attend(self.queries, prepared, **options)

    def reading(self, a: None, b: Tensor | PreparedContext) -> Reading:
        """What the attention inside is asked, for `attention_map(pool, None, b)`."""
        _check_no_queries("AttentionPool", a)
        return self.block.reading(self.queries, b)


class Resampler(nn.Module):
    """Learned latents read a long B, layer after layer: a sequence of any length becomes n vectors that know of each other.

    x <- x + attention(norm(x), [norm(B); norm(x)])        queries from x; keys and values from B and, after it, x
    x <- x + feed_forward(norm(x))                         in each layer
    out = norm(x)                                          after the last

    So the latents read B and one another by the same softmax, as in Flamingo, whose authors found it slightly better than B alone.
    With reads_latents=False they read B alone, as Perceiver's latents do.

    Args:
        query_dim: width of the latents and of the output, a.
        context_dim: width of B, b; default `query_dim`. Where it is another one and the latents are read too, B is first projected
            to a, once for all layers.
        num_latents: how many vectors come out, n.
        num_layers: how many layers there are.
        heads: number of query heads.
        hidden_dim: width inside the feed-forward layers; default 4 * query_dim; 0 leaves them out.
        reads_latents: whether the latents are among what is read.
        norm_layer: makes each norm, as `torch.nn.LayerNorm`.
        norm_eps: given to `norm_layer`.
        bias: whether the projections have biases; Flamingo's have none.
        device: device of the weights.
        dtype: dtype of the weights.
        options: further arguments of `CrossAttentionBlock`, which see: activation, dropout, attention_dropout, and those of
            `CrossAttention` but positions. Modules among them are copied for each layer.

    Raises:
        ValueError: as `CrossAttentionBlock`; fewer than one latent or layer.
        TypeError: as `CrossAttentionBlock`; an argument that has no sense here, as norm, gated or positions.

    Cost: n (m + n) scores a head and layer. In the first layer the latents are projected once for the whole batch.
    Source: Alayrac et al. 2022, arXiv:2204.14198, section 2.1 and appendix A.1.1; the last norm is that of its published
        reimplementations. Positions or times of B are added before it, as there.

    Example:
        >>> resampler = Resampler(48, 32, num_latents=6, num_layers=2, heads=4)
        >>> resampler(torch.randn(3, 700, 32)).shape
        torch.Size([3, 6, 48])
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        num_latents: int = 64,
        num_layers: int = 6,
        heads: int = 8,
        hidden_dim: int | None = None,
        reads_latents: bool = True,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("query_dim", query_dim), ("num_latents", num_latents), ("num_layers", num_layers)):
            check_size(name, size)
        check_bool("reads_latents", reads_latents)
        check_bool("bias", bias)
        reasons = {
            "norm": "norms stand before each sublayer",
            "context_norm": "B is normalised in every layer",
            "gated": "there is no input to keep",
            "query_residual": "every layer has one",
            "positions": "latents have none; add positions to B",
        }
        _refuse("Resampler", options, reasons)
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        context_dim = query_dim if context_dim is None else context_dim
        self.reads_latents = reads_latents
        self.context_proj = None
        if reads_latents and context_dim != query_dim:
            check_size("context_dim", context_dim)
            self.context_proj = nn.Linear(context_dim, query_dim, bias=bias, **kwargs)
            context_dim = query_dim
        given = {"heads": heads, "hidden_dim": hidden_dim, "norm_layer": norm_layer, "norm_eps": norm_eps, "bias": bias, **options}
        self.layers = nn.ModuleList(
            CrossAttentionBlock(query_dim, context_dim, context_norm=True, **copy.deepcopy(given), **kwargs)
            for _ in range(num_layers)
        )
        self.norm = norm_layer(query_dim, eps=norm_eps, **kwargs)
        self.latents = nn.Parameter(torch.empty(num_latents, query_dim, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the latents anew, normal with variance 1, so that they differ from one another as much as normalised rows do."""
        nn.init.normal_(self.latents)

    def forward(self, b: Tensor, *, context_mask: Tensor | None = None) -> Tensor:
        """What the latents made of B: `attend(prepare(b))`.

        Args:
            b: context (z, m, b); any length m, also 0.
            context_mask: bool (z, m), True = may be attended. Latents always may.

        Returns:
            (z, n, a).

        Raises:
            ValueError: as `CrossAttention`.
            TypeError: as `CrossAttention`.
        """
        return self.attend(self.prepare(b, context_mask=context_mask))

    def prepare(self, b: Tensor, *, context_mask: Tensor | None = None, uses: int = 1) -> tuple[PreparedContext, ...]:
        """Make of B, once, what each layer reads.

        Args:
            b: context (z, m, b).
            context_mask: bool (z, m), True = may be attended.
            uses: hint: how many reads there will be.

        Returns:
            One prepared context a layer.
        """
        if self.context_proj is not None:
            b = self.context_proj(self._checked(b))
        hints = {"context_mask": context_mask, "query_length": self.latents.shape[0], "uses": uses}
        return tuple(layer.prepare(b, shares_queries=index == 0, **hints) for index, layer in enumerate(self.layers))

    def attend(self, prepared: Sequence[PreparedContext]) -> Tensor:
        """What the latents made of a prepared B, (z, n, a).

        Raises:
            ValueError: another number of prepared contexts than layers; as `CrossAttention.attend`.
        """
        return self.norm(self._before(prepared, len(self.layers)))

    def reading(self, a: None, b: Tensor | Sequence[PreparedContext], *, layer: int = -1) -> Reading:
        """What the attention of a layer is asked, for `attention_map(resampler, None, b)`, which is of the last one.

        `attention_map(*resampler.reading(None, b, layer=0))` are the weights of the first. Columns are the positions of B, then the
        latents if these are read. A mask goes into `prepare`: `resampler.reading(None, resampler.prepare(b, context_mask=mask))`.
        """
        _check_no_queries("Resampler", a)
        prepared = self.prepare(b) if isinstance(b, Tensor) else b
        index = range(len(self.layers))[layer]
        block = self.layers[index]
        asked = block.enter(self._before(prepared, index))
        return Reading(block.attention, asked, self._read_by(block, prepared[index], asked))

    def _before(self, prepared: Sequence[PreparedContext], index: int) -> Tensor:
        """The latents as layer `index` gets them: (n, a) before the first, else (z, n, a)."""
        is_list = isinstance(prepared, tuple | list) and all(isinstance(one, _PREPARED) for one in prepared)
        if not is_list or len(prepared) != len(self.layers):
            given = "a single one" if isinstance(prepared, PreparedContext) else _described(prepared)
            kind = ValueError if is_list or isinstance(prepared, PreparedContext) else TypeError
            raise kind(
                f"prepared must hold one prepared context a layer, {len(self.layers)}, got {given}; pass what this resampler's "
                "prepare(b) returned"
            )
        x: Tensor = self.latents
        for block, context in zip(self.layers[:index], prepared[:index], strict=True):
            asked = block.enter(x)
            update = block.attention.attend(asked, self._read_by(block, context, asked))
            x = block.transform(block.leave(x, update))
        return x

    def _read_by(self, block: CrossAttentionBlock, prepared: PreparedContext, asked: Tensor) -> PreparedContext:
        """What a layer reads: B, and the latents after it."""
        prepared = block.of_attention(prepared)
        if not self.reads_latents:
            return prepared
        latents = asked if asked.dim() == 3 else asked.expand(prepared.batch, -1, -1)
        return block.attention.extend(prepared, latents)

    def _checked(self, b: Tensor) -> Tensor:
        """B, if its shape is that of a context of the width that this resampler was built for."""
        assert self.context_proj is not None
        width = self.context_proj.in_features
        if not isinstance(b, Tensor):
            raise TypeError(f"context must be a tensor (batch, length, {width}), got {type(b).__name__}")
        if b.dim() != 3 or b.shape[-1] != width:
            raise ValueError(
                f"context must be (batch, length, {width}), got shape {tuple(b.shape)}; project it first or build "
                "Resampler(context_dim=...) for its width"
            )
        self.layers[0].attention._check_tensor("context", b)
        return b


def _described(prepared: object) -> str:
    """What was given in the place of prepared contexts."""
    if not isinstance(prepared, tuple | list):
        return type(prepared).__name__
    other = [type(one).__name__ for one in prepared if not isinstance(one, _PREPARED)]
    return f"{other[0]} among them" if other else str(len(prepared))


def _refuse(part: str, given: dict[str, Any], reasons: dict[str, str]) -> None:
    """Refuse arguments of a block that have no sense in a part."""
    for name, why in reasons.items():
        if name in given:
            raise TypeError(f"{part} takes no {name}, got {given[name]!r}: {why}")


def _check_no_queries(part: str, a: object) -> None:
    if a is not None:
        raise TypeError(f"{part} has queries of its own, so None stands in the place of A, got {type(a).__name__}")

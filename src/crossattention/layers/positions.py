"""Where a position stands: an encoding that is added to a sequence, and parts that act inside attention.

The parts go to `CrossAttention(positions=...)` or `SelfAttention(positions=...)`. Queries and context are counted on one scale: the
distance of a query at p and a context position at s is p - s.

Legend: z batch, n queries, m context positions, h heads, g key-value heads, k head width, d model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from crossattention.attention.once import Once
from crossattention.attention.parts import Forbidden, PositionPart
from crossattention.attention.products import is_traced, is_transformed


def sinusoidal_positions(positions: Tensor, dim: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sinusoids of the 2017 paper, sine and cosine interleaved.

    out[p, 2i] = sin(p / 10000^(2i/d)),   out[p, 2i + 1] = cos(p / 10000^(2i/d))

    Args:
        positions: positions p, any shape; need not be consecutive or start at 0, and may be negative.
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
    angles = _angles(positions, dim, 10_000.0, dtype)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


class Rotary(PositionPart):
    """Turns queries and keys by angles that grow with their positions, so that scores depend on distances only.

    (q_2i + j q_2i+1) e^(j p w_i) for each pair of channels of a query at p, likewise for keys;   w_i = base^(-2i/k)

    Args:
        base: of the frequencies w; the larger, the slower the slowest.
        layout: which channels are a pair: "interleaved" 2i and 2i + 1 (the paper), "halves" i and i + k/2 (many checkpoints).

    Raises:
        ValueError: an unknown layout, a base not above 1; when attending, an odd head width.

    Cost: 2 multiply-adds for each channel of queries and keys.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.

    Example:
        >>> from crossattention import CrossAttention
        >>> layer = CrossAttention(12, 10, heads=3, positions=Rotary())
        >>> frames = torch.tensor([0, 2, 4, 6])  # B runs at half the rate of A
        >>> layer(torch.randn(2, 8, 12), torch.randn(2, 4, 10), context_positions=frames).shape
        torch.Size([2, 8, 12])
    """

    forbids: ClassVar[tuple[Forbidden, ...]] = tuple(
        Forbidden("scores", space, "rotary positions stand between Wq and Wk, so neither can be absorbed")
        for space in ("context", "query")
    )

    def __init__(self, *, base: float = 10_000.0, layout: Literal["interleaved", "halves"] = "interleaved") -> None:
        super().__init__()
        if layout not in ("interleaved", "halves"):
            raise ValueError(f"layout must be interleaved or halves, got {layout!r}")
        if not base > 1.0:
            raise ValueError(f"base must be above 1, got {base}")
        self.base, self.layout = base, layout

    def turn_queries(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries (z, h, n, k), turned."""
        return self._turn(queries, positions)

    def turn_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (z, g, m, k), turned."""
        return self._turn(keys, positions)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        width = x.shape[-1]
        if width % 2:
            raise ValueError(f"rotary positions turn pairs of channels, so head_dim must be even, got {width}")
        angles = _angles(positions, width, self.base, x.dtype)
        if positions.dim() == 2:
            angles = angles.unsqueeze(1)  # one for all heads
        sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
        pairs_at = -1 if self.layout == "interleaved" else -2
        real, imaginary = x.unflatten(-1, (-1, 2) if pairs_at == -1 else (2, -1)).unbind(pairs_at)
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), pairs_at).flatten(-2)

    def extra_repr(self) -> str:
        """What was given."""
        return f"base={self.base}, layout={self.layout!r}"


class ALiBi(PositionPart):
    """Takes from each score the distance times a slope of its head.

    scores[z, h, n, m] - slope_h |p_n - s_m|,   slope_h = 2^(-8 h / heads) for h = 1 ... heads

    Where the number of heads is no power of two, the slopes are those of the next lower one, and then every other slope of the next
    higher one, as in the authors' code. The paper's attention is causal; in both directions the distance counts without its sign.

    Args:
        heads: number of query heads.

    Raises:
        ValueError: `heads` below 1.

    Cost: the (z or 1, h, n, m) bias is held in memory, in float32.
    Source: Press et al. 2021, arXiv:2108.12409, section 3.

    Example:
        >>> ALiBi(4).slopes
        (0.25, 0.0625, 0.015625, 0.00390625)
    """

    adds_to_scores: ClassVar[bool] = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        power = 2 ** int(math.log2(heads))
        slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
        slopes += [2.0 ** (-4.0 * head / power) for head in range(1, 2 * (heads - power), 2)]
        self.slopes = tuple(slopes)

    def score_bias(self, queries: Tensor | None, query_positions: Tensor, context_positions: Tensor, scale: float) -> Tensor:
        """The bias (z or 1, h, n, m)."""
        distances = _distances(query_positions, context_positions).abs()
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=distances.device)
        return -slopes[:, None, None] * distances

    def extra_repr(self) -> str:
        """What was given."""
        return f"heads={len(self.slopes)}"


class T5Bias(PositionPart):
    """Adds to each score a learned number that depends on the head and on the distance's bucket.

    scores[z, h, n, m] + table[bucket(s_m - p_n), h]

    Near distances have a bucket each; farther ones share buckets that widen logarithmically up to `max_distance`, beyond which
    all distances are alike. T5 does not scale its scores: its layers are built with scale=1.0 beside this part.

    Args:
        heads: number of query heads.
        num_buckets: buckets, both directions together.
        max_distance: where the last bucket begins.
        bidirectional: whether a context position after the query differs from one before it; if not (causal attention), all
            after it count as distance 0.

    Raises:
        ValueError: `heads` below 1, too few buckets, or a `max_distance` within the buckets of single distances.

    Cost: the (z or 1, h, n, m) bias is held in memory; learned masks have no fused kernel while training.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and the authors' code.
    """

    adds_to_scores: ClassVar[bool] = True

    def __init__(
        self,
        heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.num_single = self._buckets_a_side() // 2
        if self.num_single < 1 or (bidirectional and num_buckets % 2):
            wanted = "an even number of at least 4" if bidirectional else "at least 2"
            raise ValueError(f"num_buckets must be {wanted}, got {num_buckets}")
        if max_distance <= self.num_single:
            raise ValueError(f"max_distance must be above the {self.num_single} single distances, got {max_distance}")
        self.table = nn.Embedding(num_buckets, heads, device=device, dtype=dtype)

    def score_bias(self, queries: Tensor | None, query_positions: Tensor, context_positions: Tensor, scale: float) -> Tensor:
        """The bias (z or 1, h, n, m)."""
        buckets = self.buckets_of(-_distances(query_positions, context_positions).squeeze(1))
        return self.table(buckets).permute(0, 3, 1, 2)

    def buckets_of(self, offsets: Tensor) -> Tensor:
        """Bucket of each offset s - p of a context position from a query; any shape."""
        a_side, single = self._buckets_a_side(), self.num_single
        after = torch.where(offsets > 0, a_side, 0) if self.bidirectional else 0
        distances = offsets.abs() if self.bidirectional else (-offsets).clamp(min=0)
        # In float32 as in the checkpoints' code, which decides where a distance lies on the edge of two buckets.
        ratio = (distances.clamp(min=1).float() / single).log() / math.log(self.max_distance / single)
        far = (single + (ratio * (a_side - single)).long()).clamp(max=a_side - 1)
        return after + torch.where(distances < single, distances, far)

    def _buckets_a_side(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    def extra_repr(self) -> str:
        """What was given, but for the table."""
        return f"num_buckets={self.num_buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


class RelativeLogits(PositionPart):
    """Adds to each score what the query has to say of the distance: Transformer-XL's position logits, which RETRO uses.

    scores[z, h, n, m] + scale (q[z, h, n] + bias_h) . (Wr r(p_n - s_m))_h,   r(p) the sinusoids of p

    q is the projected query, its bias included. Transformer-XL's u is then the bias of `q_proj`, and its v the sum of that and the
    bias here.

    Args:
        dim: width d of the sinusoids; even.
        heads: number of query heads.
        head_dim: their width, k.
        bias: whether there is a bias_h.
        max_distance: distances beyond it count as it, either way; None lets every distance be itself.

    Raises:
        ValueError: a size below 1, an odd `dim`.

    Cost: where positions count up by one, as they do unless others are given, the n + m - 1 distances that there are are projected
        once for the whole batch, d h k multiply-adds each, and every query meets them all in width k; without gradients the
        projections are kept while the weights are unchanged. Of other positions, of those on a GPU and inside graphs: with
        max_distance D the same for 2 D + 1 distances; without, each query is brought to width d, d h k multiply-adds each, and each
        pair costs d h.
    Source: Dai et al. 2019, arXiv:1901.02860, section 3.3; in RETRO: Borgeaud et al. 2021, arXiv:2112.04426.
    """

    adds_to_scores: ClassVar[bool] = True
    reads_queries: ClassVar[bool] = True
    forbids: ClassVar[tuple[Forbidden, ...]] = (
        Forbidden("scores", "query", "relative logits read the projected queries, which this meeting space never makes"),
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        max_distance: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("head_dim", head_dim), ("max_distance", max_distance)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dim % 2:
            raise ValueError(f"dim must be even, as sinusoids come in pairs, got {dim}")
        self.dim, self.heads, self.head_dim, self.max_distance = dim, heads, head_dim, max_distance
        self.r_proj = nn.Linear(dim, heads * head_dim, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(heads, head_dim, device=device, dtype=dtype)) if bias else None
        self._kept: Once[Tensor] = Once()
        nn.init.xavier_uniform_(self.r_proj.weight)

    def score_bias(self, queries: Tensor | None, query_positions: Tensor, context_positions: Tensor, scale: float) -> Tensor:
        """The logits (z, h, n, m)."""
        assert queries is not None
        if self.bias is not None:
            queries = queries + self.bias.unsqueeze(1)
        queries = queries * scale
        rows, columns = _run_of(query_positions), _run_of(context_positions)
        if rows is not None and columns is not None and self._has_cheap_table(queries, rows, columns):
            return self._by_runs(queries, rows, columns)
        if self.max_distance is None:
            return self._by_angles(queries, query_positions, context_positions)
        return self._by_table(queries, query_positions, context_positions, self.max_distance)

    def _has_cheap_table(self, queries: Tensor, rows: _Run, columns: _Run) -> bool:
        """Whether projecting the distances is kept, or costs less than bringing the queries to the sinusoids' width."""
        if self.max_distance is not None or not torch.is_grad_enabled():
            return True
        asked = queries.shape[0] * queries.shape[2]
        return (rows.length + columns.length - 1) * self.head_dim <= asked * (self.head_dim + columns.length)

    def _by_runs(self, queries: Tensor, rows: _Run, columns: _Run) -> Tensor:
        """Each query meets every distance of the two runs, furthest first; each row, one further along, is then the next pairs'.

        The distance of row i and column j is furthest - (n - 1 - i + j): row i is read from column n - 1 - i on.
        """
        n, m = rows.length, columns.length
        furthest = rows.start + n - 1 - columns.start
        projected = self._projected(furthest, furthest - (n + m - 2), queries)
        logits = torch.einsum("zhnk,uhk->zhnu", queries, projected).unflatten(2, (rows.count, n))
        if n > 1:  # one view, whose gradient is written once
            strides = logits.stride()
            shape = (*logits.shape[:3], n, m)
            logits = logits.as_strided(
                shape, (*strides[:3], strides[3] - strides[4], strides[4]), logits.storage_offset() + (n - 1) * strides[4]
            )
        logits = logits.flatten(2, 3)
        return logits if columns.count == 1 else logits.repeat(1, 1, 1, columns.count)

    def _projected(self, furthest: int, nearest: int, queries: Tensor) -> Tensor:
        """The projected sinusoids of the distances from furthest down to nearest, (u, h, k), in the queries' dtype."""
        first, last = furthest, nearest
        if not torch.is_grad_enabled():  # kept for more distances than these, so that steps of a sequence find theirs
            first, last = _rounded_away(furthest), -_rounded_away(-nearest)
        table = self._kept.get(
            (self.r_proj.weight,), lambda: self._table(first, last, queries), first, last, queries.dtype, queries.device
        )
        return table[first - furthest : first - nearest + 1]

    def _table(self, first: int, last: int, queries: Tensor) -> Tensor:
        distances = torch.arange(first, last - 1, -1, device=queries.device)
        if self.max_distance is not None:
            distances = distances.clamp(-self.max_distance, self.max_distance)
        projected = self.r_proj(sinusoidal_positions(distances, self.dim, dtype=queries.dtype))
        table: Tensor = projected.unflatten(-1, (self.heads, self.head_dim))
        return table

    def _by_table(self, queries: Tensor, query_positions: Tensor, context_positions: Tensor, furthest: int) -> Tensor:
        """Each query meets every distance that there is, then each pair takes its own."""
        distances = _distances(query_positions, context_positions).clamp(-furthest, furthest)
        known = torch.arange(-furthest, furthest + 1, device=distances.device)
        projected = self.r_proj(sinusoidal_positions(known, self.dim, dtype=queries.dtype))
        logits = torch.einsum("zhnk,uhk->zhnu", queries, projected.unflatten(-1, (self.heads, self.head_dim)))
        z = max(logits.shape[0], distances.shape[0])
        index = (distances + furthest).expand(z, self.heads, -1, -1)
        return logits.expand(z, -1, -1, -1).gather(-1, index)

    def _by_angles(self, queries: Tensor, query_positions: Tensor, context_positions: Tensor) -> Tensor:
        """Each query, brought to the sinusoids' width and turned by its own position, meets the context's sinusoids.

        x sin(p - s) + y cos(p - s) = (y sin p - x cos p) sin s + (x sin p + y cos p) cos s, for each frequency.
        """
        weight = self.r_proj.weight.unflatten(0, (self.heads, self.head_dim))
        wide = torch.einsum("zhnk,hkd->zhnd", queries, weight)
        x, y = wide.unflatten(-1, (-1, 2)).unbind(-1)
        angles = _angles(query_positions, self.dim, 10_000.0, wide.dtype)
        if query_positions.dim() == 2:
            angles = angles.unsqueeze(1)
        sin, cos = angles.sin().to(wide.dtype), angles.cos().to(wide.dtype)
        turned = torch.stack((y * sin - x * cos, x * sin + y * cos), -1).flatten(-2)
        context = sinusoidal_positions(context_positions, self.dim, dtype=wide.dtype)
        return turned @ (context.unsqueeze(1) if context.dim() == 3 else context).transpose(-1, -2)

    @torch.no_grad()
    def begin_at(self, head: int, distance: int, *, score: float = 6.0, reach: int = 64) -> None:
        """Give a head weights with which it first of all looks at one distance, whatever stands there.

        A query at p then adds about `score` (with the usual scale, 1 over the root of the width) to the context position that lies
        `distance` before it, and next to nothing to the others within reach. Training is free to change it. Needs the bias.

        Args:
            head: which head, counted from 0.
            distance: p - s of the position looked at: 1 is the one before, -1 the one behind.
            score: what it adds there.
            reach: distances up to it, either way, are told apart.

        Raises:
            ValueError: no bias, a head that is not there, a distance out of reach.
        """
        if self.bias is None:
            raise ValueError("begin_at sets a head's bias, but this part was built with bias=False; build it with one")
        if not 0 <= head < self.heads or not -reach <= distance <= reach:
            raise ValueError(
                f"head must be from 0 to {self.heads - 1} and distance from -{reach} to {reach}, got {head} and {distance}"
            )
        known = torch.arange(-reach, reach + 1)
        sinusoids = sinusoidal_positions(known, self.dim, dtype=torch.float64)
        # The shortest combination of sinusoids that is nearly 1 at the distance and 0 elsewhere: sharper ones have long weights,
        # which answer to whatever a query holds.
        inner = sinusoids @ sinusoids.T + 0.1 * torch.eye(len(known), dtype=torch.float64)
        combined = torch.linalg.solve(inner, (known == distance).double()) @ sinusoids
        combined /= combined @ sinusoids[distance + reach]
        row, bias = head * self.head_dim, 8.0  # far above what a query holds in that channel, so that the score is nearly fixed
        self.r_proj.weight[row] = (combined * (score * self.head_dim**0.5 / bias)).to(self.r_proj.weight)
        self.bias[head, 0] = bias

    def extra_repr(self) -> str:
        """What was given, but for the projection."""
        return f"heads={self.heads}, head_dim={self.head_dim}, max_distance={self.max_distance}"


@dataclass(frozen=True)
class _Run:
    """Positions start, start + 1, ... of some length, one after the other or, as of neighbours laid end to end, again and again."""

    start: int
    length: int
    count: int


def _run_of(positions: Tensor) -> _Run | None:
    """The run that positions (n,) are; None if they are none, or if asking for their values would hold up a device or a graph."""
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return None
    if positions.dim() != 1 or len(positions) == 0 or positions.device.type != "cpu":
        return None
    breaks = (positions.diff() != 1).nonzero()
    start, total = int(positions[0]), len(positions)
    if not len(breaks):
        return _Run(start, total, 1)
    length = int(breaks[0]) + 1
    if total % length or not torch.equal(positions.view(-1, length), positions[:length].expand(total // length, -1)):
        return None
    return _Run(start, length, total // length)


def _rounded_away(distance: int) -> int:
    """A bound of a distance that changes seldom while the distance grows: 63, 127, 255, ..., or 0 for none above it."""
    return 0 if distance <= 0 else (1 << max(6, distance.bit_length())) - 1


def _angles(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """P / base^(2i/dim) for i = 0 ... dim/2 - 1, (*positions.shape, dim / 2), in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim
    return positions.to(dtype).unsqueeze(-1) * base**-exponents


def _distances(query_positions: Tensor, context_positions: Tensor) -> Tensor:
    """P - s for every pair, (z or 1, 1, n, m)."""
    pairs = query_positions.unsqueeze(-1) - context_positions.unsqueeze(-2)
    return pairs[None, None] if pairs.dim() == 2 else pairs.unsqueeze(1)

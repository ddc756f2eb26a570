"""`SelfAttention`: cross-attention of a sequence with itself, causal or not, and its key-value cache as an explicit value.

Its keys grow with its queries, which is why it is a class of its own: what a cross-attention prepares once, it appends to.
Legend: z batch, n sequence length, t new positions, d width, h heads, g key-value heads, k/v head widths.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossattention.attention import execute
from crossattention.attention.by_distance import attend_by_distance, causal_spans, runs_by_distance
from crossattention.attention.checks import check_probability
from crossattention.attention.cross_attention import (
    biased_projections,
    check_is_tensor,
    check_part,
    check_scale,
    check_size,
    floating_weight,
    head_widths,
    reset_projections,
)
from crossattention.attention.masks import (
    ScoreMask,
    check_attn_mask,
    check_context_mask,
    combine_masks,
    score_dtype_of,
    to_score_dtype,
)
from crossattention.attention.parts import PositionPart, QueryKeyNorm, Run
from crossattention.attention.products import is_traced, is_transformed, project
from crossattention.attention.short import HALF, project_plainly, read_plainly


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the positions that a causal `SelfAttention` has seen: passed in to `step`, returned longer, never changed.

    Args:
        keys: (z, g, length, k).
        values: (z, g, length, v).
    """

    keys: Tensor
    values: Tensor
    _room: ClassVar[_Room | None] = None

    @property
    def length(self) -> int:
        """Number of positions seen."""
        return self.keys.shape[2]

    def select(self, rows: Tensor) -> KeyValueCache:
        """The cache of some rows of the batch, in the given order, as when beams survive or die.

        Args:
            rows: integer indices into the batch, (any number,).
        """
        if not _may_share_memory(self.keys, self.values) or not len(rows):
            return KeyValueCache(self.keys.index_select(0, rows), self.values.index_select(0, rows))
        room = _Room.like(
            self.keys, self.values, len(rows), self.length + 1
        )  # where beams are chosen at each step, one will follow
        for tensor, kept in ((self.keys, room.keys), (self.values, room.values)):
            torch.index_select(tensor, 0, rows, out=kept[:, :, : self.length])
        return room.cache(self.length)

    def append(self, keys: Tensor, values: Tensor) -> KeyValueCache:
        """A new cache with more positions at its end; this one stays as it is.

        Without gradients they are written behind the old ones where there is room that no other cache uses; where there is none,
        room for half as many again, and at least eight, is made.
        """
        start, end = self.length, self.length + keys.shape[2]
        same = keys.shape[:2] == self.keys.shape[:2] and keys.dtype == self.keys.dtype and values.dtype == self.values.dtype
        if not same or not _may_share_memory(self.keys, self.values, keys, values):
            return KeyValueCache(torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2))
        room = self._room
        if room is None or not room.claim(start, end):
            room = _Room.like(self.keys, self.values, self.keys.shape[0], end + max(8, start // 2))
            room.write(0, self.keys, self.values)
        room.write(start, keys, values)
        return room.cache(end)

    def __reduce__(self) -> tuple[type[KeyValueCache], tuple[Tensor, Tensor]]:
        return KeyValueCache, (self.keys, self.values)  # a copy has memory of its own


class _Room:
    """Memory for more positions than a cache has, which the next ones are written into; each place is given away once."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self._used, self._lock = keys, values, 0, threading.Lock()

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, batch: int, length: int) -> _Room:
        """For `length` positions of keys and values like these."""
        return cls(*(tensor.new_empty(batch, tensor.shape[1], length, tensor.shape[3]) for tensor in (keys, values)))

    def claim(self, start: int, end: int) -> bool:
        """Take the places from start to end, if nobody has taken what comes after start and they are there."""
        with self._lock:
            is_free = start == self._used and end <= self.keys.shape[2]
            if self.keys.is_inference() and not torch.is_inference_mode_enabled():
                is_free = False  # what was made in inference mode may not be written outside of it
            if is_free:
                self._used = end
            return is_free

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Copy keys and values to their places."""
        self.keys[:, :, start : start + keys.shape[2]] = keys
        self.values[:, :, start : start + values.shape[2]] = values

    def cache(self, length: int) -> KeyValueCache:
        """The first positions as a cache that may go on here."""
        self._used = max(self._used, length)
        cache = KeyValueCache(self.keys[:, :, :length], self.values[:, :, :length])
        object.__setattr__(cache, "_room", self)  # no field: what is exported, compared or printed is keys and values
        return cache


def _may_share_memory(*tensors: Tensor) -> bool:
    """Whether memory may be written that other caches read too: not where gradients, graphs or transforms look on."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed()
        or is_traced()
        or any(type(tensor) is not Tensor for tensor in tensors)
    )


torch.export.register_dataclass(KeyValueCache, serialized_type_name="crossattention.KeyValueCache")

FEW_SCORES, SCORES_OF_TWO_WIDTHS = 1 << 21, 1 << 22
"""Up to so many scores, written out, stay in the processor's cache; more where the fused kernel would pad queries and keys."""


def _is_quicker_written_out(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether two products with a softmax between them beat the CPU's fused kernel, which reaches two thirds of their speed.

    Measured for wide heads (128) at 512 positions, 9.3 against 12.1 ms, and for heads of two widths (32 and 160) at 256 positions,
    2.6 against 4.1 ms (dev/LOG.md). Where a gradient will be asked for, wide heads gain nothing; heads of two widths still do,
    1.04 to 1.19 times a whole step, and keep the weights for it. In half precision only they do, and only there: 1.6 to 2.8 times.
    """
    if torch.compiler.is_compiling() or queries.device.type != "cpu":
        return False
    if queries.dtype != torch.float32 and not (queries.dtype in HALF and torch.is_grad_enabled()):
        return False
    length, context_length, width = queries.shape[2], keys.shape[2], queries.shape[3]
    if length < 64 or context_length < 64:
        return False
    scores = queries.shape[0] * queries.shape[1] * length * context_length
    has_two_widths = width != values.shape[3]
    if has_two_widths:
        return scores <= SCORES_OF_TWO_WIDTHS
    return width >= 96 and scores <= FEW_SCORES and not torch.is_grad_enabled()  # so not in half precision


class SelfAttention(nn.Module):
    """A sequence that attends to itself: queries, keys and values all come from it.

    Equals `CrossAttention(dim, dim)(x, x)` with the same weights and, where causal, a lower-triangular mask.

    Args:
        dim: width of the sequence, d.
        heads: number of query heads, h.
        head_dim: width of each head's queries and keys; default dim // heads.
        value_head_dim: width of each head's values; default `head_dim`.
        out_dim: width of the output; default `dim`.
        kv_heads: number of key-value heads, a divisor of `heads`; default `heads`.
        bias: True or False for all four projections, or the names of those that have one.
        qk_norm: part that normalises each head's queries and keys.
        positions: part that turns queries and keys or adds to the scores.
        dropout: probability of dropping a weight while training.
        scale: factor of the scores; default 1 / sqrt(head_dim).
        causal: whether position i attends only to positions up to i.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: sizes below one, heads that do not divide, dropout outside [0, 1).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.

    Example:
        >>> layer = SelfAttention(32, heads=4, causal=True)
        >>> x = torch.randn(2, 5, 32)
        >>> first, cache = layer.step(x[:, :3])
        >>> rest, cache = layer.step(x[:, 3:], cache)
        >>> torch.allclose(torch.cat((first, rest), 1), layer(x), atol=1e-5), cache.length
        (True, 5)
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_dim: int | None = None,
        kv_heads: int | None = None,
        bias: bool | Collection[str] = True,
        qk_norm: QueryKeyNorm | None = None,
        positions: PositionPart | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.value_head_dim, self.kv_heads = head_widths(dim, heads, head_dim, value_head_dim, kv_heads)
        self.dim, self.heads, self.is_causal = dim, heads, causal
        self.out_dim = dim if out_dim is None else out_dim
        check_size("out_dim", self.out_dim)
        check_probability("dropout", dropout)
        self.dropout = dropout
        self.scale = check_scale(scale, self.head_dim)
        biased, kwargs = biased_projections(bias), {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias="q_proj" in biased, **kwargs)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias="k_proj" in biased, **kwargs)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.value_head_dim, bias="v_proj" in biased, **kwargs)
        self.out_proj = nn.Linear(heads * self.value_head_dim, self.out_dim, bias="out_proj" in biased, **kwargs)
        self.qk_norm = check_part("qk_norm", qk_norm, QueryKeyNorm)
        self.positions = check_part("positions", positions, PositionPart)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases."""
        reset_projections(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Let every position attend to the sequence.

        Args:
            x: the sequence (z, n, d); n may be 0.
            mask: bool (z, n), True = may be attended.
            attn_mask: bool, or floating and added to the scaled scores; broadcasts to (z, h, n, n).

        Returns:
            (z, n, o). A position that may attend nothing gets the output bias.

        Raises:
            ValueError: wrong width or mask shape, NaN or +inf in a mask.
            TypeError: a mask of a wrong dtype.

        Cost: four projections and n n (k + v) multiply-adds a head.
        """
        projected = project_plainly(self, x) if type(self) is SelfAttention else None  # a subclass may do more
        if projected is None:
            self._check(x)
        if mask is not None:
            check_context_mask(mask, x.shape[0], x.shape[1], x.device)
        queries, keys, values = self._project(x, 0) if projected is None else projected
        is_plain = projected is not None and attn_mask is None and not (self.is_causal and mask is not None)
        if is_plain and self._reads_plainly(queries, keys, values):
            return read_plainly(self, queries, keys, values, mask, is_causal=self.is_causal)
        return self._attend(x, queries, keys, values, mask, attn_mask, 0)

    def step(self, x: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        """The outputs of the next t positions, and the cache with these positions in it.

        Args:
            x: the next positions (z, t, d).
            cache: what the last `step` returned; None at the beginning. Not changed.

        Returns:
            Outputs (z, t, o), equal to those rows of `forward` on the whole sequence; the longer cache.

        Raises:
            ValueError: the layer is not causal, wrong width, or a cache of another batch, heads or head widths.

        Cost: projections of t positions; t (length + t)(k + v) multiply-adds a head. With gradients, one copy of
            the cache; without, one in several steps, and memory for up to half as many positions again.
        """
        if not self.is_causal:
            raise ValueError("step needs SelfAttention(causal=True): without it earlier outputs depend on later positions")
        projected = project_plainly(self, x) if type(self) is SelfAttention else None  # a subclass may do more
        if projected is None:
            self._check(x)
        offset = 0 if cache is None else cache.length
        if cache is not None and cache.keys.shape[0] != x.shape[0]:
            raise ValueError(
                f"x has batch {x.shape[0]} but the cache has batch {cache.keys.shape[0]}; cache.select(rows) reorders it"
            )
        queries, keys, values = self._project(x, offset) if projected is None else projected
        if cache is not None and (cache.keys.shape[1], cache.keys.shape[3]) != (keys.shape[1], keys.shape[3]):
            raise ValueError(
                f"the cache has {cache.keys.shape[1]} key-value heads of width {cache.keys.shape[3]} but this layer has "
                f"{keys.shape[1]} of width {keys.shape[3]}; a cache belongs to the layer whose step returned it"
            )
        cache = KeyValueCache(keys, values) if cache is None else cache.append(keys, values)
        if projected is not None and (offset == 0 or x.shape[1] == 1) and type(cache.keys) is type(cache.values) is Tensor:
            if cache.keys.dtype == x.dtype and self._reads_plainly(queries, cache.keys, cache.values):
                return read_plainly(self, queries, cache.keys, cache.values, None, is_causal=offset == 0), cache
        return self._attend(x, queries, cache.keys, cache.values, None, None, offset), cache

    def _reads_plainly(self, queries: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether torch's kernel reads them: nothing is dropped, nobody looks on, and it is not quicker to write the scores out."""
        is_plain = not (self.training and self.dropout) and "_attend" not in self.__dict__
        return is_plain and not _is_quicker_written_out(queries, keys, values)

    def _project(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries (before parts), keys (after them) and values, each (z, heads, t, width)."""
        queries = execute.split_heads(project(self.q_proj, x), self.heads).transpose(1, 2)
        keys = execute.split_heads(project(self.k_proj, x), self.kv_heads).transpose(1, 2)
        values = execute.split_heads(project(self.v_proj, x), self.kv_heads).transpose(1, 2)
        return queries, execute.place_keys(self, keys, self._positions(x, offset, x.shape[1])), values

    def _attend(
        self,
        x: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        attn_mask: Tensor | None,
        offset: int,
    ) -> Tensor:
        placed = execute.place_queries(self, queries, self._positions(x, offset, x.shape[1]))
        dropout = self.dropout if self.training else 0.0
        learns = execute.learns_scores(self.positions)
        if learns and attn_mask is None and dropout == 0.0:
            whole = self._attend_by_distance(placed, keys, values, mask, offset)
            if whole is not None:
                return project(self.out_proj, whole.transpose(1, 2).flatten(2))
        kernel = "explicit" if learns or _is_quicker_written_out(queries, keys, values) else "fused"
        spans = [(0, x.shape[1], keys.shape[2])]
        if learns and self.is_causal and mask is None and attn_mask is None and dropout == 0.0:
            spans = causal_spans(x.shape[1], keys.shape[2], offset)
        read = []
        for begin, end, length in spans:
            score_mask = self._mask(x[:, begin:end], queries[:, :, begin:end], keys[:, :, :length], mask, attn_mask, offset + begin)
            some = (placed[:, :, begin:end], keys[:, :, :length], values[:, :, :length])
            read.append(execute.attend_heads(*some, score_mask, scale=self.scale, dropout=dropout, kernel=kernel)[0])
        whole = read[0] if len(read) == 1 else torch.cat(read, 2)
        return project(self.out_proj, whole.transpose(1, 2).flatten(2))

    def _attend_by_distance(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, offset: int) -> Tensor | None:
        """What is read, (z, h, n, v), where the position part is a table of distances; None where other ways are to be taken."""
        if self.positions is None or self.qk_norm is not None or not runs_by_distance(queries, keys, values):
            return None
        if self.is_causal and mask is not None:
            return None
        rows, columns = Run(offset, queries.shape[2]), Run(0, keys.shape[2])
        distances = self.positions.distances(queries, rows, columns, from_zero=self.is_causal)
        if distances is None:
            return None
        return attend_by_distance(queries, keys, values, distances, scale=self.scale, mask=mask, is_causal=self.is_causal)

    def _mask(
        self, x: Tensor, queries: Tensor, keys: Tensor, mask: Tensor | None, attn_mask: Tensor | None, offset: int
    ) -> ScoreMask:
        z, n, m = x.shape[0], x.shape[1], keys.shape[2]
        if attn_mask is not None:
            check_attn_mask(attn_mask, (z, self.heads, n, m), x.device)
        bias = None
        if self.positions is not None and self.positions.adds_to_scores:
            rows, columns = self._positions(x, offset, n), self._positions(x, 0, m)
            assert rows is not None and columns is not None
            read = queries if self.positions.reads_queries else None
            bias = self.positions.score_bias(read, rows, columns, self.scale)
        if self.is_causal and not (isinstance(n, int) and n == 1 and offset == m - 1):
            causal = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(offset)
            if attn_mask is None and mask is None and bias is not None:  # every row has itself to attend to
                found = ScoreMask(to_score_dtype(bias, score_dtype_of(queries)), None, causal[None, None], is_learned=True)
                return found if execute.learns_scores(self.positions) else found.joined()
            if attn_mask is None:
                attn_mask = causal
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & causal
            else:
                attn_mask = torch.where(causal, attn_mask, -torch.inf)
        is_learned = bias is not None and execute.learns_scores(self.positions)
        return combine_masks(mask, attn_mask, bias, m, queries.dtype, is_learned=is_learned)

    def _positions(self, x: Tensor, start: int, length: int) -> Tensor | None:
        return None if self.positions is None else torch.arange(start, start + length, device=x.device)

    def _check(self, x: Tensor) -> None:
        check_is_tensor("the sequence", x)
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"the sequence must be (batch, length, {self.dim}) as this layer was built with dim={self.dim}, got shape "
                f"{tuple(x.shape)}"
            )
        weight = floating_weight(self.q_proj)
        if weight is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"the sequence is {x.dtype} but the layer's weights are {weight.dtype}; convert one, or run under torch.autocast"
            )

    def extra_repr(self) -> str:
        """The sizes that tell this layer from another."""
        return f"dim={self.dim}, heads={self.heads}, head_dim={self.head_dim}, causal={self.is_causal}"

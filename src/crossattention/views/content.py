"""What a view shows, as plain data: two sides, and layers of weights between them.

Checked here once, so that pages and figures can trust it. Positions are counted from 0, as in a tensor.
Legend: h heads, n queries (length of A), m context positions (length of B), k weights kept of each query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Numbers = Any
"""Numbers as an array or as nested lists."""


@dataclass(frozen=True, eq=False)
class TextSide:
    """A sequence of tokens.

    Args:
        tokens: one text a position: a letter, a phoneme, a word, a piece of one; any characters.

    Raises:
        TypeError: a token that is no text.
    """

    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _texts("tokens", self.tokens))

    @property
    def length(self) -> int:
        """The number of positions."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class ImageSide:
    """A picture in patches, row by row from the upper left one.

    Args:
        png: the picture, as the bytes of a PNG file.
        rows: patches from top to bottom.
        columns: patches from left to right.
        leading: names of positions that stand before the patches and are no part of the picture, such as "[CLS]".

    Raises:
        ValueError: no PNG, no patches, more patches than pixels.
    """

    png: bytes = field(repr=False)
    rows: int
    columns: int
    leading: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "leading", _texts("leading", self.leading))
        if not self.png.startswith(PNG_SIGNATURE) or len(self.png) < 24:
            raise ValueError(f"png expects the bytes of a PNG file, got {len(self.png)} bytes that begin with {self.png[:8]!r}")
        for name, count, pixels in (("rows", self.rows, self.size[1]), ("columns", self.columns, self.size[0])):
            if not 1 <= count <= pixels:
                raise ValueError(f"{name} must be 1 to {pixels}, the picture's pixels that way, got {count}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")

    @property
    def length(self) -> int:
        """The number of positions."""
        return len(self.leading) + self.rows * self.columns


@dataclass(frozen=True, eq=False)
class SoundSide:
    """A sound, of which each position covers a stretch of time, one after the other from the beginning.

    Args:
        samples: one channel, finite, 1.0 and -1.0 being the loudest that can be written.
        sample_rate: samples a second.
        positions: how many stretches.
        seconds_per_position: length of one; without it the sound is divided evenly.

    Raises:
        ValueError: more than one channel, no samples, samples that are not finite or beyond 1.0, a size below one.
    """

    samples: Numbers = field(repr=False)
    sample_rate: int
    positions: int
    seconds_per_position: float | None = None

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples, dtype=np.float32)
        if samples.ndim != 1 or samples.size == 0:
            raise ValueError(f"samples expects the samples of one channel, (length,), got an array of shape {samples.shape}")
        if not np.isfinite(samples).all() or np.abs(samples).max() > 1.0:
            raise ValueError(
                f"samples must be finite and within -1.0 to 1.0, got up to {np.abs(samples).max()}; divide by the largest"
            )
        object.__setattr__(self, "samples", samples)
        for name in ("sample_rate", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seconds_per_position is None:
            object.__setattr__(self, "seconds_per_position", self.seconds / self.positions)
        elif not (math.isfinite(self.seconds_per_position) and self.seconds_per_position > 0):
            raise ValueError(f"seconds_per_position must be above 0, got {self.seconds_per_position}")

    @property
    def seconds(self) -> float:
        """How long the sound is."""
        return len(self.samples) / self.sample_rate

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.positions


@dataclass(frozen=True, eq=False)
class LongSide:
    """Many positions, of which few or none have a name: 50,000 pixels, the latents of a Perceiver.

    Args:
        length: the number of positions.
        labels: names of some of them.

    Raises:
        ValueError: a length below 1, a label of a position that there is not.
    """

    length: int
    labels: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        _texts("labels", tuple(self.labels.values()))
        wrong = next((at for at in self.labels if not 0 <= at < self.length), None)
        if wrong is not None:
            raise ValueError(f"labels names position {wrong}, but positions go from 0 to {self.length - 1}")


Side = TextSide | ImageSide | SoundSide | LongSide


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """The weights with which the queries read the context in one layer: the largest of each query, and maybe all.

    Args:
        name: such as "decoder.layers.0.cross_attention".
        kind: such as "cross-attention".
        top_indices: (h, n, k) integers, the context positions of the weights that are kept.
        top_weights: (h, n, k), these weights, from 0 to 1.
        highlight: (h, m), the mass that each position receives, its weights summed over all queries; None where not known.
        weights: (h, n, m), all weights; None where they were never held.

    Raises:
        ValueError: shapes that do not fit together, positions outside the context, weights that are negative or not finite.
        TypeError: positions that are no integers.
    """

    name: str
    kind: str
    top_indices: Numbers = field(repr=False)
    top_weights: Numbers = field(repr=False)
    highlight: Numbers | None = field(default=None, repr=False)
    weights: Numbers | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        indices = np.asarray(self.top_indices)
        if indices.size and not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(f"{self.name!r}: top_indices expects integers, got {indices.dtype}")
        top_weights = self._numbers("top_weights", 3)
        if indices.shape != top_weights.shape or indices.shape[0] < 1 or indices.shape[2] < 1:
            raise ValueError(
                f"{self.name!r}: top_indices and top_weights must both be (heads, queries, k), none of heads and k zero, got "
                f"{indices.shape} and {top_weights.shape}"
            )
        object.__setattr__(self, "top_indices", indices.astype(np.int64))
        object.__setattr__(self, "top_weights", top_weights)
        for name, dimensions in (("highlight", 2), ("weights", 3)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._numbers(name, dimensions))

    @classmethod
    def of_weights(cls, name: str, kind: str, weights: Numbers, *, k: int = 8) -> AttentionLayer:
        """A layer of all its weights (h, n, m): its k largest a query and its highlight are taken of them."""
        whole = np.asarray(weights, dtype=np.float32)
        if whole.ndim != 3 or whole.shape[2] < 1:
            raise ValueError(f"{name!r}: weights must be (heads, queries, positions), at least one of them, got {whole.shape}")
        indices = np.argsort(-whole, axis=-1, kind="stable")[..., :k]
        top = np.take_along_axis(whole, indices, axis=-1)
        return cls(name, kind, indices, top, highlight=whole.sum(1), weights=whole)

    @property
    def heads(self) -> int:
        """The number of heads."""
        return int(self.top_indices.shape[0])

    def _numbers(self, name: str, dimensions: int) -> np.ndarray:
        numbers = np.asarray(getattr(self, name), dtype=np.float32)
        if numbers.ndim != dimensions:
            raise ValueError(f"{self.name!r}: {name} must have {dimensions} dimensions, got an array of shape {numbers.shape}")
        if not np.isfinite(numbers).all() or (numbers < 0).any():
            wrong = numbers[~(np.isfinite(numbers) & (numbers >= 0))].flat[0]
            raise ValueError(f"{self.name!r}: {name} must be finite and not negative, got {wrong}")
        return numbers


@dataclass(frozen=True, eq=False)
class AttentionView:
    """What the queries read of the context, layer by layer.

    Args:
        title: one line of plain text.
        queries: the side that reads.
        context: the side that is read.
        layers: at least one; all between these two sides.
        notes: sentences for the page's foot, such as how the weights were made.

    Raises:
        ValueError: no layers, an empty side, a layer that does not fit the sides.
        TypeError: what is no side.
    """

    title: str
    queries: Side
    context: Side
    layers: tuple[AttentionLayer, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", _texts("notes", self.notes))
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("queries", "context"):
            _check_side(name, getattr(self, name), Side)
        n, m = self.queries.length, self.context.length
        if not self.layers or n < 1 or m < 1:
            raise ValueError(
                f"a view needs queries, a context and layers, got {n} queries, {m} context positions and {len(self.layers)} layers"
            )
        for layer in self.layers:
            self._check(layer, n, m)

    def _check(self, layer: AttentionLayer, n: int, m: int) -> None:
        heads = layer.heads
        if layer.top_indices.shape[1] != n:
            raise ValueError(f"{layer.name!r} has weights of {layer.top_indices.shape[1]} queries, but the view has {n} queries")
        if layer.top_indices.min() < 0 or layer.top_indices.max() >= m:
            wrong = layer.top_indices.min() if layer.top_indices.min() < 0 else layer.top_indices.max()
            raise ValueError(f"{layer.name!r} reads position {wrong}, but positions of the context go from 0 to {m - 1}")
        for name, shape in (("highlight", (heads, m)), ("weights", (heads, n, m))):
            given = getattr(layer, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} of {layer.name!r} must be {shape} for these sides, got {given.shape}")


@dataclass(frozen=True, eq=False)
class KeyInput:
    """A text on which a key fired.

    Args:
        tokens: the text.
        at: which token the key fired at.
        coefficient: how strongly.
        source: what the model read meanwhile, where it read something.
    """

    tokens: tuple[str, ...]
    at: int
    coefficient: float
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _texts("tokens", self.tokens))
        if not 0 <= self.at < len(self.tokens):
            raise ValueError(f"at must be one of {len(self.tokens)} tokens, counted from 0, got {self.at}")


@dataclass(frozen=True, eq=False)
class MemoryKey:
    """One key of a feed-forward layer and its value: a row of its first matrix, and what the second one gives for it.

    Args:
        promotes: symbols that the value makes more likely, with their scores, the highest first.
        inputs: texts on which the key fires most, the strongest first.
    """

    promotes: tuple[tuple[str, float], ...]
    inputs: tuple[KeyInput, ...] = ()


@dataclass(frozen=True, eq=False)
class MemoryLayer:
    """The keys of one feed-forward layer that fire most for each token.

    Args:
        name: such as "decoder.layers.0.feed_forward".
        size: how many keys the layer has.
        top_keys: (n, k) integers, the strongest keys of each token.
        coefficients: (n, k), how strongly they fire, 0 for not at all.
        num_firing: (n,), how many keys of the layer fire at all.
        keys: what is known of each key in `top_keys`.
        agreement: share of the keys that fire on some text whose value's first symbol is the one that follows the text's strongest
            position, 0 to 1; None if it is not known.
        num_triggered: how many keys fire on some text; None if it is not known.

    Raises:
        ValueError: shapes that do not fit together, numbers that are negative or not finite, a key of which nothing is known, an
            agreement outside 0 to 1.
    """

    name: str
    size: int
    top_keys: Numbers = field(repr=False)
    coefficients: Numbers = field(repr=False)
    num_firing: Numbers = field(repr=False)
    keys: Mapping[int, MemoryKey] = field(repr=False)
    agreement: float | None = None
    num_triggered: int | None = None

    def __post_init__(self) -> None:
        if self.agreement is not None and not 0.0 <= self.agreement <= 1.0:
            raise ValueError(f"{self.name!r}: agreement must be a share, 0 to 1, got {self.agreement}")
        for name, kind in (("top_keys", np.int64), ("coefficients", np.float32), ("num_firing", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        shapes = (self.top_keys.shape, self.coefficients.shape, self.num_firing.shape)
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[0][:1]:
            raise ValueError(
                f"{self.name!r}: top_keys and coefficients must be (tokens, k) and num_firing (tokens,), got "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
            )
        if not np.isfinite(self.coefficients).all() or (self.coefficients < 0).any():
            raise ValueError(f"{self.name!r}: coefficients must be finite and not negative, got {self.coefficients.min()}")
        missing = sorted(set(self.top_keys.reshape(-1).tolist()) - set(self.keys))
        if missing:
            raise ValueError(f"{self.name!r}: keys says nothing of key {missing[0]}, which stands in top_keys")


@dataclass(frozen=True, eq=False)
class FeedForwardView:
    """What the feed-forward layers remember at each token of a text.

    Args:
        title: one line of plain text.
        tokens: the text.
        layers: at least one.
        notes: sentences for the page's foot, such as which texts `inputs` were looked for in.

    Raises:
        ValueError: no tokens, no layers, a layer of another number of tokens.
        TypeError: tokens that are no `TextSide`.
    """

    title: str
    tokens: TextSide
    layers: tuple[MemoryLayer, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "notes", _texts("notes", self.notes))
        _check_side("tokens", self.tokens, TextSide)
        if not self.layers or not self.tokens.length:
            raise ValueError(f"a view needs tokens and layers, got {self.tokens.length} tokens and {len(self.layers)} layers")
        for layer in self.layers:
            if len(layer.top_keys) != self.tokens.length:
                raise ValueError(f"{layer.name!r} has {len(layer.top_keys)} tokens, but the view has {self.tokens.length}")


def _check_side(name: str, given: object, kinds: Any) -> None:
    if not isinstance(given, kinds):
        raise TypeError(f"{name} expects a side, as TextSide(tokens), got {type(given).__name__} {given!r:.60}")


def _texts(name: str, given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise TypeError(f"{name} expects a sequence of texts, got the text {given[:40]!r}; write ({given[:40]!r},) or tuple(text)")
    texts = tuple(given)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{name} expects texts, got {type(wrong[0]).__name__} {wrong[0]!r}")
    return texts

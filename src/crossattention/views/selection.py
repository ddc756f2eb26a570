"""The part of a view that one picture shows: one head's weights, or their mean over heads and layers, as sparse numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossattention.views.content import AttentionLayer, AttentionView, FeedForwardView
from crossattention.views.labels import shown


@dataclass(frozen=True, eq=False)
class Selection:
    """Weights of n queries on m positions.

    Args:
        name: which layer and head, in words.
        n: number of queries.
        m: number of positions.
        queries: (count,) which query each weight is of, ascending.
        positions: (count,) which position it is of.
        weights: (count,) the weights, above 0.
        mass: (m,) the weights that each position receives, summed over queries.
        is_whole: `mass` is of all weights, not of the kept ones alone.
    """

    name: str
    n: int
    m: int
    queries: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    mass: np.ndarray
    is_whole: bool

    @property
    def largest(self) -> float:
        """The largest weight."""
        return float(self.weights.max(initial=0.0))

    def row(self, query: int) -> np.ndarray:
        """What one query reads, (m,)."""
        whole = np.zeros(self.m, dtype=np.float32)
        is_its = self.queries == query
        whole[self.positions[is_its]] = self.weights[is_its]
        return whole

    def grid(self, rows: int, columns: int) -> np.ndarray:
        """The map in at most so many rows and columns, (rows, columns); a cell is the largest of the weights in it."""
        rows, columns = min(rows, self.n), min(columns, self.m)
        cells = np.zeros((rows, columns), dtype=np.float32)
        np.maximum.at(cells, (self.queries * rows // self.n, self.positions * columns // self.m), self.weights)
        return cells


def select(view: AttentionView, layer: int | None = None, head: int | None = None) -> Selection:
    """Choose what is shown of a view.

    Args:
        view: all of it.
        layer: which layer; None for the mean over all.
        head: which head; None for the mean over all heads of a layer.

    Raises:
        ValueError: there is no such layer or head; a head is asked for and no layer.
    """
    check_choice(view, layer, head)
    chosen = list(view.layers) if layer is None else [view.layers[layer]]
    n, m = view.queries.length, view.context.length
    places, weights = zip(*(_sparse(one, head, n, m) for one in chosen), strict=True)
    flat, back = np.unique(np.concatenate(places), return_inverse=True)
    sums = np.bincount(back, weights=np.concatenate(weights), minlength=len(flat)) / len(chosen)
    is_above = sums > 0
    flat, sums = flat[is_above], sums[is_above].astype(np.float32)
    queries, positions = flat // m, flat % m
    masses = [_mass(one, head) for one in chosen]
    is_whole = all(mass is not None or one.weights is not None for mass, one in zip(masses, chosen, strict=True))
    if all(mass is not None for mass in masses):
        mass = np.mean(masses, axis=0)
    else:
        mass = np.bincount(positions, weights=sums, minlength=m)
    return Selection(_name(view, layer, head), n, m, queries, positions, sums, mass, is_whole)


def check_choice(view: AttentionView | FeedForwardView, layer: int | None, head: int | None) -> None:
    """Refuse a layer or head that a view does not have."""
    if layer is not None and not 0 <= layer < len(view.layers):
        raise ValueError(f"there is no layer {layer}: the view has {len(view.layers)}, counted from 0; leave it out for their mean")
    if head is None:
        return
    if isinstance(view, FeedForwardView):
        raise ValueError(f"a feed-forward layer has no heads, got head={head}; leave it out")
    if layer is None:
        raise ValueError(f"head {head} needs a layer, since each layer has heads of its own; name one of {len(view.layers)}")
    if not 0 <= head < view.layers[layer].heads:
        raise ValueError(
            f"there is no head {head}: layer {layer} has {view.layers[layer].heads}, counted from 0; leave it out for their mean"
        )


def _sparse(layer: AttentionLayer, head: int | None, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat places (query m + position) of a layer's weights and the weights, divided by the number of heads they are of."""
    heads = slice(None) if head is None else slice(head, head + 1)
    count = layer.heads if head is None else 1
    if layer.weights is not None:
        mean = layer.weights[heads].mean(0)
        places = mean.reshape(-1).nonzero()[0]
        return places, mean.reshape(-1)[places]
    indices, weights = layer.top_indices[heads], layer.top_weights[heads]
    places = np.arange(n)[:, None] * m + indices
    return places.reshape(-1), weights.reshape(-1) / count


def _mass(layer: AttentionLayer, head: int | None) -> np.ndarray | None:
    if layer.highlight is None:
        return None
    return layer.highlight.mean(0) if head is None else layer.highlight[head]


def _name(view: AttentionView, layer: int | None, head: int | None) -> str:
    where = f"mean of {len(view.layers)} layers" if layer is None else shown(view.layers[layer].name)
    if layer is None and len(view.layers) == 1:
        where = shown(view.layers[0].name)
    return f"{where}, {'mean of heads' if head is None else f'head {head}'}"

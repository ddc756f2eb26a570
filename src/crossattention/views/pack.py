"""The numbers of a view as they travel inside a page: half floats and small integers in base64, within a budget of bytes.

A half float carries 11 bits, so each number is right to 0.05 % of itself, and the smallest that is told from zero is 6e-8 of
the largest of its array. What does not fit the budget is left out in a fixed order, and a note says so in the page.
Legend: h heads, n queries, m context positions, k weights kept of each query.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossattention.views.content import AttentionLayer, AttentionView

BYTES_OF_BASE64 = 4 / 3
FEWEST_BESIDE_A_HIGHLIGHT = 4  # of a query; rather than fewer, the highlight is left out
BYTES_OF_A_LAYER = 400  # its name and the words around its numbers


@dataclass(frozen=True)
class Choice:
    """What is kept of each layer: whole weights or the k largest; the highlight of each head, of their mean, or none."""

    k: int | None
    highlight: str


def packed_floats(numbers: np.ndarray) -> dict[str, Any]:
    """Non-negative numbers as half floats of their largest: {"scale", "data"}."""
    scale = float(numbers.max()) if numbers.size else 0.0
    shares = numbers / scale if scale > 0 else np.zeros_like(numbers)
    return {"scale": scale, "data": base64_of(shares.astype("<f2"))}


def base64_of(array: np.ndarray) -> str:
    """The bytes of an array, row by row, in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def packed_layers(view: AttentionView, budget: float) -> tuple[list[dict[str, Any]], list[str]]:
    """All layers of a view for a page, and notes on what is left out of them.

    Args:
        view: what is shown.
        budget: bytes that the layers may take.

    Raises:
        ValueError: not even the largest weight of each query fits.
    """
    for choice in _choices(view):
        if _bytes(view, choice) <= budget:
            return [_packed(layer, choice, view.context.length) for layer in view.layers], _notes(view, choice)
    least = Choice(1, "none")
    raise ValueError(
        f"the largest weight of each query in {len(view.layers)} layers takes {_bytes(view, least):,.0f} bytes, of which "
        f"{max(budget, 0):,.0f} are left in the page; show fewer layers or queries, or raise max_bytes"
    )


def _choices(view: AttentionView) -> Iterator[Choice]:
    """From all that the view holds to the least that can be shown."""
    if all(layer.weights is not None for layer in view.layers):
        yield Choice(None, "each")
    most = max(layer.top_indices.shape[2] for layer in view.layers)
    fewer = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}, reverse=True)
    yield Choice(most, "each")
    yield from (Choice(k, "mean") for k in fewer if k >= min(FEWEST_BESIDE_A_HIGHLIGHT, most))
    yield from (Choice(k, "none") for k in fewer)


def _bytes(view: AttentionView, choice: Choice) -> float:
    n, m = view.queries.length, view.context.length
    total = 0
    for layer in view.layers:
        if choice.k is None:
            total += 2 * layer.heads * n * m
        else:
            total += (2 + _index_type(m).itemsize) * layer.heads * n * min(choice.k, layer.top_indices.shape[2])
        if layer.highlight is not None:
            total += 2 * m * {"each": layer.heads, "mean": 1, "none": 0}[choice.highlight]
    return BYTES_OF_BASE64 * total + BYTES_OF_A_LAYER * len(view.layers)


def _packed(layer: AttentionLayer, choice: Choice, m: int) -> dict[str, Any]:
    packed: dict[str, Any] = {"heads": layer.heads, "weights": None, "top": None, "highlight": None}
    if choice.k is None:
        packed["weights"] = packed_floats(layer.weights)
    else:
        indices, weights = _largest(layer, choice.k)
        integers = base64_of(indices.astype(_index_type(m)))
        packed["top"] = {"k": indices.shape[2], "indices": integers, "weights": packed_floats(weights)}
    if layer.highlight is not None and choice.highlight != "none":
        is_mean = choice.highlight == "mean"
        packed["highlight"] = packed_floats(layer.highlight.mean(0) if is_mean else layer.highlight)
        packed["highlight"]["isMean"] = is_mean
    return packed


def _largest(layer: AttentionLayer, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights of the k largest that are kept of each query, the largest first."""
    order = np.argsort(-layer.top_weights, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(layer.top_indices, order, -1), np.take_along_axis(layer.top_weights, order, -1)


def _index_type(m: int) -> np.dtype:
    return np.dtype("<u2" if m <= 2**16 else "<u4")


def _notes(view: AttentionView, choice: Choice) -> list[str]:
    """What a reader must know of numbers that are not all there."""
    notes = []
    if choice.k is not None:
        given = max(layer.top_indices.shape[2] for layer in view.layers)
        is_all = given >= view.context.length and choice.k >= given
        if not is_all:
            what = "the largest weight" if choice.k == 1 else f"the {choice.k} largest weights"
            less = f" of {given} that were given, for the page's size" if choice.k < given else ""
            notes.append(
                f"Of each query {what}{less} are kept; what is not shown need not be zero.".replace("weight are", "weight is")
            )
    if any(layer.highlight is not None for layer in view.layers):
        if choice.highlight == "mean":
            notes.append(
                "Of the mass that each position receives, the mean over the heads of a layer is kept, for the page's size."
            )
        elif choice.highlight == "none":
            notes.append("The mass that each position receives is summed from the kept weights alone, for the page's size.")
    return notes

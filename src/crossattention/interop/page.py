"""A recording as plain data for `crossattention.views`: arrays and labels of one item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from crossattention.interop.recording import Layer, Recorded
from crossattention.maps.summaries import Highlight, Rows, Summary, TopK


def page_of(
    pages: Any,
    layers: Mapping[str, Layer],
    summaries: Sequence[Summary],
    queries: Any,
    context: Any,
    item: int | tuple[int, int],
    title: str,
) -> Any:
    """An `AttentionView` of `crossattention.views.pages`, the module that is passed, of one item of every layer.

    Raises:
        ValueError: no TopK among the summaries, layers of unlike lengths, labels that do not fit, an item that is not there.
    """
    places = {kind: next((i for i, one in enumerate(summaries) if isinstance(one, kind)), None) for kind in (TopK, Highlight, Rows)}
    if places[TopK] is None:
        raise ValueError(
            "view shows the positions that each query reads most, and no TopK was recorded; record [TopK(8), Highlight()]"
        )
    shown = {name: layer.merged for name, layer in layers.items()}
    lengths = {recorded.shape[-2:] for recorded in shown.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"view shows layers that read the same two sequences, got (queries, context) of {sorted(lengths)}; choose some that "
            f"do, as layers=[{next(iter(shown))!r}]"
        )
    n, m = next(iter(lengths))
    views = tuple(_layer(pages, layers[name], name, recorded, places, item) for name, recorded in shown.items())
    return pages.AttentionView(title, _side(pages, "queries", queries, n), _side(pages, "context", context, m), views)


def _layer(
    pages: Any, layer: Layer, name: str, recorded: Recorded, places: Mapping[type, int | None], item: int | tuple[int, int]
) -> Any:
    """One layer's arrays."""
    top = recorded[places[TopK] or 0]
    highlight, rows = (None if places[kind] is None else recorded[places[kind]] for kind in (Highlight, Rows))
    n, m = recorded.shape[-2:]
    if rows is not None and rows.shape[-2:] != (n, m):
        rows = None
    batch = recorded.shape[:-3]

    def of_item(tensor: Tensor | None, dims: int) -> Any:
        if tensor is None:
            return None
        one = tensor[_place(batch, item)]
        return (one.unsqueeze(0) if one.dim() < dims else one).detach().float().cpu().numpy()

    return pages.AttentionLayer(
        name=name,
        kind=layer.kind,
        top_indices=of_item(top.positions, 3).astype("int64"),
        top_weights=of_item(top.weights, 3),
        highlight=of_item(highlight, 2),
        weights=of_item(rows, 3),
    )


def _place(batch: tuple[int, ...], item: int | tuple[int, int]) -> tuple[int, ...]:
    """Where an item stands in a batch (z,) or (z, r); an item alone is the first of its r."""
    place = (item,) if isinstance(item, int) else tuple(item)
    place += (0,) * (len(batch) - len(place))
    if len(place) != len(batch) or not all(-size <= at < size for at, size in zip(place, batch, strict=True)):
        raise ValueError(f"item {item} is not in a batch of shape {batch}; give an index for each of its dimensions")
    return place


def _side(pages: Any, name: str, given: Any, length: int) -> Any:
    """What a sequence is shown as: numbers, tokens, or what the caller made."""
    if given is None:
        return pages.LongSide(length, {})
    if isinstance(given, pages.TextSide | pages.ImageSide | pages.SoundSide | pages.LongSide):
        return given
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name} expects a list with a label for each position, or a side of crossattention.views.pages, got "
            f"{type(given).__name__} {given!r:.60}; for letters pass list(text)"
        )
    labels = tuple(map(str, given))
    if len(labels) != length:
        raise ValueError(f"{name} has {len(labels)} labels, but the map has {length} of them; give one for each")
    return pages.TextSide(labels)

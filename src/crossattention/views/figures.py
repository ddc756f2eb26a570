"""Figures for papers: a view as PNG or SVG by matplotlib, without a browser.

Every figure states its numbers: a scale with ticks, and the weights themselves where there is room. Colours are matplotlib's
cividis, which grows evenly in lightness and looks alike to all kinds of colour vision. Texts of the data are no markup:
`$` starts no formula. In an SVG texts stay texts.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from crossattention.views.content import (
    AttentionView,
    FeedForwardView,
    ImageSide,
    LongSide,
    MemoryLayer,
    Side,
    SoundSide,
    TextSide,
)
from crossattention.views.files import checked_path, write_whole
from crossattention.views.labels import shortened, shown
from crossattention.views.selection import Selection, check_choice, select
from crossattention.views.spectrum import spectrogram

FORMATS = (".png", ".svg")
COLOURS = "cividis"
DARK_INK_FROM = 0.47  # of the scale: there black and white have the same contrast with cividis, 4.6
MOST_RIBBONS = 36  # tokens of a side
MOST_LABELS = 60
MOST_PICTURES = 8
MOST_CELLS = (600, 1_200)
STRIP_CELLS = 64
INCHES_OF_A_LETTER = 0.065
JOINED = "\ufe0f\u200d"  # they make up an emoji, and show nothing themselves
WIDEST = 7.2  # inches: two columns of a paper
STYLE = {
    "font.size": 8.0,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "axes.titlesize": 8.0,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    # No random ids: the same view gives the same file.
    "svg.hashsalt": "crossattention",
}


def write_figure(
    view: AttentionView | FeedForwardView, path: str | Path, *, layer: int | None = None, head: int | None = None
) -> Path:
    """Write a view as a figure.

    Text on text is drawn as ribbons over a matrix, a picture once for each of the first eight queries, a sound as its
    spectrogram over the weights, a long context as strips from all positions down to one, feed-forward layers as the three
    strongest keys of each token in one of them.

    Args:
        view: what is shown.
        path: file to write, ending in `.png` (300 dots an inch) or `.svg`; one that is there is replaced.
        layer: which layer; None for the mean over all, of feed-forward layers the last.
        head: which head; None for the mean over all heads.

    Returns:
        The path written. The same view gives the same bytes with the same matplotlib and fonts.

    Raises:
        ValueError: another ending; there is no such layer or head.
        IsADirectoryError, FileNotFoundError: `path` is a folder, or its folder is missing.
    """
    path = checked_path(path, FORMATS)
    check_choice(view, layer, head)

    import matplotlib
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # an SVG's reader may have the font
        figure = Figure(layout="constrained")
        labels = Labels(is_png=path.suffix.lower() == ".png")
        if isinstance(view, FeedForwardView):
            _memory(figure, view, view.layers[-1 if layer is None else layer], labels)
        else:
            _draw(figure, view, select(view, layer, head), labels)
        is_svg = path.suffix.lower() == ".svg"
        metadata = {"Date": None} if is_svg else {"Software": None}
        figure.savefig(stream, format=path.suffix[1:].lower(), dpi=300, metadata=metadata, bbox_inches="tight", pad_inches=0.04)
    write_whole(path, stream.getvalue())
    return path


class Labels:
    """Texts of the data as a figure can show them: visible, short, in characters that its font has.

    Args:
        is_png: characters that the font lacks become their code points; an SVG leaves them to its reader's fonts.
    """

    def __init__(self, *, is_png: bool) -> None:
        self.is_png = is_png

    def text(self, text: str, limit: int = 24) -> str:
        """One text."""
        label = shortened(shown(text), limit)
        if not self.is_png or label.isascii():
            return label
        known = _characters()
        return "".join(char if ord(char) in known or char in JOINED else _code_point(char) for char in label)

    def of(self, side: Side, at: int) -> str:
        """The name of a position."""
        if isinstance(side, TextSide):
            return self.text(side.tokens[at])
        if isinstance(side, LongSide):
            return self.text(side.labels[at]) if at in side.labels else f"{at:,}"
        if isinstance(side, SoundSide):
            return f"{at * side.seconds_per_position:.2f} s"
        if at < len(side.leading):
            return self.text(side.leading[at])
        row, column = divmod(at - len(side.leading), side.columns)
        return f"{row},{column}"


def _code_point(char: str) -> str:
    """The code point of a character in brackets; a control character's own, not that of its symbol."""
    number = ord(char)
    return f"⟦{number - 0x2400 if 0x2400 <= number < 0x2421 else number:X}⟧"


def _characters() -> frozenset[int]:
    """Code points that the figures' font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=STYLE["font.family"]))).get_charmap())


def _draw(figure: Any, view: AttentionView, selection: Selection, labels: Labels) -> None:
    title = f"{labels.text(view.title, 90)}\n{labels.text(selection.name, 90)}"
    figure.suptitle(title, fontsize=8, x=0.02, ha="left", parse_math=False)
    context = view.context
    if isinstance(context, ImageSide):
        _pictures(figure, view, context, selection, labels)
    elif isinstance(context, SoundSide):
        _sound(figure, view, context, selection, labels)
    elif isinstance(context, LongSide) or selection.m > 1_000:
        _strips(figure, context, selection, labels)
    elif max(selection.n, selection.m) <= MOST_RIBBONS:
        _ribbons_and_matrix(figure, view, selection, labels)
    else:
        figure.set_size_inches(WIDEST, min(9.0, max(2.5, WIDEST * 0.75 * selection.n / selection.m)))
        _matrix(figure, figure.add_subplot(), view, selection, labels)


# ------------------------------------------------------------------------------------------------------ text on text


def _ribbons_and_matrix(figure: Any, view: AttentionView, selection: Selection, labels: Labels) -> None:
    n, m = selection.n, selection.m
    width = min(WIDEST, max(2.6, 0.30 * max(n, m) + 0.9))
    cell = (width - 0.9) / m
    height = max(0.16, min(0.24, cell)) * n
    names = [labels.of(view.queries, query) for query in range(n)]
    is_turned = max(map(len, names)) > 3 and n > 6
    turned = [labels.of(view.context, at) for at in range(m)] + (names if is_turned else [])
    room = 2 * INCHES_OF_A_LETTER * max(0, max(map(len, turned)) - 3)  # for labels that stand upright
    figure.set_size_inches(width, 1.85 + height + room)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.25, height], sharex=True)
    _matrix(figure, lower, view, selection, labels)
    lower.tick_params(axis="x", labeltop=True)
    upper.set_xlim(-0.5, m - 0.5)
    upper.set_ylim(1, 0)
    upper.set_axis_off()
    _bands(upper, selection)
    for query, name in enumerate(names):
        place = (query + 0.5) * m / n - 0.5
        upper.text(place, -0.04, name, ha="center", va="bottom", rotation=90 if is_turned else 0, parse_math=False)


def _bands(axes: Any, selection: Selection) -> None:
    """Bands from queries above to positions below, as thick as their weights; those of a query fill its width in sum."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    n, m = selection.n, selection.m
    wide = 0.8 * min(1.0, m / n)
    sums = np.bincount(selection.positions, weights=selection.weights, minlength=m)
    scale = wide / max(1.0, float(sums.max(initial=0.0)))
    above = (np.arange(n) + 0.5) * m / n - 0.5 - wide / 2
    below = np.arange(m) - sums * scale / 2
    for query, position, weight in zip(selection.queries, selection.positions, selection.weights, strict=True):
        a, b, thick_a, thick_b = above[query], below[position], weight * wide, weight * scale
        above[query] += thick_a
        below[position] += thick_b
        if weight < 0.02:
            continue
        points = [(a, 0), (a, 0.5), (b, 0.5), (b, 1), (b + thick_b, 1), (b + thick_b, 0.5), (a + thick_a, 0.5), (a + thick_a, 0)]
        codes = [Outline.MOVETO, *[Outline.CURVE4] * 3, Outline.LINETO, *[Outline.CURVE4] * 3]
        axes.add_patch(PathPatch(Outline(points, codes), facecolor="#1f4e8c", alpha=0.25 + 0.6 * float(weight), linewidth=0))


def _matrix(figure: Any, axes: Any, view: AttentionView, selection: Selection, labels: Labels) -> None:
    n, m = selection.n, selection.m
    cells = selection.grid(*MOST_CELLS)
    extent = (-0.5, m - 0.5, n - 0.5, -0.5)
    image = axes.imshow(
        cells, cmap=COLOURS, vmin=0.0, vmax=selection.largest or 1.0, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    for which, side, count in (("x", view.context, m), ("y", view.queries, n)):
        if count <= MOST_LABELS:
            names = [labels.of(side, at) for at in range(count)]
            is_turned = which == "x" and max(map(len, names)) > max(1.0, 30 / count)
            setter = axes.set_xticks if which == "x" else axes.set_yticks
            setter(range(count), names, parse_math=False, rotation=90 if is_turned else 0)
    axes.xaxis.tick_top()
    if m > MOST_LABELS:
        axes.set_xlabel("position in the context")
    if n > MOST_LABELS:
        axes.set_ylabel("query")
    if n <= 20 and m <= 16:
        _cell_numbers(axes, selection)
    _scale(figure, image, axes)


def _cell_numbers(axes: Any, selection: Selection) -> None:
    for query, position, weight in zip(selection.queries, selection.positions, selection.weights, strict=True):
        if weight >= 0.005:
            digits = "1" if weight >= 0.995 else f"{weight:.2f}"[1:]
            ink = "black" if weight > DARK_INK_FROM * selection.largest else "white"
            axes.text(position, query, digits, ha="center", va="center", fontsize=6, color=ink)


def _scale(figure: Any, image: Any, axes: Any, label: str = "weight") -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=18, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(width=0.6, length=2)


# --------------------------------------------------------------------------------------------- picture, sound, long B


def _pictures(figure: Any, view: AttentionView, context: ImageSide, selection: Selection, labels: Labels) -> None:
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(context.png), format="png")
    rows = [selection.row(query) for query in range(min(selection.n, MOST_PICTURES))]
    first = len(context.leading)
    largest = max(float(row[first:].max(initial=0.0)) for row in rows) or 1.0
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    width, height = context.size
    size = min(1.75, 6.4 / across)
    figure.set_size_inches(across * size + 0.8, down * (size * height / width + 0.28) + 0.4)
    axes = figure.subplots(down, across, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for query, (row, place) in enumerate(zip(rows, axes.flat, strict=False)):
        patches = row[first:].reshape(context.rows, context.columns)
        place.imshow(pixels, extent=(0, width, height, 0), cmap="gray" if pixels.ndim == 2 else None)
        image = place.imshow(
            patches, cmap=COLOURS, vmin=0, vmax=largest, alpha=0.65, extent=(0, width, height, 0), interpolation="nearest"
        )
        _outline_of_strongest(place, patches, width / context.columns, height / context.rows)
        place.set_title(labels.of(view.queries, query), pad=3, parse_math=False)
    _scale(figure, image, axes)
    if selection.n > len(rows):
        figure.supxlabel(f"the first {len(rows)} of {selection.n:,} queries", fontsize=7)


def _outline_of_strongest(axes: Any, patches: np.ndarray, wide: float, high: float) -> None:
    from matplotlib.patches import Rectangle

    row, column = np.unravel_index(patches.argmax(), patches.shape)
    if patches[row, column] <= 0:
        return
    axes.add_patch(Rectangle((column * wide, row * high), wide, high, fill=False, edgecolor="white", linewidth=1.2))
    number = axes.text(0.03, 0.04, f"{patches[row, column]:.2g}", transform=axes.transAxes, color="white", fontsize=7, va="bottom")
    number.set_bbox({"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 1.5})


def _sound(figure: Any, view: AttentionView, context: SoundSide, selection: Selection, labels: Labels) -> None:
    total = selection.m * float(context.seconds_per_position or 0)
    rows = min(selection.n, MOST_LABELS)
    figure.set_size_inches(WIDEST * 0.7, 1.6 + 0.16 * max(rows, 4) + 0.4)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.1, max(0.7, 0.16 * rows)], sharex=True)
    spectrum = spectrogram(context)
    extent = (0, context.seconds, 0, spectrum.highest_hertz / 1000)
    upper.imshow(spectrum.levels.T, origin="lower", aspect="auto", cmap="gray_r", extent=extent)
    upper.set_ylabel("kHz")
    cells = selection.grid(*MOST_CELLS)
    box = (0, total, selection.n - 0.5, -0.5)
    image = lower.imshow(
        cells, aspect="auto", cmap=COLOURS, vmin=0, vmax=selection.largest or 1.0, extent=box, interpolation="nearest"
    )
    if selection.n <= MOST_LABELS:
        lower.set_yticks(range(selection.n), [labels.of(view.queries, query) for query in range(selection.n)], parse_math=False)
    else:
        lower.set_ylabel("query")
    lower.set_xlim(0, max(total, context.seconds))
    lower.set_xlabel("seconds")
    lower.tick_params(axis="y", length=0)
    _scale(figure, image, lower)


def _strips(figure: Any, context: Side, selection: Selection, labels: Labels) -> None:
    """The mass of all positions in cells, the strongest cell again in cells, and so down to single positions."""
    levels = []
    first, length, size = 0, selection.m, selection.m
    while size > 1:
        size = -(-length // STRIP_CELLS)
        part = selection.mass[first : first + length]
        cells = np.add.reduceat(part, np.arange(0, length, size))
        levels.append((first, size, cells))
        first += int(cells.argmax()) * size
        length = min(size, selection.m - first)
    figure.set_size_inches(WIDEST * 0.75, 1.05 * len(levels) + 0.5)
    for axes, (first, size, cells) in zip(figure.subplots(len(levels), 1, squeeze=False).flat, levels, strict=True):
        best = int(cells.argmax())
        colours = ["#a83f00" if cell == best else "#1f4e8c" for cell in range(len(cells))]
        axes.bar(first + (np.arange(len(cells)) + 0.5) * size, cells, width=0.86 * size, color=colours)
        axes.set_xlim(first, first + len(cells) * size)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        start = first + best * size
        name = labels.of(context, start) if size == 1 else f"{start:,} to {min(start + size, selection.m) - 1:,}"
        named = f"position {start:,} ({name})" if size == 1 and name != f"{start:,}" else f"position{'s' * (size > 1)} {name}"
        axes.set_title(f"{size:,} a cell; most in {named}: {cells[best]:.3g}", loc="left", parse_math=False, fontsize=7)
    what = "mass over all queries" if selection.is_whole else "mass of the kept weights"
    figure.supylabel(what, fontsize=7)
    figure.supxlabel("position in the context", fontsize=7)


# ---------------------------------------------------------------------------------------------------- feed-forward


def _memory(figure: Any, view: FeedForwardView, layer: MemoryLayer, labels: Labels) -> None:
    """A row for each token, a column for each of its strongest keys, and in the cells what their values promote."""
    shown_keys = layer.coefficients[:MOST_LABELS, :3]
    n, k = shown_keys.shape
    what = f"{labels.text(layer.name, 60)}: the strongest of {layer.size:,} keys, and what their values promote"
    title = f"{labels.text(view.title, 90)}\n{what}"
    figure.suptitle(title, fontsize=8, x=0.02, ha="left", parse_math=False)
    figure.set_size_inches(min(WIDEST, 1.2 + 1.7 * k), 0.75 + 0.3 * n)
    axes = figure.add_subplot()
    largest = float(shown_keys.max(initial=0.0)) or 1.0
    image = axes.imshow(shown_keys, cmap=COLOURS, vmin=0, vmax=largest, aspect="auto")
    axes.set_yticks(range(n), [labels.text(token) for token in view.tokens.tokens[:n]], parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in range(n):
        for column in range(k):
            coefficient = float(shown_keys[row, column])
            if coefficient == 0:
                continue
            key = int(layer.top_keys[row, column])
            symbols = " ".join(labels.text(symbol, 10) for symbol, _ in layer.keys[key].promotes[:4])
            ink = "black" if coefficient > DARK_INK_FROM * largest else "white"
            text = f"key {key:,}: {coefficient:.2f}\n{symbols}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=ink, parse_math=False)
    _scale(figure, image, axes, "coefficient")

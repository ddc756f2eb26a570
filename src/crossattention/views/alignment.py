"""The picture of an alignment: how much each output symbol read of each input symbol.

Plain data in (labels and a matrix of weights), text, PNG or SVG out. Nothing here knows a model, a tensor or a
terminal: the caller says how wide it may draw and whether colours are understood.

Labels are data, never markup: control characters are shown as escapes, so a label can neither colour nor clear a
terminal, and in figures `$` does not start a formula.
"""

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Level = TypeVar("Level")

SHADES = " ░▒▓█"
ASCII_SHADES = " .:*#"
# Nine colours of the 256-colour cube, dark to light, so that order is also seen without hues.
HEAT = (16, 17, 54, 90, 126, 168, 209, 221, 229)
SMALLEST_CELL = 2  # two characters are about a square
LONGEST_LABEL = 16
SMALLEST_WIDTH = 24


def escaped(text: str) -> str:
    r"""Show a text of the data as it can safely stand in one line of a terminal.

    Args:
        text: any text.

    Returns:
        The same text, with Python escapes for each character that moves the cursor, starts an escape sequence, ends
        the line or overrides the direction of writing.

    Example:
        >>> escaped("[red]x\x1b[2J")
        '[red]x\\x1b[2J'
    """
    return "".join(_escape(char) if _is_unsafe(char) else char for char in text)


def visible(label: str) -> str:
    """Show a label so that it can be seen alone: `escaped`, a space as an open box, a lone accent on a dotted circle.

    Args:
        label: any text, most often one symbol.

    Example:
        >>> visible(" ")
        '␣'
    """
    if label == " ":
        return "␣"
    shown = escaped(label)
    return f"◌{shown}" if shown and unicodedata.combining(shown[0]) else shown


def alignment_blocks(
    rows: Sequence[str],
    columns: Sequence[str],
    weights: Sequence[Sequence[float]],
    *,
    max_width: int | None = None,
    max_height: int | None = None,
    has_colour: bool = False,
    is_ascii: bool = False,
) -> str:
    """Draw a cross-attention map in block characters.

    One line for each row, one group of blocks for each column, and the scale: from 0 to the largest weight of the whole
    map. What does not fit is left out at the right and at the bottom, and a line says so.

    Args:
        rows: what reads, one label a row (output symbols); any display width, also combining marks.
        columns: what is read, one label a column (input symbols).
        weights: `len(rows)` rows of `len(columns)` weights, finite and not negative.
        max_width: width in terminal cells that must not be exceeded, at least 24; None draws everything.
        max_height: number of lines that must not be exceeded, at least 4; None draws everything.
        has_colour: also colour the blocks with ANSI 256-colour sequences.
        is_ascii: shade with ASCII characters, for outputs that cannot encode blocks.

    Returns:
        Lines joined by newlines, without one at the end and without blanks at the ends of lines.

    Raises:
        ValueError: the number of labels and the shape of `weights` differ, a weight is negative or not finite, or
            there is too little room.

    Example:
        >>> print(alignment_blocks(["F", "OW"], ["p", "h", "o"], [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]))
           p h o
        F  ▓▓▓▓
        OW   ░░██
        0 ░▒▓█ 0.75
    """
    _check(rows, columns, weights)
    _check_room(max_width, max_height)
    if not rows or not columns:
        return f"(nothing to draw: {len(rows)} rows, {len(columns)} columns)"

    row_labels = [_shortened(visible(label), _label_limit(max_width)) for label in rows]
    column_labels = [_shortened(visible(label), LONGEST_LABEL) for label in columns]
    margin = max(_cells(label) for label in row_labels) + 1
    # Single letters stand shoulder to shoulder; longer labels need a gap to be told apart.
    widths = [max(SMALLEST_CELL, _cells(label) + 1) for label in column_labels]
    num_columns = _columns_that_fit(widths, margin, max_width)
    num_rows = _rows_that_fit(len(rows), num_columns < len(columns), max_height)

    top = max(max(row) for row in weights)
    shades = ASCII_SHADES if is_ascii else SHADES
    painted = _coloured if has_colour else _shaded
    lines = [" " * margin + "".join(map(_padded, column_labels[:num_columns], widths))]
    for label, row in zip(row_labels[:num_rows], weights, strict=False):
        shares = [weight / top if top > 0 else 0.0 for weight in row[:num_columns]]
        lines.append(_padded(label, margin) + painted(shares, widths, shades))
    steps = [index / (len(HEAT) - 1) for index in range(len(HEAT))] if has_colour else [0.25, 0.5, 0.75, 1.0]
    lines.append(f"0 {painted(steps, [1] * len(steps), shades)} {top:.2f}")
    if num_columns < len(columns) or num_rows < len(rows):
        lines.append(_clipping_line(num_rows, len(rows), num_columns, len(columns), max_width))
    return "\n".join(line.rstrip(" ") for line in lines)


def save_alignment(
    path: str | Path,
    rows: Sequence[str],
    columns: Sequence[str],
    weights: Sequence[Sequence[float]],
    *,
    title: str | None = None,
) -> Path:
    """Write the same picture as PNG or SVG.

    Args:
        path: file to write, ending in `.png` or `.svg`.
        rows: what reads, one label a row.
        columns: what is read, one label a column.
        weights: `len(rows)` rows of `len(columns)` weights, finite and not negative.
        title: a line above the picture; plain text.

    Returns:
        The path written. The same input gives the same bytes.

    Raises:
        ValueError: another ending, labels and weights do not fit together, or there is nothing to draw.
    """
    path = Path(path)
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"a picture of an alignment is a .png or a .svg file, not {path.name!r}; name the file so")
    _check(rows, columns, weights)
    if not rows or not columns:
        raise ValueError(f"a picture needs rows and columns, got {len(rows)} rows and {len(columns)} columns")

    import matplotlib
    from matplotlib.figure import Figure

    size = (1.2 + 0.34 * len(columns), 1.0 + 0.34 * len(rows) + (0.3 if title else 0.0))
    # A fixed salt and no date: the picture of the same numbers is the same file, so it can lie under version control.
    with matplotlib.rc_context({"svg.hashsalt": "crossattention"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(weights, cmap="magma", vmin=0.0, aspect="equal")
        axes.set_xticks(range(len(columns)), [visible(label) for label in columns], parse_math=False)
        axes.set_yticks(range(len(rows)), [visible(label) for label in rows], parse_math=False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if max(_cells(visible(label)) for label in columns) > 3:
            axes.tick_params(axis="x", rotation=60)
        if title:
            axes.set_title(escaped(title), parse_math=False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    return path


def _is_unsafe(char: str) -> bool:
    overrides_direction = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
    return overrides_direction or unicodedata.category(char) in {"Cc", "Zl", "Zp", "Cs"}


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _cells(label: str) -> int:
    from rich.cells import cell_len

    return cell_len(label)


def _shortened(label: str, limit: int) -> str:
    if _cells(label) <= limit:
        return label
    while _cells(label) > limit - 1:
        label = label[:-1]
    return label + "…"


def _padded(label: str, width: int) -> str:
    return label + " " * (width - _cells(label))


def _check(rows: Sequence[str], columns: Sequence[str], weights: Sequence[Sequence[float]]) -> None:
    if len(weights) != len(rows):
        raise ValueError(f"{len(rows)} row labels need {len(rows)} rows of weights, got {len(weights)}")
    for index, row in enumerate(weights):
        if len(row) != len(columns):
            raise ValueError(f"{len(columns)} column labels need {len(columns)} weights a row, row {index} has {len(row)}")
        for weight in row:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights must be finite and not negative, row {index} ({rows[index]!r}) has {weight}")


def _check_room(max_width: int | None, max_height: int | None) -> None:
    if max_width is not None and max_width < SMALLEST_WIDTH:
        raise ValueError(f"a map needs a width of at least {SMALLEST_WIDTH} cells, got max_width={max_width}")
    if max_height is not None and max_height < 4:
        raise ValueError(f"a map needs at least 4 lines (labels, row, scale, note), got max_height={max_height}")


def _label_limit(max_width: int | None) -> int:
    return LONGEST_LABEL if max_width is None else min(LONGEST_LABEL, max_width // 3)


def _columns_that_fit(widths: list[int], margin: int, max_width: int | None) -> int:
    if max_width is None:
        return len(widths)
    used, count = margin, 0
    while count < len(widths) and used + widths[count] <= max_width:
        used += widths[count]
        count += 1
    return max(count, 1)  # room for one is always there: labels are cut to a third of the width


def _rows_that_fit(num_rows: int, is_clipped: bool, max_height: int | None) -> int:
    if max_height is None or num_rows + 2 + is_clipped <= max_height:
        return num_rows
    return max_height - 3  # labels, scale, note


def _clipping_line(shown_rows: int, num_rows: int, shown_columns: int, num_columns: int, max_width: int | None) -> str:
    parts = []
    if shown_columns < num_columns:
        parts.append(f"{shown_columns} of {num_columns} columns")
    if shown_rows < num_rows:
        parts.append(f"{shown_rows} of {num_rows} rows")
    return _shortened(f"first {', '.join(parts)}", max_width or 200)


def _shaded(shares: Sequence[float], widths: Sequence[int], shades: str) -> str:
    """A row of shares of the largest weight as blocks of the columns' widths."""
    return "".join(_level(share, shades) * width for share, width in zip(shares, widths, strict=False))


def _coloured(shares: Sequence[float], widths: Sequence[int], shades: str) -> str:
    """The same in colours. Letter and ground have one: a full cell on a screen, a readable shade where it is pasted."""
    cells = []
    for share, width in zip(shares, widths, strict=False):
        colour = _level(share, HEAT)
        cells.append(f"\x1b[38;5;{colour};48;5;{colour}m{_level(share, shades) * width}")
    return "".join(cells) + "\x1b[0m"


def _level(share: float, levels: Sequence[Level]) -> Level:
    return levels[round(share * (len(levels) - 1))]

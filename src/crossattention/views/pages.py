"""Pages: one HTML file that shows a view, opens from disk, and asks nothing of a network or a server.

    write_page(view, "page.html")        write_figure(view, "figure.svg")

Text of the data is never markup and never code: it travels as JSON in a block that no browser runs, with `<` escaped, and the
page's own script puts it on the page as text. The page's policy (Content-Security-Policy) allows exactly the one script and
the one style sheet that are written here, known by their hashes, and pictures and sounds out of the file itself.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import wave
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from crossattention.views.content import (
    AttentionLayer,
    AttentionView,
    FeedForwardView,
    ImageSide,
    KeyInput,
    LongSide,
    MemoryKey,
    MemoryLayer,
    Side,
    SoundSide,
    TextSide,
)
from crossattention.views.figures import write_figure
from crossattention.views.files import checked_path, write_whole
from crossattention.views.labels import shortened, shown
from crossattention.views.pack import base64_of, packed_layers
from crossattention.views.selection import check_choice
from crossattention.views.spectrum import spectrogram

__all__ = [
    "AttentionLayer",
    "AttentionView",
    "FeedForwardView",
    "ImageSide",
    "KeyInput",
    "LongSide",
    "MemoryKey",
    "MemoryLayer",
    "SoundSide",
    "TextSide",
    "write_figure",
    "write_page",
]

MAX_BYTES = 5_000_000
ROOM_FOR_NOTES = 2_000
LONGEST_TITLE = 120

# In this order they make one script: each file uses what stands in those before it.
ATTENTION = (
    "numbers.js",
    "sides.js",
    "drawing.js",
    "ribbons.js",
    "matrix.js",
    "picture.js",
    "sound.js",
    "strips.js",
    "table.js",
    "page.js",
)
MEMORY = ("numbers.js", "sides.js", "drawing.js", "memory.js")


def write_page(
    view: AttentionView | FeedForwardView,
    path: str | Path,
    *,
    layer: int | None = None,
    head: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write a view as one HTML file.

    Args:
        view: what is shown.
        path: file to write, ending in `.html`; one that is there is replaced, when the new one is complete.
        layer: which layer is shown first; None for the mean over all, of a feed-forward view for the last.
        head: which head of it; None for the mean over all; a feed-forward view has no heads.
        max_bytes: the most bytes of the file. What does not fit is left out, and the page says so: first all weights but the
            largest that the view keeps, then the highlight of each head but their mean, then the smaller weights down to four a
            query, then the highlight in the place of these.

    Returns:
        The path written. The same view gives the same bytes.

    Raises:
        ValueError: another ending, a view too large for `max_bytes`, or there is no such layer or head.
        IsADirectoryError, FileNotFoundError: `path` is a folder, or its folder is missing.
    """
    path = checked_path(path, (".html",))
    check_choice(view, layer, head)
    start = {"layer": layer, "head": head}
    if isinstance(view, FeedForwardView):
        page = _page({**memory_data(view), "start": start}, view.title, MEMORY).encode()
        if len(page) > max_bytes:
            raise ValueError(
                f"the page takes {len(page):,} bytes, more than max_bytes={max_bytes:,}; show fewer layers, tokens or keys"
            )
    else:
        data: dict[str, Any] = {"queries": _side(view.queries), "context": _side(view.context), "start": start}
        data["names"] = [[shown(one.name), shown(one.kind)] for one in view.layers]
        data["notes"] = list(map(shown, view.notes))
        frame = len(_page(data, view.title, ATTENTION).encode())
        data["layers"], left_out = packed_layers(view, max_bytes - frame - ROOM_FOR_NOTES)
        data["notes"] += left_out
        page = _page(data, view.title, ATTENTION).encode()
    write_whole(path, page)
    return path


def _page(data: Mapping[str, Any], title: str, scripts: tuple[str, ...]) -> str:
    """The file's text. No text of the data stands in it but escaped, in the title and in the block of JSON."""
    style, script = _asset("page.css"), _script(scripts)
    parts = {
        "title": html.escape(shortened(shown(title), LONGEST_TITLE)),
        "style": style,
        "style_hash": _hash_of(style),
        "script": script,
        "script_hash": _hash_of(script),
        "data": json_in_html(data),
    }
    text = _asset("page.html")
    head, *pieces = text.split("{{")
    filled = [head]
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def json_in_html(data: Any) -> str:
    """JSON that can stand in a script element: no `<`, `>` or `&`, no line ends of JavaScript, no lone surrogates."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


@cache
def _asset(name: str) -> str:
    return files("crossattention.views").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _script(names: tuple[str, ...]) -> str:
    return '"use strict";\n(() => {\n' + "\n".join(map(_asset, names)) + "\n})();\n"


def _hash_of(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def memory_data(view: FeedForwardView) -> dict[str, Any]:
    """A feed-forward view as JSON-able data, its texts as they are shown."""
    return {
        "tokens": list(map(shown, view.tokens.tokens)),
        "notes": list(map(shown, view.notes)),
        "layers": [
            {
                "name": shown(layer.name),
                "size": layer.size,
                "top": layer.top_keys.tolist(),
                "coefficients": _rounded(layer.coefficients),
                "firing": layer.num_firing.tolist(),
                "agreement": layer.agreement,
                "triggered": layer.num_triggered,
                "keys": {str(key): _key(found) for key, found in layer.keys.items()},
            }
            for layer in view.layers
        ],
    }


def _key(key: MemoryKey) -> dict[str, Any]:
    inputs = [
        {
            "tokens": list(map(shown, one.tokens)),
            "at": one.at,
            "coefficient": round(one.coefficient, 5),
            "source": one.source and shown(one.source),
        }
        for one in key.inputs
    ]
    return {"promotes": [[shown(symbol), round(float(score), 5)] for symbol, score in key.promotes], "inputs": inputs}


def _rounded(numbers: np.ndarray) -> list[list[float]]:
    return [[round(number, 5) for number in row] for row in numbers.tolist()]


def _side(side: Side) -> dict[str, Any]:
    if isinstance(side, TextSide):
        return {"kind": "text", "length": side.length, "labels": list(map(shown, side.tokens))}
    if isinstance(side, LongSide):
        return {"kind": "long", "length": side.length, "labels": {str(at): shown(text) for at, text in side.labels.items()}}
    if isinstance(side, ImageSide):
        return {
            "kind": "image",
            "length": side.length,
            "rows": side.rows,
            "columns": side.columns,
            "leading": list(map(shown, side.leading)),
            "size": list(side.size),
            "source": "data:image/png;base64," + base64.b64encode(side.png).decode("ascii"),
        }
    spectrum = spectrogram(side)
    return {
        "kind": "sound",
        "length": side.length,
        "seconds": side.seconds,
        "secondsPerPosition": side.seconds_per_position,
        "source": "data:audio/wav;base64," + base64.b64encode(_wav(side)).decode("ascii"),
        "spectrum": {
            "frames": spectrum.levels.shape[0],
            "bands": spectrum.levels.shape[1],
            "hertz": spectrum.highest_hertz,
            "decibels": spectrum.decibels,
            "data": base64_of(spectrum.levels),
        },
    }


def _wav(side: SoundSide) -> bytes:
    """The sound as a WAV file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(side.sample_rate)
        file.writeframes(np.round(side.samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()

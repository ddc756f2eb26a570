"""What recipes that read pictures share: an answer, a small map, a picture as a file's bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """An answer.

    Args:
        text: the answer.
        score: its log-probability among all answers.
        probability: the same as a share of 1.
    """

    text: str
    score: float
    probability: float


@dataclass(frozen=True)
class PictureMap:
    """What a model reads of a picture, as a map of its patches.

    Args:
        rows: the pixels at which each row of patches begins.
        columns: the same of each column.
        weights: (rows, columns).
    """

    rows: list[str]
    columns: list[str]
    weights: list[list[float]]


def png_of(image: np.ndarray, *, scale: int = 4) -> bytes:
    """A picture (H, W, 3) as the bytes of a PNG file, each pixel as a square of `scale` pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)).save(file, "PNG")
    return file.getvalue()

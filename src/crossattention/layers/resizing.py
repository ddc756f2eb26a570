"""Bicubic resizing of images as matrix products, along the height and then along the width."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

SHARPNESS = -0.75
"""The free parameter of cubic convolution, as torch has it."""

REACH = 2
"""Pixels that a cubic kernel reads on each side of a point."""

TILE = 32
"""Pixels that are made by one product: few enough that little of its matrix is zero, enough for a product to be quick."""


def resize_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at another size: `torch.nn.functional.interpolate(images, size, mode="bicubic", align_corners=False)`.

    out[y, x] = sum over i, j of w(y, i) w(x, j) images[i, j], pixels beyond the border counting as those on it;
    w the cubic convolution kernel around the point (x + 1/2) in / out - 1/2. Nothing is smoothed when an image gets smaller.

    Args:
        images: (z, c, H, W), floating.
        size: the new height and width.

    Returns:
        (z, c, height, width), in the dtype of the images; half precision is computed in float32 and rounded once.

    Raises:
        ValueError: other than four dimensions, a side without pixels.
        TypeError: images that are not floating.

    Cost: for a number about 32 in / out + 4 multiply-adds along each side. torch's own takes 16 for both sides, but one by one:
        from 240 to 224 pixels this took 0.3 to 0.4 of its time (dev/LOG.md).
    Source: Keys 1981, "Cubic convolution interpolation for digital image processing", IEEE Trans. ASSP 29(6), with a = -0.75.

    Example:
        >>> resize_bicubic(torch.ones(1, 3, 240, 240), (224, 224)).shape
        torch.Size([1, 3, 224, 224])
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating, got {images.dtype}")
    if images.dim() != 4 or min(*images.shape[-2:], *size) < 1:
        raise ValueError(f"images (z, c, H, W) and a size, all with pixels, are expected, got {tuple(images.shape)} and {size}")
    dtype = images.dtype
    images = images.to(torch.promote_types(dtype, torch.float32))
    if images.shape[2] != size[0]:
        tiles = _tiles(images.shape[2], size[0], images.dtype, images.device)
        images = torch.cat([weights @ images[:, :, start:end] for start, end, weights in tiles], 2)
    if images.shape[3] != size[1]:
        tiles = _tiles(images.shape[3], size[1], images.dtype, images.device)
        images = torch.cat([images[..., start:end] @ weights.T for start, end, weights in tiles], 3)
    return images.to(dtype)


@lru_cache(maxsize=64)
def _tiles(before: int, after: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """For each `TILE` new pixels of a side: the first of the old ones that they read, the end of these, and the weights."""
    tiles = []
    for first in range(0, after, TILE):
        points = [(2 * new + 1) * before / (2 * after) - 0.5 for new in range(first, min(first + TILE, after))]
        start = max(0, math.floor(points[0]) - REACH + 1)
        end = min(before, math.floor(points[-1]) + REACH + 1)
        weights = torch.zeros(len(points), end - start, dtype=torch.float64)
        for row, point in zip(weights, points, strict=True):
            for old in range(math.floor(point) - REACH + 1, math.floor(point) + REACH + 1):
                row[min(max(old, 0), before - 1) - start] += _kernel(abs(point - old))
        tiles.append((start, end, weights.to(dtype=dtype, device=device)))
    return tiles


def _kernel(distance: float) -> float:
    """Weight of a pixel at a distance of up to two pixels."""
    a = SHARPNESS
    if distance <= 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    return ((a * distance - 5.0 * a) * distance + 8.0 * a) * distance - 4.0 * a

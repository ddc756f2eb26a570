"""Bicubic resizing of images as matrix products, along the height and then along the width."""

from __future__ import annotations

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
        tiles = _tiles_of(images.shape[2], size[0], images)
        images = torch.cat([weights @ images[:, :, start:end] for start, end, weights in tiles], 2)
    if images.shape[3] != size[1]:
        tiles = _tiles_of(images.shape[3], size[1], images)
        images = torch.cat([images[..., start:end] @ weights.T for start, end, weights in tiles], 3)
    return images.to(dtype)


Tile = tuple[int, int, Tensor]
"""The first of the old pixels that some new ones read, the end of these, and the weights."""


def _tiles_of(before: int, after: int, images: Tensor) -> list[Tile]:
    """The tiles of a side: kept, but made anew inside a graph, whose tensors must not outlive it."""
    if torch.compiler.is_compiling():
        return _make_tiles(before, after, images.dtype, images.device)
    return _kept_tiles(before, after, images.dtype, images.device)


def _make_tiles(before: int, after: int, dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """Of each `TILE` new pixels of a side; in few operators, as a graph holds them all."""
    points = (2 * torch.arange(after, dtype=torch.float64) + 1) * before / (2 * after) - 0.5
    read = points.floor()[:, None] + torch.arange(1 - REACH, REACH + 1)
    weights = torch.zeros(after, before, dtype=torch.float64)
    weights = weights.scatter_add(1, read.clamp(0, before - 1).long(), _kernel((points[:, None] - read).abs()))
    weights = weights.to(dtype=dtype, device=device)
    tiles = []
    for first in range(0, after, TILE):
        last = min(first + TILE, after) - 1
        start = max(0, _floor_of_point(first, before, after) - REACH + 1)
        end = min(before, _floor_of_point(last, before, after) + REACH + 1)
        tiles.append((start, end, weights[first : last + 1, start:end]))
    return tiles


_kept_tiles = lru_cache(maxsize=64)(_make_tiles)


def _floor_of_point(new: int, before: int, after: int) -> int:
    """The old pixel at or before (new + 1/2) before / after - 1/2."""
    return ((2 * new + 1) * before - after) // (2 * after)


def _kernel(distances: Tensor) -> Tensor:
    """Weights of pixels at distances of up to two pixels."""
    a = SHARPNESS
    near = ((a + 2.0) * distances - (a + 3.0)) * distances * distances + 1.0
    far = ((a * distances - 5.0 * a) * distances + 8.0 * a) * distances - 4.0 * a
    return torch.where(distances <= 1.0, near, far)

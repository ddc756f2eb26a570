"""Bicubic resizing equals torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from crossattention.layers.resizing import resize_bicubic

SIZES = [((24, 20), (22, 17)), ((5, 7), (11, 3)), ((70, 3), (64, 9)), ((1, 4), (3, 2)), ((9, 9), (9, 9)), ((200, 6), (13, 6))]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_it_is_torchs_bicubic_interpolation(before: tuple[int, int], after: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *before, dtype=torch.float64, requires_grad=True)
    found, expected = resize_bicubic(images, after), F.interpolate(images, size=after, mode="bicubic", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    weight = torch.randn_like(found)
    mine, its = (torch.autograd.grad((out * weight).sum(), images)[0] for out in (found, expected))
    torch.testing.assert_close(mine, its, atol=1e-11, rtol=1e-11)
    if found.numel() and before != after:
        assert found.shape[-2:] == after


def test_half_precision_is_rounded_once() -> None:
    images = torch.randn(1, 2, 24, 20, dtype=torch.bfloat16)
    exact = resize_bicubic(images.double(), (22, 17))
    torch.testing.assert_close(resize_bicubic(images, (22, 17)).double(), exact, atol=1e-6, rtol=2**-8)


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        resize_bicubic(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2))
    with pytest.raises(ValueError, match=r"got \(3, 4, 4\) and \(2, 2\)"):
        resize_bicubic(torch.zeros(3, 4, 4), (2, 2))
    with pytest.raises(ValueError, match=r"and \(0, 2\)"):
        resize_bicubic(torch.zeros(1, 3, 4, 4), (0, 2))

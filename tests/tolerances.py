"""How near two exact computations of the same value must be, per dtype; the one table that all tests read.

"Exact" is equality in real arithmetic: what is left is rounding. For bfloat16 the rule is relative (at most twice the
textbook plan's error against float64), so its row here is only the coarse net for whole layers.
"""

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
}


def assert_close(actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """`actual` equals `expected` in shape and value, to the tolerance of `dtype` (default: of `actual`'s dtype).

    The expected value may be of a wider dtype: it is compared as it is, never rounded first.
    """
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.to(torch.float64), expected.to(torch.float64), atol=tolerance, rtol=tolerance, equal_nan=False
    )

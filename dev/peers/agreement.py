"""What every comparison here counts: cases, those that agree, the largest differences, and what rows without a live key give.

"Agree" means: on every row that has a live key (in all heads) the output, and the gradients of a random sum over these rows, differ
by at most 1e-10 (float64) or 1e-5 (float32), relative to the largest number of the outputs, or of all gradients of the case, or
to 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass
class Agreement:
    """One line of the table.

    Attributes:
        peer: library, module and way.
        cases: configurations that were compared.
        agreeing: those within the tolerance, output and gradients.
        forward: dtype -> largest relative difference of an output.
        backward: dtype -> largest relative difference of a gradient.
        empty_rows: what rows without a live key give at the attention's output -> how many.
        empty_gradients: what the gradients are where a case has such rows -> how many cases.
        disagreeing: the first configurations that do not agree.
    """

    peer: str
    cases: int = 0
    agreeing: int = 0
    forward: dict[torch.dtype, float] = field(default_factory=dict)
    backward: dict[torch.dtype, float] = field(default_factory=dict)
    empty_rows: Counter[str] = field(default_factory=Counter)
    empty_gradients: Counter[str] = field(default_factory=Counter)
    disagreeing: list[str] = field(default_factory=list)

    def add(
        self,
        case: str,
        ours: Tensor,
        theirs: Tensor,
        live: Tensor,
        our_gradients: Sequence[Tensor] = (),
        their_gradients: Sequence[Tensor] = (),
    ) -> None:
        """Count one configuration; `live` (z, n) says which rows of the outputs (z, n, o) have a live key."""
        dtype = ours.dtype
        off = _difference(ours[live], theirs[live], _largest([theirs[live]]))
        largest = _largest(their_gradients)
        pairs = zip(our_gradients, their_gradients, strict=True)
        off_gradient = max((_difference(*pair, largest) for pair in pairs), default=0.0)
        self.cases += 1
        self.forward[dtype] = max(self.forward.get(dtype, 0.0), off)
        if our_gradients:
            self.backward[dtype] = max(self.backward.get(dtype, 0.0), off_gradient)
        if max(off, off_gradient) <= TOLERANCES[dtype]:
            self.agreeing += 1
        else:
            self.disagreeing.append(f"{case}: output {off:.1e}, gradients {off_gradient:.1e}")

    def to_json(self) -> dict[str, object]:
        """Every field, as JSON holds it."""
        return {
            "peer": self.peer,
            "cases": self.cases,
            "agreeing": self.agreeing,
            "forward": {str(dtype): value for dtype, value in self.forward.items()},
            "backward": {str(dtype): value for dtype, value in self.backward.items()},
            "empty_rows": dict(self.empty_rows),
            "empty_gradients": dict(self.empty_gradients),
            "disagreeing": self.disagreeing[:5],
        }


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest finite number of any of them, or 1."""
    return max([1.0, *(float(t.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in tensors if t.numel())])


def _difference(ours: Tensor, theirs: Tensor, largest: float) -> float:
    """The largest difference, relative to `largest`; infinite where one is no number."""
    if ours.numel() == 0:
        return 0.0
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).detach().abs().max()) / largest


def meaning(row: Tensor, zero: Tensor, uniform: Tensor | None = None) -> str:
    """What a row without a live key gives, (o,): "NaN", "zero attention", "mean of all values" or "something else".

    Args:
        row: the row.
        zero: what zero attention gives there, the output bias.
        uniform: what even weights over all of the context give there.
    """
    if bool(row.isnan().any()):
        return "NaN"
    tolerance = 10 * TOLERANCES[row.dtype]
    if torch.allclose(row, zero.expand_as(row), atol=tolerance, rtol=tolerance):
        return "zero attention"
    if uniform is not None and torch.allclose(row, uniform, atol=tolerance, rtol=tolerance):
        return "mean of all values"
    return "something else"


def finite(gradients: Sequence[Tensor]) -> str:
    """Whether gradients are numbers."""
    return "finite" if all(bool(gradient.isfinite().all()) for gradient in gradients) else "NaN"


def _shown(number: float | None) -> str:
    if number is None:
        return ""
    return "NaN" if number == float("inf") else f"{number:.0e}" if number else "0"


def table(lines: Sequence[Agreement]) -> str:
    """The lines as a table of Markdown."""
    head = "| peer | agree | output, float64 | float32 | gradients, float64 | float32 | rows without a live key | gradients there |"
    rows = [head, "|" + "---|" * 8]
    for line in lines:
        numbers = [
            _shown(values.get(dtype)) for values in (line.forward, line.backward) for dtype in (torch.float64, torch.float32)
        ]
        counts = (
            ", ".join(f"{name} {count:,}" for name, count in sorted(c.items())) for c in (line.empty_rows, line.empty_gradients)
        )
        rows.append(f"| {line.peer} | {line.agreeing:,} of {line.cases:,} | {' | '.join(numbers)} | {' | '.join(counts)} |")
    return "\n".join(rows)

"""`Graph`: a module with all that an exporter asks beside it, so that models can say how they leave Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Axes = tuple[str | None, ...]
"""A name for each dimension whose length may vary, None for one that is fixed; the same name is the same length everywhere."""

Values = Tensor | list[Tensor] | dict[str, Tensor]
"""What one argument holds: a tensor, or several of the same axes."""


@dataclass(frozen=True)
class Graph:
    """A module whose `forward` takes tensors and gives tensors, with example inputs and the names of what may vary.

    Args:
        module: what is exported.
        inputs: argument of its `forward` -> example, in the order of the arguments.
        axes: argument -> a name for each dimension that may vary.
        outputs: a name for each tensor that it returns, in order.
    """

    module: nn.Module
    inputs: Mapping[str, Values]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]

"""How the learning rate changes over a run: pure functions from a step to a factor of the highest learning rate.

Steps are counted from 1; the factor is 1 at the end of the warm-up and never 0, so that every step learns.
`total_steps` is None while the length of a run is still being measured; what comes after the warm-up then stays at 1.
A warm-up takes at most a fifth of the run: in a run of minutes nobody knows beforehand how many steps that is.
"""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["cosine", "inverse-sqrt", "linear", "constant"]


def factor_at(name: ScheduleName, step: int, *, warmup_steps: int, total_steps: int | None) -> float:
    """The factor of a schedule at a step, warm-up included.

    factor = step / warm-up during the warm-up, then the schedule's own decay.

    Args:
        name: which schedule.
        step: the step about to be taken, from 1.
        warmup_steps: length of the rise; 0 for none. See `warmup_of` for short runs.
        total_steps: length of the run, or None where not yet known.

    Example:
        >>> [factor_at("linear", step, warmup_steps=2, total_steps=17) for step in (1, 2, 6, 14)]
        [0.5, 1.0, 0.75, 0.25]
    """
    warmup_steps = warmup_of(warmup_steps, total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return _DECAYS[name](step, warmup_steps, total_steps)


def warmup_of(warmup_steps: int, total_steps: int | None) -> int:
    """The steps that the warm-up really takes: those asked for, or a fifth of the run where that is less.

    Example:
        >>> warmup_of(400, 10_000), warmup_of(400, 300)
        (400, 60)
    """
    return warmup_steps if total_steps is None else min(warmup_steps, total_steps // 5)


def cosine(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """Half a cosine from 1 down to almost 0: (1 + cos(pi * progress)) / 2. Source: Loshchilov & Hutter 2017, eq. 5."""
    return (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2


def linear(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """A line from 1 down to almost 0: 1 - progress."""
    return 1 - _progress(step, warmup_steps, total_steps)


def inverse_sqrt(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """sqrt(warmup_steps / step), whatever the run's length. Source: Vaswani et al. 2017, eq. 3, divided by its peak."""
    return math.sqrt(max(1, warmup_steps) / step)


def constant(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """Always 1."""
    return 1.0


_DECAYS: dict[str, Callable[[int, int, int | None], float]] = {
    "cosine": cosine,
    "inverse-sqrt": inverse_sqrt,
    "linear": linear,
    "constant": constant,
}


def _progress(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """0 at the end of the warm-up (or at step 1 without one), 1 one step after the run's last."""
    if total_steps is None:
        return 0.0
    start = max(1, warmup_steps)
    return max(0.0, min(1.0, (step - start) / max(1, total_steps + 1 - start)))

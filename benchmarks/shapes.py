"""Random pieces of work, and the time of every plan on one: what the planner is fitted to and judged by."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import interleaved, seconds_of

from crossattention import CrossAttention
from crossattention.plan import TEXTBOOK, Choice, Plan, Sizes

HOPELESS = 4.0
"""A plan estimated at more than this many times the best estimate is not run: it would take the time of many that matter."""
BEHIND = 1.6
"""A plan that took this many times the fastest in its first run is not run again."""


@dataclass(frozen=True)
class Shape:
    """One piece of work: batch, lengths, widths, heads; the head width is what the queries' width gives."""

    z: int
    n: int
    m: int
    a: int
    b: int
    heads: int

    def __str__(self) -> str:
        return f"{self.z} x ({self.n} on {self.m}), widths {self.a} on {self.b}, {self.heads} heads of {self.a // self.heads}"

    def textbook_flops(self) -> float:
        """FLOPs of one forward with keys and values projected."""
        projections = 4.0 * self.z * self.a * (self.n * self.a + self.m * self.b)
        return projections + 4.0 * self.z * self.n * self.m * self.a


def random_shapes(seed: int) -> Iterator[Shape]:
    """Endless: n and m log-uniform in 1..8,192, widths uniform in 32..2,048, heads and batch uniform in 1..16."""
    rng = random.Random(seed)

    def length() -> int:
        return round(math.exp(rng.uniform(0.0, math.log(8192))))

    while True:
        n, m, a, b = length(), length(), rng.randint(32, 2048), rng.randint(32, 2048)
        heads, z = rng.randint(1, 16), rng.randint(1, 16)
        yield Shape(z, n, m, a // heads * heads, b, heads)


class Bench:
    """One shape's layer and tensors, and its calls by plan."""

    def __init__(self, shape: Shape, dtype: torch.dtype, trains: bool, device: str = "cpu") -> None:
        kwargs = {"dtype": dtype, "device": device}
        self.layer = CrossAttention(shape.a, shape.b, heads=shape.heads, **kwargs)
        self.a = torch.randn(shape.z, shape.n, shape.a, requires_grad=trains, **kwargs)
        self.b = torch.randn(shape.z, shape.m, shape.b, requires_grad=trains, **kwargs)
        self.grad = torch.randn(shape.z, shape.n, shape.a, **kwargs)
        self.device = device
        self.trains = trains
        # Asked before any plan is pinned, which `plan_for` would give back.
        self.choice: Choice = self.layer.plan_for(self.a.shape, self.b.shape, trains=trains)

    @property
    def sizes(self) -> Sizes:
        """The sizes that the planner sees."""
        return self.choice.sizes

    def call(self, plan: Plan) -> Callable[[], object]:
        """A forward, or a training step, by one plan."""

        def run() -> None:
            self.layer.plan = plan
            if not self.trains:
                with torch.no_grad():
                    self.layer(self.a, self.b)
                return
            self.layer.zero_grad(set_to_none=True)
            self.a.grad = self.b.grad = None
            self.layer(self.a, self.b).backward(self.grad)

        return run

    def textbook_seconds(self) -> float:
        """One run of the textbook's plan."""
        return seconds_of(self.call(TEXTBOOK), device=self.device)

    def time_plans(self, budget: float) -> dict[Plan, float]:
        """Median seconds of every legal plan that is not far behind: the choice's and the textbook's always."""
        choice = self.choice
        first: dict[Plan, float] = {}
        # The textbook runs first, and what comes after it is only kept if it is in reach of the best so far.
        ordered = sorted((c for c in choice.candidates if c.is_legal), key=lambda c: c.plan != TEXTBOOK)
        lowest = min(c.cost.seconds for c in ordered)
        for candidate in ordered:
            always = candidate.plan in (TEXTBOOK, choice.plan)
            if not always and candidate.cost.seconds > HOPELESS * lowest:
                continue
            run = self.call(candidate.plan)
            if self.device != "cpu":  # the first call of a kernel loads it
                run()
            first[candidate.plan] = seconds_of(run, device=self.device)
            if first[candidate.plan] < BEHIND * 2 * min(first.values()):
                first[candidate.plan] = seconds_of(run, device=self.device)
        best = min(first.values())
        kept = [plan for plan, taken in first.items() if taken < BEHIND * best or plan in (TEXTBOOK, choice.plan)]
        calls = {str(plan): self.call(plan) for plan in kept}
        timings = interleaved(calls, budget=budget, rounds=5, warmup=1, device=self.device)
        return {plan: timings[str(plan)].median for plan in kept}

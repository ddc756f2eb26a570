"""Which plan to run: the cheapest legal one, by the cost model, with every other one and the reasons kept beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from crossattention.plan.cost import Cost, CostModel
from crossattention.plan.devices import Speeds
from crossattention.plan.plans import CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError, reasons_against
from crossattention.plan.show import choice_as_dict, show_choice
from crossattention.plan.sizes import Sizes
from crossattention.plan.speeds import speeds_of

ADVANTAGE = 0.90
"""A plan replaces the textbook's only if it is estimated to take at most this share of its time: estimates err."""
UNMEASURED_ADVANTAGE = 1 / 1.5
"""The same on a device whose constants nobody measured."""
GPU_ADVANTAGE = 0.80
"""The same on a GPU, where calls wait for the host as often as for the device, and the host's time is the least sure."""
SPARE_BYTES = 4 << 20
"""A plan may hold this much more than the textbook's, no more: where it is little, it is blocks of scores in the cache."""


@dataclass(frozen=True)
class Candidate:
    """One plan as the planner saw it: its cost, the reasons against it (empty if it is legal), and whether it holds too much.

    `exceeds_memory`: it is estimated to hold over `SPARE_BYTES` more at once than the textbook's plan, and is passed over for that.
    """

    plan: Plan
    cost: Cost
    reasons: tuple[str, ...]
    exceeds_memory: bool = False

    @property
    def is_legal(self) -> bool:
        """Whether nothing forbids the plan."""
        return not self.reasons


@dataclass(frozen=True)
class Choice:
    """The chosen plan, why it was chosen, and every candidate with its cost and what was illegal and why.

    `print(choice)` shows the table; `choice.as_dict()` is the same as plain data for JSON.
    """

    plan: Plan
    why: str
    sizes: Sizes
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        return show_choice(self)

    def as_dict(self) -> dict[str, object]:
        """The choice as plain data."""
        return choice_as_dict(self)

    def candidate(self, plan: Plan) -> Candidate:
        """The entry of one plan."""
        return next(candidate for candidate in self.candidates if candidate.plan == plan)


def choose_plan(
    sizes: Sizes, forbidden: tuple[Forbidden, ...] = (), speeds: Speeds | Mapping[tuple[str, str], Speeds] | None = None
) -> Choice:
    """Choose the plan for a piece of work.

    The cheapest legal plan that holds no more memory than the textbook's (`SPARE_BYTES` apart); the textbook's own spaces unless
    another one is estimated to be clearly cheaper.

    Args:
        sizes: lengths, widths, heads, uses, dtype and device.
        forbidden: meeting spaces that the layer, its parts or the dtype forbid, each with its reason.
        speeds: constants of the device, or a table of them by device type and dtype, as `read_speeds` gives; default those in use
            (`use_speeds`). Half precision takes scores in float32: a table's constants for that count, where it has some.

    Returns:
        The choice, with all candidates, cheapest first.

    Raises:
        PlanError: every plan is forbidden; the message lists each with its reasons.

    Cost: under a millisecond the first time, a dictionary look-up after that.
    """
    key, score_key = (sizes.device, sizes.dtype), (sizes.device, sizes.score_dtype)
    if speeds is None:
        return _choose(sizes, forbidden, speeds_of(*key), speeds_of(*score_key))
    if isinstance(speeds, Speeds):
        return _choose(sizes, forbidden, speeds, speeds if key == score_key else speeds_of(*score_key))
    used, of_scores = (speeds[k] if k in speeds else speeds_of(*k) for k in (key, score_key))
    return _choose(sizes, forbidden, used, of_scores)


@lru_cache(maxsize=8192)
def _choose(sizes: Sizes, forbidden: tuple[Forbidden, ...], speeds: Speeds, score_speeds: Speeds) -> Choice:
    model = CostModel(sizes, speeds, score_speeds)
    costs = dict(sorted(((p, model.cost(p)) for p in CANDIDATES), key=lambda pair: pair[1].seconds))
    most = costs[TEXTBOOK].peak_bytes + SPARE_BYTES if not reasons_against(TEXTBOOK, forbidden) else math.inf
    candidates = [Candidate(p, cost, reasons_against(p, forbidden), cost.peak_bytes > most) for p, cost in costs.items()]
    legal = [candidate for candidate in candidates if candidate.is_legal]
    if not legal:
        listed = "; ".join(f"{c.plan}: {', '.join(c.reasons)}" for c in candidates)
        raise PlanError(f"no plan is legal here. {listed}")
    textbook = next((candidate for candidate in legal if candidate.plan == TEXTBOOK), None)
    if textbook is None:
        return Choice(legal[0].plan, "the cheapest legal plan", sizes, tuple(candidates))
    best = next(candidate for candidate in legal if not candidate.exceeds_memory)
    if best is textbook:
        return Choice(TEXTBOOK, "the cheapest legal plan", sizes, tuple(candidates))
    ratio = best.cost.seconds / textbook.cost.seconds
    measured_advantage = GPU_ADVANTAGE if model.is_gpu else ADVANTAGE
    needed = measured_advantage if speeds.is_measured else UNMEASURED_ADVANTAGE
    if ratio > needed:
        measured = "" if speeds.is_measured else f" on a {sizes.device} that nobody measured"
        why = f"the textbook: {best.plan} is estimated at {ratio:.2f} of its time, no clear gain (needs {needed:.2f}{measured})"
        return Choice(TEXTBOOK, why, sizes, tuple(candidates))
    return Choice(best.plan, f"estimated {1 / ratio:.1f} times as fast as the textbook", sizes, tuple(candidates))

"""Which plan to run: the cheapest legal one, by the cost model, with every other one and the reasons kept beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from crossattention.plan.cost import Cost, CostModel
from crossattention.plan.plans import CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError, reasons_against
from crossattention.plan.show import choice_as_dict, show_choice
from crossattention.plan.sizes import Sizes
from crossattention.plan.speeds import Speeds, speeds_of

ADVANTAGE = 0.93
"""A plan replaces the textbook's only if it is estimated to take at most this share of its time: estimates err."""
UNMEASURED_ADVANTAGE = 1 / 1.5
"""The same on a device whose constants nobody measured."""
SPARE_BYTES = 4 << 20
"""A plan may hold this much more than the textbook's, no more: where it is little, it is blocks of scores in the cache."""


@dataclass(frozen=True)
class Candidate:
    """One plan as the planner saw it: its cost, and the reasons against it (empty if it is legal)."""

    plan: Plan
    cost: Cost
    reasons: tuple[str, ...]

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


def choose_plan(sizes: Sizes, forbidden: tuple[Forbidden, ...] = (), speeds: Speeds | None = None) -> Choice:
    """Choose the plan for a piece of work.

    The cheapest legal plan that holds no more memory than the textbook's (`SPARE_BYTES` apart); the textbook's own spaces unless
    another one is estimated to be clearly cheaper.

    Args:
        sizes: lengths, widths, heads, uses, dtype and device.
        forbidden: meeting spaces that the layer, its parts or the dtype forbid, each with its reason.
        speeds: constants of the device; default those in use for it (`use_speeds`).

    Returns:
        The choice, with all candidates, cheapest first.

    Raises:
        PlanError: every plan is forbidden; the message lists each with its reasons.

    Cost: under a millisecond the first time, a dictionary look-up after that.
    """
    return _choose(sizes, forbidden, speeds_of(sizes.device, sizes.dtype) if speeds is None else speeds)


@lru_cache(maxsize=8192)
def _choose(sizes: Sizes, forbidden: tuple[Forbidden, ...], speeds: Speeds) -> Choice:
    model = CostModel(sizes, speeds)
    candidates = [Candidate(plan, model.cost(plan), reasons_against(plan, forbidden)) for plan in CANDIDATES]
    candidates.sort(key=lambda candidate: candidate.cost.seconds)
    legal = [candidate for candidate in candidates if candidate.is_legal]
    if not legal:
        listed = "; ".join(f"{c.plan}: {', '.join(c.reasons)}" for c in candidates)
        raise PlanError(f"no plan is legal here. {listed}")
    textbook = next((candidate for candidate in legal if candidate.plan == TEXTBOOK), None)
    if textbook is None:
        return Choice(legal[0].plan, "the cheapest legal plan", sizes, tuple(candidates))
    most = textbook.cost.peak_bytes + SPARE_BYTES
    best = next(candidate for candidate in legal if candidate.cost.peak_bytes <= most)
    if best is textbook:
        return Choice(TEXTBOOK, "the cheapest legal plan", sizes, tuple(candidates))
    ratio = best.cost.seconds / textbook.cost.seconds
    needed = ADVANTAGE if speeds.is_measured else UNMEASURED_ADVANTAGE
    if ratio > needed:
        measured = "" if speeds.is_measured else f" on a {sizes.device} that nobody measured"
        why = f"the textbook: {best.plan} is estimated at {ratio:.2f} of its time, no clear gain (needs {needed:.2f}{measured})"
        return Choice(TEXTBOOK, why, sizes, tuple(candidates))
    return Choice(best.plan, f"estimated {1 / ratio:.1f} times as fast as the textbook", sizes, tuple(candidates))

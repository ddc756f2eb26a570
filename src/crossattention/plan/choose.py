"""Which plan to run: the cheapest legal one, by the cost model, with every other one and the reasons kept beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from crossattention.plan.cost import Cost, cost_of
from crossattention.plan.plans import CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError, reasons_against
from crossattention.plan.show import choice_as_dict, show_choice
from crossattention.plan.sizes import Sizes

ADVANTAGE = 0.85
"""A plan replaces the textbook's only if it is estimated to take at most this share of its time: estimates err."""


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


def choose_plan(sizes: Sizes, forbidden: tuple[Forbidden, ...] = ()) -> Choice:
    """Choose the plan for a piece of work.

    Args:
        sizes: lengths, widths, heads, uses, dtype and device.
        forbidden: meeting spaces that the layer, its parts or the dtype forbid, each with its reason.

    Returns:
        The choice, with all candidates, cheapest first.

    Raises:
        PlanError: every plan is forbidden; the message lists each with its reasons.

    Cost: some hundreds of microseconds the first time, a dictionary look-up after that.
    """
    return _choose(sizes, forbidden)


@lru_cache(maxsize=8192)
def _choose(sizes: Sizes, forbidden: tuple[Forbidden, ...]) -> Choice:
    candidates = [Candidate(plan, cost_of(plan, sizes), reasons_against(plan, forbidden)) for plan in CANDIDATES]
    candidates.sort(key=lambda candidate: candidate.cost.seconds)
    legal = [candidate for candidate in candidates if candidate.is_legal]
    if not legal:
        listed = "; ".join(f"{c.plan}: {', '.join(c.reasons)}" for c in candidates)
        raise PlanError(f"no plan is legal here. {listed}")
    best = legal[0]
    textbook = next((candidate for candidate in legal if candidate.plan == TEXTBOOK), None)
    if textbook is None or best is textbook:
        return Choice(best.plan, "the cheapest legal plan", sizes, tuple(candidates))
    ratio = best.cost.seconds / textbook.cost.seconds
    if ratio > ADVANTAGE:
        why = f"the textbook: {best.plan} is estimated at {ratio:.2f} of its time, no clear gain (needs {ADVANTAGE:.2f})"
        return Choice(TEXTBOOK, why, sizes, tuple(candidates))
    return Choice(best.plan, f"estimated {1 / ratio:.1f} times as fast as the textbook", sizes, tuple(candidates))

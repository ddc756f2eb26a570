"""Which exact evaluation order to run: sizes in, a plan out. Pure Python, no tensors."""

from crossattention.plan.choose import Candidate, Choice, choose_plan
from crossattention.plan.cost import Cost, cost_of
from crossattention.plan.devices import Speeds
from crossattention.plan.plans import ALL_PLANS, CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError
from crossattention.plan.sizes import Sizes
from crossattention.plan.speeds import read_speeds, speeds_of, use_speeds, write_speeds

__all__ = [
    "ALL_PLANS",
    "CANDIDATES",
    "TEXTBOOK",
    "Candidate",
    "Choice",
    "Cost",
    "Forbidden",
    "Plan",
    "PlanError",
    "Sizes",
    "Speeds",
    "choose_plan",
    "cost_of",
    "read_speeds",
    "speeds_of",
    "use_speeds",
    "write_speeds",
]

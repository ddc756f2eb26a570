"""What a plan is: the meeting space of each of the two matrix chains of attention, and the kernel that runs them.

Lives here: `Plan`, the list of all plans, and what forbids one (`Forbidden`). Not here: what a plan costs (`cost`), which one is
chosen (`choose`), how it is run (`attention.execute`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

ScoreSpace = Literal["head", "context", "query"]
ValueSpace = Literal["head", "context", "output"]
Kernel = Literal["fused", "explicit", "blocked"]

SCORE_SPACES: tuple[ScoreSpace, ...] = get_args(ScoreSpace)
VALUE_SPACES: tuple[ValueSpace, ...] = get_args(ValueSpace)
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


class PlanError(ValueError):
    """A plan that does not exist, or that this layer, dtype or input forbids."""


@dataclass(frozen=True)
class Plan:
    """An exact evaluation order of attention: where scores and values meet, and which kernel runs them.

    scores   A Wq Wk^T B^T   "head": B Wk is made of B  |  "context": B itself, Wk goes to A  |  "query": B Wk Wq^T
    values   P B Wv Wo       "head": B Wv is made of B  |  "context": B itself, Wv after P    |  "output": B Wv Wo

    Moving a projection to the other side is called weight absorption. All plans are the same function in real arithmetic.

    Args:
        scores: meeting space of the scores.
        values: meeting space of the values.
        kernel: "fused" is `scaled_dot_product_attention`, which never holds the (n, m) weights; "explicit" holds them all,
            which is faster where they are few; "blocked" holds one block of them in the cache and takes its products from the
            quicker library of the machine. Attention dropout and learned masks always run explicitly: no kernel fuses them.

    Raises:
        PlanError: a space or kernel that does not exist.

    Source: docs/planning.md; weight absorption: DeepSeek-V2, arXiv:2405.04434, section 2.1.

    Example:
        >>> print(Plan("context", "head"))
        context+head
        >>> len(ALL_PLANS)
        9
    """

    scores: ScoreSpace = "head"
    values: ValueSpace = "head"
    kernel: Kernel = "fused"

    def __post_init__(self) -> None:
        for what, given, known in (
            ("scores", self.scores, SCORE_SPACES),
            ("values", self.values, VALUE_SPACES),
            ("kernel", self.kernel, KERNELS),
        ):
            if given not in known:
                raise PlanError(f"Plan({what}={given!r}) does not exist; {what} must be one of {', '.join(known)}")

    @property
    def is_textbook(self) -> bool:
        """Whether keys and values are projected from B as in the 2017 paper."""
        return self.scores == "head" and self.values == "head"

    def __str__(self) -> str:
        name = f"{self.scores}+{self.values}"
        return name if self.kernel == "fused" else f"{name} ({self.kernel})"


TEXTBOOK = Plan()
CANDIDATES: tuple[Plan, ...] = tuple(
    TEXTBOOK if (scores, values, kernel) == ("head", "head", "fused") else Plan(scores, values, kernel)  # itself: asked by `is`
    for scores in SCORE_SPACES
    for values in VALUE_SPACES
    for kernel in KERNELS
)
"""Every pair of meeting spaces with every kernel: what the planner chooses from."""
ALL_PLANS: tuple[Plan, ...] = tuple(plan for plan in CANDIDATES if plan.kernel == "fused")
"""The nine pairs, run by the fused kernel."""


@dataclass(frozen=True)
class Forbidden:
    """A meeting space, in one chain, that something forbids, and why: legality is data.

    Args:
        chain: "scores" or "values".
        space: the meeting space that is forbidden in that chain.
        why: the reason, as a sentence that stands by itself.
    """

    chain: Literal["scores", "values"]
    space: str
    why: str

    def hits(self, plan: Plan) -> bool:
        """Whether `plan` uses the forbidden space."""
        return (plan.scores if self.chain == "scores" else plan.values) == self.space


def reasons_against(plan: Plan, forbidden: Iterable[Forbidden]) -> tuple[str, ...]:
    """Every reason why `plan` is illegal; empty if it is legal."""
    return tuple(dict.fromkeys(reason.why for reason in forbidden if reason.hits(plan)))

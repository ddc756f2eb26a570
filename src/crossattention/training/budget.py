"""From minutes to steps, and where in a run it is evaluated: arithmetic only, no clock is read here."""

from dataclasses import dataclass

# The parts of the time budget: what the measuring of the first steps may take, at most in seconds; what remaining
# evaluations may take; what is left free for the unforeseen; and the excess from which on a run is shortened.
_MEASURED_PART, _MEASURED_SECONDS = 0.05, 30.0
_EVALUATED_PART = 0.15
_SPARE_PART = 0.01
_TOLERATED_EXCESS = 0.03
_UNTIMED_STEPS = 3  # the first steps allocate memory and choose kernels: they say nothing of the others
_FIRST_EVALUATION = 0.03


def evaluation_steps(total_steps: int, *, evaluations: int, evaluate_every: int | None = None, after: int = 0) -> tuple[int, ...]:
    """The steps after which the model is evaluated; always the last one among them.

    Args:
        total_steps: length of the run.
        evaluations: how many, where `evaluate_every` is None: the first after 3 % of the run, so that something is
            seen soon, the others evenly until the end.
        evaluate_every: a fixed distance instead.
        after: steps up to this one are past; the evaluations are spread over those that follow.

    Example:
        >>> evaluation_steps(1000, evaluations=5)
        (30, 272, 515, 757, 1000)
        >>> evaluation_steps(10, evaluations=5, evaluate_every=4)
        (4, 8, 10)
    """
    if evaluate_every is not None:
        steps = {*range(evaluate_every, total_steps, evaluate_every), total_steps}
    elif after or evaluations == 1:
        steps = {after + (total_steps - after) * (i + 1) // evaluations for i in range(evaluations)}
    else:
        first = max(1, round(_FIRST_EVALUATION * total_steps))
        steps = {first + (total_steps - first) * i // (evaluations - 1) for i in range(evaluations)}
    return tuple(sorted(step for step in steps if step > after))


@dataclass
class Pace:
    """What a step and an evaluation cost in seconds, as seen by this process."""

    steps: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    _untimed_steps: int = 0
    _evaluations: int = 0

    def add_step(self, seconds: float) -> None:
        """Count one step; the very first ones are left out, and a clock that went back counts as one that stood still."""
        seconds = max(0.0, seconds)
        if self._untimed_steps < _UNTIMED_STEPS:
            self._untimed_steps += 1
            return
        self.steps += 1
        self.seconds += seconds

    def add_evaluation(self, seconds: float) -> None:
        """Count one evaluation, the saving after it included."""
        self._evaluations += 1
        self.evaluation_seconds += (seconds - self.evaluation_seconds) / self._evaluations

    @property
    def step_seconds(self) -> float | None:
        """The mean step, or None before one was timed."""
        return self.seconds / self.steps if self.steps else None

    def is_measured(self, budget_seconds: float, elapsed_seconds: float) -> bool:
        """Whether the steps so far say enough to plan a run of `budget_seconds`, or too much of it is gone to wait."""
        if self.steps == 0:
            return elapsed_seconds > budget_seconds
        return self.seconds >= min(_MEASURED_SECONDS, _MEASURED_PART * budget_seconds)

    def seconds_left(self, steps: int, evaluations: int) -> float | None:
        """For so many steps and evaluations, or None before a step was timed."""
        return None if self.step_seconds is None else steps * self.step_seconds + evaluations * self.evaluation_seconds


def plan_steps(pace: Pace, *, step: int, elapsed_seconds: float, budget_seconds: float, evaluations: int) -> tuple[int, int]:
    """The number of steps that fills the rest of a budget, and the number of evaluations among them.

    total = step + (budget - elapsed - evaluations * evaluation_seconds) / step_seconds

    Args:
        pace: what was measured.
        step: steps taken.
        elapsed_seconds: time gone, everything included.
        budget_seconds: length of the whole run.
        evaluations: wanted in the rest; there are fewer where they would take more than 15 % of the budget, never none.

    Returns:
        total_steps (at least `step`) and the evaluations left.

    Example:
        >>> plan_steps(Pace(10, 1.0, 2.0), step=13, elapsed_seconds=4, budget_seconds=100, evaluations=5)
        (863, 5)
    """
    if pace.step_seconds is None:  # the budget was over before a step was timed
        return step, 1
    if pace.evaluation_seconds > 0:
        evaluations = min(evaluations, int(_EVALUATED_PART * budget_seconds / pace.evaluation_seconds))
    evaluations = max(1, evaluations)
    free = (1 - _SPARE_PART) * budget_seconds - elapsed_seconds - evaluations * pace.evaluation_seconds
    return step + max(0, int(free / max(pace.step_seconds, 1e-9))), evaluations


def is_too_long(pace: Pace, *, steps_left: int, evaluations_left: int, elapsed_seconds: float, budget_seconds: float) -> bool:
    """Whether a run planned earlier would now overrun its budget noticeably: the machine has become slower."""
    rest = pace.seconds_left(steps_left, evaluations_left)
    return rest is not None and elapsed_seconds + rest > (1 + _TOLERATED_EXCESS) * budget_seconds

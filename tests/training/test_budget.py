import pytest

from crossattention.training.budget import Pace, evaluation_steps, is_too_long, plan_steps


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("evaluations", [1, 2, 5, 10])
def test_evaluations_end_with_the_run_and_begin_early(total, evaluations):
    steps = evaluation_steps(total, evaluations=evaluations)
    assert steps[-1] == total
    assert steps == tuple(sorted(set(steps)))
    assert len(steps) == min(evaluations, total)
    if evaluations > 1:
        assert steps[0] <= max(1, 0.03 * total)


def test_evaluations_left_are_spread_over_what_is_left():
    assert evaluation_steps(1000, evaluations=4, after=200) == (400, 600, 800, 1000)
    assert evaluation_steps(1000, evaluations=1, after=990) == (1000,)
    assert evaluation_steps(10, evaluations=3, after=10) == ()


def test_a_fixed_distance_wins_over_the_number():
    assert evaluation_steps(100, evaluations=10, evaluate_every=30) == (30, 60, 90, 100)
    assert evaluation_steps(100, evaluations=10, evaluate_every=30, after=60) == (90, 100)
    assert evaluation_steps(20, evaluations=10, evaluate_every=30) == (20,)


def paced(step_seconds, evaluation_seconds=0.0, steps=10):
    pace = Pace()
    for _ in range(steps + 3):
        pace.add_step(step_seconds)
    pace.evaluation_seconds = evaluation_seconds
    return pace


def test_the_first_steps_are_not_timed():
    pace = Pace()
    for seconds in (9.0, 5.0, 2.0, 0.1, 0.3):
        pace.add_step(seconds)
    assert pace.step_seconds == pytest.approx(0.2)


def test_a_clock_that_goes_back_counts_as_standing_still():
    pace = Pace()
    for seconds in (1.0, 1.0, 1.0, 0.5, -3600.0, 0.5):
        pace.add_step(seconds)
    assert (pace.steps, pace.seconds) == (3, 1.0)


def test_evaluations_are_averaged():
    pace = Pace()
    pace.evaluation_seconds = 100.0  # a first guess, replaced by the first that is counted
    pace.add_evaluation(2.0)
    pace.add_evaluation(4.0)
    assert pace.evaluation_seconds == pytest.approx(3.0)
    assert paced(0.5, 3.0).seconds_left(10, 2) == pytest.approx(11.0)
    assert Pace().seconds_left(10, 2) is None


@pytest.mark.parametrize(("step_seconds", "evaluation_seconds"), [(0.01, 0.1), (0.2, 3.0), (1.7, 0.0), (0.001, 30.0)])
def test_the_plan_fills_the_budget(step_seconds, evaluation_seconds):
    pace = paced(step_seconds, evaluation_seconds)
    elapsed = 13 * step_seconds + evaluation_seconds + 1
    total, evaluations = plan_steps(pace, step=13, elapsed_seconds=elapsed, budget_seconds=300, evaluations=9)
    end = elapsed + (total - 13) * step_seconds + evaluations * evaluation_seconds
    assert 300 * 0.98 - step_seconds < end <= 300
    assert 1 <= evaluations <= 9


def test_dear_evaluations_become_fewer_but_never_none():
    assert plan_steps(paced(0.1, 20.0), step=13, elapsed_seconds=30, budget_seconds=300, evaluations=9)[1] == 2
    assert plan_steps(paced(0.1, 200.0), step=13, elapsed_seconds=30, budget_seconds=300, evaluations=9)[1] == 1


def test_a_budget_that_is_over_ends_the_run_where_it_stands():
    assert plan_steps(paced(1.0), step=13, elapsed_seconds=61, budget_seconds=60, evaluations=9) == (13, 9)
    assert plan_steps(Pace(), step=2, elapsed_seconds=61, budget_seconds=60, evaluations=9)[0] == 2


def test_measuring_takes_a_twentieth_of_the_budget_and_at_most_half_a_minute():
    assert not paced(0.1, steps=20).is_measured(60, 3)
    assert paced(0.1, steps=31).is_measured(60, 4)
    assert not paced(0.1, steps=290).is_measured(36000, 30)
    assert paced(0.1, steps=301).is_measured(36000, 31)
    assert not Pace().is_measured(60, 59)
    assert Pace().is_measured(60, 61)


def test_a_run_is_too_long_from_three_percent_on():
    asked = dict(evaluations_left=1, elapsed_seconds=50, budget_seconds=100)
    assert not is_too_long(paced(1.0, 2.0), steps_left=50, **asked)
    assert is_too_long(paced(1.0, 2.0), steps_left=52, **asked)
    assert not is_too_long(Pace(), steps_left=1000, **asked)

import pytest

from crossattention.training.schedules import factor_at

ALL = ["cosine", "inverse-sqrt", "linear", "constant"]


@pytest.mark.parametrize("name", ALL)
def test_the_warm_up_is_a_line_that_ends_at_one(name):
    factors = [factor_at(name, step, warmup_steps=4, total_steps=50) for step in range(1, 5)]
    assert factors == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_every_step_learns_and_the_factor_never_rises_after_the_warm_up(name, warmup_steps):
    factors = [factor_at(name, step, warmup_steps=warmup_steps, total_steps=50) for step in range(1, 51)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[max(0, warmup_steps - 1)] == 1
    after = factors[max(0, warmup_steps - 1) :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.0003), ("linear", 1 / 92), ("inverse-sqrt", 0.3), ("constant", 1)])
def test_the_end_of_the_run(name, last):
    assert factor_at(name, 100, warmup_steps=9, total_steps=100) == pytest.approx(last, rel=0.05)


def test_cosine_is_half_way_in_the_middle():
    assert factor_at("cosine", 55, warmup_steps=10, total_steps=99) == pytest.approx(0.5)


def test_the_papers_schedule():
    """Vaswani et al. 2017, eq. 3: dim ** -0.5 * min(step ** -0.5, step * warmup ** -1.5)."""
    dim, warmup = 512, 4000
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        paper = dim**-0.5 * min(step**-0.5, step * warmup**-1.5)
        peak = (dim * warmup) ** -0.5
        ours = peak * factor_at("inverse-sqrt", step, warmup_steps=warmup, total_steps=100_000)
        assert ours == pytest.approx(paper, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_an_unknown_length_keeps_the_highest_rate(name):
    assert factor_at(name, 80, warmup_steps=10, total_steps=None) == 1


@pytest.mark.parametrize("name", ALL)
def test_a_warm_up_takes_at_most_a_fifth_of_the_run(name):
    factors = [factor_at(name, step, warmup_steps=400, total_steps=20) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors == [factor_at(name, step, warmup_steps=4, total_steps=20) for step in range(1, 21)]
    assert factor_at(name, 1, warmup_steps=400, total_steps=3) == 1

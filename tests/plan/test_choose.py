"""The choice: by table where the winner is known from measurement, and by what must hold of any choice."""

import pytest
from hypothesis import given

from crossattention.plan import ALL_PLANS, CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError, Sizes, choose_plan, devices
from crossattention.plan.choose import SPARE_BYTES
from plan_sizes import sizes

WORK = [
    # z, n, m, a, b, heads, head width, uses, meeting spaces that were measured fastest (docs/planning.md)
    (8, 1, 401, 384, 384, 6, 64, 1, ("context", "context")),
    (1, 1, 65536, 768, 768, 12, 64, 1, ("context", "context")),
    (1, 1, 1500, 384, 384, 6, 64, 1, ("context", "context")),
    (1, 8, 16384, 768, 768, 12, 64, 1, ("context", "context")),
    (1, 4096, 4, 320, 768, 8, 40, 1, ("query", "output")),
    (1, 1024, 16, 1280, 1280, 20, 64, 1, ("query", "output")),
    (1, 256, 2048, 1280, 768, 8, 160, 1, ("head", "head")),
    (1, 512, 512, 512, 512, 8, 64, 1, ("head", "head")),
]


@pytest.mark.parametrize("work", WORK, ids=lambda w: f"{w[0]}x{w[1]}x{w[2]}")
def test_the_measured_winner_is_chosen(work):
    z, n, m, a, b, heads, k, uses, spaces = work
    plan = choose_plan(Sizes(z, n, m, a, b, heads, heads, k, k, a, uses=uses)).plan
    assert (plan.scores, plan.values) == spaces


def test_a_plan_that_holds_more_than_the_textbook_s_is_passed_over_and_marked():
    speeds = devices._CPU["zen4"]["float32"]
    choice = choose_plan(Sizes(13, 418, 16, 1664, 1356, 16, 16, 104, 104, 1664), (), speeds)
    chosen, cheapest = choice.candidate(choice.plan), choice.candidates[0]
    assert cheapest.plan == Plan("query", "output", "explicit") and cheapest.exceeds_memory and not chosen.exceeds_memory
    most = choice.candidate(TEXTBOOK).cost.peak_bytes + SPARE_BYTES
    for candidate in choice.candidates:
        assert candidate.exceeds_memory == (candidate.cost.peak_bytes > most)
        assert not (candidate.cost.seconds < chosen.cost.seconds and candidate.is_legal and not candidate.exceeds_memory)
    line = next(line for line in str(choice).splitlines() if line.startswith("  query+output (explicit)"))
    assert line.endswith("passed over: holds more at once")
    assert choice.as_dict()["candidates"][0]["exceeds_memory"]
    without_textbook = choose_plan(choice.sizes, (Forbidden("values", "head", "an adapter stands there"),), speeds)
    assert without_textbook.plan == cheapest.plan  # nothing to hold it against


def test_a_context_that_is_read_often_is_projected_once():
    sizes = Sizes(1, 1, 512, 768, 768, 12, 12, 64, 64, 768)
    once, often = (choose_plan(Sizes(**{**sizes.__dict__, "uses": uses})).plan for uses in (1, 500))
    assert (once.scores, once.values) == ("context", "context")
    assert often.values == "head"


@given(sizes)
def test_the_choice_is_legal_and_never_dearer_than_the_textbook(size):
    choice = choose_plan(size)
    chosen = choice.candidate(choice.plan)
    assert chosen.is_legal and chosen.cost.seconds <= choice.candidate(TEXTBOOK).cost.seconds
    assert {candidate.plan for candidate in choice.candidates} == set(CANDIDATES)


@given(sizes)
def test_forbidden_spaces_are_never_chosen_and_their_reasons_are_kept(size):
    forbidden = (Forbidden("scores", "context", "a norm stands there"), Forbidden("values", "output", "a hook stands there"))
    choice = choose_plan(size, forbidden)
    assert choice.plan.scores != "context" and choice.plan.values != "output"
    both = choice.candidate(Plan("context", "output"))
    assert both.reasons == ("a norm stands there", "a hook stands there") and not both.is_legal


def test_if_every_plan_is_forbidden_all_reasons_are_listed():
    forbidden = tuple(Forbidden("scores", space, f"no {space} today") for space in ("head", "context", "query"))
    with pytest.raises(PlanError) as caught:
        choose_plan(Sizes(1, 1, 1, 1, 1, 1, 1, 1, 1, 1), forbidden)
    for plan in ALL_PLANS:
        assert f"{plan}: no {plan.scores} today" in str(caught.value)


def test_the_same_question_is_answered_from_memory():
    sizes = Sizes(1, 3, 5, 7, 9, 1, 1, 3, 3, 7)
    assert choose_plan(sizes) is choose_plan(Sizes(1, 3, 5, 7, 9, 1, 1, 3, 3, 7))

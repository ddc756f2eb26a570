import pytest

from crossattention.plan import ALL_PLANS, CANDIDATES, TEXTBOOK, Forbidden, Plan, PlanError
from crossattention.plan.plans import reasons_against


def test_there_are_nine_pairs_of_meeting_spaces_and_three_kernels():
    assert len(set(ALL_PLANS)) == 9 and len(set(CANDIDATES)) == 27
    assert [str(plan) for plan in ALL_PLANS[:2]] == ["head+head", "head+context"]
    assert str(Plan("query", "output", "explicit")) == "query+output (explicit)"


def test_the_default_plan_is_the_textbook_s():
    assert Plan() == TEXTBOOK and Plan().is_textbook and not Plan("context").is_textbook


def test_a_plan_that_does_not_exist_says_which_do():
    with pytest.raises(PlanError, match=r"scores='output'.*head, context, query"):
        Plan("output")
    with pytest.raises(PlanError, match=r"values='query'.*head, context, output"):
        Plan("head", "query")
    with pytest.raises(PlanError, match=r"kernel='flash'.*fused, explicit, blocked"):
        Plan(kernel="flash")


def test_reasons_are_those_of_the_spaces_a_plan_uses_each_once():
    forbidden = (
        Forbidden("scores", "query", "rotary"),
        Forbidden("values", "output", "hook"),
        Forbidden("scores", "query", "rotary"),
    )
    assert reasons_against(Plan("query", "output"), forbidden) == ("rotary", "hook")
    assert reasons_against(Plan("context", "head"), forbidden) == ()

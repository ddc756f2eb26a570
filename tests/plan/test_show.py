import json

from crossattention.plan import CANDIDATES, Forbidden, Sizes, choose_plan

SIZES = Sizes(2, 1, 401, 384, 320, 6, 2, 64, 48, 100, repeats=3, uses=20, dtype="bfloat16")


def test_the_table_shows_sizes_choice_every_plan_and_every_reason():
    choice = choose_plan(SIZES, (Forbidden("scores", "query", "rotary positions stand between Wq and Wk"),))
    text = str(choice)
    for part in (
        "1 queries of width 384 x 3",
        "401 context positions of width 320",
        "6 heads (2 key-value heads) of 64 (values 48)",
    ):
        assert part in text
    assert "20 uses" in text and "bfloat16 on cpu" in text and f"chosen: {choice.plan}" in text
    lines = text.splitlines()
    assert sum("illegal: rotary positions stand between Wq and Wk" in line for line in lines) == 9
    assert sum(line.startswith("* ") for line in lines) == 1
    assert all(any(f"{p.scores}+{p.values} ({p.kernel})" in line for line in lines) for p in CANDIDATES)


def test_the_same_as_plain_data_survives_json():
    choice = choose_plan(SIZES)
    data = json.loads(json.dumps(choice.as_dict()))
    assert data["plan"]["scores"] == choice.plan.scores and data["sizes"]["repeats"] == 3 and len(data["candidates"]) == 27

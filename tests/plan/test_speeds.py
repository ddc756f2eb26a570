"""Speeds: files, configuration and use, each with what is said when it is wrong; and caution where nobody measured."""

import json
import math
from dataclasses import replace

import pytest

from crossattention.plan import (
    TEXTBOOK,
    Plan,
    Sizes,
    choose_plan,
    cost_of,
    devices,
    read_speeds,
    speeds_of,
    use_speeds,
    write_speeds,
)
from crossattention.plan import speeds as module
from crossattention.plan.choose import UNMEASURED_ADVANTAGE

CLASS_TOKEN = Sizes(8, 1, 401, 384, 384, 6, 6, 64, 64, 384)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No configuration but what the test writes."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.delenv(module.CONFIG_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_reads_config", True)
    monkeypatch.setattr(module, "_in_use", {})
    yield
    use_speeds(None)


def test_a_file_of_speeds_is_read_as_it_was_written(tmp_path):
    table = {
        ("cpu", "float32"): replace(speeds_of("cpu", "float32"), quick_from=math.inf),
        ("cpu", "bfloat16"): speeds_of("cpu", "bfloat16"),
    }
    write_speeds(tmp_path / "speeds.json", table, {"processor": "test"})
    assert read_speeds(tmp_path / "speeds.json") == table
    use_speeds(tmp_path / "speeds.json")
    assert speeds_of("cpu", "float32").quick_from == math.inf


@pytest.mark.parametrize("how", ["variable", "folder"])
def test_the_configuration_names_a_file_beside_it(tmp_path, monkeypatch, how):
    folder = tmp_path / "none" / "crossattention"
    folder.mkdir(parents=True)
    write_speeds(folder / "mine.json", {("cpu", "float32"): replace(speeds_of("cpu", "float32"), bytes=123.0)}, {})
    (folder / "config.toml").write_text('speeds = "mine.json"\n')
    if how == "variable":
        monkeypatch.setenv(module.CONFIG_VARIABLE, str(folder / "config.toml"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_reads_config", True)
    monkeypatch.setattr(module, "_in_use", {})
    assert speeds_of("cpu", "float32").bytes == 123.0 and speeds_of("cpu", "float64").bytes != 123.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speeds = 3", "speeds must be the path of a file, got 3"),
        ('speed = "x.json"', "unknown setting speed; known: speeds"),
        ("speeds = ", "is not valid TOML"),
        ('speeds = "nowhere.json"', "names speeds that cannot be read"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, monkeypatch, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    monkeypatch.setenv(module.CONFIG_VARIABLE, str(path))
    with pytest.raises(ValueError, match=message) as caught:
        speeds_of("cpu", "float32")
    assert str(path) in str(caught.value)


def test_a_variable_that_names_no_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(module.CONFIG_VARIABLE, str(tmp_path / "gone.toml"))
    with pytest.raises(ValueError, match=r"CROSSATTENTION_CONFIG names .*gone.toml, which is no file"):
        speeds_of("cpu", "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "must have format 'crossattention speeds 1', got 'other'"),
        (lambda d: d["speeds"]["cpu float32"].pop("bytes"), "constants missing: bytes; unknown: none"),
        (lambda d: d["speeds"]["cpu float32"].update(hurry=1), "constants missing: none; unknown: hurry"),
        (lambda d: d["speeds"]["cpu float32"].update(bytes=0), "bytes must be above zero, got 0"),
        (lambda d: d["speeds"]["cpu float32"].update(bytes="fast"), "bytes must be a number, got 'fast'"),
        (lambda d: d.update(speeds={"cpu": {}}), "named by device and dtype, as \"cpu float32\", got 'cpu'"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "speeds.json"
    write_speeds(path, {("cpu", "float32"): speeds_of("cpu", "float32")}, {})
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        use_speeds(path)


def test_no_json_and_no_speeds_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file of speeds"):
        use_speeds(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"must be Speeds by \(device, dtype\)"):
        use_speeds({"cpu": 3})


def test_the_choice_follows_the_speeds_that_are_in_use_and_those_passed_in():
    usual = choose_plan(CLASS_TOKEN)
    assert not usual.plan.is_textbook
    # Where arithmetic costs nothing but each start does, the fewest operations win.
    idle = replace(speeds_of("cpu", "float32"), step_seconds=1.0, block_seconds=10.0)
    assert cost_of(TEXTBOOK, CLASS_TOKEN, idle).seconds > 1.0
    assert choose_plan(CLASS_TOKEN, (), idle).candidate(usual.plan).cost != usual.candidate(usual.plan).cost
    use_speeds({("cpu", "float32"): idle})
    assert choose_plan(CLASS_TOKEN).candidate(TEXTBOOK).cost.seconds > 1.0
    use_speeds(None)
    assert choose_plan(CLASS_TOKEN).plan == usual.plan


def test_on_a_device_that_nobody_measured_a_plan_must_be_clearly_better():
    measured = speeds_of("cpu", "float32")
    unmeasured = replace(measured, is_measured=False)
    between = 0
    for m in range(1, 400, 3):
        sizes = replace(CLASS_TOKEN, query_length=40, context_length=m)
        bold, careful = choose_plan(sizes, (), measured), choose_plan(sizes, (), unmeasured)
        best = bold.candidate(bold.plan).cost.seconds / bold.candidate(TEXTBOOK).cost.seconds
        if best > UNMEASURED_ADVANTAGE:
            assert careful.plan == TEXTBOOK
            between += bold.plan != TEXTBOOK
        else:
            assert careful.plan == bold.plan
    assert between  # the sweep met plans that only the bold choice takes
    assert not speeds_of("mps", "float32").is_measured and not speeds_of("cuda", "float16").is_measured


def test_a_table_gives_half_precision_its_float32_constants_for_scores_too(tmp_path):
    half = replace(CLASS_TOKEN, dtype="bfloat16")
    table = {("cpu", dtype): speeds_of("cpu", dtype) for dtype in ("bfloat16", "float32")}
    usual = choose_plan(half)
    assert choose_plan(half, (), table).as_dict() == choose_plan(half, (), table["cpu", "bfloat16"]).as_dict() == usual.as_dict()
    slow = replace(table["cpu", "float32"], matmul_flops=1e6, quick_flops=1e6, batched_flops=1e6)
    write_speeds(tmp_path / "slow.json", table | {("cpu", "float32"): slow}, {})
    choice = choose_plan(half, (), read_speeds(tmp_path / "slow.json"))
    for plan in (Plan("context", "context", "explicit"), Plan("head", "head", "blocked")):
        assert choice.candidate(plan).cost.seconds > 10 * usual.candidate(plan).cost.seconds
    assert choice.candidate(TEXTBOOK).cost == usual.candidate(TEXTBOOK).cost  # the fused kernel takes its scores itself
    only_half = {("cpu", "bfloat16"): table["cpu", "bfloat16"]}
    assert choose_plan(half, (), only_half).as_dict() == usual.as_dict()  # what a table lacks is taken from those in use


AVX512 = frozenset({"avx512f", "avx512_bf16"})


@pytest.mark.parametrize(
    ("told", "kind", "quick", "measured"),
    [
        (("AuthenticAMD", 25, AVX512), "zen4", True, True),
        (("AuthenticAMD", 26, AVX512), "zen5", True, True),
        (("AuthenticAMD", 25, frozenset({"avx2"})), "avx2", True, True),
        (("GenuineIntel", 6, AVX512 | {"amx_bf16"}), "amx", False, True),
        (("GenuineIntel", 6, AVX512), "zen5", False, False),
        (("GenuineIntel", 6, frozenset({"avx2"})), "avx2", False, False),
        (("", 0, frozenset()), "avx2", False, False),
    ],
)
def test_processors_are_told_apart_by_maker_generation_and_instructions(monkeypatch, told, kind, quick, measured):
    monkeypatch.setattr(devices, "processor", lambda: devices.Processor(*told))
    assert devices.processor().kind == kind
    for dtype in ("float32", "bfloat16"):
        speeds = devices.built_in("cpu", dtype)
        assert (speeds.quick_from < math.inf, speeds.is_measured) == (quick and dtype == "float32", measured)
    if measured:
        assert devices.built_in("cpu", "float32") == devices._CPU[kind]["float32"]


def test_float32_products_are_no_slower_on_the_later_generation(monkeypatch):
    """The one thing that tells the two apart: a data path of 512 bits."""
    rates = []
    for family in (25, 26):
        monkeypatch.setattr(devices, "processor", lambda f=family: devices.Processor("AuthenticAMD", f, AVX512))
        rates.append(devices.built_in("cpu", "float32").quick_flops)
    assert rates[1] > 1.5 * rates[0]

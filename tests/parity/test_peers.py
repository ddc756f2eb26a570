"""The comparison with the peers in dev/peers, in small: what must agree agrees, and where peers disagree is counted."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parents[2] / "dev" / "peers"


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "benchmarks"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for name in (
        "agreement",
        "random_case",
        "torch_mha",
        "with_timm",
        "with_huggingface",
        "with_x_transformers",
        "compare",
        "machine",
    ):
        sys.modules.pop(name, None)


def lines(module, count):
    return {line.peer: line for line in importlib.import_module(module).compare(count, seed=1)}


def agree(line):
    assert line.agreeing == line.cases > 0, (line.peer, line.disagreeing)


def test_torch_agrees_on_live_rows_and_means_two_things_by_the_others():
    explicit, fused, itself = lines("torch_mha", 150).values()
    agree(explicit), agree(fused)
    assert set(explicit.empty_rows) == {"NaN"} and set(explicit.empty_gradients) == {"NaN"}
    assert set(fused.empty_rows) == {"zero attention"} and set(fused.empty_gradients) == {"finite"}
    assert explicit.empty_rows.total() == fused.empty_rows.total() > 50
    assert itself.cases - itself.agreeing == explicit.empty_gradients.total()  # disagrees just where a row is empty


def test_timm_agrees():
    pytest.importorskip("timm")
    for line in lines("with_timm", 15).values():
        agree(line)


def test_transformers_agree_on_live_rows_and_eager_is_not_sdpa_on_the_others():
    pytest.importorskip("transformers")
    found = lines("with_huggingface", 15)
    for name, line in found.items():
        if "against" not in name:
            agree(line)
    for family in ("BERT", "BART", "Whisper"):
        assert set(found[f"transformers, {family}, eager"].empty_rows) == {"mean of all values"}
        assert set(found[f"transformers, {family}, sdpa"].empty_rows) == {"zero attention"}
        itself = found[f"transformers, {family}: eager against sdpa, all rows"]
        assert itself.cases - itself.agreeing == found[f"transformers, {family}, sdpa"].empty_gradients.total() > 0


def test_x_transformers_agrees_in_its_own_layout_of_grouped_heads():
    pytest.importorskip("x_transformers", reason="the extra peers is not installed")
    found = lines("with_x_transformers", 15)
    agree(found["x-transformers, flash"])
    agree(found["x-transformers, flash, grouped heads, in its layout"])
    as_they_stand = found["x-transformers, flash, grouped heads, weights as they stand"]
    assert as_they_stand.agreeing < as_they_stand.cases / 2


def test_a_fault_is_found():
    """A comparison that cannot fail says nothing: one weight a thousandth off is seen."""
    import torch
    from agreement import Agreement

    line = Agreement("ours, changed")
    out = torch.randn(2, 3, 4, dtype=torch.float64)
    line.add("a", out, out + 1e-9, torch.ones(2, 3, dtype=torch.bool))
    line.add("b", out, out + 1e-12, torch.ones(2, 3, dtype=torch.bool))
    line.add("c", out, out.clone().fill_(torch.nan), torch.zeros(2, 3, dtype=torch.bool))
    assert (line.cases, line.agreeing) == (3, 2) and line.disagreeing[0].startswith("a: output ")


def test_the_command_prints_the_table(capsys, tmp_path):
    compare = importlib.import_module("compare")
    assert compare.main(["--configurations", "5", "--cases", "2", "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "python dev/peers/compare.py --configurations 5 --cases 2 --seed 0"
    assert sum(line.startswith("| torch.nn.MultiheadAttention") for line in printed) == 2
    assert (tmp_path / "table.json").stat().st_size > 500

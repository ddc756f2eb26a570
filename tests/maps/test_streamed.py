"""Summaries over blocks are those of the whole context."""

import pytest
import torch

from crossattention import Plan, attention_map
from crossattention.layers import ALiBi
from crossattention.maps import Alignment, Argmax, Entropy, Highlight, Rows, TopK, attention_map_blocks
from crossattention.maps import streamed as streamed_file
from oracle import A, B, H, make_layer
from tolerances import assert_close

CUTS = (5, 0, 1, 7)
KINDS = ("each", "mean")


@pytest.mark.parametrize("plan", [Plan(), Plan("context", "head"), Plan("query", "output")], ids=str)
@pytest.mark.parametrize("repeats", [None, 2])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"positions": ALiBi(H)}], ids=["plain", "grouped", "alibi"])
def test_summaries_over_blocks(plan: Plan, repeats: int | None, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_file, "BLOCK_SCORES", 100)  # so that blocks are cut as well
    layer = make_layer(plan, **changes)
    a = torch.randn(*((2, 3, A) if repeats is None else (2, repeats, 3, A)), dtype=torch.float64)
    b, mask = torch.randn(2, 13, B, dtype=torch.float64), torch.rand(2, 13) > 0.3
    mask[0] = False
    summaries = [kind(heads=heads) for kind in (Highlight, Entropy, Argmax) for heads in KINDS]
    summaries += [TopK(3), TopK(20, heads="mean"), Rows([0, -1]), Rows([1], heads="mean")]
    right = attention_map(layer, a, b, summaries, context_mask=mask)
    blocks = list(zip(b.split(CUTS, 1), mask.split(CUTS, 1), strict=True))
    for found, wanted in zip(attention_map_blocks(layer, a, blocks, summaries), right, strict=True):
        if hasattr(wanted, "positions"):
            assert_close(found.weights, wanted.weights)
            live = wanted.weights > 0
            assert torch.equal(found.positions[live], wanted.positions[live])
        elif wanted.dtype == torch.int64:
            assert torch.equal(found, wanted)
        else:
            assert_close(found, wanted)


def test_an_empty_context_in_blocks() -> None:
    layer, a, b = make_layer(), torch.randn(2, 3, A, dtype=torch.float64), torch.randn(2, 0, B, dtype=torch.float64)
    summaries = [TopK(3), Highlight(), Entropy(), Argmax(), Rows([0])]
    for found, wanted in zip(attention_map_blocks(layer, a, [b, b], summaries), attention_map(layer, a, b, summaries), strict=True):
        assert found.weights.shape == wanted.weights.shape if hasattr(wanted, "weights") else torch.equal(found, wanted)


def test_what_cannot_be_summarised_over_blocks_is_named() -> None:
    layer, a, b = make_layer(), torch.randn(2, 3, A, dtype=torch.float64), torch.randn(2, 4, B, dtype=torch.float64)
    with pytest.raises(TypeError, match="Alignment needs whole rows"):
        attention_map_blocks(layer, a, [b], [Alignment()])
    with pytest.raises(ValueError, match="read the blocks twice"):
        attention_map_blocks(layer, a, iter([b]), [TopK(2)])
    with pytest.raises(ValueError, match="Rows asks for query 3"):
        attention_map_blocks(layer, a, [b], [Rows([3])])

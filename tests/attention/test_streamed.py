"""A context in blocks is the context end to end: every plan, mask, part, gradients, resuming, and what does not fit."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crossattention import CrossAttention, Plan
from crossattention.attention import BlocksState, streamed
from crossattention.data.row_files import RowFile
from crossattention.layers import ALiBi, QueryKeyRMSNorm, RelativeLogits, Rotary, T5Bias
from crossattention.plan.plans import ALL_PLANS, CANDIDATES
from oracle import A, B, H, K, make_layer, specification
from tolerances import assert_close

CUTS = (5, 0, 1, 7)
M = sum(CUTS)


def make_inputs(z: int = 2, n: int = 3, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(z, n, A, dtype=dtype, requires_grad=True), torch.randn(z, M, B, dtype=dtype)


def in_blocks(b: Tensor, mask: Tensor | None = None) -> list:
    blocks = list(b.split(CUTS, 1))
    return blocks if mask is None else list(zip(blocks, mask.split(CUTS, 1), strict=True))


def grads(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    found = torch.autograd.grad((out * direction).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def check(layer: CrossAttention, a: Tensor, b: Tensor, mask: Tensor | None = None, **options: object) -> None:
    """Output and gradients of the blocks and of the whole."""
    leaves = [a, *layer.parameters()]
    whole = layer(a, b, context_mask=mask, **options)
    out = layer.attend_blocks(a, in_blocks(b, mask), **options)
    for found, right in zip([out, *grads(out, leaves)], [whole, *grads(whole, leaves)], strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("kind", ["none", "some", "empty"])
@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_every_plan_is_the_specification(plan: Plan, kind: str) -> None:
    layer, (a, b) = make_layer(plan), make_inputs()
    mask = None if kind == "none" else torch.rand(2, M) > 0.4
    if kind == "empty":
        mask[0], mask[1, :6] = False, False  # a whole item, and whole blocks of the other
    right, _ = specification(layer, a, b, **({} if mask is None else {"context_mask": mask}))
    out = layer.attend_blocks(a, in_blocks(b, mask))
    leaves = [a, *layer.parameters()]
    for found, wanted in zip([out, *grads(out, leaves)], [right, *grads(right, leaves)], strict=True):
        assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"kv_heads": 1}, {"bias": False}, {"value_head_dim": 11}], ids=str)
@pytest.mark.parametrize("plan", CANDIDATES, ids=str)
def test_every_kernel_head_grouping_and_form_of_queries(plan: Plan, changes: dict) -> None:
    layer, (a, b) = make_layer(plan, **changes), make_inputs()
    check(layer, a, b, torch.rand(2, M) > 0.3)
    check(layer, a[0].detach().requires_grad_(), b)
    check(layer, torch.randn(2, 4, 3, A, dtype=torch.float64, requires_grad=True), b, torch.rand(2, M) > 0.3)


PARTS = {
    "rotary": lambda: {"positions": Rotary(), "qk_norm": QueryKeyRMSNorm(K, dtype=torch.float64)},
    "alibi": lambda: {"positions": ALiBi(H)},
    "t5": lambda: {"positions": T5Bias(H, dtype=torch.float64)},
    "relative": lambda: {"positions": RelativeLogits(12, H, K, dtype=torch.float64)},
}


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("part", [*PARTS])
def test_positions_count_through_the_blocks(part: str, kv_heads: int) -> None:
    layer, (a, b) = make_layer(kv_heads=kv_heads, **PARTS[part]()), make_inputs()
    check(layer, a, b, torch.rand(2, M) > 0.3, query_positions=torch.tensor([4, 0, 11]))


@pytest.mark.parametrize("plan", [Plan(), Plan("context", "context", "explicit"), Plan("context", "context")], ids=str)
def test_float32_and_half_precision(plan: Plan) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, (a, b) = make_layer(plan, dtype=dtype), make_inputs(dtype=dtype)
        out = layer.attend_blocks(a, in_blocks(b))
        assert out.dtype == dtype
        assert_close(out, layer(a, b), dtype=dtype)


def test_autocast_is_that_of_the_forward_pass_in_the_backward_pass() -> None:
    layer, (a, b) = make_layer(dtype=torch.float32), make_inputs(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out, whole = layer.attend_blocks(a, in_blocks(b)), layer(a, b)
    assert out.dtype == torch.bfloat16
    for found, right in zip(grads(out, [*layer.parameters()]), grads(whole, [*layer.parameters()]), strict=True):
        torch.testing.assert_close(found, right, atol=0.1, rtol=0.1)


def test_blocks_without_a_batch_and_iterators() -> None:
    layer, (a, b) = make_layer(), make_inputs(1)
    with torch.no_grad():
        out = layer.attend_blocks(a, (block[0] for block in in_blocks(b)))
        masked = layer.attend_blocks(a, ((block[0], block[0, :, 0] > 0) for block in in_blocks(b)))
        assert_close(out, layer(a, b))
        assert_close(masked, layer(a, b, context_mask=b[:, :, 0] > 0))
    with pytest.raises(ValueError, match="an iterator can be read once"):
        layer.attend_blocks(a, iter(in_blocks(b)))


# ------------------------------------------------------------------------------------------------------- memory


class Counted:
    """Blocks made when they are asked for, of which none is held: how many are alive is counted."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most, self.read = count, 0, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        for place in range(self.count):
            block = torch.randn(
                1, 4, B, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(place)
            )
            self.alive, self.read = self.alive + 1, self.read + 1
            self.most = max(self.most, self.alive)
            import weakref

            weakref.finalize(block, self._gone)
            yield block
            del block

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("plan", [Plan(), Plan("context", "context"), Plan("query", "output")], ids=str)
def test_no_block_is_held_forward_or_backward(plan: Plan) -> None:
    layer, a = make_layer(plan), torch.randn(1, 3, A, dtype=torch.float64, requires_grad=True)
    blocks = Counted(30)
    gc.disable()
    try:
        out = layer.attend_blocks(a, blocks)
        assert blocks.most <= 2 and blocks.alive <= 1
        out.sum().backward()
        assert blocks.most <= 2 and blocks.read >= 60
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------- interruption


class BrokenError(Exception):
    pass


def test_an_interrupted_pass_goes_on_from_its_state(tmp_path: Path) -> None:
    layer, (a, b) = make_layer(), make_inputs()
    blocks, seen = in_blocks(b), []

    def stop(state: BlocksState) -> None:
        seen.append(state.rows)
        if state.blocks == 2:
            state.save(tmp_path / "state.safetensors")
            raise BrokenError

    with pytest.raises(BrokenError):
        layer.attend_blocks(a, blocks, progress=stop)
    assert seen == [5, 5]
    state = BlocksState.load(tmp_path / "state.safetensors")
    assert (state.blocks, state.rows) == (2, 5)
    unread = [torch.full_like(blocks[0], torch.nan), *blocks[1:]]  # what was read is not read again
    with torch.no_grad():
        out = layer.attend_blocks(a, unread, state=state)
    assert torch.equal(out, layer.attend_blocks(a, blocks)) and state.rows == M
    again = layer.attend_blocks(a, blocks, state=BlocksState.load(tmp_path / "state.safetensors"))
    for found, right in zip(grads(again, [a]), grads(layer(a, b), [a]), strict=True):
        assert_close(found, right)


def test_a_state_of_blocks_that_were_cut_otherwise_is_refused(tmp_path: Path) -> None:
    layer, (a, b) = make_layer(), make_inputs()
    kept = tmp_path / "rows.npy"
    np.save(kept, b[0].cpu().numpy())
    one = a[:1]

    def stop(state: BlocksState) -> None:
        if state.blocks == 1:
            state.save(tmp_path / "state.safetensors")
            raise BrokenError

    for cut, other in (
        ([b[:1, :3], b[:1, 3:]], [b[:1, :2], b[:1, 2:]]),
        (RowFile(kept, block_rows=3), RowFile(kept, block_rows=2)),
    ):
        with pytest.raises(BrokenError), torch.no_grad():
            layer.attend_blocks(one, cut, progress=stop)
        with torch.no_grad(), pytest.raises(ValueError, match="has read 3 rows in 1 blocks, but these blocks hold 2; go on over"):
            layer.attend_blocks(one, other, state=BlocksState.load(tmp_path / "state.safetensors"))


def test_a_state_of_another_call_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    layer, (a, b) = make_layer(), make_inputs()
    state, file = BlocksState(), tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="no block was read yet"):
        state.save(file)
    with torch.no_grad():
        layer.attend_blocks(a, in_blocks(b), state=state)
        with pytest.raises(ValueError, match="other queries, weights"):
            layer.attend_blocks(a + 1, in_blocks(b), state=state)
        layer.v_proj.weight.mul_(2)
        with pytest.raises(ValueError, match="other queries, weights"):
            layer.attend_blocks(a, in_blocks(b), state=state)
    state.save(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"state\.safetensors is no state of attend_blocks, or is damaged"):
        BlocksState.load(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        BlocksState.load(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda y, a, b: y.attend_blocks(a, b), TypeError, "one context in memory is layer"),
        (lambda y, a, b: y.attend_blocks(a, []), ValueError, "holds no block"),
        (lambda y, a, b: y.attend_blocks(a, [b, b[..., :3]]), ValueError, "block 1: context has width 3"),
        (lambda y, a, b: y.attend_blocks(a, [b, b[:1]]), ValueError, "block 1 has batch 1 but the first block has batch 2"),
        (lambda y, a, b: y.attend_blocks(a, [b, b.float()]), ValueError, "block 1: context are torch.float32"),
        (lambda y, a, b: y.attend_blocks(a, [b, "b"]), TypeError, "block 1 must be a tensor .* got str"),
        (lambda y, a, b: y.attend_blocks(a, [(b, b, b)]), TypeError, "block 0 must be a tensor or a pair"),
        (lambda y, a, b: y.attend_blocks(a, [(b, torch.ones(2, 4) > 0)]), ValueError, "context_mask must have shape"),
        (lambda y, a, b: y.attend_blocks(a, [b.clone().requires_grad_()]), ValueError, "block 0 requires a gradient"),
        (lambda y, a, b: y.attend_blocks(a[:1], [b]), ValueError, "queries have batch 1 but the context has batch 2"),
        (lambda y, a, b: y.attend_blocks(a, [b], state=3), TypeError, "state must be a BlocksState"),
        (lambda y, a, b: y.attend_blocks([a[0]], [b]), TypeError, "queries must be a tensor"),
        (lambda y, a, b: make_layer(dropout=0.1).train().attend_blocks(a, [b]), ValueError, "dropout=0.1"),
        (lambda y, a, b: y.attend_blocks(a, [b], query_positions=torch.arange(3)), ValueError, "no position part"),
    ],
)
def test_what_does_not_fit_is_named(call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(make_layer(), *make_inputs())


def test_queries_elsewhere_are_named_rather_than_the_blocks_that_follow_them() -> None:
    layer, (a, b) = make_layer(), make_inputs()
    with pytest.raises(ValueError, match="queries are on meta but the layer's weights on cpu"):
        layer.attend_blocks(a.to("meta"), in_blocks(b))


def test_weights_are_hashed_again_only_after_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, a, blocks = CrossAttention(6, 9, heads=2), torch.randn(1, 5, 6), [torch.randn(1, 7, 9)]
    hashed = []
    add = streamed._add_content
    monkeypatch.setattr(streamed, "_add_content", lambda found, tensors: hashed.append(len(tensors)) or add(found, tensors))
    with torch.no_grad():
        layer.attend_blocks(a, blocks)
        assert hashed == []  # nobody can hand this pass's state on
        digests = []
        for change in (lambda: None, lambda: layer.k_proj.bias.add_(1.0), lambda: None):
            change()
            state = BlocksState()
            layer.attend_blocks(a, blocks, state=state)
            digests.append(state.digest)
    assert hashed == [1, 8, 1, 8, 1]  # queries each time, the weights twice
    assert digests[0] != digests[1] == digests[2]

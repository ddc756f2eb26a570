"""Every plan against the specification on sizes, masks and cuts that are drawn: what the small sizes of other tests cannot meet."""

import random

import pytest
import torch

from crossattention import CrossAttention, Plan
from crossattention.plan import CANDIDATES
from crossattention.plan import blocks as cuts
from oracle import specification

WORKS = 40
"""Drawn in each test; the seed is the test's own, so that a failure is found again."""


def draw(rng: random.Random) -> tuple[CrossAttention, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A layer in float64 with random weights, A, B, and masks of a kind."""
    z, n, m = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 5, 17, 40)), rng.choice((1, 2, 7, 15, 16, 17, 40, 130, 513))
    heads, groups = rng.choice(((1, 1), (2, 2), (4, 4), (4, 2), (4, 1), (6, 3)))
    widths = {"head_dim": rng.choice((4, 8)), "value_head_dim": rng.choice((3, 8)), "out_dim": rng.choice((10, 12))}
    bias = rng.choice((True, False, ("v_proj", "out_proj"), ("q_proj",)))
    layer = CrossAttention(6, rng.choice((5, 9, 20)), heads=heads, kv_heads=groups, bias=bias, dtype=torch.float64, **widths)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    a = torch.randn(z, n, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(z, m, layer.context_dim, dtype=torch.float64, requires_grad=True)
    masks: dict[str, torch.Tensor] = {}
    kind = rng.choice(("none", "some", "empty row", "pairs", "added", "trained", "both"))
    if kind in ("some", "both", "empty row"):
        masks["context_mask"] = torch.rand(z, m) > 0.3
    if kind == "empty row":
        masks["context_mask"][0] = False
    if kind in ("pairs", "both"):
        masks["attn_mask"] = torch.rand(rng.choice(((z, heads, n, m), (n, m), (heads, n, m), (z, 1, n, m)))) > 0.4
    if kind in ("added", "trained"):
        masks["attn_mask"] = torch.randn(heads, n, m, dtype=torch.float64)
        masks["attn_mask"][:, :1] = -torch.inf
        masks["attn_mask"].requires_grad_(kind == "trained")
    return layer, a, b, masks


def cut(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and parts of the blocked kernel as they are, or small."""
    small = {
        "BLOCK_SCORES": (40, 500),
        "LONGEST_ROW": (10, 100),
        "PART": (4, 30),
        "PART_ROWS": (3, 50),
        "NARROW_ROW": (0, 4),
    }
    for name, values in small.items():
        monkeypatch.setattr(cuts, name, rng.choice((*values, getattr(cuts, name))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_outputs_and_gradients_of_every_plan_are_the_specifications(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for work in range(WORKS):
        layer, a, b, masks = draw(rng)
        inputs = [a, b, *layer.parameters(), *(mask for mask in masks.values() if mask.requires_grad)]
        wanted, _ = specification(layer, a, b, **masks)
        direction = torch.randn_like(wanted)
        right = torch.autograd.grad((wanted * direction).sum(), inputs, allow_unused=True)
        with monkeypatch.context() as patch:
            if work % 3 == 0:
                cut(rng, patch)
            for plan in CANDIDATES:
                check(layer, plan, a, b, masks, wanted, direction, inputs, right)


def check(
    layer: CrossAttention,
    plan: Plan,
    a: torch.Tensor,
    b: torch.Tensor,
    masks: dict[str, torch.Tensor],
    wanted: torch.Tensor,
    direction: torch.Tensor,
    inputs: list[torch.Tensor],
    right: tuple[torch.Tensor | None, ...],
) -> None:
    """One plan's output with and without gradients, prepared too, and its gradients."""
    layer.plan = plan
    out = layer(a, b, **masks)
    with torch.no_grad():
        prepared = layer.prepare(b, context_mask=masks.get("context_mask"), query_length=a.shape[1])
        others = [layer(a, b, **masks), layer.attend(a, prepared, attn_mask=masks.get("attn_mask"))]
    for found in (out, *others):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0, msg=lambda text: f"{plan}: {text}")
    for found, grad in zip(torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True), right, strict=True):
        if grad is None or (found is None and grad.abs().max() < 1e-9):  # a bias that cancels has none
            continue
        torch.testing.assert_close(
            found, grad, atol=1e-8 * max(1.0, grad.abs().max().item()), rtol=0, msg=lambda text: f"{plan}: {text}"
        )

"""Costs: FLOPs counted by hand, and what must hold of any cost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossattention.plan import ALL_PLANS, CANDIDATES, Plan, Sizes, cost_of
from oracle import make_layer
from plan_sizes import sizes

Z, N, M, A, B, H, K, V, O = 2, 5, 7, 6, 9, 4, 8, 3, 10
SIZES = Sizes(Z, N, M, A, B, H, H, K, V, O)

PREPARE = {
    "head": (2 * Z * M * B * H * K, 2 * Z * M * B * H * V),
    "context": (0, 0),
    "query": (2 * Z * M * B * H * K + 2 * Z * M * H * K * A, None),
    "output": (None, 2 * Z * M * B * H * V + 2 * Z * M * H * V * O),
}


@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_prepare_flops_are_those_of_the_matrix_products(plan):
    expected = PREPARE[plan.scores][0] + PREPARE[plan.values][1]
    assert cost_of(plan, SIZES).prepare_flops == expected


def test_attend_flops_of_the_textbook_and_of_full_absorption():
    weights = Z * H * N * M
    explicit = {p: cost_of(Plan(p, q, "explicit"), SIZES).attend_flops for p, q in (("head", "head"), ("context", "context"))}
    softmax = 4 * weights
    textbook = 2 * Z * N * A * H * K + 2 * weights * (K + V) + softmax + 2 * Z * N * H * V * O
    absorbed = (
        2 * Z * N * A * H * K + 2 * Z * N * H * K * B + 4 * weights * B + softmax + 2 * Z * N * H * B * V + 2 * Z * N * H * V * O
    )
    assert explicit == {"head": textbook, "context": absorbed}


def test_the_prepared_bytes_are_what_the_executor_keeps():
    for plan in CANDIDATES:
        layer = make_layer(plan, dtype=torch.float32, bias=False)
        prepared = layer.prepare(torch.randn(Z, M, B))
        assert prepared.nbytes == cost_of(plan, SIZES).prepared_bytes, plan


@given(sizes, st.sampled_from(CANDIDATES))
def test_costs_are_positive_and_grow_with_every_length(size, plan):
    cost = cost_of(plan, size)
    assert cost.seconds > 0 and cost.attend_flops > 0 and cost.prepared_bytes > 0
    for name in ("query_length", "context_length", "batch"):
        more = cost_of(plan, replace(size, **{name: 2 * getattr(size, name)}))
        assert more.seconds >= cost.seconds and more.flops >= cost.flops
    many = cost_of(plan, replace(size, uses=10))
    assert many.seconds == pytest.approx(many.prepare_seconds + 10 * many.attend_seconds)

"""Batches: each example once an epoch, within budget, a pure function of (seed, step)."""

import numpy as np
import pytest
import torch

from crossattention.data.batches import PairBatches
from crossattention.data.vocabulary import BEGIN, END, PAD


def examples(count, seed=0):
    random = np.random.default_rng(seed)
    lengths = zip(random.integers(1, 15, count), random.integers(0, 12, count), strict=True)
    return [(random.integers(4, 30, m).tolist(), random.integers(4, 40, n).tolist()) for m, n in lengths]


def equal(first, second):
    names = ("source_ids", "source_mask", "target_ids", "labels")
    return first.indices == second.indices and all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("budget", [30, 200, 100_000])
def test_every_epoch_holds_every_example_exactly_once(budget):
    batches = PairBatches(examples(501), tokens_per_batch=budget, seed=3)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [index for step in steps for index in batches.batch_at(step).indices]
        assert sorted(seen) == list(range(501))


def test_the_order_is_a_pure_function_of_seed_and_step():
    data = examples(300)
    one, other = PairBatches(data, 100, seed=5), PairBatches(data, 100, seed=5)
    steps = [0, 7, 3 * one.steps_per_epoch + 2, 1]
    in_order = {step: one.batch_at(step) for step in sorted(steps)}
    for step in steps:
        assert equal(other.batch_at(step), in_order[step])


def test_epochs_and_seeds_differ_in_order_and_in_company():
    batches = PairBatches(examples(300), 100, seed=5)
    count = batches.steps_per_epoch
    first, second = ([batches.batch_at(e * count + s).indices for s in range(count)] for e in range(2))
    assert first != second
    assert {frozenset(rows) for rows in first} != {frozenset(rows) for rows in second}
    reseeded = PairBatches(examples(300), 100, seed=6)
    assert [reseeded.batch_at(step).indices for step in range(count)] != first


def test_batches_hold_the_examples_padded_and_masked():
    data = examples(50)
    batches = PairBatches(data, 60, seed=0)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        tokens = 0
        for row, index in enumerate(batch.indices):
            source, target = data[index]
            assert batch.source_ids[row][batch.source_mask[row]].tolist() == source
            assert (batch.source_ids[row][~batch.source_mask[row]] == PAD).all()
            rest = [PAD] * (batch.labels.shape[1] - len(target) - 1)
            assert batch.labels[row].tolist() == [*target, END, *rest]
            assert batch.target_ids[row, : len(target) + 1].tolist() == [BEGIN, *target]
            assert set(batch.target_ids[row, len(target) + 1 :].tolist()) <= {PAD}
            tokens += len(source) + len(target) + 1
        assert batch.num_tokens == tokens
        assert batch.source_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.source_mask.dtype == torch.bool


def test_no_batch_exceeds_the_budget_and_little_of_it_is_padding():
    batches = PairBatches(examples(3000), tokens_per_batch=400, seed=0)
    area = real = 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        size = batch.source_ids.numel() + batch.labels.numel()
        assert size <= 400
        area += size
        real += batch.num_tokens
    assert real / area > 0.9
    assert area / batches.steps_per_epoch > 0.8 * 400


def test_moving_a_batch_keeps_its_contents():
    batch = PairBatches(examples(5), 1000).batch_at(0)
    moved = batch.to("cpu")
    assert equal(moved, batch)
    assert moved.num_tokens == batch.num_tokens
    assert batch.to("meta").labels.device.type == "meta"


def test_faults_of_the_caller_are_named():
    with pytest.raises(ValueError, match="at least one example"):
        PairBatches([], 100)
    with pytest.raises(ValueError, match="an empty one at example 1"):
        PairBatches([([4], [5]), ([], [5])], 100)
    with pytest.raises(ValueError, match=r"example 1 has 13 tokens, more than tokens_per_batch=12.*at least 13"):
        PairBatches([([4], [5]), ([4] * 8, [5] * 4)], 12)
    with pytest.raises(ValueError, match="a step from 0 on, got -1"):
        PairBatches([([4], [5])], 100).batch_at(-1)


def test_a_batch_says_whether_its_sources_are_padded_and_keeps_that_on_the_way():
    for examples, is_padded in (([([5, 6], [7]), ([8, 9], [7, 7])], False), ([([5, 6], [7]), ([8], [7])], True)):
        batch = PairBatches(examples, 100).batch_at(0).to("cpu")
        assert batch.is_source_padded is is_padded is (not bool(batch.source_mask.all()))

"""The Transformer that listens: lengths, masks, steps, saving."""

import pytest
import torch

from crossattention.models.generate import beam_search, greedy
from crossattention.models.listener import Listener, ListenerConfig, positions_of
from crossattention.models.pretrained import load


def small(reduction=2, **changes):
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 1, "feed_forward_dim": 24, "dropout": 0.0}
    return Listener(ListenerConfig(bands=5, vocab_size=11, reduction=reduction, **{**sizes, **changes})).double().eval()


@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_sound_comes_out_the_same_alone_and_in_a_batch(reduction, length):
    model = small(reduction)
    frames = torch.randn(2, 13, 5, dtype=torch.float64)
    mask = torch.arange(13) < torch.tensor([[length], [13]])
    together = model.encode(frames, mask)
    alone = model.encode(frames[:1, :length])
    assert alone.shape[1] == positions_of(length, reduction)
    assert torch.allclose(together[:1, : alone.shape[1]], alone, atol=1e-12)
    target = torch.randint(3, 11, (2, 6))
    assert torch.allclose(model(frames, target, mask)[:1], model(frames[:1, :length], target[:1]), atol=1e-12)


def test_padding_gets_no_gradient():
    model, frames = small(4), torch.randn(1, 13, 5, dtype=torch.float64, requires_grad=True)
    model(frames, torch.randint(3, 11, (1, 3)), torch.arange(13)[None] < 6).square().sum().backward()
    assert frames.grad[:, :6].abs().sum() > 0
    assert not frames.grad[:, 6:].any()


def test_steps_with_what_was_prepared_are_the_forward_pass():
    model = small()
    frames, target = torch.randn(2, 13, 5, dtype=torch.float64), torch.randint(3, 11, (2, 6))
    mask = torch.arange(13) < torch.tensor([[7], [13]])
    whole = model(frames, target, mask)
    prepared = model.prepare(model.encode(frames, mask), mask, uses=6, query_length=1, repeats=1)
    assert torch.allclose(model.decode(target, prepared), whole, atol=1e-12)
    caches = None
    for at in range(6):
        logits, caches = model.step(target[:, at : at + 1], prepared, caches)
        assert torch.allclose(logits[:, 0], whole[:, at], atol=1e-12)


def test_it_generates_the_same_in_a_batch():
    model = small()
    frames, mask = torch.randn(2, 13, 5, dtype=torch.float64), torch.arange(13) < torch.tensor([[7], [13]])
    for search in (lambda *given: greedy(model, *given, max_length=6), lambda *given: beam_search(model, *given, max_length=6)[0]):
        together, alone = search(frames, mask), search(frames[:1, :7])
        assert together[0] == alone[0] or together[0].ids == alone[0].ids


def test_it_is_saved_and_found_by_its_family(tmp_path):
    model = small(dropout=0.2)
    model.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    assert type(again) is Listener and again.config == model.config
    frames, target = torch.randn(1, 8, 5, dtype=torch.float64), torch.randint(3, 11, (1, 3))
    assert torch.equal(again(frames, target), model(frames, target))


def test_every_weight_is_used():
    model = small()
    model(torch.randn(1, 8, 5, dtype=torch.float64), torch.randint(3, 11, (1, 3))).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_faults_are_named():
    model, target = small(), torch.randint(3, 11, (2, 3))
    with pytest.raises(ValueError, match=r"\(batch, length, bands=5\), at least one of them, got \(2, 8, 6\)"):
        model(torch.randn(2, 8, 6), target)
    with pytest.raises(TypeError, match=r"floating numbers, got torch\.int64"):
        model(torch.ones(2, 8, 5, dtype=torch.int64), target)
    with pytest.raises(ValueError, match="one batch size"):
        model(torch.randn(1, 8, 5), target)
    with pytest.raises(TypeError, match="bool with True at real frames"):
        model(torch.randn(2, 8, 5), target, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"source_mask must be \(2, 8\)"):
        model(torch.randn(2, 8, 5), target, torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction must be 1, 2 or 4, got 3"):
        ListenerConfig(bands=5, vocab_size=11, reduction=3)
    with pytest.raises(ValueError, match="bands must be an integer of at least 1, got 0"):
        ListenerConfig(bands=0, vocab_size=11)

"""Muon against its formula, and which weights it is given."""

import pytest
import torch
from torch import nn

from crossattention.models.transformer import Transformer, TransformerConfig
from crossattention.training import muon
from crossattention.training.config import TrainConfig
from crossattention.training.muon import Muon, orthogonalized
from crossattention.training.optimizers import build_optimizers, load_optimizer_tensors, optimizer_tensors


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(muon, "_is_quick_in_bfloat16", lambda device: False)


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 20, 7), (2, 7, 20), (1, 1, 5)])
def test_singular_values_become_one_and_singular_vectors_stay(in_float32, shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices, steps=5)
    along = torch.einsum("kri,krc,kic->ki", left, found, right)  # what is left of each pair of singular vectors
    clear = values > 0.02 * values[:, :1]
    assert (along[clear] - 1).abs().max() < 0.25
    assert (found - left @ torch.diag_embed(along) @ right).abs().max() < 1e-4


def test_bfloat16_products_stay_near(monkeypatch):
    matrices = torch.randn(2, 6, 9)
    monkeypatch.setattr(muon, "_is_quick_in_bfloat16", lambda device: False)
    exact = orthogonalized(matrices, steps=3)
    monkeypatch.setattr(muon, "_is_quick_in_bfloat16", lambda device: True)
    rounded = orthogonalized(matrices, steps=3)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_zero_gradients_move_nothing_but_by_decay(in_float32):
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.zeros(3, 2)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.allclose(weight, torch.full((3, 2), 0.95))


def test_steps_are_the_formulas_and_matrices_of_one_shape_do_not_mix(in_float32):
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)] + [nn.Parameter(torch.randn(6, 4))]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(3)]
    wanted = [w.detach().clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.2)
    for step in range(3):
        for place, weight in enumerate(weights):
            weight.grad = gradients[step][place].clone()
            momenta[place] = 0.9 * momenta[place] + 0.1 * weight.grad
            ahead = 0.1 * weight.grad + 0.9 * momenta[place]
            wanted[place] = wanted[place] * (1 - 0.1 * 0.2) - 0.1 * 0.2 * 6**0.5 * orthogonalized(ahead[None], steps=3)[0]
        optimizer.step()
    for found, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(found.detach(), want, atol=2e-4, rtol=0)  # a batch rounds otherwise, and steps amplify


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"Muon takes matrices only, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="steps must be from 1 to 5, got 6"):
        Muon([nn.Parameter(torch.ones(3, 3))], steps=6)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        Muon([nn.Parameter(torch.ones(3, 3))], momentum=1.0)


@pytest.mark.parametrize("tied", ["target", "none"])
def test_it_gets_the_matrices_inside_and_adamw_the_rest(tied):
    config = TransformerConfig(9, 9, dim=8, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=12, tied=tied)
    model = Transformer(config)
    optimizers = build_optimizers(model, TrainConfig(steps=1, optimizer="muon", learning_rate=0.02, weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    inner = {names[p] for group in optimizers["muon"].param_groups for p in group["params"]}
    rest = {names[p] for group in optimizers["adamw"].param_groups for p in group["params"]}
    assert inner | rest == set(names.values()) and not inner & rest
    assert inner == {name for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}
    assert optimizers["muon"].param_groups[0]["initial_lr"] == 0.02
    assert optimizers["muon"].param_groups[0]["weight_decay"] == 0.3


def test_a_model_without_inner_matrices_is_refused():
    with pytest.raises(ValueError, match='optimizer="muon" needs a matrix inside the model'):
        build_optimizers(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), TrainConfig(steps=1, optimizer="muon"))


def test_its_state_is_saved_and_put_back():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)), nn.Linear(4, 2))
        return model, build_optimizers(model, TrainConfig(steps=1, optimizer="muon"))

    def steps(model, optimizers, count):
        for number in range(count):
            model(torch.full((3, 4), 1.0 + number)).square().sum().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()

    straight, its = made()
    steps(straight, its, 2)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(its, straight).items()}
    assert "muon/0.0.weight/momentum" in tensors and "adamw/0.0.bias/exp_avg" in tensors
    resumed, others = made()
    resumed.load_state_dict(straight.state_dict())
    load_optimizer_tensors(others, resumed, tensors)
    steps(straight, its, 2)
    steps(resumed, others, 2)
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)

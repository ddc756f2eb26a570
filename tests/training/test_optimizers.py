import pytest
import torch
from torch import nn

from crossattention.training.config import TrainConfig
from crossattention.training.optimizers import build_optimizers, load_optimizer_tensors, optimizer_tensors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((3, 4))  # its weight is a matrix
        self.layer = nn.Linear(4, 5)
        self.layer.weight = self.embedding.weight  # tied
        self.queries = nn.Parameter(torch.ones(2, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.table_bias = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def names_of(model, group):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def train_some(model, optimizers, steps=3):
    for _ in range(steps):
        sum(p.square().sum() * (i + 1) for i, p in enumerate(model.parameters()) if p.requires_grad).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def test_decay_pulls_at_matrices_only():
    model = Model()
    (adamw,) = build_optimizers(model, TrainConfig(steps=1, weight_decay=0.3)).values()
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0
    assert names_of(model, decayed) == {"embedding.weight", "queries"}
    assert names_of(model, plain) == {"norm.weight", "norm.bias", "layer.bias", "scale", "table_bias"}


def test_the_settings_reach_adamw():
    config = TrainConfig(steps=1, learning_rate=0.02, betas=(0.8, 0.95), epsilon=1e-7)
    (adamw,) = build_optimizers(Model(), config).values()
    assert adamw.defaults["fused"] is True
    for group in adamw.param_groups:
        assert (group["initial_lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-7)


def test_a_frozen_model_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        build_optimizers(model, TrainConfig(steps=1))


def test_loaded_tensors_continue_to_the_same_weights():
    config = TrainConfig(steps=1)
    torch.manual_seed(0)
    straight = Model()
    optimizers = build_optimizers(straight, config)
    train_some(straight, optimizers)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers, straight).items()}
    assert "adamw/embedding.weight/exp_avg" in tensors

    resumed = Model()
    resumed.load_state_dict(straight.state_dict())
    other = build_optimizers(resumed, config)
    load_optimizer_tensors(other, resumed, tensors)
    for model, its in ((straight, optimizers), (resumed, other)):
        train_some(model, its)
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_an_optimizer_that_never_stepped_has_nothing_and_loads_nothing():
    model = Model()
    optimizers = build_optimizers(model, TrainConfig(steps=1))
    assert optimizer_tensors(optimizers, model) == {}
    load_optimizer_tensors(optimizers, model, {})
    train_some(model, optimizers)


def test_tensors_of_another_model_are_refused_by_name():
    model = Model()
    optimizers = build_optimizers(model, TrainConfig(steps=1))
    train_some(model, optimizers)
    tensors = optimizer_tensors(optimizers, model)
    del tensors["adamw/scale/exp_avg"], tensors["adamw/scale/exp_avg_sq"], tensors["adamw/scale/step"]
    tensors["adamw/shift/exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"unknown=\['adamw/shift'\], missing=\['adamw/scale'\]"):
        load_optimizer_tensors(optimizers, model, tensors)


def test_a_state_that_is_no_tensor_is_refused():
    model = nn.Linear(2, 2)
    optimizers = {"other": torch.optim.SGD(model.parameters(), lr=0.1)}
    optimizers["other"].state[model.weight]["count"] = 3
    with pytest.raises(TypeError, match="other/weight/count must be a tensor to be saved, got int"):
        optimizer_tensors(optimizers, model)

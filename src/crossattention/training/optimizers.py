"""The optimizers of a run, and their state under the names of the parameters.

A run has a mapping of optimizers, so that one which handles matrices only can stand beside one for the rest. Each group
carries its highest learning rate as "initial_lr"; the loop multiplies it by the schedule's factor at every step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crossattention.training.config import TrainConfig
from crossattention.training.muon import Muon
from crossattention.training.processes import sharded_like

_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


def build_optimizers(model: nn.Module, config: TrainConfig) -> dict[str, Optimizer]:
    """The optimizers that `config` names, over every parameter of the model that is trained.

    Args:
        model: already on its device (the fused kernels are chosen by it).
        config: the run's settings.

    Returns:
        Name -> optimizer; together they hold every trained parameter once.

    Raises:
        ValueError: nothing in the model is trained, or by Muon no matrix of it.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101 (AdamW); muon.py.
    """
    decayed, plain = _split_by_decay(model)
    if not decayed and not plain:
        raise ValueError("the model has no parameter with requires_grad=True: there is nothing to train")
    optimizers: dict[str, Optimizer] = {}
    if config.optimizer == "muon":
        inner = _inner_matrices(model, decayed)
        if not inner:
            raise ValueError('optimizer="muon" needs a matrix inside the model, beside embeddings and outer layers; found none')
        decayed = [parameter for parameter in decayed if not any(parameter is matrix for matrix in inner)]
        optimizers["muon"] = Muon(inner, lr=config.learning_rate, weight_decay=config.weight_decay)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    parameters = decayed + plain
    if parameters:
        optimizers["adamw"] = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            fused=all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters),
        )
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
    return optimizers


def optimizer_tensors(optimizers: Mapping[str, Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the optimizers' state under "optimizer/parameter/key", as in "adamw/out_proj.weight/exp_avg".

    Raises:
        TypeError: an optimizer keeps something that is no tensor: it could not be saved.
    """
    tensors = {}
    for prefix, parameter, optimizer in _named_parameters_of(optimizers, model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{prefix}/{key} must be a tensor to be saved, got {type(value).__name__}")
            tensors[f"{prefix}/{key}"] = value
    return tensors


def load_optimizer_tensors(optimizers: Mapping[str, Optimizer], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; the groups' settings stay those of the optimizers.

    Raises:
        ValueError: the tensors are of other parameters than the model's, or of other optimizers.
    """
    parameters = {prefix: parameter for prefix, parameter, _ in _named_parameters_of(optimizers, model)}
    prefixes = list(parameters)
    by_prefix: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, key = name.rpartition("/")
        by_prefix.setdefault(prefix, {})[key] = tensor
    unknown = sorted(set(by_prefix) - set(prefixes))
    missing = sorted(set(prefixes) - set(by_prefix)) if by_prefix else []
    if unknown or missing:
        raise ValueError(f"the optimizer's state does not fit the model: {unknown=}, {missing=}")
    for name, optimizer in optimizers.items():
        # Through the optimizer's own loading: it knows which of its tensors follow the parameter's device and dtype.
        own = [prefix for prefix in prefixes if prefix.startswith(f"{name}/")]
        state: dict[str, Any] = {"param_groups": optimizer.state_dict()["param_groups"]}
        state["state"] = {
            place: {key: sharded_like(tensor, parameters[prefix]) for key, tensor in by_prefix[prefix].items()}
            for place, prefix in enumerate(own)
            if prefix in by_prefix
        }
        optimizer.load_state_dict(state)


def _named_parameters_of(optimizers: Mapping[str, Optimizer], model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    """("optimizer/parameter name", parameter, optimizer), in the optimizers' own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer_name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield f"{optimizer_name}/{names[parameter]}", parameter, optimizer


def _split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters, each once: those that weight decay pulls at, and the biases, norms and vectors."""
    decayed: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_plain = parameter.ndim < 2 or name.endswith("bias") or "Norm" in type(module).__name__
            (plain if is_plain else decayed)[parameter] = None
    return list(decayed), [parameter for parameter in plain if parameter not in decayed]


def _inner_matrices(model: nn.Module, decayed: list[nn.Parameter]) -> list[nn.Parameter]:
    """Weights of the linear layers inside: not the model's own children's, by custom its input or output, nor embeddings'."""
    outer = {id(p) for module in model.children() for p in module.parameters(recurse=False)}
    outer |= {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    inner = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - outer
    return [parameter for parameter in decayed if id(parameter) in inner]

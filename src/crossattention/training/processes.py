"""Several processes that train one model: which part of a step's batch is whose, what they tell each other, how weights are shared.

A step's batch is that of one process, whatever the number of processes: each takes some of its items, and its loss counts by
its share of the targets, so that the sum over processes is the loss of the whole batch, and its gradient the whole gradient.
Weights lie whole in every process (DDP), or in shards of which each layer's are gathered when it runs (FSDP2, `fully_shard`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossattention.training.config import TrainConfig
from crossattention.training.together import Together

if TYPE_CHECKING:
    from crossattention.training.tasks import Batch, Task

PATIENCE = timedelta(hours=1)
"""How long a process waits for another before it gives up; one that has ended is noticed at once."""

BatchKind = TypeVar("BatchKind", bound="Batch")


class Processes:
    """The processes of a run, as `torchrun` or `accelerate launch` started them; one alone where neither did.

    Args:
        config: device and kind of parallelism.
    """

    def __init__(self, config: TrainConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs

        accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        kind = accelerator.distributed_type
        if kind in {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}:
            raise ValueError(
                f"training is launched as {kind.value}, which is not supported: launch it by torchrun, or by accelerate launch as "
                "data-parallel (--multi_gpu, --multi_cpu) or with FSDP (--use_fsdp)"
            )
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.is_sharded = self.count > 1 and (config.parallel == "fsdp" or kind == DistributedType.FSDP)
        self._accelerator = accelerator

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, evaluates and tells."""
        return self.rank == 0

    # ---- what they tell each other

    def first(self, value: int) -> int:
        """The first process's value, in all of them: decisions by the clock must be the same."""
        if self.count == 1:
            return int(value)
        told = torch.tensor([int(value)], device=self.device)
        dist.broadcast(told, 0)
        return int(told.item())

    def highest(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.count == 1:
            return [int(value) for value in values]
        told = torch.tensor([int(value) for value in values], device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return [int(value) for value in told.tolist()]

    def sum(self, values: Tensor) -> Tensor:
        """The sums over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_all(self, value: Any) -> list[Any]:
        """Every process's value, plain data, in all of them."""
        if self.count == 1:
            return [value]
        texts: list[Any] = [None] * self.count
        dist.all_gather_object(texts, value)
        return texts

    def together(self, unbroken: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Together:
        """For one evaluation that all processes share; see `Together`."""
        return Together(self.rank, self.count, self.from_all, unbroken)

    def wait(self) -> None:
        """For all."""
        self._accelerator.wait_for_everyone()

    # ---- the batch

    def part_of(self, task: Task, batch: BatchKind) -> tuple[BatchKind, float]:
        """This process's items of a batch, and by what to multiply their loss, so that the processes' sum is the batch's.

        Where there are fewer items than processes, some get an item that counts nothing.

        Raises:
            TypeError: a task or batch that cannot be split; the message says what is missing.
        """
        if self.count == 1:
            return batch, 1.0
        weigh = getattr(task, "loss_weight", None)
        if weigh is None:
            raise TypeError(
                f"{type(task).__name__} has no loss_weight(batch), the number of targets that its loss is the mean of: several "
                "processes cannot share a batch without it"
            )
        items = len(batch.indices)
        rows = slice(self.rank * items // self.count, (self.rank + 1) * items // self.count)
        if rows.start == rows.stop:
            return rows_of(batch, slice(0, 1)), 0.0
        part = rows_of(batch, rows)
        return part, float(weigh(part)) / float(weigh(batch))

    # ---- weights

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as its loss calls it; its gradients will be means over the processes."""
        if self.count == 1:
            return model
        if not self.is_sharded:
            return self._accelerator.prepare(model)
        from torch.distributed.device_mesh import init_device_mesh

        shard_model(model, init_device_mesh(self.device.type, (self.count,)))
        return model


def rows_of(batch: BatchKind, rows: slice) -> BatchKind:
    """Some items of a batch.

    Raises:
        TypeError: no dataclass, or a tensor without one row for each of the batch's `indices`.
    """
    if not dataclasses.is_dataclass(batch):
        raise TypeError(f"a batch that several processes share must be a dataclass of tensors, got {type(batch).__name__}")
    items = len(batch.indices)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name == "indices":
            changes[field.name] = value[rows]
        elif isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] != items:
                raise TypeError(
                    f"{type(batch).__name__}.{field.name} has shape {tuple(value.shape)}, but a batch that several processes share "
                    f"has one row for each of its {items} items in every tensor"
                )
            changes[field.name] = value[rows]
    part: BatchKind = dataclasses.replace(batch, **changes)  # type: ignore[type-var]
    return part


def shard_model(model: nn.Module, mesh: Any) -> None:
    """Shard a model's weights over a mesh (FSDP2): each layer of its lists by itself, then the rest.

    Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
    """
    layers = [
        layer
        for held in model.modules()
        if isinstance(held, nn.ModuleList)
        for layer in held
        if any(True for _ in layer.parameters()) and not any(isinstance(inner, nn.ModuleList) for inner in layer.modules())
    ]
    shared = _names_of_shared(model)
    for layer in layers:
        # A layer that is used by methods of its own, step by step, would give its weights back after the first step.
        if not _own_methods(layer) and not shared & {id(parameter) for parameter in layer.parameters()}:
            _shard_one(layer, mesh)
    _shard_one(model, mesh)


def _shard_one(module: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(module, mesh=mesh)
    for name in ("prepare", "attend"):
        if callable(getattr(module, name, None)):
            register_fsdp_forward_method(module, name)


def _own_methods(layer: nn.Module) -> list[str]:
    """Public methods beside `forward` by which a model may use a layer, as the steps of a block that are taken one by one."""
    ours = [kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.")]
    names = {name for kind in ours for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}
    # `step` is of generating, for which weights are whole; the two others are registered.
    return sorted(names - {"forward", "extra_repr", "reset_parameters", "step", "prepare", "attend"})


def _names_of_shared(model: nn.Module) -> set[int]:
    """Parameters that stand at several places: they belong to the whole model, not to one layer."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, sharded ones gathered; a collective call where there are such."""
    return {name: tensor.full_tensor() if _is_sharded(tensor) else tensor for name, tensor in tensors.items()}


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, as `like` is: this process's shard of it where that is sharded."""
    if not _is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a model that may be sharded; every name must be there."""
    own = model.state_dict()
    if not any(_is_sharded(tensor) for tensor in own.values()):
        model.load_state_dict(tensors)
        return
    differing = sorted(own.keys() ^ tensors.keys())
    if differing:
        raise ValueError(f"the saved weights do not fit the model: {', '.join(differing)} only in one of them")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(sharded_like(tensors[name], tensor))


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


# ------------------------------------------------------------------------------------------------- when one is lost


@contextmanager
def naming_a_lost_process(count: int, rest: Callable[[], str]) -> Iterator[None]:
    """Turn what a collective says when another process has ended into a sentence.

    Args:
        count: the number of processes.
        rest: says from where a resumed run goes on.
    """
    try:
        yield
    except RuntimeError as error:
        if count == 1 or not _is_of_a_lost_process(error):
            raise
        raise ConnectionError(
            f"another of the {count} processes of this run has ended or does not answer; this one ends too. {rest()}"
        ) from error


_SAID: Sequence[str] = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "timed out", "Timed out", "Broken pipe")


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _SAID)

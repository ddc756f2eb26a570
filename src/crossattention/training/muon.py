"""Muon: momentum whose matrices are made orthogonal before they are added, many of one shape in one product.

torch has one of its own that takes the matrices one by one, and always in bfloat16; here all matrices of a shape are one batch,
which small models need (dev/LOG.md), and the products run in the dtype that the processor multiplies fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from crossattention.training.processes import sharded_like

# Of p(x) = a x + b x^3 + c x^5, one triple a step: singular values from 1e-3 to 1 are brought near 1 in five steps. Amsel, Persson,
# Musco, Gower 2025, arXiv:2505.16932, algorithm 1 with a floor of 1e-3, safety factors included.
_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = 1.01
_ADAM_LIKE = 0.2


class Muon(Optimizer):
    """Momentum, orthogonalised, for the matrices inside a model.

    m <- mu m + (1 - mu) g,   u = U V^T of (1 - mu) g + mu m = U S V^T,   w <- w (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) u

    The factor gives u the root mean square that AdamW's updates have, so that both take one learning rate and one decay.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: mu.
        weight_decay: decoupled, as AdamW's.
        steps: by which U V^T is approximated, three matrix products each; at most 5. Singular values of a random square matrix come
            out between 0.2 and 1.9 after 3 steps (5 % of them below), between 0.9 and 1.1 after 5.

    Raises:
        ValueError: a parameter that is no matrix, or a setting out of range.

    Cost: per step and matrix (r, c), r <= c: about 4 r^2 c + 2 r^3 FLOPs, `steps` times; in bfloat16 where that is quick.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the factor: Liu et al. 2025,
        arXiv:2502.16982, section 2.2.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> layer(torch.ones(3)).sum().backward()
        >>> Muon(layer.parameters(), lr=0.1).step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        steps: int = 3,
    ) -> None:
        if not 1 <= steps <= len(_COEFFICIENTS):
            raise ValueError(f"steps must be from 1 to {len(_COEFFICIENTS)}, got {steps}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            wrong = next((tuple(p.shape) for p in group["params"] if p.dim() != 2), None)
            if wrong is not None:
                raise ValueError(f"Muon takes matrices only, got a parameter of shape {wrong}; give that one to another optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters)
        return loss

    def _step_shape(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> None:
        """Step all matrices of one shape."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = _own([self.state[p]["momentum"] for p in parameters])
        torch._foreach_lerp_(momenta, _own(gradients), 1.0 - group["momentum"])
        looked_ahead = torch._foreach_lerp(_own(gradients), momenta, group["momentum"])
        whole = torch.stack([_gathered(tensor, p) for tensor, p in zip(looked_ahead, parameters, strict=True)])
        updates = orthogonalized(whole, steps=group["steps"]).unbind()
        own_updates = [_shard(update, p) for update, p in zip(updates, parameters, strict=True)]
        weights = _own(parameters)
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, own_updates, alpha=-group["lr"] * _ADAM_LIKE * math.sqrt(max(shape)))


def _own(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that FSDP may have sharded."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # type: ignore[operator]


def _gathered(own: Tensor, like: Tensor) -> Tensor:
    """The whole of what each process holds as a shard like that of `like`: a matrix is made orthogonal as a whole."""
    if not hasattr(like, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()


def _shard(update: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole update."""
    return _own([sharded_like(update, like)])[0]


def orthogonalized(matrices: Tensor, *, steps: int) -> Tensor:
    """U V^T of each matrix U S V^T of (k, r, c), roughly: after 5 steps singular values near 1, if they were over 1e-2 of the norm.

    Returns:
        (k, r, c) in the dtype of `matrices`.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * _SAFETY + 1e-12)
    if _is_quick_in_bfloat16(x.device):
        x = x.bfloat16()
    for a, b, c in _COEFFICIENTS[:steps]:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if tall else x


def _is_quick_in_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu":
        return device.type == "cuda"
    return bool(torch.cpu._is_avx512_bf16_supported())

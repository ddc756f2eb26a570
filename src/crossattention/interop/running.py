"""Models whose modules do not run in Python, where nobody can look into them or stand in their place."""

from __future__ import annotations

import torch
from torch import nn


def check_runs_in_python(model: nn.Module, doing: str) -> None:
    """Refuse what runs without its modules' methods being called.

    Args:
        model: the model.
        doing: what is to be done with it, as "record".

    Raises:
        TypeError: it, or a part of it, is scripted, compiled, or a `DataParallel`.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where} is scripted, so nobody can look into it; {doing} the model that it was scripted from")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"{where} is compiled, so its graph runs without a look; {doing} the model that was compiled (for torch.compile's "
                "result, its ._orig_mod), and call that one"
            )
        if isinstance(module, nn.DataParallel):
            raise TypeError(f"{where} is a DataParallel, which runs copies of its model; {doing} and call its .module")

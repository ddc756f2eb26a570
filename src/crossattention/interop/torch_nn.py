"""`torch.nn.MultiheadAttention` as our layers, and looked into: its weights, its names and its sense of masks live only here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention import CrossAttention, SelfAttention
from crossattention.interop.rows import KernelRows
from crossattention.interop.seats import Look


def from_multihead_attention(mha: nn.MultiheadAttention, *, causal: bool | None = None) -> CrossAttention | SelfAttention:
    """A layer with the weights of a `torch.nn.MultiheadAttention`, which computes the same.

    Two differences remain, both on our side of the border: our context comes as (batch, length, width) whatever `batch_first` was,
    and our masks say True = may be attended, so pass `context_mask=~key_padding_mask` and `attn_mask=~attn_mask`. A row that may
    attend nothing gives the output bias, where torch gives NaN with `need_weights=True`.

    Args:
        mha: the module; its `kdim` and `vdim` must be equal, as keys and values come from one context.
        causal: None for a `CrossAttention`; True or False for a `SelfAttention`, causal or not.

    Returns:
        A layer in the module's dtype, device and training mode, with copied weights.

    Raises:
        TypeError: `mha` is something else.
        ValueError: options that have no counterpart: `add_bias_kv`, `add_zero_attn`, `kdim` unlike `vdim`; for `SelfAttention` also
            a `kdim` unlike `embed_dim`.

    Example:
        >>> import torch
        >>> mha = nn.MultiheadAttention(48, 4, kdim=32, vdim=32, batch_first=True)
        >>> a, b = torch.randn(2, 5, 48), torch.randn(2, 7, 32)
        >>> torch.allclose(from_multihead_attention(mha)(a, b), mha(a, b, b)[0], atol=1e-6)
        True
    """
    if not isinstance(mha, nn.MultiheadAttention):
        raise TypeError(f"from_multihead_attention expects a torch.nn.MultiheadAttention, got {type(mha).__name__}")
    if mha.bias_k is not None or mha.bias_v is not None:
        raise ValueError("add_bias_kv=True has no counterpart here: it appends a learned key and value to every context")
    if mha.add_zero_attn:
        raise ValueError("add_zero_attn=True has no counterpart here: it appends a zero key and value to every context")
    if mha.kdim != mha.vdim:
        raise ValueError(f"keys and values come from one context, but kdim={mha.kdim} and vdim={mha.vdim} differ")
    if causal is not None and mha.kdim != mha.embed_dim:
        raise ValueError(f"self-attention has one width, but kdim={mha.kdim} and embed_dim={mha.embed_dim} differ")
    out = mha.out_proj.weight
    biased = mha.in_proj_bias is not None
    settings = {"heads": mha.num_heads, "bias": biased, "dropout": mha.dropout, "device": out.device, "dtype": out.dtype}
    layer: CrossAttention | SelfAttention
    if causal is None:
        layer = CrossAttention(mha.embed_dim, mha.kdim, **settings)
    else:
        layer = SelfAttention(mha.embed_dim, causal=causal, **settings)
    layer.load_state_dict(state_dict_from_multihead_attention(mha))
    return layer.train(mha.training)


def state_dict_from_multihead_attention(mha: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The module's weights under our names, copied: the packed (q | k | v) matrix and bias taken apart.

    Args:
        mha: the module.

    Returns:
        `q_proj`, `k_proj`, `v_proj` and `out_proj` with their weights and, where the module has them, biases.
    """
    if mha.in_proj_weight is not None:
        weights = list(mha.in_proj_weight.chunk(3))
    else:
        weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    state = {f"{name}.weight": weight for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True)}
    state["out_proj.weight"] = mha.out_proj.weight
    if mha.in_proj_bias is not None:
        biases = mha.in_proj_bias.chunk(3)
        state |= {f"{name}.bias": bias for name, bias in zip(("q_proj", "k_proj", "v_proj"), biases, strict=True)}
        state["out_proj.bias"] = mha.out_proj.bias
    return {name: tensor.detach().clone() for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------- looked into


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules of this kind."""
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def look(module: nn.MultiheadAttention) -> Look:
    """How to look into it. What it hands to its kernel is made again: it keeps its projections within one function of torch."""
    return Look("forward", partial(_run, module), module)


def fast_encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `torch.nn` whose self-attention may run inside one kernel of the whole layer, where nothing sees it."""
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]


_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def _run(mha: nn.MultiheadAttention, listeners: Sequence[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    given = _SIGNATURE.bind(mha, *args, **kwargs).arguments
    query, key = given["query"], given["key"]
    kind = "self" if key is query else "cross"
    wanting = [listener for listener in listeners if listener.wants(kind)]
    out = forward(*args, **kwargs)
    for listener in wanting:
        listener.take(mha, kind, lambda: _rows(mha, query, key, given.get("key_padding_mask"), given.get("attn_mask")))
    return out


@torch.no_grad()
def _rows(
    mha: nn.MultiheadAttention, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> KernelRows:
    """The map of a call; masks of torch's say True = may not be attended, or are added."""
    if query.is_nested or key.is_nested:
        raise ValueError("the sequences are nested tensors; build the encoder with enable_nested_tensor=False to see its maps")
    if query.dim() == 2:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not mha.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    weights = (mha.q_proj_weight, mha.k_proj_weight) if mha.in_proj_weight is None else mha.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)[:2]
    queries, keys = (
        F.linear(x, weight, bias).unflatten(-1, (mha.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key), weights, biases, strict=True)
    )
    added = 0
    if mha.bias_k is not None:
        learned = mha.bias_k.view(1, 1, mha.num_heads, -1).transpose(1, 2).expand(len(keys), -1, -1, -1)
        keys, added = torch.cat((keys, learned), 2), added + 1
    if mha.add_zero_attn:
        keys, added = F.pad(keys, (0, 0, 0, 1)), added + 1
    mask = _mask(key_padding_mask, attn_mask, queries.shape[0], mha.num_heads, added)
    return KernelRows(queries, keys, mask, scale=keys.shape[-1] ** -0.5)


def _mask(padding: Tensor | None, pairs: Tensor | None, batch: int, heads: int, added: int) -> Tensor | None:
    """Both masks as one, in our sense, and open for the positions that the module adds."""
    masks = []
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if pairs is not None:
        masks.append(pairs.view(batch, heads, *pairs.shape[1:]) if pairs.dim() == 3 and pairs.shape[0] > 1 else pairs)
    masks = [F.pad(mask, (0, added)) for mask in masks]
    if all(mask.dtype == torch.bool for mask in masks):
        masks = [~mask for mask in masks]
        return masks[0] & masks[1] if len(masks) == 2 else (masks[0] if masks else None)
    shown = [
        mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return shown[0] + shown[1] if len(shown) == 2 else shown[0]


def refuse_fast_path(layers: Sequence[nn.Module]) -> None:
    """Refuse encoder layers that may take torch's fast path, one kernel for a whole layer, where their self-attention is asked for.

    Raises:
        ValueError: the fast path is on, and a layer is in evaluation mode.
    """
    if torch.backends.mha.get_fastpath_enabled() and any(not layer.training for layer in layers):
        raise ValueError(
            "self-attention of torch.nn.TransformerEncoderLayer may run inside one kernel of the whole layer, where nothing sees "
            "it; call torch.backends.mha.set_fastpath_enabled(False) first, which may change the last bits of what the model gives"
        )

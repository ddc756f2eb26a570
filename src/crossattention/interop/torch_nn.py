"""`torch.nn.MultiheadAttention` as our layers: its weights, its names and its sense of masks live only here."""

from __future__ import annotations

from torch import Tensor, nn

from crossattention.attention import CrossAttention, SelfAttention


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


__all__ = ["from_multihead_attention", "state_dict_from_multihead_attention"]

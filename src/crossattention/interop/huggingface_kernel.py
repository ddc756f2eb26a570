"""`model.set_attn_implementation("crossattention")`: the kernel of this library under transformers' attention interface.

The interface hands over queries, keys and values that are projected already, so the projections stay where they are and only the
kernel is chosen: fused, explicit or blocked, by the sizes of the call. `speed_up` goes further, and for cross-attention only.

Legend: z batch, n queries, m context length, h heads, g key-value heads, k/v head widths.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.attention import execute
from crossattention.attention.masks import ScoreMask, combine_masks
from crossattention.interop.huggingface_masks import forbidding, weights_are_collected
from crossattention.plan import Sizes, choose_plan
from crossattention.plan.plans import Kernel

NAME = "crossattention"

BEYOND = {
    "softcap": "it caps its scores (softcap)",
    "s_aux": "it has sinks, learned scores beside those of the keys (s_aux)",
    "sinks": "it has sinks, learned scores beside those of the keys",
    "indices": "it reads chosen positions only (indices)",
    "block_indices": "it reads chosen blocks only (block_indices)",
}
"""What some models hand to their kernel that is neither a mask nor grouped heads, and what it means."""


def register_attention() -> None:
    """Make `model.set_attn_implementation("crossattention")` known to transformers, in this process.

    out[z, n, h] = softmax over m of (q k^T scale + mask) v, zero in rows that may attend nothing

    The name is entered into transformers' interfaces of attention and of masks: without the second, models would drop their padding
    masks. Models run it if masks, grouped heads and added position scores are all that their attention asks for. Others are refused
    with the reason from this call on, by `set_attn_implementation`, by `from_pretrained` and by constructors. Attention weights are
    given where they are asked for (`output_attentions=True`). Called again it does nothing.

    Raises:
        ImportError: transformers is not installed, or is too old to have the two interfaces.

    Cost: imports transformers. A call of the kernel costs what `torch.nn.functional.scaled_dot_product_attention` does, or less.
    Source: docs/speed_up.md.

    Example:
        >>> import torch
        >>> from crossattention.interop import register_attention
        >>> register_attention()
        >>> from transformers import BartConfig, BartModel
        >>> sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 8))}
        >>> model = BartModel(BartConfig(vocab_size=9, d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, **sizes))
        >>> model.set_attn_implementation("crossattention")
        >>> model(torch.tensor([[3, 4, 5]])).last_hidden_state.shape
        torch.Size([1, 3, 8])
    """
    try:
        from transformers import AttentionInterface, PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers with its attention and mask interfaces (4.53 or later): "
            "pip install 'transformers>=4.53'"
        ) from error
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for method in ("set_attn_implementation", "get_correct_attn_implementation"):
        _refuse_in(PreTrainedModel, method)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: queries (z, h, n, k) read keys (z, g, m, k) and values (z, g, m, v).

    Args:
        module: who asks; its `is_causal` counts where the argument is not given.
        query: queries.
        key: keys.
        value: values.
        attention_mask: bool, True = may be attended, or added to the scores; broadcastable to (z, h, n, m). None: every key may be
            attended, or, of a causal module with several queries, those up to the query's own position.
        dropout: probability of dropping a weight.
        scaling: factor of the scores; default k ** -0.5.
        is_causal: see `attention_mask`.
        position_bias: added to the scores.
        kwargs: `output_attentions`; what transformers' own fused kernel ignores is ignored here too.

    Returns:
        (z, n, h, v), and the weights (z, h, n, m) before dropout if they are asked for.

    Raises:
        ValueError: something that only other kernels do.
    """
    for name, why in BEYOND.items():
        if kwargs.get(name) is not None:
            raise ValueError(_refusal(type(module).__name__, why))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:  # a cache of a fixed size that is not full yet
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if key.shape[0] == 1 < query.shape[0]:
        key, value = key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)
    wants_weights = bool(kwargs.get("output_attentions")) or weights_are_collected()
    if causal and dropout == 0.0 and position_bias is None and not wants_weights:
        out = F.scaled_dot_product_attention(query, *_spread(query, key, value), is_causal=True, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    mask = _mask(query, key, attention_mask, position_bias, causal)
    kernel = "explicit" if wants_weights else _kernel(query, key, value, dropout)
    out, _ = execute.attend_heads(query, key, value, mask, scale=scale, dropout=dropout, kernel=kernel)
    weights = None
    if wants_weights:
        weights = execute.explicit_weights(query, key, mask, scale).to(query.dtype)
    return out[..., : value.shape[-1]].transpose(1, 2).contiguous(), weights


def _spread(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each head of the queries."""
    share = query.shape[1] // key.shape[1]
    return (key, value) if share == 1 else (key.repeat_interleave(share, 1), value.repeat_interleave(share, 1))


def _mask(query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool) -> ScoreMask:
    """All that is masked or added, as one."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    elif mask is not None:
        mask = forbidding(mask)
    return combine_masks(None, mask, bias, key.shape[2], query.dtype)


def _kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Kernel:
    """The kernel that is estimated to be the quickest; the fused one in graphs, which never branch on lengths."""
    if torch.compiler.is_compiling() or dropout > 0.0:
        return "fused"
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    device = query.device.type
    threads = torch.get_num_threads() if device == "cpu" else 1
    dtype = str(query.dtype).removeprefix("torch.")
    return _chosen(*query.shape, *key.shape[1:3], value.shape[3], dtype, device, trains, threads)


@lru_cache(maxsize=4096)
def _chosen(
    batch: int, heads: int, n: int, k: int, groups: int, m: int, v: int, dtype: str, device: str, trains: bool, threads: int
) -> Kernel:
    sizes = Sizes(
        batch=batch,
        query_length=n,
        context_length=m,
        query_dim=heads * k,
        context_dim=heads * k,
        heads=heads,
        kv_heads=groups,
        head_dim=k,
        value_head_dim=v,
        out_dim=heads * k,
        dtype=dtype,
        device=device,
        trains=trains,
        threads=threads,
    )
    fitting = [c for c in choose_plan(sizes).candidates if c.plan.is_textbook]
    return min(fitting, key=lambda c: (c.exceeds_memory, c.cost.seconds)).plan.kernel


# ------------------------------------------------------------------------------------------------------------- refusing


def _refuse_in(kind: type, method: str) -> None:
    """Let a method of transformers' models refuse this name for models that need more than it does."""
    own = getattr(kind, method)
    if getattr(own, "refuses_crossattention", False):
        return

    @functools.wraps(own)
    def refusing(self: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        if asked == NAME or (isinstance(asked, dict) and NAME in asked.values()):
            why = unsupported(self)
            if why is not None:
                raise ValueError(_refusal(type(self).__name__, why))
        return own(self, asked, *args, **kwargs)

    refusing.refuses_crossattention = True  # type: ignore[attr-defined]
    setattr(kind, method, refusing)


def _refusal(name: str, why: str) -> str:
    return (
        f'attn_implementation="{NAME}" cannot run {name}: {why}; it runs masks, grouped heads and added position scores. Choose '
        'another, as "eager", which runs everything'
    )


def unsupported(model: Any) -> str | None:
    """Why the kernel cannot run a model of transformers, or None: by its class, its configuration and its code."""
    kind = type(model)
    can_set: Callable[[], bool] | None = getattr(kind, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        return "its attention does not go through transformers' AttentionInterface, so nothing can be set"
    for config in _configs(getattr(model, "config", None)):
        capped = [name for name, value in vars(config).items() if "attn" in name and "softcap" in name and value]
        if capped:
            return f"{BEYOND['softcap']}, config.{capped[0]} is {getattr(config, capped[0])}"
    return _beyond_of_file(kind.__module__)


def _configs(config: Any) -> list[Any]:
    """A configuration and those within it."""
    if config is None:
        return []
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [config, *(found for one in inner for found in _configs(one))]


@lru_cache(maxsize=256)
def _code_of(module: str) -> str:
    """The code of a file of transformers; nothing of code of others, which is asked at its calls."""
    try:
        return inspect.getsource(sys.modules[module]) if module.startswith("transformers.models.") else ""
    except (OSError, TypeError, KeyError):
        return ""


@lru_cache(maxsize=256)
def _beyond_of_file(module: str) -> str | None:
    """What the code of a model's file asks of its kernel beyond masks and groups."""
    code = _code_of(module)
    for call in re.findall(r"\battention_interface\((.*?)\n\s*\)", code, re.DOTALL):
        for name in ("s_aux", "sinks", "indices", "block_indices"):
            if re.search(rf"\b{name}=", call):
                return BEYOND[name]
    if re.search(r"_attn_implementation\s*(==|!=|(not )?in)[^\n]*[\"']sdpa[\"']", code):
        return 'its code knows "sdpa" and other implementations by their names'
    return None

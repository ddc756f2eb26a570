"""The peers: cross-attention as other libraries compute it, and as people write it by hand, with the weights of one of our layers.

Each peer is one function from a layer and a row of work to a `Peer`, or a `NotApplicableError` that says why there is none. Peers
run at their best: fused kernels where they have them, no weights returned, keys and values kept where the context is read many
times. Weights are shared with the layer wherever the peer keeps them in the same form.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from rows import Inputs, Row
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossattention import CrossAttention

Read = Callable[[Tensor], Tensor]
"""From the queries of one step (z, n, a) to its output."""

BY_HAND = "by hand"
COMMON_WAYS = {"beams": f"{BY_HAND}, context repeated", "learned": f"{BY_HAND}, queries expanded"}
"""What is usually written for work that the hand-written peer at its best does otherwise."""


class NotApplicableError(Exception):
    """A peer cannot do a piece of work, or is not installed; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the layer's output.

    Args:
        attend: from queries (z, n, a) and context (z, m, b) to the output.
        parameters: what a training step gives gradients to.
        cached: of a context, makes what reads it many times; None where the peer projects the context in every call.
    """

    attend: Callable[[Tensor, Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    cached: Callable[[Tensor], Read] | None = None


# --------------------------------------------------------------------------------------------------------------- by hand


def by_hand(layer: CrossAttention, row: Row) -> Peer:
    """Projections and `F.scaled_dot_product_attention`, as a user writes them; queries of batch 1 serve the whole batch."""
    q_proj, k_proj, v_proj, out_proj, heads = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, row.heads

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

    def read(a: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = split(q_proj(a))
        if queries.shape[0] != keys.shape[0]:
            queries = queries.expand(keys.shape[0], -1, -1, -1)
        return out_proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))

    def attend(a: Tensor, b: Tensor) -> Tensor:
        return read(a, split(k_proj(b)), split(v_proj(b)))

    def cached(b: Tensor) -> Read:
        keys, values = split(k_proj(b)).contiguous(), split(v_proj(b)).contiguous()
        return lambda a: read(a, keys, values)

    return Peer(attend, tuple(layer.parameters()), cached)


def by_hand_varlen(layer: CrossAttention, row: Row) -> Peer:
    """Projections and torch's kernel for sequences laid end to end, (tokens, heads, width): no head is moved before its items."""
    try:
        varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        raise NotApplicableError(f"this torch has no torch.nn.attention.varlen.varlen_attn ({error})") from None
    q_proj, k_proj, v_proj, out_proj, heads = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, row.heads
    ends: dict[tuple[int, int], Tensor] = {}

    def packed(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (heads, -1)).flatten(0, 1)

    def ends_of(batch: int, length: int, device: torch.device) -> Tensor:
        if (batch, length) not in ends:
            ends[batch, length] = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return ends[batch, length]

    def read(a: Tensor, keys: Tensor, values: Tensor, batch: int) -> Tensor:
        queries = q_proj(a).expand(batch, -1, -1)
        n, m = a.shape[1], keys.shape[0] // batch
        lengths = (ends_of(batch, n, a.device), ends_of(batch, m, a.device), n, m)
        return out_proj(varlen_attn(packed(queries), keys, values, *lengths).flatten(1).unflatten(0, (batch, n)))

    def attend(a: Tensor, b: Tensor) -> Tensor:
        return read(a, packed(k_proj(b)), packed(v_proj(b)), b.shape[0])

    def cached(b: Tensor) -> Read:
        keys, values = packed(k_proj(b)), packed(v_proj(b))
        return lambda a: read(a, keys, values, b.shape[0])

    return Peer(attend, tuple(layer.parameters()), cached)


# ------------------------------------------------------------------------------------------------------------- libraries


def multihead_attention(layer: CrossAttention, row: Row) -> Peer:
    """`torch.nn.MultiheadAttention`, without weights returned."""
    if row.heads * row.head_dim != row.query_dim:
        raise NotApplicableError(f"its heads make up the query width, {row.heads} x {row.head_dim} is not {row.query_dim}")
    weight, dims = layer.q_proj.weight, {"kdim": row.context_dim, "vdim": row.context_dim}
    module = nn.MultiheadAttention(
        row.query_dim, row.heads, **dims, batch_first=True, device=weight.device, dtype=weight.dtype
    ).train(layer.training)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    if module.in_proj_weight is None:
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight = (p.weight for p in projections)
    else:
        module.in_proj_weight = nn.Parameter(torch.cat([p.weight.detach() for p in projections]))
    module.in_proj_bias = nn.Parameter(torch.cat([p.bias.detach() for p in projections]))
    module.out_proj.weight, module.out_proj.bias = layer.out_proj.weight, layer.out_proj.bias
    return Peer(lambda a, b: module(a, b, b, need_weights=False)[0], tuple(module.parameters()))


def timm_cross_attention(layer: CrossAttention, row: Row) -> Peer:
    """Timm's `CrossAttention` of CrossViT: the first position reads the whole sequence."""
    if row.kind != "class token":
        raise NotApplicableError("its query is the first position of the context, and no other")
    module = _installed("timm.models.crossvit", "timm").CrossAttention(row.query_dim, row.heads, qkv_bias=True)
    module.wq, module.wk, module.wv, module.proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
    module.train(layer.training)
    return Peer(lambda a, b: module(b), tuple(module.parameters()))


def x_transformers_attention(layer: CrossAttention, row: Row) -> Peer:
    """x-transformers' `Attention` with its fused kernel; it has no biases."""
    attention = _installed("x_transformers.x_transformers", "x-transformers").Attention
    sizes = {"dim_context": row.context_dim, "heads": row.heads, "dim_head": row.head_dim}
    module = attention(row.query_dim, **sizes, flash=True, project_out=True).train(layer.training)
    module.to_q.weight, module.to_k.weight, module.to_v.weight = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
    module.to_out.weight = layer.out_proj.weight

    def cached(b: Tensor) -> Read:
        # Its own cache would be joined to the keys of each step's context, a copy a step; its parts need none.
        keys, values = module.split_k_heads(module.to_k(b)).contiguous(), module.split_v_heads(module.to_v(b)).contiguous()

        def read(a: Tensor) -> Tensor:
            out, _ = module.attend(module.split_q_heads(module.to_q(a)), keys, values)
            return module.to_out(module.merge_heads(out))

        return read

    return Peer(lambda a, b: module(a, context=b), tuple(module.parameters()), cached)


def bert_cross_attention(layer: CrossAttention, row: Row) -> Peer:
    """Hugging Face's `BertCrossAttention` by its "sdpa" implementation, and the output projection that it leaves to others."""
    if not row.query_dim == row.context_dim == row.heads * row.head_dim:
        raise NotApplicableError("queries, context and heads have one width")
    bert = _installed("transformers.models.bert.modeling_bert", "transformers")
    caches = _installed("transformers.cache_utils", "transformers")
    config = bert.BertConfig(hidden_size=row.query_dim, num_attention_heads=row.heads, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    if not hasattr(bert, "BertCrossAttention"):
        raise NotApplicableError("this transformers has no BertCrossAttention")
    module = bert.BertCrossAttention(config, layer_idx=0).train(layer.training)
    module.query, module.key, module.value = layer.q_proj, layer.k_proj, layer.v_proj

    def cached(b: Tensor) -> Read:
        cache = caches.EncoderDecoderCache(caches.DynamicCache(), caches.DynamicCache())
        return lambda a: layer.out_proj(module(a, encoder_hidden_states=b, past_key_values=cache)[0])

    return Peer(lambda a, b: layer.out_proj(module(a, encoder_hidden_states=b)[0]), tuple(layer.parameters()), cached)


def perceiver_attention(layer: CrossAttention, row: Row) -> Peer:
    """Hugging Face's `PerceiverAttention`, without its layer norms and residual."""
    perceiver = _installed("transformers.models.perceiver.modeling_perceiver", "transformers")
    width = row.heads * row.head_dim
    sizes = {"qk_channels": width, "v_channels": width, "num_heads": row.heads, "q_dim": row.query_dim, "kv_dim": row.context_dim}
    config = perceiver.PerceiverConfig(attention_probs_dropout_prob=0.0)
    module = perceiver.PerceiverAttention(config, is_cross_attention=True, **sizes, use_query_residual=False)
    module.self.layernorm1 = module.self.layernorm2 = nn.Identity()
    module.self.query, module.self.key, module.self.value = layer.q_proj, layer.k_proj, layer.v_proj
    module.output.dense = layer.out_proj
    module.train(layer.training)
    return Peer(lambda a, b: module(a, inputs=b)[0], tuple(module.parameters()))


def _installed(module: str, package: str) -> ModuleType:
    """A module of an outside library, or the reason why the peer is left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library says of its own imports
            return import_module(module)
    except ImportError as error:
        raise NotApplicableError(f"{package} is not installed, or is another version ({error})") from None


LIBRARIES: dict[str, Callable[[CrossAttention, Row], Peer]] = {
    "torch MultiheadAttention": multihead_attention,
    "timm CrossAttention": timm_cross_attention,
    "x-transformers Attention": x_transformers_attention,
    "BertCrossAttention": bert_cross_attention,
    "PerceiverAttention": perceiver_attention,
}
PACKAGES = ("timm", "x-transformers", "transformers")


# ------------------------------------------------------------------------------------------------------- a row's work


def common_way(peer: Peer, row: Row, inputs: Inputs) -> Callable[[], Tensor]:
    """The row's work by a peer that knows only (z, n, a) and (z, m, b): one context a beam, learned queries once an item."""
    if row.kind == "decode":
        return _decode(peer, inputs)
    if row.kind == "beams":
        return lambda: peer.attend(inputs.queries().flatten(0, 1), inputs.b.repeat_interleave(row.repeats, 0)).unflatten(
            0, (row.batch, row.repeats)
        )
    if row.kind == "learned":
        return lambda: peer.attend(inputs.queries().expand(row.batch, -1, -1), inputs.b)
    return lambda: peer.attend(inputs.queries(), inputs.b)


def best_way(peer: Peer, row: Row, inputs: Inputs) -> Callable[[], Tensor]:
    """The row's work by hand at its best: beams are laid into the length, learned queries are projected once."""
    if row.kind == "beams":
        return lambda: peer.attend(inputs.queries().flatten(1, 2), inputs.b).unflatten(1, (row.repeats, row.query_length))
    if row.kind == "learned":
        return lambda: peer.attend(inputs.queries().unsqueeze(0), inputs.b)
    return common_way(peer, row, inputs)


def _decode(peer: Peer, inputs: Inputs) -> Callable[[], Tensor]:
    cached = peer.cached
    if cached is None:
        raise NotApplicableError("it takes no kept keys and values: it would project the context at every step")

    def run() -> Tensor:
        read = cached(inputs.b)
        return torch.stack([read(a) for a in inputs.queries().unbind()])

    return run


@dataclass(frozen=True)
class Call:
    """A row's work as one call, and the parameters that its training step gives gradients to."""

    run: Callable[[], Tensor]
    parameters: tuple[nn.Parameter, ...]


def peer_calls(layer: CrossAttention, row: Row, inputs: Inputs, device: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Every peer's call by name, the hand-written one first, and why the others are left out."""
    hand = by_hand(layer, row)
    calls = {BY_HAND: Call(best_way(hand, row, inputs), hand.parameters)}
    if row.kind in COMMON_WAYS:
        calls[COMMON_WAYS[row.kind]] = Call(common_way(hand, row, inputs), hand.parameters)
    if device == "cuda":
        for name, backend in _backends().items():
            calls[f"{BY_HAND}, {name}"] = Call(_pinned(best_way(hand, row, inputs), backend), hand.parameters)
    left_out = {}
    makers = {f"{BY_HAND}, varlen": by_hand_varlen} if device == "cuda" else {}
    for name, make in (makers | LIBRARIES).items():
        try:
            peer = make(layer, row)
            way = best_way if make is by_hand_varlen else common_way
            calls[name] = Call(way(peer, row, inputs), peer.parameters)
        except NotApplicableError as reason:
            left_out[name] = str(reason)
    return calls, left_out


def _backends() -> dict[str, SDPBackend]:
    """The fused kernels that `scaled_dot_product_attention` can be held to; an older torch may lack some."""
    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
    return {name: getattr(SDPBackend, member) for name, member in names.items() if hasattr(SDPBackend, member)}


def _pinned(run: Callable[[], Tensor], backend: SDPBackend) -> Callable[[], Tensor]:
    """The call with one fused kernel and no other: it raises where that kernel refuses the work. Backward follows the forward."""

    def pinned() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return pinned

"""The fused kernel: `scaled_dot_product_attention`, given what it is quick with.

One width for keys and values, heads that share keys laid into the length, four dimensions, and, in compiled code, queries that a
whole batch shares without a copy of them for each item. A few queries on a short context are read by two batched products in its
place, where that was measured to be quicker.

Legend: z batch, n queries, m context length, h heads, g key-value heads, s = h / g heads that share one, c/w widths in which scores
and values meet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossattention.attention.masks import ScoreMask, to_score_dtype
from crossattention.attention.products import is_cast, is_looked_into
from crossattention.plan.blocks import NARROW_ROW
from crossattention.plan.speeds import speeds_of

_WIDENED_KEYS = 256
"""Keys up to which half precision trains in float32 on a CPU."""
_FEW_QUERIES, _SHORT_CONTEXT, _OF_TORCH_ITSELF = 8, 40, 400
"""Most queries and positions that are read by batched products, and from how many multiplications on MKL computes one."""
_LIBRARY = torch.library.Library("crossattention", "FRAGMENT")
_LIBRARY.define("attend_shared(Tensor queries, Tensor keys, Tensor values, float scale) -> Tensor")


def attend_fused(queries: Tensor, keys: Tensor, values: Tensor, mask: ScoreMask, scale: float) -> Tensor:
    """Let queries (z or 1, h or 1, n, c) read keys (z, g, m, c) and values (z, g', m, w): (z, h, n, w).

    Float32 for half precision where the kernel is quicker so.
    """
    if _fits_as_it_is(queries, keys, values, mask):
        return read_whole(queries, keys, values, scale)
    if _trains_in_half_on_cpu(queries, keys, values):
        is_shared = keys is values
        queries, keys = queries.float(), keys.float()
        values = keys if is_shared else values.float()
    if queries.is_cpu and is_cast(queries):  # it would round the mask, which may stay float32
        with torch.autocast("cpu", enabled=False):
            return _read(queries, keys, values, mask, scale)
    return _read(queries, keys, values, mask, scale)


def read_whole(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """What queries (z, h, n, c) read of keys and values (z, h, m, c) without a mask: (z, h, n, c)."""
    if _are_few(queries, keys):
        return _read_few(queries, keys, values, scale)
    return F.scaled_dot_product_attention(queries, keys, values, scale=scale)


def _are_few(queries: Tensor, keys: Tensor) -> bool:
    """Whether a few queries on a short context are quicker by two batched products than by the CPU's fused kernel.

    That calls a product for each head of each item, MKL's batched ones are called once: 1.1 to 1.7 times as fast in decode steps of
    a large batch (dev/LOG.md). Products of fewer than 400 multiplications torch does by itself, slowly; from some forty positions
    on both wait for memory.
    """
    z, heads, n, width = queries.shape
    m = keys.shape[2]
    return (
        n <= _FEW_QUERIES
        and m <= _SHORT_CONTEXT
        and z * heads >= speeds_of("cpu", "float32").few_queries_from
        and n * m * width >= _OF_TORCH_ITSELF
        and queries.dtype == keys.dtype == torch.float32
        and queries.is_cpu
        and not torch.is_grad_enabled()
        and not is_looked_into()
    )


def _read_few(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Two batched products and a softmax between them; keys times queries where rows of scores would be short."""
    z, heads, n, width = queries.shape
    m = keys.shape[2]
    rows, keys, values = queries.reshape(z * heads, n, width), keys.flatten(0, 1), values.flatten(0, 1)
    if m <= NARROW_ROW:
        scores = torch.bmm(keys, (rows * scale).transpose(1, 2))
        weights = torch.softmax(scores, 1, out=scores).transpose(1, 2)
    else:
        scores = torch.bmm(rows * scale, keys.transpose(1, 2))
        weights = torch.softmax(scores, 2, out=scores)
    return torch.bmm(weights, values).view(z, heads, n, width)


def _fits_as_it_is(queries: Tensor, keys: Tensor, values: Tensor, mask: ScoreMask) -> bool:
    """Whether the kernel takes all of it at once; asked first, as the questions below cost as much as a kernel on two queries."""
    return (
        mask.tensor is None
        and mask.live is None
        and (queries.dtype in (torch.float32, torch.float64) or queries.device.type == "cuda")
        and queries.shape[-1] == keys.shape[-1] == values.shape[-1]
        and queries.shape[:2] == keys.shape[:2] == values.shape[:2]
        and not torch.compiler.is_compiling()
    )


def _read(queries: Tensor, keys: Tensor, values: Tensor, mask: ScoreMask, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with as few key-value heads as there are: heads that share one are laid into the length."""
    heads = max(queries.shape[1], keys.shape[1], values.shape[1])
    groups = max(keys.shape[1], values.shape[1])
    width = values.shape[-1]
    keys, values = to_one_width(keys, values)
    queries = widen(queries, keys.shape[-1])
    queries = queries.expand(-1, heads, -1, -1)
    share = heads // groups
    tensor = mask.tensor
    if share > 1:
        length = queries.shape[2]
        queries = queries.unflatten(1, (groups, share)).flatten(2, 3)
        tensor = None if tensor is None else fold_mask(tensor, groups, share, length)
    keys, values = spread(keys, groups), spread(values, groups)
    if tensor is None and _is_shared_in_a_graph(queries, keys, values):
        shared: Tensor = torch.ops.crossattention.attend_shared.default(queries, keys, values, scale)
        out = shared.transpose(1, 2)
    else:
        # Four dimensions even where all but the last are broadcast: fused kernels know no others.
        queries = queries.expand(keys.shape[0], -1, -1, -1)
        if tensor is not None and tensor.dtype not in (torch.bool, queries.dtype) and tensor.device.type != "cpu":
            tensor = to_score_dtype(tensor, queries.dtype)  # kernels on a GPU take no mask of another dtype
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=tensor, scale=scale)
    if share > 1:
        out = out.unflatten(2, (share, -1)).flatten(1, 2)
    out = out[..., :width]
    if mask.live is not None and _must_zero_empty_rows(out):
        out = out.masked_fill(~mask.live, 0.0)
    return out


def _trains_in_half_on_cpu(*read: Tensor) -> bool:
    """Whether the fused kernel is better in float32: with its backward pass it took 1.4 to 5 times as long in half, up to 128 keys.

    At 512 both take the same time (dev/LOG.md); from there on the half's memory counts.
    """
    return (
        read[0].device.type == "cpu"
        and not torch.compiler.is_compiling()
        and read[0].dtype in (torch.bfloat16, torch.float16)
        and read[1].shape[2] <= _WIDENED_KEYS
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in read)
    )


def spread(tensor: Tensor, groups: int) -> Tensor:
    """(z, g, m, c) with each head repeated to make `groups`; without a copy where there is one head."""
    if tensor.shape[1] == groups:
        return tensor
    if tensor.shape[1] == 1:
        return tensor.expand(-1, groups, -1, -1)
    return tensor.repeat_interleave(groups // tensor.shape[1], 1)


def fold_mask(tensor: Tensor, groups: int, share: int, length: int) -> Tensor:
    """A mask of (z, h, n, m) for heads laid into the length: (z, g, s n, m)."""
    if tensor.shape[1] == 1 and tensor.shape[2] == 1:
        return tensor
    if tensor.shape[1] == 1:
        return tensor.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(2, 3)
    folded: Tensor = tensor.unflatten(1, (groups, share)).expand(-1, -1, -1, length, -1).flatten(2, 3)
    return folded


def _must_zero_empty_rows(out: Tensor) -> bool:
    """Whether the device's kernel, or an exported graph's other runtime, may leave something in rows without a live key."""
    return out.device.type != "cpu" or torch.compiler.is_exporting()


def to_one_width(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the narrower padded by zeros: kernels that fuse attention want one width, and zeros change nothing."""
    if keys is values or keys.shape[-1] == values.shape[-1]:
        return keys, values
    width = max(keys.shape[-1], values.shape[-1])
    return widen(keys, width), widen(values, width)


def widen(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros after its last dimension, up to a width."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


# ------------------------------------------------------------------------- queries that a whole batch shares, in compiled code


def _is_shared_in_a_graph(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether a graph would write shared queries out for each item, and the result once more into another layout.

    Inductor hands no expanded tensor to a kernel (torch 2.14); an operator that expands them inside saves both copies. It has no
    gradient, and an exported program must run without this library.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled():
        return False
    batch = keys.shape[0]
    return bool(queries.shape[0] == 1 and queries.dtype == keys.dtype == values.dtype and _is_surely_more_than_one(batch))


def _is_surely_more_than_one(batch: int) -> bool:
    """Whether a graph's batch is known to be above one, asked in a way that ties the graph to nothing."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, and only graphs need it

    return bool(statically_known_true(batch > 1))


def _attend_shared(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    queries = queries.expand(keys.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2).contiguous()


def _shape_of_shared(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return queries.new_empty(keys.shape[0], queries.shape[2], queries.shape[1], values.shape[3])


_LIBRARY.impl("attend_shared", _attend_shared, "CPU")
_LIBRARY.impl("attend_shared", _attend_shared, "CUDA")
torch.library.register_fake("crossattention::attend_shared", _shape_of_shared, lib=_LIBRARY)

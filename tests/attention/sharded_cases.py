"""What several processes check of contexts that are sharded over them; each function with `check` is a case.

Run by test_sharded.py in 1, 2 and 4 processes. Every process draws the same numbers, computes by itself what one process gives, and
compares its share.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from crossattention import CrossAttention, Plan, attention_map
from crossattention.attention import ContextShard, count_traffic, sharded
from crossattention.layers import ALiBi, QueryKeyRMSNorm, RelativeLogits, Rotary, T5Bias
from crossattention.maps import Alignment, Argmax, Entropy, Highlight, Rows, TopK
from crossattention.plan import ALL_PLANS
from oracle import make_inputs, make_layer, make_masks
from processes import join

Z, N, M, A, B, H, O = 2, 5, 13, 6, 9, 4, 10
CASES: dict[str, Callable[[], None]] = {}
NEAR = {torch.float64: 1e-10, torch.float32: 1e-6}


def case(check: Callable[[], None]) -> Callable[[], None]:
    CASES[check.__name__] = check
    return check


def mesh():
    return init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),), mesh_dim_names=("length",))


def near(found, wanted, what="", largest=1.0):
    """Equal to the tolerance of the dtype, in terms of the largest number wanted, or of one given."""
    if isinstance(found, DTensor):
        found = found.full_tensor()
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    assert not torch.isnan(found).any(), f"{what}: NaN"
    if wanted.numel():
        largest = max(largest, wanted.abs().max().item())
        worst = (found.double() - wanted.double()).abs().max().item() / largest
        allowed = NEAR[wanted.dtype] * (1 if wanted.device.type == "cpu" else 4)  # a GPU adds up in another order each time
        assert worst <= allowed, f"{what}: {worst:.1e}"


def own(lengths):
    """The slice of this process where parts have these lengths."""
    start = sum(lengths[: dist.get_rank()])
    return slice(start, start + lengths[dist.get_rank()])


def torch_lengths(m):
    world = dist.get_world_size()
    chunk = -(-m // world)
    return [max(0, min(chunk, m - rank * chunk)) for rank in range(world)]


def as_shards(b, lengths=None):
    """B over all processes: a DTensor, or in parts of any lengths."""
    if lengths is None:
        return distribute_tensor(b.detach(), mesh(), [Shard(1)], src_data_rank=None)
    return ContextShard(b[:, own(lengths)], mesh())


def equal_to_one_process(layer, a, b, lengths=None, *, how="forward", **masks):
    """Output and all gradients of the sharded call against those of the whole one."""
    whole_a, whole_b = a.detach().requires_grad_(), b.detach().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    wanted = layer(whole_a, whole_b, **masks)
    direction = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    grads = torch.autograd.grad((wanted * direction).sum(), [whole_a, whole_b, *trained], allow_unused=True)

    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    context = as_shards(b, lengths)
    if lengths is None:
        b = context.requires_grad_()
    given = dict(masks)
    if lengths is not None:
        for name, mask in masks.items():
            if name != "query_positions" and mask.shape[-1] > 1:
                given[name] = mask[..., own(lengths)]
    if how == "forward":
        found = layer(a, context, **given)
    else:
        of_context = {name: given.pop(name) for name in ("context_mask", "context_positions") if name in given}
        prepared = layer.prepare(context, query_length=a.shape[-2], uses=2, **of_context)
        layer.attend(a, prepared, **given)
        found = layer.attend(a, prepared, **given)
    near(found, wanted, "output")
    inputs = [a, b, *trained]
    found_grads = torch.autograd.grad((found * direction).sum(), inputs, allow_unused=True)
    largest = max(1.0, *(g.abs().max().item() for g in grads if g is not None and g.numel()))  # some are sums of terms that cancel
    part = own(torch_lengths(b.shape[1]) if lengths is None else lengths)
    for name, grad, want in zip(
        ["a", "b", *(n for n, p in layer.named_parameters() if p.requires_grad)], found_grads, grads, strict=True
    ):
        if want is None:
            continue
        if name == "b":  # of the process's own part
            grad, want = (grad[:, part] if lengths else grad.to_local()), want[:, part]
        assert grad is not None, f"no gradient of {name}"
        near(grad, want, f"gradient of {name}", largest)


# ------------------------------------------------------------------------------------------------------------- exactness


@case
def every_plan_mask_and_dtype():
    for plan in ALL_PLANS:
        for kind in ("none", "some", "empty row", "pairs", "additive", "both"):
            for dtype in (torch.float64, torch.float32):
                torch.manual_seed(3)
                layer = make_layer(plan, dtype=dtype)
                a, b = make_inputs(m=M, dtype=dtype)
                equal_to_one_process(layer, a, b, **make_masks(kind, m=M, dtype=dtype))


@case
def lengths_of_none_one_and_many():
    for plan in (Plan(), Plan("context", "context"), Plan("query", "output")):
        for n in (0, 1, 5):
            for m in (0, 1, 2, 3, 13):
                torch.manual_seed(4)
                layer = make_layer(plan)
                a, b = make_inputs(n=n, m=m)
                equal_to_one_process(layer, a, b)


@case
def any_split_also_with_empty_parts():
    world = dist.get_world_size()
    splits = {1: [[13]], 2: [[13, 0], [0, 13], [2, 11]], 4: [[0, 0, 13, 0], [1, 2, 3, 7], [7, 0, 6, 0], [4, 4, 4, 1]]}[world]
    for lengths in splits:
        for plan in (Plan(), Plan("context", "head"), Plan("query", "context")):
            for kind in ("none", "some", "pairs"):
                torch.manual_seed(5)
                layer = make_layer(plan)
                a, b = make_inputs(m=M)
                equal_to_one_process(layer, a, b, lengths, **make_masks(kind, m=M))


@case
def a_part_that_is_wholly_masked():
    for plan in (Plan(), Plan("context", "context")):
        layer = make_layer(plan)
        a, b = make_inputs(m=M)
        for rank in range(dist.get_world_size()):
            lengths = torch_lengths(M)
            mask = torch.ones(Z, M, dtype=torch.bool)
            start = sum(lengths[:rank])
            mask[:, start : start + lengths[rank]] = False
            equal_to_one_process(layer, a, b, context_mask=mask)
            equal_to_one_process(
                layer, a, b, attn_mask=torch.zeros(Z, 1, 1, M).double().masked_fill(~mask[:, None, None], -torch.inf)
            )
        equal_to_one_process(layer, a, b, context_mask=torch.zeros(Z, M, dtype=torch.bool))
        out = layer(a, as_shards(b), context_mask=torch.zeros(Z, M, dtype=torch.bool))
        near(out, layer.out_proj.bias.expand_as(out), "the output bias")


@case
def grouped_heads_learned_queries_and_repeats():
    for plan in (Plan(), Plan("context", "head"), Plan("head", "context"), Plan("query", "output")):
        layer = make_layer(plan, kv_heads=2)
        _, b = make_inputs(m=M)
        equal_to_one_process(layer, torch.randn(N, A).double(), b, context_mask=torch.rand(Z, M) > 0.3)
        equal_to_one_process(layer, torch.randn(Z, 3, N, A).double(), b, attn_mask=torch.rand(Z, 3, 1, N, M) > 0.3)
        equal_to_one_process(layer, torch.randn(Z, 3, N, A).double(), b, attn_mask=torch.rand(H, N, M) > 0.3)


@case
def without_biases_and_with_frozen_weights():
    layer = make_layer(Plan("query", "head"), bias=False)
    equal_to_one_process(layer, *make_inputs(m=M))
    layer = make_layer(Plan("head", "output"))
    layer.k_proj.requires_grad_(False)
    equal_to_one_process(layer, *make_inputs(m=M))


@case
def parts_with_weights_of_their_own():
    for positions in (None, Rotary(), ALiBi(H), T5Bias(H).double(), RelativeLogits(6, H, 8).double()):
        for norm in (None, QueryKeyRMSNorm(8).double()):
            torch.manual_seed(6)
            layer = make_layer("textbook", positions=positions, qk_norm=norm)
            a, b = make_inputs(m=M)
            equal_to_one_process(layer, a, b)
            if positions is not None:
                at = torch.arange(M) * 2
                equal_to_one_process(layer, a, b, context_positions=at, query_positions=torch.arange(N) + 3)
                equal_to_one_process(
                    layer, a, b, {1: [13], 2: [4, 9], 4: [0, 5, 5, 3]}[dist.get_world_size()], context_positions=at
                )


@case
def prepared_once_and_read_often():
    for plan in (*ALL_PLANS, "auto"):
        layer = make_layer(plan)
        a, b = make_inputs(m=M)
        equal_to_one_process(layer, a, b, how="prepared", context_mask=torch.rand(Z, M) > 0.3)
        b = b.detach()
        prepared = layer.prepare(as_shards(b), uses=3, query_length=1)
        assert prepared.context_length == M and prepared.local.context_length == torch_lengths(M)[dist.get_rank()]
        for _ in range(3):
            a = torch.randn(Z, 1, A).double()
            near(layer.attend(a, prepared), layer(a, b))
        near(layer.attend(a[[1]], prepared.select(torch.tensor([1]))), layer(a[[1]], b[[1]]))
        if plan != "auto":
            learned = torch.randn(N, A).double()
            near(layer.attend(layer.prepare_queries(learned, space=plan.scores), prepared), layer(learned, b))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(2.0)
        try:
            layer.attend(a, prepared)
        except ValueError as error:
            assert "out of date" in str(error)
        else:
            assert str(prepared.plan) == "context+context"


@case
def masks_as_dtensors():
    layer = make_layer()
    a, b = make_inputs(m=M)
    mask, pairs = torch.rand(Z, M) > 0.3, torch.randn(Z, H, N, M).double()
    wanted = layer(a, b, context_mask=mask, attn_mask=pairs)
    cut = distribute_tensor(mask, mesh(), [Shard(1)]), distribute_tensor(pairs, mesh(), [Shard(3)])
    near(layer(a, as_shards(b), context_mask=cut[0], attn_mask=cut[1]), wanted)
    whole = distribute_tensor(mask, mesh(), [Replicate()]), distribute_tensor(pairs, mesh(), [Replicate()])
    near(layer(a, as_shards(b), context_mask=whole[0], attn_mask=whole[1]), wanted)
    near(layer(a, as_shards(b), attn_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)), layer(a, b))


@case
def a_mask_that_is_trained_has_its_gradient_where_it_is():
    layer = make_layer()
    a, b = make_inputs(m=M)
    for shape in ((H, N, M), (Z, 1, 1, M)):
        whole = torch.randn(shape).double().requires_grad_()
        wanted = layer(a, b, attn_mask=whole)
        [grad] = torch.autograd.grad(wanted.square().sum(), whole)
        pairs = distribute_tensor(whole.detach(), mesh(), [Shard(len(shape) - 1)]).requires_grad_()
        found = layer(a, as_shards(b), attn_mask=pairs)
        near(found, wanted)
        near(torch.autograd.grad(found.square().sum(), pairs)[0], grad)


@case
def half_precision_and_autocast():
    layer = make_layer(dtype=torch.float32)
    a, b = make_inputs(m=200, dtype=torch.float32)
    wanted = layer.double()(a.double(), b.double())
    layer.bfloat16()
    plain = (layer(a.bfloat16(), b.bfloat16()).double() - wanted).abs().max()
    found = (layer(a.bfloat16(), as_shards(b.bfloat16())).double() - wanted).abs().max()
    assert found <= 2 * plain, (found, plain)
    layer.float()
    wanted = layer.double()(a.double(), b.double())
    layer.float()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        plain = (layer(a, b).double() - wanted).abs().max()
        out = layer(a, as_shards(b))
        assert out.dtype == torch.bfloat16
        assert (out.double() - wanted).abs().max() <= 2 * plain
        out.sum().backward()


@case
def pieces_where_no_kernel_is_fused():
    """As on a device without a kernel that gives log-sum-exps: in pieces of few scores."""
    held = sharded.PIECE_SCORES, sharded.is_fused
    sharded.PIECE_SCORES, sharded.is_fused = 64, lambda queries: False
    try:
        for plan in (Plan(), Plan("context", "context"), Plan("query", "output")):
            for kind in ("none", "both", "empty row"):
                layer = make_layer(plan)
                a, b = make_inputs(m=M)
                equal_to_one_process(layer, a, b, **make_masks(kind, m=M))
    finally:
        sharded.PIECE_SCORES, sharded.is_fused = held


# -------------------------------------------------------------------------------------------- DTensors, meshes, gradients


@case
def queries_as_a_dtensor_give_a_dtensor():
    layer = make_layer()
    a, b = make_inputs(m=M)
    wanted = layer(a, b)
    [grad] = torch.autograd.grad(wanted.square().sum(), a)
    over = distribute_tensor(a.detach(), mesh(), [Replicate()]).requires_grad_()
    found = layer(over, as_shards(b))
    assert isinstance(found, DTensor) and found.placements == (Replicate(),)
    near(found.to_local(), wanted)
    near(torch.autograd.grad(found.to_local().square().sum(), over)[0], grad)


@case
def the_gradient_of_a_dtensor_context_is_one():
    layer = make_layer()
    a, b = make_inputs(m=M)
    [grad] = torch.autograd.grad(layer(a, b).square().sum(), b)
    context = distribute_tensor(b.detach(), mesh(), [Shard(1)]).requires_grad_()
    [found] = torch.autograd.grad(layer(a, context).square().sum(), context)
    assert isinstance(found, DTensor) and found.placements == (Shard(1),)
    near(found.full_tensor(), grad)


@case
def a_mesh_of_batch_and_length():
    world = dist.get_world_size()
    if world != 4:
        return
    both = init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("batch", "length"))
    layer = make_layer()
    a, b = make_inputs(m=M)
    wanted = layer(a, b)
    item = slice(both.get_local_rank("batch"), both.get_local_rank("batch") + 1)
    context = distribute_tensor(b.detach(), both, [Shard(0), Shard(1)])
    near(layer(a[item], context), wanted[item])
    over = distribute_tensor(a.detach(), both, [Shard(0), Replicate()])
    near(layer(over, context), wanted)
    near(layer(a[item], ContextShard(context.to_local(), both["length"])), wanted[item])
    # The mean over all four processes is the mean over the two batches: within a batch all gradients are equal.
    wrapped = DistributedDataParallel(layer)
    wrapped(a[item].detach(), context).square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    (layer(a.detach(), b.detach()).square().sum() / 2).backward()
    for name, p in layer.named_parameters():
        near(found[name], p.grad, name)


@case
def batches_that_a_mesh_cannot_share_evenly():
    if dist.get_world_size() != 4:
        return
    both = init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("batch", "length"))
    for z in (1, 3, 5):
        for plan in (Plan(), Plan("context", "context")):
            torch.manual_seed(9)
            layer = make_layer(plan)
            a, b = torch.randn(z, N, A).double(), torch.randn(z, M, B).double()
            wanted = layer(a, b)
            direction = torch.randn_like(wanted)
            context = distribute_tensor(b, both, [Shard(0), Shard(1)], src_data_rank=None).requires_grad_()
            over = distribute_tensor(a, both, [Shard(0), Replicate()], src_data_rank=None).requires_grad_()
            found = layer(over, context)
            near(found, wanted, f"{z} items")
            near(layer.attend(over, layer.prepare(context)), wanted, f"{z} items, prepared")
            cut = distribute_tensor(direction, both, [Shard(0), Replicate()], src_data_rank=None)
            mine = torch.autograd.grad((found.to_local() * cut.to_local()).sum(), [over, context])
            whole_a, whole_b = a.requires_grad_(), b.requires_grad_()
            grads = torch.autograd.grad((layer(whole_a, whole_b) * direction).sum(), [whole_a, whole_b])
            for got, want in zip(mine, grads, strict=True):
                near(got, want, f"gradients of {z} items")
            near(attention_map(layer, over, context), attention_map(layer, a, b), f"maps of {z} items")
            [highlight] = attention_map(layer, over, context, [Highlight()])
            near(highlight, attention_map(layer, a, b, [Highlight()])[0], f"highlight of {z} items")
            learned = torch.randn(N, A).double()
            spread = distribute_tensor(learned, both, [Replicate(), Replicate()], src_data_rank=None)
            near(layer(spread, context), layer(learned, b), f"learned queries of {z} items")


@case
def the_layer_sums_gradients_and_ddp_changes_nothing():
    for plan in (Plan(), Plan("query", "output"), Plan("context", "context")):
        torch.manual_seed(7)
        layer = make_layer(plan)
        a, b = (tensor.detach() for tensor in make_inputs(m=M))
        layer(a, b).square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
        for wrap in (lambda layer: layer, DistributedDataParallel):
            layer.zero_grad()
            wrap(layer)(a, as_shards(b)).square().sum().backward()
            for name, p in layer.named_parameters():
                near(p.grad, wanted[name], name)


@case
def fsdp_changes_nothing():
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for plan in (Plan(), Plan("query", "output"), Plan("context", "context"), "auto"):
        torch.manual_seed(7)
        layer = make_layer(plan)
        a, b = (tensor.detach() for tensor in make_inputs(m=M))
        layer(a, b).square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
        expected = layer(a, b).detach()
        layer.zero_grad()
        fully_shard(layer, mesh=mesh())
        register_fsdp_forward_method(layer, "prepare")
        register_fsdp_forward_method(layer, "attend")
        out = layer(a, as_shards(b))
        near(out, expected)
        out.square().sum().backward()
        for name, p in layer.named_parameters():
            near(p.grad.full_tensor(), wanted[name], name)
        layer.zero_grad()
        prepared = layer.prepare(as_shards(b), query_length=N, uses=2)
        out = layer.attend(a, prepared)
        near(out, expected)
        out.square().sum().backward()
        for name, p in layer.named_parameters():
            near(p.grad.full_tensor(), wanted[name], f"{name} by attend")


def sharded_by_fsdp(module, **options):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    fully_shard(module, mesh=mesh(), **options)
    register_fsdp_forward_method(module, "prepare")
    register_fsdp_forward_method(module, "attend")
    return module


@case
def layers_that_a_model_prepares_one_by_one_under_fsdp():
    from crossattention.models import BertDecoder, BertEncoder, EncoderDecoder
    from crossattention.models.bert import BertConfig
    from crossattention.training.processes import shard_model

    sizes = {"heads": 2, "layers": 2, "feed_forward_dim": 32, "begin_id": 1, "end_id": 2}
    parts = BertEncoder(BertConfig(50, dim=24, **sizes)), BertDecoder(BertConfig(40, dim=16, causal=True, context_dim=16, **sizes))
    model = EncoderDecoder(*parts).double().eval()
    source, target = torch.randint(3, 50, (3, 7)), torch.randint(3, 40, (3, 5))
    wanted = model(source, target)
    wanted.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shard_model(model, mesh())
    found = model(source, target)
    near(found, wanted.detach())
    found.square().mean().backward()
    for name, p in model.named_parameters():
        if name in grads:
            near(p.grad.full_tensor(), grads[name], name)


class Holder(torch.nn.Module):
    """A layer inside a module that is sharded as a whole, so that the layer itself knows nothing of it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def prepare(self, b):
        return self.layer.prepare(b)

    def attend(self, a, prepared):
        return self.layer.attend(a, prepared)

    def forward(self, a, b):
        return self.layer(a, b)


@case
def what_fsdp_gathers_anew_has_not_changed_and_what_is_written_has():
    a, b = (tensor.detach() for tensor in make_inputs(m=M))
    for plan in (Plan(), Plan("context", "context"), Plan("query", "output")):
        first = make_layer(plan)
        expected = torch.autograd.grad(first(a, whole := b.clone().requires_grad_()).square().sum(), whole)[0]
        for make in (
            lambda layer: sharded_by_fsdp(layer),
            lambda layer: sharded_by_fsdp(Holder(layer)),
            lambda layer: sharded_by_fsdp(Holder(layer), reshard_after_forward=True),
        ):
            for cut in (lambda b: b, lambda b: as_shards(b, torch_lengths(M))):
                model = make(deepcopy(first))
                trained = b.clone().requires_grad_()
                prepared = model.prepare(cut(trained))
                with torch.no_grad():
                    model.attend(a, prepared)
                model.attend(a, prepared).square().sum().backward(retain_graph=True)
                part = slice(None) if cut(b) is b else own(torch_lengths(M))
                near(trained.grad[:, part], expected[:, part], f"gradient of B by {plan}")
                model.attend(a, prepared).square().sum().backward()  # gathered anew, after its memory was given back
                for change in (
                    lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step(),  # noqa: B023
                    lambda: torch.optim.SGD(model.parameters(), lr=1e-3).step(),  # noqa: B023
                    lambda: model.load_state_dict({name: 2 * t for name, t in model.state_dict().items()}),  # noqa: B023
                    lambda: [p.mul_(2) for p in model.parameters()],  # noqa: B023
                ):
                    prepared = model.prepare(cut(b.clone().requires_grad_()))
                    model.attend(a, prepared).sum().backward()
                    with torch.no_grad():
                        change()
                    if plan.scores == plan.values == "context":
                        model.attend(a, prepared)
                    else:
                        refused(ValueError, "out of date", lambda: model.attend(a, prepared))  # noqa: B023
        layer = make_layer(plan)
        kept = layer.prepare(trained := b.clone())
        trained.mul_(2)
        if plan.scores == "context":
            refused(ValueError, "out of date: context", lambda: layer.attend(a, kept))  # noqa: B023


@case
def a_part_goes_through_fsdp_without_another_collective_call():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    a, b = make_inputs(m=M)
    layer = sharded_by_fsdp(make_layer())
    part = ContextShard(b.detach()[:, own(torch_lengths(M))].requires_grad_(), mesh())
    with count_traffic() as traffic:
        layer(a, part)
    assert [name for name, _ in traffic.sent] == ["all_gather", "all_reduce max", "all_reduce sum"], traffic.sent
    refused(ValueError, "shards tells of", lambda: replace(part, local=b.detach()[:, :0] if part.local.shape[1] else b.detach()))
    plain = make_layer(dtype=torch.float32)
    layer = sharded_by_fsdp(deepcopy(plain), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    a, b = a.detach().float(), b.detach().float()
    with torch.no_grad():
        found = layer(a, ContextShard(b[:, own(torch_lengths(M))], mesh()))
        assert found.dtype == torch.bfloat16
        assert (found - plain(a, b)).abs().max() < 0.1


class Reader(torch.nn.Module):
    """Two layers, the second of which reads by what the first read; B is prepared for both at once, by a method of its own."""

    def __init__(self, plan):
        super().__init__()
        self.first = make_layer(plan, out_dim=A)
        self.second = make_layer(plan)

    def prepare(self, b):
        return self.first.prepare(b, query_length=N, uses=2), self.second.prepare(b, query_length=N, uses=2)

    def forward(self, a, b):
        first, second = self.prepare(b)
        return self.second.attend(self.first.attend(a, first), second)

    def attend(self, a, prepared):
        return self.second.attend(self.first.attend(a, prepared[0]), prepared[1])


@case
def nested_fsdp_changes_nothing():
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for plan in (Plan(), Plan("context", "head"), "auto"):
        torch.manual_seed(7)
        model = Reader(plan)
        a, b = (tensor.detach() for tensor in make_inputs(m=M))
        expected = model(a, b)
        expected.square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh())
            register_fsdp_forward_method(module, "prepare")
            register_fsdp_forward_method(module, "attend")
        for how in ("forward", "attend"):
            model.zero_grad()
            out = model(a, as_shards(b)) if how == "forward" else model.attend(a, model.prepare(as_shards(b)))
            near(out, expected.detach())
            out.square().sum().backward()
            for name, p in model.named_parameters():
                near(p.grad.full_tensor(), wanted[name], f"{name} by {how}")
        prepared = model.prepare(as_shards(b))
        torch.optim.AdamW(model.parameters(), lr=1e-3).step()
        refused(ValueError, "out of date", lambda: model.attend(a, prepared))  # noqa: B023


# --------------------------------------------------------------------------------------------------- traffic and plans


@case
def what_travels_does_not_grow_with_the_context():
    world = dist.get_world_size()
    for plan, width, c in ((Plan(), 8, 8), (Plan("context", "context"), B, B), (Plan("head", "output"), O, 8)):
        seen = []
        for m in (64, 6400):
            layer = make_layer(plan, dtype=torch.float32)
            a, b = make_inputs(m=m, dtype=torch.float32)
            with count_traffic() as forward:
                out = layer(a, as_shards(b))
            with count_traffic() as backward:
                out.sum().backward()
            seen.append((forward.nbytes, backward.nbytes))
            rows = Z * H * N
            assert forward.nbytes == 4 * rows * (width + 2) + 8 * len(sharded.FACTS), (forward.sent, rows, width)
            on_b = 0
            if plan.scores == "head":
                on_b += layer.k_proj.weight.numel() + layer.k_proj.bias.numel()
            if plan.values != "context":
                on_b += layer.v_proj.weight.numel() + layer.v_proj.bias.numel()
            if plan.values == "output":
                on_b += layer.out_proj.weight.numel() + layer.out_proj.bias.numel()
            assert backward.nbytes == 4 * (rows * c + on_b), (backward.sent, rows, c, on_b)
            assert forward.ring_bytes(world) == 4 * rows * (width + 2) * 2 * (world - 1) / world + 56 * (world - 1)
        assert seen[0] == seen[1]


@case
def one_plan_in_all_processes():
    layer = make_layer("auto")
    held = sharded.choose_plan
    if dist.get_rank():  # as on another processor, or with other speeds in the configuration

        def other(sizes, forbidden):
            choice = held(sizes, forbidden)
            return replace(choice, candidates=tuple(c for c in choice.candidates if c.plan.scores == "query"))

        sharded.choose_plan = other
    try:
        for n, m in ((1, 64), (5, 70), (200, 7)):
            a, b = make_inputs(n=n, m=m)
            equal_to_one_process(layer, a, b)
    finally:
        sharded.choose_plan = held


# --------------------------------------------------------------------------------------------------------------- maps


@case
def maps_and_their_summaries():
    world = dist.get_world_size()
    summaries = [TopK(3), TopK(20, heads="mean"), Highlight(), Highlight(heads="mean"), Entropy(), Argmax(), Argmax(heads="mean")]
    summaries += [Rows([0, -1]), Entropy(heads="mean")]
    for plan in (Plan(), Plan("context", "context"), Plan("query", "head"), "auto"):
        for kind in ("none", "empty row", "pairs", "additive"):
            for lengths in (None, {1: [13], 2: [2, 11], 4: [1, 0, 10, 2]}[world]):
                for shape in ((Z, N, A), (Z, 3, N, A), (N, A)):
                    torch.manual_seed(8)
                    layer = make_layer(plan, positions=ALiBi(H) if plan == "auto" else None)
                    a, b = torch.randn(shape).double(), torch.randn(Z, M, B).double()
                    masks = make_masks(kind, m=M)
                    of_one = {"attn_mask": masks["attn_mask"].unsqueeze(1)} if len(shape) == 4 and kind == "pairs" else masks
                    own_masks = of_one if lengths is None else {name: mask[..., own(lengths)] for name, mask in of_one.items()}
                    cut = own(torch_lengths(M) if lengths is None else lengths)
                    context = as_shards(b, lengths)
                    wanted = attention_map(layer, a, b, **of_one).detach()
                    found = attention_map(layer, a, context, **own_masks)
                    near(found.to_local() if lengths is None else found, wanted[..., cut], "weights")
                    expected = attention_map(layer, a, b, summaries, **of_one)
                    given = dict(own_masks)
                    prepared = layer.prepare(context, context_mask=given.pop("context_mask", None))
                    for got in (
                        attention_map(layer, a, context, summaries, **own_masks),
                        attention_map(layer, a, prepared, summaries, **given),
                    ):
                        for summary, one, want in zip(summaries, got, expected, strict=True):
                            if isinstance(summary, TopK):
                                near(one.weights, want.weights, "TopK")
                                same = one.positions == want.positions
                                assert (same | (want.weights < 1e-9)).all(), "positions of TopK"
                            elif isinstance(summary, Argmax):
                                assert torch.equal(one, want), "Argmax"
                            elif isinstance(summary, Entropy):
                                near(one, want, "Entropy")
                            else:
                                near(one.to_local() if lengths is None else one, want[..., cut], type(summary).__name__)
                                if lengths is None:
                                    near(one.full_tensor(), want)
    layer = make_layer()
    a, b = make_inputs(m=M)
    refused(ValueError, "its path leads through every position", lambda: attention_map(layer, a, as_shards(b), [Alignment()]))

    class Own(Entropy):
        pass

    refused(ValueError, "Own cannot be taken of a sharded context", lambda: attention_map(layer, a, as_shards(b), [Own()]))
    refused(
        ValueError,
        "belongs to the prepared context",
        lambda: attention_map(layer, a, layer.prepare(as_shards(b)), context_mask=b > 0),
    )


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {words}")


@case
def what_is_refused():
    world, rank = dist.get_world_size(), dist.get_rank()
    layer = make_layer()
    a, b = make_inputs(m=M)
    over = as_shards(b)
    refused(ValueError, "sharded on its length", lambda: layer(a, distribute_tensor(b, mesh(), [Shard(0)])))
    refused(ValueError, "sharded on its length", lambda: layer(a, distribute_tensor(b, mesh(), [Replicate()])))
    refused(ValueError, "context_mask must be of the whole context", lambda: layer(a, over, context_mask=torch.ones(Z, 3).bool()))
    refused(ValueError, "requires a gradient", lambda: layer(a, over, attn_mask=torch.zeros(N, M).double().requires_grad_()))
    refused(ValueError, "queries have width", lambda: layer(a[..., :2], over))
    refused(ValueError, "batch", lambda: layer(a[:1], over))
    refused(TypeError, "dense tensor", lambda: ContextShard([b], mesh()))
    refused(TypeError, "passed to the layer as it is", lambda: ContextShard(over, mesh()))
    refused(TypeError, "mesh must be", lambda: ContextShard(b, "gloo"))
    refused(TypeError, "sharded context cannot be extended", lambda: layer.extend(layer.prepare(over), b))
    dropping = CrossAttention(A, B, heads=2, dropout=0.1, dtype=torch.float64)
    refused(ValueError, "attention dropout", lambda: dropping(a, over))
    near(dropping.eval()(a, over), dropping(a, b))
    refused(ValueError, "another layer", lambda: layer.attend(a, make_layer().prepare(over)))
    if world > 1:
        refused(ValueError, "must be whole", lambda: layer(distribute_tensor(a.detach(), mesh(), [Shard(1)]), over))
        part = b[:, :3] if rank else b[:, :5]
        refused(ValueError, "different lengths", lambda: layer(a, DTensor.from_local(part, mesh(), [Shard(1)], run_check=False)))
        refused(ValueError, "same batch, width and dtype", lambda: ContextShard(b if rank else b[:1], mesh()))
        plan = Plan("context", "head") if rank else Plan()
        make_layer()(a, as_shards(b[:, : M - 1]))  # what one process remembers of it must not keep it from the question
        refused(ValueError, "different plans", lambda: make_layer(plan)(a, as_shards(b[:, : M - 1])))
        refused(ValueError, "different plans, auto: ", lambda: make_layer(Plan() if rank else "auto")(a, over))
        refused(ValueError, "must ask the same of it", lambda: layer(a[:, : rank + 1], over))


def a_lost_peer():
    """Not a case of its own: the last process goes away in the middle."""
    layer, (a, b) = make_layer(), make_inputs(m=M)
    layer(a, as_shards(b))
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    try:
        layer(a, as_shards(b))
    except ConnectionError as error:
        print(json.dumps({"passed": str(error)}), flush=True)
        os._exit(0)
    raise AssertionError("nothing was said")


def main() -> None:
    join()
    if sys.argv[1:] == ["a_lost_peer"]:
        return a_lost_peer()
    chosen = sys.argv[1:] or list(CASES)
    for name in chosen:
        torch.manual_seed(0)
        try:
            CASES[name]()
        except Exception:
            traceback.print_exc()
            print(json.dumps({"failed": name}), flush=True)
            if "KEEP" in os.environ:
                continue
            sys.exit(1)
        print(json.dumps({"passed": name}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

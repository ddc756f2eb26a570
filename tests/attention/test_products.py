"""Products by the quicker library: the same numbers and gradients as torch's, and who is left to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossattention.attention import products
from crossattention.plan import Speeds, speeds_of, use_speeds


@pytest.fixture(params=[True, False], ids=["quick", "torch"])
def quick(request):
    """Every product by the quicker library, however small; or none."""
    from dataclasses import replace

    speeds: Speeds = speeds_of("cpu", "float32")
    use_speeds({("cpu", "float32"): replace(speeds, quick_from=0.0 if request.param else float("inf"))})
    yield request.param
    use_speeds(None)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_equals_torch_s_with_gradients(quick, shape, bias):
    x, module = torch.randn(shape, requires_grad=True), nn.Linear(5, 7, bias=bias)
    if x.dim() == 1:
        x = x.detach().unsqueeze(0).requires_grad_()
    found, wanted = products.project(module, x), module(x)
    torch.testing.assert_close(found, wanted)
    inputs, grad = (x, *module.parameters()), torch.randn_like(wanted)
    for got, want in zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "shifted"])
def test_operands_of_any_layout(quick, layout):
    x = {
        "transposed": torch.randn(6, 9).t(),
        "strided": torch.randn(9, 12)[:, ::2],
        "expanded": torch.randn(1, 6).expand(9, 6),
        "shifted": torch.randn(9, 8)[:, 1:7],
    }[layout]
    weight = torch.randn(6, 4).t()
    torch.testing.assert_close(products.linear(x, weight), x @ weight.t())
    torch.testing.assert_close(products.multiply(x, weight), x @ weight.t())


def test_the_sum_of_a_product_has_a_gradient_that_is_one_number_expanded(quick):
    module, x = nn.Linear(5, 7), torch.randn(4, 5)
    products.project(module, x).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(7, 5))


def test_first_and_second_derivatives_of_the_operator():
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 7), (6, 7), (6,)))
    operator = torch.ops.crossattention.linear
    assert torch.autograd.gradcheck(operator, (x, weight, bias)) and torch.autograd.gradgradcheck(operator, (x, weight, bias))
    torch.library.opcheck(operator.default, (x.float().detach(), weight.float().detach(), bias.float().detach()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_transforms_autocast_and_other_dtypes_are_left_to_torch(quick):
    x, weight = torch.randn(3, 4, 5), torch.randn(6, 5)
    torch.testing.assert_close(torch.func.vmap(lambda one: products.linear(one, weight))(x), F.linear(x, weight))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert products.linear(x.double(), weight.double()).dtype == torch.float64
    _, slope = torch.func.jvp(lambda one: products.linear(one, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, F.linear(torch.ones_like(x), weight))


def test_a_module_with_hooks_or_of_another_class_is_called_as_it_is(quick):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, doubled, x = nn.Linear(5, 6), Doubled(5, 6), torch.randn(3, 5)
    torch.testing.assert_close(products.project(doubled, x), 2 * F.linear(x, doubled.weight, doubled.bias))
    seen = []
    module.register_forward_hook(lambda *_: seen.append("own"))
    products.project(module, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("everyone's"))
    products.project(nn.Linear(5, 6), x)
    handle.remove()
    assert seen == ["own", "everyone's"]


@pytest.mark.parametrize("count", [1, 3])
def test_batched_products(quick, count):
    x, weights = torch.randn(count, 4, 5, requires_grad=True), torch.randn(count, 6, 5, requires_grad=True)
    found, wanted = products.batched(x, weights), torch.bmm(x, weights.transpose(1, 2))
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    for got, want in zip(*(torch.autograd.grad(out, (x, weights), grad) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(got, want)

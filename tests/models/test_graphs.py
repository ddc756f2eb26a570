"""CrossViT and Perceiver IO as graphs: exported for any batch, compiled in one piece, with what they give eagerly."""

import pytest
import torch
from torch.export import Dim

from crossattention.layers.resizing import resize_bicubic
from small_models import MODELS

SEEN = [name for name in MODELS if name.startswith(("crossvit", "perceiver"))]


def example(model, batch):
    """The inputs of `forward`, of another batch, as torch.export wants them."""
    given = model.graphs()["forward"].inputs
    inputs = {name: tensor[torch.arange(batch) % 2] for name, tensor in given.items()}
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor))
    return {"inputs": inputs} if "audio" in inputs else inputs


def same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_it_exports_with_a_dynamic_batch(name):
    model, batch = MODELS[name]().eval(), Dim("batch")
    given = example(model, 5)
    shapes = {name: {key: {0: batch} for key in one} if isinstance(one, dict) else {0: batch} for name, one in given.items()}
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=given, dynamic_shapes=shapes).module()
        for size in (5, 2, 7, 1):
            given = example(model, size)
            same(program(**given), model(**given))


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_it_compiles_in_one_graph_for_any_batch(name, trains):
    torch._dynamo.reset()
    model, graphs = MODELS[name]().eval(), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    with torch.set_grad_enabled(trains):
        for size in (5, 7, 11):
            given = example(model, size)
            same(run(**given), model(**given))
    assert len(graphs) <= (2 if name == "perceiver, video" else 1)  # of video, the first batch's graph is made once more


def test_a_graph_s_tables_of_resizing_are_not_kept():
    """What is made while a graph is traced is of that trace; kept, it would make every later call of that size fail."""

    class Resizes(torch.nn.Module):
        def forward(self, images):
            return resize_bicubic(images, (11, 9))

    images = torch.randn(2, 3, 14, 10)
    program = torch.export.export(Resizes(), (images,), dynamic_shapes={"images": {0: Dim("batch")}}).module()
    after = resize_bicubic(images, (11, 9))
    assert type(after) is torch.Tensor
    same(after, torch.nn.functional.interpolate(images, size=(11, 9), mode="bicubic", align_corners=False))
    other = torch.randn(5, 3, 14, 10)
    same(program(other), resize_bicubic(other, (11, 9)))

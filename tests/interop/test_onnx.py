"""ONNX files give what the modules give: every plan, mask, part and architecture, at lengths that the tracing never saw."""

import sys

import pytest
import torch
from torch import nn

from crossattention import CrossAttention, MemoryAttention, Plan, SelfAttention
from crossattention.interop import export_onnx, onnx
from crossattention.layers import ALiBi, AttentionPool, QueryKeyLayerNorm, QueryKeyRMSNorm, RelativeLogits, Rotary, T5Bias
from crossattention.models import BertConfig, BertDecoder, greedy
from crossattention.models.graphs import graphs_of
from crossattention.plan import CANDIDATES
from small_models import MODELS

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

PLAN_IDS = [str(plan) for plan in CANDIDATES]


def layer_of(plan="auto", **changes):
    layer = CrossAttention(16, 24, **{"heads": 4, "kv_heads": 2, "value_head_dim": 6, "plan": plan, **changes}).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer


def inputs(z=2, n=3, m=5, **masks):
    return {"a": torch.randn(z, n, 16), "b": torch.randn(z, m, 24), **masks}


def real(z=2, m=5):
    mask = torch.rand(z, m) > 0.4
    mask[0], mask[1, 0] = False, True
    return mask


def run(path, given):
    """The first output of a file."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])


def all_of(path, given):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(
        zip(
            (output.name for output in session.get_outputs()),
            map(torch.from_numpy, session.run(None, {name: tensor.numpy() for name, tensor in given.items()})),
            strict=True,
        )
    )


# ------------------------------------------------------------------------------------------------------------ the layers


@pytest.mark.slow
@pytest.mark.parametrize("plan", CANDIDATES, ids=PLAN_IDS)
def test_every_plan_gives_the_same_at_any_length_and_zero_attention_in_empty_rows(plan, tmp_path):
    layer = layer_of(plan)
    done = export_onnx(layer, tmp_path / "layer.onnx", inputs(context_mask=real()))
    assert done.inputs == {"a": ("batch", "queries", 16), "b": ("batch", "context", 24), "context_mask": ("batch", "context")}
    assert done.outputs == {"output": ("batch", "queries", 16)}
    assert done.opset == 20 and len(done.checked) == 5 and done.difference < 2e-6
    for z, n, m in ((1, 1, 1), (3, 7, 40), (2, 9, 2)):
        given = inputs(z, n, m, context_mask=torch.rand(z, m) > 0.4)
        given["context_mask"][0] = False
        found = run(tmp_path / "layer.onnx", given)
        torch.testing.assert_close(found, layer(**given), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(found[0], layer.out_proj.bias.expand(n, -1), atol=0, rtol=0)


MASKS = {
    "pairs": lambda: torch.rand(2, 4, 3, 5) > 0.4,
    "added": lambda: torch.where(torch.rand(2, 4, 3, 5) > 0.4, torch.randn(2, 4, 3, 5), -torch.inf),
    "for all items and heads": lambda: torch.rand(3, 5) > 0.4,
    "of heads, broadcast over queries": lambda: torch.randn(1, 4, 1, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("spaces", [("head", "head"), ("context", "context"), ("query", "output")], ids="+".join)
def test_masks_of_pairs(kind, spaces, tmp_path):
    mask = MASKS[kind]()
    if mask.shape[-2] > 1:
        mask[..., 0, :] = False if mask.dtype == torch.bool else -torch.inf
    given = inputs(attn_mask=mask)
    layer = layer_of(Plan(*spaces))
    done = export_onnx(layer, tmp_path / "layer.onnx", given)
    assert done.inputs["attn_mask"][-1] == "context" and done.difference < 2e-6
    torch.testing.assert_close(run(tmp_path / "layer.onnx", given), layer(**given), atol=2e-6, rtol=2e-6)


PARTS = {
    "rotary": {"positions": Rotary()},
    "alibi": {"positions": ALiBi(4)},
    "t5": {"positions": T5Bias(4)},
    "relative": {"positions": RelativeLogits(16, 4, 4)},
    "relative, clamped": {"positions": RelativeLogits(16, 4, 4, max_distance=3)},
    "rms norm": {"qk_norm": QueryKeyRMSNorm(4)},
    "layer norm": {"qk_norm": QueryKeyLayerNorm(4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_parts(part, tmp_path):
    layer = layer_of(**PARTS[part])
    given = inputs(context_mask=real())
    if "positions" in PARTS[part]:
        given |= {"query_positions": torch.arange(3) + 2, "context_positions": torch.randint(0, 9, (2, 5))}
    done = export_onnx(layer, tmp_path / "layer.onnx", given)
    assert done.difference < 2e-6 and done.inputs.get("query_positions", ("queries",)) == ("queries",)
    torch.testing.assert_close(run(tmp_path / "layer.onnx", given), layer(**given), atol=2e-6, rtol=2e-6)


@pytest.mark.slow
def test_learned_queries_beams_double_and_half_precision(tmp_path):
    layer, given = layer_of(), inputs(context_mask=real())
    done = export_onnx(layer, tmp_path / "learned.onnx", given | {"a": torch.randn(3, 16)})
    assert done.inputs["a"] == ("queries", 16) and done.difference < 2e-6
    done = export_onnx(layer, tmp_path / "beams.onnx", given | {"a": torch.randn(2, 4, 3, 16)})
    assert done.inputs["a"] == ("batch", "repeats", "queries", 16) and done.difference < 2e-6
    double = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    assert export_onnx(layer.double(), tmp_path / "double.onnx", double).difference < 1e-13
    half = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
    assert export_onnx(layer.half(), tmp_path / "half.onnx", half).difference < 5e-3
    brain = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    done = export_onnx(layer.bfloat16(), tmp_path / "brain.onnx", brain)
    assert done.difference is None and done.unchecked_because == "onnxruntime's CPU kernels do not take torch.bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal, tmp_path):
    layer = SelfAttention(16, heads=4, kv_heads=2, value_head_dim=7, causal=causal).eval()
    done = export_onnx(layer, tmp_path / "layer.onnx", {"x": torch.randn(2, 5, 16), "mask": real()})
    assert done.inputs == {"x": ("batch", "length", 16), "mask": ("batch", "length")} and done.difference < 2e-6


@pytest.mark.slow
def test_memory_attention_and_a_users_own_module_with_named_axes(tmp_path):
    memory = MemoryAttention(16, 32, heads=2).eval()
    assert export_onnx(memory, tmp_path / "memory.onnx", {"x": torch.randn(1, 1, 16)}).inputs["x"] == ("batch", "length", 16)
    pool = AttentionPool(16, 24, num_queries=2, heads=4).eval()
    done = export_onnx(pool, tmp_path / "pool.onnx", {"b": torch.randn(2, 5, 24)}, axes={"b": ("z", "m", None)})
    assert done.inputs == {"b": ("z", "m", 24)} and done.difference < 2e-6


# ------------------------------------------------------------------------------------------------------------ the models


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_graph_of_every_architecture(name, tmp_path):
    model = MODELS[name]().eval()
    for graph in model.graphs():
        done = export_onnx(model, tmp_path / f"{graph}.onnx", graph=graph)
        assert done.opset == 20 and done.difference < 5e-6 and len(done.checked) >= 4, done
        assert all("batch" in shape for shape in done.inputs.values()), done


@pytest.mark.slow
def test_prepare_and_step_write_what_generation_writes(tmp_path):
    model = MODELS["encoder-decoder"]().eval()
    for graph in ("prepare", "step"):
        export_onnx(model, tmp_path / f"{graph}.onnx", graph=graph)
    source, real_source = torch.randint(3, 50, (3, 9)), torch.rand(3, 9) > 0.3
    real_source[2] = False
    wanted = greedy(model, source, real_source, max_length=6)
    prepared = all_of(tmp_path / "prepare.onnx", {"source": source, "source_mask": real_source})
    layers = len(model.decoder.layers)
    past = {f"past_{kind}.{i}": torch.zeros(3, 1, 2, 0, 8) for kind in ("keys", "values") for i in range(layers)}
    ids, written = torch.full((3, 1), model.config.begin_id), []
    for _ in range(6):
        made = all_of(tmp_path / "step.onnx", {"ids": ids, **prepared, **past})
        ids = made["logits"].argmax(-1)
        written.append(ids)
        past = {f"past_{name}": tensor for name, tensor in made.items() if name != "logits"}
    for row, hypothesis in zip(torch.cat(written, 1).tolist(), wanted, strict=True):
        assert row[: len(hypothesis.ids)] == list(hypothesis.ids)


@pytest.mark.slow
def test_a_graph_leaves_the_model_as_it_was(tmp_path):
    model = MODELS["crossvit"]().eval()  # resizes: what it keeps of that must not be the graph's
    images = torch.randn(3, 3, 48, 48)
    before = model(images)
    export_onnx(model, tmp_path / "model.onnx")
    assert torch.equal(model(images), before)


# ------------------------------------------------------------------------------------------------------- what is refused


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


class Decomposes(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x.T @ x).abs() + x


class Fixes(nn.Module):
    def forward(self, x):
        return x + sum(1 for _ in range(x.shape[0]))


@pytest.mark.slow
def test_what_cannot_be_exported_is_named_and_leaves_no_file(tmp_path):
    given = {"x": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"gives something else than the module.*random"):
        export_onnx(Draws().eval(), tmp_path / "m.onnx", given, axes={"x": ("z", None)})
    with pytest.raises(ValueError, match=r"Decomposes cannot be exported to ONNX: \w+: .*"):
        export_onnx(Decomposes().eval(), tmp_path / "m.onnx", given, axes={"x": ("z", None)})
    with pytest.raises(
        ValueError, match=r"Fixes cannot be exported to ONNX: ValueError: .*conflicts between user-specified ranges"
    ):
        export_onnx(Fixes().eval(), tmp_path / "m.onnx", given, axes={"x": ("z", None)})
    with pytest.raises(ValueError, match=r"returns 1 tensors, got 2 names of outputs"):
        export_onnx(Draws().eval(), tmp_path / "m.onnx", given, axes={"x": ("z", None)}, outputs=("y", "z"))
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_came_out_as_a_number_is_refused():
    """torch refuses those that it knows of; of a file that it wrote all the same, the axes are looked at."""
    graph = onnx.Graph(Draws(), {"x": torch.ones(2, 3)}, {"x": ("z", None)}, ("y",))
    onnx._check_dynamic(graph, {"x": ("z", 3)})
    with pytest.raises(ValueError, match=r'the length "z" of x came out fixed at 2: something in Draws asks for it as a number'):
        onnx._check_dynamic(graph, {"x": (2, 3)})
    with pytest.raises(ValueError, match="x has no part in what the module computes"):
        onnx._check_dynamic(graph, {})


def test_misuse_is_told_before_anything_is_traced(tmp_path):
    layer, path = layer_of(), tmp_path / "layer.onnx"
    with pytest.raises(ValueError, match=r"CrossAttention takes a, b, .*, got mask"):
        export_onnx(layer, path, inputs(mask=real()))
    with pytest.raises(ValueError, match=r"pass example inputs, as \{'a': tensor\}, got none"):
        export_onnx(layer, path)
    with pytest.raises(ValueError, match=r"name the lengths that may vary, as axes=\{'x': \(None, None\)\}"):
        export_onnx(Draws().eval(), path, {"x": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"axes of x must name 2 dimensions, of \(2, 3\), got \('z',\)"):
        export_onnx(Draws().eval(), path, {"x": torch.ones(2, 3)}, axes={"x": ("z",)})
    with pytest.raises(ValueError, match=r"axes name y, for which there is no example"):
        export_onnx(Draws().eval(), path, {"x": torch.ones(2, 3)}, axes={"x": ("z", None), "y": ("z",)})
    with pytest.raises(ValueError, match=r'the axis "batch" is 2 in one example and 3 in b'):
        export_onnx(layer, path, {"a": torch.randn(2, 3, 16), "b": torch.randn(3, 5, 24)})
    with pytest.raises(ValueError, match=r"the example of b is empty"):
        export_onnx(layer, path, inputs(m=0))
    with pytest.raises(ValueError, match=r"is in training.*call eval\(\)"):
        export_onnx(layer_of().train(), path, inputs())
    with pytest.raises(ValueError, match=r'has the graphs forward, encode, prepare, step, got graph="steps"'):
        export_onnx(MODELS["transformer"]().eval(), path, graph="steps")
    with pytest.raises(ValueError, match=r'graph="step" has example inputs of its own'):
        export_onnx(MODELS["transformer"]().eval(), path, inputs(), graph="step")
    with pytest.raises(FileNotFoundError, match=r"there is no folder"):
        export_onnx(layer, tmp_path / "absent" / "layer.onnx", inputs())
    path.write_text("kept")
    with pytest.raises(FileExistsError, match=r"exists already"):
        export_onnx(layer, path, inputs())
    assert path.read_text() == "kept"


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx; install it with: pip install 'crossattention\[onnx\]'"):
        export_onnx(layer_of(), tmp_path / "layer.onnx", inputs())
    assert "onnxruntime" not in sys.modules or runtime is not None


def test_every_model_has_a_graph_whose_examples_it_takes():
    for name in ("transformer", "bert decoder", "perceiver, language", "perceiver, fourier"):
        model = MODELS[name]().eval()
        for graph in graphs_of(model).values():
            with torch.no_grad():
                made = graph.module(**graph.inputs)
            assert len([made] if isinstance(made, torch.Tensor) else made) == len(graph.outputs)


def test_models_without_graphs_are_refused():
    with pytest.raises(ValueError, match=r"no graphs are known of a Linear"):
        graphs_of(nn.Linear(2, 2))
    pinned = BertDecoder(
        BertConfig(9, dim=8, layers=1, heads=2, feed_forward_dim=8, causal=True, context_dim=8, begin_id=1, end_id=2)
    )
    pinned.layers[0].cross_attention.plan = Plan("context", "context")
    assert list(pinned.graphs()) == ["forward"]  # nothing that "step" could read

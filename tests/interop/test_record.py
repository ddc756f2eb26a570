"""What is recorded equals the layer's own map, outputs do not change, and nothing is left behind."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossattention import CrossAttention, MemoryAttention, SelfAttention, attention_map, record_attention
from crossattention.layers import Rotary
from crossattention.maps import Argmax, Entropy, Highlight, Rows, TopK
from crossattention.maps.blocks import BLOCK_SCORES
from crossattention.models.generate import beam_search, greedy
from crossattention.models.transformer import Transformer, TransformerConfig
from oracle import MASKS, B, H, M, N, Z, make_inputs, make_layer, make_masks
from tolerances import assert_close

WHOLE = Rows(range(N))


def leftovers(model: nn.Module) -> list[str]:
    """What a recording could have left in a model."""
    names = ("forward", "attend", "_attend", "generate", "generation_watchers")
    return [f"{path}.{name}" for path, module in model.named_modules() for name in names if name in module.__dict__]


# ------------------------------------------------------------------------------------------------------- our layers


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("plan", ["textbook", "auto"])
def test_a_layer_s_calls_are_its_maps_and_its_output_does_not_change(plan, mask):
    layer, (a, b), masks = make_layer(plan, kv_heads=2), make_inputs(), make_masks(mask)
    plain = layer(a, b, **masks)
    context_mask, pairs = masks.get("context_mask"), masks.get("attn_mask")
    with record_attention(layer, [WHOLE, TopK(3), Highlight()]) as seen:
        out = layer(a, b, **masks)
        prepared = layer.prepare(b, context_mask=context_mask)
        layer.attend(a, prepared, attn_mask=pairs)
    assert torch.equal(plain, out)
    recorded = seen.layers["CrossAttention"]
    expected = attention_map(layer, a, b, **masks)
    assert (recorded.kind, recorded.heads, recorded.shapes) == ("cross", H, [(Z, H, N, M)] * 2)
    for call in recorded.calls:
        rows, top, mass = call.results
        assert_close(rows, expected.detach())
        assert_close(top.weights, expected.detach().topk(3).values)
        assert_close(mass, expected.detach().sum(2))
    assert leftovers(layer) == []


def test_beams_learned_queries_and_positions_are_recorded_as_the_layer_takes_them():
    layer = make_layer(positions=Rotary())
    _, b = make_inputs()
    learned, beams = (
        torch.randn(N, layer.query_dim, dtype=torch.float64),
        torch.randn(Z, 3, N, layer.query_dim, dtype=torch.float64),
    )
    at = torch.tensor([4, 2, 0, 1, 3])
    with record_attention(layer, [WHOLE]) as seen:
        layer(learned, b)
        layer.attend(beams, layer.prepare(b), query_positions=at)
    one, many = seen.layers["CrossAttention"].calls
    assert_close(one[0], attention_map(layer, learned, b).detach())
    assert many.shape == (Z, 3, H, N, M)
    assert_close(many[0], attention_map(layer, beams, layer.prepare(b), query_positions=at).detach())


def test_weights_are_recorded_before_dropout_and_training_draws_the_same_numbers():
    layer = make_layer(dropout=0.5).train()
    a, b = make_inputs()
    torch.manual_seed(1)
    plain = layer(a, b)
    torch.manual_seed(1)
    with record_attention(layer, [WHOLE]) as seen:
        out = layer(a, b)
    assert torch.equal(plain, out)
    assert_close(seen.layers["CrossAttention"].merged[0], attention_map(layer, a, b).detach())
    out.sum().backward()


def test_self_attention_and_memories():
    model = nn.ModuleDict(
        {"own": SelfAttention(12, heads=3, causal=True), "memory": MemoryAttention(12, 6, heads=3, key_bias=True)}
    )
    x = torch.randn(2, 5, 12)
    with record_attention(model, [WHOLE], self_attention=True) as seen:
        model["own"](x)
        model["memory"](x)
    assert {name: layer.kind for name, layer in seen.layers.items()} == {"own": "self", "memory": "memory"}
    own = model["own"]
    q, k = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (own.q_proj, own.k_proj))
    scores = (q @ k.transpose(-1, -2) * own.scale).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    assert_close(seen.layers["own"].merged[0], scores.softmax(-1).detach())
    assert_close(seen.layers["memory"].merged[0], model["memory"].coefficients(x).transpose(1, 2).detach())
    with record_attention(model, [WHOLE]) as seen:
        model["own"](x)
        model["memory"](x)
    assert list(seen.layers) == ["memory"]


# ---------------------------------------------------------------------------------------------------- our generation


def small_transformer() -> Transformer:
    config = TransformerConfig(20, 6, dim=16, heads=2, feed_forward_dim=32, encoder_layers=1, decoder_layers=2, tied="target")
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.mark.parametrize("beams", [0, 3])
def test_the_rows_of_a_generated_sequence_are_those_of_decoding_it_at_once(beams):
    model = small_transformer()
    source = torch.randint(3, 20, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [5], [3], [7]])
    generate = (
        (lambda: [[one] for one in greedy(model, source, mask, max_length=9)])
        if beams == 0
        else (lambda: beam_search(model, source, mask, beams=beams, max_length=9, num_hypotheses=2))
    )
    plain = generate()
    with record_attention(model, [Highlight(), TopK(2)]) as seen:
        found = generate()
    assert found == plain
    length = seen.layers["decoder.layers.1.cross_attention"].merged.shape[-2]
    with record_attention(model, [Rows(range(length)), Highlight()]) as seen:
        generate()
    lengths = {len(one.rows) for some in found for one in some}
    assert length == max(lengths) and len(lengths) > 1  # some end before others
    for name, layer in seen.layers.items():
        rows, mass = layer.merged.results
        assert rows.shape[:2] == (4, max(map(len, found))) and rows.shape[-1] == 7
        assert_close(mass, rows.sum(-2))
        for z, some in enumerate(found):
            for r, one in enumerate(some):
                fed = torch.tensor([[model.config.begin_id, *one.ids]])[:, : len(one.rows)]
                states = model.encode(source[z : z + 1], mask[z : z + 1])
                with record_attention(model, [Rows(range(len(one.rows)))]) as again:
                    model.decode(fed, model.prepare(states, mask[z : z + 1]))
                assert_close(rows[z, r, :, : len(one.rows)], again.layers[name].merged[0][0])
                assert not rows[z, r, :, len(one.rows) :].any()
    assert leftovers(model) == []
    with record_attention(model, [Argmax()]) as seen:
        assert not copy.deepcopy(model).generation_watchers and not pickle.loads(pickle.dumps(model)).generation_watchers
        greedy(copy.deepcopy(model), source, mask, max_length=2)
        greedy(model, source, mask, max_length=2)
    assert seen.layers["decoder.layers.0.cross_attention"].merged.shape[-2] <= 2


def test_a_generation_that_breaks_off_leaves_its_calls():
    model = small_transformer()
    with record_attention(model, [Argmax()]) as seen:
        step, count = model.step, iter(range(2))

        def breaking(*args):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return step(*args)

        model.step = breaking
        with pytest.raises(KeyboardInterrupt):
            greedy(model, torch.randint(3, 20, (2, 7)), max_length=9)
    layer = seen.layers["decoder.layers.0.cross_attention"]
    assert (len(layer.calls), layer.sequences) == (2, [])


# ---------------------------------------------------------------------------------------------------------- torch.nn


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 9, "vdim": 9}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_shows_the_weights_that_it_returns(batch_first, options):
    mha = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).eval()
    a, b = torch.randn(2, 5, 12), torch.randn(2, 7, options.get("kdim", 12))
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    for pairs in (None, torch.rand(5, 7) > 0.8, torch.randn(6, 5, 7)):
        shown = padding if pairs is None or pairs.dtype == torch.bool else torch.zeros(2, 7).masked_fill(padding, -torch.inf)
        call = lambda **more: mha(turn(a), turn(b), turn(b), key_padding_mask=shown, attn_mask=pairs, **more)  # noqa: B023, E731
        plain = call(need_weights=False)[0]
        with record_attention(mha, [WHOLE]) as seen:
            out = call(need_weights=False)[0]
        assert torch.equal(plain, out)
        assert_close(seen.layers["MultiheadAttention"].merged[0], call(average_attn_weights=False)[1].detach())


def test_torch_s_transformer_shows_its_decoder_and_keeps_the_encoder_s_fast_path():
    model = nn.Transformer(16, 4, 2, 2, 32, batch_first=True).eval()
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = model(source, target)
        with record_attention(model) as seen:
            out = model(source, target)
    assert torch.equal(plain, out)
    assert list(seen.layers) == ["decoder.layers.0.multihead_attn", "decoder.layers.1.multihead_attn"]
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        record_attention(model, self_attention=True)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [one for one in (out if isinstance(out, tuple | list) else [out]) if isinstance(one, torch.Tensor)]
        is_view = any(one is arg or one._is_view() for one in made for arg in args)
        self.numbers = max(self.numbers, *(0 if is_view else one.numel() for one in made), 0)
        return out


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: CrossAttention(8, heads=2)])
@torch.no_grad()
def test_the_matrix_is_never_made_whole(make):
    n, m = 1500, 3000  # 9 million weights
    model, a, b = make().eval(), torch.randn(1, n, 8), torch.randn(1, m, 8)
    is_torch_s = isinstance(model, nn.MultiheadAttention)
    run = (lambda: model(a, b, b, need_weights=False)) if is_torch_s else (lambda: model(a, b))
    with record_attention(model, [TopK(2), Highlight(), Entropy()]) as seen, Largest() as largest:
        run()
    [layer] = seen.layers.values()
    assert layer.merged.shape == (1, 2, n, m)
    assert 0 < largest.numbers <= BLOCK_SCORES
    assert_close(layer.merged[1].sum(-1), torch.full((1, 2), float(n)))


# ------------------------------------------------------------------------------------------------------------ safety


def test_it_is_gone_after_an_exception_and_the_model_may_be_copied_and_pickled_within():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    x, y = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="mine"):
        with record_attention(model) as seen:
            copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            with torch.no_grad():
                copied[0].in_proj_weight.zero_()
            copied[0](x, y, y)
            read[0](x, y, y)
            raise RuntimeError("mine")
    assert leftovers(model) == []
    assert copied[0](x, y, y, need_weights=True)[1].std() == 0  # the copy runs on its own weights
    with pytest.raises(ValueError, match="nothing was recorded: no attention layer of the model ran"):
        print(seen.layers)


def test_an_error_of_the_model_s_own_passes_through():
    layer = make_layer()
    with record_attention(layer), pytest.raises(ValueError, match="context has width 3"):
        layer(make_inputs()[0], torch.randn(Z, M, 3, dtype=torch.float64))
    assert leftovers(layer) == []


def test_nested_and_repeated_recordings_each_see_what_ran_while_they_were_open():
    layer, (a, b) = make_layer(), make_inputs()
    outer, inner = record_attention(layer, [Argmax()]), record_attention(layer, [TopK(1), Highlight()])
    with outer:
        layer(a, b)
        with inner:
            layer(a, b)
        layer(a, b)
    assert [len(one.layers["CrossAttention"].calls) for one in (outer, inner)] == [3, 1]
    assert len(inner.layers["CrossAttention"].merged) == 2
    with pytest.raises(ValueError, match="entered before"):
        outer.__enter__()
    first, second = record_attention(layer), record_attention(layer)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)  # not in the order of nesting
    layer(a, b)
    second.__exit__(None, None, None)
    assert len(second.layers["CrossAttention"].calls) == 1 and leftovers(layer) == []


def test_threads_with_recordings_see_their_own_calls_and_others_are_seen_by_all():
    layer, (a, b) = make_layer(), make_inputs()
    a, b = a.detach(), b.detach()
    counts, barrier = {}, threading.Barrier(3)

    def work(calls: int) -> None:
        with record_attention(layer, [Argmax()]) as seen:
            barrier.wait()
            for _ in range(calls):
                layer(a, b)
            barrier.wait()
        counts[calls] = len(seen.layers["CrossAttention"].calls)

    threads = [threading.Thread(target=work, args=(calls,)) for calls in (2, 3, 5)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert counts == {2: 2, 3: 3, 5: 5} and leftovers(layer) == []
    with record_attention(layer, [Argmax()]) as seen:
        helper = threading.Thread(target=layer, args=(a, b))
        helper.start(), helper.join()
    assert len(seen.layers["CrossAttention"].calls) == 1


@pytest.mark.slow  # what they import takes seconds
def test_a_compiled_model_is_refused_and_a_compiled_call_is_not_silent():
    layer, (a, b) = make_layer("textbook"), make_inputs()
    compiled = torch.compile(layer)
    with pytest.raises(TypeError, match="the model is compiled, so its graph runs without a look"):
        record_attention(compiled)
    compiled(a, b)
    with record_attention(layer) as seen:
        compiled(a, b)
    with pytest.raises(ValueError, match=r"nothing was recorded: .* and not a compiled"):
        print(seen.layers)
    layer.compile()
    with pytest.raises(TypeError, match="the model is compiled"):
        record_attention(layer)


@pytest.mark.slow
def test_a_checkpoint_s_second_run_is_not_recorded():
    layer, (a, b) = make_layer(), make_inputs()
    with record_attention(layer, [Argmax()]) as seen:
        torch.utils.checkpoint.checkpoint(layer, a, b, use_reentrant=False).sum().backward()
    assert len(seen.layers["CrossAttention"].calls) == 1


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_recorded_is_said():
    layer, (a, b) = make_layer(), make_inputs()
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got str"):
        record_attention("model")
    with pytest.raises(TypeError, match="holds the class TopK; make one of it"):
        record_attention(layer, [TopK])
    with pytest.raises(TypeError, match="got TopK; put it in a list"):
        record_attention(layer, TopK(3))
    with pytest.raises(ValueError, match="Linear has no attention layer that is known here"):
        record_attention(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has 1 attention layers, and none that reads another sequence"):
        record_attention(SelfAttention(12, heads=3))
    seen = record_attention(layer)
    with pytest.raises(ValueError, match="run the model within `with record_attention"):
        print(seen.layers)
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    with record_attention(mha) as seen:
        mha(x, x, x)
    with pytest.raises(ValueError, match="only self-attention ran"):
        print(seen.layers)
    with record_attention(layer, [Argmax()]) as seen:
        layer(a, b)
        layer(a, b)
    with pytest.raises(ValueError, match="CrossAttention was recorded over 2 separate calls"):
        print(seen.layers["CrossAttention"].merged)


def test_a_summary_s_own_error_waits_until_its_result_is_asked_for():
    layer, (a, b) = make_layer(), make_inputs()
    with record_attention(layer, [Rows([N]), Argmax()]) as seen:
        out = layer(a, b)
    recorded = seen.layers["CrossAttention"].merged
    assert out.shape[:2] == (Z, N) and recorded[1].shape == (Z, H, N)
    with pytest.raises(ValueError, match=f"Rows asks for query {N}, but there are {N} queries"):
        print(recorded.results)


# -------------------------------------------------------------------------------------------------------------- view


def recording_to_view():
    """A recording of two layers."""
    pytest.importorskip("crossattention.views.pages", reason="crossattention.views.pages is not there yet")
    model = nn.ModuleList(CrossAttention(12, B, heads=3) for _ in range(2))
    a, b = torch.randn(2, 4, 12), torch.randn(2, M, B)
    with record_attention(model, [TopK(3), Highlight()]) as seen:
        [layer(a, b) for layer in model]
    return seen


def test_a_view_is_written(tmp_path):
    seen = recording_to_view()
    path = seen.view(tmp_path / "map.html", queries=["<b>", "two", "three", "four"], context=[f"c{i}" for i in range(M)], item=1)
    text = path.read_text(encoding="utf-8")
    assert "three" in text and "<b>" not in text.partition("<body")[2]
    assert seen.view(tmp_path / "map.svg").stat().st_size > 0
    assert seen.view(tmp_path / "map.HTML", context=iter("abcdefg")).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_layers_that_read_other_sequences_have_pages_of_their_own(tmp_path):
    model = nn.ModuleList([CrossAttention(12, B, heads=2), CrossAttention(12, B, heads=3)])
    with record_attention(model) as seen:
        model[0](torch.randn(2, 4, 12), torch.randn(2, M, B))
        model[1](torch.randn(2, 5, 12), torch.randn(2, M, B))
    with pytest.raises(
        ValueError, match=r"got \(queries, context\) of \[\(4, 7\), \(5, 7\)\]; choose some that do, as layers=\['0'\]"
    ):
        seen.view(tmp_path / "map.html")
    text = seen.view(tmp_path / "map.html", layers=["1"], queries="a b c d e".split()).read_text(encoding="utf-8")
    assert '"names":[["1","cross"]]' in text
    for wrong, error, message in (
        ([], ValueError, "layers that were recorded, 0, 1; got an empty list"),
        (["1", "2"], ValueError, "layers that were recorded, 0, 1; got '2'"),
        ("1", TypeError, r"layers expects a list of names, got the text '1'; write \['1'\]"),
    ):
        with pytest.raises(error, match=message):
            seen.view(tmp_path / "map.html", layers=wrong)


def test_a_view_that_cannot_be_is_refused(tmp_path):
    seen = recording_to_view()
    with pytest.raises(ValueError, match="queries has 1 labels, but the map has 4 of them"):
        seen.view(tmp_path / "map.html", queries=["one"])
    for wrong in ("four", 4):  # one text is no list of labels, though it has four letters
        with pytest.raises(TypeError, match=rf"queries expects a list with a label for each position, .* got \w+ '?{wrong}"):
            seen.view(tmp_path / "map.html", queries=wrong)
    with pytest.raises(ValueError, match=r"item 2 is not in a batch of shape \(2,\)"):
        seen.view(tmp_path / "map.html", item=2)
    with pytest.raises(ValueError, match=r"writes \.html, \.png or \.svg, got 'map\.pdf'"):
        seen.view(tmp_path / "map.pdf")
    layer, (a, b) = make_layer(), make_inputs()
    with record_attention(layer, [Argmax()]) as seen:
        layer(a, b)
    with pytest.raises(ValueError, match="no TopK was recorded"):
        seen.view(tmp_path / "map.html")


def test_a_ragged_call_is_recorded_item_by_item():
    layer = CrossAttention(6, 9, heads=2).eval()
    model = torch.nn.Sequential()
    model.attention = layer
    a, b = [torch.randn(n, 6) for n in (2, 3)], [torch.randn(m, 9) for m in (4, 5)]
    with torch.no_grad(), record_attention(model, [Highlight()]) as recorded:
        out = layer(a, b)
    calls = recorded.layers["attention"].calls
    assert [call.shape for call in calls] == [(1, 2, 2, 4), (1, 2, 3, 5)]
    assert all(torch.equal(one, other) for one, other in zip(out, layer(a, b), strict=True))

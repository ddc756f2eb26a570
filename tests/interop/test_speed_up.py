import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import crossattention
from crossattention import record_attention, speed_up
from crossattention.interop import reader
from crossattention.interop.replacement import Replacement
from crossattention.plan import Plan
from tolerances import assert_close

E, H = 12, 3


@pytest.fixture
def decoder(plans_for_all):
    plans_for_all(Plan("context", "context"))
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()


@pytest.fixture
def inputs():
    return torch.randn(2, 3, E), torch.randn(2, 11, E)


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_it_is_public():
    assert crossattention.speed_up is speed_up and "speed_up" in dir(crossattention)


def test_the_model_is_what_it_was_and_undo_gives_it_back(decoder, inputs):
    expected, state, names = decoder(*inputs), decoder.state_dict(), [name for name, _ in decoder.named_modules()]
    parameters = [id(p) for p in decoder.parameters()]
    draws = torch.get_rng_state()
    changes = speed_up(decoder)
    assert torch.equal(torch.get_rng_state(), draws)
    assert forwards(decoder) == list(changes.replaced) == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert [id(p) for p in decoder.parameters()] == parameters and list(decoder.state_dict()) == list(state)
    assert [name for name, _ in decoder.named_modules()] == names and repr(decoder) == repr(copy.deepcopy(decoder))
    assert_close(decoder(*inputs), expected)
    assert not changes.is_undone
    changes.undo()
    changes.undo()
    assert changes.is_undone and forwards(decoder) == [] and torch.equal(decoder(*inputs), expected)
    assert "undone" in repr(changes) and "(undone)" in str(changes)


def test_hooks_of_the_module_still_run(decoder, inputs):
    seen = []
    decoder.layers[0].multihead_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    with speed_up(decoder):
        decoder(*inputs)
    assert seen == [(2, 3, E)]


def test_changes_say_what_was_replaced_what_runs_and_what_was_left(decoder, inputs):
    changes = speed_up(decoder)
    assert "layers.0.multihead_attn, layers.1.multihead_attn (MultiheadAttention)" in str(changes) and "none has run yet" in str(
        changes
    )
    with torch.no_grad():
        decoder(*inputs)
    shown = str(changes)
    assert "context+context x 1" in shown and "(2, 3, 12) on (2, 11, 12)" in shown
    assert "self-attention of a TransformerDecoderLayer: reads its own sequence" in shown
    assert "rows without a live key give zero attention" in shown


def test_undone_in_any_order(decoder, inputs):
    expected = decoder(*inputs)
    part = speed_up(decoder.layers[1])
    whole = speed_up(decoder)
    again = speed_up(decoder)
    assert part.replaced == ("multihead_attn",) and whole.replaced == ("layers.0.multihead_attn",) and again.replaced == ()
    assert any("by an earlier speed_up" in left.why for left in whole.left)
    part.undo()
    assert forwards(decoder) == ["layers.0.multihead_attn"]
    again.undo()
    assert_close(decoder(*inputs), expected)
    whole.undo()
    assert forwards(decoder) == []


def test_what_was_put_on_top_may_stay_on_top(decoder, inputs):
    expected, changes = decoder(*inputs), speed_up(decoder)
    module = decoder.layers[0].multihead_attn
    below, calls = module.forward, []
    module.forward = lambda *args, **kwargs: (calls.append(1), below(*args, **kwargs))[1]
    changes.undo()
    assert torch.equal(decoder(*inputs), expected) and calls == [1]
    assert any("a forward of its own, which something else put there" in left.why for left in speed_up(decoder).left)


def test_a_copy_and_a_pickled_model_are_plain_and_can_be_sped_up(decoder, inputs):
    expected = decoder(*inputs)
    with speed_up(decoder):
        for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
            assert not any(isinstance(m.__dict__.get("forward"), Replacement) for m in other.modules())
            assert torch.equal(other(*inputs), expected)
            with torch.no_grad():
                other.layers[0].multihead_attn.out_proj.weight.zero_()
            changed = other(*inputs)
            assert not torch.allclose(changed, expected)
            with speed_up(other) as changes:
                assert len(changes.replaced) == 2
                assert_close(other(*inputs), changed)
                assert torch.equal(copy.deepcopy(other)(*inputs), changed)
        assert_close(decoder(*inputs), expected)


def test_replicas_of_data_parallel_run_their_own_methods(decoder, inputs):
    with speed_up(decoder):
        for model in (decoder, copy.deepcopy(decoder), copy.deepcopy(copy.deepcopy(decoder))):
            module = model.layers[0].multihead_attn
            assert "forward" in module.__dict__
            replica = module._replicate_for_data_parallel()
            assert type(replica) is nn.MultiheadAttention and replica.forward.__self__ is replica
            assert replica._replicate_for_data_parallel.__self__ is replica
        assert torch.equal(nn.DataParallel(decoder)(*inputs), decoder(*inputs))
    assert "_replicate_for_data_parallel" not in decoder.layers[0].multihead_attn.__dict__
    with pytest.raises(TypeError, match="the model is a DataParallel, which runs copies of its model; speed up and call its"):
        speed_up(nn.DataParallel(decoder))


def test_a_pickled_model_needs_no_library_to_be_read(decoder):
    with speed_up(decoder):
        assert b"crossattention" not in pickle.dumps(decoder)


def test_moving_casting_and_loading_afterwards(decoder, inputs):
    with speed_up(decoder), torch.no_grad():
        for _ in range(2):
            decoder(*inputs)
        decoder.double()
        wide = [x.double() for x in inputs]
        expected = copy.deepcopy(decoder)(*wide)
        for _ in range(3):
            assert_close(decoder(*wide), expected)
        decoder.load_state_dict({name: w * 0.5 for name, w in decoder.state_dict().items()})
        assert_close(decoder(*wide), copy.deepcopy(decoder)(*wide))


def test_one_thread_trains_while_another_one_reads(decoder, inputs):
    expected = decoder(*inputs)
    module, failures = decoder.layers[0].multihead_attn, []
    own = copy.deepcopy(module)
    own(inputs[0], inputs[1], inputs[1], need_weights=False)[0].sum().backward()

    def read():
        with torch.no_grad():
            for _ in range(40):
                if not torch.allclose(decoder(*inputs), expected, atol=1e-5):
                    failures.append(1)

    with speed_up(decoder):
        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(40):
            module.zero_grad()
            module(inputs[0], inputs[1], inputs[1], need_weights=False)[0].sum().backward()
            assert_close(module.in_proj_weight.grad, own.in_proj_weight.grad)
        thread.join()
    assert failures == []


# ----------------------------------------------------------------------------------------------------- the example


def test_an_example_runs_both_ways_and_is_told(decoder, inputs):
    for example in (inputs, dict(zip(("tgt", "memory"), inputs, strict=True)), lambda model: model(*inputs)):
        with speed_up(decoder, example=example) as changes:
            assert "2 replaced methods ran" in changes.checked and changes.checked in str(changes)


class Remembering(nn.Module):
    """It says how often it was called with a cache, which it writes to."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, tgt, memory, cache):
        cache.append(self.decoder(tgt, memory))
        return {"states": torch.cat(cache, 1), "said": f"{len(cache)} steps", "cache": cache}


def test_a_cache_in_the_example_is_another_one_for_each_run(decoder, inputs):
    cache = [inputs[0]]
    with speed_up(Remembering(decoder), example=(*inputs, cache)) as changes:
        assert "2 replaced methods ran" in changes.checked and len(cache) == 1


def test_texts_and_caches_of_the_output_are_compared_too(decoder, inputs, monkeypatch):
    class Telling(Remembering):
        def forward(self, tgt, memory, cache):
            out = super().forward(tgt, memory, cache)
            return {**out, "said": "by a plan" if "forward" in decoder.layers[0].multihead_attn.__dict__ and not runs else "own"}

    runs = []
    model = Telling(decoder)
    model.register_forward_hook(lambda *args: runs.append(1))
    with pytest.raises(ValueError, match=r"it gives 'by a plan' instead of 'own' at \['said'\], though every replaced call agreed"):
        speed_up(model, example=(*inputs, []))
    assert forwards(decoder) == []


def test_the_example_leaves_modes_and_random_numbers(decoder, inputs):
    decoder.train()
    decoder.layers[1].eval()
    modes, draws = [m.training for m in decoder.modules()], torch.get_rng_state()
    with speed_up(decoder, example=inputs):
        assert [m.training for m in decoder.modules()] == modes and torch.equal(torch.get_rng_state(), draws)


def test_a_model_that_cannot_be_matched_is_refused_with_its_module_and_left(decoder, inputs, monkeypatch):
    expected, right = decoder(*inputs), reader.Reader.read

    def wrong(self, *args, **kwargs):
        read = right(self, *args, **kwargs)
        return reader.Read(read.out + 1e-3) if self.owner is decoder.layers[1].multihead_attn else read

    monkeypatch.setattr(reader.Reader, "read", wrong)
    with pytest.raises(ValueError, match=r"layers.1.multihead_attn \(MultiheadAttention\).* differs by 1.0e-03 where 1.0e-05"):
        speed_up(decoder, example=inputs)
    assert forwards(decoder) == [] and torch.equal(decoder(*inputs), expected)
    with speed_up(decoder, example=inputs, tolerance=1e-2) as changes:
        assert len(changes.replaced) == 2


def test_an_example_that_fails_leaves_the_model(decoder, inputs):
    with pytest.raises(TypeError):
        speed_up(decoder, example=inputs[0])
    assert forwards(decoder) == []


def test_rows_without_a_live_key_are_not_compared(plans_for_all):
    plans_for_all(None)
    mha = nn.MultiheadAttention(E, H, batch_first=True)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1] = True
    key = torch.randn(2, 11, E)
    example = {"query": torch.randn(2, 3, E), "key": key, "value": key, "key_padding_mask": padding}
    with speed_up(mha, example=example) as changes:
        assert "rows without a live key were left out" in changes.checked


# ------------------------------------------------------------------------------------------------------- recordings


def test_a_recording_of_a_sped_up_model_changes_nothing_and_sees_the_same(decoder, inputs):
    with torch.no_grad():
        with record_attention(decoder) as plain:
            decoder(*inputs)
        with speed_up(decoder):
            decoder(*inputs)
            out = decoder(*inputs)
            with record_attention(decoder) as seen:
                assert torch.equal(decoder(*inputs), out)
            assert torch.equal(decoder(*inputs), out)
    assert list(seen.layers) == list(plain.layers)
    for name, layer in plain.layers.items():
        assert_close(seen.layers[name].merged[1], layer.merged[1])


def test_a_call_left_to_the_module_is_recorded_as_ever(inputs):
    mha = nn.MultiheadAttention(E, H, batch_first=True)  # too small to plan
    with speed_up(mha), record_attention(mha) as seen:
        mha(inputs[0], inputs[1], inputs[1])
    assert seen.layers["MultiheadAttention"].merged[1].shape == (2, H, 11)


def test_a_recording_that_was_made_before_and_is_entered_after(decoder, inputs):
    recording = record_attention(decoder)
    with speed_up(decoder), recording as seen:
        decoder(*inputs)
    assert len(seen.layers) == 2


def test_within_a_recording_speed_up_is_refused(decoder):
    with record_attention(decoder), pytest.raises(ValueError, match="is being recorded"):
        speed_up(decoder)
    assert forwards(decoder) == []


def test_undone_within_a_recording(decoder, inputs):
    changes = speed_up(decoder)
    with record_attention(decoder) as seen:
        changes.undo()
        decoder(*inputs)
    assert len(seen.layers) == 2 and forwards(decoder) == []


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_sped_up_is_said():
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got str"):
        speed_up("model")
    with pytest.raises(ValueError, match="Linear has no attention module that is known here"):
        speed_up(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"is a DataParallel.*speed up and call its .module"):
        speed_up(nn.DataParallel(nn.MultiheadAttention(E, H)))
    with pytest.raises(ValueError, match="tolerance must be a number of zero or more, got -1"):
        speed_up(nn.MultiheadAttention(E, H), tolerance=-1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traces_and_transforms_run_the_modules_own_code(decoder, inputs):
    mha, (query, key) = decoder.layers[0].multihead_attn, inputs
    expected = mha(query, key, key, need_weights=False)[0]

    def run(parameters, query, key):
        return torch.func.functional_call(mha, parameters, (query, key, key), {"need_weights": False})[0]

    with speed_up(decoder):
        traced = torch.jit.trace(mha, (query, key, key), check_trace=False)
        assert_close(traced(query, key, key)[0], expected)
        twice = {name: p.detach() * 2 for name, p in mha.named_parameters()}
        assert_close(run(twice, query, key), run({n: p.clone() for n, p in twice.items()}, query, key))
        gradient = torch.func.grad(lambda p: run(p, query, key).sum())(dict(mha.named_parameters()))
    assert gradient["in_proj_weight"].shape == mha.in_proj_weight.shape
    assert_close(gradient["out_proj.bias"], torch.full((E,), 6.0))


@pytest.mark.slow
def test_a_model_is_compiled_after_or_before(decoder, inputs):
    with torch.no_grad():
        expected = decoder(*inputs)
        with speed_up(decoder):
            compiled = torch.compile(decoder, backend="eager", fullgraph=True)
            assert_close(compiled(*inputs), expected)
        assert_close(compiled(*inputs), expected)
    with pytest.raises(TypeError, match=r"compiled.*speed up the model that was compiled"):
        speed_up(compiled)


@pytest.mark.slow
def test_a_sped_up_model_exports(decoder, inputs):
    with speed_up(decoder):
        exported = torch.export.export(decoder, inputs).module()
    assert_close(exported(*inputs), decoder(*inputs))

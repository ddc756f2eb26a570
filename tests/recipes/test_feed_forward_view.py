"""Feed-forward layers as memories: coefficients, values and texts against the layers' own arithmetic."""

import pytest
import torch

from crossattention.attention.memory_attention import MemoryAttention
from crossattention.data.vocabulary import BEGIN, build_tokenizer
from crossattention.models.transformer import Transformer, TransformerConfig
from crossattention.recipes.feed_forward_view import Amount, feed_forward_view
from crossattention.recipes.translator import Translator

PAIRS = [("ab", "B A"), ("abc", "C B A"), ("bca", "A C B"), ("c", "C")]


@pytest.fixture(params=["target", "none"])
def translator(request):
    source = build_tokenizer("characters", [source for source, _ in PAIRS])
    target = build_tokenizer("words", [target for _, target in PAIRS])
    sizes = {"dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "feed_forward_dim": 24}
    model = Transformer(TransformerConfig(source.size, target.size, tied=request.param, dropout=0.3, **sizes))
    return Translator(model, source, target, 10)


def coefficients(translator, source, target):
    """What each key of each decoder layer gets, by the memory that the layer is."""
    model, inputs = translator.model.eval(), []
    layers = [layer.feed_forward for layer in model.decoder.layers]
    hooks = [layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0])) for layer in layers]
    ids = [translator.source.encode(source)], [[BEGIN, *translator.target.encode(target)]]
    with torch.no_grad():
        model(*map(torch.tensor, ids))
    for hook in hooks:
        hook.remove()
    return [MemoryAttention.from_feed_forward(layer).coefficients(x)[0, :-1, 0] for layer, x in zip(layers, inputs, strict=True)]


def test_the_keys_are_those_with_the_largest_coefficients(translator):
    view = feed_forward_view(translator, "abc", "C B A", [])
    assert view.tokens.tokens == ("C", "B", "A")
    assert all(layer.agreement is None and layer.num_triggered is None for layer in view.layers)
    for layer, expected in zip(view.layers, coefficients(translator, "abc", "C B A"), strict=True):
        best = expected.topk(8, dim=1)
        assert torch.allclose(torch.tensor(layer.coefficients), best.values, atol=1e-6)
        is_firing = best.values > 0
        assert torch.equal(torch.tensor(layer.top_keys)[is_firing], best.indices[is_firing])
        assert layer.num_firing.tolist() == (expected > 0).sum(1).tolist()


def test_a_value_promotes_by_its_product_with_the_output_embedding(translator):
    model = translator.model
    table = model.target_embedding.weight if model.out_proj is None else model.out_proj.weight
    view = feed_forward_view(translator, "ab", "B A", [], amount=Amount(keys=3, symbols=2))
    for index, layer in enumerate(view.layers):
        key = int(layer.top_keys[0, 0])
        scores = table @ model.decoder.layers[index].feed_forward.down_proj.weight[:, key]
        best = (scores - scores.mean()).topk(2)
        assert [score for _, score in layer.keys[key].promotes] == pytest.approx(best.values.tolist(), abs=1e-6)
        names = ["[padding]", "[begin]", "[end]", "[unknown]", *translator.target.symbols]
        assert [symbol for symbol, _ in layer.keys[key].promotes] == [names[at] for at in best.indices.tolist()]


def test_the_texts_of_a_key_are_those_on_which_it_fires_most(translator):
    told = []
    view = feed_forward_view(translator, "ab", "B A", PAIRS, amount=Amount(inputs=2), on_progress=lambda *now: told.append(now))
    peaks = [[layer.max(0) for layer in coefficients(translator, *pair)] for pair in PAIRS]
    for index, layer in enumerate(view.layers):
        for key, found in layer.keys.items():
            strengths = sorted((peak[index].values[key].item() for peak in peaks), reverse=True)[:2]
            assert [one.coefficient for one in found.inputs] == pytest.approx([value for value in strengths if value > 0], abs=1e-6)
            for one in found.inputs:
                number = [source for source, _ in PAIRS].index(one.source)
                assert one.tokens == tuple(PAIRS[number][1].split())
                assert one.at == peaks[number][index].indices[key]
        values = translator.model.decoder.layers[index].feed_forward.down_proj.weight
        table = translator.model.target_embedding.weight if translator.model.out_proj is None else translator.model.out_proj.weight
        strengths = torch.stack([peak[index].values for peak in peaks])
        fired = [key for key in range(24) if strengths[:, key].max() > 0]
        agrees = 0
        for key in fired:
            best = int(strengths[:, key].argmax())
            follows = translator.target.encode(PAIRS[best][1])[int(peaks[best][index].indices[key])]
            agrees += follows == int((table @ values[:, key]).argmax())
        assert layer.num_triggered == len(fired) and layer.agreement == pytest.approx(agrees / len(fired))
    assert told == [(done, 4) for done in (1, 2, 3, 4)]


def test_nothing_written_is_an_error(translator):
    with pytest.raises(ValueError, match="nothing was written for 'ab', so no key fired"):
        feed_forward_view(translator, "ab", "", [])

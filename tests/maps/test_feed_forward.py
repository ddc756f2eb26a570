"""Feed-forward layers as memories: the streamed triggers against all coefficients at once, values, agreement, on any model."""

import math

import pytest
import torch
from torch import nn

from crossattention.attention import MemoryAttention
from crossattention.layers import CrossAttentionBlock, FeedForward, Resampler
from crossattention.maps import feed_forward as room
from crossattention.maps import feed_forward_layers, feed_forward_memories
from crossattention.models.transformer import Transformer, TransformerConfig

VOCABULARY = 40


class Tower(nn.Module):
    """A language model of feed-forward layers alone; every one is one of the kinds that are known."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x @ self.table.weight.T


def tower() -> Tower:
    sequential = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 6))
    return Tower(FeedForward(6, 8, dropout=0.5), sequential).double()


def texts(*lengths: int) -> list[torch.Tensor]:
    """No symbol stands twice: of two equal coefficients, rounding would choose the larger."""
    return list(torch.randperm(VOCABULARY)[: sum(lengths)].split(lengths))


def run_on(model):
    """Runs a batch of texts, padded; the symbol after each position is the next one of the text."""

    def run(batch):
        width = max(map(len, batch)) - 1
        ids = torch.stack([torch.cat((text[:-1], text.new_zeros(width + 1 - len(text)))) for text in batch])
        model(ids)
        return torch.stack([torch.cat((text[1:], text.new_full((width + 1 - len(text),), -1))) for text in batch])

    return run


def everything(model, given, layer):
    """For each text and key its largest coefficient and where, from each text by itself."""
    peaks, inputs = [], []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.eval()
    with torch.no_grad():
        for text in given:
            model(text[None, :-1])
            peaks.append(MemoryAttention.from_feed_forward(layer).coefficients(inputs.pop())[0, :, 0].max(0))
    hook.remove()
    return torch.stack([peak.values for peak in peaks]), torch.stack([peak.indices for peak in peaks])


@pytest.mark.parametrize("batches", [[5], [1, 1, 1, 1, 1], [2, 3], [3, 0, 2]], ids=str)
def test_streamed_triggers_are_those_of_all_texts_at_once(batches) -> None:
    model, given = tower(), texts(6, 4, 9, 2, 7)
    rest = iter(given)
    parts = [[next(rest) for _ in range(size)] for size in batches if size]
    found = feed_forward_memories(model.train(), iter(parts), run_on(model), output=model.table.weight, k=3, symbols=4)
    assert list(found) == ["layers.0", "layers.1"] and model.training and model.layers[1][2].training
    for memory, layer in zip(found.values(), model.layers, strict=True):
        strengths, places = everything(model, given, layer)
        order = strengths.sort(dim=0, descending=True, stable=True).indices[:3].T
        assert memory.size == strengths.shape[1]
        torch.testing.assert_close(memory.triggers.coefficients, strengths.T.gather(1, order), rtol=0, atol=1e-12)
        assert torch.equal(memory.triggers.texts, order)
        assert torch.equal(memory.triggers.positions, places.T.gather(1, order))
        follows = [
            [int(given[text][place + 1]) for text, place in zip(*row, strict=True)]
            for row in zip(order.tolist(), memory.triggers.positions.tolist(), strict=True)
        ]
        assert memory.triggers.next_ids.tolist() == follows
        second = layer[3] if isinstance(layer, nn.Sequential) else layer.down_proj
        logits = second.weight.T @ model.table.weight.T
        best = logits.topk(4)
        assert torch.equal(memory.promoted.ids, best.indices)
        torch.testing.assert_close(memory.promoted.scores, best.values - logits.mean(1, keepdim=True))
        torch.testing.assert_close(memory.promoted.probabilities, logits.softmax(1).topk(4).values)
        fired = strengths.amax(0) > 0
        agrees = [int(logits[key].argmax()) == follows[key][0] for key in range(memory.size) if fired[key]]
        assert memory.num_triggered == int(fired.sum()) and memory.agreement == pytest.approx(sum(agrees) / len(agrees))


def test_a_key_that_was_made_to_agree_does() -> None:
    """Key j fires on symbol j alone, and its value is the embedding of symbol j + 1, which follows it."""
    layer = FeedForward(6, 6, bias=False)
    model = Tower(layer)
    with torch.no_grad():
        model.table.weight.copy_(torch.cat((torch.eye(6), torch.zeros(VOCABULARY - 6, 6))))
        layer.up_proj.weight.copy_(torch.eye(6))
        layer.down_proj.weight.copy_(torch.eye(6).roll(1, 0))
    counting = [torch.arange(6), torch.arange(3, 6)]
    [memory] = feed_forward_memories(model, [counting], run_on(model), output=model.table.weight, k=2).values()
    assert memory.num_triggered == 5 and memory.agreement == 1.0  # the last symbol is followed by none
    assert memory.triggers.texts[3].tolist() == [0, 1] and memory.triggers.positions[3].tolist() == [3, 0]
    [memory] = feed_forward_memories(model, [[torch.tensor([0, 2, 1, 0])]], run_on(model), output=model.table.weight, k=2).values()
    assert memory.num_triggered == 3 and memory.agreement == 0.0
    assert memory.triggers.texts[0].tolist() == [0, -1] and memory.triggers.coefficients[0, 1] == -math.inf


def test_memory_does_not_grow_with_the_number_of_texts(monkeypatch) -> None:
    model, kept = tower(), []
    original = room._Strongest.update

    def watched(self, *args):
        original(self, *args)
        kept.append(sum(getattr(self.kept, name).numel() for name in self.kept.__dataclass_fields__))

    monkeypatch.setattr(room._Strongest, "update", watched)
    feed_forward_memories(model, (texts(4, 5) for _ in range(20)), run_on(model), output=model.table.weight, k=3)
    assert set(kept) == {4 * 3 * 8, 4 * 3 * 9}


def test_values_are_projected_in_blocks_and_by_any_head(monkeypatch) -> None:
    model, values = tower(), torch.randn(13, 6, dtype=torch.float64)
    whole = room.promoted_symbols(values, model.table.weight, 3)
    monkeypatch.setattr(room, "BLOCK_SCORES", 4 * VOCABULARY)
    in_blocks = room.promoted_symbols(values, lambda rows: rows @ model.table.weight.T, 3)
    for name in ("ids", "scores", "probabilities"):
        torch.testing.assert_close(getattr(in_blocks, name), getattr(whole, name))
    assert room.promoted_symbols(values, model.table.weight, 50).ids.shape == (13, VOCABULARY)


def test_layers_are_found_by_name_in_models_of_this_library_and_torch() -> None:
    model = Transformer(TransformerConfig(9, 9, dim=8, heads=2, encoder_layers=1, decoder_layers=2, feed_forward_dim=16))
    names = ["encoder.layers.0.feed_forward", "decoder.layers.0.feed_forward", "decoder.layers.1.feed_forward"]
    assert list(feed_forward_layers(model)) == names
    assert list(feed_forward_layers(nn.ModuleList([CrossAttentionBlock(8, heads=2), Resampler(8, heads=2, num_layers=1)]))) == [
        "0.feed_forward",
        "1.layers.0.feed_forward",
    ]
    outside = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    assert list(feed_forward_layers(outside)) == ["encoder.layers.0", "decoder.layers.0"]
    assert list(feed_forward_layers(FeedForward(4, 8))) == ["FeedForward"]
    assert feed_forward_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4))) == {}


def test_torch_s_layers_are_seen_in_evaluation_mode() -> None:
    """Their fast path would pass the second matrix by."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    ids, inputs = torch.randint(0, VOCABULARY, (3, 5)), []
    found = feed_forward_memories(model, [ids], lambda ids: (model(ids), ids)[1], output=model[0].weight, k=3)
    hook = model[1].layers[1].linear2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.train()(ids)  # no dropout here, and no fast path
    hook.remove()
    strongest = inputs[0].amax(1).T.sort(descending=True).values
    torch.testing.assert_close(found["1.layers.1"].triggers.coefficients, strongest.detach())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_layers_are_found_in_models_of_transformers(family) -> None:
    import transformers

    small = {"vocab_size": VOCABULARY}
    if family == "bert":
        config = transformers.BertConfig(**small, hidden_size=6, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8)
        model, names = transformers.BertForMaskedLM(config), [f"bert.encoder.layer.{i}" for i in range(2)]
    elif family == "gpt2":
        config = transformers.GPT2Config(**small, n_embd=6, n_head=2, n_layer=2, n_inner=8, bos_token_id=0, eos_token_id=0)
        model, names = transformers.GPT2LMHeadModel(config), [f"transformer.h.{i}.mlp" for i in range(2)]
    elif family == "t5":
        config = transformers.T5Config(**small, d_model=6, d_kv=3, num_heads=2, num_layers=1, d_ff=8)
        model, names = (
            transformers.T5ForConditionalGeneration(config),
            [f"{side}.block.0.layer.{at}.DenseReluDense" for side, at in (("encoder", 1), ("decoder", 2))],
        )
    else:
        config = transformers.BartConfig(
            **small,
            d_model=6,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            forced_eos_token_id=None,
            decoder_start_token_id=0,
        )
        model, names = transformers.BartForConditionalGeneration(config), ["model.encoder.layers.0", "model.decoder.layers.0"]
    layers = feed_forward_layers(model)
    assert list(layers) == names
    ids, inputs = torch.randint(3, VOCABULARY, (3, 5)), []
    second = layers[names[-1]]
    given = {"decoder_input_ids": ids} if family in ("t5", "bart") else {}
    embedding = model.get_output_embeddings().weight
    found = feed_forward_memories(model, [ids], lambda ids: (model(ids, **given), ids)[1], output=embedding, k=3, layers=names[-1:])
    hook = second.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(ids, **given)
    hook.remove()
    strongest = inputs[0].reshape(3, 5, -1).amax(1).T.sort(descending=True).values
    torch.testing.assert_close(found[names[-1]].triggers.coefficients, strongest)
    torch.testing.assert_close(found[names[-1]].promoted.ids, (room.value_rows(second) @ embedding.T).topk(10).indices)


def test_a_model_of_bert_is_read_too() -> None:
    bert = pytest.importorskip("crossattention.models.bert", reason="BERT is not part of the library yet")
    config = bert.BertConfig(
        vocab_size=VOCABULARY, dim=6, heads=2, layers=2, feed_forward_dim=8, max_length=12, dropout=0.0, begin_id=1, end_id=2
    )
    model = bert.BertEncoder(config)
    names = list(feed_forward_layers(model))
    assert len(names) == 2 and all("feed_forward" in name for name in names)
    ids, inputs = torch.randint(3, VOCABULARY, (3, 5)), []
    found = feed_forward_memories(model, [ids], lambda ids: (model(ids), ids)[1], output=torch.randn(VOCABULARY, 6), k=2)
    hook = model.get_submodule(names[1]).down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(ids)
    hook.remove()
    strongest = inputs[0].amax(1).T.sort(descending=True).values[:, :2]
    torch.testing.assert_close(found[names[1]].triggers.coefficients, strongest)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"symbols": True}, ValueError, "symbols must be an integer of at least 1, got True"),
        ({"layers": ["layers.7"]}, ValueError, r"among layers\.0, layers\.1; got 'layers\.7'"),
        ({"layers": "layers.0"}, ValueError, r"layers must be a list of names .* got 'layers\.0'"),
        ({"output": torch.zeros(VOCABULARY, 5)}, ValueError, r"must be \(V, 6\), as wide as the values, got \(40, 5\)"),
        ({"batches": []}, ValueError, "no text went by"),
        ({"run": lambda batch: None}, TypeError, "run must return integers .*got NoneType"),
        ({"run": lambda batch: torch.zeros(2, 3)}, TypeError, r"got torch.float32 of shape \(2, 3\)"),
        ({"run": lambda batch: torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"layers\.0 ran 0 times in one batch"),
        ({"model": nn.Linear(3, 3)}, ValueError, "Linear has no feed-forward layer with two matrices named up_proj and down_proj"),
    ],
)
def test_what_is_refused(changes, kind, message) -> None:
    model = tower()
    usual = {"model": model, "batches": [texts(4, 5)], "run": run_on(model), "output": model.table.weight}
    with pytest.raises(kind, match=message):
        feed_forward_memories(**{**usual, **changes})


def test_positions_that_are_not_those_of_the_text_are_refused_and_no_hook_stays() -> None:
    model = tower()
    with pytest.raises(ValueError, match=r"coefficients of \(2, 4\) positions, but run returned symbols for \(2, 3\)"):
        feed_forward_memories(model, [texts(5, 5)], lambda batch: run_on(model)(batch)[:, 1:], output=model.table.weight)
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.training

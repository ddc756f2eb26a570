"""BERT against Hugging Face's, with the same random weights: states, logits, gradients, masks, caches."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from bert_models import DIM, LENGTH, PAD, VOCAB, decoder_config, ours_of, prefix_mask, their_config, their_model, their_pair
from crossattention.checkpoints import bert_huggingface as family
from crossattention.checkpoints.rules import to_theirs

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
Z, M, N = 3, 7, 5


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCES[theirs.dtype], rtol=TOLERANCES[theirs.dtype])


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Every gradient of theirs is ours, under our names; what has none in theirs, as an unread pooler, has none in ours."""
    model = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    found = to_theirs(model, family.rules(ours.config, model_class=type(ours)))
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=TOLERANCES[gradient.dtype],
            rtol=TOLERANCES[gradient.dtype],
            msg=lambda m, n=name: f"{n}: {m}",
        )


def symbols(length: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(3, vocab, (Z, length))


@every_dtype
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_encoder_gives_the_references_states_pooled_state_and_gradients(dtype: torch.dtype, activation: str) -> None:
    theirs = their_model("BertModel", their_config(hidden_act=activation), dtype=dtype)
    ours = ours_of(theirs)
    ids, types, mask = symbols(M), torch.randint(0, 3, (Z, M)), prefix_mask([M, 3, 1], M)
    ids = ids.where(mask, PAD)
    expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types)
    states = ours(ids, mask, types=types)
    assert_near(states, expected.last_hidden_state)
    assert_near(ours.pool(states), expected.pooler_output)
    weight = torch.randn(Z, M, DIM, dtype=dtype)
    ((expected.last_hidden_state * weight)[mask].sum() + expected.pooler_output.sum()).backward()
    ((states * weight)[mask].sum() + ours.pool(states).sum()).backward()
    assert_same_gradients(ours, theirs)


def test_encoder_takes_positions_embeddings_and_masks_with_holes() -> None:
    theirs = their_model("BertModel", their_config(), add_pooling_layer=False)
    ours = ours_of(theirs)
    assert ours.pooler is None
    ids, positions = symbols(M), torch.stack([torch.randperm(LENGTH)[:M] for _ in range(Z)])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1] * 7, [0, 1, 0, 0, 0, 0, 0]]).bool()
    words = torch.randn(Z, M, DIM, dtype=torch.float64)
    for given, ours_given in (({"input_ids": ids}, {"ids": ids}), ({"inputs_embeds": words}, {"ids": None, "embeddings": words})):
        expected = theirs(**given, attention_mask=mask.long(), position_ids=positions).last_hidden_state
        assert_near(ours(**ours_given, mask=mask, positions=positions), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_masked_language_model_gives_the_references_logits(tied: bool) -> None:
    theirs = their_model("BertForMaskedLM", their_config(tie_word_embeddings=tied))
    ours = ours_of(theirs)
    ids, mask = symbols(M), prefix_mask([M, 3, 1], M)
    expected = theirs(ids, attention_mask=mask.long()).logits
    logits = ours(ids, mask)
    assert_near(logits, expected)
    expected.logsumexp(-1)[mask].sum().backward()
    logits.logsumexp(-1)[mask].sum().backward()
    if tied:
        assert_same_gradients(ours, theirs)


@every_dtype
def test_decoder_gives_the_references_logits_and_gradients(dtype: torch.dtype) -> None:
    theirs = their_model("BertLMHeadModel", decoder_config(), dtype=dtype)
    ours = ours_of(theirs)
    ids, source_mask, target_mask = symbols(N), prefix_mask([M, 3, 1], M), prefix_mask([2, N, 4], N)
    states = torch.randn(Z, M, DIM, dtype=dtype, requires_grad=True)
    copied = states.detach().clone().requires_grad_()
    expected = theirs(
        ids, attention_mask=target_mask.long(), encoder_hidden_states=copied, encoder_attention_mask=source_mask.long()
    ).logits
    logits = ours(ids, states, source_mask=source_mask, target_mask=target_mask)
    assert_near(logits, expected)
    weight = torch.randn(Z, N, VOCAB, dtype=dtype)
    (expected * weight)[target_mask].sum().backward()
    (logits * weight)[target_mask].sum().backward()
    assert_near(states.grad, copied.grad)
    assert_same_gradients(ours, theirs)


def test_decoder_reads_left_padded_targets_on_their_real_rows() -> None:
    theirs = their_model("BertLMHeadModel", decoder_config())
    ours = ours_of(theirs)
    ids, mask, states = symbols(N), prefix_mask([2, N, 4], N).flip(1), torch.randn(Z, M, DIM, dtype=torch.float64)
    expected = theirs(ids, attention_mask=mask.long(), encoder_hidden_states=states).logits
    assert_near(ours(ids, states, target_mask=mask)[mask], expected[mask])


def test_decoder_without_cross_attention_and_base_model_with_it() -> None:
    alone = their_model("BertLMHeadModel", decoder_config(add_cross_attention=False))
    ids, states = symbols(N), torch.randn(Z, M, DIM, dtype=torch.float64)
    assert_near(ours_of(alone)(ids), alone(ids).logits)
    base = their_model("BertModel", decoder_config(), add_pooling_layer=False)
    assert_near(ours_of(base).states(ids, states), base(ids, encoder_hidden_states=states).last_hidden_state)


def test_decoder_gives_the_same_with_the_references_cache_and_with_ours() -> None:
    theirs = their_model("BertLMHeadModel", decoder_config())
    ours = ours_of(theirs)
    ids, states, mask = symbols(N), torch.randn(Z, M, DIM, dtype=torch.float64), prefix_mask([M, 3, 1], M)
    given = {"encoder_hidden_states": states, "encoder_attention_mask": mask.long()}
    prepared, caches, cache = ours.prepare(states, mask, uses=N, query_length=1), None, None
    whole = ours(ids, states, source_mask=mask)
    for i in range(N):
        made = theirs(ids[:, i : i + 1], cache=cache, use_cache=True, **given)
        cache = made.cache
        logits, caches = ours.step(ids[:, i : i + 1], prepared, caches)
        assert_near(logits, made.logits)
        assert_near(logits[:, 0], whole[:, i])


@every_dtype
@pytest.mark.parametrize("same_width", [False, True])
def test_encoder_decoder_gives_the_references_logits_and_gradients(dtype: torch.dtype, same_width: bool) -> None:
    theirs = their_pair(their_config(num_hidden_layers=2) if same_width else None, dtype=dtype)
    ours = ours_of(theirs)
    assert (ours.projection is None) == same_width
    source, target, mask, target_mask = symbols(M), symbols(N), prefix_mask([M, 3, 1], M), prefix_mask([2, N, 4], N)
    expected = theirs(
        input_ids=source, attention_mask=mask.long(), decoder_input_ids=target, decoder_attention_mask=target_mask.long()
    ).logits
    logits = ours(source, target, mask, target_mask)
    assert_near(logits, expected)
    expected.logsumexp(-1)[target_mask].sum().backward()
    logits.logsumexp(-1)[target_mask].sum().backward()
    assert_same_gradients(ours, theirs)

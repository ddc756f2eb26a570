"""The whole Transformer against Hugging Face's Marian, a post-norm model of another code base, from a tiny random config.

The weights come through `checkpoints.transformer_marian`, which says how Marian's channels are ordered.
"""

import pytest
import torch
from torch import Tensor, nn

from crossattention.checkpoints import transformer_marian
from crossattention.checkpoints.rules import to_ours
from crossattention.models.generate import beam_search, greedy
from crossattention.models.transformer import Transformer
from tolerances import assert_close

transformers = pytest.importorskip("transformers")

PAD, BEGIN, END, VOCAB, DIM = 0, 1, 2, 17, 24


@pytest.fixture(scope="module", params=["relu", "gelu", "swish"])
def models(request: pytest.FixtureRequest) -> tuple[Transformer, nn.Module]:
    torch.manual_seed(36)  # a model whose targets end before the limit
    theirs = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=VOCAB,
            d_model=DIM,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            activation_function=request.param,
            scale_embedding=True,
            max_position_embeddings=16,
            pad_token_id=PAD,
            decoder_start_token_id=BEGIN,
            bos_token_id=BEGIN,
            eos_token_id=END,
            forced_eos_token_id=None,
            init_std=0.3,
        )
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for stack in (theirs.model.encoder, theirs.model.decoder):
            # Stored in float32: the same numbers, written anew in float64.
            angle = torch.arange(16)[:, None] / 10000 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
            exact = torch.cat((angle.sin(), angle.cos()), 1)
            torch.testing.assert_close(stack.embed_positions.weight, exact, atol=1e-6, rtol=0)
            stack.embed_positions.weight.copy_(exact)
        # A buffer that real translators fill.
        theirs.final_logits_bias.copy_(0.5 * torch.randn(1, VOCAB))
    config = transformer_marian.config_to_ours(theirs.config.to_dict())
    ours = Transformer(config, dtype=torch.float64).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), transformer_marian.rules(config), ours.state_dict()))
    return ours, theirs


def sources() -> tuple[Tensor, Tensor]:
    mask = torch.arange(7) < torch.tensor([[7], [4], [1], [6]])
    ids = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    return ids.masked_fill(~mask, PAD), mask


def test_logits_and_states_are_marians(models: tuple[Transformer, nn.Module]) -> None:
    ours, theirs = models
    source, mask = sources()
    target = torch.randint(3, VOCAB, (4, 5))
    target_mask = torch.arange(5) < torch.tensor([[5], [3], [4], [1]])
    wanted = theirs(
        input_ids=source,
        attention_mask=mask.long(),
        decoder_input_ids=target,
        decoder_attention_mask=target_mask.long(),
    )
    states = ours.encode(source, mask)
    assert_close(states[mask], transformer_marian.interleaved(wanted.encoder_last_hidden_state, 2)[mask])
    assert_close(ours(source, target, mask, target_mask), wanted.logits)
    assert_close(ours.decode(target, ours.prepare(states, mask), target_mask), wanted.logits)


def generated(theirs: nn.Module, beams: int, count: int) -> list[list[tuple[int, ...]]]:
    source, mask = sources()
    out = theirs.generate(
        input_ids=source,
        attention_mask=mask.long(),
        max_new_tokens=14,
        num_beams=beams,
        num_return_sequences=count,
        do_sample=False,
        early_stopping=beams > 1,  # as soon as there are as many finished ones as beams
        length_penalty=0.0,
        suppress_tokens=[PAD, BEGIN],
    )
    return [
        [tuple(i for i in ids if i not in (PAD, BEGIN, END)) for ids in rows] for rows in out.view(len(source), count, -1).tolist()
    ]


def test_greedy_generates_what_marian_does(models: tuple[Transformer, nn.Module]) -> None:
    ours, theirs = models
    found = greedy(ours, *sources(), max_length=14)
    assert [[hypothesis.ids] for hypothesis in found] == generated(theirs, 1, 1)


@pytest.mark.parametrize(("beams", "count"), [(2, 1), (4, 3)])
def test_beam_search_finds_what_marian_does(models: tuple[Transformer, nn.Module], beams: int, count: int) -> None:
    ours, theirs = models
    found = beam_search(ours, *sources(), beams=beams, length_penalty=0.0, max_length=14, num_hypotheses=count)
    assert all(hypothesis.is_finished for row in found for hypothesis in row)  # where the limit cuts, the two rank differently
    assert [[hypothesis.ids for hypothesis in row] for row in found] == generated(theirs, beams, count)

"""The whole Transformer against Hugging Face's Marian, a post-norm model of another code base, from a tiny random config.

Marian puts all sines before all cosines. That is the paper's encoding with its channels permuted, so the same model comes out once
every weight that reads or writes the model's width has its channels permuted alike.
"""

import pytest
import torch
from torch import Tensor, nn

from crossattention.models.generate import beam_search, greedy
from crossattention.models.transformer import Transformer, TransformerConfig
from tolerances import assert_close

transformers = pytest.importorskip("transformers")

PAD, BEGIN, END, VOCAB, DIM = 0, 1, 2, 17, 24
# Our channel 2i is their sine i, our channel 2i + 1 their cosine i.
PERMUTATION = torch.arange(DIM).view(2, DIM // 2).T.flatten()


@pytest.fixture(scope="module", params=["relu", "gelu"])
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
    config = TransformerConfig(
        VOCAB,
        VOCAB,
        dim=DIM,
        heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feed_forward_dim=40,
        activation=request.param,
        tied="all",
        pad_id=PAD,
        begin_id=BEGIN,
        end_id=END,
    )
    ours = Transformer(config, dtype=torch.float64).eval()
    ours.load_state_dict(converted(theirs))
    return ours, theirs


def converted(theirs: nn.Module) -> dict[str, Tensor]:
    """Marian's weights under our names, channels of the model's width permuted."""
    names = {
        "self_attn.": "self_attention.",
        "encoder_attn.": "cross_attention.",
        "self_attn_layer_norm.": "self_attention_residual.norm.",
        "encoder_attn_layer_norm.": "cross_attention_residual.norm.",
        "final_layer_norm.": "feed_forward_residual.norm.",
        "fc1.": "feed_forward.up_proj.",
        "fc2.": "feed_forward.down_proj.",
    }
    weights = {"target_embedding.weight": theirs.model.shared.weight[:, PERMUTATION]}
    for stack in ("encoder", "decoder"):
        for name, tensor in getattr(theirs.model, stack).layers.state_dict().items():
            number, rest = name.split(".", 1)
            theirs_prefix = next(prefix for prefix in names if rest.startswith(prefix))
            writes = "out_proj" in rest or "fc2" in rest or "norm" in rest
            reads = tensor.dim() == 2 and not writes
            tensor = tensor[PERMUTATION] if writes else tensor[:, PERMUTATION] if reads else tensor
            weights[f"{stack}.layers.{number}.{names[theirs_prefix]}{rest.removeprefix(theirs_prefix)}"] = tensor
    return weights


def sources() -> tuple[Tensor, Tensor]:
    mask = torch.arange(7) < torch.tensor([[7], [4], [1], [6]])
    ids = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(0))
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
    assert_close(states[mask], wanted.encoder_last_hidden_state[..., PERMUTATION][mask])
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

import pytest
import torch
from torch import nn

from crossattention.interop import from_multihead_attention
from tolerances import assert_close


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "batch_first"), [(None, True), (20, False), (12, True)])
def test_the_layer_equals_torch_multihead_attention(kdim, batch_first, bias):
    mha = nn.MultiheadAttention(12, 3, kdim=kdim, vdim=kdim, bias=bias, batch_first=batch_first, dtype=torch.float64)
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    layer = from_multihead_attention(mha)
    a, b = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, kdim or 12, dtype=torch.float64)
    padding = torch.rand(2, 7) > 0.7
    pairs = torch.rand(5, 7) > 0.8
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    expected, _ = mha(turn(a), turn(b), turn(b), key_padding_mask=padding, attn_mask=pairs, need_weights=False)
    assert_close(layer(a, b, context_mask=~padding, attn_mask=~pairs), turn(expected))


def test_self_attention_takes_the_weights_too():
    mha = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    layer = from_multihead_attention(mha, causal=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert_close(layer(x), mha(x, x, x, attn_mask=causal, need_weights=False)[0])


def test_the_weights_are_copied_and_dtype_and_mode_kept():
    mha = nn.MultiheadAttention(12, 3, dropout=0.2).bfloat16().eval()
    layer = from_multihead_attention(mha)
    assert layer.q_proj.weight.dtype == torch.bfloat16 and not layer.training and layer.dropout == 0.2
    before = layer.q_proj.weight.clone()
    with torch.no_grad():
        mha.in_proj_weight.zero_()
    assert torch.equal(layer.q_proj.weight, before)


def test_options_without_a_counterpart_are_refused_by_name():
    with pytest.raises(ValueError, match="add_bias_kv=True"):
        from_multihead_attention(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    with pytest.raises(ValueError, match="add_zero_attn=True"):
        from_multihead_attention(nn.MultiheadAttention(12, 3, add_zero_attn=True))
    with pytest.raises(ValueError, match="kdim=5 and vdim=6 differ"):
        from_multihead_attention(nn.MultiheadAttention(12, 3, kdim=5, vdim=6))
    with pytest.raises(ValueError, match="kdim=5 and embed_dim=12 differ"):
        from_multihead_attention(nn.MultiheadAttention(12, 3, kdim=5, vdim=5), causal=False)
    with pytest.raises(TypeError, match="got Linear"):
        from_multihead_attention(nn.Linear(2, 2))

"""The specification itself, against torch's own multi-head attention and against loops."""

import torch
from torch import nn

from crossattention.attention import reference_attention
from oracle import A, B, K, M, N, Z, make_inputs, make_layer, specification
from tolerances import assert_close


def test_the_specification_equals_torch_multihead_attention():
    mha = nn.MultiheadAttention(12, 3, kdim=B, vdim=B, batch_first=True, dtype=torch.float64)
    a, b = torch.randn(Z, N, 12, dtype=torch.float64), torch.randn(Z, M, B, dtype=torch.float64)
    mask = torch.rand(Z, M) > 0.3
    mask[:, 0] = True
    q_bias, k_bias, v_bias = mha.in_proj_bias.chunk(3)
    out, weights = reference_attention(
        a,
        b,
        q_weight=mha.q_proj_weight,
        k_weight=mha.k_proj_weight,
        v_weight=mha.v_proj_weight,
        out_weight=mha.out_proj.weight,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        out_bias=mha.out_proj.bias,
        heads=3,
        context_mask=mask,
    )
    expected, expected_weights = mha(a, b, b, key_padding_mask=~mask, average_attn_weights=False)
    assert_close(out, expected)
    assert_close(weights, expected_weights)


def test_the_specification_equals_loops_over_single_numbers():
    layer = make_layer()
    a, b = make_inputs()
    out, weights = specification(layer, a, b)
    q, k = layer.q_proj(a).detach(), layer.k_proj(b).detach()
    z, h, n = 1, 2, 3
    scores = [float(q[z, n, h * K : (h + 1) * K] @ k[z, m, h * K : (h + 1) * K]) * layer.scale for m in range(M)]
    exponentials = [torch.tensor(s, dtype=torch.float64).exp() for s in scores]
    expected = torch.stack([e / sum(exponentials) for e in exponentials])
    assert_close(weights[z, h, n], expected)
    assert a.shape[-1] == A and out.shape == (Z, N, layer.out_dim)

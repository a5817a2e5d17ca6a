"""The MAP head against SigLIP's own, and the SwiGLU by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slap_fast import ops
from slap_fast.models.layers import MAPHead, RMSNorm, SwiGLU
from slap_fast.packed import starts_of

LENGTHS = [1, 9, 0, 30]


@pytest.fixture
def siglip_head():
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = SiglipVisionConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48)
    head = SiglipMultiheadAttentionPoolingHead(config).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def test_map_head_loads_siglip_and_equals_it(siglip_head):
    head = MAPHead(32, 4, 48, norm="layer", bias=True, eps=1e-6).double()
    head.load_state_dict(siglip_head.state_dict())
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    starts = starts_of(LENGTHS)
    pooled = head(x, starts)
    empty = head.attention(head.probe, x, starts)[LENGTHS.index(0)]
    assert torch.equal(empty, head.attention.out_proj.bias)  # no values, so no value bias
    for i, clip in enumerate(x.split(LENGTHS)):
        if len(clip):
            torch.testing.assert_close(
                pooled[i], siglip_head(clip[None])[0], rtol=1e-10, atol=1e-10
            )


def test_map_head_learns_as_siglip_does(siglip_head):
    """Through the folded weights; a key bias drops out of the softmax, SigLIP's too."""
    head = MAPHead(32, 4, 48, norm="layer", bias=True, eps=1e-6).double()
    head.load_state_dict(siglip_head.state_dict())
    lengths = [n for n in LENGTHS if n]
    x = torch.randn(sum(lengths), 32, dtype=torch.float64)
    dout = torch.randn(len(lengths), 32, dtype=torch.float64)
    head(x, starts_of(lengths)).backward(dout)
    for clip, gradient in zip(x.split(lengths), dout, strict=True):
        siglip_head(clip[None])[0].backward(gradient)
    siglip = dict(siglip_head.named_parameters())
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, siglip[name].grad, rtol=1e-9, atol=1e-9)


def test_a_norm_is_one_kernel_in_the_dtype_of_its_input(monkeypatch):
    """Also under autocast, which on a GPU has its own list of what is fp32."""
    seen, rms_norm, norm = [], F.rms_norm, RMSNorm(32)
    nn.init.normal_(norm.weight)

    def spy(x, shape, weight, eps):
        seen.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return rms_norm(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", spy)
    x = torch.randn(9, 32)
    exact = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        bf16 = norm(x.bfloat16())
    assert seen == [(dtype, dtype, False) for dtype in (torch.float32, torch.bfloat16)]
    assert bf16.dtype == torch.bfloat16
    torch.testing.assert_close(bf16.float(), exact, rtol=2e-2, atol=2e-2)


def test_under_autocast_tokens_are_pooled_in_its_dtype(monkeypatch):
    head, seen = MAPHead(32, 4, 48), []
    pool = ops.map_pool
    monkeypatch.setattr(ops, "map_pool", lambda *args: seen.append(args[:2]) or pool(*args))
    x, starts = torch.randn(9, 32), torch.tensor([0, 4, 9]).int()
    exact = head(x, starts)
    with torch.autocast("cpu", torch.bfloat16):
        bf16 = head(x, starts)
    (_, weight), (tokens, bf16_weight) = seen
    assert torch.equal(tokens, x.bfloat16()) and torch.equal(bf16_weight, weight.bfloat16())
    torch.testing.assert_close(bf16.float(), exact, rtol=0.05, atol=0.05)


def test_map_head_by_default_has_an_rms_norm_and_no_bias():
    head = MAPHead(32, 4, 48)
    assert isinstance(head.layernorm, nn.RMSNorm)
    assert not [name for name, _ in head.named_parameters() if "bias" in name]


def test_swiglu_by_hand():
    layer = SwiGLU(6, 10).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    gate, up = layer.gate_up_proj.weight[:10], layer.gate_up_proj.weight[10:]
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())

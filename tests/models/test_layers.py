"""The MAP head against SigLIP's own, and the SwiGLU by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slap_fast.models.layers import MAPHead, SwiGLU

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
    pooled = head(x, torch.tensor([0, *LENGTHS]).cumsum(0).int())
    for i, clip in enumerate(x.split(LENGTHS)):
        if len(clip):
            torch.testing.assert_close(
                pooled[i], siglip_head(clip[None])[0], rtol=1e-10, atol=1e-10
            )


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

"""Triton's attention on every memory layout of its inputs and gradients."""

from __future__ import annotations

import pytest
import torch

from slap_fast.kernels import attention as triton_attention
from tests.helpers.packs import DEVICE, Pack, assert_same_bits

LAYOUTS = {
    "heads_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "step_2": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "offset": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
    "padded_heads": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_inputs(kernel, layout):
    pack = Pack([1, 40])
    for name in "qkv":
        pack.values[name] = LAYOUTS[layout](pack.values[name]).clone()
    inputs = [LAYOUTS[layout](x.detach()).requires_grad_() for x in pack.inputs()]
    before = [x.detach().clone() for x in inputs]
    actual = pack.run(triton_attention, inputs)
    assert_same_bits(actual, pack.run(triton_attention, pack.inputs()))
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x[:41], old[:41])


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed", "all_one"])
def test_layouts_of_the_gradients(kernel, layout):
    pack = Pack([1, 40])
    inputs = pack.inputs()
    plain = pack.run(triton_attention, inputs)
    dout = pack.values["dout"]
    if layout == "all_one":
        pack.values["dout"] = torch.ones((), device=DEVICE).expand(dout.shape)
        plain = pack.run(triton_attention, inputs)
        pack.values["dout"] = torch.ones_like(dout)
    elif layout == "transposed":
        pack.values["dout"] = dout.transpose(0, 2).contiguous().transpose(0, 2)
    else:
        pack.values["dout"] = LAYOUTS[layout](dout)
        plain = plain if layout != "expanded" else None
    actual = pack.run(triton_attention, inputs)
    if plain is None:
        pack.values["dout"] = pack.values["dout"].contiguous()
        plain = pack.run(triton_attention, inputs)
    assert_same_bits(actual, plain)


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_misaligned_after_aligned(offset):
    pack = Pack([40], dtype=torch.float16)
    expected = pack.run(triton_attention, pack.inputs())
    shifted = [
        torch.cat((x.new_zeros(offset), x.detach().flatten()))[offset:].view(x.shape)
        for x in pack.inputs()
    ]
    assert_same_bits(pack.run(triton_attention, [x.requires_grad_() for x in shifted]), expected)

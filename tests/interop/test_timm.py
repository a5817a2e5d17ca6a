"""patch() of timm's vision transformers, with rotary embeddings and without."""

import pytest
import torch
from torch import nn

import slap_fast
from tests.helpers.torchvision_stub import import_timm

PACKED = {
    "vit_tiny_patch16_224": True,
    "vit_small_patch14_dinov2": True,
    "vit_base_patch16_siglip_224": True,
    "deit3_small_patch16_224": True,
    "vit_wee_patch16_reg1_gap_256": True,
    "aimv2_large_patch14_224": True,
    "eva02_tiny_patch14_224": "also takes rope",
    "vit_small_patch16_rope_mixed_224": "also takes rope",
    "vit_small_patch16_rope_224": "also takes rope",
    "vit_small_patch16_dinov3": "also takes rope",
    "beit_base_patch16_224": "also takes shared_rel_pos_bias",
    "cait_xxs24_224": "computes something else",
    "samvit_base_patch16": "raises ",
}
"""Whether a model's attention is packed, or why not."""


@pytest.fixture(scope="module")
def timm():
    try:
        return import_timm()
    except ImportError:
        pytest.skip("timm is not installed")


def outcome(model, image):
    model.zero_grad()
    out = model(image)
    out.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.detach(), torch.cat(grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_a_model_keeps_its_numbers(name, timm):
    model = timm.create_model(name, depth=2).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    image = torch.randn(2, *model.default_cfg["input_size"])
    expected = outcome(model, image)
    report = slap_fast.patch(model)
    if PACKED[name] is True:
        assert report.changed("attention") == 2
    else:
        assert not report.changed("attention") and PACKED[name] in str(report)
    for actual, own in zip(outcome(model, image), expected, strict=True):
        assert (actual - own).norm() <= 1e-5 * own.norm()
    model.train()
    model(image).sum().backward()
    model.eval()
    report.undo()
    assert torch.equal(outcome(model, image)[0], expected[0])


@pytest.mark.slow
def test_padded_images_of_any_size_keep_the_models_own_attention(timm):
    model = timm.create_model("naflexvit_base_patch16_gap").eval()
    patches = {
        "patches": torch.randn(2, 12, 16 * 16 * 3),
        "patch_coord": torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"))
        .flatten(1)
        .T.expand(2, 12, 2),
        "patch_valid": torch.arange(12) < torch.tensor([[12], [7]]),
    }
    with torch.no_grad():
        expected = model(patches)
        assert slap_fast.patch(model).changed("attention") == 12
        torch.testing.assert_close(model(patches), expected)

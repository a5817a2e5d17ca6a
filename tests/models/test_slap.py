"""The model: its size, packing isolation in values and gradients, masks, weights of zero."""

import dataclasses

import pytest
import torch

from slap_fast.config import slap_base
from slap_fast.data.patches import pack_patches
from slap_fast.models.slap import SlapModel, Teacher
from tests.helpers.small_model import (
    ALL,
    SMALL,
    assert_packed_equals_one_clip_at_a_time,
    losses_and_gradients,
    make_batch,
    small_model,
)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("student_pass", ["shared", "separate"])
def test_packed_equals_one_clip_at_a_time(dtype, bound, student_pass):
    assert_packed_equals_one_clip_at_a_time(dtype, bound, student_pass)


def test_no_output_is_a_parameter():
    """FSDP hooks each output of a forward; a parameter would keep the hooks of all of them."""
    model = small_model()
    outputs = model(make_batch(torch.float64), ALL)
    parameters = set(map(id, model.parameters()))
    assert not [name for name, x in outputs._asdict().items() if id(x) in parameters]


def test_every_loss_reaches_the_audio_encoder_and_its_own_parts():
    model = small_model()
    _, _, gradients = losses_and_gradients(model, Teacher(model), [make_batch(torch.float64)])
    parts = {
        "contrastive": ("audio_encoder", "audio_head", "text_encoder", "text_head", "log_logit"),
        "ssl": ("audio_encoder", "prototype_head"),
        "caption": ("audio_encoder", "caption_decoder"),
    }
    for name, prefixes in parts.items():
        reached = {n.split(".")[0] for n, g in gradients[name].items() if g.abs().max() > 0}
        assert {p for p in reached if p.startswith(prefixes)} == reached
        assert all(any(r.startswith(p) for r in reached) for p in prefixes)


def test_masked_patches_are_not_seen():
    model, batch = small_model(), make_batch(torch.float64)
    changed = batch.audio.patches.clone()
    changed[batch.mask_indices] = 1e3
    before = model.audio_encoder(batch.audio, batch.mask_indices)
    after = model.audio_encoder(batch.audio._replace(patches=changed), batch.mask_indices)
    assert torch.equal(before, after)
    assert not torch.allclose(before, model.audio_encoder(batch.audio))


def test_teacher_sees_every_patch_and_carries_no_gradient():
    model, batch = small_model(), make_batch(torch.float64)
    teacher = Teacher(model)
    expected = model.prototype_head(model.audio_encoder(batch.audio)[batch.mask_indices])
    features, prototypes = teacher(batch)
    assert torch.allclose(features, expected)
    assert torch.allclose(prototypes, model.prototype_head.prototypes)
    assert not any(x.requires_grad for x in (features, prototypes, *teacher.parameters()))


def test_teacher_follows_the_student_by_its_momentum():
    model = small_model()
    teacher = Teacher(model)
    before = teacher.audio_encoder.mask_token.clone()
    with torch.no_grad():
        model.audio_encoder.mask_token.add_(1.0)
    teacher.update(model, 0.9)
    assert torch.allclose(teacher.audio_encoder.mask_token, before + 0.1)


@pytest.mark.parametrize("left_out", ["contrastive", "ssl", "caption"])
def test_a_loss_of_weight_zero_is_not_computed(left_out):
    weights = dataclasses.replace(ALL, **{left_out: 0.0})
    model = small_model()

    def fail(*_):
        raise AssertionError("was called")

    part = {"contrastive": "text_encoder", "ssl": "prototype_head", "caption": "caption_decoder"}
    getattr(model, part[left_out]).register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="was called"):
        model(make_batch(torch.float64), ALL)
    model(make_batch(torch.float64), weights)


def test_local_layers_see_a_window_and_global_ones_the_clip():
    far, column = 40, 4
    patches = torch.randn(far * column, 256, dtype=torch.float64)

    def reach(global_every: int) -> int:
        audio_config = dataclasses.replace(SMALL.audio, num_layers=1, global_every=global_every)
        model = small_model(config=dataclasses.replace(SMALL, audio=audio_config))
        changed = patches.clone()
        changed[0] += 1.0
        a, b = (model.audio_encoder(pack_patches([x], SMALL.mel)) for x in (patches, changed))
        return int((a != b).any(1).nonzero().max())

    assert reach(3) == SMALL.audio.local_window * column
    assert reach(1) == far * column - 1


def test_slap_base_is_the_papers_model():
    config = slap_base().model
    with torch.device("meta"):
        model = SlapModel(config)
    c, m = 768, 3072
    block = 2 * c + 4 * c * c + 3 * c * m
    assert num_parameters(model.audio_encoder) == 12 * block + 256 * c + 2 * c
    kinds = [layer.attention.window_size for layer in model.audio_encoder.layers]
    assert kinds == [(48, 48), (48, 48), (-1, -1)] * 4
    assert model.audio_encoder.layers[0].attention.num_heads == 12
    bert_block = 4 * c * c + 3 * c * 1152 + 2 * c
    assert num_parameters(model.text_encoder) == 50_368 * c + 22 * bert_block + c
    assert len(model.caption_decoder.layers) == 8
    assert {layer.attention.num_heads for layer in model.caption_decoder.layers} == {8}
    assert model.caption_decoder.token_embedding.weight.shape == (50_368, 512)
    assert model.prototype_head.weight.shape == (8192, 256)
    assert not [n for n, _ in model.audio_encoder.named_parameters() if n.endswith("bias")]


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_towers_of_two_widths_meet_in_a_projection():
    text = dataclasses.replace(SMALL.text, hidden_size=48)
    with pytest.raises(ValueError, match=r"model\.embed_dim"):
        dataclasses.replace(SMALL, text=text)
    model = small_model(config=dataclasses.replace(SMALL, text=text, embed_dim=16))
    out = model(make_batch(torch.float64), ALL)
    assert out.audio_features.shape == out.text_features.shape == (4, 16)
    norms = torch.cat([out.audio_features, out.text_features]).norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms))

"""A small model, a batch of four clips, and their results for any packing."""

import dataclasses

import torch

from slap_fast import losses
from slap_fast.config import (
    AudioEncoderConfig,
    CaptionDecoderConfig,
    LossConfig,
    ModelConfig,
    SelfDistillationConfig,
    TextEncoderConfig,
)
from slap_fast.data.patches import pack_patches
from slap_fast.losses import self_distillation
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.packed import PackedBatch, PackedText

SMALL = ModelConfig(
    audio=AudioEncoderConfig(
        hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48, local_window=2
    ),
    text=TextEncoderConfig(
        vocab_size=40, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48,
        local_attention=4,
    ),
    caption=CaptionDecoderConfig(hidden_size=24, num_layers=2, num_heads=2, intermediate_size=32),
    ssl=SelfDistillationConfig(prototypes=12, head_hidden_size=20, bottleneck_size=8),
)  # fmt: skip
ALL = LossConfig()
CLIPS = [24, 4, 40, 12]
CAPTIONS = [[2, 7, 8, 9, 3], [2, 3], [2, 30, 31, 5, 6, 7, 8, 3], [2, 11, 3]]


def small_model(dtype: torch.dtype = torch.float64, config: ModelConfig = SMALL) -> SlapModel:
    torch.manual_seed(0)
    return SlapModel(config).to(dtype)


def make_batch(dtype: torch.dtype, clips: list[int] | None = None) -> PackedBatch:
    """Some of the four clips as one packed batch; half of each clip's patches are masked."""
    members = list(range(len(CLIPS))) if clips is None else clips
    patches, masks, start = [], [], 0
    for i in members:
        generator = torch.Generator().manual_seed(i)
        patches.append(torch.randn(CLIPS[i], 256, generator=generator, dtype=dtype))
        masks.append(
            torch.randperm(CLIPS[i], generator=generator)[: CLIPS[i] // 2].sort()[0] + start
        )
        start += CLIPS[i]
    text = PackedText.from_ids([CAPTIONS[i] for i in members])
    audio = pack_patches(patches, SMALL.mel)
    groups = torch.arange(len(members))[:, None]
    labels, masks = text.next_token_labels(), torch.cat(masks)
    return PackedBatch(audio, text, labels, groups, masks, len(members), start)


def three_losses(model, outputs, teacher_output, labels):
    """The losses by name; ``teacher_output`` is features and prototypes."""
    pair = (outputs["audio_features"], outputs["text_features"])
    targets = self_distillation.sinkhorn(*teacher_output, 0.05, 3)
    return {
        "contrastive": losses.contrastive_loss(*pair, model.logit_scale),
        "ssl": self_distillation.self_distillation_loss(
            outputs["student_features"], model.prototype_head.prototypes, targets, 0.1
        )[0],
        "caption": losses.caption_loss(
            outputs["caption_hidden"], model.caption_decoder.token_embedding.weight, labels
        ),
    }


PER_CLIP = ("audio_features", "text_features", "caption_hidden", "student_features")
"""Outputs whose rows belong to single clips."""


def losses_and_gradients(model, teacher, batches):
    """Outputs by name, losses by name, and the parameters' gradients by loss, of the batches' clips
    however they are packed."""
    model.zero_grad()
    parts = [model(batch, ALL) for batch in batches]
    outputs = {name: torch.cat([getattr(part, name) for part in parts]) for name in PER_CLIP}
    teacher_features = torch.cat([teacher(batch)[0] for batch in batches])
    teacher_output = teacher_features, teacher.prototype_head.prototypes
    labels = torch.cat([batch.labels for batch in batches])
    values = three_losses(model, outputs, teacher_output, labels)
    gradients = {}
    for name, value in values.items():
        model.zero_grad()
        value.backward(retain_graph=True)
        gradients[name] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
    return outputs, values, gradients


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def assert_packed_equals_one_clip_at_a_time(dtype, bound, student_pass, device="cpu"):
    """Compares outputs, losses and gradients of one pack with those of four."""
    ssl = dataclasses.replace(SMALL.ssl, student_pass=student_pass)
    model = small_model(dtype, dataclasses.replace(SMALL, ssl=ssl)).to(device)
    teacher = Teacher(model)
    packed = losses_and_gradients(model, teacher, [make_batch(dtype).to(device)])
    single = [make_batch(dtype, [i]).to(device) for i in range(len(CLIPS))]
    alone = losses_and_gradients(model, teacher, single)
    for name in PER_CLIP:
        assert relative(packed[0][name], alone[0][name]) <= bound, name
    for name in packed[1]:
        assert relative(packed[1][name], alone[1][name]) <= bound, name
        assert packed[2][name].keys() == alone[2][name].keys()
        # Relative to all of a loss's gradient: single parameters' may be rounding noise about zero.
        norm = torch.stack([g.norm() for g in alone[2][name].values()]).norm()
        for parameter, gradient in packed[2][name].items():
            error = (gradient - alone[2][name][parameter]).norm() / norm
            assert error <= bound, (name, parameter)

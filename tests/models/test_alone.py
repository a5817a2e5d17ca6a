"""Each part of the model alone, in any training loop: built, trained a step, reloaded."""

import copy

import pytest
import torch
from torch import nn

from slap_fast import losses, ops
from slap_fast.config import AudioEncoderConfig, LossConfig, MelConfig, slap_tiny
from slap_fast.losses import self_distillation
from slap_fast.models import (
    Attention,
    AudioEncoder,
    AudioTower,
    MAPHead,
    RMSNorm,
    Segments,
    SlapModel,
    SwiGLU,
    Teacher,
)
from slap_fast.packed import PackedBatch, PackedText, starts_of

LENGTHS = [12, 1, 0, 30]
SEGMENTS = Segments(starts_of(LENGTHS), max(LENGTHS))
TINY = AudioEncoderConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, local_window=2
)
SAMPLES = torch.tensor([4_000, 16_000, 700])


def tokens():
    return torch.randn(sum(LENGTHS), 16)


def rope():
    return ops.rope_tables(torch.arange(sum(LENGTHS)).int()[:, None], 8)


PARTS = {
    "Attention": (lambda: Attention(16, 2), lambda m: m(tokens(), rope(), SEGMENTS)),
    "MAPHead": (lambda: MAPHead(16, 2, 32), lambda m: m(tokens(), SEGMENTS.cu_seqlens)),
    "RMSNorm": (lambda: RMSNorm(16), lambda m: m(tokens())),
    "SwiGLU": (lambda: SwiGLU(16, 24), lambda m: m(tokens())),
    "AudioEncoder": (
        lambda: AudioEncoder(TINY, MelConfig()),
        lambda m: m(ops.mel_patches(torch.randn(20_000), torch.tensor([0, 4_000, 20_000]))),
    ),
    "AudioTower": (
        lambda: AudioTower(TINY, embed_dim=8),
        lambda m: m(torch.randn(int(SAMPLES.sum())), SAMPLES),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_trains_and_reloads_alone(name):
    make, call = PARTS[name]
    part, state = make(), torch.random.get_rng_state()
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    before = copy.deepcopy(part.state_dict())
    call(part).square().sum().backward() if name != "AudioTower" else call(part)[0, 0].backward()
    optimizer.step()
    after = part.state_dict()
    unmoved = {n for n, x in before.items() if torch.equal(x, after[n])}
    assert unmoved <= {"mask_token", "encoder.mask_token"}  # only masking uses it
    twin = make()
    twin.load_state_dict(after)
    torch.random.set_rng_state(state)
    output = call(twin)
    torch.random.set_rng_state(state)
    assert torch.equal(output, call(part))


def test_rms_norm_has_torch_state_dict_names():
    assert list(RMSNorm(4).state_dict()) == list(nn.RMSNorm(4).state_dict())


def test_a_clip_in_the_tower_is_the_same_alone():
    tower = AudioTower(TINY)
    waveform = torch.randn(int(SAMPLES.sum()))
    together = tower(waveform, SAMPLES)
    for i, clip in enumerate(waveform.split(SAMPLES.tolist())):
        alone = tower(clip, torch.tensor([len(clip)]))[0]
        assert (together[i] - alone).norm() < 1e-5


def test_a_batch_from_lengths_feeds_the_model_and_the_losses():
    lengths, text_lengths = [8, 20], [3, 5]
    ids = torch.tensor([2, 7, 3, 2, 8, 9, 10, 3])
    batch = PackedBatch.from_lengths(
        torch.randn(28, 256), lengths, ids, text_lengths, mask_indices=torch.tensor([1, 4, 20])
    )
    assert batch.audio.coords[9:13].tolist() == [[0, 1], [0, 2], [0, 3], [1, 0]]
    assert batch.labels.tolist() == [7, 3, -100, 8, 9, 10, 3, -100]
    model = SlapModel(slap_tiny().model)
    teacher = Teacher(model)
    out = model(batch, LossConfig())
    targets = self_distillation.sinkhorn(*teacher(batch), 0.07, 3)
    student = out.student_features, out.prototypes
    total = (
        losses.contrastive_loss(
            out.audio_features, out.text_features, out.logit_scale, groups=batch.groups
        )
        + self_distillation.self_distillation_loss(*student, targets, 0.1)[0]
        + 0.5 * losses.caption_loss(out.caption_hidden, out.caption_weight, batch.labels)
    )
    total.backward()
    assert total.isfinite()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = teacher.audio_encoder.mask_token.clone()
    teacher.update(model, 0.5)
    assert torch.allclose(
        teacher.audio_encoder.mask_token, (before + model.audio_encoder.mask_token) / 2
    )


def test_a_batch_without_masks_has_none():
    batch = PackedBatch.from_lengths(torch.zeros(8, 256), [8], torch.tensor([2, 3]), [2])
    assert (len(batch.mask_indices), batch.masked_clips, batch.masked_tokens) == (0, 0, 0)
    assert len(batch.masked_audio.patches) == 0


@pytest.mark.parametrize(
    ("lengths", "text_lengths", "message"),
    [
        ([7], [2], "lengths: found a sum of 7, expected 8 rows"),
        ([8], [3], "text_lengths: found a sum of 3, expected 2 rows"),
        ([4, 4], [2], "text_lengths: found 1 captions, expected 2"),
    ],
)
def test_lengths_that_do_not_fit_are_named(lengths, text_lengths, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_lengths(torch.zeros(8, 256), lengths, torch.tensor([2, 3]), text_lengths)


def test_text_from_a_padded_batch():
    ids = torch.tensor([[2, 7, 3, 0], [2, 8, 9, 3], [0, 0, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    packed = PackedText.from_padded(ids, mask)
    expected = PackedText.from_ids([[2, 7, 3], [2, 8, 9, 3], [2, 3]])
    for a, b in zip(packed[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_changes_nothing_but_memory():
    audio = ops.mel_patches(torch.randn(20_000), torch.tensor([0, 4_000, 20_000]))
    encoder = AudioEncoder(TINY, MelConfig())
    grads = []
    for encoder.gradient_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(audio).square().sum().backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        )
    assert torch.equal(*grads)

"""FLOPs counted from sizes against torch's own count of a step."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from slap_fast import losses
from slap_fast.config import LossConfig
from slap_fast.diagnostics import flops
from slap_fast.losses import self_distillation
from slap_fast.models.slap import Teacher
from tests.helpers.small_model import SMALL, make_batch, small_model

ALONE = {"contrastive": 0.0, "ssl": 0.0, "caption": 0.0}
SINKHORN = 3
"""Iterations."""

FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dout, q, k, v, *_, **__: 2 * sdpa_flop_count(q, k, v)
    ),
}
"""torch's counter does not know a CPU's attention; recomputation does not count."""


def counted(run, formulas):
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def inside(operation):
    """Counts an operation of ours by running it again under the counter."""

    def count(*arguments, out_val):
        cpu = torch._C.DispatchKey.CPU
        return counted(lambda: operation.default._op_dk(cpu, *arguments), {})

    count._get_raw = True
    return operation, count


LOSSES = dict(
    map(
        inside,
        (
            torch.ops.slap_fast.linear_cross_entropy,
            torch.ops.slap_fast.linear_distillation,
            torch.ops.slap_fast.sinkhorn,
            torch.ops.slap_fast.linear_group_cross_entropy,
        ),
    )
)


def step(model, batch, loss):
    """Runs a forward and a backward."""
    teacher = Teacher(model)
    out = model(batch, loss)
    values = {}
    if loss.contrastive:
        pair = out.audio_features, out.text_features
        values["contrastive"] = losses.contrastive_loss(*pair, out.logit_scale)
    if loss.ssl:
        targets = self_distillation.sinkhorn(*teacher(batch), 0.05, SINKHORN)
        student = out.student_features, out.prototypes
        values["ssl"], _ = self_distillation.self_distillation_loss(*student, targets, 0.1)
    if loss.caption:
        decoded = out.caption_hidden, out.caption_weight
        values["caption"] = losses.caption_loss(*decoded, batch.labels)
    losses.total_loss(values, loss).backward()


@pytest.mark.parametrize("student_pass", ["shared", "separate"])
@pytest.mark.parametrize("name", ["contrastive", "ssl", "caption", "all"])
def test_a_step_has_the_flops_that_torch_counts(name, student_pass):
    loss = LossConfig() if name == "all" else LossConfig(**{**ALONE, name: 1.0})
    # All layers global, so that the reference computes exactly the pairs that count.
    config = dataclasses.replace(
        SMALL,
        audio=dataclasses.replace(SMALL.audio, global_every=1),
        text=dataclasses.replace(SMALL.text, global_every=1),
        ssl=dataclasses.replace(SMALL.ssl, student_pass=student_pass),
    )
    model = small_model(torch.float32, config)
    model.freeze_unused(loss)
    batch = make_batch(torch.float32)
    shape = flops.StepShape.of(batch)
    expected = flops.step(config, loss, shape)
    if loss.caption:  # the reference computes what the causal mask hides
        hidden = sum(n * (n - 1) // 2 for n in shape.text)
        expected += 3 * 2 * 4 * config.caption.hidden_size * hidden
    if loss.ssl:  # the teacher's scores are recomputed for each iteration and for the loss
        expected += SINKHORN * 2 * shape.masked * config.ssl.bottleneck_size * config.ssl.prototypes
    assert counted(lambda: step(model, batch, loss), FLASH | LOSSES) == pytest.approx(
        expected, rel=1e-3
    )


def test_a_window_leaves_the_pairs_that_a_mask_leaves():
    for length, side in ((1, 0), (5, 2), (9, 20), (40, 7)):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        assert flops._pairs(length, side) == int((distance.abs() <= side).sum())
    assert flops._pairs(6, None) == 36

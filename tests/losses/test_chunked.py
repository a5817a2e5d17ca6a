"""Losses a chunk of rows at a time: memory, the registered operations, compiled chunks, repeats."""

from __future__ import annotations

import pytest
import torch

from slap_fast import losses
from slap_fast.losses.chunked import GroupTargets, LabelTargets, TeacherTargets
from tests.helpers.losses import normal, unit
from tests.helpers.memory import Peak

ROWS, WIDTH, COLUMNS = 256, 8, 200
LOSSES = {
    "ssl": lambda x, y, size: losses.self_distillation_loss(
        x, y, losses.sinkhorn(x.roll(1, 0), y.flip(0), 0.1, 3, chunk_size=size), 0.1, size
    )[0],
    "caption": lambda x, y, size: losses.caption_loss(x, y, torch.arange(ROWS) % 200, -1, size),
    "contrastive": lambda x, y, size: losses.contrastive_loss(
        x, x.flip(0), torch.tensor(9.0), chunk_size=size
    ),
    "sigmoid": lambda x, y, size: losses.sigmoid_contrastive_loss(
        x, x.flip(0), torch.tensor(9.0), torch.tensor(-9.0), chunk_size=size
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_full_logits_are_never_materialised(loss):
    def peak(size):
        rows = unit(ROWS, WIDTH, seed=1).requires_grad_()
        columns = unit(COLUMNS, WIDTH, seed=2).requires_grad_()
        with Peak() as memory:
            loss(rows, columns, size).backward()
        return memory.most

    all_logits = ROWS * COLUMNS
    assert peak(8) < all_logits / 2 < all_logits < peak(ROWS)


def transposed(x):
    """The same values, column by column."""
    return x.T.contiguous().T


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed], ids=lambda f: f.__name__)
def test_opcheck(layout, figure):
    """Of each operation that this package registers for its losses."""
    ops = torch.ops.slap_fast
    for seed in figure("K6", ci=1, soak=10):
        rows, features = (layout(normal(11, 6, seed=seed + i).float()) for i in (0, 1))
        matrix, prototypes = (layout(normal(5, 6, seed=seed + i).float()) for i in (2, 3))
        bias, temperature = normal(5, seed=seed + 4).float(), torch.tensor(0.1)
        groups = GroupTargets(torch.arange(11)[:, None] % 5, torch.arange(5)[:, None])
        cases = {
            ops.linear_cross_entropy: LabelTargets(groups.row_groups[:, 0], -100),
            ops.linear_distillation: TeacherTargets(features, prototypes, bias, temperature, 0.2),
            ops.linear_group_cross_entropy: groups,
            ops.linear_group_sigmoid: groups,
        }
        for op, targets in cases.items():
            inputs = rows.requires_grad_(), matrix.requires_grad_()
            options = 4, torch.float32, True, False
            torch.library.opcheck(op.default, (*inputs, *targets, *options))
        sinkhorn = features, prototypes, temperature, 3, 4, False
        torch.library.opcheck(ops.sinkhorn.default, sinkhorn)


LABELS = torch.arange(10) % 7
COLUMN_GROUPS = torch.tensor([[0], [1], [1], [2], [3], [4], [5]])
GROUPS = GroupTargets(COLUMN_GROUPS[LABELS], COLUMN_GROUPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("cross_entropy", LabelTargets(LABELS.where(LABELS != 3, -100), -100)),
        (
            "distillation",
            TeacherTargets(
                unit(10, 6, seed=3),
                unit(7, 6, seed=4),
                normal(7, seed=5).float(),
                torch.tensor(0.07),
                0.1,
            ),
        ),
        ("group_cross_entropy", GROUPS),
        ("group_sigmoid", GROUPS),
    ],
    ids=["cross_entropy", "distillation", "group_cross_entropy", "group_sigmoid"],
)
def test_a_compiled_chunk_equals_the_eager_one(name, targets, dtype):
    """As on a GPU under torch.compile; for products in bf16 too."""
    rows, matrix = unit(10, 6, seed=1).float(), unit(7, 6, seed=2).float()
    if name == "distillation":
        features, prototypes, *others = targets
        targets = TeacherTargets(features.to(dtype), prototypes.to(dtype), *others)
    run = getattr(torch.ops.slap_fast, f"linear_{name}").default
    eager, compiled = (
        run(rows, matrix, *targets, 4, dtype, True, compiled) for compiled in (False, True)
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_repeats_are_bitwise_equal():
    def gradients():
        hidden, weight = normal(300, 32).requires_grad_(), normal(50, 32, seed=1).requires_grad_()
        targets = losses.sinkhorn(normal(300, 32, seed=2), normal(50, 32), 0.1, 3, None, 64)
        loss, _ = losses.self_distillation_loss(hidden, weight, targets, 0.1, chunk_size=64)
        loss = loss + losses.caption_loss(hidden, weight, torch.arange(300) % 50, chunk_size=64)
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (hidden, weight))])

    assert torch.equal(gradients(), gradients())

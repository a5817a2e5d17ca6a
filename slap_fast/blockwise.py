"""Losses of a product that is too large to exist at once: rows @ matrix.T, a block at a time.

A block's gradient is made right beside its loss, so that no logits are kept or computed again: with
the product itself that is three products in all, where checkpointed blocks need four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [n, V] fp32 or fp64, targets [n, ...]) -> (loss 0-d, its gradient [n, V]).

The logits are its own to write over: a block is large, and its memory is most of what a loss needs.
"""


def linear_loss(
    rows: Tensor,
    matrix: Tensor,
    targets: Tensor,
    loss_and_slope: LossAndSlope,
    block_size: int,
) -> Tensor:
    """loss_and_slope(rows @ matrix.T, targets), a sum over rows, with few logits at a time.

    Args:
        rows: [N, D]; N may be 0.
        matrix: [V, D].
        targets: [N, ...], without gradient.
        loss_and_slope: of one block; autograd does not look inside.
        block_size: rows whose logits exist at a time.

    Returns:
        0-d fp32 (fp64 for fp64), differentiable once. The products follow autocast.
    """
    learns = torch.is_grad_enabled() and (rows.requires_grad or matrix.requires_grad)
    return _LinearLoss.apply(rows, matrix, targets, loss_and_slope, block_size, learns)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        matrix: Tensor,
        targets: Tensor,
        loss_and_slope: LossAndSlope,
        block_size: int,
        learns: bool,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = rows.new_zeros((), dtype=wide)
        drows = []
        dmatrix = torch.zeros_like(matrix, dtype=wide) if learns else None
        for x, y in zip(rows.split(block_size), targets.split(block_size), strict=True):
            logits = F.linear(x, matrix)
            low = logits.dtype
            block_loss, slope = loss_and_slope(logits.to(wide), y)
            loss = loss + block_loss
            if learns:
                slope = slope.to(low)
                drows.append((slope @ matrix).to(x.dtype))
                if low == wide:
                    torch.addmm(dmatrix, slope.T, x, out=dmatrix)  # no second one of its size
                else:
                    dmatrix += slope.T @ x
            del logits, slope  # or the next block's would exist beside this one's
        if learns:
            ctx.save_for_backward(torch.cat(drows), dmatrix.to(matrix.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        drows, dmatrix = ctx.saved_tensors
        return dloss.to(drows.dtype) * drows, dloss.to(dmatrix.dtype) * dmatrix, *(None,) * 4


def cross_entropy(ignore_index: int) -> LossAndSlope:
    """Of class numbers, int64 [n]; a row labelled ``ignore_index`` has neither loss nor slope."""

    def loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        counts = (labels != ignore_index)[:, None]
        labels = labels[:, None].where(counts, 0)
        logits -= logits.amax(1, keepdim=True)
        wanted = logits.gather(1, labels)
        total = logits.exp_().sum(1, keepdim=True)
        loss = (total.log() - wanted).where(counts, 0.0).sum()
        slope = logits.mul_(counts / total)
        return loss, slope.scatter_add_(1, labels, -counts.to(slope.dtype))

    return loss_and_slope


def soft_cross_entropy(
    targets: Callable[[Tensor], Tensor], temperature: float = 1.0
) -> LossAndSlope:
    """Of probabilities over the columns, which ``targets`` makes of the block's: [n, V]."""

    def loss_and_slope(logits: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = logits.div_(temperature).log_softmax(1)
        wanted = targets(block).to(logits.dtype)
        loss = -torch.linalg.vecdot(wanted, log_probs).sum()
        slope = log_probs.exp_().mul_(wanted.sum(1, keepdim=True)).sub_(wanted).div_(temperature)
        return loss, slope

    return loss_and_slope


def pairwise_sigmoid(positives: Callable[[Tensor], Tensor]) -> LossAndSlope:
    """Of independent yes or no, bool [n, V], which ``positives`` makes of the block's."""

    def loss_and_slope(logits: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.where(positives(block), 1.0, -1.0).to(logits.dtype)
        loss = -F.logsigmoid(signs * logits).sum()
        return loss, -signs * torch.sigmoid(-signs * logits)

    return loss_and_slope

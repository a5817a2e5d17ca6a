"""Losses of a product that is too large to exist at once: rows @ matrix.T, a block at a time.

A block's gradient is made right beside its loss, so that no logits are kept or computed again: with
the product itself that is three products in all, where checkpointed blocks need four.

Each loss is a registered operation, one node for torch.compile: how many blocks there are changes
from pack to pack, and a graph of them would be made anew. On a GPU what happens to a block's logits
is a graph of its own then: in bf16 it moves about 8 bytes a logit, the same operations one by one
about 50 (counted, not measured yet). On a CPU it would take twice the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast.kernels._library import register


@functools.cache
def as_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for tensors of any size; not before it is needed, as that is slow."""
    return torch.compile(function, dynamic=True)


LossAndSlope = Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
"""(logits [n, V] fp32 or fp64, targets of its rows and of all columns, an option) -> (loss 0-d, its
gradient [n, V]).

The logits are its own to write over: a block is large, and its memory is most of what a loss needs.
"""


def _linear_loss(name: str, loss_and_slope: LossAndSlope) -> Callable[..., Tensor]:
    """The loss of ``rows @ matrix.T``, summed over rows, as a function of what a block needs."""

    def of_block(
        logits: Tensor, targets: Tensor, columns: Tensor | None, option: float, wide: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        loss, slope = loss_and_slope(logits.to(wide), targets, columns, option)
        return loss, slope.to(logits.dtype)

    def run(
        rows: Tensor,
        matrix: Tensor,
        targets: Tensor,
        columns: Tensor | None,
        option: float,
        block_size: int,
        dtype: torch.dtype,
        learns: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_of = as_graph(of_block) if compiled else of_block
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = rows.new_zeros((), dtype=wide)
        low = matrix.to(dtype)
        drows = torch.empty_like(rows) if learns else rows.new_empty(0)
        dmatrix = matrix.new_zeros(matrix.shape if learns else 0, dtype=wide)
        for start in range(0, len(rows), block_size):
            block = slice(start, start + block_size)
            x = rows[block].to(dtype)
            logits = F.linear(x, low)
            block_loss, slope = loss_of(logits, targets[block], columns, option, wide)
            loss += block_loss
            if learns:
                drows[block] = slope @ low
                if dtype == wide:
                    torch.addmm(dmatrix, slope.T, x, out=dmatrix)  # no second one of its size
                else:
                    dmatrix += slope.T @ x
            del logits, slope  # or the next block's would exist beside this one's
        return loss, drows, dmatrix.to(matrix.dtype)

    def fake(rows: Tensor, matrix: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss = rows.new_empty((), dtype=torch.promote_types(rows.dtype, torch.float32))
        *_, learns, _ = rest
        return loss, *(x.new_empty(x.shape if learns else 0) for x in (rows, matrix))

    op = register(
        f"{name}(Tensor rows, Tensor matrix, Tensor targets, Tensor? columns, float option, "
        "SymInt block_size, ScalarType dtype, bool learns, bool compiled) "
        "-> (Tensor, Tensor, Tensor)",
        run,
        fake,
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])

    @torch.autograd.function.once_differentiable
    def gradient(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        drows, dmatrix = ctx.saved_tensors
        return dloss.to(drows.dtype) * drows, dloss.to(dmatrix.dtype) * dmatrix, *(None,) * 7

    torch.library.register_autograd(f"slap_fast::{name}", gradient, setup_context=keep)

    def loss(
        rows: Tensor,
        matrix: Tensor,
        targets: Tensor,
        block_size: int,
        *,
        columns: Tensor | None = None,
        option: float = 0.0,
    ) -> Tensor:
        device, low = rows.device.type, rows.dtype
        if torch.is_autocast_enabled(device) and low != torch.float64:
            low = torch.get_autocast_dtype(device)
        learns = torch.is_grad_enabled() and (rows.requires_grad or matrix.requires_grad)
        options = option, block_size, low, learns, rows.is_cuda and torch.compiler.is_compiling()
        return op(rows, matrix, targets, columns, *options)[0]

    return loss


def _cross_entropy(
    logits: Tensor, labels: Tensor, columns: None, ignore_index: float
) -> tuple[Tensor, Tensor]:
    counts = (labels != ignore_index)[:, None]
    labels = labels[:, None].where(counts, 0)
    logits -= logits.amax(1, keepdim=True)
    wanted = logits.gather(1, labels)
    total = logits.exp_().sum(1, keepdim=True)
    loss = (total.log() - wanted).where(counts, 0.0).sum()
    slope = logits.mul_(counts / total)
    return loss, slope.scatter_add_(1, labels, -counts.to(slope.dtype))


def _soft_cross_entropy(
    logits: Tensor, wanted: Tensor, columns: None, temperature: float
) -> tuple[Tensor, Tensor]:
    log_probs = logits.div_(temperature).log_softmax(1)
    wanted = wanted.to(logits.dtype)
    loss = -torch.linalg.vecdot(wanted, log_probs).sum()
    slope = log_probs.exp_().mul_(wanted.sum(1, keepdim=True)).sub_(wanted).div_(temperature)
    return loss, slope


def _group_cross_entropy(
    logits: Tensor, groups: Tensor, columns: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    positives = _positives(groups, columns).to(logits.dtype)
    return _soft_cross_entropy(logits, positives / positives.sum(1, keepdim=True), None, 1.0)


def _group_sigmoid(
    logits: Tensor, groups: Tensor, columns: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    signs = torch.where(_positives(groups, columns), 1.0, -1.0).to(logits.dtype)
    loss = -F.logsigmoid(signs * logits).sum()
    return loss, -signs * torch.sigmoid(-signs * logits)


def _positives(row_groups: Tensor, column_groups: Tensor) -> Tensor:
    """bool [n, B]: whether a row [n, M] and a column [B, L] have a number in common."""
    return (row_groups[:, :, None, None] == column_groups).any(3).any(1)


cross_entropy = _linear_loss("linear_cross_entropy", _cross_entropy)
"""Of class numbers, int64 [N]; a row labelled with the option has neither loss nor slope."""

soft_cross_entropy = _linear_loss("linear_soft_cross_entropy", _soft_cross_entropy)
"""Of probabilities [N, V]; the option is the temperature."""

group_cross_entropy = _linear_loss("linear_group_cross_entropy", _group_cross_entropy)
"""Uniform over the columns [V, L] whose groups have a number in common with the row's [N, M]."""

group_sigmoid = _linear_loss("linear_group_sigmoid", _group_sigmoid)
"""Of independent yes or no: whether the groups of row and column have a number in common."""

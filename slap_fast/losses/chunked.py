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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast.precision import compute_dtype
from slap_fast.registration import register


@functools.cache
def as_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for tensors of any size; not before it is needed, as that is slow."""
    return torch.compile(function, dynamic=True)


def in_graph(x: Tensor) -> bool:
    """Whether what happens to a block of ``x`` is to be a graph."""
    return x.is_cuda and torch.compiler.is_compiling()


LossAndSlope = Callable[[Tensor, Tensor, list[Tensor], float], tuple[Tensor, Tensor]]
"""(logits [n, V] fp32 or fp64, targets of its rows and of all columns, option) -> (sums over the
rows [S], the loss first; the gradient of the loss [n, V]).

The logits are its own to write over: a block is large, and its memory is most of what a loss needs.
"""


def _linear_loss(
    name: str, loss_and_slope: LossAndSlope, num_sums: Callable[[int], int] = lambda v: 1
) -> Callable[..., Tensor]:
    """The loss of ``rows @ matrix.T``, summed over rows, as a function of what a block needs; S is
    ``num_sums(V)``."""

    def of_block(
        logits: Tensor,
        targets: Tensor,
        columns: list[Tensor],
        option: float,
        wide: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        sums, slope = loss_and_slope(logits.to(wide), targets, columns, option)
        return sums, slope.to(logits.dtype)

    def run(
        rows: Tensor,
        matrix: Tensor,
        targets: Tensor,
        columns: list[Tensor],
        option: float,
        block_size: int,
        dtype: torch.dtype,
        learns: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_of = as_graph(of_block) if compiled else of_block
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = rows.new_zeros(num_sums(len(matrix)), dtype=wide)
        low = matrix.to(dtype)
        drows = rows.new_empty(rows.shape if learns else 0)  # contiguous, as the fake one
        dmatrix = matrix.new_zeros(matrix.shape if learns else 0, dtype=wide)
        # Or autocast would round a sum of products, too.
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), block_size):
                block = slice(start, start + block_size)
                x = rows[block].to(dtype)
                logits = F.linear(x, low)
                block_sums, slope = loss_of(logits, targets[block], columns, option, wide)
                sums += block_sums
                if learns:
                    drows[block] = slope @ low
                    if dtype == wide:
                        torch.addmm(dmatrix, slope.T, x, out=dmatrix)  # no second one of its size
                    else:
                        dmatrix += slope.T @ x
                del logits, slope  # or the next block's would exist beside this one's
        return sums, drows, dmatrix.to(matrix.dtype)

    def fake(rows: Tensor, matrix: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = rows.new_empty(num_sums(matrix.shape[0]), dtype=wide)
        *_, learns, _ = rest
        return sums, *(x.new_empty(x.shape if learns else 0) for x in (rows, matrix))

    op = register(
        f"{name}(Tensor rows, Tensor matrix, Tensor targets, Tensor[] columns, float option, "
        "SymInt block_size, ScalarType dtype, bool learns, bool compiled) "
        "-> (Tensor, Tensor, Tensor)",
        run,
        fake,
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.none = [None] * len(inputs[3])

    @torch.autograd.function.once_differentiable
    def gradient(ctx: Any, dsums: Tensor, *_: Any) -> tuple[Any, ...]:
        drows, dmatrix = ctx.saved_tensors
        dloss = dsums[0]
        found = dloss.to(drows.dtype) * drows, dloss.to(dmatrix.dtype) * dmatrix
        return *found, None, ctx.none, *(None,) * 5

    torch.library.register_autograd(f"slap_fast::{name}", gradient, setup_context=keep)

    def loss(
        rows: Tensor,
        matrix: Tensor,
        targets: Tensor,
        block_size: int,
        *,
        columns: Sequence[Tensor] = (),
        option: float = 0.0,
    ) -> Tensor:
        learns = torch.is_grad_enabled() and (rows.requires_grad or matrix.requires_grad)
        how = block_size, compute_dtype(rows), learns, in_graph(rows)
        return op(rows, matrix, targets, [*columns], option, *how)[0]

    return loss


def _cross_entropy(
    logits: Tensor, labels: Tensor, columns: list[Tensor], ignore_index: float
) -> tuple[Tensor, Tensor]:
    counts = (labels != ignore_index)[:, None]
    labels = labels[:, None].where(counts, 0)
    logits -= logits.amax(1, keepdim=True)
    wanted = logits.gather(1, labels)
    total = logits.exp_().sum(1, keepdim=True)
    loss = (total.log() - wanted).where(counts, 0.0).sum()
    slope = logits.mul_(counts / total)
    return loss[None], slope.scatter_add_(1, labels, -counts.to(slope.dtype))


def _distillation(
    logits: Tensor, features: Tensor, columns: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    prototypes, bias, teacher_temperature = columns
    scores = F.linear(features, prototypes).to(logits.dtype)
    wanted = scores.div_(teacher_temperature).sub_(bias).log_softmax(1)
    used = wanted.new_zeros(wanted.shape[1]).scatter_(0, wanted.argmax(1), 1.0)
    entropy = torch.special.entr(wanted.exp_(), out=scores).sum()
    del scores
    log_probs = logits.div_(temperature).log_softmax(1)
    loss = -torch.mul(wanted, log_probs, out=logits).sum()
    slope = log_probs.exp_().sub_(wanted).div_(temperature)
    return torch.cat([torch.stack([loss, entropy]), wanted.sum(0), used]), slope


def _group_cross_entropy(
    logits: Tensor, groups: Tensor, columns: list[Tensor], _: float
) -> tuple[Tensor, Tensor]:
    wanted = _positives(groups, *columns).to(logits.dtype)
    wanted /= wanted.sum(1, keepdim=True)
    log_probs = logits.log_softmax(1)
    loss = -torch.linalg.vecdot(wanted, log_probs).sum()
    return loss[None], log_probs.exp_().sub_(wanted)


def _group_sigmoid(
    logits: Tensor, groups: Tensor, columns: list[Tensor], _: float
) -> tuple[Tensor, Tensor]:
    signs = torch.where(_positives(groups, *columns), 1.0, -1.0).to(logits.dtype)
    loss = -F.logsigmoid(signs * logits).sum()
    return loss[None], -signs * torch.sigmoid(-signs * logits)


def _positives(row_groups: Tensor, column_groups: Tensor) -> Tensor:
    """bool [n, B]: whether a row [n, M] and a column [B, L] have a number in common."""
    return (row_groups[:, :, None, None] == column_groups).any(3).any(1)


cross_entropy = _linear_loss("linear_cross_entropy", _cross_entropy)
"""Of class numbers, int64 [N]; a row labelled with the option has neither loss nor slope."""

distillation = _linear_loss("linear_distillation", _distillation, lambda v: 2 + 2 * v)
"""Of the probabilities that a teacher's features [N, D] give: the columns have its matrix [V, D],
the bias [V] that is taken off its scores, and its temperature, 0-d; the option is the student's.

Sums: the loss, the entropy of the targets, the targets [V], and above 0 where a column is the
largest of a row [V].
"""

group_cross_entropy = _linear_loss("linear_group_cross_entropy", _group_cross_entropy)
"""Uniform over the columns [V, L] whose groups have a number in common with the row's [N, M]."""

group_sigmoid = _linear_loss("linear_group_sigmoid", _group_sigmoid)
"""Of independent yes or no: whether the groups of row and column have a number in common."""

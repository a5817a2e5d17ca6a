"""Losses of ``rows @ matrix.T`` [N, V], too large to exist at once: one chunk of rows at a time.

A chunk's gradient is computed beside its loss, so that no logits are kept or recomputed: three
products in all, where checkpointed chunks need four.

Each loss is a registered operation, one node for torch.compile: the number of chunks changes from
pack to pack, and a graph of them would be recompiled. On a GPU the work on a chunk's logits is then
a graph of its own: in bf16 it moves about 8 bytes a logit, the same operations one by one about 50
(counted, not measured yet). On a CPU it would take twice the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast import compilation
from slap_fast.precision import accumulation_dtype, compute_dtype
from slap_fast.registration import register


class LabelTargets(NamedTuple):
    """The class of each row."""

    labels: Tensor  # int64 [N], 0 .. V - 1 or ignore_index
    ignore_index: int  # the label of rows without loss and gradient


class TeacherTargets(NamedTuple):
    """softmax(features @ prototypes.T / teacher_temperature - bias)."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [V, D]
    bias: Tensor  # [V]
    teacher_temperature: Tensor  # 0-d
    student_temperature: float  # divides the logits


class GroupTargets(NamedTuple):
    """A row and a column match when their groups have a number in common."""

    row_groups: Tensor  # int64 [N, M]
    column_groups: Tensor  # int64 [V, L]


SCHEMA_TYPES = {Tensor: "Tensor", float: "float", int: "int"}


def _linear_loss(
    name: str,
    targets_type: type[tuple[Any, ...]],
    loss_and_gradient: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
    num_sums: Callable[[int], int] = lambda num_columns: 1,
) -> Callable[..., Tensor]:
    """A loss of ``rows @ matrix.T``, summed over rows, as a registered operation.

    Args:
        name: of the operation.
        targets_type: a NamedTuple; its first field has an entry per row, the others are of all.
        loss_and_gradient: (logits [n, V] in the accumulation dtype, targets of these rows) -> (sums
            over the rows [S], the loss first; gradient of the loss [n, V]). It may overwrite the
            logits: a chunk is most of the memory that a loss needs.
        num_sums: V -> S.
    """
    fields = get_type_hints(targets_type)

    def of_chunk(logits: Tensor, targets: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sums, dlogits = loss_and_gradient(logits.to(dtype), targets)
        return sums, dlogits.to(logits.dtype)

    def run(rows: Tensor, matrix: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        row_targets, *shared_targets = arguments[: len(fields)]
        chunk_size, compute_dtype, needs_grad, compiled = arguments[len(fields) :]
        run_chunk = compilation.compile_for_any_size(of_chunk) if compiled else of_chunk
        dtype = accumulation_dtype(rows)
        sums = rows.new_zeros(num_sums(len(matrix)), dtype=dtype)
        factor = matrix.to(compute_dtype)
        drows = rows.new_empty(rows.shape if needs_grad else 0)  # contiguous, as the fake one
        dmatrix = matrix.new_zeros(matrix.shape if needs_grad else 0, dtype=dtype)
        # Autocast would round the accumulated products, too.
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), chunk_size):
                chunk = slice(start, start + chunk_size)
                targets = targets_type(row_targets[chunk], *shared_targets)
                x = rows[chunk].to(compute_dtype)
                logits = F.linear(x, factor)
                chunk_sums, dlogits = run_chunk(logits, targets, dtype)
                sums += chunk_sums
                if needs_grad:
                    drows[chunk] = dlogits @ factor
                    if compute_dtype == dtype:
                        torch.addmm(dmatrix, dlogits.T, x, out=dmatrix)  # without a temporary
                    else:
                        dmatrix += dlogits.T @ x
                del logits, dlogits  # or they would exist beside the next chunk's
        return sums, drows, dmatrix.to(matrix.dtype)

    def fake(rows: Tensor, matrix: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        sums = rows.new_empty(num_sums(matrix.shape[0]), dtype=accumulation_dtype(rows))
        *_, needs_grad, _ = arguments
        return sums, *(x.new_empty(x.shape if needs_grad else 0) for x in (rows, matrix))

    schema = ", ".join(f"{SCHEMA_TYPES[hint]} {field}" for field, hint in fields.items())
    op = register(
        f"{name}(Tensor rows, Tensor matrix, {schema}, SymInt chunk_size, "
        "ScalarType compute_dtype, bool needs_grad, bool compiled) -> (Tensor, Tensor, Tensor)",
        run,
        fake,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])

    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dsums: Tensor, *_: Any) -> tuple[Any, ...]:
        dloss = dsums[0]
        gradients = (dloss.to(x.dtype) * x for x in ctx.saved_tensors)
        return *gradients, *(None,) * (len(fields) + 4)

    torch.library.register_autograd(f"slap_fast::{name}", backward, setup_context=save)

    def loss(rows: Tensor, matrix: Tensor, targets: tuple[Any, ...], chunk_size: int) -> Tensor:
        needs_grad = torch.is_grad_enabled() and (rows.requires_grad or matrix.requires_grad)
        options = compute_dtype(rows), needs_grad, compilation.compiles_chunks(rows)
        return op(rows, matrix, *targets, chunk_size, *options)[0]

    return loss


def _cross_entropy(logits: Tensor, targets: LabelTargets) -> tuple[Tensor, Tensor]:
    labels, ignore_index = targets
    counts = (labels != ignore_index)[:, None]
    labels = labels[:, None].where(counts, 0)
    logits -= logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, labels)
    total = logits.exp_().sum(1, keepdim=True)
    loss = (total.log() - label_logits).where(counts, 0.0).sum()
    dlogits = logits.mul_(counts / total)
    return loss[None], dlogits.scatter_add_(1, labels, -counts.to(dlogits.dtype))


def _distillation(logits: Tensor, targets: TeacherTargets) -> tuple[Tensor, Tensor]:
    features, prototypes, bias, teacher_temperature, student_temperature = targets
    scores = F.linear(features, prototypes).to(logits.dtype)
    teacher_probs = scores.div_(teacher_temperature).sub_(bias).log_softmax(1)
    used = teacher_probs.new_zeros(teacher_probs.shape[1]).scatter_(0, teacher_probs.argmax(1), 1.0)
    entropy = torch.special.entr(teacher_probs.exp_(), out=scores).sum()
    del scores
    log_probs = logits.div_(student_temperature).log_softmax(1)
    loss = -torch.mul(teacher_probs, log_probs, out=logits).sum()
    dlogits = log_probs.exp_().sub_(teacher_probs).div_(student_temperature)
    return torch.cat([torch.stack([loss, entropy]), teacher_probs.sum(0), used]), dlogits


def _group_cross_entropy(logits: Tensor, targets: GroupTargets) -> tuple[Tensor, Tensor]:
    target_probs = _matches(targets).to(logits.dtype)
    target_probs /= target_probs.sum(1, keepdim=True)
    log_probs = logits.log_softmax(1)
    loss = -torch.linalg.vecdot(target_probs, log_probs).sum()
    return loss[None], log_probs.exp_().sub_(target_probs)


def _group_sigmoid(logits: Tensor, targets: GroupTargets) -> tuple[Tensor, Tensor]:
    signs = torch.where(_matches(targets), 1.0, -1.0).to(logits.dtype)
    loss = -F.logsigmoid(signs * logits).sum()
    return loss[None], -signs * torch.sigmoid(-signs * logits)


def _matches(targets: GroupTargets) -> Tensor:
    """bool [n, V]."""
    return (targets.row_groups[:, :, None, None] == targets.column_groups).any(3).any(1)


cross_entropy = _linear_loss("linear_cross_entropy", LabelTargets, _cross_entropy)
"""Cross-entropy of class numbers; sums: the loss."""

distillation = _linear_loss(
    "linear_distillation", TeacherTargets, _distillation, lambda num_columns: 2 + 2 * num_columns
)
"""Cross-entropy of a teacher's probabilities; sums: the loss, the entropy of the targets, the
targets [V], and above 0 where a column is the largest of a row [V]."""

group_cross_entropy = _linear_loss("linear_group_cross_entropy", GroupTargets, _group_cross_entropy)
"""Cross-entropy of targets that are uniform over the columns that match; sums: the loss."""

group_sigmoid = _linear_loss("linear_group_sigmoid", GroupTargets, _group_sigmoid)
"""Binary cross-entropy of whether row and column match; sums: the loss."""

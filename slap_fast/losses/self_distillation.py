"""Self-distillation over prototypes (DINO, arXiv 2104.14294; iBOT, arXiv 2111.07832).

Student and teacher each score M masked patches against K prototypes. At 131,072 patches and 8,192
prototypes one matrix of scores is 4 GB in fp32, and a textbook loss keeps several: scores, targets
and what lies between them. Here none of them ever exists: Sinkhorn's targets are a softmax of
scores minus a bias for each prototype, so K numbers describe them, and a chunk's scores are
recomputed wherever they are needed. That is one more product for each iteration, 0.1 % of a step's
FLOPs.

Shapes: M masked patches, K prototypes, D features. Softmaxes and sums run in fp32 (fp64 when given
fp64), under autocast too; products follow autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast import compilation
from slap_fast.losses import chunked
from slap_fast.losses.chunked import TeacherTargets
from slap_fast.precision import accumulation_dtype, compute_dtype
from slap_fast.registration import register

CHUNK_ROWS = 4096
"""Rows of scores that exist at a time."""


class Targets(NamedTuple):
    """Target probabilities softmax(features @ prototypes.T / temperature - bias), no gradient."""

    features: Tensor
    """[M, D], in the compute dtype."""
    prototypes: Tensor
    """[K, D], likewise."""
    bias: Tensor
    """[K] fp32 or fp64."""
    temperature: Tensor
    """0-d, likewise: as a number, each value would be a recompilation."""

    def probabilities(self) -> Tensor:
        """[M, K], not chunked."""
        scores = F.linear(self.features, self.prototypes).to(self.bias.dtype)
        return (scores / self.temperature - self.bias).softmax(1)


@torch.no_grad()
def sinkhorn(
    features: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    iterations: int,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
    chunk_size: int = CHUNK_ROWS,
    compiled: bool = False,
) -> Targets:
    """Targets that use every prototype about equally (SwAV, arXiv 2006.09882, section 3.1).

    Each iteration normalises the prototypes over the rows, then the rows over the prototypes, in
    logarithms: exp(scores / temperature) itself overflows.

    Args:
        features: [M, D], the teacher's; M may be 0.
        prototypes: [K, D], the teacher's; scores are features @ prototypes.T.
        temperature: divides the scores; 0-d, where it is a tensor.
        iterations: at least 1.
        over_ranks: the logsumexp over ranks, [K] -> [K], which makes their rows one batch
            (:func:`slap_fast.distributed.logsumexp`); such a call does not compile.
        chunk_size: rows of scores that exist at a time.
        compiled: compiles the work on a chunk; on a GPU it is compiled whenever the call is.

    Returns:
        Targets whose rows sum to 1, and whose columns to about M / K.

    Raises:
        ValueError: iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations: found {iterations}, expected at least 1")
    features, prototypes, temperature = _inputs(features, prototypes, temperature)
    compiled = compiled or compilation.compiles_chunks(features)
    arguments = features, prototypes, temperature, iterations, chunk_size, compiled
    bias = _bias(*arguments, over_ranks) if over_ranks else _bias_op(*arguments)
    return Targets(features, prototypes, bias, temperature)


def _bias(
    features: Tensor,
    prototypes: Tensor,
    temperature: Tensor,
    iterations: int,
    chunk_size: int,
    compiled: bool,
    over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """[K]: logarithm of the product of all that a column of exp(scores) is divided by."""
    chunk_masses = compilation.compile_for_any_size(_masses) if compiled else _masses
    bias, dtype = None, accumulation_dtype(features)
    for _ in range(iterations):
        masses = features.new_full((len(prototypes),), -math.inf, dtype=dtype)
        for chunk in features.split(chunk_size):
            masses = torch.logaddexp(masses, chunk_masses(chunk, prototypes, temperature, bias))
        masses = over_ranks(masses)
        bias = masses if bias is None else bias + masses
    return bias


def _masses(
    features: Tensor, prototypes: Tensor, temperature: Tensor, bias: Tensor | None
) -> Tensor:
    """Logarithms of the columns' sums over a chunk's rows, [K]; with a bias, its rows sum to 1."""
    scores = F.linear(features, prototypes).to(accumulation_dtype(features)).div_(temperature)
    if bias is not None:
        scores = scores.sub_(bias).log_softmax(1)
    return scores.logsumexp(0)


_bias_op = register(
    "sinkhorn(Tensor features, Tensor prototypes, Tensor temperature, int iterations, "
    "SymInt chunk_size, bool compiled) -> Tensor",
    _bias,
    lambda features, prototypes, *_: features.new_empty(
        prototypes.shape[0], dtype=accumulation_dtype(features)
    ),
)


@torch.no_grad()
def centered_targets(
    features: Tensor, prototypes: Tensor, center: Tensor, temperature: float | Tensor
) -> Targets:
    """softmax((scores - center) / temperature) over the prototypes (DINO).

    features [M, D] and prototypes [K, D] are the teacher's, center [K].
    """
    features, prototypes, temperature = _inputs(features, prototypes, temperature)
    return Targets(features, prototypes, center / temperature, temperature)


@torch.no_grad()
def mean_scores(targets: Targets) -> Tensor:
    """The mean over the M rows of the teacher's scores, towards which DINO's centre moves, [K] fp32
    (fp64 for fp64); NaN for M = 0."""
    features, prototypes = (x.to(targets.bias.dtype) for x in targets[:2])
    with torch.autocast(features.device.type, enabled=False):
        return prototypes @ features.mean(0)


def self_distillation_loss(
    student_features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    temperature: float,
    chunk_size: int = CHUNK_ROWS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the teacher's targets and the student's softmax over prototypes (iBOT).

    Args:
        student_features: [M, D], at the masked patches, any norm above 0; for M = 0 the loss and
            its gradients are 0.
        prototypes: [K, D], the student's.
        targets: of the same rows (:func:`sinkhorn`, :func:`centered_targets`).
        temperature: divides the student's scores.
        chunk_size: rows of scores that exist at a time.

    Returns:
        The loss, 0-d fp32 (fp64 for fp64), in nats: the mean over the M rows. And health figures
        for :func:`collapsed`: 0-d tensors without gradient, each NaN when M < 2:

        ``prototype_use``: share of min(M, K) prototypes that are the largest of some row, 0 .. 1.
        ``target_entropy``: mean entropy of the rows / ln K; 0 one-hot, 1 uniform.
        ``marginal_entropy``: entropy of the mean row / ln K; 0 one prototype for all, 1 equal use.
        ``feature_std``: root mean square distance of the unit-norm features from their mean; 0
        constant, 1 spread over the sphere (SimSiam's, arXiv 2011.10566, times sqrt(D)).

    Raises:
        ValueError: shapes that do not fit.
    """
    target_sizes, sizes = list(map(len, targets[:2])), [len(student_features), len(prototypes)]
    if target_sizes != sizes:
        raise ValueError(f"targets: found {target_sizes} rows and prototypes, expected {sizes}")
    all_targets = TeacherTargets(*targets, student_temperature=temperature)
    sums = chunked.distillation(student_features, prototypes, all_targets, chunk_size)
    return sums[0] / max(1, len(student_features)), _health(sums.detach(), student_features)


@torch.no_grad()
def _health(sums: Tensor, student_features: Tensor) -> dict[str, Tensor]:
    """Health figures from the sums of :data:`slap_fast.losses.chunked.distillation`."""
    rows = len(student_features)
    marginal, used = sums[2:].chunk(2)
    features = F.normalize(student_features.to(sums.dtype), dim=1)
    log_k = math.log(len(marginal))
    health = {
        "prototype_use": (used > 0).sum() / max(1, min(rows, len(used))),
        "target_entropy": sums[1] / (max(1, rows) * log_k),
        "marginal_entropy": torch.special.entr(marginal / max(1, rows)).sum() / log_k,
        "feature_std": (features - features.mean(0)).square().sum(1).mean().sqrt(),
    }
    return health if rows > 1 else {k: torch.full_like(v, math.nan) for k, v in health.items()}


def collapsed(health: Mapping[str, Tensor]) -> Tensor:
    """Whether health figures of :func:`self_distillation_loss`, or their means, show a collapse.

    They do when any of these holds; a NaN never does:
    ``feature_std`` < 0.01: the student's features hardly depend on the input (mean cosine above
    0.9999);
    ``marginal_entropy`` < 0.05: one prototype takes (almost) every row;
    ``marginal_entropy - target_entropy`` < 0.001: the mutual information of row and prototype, in
    units of ln K; 0 exactly when all rows have the same target, uniform or not.

    Returns a 0-d bool tensor (a bool, when given floats).
    """
    information = health["marginal_entropy"] - health["target_entropy"]
    return (
        (health["feature_std"] < 0.01) | (health["marginal_entropy"] < 0.05) | (information < 1e-3)
    )


def _inputs(
    features: Tensor, prototypes: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both in the compute dtype, without gradient, and the temperature in that of the softmax."""
    dtype = compute_dtype(features)
    features, prototypes = (x.detach().to(dtype) for x in (features, prototypes))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(features.device, accumulation_dtype(features))
    else:  # no copy from the host
        temperature = features.new_full((), temperature, dtype=accumulation_dtype(features))
    return features, prototypes, temperature

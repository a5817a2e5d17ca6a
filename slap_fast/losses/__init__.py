"""The losses of SLAP (arXiv 2601.12594, section 3) as pure functions: tensors in, scalar out.

Softmaxes and sums run in fp32 (fp64 when given fp64), under autocast too. Nothing here reads a
value back to the host (Liger's caption loss does), so all of it compiles without a graph break.
Every loss is a mean over the rows it is given; a caller that splits a batch weights the parts by
their rows.
"""

from slap_fast.losses.captioning import caption_loss
from slap_fast.losses.contrastive import contrastive_loss, sigmoid_contrastive_loss
from slap_fast.losses.self_distillation import (
    Targets,
    centered_targets,
    collapsed,
    mean_scores,
    self_distillation_loss,
    sinkhorn,
)
from slap_fast.losses.total import LossWeights, total_loss

__all__ = [
    "LossWeights",
    "Targets",
    "caption_loss",
    "centered_targets",
    "collapsed",
    "contrastive_loss",
    "mean_scores",
    "self_distillation_loss",
    "sigmoid_contrastive_loss",
    "sinkhorn",
    "total_loss",
]

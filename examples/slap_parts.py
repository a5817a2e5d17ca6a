"""What the loops of this folder share: a small run on the built-in sounds, and SLAP's losses.

The model, the batches, the losses and the teacher are slap-fast's; the loop is yours.
"""

import torch
from torch.optim.lr_scheduler import LambdaLR

from slap_fast import losses
from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.loader import TrainSteps
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.losses import self_distillation
from slap_fast.models import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.optimizer import make_optimizer
from slap_fast.training.schedules import learning_rate, teacher_temperature

CONFIG = override(slap_tiny(), {"steps": 20, "batch_size": 8, "warmup_steps": 5})


def make_model(config: TrainConfig) -> SlapModel:
    """The student, from the config's seed."""
    torch.manual_seed(config.seed)
    model = SlapModel(config.model)
    model.freeze_unused(config.loss)
    return model


def make_steps(config: TrainConfig) -> TrainSteps:
    """A dataset whose item i is step i: one packed batch in ``.batches``."""
    sounds = BuiltinClips(SoundSet("train", 64, max_seconds=3.0))
    return TrainSteps(sounds, CaptionTokenizer.load(None, config.model.text.max_tokens), config)


def make_optimization(model: SlapModel, config: TrainConfig):
    """AdamW without decay on vectors, and warm-up with a cosine."""
    optimizer = make_optimizer(model, config)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate(config, step) / config.lr)


def slap_loss(out, teacher, batch, config: TrainConfig, step: int) -> torch.Tensor:
    """The weighted sum of the three losses; ``out`` is the student's output for the batch."""
    ssl = config.model.ssl
    targets = self_distillation.sinkhorn(
        *teacher(batch), teacher_temperature(config, step), ssl.sinkhorn_iterations
    )
    values = {
        "contrastive": losses.contrastive_loss(
            out.audio_features, out.text_features, out.logit_scale, groups=batch.groups
        ),
        "ssl": self_distillation.self_distillation_loss(
            out.student_features, out.prototypes, targets, ssl.student_temperature
        )[0],
        "caption": losses.caption_loss(out.caption_hidden, out.caption_weight, batch.labels),
    }
    return losses.total_loss(values, config.loss)

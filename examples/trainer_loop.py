"""SLAP in transformers' Trainer: python examples/trainer_loop.py

On two ranks: torchrun --nproc-per-node 2 examples/trainer_loop.py (each contrasts its own clips).
Several GPUs need torchrun: without it the Trainer splits a pack's tensors, which only fit together.
Needs: pip install 'slap-fast[trainer]'
"""

import tempfile

import torch
from slap_parts import CONFIG, make_model, make_optimization, make_steps, slap_loss
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from slap_fast.models import Teacher
from slap_fast.training.schedules import ema_momentum


class Student(nn.Module):
    """The model without its ``config``, which the Trainer would write transformers' keys into."""

    def __init__(self, slap):
        super().__init__()
        self.slap = slap

    def forward(self, batch):
        return self.slap(batch)


class SlapTrainer(Trainer):
    """The Trainer with SLAP's losses and its teacher."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.teacher = Teacher(self.model.slap).to(self.args.device)
        self.losses = []
        self.add_callback(Momentum(self))

    def _prepare_inputs(self, inputs):
        # The Trainer's own takes a named tuple apart.
        return inputs.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out, step = model(inputs), self.state.global_step
        loss = slap_loss(out, self.teacher, inputs, self.config, step)
        self.losses.append(loss.item())
        return (loss, out) if return_outputs else loss


class Momentum(TrainerCallback):
    """Moves the teacher after each step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        momentum = ema_momentum(self.trainer.config, state.global_step - 1)
        self.trainer.teacher.update(self.trainer.accelerator.unwrap_model(model).slap, momentum)


def train(config=CONFIG):
    """The trainer, after its run."""
    model = make_model(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,  # an item is a whole step's batch already
            max_steps=config.steps,
            max_grad_norm=config.clip_grad_norm,
            use_cpu=not torch.cuda.is_available(),  # or two ranks on a CPU are two runs
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SlapTrainer(
            config,
            model=Student(model),
            args=arguments,
            train_dataset=make_steps(config),
            data_collator=lambda items: items[0].batches[0],
            optimizers=make_optimization(model, config),
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    for step, loss in enumerate(train().losses):
        print(f"step {step}  loss {loss:.4f}", flush=True)

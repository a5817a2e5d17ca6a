"""SLAP in an accelerate loop: python examples/accelerate_loop.py

On two ranks: torchrun --nproc-per-node 2 examples/accelerate_loop.py (each contrasts its own
clips). Needs: pip install 'slap-fast[accelerate]'
"""

import torch
from accelerate import Accelerator
from slap_parts import CONFIG, make_model, make_optimization, make_steps, slap_loss
from torch.utils.data import DataLoader

from slap_fast.models import Teacher
from slap_fast.training.schedules import ema_momentum


def train(config=CONFIG):
    """Yields this rank's loss of each step, and the model."""
    # Without cpu=True it takes two ranks on a CPU for two runs.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = make_model(config)
    teacher = Teacher(model).to(accelerator.device)
    optimizer, schedule = make_optimization(model, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: an item is a whole step already, so each rank takes every n-th.
    data, rank, world = make_steps(config), accelerator.process_index, accelerator.num_processes
    loader = DataLoader(data, sampler=range(rank, len(data) * world, world), batch_size=None)
    for step, item in enumerate(loader):
        batch = item.batches[0].to(accelerator.device)
        loss = slap_loss(model(batch), teacher, batch, config, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        teacher.update(accelerator.unwrap_model(model), ema_momentum(config, step))
        yield loss.item(), accelerator.unwrap_model(model)
    accelerator.end_training()


if __name__ == "__main__":
    for step, (loss, _) in enumerate(train()):
        print(f"step {step}  loss {loss:.4f}", flush=True)

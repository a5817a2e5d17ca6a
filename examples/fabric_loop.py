"""SLAP in a Lightning Fabric loop: python examples/fabric_loop.py

On two ranks: torchrun --nproc-per-node 2 examples/fabric_loop.py (each contrasts its own clips).
Needs: pip install 'slap-fast[fabric]'
"""

import os

from lightning_fabric import Fabric
from slap_parts import CONFIG, make_model, make_optimization, make_steps, slap_loss
from torch.utils.data import DataLoader

from slap_fast.models import Teacher
from slap_fast.training.schedules import ema_momentum


def train(config=CONFIG):
    """Yields this rank's loss of each step, and the model."""
    fabric = Fabric(devices=int(os.environ.get("WORLD_SIZE", "1")))
    fabric.launch()
    student = make_model(config)
    teacher = Teacher(student).to(fabric.device)
    optimizer, schedule = make_optimization(student, config)
    model, optimizer = fabric.setup(student, optimizer)
    # Not set up: an item is a whole step already, so each rank takes every n-th.
    data, rank, world = make_steps(config), fabric.global_rank, fabric.world_size
    loader = DataLoader(data, sampler=range(rank, len(data) * world, world), batch_size=None)
    for step, item in enumerate(loader):
        batch = item.batches[0].to(fabric.device)
        loss = slap_loss(model(batch), teacher, batch, config, step)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=config.clip_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        teacher.update(student, ema_momentum(config, step))
        yield loss.item(), student


if __name__ == "__main__":
    for step, (loss, _) in enumerate(train()):
        print(f"step {step}  loss {loss:.4f}", flush=True)

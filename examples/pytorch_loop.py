"""SLAP in a bare PyTorch loop: python examples/pytorch_loop.py

On two ranks: torchrun --nproc-per-node 2 examples/pytorch_loop.py (each contrasts its own clips).
"""

import os

import torch
import torch.distributed as dist
from slap_parts import CONFIG, make_model, make_optimization, make_steps, slap_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from slap_fast.models import Teacher
from slap_fast.training.schedules import ema_momentum


def train(config=CONFIG):
    """Yields this rank's loss of each step, and the model."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    model = make_model(config).to(device)
    teacher = Teacher(model)
    optimizer, schedule = make_optimization(model, config)
    student = DistributedDataParallel(model) if world > 1 else model
    data = make_steps(config)
    loader = DataLoader(data, sampler=range(rank, len(data) * world, world), batch_size=None)
    for step, item in enumerate(loader):
        batch = item.batches[0].to(device)
        loss = slap_loss(student(batch), teacher, batch, config, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        teacher.update(model, ema_momentum(config, step))
        yield loss.item(), model


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group()
    for step, (loss, _) in enumerate(train()):
        print(f"step {step}  loss {loss:.4f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()

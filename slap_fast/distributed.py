"""Many ranks: the process group, messages between ranks, and tensors that are spread over them.

``torchrun`` starts the ranks (docs/distributed.md). Without it there is one, no process group
exists, and every function returns its argument. Losses, gradients and figures follow one rule: each
rank computes its value such that the *mean over ranks* is that of the whole batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group(timeout: float, device: torch.device) -> Iterator[None]:
    """Joins the process group of the ranks that torchrun started, and leaves it at the end.

    Args:
        timeout: seconds that a rank waits for the others before it gives up.
        device: the kind of device that all ranks train on.

    Raises:
        ValueError: the machine has fewer GPUs than ranks that need one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Messages between ranks stay on the CPU: gloo sends them without a wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= devices:
            raise ValueError(
                f"LOCAL_RANK: found {local_rank}, expected below {devices}, as this machine has "
                f"{devices} GPU: torchrun --nproc-per-node={devices}"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield
    # Not after an error: NCCL would wait here for ranks that wait for this one, without a message.
    dist.destroy_process_group()


def rank() -> int:
    """0 .. world_size() - 1; rank 0 logs, evaluates and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def located_errors(where: Callable[[], str]) -> Iterator[None]:
    """Adds the rank and ``where()``, such as "step 12", to a RuntimeError raised inside."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1:
            raise
        raise RuntimeError(f"rank {rank()}, {where()}: {error}") from error


def exchange(value: Any) -> list[Any]:
    """The JSON values of all ranks, by rank, over the CPU. Waits for all ranks."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    counts = _gather(torch.tensor([len(data)]), [1] * world_size()).tolist()
    return [json.loads(bytes(text.tolist())) for text in _gather(data, counts).split(counts)]


def barrier() -> None:
    """Waits, on the CPU, for all ranks."""
    exchange(None)


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks in the order of the ranks, with gradient.

    The backward sums a row's gradients over ranks. When every rank computes the same loss of all
    rows, and gradients are averaged over ranks, each parameter gets the gradient of that loss.

    Args:
        x: [counts[rank], ...]; the other axes are equal on all ranks.
        counts: rows of each rank.

    Returns:
        [sum(counts), ...].
    """
    return x if world_size() == 1 else _GatherRows.apply(x, counts)


def gather_groups(groups: Tensor, counts: Sequence[int]) -> Tensor:
    """:class:`PackedBatch`'s ``groups`` of all ranks, int64 [sum(counts), the widest M]."""
    if world_size() == 1:
        return groups
    missing = max(exchange(groups.shape[1])) - groups.shape[1]
    return _gather(torch.cat([groups, groups[:, :1].expand(-1, missing)], 1), counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = list(counts)
        return _gather(x, ctx.counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[rank()], None


def _gather(x: Tensor, counts: list[int]) -> Tensor:
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def logsumexp(x: Tensor) -> Tensor:
    """The logsumexp over ranks of each element of x [K]."""
    if world_size() == 1:
        return x
    maximum = x.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    total = (x - maximum).exp()
    dist.all_reduce(total)
    return maximum + total.log()


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of tensors of one shape; all ranks have the same names."""
    if world_size() == 1:
        return values
    stacked = torch.stack([value.to(torch.float64) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked / world_size(), strict=True))


def replicate(model: nn.Module) -> nn.Module:
    """The model, in DDP where there are several ranks: its gradients are averaged over them."""
    if world_size() == 1:
        return model
    # The only buffers are constants of ModernBERT's rotary embedding.
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    return nn.parallel.DistributedDataParallel(model, **options)


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, *, trains: bool
) -> None:
    """FSDP2: spreads parameters over the ranks, and with them gradients and optimiser, in place.

    Each of the ``blocks`` is gathered for its own forward and backward, all other parameters at
    once; so nothing but a block's own forward may use its parameters. A model that ``trains`` keeps
    the other parameters until its backward, as losses use some of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=not trains)


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """For a backward: DDP averages gradients in the last one of a step only."""
    is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if is_ddp and not last else nullcontext()


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor unsharded, on all ranks together; any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, of which every rank has all, on the device of ``other`` and sharded as it is."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

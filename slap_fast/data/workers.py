"""Worker processes of a loader, which outlive signals to the group but not their parent.

Their tensors come through shared memory where it has room for them (a Docker container has 64 MB of
it unless it is told otherwise), else through pipes, which hold no file descriptors either.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_convert

from slap_fast import distributed

SHARED_MEMORY = "/dev/shm"
SEMAPHORES = 32
"""Of a few workers' queues; each is a file, and takes a page."""
PREFETCHED = 2
"""Items that each worker has ready: DataLoader's default."""
REMEDY = "docker run --shm-size=2g gives a container more"


def worker_loader(
    dataset: Dataset, workers: int, *, item_bytes: int = 0, **options: Any
) -> DataLoader:
    """Loads items one by one in ``workers`` processes that end when this one does.

    An item is about ``item_bytes`` of tensors. Where processes cannot be coordinated for want of
    shared memory, this process loads the items.
    """
    if workers and not _can_coordinate():
        note_once(f"{SHARED_MEMORY} holds no semaphore: loading without workers; {REMEDY}")
        workers = 0
    if not workers:
        return DataLoader(dataset, batch_size=None, **options)
    make_loader = DataLoader
    if not shared_memory_has(item_bytes * workers * PREFETCHED):
        note_once(
            f"{SHARED_MEMORY} has {shared_memory_bytes() / 1e6:.0f} MB free: batches come through "
            f"pipes, which is slower; {REMEDY}"
        )
        make_loader = _PipeLoader
    ending = multiprocessing.RawValue(ctypes.c_bool)
    # Runs before multiprocessing's own exit handler, which sends SIGTERM and waits for the end.
    atexit.register(setattr, ending, "value", True)
    options["worker_init_fn"] = functools.partial(_start_worker, ending)
    return make_loader(dataset, batch_size=None, num_workers=workers, **options)


def shared_memory_has(num_bytes: int) -> bool:
    """Whether shared memory has room for so many bytes, and as many for others."""
    return 2 * num_bytes <= shared_memory_bytes()


def shared_memory_bytes() -> float:
    """Bytes of shared memory that are free; infinite where no file system holds it."""
    if sys.platform != "linux":
        return math.inf
    try:
        place = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return place.f_bavail * place.f_frsize


@functools.cache
def note_once(text: str) -> None:
    """Prints a line on stderr, of rank 0, the first time."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _can_coordinate() -> bool:
    try:
        [multiprocessing.Semaphore() for _ in range(SEMAPHORES)]
    except OSError:
        return False
    return True


class _PipeLoader(DataLoader):
    """A loader whose workers send their tensors as bytes, as arrays are sent."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, collate_fn=_as_arrays, **options)

    def __iter__(self) -> Iterator[Any]:
        return map(default_convert, super().__iter__())


def _as_arrays(item: Any) -> Any:
    """Tensors in tuples and lists as arrays."""
    if isinstance(item, torch.Tensor):
        return item.numpy()
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*map(_as_arrays, item))
    return [_as_arrays(part) for part in item] if isinstance(item, (tuple, list)) else item


def _start_worker(ending: Any, _: int) -> None:
    # Ctrl-C, torchrun and SLURM signal the whole process group; the main process saves, and ends
    # the workers itself. Were one to die first, DataLoader would raise in the middle of that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # DataLoader's own watch asks for the parent's process id, which under forkserver (the default
    # on Linux from Python 3.14 on) is that of the server, and the server waits for its workers.
    multiprocessing.parent_process().join()
    os._exit(1)

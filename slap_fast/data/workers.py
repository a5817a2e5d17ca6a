"""Worker processes of a loader, which outlive signals to the group but not their parent."""

from __future__ import annotations

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader, Dataset


def worker_loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Loads items one by one in ``workers`` processes that end when this one does."""
    ending = multiprocessing.RawValue(ctypes.c_bool)
    # Runs before multiprocessing's own exit handler, which sends SIGTERM and waits for the end.
    atexit.register(setattr, ending, "value", True)
    options["worker_init_fn"] = functools.partial(_start_worker, ending)
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


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

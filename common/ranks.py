"""`torchrun --nproc-per-node=N SCRIPT.py`: the parts of an experiment divided over ranks. Alone, everything is local.

Only finished results cross ranks (over gloo, on GPUs too: no tensor is shared during training), so the numbers are
those of one process. A run in which a rank died is started again and computes only what is missing.
"""

import os
from typing import Any

import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def start() -> None:
    """Join the other ranks, if there are any."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def stop() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list:
    """Every rank's value, in the order of ranks, on every rank. Waits for the slowest."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    return gather(value)[0]

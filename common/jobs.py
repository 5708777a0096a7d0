"""`--jobs N`: the parts of an experiment divided over processes of this machine (common/ranks.py: over several).

The processes are forks: they start with all that the script has read and made, at no cost, and take the next part that
nobody has. Each part is computed as it would be alone and is saved by who computed it, so the numbers and what is left
by an interruption are those of one process.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from common import Failure, ranks


def possible() -> bool:
    """Whether processes can be forked: on Linux, from one thread, without a GPU and outside torchrun.

    A fork has neither its parent's threads nor its GPU; work that counts on them would wait for ever.
    """
    alone = ranks.WORLD == 1 and torch.get_num_threads() == 1
    return sys.platform == "linux" and alone and not torch.cuda.is_available()


def cores() -> int:
    """How many processes are best: the cores that are this process's to use, or 1 where it cannot be forked."""
    return len(os.sched_getaffinity(0)) if possible() else 1


def each(function: Callable[[str], None], keys: Sequence[str], jobs: int) -> Iterator[str]:
    """Call function(key) for every key, in as many processes as `jobs` says; yield each key when it is done.

    The first error ends the other processes and is raised here. So does whatever ends this process, SIGKILL too.
    """
    if jobs == 1 or len(keys) <= 1 or not possible():
        for key in keys:
            function(key)
            yield key
        return
    import torch._dynamo  # noqa: F401  torch.func does so at its first call: a second, once instead of in each process

    alive, ours = os.pipe()  # its end is closed when this process ends, however it ends
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(keys)), multiprocessing.get_context("fork"), _start, (function, alive, ours)
    )
    try:
        calls = {pool.submit(_call, key): key for key in keys}
        for call in concurrent.futures.as_completed(calls):
            call.result()
            yield calls[call]
        pool.shutdown()
    except concurrent.futures.BrokenExecutor:
        raise Failure(
            "a process was killed, perhaps for want of memory: run the same command again to continue, "
            "with --jobs 1 to need less"
        ) from None
    finally:
        os.close(ours)
        os.close(alive)
        pool.shutdown()


_function = None  # what a forked process calls


def _start(function: Callable[[str], None], alive: int, ours: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; one answers
    os.close(ours)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _call(key: str) -> None:
    _function(key)

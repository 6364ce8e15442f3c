"""A DataLoader whose processes are guaranteed to start.

A process forked while another thread enters Python deadlocks: it waits for an interpreter lock that the other thread
held, and that thread does not exist in the child (seen with CPython 3.11, in PyOS_AfterFork_Child, and the threads of
gloo, once in some hundred starts). A DataLoader would wait for it forever. So every process reports that it has
started; if one does not, all of them are ended and restarted, before any batch has been taken. A rank's stop signals
are blocked while its processes are forked: a deadlocked child has its parent's handlers and pipe, so the signal that
ends it would be taken for a request to stop the run.

Whoever waits for a batch notices within seconds that its process died. torch's own SIGCHLD handler, which raises
wherever the rank happens to be, in the middle of a step or a save, is removed.

Declined: a fork server, which avoids the deadlock: its first batch takes 8 s or more where a fork's takes 0.4 s, and it
takes half a gigabyte per rank.
"""

import functools
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from dist_proxygml.distributed.preemption import ignore_stop_signals, stop_signals_held_back
from dist_proxygml.storage.files import describe_error

SECONDS_TO_START = (10.0, 30.0, 60.0, 120.0)
"""Per attempt. A process starts within milliseconds, or within seconds on an overloaded machine."""


class WorkerLoader:
    """An iterable over a DataLoader with these arguments; each iteration starts its own processes.

    It has its own random generator: a DataLoader otherwise draws a seed from the global one, which changes later draws.
    """

    def __init__(self, dataset: Any, *, num_workers: int, **options: Any) -> None:
        self._num_workers = num_workers
        self._begun = multiprocessing.Semaphore(0)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=functools.partial(begin_to_serve, self._begun),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """Start the processes and yield batches.

        Raises:
            ValueError: a process did not start in time in any attempt; or, later, one died.
        """
        for seconds in SECONDS_TO_START:
            batches = self._start(seconds)
            if batches is not None:
                return _until_one_dies(batches)
        raise ValueError(
            f"expected {self._num_workers} data loading processes to begin within {SECONDS_TO_START[-1]:g} s, one had "
            f"not in any of {len(SECONDS_TO_START)} attempts; is the machine overloaded? Lower data.num_workers, 0 "
            "needs none"
        )

    def _start(self, seconds: float) -> Iterator[Any] | None:
        """Start the processes; if one does not start in time, end all of them and return None."""
        others = multiprocessing.active_children()
        at_a_childs_end = signal.getsignal(signal.SIGCHLD)
        with stop_signals_held_back():
            batches = iter(self._loader)
        if signal.getsignal(signal.SIGCHLD) is not at_a_childs_end:
            signal.signal(signal.SIGCHLD, at_a_childs_end)
        begun = False
        try:
            begun = all(self._begun.acquire(timeout=seconds) for _ in range(self._num_workers))
        finally:
            if not begun:
                del batches  # ends all that listen
                for process in set(multiprocessing.active_children()) - set(others):
                    process.kill()
                    process.join()
                while self._begun.acquire(block=False):
                    pass
        return batches if begun else None


def ready_to_leave(images: Tensor) -> Tensor:
    """Move images to shared memory, if this is a data loading process. Its queue would do so later, in a thread, and
    lose the batch if there is no room, so that its receiver would wait forever.

    Raises:
        ValueError: there is no room.
    """
    if get_worker_info() is None:
        return images
    try:
        return images.share_memory_()
    except RuntimeError as problem:
        raise ValueError(describe_error(problem)) from None


def _until_one_dies(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a data loading process died ({error}); if memory ran out, lower data.num_workers") from error


def begin_to_serve(begun: Semaphore, worker: int) -> None:
    """Report that this data loading process has started; runs first in it."""
    ignore_stop_signals(worker)
    begun.release()

"""A DataLoader whose processes are sure to start.

A process that is forked at the moment at which another thread enters Python stands still for ever: it waits for a lock
of the interpreter's that the other thread held, and that thread is not there any more (seen with CPython 3.11, in
PyOS_AfterFork_Child, and the threads of gloo, once in some hundred starts). A DataLoader would wait for it as long. So
every process says that it has begun; where one does not, all of them are ended and started again, before a batch has
been taken from any. A rank's signals to stop are held back while its processes are forked: one that stands still has
its starter's handlers and pipe, and what ends it would be taken for a request to stop the run.

One that dies is missed by whoever waits for its batch, within seconds. torch's own handler of SIGCHLD, which raises
wherever the rank happens to be, in the middle of a step or of a save, is taken back.

Declined: a fork server, which is free of this: its first batch takes 8 s or more where a fork's takes 0.4 s, and it
holds half a gigabyte a rank.
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
from dist_proxygml.storage.files import in_words

SECONDS_TO_START = (10.0, 30.0, 60.0, 120.0)
"""In each attempt. A process begins within milliseconds, on a machine that is overloaded within seconds."""


class WorkerLoader:
    """An iterable of what a DataLoader of these arguments gives; each iteration has processes of its own.

    Its generator is its own, too: a DataLoader otherwise draws a seed from the global one, and so changes what comes
    after it.
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
        """Start the processes.

        Raises:
            ValueError: a process has not begun in time, again and again; or, later, one has died.
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
        """None if a process has not begun in time; then none is left."""
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
    """Images in shared memory, if this is a data loading process. Its queue would put them there later, in a thread,
    and lose the batch where there is no room: whoever waits for it would wait for ever.

    Raises:
        ValueError: there is no room.
    """
    if get_worker_info() is None:
        return images
    try:
        return images.share_memory_()
    except RuntimeError as problem:
        raise ValueError(in_words(problem)) from None


def _until_one_dies(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a data loading process died ({error}); if memory ran out, lower data.num_workers") from error


def begin_to_serve(begun: Semaphore, worker: int) -> None:
    """Runs in a data loading process first."""
    ignore_stop_signals(worker)
    begun.release()

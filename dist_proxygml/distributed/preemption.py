"""Requests to stop: a signal sets a flag, the ranks agree on it between two steps, save once and end with status 75.

SIGUSR2 and SIGUSR1 are what clusters send some time before they take a node away, SIGTERM is what everybody sends. A
signal to a single rank is enough. It does nothing but set a flag: a save is the work of all ranks and cannot begin in
the middle of a step. A second SIGTERM ends the process at once, unless it comes within a second:
a launcher passes on what its process group was sent as well.

Chosen: the interpreter writes signals into a pipe (`signal.set_wakeup_fd`) that a thread reads. A handler of Python's
runs in the main thread when that comes back to the interpreter, which it does not while a peer hangs.
Declined: SIGINT. Who presses Ctrl-C wants the prompt back.
"""

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dist_proxygml.distributed.parallel import STOPPED_STATUS, ParallelContext, all_gather_object, end_loading_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_KILLED_BY_SIGTERM = 128 + signal.SIGTERM
_SECONDS_OF_ONE_REQUEST = 1.0


class StopRequested(Exception):  # noqa: N818  # nothing went wrong
    """The ranks have agreed to stop. Raised on all of them, between two steps."""

    status = STOPPED_STATUS

    def __init__(self, signals: dict[int, signal.Signals]) -> None:
        super().__init__(", ".join(f"{number.name} (on rank {rank})" for rank, number in signals.items()))
        self.signals = signals
        """The first one of each rank that received any."""


class StopSignals:
    """The signals to stop that this process receives.

    Args:
        grace: seconds that a stop may take from the first signal on; None for as long as it takes.
        on_grace_over: called when they have gone by and the process is still there, in a thread of its own.
    """

    def __init__(self, *, grace: float | None = None, on_grace_over: Callable[[], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        """The first one; it stays."""
        self._terminated_at: float | None = None
        self._grace, self._on_grace_over = grace, on_grace_over

    def listen(self) -> None:
        """Take the signals from now on. In the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, _noticed)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def agree(self, context: ParallelContext) -> None:
        """Raise on all ranks if any of them was told to stop. Called on all ranks.

        Raises:
            StopRequested: a rank was told to stop.
        """
        received = {rank: number for rank, number in enumerate(all_gather_object(context, self.received)) if number}
        if received:
            raise StopRequested(received)

    def _read(self, reader: int) -> None:
        over_at = left = None
        while select.select([reader], [], [], left)[0]:
            for number in os.read(reader, 64):
                if number in SIGNALS:
                    self._take(signal.Signals(number))
                    if over_at is None and self._grace is not None:
                        over_at = time.monotonic() + self._grace
            if over_at is not None:  # a later signal, and what others handle, gives no more time
                left = max(0.0, over_at - time.monotonic())
        if self._on_grace_over:
            self._on_grace_over()

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM:
            now = time.monotonic()
            self._terminated_at = self._terminated_at or now
            if now - self._terminated_at > _SECONDS_OF_ONE_REQUEST:
                end_loading_processes()
                os._exit(_KILLED_BY_SIGTERM)
        self.received = self.received or number


@contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Fork in here: what is sent to a new process before it ignores them itself does not reach this process's pipe."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker: int = 0) -> None:
    """For data loading processes (`worker_init_fn`): they serve until the process that started them ends, or ends them.

    It does so by SIGTERM when it exits with a loader still in use, and then waits for them: were that ignored like
    anybody else's, both would wait for ever.
    """
    signal.set_wakeup_fd(-1)  # the starter's
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    starter = multiprocessing.parent_process()
    assert starter is not None, "runs in a data loading process"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_sigterm_of, args=(starter.pid,), name="signals", daemon=True).start()


def _end_at_sigterm_of(process_id: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process_id:
        pass
    os._exit(0)


def _noticed(number: int, frame: object) -> None:
    """A handler has to be there; the thread does the rest."""

"""Requests to stop: a signal sets a flag, the ranks agree on it between two steps, save once and exit with status 75.

Clusters send SIGUSR2 or SIGUSR1 some time before they reclaim a node; SIGTERM is the general request. A signal to a
single rank is enough. It only sets a flag, because a save involves all ranks and cannot begin in the middle of a step.
A second SIGTERM ends the process at once, unless it arrives within a second: a launcher forwards signals that its
process group has received as well.

Chosen: the interpreter writes signals into a pipe (`signal.set_wakeup_fd`) that a thread reads. A Python handler runs
in the main thread once that returns to the interpreter, which it does not while a peer hangs.
Declined: SIGINT. Pressing Ctrl-C should return the prompt.
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


class StopRequested(Exception):  # noqa: N818  # not an error
    """The ranks agreed to stop. Raised on all of them, between two steps."""

    status = STOPPED_STATUS

    def __init__(self, signals: dict[int, signal.Signals]) -> None:
        super().__init__(", ".join(f"{number.name} (on rank {rank})" for rank, number in signals.items()))
        self.signals = signals
        """The first signal of each rank that received any."""


class StopSignals:
    """Records the stop signals that this process receives.

    Args:
        grace: seconds that a stop may take after the first signal; None for no limit.
        on_grace_over: called in a thread of its own if the process still runs after them.
    """

    def __init__(self, *, grace: float | None = None, on_grace_over: Callable[[], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        """The first signal received; later ones do not replace it."""
        self._terminated_at: float | None = None
        self._grace, self._on_grace_over = grace, on_grace_over

    def listen(self) -> None:
        """Start to record signals. Called in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, _noticed)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def agree(self, context: ParallelContext) -> None:
        """Raise on all ranks if any of them received a stop signal. Called on all ranks.

        Raises:
            StopRequested: a rank received one.
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
            if over_at is not None:  # later signals, and signals handled elsewhere, do not extend the time
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
    """Keep stop signals sent to a process forked inside, before it ignores them, out of this process's pipe."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore stop signals in a data loading process (`worker_init_fn`), which lives as long as its parent needs it.

    The parent ends it with SIGTERM if it exits with a loader still in use, and then waits for it: if that were ignored
    as well, both would wait forever.
    """
    signal.set_wakeup_fd(-1)  # the parent's
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
    """Do nothing: a handler must be installed, the thread does the work."""

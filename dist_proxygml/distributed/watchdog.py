"""A watchdog for hanging steps: it prints every thread's stack and ends the process.

A collective whose peer hangs, a file system that does not respond, a deadlock in a data loader: nothing raises, nothing
is printed, and cluster hours are wasted. The process ends with status 75, like one that was asked to stop: started
again, the run resumes from its newest checkpoint.

Declined: `faulthandler.dump_traceback_later(exit=True)`, which needs no Python thread but ends with status 1, like a
crash.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_proxygml.distributed.parallel import STOPPED_STATUS, end_loading_processes

_SECONDS_TO_TELL = 10.0


class Watchdog:
    """Ends this process if `timeout` seconds pass between beats, from the first `beat` on, except while paused.

    Args:
        timeout: seconds; None disables the watchdog.
        report: file for the threads' stacks, besides stderr.
    """

    def __init__(self, timeout: float | None, *, report: Path) -> None:
        self._timeout, self._report = timeout, report
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Restart the countdown."""
        if self._timeout is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        with self._changed:
            self._deadline = time.monotonic() + self._timeout
            self._changed.notify()

    def stop(self) -> None:
        """Suspend the countdown until the next beat."""
        with self._changed:
            self._deadline = None
            self._changed.notify()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the countdown for work that may take longer than a step."""
        was_running = self._deadline is not None
        self.stop()
        yield
        if was_running:
            self.beat()

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
        self._bite()

    def _bite(self) -> None:
        rank = os.environ.get("RANK", "0")
        message = (
            f"error: a step has taken longer than {self._timeout:g} s on rank {rank}; the stacks of its threads follow "
            f"and are in {self._report}; start the run again to resume from its newest checkpoint, or raise "
            "training.step_timeout\n"
        )
        # The file system of stderr and the report may be what hangs.
        last_word = threading.Timer(_SECONDS_TO_TELL, self._leave)
        last_word.daemon = True
        last_word.start()
        sys.stderr.write(message)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        try:
            with self._report.open("w", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file)
        finally:
            self._leave()

    def _leave(self) -> None:
        end_loading_processes()
        os._exit(STOPPED_STATUS)

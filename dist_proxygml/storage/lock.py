"""One writer per run: a lock on a file beside the run's folder, held by rank 0 as long as it lives.

Two jobs of one name would remove each other's half-written checkpoints. The lock is POSIX's (`fcntl.lockf`): it ends
with the process however that ends, forked data loading processes do not inherit it, and network file systems know it.
"""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from dist_proxygml.storage.files import in_words


class RunLock:
    """Holds the lock of a run from its construction on.

    Raises:
        ValueError: another process has it.
    """

    def __init__(self, run_directory: Path) -> None:
        path = run_directory.with_name(f".{run_directory.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"expected to write into {path.parent.resolve()}: {in_words(error, path.parent)}; set runs_dir to "
                "a folder of yours"
            ) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise ValueError(
                f"{run_directory} is being trained by {holder}; wait until it has ended, or give this run another name "
                "with --set name=NAME"
            ) from None
        except OSError:  # a file system without locks: nothing to hold on to
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

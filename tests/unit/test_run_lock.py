"""One writer per run: a second process is refused, and a killed one leaves nothing behind."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dist_proxygml.storage.lock import FolderLock

FORKSERVER = multiprocessing.get_context("forkserver")


def hold(directory: Path, connection: Connection) -> None:
    """Take the lock, start a process that outlives this one, and wait to be killed."""
    lock = FolderLock(directory)
    child = os.fork()
    if child == 0:
        signal.pause()
    connection.send(child)
    signal.pause()
    del lock


@pytest.mark.timeout(240)
def test_a_run_has_one_writer_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=hold, args=(run, there))
    process.start()
    child = here.recv()
    try:
        with pytest.raises(ValueError, match=rf"\bdemo\b.*process {process.pid}\b.*--set name=NAME"):
            FolderLock(run)
        FolderLock(run.with_name("other"))
        process.kill()
        process.join()
        FolderLock(run)  # although a process that was forked from the holder lives on
    finally:
        os.kill(child, signal.SIGKILL)
    assert not run.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match=r"runs.*--set name=NAME.*runs_dir=FOLDER"):
        FolderLock(tmp_path / "runs" / "demo")

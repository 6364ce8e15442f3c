"""What every test gets: one thread of arithmetic, as on the ranks that the harness starts. And how a session ends."""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

SECONDS_TO_LEAVE = 120
NOBODY = 65534
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores, and children would, too


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """A command that a test calls in this process joins a world, which is left where it ends with an error: by the end
    of its process. Here the next test would find it, in whatever order a process gets them.
    """
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a user for whom modes hold, as they do not for root, and the rights of that user."""
    with tempfile.TemporaryDirectory() as name:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if is_root:
                os.seteuid(0)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """A session that does not end, because something in it waits for a process or a thread, shows where and fails."""
    faulthandler.dump_traceback_later(SECONDS_TO_LEAVE, exit=True)

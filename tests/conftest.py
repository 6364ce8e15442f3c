"""What every test gets: one thread of arithmetic, as on the ranks that the harness starts. And how a session ends."""

import faulthandler

import pytest
import torch

SECONDS_TO_LEAVE = 120


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """A session that does not end, because something in it waits for a process or a thread, shows where and fails."""
    faulthandler.dump_traceback_later(SECONDS_TO_LEAVE, exit=True)

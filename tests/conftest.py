"""What every test gets: one thread of arithmetic, as on the ranks that the harness starts."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)

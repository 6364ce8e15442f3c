"""What several files of tests share: one SLURM for all of them, since it takes seconds to start."""

from collections.abc import Iterator

import pytest

from tests.slurm_jobs import Slurm, running_slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running SLURM of three nodes, each a host of its own."""
    with running_slurm() as cluster:
        yield cluster

"""Random initial proxies: what they are, and that they depend on nothing but class and seed."""

import math

import pytest
import torch

from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.proxies import initial_proxies

INITIALIZATIONS = ["published", "unit"]


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize(("num_classes", "world_size"), [(2500, 3), (2500, 7), (2, 3)])
def test_initial_proxies_are_the_same_bits_on_any_number_of_ranks(
    initialization: str, num_classes: int, world_size: int
) -> None:
    def drawn(partition: ClassPartition) -> torch.Tensor:
        return initial_proxies(partition, 2, 5, seed=4, initialization=initialization)

    parts = [drawn(ClassPartition(num_classes, world_size, rank)) for rank in range(world_size)]
    whole = drawn(ClassPartition(num_classes))
    assert whole.shape == (num_classes, 2, 5)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_initial_proxies_depend_on_the_seed_alone_and_leave_the_global_generator_alone(initialization: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        initial_proxies(ClassPartition(60), 1, 4, seed=seed, initialization=initialization) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_no_two_proxies_start_the_same(initialization: str) -> None:
    proxies = initial_proxies(ClassPartition(3000), 2, 8, seed=0, initialization=initialization)
    assert len(proxies.flatten(0, 1).unique(dim=0)) == 6000


def test_published_proxies_fill_the_interval_of_the_global_number_of_proxies() -> None:
    bound = 1 / math.sqrt(2500 * 4)
    proxies = initial_proxies(ClassPartition(2500, 2, 1), 4, 8, seed=3)
    assert 0.999 * bound < proxies.abs().max() <= bound
    assert float(proxies.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_unit_proxies_have_length_one_and_point_everywhere_alike() -> None:
    proxies_nD = initial_proxies(ClassPartition(10_000), 1, 6, seed=0, initialization="unit").flatten(0, 1)
    torch.testing.assert_close(proxies_nD.norm(dim=1), torch.ones(10_000))
    # on the sphere the mean is 0 and the second moment is 1/D times the identity; corners of a cube have it too, but
    # not the fourth moment 3 / (D * (D + 2)) of an element
    assert proxies_nD.mean(dim=0).abs().max() < 0.02
    torch.testing.assert_close(proxies_nD.T @ proxies_nD / 10_000, torch.eye(6) / 6, atol=0.01, rtol=0)
    assert float(proxies_nD.pow(4).mean()) == pytest.approx(3 / (6 * 8), rel=0.02)

"""The regulariser in one process: against the oracle and against autograd, full and sampled, within its memory."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.regularizer import (
    draw_anchors,
    proxy_regularizer,
    regularizer_anchors,
    sampled_proxy_regularizer,
)
from tests.problems import (
    ROUNDING,
    chunks_of,
    dense,
    random_problem,
    random_proxies,
    reference_of,
    relative_difference,
    value_and_gradient,
)

PLENTY = 1 << 28
# float64; sums of some hundred terms in another order
SHAPES = [(7, 1, 5), (7, 3, 5), (2, 4, 3), (1, 3, 4), (11, 2, 1)]


def full(proxies_CND: Tensor, memory_budget: int = PLENTY) -> Tensor:
    partition = ClassPartition(len(proxies_CND))
    return proxy_regularizer(proxies_CND, partition=partition, group=None, memory_budget=memory_budget)


def sampled(proxies_CND: Tensor, anchors_A: Tensor, memory_budget: int = PLENTY) -> Tensor:
    partition = ClassPartition(len(proxies_CND))
    return sampled_proxy_regularizer(
        proxies_CND, anchors_A, partition=partition, group=None, memory_budget=memory_budget
    )


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = ROUNDING) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.isfinite().all()
        assert relative_difference(got, wanted, floor=1e-3) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_the_full_regulariser_agrees_with_the_oracle(shape: tuple[int, int, int]) -> None:
    num_classes, proxies_per_class, embedding_dim = shape
    problem = random_problem(
        num_classes=num_classes,
        proxies_per_class=proxies_per_class,
        embedding_dim=embedding_dim,
        num_images=1,
        topk=proxies_per_class,
        regularization_weight=1.0,
    )
    expected = reference_of(problem, of="regularization")
    actual = value_and_gradient(full, problem.proxies)
    assert_same(actual, (expected.terms.regularization.detach(), expected.grad_proxies))


@pytest.mark.parametrize("numbers", [PLENTY, 200, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_autograd_for_any_chunks(shape: tuple[int, int, int], numbers: int) -> None:
    proxies_CND = random_proxies(*shape)
    num_proxies = proxies_CND[:, :, 0].numel()
    anchors_A = draw_anchors(num_proxies, max(1, num_proxies // 2), seed=0, draw=0)
    with chunks_of(numbers):
        assert_same(value_and_gradient(full, proxies_CND), value_and_gradient(dense, proxies_CND))
        actual = value_and_gradient(sampled, proxies_CND, anchors_A)
    assert_same(actual, value_and_gradient(dense, proxies_CND, anchors_A))


@pytest.mark.parametrize("numbers", [PLENTY, 200])
def test_float32_differs_from_float64_by_rounding(numbers: int) -> None:
    proxies_CND = random_proxies(7, 3, 5)
    anchors_A = torch.tensor([0, 1, 5, 20])
    with chunks_of(numbers):
        for function, args in ((full, ()), (sampled, (anchors_A,))):
            actual = value_and_gradient(function, proxies_CND.float(), *args)
            expected = value_and_gradient(function, proxies_CND, *args)
            assert actual[0].dtype == actual[1].dtype == torch.float32
            assert_same((actual[0].double(), actual[1].double()), expected, tolerance=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_proxies_as_anchors_are_the_full_regulariser(shape: tuple[int, int, int]) -> None:
    proxies_CND = random_proxies(*shape)
    everyone = draw_anchors(shape[0] * shape[1], shape[0] * shape[1], seed=3, draw=1)
    assert everyone.tolist() == list(range(shape[0] * shape[1]))
    assert_same(value_and_gradient(sampled, proxies_CND, everyone), value_and_gradient(full, proxies_CND))


def test_proxies_of_any_length_are_treated_as_normalize_treats_them() -> None:
    proxies_CND = random_proxies(5, 3, 4)
    proxies_CND[0, 0] = 0
    proxies_CND[1, 1] *= 1e-13  # below the floor of the norm
    proxies_CND[2] *= 1e6
    anchors_A = torch.tensor([0, 4, 8, 11])
    # the gradient of a proxy without a direction is that of a division by the floor, 1e12 times that of the others
    for functions in ((full, dense), (sampled, dense)):
        args = () if functions[0] is full else (anchors_A,)
        value, gradient_CND = value_and_gradient(functions[0], proxies_CND, *args)
        expected_value, expected_CND = value_and_gradient(functions[1], proxies_CND, *args)
        assert relative_difference(value, expected_value) < ROUNDING
        scale_CN1 = proxies_CND.norm(dim=2, keepdim=True).clamp_min(1e-12)
        assert relative_difference(gradient_CND * scale_CN1, expected_CND * scale_CN1) < ROUNDING


def test_the_mean_over_draws_is_the_full_regulariser_in_value_and_gradient() -> None:
    num_draws, num_anchors = 4000, 5
    proxies_CND = random_proxies(7, 3, 4)
    proxies_CND[:3] += 2  # related classes, so that proxies differ in their loss
    expected = torch.cat([part.flatten() for part in value_and_gradient(full, proxies_CND)])
    estimates = torch.stack(
        [
            torch.cat([part.flatten() for part in value_and_gradient(sampled, proxies_CND, anchors_A)])
            for anchors_A in (draw_anchors(21, num_anchors, seed=0, draw=draw) for draw in range(num_draws))
        ]
    )
    standard_error = estimates.std(dim=0) / num_draws**0.5
    assert (standard_error[0] / expected[0]) < 0.01  # precise enough to tell a biased estimate
    assert ((estimates.mean(dim=0) - expected).abs() < 4 * standard_error).all()


def test_a_draw_is_a_pure_function_of_seed_and_number() -> None:
    drawn = draw_anchors(1000, 30, seed=5, draw=2)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, draw_anchors(1000, 30, seed=5, draw=2))
    others = [draw_anchors(1000, 30, seed=seed, draw=draw) for seed, draw in ((5, 3), (2, 5), (6, 2))]
    assert all(not torch.equal(drawn, other) for other in others)


@pytest.mark.parametrize(("num_proxies", "num_anchors"), [(21, 5), (21, 21), (3, 1), (20_001, 9), (20_001, 1500)])
def test_anchors_are_distinct_ascending_and_uniform(num_proxies: int, num_anchors: int) -> None:
    num_draws = 400
    draws = torch.stack([draw_anchors(num_proxies, num_anchors, seed=1, draw=draw) for draw in range(num_draws)])
    assert (draws[:, 1:] > draws[:, :-1]).all()
    assert draws.min() >= 0
    assert draws.max() < num_proxies
    # counts of seven parts of the proxies: binomial at most, as a draw is without replacement
    parts = torch.bincount((draws * 7 // num_proxies).flatten(), minlength=7)
    sizes = torch.bincount(torch.arange(num_proxies) * 7 // num_proxies, minlength=7)
    expected = num_draws * num_anchors * sizes / num_proxies
    assert ((parts - expected).abs() <= 4.5 * expected.sqrt()).all()


@pytest.mark.parametrize("num_proxies", [100_000_000, 4_000_000_000])
def test_drawing_takes_memory_for_the_anchors_only(num_proxies: int) -> None:
    tracemalloc.start()
    try:
        drawn = draw_anchors(num_proxies, 8192, seed=0, draw=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(drawn) == 8192
    assert peak < 100 * 8192


@pytest.mark.parametrize("num_anchors", [0, 8])
def test_a_draw_of_none_or_too_many_is_refused(num_anchors: int) -> None:
    with pytest.raises(ValueError, match=rf"\b1 to 7\b.*\b{num_anchors}$"):
        draw_anchors(7, num_anchors, seed=0, draw=0)


@pytest.mark.parametrize("anchors", [[], [3, 1], [2, 2], [-1, 3], [0, 21]])
def test_anchors_that_are_not_ascending_indices_are_refused(anchors: list[int]) -> None:
    with pytest.raises(ValueError, match=r"\b0 to 20\b"):
        sampled(random_proxies(7, 3, 2), torch.tensor(anchors, dtype=torch.int64))


def test_the_number_of_anchors_follows_from_the_budget() -> None:
    def anchors(num_classes: int, *, wanted: int | None = None, memory_budget: int = 96_000) -> int | None:
        return regularizer_anchors(
            num_classes, 8, proxies_per_class=3, wanted=wanted, memory_budget=memory_budget, batch_size=32
        )

    # class sums and gradient: 2 * 500 classes * 8 * 4 bytes are a third of the budget
    assert anchors(500) is None
    assert anchors(501) == 32
    assert anchors(10, memory_budget=1900) == 5  # 40 bytes * 8 each: half of the budget is the logits'
    assert anchors(10, memory_budget=1) == 1
    few = 2 * 2 * 8 * 4 * 3 - 1
    assert anchors(2, memory_budget=few) == 1
    assert anchors(500, wanted=7) == 7
    assert anchors(10, wanted=29) == 29
    assert anchors(10, wanted=30) is None


class LiveMemory(TorchDispatchMode):
    """Bytes of all tensors that operations gave, their inputs' views included: the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_memory(function: Callable[..., Tensor], proxies_CND: Tensor, *args: Any) -> int:
    """Of forward and backward, in bytes, beyond the proxies and their gradient."""
    proxies_CND = proxies_CND.clone().requires_grad_()
    with LiveMemory() as memory:
        function(proxies_CND, *args).backward()
    return memory.peak - 2 * proxies_CND.nbytes


@pytest.mark.parametrize("proxies_per_class", [1, 3])
def test_memory_stays_within_the_budget(proxies_per_class: int) -> None:
    # 600 classes: one product of all proxies with all class sums would take 2.9 MB or three times that
    proxies_CND = random_proxies(600, proxies_per_class, 16)
    anchors_A = draw_anchors(600 * proxies_per_class, 50, seed=0, draw=0)
    budget = 450_000
    assert 300_000 < peak_memory(full, proxies_CND, budget) < budget
    budget = 60_000
    assert 30_000 < peak_memory(sampled, proxies_CND, anchors_A, budget) < budget
    assert peak_memory(dense, proxies_CND) > 2_800_000  # the measurement sees what is there

"""Optimizers of the bank against loops and torch's own, and that they touch no more than they say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_proxygml.head import optim as bank_optim
from dist_proxygml.head.optim import (
    RowwiseAdagrad,
    SparseAdam,
    bring_to_unit_length_,
    coalesced,
    squared_norm,
)

NUM_CLASSES, NUM_PER_CLASS, DIM = 11, 2, 5
# Classes with a gradient, step by step: one is named twice in a step, one step has none.
KEPT = [[8, 1, 10], [1, 8, 1], [], [0, 10, 3]]


@pytest.fixture(params=["one block", "blocks of 2 classes"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one block":
        monkeypatch.setattr(bank_optim, "_NUMBERS_PER_BLOCK", 2 * NUM_PER_CLASS * DIM)


def bank() -> nn.Parameter:
    return nn.Parameter(torch.randn(NUM_CLASSES, NUM_PER_CLASS, DIM, generator=torch.Generator().manual_seed(0)))


def sparse_gradients() -> list[Tensor]:
    """One for each step of KEPT, not coalesced."""
    generator = torch.Generator().manual_seed(1)
    return [sparse(classes, torch.randn(len(classes), NUM_PER_CLASS, DIM, generator=generator)) for classes in KEPT]


def sparse(classes: list[int], values: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    indices = torch.tensor([classes], dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, values, (num_classes, *values.shape[1:]), check_invariants=False)


def updated(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], gradients: list[Tensor]) -> Any:
    """The bank after a step with each gradient, the learning rate falling, and the optimizer's state."""
    proxies = bank()
    optimizer = optimizer_of([proxies])
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + number)
        proxies.grad = gradient
        optimizer.step()
    return proxies.detach(), optimizer.state[proxies]


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got[0], expected[0], **tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], torch.as_tensor(value), **tolerance, check_dtype=False)


# Row-wise Adagrad


def test_rowwise_adagrad_by_hand() -> None:
    proxies = nn.Parameter(torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]]))
    optimizer = RowwiseAdagrad([proxies], lr=0.5, eps=1.0)
    proxies.grad = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    optimizer.step()
    size = 0.5 / (math.sqrt(12.5) + 1)  # mean of 9 and 16
    torch.testing.assert_close(proxies.detach(), torch.tensor([[[1 - 3 * size, 1 - 4 * size]], [[5.0, 5.0]]]))
    proxies.grad = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    before = proxies.detach().clone()
    optimizer.step()
    moved = before - proxies.detach()
    torch.testing.assert_close(moved[0], torch.tensor([[0.5 / (math.sqrt(12.5 + 0.5) + 1), 0.0]]))
    torch.testing.assert_close(moved[1], torch.tensor([[0.0, 0.5 * 2 / (math.sqrt(2) + 1)]]))
    torch.testing.assert_close(optimizer.state[proxies]["squared_gradient"], torch.tensor([[13.0], [2.0]]))


@pytest.mark.usefixtures("block_sizes")
def test_rowwise_adagrad_equals_a_loop_over_proxies() -> None:
    expected, sums = bank().detach().double(), torch.zeros(NUM_CLASSES, NUM_PER_CLASS, dtype=torch.float64)
    for number, gradient in enumerate(sparse_gradients()):
        gradient_cND = gradient.to_dense().double()
        for c in range(NUM_CLASSES):
            for n in range(NUM_PER_CLASS):
                g = gradient_cND[c, n]
                sums[c, n] += (g * g).sum() / DIM
                expected[c, n] -= 0.5 / (1 + number) * g / (sums[c, n].sqrt() + 1e-3)
    got = updated(lambda p: RowwiseAdagrad(p, lr=1.0, eps=1e-3), sparse_gradients())
    # float32 against float64
    assert_same(got, (expected.float(), {"squared_gradient": sums.float()}), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("block_sizes")
def test_rowwise_adagrad_gives_the_same_bits_for_dense_and_sparse_gradients() -> None:
    dense = [gradient.to_dense() for gradient in sparse_gradients()]
    got = updated(lambda p: RowwiseAdagrad(p, lr=1.0), sparse_gradients())
    assert_same(got, updated(lambda p: RowwiseAdagrad(p, lr=1.0), dense), rtol=0, atol=0)


def test_the_state_of_rowwise_adagrad_is_one_number_a_proxy() -> None:
    _, state = updated(lambda p: RowwiseAdagrad(p, lr=1.0), sparse_gradients())
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "squared_gradient": (NUM_CLASSES, NUM_PER_CLASS)
    }


# Sparse Adam


@pytest.mark.parametrize("eps", [1e-8, 0.01])
@pytest.mark.usefixtures("block_sizes")
def test_sparse_adam_updates_as_torchs(eps: float) -> None:
    betas = (0.8, 0.95)
    got = updated(lambda p: SparseAdam(p, lr=1.0, betas=betas, eps=eps), sparse_gradients())
    expected = updated(lambda p: torch.optim.SparseAdam(p, lr=1.0, betas=betas, eps=eps), sparse_gradients())
    assert_same(got, expected, rtol=1e-5, atol=1e-6)  # float32, the products in another order


@pytest.mark.usefixtures("block_sizes")
def test_sparse_adam_takes_a_dense_gradient_as_that_of_all_classes() -> None:
    values = torch.randn(NUM_CLASSES, NUM_PER_CLASS, DIM, generator=torch.Generator().manual_seed(2))
    got = updated(lambda p: SparseAdam(p, lr=1.0), [values, -2 * values])
    everything = list(range(NUM_CLASSES))
    expected = updated(lambda p: SparseAdam(p, lr=1.0), [sparse(everything, values), sparse(everything, -2 * values)])
    assert_same(got, expected, rtol=0, atol=0)


# Both, and plain SGD


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "rowwise_adagrad": lambda p: RowwiseAdagrad(p, lr=0.1),
    "sparse_adam": lambda p: SparseAdam(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("block_sizes")
def test_nothing_but_the_kept_classes_is_read_or_written(name: str) -> None:
    expected, state_of_expected = updated(OPTIMIZERS[name], sparse_gradients())
    kept = sorted({c for classes in KEPT for c in classes})
    others = [c for c in range(NUM_CLASSES) if c not in kept]

    proxies = bank()
    optimizer = OPTIMIZERS[name]([proxies])
    proxies.grad = sparse([], torch.zeros(0, NUM_PER_CLASS, DIM))
    optimizer.step()  # makes the state
    for value in [proxies.detach(), *(v for v in optimizer.state[proxies].values() if v.ndim)]:
        value[others] = math.nan
    if name == "sparse_adam":
        optimizer.state[proxies]["step"].zero_()
    for number, gradient in enumerate(sparse_gradients()):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + number)
        proxies.grad = gradient
        optimizer.step()
    assert torch.equal(proxies.detach()[kept], expected[kept])
    assert proxies.detach()[others].isnan().all()
    assert torch.equal(expected[others], bank().detach()[others])
    for key, value in optimizer.state[proxies].items():
        if value.ndim:
            assert torch.equal(value[kept], state_of_expected[key][kept])
            assert value[others].isnan().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rank_without_classes_steps_too(name: str) -> None:
    proxies = nn.Parameter(torch.zeros(0, NUM_PER_CLASS, DIM))
    optimizer = OPTIMIZERS[name]([proxies])
    for gradient in (sparse([], torch.zeros(0, NUM_PER_CLASS, DIM), 0), torch.zeros(0, NUM_PER_CLASS, DIM)):
        proxies.grad = gradient
        optimizer.step()
    assert all(len(value) == 0 for value in optimizer.state[proxies].values() if value.ndim)


class LargestNewTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes, views and results in place excepted."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                if tensor.untyped_storage().data_ptr() not in self.known:
                    self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("task", ["rowwise_adagrad", "sparse_adam", "unit length", "squared norm"])
def test_no_temporary_is_larger_than_a_block(task: str, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 2 * NUM_PER_CLASS * DIM
    monkeypatch.setattr(bank_optim, "_NUMBERS_PER_BLOCK", block)
    proxies, values = bank(), torch.randn(NUM_CLASSES, NUM_PER_CLASS, DIM)
    classes = list(range(NUM_CLASSES))
    proxies.grad = values if gradient == "dense" else sparse(classes, values).coalesce()
    known = [proxies.detach(), values]
    if gradient == "sparse":
        known += [proxies.grad.values(), proxies.grad.indices()]
    if task in OPTIMIZERS:
        optimizer = OPTIMIZERS[task]([proxies])
        optimizer.step()  # makes the state
        known += optimizer.state[proxies].values()
    with LargestNewTensor(known) as memory:
        if task == "unit length":
            bring_to_unit_length_(proxies, classes_u=None if gradient == "dense" else torch.tensor(classes))
        elif task == "squared norm":
            squared_norm(values)
        else:
            optimizer.step()
    # the norm goes through one number a proxy
    assert 0 < memory.largest <= max(block, NUM_CLASSES * NUM_PER_CLASS) < values.numel()


# Norm and length


def test_the_squared_norm_of_a_large_bank_does_not_lose_what_is_small_beside_the_sum() -> None:
    values = torch.rand(200_000, 1, 16, generator=torch.Generator().manual_seed(0))
    assert squared_norm(values).item() == pytest.approx(values.double().square().sum().item(), rel=1e-7)
    assert squared_norm(values[:0]).item() == 0


@pytest.mark.usefixtures("block_sizes")
def test_chosen_classes_are_brought_to_length_one_and_no_others() -> None:
    proxies = bank()
    before = proxies.detach().clone()
    proxies.data[3, 1] = before[3, 1] = 0  # a zero proxy has no direction: it stays 0
    chosen = [3, 0, 10, 7]
    bring_to_unit_length_(proxies, classes_u=torch.tensor(chosen))
    others = [c for c in range(NUM_CLASSES) if c not in chosen]
    assert torch.equal(proxies.detach()[others], before[others])
    torch.testing.assert_close(proxies.detach()[chosen], nn.functional.normalize(before[chosen], dim=2))
    bring_to_unit_length_(proxies)
    torch.testing.assert_close(proxies.detach(), nn.functional.normalize(before, dim=2))
    assert proxies.requires_grad
    assert proxies.grad_fn is None


def test_a_gradient_in_order_is_not_copied_and_any_other_is_put_in_order() -> None:
    values = torch.randn(3, NUM_PER_CLASS, DIM)
    in_order, repeated, reversed_ = (sparse(classes, values) for classes in ([1, 4, 9], [1, 4, 4], [9, 4, 1]))
    assert not in_order.is_coalesced()
    assert coalesced(in_order).is_coalesced()
    assert coalesced(in_order).values().data_ptr() == values.data_ptr()
    for gradient, classes in ((repeated, [1, 4]), (reversed_, [1, 4, 9])):
        dense = gradient.to_dense()
        assert coalesced(gradient).indices()[0].tolist() == classes
        assert torch.equal(coalesced(gradient).to_dense(), dense)

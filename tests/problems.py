"""Batches with a bank of proxies to test the loss on, and their loss on one rank or on all.

A `Problem` is global: every rank takes its own rows and its own classes of the same tensors, so
what the ranks return can be put together and compared with one process, with recorded numbers,
or with the oracle in `tests.reference`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.head import regularizer
from tests.harness import run_ranks
from tests.reference import ReferenceResult, reference_gradients

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ("n1_small", "n3_regularised", "cars196_shape")
SELECTIONS = ("gather", "candidates", "histogram")

# float64 against the oracle: sums of some hundred terms in another order, each rounded to 1.1e-16.
ROUNDING = 1e-12
# Where everything ties the gradients cancel to zero; below this differences count absolutely.
FLOOR = 1e-3


class Problem(NamedTuple):
    """A global batch, the whole bank, and the options of the loss."""

    embeddings: Tensor  # [B, D] unit rows, float64
    labels: Tensor  # [B] int64
    proxies: Tensor  # [C, N, D] float64, unnormalised
    topk: int
    regularization_weight: float = 0.0
    scale: float = 1.0


class Outcome(NamedTuple):
    """What one rank computed: the terms and the gradients of its rows and its classes."""

    total: Tensor
    classification: Tensor
    regularization: Tensor
    kept_classes: Tensor
    grad_embeddings: Tensor  # [b, D]
    grad_proxies: Tensor  # [c, N, D]


def random_problem(
    *,
    num_classes: int,
    proxies_per_class: int = 1,
    embedding_dim: int = 5,
    num_images: int = 7,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> Problem:
    """Random directions, proxies of random lengths, random labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    embeddings = torch.nn.functional.normalize(normal(num_images, embedding_dim), dim=1)
    drawn = torch.randint(num_classes, (num_images,), generator=generator)
    proxies = normal(num_classes, proxies_per_class, embedding_dim)
    return Problem(embeddings, drawn if labels is None else torch.tensor(labels), proxies, **options)


def tied_problem(
    *,
    num_classes: int,
    proxies_per_class: int = 1,
    num_images: int = 7,
    num_directions: int = 3,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Similarities that tie exactly on every machine: few proxies, all numbers powers of two.

    Proxies are signed corners of a 4-cube of length 1, 2 or 4 (equal once normalised); embeddings
    are corners or axes. A similarity is a multiple of 1/4 without rounding in any order of
    summation, and most of them tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).double() * 2 - 1

    directions = signs(num_directions, 4) / 2
    which = torch.randint(num_directions, (num_classes, proxies_per_class), generator=generator)
    lengths = 2.0 ** torch.randint(3, (num_classes, proxies_per_class, 1), generator=generator)
    corners = signs(num_images, 4) / 2
    axes = torch.eye(4, dtype=torch.float64)[torch.arange(num_images) % 4]
    embeddings = torch.where((torch.arange(num_images) % 2 == 0)[:, None], corners, axes)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return Problem(embeddings, labels, directions[which] * lengths, **options)


def load_golden(case: str) -> dict[str, Tensor]:
    """Every array of one of the recorded files."""
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def golden_problem(case: str) -> Problem:
    """The input of one of the recorded files."""
    golden = load_golden(case)
    return Problem(
        golden["embeddings"],
        golden["labels"],
        golden["proxies"],
        topk=int(golden["k"]),
        regularization_weight=float(golden["lam"]),
    )


def even_rows(num_images: int, world_size: int) -> list[int]:
    """Rows of every rank, the remainder on the last one."""
    rows = num_images // world_size
    return [rows] * (world_size - 1) + [num_images - rows * (world_size - 1)]


def build_loss(problem: Problem, *, group: Any = None, **options: Any) -> ProxyGMLLoss:
    """The loss of `problem` on this rank, in its precision, with its proxies of this rank."""
    num_classes, proxies_per_class, embedding_dim = problem.proxies.shape
    settings = {
        "proxies_per_class": proxies_per_class,
        "topk": problem.topk,
        "regularization_weight": problem.regularization_weight,
        "scale": problem.scale,
        "group": group,
        "normalize": False,  # or the gradient would lose its part along the embedding
        **options,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="k = ")  # small k are tested on purpose
        loss = ProxyGMLLoss(num_classes, embedding_dim, **settings).to(problem.proxies.dtype)
    with torch.no_grad():
        loss.proxies.copy_(problem.proxies[loss.partition.start : loss.partition.stop])
    return loss


class Task(NamedTuple):
    """A problem, how its rows are cut (None: evenly), and options of the loss."""

    problem: Problem
    row_counts: Sequence[int] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 (never written to)


def outcomes_on_rank(context: ParallelContext, tasks: Sequence[Task], device: str = "cpu") -> list[Outcome]:
    """The terms on this rank and the gradients of `total`, for each task."""
    results = []
    for problem, row_counts, options in tasks:
        counts = row_counts or even_rows(len(problem.labels), context.world_size)
        assert sum(counts) == len(problem.labels)
        first = sum(counts[: context.rank])
        rows = slice(first, first + counts[context.rank])
        loss = build_loss(problem, group=context.group, **options).to(device)
        embeddings = problem.embeddings[rows].to(device, copy=True).requires_grad_()
        terms = loss(embeddings, problem.labels[rows].to(device))
        terms.total.backward()
        assert embeddings.grad is not None
        assert loss.proxies.grad is not None
        results.append(
            Outcome(
                terms.total.detach().cpu(),
                terms.classification.cpu(),
                terms.regularization.cpu(),
                terms.kept_classes.cpu(),
                embeddings.grad.cpu(),
                loss.proxies.grad if device == "cpu" else loss.proxies.grad.to_dense().cpu(),
            )
        )
    return results


def outcomes_of(tasks: Sequence[Task], *, world_size: int | None) -> list[list[Outcome]]:
    """For each task the outcome of every rank; `world_size` None: one process without a group."""
    if world_size is None:
        return [[outcome] for outcome in outcomes_on_rank(single_process(), tasks)]
    per_rank = run_ranks(outcomes_on_rank, world_size, tasks)
    return [list(results) for results in zip(*per_rank, strict=True)]


def outcomes(
    problem: Problem,
    *,
    world_size: int | None,
    row_counts: Sequence[int] | None = None,
    **options: Any,
) -> list[Outcome]:
    """The outcome of every rank for one problem."""
    return outcomes_of([Task(problem, row_counts, options)], world_size=world_size)[0]


def relative_difference(actual: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest number expected or to `floor` if larger."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    largest = max(float(expected.abs().max()), floor)
    return float((actual - expected).abs().max()) / largest


def reference_of(problem: Problem, *, of: str = "total") -> ReferenceResult:
    """What the oracle says about `problem`."""
    return reference_gradients(
        problem.embeddings,
        problem.labels,
        problem.proxies,
        topk=problem.topk,
        regularization_weight=problem.regularization_weight,
        scale=problem.scale,
        of=of,
    )


def assert_same_terms_on_every_rank(results: Sequence[Outcome]) -> None:
    """Identical bits, not only close: ranks must never decide differently on a loss."""
    for name in ("total", "classification", "regularization", "kept_classes"):
        values = [getattr(result, name) for result in results]
        assert all(torch.equal(value, values[0]) for value in values), (name, values)


def assert_agrees_with_the_oracle(
    results: Sequence[Outcome],
    problem: Problem,
    *,
    tolerance: float = ROUNDING,
    embedding_gradient_factor: int = 1,
) -> None:
    """Terms, kept classes and both gradients, put together in rank order."""
    expected = reference_of(problem)
    assert_same_terms_on_every_rank(results)
    for name in ("total", "classification", "regularization"):
        value = getattr(expected.terms, name).detach()
        if name == "regularization" and problem.regularization_weight == 0:
            value = torch.zeros_like(value)  # not computed then
        assert relative_difference(getattr(results[0], name), value, floor=FLOOR) < tolerance, name
    assert abs(float(results[0].kept_classes) - expected.terms.kept_classes) < 1e-6
    grad_embeddings = torch.cat([result.grad_embeddings for result in results])
    expected_embeddings = embedding_gradient_factor * expected.grad_embeddings
    assert relative_difference(grad_embeddings, expected_embeddings, floor=FLOOR) < tolerance
    grad_proxies = torch.cat([result.grad_proxies for result in results])
    assert relative_difference(grad_proxies, expected.grad_proxies, floor=FLOOR) < tolerance


ROUNDING = 1e-12


def random_proxies(num_classes: int, proxies_per_class: int, embedding_dim: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_classes, proxies_per_class, embedding_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(proxies_CND: Tensor, anchors_A: Tensor | None = None) -> Tensor:
    """The same from torch's own functions, everything at once."""
    num_classes, proxies_per_class, _ = proxies_CND.shape
    unit_CND = F.normalize(proxies_CND, dim=2)
    logits_PC = unit_CND.flatten(0, 1) @ unit_CND.sum(dim=1).T
    class_P = torch.arange(num_classes).repeat_interleave(proxies_per_class)
    anchors_A = torch.arange(len(class_P)) if anchors_A is None else anchors_A
    return F.cross_entropy(logits_PC[anchors_A], class_P[anchors_A])


def value_and_gradient(function: Callable[..., Tensor], proxies_CND: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    proxies_CND = proxies_CND.clone().requires_grad_()
    value = function(proxies_CND, *args)
    (gradient_CND,) = torch.autograd.grad(2.5 * value, proxies_CND)  # a factor, as the weight lambda is one
    return value.detach(), gradient_CND / 2.5


@contextmanager
def chunks_of(numbers: int) -> Iterator[None]:
    """Chunks of so many numbers at most, so that small problems take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regularizer, "_CACHED_NUMBERS", numbers)
        yield

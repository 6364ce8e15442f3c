"""The partitioned loss on 2 and 3 ranks where the cut is awkward, against the oracle in float64.

And that the ranks fail together: the same error on all of them, after which the group still works.
"""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dist_proxygml import LossTerms, ProxyGMLLoss
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks
from tests.problems import (
    ROUNDING,
    SELECTIONS,
    Problem,
    Task,
    assert_agrees_with_the_oracle,
    assert_same_terms_on_every_rank,
    build_loss,
    outcomes,
    outcomes_of,
    random_problem,
    reference_of,
    relative_difference,
    tied_problem,
)


class Cut(NamedTuple):
    """A problem and the rows of every rank."""

    problem: Problem
    row_counts: list[int]


def regularised(**options: Any) -> Problem:
    return random_problem(regularization_weight=0.3, **options)


CUTS = {
    "7 classes on 3 ranks": Cut(regularised(num_classes=7, proxies_per_class=3, topk=9), [3, 2, 2]),
    "7 classes on 2 ranks": Cut(regularised(num_classes=7, proxies_per_class=2, topk=6), [5, 2]),
    "a rank without classes": Cut(regularised(num_classes=2, proxies_per_class=3, topk=5), [3, 2, 2]),
    "4 classes on 3 ranks": Cut(regularised(num_classes=4, proxies_per_class=2, topk=5), [2, 2, 3]),
    "one class a rank": Cut(regularised(num_classes=3, proxies_per_class=4, topk=9), [3, 2, 2]),
    "k one more than N": Cut(regularised(num_classes=7, proxies_per_class=3, topk=4), [3, 2, 2]),
    "k beyond one partition": Cut(regularised(num_classes=7, proxies_per_class=1, topk=5), [3, 2, 2]),
    "everything kept": Cut(regularised(num_classes=7, proxies_per_class=2, topk=14), [3, 2, 2]),
    "one proxy, not regularised": Cut(random_problem(num_classes=7, topk=4), [3, 2, 2]),
    "a rank without images": Cut(regularised(num_classes=7, proxies_per_class=2, topk=6), [4, 0, 3]),
    "a short last batch": Cut(regularised(num_classes=7, proxies_per_class=2, topk=6, num_images=2), [2, 0, 0]),
    "one image": Cut(regularised(num_classes=7, topk=4, num_images=1), [0, 0, 1]),
    "neither images nor classes": Cut(regularised(num_classes=2, proxies_per_class=2, topk=3, num_images=3), [2, 1, 0]),
    "images of one class": Cut(regularised(num_classes=7, proxies_per_class=2, topk=5, labels=[6] * 7), [3, 2, 2]),
    "labels owned by other ranks": Cut(regularised(num_classes=7, topk=3, labels=[6, 6, 5, 0, 1, 0, 2]), [3, 2, 2]),
    "another scale": Cut(regularised(num_classes=7, proxies_per_class=2, topk=6, scale=3.5), [3, 2, 2]),
    "a heavy regulariser": Cut(
        random_problem(num_classes=7, proxies_per_class=3, topk=9, regularization_weight=50.0),
        [3, 2, 2],
    ),
    "ties": Cut(
        tied_problem(num_classes=7, proxies_per_class=2, topk=6, regularization_weight=0.3),
        [3, 2, 2],
    ),
    "everything ties": Cut(tied_problem(num_classes=7, topk=4, num_directions=1), [3, 2, 2]),
    "ties and a rank without classes": Cut(tied_problem(num_classes=2, proxies_per_class=4, topk=6), [3, 2, 2]),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_loss_of_all_ranks_is_that_of_the_oracle(name: str) -> None:
    problem, row_counts = CUTS[name]
    tasks = [
        Task(problem, row_counts, {"selection": selection, "gradient_reduction": "sum"}) for selection in SELECTIONS
    ]
    for results in outcomes_of(tasks, world_size=len(row_counts)):
        assert [len(result.grad_embeddings) for result in results] == row_counts
        assert_agrees_with_the_oracle(results, problem)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_many_drawn_problems_with_ties_agree_with_the_oracle(selection: str) -> None:
    draw = random.Random(0)
    tasks = []
    for seed in range(36):
        num_classes, proxies_per_class = draw.randint(2, 7), draw.randint(1, 3)
        problem = tied_problem(
            num_classes=num_classes,
            proxies_per_class=proxies_per_class,
            num_images=5,
            num_directions=draw.randint(1, 4),
            seed=seed,
            topk=draw.randint(proxies_per_class + 1, num_classes * proxies_per_class),
            regularization_weight=draw.choice([0.0, 0.25]),
        )
        options = {"selection": selection, "gradient_reduction": "sum"}
        tasks.append(Task(problem, [2, 0, 3], options))
    for task, results in zip(tasks, outcomes_of(tasks, world_size=3), strict=True):
        assert_agrees_with_the_oracle(results, task.problem)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_for_an_averaging_engine_the_embeddings_gradient_is_w_times_the_global_one(
    selection: str,
) -> None:
    problem, row_counts = CUTS["7 classes on 3 ranks"]
    results = outcomes(problem, world_size=3, row_counts=row_counts, selection=selection, gradient_reduction="mean")
    assert_agrees_with_the_oracle(results, problem, embedding_gradient_factor=3)


def backbone_gradients(context: ParallelContext, gradient_reduction: str, selection: str) -> tuple[Tensor, Tensor]:
    """The gradient of a shared linear layer after the reduction that the option announces."""
    problem = CUTS["7 classes on 3 ranks"].problem
    loss = build_loss(problem, group=context.group, selection=selection, gradient_reduction=gradient_reduction)
    rows = [slice(0, 3), slice(3, 5), slice(5, 7)][context.rank]
    weight = torch.eye(problem.embeddings.shape[1], dtype=torch.float64, requires_grad=True)
    loss(problem.embeddings[rows] @ weight, problem.labels[rows]).total.backward()
    assert weight.grad is not None
    torch.distributed.all_reduce(weight.grad, group=context.group)
    if gradient_reduction == "mean":
        weight.grad /= context.world_size
    return weight.grad, loss.proxies.grad  # type: ignore[return-value]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("gradient_reduction", ["mean", "sum"])
def test_a_shared_layer_gets_the_gradient_of_the_global_mean_loss(gradient_reduction: str, selection: str) -> None:
    problem = CUTS["7 classes on 3 ranks"].problem
    expected = problem.embeddings.T @ reference_of(problem).grad_embeddings
    for weight_gradient, _ in run_ranks(backbone_gradients, 3, gradient_reduction, selection):
        assert relative_difference(weight_gradient, expected) < ROUNDING


@pytest.mark.parametrize("selection", SELECTIONS)
def test_float32_agrees_with_the_oracle_to_float32(selection: str) -> None:
    problem, row_counts = CUTS["7 classes on 3 ranks"]
    rounded = problem._replace(embeddings=problem.embeddings.float(), proxies=problem.proxies.float())
    results = outcomes(rounded, world_size=3, row_counts=row_counts, selection=selection, gradient_reduction="sum")
    assert results[0].total.dtype == torch.float32
    expected = reference_of(rounded._replace(embeddings=rounded.embeddings.double(), proxies=rounded.proxies.double()))
    assert relative_difference(results[0].total.double(), expected.terms.total.detach()) < 1e-6
    grad_proxies = torch.cat([result.grad_proxies for result in results]).double()
    grad_embeddings = torch.cat([result.grad_embeddings for result in results]).double()
    assert relative_difference(grad_proxies, expected.grad_proxies) < 1e-5
    assert relative_difference(grad_embeddings, expected.grad_embeddings) < 1e-5


def test_a_row_at_a_time_gives_the_same_loss_and_gradients() -> None:
    cuts = [
        cut._replace(problem=cut.problem._replace(regularization_weight=0.0))
        for cut in CUTS.values()
        if len(cut.row_counts) == 3
    ]
    tasks = [
        Task(problem, row_counts, {"selection": selection, "memory_budget": 1, "gradient_reduction": "sum"})
        for problem, row_counts in cuts
        for selection in SELECTIONS
    ]
    for task, results in zip(tasks, outcomes_of(tasks, world_size=3), strict=True):
        assert_agrees_with_the_oracle(results, task.problem)


def test_all_selections_keep_the_same_proxies_where_numbers_are_exact() -> None:
    problem = tied_problem(num_classes=7, proxies_per_class=2, topk=6, num_directions=4, seed=3)
    gather, *others = outcomes_of(
        [Task(problem, [3, 1, 3], {"selection": selection}) for selection in SELECTIONS],
        world_size=3,
    )
    for other in others:
        assert torch.equal(gather[0].kept_classes, other[0].kept_classes)
        for one, another in zip(gather, other, strict=True):
            assert torch.equal(one.grad_proxies.abs() > 1e-12, another.grad_proxies.abs() > 1e-12)
            assert relative_difference(one.total, another.total) < 1e-15


def proxies_and_loss_without_gradient(context: ParallelContext, options: dict[str, Any]) -> tuple[Tensor, LossTerms]:
    problem = CUTS["7 classes on 3 ranks"].problem
    loss = build_loss(problem, group=context.group, **options)
    with torch.no_grad():
        terms = loss(problem.embeddings, problem.labels)  # the same images on every rank
    initial = ProxyGMLLoss(5000, 3, proxies_per_class=2, group=context.group, seed=7).proxies.detach()
    return initial, terms


@pytest.mark.parametrize("world_size", [2, 3])
def test_initial_proxies_are_the_same_bits_on_any_number_of_ranks(world_size: int) -> None:
    whole = ProxyGMLLoss(5000, 3, proxies_per_class=2, seed=7).proxies.detach()
    results = run_ranks(proxies_and_loss_without_gradient, world_size, {})
    assert torch.equal(torch.cat([initial for initial, _ in results]), whole)


def kept_for_ratio(context: ParallelContext) -> list[int]:
    sizes = [(98, 12, 0.05), (45, 12, 0.05), (7, 1, 0.5)]
    return [
        ProxyGMLLoss(num_classes, 2, proxies_per_class=number, ratio=ratio, group=context.group).topk
        for num_classes, number, ratio in sizes
    ]


def test_k_comes_from_all_classes_and_not_from_those_of_a_rank() -> None:
    assert run_ranks(kept_for_ratio, 3) == [[59, 27, 4]] * 3


def test_the_loss_can_be_evaluated_without_gradients() -> None:
    results = run_ranks(proxies_and_loss_without_gradient, 2, {"selection": "candidates"})
    problem = CUTS["7 classes on 3 ranks"].problem
    twice = problem._replace(embeddings=problem.embeddings.repeat(2, 1), labels=problem.labels.repeat(2))
    expected = reference_of(twice).terms
    for _, terms in results:
        assert not terms.total.requires_grad
        assert relative_difference(terms.total, expected.total.detach()) < ROUNDING


def test_an_automatic_selection_gives_the_same_loss() -> None:
    problem, row_counts = CUTS["7 classes on 3 ranks"]
    results = outcomes(problem, world_size=3, row_counts=row_counts, gradient_reduction="sum")
    assert_agrees_with_the_oracle(results, problem)


def test_world_size_does_not_change_the_terms() -> None:
    problem = CUTS["7 classes on 3 ranks"].problem
    one = outcomes(problem, world_size=None)
    three = outcomes(problem, world_size=3)
    assert_same_terms_on_every_rank(three)
    assert relative_difference(three[0].total, one[0].total) < ROUNDING
    assert torch.equal(three[0].kept_classes, one[0].kept_classes)


# Ranks fail together


def messages_of_a_bad_batch(context: ParallelContext, bad_ranks: list[int], fault: str) -> tuple[str, float]:
    """The error of a batch that is wrong on some ranks, and the loss of a good one after it."""
    problem = random_problem(num_classes=7, topk=4, num_images=4, seed=context.rank)
    loss = build_loss(problem, group=context.group)
    embeddings, labels = problem.embeddings.clone(), problem.labels.clone()
    if context.rank in bad_ranks:
        row = 1 + context.rank
        if fault == "nan":
            embeddings[row, 3] = float("nan")
        elif fault == "infinity":
            embeddings[row, 0] = float("inf")
        elif fault == "label too large":
            labels[row] = 7
        elif fault == "negative label":
            labels[row] = -1
        elif fault == "type of embeddings":
            embeddings = embeddings.float()
        elif fault == "type of labels":
            labels = labels.int()
        elif fault == "dimension":
            embeddings = embeddings[:, :-1]
        elif fault == "number of labels":
            labels = labels[:-1]
        else:
            raise AssertionError(fault)
    with pytest.raises(ValueError, match=r"^expected") as raised:
        loss(embeddings, labels)
    return str(raised.value), float(loss(problem.embeddings, problem.labels).total)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("nan", ["NaN", "row 2", "rank 1"]),
        ("infinity", ["infinity", "row 2", "rank 1"]),
        ("label too large", ["0 to 6", "got 7", "row 2", "rank 1"]),
        ("negative label", ["0 to 6", "got -1", "row 2", "rank 1"]),
        ("type of embeddings", ["torch.float64", "torch.float32", "rank 1"]),
        ("type of labels", ["torch.int64", "torch.int32", "rank 1"]),
        ("dimension", ["[b, 5]", "[4, 4]", "rank 1"]),
        ("number of labels", ["[4, 5]", "[3]", "rank 1"]),
    ],
)
def test_a_bad_batch_on_one_rank_is_the_same_error_on_all(fault: str, expected: list[str]) -> None:
    results = run_ranks(messages_of_a_bad_batch, 3, [1], fault, timeout=180)
    messages = {message for message, _ in results}
    assert len(messages) == 1
    message = messages.pop()
    assert all(part in message for part in expected), message
    assert len({total for _, total in results}) == 1  # and the group still works


def test_of_several_bad_ranks_the_lowest_is_named() -> None:
    results = run_ranks(messages_of_a_bad_batch, 3, [1, 2], "nan", timeout=180)
    assert all("rank 1" in message and "row 2" in message for message, _ in results)


def empty_everywhere(context: ParallelContext) -> str:
    problem = random_problem(num_classes=7, topk=4)
    loss = build_loss(problem, group=context.group)
    with pytest.raises(ValueError, match=r"^expected") as raised:
        loss(problem.embeddings[:0], problem.labels[:0])
    return str(raised.value)


def test_a_batch_that_is_empty_on_every_rank_is_refused() -> None:
    assert all("at least one image" in message for message in run_ranks(empty_everywhere, 2))


def loss_with_a_broken_proxy(context: ParallelContext, selection: str) -> None:
    loss = ProxyGMLLoss(7, 4, topk=3, group=context.group, selection=selection)
    if context.rank == context.world_size - 1:
        with torch.no_grad():
            loss.proxies[-1] = math.nan
    embeddings = torch.nn.functional.normalize(torch.ones(2, 4))
    loss(embeddings, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("selection", ["gather", "candidates"])
def test_a_broken_proxy_of_another_rank_is_reported_by_all(selection: str) -> None:
    with pytest.raises(ValueError, match="proxy"):
        run_ranks(loss_with_a_broken_proxy, 3, selection)


def loss_of_a_large_bank(context: ParallelContext, selection: str, num_broken: int) -> float:
    """Rank 0 has no images; the last rank's first classes are NaN."""
    loss = ProxyGMLLoss(10_000, 4, topk=50, group=context.group, selection=selection)
    if context.rank == context.world_size - 1:
        with torch.no_grad():
            loss.proxies[:num_broken] = math.nan
    generator = torch.Generator().manual_seed(context.rank)
    embeddings = torch.nn.functional.normalize(torch.randn(2 * context.rank, 4, generator=generator), dim=1)
    terms = loss(embeddings.requires_grad_(), torch.arange(2 * context.rank))
    terms.total.backward()
    return terms.total.item()


def test_a_large_bank_works_with_a_rank_without_images() -> None:
    losses = [run_ranks(loss_of_a_large_bank, 2, selection, 0) for selection in SELECTIONS]
    assert all(value == pytest.approx(losses[0][0], rel=1e-5) for values in losses for value in values)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_rank_whose_proxies_are_all_broken_is_reported_by_all(selection: str) -> None:
    with pytest.raises(ValueError, match="proxy"):
        run_ranks(loss_of_a_large_bank, 2, selection, 5000)

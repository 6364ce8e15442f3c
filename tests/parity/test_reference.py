"""The oracle, which the other tests trust, against numbers recorded from the authors' code."""

import pytest
import torch

from tests.problems import (
    GOLDEN_CASES,
    golden_problem,
    load_golden,
    reference_of,
    relative_difference,
)
from tests.reference import ReferenceAdam, kept_proxies, num_kept

# The recorded code adds 1e-8 and 1e-20 where the equations have nothing: differences up to 1e-9.
RELATIVE = 1e-8


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_oracle_agrees_with_the_recorded_loss_and_gradients(case: str) -> None:
    golden = load_golden(case)
    result = reference_of(golden_problem(case))
    terms = result.terms
    assert relative_difference(terms.total.detach(), golden["loss_total"]) < RELATIVE
    assert relative_difference(terms.classification.detach(), golden["loss_classification"]) < RELATIVE
    assert relative_difference(result.grad_embeddings, golden["grad_embeddings"]) < RELATIVE
    assert relative_difference(result.grad_proxies, golden["grad_proxies"]) < RELATIVE


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_oracle_counts_kept_proxies_as_recorded(case: str) -> None:
    golden = load_golden(case)
    num_classes, proxies_per_class, _ = golden["proxies"].shape
    k = num_kept(ratio=float(golden["ratio"]), num_classes=num_classes, proxies_per_class=proxies_per_class)
    assert k == int(golden["k"])


def test_the_oracle_takes_the_recorded_steps_of_adam() -> None:
    golden, problem = load_golden("n3_regularised"), golden_problem("n3_regularised")
    adam = ReferenceAdam(
        lr=float(golden["adam_lr"]),
        eps=float(golden["adam_eps"]),
        weight_decay=float(golden["adam_weight_decay"]),
    )
    losses = []
    for _ in range(5):
        result = reference_of(problem)
        losses.append(result.terms.total.detach())
        problem = problem._replace(proxies=adam.step(problem.proxies, result.grad_proxies))
    assert relative_difference(torch.stack(losses), golden["adam_losses"]) < RELATIVE
    assert relative_difference(problem.proxies, golden["adam_proxies"]) < RELATIVE


def test_the_oracle_keeps_the_positives_then_the_best_negatives_with_the_lower_index_first() -> None:
    similarity = [0.5, 0.9, 0.5, -1.0, 0.5]
    positive = [False, False, False, True, False]
    assert kept_proxies(similarity, positive, topk=3) == [True, True, False, True, False]

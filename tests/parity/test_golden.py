"""The loss in one process and on 1, 2 and 3 ranks against numbers recorded from the authors' code.

In float64: loss, both gradients and five steps of Adam, with both selections and both conventions
for the embeddings' gradient. The recorded numbers carry two small constants of the authors'
formulas, hence 1e-8 and not rounding.
"""

from typing import Any

import pytest
import torch

from dist_proxygml import ProxyGMLLoss
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from tests.harness import run_ranks
from tests.problems import (
    GOLDEN_CASES,
    SELECTIONS,
    Task,
    assert_same_terms_on_every_rank,
    build_loss,
    even_rows,
    golden_problem,
    load_golden,
    outcomes_of,
    relative_difference,
)

RELATIVE = 1e-8
WORLD_SIZES = [
    pytest.param(None, id="no_group"),
    *(pytest.param(n, id=f"{n}_ranks") for n in (1, 2, 3)),
]


@pytest.mark.parametrize("gradient_reduction", ["sum", "mean"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_loss_and_gradients_are_the_recorded_ones(
    world_size: int | None, selection: str, gradient_reduction: str
) -> None:
    options = {"selection": selection, "gradient_reduction": gradient_reduction}
    tasks = [Task(golden_problem(case), options=options) for case in GOLDEN_CASES]
    # An averaging engine divides by W, so with "mean" the loss hands out W times the gradient.
    factor = (world_size or 1) if gradient_reduction == "mean" else 1
    per_case = outcomes_of(tasks, world_size=world_size)
    for case, results in zip(GOLDEN_CASES, per_case, strict=True):
        golden = load_golden(case)
        assert_same_terms_on_every_rank(results)
        difference = {
            name: relative_difference(actual, expected)
            for name, actual, expected in (
                ("total", results[0].total, golden["loss_total"]),
                ("classification", results[0].classification, golden["loss_classification"]),
                (
                    "gradient of the embeddings",
                    torch.cat([result.grad_embeddings for result in results]),
                    factor * golden["grad_embeddings"],
                ),
                (
                    "gradient of the proxies",
                    torch.cat([result.grad_proxies for result in results]),
                    golden["grad_proxies"],
                ),
            )
        }
        assert max(difference.values()) < RELATIVE, (case, difference)


def five_steps_of_adam(context: ParallelContext, selection: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss before each step and this rank's proxies after the fifth."""
    golden, problem = load_golden("n3_regularised"), golden_problem("n3_regularised")
    counts = even_rows(len(problem.labels), context.world_size)
    first = sum(counts[: context.rank])
    rows = slice(first, first + counts[context.rank])
    loss = build_loss(problem, group=context.group, selection=selection)
    adam = torch.optim.Adam(
        [loss.proxies],
        lr=float(golden["adam_lr"]),
        eps=float(golden["adam_eps"]),
        weight_decay=float(golden["adam_weight_decay"]),
    )
    losses = []
    for _ in range(5):
        adam.zero_grad()
        total = loss(problem.embeddings[rows], problem.labels[rows]).total
        total.backward()
        adam.step()
        losses.append(total.detach())
    return torch.stack(losses), loss.proxies.detach()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_five_steps_of_adam_are_the_recorded_ones(world_size: int | None, selection: str) -> None:
    golden = load_golden("n3_regularised")
    results: list[Any]
    if world_size is None:
        results = [five_steps_of_adam(single_process(), selection)]
    else:
        results = run_ranks(five_steps_of_adam, world_size, selection)
    for losses, _ in results:
        assert relative_difference(losses, golden["adam_losses"]) < RELATIVE
    proxies = torch.cat([proxies for _, proxies in results])
    assert relative_difference(proxies, golden["adam_proxies"]) < RELATIVE


def test_the_number_of_kept_proxies_is_the_recorded_one() -> None:
    for case in GOLDEN_CASES:
        golden = load_golden(case)
        num_classes, proxies_per_class, embedding_dim = golden["proxies"].shape
        ratio = float(golden["ratio"])
        loss = ProxyGMLLoss(num_classes, embedding_dim, proxies_per_class=proxies_per_class, ratio=ratio)
        assert loss.topk == int(golden["k"]), case

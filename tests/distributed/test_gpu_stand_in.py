"""The code for GPUs, on a stand-in, on several ranks: every selection is that of the oracle, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.config import BackboneConfig
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.head.statistics import ProxyStatistics, ProxyUse
from tests.gpu_stand_in import StandIn
from tests.harness import run_ranks
from tests.problems import (
    SELECTIONS,
    Outcome,
    Problem,
    Task,
    assert_agrees_with_the_oracle,
    build_loss,
    outcomes_on_rank,
    random_problem,
    tied_problem,
)

# With masks over all similarities; with lists of pairs, in blocks of one row.
ROUTES: list[dict[str, Any]] = [{}, {"memory_budget": 1}]


def tasks() -> list[Task]:
    problems = [
        random_problem(num_classes=7, proxies_per_class=2, topk=6),
        random_problem(num_classes=2, proxies_per_class=1, topk=2),  # a rank without a class
        random_problem(num_classes=7, topk=7, scale=3.0),  # all proxies kept
        tied_problem(num_classes=7, proxies_per_class=3, topk=8),
    ]
    return [
        Task(problem, None, {"selection": selection, "gradient_reduction": "sum"} | route)
        for problem in problems
        for selection in SELECTIONS
        for route in ROUTES
    ] + [
        Task(problem, None, {"gradient_reduction": "sum"} | options)
        for problem, options in (
            (random_problem(num_classes=7, proxies_per_class=2, topk=6, regularization_weight=0.3), {}),
            (searched(), {"sparse": True}),
        )
    ]


def searched() -> Problem:
    """So many proxies that the best are looked for above a guessed bound."""
    return random_problem(num_classes=4099, topk=30)


def outcomes_on_gpu(context: ParallelContext, tasks: list[Task]) -> list[Outcome]:
    with StandIn():
        return outcomes_on_rank(context, tasks, device="cuda")


@pytest.mark.filterwarnings("ignore:k = ")
@pytest.mark.parametrize("world_size", [None, 2, pytest.param(3, marks=pytest.mark.ci)])
def test_every_selection_and_route_is_that_of_the_oracle(world_size: int | None) -> None:
    if world_size is None:
        ranks = [outcomes_on_gpu(single_process(), tasks())]
    else:
        ranks = run_ranks(outcomes_on_gpu, world_size, tasks())
    for task, results in zip(tasks(), zip(*ranks, strict=True), strict=True):
        assert_agrees_with_the_oracle(results, task.problem)


def use_of_proxies(context: ParallelContext, device: str) -> ProxyUse:
    problem = random_problem(num_classes=9, proxies_per_class=3, num_images=12, topk=5)
    loss = build_loss(problem, group=context.group, selection="candidates").to(device)
    statistics = ProxyStatistics(loss.partition, 3, device=loss.device, group=context.group)
    loss.observer = statistics.observe
    for step in range(2):
        statistics.begin_step(is_logged=step == 0)
        rows = F.normalize(problem.embeddings + step)[context.rank :: context.world_size]
        loss(rows.to(device), problem.labels[context.rank :: context.world_size].to(device))
    return statistics.close_window()


def use_on_both(context: ParallelContext) -> list[ProxyUse]:
    with StandIn():
        on_gpu = use_of_proxies(context, "cuda")
    return [use_of_proxies(context, "cpu"), on_gpu]


def test_the_use_of_proxies_is_what_it_is_on_cpus() -> None:
    expected, _ = use_on_both(single_process())
    assert 0 < expected.num_dead < 27
    for found in run_ranks(use_on_both, 2):
        assert found == [expected, expected]


def launches_of_a_network(context: ParallelContext) -> tuple[int, int, int]:
    """Of BN-Inception forward and backward: launches, waits, collectives."""
    with StandIn() as gpu:
        settings = BackboneConfig(name="bn_inception", embedding_dim=16, batch_norm="train")
        model = build_backbone(settings, group=context.group).to("cuda").train()
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8).to("cuda")
        gpu.clear()
        model(images).sum().backward()
        assert all(parameter.grad.device.type == "cuda" for parameter in model.parameters())
        return gpu.num_launches, gpu.num_synchronisations, gpu.num_collectives


MOST_LAUNCHES = {1: 640, 2: 1330}  # by the number of ranks


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.ci)])
def test_a_network_waits_for_nothing_and_communicates_twice_a_layer(world_size: int) -> None:
    num_layers = 69  # with batch norm
    for launches, waits, collectives in run_ranks(launches_of_a_network, world_size):
        assert launches <= MOST_LAUNCHES[world_size]
        assert waits == 0
        assert collectives == (0 if world_size == 1 else 2 * num_layers)  # statistics, and their gradients

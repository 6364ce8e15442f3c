"""The statistics of proxies are those of a loop over the whole similarity matrix, on any number of ranks."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.head import statistics as proxy_statistics
from dist_proxygml.head.statistics import ProxyStatistics, ProxyUse
from tests.harness import run_ranks
from tests.problems import Problem, build_loss, even_rows, random_problem

BATCHES = (slice(0, 9), slice(9, 13), slice(13, 14))  # the last one leaves ranks without an image
LOGGED = (True, False, True)
MIXED = ("candidates", "gather", "histogram")  # a batch of another size may be selected in another way
NUM_SAMPLED = 10

MANY = random_problem(num_classes=23, proxies_per_class=3, num_images=14, topk=6, seed=3)
FEW = random_problem(num_classes=2, proxies_per_class=2, num_images=14, topk=3, seed=4)  # the third rank has none

CASES = [
    (problem, selections)
    for problem in (MANY, FEW)
    for selections in (("gather",) * 3, ("candidates",) * 3, ("histogram",) * 3, MIXED)
]


class Seen(NamedTuple):
    """What a rank came to know."""

    first: list[list[int]]  # histograms of the first batch
    rest: list[list[int]]
    norms: list[float]
    times_kept: list[int]
    use: ProxyUse
    second_use: ProxyUse  # of the last batch alone, again
    losses: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    unobserved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def observe(context: ParallelContext, problem: Problem, selections: tuple[str, ...]) -> Seen:
    proxy_statistics.NUM_SAMPLED = NUM_SAMPLED  # in this process only
    loss = build_loss(problem, group=context.group)
    statistics = ProxyStatistics(
        loss.partition, loss.proxies_per_class, device=torch.device("cpu"), group=context.group
    )

    def step(batch: slice, selection: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = even_rows(batch.stop - batch.start, context.world_size)
        first = batch.start + sum(counts[: context.rank])
        rows = slice(first, first + counts[context.rank])
        loss.selection, loss.proxies.grad = selection, None
        embeddings = problem.embeddings[rows].clone().requires_grad_()
        total = loss(embeddings, problem.labels[rows]).total
        total.backward()
        return total.detach(), embeddings.grad, loss.proxies.grad

    unobserved = [step(batch, selection) for batch, selection in zip(BATCHES, selections, strict=True)]
    loss.observer = statistics.observe
    taken, losses = [], []
    for batch, is_logged, selection in zip(BATCHES, LOGGED, selections, strict=True):
        statistics.begin_step(is_logged=is_logged)
        losses.append(step(batch, selection))
        if batch.start == 0:
            taken.append(statistics.take_similarities())
    taken.append(statistics.take_similarities())
    sampled = statistics.sample(loss.proxies.detach())
    use = statistics.close_window()
    statistics.begin_step(is_logged=True)
    step(BATCHES[-1], selections[0])
    return Seen(
        *([list(part) for part in counts] for counts in taken),
        sampled.norm.tolist(),
        sampled.times_kept.tolist(),
        use,
        statistics.close_window(),
        losses,
        unobserved,
    )


def observe_all(context: ParallelContext) -> list[Seen]:
    return [observe(context, problem, selections) for problem, selections in CASES]


class Expected:
    """The same by a loop."""

    def __init__(self, problem: Problem, batches: list[tuple[slice, bool]]) -> None:
        num_classes, per_class, _ = problem.proxies.shape
        similarity_BP = problem.embeddings @ F.normalize(problem.proxies.flatten(0, 1), dim=1).T
        self.positive, self.negative = np.zeros(100, int), np.zeros(100, int)
        nearest: set[int] = set()
        self.times_kept: Counter[int] = Counter()
        for batch, is_logged in batches:
            for image in range(batch.start, batch.stop):
                row = similarity_BP[image].tolist()
                own = range(int(problem.labels[image]) * per_class, (int(problem.labels[image]) + 1) * per_class)
                others = sorted(set(range(len(row))) - set(own), key=lambda proxy: (-row[proxy], proxy))
                kept = others[: problem.topk - per_class]
                nearest.add(max(own, key=lambda proxy: row[proxy]))
                self.times_kept.update(kept)
                if is_logged:
                    self.positive += np.histogram([row[proxy] for proxy in own], bins=100, range=(-1, 1))[0]
                    self.negative += np.histogram([row[proxy] for proxy in kept], bins=100, range=(-1, 1))[0]
        dead = [proxy for proxy in range(num_classes * per_class) if proxy not in nearest | self.times_kept.keys()]
        self.num_dead = len(dead)
        self.examples = [divmod(proxy, per_class) for proxy in dead[:20]]


@pytest.mark.parametrize("world_size", [None, 1, 2, 3])
def test_the_counts_are_those_of_a_loop_over_all_similarities(world_size: int | None) -> None:
    if world_size is None:
        ranks = [observe_all(single_process())]
    else:
        ranks = run_ranks(observe_all, world_size)
    for (problem, _), *seen_by_ranks in zip(CASES, *ranks, strict=True):
        whole = Expected(problem, list(zip(BATCHES, LOGGED, strict=True)))
        first = Expected(problem, [(BATCHES[0], True)])
        again = Expected(problem, [(BATCHES[-1], True)])
        stride = -(-problem.proxies[..., 0].numel() // NUM_SAMPLED)
        for seen in seen_by_ranks:
            assert seen.first == [first.positive.tolist(), first.negative.tolist()]
            assert seen.rest == [
                (whole.positive - first.positive).tolist(),
                (whole.negative - first.negative).tolist(),
            ]
            norms = problem.proxies.flatten(0, 1).norm(dim=1)[::stride]
            np.testing.assert_allclose(seen.norms, norms, rtol=1e-6)
            assert seen.times_kept == [whole.times_kept[int(p)] for p in range(0, stride * len(norms), stride)]
            for use, expected, num_steps, num_images in ((seen.use, whole, 3, 14), (seen.second_use, again, 1, 1)):
                assert (use.window_steps, use.num_images) == (num_steps, num_images)
                assert (use.num_classes, use.per_class) == problem.proxies.shape[:2]
                assert (use.num_dead, use.dead_examples) == (expected.num_dead, expected.examples)
                assert use.similarities.positive == expected.positive.tolist()
                assert use.similarities.negative == expected.negative.tolist()
            for observed, unobserved in zip(seen.losses, seen.unobserved, strict=True):
                assert all(map(torch.equal, observed, unobserved))
    assert 20 < Expected(MANY, [(BATCHES[0], True)]).num_dead < 69

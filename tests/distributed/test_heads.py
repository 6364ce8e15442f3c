"""Every head on 1, 2 and 3 ranks: the same losses, gradients and optimizer steps, also across a change of ranks."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.margins import Margin
from dist_proxygml.head.optim import RowwiseAdagrad, SparseAdam
from tests.harness import run_ranks

NUM_CLASSES, PER_CLASS, DIM = 7, 2, 5
ROWS = {1: [7], 2: [5, 2], 3: [4, 0, 3]}
COMPETING: dict[str, dict[str, Any]] = {
    "topk": {"negatives": "topk", "topk": 6},
    "all": {"negatives": "all"},
    "sampled": {"negatives": "sampled", "share": 0.5},
}
MARGINS = {
    "none": None,
    "cosface": Margin("cosface", 0.3),
    "arcface": Margin("arcface", 0.4),
    "adaface": Margin("adaface", 0.4),
}
HEADS = {
    f"{competing}, {how}, {margin}": Head(
        **COMPETING[competing], class_score=how, margin=MARGINS[margin], scale=6.0, learn_scale=learned
    )
    for (competing, learned), how, margin in itertools.product(
        [("topk", False), ("all", True), ("sampled", True)], ("sum", "softmax", "max"), MARGINS
    )
    if how != "sum" or margin in ("none", "cosface")
}


class Run(NamedTuple):
    """What three steps brought, the same on every rank."""

    losses: list[float]
    proxies: Tensor  # [C, N, D]
    scale: float
    gradients: Tensor  # [B, D], of the embeddings in the last step


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    lengths_B1 = 15 + 10 * torch.rand(7, 1, generator=generator, dtype=torch.float64)
    rows_BD = F.normalize(torch.randn(7, DIM, generator=generator, dtype=torch.float64)) * lengths_B1
    return rows_BD, torch.randint(NUM_CLASSES, (7,), generator=generator)


def three_steps(context: ParallelContext, head: Head, rule: str) -> Run:
    loss = ProxyLoss(
        NUM_CLASSES,
        DIM,
        head,
        proxies_per_class=PER_CLASS,
        group=context.group,
        gradient_reduction="sum",
        seed=1,
        sparse=rule == "sparse_adam",
        matryoshka_dims=(2, 4) if head.class_score == "sum" else (),
    ).double()
    parameters = list(loss.parameters())
    optimizer: torch.optim.Optimizer = {
        "adam": lambda: torch.optim.Adam(parameters, 0.05),
        "rowwise_adagrad": lambda: RowwiseAdagrad(parameters, 0.05),
        "sparse_adam": lambda: SparseAdam(parameters, 0.05),
    }[rule]()
    counts = ROWS[context.world_size]
    first = sum(counts[: context.rank])
    losses = []
    for step in range(3):
        rows_BD, labels_B = batch(step)
        own_bD = rows_BD[first : first + counts[context.rank]].clone().requires_grad_()
        total = loss(own_bD, labels_B[first : first + counts[context.rank]]).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    whole = loss.full_state_dict(optimizer)
    parts = [None] * context.world_size
    if context.group is None:
        return Run(losses, whole["proxies"], loss.scale, own_bD.grad)  # type: ignore[arg-type]
    torch.distributed.all_gather_object(parts, (whole.get("proxies"), own_bD.grad), group=context.group)
    return Run(losses, parts[0][0], loss.scale, torch.cat([part[1] for part in parts]))  # type: ignore[index]


def runs_of(context: ParallelContext, heads: dict[str, Head], rule: str) -> dict[str, Run]:
    return {name: three_steps(context, head, rule) for name, head in heads.items()}


@pytest.mark.parametrize("rule", ["adam", pytest.param("rowwise_adagrad", marks=pytest.mark.ci)])
def test_any_number_of_ranks_gives_the_same_steps(rule: str) -> None:
    expected = run_ranks(runs_of, 1, HEADS, rule)[0]
    for world_size in (2, 3):
        for runs in run_ranks(runs_of, world_size, HEADS, rule, timeout=180):
            for name, run in runs.items():
                wanted = expected[name]
                assert run.losses == pytest.approx(wanted.losses, rel=1e-11), name
                assert run.scale == pytest.approx(wanted.scale, rel=1e-11), name
                torch.testing.assert_close(run.proxies, wanted.proxies, rtol=1e-9, atol=1e-11, msg=name)
                torch.testing.assert_close(run.gradients, wanted.gradients, rtol=1e-9, atol=1e-11, msg=name)
    learned = {name: run.scale for name, run in expected.items() if HEADS[name].learn_scale}
    assert all(abs(scale - 6) > 1e-3 for scale in learned.values()), learned


def test_sparse_steps_on_sampled_classes_are_the_same_on_any_number_of_ranks() -> None:
    heads = {name: head for name, head in HEADS.items() if head.negatives == "sampled"}
    expected = run_ranks(runs_of, 1, heads, "sparse_adam")[0]
    for runs in run_ranks(runs_of, 3, heads, "sparse_adam", timeout=180):
        for name, run in runs.items():
            torch.testing.assert_close(run.proxies, expected[name].proxies, rtol=1e-9, atol=1e-11, msg=name)


def state_moves(context: ParallelContext, head: Head, state: dict[str, Tensor] | None) -> Any:
    """A step, its state; or what a loss is that begins from a state, and its state again."""
    loss = ProxyLoss(NUM_CLASSES, DIM, head, proxies_per_class=PER_CLASS, group=context.group).double()
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    if state is not None:
        loss.load_full_state_dict(state if context.is_main else {}, optimizer)
    else:
        rows_BD, labels_B = batch(0)
        loss(rows_BD, labels_B).total.backward()
        optimizer.step()
    return loss.full_state_dict(optimizer)


def test_the_whole_state_goes_to_another_number_of_ranks() -> None:
    head = HEADS["sampled, max, adaface"]
    state = run_ranks(state_moves, 3, head, None)[0]
    assert {"proxies", "log_scale", "length_statistics.mean", "optimizer.exp_avg", "optimizer.log_scale.exp_avg"} < set(
        state
    )
    assert float(state["log_scale"]) != math.log(6.0)
    for world_size in (1, 2):
        again = run_ranks(state_moves, world_size, head, state)[0]
        assert set(again) == set(state)
        for name, value in state.items():
            assert torch.equal(again[name], value), name

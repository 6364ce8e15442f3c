"""The plan's count of messages against the calls that a step really makes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_proxygml.config import load_config
from dist_proxygml.loss import ProxyGMLLoss
from dist_proxygml.parallel import ParallelContext
from dist_proxygml.plan import plan_head
from tests.harness import run_ranks

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_cpu.json"
CALLS = ("all_gather_single", "reduce_scatter_single", "all_reduce", "all_to_all_single")


def messages_of_a_step(context: ParallelContext, selection: str, weight: float) -> int:
    count = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(dist, name, counted(getattr(dist, name)))
    loss = ProxyGMLLoss(7, 4, ratio=0.5, regularization_weight=weight, selection=selection, group=context.group)
    embeddings = torch.nn.functional.normalize(torch.randn(3, 4)).requires_grad_()
    loss(embeddings, torch.arange(3)).total.backward()
    return count


@pytest.mark.parametrize("selection", ["gather", "candidates"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_plan_counts_the_messages_of_a_step(selection: str, weight: float) -> None:
    changes = [f"proxies.selection={selection}", f"proxies.regularization_weight={weight}"]
    planned = plan_head(load_config(DEMO, changes), world_size=2).messages_per_step
    assert run_ranks(messages_of_a_step, 2, selection, weight) == [planned, planned]

"""The plan's count of messages against the calls that a step really makes."""

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_proxygml.config import load_config
from dist_proxygml.distributed.collectives import count_bytes
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.head.choices import Head
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.margins import Margin
from dist_proxygml.training.head_plan import plan_head
from tests.harness import run_ranks

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_cpu.json"
NAMES = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor",
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor",
)
CALLS = (*NAMES, "all_reduce", "all_to_all_single")


PROXYGML = Head(ratio=0.5)


def traffic_of_a_step(
    context: ParallelContext,
    selection: str,
    weight: float,
    anchors: int | None,
    head: Head = PROXYGML,
    prefixes: Sequence[int] = (),
) -> tuple[int, int]:
    count = 0

    def counted(original):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(dist, name, counted(getattr(dist, name)))
    loss = ProxyLoss(
        8,
        4,
        head,
        regularization_weight=weight,
        regularization_anchors=anchors,
        selection=selection,
        matryoshka_dims=prefixes,
        group=context.group,
    )
    embeddings = torch.nn.functional.normalize(torch.randn(3, 4)).requires_grad_()
    with count_bytes() as traffic:
        loss(embeddings, torch.arange(3)).total.backward()
    return count, traffic.received


SELECTIONS = ("gather", "candidates", "histogram")
REGULARIZERS = ((0.0, None), (0.3, None), (0.3, 3))


def traffic_of_steps(context: ParallelContext) -> dict[tuple[object, ...], tuple[int, int]]:
    settings = itertools.product(SELECTIONS, REGULARIZERS)
    return {
        (selection, *regularizer): traffic_of_a_step(context, selection, *regularizer)
        for selection, regularizer in settings
    }


@functools.cache
def measured() -> dict[tuple[object, ...], tuple[int, int]]:
    return run_ranks(traffic_of_steps, 2)[0]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("weight", "anchors"), REGULARIZERS)
def test_the_plan_counts_the_messages_and_bytes_of_a_step(selection: str, weight: float, anchors: int | None) -> None:
    changes = {
        "data.num_classes": 8,
        "backbone.embedding_dim": 4,
        "training.batch_size": 6,
        "proxies.per_class": 1,
        "proxies.ratio": 0.5,
        "proxies.selection": selection,
        "proxies.regularization_weight": weight,
        "proxies.regularization_anchors": anchors,
    }
    config = load_config(DEMO, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    plan = plan_head(config, world_size=2)
    messages, received = measured()[selection, weight, anchors]
    assert messages == plan.messages_per_step
    slack = 4 * 4 * 4 if anchors else 0  # anchors are padded to the rank that owns the most
    assert abs(received - plan.received_bytes_per_step) <= slack


HEADS: dict[str, tuple[Head, dict[str, Any]]] = {
    "all": (Head("all"), {"negatives": "all"}),
    "all, by prefixes": (Head("all"), {"negatives": "all"}),
    "histogram, by prefixes": (PROXYGML, {"ratio": 0.5, "selection": "histogram"}),
    "candidates, by prefixes": (PROXYGML, {"ratio": 0.5, "selection": "candidates"}),
    "gather, by prefixes": (PROXYGML, {"ratio": 0.5, "selection": "gather"}),
    "sampled, learned scale, adaface": (
        Head("sampled", share=0.5, learn_scale=True, margin=Margin("adaface", 0.4)),
        {
            "negatives": "sampled",
            "share": 0.5,
            "learn_scale": True,
            "margin": {"name": "adaface", "margin": 0.4},
        },
    ),
}


def traffic_of_heads(context: ParallelContext) -> dict[str, tuple[int, int]]:
    return {
        name: traffic_of_a_step(context, settings.get("selection", "auto"), 0.0, None, head, prefixes_of(name))
        for name, (head, settings) in HEADS.items()
    }


def prefixes_of(name: str) -> list[int]:
    return [1, 3] if "prefixes" in name else []


def test_the_plan_counts_those_of_other_heads() -> None:
    for name, counted in run_ranks(traffic_of_heads, 2)[0].items():
        settings = {"per_class": 1, "ratio": None, "regularization_weight": 0.0, **HEADS[name][1]}
        changes = {f"proxies.{key}": value for key, value in settings.items()}
        changes |= {"data.num_classes": 8, "backbone.embedding_dim": 4, "training.batch_size": 6}
        changes["backbone.matryoshka_dims"] = prefixes_of(name)
        config = load_config(DEMO, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
        plan = plan_head(config, world_size=2)
        assert counted == (plan.messages_per_step, plan.received_bytes_per_step), name

"""The training step gives the same parameters for any number of ranks, micro-batches and ZeRO stage."""

import numpy as np
import pytest
import torch

from dist_proxygml.config import Config, parse_config
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.data.plan import EpochPlan
from dist_proxygml.engine import engine_settings
from dist_proxygml.parallel import ParallelContext
from tests.harness import run_ranks

NUM_CLASSES, NUM_IMAGES, NUM_STEPS = 7, 42, 20


def configuration(**changes: object) -> Config:
    raw = {
        "name": "parity",
        "data": {
            "shards": "unused",
            "num_classes": NUM_CLASSES,
            "train_transform": {"name": "resize", "size": 16},
            "test_transform": {"name": "resize", "size": 16},
        },
        # running statistics fixed: batch statistics are those of a rank's own images, and so differ between world sizes
        "backbone": {"name": "small_cnn", "embedding_dim": 8, "batch_norm": "frozen", "options": {"width": 4}},
        "proxies": {"per_class": 2, "ratio": 0.5, "regularization_weight": 0.3, "scale": 4.0},
        # a large eps keeps Adam from blowing up rounding where a gradient is almost 0, as the published 0.01 does
        "optimizer": {
            "name": "adam",
            "backbone_lr": 1e-3,
            "embedding_lr": 3e-3,
            "proxies_lr": 1e-2,
            "eps": 0.01,
            "weight_decay": 1e-4,
        },
        "schedule": {"name": "step", "milestones": [3], "gamma": 0.1},
        "training": {"epochs": 6, "batch_size": 12, "frozen_trunk_epochs": [2]},
    }
    return parse_config(raw | changes, source="the test")


def trained_parameters(
    context: ParallelContext, accumulation: int, zero_stage: int, clip: float
) -> dict[str, np.ndarray]:
    """Backbone and this rank's proxies after NUM_STEPS steps: 5 epochs of 4 steps, the last one of 6 images."""
    from dist_proxygml.training import build_train_state, train_step

    config = configuration(
        deepspeed={
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": zero_stage},
            "zero_force_ds_cpu_optimizer": False,
        }
    )
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8))
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    state = build_train_state(config, context, settings=engine_settings(config, context.world_size), steps_per_epoch=4)
    for epoch in range(NUM_STEPS // 4):
        order = np.random.default_rng(epoch).permutation(NUM_IMAGES)
        plan = EpochPlan(order, config.training.batch_size, accumulation, context.world_size)
        assert plan.num_steps == 4
        for step in range(plan.num_steps):
            parts = [plan.micro_batch(step, micro, context.rank) for micro in range(accumulation)]
            batches = [
                Batch(images[p.ids], labels[p.ids], torch.from_numpy(p.ids), p.global_size, p.step_size) for p in parts
            ]
            report = train_step(state, batches, measure=True)
    weights = {name: value.numpy() for name, value in state.engine.full_state_dict().items()}
    return weights | {
        "proxies": state.loss.proxies.detach().numpy(),
        "loss": report.terms.total.numpy(),
        "backbone_norm": np.array(report.backbone_norm),
    }


def whole(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return ranks[0] | {"proxies": np.concatenate([rank["proxies"] for rank in ranks])}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, np.ndarray]:
    return whole(run_ranks(trained_parameters, 1, 1, 0, 0.5, timeout=120))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("world_size", "accumulation", "zero_stage"),
    [(1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 0), (3, 2, 0), (2, 2, 1), (2, 1, 2), (2, 1, 3)],
)
def test_twenty_steps_give_the_same_parameters(
    one_rank: dict[str, np.ndarray], world_size: int, accumulation: int, zero_stage: int
) -> None:
    got = whole(run_ranks(trained_parameters, world_size, accumulation, zero_stage, 0.5, timeout=120))
    assert got.keys() == one_rank.keys()
    for name, expected in one_rank.items():
        # float32 sums in another order; measured differences are about 1e-6 after 20 steps
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5, err_msg=name)


def test_training_moved_everything_it_should(one_rank: dict[str, np.ndarray]) -> None:
    from dist_proxygml.backbone import build_backbone

    torch.manual_seed(0)
    before = build_backbone(configuration().backbone).state_dict()
    for name in before:
        moved = np.abs(one_rank[name] - before[name].numpy()).max() > 1e-4
        assert moved != ("running" in name or "num_batches" in name), name

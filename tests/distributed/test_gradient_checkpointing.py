"""Training with gradient checkpointing has the digits of training without, on several ranks and with ZeRO."""

import numpy as np
import pytest
import torch

from dist_proxygml.backbones import batch_norm
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.training.prepare import comparable_settings
from dist_proxygml.training.step import build_train_state, train_step
from tests.harness import run_ranks
from tests.small_training import NUM_CLASSES, configuration

BACKBONES = {
    "small_cnn": {"name": "small_cnn", "options": {"width": 4, "residual_blocks": [1, 0, 1, 0]}},
    "timm": {"name": "timm/test_efficientnet", "options": {"drop_path_rate": 0.4}},
}


def trained(context: ParallelContext, backbone: str, stage: int, *, is_checkpointed: bool) -> dict[str, np.ndarray]:
    config = configuration(
        backbone={**BACKBONES[backbone], "embedding_dim": 8, "gradient_checkpointing": is_checkpointed},
        deepspeed={
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_accumulation_steps": 2,
        },
    )
    assert "backbone.gradient_checkpointing" not in comparable_settings(config)
    state = build_train_state(config, context, steps_per_epoch=4)
    state.engine.module.train()
    rng = np.random.default_rng(context.rank)
    size = config.micro_batch_size(context.world_size)
    sums_sent = 0
    normalise = batch_norm._NormalizeOverRanks.apply

    def counted(*args):  # type: ignore[no-untyped-def]
        nonlocal sums_sent
        sums_sent += 1
        return normalise(*args)

    batch_norm._NormalizeOverRanks.apply = counted  # type: ignore[method-assign]
    losses = []
    for _ in range(3):
        batches = [
            Batch(
                torch.from_numpy(rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)),
                torch.from_numpy(rng.integers(0, NUM_CLASSES, size)),
                torch.arange(size),
                size * context.world_size,
                12,
            )
            for _ in range(2)
        ]
        report = train_step(state, batches, measure=False)
        assert report.terms is not None
        losses.append(report.terms.total.item())
    batch_norm._NormalizeOverRanks.apply = normalise  # type: ignore[method-assign]
    weights = {name: value.float().numpy() for name, value in state.engine.full_state_dict().items()}
    return weights | {"losses": np.array(losses), "sums sent": np.array(sums_sent)}


def pairs(
    context: ParallelContext, cases: list[tuple[str, int]]
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    return [tuple(trained(context, *case, is_checkpointed=c) for c in (False, True)) for case in cases]  # type: ignore[misc]


@pytest.mark.timeout(240)
def test_it_changes_no_digit_of_losses_weights_and_running_statistics() -> None:
    cases = [("small_cnn", 0), ("timm", 2), ("small_cnn", 3)]
    for rank in run_ranks(pairs, 2, cases, timeout=180):
        for case, (plain, checkpointed) in zip(cases, rank, strict=True):
            # the second time some layers are left out: of a block's last one only the input is wanted
            assert plain["sums sent"] < checkpointed.pop("sums sent") <= 2 * plain.pop("sums sent")
            assert plain.keys() == checkpointed.keys()
            for name, value in plain.items():
                np.testing.assert_array_equal(checkpointed[name], value, err_msg=f"{case}: {name}")

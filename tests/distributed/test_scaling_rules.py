"""Every factor between the loss and an update: ranks, accumulation, ZeRO, precision, loss scale.

The optimizers are almost linear here: Adam with an eps far above its gradients. A gradient that is wrong by a factor
then gives an update that is wrong by that factor, which Adam with a small eps, or clipping, would hide.
"""

import copy
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_proxygml.config import Config
from dist_proxygml.data.order import EpochPlan
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.collectives import NonFiniteError
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks
from tests.small_training import configuration, same

NUM_CLASSES = 7
# Steps of 32, 32 and 21 images: over 4 ranks x 4 micro-batches the last one has parts of 1 and of 2 images.
NUM_IMAGES, BATCH_SIZE, NUM_EPOCHS = 85, 32, 1


class Case(NamedTuple):
    """How the backbone is trained."""

    accumulation: int = 1
    zero_stage: int = 0
    bf16: bool = False


FLOAT32 = [Case(accumulation, stage) for accumulation in (1, 4) for stage in (0, 1, 2, 3)]
BFLOAT16 = [Case(1, 0, True), Case(4, 1, True), Case(1, 2, True), Case(4, 3, True)]


def linear_configuration(case: Case, **deepspeed: Any) -> Config:
    return configuration(
        # batch statistics are those of a micro-batch, which differs with the accumulation
        backbone={"name": "small_cnn", "embedding_dim": 8, "batch_norm": "frozen", "options": {"width": 4}},
        optimizer={"name": "adam", "backbone_lr": 5.0, "proxies_lr": 20.0, "eps": 10.0, "weight_decay": 0.1},
        schedule={"name": "constant"},
        training={"epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE},
        deepspeed={
            "gradient_accumulation_steps": case.accumulation,
            "zero_optimization": {"stage": case.zero_stage},
            "bf16": {"enabled": case.bf16},
            **deepspeed,
        },
    )


def batches_of_steps(context: ParallelContext, accumulation: int) -> list[list[Batch]]:
    """This rank's micro-batches of every step of the run."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8))
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    steps = []
    for epoch in range(NUM_EPOCHS):
        order = np.random.default_rng(epoch).permutation(NUM_IMAGES)
        plan = EpochPlan(order, BATCH_SIZE, accumulation, context.world_size)
        assert plan.num_steps == 3
        for step in range(plan.num_steps):
            parts = [plan.micro_batch(step, micro, context.rank) for micro in range(accumulation)]
            steps.append(
                [
                    Batch(images[p.ids], labels[p.ids], torch.from_numpy(p.ids), p.global_size, p.step_size)
                    for p in parts
                ]
            )
    return steps


def updates_on_rank(context: ParallelContext, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    """How far the backbone and this rank's proxies moved in the run, for every case."""
    from dist_proxygml.training.step import build_train_state, train_step

    results = []
    for case in cases:
        state = build_train_state(linear_configuration(case), context, steps_per_epoch=3)
        state.engine.module.train()
        before = {name: value.float().clone() for name, value in state.engine.full_state_dict().items()}
        proxies = state.loss.proxies.detach().clone()
        for batches in batches_of_steps(context, case.accumulation):
            report = train_step(state, batches, measure=True)
        moved = {
            name: (value.float() - before[name]).numpy()
            for name, value in state.engine.full_state_dict().items()
            if "running" not in name and "num_" not in name
        }
        results.append(
            moved
            | {
                "proxies": (state.loss.proxies.detach() - proxies).numpy(),
                "loss": report.terms.total.numpy(),
                "backbone_norm": np.array(report.backbone_norm),
                "proxies_norm": report.proxies_norm,
            }
        )
    return results


@functools.cache
def updates(world_size: int) -> dict[Case, dict[str, np.ndarray]]:
    """What each case's ranks did together. All cases in one start of the ranks, which takes longer than a case."""
    cases = [*FLOAT32, *BFLOAT16]
    per_rank = run_ranks(updates_on_rank, world_size, cases, timeout=240)
    whole = {}
    for case, ranks in zip(cases, zip(*per_rank, strict=True), strict=True):
        for rank in ranks[1:]:
            for name in rank.keys() - {"proxies"}:
                np.testing.assert_array_equal(rank[name], ranks[0][name], err_msg=name)
        whole[case] = ranks[0] | {"proxies": np.concatenate([rank["proxies"] for rank in ranks])}
    return whole


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_an_update_does_not_depend_on_ranks_accumulation_or_zero(case: Case, world_size: int) -> None:
    expected = updates(1)[Case()]
    for name, values in updates(world_size)[case].items():
        # float32 sums in another order; measured are 5e-7 at most
        assert difference(values, expected[name]) < 1e-5, name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_a_bf16_update_differs_by_rounding_only(case: Case, world_size: int) -> None:
    for name, values in updates(world_size)[case].items():
        # Weights, activations and gradients keep 8 bits, and gradients are rounded for every micro-batch and rank.
        # Measured are 0.075 and 0.022 at most; a factor of 2 would give 0.5 or 1.
        assert difference(values, updates(1)[Case()][name]) < 0.12, name
        assert difference(values, updates(1)[BFLOAT16[0]][name]) < 0.05, name


class Fp16Run(NamedTuple):
    """Three steps in fp16, of which the second overflows on the last rank alone."""

    applied: list[bool]
    kept_bank: bool  # bank, its optimizer's state and the backbone are the same after the second step as before
    first_update: np.ndarray  # of this rank's proxies
    backbone_update: np.ndarray  # of the embedding layer, over all steps
    finite_norms: list[bool]


def fp16_on_rank(
    context: ParallelContext, zero_stages: list[int], loss_scales: list[float]
) -> tuple[list[list[Fp16Run]], list[list[float]]]:
    """A run for each stage of ZeRO and loss scale. CPUs can compute in float16; that they are refused is lifted."""
    from deepspeed.accelerator import get_accelerator

    from dist_proxygml.distributed import engine
    from dist_proxygml.training.step import build_train_state, train_step

    get_accelerator().is_fp16_supported = lambda: True
    engine.refuse_fp16_on_cpu = lambda settings, device: None

    def run(zero_stage: int, loss_scale: float) -> Fp16Run:
        config = linear_configuration(
            Case(1, zero_stage), bf16={"enabled": False}, fp16={"enabled": True, "loss_scale": loss_scale}
        )
        state = build_train_state(config, context, steps_per_epoch=3)
        state.engine.module.train()
        backward = state.engine.backward

        def overflowing(embeddings: torch.Tensor, gradient: torch.Tensor) -> None:
            backward(embeddings, gradient * 1e9 if context.rank == context.world_size - 1 else gradient)

        def snapshot() -> Any:
            return copy.deepcopy((state.loss.proxies.detach(), state.bank_optimizer.state_dict()["state"], backbone()))

        def backbone() -> torch.Tensor:
            return state.engine.full_state_dict()["embedding.weight"].float()

        proxies, weights = state.loss.proxies.detach().clone(), backbone()
        applied, finite_norms, kept_bank = [], [], False
        for step, batches in enumerate(batches_of_steps(context, accumulation=1)):
            before = snapshot()
            state.engine.backward = overflowing if step == 1 else backward
            report = train_step(state, batches, measure=True)
            applied.append(state.engine.step_was_applied())
            finite_norms.append(bool(np.isfinite(report.backbone_norm)))
            assert state.loss.proxies.grad is None
            if step == 0:
                first_update = (state.loss.proxies.detach() - proxies).numpy()
            if step == 1:
                kept_bank = same(before, snapshot())
        return Fp16Run(applied, kept_bank, first_update, (backbone() - weights).numpy(), finite_norms)

    def falling(zero_stage: int) -> list[float]:
        """The loss scales of steps that all overflow on the last rank, until there is none lower."""
        fp16 = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}
        config = linear_configuration(Case(1, zero_stage), bf16={"enabled": False}, fp16=fp16)
        state = build_train_state(config, context, steps_per_epoch=3)
        state.engine.module.train()
        backward, proxies, scales = state.engine.backward, state.loss.proxies.detach().clone(), []
        size = 1e9 if context.rank == context.world_size - 1 else 1.0
        state.engine.backward = lambda embeddings, gradient: backward(embeddings, gradient * size)
        try:
            for batches in batches_of_steps(context, accumulation=1):
                scales.append(float(state.engine.optimizer.loss_scale))
                train_step(state, batches, measure=True)
        except NonFiniteError as error:
            scales.append(0.0 if "min_loss_scale" in str(error) else math.nan)
        assert torch.equal(state.loss.proxies.detach(), proxies)
        return scales

    return [[run(stage, scale) for scale in loss_scales] for stage in zero_stages], [*map(falling, zero_stages)]


@pytest.mark.timeout(300)
def test_fp16_scales_and_skips_the_backbone_alone_and_all_ranks_skip_alike() -> None:
    zero_stages, loss_scales = [1, 2, 3], [1.0, 1024.0]
    ranks = run_ranks(fp16_on_rank, 2, zero_stages, loss_scales, timeout=180)
    for _, falling in ranks:
        assert falling == [[2.0, 1.0, 0.0]] * 3  # a step, the next at the lowest scale, the end
    for i, _ in enumerate(zero_stages):
        for rank, _ in ranks:
            unscaled, scaled = rank[i]
            assert unscaled.applied == scaled.applied == [True, False, True]
            assert unscaled.finite_norms == scaled.finite_norms == [True, False, True]
            assert unscaled.kept_bank
            assert scaled.kept_bank
            np.testing.assert_array_equal(scaled.first_update, unscaled.first_update)
            # float16 keeps 11 bits
            assert difference(scaled.backbone_update, unscaled.backbone_update) < 0.02
            assert difference(scaled.backbone_update, ranks[0][0][0][0].backbone_update) < 0.02

"""The average of the weights is that of a plain loop over whole float32 weights, whatever partitions them, and is what
is evaluated, saved and resumed.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_proxygml.checkpoint.folder import Retention, RunState
from dist_proxygml.checkpoint.writer import CheckpointWriter, load_backbone
from dist_proxygml.config import Config
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.engine import Engine
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.evaluation.run import build_evaluation_model
from dist_proxygml.training.evaluate import backbone_of_one_rank
from dist_proxygml.training.loop import load_state
from dist_proxygml.training.prepare import comparable_settings
from dist_proxygml.training.step import TrainState, build_train_state, train_step
from tests.harness import run_ranks
from tests.small_training import NUM_CLASSES, configuration

DECAY = 0.2  # beyond the warm-up from the third step on: (1 + 2) / (10 + 2) is more


class Case(NamedTuple):
    stage: int
    is_bfloat16: bool = False
    accumulation: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012  # read only
    is_asynchronous: bool = False
    is_all_at_once: bool = False  # with much else that changes what is trained, kept or computed again


CASES = {
    "0": Case(0, accumulation=2),
    "1": Case(1),
    "2, all at once": Case(2, is_all_at_once=True, accumulation=2),
    "3, all at once": Case(3, is_all_at_once=True, is_asynchronous=True),
    "2, round robin": Case(2, options={"round_robin_gradients": True}),
    "3": Case(3, accumulation=2),
    "3, all partitioned, several groups": Case(
        3, options={"stage3_param_persistence_threshold": 0, "sub_group_size": 15}, is_asynchronous=True
    ),
    "0, bfloat16": Case(0, is_bfloat16=True),
    "1, bfloat16": Case(1, is_bfloat16=True, is_asynchronous=True),
    "3, bfloat16": Case(3, is_bfloat16=True),
}


# A transformer whose stem and first block stay, as they were drawn.
VIT: dict[str, Any] = {
    "name": "timm/vit_tiny_patch16_224",
    "embedding_dim": 8,
    "options": {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2},
    "frozen_stages": 1,
    "gradient_checkpointing": True,
    "matryoshka_dims": [2, 5],
}
OPTIMIZER = {"name": "adamw", "backbone_lr": 1e-3, "proxies_lr": 1e-2, "eps": 0.01, "weight_decay": 0.1}
ALL_AT_ONCE: dict[str, Any] = {
    "backbone": VIT,
    "proxies": {"negatives": "all", "margin": {"name": "cosface", "margin": 0.1}, "learn_scale": True, "scale": 4.0},
    "optimizer": OPTIMIZER | {"layer_decay": 0.7, "weight_decay_on": "matrices"},
    "checkpoint": {"init_from": "unused"},  # whoever freezes starts from weights
}


def run_config(case: Case) -> Config:
    return configuration(
        **(ALL_AT_ONCE if case.is_all_at_once else {}),
        training={"epochs": 6, "batch_size": 12, "ema_decay": DECAY},
        deepspeed={
            "gradient_accumulation_steps": case.accumulation,
            "zero_optimization": {"stage": case.stage, **case.options},
            "bf16": {"enabled": case.is_bfloat16},
        },
    )


def step_of(state: TrainState, number: int, *, is_spoiled: bool = False) -> None:
    """A step on images that depend on its number, with gradients that are NaN if it is spoiled."""
    config, context, engine = state.config, state.context, state.engine
    rng = np.random.default_rng(number)
    images = torch.from_numpy(rng.integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, NUM_CLASSES, 12))
    size = config.micro_batch_size(context.world_size)
    parts = [
        slice((m * context.world_size + context.rank) * size, (m * context.world_size + context.rank + 1) * size)
        for m in range(config.accumulation)
    ]
    ids = torch.arange(12)
    batches = [Batch(images[p], labels[p], ids[p], 12 // config.accumulation, 12) for p in parts]
    backward = engine.backward
    if is_spoiled:
        engine.backward = lambda embeddings, gradient: backward(embeddings, gradient * torch.nan)
    report = train_step(state, batches, measure=False)
    engine.backward = backward
    assert (report.skipped is not None) == is_spoiled


def whole_float32_weights(engine: Engine) -> dict[str, Tensor]:
    """The trained parameters themselves where they are float32 and whole, otherwise by DeepSpeed's own account, which
    agrees with them as far as they go.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = safe_get_full_fp32_param(parameter)
        if whole is None and parameter.dtype == torch.bfloat16:
            lows, highs = (
                itertools.chain(*groups) for groups in (engine.optimizer.fp16_groups, engine.optimizer.fp32_groups)
            )
            whole = next(high for low, high in zip(lows, highs, strict=True) if low is parameter)
        if engine.zero_stage < 3 and whole is not None:
            torch.testing.assert_close(parameter.detach(), whole.detach().to(parameter.dtype), rtol=0, atol=0)
        found[name] = (parameter if whole is None else whole).detach().float().clone()
    return found


def leg(
    context: ParallelContext, names: list[str], directory: Path, start: int
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Steps `start` + 1 and + 2 of each case, after a checkpoint where `start` is not 0, and a checkpoint: the average
    before and after.
    """
    return {name: leg_of(context, CASES[name], directory / name, start) for name in names}


def leg_of(context: ParallelContext, case: Case, directory: Path, start: int) -> dict[str, dict[str, np.ndarray]]:
    config = run_config(case)
    settings = comparable_settings(config)
    assert settings["training.ema_decay"] == DECAY
    state = build_train_state(config, context, steps_per_epoch=4)
    average = state.average
    assert average is not None
    weights = whole_float32_weights(state.engine)
    all_names = {name for name, _ in state.engine.module.named_parameters()}
    assert (weights.keys() < all_names) == case.is_all_at_once  # where some are frozen
    for name, value in average.full_state_dict().items():
        torch.testing.assert_close(value, weights.get(name, value), rtol=0, atol=0)  # the first average
    if start:
        run = load_state(directory / f"step-{start:06d}", state, settings)
        state.step, state.schedule_step = run.step, run.step
    loaded = {name: value.clone() for name, value in average.full_state_dict().items()}
    expected = {name: loaded[name].clone() for name in weights}
    state.engine.module.train()
    for number in (start, start + 1):
        if number == 1:
            step_of(state, 99, is_spoiled=True)  # moves nothing
            state.step -= 1
        step_of(state, number)
        for name, value in whole_float32_weights(state.engine).items():
            expected[name].lerp_(value, 1 - min(DECAY, [1 / 10, 2 / 11, 3 / 12, 4 / 13][number]))

    # What is evaluated is the average in float32, with the running statistics of the backbone.
    evaluated = backbone_of_one_rank(state).state_dict()
    backbone = state.engine.full_state_dict()
    assert evaluated.keys() == backbone.keys()
    for name, value in evaluated.items():
        torch.testing.assert_close(value, expected.get(name, backbone[name]), rtol=0, atol=0)
        is_moving = name in expected and value.is_floating_point()
        assert torch.equal(value, backbone[name].to(value.dtype)) != is_moving

    # So is what is saved, for whoever loads it.
    writer = CheckpointWriter(directory, context, Retention(9), asynchronous=case.is_asynchronous)
    saved = writer.save(
        state=RunState(start + 2, 0, 0, context.world_size, settings),
        engine=state.engine,
        loss=state.loss,
        bank_optimizer=state.bank_optimizer,
        average=average,
    )
    after = {name: value.numpy().copy() for name, value in average.full_state_dict().items()}
    step_of(state, 50)  # what is written meanwhile does not change
    saved += writer.close()
    model = build_evaluation_model(config)
    load_backbone(saved[-1].path, model)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), after[name], err_msg=name)
    return {"loaded": {name: value.numpy() for name, value in loaded.items()}, "after": after}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: str) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=f"{what}: {name}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "names",
    [
        ["0", "2, round robin", "3, all partitioned, several groups", "1, bfloat16", "2, all at once"],
        pytest.param(["1", "3", "3, all at once", "0, bfloat16", "3, bfloat16"], marks=pytest.mark.ci),
    ],
)
def test_the_average_is_that_of_whole_float32_weights_and_resumes_on_any_number_of_ranks(
    tmp_path: Path, names: list[str]
) -> None:
    first = run_ranks(leg, 2, names, tmp_path, 0, timeout=180)
    again = run_ranks(leg, 2, names, tmp_path, 2, timeout=180)
    elsewhere = run_ranks(leg, 3, names, tmp_path, 2, timeout=180)
    for name in names:
        for rank in (*again, *elsewhere):
            assert_same(rank[name]["loaded"], first[0][name]["after"], name)
        assert_same(first[1][name]["after"], first[0][name]["after"], name)
        assert_same(again[1][name]["after"], again[0][name]["after"], name)
        for key, value in again[0][name]["after"].items():  # sums over another number of ranks are rounded otherwise
            tolerance = 0.05 if CASES[name].is_bfloat16 else 1e-5
            np.testing.assert_allclose(
                elsewhere[0][name]["after"][key], value, atol=tolerance, rtol=tolerance, err_msg=f"{name}: {key}"
            )


class End(NamedTuple):
    """What six steps come to: this rank's proxies after each, and the average at the end."""

    proxies: list[np.ndarray]
    average: dict[str, np.ndarray]


def six_steps(context: ParallelContext, config: Config, directory: Path, *, resumes: bool) -> End:
    """Steps with a checkpoint after the third, or from there on by a state that was built from other numbers."""
    settings, proxies = comparable_settings(config), []
    built = config.model_copy(update={"seed": 5}) if resumes else config
    state = build_train_state(built, context, steps_per_epoch=4)
    if resumes:
        run = load_state(directory / "step-000003", state, settings)
        state.step = state.schedule_step = run.step
    state.engine.module.train()
    for number in range(state.step, 6):
        if number == 3 and not resumes:
            CheckpointWriter(directory, context, Retention(9)).save(
                state=RunState(state.step, 0, 36, context.world_size, settings),
                engine=state.engine,
                loss=state.loss,
                bank_optimizer=state.bank_optimizer,
                average=state.average,
            )
        step_of(state, number)
        proxies.append(state.bank.proxies.detach().numpy().copy())
    assert state.average is not None
    return End(proxies, {name: value.numpy() for name, value in state.average.full_state_dict().items()})


def without_and_with_a_stop(context: ParallelContext, names: list[str], directory: Path) -> dict[str, list[End]]:
    """One rank goes through; two go through, resume from their own checkpoint, and from that of one rank."""
    found = {}
    for name in names:
        config, own = run_config(CASES[name]), directory / f"{context.world_size} {name}"
        found[name] = [six_steps(context, config, own, resumes=False)]
        if context.world_size == 2:
            found[name] += [six_steps(context, config, own, resumes=True)]
            found[name] += [six_steps(context, config, directory / f"1 {name}", resumes=True)]
    return found


@pytest.mark.timeout(240)
def test_a_resumed_run_has_the_digits_of_one_without_a_stop(tmp_path: Path) -> None:
    names = ["1", "2, all at once"]
    (alone,) = run_ranks(without_and_with_a_stop, 1, names, tmp_path, timeout=180)
    ranks = run_ranks(without_and_with_a_stop, 2, names, tmp_path, timeout=180)
    for name in names:
        for rank in ranks:
            end, resumed, _ = rank[name]
            np.testing.assert_array_equal(resumed.proxies, end.proxies[3:], err_msg=name)
            assert_same(resumed.average, end.average, name)
        # On another number of ranks sums are rounded otherwise, and that is all.
        expected, grown = alone[name][0], [rank[name][2] for rank in ranks]
        for step, proxies in enumerate(zip(*(end.proxies for end in grown), strict=True), start=3):
            np.testing.assert_allclose(
                np.concatenate(proxies), expected.proxies[step], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {step}"
            )
        for key, value in expected.average.items():
            np.testing.assert_allclose(grown[0].average[key], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}: {key}")

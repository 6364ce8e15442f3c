"""The training step gives the same parameters for any number of ranks, micro-batches and ZeRO stage."""

import functools

import numpy as np
import pytest
import torch

from dist_proxygml.data.order import EpochPlan
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.parallel import ParallelContext
from tests.harness import run_ranks
from tests.small_training import NUM_CLASSES, configuration

NUM_IMAGES, NUM_STEPS = 43, 20


def trained_parameters(
    context: ParallelContext,
    accumulation: int,
    zero_stage: int,
    batch_norm: str,
    bf16: bool = False,
    float64: bool = False,
    **sections: object,
) -> dict[str, np.ndarray]:
    """Backbone and this rank's proxies after NUM_STEPS steps: 5 epochs of 4 steps, the last one of 7 images."""
    from deepspeed.accelerator import get_accelerator

    from dist_proxygml.training import step as step_module
    from dist_proxygml.training.step import build_train_state, train_step

    if float64:  # in this rank's process alone, where DeepSpeed is told to take float64 and not to round it
        accelerator = get_accelerator()
        dtypes = [*accelerator.supported_dtypes(), torch.float64]
        accelerator.supported_dtypes = lambda: dtypes
        for name in ("build_backbone", "build_loss"):
            build = getattr(step_module, name)
            setattr(step_module, name, lambda *args, build=build, **options: build(*args, **options).double())
    config = configuration(
        backbone={
            "name": "small_cnn",
            "embedding_dim": 8,
            "batch_norm": batch_norm,
            "matryoshka_dims": [3, 5] if "proxies" in sections else [],
            "pooling": "gem" if "proxies" in sections else "average",
            "embedding_norm": "layer_norm" if "proxies" in sections else None,
            "options": {"width": 4},
        },
        deepspeed={
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if float64 else 0.5,  # DeepSpeed's norm is a float32
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": bf16},
        },
        **sections,
    )
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8))
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    state = build_train_state(config, context, steps_per_epoch=4)
    if float64:
        state.engine._engine.communication_data_type = torch.float64
    state.engine.module.train()
    for epoch in range(NUM_STEPS // 4):
        order = np.random.default_rng(epoch).permutation(NUM_IMAGES)
        plan = EpochPlan(order, config.training.batch_size, accumulation, context.world_size)
        assert plan.num_steps == 4
        before = {name: value.clone() for name, value in state.engine.full_state_dict().items()}
        for step in range(plan.num_steps):
            parts = [plan.micro_batch(step, micro, context.rank) for micro in range(accumulation)]
            batches = [
                Batch(images[p.ids], labels[p.ids], torch.from_numpy(p.ids), p.global_size, p.step_size) for p in parts
            ]
            assert (state.epoch, state.consumed) == (epoch, 12 * step)
            report = train_step(state, batches, measure=state.step % 2 == 1)
        assert (state.epoch, state.consumed) == (epoch + 1, 0)
        after = state.engine.full_state_dict()
        moved = {
            name.split(".")[0]
            for name, value in after.items()
            if "running" not in name and "num_" not in name
            if not torch.equal(value, before[name])
        }
        # the second epoch is the published warm-up: it trains the embedding layer and the proxies alone
        last = {"embedding", "pooling"} if "proxies" in sections else {"embedding"}
        assert moved == (last if epoch == 1 else {"trunk", *last})
    weights = state.engine.full_state_dict()
    assert {w.dtype for n, w in weights.items() if "running" in n} == {torch.float64 if float64 else torch.float32}
    assert {p.dtype for p in state.engine.module.parameters()} == {
        torch.bfloat16 if bf16 else torch.float64 if float64 else torch.float32
    }
    return {name: (value if float64 else value.float()).numpy() for name, value in weights.items()} | {
        "proxies": state.loss.proxies.detach().numpy(),
        "scale": np.array(state.loss.scale),
        "loss": report.terms.total.numpy(),
        "backbone_norm": np.array(report.backbone_norm),
    }


def whole(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The result of a run, after seeing that its ranks hold the same backbone, running statistics included."""
    for rank in ranks[1:]:
        for name in rank.keys() - {"proxies"}:
            np.testing.assert_array_equal(rank[name], ranks[0][name], err_msg=name)
    return ranks[0] | {"proxies": np.concatenate([rank["proxies"] for rank in ranks])}


@functools.cache
def on_one_rank(accumulation: int, batch_norm: str) -> dict[str, np.ndarray]:
    return whole(run_ranks(trained_parameters, 1, accumulation, 0, batch_norm, timeout=180))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world_size", "accumulation", "zero_stage", "batch_norm"),
    [
        (2, 1, 0, "train"),
        (3, 1, 0, "train"),
        pytest.param(2, 2, 0, "train", marks=pytest.mark.ci),
        (2, 1, 3, "frozen"),
        pytest.param(3, 2, 1, "frozen", marks=pytest.mark.ci),
    ],
)
def test_twenty_steps_give_the_same_parameters(
    world_size: int, accumulation: int, zero_stage: int, batch_norm: str
) -> None:
    # all stages of ZeRO: test_scaling_rules.py; batch statistics are those of a micro-batch, and differ with its size
    expected = on_one_rank(accumulation if batch_norm == "train" else 1, batch_norm)
    got = whole(run_ranks(trained_parameters, world_size, accumulation, zero_stage, batch_norm, timeout=180))
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        # float32 sums in another order; measured differences are below 1e-6 after 20 steps
        np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.timeout(300)
def test_in_float64_other_numbers_of_ranks_differ_by_its_rounding_alone() -> None:
    expected, *others = (
        whole(run_ranks(trained_parameters, world_size, 1, 0, "train", False, True, timeout=180))
        for world_size in (1, 2, 3)
    )
    for got in others:
        for name, values in expected.items():
            # whatever the ranks did not share out exactly would be as large here as in float32, where it hides
            np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-13, err_msg=name)


HEADS: dict[str, dict[str, object]] = {
    "all": {"negatives": "all", "per_class": 2, "class_score": "max", "margin": {"name": "adaface", "margin": 0.4}},
    "sampled": {"negatives": "sampled", "share": 0.4, "margin": {"name": "cosface", "margin": 0.2}},
}


def trained_with(context: ParallelContext, head: str) -> dict[str, np.ndarray]:
    proxies = HEADS[head] | {"scale": 8.0, "learn_scale": True}
    return trained_parameters(context, 1, 0, "train", False, True, proxies=proxies)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("head", ["all", pytest.param("sampled", marks=pytest.mark.ci)])
def test_other_heads_too_train_alike_on_any_number_of_ranks(head: str) -> None:
    expected, got = (whole(run_ranks(trained_with, world_size, head, timeout=180)) for world_size in (1, 3))
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-12, err_msg=name)
    assert abs(expected["scale"] - 8) > 0.01


def iresnet_parameters(context: ParallelContext, zero_stage: int) -> dict[str, np.ndarray]:
    """Backbone after two steps of an IResNet with a unit a stage, the second one of the embedding layer alone."""
    from dist_proxygml.backbones import build
    from dist_proxygml.backbones.iresnet import Depth
    from dist_proxygml.training.step import build_train_state, train_step

    build.depths = lambda: {"iresnet18": Depth(1, 1, 1, 1)}  # type: ignore[attr-defined]
    config = configuration(
        backbone={"name": "iresnet18", "embedding_dim": 8},
        deepspeed={"zero_optimization": {"stage": zero_stage}},
        training={"epochs": 2, "batch_size": 6, "frozen_trunk_epochs": [2]},
        schedule={"name": "constant"},
    )
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 112, 112), dtype=np.uint8))
    state = build_train_state(config, context, steps_per_epoch=1)
    before = {name: value.clone() for name, value in state.engine.full_state_dict().items()}
    state.engine.module.train()
    for _ in range(2):
        own = torch.arange(6)[context.rank :: context.world_size]
        train_step(state, [Batch(images[own], own % 3, own, 6, 6)], measure=False)
    weights = state.engine.full_state_dict()
    assert torch.equal(weights["embedding.features.weight"], torch.ones(8))
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert {"embedding.features.bias", "embedding.features.running_var", "trunk.layer4.0.conv2.weight"} <= moved
    return {name: value.numpy() for name, value in weights.items()}


@pytest.mark.ci
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_iresnet_trains_alike_on_any_number_of_ranks_with_a_scale_that_is_fixed(zero_stage: int) -> None:
    expected, got = (whole_of(run_ranks(iresnet_parameters, size, zero_stage, timeout=180)) for size in (1, 2))
    for name, values in expected.items():
        # float32 sums in another order; Adam's eps of 0.01 keeps them small; the variances are near 5
        np.testing.assert_allclose(got[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def whole_of(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The backbone, after seeing that every rank has it."""
    for rank in ranks[1:]:
        for name in rank:
            np.testing.assert_array_equal(rank[name], ranks[0][name], err_msg=name)
    return ranks[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero_stage", [0, pytest.param(2, marks=pytest.mark.ci)])
def test_bf16_trains_close_to_float32_and_keeps_float32_statistics(zero_stage: int) -> None:
    expected = on_one_rank(1, "train")
    got = whole(run_ranks(trained_parameters, 2, 1, zero_stage, "train", True, timeout=180))
    # bf16 keeps 8 bits: measured after 20 steps are 0.055 in the loss and 0.010 in the proxies, which have moved by 0.1
    assert got["loss"] == pytest.approx(expected["loss"], rel=0.1)
    np.testing.assert_allclose(got["proxies"], expected["proxies"], atol=0.02)
    statistics = [name for name in expected if "running_mean" in name]
    assert statistics
    for name in statistics:
        np.testing.assert_allclose(got[name], expected[name], atol=0.05, err_msg=name)


@pytest.mark.timeout(300)
def test_training_moved_everything_it_should() -> None:
    from dist_proxygml.backbones.build import build_backbone

    torch.manual_seed(0)
    before = build_backbone(configuration().backbone).state_dict()
    for batch_norm in ("train", "frozen"):
        trained = on_one_rank(1, batch_norm)
        for name in before:
            moved = np.abs(trained[name] - before[name].numpy()).max() > 1e-4
            is_fixed = batch_norm == "frozen" and ("running" in name or "num_batches" in name)
            assert moved != is_fixed, (batch_norm, name)

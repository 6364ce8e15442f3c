"""A compiled trunk trains as an uncompiled one does: weights have their names, and a run resumes with or without."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dist_proxygml.checkpoint.folder import Retention, RunState
from dist_proxygml.checkpoint.writer import CheckpointWriter
from dist_proxygml.config import Config
from dist_proxygml.data.order import EpochPlan
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.engine import engine_settings
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.training import checks
from dist_proxygml.training.evaluate import backbone_of_one_rank
from dist_proxygml.training.loop import load_state
from dist_proxygml.training.prepare import comparable_settings
from dist_proxygml.training.step import TrainState, build_train_state, train_step
from tests.harness import run_ranks
from tests.small_training import NUM_CLASSES, configuration

NUM_IMAGES = 31  # steps of 12, 12 and 7 images


class Case(NamedTuple):
    legs: tuple[bool, bool]  # whether each epoch is compiled
    is_checkpointed: bool = False


Run = tuple[list[float], dict[str, np.ndarray], int]
PLAIN, COMPILED = Case((False, False)), Case((True, True))


def run_config(*, is_compiled: bool, stage: int = 1, is_checkpointed: bool = False) -> Config:
    return configuration(
        backbone={
            "name": "small_cnn",
            "embedding_dim": 8,
            "options": {"width": 4, "strides": [2, 2], "residual_blocks": [0, 1]},
            "gradient_checkpointing": is_checkpointed,
        },
        training={"epochs": 6, "batch_size": 12, "ema_decay": 0.9, "compile": is_compiled},
        deepspeed={"zero_optimization": {"stage": stage}},
    )


def epoch_of(state: TrainState) -> list[float]:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=np.uint8))
    labels, losses = torch.arange(NUM_IMAGES) % NUM_CLASSES, []
    plan = EpochPlan(np.random.default_rng(state.epoch).permutation(NUM_IMAGES), 12, 1, state.context.world_size)
    assert plan.num_steps == 3
    state.engine.module.train()
    for step in range(3):
        part = plan.micro_batch(step, 0, state.context.rank)
        ids = torch.from_numpy(part.ids)
        report = train_step(
            state, [Batch(images[ids], labels[ids], ids, part.global_size, part.step_size)], measure=False
        )
        assert report.terms is not None
        losses.append(report.terms.total.item())
    return losses


def runs(context: ParallelContext, directory: Path, backend: str, cases: list[Case]) -> list[Run]:
    """Losses of two epochs, between which the run is saved and resumed, averaged weights, and how many graphs were
    compiled.
    """
    torch.compile = functools.partial(torch.compile, backend=backend)  # type: ignore[assignment]
    torch._inductor.config.compile_threads = 1
    found = []
    for number, case in enumerate(cases):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        losses: list[float] = []
        saved = Path()
        for leg in range(2):
            config = run_config(is_compiled=case.legs[leg], is_checkpointed=case.is_checkpointed)
            settings = comparable_settings(config)
            state = build_train_state(config, context, steps_per_epoch=3)
            if leg:
                run = load_state(saved, state, settings)
                state.step = state.schedule_step = run.step
            losses += epoch_of(state)
            saved = (
                CheckpointWriter(directory / str(number), context, Retention(9))
                .save(
                    state=RunState(state.step, 0, 0, context.world_size, settings),
                    engine=state.engine,
                    loss=state.loss,
                    bank_optimizer=state.bank_optimizer,
                    average=state.average,
                )[0]
                .path
            )
        model = backbone_of_one_rank(state).eval()
        model(torch.zeros(5, 3, 16, 16, dtype=torch.uint8))  # compiles nothing
        weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        found.append((losses, weights, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return found


def assert_close(run: Run, plain: Run) -> None:
    # fused kernels round otherwise: 1e-6 was measured after six steps
    np.testing.assert_allclose(run[0], plain[0], rtol=1e-4)
    assert run[1].keys() == plain[1].keys()
    for name, value in plain[1].items():
        np.testing.assert_allclose(run[1][name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.timeout(300)
def test_a_compiled_trunk_trains_and_resumes_as_an_uncompiled_one(tmp_path: Path) -> None:
    cases = [PLAIN, COMPILED, Case((True, False)), Case((False, True), is_checkpointed=True)]
    for num_ranks in (1, 2):  # traced and differentiated by torch.compile, without a compiler's minutes
        for plain, *others in run_ranks(runs, num_ranks, tmp_path / str(num_ranks), "aot_eager", cases, timeout=200):
            for run in others:
                assert_close(run, plain)
            assert plain[2] == 0
            assert others[0][2] > 0
            if num_ranks == 1:  # in one piece and once: neither for the short batch nor for the second start again
                assert others[0][2] == 1


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_what_the_compiler_makes_of_it_computes_the_same(tmp_path: Path) -> None:
    cases = [PLAIN, COMPILED]
    ((plain, compiled),) = run_ranks(runs, 1, tmp_path, "inductor", cases, timeout=500)
    assert_close(compiled, plain)
    assert compiled[2] > 0


def test_a_run_may_switch_it_on_and_off_but_not_with_zero_3() -> None:
    on, off = (comparable_settings(run_config(is_compiled=c)) for c in (True, False))
    assert on == off
    engine_settings(run_config(is_compiled=True, stage=2), 1)
    with pytest.raises(ValueError, match=r"training\.compile.*stage 3"):
        engine_settings(run_config(is_compiled=True, stage=3), 1)


def test_a_missing_compiler_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*training\.compile"):
        checks.try_compile("cpu")
    torch._dynamo.reset()

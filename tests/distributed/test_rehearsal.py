"""Measured steps on real ranks, and the predicted size of a checkpoint against one on the disk."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.checkpoint.folder import Retention, RunState
from dist_proxygml.checkpoint.writer import save_checkpoint
from dist_proxygml.config import Config, load_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.reporting.render import format_seconds
from dist_proxygml.training.head_plan import plan_head
from dist_proxygml.training.rehearsal import Rehearsal, rehearse
from dist_proxygml.training.run_plan import plan_run
from dist_proxygml.training.step import build_train_state, train_step
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY = ["backbone.options.width=4", "backbone.embedding_dim=16", "training.batch_size=8", "evaluation.batch_size=8"]


def tiny(*changes: str) -> Config:
    return load_config(ROOT / "configs" / "demo_cpu.json", [*TINY, *changes])


def rehearsed(context: ParallelContext, shards: str) -> Rehearsal:
    changes = [f"data.shards={shards}", 'deepspeed={"gradient_accumulation_steps": 2}']
    return rehearse(tiny(*changes), context, num_steps=2)


@pytest.mark.parametrize(
    "shards", ["no/such/folder", pytest.param(str(ROOT / "shards" / "demo"), marks=pytest.mark.ci)]
)
def test_steps_are_measured_on_several_ranks_with_and_without_shards(shards: str) -> None:
    first, second = run_ranks(rehearsed, 2, shards, timeout=180)
    assert first == second  # the slowest of both, everywhere
    assert (first.world_size, first.device, first.num_steps) == (2, "cpu", 2)
    assert first.is_synthetic == (shards == "no/such/folder")
    assert first.seconds_per_step > 0
    assert first.images_per_second == 8 / first.seconds_per_step
    assert 50e6 < first.peak_bytes < 10e9


def saved(context: ParallelContext, directory: Path) -> int:
    """Bytes of a checkpoint after one step, when the optimizers have their state."""
    from dist_proxygml.training.rehearsal import _random_batches

    config = tiny("backbone.options.width=24", f"runs_dir={directory}")
    state = build_train_state(config, context, steps_per_epoch=5)
    train_step(state, [next(_random_batches(config, context))], measure=False)
    save_checkpoint(
        directory,
        state=RunState(1, 0, 8, context.world_size, {}),
        engine=state.engine,
        loss=state.loss,
        bank_optimizer=state.bank_optimizer,
        context=context,
        retention=Retention(1, None, None),
    )
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_the_predicted_checkpoint_is_within_a_tenth_of_the_real_one(tmp_path: Path) -> None:
    measured = run_ranks(saved, 2, tmp_path, timeout=180)[0]
    config = tiny("backbone.options.width=24")
    head = plan_head(config, world_size=2)
    bank = 549 * 16 * 4
    plan = plan_run(config, world_size=2, bank_bytes=3 * bank)  # adamw: two moments
    assert head.num_own_proxies == 275
    assert measured > 3e6
    assert abs(measured - plan.checkpoint_bytes) < 0.1 * measured


def test_an_evaluation_is_embedding_search_and_clustering() -> None:
    measured = Rehearsal(
        world_size=2,
        device="cpu",
        is_synthetic=False,
        num_steps=10,
        seconds_per_step=0.5,
        images_per_second=16.0,
        seconds_per_test_image=0.01,
        seconds_per_multiplication=1e-9,
        peak_bytes=3 << 20,
    )
    config = tiny("evaluation.kmeans_seeds=3")
    multiplications = 1000 * 1000 * 16 / 2 + 2 * 25 * 1000 * 549 * 16  # the three seeds are two and one
    seconds = measured.evaluation_seconds(config, num_images=1000)
    assert seconds == pytest.approx(1000 * 0.01 + multiplications * 1e-9)
    plan = plan_run(tiny(f"data.shards={ROOT}/shards/demo", "evaluation.every_epochs=0"), world_size=2, bank_bytes=0)
    assert plan.steps_per_epoch == 373  # 2,977 images in batches of 8: 372, and one image, which shares the last batch
    assert plan.num_class_mean_images == 549 * 4
    table = measured.describe(config, replace(plan, num_class_mean_images=0))
    assert format_seconds(373 * 0.5) in table
    evaluation = measured.evaluation_seconds(config, num_images=2981)
    assert format_seconds(373 * 40 * 0.5 + 2 * evaluation) in table  # at the start and at the end
    with_means = measured.describe(config, replace(plan, num_class_mean_images=100_000))
    assert format_seconds(100_000 * 0.01 + 373 * 40 * 0.5 + 2 * evaluation) in with_means


@pytest.mark.ci
def test_the_command_measures_with_random_images_where_shards_are_missing(tmp_path: Path) -> None:
    changes = [*TINY, f"data.shards={tmp_path}", "training.max_steps=100"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "dist_proxygml.plan",
            "--config",
            "configs/demo_cpu.json",
            "--measure",
            "--set",
            *changes,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "random images, loading not included" in result.stdout
    assert "the run, about" in result.stdout


def test_durations_have_two_units() -> None:
    assert [format_seconds(s) for s in (1.26, 59.9, 60, 3725, 90_000)] == [
        "1.3 s",
        "59.9 s",
        "1 min",
        "1 h 2 min",
        "25 h 0 min",
    ]

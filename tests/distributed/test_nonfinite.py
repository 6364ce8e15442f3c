"""NaN on one rank: all ranks leave the step out together, and nothing of it stays behind.

The engine is DeepSpeed's own at every ZeRO stage, since each leaves a step out in its own way.
"""

import copy
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_proxygml import faults
from dist_proxygml.config import parse_config
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.collectives import NonFiniteError
from dist_proxygml.distributed.parallel import ParallelContext, single_process
from dist_proxygml.training.nonfinite import NonFiniteLog
from tests.harness import run_ranks
from tests.long_work import lasting
from tests.shards_of_noise import write_noise_shards
from tests.small_training import NUM_CLASSES, configuration, same

NUM_STEPS, BAD_STEPS = 6, (2, 3)


def batches(context: ParallelContext, step: int, accumulation: int) -> list[Batch]:
    draws = np.random.default_rng(step)
    images = torch.from_numpy(draws.integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    labels = torch.from_numpy(draws.integers(0, NUM_CLASSES, 12))
    slots = context.world_size * accumulation
    ids = torch.arange(12) + 100 * step
    parts = [slice(None, None)] if slots == 1 else [slice(n, None, slots) for n in range(slots)]
    own = parts[context.rank :: context.world_size]
    return [Batch(images[part], labels[part], ids[part], 12 // accumulation, 12) for part in own]


def everything(state: Any) -> dict[str, Any]:
    """All that a step may change, but for running statistics, which follow what was seen."""
    whole = state.engine.full_state_dict()
    weights = {n: w.clone() for n, w in whole.items() if "running" not in n and "num_" not in n}
    moments = [dict(entry) for entry in state.engine.optimizer.state.values()]
    bank = state.bank_optimizer.state_dict()["state"]
    return copy.deepcopy({"w": weights, "m": moments, "bank": bank, "proxies": state.loss.proxies.detach()})


def train_with_faults(
    context: ParallelContext, point: str, accumulation: int, zero_stage: int, bf16: bool
) -> dict[str, Any]:
    """Run NUM_STEPS steps, with NaN injected on the last rank in BAD_STEPS; and again without these steps."""
    from dist_proxygml.training.step import build_train_state, train_step

    config = configuration(
        schedule={"name": "constant"},
        deepspeed={
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": bf16, "check_grad_overflow": False},  # which is not left to DeepSpeed
        },
    )
    rank = context.world_size - 1
    ends = []
    for injected in (True, False):
        state = build_train_state(config, context, steps_per_epoch=100)
        state.engine.module.train()
        for step in range(NUM_STEPS):
            faults._passages.clear()
            injected_now = ()
            if step in BAD_STEPS:
                if not injected:
                    with torch.no_grad():  # running statistics follow the images all the same
                        for batch in batches(context, step, accumulation):
                            state.engine.embed(batch.images)
                    state.step, state.schedule_step = state.step + 1, state.schedule_step + 1
                    continue
                if context.rank == rank and point == "step.loss":
                    injected_now = (faults.Fault(point, rank, accumulation, "nan"),)
            faults.own_faults = lambda injected_now=injected_now: injected_now
            hooks = []
            if step in BAD_STEPS and context.rank == rank and point == "bank":
                hooks = [state.loss.proxies.register_hook(lambda gradient: gradient * torch.nan)]
            elif step in BAD_STEPS and context.rank == rank and point == "embeddings":
                calls = itertools.count(1)

                def spoil(_: object, arguments: tuple[torch.Tensor, ...], calls: Iterator[int] = calls) -> None:
                    if next(calls) == accumulation:  # the last micro-batch
                        arguments[0].register_hook(lambda gradient: gradient * torch.nan)

                hooks = [state.loss.register_forward_pre_hook(spoil)]
            before = everything(state)
            report = train_step(state, batches(context, step, accumulation), measure=True, requests=[step == 4])
            for hook in hooks:
                hook.remove()
            assert state.step == step + 1
            assert report.requests == (step == 4,)
            assert same(everything(state), before) == (step in BAD_STEPS)
            assert (report.skipped is None) == (step not in BAD_STEPS)
            if report.skipped:
                suspects = report.skipped.suspects
                reason = report.skipped.reason
                assert report.terms is None
            else:
                assert report.terms is not None
                assert bool(report.terms.total.isfinite())
        ends.append(everything(state))
    return {"same": same(*ends), "suspects": suspects, "reason": reason, "weights": ends[0]["w"]}


CASES = (
    ("step.loss", 1, 0, False),
    ("step.loss", 2, 0, True),
    ("step.loss", 2, 2, False),
    ("embeddings", 2, 0, False),
    ("embeddings", 1, 1, True),
    ("embeddings", 1, 3, False),
    ("bank", 2, 0, False),
    ("bank", 1, 1, False),
)


def train_every_case(context: ParallelContext) -> list[dict[str, Any]]:
    return [train_with_faults(context, *case) for case in CASES]


@functools.cache
def outcomes() -> dict[tuple[Any, ...], tuple[dict[str, Any], ...]]:
    """Of both ranks, for each case; one start of the ranks for all."""
    return dict(zip(CASES, zip(*run_ranks(train_every_case, 2, timeout=200), strict=True), strict=True))


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("point", "accumulation", "zero_stage", "bf16"), CASES)
def test_all_ranks_leave_out_a_step_that_is_nan_on_one(
    point: str, accumulation: int, zero_stage: int, bf16: bool
) -> None:
    first, last = outcomes()[point, accumulation, zero_stage, bf16]
    assert first["same"], "the steps that were left out have left something behind"
    assert last["same"]
    assert same(first["weights"], last["weights"])
    assert first["reason"] == last["reason"]
    if point == "step.loss":
        assert "NaN or infinity in row 0 on rank 1" in first["reason"]
        expected = batches(ParallelContext(1, 2, 1, torch.device("cpu"), None), BAD_STEPS[-1], accumulation)[-1].ids
        assert last["suspects"] == expected.tolist()
        assert first["suspects"] == []
    elif point == "bank":  # its own rank alone has it
        assert first["reason"] == "the gradient of the proxies is NaN or infinite"
    else:
        assert first["reason"] == "the gradient of the backbone is NaN or infinite"
        assert last["suspects"] != []


@pytest.mark.parametrize(("every", "is_full"), [(2, True), (99, True), (101, False)])
def test_more_than_one_step_in_a_hundred_is_too_many_in_a_row_or_not(tmp_path: Path, every: int, is_full: bool) -> None:
    log = NonFiniteLog(tmp_path / "nonfinite.jsonl", max_in_row=3, max_rollbacks=1, context=single_process())
    for number in range(11):
        assert not log.is_full
        log.num_in_row = 0  # there were steps that were applied
        log.add(7 + every * number, "a reason", [])
    assert log.is_full == is_full
    if is_full:
        assert log.roll_back(2000, Path("runs/a/step-000005")).startswith("11 steps up to step 2000 came out as NaN")
        assert not log.is_full


def test_a_log_goes_back_after_so_many_steps_in_a_row_and_ends_after_so_many_times(tmp_path: Path) -> None:
    log = NonFiniteLog(tmp_path / "nonfinite.jsonl", max_in_row=2, max_rollbacks=1, context=single_process())
    message = log.add(7, "a reason", ["a", "b", "c", "d"])
    assert message == "skipped step 7 on all ranks: a reason; images: a (rank 0), b (rank 0), c (rank 0) and 1 more"
    assert not log.is_full
    log.num_in_row = 0  # a step that was applied
    log.add(9, "a reason", [])
    assert not log.is_full
    log.add(10, "a reason", [])
    assert log.is_full
    with pytest.raises(NonFiniteError, match=r"2 steps.*step 10") as error:
        log.roll_back(10, None)
    assert error.value.status == 65
    assert "runs/a/step-000005" in log.roll_back(10, Path("runs/a/step-000005"))
    assert log.num_in_row == 0
    log.add(11, "a reason", [])
    log.add(12, "a reason", [])
    with pytest.raises(NonFiniteError, match=r"\b1 rollback"):
        log.roll_back(12, Path("runs/a/step-000005"))
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 9, 10, 10, 11, 12]
    assert lines[0]["images"] == {"0": ["a", "b", "c", "d"]}
    assert lines[3]["back_to"] == "step-000005"


def train_with_one_bad_step(context: ParallelContext, root: Path) -> None:
    from dist_proxygml.training import loop
    from dist_proxygml.training.run import train

    whole = configuration(training={"epochs": 1, "batch_size": 12, "max_left_out": 1}).model_dump(mode="json")
    whole |= {"runs_dir": str(root / "runs"), "checkpoint": {"every_steps": 1}}
    whole["data"] |= {"shards": str(root / "shards"), "train_split": "test", "test_split": None, "num_workers": 0}
    faults.own_faults = lambda: (faults.Fault("step.loss", context.rank, 2, "nan"),)
    with lasting((loop, "find_checkpoint")):
        train(parse_config(whole, source="the test"), context)


def test_a_run_goes_back_to_its_checkpoint_however_long_that_takes_to_verify(tmp_path: Path) -> None:
    write_noise_shards(tmp_path / "shards", [6] * NUM_CLASSES)  # 4 steps
    run_ranks(train_with_one_bad_step, 1, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "runs/parity/nonfinite.jsonl").read_text().splitlines()]
    assert [line.get("back_to") for line in lines] == [None, "step-000001"]
    assert (tmp_path / "runs/parity/checkpoints/step-000004").is_dir()

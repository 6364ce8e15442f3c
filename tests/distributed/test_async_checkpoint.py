"""Checkpoints that are written aside from training: the same bytes, of the moment of the call, and the same errors."""

import concurrent.futures
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_proxygml.checkpoint import writer as checkpoint_module
from dist_proxygml.checkpoint.folder import (
    MANIFEST_FILE,
    Retention,
    RunState,
    SavedCheckpoint,
    checkpoint_to_continue,
    published_checkpoints,
    verify_checkpoint,
)
from dist_proxygml.checkpoint.writer import CheckpointWriter
from dist_proxygml.distributed.collectives import AgreedError, NonFiniteError
from dist_proxygml.distributed.engine import Engine
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, single_process
from tests.harness import run_ranks
from tests.small_checkpoints import KEEP_TWO, SETTINGS, Saver, contents, names_in, parts, step


def hashes(checkpoint: Path) -> dict[str, str]:
    return {n: e["sha256"] for n, e in json.loads((checkpoint / MANIFEST_FILE).read_text())["files"].items()}


class Gate:
    """Holds the thread that writes, before it writes anything, until it is opened."""

    def __init__(self, monkeypatch: Any) -> None:
        self._opened = threading.Event()
        write = checkpoint_module._write

        def held(*arguments: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                assert self._opened.wait(60)
            return write(*arguments)

        monkeypatch.setattr(checkpoint_module, "_write", held)

    def open(self) -> None:
        self._opened.set()


PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


class Backbone(nn.Sequential):
    """A convolution, a linear layer and a running mean; takes float32 in any precision."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(5, 3, 1), nn.Flatten(), nn.Linear(3, 4))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, rows: Tensor) -> Tensor:
        self.mean += rows.mean(0)
        return super().forward(rows[:, :, None, None].to(self[0].weight.dtype)).float()


def engine_of(context: ParallelContext, stage: int, precision: str) -> Engine:
    """A backbone in two parameter groups."""
    model = Backbone()
    settings = {
        "train_micro_batch_size_per_gpu": 6 // context.world_size,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        **PRECISIONS[precision],
    }
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    return Engine(model, torch.optim.AdamW(groups, lr=0.1), settings=settings, context=context)


SETTINGS_OF_ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")]


def save_both_ways(context: ParallelContext, directory: Path) -> None:
    """Of each kind of engine a synchronous checkpoint, an asynchronous one of the same moment that is written when the
    moment is over, and one of what was there by then.
    """
    for stage, precision in SETTINGS_OF_ENGINES:
        _, loss, optimizer = parts(context, 0, seed=0)
        engine = engine_of(context, stage, precision)
        step(context, engine, loss, optimizer, seed=1)
        run = RunState(1, 0, 6, context.world_size, SETTINGS)
        saving: dict[str, Any] = {"state": run, "engine": engine, "loss": loss, "bank_optimizer": optimizer}
        place = directory / f"{stage} {precision}"
        now = CheckpointWriter(place / "synchronous", context, KEEP_TWO)
        aside = CheckpointWriter(place / "asynchronous", context, KEEP_TWO, asynchronous=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            gate = Gate(monkeypatch)
            assert now.save(**saving) == [(place / "synchronous" / "step-000001", [])]
            assert aside.save(**saving) == []
            step(context, engine, loss, optimizer, seed=2)
            torch.rand(1)
            assert aside.poll() == []
            gate.open()
            assert aside.close() == [(place / "asynchronous" / "step-000001", [])]
        CheckpointWriter(place / "later", context, KEEP_TWO).save(**saving)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_asynchronous_checkpoint_has_the_bytes_of_a_synchronous_one_at_the_moment_of_the_call(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(save_both_ways, world_size, tmp_path, timeout=180)
    for stage, precision in SETTINGS_OF_ENGINES:
        place = tmp_path / f"{stage} {precision}"
        now, aside, later = (hashes(place / how / "step-000001") for how in ("synchronous", "asynchronous", "later"))
        assert aside == now
        assert verify_checkpoint(place / "asynchronous" / "step-000001") == []
        # what came between the call and the writing would have changed every file with numbers of the run
        unchanged = {name for name in now if later[name] == now[name]}
        assert unchanged <= {"state.json", "bank/.metadata", "engine/zero_pp_rank_1_mp_rank_00_model_states.pt"}


class Aside(Saver):
    """Saves aside, or not."""

    def __init__(self, context: ParallelContext, directory: Path, *, asynchronous: bool = True) -> None:
        super().__init__(context, directory)
        self.writer = CheckpointWriter(directory, context, KEEP_TWO, asynchronous=asynchronous)

    def save(self, number: int, retention: Retention = KEEP_TWO) -> Any:
        state = RunState(number, 0, 6 * number, self.context.world_size, SETTINGS)
        return self.writer.save(state=state, engine=self.engine, loss=self.loss, bank_optimizer=self.optimizer)


def numbers_of(saved: list[SavedCheckpoint]) -> list[int]:
    assert all(checkpoint.problems == [] for checkpoint in saved)
    return [int(checkpoint.path.name[-6:]) for checkpoint in saved]


def test_a_save_waits_for_the_one_before_and_each_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    gate = Gate(monkeypatch)
    for name in ("_take_snapshot", "tidy_up"):
        original = getattr(checkpoint_module, name)

        def watched(*arguments: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            events.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(checkpoint_module, name, watched)
    wait = CheckpointWriter.wait

    def opens(writer: CheckpointWriter) -> list[SavedCheckpoint]:
        gate.open()
        return wait(writer)

    save = Aside(single_process(), tmp_path)
    assert save(1) == []
    assert published_checkpoints(tmp_path) == []
    monkeypatch.setattr(CheckpointWriter, "wait", opens)
    assert numbers_of(save(2)) == [1]
    assert events[:3] == ["_take_snapshot", "tidy_up", "_take_snapshot"]
    assert numbers_of(save(3)) == [2]
    concurrent.futures.wait([save.writer._pending])
    assert numbers_of(save.writer.poll()) == [3]
    assert save.writer.poll() == save.writer.wait() == save.writer.close() == []
    assert [path.name[-1] for path in published_checkpoints(tmp_path)] == ["2", "3"]
    assert len(events) == 6


# ---- faults ----------------------------------------------------------------------------------------------------------

POINTS_OF_A_RANK = {"engine": 1, "bank": 1, "files": 1, "manifest": 0, "publish": 0}


def set_fault(context: ParallelContext, fault: str) -> None:
    os.environ |= {"RANK": str(context.rank), "DIST_PROXYGML_FAULT": fault}


def save_and_wait(save: Aside, number: int) -> None:
    """A save that fails."""
    assert save(number) == []
    concurrent.futures.wait([save.writer._pending])
    assert save.writer.has_failed
    assert save.writer.poll() == []
    save.writer.wait()


def fail_at_every_point(context: ParallelContext, directory: Path, asynchronous: bool) -> list[str]:
    """The error of each save that a rank fails at another point; the first and the last do not fail."""
    set_fault(context, ",".join(f"save.{point}@{rank}:2:enospc" for point, rank in POINTS_OF_A_RANK.items()))
    save = Aside(context, directory, asynchronous=asynchronous)
    told = save(1) + save.writer.wait()
    before = contents(directory)
    messages = []
    for number in range(2, 2 + len(POINTS_OF_A_RANK)):
        assert not save.writer.has_failed
        with pytest.raises(AgreedError) as failure:
            save_and_wait(save, number)
        messages.append(str(failure.value))
        all_gather_object(context, None)
        assert contents(directory) == before
    told += save(number + 1) + save.writer.close()
    assert numbers_of(told) == [1, number + 1]
    return messages


@pytest.mark.timeout(240)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_that_cannot_write_fails_all_ranks_alike_and_the_next_save_works(
    tmp_path: Path, asynchronous: bool
) -> None:
    first, second = run_ranks(fail_at_every_point, 2, tmp_path, asynchronous, timeout=180)
    assert first == second
    for number, ((point, rank), message) in enumerate(zip(POINTS_OF_A_RANK.items(), first, strict=True), start=2):
        assert message.startswith(f"{tmp_path}/step-{number:06d} was not written, ")
        assert message.endswith(f"[Errno 28] injected at save.{point} (on rank {rank})")
    assert [path.name[-1] for path in published_checkpoints(tmp_path)] == ["1", str(len(first) + 2)]


def fail_without_agreement(context: ParallelContext, directory: Path) -> str:
    """The error of a write that ends differently on the two ranks."""

    def write(*_: Any) -> SavedCheckpoint:
        if context.rank == 1:
            raise MemoryError("no memory")
        return SavedCheckpoint(directory, [])

    checkpoint_module._write = write
    save = Aside(context, directory)
    save(1)
    with pytest.raises(AgreedError) as failure:
        save.writer.wait()
    assert save.writer.close() == []
    return str(failure.value)


@pytest.mark.timeout(240)
def test_an_error_that_one_rank_alone_knows_of_is_raised_on_all(tmp_path: Path) -> None:
    assert run_ranks(fail_without_agreement, 2, tmp_path) == ["MemoryError: no memory (on rank 1)"] * 2


def refuse_numbers(context: ParallelContext, directory: Path) -> None:
    save = Aside(context, directory)
    save(1)
    if context.rank == 1:
        save.loss.proxies.data[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step-000002.*proxies.*rank 1"):
        save.save(2)
    assert numbers_of(save.writer.close()) == [1]
    assert names_in(directory) == ["latest", "step-000001"]


@pytest.mark.timeout(240)
def test_what_is_not_finite_is_refused_at_once_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(refuse_numbers, 2, tmp_path)


def save_until_killed(context: ParallelContext, directory: Path, fault: str) -> None:
    set_fault(context, fault)
    save = Aside(context, directory)
    for number in (1, 2, 3):
        save(number)
    save.writer.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ("save.engine@1:3:kill9", 2),
        pytest.param("save.files@0:3:kill9", 2, marks=pytest.mark.ci),
        pytest.param("save.manifest@0:3:kill9", 2, marks=pytest.mark.ci),
        ("save.publish@0:3:kill9", 2),
        ("save.published@0:3:kill9", 3),
        pytest.param("save.forget@0:1:kill9", 3, marks=pytest.mark.ci),
    ],
)
def test_a_kill_while_one_is_written_leaves_the_one_before_or_it(tmp_path: Path, fault: str, newest: int) -> None:
    with pytest.raises(RuntimeError):
        run_ranks(save_until_killed, 2, tmp_path, fault, timeout=180)
    assert any(name.startswith(".step-") for name in names_in(tmp_path)) == ("published" not in fault)
    assert checkpoint_to_continue(tmp_path, "auto") == (tmp_path / f"step-{newest:06d}", [])
    assert not any(name.startswith(".") for name in names_in(tmp_path))

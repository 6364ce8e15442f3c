"""Checkpoints: what is saved comes back, on any number of ranks; what cannot come back is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_proxygml.checkpoint.folder import (
    Retention,
    RunState,
    checkpoint_to_continue,
    find_checkpoint,
    published_checkpoints,
    read_state,
)
from dist_proxygml.checkpoint.writer import load_backbone, load_checkpoint, save_checkpoint
from dist_proxygml.config import OptimizerConfig
from dist_proxygml.distributed.parallel import ParallelContext, run_on_rank_zero
from dist_proxygml.head.loss import ProxyGMLLoss
from dist_proxygml.head.optim import RowwiseAdagrad, SparseAdam
from dist_proxygml.training.optim import build_bank_optimizer
from tests.harness import run_ranks
from tests.small_checkpoints import NUM_CLASSES, SETTINGS, parts, step


def train_and_save(context: ParallelContext, stage: int, directory: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Three steps, a checkpoint after each of the first two, and the losses of the steps that follow the second."""
    engine, loss, optimizer = parts(context, stage, seed=0)
    for number in (1, 2):
        step(context, engine, loss, optimizer, seed=number)
        save_checkpoint(
            directory,
            state=RunState(number, 0, 6 * number, context.world_size, SETTINGS),
            engine=engine,
            loss=loss,
            bank_optimizer=optimizer,
            context=context,
            retention=Retention(keep_last=1),
        )
    bank = bank_arrays(loss, optimizer)
    return [step(context, engine, loss, optimizer, seed=number) for number in (3, 4)], bank


def load_and_train(context: ParallelContext, stage: int, directory: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    engine, loss, optimizer = parts(context, stage, seed=1)
    load_checkpoint(
        find_checkpoint(directory, "auto"),
        engine=engine,
        loss=loss,
        bank_optimizer=optimizer,
        context=context,
        settings=SETTINGS,
    )
    bank = bank_arrays(loss, optimizer)
    return [step(context, engine, loss, optimizer, seed=number) for number in (3, 4)], bank


def bank_arrays(loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    state = optimizer.state[loss.proxies]
    rows = {"proxies": loss.proxies.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {name: value.numpy().copy() for name, value in rows.items()} | {"step": np.array([state["step"].item()])}


def joined(ranks: list[tuple[list[float], dict[str, np.ndarray]]], name: str) -> np.ndarray:
    return np.concatenate([bank[name] for _, bank in ranks])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "stage"), [pytest.param(2, 2, 1, marks=pytest.mark.ci), (2, 2, 3), (3, 1, 0), (1, 3, 0)]
)
def test_a_run_continues_from_a_checkpoint_as_if_it_had_not_stopped(
    tmp_path: Path, saved_by: int, loaded_by: int, stage: int
) -> None:
    before = run_ranks(train_and_save, saved_by, stage, tmp_path, timeout=180)
    after = run_ranks(load_and_train, loaded_by, stage, tmp_path, timeout=180)
    for name in ("proxies", "exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(joined(before, name), joined(after, name), err_msg=name)
    assert {bank["step"].item() for _, bank in after} == {2.0}
    if saved_by == loaded_by:
        assert after[0][0] == before[0][0]
    else:  # sums in another order
        np.testing.assert_allclose(after[0][0], before[0][0], rtol=1e-5)
    # keep_last = 1, and nothing half-written stays behind
    assert [path.name for path in published_checkpoints(tmp_path)] == ["step-000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002"]
    assert (tmp_path / "latest").read_text() == "step-000002\n"

    model = nn.Linear(5, 4)
    load_backbone(tmp_path / "step-000002", model)
    with pytest.raises(ValueError, match="backbone"):
        load_backbone(tmp_path / "step-000002", nn.Linear(5, 3))


RULES: dict[str, dict[str, object]] = {
    "adam": {},
    "adamw": {},
    "sgd": {},
    "sgd with momentum": {"proxies_name": "sgd", "proxies_momentum": 0.9},
    "rowwise_adagrad": {},
    "sparse_adam": {},
}


def banks(context: ParallelContext, seed: int) -> dict[str, tuple[ProxyGMLLoss, torch.optim.Optimizer]]:
    """A bank with every rule and 7 classes, and one with 4 classes, which leave the last of 3 ranks without any."""
    made = {}
    for rule, settings in RULES.items():
        config = OptimizerConfig(backbone_lr=0.1, proxies_lr=0.1, **{"proxies_name": rule, **settings})
        for num_classes in (NUM_CLASSES, 4):
            loss = ProxyGMLLoss(num_classes, 4, proxies_per_class=2, ratio=0.9, group=context.group, seed=seed)
            made[f"{rule}, {num_classes} classes"] = loss, build_bank_optimizer(config, loss.proxies)
    return made


def step_bank(loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step with a random gradient of every third class, the same for any number of ranks."""
    num_classes = loss.partition.num_classes
    gradient = torch.randn(num_classes, 2, 4, generator=torch.Generator().manual_seed(seed))
    gradient[torch.arange(num_classes) % 3 != seed % 3] = 0
    own = gradient[loss.partition.start : loss.partition.stop]
    loss.proxies.grad = own.to_sparse(1) if isinstance(optimizer, RowwiseAdagrad | SparseAdam) else own.clone()
    optimizer.step()
    optimizer.zero_grad()


def everything(loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    state = {name: value.numpy().copy() for name, value in optimizer.state[loss.proxies].items()}
    return state | {"proxies": loss.proxies.detach().numpy().copy()}


def save_banks(context: ParallelContext, directory: Path) -> dict[str, list[dict[str, np.ndarray]]]:
    """Of each bank its numbers when it was saved, and one step later."""
    engine, _, _ = parts(context, 0, seed=0)
    found = {}
    for name, (loss, optimizer) in banks(context, seed=0).items():
        for seed in (1, 2):
            step_bank(loss, optimizer, seed)
        save_checkpoint(
            directory / name,
            state=RunState(2, 0, 12, context.world_size, SETTINGS),
            engine=engine,
            loss=loss,
            bank_optimizer=optimizer,
            context=context,
            retention=Retention(keep_last=1),
        )
        found[name] = [everything(loss, optimizer)]
        step_bank(loss, optimizer, 3)
        found[name].append(everything(loss, optimizer))
    return found


def load_banks(context: ParallelContext, directory: Path) -> dict[str, list[dict[str, np.ndarray]]]:
    engine, _, _ = parts(context, 0, seed=1)
    found = {}
    for name, (loss, optimizer) in banks(context, seed=1).items():
        load_checkpoint(
            directory / name / "step-000002",
            engine=engine,
            loss=loss,
            bank_optimizer=optimizer,
            context=context,
            settings=SETTINGS,
        )
        found[name] = [everything(loss, optimizer)]
        step_bank(loss, optimizer, 3)
        found[name].append(everything(loss, optimizer))
    return found


@pytest.mark.timeout(240)
def test_the_state_of_every_bank_optimizer_loads_bit_by_bit_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    saved = run_ranks(save_banks, 2, tmp_path, timeout=180)
    row_names = {
        "adam": {"exp_avg", "exp_avg_sq"},
        "adamw": {"exp_avg", "exp_avg_sq"},
        "sgd": set(),
        "sgd with momentum": {"momentum_buffer"},
        "rowwise_adagrad": {"squared_gradient"},
        "sparse_adam": {"exp_avg", "exp_avg_sq"},
    }
    for world_size in (1, 3):
        loaded = run_ranks(load_banks, world_size, tmp_path, timeout=180)
        for bank in loaded[0]:
            rows = {"proxies"} | row_names[bank.partition(",")[0]]
            counters = {"step"} if "exp_avg" in rows else set()
            assert all(rank[bank][0].keys() == rows | counters for rank in saved + loaded)
            for moment in (0, 1):  # as saved, and after one more step
                for name in rows:
                    before, after = (
                        np.concatenate([r[bank][moment][name] for r in ranks]) for ranks in (saved, loaded)
                    )
                    np.testing.assert_array_equal(after, before, err_msg=f"{bank}: {name} at {moment}")
                    assert np.abs(before).max() > 0
                for name in counters:
                    assert {rank[bank][moment][name].item() for rank in loaded} == {2 + moment}


def load_elsewhere(context: ParallelContext, directory: Path, settings: dict[str, object]) -> None:
    engine, loss, optimizer = parts(context, 0, seed=1)
    checkpoint = directory / "step-000001"
    load_checkpoint(checkpoint, engine=engine, loss=loss, bank_optimizer=optimizer, context=context, settings=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1, "class table": "abc"}, "seed.*0.*1"),
        ({"seed": 0}, "class table was abc, is unset"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    write_state(tmp_path / "step-000001", 1)
    with pytest.raises(ValueError, match=message):
        run_ranks(load_elsewhere, 1, tmp_path, settings)


def load_damaged(context: ParallelContext, directory: Path, name: str) -> None:
    train_and_save(context, 0, directory)
    run_on_rank_zero(context, (directory / "step-000002" / name).write_bytes, b"no pickle")
    engine, loss, optimizer = parts(context, 0, seed=1)
    load_checkpoint(
        directory / "step-000002",
        engine=engine,
        loss=loss,
        bank_optimizer=optimizer,
        context=context,
        settings=SETTINGS,
    )


@pytest.mark.parametrize("name", ["random-rank-001.pt", "engine/mp_rank_00_model_states.pt"])
def test_a_file_that_is_something_else_ends_every_rank_with_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"step-000002.*on rank"):
        run_ranks(load_damaged, 2, tmp_path, name)


def write_state(checkpoint: Path, step: int) -> None:
    """A checkpoint without tensors."""
    checkpoint.mkdir()
    state = RunState(step=step, epoch=0, consumed=step, world_size=2, settings=SETTINGS)
    content = json.dumps(dataclasses.asdict(state)).encode()
    (checkpoint / "state.json").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"version": 1, "files": {"state.json": entry}}))


def test_only_published_checkpoints_are_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None
    write_state(tmp_path / "step-000900", 900)
    write_state(tmp_path / "step-001000", 1000)
    write_state(tmp_path / ".step-001100.partial", 1100)
    (tmp_path / "step-000900.damaged").mkdir()
    (tmp_path / "latest").write_text("step-000900")  # a lie, which nobody reads
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step-001000"
    assert find_checkpoint(tmp_path, str(tmp_path / "step-001000")) == tmp_path / "step-001000"
    assert read_state(tmp_path / "step-001000").step == 1000
    with pytest.raises(ValueError, match="step-000900, step-001000"):
        find_checkpoint(tmp_path, str(tmp_path / "step-002000"))
    (tmp_path / "step-002000").mkdir()  # published by nobody: no manifest
    with pytest.warns(UserWarning, match=r"step-002000.*MANIFEST\.json"):
        assert find_checkpoint(tmp_path, "auto") == tmp_path / "step-001000"
    with pytest.raises(ValueError, match=r"MANIFEST\.json.*step-000900, step-001000"):
        find_checkpoint(tmp_path, str(tmp_path / "step-002000"))


def test_continuing_an_older_checkpoint_is_refused_while_newer_ones_would_mix_with_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_state(tmp_path / "mine" / "step-000900", 900)
    write_state(tmp_path / "mine" / "step-001000", 1000)
    older = str(tmp_path / "mine" / "step-000900")
    with pytest.raises(ValueError, match=r"step-000900.*step-001000"):
        checkpoint_to_continue(tmp_path / "mine", older)
    assert checkpoint_to_continue(tmp_path / "another-name", older) == (Path(older), [])
    assert checkpoint_to_continue(tmp_path / "mine", "auto") == (tmp_path / "mine" / "step-001000", [])
    assert checkpoint_to_continue(tmp_path / "mine", "never") == (None, [])
    assert find_checkpoint(tmp_path / "mine", older) == Path(older)  # to look at, any of them

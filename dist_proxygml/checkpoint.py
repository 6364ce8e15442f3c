"""Checkpoints: one folder a step, written aside by all ranks and published by one rename.

    checkpoints/step-000800/
        engine/...             backbone and its optimizer, as DeepSpeed writes them
        bank/...               proxies and their optimizer state, through torch.distributed.checkpoint
        backbone.safetensors   the backbone alone, whole, for evaluation and for use elsewhere
        random-rank-000.pt     random generator state of each rank
        state.json             step, position in the data, number of ranks, what the numbers depend on: written last

The bank and its optimizer's rows are saved as DTensors placed Shard(0) over classes and load on any number of ranks.
With ZeRO 1 to 3 the engine's part loads on the number of ranks that wrote it.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_proxygml.engine import Engine
from dist_proxygml.loss import ProxyGMLLoss
from dist_proxygml.parallel import ParallelContext, on_main, run_together

# In front of the names of the bank optimizer's state.
_STATE_PREFIX = "optimizer."


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says about the run, besides tensors."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """The epoch, from 0, that the next step belongs to."""
    consumed: int
    """Images of that epoch's order that are done: the position in the data, for any number of ranks and batch size."""
    world_size: int
    settings: dict[str, Any]
    """What a continued run must have in common with this one, by name: configuration, data, class table."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def published_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first."""
    return sorted(
        (p.parent for p in directory.glob("step-*/state.json")), key=lambda p: int(p.name.removeprefix("step-"))
    )


def find_checkpoint(directory: Path, wanted: str) -> Path | None:
    """The newest checkpoint below `directory` if there is one ("auto"), or the one at the path that `wanted` is.

    Raises:
        ValueError: the path holds no complete checkpoint.
    """
    published = published_checkpoints(directory)
    if wanted == "auto":
        return published[-1] if published else None
    path = Path(wanted)
    if not (path / "state.json").is_file():
        known = ", ".join(p.name for p in published) or "none"
        raise ValueError(f"expected a checkpoint folder with state.json at {path}, found none; this run has: {known}")
    return path


def checkpoint_to_continue(directory: Path, resume: str) -> Path | None:
    """What --resume means for a run with checkpoints below `directory`: "never" none, else as `find_checkpoint`.

    Raises:
        ValueError: no complete checkpoint at the path, or this run has newer ones, which would mix with its own.
    """
    if resume == "never":
        return None
    found = find_checkpoint(directory, resume)
    newer = [p.name for p in published_checkpoints(directory) if found and read_state(p).step > read_state(found).step]
    if found and newer:
        raise ValueError(
            f"{directory} holds checkpoints newer than {found.name}: {', '.join(newer)}; move them away, or continue "
            "under another name with --set name=NAME"
        )
    return found


def save_checkpoint(
    directory: Path,
    *,
    state: RunState,
    engine: Engine,
    loss: ProxyGMLLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    keep_last: int,
) -> Path:
    """Write and publish a checkpoint below `directory`, then delete all but the newest `keep_last`. Called on all
    ranks.
    """
    final = directory / checkpoint_name(state.step)
    partial = directory / f".{final.name}.partial"
    # 1. a clean place
    on_main(context, _make_empty, partial)
    # 2. every rank writes its part
    engine.save(partial)
    _dcp_save(_bank_tensors(loss, bank_optimizer.state[loss.proxies]), partial / "bank", context)
    weights = engine.full_state_dict()
    random_state = {"torch": torch.get_rng_state()}
    if context.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(context.device)

    def write_own() -> None:
        torch.save(random_state, partial / f"random-rank-{context.rank:03d}.pt")
        if context.is_main:
            save_file({name: value.contiguous() for name, value in weights.items()}, partial / "backbone.safetensors")

    run_together(context, write_own)
    # 3. publish, then forget the oldest
    on_main(context, _publish, partial, final, state)
    on_main(context, lambda: _forget(published_checkpoints(directory)[:-keep_last]))
    return final


def read_state(checkpoint: Path) -> RunState:
    """The RunState of a complete checkpoint."""
    return RunState(**json.loads((checkpoint / "state.json").read_text()))


def load_checkpoint(
    checkpoint: Path,
    *,
    engine: Engine,
    loss: ProxyGMLLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    settings: dict[str, Any],
) -> RunState:
    """Bring back the backbone, the bank, both optimizers and the random state. Called on all ranks.

    Raises:
        ValueError: the checkpoint's settings are not `settings`, or with ZeRO its number of ranks is another one.
    """
    state = run_together(context, _check_state, checkpoint, settings, engine.zero_stage, context.world_size)
    engine.load(checkpoint)
    _load_bank(loss, bank_optimizer, checkpoint / "bank", context)
    if state.world_size == context.world_size:
        run_together(context, _load_random_state, checkpoint, context)
    return state


def load_backbone(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights that a checkpoint holds into a backbone of the same configuration and precision.

    Raises:
        ValueError: no such file, or another network.
    """
    path = checkpoint / "backbone.safetensors"
    if not path.is_file():
        raise ValueError(f"expected backbone weights at {path}, found none")
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)  # in the precision they were trained in
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the configured backbone: {error}") from None


def _bank_tensors(loss: ProxyGMLLoss, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bank and its optimizer's state under names that do not depend on the number of ranks; rows as DTensors."""
    tensors = {"proxies": _over_classes(loss.proxies.detach(), loss)}
    for name, value in state.items():  # rows [c, ...], or a step counter without a dimension
        tensors[_STATE_PREFIX + name] = _over_classes(value, loss) if value.ndim else value
    return tensors


def _over_classes(rows: Tensor, loss: ProxyGMLLoss) -> Tensor:
    """This rank's rows [c, ...] as its part of [C, ...]."""
    if loss.group is None:
        return rows
    mesh = DeviceMesh.from_group(loss.group, rows.device.type)
    shape = torch.Size((loss.partition.num_classes, *rows.shape[1:]))
    stride = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _dcp_save(tensors: dict[str, Any], directory: Path, context: ParallelContext) -> None:
    dcp.save(tensors, checkpoint_id=directory, process_group=context.group, no_dist=context.group is None)


def _load_bank(loss: ProxyGMLLoss, optimizer: torch.optim.Optimizer, directory: Path, context: ParallelContext) -> None:
    """Read this rank's rows straight into the parameter and into a new state of the optimizer.

    torch's optimizers make their state at their first step. The checkpoint's table of contents says what belongs to it,
    so no such step, with a gradient as large as the bank, is needed to make room.
    """
    contents = run_together(context, dcp.FileSystemReader(directory).read_metadata).state_dict_metadata
    state = {}
    for name, entry in contents.items():
        if name.startswith(_STATE_PREFIX):
            assert isinstance(entry, TensorStorageMetadata)
            if entry.size:
                shape, device = (loss.partition.num_local, *entry.size[1:]), loss.proxies.device
            else:  # a step counter: on the CPU, from where the optimizer moves it if it wants it elsewhere
                shape, device = (), torch.device("cpu")
            state[name.removeprefix(_STATE_PREFIX)] = torch.empty(shape, dtype=entry.properties.dtype, device=device)
    tensors = _bank_tensors(loss, state)
    dcp.load(tensors, checkpoint_id=directory, process_group=context.group, no_dist=context.group is None)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state}})


def _check_state(checkpoint: Path, settings: dict[str, Any], zero_stage: int, world_size: int) -> RunState:
    state = read_state(checkpoint)
    names = sorted(state.settings.keys() | settings.keys())
    changed = [name for name in names if state.settings.get(name) != settings.get(name)]
    if changed:
        details = "; ".join(f"{name} was {state.settings.get(name)}, is {settings.get(name)}" for name in changed)
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {details}. Continue with the same ones, give this run "
            "another name with --set name=NAME, or start anew with --resume never"
        )
    if zero_stage > 0 and state.world_size != world_size:
        raise ValueError(
            f"{checkpoint} was written by {state.world_size} ranks with ZeRO stage {zero_stage}, which loads on "
            f"{state.world_size} ranks, not on {world_size}; start as many ranks, or use ZeRO stage 0"
        )
    return state


def _load_random_state(checkpoint: Path, context: ParallelContext) -> None:
    random_state = torch.load(checkpoint / f"random-rank-{context.rank:03d}.pt", weights_only=True)
    torch.set_rng_state(random_state["torch"])
    if context.device.type == "cuda" and "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], context.device)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _publish(partial: Path, final: Path, state: RunState) -> None:
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    for path in [*(p for p in partial.rglob("*") if p.is_file()), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _forget([final] if final.exists() else [])
    os.rename(partial, final)


def _forget(checkpoints: list[Path]) -> None:
    """Delete checkpoints, each unpublished first, so that half a checkpoint never looks like one."""
    for path in checkpoints:
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)

"""Checkpoints: one folder a step, written aside by all ranks and published by one rename.

    checkpoints/step-000800/
        engine/...             backbone and its optimizer, as DeepSpeed writes them
        bank/...               proxies and their optimizer state, through torch.distributed.checkpoint
        backbone.safetensors   the backbone alone, whole, for evaluation and for use elsewhere
        random-rank-000.pt     random generator state of each rank
        state.json             step, position in the data, number of ranks, what the numbers depend on
        MANIFEST.json          bytes and sha256 of every file above: written last
    checkpoints/latest         name of the newest, for people and scripts; nothing here trusts it

A checkpoint is whole if its manifest is there and its files are as listed: sizes count for being kept, hashes also for
being read. What is not finite is never saved. Ranks fail together, with one error that names the rank, and what was
published before stays as it was. docs/fault_tolerance.md says what is survived and how.

The bank and its optimizer's rows are saved as DTensors placed Shard(0) over classes and load on any number of ranks.
With ZeRO 1 to 3 the engine's part loads on the number of ranks that wrote it.

All ranks must see the same folder. Declined: hashing while writing, as neither DeepSpeed nor torch hands out its
streams; the files are read back, most of them from memory, by all ranks in parallel.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_proxygml.collectives import AgreedError
from dist_proxygml.data.shards import publish
from dist_proxygml.engine import Engine
from dist_proxygml.loss import ProxyGMLLoss
from dist_proxygml.parallel import ParallelContext, everyone, on_main, run_together

T = TypeVar("T")

MANIFEST_FILE = "MANIFEST.json"
LATEST_FILE = "latest"
_MANIFEST_VERSION = 1
_NAME = re.compile(r"step-\d+")

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


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there; the newest always does."""

    keep_last: int
    """So many of the newest."""
    keep_every: int | None = None
    """The first checkpoint at or after every multiple of so many steps, for good."""
    keep_best: str | None = None
    """The one whose evaluation, evaluation/step-N.json beside the folder of checkpoints, has most of this metric."""


class SavedCheckpoint(NamedTuple):
    """A published checkpoint."""

    path: Path
    problems: list[str]
    """What went wrong after it was published, such as an old checkpoint that could not be deleted."""


class Continuation(NamedTuple):
    """Where a run goes on."""

    checkpoint: Path | None
    """A checkpoint that verifies; None starts anew."""
    passed_over: list[str]
    """Newer checkpoints that do not verify: which, why, and where they are now."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def published_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints below `directory` that have a manifest, oldest first; none of their files is looked at."""
    return [path for path in _step_folders(directory) if (path / MANIFEST_FILE).is_file()]


def verify_checkpoint(checkpoint: Path, *, deep: bool = True) -> list[str]:
    """What is wrong with a checkpoint, by file; nothing if it is whole.

    Args:
        checkpoint: its folder.
        deep: compare the sha256 of every file with the manifest's, besides its size.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != _MANIFEST_VERSION:
            return [f"{MANIFEST_FILE} has version {manifest['version']!r}, expected {_MANIFEST_VERSION}"]
        listed = [(str(name), entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing: it was never finished, or an older version of this package wrote it"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} cannot be read: {error!r}"]
    problems = [_file_problem(checkpoint, name, size, sha256, deep=deep) for name, size, sha256 in listed]
    return [problem for problem in problems if problem is not None]


def find_checkpoint(directory: Path, wanted: str) -> Path | None:
    """The newest checkpoint below `directory` that verifies ("auto", None without one), or the one at the path that
    `wanted` is. Newer ones that do not verify are passed over with a warning.

    Raises:
        ValueError: the checkpoint at the path does not verify.
    """
    if wanted == "auto":
        found, damaged = _newest_whole(directory)
        for path, problems in damaged.items():
            warnings.warn(f"{_told(path, problems)}: passed over", stacklevel=2)
        return found
    path = Path(wanted)
    if not path.is_dir():
        known = ", ".join(p.name for p in published_checkpoints(directory)) or "none"
        raise ValueError(f"expected a checkpoint folder at {path}, found none; this run has: {known}")
    problems = verify_checkpoint(path)
    if problems:
        others = ", ".join(p.name for p in published_checkpoints(directory) if p.resolve() != path.resolve()) or "none"
        raise ValueError(f"{_told(path, problems)}; restore it from a copy, or take another one of: {others}")
    return path


def checkpoint_to_continue(directory: Path, resume: str) -> Continuation:
    """What --resume means for a run with checkpoints below `directory`: "never" none, "auto" the newest that verifies,
    a path that one. On rank 0 only, at the start of a run that no other process writes checkpoints of.

    What dead runs left half-written is removed. With "auto", newer checkpoints that do not verify are renamed to
    `step-N.damaged`: the run will come to their steps again, and they must not count among those that are kept.

    Raises:
        ValueError: the checkpoint at the path does not verify, or this run has newer ones, which would mix with its
            own.
    """
    if resume == "never":
        return Continuation(None, [])
    clear_leftovers(directory)
    if resume == "auto":
        found, damaged = _newest_whole(directory)
        return Continuation(found, [_set_aside(path, problems) for path, problems in damaged.items()])
    found = find_checkpoint(directory, resume)
    assert found is not None
    newer = [path.name for path in published_checkpoints(directory) if _step_of(path) > read_state(found).step]
    if newer:
        raise ValueError(
            f"{directory} holds checkpoints newer than {found.name}: {', '.join(newer)}; move them away, or continue "
            "under another name with --set name=NAME"
        )
    return Continuation(found, [])


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed run left of a checkpoint that it was writing, replacing or deleting. On rank 0 only.

    A run that was killed while it put a checkpoint in the place of an earlier one gets the earlier one back.
    """
    for path in directory.glob(".step-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)
    for pattern in (".step-*.partial", ".step-*.deleted", ".step-*.replaced"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)
    for path in directory.glob(f"{LATEST_FILE}.tmp-*"):
        path.unlink()


def save_checkpoint(
    directory: Path,
    *,
    state: RunState,
    engine: Engine,
    loss: ProxyGMLLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    retention: Retention,
) -> SavedCheckpoint:
    """Write and publish a checkpoint below `directory`, then delete those that `retention` does not keep. Called on all
    ranks.

    An earlier checkpoint of the same step stays until this one is in its place.

    Raises:
        ValueError: on every rank: a number of parameters or optimizer state is not finite, or a rank could not write
            its part. Nothing is left of this checkpoint, and earlier ones are as they were.
    """
    final = directory / checkpoint_name(state.step)
    partial = directory / f".{final.name}.partial"
    weights = engine.full_state_dict()
    bank = bank_optimizer.state[loss.proxies]
    try:
        # 1. only what can be continued, and a clean place
        _together(context, "numbers", _refuse_non_finite, engine, weights, loss.proxies, bank)
        on_main(context, _make_empty, partial)
        # 2. every rank writes its part; torch.distributed.checkpoint fails on all ranks alike, and so does the engine
        engine.save(partial)
        _together(context, "bank", _dcp_save, _bank_tensors(loss, bank), partial / "bank", context)
        _together(context, "files", _write_own, partial, weights, state, context)
        # 3. what it must look like, when all is on disk; then publish
        names = on_main(context, _files_below, partial)
        entries = _together(
            context, "hashes", lambda: [_flush(partial, n) for n in names[context.rank :: context.world_size]]
        )
        files = dict(entry for part in everyone(context, entries) for entry in part)
        on_main(context, _write_manifest, partial, state, files)
        on_main(context, _publish, partial, final)
    except AgreedError as error:
        on_main(context, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise AgreedError(f"{final} was not written, earlier checkpoints are as they were: {error}") from error
    # 4. the pointer, and forget
    return SavedCheckpoint(final, on_main(context, _after_publishing, final, retention))


def checkpoints_to_forget(steps: Sequence[int], retention: Retention, *, scores: Mapping[int, float]) -> list[int]:
    """The steps whose checkpoints need not be kept, ascending.

    Args:
        steps: of the checkpoints that there are, ascending.
        retention: what is kept.
        scores: metric of those steps that have been evaluated; of equal ones the newest is the best.
    """
    kept = set(steps[-retention.keep_last :])
    if retention.keep_every is not None:
        first_in: dict[int, int] = {}
        for step in steps:
            first_in.setdefault(step // retention.keep_every, step)
        kept |= {step for period, step in first_in.items() if period > 0}
    measured = [step for step in steps if step in scores]
    if measured:
        kept.add(max(measured, key=lambda step: (scores[step], step)))
    return [step for step in steps if step not in kept]


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


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _step_folders(directory: Path) -> list[Path]:
    """Folders that are named as checkpoints are, oldest first."""
    return sorted((p for p in directory.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=_step_of)


def _newest_whole(directory: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    damaged: dict[Path, list[str]] = {}
    for path in reversed(_step_folders(directory)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, damaged
        damaged[path] = problems
    return None, damaged


def _told(checkpoint: Path, problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"checkpoint {checkpoint} is damaged: {'; '.join(problems[:3])}{more}"


def _set_aside(checkpoint: Path, problems: list[str]) -> str:
    """Rename a damaged checkpoint; returns what to tell about it."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    except OSError as error:
        return f"{_told(checkpoint, problems)}: passed over, but it could not be renamed: {error}"
    return f"{_told(checkpoint, problems)}: passed over, now {aside.name}"


def _file_problem(checkpoint: Path, name: str, size: int, sha256: str, *, deep: bool) -> str | None:
    try:
        found = (checkpoint / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, expected {size}"
        if deep:
            with open(checkpoint / name, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != sha256:
                return f"{name} has sha256 {digest[:12]}..., expected {sha256[:12]}..."
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _together(context: ParallelContext, what: str, function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` on every rank; whatever it raises on any rank, raise one error that names that rank on all.
    Called on all ranks.

    As `run_together`, but for whatever a library may raise while it writes. `function` may use collectives that fail on
    all ranks alike.
    """
    result, failure = None, None
    cause: BaseException | None = None
    try:
        result = function(*args)
    except CheckpointException as error:
        parts = [f"{_described(raised)} (on rank {rank})" for rank, (raised, _) in sorted(error.failures.items())]
        failure, cause = "; ".join(parts), error
    except Exception as error:
        failure, cause = f"{_described(error)} (on rank {context.rank})", error
    failures = [message for message in everyone(context, failure) if message is not None]
    if failures:
        raise AgreedError(f"{what}: {failures[0]}") from cause
    return result  # type: ignore[return-value]


def _described(error: BaseException) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    remedy = " (torch's words for a full disk, among others)" if isinstance(error, RuntimeError) else ""
    return f"{type(error).__name__}: {error}{remedy}"


def _refuse_non_finite(engine: Engine, weights: dict[str, Tensor], proxies: Tensor, bank: Mapping[str, Tensor]) -> None:
    names = [name for name, value in _numbers(engine, weights, proxies, bank) if not _is_finite(value)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"expected finite numbers, got NaN or infinity in {', '.join(names[:3])}{more}; continue from the last "
            "checkpoint with a lower learning rate, a longer warm-up or gradient clipping"
        )


def _numbers(
    engine: Engine, weights: dict[str, Tensor], proxies: Tensor, bank: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a run continues from, by a name for messages."""
    for name, value in weights.items():
        yield f"backbone {name}", value
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:  # of mixed precision and ZeRO: the float32 numbers behind the backbone's
            yield "the backbone's parameters", parameter
    for state in engine.optimizer.state.values():
        for name, value in state.items():
            yield f"the backbone's {name}", value
    yield "proxies", proxies
    for name, value in bank.items():
        yield f"the proxies' {name}", value


def _is_finite(value: Any) -> bool:
    """Whether no element is NaN or infinite; a look at both ends needs no copy, and NaN is passed on as either."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return True
    least, most = torch.aminmax(value.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_own(partial: Path, weights: dict[str, Tensor], state: RunState, context: ParallelContext) -> None:
    random_state = {"torch": torch.get_rng_state()}
    if context.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(context.device)
    torch.save(random_state, partial / f"random-rank-{context.rank:03d}.pt")
    if context.is_main:
        save_file({name: value.contiguous() for name, value in weights.items()}, partial / "backbone.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")


def _files_below(directory: Path) -> list[str]:
    """Names of all files, the largest first, so that every n-th is about a fair share of the bytes."""
    sizes = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _flush(directory: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Bring a file to disk; its name and its entry of the manifest."""
    with open(directory / name, "rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return name, {"bytes": stream.tell(), "sha256": digest}


def _write_manifest(partial: Path, state: RunState, files: Mapping[str, dict[str, Any]]) -> None:
    manifest = {
        "version": _MANIFEST_VERSION,
        "step": state.step,
        "world_size": state.world_size,
        "written_with": {
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
        },
        "files": dict(sorted(files.items())),
    }
    with publish(partial / MANIFEST_FILE) as stream:
        stream.write(json.dumps(manifest, indent=2).encode() + b"\n")
    for folder in (path for path in partial.rglob("*") if path.is_dir()):
        _flush_folder(folder)


def _publish(partial: Path, final: Path) -> None:
    """Rename, with an earlier checkpoint of the same step out of the way but not gone before that is done."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _after_publishing(final: Path, retention: Retention) -> list[str]:
    """Point to the newest checkpoint and delete old ones; what fails is told, since the checkpoint is safe."""
    problems = []
    try:
        with publish(final.with_name(LATEST_FILE)) as stream:
            stream.write(f"{final.name}\n".encode())
    except OSError as error:
        problems.append(f"{final.with_name(LATEST_FILE)} could not be written: {error}")
    published = {}
    for path in published_checkpoints(final.parent):
        damage = verify_checkpoint(path, deep=False)
        if damage:  # neither counted nor deleted: somebody should look at it
            problems.append(_told(path, damage))
        else:
            published[_step_of(path)] = path
    scores: dict[int, float] = {}
    if retention.keep_best is not None:
        scores, unreadable = _scores(list(published.values()), retention.keep_best)
        problems += unreadable
    for step in checkpoints_to_forget(list(published), retention, scores=scores):
        try:
            _forget(published[step])
        except OSError as error:
            problems.append(f"{published[step]} could not be deleted: {error}")
    return problems


def _scores(checkpoints: list[Path], metric: str) -> tuple[dict[int, float], list[str]]:
    """The metric of each evaluated checkpoint by step, and evaluations that it cannot be read from."""
    scores: dict[int, float] = {}
    problems = []
    for checkpoint in checkpoints:
        path = checkpoint.parent.parent / "evaluation" / f"{checkpoint.name}.json"
        if not path.exists():
            continue
        try:
            score = float(json.loads(path.read_text())["metrics"][metric])
        except (OSError, ValueError, LookupError, TypeError) as error:
            problems.append(f"{metric} of {checkpoint.name} cannot be read from {path}: {error!r}")
            continue
        if math.isfinite(score):
            scores[_step_of(checkpoint)] = score
    return scores, problems


def _forget(checkpoint: Path) -> None:
    """Delete a checkpoint, unpublished first, so that half a checkpoint never looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)

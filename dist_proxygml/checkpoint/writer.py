"""Checkpoint writing by all ranks, optionally in the background.

    step-000800/
        engine/...             backbone and its optimizer, as DeepSpeed writes them
        bank/...               proxies and their optimizer state, through torch.distributed.checkpoint
        backbone.safetensors   the complete backbone, for evaluation and use elsewhere: averaged weights if the run has
                               them; adapters are merged
        random-rank-000.pt     random generator state of each rank
        state.json             step, position in the data, number of ranks, what the numbers depend on
        MANIFEST.json          size and sha256 of every file above, written last

A save has two phases: a snapshot of the numbers between two steps, and writing it. A synchronous save makes no copies,
since nothing changes meanwhile; an asynchronous one copies everything to host memory and runs the second phase, the
same code, in a thread whose collectives use a gloo group of their own. At most one is pending. Both write the same
bytes.

Non-finite numbers are never saved. Ranks fail together, with one error that names the rank, and earlier checkpoints
stay intact. folder.py defines the order of operations on disk; docs/fault_tolerance.md lists which failures are
survived and how.

A checkpoint loads on any number of ranks: the bank and its optimizer's rows are saved as DTensors placed Shard(0) over
classes, and ZeRO's partitions are resharded. The random state is restored if the number of ranks is the same.

All ranks must see the same folder. Declined: DeepSpeed's and torch's own asynchronous writers, each of which would
publish its part separately.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_proxygml.backbones.from_weights import with_colours
from dist_proxygml.backbones.lora import merged_weights
from dist_proxygml.checkpoint.bank_storage import BankReader, BankWriter
from dist_proxygml.checkpoint.folder import (
    Retention,
    RunState,
    SavedCheckpoint,
    read_state,
    tidy_up,
    write_checkpoint_manifest,
)
from dist_proxygml.config import without_neutral_keys
from dist_proxygml.distributed.collectives import AgreedError, NonFiniteError
from dist_proxygml.distributed.engine import Engine
from dist_proxygml.distributed.gpus import start_thread
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_on_rank_zero, run_together
from dist_proxygml.distributed.row_tensors import as_row_tensor
from dist_proxygml.distributed.weight_average import WeightAverage
from dist_proxygml.faults import fault_point
from dist_proxygml.head.global_loss import GlobalLoss
from dist_proxygml.storage.files import describe_error, remove
from dist_proxygml.storage.folder import files_below, hash_files, make_empty, partial_path, publish_folder
from dist_proxygml.storage.run_folder import step_name

T = TypeVar("T")


class _Savable(Protocol):
    """An engine, or a snapshot of one."""

    def save(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class _Snapshot:
    """The contents of a checkpoint at one moment: a copy, or references that are valid until the next step."""

    state: RunState
    engine: _Savable
    weights: Mapping[str, Tensor]
    """The complete backbone; empty where this rank does not write it."""
    num_classes: int | None
    """None: the tensors of `bank` are whole on every rank."""
    bank: Mapping[str, Tensor]
    """This rank's rows [c, ...] of the proxies and of their optimizer's state, and step counters, by name."""
    random: Mapping[str, Tensor]


class CheckpointWriter:
    """Writes the checkpoints of a run. Built on all ranks, and called on all ranks unless stated otherwise.

    Args:
        directory: folder of the checkpoints.
        context: this process among its peers.
        retention: which checkpoints to keep when a new one is published.
        asynchronous: `save` returns when the numbers are copied; they are written during training.
    """

    def __init__(
        self, directory: Path, context: ParallelContext, retention: Retention, *, asynchronous: bool = False
    ) -> None:
        self._directory, self._retention, self._context = directory, retention, context
        self._aside = _beside(context) if asynchronous else None
        self._pending: Future[SavedCheckpoint] | None = None
        self._is_reported = False  # of the pending write
        self._unreported: list[SavedCheckpoint] = []

    @property
    def has_failed(self) -> bool:
        """Whether the pending write has failed on this rank; `wait` raises the reason on all ranks. Local: ranks must
        agree before they act on it.
        """
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def poll(self) -> list[SavedCheckpoint]:
        """Return the checkpoints published since the last report. Local, for messages."""
        pending, unreported = self._pending, self._unreported
        self._unreported = []
        if pending is not None and pending.done() and pending.exception() is None and not self._is_reported:
            self._is_reported = True
            return [*unreported, pending.result()]
        return unreported

    def save(
        self,
        *,
        state: RunState,
        engine: Engine,
        loss: GlobalLoss,
        bank_optimizer: torch.optim.Optimizer,
        average: WeightAverage | None = None,
    ) -> list[SavedCheckpoint]:
        """Save a checkpoint; if asynchronous, wait for the pending one, then only start to.

        Returns:
            The checkpoints published since the last report.

        Raises:
            ValueError: on every rank, as `save_checkpoint`, for this save or the pending one.
        """
        if self._aside is None:
            saved = save_checkpoint(
                self._directory,
                state=state,
                engine=engine,
                loss=loss,
                bank_optimizer=bank_optimizer,
                context=self._context,
                retention=self._retention,
                average=average,
            )
            return [saved]
        self._unreported = self.wait()
        with _nothing_was_written(self._directory / step_name(state.step)):
            snapshot = _take_snapshot(state, engine, loss, bank_optimizer, self._context, average, copy=True)
        published = self.poll()
        self._start(snapshot, self._aside)
        return published

    def wait(self) -> list[SavedCheckpoint]:
        """Wait for the pending write, if any.

        Returns:
            The checkpoints published since the last report.

        Raises:
            ValueError: on every rank, if it failed on any.
        """
        if self._pending is None:
            return self.poll()
        error = self._pending.exception()
        published = self.poll()
        self._pending = None
        failures = all_gather_object(self._context, None if error is None else self._ownership_and_message(error))
        # An agreed error states the cause; a rank's own error may only say that a peer is gone.
        first = min(filter(None, failures), default=None)
        if first is not None:
            raise AgreedError(first[1]) from error
        return published

    def close(self) -> list[SavedCheckpoint]:
        """Wait as `wait` does; the writer cannot be used afterwards."""
        published = self.wait()
        if self._aside is not None and self._aside.group is not None:
            dist.destroy_process_group(self._aside.group)
        return published

    def _ownership_and_message(self, error: BaseException) -> tuple[bool, str]:
        """Return whether an error is this rank's own, and its message."""
        if isinstance(error, AgreedError):
            return False, str(error)
        return True, f"{_described(error)} (on rank {self._context.rank})"

    def _start(self, snapshot: _Snapshot, aside: ParallelContext) -> None:
        pending: Future[SavedCheckpoint] = Future()

        def write() -> None:
            try:
                pending.set_result(_write(snapshot, self._directory, aside, self._retention))
            except BaseException as error:
                pending.set_exception(error)

        self._pending, self._is_reported = pending, False
        # A daemon: a run that ends with an error does not wait for it; the next start clears what it leaves.
        start_thread("checkpoint", write)


def save_checkpoint(
    directory: Path,
    *,
    state: RunState,
    engine: Engine,
    loss: GlobalLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    retention: Retention,
    average: WeightAverage | None = None,
) -> SavedCheckpoint:
    """Write and publish a checkpoint in `directory`, then delete those that `retention` does not keep. Called on all
    ranks.

    With `average` the complete backbone is that of averaged weights.

    An earlier checkpoint of the same step stays until this one replaces it.

    Raises:
        NonFiniteError: on every rank, if a parameter or optimizer state is not finite.
        ValueError: on every rank, if a rank could not write its part. Nothing is left of this checkpoint, and earlier
            ones are intact.
    """
    with _nothing_was_written(directory / step_name(state.step)):
        snapshot = _take_snapshot(state, engine, loss, bank_optimizer, context, average, copy=False)
    return _write(snapshot, directory, context, retention)


def load_checkpoint(
    checkpoint: Path,
    *,
    engine: Engine,
    loss: GlobalLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    settings: dict[str, Any],
    average: WeightAverage | None = None,
) -> RunState:
    """Restore the backbone, the average of its weights, the bank, both optimizers and the random state. Called on all
    ranks.

    Raises:
        ValueError: the checkpoint's settings differ from `settings`.
    """
    state = run_together(context, _check_state, checkpoint, settings)
    failed = f"restore {checkpoint} from a copy, or take another one with --resume PATH: it cannot be loaded"
    _together(context, failed, engine.load, checkpoint)
    if average is not None:
        _together(context, failed, average.load, checkpoint / "backbone.safetensors")
    _together(context, failed, _load_bank, loss, bank_optimizer, checkpoint / "bank", context)
    if state.world_size == context.world_size:
        _together(context, failed, _load_random_state, checkpoint, context)
    return state


def load_backbone(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a backbone of the same configuration and precision.

    Raises:
        ValueError: the file is missing, holds no weights, or those of another network.
    """
    path = checkpoint / "backbone.safetensors"
    if not path.is_file():
        raise ValueError(f"expected backbone weights at {path}, found none")
    try:
        # Copied, since a file's tensors lie at any address, and products of unaligned ones may round otherwise.
        # Assigned, for the precision they were trained in.
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
        own = model.state_dict()
        for name in sorted(weights.keys() & own):
            if weights[name].is_floating_point() != own[name].is_floating_point():
                raise RuntimeError(f"{name} is {weights[name].dtype}, expected {own[name].dtype}")
        model.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        raise ValueError(f"{path} does not fit the configured backbone: {error}") from None


def _beside(context: ParallelContext) -> ParallelContext:
    """Create a separate gloo group of the same ranks. Called on all ranks."""
    group: Any = context.group
    if group is not None:
        group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
    return dataclasses.replace(context, device=torch.device("cpu"), group=group)


@contextlib.contextmanager
def _nothing_was_written(final: Path) -> Iterator[None]:
    """State in errors raised inside the block that nothing was written."""
    try:
        yield
    except AgreedError as error:
        message = f"{final} was not written, earlier checkpoints are intact: {error}"
        raise type(error)(message) from error


def _take_snapshot(
    state: RunState,
    engine: Engine,
    loss: GlobalLoss,
    bank_optimizer: torch.optim.Optimizer,
    context: ParallelContext,
    average: WeightAverage | None,
    *,
    copy: bool,
) -> _Snapshot:
    """Take a snapshot if all numbers are finite; with `copy`, copy it to host memory. Called on all ranks."""
    weights = merged_weights((average or engine).full_state_dict(), engine.module)
    tensors = loss.stored_tensors(bank_optimizer)
    bad = all_gather_object(context, _together(context, "numbers", _non_finite, engine, weights, tensors))
    for rank, names in enumerate(bad):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise NonFiniteError(
                f"expected finite numbers, got NaN or infinity in {', '.join(names[:3])}{more} (on rank {rank}); "
                "resume from the last checkpoint with a lower learning rate, a longer warm-up or gradient clipping"
            )
    own_weights = weights if context.is_main else {}
    return _Snapshot(
        state=state,
        engine=_together(context, "engine", engine.snapshot) if copy else engine,
        weights=_together(context, "backbone", _copied, own_weights) if copy else own_weights,
        num_classes=None if loss.partition is None else loss.partition.num_classes,
        bank=_together(context, "bank", _copied, tensors) if copy else tensors,
        random=_random_state(context),
    )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layout = torch.contiguous_format
    return {name: value.detach().to("cpu", copy=True, memory_format=layout) for name, value in tensors.items()}


def _random_state(context: ParallelContext) -> dict[str, Tensor]:
    state = {"torch": torch.get_rng_state()}
    if context.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(context.device)
    return state


def _write(snapshot: _Snapshot, directory: Path, context: ParallelContext, retention: Retention) -> SavedCheckpoint:
    """Write, publish, prune. Called on all ranks, in any thread, while nothing else uses the group of `context`."""
    final = directory / step_name(snapshot.state.step)
    partial = partial_path(final)
    with _nothing_was_written(final):
        try:
            # 1. every rank writes and flushes its part; torch.distributed.checkpoint fails on all ranks together
            run_on_rank_zero(context, make_empty, partial)
            _together(context, "engine", _write_engine, snapshot, partial)
            _together(context, "bank", _write_bank, snapshot, partial / "bank", context)
            _together(context, "files", _write_own, snapshot, partial, context)
            # 2. write the manifest, then publish
            names = run_on_rank_zero(context, files_below, partial)
            entries = _together(context, "hashes", _hash_own, partial, names, context)
            files = {name: entry for part in all_gather_object(context, entries) for name, entry in part.items()}
            run_on_rank_zero(context, _write_manifest, snapshot, partial, files)
            run_on_rank_zero(context, publish_folder, partial, final)
        except AgreedError as error:
            # one text for all, while the old one still takes space
            message = run_on_rank_zero(context, describe_error, error, directory)
            run_on_rank_zero(context, remove, partial)
            raise type(error)(message) from error
    # 3. update the pointer, then prune
    return SavedCheckpoint(final, run_on_rank_zero(context, tidy_up, final, retention))


def _write_engine(snapshot: _Snapshot, partial: Path) -> None:
    snapshot.engine.save(partial)
    fault_point("save.engine")


def _write_bank(snapshot: _Snapshot, directory: Path, context: ParallelContext) -> None:
    tensors = _over_classes(snapshot.bank, snapshot.num_classes, context)
    _dcp_save(tensors, directory, context)
    fault_point("save.bank")


def _write_own(snapshot: _Snapshot, partial: Path, context: ParallelContext) -> None:
    own = [partial / f"random-rank-{context.rank:03d}.pt"]
    torch.save(dict(snapshot.random), own[0])
    if context.is_main:
        own += [partial / "backbone.safetensors", partial / "state.json"]
        save_file({name: value.contiguous() for name, value in snapshot.weights.items()}, own[1])
        own[2].write_text(json.dumps(asdict(snapshot.state), indent=2) + "\n", encoding="utf-8")
    fault_point("save.files")


def _hash_own(partial: Path, names: list[str], context: ParallelContext) -> dict[str, dict[str, Any]]:
    """Compute the manifest entries of this rank's share of the files."""
    own = names[context.rank :: context.world_size]
    return hash_files(partial, own, num_threads=torch.get_num_threads())


def _write_manifest(snapshot: _Snapshot, partial: Path, files: Mapping[str, dict[str, Any]]) -> None:
    write_checkpoint_manifest(partial, snapshot.state, files, torch=torch.__version__, deepspeed=version("deepspeed"))


def _dcp_save(tensors: dict[str, Any], directory: Path, context: ParallelContext) -> None:
    dcp.save(tensors, storage_writer=BankWriter(directory), process_group=context.group, no_dist=context.group is None)


def _over_classes(
    tensors: Mapping[str, Tensor], num_classes: int | None, context: ParallelContext
) -> dict[str, Tensor]:
    """Wrap this rank's rows [c, ...] as its part of [C, ...], under names independent of the number of ranks. Without
    classes, tensors are whole on every rank, and one of them writes each.
    """
    if num_classes is None:
        return dict(tensors)
    # Without dimensions: a step counter.
    return {n: as_row_tensor(v, num_classes, context.group) if v.ndim else v for n, v in tensors.items()}


def _load_bank(loss: GlobalLoss, optimizer: torch.optim.Optimizer, directory: Path, context: ParallelContext) -> None:
    """Read this rank's rows, or all, straight into the parameters and a newly allocated optimizer state.

    torch's optimizers allocate their state in the first step. The checkpoint's table of contents lists that state, so
    no such step, with a gradient as large as the bank, is needed.
    """
    contents = run_together(context, BankReader(directory).read_metadata).state_dict_metadata
    own = loss.stored_tensors()
    for name in (name for name in contents if name not in own):  # the optimizer's
        entry = contents[name]
        assert isinstance(entry, TensorStorageMetadata)
        num_rows = entry.size[:1] if loss.partition is None else (loss.partition.num_local,)
        shape, device = (*num_rows, *entry.size[1:]), loss.device
        if not entry.size:  # a step counter: on the CPU; the optimizer moves it if needed
            shape, device = (), torch.device("cpu")
        own[name] = torch.empty(shape, dtype=entry.properties.dtype, device=device)
    tensors = _over_classes(own, None if loss.partition is None else loss.partition.num_classes, context)
    dcp.load(tensors, storage_reader=BankReader(directory), process_group=context.group, no_dist=context.group is None)
    loss.restore({name: value for name, value in own.items() if name not in loss.stored_tensors()}, optimizer)


def _check_state(checkpoint: Path, settings: dict[str, Any]) -> RunState:
    state = read_state(checkpoint)
    stored, settings = (without_neutral_keys(with_colours(of)) for of in (state.settings, settings))
    names = sorted(stored.keys() | settings.keys())
    changed = [name for name in names if stored.get(name) != settings.get(name)]
    if changed:
        unset = "unset"  # such as a setting that says what went without saying before it existed
        details = "; ".join(f"{of} was {stored.get(of, unset)}, is {settings.get(of, unset)}" for of in changed)
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {details}. Resume with the same ones, give this run "
            "another name with --set name=NAME, or start anew with --resume never"
        )
    return state


def _load_random_state(checkpoint: Path, context: ParallelContext) -> None:
    random_state = torch.load(checkpoint / f"random-rank-{context.rank:03d}.pt", weights_only=True)
    torch.set_rng_state(random_state["torch"])
    if context.device.type == "cuda" and "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], context.device)


def _together(context: ParallelContext, what: str, function: Callable[..., T], *args: Any) -> T:
    """Run `function(*args)` on every rank; if any raises, raise one error that names that rank on all. Called on all
    ranks.

    Like `run_together`, but for any exception that a library may raise while it reads or writes. `function` may use
    collectives that fail on all ranks together.
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
    failures = [message for message in all_gather_object(context, failure) if message is not None]
    if failures:
        raise AgreedError(f"{what}: {failures[0]}") from cause
    return result  # type: ignore[return-value]


def _described(error: BaseException) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _non_finite(engine: Engine, weights: dict[str, Tensor], bank: Mapping[str, Tensor]) -> list[str]:
    """List the tensors with non-finite numbers."""
    fault_point("save.begin")
    return [name for name, value in _numbers(engine, weights, bank) if not _is_finite(value)]


def _numbers(engine: Engine, weights: dict[str, Tensor], bank: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a run resumes from, with a name for messages."""
    for name, value in weights.items():
        yield f"backbone {name}", value
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:  # mixed precision and ZeRO: the backbone's float32 master weights
            yield "the backbone's parameters", parameter
    for state in engine.optimizer.state.values():
        for name, value in state.items():
            yield f"the backbone's {name}", value
    for name, value in bank.items():
        yield (name if name == "proxies" else f"the proxies' {name.removeprefix('optimizer.')}"), value


def _is_finite(value: Any) -> bool:
    """Whether no element is NaN or infinite; minimum and maximum need no copy, and both propagate NaN."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return True
    least, most = torch.aminmax(value.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))

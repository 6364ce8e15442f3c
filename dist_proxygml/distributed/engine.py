"""The DeepSpeed engine around the backbone. The only file that imports deepspeed.

DeepSpeed manages what it is good at: data parallelism, ZeRO 0-3, bf16, fp16, gradient accumulation and clipping of the
backbone. The proxy bank stays OUTSIDE of the engine's module, because the engine broadcasts rank 0's parameters at
start, averages all gradients over ranks, and saves one rank's copy: right for replicas, wrong for a partition. A bank
inside is refused.

The loss hands over the gradient of the embeddings, not a graph that runs through the bank: the engine gets the scalar
sum(embeddings * gradient), whose derivative is that gradient. So whatever the engine multiplies into its loss (1 /
accumulation, fp16's loss scale) reaches the backbone only, and the proxies' gradient is exact as autograd left it. A
step that the engine skips, on all ranks alike, says so in `step_was_applied`; combinations of settings under which
DeepSpeed would not, or would forget the scale, are refused.
"""

import contextlib
import copy
import io
import logging
import math
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_proxygml.config import Config
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import ParallelContext, run_together
from dist_proxygml.distributed.zero_resize import WEIGHTS, Fragment, Part, equal_fragments, reshard
from dist_proxygml.faults import fault_point

_BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")  # as DeepSpeed spells it


class Engine:
    """A backbone under DeepSpeed. It is built, and every method is called, on all ranks.

    Args:
        model: the backbone, alike on every rank.
        optimizer: of the model's parameters, and no others.
        settings: DeepSpeed's configuration, from `engine_settings`.
        context: this process among its peers.
        outside: parameters that must not be the model's: those that differ from rank to rank.

    Raises:
        ValueError: a proxy bank or a parameter of `outside` is in the model, the optimizer holds a parameter that the
            model does not, or fp16 is on and the device is a CPU; the same error on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        settings: dict[str, Any],
        context: ParallelContext,
        outside: Iterable[nn.Parameter] = (),
    ) -> None:
        _refuse_partitioned_parameters(model, optimizer, outside=outside)
        refuse_fp16_on_cpu(settings, context.device.type)
        deepspeed = _import_deepspeed()
        os.environ.setdefault(
            "LOCAL_RANK", str(context.local_rank)
        )  # DeepSpeed insists on it, also when a launcher is not used
        fault_point("start.engine")
        with _no_first_step(optimizer):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False, model_parameters=None
            )
        self._step_was_applied = False
        if self.zero_stage in (1, 2):  # whatever deepspeed.bf16.check_grad_overflow says
            self._engine.optimizer.check_grad_overflow = True
        self._gathered = deepspeed.zero.GatheredParameters
        self._device = context.device
        self._context = context
        # Scripts that turn its files into others: nobody asked, and rank 0 alone can fail to copy them.
        self._engine._copy_recovery_script = lambda _: None

    @property
    def module(self) -> nn.Module:
        """The backbone itself, for evaluation."""
        return self._engine.module

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: what is partitioned over the ranks (1 optimizer state, 2 and gradients, 3 and parameters)."""
        return int(self._engine.zero_optimization_stage())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose parameter groups hold the learning rates."""
        return self._engine.optimizer

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [b, D], float32 unit rows, of uint8 images [b, 3, H, W]."""
        return self._engine(images.to(self._device, non_blocking=True))

    def backward(self, embeddings: Tensor, gradient: Tensor) -> None:
        """Back-propagate the gradient of the embeddings into the backbone; at a step's last micro-batch, average over
        ranks.
        """
        self._engine.backward((embeddings * gradient).sum())

    def step(self, *, measure_norm: bool) -> float | None:
        """At a step's last micro-batch, clip and update the backbone; before that, only count.

        Gradients that are NaN or infinite update nothing and are dropped. They are averages over ranks, so what one
        rank brings in is seen by all.

        Returns:
            The norm of the backbone's gradient before clipping, if `measure_norm`.
        """
        norm, is_usable = None, True
        if self._engine.is_gradient_accumulation_boundary() and self._updates_plainly():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else None
            is_usable = norm is None or math.isfinite(norm)
        with contextlib.nullcontext() if is_usable else _no_update(self._engine.optimizer):
            self._engine.step()
        self._step_was_applied = is_usable and bool(self._engine.was_step_applied())
        if not measure_norm:
            return None
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return None if norm is None else float(norm)

    def step_was_applied(self) -> bool:
        """Whether the last call of `step` changed the parameters; the same on every rank. False before a step's last
        micro-batch, and where gradients were NaN or infinite.
        """
        return self._step_was_applied

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled for fp16, so that gradients overflow now and then and nothing is wrong."""
        return bool(self._engine.fp16_enabled())

    def has_finite_buffers(self) -> bool:
        """Whether no buffer of the backbone, such as a running mean, is NaN or infinite."""
        buffers = (b for b in self._engine.module.buffers() if b.is_floating_point())
        return all(bool(buffer.isfinite().all()) for buffer in buffers)

    def _updates_plainly(self) -> bool:
        """Whether the optimizer is torch's own; those of ZeRO and of mixed precision leave a step out by themselves."""
        return isinstance(self._engine.optimizer, torch.optim.Optimizer)

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`.

        Raises:
            OSError: on this rank alone: it could not write a file.
        """
        self._save(directory, _FileWriter())

    def snapshot(self) -> "EngineSnapshot":
        """What `save` would write, copied to the memory of the host: one's own to write at any later time."""
        copies = _FileCopier()
        self._save(Path(), copies)
        return EngineSnapshot(copies.files)

    def _save(self, directory: Path, files: "_Files") -> None:
        """Let DeepSpeed hand over its files. Its ranks meet again after they have written, so one that left with an
        error would leave the others waiting: errors come after that.
        """
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = files
        try:
            self._engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer
        files.raise_first()

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, on any number of ranks."""
        parts = sorted((directory / "engine").glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        with contextlib.ExitStack() as stack:
            if parts and len(parts) != self._context.world_size:
                own = run_together(self._context, self._own_part, parts)
                stack.enter_context(self._reads(own, directory))
            path, _ = self._engine.load_checkpoint(str(directory), tag="engine")
        if path is None:
            raise ValueError(f"expected a DeepSpeed checkpoint in {directory}/engine, found none that loads")

    def _own_part(self, files: Sequence[Path]) -> dict[str, Any]:
        """What this rank would have saved of ZeRO's optimizer, from the files of another number of ranks."""
        optimizer, rank, num_ranks = self._engine.optimizer, self._context.rank, self._context.world_size
        saved = [torch.load(file, mmap=True, weights_only=False)["optimizer_state_dict"] for file in files]
        shapes = self._engine._get_zero_param_shapes()
        own = optimizer.state_dict()
        if self.zero_stage == 3:
            base, weights = "optimizer_state_dict", "fp32_flat_groups"
            model = torch.load(min(files[0].parent.glob("*_model_states.pt")), mmap=True, weights_only=False)
            layouts = [equal_fragments(model["param_shapes"], rank=r, num_ranks=len(files)) for r in range(len(files))]
            layout = equal_fragments(shapes, rank=rank, num_ranks=num_ranks)
            sizes = [flat.numel() for flat in optimizer.fp32_partitioned_groups_flat]
        else:
            base, weights = "base_optimizer_state", "single_partition_of_fp32_groups"
            layouts = [_fragments(part["param_slice_mappings"], {}) for part in saved]
            offsets = {
                name: parameter._hp_mapping.lp_fragment_address.start
                for name, parameter in self._engine.module.named_parameters()
                if getattr(parameter, "_hp_mapping", None) is not None
            }
            layout = _fragments(own["param_slice_mappings"], offsets)
            sizes = [group["params"][0].numel() for group in optimizer.optimizer.param_groups]
        state = reshard(
            [
                Part(fragments, [{WEIGHTS: flat, **part[base]["state"][g]} for g, flat in enumerate(part[weights])])
                for fragments, part in zip(layouts, saved, strict=True)
            ],
            names=[list(group) for group in shapes],
            fragments=layout,
            sizes=sizes,
        )
        own_keys = {key: own[key] for key in ("param_alignment_paddings",) if key in own}
        flat_weights = [group.pop(WEIGHTS) for group in state]
        base_state = {"state": dict(enumerate(state)), "param_groups": own[base]["param_groups"]}
        return {**saved[0], **own_keys, base: base_state, weights: flat_weights}

    @contextlib.contextmanager
    def _reads(self, own: dict[str, Any], directory: Path) -> Iterator[None]:
        """Let DeepSpeed's loader find this rank's part of the optimizer, as if so many ranks had saved it."""
        engine, context = self._engine, self._context
        reader = engine.checkpoint_engine
        (model, *_) = sorted((directory / "engine").glob("*_model_states.pt"))  # alike on all ranks, also of stage 3

        class Reader:
            def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
                return {**reader.load(path, map_location=map_location), "dp_world_size": context.world_size}

        engine.checkpoint_engine = Reader()
        engine._get_all_ckpt_names = lambda *_: [str(model)]
        engine._get_all_zero_checkpoints = lambda *_: [own] * context.world_size
        try:
            yield
        finally:
            engine.checkpoint_engine = reader
            del engine._get_all_ckpt_names, engine._get_all_zero_checkpoints

    def full_state_dict(self) -> dict[str, Tensor]:
        """The backbone's parameters and buffers, whole, in the engine's precision, on every rank."""
        state = dict(self._engine.module.state_dict())
        if self.zero_stage == 3:  # parameters are partitioned: bring them together one at a time
            for name, parameter in self._engine.module.named_parameters():
                with self._gathered([parameter]):
                    state[name] = parameter.detach().clone()
        return state


class EngineSnapshot:
    """An engine's parameters and optimizer state at one moment: files and their contents."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = files

    def save(self, directory: Path) -> None:
        """Write what `Engine.save` would have written, byte by byte. Uses no collectives."""
        for path, content in self._files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            _write(content, directory / path)


class _Files:
    """In the place of DeepSpeed's writer of files, whose choice it overrides: errors of `take` are kept for later."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def take(self, content: Any, path: Path) -> None:
        """Do something with what is to be in a file."""
        raise NotImplementedError

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """What DeepSpeed calls for each file."""
        try:
            self.take(state_dict, Path(path))
        except Exception as error:
            self._errors.append(error)

    def raise_first(self) -> None:
        """Raise the first error; none does nothing."""
        if self._errors:
            raise self._errors[0]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""

    def create(self, info: Any) -> None:
        """What comes next belongs to one checkpoint."""

    def commit(self, info: Any) -> bool:
        """It was all."""
        return True

    def is_decoupled(self) -> bool:
        """Whether files are finished later."""
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        """Whether a rank writes what all have."""
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is written with all that it is a view of: DeepSpeed then clones it before."""
        return True


class _FileWriter(_Files):
    """Writes the files."""

    def take(self, content: Any, path: Path) -> None:
        _write(_on_host(content, copy=False), path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)


class _FileCopier(_Files):
    """Keeps copies of what would be in the files."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, Any] = {}

    def take(self, content: Any, path: Path) -> None:
        self.files[path] = _on_host(content, copy=True)


def _write(content: Any, path: Path) -> None:
    try:
        with open(path, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except Exception as error:
        raise OSError(f"{path} could not be written, is the disk full? {type(error).__name__}: {error}") from error


def _on_host(content: Any, *, copy: bool) -> Any:
    """What torch.load would make of what torch.save would write of `content`, in the memory of the host.

    As there, tensors that share memory share it again, and it is copied whole. With `copy` nothing is shared with
    `content`, else the memory that is the host's already.
    """
    storages: list[torch.TypedStorage] = []

    class Taker(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, torch.TypedStorage):  # what tensors, and only they, are pickled by
                return None
            storages.append(value)
            return len(storages) - 1

    copies: dict[int, torch.UntypedStorage] = {}

    class Giver(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.TypedStorage:
            memory = storages[number]._untyped_storage
            if memory._cdata not in copies:
                is_here = memory.device.type == "cpu"
                copies[memory._cdata] = memory.clone() if copy and is_here else memory.cpu()
            return torch.TypedStorage(wrap_storage=copies[memory._cdata], dtype=storages[number].dtype, _internal=True)

    stream = io.BytesIO()
    Taker(stream).dump(content)
    stream.seek(0)
    return Giver(stream).load()


def _rank_of(file: Path) -> int:
    """Rank that wrote one of ZeRO's files."""
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])


def _fragments(mappings: Sequence[Mapping[str, Any]], offsets: Mapping[str, int]) -> list[list[Fragment]]:
    """A rank's fragments under ZeRO stage 1 and 2, by group, from DeepSpeed's addresses in its part."""
    return [
        [Fragment(name, address.start, address.numel, offsets.get(name, 0)) for name, address in group.items()]
        for group in mappings
    ]


def engine_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed section as the user wrote it, completed with the batch sizes that follow from ours.

    Raises:
        ValueError: the batch does not divide over the ranks, the section contradicts ours, or it combines settings
            under which DeepSpeed 0.19.8 scales the loss wrongly.
    """
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if _is_enabled(config.deepspeed, "fp16") and stage == 0:
        # Its optimizer without ZeRO divides gradients by the loss scale, which nobody multiplied into the loss.
        raise ValueError(
            "deepspeed.fp16 is enabled with deepspeed.zero_optimization.stage 0, where DeepSpeed's gradients come out "
            "too small by the loss scale; use stage 1, 2 or 3, or deepspeed.bf16"
        )
    offload = config.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.deepspeed.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "expected deepspeed.zero_force_ds_cpu_optimizer false with zero_optimization.offload_optimizer, since the "
            "section optimizer brings torch's own optimizer, got none; set it to false, or remove offload_optimizer"
        )
    autocast_dtype = config.deepspeed.get("torch_autocast", {}).get("dtype")
    if _is_enabled(config.deepspeed, "torch_autocast") and autocast_dtype not in _BFLOAT16:
        # float16: stage 0 calls skipped steps applied, 1 to 3 never lower the scale; null is float16 without a scale
        raise ValueError(
            f"deepspeed.torch_autocast.dtype must be bfloat16, got {autocast_dtype!r}, whose loss scaling does not fit "
            "DeepSpeed's steps; use bfloat16, or deepspeed.fp16 with zero_optimization.stage 1, 2 or 3"
        )
    return {
        "steps_per_print": 1 << 40,  # progress is shown by reporting/telemetry.py
        **config.deepspeed,
        "train_batch_size": config.training.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.accumulation,
    }


def check_settings(settings: Mapping[str, Any]) -> None:
    """Find what DeepSpeed refuses in the result of `engine_settings`, without a process group.

    Raises:
        ValueError: in one line, whatever DeepSpeed raises.
    """
    _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    # DeepSpeed multiplies by the ranks that are there; those that are meant need not be.
    own = copy.deepcopy({name: value for name, value in settings.items() if name != "train_batch_size"})
    try:
        dtype = DeepSpeedConfig(own).grad_accum_dtype
        if dtype is not None:  # which is looked at when the engine is there
            DtypeEnum(dtype)
    except Exception as error:  # of many types, for a value of a wrong one above all
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        raise ValueError(
            f"expected a section deepspeed that DeepSpeed takes, got: {' '.join(lines)} ({type(error).__name__}); "
            "change or remove that setting"
        ) from None


def _import_deepspeed() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what DeepSpeed's imports say of a machine without GPUs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    finally:
        logging.disable(before)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


@contextlib.contextmanager
def _no_first_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo the step without a gradient that DeepSpeed takes to allocate an optimizer's state (bf16 without ZeRO).

    It decays the weights, and leaves Adam one step ahead in its bias correction: the first update came out half as
    large as with ZeRO. Without a learning rate it moves nothing; the moments and step counts are set to 0 again.
    """
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


@contextlib.contextmanager
def _no_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """DeepSpeed's step without the update, for one step."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step  # the class has it


def _is_enabled(settings: Mapping[str, Any], section: str) -> bool:
    return bool(settings.get(section, {}).get("enabled", False))


def refuse_fp16_on_cpu(settings: Mapping[str, Any], device: str) -> None:
    """Raise the same error on every rank where fp16 is on and `device` is "cpu"."""
    if _is_enabled(settings, "fp16") and device == "cpu":
        raise AgreedError(
            "deepspeed.fp16 is enabled, which needs a GPU, but this run is on CPUs; use deepspeed.bf16, or neither"
        )


def _refuse_partitioned_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, outside: Iterable[nn.Parameter]
) -> None:
    why = (
        "the engine would overwrite it with rank 0's classes, average its gradient over ranks that own other classes, "
        "and save one rank's; keep the loss out of the model and give its proxies an optimizer of their own"
    )
    for name, module in model.named_modules():
        if getattr(module, "is_partitioned", False):
            what = f"a {type(module).__name__} at {name!r}"
            raise AgreedError(f"expected a model without the proxy bank, got {what}: {why}")
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for parameter in outside:
        if id(parameter) in names:
            name = names[id(parameter)]
            raise AgreedError(f"expected a model without the proxy bank, got its parameter at {name!r}: {why}")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise AgreedError(
                    "expected an optimizer of the model's parameters, got one that holds another of shape "
                    f"{list(parameter.shape)}; if it is the proxy bank, {why}"
                )

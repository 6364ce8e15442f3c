"""The DeepSpeed engine around the backbone. The only file that imports deepspeed.

DeepSpeed handles data parallelism, ZeRO 0-3, bf16, fp16, gradient accumulation and clipping of the backbone. The proxy
bank stays OUTSIDE the engine's module, because the engine broadcasts rank 0's parameters at the start, averages all
gradients over ranks, and saves one rank's copy: right for replicas, wrong for a partition. A bank inside is refused.

The loss passes on the gradient of the embeddings, not a graph that runs through the bank: the engine gets the scalar
sum(embeddings * gradient), whose derivative is that gradient. Whatever the engine multiplies into its loss (1 /
accumulation, fp16's loss scale) therefore reaches the backbone only, and the proxies' gradient is exactly autograd's.
`step_was_applied` reports a step that the engine skipped, on all ranks together; combinations of settings under which
DeepSpeed misreports it, or loses the scale, are refused.
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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_proxygml.config import Config
from dist_proxygml.distributed.collectives import AgreedError, NonFiniteError
from dist_proxygml.distributed.parallel import ParallelContext, run_together
from dist_proxygml.distributed.zero_resize import WEIGHTS, Fragment, Part, equal_fragments, equal_part, reshard
from dist_proxygml.faults import fault_point

# DeepSpeed's timer waits for the GPU twice in every micro-batch, and in every forward pass of an evaluation.
_WITHOUT_TIMERS = {"timers": {"throughput": {"enabled": False}}}
_BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")  # DeepSpeed's spelling


class WeightFragment(NamedTuple):
    """A rank's float32 elements of a flattened parameter, from `offset` on."""

    values: Tensor
    offset: int


class Engine:
    """A backbone under DeepSpeed. Built, and every method called, on all ranks.

    Args:
        model: the backbone, the same on every rank.
        optimizer: of the model's parameters, and no others.
        settings: DeepSpeed's configuration, from `engine_settings`.
        context: this process among its peers.
        outside: parameters that must not be the model's, because they differ between ranks.

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
        os.environ.setdefault("LOCAL_RANK", str(context.local_rank))  # required by DeepSpeed even without a launcher
        fault_point("start.engine")
        with _no_first_step(optimizer):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings | _WITHOUT_TIMERS,
                dist_init_required=False,
                model_parameters=None,
            )
        self._step_was_applied = False
        _look_for_overflow_at_once(self._engine.optimizer)
        if self.zero_stage in (1, 2):  # regardless of deepspeed.bf16.check_grad_overflow
            self._engine.optimizer.check_grad_overflow = True
            _correct_addresses(self._engine.optimizer)
        self._gathered = deepspeed.zero.GatheredParameters
        self._device = context.device
        self._context = context
        # Conversion scripts that DeepSpeed adds: not needed, and copying them can fail on rank 0 alone.
        self._engine._copy_recovery_script = lambda _: None
        if self.zero_stage == 2:  # frozen weights are saved with the module's state, and need not be a second time
            self._engine._get_zero_frozen_param_attributes = lambda _: None

    @property
    def module(self) -> nn.Module:
        """The backbone itself, for evaluation."""
        return self._engine.module

    @property
    def num_parameters(self) -> int:
        """Number of the module's parameters, whole ones under ZeRO 3 too."""
        return sum(_numel(parameter) for parameter in self.module.parameters())

    @property
    def num_trained_parameters(self) -> int:
        """Those of them that are not frozen."""
        return sum(_numel(parameter) for parameter in self.module.parameters() if parameter.requires_grad)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: partitions optimizer state (1), also gradients (2), also parameters (3)."""
        return int(self._engine.zero_optimization_stage())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose parameter groups hold the learning rates."""
        return self._engine.optimizer

    def embed(self, images: Tensor) -> Tensor:
        """Embed uint8 images [b, 3, H, W] as float32 unit rows [b, D]."""
        return self._engine(images.to(self._device, non_blocking=True))

    def backward(self, embeddings: Tensor, gradient: Tensor) -> None:
        """Back-propagate the gradient of the embeddings into the backbone; average over ranks at a step's last
        micro-batch.
        """
        self._engine.backward((embeddings * gradient).sum())

    def gradient_norm(self) -> Tensor | None:
        """The norm of the backbone's gradient after a step's last `backward`, not read yet, the same on every rank;
        None if the optimizer, of ZeRO or mixed precision, measures it itself and skips steps by it.
        """
        if not self.updates_plainly:
            return None
        return _gradient_norm(self._engine.module.parameters()).to(self._device)

    def step(self, *, norm: float | None = None, is_wanted: bool = True, measure_norm: bool) -> float | None:
        """At a step's last micro-batch, clip and update the backbone; before that, only count.

        NaN or infinite gradients are dropped without an update. Gradients are averages over ranks, so all ranks see
        what one of them contributes.

        Args:
            norm: `gradient_norm`, if the caller has read it.
            is_wanted: False drops the update of an optimizer that does not decide itself, as those of ZeRO do.
            measure_norm: whether to return the norm.

        Returns:
            The norm of the backbone's gradient before clipping, if `measure_norm`.
        """
        if norm is None and self._engine.is_gradient_accumulation_boundary():
            measured = self.gradient_norm()
            norm = None if measured is None else float(measured)
        is_usable = norm is None or (is_wanted and math.isfinite(norm))
        with contextlib.nullcontext() if is_usable else _no_update(self._engine.optimizer), _as_non_finite():
            self._engine.step()
        self._step_was_applied = is_usable and bool(self._engine.was_step_applied())
        if not measure_norm:
            return None
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return None if norm is None else float(norm)

    def step_was_applied(self) -> bool:
        """Whether the last call of `step` updated the parameters; the same on every rank. False before a step's last
        micro-batch, and if gradients were NaN or infinite.
        """
        return self._step_was_applied

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled for fp16, so that an occasional overflow of gradients is normal."""
        return bool(self._engine.fp16_enabled())

    def has_finite_buffers(self) -> bool:
        """Whether no buffer of the backbone, such as a running mean, is NaN or infinite."""
        buffers = (b for b in self._engine.module.buffers() if b.is_floating_point())
        return all(bool(buffer.isfinite().all()) for buffer in buffers)

    @property
    def updates_plainly(self) -> bool:
        """Whether the optimizer is torch's own; those of ZeRO and mixed precision skip steps themselves."""
        return isinstance(self._engine.optimizer, torch.optim.Optimizer)

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`.

        Raises:
            OSError: on this rank only, if it could not write a file.
        """
        self._save(directory, _FileWriter())

    def snapshot(self) -> "EngineSnapshot":
        """Copy what `save` would write to host memory, to be written later."""
        copies = _FileCopier()
        self._save(Path(), copies)
        return EngineSnapshot(copies.files)

    def _save(self, directory: Path, files: "_Files") -> None:
        """Intercept DeepSpeed's file writes. Its ranks synchronise after writing, so a rank that raised earlier would
        leave the others waiting; errors are raised afterwards.
        """
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = files
        try:
            self._engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer
        files.raise_first()

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, on any number of ranks and on CPUs or GPUs, whichever wrote it."""
        is_fused = [group.get("fused") for group in self.optimizer.param_groups]
        parts = sorted((directory / "engine").glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        with contextlib.ExitStack() as stack:
            if parts and len(parts) != self._context.world_size:
                own = run_together(self._context, self._own_part, parts)
                frozen = run_together(self._context, self._own_frozen_part, directory)
                stack.enter_context(self._reads(own, frozen, directory))
            path, _ = self._engine.load_checkpoint(str(directory), tag="engine")
        if path is None:
            raise ValueError(f"expected a DeepSpeed checkpoint in {directory}/engine, found none that loads")
        self._compute_as_built(is_fused)

    def _compute_as_built(self, is_fused: Sequence[bool | None]) -> None:
        """Undo what a checkpoint says about how the optimizer computes: fused on GPUs, where step counters are too."""
        for group, own in zip(self.optimizer.param_groups, is_fused, strict=True):
            if "fused" in group:
                group["fused"] = own
        for parameter, state in self.optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device if any(is_fused) else "cpu")

    def _own_part(self, files: Sequence[Path]) -> dict[str, Any]:
        """Reshard ZeRO's optimizer state from the files of another number of ranks into this rank's part."""
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

    def _own_frozen_part(self, directory: Path) -> dict[str, Any]:
        """Reshard the parameters that no optimizer has, which ZeRO partitions in stage 3 alone."""
        if self.zero_stage < 3:
            return {}
        files = sorted((directory / "engine").glob("*_model_states.pt"), key=_rank_of)
        saved = [torch.load(file, mmap=True, weights_only=False) for file in files]
        rank, num_ranks = self._context.rank, self._context.world_size
        parts = {
            name: equal_part(
                [part["frozen_param_fragments"][name] for part in saved], shape.numel(), rank=rank, num_ranks=num_ranks
            )
            for name, shape in saved[0]["frozen_param_shapes"].items()
        }
        return {"frozen_param_fragments": parts}

    @contextlib.contextmanager
    def _reads(self, own: dict[str, Any], frozen: dict[str, Any], directory: Path) -> Iterator[None]:
        """Make DeepSpeed's loader read this rank's part of the optimizer and of what has none, as if this number of
        ranks had saved it.
        """
        engine, context = self._engine, self._context
        reader = engine.checkpoint_engine
        (model, *_) = sorted((directory / "engine").glob("*_model_states.pt"))  # one for all ranks, even under stage 3

        class Reader:
            def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
                content = reader.load(path, map_location=map_location)
                return {**content, "dp_world_size": context.world_size, **frozen}

        engine.checkpoint_engine = Reader()
        engine._get_all_ckpt_names = lambda *_: [str(model)]
        engine._get_all_zero_checkpoints = lambda *_: [own] * context.world_size
        try:
            yield
        finally:
            engine.checkpoint_engine = reader
            del engine._get_all_ckpt_names, engine._get_all_zero_checkpoints

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the backbone's complete parameters and buffers, in the engine's precision, on every rank."""
        state = dict(self._engine.module.state_dict())
        if self.zero_stage == 3:  # parameters are partitioned: gather them one at a time
            for name, parameter in self._engine.module.named_parameters():
                with self._gathered([parameter]):
                    state[name] = parameter.detach().clone()
        return state

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of the ranks."""
        return self._context.group

    @property
    def has_partitioned_weights(self) -> bool:
        """Whether a rank updates a part of the float32 weights only."""
        return not self.updates_plainly and not self._keeps_whole_copies()

    def float32_weights(self) -> dict[str, WeightFragment]:
        """Return the float32 weights that the optimizer updates on this rank, by parameter: its own memory, valid until
        the next step. No collective.
        """
        optimizer, rank = self._engine.optimizer, self._context.rank
        trained: dict[str, Any] = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.updates_plainly:
            found = {name: WeightFragment(parameter, 0) for name, parameter in trained.items()}
        elif self._keeps_whole_copies():
            pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            copies = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
            found = {name: WeightFragment(copies[id(parameter)], 0) for name, parameter in trained.items()}
        elif self.zero_stage == 3:
            found = {}
            for name, parameter in trained.items():
                values, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
                offset = min(rank * values.numel(), parameter.ds_numel)
                found[name] = WeightFragment(values[: parameter.ds_numel - offset], offset)  # without padding
        else:
            mappings = {name: parameter._hp_mapping for name, parameter in trained.items()}
            found = {
                name: WeightFragment(mapping.get_hp_fragment(), mapping.lp_fragment_address.start)
                for name, mapping in mappings.items()
                if mapping is not None
            }
        assert all(fragment.values.dtype in (torch.float32, torch.float64) for fragment in found.values())
        return {name: WeightFragment(values.detach().flatten(), offset) for name, (values, offset) in found.items()}

    def _keeps_whole_copies(self) -> bool:
        """Whether every rank has float32 copies of all weights, as with bf16 without ZeRO."""
        return hasattr(self._engine.optimizer, "fp32_groups")


class EngineSnapshot:
    """An engine's parameters and optimizer state at one moment: files and their contents."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = files

    def save(self, directory: Path) -> None:
        """Write exactly the bytes that `Engine.save` would have written. Uses no collectives."""
        for path, content in self._files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            _write(content, directory / path)


class _Files:
    """Replacement for DeepSpeed's file writer that defers errors of `take`."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def take(self, content: Any, path: Path) -> None:
        """Process the content of a file."""
        raise NotImplementedError

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Save one file; called by DeepSpeed."""
        try:
            self.take(state_dict, Path(path))
        except Exception as error:
            self._errors.append(error)

    def raise_first(self) -> None:
        """Raise the first error, if any."""
        if self._errors:
            raise self._errors[0]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder."""

    def create(self, info: Any) -> None:
        """Begin a checkpoint."""

    def commit(self, info: Any) -> bool:
        """End a checkpoint."""
        return True

    def is_decoupled(self) -> bool:
        """Whether files are completed later."""
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        """Whether a rank writes replicated data."""
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is written with its whole storage; DeepSpeed then clones it first."""
        return True


class _FileWriter(_Files):
    """Writes the files."""

    def take(self, content: Any, path: Path) -> None:
        _write(_on_host(content, copy=False), path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)


class _FileCopier(_Files):
    """Keeps copies of the files' contents."""

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
    """Return what torch.save followed by torch.load would give for `content`, in host memory.

    As there, tensors that share storage share it again, and whole storages are copied. With `copy` nothing is shared
    with `content`; otherwise storages already on the host are.
    """
    storages: list[torch.TypedStorage] = []

    class Taker(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, torch.TypedStorage):  # the type by which tensors, and only tensors, are pickled
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


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, which ZeRO 3 partitions."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _rank_of(file: Path) -> int:
    """Parse the rank that wrote one of ZeRO's files."""
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])


def _fragments(mappings: Sequence[Mapping[str, Any]], offsets: Mapping[str, int]) -> list[list[Fragment]]:
    """Convert DeepSpeed's addresses in a rank's part to fragments by group, under ZeRO stages 1 and 2."""
    return [
        [Fragment(name, address.start, address.numel, offsets.get(name, 0)) for name, address in group.items()]
        for group in mappings
    ]


def engine_settings(config: Config, world_size: int) -> dict[str, Any]:
    """Complete the user's DeepSpeed section with the batch sizes that follow from ours.

    Raises:
        ValueError: the batch does not divide over the ranks, the section contradicts ours, or it combines settings
            under which DeepSpeed 0.19.8 scales the loss wrongly.
    """
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if _is_enabled(config.deepspeed, "fp16") and stage == 0:
        # Without ZeRO its optimizer divides gradients by a loss scale that was never multiplied into the loss.
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
    if stage == 3 and config.training.compile:
        raise ValueError(
            "expected training.compile false with deepspeed.zero_optimization.stage 3, which fetches the parameters of "
            "a layer when the layer is called, got true; set it to false, or use stage 1 or 2"
        )
    if offload.get("device") == "nvme" and config.training.ema_decay is not None:
        raise ValueError(
            "expected weights in memory with training.ema_decay, which averages them after every step, got "
            "deepspeed.zero_optimization.offload_optimizer.device nvme; offload to cpu, or remove training.ema_decay"
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
    """Check the result of `engine_settings` with DeepSpeed's own validation, without a process group.

    Raises:
        ValueError: DeepSpeed refuses it; its error in one line.
    """
    _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    # DeepSpeed multiplies by the present world size, which may not be the intended one.
    own = copy.deepcopy({name: value for name, value in settings.items() if name != "train_batch_size"})
    try:
        dtype = DeepSpeedConfig(own).grad_accum_dtype
        if dtype is not None:  # checked when the engine is built
            DtypeEnum(dtype)
    except Exception as error:  # of many types, mostly for values of a wrong type
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        raise ValueError(
            f"expected a section deepspeed that DeepSpeed accepts, got: {' '.join(lines)} ({type(error).__name__}); "
            "change or remove that setting"
        ) from None


def _import_deepspeed() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # warnings of DeepSpeed's imports on a machine without GPUs
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
    """Undo the gradientless step that DeepSpeed takes to allocate an optimizer's state (bf16 without ZeRO).

    It decays the weights, and puts Adam one step ahead in its bias correction: the first update came out half as large
    as with ZeRO. With a learning rate of 0 it moves nothing; moments and step counts are reset to 0.
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


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def _look_for_overflow_at_once(optimizer: Any) -> None:
    """Let the optimizer of bf16 without ZeRO read one number for all gradients: that of DeepSpeed 0.19.8 asks each of
    the network's tensors whether it is finite, and waits for the GPU as often.
    """
    checker = getattr(optimizer, "overflow_checker", None)
    if checker is not None:
        checker.has_overflow_serial = lambda parameters: not math.isfinite(_gradient_norm(parameters))


def _correct_addresses(optimizer: Any) -> None:
    """Correct where DeepSpeed 0.19.8 says that parameters lie in the partitions of stages 1 and 2.

    With round_robin_gradients it flattens them in another order than the one by which it computes their addresses.
    """
    if not optimizer.round_robin_gradients:
        return
    groups, link = optimizer.bit16_groups, optimizer._link_all_hp_params

    @contextlib.contextmanager
    def in_order() -> Iterator[None]:
        optimizer.bit16_groups = optimizer.round_robin_bit16_groups
        try:
            yield
        finally:
            optimizer.bit16_groups = groups

    optimizer._link_all_hp_params = in_order()(link)  # also called when a checkpoint is loaded
    optimizer._link_all_hp_params()
    with in_order():
        optimizer._param_slice_mappings = optimizer._create_param_mapping()


@contextlib.contextmanager
def _as_non_finite() -> Iterator[None]:
    """Name the end of fp16, for which DeepSpeed raises a bare Exception, on all ranks: its loss scale cannot fall."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise NonFiniteError(
            "expected gradients that fit float16 under some loss scale, got overflows down to deepspeed.fp16's "
            "min_loss_scale; resume with a lower learning rate, or with deepspeed.bf16 in a run of its own"
        ) from None


@contextlib.contextmanager
def _no_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Suppress the update of one DeepSpeed step."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step  # back to the class's method


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

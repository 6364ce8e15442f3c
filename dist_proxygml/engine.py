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
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_proxygml.collectives import AgreedError
from dist_proxygml.config import Config
from dist_proxygml.loss import ProxyGMLLoss
from dist_proxygml.parallel import ParallelContext, run_together

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
        _refuse_fp16_on_cpu(settings, context.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DeepSpeed's own imports
            import deepspeed

        os.environ.setdefault(
            "LOCAL_RANK", str(context.local_rank)
        )  # DeepSpeed insists on it, also when a launcher is not used
        deepspeed.utils.logger.setLevel(logging.WARNING)
        with _no_first_step(optimizer):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False, model_parameters=None
            )
        self._gathered = deepspeed.zero.GatheredParameters
        self._context = context
        self._device = context.device
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

        Returns:
            The norm of the backbone's gradient before clipping, if `measure_norm`.
        """
        norm = None
        if measure_norm and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients and self.zero_stage == 0 else None
        self._engine.step()
        if measure_norm and norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def step_was_applied(self) -> bool:
        """Whether the last call of `step` changed the parameters; the same on every rank. False before a step's last
        micro-batch, and where gradients overflowed.
        """
        return bool(self._engine.was_step_applied())

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`.

        DeepSpeed's ranks meet again after they have written, so one that left with an error would leave the others
        waiting: what goes wrong with a file is kept until then.

        Raises:
            ValueError: on every rank: a rank could not write a file.
        """
        writer = _PatientWriter(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = writer
        try:
            self._engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer.writer
        run_together(self._context, writer.raise_first)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        path, _ = self._engine.load_checkpoint(str(directory), tag="engine")
        if path is None:
            raise ValueError(f"expected a DeepSpeed checkpoint in {directory}/engine, found none that loads")

    def full_state_dict(self) -> dict[str, Tensor]:
        """The backbone's parameters and buffers, whole, in the engine's precision, on every rank."""
        state = dict(self._engine.module.state_dict())
        if self.zero_stage == 3:  # parameters are partitioned: bring them together one at a time
            for name, parameter in self._engine.module.named_parameters():
                with self._gathered([parameter]):
                    state[name] = parameter.detach().clone()
        return state


class _PatientWriter:
    """DeepSpeed's writer of files, which keeps its errors for later."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._errors: list[tuple[str, Exception]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file, or keep why that failed."""
        try:
            self.writer.save(state_dict, path)
        except Exception as error:
            self._errors.append((path, error))

    def raise_first(self) -> None:
        """Raise the first error as an OSError that says what it was; none does nothing."""
        if self._errors:
            path, error = self._errors[0]
            raise OSError(f"{path} could not be written, is the disk full? {type(error).__name__}: {error}") from error


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
    autocast_dtype = config.deepspeed.get("torch_autocast", {}).get("dtype")
    if _is_enabled(config.deepspeed, "torch_autocast") and autocast_dtype not in _BFLOAT16:
        # float16: stage 0 calls skipped steps applied, 1 to 3 never lower the scale; null is float16 without a scale
        raise ValueError(
            f"deepspeed.torch_autocast.dtype must be bfloat16, got {autocast_dtype!r}, whose loss scaling does not fit "
            "DeepSpeed's steps; use bfloat16, or deepspeed.fp16 with zero_optimization.stage 1, 2 or 3"
        )
    return {
        "steps_per_print": 1 << 40,  # progress is shown by telemetry.py
        **config.deepspeed,
        "train_batch_size": config.training.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.accumulation,
    }


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


def _is_enabled(settings: Mapping[str, Any], section: str) -> bool:
    return bool(settings.get(section, {}).get("enabled", False))


def _refuse_fp16_on_cpu(settings: Mapping[str, Any], device: torch.device) -> None:
    if _is_enabled(settings, "fp16") and device.type == "cpu":
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
        if isinstance(module, ProxyGMLLoss):
            raise AgreedError(f"expected a model without the proxy bank, got a ProxyGMLLoss at {name!r}: {why}")
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

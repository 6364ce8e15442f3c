"""The DeepSpeed engine around the backbone. The only file that imports deepspeed.

DeepSpeed manages what it is good at: data parallelism, ZeRO 0-3, bf16, gradient accumulation and clipping of the
backbone. The proxy bank stays OUTSIDE of the engine's module, because the engine broadcasts rank 0's parameters at
start, averages all gradients over ranks, and saves one rank's copy: right for replicas, wrong for a partition.

The loss hands over the gradient of the embeddings, not a graph that runs through the bank: the engine gets the scalar
sum(embeddings * gradient), whose derivative is that gradient. So whatever the engine multiplies into its loss (1 /
accumulation) reaches the backbone only, and the proxies' gradient is exact as autograd left it.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_proxygml.config import Config
from dist_proxygml.parallel import ParallelContext


class Engine:
    """A backbone under DeepSpeed. Every method is called on all ranks."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, settings: dict[str, Any], context: ParallelContext
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DeepSpeed's own imports
            import deepspeed

        os.environ.setdefault(
            "LOCAL_RANK", str(context.local_rank)
        )  # DeepSpeed insists on it, also when a launcher is not used
        deepspeed.utils.logger.setLevel(logging.WARNING)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False, model_parameters=None
        )
        self._gathered = deepspeed.zero.GatheredParameters
        self._device = context.device

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
        """Whether the last step changed the parameters."""
        return bool(self._engine.was_step_applied())

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`."""
        self._engine.save_checkpoint(str(directory), tag="engine", save_latest=False)

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


def engine_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed section as the user wrote it, completed with the batch sizes that follow from ours.

    Raises:
        ValueError: the batch does not divide over the ranks, or the section contradicts ours.
    """
    return {
        "steps_per_print": 1 << 40,  # progress is shown by telemetry.py
        **config.deepspeed,
        "train_batch_size": config.training.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.accumulation,
    }

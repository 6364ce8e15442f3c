"""Optimizers of the backbone and of the proxies, and the learning-rate schedule.

The schedule is a pure function of the step number, so resuming needs no scheduler state and the backbone (inside
DeepSpeed) and the bank (outside) cannot drift apart. Published recipe: torch Adam with eps 0.01 and weight decay added
to the gradient, learning rates x 0.1 at the start of epochs 20 and 40, and a second epoch that trains only the
embedding layer and the proxies.

Layers of the backbone may learn at different rates, and biases without weight decay: a parameter group for each
combination (backbones/layers.py), whose factor on the learning rate is a function of the configuration, and no part of
a checkpoint.

The frozen epoch is a learning rate of 0 for the trunk. Removing its parameters from the optimizer was declined, because
ZeRO fixes its partitions at the start. Adam's moments keep averaging meanwhile; the weights do not move.

Effect of a step on the proxies of a class that no image kept, whose gradient is 0, and what the step reads and writes:

    adam, adamw        moved by their first moment and by weight decay          the whole bank and its state
    sgd                moved by momentum and weight decay, if set               the whole bank; without either: as below
    rowwise_adagrad    not moved                                                the kept classes
    sparse_adam        not moved, moments unchanged                             the kept classes

The bank's dense optimizers are torch's fused ones, which compute the same update: the others need temporaries of two or
three times the bank, and eight times as long on a CPU.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_proxygml.backbones.build import EmbeddingModel
from dist_proxygml.backbones.layers import ParameterGroup, parameter_groups
from dist_proxygml.config import Config, OptimizerConfig, ScheduleConfig
from dist_proxygml.head.optim import RowwiseAdagrad, SparseAdam


def build_groups(config: Config, model: EmbeddingModel) -> list[ParameterGroup]:
    """Group the backbone's trained parameters as the configuration says: trunk and embedding layer, by default.

    Raises:
        ValueError: the order of the network's layers is not known, and needed.
    """
    return parameter_groups(
        model.trunk,
        [model.embedding] if model.pooling is None else [model.pooling, model.embedding],
        config.backbone.name,
        layer_decay=config.optimizer.layer_decay,
        decays_matrices_only=config.optimizer.weight_decay_on == "matrices",
    )


def build_backbone_optimizer(config: OptimizerConfig, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Build the optimizer that the engine takes, with the parameter groups in this order. On a GPU it is the fused
    one: a few kernels for all parameters.
    """
    rates = group_learning_rates(groups, trunk=config.backbone_lr, embedding=config.embedding_lr or config.backbone_lr)
    settings = [
        {"params": group.parameters, "lr": rate, "weight_decay": config.weight_decay if group.decays else 0.0}
        for group, rate in zip(groups, rates, strict=True)
    ]
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group.parameters)
    fused = True if on_gpu else None
    return kind(settings, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)


def build_bank_optimizer(
    config: OptimizerConfig, proxies: nn.Parameter | list[nn.Parameter], log_scale: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of this rank's proxies [c, N, D], c may be 0, and of a learned scale, a scalar; or of the
    parameters of another loss, of which there may be none.

    Its state is scalars and tensors of the parameters' rows.
    """
    lr, weight_decay = config.proxies_lr, config.proxies_weight_decay
    groups: list[dict[str, Any]] = [{"params": proxies if isinstance(proxies, list) else [proxies]}]
    if log_scale is not None:
        decays = config.proxies_rule in ("sgd", "adam", "adamw")
        groups.append({"params": [log_scale]} | ({"weight_decay": 0.0} if decays else {}))
    match config.proxies_rule:
        case "sgd":
            is_dense = not _sgd_leaves_unkept_proxies(config)
            return torch.optim.SGD(
                groups, lr, momentum=config.proxies_momentum, weight_decay=weight_decay, fused=is_dense
            )
        case "rowwise_adagrad":
            return RowwiseAdagrad(groups, lr, eps=config.eps)
        case "sparse_adam":
            return SparseAdam(groups, lr, betas=config.betas, eps=config.eps)
        case name:
            kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
            return kind(groups, lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay, fused=True)


def wants_sparse_gradient(config: Config) -> bool:
    """Whether the loss should give the proxies a sparse gradient.

    It should where the bank's update rule does not touch classes that no image kept, unless the gradient is dense
    anyway: that of a head in which all compete and the regulariser's reach every proxy, and that of a gathered bank is
    returned whole.
    """
    rule = config.optimizer.proxies_rule
    is_sparse_rule = rule in ("rowwise_adagrad", "sparse_adam") or (
        rule == "sgd" and _sgd_leaves_unkept_proxies(config.optimizer)
    )
    proxies = config.proxies
    is_sparse = proxies.negatives != "all" and proxies.regularization_weight == 0 and proxies.selection != "gather"
    return is_sparse_rule and is_sparse


def learning_rate_factor(config: ScheduleConfig, *, step: int, steps_per_epoch: int, num_steps: int) -> float:
    """Return the factor on every learning rate at optimizer step `step` (0-based) of `num_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "step":
        epoch = step // steps_per_epoch + 1
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def group_learning_rates(groups: Iterable[ParameterGroup], *, trunk: float, embedding: float) -> list[float]:
    """Return the learning rate of each group."""
    return [(embedding if group.is_embedding else trunk) * group.lr_factor for group in groups]


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Iterable[float]) -> None:
    """Set the learning rate of each parameter group, in order."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def clip_norm_(gradient: Tensor, *, norm: Tensor, max_norm: float) -> None:
    """Scale `gradient` in place so that the total `norm`, to which it contributes, becomes at most `max_norm`."""
    gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def _sgd_leaves_unkept_proxies(config: OptimizerConfig) -> bool:
    return config.proxies_momentum == 0 and config.proxies_weight_decay == 0

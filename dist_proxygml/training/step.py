"""One optimizer step, and its state.

Embeddings through the engine -> loss over the partitioned bank -> gradients of the proxies (final, on their rank) and
of the embeddings (passed to the engine) -> both optimizers step. A step's random draws and learning rates are functions
of the position in the epochs.

If anything is NaN or infinite on any rank, all ranks skip the step together: neither backbone nor proxies nor their
moments change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.backbones.layers import ParameterGroup
from dist_proxygml.backbones.lora import add_adapters_
from dist_proxygml.config import Config, ProxiesConfig
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.distributed.collectives import NonFiniteError, all_reduce_sum
from dist_proxygml.distributed.engine import Engine, engine_settings
from dist_proxygml.distributed.gpus import exact_products
from dist_proxygml.distributed.parallel import ParallelContext, run_together
from dist_proxygml.distributed.weight_average import WeightAverage
from dist_proxygml.faults import fault_point
from dist_proxygml.head.choices import Head
from dist_proxygml.head.global_loss import GlobalLoss
from dist_proxygml.head.loss import ProxyLoss
from dist_proxygml.head.margins import Margin
from dist_proxygml.head.optim import bring_to_unit_length_, coalesced, squared_norm
from dist_proxygml.head.pml import PmlLoss
from dist_proxygml.head.reference import LossTerms
from dist_proxygml.training.optim import (
    build_backbone_optimizer,
    build_bank_optimizer,
    build_groups,
    clip_norm_,
    group_learning_rates,
    learning_rate_factor,
    set_learning_rates,
    wants_sparse_gradient,
)
from dist_proxygml.training.transfer import Transfer


@dataclass
class TrainState:
    """State that a training step reads and updates."""

    context: ParallelContext
    config: Config
    engine: Engine
    groups: list[ParameterGroup]  # of the backbone's optimizer
    loss: GlobalLoss
    bank_optimizer: torch.optim.Optimizer
    num_steps: int  # of the whole run, at this batch size
    steps_per_epoch: int
    step: int = 0  # completed optimizer steps, at whatever batch sizes
    schedule_step: int = 0  # the same position in steps of this batch size, for schedules
    consumed: int = 0  # consumed images of this epoch
    average: WeightAverage | None = None  # of the backbone's weights, if configured

    @property
    def is_finished(self) -> bool:
        """Whether the run's last step is done; a run that was shortened may be beyond it."""
        return self.schedule_step >= self.num_steps

    @property
    def bank(self) -> ProxyLoss:
        """The loss, where it is the head of proxies."""
        assert isinstance(self.loss, ProxyLoss)
        return self.loss

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.schedule_step // self.steps_per_epoch


@dataclass(frozen=True)
class SkippedStep:
    """Why a step was skipped."""

    reason: str  # the same on every rank
    suspects: list[int]  # ids of this rank's images with a NaN or infinite embedding or gradient


@dataclass(frozen=True)
class StepReport:
    """Result of a step over all ranks."""

    terms: LossTerms | None  # means over the step's images, still on the device; None where the loss was not finite
    backbone_norm: float | None  # of the gradient before clipping, if measured
    proxies_norm: float
    skipped: SkippedStep | None
    requests: tuple[bool, ...]  # for each request, whether any rank made it


def build_head(config: ProxiesConfig) -> Head:
    """Build the choices that a configuration makes."""
    margin = config.margin
    return Head(
        negatives=config.negatives,
        ratio=config.ratio,
        topk=config.topk,
        share=config.share,
        class_score=config.class_score,
        gamma=config.class_score_gamma,
        margin=None if margin is None else Margin(margin.name, margin.margin, margin.concentration),
        scale=config.scale,
        learn_scale=config.learn_scale,
    )


def build_loss(config: Config, context: ParallelContext) -> GlobalLoss:
    """Build the loss that a configuration names, its parameters the same on any number of ranks."""
    if config.loss is not None:
        arguments = config.loss.arguments(config.accumulation)
        sizes = (config.num_trained_classes, config.backbone.embedding_dim)
        name = arguments.pop("name")
        return PmlLoss(name, *sizes, **arguments, group=context.group, seed=config.seed).to(context.device)
    head = build_head(config.proxies)
    loss = ProxyLoss(
        config.num_trained_classes,
        config.backbone.embedding_dim,
        head,
        proxies_per_class=config.proxies.per_class,
        regularization_weight=config.proxies.regularization_weight,
        group=context.group,
        normalize=_needs_lengths(config),  # otherwise the backbone's embeddings are unit rows
        regularization_anchors=config.proxies.regularization_anchors,
        selection=config.proxies.selection,
        memory_budget=config.proxies.memory_budget_bytes,
        fused=config.proxies.fused,
        matmul_dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.proxies.matmul_dtype],
        matryoshka_dims=config.backbone.matryoshka_dims,
        sparse=wants_sparse_gradient(config),
        initialization="published" if config.proxies.initialization == "published" else "unit",
        seed=config.seed,
    ).to(context.device)
    if config.proxies.unit_norm:
        bring_to_unit_length_(loss.proxies)
    return loss


def build_train_state(
    config: Config, context: ParallelContext, *, steps_per_epoch: int, transfer: Transfer | None = None
) -> TrainState:
    """Build backbone, bank and optimizers at step 0, the same on any number of ranks; with `transfer` the backbone has
    its weights. Called on all ranks.

    The proxies are random: class means, which need the images, come from `training.start_from_class_means`. With
    proxies.unit_norm they are already normalised here, whatever their initialisation.
    """
    settings = run_together(context, engine_settings, config, context.world_size)
    torch.manual_seed(config.seed)

    def build_model() -> EmbeddingModel:
        model = build_backbone(config.backbone, load_pretrained=transfer is None, group=context.group)
        if transfer is not None:  # before the engine, which copies weights
            transfer.load_backbone_(model)
        if config.backbone.lora is not None:
            add_adapters_(model, config.backbone.lora)
        return model

    model = run_together(context, build_model).to(context.device)
    model.keeps_lengths = _needs_lengths(config)
    if config.training.compile:
        model.compile_trunk(config.micro_batch_size(context.world_size))
    loss = build_loss(config, context)
    groups = build_groups(config, model)
    engine = Engine(
        model,
        build_backbone_optimizer(config.optimizer, groups),
        settings=settings,
        context=context,
        outside=loss.parameters(),
    )
    decay = config.training.ema_decay
    average = None if decay is None else WeightAverage(engine, decay)
    num_steps = steps_per_epoch * config.training.epochs
    torch.manual_seed(config.seed + context.rank)  # dropout: a different mask per image
    return TrainState(
        context=context,
        config=config,
        engine=engine,
        groups=groups,
        loss=loss,
        bank_optimizer=(
            build_bank_optimizer(config.optimizer, [loss.proxies], loss.log_scale)
            if isinstance(loss, ProxyLoss)
            else build_bank_optimizer(config.optimizer, list(loss.parameters()))
        ),
        num_steps=min(num_steps, config.training.max_steps or num_steps),
        steps_per_epoch=steps_per_epoch,
        average=average,
    )


def train_step(
    state: TrainState, micro_batches: Sequence[Batch], *, measure: bool, requests: Sequence[bool] = ()
) -> StepReport:
    """Take an optimizer step over the global batch, of which `micro_batches` are this rank's part. Called on all ranks.

    Gradients: the loss of a micro-batch is the mean over its images of all ranks, weighted so that the average over
    micro-batches is the mean over the step's images. The engine divides the backbone's by their number itself; the
    bank's are divided here. A sparse gradient of the bank is coalesced first, since several micro-batches give a class
    several rows, whose norm is not that of their sum.

    Args:
        state: updated in place.
        micro_batches: as many as `config.accumulation`.
        measure: whether to measure the norm of the backbone's gradient.
        requests: this rank's requests to all ranks, sent along without an extra collective.
    """
    context, config = state.context, state.config
    fault_point("step.begin")
    trunk_rate, embedding_rate, proxies_rate = learning_rates(state)
    set_learning_rates(
        state.engine.optimizer, group_learning_rates(state.groups, trunk=trunk_rate, embedding=embedding_rate)
    )
    set_learning_rates(state.bank_optimizer, [proxies_rate] * len(state.bank_optimizer.param_groups))

    # 1. Forward and backward, micro-batch by micro-batch. The loss's draws are indexed by the step, not by history.
    state.loss.draw = state.step * config.accumulation
    sums: list[Tensor] | None = None
    detached_embeddings: list[Tensor] = []
    failure: str | None = None
    for number, batch in enumerate(micro_batches, start=1):
        embeddings = state.engine.embed(batch.images)
        detached_embeddings.append(embeddings.detach().requires_grad_())
        if fault_point("step.loss"):
            detached_embeddings[-1].detach().fill_(torch.nan)
        if failure is None:
            weight = batch.loss_weight(len(micro_batches))
            try:
                with exact_products():  # whatever training.float32_matmul says of the backbone
                    terms = state.loss(detached_embeddings[-1], batch.labels.to(context.device, non_blocking=True))
                    (terms.total * weight).backward()
                weighted = [term.detach() * (weight / len(micro_batches)) for term in terms]
                sums = weighted if sums is None else [total + part for total, part in zip(sums, weighted, strict=True)]
            except NonFiniteError as error:  # on all ranks
                failure = str(error)
        gradient = detached_embeddings[-1].grad
        is_last, bank = number == len(micro_batches), None
        if is_last and not state.engine.updates_plainly:  # its optimizer decides by what it is given: the bank first
            bank = _finish_bank_gradient(state, len(micro_batches), requests)
            failure = failure or bank.failure
        if gradient is None or failure is not None:  # the engine drops non-finite gradients, on all ranks
            gradient = torch.full_like(embeddings, torch.nan)
        state.engine.backward(embeddings, gradient)
        if is_last and bank is None:  # one read for both
            backbone_norm = state.engine.gradient_norm()
            bank = _finish_bank_gradient(state, len(micro_batches), requests, backbone_norm=backbone_norm)
            failure = failure or bank.failure
        logged_norm = state.engine.step(
            norm=None if bank is None else bank.backbone_norm, is_wanted=failure is None, measure_norm=measure
        )
    assert bank is not None

    # 2. The bank and the average of the weights step where the engine stepped.
    fault_point("step.update")
    if state.engine.step_was_applied():
        state.bank_optimizer.step()
        if state.average is not None:
            state.average.update(state.step)
        if config.proxies.unit_norm:
            bring_to_unit_length_(state.bank.proxies, classes_u=bank.kept_classes)
    elif failure is None and not state.engine.scales_loss:
        failure = "the gradient of the backbone is NaN or infinite"
    state.bank_optimizer.zero_grad()
    state.step += 1
    state.schedule_step += 1
    ends_epoch = state.schedule_step % state.steps_per_epoch == 0
    state.consumed = 0 if ends_epoch else state.consumed + micro_batches[0].step_size
    return StepReport(
        terms=None if sums is None or failure else LossTerms(*sums),
        backbone_norm=logged_norm,
        proxies_norm=bank.norm,
        skipped=SkippedStep(failure, _suspects(micro_batches, detached_embeddings)) if failure else None,
        requests=bank.requests,
    )


class _BankGradient(NamedTuple):
    """What is known of the gradients of a step, over all ranks, before either optimizer moves."""

    norm: float  # of the bank's, before clipping
    kept_classes: Tensor | None  # [u]; None: all
    requests: tuple[bool, ...]  # of any rank
    backbone_norm: float | None  # if it was given

    @property
    def failure(self) -> str | None:
        """Why the step cannot be taken, as far as the bank tells."""
        return None if math.isfinite(self.norm) else "the gradient of the proxies is NaN or infinite"


def _finish_bank_gradient(
    state: TrainState, accumulation: int, requests: Sequence[bool], *, backbone_norm: Tensor | None = None
) -> _BankGradient:
    """Prepare the gradient of the bank, or of another loss, for the optimizer: coalesce, average over micro-batches,
    clip. Norms and requests take one all-reduce and one read of the device, for which it waits once.
    """
    loss, kept_classes, copies = state.loss, None, 1
    values: list[Tensor] = []
    if isinstance(loss, PmlLoss):
        values, copies = loss.average_gradients_(), state.context.world_size
    elif (gradient := state.bank.proxies.grad) is not None and gradient.is_sparse:
        gradient = state.bank.proxies.grad = coalesced(gradient)
        kept_classes, values = gradient.indices()[0], [gradient.values()]  # the gradient's own memory
    elif gradient is not None:
        values = [gradient]
    for value in values:
        value /= accumulation
    scale = loss.log_scale
    if scale is not None and scale.grad is not None:  # the same on every rank, and no part of the norm
        scale.grad /= accumulation
    # Partitions are disjoint, so squares add up over ranks; copies are equal. NaN and infinity propagate.
    asked = torch.tensor([0.0, *map(float, requests)], dtype=torch.float64, device=loss.device)
    for value in values:
        asked[0] += squared_norm(value) / copies
    asked = all_reduce_sum(asked, group=state.context.group)
    if backbone_norm is not None:  # the same on every rank
        asked = torch.cat([asked, backbone_norm.double().reshape(1)])
    sums = asked.tolist()
    measured = sums.pop() if backbone_norm is not None else None
    norm = math.sqrt(sums[0])
    clip = state.config.optimizer.proxies_clip_norm
    if clip is not None:
        for value in values:
            clip_norm_(value, norm=torch.tensor(norm, dtype=torch.float64), max_norm=clip)
    return _BankGradient(norm, kept_classes, tuple(count > 0 for count in sums[1:]), measured)


def _needs_lengths(config: Config) -> bool:
    margin = build_head(config.proxies).margin
    return margin is not None and margin.needs_lengths


def _suspects(micro_batches: Sequence[Batch], detached_embeddings: Sequence[Tensor]) -> list[int]:
    found = []
    for batch, embeddings_bD in zip(micro_batches, detached_embeddings, strict=True):
        finite_b = embeddings_bD.detach().isfinite().all(dim=1)
        if embeddings_bD.grad is not None:
            finite_b &= embeddings_bD.grad.isfinite().all(dim=1)
        found += batch.ids[~finite_b.cpu()].tolist()
    return found


def learning_rates(state: TrainState) -> list[float]:
    """Return the learning rates of trunk, embedding layer and proxies at the state's step."""
    optimizer = state.config.optimizer
    factor = learning_rate_factor(
        state.config.schedule,
        step=state.schedule_step,
        steps_per_epoch=state.steps_per_epoch,
        num_steps=state.num_steps,
    )
    frozen = state.epoch + 1 in state.config.training.frozen_trunk_epochs
    embedding = optimizer.embedding_lr or optimizer.backbone_lr
    return [0.0 if frozen else factor * optimizer.backbone_lr, factor * embedding, factor * optimizer.proxies_lr]

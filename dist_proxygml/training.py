"""The training run: train() schedules, train_step() computes.

One step: embeddings through the engine -> loss over the partitioned bank -> gradients of the proxies (final, on their
rank) and of the embeddings (handed to the engine) -> both optimizers step. Everything that changes from step to step is
a function of the position in the epochs: learning rates, the order of the images, their augmentation. So a checkpoint
needs a position, not a history.
"""

import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dist_proxygml.backbone import RawPixels, build_backbone
from dist_proxygml.bank_optim import bring_to_unit_length_, coalesced, squared_norm
from dist_proxygml.checkpoint import (
    Retention,
    RunState,
    checkpoint_name,
    checkpoint_to_continue,
    load_checkpoint,
    save_checkpoint,
)
from dist_proxygml.collectives import AgreedError, all_reduce_sum
from dist_proxygml.config import Config
from dist_proxygml.data.damage import DAMAGE_FILE, Damage, DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import Batch, ImageCache, build_evaluation_loader
from dist_proxygml.data.shards import publish
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.engine import Engine, engine_settings
from dist_proxygml.evaluation.embed import save_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, check_settings, evaluate
from dist_proxygml.evaluation.report import format_table, write_report
from dist_proxygml.loss import LossTerms, ProxyGMLLoss
from dist_proxygml.memory import available_memory
from dist_proxygml.optim import (
    build_backbone_optimizer,
    build_bank_optimizer,
    clip_norm_,
    learning_rate_factor,
    set_learning_rates,
    wants_sparse_gradient,
)
from dist_proxygml.parallel import OneRankError, ParallelContext, everyone, on_main, run_together
from dist_proxygml.plan import HeadPlan, check_fits, plan_head
from dist_proxygml.proxies import replace_by_class_means_
from dist_proxygml.telemetry import Telemetry
from dist_proxygml.training_data import TrainingData, open_split, open_training_data

_NUM_LOGGED_IMAGES = 16


@dataclass
class TrainState:
    """What a training step reads and changes."""

    context: ParallelContext
    config: Config
    engine: Engine
    loss: ProxyGMLLoss
    bank_optimizer: torch.optim.Optimizer
    num_steps: int  # of the whole run, at this batch size
    steps_per_epoch: int
    step: int = 0  # optimizer steps done, at whatever batch sizes
    schedule_step: int = 0  # the same position counted in steps of this batch size: what schedules go by
    consumed: int = 0  # images of this epoch that are done

    @property
    def is_finished(self) -> bool:
        """Whether the run's last step is done; a run that was made shorter may be beyond it."""
        return self.schedule_step >= self.num_steps

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next step belongs to."""
        return self.schedule_step // self.steps_per_epoch


@dataclass(frozen=True)
class StepReport:
    """Sums over a step's micro-batches, still on the device, and the two gradient norms where they were measured."""

    terms: LossTerms
    backbone_norm: float | None
    proxies_norm: Tensor | None


def train(config: Config, context: ParallelContext, *, resume: str = "auto") -> Path:
    """Train, evaluate, checkpoint and report one run. Called on all ranks.

    Args:
        config: the run.
        context: this process among its peers.
        resume: "auto" continues the newest checkpoint of the run if there is one, "never" starts anew, a path continues
            that checkpoint. A new run moves an earlier one of its name aside.

    Returns:
        The run's folder.

    Raises:
        ValueError: on every rank: the configuration, the shards and the ranks do not fit together, or a batch is
            damaged.
    """
    # 1. Refuse what cannot work before anything is built.
    if config.proxies.fused and context.device.type != "cuda":
        raise AgreedError(
            f"expected an NVIDIA GPU with proxies.fused, got a device of type {context.device.type}; set it to false"
        )
    run_directory = config.run_directory
    checkpoints = run_directory / "checkpoints"
    plan = run_together(context, lambda: plan_head(config, world_size=context.world_size, device=context.device.type))
    _check_memory(config, plan, context)
    data, test_index = run_together(context, _open_data, config)
    _check_same_data(data, test_index, context)
    found, passed_over = on_main(context, checkpoint_to_continue, checkpoints, resume)
    run_together(context, lambda: data.loader(context, epoch=0, start=0))

    # 2. Build, and only then write.
    state = build_train_state(config, context, steps_per_epoch=data.count_steps())
    comparable = _comparable_settings(config) | data.identity()
    if found:
        run = load_checkpoint(
            found,
            engine=state.engine,
            loss=state.loss,
            bank_optimizer=state.bank_optimizer,
            context=context,
            settings=comparable,
        )
        continue_at(state, run, data)
        # Here, not in the middle of things: another batch size or number of ranks may not divide the rest.
        run_together(context, lambda: data.loader(context, epoch=state.epoch, start=state.consumed))
    moved = on_main(context, _prepare_run_directory, config, found is not None)
    telemetry = Telemetry(
        run_directory,
        enabled=context.is_main,
        num_steps=state.step + state.num_steps - state.schedule_step,
        start_step=state.step,
        progress_bar=config.telemetry.progress_bar,
    )
    for damaged in passed_over:
        telemetry.say(damaged)
    telemetry.say(_greeting(state, data, test_index, found, moved))
    telemetry.say(str(plan))

    # What is known to be damaged belongs to the run, not to this start of it.
    path, split = run_directory / DAMAGE_FILE, config.data.train_split
    damage = build_damage_log(config, context, path, split=split, num_images=data.epoch_size)
    test_damage = build_damage_log(
        config, context, path, split=config.data.test_split, num_images=test_index.num_samples
    )
    if found is None and config.proxies.initialization == "class_mean":
        assert data.index is not None
        start_from_class_means(state, data.index, telemetry, damage)

    # 3. Train. An evaluation that was due when the run stopped is made up for.
    if state.step == 0 and config.evaluation.raw_pixels:
        _evaluate_raw_pixels(config, context, test_index, run_directory, test_damage)
    cache = ImageCache() if config.data.cache_images else None
    while True:
        if _evaluation_is_due(state) and not on_main(context, _evaluation_path(run_directory, state).exists):
            evaluate_run(state, test_index, telemetry, run_directory, test_damage)
        if state.is_finished:
            break
        _train_epoch(state, data, telemetry, checkpoints, settings=comparable, cache=cache, damage=damage)

    # 4. Show.
    telemetry.close()
    on_main(context, _show, run_directory, test_index)
    return run_directory


def build_train_state(config: Config, context: ParallelContext, *, steps_per_epoch: int) -> TrainState:
    """Backbone, bank and optimizers at step 0, the same on any number of ranks. Called on all ranks.

    The proxies are random: class means, which need the images, come from `start_from_class_means`. With
    proxies.unit_norm they are brought to length 1 here already, whatever their initialisation.
    """
    settings = run_together(context, engine_settings, config, context.world_size)
    torch.manual_seed(config.seed)
    model = run_together(context, lambda: build_backbone(config.backbone, group=context.group)).to(context.device)
    loss = ProxyGMLLoss(
        config.data.num_classes,
        config.backbone.embedding_dim,
        proxies_per_class=config.proxies.per_class,
        ratio=config.proxies.ratio,
        topk=config.proxies.topk,
        regularization_weight=config.proxies.regularization_weight,
        scale=config.proxies.scale,
        group=context.group,
        regularization_anchors=config.proxies.regularization_anchors,
        selection=config.proxies.selection,
        memory_budget=config.proxies.memory_budget_bytes,
        fused=config.proxies.fused,
        matmul_dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.proxies.matmul_dtype],
        sparse=wants_sparse_gradient(config),
        initialization="published" if config.proxies.initialization == "published" else "unit",
        seed=config.seed,
    ).to(context.device)
    trunk, embedding = model.parameter_groups()
    engine = Engine(
        model,
        build_backbone_optimizer(config.optimizer, trunk=trunk, embedding=embedding),
        settings=settings,
        context=context,
        outside=loss.parameters(),
    )
    if config.proxies.unit_norm:
        bring_to_unit_length_(loss.proxies)
    num_steps = steps_per_epoch * config.training.epochs
    torch.manual_seed(config.seed + context.rank)  # dropout: other images, other masks
    return TrainState(
        context=context,
        config=config,
        engine=engine,
        loss=loss,
        bank_optimizer=build_bank_optimizer(config.optimizer, loss.proxies),
        num_steps=min(num_steps, config.training.max_steps or num_steps),
        steps_per_epoch=steps_per_epoch,
    )


def continue_at(state: TrainState, run: RunState, data: TrainingData) -> None:
    """Put the state where a checkpointed run stopped, whatever its batch size was."""
    num_left = data.count_steps(run.consumed)
    state.step, state.consumed = run.step, run.consumed if num_left else 0
    state.schedule_step = (run.epoch + 1) * state.steps_per_epoch - num_left


def start_from_class_means(
    state: TrainState, index: ShardIndex, telemetry: Telemetry, damage: DamageLog | None = None
) -> None:
    """Set each class's proxies to the mean embedding of its images under the state's backbone. Called on all ranks.

    One pass over the split with the test transform, in evaluation mode; see `replace_by_class_means_`. Damaged images
    are left out and counted in `damage` where it is given.

    Raises:
        ValueError: on every rank: an image is damaged, or too many are, or an embedding is not finite.
    """
    config, context = state.config, state.context
    telemetry.say(
        f"class means: {index.num_samples:,} images of {index.num_classes:,} classes through the initial backbone"
    )
    loader = build_evaluation_loader(
        index,
        build_transform(config.data.test_transform),
        batch_size=config.evaluation.batch_size,
        rank=context.rank,
        world_size=context.world_size,
        num_workers=config.data.num_workers,
        pin_memory=context.device.type == "cuda",
        skip_damaged=damage is not None,
    )
    model = _backbone_of_one_rank(state)
    left_out: list[Damage] = []

    def embedded(batch: Batch) -> tuple[Tensor, Tensor]:
        left_out.extend(batch.damaged)
        if len(batch.ids) == 0:
            return torch.zeros(0, config.backbone.embedding_dim, device=context.device), batch.labels.to(context.device)
        return _embedded(model, batch, context.device)

    was_training = model.training
    model.eval()
    # Rank 0's share of the batches: a file gets a line every 15 seconds, a terminal a moving bar.
    with tqdm(
        loader,
        desc="class means",
        unit="batch",
        disable=not (context.is_main and config.telemetry.progress_bar),
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    ) as batches:
        replace_by_class_means_(
            state.loss.proxies.detach(),
            (embedded(batch) for batch in batches),
            num_batches=len(loader),
            partition=state.loss.partition,
            context=context,
        )
    model.train(was_training)
    if damage is not None:
        damage.add(left_out)


def train_step(state: TrainState, micro_batches: Sequence[Batch], *, measure: bool) -> StepReport:
    """One optimizer step over the global batch that `micro_batches` are this rank's part of. Called on all ranks.

    Gradients: the loss of a micro-batch is the mean over its images of all ranks, weighted so that the average over
    micro-batches is the mean over the step's images. The engine divides the backbone's by their number itself; the
    bank's are divided here. A sparse gradient of the bank is brought to one row a class first, since several
    micro-batches give a class several, whose norm is not that of their sum.
    """
    context, config = state.context, state.config
    learning_rates = _learning_rates(state)
    set_learning_rates(state.engine.optimizer, learning_rates[:2])
    set_learning_rates(state.bank_optimizer, learning_rates[2:])

    # 1. Forward and backward, micro-batch by micro-batch. What the loss draws is numbered by the step, not by history.
    state.loss.draw = state.step * config.accumulation
    sums: list[Tensor] | None = None
    for batch in micro_batches:
        weight = batch.loss_weight(len(micro_batches))
        embeddings = state.engine.embed(batch.images)
        handed_over = embeddings.detach().requires_grad_()
        terms = state.loss(handed_over, batch.labels.to(context.device, non_blocking=True))
        (terms.total * weight).backward()
        assert handed_over.grad is not None
        state.engine.backward(embeddings, handed_over.grad)
        backbone_norm = state.engine.step(measure_norm=measure)
        weighted = [term.detach() * (weight / len(micro_batches)) for term in terms]
        sums = weighted if sums is None else [total + part for total, part in zip(sums, weighted, strict=True)]
    assert sums is not None

    # 2. The bank steps where the engine stepped.
    gradient = state.loss.proxies.grad
    assert gradient is not None
    kept_classes = None
    if gradient.is_sparse:
        state.loss.proxies.grad = gradient = coalesced(gradient)
        kept_classes = gradient.indices()[0]
    values = gradient if kept_classes is None else gradient.values()  # the gradient's own memory
    values /= len(micro_batches)
    proxies_norm = None
    clip = config.optimizer.proxies_clip_norm
    if measure or clip is not None:  # partitions are disjoint: squares add up over ranks
        proxies_norm = all_reduce_sum(squared_norm(values), group=context.group).sqrt()
    if clip is not None and proxies_norm is not None:
        clip_norm_(values, norm=proxies_norm, max_norm=clip)
    if state.engine.step_was_applied():
        state.bank_optimizer.step()
        if config.proxies.unit_norm:
            bring_to_unit_length_(state.loss.proxies, classes_u=kept_classes)
    state.bank_optimizer.zero_grad()
    state.step += 1
    state.schedule_step += 1
    ends_epoch = state.schedule_step % state.steps_per_epoch == 0
    state.consumed = 0 if ends_epoch else state.consumed + micro_batches[0].step_size
    return StepReport(LossTerms(*sums), backbone_norm, proxies_norm)


def evaluate_run(
    state: TrainState, index: ShardIndex, telemetry: Telemetry, run_directory: Path, damage: DamageLog | None
) -> EvaluationResult:
    """Evaluate the state's backbone; log and store the result. Called on all ranks."""
    config, context = state.config, state.context
    result = evaluate_model(config, context, _backbone_of_one_rank(state), index, damage=damage)
    if result.num_damaged:
        telemetry.say(f"{result.num_damaged} damaged images were left out, see {run_directory / DAMAGE_FILE}")
    epoch, name = state.epoch, checkpoint_name(state.step)
    on_main(context, lambda: store_evaluation(run_directory, name, result, with_embeddings=True))
    telemetry.log_evaluation(state.step, epoch, result.metrics)
    numbers = ", ".join(f"{key} {100 * value:.2f}" for key, value in result.metrics.items() if not key.endswith("_sd"))
    telemetry.say(f"epoch {epoch}, step {state.step}: {numbers}")
    return result


def build_evaluation_model(config: Config) -> nn.Module:
    """A backbone without an engine, for weights to be loaded into; the random generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_backbone(config.backbone, load_pretrained=False)


def evaluate_model(
    config: Config,
    context: ParallelContext,
    model: nn.Module,
    index: ShardIndex,
    *,
    damage: DamageLog | None,
    kmeans_seeds: int | None = None,
) -> EvaluationResult:
    """Evaluate a backbone on a split as the configuration says, `kmeans_seeds` excepted. Called on all ranks."""
    return evaluate(
        model,
        index,
        build_transform(config.data.test_transform),
        context=context,
        recall_at=config.evaluation.recall_at,
        batch_size=config.evaluation.batch_size,
        num_workers=config.data.num_workers,
        kmeans_seeds=config.evaluation.kmeans_seeds if kmeans_seeds is None else kmeans_seeds,
        preprocessing=config.data.test_transform.model_dump(),
        damage=damage,
    )


def store_evaluation(run_directory: Path, name: str, result: EvaluationResult, *, with_embeddings: bool) -> Path:
    """Write evaluation/NAME.json, and embeddings/NAME.npz in place of earlier embeddings. On rank 0 only."""
    path = run_directory / "evaluation" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as stream:  # a file here means: evaluated
        stream.write(result.to_json().encode("utf-8"))
    if with_embeddings and result.table is not None:
        newest = save_table(result.table, run_directory / "embeddings" / f"{name}.npz")
        for old in set(newest.parent.glob("*.npz")) - {newest}:
            old.unlink()
    return path


def _backbone_of_one_rank(state: TrainState) -> nn.Module:
    """The state's backbone, with forward passes that need no other rank. Called on all ranks.

    Those of ZeRO 3 are collective, and ranks that embed a split hold different numbers of batches.
    """
    if state.engine.zero_stage < 3:
        return state.engine.module
    model = build_evaluation_model(state.config)
    model.load_state_dict(state.engine.full_state_dict(), assign=True)
    return model.to(state.context.device)


@torch.no_grad()
def _embedded(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings, float32 [b, D] unit rows, and labels [b] of a batch, on the device."""
    embeddings_bD = model(batch.images.to(device, non_blocking=True))
    return F.normalize(embeddings_bD.float(), dim=1), batch.labels.to(device, non_blocking=True)


def _train_epoch(
    state: TrainState,
    data: TrainingData,
    telemetry: Telemetry,
    checkpoints: Path,
    *,
    settings: dict[str, Any],
    cache: ImageCache | None,
    damage: DamageLog | None,
) -> None:
    """Train to the end of the epoch, or of the run."""
    config, context = state.config, state.context
    epoch = state.epoch
    loader = data.loader(context, epoch=epoch, start=state.consumed, cache=cache)
    state.engine.module.train()
    telemetry.pause()
    batches = iter(loader)
    while state.schedule_step < min((epoch + 1) * state.steps_per_epoch, state.num_steps):
        micro_batches = _next_step(batches, config.accumulation, context)
        if damage is not None:
            for new in damage.add([damaged for batch in micro_batches for damaged in batch.damaged]):
                telemetry.say(f"damaged, replaced by another image: {new.image}: {new.reason}")
        if state.step == 0:
            telemetry.log_images("train/images", micro_batches[0].images[:_NUM_LOGGED_IMAGES], 0)
        measure = (state.step + 1) % config.telemetry.log_every_steps == 0
        learning_rates = _learning_rates(state)
        report = train_step(state, micro_batches, measure=measure)
        telemetry.count(micro_batches[0].step_size)
        if measure:
            telemetry.log_training(
                state.step,
                epoch + 1,
                {
                    "loss": report.terms.total.item(),
                    "classification": report.terms.classification.item(),
                    "regularization": report.terms.regularization.item(),
                    "kept_classes": report.terms.kept_classes.item(),
                    "lr_backbone": learning_rates[0],
                    "lr_embedding": learning_rates[1],
                    "lr_proxies": learning_rates[2],
                    "gradient_norm_backbone": report.backbone_norm,
                    "gradient_norm_proxies": None if report.proxies_norm is None else report.proxies_norm.item(),
                    "damaged_images": None if damage is None else len(damage),
                },
            )
        every_steps = config.checkpoint.every_steps
        is_due = state.step % every_steps == 0 if every_steps else state.consumed == 0
        if is_due or state.is_finished:
            saved = save_checkpoint(
                checkpoints,
                state=RunState(state.step, state.epoch, state.consumed, context.world_size, settings),
                engine=state.engine,
                loss=state.loss,
                bank_optimizer=state.bank_optimizer,
                context=context,
                retention=Retention(
                    config.checkpoint.keep_last, config.checkpoint.keep_every, config.checkpoint.keep_best
                ),
            )
            for problem in saved.problems:
                telemetry.say(problem)
            telemetry.pause()


def _next_step(batches: Iterator[Batch], accumulation: int, context: ParallelContext) -> list[Batch]:
    try:
        return list(itertools.islice(batches, accumulation))
    except ValueError as error:
        raise OneRankError(f"{error} (on rank {context.rank})") from None


def _learning_rates(state: TrainState) -> list[float]:
    """Learning rates of trunk, embedding layer and proxies at the state's step."""
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


def _check_memory(config: Config, plan: HeadPlan, context: ParallelContext) -> None:
    """Refuse a head that does not fit into what is left on this rank's device; ranks share the memory of a host."""
    hosts = everyone(context, socket.gethostname())
    num_sharing = hosts.count(socket.gethostname()) if context.device.type == "cpu" else 1
    memory = available_memory(context.device) // num_sharing
    run_together(context, lambda: check_fits(config, plan, memory=memory, device=context.device.type))


def _open_data(config: Config) -> tuple[TrainingData, ShardIndex]:
    """What to train and what to evaluate on."""
    data = open_training_data(config)
    test_index = open_split(config, config.data.test_split)
    check_settings(test_index.labels, Settings(recall_at=tuple(config.evaluation.recall_at)))
    return data, test_index


def _check_same_data(data: TrainingData, test_index: ShardIndex, context: ParallelContext) -> None:
    """Refuse ranks that see other shards under the same name: their batches would not belong together."""
    seen = everyone(context, {**data.identity(), "test shards": test_index.sha256})
    other = next((rank for rank, identity in enumerate(seen) if identity != seen[0]), None)
    if other is not None:
        raise AgreedError(
            f"ranks 0 and {other} found different shards at {test_index.location}; copy the folder to every node "
            "again, or wait until whoever replaces it is done"
        )


def build_damage_log(
    config: Config, context: ParallelContext, path: Path, *, split: str, num_images: int
) -> DamageLog | None:
    """Where damaged images are counted if the configuration skips them, else None. Called on all ranks."""
    if config.data.damaged_images == "fail":
        return None
    return DamageLog(path, split=split, num_images=num_images, max_share=config.data.max_damaged, context=context)


def _prepare_run_directory(config: Config, continues: bool) -> Path | None:
    """Make the run's folder and write the resolved configuration. What a new run finds there is moved aside, not lost.

    Returns:
        Where the earlier run went, if there was one.
    """
    directory, aside = config.run_directory, None
    try:
        if not continues and directory.exists():
            names = (directory.with_name(f"{directory.name}.{number}") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            os.rename(directory, aside)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config.model_dump(), indent=2) + "\n")
    except OSError as error:
        raise ValueError(
            f"expected to write into {directory.resolve()}: {error.strerror}; set runs_dir to a folder of yours"
        ) from None
    return aside


def _evaluation_path(run_directory: Path, state: TrainState) -> Path:
    return run_directory / "evaluation" / f"{checkpoint_name(state.step)}.json"


def _evaluation_is_due(state: TrainState) -> bool:
    """Before the first step if wanted, after the last always, and between epochs every so many."""
    evaluation = state.config.evaluation
    if state.is_finished:
        return True
    if state.schedule_step == 0:
        return evaluation.at_start
    epoch, rest = divmod(state.schedule_step, state.steps_per_epoch)
    return rest == 0 and evaluation.every_epochs > 0 and epoch % evaluation.every_epochs == 0


def _comparable_settings(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on, flat: a run continues only under the same."""
    whole = config.model_dump(mode="json", exclude={"name", "runs_dir", "evaluation", "checkpoint", "telemetry"})
    free = {"data.shards", "data.test_split", "data.num_workers", "data.cache_images", "deepspeed.steps_per_print"}
    free |= {"data.damaged_images", "data.max_damaged", "data.cache_directory", "data.cache_limit"}
    free |= {"proxies.selection", "proxies.fused"}  # the same numbers by other ways
    if config.data.images_per_class is None:  # the position in the data is a number of images
        free |= {"training.batch_size", "deepspeed.gradient_accumulation_steps", "deepspeed.train_batch_size"}
    if config.proxies.regularization_weight == 0 or config.proxies.regularization_anchors is not None:
        free.add("proxies.memory_budget")  # else it decides what the regulariser is computed from
    if config.schedule.name != "cosine":  # the other schedules do not look ahead: such a run may be made longer
        free |= {"training.epochs", "training.max_steps"}
    return {name: value for name, value in _flattened(whole) if name not in free}


def _flattened(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _greeting(
    state: TrainState,
    data: TrainingData,
    test_index: ShardIndex,
    found: Path | None,
    moved: Path | None,
) -> str:
    config, context = state.config, state.context
    start = "starting anew"
    if found:
        start = f"continuing {found} in epoch {state.epoch + 1} after {state.consumed:,} of its images"
    if moved:
        start += f", the earlier run of this name is now {moved}"
    return (
        f"{config.name}: {data} to train on, "
        f"{test_index.num_samples:,} of {test_index.num_classes:,} unseen classes to evaluate on; "
        f"{context.world_size} rank(s) on {context.device.type}; {start}"
    )


def _evaluate_raw_pixels(
    config: Config, context: ParallelContext, index: ShardIndex, run_directory: Path, damage: DamageLog | None
) -> None:
    pixels = RawPixels().to(context.device)
    num_seeds = min(1, config.evaluation.kmeans_seeds)
    result = evaluate_model(config, context, pixels, index, damage=damage, kmeans_seeds=num_seeds)
    on_main(context, lambda: store_evaluation(run_directory, "pixels", result, with_embeddings=False))


def _show(run_directory: Path, index: ShardIndex) -> None:
    report = write_report(run_directory, index)
    print(format_table(run_directory), flush=True)
    print(f"report: {report.resolve()}", flush=True)

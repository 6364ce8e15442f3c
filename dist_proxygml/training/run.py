"""The training run: what is built before the first step, and the loop.

Everything that changes from step to step is a function of the position in the epochs: learning rates, the order of the
images, their augmentation. So a checkpoint needs a position, not a history. A run ends when it is done, when it is told
to stop (distributed/preemption.py), when it cannot go on (nonfinite.py), or when a step does not end
(distributed/watchdog.py); in all cases but the first it goes on from its newest checkpoint when it is started again.
"""

import itertools
import json
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dist_proxygml.backbones.build import RawPixels, build_backbone
from dist_proxygml.checkpoint.model import write_class_table
from dist_proxygml.checkpoint.writer import (
    CheckpointWriter,
    Continuation,
    Retention,
    RunState,
    SavedCheckpoint,
    checkpoint_to_continue,
    evaluation_name,
    find_checkpoint,
    load_checkpoint,
)
from dist_proxygml.config import Config, flattened
from dist_proxygml.data.damage import DAMAGE_FIELDS, DAMAGE_FILE, Damage, DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import Batch, ImageCache, build_evaluation_loader
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.memory import available_memory
from dist_proxygml.distributed.parallel import (
    OneRankError,
    ParallelContext,
    everyone,
    has_started,
    on_main,
    on_main_for_long,
    run_long,
    run_together,
)
from dist_proxygml.distributed.preemption import StopRequested, StopSignals
from dist_proxygml.distributed.watchdog import Watchdog
from dist_proxygml.evaluation.blocks import BlockFolder
from dist_proxygml.evaluation.embedding_pass import save_table
from dist_proxygml.evaluation.evaluator import EvaluationResult, Settings, check_split, evaluate
from dist_proxygml.evaluation.retrieval import SearchOptions
from dist_proxygml.head.proxies import replace_by_class_means_
from dist_proxygml.plan import HeadPlan, check_fits, plan_head
from dist_proxygml.reporting.page import format_table, write_report
from dist_proxygml.reporting.telemetry import BOARD_FOLDER, METRICS_FILE, Telemetry
from dist_proxygml.storage.files import (
    in_words,
    is_folder,
    mend_log,
    mode_of,
    paths_in,
    publish,
    read_document,
    unreadable,
)
from dist_proxygml.storage.lock import RunLock
from dist_proxygml.training.board import Board
from dist_proxygml.training.data import TrainingData, count_classes, open_split, open_training_data
from dist_proxygml.training.nonfinite import NON_FINITE_FIELDS, NON_FINITE_FILE, NonFiniteLog
from dist_proxygml.training.step import StepReport, TrainState, build_train_state, learning_rates, train_step
from dist_proxygml.training.transfer import Transfer, match_classes, open_transfer

_NUM_LOGGED_IMAGES = 16


def train(
    config: Config, context: ParallelContext, *, resume: str = "auto", signals: StopSignals | None = None
) -> Path:
    """Train, evaluate, checkpoint and report one run. Called on all ranks.

    Args:
        config: the run.
        context: this process among its peers.
        resume: "auto" continues the newest checkpoint of the run if there is one, "never" starts anew, a path continues
            that checkpoint. A new run moves an earlier one of its name aside.
        signals: requests to stop that this process receives; None listens to none.

    Returns:
        The run's folder.

    Raises:
        ValueError: on every rank: the configuration, the shards and the ranks do not fit together, or a batch is
            damaged. NonFiniteError: steps come out as NaN, and going back has not helped.
        StopRequested: on every rank: a rank was told to stop; what was trained is saved.
    """
    signals = signals or StopSignals()
    config = run_long(context, count_classes, config)
    # 1. Refuse what cannot work before anything is built.
    if config.proxies.fused and context.device.type != "cuda":
        raise AgreedError(
            f"expected an NVIDIA GPU with proxies.fused, got a device of type {context.device.type}; set it to false"
        )
    run_directory = config.run_directory
    checkpoints = run_directory / "checkpoints"
    plan = run_together(context, lambda: plan_head(config, world_size=context.world_size, device=context.device.type))
    _check_memory(config, plan, context)
    data, test_index = run_long(context, _open_data, config)
    _check_same_data(data, test_index, context)
    locks: list[RunLock] = []
    run_together(context, _lock, context, run_directory, locks)
    found, passed_over = on_main_for_long(context, _where_to_continue, run_directory, resume)
    run_together(context, lambda: data.loader(context, epoch=0, start=0))
    transfer = None if found else open_transfer(config, data.index, context)

    # 2. Build, and only then write.
    state = build_train_state(config, context, steps_per_epoch=data.count_steps(), transfer=transfer)
    has_started()
    comparable = _comparable_settings(config) | data.identity()
    if found:
        position = _load(found, state, comparable)
        run_together(context, continue_at, state, position, data)
        # Here, not in the middle of things: another batch size or number of ranks may not divide the rest.
        run_together(context, lambda: data.loader(context, epoch=state.epoch, start=state.consumed))
    run_together(context, lambda: _lock(context, run_directory, locks, make_folder=True))
    moved, odd = on_main(context, _prepare_run_directory, config, data.index, state.step if found else None)
    telemetry = run_together(
        context,
        lambda: Telemetry(
            run_directory,
            enabled=context.is_main,
            num_steps=state.step + state.num_steps - state.schedule_step,
            start_step=state.step,
            progress_bar=config.telemetry.progress_bar,
        ),
    )
    for oddity in [*passed_over, *odd, *telemetry.problems]:
        telemetry.say(oddity)
    telemetry.say(_greeting(state, data, test_index, found, moved, transfer))
    telemetry.say(str(plan))

    # What is known to be damaged belongs to the run, not to this start of it.
    path, split = run_directory / DAMAGE_FILE, config.data.train_split
    damage = build_damage_log(config, context, path, split=split, num_images=data.epoch_size)
    evaluated = [
        EvaluatedSplit(
            index,
            build_damage_log(config, context, path, split=name, num_images=index.num_samples),
            is_validation=index is data.validation,
        )
        for index, name in _splits_to_evaluate(data, test_index)
    ]
    are_all_known = transfer is not None and transfer.num_new == 0
    if found is None and config.proxies.initialization == "class_mean" and not are_all_known:
        assert data.index is not None
        start_from_class_means(state, data.index, telemetry, damage)
    if transfer is not None:
        told = on_main(context, _trained_before, transfer, data)
        if told:
            telemetry.say(told)
        transfer.load_proxies_(state.loss.proxies.detach(), context, unit_norm=config.proxies.unit_norm)

    # 3. Train.
    settings = dict(flattened(config.model_dump(mode="json")))
    gallery = _open_gallery(config, test_index)
    board = Board(state, telemetry, settings=settings, test_index=test_index, gallery=gallery)
    keep = Retention(
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
        config.checkpoint.keep_best,
        by_validation=data.validation is not None,
    )
    loop = _Loop(
        state=state,
        data=data,
        evaluated=evaluated,
        settings=comparable,
        telemetry=telemetry,
        board=board,
        writer=CheckpointWriter(checkpoints, context, keep, asynchronous=config.checkpoint.asynchronous),
        signals=signals,
        watchdog=Watchdog(config.training.step_timeout, report=run_directory / f"hang-rank-{context.rank:03d}.txt"),
        left_out=NonFiniteLog(
            run_directory / NON_FINITE_FILE,
            max_in_row=config.training.max_left_out,
            max_rollbacks=config.training.max_rollbacks,
            context=context,
        ),
        damage=damage,
        cache=ImageCache() if config.data.cache_images else None,
        saved_step=state.step if found else None,
    )
    loop.run()

    # 4. Show.
    telemetry.close()
    on_main(context, board.show_projection)
    on_main(context, _show, run_directory, test_index)
    locks.clear()
    return run_directory


@dataclass(frozen=True)
class EvaluatedSplit:
    """Images that are not trained, to evaluate on."""

    index: ShardIndex
    damage: DamageLog | None  # counts its damaged images; None: there may be none
    is_validation: bool  # of classes that are held out, to choose by; else the test split


@dataclass
class _Loop:
    """One start of a run, from where its state is to its end. Every method is called on all ranks."""

    state: TrainState
    data: TrainingData
    evaluated: list[EvaluatedSplit]
    """The test split last."""
    settings: dict[str, Any]
    telemetry: Telemetry
    board: Board
    writer: CheckpointWriter
    signals: StopSignals
    watchdog: Watchdog
    left_out: NonFiniteLog
    damage: DamageLog | None
    cache: ImageCache | None
    saved_step: int | None
    """Of the newest checkpoint, which may still be being written."""

    @property
    def context(self) -> ParallelContext:
        return self.state.context

    @property
    def config(self) -> Config:
        return self.state.config

    @property
    def run_directory(self) -> Path:
        return self.config.run_directory

    def run(self) -> None:
        """Train and evaluate to the end of the run. An evaluation that was due when the run stopped is made up for."""
        try:
            if self.state.step == 0 and self.config.evaluation.raw_pixels:
                self._evaluate_raw_pixels()
            while True:
                due = self._evaluations_due()
                if due:
                    self.board.show_proxies()
                for split in due:
                    result = evaluate_run(self.state, split, self.telemetry, self.run_directory, signals=self.signals)
                    if not split.is_validation:
                        self.board.show_evaluation(result)
                if self.state.is_finished:
                    break
                self._train_epoch()
            self._tell(self.writer.close())
        except StopRequested as request:
            self.watchdog.stop()
            if self.state.step > 0 and self.saved_step != self.state.step:
                self._save()
            self._tell(self.writer.close())
            what = f"saved after step {self.state.step}" if self.state.step else "nothing to save before the first step"
            self.telemetry.say(f"stopped by {request}: {what}; start the run again to go on")
            self.telemetry.close()
            raise

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or of the run."""
        state, config, context = self.state, self.config, self.context
        epoch = state.epoch
        loader = self.data.loader(context, epoch=epoch, start=state.consumed, cache=self.cache)
        state.engine.module.train()
        self.telemetry.pause()
        batches = iter(loader)
        while state.schedule_step < min((epoch + 1) * state.steps_per_epoch, state.num_steps):
            self.watchdog.beat()
            micro_batches = _next_step(batches, config.accumulation, context)
            self._count_damaged(micro_batches)
            if state.step == 0:
                self.telemetry.log_images("train/images", micro_batches[0].images[:_NUM_LOGGED_IMAGES], 0)
            measure = (state.step + 1) % config.telemetry.log_every_steps == 0
            self.board.begin_step(is_logged=measure)
            rates = learning_rates(state)
            # A rank that was told to stop, or whose checkpoint could not be written in the background, asks for all.
            wishes = [self.signals.received is not None, self.writer.has_failed]
            report = train_step(state, micro_batches, measure=measure, requests=wishes)
            self.telemetry.count(micro_batches[0].step_size)
            if report.left_out:
                self._leave_out(report)
            else:
                self.left_out.num_in_row = 0
                if measure:
                    self._log(report, rates, epoch)
                    self.board.show_step()
            every_steps = config.checkpoint.every_steps
            is_due = state.step % every_steps == 0 if every_steps else state.consumed == 0
            if config.checkpoint.keep_best is not None:  # the best evaluation needs a checkpoint of its step
                is_due = is_due or self._is_evaluation_due()
            if is_due or state.is_finished:
                with self.watchdog.paused():
                    self._save()
            is_stop, is_failure = report.requests
            self._tell(self.writer.wait() if is_failure else self.writer.poll())
            if is_stop:
                self.signals.agree(context)
        self.watchdog.stop()

    def _log(self, report: StepReport, rates: list[float], epoch: int) -> None:
        assert report.terms is not None
        self.telemetry.log_training(
            self.state.step,
            epoch + 1,
            {
                "loss": report.terms.total.item(),
                "classification": report.terms.classification.item(),
                "regularization": report.terms.regularization.item(),
                "kept_classes": report.terms.kept_classes.item(),
                "lr_backbone": rates[0],
                "lr_embedding": rates[1],
                "lr_proxies": rates[2],
                "gradient_norm_backbone": report.backbone_norm,
                "gradient_norm_proxies": report.proxies_norm,
                "damaged_images": None if self.damage is None else len(self.damage),
            },
        )

    def _count_damaged(self, micro_batches: list[Batch]) -> None:
        if self.damage is not None:
            for new in self.damage.add([damaged for batch in micro_batches for damaged in batch.damaged]):
                self.telemetry.say(f"damaged, replaced by another image: {new.image}: {new.reason}")

    def _leave_out(self, report: StepReport) -> None:
        """Tell that a step changed nothing; go back if that happens again and again."""
        assert report.left_out is not None
        state, index = self.state, self.data.index
        images = [str(i) if index is None else index.describe(i) for i in report.left_out.suspects]
        self.telemetry.say(self.left_out.add(state.step, report.left_out.reason, images))
        is_spoiled = any(everyone(self.context, not state.engine.has_finite_buffers()))
        if not self.left_out.is_full and not is_spoiled:
            return
        with self.watchdog.paused():
            self._tell(self.writer.wait())
            checkpoint = on_main(self.context, find_checkpoint, self.run_directory / "checkpoints", "auto")
            told = self.left_out.roll_back(state.step, checkpoint)
            assert checkpoint is not None
            _load(checkpoint, state, self.settings)
        self.telemetry.say(told)

    def _save(self) -> None:
        state = self.state
        saved = self.writer.save(
            state=RunState(state.step, state.epoch, state.consumed, self.context.world_size, self.settings),
            engine=state.engine,
            loss=state.loss,
            bank_optimizer=state.bank_optimizer,
        )
        self.saved_step = state.step
        self._tell(saved)
        self.telemetry.pause()

    def _tell(self, saved: list[SavedCheckpoint]) -> None:
        for problem in (problem for checkpoint in saved for problem in checkpoint.problems):
            self.telemetry.say(problem)

    def _is_evaluation_due(self) -> bool:
        """Before the first step if wanted, after the last always, and between epochs every so many. No collective."""
        state, evaluation = self.state, self.config.evaluation
        epoch, rest = divmod(state.schedule_step, state.steps_per_epoch)
        if state.is_finished:
            return True
        if state.schedule_step == 0:
            return evaluation.at_start
        return rest == 0 and evaluation.every_epochs > 0 and epoch % evaluation.every_epochs == 0

    def _evaluations_due(self) -> list[EvaluatedSplit]:
        """What is to be evaluated now; nothing twice."""
        state = self.state
        if not self._is_evaluation_due():
            return []
        folder = self.run_directory / "evaluation"
        names = [evaluation_name(state.step, of_validation=split.is_validation) for split in self.evaluated]
        are_stored = on_main(self.context, lambda: [mode_of(folder / f"{name}.json") is not None for name in names])
        return [split for split, is_stored in zip(self.evaluated, are_stored, strict=True) if not is_stored]

    def _evaluate_raw_pixels(self) -> None:
        test_split = self.evaluated[-1]
        blocks = block_folder(self.run_directory, "pixels", say=self.telemetry.say)
        result = evaluate_model(
            self.config,
            self.context,
            RawPixels().to(self.context.device),
            test_split.index,
            damage=test_split.damage,
            kmeans_seeds=min(1, self.config.evaluation.kmeans_seeds),
            signals=self.signals,
            blocks=blocks,
        )
        on_main(self.context, lambda: store_evaluation(self.run_directory, "pixels", result, with_embeddings=False))
        blocks.remove(self.context)


def _lock(context: ParallelContext, run_directory: Path, locks: list[RunLock], *, make_folder: bool = False) -> None:
    """Put the run's lock into `locks` on rank 0, if it is not there; without `make_folder` only beside other runs."""
    if context.is_main and not locks and (make_folder or is_folder(run_directory.parent)):
        locks.append(RunLock(run_directory))


def _load(checkpoint: Path, state: TrainState, settings: dict[str, Any]) -> RunState:
    """Put the checkpoint's numbers into the state; its position is returned, not taken."""
    return load_checkpoint(
        checkpoint,
        engine=state.engine,
        loss=state.loss,
        bank_optimizer=state.bank_optimizer,
        context=state.context,
        settings=settings,
    )


def continue_at(state: TrainState, run: RunState, data: TrainingData) -> None:
    """Put the state where a checkpointed run stopped, whatever its batch size was.

    Raises:
        ValueError: it says that more images were done than an epoch has.
    """
    if run.consumed > data.epoch_size:
        raise ValueError(
            f"expected a checkpoint within an epoch of {data.epoch_size:,} images, it stands after {run.consumed:,}; "
            "take another one with --resume PATH"
        )
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


def evaluate_run(
    state: TrainState,
    split: EvaluatedSplit,
    telemetry: Telemetry,
    run_directory: Path,
    *,
    signals: StopSignals | None = None,
) -> EvaluationResult:
    """Evaluate the state's backbone on a split; log and store the result. Called on all ranks.

    Raises:
        ValueError, StopRequested: as `evaluate`.
    """
    config, context = state.config, state.context
    name = evaluation_name(state.step, of_validation=split.is_validation)
    blocks = block_folder(run_directory, name, say=telemetry.say)
    result = evaluate_model(
        config,
        context,
        _backbone_of_one_rank(state),
        split.index,
        damage=split.damage,
        signals=signals,
        blocks=blocks,
        say=telemetry.say,
    )
    if result.num_damaged:
        telemetry.say(f"{result.num_damaged} damaged images were left out, see {run_directory / DAMAGE_FILE}")
    # Logged before it is stored: a run that is killed in between does it again, and what is stored is in the log.
    kind = "validation" if split.is_validation else "evaluation"
    telemetry.log_evaluation(state.step, state.epoch, result.metrics, kind=kind)
    # Only the embeddings of the test split are looked at later.
    on_main(context, lambda: store_evaluation(run_directory, name, result, with_embeddings=not split.is_validation))
    blocks.remove(context)
    numbers = ", ".join(f"{key} {100 * value:.2f}" for key, value in result.metrics.items() if not key.endswith("_sd"))
    of_what = "validation classes: " if split.is_validation else ""
    telemetry.say(f"epoch {state.epoch}, step {state.step}: {of_what}{numbers}")
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
    signals: StopSignals | None = None,
    blocks: BlockFolder | None = None,
    verify: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> EvaluationResult:
    """Evaluate a backbone on a split as the configuration says, `kmeans_seeds` excepted. Called on all ranks.

    The protocol and the gallery are those of the test split; another split is searched in itself. With `verify` ranks
    are found in two ways, which must agree. `say` takes lines for people; give it on one rank.
    """
    wanted, is_test = config.evaluation, index.split == config.data.test_split
    gallery = run_together(context, _open_gallery, config, index)
    gallery_damage = None
    if gallery is not None and damage is not None:
        gallery_damage = build_damage_log(
            config, context, damage.path, split=gallery.split, num_images=gallery.num_samples
        )
    return evaluate(
        model,
        index,
        build_transform(config.data.test_transform),
        context=context,
        gallery=gallery,
        recall_at=wanted.recall_at,
        batch_size=wanted.batch_size,
        num_workers=config.data.num_workers,
        kmeans_seeds=wanted.kmeans_seeds if kmeans_seeds is None else kmeans_seeds,
        protocol=wanted.protocol if is_test else "custom",
        legacy_proxygml=wanted.legacy_proxygml and is_test,
        options=SearchOptions(wanted.search, wanted.gallery, wanted.memory_budget_bytes, verify),
        preprocessing=config.data.test_transform.model_dump(),
        damage=damage,
        gallery_damage=gallery_damage,
        signals=signals,
        blocks=blocks,
        say=say,
    )


def _open_gallery(config: Config, index: ShardIndex) -> ShardIndex | None:
    """The split that this one is searched in, if it is not itself."""
    split = config.evaluation.gallery_split
    return None if split is None or index.split != config.data.test_split else index.open_sibling(split)


def block_folder(run_directory: Path, name: str, *, say: Callable[[str], object]) -> BlockFolder:
    """Where the evaluation that will be stored as NAME keeps what it has embedded."""
    return BlockFolder(run_directory / "embeddings" / f"{name}.partial", say)


def store_evaluation(run_directory: Path, name: str, result: EvaluationResult, *, with_embeddings: bool) -> Path:
    """Write embeddings/NAME.npz in place of earlier embeddings, and last evaluation/NAME.json: where that is, nobody
    evaluates again. On rank 0 only.
    """
    if with_embeddings and result.table is not None:
        newest = save_table(result.table, run_directory / "embeddings" / f"{name}.npz")
        for old in set(paths_in(newest.parent, "*.npz")) - {newest}:
            old.unlink()
    path = run_directory / "evaluation" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as stream:
        stream.write(result.to_json().encode("utf-8"))
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


def _next_step(batches: Iterator[Batch], accumulation: int, context: ParallelContext) -> list[Batch]:
    try:
        return list(itertools.islice(batches, accumulation))
    except ValueError as error:
        raise OneRankError(f"{error} (on rank {context.rank})") from None


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
    for index, name in _splits_to_evaluate(data, test_index):
        is_test = index is test_index
        settings = Settings(
            tuple(config.evaluation.recall_at), protocol=config.evaluation.protocol if is_test else "custom"
        )
        try:
            check_split(index, _open_gallery(config, index), settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return data, test_index


def _splits_to_evaluate(data: TrainingData, test_index: ShardIndex) -> list[tuple[ShardIndex, str]]:
    """Indices and names; the test split last."""
    return [(index, index.split) for index in (data.validation, test_index) if index is not None]


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


def _where_to_continue(run_directory: Path, resume: str) -> Continuation:
    """As `checkpoint_to_continue`, if the run's folder can be gone on with.

    Raises:
        ValueError: something in it is not what it has to be, or closed to this user; nothing was changed.
    """
    folders = ("", "checkpoints", "evaluation", "embeddings", "proxies", BOARD_FOLDER)
    logs = (METRICS_FILE, DAMAGE_FILE, NON_FINITE_FILE)
    for name in (*folders, *logs) if resume != "never" else ():
        path, kind = run_directory / name, "a file" if name in logs else "a folder"
        mode = mode_of(path)
        if mode is None:
            continue
        if not (stat.S_ISREG(mode) if name in logs else stat.S_ISDIR(mode)):
            raise ValueError(f"expected {kind} at {path}, found something else; move it away")
        if not os.access(path, os.R_OK | os.W_OK | (0 if name in logs else os.X_OK), effective_ids=True):
            raise ValueError(
                f"expected to read and write {path}, which this user (id {os.geteuid()}) may not; give it to "
                "this user, or train under another name with --set name=NAME"
            )
    return checkpoint_to_continue(run_directory / "checkpoints", resume)


def _prepare_run_directory(config: Config, index: ShardIndex | None, step: int | None) -> tuple[Path | None, list[str]]:
    """Make the run's folder, write the resolved configuration and the class table. What a new run finds there is moved
    aside, not lost.

    Args:
        config: the run.
        index: what it trains on; None for a stream.
        step: where the run continues; evaluations and proxy statistics of later steps, which a checkpoint was lost of,
            are removed: their steps will be done again. None starts anew.

    Returns:
        Where the earlier run went, if there was one; what was odd and is set aside, for people.
    """
    directory, aside = config.run_directory, None
    odd: list[str] = []
    try:
        if step is None and os.path.lexists(directory):
            names = (directory.with_name(f"{directory.name}.{number}") for number in itertools.count(1))
            aside = next(path for path in names if not os.path.lexists(path))
            os.rename(directory, aside)
        directory.mkdir(parents=True, exist_ok=True)
        written = [path for kind in ("evaluation", "proxies") for path in paths_in(directory / kind, "*.json")]
        for path in written:
            if (_step_evaluated(path) or 0) > (step or 0):
                path.unlink()
            elif path.name != "pixels.json" and _step_evaluated(path) is None:
                continue  # somebody's own
            elif problem := _what_is_odd(path):
                os.replace(path, path.with_name(f"{path.name}.damaged"))
                odd.append(f"{problem}: passed over, now {path.name}.damaged")
        for name, fields in ((DAMAGE_FILE, DAMAGE_FIELDS), (NON_FINITE_FILE, NON_FINITE_FIELDS)):
            odd += mend_log(directory / name, fields)
        _keep_unfinished_embeddings(directory, aside, step)
        with publish(directory / "config.json") as stream:
            stream.write(json.dumps(config.model_dump(), indent=2).encode() + b"\n")
        write_class_table(directory, index)
    except OSError as error:
        raise ValueError(
            f"expected to write into {directory.resolve()}: {in_words(error, directory.parent)}; set runs_dir to a "
            "folder of yours"
        ) from None
    return aside, odd


def _what_is_odd(path: Path) -> str | None:
    """What is wrong with a stored evaluation, or statistics of proxies.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        document = read_document(path)
        if path.parent.name == "evaluation":
            EvaluationResult.from_json(json.dumps(document))
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        return str(error) if str(path) in str(error) else f"{path}: {error}"
    return None


def _step_evaluated(path: Path) -> int | None:
    """The step of an evaluation's file or folder: step-000800-on-shards-test, validation-step-000800."""
    found = re.search(r"step-([0-9]+)", path.name)
    return None if found is None else int(found[1])


def _keep_unfinished_embeddings(directory: Path, aside: Path | None, step: int | None) -> None:
    """Carry over what a run that was cut short before its first checkpoint had embedded; remove what belongs to
    evaluations that are stored, or that lie before the step where the run continues.
    """
    if step is None and aside is not None:
        for folder in paths_in(aside / "embeddings", "*.partial"):
            if folder.name.startswith(("pixels.", "step-000000.", "validation-step-000000.")):
                (directory / "embeddings").mkdir(exist_ok=True)
                os.rename(folder, directory / "embeddings" / folder.name)
    for pattern in ("step-*.partial", "validation-step-*.partial"):
        for folder in paths_in(directory / "embeddings", pattern):
            is_stored = mode_of(directory / "evaluation" / f"{folder.stem}.json") is not None
            if is_folder(folder) and (is_stored or (_step_evaluated(folder) or 0) < (step or 0)):
                shutil.rmtree(folder, ignore_errors=True)


def _trained_before(transfer: Transfer, data: TrainingData) -> str | None:
    """What to say if the model that a run starts from has been trained on its validation classes."""
    if data.validation is None or not transfer.model.has_class_names:
        return None
    try:
        num_known = int((match_classes(data.validation.classes, transfer.model.classes()) >= 0).sum())
    except ValueError as error:
        return f"not known whether the validation classes have been trained before: {error}"
    if num_known == 0:
        return None
    return (
        f"{num_known:,} of the {data.validation.num_classes:,} validation classes have been trained by "
        f"{transfer.model.path}: their numbers flatter"
    )


def _comparable_settings(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on, flat: a run continues only under the same."""
    whole = config.model_dump(mode="json", exclude={"name", "runs_dir", "evaluation", "checkpoint", "telemetry"})
    free = {"data.shards", "data.test_split", "data.num_workers", "data.cache_images", "deepspeed.steps_per_print"}
    free |= {"data.damaged_images", "data.max_damaged", "data.cache_directory", "data.cache_limit"}
    free |= {"training.max_left_out", "training.max_rollbacks", "training.start_timeout", "training.step_timeout"}
    free |= {"proxies.selection", "proxies.fused"}  # the same numbers by other ways
    if config.data.images_per_class is None:  # the position in the data is a number of images
        free |= {"training.batch_size", "deepspeed.gradient_accumulation_steps", "deepspeed.train_batch_size"}
    if config.proxies.regularization_weight == 0 or config.proxies.regularization_anchors is not None:
        free.add("proxies.memory_budget")  # else it decides what the regulariser is computed from
    if config.schedule.name != "cosine":  # the other schedules do not look ahead: such a run may be made longer
        free |= {"training.epochs", "training.max_steps"}
    return {name: value for name, value in flattened(whole) if name not in free}


def _greeting(
    state: TrainState,
    data: TrainingData,
    test_index: ShardIndex,
    found: Path | None,
    moved: Path | None,
    transfer: Transfer | None,
) -> str:
    config, context, validation = state.config, state.context, data.validation
    start = "starting anew" if transfer is None else f"starting {transfer}"
    if found:
        start = f"continuing {found} in epoch {state.epoch + 1} after {state.consumed:,} of its images"
    if moved:
        start += f", the earlier run of this name is now {moved}"
    return (
        f"{config.name}: {data} to train on, "
        f"{test_index.num_samples:,} of {test_index.num_classes:,} unseen classes to evaluate on"
        f"{'' if validation is None else f', {validation.num_samples:,} of the validation classes to choose by'}; "
        f"{context.world_size} rank(s) on {context.device.type}; {start}"
    )


def _show(run_directory: Path, index: ShardIndex) -> None:
    report = write_report(run_directory, index)
    print(format_table(run_directory), flush=True)
    print(f"report: {report.resolve()}", flush=True)

"""The training loop, from the state's position to the end of the run, with saves, evaluations and skipped steps.

Everything that changes from step to step is a function of the position in the epochs: learning rates, the order of the
images, their augmentation. A checkpoint therefore needs a position, not a history.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_proxygml.backbones.build import RawPixels
from dist_proxygml.checkpoint.folder import RunState, SavedCheckpoint, find_checkpoint
from dist_proxygml.checkpoint.writer import CheckpointWriter, load_checkpoint
from dist_proxygml.config import Config
from dist_proxygml.data.damage import DamageLog
from dist_proxygml.data.pipeline import Batch, ImageCache
from dist_proxygml.distributed.parallel import (
    OneRankError,
    ParallelContext,
    all_gather_object,
    run_on_rank_zero,
    run_on_rank_zero_for_long,
    run_together,
)
from dist_proxygml.distributed.preemption import StopRequested, StopSignals
from dist_proxygml.distributed.watchdog import Watchdog
from dist_proxygml.evaluation.embedding_pass import PassHooks
from dist_proxygml.evaluation.run import (
    block_folder,
    evaluate_model,
    store_evaluation,
)
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.storage.files import (
    mode_of,
)
from dist_proxygml.storage.run_folder import RunFolder, step_name
from dist_proxygml.training.board import Board
from dist_proxygml.training.data import TrainingData
from dist_proxygml.training.evaluate import EvaluatedSplit, evaluate_run
from dist_proxygml.training.nonfinite import NonFiniteLog
from dist_proxygml.training.step import StepReport, TrainState, learning_rates, train_step

_NUM_LOGGED_IMAGES = 16


@dataclass
class Loop:
    """One start of a run, from its state's position to its end. Every method is called on all ranks."""

    state: TrainState
    data: TrainingData
    evaluated: list[EvaluatedSplit]
    """The test split last; none if nothing is evaluated."""
    settings: dict[str, Any]
    telemetry: Telemetry
    board: Board
    writer: CheckpointWriter
    signals: StopSignals
    watchdog: Watchdog
    skipped_steps: NonFiniteLog
    damage: DamageLog | None
    cache: ImageCache | None
    saved_step: int | None
    """Of the newest checkpoint, which may still be in progress."""

    @property
    def context(self) -> ParallelContext:
        """This process among its peers."""
        return self.state.context

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.state.config

    @property
    def run_directory(self) -> Path:
        """The run's folder."""
        return self.config.run_directory

    def run(self) -> None:
        """Train and evaluate to the end of the run. An evaluation that was due when the run stopped is done first."""
        try:
            if self.state.step == 0 and self.config.evaluation.raw_pixels and self.config.data.test_split is not None:
                with self.telemetry.phase("evaluation"):
                    self._evaluate_raw_pixels()
            while True:
                due = self._evaluations_due()
                if due or (not self.evaluated and self._is_evaluation_due()):
                    self.board.show_proxies()
                with self.telemetry.phase("evaluation"):
                    for split in due:
                        result = evaluate_run(
                            self.state, split, self.telemetry, self.run_directory, signals=self.signals
                        )
                        if not split.is_validation:
                            self.board.show_evaluation(result)
                self.telemetry.log_phases(self.state.step)
                if self.state.is_finished:
                    if due or not self.evaluated:  # else an earlier start has ended it
                        self.telemetry.log_end(self.state.step)
                    break
                self._train_epoch()
            self._report_saved(self.writer.close())
        except StopRequested as request:
            self.watchdog.stop()
            if self.state.step > 0 and self.saved_step != self.state.step:
                self._save()
            self._report_saved(self.writer.close())
            what = f"saved after step {self.state.step}" if self.state.step else "nothing to save before the first step"
            self.telemetry.say(f"stopped by {request}: {what}; start the run again to resume")
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
            with self.telemetry.phase("data"):
                micro_batches = _next_step(self.data, batches, context)
            self._count_damaged(micro_batches)
            if state.step == 0:
                self.telemetry.log_images("train/images", micro_batches[0].images[:_NUM_LOGGED_IMAGES], 0)
            measure = (state.step + 1) % config.telemetry.log_every_steps == 0
            self.board.begin_step(is_logged=measure)
            rates = learning_rates(state)
            # A rank that received a stop signal, or whose background save failed, makes the request for all.
            wishes = [self.signals.received is not None, self.writer.has_failed]
            report = train_step(state, micro_batches, measure=measure, requests=wishes)
            self.telemetry.count(micro_batches[0].step_size)
            if report.skipped:
                self._skip(report)
            else:
                self.skipped_steps.num_in_row = 0
                if measure:
                    self._log(report, rates, epoch)
                    self.board.show_step()
            every_steps = config.checkpoint.every_steps
            is_due = state.step % every_steps == 0 if every_steps else state.consumed == 0
            if config.checkpoint.keep_best is not None and self.evaluated:
                is_due = is_due or self._is_evaluation_due()  # the best evaluation needs a checkpoint of its step
            if is_due or state.is_finished:
                with self.watchdog.paused():
                    self._save()
            is_stop, is_failure = report.requests
            self._report_saved(self.writer.wait() if is_failure else self.writer.poll())
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
                "scale": None if self.state.loss.log_scale is None else self.state.bank.scale,
                "gradient_norm_backbone": report.backbone_norm,
                "gradient_norm_proxies": report.proxies_norm,
                "searches_given_up": self.state.bank.searches.given_up if self.state.config.proxies.fused else None,
                "damaged_images": None if self.damage is None else len(self.damage),
            },
        )

    def _count_damaged(self, micro_batches: list[Batch]) -> None:
        if self.damage is not None:
            for new in self.damage.add([damaged for batch in micro_batches for damaged in batch.damaged]):
                self.telemetry.say(f"damaged, replaced by another image: {new.image}: {new.reason}")

    def _skip(self, report: StepReport) -> None:
        """Report a skipped step; roll back if there are too many."""
        assert report.skipped is not None
        state, index = self.state, self.data.index
        images = [str(i) if index is None else index.describe(i) for i in report.skipped.suspects]
        self.telemetry.say(self.skipped_steps.add(state.step, report.skipped.reason, images))
        is_spoiled = any(all_gather_object(self.context, not state.engine.has_finite_buffers()))
        if not self.skipped_steps.is_full and not is_spoiled:
            return
        with self.watchdog.paused():
            self._report_saved(self.writer.wait())
            checkpoint = run_on_rank_zero_for_long(
                self.context, find_checkpoint, RunFolder(self.run_directory).checkpoints, "auto"
            )
            message = self.skipped_steps.roll_back(state.step, checkpoint)
            assert checkpoint is not None
            load_state(checkpoint, state, self.settings)
        self.telemetry.say(message)

    def _save(self) -> None:
        state = self.state
        with self.telemetry.phase("checkpoint"):
            saved = self.writer.save(
                state=RunState(state.step, state.epoch, state.consumed, self.context.world_size, self.settings),
                engine=state.engine,
                loss=state.loss,
                bank_optimizer=state.bank_optimizer,
                average=state.average,
            )
        self.saved_step = state.step
        self._report_saved(saved)
        self.telemetry.pause()

    def _report_saved(self, saved: list[SavedCheckpoint]) -> None:
        for problem in (problem for checkpoint in saved for problem in checkpoint.problems):
            self.telemetry.say(problem)

    def _is_evaluation_due(self) -> bool:
        """Before the first step if configured, after the last, and every few epochs in between. No collective."""
        state, evaluation = self.state, self.config.evaluation
        epoch, rest = divmod(state.schedule_step, state.steps_per_epoch)
        if state.is_finished:
            return True
        if state.schedule_step == 0:
            return evaluation.at_start
        return rest == 0 and evaluation.every_epochs > 0 and epoch % evaluation.every_epochs == 0

    def _evaluations_due(self) -> list[EvaluatedSplit]:
        """Return the splits to evaluate now; none twice."""
        state = self.state
        if not self._is_evaluation_due():
            return []
        folder = RunFolder(self.run_directory)
        names = [step_name(state.step, of_validation=split.is_validation) for split in self.evaluated]
        are_stored = run_on_rank_zero(
            self.context, lambda: [mode_of(folder.evaluation(name)) is not None for name in names]
        )
        return [split for split, is_stored in zip(self.evaluated, are_stored, strict=True) if not is_stored]

    def _evaluate_raw_pixels(self) -> None:
        test_split = self.evaluated[-1]
        blocks = block_folder(self.run_directory, "pixels", say=self.telemetry.say)
        result = evaluate_model(
            self.config,
            self.context,
            RawPixels().to(self.context.device),
            test_split,
            is_baseline=True,
            hooks=PassHooks(self.signals, blocks, follower=self.telemetry.follow),
        )
        run_on_rank_zero(
            self.context, lambda: store_evaluation(self.run_directory, "pixels", result, with_embeddings=False)
        )
        blocks.remove(self.context)


def load_state(checkpoint: Path, state: TrainState, settings: dict[str, Any]) -> RunState:
    """Load the checkpoint's numbers into the state; return its position without applying it."""
    return load_checkpoint(
        checkpoint,
        engine=state.engine,
        loss=state.loss,
        bank_optimizer=state.bank_optimizer,
        context=state.context,
        settings=settings,
        average=state.average,
    )


def continue_at(state: TrainState, run: RunState, data: TrainingData) -> None:
    """Set the state to the position where a checkpointed run stopped, whatever its batch size was.

    Raises:
        ValueError: the position lies beyond the end of an epoch.
    """
    if run.consumed > data.epoch_size:
        raise ValueError(
            f"expected a checkpoint within an epoch of {data.epoch_size:,} images, got one after {run.consumed:,}; "
            "take another one with --resume PATH"
        )
    num_left = data.count_steps(run.consumed)
    state.step, state.consumed = run.step, run.consumed if num_left else 0
    state.schedule_step = (run.epoch + 1) * state.steps_per_epoch - num_left


def _next_step(data: TrainingData, batches: Iterator[Batch], context: ParallelContext) -> list[Batch]:
    """Read the micro-batches of a step. Where each rank reads its own shards, as in a stream, an error in them is
    raised on every rank.
    """

    def read() -> list[Batch]:
        micro_batches = list(itertools.islice(batches, data.config.accumulation))
        found, expected = len(micro_batches), data.config.accumulation
        assert found == expected, f"expected {expected} micro-batches of a step, got {found}: the loader ended too soon"
        return micro_batches

    if data.index is None:
        return run_together(context, read)
    try:
        return read()
    except ValueError as error:
        raise OneRankError(f"{error} (on rank {context.rank})") from None

"""The training run: checks, construction, the loop, the report.

Everything that changes from step to step is a function of the position in the epochs: learning rates, the order of the
images, their augmentation. A checkpoint therefore needs a position, not a history. A run ends when it is done, when it
receives a request to stop (distributed/preemption.py), when it cannot continue (nonfinite.py), or when a step hangs
(distributed/watchdog.py); in all cases but the first it resumes from its newest checkpoint when started again.
"""

import socket
from pathlib import Path

import torch

from dist_proxygml.checkpoint.folder import Retention
from dist_proxygml.checkpoint.writer import CheckpointWriter
from dist_proxygml.config import Config, flattened
from dist_proxygml.data.damage import DAMAGE_FILE
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ImageCache
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.gpus import set_arithmetic
from dist_proxygml.distributed.memory import available_memory
from dist_proxygml.distributed.parallel import (
    ParallelContext,
    all_gather_object,
    has_started,
    run_long,
    run_on_rank_zero,
    run_on_rank_zero_for_long,
    run_together,
)
from dist_proxygml.distributed.preemption import StopSignals
from dist_proxygml.distributed.watchdog import Watchdog
from dist_proxygml.evaluation.run import build_damage_log, open_gallery
from dist_proxygml.reporting.page import format_table, write_report
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.reporting.trackers import Trackers
from dist_proxygml.storage.lock import FolderLock
from dist_proxygml.storage.run_folder import RunFolder
from dist_proxygml.training.board import Board
from dist_proxygml.training.checks import check_run
from dist_proxygml.training.class_means import start_from_class_means
from dist_proxygml.training.data import TrainingData
from dist_proxygml.training.evaluate import EvaluatedSplit
from dist_proxygml.training.head_plan import HeadPlan, check_fits
from dist_proxygml.training.loop import Loop, continue_at, load_state
from dist_proxygml.training.nonfinite import NON_FINITE_FILE, NonFiniteLog
from dist_proxygml.training.prepare import comparable_settings, find_continuation, lock_run, prepare_run_directory
from dist_proxygml.training.step import TrainState, build_train_state
from dist_proxygml.training.transfer import Transfer, match_classes, open_transfer


def train(
    config: Config, context: ParallelContext, *, resume: str = "auto", signals: StopSignals | None = None
) -> Path:
    """Train, evaluate, checkpoint and report one run. Called on all ranks.

    Args:
        config: the run.
        context: this process among its peers.
        resume: "auto" resumes from the newest checkpoint of the run if there is one, "never" starts anew, a path
            resumes from that checkpoint. A new run moves an earlier one of its name aside.
        signals: requests to stop that this process receives; None ignores them.

    Returns:
        The run's folder.

    Raises:
        ValueError: on every rank, if configuration, shards and ranks do not fit together, or a batch is damaged.
        NonFiniteError: on every rank, if steps are NaN or infinite and rollbacks have not helped.
        StopRequested: on every rank, if a rank was asked to stop; progress is saved.
    """
    signals = signals or StopSignals()
    set_arithmetic(config.training, context.device)
    # 1. Refuse what cannot work before anything is built.
    config, plan, _, data, test_index = run_long(
        context,
        lambda: check_run(config, world_size=context.world_size, device=context.device.type, is_start=True),
    )
    assert data is not None
    run_directory = config.run_directory
    checkpoints = RunFolder(run_directory).checkpoints
    _check_memory(config, plan, context)
    _check_same_data(data, test_index, context)
    locks: list[FolderLock] = []
    run_together(context, lock_run, context, run_directory, locks)
    found, passed_over = run_on_rank_zero_for_long(context, find_continuation, run_directory, resume)
    run_together(context, data.check, context)
    transfer = None if found else open_transfer(config, data.index, context)

    # 2. Build, then write.
    state = build_train_state(config, context, steps_per_epoch=data.count_steps(), transfer=transfer)
    has_started()
    comparable = comparable_settings(config) | data.identity()
    if found:
        position = load_state(found, state, comparable)
        run_together(context, continue_at, state, position, data)
        # Checked early: another batch size or number of ranks may not divide the rest.
        run_together(context, lambda: data.loader(context, epoch=state.epoch, start=state.consumed))
    run_together(context, lambda: lock_run(context, run_directory, locks, make_folder=True))
    moved, odd = run_on_rank_zero(context, prepare_run_directory, config, data.index, state.step if found else None)
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
    settings = dict(flattened(config.model_dump(mode="json")))
    if context.is_main and config.telemetry.trackers:
        telemetry.trackers = Trackers(
            config.telemetry.trackers,
            run_directory,
            project=config.telemetry.tracker_project,
            settings=settings,
            say=telemetry.say,
        )
    for oddity in [*passed_over, *odd, *telemetry.problems]:
        telemetry.say(oddity)
    telemetry.say(_greeting(state, data, test_index, found, moved, transfer))
    telemetry.say(str(plan))

    telemetry.describe_run(
        {
            "ranks": context.world_size,
            "device": _device_name(context),
            "parameters": state.engine.num_parameters,
            "trained_parameters": state.engine.num_trained_parameters,
            "proxies": 0 if config.loss else config.num_trained_classes * config.proxies.per_class,
            "head": state.loss.described,
        }
    )

    # Known damage belongs to the run, not to this start of it.
    path, split = run_directory / DAMAGE_FILE, config.data.train_split
    damage = build_damage_log(config, context, path, split=split, num_images=data.epoch_size)
    evaluated = [
        EvaluatedSplit(
            index,
            build_damage_log(config, context, path, split=index.split, num_images=index.num_samples),
            data.seen_classes(index),
            data.trained_images(index),
            is_validation=index is data.validation,
        )
        for index in (data.validation, test_index)  # the test split last
        if index is not None
    ]
    are_all_known = transfer is not None and transfer.num_new == 0
    if found is None and config.proxies.initialization == "class_mean" and not are_all_known:
        assert data.index is not None
        start_from_class_means(state, data.index, telemetry, damage)
    if transfer is not None:
        warnings = [run_on_rank_zero(context, _trained_before, transfer, data), transfer.other_network(config.backbone)]
        for warning in filter(None, warnings):
            telemetry.say(warning)
        if config.loss is None:
            transfer.load_proxies_(state.bank.proxies.detach(), context, unit_norm=config.proxies.unit_norm)

    # 3. Train.
    gallery = None if test_index is None else open_gallery(config, test_index)
    board = Board(state, telemetry, settings=settings, test_index=test_index, gallery=gallery)
    keep = Retention(
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
        config.checkpoint.keep_best,
        by_validation=data.validation is not None,
    )
    loop = Loop(
        state=state,
        data=data,
        evaluated=evaluated,
        settings=comparable,
        telemetry=telemetry,
        board=board,
        writer=CheckpointWriter(checkpoints, context, keep, asynchronous=config.checkpoint.asynchronous),
        signals=signals,
        watchdog=Watchdog(config.training.step_timeout, report=run_directory / f"hang-rank-{context.rank:03d}.txt"),
        skipped_steps=NonFiniteLog(
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

    # 4. Report.
    telemetry.close()
    run_on_rank_zero(context, board.show_projection)
    run_on_rank_zero(context, _show, run_directory, test_index)
    locks.clear()
    return run_directory


def _check_memory(config: Config, plan: HeadPlan, context: ParallelContext) -> None:
    """Refuse a head that does not fit the available memory of this rank's device; ranks share a host's memory."""
    hosts = all_gather_object(context, socket.gethostname())
    num_sharing = hosts.count(socket.gethostname()) if context.device.type == "cpu" else 1
    memory = available_memory(context.device) // num_sharing
    run_together(context, lambda: check_fits(config, plan, memory=memory, device=context.device.type))


def _check_same_data(data: TrainingData, test_index: ShardIndex | None, context: ParallelContext) -> None:
    """Refuse ranks that see different shards under the same name: their batches would be inconsistent."""
    seen = all_gather_object(context, {**data.identity(), "test shards": test_index and test_index.sha256})
    other = next((rank for rank, identity in enumerate(seen) if identity != seen[0]), None)
    if other is not None:
        raise AgreedError(
            f"ranks 0 and {other} found different shards at {data.config.data.shards}; copy the folder to every node "
            "again, or wait until it has been replaced"
        )


def _trained_before(transfer: Transfer, data: TrainingData) -> str | None:
    """Return a warning if the model that a run starts from has been trained on its validation classes."""
    if data.validation is None or not transfer.model.has_class_names:
        return None
    try:
        num_known = int((match_classes(data.validation.classes, transfer.model.classes()) >= 0).sum())
    except ValueError as error:
        return f"cannot check whether the validation classes have been trained before: {error}"
    if num_known == 0:
        return None
    return (
        f"{num_known:,} of the {data.validation.num_classes:,} validation classes have been trained by "
        f"{transfer.model.path}: their metrics are optimistic"
    )


def _greeting(
    state: TrainState,
    data: TrainingData,
    test_index: ShardIndex | None,
    found: Path | None,
    moved: Path | None,
    transfer: Transfer | None,
) -> str:
    config, context, validation = state.config, state.context, data.validation
    start = "starting anew" if transfer is None else f"starting {transfer}"
    if found:
        start = f"resuming {found} in epoch {state.epoch + 1} after {state.consumed:,} of its images"
    if moved:
        start += f", the earlier run of this name is now {moved}"
    tested = "no test split"
    if test_index is not None:
        seen_C = data.seen_classes(test_index)  # numbers for names do not tell
        num_seen, num_all = 0 if seen_C is None else int(seen_C.sum()), test_index.num_classes
        kind = "" if seen_C is None else "seen " if num_seen == num_all else "" if num_seen else "unseen "
        some = f" ({num_seen:,} of them seen)" if 0 < num_seen < num_all else ""
        tested = f"{test_index.num_samples:,} of {num_all:,} {kind}classes{some} to evaluate on"
    return (
        f"{config.name}: {data} to train on, {tested}"
        f"{'' if validation is None else f', {validation.num_samples:,} of the validation classes to choose by'}; "
        f"{context.world_size} rank(s) on {context.device.type}; {start}"
    )


def _device_name(context: ParallelContext) -> str:
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} {'thread' if num_threads == 1 else 'threads'} a rank"


def _show(run_directory: Path, index: ShardIndex | None) -> None:
    report = write_report(run_directory, index)
    print(format_table(run_directory), flush=True)
    print(f"report: {report.resolve()}", flush=True)

"""Prepare the folder of a run before its first step: lock, the checkpoint to resume from, files of an earlier start."""

import itertools
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from dist_proxygml.checkpoint.folder import Continuation, checkpoint_to_continue
from dist_proxygml.checkpoint.model import write_class_table
from dist_proxygml.config import Config, flattened, without_neutral_keys
from dist_proxygml.data.damage import DAMAGE_FIELDS, DAMAGE_FILE
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.distributed.parallel import (
    ParallelContext,
)
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.storage.files import (
    describe_error,
    is_folder,
    mend_log,
    mode_of,
    paths_in,
    publish_text,
    read_document,
    unreadable,
)
from dist_proxygml.storage.lock import FolderLock
from dist_proxygml.storage.run_folder import RunFolder, by_step, step_in, step_name
from dist_proxygml.training.nonfinite import NON_FINITE_FIELDS, NON_FINITE_FILE


def lock_run(
    context: ParallelContext, run_directory: Path, locks: list[FolderLock], *, make_folder: bool = False
) -> None:
    """Append the run's lock to `locks` on rank 0, if missing; without `make_folder` only if the runs folder exists."""
    if context.is_main and not locks and (make_folder or is_folder(run_directory.parent)):
        locks.append(FolderLock(run_directory))


def find_continuation(run_directory: Path, resume: str) -> Continuation:
    """Check the run's folder, then find where to resume as `checkpoint_to_continue` does.

    Raises:
        ValueError: something in it has the wrong type or denies access to this user; nothing was changed.
    """
    folders = ("", "checkpoints", "evaluation", "embeddings", "proxies", RunFolder(run_directory).board.name)
    logs = (RunFolder(run_directory).metrics.name, DAMAGE_FILE, NON_FINITE_FILE)
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
    return checkpoint_to_continue(RunFolder(run_directory).checkpoints, resume)


def prepare_run_directory(config: Config, index: ShardIndex | None, step: int | None) -> tuple[Path | None, list[str]]:
    """Create the run's folder, write the resolved configuration and the class table. A new run moves what it finds
    there aside.

    Args:
        config: the run.
        index: the training split; None for a stream.
        step: the step to resume from; evaluations and proxy statistics of later steps, whose checkpoints were lost, are
            removed, because those steps will be repeated. None starts anew.

    Returns:
        The new path of the earlier run, if there was one; messages about damaged files that were set aside.
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
            if (step_in(path.name) or 0) > (step or 0):
                path.unlink()
            elif path.name != "pixels.json" and step_in(path.name) is None:
                continue  # not ours
            elif problem := _document_problem(path):
                os.replace(path, path.with_name(f"{path.name}.damaged"))
                odd.append(f"{problem}: passed over, now {path.name}.damaged")
        for name, fields in ((DAMAGE_FILE, DAMAGE_FIELDS), (NON_FINITE_FILE, NON_FINITE_FIELDS)):
            odd += mend_log(directory / name, fields)
        _keep_unfinished_embeddings(directory, aside, step)
        publish_text(RunFolder(directory).config, json.dumps(config.model_dump(), indent=2) + "\n")
        write_class_table(directory, index)
    except OSError as error:
        raise ValueError(
            f"expected to write into {directory.resolve()}: {describe_error(error, directory.parent)}; set runs_dir to "
            "a folder of yours"
        ) from None
    return aside, odd


def _document_problem(path: Path) -> str | None:
    """Describe what is wrong with a stored evaluation or proxy statistics, if anything.

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


def _keep_unfinished_embeddings(directory: Path, aside: Path | None, step: int | None) -> None:
    """Keep the unfinished embeddings of a run interrupted before its first checkpoint; remove those of evaluations that
    are stored, or before the step to resume from.
    """
    if step is None and aside is not None:
        for folder in paths_in(aside / "embeddings", "*.partial"):
            if folder.stem in ("pixels", step_name(0), step_name(0, of_validation=True)):
                (directory / "embeddings").mkdir(exist_ok=True)
                os.rename(folder, directory / "embeddings" / folder.name)
    for of_validation in (False, True):
        for reached, folder in by_step(directory / "embeddings", ".partial", of_validation=of_validation).items():
            is_stored = mode_of(RunFolder(directory).evaluation(folder.stem)) is not None
            if is_folder(folder) and (is_stored or reached < (step or 0)):
                shutil.rmtree(folder, ignore_errors=True)


def comparable_settings(config: Config) -> dict[str, Any]:
    """Return the settings that the numbers of a run depend on, flat: a run resumes only if they are unchanged."""
    whole = config.model_dump(mode="json", exclude={"name", "runs_dir", "evaluation", "checkpoint", "telemetry"})
    free = {"data.shards", "data.test_split", "data.num_workers", "data.cache_images"}
    free |= {"data.damaged_images", "data.max_damaged", "data.cache_directory", "data.cache_limit"}
    free |= {"training.max_left_out", "training.max_rollbacks", "training.start_timeout", "training.step_timeout"}
    free |= {"training.cudnn_benchmark", "training.deterministic"}  # the same sums in another order
    free |= {"proxies.selection", "proxies.fused"}  # the same numbers by another route
    free.add("proxies.class_mean_images")  # of a start that is over
    free |= {"backbone.gradient_checkpointing", "training.compile"}
    if config.data.images_per_class is None and config.loss is None:  # the position in the data is a number of images
        free |= {"training.batch_size", "deepspeed.gradient_accumulation_steps", "deepspeed.train_batch_size"}
    if config.proxies.regularization_weight == 0 or config.proxies.regularization_anchors is not None:
        free.add("proxies.memory_budget")  # otherwise it decides how the regulariser is computed
    elif config.proxies.memory_budget is None:
        whole["proxies"]["memory_budget"] = "256 MiB"  # which it is for the regulariser, and earlier versions recorded
    if config.schedule.name != "cosine":  # other schedules ignore the length, so such a run may be extended
        free |= {"training.epochs", "training.max_steps"}
    if config.proxies.class_score != "softmax":
        free.add("proxies.class_score_gamma")
    return without_neutral_keys({name: value for name, value in flattened(whole) if name not in free})

"""The folder of a run's checkpoints: what is whole, what is published how, what is kept, where a run resumes.

    checkpoints/step-000800/
        ...                    what writer.py writes
        state.json             step, position in the data, number of ranks, what the numbers depend on
        MANIFEST.json          bytes and sha256 of every file above: written last
    checkpoints/latest         name of the newest, for people and scripts; nothing here trusts it

A checkpoint is whole if its manifest is there and its files are as listed: sizes count for being kept, hashes also for
being read. It is written aside, in `.step-000800.partial`, and published by one rename. Nothing here knows of tensors
or uses collectives: what is said of ranks stands in writer.py.
"""

import math
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.cli import printable
from dist_proxygml.faults import fault_point
from dist_proxygml.storage.files import (
    describe_error,
    is_folder,
    mode_of,
    paths_in,
    publish_text,
    read_document,
    remove,
)
from dist_proxygml.storage.folder import SealedKind, look_into, put_back, shortened, write_manifest
from dist_proxygml.storage.run_folder import RunFolder, by_step, step_in, step_name

MANIFEST_FILE = "MANIFEST.json"
LATEST_FILE = "latest"
STATE_FILE = "state.json"
_KIND = SealedKind("checkpoint", remedy="", manifest_file=MANIFEST_FILE, is_named=False)


@dataclass(frozen=True)
class RunState:
    """State of the run in a checkpoint, besides tensors."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """The epoch, from 0, that the next step belongs to."""
    consumed: int
    """Images of that epoch's order that are done: the position in the data, for any number of ranks and batch size."""
    world_size: int
    settings: dict[str, Any]
    """Values that a resumed run must share with this one, by name: configuration, data, class table."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there; the newest always does."""

    keep_last: int
    """So many of the newest."""
    keep_every: int | None = None
    """The first checkpoint at or after every multiple of so many steps, for good."""
    keep_best: str | None = None
    """The one whose evaluation has most of this metric."""
    by_validation: bool = False
    """Whether that is the evaluation of validation classes."""


class SavedCheckpoint(NamedTuple):
    """A published checkpoint."""

    path: Path
    problems: list[str]
    """Problems after it was published, such as an old checkpoint that could not be deleted."""


class Continuation(NamedTuple):
    """Checkpoint that a run resumes from."""

    checkpoint: Path | None
    """A checkpoint that verifies; None starts anew."""
    passed_over: list[str]
    """Newer checkpoints that do not verify: which, why, and where they are now."""


def published_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints below `directory` that have a manifest, oldest first; none of their files is looked at.

    Raises:
        ValueError: a folder cannot be read, as in all functions here that look for checkpoints: what cannot be read
            may be a checkpoint.
    """
    return [path for path in _step_folders(directory) if stat.S_ISREG(mode_of(path / MANIFEST_FILE) or 0)]


def verify_checkpoint(checkpoint: Path, *, deep: bool = True) -> list[str]:
    """List the problems of a checkpoint, by file; none if it is whole.

    Args:
        checkpoint: its folder.
        deep: compare the sha256 of every file with the manifest's, besides its size, and read the state.

    Raises:
        ValueError: the manifest or a file that it lists is there and cannot be read.
    """
    _, problems = look_into(checkpoint, _KIND, deep=deep)
    if deep and not problems:
        try:
            read_state(checkpoint)
        except (OSError, ValueError) as error:
            return [str(error)]
    return problems


def find_checkpoint(directory: Path, wanted: str) -> Path | None:
    """The newest checkpoint below `directory` that verifies ("auto", None without one), or the one at the path that
    `wanted` is. Newer ones that do not verify are passed over with a warning.

    Raises:
        ValueError: the checkpoint at the path does not verify.
    """
    if wanted == "auto":
        found, damaged = _newest_whole(directory)
        for path, problems in damaged.items():
            warnings.warn(printable(f"{_damage_of(path, problems)}: passed over"), stacklevel=2)
        return found
    path = Path(wanted)
    if not is_folder(path):
        known = ", ".join(p.name for p in published_checkpoints(directory)) or "none"
        raise ValueError(f"expected a checkpoint folder at {path}, found none; this run has: {known}")
    problems = verify_checkpoint(path)
    if problems:
        others = ", ".join(p.name for p in published_checkpoints(directory) if p.resolve() != path.resolve()) or "none"
        raise ValueError(f"{_damage_of(path, problems)}; restore it from a copy, or take another one of: {others}")
    return path


def found_instead(directory: Path) -> str:
    """End of the message where no checkpoint below `directory` is whole."""
    _, damaged = _newest_whole(directory)
    if not damaged:
        return "found none; train the run first"
    listed = "; ".join(_damage_of(path, problems) for path, problems in damaged.items())
    return f"found damaged ones only: {listed}; copy them again, or restore them from a backup"


def checkpoint_to_continue(directory: Path, resume: str) -> Continuation:
    """Find the checkpoint that --resume means for a run with checkpoints below `directory`: "never" none, "auto" the
    newest that verifies, a path that one. On rank 0 only, at the start of a run whose checkpoints no other process
    writes.

    What dead runs left half-written is removed. With "auto", newer checkpoints that do not verify are renamed to
    `step-N.damaged`: the run will come to their steps again, and they must not count among those that are kept.

    Raises:
        ValueError: the checkpoint at the path does not verify, or this run has newer ones, which would mix with its
            own. Something cannot be read, so whether the run has checkpoints is not known: nothing was renamed then.
        OSError: what a dead run left cannot be removed.
    """
    if resume == "never":
        return Continuation(None, [])
    clear_leftovers(directory)
    if resume == "auto":
        found, damaged = _newest_whole(directory)
        return Continuation(found, [_set_aside(path, problems) for path, problems in damaged.items()])
    found = find_checkpoint(directory, resume)
    assert found is not None
    newer = [path.name for path in published_checkpoints(directory) if _step_of(path) > read_state(found).step]
    if newer:
        raise ValueError(
            f"{directory} holds checkpoints newer than {found.name}: {', '.join(newer)}; move them away, or continue "
            "under another name with --set name=NAME"
        )
    return Continuation(found, [])


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed run left of a checkpoint that it was writing, replacing or deleting. On rank 0 only.

    A run that was killed while it put a checkpoint in the place of an earlier one gets the earlier one back.
    """
    for path in paths_in(directory, ".step-*.replaced"):
        put_back(path.with_name(path.name.removeprefix(".").removesuffix(".replaced")))
    for pattern in (".step-*.partial", ".step-*.deleted", ".step-*.replaced", f"{LATEST_FILE}.tmp-*"):
        for path in paths_in(directory, pattern):
            remove(path)


def checkpoints_to_forget(steps: Sequence[int], retention: Retention, *, scores: Mapping[int, float]) -> list[int]:
    """The steps whose checkpoints need not be kept, ascending.

    Args:
        steps: of the checkpoints that there are, ascending.
        retention: what is kept.
        scores: metric of those steps that have been evaluated; of equal ones the newest is the best.
    """
    kept = set(steps[-retention.keep_last :])
    if retention.keep_every is not None:
        first_in: dict[int, int] = {}
        for step in steps:
            first_in.setdefault(step // retention.keep_every, step)
        kept |= {step for period, step in first_in.items() if period > 0}
    measured = [step for step in steps if step in scores]
    if measured:
        kept.add(max(measured, key=lambda step: (scores[step], step)))
    return [step for step in steps if step not in kept]


def read_state(checkpoint: Path) -> RunState:
    """The RunState of a complete checkpoint.

    Raises:
        ValueError: the file says something else. OSError: it cannot be opened.
    """
    document = read_document(checkpoint / STATE_FILE)
    settings, world_size = document.get("settings"), document.get("world_size")
    counts = [document.get(name) for name in ("step", "epoch", "consumed")]
    is_sound = isinstance(settings, dict) and all(type(n) is int and 0 <= n < 2**63 for n in [*counts, world_size])
    if not is_sound or document.keys() != {field.name for field in fields(RunState)} or world_size == 0:
        raise ValueError(f"{STATE_FILE} says something else than step, epoch, consumed, world_size and settings")
    return RunState(**document)


def _step_of(checkpoint: Path) -> int:
    step = step_in(checkpoint.name)
    assert step is not None
    return step


def _step_folders(directory: Path) -> list[Path]:
    """Folders that are named as checkpoints are, oldest first."""
    return [path for path in by_step(directory).values() if is_folder(path)]


def _newest_whole(directory: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    damaged: dict[Path, list[str]] = {}
    for path in reversed(_step_folders(directory)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, damaged
        damaged[path] = problems
    return None, damaged


def _damage_of(checkpoint: Path, problems: list[str]) -> str:
    return f"checkpoint {checkpoint} is damaged: {shortened(problems)}"


def _set_aside(checkpoint: Path, problems: list[str]) -> str:
    """Rename a damaged checkpoint; returns a message about it."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    try:
        remove(aside)
        os.rename(checkpoint, aside)
    except OSError as error:
        return f"{_damage_of(checkpoint, problems)}: passed over, but it could not be renamed: {error}"
    return f"{_damage_of(checkpoint, problems)}: passed over, now {aside.name}"


def write_checkpoint_manifest(
    partial: Path, state: RunState, files: Mapping[str, dict[str, Any]], **versions: str
) -> None:
    """Write the list of files, whose contents are on disk, and bring the names of all to disk."""
    about = {"step": state.step, "world_size": state.world_size, "written_with": versions}
    write_manifest(partial, _KIND, about, dict(sorted(files.items())))
    fault_point("save.manifest")


def tidy_up(final: Path, retention: Retention) -> list[str]:
    """Point to the newest checkpoint and delete old ones; returns the failures, since the checkpoint is safe."""
    problems = []
    try:
        fault_point("save.published")
        publish_text(final.with_name(LATEST_FILE), f"{final.name}\n")
        fault_point("save.latest")
    except OSError as error:
        problems.append(f"{final.with_name(LATEST_FILE)} could not be written: {describe_error(error, final)}")
    published = {}
    try:
        for path in published_checkpoints(final.parent):
            damage = verify_checkpoint(path, deep=False)
            if damage:  # neither counted nor deleted: somebody should look at it
                problems.append(_damage_of(path, damage))
            else:
                published[_step_of(path)] = path
    except ValueError as error:
        return [*problems, f"earlier checkpoints were not looked at: {error}"]
    scores: dict[int, float] = {}
    if retention.keep_best is not None:
        scores, unreadable = _scores(
            list(published.values()), retention.keep_best, by_validation=retention.by_validation
        )
        problems += unreadable
    for step in checkpoints_to_forget(list(published), retention, scores=scores):
        try:
            _forget(published[step])
        except OSError as error:
            problems.append(f"{published[step]} could not be deleted: {error}")
    return problems


def _scores(checkpoints: list[Path], metric: str, *, by_validation: bool) -> tuple[dict[int, float], list[str]]:
    """The metric of each evaluated checkpoint by step, and evaluations that it cannot be read from."""
    scores: dict[int, float] = {}
    problems = []
    for checkpoint in checkpoints:
        name = step_name(_step_of(checkpoint), of_validation=by_validation)
        path = RunFolder(checkpoint.parent.parent).evaluation(name)
        try:
            score = float(read_document(path)["metrics"][metric])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            problems.append(f"{metric} of {checkpoint.name} cannot be read from {path}: {error!r}")
            continue
        if math.isfinite(score):
            scores[_step_of(checkpoint)] = score
    return scores, problems


def _forget(checkpoint: Path) -> None:
    """Delete a checkpoint, unpublished first, so that half a checkpoint never looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    remove(doomed)
    os.rename(checkpoint, doomed)
    fault_point("save.forget")
    remove(doomed)

"""Logs of a run: metrics.jsonl, run.json, TensorBoard, a progress bar. Only rank 0 writes.

metrics.jsonl is the record (one JSON object per line, appended, readable after a crash); TensorBoard shows the same
numbers, and what training/board.py adds, in one folder even if a run is started several times; experiment trackers
(trackers.py) get its curves. A resumed run removes the lines and points of steps that it will repeat. Nothing is
measured on steps that are not logged, so that nothing waits for a GPU in between.

run.json has what the run was started on last, and the seconds that all its starts took, by phase:

    data         waiting for training images
    training     steps, and what belongs to no other phase
    evaluation, checkpoint
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dist_proxygml.distributed.memory import peak_memory
from dist_proxygml.reporting.trackers import Trackers
from dist_proxygml.storage.files import mend_log, paths_in, publish_text, read_document
from dist_proxygml.storage.run_folder import RunFolder

_PHASES = ("training", "data", "evaluation", "checkpoint")
_ZERO_IF_UNUSED = ("regularization", "damaged_images")  # terms that TensorBoard shows only where there are any
_EVENTS = "events.out.tfevents."  # TensorBoard's file prefix, followed by seconds since 1970 and more


class Telemetry:
    """The logs of one run.

    Raises:
        ValueError: an earlier log cannot be read.
        OSError: it cannot be written.
    """

    def __init__(
        self, run_directory: Path, *, enabled: bool, num_steps: int, start_step: int, progress_bar: bool
    ) -> None:
        self._enabled = enabled
        self._start_step, self._started = start_step, time.perf_counter()
        self._folder = RunFolder(run_directory)
        self._seconds = dict.fromkeys(_PHASES, 0.0)  # of this start, "training" being the rest
        self._facts: dict[str, Any] = {}
        self._earlier = _seconds_of(self._folder.facts) if enabled and start_step else dict.fromkeys(_PHASES, 0.0)
        self._has_points: set[str] = set()  # tags of `log_number`
        self._followed = 0.0
        self.problems: list[str] = []
        """Messages about damaged lines in the earlier log."""
        self.trackers: Trackers | None = None
        """Get the numbers of TensorBoard's curves, too; ended by `close`."""
        self._images_since, self._time_since = 0, time.perf_counter()
        if enabled:
            folder = self._folder
            self.problems = mend_log(folder.metrics, {"step": int}, keep=lambda line: line["step"] <= start_step)
            self._lines = folder.metrics.open("a", buffering=1, encoding="utf-8")
            _order_by_name(folder.board)
            self._board = SummaryWriter(str(folder.board), purge_step=start_step + 1 if start_step else None)
            # a line every 15 seconds in a file, a bar in a terminal
            self._pace = 0.5 if sys.stderr.isatty() else 15.0
            self._bar = tqdm(
                total=num_steps,
                initial=start_step,
                unit="step",
                disable=not progress_bar,
                delay=1e-3,
                mininterval=self._pace,
                **({"dynamic_ncols": True} if sys.stderr.isatty() else {"ncols": 110}),
            )

    def count(self, num_images: int) -> None:
        """Count an optimizer step over `num_images` images of all ranks."""
        self._images_since += num_images
        if self._enabled:
            self._bar.update()

    def log_training(self, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Log the scalars of a step; the rate covers the time since the last call."""
        now = time.perf_counter()
        rate = self._images_since / max(now - self._time_since, 1e-9)
        self._images_since, self._time_since = 0, now
        if not self._enabled:
            return
        # Omitted if not measured, or infinite (the gradient of a step that fp16 skipped): JSON has no infinity.
        numbers = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        numbers |= {"images_per_second": rate, **memory_gib()}
        self._write({"kind": "train", "step": step, "epoch": epoch, **numbers})
        self._draw({"train/epoch": epoch}, step)
        plotted = dict(numbers)
        if not plotted.get("regularization"):
            plotted.pop("classification", None)  # it is the loss
        if plotted.get("lr_embedding") == plotted.get("lr_backbone"):
            plotted.pop("lr_embedding", None)  # one curve
        self._plot("train", plotted, step)
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {rate:,.0f} images/s", refresh=False)

    def log_evaluation(self, step: int, epoch: int, metrics: Mapping[str, float], *, kind: str = "evaluation") -> None:
        """Log the metrics of an evaluation after `step` steps, flushed to disk; `kind` says on which split."""
        if self._enabled:
            self._write({"kind": kind, "step": step, "epoch": epoch, **metrics})
            self._plot(kind, metrics, step)
            self._bar.set_description(f"epoch {epoch}" if epoch else "", refresh=False)
        self.pause()

    def _plot(self, kind: str, values: Mapping[str, float], step: int) -> None:
        def is_unused(name: str, value: float) -> bool:
            return value == 0 and (name in _ZERO_IF_UNUSED or name.endswith("_sd"))

        shown = {f"{kind}/{name}": value for name, value in values.items() if not is_unused(name, value)}
        self._draw(shown, step)

    def describe_run(self, facts: Mapping[str, Any]) -> None:
        """Store what this start of the run runs on."""
        self._facts = dict(facts)
        self._store_facts()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of a phase; blocks are not nested."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def log_phases(self, step: int) -> None:
        """Store and plot how long each phase has taken, all starts together."""
        if self._enabled:
            self._store_facts()
            if step > self._start_step or not self._start_step:  # else an earlier start has plotted it
                seconds = self._all_seconds()
                self._draw({f"time/{name}_seconds": value for name, value in seconds.items()}, step)

    def follow(self, what: str, done: int, total: int) -> None:
        """Show the progress of what is between steps, beside the bar."""
        if self._enabled:
            self._bar.set_description(f"{what} {done:,}/{total:,}", refresh=False)
            now = time.perf_counter()
            if now - self._followed >= self._pace:
                self._followed = now
                self._bar.refresh()

    def _all_seconds(self) -> dict[str, float]:
        seconds = dict(self._seconds)
        seconds["training"] = time.perf_counter() - self._started - sum(seconds.values())
        return {name: seconds[name] + self._earlier[name] for name in _PHASES}

    def _store_facts(self) -> None:
        if self._enabled:
            document = {**self._facts, "seconds": self._all_seconds()}
            publish_text(self._folder.facts, json.dumps(document, indent=2) + "\n")

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Log a grid of uint8 images [n, 3, H, W]."""
        if self._enabled:
            self._board.add_images(name, images, step)

    def log_number(self, name: str, value: float, step: int) -> None:
        """Log a point of a curve, which metrics.jsonl does not have; the curve begins where it is not zero."""
        if self._enabled and (value or self._start_step or name in self._has_points):
            self._has_points.add(name)
            self._draw({name: value}, step)

    def log_values(self, name: str, values: Tensor, step: int) -> None:
        """Log a histogram of values, unless none is finite."""
        finite = values.detach().float()[values.isfinite()]
        if self._enabled and finite.numel():
            self._board.add_histogram(name, finite, step)

    def log_counts(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        """Log a precomputed histogram, unless it is empty; there is one more edge than counts."""
        filled = [bin for bin, count in enumerate(counts) if count]
        if not self._enabled or not filled:
            return
        first, last = filled[0], filled[-1]
        centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self._board.add_histogram_raw(
            name,
            min=edges[first],
            max=edges[last + 1],
            num=sum(counts),
            sum=sum(count * centre for count, centre in zip(counts, centres, strict=True)),
            sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres, strict=True)),
            # Buckets have upper limits only: an empty one in front marks the start of the first.
            bucket_limits=list(edges[first : last + 2]),
            bucket_counts=[0, *counts[first : last + 1]],
            global_step=step,
        )

    def log_settings(self, settings: Mapping[str, object], metric_tags: Sequence[str]) -> None:
        """Log the run's settings, and which curves end at its results, for TensorBoard's HParams. Once per run."""
        if self._enabled:
            known = {name: value if _is_plain(value) else json.dumps(value) for name, value in settings.items()}
            experiment, session, _ = hparams(known, dict.fromkeys(metric_tags, 0.0))
            for summary in (experiment, session):
                self._board._get_file_writer().add_summary(summary, 0)

    def log_end(self, step: int) -> None:
        """Log the end of the run, for TensorBoard's HParams."""
        if self._enabled:
            *_, end = hparams({}, {})
            self._board._get_file_writer().add_summary(end, step)

    def pause(self) -> None:
        """Exclude the time since the last logged step, an evaluation or a checkpoint, from images/s. Flushes earlier
        lines to disk, because a killed run resumes from here.
        """
        if self._enabled:
            self._board.flush()
        self._images_since, self._time_since = 0, time.perf_counter()

    def say(self, text: str) -> None:
        """Print a message above the progress bar."""
        if self._enabled:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def close(self) -> None:
        """Flush and close all logs."""
        if self._enabled:
            self._store_facts()
            self._bar.close()
            self._board.close()
            self._lines.close()
            if self.trackers is not None:
                self.trackers.close()

    def _draw(self, numbers: Mapping[str, float], step: int) -> None:
        """Add a point to a curve each, by name."""
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self.trackers is not None:
            self.trackers.log(step, numbers)

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _order_by_name(board: Path) -> None:
    """Rename event files dated in the future, from before the clock was set back: TensorBoard reads in the order of
    names, and this start's file supersedes points of earlier ones.
    """
    files = paths_in(board, f"{_EVENTS}*")
    now = int(time.time())
    if any(path.name.removeprefix(_EVENTS)[:10] >= f"{now:010d}" for path in files):
        for number, path in enumerate(files):
            rest = path.name.removeprefix(_EVENTS).partition(".")[2]
            os.rename(path, path.with_name(f"{_EVENTS}{now - len(files) + number:010d}.{number}.{rest}"))


def _seconds_of(path: Path) -> dict[str, float]:
    """The seconds by phase that earlier starts have stored; zeros where there are none."""
    try:
        stored = read_document(path).get("seconds")
    except (OSError, ValueError):
        stored = None
    known = stored if isinstance(stored, dict) else {}
    return {name: float(known[name]) if isinstance(known.get(name), int | float) else 0.0 for name in _PHASES}


def memory_gib() -> dict[str, float]:
    """Return the peak memory of this process, and of its GPU if any, in GiB."""
    peak = {"memory_gib": peak_memory() / 2**30}
    if torch.cuda.is_available():
        peak["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak

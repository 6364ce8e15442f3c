"""A sweep: settings on a grid, several seeds of each, and the tables that its runs come to.

    proxies.per_class=1,2,4 x proxies.ratio=0.05,0.1 x seeds -> points -> runs -> results.csv, summary.csv, summary.md

Pure functions of texts, numbers and folders; launchers/sweep.py starts the runs. A point is an ordinary run, which
names itself by its values and so finds itself again. What happened to it is read from its folder and its logs.

Chosen: the grid, whole. Its table and picture have no holes that nobody knows of: a point that failed has its cell and
its reason. Declined: marking the best point. It would be chosen on the classes that are tested, by differences that are
often smaller than the deviation beside them. Search strategies (Optuna, Ray Tune): whoever wants one can call
launchers/submit.py from it. pandas, for two tables.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dist_proxygml.config import Config, load_run_config
from dist_proxygml.storage.files import read_document
from dist_proxygml.storage.run_folder import RunFolder

Grid = dict[str, list[Any]]
"""The values of each setting that is varied, by its dotted name."""

Status = Literal["finished", "running", "failed", "open"]
"""open: not started, or stopped on purpose; calling the sweep again resumes it."""

# What the numbers of a run do not depend on.
FREE_SECTIONS = {"name", "runs_dir", "telemetry", "checkpoint"}
_TAKEN_KEYS = {
    "seed": "seeds are varied by --seeds",
    "name": "runs are named by their values; --set name=NAME names the sweep",
    "runs_dir": "--out says where the runs go",
}


# ---- the grid --------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One run of the sweep."""

    name: str
    values: tuple[Any, ...]  # in the order of the grid's keys
    seed: int
    overrides: tuple[str, ...]  # as --set takes them


class Evaluation(NamedTuple):
    """Numbers of the last evaluation of a run."""

    metrics: dict[str, float]
    fingerprint: str  # two results with other fingerprints measure different things


class Result(NamedTuple):
    """State of a point."""

    point: Point
    status: Status
    evaluation: Evaluation | None = None  # of a finished one
    reason: str = ""  # why it failed or is open
    log: str = ""  # where that stands, seen from the sweep's folder


def parse_grid(texts: Sequence[str]) -> Grid:
    """`KEY=A,B,C` each: a value is read as JSON where it is JSON, else as a string, as --set does.

    Raises:
        ValueError: with everything that is wrong.
    """
    grid: Grid = {}
    problems = []
    for text in texts:
        key, separator, listed = text.partition("=")
        if not separator or not key or not listed:
            problems.append(f"--grid expects KEY=VALUE,VALUE,... such as proxies.ratio=0.05,0.1, got {text!r}")
        elif key in _TAKEN_KEYS:
            problems.append(f"--grid {text}: {_TAKEN_KEYS[key]}")
        elif key in grid:
            problems.append(f"--grid names {key} twice; give all of its values in one list")
        else:
            grid[key] = _parse_values(listed)
            written = [json.dumps(value) for value in grid[key]]
            twice = sorted({value for value in written if written.count(value) > 1})
            problems += [f"--grid {text}: {value} is there twice; remove one" for value in twice]
    if problems:
        raise ValueError("\n".join(problems))
    return grid


def _parse_values(listed: str) -> list[Any]:
    try:
        return list(json.loads(f"[{listed}]"))  # also values that are lists themselves
    except json.JSONDecodeError:
        return [_parse_value(value) for value in listed.split(",")]


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def make_points(grid: Grid, num_seeds: int) -> list[Point]:
    """Every combination of the values with every seed, the last key changing fastest and the seed faster still.

    The name of a point depends on its own values only, so that a grid may grow from one call to the next.
    """
    labels = short_labels(grid)
    points = []
    for values in itertools.product(*grid.values()):
        for seed in range(num_seeds):
            parts = [f"{labels[key]}-{_slug(value)}" for key, value in zip(grid, values, strict=True)]
            overrides = [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)]
            name = "_".join([*parts, f"seed-{seed}"])
            points.append(Point(name, values, seed, (*overrides, f"seed={seed}")))
    return points


def short_labels(keys: Iterable[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two end in the same word."""
    last = {key: key.rpartition(".")[2] for key in keys}
    words = list(last.values())
    return {key: word if words.count(word) == 1 else key for key, word in last.items()}


def show_value(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _slug(value: Any) -> str:
    """The value as a part of a file's name. What has to be changed for it gets a hash, so that no two become one."""
    text = show_value(value)
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", text)[:40]
    return text if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# ---- the state of a point ------------------------------------------------------------------------------------------


def trained_settings(run_directory: Path) -> Config | None:
    """The configuration that a run was last started with; None where there is none that can be read."""
    try:
        return load_run_config(run_directory)
    except (ValueError, OSError):
        return None


def is_same_run(one: Config, other: Config) -> bool:
    """Whether two configurations ask for the same numbers, both as `fill_from_weights` leaves them: a run stores what
    its weights said. A number of classes that one of them leaves to the shards is that of the other.
    """
    settings, others = (config.model_dump(exclude=FREE_SECTIONS) for config in (one, other))
    if None in (one.data.num_classes, other.data.num_classes):
        settings["data"]["num_classes"] = others["data"]["num_classes"] = None
    return settings == others


def metrics_measured(config: Config) -> list[str]:
    """The metrics that an evaluation of this run gives."""
    return config.evaluation.metrics


def last_evaluation(run_directory: Path) -> Evaluation | None:
    """The evaluation of the run's last step that has one, on validation classes if the run has no test split; None if
    there is none, or no whole one.
    """
    folder = RunFolder(run_directory)
    steps = folder.evaluations() or folder.evaluations(of_validation=True)
    if not steps:
        return None
    try:
        document = read_document(steps[max(steps)])
        return Evaluation(dict(document["metrics"]), str(document["fingerprint"]))
    except (ValueError, KeyError, TypeError, OSError):
        return None


def failure_in_logs(logs: Sequence[Path]) -> tuple[str, Path | None]:
    """Why a job failed, by the logs of its ranks, and the log that says so.

    The last message `error: ...` counts, whichever rank reported it; without one the exception that ended a rank, and
    without that the last line of rank 0, which may be SLURM's. Continued lines are joined.
    """
    texts = [(path, path.read_text(encoding="utf-8", errors="replace")) for path in logs if path.is_file()]
    for pattern in (r"^error: (.*(?:\n  .*)*)", r"^((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)"):
        for path, text in texts:
            if found := re.findall(pattern, text, flags=re.MULTILINE):
                return " ".join(found[-1].split()), path
    for path, text in texts:
        if text.strip():
            return text.strip().splitlines()[-1], path
    return "it left no log", None


# ---- tables ----------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """A metric over the seeds of a point."""

    mean: float
    deviation: float | None  # of a sample (n - 1); None for one seed
    values: tuple[float, ...]  # of each seed that has finished


class Cell(NamedTuple):
    """A point of the grid, over its seeds."""

    values: tuple[Any, ...]
    spreads: dict[str, Spread]  # by metric; empty if no seed has finished
    statuses: tuple[Status, ...]  # of each seed

    @property
    def num_finished(self) -> int:
        """Number of seeds that have finished."""
        return self.statuses.count("finished")

    @property
    def word(self) -> str:
        """Worst state among the seeds that have no number; empty if all have finished."""
        return next((word for word in ("failed", "running", "open") if word in self.statuses), "")


def summarize(results: Sequence[Result]) -> list[Cell]:
    """Mean and standard deviation of each metric over the seeds of each point, in the order of the results."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.point.values), []).append(result)
    cells = []
    for group in groups.values():
        measured = [result.evaluation.metrics for result in group if result.evaluation]
        spreads = {}
        for metric in _metrics(group):
            if values := tuple(metrics[metric] for metrics in measured if metric in metrics):
                deviation = statistics.stdev(values) if len(values) > 1 else None
                spreads[metric] = Spread(statistics.fmean(values), deviation, values)
        cells.append(Cell(group[0].point.values, spreads, tuple(result.status for result in group)))
    return cells


def metrics_of(cells: Iterable[Cell]) -> list[str]:
    """The metrics that any cell has, in the order of the evaluation."""
    return list(dict.fromkeys(metric for cell in cells for metric in cell.spreads))


def _metrics(results: Iterable[Result], *, with_spreads: bool = False) -> list[str]:
    """Metrics of evaluations; `nmi_sd`, which is over the k-means runs of one evaluation, only if wanted."""
    found = [metric for result in results if result.evaluation for metric in result.evaluation.metrics]
    return list(dict.fromkeys(metric for metric in found if with_spreads or not metric.endswith("_sd")))


def results_csv(grid: Grid, results: Sequence[Result]) -> str:
    """A line for every run: its settings, seed, status, all metrics of its last evaluation (1 is all), reason, log."""
    metrics = _metrics(results, with_spreads=True)
    lines: list[Sequence[Any]] = [["name", *grid, "seed", "status", *metrics, "reason", "log"]]
    for point, status, evaluation, reason, log in results:
        numbers = evaluation.metrics if evaluation else {}
        shown = [show_value(value) for value in point.values]
        lines.append([point.name, *shown, point.seed, status, *(numbers.get(m, "") for m in metrics), reason, log])
    return _csv(lines)


def summary_csv(grid: Grid, cells: Sequence[Cell]) -> str:
    """A line for every point of the grid: settings, numbers of seeds, mean and deviation of each metric (1 is all)."""
    metrics = metrics_of(cells)
    columns = [f"{metric}_{what}" for metric in metrics for what in ("mean", "sd")]
    lines: list[Sequence[Any]] = [[*grid, "seeds", "finished", "failed", *columns]]
    for cell in cells:
        numbers: list[Any] = []
        for metric in metrics:
            spread = cell.spreads.get(metric)
            numbers += ["", ""] if spread is None else [spread.mean, "n/a" if spread[1] is None else spread[1]]
        counts = [len(cell.statuses), cell.num_finished, cell.statuses.count("failed")]
        lines.append([*map(show_value, cell.values), *counts, *numbers])
    return _csv(lines)


def summary_markdown(name: str, grid: Grid, results: Sequence[Result]) -> str:
    """The table for people, in percent, and what failed, with the reason."""
    cells = summarize(results)
    metrics = metrics_of(cells)
    table = [[*(f"`{key}`" for key in grid), "seeds", *metrics]]
    for cell in cells:
        seeds = str(cell.num_finished) if not cell.word else f"{cell.num_finished} of {len(cell.statuses)}, {cell.word}"
        numbers = [format_spread(cell.spreads.get(metric)) or cell.word for metric in metrics]
        table.append([*map(show_value, cell.values), seeds, *numbers])
    parts = [
        f"# {name}",
        "Percent: mean ± standard deviation over the seeds (of a sample, n - 1; n/a for one seed).",
        _markdown_table(table),
    ]
    if len({result.evaluation.fingerprint for result in results if result.evaluation}) > 1:
        parts.append("Not all runs were evaluated by the same protocol, so their numbers may not be comparable.")
    for status, title in (("failed", "Failed"), ("running", "In the queue or running"), ("open", "Not finished")):
        of_reason: dict[str, list[Result]] = {}
        for result in results:
            if result.status == status:
                of_reason.setdefault(result.reason, []).append(result)
        lines = [_markdown_line(reason, alike) for reason, alike in of_reason.items()]
        parts += [f"{title}:", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def format_spread(spread: Spread | None) -> str:
    """A metric in percent: "71.20 ± 0.41"; empty without one."""
    if spread is None:
        return ""
    deviation = "n/a" if spread.deviation is None else f"{100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f} ± {deviation}"


def _markdown_line(reason: str, results: Sequence[Result]) -> str:
    """Runs that ended for the same reason, and the first one's log."""
    names = ", ".join(result.point.name for result in results)
    where = f" (`{results[0].log}`)" if results[0].log else ""
    return f"- {names}: {reason}{where}" if reason else f"- {names}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, so that a terminal shows a table too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def merge_problems(problems: Mapping[str, str], num_points: int) -> str:
    """The messages of several points as one: what they have in common once, with the points it does not hold for all.

    Args:
        problems: message by point; its lines that begin with a space belong to the line before them.
        num_points: how many points there are.
    """
    heads: dict[str, list[str]] = {}
    below: dict[str, dict[str, list[str]]] = {}
    for name, message in problems.items():
        head = ""
        for line in message.splitlines():
            if line.startswith(" "):
                below.setdefault(head, {}).setdefault(line, []).append(name)
            else:
                head = line
                heads.setdefault(head, []).append(name)

    def with_points(line: str, names: list[str]) -> str:
        which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return line if len(names) == num_points else f"{line} (in {which})"

    merged = []
    for head, names in heads.items():
        merged.append(head if head in below else with_points(head, names))
        merged += [with_points(line, names) for line, names in below.get(head, {}).items()]
    return "\n".join(merged)

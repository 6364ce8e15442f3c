"""Evaluations side by side, if they measured the same thing, and how sure their differences are.

Two numbers can be compared if they hold under one protocol: the same images, preparation, rules and settings. What
differs is named entry by entry. The size of the images that a model sees, versions of packages, the number of images in
a forward pass and the precision of the weights are told and do not count: they belong to a model, or move numbers and
not meanings, and a result would otherwise be comparable with nothing after any upgrade. A change of what a metric means
has an entry of its own.

Intervals of differences (bootstrap.py) need the score of each query. It is counted again, exactly, from the embeddings
of the evaluation, and must give the stored metrics.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_proxygml.config import flattened
from dist_proxygml.data.index import INDEX_FILE, read_index
from dist_proxygml.distributed.parallel import single_process
from dist_proxygml.evaluation.best import read_evaluations
from dist_proxygml.evaluation.bootstrap import Interval, compare_queries
from dist_proxygml.evaluation.embedding_pass import load_table
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.exact import round_rows
from dist_proxygml.evaluation.metrics import exact_mean, query_metrics
from dist_proxygml.evaluation.retrieval import Images, SearchOptions, retrieve
from dist_proxygml.storage.files import is_folder, mode_of, read_document
from dist_proxygml.storage.run_folder import RunFolder, step_name

_NOT_OF_THE_PROTOCOL = (
    "versions.",
    "data.forward_batch_size",
    "data.weights",
    "data.preprocessing.size",
    "data.preprocessing.resize",
)
_NOT_RECORDED_BEFORE = "classes."
_BY_ID = "left out by id"  # as protocols say of the query itself
_NOT_THERE = "(not there)"
_MOST_CHARACTERS = 60


class NamedResult(NamedTuple):
    """An evaluation and what it is called in a table."""

    name: str
    result: EvaluationResult
    embeddings: Path | None = None  # where those of this evaluation are, or would be
    shards: str | None = None  # as the run's configuration says


class Difference(NamedTuple):
    """An entry of two protocols that is not the same in both."""

    entry: str  # such as data.index_sha256
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.first} | {self.second}"

    @property
    def is_small(self) -> bool:
        """Whether it does not keep two results from being compared."""
        is_older = self.entry.startswith(_NOT_RECORDED_BEFORE) and _NOT_THERE in (self.first, self.second)
        return is_older or self.entry.startswith(_NOT_OF_THE_PROTOCOL)


class Uncertainty(NamedTuple):
    """Differences to one of the results, with intervals, and how they were found."""

    reference: int
    intervals: list[dict[str, Interval]]  # of each result by metric
    drawn: str  # what was resampled, and why that
    num_resamples: int
    seed: int


def open_result(path: Path) -> NamedResult:
    """The evaluation in a file, or the last one in the folder of a run.

    Raises:
        ValueError: there is none.
    """
    if is_folder(path):
        evaluations = read_evaluations(path)
        of_validation = not evaluations  # of a run without a test split
        evaluations = evaluations or read_evaluations(path, of_validation=True)
        if not evaluations:
            raise ValueError(
                f"expected the folder of a run with an evaluation, found no evaluation/step-N.json in {path}; name "
                "another run, or the file of an evaluation"
            )
        step, result = list(evaluations.items())[-1]
        name = f"{path}, step {step}{', validation classes' if of_validation else ''}"
        run, stem = path, step_name(step, of_validation=of_validation)
    else:
        try:
            result = EvaluationResult.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"expected the folder of a run or the file of an evaluation at {path}: {error.strerror}; correct the "
                "path"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        name, run, stem = str(path), path.parent.parent, path.stem
    return NamedResult(name, result, RunFolder(run).embeddings(stem), _shards_of(run))


def protocol_differences(first: EvaluationResult, second: EvaluationResult) -> list[Difference]:
    """The entries of two protocols that differ, in the order of their names."""
    entries = [{name: json.dumps(value) for name, value in flattened(result.protocol)} for result in (first, second)]
    names = sorted(entries[0].keys() | entries[1].keys())
    values = [(name, *(entry.get(name, _NOT_THERE) for entry in entries)) for name in names]
    return [Difference(name, *_shortened(one, other)) for name, one, other in values if one != other]


def image_difference(first: NamedResult, second: NamedResult) -> str | None:
    """Where two results of other images differ: their splits, or the first file, as far as that can be seen; else
    None.
    """
    splits = [named.result.protocol.get("data", {}).get("split") for named in (first, second)]
    if splits[0] != splits[1]:
        return f"split {splits[0]} | split {splits[1]}"
    try:
        files = []
        for named in (first, second):
            document, digest = read_index(Path(named.shards or ""))
            if digest != named.result.protocol["data"]["index_sha256"]:
                return None  # they have changed since
            files.append({shard["file"]: shard["sha256"] for shard in document["splits"][splits[0]]["shards"]})
    except (ValueError, LookupError, OSError, TypeError):
        return None
    where = f"split {splits[0]}, {first.shards} | {second.shards}"
    for file in sorted(files[0].keys() | files[1].keys()):
        if files[0].get(file) != files[1].get(file):
            return f"{where}: the first file that is not the same is {file}"
    return f"{where}: all image files of this split are the same, but {INDEX_FILE} is not"


def best_of(named: Sequence[NamedResult]) -> list[int]:
    """The results with the highest Recall@1, or of whatever metric all have first; several if they tie.

    Raises:
        ValueError: they have no metric in common.
    """
    shared = [name for name in named[0].result.metrics if all(name in other.result.metrics for other in named)]
    if not shared:
        raise ValueError("expected results with a common metric, got none; evaluate them again in the same way")
    scores = [other.result.metrics[shared[0]] for other in named]
    return [number for number, score in enumerate(scores) if score == max(scores)]


def find_uncertainty(
    named: Sequence[NamedResult], *, reference: int, num_resamples: int, seed: int
) -> Uncertainty | str:
    """Bootstrap the differences to the reference, or say why that is not possible."""
    scores, classes = [], []
    for one in named:
        try:
            of_queries, class_Q = query_scores(one)
        except ValueError as error:
            return str(error)
        scores.append(of_queries)
        classes.append(class_Q)
    if not all(np.array_equal(class_Q, classes[0]) for class_Q in classes):
        return "their queries are not the same"
    if not scores[reference]:
        return f"{named[reference].name} has no metric that is a mean over queries"
    class_set = named[0].result.class_set
    by_class = class_set is None or class_set.kind != "closed"
    if by_class:
        drawn = "classes with all their queries, as new classes are what varies"
    else:
        drawn = "queries, as all classes were trained and new images of them are what varies"
    intervals = compare_queries(
        scores, classes[0], reference=reference, by_class=by_class, num_resamples=num_resamples, seed=seed
    )
    return Uncertainty(reference, intervals, drawn, num_resamples, seed)


def query_scores(named: NamedResult) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The score of each query by metric, and its class, from the embeddings of the evaluation.

    Raises:
        ValueError: they are not at hand, or not those of this result.
    """
    result = named.result
    if named.embeddings is None or mode_of(named.embeddings) is None:
        raise ValueError(
            f"no embeddings of {named.name} are stored (a run keeps those of its newest evaluation of the test split)"
        )
    if result.protocol.get("self", _BY_ID) != _BY_ID:
        raise ValueError(f"{named.name} leaves out more than the query itself, which its embeddings do not tell")
    table = load_table(named.embeddings)
    labels_n, num = table.labels.numpy(), result.protocol.get("num", {})
    is_query_n = np.ones(len(labels_n), dtype=bool)
    is_gallery_n = is_query_n
    if result.protocol.get("data", {}).get("gallery_split") is not None:
        num_queries = num["queries"] + num["queries_without_right_answer"]  # their ids come first
        is_query_n = np.arange(len(labels_n)) < num_queries
        is_gallery_n = ~is_query_n
    _, class_n = np.unique(labels_n, return_inverse=True)
    found = retrieve(
        Images(round_rows(table.embeddings.numpy()), class_n, is_query_n, is_gallery_n),
        with_self=False,
        tolerance=result.protocol.get("tie_tolerance", 0.0),
        context=single_process(),
        options=SearchOptions(),
    )
    recall_at = [
        int(name.split("@")[1]) for name in result.metrics if name.startswith("recall@") and name[7:].isdigit()
    ]
    scores = query_metrics(found.exact, recall_at=recall_at)
    for metric, values_Q in scores.items():
        stored = result.metrics.get(metric)
        if stored is not None and not math.isclose(exact_mean(values_Q), stored, abs_tol=1e-9):
            raise ValueError(f"{named.embeddings} are not the embeddings of {named.name}: {metric} is not what it says")
    return {metric: scores[metric] for metric in scores if metric in result.metrics}, labels_n[found.position]


# ---- output ----------------------------------------------------------------------------------------------------------


def letters(number: int) -> str:
    """The number-th name of a column: A, B, ..., Z, A1, B1, ..."""
    return f"{chr(ord('A') + number % 26)}{number // 26 or ''}"


def metrics_of(named: Sequence[NamedResult]) -> list[str]:
    """The metrics that any result has, in the order of the first."""
    return list(dict.fromkeys(metric for one in named for metric in one.result.metrics))


def describe_result(named: NamedResult) -> str:
    """The name of a result, with how many of its classes were trained where that is known."""
    return f"{named.name}{'' if named.result.class_set is None else f', {named.result.class_set}'}"


def describe_uncertainty(found: Uncertainty) -> str:
    """What the intervals are, and what "tie" means."""
    return (
        f"in brackets: 95 % interval of the difference, from {found.num_resamples:,} paired resamples (seed "
        f"{found.seed}) of {found.drawn}; tie: 0 is in it"
    )


def format_comparison(named: Sequence[NamedResult], reference: int = 0, found: Uncertainty | None = None) -> str:
    """All metrics in percent, and what the others have more than the reference, in points."""
    others = [number for number in range(len(named)) if number != reference]
    lines = [["percent", *map(letters, range(len(named)))]]
    lines[0] += [f"{letters(number)} - {letters(reference)}" for number in others]
    for metric in metrics_of(named):
        values = [one.result.metrics.get(metric) for one in named]
        lines.append([metric, *("-" if value is None else f"{100 * value:.2f}" for value in values)])
        lines[-1] += [_format_difference(named, metric, number, reference, found) for number in others]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = "\n".join(
        f"{line[0]:<{widths[0]}}"
        + "".join(f"{cell:>{max(9, width + 2)}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
    head = "\n".join(f"{letters(number)}: {describe_result(one)}" for number, one in enumerate(named))
    return f"{head}\n\n{table}" + ("" if found is None else f"\n\n{describe_uncertainty(found)}")


def _format_difference(
    named: Sequence[NamedResult], metric: str, number: int, reference: int, found: Uncertainty | None
) -> str:
    one, other = (named[place].result.metrics.get(metric) for place in (reference, number))
    if one is None or other is None:
        return "-"
    points = f"{100 * (other - one):+.2f}"
    interval = None if found is None else found.intervals[number].get(metric)
    if interval is None:
        return f"{points} tie" if one == other else points
    shown = f"{points} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"
    return f"{shown} tie" if interval.is_tie else shown


def as_document(named: Sequence[NamedResult], reference: int, found: Uncertainty | None) -> dict[str, Any]:
    """The comparison for programs; differences and their intervals as fractions."""
    document: dict[str, Any] = {
        "results": [
            {
                "name": one.name,
                "metrics": one.result.metrics,
                "classes": None if one.result.class_set is None else one.result.class_set.as_entry(),
                "fingerprint": one.result.fingerprint,
            }
            for one in named
        ],
        "reference": reference,
    }
    if found is not None:
        how = {"resampled": found.drawn, "num_resamples": found.num_resamples, "seed": found.seed, "level": 0.95}
        document |= how | {"differences": [_as_entries(intervals) for intervals in found.intervals]}
    return document


def _as_entries(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {metric: {**found._asdict(), "is_tie": found.is_tie} for metric, found in intervals.items()}


def _shards_of(run: Path) -> str | None:
    """Where a run's configuration says that its shards are, None if it says nothing."""
    try:
        shards = read_document(RunFolder(run).config)["data"]["shards"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return shards if isinstance(shards, str) else None


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Both texts, cut where they are long to what is around the first difference."""
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    is_long = max(len(one), len(other)) > _MOST_CHARACTERS
    start = max(0, common - _MOST_CHARACTERS // 2) if is_long else 0

    def cut(text: str) -> str:
        rest = text[start : start + _MOST_CHARACTERS]
        return f"{'...' if start else ''}{rest}{'...' if start + len(rest) < len(text) else ''}"

    return cut(one), cut(other)

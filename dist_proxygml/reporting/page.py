"""Results of a run: a table for the terminal, and an HTML page.

    what the run was, numbers before and after training -> what the model retrieves -> where it fails -> every number
    -> hubs, copies -> proxies -> curves -> protocol and configuration

The page is self-contained: styles, curves (SVG) and thumbnails are embedded, nothing is fetched and no script runs. It
is written from the run's folder alone, plus the images of the embeddings; the page states what a run does not have yet.
Its size is bounded for any data set, see pictures.py, which prepares the part with images. Text and markup are in
templates/report.html; this module provides their data.

Run folder: config.json, metrics.jsonl, evaluation/{pixels,step-*}.json, embeddings/step-*.npz, proxies/step-*.json.
"""

import json
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.evaluation.best import BEST_ON_TEST, read_evaluations, selected_rows
from dist_proxygml.evaluation.embedding_pass import EmbeddingTable, load_table
from dist_proxygml.evaluation.evaluator import ClassSet, EvaluationResult
from dist_proxygml.evaluation.metrics import name_metrics
from dist_proxygml.reporting.charts import Chart, Series, line_chart
from dist_proxygml.reporting.pictures import picture_parts
from dist_proxygml.reporting.proxies import proxy_statistics
from dist_proxygml.reporting.render import format_seconds, quoted, read_makers, render
from dist_proxygml.reporting.verified import verification_part
from dist_proxygml.storage.files import is_folder, mode_of, publish_text, read_document, read_file, read_log
from dist_proxygml.storage.run_folder import RunFolder, by_step

_MAX_LISTED = 20  # entries of a list in the protocol
_HEADLINE = ("map@r", "nmi", "pair_accuracy")  # beside Recall@K
_GUESS = "classification of a guess: ln(kept classes)"


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run's folder; missing parts are empty or None."""

    name: str
    config: dict[str, Any]
    training: list[dict[str, Any]]  # logged steps in order
    evaluations: dict[int, EvaluationResult]  # by step
    validation: dict[int, EvaluationResult]  # of validation classes, by step
    chosen: dict[str, Mapping[str, float]]  # metrics of the best evaluations, if there were several
    pixels: EvaluationResult | None
    table: EmbeddingTable | None  # the newest
    facts: dict[str, Any]  # what it ran on, and how long

    @property
    def measured(self) -> dict[int, EvaluationResult]:
        """The evaluations that its results are: of the test split, or of validation classes if it has none."""
        return self.evaluations or self.validation

    @property
    def rows(self) -> dict[str, EvaluationResult]:
        """The available rows of the results table."""
        last = max(self.measured, default=0)
        rows = {
            "raw pixels": self.pixels,
            "before training": self.measured.get(0),
            "after training": self.measured[last] if last else None,
        }
        return {name: result for name, result in rows.items() if result is not None}


def read_run(run_directory: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: the folder does not exist, or a file in it is invalid.
    """
    if not is_folder(run_directory):
        raise ValueError(
            f"expected a run's folder, {run_directory} does not exist; train a run, or name another folder"
        )
    folder = RunFolder(run_directory)
    pixels_file = folder.evaluation("pixels")
    try:
        config = read_document(folder.config)
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise ValueError(f"{error}; copy the run again") from None
    return RunRecord(
        name=config.get("name") or run_directory.resolve().name,
        config=config,
        training=_training_lines(folder.metrics),
        evaluations=read_evaluations(run_directory),
        validation=read_evaluations(run_directory, of_validation=True),
        chosen=selected_rows(run_directory),
        pixels=EvaluationResult.from_json(read_file(pixels_file)) if mode_of(pixels_file) else None,
        table=_newest_table(list(by_step(folder.path / "embeddings", ".npz").values())),
        facts=_stored_facts(folder.facts),
    )


def format_table(run_directory: Path) -> str:
    """Format the available results of a run for the terminal: raw pixels, before training, after training, best."""
    run = read_run(run_directory)
    if not run.rows:
        return f"{run_directory} has no evaluation yet"
    results = {name: result.metrics for name, result in run.rows.items()}
    return format_metrics(results | run.chosen, with_map=_has_map(run))


def format_metrics(rows: Mapping[str, Mapping[str, float]], *, with_map: bool = False) -> str:
    """Format metrics by row name as a text table in percent: Recall@K, MAP@R, NMI, MAP if wanted; "-" if missing."""
    columns = _columns(rows.values(), with_map=with_map)
    width = max(len(name) for name in ["percent", *rows])
    lines = ["  ".join([f"{'percent':<{width}}", *(f"{label:>9}" for label in columns.values())])]
    for name, values in rows.items():
        cells = [f"{100 * values[key]:.2f}" if key in values else "-" for key in columns]
        aligned = [f"{cell:>{max(9, len(label))}}" for cell, label in zip(cells, columns.values(), strict=True)]
        lines.append("  ".join([f"{name:<{width}}", *aligned]))
    return "\n".join(lines)


def write_report(run_directory: Path, index: ShardIndex | None) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        run_directory: the run.
        index: the split that it was evaluated on, to show its images; None omits the galleries.

    Returns:
        The page's path.

    Raises:
        ValueError: the folder is not a run's.
    """
    run = read_run(run_directory)
    rows = run.rows
    results = {name: result.metrics for name, result in rows.items()} | run.chosen
    pictures, reason = _pictures(run, index)
    page = render(
        "report.html",
        name=run.name,
        rows=rows,
        results=results,
        columns=_columns(results.values(), with_map=_has_map(run)),
        names=name_metrics(key for result in rows.values() for key in result.metrics),
        facts=_facts(run),
        last_step=max(run.measured, default=0),
        is_held_out=not run.evaluations,
        class_set=_class_set(run, index) if rows else None,
        has_choice=BEST_ON_TEST in " ".join(run.chosen),
        num_looks=len(run.evaluations) - (0 in run.evaluations),
        pictures=pictures,
        reason=reason,
        verified=verification_part(rows),
        sizes=_class_sizes(rows),
        proxies=proxy_statistics(run_directory / "proxies"),
        charts=_charts(run),
        configuration=quoted(json.dumps(run.config, indent=2)) if run.config else None,
        makers=None if index is None else read_makers(index.root),
        **(_measured(list(rows.values())[-1]) if rows else {}),
    )
    path = RunFolder(run_directory).report
    publish_text(path, page)
    return path


def _measured(result: EvaluationResult) -> dict[str, Any]:
    """Return the page's data on the final evaluation and its protocol."""
    num_gallery = int(result.protocol.get("num", {}).get("gallery", result.num_images))  # images that were searched
    clustering = result.protocol.get("clustering")
    counted = (
        f"{result.num_images:,} images of {result.num_classes:,} classes, {result.num_queries:,} of them queries, "
        f"{num_gallery:,} searched"
    )
    entries = {"counts": counted, **result.protocol, "fingerprint": result.fingerprint}
    return {
        "result": result,
        "num_gallery": num_gallery,
        "num_seeds": len(clustering["seeds"]) if clustering else 0,
        "protocol": {
            name: _readable(value)
            for name, value in entries.items()
            if value is not None and name not in ("format", "num")
        },
    }


def _class_sizes(rows: Mapping[str, EvaluationResult]) -> dict[str, Any] | None:
    """Return the page's data on small and large classes, from the last result and beside it the others; None if all
    classes are of similar size.
    """
    results = list(rows.values())
    tables = []
    for name, groups in results[-1].class_sizes.items() if results else ():
        if len(groups) > 1:
            others = [{group.first: group for group in result.class_sizes.get(name, ())} for result in results]
            recalls = [[other.get(group.first) for other in others] for group in groups]
            tables.append({"of": name, "lines": list(zip(groups, recalls, strict=True))})
    return {"columns": list(rows), "tables": tables} if tables else None


# ---- images -------------------------------------------------------------------------------------


def _pictures(run: RunRecord, index: ShardIndex | None) -> tuple[dict[str, Any] | None, str]:
    """Return the page's data on images, or None and the reason."""
    rows = list(run.rows.values())
    if rows and not rows[-1].num_queries:
        return None, "Which images are of one class is known of listed pairs only."
    settings = run.config.get("data")
    if not run.evaluations and isinstance(settings, dict) and settings.get("test_split", "") is None:
        return None, "This run has no test split, so there are no images to retrieve."
    if run.table is None:
        return None, "No embeddings are stored for this run yet; they are written with the next evaluation."
    if index is None:
        return None, "The images of this run are not at hand; name their shards to see what it retrieves."
    try:
        gallery = _gallery_split(run, index)
        if _belongs_to(run.table, index, gallery):
            training = _training_split(run, index)
            return picture_parts(run.table, index, gallery=gallery, training=training), ""
    except ValueError as error:  # a damaged image must not prevent the rest of the page
        return None, f"The images cannot be shown: {error}"
    return None, (
        "These shards are not the ones that the run was evaluated on; name the right ones to see what it retrieves."
    )


def _belongs_to(table: EmbeddingTable, index: ShardIndex, gallery: ShardIndex | None) -> bool:
    """Whether the embeddings can be those of the splits, some of whose images may have been skipped."""
    ids_n, labels_n = table.ids.numpy(), table.labels.numpy()
    known = index.labels if gallery is None else np.concatenate([index.labels, gallery.labels])
    return bool(ids_n[-1] < len(known)) and np.array_equal(labels_n, known[ids_n])


def _gallery_split(run: RunRecord, index: ShardIndex) -> ShardIndex | None:
    """Open the split that the last evaluation searched; None if that was the split of its queries. Raises ValueError
    as `open_index`.
    """
    rows = list(run.rows.values())
    split = rows[-1].protocol.get("data", {}).get("gallery_split") if rows else None
    return None if split is None else index.open_sibling(split)


def _training_split(run: RunRecord, index: ShardIndex) -> ShardIndex | None:
    """Open the split that the run was trained on; None if it cannot be opened."""
    try:
        return index.open_sibling(run.config["data"]["train_split"])
    except (KeyError, TypeError, ValueError):
        return None


# ---- curves -------------------------------------------------------------------------------------


def _charts(run: RunRecord) -> list[Chart]:
    """Draw the available curves of the run."""
    losses = {
        "loss": "total",
        "classification": "classification",
        "regularization": "regularization",
    }
    if not any(line.get("regularization") for line in run.training):
        losses = {"loss": "total"}  # the other two would be equal to it and zero
    guess = [
        (line["step"], math.log(line["kept_classes"]))
        for line in run.training
        if isinstance(line.get("kept_classes"), int | float) and line["kept_classes"] >= 1
    ]
    rates = {"lr_backbone": "backbone", "lr_embedding": "embedding layer", "lr_proxies": "proxies"}
    norms = {"gradient_norm_backbone": "backbone", "gradient_norm_proxies": "proxies"}
    charts = [
        _evaluation_chart(run),
        line_chart("Loss", [*_training_series(run, losses), Series(_GUESS, guess, dashed=True)], x_label="steps"),
        line_chart("Learning rate", _training_series(run, rates), x_label="steps", logarithmic=True),
        line_chart("Gradient norm", _training_series(run, norms), x_label="steps", logarithmic=True),
    ]
    return [chart for chart in charts if chart is not None]


def _evaluation_chart(run: RunRecord) -> Chart | None:
    """Draw Recall@1, MAP@R and NMI over steps, if there are at least two evaluations."""
    if len(run.measured) < 2:
        return None
    columns = _columns(result.metrics for result in run.measured.values())
    lines = []
    for key in ("recall@1", "map@r", "nmi"):
        points = [(step, 100 * r.metrics[key]) for step, r in run.measured.items() if key in r.metrics]
        lines.append(Series(columns.get(key, key), points))
    if run.evaluations:
        held_out = [(s, 100 * r.metrics["recall@1"]) for s, r in run.validation.items() if "recall@1" in r.metrics]
        lines.append(Series("Recall@1 of validation classes", held_out))
    if run.pixels is not None and "recall@1" in run.pixels.metrics:
        level = 100 * run.pixels.metrics["recall@1"]
        ends = (min(run.measured), max(run.measured))
        lines.append(Series("Recall@1 of raw pixels", [(end, level) for end in ends], dashed=True))
    return line_chart("Evaluation, percent", lines, x_label="steps", markers=True)


def _training_series(run: RunRecord, names: Mapping[str, str]) -> list[Series]:
    return [
        Series(label, [(line["step"], line[key]) for line in run.training if isinstance(line.get(key), int | float)])
        for key, label in names.items()
    ]


# ---- small things -------------------------------------------------------------------------------


def _training_lines(path: Path) -> list[dict[str, Any]]:
    """Read the logged training steps in order; if a resumed run logged a step twice, the last line counts."""
    log = read_log(path, {"step": int, "kind": str})
    if log.odd:
        number, _, problem = log.odd[0]
        warnings.warn(f"{path}: {len(log.odd)} lines are skipped, the first is {number}: {problem}", stacklevel=2)
    by_step = {line["step"]: line for _, line in log.records if line["kind"] == "train"}
    return [by_step[step] for step in sorted(by_step)]


def _newest_table(paths: list[Path]) -> EmbeddingTable | None:
    """Read the embeddings of the newest evaluation; None if missing or damaged."""
    try:
        return load_table(paths[-1]) if paths else None
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def _columns(rows: Iterable[Mapping[str, float]], *, with_map: bool = False) -> dict[str, str]:
    """Return the main metrics of a table by key: Recall@K for all K, MAP@R, NMI, accuracy of pairs, MAP if wanted."""
    names, main = name_metrics(key for row in rows for key in row), (*_HEADLINE, *(("map",) if with_map else ()))
    return {name.key: name.label for name in names if name.key.startswith("recall@") or name.key in main}


def _has_map(run: RunRecord) -> bool:
    """Whether MAP is among the main metrics of a run, as in re-identification."""
    return any(result.is_across_cameras for result in run.rows.values())


def _class_set(run: RunRecord, index: ShardIndex | None) -> ClassSet | None:
    """How many of the evaluated classes were trained, as the result says; for one that does not, none if no class of
    the split has the id of a training class. None if that is unknown.
    """
    result = list(run.rows.values())[-1]
    training = None if result.class_set or index is None else _training_split(run, index)
    if training is None or index is None:
        return result.class_set
    shared = {entry.source_id for entry in training.classes} & {entry.source_id for entry in index.classes}
    return None if shared else ClassSet(0, result.num_classes)


def _stored_facts(path: Path) -> dict[str, Any]:
    """What a run ran on; nothing if that is not stored, as by earlier versions, or damaged."""
    try:
        return read_document(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: {error}", stacklevel=2)
        return {}


def _facts(run: RunRecord) -> dict[str, str]:
    """What the run was, as far as it is known: name of the fact -> value."""
    seconds, backbone, found = run.facts.get("seconds"), run.config.get("backbone"), {}
    if isinstance(seconds, dict) and all(isinstance(value, int | float) for value in seconds.values()):
        parts = [f"{name} {format_seconds(value)}" for name, value in seconds.items() if value >= 0.05]
        found["Duration"] = f"{format_seconds(math.fsum(seconds.values()))} ({', '.join(parts)})"
    rates = [line["images_per_second"] for line in run.training if "images_per_second" in line]
    if rates:
        found["Images per second"] = f"{statistics.median(rates):,.0f} in training, median"
    if "ranks" in run.facts:
        found["Ranks"] = f"{run.facts['ranks']} on {run.facts.get('device', 'unknown devices')}"
    if isinstance(backbone, dict) and "name" in backbone:
        size, trained = run.facts.get("parameters"), run.facts.get("trained_parameters")
        found["Backbone"] = f"{backbone['name']}{f', {size:,} parameters' if isinstance(size, int) else ''}"
        if isinstance(size, int) and isinstance(trained, int) and trained < size:
            found["Backbone"] += f" ({trained:,} of them trained)"
        if isinstance(backbone.get("embedding_dim"), int):
            found["Backbone"] += f", {backbone['embedding_dim']:,} dimensions"
    training = run.config.get("training")
    if isinstance(training, dict) and training.get("ema_decay") is not None:
        found["Evaluated weights"] = f"moving average, decay {training['ema_decay']}"
    if isinstance(run.facts.get("head"), str):
        found["Head"] = run.facts["head"]
    elif isinstance(run.facts.get("proxies"), int):
        found["Proxies"] = f"{run.facts['proxies']:,}"
    return found


def _readable(value: object) -> str:
    """Format a value of the protocol as one line."""
    match value:
        case Mapping():
            shown = ((name.replace("_", " "), entry) for name, entry in value.items() if entry is not None)
            return "; ".join(f"{name} {_readable(entry)}" for name, entry in shown)
        case list() | tuple():
            listed = ", ".join(_readable(entry) for entry in value[:_MAX_LISTED]) or "none"
            return listed if len(value) <= _MAX_LISTED else f"{listed} and {len(value) - _MAX_LISTED:,} more"
        case str() if re.fullmatch(r"[0-9a-f]{64}", value):
            return f"{value[:16]}…"
    return str(value)

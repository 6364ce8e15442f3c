"""The model card of an export, README.md as Hugging Face reads it: what the model is, how to load it, what it is worth.

A YAML head for programs, by huggingface_hub, then prose and tables: templates/model_card.md. Every number in it
comes from a file: metrics from the evaluation of the exported checkpoint, the rest from what the export itself says.
What is not known is said to be unknown; the licence is left to whoever publishes the folder.

Names of runs, data sets and splits are a user's text: what cannot be printed becomes a space, and every sign that
Markdown might read is escaped. Code blocks run in the folder; a test runs them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.metrics import name_metrics
from dist_proxygml.inference.export_check import LIMIT, FileCheck
from dist_proxygml.reporting.render import render
from dist_proxygml.storage.files import publish_text, read_file
from dist_proxygml.storage.folder import files_below
from dist_proxygml.storage.run_folder import RunFolder, step_name


class TrainingFacts(NamedTuple):
    """Facts from the class table of the training data; None after training on a stream."""

    num_images: int | None
    class_table_sha256: str | None
    index_sha256: str | None


class StoredEvaluation(NamedTuple):
    """An evaluation that a run has on disk."""

    step: int
    result: EvaluationResult


def find_evaluation(run_directory: Path, step: int) -> StoredEvaluation | None:
    """The evaluation of a step; if there is none, the newest of the run.

    Raises:
        ValueError: its file is something else.
    """
    steps = RunFolder(run_directory).evaluations()
    if not steps:
        return None
    chosen = step if step in steps else max(steps)
    try:
        return StoredEvaluation(chosen, EvaluationResult.from_json(read_file(steps[chosen])))
    except ValueError as error:
        raise ValueError(f"{steps[chosen]}: {error}") from None


def write_card(
    path: Path,
    about: Mapping[str, Any],
    *,
    facts: TrainingFacts,
    evaluation: StoredEvaluation | None,
    checks: Sequence[FileCheck],
) -> None:
    """Write the card of a folder whose other files, but for export.json, are there.

    Args:
        path: the card.
        about: what export.json will say.
        facts: of the training data.
        evaluation: of the exported step or, for want of one, another.
        checks: what --verify found; none without it.
    """
    measured = None if evaluation is None else evaluation.result
    data = {
        "settings": {},
        **about,
        "backbone": {**about["backbone"], "pretrained": _file_name(about["backbone"]["pretrained"])},
        "files": {name: _size((path.parent / name).stat().st_size) for name in sorted(files_below(path.parent))},
        "facts": facts,
        "result": measured,
        "evaluated_step": None if evaluation is None else evaluation.step,
        "evaluated_checkpoint": None if evaluation is None else step_name(evaluation.step),
        "names": [] if measured is None else name_metrics(measured.metrics),
        "checks": checks,
        "limit": LIMIT,
    }
    filters = {"printable": printable, "as_json": _json}
    body = render("model_card.md", escape=escape, filters=filters, **data)
    publish_text(path, f"---\n{_head(about, evaluation)}\n---\n\n{body}")


def _head(about: Mapping[str, Any], evaluation: StoredEvaluation | None) -> str:
    """Build the machine-readable metadata (YAML)."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if evaluation is not None and evaluation.step == about["step"]:
        result = evaluation.result
        data = result.protocol.get("data", {})
        dataset = printable(data.get("dataset") or "unknown")
        results = [
            EvalResult(
                task_type="image-retrieval",
                task_name="Image retrieval",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=printable(data.get("split") or "unknown"),
                metric_type=key,
                metric_name=f"{label}, percent",
                metric_value=round(100 * result.metrics[key], 3),
            )
            for key, label, _ in name_metrics(result.metrics)
        ]
    backbone = printable(about["backbone"]["name"])
    head = ModelCardData(
        library_name="dist_proxygml",
        pipeline_tag="image-feature-extraction",
        tags=[
            *("image-retrieval", "metric-learning"),
            *([] if "loss.name" in about.get("settings", {}) else ["proxygml"]),
            *(backbone, *about["formats"]),
        ],
        metrics=[result.metric_type for result in results] or None,
        model_name=printable(about["run"]) if results else None,
        eval_results=results or None,
    )
    return head.to_yaml()


# ---- text ------------------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """A user's text on one line; what cannot be printed is a space."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def escape(text: object) -> str:
    """A user's text for Markdown: every ASCII sign that could mean something has a backslash."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@:-])", r"\\\1", printable(text))


def _json(value: Any) -> str:
    """For a code block: JSON has no line that starts with a fence."""
    return json.dumps(value, indent=2, ensure_ascii=True)


def _file_name(pretrained: str | None) -> str | None:
    """Without the folders of the machine that it was trained on."""
    return pretrained if pretrained is None or pretrained.startswith("hf-hub:") else Path(pretrained).name


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"

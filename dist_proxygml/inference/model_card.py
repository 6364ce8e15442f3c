"""The model card of an export, README.md as Hugging Face reads it: what the model is, how to load it, what it is worth.

A YAML head for programs (its lists and strings are JSON, which YAML contains), then prose and tables. Every number in
it comes from a file: metrics from the evaluation of the exported checkpoint, the rest from what the export itself says.
What is not known is said to be unknown; a licence is left to whoever publishes the folder, as nobody has told us one.

Names of runs, data sets and splits are a user's text: what cannot be printed becomes a space, and every sign that
Markdown might read is escaped. Code blocks run in the folder; a test runs them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.checkpoint.folder import checkpoint_name
from dist_proxygml.data.shards import publish
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.metric_names import name_metrics
from dist_proxygml.inference.export_check import LIMIT, FileCheck
from dist_proxygml.storage.published import files_below

_ABOUT_FILES = {
    "backbone.safetensors": "the backbone's weights",
    "bank.safetensors": "the proxies, float32 [classes, proxies per class, D], not brought to length 1",
    "classes.jsonl": "a line for each row of the proxies: name, source id, number of training images",
    "backbone.onnx": "the backbone as one graph",
    "backbone.onnx.data": "its weights",
    "backbone.torchscript": "the backbone as one graph; a program, so load it only from those whom you trust",
}


class TrainingFacts(NamedTuple):
    """What the class table of the training data says; None after training on a stream."""

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
    steps = {
        int(found[1]): path
        for path in (run_directory / "evaluation").glob("step-*.json")
        if (found := re.fullmatch(r"step-(\d+)", path.stem))  # not those on other data
    }
    if not steps:
        return None
    chosen = step if step in steps else max(steps)
    try:
        return StoredEvaluation(chosen, EvaluationResult.from_json(steps[chosen].read_text(encoding="utf-8")))
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
    sections = [
        _head(about, evaluation),
        _summary(about),
        _files(path.parent),
        _use(about),
        _data(about, facts, evaluation),
        _evaluation(about, evaluation),
        _verification(about, checks),
        _limits(about),
        _versions(about),
    ]
    with publish(path) as stream:
        stream.write(("\n\n".join(sections) + "\n").encode("utf-8"))


# ---- parts -----------------------------------------------------------------------------------------------------------


def _head(about: Mapping[str, Any], evaluation: StoredEvaluation | None) -> str:
    name = printable(about["run"])
    entries: dict[str, Any] = {
        "library_name": "dist_proxygml",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "image-retrieval",
            "metric-learning",
            "proxygml",
            printable(about["backbone"]["name"]),
            *about["formats"],
        ],
    }
    if evaluation is not None and evaluation.step == about["step"]:
        result = evaluation.result
        data = result.protocol.get("data", {})
        dataset = printable(data.get("dataset") or "unknown")
        names = name_metrics(result.metrics)
        measured = [
            {"type": key, "name": f"{label}, percent", "value": round(100 * result.metrics[key], 3)}
            for key, label, _ in names
        ]
        task = {"type": "image-retrieval", "name": "Image retrieval"}
        where = {"type": dataset, "name": dataset, "split": printable(data.get("split") or "unknown")}
        entries["metrics"] = [key for key, _, _ in names]
        entries["model-index"] = [{"name": name, "results": [{"task": task, "dataset": where, "metrics": measured}]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(about: Mapping[str, Any]) -> str:
    backbone, size, width = about["backbone"], about["preprocessing"]["size"], about["embedding_dim"]
    return f"""# {escape(about["run"])}

An image retrieval model: an image becomes {width:,} numbers, a vector of length 1, and images of one class lie close to
each other. {escape(backbone["name"])} with a linear embedding layer, trained with the ProxyGML loss
([arXiv 2010.13636](https://arxiv.org/abs/2010.13636)) by dist_proxygml, step {about["step"]:,}, weights in
{about["precision"]}.

| | |
| --- | --- |
| input | uint8 RGB [b, 3, {size}, {size}], pixels as they are: scaling, mean and order of colours are in the network |
| output | float32 [b, {width}], rows of length 1; two images are as similar as their inner product is large |
| licence | not stated; whoever publishes this folder adds `license:` to the head of this file |

The backbone's settings:

```json
{_json({**backbone, "pretrained": _file_name(backbone["pretrained"])})}
```"""


def _files(folder: Path) -> str:
    rows = [
        f"| `{name}` | {_size((folder / name).stat().st_size)} | {_ABOUT_FILES.get(name, '')} |"
        for name in sorted(files_below(folder))
    ]
    rows.append("| `export.json` | | all settings and versions; bytes and sha256 of every other file |")
    return "\n".join(["## Files", "", "| file | size | |", "| --- | --- | --- |", *rows])


def _use(about: Mapping[str, Any]) -> str:
    parts = ["## Use", "", "The code below runs in this folder.", "", _preparation(about["preprocessing"])]
    if "onnx" in about["formats"]:
        parts += [
            "",
            f"With ONNX Runtime (operator set {about['opset']}); the size of the images is fixed, their number is not:",
            "",
            """```python
import onnxruntime

session = onnxruntime.InferenceSession("backbone.onnx", providers=["CPUExecutionProvider"])
embeddings = session.run(["embeddings"], {"images": images})[0]
similarities = embeddings @ embeddings.T
```""",
        ]
    if "torchscript" in about["formats"]:
        parts += [
            "",
            "With torch alone (torch.jit is deprecated in torch itself). Images of another size may be taken, and then "
            "give embeddings that nobody has checked:",
            "",
            """```python
import torch

model = torch.jit.load("backbone.torchscript")
with torch.inference_mode():
    embeddings = model(torch.from_numpy(images)).numpy()
similarities = embeddings @ embeddings.T
```""",
        ]
    if "safetensors" in about["formats"]:
        parts += [
            "",
            "With dist_proxygml, from the weights; `checkpoint.init_from` of a new run takes this folder as well:",
            "",
            """```python
import json
from pathlib import Path

import torch
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.config import BackboneConfig

about = json.loads(Path("export.json").read_text(encoding="utf-8"))
model = build_backbone(BackboneConfig.model_validate(about["backbone"]), load_pretrained=False).eval()
load_backbone(Path("."), model)
with torch.inference_mode():
    embeddings = model(torch.from_numpy(images)).numpy()
similarities = embeddings @ embeddings.T
```""",
        ]
    return "\n".join(parts)


def _preparation(preprocessing: Mapping[str, Any]) -> str:
    size = preprocessing["size"]
    settings = f"```json\n{_json(preprocessing)}\n```"
    match preprocessing["name"]:
        case "resize":
            words = f"The whole image, resized to {size} x {size} pixels by averaging areas"
            steps = f"""    is_whole = image.width == image.height and image.width % {size} == 0
    image = image.resize(({size}, {size}), Image.Resampling.BOX if is_whole else Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)"""
        case "center_crop":
            shorter = preprocessing["resize"]
            words = f"The shorter side resized to {shorter} pixels, then the central {size} x {size} square"
            steps = f"""    shorter = min(image.size)
    image = image.resize([{shorter} * side // shorter for side in image.size], Image.Resampling.BILINEAR)
    left, top = round((image.width - {size}) / 2), round((image.height - {size}) / 2)
    image = image.crop((left, top, left + {size}, top + {size}))  # black where it is too small
    return np.asarray(image).transpose(2, 0, 1)"""
        case _:
            words = "The run tested on images changed at random; the code below only resizes the whole image"
            steps = f"""    image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)"""
    return f"""{words}. In dist_proxygml it is this transform:

{settings}

With Pillow, to within a grey level or two:

```python
import numpy as np
from PIL import Image


def prepare(path):
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{steps}


images = np.stack([prepare(path) for path in ["first.png", "second.png"]])
```"""


def _data(about: Mapping[str, Any], facts: TrainingFacts, evaluation: StoredEvaluation | None) -> str:
    tested = {} if evaluation is None else evaluation.result.protocol.get("data", {})
    is_same_index = facts.index_sha256 is not None and facts.index_sha256 == tested.get("index_sha256")
    rows = [
        ("data set", escape(tested.get("dataset") or "not recorded") if is_same_index else "not recorded"),
        ("classes", f"{about['num_classes']:,}"),
        ("images", "a stream, not counted" if facts.num_images is None else f"{facts.num_images:,}"),
        ("sha256 of the shards' index", _code(facts.index_sha256)),
        ("sha256 of the class table", _code(facts.class_table_sha256)),
    ]
    return "\n".join(
        ["## Training data", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    )


def _evaluation(about: Mapping[str, Any], evaluation: StoredEvaluation | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nThis model was not evaluated."
    step, result = evaluation
    data = result.protocol.get("data", {})
    parts = ["## Evaluation", ""]
    if step != about["step"]:
        parts += [
            f"**This model, step {about['step']:,}, was not evaluated.** The numbers are of {checkpoint_name(step)} of "
            "the same run, the newest that was.",
            "",
        ]
    parts += ["| | percent | if every tie goes wrong, or right |", "| --- | --- | --- |"]
    for key, label, _ in name_metrics(result.metrics):
        spread = f" ± {100 * result.metrics[f'{key}_sd']:.2f} over seeds" if f"{key}_sd" in result.metrics else ""
        bounds = " to ".join(f"{100 * bound:.2f}" for bound in result.bounds.get(key, ()))
        parts.append(
            f"| {escape(label) if label == key else label} | {100 * result.metrics[key]:.2f}{spread} | {bounds} |"
        )
    gallery = data.get("gallery_split")
    searched = "all others of the split" if gallery is None else f"the images of the split {escape(gallery)}"
    parts += [
        "",
        f"Each image of the split is a query against {searched}: {result.num_queries:,} queries, {result.num_images:,} "
        f"images, {result.num_classes:,} classes. "
        f"{result.num_lone:,} images without another of their class to find are "
        f"no queries, {result.num_damaged:,} damaged ones are left out.",
        "",
        "| | |",
        "| --- | --- |",
        f"| data set | {escape(data.get('dataset') or 'not recorded')} |",
        f"| split | {escape(data.get('split') or 'not recorded')} |",
        f"| sha256 of the shards' index | {_code(data.get('index_sha256'))} |",
        f"| sha256 of the class table | {_code(data.get('class_table_sha256'))} |",
        f"| fingerprint of the protocol | {_code(result.fingerprint)} |",
        "",
        "Results of one fingerprint measure the same; of others `report compare` says what differs. The protocol:",
        "",
        f"```json\n{_json(result.protocol)}\n```",
    ]
    return "\n".join(parts)


def _verification(about: Mapping[str, Any], checks: Sequence[FileCheck]) -> str:
    if not checks:
        return "## Verification\n\nThe files were not compared with the checkpoint (`--verify`)."
    rows = []
    for check in checks:
        recalls = [
            "" if value is None else f"{100 * value:.2f}"
            for value in (check.recall_at_1, check.recall_at_1_exported, check.recall_difference)
        ]
        rows.append(f"| `{check.file}` | {check.precision} | {check.largest_difference:.1e} | {' | '.join(recalls)} |")
    return "\n".join(
        [
            "## Verification",
            "",
            f"The checkpoint in PyTorch and each file embedded {escape(about['verification']['images'])}. Neither an "
            f"embedding nor Recall@1 of these images (ties counted as right) differs by more than {LIMIT:g}:",
            "",
            "| file | precision | embeddings differ by | Recall@1 before, percent | exported | difference |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _limits(about: Mapping[str, Any]) -> str:
    size = about["preprocessing"]["size"]
    low_precision = about["precision"] != "float32" and set(about["formats"]) - {"safetensors"}
    precision = (
        f"\n- Training and evaluation ran in {about['precision']}, the graphs compute with the same weights in "
        "float32: their embeddings differ from those that were evaluated."
        if low_precision
        else ""
    )
    return f"""## Intended use and limits

- For finding images like a given one, also of classes that were not in training, among images like the training data.
- Similarities rank; they are no probabilities, and a threshold on them has to be chosen on data of your own.
- It has not been evaluated on other kinds of images or other preprocessing, nor for fairness between groups of people.
- Images of another size than {size} x {size} have to be resized first.{precision}"""


def _versions(about: Mapping[str, Any]) -> str:
    written = ", ".join(f"{name} {escape(found)}" for name, found in about["written_with"].items())
    return f"## Versions\n\nWritten with {written}."


# ---- text ------------------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """A user's text on one line; what cannot be printed is a space."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def escape(text: object) -> str:
    """A user's text for Markdown: every ASCII sign that could mean something has a backslash."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@:-])", r"\\\1", printable(text))


def _code(value: object) -> str:
    return "not recorded" if value is None else f"`{printable(value).replace('`', ' ')}`"


def _json(value: Any) -> str:
    """For a code block: JSON has no line that starts with a fence."""
    return json.dumps(value, indent=2, ensure_ascii=True)


def _file_name(pretrained: str | None) -> str | None:
    """Without the folders of the machine that it was trained on."""
    return None if pretrained is None else Path(pretrained).name


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"

"""What a run came to: a table for the terminal, and one HTML page for people.

    numbers before and after training -> what the model retrieves -> where it fails -> curves ->
    protocol and configuration

The page is one file: styles, curves (SVG) and thumbnails are inside, nothing is fetched and no
script runs. It is written from the run's folder alone, plus the images that the embeddings came
from; what a run does not have yet is a sentence on the page. Everything shown is recomputed from
the newest stored embeddings, in the exact order that the metrics use.

Run folder: config.json, metrics.jsonl, evaluation/{pixels,step-*}.json, embeddings/step-*.npz.
Dimension key: q queries, n images, K neighbours.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from dist_proxygml.evaluation.best import selected_rows
from dist_proxygml.evaluation.charts import Series, line_chart
from dist_proxygml.evaluation.embed import EmbeddingTable, load_table
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.evaluation.metrics import count_positives
from dist_proxygml.evaluation.ranking import first_positive_ranks, rank_neighbours
from dist_proxygml.evaluation.search import FlatIndex

NUM_NEIGHBOURS = 8  # shown for each query
NUM_QUERIES = 10  # shown at random, and as many of the worst
NUM_PAIRS = 9  # of confused classes
IMAGES_PER_CLASS = 4  # shown of each of a pair
MAX_EXAMINED = 5000  # queries looked at for the worst and for confusions
THUMBNAIL_SIDE = 128  # pixels at most


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run's folder says about it; parts that are not there are empty or None."""

    name: str
    config: dict[str, Any]
    training: list[dict[str, Any]]  # logged steps in order
    evaluations: dict[int, EvaluationResult]  # by step
    pixels: EvaluationResult | None
    table: EmbeddingTable | None  # the newest

    @property
    def rows(self) -> dict[str, EvaluationResult]:
        """The rows of the results table that the run has."""
        last = max(self.evaluations, default=0)
        rows = {
            "raw pixels": self.pixels,
            "before training": self.evaluations.get(0),
            "after training": self.evaluations[last] if last else None,
        }
        return {name: result for name, result in rows.items() if result is not None}


def read_run(run_directory: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: the folder does not exist, or a file in it is not what its name says.
    """
    if not run_directory.is_dir():
        raise ValueError(
            f"expected a run's folder, {run_directory} does not exist; train a run, or name another folder"
        )
    config_file, pixels_file = (
        run_directory / "config.json",
        run_directory / "evaluation" / "pixels.json",
    )
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    evaluations = {}
    for path in (run_directory / "evaluation").glob("step-*.json"):
        if step := re.fullmatch(r"step-(\d+)", path.stem):  # not those on other data
            evaluations[int(step[1])] = EvaluationResult.from_json(path.read_text())
    tables = sorted(
        (run_directory / "embeddings").glob("step-*.npz"),
        key=lambda path: int(path.stem.split("-")[1]),
    )
    return RunRecord(
        name=config.get("name") or run_directory.resolve().name,
        config=config,
        training=_training_lines(run_directory / "metrics.jsonl"),
        evaluations=dict(sorted(evaluations.items())),
        pixels=EvaluationResult.from_json(pixels_file.read_text()) if pixels_file.is_file() else None,
        table=load_table(tables[-1]) if tables else None,
    )


def format_table(run_directory: Path) -> str:
    """The results of a run for the terminal: raw pixels, before training, after training, the best ones to choose; as
    far as there are.
    """
    rows = read_run(run_directory).rows
    if not rows:
        return f"{run_directory} has no evaluation yet"
    return format_metrics({name: result.metrics for name, result in rows.items()} | selected_rows(run_directory))


def format_metrics(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by row name as a text table in percent: Recall@K, MAP@R and NMI; "-" where a row
    lacks one.
    """
    columns = _columns(rows.values())
    width = max(len(name) for name in ["percent", *rows])
    lines = ["  ".join([f"{'percent':<{width}}", *(f"{label:>9}" for label in columns.values())])]
    for name, values in rows.items():
        cells = [f"{100 * values[key]:9.2f}" if key in values else f"{'-':>9}" for key in columns]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def write_report(run_directory: Path, index: ShardIndex | None) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        run_directory: the run.
        index: the split that it was evaluated on, to show its images; None leaves the galleries
            out.

    Returns:
        The page's path.

    Raises:
        ValueError: the folder is not a run's.
    """
    run = read_run(run_directory)
    sections = [
        _header(run, index),
        *_galleries(run, index),
        _curves(run),
        _protocol(run),
        _footer(run, index),
    ]
    style = resources.files("dist_proxygml.evaluation").joinpath("report.css").read_text()
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(run.name)} - retrieval "
        f"report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
    path = run_directory / "report.html"
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


# ---- the numbers --------------------------------------------------------------------------------


def _header(run: RunRecord, index: ShardIndex | None) -> str:
    parts = [f'<header>\n<p class="eyebrow">Retrieval report</p>\n<h1>{escape(run.name)}</h1>']
    rows = run.rows
    if not rows:
        parts.append(
            '<p class="lead">This run has not been evaluated yet, so there are no numbers and no retrieved images.</p>'
        )
        return "\n".join([*parts, "</header>"])
    result = list(rows.values())[-1]
    last = max(run.evaluations, default=0)
    unseen = ", none of them seen in training" if index is not None and _classes_are_unseen(run, index) else ""
    trained = f"After {last:,} training steps, every" if last else "Every"
    lone = (
        f" {_count(result.num_lone, 'image has', 'images have')} no other of their class and only distract."
        if result.num_lone
        else ""
    )
    parts.append(
        f'<p class="lead">{trained} one of {result.num_images:,} images of '
        f"{result.num_classes:,} classes{unseen}, "
        f"looks for its own class among all the others.{lone}</p>"
    )
    return "\n".join([*parts, _results_table(rows), _reading_aid(result), "</header>"])


def _results_table(rows: Mapping[str, EvaluationResult]) -> str:
    columns = _columns(result.metrics for result in rows.values())
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns.values())
    body = []
    for name, result in rows.items():
        cells = []
        for key in columns:
            deviation = result.metrics.get(f"{key}_sd")
            spread = f" <small>± {100 * deviation:.1f}</small>" if deviation else ""
            cells.append(f"<td>{100 * result.metrics[key]:.1f}{spread}</td>" if key in result.metrics else "<td>-</td>")
        kind = ' class="after"' if name == "after training" else ""
        body.append(f'<tr{kind}><th scope="row">{escape(name.capitalize())}</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll"><table class="results">'
        f'<thead><tr><th scope="col">Percent</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _reading_aid(result: EvaluationResult) -> str:
    low, high = (f"{100 * bound:.2f}" for bound in result.recall_at_1_bounds)
    ties = (
        "Ties do not touch Recall@1. "
        if low == high
        else f"With all ties gone wrong or right, Recall@1 is {low} or {high}. "
    )
    clustering = result.protocol.get("clustering")
    seeds = len(clustering["seeds"]) if clustering else 0
    nmi = (
        f"NMI compares the classes with k-means clusters: mean and deviation of {_count(seeds, 'run', 'runs')}."
        if seeds
        else ""
    )
    return (
        '<p class="quiet">Recall@K is the share of queries with a right answer among the first K. '
        "MAP@R also counts how many of a query's right answers come first, and how early. "
        f"{ties}{nmi}</p>"
    )


# ---- the images ---------------------------------------------------------------------------------


class _Gallery(NamedTuple):
    """What the galleries are made of."""

    split: ShardIndex
    images: ShardImages
    embeddings: np.ndarray  # float32 [n, D]
    labels: np.ndarray  # int64 [n]
    ids: np.ndarray  # int64 [n]: the rows' positions in the split's index
    search: FlatIndex

    def thumbnail(self, row: int, *, description: str) -> str:
        data = _thumbnail_data(self.images, int(self.ids[row]))
        return f'<img src="{data}" alt="{escape(description, quote=True)}">'

    def class_name(self, image_id: int) -> str:
        return self.split.classes[int(self.labels[image_id])].name

    def neighbours(self, query_ids: np.ndarray, num_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
        ranking = rank_neighbours(
            self.search,
            self.embeddings[query_ids],
            query_ids=query_ids,
            num_neighbours=min(num_neighbours, len(self.labels) - 1),
        )
        return ranking.ids, ranking.scores


def _galleries(run: RunRecord, index: ShardIndex | None) -> list[str]:
    """Random queries, worst queries, confused classes; or one sentence on why they are not there."""
    if run.table is None:
        reason = "No embeddings are stored for this run yet; they are written with the next evaluation."
    elif index is None:
        reason = "The images of this run are not at hand; name their shards to see what it retrieves."
    elif not _belongs_to(run.table, index):
        reason = (
            "These shards are not the ones that the run was evaluated on; name the right ones to see what it retrieves."
        )
    else:
        try:
            return _galleries_of(run.table, index)
        except ValueError as error:  # a damaged image must not cost the rest of the page
            reason = f"The images cannot be shown: {error}"
    return [f'<section>\n<h2>What it retrieves</h2>\n<p class="quiet">{escape(reason)}</p>\n</section>']


def _belongs_to(table: EmbeddingTable, index: ShardIndex) -> bool:
    """Whether the embeddings can be those of a split, some of whose images may have been left out."""
    ids_n, labels_n = table.ids.numpy(), table.labels.numpy()
    return bool(ids_n[-1] < index.num_samples) and np.array_equal(labels_n, index.labels[ids_n])


def _galleries_of(table: EmbeddingTable, index: ShardIndex) -> list[str]:
    embeddings_nD, labels_n = table.embeddings.numpy(), table.labels.numpy()
    images = ShardImages(index, Resize(THUMBNAIL_SIDE))
    gallery = _Gallery(index, images, embeddings_nD, labels_n, table.ids.numpy(), FlatIndex(embeddings_nD))
    queries = np.flatnonzero(count_positives(labels_n))
    shuffled = np.random.default_rng(0).permutation(queries)
    examined = np.sort(shuffled[:MAX_EXAMINED])
    positions = first_positive_ranks(embeddings_nD, labels_n, query_ids=examined)
    position_of = dict(zip(examined.tolist(), positions.tolist(), strict=True))
    worst = examined[np.lexsort((examined, -positions))]
    worst = worst[[position_of[int(query)] > 1 for query in worst]][:NUM_QUERIES]
    scope = "" if len(examined) == len(queries) else f" among {len(examined):,} random ones"

    at_random = (
        "<section>\n<h2>What it retrieves</h2>\n"
        f"<p>Random queries, left, and the {NUM_NEIGHBOURS} images nearest to each. A green frame "
        "with ✓ is the query's class, "
        f"a red one with ✗ is another, named below it.{_why_red(labels_n[queries])}</p>\n"
        + "\n".join(_retrieval(gallery, shuffled[:NUM_QUERIES], position_of))
        + "\n</section>"
    )
    at_worst = (
        f"<section>\n<h2>Where it fails</h2>\n<p>The queries{scope} whose first right answer comes "
        "latest.</p>\n"
        + (
            "\n".join(_retrieval(gallery, worst, position_of))
            or "<p>None: the first answer is right for all of them.</p>"
        )
        + "\n</section>"
    )
    return [at_random, at_worst, _confusions(gallery, examined)]


def _why_red(labels_q: np.ndarray) -> str:
    """A sentence for data whose classes are smaller than a row, where even a perfect model shows red."""
    sizes = np.unique(labels_q, return_counts=True)[1]
    if sizes.max() > NUM_NEIGHBOURS:
        return ""
    span = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    return f" A class has {span} images here, so every row has some red."


def _retrieval(gallery: _Gallery, query_ids: np.ndarray, position_of: Mapping[int, int]) -> Iterable[str]:
    """One row a query: the query, then its neighbours."""
    if not len(query_ids):
        return
    num_positives_n = count_positives(gallery.labels)
    ids_qK, scores_qK = gallery.neighbours(query_ids, NUM_NEIGHBOURS)
    for query, ids_K, scores_K in zip(query_ids.tolist(), ids_qK, scores_qK, strict=True):
        right_K = gallery.labels[ids_K] == gallery.labels[query]
        name = gallery.class_name(query)
        found = f"{int(right_K.sum())} of {int(num_positives_n[query])} found"
        position = position_of.get(query)
        if position is not None and position > len(ids_K):
            found = f"first right answer<br>at {position:,}"
        asked = gallery.thumbnail(query, description=f"query: {name}")
        tiles = []
        for neighbour, score, right in zip(ids_K.tolist(), scores_K, right_K, strict=True):
            other = gallery.class_name(neighbour)
            kind, mark = ("right", "✓") if right else ("wrong", "✗")
            caption = "" if right else f"<figcaption>{escape(other)}</figcaption>"
            described = f"{other}, similarity {score:.2f}"
            picture = gallery.thumbnail(neighbour, description=f"{kind}: {described}")
            tiles.append(
                f'<figure class="tile {kind}" title="{escape(described, quote=True)}">{picture}'
                f'<span class="mark" aria-hidden="true">{mark}</span>{caption}</figure>'
            )
        yield (
            f'<div class="retrieval"><div class="query">{asked}'
            f"<div><b>{escape(name)}</b><span>{found}</span></div></div>"
            f'<div class="neighbours">{"".join(tiles)}</div></div>'
        )


def _confusions(gallery: _Gallery, examined: np.ndarray) -> str:
    """The pairs of classes that most often are each other's first answer."""
    first_q = np.concatenate(
        [gallery.neighbours(examined[start : start + 256], 1)[0][:, 0] for start in range(0, len(examined), 256)]
    )
    query_labels, answer_labels = gallery.labels[examined], gallery.labels[first_q]
    wrong = query_labels != answer_labels
    pairs = Counter(
        (min(a, b), max(a, b)) for a, b in zip(query_labels[wrong].tolist(), answer_labels[wrong].tolist(), strict=True)
    )
    most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]
    if not most:
        return ""
    cards = []
    for (first, second), count in most:
        num_queries = int(np.isin(query_labels, [first, second]).sum())
        rows = "".join(
            f"<div>{_class_images(gallery, label)}<b>{escape(gallery.split.classes[label].name)}</b></div>"
            for label in (first, second)
        )
        cards.append(
            f'<div class="pair">{rows}<p>{count} of {num_queries} queries find the other class first</p></div>'
        )
    return (
        "<section>\n<h2>Which classes it confuses</h2>\n<p>The pairs that most often are each "
        "other's first answer.</p>\n"
        f'<div class="pairs">{"".join(cards)}</div>\n</section>'
    )


def _class_images(gallery: _Gallery, label: int) -> str:
    name = gallery.split.classes[label].name
    shown = np.flatnonzero(gallery.labels == label)[:IMAGES_PER_CLASS]
    return "".join(gallery.thumbnail(int(image_id), description=name) for image_id in shown)


def _thumbnail_data(images: ShardImages, image_id: int) -> str:
    """An image as a data URL, PNG or JPEG, whichever is smaller."""
    image = Image.fromarray(images.image(image_id).permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    candidates = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        candidates.append((len(stream.getvalue()), kind, stream.getvalue()))
    _, kind, payload = min(candidates)
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode('ascii')}"


# ---- curves, protocol, configuration ------------------------------------------------------------


def _curves(run: RunRecord) -> str:
    losses = {
        "loss": "total",
        "classification": "classification",
        "regularization": "regularization",
    }
    if not any(line.get("regularization") for line in run.training):
        losses = {"loss": "total"}  # the other two lines would be this one and zero
    rates = {"lr_backbone": "backbone", "lr_embedding": "embedding layer", "lr_proxies": "proxies"}
    norms = {"gradient_norm_backbone": "backbone", "gradient_norm_proxies": "proxies"}
    charts = [
        _evaluation_chart(run),
        line_chart("Loss", _training_series(run, losses), x_label="steps"),
        line_chart("Learning rate", _training_series(run, rates), x_label="steps", logarithmic=True),
        line_chart("Gradient norm", _training_series(run, norms), x_label="steps", logarithmic=True),
    ]
    drawn = "".join(charts) or '<p class="quiet">No training steps have been logged yet.</p>'
    return f'<section>\n<h2>How it got there</h2>\n<div class="charts">{drawn}</div>\n</section>'


def _evaluation_chart(run: RunRecord) -> str:
    """Recall@1, MAP@R and NMI over the steps, once there are two evaluations to connect."""
    if len(run.evaluations) < 2:
        return ""
    columns = _columns(result.metrics for result in run.evaluations.values())
    lines = []
    for key in ("recall@1", "map@r", "nmi"):
        points = [(step, 100 * r.metrics[key]) for step, r in run.evaluations.items() if key in r.metrics]
        lines.append(Series(columns.get(key, key), points))
    if run.pixels is not None and "recall@1" in run.pixels.metrics:
        level = 100 * run.pixels.metrics["recall@1"]
        ends = (min(run.evaluations), max(run.evaluations))
        lines.append(Series("Recall@1 of raw pixels", [(end, level) for end in ends], dashed=True))
    return line_chart("Evaluation, percent", lines, x_label="steps", markers=True)


def _training_series(run: RunRecord, names: Mapping[str, str]) -> list[Series]:
    return [
        Series(label, [(line["step"], line[key]) for line in run.training if line.get(key) is not None])
        for key, label in names.items()
    ]


def _protocol(run: RunRecord) -> str:
    parts = ["<section>\n<h2>How it was measured</h2>"]
    if run.rows:
        result = list(run.rows.values())[-1]
        counted = (
            f"{result.num_images:,} images of {result.num_classes:,} classes, {result.num_queries:,} of them queries"
        )
        entries = {"counts": counted, **result.protocol, "fingerprint": result.fingerprint}
        listed = "".join(
            f"<dt>{escape(name.replace('_', ' ').capitalize())}</dt><dd>{escape(_readable(value))}</dd>"
            for name, value in entries.items()
            if value is not None and name != "format"
        )
        parts.append(f"<dl>{listed}</dl>")
    else:
        parts.append('<p class="quiet">It has not been measured yet.</p>')
    if run.config:
        text = escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>Configuration of the run</summary><pre>{text}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _footer(run: RunRecord, index: ShardIndex | None) -> str:
    makers = "" if index is None else _attribution(index.root)
    return f"<footer>{makers}<p>Written by dist_proxygml from the run's folder.</p></footer>"


def _attribution(root: Path) -> str:
    """The makers of the images, where the shards' folder names them: pictures must not travel without them."""
    path = root / "ATTRIBUTION.md"
    if not path.is_file():
        return ""
    text = escape(path.read_text())
    return f"<details><summary>The makers of these images</summary><pre>{text}</pre></details>"


# ---- small things -------------------------------------------------------------------------------


def _training_lines(path: Path) -> list[dict[str, Any]]:
    """The logged training steps in order; where a resumed run logged a step again, the last line counts."""
    if not path.is_file():
        return []
    by_step = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a crash
            continue
        if line.get("kind") == "train":
            by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def _columns(rows: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """The metrics that a table shows, by their key: Recall@K for all K that occur, MAP@R, NMI."""
    found = {key for row in rows for key in row}
    recalls = sorted(
        (key for key in found if re.fullmatch(r"recall@\d+", key)),
        key=lambda key: int(key.split("@")[1]),
    )
    labels = {key: key.replace("recall", "Recall") for key in recalls} | {
        "map@r": "MAP@R",
        "nmi": "NMI",
    }
    return {key: label for key, label in labels.items() if key in found}


def _classes_are_unseen(run: RunRecord, index: ShardIndex) -> bool:
    """Whether no class of the split has the id of a training class. False when that cannot be found out."""
    try:
        training = index.open_sibling(run.config["data"]["train_split"])
    except (KeyError, TypeError, ValueError):
        return False
    return not {entry.source_id for entry in training.classes} & {entry.source_id for entry in index.classes}


def _readable(value: object) -> str:
    """A value of the protocol as one line of text."""
    match value:
        case Mapping():
            shown = ((name.replace("_", " "), entry) for name, entry in value.items() if entry is not None)
            return "; ".join(f"{name} {_readable(entry)}" for name, entry in shown)
        case list() | tuple():
            return ", ".join(_readable(entry) for entry in value)
        case str() if re.fullmatch(r"[0-9a-f]{64}", value):
            return f"{value[:16]}…"
    return str(value)


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"

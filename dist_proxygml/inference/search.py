"""Queries to the images of an index that are most like them, as a table, as JSON or as a page.

The model is the one that made the index; its weights must be the same, since scores of different models do not compare.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from dist_proxygml.cli import printable
from dist_proxygml.data.order import evaluation_batches
from dist_proxygml.data.sources import FolderSource, ImageRecord, ImageSource, OnBad, open_source, read_image
from dist_proxygml.inference.embedder import Embedder, loading_processes, model_difference
from dist_proxygml.inference.retrieval_index import Index
from dist_proxygml.inference.search_page import Row, Tile, write_page
from dist_proxygml.reporting.render import read_makers
from dist_proxygml.storage.files import publish_text
from dist_proxygml.storage.run_folder import RunFolder, step_name

_SAME_SCORE = 0.999  # at least, of two embeddings of the same pixels: rounding makes less than 1e-5
_QUERIES_OF_A_PAGE = 100
_PRECISION = 0.95  # answers are doubtful below the score from which on so many are right


class Doubt(NamedTuple):
    """The score below which answers are doubtful, as the index measured it."""

    below: float  # above any score where none is good enough
    precision: float  # from there on, as wanted
    sentence: str


class Match(NamedTuple):
    """An image of the gallery."""

    score: float
    record: ImageRecord


class Answer(NamedTuple):
    """Matches of a query."""

    query: Path
    matches: list[Match]  # as near as was asked for
    nearest: Match | None  # of all; None where the index has nothing else than the query


def score_for(index: Index, path: Path, precision: float) -> float:
    """The lowest score from which on so many answers were right when scores were measured.

    Raises:
        ValueError: they were not measured, or no score is good enough.
    """
    if index.scores is None:
        raise ValueError(
            f"expected an index with measured scores for --precision, {path} has none: its rows have no class labels, "
            "or it was built before scores were measured; build it again (`python -m dist_proxygml.index`) from "
            "labelled embeddings or with --scores-from, or choose a --min-score"
        )
    found = index.scores.lowest_for(precision)
    if found is None:
        best = index.scores.best
        raise ValueError(
            f"expected a --precision that some score of {path} reaches, got {precision:g}; the most is "
            f"{best.precision:.4f}, from a score of {best.score:.4f} on"
        )
    return found.score


def doubt_about(index: Index, *, precision: float | None = None, min_score: float | None = None) -> Doubt | None:
    """The score below which answers are doubtful: less than `precision` (0.95) of those from there on were right. None
    where scores were not measured. The sentence also says what a `min_score` gave.
    """
    table, wanted = index.scores, precision or _PRECISION
    if table is None:
        return None
    found, chosen = table.lowest_for(wanted), None if min_score is None else table.at(min_score)
    if found is None:
        text = (
            f"All answers are doubtful: {table.best.precision:.1%} were right at best, from {table.best.score:.4f} on"
        )
    else:
        text = (
            f"Answers below {found.score:.4f} are doubtful: from there on {found.precision:.1%} were right, "
            f"{found.recall:.1%} of the right ones"
        )
    if chosen is not None:
        text += f"; from {min_score} on {chosen.precision:.1%} were right, {chosen.recall:.1%} of the right ones"
    return Doubt(
        2.0 if found is None else found.score, wanted, f"{text} (measured on {table.measured_on} when it was indexed)."
    )


def query_paths(images: Sequence[Path]) -> list[Path]:
    """The image files that are named, and those in the folders that are named."""
    paths = []
    for path in images:
        if path.is_dir():
            paths += [path / name for name in FolderSource.of_folder(path).names]
        elif path.is_file():
            paths.append(path)
        else:
            raise ValueError(f"expected an image or a folder at {path}, found nothing; correct the path")
    return paths


def open_model(index: Index, path: Path, *, run: Path | None = None, device: str = "auto") -> Embedder:
    """The model that the embeddings of an index were made with: where it was then, or in `run`.

    Raises:
        ValueError: it is not there, or it is another one.
    """
    model = index.model
    if model is None or any(model.get(name) is None for name in ("path", "run", "step")):
        if run is None:
            raise ValueError(f"{path} does not say which model it was made with; name it with --run")
        embedder = Embedder.from_run(run, device=device)
        if embedder.embedding_dim != index.embedding_dim:
            raise ValueError(
                f"{path} holds embeddings of dimension {index.embedding_dim}, the model in {run} makes those of "
                f"dimension {embedder.embedding_dim}; name the right one with --run"
            )
        return embedder
    called = f"{model.get('run')}, step {model.get('step')}"
    checkpoint = None
    if run is not None and (RunFolder(run).checkpoints / step_name(model["step"])).is_dir():
        checkpoint = step_name(model["step"])
    try:
        embedder = Embedder.from_run(run or model["path"], device=device, checkpoint=checkpoint)
    except ValueError as error:
        if run is not None:
            raise
        raise ValueError(
            f"the model of {path} ({called}) cannot be opened where it was: {error}; name a run, a checkpoint or an "
            "export that has it with --run"
        ) from None
    difference = model_difference(model, embedder.about)
    if difference is not None:
        raise ValueError(
            f"{path} was made with {called}, but {embedder.about['path']} ({embedder.about['run']}, step "
            f"{embedder.about['step']}) has other {difference}: their scores do not compare; name the right model with "
            "--run, or embed and index the images again"
        )
    return embedder


def find(
    index: Index,
    embedder: Embedder,
    queries: Sequence[Path],
    *,
    k: int = 10,
    min_score: float | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    on_bad: OnBad = "fail",
    gallery: ImageSource | None = None,
) -> list[Answer]:
    """The k nearest images to each query, without those of a lower score; with `gallery`, the images of the index, also
    without those that have the very pixels of the query: itself, and copies of it.

    Raises:
        ValueError: a query cannot be used (with "fail"), or none can; or an image of the gallery is to be compared and
            is not at hand.
    """
    loader = FolderSource(Path(), [str(path) for path in queries]).loader(
        embedder.transform,
        evaluation_batches(len(queries), batch_size=batch_size or embedder.batch_size),
        num_workers=loading_processes(len(queries), num_workers),
        on_bad=on_bad,
    )
    answers = []
    with tqdm(total=len(queries), desc="searching", unit=" images", delay=2.0, mininterval=0.5) as bar:
        for batch in loader:
            for damage in batch.damaged:
                bar.write(printable(f"skipped: {damage.image}: {damage.reason}"), file=sys.stderr)
            paths = [queries[number] for number in batch.ids.tolist()]
            rows_bD = embedder.embed_prepared(batch.images, names=[str(path) for path in paths])
            if gallery is None:
                lists = _nearest(index, rows_bD, k)
            else:
                lists = [
                    _others(index, row_D, k, query=p, gallery=gallery) for p, row_D in zip(paths, rows_bD, strict=True)
                ]
            for path, found in zip(paths, lists, strict=True):
                matches = [match for match in found if min_score is None or match.score >= min_score]
                answers.append(Answer(path, matches, found[0] if found else None))
            bar.update(len(paths) + len(batch.damaged))
    if not answers:
        raise ValueError(f"none of the {len(queries)} images can be used")
    return answers


def _nearest(index: Index, rows_qD: Float[np.ndarray, "q D"], k: int) -> list[list[Match]]:
    result = index.search(rows_qD, k)
    return [
        [Match(score, index.records[row]) for score, row in zip(scores, rows, strict=True)]
        for scores, rows in zip(result.scores.tolist(), result.rows.tolist(), strict=True)
    ]


def _others(index: Index, row_D: Float[np.ndarray, " D"], k: int, *, query: Path, gallery: ImageSource) -> list[Match]:
    """The k nearest images that have other pixels than the query, all of them if there are fewer."""
    wanted, pixels = k, read_image(query)

    def is_other(match: Match) -> bool:
        try:
            return match.score < _SAME_SCORE or not torch.equal(gallery.image(match.record), pixels)
        except ValueError as error:
            raise ValueError(f"{error}; --exclude-self compares it with {query}") from None

    while True:
        wanted = min(2 * wanted, len(index))
        others = [match for match in _nearest(index, row_D[None], wanted)[0] if is_other(match)]
        if len(others) >= k or wanted == len(index):
            return others[:k]


def as_table(answer: Answer, min_score: float | None) -> str:
    """A line for the query and one for each image found."""
    if not answer.matches:
        return _nothing(answer, min_score)
    lines = [_in_one_line(str(answer.query))]
    for rank, (score, record) in enumerate(answer.matches, start=1):
        name = "" if record.class_name is None else f"  {_in_one_line(record.class_name)}"
        lines.append(f"{rank:4d}  {score:8.5f}  {_in_one_line(record.id)}{name}")
    return "\n".join(lines)


def _in_one_line(text: str) -> str:
    """Newlines and control characters as Python writes them."""
    return printable(text).replace("\n", "\\n")


def _nothing(answer: Answer, min_score: float | None) -> str:
    query = _in_one_line(str(answer.query))
    if answer.nearest is None:
        return f"{query}: the index holds nothing else"
    score, record = answer.nearest
    near = _in_one_line(record.id)
    return f"{query}: nothing with a score of {min_score} or more; the nearest is {near} with {score:.5f}"


def as_json(index: Index, path: Path, answers: Sequence[Answer], doubt: Doubt | None = None) -> dict[str, Any]:
    """Results for programs, as a JSON object."""
    return {
        "index": str(path),
        "doubtful_below": None if doubt is None else doubt.below,
        "precision": None if doubt is None else doubt.precision,
        "kind": index.kind,
        "model": None if index.model is None else {name: index.model.get(name) for name in ("run", "step")},
        "queries": [_query_as_json(answer) for answer in answers],
    }


def _query_as_json(answer: Answer) -> dict[str, Any]:
    matches = [
        {"rank": rank, "score": score, **json.loads(record.to_json())}
        for rank, (score, record) in enumerate(answer.matches, start=1)
    ]
    return {"query": str(answer.query), "matches": matches}


def write_file(path: Path, answers: Sequence[Answer]) -> None:
    """Publish the answers atomically: to a .jsonl file a line for each query, as in `as_json`; to a .csv file a
    row for each image found, and one without rank where nothing was.
    """
    text = io.StringIO()
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(_query_as_json(answer), ensure_ascii=False) + "\n" for answer in answers)
    else:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["query", "rank", "score", "id", "label", "class_name"])
        for answer in answers:
            rows.writerows(
                [answer.query, rank, f"{score:.5f}", record.id, record.label, record.class_name]
                for rank, (score, record) in enumerate(answer.matches, start=1)
            )
            if not answer.matches:
                rows.writerow([answer.query, *[""] * 5])
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, text.getvalue())


def write_answers(
    page: Path,
    index: Index,
    path: Path,
    answers: Sequence[Answer],
    *,
    data: str | None,
    min_score: float | None,
    doubt: Doubt | None = None,
) -> None:
    """Write a page of the queries and what was found for them, and further ones (found-2.html, ...) for more than a
    hundred; `data` says where the images of the index at `path` lie now.
    """
    gallery = open_gallery(index, data)

    def tile(match: Match) -> Tile:
        pixels = None
        if gallery is not None:
            try:
                pixels = gallery.image(match.record)
            except ValueError as error:
                print(f"not at hand: {printable(error)}", file=sys.stderr)
        is_doubtful = doubt is not None and match.score < doubt.below
        return Tile(match.record.id, pixels, match.score, match.record.class_name, is_doubtful)

    model = "" if index.model is None else f" by {index.model.get('run')}, step {index.model.get('step')}"
    lead = f"Searched among {len(index):,} images, embedded{model}. Numbers are cosines: 1 is the same embedding."
    lead += "" if doubt is None else f" {doubt.sentence}"
    num_pages = math.ceil(len(answers) / _QUERIES_OF_A_PAGE)
    names = [page.name, *(f"{page.stem}-{number}{page.suffix}" for number in range(2, num_pages + 1))]
    for number, name in enumerate(names):
        rows = [
            Row(
                Tile(answer.query.name, read_image(answer.query)),
                [tile(match) for match in answer.matches],
                "" if answer.matches else _nothing(answer, min_score),
            )
            for answer in answers[number * _QUERIES_OF_A_PAGE : (number + 1) * _QUERIES_OF_A_PAGE]
        ]
        write_page(
            page.with_name(name),
            rows,
            title=f"Nearest images in {path.name}",
            lead=lead,
            makers=read_makers(data or (index.data or {}).get("location")),
            pages=names,
        )
    print(f"page: {page.resolve()}{f' and {num_pages - 1} more' if num_pages > 1 else ''}", file=sys.stderr)


def open_gallery(index: Index, typed: str | None) -> ImageSource | None:
    """Source of the images of the index; None, with a warning, if they are not available."""
    try:
        return find_gallery(index, typed)
    except ValueError as error:
        warning = (
            f"the page will lack the images that were found: {printable(error)[:1000]}; --data says where they are"
        )
        print(warning, file=sys.stderr)
        return None


def find_gallery(index: Index, typed: str | None) -> ImageSource:
    """Source of the images of the index.

    Raises:
        ValueError: they are not available.
    """
    data = index.data or {}
    location = typed or data.get("location")
    if location is None:
        raise ValueError("the index does not say where they are")
    try:
        if typed is None and data.get("kind") == "folder" and Path(location).is_dir():
            return FolderSource(Path(location), ())  # no walk through whatever folder an index names
        return open_source(location, split=data.get("split", "test"), is_typed=typed is not None)
    except OSError as error:  # a location that is too long for a path
        raise ValueError(str(error)) from None

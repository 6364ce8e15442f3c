"""Find images like one: `python -m dist_proxygml.search --index indexes/photos bird.jpg`.

The model is the one that made the index; its weights must be the same, since scores of different models do not compare.
Scores are cosines, 1 for an image with the same embedding.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_proxygml.cli import at_least, cosine, printable, refuse, run_command
from dist_proxygml.embed import add_model_options

if TYPE_CHECKING:
    from dist_proxygml.data.sources import ImageRecord, ImageSource
    from dist_proxygml.inference.embedder import Embedder
    from dist_proxygml.inference.retrieval_index import Index

EXAMPLES = """examples:
  python -m dist_proxygml.search --index indexes/photos bird.jpg -k 5
  python -m dist_proxygml.search --index indexes/photos queries --min-score 0.6 --html found.html
  python -m dist_proxygml.search --index indexes/photos a.jpg b.jpg --json
"""


class Match(NamedTuple):
    """An image of the gallery."""

    score: float
    record: "ImageRecord"


class Answer(NamedTuple):
    """What was found for a query."""

    query: Path
    matches: list[Match]  # as near as was asked for
    nearest: Match  # of all


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, search, print what was found; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.search",
        description="Find the images of an index that are most like given ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--index", required=True, type=Path, help="folder that dist_proxygml.index wrote")
    parser.add_argument("-k", type=at_least(1), default=10, metavar="N", help="images to find for each (default: 10)")
    parser.add_argument("--min-score", type=cosine, metavar="S", help="leave out what has a lower score, -1 to 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the images")
    parser.add_argument("--run", type=Path, help="run, checkpoint or export with the model (default: where it was)")
    parser.add_argument("--data", help="where the images of the index lie now, for --html (default: where they were)")
    parser.add_argument(
        "--on-bad",
        choices=("fail", "skip"),
        default="fail",
        help="a query that cannot be read: fail and name it (default), or go on without it",
    )
    parser.add_argument("--verify", action="store_true", help="compare every byte of the index with its manifest first")
    add_model_options(parser)
    given = parser.parse_args(arguments)
    try:
        return _search(given)
    except (ValueError, OSError) as error:
        return refuse(error)


def _search(given: argparse.Namespace) -> int:
    if given.html is not None and (given.html.is_dir() or given.html.suffix.lower() not in (".html", ".htm")):
        # `--html a.jpg b.jpg` would replace a picture
        raise ValueError(f"expected the page to write for --html, got {given.html}; name a file like found.html")
    queries = _query_paths(given.images)
    from dist_proxygml.inference.retrieval_index import Index

    index = Index.load(given.index, verify=given.verify)
    embedder = open_model(index, given.index, run=given.run, device=given.device)
    answers = _answers(index, embedder, queries, given)
    if given.html is not None:
        _write_page(given, index, answers)
    if given.json:
        document = json.dumps(_as_json(index, given.index, answers), indent=2, ensure_ascii=False)
        print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document))
    else:
        print("\n".join(_as_table(answer, given.min_score) for answer in answers))
    return 0


def _query_paths(images: Sequence[Path]) -> list[Path]:
    """The image files that are named, and those in the folders that are named."""
    paths = []
    for path in images:
        if path.is_dir():
            from dist_proxygml.data.sources import FolderSource

            paths += [path / name for name in FolderSource.of_folder(path).names]
        elif path.is_file():
            paths.append(path)
        else:
            raise ValueError(f"expected an image or a folder at {path}, found nothing; correct the path")
    return paths


def open_model(index: "Index", path: Path, *, run: Path | None = None, device: str = "auto") -> "Embedder":
    """The model that the embeddings of an index were made with: where it was then, or in `run`.

    Raises:
        ValueError: it is not there, or it is another one.
    """
    from dist_proxygml.inference.embedder import Embedder, model_difference
    from dist_proxygml.storage.run_folder import RunFolder, step_name

    model = index.model
    if model is None or not {"path", "run", "step"} <= model.keys():
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


def _answers(index: "Index", embedder: "Embedder", queries: list[Path], given: argparse.Namespace) -> list[Answer]:
    from tqdm import tqdm

    from dist_proxygml.data.sources import FolderSource
    from dist_proxygml.embed import loading_processes

    loader = FolderSource(Path(), [str(path) for path in queries]).loader(
        embedder.transform,
        batch_size=given.batch_size or embedder.batch_size,
        num_workers=loading_processes(len(queries), given.num_workers),
        on_bad=given.on_bad,
    )
    answers = []
    with tqdm(total=len(queries), desc="searching", unit=" images", delay=2.0, mininterval=0.5) as bar:
        for batch in loader:
            for damage in batch.damaged:
                bar.write(printable(f"left out: {damage.image}: {damage.reason}"), file=sys.stderr)
            paths = [queries[number] for number in batch.ids.tolist()]
            rows_bD = embedder.embed_prepared(batch.images, names=[str(path) for path in paths])
            result = index.search(rows_bD, given.k)
            for path, scores, rows in zip(paths, result.scores.tolist(), result.rows.tolist(), strict=True):
                found = [Match(score, index.records[row]) for score, row in zip(scores, rows, strict=True)]
                matches = [match for match in found if given.min_score is None or match.score >= given.min_score]
                answers.append(Answer(path, matches, found[0]))
            bar.update(len(paths) + len(batch.damaged))
    if not answers:
        raise ValueError(f"none of the {len(queries)} images can be used")
    return answers


def _as_table(answer: Answer, min_score: float | None) -> str:
    if not answer.matches:
        return _nothing(answer, min_score)
    lines = [_in_one_line(str(answer.query))]
    for rank, (score, record) in enumerate(answer.matches, start=1):
        name = "" if record.class_name is None else f"  {_in_one_line(record.class_name)}"
        lines.append(f"{rank:4d}  {score:7.4f}  {_in_one_line(record.id)}{name}")
    return "\n".join(lines)


def _in_one_line(text: str) -> str:
    """Newlines and control characters as Python writes them."""
    return printable(text).replace("\n", "\\n")


def _nothing(answer: Answer, min_score: float | None) -> str:
    score, record = answer.nearest
    found, near = _in_one_line(str(answer.query)), _in_one_line(record.id)
    return f"{found}: nothing with a score of {min_score} or more; the nearest is {near} with {score:.4f}"


def _as_json(index: "Index", path: Path, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "index": str(path),
        "kind": index.kind,
        "model": None if index.model is None else {name: index.model.get(name) for name in ("run", "step")},
        "queries": [
            {
                "query": str(answer.query),
                "matches": [
                    {"rank": rank, "score": score, **json.loads(record.to_json())}
                    for rank, (score, record) in enumerate(answer.matches, start=1)
                ],
            }
            for answer in answers
        ],
    }


def _write_page(given: argparse.Namespace, index: "Index", answers: Sequence[Answer]) -> None:
    from dist_proxygml.data.sources import read_image
    from dist_proxygml.inference.search_page import Row, Tile, write_page

    gallery = _gallery(given, index)

    def tile(match: Match) -> Tile:
        pixels = None
        if gallery is not None:
            try:
                pixels = gallery.image(match.record)
            except ValueError as error:
                print(f"not at hand: {printable(error)}", file=sys.stderr)
        return Tile(match.record.id, pixels, match.score, match.record.class_name)

    rows = [
        Row(
            Tile(answer.query.name, read_image(answer.query)),
            [tile(match) for match in answer.matches],
            "" if answer.matches else _nothing(answer, given.min_score),
        )
        for answer in answers
    ]
    model = "" if index.model is None else f" by {index.model.get('run')}, step {index.model.get('step')}"
    write_page(
        given.html,
        rows,
        title=f"Nearest images in {given.index.name}",
        lead=f"Searched among {len(index):,} images, embedded{model}. Numbers are cosines: 1 is the same embedding.",
        makers=_makers(given.data or (index.data or {}).get("location")),
    )
    print(f"page: {given.html.resolve()}", file=sys.stderr)


def _gallery(given: argparse.Namespace, index: "Index") -> "ImageSource | None":
    """Where the images of the index lie, None if they are not at hand."""
    from dist_proxygml.data.sources import FolderSource, open_source

    data = index.data or {}
    location = given.data or data.get("location")
    try:
        if location is None:
            raise ValueError("the index does not say where they are")
        if given.data is None and data.get("kind") == "folder" and Path(location).is_dir():
            return FolderSource(Path(location), ())  # no walk through whatever folder an index names
        return open_source(location, split=data.get("split", "test"), is_typed=given.data is not None)
    except ValueError as error:
        told = f"the page will lack the images that were found: {printable(error)}; --data says where they are"
        print(told, file=sys.stderr)
        return None


def _makers(location: str | None) -> str | None:
    """The makers of the images, where their folder names them: pictures must not travel without them."""
    path = Path(location or "", "ATTRIBUTION.md")
    return path.read_text(encoding="utf-8") if location and path.is_file() else None


if __name__ == "__main__":
    run_command(main)

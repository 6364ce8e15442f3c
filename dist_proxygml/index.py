"""Make embeddings searchable: `python -m dist_proxygml.index --embeddings embeddings/photos --out indexes/photos`.

The kind of index goes by the number of rows unless it is named; inference/retrieval_index.py says how.
"""

import argparse
import os
from pathlib import Path

from dist_proxygml.cli import add_options, build_parser, command, printable, run_command, share

EXAMPLES = """\
  python -m dist_proxygml.index --embeddings embeddings/photos --out indexes/photos
  python -m dist_proxygml.index --embeddings embeddings/sop --out indexes/sop --kind ivf --target-recall 0.99
  python -m dist_proxygml.index --embeddings embeddings/photos --out indexes/photos --scores-from embeddings/held_out
  python -m dist_proxygml.index --verify --index indexes/sop
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("index", "Build a search index from a folder of embeddings.", EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--embeddings", type=Path, help="folder that dist_proxygml.embed wrote")
    what.add_argument("--verify", action="store_true", help="build nothing: compare every byte of the index in --index")
    where = parser.add_mutually_exclusive_group(required=True)
    add_options(where, "--out", required=False)
    add_options(where, "--index", required=False, help="index to verify")
    add_options(parser, "--overwrite")
    parser.add_argument(
        "--kind",
        choices=("auto", "flat", "ivf", "hnsw"),
        default="auto",
        help="flat is exact; hnsw and ivf are for many rows (default: by their number, docs/retrieval.md)",
    )
    parser.add_argument(
        "--target-recall",
        type=share,
        default=0.95,
        metavar="SHARE",
        help="of the ten nearest, how much hnsw and ivf should find (default: 0.95)",
    )
    parser.add_argument(
        "--scores-from",
        type=Path,
        metavar="EMBEDDINGS",
        help="embeddings by the same model, best of classes that were not trained, to measure precision by score on "
        "(default: those of the index, if they have class labels)",
    )
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Build or verify, and say what there is."""
    import numpy as np
    from tqdm import tqdm

    from dist_proxygml.inference.embedder import model_difference
    from dist_proxygml.inference.embeddings import open_embeddings
    from dist_proxygml.inference.retrieval_index import KIND, Index
    from dist_proxygml.inference.score_table import describe_scores, measure_scores, why_not_measurable
    from dist_proxygml.storage.folder import check_is_free

    if given.verify:
        path = given.index or given.out  # which named it before
        index = Index.load(path, verify=True)
        print(f"{path}: {index.kind} index of {len(index):,} rows, every byte as it was written")
        return
    if given.out is None:
        raise ValueError(
            "expected --out with --embeddings, got --index, which is for --verify; name the folder to write"
        )
    check_is_free(Path(os.path.realpath(given.out)), KIND, overwrite=given.overwrite)
    embeddings = open_embeddings(given.embeddings)
    judged = embeddings
    if given.scores_from is not None:
        judged = open_embeddings(given.scores_from)
        difference = model_difference(embeddings.manifest["model"], judged.manifest["model"])
        if difference is not None:
            raise ValueError(
                f"expected embeddings by one model, {given.scores_from} was made with other {difference} than "
                f"{given.embeddings}: their scores do not compare; embed the images again"
            )
    why_not = why_not_measurable(judged.records)
    if why_not is not None and given.scores_from is not None:
        raise ValueError(f"expected labelled rows in {given.scores_from}: {why_not}; embed a folder of shards")
    with tqdm(total=len(embeddings.records), desc="indexing", unit=" rows", unit_scale=True, mininterval=0.5) as bar:
        index = Index.build(
            embeddings.rows,
            embeddings.records,
            kind=given.kind,
            target_recall=given.target_recall,
            model=embeddings.manifest["model"],
            data=embeddings.manifest["data"],
            progress=bar.update,
        )
    if why_not is None:
        searched = index if judged is embeddings else Index.build(judged.rows, judged.records, kind="flat")

        def search(queries_qD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            found = searched.search(queries_qD, k)
            return found.scores, found.rows

        measured_on = str(given.embeddings if judged is embeddings else given.scores_from)
        index.scores = measure_scores(search, judged.rows, judged.records, measured_on=measured_on)
    index.save(given.out, overwrite=given.overwrite)
    settings = "".join(f", {name} {value}" for name, value in index.parameters.items())
    text = (
        f"{index.kind} index of {len(index):,} rows of dimension {index.embedding_dim}{settings}, "
        f"written to {given.out}\nrecall@10 against an exact search: {index.recall_at_10:.4f}"
    )
    if index.recall_at_10 < given.target_recall:
        text += f", below the {given.target_recall} asked for; --kind flat is exact"
    print(text)
    print(f"scores: not measured, {why_not}" if index.scores is None else printable(describe_scores(index.scores)))


if __name__ == "__main__":
    run_command(main)

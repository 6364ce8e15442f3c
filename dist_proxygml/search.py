"""Find images like one: `python -m dist_proxygml.search --index indexes/photos bird.jpg`.

Scores are cosines, 1 for an image with the same embedding.
"""

import argparse
import json
from pathlib import Path

from dist_proxygml.cli import (
    add_model_options,
    add_options,
    at_least,
    build_parser,
    command,
    cosine,
    printable,
    run_command,
    share,
)

EXAMPLES = """\
  python -m dist_proxygml.search --index indexes/photos bird.jpg -k 5
  python -m dist_proxygml.search --index indexes/photos queries --min-score 0.6 --html found.html
  python -m dist_proxygml.search --index indexes/photos queries --precision 0.99
  python -m dist_proxygml.search --index indexes/photos photos --exclude-self --out answers.csv
  python -m dist_proxygml.search --index indexes/photos a.jpg b.jpg --json
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("search", "Find the images of an index that are most like given ones.", EXAMPLES)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    add_options(parser, "--index")
    parser.add_argument("-k", type=at_least(1), default=10, metavar="N", help="images to find for each (default: 10)")
    least = parser.add_mutually_exclusive_group()
    least.add_argument("--min-score", type=cosine, metavar="S", help="leave out what has a lower score, -1 to 1")
    least.add_argument(
        "--precision",
        type=share,
        metavar="SHARE",
        help="leave out what has a lower score than gave so many right answers when the index was built, such as 0.99",
    )
    parser.add_argument(
        "--exclude-self", action="store_true", help="leave out images with the query's own pixels: itself, and copies"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_options(
        parser, "--out", required=False, metavar="FILE", help="write to a .csv or .jsonl file instead of printing"
    )
    add_options(parser, "--overwrite", help="replace the file of --out")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with the images; for many queries several"
    )
    add_options(
        parser, "--run", required=False, help="run, checkpoint or export with the model (default: where it was)"
    )
    add_options(
        parser, "--data", help="where the images of the index lie now, to show or compare (default: where they were)"
    )
    add_options(
        parser,
        "--on-bad",
        help="a query that cannot be read: fail and name it (default), or skip it",
    )
    parser.add_argument("--verify", action="store_true", help="compare every byte of the index with its manifest first")
    add_model_options(parser)
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Search, and print what was found."""
    if given.html is not None and (given.html.is_dir() or given.html.suffix.lower() not in (".html", ".htm")):
        # `--html a.jpg b.jpg` would replace a picture
        raise ValueError(f"expected the page to write for --html, got {given.html}; name a file like found.html")
    if given.out is not None and given.out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"expected a .csv or .jsonl file for --out, got {given.out}; name a file like answers.csv")
    if given.out is not None and given.out.exists() and not given.overwrite:
        raise ValueError(f"expected nothing at {given.out}, found a file; name another, or add --overwrite")
    from dist_proxygml.inference import search
    from dist_proxygml.inference.retrieval_index import Index

    queries = search.query_paths(given.images)
    index = Index.load(given.index, verify=given.verify)
    min_score = given.min_score
    if given.precision is not None:
        min_score = search.score_for(index, given.index, given.precision)
    doubt = search.doubt_about(index, precision=given.precision, min_score=given.min_score)
    gallery = search.find_gallery(index, given.data) if given.exclude_self else None
    embedder = search.open_model(index, given.index, run=given.run, device=given.device)
    answers = search.find(
        index,
        embedder,
        queries,
        k=given.k,
        min_score=min_score,
        batch_size=given.batch_size,
        num_workers=given.num_workers,
        on_bad=given.on_bad,
        gallery=gallery,
    )
    if given.html is not None:
        search.write_answers(given.html, index, given.index, answers, data=given.data, min_score=min_score, doubt=doubt)
    if given.out is not None:
        search.write_file(given.out, answers)
        print(printable(f"answers to {len(answers):,} of {len(queries):,} queries, written to {given.out}"))
    if given.json:
        document = json.dumps(search.as_json(index, given.index, answers, doubt), indent=2, ensure_ascii=False)
        print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document))
    elif given.out is None:
        print("\n".join(search.as_table(answer, min_score) for answer in answers))
        if doubt is not None:
            print(printable(doubt.sentence))


if __name__ == "__main__":
    run_command(main)

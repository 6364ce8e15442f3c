"""The results of runs: `python -m dist_proxygml.report --run runs/demo_cpu` writes the page of a run again, and
`python -m dist_proxygml.report compare runs/a runs/b` puts evaluations side by side.

Training writes the page at its end; this is for a run that was stopped, or whose shards lie elsewhere
now.
"""

import argparse
import json
import sys
from pathlib import Path

from dist_proxygml.cli import add_options, at_least, build_parser, command, printable, run_command

EXAMPLES = """\
  python -m dist_proxygml.report --run runs/demo_cpu
  python -m dist_proxygml.report --run runs/sop_8gpu --data /data/shards/sop
  python -m dist_proxygml.report compare runs/demo_cpu runs/wide
"""
COMPARE_EXAMPLES = """\
  python -m dist_proxygml.report compare runs/demo_cpu runs/wide
  python -m dist_proxygml.report compare runs/a runs/b runs/c --reference best --html compared.html
  python -m dist_proxygml.report compare runs/wide/evaluation/step-000200.json runs/wide --force

A run stands for its last evaluation. Results that hold under different protocols (other images, other preparation,
other rules) are refused with exit code 2, and what differs is printed; the size of the images, versions of packages,
the precision of the weights and the number of images in a forward pass are only noted. Differences have 95 % intervals
of a paired bootstrap where the embeddings of the evaluations are stored.
"""


_OF_IMAGES = ("data.index_sha256", "data.class_table_sha256", "data.split", "data.gallery_split", "data.left_out")


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "report",
        "Write report.html, one self-contained page, into the folder of a run; or compare evaluations.",
        EXAMPLES,
    )
    add_options(parser, "--run", required=False)
    add_options(parser, "--data")
    commands = parser.add_subparsers(dest="command", metavar="{compare}")
    compare = build_parser(
        "compare",
        "put evaluations side by side: their metrics, and the differences in points with their intervals",
        COMPARE_EXAMPLES,
        within=commands,
    )
    compare.add_argument("first", metavar="A", type=Path, help="folder of a run, or the JSON file of an evaluation")
    compare.add_argument("others", metavar="B", nargs="+", type=Path, help="what to compare with it, one or more")
    compare.add_argument(
        "--reference", choices=["first", "best"], default="first", help="what differences are to (default: first)"
    )
    compare.add_argument(
        "--resamples", type=at_least(0), default=2000, metavar="N", help="of the bootstrap (default 2000, 0: none)"
    )
    compare.add_argument("--seed", type=at_least(0), default=0, help="of the bootstrap (default 0)")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    compare.add_argument("--force", action="store_true", help="show results of different protocols all the same")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Do what is asked for."""
    if given.command is None and given.run is None:
        raise ValueError("expected --run RUN or compare A B, got neither; name a run")
    if given.command is not None and (given.run or given.data):
        raise ValueError("expected compare without --run and --data; name runs or evaluations, and leave them out")
    if given.command == "compare":
        _compare(given)
    else:
        _write(given.run, given.data)


def _compare(given: argparse.Namespace) -> None:
    from dist_proxygml.evaluation.compare import (
        as_document,
        best_of,
        find_uncertainty,
        format_comparison,
        image_difference,
        open_result,
        protocol_differences,
    )

    if given.html is not None and (given.html.is_dir() or given.html.suffix.lower() not in (".html", ".htm")):
        raise ValueError(f"expected the page to write for --html, got {given.html}; name a file like compared.html")
    named = [open_result(path) for path in (given.first, *given.others)]
    first, are_of_one_protocol = named[0], True
    for other in named[1:]:
        differences = protocol_differences(first.result, other.result)
        small = [difference for difference in differences if difference.is_small]
        large = [difference for difference in differences if not difference.is_small]
        if large:
            are_of_one_protocol = False
            are_other_images = any(difference.entry.startswith(_OF_IMAGES) for difference in large)
            images = image_difference(first, other) if are_other_images else None
            listed = "\n".join(f"  {line}" for line in [*([f"other images: {images}"] if images else []), *large])
            what = f"{first.name} and {other.name} hold under different protocols, A | B:\n{listed}\n"
            if not given.force:
                raise ValueError(
                    f"{what}expected results of one protocol; evaluate one of them again as the other was "
                    "(launchers/evaluate.py), or add --force to see the numbers all the same"
                )
            print(f"warning: {printable(what)}their numbers do not measure the same thing", file=sys.stderr)
        if small:
            listed = "; ".join(str(difference).removeprefix("versions.") for difference in small)
            of_whom = f" ({other.name})" if len(named) > 2 else ""
            print(f"note: also different{of_whom}, A | B: {printable(listed)}", file=sys.stderr)
    best = [0] if given.reference == "first" else best_of(named)
    reference = best[0]
    if len(best) > 1:
        tied = ", ".join(named[number].name for number in best)
        print(f"note: a tie for the best, the first of them is the reference: {printable(tied)}", file=sys.stderr)
    found = None
    if are_of_one_protocol and given.resamples:
        uncertainty = find_uncertainty(named, reference=reference, num_resamples=given.resamples, seed=given.seed)
        if isinstance(uncertainty, str):
            print(f"note: no intervals: {printable(uncertainty)}", file=sys.stderr)
        else:
            found = uncertainty
    if given.html is not None:
        from dist_proxygml.reporting.comparison import write_comparison

        write_comparison(given.html, named, reference, found)
    if given.json:
        print(json.dumps(as_document(named, reference, found), indent=2))
    else:
        print(printable(format_comparison(named, reference, found)))
    if given.html is not None:
        print(f"page: {given.html.resolve()}", file=sys.stderr)


def _write(run_directory: Path, data: str | None) -> None:
    from dist_proxygml.config import parse_bytes
    from dist_proxygml.data.index import open_index
    from dist_proxygml.reporting.page import format_table, read_run, write_report
    from dist_proxygml.storage.run_folder import RunFolder

    config = read_run(run_directory).config
    if not config:
        raise ValueError(f"expected a run's folder, {run_directory} has no config.json; name the folder of a run")
    index = None
    try:
        settings = config.get("data", {})
        cache, limit = settings.get("cache_directory"), settings.get("cache_limit")
        split = settings.get("test_split", "test")
        if split is not None:
            index = open_index(
                data or settings.get("shards", "shards"),
                split,
                cache_directory=None if cache is None else Path(cache),
                cache_limit=None if limit is None else parse_bytes(limit),
                is_typed=data is not None,
            )
        elif data is not None:
            raise ValueError("expected no --data for a run without a test split (data.test_split null); leave it out")
    except (ValueError, TypeError, AttributeError) as error:  # of a configuration that may be anybody's
        if data is not None:
            raise ValueError(str(error)) from None
        earlier = RunFolder(run_directory).report
        if earlier.is_file() and "data:image/" in earlier.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(
                f"the images of {earlier} would be lost: {error}; --data says where the shards are, or move that page "
                "away"
            ) from None
        print(f"the page will have no images: {printable(error)}; --data says where the shards are", file=sys.stderr)
    page = write_report(run_directory, index)
    print(printable(format_table(run_directory)))
    print(f"report: {page.resolve()}")


if __name__ == "__main__":
    run_command(main)

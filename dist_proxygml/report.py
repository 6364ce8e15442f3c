"""The results of runs: `python -m dist_proxygml.report --run runs/demo_cpu` writes the page of a run again, and
`python -m dist_proxygml.report compare runs/a runs/b` puts two evaluations side by side.

Training writes the page at its end; this is for a run that was stopped, or whose shards lie elsewhere
now.
"""

import argparse
import sys
from pathlib import Path

from dist_proxygml.cli import add_options, build_parser, command, printable, run_command

EXAMPLES = """\
  python -m dist_proxygml.report --run runs/demo_cpu
  python -m dist_proxygml.report --run runs/sop_8gpu --data /data/shards/sop
  python -m dist_proxygml.report compare runs/demo_cpu runs/wide
"""
COMPARE_EXAMPLES = """\
  python -m dist_proxygml.report compare runs/demo_cpu runs/wide
  python -m dist_proxygml.report compare runs/wide/evaluation/step-000200.json runs/wide --force

A run stands for its last evaluation. Results that hold under different protocols (other images, other preparation,
other rules) are refused with exit code 2, and what differs is printed; versions of packages, the precision of the
weights and the number of images in a forward pass are only reported.
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "report",
        "Write report.html, one self-contained page, into the folder of a run; or compare two evaluations.",
        EXAMPLES,
    )
    add_options(parser, "--run", required=False)
    add_options(parser, "--data")
    commands = parser.add_subparsers(dest="command", metavar="{compare}")
    compare = build_parser(
        "compare",
        "put two evaluations side by side: their metrics, and the differences in points",
        COMPARE_EXAMPLES,
        within=commands,
    )
    compare.add_argument("first", metavar="A", type=Path, help="folder of a run, or the JSON file of an evaluation")
    compare.add_argument("second", metavar="B", type=Path, help="what to compare with it")
    compare.add_argument("--force", action="store_true", help="show results of different protocols all the same")
    return parser


@command(_parser)
def main(given: argparse.Namespace) -> None:
    """Do what is asked for."""
    if given.command is None and given.run is None:
        raise ValueError("expected --run RUN or compare A B, got neither; name a run")
    if given.command is not None and (given.run or given.data):
        raise ValueError("expected compare without --run and --data; name two runs or evaluations, and leave them out")
    if given.command == "compare":
        _compare(given.first, given.second, force=given.force)
    else:
        _write(given.run, given.data)


def _compare(first_path: Path, second_path: Path, *, force: bool) -> None:
    from dist_proxygml.evaluation.compare import format_comparison, open_result, protocol_differences

    first, second = open_result(first_path), open_result(second_path)
    differences = protocol_differences(first.result, second.result)
    small = [difference for difference in differences if difference.is_small]
    others = [difference for difference in differences if not difference.is_small]
    if others:
        listed = "\n".join(f"  {difference}" for difference in others)
        what = f"{first.name} and {second.name} hold under different protocols, A | B:\n{listed}\n"
        if not force:
            raise ValueError(
                f"{what}expected results of one protocol; evaluate one of them again as the other was "
                "(launchers/evaluate.py), or add --force to see the numbers all the same"
            )
        print(f"warning: {printable(what)}their numbers do not measure the same thing", file=sys.stderr)
    if small:
        listed = "; ".join(str(difference).removeprefix("versions.") for difference in small)
        print(f"note: also different, A | B: {printable(listed)}", file=sys.stderr)
    print(printable(format_comparison(first, second)))


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
        index = open_index(
            data or settings.get("shards", "shards"),
            settings.get("test_split", "test"),
            cache_directory=None if cache is None else Path(cache),
            cache_limit=None if limit is None else parse_bytes(limit),
            is_typed=data is not None,
        )
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

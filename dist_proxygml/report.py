"""Write the page of a run again: `python -m dist_proxygml.report --run runs/demo_cpu`.

Training writes it at its end; this is for a run that was stopped, or whose shards lie elsewhere
now.
"""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m dist_proxygml.report --run runs/demo_cpu
  python -m dist_proxygml.report --run runs/sop_8gpu --data /data/shards/sop
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, write the page, print the table and the page's path; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_proxygml.report",
        description="Write report.html, one self-contained page, into the folder of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, type=Path, help="folder of a training run")
    parser.add_argument("--data", type=Path, help="folder of its shards (default: the one the run was trained with)")
    given = parser.parse_args(arguments)
    try:
        return _write(given.run, given.data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _write(run_directory: Path, data: Path | None) -> int:
    from dist_proxygml.data.index import open_index
    from dist_proxygml.evaluation.report import format_table, read_run, write_report

    settings = read_run(run_directory).config.get("data", {})
    index = None
    try:
        index = open_index(data or settings.get("shards", "shards"), settings.get("test_split", "test"))
    except ValueError as error:
        if data is not None:
            raise
        print(f"the page will have no images: {error}", file=sys.stderr)
    page = write_report(run_directory, index)
    print(format_table(run_directory))
    print(f"report: {page.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

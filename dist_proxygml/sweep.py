"""Train every point of a grid with several seeds: `python launchers/sweep.py --config C --grid key=a,b,c --seeds 3`.

Each point is an ordinary run in the sweep's folder, RUNS_DIR/NAME.sweep, started as launchers/submit.py starts one: on
SLURM as an element of one job array, on this machine so many at a time (--cluster local). What a start would refuse
is refused before the first run starts. The same command resumes a sweep: runs that are finished or still in the queue
are left alone, interrupted ones continue from their newest checkpoint, failed ones are tried again. --report writes
what there is so far: results.csv, summary.csv, summary.md and the picture sweep.svg. docs/sweeps.md has an example.
"""

import argparse

from dist_proxygml.cli import add_job_options, add_options, build_parser, command, run_command
from dist_proxygml.cluster.sweep import run_sweep

EXAMPLES = """\
  python launchers/sweep.py --config configs/paper/cars.json --grid proxies.per_class=1,4,12 proxies.ratio=0.05,0.2,1 \\
      --seeds 3 --gpus-per-node 1 --partition gpu --time 8:00:00 --parallel 4
  python launchers/sweep.py --config configs/demo_cpu.json --grid proxies.ratio=0.02,0.05 --seeds 2 --cluster local \\
      --tasks-per-node 1 --parallel 2
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(None, __doc__, EXAMPLES)
    add_job_options(parser)
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=A,B,C",
        help="settings to vary: every combination of their values is trained",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="runs of each point, of seeds 0 to K-1")
    add_options(parser, "--out", required=False, help="folder of the sweep (default: RUNS_DIR/NAME.sweep)")
    parser.add_argument(
        "--parallel", type=int, metavar="M", help="runs at a time (default: 1 with local, with slurm as many as start)"
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="slurm: a job array (default); local: on this machine",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, print the batch script, start nothing")
    parser.add_argument(
        "--report", action="store_true", help="write tables and picture of what there is, start nothing"
    )
    parser.add_argument("--metric", help="what the picture shows (default: the first Recall@K)")
    parser.add_argument("--wait", action="store_true", help="slurm: wait for the array and report; local always does")
    return parser


@command(
    _parser,
    stopped="no longer followed; queued jobs continue, and the same command resumes them",
)
def main(given: argparse.Namespace) -> int:
    """Train or report; returns the exit status: 0; 1 if a run has not finished or will never start."""
    return run_sweep(given)


if __name__ == "__main__":
    run_command(main)

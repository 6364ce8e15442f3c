"""Submit a training run: `python launchers/submit.py --config configs/sop_8gpu.json --nodes 2 --gpus-per-node 8`.

The job's tasks do what launchers/train.py does. Before the time limit and at preemption all ranks stop between two
steps and save, then the job puts itself back into the queue and continues there.

--cluster local starts the same tasks on this machine, --cluster debug one rank in this process. docs/slurm.md says what
to expect of each.
"""

import argparse

from dist_proxygml.cli import add_job_options, add_options, build_parser, command, run_command
from dist_proxygml.cluster.submit import submit

EXAMPLES = """\
  python launchers/submit.py --config configs/sop_8gpu.json --gpus-per-node 8 --partition gpu --time 12:00:00
  python launchers/submit.py --config configs/sop_8gpu.json --nodes 2 --gpus-per-node 4 --dry-run
  python launchers/submit.py --config configs/demo_cpu.json --nodes 2 --tasks-per-node 1 --cpus-per-task 8 --wait
  python launchers/submit.py --config configs/demo_cpu.json --cluster local --tasks-per-node 2 --wait
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(None, __doc__, EXAMPLES)
    add_job_options(parser)
    add_options(
        parser,
        "--resume",
        help="as for train.py, for the first start; a restart continues from what the job itself has saved",
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="slurm: a batch job (default); local: the same tasks on this machine; debug: one rank in this process",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument("--wait", action="store_true", help="follow the job, and end with its status")
    return parser


@command(_parser, stopped="no longer followed; a queued job continues")
def main(given: argparse.Namespace) -> int:
    """Submit; returns the exit status: 0; 1 if the job failed or will never start; with --wait, the job's."""
    return submit(given)


if __name__ == "__main__":
    run_command(main)

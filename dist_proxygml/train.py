"""Train a model: `deepspeed launchers/train.py --config configs/demo_cpu.json`.

The deepspeed launcher starts one process per rank; plain python is one rank. Exit status: 0 done, 2 a mistake in what
was asked for, 65 the numbers stay NaN, 75 stopped by a signal or a step that hung (start it again to resume), 1
anything else.
"""

import argparse
from collections.abc import Sequence

from dist_proxygml.cli import at_least, build_parser
from dist_proxygml.config import Config, load_config
from dist_proxygml.distributed.parallel import join_world, parse_arguments, run_launcher
from dist_proxygml.distributed.preemption import StopSignals

EXAMPLES = """\
  deepspeed --num_gpus 2 launchers/train.py --config configs/demo_cpu.json
  deepspeed launchers/train.py --config configs/sop_8gpu.json --set proxies.ratio=0.1 training.epochs=20
  python launchers/train.py --config configs/sop_8gpu.json --dry-run 8
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(None, __doc__, EXAMPLES, "--config", "--set", "--resume", "--local_rank")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        type=at_least(1),
        const=0,
        metavar="RANKS",
        help="print the resolved configuration and the plan for so many ranks (default: those started)",
    )
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Parse, then show the plan or train."""
    arguments = parse_arguments(_parser(), given)
    config = load_config(arguments.config, arguments.set)
    if arguments.dry_run is not None:
        _print_plan(config, world_size=arguments.dry_run)
        return
    signals = StopSignals()
    signals.listen()
    context = join_world(start_timeout=config.training.start_timeout)
    from dist_proxygml.training.run import train

    train(config, context, resume=arguments.resume, signals=signals)


def _print_plan(config: Config, *, world_size: int) -> None:
    import os

    import torch

    from dist_proxygml.training.checks import check_run
    from dist_proxygml.training.run_plan import describe_plans

    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else None
    config, plan, settings, *_ = check_run(config, world_size=world_size, device=device)
    if os.environ.get("RANK", "0") == "0":
        print(config.model_copy(update={"deepspeed": settings}).model_dump_json(indent=2))
        print(describe_plans(config, plan))


if __name__ == "__main__":
    run_launcher(main)

"""Predict what a run needs: `python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 8 --memory "80 GiB"`.

Memory, bytes and messages of the head (training/head_plan.py), steps, backbone and checkpoints (training/run_plan.py)
and, with --measure, times (training/rehearsal.py).
"""

import argparse
import os
from collections.abc import Sequence

import torch

from dist_proxygml.cli import add_options, build_parser
from dist_proxygml.config import load_config, parse_bytes
from dist_proxygml.distributed.gpus import check_gpus
from dist_proxygml.distributed.memory import available_memory, format_bytes
from dist_proxygml.distributed.parallel import join_world, parse_arguments, run_launcher
from dist_proxygml.training.checks import check_run
from dist_proxygml.training.head_plan import DoesNotFitError, check_fits
from dist_proxygml.training.rehearsal import rehearse
from dist_proxygml.training.run_plan import plan_rest

_EXAMPLES = """\
  python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 8
  python -m dist_proxygml.plan --config configs/sop_8gpu.json --ranks 64 --memory "80 GiB" \\
      --set data.num_classes=10000000 proxies.topk=1000 proxies.ratio=null training.batch_size=8192
  python -m dist_proxygml.plan --config configs/demo_cpu.json --measure
  deepspeed --num_gpus 2 --module dist_proxygml.plan --config configs/demo_cpu.json --measure
"""


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(
        "plan",
        "Predict what a run needs: memory, bytes and messages of the head, steps, memory of the backbone, "
        "checkpoints. Starts nothing, unless it is to measure.",
        _EXAMPLES,
        *("--config", "--set", "--local_rank"),
    )
    parser.add_argument("--ranks", type=int, help="number of ranks (default: those started, or 1)")
    add_options(parser, "--device", choices=("auto", "cpu", "cuda"), help="of the ranks (default: auto)")
    parser.add_argument(
        "--memory", help='memory of one rank, such as "80 GiB" (default: what is left on this machine, for one rank)'
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train for twelve steps on this machine and estimate the times of the run",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, say whether it fits, and measure where that is asked for.

    Raises:
        DoesNotFitError: with status 1.
        ValueError: a mistake in what was asked for.
    """
    given = parse_arguments(_parser(), arguments)
    if given.device == "auto":
        check_gpus(os.environ, instead="say --device cpu")
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_, **__: None
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if given.ranks is None else given.ranks
    if ranks < 1:
        raise ValueError(f"expected at least one rank, got --ranks {ranks}")
    device = given.device if torch.cuda.is_available() or given.device == "cuda" else None
    config, plan, *_ = check_run(load_config(given.config, given.set), world_size=ranks, device=device, is_what_if=True)
    memory = parse_bytes(given.memory) if given.memory else _memory_here(given.device)
    rest = plan_rest(config, plan)
    say(f"{plan}\n{rest}", flush=True)
    check_fits(config, plan, memory=memory, device=given.device)
    if rest.needed_bytes > rest.free_bytes:
        raise DoesNotFitError(rest.shortage_message)
    say(f"the head fits into {format_bytes(memory)}", flush=True)
    if given.measure:
        say(rehearse(config, join_world(device=given.device)).describe(config, rest))


def _memory_here(device: str) -> int:
    """Memory that is left for a rank on this machine.

    Raises:
        ValueError: it has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU for --device cuda, whose free memory a rank may take, found none; say what a rank has, "
            'such as --memory "80 GiB"'
        )
    return available_memory(torch.device(device))


if __name__ == "__main__":
    run_launcher(main)

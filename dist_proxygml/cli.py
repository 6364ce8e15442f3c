"""Shared parts of the commands: parsers, common options, and how a command ends.

One flag names one thing everywhere: --config, --run, --data (images or shards), --embeddings and --index are read,
--out is what is written. Operands are for what a command takes several of, or shards alone: `search a.jpg b.jpg`,
`report compare A B`, `shard info SHARDS`. A test reads all parsers.

A command is a parser and a function of what it parsed, called `main`; `run_command(main)` ends its process. What ranks
do together ends by `distributed.parallel.run_launcher` instead, which knows who of them talks.
"""

import argparse
import functools
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_proxygml.storage.files import describe_error


def build_parser(
    name: str | None, description: str | None, examples: str, *options: str, within: Any = None
) -> argparse.ArgumentParser:
    """The parser of `python -m dist_proxygml.NAME`, with `options` that several commands have; or that of a command
    `within` the subparsers of another. Without a name the program is called as it was started.
    """
    called: dict[str, Any] = {"prog": name and f"python -m dist_proxygml.{name}"}
    if within:
        called = {"name": name, "help": description}
    parser: argparse.ArgumentParser = (within.add_parser if within else argparse.ArgumentParser)(
        **called,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, *options)
    return parser


def add_options(parser: argparse._ActionsContainer, *options: str, **changes: Any) -> None:
    """Add options that several commands have, where these say otherwise with `changes`."""
    for option in options:
        parser.add_argument(option, **_OPTIONS[option] | changes)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of whatever sends images through a model."""
    add_options(parser, "--device", "--batch-size", "--num-workers")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to train and on which machines."""
    add_options(parser, "--config", "--set")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of each machine; one rank each")
    parser.add_argument("--tasks-per-node", type=int, help="ranks of each machine on CPUs, instead of GPUs")
    parser.add_argument("--cpus-per-task", type=int, help="CPU cores of each rank (SLURM: data.num_workers + 2)")
    parser.add_argument("--partition", help="SLURM partition (default: the cluster's)")
    parser.add_argument(
        "--time", default="1-00:00:00", help="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS (default: a day)"
    )
    parser.add_argument("--constraint", help="features that nodes must have, for instance a100")
    parser.add_argument(
        "--sbatch",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME[=VALUE]",
        help="further options of sbatch: account=vision mem=64G exclusive",
    )


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `lowest` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
        return number

    return parse


def share(text: str) -> float:
    """The type of an option that is a share of something: above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return number


def cosine(text: str) -> float:
    """The type of an option that is a score of unit rows."""
    number = _number(text)
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from -1 to 1, got {text!r}")
    return number


def _number(text: str) -> float:
    """NaN for what is none, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def command(
    build_parser: Callable[[], argparse.ArgumentParser], *, stopped: str = "stopped"
) -> Callable[[Callable[[argparse.Namespace], int | None]], Callable[..., int]]:
    """Turn a function of what was parsed into one of the command line, which returns the exit status: 2 after a user's
    mistake, reported in one line, 130 after Ctrl-C, with the message `stopped`.
    """

    def decorate(carry_out: Callable[[argparse.Namespace], int | None]) -> Callable[..., int]:
        @functools.wraps(carry_out)
        def main(arguments: Sequence[str] | None = None) -> int:
            given = build_parser().parse_args(arguments)
            try:
                return carry_out(given) or 0
            except KeyboardInterrupt:
                return interrupted(stopped)
            except (ValueError, OSError) as error:
                return refuse(error)

        return main

    return decorate


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command line and end the process with its status."""
    outlive_readers()
    sys.exit(main())


def printable(text: object) -> str:
    """A text for the terminal. What would steer it, as a file's name may, comes as Python writes it; lines stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in str(text))


def refuse(error: Exception) -> int:
    """Print a user's mistake; returns the exit status for it."""
    print(f"error: {printable(describe_error(error))}", file=sys.stderr, flush=True)
    return 2


def interrupted(message: str) -> int:
    """Print the message after Ctrl-C; returns the exit status for it."""
    print(message, file=sys.stderr, flush=True)
    return 130


def said_by(*command: str) -> str | None:
    """Output of a program; None where it is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def outlive_readers() -> None:
    """Discard what is printed once nobody reads it, as in `search ... | head`: a command comes to its
    end, with its status, and what it was to write is there.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = io.BufferedWriter(_UnreadOutput(stream.fileno(), "wb", closefd=False))
            options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, **options))


class _UnreadOutput(io.FileIO):
    """A file that becomes /dev/null when its reader goes."""

    def write(self, data: Any) -> int:
        """Write, or seem to."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


# The options that several commands have.
_OPTIONS: dict[str, dict[str, Any]] = {
    "--config": dict(
        required=True, help="JSON file (docs/settings.md), or the name of one that the package has: demo_cpu"
    ),
    "--set": dict(nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings: seed=1"),
    "--resume": dict(
        default="auto",
        metavar="auto|never|PATH",
        help="auto: continue the newest checkpoint if there is one (default); never: start anew; PATH: that checkpoint",
    ),
    "--run": dict(required=True, type=Path, help="folder of a training run"),
    "--checkpoint": dict(help="name of a checkpoint of that run, such as step-000800 (default: the newest)"),
    "--data": dict(help="folder of shards, or where they lie: https://, s3://, gs:// (default: the run's own)"),
    "--split": dict(help="split of the shards (default: the run's test split)"),
    "--index": dict(required=True, type=Path, help="folder that dist_proxygml.index wrote"),
    "--out": dict(required=True, type=Path, help="folder to write"),
    "--overwrite": dict(action="store_true", help="replace what is there already"),
    "--on-bad": dict(choices=("fail", "skip"), default="fail"),
    "--device": dict(default="auto", metavar="auto|cpu|cuda", help="where to compute (default: auto)"),
    "--batch-size": dict(type=at_least(1), metavar="N", help="images at a time (default: as the run's evaluation)"),
    "--num-workers": dict(
        type=at_least(0),
        metavar="N",
        help="processes that read images (default: the usable cores, at most 8; none for few images)",
    ),
    "--local_rank": dict(help=argparse.SUPPRESS),  # given by the deepspeed launcher
}

"""What changing the number of ranks in the middle of a run does to its numbers, beside what rounding and seeds do.

    python -m benchmarks.elastic                            a short run on the demo images, 2 -> 1 -> 3 -> 2 ranks
    python -m benchmarks.elastic --seeds 0 1 --ranks 2 4 2 --stops 100 200 --set training.max_steps=300

For every seed the same run five times, stopped by a signal and continued from its checkpoint as a user would:

    left alone   the first number of ranks, never stopped
    stopped      the same number of ranks, stopped where the number changes: must be the same to the bit
    elastic      other numbers of ranks after each stop
    one ulp      the first number of ranks; after the first stop ONE weight of the backbone is moved to the next float
    ulps         the same, with every weight moved to the next float above or below, at random

The last two are the baseline. Sums of gradients over other ranks round differently, and training amplifies whatever
differs; if `elastic` goes apart no further than they do, then rounding is all that the number of ranks has changed.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_proxygml.checkpoint.folder import MANIFEST_FILE, published_checkpoints, read_state, write_checkpoint_manifest
from dist_proxygml.config import Config, load_config
from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.distributed.preemption import STOPPED_STATUS, StopRequested, StopSignals
from dist_proxygml.faults import VARIABLE
from dist_proxygml.storage.folder import files_below, hash_files

SHORT = [
    "training.max_steps=60",
    "training.batch_size=24",
    "evaluation.at_start=false",
    "evaluation.raw_pixels=false",
    "evaluation.kmeans_seeds=0",
    "telemetry.log_every_steps=1",
    "telemetry.progress_bar=false",
]
WINDOW = 5  # steps of a line of the table


class Run(NamedTuple):
    """What a run logged: the loss of each step, and its final evaluation."""

    losses: list[float]
    recall_at_1: float


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo_cpu.json", help="JSON configuration")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least 2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1, 3, 2], help="numbers of ranks, in order")
    parser.add_argument("--stops", type=int, nargs="+", default=[15, 30, 45], help="steps at which the number changes")
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    if len(arguments.stops) + 1 != len(arguments.ranks) or len(arguments.seeds) < 2:
        parser.error("expected two seeds or more, and one of --stops between any two of --ranks")
    rows = []
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        for seed in arguments.seeds:
            settings = [*SHORT, *arguments.set, f"seed={seed}", f"runs_dir={folder}"]
            runs = runs_of(arguments.config, settings, seed=seed, ranks=arguments.ranks, stops=arguments.stops)
            rows += [{"seed": seed, "run": name, **run._asdict()} for name, run in runs.items()]
    for line in table(rows, stop=arguments.stops[0]):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def runs_of(
    config: str, settings: Sequence[str], *, seed: int, ranks: Sequence[int], stops: Sequence[int]
) -> dict[str, Run]:
    """The runs of one seed, by name."""
    same, runs = [ranks[0]] * len(ranks), {}
    for name, numbers, cuts in (
        ("left alone", same[:1], ()),
        ("stopped", same, stops),
        ("elastic", ranks, stops),
        ("one ulp", same[:2], stops[:1]),
        ("ulps", same[:2], stops[:1]),
    ):
        run = load_config(config, [*settings, f"name=seed-{seed}-{name.replace(' ', '-')}"])
        done = 0
        for world_size, stop in zip(numbers, [*cuts, None], strict=True):
            train_on(run, world_size, num_steps=None if stop is None else stop - done)
            if stop is not None:
                checkpoint = published_checkpoints(run.run_directory / "checkpoints")[-1]
                done = read_state(checkpoint).step
                assert done == stop, f"stopped after step {done}, not {stop}"
                if name in ("one ulp", "ulps"):
                    nudge(checkpoint, num_weights=1 if name == "one ulp" else None)
        runs[name] = read(run)
    return runs


def train_on(config: Config, world_size: int, *, num_steps: int | None) -> None:
    """Start the run, or go on with it, on so many ranks of one thread; after `num_steps` steps it is told to stop."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "deepspeed", "dist_proxygml.training.run"]
    )  # what takes long to import
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = [(rank, world_size, folder, config, num_steps) for rank in range(world_size)]
        processes = [context.Process(target=run_rank, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        expected = 0 if num_steps is None else STOPPED_STATUS
        statuses = [process.exitcode for process in processes]
        said = "".join(path.read_text()[-2000:] for path in Path(folder).glob("rank-*.log"))
        assert set(statuses) == {expected}, f"expected status {expected}, got {statuses}:\n{said}"


def run_rank(rank: int, world_size: int, folder: str, config: Config, num_steps: int | None) -> None:
    """One rank, as launchers/train.py would run it; what it says goes to a file."""
    with open(f"{folder}/rank-{rank}.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)  # whose faults are meant
    if num_steps is not None:  # a signal in a step is heard of at the next one, the last
        os.environ[VARIABLE] = f"step.begin@0:{num_steps - 1}:signal=USR1"
    if any(name == "lo" for _, name in socket.if_nameindex()):  # the host's own name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signals = StopSignals()
    signals.listen()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    from dist_proxygml.training.run import train

    context = ParallelContext(rank, world_size, rank, torch.device("cpu"), dist.group.WORLD)
    try:
        train(config, context, signals=signals)
    except StopRequested as request:
        raise SystemExit(request.status) from None


def nudge(checkpoint: Path, *, num_weights: int | None) -> None:
    """Move the first weights of the checkpoint's backbone, or all, to a neighbouring float."""
    (path,) = (checkpoint / "engine").glob("mp_rank_00_model_states.pt")
    content = torch.load(path, weights_only=False)
    generator = torch.Generator().manual_seed(0)
    for name, values in content["module"].items():
        if not name.endswith(("weight", "bias")):
            continue
        weight = values.view(-1)[:num_weights]
        sign = torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1
        weight.copy_(torch.nextafter(weight, sign * torch.inf))
        if num_weights is not None:
            break
    torch.save(content, path)
    names = [name for name in files_below(checkpoint) if name != MANIFEST_FILE]
    write_checkpoint_manifest(checkpoint, read_state(checkpoint), hash_files(checkpoint, names, num_threads=1))


def read(config: Config) -> Run:
    """What a finished run logged."""
    lines = [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (config.run_directory / "evaluation").glob("step-*.json")
    return Run(
        [line["loss"] for line in lines if "loss" in line], json.loads(evaluation.read_text())["metrics"]["recall@1"]
    )


def table(rows: Sequence[dict[str, Any]], *, stop: int) -> list[str]:
    """The comparison with the runs that were left alone, in lines of Markdown."""
    runs = {(row["seed"], row["run"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    alone = [runs[seed, "left alone"] for seed in seeds]
    names = ("stopped", "elastic", "one ulp", "ulps")
    lines = [
        f"| largest relative difference of the loss, over {len(seeds)} seeds | {' | '.join(names)} |",
        "| --- " * 5 + "|",
    ]
    num_steps = len(alone[0]["losses"])
    for start in [0, *range(stop, num_steps, WINDOW)]:
        end = stop if start == 0 else min(start + WINDOW, num_steps)
        worst = [
            max(
                apart(runs[seed, name]["losses"][start:end], runs[seed, "left alone"]["losses"][start:end])
                for seed in seeds
            )
            for name in names
        ]
        lines.append(f"| steps {start + 1} to {end} | {' | '.join(f'{value:.1e}' for value in worst)} |")
    lines += ["", f"| Recall@1 | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | standard deviation |"]
    lines.append("| --- " * (len(seeds) + 3) + "|")
    for name in ("left alone", *names):
        lines.append(_line(name, [100 * runs[seed, name]["recall_at_1"] for seed in seeds]))
    for name in names[1:]:
        apart_by = [100 * (runs[seed, name]["recall_at_1"] - runs[seed, "left alone"]["recall_at_1"]) for seed in seeds]
        lines.append(_line(f"{name} - left alone", apart_by))
    return lines


def apart(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(loss - other) / abs(other) for loss, other in zip(losses, others, strict=True))


def _line(name: str, values: Sequence[float]) -> str:
    cells = [*values, statistics.mean(values), statistics.stdev(values)]
    return f"| {name} | {' | '.join(f'{value:.2f}' for value in cells)} |"


if __name__ == "__main__":
    main()

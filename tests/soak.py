"""Kill a training run again and again, and compare what it comes to with a run that nobody disturbed.

    python -m tests.soak                  kills at random moments: 60 of them, of one rank or of all (`make soak`)
    python -m tests.soak --sweep          one kill at every point of a save, a step and an evaluation, or at those named
    python -m tests.soak --signals        signals to stop, a rank that hangs, numbers that are NaN

Two ranks train on the demo images through launchers/train.py and the DeepSpeed engine, saving after every step; a
fork server that has the libraries loaded takes the place of the deepspeed launcher, so that a start takes seconds.
After each kill the other rank must end by itself, nothing is cleaned up by hand, the newest checkpoint must not be
older than before, and the next start goes on. At the end every logged number and every byte of the last checkpoint
must be those of the undisturbed run.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from dist_proxygml.faults import POINTS, VARIABLE

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/demo_cpu.json"
PRELOADED = ["torch", "torch._dynamo", "deepspeed", "dist_proxygml.training.run", "faiss", "sklearn.metrics"]
NUM_RANKS = 2
# A rank whose peer is gone meets a closed connection at once; the rest is for a busy machine.
SECONDS_TO_END = 30.0
SETTINGS = (
    "training.batch_size=32",
    "training.step_timeout=20",
    "checkpoint.every_steps=1",
    "telemetry.log_every_steps=1",
    "telemetry.progress_bar=false",
    "evaluation.every_epochs=0",
    "evaluation.at_start=false",
    "evaluation.raw_pixels=false",
    "evaluation.kmeans_seeds=0",
    "schedule.warmup_steps=0",
)
MEASURED = {"images_per_second", "memory_gib"}
# What rank 1 does not come to: rank 0 publishes for all.
OF_RANK_0 = {"save.manifest", "save.publish", "save.published", "save.latest", "save.forget"}


def sweep_of_kills() -> Iterator[str]:
    """A kill at every point, on every rank that comes to it; those of an evaluation last, where the run has one."""
    points = [point for point in POINTS if not point.startswith(("start", "embed"))]  # `missing_at_start` has the first
    for point in sorted(points, key=lambda point: point.startswith("evaluate")):
        for rank in range(1 if point in OF_RANK_0 else NUM_RANKS):
            yield f"{point}@{rank}:{1 if point.startswith('evaluate') else 2}:kill9"


def run_rank(rank: int, port: int, command: Sequence[str], fault: str, log: str) -> None:
    """One rank's process: what the deepspeed launcher would start."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as in any other process
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, VARIABLE: fault}
    os.environ.update({name: str(value) for name, value in world.items()})
    sys.argv = ["launchers/train.py", *command]
    runpy.run_path("launchers/train.py", run_name="__main__")


class Run:
    """A training run that can be started, and killed."""

    def __init__(self, runs: Path, name: str, settings: Sequence[str]) -> None:
        self.directory = runs / name
        self.log = str(runs / f"{name}.log")
        self._command = ["--config", CONFIG, "--set", f"runs_dir={runs}", f"name={name}", *SETTINGS, *settings]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._port = 21_000 + os.getpid() % 9_000

    def start(self, *, fault: str = "", settings: Sequence[str] = ()) -> list[multiprocessing.process.BaseProcess]:
        """Start all ranks."""
        self._port += 1
        arguments = (self._port, [*self._command, *settings], fault, self.log)
        ranks = [self._context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(NUM_RANKS)]
        for rank in ranks:
            rank.start()
        return list(ranks)

    def wait(self, ranks: Sequence[multiprocessing.process.BaseProcess], *, seconds: float) -> list[int | None]:
        """The statuses of all ranks, which have so long from when the first has ended."""
        wait([rank.sentinel for rank in ranks])
        deadline = time.monotonic() + seconds
        for rank in ranks:
            rank.join(timeout=max(0.0, deadline - time.monotonic()))
        statuses = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        assert None not in statuses, f"a rank had not ended {seconds:g} s after its peer; see {self.log}"
        return statuses

    def newest(self) -> int:
        """Step of the newest checkpoint that is published; 0 without one."""
        found = (self.directory / "checkpoints").glob("step-*/MANIFEST.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def result(self) -> dict[str, object]:
        """Every number that was logged, the evaluation, and the sha256 of every file of the last checkpoint."""
        lines = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads((self.directory / "checkpoints" / f"step-{self.newest():06d}/MANIFEST.json").read_text())
        return {
            "lines": [{name: value for name, value in line.items() if name not in MEASURED} for line in lines],
            "files": {name: entry["sha256"] for name, entry in manifest["files"].items()},
            "leftovers": [path.name for path in (self.directory / "checkpoints").glob(".*")],
        }


def undisturbed(runs: Path, settings: Sequence[str]) -> dict[str, object]:
    """The result of a run that is left alone."""
    run = Run(runs, "undisturbed", settings)
    assert run.wait(run.start(), seconds=SECONDS_TO_END) == [0] * NUM_RANKS, f"it has failed; see {run.log}"
    return run.result()


def finish_and_compare(run: Run, expected: dict[str, object]) -> None:
    """Let the run come to its end, and compare."""
    assert run.wait(run.start(), seconds=SECONDS_TO_END) == [0] * NUM_RANKS, f"it has failed; see {run.log}"
    result = run.result()
    for name, value in expected.items():
        assert result[name] == value, f"{name} differ from those of the undisturbed run; see {run.directory}"


def sweep(runs: Path, kills: Sequence[str], *, num_steps: int) -> None:
    """Kill the run at given points, one a start, saving in the background at every other start."""
    settings = (f"training.max_steps={num_steps}",)
    expected = undisturbed(runs, settings)
    run = Run(runs, "swept", settings)
    for number, kill in enumerate(kills):
        before = run.newest()
        started = time.monotonic()
        asynchronous = ("checkpoint.asynchronous=true",) if number % 2 else ()
        statuses = run.wait(run.start(fault=kill, settings=asynchronous), seconds=SECONDS_TO_END)
        killed = int(kill.split("@")[1].split(":")[0])
        seconds = time.monotonic() - started
        print(f"{kill:32} step {before:3} -> {run.newest():3}, statuses {statuses}, {seconds:.1f} s", flush=True)
        assert statuses[killed] == -signal.SIGKILL, f"rank {killed} did not come to {kill}; see {run.log}"
        assert statuses[1 - killed] in (1, 75), f"the other rank ended with {statuses[1 - killed]}; see {run.log}"
        assert run.newest() >= before
    finish_and_compare(run, expected)


def soak(runs: Path, *, num_kills: int, num_steps: int, seed: int) -> None:
    """Kill one rank, or both, at random moments."""
    settings = (f"training.max_steps={num_steps}",)
    run, draws = Run(runs, "soaked", settings), random.Random(seed)
    num_done = 0
    while num_done < num_kills:
        before = run.newest()
        asynchronous = ("checkpoint.asynchronous=true",) if num_done % 2 else ()
        ranks = run.start(settings=asynchronous)
        victims = draws.choice(([0], [1], [0, 1]))
        trains = draws.random() < 0.75
        if trains:  # somewhere in its first steps and saves
            while run.newest() == before and all(rank.is_alive() for rank in ranks):
                time.sleep(0.001)
        ranks[0].join(timeout=draws.uniform(0.0, 1.5))
        if not all(rank.is_alive() for rank in ranks):
            break  # it has come to its end
        if not trains:  # ranks that have not met yet wait for each other, until their launcher ends them
            victims = [0, 1]
        for victim in victims:
            ranks[victim].kill()
        statuses = run.wait(ranks, seconds=SECONDS_TO_END)
        num_done += 1
        print(f"{num_done:3}: killed {victims}, step {before:3} -> {run.newest():3}, statuses {statuses}", flush=True)
        assert run.newest() >= before
    assert num_done == num_kills, f"the run was at its end after {num_done} kills; give it more steps"
    finish_and_compare(run, undisturbed(runs, settings))


# What stops the run, settings of that start, and the processes that are signalled from outside once it trains.
STOPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("step.begin@0:1:signal=USR1", (), ""),  # before the first step is done
    ("step.begin@1:2:signal=USR2", (), ""),
    ("step.update@0:3:signal=TERM,step.update@1:3:signal=TERM", ("checkpoint.asynchronous=true",), ""),
    ("", ("data.num_workers=1", "data.cache_images=false"), "group"),  # data loading processes too
    ("", ("checkpoint.asynchronous=true",), "rank 1"),
    ("evaluate.batch@1:3:signal=TERM", (), ""),
)


def stops(runs: Path, *, num_steps: int) -> None:
    """Stop the run by signals, at every kind of moment; it ends with 75 on all ranks, and nothing is done twice."""
    settings = (f"training.max_steps={num_steps}",)
    expected = undisturbed(runs, settings)
    run = Run(runs, "stopped", settings)
    for fault, changes, target in STOPS:
        before = run.newest()
        started = time.monotonic()
        ranks = run.start(fault=fault, settings=changes)
        if target:
            while run.newest() == before and all(rank.is_alive() for rank in ranks):
                time.sleep(0.01)
            assert ranks[1].pid is not None
            (os.killpg if target == "group" else os.kill)(ranks[1].pid, signal.SIGTERM)
        statuses = run.wait(ranks, seconds=SECONDS_TO_END)
        seconds = time.monotonic() - started
        print(f"{fault or target:56} step {before:3} -> {run.newest():3}, {statuses}, {seconds:.1f} s", flush=True)
        assert statuses == [75, 75], f"expected both ranks to stop; see {run.log}"
        assert run.newest() > before or before == num_steps
        done = [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        assert done == list(range(1, run.newest() + 1)), "what was trained was not saved, or not told"
    finish_and_compare(run, expected)


def hang(runs: Path) -> None:
    """A rank hangs: the other one shows where it waits and ends; the run goes on when it is started again."""
    run = Run(runs, "hung", ("training.max_steps=6", "training.step_timeout=3"))
    ranks = run.start(fault="step.begin@1:4:stop")
    ranks[0].join(timeout=60)
    assert ranks[0].exitcode == 75, f"rank 0 ended with {ranks[0].exitcode}; see {run.log}"
    ranks[1].kill()
    report = (run.directory / "hang-rank-000.txt").read_text()
    assert "a step has taken longer than 3 s on rank 0" in report
    assert "in train_step" in report
    assert run.newest() == 3
    assert run.wait(run.start(), seconds=SECONDS_TO_END) == [0, 0]
    print("hang: rank 0 has ended with 75 and shown where it was", flush=True)


def missing_at_start(runs: Path) -> None:
    """A rank is killed before the ranks meet, and where the engine is about to make groups of its own: the other one
    ends by itself, soon, with one line; the run starts when it is started again.
    """
    run = Run(runs, "missing", ("training.max_steps=2", "training.start_timeout=12"))
    for point in ("start.join", "start.engine"):
        started = time.monotonic()
        statuses = run.wait(run.start(fault=f"{point}@1:1:kill9"), seconds=SECONDS_TO_END + 12)
        print(f"{point} killed: {statuses}, {time.monotonic() - started:.1f} s", flush=True)
        log = Path(run.log).read_text()
        assert statuses == [75, -signal.SIGKILL], f"see {run.log}"
        assert log.count("error: another rank has not come, has gone or does not answer, says rank 0") == 1, run.log
        assert "Traceback" not in log, f"see {run.log}"
        os.remove(run.log)
    assert run.wait(run.start(), seconds=SECONDS_TO_END) == [0, 0]


def not_a_number(runs: Path) -> None:
    """NaN on one rank: once, so often that the run goes back, and for ever."""
    run = Run(runs, "nan", ("training.max_steps=20", "checkpoint.every_steps=4"))

    def faults(passages: Sequence[int]) -> str:
        return ",".join(f"step.loss@1:{n}:nan" for n in passages)

    # Once, then in every step: after three in a row it goes back, after the third time it ends.
    for_ever = run.wait(run.start(fault="step.loss@1:3:nan," + faults(range(6, 40))), seconds=SECONDS_TO_END)
    lines = [json.loads(line) for line in (run.directory / "nonfinite.jsonl").read_text().splitlines()]
    print("NaN for ever:", for_ever, [line.get("back_to", line["step"]) for line in lines], flush=True)
    assert for_ever == [65, 65], f"see {run.log}"
    assert [line["back_to"] for line in lines if "back_to" in line] == ["step-000004", "step-000008"]
    assert lines[0]["step"] == 3
    assert list(lines[0]["images"]) == ["1"]
    assert run.wait(run.start(), seconds=SECONDS_TO_END) == [0, 0], "no checkpoint that it could not go on from"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="*", metavar="FAULT", help="kills at every point, or at these")
    parser.add_argument("--signals", action="store_true", help="signals to stop, a rank that hangs, NaN")
    parser.add_argument("--kills", type=int, default=60, help="random kills (default 60)")
    parser.add_argument("--steps", type=int, help="steps of the run (default: 80, or 8 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    runs = Path(tempfile.mkdtemp(prefix="soak-"))
    if arguments.signals:
        stops(runs, num_steps=arguments.steps or 40)
        hang(runs)
        missing_at_start(runs)
        not_a_number(runs)
    elif arguments.sweep is not None:
        sweep(runs, arguments.sweep or list(sweep_of_kills()), num_steps=arguments.steps or 80)
    else:
        steps = arguments.steps or 8 * arguments.kills
        soak(runs, num_kills=arguments.kills, num_steps=steps, seed=arguments.seed)
    shutil.rmtree(runs)
    print("the runs that were disturbed came to the numbers and bytes of the one that was left alone")


if __name__ == "__main__":
    main()

"""Sweeps: every point of a grid with several seeds, each an ordinary run in the sweep's folder, RUNS_DIR/NAME.sweep.

Which runs are finished is read from their folders and from the mark that every job leaves (status.finished_mark); the
one thing that is kept besides is jobs.json, the newest job of each point.

Declined: one job per point, which fills a queue where an array is one line with a limit; asking accounting (sacct) for
states, which many clusters have not set up; --cluster debug, whose one run would end this process.
"""

import argparse
import collections
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dist_proxygml.cli import printable
from dist_proxygml.cluster import submit
from dist_proxygml.cluster.grid import (
    Grid,
    Point,
    Result,
    Status,
    failure_in_logs,
    is_same_run,
    last_evaluation,
    make_points,
    merge_problems,
    metrics_measured,
    metrics_of,
    parse_grid,
    results_csv,
    summarize,
    summary_csv,
    summary_markdown,
    trained_settings,
)
from dist_proxygml.cluster.job import TrainingJob
from dist_proxygml.cluster.status import JobState, ask_job, finished_mark, first_verdict, hopeless_message, log_of
from dist_proxygml.cluster.sweep_chart import draw_sweep
from dist_proxygml.config import Config, parse_config
from dist_proxygml.storage.files import publish_text, read_document
from dist_proxygml.storage.lock import FolderLock

_STOPPED_STATUS = 75  # of distributed/preemption.py, which needs torch


class Run(NamedTuple):
    """A point and the job that trains it."""

    point: Point
    config: Config
    job: TrainingJob


class Sweep(NamedTuple):
    """All runs, and where they lie."""

    name: str
    folder: Path
    grid: Grid
    runs: list[Run]

    @property
    def jobs_folder(self) -> Path:
        """Folder of logs and submission files; of local jobs one for each point, as job numbers repeat."""
        return (self.folder / "jobs").absolute()


# ---- what is asked for -----------------------------------------------------------------------------------------------


def share_cores(arguments: argparse.Namespace) -> None:
    """Give every rank on this machine's CPUs its share of the cores, unless the command line does."""
    if arguments.cluster == "local" and arguments.cpus_per_task is None and not arguments.gpus_per_node:
        num_ranks = max(1, arguments.parallel or 1) * max(1, arguments.tasks_per_node or 1)
        arguments.cpus_per_task = max(1, len(os.sched_getaffinity(0)) // num_ranks)


def build_sweep(arguments: argparse.Namespace) -> Sweep:
    """All runs that the command line describes.

    Raises:
        ValueError: with everything that is wrong with any of them.
    """
    wrong = [f"expected --seeds of at least 1, got {arguments.seeds}"] if arguments.seeds < 1 else []
    if arguments.parallel is not None and arguments.parallel < 1:
        wrong.append(f"expected --parallel of at least 1, got {arguments.parallel}")
    if any(text.startswith("seed=") for text in arguments.set):
        wrong.append("--set seed=...: seeds are varied by --seeds; remove it")
    try:
        grid = parse_grid(arguments.grid)
    except ValueError as error:
        grid = {}
        wrong += str(error).splitlines()
    points = make_points(grid, max(1, arguments.seeds))
    jobs: list[TrainingJob] = []
    problems = {}
    for point in points:
        of_point = copy.copy(arguments)
        of_point.set, of_point.resume, of_point.dry_run = [*arguments.set, *point.overrides], "auto", False
        try:
            jobs.append(submit.build_job(of_point))
        except ValueError as error:
            problems[point.name] = str(error)
    if problems:
        wrong.append(merge_problems(problems, len(points)))
    if wrong:
        raise ValueError("\n".join(wrong))
    name = jobs[0].settings["name"]
    folder = arguments.out or Path(jobs[0].settings["runs_dir"]) / f"{name}.sweep"
    twins: dict[str, str] = {}
    for point, job in zip(points, jobs, strict=True):
        twin = twins.setdefault(json.dumps(job.settings), point.name)
        if twin != point.name:
            wrong.append(f"{twin} and {point.name} are the same run; remove one of the values")
        job.settings |= {"name": point.name, "runs_dir": str(folder)}
    if wrong:
        raise ValueError("\n".join(wrong))
    configs = [parse_config(job.settings, source=arguments.config) for job in jobs]
    measured = set.intersection(*(set(metrics_measured(config)) for config in configs))
    if arguments.metric and arguments.metric not in measured:
        raise ValueError(f"expected --metric of {', '.join(sorted(measured))}, got {arguments.metric!r}")
    return Sweep(name, folder, grid, [Run(*run) for run in zip(points, configs, jobs, strict=True)])


def check_starts(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Find mistakes that the start of each run would find, before any of them starts; seeds make no difference.

    Raises:
        ValueError: with everything that is wrong with any of them.
    """
    num_ranks = arguments.nodes * (arguments.gpus_per_node or arguments.tasks_per_node)
    distinct = {run.config.model_dump_json(exclude={"name", "seed"}): run for run in reversed(runs)}
    problems = {}
    for run in reversed(distinct.values()):
        try:
            submit.check_start(run.config, num_ranks=num_ranks, uses_gpus=run.job.uses_gpus)
        except ValueError as error:
            problems[run.point.name] = str(error)
    if problems:
        raise ValueError(merge_problems(problems, len(distinct)))


# ---- the state of the runs -------------------------------------------------------------------------------------------


class StartedJobs:
    """The newest job of each point, in jobs.json: which cluster it is on and its number there."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._path = sweep.folder / "jobs.json"
        self._jobs: dict[str, dict[str, str]] = read_document(self._path) if self._path.exists() else {}
        self._queue: Collection[str] | None = None
        self._filled: dict[str, Config] = {}

    def add(self, cluster: str, job_ids: dict[str, str]) -> None:
        """Keep the numbers of new jobs, by point."""
        self._jobs |= {name: {"cluster": cluster, "job": job_id} for name, job_id in job_ids.items()}
        self._store()

    def forget(self, point: Point) -> None:
        """Take the point as not started."""
        del self._jobs[point.name]
        self._store()

    def _store(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(self._path, json.dumps(self._jobs, indent=1) + "\n")

    def look(self) -> None:
        """Ask SLURM what of it is queued or running, if it has any.

        Raises:
            ValueError: SLURM does not answer.
        """
        has_some = any(job["cluster"] == "slurm" for job in self._jobs.values())
        self._queue = queued_jobs() if has_some else []

    def result(self, run: Run) -> Result:
        """State of a point, by its folder, its newest job and the last look at the queue."""
        job = self._jobs.get(run.point.name)
        if job is None:
            return Result(run.point, "open")
        folder = self._folder(run.point, job)
        log = log_of(folder, job["job"], 0)
        if self.is_alive(run.point):
            return Result(run.point, "running", log=self._seen_from_sweep(log))
        mark = finished_mark(folder, job["job"], 0)
        status = int(mark.read_text(encoding="utf-8") or 1) if mark.exists() else None
        if status == 0:
            directory = self._sweep.folder / run.point.name
            evaluation, trained = last_evaluation(directory), trained_settings(directory)
            if (evaluation or not run.config.is_evaluated) and trained and is_same_run(trained, self._fill(run)):
                return Result(run.point, "finished", evaluation, log=self._seen_from_sweep(log))
            return Result(run.point, "open", reason="trained under other settings, or its folder has changed")
        reason, failed_log = failure_in_logs(sorted(folder.glob(f"{job['job']}_*_log.out"), key=rank_of))
        where = self._seen_from_sweep(failed_log or log)
        return Result(run.point, "open" if status == _STOPPED_STATUS else "failed", reason=reason, log=where)

    def to_do(self) -> list[Run]:
        """The runs that have to be started."""
        return [run for run in self._sweep.runs if self.result(run).status in ("open", "failed")]

    def is_alive(self, point: Point) -> bool:
        """Whether the point's job is in the queue or running, as far as can be known from this machine."""
        job = self._jobs.get(point.name)
        if job is None:
            return False
        if job["cluster"] == "local":
            return is_local_job(job["job"], self._folder(point, job))
        return self._queue is not None and job["job"] in self._queue

    def end_command(self, point: Point) -> str:
        """Command that ends the point's job, and the point's name."""
        job = self._jobs[point.name]
        return f"{'kill' if job['cluster'] == 'local' else 'scancel'} {job['job']} ({point.name})"

    def verdict(self, runs: Sequence[Run], *, ask: Callable[[str], JobState | None]) -> str | None:
        """Message about an array of these runs that will never start; None if it may."""
        job_ids = [self._jobs[run.point.name]["job"] for run in runs if self.is_alive(run.point)]
        state = ask(job_ids[0]) if job_ids else None
        return hopeless_message(job_ids[0].partition("_")[0], state) if state and state.is_hopeless else None

    def _fill(self, run: Run) -> Config:
        """The run's configuration as it trains; asked once, since a Hub may have to answer."""
        from dist_proxygml.backbones.from_weights import fill_from_weights  # torch comes with it

        name = run.point.name
        if name not in self._filled:
            self._filled[name] = fill_from_weights(run.config)
        return self._filled[name]

    def _folder(self, point: Point, job: dict[str, str]) -> Path:
        return self._sweep.jobs_folder / point.name if job["cluster"] == "local" else self._sweep.jobs_folder

    def _seen_from_sweep(self, path: Path) -> str:
        return str(path.relative_to(self._sweep.folder.absolute()))


def rank_of(log: Path) -> int:
    """The rank that a log belongs to: JOB_RANK_log.out."""
    return int(log.name.split("_")[-2])


def queued_jobs() -> set[str] | None:
    """The user's jobs that are queued or running, array elements one by one ("12_3"); None without SLURM here.

    Raises:
        ValueError: SLURM does not answer, so that nobody knows what must not be submitted again.
    """
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        raise ValueError(f"expected the queue from squeue, got: {answer.stderr.strip()}; try again when SLURM answers")
    return set(answer.stdout.split())


def is_local_job(job_id: str, folder: Path) -> bool:
    """Whether submitit's controller of this local job is running: a process of that number which names the folder."""
    try:
        words = Path(f"/proc/{job_id}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(folder).encode() in words


class Progress:
    """A line for every run that changes: what it came to, and how many of all are where."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = {result.point.name: result for result in results}
        print(f"{self.counts()}, of {len(results)} runs", flush=True)

    def counts(self) -> str:
        """Counts of finished, running, failed and open runs, as text."""
        statuses = collections.Counter(result.status for result in self._results.values())
        return ", ".join(f"{statuses[status]} {word}" for status, word in _WORDS.items())

    def show(self, result: Result) -> None:
        """Print a line if something has changed."""
        before = self._results[result.point.name]
        self._results[result.point.name] = result
        if result.status == before.status:
            return
        detail = f": {printable(result.reason)}" if result.status == "failed" else ""
        if result.evaluation:
            metric, value = next(iter(result.evaluation.metrics.items()))
            detail = f": {metric} {100 * value:.2f}"
        print(f"[{self.counts()}] {result.point.name} {_WORDS[result.status]}{detail}", flush=True)


_WORDS: dict[Status, str] = {"finished": "finished", "running": "running", "failed": "failed", "open": "to do"}


def report(sweep: Sweep, jobs: StartedJobs, metric: str | None) -> int:
    """Write the tables and the picture, print the table.

    Returns:
        0 if all runs have finished, else 1.
    """
    results = [jobs.result(run) for run in sweep.runs]
    cells = summarize(results)
    known = metrics_of(cells)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    publish_text(sweep.folder / "results.csv", results_csv(sweep.grid, results))
    publish_text(sweep.folder / "summary.csv", summary_csv(sweep.grid, cells))
    text = summary_markdown(sweep.name, sweep.grid, results)
    publish_text(sweep.folder / "summary.md", text)
    shown = metric if metric in known else next(iter(known), None)
    if shown:
        publish_text(sweep.folder / "sweep.svg", draw_sweep(sweep.name, sweep.grid, cells, shown))
    else:
        (sweep.folder / "sweep.svg").unlink(missing_ok=True)  # of an earlier grid
    names = f"results.csv, summary.csv, summary.md{', sweep.svg' if shown else ''}"
    print(f"\n{printable(text)}\nwritten to {sweep.folder}: {names}")
    num_failed = sum(result.status == "failed" for result in results)
    if num_failed:
        message = (
            f"error: {num_failed} of {len(results)} runs have failed, see above; the same command tries them again"
        )
        print(message, file=sys.stderr)
    return 0 if all(result.status == "finished" for result in results) else 1


# ---- on this machine -------------------------------------------------------------------------------------------------


def run_here(sweep: Sweep, jobs: StartedJobs, runs: Sequence[Run], arguments: argparse.Namespace) -> bool:
    """Train the runs, so many at a time, and wait for them.

    Returns:
        False if it was interrupted: the jobs have then saved and ended.
    """
    interrupts = Interrupts()
    waiting = collections.deque(runs)
    running: dict[int, tuple[Run, Any]] = {}  # by slot, which says what GPUs a job gets
    progress = Progress([jobs.result(run) for run in sweep.runs])
    while (waiting or running) and not interrupts.count:
        for slot in range(arguments.parallel or 1):
            if slot not in running and waiting and not interrupts.count:
                run = waiting.popleft()
                running[slot] = (run, start(sweep, jobs, run, arguments, slot))
                progress.show(Result(run.point, "running"))
        time.sleep(0.2)
        for slot, (run, job) in list(running.items()):
            if job.done():
                del running[slot]
                progress.show(jobs.result(run))
    if interrupts.count:
        stop([job for _, job in running.values()], interrupts)
        for run, _ in running.values():
            if jobs.result(run).status == "failed":  # it was ended before it could save
                jobs.forget(run.point)
    return interrupts.count == 0


class Interrupts:
    """Counts Ctrl-C and SIGTERM, so that neither comes between starting a job and knowing of it."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._add)

    def _add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def start(sweep: Sweep, jobs: StartedJobs, run: Run, arguments: argparse.Namespace, slot: int) -> Any:
    """Start one run. Ctrl-C, which a terminal sends to all of its processes, reaches this one alone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit it
    first_gpu = slot * (arguments.gpus_per_node or 0)
    job = submit.start_here(arguments, run.job, sweep.jobs_folder / run.point.name, first_gpu=first_gpu)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    jobs.add("local", {run.point.name: job.job_id})
    return job


def stop(running: Sequence[Any], interrupts: Interrupts) -> None:
    """End jobs as a preemption would, so that each saves first; a further interrupt ends them at once."""
    print(f"\nending {len(running)} runs, each saves first; Ctrl-C again ends them at once", flush=True)
    num_signalled = 0
    while alive := [job for job in running if not job.done()]:
        if num_signalled < interrupts.count:
            num_signalled = interrupts.count
            for job in alive:
                os.kill(int(job.job_id), signal.SIGTERM)  # the controller passes it on
        time.sleep(0.1)


# ---- on SLURM --------------------------------------------------------------------------------------------------------


def submit_array(sweep: Sweep, jobs: StartedJobs, runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Put the runs into SLURM's queue, as one array."""
    executor = build_executor(sweep, runs, arguments)
    job_ids = submit.submit_to_slurm(executor, *(run.job for run in runs))
    jobs.add("slurm", {run.point.name: job_id for run, job_id in zip(runs, job_ids, strict=True)})
    array = job_ids[0].partition("_")[0]
    print(f"job array {array} of {len(runs)} runs\n  logs:   {sweep.jobs_folder}/{array}_*_log.out")
    print(f"  state:  squeue --job {array}\n  end it: scancel {array}", flush=True)


def build_executor(sweep: Sweep, runs: Sequence[Run], arguments: argparse.Namespace) -> Any:
    """submitit's executor for an array of the runs."""
    configs = [run.config for run in runs]
    executor = submit.slurm_executor(arguments, sweep.jobs_folder, f"{sweep.name}.sweep", configs)
    executor.update_parameters(array_parallelism=arguments.parallel or len(runs))
    return executor


def follow(sweep: Sweep, jobs: StartedJobs) -> str | None:
    """Wait until nothing of the sweep is in the queue.

    Returns:
        What to do if that will never be; None otherwise.
    """
    progress = Progress([jobs.result(run) for run in sweep.runs])
    started, was_empty = time.monotonic(), False
    while True:
        jobs.look()
        is_empty = not any(jobs.is_alive(run.point) for run in sweep.runs)
        for run in sweep.runs if not is_empty or was_empty else ():
            progress.show(jobs.result(run))
        if is_empty and was_empty:  # twice: a job whose node fails is put back into the queue
            return None
        if hopeless := jobs.verdict(sweep.runs, ask=ask_job):
            return hopeless
        was_empty = is_empty
        time.sleep(min(15.0, 1 + (time.monotonic() - started) / 20))


# ---- the whole -------------------------------------------------------------------------------------------------------


def run_sweep(arguments: argparse.Namespace) -> int:
    """Carry out the command line.

    Returns:
        Exit status: 0; 1 if a run has not finished or will never start; 130 after an interrupt that ended runs.
    """
    share_cores(arguments)
    planned = build_sweep(arguments)
    jobs = StartedJobs(planned)
    jobs.look()
    if arguments.report:
        return report(planned, jobs, arguments.metric)
    to_do = jobs.to_do()
    check_starts(to_do, arguments)
    if arguments.dry_run:
        return show_plan(planned, jobs, to_do, arguments)
    return train(planned, arguments)


def show_plan(sweep: Sweep, jobs: StartedJobs, to_do: Sequence[Run], arguments: argparse.Namespace) -> int:
    """Print the runs that would be started, and how."""
    print(f"{len(sweep.runs)} runs in {sweep.folder}, {len(to_do)} of them to do")
    for run in sweep.runs:
        print(f"  {run.point.name}: {_WORDS[jobs.result(run).status]}")
    if arguments.cluster == "slurm" and to_do:
        executor = build_executor(sweep, to_do, arguments)
        if len(to_do) > 1:
            executor.parameters["map_count"] = len(to_do)
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"), end="")
    return 0


def train(sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Start what is to do and report when it is done, or say how to ask for that."""
    lock = FolderLock(sweep.folder)
    jobs = StartedJobs(sweep)  # read under the lock: another call may have started some until now
    jobs.look()
    to_do = jobs.to_do()
    if arguments.cluster == "local":
        alive = [jobs.end_command(run.point) for run in sweep.runs if jobs.is_alive(run.point)]
        if alive:
            raise ValueError(
                f"jobs of an earlier call still run or wait; wait for them, or end them first: {', '.join(alive)}"
            )
        is_whole = run_here(sweep, jobs, to_do, arguments)
        status = report(sweep, jobs, arguments.metric)
        lock.release()
        if not is_whole:
            print("interrupted; the same command resumes where the runs have saved", file=sys.stderr)
        return status if is_whole else 128 + signal.SIGINT
    if to_do:
        submit_array(sweep, jobs, to_do, arguments)
    lock.release()
    if to_do and not arguments.wait:
        print("  table:  the same command with --report", flush=True)
    jobs.look()
    hopeless = follow(sweep, jobs) if arguments.wait else jobs.verdict(to_do, ask=first_verdict)
    if hopeless:
        print(f"error: {hopeless}", file=sys.stderr)
        return 1
    return report(sweep, jobs, arguments.metric) if arguments.wait or not to_do else 0
